package server

import (
	"slices"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/server/shared"
)

// renewed is a new certificate of a root's key, as Vault's PKI engine renews one.
func (r *root) renewed(t testing.TB) *root {
	t.Helper()
	c := caTemplate("root")
	c.NotAfter = r.cert.NotAfter.Add(time.Hour)
	c.MaxPathLen, c.MaxPathLenZero = 1, false
	return &root{r.key, sign(t, c, c, r.key.Public(), r.key)}
}

// accepted names the CAs whose forged certificates somebody accepts, each with the cluster that says that its key is lost.
func (l *live) accepted() (ids []string) {
	l.t.Helper()
	st, err := l.rotations().RotationStatus(l.t.Context(), &adminv1.RotationStatusRequest{})
	must(l.t, err)
	for _, x := range st.Tainted {
		if x.Accepting > 0 {
			ids = append(ids, x.Id+" "+x.Cluster)
		}
	}
	slices.Sort(ids)
	return ids
}

func sorted(all ...string) []string { return slices.Sorted(slices.Values(all)) }

func TestATaintFollowsTheKeyAndNotTheCertificate(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	r := rehearse(t, c)
	a, fresh := c.root, newRoot(t)
	b := a.renewed(t)
	says := func(lines ...string) {
		t.Helper()
		for _, line := range lines {
			if !slices.Contains(r.said, line) {
				t.Errorf("nobody says %q; but\n%s", line, strings.Join(r.said, "\n"))
			}
		}
	}
	r.both("a renewed root", adds(b))
	says(b.id() + " added; it replaces no key, for it has that of " + a.id())
	r.both("the key is lost", taints(a.id()))
	says(a.id()+" tainted; it has the key of "+b.id(), b.id()+" tainted; it has the key of "+a.id())
	if row, _ := r.keeper.current.Load().row(b.id()); row.TaintReason != "stolen" || !row.Leaving.IsZero() {
		t.Errorf("the renewed root is %+v", row)
	}
	if want, got := sorted(a.id()+" east", b.id()+" east"), r.accepted(); !slices.Equal(got, want) {
		t.Errorf("accepted are %v", got)
	}
	again := a.renewed(t)
	for what, way := range map[string]write{"added": adds(again), "started": startsRoot(again)} {
		r.both("renewed once more", way)
		_, err := way(t.Context(), r.admin, true)
		wantError(t, err, again.id()+" has the key of "+a.id()+", which is tainted since")
		wantError(t, err, "make one with a new key (a root in Vault's PKI engine by generate/root, without key_ref)")
		if _, known := r.keeper.current.Load().row(again.id()); known {
			t.Errorf("%s, it is known", what)
		}
	}
	r.both("a root of another key", adds(fresh))
	says(fresh.id() + " added")

	// It is over when the last certificate of the key is.
	r.replaced(a, fresh)
	soon(t, "nobody accepts the other certificate", func() bool {
		r.both("the other certificate goes", advances(b.id(), true))
		return len(r.accepted()) == 0
	})
	if r.state(b.id()) != ca.Removed {
		t.Errorf("the other certificate is %s", r.state(b.id()))
	}
	// Peers hear of a lost root for good; status has said all when its certificates have ended.
	set, ended := r.keeper.current.Load(), b.cert.NotAfter.Add(time.Hour)
	if w := r.keeper.world(set, ended); len(w.Own.Tainted) != 2 || len(r.keeper.tainted(set, w, ended)) != 0 {
		t.Errorf("when both have ended: told %v, shown %v", w.Own.Tainted, r.keeper.tainted(set, w, ended))
	}
	must(t, r.stop())
	reasons := map[string]string{}
	for _, e := range distinct(t, c, func(e *auditv1.Entry) bool { return e.GetAuthorityChanged().GetVerb() == "taint" }) {
		if x := e.GetAuthorityChanged(); reasons[x.Authority] == "" {
			reasons[x.Authority] = x.Reason
		}
	}
	if reasons[a.id()] != "stolen; it has the key of "+b.id() || reasons[b.id()] != "stolen; it has the key of "+a.id() {
		t.Errorf("the log says %v", reasons)
	}
}

