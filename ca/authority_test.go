package ca

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

func weakKey(t *testing.T) *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestAGrantIsSpentOnce(t *testing.T) {
	w := newWorld(t)
	g := w.grant("web")
	results := w.authority.Issue(context.Background(), []*identity.Grant{g, g, nil, {}})
	if results[0].Err != nil {
		t.Fatal(results[0].Err)
	}
	for n, r := range results[1:] {
		if r.Leaf != nil || !errors.Is(r.Err, identity.ErrSpent) {
			t.Errorf("item %d: %v, %v", n+1, r.Leaf, r.Err)
		}
	}
	w.refused(g, ReasonSpent)
	if n := len(w.log.entries); n != 1 {
		t.Errorf("%d entries in the log", n)
	}
}

func TestOneOfManyWinsAGrant(t *testing.T) {
	w := newWorld(t)
	g := w.grant("web")
	var won atomic.Int64
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			if r := w.authority.Issue(context.Background(), []*identity.Grant{g}); r[0].Err == nil {
				won.Add(1)
			}
		})
	}
	all.Wait()
	if won.Load() != 1 || w.meshKey.signs.Load() != 1 {
		t.Errorf("%d leaves, %d signatures", won.Load(), w.meshKey.signs.Load())
	}
}

func TestNothingIsSignedBeforeTheLogHasIt(t *testing.T) {
	w := newWorld(t)
	w.log.before = func() {
		if n := w.meshKey.signs.Load() + w.controlKey.signs.Load(); n != 0 {
			t.Errorf("%d signatures before the log was asked", n)
		}
	}
	grants := []*identity.Grant{w.grant("web"), w.serverGrant(), w.grant("web")}
	for n, r := range w.authority.Issue(context.Background(), grants) {
		if r.Err != nil {
			t.Errorf("item %d: %v", n, r.Err)
		}
	}
	if w.log.batches != 1 || len(w.log.entries) != 3 {
		t.Errorf("%d batches, %d entries; want one of three", w.log.batches, len(w.log.entries))
	}
	if m, c := w.meshKey.signs.Load(), w.controlKey.signs.Load(); m != 2 || c != 1 {
		t.Errorf("%d and %d signatures", m, c)
	}
}

func TestWhenTheLogFailsNothingIsSigned(t *testing.T) {
	full := errors.New("no space left on device")
	var said bytes.Buffer
	w := newWorld(t, func(o *worldOptions) {
		o.config = func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&said, nil)) }
	})
	w.log.fail = full
	for n, r := range w.authority.Issue(context.Background(), []*identity.Grant{w.grant("web"), nil, w.serverGrant()}) {
		if n == 1 {
			continue
		}
		var e *Error
		if r.Leaf != nil || !errors.As(r.Err, &e) || e.Reason != ReasonLog || !errors.Is(r.Err, full) {
			t.Errorf("item %d: %v, %v", n, r.Leaf, r.Err)
		} else if !strings.Contains(e.Error(), "issuing is stopped because the audit log can't be written: no space left on device; ") {
			t.Errorf("item %d: %v", n, e)
		}
	}
	if n := w.meshKey.signs.Load() + w.controlKey.signs.Load(); n != 0 {
		t.Errorf("%d signatures", n)
	}
	// The operator hears of the beginning and of the end, not of each call.
	w.refused(w.grant("web"), ReasonLog)
	w.refused(w.grant("web"), ReasonLog)
	w.log.fail = nil
	w.issue(w.grant("web"))
	w.issue(w.grant("web"))
	lines := strings.Split(strings.TrimSpace(said.String()), "\n")
	if len(lines) != 2 || !strings.Contains(lines[0], "level=ERROR") || !strings.Contains(lines[0], "reason=log_unavailable") ||
		!strings.Contains(lines[1], "issuing works again") {
		t.Errorf("said %q", lines)
	}
}

// shortLog breaks its contract.
type shortLog struct{}

func (shortLog) Append(context.Context, []*auditv1.Entry) ([]audit.Receipt, error) { return nil, nil }

func TestALogThatGivesNoReceiptsHasNotLogged(t *testing.T) {
	w := newWorld(t, func(o *worldOptions) { o.config = func(c *Config) { c.Log = shortLog{} } })
	w.refused(w.grant("web"), ReasonLog)
	if n := w.meshKey.signs.Load(); n != 0 {
		t.Errorf("%d signatures", n)
	}
}

