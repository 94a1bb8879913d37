package agent

import (
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/sds"
)

// wanted reports by how many views a registration's certificate is wanted; -1 = there is none.
func (d *doorless) wanted(name string) int {
	d.hub.mu.Lock()
	defer d.hub.mu.Unlock()
	if e, ok := d.entries[name]; ok {
		return len(e.wanted)
	}
	return -1
}

func TestOneOfSeveralRegistrationsOfAnIDIsUsed(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		one, two := reg("one", "/web", time.Hour, uid), reg("two", "/web", 2*time.Hour, uid)
		d := newDoorless(t, w, two)
		start(d)
		v := d.mustOpen(t, uid)
		first := await(t, v)

		// One comes that goes before the other: the good certificate serves until there is one of it, and then no more.
		d.know(one, two)
		if v.SVID(first.ID) != first {
			t.Fatal("the identity was lost when a registration was added")
		}
		time.Sleep(time.Second)
		second := v.SVID(first.ID)
		if second == nil || second == first || d.wanted("one") != 1 || d.wanted("two") != 0 {
			t.Fatalf("got %v; wanted: one by %d, two by %d", second, d.wanted("one"), d.wanted("two"))
		}
		time.Sleep(24 * time.Hour)
		if n := w.issuances("two"); n != 1 {
			t.Fatalf("the registration that is not used was issued %d times", n)
		}
	})
}

func TestAnIdentityThatAnotherRegistrationStillGivesIsNotLost(t *testing.T) {
	for name, change := range map[string]func(d *doorless){
		"removed": func(d *doorless) { d.know(reg("two", "/web", time.Hour, uid)) },
		"another selector": func(d *doorless) {
			d.know(reg("one", "/web", time.Hour, "unix:uid:7"), reg("two", "/web", time.Hour, uid))
		},
		"another ID": func(d *doorless) {
			d.know(reg("one", "/x", time.Hour, "unix:uid:7"), reg("two", "/web", time.Hour, uid))
		},
		"another ID for the same": func(d *doorless) {
			d.know(reg("one", "/x", time.Hour, uid), reg("two", "/web", time.Hour, uid))
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
				d := newDoorless(t, w, reg("one", "/web", time.Hour, uid), reg("two", "/web", time.Hour, uid))
				start(d)
				v, id := d.mustOpen(t, uid), reg("", "/web", 0).ID
				v.SVID(id)
				time.Sleep(time.Second)
				first := v.SVID(id)
				if first == nil || w.issuances("one") != 1 || w.issuances("two") != 0 {
					t.Fatalf("%v, issued %d and %d times", first, w.issuances("one"), w.issuances("two"))
				}
				d.away.Store(true)
				change(d)
				time.Sleep(20 * time.Minute)
				if v.SVID(id) != first {
					t.Fatal("the identity was lost with the first registration while the server was away")
				}
				if other := d.mustOpen(t, uid); other.SVID(id) != nil {
					t.Fatal("somebody else was given the certificate of a registration that is gone")
				}
				d.away.Store(false)
				time.Sleep(time.Minute)
				if s := v.SVID(id); s == nil || s == first || w.issuances("two") != 1 {
					t.Fatalf("%v, issued %d times under the other", s, w.issuances("two"))
				}
				d.know()
				if v.SVID(id) != nil {
					t.Fatal("an identity that nothing gives any more is served")
				}
			})
		})
	}
}

func TestTheNextRegistrationOfAnIDServesWhileTheFirstIsRefused(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d := newDoorless(t, w, reg("one", "/web", time.Hour, uid), reg("two", "/web", time.Hour, uid))
		w.refuse = refuseNamed("one")
		start(d)
		v, id := d.mustOpen(t, uid), reg("", "/web", 0).ID
		var s *sds.SVID
		for range 60 {
			if s = v.SVID(id); s != nil {
				break
			}
			time.Sleep(time.Second)
		}
		if s == nil || w.issuances("two") != 1 {
			t.Fatalf("%v, issued %d times", s, w.issuances("two"))
		}
	})
}

func TestWhatIsInFlightIsNotAskedForAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, _ func(*doorless)) {
		d := newDoorless(t, w, reg("web", "/web", time.Hour, uid))
		for range maxCalls { // no call gets further than its place
			d.hub.calls <- struct{}{}
		}
		v := d.mustOpen(t, uid)
		v.SVID(v.Identities()[0])
		// Handed out twice, because it was asked for between being handed out and being taken.
		d.due(t.Context(), []string{"web"})
		d.due(t.Context(), []string{"web"})
		for range maxCalls {
			<-d.hub.calls
		}
		d.running.Wait()
		if n := w.issuances("web"); n != 1 {
			t.Fatalf("issued %d times", n)
		}
	})
}

func TestAClockThatJumpsWithholdsWhatHasExpiredAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		const ttl = 24 * time.Hour
		var jump atomic.Int64
		w.now = func() time.Time { return time.Now().Add(time.Duration(jump.Load())) }
		d := newDoorless(t, w, reg("web", "/web", ttl, uid))
		start(d)
		v := d.mustOpen(t, uid)
		first := await(t, v)
		jump.Store(int64(ttl + time.Second))
		if v.SVID(first.ID) != nil || d.mustOpen(t, uid).SVID(first.ID) != nil {
			t.Fatal("an expired certificate is served")
		}
		if l := d.life(); l.expired != 1 || l.valid != 0 {
			t.Fatalf("life: %+v", l)
		}
		began := time.Now()
		if s := await(t, d.mustOpen(t, uid)); s == first || time.Since(began) > time.Second {
			t.Fatalf("%v after %s", s, time.Since(began))
		}
	})
}

func TestGaugesOfWhatHasExpiredShowThePast(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d := newDoorless(t, w, reg("a", "/a", time.Hour, uid), reg("b", "/b", 2*time.Hour, uid))
		start(d)
		registry := prometheus.NewRegistry()
		if _, err := newMetrics(registry, w.now, d.life, func() time.Time { return time.Time{} }, func() bool { return false }); err != nil {
			t.Fatal(err)
		}
		gauge := func(name string) float64 {
			all, err := registry.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range all {
				if f.GetName() == name {
					return f.GetMetric()[0].GetGauge().GetValue()
				}
			}
			t.Fatalf("no metric %s", name)
			return 0
		}
		v := d.mustOpen(t, uid)
		for _, id := range v.Identities() {
			v.SVID(id)
		}
		time.Sleep(time.Second)
		a, b := v.SVID(reg("", "/a", 0).ID), v.SVID(reg("", "/b", 0).ID)
		d.away.Store(true)
		time.Sleep(90 * time.Minute)
		const notAfter, budget = "signet_agent_earliest_svid_not_after_timestamp_seconds", "signet_agent_outage_budget_seconds"
		if have := gauge(notAfter); have != float64(b.NotAfter.Unix()) {
			t.Errorf("one of two is valid: %v, want %v", have, b.NotAfter.Unix())
		}
		time.Sleep(3 * time.Hour)
		if have := gauge(notAfter); have != float64(a.NotAfter.Unix()) {
			t.Errorf("all have expired: the first end is %v, want %v", have, a.NotAfter.Unix())
		}
		if have := gauge(budget); have != 0 {
			t.Errorf("all have expired: an outage budget of %v s", have)
		}
	})
}

// The ban reaches an agent in the middle of a call, as the answer to its items.
func TestABanHeardOfAnItemPurgesTheCache(t *testing.T) {
	for _, word := range []string{"banned_agent", "unknown_agent"} {
		w, dir := newWorld(t), filepath.Join(t.TempDir(), "cache")
		r := reg("web", "/web", time.Hour, uid)
		filled(t, w, dir, r)
		d := newDoorless(t, w, r)
		d.restore(mustCache(t, dir, passphrase("one"), "node-1"))
		if n := len(d.cache.names()); n != 1 {
			t.Fatalf("%d files", n)
		}
		w.refuse = func(*signetv1.IssueItem) *signetv1.Refusal {
			return &signetv1.Refusal{Reason: signetv1.Refusal_REASON_DENIED, Message: word}
		}
		v := d.mustOpen(t, uid)
		first := v.SVID(r.ID)
		d.due(t.Context(), []string{"web"})
		d.running.Wait()
		if n := len(d.cache.names()); n != 0 {
			t.Errorf("%s: %d files are left", word, n)
		}
		if first == nil || v.SVID(r.ID) != first {
			t.Errorf("%s: what is in memory went with it", word)
		}
	}
}
