package agent

import (
	"bytes"
	"testing"
	"time"

	"github.com/signet-ca/signet/identity"
)

// A trust change goes on when every agent has said that all its workloads have it: nothing is gathered before that word.
func TestTheServerHearsAtOnceThatAllBelieveTheNewestBundle(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t, func(c *Config) {
		c.Attestor = &fakeAttestor{selectors: []identity.Selector{uid}, alive: true}
	})
	s := subscribe(t, connect(t, n.config.Socket), "ROOTCA")
	if _, err := s.next(); err != nil {
		t.Fatal(err)
	}
	told := func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		d, a := w.bundle.Digest(), w.acks["node-1"]
		return len(a) == 1 && bytes.Equal(a[0].Digest, d[:])
	}
	other := newCA(t, "other", nil)
	best := time.Hour
	for sequence := uint64(2); best >= settle && sequence < 22; sequence++ { // a busy machine may be late, but not each time
		b := mustBundle(t, sequence, w.root, other)
		start := time.Now()
		w.change(func() { w.bundle = b })
		if _, err := s.next(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the server is told", told)
		best = min(best, time.Since(start))
		other = newCA(t, "another", nil)
	}
	if best >= settle {
		t.Fatalf("the server was told after %s at best, which is after waiting for more", best)
	}
}