func TestACallGivenUpLeavesNoTrace(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	r := w.authority.Issue(ctx, []*identity.Grant{w.grant("web")})[0]
	var e *Error
	if !errors.As(r.Err, &e) || e.Reason != ReasonCanceled || !errors.Is(r.Err, context.Canceled) {
		t.Errorf("%v", r.Err)
	}
	if len(w.log.entries) != 0 || w.meshKey.signs.Load() != 0 {
		t.Errorf("%d entries, %d signatures", len(w.log.entries), w.meshKey.signs.Load())
	}
}

func TestTheLogHoldsWhatTheCertificateSays(t *testing.T) {
	w := newWorld(t)
	// A refused item in front shifts the entries against the items.
	results := w.authority.Issue(context.Background(), []*identity.Grant{nil, w.grant("web"), w.serverGrant()})
	for n, issuer := range []*Issuer{w.mesh, w.control} {
		r := results[n+1]
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		cert, err := x509.ParseCertificate(r.Leaf.Chain[0])
		if err != nil {
			t.Fatal(err)
		}
		if r.Leaf.Receipt.Index != uint64(n) {
			t.Errorf("receipt %d, want %d", r.Leaf.Receipt.Index, n)
		}
		entry := w.log.entries[r.Leaf.Receipt.Index]
		issued := entry.GetCertificateIssued()
		if !bytes.Equal(issued.GetTbs(), cert.RawTBSCertificate) {
			t.Error("the log has another certificate than was given")
		}
		if !bytes.Equal(issued.GetIssuerKeyId(), cert.AuthorityKeyId) || !bytes.Equal(cert.AuthorityKeyId, issuer.KeyID()) {
			t.Error("issuer key identifiers differ")
		}
		if entry.GetTime() != noon.UnixNano() {
			t.Errorf("logged at %d", entry.GetTime())
		}
		if got := cert.SerialNumber.Bytes(); !bytes.Equal(got, r.Leaf.Serial) {
			t.Errorf("serial %x, leaf says %x", got, r.Leaf.Serial)
		}
		if !cert.NotBefore.Equal(r.Leaf.NotBefore) || !cert.NotAfter.Equal(r.Leaf.NotAfter) {
			t.Error("validity differs from what the leaf says")
		}
		if !bytes.Equal(r.Leaf.Chain[1], issuer.Certificate().Raw) || len(r.Leaf.Chain) != 2 {
			t.Error("the chain is not leaf and issuer")
		}
	}
	ev := w.log.entries[0].GetCertificateIssued().GetEvidence()
	want := &auditv1.Evidence{
		Caller: "spiffe://example.org/signet/cluster/east/agent/node-1", Door: "agent", Agent: "node-1", Instance: "pid 4711 (uid 1000)",
		Registration: "web", RegistrationRevision: 7, Selectors: []string{"unix:uid:1000", "unix:gid:1000"},
	}
	if ev.String() != want.String() {
		t.Errorf("evidence %v\nwant %v", ev, want)
	}
	if ev := w.log.entries[1].GetCertificateIssued().GetEvidence(); ev.GetDoor() != "self" || ev.GetCaller() != "spiffe://example.org/signet/cluster/east/server/east-1" {
		t.Errorf("evidence %v", ev)
	}
}

