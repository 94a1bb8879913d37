package sds

import (
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// A certificate is in use until another is acknowledged, and from when it is on its way.
func TestLeavesAreInUseUntilTheNextIsAcknowledged(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		issue := func(issuer string, life time.Duration) {
			s := ca.issue(t, leaf{id: web, notAfter: time.Now().Add(life)})
			s.Issuer = issuer
			w.setSVID(s)
		}
		var bell <-chan struct{}
		want := func(when string, ids ...string) {
			t.Helper()
			synctest.Wait()
			if got := slices.Sorted(maps.Keys(r.sds.Leaves())); !slices.Equal(got, ids) {
				t.Fatalf("%s: %q, want %q", when, got, ids)
			}
			if bell != nil && !rung(bell) {
				t.Fatalf("%s: the bell did not ring", when)
			}
			bell = r.sds.LeavesChanged()
		}
		issue("old", time.Hour)
		want("nobody is there")
		bell = r.sds.LeavesChanged()
		c, slow := r.open(), r.delta()
		c.subscribe("default", "ROOTCA")
		slow.subscribe("default")
		first := c.take()
		want("sent", "old")
		for _, resp := range first {
			c.ack(resp, "default", "ROOTCA")
		}
		late := slow.one()
		slow.ack(late)
		want("acknowledged", "old")
		issue("new", 2*time.Hour)
		resp := c.one()
		late = slow.one()
		want("sent, and not acknowledged", "new", "old")
		c.ack(resp, "default", "ROOTCA")
		want("one of two has acknowledged it", "new", "old")
		slow.nack(late, "no")
		want("the other has rejected it", "new", "old")
		if end := r.sds.Leaves()["new"]; !end.Equal(w.svids[web].NotAfter) {
			t.Fatalf("the end of the new one is %s", end)
		}
		slow.unsubscribe("default")
		want("the other has given it up", "new")
		c.cancel()
		want("nobody is there, but one may come back with it", "new")
		bell = nil
		time.Sleep(ReturnTime - time.Second)
		want("for so long", "new")
		time.Sleep(time.Second)
		want("nobody is left")
	})
}
