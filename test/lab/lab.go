// Package lab sets up real installations of Signet, as an admin would: by the commands of one binary, in a folder, with
// processes that end with the lab. The demo, the benchmarks and the end-to-end tests stand on it.
package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// TrustDomain of every lab.
const TrustDomain = "example.org"

// Lab is a folder with what was made in it, and the processes that run there.
type Lab struct {
	Dir    string
	signet string
	procs  []*Process
	// RootFingerprint is known after MakeRoot.
	RootFingerprint string
}

// New empties the folder. signet is the binary all commands run.
func New(dir, signet string) (*Lab, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if signet, err = filepath.Abs(signet); err != nil {
		return nil, err
	}
	if _, err := os.Stat(signet); err != nil {
		return nil, fmt.Errorf("the signet binary: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &Lab{Dir: dir, signet: signet}, nil
}

// Copy makes a lab of a copy of this one's folder, in which nothing may run meanwhile.
func (l *Lab) Copy(dir string) (*Lab, error) {
	c, err := New(dir, l.signet)
	if err != nil {
		return nil, err
	}
	c.RootFingerprint = l.RootFingerprint
	if out, err := exec.Command("cp", "-a", l.Dir+"/.", c.Dir).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("copy %s to %s: %w: %s", l.Dir, c.Dir, err, out)
	}
	return c, nil
}

// CommandError is a command that did not exit with 0.
type CommandError struct {
	Args     []string
	ExitCode int
	Stderr   string
}

func (e *CommandError) Error() string {
	return fmt.Sprintf("signet %s: exit status %d: %s", strings.Join(e.Args, " "), e.ExitCode, e.Stderr)
}

// Run calls the signet command in the lab's folder and returns what it printed on stdout.
func (l *Lab) Run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, l.signet, args...)
	cmd.Dir = l.Dir
	var out, talk bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &talk
	err := cmd.Run()
	l.Note("$ signet %s\n%s%s", strings.Join(args, " "), out.String(), talk.String())
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return out.String(), &CommandError{Args: args, ExitCode: exit.ExitCode(), Stderr: strings.TrimSpace(talk.String())}
	}
	return out.String(), err
}

// JSON runs a read command with -o json.
func (l *Lab) JSON(ctx context.Context, into any, args ...string) error {
	out, err := l.Run(ctx, append(slices.Clip(args), "-o", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		return fmt.Errorf("signet %s -o json: %w", strings.Join(args, " "), err)
	}
	return nil
}

// Refuses runs a command that must answer no: exit status 1, with a reason, which it returns.
func (l *Lab) Refuses(ctx context.Context, args ...string) (string, error) {
	return l.Fails(ctx, 1, args...)
}

// Fails runs a command that must exit with the given status and a reason.
func (l *Lab) Fails(ctx context.Context, status int, args ...string) (string, error) {
	_, err := l.Run(ctx, args...)
	var failed *CommandError
	switch {
	case err == nil:
		return "", fmt.Errorf("signet %s was not refused", strings.Join(args, " "))
	case !errors.As(err, &failed) || failed.ExitCode != status:
		return "", fmt.Errorf("want a refusal with exit status %d: %w", status, err)
	case failed.Stderr == "":
		return "", fmt.Errorf("signet %s refused without a reason", strings.Join(args, " "))
	}
	return failed.Stderr, nil
}

// Note writes to lab.log.
func (l *Lab) Note(format string, args ...any) {
	f, err := os.OpenFile(filepath.Join(l.Dir, "lab.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	fmt.Fprintf(f, "%s "+format+"\n", append([]any{time.Now().Format("15:04:05.000")}, args...)...)
}

// Write makes a file, 0600, and its folder.
func (l *Lab) Write(name, content string) error {
	path := filepath.Join(l.Dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(content), 0o600)
}

// Passphrase makes a passphrase file.
func (l *Lab) Passphrase(name string) error { return l.Write(name, rand.Text()+"\n") }

// Process is a child of a lab or of a Vault, and ends with it.
type Process struct {
	Name string
	cmd  *exec.Cmd
	done chan struct{}
}

// PID of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Kill ends the process at once, as a power cut would.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Stop asks the process to end, and ends it after 20 s: a server gives calls under way 5 s, and what it would leave behind then, a
// socket or a journal, is in the way of who comes next.
func (p *Process) Stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		p.Kill()
	}
}

// Halt stops the process where it is, until Resume. It returns when each thread has stopped: the signal alone reaches them one after
// the other, and meanwhile the rest go on.
func (p *Process) Halt(ctx context.Context) error {
	if err := p.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		return fmt.Errorf("halt %s: %w", p.Name, err)
	}
	return Until(ctx, p.Name+" halted", 20*time.Second, func() error {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.PID()))
		if err != nil || len(threads) == 0 {
			return errors.Join(errors.New("it has no threads"), err)
		}
		for _, thread := range threads {
			if b, err := os.ReadFile(thread); err != nil || !bytes.Contains(b, []byte("State:\tT")) {
				return errors.Join(fmt.Errorf("%s has not stopped", thread), err)
			}
		}
		return nil
	})
}

// Resume lets a process that was halted go on.
func (p *Process) Resume() error { return p.cmd.Process.Signal(syscall.SIGCONT) }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

func (p *Process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Start runs a long-lived signet; its output goes to <name>.log. The child dies with the thread that called.
func (l *Lab) Start(name string, args ...string) (*Process, error) {
	cmd := exec.Command(l.signet, args...)
	cmd.Dir = l.Dir
	p, err := start(name, cmd, filepath.Join(l.Dir, name+".log"))
	if err != nil {
		return nil, err
	}
	l.procs = append(l.procs, p)
	return p, nil
}

// start runs a child that dies with the thread that called, and is in that thread's namespaces. Its output is appended to a file.
func start(name string, cmd *exec.Cmd, output string) (*Process, error) {
	out, err := os.OpenFile(output, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Process{Name: name, cmd: cmd, done: make(chan struct{})}
	go func() { _ = cmd.Wait(); close(p.done) }()
	return p, nil
}

// Ended names a process that has ended by itself, if one has.
func (l *Lab) Ended() (string, bool) {
	for _, p := range l.procs {
		if p.ended() {
			return p.Name, true
		}
	}
	return "", false
}

// Close stops all processes, the last started first.
func (l *Lab) Close() {
	for _, p := range slices.Backward(l.procs) {
		p.Stop()
	}
}

// Until polls a condition that another process brings about. It asks less and less often: most askers start a process, and what
// is waited for needs the machine too.
func Until(ctx context.Context, what string, limit time.Duration, ok func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for pause := 20 * time.Millisecond; ; pause = min(pause*5/4, 200*time.Millisecond) {
		err := ok()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not within %s: %w", what, limit, err)
		case <-time.After(pause):
		}
	}
}

// Ready waits until /readyz says so.
func Ready(ctx context.Context, who, addr string) error {
	client := http.Client{Timeout: 20 * time.Second} // who takes a connection and hangs is asked again
	return Until(ctx, who+" ready", time.Minute, func() error {
		resp, err := client.Get("http://" + addr + "/readyz")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz answers %s", resp.Status)
		}
		return nil
	})
}
