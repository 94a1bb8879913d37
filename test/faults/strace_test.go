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

func (s *site) trace(t *testing.T, inject string, args ...string) *tracer {
	t.Helper()
	tr := &tracer{out: s.path("strace.out"), done: make(chan struct{})}
	call, _, _ := strings.Cut(inject, ":")
	tr.cmd = exec.Command("strace", append([]string{"-f", "-qq", "-o", tr.out, "-e", "trace=" + call, "-e", "signal=none", "-e", "inject=" + inject}, args...)...)
	tr.cmd.Dir = s.Dir
	log, err := os.OpenFile(s.path("east-server.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
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
func (s *site) attach(t *testing.T, inject string) *tracer {
	t.Helper()
	pid := s.server.PID()
	tr := s.trace(t, inject, "-p", fmt.Sprint(pid))
	err := lab.Until(t.Context(), "strace attached", 5*time.Second, func() error {
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
	case <-time.After(5 * time.Second):
		_ = tr.cmd.Process.Kill()
		<-tr.done
	}
	text, _ := os.ReadFile(tr.out)
	return bytes.Count(text, []byte("(INJECTED)"))
}

// startUnder starts the server under strace and reports whether it was killed before it was ready. It is ended in any case.
func (s *site) startUnder(t *testing.T, inject string) (killed bool) {
	t.Helper()
	// Without --seccomp-bpf, with which strace 6.1 counts wrongly.
	tr := s.trace(t, inject, signet, "serve", "--config", s.east.Config())
	children := fmt.Sprintf("/proc/%d/task/%[1]d/children", tr.cmd.Process.Pid)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ready := make(chan error, 1)
	go func() { ready <- lab.Ready(ctx, "the server under strace", s.east.HTTP) }()
	select {
	case <-tr.done:
		// strace ends by the signal that has ended its child.
		if status, ok := tr.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
			t.Errorf("%s: the server was not killed and ended: %v", inject, tr.cmd.ProcessState)
		}
		return true
	case err := <-ready:
		if err != nil {
			t.Errorf("%s: %v", inject, err)
		}
		list, err := os.ReadFile(children)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(list)))
		if err != nil {
			t.Fatal(err)
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
		<-tr.done
		return false
	}
}
