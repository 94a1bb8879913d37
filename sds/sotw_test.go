package sds

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-ca/signet/test/bubble"
	"github.com/signet-ca/signet/trust"
)

// The rows of the contract with Envoy in words of state of the world; where delta differs, see delta_test.go.

func TestS01TheCallerIsKnownByTheConnectionNeverByTheNode(t *testing.T) {
	w, _ := newWorld(t)
	r := onSocket(t, Config{Workloads: w}, filepath.Join(t.TempDir(), "s"))
	c := r.open()
	c.send(&discoveryv3.DiscoveryRequest{
		TypeUrl: secretType, ResourceNames: []string{"default", api.String()},
		Node: &corev3.Node{Id: api.String(), Cluster: "api"},
	})
	if s := secretOf(t, c.next()); s.Name != "default" {
		t.Fatalf("got %s", s.Name)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.attested) != 1 {
		t.Fatalf("attested %d times for one stream", len(w.attested))
	}
	if _, ok := w.attested[0].(*net.UnixConn); !ok {
		t.Fatalf("attested by a %T, want the accepted socket", w.attested[0])
	}
	if w.asked[api] != 0 {
		t.Error("an identity was asked for because the node named it")
	}
}

func TestS02TheFirstRequestIsAnsweredWhateverItsVersion(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, _ *world, _ *root) {
		c := r.open()
		c.subscribe("default")
		known := c.one()
		again := r.open() // as after a reconnect: the accepted version, no nonce
		again.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"default"}, VersionInfo: known.VersionInfo})
		if got := again.one(); got.VersionInfo != known.VersionInfo {
			t.Errorf("version %s, want %s", got.VersionInfo, known.VersionInfo)
		}
	})
}

func TestS03ResponsesHaveTypeFreshNonceAndAVersionOfTheContent(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		var versions []string
		seen := map[string]bool{}
		for _, r := range []*rig{r, inMemory(t, Config{Workloads: w})} { // the second as after a restart
			c := r.open()
			c.subscribe("default", "ROOTCA")
			for _, resp := range c.take() {
				if resp.TypeUrl != secretType || resp.Nonce == "" || seen[resp.Nonce] || resp.VersionInfo == "" {
					t.Errorf("type %q nonce %q version %q", resp.TypeUrl, resp.Nonce, resp.VersionInfo)
				}
				seen[resp.Nonce] = true
				versions = append(versions, resp.VersionInfo)
			}
		}
		if len(versions) != 4 || versions[0] != versions[2] || versions[1] != versions[3] || versions[0] == versions[1] {
			t.Errorf("versions over a restart: %q, want the same two", versions)
		}
		w.setSVID(ca.issue(t, leaf{id: web}))
		c := r.open()
		c.subscribe("default")
		if got := c.one(); got.VersionInfo == versions[0] {
			t.Error("other content, same version")
		}
	})
}

func TestS03ARequestOfAnotherTypeEndsTheStream(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, _ *world, _ *root) {
		c := r.open()
		c.send(&discoveryv3.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster", ResourceNames: []string{"default"}})
		c.wantEnd(codes.InvalidArgument)
	})
}

func TestS04NackIsErrorDetailAndTheSameContentIsNotSentAgain(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		c := r.open()
		c.subscribe("default")
		good := c.one()
		c.ack(good, "default")
		w.setSVID(ca.issue(t, leaf{id: web}))
		bad := c.one()
		c.nack(bad, good.VersionInfo, "KEY_VALUES_MISMATCH", "default")
		c.silence("after the NACK")
		w.change(func(*world) {})
		c.silence("at a change of something else")
		c.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"default"}, VersionInfo: good.VersionInfo})
		c.silence("when asked again for what it rejected")
		c.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, VersionInfo: good.VersionInfo, ResponseNonce: bad.Nonce})
		c.subscribe("default")
		c.silence("when unsubscribed and subscribed again")

		w.setSVID(ca.issue(t, leaf{id: web}))
		fresh := c.one()
		if fresh.VersionInfo == bad.VersionInfo {
			t.Error("new content under the rejected version")
		}
		c.ack(fresh, "default")
		c.silence("after the ACK")
		if n, a := r.metric(r.sds.metrics.nacks.WithLabelValues(kindSVID)), r.metric(r.sds.metrics.acks.WithLabelValues(kindSVID)); n != 1 || a != 2 {
			t.Errorf("%v NACKs and %v ACKs counted, want 1 and 2", n, a)
		}
		if !strings.Contains(r.logs.String(), "KEY_VALUES_MISMATCH") {
			t.Error("the reason is not in the log")
		}
	})
}

func TestS04AnOldVersionWithoutErrorDetailIsNoNack(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, _ *world, _ *root) {
		c := r.open()
		c.subscribe("default")
		resp := c.one()
		c.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"default"}, VersionInfo: "older", ResponseNonce: resp.Nonce})
		c.silence("after the answer")
		if n := r.metric(r.sds.metrics.nacks.WithLabelValues(kindSVID)); n != 0 {
			t.Errorf("%v NACKs counted", n)
		}
	})
}

