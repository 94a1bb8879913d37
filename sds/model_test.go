package sds

import (
	"bytes"
	"context"
	"io"
	"slices"
	"testing"
	"testing/synctest"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/signet-ca/signet/trust"
)

// fakeWire is a stream without a network under it.
type fakeWire struct {
	grpc.ServerStream
	ctx  context.Context
	in   chan *discoveryv3.DiscoveryRequest
	sent []*discoveryv3.DiscoveryResponse
}

func newFakeWire(ctx context.Context) *fakeWire {
	info := &connInfo{}
	info.caller = callerKey{conn: info}
	return &fakeWire{ctx: peer.NewContext(ctx, &peer.Peer{AuthInfo: info}), in: make(chan *discoveryv3.DiscoveryRequest)}
}

func (f *fakeWire) Context() context.Context { return f.ctx }

func (f *fakeWire) Send(r *discoveryv3.DiscoveryResponse) error {
	f.sent = append(f.sent, r)
	return nil
}

func (f *fakeWire) Recv() (*discoveryv3.DiscoveryRequest, error) {
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

// run serves the wire until the function returns.
func (f *fakeWire) run(s *Server, drive func()) (err error) {
	ctx, cancel := context.WithCancel(f.ctx)
	f.ctx = ctx
	done := make(chan error, 1)
	go func() { done <- s.StreamSecrets(f); cancel() }()
	defer func() { // also when drive fails
		close(f.in)
		err = <-done
	}()
	drive()
	return nil
}

// Whatever a client says in whatever order: it is sent what it wants and may have, in its newest form, once, never what it
// rejected, and nothing else.
func TestAStreamIsToldWhatItWantsWhateverItSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, b, c := newRoot(t, "A"), newRoot(t, "B"), newRoot(t, "C")
		rootSets := [][]*root{{ca}, {ca, b}, {ca, c}, {ca, b, c}}
		pool := map[spiffeid.ID][]*SVID{}
		for _, id := range []spiffeid.ID{web, api} {
			for range 4 {
				pool[id] = append(pool[id], ca.issue(t, leaf{id: id}))
			}
		}
		universe := []string{"default", "ROOTCA", web.String(), api.String(), exampleTD.IDString(), "ALL", "spiffe://other.test/x"}

		rapid.Check(struct{ rapid.TB }{t}, func(t *rapid.T) { // wrapped, because a bubble has no deadline to be asked for
			w := &world{
				td: exampleTD, ids: []spiffeid.ID{web}, svids: map[spiffeid.ID]*SVID{web: pool[web][0]}, asked: map[spiffeid.ID]int{},
				changed: make(chan struct{}),
			}
			w.bundles = map[spiffeid.TrustDomain]trust.Bundle{exampleTD: bundleOf(exampleTD, 1, ca)}
			s := must(New(Config{Workloads: w}))
			wire := newFakeWire(context.Background())

			// The model.
			var (
				subscribed []string
				holds      = map[string]string{} // by name: the content sent last
				rejected   = map[string]bool{}   // contents
				again      = map[string]bool{}   // names asked for again and not served since
				inFlight   []*discoveryv3.DiscoveryResponse
				nonces     = map[string]bool{}
				sequence   = uint64(1)
				current    string // version of a response that is still the newest
			)
			// available is what a name stands for now; nil = nothing.
			available := func(name string) []byte {
				svid := func(id spiffeid.ID) []byte {
					if s := w.svids[id]; s != nil && slices.Contains(w.ids, id) {
						return s.CertificateChain
					}
					return nil
				}
				switch name {
				case "default":
					if len(w.ids) == 0 {
						return nil
					}
					return svid(w.ids[0])
				case "ROOTCA", exampleTD.IDString():
					return w.bundles[exampleTD].PEM()
				case web.String():
					return svid(web)
				case api.String():
					return svid(api)
				}
				return nil
			}
			key := func(name string, content []byte) string { return name + "\n" + string(content) }
			// settle checks what was sent.
			settle := func(t *rapid.T, what string) {
				synctest.Wait()
				for _, r := range wire.sent {
					sec := secretOf(t, r)
					content := available(sec.Name)
					switch {
					case !slices.Contains(subscribed, sec.Name):
						t.Fatalf("%s: sent %s, which is not subscribed", what, sec.Name)
					case content == nil:
						t.Fatalf("%s: sent %s, which the caller can't have", what, sec.Name)
					case !bytes.Contains(r.Resources[0].Value, content):
						t.Fatalf("%s: sent %s with content that is not the newest", what, sec.Name)
					case rejected[key(sec.Name, content)]:
						t.Fatalf("%s: sent %s again after it was rejected", what, sec.Name)
					case nonces[r.Nonce] || r.Nonce == "":
						t.Fatalf("%s: nonce %q is not fresh", what, r.Nonce)
					case holds[sec.Name] == string(content) && !again[sec.Name]:
						t.Fatalf("%s: sent %s without need", what, sec.Name)
					}
					nonces[r.Nonce] = true
					holds[sec.Name] = string(content)
					inFlight = append(inFlight, r)
					current = r.VersionInfo
				}
				wire.sent = nil
				for _, n := range subscribed {
					if content := available(n); content != nil && holds[n] != string(content) && !rejected[key(n, content)] {
						t.Fatalf("%s: %s is owed and was not sent", what, n)
					} else if content != nil && !rejected[key(n, content)] {
						delete(again, n)
					}
				}
			}
			request := func(names []string, version, nonce string, bad bool) {
				r := &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: names, VersionInfo: version, ResponseNonce: nonce}
				if bad {
					r.ErrorDetail = &rpcstatus.Status{Message: "no"}
				}
				wire.in <- r
			}
			answer := func(t *rapid.T, bad bool) {
				if len(inFlight) == 0 {
					t.Skip("nothing to answer")
				}
				i := rapid.IntRange(0, len(inFlight)-1).Draw(t, "which")
				r := inFlight[i]
				inFlight = slices.Delete(inFlight, i, i+1)
				if bad {
					sec := secretOf(t, r)
					body := sec.GetTlsCertificate().GetCertificateChain().GetInlineBytes()
					if body == nil {
						for _, set := range rootSets { // find which bundle it was
							if pem := bundleOf(exampleTD, 1, set...).PEM(); bytes.Contains(r.Resources[0].Value, pem) && len(pem) > len(body) {
								body = pem
							}
						}
					}
					rejected[key(sec.Name, body)] = true
				}
				request(subscribed, r.VersionInfo, r.Nonce, bad)
			}
			err := wire.run(s, func() {
				t.Repeat(map[string]func(*rapid.T){
					"subscribe": func(t *rapid.T) {
						next := rapid.SliceOfNDistinct(rapid.SampledFrom(universe), 0, len(universe), rapid.ID).Draw(t, "names")
						nonce := rapid.SampledFrom([]string{"", "stale", "other-1"}).Draw(t, "nonce")
						version := rapid.SampledFrom([]string{"", "older", current}).Draw(t, "version")
						for n := range holds {
							if !slices.Contains(next, n) {
								delete(holds, n) // forgotten
							}
						}
						subscribed = next
						for _, n := range next {
							again[n] = true
						}
						request(next, version, nonce, false)
						settle(t, "subscribe")
					},
					"ack":  func(t *rapid.T) { answer(t, false); settle(t, "ack") },
					"nack": func(t *rapid.T) { answer(t, true); settle(t, "nack") },
					"renew": func(t *rapid.T) {
						id := rapid.SampledFrom([]spiffeid.ID{web, api}).Draw(t, "id")
						w.setSVID(rapid.SampledFrom(pool[id]).Draw(t, "svid"))
						settle(t, "renew")
					},
					"bundle": func(t *rapid.T) {
						sequence++
						w.setBundle(bundleOf(exampleTD, sequence, rapid.SampledFrom(rootSets).Draw(t, "roots")...))
						settle(t, "bundle")
					},
					"grant": func(t *rapid.T) {
						ids := rapid.SampledFrom([][]spiffeid.ID{{}, {web}, {api}, {web, api}, {api, web}}).Draw(t, "ids")
						w.change(func(w *world) { w.ids = ids })
						settle(t, "grant")
					},
					"ring": func(t *rapid.T) { w.change(func(*world) {}); settle(t, "ring") },
				})
			})
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := s.OldestBundle(exampleTD); ok || len(s.beliefs.count) != 0 {
				t.Fatal("the stream is gone and is still counted")
			}
		})
	})
}

