package sds

import (
	"bytes"
	"context"
	"io"
	"maps"
	"slices"
	"testing"
	"testing/synctest"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/signet-ca/signet/test/bubble"
	"github.com/signet-ca/signet/trust"
)

// fakeWire is a stream without a network under it.
type fakeWire[Q, A any] struct {
	grpc.ServerStream
	ctx  context.Context
	in   chan *Q
	sent []*A
}

type (
	fakeSotW  = fakeWire[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]
	fakeDelta = fakeWire[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]
)

// fakeContext is that of a call over a connection of its own.
func fakeContext() context.Context {
	info := &connInfo{}
	info.caller = callerKey{conn: info}
	return peer.NewContext(context.Background(), &peer.Peer{AuthInfo: info})
}

func (f *fakeWire[Q, A]) Context() context.Context { return f.ctx }

func (f *fakeWire[Q, A]) Send(r *A) error {
	f.sent = append(f.sent, r)
	return nil
}

func (f *fakeWire[Q, A]) Recv() (*Q, error) {
	select {
	case r, ok := <-f.in:
		if !ok {
			return nil, io.EOF
		}
		return r, nil
	case <-f.ctx.Done():
		return nil, f.ctx.Err()
	}
}

// start serves the wire until end is called, which returns how the stream ended.
func start[Q, A any](method func(grpc.BidiStreamingServer[Q, A]) error) (f *fakeWire[Q, A], end func() error) {
	ctx, cancel := context.WithCancel(fakeContext())
	f = &fakeWire[Q, A]{ctx: ctx, in: make(chan *Q)}
	done := make(chan error, 1)
	go func() { done <- method(f); cancel() }()
	return f, func() error { close(f.in); return <-done }
}

// sidecar says and hears the same things in either protocol. Names that a client may say stale things with are Envoy's.
type sidecar interface {
	// connect opens a stream with these names, and with the versions that the sidecar has accepted.
	connect(names []string, had map[string]string)
	disconnect() error
	// change asks for next where names was subscribed, and was sent the held versions; a name in both may be asked for once
	// more. It returns what the contract has answered again.
	change(t *rapid.T, names, next []string, held map[string]string) (again []string)
	answer(names []string, m message, bad bool)
	// take returns what was sent.
	take(t *rapid.T) []message
	removes() bool
}

// message is one resource, or one removal.
type message struct {
	name, version, nonce string
	secret               *tlsv3.Secret
}

type sotwSidecar struct {
	s    *Server
	wire *fakeSotW
	end  func() error
}

func (c *sotwSidecar) connect(names []string, had map[string]string) {
	c.wire, c.end = start(c.s.StreamSecrets)
	version := ""
	for _, v := range had {
		version = v
	}
	c.wire.in <- &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: names, VersionInfo: version}
}

func (c *sotwSidecar) disconnect() error { return c.end() }
func (*sotwSidecar) removes() bool       { return false }

func (c *sotwSidecar) change(t *rapid.T, names, next []string, held map[string]string) (again []string) {
	nonce := rapid.SampledFrom([]string{"", "stale", "other-1"}).Draw(t, "nonce")
	version := rapid.SampledFrom(append([]string{"", "older"}, slices.Sorted(maps.Values(held))...)).Draw(t, "version")
	c.wire.in <- &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: next, VersionInfo: version, ResponseNonce: nonce}
	a, b := slices.Sorted(slices.Values(names)), slices.Sorted(slices.Values(next))
	if !slices.Equal(a, b) || slices.Contains(slices.Collect(maps.Values(held)), version) {
		return nil
	}
	return next
}

func (c *sotwSidecar) answer(names []string, m message, bad bool) {
	r := &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: names, VersionInfo: m.version, ResponseNonce: m.nonce}
	if bad {
		r.ErrorDetail, r.VersionInfo = &rpcstatus.Status{Message: "no"}, "before"
	}
	c.wire.in <- r
}