func TestS05AnAckOfARepeatedBadSecretMeansNothing(t *testing.T) {
	w, _ := newWorld(t)
	r := onSocket(t, Config{Workloads: w}, filepath.Join(t.TempDir(), "s"))
	c := r.open()
	c.subscribe("ROOTCA")
	bad := c.next()
	c.nack(bad, "", "invalid root", "ROOTCA")
	eventually(t, "the NACK is counted", func() bool { return r.metric(r.sds.metrics.nacks.WithLabelValues(kindBundle)) == 1 })
	c.cancel()
	eventually(t, "the stream is gone", func() bool { _, ok := r.sds.OldestBundle(exampleTD); return !ok })

	// The same process comes back, must be answered (S2), and acknowledges without having applied anything.
	again := r.open()
	again.subscribe("ROOTCA")
	repeated := again.next()
	if repeated.VersionInfo != bad.VersionInfo {
		t.Fatal("not the same content")
	}
	again.ack(repeated, "ROOTCA")
	eventually(t, "the worthless ACK is in the log", func() bool { return strings.Contains(r.logs.String(), "means nothing") })
	if d, ok := r.sds.OldestBundle(exampleTD); !ok || d != (trust.Version{}) {
		t.Errorf("believed: %s %v, want nothing acknowledged", d, ok)
	}
	if n := r.metric(r.sds.metrics.acks.WithLabelValues(kindBundle)); n != 0 {
		t.Errorf("%v ACKs counted", n)
	}

	b := bundleOf(exampleTD, 2, newRoot(t, "root B"))
	w.setBundle(b)
	again.ack(again.next(), "ROOTCA")
	eventually(t, "an ACK of other content counts", func() bool { d, ok := r.sds.OldestBundle(exampleTD); return ok && d.Digest == b.Digest() })
}

func TestS05AnAckOfNewContentCountsAfterANack(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		c, d := r.open(), r.delta()
		c.subscribe("ROOTCA")
		c.ack(c.one(), "ROOTCA")
		d.subscribe("ROOTCA")
		d.ack(d.one())
		first := w.bundles[exampleTD]
		w.setBundle(bundleOf(exampleTD, 2, ca, newRoot(t, "root B")))
		rejected, rejectedDelta := c.one(), d.one()
		// The next is on its way when the rejection comes.
		next := bundleOf(exampleTD, 3, ca, newRoot(t, "root C"))
		w.setBundle(next)
		fresh, freshDelta := c.one(), d.one()
		c.nack(rejected, "", "no", "ROOTCA")
		d.nack(rejectedDelta, "no")
		synctest.Wait()
		if v, _ := r.sds.OldestBundle(exampleTD); v != first.Version() {
			t.Fatalf("rejected, but believed is %v", v)
		}
		c.ack(fresh, "ROOTCA")
		d.ack(freshDelta)
		synctest.Wait()
		if v, _ := r.sds.OldestBundle(exampleTD); v != next.Version() {
			t.Fatalf("acknowledged after the rejection: believed is %v", v)
		}
		// And one that is made after it.
		w.setBundle(bundleOf(exampleTD, 4, ca, newRoot(t, "root D")))
		c.nack(c.one(), "", "no", "ROOTCA")
		d.nack(d.one(), "no")
		last := bundleOf(exampleTD, 5, ca)
		w.setBundle(last)
		c.ack(c.one(), "ROOTCA")
		d.ack(d.one())
		synctest.Wait()
		if v, _ := r.sds.OldestBundle(exampleTD); v != last.Version() {
			t.Fatalf("acknowledged after the second rejection: believed is %v", v)
		}
	})
}

func TestS06AChangedSetIsHonouredWithAStaleOrEmptyNonce(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		w.ids = append(w.ids, api)
		w.svids[api] = ca.issue(t, leaf{id: api})
		c := r.open()
		c.subscribe("default")
		first := c.one()
		w.setSVID(ca.issue(t, leaf{id: web}))
		c.one() // on its way when the next request leaves
		for _, nonce := range []string{first.Nonce, "", "never-sent"} {
			c.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"default", "ROOTCA"}, VersionInfo: first.VersionInfo, ResponseNonce: nonce})
			if got := names(c.take()); !slices.Equal(got, []string{"ROOTCA"}) {
				t.Fatalf("nonce %q: got %v, want the added name alone", nonce, got)
			}
			c.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"default"}, VersionInfo: first.VersionInfo, ResponseNonce: nonce})
			c.silence("a name less")
		}
		w.setBundle(bundleOf(exampleTD, 2, ca, newRoot(t, "root B")))
		c.silence("a change of what was dropped")
	})
}

func TestS06TheSameSetWithAnOlderVersionIsSentAgain(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, _ *world, _ *root) {
		c := r.open()
		c.subscribe("default", "ROOTCA")
		got := c.take()
		for _, resp := range got {
			c.ack(resp, "default", "ROOTCA")
		}
		c.silence("after ACKs")
		c.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"default", "ROOTCA"}, VersionInfo: got[0].VersionInfo, ResponseNonce: got[0].Nonce})
		c.silence("the current version")
		for _, version := range []string{"", "older"} {
			c.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"default", "ROOTCA"}, VersionInfo: version})
			if n := names(c.take()); !slices.Equal(n, []string{"ROOTCA", "default"}) {
				t.Errorf("version %q: got %v, want both again", version, n)
			}
		}
	})
}

func TestS07NoNamesIsNothingNeverEverything(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		c := r.open()
		c.subscribe()
		c.silence("first request without names")
		w.setSVID(ca.issue(t, leaf{id: web}))
		c.silence("a change")
		c.subscribe("default")
		c.ack(c.one(), "default")
		c.subscribe()
		c.silence("unsubscribing from all")
		w.setSVID(ca.issue(t, leaf{id: web}))
		c.silence("a change after it")
		if c.ended() != nil {
			t.Error(c.ended())
		}
	})
}

