package agent

import (
	"bytes"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/trust"
)

// believed reports whether the server was last told this bundle.
func (w *world) believed(b trust.Bundle) func() bool {
	d := b.Digest()
	return func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		a := w.acks["node-1"]
		return len(a) == 1 && bytes.Equal(a[0].Digest, d[:]) && a[0].Sequence == b.Sequence()
	}
}

// onDisk reports whether the server was last told that this bundle, or none, is on the agent's disk.
func (w *world) onDisk(b trust.Bundle) func() bool {
	return func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		s, d := w.stored["node-1"], b.Digest()
		if b.IsZero() || s == nil {
			return b.IsZero() && s == nil
		}
		return s.TrustDomain == td.Name() && bytes.Equal(s.Digest, d[:]) && s.Sequence == b.Sequence()
	}
}

// A bundle that a restart would take back is used, but not acknowledged until it is on disk.
func TestABundleThatIsNotStoredIsNotAcknowledged(t *testing.T) {
	for _, subscribed := range []bool{false, true} {
		w := newWorld(t)
		w.open()
		w.setRegistrations(reg("web", "/web", time.Hour, uid))
		n := w.start(t)
		n.ready(t)
		var s *sidecar
		if subscribed {
			s = subscribe(t, connect(t, n.config.Socket), "ROOTCA")
			if _, err := s.next(); err != nil {
				t.Fatal(err)
			}
		}
		first := w.bundle
		eventually(t, "the first is acknowledged", w.believed(first))
		// The disk takes nothing under this name any more.
		path := n.path(bundleFile)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		second := mustBundle(t, 2, w.root, newCA(t, "next", nil))
		w.change(func() { w.bundle = second })
		if subscribed {
			if got, err := s.next(); err != nil || got["ROOTCA"] == nil {
				t.Fatalf("the workload waits for the disk: %v", err)
			}
		}
		eventually(t, "it is in use", func() bool { b, _ := n.bundles.Get(td); return b.Sequence() == 2 })
		bundleStatus := func() *adminv1.AgentBundleStatus {
			r, err := n.admin(t).Status(t.Context(), &adminv1.AgentStatusRequest{})
			if err != nil {
				t.Fatal(err)
			}
			return r.Bundle
		}
		// Longer than a try to store it, and with another word in between.
		w.change(func() { clear(w.acks); clear(w.stored) })
		w.close()
		w.open()
		eventually(t, "the first is told again", w.believed(first))
		time.Sleep(storeRetry + 2*settle)
		if !w.believed(first)() || !w.onDisk(first)() || !bundleStatus().Unstored {
			t.Fatalf("subscribed %v: a bundle was acknowledged that a restart would forget", subscribed)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is stored when the disk takes it, and acknowledged", w.believed(second))
		eventually(t, "the server hears that it is stored", w.onDisk(second))
		if bundleStatus().Unstored {
			t.Fatal("status says that it is not stored")
		}
		c := n.config
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		c.Metrics = nil
		again, err := New(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if b, ok := again.bundles.Get(td); !ok || b.Sequence() != 2 {
			t.Fatalf("after the restart: %v", b.Sequence())
		}
		again.Close()
		w.close()
	}
}

func TestOnlyWhatIsStoredIsAcknowledged(t *testing.T) {
	w := newWorld(t)
	next := newCA(t, "next", nil)
	both, alone := mustBundle(t, 1, w.root, next), mustBundle(t, 2, w.root)
	var s storedBundles
	s.taken(both)
	if _, ok := s.honest(both.Version()); ok || !s.pending() || s.word() != nil {
		t.Fatal("there is nothing on disk, but something is acknowledged")
	}
	s.loaded(both)
	s.taken(alone)
	again := mustBundle(t, 3, w.root, next) // the content of what is on disk, later
	s.taken(again)
	for _, b := range []trust.Bundle{both, alone, again} {
		if v, ok := s.honest(b.Version()); !ok || v != both.Version() {
			t.Fatalf("told %v of %v, want what is on disk", v, b.Version())
		}
	}
	if d := both.Digest(); !bytes.Equal(s.word().GetDigest(), d[:]) || s.word().GetSequence() != 1 {
		t.Fatalf("told to be on disk: %v", s.word())
	}
	if v, ok := s.honest(trust.Version{}); !ok || v != (trust.Version{}) || !s.pending() {
		t.Fatalf("a workload that believes nothing yet is told as %v", v)
	}
}

// deltaSidecar is an incremental stream.
func deltaSidecar(t *testing.T, n *node, names ...string) secretv3.SecretDiscoveryService_DeltaSecretsClient {
	t.Helper()
	s, err := secretv3.NewSecretDiscoveryServiceClient(connect(t, n.config.Socket)).DeltaSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: "delta"}, ResourceNamesSubscribe: names}); err != nil {
		t.Fatal(err)
	}
	return s
}

