//go:build real || soak

// Package faults does to real processes what machines do to them: it kills them at single system calls, fails those
// calls, fills and cuts their disks, damages and turns back their folders, and sets their clocks wrong. What must hold
// afterwards is judged by what the clients have written down, not by the server's word. docs/reliability.md lists it all.
//
// What takes a minute runs with the tag real; the whole sweeps run with the tag soak.
package faults

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
)

// signet is the binary under test; scratch is where it runs, short for Unix sockets' sake.
var signet, scratch string

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	var err error
	if scratch, err = os.MkdirTemp("", "flt"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(scratch)
	signet = filepath.Join(scratch, "signet")
	// Never with -race, see test/e2e.
	if out, err := exec.Command("go", "build", "-o", signet, "github.com/signet-ca/signet/cmd/signet").CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build signet: %w\n%s", err, out)
	}
	if err := os.Setenv("XDG_CACHE_HOME", filepath.Join(scratch, "cache")); err != nil {
		return 0, err
	}
	return m.Run(), nil
}

const registrations = `registrations:
  - { name: web, spiffe_id: spiffe://example.org/web, agents: [node-1, m], selectors: ['unix:uid:%d'] }
  - { name: brief, spiffe_id: spiffe://example.org/brief, ttl: 10s, agents: [node-1], selectors: ['unix:uid:%[1]d'], priority: -1 }
`

// made is an installation with registrations and an enrolled member, of which every test gets a copy.
var made = sync.OnceValues(func() (site, error) {
	l, err := lab.New(filepath.Join(scratch, "made"), signet)
	if err != nil {
		return site{}, err
	}
	defer l.Close()
	east, err := l.NewCluster("east", serverExtra)
	if err != nil {
		return site{}, err
	}
	ctx := context.Background()
	if err := errors.Join(l.MakeRoot(ctx), east.Join(ctx)); err != nil {
		return site{}, err
	}
	if _, err := east.Serve(ctx); err != nil {
		return site{}, err
	}
	if err := east.Apply(ctx, fmt.Sprintf(registrations, os.Getuid())); err != nil {
		return site{}, err
	}
	m, err := east.Member(ctx, "m")
	return site{Lab: l, member: m}, err
})

// serverExtra allows leaves of ten seconds.
const serverExtra = "leaf: { min_useful_life: 2s }\n"

// site is an installation of a test's own: cluster east, a member of it that asks for certificates, and what it was given.
type site struct {
	*lab.Lab
	east   *lab.Cluster
	member *doors.Member
	server *lab.Process
	last   *lab.Process // what outcome has started
	// slowest recovery from a failed call.
	slowest time.Duration
}

var sites atomic.Int64

func newSite(t *testing.T) *site {
	t.Helper()
	from, err := made()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(scratch, fmt.Sprintf("s%d", sites.Add(1)))
	l, err := from.Copy(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Close()
		if t.Failed() {
			logs, _ := filepath.Glob(filepath.Join(dir, "*-*.log"))
			for _, path := range logs {
				text, _ := os.ReadFile(path)
				t.Logf("%s ends with\n%s", filepath.Base(path), text[max(0, len(text)-3000):])
			}
		}
		os.RemoveAll(dir)
	})
	s := &site{Lab: l, member: from.member}
	if s.east, err = l.Cluster("east", serverExtra); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(s.path("given"), 0o700); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) path(elem ...string) string { return filepath.Join(append([]string{s.Dir}, elem...)...) }

// serve starts the server, which must come up by itself whatever happened before.
func (s *site) serve(t *testing.T) {
	t.Helper()
	var err error
	if s.server, err = s.east.Serve(t.Context()); err != nil {
		t.Fatalf("the server does not start again: %v", err)
	}
}

// record writes a certificate to a file of its own, durably, before anybody uses it. The same serial twice is an error.
func (s *site) record(der []byte) error {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(s.path("given", hex.EncodeToString(cert.SerialNumber.Bytes())), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("a serial was given twice: %w", err)
	}
	defer f.Close()
	_, err = f.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return errors.Join(err, f.Sync())
}

// issue asks for one certificate and records it.
func (s *site) issue(ctx context.Context, m *doors.Member) error {
	ctx, cancel := context.WithTimeout(ctx, 12*time.Second)
	defer cancel()
	conn, err := m.Dial(s.east.Agents, m.ControlCA)
	if err != nil {
		return err
	}
	defer conn.Close()
	key, err := doors.NewKey()
	if err != nil {
		return err
	}
	csr, err := doors.CSR(key, nil)
	if err != nil {
		return err
	}
	cert, err := doors.Issue(ctx, conn, "web", []string{fmt.Sprintf("unix:uid:%d", os.Getuid())}, csr)
	if err != nil {
		return err
	}
	return s.record(cert.Chain[0])
}