func TestS08OnlyWhatChangedIsPushed(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		w.ids = append(w.ids, api)
		w.svids[api] = ca.issue(t, leaf{id: api})
		c := r.open()
		all := []string{"default", "ROOTCA", api.String(), exampleTD.IDString()}
		c.subscribe(all...)
		got := c.take()
		if n, want := names(got), []string{"ROOTCA", exampleTD.IDString(), "default", api.String()}; !slices.Equal(n, want) {
			t.Fatalf("got %v, want the bundles first: %v", n, want)
		}
		for _, resp := range got {
			c.ack(resp, all...)
		}
		renewed := ca.issue(t, leaf{id: web})
		w.setSVID(renewed)
		if resp := c.one(); secretOf(t, resp).Name != "default" || serialOf(t, resp) != renewed.Serial {
			t.Errorf("a leaf rotation pushed %s", secretOf(t, resp).Name)
		}
		w.setBundle(bundleOf(exampleTD, 2, ca, newRoot(t, "root B")))
		if n := names(c.take()); !slices.Equal(n, []string{"ROOTCA", exampleTD.IDString()}) {
			t.Errorf("a change of the bundle pushed %v", n)
		}
		w.change(func(*world) {})
		c.silence("a ring without a change")
		if n := r.metric(r.sds.metrics.pushes.WithLabelValues(kindBundle)); n != 4 {
			t.Errorf("%v bundle pushes counted, want 4", n)
		}
	})
}

func TestS09ANameAskedTwiceIsSentOnce(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, _ *world, _ *root) {
		c := r.open()
		c.subscribe("default", "default", "ROOTCA", "default")
		if n := names(c.take()); !slices.Equal(n, []string{"ROOTCA", "default"}) {
			t.Errorf("got %v", n)
		}
	})
}

func TestS10AnUnknownNameIsSilentAndPushedWhenItAppears(t *testing.T) {
	other := spiffeid.RequireTrustDomainFromString("other.test")
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		unknown := []string{api.String(), other.IDString(), "file-root:system", "*", "spiffe://", "spiffe://example.org/", ""}
		c := r.open()
		c.subscribe(append([]string{"default"}, unknown...)...)
		if n := names(c.take()); !slices.Equal(n, []string{"default"}) {
			t.Fatalf("got %v, want default alone", n)
		}
		w.change(func(w *world) { w.svids[api] = ca.issue(t, leaf{id: api}) })
		c.silence("an SVID that exists but is not granted")
		w.change(func(w *world) { w.ids = append(w.ids, api) })
		if s := secretOf(t, c.one()); s.Name != api.String() {
			t.Errorf("got %s", s.Name)
		}
		w.setBundle(bundleOf(other, 1, newRoot(t, "other")))
		if s := secretOf(t, c.one()); s.Name != other.IDString() {
			t.Errorf("got %s", s.Name)
		}
		if c.ended() != nil {
			t.Error(c.ended())
		}
	})
}

func TestS14ABadSetIsNotSentAndTheGoodOneStays(t *testing.T) {
	with := func(change func(*SVID)) func(t *testing.T, ca *root) *SVID {
		return func(t *testing.T, ca *root) *SVID {
			s := ca.issue(t, leaf{id: web})
			change(s)
			return s
		}
	}
	within := func(from, until time.Duration) func(t *testing.T, ca *root) *SVID {
		return func(t *testing.T, ca *root) *SVID {
			return ca.issue(t, leaf{id: web, notBefore: time.Now().Add(from), notAfter: time.Now().Add(until)})
		}
	}
	for name, c := range map[string]struct {
		svid   func(*testing.T, *root) *SVID
		reason string
	}{
		"another key": {func(t *testing.T, ca *root) *SVID {
			return with(func(s *SVID) { s.PrivateKey = ca.issue(t, leaf{id: web}).PrivateKey })(t, ca)
		}, withheldKey},
		"garbage": {with(func(s *SVID) {
			s.CertificateChain = []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
		}), withheldKey},
		"empty":         {with(func(s *SVID) { s.CertificateChain, s.PrivateKey = nil, nil }), withheldKey},
		"expired":       {within(-2*time.Hour, -time.Hour), withheldValidity},
		"not yet valid": {within(time.Hour, 2*time.Hour), withheldValidity},
		"another root":  {func(t *testing.T, _ *root) *SVID { return newRoot(t, "stranger").issue(t, leaf{id: web}) }, withheldChain},
		"for somebody else": {func(t *testing.T, ca *root) *SVID {
			s := ca.issue(t, leaf{id: api})
			s.ID = web
			return s
		}, withheldIdentity},
		"without a digest": {with(func(s *SVID) { s.Digest = [32]byte{} }), withheldIdentity},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
				one, two := r.open(), r.open()
				for _, s := range []*client{one, two} {
					s.subscribe("default")
					s.ack(s.one(), "default")
				}
				bad := c.svid(t, ca)
				w.change(func(w *world) { w.svids[web] = bad })
				one.silence("a bad set")
				two.silence("a bad set")
				if n := r.metric(r.sds.metrics.withheld.WithLabelValues(c.reason)); n != 1 {
					t.Errorf("withheld for %s: %v, want 1 for both streams together; log:\n%s", c.reason, n, r.logs)
				}
				if !strings.Contains(r.logs.String(), web.String()) {
					t.Error("the log does not name whose certificate it is")
				}
				next := ca.issue(t, leaf{id: web})
				w.setSVID(next)
				if s := serialOf(t, one.one()); s != next.Serial {
					t.Errorf("serial %s, want the next good one", s)
				}
			})
		})
	}
}