func (c *sotwSidecar) take(t *rapid.T) (out []message) {
	for _, r := range c.wire.sent {
		s := secretOf(t, r)
		out = append(out, message{name: s.Name, version: r.VersionInfo, nonce: r.Nonce, secret: s})
	}
	c.wire.sent = nil
	return out
}

type deltaSidecar struct {
	s    *Server
	wire *fakeDelta
	end  func() error
}

func (c *deltaSidecar) connect(names []string, had map[string]string) {
	c.wire, c.end = start(c.s.DeltaSecrets)
	c.wire.in <- &discoveryv3.DeltaDiscoveryRequest{TypeUrl: secretType, ResourceNamesSubscribe: names, InitialResourceVersions: had}
}

func (c *deltaSidecar) disconnect() error { return c.end() }
func (*deltaSidecar) removes() bool       { return true }

func (c *deltaSidecar) change(t *rapid.T, names, next []string, _ map[string]string) (again []string) {
	r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: secretType, ResponseNonce: rapid.SampledFrom([]string{"", "stale"}).Draw(t, "nonce")}
	for _, n := range names {
		if !slices.Contains(next, n) {
			r.ResourceNamesUnsubscribe = append(r.ResourceNamesUnsubscribe, n)
		}
	}
	if rapid.Bool().Draw(t, "phantom") {
		r.ResourceNamesUnsubscribe = append(r.ResourceNamesUnsubscribe, "never asked for")
	}
	for _, n := range next {
		if !slices.Contains(names, n) {
			r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, n)
		} else if rapid.Bool().Draw(t, "once more") {
			r.ResourceNamesSubscribe, again = append(r.ResourceNamesSubscribe, n), append(again, n)
		}
	}
	c.wire.in <- r
	return again
}

func (c *deltaSidecar) answer(_ []string, m message, bad bool) {
	r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: secretType, ResponseNonce: m.nonce}
	if bad {
		r.ErrorDetail = &rpcstatus.Status{Message: "no"}
	}
	c.wire.in <- r
}

func (c *deltaSidecar) take(t *rapid.T) (out []message) {
	for _, r := range c.wire.sent {
		if len(r.RemovedResources) == 1 && len(r.Resources) == 0 {
			out = append(out, message{name: r.RemovedResources[0], nonce: r.Nonce})
			continue
		}
		out = append(out, message{name: only(t, r).Name, version: version(r), nonce: r.Nonce, secret: only(t, r)})
	}
	c.wire.sent = nil
	return out
}

// Whatever a client says in whatever order, over however many streams: it is sent what it wants and may have, in its newest
// form, once, never what it rejected on that stream, and nothing else. The model is the table of the contract (§2a).
func TestAStreamIsToldWhatItWantsWhateverItSays(t *testing.T) {
	for name, speak := range map[string]func(*Server) sidecar{
		protocolSotW:  func(s *Server) sidecar { return &sotwSidecar{s: s} },
		protocolDelta: func(s *Server) sidecar { return &deltaSidecar{s: s} },
	} {
		t.Run(name, func(t *testing.T) { bubble.Test(t, func(t *testing.T) { checkAgainstModel(t, speak) }) })
	}
}

