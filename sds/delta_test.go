package sds

import (
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"

	"github.com/signet-ca/signet/trust"
)

// The rows of the contract with Envoy where delta has words of its own. What both share is tested over StreamSecrets.

// increments is one delta stream as Envoy would have it.
type increments struct {
	*talk[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]
}

func (r *rig) delta() *increments {
	r.t.Helper()
	return &increments{begin(r, secretv3.NewSecretDiscoveryServiceClient(r.connect()).DeltaSecrets)}
}

func (c *increments) subscribe(names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: secretType, ResourceNamesSubscribe: names, Node: &corev3.Node{Id: "sidecar"}})
}

// resume is the first request after a reconnect.
func (c *increments) resume(had map[string]string, names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: secretType, ResourceNamesSubscribe: names, InitialResourceVersions: had, Node: &corev3.Node{Id: "sidecar"},
	})
}

func (c *increments) unsubscribe(names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: secretType, ResourceNamesUnsubscribe: names})
}

func (c *increments) ack(r *discoveryv3.DeltaDiscoveryResponse) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: secretType, ResponseNonce: r.Nonce})
}

func (c *increments) nack(r *discoveryv3.DeltaDiscoveryResponse, reason string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: secretType, ResponseNonce: r.Nonce, ErrorDetail: &rpcstatus.Status{Code: 13, Message: reason}})
}

// updated are the names in responses, in order.
func updated(rs []*discoveryv3.DeltaDiscoveryResponse) []string {
	var out []string
	for _, r := range rs {
		for _, res := range r.Resources {
			out = append(out, res.Name)
		}
	}
	return out
}

// only returns the single secret in a response that removes nothing.
func only(t fataler, r *discoveryv3.DeltaDiscoveryResponse) *tlsv3.Secret {
	t.Helper()
	if len(r.Resources) != 1 || len(r.RemovedResources) != 0 {
		t.Fatalf("%d resources and %d removals in a response, want one resource", len(r.Resources), len(r.RemovedResources))
	}
	s := unpack(r.Resources[0].Resource)
	if s.GetName() != r.Resources[0].Name {
		t.Fatalf("resource %q has the secret %q in it", r.Resources[0].Name, s.GetName())
	}
	return s
}

func version(r *discoveryv3.DeltaDiscoveryResponse) string { return r.Resources[0].Version }

func TestS03DeltaResourcesHaveTypeFreshNonceAndAVersionOfTheirContent(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, _ *root) {
		var versions []string
		nonces := map[string]bool{}
		for _, r := range []*rig{r, inMemory(t, Config{Workloads: w})} { // the second as after a restart
			c := r.delta()
			c.subscribe("default", "ROOTCA")
			for _, resp := range c.take() {
				only(t, resp)
				if resp.TypeUrl != secretType || resp.Nonce == "" || nonces[resp.Nonce] || version(resp) == "" {
					t.Errorf("type %q nonce %q version %q", resp.TypeUrl, resp.Nonce, version(resp))
				}
				nonces[resp.Nonce] = true
				versions = append(versions, version(resp))
			}
		}
		if len(versions) != 4 || versions[0] != versions[2] || versions[1] != versions[3] || versions[0] == versions[1] {
			t.Errorf("versions over a restart: %q, want the same two", versions)
		}
	})
}

func TestS04ADeltaNackIsErrorDetailAndTheSameContentIsNotSentAgain(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		c := r.delta()
		c.subscribe("default")
		c.ack(c.one())
		w.setSVID(ca.issue(t, leaf{id: web}))
		bad := c.one()
		c.nack(bad, "KEY_VALUES_MISMATCH")
		c.silence("after the NACK")
		w.change(func(*world) {})
		c.silence("at a change of something else")
		c.subscribe("default")
		c.silence("when asked again for what it rejected")
		c.unsubscribe("default")
		c.subscribe("default")
		c.silence("when unsubscribed and subscribed again")
		w.setSVID(ca.issue(t, leaf{id: web}))
		c.ack(c.one())
		c.silence("after the ACK")
		if n, a := r.metric(r.sds.metrics.nacks.WithLabelValues(kindSVID)), r.metric(r.sds.metrics.acks.WithLabelValues(kindSVID)); n != 1 || a != 2 {
			t.Errorf("%v NACKs and %v ACKs counted, want 1 and 2", n, a)
		}
	})
}