func TestS14ALeafOfANewRootWaitsForItsBundle(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, a *root) {
		b := newRoot(t, "root B")
		c := r.open()
		c.subscribe("default")
		c.ack(c.one(), "default")
		next := b.issue(t, leaf{id: web})
		w.setSVID(next)
		c.silence("before the bundle has its root")
		w.setBundle(bundleOf(exampleTD, 2, a, b))
		if s := serialOf(t, c.one()); s != next.Serial {
			t.Errorf("serial %s", s)
		}
	})
}

// Whatever order the names are asked in, and whatever changes while it is sent.
func TestS14ARootIsSentBeforeTheLeafThatIsUnderIt(t *testing.T) {
	for _, all := range [][]string{{"default", "ROOTCA"}, {web.String(), "ALL"}, {"default", exampleTD.IDString(), web.String()}} {
		inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, before *root) {
			c := r.open()
			c.subscribe(all...)
			for _, resp := range c.take() {
				c.ack(resp, all...)
			}
			for i := range uint64(8) {
				next := newRoot(t, "next")
				w.change(func(w *world) {
					w.bundles[exampleTD] = bundleOf(exampleTD, 2+i, before, next)
					w.svids[web] = next.issue(t, leaf{id: web})
				})
				rootCame := false
				for _, resp := range c.take() {
					if s := secretOf(t, resp); s.GetTlsCertificate() == nil {
						rootCame = true
					} else if !rootCame {
						t.Fatalf("%v, change %d: %s came before the root above it", all, i, s.Name)
					}
					c.ack(resp, all...)
				}
				before = next
			}
		})
	}
}

// A bundle that comes between two sends of one round waits for the next round, and so do the leaves that need it.
func TestS14ARoundIsOfOneBundle(t *testing.T) {
	w, before := newWorld(t)
	next := newRoot(t, "next")
	round := &steady{View: &seen{world: w}}
	first, _ := round.Bundle(exampleTD)
	w.change(func(w *world) {
		w.bundles[exampleTD] = bundleOf(exampleTD, 2, before, next)
		w.svids[web] = next.issue(t, leaf{id: web})
	})
	if b, ok := round.Bundle(exampleTD); !ok || b.Sequence() != first.Sequence() {
		t.Fatalf("the bundle of the round changed from %d to %d", first.Sequence(), b.Sequence())
	}
	s, err := New(Config{Workloads: w})
	if err != nil {
		t.Fatal(err)
	}
	if sec, why, _ := s.secrets.resolve(round, parseTarget("default"), SPIFFE); sec != nil || why != absentWithheld {
		t.Fatalf("a leaf under a root that this round has not sent: %v, %q", sec, why)
	}
	if sec, _, _ := s.secrets.resolve(&steady{View: &seen{world: w}}, parseTarget("default"), SPIFFE); sec == nil {
		t.Fatal("the next round does not have it")
	}
}

func TestS14ALeafFromTheFutureIsSentWhenItsTimeComes(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		w.setSVID(ca.issue(t, leaf{id: web, notBefore: time.Now().Add(20 * time.Second), notAfter: time.Now().Add(time.Hour)}))
		c := r.open()
		c.subscribe("default")
		c.silence("before its time")
		time.Sleep(21 * time.Second)
		c.one()
		time.Sleep(2 * time.Hour)
		late := r.open()
		late.subscribe("default")
		late.silence("a leaf that has expired since it was checked")
	})
}

func TestS15TheOldestBundleTellsWhenEveryValidatorHasTheNewRoot(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, a *root) {
		old := w.bundles[exampleTD]
		fresh := bundleOf(exampleTD, 2, a, newRoot(t, "root B"))
		want := func(what string, digest trust.Digest, subscribed bool) {
			t.Helper()
			synctest.Wait()
			if d, ok := r.sds.OldestBundle(exampleTD); d.Digest != digest || ok != subscribed {
				t.Errorf("%s: oldest %s %v, want %s %v", what, d, ok, digest, subscribed)
			}
		}
		want("no stream", trust.Digest{}, false)
		svidOnly := r.open()
		svidOnly.subscribe("default")
		want("no stream with a bundle", trust.Digest{}, false)

		one, two := r.open(), r.open()
		bell := r.sds.AcksChanged()
		one.subscribe("ROOTCA")
		want("nothing acknowledged", trust.Digest{}, true)
		if !rung(bell) {
			t.Error("no bell for a new subscriber")
		}
		one.ack(one.one(), "ROOTCA")
		want("one has it", old.Digest(), true)
		two.subscribe(exampleTD.IDString())
		want("a second has nothing yet", trust.Digest{}, true)
		two.ack(two.one(), exampleTD.IDString())
		want("both have it", old.Digest(), true)

		w.setBundle(fresh)
		n1, n2 := one.one(), two.one()
		one.ack(n1, "ROOTCA")
		want("one has the new one", old.Digest(), true)
		bell = r.sds.AcksChanged()
		two.nack(n2, "", "no", exampleTD.IDString())
		want("the other rejects it", old.Digest(), true)
		if rung(bell) {
			t.Error("bell without a change")
		}
		two.cancel()
		want("the other's stream has ended, and it may be back with what it has", old.Digest(), true)
		time.Sleep(ReturnTime - time.Second)
		want("for so long", old.Digest(), true)
		if rung(bell) {
			t.Error("bell without a change")
		}
		time.Sleep(time.Second)
		want("the other is gone", fresh.Digest(), true)
		if !rung(bell) {
			t.Error("no bell")
		}
		one.subscribe()
		want("unsubscribed", trust.Digest{}, false)
	})
}