func checkAgainstModel(t *testing.T, speak func(*Server) sidecar) {
	ca, b, c := newRoot(t, "A"), newRoot(t, "B"), newRoot(t, "C")
	rootSets := [][]*root{{ca}, {ca, b}, {ca, c}, {ca, b, c}}
	friend := spiffeid.RequireTrustDomainFromString("friend.test")
	pool := map[spiffeid.ID][]*SVID{}
	for _, id := range []spiffeid.ID{web, api} {
		pool[id] = append(pool[id], nil) // not issued
		for range 3 {
			pool[id] = append(pool[id], ca.issue(t, leaf{id: id}))
		}
	}
	universe := []string{
		"default", "ROOTCA", web.String(), api.String(), exampleTD.IDString(), friend.IDString(), "ALL",
		"spiffe://other.test/x", "file-root:system", "*",
	}

	rapid.Check(struct{ rapid.TB }{t}, func(t *rapid.T) { // wrapped, because a bubble has no deadline to be asked for
		w := &world{
			td: exampleTD, ids: []spiffeid.ID{web}, svids: map[spiffeid.ID]*SVID{web: pool[web][1]}, asked: map[spiffeid.ID]int{},
			changed: make(chan struct{}), bundles: map[spiffeid.TrustDomain]trust.Bundle{exampleTD: bundleOf(exampleTD, 1, ca)},
		}
		s := must(New(Config{Workloads: w}))
		peer := speak(s)

		// The model.
		var (
			subscribed []string
			holds      = map[string]string{} // by name: the content sent last on this stream, or claimed to be had
			accepted   = map[string]string{} // by name: the version acknowledged last, over streams
			rejected   = map[string]bool{}   // contents, of this stream
			again      = map[string]bool{}   // names to be answered though they are held
			inFlight   []message
			nonces     = map[string]bool{}
			sequence   = uint64(1)
			contents   = map[string]string{} // by name and version
			versions   = map[string]string{} // by name: the version sent last on this stream
		)
		granted := func(name string) bool {
			switch name {
			case "default":
				return len(w.ids) > 0
			case web.String():
				return slices.Contains(w.ids, web)
			case api.String():
				return slices.Contains(w.ids, api)
			case friend.IDString():
				return !w.bundles[friend].IsZero()
			}
			return true // or without a meaning
		}
		// available is what a name stands for now; "" = nothing.
		available := func(name string) string {
			svid := func(id spiffeid.ID) string {
				if s := w.svids[id]; s != nil && slices.Contains(w.ids, id) {
					return string(s.CertificateChain)
				}
				return ""
			}
			switch name {
			case "default":
				if len(w.ids) > 0 {
					return svid(w.ids[0])
				}
			case "ROOTCA", exampleTD.IDString():
				return string(w.bundles[exampleTD].PEM())
			case friend.IDString():
				return string(w.bundles[friend].PEM())
			case "ALL":
				return string(w.bundles[exampleTD].PEM()) + string(w.bundles[friend].PEM()) // in the order of their names
			case web.String():
				return svid(web)
			case api.String():
				return svid(api)
			}
			return ""
		}
		key := func(name, content string) string { return name + "\n" + content }
		// settle checks what was sent.
		settle := func(t *rapid.T, what string) {
			synctest.Wait()
			gone := map[string]bool{} // names whose removal is due
			for _, n := range subscribed {
				if _, held := holds[n]; held && !granted(n) {
					delete(holds, n)
					delete(versions, n)
					gone[n] = peer.removes()
				}
			}
			for _, m := range peer.take(t) {
				if nonces[m.nonce] || m.nonce == "" {
					t.Fatalf("%s: nonce %q is not fresh", what, m.nonce)
				}
				nonces[m.nonce] = true
				inFlight = append(inFlight, m)
				if m.secret == nil {
					if !gone[m.name] {
						t.Fatalf("%s: removed %s, which is merely pending, not held, or removed already", what, m.name)
					}
					delete(gone, m.name)
					continue
				}
				content, held := available(m.name), false
				if h, ok := holds[m.name]; ok && h == content {
					held = true
				}
				switch {
				case !slices.Contains(subscribed, m.name):
					t.Fatalf("%s: sent %s, which is not subscribed", what, m.name)
				case content == "":
					t.Fatalf("%s: sent %s, which the caller can't have", what, m.name)
				case contentOf(t, m.secret) != content:
					t.Fatalf("%s: sent %s with content that is not the newest", what, m.name)
				case rejected[key(m.name, content)]:
					t.Fatalf("%s: sent %s again after it was rejected", what, m.name)
				case held && !again[m.name]:
					t.Fatalf("%s: sent %s without need", what, m.name)
				}
				if had, ok := contents[key(m.name, m.version)]; ok && had != content {
					t.Fatalf("%s: %s has other content under an old version", what, m.name)
				}
				contents[key(m.name, m.version)] = content
				holds[m.name], versions[m.name] = content, m.version
				delete(again, m.name)
			}
			for n, due := range gone {
				if due {
					t.Fatalf("%s: %s is no longer granted and was not removed", what, n)
				}
			}
			for _, n := range subscribed {
				if content := available(n); content != "" && !rejected[key(n, content)] && (holds[n] != content || again[n]) {
					t.Fatalf("%s: %s is owed and was not sent", what, n)
				}
			}
		}
		connect := func(t *rapid.T) {
			holds, versions, rejected, again, inFlight = map[string]string{}, map[string]string{}, map[string]bool{}, map[string]bool{}, nil
			claims := map[string]string{}
			for _, n := range subscribed {
				v, ok := accepted[n]
				if !ok {
					continue
				}
				claims[n] = v
				if peer.removes() { // only there a claim says which name it is about
					holds[n] = contents[key(n, v)]
				}
			}
			peer.connect(subscribed, claims)
			settle(t, "connect")
		}
		answer := func(t *rapid.T, bad bool) {
			if len(inFlight) == 0 {
				t.Skip("nothing to answer")
			}
			i := rapid.IntRange(0, len(inFlight)-1).Draw(t, "which")
			m := inFlight[i]
			inFlight = slices.Delete(inFlight, i, i+1)
			switch {
			case m.secret == nil:
				delete(accepted, m.name)
			case bad:
				rejected[key(m.name, contentOf(t, m.secret))] = true
			default:
				accepted[m.name] = m.version
			}
			peer.answer(subscribed, m, bad)
			settle(t, "answer")
		}
		subscribe := func(t *rapid.T, next []string) {
			for _, n := range universe {
				if !slices.Contains(next, n) { // forgotten
					delete(holds, n)
					delete(versions, n)
					delete(again, n)
					delete(accepted, n)
				}
			}
			more := peer.change(t, subscribed, next, versions)
			subscribed = next
			for _, n := range more {
				again[n] = true
			}
			settle(t, "subscribe")
		}
		subscribed = []string{"default", "ROOTCA"}
		connect(t)
		defer func() { // also when the property fails
			if err := peer.disconnect(); err != nil {
				t.Fatal(err)
			}
			if len(s.beliefs.count) != 0 || len(s.Streams()) != 0 || len(s.callers.by) != 0 {
				t.Fatal("the stream is gone and is still counted")
			}
		}()
		t.Repeat(map[string]func(*rapid.T){
			"subscribe": func(t *rapid.T) {
				subscribe(t, rapid.SliceOfNDistinct(rapid.SampledFrom(universe), 0, len(universe), rapid.ID).Draw(t, "names"))
			},
			"ask once more": func(t *rapid.T) { subscribe(t, subscribed) },
			"ack":           func(t *rapid.T) { answer(t, false) },
			"nack":          func(t *rapid.T) { answer(t, true) },
			"renew": func(t *rapid.T) {
				id := rapid.SampledFrom([]spiffeid.ID{web, api}).Draw(t, "id")
				svid := rapid.SampledFrom(pool[id]).Draw(t, "svid")
				w.change(func(w *world) { w.svids[id] = svid })
				settle(t, "renew")
			},
			"bundle": func(t *rapid.T) {
				sequence++
				td := rapid.SampledFrom([]spiffeid.TrustDomain{exampleTD, friend}).Draw(t, "whose")
				w.setBundle(bundleOf(td, sequence, rapid.SampledFrom(rootSets).Draw(t, "roots")...))
				settle(t, "bundle")
			},
			"end of a federation": func(t *rapid.T) {
				w.change(func(w *world) { delete(w.bundles, friend) })
				settle(t, "end of a federation")
			},
			"grant": func(t *rapid.T) {
				ids := rapid.SampledFrom([][]spiffeid.ID{{}, {web}, {api}, {web, api}, {api, web}}).Draw(t, "ids")
				w.change(func(w *world) { w.ids = ids })
				settle(t, "grant")
			},
			"ring": func(t *rapid.T) { w.change(func(*world) {}); settle(t, "ring") },
			"reconnect": func(t *rapid.T) {
				if err := peer.disconnect(); err != nil {
					t.Fatal(err)
				}
				connect(t)
			},
		})
	})
}