// A validity is whole seconds, both ends counted, within the whole chain's.
func TestALifeIsCutToItsChain(t *testing.T) {
	const day = 24 * time.Hour
	type cert = x509.Certificate
	at := func(d time.Duration) time.Time { return noon.Add(d) }
	ends := func(d time.Duration) func(*cert) { return func(c *cert) { c.NotAfter = at(d) } }
	begins := func(d time.Duration) func(*cert) { return func(c *cert) { c.NotBefore = at(d) } }
	cases := map[string]struct {
		ttl, backdate, least, tick time.Duration
		root, intermediate         func(*cert)
		from, to                   time.Time
		refused                    string
	}{
		"as granted":                    {ttl: time.Hour, from: at(-5 * time.Minute), to: at(time.Hour - time.Second)},
		"a part of a second is dropped": {ttl: time.Hour, tick: 999 * time.Millisecond, from: at(-5 * time.Minute), to: at(time.Hour - time.Second)},
		"another backdate":              {ttl: time.Hour, backdate: 30 * time.Second, from: at(-30 * time.Second), to: at(time.Hour - time.Second)},
		"the least life":                {ttl: 5 * time.Second, tick: 900 * time.Millisecond, from: at(-5 * time.Minute), to: at(4 * time.Second)},
		"least life above the grant":    {ttl: 5 * time.Second, least: time.Minute, from: at(-5 * time.Minute), to: at(4 * time.Second)},
		"the intermediate ends first":   {ttl: day, intermediate: ends(time.Hour), from: at(-5 * time.Minute), to: at(time.Hour)},
		"the root ends first":           {ttl: day, root: ends(time.Hour), from: at(-5 * time.Minute), to: at(time.Hour)},
		"ends just then":                {ttl: time.Hour, root: ends(time.Hour - time.Second), from: at(-5 * time.Minute), to: at(time.Hour - time.Second)},
		"began just now":                {ttl: time.Hour, intermediate: begins(0), from: at(0), to: at(time.Hour - time.Second)},
		"the root began last":           {ttl: time.Hour, root: begins(-time.Minute), from: at(-time.Minute), to: at(time.Hour - time.Second)},
		"just useful":                   {ttl: day, least: 15 * time.Second, intermediate: ends(14 * time.Second), from: at(-5 * time.Minute), to: at(14 * time.Second)},
		"not useful": {
			ttl: day, least: 15 * time.Second, intermediate: ends(13 * time.Second),
			refused: "cannot sign for spiffe://example.org/ns/shop/sa/web: issuer east-1 expires in 14s, less than the minimum useful life 15s; ",
		},
		"not useful because of the root": {ttl: day, root: ends(3 * time.Second), refused: `above issuer east-1 expires in 4s, less than the minimum useful life 5s; `},
		"a short grant cut short":        {ttl: 8 * time.Second, least: time.Minute, intermediate: ends(5 * time.Second), refused: "expires in 6s, less than the minimum useful life 8s"},
		"expired":                        {ttl: day, tick: 2 * time.Second, intermediate: ends(time.Second), refused: "issuer east-1 expired at 2026-11-21T12:00:01Z, and it is 2026-11-21T12:00:02Z; "},
		"root expired":                   {ttl: day, tick: 2 * time.Second, root: ends(time.Second), refused: "above issuer east-1 expired at 2026-11-21T12:00:01Z, and it is 2026-11-21T12:00:02Z; "},
		"not yet valid":                  {ttl: day, intermediate: begins(time.Minute), refused: "issuer east-1 is not valid before 2026-11-21T12:01:00Z, and it is 2026-11-21T12:00:00Z; "},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(o *worldOptions) {
				o.ttl = tc.ttl
				if tc.root != nil {
					o.root = tc.root
				}
				if tc.intermediate != nil {
					o.intermediate = tc.intermediate
				}
				o.config = func(c *Config) { c.Backdate, c.MinUsefulLife = tc.backdate, tc.least }
			})
			w.now = noon.Add(tc.tick)
			if tc.refused != "" {
				if got := w.refused(w.grant("web"), ReasonNoIssuer); !strings.Contains(got, tc.refused) {
					t.Errorf("%q\nlacks %q", got, tc.refused)
				}
				if len(w.log.entries) != 0 {
					t.Error("a refusal is in the log")
				}
				return
			}
			leaf, cert := w.issue(w.grant("web"))
			if !cert.NotBefore.Equal(tc.from) || !cert.NotAfter.Equal(tc.to) {
				t.Errorf("valid %s to %s, want %s to %s", leaf.NotBefore, leaf.NotAfter, tc.from, tc.to)
			}
			goAccepts(t, leaf, cert, w.root)
		})
	}
}