func TestS15AnAbortedRotationLeavesNobodyBehind(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, a *root) {
		one, two := r.open(), r.open()
		one.subscribe("ROOTCA")
		one.ack(one.one(), "ROOTCA")
		two.subscribe("ROOTCA")
		two.ack(two.one(), "ROOTCA")
		aborted := bundleOf(exampleTD, 2, a, newRoot(t, "root B"))
		w.setBundle(aborted)
		one.ack(one.one(), "ROOTCA")
		two.take() // never answered: it still believes the first
		w.setBundle(bundleOf(exampleTD, 3, a))
		one.take() // not answered yet: it believes what was aborted
		two.take()
		synctest.Wait()
		if d, _ := r.sds.OldestBundle(exampleTD); d.Digest != aborted.Digest() {
			t.Errorf("oldest %s, want the aborted one %s: the first is current again", d, aborted.Digest())
		}
	})
}

func TestS16RootsGoOutAsTrustDomainsOfTheSPIFFEValidator(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, a *root) {
		w.bundles[exampleTD] = bundleOf(exampleTD, 1, newRoot(t, "root B"), a, a)
		c := r.open()
		c.subscribe("ROOTCA", exampleTD.IDString())
		for _, resp := range c.take() {
			v := secretOf(t, resp).GetValidationContext()
			if v.GetTrustedCa() != nil {
				t.Error("trusted_ca beside the SPIFFE validator")
			}
			custom := v.GetCustomValidatorConfig()
			if custom.GetName() != "envoy.tls.cert_validator.spiffe" {
				t.Fatalf("validator %q", custom.GetName())
			}
			config := new(tlsv3.SPIFFECertValidatorConfig)
			if err := custom.GetTypedConfig().UnmarshalTo(config); err != nil {
				t.Fatal(err)
			}
			if len(config.TrustDomains) != 1 || config.TrustBundles != nil {
				t.Fatalf("%d trust domains, want own one", len(config.TrustDomains))
			}
			if td := config.TrustDomains[0]; td.Name != "example.org" || rootsIn(td.GetTrustBundle().GetInlineBytes()) != 2 {
				t.Errorf("trust domain %q with %d roots, want example.org with 2", td.Name, rootsIn(td.GetTrustBundle().GetInlineBytes()))
			}
		}
	})
}

func TestS16AllHasEachTrustDomainOnceAndApart(t *testing.T) {
	other, last := spiffeid.RequireTrustDomainFromString("a.test"), spiffeid.RequireTrustDomainFromString("z.test")
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, a *root) {
		foreign := newRoot(t, "other")
		c := r.open()
		c.subscribe("ALL")
		domains := func(what string, want ...string) *discoveryv3.DiscoveryResponse {
			t.Helper()
			resp := c.one()
			config := new(tlsv3.SPIFFECertValidatorConfig)
			v := secretOf(t, resp).GetValidationContext()
			if err := v.GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(config); err != nil || v.GetTrustedCa() != nil {
				t.Fatal(err, v.GetTrustedCa())
			}
			var got []string
			for _, td := range config.TrustDomains {
				got = append(got, td.Name)
				if rootsIn(td.GetTrustBundle().GetInlineBytes()) != 1 {
					t.Errorf("%s: roots are pooled", what)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s: got %v, want %v", what, got, want)
			}
			return resp
		}
		c.ack(domains("its own", "example.org"), "ALL")
		w.change(func(w *world) { w.bundles[last], w.bundles[other] = bundleOf(last, 1, newRoot(t, "z")), trust.Bundle{} })
		c.ack(domains("another, and one that is not there yet", "example.org", "z.test"), "ALL")
		w.setBundle(bundleOf(other, 1, foreign))
		grown := domains("a third", "a.test", "example.org", "z.test")
		synctest.Wait()
		if d, ok := r.sds.OldestBundle(other); !ok || d != (trust.Version{}) {
			t.Errorf("not acknowledged yet: %s %v", d, ok)
		}
		c.ack(grown, "ALL")
		synctest.Wait()
		for _, td := range []spiffeid.TrustDomain{other, exampleTD, last} {
			if d, ok := r.sds.OldestBundle(td); !ok || d.Digest != w.bundles[td].Digest() {
				t.Errorf("%s is believed as %s %v", td, d, ok)
			}
		}
		c.silence("nothing new")
		w.change(func(w *world) { delete(w.bundles, other) })
		domains("one less", "example.org", "z.test")
		if _, ok := r.sds.OldestBundle(other); ok {
			t.Error("what the caller may not see any more still counts as believed")
		}
		w.change(func(w *world) { delete(w.bundles, exampleTD) })
		c.silence("never the others without its own")
	})
}

func TestS16AllIsNeverPlainTrustedCA(t *testing.T) {
	inBubble(t, Config{Validator: TrustedCA}, func(t *testing.T, r *rig, w *world, _ *root) {
		friend := spiffeid.RequireTrustDomainFromString("friend.test")
		w.bundles[friend] = bundleOf(friend, 1, newRoot(t, "friend"))
		c := r.open()
		c.subscribe("ALL", "ROOTCA", friend.IDString())
		if n := names(c.take()); !slices.Equal(n, []string{"ROOTCA", friend.IDString()}) {
			t.Errorf("got %v", n)
		}
		if n := r.metric(r.sds.metrics.unanswered.WithLabelValues(string(absentPooled))); n != 1 {
			t.Errorf("counted %v times", n)
		}
	})
}