func TestS07NoNamesAndTheStarAreNothingInDelta(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		for _, names := range [][]string{nil, {"*"}, {""}} {
			c := r.delta()
			c.subscribe(names...)
			c.silence("first request")
			w.setSVID(ca.issue(t, leaf{id: web}))
			c.silence("a change")
			c.subscribe("default")
			c.ack(c.one())
			c.unsubscribe("default")
			c.silence("unsubscribing from all")
			w.setSVID(ca.issue(t, leaf{id: web}))
			c.silence("a change after unsubscribing from all")
			if c.ended() != nil {
				t.Error(c.ended())
			}
		}
	})
}

func TestS08ADeltaPushHasOnlyWhatChanged(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		c := r.delta()
		c.subscribe("default", "ROOTCA", "default")
		got := c.take()
		if n := updated(got); !slices.Equal(n, []string{"ROOTCA", "default"}) {
			t.Fatalf("got %v", n)
		}
		renewed := ca.issue(t, leaf{id: web})
		w.setSVID(renewed)
		if s := serialIn(t, only(t, c.one())); s != renewed.Serial {
			t.Errorf("serial %s", s)
		}
		w.change(func(*world) {})
		c.silence("a ring without a change")
		if n := r.metric(r.sds.metrics.streams.WithLabelValues(protocolDelta)); n != 1 {
			t.Errorf("%v delta streams counted", n)
		}
	})
}

func TestS11EverySubscribeIsAnsweredThoughBelievedCurrent(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, _ *world, _ *root) {
		c := r.delta()
		c.subscribe("default", "ROOTCA")
		for _, resp := range c.take() {
			c.ack(resp)
		}
		c.silence("after ACKs")
		c.subscribe("default")
		if n := updated(c.take()); !slices.Equal(n, []string{"default"}) {
			t.Errorf("got %v, want what was asked for once more", n)
		}
		// Versions count in the first request only.
		c.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA"}, InitialResourceVersions: map[string]string{"ROOTCA": "x"}})
		if n := updated(c.take()); !slices.Equal(n, []string{"ROOTCA"}) {
			t.Errorf("got %v", n)
		}
	})
}

func TestS11InitialVersionsThatMatchAreNotSentAndCountAsAcknowledged(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		c := r.delta()
		c.subscribe("default", "ROOTCA")
		had := map[string]string{"of somebody else": "1"}
		for _, resp := range c.take() {
			had[only(t, resp).Name] = version(resp)
			c.ack(resp)
		}
		synctest.Wait()
		c.cancel()
		synctest.Wait()
		if n := len(r.sds.Streams()); n != 0 {
			t.Fatal("the stream is still there")
		}

		again := r.delta()
		again.resume(had, "default", "ROOTCA")
		again.silence("both are current")
		if d, ok := r.sds.OldestBundle(exampleTD); !ok || d != w.bundles[exampleTD].Version() {
			t.Errorf("believed: %s %v, want the bundle that it has", d, ok)
		}
		w.change(func(*world) {})
		again.silence("a ring without a change")
		renewed := ca.issue(t, leaf{id: web})
		w.setSVID(renewed)
		if s := serialIn(t, only(t, again.one())); s != renewed.Serial {
			t.Errorf("serial %s", s)
		}
		again.cancel()

		late := r.delta() // what it has is older by now
		late.resume(had, "default", "ROOTCA")
		if n := updated(late.take()); !slices.Equal(n, []string{"default"}) {
			t.Errorf("got %v, want the one that changed", n)
		}
	})
}