func TestTenThousandLeaves(t *testing.T) {
	const calls, each = 100, 100
	const ttl = 10 * time.Minute
	w := newWorld(t, func(o *worldOptions) { o.ttl = ttl })
	for n := range each {
		w.register(fmt.Sprint("w", n), fmt.Sprintf("spiffe://example.org/ns/%d/sa/y%s", n, strings.Repeat("y", n)), ttl)
	}
	serials := make(map[string]bool, calls*each)
	verified := 0
	for range calls {
		grants := make([]*identity.Grant, each)
		for n := range grants {
			grants[n] = w.grant(fmt.Sprint("w", n))
		}
		for n, r := range w.authority.Issue(context.Background(), grants) {
			if r.Err != nil {
				t.Fatal(r.Err)
			}
			cert, err := x509.ParseCertificate(r.Leaf.Chain[0])
			if err != nil {
				t.Fatal(err)
			}
			if serials[string(r.Leaf.Serial)] {
				t.Fatalf("serial %x twice", r.Leaf.Serial)
			}
			serials[string(r.Leaf.Serial)] = true
			if life := cert.NotAfter.Sub(noon) + time.Second; life > ttl {
				t.Fatalf("lives %s, granted was %s", life, ttl)
			}
			if sans := len(cert.URIs) + len(cert.DNSNames) + len(cert.EmailAddresses) + len(cert.IPAddresses); sans != 1 || len(cert.URIs) != 1 ||
				cert.URIs[0].String() != w.directory[fmt.Sprint("w", n)].ID.String() {
				t.Fatalf("names %v", cert.URIs)
			}
			if r.Leaf.Serial[0]&7 == 0 {
				verified++
				if err := cert.CheckSignatureFrom(w.mesh.Certificate()); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if len(serials) != calls*each || verified == 0 {
		t.Errorf("%d serials, %d signatures verified", len(serials), verified)
	}
}

func TestIssuersMayChangeWhileOthersIssue(t *testing.T) {
	w := newWorld(t)
	next := w.meshConfig
	next.Name = "east-2"
	second, err := NewIssuer(next)
	if err != nil {
		t.Fatal(err)
	}
	var issuing, changing sync.WaitGroup
	done := make(chan struct{})
	changing.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-done:
				return
			default:
			}
			mesh := w.mesh
			if n%2 == 0 {
				mesh = second
			}
			if err := w.authority.issuers.Replace(mesh, w.control); err != nil {
				t.Error(err)
			}
		}
	})
	for range 8 {
		issuing.Go(func() {
			for range 20 {
				for _, r := range w.authority.Issue(context.Background(), []*identity.Grant{w.grant("web"), w.serverGrant()}) {
					if r.Err != nil {
						t.Error(r.Err)
					}
				}
			}
		})
	}
	issuing.Wait()
	close(done)
	changing.Wait()
	if n := len(w.log.entries); n != 8*20*2 {
		t.Errorf("%d entries", n)
	}
}

func TestAKeyThatFailsIsToldAndCounted(t *testing.T) {
	away := errors.New("the token was removed")
	registry := prometheus.NewPedanticRegistry()
	w := newWorld(t, func(o *worldOptions) { o.config = func(c *Config) { c.Metrics = registry } })
	w.meshKey.fail = away
	results := w.authority.Issue(context.Background(), []*identity.Grant{w.grant("web"), w.serverGrant()})
	if !errors.Is(results[0].Err, away) || !strings.Contains(results[0].Err.Error(), "with key memory:east@1 of issuer east-1: the token was removed") {
		t.Errorf("%v", results[0].Err)
	}
	if results[1].Err != nil {
		t.Errorf("another issuer's item failed too: %v", results[1].Err)
	}
	if err := testutil.GatherAndCompare(registry, strings.NewReader(`
# HELP signet_logged_not_released_total Certificates that are in the log but were never released, because signing failed.
# TYPE signet_logged_not_released_total counter
signet_logged_not_released_total 1
# HELP signet_sign_errors_total Signatures that an issuer's key refused or got wrong.
# TYPE signet_sign_errors_total counter
signet_sign_errors_total{backend="memory"} 1
`), "signet_logged_not_released_total", "signet_sign_errors_total"); err != nil {
		t.Error(err)
	}
}

func TestAWrongSignatureOfARemoteKeyIsNeverReleased(t *testing.T) {
	w := newWorld(t, func(o *worldOptions) { o.remote = true })
	w.meshKey.flip = true
	for range 20 {
		if got := w.refused(w.grant("web"), ReasonSign); !strings.Contains(got, "the signature it gave is wrong") {
			t.Fatal(got)
		}
	}
	w.meshKey.flip = false
	w.issue(w.grant("web"))
}