func TestNamesThatComeAndGoDoNotFillTheLog(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, _ *world, _ *root) {
		c, d := r.open(), r.delta()
		for i := range 1000 {
			c.subscribe(fmt.Sprint("unknown ", i))
			d.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{fmt.Sprint(i)}, ResourceNamesUnsubscribe: []string{fmt.Sprint(i - 1)}})
		}
		synctest.Wait()
		if n := strings.Count(r.logs.String(), `"INFO"`); n > 2*64 || n == 0 {
			t.Errorf("%d lines for two streams", n)
		}
		if n := r.metric(r.sds.metrics.unanswered.WithLabelValues(string(absentUnknown))); n != 2000 {
			t.Errorf("%v names counted, want each", n)
		}
	})
}

func TestS10IstiosFileNamesAreSilentAndCounted(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		c, d := r.open(), r.delta()
		c.subscribe("file-root:/etc/certs/root-cert.pem", "default", "file-cert:/etc/certs/cert.pem~/etc/certs/key.pem")
		d.subscribe("file-root:system", "default")
		c.one()
		d.one()
		for range 3 {
			w.setSVID(ca.issue(t, leaf{id: web}))
			c.one()
			d.one()
		}
		if n := r.metric(r.sds.metrics.unanswered.WithLabelValues(string(absentFile))); n != 3 {
			t.Errorf("counted %v times, want once for each name", n)
		}
		if c.ended() != nil || d.ended() != nil {
			t.Error(c.ended(), d.ended())
		}
	})
}

func TestS16PlainTrustedCAIsChosenOncePerStream(t *testing.T) {
	metadata := func(v any) *structpb.Struct {
		return must(structpb.NewStruct(map[string]any{"disable_spiffe_cert_validation": v}))
	}
	for _, c := range []struct {
		byDefault Validator
		metadata  *structpb.Struct
		plain     bool
	}{
		{SPIFFE, nil, false},
		{TrustedCA, nil, true},
		{SPIFFE, metadata(true), true},
		{SPIFFE, metadata("true"), true},
		{SPIFFE, metadata("TRUE"), true},
		{SPIFFE, metadata("yes"), false},
		{SPIFFE, metadata(1), false},
		{SPIFFE, metadata(nil), false},
		{TrustedCA, metadata(false), false},
		{TrustedCA, metadata("false"), false},
		{TrustedCA, metadata("yes"), true},
	} {
		t.Run(fmt.Sprintf("%s %v", c.byDefault, c.metadata), func(t *testing.T) {
			inBubble(t, Config{Validator: c.byDefault}, func(t *testing.T, r *rig, w *world, a *root) {
				s := r.open()
				s.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"ROOTCA"}, Node: &corev3.Node{Metadata: c.metadata}})
				plain := func() bool {
					v := secretOf(t, s.one()).GetValidationContext()
					if (v.GetTrustedCa() == nil) == (v.GetCustomValidatorConfig() == nil) {
						t.Fatal("not exactly one form")
					}
					return v.GetTrustedCa() != nil
				}
				if plain() != c.plain {
					t.Errorf("plain: %v, want %v", !c.plain, c.plain)
				}
				// Later requests carry no node, or another one: neither flips the form.
				s.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"ROOTCA"}, Node: &corev3.Node{Metadata: metadata(!c.plain)}})
				if plain() != c.plain {
					t.Error("the form flipped on a later request")
				}
				w.setBundle(bundleOf(exampleTD, 2, a, newRoot(t, "root B")))
				if plain() != c.plain {
					t.Error("the form flipped on a push")
				}
			})
		})
	}
}

func TestS17AllStreamsOfAnIdentityShareOneCheckAndOneRendering(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, _ *root) {
		var checks atomic.Int64
		check := r.sds.secrets.check
		r.sds.secrets.check = func(s *SVID, b trust.Bundle, now time.Time) verdict { checks.Add(1); return check(s, b, now) }
		cc := r.connect()
		var streams []*client
		for range 100 {
			c := r.openOn(cc)
			c.subscribe("default")
			streams = append(streams, c)
		}
		serials := map[string]bool{}
		for _, c := range streams {
			serials[serialOf(t, c.one())] = true
		}
		if len(serials) != 1 || checks.Load() != 1 {
			t.Errorf("%d certificates and %d checks for 100 streams, want 1 and 1", len(serials), checks.Load())
		}
		view := must(w.Attest(t.Context(), nil))
		defer view.Close()
		one, _, _ := r.sds.secrets.resolve(view, parseTarget("default"), SPIFFE)
		two, _, _ := r.sds.secrets.resolve(view, parseTarget("default"), SPIFFE)
		if one == nil || one != two {
			t.Error("two streams have renderings of their own")
		}
	})
}

func TestS18ShutdownLetsGracefulStopReturn(t *testing.T) {
	inBubble(t, Config{ShutdownSpread: time.Second}, func(t *testing.T, r *rig, _ *world, _ *root) {
		var streams []*client
		for range 50 {
			c := r.open()
			c.subscribe("default")
			c.ack(c.one(), "default")
			streams = append(streams, c)
		}
		idle := r.open() // a stream without a request yet
		synctest.Wait()
		started := time.Now()
		r.sds.Shutdown()
		r.sds.Shutdown() // twice is once
		r.grpc.GracefulStop()
		if took := time.Since(started); took > time.Second || took < 500*time.Millisecond {
			t.Errorf("51 streams ended after %s, want them spread over one second", took)
		}
		for _, c := range append(streams, idle) {
			c.wantEnd(codes.Unavailable)
		}
		if n := r.metric(r.sds.metrics.streams.WithLabelValues(protocolSotW)); n != 0 {
			t.Errorf("%v streams counted after the end", n)
		}
		if n := r.metric(r.sds.metrics.ended.WithLabelValues(endStopping)); n != 51 {
			t.Errorf("%v streams counted as ended, want 51", n)
		}
	})
}