func nextDelta(t *testing.T, s secretv3.SecretDiscoveryService_DeltaSecretsClient) *discoveryv3.DeltaDiscoveryResponse {
	t.Helper()
	r, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: r.Nonce}); err != nil {
		t.Fatal(err)
	}
	return r
}

func sealedFiles(t *testing.T, n *node) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(n.path(cacheDir))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), sealedSuffix); ok {
			names = append(names, name)
		}
	}
	return names
}

// The ban of an identity comes in one of two ways: its registrations are no longer told, or a request is refused.
func TestABannedIdentityIsWithdrawnAndDeletedAndNotAskedForAgain(t *testing.T) {
	for _, heard := range []string{"as a set without it", "as a refusal"} {
		t.Run(heard, func(t *testing.T) {
			w := newWorld(t)
			w.open()
			bad, good := reg("bad", "/bad", time.Hour, uid), reg("good", "/good", time.Hour, uid)
			alone := reg("alone", "/bad", time.Hour, "unix:uid:7")
			w.setRegistrations(bad, good, alone)
			at := &fakeAttestor{selectors: []identity.Selector{"unix:uid:7"}, alive: true}
			n := w.start(t, func(c *Config) { c.Attestor = at })
			// One has the identity alone, two have another besides.
			only := subscribe(t, connect(t, n.config.Socket), "default")
			if _, err := only.next(); err != nil {
				t.Fatal(err)
			}
			at.set(uid)
			incremental := deltaSidecar(t, n, bad.ID.String(), good.ID.String())
			nextDelta(t, incremental)
			nextDelta(t, incremental)
			eventually(t, "all are cached", func() bool { return len(sealedFiles(t, n)) == 3 })

			switch heard {
			case "as a set without it":
				w.setRegistrations(good)
			case "as a refusal":
				w.change(func() {
					w.refuse = func(item *signetv1.IssueItem) *signetv1.Refusal {
						if item.Registration == good.Name {
							return nil
						}
						return &signetv1.Refusal{Reason: signetv1.Refusal_REASON_DENIED, Message: "banned_identity"}
					}
				})
				n.hub.mu.Lock()
				n.hub.issueSoon("bad", n.hub.entries["bad"])
				n.hub.mu.Unlock()
			}
			if r := nextDelta(t, incremental); len(r.RemovedResources) != 1 || r.RemovedResources[0] != bad.ID.String() {
				t.Fatalf("got %v", r)
			}
			for {
				if _, err := only.next(); err != nil {
					if status.Code(err) != codes.PermissionDenied {
						t.Fatalf("the stream of who has no other identity ends with %v", err)
					}
					break
				}
			}
			eventually(t, "only the other's file is left", func() bool {
				names := sealedFiles(t, n)
				return len(names) == 1 && names[0] == "good"
			})
			before := w.issuances("bad") + w.issuances("alone")
			w.mu.Lock()
			asked := len(w.items)
			w.mu.Unlock()
			if got := w.issuances("good"); got != 1 {
				t.Fatalf("%d issuances of the other", got)
			}
			time.Sleep(time.Second)
			w.mu.Lock()
			more := len(w.items) - asked
			w.mu.Unlock()
			if more != 0 {
				t.Fatalf("it was asked for %d times more", more)
			}
			// The ban is lifted: what is told again is asked for again, also by a set that reads as the one before it.
			w.change(func() { w.refuse = nil })
			w.setRegistrations(bad, good, alone)
			if r := nextDelta(t, incremental); len(r.Resources) != 1 || r.Resources[0].Name != bad.ID.String() {
				t.Fatalf("got %v", r)
			}
			if got := w.issuances("bad") + w.issuances("alone"); got != before+1 {
				t.Fatalf("%d issuances, want one more than %d", got, before)
			}
		})
	}
}

