package server

import (
	"crypto/x509"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

// believedBy is a set as a cluster tells it, with its digest.
func believedBy(t testing.TB, cluster string, roots ...TrustedRoot) Trust {
	t.Helper()
	var certs []*x509.Certificate
	for _, r := range roots {
		certs = append(certs, r.Certificate)
	}
	b, err := trust.NewBundle(td, 1, certs)
	must(t, err)
	return Trust{Cluster: cluster, Roots: roots, Digest: TrustDigest(b.Digest())}
}

// joiner is a cluster whose request is not signed yet; its peer is east.
type joiner struct {
	*cluster
	t   *testing.T
	csr []byte
}

func newJoiner(t *testing.T) *joiner {
	t.Helper()
	c := &cluster{name: "west", dir: shortDir(t), keys: keystore.NewMemory(), peers: []Peer{{Cluster: "east"}}}
	r, err := Init(t.Context(), InitConfig{Folder: c.folder(), Ceremony: byX509{}})
	must(t, err)
	return &joiner{c, t, r.CSR}
}

// install installs a chain under the root.
func (j *joiner) install(r *root, chain []byte, given Trust) (InstallResult, error) {
	return Install(j.t.Context(), InstallConfig{Folder: j.folder(), Rotation: j.config().Rotation, RootFingerprint: r.fingerprint(), Chain: chain, Trust: given})
}

// wantRoots checks which roots a folder believes.
func (j *joiner) wantRoots(want ...*root) {
	j.t.Helper()
	shown, err := Show(j.t.Context(), j.dir)
	must(j.t, err)
	var prints []string
	for _, r := range want {
		prints = append(prints, r.fingerprint())
	}
	slices.Sort(prints)
	if got := slices.Sorted(slices.Values(shown.Roots)); !slices.Equal(got, prints) {
		j.t.Errorf("the roots are %v, want %v", got, prints)
	}
}

func TestAClusterThatJoinsInTheMiddleBelievesWhatTheOthersBelieve(t *testing.T) {
	t.Parallel()
	a, b, old, expired := newRoot(t), newRoot(t), newRoot(t), newRoot(t)
	c := caTemplate("expired")
	c.MaxPathLen, c.MaxPathLenZero, c.NotAfter = 1, false, time.Now().Add(-time.Minute)
	expired.cert = sign(t, c, c, expired.key.Public(), expired.key)
	set := believedBy(t, "east",
		TrustedRoot{Certificate: a.cert, State: ca.Active, Leaving: true},
		TrustedRoot{Certificate: b.cert, State: ca.Active},
		TrustedRoot{Certificate: old.cert, State: ca.Retired, Leaving: true},
		TrustedRoot{Certificate: expired.cert, State: ca.Retired, Leaving: true})
	j := newJoiner(t)
	chain := b.intermediate(t, j.csr, nil)
	first, err := j.install(b, chain, set)
	must(t, err)
	if len(first.Done) == 0 || first.State != ca.Active {
		t.Errorf("installed: %+v", first)
	}
	j.wantRoots(a, b, old)
	again, err := j.install(b, chain, set)
	must(t, err)
	if len(again.Done)+len(again.Taken) > 0 {
		t.Error("the same again changes something")
	}

	// The server goes on with it: what leaves stays until east has said that it needs it no more.
	s := j.start(t, nil)
	for r, want := range map[*root]ca.State{a: ca.Retired, b: ca.Active, old: ca.Retired} {
		if got := s.state(r.id()); got != want {
			t.Errorf("%s is %s, want %s", r.id(), got, want)
		}
	}
	if _, ok := s.keeper.current.Load().row(expired.id()); ok {
		t.Error("an expired root was taken in")
	}
	j.ahead.Store(int64(3 * time.Hour)) // what was promised to east is over
	_, err = s.keeper.do(t.Context(), scheduled(), nil)
	must(t, err)
	if got := s.state(a.id()); got != ca.Retired {
		t.Errorf("without a word of east %s is %s", a.id(), got)
	}
}

func TestASetThatIsNotAsItWasSentIsRefused(t *testing.T) {
	t.Parallel()
	a, b, foreign := newRoot(t), newRoot(t), newRoot(t)
	c := caTemplate("root of another domain")
	c.MaxPathLen, c.MaxPathLenZero = 1, false
	c.URIs = []*url.URL{spiffeid.RequireTrustDomainFromString("other.org").ID().URL()}
	other := newRoot(t)
	other.cert = sign(t, c, c, other.key.Public(), other.key)
	childless := newRoot(t)
	none := caTemplate("root that allows no intermediate")
	childless.cert = sign(t, none, none, childless.key.Public(), childless.key)
	rootA, rootB := TrustedRoot{Certificate: a.cert, State: ca.Active, Leaving: true}, TrustedRoot{Certificate: b.cert, State: ca.Active}
	good := believedBy(t, "east", rootA, rootB)
	with := func(change func(*Trust)) Trust {
		x := good
		x.Roots = slices.Clone(good.Roots)
		change(&x)
		return x
	}
	j := newJoiner(t)
	under := map[*root][]byte{a: a.intermediate(t, j.csr, nil), b: b.intermediate(t, j.csr, nil), foreign: foreign.intermediate(t, j.csr, nil)}
	for _, bad := range []struct {
		what  string
		under *root
		set   Trust
		want  []string
	}{
		{"a root was added", b, with(func(x *Trust) { x.Roots = append(x.Roots, TrustedRoot{Certificate: foreign.cert, State: ca.Active}) }), []string{"a root was added", "cluster east"}},
		{"a root is missing", b, with(func(x *Trust) { x.Roots = x.Roots[1:] }), []string{"left out"}},
		{"another set's digest", b, with(func(x *Trust) { x.Digest = believedBy(t, "east", rootB).Digest }), []string{good.Digest}},
		{"no digest", b, with(func(x *Trust) { x.Digest = "" }), []string{"SHA256: and 64"}},
		{"no roots", b, with(func(x *Trust) { x.Roots = nil }), []string{"no root"}},
		{"another trust domain", b, believedBy(t, "east", rootB, TrustedRoot{Certificate: other.cert, State: ca.Active}), []string{"other.org"}},
		{"a root that allows no intermediate", b, believedBy(t, "east", rootB, TrustedRoot{Certificate: childless.cert, State: ca.Published}), []string{"path length of 0"}},
		{"a removed root", b, believedBy(t, "east", rootB, TrustedRoot{Certificate: a.cert, State: ca.Removed}), []string{`"removed"`}},
		{"a cluster's name that is none", b, with(func(x *Trust) { x.Cluster = "East one" }), []string{"cluster"}},
		{"no such peer", b, with(func(x *Trust) { x.Cluster = "north" }), []string{"rotation.peers", a.id()}},
		{"under a root that leaves", a, good, []string{a.id(), "being removed", "signed by " + b.id(), b.fingerprint()}},
		{"under a retired root", a, believedBy(t, "east", TrustedRoot{Certificate: a.cert, State: ca.Retired}, rootB), []string{"being removed", "signed by " + b.id()}},
		{"under a tainted root", a, believedBy(t, "east", TrustedRoot{Certificate: a.cert, State: ca.Active, Tainted: true}, rootB), []string{"is tainted", "signed by " + b.id()}},
		{"under a root that not all believe", b, believedBy(t, "east", rootA, TrustedRoot{Certificate: b.cert, State: ca.Published}), []string{"not believed by all", "signed by " + a.id(), a.fingerprint()}},
		{"while none may be signed under", b, believedBy(t, "east", TrustedRoot{Certificate: a.cert, State: ca.Active, Leaving: true, Tainted: true}, TrustedRoot{Certificate: b.cert, State: ca.Published}), []string{"not believed by all", "wait until one is active"}},
		{"under a root that is not in the set", foreign, good, []string{"is not believed", "signed by " + b.id()}},
	} {
		_, err := j.install(bad.under, under[bad.under], bad.set)
		if err == nil {
			t.Fatalf("%s: installed", bad.what)
		}
		for _, word := range bad.want {
			wantError(t, err, word)
		}
		if text := err.Error(); len(text) > 600 || strings.Contains(text, "\n") {
			t.Errorf("%s: not one sentence: %s", bad.what, text)
		}
	}
	j.wantRoots()
	_, err := j.install(b, under[b], good)
	must(t, err)
	j.wantRoots(a, b)
}

func TestARunningServerTakesWhatAnotherClusterBelieves(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "west")
	c.peers = []Peer{{Cluster: "east"}}
	s := c.start(t, nil)
	a, old := c.root, newRoot(t)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(t, err)
	set := believedBy(t, "east", TrustedRoot{Certificate: a.cert, State: ca.Active}, TrustedRoot{Certificate: old.cert, State: ca.Retired})
	request := &adminv1.InstallAuthoritiesRequest{
		Chains: a.intermediate(t, started.Requests[0].Csr, nil), RootFingerprint: a.fingerprint(),
		Trust: &adminv1.TrustSet{Cluster: "east", Digest: set.Digest, Roots: []*adminv1.TrustedRoot{{Certificate: a.cert.Raw, State: "active"}}},
	}
	if _, err := s.rotations().InstallAuthorities(t.Context(), request); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a root is missing: %v", err)
	}
	request.Trust.Roots = append(request.Trust.Roots, &adminv1.TrustedRoot{Certificate: []byte("x"), State: "retired"})
	if _, err := s.rotations().InstallAuthorities(t.Context(), request); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no certificate: %v", err)
	}
	request.Trust.Roots[1].Certificate = old.cert.Raw
	done, err := s.rotations().InstallAuthorities(t.Context(), request)
	must(t, err)
	if !done.Changed || s.state(old.id()) != ca.Retired || s.state("intermediate-2") != ca.Active || len(s.keeper.current.Load().bundle.Roots()) != 2 {
		t.Errorf("%s is %s, intermediate-2 is %s: %v", old.id(), s.state(old.id()), s.state("intermediate-2"), done)
	}
	again, err := s.rotations().InstallAuthorities(t.Context(), request)
	must(t, err)
	if again.Changed {
		t.Error("the same again changes something")
	}
	// What is known here stays as it is, whatever the set says.
	if lives := s.keeper.current.Load().lives(); slices.ContainsFunc(lives, func(x rotation.Authority) bool {
		return x.ID == a.id() && (x.State != ca.Active || !x.Leaving.IsZero())
	}) {
		t.Errorf("the root in use was changed: %v", lives)
	}
}