func TestS18AStreamOpenedWhileStoppingIsUnavailable(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, _ *world, _ *root) {
		r.sds.Shutdown()
		c := r.open()
		c.wantEnd(codes.Unavailable)
	})
}

func TestS19PingsEveryThirtySecondsAreWelcome(t *testing.T) {
	for _, streams := range []int{0, 1} {
		for every, welcome := range map[time.Duration]bool{30 * time.Second: true, 10 * time.Second: false} {
			t.Run(fmt.Sprintf("%s with %d streams", every, streams), func(t *testing.T) {
				inBubble(t, Config{}, func(t *testing.T, r *rig, _ *world, _ *root) {
					cc := r.connect(grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: every, Timeout: 5 * time.Second, PermitWithoutStream: true}))
					var c *client
					if streams == 1 {
						c = r.openOn(cc)
						c.subscribe("default")
						c.one()
					} else {
						cc.Connect()
					}
					time.Sleep(5 * time.Minute)
					synctest.Wait()
					if ready := cc.GetState() == connectivity.Ready; ready != welcome {
						t.Errorf("after five minutes the connection is %s", cc.GetState())
					}
					if c != nil && (c.ended() == nil) != welcome {
						t.Errorf("stream: %v", c.ended())
					}
				})
			})
		}
	}
}

func TestS20NoWorkloadAPIHeaderIsAskedFor(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, _ *world, _ *root) {
		c := r.open() // sends no workload.spiffe.io metadata, as Envoy doesn't
		c.subscribe("default")
		c.one()
	})
}

func TestS21KeysAreInNoLogAndNoError(t *testing.T) {
	var keys []string
	keep := func(s *SVID) *SVID {
		for _, line := range strings.Split(string(s.PrivateKey), "\n") {
			if len(line) > 30 && !strings.Contains(line, "PRIVATE KEY") {
				keys = append(keys, line)
			}
		}
		return s
	}
	inBubble(t, Config{Limits: Limits{NameLength: 4096}}, func(t *testing.T, r *rig, w *world, ca *root) {
		first := keep(w.svids[web])
		c := r.open()
		c.send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA", string(first.PrivateKey)}, Node: &corev3.Node{Id: string(first.PrivateKey)}})
		for _, resp := range c.take() {
			c.ack(resp, "default", "ROOTCA")
		}
		w.setSVID(keep(ca.issue(t, leaf{id: web})))
		resp := c.one()
		key := secretOf(t, resp).GetTlsCertificate().GetPrivateKey().GetInlineBytes()
		c.nack(resp, "", "bad key: "+string(key), "default", "ROOTCA") // a peer that sends the key back to us
		synctest.Wait()
		swapped := keep(ca.issue(t, leaf{id: web}))
		swapped.PrivateKey = keep(ca.issue(t, leaf{id: web})).PrivateKey
		w.setSVID(swapped)
		c.silence("a wrong key")
		broken := keep(ca.issue(t, leaf{id: web}))
		broken.PrivateKey = append([]byte("junk "), broken.PrivateKey[40:]...)
		w.setSVID(broken)
		c.silence("a broken key")
		w.change(func(w *world) {
			w.err = fmt.Errorf("gone: %v %+v %#v %s %q %d %x", broken, broken, broken, broken, broken, broken, broken)
		})
		c.wantEnd(codes.Unavailable)
		told := r.logs.String() + c.ended().Error()

		view := must(w.Attest(t.Context(), nil))
		defer view.Close()
		w.svids[web] = keep(ca.issue(t, leaf{id: web}))
		sec, _, _ := r.sds.secrets.resolve(view, parseTarget("default"), SPIFFE)
		r.sds.log.Info("dump", "svid", w.svids[web], "secret", sec.content)
		told += r.logs.String()
		if len(keys) < 8 {
			t.Fatalf("only %d lines of keys to look for", len(keys))
		}
		if !strings.Contains(told, "rejected") || !strings.Contains(told, withheldKey) || !strings.Contains(told, "secret sent") {
			t.Fatalf("the log does not have what this test is about:\n%s", told)
		}
		for _, k := range keys {
			for n := 0; n+32 <= len(k); n += 8 {
				if strings.Contains(told, k[n:n+32]) {
					t.Fatalf("key material in the log:\n%s", told)
				}
			}
		}
	})
}

func TestACallerWithoutAnIdentityIsTold(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, _ *root) {
		w.refuse = errNoIdentity
		c := r.open()
		c.wantEnd(codes.PermissionDenied)
		if !strings.Contains(c.ended().Error(), "no identity is registered") {
			t.Errorf("the sentence is lost: %v", c.ended())
		}
		w.change(func(w *world) { w.refuse = errors.New("read /proc/4711: secret detail") })
		c = r.open()
		c.wantEnd(codes.Unavailable)
		if strings.Contains(c.ended().Error(), "4711") {
			t.Errorf("inner reason goes out: %v", c.ended())
		}
		w.change(func(w *world) { w.refuse = context.Canceled })
		c = r.open()
		c.wantEnd(codes.Unavailable) // never Canceled: clients would stop for ever
	})
}

