package ceremony

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/keystore"
)

func ceremonyFile(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ceremony.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestACeremonyFileSaysEverything(t *testing.T) {
	path := ceremonyFile(t, "trust_domain: example.org\ndir: ./root # here\nalgorithm: rsa-3072\nlife: 20y\npath_length: 2\n")
	root, err := ReadRootFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if root.TrustDomain != exampleOrg || root.Dir != filepath.Join(filepath.Dir(path), "root") || root.Algorithm != keystore.RSA3072 ||
		root.Life != 20*365*24*time.Hour || root.PathLen != 2 {
		t.Errorf("%+v", root)
	}
	path = ceremonyFile(t, `
dir: /srv/root
trust_domain: example.org
cluster: east
csr: east.csr.pem
key_fingerprint: SHA256:ab12
out: out/east.pem
algorithm: ecdsa-p256
life: 90d
path_length: 0
`)
	sign, err := ReadSignFile(path)
	if err != nil {
		t.Fatal(err)
	}
	base := filepath.Dir(path)
	if sign.Dir != "/srv/root" || sign.TrustDomain != exampleOrg || sign.Cluster != "east" || sign.RequestFile != filepath.Join(base, "east.csr.pem") ||
		sign.KeyFingerprint != "SHA256:ab12" || sign.Out != filepath.Join(base, "out/east.pem") || sign.Life != 90*24*time.Hour || sign.Algorithm != keystore.ECDSAP256 {
		t.Errorf("%+v", sign)
	}
}

func TestACeremonyFileIsStrict(t *testing.T) {
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
		if _, err := ReadRootFile(ceremonyFile(t, c.text)); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
	// All that is wrong is said at once, and once.
	path := ceremonyFile(t, "trust_domain: example.org\nclutser: East\nkey_fingerprint: x\ncsr: a\nlife: 1h30s5ms\n")
	_, err := ReadSignFile(path)
	want := []string{": dir is missing", ": out is missing", `:2:1: unknown key "clutser"; did you mean "cluster"?`, ":5:7: life: life "}
	lines := strings.Split(fmt.Sprint(err), "\n")
	for i := range want {
		if len(lines) != len(want) || !strings.HasPrefix(lines[i], path+want[i]) {
			t.Errorf("got\n%v\nwant %q", err, want)
			break
		}
	}
	if _, err := ReadSignFile(ceremonyFile(t, "cluster: East\n")); !strings.Contains(fmt.Sprint(err), `:1:1: cluster name "East"`) {
		t.Error(err)
	}
	huge := filepath.Join(t.TempDir(), "huge")
	if err := os.WriteFile(huge, bytes.Repeat([]byte("#"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{huge: "larger than 64 KiB", t.TempDir(): "is a folder", huge + "x": "no such file"} {
		if _, err := ReadSignFile(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestLivesAreReadAsPeopleWriteThem(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"10y": 3650 * 24 * time.Hour, "90d": 90 * 24 * time.Hour, "36h": 36 * time.Hour, "1h30m": 90 * time.Minute,
		"": 0, "y": 0, "-1d": 0, "0d": 0, "1.5y": 0, "300y": 0, "9999999999d": 0, "10ms": 0, "1500ms": 0, "d10": 0, "1d12h": 0,
	} {
		if got, err := ParseLife(s); got != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %s, %v", s, got, err)
		}
	}
}

func FuzzReadSignFile(f *testing.F) {
	f.Add([]byte("dir: root\ntrust_domain: example.org\ncluster: east\ncsr: a\nkey_fingerprint: b\nout: c\n"))
	f.Add([]byte("{a: &x [*x]}"))
	f.Add([]byte("? [a]\n: b\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		file, err := ReadSignFile(ceremonyFile(t, string(text)))
		if err == nil && (file.Cluster == "" || file.Dir == "" || file.Out == "" || file.RequestFile == "") {
			t.Errorf("accepted without what is required: %+v", file)
		}
	})
}
