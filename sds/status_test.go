package sds

import (
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

func TestStreamsShowsWhoHasWhatAndWhatWasRefused(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		began := time.Now()
		c := r.open()
		c.send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA", "x\ny"}, Node: &corev3.Node{Id: "side\"car\x1b[31m"}})
		got := c.take()
		for _, resp := range got {
			c.ack(resp, "default", "ROOTCA", "x\ny")
		}
		time.Sleep(time.Minute)
		d := r.delta()
		d.subscribe("default")
		d.one()
		root, svid := got[0].VersionInfo, got[1].VersionInfo
		good := w.svids[web]
		renewed := ca.issue(t, leaf{id: web})
		w.setSVID(renewed)
		bad := c.one()
		c.nack(bad, svid, "KEY_VALUES_MISMATCH\n"+strings.Repeat("A", 100), "default", "ROOTCA", "x\ny")
		d.take()
		synctest.Wait()

		all := r.sds.Streams()
		if len(all) != 2 || all[0].Number >= all[1].Number {
			t.Fatalf("%+v, want two in the order of their numbers", all)
		}
		one, two := all[0], all[1]
		if one.Protocol != "sotw" || two.Protocol != "delta" || !one.Since.Equal(began) || !two.Since.Equal(began.Add(time.Minute)) || one.Peer == "" {
			t.Errorf("%+v and %+v", one, two)
		}
		if one.Node != `"side\"car\x1b[31m"` || two.Node != `"sidecar"` {
			t.Errorf("nodes %s and %s", one.Node, two.Node)
		}
		want := []NameStatus{
			{Name: "default", Kind: "svid", Sent: bad.VersionInfo, Acked: svid, Rejected: bad.VersionInfo, Reason: "KEY_VALUES_MISMATCH …", Serial: renewed.Serial},
			{Name: "ROOTCA", Kind: "bundle", Sent: root, Acked: root},
			{Name: `"x\ny"`},
		}
		for i, n := range one.Names {
			if n != want[i] {
				t.Errorf("got  %+v\nwant %+v", n, want[i])
			}
		}
		if n := two.Names[0]; n.Acked != "" || n.Sent != bad.VersionInfo || n.Serial != renewed.Serial {
			t.Errorf("not answered yet: %+v", n)
		}
		if good.Serial == renewed.Serial {
			t.Fatal("nothing was renewed")
		}

		w.setSVID(ca.issue(t, leaf{id: web}))
		next := c.one()
		c.ack(next, "default", "ROOTCA", "x\ny")
		synctest.Wait()
		if n := r.sds.Streams()[0].Names[0]; n.Acked != next.VersionInfo || n.Rejected != "" || n.Reason != "" {
			t.Errorf("after the next good one: %+v", n)
		}
		c.cancel()
		d.cancel()
		synctest.Wait()
		if all := r.sds.Streams(); len(all) != 0 {
			t.Errorf("streams that have ended: %+v", all)
		}
	})
}

func TestStreamsNamesThePeerByTheKernelsWord(t *testing.T) {
	w, _ := newWorld(t)
	r := onSocket(t, Config{Workloads: w}, filepath.Join(t.TempDir(), "s"))
	c := r.open()
	c.subscribe("default")
	c.next()
	if all := r.sds.Streams(); len(all) != 1 || !strings.HasPrefix(all[0].Peer, "pid ") {
		t.Errorf("%+v", all)
	}
}

func TestStreamsHasNoKeysAndNothingLongFromAPeer(t *testing.T) {
	inBubble(t, Config{Limits: Limits{NameLength: 4096}}, func(t *testing.T, r *rig, w *world, _ *root) {
		key := string(w.svids[web].PrivateKey)
		c := r.open()
		c.send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", key}, Node: &corev3.Node{Id: key + strings.Repeat("n ", 4000)}})
		c.nack(c.one(), "", "bad: "+key, "default", key)
		synctest.Wait()
		for _, s := range r.sds.Streams() {
			for _, text := range []string{s.Node, s.Names[0].Reason, s.Names[1].Name} {
				for n := 0; n+32 <= len(key); n += 8 {
					if part := key[n : n+32]; !strings.Contains(part, "-") && strings.Contains(text, part) {
						t.Fatalf("key material in %s", text)
					}
				}
				if len(text) > 1100 {
					t.Errorf("%d bytes of a peer's text", len(text))
				}
			}
		}
	})
}

// Streams is asked while streams work; the race detector looks on.
func TestStreamsMayBeAskedAtAnyTime(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		stop, asked := make(chan struct{}), make(chan int)
		go func() {
			n := 0
			for {
				select {
				case <-stop:
					asked <- n
					return
				default:
					r.sds.Streams()
					n++
				}
			}
		}()
		c, d := r.open(), r.delta()
		for i := range 20 {
			c.subscribe("default", "ROOTCA", strconv.Itoa(i))
			d.subscribe("default", "ALL")
			d.unsubscribe("ALL")
			w.setSVID(ca.issue(t, leaf{id: web}))
		}
		close(stop)
		if <-asked == 0 {
			t.Error("never asked")
		}
	})
}
