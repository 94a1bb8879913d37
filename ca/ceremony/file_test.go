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
	path := ceremonyFile(t, `
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