// contentOf is the chain, or the roots of all trust domains in their order.
func contentOf(t fataler, s *tlsv3.Secret) string {
	t.Helper()
	if c := s.GetTlsCertificate(); c != nil {
		return string(c.GetCertificateChain().GetInlineBytes())
	}
	config := new(tlsv3.SPIFFECertValidatorConfig)
	if err := s.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(config); err != nil {
		t.Fatal(err)
	}
	all := ""
	for _, td := range config.TrustDomains {
		all += string(td.GetTrustBundle().GetInlineBytes())
	}
	return all
}

// FuzzARequestGetsNothingThatIsNotGranted feeds whatever parses as requests.
func FuzzARequestGetsNothingThatIsNotGranted(f *testing.F) {
	for _, names := range [][]string{nil, {"default"}, {"ROOTCA", "spiffe://example.org", api.String()}, {"spiffe://EXAMPLE.org/%61", "é", ""}} {
		f.Add(must(proto.Marshal(&discoveryv3.DiscoveryRequest{ResourceNames: names, ResponseNonce: "n"})), []byte{})
		f.Add(must(proto.Marshal(&discoveryv3.DeltaDiscoveryRequest{
			ResourceNamesSubscribe: names, InitialResourceVersions: map[string]string{"default": "v"},
		})), must(proto.Marshal(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: names})))
	}
	ca := newRoot(f, "A")
	own, foreign := ca.issue(f, leaf{id: web}), ca.issue(f, leaf{id: api})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		w := &world{
			td: exampleTD, ids: []spiffeid.ID{web}, svids: map[spiffeid.ID]*SVID{web: own, api: foreign}, asked: map[spiffeid.ID]int{},
			changed: make(chan struct{}), bundles: map[spiffeid.TrustDomain]trust.Bundle{exampleTD: bundleOf(exampleTD, 1, ca)},
		}
		s := must(New(Config{Workloads: w}))
		var sent []proto.Message
		whole, end := start(s.StreamSecrets)
		feed(whole, first, second)
		_ = end()
		for _, r := range whole.sent {
			sent = append(sent, r)
		}
		parts, end := start(s.DeltaSecrets)
		feed(parts, first, second)
		_ = end()
		for _, r := range parts.sent {
			sent = append(sent, r)
		}
		r := new(discoveryv3.DiscoveryRequest)
		if proto.Unmarshal(first, r) == nil {
			if resp, err := s.FetchSecrets(fakeContext(), r); err == nil {
				sent = append(sent, resp)
			}
		}
		for _, m := range sent {
			if bytes.Contains(must(proto.Marshal(m)), foreign.PrivateKey) {
				t.Fatal("somebody else's key went out")
			}
		}
		if w.asked[api] != 0 {
			t.Fatal("somebody else's certificate was asked for")
		}
	})
}

// feed has a wire hear what parses as its requests.
func feed[Q, A any, M interface {
	*Q
	proto.Message
}](wire *fakeWire[Q, A], requests ...[]byte,
) {
	for _, b := range requests {
		r := M(new(Q))
		if proto.Unmarshal(b, r) != nil {
			continue
		}
		select {
		case wire.in <- r:
		case <-wire.ctx.Done():
		}
	}
}
