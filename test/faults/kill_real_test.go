//go:build real

package faults

import (
	"math/rand/v2"
	"testing"
	"time"
)

// A sample of TestNothingIsLostByAKillAtAnyCall, as large as fits in half a minute.
func TestNothingIsLostByAKillAtSomeCalls(t *testing.T) {
	t.Parallel()
	needsStrace(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	chance := rand.New(rand.NewPCG(seed, 0))
	s := newSite(t)
	kills := map[string]int{}
	try := func(p phase, call string, n int) {
		if p.try(t, s, call, n) {
			kills[p.name]++
		}
		s.judge(t)
	}
	for _, p := range phases {
		try(p, "fsync", 1) // all of them reach it
	}
	likely := []string{"openat", "write", "pwrite64", "fsync", "renameat", "linkat", "unlinkat", "fcntl"}
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end) && !t.Failed(); {
		p, most := phases[chance.IntN(len(phases))], 6
		if p.name == "start" {
			most = 40
		}
		try(p, likely[chance.IntN(len(likely))], 1+chance.IntN(most))
	}
	for _, p := range phases {
		if kills[p.name] == 0 {
			t.Errorf("no kill came during %s", p.name)
		}
	}
	t.Logf("kills: %v", kills)
	s.verify(t)
}

// leastTries bound what goes on beyond its time because chance has hit nothing yet.
const leastTries = 30

// A sample of TestAnAgentKilledAtAnyCallOfItsEnrolmentComesBack.
func TestAnAgentKilledDuringItsEnrolmentComesBack(t *testing.T) {
	t.Parallel()
	needsStrace(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	chance := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // a test's choices
	s := newSite(t)
	s.serve(t)
	all, kills, tried := s.enrolmentCalls(t), 0, 0
	for end := time.Now().Add(20 * time.Second); (time.Now().Before(end) || kills == 0 && tried < leastTries) && !t.Failed(); tried++ {
		if s.killedEnrolment(t, all[chance.IntN(len(all))]) {
			kills++
		}
	}
	if kills == 0 {
		t.Error("no kill came during the enrolment")
	}
	t.Logf("%d kills", kills)
}