// unavailable: refused for now, in the protocol's words, and not for another reason.
func unavailable(err error) bool {
	return status.Code(err) == codes.Unavailable || strings.HasPrefix(err.Error(), "REASON_UNAVAILABLE")
}

// enrol spends a token and records the control certificate.
func (s *site) enrol(ctx context.Context, token string) (*doors.Member, error) {
	ctx, cancel := context.WithTimeout(ctx, 12*time.Second)
	defer cancel()
	m, err := doors.Enrol(ctx, token)
	if err != nil {
		return nil, err
	}
	return m, s.record(m.Chain[0])
}

func (s *site) token(t *testing.T, agent string) string {
	t.Helper()
	token, err := s.east.Token(t.Context(), agent)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// judge holds what clients have been given against the log: each certificate is in it, with proof, its serial once.
func (s *site) judge(t *testing.T) {
	t.Helper()
	given, err := filepath.Glob(s.path("given", "*"))
	if err != nil {
		t.Fatal(err)
	}
	// A checkpoint that covers the last entries is due within a second.
	err = lab.Until(t.Context(), "what clients hold is proven by the log", 30*time.Second, func() error {
		var entries []struct {
			Serial string `json:"serial"`
			Proven bool   `json:"proven"`
		}
		out, err := s.Run(t.Context(), "log", "find", "--config", s.east.Config(), "--limit", "0", "--prove", "-o", "json")
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), &entries); err != nil {
			return err
		}
		proven := map[string]bool{}
		for _, e := range entries {
			if e.Serial == "" {
				continue
			}
			if proven[e.Serial] {
				return fmt.Errorf("serial %s is in the log twice", e.Serial)
			}
			proven[e.Serial] = e.Proven
		}
		for _, path := range given {
			if !proven[filepath.Base(path)] {
				return fmt.Errorf("certificate %s was given, and the log does not prove it", filepath.Base(path))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// verify re-hashes the whole log, and proves the last certificates byte for byte.
func (s *site) verify(t *testing.T) {
	t.Helper()
	s.judge(t)
	if _, err := s.Run(t.Context(), "log", "verify", "--config", s.east.Config()); err != nil {
		t.Error(err)
	}
	given, _ := filepath.Glob(s.path("given", "*"))
	for _, path := range given[max(0, len(given)-5):] {
		if _, err := s.Run(t.Context(), "log", "prove", "--config", s.east.Config(), "--cert", path, "--out", s.path("proof")); err != nil {
			t.Error(err)
		}
	}
	if len(given) == 0 {
		t.Error("no certificate was given")
	}
	t.Logf("%d certificates given, all proven", len(given))
}

// get asks a process's http door; status 0 = no answer.
func get(addr, path string) (int, string) {
	client := http.Client{Timeout: 10 * time.Second}
	resp, err := client.Get("http://" + addr + path)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, string(text)
}

// red waits until a process says that it is not ready; a second is what it may take.
func red(t *testing.T, addr string) {
	t.Helper()
	start := time.Now()
	for {
		asked := time.Since(start) // when, and not when the answer came: the machine may be busy
		if code, text := get(addr, "/readyz"); code != http.StatusOK {
			t.Logf("not ready after %v: %s", time.Since(start).Round(time.Millisecond), strings.ReplaceAll(strings.TrimSpace(text), "\n", "; "))
			return
		}
		if asked > time.Second {
			t.Errorf("/readyz still says ready when asked after %v", asked)
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// heals waits until the server issues and is ready, without a restart.
func (s *site) heals(t *testing.T) {
	t.Helper()
	if s.ends(t, "no fault any more") {
		t.Error("the server has ended")
	}
}

// ends waits until the server issues and is ready, or has ended by itself, which may take its time.
func (s *site) ends(t *testing.T, after string) (over bool) {
	t.Helper()
	began := time.Now()
	err := lab.Until(t.Context(), after+": the server issues again", 30*time.Second, func() error {
		if over = !alive(s.server); over {
			return nil
		}
		return s.issue(t.Context(), s.member)
	})
	if err == nil && !over {
		err = lab.Ready(t.Context(), "the server", s.east.HTTP)
	}
	switch took := time.Since(began); {
	case err != nil:
		t.Error(err)
	case !over:
		t.Logf("healed after %v", took.Round(time.Millisecond))
		s.slowest = max(s.slowest, took)
	}
	return over
}

func alive(p *lab.Process) bool { return !died(p, 0) }

// died waits a moment for the death of a process.
func died(p *lab.Process, limit time.Duration) bool {
	select {
	case <-p.Done():
		return true
	default:
	}
	select {
	case <-p.Done():
		return true
	case <-time.After(limit):
		return false
	}
}