func TestAKeyThatAPeerHasLostIsLostHereToo(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	e, w := east.startWith(t, west), west.startWith(t, east)
	a := east.root
	b, later := a.renewed(t), a.renewed(t)
	add := func(r *root) error {
		_, err := adds(r)(t.Context(), w.rotations(), false)
		return err
	}
	must(t, add(b))
	e.taint(a.id())
	must(t, add(later)) // west has not heard of it
	tell(t, e, w)
	if want, got := sorted(a.id()+" east", b.id()+" west", later.id()+" west"), w.accepted(); !slices.Equal(got, want) {
		t.Errorf("in west accepted are %v, want %v", got, want)
	}
	wantError(t, add(a.renewed(t)), " has the key of "+a.id()+" of cluster east, which is tainted since")
	_, err := startsRoot(b)(t.Context(), w.rotations(), false)
	wantError(t, err, "the key of "+b.id()+", or one below it, is tainted since")

	// East learns what else has that key, and believes none of it.
	tell(t, w, e)
	if want, got := sorted(a.id()+" east", b.id()+" west", later.id()+" west"), e.accepted(); !slices.Equal(got, want) {
		t.Errorf("in east accepted are %v, want %v", got, want)
	}
	// The word of an admin in west covers all that west has of the key.
	w.taint(b.id())
	for _, r := range []*root{a, b, later} {
		if row, _ := w.keeper.current.Load().row(r.id()); row.Tainted.IsZero() {
			t.Errorf("%s is not tainted in west", r.id())
		}
	}
}

func TestAChainWithALostKeyIsRefused(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	c.peers = []Peer{{Cluster: "west"}}
	s := c.start(t, nil)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(t, err)
	s.keeper.mu.Lock()
	s.keeper.reports["west"] = rotation.Report{Cluster: "west", At: time.Now(), Tainted: []rotation.TaintReport{{ID: "intermediate-7", KeyFingerprint: started.Requests[0].KeyFingerprint, Since: time.Now()}}}
	s.keeper.mu.Unlock()
	_, err = installs(c.root, c.root.intermediate(t, started.Requests[0].Csr, nil))(t.Context(), s.rotations(), false)
	wantError(t, err, "in the chain of intermediate-2 has the key of intermediate-7 of cluster west, which is tainted since")
}

// What a set says to be tainted is believed as long as the others do; what it hides is not.
func TestASetBringsNoRootOnALostKey(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "west")
	c.peers = []Peer{{Cluster: "east"}}
	s := c.start(t, nil)
	a, b, old := c.root, newRoot(t), newRoot(t)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(t, err)
	chain := a.intermediate(t, started.Requests[0].Csr, nil)
	give := func(roots ...TrustedRoot) error {
		set := believedBy(t, "east", append(roots, TrustedRoot{Certificate: a.cert, State: ca.Active}, TrustedRoot{Certificate: b.cert, State: ca.Published})...)
		request := &adminv1.InstallAuthoritiesRequest{
			Chains: chain, RootFingerprint: a.fingerprint(), Trust: &adminv1.TrustSet{Cluster: "east", Digest: set.Digest},
		}
		for _, r := range set.Roots {
			request.Trust.Roots = append(request.Trust.Roots, &adminv1.TrustedRoot{Certificate: r.Certificate.Raw, State: string(r.State), Leaving: r.Leaving, Tainted: r.Tainted})
		}
		_, err := s.rotations().InstallAuthorities(t.Context(), request)
		return err
	}
	lost := TrustedRoot{Certificate: old.cert, State: ca.Active, Leaving: true, Tainted: true}
	hidden := old.renewed(t)
	wantError(t, give(lost, TrustedRoot{Certificate: hidden.cert, State: ca.Active}), "trusted roots of cluster east: "+hidden.id()+" has the key of "+old.id())
	must(t, give(lost, TrustedRoot{Certificate: hidden.cert, State: ca.Active, Leaving: true, Tainted: true}))
	wantError(t, give(TrustedRoot{Certificate: old.renewed(t).cert, State: ca.Active}), " has the key of "+old.id())
	if _, err := startsRoot(hidden)(t.Context(), s.rotations(), true); err == nil {
		t.Error("a rotation to a tainted root begins")
	}
	// A key that is in use here, too.
	must(t, give(TrustedRoot{Certificate: a.renewed(t).cert, State: ca.Retired, Tainted: true}))
	if row, _ := s.keeper.current.Load().row(a.id()); row.Tainted.IsZero() || row.TaintReason != "tainted in cluster east" {
		t.Errorf("the root in use is %+v", row)
	}
}

