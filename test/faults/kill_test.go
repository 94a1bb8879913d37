//go:build real || soak

package faults

import (
	"context"
	"fmt"
	"testing"
	"time"
)

// phase is something that a server does while it is killed at one of its calls.
type phase struct {
	name string
	// try does it with a server that is killed at the n-th call in any thread, and reports whether that was reached. The
	// server is up and in order when it returns.
	try func(t *testing.T, s *site, call string, n int) (killed bool)
}

var phases = []phase{
	{"start", func(t *testing.T, s *site, call string, n int) bool {
		if s.server != nil {
			s.server.Kill()
		}
		how, _ := s.startUnder(t, s.program(), call, kill(call, n), nil)
		if how == ended {
			t.Errorf("not killed at %s %d of a start, and ended", call, n)
		}
		s.serve(t)
		if err := s.issue(t.Context(), s.member); err != nil {
			t.Errorf("killed at %s %d of a start, and then: %v", call, n, err)
		}
		return how == killed
	}},
	{"issuance", func(t *testing.T, s *site, call string, n int) bool {
		return s.killedDuring(t, call, n, func(ctx context.Context) {
			if err := s.issue(ctx, s.member); err != nil && !unavailable(err) {
				t.Errorf("killed at %s %d: the client hears: %v", call, n, err)
			}
		})
	}},
	{"enrolment", func(t *testing.T, s *site, call string, n int) bool {
		s.up(t)
		agent := fmt.Sprintf("n%d", time.Now().UnixNano())
		token := s.token(t, agent)
		admitted := 0
		killed := s.killedDuring(t, call, n, func(ctx context.Context) {
			if _, err := s.enrol(ctx, token); err == nil {
				admitted++
			}
		})
		for range 2 {
			if _, err := s.enrol(t.Context(), token); err == nil {
				admitted++
			}
		}
		if admitted > 1 {
			t.Errorf("killed at %s %d: one token admitted %d", call, n, admitted)
		}
		return killed
	}},
}

func kill(call string, n int) string { return fmt.Sprintf("%s:signal=KILL:when=%d", call, n) }

// killedDuring does something with a running server that is killed at the n-th call of one of its threads.
func (s *site) killedDuring(t *testing.T, call string, n int, do func(context.Context)) bool {
	t.Helper()
	s.up(t)
	tr := s.attach(t, call, kill(call, n))
	do(t.Context())
	died(s.server, 100*time.Millisecond) // calls of its own go on for a while
	tr.detach()
	// A kill may take its time to be seen; who answers was not killed.
	for end := time.Now().Add(20 * time.Second); !died(s.server, 50*time.Millisecond); {
		if code, text := get(s.east.HTTP, "/readyz"); code != 0 {
			return false
		} else if time.Now().After(end) {
			t.Fatalf("%s: the server is neither dead nor answers: %s", kill(call, n), text)
		}
	}
	s.serve(t)
	return true
}
