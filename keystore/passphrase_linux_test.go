package keystore

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// terminal gives both ends of a pseudo-terminal.
func terminal(t *testing.T) (person, tty *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	t.Cleanup(func() { person.Close() })
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	return person, tty
}

// ask runs a dialogue: each time the terminal shows a prompt, the next answer is typed. It returns what was shown.
func ask(t *testing.T, ctx context.Context, confirm bool, answers ...string) (passphrase []byte, shown string, err error) {
	t.Helper()
	person, tty := terminal(t)
	done := make(chan struct{})
	var all strings.Builder
	go func() {
		defer close(done)
		r := bufio.NewReader(person)
		for {
			s, err := r.ReadString(':')
			all.WriteString(s)
			if err != nil {
				return // EIO once the last one closes the terminal
			}
			if len(answers) > 0 {
				_, _ = io.WriteString(person, answers[0]+"\r")
				answers = answers[1:]
			}
		}
	}()
	source := passphraseTerminal{prompt: "Passphrase", confirm: confirm, open: func() (*os.File, error) { return tty, nil }}
	passphrase, err = source.Passphrase(ctx)
	if ctx.Err() == nil {
		<-done
		shown = all.String()
	}
	return passphrase, shown, err
}

func TestTheTerminalAsksWithoutEcho(t *testing.T) {
	got, shown, err := ask(t, t.Context(), false, "hunter2")
	if err != nil || string(got) != "hunter2" {
		t.Errorf("%q, %v", got, err)
	}
	if !strings.Contains(shown, "Passphrase:") || strings.Contains(shown, "hunter2") {
		t.Errorf("the terminal shows %q", shown)
	}
	if got, _, err := ask(t, t.Context(), true, "hunter2", "hunter2"); err != nil || string(got) != "hunter2" {
		t.Errorf("twice: %q, %v", got, err)
	}
	if _, _, err := ask(t, t.Context(), true, "hunter2", "hunter3"); err == nil || !strings.Contains(err.Error(), "differ") {
		t.Errorf("two different: %v", err)
	}
	if _, _, err := ask(t, t.Context(), false, "\x03"); err == nil || !strings.Contains(err.Error(), "not answered") {
		t.Errorf("Ctrl-C: %v", err)
	}
	if _, _, err := ask(t, t.Context(), false, ""); err == nil || !strings.Contains(err.Error(), "empty") {
		t.Errorf("nothing: %v", err)
	}
}

func TestAnInterruptEndsTheQuestionAndGivesTheEchoBack(t *testing.T) {
	person, tty := terminal(t)
	ctx, cancel := context.WithCancel(t.Context())
	source := passphraseTerminal{prompt: "Passphrase", open: func() (*os.File, error) { return tty, nil }}
	result := make(chan error)
	go func() {
		_, err := source.Passphrase(ctx)
		result <- err
	}()
	echo := func() bool {
		tio, err := unix.IoctlGetTermios(int(person.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		return tio.Lflag&unix.ECHO != 0
	}
	if _, err := bufio.NewReader(person).ReadString(':'); err != nil {
		t.Fatal(err)
	}
	if echo() {
		t.Error("the terminal shows the prompt while it still echoes")
	}
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if !echo() {
		t.Error("the terminal is left without echo")
	}
	// The reader that is left behind ends with its terminal.
	person.Close()
}
