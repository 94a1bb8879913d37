package keystore

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/term"

	"github.com/signet-ca/signet/internal/durable"
)

// Passphrase is where the passphrase of a folder of keys comes from. It is asked when a key is first made or opened.
// A source that is also a fmt.Stringer names itself in errors. No source reads the command line or an environment
// variable: other processes see these.
type Passphrase interface {
	Passphrase(ctx context.Context) ([]byte, error)
}

// maxPassphrase is the longest passphrase, in bytes: the longest that `openssl pkey -passin` takes whole.
const maxPassphrase = 1023

// checkPassphrase strips one newline from the end and refuses what OpenSSL would read as something else, since the key
// files promise to open there as well.
func checkPassphrase(p []byte, source string) ([]byte, error) {
	p = bytes.TrimSuffix(p, []byte("\n"))
	switch {
	case len(p) == 0:
		return nil, fmt.Errorf("the %s is empty: keys are never kept without a passphrase", source)
	case len(p) > maxPassphrase:
		return nil, fmt.Errorf("the %s is longer than %d bytes: use a shorter passphrase", source, maxPassphrase)
	case bytes.IndexByte(p, '\n') >= 0:
		return nil, fmt.Errorf("the %s has more than one line: put the passphrase alone into it", source)
	case bytes.IndexByte(p, '\r') >= 0 || bytes.IndexByte(p, 0) >= 0:
		return nil, fmt.Errorf("the %s holds a carriage return or a zero byte: write the passphrase as plain text with Unix line ends", source)
	}
	return p, nil
}

// PassphraseFile reads the passphrase from a file that only its owner may read (durable.ReadSecret): its one line.
func PassphraseFile(path string) Passphrase { return passphraseFile(path) }

type passphraseFile string

func (f passphraseFile) String() string { return "passphrase file " + string(f) }

func (f passphraseFile) Passphrase(context.Context) ([]byte, error) {
	// Two more than the longest, so that the longest with its newline fits and the next is refused by its length.
	p, err := durable.ReadSecret(string(f), maxPassphrase+2)
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	return checkPassphrase(p, f.String())
}

// credentialsDirectory is set by systemd for a unit with LoadCredential= or LoadCredentialEncrypted= (systemd.exec(5)).
const credentialsDirectory = "CREDENTIALS_DIRECTORY"

// PassphraseCredential reads a credential that systemd passes to the service.
func PassphraseCredential(name string) Passphrase { return passphraseCredential(name) }

type passphraseCredential string

func (c passphraseCredential) String() string { return "systemd credential " + string(c) }

func (c passphraseCredential) Passphrase(ctx context.Context) ([]byte, error) {
	dir := os.Getenv(credentialsDirectory)
	switch {
	case c == "" || string(c) != filepath.Base(string(c)) || c == "." || c == "..":
		return nil, fmt.Errorf("systemd credential %.64q: give its bare name", string(c))
	case dir == "":
		return nil, fmt.Errorf("passphrase: no credentials were passed to this process, so %s can't be read: start it as a systemd unit with LoadCredentialEncrypted=%s:…, or use a passphrase file", c, string(c))
	}
	p, err := PassphraseFile(filepath.Join(dir, string(c))).Passphrase(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("passphrase: %s was not passed to this process: add LoadCredentialEncrypted=%s:… to its unit", c, string(c))
	}
	return p, err
}

// PassphraseLocal protects keys by file mode alone: the passphrase is a random secret in dir/seal (0600), made once.
// Whoever reads the folder reads the keys; String says so.
func PassphraseLocal(dir string) Passphrase { return passphraseLocal(dir) }

type passphraseLocal string

const sealFile = "seal"

func (l passphraseLocal) String() string {
	return "local secret " + filepath.Join(string(l), sealFile) + " (keys are protected by file mode alone)"
}

func (l passphraseLocal) Passphrase(ctx context.Context) ([]byte, error) {
	source := PassphraseFile(filepath.Join(string(l), sealFile))
	p, err := source.Passphrase(ctx)
	if !errors.Is(err, fs.ErrNotExist) {
		return p, err
	}
	if err := durable.Dir(string(l)); err != nil {
		return nil, err
	}
	// rand.Text has at least 128 bits. Whoever loses the race to create the file reads the winner's.
	err = durable.CreateFile(filepath.Join(string(l), sealFile), []byte(rand.Text()+rand.Text()+"\n"), 0o600)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return source.Passphrase(ctx)
}

// PassphraseTerminal asks on the controlling terminal, without echo; twice if confirm is set, for a passphrase that is
// being chosen. Without a terminal the error names the other ways.
func PassphraseTerminal(prompt string, confirm bool) Passphrase {
	return passphraseTerminal{prompt: prompt, confirm: confirm, open: func() (*os.File, error) {
		// Not stdin: that may be a pipe with data while a person sits at the terminal.
		return os.OpenFile("/dev/tty", os.O_RDWR, 0)
	}}
}

type passphraseTerminal struct {
	prompt  string
	confirm bool
	open    func() (*os.File, error)
}

func (passphraseTerminal) String() string { return "passphrase from the terminal" }

func (t passphraseTerminal) Passphrase(ctx context.Context) ([]byte, error) {
	tty, err := t.open()
	if err != nil {
		return nil, errNoTerminal
	}
	if !term.IsTerminal(int(tty.Fd())) {
		tty.Close()
		return nil, errNoTerminal
	}
	// Raw before the prompt shows, not by term.ReadPassword after it: what is typed early must not be echoed either.
	before, err := term.MakeRaw(int(tty.Fd()))
	if err != nil {
		tty.Close()
		return nil, fmt.Errorf("passphrase: ask on the terminal: %w", err)
	}
	type answer struct {
		passphrase []byte
		err        error
	}
	done := make(chan answer, 1)
	go func() {
		p, err := t.dialogue(tty)
		done <- answer{p, err}
	}()
	select {
	case a := <-done:
		_ = term.Restore(int(tty.Fd()), before)
		tty.Close()
		return a.passphrase, a.err
	case <-ctx.Done():
		// A blocked read of a terminal can't be called back; it ends with the process. But the echo must not stay off.
		_ = term.Restore(int(tty.Fd()), before)
		_, _ = tty.WriteString("\n")
		go func() { <-done; tty.Close() }()
		return nil, fmt.Errorf("passphrase: %w", context.Cause(ctx))
	}
}

var errNoTerminal = errors.New("passphrase: there is no terminal to ask on: name a passphrase file (--passphrase-file, or passphrase_file in the configuration) or a systemd credential (passphrase_credential)")

func (t passphraseTerminal) dialogue(tty *os.File) ([]byte, error) {
	screen := term.NewTerminal(tty, "")
	ask := func(prompt string) ([]byte, error) {
		p, err := screen.ReadPassword(prompt + ": ")
		if errors.Is(err, io.EOF) { // also what Ctrl-C and Ctrl-D are in raw mode
			return nil, errors.New("passphrase: the question on the terminal was not answered")
		}
		if err != nil {
			return nil, fmt.Errorf("passphrase: read from the terminal: %w", err)
		}
		return checkPassphrase([]byte(p), t.String())
	}
	first, err := ask(t.prompt)
	if err != nil || !t.confirm {
		return first, err
	}
	again, err := ask("The same again")
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(first, again) != 1 {
		return nil, errors.New("the two passphrases differ: nothing was done, try again")
	}
	return first, nil
}