// The deletion does not wait for the writer of the cache, and does not lose against it.
func TestAWithdrawnIdentityIsDeletedBeforeAnythingElseHappens(t *testing.T) {
	w, dir := newWorld(t), filepath.Join(t.TempDir(), "cache")
	r := reg("web", "/web", time.Hour, uid)
	filled(t, w, dir, r)
	d := newDoorless(t, w, r)
	c := mustCache(t, dir, passphrase("one"), "node-1")
	d.restore(c)
	gone := func() {
		t.Helper()
		if _, err := os.Stat(c.path("web")); !os.IsNotExist(err) {
			t.Fatalf("the file: %v", err)
		}
	}
	// The writer has decided to write it and waits for its turn.
	waits, done := make(chan struct{}), make(chan struct{})
	c.io.Lock()
	go func() { close(waits); _ = c.writeInUse(t.Context(), "web", d.inUse); close(done) }()
	<-waits
	time.Sleep(10 * time.Millisecond)
	withdrawn := make(chan struct{})
	go func() { d.setRegistrations(nil); close(withdrawn) }()
	eventually(t, "it is withdrawn", func() bool { return d.inUse("web") == nil })
	c.io.Unlock()
	<-withdrawn
	<-done
	gone()

	// One that could not be deleted is deleted later.
	filled(t, w, dir, r)
	d = newDoorless(t, w, r)
	c = mustCache(t, dir, passphrase("one"), "node-1")
	d.restore(c)
	if err := os.Remove(c.path("web")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(c.path("web"), "stuck"), 0o700); err != nil {
		t.Fatal(err)
	}
	d.setRegistrations(nil)
	if c.flush(t.Context(), d.inUse) {
		t.Fatal("the check fails nothing")
	}
	if err := os.Remove(filepath.Join(c.path("web"), "stuck")); err != nil {
		t.Fatal(err)
	}
	if !c.flush(t.Context(), d.inUse) {
		t.Fatal("still not deleted")
	}
	gone()
	if _, err := os.Stat(c.keyPath()); err != nil {
		t.Fatalf("the data key went with it: %v", err)
	}
}

// validator is a sidecar with both names on one stream, which checks that it could validate each leaf it is given.
type validator struct {
	*sidecar
	roots *x509.CertPool
	leaf  *x509.Certificate
	count int
}