func TestALostIdentityEndsTheStreamAndClosesTheView(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, _ *root) {
		c := r.open()
		c.subscribe("default")
		c.one()
		w.change(func(w *world) { w.err = errNoIdentity })
		c.wantEnd(codes.PermissionDenied)
		if n := r.metric(r.sds.metrics.ended.WithLabelValues(endIdentity)); n != 1 {
			t.Errorf("%v streams counted", n)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.open != 0 {
			t.Errorf("%d views are still open", w.open)
		}
	})
}

func TestTheDefaultFollowsTheFirstIdentity(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		w.svids[api] = ca.issue(t, leaf{id: api})
		w.change(func(w *world) { w.ids = nil })
		c := r.open()
		c.subscribe("default")
		c.silence("no identity yet")
		w.change(func(w *world) { w.ids = []spiffeid.ID{web, api} })
		if s := serialOf(t, c.one()); s != w.svids[web].Serial {
			t.Error("not the first")
		}
		w.change(func(w *world) { w.ids = []spiffeid.ID{api, web} })
		if s := serialOf(t, c.one()); s != w.svids[api].Serial {
			t.Error("not the new first")
		}
	})
}

func TestLimits(t *testing.T) {
	many := make([]string, 65)
	for i := range many {
		many[i] = fmt.Sprint("name", i)
	}
	inBubble(t, Config{Limits: Limits{StreamsPerCaller: 3}}, func(t *testing.T, r *rig, _ *world, _ *root) {
		for what, n := range map[string][]string{"too many names": many, "too long a name": {strings.Repeat("n", 2049)}} {
			c := r.open()
			c.subscribe(n...)
			c.wantEnd(codes.InvalidArgument)
			if len(c.ended().Error()) > 300 {
				t.Errorf("%s: an error of %d bytes", what, len(c.ended().Error()))
			}
		}
		c := r.open()
		c.send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{strings.Repeat("n", MaxRequest)}})
		c.wantEnd(codes.ResourceExhausted)

		cc := r.connect()
		for range 3 {
			c := r.openOn(cc)
			c.subscribe("default")
			c.one()
		}
		fourth := r.openOn(cc)
		fourth.wantEnd(codes.ResourceExhausted)
		elsewhere := r.open()
		elsewhere.subscribe("default")
		elsewhere.one()
	})
	if encoding.GetCompressor("gzip") != nil {
		t.Error("a compressor is registered: compressed requests would be unpacked")
	}
}

func TestASlowReaderDelaysNobodyAndGetsTheNewestWhenItReads(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		slow := must(secretv3.NewSecretDiscoveryServiceClient(r.connect(grpc.WithStaticStreamWindowSize(64 << 10))).StreamSecrets(ctx))
		if err := slow.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}}); err != nil {
			t.Fatal(err)
		}
		quick := r.open()
		quick.subscribe("default")
		quick.one()
		const changes = 500 // many times the window
		var last *SVID
		for range changes {
			last = ca.issue(t, leaf{id: web})
			w.setSVID(last)
			if s := serialOf(t, quick.one()); s != last.Serial {
				t.Fatalf("serial %s, want %s", s, last.Serial)
			}
		}
		got := 0
		for {
			resp, err := slow.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if got++; serialOf(t, resp) == last.Serial {
				break
			}
		}
		if got >= changes {
			t.Errorf("the slow reader was sent %d of %d: a queue was kept for it", got, changes)
		}
	})
}

func TestAServerWithoutConnCredentialsServesNobody(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		w, _ := newWorld(t)
		lis := bufconn.Listen(64 << 10)
		s := must(New(Config{Workloads: w}))
		g := grpc.NewServer(ServerOptions()...)
		secretv3.RegisterSecretDiscoveryServiceServer(g, s)
		go func() { _ = g.Serve(lis) }()
		defer g.Stop()
		r := &rig{t: t, dial: lis.Dial}
		c := r.open()
		c.wantEnd(codes.Internal)
	})
}

func TestConfigIsChecked(t *testing.T) {
	w, _ := newWorld(t)
	for _, c := range []Config{{}, {Workloads: w, Validator: "none"}, {Workloads: w, Limits: Limits{NamesPerStream: -1}}} {
		if _, err := New(c); err == nil {
			t.Errorf("%+v was accepted", c)
		}
	}
}

func TestRejectionsOfManyProcessesAreBounded(t *testing.T) {
	c := callers{limit: 2}
	for pid := range int32(3 * maxGoneCallers) {
		k := callerKey{pid: pid, uid: 1}
		if !c.enter(k) {
			t.Fatal("refused")
		}
		for i := range 2 * maxRejections {
			c.reject(k, digestOf(fmt.Sprint(i)))
		}
		if n := len(c.by[k].rejected); n != maxRejections {
			t.Fatalf("%d rejections kept", n)
		}
		c.leave(k)
	}
	if len(c.by) != maxGoneCallers || len(c.gone) != maxGoneCallers {
		t.Errorf("%d processes kept, want %d", len(c.by), maxGoneCallers)
	}
	k := callerKey{pid: 3*maxGoneCallers - 1, uid: 1}
	if !c.enter(k) || !c.hasRejected(k, digestOf(fmt.Sprint(2*maxRejections-1))) || c.hasRejected(k, digestOf("0")) {
		t.Error("the newest are not what was kept")
	}
}

func rung(bell <-chan struct{}) bool {
	select {
	case <-bell:
		return true
	default:
		return false
	}
}

// eventually is for tests outside of bubbles, where the kernel is part of it.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}
