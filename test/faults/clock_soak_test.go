//go:build soak

package faults

import (
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

// skewed is a Go file that joins package time: the wall clock of a process is off by what a mapped file says, now.
const skewed = `package time

import (
	"unsafe"
)

var skew = func() *int64 {
	path, ok := syscall.Getenv("SKEW")
	if !ok {
		return new(int64)
	}
	fd, err := syscall.Open(path, syscall.O_RDONLY, 0)
	if err != nil {
		panic(err)
	}
	page, err := syscall.Mmap(fd, 0, 8, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		panic(err)
	}
	return (*int64)(unsafe.Pointer(&page[0]))
}()
`

// skewable builds signet with a wall clock that a test can set. Nothing else shifts what a Go program takes for the time:
// it asks the kernel past libc, and time namespaces do not have the wall clock.
func skewable(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	std := filepath.Join(strings.TrimSpace(string(out)), "src/time")
	text, err := os.ReadFile(filepath.Join(std, "time.go"))
	if err != nil {
		t.Fatal(err)
	}
	const ask = "sec, nsec, mono := runtimeNow()\n"
	at := strings.Index(string(text), "func Now() Time {\n\t"+ask)
	if at < 0 {
		t.Skip("this Go's time.Now looks different")
	}
	at += len("func Now() Time {\n\t" + ask)
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{
		filepath.Join(std, "time.go"): write("time.go", string(text[:at])+"\tsec += *skew\n"+string(text[at:])),
		filepath.Join(std, "skew.go"): write("skew.go", skewed),
	}})
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "signet")
	if out, err := exec.Command("go", "build", "-overlay", write("overlay.json", string(overlay)), "-o", binary, "github.com/signet-ca/signet/cmd/signet").CombinedOutput(); err != nil {
		t.Fatalf("build with another clock: %v\n%s", err, out)
	}
	return binary
}

// node is a machine with a clock of its own.
type node struct {
	*lab.Lab
	clock, socket, http string
}

func newNode(t *testing.T, s *site, binary, token string) *node {
	t.Helper()
	l, err := lab.New(filepath.Join(scratch, fmt.Sprintf("n%d", sites.Add(1))), binary)
	if err != nil {
		t.Fatal(err)
	}
	ports, err := lab.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Lab: l, clock: filepath.Join(l.Dir, "clock"), socket: filepath.Join(l.Dir, "a.sock"), http: fmt.Sprintf("127.0.0.1:%d", ports[0])}
	n.set(t, 0)
	t.Setenv("SKEW", n.clock)
	t.Cleanup(func() { l.Close(); os.RemoveAll(l.Dir) })
	if err := errors.Join(l.Write("token", token+"\n"), l.Write("agent.yaml", fmt.Sprintf("state_dir: ./state\njoin_token_file: ./token\nsocket: ./a.sock\nhttp: %s\n", n.http))); err != nil {
		t.Fatal(err)
	}
	return n
}

