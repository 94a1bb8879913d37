package sds

import "time"

// LeavesChanged returns a channel that is closed when a certificate is next sent, answered or given up by a stream.
// Take it before asking, or a change between is missed.
func (s *Server) LeavesChanged() <-chan struct{} { return s.leaves.Next() }

// Leaves returns, for each issuer by its key identifier, when the last certificate of it ends that a live stream uses or may
// use: what it has acknowledged last, until it has acknowledged another, and what it has not answered yet. What was
// withdrawn counts too, because Envoy goes on using it; and what streams used that have ended, until their peers are back.
func (s *Server) Leaves() map[string]time.Time {
	s.live.mu.Lock()
	streams := make([]*stream, 0, len(s.live.streams))
	for st := range s.live.streams {
		streams = append(streams, st)
	}
	s.live.mu.Unlock()
	all := map[string]time.Time{}
	add := func(issuer string, end time.Time) {
		if end.After(all[issuer]) {
			all[issuer] = end
		}
	}
	for _, st := range streams {
		st.mu.Lock()
		st.sub.leaves(add)
		st.mu.Unlock()
	}
	s.endedLeaves.each(add)
	return all
}

// leaves names the certificates that are or may be in use, by issuer, with their ends.
func (s *subscription) leaves(add func(issuer string, notAfter time.Time)) {
	is := func(c *content) {
		if c != nil && c.issuer != "" {
			add(c.issuer, c.notAfter)
		}
	}
	for _, w := range s.wanted {
		is(w.acked)
	}
	for _, d := range s.inFlight {
		is(d.content)
	}
}
