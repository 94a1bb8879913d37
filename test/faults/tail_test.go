//go:build real || soak

package faults

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// tail is how many bytes of the log's newest files are cut off, one more each time.
const tail = 4096

// newestLogFiles are what the last append wrote, by their paths: the entries first, which are the longest.
func (s *site) newestLogFiles(t *testing.T) []string {
	t.Helper()
	log := s.east.Path("state/log")
	files := []string{
		newest(t, filepath.Join(log, "tile/entries/000.p/*")), newest(t, filepath.Join(log, "tile/0/000.p/*")),
		filepath.Join(log, "checkpoint"), filepath.Join(log, ".state/treeState"),
	}
	info, err := os.Stat(files[0])
	if err != nil || info.Size() <= tail {
		t.Fatalf("the newest entries are too few: %v", err)
	}
	return files
}

// cutTails starts a server over a log whose newest files end too early, for each of the last bytes that wanted says. It must
// refuse in one sentence, or serve and agree with what clients hold.
func cutTails(t *testing.T, shard, shards int, limit time.Duration, wanted func(file string, cut, size int64) bool) {
	s := newSite(t)
	s.serve(t)
	for range 5 {
		if err := s.issue(t.Context(), s.member); err != nil {
			t.Fatal(err)
		}
	}
	s.judge(t)
	s.server.Stop()
	end := time.Now().Add(limit)
	tried, refused, untried := 0, map[string]int{}, 0
	for _, path := range s.newestLogFiles(t) {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(path, s.east.Path()+"/")
		for cut := int64(1); cut <= min(tail, info.Size()); cut++ {
			switch {
			case int(cut)%shards != shard || !wanted(name, cut, info.Size()):
				continue
			case time.Now().After(end):
				untried++
				continue
			}
			tried++
			what := fmt.Sprintf("%s without its last %d bytes", name, cut)
			damaged(t, s.east.Path("state"), path, func(data []byte) []byte { return data[:int64(len(data))-cut] }, func() {
				refusal := s.outcome(t, "east-server", s.east.HTTP, "serve", "--config", s.east.Config())
				if refusal == "" {
					s.served(t, what)
					return
				}
				oneSentence(t, what, refusal)
				refused[name]++
			})
		}
	}
	t.Logf("%d cuts; refused: %v", tried, refused)
	if untried > 0 || tried == 0 {
		t.Errorf("no time for %d cuts", untried)
	}
	s.serve(t)
	s.verify(t)
}

// TestASecondServerIsRefusedAtOnce starts a second server on the state folder of a first 100 times, and kills the first
// at last: what a dead process has locked is free.
func TestASecondServerIsRefusedAtOnce(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	// At other doors, so that it is the folder and not an address that is taken.
	other, err := s.Cluster("east", serverExtra)
	if err != nil {
		t.Fatal(err)
	}
	state := s.east.Path("state")
	var took, idle []time.Duration
	for range 100 {
		began := time.Now()
		if _, err := s.Run(t.Context(), "version"); err != nil {
			t.Fatal(err)
		}
		idle = append(idle, time.Since(began))
		began = time.Now()
		refusal, err := s.Fails(t.Context(), 2, "serve", "--config", other.Config())
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(began))
		oneSentence(t, "a second server", refusal)
		if !strings.Contains(refusal, state) || !strings.Contains(refusal, fmt.Sprint(s.server.PID())) {
			t.Fatalf("the refusal does not name the folder and the process that has it: %s", refusal)
		}
	}
	// On a busy machine the machine has its part, in a command that does nothing as well.
	slices.Sort(took)
	slices.Sort(idle)
	t.Logf("refused within %v, the slowest within %v; a command that does nothing takes %v", took[50].Round(time.Millisecond), took[99].Round(time.Millisecond), idle[50].Round(time.Millisecond))
	if took[50] > idle[50]+time.Second {
		t.Errorf("half of the refusals took %v and more, a command that does nothing %v", took[50], idle[50])
	}
	if err := s.issue(t.Context(), s.member); err != nil {
		t.Errorf("the first server, after all that: %v", err)
	}
	s.east = other
	for range 5 {
		s.server.Kill()
		if _, err := os.Stat(filepath.Join(state, "LOCK")); errors.Is(err, fs.ErrNotExist) {
			t.Error("no lock file to be stale")
		}
		s.serve(t)
	}
	if err := s.issue(t.Context(), s.member); err != nil {
		t.Error(err)
	}
	s.verify(t)
}
