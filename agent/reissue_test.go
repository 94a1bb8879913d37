package agent

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/sds"
)

// holds reports whether the server was last told exactly these issuers.
func (w *world) holds(issuers ...*authority) func() bool {
	var want [][]byte
	for _, a := range issuers {
		want = append(want, a.cert.SubjectKeyId)
	}
	slices.SortFunc(want, bytes.Compare)
	return func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		h := w.held["node-1"]
		return h != nil && slices.EqualFunc(h.KeyIds, want, bytes.Equal)
	}
}

// switchTo makes another intermediate under the same root issue.
func (w *world) switchTo(name string) {
	next := newCA(w.t, name, w.root)
	w.change(func() { w.mesh = next })
}

func TestTheServerHearsWhoseLeavesAreHeld(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	n.ready(t)
	eventually(t, "an agent that holds nothing says so", w.holds())
	s := subscribe(t, connect(t, n.config.Socket), "default")
	if _, err := s.next(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the first leaf is told", w.holds(w.mesh))
	before := w.mesh
	w.switchTo("east 2")
	w.setRegistrations(reg("web", "/web", 2*time.Hour, uid))
	r, err := s.stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "both are told while the stream has not acknowledged the new one", w.holds(before, w.mesh))
	time.Sleep(2 * settle)
	if !w.holds(before, w.mesh)() {
		t.Fatal("the old one is no longer told, though nothing was acknowledged")
	}
	if err := s.stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: s.names, VersionInfo: r.VersionInfo, ResponseNonce: r.Nonce}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new one alone", w.holds(w.mesh))
	w.close()
	w.change(func() { clear(w.held) })
	w.open()
	eventually(t, "it is told anew to a server that has been away", w.holds(w.mesh))
	best := time.Hour
	for try := 0; best > lookEvery/2 && try < 3; try++ { // a busy machine may be late, but not each time
		if try > 0 {
			w.setRegistrations(reg("web", "/web", time.Hour, uid))
			eventually(t, "it is served again", func() bool {
				_, err := subscribe(t, connect(t, n.config.Socket), "default").next()
				return err == nil
			})
			eventually(t, "it is held again", w.holds(w.mesh))
		}
		since := time.Now()
		w.setRegistrations()
		eventually(t, "nothing is held any more", w.holds())
		best = min(best, time.Since(since))
	}
	if best > lookEvery/2 {
		t.Fatalf("the server heard of it after %s at best, which is by chance", best)
	}
}

func (l leaves) has(a *authority) bool { return !l[string(a.cert.SubjectKeyId)].IsZero() }

// What the disk did not take in place of an older leaf would come back with a restart.
func TestALeafInTheCacheIsHeld(t *testing.T) {
	w, dir := newWorld(t), t.TempDir()
	r := reg("web", "/web", time.Hour, uid)
	filled(t, w, dir, r)
	d := newDoorless(t, w, r)
	c := mustCache(t, dir, passphrase("one"), "node-1")
	d.restore(c)
	before := w.mesh
	w.switchTo("east 2")
	d.due(t.Context(), []string{"web"})
	d.mustOpen(t, uid).SVID(r.ID)
	d.due(t.Context(), []string{"web"})
	d.running.Wait()
	after := w.mesh
	held := func() leaves { l := leaves{}; d.held(l); c.held(l); return l }
	if l := held(); len(l) != 2 || !l.has(before) || !l.has(after) {
		t.Fatalf("not written yet: %v", l)
	}
	c.flush(t.Context(), d.inUse)
	if l := held(); len(l) != 1 || !l.has(after) {
		t.Fatalf("written: %v", l)
	}
	d.setRegistrations(nil)
	if l := held(); len(l) != 0 {
		t.Fatalf("withdrawn: %v", l)
	}
}

func order(window time.Duration, issuers ...*authority) *signetv1.Reissue {
	m := &signetv1.Reissue{WindowMs: window.Milliseconds()}
	for _, a := range issuers {
		m.IssuerKeyIds = append(m.IssuerKeyIds, a.cert.SubjectKeyId)
	}
	return m
}

func (d *doorless) take(t *testing.T, m *signetv1.Reissue) {
	t.Helper()
	if err := (&Agent{hub: d.hub}).takeReissue(m); err != nil {
		t.Fatal(err)
	}
}

// fleet are many registrations that one view wants.
func fleet(n int, ttl time.Duration) []identity.Registration {
	var list []identity.Registration
	for i := range n {
		list = append(list, reg(fmt.Sprintf("r%d", i), fmt.Sprintf("/r%d", i), ttl, uid))
	}
	return list
}