func TestAClusterWithPeersDoesNotBeginBlindly(t *testing.T) {
	t.Parallel()
	a, b := newRoot(t), newRoot(t)
	set := believedBy(t, "east", TrustedRoot{Certificate: a.cert, State: ca.Active}, TrustedRoot{Certificate: b.cert, State: ca.Published})
	install := func(j *joiner, r *root, change func(*InstallConfig)) (InstallResult, error) {
		c := InstallConfig{Folder: j.folder(), Rotation: j.config().Rotation, RootFingerprint: r.fingerprint(), Chain: r.intermediate(t, j.csr, nil)}
		if change != nil {
			change(&c)
		}
		return Install(t.Context(), c)
	}
	for _, dry := range []bool{true, false} {
		j := newJoiner(t)
		_, err := install(j, b, func(c *InstallConfig) { c.DryRun = dry })
		for _, word := range []string{"cluster west", "east may believe", "signet trust export", "--trust", "--first"} {
			wantError(t, err, word)
		}
		j.wantRoots()
	}

	// With a set it has to fit that.
	j := newJoiner(t)
	_, err := install(j, b, func(c *InstallConfig) { c.Trust = set })
	wantError(t, err, "not believed by all agents yet")
	_, err = install(j, a, func(c *InstallConfig) { c.Trust = set })
	must(t, err)
	j.wantRoots(a, b)
	// It has begun, so the same again needs no word.
	again, err := j.install(a, chainOf(t, j), Trust{})
	must(t, err)
	if len(again.Done)+len(again.Taken) > 0 {
		t.Error("the same again changes something")
	}

	// The first one says so, and the log keeps it.
	j = newJoiner(t)
	first, err := install(j, a, func(c *InstallConfig) { c.First = true })
	must(t, err)
	if first.State != ca.Active {
		t.Errorf("installed: %+v", first)
	}
	j.wantRoots(a)
	if len(distinct(t, j.cluster, func(e *auditv1.Entry) bool {
		return strings.Contains(e.GetAuthorityChanged().GetReason(), "no other cluster serves yet, an admin says")
	})) == 0 {
		t.Error("the log does not say that it is the first")
	}
	// Without peers there is nobody to ask.
	j = newJoiner(t)
	j.peers = nil
	if _, err = install(j, a, nil); err != nil {
		t.Error(err)
	}
}