func TestTheSharedDocumentTaintsAKeyAndBringsNoneBack(t *testing.T) {
	t.Parallel()
	first, a := newRoot(t), newRoot(t)
	b := a.renewed(t)
	none := func(string) bool { return false }
	for what, gone := range map[string]bool{"believed": false, "removed": true} {
		east, west := newModelCluster(t, "east", first), newModelCluster(t, "west", first)
		acquainted(east, west)
		both := func() {
			var doc []shared.Root
			for range 2 {
				doc, _ = east.round(doc, none, 0)
				doc, _ = west.round(doc, none, 0)
			}
		}
		for _, r := range []*root{a, b} {
			west.decide(r, false)
		}
		both()
		if east.stands(b.id()) != shared.Believed {
			t.Fatal("east does not believe what west does")
		}
		if gone {
			east.decide(a, true)
			both()
			east.remove(a.id())
		}
		if !west.taint(a) {
			t.Fatal("west does not taint it")
		}
		both()
		for _, r := range []*root{a, b} {
			if row, _ := east.set.row(r.id()); row.Tainted.IsZero() {
				t.Errorf("with %s %s in east, %s is not tainted there", a.id(), what, r.id())
			}
		}
		if row, _ := east.set.row(first.id()); !row.Tainted.IsZero() {
			t.Error("a root of another key is tainted")
		}
	}

	// One of the same document, and of a cluster that has never known the tainted one.
	now := time.Now()
	north := newModelCluster(t, "north", first)
	says := rotation.Report{Cluster: "another", At: now, Until: now.Add(time.Hour), Roots: []rotation.RootReport{{ID: first.id()}, {ID: b.id()}}}
	north.told = map[string]rotation.Report{"another": says}
	listed := func(r *root, tainted bool) shared.Known {
		return shared.Known{Root: shared.Root{
			ID: r.id(), State: ca.Active, Tainted: tainted, Leaving: tainted, NotAfter: r.cert.NotAfter.UTC(), Fingerprint: r.fingerprint(),
			Certificate: string(ca.EncodeChain(r.cert)), Decision: 1, By: "another",
		}}
	}
	set, refused := north.follow(north.set, north.world(), shared.Replica{listed(b, false), listed(a, true)}, now)
	if row, known := set.row(b.id()); known || len(refused) != 1 || !strings.Contains(refused[0].why.Error(), b.id()+" has the key of "+a.id()+" of cluster another") {
		t.Errorf("known %+v, refused %v", row, refused)
	}
	// One that leaves may be met still: it is believed for so long, as what it is.
	north.keeper.reports = map[string]rotation.Report{"another": {Cluster: "another", At: now, Tainted: []rotation.TaintReport{{ID: a.id(), KeyFingerprint: ca.KeyFingerprint(a.cert.RawSubjectPublicKeyInfo), Since: now}}}}
	leaves := listed(b, false)
	leaves.Leaving = true
	set, refused = north.follow(north.set, north.world(), shared.Replica{leaves}, now)
	if row, _ := set.row(b.id()); row.State != ca.Published || row.Tainted.IsZero() || len(refused) != 0 {
		t.Errorf("one that leaves is %+v, refused %v", row, refused)
	}
}