func TestLeavesOfALostKeyAreReplacedEachOnceWithinTheWindow(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		const window = 10 * time.Minute
		list := fleet(40, 30*24*time.Hour)
		d := newDoorless(t, w, list...)
		start(d)
		v := d.mustOpen(t, uid)
		look := func() (out []*sds.SVID) {
			for _, r := range list {
				out = append(out, v.SVID(r.ID))
			}
			return out
		}
		look()
		time.Sleep(time.Second)
		first := look()
		tainted := w.mesh
		w.switchTo("east 2")
		ordered := time.Now()
		at := make([]time.Time, len(list))
		for i, r := range list {
			at[i] = rotation.ReissueAt(d.inUse(r.Name).chain[0].SerialNumber.Bytes(), ordered, window)
		}
		d.take(t, order(window, tainted))
		if l := d.life(); l.replacing != len(list) {
			t.Fatalf("%d are to be replaced, want all", l.replacing)
		}
		for _, s := range d.identities() {
			if !bytes.Equal(s.IssuerKeyId, tainted.cert.SubjectKeyId) || s.ReissueAt == nil || !s.ReissueAt.AsTime().Equal(s.RenewAt.AsTime()) {
				t.Fatalf("status says %v", s)
			}
		}
		for n := range 20 {
			// Every reconnect brings the same order again.
			d.take(t, order(window, tainted))
			time.Sleep(window / 20)
			now := time.Now()
			for i, s := range look() {
				switch replaced := s != first[i]; {
				case replaced && now.Before(at[i].Add(-rotation.DefaultWindow)):
					t.Fatalf("step %d: r%d was replaced before its time", n, i)
				case !replaced && now.After(at[i].Add(time.Second)):
					t.Fatalf("step %d: r%d was not replaced at its time", n, i)
				}
			}
		}
		time.Sleep(24 * time.Hour)
		for i, s := range look() {
			if c := d.inUse(list[i].Name); s == first[i] || c.issuer != string(w.mesh.cert.SubjectKeyId) || w.issuances(list[i].Name) != 2 {
				t.Fatalf("r%d: %d issuances, of issuer %x", i, w.issuances(list[i].Name), c.issuer)
			}
		}
		if l := d.life(); l.replacing != 0 {
			t.Fatalf("%d are still to be replaced", l.replacing)
		}
		// What is lost next is replaced next, at once and in one call.
		d.mu.Lock()
		d.hub.orders = nil
		d.mu.Unlock()
		before := d.calls.Load()
		lost := w.mesh
		w.switchTo("east 3")
		d.take(t, order(0, tainted, lost))
		time.Sleep(time.Second)
		if n := d.calls.Load() - before; n != 1 || w.issuances("r0") != 3 {
			t.Fatalf("%d calls, %d issuances of r0", n, w.issuances("r0"))
		}
	})
}

func TestAnIssuerThatGoesOnIsAskedWithPatience(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		r := reg("web", "/web", 30*24*time.Hour, uid)
		d := newDoorless(t, w, r)
		start(d)
		await(t, d.mustOpen(t, uid))
		d.take(t, order(0, w.mesh))
		time.Sleep(24 * time.Hour)
		// The first, the one that is ordered, six with waits that double, and one in 30 to 60 minutes: by the serial, which is drawn.
		if n := w.issuances("web"); n < 30 || n > 55 {
			t.Fatalf("%d issuances in a day by an issuer that is to be replaced and goes on", n)
		}
		w.switchTo("east 2")
		time.Sleep(maxReissueAgain + time.Second)
		n := w.issuances("web")
		if d.inUse("web").issuer != string(w.mesh.cert.SubjectKeyId) {
			t.Fatal("the next issuer is not used within an hour")
		}
		time.Sleep(24 * time.Hour)
		if w.issuances("web") != n {
			t.Fatal("it is asked for again")
		}
	})
}

func TestALiftedOrderLeavesTheRenewalWhereItWas(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		r := reg("web", "/web", 30*24*time.Hour, uid)
		d := newDoorless(t, w, r)
		start(d)
		await(t, d.mustOpen(t, uid))
		renewAt := d.inUse("web").renewAt
		d.take(t, order(time.Hour, w.mesh))
		d.take(t, order(time.Hour))
		time.Sleep(time.Until(renewAt) - time.Second)
		if n := w.issuances("web"); n != 1 {
			t.Fatalf("%d issuances before its time", n)
		}
		time.Sleep(2 * time.Second)
		if n := w.issuances("web"); n != 2 {
			t.Fatalf("%d issuances at its time", n)
		}
	})
}