func TestASignatureThatFailedIsToldOfUntilTheNextOrForAMinute(t *testing.T) {
	w := newWorld(t, func(o *worldOptions) { o.remote = true })
	first := w.now
	bad := func() bool {
		if _, err := w.authority.Unsigned(identity.ControlPlane); err != nil {
			t.Error(err)
		}
		since, err := w.authority.Unsigned(identity.Mesh)
		if err != nil && !since.Equal(first) {
			t.Errorf("since %s, and the first failed at %s", since, first)
		}
		return err != nil && strings.Contains(err.Error(), "the signature it gave is wrong")
	}
	w.meshKey.flip = true
	w.refused(w.grant("web"), ReasonSign)
	w.now = w.now.Add(time.Second)
	w.refused(w.grant("web"), ReasonSign)
	w.issue(w.serverGrant()) // another key
	if !bad() {
		t.Error("nothing is told")
	}
	w.meshKey.flip = false
	w.issue(w.grant("web"))
	if bad() {
		t.Error("it is told of after a good one")
	}
	w.meshKey.flip = true
	w.refused(w.grant("web"), ReasonSign)
	w.now = w.now.Add(time.Minute)
	if bad() {
		t.Error("it is told of for ever")
	}
}

// seenKey is a key that can be looked at.
type seenKey struct {
	*signerKey
	looked error
}

func (k *seenKey) Look(context.Context) error { return k.looked }

// TestAKeyThatIsGoneIsToldOfUntilItIsBack although nobody asks it for a signature.
func TestAKeyThatIsGoneIsToldOfUntilItIsBack(t *testing.T) {
	w := newWorld(t, func(o *worldOptions) { o.remote = true })
	key := &seenKey{signerKey: w.meshKey}
	c := w.meshConfig
	c.Key = key
	mesh, err := NewIssuer(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.authority.issuers.Replace(mesh, w.control); err != nil {
		t.Fatal(err)
	}
	look := func(want string) time.Time {
		t.Helper()
		w.authority.Look(t.Context())
		if _, err := w.authority.Unsigned(identity.ControlPlane); err != nil {
			t.Error(err)
		}
		since, err := w.authority.Unsigned(identity.Mesh)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("told of: %v, want %q", err, want)
		}
		return since
	}
	look("")
	key.looked = fmt.Errorf("nobody is there: %w", keystore.ErrAway)
	look("") // the key may be well
	begun := w.now
	key.looked = errors.New("it was deleted")
	look("it was deleted")
	w.now = w.now.Add(time.Hour)
	if since := look("it was deleted"); !since.Equal(begun) {
		t.Errorf("since %s, want %s", since, begun)
	}
	key.looked = fmt.Errorf("nobody is there: %w", keystore.ErrAway)
	look("it was deleted") // as far as is known
	key.looked = nil
	look("")

	// A signature that fails says more than a look, for a while.
	key.flip = true
	w.refused(w.grant("web"), ReasonSign)
	look("the signature it gave is wrong")
	key.looked = errors.New("it was deleted")
	w.now = w.now.Add(time.Minute)
	look("the signature it gave is wrong")
	key.looked, key.flip = nil, false
	look("")
	// One that was away is known to be back as soon as it answers.
	key.fail = fmt.Errorf("overloaded: %w", keystore.ErrAway)
	w.refused(w.grant("web"), ReasonSign)
	w.now = w.now.Add(time.Hour)
	key.looked = fmt.Errorf("overloaded: %w", keystore.ErrAway)
	look("overloaded")
	key.looked = nil
	look("")
}

func TestNothingIsLoggedForAKeyThatIsAway(t *testing.T) {
	w := newWorld(t, func(o *worldOptions) { o.remote = true })
	w.meshKey.away = errors.New("nobody is there")
	for range 20 {
		if got := w.refused(w.grant("web"), ReasonSign); !strings.Contains(got, "can't sign now: nobody is there") {
			t.Fatal(got)
		}
	}
	if n := len(w.log.entries); n != 0 {
		t.Errorf("the log has %d entries of what nobody got", n)
	}
	w.issue(w.serverGrant()) // another key
	w.meshKey.away = nil
	w.issue(w.grant("web"))
}

