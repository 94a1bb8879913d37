//go:build real || soak

package faults

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

// outcome starts a process over a damaged folder: what it says when it refuses, "" when it serves.
func (s *site) outcome(t *testing.T, name, addr string, args ...string) (refusal string) {
	t.Helper()
	log := s.path(name + ".log")
	if err := os.Truncate(log, 0); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	p, err := s.Start(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	if s.last = p; name == "east-server" {
		s.server = p
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if code, _ := get(addr, "/readyz"); code == 200 {
			return ""
		}
		if !alive(p) {
			break
		}
		if time.Now().After(end) {
			p.Kill()
			text, _ := os.ReadFile(log)
			return "neither ready nor ended: " + string(text)
		}
	}
	text, _ := os.ReadFile(log)
	var said []string
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "{") {
			said = append(said, strings.TrimSpace(line))
		}
	}
	return strings.Join(said, "\n")
}

// oneSentence checks a refusal.
func oneSentence(t *testing.T, what, refusal string) {
	t.Helper()
	if !strings.HasPrefix(refusal, "signet: ") || strings.Count(refusal, "\n") > 0 || len(refusal) > 700 || strings.Contains(refusal, "panic") {
		t.Errorf("%s: the refusal is not one sentence: %s", what, refusal)
	}
}

// damage changes a file. Each of its kinds is tried on every kind of file.
type damage struct {
	name string
	do   func(chance *rand.Rand, data []byte) []byte
}

var damages = []damage{
	{"a flipped bit", func(chance *rand.Rand, data []byte) []byte {
		data[chance.IntN(len(data))] ^= 1 << chance.IntN(8)
		return data
	}},
	{"a torn tail", func(chance *rand.Rand, data []byte) []byte {
		return data[:len(data)-1-chance.IntN(len(data)-1)]
	}},
	{"nothing in it", func(_ *rand.Rand, data []byte) []byte { return nil }},
}

// serverFiles are those that a start relies on; of several, the newest.
var serverFiles = []string{
	"state/log/checkpoint", "state/log/verifier.key", "state/log/.state/treeState", "state/log/tile/0/000.p/*", "state/log/tile/entries/000.p/*",
	"state/keys/*.pem",
}

func newest(t *testing.T, pattern string) string {
	t.Helper()
	all, err := filepath.Glob(pattern)
	if err != nil || len(all) == 0 {
		t.Fatalf("no %s: %v", pattern, err)
	}
	best := all[0]
	when := func(path string) time.Time {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.ModTime()
	}
	for _, path := range all[1:] {
		if when(path).After(when(best)) {
			best = path
		}
	}
	return best
}

// damaged changes a file in a folder for as long as f runs; then the whole folder is what it was.
func damaged(t *testing.T, folder, path string, change func([]byte) []byte, f func()) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	good := folder + ".good"
	if out, err := exec.Command("cp", "-a", folder, good).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if err := os.WriteFile(path, change(data), info.Mode()); err != nil {
		t.Fatal(err)
	}
	f()
	if err := errors.Join(os.RemoveAll(folder), os.Rename(good, folder)); err != nil {
		t.Fatal(err)
	}
}

// served: a server did not mind the damage, so it must not have mattered. What was given can be proven, and what comes next.
func (s *site) served(t *testing.T, what string) {
	t.Helper()
	given, _ := filepath.Glob(s.path("given", "*"))
	if err := s.issue(t.Context(), s.member); err != nil {
		t.Errorf("%s: not noticed at the start, and then: %v", what, err)
	}
	s.verify(t)
	s.server.Stop()
	// What was given here is not in the folder that comes back.
	all, _ := filepath.Glob(s.path("given", "*"))
	for _, path := range all {
		if !slices.Contains(given, path) {
			os.Remove(path)
		}
	}
	t.Logf("%s: harmless", what)
}

func TestDamageIsFoundAtTheStartAndNeverSignedOver(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	chance := rand.New(rand.NewPCG(seed, 0))
	s := newSite(t)
	s.serve(t)
	for range 20 {
		if err := s.issue(t.Context(), s.member); err != nil {
			t.Fatal(err)
		}
	}
	s.judge(t)
	s.server.Stop()
	for _, file := range serverFiles {
		for _, d := range damages {
			path := newest(t, s.east.Path(file))
			what := fmt.Sprintf("%s in %s", d.name, strings.TrimPrefix(path, s.east.Path()+"/"))
			damaged(t, s.east.Path("state"), path, func(data []byte) []byte { return d.do(chance, data) }, func() {
				refusal := s.outcome(t, "east-server", s.east.HTTP, "serve", "--config", s.east.Config())
				if refusal == "" {
					s.served(t, what)
					return
				}
				oneSentence(t, what, refusal)
				t.Logf("%s: %s", what, refusal)
			})
		}
	}
	s.serve(t)
	s.verify(t)
}