func TestS11AClaimIsComparedWithWhatComesLater(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		c := r.delta()
		c.subscribe("default")
		had := map[string]string{"default": version(c.one())}
		old := w.svids[web]
		w.change(func(w *world) { w.svids[web] = nil }) // as after a restart of the agent
		c.cancel()
		for _, next := range []*SVID{old, ca.issue(t, leaf{id: web})} {
			again := r.delta()
			again.resume(had, "default")
			again.silence("not there yet")
			w.setSVID(next)
			if got := again.take(); len(got) == 1 != (next != old) {
				t.Errorf("%d responses; the same as before: %v", len(got), next == old)
			}
			again.cancel()
			w.change(func(w *world) { w.svids[web] = nil })
		}
	})
}

func TestS11AClaimToHaveWhatWasRejectedIsNotBelieved(t *testing.T) {
	w, _ := newWorld(t)
	r := onSocket(t, Config{Workloads: w}, filepath.Join(t.TempDir(), "s"))
	c := r.delta()
	c.subscribe("ROOTCA")
	bad := c.next()
	c.nack(bad, "invalid root")
	eventually(t, "the NACK is counted", func() bool { return r.metric(r.sds.metrics.nacks.WithLabelValues(kindBundle)) == 1 })
	again := r.delta() // Envoy acknowledges a repeated bad secret, and then says to have its version
	again.resume(map[string]string{"ROOTCA": version(bad)}, "ROOTCA")
	eventually(t, "the claim is heard", func() bool {
		all := r.sds.Streams()
		return len(all) == 2 && len(all[1].Names) == 1 && all[1].Names[0].Rejected != ""
	})
	if d, ok := r.sds.OldestBundle(exampleTD); !ok || d != (trust.Version{}) {
		t.Errorf("believed: %s %v, want nothing acknowledged", d, ok)
	}
}

func TestS12AStaleNonceVoidsNoSubscription(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		c := r.delta()
		c.subscribe("default")
		first := c.one()
		w.setSVID(ca.issue(t, leaf{id: web}))
		c.one() // on its way when the next request leaves
		for _, nonce := range []string{first.Nonce, "", "never-sent"} {
			c.send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: nonce, ResourceNamesSubscribe: []string{"ROOTCA"}})
			if n := updated(c.take()); !slices.Equal(n, []string{"ROOTCA"}) {
				t.Fatalf("nonce %q: got %v, want the added name", nonce, n)
			}
			c.send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: nonce, ResourceNamesUnsubscribe: []string{"ROOTCA"}})
			c.silence("an unsubscribe needs no answer")
		}
		w.setBundle(bundleOf(exampleTD, 2, ca, newRoot(t, "root B")))
		c.silence("a change of what was dropped")
	})
}

func TestS12PhantomUnsubscribesAreIgnored(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		c := r.delta()
		c.unsubscribe("default", "never asked for")
		c.silence("as the first request")
		c.subscribe("default")
		c.ack(c.one())
		c.unsubscribe("ROOTCA", "never asked for", "*")
		c.silence("a phantom unsubscribe")
		w.setSVID(ca.issue(t, leaf{id: web}))
		c.one()
		c.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"default"}, ResourceNamesSubscribe: []string{"default"}})
		if n := updated(c.take()); !slices.Equal(n, []string{"default"}) {
			t.Errorf("dropped and asked for at once: got %v", n)
		}
	})
}

func TestS13WhatIsPendingIsNeverRemoved(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		w.change(func(w *world) { w.svids[web] = nil })
		c := r.delta()
		c.subscribe("default", web.String(), api.String(), "unknown", "spiffe://other.test", "file-cert:/etc/cert.pem")
		c.silence("nothing issued, granted or known")
		w.setSVID(ca.issue(t, leaf{id: web}))
		for _, resp := range c.take() {
			only(t, resp)
			c.ack(resp)
		}
		w.change(func(w *world) { w.svids[web] = nil })
		c.silence("granted, and gone for now: expired, or the agent restarts")
		w.setSVID(ca.issue(t, leaf{id: web, notBefore: time.Now().Add(-2 * time.Hour), notAfter: time.Now().Add(-time.Hour)}))
		c.silence("withheld")
		if n := r.metric(r.sds.metrics.removals); n != 0 {
			t.Errorf("%v removals", n)
		}
	})
}

