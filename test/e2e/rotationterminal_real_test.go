//go:build real

package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is a pseudo-terminal with a command at it.
type terminal struct {
	t      *testing.T
	cmd    *exec.Cmd
	keys   *os.File
	mu     sync.Mutex
	screen strings.Builder
}

// atTerminal starts a command at a terminal of its own, as a person does.
func (w *world) atTerminal(t *testing.T, args ...string) *terminal {
	t.Helper()
	keys, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { keys.Close() })
	if err := unix.IoctlSetPointerInt(int(keys.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(keys.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	x := &terminal{t: t, keys: keys, cmd: exec.CommandContext(t.Context(), signet, args...)}
	x.cmd.Dir, x.cmd.Stdin, x.cmd.Stdout, x.cmd.Stderr = w.Dir, tty, tty, tty
	x.cmd.Env = append(os.Environ(), "TERM=xterm")
	x.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Pdeathsig: syscall.SIGKILL}
	if err := x.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := keys.Read(buf)
			x.mu.Lock()
			x.screen.Write(buf[:n])
			x.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return x
}

func (x *terminal) text() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.screen.String()
}

// shows waits for words on the screen, after so many bytes of it; it returns how many there are then.
func (x *terminal) shows(after int, words ...string) int {
	x.t.Helper()
	until(x.t, "on the terminal: "+strings.Join(words, ", "), time.Minute, func() error {
		text := strings.Join(strings.Fields(x.text()[after:]), " ")
		for _, w := range words {
			if !strings.Contains(text, w) {
				return fmt.Errorf("%q is missing in:\n%s", w, x.text()[after:])
			}
		}
		return nil
	})
	return len(x.text())
}

func (x *terminal) press(keys string) {
	if _, err := x.keys.WriteString(keys); err != nil {
		x.t.Error(err)
	}
}

// ends waits for the exit status.
func (x *terminal) ends() int {
	err := x.cmd.Wait()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		x.t.Error(err)
	}
	return x.cmd.ProcessState.ExitCode()
}

func TestATaintIsConfirmedAndWatchedAtATerminal(t *testing.T) {
	t.Parallel() // it mostly waits
	// What the agent holds must not end while it is cut off.
	w := newWorld(t, "leaf: { ttl: 10m, max_ttl: 10m, backdate: 1s }\nrotation: { skew: 1s, report_life: 3s }\n")
	_, agent := w.start(t, w.east)
	a := w.firstRoot(t)
	until(t, "a certificate", time.Minute, func() error { return w.under(agent.Socket, a) })
	taint := []string{"ca", "taint", "--config", w.east.Config(), "intermediate-1", "--reason", "stolen"}

	x := w.atTerminal(t, taint...)
	x.shows(0, "can't be taken back", "a request for a new intermediate is made", "as long as "+a.id+" is believed", "Type intermediate-1 to taint it:")
	x.press("intermediate-2\n")
	if code := x.ends(); code != 1 {
		t.Errorf("another word: exit status %d", code)
	}
	x.shows(0, "not confirmed; nothing is changed")
	x = w.atTerminal(t, taint...)
	x.shows(0, "to taint it:")
	x.press("\x04") // the end of the input
	if code := x.ends(); code != 1 {
		t.Errorf("no word: exit status %d", code)
	}
	all, err := w.authorities(t.Context(), w.east)
	if err != nil || all["intermediate-1"].Tainted != nil || len(all) != 2 {
		t.Fatalf("tainted without the word: %v %+v", err, all)
	}

	watch := w.atTerminal(t, "rotation", "status", "--config", w.east.Config(), "--watch")
	seen := watch.shows(0, "CAs", "NEXT", "intermediate-1 active")
	x = w.atTerminal(t, taint...)
	x.shows(0, "to taint it:")
	x.press("intermediate-1\n")
	if code := x.ends(); code != 0 {
		t.Errorf("confirmed: exit status %d\n%s", code, x.text())
	}
	seen = watch.shows(seen, "TAINTED", "FORGED CERTIFICATES ARE ACCEPTED", "intermediate-2 prepared")

	// Its agent is cut off: the bar stands until it has replaced what it holds.
	if err := agent.Halt(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = agent.Resume() }()
	w.rotate(t, w.east, a, "intermediate")
	seen = watch.shows(seen, "[........................................] 1 of 1 agent still")
	if err := agent.Resume(); err != nil {
		t.Fatal(err)
	}
	watch.shows(seen, "\x1b[K", "no agent uses")
	watch.press("\x03")
	if code := watch.ends(); code != 0 {
		t.Errorf("interrupted: exit status %d", code)
	}
}