// FuzzARequestGetsNothingThatIsNotGranted feeds whatever parses as requests.
func FuzzARequestGetsNothingThatIsNotGranted(f *testing.F) {
	for _, names := range [][]string{nil, {"default"}, {"ROOTCA", "spiffe://example.org", api.String()}, {"spiffe://EXAMPLE.org/%61", "é", ""}} {
		f.Add(must(proto.Marshal(&discoveryv3.DiscoveryRequest{ResourceNames: names, ResponseNonce: "n"})), []byte{})
	}
	ca := newRoot(f, "A")
	own, foreign := ca.issue(f, leaf{id: web}), ca.issue(f, leaf{id: api})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		w := &world{
			td: exampleTD, ids: []spiffeid.ID{web}, svids: map[spiffeid.ID]*SVID{web: own, api: foreign}, asked: map[spiffeid.ID]int{},
			changed: make(chan struct{}), bundles: map[spiffeid.TrustDomain]trust.Bundle{exampleTD: bundleOf(exampleTD, 1, ca)},
		}
		s := must(New(Config{Workloads: w}))
		wire := newFakeWire(context.Background())
		_ = wire.run(s, func() {
			for _, b := range [][]byte{first, second} {
				r := new(discoveryv3.DiscoveryRequest)
				if proto.Unmarshal(b, r) != nil {
					continue
				}
				select {
				case wire.in <- r:
				case <-wire.ctx.Done():
				}
			}
		})
		for _, r := range wire.sent {
			if bytes.Contains(r.Resources[0].Value, foreign.PrivateKey) {
				t.Fatal("somebody else's key went out")
			}
		}
		if w.asked[api] != 0 {
			t.Fatal("somebody else's certificate was asked for")
		}
	})
}