func TestADamagedDatabaseIsRefused(t *testing.T) {
	s := newSite(t)
	db := s.east.Path("state/signet.db")
	data, err := os.ReadFile(db)
	if err != nil {
		t.Fatal(err)
	}
	page := int(data[16])<<8 | int(data[17]) // https://sqlite.org/fileformat2.html §1.3
	kinds := map[string]func([]byte) []byte{
		"a flipped bit in the header":         func(b []byte) []byte { b[3] ^= 4; return b },
		"a flipped bit in a page":             func(b []byte) []byte { b[page*2] ^= 0x80; return b },
		"a page of zeros":                     func(b []byte) []byte { clear(b[page : 2*page]); return b },
		"a torn tail":                         func(b []byte) []byte { return b[:len(b)-page/2] },
		"half of it":                          func(b []byte) []byte { return b[:len(b)/2/page*page] },
		"nothing in it":                       func([]byte) []byte { return nil },
		"the pages of another file (garbage)": func(b []byte) []byte { copy(b[page:], bytes.Repeat([]byte("signet"), page)); return b },
	}
	for name, change := range kinds {
		what := name + " in signet.db"
		damaged(t, s.east.Path("state"), db, change, func() {
			refusal := s.outcome(t, "east-server", s.east.HTTP, "serve", "--config", s.east.Config())
			if refusal == "" {
				t.Errorf("%s: not noticed at the start", what)
				s.server.Kill()
				return
			}
			oneSentence(t, what, refusal)
			t.Logf("%s: %s", what, refusal)
		})
	}
	s.serve(t)
	if err := s.issue(t.Context(), s.member); err != nil {
		t.Error(err)
	}
	s.verify(t)
}

// Bits that rot inside values, where the database itself has no checksum: whose name, which key, which time, would be changed.
func TestAValueThatRotsInTheDatabaseIsRefusedAndNamed(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	if err := s.issue(t.Context(), s.member); err != nil {
		t.Fatal(err)
	}
	s.server.Stop()
	db := s.east.Path("state/signet.db")
	id := "spiffe://example.org/"
	for what, c := range map[string]struct {
		find string
		at   int // of the byte that changes, from where it is found
		bit  byte
		says string
	}{
		"an identity":        {id, len(id), 1, "registration"},
		"a selector":         {"unix:uid:", len("unix:uid:"), 1, "a selector of registration"},
		"the cluster's name": {"clustereast", len("cluster"), 1, `the fact "cluster"`},
		"the state of a CA":  {"active", 1, 1, "authority"},
	} {
		t.Run(what, func(t *testing.T) {
			damaged(t, s.east.Path("state"), db, func(data []byte) []byte {
				// Wherever it stands, so that a copy in a free page, which says nothing, is not all that is hit.
				hits := 0
				for i := 0; ; hits++ {
					next := bytes.Index(data[i:], []byte(c.find))
					if next < 0 {
						break
					}
					i += next + c.at
					data[i] ^= c.bit
				}
				if hits == 0 {
					t.Fatalf("no %q in the database", c.find)
				}
				return data
			}, func() {
				refusal := s.outcome(t, "east-server", s.east.HTTP, "serve", "--config", s.east.Config())
				if refusal == "" {
					t.Error("not noticed at the start")
					s.server.Kill()
					return
				}
				oneSentence(t, what, refusal)
				if !strings.Contains(refusal, "signet.db") || !strings.Contains(refusal, c.says) {
					t.Errorf("the refusal names neither file nor %q", c.says)
				}
				t.Log(refusal)
			})
		})
	}
	s.serve(t)
	s.verify(t)
}

