package sds

import (
	"slices"
	"time"
)

// subscription is what one stream wants and what it has been told. It knows no protocol.
type subscription struct {
	wanted []*want // in the order asked for
	// inFlight is what was sent and not answered, oldest first; nonces are unique in a stream.
	inFlight []delivery
	rejected []digest
}

// want is a name subscribed to.
type want struct {
	target
	// sent is the content sent last, answered or not; nil = nothing yet.
	sent *content
	// claimed is the version that a peer said to have of it from an earlier stream; "" = none, or compared already.
	claimed string
	// came is set where the peer has some version of it from an earlier stream, or may have.
	came bool
	// again asks for the content even if it is what was sent last.
	again bool
	// acked is what was acknowledged last; refused and why is what was rejected since.
	acked, refused *content
	reason         string
	// believed stands among the beliefs: for each trust domain whose bundle this is, what was acknowledged last.
	believed []stated
	// waiting is since when an answer is awaited to a bundle; zero = none is. What is sent meanwhile does not renew it.
	waiting time.Time
	absent  absence // why there was nothing to send, as reported
}

// delivery is one push on its way: a content without its secret, or nil for the withdrawal of the name.
type delivery struct {
	nonce   string
	name    string
	content *content
	at      time.Time
}

// set makes names the subscription. What stays keeps its state; what is new is owed even if the stream had it before.
// It returns what was dropped and whether anything changed.
func (s *subscription) set(names []string) (dropped []*want, changed bool) {
	old := s.wanted
	next := make([]*want, 0, len(names))
	for _, n := range names {
		named := func(w *want) bool { return w.name == n }
		if slices.ContainsFunc(next, named) {
			continue
		}
		if i := slices.IndexFunc(old, named); i >= 0 {
			next = append(next, old[i])
			continue
		}
		changed = true
		next = append(next, &want{target: parseTarget(n)})
	}
	for _, w := range old {
		if !slices.Contains(next, w) {
			dropped, changed = append(dropped, w), true
		}
	}
	s.wanted = next
	return dropped, changed
}

// add subscribes to a name, of which the peer says to have a version, or "". What is subscribed already is owed again.
func (s *subscription) add(name, claimed string) {
	w := s.find(name)
	if w == nil {
		w = &want{target: parseTarget(name), claimed: claimed, came: claimed != ""}
		s.wanted = append(s.wanted, w)
	}
	w.again = claimed == ""
}

// remove unsubscribes from names and returns what was dropped. Names that aren't subscribed are ignored.
func (s *subscription) remove(names []string) (dropped []*want) {
	s.wanted = slices.DeleteFunc(s.wanted, func(w *want) bool {
		if !slices.Contains(names, w.name) {
			return false
		}
		dropped = append(dropped, w)
		return true
	})
	return dropped
}

// resend makes everything owed once more.
func (s *subscription) resend() {
	for _, w := range s.wanted {
		w.again = true
	}
}

// current reports whether the version is that of something sent last.
func (s *subscription) current(version string) bool {
	return slices.ContainsFunc(s.wanted, func(w *want) bool { return w.sent != nil && w.sent.version() == version })
}

// owed reports whether the content is to be sent for the name: it is new or asked for again, and was not rejected here.
func (s *subscription) owed(w *want, c *content) bool {
	return (w.again || w.sent == nil || w.sent.digest != c.digest) && !slices.Contains(s.rejected, c.digest)
}

// pushed notes what was put on the wire: a content, or nil for a withdrawal.
func (s *subscription) pushed(w *want, c *content, nonce string, now time.Time) {
	w.sent, w.claimed, w.again = c, "", false
	if c.bundle() && w.waiting.IsZero() {
		w.waiting = now
	}
	if len(s.inFlight) >= 2*len(s.wanted)+maxRejections { // somebody who never answers
		s.inFlight = slices.Delete(s.inFlight, 0, 1)
	}
	s.inFlight = append(s.inFlight, delivery{nonce: nonce, name: w.name, content: c, at: now})
}

// answered takes the delivery that a nonce belongs to out of what is on its way. An answer stands for what was sent before it
// under that name, too: a peer may answer the newest only.
func (s *subscription) answered(nonce string) (delivery, bool) {
	i := slices.IndexFunc(s.inFlight, func(d delivery) bool { return d.nonce == nonce })
	if nonce == "" || i < 0 {
		return delivery{}, false
	}
	d := s.inFlight[i]
	s.inFlight = slices.Delete(s.inFlight, i, i+1)
	if w := s.find(d.name); w != nil && !w.waiting.IsZero() && !d.at.Before(w.waiting) {
		w.waiting = time.Time{}
		if j := slices.IndexFunc(s.inFlight[i:], func(l delivery) bool { return l.name == d.name && l.content.bundle() }); j >= 0 {
			w.waiting = s.inFlight[i+j].at
		}
	}
	return d, true
}

// waiting is since when an answer to a bundle is awaited, and to which name; nil = none is.
func (s *subscription) waiting() (oldest *want) {
	for _, w := range s.wanted {
		if !w.waiting.IsZero() && (oldest == nil || w.waiting.Before(oldest.waiting)) {
			oldest = w
		}
	}
	return oldest
}

// hasNot notes that the peer has rejected what it may have been taken to have.
func (w *want) hasNot(c *content) {
	for i := range w.believed {
		if b := &w.believed[i]; slices.ContainsFunc(c.says, func(s stated) bool { return s.td == b.td && s.belief == b.first }) {
			b.first = belief{}
		}
	}
}

// find returns the want of that name, or nil.
func (s *subscription) find(name string) *want {
	i := slices.IndexFunc(s.wanted, func(w *want) bool { return w.name == name })
	if i < 0 {
		return nil
	}
	return s.wanted[i]
}