// chainOf is the chain that a folder has, root last.
func chainOf(t *testing.T, j *joiner) []byte {
	t.Helper()
	s := j.start(t, nil)
	defer s.stop()
	return ca.EncodeChain(s.keeper.current.Load().chains["intermediate-1"]...)
}

// East and west wait for north with the new root, since they name it, and north can begin under no root but the old one.
func TestAClusterThatIsNamedBeforeItJoinsDoesNotHoldARotationUpForEver(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	north := &joiner{&cluster{name: "north", dir: shortDir(t), root: east.root, keys: keystore.NewMemory()}, t, nil}
	asked, err := Init(t.Context(), InitConfig{Folder: north.folder(), Ceremony: byX509{}})
	must(t, err)
	north.csr = asked.CSR
	acquaint(t, east, west, north.cluster)
	a, b := east.root, newRoot(t)
	e, w := east.start(t, nil), west.start(t, nil)
	all := []*live{e, w}
	name := func(l *live) string { return l.keeper.folder.Cluster }
	under := func(l *live) string {
		active, _ := l.keeper.current.Load().activeRoot()
		return active.ID
	}
	// carry brings each report to everybody, one by one, and looks after each whether everybody believes whom it may meet.
	carry := func() {
		t.Helper()
		for _, from := range all {
			for _, to := range all {
				if from == to {
					continue
				}
				tell(t, from, to)
				for _, signs := range all {
					for _, meets := range all {
						if !slices.ContainsFunc(meets.keeper.current.Load().bundle.Roots(), func(r *x509.Certificate) bool { return rootID(r) == under(signs) }) {
							t.Fatalf("%s signs under %s, which %s does not believe", name(signs), under(signs), name(meets))
						}
					}
				}
			}
		}
	}
	for _, l := range all {
		l.signed(b, l.startRoot(b), nil)
	}
	carry()
	if e.state(b.id()) != ca.Published || w.state(b.id()) != ca.Published {
		t.Fatal("the new root is used although nothing is known of north")
	}

	set := believedBy(t, "east", TrustedRoot{Certificate: a.cert, State: e.state(a.id()), Leaving: true}, TrustedRoot{Certificate: b.cert, State: e.state(b.id())})
	_, err = north.install(b, b.intermediate(t, north.csr, nil), set)
	wantError(t, err, "not believed by all agents yet")
	wantError(t, err, "signed by "+a.id())
	_, err = north.install(a, a.intermediate(t, north.csr, nil), set)
	must(t, err)
	north.wantRoots(a, b)
	n := north.start(t, nil)
	if n.state("intermediate-1") != ca.Active || n.state(a.id()) != ca.Active || n.state(b.id()) != ca.Published {
		t.Fatalf("north signs under %s, %s is %s", under(n), b.id(), n.state(b.id()))
	}
	all = append(all, n)
	carry()
	for _, l := range all[:2] {
		if l.state("intermediate-2") != ca.Active || l.state(a.id()) != ca.Retired {
			t.Fatalf("%s: the new issuer is %s, the old root %s, although north believes the new one", name(l), l.state("intermediate-2"), l.state(a.id()))
		}
	}
	later := func(d time.Duration) {
		for _, c := range []*cluster{east, west, north.cluster} {
			c.ahead.Store(int64(d))
		}
	}
	later(26 * time.Hour)
	carry()
	if e.state(a.id()) != ca.Retired {
		t.Fatal("east drops the root under which north signs")
	}
	n.signed(b, n.startRoot(b), nil)
	carry()
	if n.state("intermediate-2") != ca.Active {
		t.Fatalf("north's new issuer is %s", n.state("intermediate-2"))
	}
	later(52 * time.Hour)
	carry()
	carry()
	for _, l := range all {
		if l.state(a.id()) != ca.Removed {
			t.Errorf("%s: the old root is %s", name(l), l.state(a.id()))
		}
	}
}
