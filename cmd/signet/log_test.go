package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
)

// loggedServer is the folder of a server that has issued two certificates, and the files an auditor has in hand.
type loggedServer struct {
	t                    *testing.T
	dir, config, vkey    string
	frontend, impostor   string // PEM files; the impostor has the frontend's serial number and is in no log
	serial               string
	issuedAt, enrolledAt time.Time
}

func newLoggedServer(t *testing.T) loggedServer {
	t.Helper()
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	base := t.TempDir()
	s := loggedServer{t: t, dir: filepath.Join(base, "state", "log"), config: filepath.Join(base, "east.yaml")}
	if err := os.WriteFile(s.config, []byte("trust_domain: example.org\ncluster: east\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := audit.Open(t.Context(), audit.Config{Dir: s.dir, Origin: "example.org/east/east-1", Signer: key, CheckpointInterval: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	s.vkey = l.VerifierKey()
	s.issuedAt = time.Now().Add(-time.Hour).Truncate(time.Second)
	s.enrolledAt = s.issuedAt.Add(-time.Hour)
	frontend, impostor := s.certificate(0x4f0a91), s.certificate(0x4f0a91)
	backend := s.certificate(0x77)
	s.serial = "4f0a91"
	issued := func(c *x509.Certificate) *auditv1.Entry {
		return &auditv1.Entry{Time: s.issuedAt.UnixNano(), Event: &auditv1.Entry_CertificateIssued{CertificateIssued: &auditv1.CertificateIssued{
			Tbs:      c.RawTBSCertificate,
			Evidence: &auditv1.Evidence{Agent: "node-1", Door: "agent", Registration: "front\x1b[2J", Selectors: []string{"unix:uid:1000", "unix:gid:7"}},
		}}}
	}
	if _, err := l.Append(t.Context(), []*auditv1.Entry{
		{Time: s.enrolledAt.UnixNano(), Event: &auditv1.Entry_AgentEnrolled{AgentEnrolled: &auditv1.AgentEnrolled{Agent: "node-1", PublicKey: []byte{1}}}},
		issued(frontend), issued(backend),
	}); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	s.frontend, s.impostor = s.pem("frontend.pem", frontend), s.pem("impostor.pem", impostor)
	return s
}

func (s loggedServer) certificate(serial int64) *x509.Certificate {
	s.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	id := &url.URL{Scheme: "spiffe", Host: "example.org", Path: "/ns/shop/sa/frontend"}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), URIs: []*url.URL{id}, NotBefore: s.issuedAt, NotAfter: s.issuedAt.Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

func (s loggedServer) pem(name string, c *x509.Certificate) string {
	s.t.Helper()
	path := filepath.Join(s.t.TempDir(), name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// log runs `signet log …`, checks the exit status, and returns what it printed.
func (s loggedServer) log(code int, args ...string) (out, talk string) {
	s.t.Helper()
	var o, e bytes.Buffer
	c := &cli{in: strings.NewReader(""), out: &o, err: &e}
	if got := c.run(s.t.Context(), append([]string{"log"}, args...)); got != code {
		s.t.Errorf("signet log %s: exit status %d, want %d\n%s%s", strings.Join(args, " "), got, code, &o, &e)
	}
	return o.String(), e.String()
}

func (s loggedServer) says(code int, want string, args ...string) {
	s.t.Helper()
	if out, talk := s.log(code, args...); !strings.Contains(out+talk, want) {
		s.t.Errorf("signet log %s: no %q in\n%s%s", strings.Join(args, " "), want, out, talk)
	}
}

func TestLogFindAnswersWhoGotWhat(t *testing.T) {
	s := newLoggedServer(t)
	for _, folder := range [][]string{{"--dir", s.dir}, {"--config", s.config}, {"--dir", s.dir, "--key", s.vkey}} {
		find := func(code int, args ...string) string {
			t.Helper()
			out, _ := s.log(code, append(append([]string{"find", "-o", "name"}, folder...), args...)...)
			return strings.Join(strings.Fields(out), " ")
		}
		for _, serial := range []string{s.serial, "4F:0A:91", "0x4F0A91", "00:4f:0a:91"} {
			if got := find(0, "--serial", serial); got != "entry/1" {
				t.Errorf("--serial %s: %s", serial, got)
			}
		}
		for _, tc := range []struct {
			want string
			code int
			args []string
		}{
			{"entry/2 entry/1 entry/0", 0, nil},
			{"entry/2 entry/1", 0, []string{"--spiffe-id", "spiffe://example.org/ns/shop/sa/frontend"}},
			{"entry/2 entry/1 entry/0", 0, []string{"--agent", "node-1"}},
			{"entry/0", 0, []string{"--kind", "agent-enrolled"}},
			{"entry/2 entry/1", 0, []string{"--since", "-90m"}},
			{"entry/2 entry/1", 0, []string{"--since", "90m"}},
			{"entry/0", 0, []string{"--until", s.issuedAt.Format(time.RFC3339)}},
			{"entry/2", 0, []string{"--limit", "1"}},
			{"entry/2 entry/1 entry/0", 0, []string{"--prove"}},
			{"", 1, []string{"--agent", "node-2"}},
			{"", 1, []string{"--serial", "00ff"}},
			{"", 2, []string{"--serial", "frontend"}},
			{"", 2, []string{"--kind", "party"}},
			{"", 2, []string{"--since", "yesterday"}},
		} {
			if got := find(tc.code, tc.args...); got != tc.want {
				t.Errorf("%v: %q, want %q", tc.args, got, tc.want)
			}
		}
	}
	out, talk := s.log(0, "find", "--dir", s.dir, "--serial", s.serial)
	for _, want := range []string{"INDEX", "SPIFFE ID", "NOT AFTER", "spiffe://example.org/ns/shop/sa/frontend", "certificate-issued", "node-1", s.issuedAt.UTC().Format(time.RFC3339)} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if talk != "" {
		t.Errorf("said %q", talk)
	}
	out, talk = s.log(0, "find", "--dir", s.dir, "--serial", s.serial, "--prove", "-o", "wide")
	if strings.Contains(out, "\x1b") || !strings.Contains(out, `front\x1b[2J`) {
		t.Errorf("a control sequence of the log's reached the terminal: %q", out)
	}
	if !strings.Contains(talk, s.vkey) {
		t.Errorf("does not say whose key proves it: %q", talk)
	}
	out, _ = s.log(1, "find", "--dir", s.dir, "--agent", "node-2", "-o", "json")
	if strings.TrimSpace(out) != "[]" {
		t.Errorf("nothing as JSON: %q", out)
	}
	var list []map[string]any
	out, _ = s.log(0, "find", "--dir", s.dir, "--serial", s.serial, "-o", "json")
	if err := json.Unmarshal([]byte(out), &list); err != nil || list[0]["serial"] != s.serial || list[0]["spiffe_id"] != "spiffe://example.org/ns/shop/sa/frontend" {
		t.Errorf("%s (%v)", out, err)
	}
}

func TestLogShowShowsAnEntryWhole(t *testing.T) {
	s := newLoggedServer(t)
	for _, want := range []string{"example.org/east/east-1", s.vkey, "size", "3"} {
		s.says(0, want, "show", "--config", s.config)
	}
	for _, want := range []string{"spiffe://example.org/ns/shop/sa/frontend", s.serial, "unix:gid:7", "ECDSA", "agent"} {
		s.says(0, want, "show", "1", "--dir", s.dir)
	}
	s.says(0, `"public_key":"AQ=="`, "show", "0", "--dir", s.dir)
	var v map[string]any
	out, _ := s.log(0, "show", "1", "--dir", s.dir, "-o", "json")
	if err := json.Unmarshal([]byte(out), &v); err != nil || v["index"] != 1.0 || v["entry"] == nil || v["certificate"] == nil || v["proven"] != true {
		t.Errorf("%s (%v)", out, err)
	}
	s.log(0, "show", "1", "--dir", s.dir, "-o", "yaml")
	s.says(1, "not in the audit log", "show", "3", "--dir", s.dir)
	s.says(2, "not a number", "show", "one", "--dir", s.dir)
}

func TestLogProveProvesACertificateAndNoOther(t *testing.T) {
	s := newLoggedServer(t)
	proof := filepath.Join(t.TempDir(), "frontend.tlog-proof")
	s.says(0, "entry 1 of 3", "prove", "--config", s.config, "--cert", s.frontend, "--out", proof)
	s.says(1, "about another certificate", "prove", "--config", s.config, "--cert", s.impostor, "--out", filepath.Join(t.TempDir(), "x"))
	s.says(1, "not in the audit log", "prove", "--dir", s.dir, "--serial", "ff")
	s.says(1, "not in the audit log", "prove", "--dir", s.dir, "--index", "3")
	s.says(2, "one", "prove", "--dir", s.dir)
	s.says(2, "PEM", "prove", "--dir", s.dir, "--cert", s.config)

	// Offline, with no log's folder at hand.
	text, err := os.ReadFile(proof)
	if err != nil {
		t.Fatal(err)
	}
	if out, _ := s.log(0, "prove", "--dir", s.dir, "--serial", "4F:0A:91"); out != string(text) {
		t.Errorf("the same proof by serial number differs:\n%s", out)
	}
	s.says(0, "proven: it is entry 1 of 3", "verify", "--proof", proof, "--cert", s.frontend, "--key", s.vkey)
	s.says(0, s.serial, "verify", "--proof", proof, "--key", s.vkey)
	s.says(1, "not that of the certificate", "verify", "--proof", proof, "--cert", s.impostor, "--key", s.vkey)
	other := newLoggedServer(t)
	s.says(1, "does not hold", "verify", "--proof", proof, "--cert", s.frontend, "--key", other.vkey)
	s.says(2, "--key", "verify", "--proof", proof, "--cert", s.frontend)
	s.says(2, "tlog-proof", "verify", "--proof", s.frontend, "--key", s.vkey)
	for i := range text {
		if i%7 != 0 {
			continue
		}
		bad := bytes.Clone(text)
		bad[i] ^= 1
		path := filepath.Join(t.TempDir(), "bad")
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		var o, e bytes.Buffer
		c := &cli{in: strings.NewReader(""), out: &o, err: &e}
		if c.run(t.Context(), []string{"log", "verify", "--proof", path, "--cert", s.frontend, "--key", s.vkey}) == 0 {
			t.Errorf("byte %d of the proof may be anything", i)
		}
	}
}

func TestLogVerifyNamesWhatIsDamaged(t *testing.T) {
	s := newLoggedServer(t)
	s.says(0, "intact", "verify", "--dir", s.dir, "--key", s.vkey)
	s.says(0, s.vkey, "verify", "--config", s.config)
	s.says(0, "log/example.org/east/east-1", "verify", "--dir", s.dir, "-o", "name")
	flip := func(name string) {
		t.Helper()
		path := filepath.Join(s.dir, name)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		data[len(data)/2] ^= 4
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"tile/entries/000.p/3", "tile/0/000.p/3", "checkpoint"} {
		flip(name)
		s.says(1, name, "verify", "--dir", s.dir, "--key", s.vkey)
		out, _ := s.log(1, "verify", "--dir", s.dir, "--key", s.vkey, "-o", "json")
		var v struct {
			Intact   bool
			Findings []struct{ File string }
		}
		if err := json.Unmarshal([]byte(out), &v); err != nil || v.Intact || len(v.Findings) == 0 {
			t.Errorf("%s (%v)", out, err)
		}
		flip(name)
	}
	s.says(0, "intact", "verify", "--dir", s.dir)
	s.says(2, "log's folder", "verify", "--dir", t.TempDir())
	s.says(2, "no such file", "verify", "--dir", filepath.Join(t.TempDir(), "none"), "--key", s.vkey)
	s.says(2, "--dir", "verify")
	s.says(2, "can't be used together", "verify", "--dir", s.dir, "--config", s.config)
	s.says(2, "log prove --cert", "verify", "--dir", s.dir, "--cert", s.frontend)
}

func TestLogOnACopyWritesNothingIntoIt(t *testing.T) {
	s := newLoggedServer(t)
	entries := func() string {
		list, err := os.ReadDir(s.dir)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range list {
			names = append(names, e.Name())
		}
		return strings.Join(names, " ")
	}
	before := entries()
	s.log(0, "find", "--dir", s.dir)
	s.log(0, "prove", "--dir", s.dir, "--index", "0")
	s.log(0, "verify", "--dir", s.dir)
	if after := entries(); after != before {
		t.Errorf("%s became %s", before, after)
	}
	cache, err := filepath.Glob(filepath.Join(os.Getenv("XDG_CACHE_HOME"), "signet", "log-index", "*.db"))
	if err != nil || len(cache) != 1 {
		t.Errorf("the index is not in the user's cache: %v, %v", cache, err)
	}
	s.log(0, "find", "--config", s.config)
	if _, err := os.Stat(filepath.Join(filepath.Dir(s.dir), "log-index.db")); err != nil {
		t.Errorf("the server's index is not in its state folder: %v", err)
	}
}