// A certificate under a lost key is not kept for nobody, and the server is not asked for it either: it wants to hear of a
// workload that shows the selectors.
func TestALeafOfALostKeyThatNobodyWantsIsDropped(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d := newDoorless(t, w, reg("web", "/web", 24*time.Hour, uid))
		start(d)
		v := d.mustOpen(t, uid)
		await(t, v)
		v.Close()
		d.take(t, order(time.Minute, w.mesh))
		time.Sleep(2 * time.Minute)
		if d.inUse("web") != nil || w.issuances("web") != 1 {
			t.Fatalf("held: %v, after %d issuances", d.inUse("web"), w.issuances("web"))
		}
		await(t, d.mustOpen(t, uid))
	})
}

func TestOrdersAreBounded(t *testing.T) {
	w := newWorld(t)
	d := newDoorless(t, w)
	a := &Agent{hub: d.hub}
	many := &signetv1.Reissue{}
	for i := range maxIssuers + 1 {
		many.IssuerKeyIds = append(many.IssuerKeyIds, []byte{byte(i)})
	}
	for what, m := range map[string]*signetv1.Reissue{
		"too many":      many,
		"an empty ID":   {IssuerKeyIds: [][]byte{{}}},
		"a long ID":     {IssuerKeyIds: [][]byte{make([]byte, maxKeyID+1)}},
		"a past window": {IssuerKeyIds: [][]byte{{1}}, WindowMs: -1},
	} {
		if err := a.takeReissue(m); err == nil || len(d.orders) != 0 {
			t.Errorf("%s: taken", what)
		}
	}
	// An order that must not be lost is not refused for its window.
	if err := a.takeReissue(&signetv1.Reissue{IssuerKeyIds: [][]byte{{1}}, WindowMs: 1 << 62}); err != nil || d.orders["\x01"].window != maxReissue {
		t.Errorf("a window without end: %v, %v", err, d.orders)
	}
}

// The order comes by the stream, and the server hears when none of the leaves is left.
func TestAnOrderIsCarriedOutOverTheDoor(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	s := subscribe(t, connect(t, n.config.Socket), "default")
	if _, err := s.next(); err != nil {
		t.Fatal(err)
	}
	tainted := w.mesh
	w.switchTo("east 2")
	w.change(func() { w.order = order(50*time.Millisecond, tainted) })
	if _, err := s.next(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server hears that none is left", w.holds(w.mesh))
	r, err := n.admin(t).Status(t.Context(), &adminv1.AgentStatusRequest{})
	if err != nil || len(r.Identities) != 1 || !bytes.Equal(r.Identities[0].IssuerKeyId, w.mesh.cert.SubjectKeyId) || r.Identities[0].ReissueAt != nil {
		t.Fatalf("%v, %v", r, err)
	}
}

// The server tells an order at the beginning of every stream for as long as it stands.
func TestAnOrderThatWasLiftedWhileAwayIsForgotten(t *testing.T) {
	for name, log := range map[string]bool{"by the first checkpoint": true, "by time, where there is no checkpoint": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.open()
			w.setRegistrations(reg("web", "/web", time.Hour, uid))
			n := w.start(t)
			if _, err := subscribe(t, connect(t, n.config.Socket), "default").next(); err != nil {
				t.Fatal(err)
			}
			remembered := func() (o reissueOrder, ok bool) {
				n.hub.mu.Lock()
				defer n.hub.mu.Unlock()
				o, ok = n.hub.orders[string(w.mesh.cert.SubjectKeyId)]
				return o, ok
			}
			w.change(func() { w.order = order(time.Hour, w.mesh) })
			eventually(t, "it is taken", func() bool { _, ok := remembered(); return ok })
			first, _ := remembered()
			streams := func() int { w.mu.Lock(); defer w.mu.Unlock(); return len(w.peers) }
			// away closes the doors, and opens them again after a change.
			away := func(change func()) {
				t.Helper()
				w.close()
				eventually(t, "it is away", func() bool { return !n.connected.Load() })
				w.change(func() {
					change()
					once := false
					w.checkpoint = func(uint64) *signetv1.Checkpoint {
						if once || !log {
							return nil
						}
						once = true
						return &signetv1.Checkpoint{Note: []byte("none of ours")}
					}
				})
				before := streams()
				w.open()
				eventually(t, "it is back", func() bool { return streams() > before && n.connected.Load() })
			}
			away(func() {})
			time.Sleep(2 * settle)
			if again, ok := remembered(); !ok || again != first {
				t.Fatalf("told again: %v, want the first time %v", again, first)
			}
			since := time.Now()
			away(func() { w.order = nil })
			eventually(t, "it is forgotten", func() bool { _, ok := remembered(); return !ok })
			if took := time.Since(since); !log && took < orderWait {
				t.Fatalf("forgotten after %s: it may still come", took)
			}
			r, err := n.admin(t).Status(t.Context(), &adminv1.AgentStatusRequest{})
			if err != nil || len(r.Identities) != 1 || r.Identities[0].ReissueAt != nil {
				t.Fatalf("%v, %v", r, err)
			}
		})
	}
}
