package sds

import (
	"bytes"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/internal/bell"
	"github.com/signet-ca/signet/trust"
)

// stated is a belief about one trust domain.
type stated struct {
	td spiffeid.TrustDomain
	belief
	// first, of a validator that came with nothing and has acknowledged nothing, is what it was offered first: what it may
	// have by now is no older.
	first belief
}

// kept is what a validator goes on with whose stream ends; false = nothing. One that came with a bundle from an earlier stream
// and has acknowledged none since goes on with one that is not known: the zero belief.
func (s stated) kept(came bool) (stated, bool) {
	b := s.belief
	if b == (belief{}) && !came {
		if b = s.first; b == (belief{}) {
			return stated{}, false
		}
	}
	return stated{td: s.td, belief: b}, true
}

// belief is the bundle a validator has acknowledged last; the zero value is none.
type belief struct {
	sequence uint64
	digest   trust.Digest
}

func (b belief) olderThan(c belief) bool {
	if b.sequence != c.sequence {
		return b.sequence < c.sequence
	}
	return bytes.Compare(b.digest[:], c.digest[:]) < 0
}

// beliefs counts, for each trust domain, what the live streams that subscribe to its bundle have acknowledged. What those
// believe that have ended counts too, for a while.
type beliefs struct {
	ended ended[stated]
	// changed rings when the oldest belief about a trust domain is another.
	changed bell.Bell

	mu    sync.Mutex
	count map[spiffeid.TrustDomain]map[belief]int
}

// join counts a stream that has acknowledged nothing.
func (a *beliefs) join(td spiffeid.TrustDomain) { a.move(td, nil, &belief{}) }

// leave takes a stream out of the count.
func (a *beliefs) leave(td spiffeid.TrustDomain, last belief) { a.move(td, &last, nil) }

func (a *beliefs) move(td spiffeid.TrustDomain, from, to *belief) {
	a.mu.Lock()
	defer a.mu.Unlock()
	before, had := a.oldest(td)
	m := a.count[td]
	if from != nil {
		if m[*from]--; m[*from] == 0 {
			delete(m, *from)
		}
	}
	if to != nil {
		if m == nil {
			m = map[belief]int{}
			if a.count == nil {
				a.count = map[spiffeid.TrustDomain]map[belief]int{}
			}
			a.count[td] = m
		}
		m[*to]++
	}
	if len(m) == 0 {
		delete(a.count, td)
	}
	if after, has := a.oldest(td); after != before || has != had {
		a.changed.Ring()
	}
}

// oldest needs mu. There are as many kinds of belief as bundles in flight: one or two.
func (a *beliefs) oldest(td spiffeid.TrustDomain) (belief, bool) {
	var old belief
	found := false
	count := func(b belief) {
		if !found || b.olderThan(old) {
			old, found = b, true
		}
	}
	for b := range a.count[td] {
		count(b)
	}
	a.ended.each(func(s stated, _ time.Time) {
		if s.td == td {
			count(s.belief)
		}
	})
	return old, found
}

// OldestBundle returns the oldest bundle of the trust domain that a stream which subscribes to it has acknowledged last: one
// that lives, or has ended so recently that its validator may not be back. It is the zero version while one of them has
// acknowledged none, and false if there is no such stream.
func (s *Server) OldestBundle(td spiffeid.TrustDomain) (trust.Version, bool) {
	s.beliefs.mu.Lock()
	defer s.beliefs.mu.Unlock()
	b, ok := s.beliefs.oldest(td)
	return trust.Version{Sequence: b.sequence, Digest: b.digest}, ok
}

// ReturnsBy is until when validators may come back whose streams have ended with another bundle of the trust domain than this
// one; zero = there are none.
func (s *Server) ReturnsBy(td spiffeid.TrustDomain, newest trust.Digest) (by time.Time) {
	s.beliefs.ended.each(func(e stated, until time.Time) {
		if e.td == td && e.digest != newest && until.After(by) {
			by = until
		}
	})
	return by
}

// AcksChanged returns a channel that is closed when OldestBundle next has another answer for any trust domain.
// Take it before asking, or a change between is missed.
func (s *Server) AcksChanged() <-chan struct{} { return s.beliefs.changed.Next() }