func TestARemoteKeyIsAskedForAllOfACallAtOnce(t *testing.T) {
	const n = 50
	w := newWorld(t, func(o *worldOptions) { o.remote = true })
	w.meshKey.gate = &sync.WaitGroup{}
	w.meshKey.gate.Add(n)
	grants := make([]*identity.Grant, n)
	for i := range grants {
		grants[i] = w.grant("web")
	}
	for i, r := range w.authority.Issue(t.Context(), grants) {
		if r.Err != nil {
			t.Fatalf("item %d: %v", i, r.Err)
		}
		if leaf, err := x509.ParseCertificate(r.Leaf.Chain[0]); err != nil || !bytes.Equal(leaf.RawTBSCertificate, w.log.entries[i].GetCertificateIssued().Tbs) {
			t.Errorf("item %d is not what stands in its entry (%v)", i, err)
		}
	}
}

func TestAWrongSignatureOfAnOwnKeyIsFoundBySample(t *testing.T) {
	w := newWorld(t)
	w.meshKey.flip = true
	found := 0
	for range 40 {
		grants := make([]*identity.Grant, 100)
		for n := range grants {
			grants[n] = w.grant("web")
		}
		for _, r := range w.authority.Issue(context.Background(), grants) {
			switch {
			case r.Err != nil:
				found++
			case sampled(r.Leaf.Serial):
				t.Fatal("a sampled signature was not checked")
			}
		}
	}
	if found == 0 { // (255/256)^4000 ≈ 2e-7
		t.Error("4000 wrong signatures and none was found")
	}
}

func TestTheHierarchiesNeverMeet(t *testing.T) {
	w := newWorld(t)
	// A grant of another trust domain, honestly got there.
	abroad, err := identity.NewAuthorizer(identity.Policy{
		TrustDomain: spiffeid.RequireTrustDomainFromString("other.org"), Cluster: "east",
		DefaultTTL: time.Hour, MaxTTL: time.Hour, ControlTTL: time.Hour,
	}, w.directory)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := abroad.Authorize(context.Background(), identity.AsServer("east-1"), identity.ControlAsk{Key: leafKey()})
	if err != nil {
		t.Fatal(err)
	}
	if got := w.refused(foreign, ReasonBadGrant); !strings.Contains(got, "issuer control-1 is of trust domain example.org") {
		t.Error(got)
	}
	if len(w.log.entries) != 0 {
		t.Error("a refusal is in the log")
	}
	leaf, cert := w.issue(w.serverGrant())
	if err := cert.CheckSignatureFrom(w.control.Certificate()); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(leaf.Chain[len(leaf.Chain)-1], w.control.Certificate().Raw) {
		t.Error("the control CA is not in the chain that an agent pins")
	}
	if err := w.authority.issuers.Replace(w.control); err != nil {
		t.Fatal(err)
	}
	if got := w.refused(w.grant("web"), ReasonNoIssuer); !strings.Contains(got, "no issuer of the mesh hierarchy is active") {
		t.Error(got)
	}
}

// Authorize gives no such grant; the issuer holds all the same.
func TestAnIssuerGivesNoNameThatIsNotItsToGive(t *testing.T) {
	w := newWorld(t)
	const web = "spiffe://example.org/ns/shop/sa/web"
	const agent = "spiffe://example.org/signet/cluster/east/agent/node-1"
	selectors := func(n int) (all []identity.Selector) {
		for range n {
			all = append(all, identity.Selector("unix:path:/"+strings.Repeat("p", 1000)))
		}
		return all
	}
	for _, tc := range []struct {
		issuer    *Issuer
		id        string
		selectors []identity.Selector
		want      string // empty: may
	}{
		{issuer: w.mesh, id: web},
		{issuer: w.control, id: agent},
		{issuer: w.mesh, id: agent, want: "issuer east-1 of the mesh hierarchy may not give that name"},
		{issuer: w.control, id: web, want: "issuer control-1 of the control hierarchy may not give that name"},
		{issuer: w.mesh, id: "spiffe://other.org/ns/shop/sa/web", want: "issuer east-1 is of trust domain example.org"},
		{issuer: w.mesh, id: "spiffe://example.org", want: "not the SPIFFE ID of a workload"},
		{issuer: w.mesh, id: "spiffe://example.org/" + strings.Repeat("l", 2048), want: "not the SPIFFE ID of a workload"},
		{issuer: w.mesh, id: web, selectors: selectors(32)},
		{issuer: w.mesh, id: web, selectors: selectors(33), want: "instance and selectors take 33363 bytes"},
	} {
		err := tc.issuer.mayName(identity.Terms{ID: spiffeid.RequireFromString(tc.id), Evidence: identity.Evidence{Selectors: tc.selectors}})
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s asked for %.60s: %v, want %q", tc.issuer.Name(), tc.id, err, tc.want)
		}
	}
}