func TestS13WhatIsNoLongerGrantedIsRemovedOnceAndSentAnewWhenGrantedAgain(t *testing.T) {
	other := spiffeid.RequireTrustDomainFromString("other.test")
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		w.change(func(w *world) {
			w.ids, w.svids[api] = []spiffeid.ID{web, api}, ca.issue(t, leaf{id: api})
			w.bundles[other] = bundleOf(other, 1, newRoot(t, "other"))
		})
		c, plain := r.delta(), r.open()
		names := []string{"default", api.String(), other.IDString()}
		gone := []string{other.IDString(), api.String()}
		c.subscribe(names...)
		had := map[string]string{}
		for _, resp := range c.take() {
			had[only(t, resp).Name] = version(resp)
			c.ack(resp)
		}
		plain.subscribe(names...)
		plain.take()
		theirs := w.bundles[other]
		revoke := func(w *world) {
			w.ids = []spiffeid.ID{web}
			delete(w.bundles, other)
		}
		w.change(revoke)
		var removed []string
		for _, resp := range c.take() {
			if len(resp.Resources) != 0 || resp.Nonce == "" || resp.TypeUrl != secretType {
				t.Errorf("removal with nonce %q, type %q and %d resources", resp.Nonce, resp.TypeUrl, len(resp.Resources))
			}
			removed = append(removed, resp.RemovedResources...)
			c.ack(resp)
		}
		if !slices.Equal(removed, gone) {
			t.Errorf("removed %v, want %v", removed, gone)
		}
		w.change(func(*world) {})
		c.silence("removed already")
		plain.silence("state of the world has no word for it")
		if _, ok := r.sds.OldestBundle(other); ok {
			t.Error("its bundle still counts as believed")
		}

		back := r.delta() // it was away when that happened
		back.resume(had, names...)
		removed = nil
		for _, resp := range back.take() {
			removed = append(removed, resp.RemovedResources...)
		}
		if !slices.Equal(removed, gone) {
			t.Errorf("removed after a reconnect: %v, want %v", removed, gone)
		}

		w.change(func(w *world) { w.ids, w.bundles[other] = []spiffeid.ID{web, api}, theirs })
		for what, got := range map[string][]string{"delta": updated(c.take()), "reconnected": updated(back.take())} {
			if !slices.Equal(got, gone) {
				t.Errorf("%s, granted again: got %v, want %v", what, got, gone)
			}
		}
		if n := r.metric(r.sds.metrics.removals); n != 4 {
			t.Errorf("%v removals counted, want 4", n)
		}
	})
}

func TestS18ShutdownEndsDeltaStreams(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, _ *world, _ *root) {
		c := r.delta()
		c.subscribe("default")
		c.ack(c.one())
		r.sds.Shutdown()
		r.grpc.GracefulStop()
		c.wantEnd(codes.Unavailable)
		if n := r.metric(r.sds.metrics.streams.WithLabelValues(protocolDelta)); n != 0 {
			t.Errorf("%v streams counted after the end", n)
		}
	})
}

func TestDeltaNamesAreBounded(t *testing.T) {
	inBubble(t, Config{Limits: Limits{NamesPerStream: 3}}, func(t *testing.T, r *rig, _ *world, _ *root) {
		c := r.delta()
		c.subscribe("a", "b", "c")
		c.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"a", "b", "c"}, ResourceNamesSubscribe: []string{"d", "e", "default"}})
		c.one()
		c.subscribe("one more") // in small requests too
		c.wantEnd(codes.InvalidArgument)
		c = r.delta()
		c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"})
		c.wantEnd(codes.InvalidArgument)
	})
}
