package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/keystore"
)

func TestARootFileSaysEverything(t *testing.T) {
	const text = "trust_domain: example.org\ndir: ./root # here\nalgorithm: rsa-3072\nlife: 20y\npath_length: 2\n"
	path := write(t, filepath.Join(t.TempDir(), "root.yaml"), text)
	root, key, err := readRootFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if root.TrustDomain.Name() != "example.org" || root.Dir != filepath.Join(filepath.Dir(path), "root") || root.Algorithm != keystore.RSA3072 ||
		root.Life != 20*365*24*time.Hour || root.PathLen != 2 || key != nil {
		t.Errorf("%+v, %+v", root, key)
	}
	write(t, path, text+"vault: {address: 'https://v:8200', timeout: 700ms, login: {method: token, token_file: tok}}\npki: {}\n")
	if _, key, err = readRootFile(path); err != nil || key == nil {
		t.Fatal(key, err)
	}
	if key.PKI != (config.RootPKI{Mount: "pki", Issuer: "signet-example.org-root"}) || key.Vault.Timeout != 700*time.Millisecond ||
		key.Vault.Login.TokenFile != filepath.Join(filepath.Dir(path), "tok") {
		t.Errorf("%+v", key)
	}
}

func TestARootFileIsStrict(t *testing.T) {
	const good = "trust_domain: example.org\ndir: root\n"
	for name, c := range map[string]struct{ text, want string }{
		"unknown key":      {good + "lief: 10y\n", `:3:1: unknown key "lief"; did you mean "life"?`},
		"far off":          {good + "colour: red\n", "known are trust_domain"},
		"twice":            {good + "dir: other\n", ":3:1: dir is given twice"},
		"missing":          {"dir: root\n", "trust_domain is missing"},
		"empty":            {"# nothing\n", "needs trust_domain, dir"},
		"nested":           {good + "life:\n  years: 10\n", ":4:3: life: want one value"},
		"no value":         {good + "life:\n", ":3:6: life has no value: give it one or remove the key"},
		"a list":           {"- a\n", ":1:1: the ceremony file: want keys with values, got a list"},
		"two documents":    {good + "---\n" + good, "second document"},
		"no YAML":          {"a: [b", ":1: this is not YAML: "},
		"bad life":         {good + "life: long\n", `:3:7: life: life "long": want years`},
		"bad number":       {good + "path_length: one\n", `:3:14: path_length: want a whole number, got "one"`},
		"no path length":   {good + "path_length: 0\n", ":3:1: path_length 0: the root could sign no intermediate"},
		"bad trust domain": {"trust_domain: https://x\ndir: root\n", ":1:15: trust_domain:"},
		"empty path":       {"trust_domain: example.org\ndir: ''\n", ":2:1: dir has no value"},
	} {
		if _, _, err := readRootFile(write(t, filepath.Join(t.TempDir(), "root.yaml"), c.text)); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
	for text, want := range map[string]string{
		"transit: {}\n": "vault.address is missing",
		"vault: {address: 'https://v:8200', login: {method: token, token_file: t}}\n":                           ":3:1: give either transit",
		"vault: {address: 'http://v:8200', login: {method: token, token_file: t}}\ntransit: {}\n":               "cross the network in clear",
		"vault: {address: 'https://v:8200', login: {method: token, token_file: t}}\npki: {issuer: default}\n":   "give the root's a name",
		"vault: {address: 'https://v:8200', login: {method: token, tocken_file: t}}\ntransit: {}\n":             `did you mean "token_file"`,
		"vault: {address: 'https://v:8200', login: {method: token, token_file: t}}\ntransit: {}\npki: {}\n":     "give either transit",
		"vault: {address: 'https://v:8200', login: {method: token, token_file: t}}\ntransit: {prefix: 'a/b'}\n": `transit.prefix "a/b"`,
	} {
		if _, _, err := readRootFile(write(t, filepath.Join(t.TempDir(), "root.yaml"), good+text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}

func FuzzReadRootFile(f *testing.F) {
	f.Add("dir: root\ntrust_domain: example.org\n")
	f.Add("dir: root\ntrust_domain: example.org\nvault: {address: 'https://v', login: {method: cert}}\npki: {}\n")
	f.Add("{a: &x [*x]}")
	f.Fuzz(func(t *testing.T, text string) {
		c, key, err := readRootFile(write(t, filepath.Join(t.TempDir(), "root.yaml"), text))
		if err == nil && (c.Dir == "" || c.TrustDomain.IsZero() || key != nil && (key.Vault.Address == "" || (key.PKI.Mount == "") == (key.Transit.Mount == ""))) {
			t.Errorf("accepted without what is required: %+v %+v", c, key)
		}
	})
}

// vaultFile says that the root's key is in a Vault where nobody listens.
func vaultFile(t *testing.T, engine string) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "token"), "s.secret")
	return write(t, filepath.Join(dir, "vault.yaml"), "vault:\n  address: http://127.0.0.1:1\n  timeout: 20s\n  login: {method: token, token_file: token}\n"+engine)
}

func TestADryRunSaysWhereTheKeyWillBeAndWhichPolicyThatNeeds(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "root")
	for engine, want := range map[string][]string{
		"transit: {mount: keys}\n": {
			"key in:", "Vault's Transit engine, mount keys, key signet_example.org_root, at http://127.0.0.1:1",
			`path "keys/keys/signet_example.org_root"`, `"type" = ["ecdsa-p256"]`, `path "keys/sign/signet_example.org_root/sha2-256"`, `path "auth/token/lookup-self"`,
		},
		"pki: {issuer: root-2026}\n": {
			"Vault's PKI engine, mount pki, issuer root-2026,", `path "pki/issuers/generate/root/internal"`, `path "pki/issuer/+/sign-intermediate"`,
		},
	} {
		r := root(t, "init", "--trust-domain", "example.org", "--dir", dir, "--vault", vaultFile(t, engine), "--dry-run").expect(t, exitYes, "")
		contains(t, r.out, want...)
	}
	// By the algorithm that was chosen, on the command line or in a file.
	r := root(t, "init", "--trust-domain", "example.org", "--dir", dir, "--vault", vaultFile(t, "transit: {}\n"), "--algorithm", "ecdsa-p384", "--dry-run").expect(t, exitYes, "")
	contains(t, r.out, `"type" = ["ecdsa-p384"]`, `_root/sha2-384"`)
	file := vaultFile(t, "transit: {}\ntrust_domain: example.org\ndir: root\n")
	r = root(t, "init", "-f", file, "--dry-run").expect(t, exitYes, "")
	contains(t, r.out, `"type" = ["ecdsa-p256"]`, `_root/sha2-256"`)
	if strings.Contains(r.out, "not known") {
		t.Errorf("it doesn't know what it prints above:\n%s", r.out)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a dry run made something")
	}
}

func TestAVaultThatIsAwayLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	pass := write(t, filepath.Join(dir, "pass"), "correct horse\n")
	for _, engine := range []string{"transit: {}\n", "pki: {}\n"} {
		r := root(t, "init", "--trust-domain", "example.org", "--dir", filepath.Join(dir, "root"), "--passphrase-file", pass, "--vault", vaultFile(t, engine)).
			expect(t, exitCouldNotSay, "Vault is not reachable")
		if strings.Contains(r.err, "s.secret") || r.out != "" {
			t.Errorf("%+v", r)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left over: %v, %v", left, err)
	}
	root(t, "init", "--trust-domain", "example.org", "--dir", dir+"/root", "--vault", dir+"/none.yaml").expect(t, exitCouldNotSay, "no such file")
	root(t, "init", "-f", vaultFile(t, ""), "--vault", vaultFile(t, "pki: {}\n")).expect(t, exitCouldNotSay, "--vault and -f can't be used together")
	root(t, "init", "--trust-domain", "example.org", "--dir", dir+"/root", "--vault", vaultFile(t, "")).expect(t, exitCouldNotSay, "give either transit")
}

func TestARootBegunElsewhereIsNotMixedUp(t *testing.T) {
	d := newDesk(t)
	begun := filepath.Join(d.dir, "begun")
	if err := os.Mkdir(begun, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(begun, "key.yaml"), "vault: {}\n")
	root(t, "init", "--trust-domain", "example.org", "--dir", begun, "--passphrase-file", d.pass).
		expect(t, exitNo, "a root was begun there whose key is elsewhere")
	root(t, "init", "--trust-domain", "example.org", "--dir", begun, "--passphrase-file", d.pass, "--vault", vaultFile(t, "pki: {}\n")).
		expect(t, exitNo, "is somewhere else (key.yaml) than is asked for now")
	root(t, "init", "--trust-domain", "example.org", "--dir", d.root, "--passphrase-file", d.pass, "--vault", vaultFile(t, "pki: {}\n")).
		expect(t, exitNo, "a root is there already").expect(t, exitNo, d.rootFingerprint)
	// A root folder whose key.yaml can't be used, or is for an engine that can't do what is asked.
	write(t, filepath.Join(d.root, "key.yaml"), "vault: {}\n")
	d.sign(t, "--dry-run").expect(t, exitCouldNotSay, "vault.address is missing")
	root(t, "show", "--dir", d.root).expect(t, exitCouldNotSay, "vault.address is missing")
	text, err := os.ReadFile(vaultFile(t, "pki: {}\n"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(d.root, "token"), "s.secret")
	write(t, filepath.Join(d.root, "key.yaml"), string(text))
	if dry := d.sign(t, "--dry-run").expect(t, exitYes, "").out; !strings.Contains(dry, "of Vault's choice") || !strings.Contains(dry, "with its key in Vault's PKI engine") {
		t.Errorf("got %s", dry)
	}
	d.sign(t).expect(t, exitCouldNotSay, "Vault is not reachable")
	d.sign(t, "--csr", d.csr, "--csr", d.csr, "--fingerprint", d.key, "--fingerprint", d.key, "--stagger", "1d").
		expect(t, exitCouldNotSay, "--stagger can't be used with it")
	if out := root(t, "show", "--dir", d.root).expect(t, exitYes, "").out; !strings.Contains(out, "Vault's PKI engine, mount pki, issuer signet-example.org-root") {
		t.Errorf("got %s", out)
	}
}
