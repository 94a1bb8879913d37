package sds

import (
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
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
	// sent is the content sent last, answered or not; zero = nothing yet.
	sent digest
	// again asks for the content even if it is what was sent last.
	again bool
	// counted says that acknowledged stands among the beliefs of the trust domain whose bundle this is.
	counted      bool
	bundle       spiffeid.TrustDomain
	acknowledged belief
	waiting      bool // it was reported as having no content
}

// delivery is one resource on its way. It does not hold on to the secret itself.
type delivery struct {
	nonce   string
	name    string
	content content
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

// resend makes everything owed once more.
func (s *subscription) resend() {
	for _, w := range s.wanted {
		w.again = true
	}
}

// current reports whether the version is that of something sent last.
func (s *subscription) current(version string) bool {
	return slices.ContainsFunc(s.wanted, func(w *want) bool { return w.sent != digest{} && w.sent.version() == version })
}

// owed reports whether the content is to be sent for the name: it is new or asked for again, and was not rejected here.
func (s *subscription) owed(w *want, d digest) bool {
	return (w.sent != d || w.again) && !slices.Contains(s.rejected, d)
}

// delivered notes what was sent.
func (s *subscription) delivered(w *want, c content, nonce string) {
	w.sent, w.again = c.digest, false
	if len(s.inFlight) >= 2*len(s.wanted)+maxRejections { // somebody who never answers
		s.inFlight = slices.Delete(s.inFlight, 0, 1)
	}
	s.inFlight = append(s.inFlight, delivery{nonce: nonce, name: w.name, content: c})
}

// answered takes the delivery that a nonce belongs to out of what is on its way.
func (s *subscription) answered(nonce string) (delivery, bool) {
	i := slices.IndexFunc(s.inFlight, func(d delivery) bool { return d.nonce == nonce })
	if nonce == "" || i < 0 {
		return delivery{}, false
	}
	d := s.inFlight[i]
	s.inFlight = slices.Delete(s.inFlight, i, i+1)
	return d, true
}

// find returns the want of that name, or nil.
func (s *subscription) find(name string) *want {
	i := slices.IndexFunc(s.wanted, func(w *want) bool { return w.name == name })
	if i < 0 {
		return nil
	}
	return s.wanted[i]
}
