package sds

import (
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/signet-ca/signet/trust"
)

// believes waits until everything has happened, and looks at the oldest bundle; nil = nobody counts.
func (r *rig) believes(when string, want *trust.Version) {
	r.t.Helper()
	synctest.Wait()
	switch v, ok := r.sds.OldestBundle(exampleTD); {
	case ok != (want != nil):
		r.t.Fatalf("%s: oldest %v %v, want %v", when, v, ok, want)
	case ok && v != *want:
		r.t.Fatalf("%s: oldest %v, want %v", when, v, *want)
	}
}

// An Envoy that is cut off goes on with the bundle that it has until it is back: also with one that was the newest then.
func TestWhatAnEndedStreamBelievedCountsUntilItsValidatorMayBeBack(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, a *root) {
		old := w.bundles[exampleTD].Version()
		cut := r.open()
		cut.subscribe("ROOTCA")
		cut.ack(cut.one(), "ROOTCA")
		r.believes("acknowledged", &old)
		cut.cancel()
		r.believes("cut off with the newest", &old)
		next := bundleOf(exampleTD, 2, a, newRoot(t, "root B"))
		newest := next.Version()
		w.setBundle(next)
		other := r.open()
		other.subscribe("ROOTCA")
		other.ack(other.one(), "ROOTCA")
		r.believes("another one has the next", &old)
		if by := r.sds.ReturnsBy(exampleTD, next.Digest()); !by.Equal(time.Now().Add(ReturnTime)) {
			t.Fatalf("back by %s, want %s from now", by, ReturnTime)
		}

		// It comes back, and is cut off before it has answered: it still goes on with what it had.
		time.Sleep(30 * time.Second)
		again := r.open()
		again.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"ROOTCA"}, VersionInfo: "of the first"})
		again.one()
		r.believes("back, and not answered yet", &trust.Version{})
		again.cancel()
		time.Sleep(ReturnTime - time.Second)
		r.believes("cut off again", &trust.Version{})
		time.Sleep(time.Second)
		r.believes("it had its time", &newest)
		if by := r.sds.ReturnsBy(exampleTD, next.Digest()); !by.IsZero() {
			t.Fatalf("nobody may be back, but by %s", by)
		}
		other.cancel()
		r.believes("the last one is cut off", &newest)
		if by := r.sds.ReturnsBy(exampleTD, next.Digest()); !by.IsZero() {
			t.Fatalf("with the newest bundle nobody is waited for, but by %s", by)
		}
		time.Sleep(ReturnTime)
		r.believes("nobody is left", nil)
	})
}

// Who came with nothing and has acknowledged nothing has what it was offered, or nothing: it doesn't pass for one that has
// something older, or a tool that looks and goes each minute would hold up every trust change.
func TestAnEndedStreamThatCameWithNothingHoldsUpNoLaterBundle(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, a *root) {
		first := w.bundles[exampleTD].Version()
		look := func() {
			c, d := r.open(), r.delta()
			c.subscribe("ROOTCA")
			d.subscribe("ROOTCA")
			c.one()
			d.one()
			r.believes("looks", &trust.Version{})
			c.cancel()
			d.cancel()
		}
		look()
		r.believes("has looked", &first)
		next := bundleOf(exampleTD, 2, a, newRoot(t, "root B"))
		newest := next.Version()
		w.setBundle(next)
		r.believes("may have the first", &first)
		for range 10 {
			time.Sleep(ReturnTime / 3)
			look()
		}
		r.believes("has looked often since", &newest)
		time.Sleep(ReturnTime)
		r.believes("nobody is left", nil)

		rejects := r.open()
		rejects.subscribe("ROOTCA")
		rejects.nack(rejects.one(), "", "no", "ROOTCA")
		synctest.Wait()
		rejects.cancel()
		r.believes("who rejects the only one has none", nil)
	})
}

// Delta says by name what a peer has from before.
func TestAnEndedDeltaStreamThatCameWithAnOlderBundleKeepsIt(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, a *root) {
		c := r.delta()
		c.resume(map[string]string{"ROOTCA": "an older one"}, "ROOTCA")
		c.one()
		c.cancel()
		r.believes("came with something else", &trust.Version{})
	})
}

// However many streams end, what is kept of them is no more than there are kinds of it; each end counts from its own time.
func TestWhatIsKeptOfEndedStreamsIsBounded(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		s := ca.issue(t, leaf{id: web, notAfter: time.Now().Add(time.Hour)})
		s.Issuer = "issuer"
		w.setSVID(s)
		only := w.bundles[exampleTD].Version()
		for range 50 {
			c := r.open()
			c.subscribe("ROOTCA", "default")
			for _, resp := range c.take() {
				c.ack(resp, "ROOTCA", "default")
			}
			synctest.Wait()
			c.cancel()
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if b, l := r.sds.beliefs.ended.kinds(), r.sds.endedLeaves.kinds(); b != 1 || l != 1 {
			t.Fatalf("%d beliefs and %d issuers are kept, want 1 and 1", b, l)
		}
		time.Sleep(ReturnTime - 2*time.Second)
		r.believes("the last may be back", &only)
		time.Sleep(time.Second)
		r.believes("nobody is left", nil)
		if n := len(r.sds.Leaves()); n != 0 {
			t.Fatalf("%d issuers are held", n)
		}
	})
}

func TestAReturnTimeBelowZeroIsRefused(t *testing.T) {
	w, _ := newWorld(t)
	if _, err := New(Config{Workloads: w, ReturnTime: -1}); err == nil {
		t.Fatal("taken")
	}
}

// A mute one was waited for while its stream was there.
func TestAMuteStreamThatWasEndedIsNotWaitedForOnceMore(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, a *root) {
		old := w.bundles[exampleTD].Version()
		mute, honest := r.open(), r.open()
		for _, c := range []*client{mute, honest} {
			c.subscribe("ROOTCA")
			c.ack(c.one(), "ROOTCA")
		}
		next := bundleOf(exampleTD, 2, a, newRoot(t, "root B"))
		newest := next.Version()
		w.setBundle(next)
		honest.ack(honest.one(), "ROOTCA")
		mute.one()
		time.Sleep(answerTimeout - time.Second)
		r.believes("nothing is said", &old)
		time.Sleep(time.Second)
		r.believes("the mute stream is ended", &newest)
	})
}

// kinds is how many things are kept.
func (e *ended[K]) kinds() (n int) {
	e.each(func(K, time.Time) { n++ })
	return n
}
