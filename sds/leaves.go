package sds

import "time"

// LeavesChanged returns a channel that is closed when a certificate is next sent, answered or given up by a stream.
// Take it before asking, or a change between is missed.
func (s *Server) LeavesChanged() <-chan struct{} { return s.leaves.Next() }

// Leaves returns, for each issuer by its key identifier, when the last certificate of it ends that a live stream uses or may
// use: what it has acknowledged last, until it has acknowledged another, and what it has not answered yet. What was
// withdrawn counts too, because Envoy goes on using it.
func (s *Server) Leaves() map[string]time.Time {
	s.live.mu.Lock()
	streams := make([]*stream, 0, len(s.live.streams))
	for st := range s.live.streams {
		streams = append(streams, st)
	}
	s.live.mu.Unlock()
	all := map[string]time.Time{}
	add := func(c *content) {
		if c != nil && c.issuer != "" && c.notAfter.After(all[c.issuer]) {
			all[c.issuer] = c.notAfter
		}
	}
	for _, st := range streams {
		st.mu.Lock()
		for _, w := range st.sub.wanted {
			add(w.acked)
		}
		for _, d := range st.sub.inFlight {
			add(d.content)
		}
		st.mu.Unlock()
	}
	return all
}
