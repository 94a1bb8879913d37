//go:build real || soak

package faults

import (
	"testing"
	"time"
)

// failed lets a system call of a running server fail, each time or at the n-th of a thread, while a client asks.
func (s *site) failed(t *testing.T, call, errno, when string) {
	t.Helper()
	s.up(t)
	what := call + " gives " + errno + when
	token := s.token(t, "m2")
	tr := s.attach(t, call, call+":error="+errno+when)
	refused := false
	for end := time.Now().Add(500 * time.Millisecond); time.Now().Before(end) && !refused; {
		if err := s.issue(t.Context(), s.member); err != nil {
			refused = true
			if !unavailable(err) {
				t.Errorf("%s: the client hears: %v", what, err)
			}
		}
	}
	if refused && when == "" {
		red(t, s.east.HTTP)
	}
	if _, err := s.enrol(t.Context(), token); err != nil && !unavailable(err) {
		t.Errorf("%s: the node hears: %v", what, err)
	}
	n := tr.detach()
	ended := died(s.server, 100*time.Millisecond) || s.ends(t, what)
	t.Logf("%s: %d calls failed, refused: %v, ended by itself: %v", what, n, refused, ended)
	switch {
	case !ended:
	case errno == "ENOSPC":
		t.Errorf("%s: the server ended; room on a disk comes back", what)
		fallthrough
	default:
		s.server.Kill()
		s.serve(t)
	}
	s.judge(t)
}