func TestAnAgentsDamagedFilesAreNamedOrMadeAnew(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	chance := rand.New(rand.NewPCG(seed, 0))
	s := newSite(t)
	s.serve(t)
	a, err := s.east.StartAgent(t.Context(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	s.fetch(t, a)
	a.Stop()
	files, err := filepath.Glob(s.east.Path("node-1/*"))
	if err != nil {
		t.Fatal(err)
	}
	keys, _ := filepath.Glob(s.east.Path("node-1/keys/*"))
	for _, path := range append(files, keys...) {
		if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() || info.Size() < 2 || filepath.Base(path) == "LOCK" {
			continue
		}
		for _, d := range damages {
			what := fmt.Sprintf("%s in %s", d.name, strings.TrimPrefix(path, s.east.Path()+"/"))
			damaged(t, s.east.Path("node-1"), path, func(data []byte) []byte { return d.do(chance, data) }, func() {
				refusal := s.outcome(t, "east-node-1", a.HTTP, "agent", "--config", s.east.Path("node-1.yaml"))
				if refusal == "" {
					s.fetch(t, a)
					t.Logf("%s: serves", what)
				} else {
					oneSentence(t, what, refusal)
					t.Logf("%s: %s", what, refusal)
				}
				s.last.Stop()
			})
		}
	}
	if a.Process, err = s.Start("east-node-1", "agent", "--config", s.east.Path("node-1.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := lab.Ready(t.Context(), "the agent", a.HTTP); err != nil {
		t.Fatal(err)
	}
	s.fetch(t, a)
}

var sizeLine = regexp.MustCompile(`^[^\n]+\n(\d+)\n`)

// seen is the size of the newest checkpoint that an agent has kept.
func (s *site) seen(agent string) int { return sizeIn(s.east.Path(agent, "checkpoint")) }

// sizeIn is the size of the log that a checkpoint in a file is of; 0 = there is none.
func sizeIn(file string) int {
	text, _ := os.ReadFile(file)
	if m := sizeLine.FindSubmatch(text); m != nil {
		n, _ := strconv.Atoi(string(m[1]))
		return n
	}
	return 0
}

// metric reads a counter without labels.
func metric(addr, name string) string {
	_, text := get(addr, "/metrics")
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return "absent"
}

func TestAFolderRestoredFromAnOlderCopyIsReported(t *testing.T) {
	t.Parallel()
	for _, grown := range []bool{false, true} {
		t.Run(map[bool]string{false: "shorter than what agents have seen", true: "grown past it with other entries"}[grown], func(t *testing.T) {
			s := newSite(t)
			s.serve(t)
			a, err := s.east.StartAgent(t.Context(), "node-1")
			if err != nil {
				t.Fatal(err)
			}
			s.server.Stop()
			state := s.east.Path("state")
			if out, err := exec.Command("cp", "-a", state, state+".older").CombinedOutput(); err != nil {
				t.Fatalf("%v %s", err, out)
			}
			had := sizeIn(filepath.Join(state+".older", "log", "checkpoint"))
			s.serve(t)
			for range 5 {
				if err := s.issue(t.Context(), s.member); err != nil {
					t.Fatal(err)
				}
			}
			s.fetch(t, a)
			want := had + 6
			if err := lab.Until(t.Context(), "the agent has seen a checkpoint", 2*time.Minute, func() error {
				if n := s.seen("node-1"); n < want {
					return fmt.Errorf("it has seen %d entries, want %d", n, want)
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			s.server.Stop()
			if grown {
				a.Stop()
			}

			if err := errors.Join(os.Rename(state, state+".newer"), os.Rename(state+".older", state)); err != nil {
				t.Fatal(err)
			}
			s.serve(t)
			if grown {
				// Past what the agent has seen, before it comes back.
				past := 2 * s.seen("node-1")
				for range past {
					if err := s.issue(t.Context(), s.member); err != nil {
						t.Fatal(err)
					}
				}
				if err := lab.Until(t.Context(), "a checkpoint covers them", 30*time.Second, func() error {
					if n := sizeIn(s.east.Path("state", "log", "checkpoint")); n < had+past {
						return fmt.Errorf("it covers %d entries, want %d", n, had+past)
					}
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				if a.Process, err = s.Start("east-node-1", "agent", "--config", s.east.Path("node-1.yaml")); err != nil {
					t.Fatal(err)
				}
			}
			if err := lab.Until(t.Context(), "the agent reports it", 2*time.Minute, func() error {
				// Once for each checkpoint that comes; it is said after it is counted.
				if n := metric(a.HTTP, "signet_log_inconsistencies_total"); n == "0" || n == "absent" {
					return fmt.Errorf("signet_log_inconsistencies_total is %s", n)
				}
				if said, _ := os.ReadFile(s.path("east-node-1.log")); !bytes.Contains(said, []byte("THE AUDIT LOG CONTRADICTS WHAT THIS AGENT HAS SEEN")) {
					return errors.New("the agent's log does not say it")
				}
				if n := metric(s.east.HTTP, "signet_log_witness_ahead_total"); !grown && (n == "0" || n == "absent") {
					return fmt.Errorf("the server's signet_log_witness_ahead_total is %s", n)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
			if evidence, err := os.ReadFile(s.east.Path("node-1/checkpoint.evidence")); err != nil || bytes.Count(evidence, []byte("example.org/east/east-1\n")) < 2 {
				t.Errorf("the evidence has not both checkpoints: %v %s", err, evidence)
			}
			s.fetch(t, a) // which is no reason to leave workloads without
		})
	}
}