// set the node's clock, running or not.
func (n *node) set(t *testing.T, off time.Duration) {
	t.Helper()
	f, err := os.OpenFile(n.clock, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(binary.NativeEndian.AppendUint64(nil, uint64(off/time.Second)), 0); err != nil {
		t.Fatal(err)
	}
}

func (n *node) start(t *testing.T) {
	t.Helper()
	if _, err := n.Start("agent", "agent", "--config", "agent.yaml"); err != nil {
		t.Fatal(err)
	}
}

func (n *node) log() string {
	text, _ := os.ReadFile(filepath.Join(n.Dir, "agent.log"))
	return string(text)
}

var bothTimes = regexp.MustCompile(`is valid from (\S+Z) only, and now is (\S+Z)`)

// saysBothTimes waits for a sentence with two times that are about an hour apart, counting the backdating.
func saysBothTimes(t *testing.T, who string, text func() string) {
	t.Helper()
	err := lab.Until(t.Context(), who+" says it", time.Minute, func() error {
		m := bothTimes.FindStringSubmatch(text())
		if m == nil {
			return errors.New("no sentence with both times")
		}
		from, err := time.Parse(time.RFC3339, m[1])
		if err != nil {
			return err
		}
		now, err := time.Parse(time.RFC3339, m[2])
		if err != nil {
			return err
		}
		if apart := from.Sub(now); apart < 45*time.Minute || apart > time.Hour {
			return fmt.Errorf("the times are %v apart: %s", apart, m[0])
		}
		t.Logf("%s says: %s", who, m[0])
		return nil
	})
	if err != nil {
		t.Errorf("%v\n%s", err, text())
	}
}

func (n *node) fetches(t *testing.T) {
	t.Helper()
	if err := lab.Until(t.Context(), "the agent serves", time.Minute, func() error {
		_, err := n.Run(t.Context(), "svid", "fetch", "--socket", n.socket, "--timeout", "10s")
		return err
	}); err != nil {
		t.Errorf("%v\n%s", err, n.log())
	}
}

func TestAnHourBetweenAgentAndServerIsSaidWithBothTimes(t *testing.T) {
	binary := skewable(t)
	s := newSite(t)
	s.serve(t)

	t.Run("an agent that is behind", func(t *testing.T) {
		n := newNode(t, s, binary, s.token(t, "node-1"))
		n.set(t, -time.Hour)
		n.start(t)
		saysBothTimes(t, "the agent", n.log)
		// Set right, it gets in: nothing was spent on a clock.
		n.set(t, 0)
		if !strings.Contains(n.log(), `"msg":"enrolled"`) {
			n.start(t)
		}
		if err := lab.Ready(t.Context(), "the agent with its clock set right", n.http); err != nil {
			t.Fatal(err)
		}
		n.fetches(t)
	})
	t.Run("an agent that is ahead", func(t *testing.T) {
		n := newNode(t, s, binary, s.token(t, "node-1"))
		n.set(t, time.Hour)
		n.start(t)
		if err := lab.Ready(t.Context(), "an agent an hour ahead, within all lives,", n.http); err != nil {
			t.Fatal(err)
		}
		n.fetches(t)
	})
	t.Run("a clock that jumps back and forth", func(t *testing.T) {
		n := newNode(t, s, binary, s.token(t, "node-1"))
		n.start(t)
		if err := lab.Ready(t.Context(), "the agent", n.http); err != nil {
			t.Fatal(err)
		}
		n.fetches(t)
		for _, off := range []time.Duration{time.Hour, -time.Hour} {
			n.set(t, off)
			s.server.Stop() // so that it has to connect again
			s.serve(t)
			if off < 0 {
				saysBothTimes(t, "the agent", n.log)
			}
			n.set(t, 0)
			if err := lab.Until(t.Context(), "the agent is connected again", 90*time.Second, func() error {
				if _, text := get(n.http, "/readyz?verbose"); !strings.Contains(text, "[+]server ok") {
					return errors.New(text)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
			n.fetches(t)
		}
	})
}

func TestASuspendedProcessRecovers(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	if err := s.east.Apply(t.Context(), fmt.Sprintf("registrations:\n  - { name: brief, spiffe_id: spiffe://example.org/brief, ttl: 10s, agents: [node-1], selectors: ['unix:uid:%d'] }\n", os.Getuid())); err != nil {
		t.Fatal(err)
	}
	a, err := s.east.StartAgent(t.Context(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	held := func() error {
		dir := s.path(fmt.Sprintf("held%d", time.Now().UnixNano()))
		if _, err := s.Run(t.Context(), "svid", "fetch", "--socket", a.Socket, "--write", dir, "--timeout", "5s"); err != nil {
			return err
		}
		text, err := os.ReadFile(filepath.Join(dir, "svid.pem"))
		if err != nil {
			return err
		}
		block, _ := pem.Decode(text)
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return err
		}
		if left := time.Until(cert.NotAfter); left <= 0 {
			return fmt.Errorf("the certificate served has expired %v ago", -left)
		}
		return nil
	}
	if err := held(); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]*lab.Process{"agent": a.Process, "server": s.server} {
		if err := p.Halt(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second)
		if err := p.Resume(); err != nil {
			t.Fatal(err)
		}
		woke := time.Now()
		// Nothing expired is ever served, and soon there is something good.
		if err := lab.Until(t.Context(), "a good certificate after the "+name+" was suspended", 15*time.Second, held); err != nil {
			t.Error(err)
		}
		t.Logf("%s: recovered %v after it went on", name, time.Since(woke).Round(time.Millisecond))
	}
}
