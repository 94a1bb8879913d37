package keystore

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAPassphraseFileIsOneLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pass")
	for content, want := range map[string]string{
		"hunter2":                        "",
		"hunter2\n":                      "",
		" with blanks \n":                "",
		strings.Repeat("x", 1023):        "",
		strings.Repeat("x", 1023) + "\n": "",
		"":                               "is empty",
		"\n":                             "is empty",
		"a\nb\n":                         "more than one line",
		"a\n\n":                          "more than one line",
		"a\r\n":                          "carriage return",
		"a\x00b":                         "zero byte",
		strings.Repeat("x", 1024):        "longer than 1023 bytes",
		strings.Repeat("x", 2000):        "at most 1025 are allowed",
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := PassphraseFile(path).Passphrase(t.Context())
		switch {
		case want == "" && (err != nil || string(got) != strings.TrimSuffix(content, "\n")):
			t.Errorf("%.20q: %q, %v", content, got, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path)):
			t.Errorf("%.20q: %v, want words %q", content, err, want)
		}
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := PassphraseFile(path).Passphrase(t.Context()); err == nil || !strings.Contains(err.Error(), "chmod 0600") {
		t.Errorf("a file for all to read: %v", err)
	}
}

func TestACredentialComesFromSystemd(t *testing.T) {
	t.Setenv(credentialsDirectory, "")
	c := PassphraseCredential("signet")
	if _, err := c.Passphrase(t.Context()); err == nil || !strings.Contains(err.Error(), "LoadCredentialEncrypted=signet:") {
		t.Errorf("without systemd: %v", err)
	}
	dir := t.TempDir()
	t.Setenv(credentialsDirectory, dir)
	if _, err := c.Passphrase(t.Context()); err == nil || !strings.Contains(err.Error(), "systemd credential signet was not passed to this process") {
		t.Errorf("not passed: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "signet"), []byte("hunter2"), 0o400); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Passphrase(t.Context()); err != nil || string(got) != "hunter2" {
		t.Errorf("%q, %v", got, err)
	}
	for _, name := range []string{"", ".", "..", "../signet", "a/b", "/etc/passwd"} {
		if _, err := PassphraseCredential(name).Passphrase(t.Context()); err == nil || !strings.Contains(err.Error(), "bare name") {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestALocalSecretIsMadeOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	got := make(chan string, 8)
	for range cap(got) {
		go func() {
			p, err := PassphraseLocal(dir).Passphrase(t.Context())
			if err != nil {
				t.Error(err)
			}
			got <- string(p)
		}()
	}
	first := <-got
	if len(first) < 26 {
		t.Errorf("a secret of %d letters", len(first))
	}
	for range cap(got) - 1 {
		if again := <-got; again != first {
			t.Error("two secrets for one folder")
		}
	}
	if info, err := os.Stat(filepath.Join(dir, sealFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if s := fmt.Sprint(PassphraseLocal(dir)); !strings.Contains(s, "file mode alone") {
		t.Errorf("says %q", s)
	}
}

func TestWithoutATerminalTheOtherWaysAreNamed(t *testing.T) {
	notATerminal := func() (*os.File, error) { return os.Open(os.DevNull) }
	nothing := func() (*os.File, error) { return nil, os.ErrNotExist }
	for _, open := range []func() (*os.File, error){notATerminal, nothing} {
		_, err := passphraseTerminal{open: open}.Passphrase(t.Context())
		if err == nil || !strings.Contains(err.Error(), "--passphrase-file") {
			t.Errorf("got %v", err)
		}
	}
}