// step takes one response.
func (v *validator) step(t *testing.T) {
	t.Helper()
	got, err := v.next()
	if err != nil {
		t.Fatal(err)
	}
	for _, sec := range got {
		if ctx := sec.GetValidationContext(); ctx != nil {
			v.roots = x509.NewCertPool()
			var spiffe tlsv3.SPIFFECertValidatorConfig
			if err := ctx.CustomValidatorConfig.TypedConfig.UnmarshalTo(&spiffe); err != nil {
				t.Fatal(err)
			}
			v.roots.AppendCertsFromPEM(spiffe.TrustDomains[0].TrustBundle.GetInlineBytes())
			continue
		}
		chain := sec.GetTlsCertificate()
		v.leaf = parsePEM(t, chain.GetCertificateChain().GetInlineBytes())
		v.count++
		above := x509.NewCertPool()
		above.AppendCertsFromPEM(chain.GetCertificateChain().GetInlineBytes())
		if _, err := v.leaf.Verify(x509.VerifyOptions{Roots: v.roots, Intermediates: above, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Fatalf("leaf %d came before what it is validated with: %v", v.count, err)
		}
	}
}

// The server is forced to switch while this agent has not heard of the new root.
func TestAChainThatCannotBeVerifiedYetWaitsForItsBundle(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	v := &validator{sidecar: subscribe(t, connect(t, n.config.Socket), "default", "ROOTCA")}
	for v.leaf == nil {
		v.step(t)
	}
	first := v.leaf
	old := w.root
	next := newCA(t, "root 2", nil)
	w.change(func() { w.mesh = newCA(t, "east 2", next) })
	w.setRegistrations(reg("web", "/web", 2*time.Hour, uid))
	admin := n.admin(t)
	identityStatus := func() *adminv1.AgentIdentityStatus {
		r, err := admin.Status(t.Context(), &adminv1.AgentStatusRequest{})
		if err != nil || len(r.Identities) != 1 {
			t.Fatalf("%v, %v", r, err)
		}
		return r.Identities[0]
	}
	eventually(t, "it was tried again", func() bool { return identityStatus().FailedTries >= 3 })
	if s := identityStatus(); s.Serial != serialText(first) || !strings.Contains(s.LastError, "not good by trust bundle 1") {
		t.Fatalf("status says %v", s)
	}
	if got := leafOf(t, n.config.Socket); !got.Equal(first) {
		t.Fatal("it was not kept")
	}
	tries := w.issuances("web")
	time.Sleep(time.Second)
	if more := w.issuances("web") - tries; more > 3 {
		t.Fatalf("%d tries in a second: no patience", more)
	}
	w.change(func() { w.bundle = mustBundle(t, 2, old, next) })
	since := time.Now()
	for v.leaf.Equal(first) {
		v.step(t)
	}
	if took := time.Since(since); took > 10*time.Second {
		t.Fatalf("%s from the bundle to the leaf", took)
	}
	if s := identityStatus(); s.FailedTries != 0 || s.LastError != "" || !bytes.Equal(s.IssuerKeyId, w.mesh.cert.SubjectKeyId) {
		t.Fatalf("status says %v", s)
	}
}

// Intermediates and roots are rotated several times; on a stream nothing comes before what it is validated with, chain and
// key are a pair at each step, and a leaf is not lost.
func TestEveryRotationArrivesInAnOrderThatValidates(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	v := &validator{sidecar: subscribe(t, connect(t, n.config.Socket), "default", "ROOTCA")}
	for v.leaf == nil {
		v.step(t)
	}
	for i := range uint64(6) {
		before, issuer, root := v.leaf, w.mesh, w.root
		w.change(func() {
			if i%2 == 1 {
				w.mesh = newCA(t, "another intermediate", w.root)
			} else { // all of it in one message after the other, as to an agent that was asleep
				w.root = newCA(t, "another root", nil)
				w.mesh = newCA(t, "its intermediate", w.root)
				w.bundle = mustBundle(t, w.bundle.Sequence()+1, root, w.root)
			}
			w.order = order(0, issuer)
		})
		for v.leaf.Equal(before) {
			v.step(t)
		}
		if string(v.leaf.AuthorityKeyId) != string(w.mesh.cert.SubjectKeyId) {
			t.Fatalf("rotation %d: the leaf is of issuer %x", i, v.leaf.AuthorityKeyId)
		}
		eventually(t, "none of the old issuer is left", w.holds(w.mesh))
	}
	if n := w.issuances("web"); n > 14 {
		t.Fatalf("%d issuances for six rotations", n)
	}
}

// An agent that was away from before a root was added until after the old one was removed.
func TestAnAgentThatWasAwayThroughARootRotationComesBackRight(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	first := leafOf(t, n.config.Socket)
	eventually(t, "it is cached", func() bool { return len(sealedFiles(t, n)) == 1 })
	c := n.config
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	w.close()
	w.change(func() {
		w.root = newCA(t, "root 2", nil)
		w.mesh = newCA(t, "east 2", w.root)
		w.bundle = mustBundle(t, 3, w.root)
	})
	c.Metrics, c.returnTime = nil, 3*time.Second
	again, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	started := time.Now()
	n = run(t, again)
	// It serves what it knows until it hears more.
	v := &validator{sidecar: subscribe(t, connect(t, c.Socket), "default", "ROOTCA")}
	for v.leaf == nil {
		v.step(t)
	}
	if !v.leaf.Equal(first) {
		t.Fatal("another leaf while the server is away")
	}
	w.open()
	for v.leaf.Equal(first) {
		v.step(t)
	}
	if string(v.leaf.AuthorityKeyId) != string(w.mesh.cert.SubjectKeyId) {
		t.Fatalf("the leaf is of issuer %x", v.leaf.AuthorityKeyId)
	}
	// Others than the one that is back may have been there before the restart.
	eventually(t, "the server hears of the new root", w.believed(w.bundle))
	eventually(t, "and that nothing old is held", w.holds(w.mesh))
	if took := time.Since(started); took < c.returnTime {
		t.Fatalf("the server heard of it %s after the start, want %s or later", took, c.returnTime)
	}
}