func TestAnAuthorityRefusesWhatContradictsItself(t *testing.T) {
	set, err := NewIssuers()
	if err != nil {
		t.Fatal(err)
	}
	for want, c := range map[string]Config{
		"no issuers":           {Log: &memoryLog{}},
		"no log":               {Issuers: set},
		"backdate of 2h0m0s":   {Issuers: set, Log: &memoryLog{}, Backdate: 2 * time.Hour},
		"backdate of -1s":      {Issuers: set, Log: &memoryLog{}, Backdate: -time.Second},
		"useful life of -1s: ": {Issuers: set, Log: &memoryLog{}, MinUsefulLife: -time.Second},
	} {
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %q", err, want)
		}
	}
	registry := prometheus.NewRegistry()
	for n := range 2 {
		_, err := New(Config{Issuers: set, Log: &memoryLog{}, Metrics: registry})
		if (err != nil) != (n == 1) {
			t.Errorf("authority %d on one registry: %v", n+1, err)
		}
	}
}

func TestMetricsAreThereFromTheStart(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	w := newWorld(t, func(o *worldOptions) { o.config = func(c *Config) { c.Metrics = registry } })
	text := func(issued int) string {
		return fmt.Sprintf(`
# HELP signet_ca_info Issuers; always 1.
# TYPE signet_ca_info gauge
signet_ca_info{alg="ecdsa-p256",backend="memory",issuer="control-1",kind="control",state="active"} 1
signet_ca_info{alg="ecdsa-p256",backend="memory",issuer="east-1",kind="intermediate",state="active"} 1
# HELP signet_ca_not_after_timestamp_seconds When the issuer's chain, its root included, ceases to be valid.
# TYPE signet_ca_not_after_timestamp_seconds gauge
signet_ca_not_after_timestamp_seconds{issuer="control-1",kind="control",state="active"} 1.803038400e+09
signet_ca_not_after_timestamp_seconds{issuer="east-1",kind="intermediate",state="active"} 1.803038400e+09
# HELP signet_ca_not_before_timestamp_seconds When the issuer's chain, its root included, becomes valid.
# TYPE signet_ca_not_before_timestamp_seconds gauge
signet_ca_not_before_timestamp_seconds{issuer="control-1",kind="control",state="active"} 1.795258800e+09
signet_ca_not_before_timestamp_seconds{issuer="east-1",kind="intermediate",state="active"} 1.795258800e+09
# HELP signet_svids_issued_total Certificates logged, signed and released.
# TYPE signet_svids_issued_total counter
signet_svids_issued_total{door="agent",issuer="control-1"} 0
signet_svids_issued_total{door="agent",issuer="east-1"} %d
signet_svids_issued_total{door="enrol",issuer="control-1"} 0
signet_svids_issued_total{door="self",issuer="control-1"} 0
# HELP signet_sign_errors_total Signatures that an issuer's key refused or got wrong.
# TYPE signet_sign_errors_total counter
signet_sign_errors_total{backend="memory"} 0
`, issued)
	}
	names := []string{"signet_ca_info", "signet_ca_not_after_timestamp_seconds", "signet_ca_not_before_timestamp_seconds", "signet_svids_issued_total", "signet_sign_errors_total"}
	if err := testutil.GatherAndCompare(registry, strings.NewReader(text(0)), names...); err != nil {
		t.Error(err)
	}
	w.issue(w.grant("web"))
	if err := testutil.GatherAndCompare(registry, strings.NewReader(text(1)), names...); err != nil {
		t.Error(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]uint64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if h := m.GetHistogram(); h != nil {
				counts[f.GetName()] += h.GetSampleCount()
			}
		}
	}
	if counts["signet_issue_duration_seconds"] != 1 || counts["signet_sign_duration_seconds"] != 1 {
		t.Errorf("histograms counted %v", counts)
	}
}
