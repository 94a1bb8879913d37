//go:build real || soak

package faults

import (
	"os"
	"strings"
	"testing"

	"github.com/signet-ca/signet/test/lab"
)

// newNode1 makes an agent that has nothing but a fresh token.
func (s *site) newNode1(t *testing.T) (*lab.Agent, program) {
	t.Helper()
	if err := os.RemoveAll(s.east.Path("node-1")); err != nil {
		t.Fatal(err)
	}
	a, err := s.east.NewAgent(t.Context(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	return a, program{"east-node-1", a.HTTP, []string{"agent", "--config", a.Config()}}
}

// enrolmentCalls are all calls of an agent that enrols and serves its first workload, as often as its busiest thread makes
// them, and some more.
func (s *site) enrolmentCalls(t *testing.T) []point {
	t.Helper()
	a, p := s.newNode1(t)
	_, tr := s.startUnder(t, p, strings.Join(calls, ","), "", func() { s.fetch(t, a) })
	var all []point
	made := tr.most()
	for _, call := range calls {
		if made[call] == 0 {
			continue
		}
		for n := 1; n <= min(most, made[call]+2); n++ {
			all = append(all, point{call, n})
		}
	}
	if len(all) < 20 {
		t.Fatalf("an enrolment makes only the calls %v", made)
	}
	return all
}

// killedEnrolment kills an agent at a call of its enrolment. Started again, with what is there and nothing repaired, it has
// an identity; the token was good for one key only.
func (s *site) killedEnrolment(t *testing.T, at point) bool {
	t.Helper()
	a, p := s.newNode1(t)
	inject := kill(at.call, at.n)
	how, _ := s.startUnder(t, p, at.call, inject, func() { _, _ = s.Run(t.Context(), "svid", "fetch", "--socket", a.Socket, "--timeout", "5s") })
	if how == ended {
		t.Errorf("%s: the agent was not killed, and ended", inject)
	}
	if err := a.Start(t.Context()); err != nil {
		text, _ := os.ReadFile(s.path("east-node-1.log"))
		t.Errorf("%s: the agent does not start again: %v: %s", inject, err, text[max(0, len(text)-1500):])
	} else {
		s.fetch(t, a)
	}
	a.Stop()
	if _, err := s.enrol(t.Context(), a.Token); err == nil {
		t.Errorf("%s: the token admitted another key", inject)
	}
	return how == killed
}
