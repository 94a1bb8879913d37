//go:build real || soak

package faults

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

// needsStrace skips where processes can't be traced.
func needsStrace(t *testing.T) {
	t.Helper()
	if out, err := exec.Command("strace", "-f", "-o", "/dev/null", "-e", "trace=fsync", "-e", "inject=fsync:error=EIO", "true").CombinedOutput(); err != nil {
		t.Skipf("strace does not work here: %v %s", err, out)
	}
}

// tracer is a strace that does something to a process at a system call.
type tracer struct {
	cmd  *exec.Cmd
	out  string
	done chan struct{}
}

// trace runs strace over calls, of which inject fails one or kills at it; "" only watches. What the process says goes to its log.
func (s *site) trace(t *testing.T, name, calls, inject string, args ...string) *tracer {
	t.Helper()
	tr := &tracer{out: s.path("strace.out"), done: make(chan struct{})}
	// Without --seccomp-bpf, with which strace 6.1 counts wrongly.
	flags := []string{"-f", "-qq", "-o", tr.out, "-e", "trace=" + calls, "-e", "signal=none"}
	if inject != "" {
		flags = append(flags, "-e", "inject="+inject)
	}
	tr.cmd = exec.Command("strace", append(flags, args...)...)
	tr.cmd.Dir = s.Dir
	log, err := os.OpenFile(s.path(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	tr.cmd.Stdout, tr.cmd.Stderr = log, log
	tr.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := tr.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = tr.cmd.Wait(); close(tr.done) }()
	return tr
}

// attach puts a running server under strace; counts of calls begin here, in each thread.
func (s *site) attach(t *testing.T, calls, inject string) *tracer {
	t.Helper()
	pid := s.server.PID()
	tr := s.trace(t, "east-server", calls, inject, "-p", fmt.Sprint(pid))
	err := lab.Until(t.Context(), "strace attached", 20*time.Second, func() error {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		if err != nil {
			return err
		}
		for _, path := range tasks {
			if status, err := os.ReadFile(path); err == nil && bytes.Contains(status, []byte("TracerPid:\t0\n")) {
				return fmt.Errorf("%s is not traced yet", path)
			}
		}
		return nil
	})
	if err != nil && alive(s.server) {
		t.Fatal(err)
	}
	return tr
}

// detach lets the process go, and returns how many calls were failed.
func (tr *tracer) detach() int {
	_ = tr.cmd.Process.Signal(syscall.SIGINT)
	select {
	case <-tr.done:
	case <-time.After(30 * time.Second): // by force what it has not written yet is lost
		_ = tr.cmd.Process.Kill()
		<-tr.done
	}
	return tr.injected()
}

func (tr *tracer) injected() int {
	text, _ := os.ReadFile(tr.out)
	return bytes.Count(text, []byte("(INJECTED)"))
}

// most is how often the busiest thread made each call.
func (tr *tracer) most() map[string]int {
	text, _ := os.ReadFile(tr.out)
	by, most := map[string]int{}, map[string]int{}
	for line := range strings.Lines(string(text)) {
		thread, rest, _ := strings.Cut(line, " ")
		call, _, ok := strings.Cut(strings.TrimSpace(rest), "(")
		if !ok || strings.HasPrefix(call, "<...") {
			continue
		}
		by[thread+call]++
		most[call] = max(most[call], by[thread+call])
	}
	return most
}

// program is what can be started under strace.
type program struct {
	name, http string
	args       []string
}

func (s *site) program() program {
	return program{"east-server", s.east.HTTP, []string{"serve", "--config", s.east.Config()}}
}

// How a program that was started under strace came out.
const (
	ready = iota
	killed
	ended // by itself
)

// startUnder starts a program under strace. What comes up does something more, and is killed then in any case.
func (s *site) startUnder(t *testing.T, p program, calls, inject string, up func()) (int, *tracer) {
	t.Helper()
	tr := s.trace(t, p.name, calls, inject, append([]string{signet}, p.args...)...)
	children := fmt.Sprintf("/proc/%d/task/%[1]d/children", tr.cmd.Process.Pid)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	isReady := make(chan error, 1)
	go func() { isReady <- lab.Ready(ctx, p.name+" under strace", p.http) }()
	how := func() int {
		// strace ends by the signal that has ended its child.
		if status, ok := tr.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signal() == syscall.SIGKILL {
			return killed
		}
		return ended
	}
	select {
	case <-tr.done:
		return how(), tr
	case err := <-isReady:
		if err != nil {
			t.Errorf("%s: %v", inject, err)
		} else if up != nil {
			up()
		}
		select {
		case <-tr.done:
			return how(), tr
		default:
		}
		list, err := os.ReadFile(children)
		if err == nil {
			if pid, err := strconv.Atoi(strings.TrimSpace(string(list))); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		<-tr.done
		return ready, tr
	}
}
