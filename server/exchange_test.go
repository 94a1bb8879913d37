package server

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/server/shared"
)

// sharedPlace is an Exchange in memory.
type sharedPlace struct {
	mu   sync.Mutex
	docs map[string]sharedDoc
	// fail is what comes of any call; denied what comes of those for one document.
	fail   error
	denied map[string]error
	// before is called before the next write, which then finds what it has done.
	before func(name string)
	reads  int
}

type sharedDoc struct {
	text    []byte
	version uint64
}

type errAway string

func (e errAway) Error() string { return string(e) }
func (errAway) Away() bool      { return true }

func newSharedPlace() *sharedPlace {
	return &sharedPlace{docs: map[string]sharedDoc{}, denied: map[string]error{}}
}

func (p *sharedPlace) Read(_ context.Context, name string) ([]byte, uint64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reads++
	if err := errors.Join(p.fail, p.denied[name]); err != nil {
		return nil, 0, err
	}
	d := p.docs[name]
	return bytes.Clone(d.text), d.version, nil
}

func (p *sharedPlace) Write(_ context.Context, name string, text []byte, upon uint64) (bool, error) {
	p.mu.Lock()
	before := p.before
	p.before = nil
	p.mu.Unlock()
	if before != nil {
		before(name)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := errors.Join(p.fail, p.denied[name]); err != nil {
		return false, err
	}
	if p.docs[name].version != upon {
		return false, nil
	}
	p.docs[name] = sharedDoc{bytes.Clone(text), upon + 1}
	return true, nil
}

// put is somebody's write; nil deletes.
func (p *sharedPlace) put(name string, text []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.docs[name] = sharedDoc{text, p.docs[name].version + 1}
}

func (p *sharedPlace) get(name string) sharedDoc {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.docs[name]
}

func (p *sharedPlace) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

// acquaint lets clusters know each other.
func acquaint(t testing.TB, all ...*cluster) {
	t.Helper()
	for _, c := range all {
		c.peers = nil
		for _, p := range all {
			if p != c {
				info, err := Show(t.Context(), p.dir)
				must(t, err)
				c.peers = append(c.peers, Peer{Cluster: p.name, VerifierKey: info.LogVerifierKey})
			}
		}
	}
}

// share starts a server that shares.
func (c *cluster) share(t testing.TB, place Exchange) *live {
	t.Helper()
	conf := c.config()
	conf.Exchange = place
	s, err := New(t.Context(), conf)
	must(t, err)
	s.exchange.every = 20 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	l := &live{Server: s, t: t}
	l.stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() { must(t, l.stop()) })
	return l
}

// sharedTrust is the document, as tests ask it.
type sharedTrust struct{ shared.Trust }

// shared is the document, verified.
func (p *sharedPlace) shared(t testing.TB, c *cluster) sharedTrust {
	t.Helper()
	info, err := Show(t.Context(), c.dir)
	must(t, err)
	d := p.get(trustDocument)
	if d.text == nil {
		return sharedTrust{}
	}
	s, err := shared.Open(d.text, td, writers(append(slices.Clone(c.peers), Peer{Cluster: c.name, VerifierKey: info.LogVerifierKey})))
	must(t, err)
	return sharedTrust{s}
}

// reports writes what a cluster reports of roots, as if it had been made now.
func (p *sharedPlace) reports(t testing.TB, s *live, roots ...rotation.RootReport) {
	t.Helper()
	k := s.keeper
	note, err := k.signed(t.Context(), rotation.Report{
		Cluster: k.folder.Cluster, At: k.folder.Now().UTC(), Until: k.folder.Now().UTC().Add(k.policy.ReportLife), Roots: roots,
	})
	must(t, err)
	p.put(reportDocument(k.folder.Cluster), note)
}

// says is how the document has a root.
func (s sharedTrust) says(r *root) shared.Standing {
	i := slices.IndexFunc(s.Roots, func(x shared.Root) bool { return x.ID == r.id() })
	if i < 0 {
		return shared.Unknown
	}
	return s.Roots[i].Standing()
}

// leaves reports whether a root is on its way out.
func (l *live) leaves(r *root) bool {
	row, ok := l.keeper.current.Load().row(r.id())
	return ok && (!row.Leaving.IsZero() || row.State == ca.Removed)
}

// requested waits for the request for an intermediate.
func (l *live) requested() *adminv1.PendingRequest {
	l.t.Helper()
	var found *adminv1.PendingRequest
	soon(l.t, "a request for an intermediate", func() bool {
		for _, a := range l.keeper.current.Load().rows {
			if a.Kind == ca.KindIntermediate && a.State == ca.Prepared && len(a.Chain) == 0 {
				found = &adminv1.PendingRequest{Authority: a.ID, Csr: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: a.CSR})}
			}
		}
		return found != nil
	})
	return found
}

func (l *live) startRoot(r *root) *adminv1.PendingRequest {
	l.t.Helper()
	started, err := l.rotations().StartRotation(l.t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: r.cert.Raw, RootFingerprint: r.fingerprint()})
	must(l.t, err)
	return started.Requests[0]
}

// shares waits until readiness says something with all these words.
func (l *live) shares(level check.Level, words ...string) {
	l.t.Helper()
	var found check.Findings
	defer func() {
		if l.t.Failed() {
			l.t.Logf("findings: %+v", found)
		}
	}()
	soon(l.t, fmt.Sprintf("a finding with %q", words), func() bool {
		found = l.exchange.check(l.t.Context())
		return slices.ContainsFunc(found, func(f check.Finding) bool {
			for _, w := range words {
				if !strings.Contains(f.About+": "+f.Message, w) {
					return false
				}
			}
			return f.Level == level && f.Code == check.CodeShared && len(f.Stops) == 0
		})
	})
}

// well waits until there is nothing to find.
func (l *live) well() { l.t.Helper(); l.shares(check.OK, "was read at") }

func TestARotationOfTheRootIsFollowedWithoutFiles(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	acquaint(t, east, west)
	place := newSharedPlace()
	e, w := east.share(t, place), west.share(t, place)
	a, b := east.root, newRoot(t)
	e.well()
	w.well()

	e.signed(b, e.startRoot(b), nil) // the only command
	w.signed(b, w.requested(), nil)
	for name, s := range map[string]*live{"east": e, "west": w} {
		soon(t, name+" signs under the new root", func() bool { return s.state("intermediate-2") == ca.Active && s.state(a.id()) == ca.Retired })
	}
	soon(t, "one that joins now may be signed under the new root", func() bool {
		s := place.shared(t, east)
		return s.says(a) == shared.Leaving && s.says(b) == shared.Believed && slices.ContainsFunc(s.Roots, func(x shared.Root) bool { return x.ID == b.id() && x.State == ca.Active })
	})
	for _, c := range []*cluster{east, west} {
		c.ahead.Store(int64(26 * time.Hour)) // leaves have ended, and what was promised
	}
	soon(t, "both forget the old root", func() bool {
		return e.state(a.id()) == ca.Removed && w.state(a.id()) == ca.Removed
	})
	soon(t, "the old root is only remembered", func() bool { return place.shared(t, east).says(a) == shared.Removed })
	e.well()
	w.well()

	// When nothing happens, nothing is written.
	trust := place.get(trustDocument).version
	place.set(func() { place.reads = 0 })
	soon(t, "some rounds", func() bool {
		place.mu.Lock()
		defer place.mu.Unlock()
		return place.reads > 40
	})
	if got := place.get(trustDocument).version; got != trust {
		t.Errorf("version %d of the shared trust follows %d, and nothing has happened", got, trust)
	}
	rows := 0
	for _, row := range w.keeper.current.Load().rows {
		if row.Kind == ca.KindRoot {
			rows++
		}
	}
	if rows != 2 {
		t.Errorf("west knows %d roots", rows)
	}
}

func TestAClusterThatWasAwayFollowsAndRevivesNothing(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	acquaint(t, east, west)
	place := newSharedPlace()
	e, w := east.share(t, place), west.share(t, place)
	a, b := east.root, newRoot(t)
	e.well()
	w.well()
	old := place.get(trustDocument).text
	must(t, w.stop())

	e.signed(b, e.startRoot(b), nil)
	force := func(id string, want ca.State) {
		t.Helper()
		soon(t, id+" is "+string(want), func() bool {
			// One call forces one step, which may be one that needed no force.
			_, err := e.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Force: true, Authority: id})
			must(t, err)
			return e.state(id) == want
		})
	}
	force(b.id(), ca.Active)
	force("intermediate-2", ca.Active)
	soon(t, "the old root is retired", func() bool { return e.state(a.id()) == ca.Retired })
	force(a.id(), ca.Removed)
	soon(t, "it is told", func() bool { return place.shared(t, east).says(a) == shared.Leaving })
	// Vault was restored from an old copy, too.
	place.put(trustDocument, old)
	soon(t, "what is newer is written again", func() bool { return place.shared(t, east).says(a) == shared.Leaving })

	w = west.share(t, place)
	soon(t, "west believes the new root", func() bool { return w.state(b.id()) != "" })
	soon(t, "west lets the old one go", func() bool { return w.leaves(a) })
	w.well()
	if e.state(a.id()) != ca.Removed || place.shared(t, east).says(a) != shared.Leaving {
		t.Errorf("in east the old root is %s", e.state(a.id()))
	}
	w.signed(b, w.requested(), nil)
	soon(t, "west signs under the new root", func() bool { return w.state("intermediate-2") == ca.Active })
	for _, c := range []*cluster{east, west} {
		c.ahead.Store(int64(26 * time.Hour))
	}
	soon(t, "nobody has it any more", func() bool {
		return w.state(a.id()) == ca.Removed && place.shared(t, east).says(a) == shared.Removed
	})
}

func TestAnAbortAndATaintAreFollowed(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	acquaint(t, east, west)
	place := newSharedPlace()
	e, w := east.share(t, place), west.share(t, place)
	a, b := east.root, newRoot(t)
	e.well()
	w.well()
	e.startRoot(b)
	soon(t, "west follows", func() bool { return w.leaves(a) && w.state(b.id()) != "" })
	_, err := w.rotations().AbortRotation(t.Context(), &adminv1.AbortRotationRequest{Authority: b.id()})
	must(t, err)
	soon(t, "east follows the abort", func() bool { return e.leaves(b) && !e.leaves(a) })
	soon(t, "west has it so too", func() bool { return w.leaves(b) && !w.leaves(a) })

	_, err = e.rotations().TaintAuthority(t.Context(), &adminv1.TaintAuthorityRequest{Authority: a.id(), Reason: "it was copied"})
	must(t, err)
	soon(t, "west knows of the taint", func() bool {
		row, _ := w.keeper.current.Load().row(a.id())
		return !row.Tainted.IsZero() && row.TaintReason == taintedElsewhere
	})
}

func TestWithoutAutomaticStepsDecisionsAreFollowedAndStepsWait(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	west.manual = true
	acquaint(t, east, west)
	place := newSharedPlace()
	e, w := east.share(t, place), west.share(t, place)
	b := newRoot(t)
	e.well()
	w.well()
	e.startRoot(b)
	soon(t, "west follows", func() bool { return w.leaves(east.root) })
	if got := w.state(b.id()); got != ca.Prepared {
		t.Errorf("without a word of west's admin the new root is %s", got)
	}
}

func TestTwoThatWriteAtOnceLoseNothing(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	acquaint(t, east, west)
	place := newSharedPlace()
	e, w := east.start(t, nil), west.start(t, nil)
	ex := map[*live]*exchange{}
	for _, s := range []*live{e, w} {
		ex[s] = newExchange(s.keeper, place, s.audit.VerifierKey())
	}
	b, c := newRoot(t), newRoot(t)
	add := func(s *live, r *root) {
		t.Helper()
		_, err := s.rotations().AddTrust(t.Context(), &adminv1.AddTrustRequest{Root: r.cert.Raw, RootFingerprint: r.fingerprint()})
		must(t, err)
	}
	add(e, b)
	add(w, c)
	place.set(func() {
		place.before = func(string) { ex[w].round(t.Context()) }
	})
	ex[e].round(t.Context())
	if s := place.shared(t, east); s.says(b) != shared.Believed || s.says(c) != shared.Believed || s.Cluster != "east" {
		t.Errorf("written: %+v", s)
	}
	ex[w].round(t.Context())
	ex[e].round(t.Context()) // when it wrote, it had not read west's report
	if e.state(c.id()) == "" || w.state(b.id()) == "" {
		t.Error("they don't believe each other's roots")
	}

	// Somebody who is always quicker costs a finding, nothing else.
	ex[e].every = time.Hour
	add(e, newRoot(t))
	quick := 0
	var again func(string)
	again = func(name string) {
		quick++
		place.put(trustDocument, place.get(trustDocument).text)
		place.set(func() { place.before = again })
	}
	place.set(func() { place.before = again })
	_, err := ex[e].shareTrust(t.Context())
	wantError(t, err, "quicker")
	if quick != roundTries {
		t.Errorf("%d tries", quick)
	}
}

func TestWhatNoPeerHasSignedChangesNothing(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west, south := east.sibling(t, "west"), east.sibling(t, "south")
	acquaint(t, east, west)
	place := newSharedPlace()
	e, stranger := east.share(t, place), south.start(t, nil)
	w := west.start(t, nil)
	evil := newRoot(t)
	e.well()
	good := place.get(trustDocument).text
	signed := func(s *live, cluster, td string, roots ...shared.Root) []byte {
		text, err := shared.Trust{TrustDomain: td, Cluster: cluster, Roots: roots}.Encode()
		must(t, err)
		note, err := s.keeper.signNote(t.Context(), text)
		must(t, err)
		return note
	}
	x := sharedOf(evil, shared.Believed, 9, "south")
	report, err := w.keeper.signReport(t.Context())
	must(t, err)
	for what, bad := range map[string]struct {
		text []byte
		want string
	}{
		"garbage":                 {[]byte("{}"), "not signed by"},
		"a stranger's":            {signed(stranger, "south", td.Name(), x), "rotation.peers"},
		"a stranger's, as west's": {signed(stranger, "west", td.Name(), x), "not signed by"},
		"changed on its way":      {bytes.Replace(signed(w, "west", td.Name(), x), []byte(`"decision": 9`), []byte(`"decision": 8`), 1), "not signed by"},
		"a report":                {report, "no shared trust"},
		"another trust domain's":  {signed(w, "west", "other.org", x), "other.org"},
		"cut":                     {signed(w, "west", td.Name(), x)[:200], "not signed by"},
		"too long":                {bytes.Repeat([]byte("x"), shared.MaxSize+5000), "at most"},
	} {
		place.put(trustDocument, bad.text)
		version := place.get(trustDocument).version
		e.shares(check.Warning, "trust", "is not followed, and not replaced", fmt.Sprintf("version %d", version), bad.want, "since")
		if e.state(evil.id()) != "" || !bytes.Equal(place.get(trustDocument).text, bad.text) {
			t.Errorf("%s: the root is %q", what, e.state(evil.id()))
		}
		place.put(trustDocument, nil)
		soon(t, what+": after it was deleted it is written again", func() bool { return place.get(trustDocument).text != nil })
		e.well()
	}
	// The same with a good signature is followed, when its writer reports that it is no old one.
	place.put(trustDocument, signed(w, "west", td.Name(), x))
	e.shares(check.Warning, evil.id(), "cluster south", "of west there is none that holds")
	if e.state(evil.id()) != "" {
		t.Errorf("without a report the root is %q", e.state(evil.id()))
	}
	place.reports(t, w, rotation.RootReport{ID: evil.id()})
	soon(t, "what a peer has signed is followed", func() bool { return e.state(evil.id()) != "" })
	place.put(trustDocument, good)
	soon(t, "an older one is replaced", func() bool { return place.shared(t, east).says(evil) == shared.Believed })
}

func TestAWriterOfKVCanReplayNoRoot(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west, north := east.sibling(t, "west"), east.sibling(t, "north")
	acquaint(t, east, west, north)
	place := newSharedPlace()
	e, n := east.share(t, place), north.share(t, place)
	b := newRoot(t)
	e.well()
	n.well()
	e.startRoot(b)
	soon(t, "it is told, and followed", func() bool { return place.shared(t, east).says(b) == shared.Believed && n.state(b.id()) != "" })
	old := place.get(trustDocument).text
	_, err := e.rotations().AbortRotation(t.Context(), &adminv1.AbortRotationRequest{Authority: b.id()})
	must(t, err)
	soon(t, "it is taken back everywhere, and all have said so", func() bool {
		for _, s := range []*live{e, n} {
			name := s.keeper.folder.Cluster
			r, err := openReport(place.get(reportDocument(name)).text, Peer{Cluster: name, VerifierKey: s.audit.VerifierKey()}, td)
			must(t, err)
			i := slices.IndexFunc(r.Roots, func(x rotation.RootReport) bool { return x.ID == b.id() })
			if i < 0 || !r.Roots[i].Leaving {
				return false
			}
		}
		return true
	})

	// West begins now, and is shown the old document only; the reports are what they are.
	shown := newSharedPlace()
	w := west.start(t, nil)
	ex := newExchange(w.keeper, shown, w.audit.VerifierKey())
	for range 3 {
		shown.put(trustDocument, old)
		for _, name := range []string{"east", "north"} {
			shown.put(reportDocument(name), place.get(reportDocument(name)).text)
		}
		ex.round(t.Context())
	}
	if got := w.state(b.id()); got != "" {
		t.Errorf("by an old document the root is %s", got)
	}
	found := ex.check(t.Context())
	if !slices.ContainsFunc(found, func(f check.Finding) bool {
		return f.Level == check.Warning && f.About == b.id() && strings.Contains(f.Message, "the document may be an old one")
	}) {
		t.Errorf("findings: %+v", found)
	}
}

func TestADocumentThatCountsAheadIsLeftAlone(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	acquaint(t, east, west)
	place := newSharedPlace()
	e, w := east.share(t, place), west.start(t, nil)
	e.well()
	a, evil := east.root, newRoot(t)
	for _, x := range []shared.Root{sharedOf(a, shared.Removed, shared.MaxDecisions, "west"), sharedOf(evil, shared.Believed, shared.MaxJump+1, "east")} {
		text, err := shared.Trust{TrustDomain: td.Name(), Cluster: "west", Roots: []shared.Root{x}}.Encode()
		must(t, err)
		note, err := w.keeper.signNote(t.Context(), text)
		must(t, err)
		place.put(trustDocument, note)
		e.shares(check.Warning, "trust", "is not followed, and not replaced", "cluster west has signed decision", x.ID)
		if !bytes.Equal(place.get(trustDocument).text, note) {
			t.Error("it is replaced")
		}
		place.put(trustDocument, nil)
		soon(t, "after it was deleted it is written again, without it", func() bool {
			s := place.shared(t, east)
			return s.says(a) == shared.Believed && s.says(evil) == shared.Unknown
		})
		e.well()
	}
}

func TestARootThatFailsTheChecksIsRefusedAndTheOthersAreTaken(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	acquaint(t, east, west)
	place := newSharedPlace()
	e, w := east.share(t, place), west.start(t, nil)
	e.well()
	a, b, other, short := east.root, newRoot(t), newRoot(t), newRootUntil(t, time.Now().Add(time.Hour))
	c := caTemplate("root of another domain")
	c.MaxPathLen, c.MaxPathLenZero = 1, false
	c.URIs = []*url.URL{spiffeid.RequireTrustDomainFromString("other.org").ID().URL()}
	other.cert = sign(t, c, c, other.key.Public(), other.key)
	lies := newRoot(t)
	lying := sharedOf(lies, shared.Believed, 1, "west")
	lying.NotAfter = lying.NotAfter.Add(-time.Hour)
	var listed []rotation.RootReport
	write := func(roots ...shared.Root) {
		t.Helper()
		text, err := shared.Trust{TrustDomain: td.Name(), Cluster: "west", Roots: shared.Join(roots)}.Encode()
		must(t, err)
		note, err := w.keeper.signNote(t.Context(), text)
		must(t, err)
		place.put(trustDocument, note)
	}
	for _, r := range []*root{a, b, other, short, lies} {
		listed = append(listed, rotation.RootReport{ID: r.id()})
	}
	place.reports(t, w, listed...)
	// The only root does not go.
	write(sharedOf(a, shared.Leaving, 2, "west"), sharedOf(other, shared.Believed, 1, "west"), sharedOf(short, shared.Believed, 1, "west"), lying)
	e.shares(check.Warning, a.id(), "cluster west", "the only root that stays")
	e.shares(check.Warning, other.id(), "cluster west", "other.org")
	e.shares(check.Warning, short.id(), "cluster west", "ends at")
	e.shares(check.Warning, lies.id(), "cluster west", "is said to end at")
	if e.leaves(a) || len(e.keeper.current.Load().bundle.Roots()) != 1 {
		t.Error("the only root leaves")
	}
	write(sharedOf(a, shared.Leaving, 2, "west"), sharedOf(other, shared.Believed, 1, "west"), sharedOf(b, shared.Believed, 1, "west"))
	soon(t, "with another one that is good it goes", func() bool { return e.leaves(a) && e.state(b.id()) != "" })
	e.shares(check.Warning, other.id(), "other.org")
	// What is refused here is not this cluster's to take from the others.
	soon(t, "the refused ones stay listed", func() bool {
		s := place.shared(t, east)
		return s.says(other) == shared.Believed && s.says(short) == shared.Believed
	})
}

func TestARootThatHasExpiredIsForgotten(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	acquaint(t, east, west)
	place := newSharedPlace()
	s := east.start(t, nil)
	e := newExchange(s.keeper, place, s.audit.VerifierKey())
	w := west.start(t, nil)
	over := newRootUntil(t, time.Now().Add(-time.Minute))
	say := func(notAfter time.Time) {
		t.Helper()
		x := sharedOf(over, shared.Removed, 1, "west")
		x.NotAfter = notAfter
		text, err := shared.Trust{TrustDomain: td.Name(), Cluster: "west", Roots: shared.Join([]shared.Root{x, sharedOf(east.root, shared.Believed, 1, "west")})}.Encode()
		must(t, err)
		note, err := w.keeper.signNote(t.Context(), text)
		must(t, err)
		place.put(trustDocument, note)
		e.round(t.Context())
	}
	say(time.Now().Add(time.Hour)) // and this cluster has the root active, which is written
	say(time.Now().Add(time.Hour))
	if got := place.shared(t, east); got.Cluster != "east" || got.says(over) != shared.Removed {
		t.Errorf("what lives: %+v", got)
	}
	say(time.Now().Add(-25 * time.Hour))
	if got := place.shared(t, east); got.Cluster != "east" || got.says(over) != shared.Removed {
		t.Errorf("the later end counts: %+v", got)
	}
	east.ahead.Store(int64(2 * time.Hour))
	e.round(t.Context())
	before := place.get(trustDocument).version
	east.ahead.Store(int64(3 * time.Hour))
	e.round(t.Context())
	if got := place.get(trustDocument).version; got != before || place.shared(t, east).says(over) != shared.Removed {
		t.Errorf("because of a root that has just expired version %d follows %d", got, before)
	}
	east.ahead.Store(int64(26 * time.Hour))
	e.round(t.Context())
	if place.shared(t, east).says(over) != shared.Unknown {
		t.Error("a root that expired a day ago is still listed")
	}
}

func TestNobodyRevivesWhatIsNotThere(t *testing.T) {
	t.Parallel()
	// A root that others let go is believed until nothing can depend on it, also where it was not known.
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	acquaint(t, east, west)
	place := newSharedPlace()
	e, w := east.share(t, place), west.start(t, nil)
	e.well()
	old, gone := newRoot(t), newRoot(t)
	text, err := shared.Trust{TrustDomain: td.Name(), Cluster: "west", Roots: shared.Join([]shared.Root{sharedOf(old, shared.Leaving, 2, "west"), sharedOf(gone, shared.Removed, 2, "west")})}.Encode()
	must(t, err)
	note, err := w.keeper.signNote(t.Context(), text)
	must(t, err)
	place.put(trustDocument, note)
	place.reports(t, w, rotation.RootReport{ID: old.id(), Leaving: true}, rotation.RootReport{ID: gone.id(), Leaving: true})
	soon(t, "it is believed, and leaving", func() bool { return e.state(old.id()) == ca.Retired })
	if e.state(gone.id()) != "" {
		t.Error("a root that has gone is known again")
	}
	if roots := e.keeper.current.Load().bundle.Roots(); len(roots) != 2 {
		t.Errorf("%d roots are believed", len(roots))
	}
}

func TestWhileNothingCanBeExchangedWorkGoesOn(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	acquaint(t, east, west)
	place := newSharedPlace()
	e, w := east.share(t, place), west.share(t, place)
	e.apply(false, registration("x", "node-1"))
	member := e.enrol("node-1")
	e.listen(member, false)
	conn := e.dial(member)
	e.well()
	w.well()
	// East has read the document as it was written: before, it would have something to tell.
	soon(t, "what east believes is told", func() bool { return place.shared(t, east).says(east.root) == shared.Believed })
	told := e.keeper.folder.Now()
	soon(t, "east has read it", func() bool {
		e.exchange.mu.Lock()
		defer e.exchange.mu.Unlock()
		return e.exchange.read.After(told)
	})
	place.set(func() { place.fail = errAway("Vault is sealed") })
	e.shares(check.Warning, "since", "Vault is sealed", "nothing waits for it now", "can rely on our last report until")
	e.leaf(conn, "x")
	b := newRoot(t)
	e.startRoot(b)
	e.shares(check.Warning, "not told what was decided here about", b.id(), "waits for reports")
	e.shows(http.StatusOK, check.CodeShared, "Vault is sealed")
	// For longer than half of what a report holds, while something waits, it is bad.
	east.ahead.Store(int64(40 * time.Minute))
	e.shares(check.Error, "Vault is sealed")
	west.ahead.Store(int64(40 * time.Minute))
	place.set(func() { place.fail = nil })
	soon(t, "west follows when it is back", func() bool {
		return w.leaves(east.root) && w.state(b.id()) != ""
	})
	e.well()

	// One path alone that is denied stops only what goes by it.
	place.set(func() {
		place.denied[reportDocument("west")] = errors.New("denied")
		place.denied[trustDocument] = errors.New("not allowed")
	})
	e.shares(check.Warning, "reports/west", "denied")
	e.shares(check.Warning, "trust", "not allowed")
	w.shares(check.Warning, "reports/west", "denied")
	place.set(func() { clear(place.denied) })
	e.well()
	w.well()
}

func TestTroubleIsSinceItBeganAndNewsOnceAtEachEnd(t *testing.T) {
	t.Parallel()
	began := time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	sealed, cut := errors.New("it is sealed"), errors.New("it hung up")
	var now trouble
	for i, try := range []struct {
		err    error
		since  time.Time
		turned bool
	}{
		{nil, time.Time{}, false},
		{sealed, began.Add(time.Minute), true},
		{cut, began.Add(time.Minute), false},
		{nil, time.Time{}, true},
		{nil, time.Time{}, false},
		{cut, began.Add(5 * time.Minute), true},
	} {
		next, turned := now.after(try.err, began.Add(time.Duration(i)*time.Minute))
		if want := (trouble{try.since, try.err}); next != want || turned != try.turned {
			t.Errorf("try %d: %v, news %v; want %v, %v", i, next, turned, want, try.turned)
		}
		now = next
	}
}

func TestReportsAreKeptFresh(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	acquaint(t, east, west)
	place := newSharedPlace()
	e := east.share(t, place)
	name := reportDocument("east")
	soon(t, "a report", func() bool { return place.get(name).text != nil })
	e.well()
	peer := Peer{Cluster: "east", VerifierKey: e.audit.VerifierKey()}
	at := func() time.Time {
		r, err := openReport(place.get(name).text, peer, td)
		if err != nil {
			return time.Time{}
		}
		return r.At
	}
	first := at()
	east.ahead.Store(int64(31 * time.Minute)) // of the hour for which it holds
	soon(t, "it is renewed at half of its life", func() bool {
		return at().After(first)
	})
	for what, text := range map[string][]byte{"replaced": []byte("garbage"), "deleted": nil} {
		place.put(name, text)
		soon(t, "it was "+what+", and is written again", func() bool { return !at().IsZero() })
	}
	e.well()
	second := at()
	must(t, e.stop())
	e = east.share(t, place)
	e.well()
	if !at().Equal(second) {
		t.Error("a start costs a report although nothing is new")
	}

	// What a peer writes in its place counts as if it had been carried here.
	place.put(reportDocument("west"), []byte("garbage"))
	e.shares(check.Warning, "reports/west", "report of cluster west", "version 1")
	west.ahead.Store(east.ahead.Load())
	w := west.share(t, place)
	soon(t, "west's report is taken", func() bool {
		e.keeper.mu.Lock()
		defer e.keeper.mu.Unlock()
		return !e.keeper.reports["west"].At.IsZero()
	})
	e.well()
	w.well()
}

func TestManyPeersTakeTurns(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	for i := range roundReports + 5 {
		east.peers = append(east.peers, Peer{Cluster: fmt.Sprintf("west-%d", i), VerifierKey: "none"})
	}
	s := east.start(t, nil)
	place := newSharedPlace()
	e := newExchange(s.keeper, place, s.audit.VerifierKey())
	for _, p := range east.peers {
		place.denied[reportDocument(p.Cluster)] = errors.New("denied")
	}
	for round := range 2 {
		place.reads = 0
		e.round(t.Context())
		// The document, once more after it was written, our report, and those of peers.
		if place.reads > roundReports+3 {
			t.Errorf("%d reads in a round", place.reads)
		}
		if want := min(len(east.peers), (round+1)*roundReports); len(e.troubles) != want {
			t.Errorf("after %d rounds %d peers were asked", round+1, len(e.troubles))
		}
	}
	// Where nothing can be read, nobody is asked in vain.
	place.fail, place.reads = errAway("sealed"), 0
	e.round(t.Context())
	if place.reads != 1 || e.away.err == nil {
		t.Errorf("%d reads of a place that is away", place.reads)
	}
}

func TestAReportIsDueWhenItSaysSomethingNew(t *testing.T) {
	t.Parallel()
	now := time.Now()
	base := func() rotation.Report {
		return rotation.Report{At: now, Until: now.Add(24 * time.Hour), Roots: []rotation.RootReport{{ID: "a", Trusting: 1, Validators: 2, Missing: []string{"n"}, Signing: true, LeavesUntil: now}}}
	}
	for _, c := range []struct {
		what   string
		change func(told, r *rotation.Report)
		after  time.Duration
		want   bool
	}{
		{"nothing is new", func(_, r *rotation.Report) { r.Roots[0].LeavesUntil = now.Add(time.Hour) }, time.Minute, false},
		{"at half of its life", func(_, _ *rotation.Report) {}, 12 * time.Hour, true},
		{"often while a root leaves", func(told, r *rotation.Report) { told.Roots[0].Leaving, r.Roots[0].Leaving = true, true }, time.Hour, true},
		{"but not always", func(told, r *rotation.Report) { told.Roots[0].Leaving, r.Roots[0].Leaving = true, true }, time.Minute, false},
		{"an agent has it", func(_, r *rotation.Report) { r.Roots[0].Trusting, r.Roots[0].Missing = 2, nil }, time.Second, true},
		{"a root more", func(_, r *rotation.Report) { r.Roots = append(r.Roots, rotation.RootReport{ID: "b"}) }, time.Second, true},
		{"it does not sign any more", func(_, r *rotation.Report) { r.Roots[0].Signing = false }, time.Second, true},
		{"a silent agent has come back", func(told, _ *rotation.Report) { told.Accepting = []rotation.Acceptance{{Root: "x", Agents: 1}} }, time.Second, true},
		{"a root is gone for good", func(_, r *rotation.Report) { r.Gone = []string{"x"} }, time.Second, true},
		{"a taint", func(_, r *rotation.Report) { r.Tainted = []rotation.TaintReport{{ID: "x"}} }, time.Second, true},
		{"leaves until another time", func(told, r *rotation.Report) {
			told.Roots[0].Signing, r.Roots[0].Signing, r.Roots[0].LeavesUntil = false, false, now.Add(time.Hour)
		}, time.Second, true},
		{"it holds for longer", func(_, r *rotation.Report) { r.Until = now.Add(48 * time.Hour) }, time.Second, true},
		{"the clock went back", func(_, r *rotation.Report) { r.Roots = nil }, -time.Minute, false},
		{"the first", func(told, _ *rotation.Report) { *told = rotation.Report{} }, 0, true},
	} {
		told, r := base(), base()
		c.change(&told, &r)
		r.At, r.Until = r.At.Add(c.after), r.Until.Add(c.after)
		if got := due(told, r, 24*time.Hour); got != c.want {
			t.Errorf("%s: due is %v", c.what, got)
		}
	}
}

// A peer relies on a report for no longer than its own hold, so it is told as often as that needs.
func TestReportsComeAsOftenAsTheOneNeedsThatReliesOnThemLeast(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	s := east.start(t, nil)
	e := newExchange(s.keeper, newSharedPlace(), s.audit.VerifierKey())
	if e.pace() != exchangeEvery || e.relied() != 59*time.Minute {
		t.Errorf("alone, every %s; relied upon for %s", e.pace(), e.relied())
	}
	now := s.keeper.folder.Now()
	s.keeper.mu.Lock()
	s.keeper.reports["west"] = rotation.Report{Cluster: "west", At: now, Until: now.Add(20 * time.Second)}
	s.keeper.mu.Unlock()
	e.say(rotation.Report{Cluster: "east", At: now, Until: now.Add(time.Hour)})
	if e.pace() != 500*time.Millisecond || e.relied() != 10*time.Second || !e.holds.Equal(now.Add(10*time.Second)) {
		t.Errorf("with a peer of 20 s, every %s; relied upon for %s, until %s", e.pace(), e.relied(), e.holds)
	}
}

func TestNothingIsDecidedOrPromisedByAWrongClock(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	acquaint(t, east, west)
	place := newSharedPlace()
	e := east.share(t, place)
	e.well()
	w := west.start(t, nil)
	ex := newExchange(w.keeper, place, w.audit.VerifierKey())
	west.ahead.Store(int64(-2 * time.Hour))
	b := newRoot(t)
	e.startRoot(b)
	soon(t, "east tells", func() bool { return place.shared(t, east).says(b) == shared.Believed })
	ex.round(t.Context())
	if w.state(b.id()) != "" || place.get(reportDocument("west")).text != nil {
		t.Errorf("with a wrong clock the root is %q", w.state(b.id()))
	}
	west.ahead.Store(0)
	soon(t, "the clock is believed again", func() bool { return !w.keeper.doubt() })
	soon(t, "with the right clock it is followed", func() bool {
		ex.round(t.Context())
		return w.state(b.id()) != "" && place.get(reportDocument("west")).text != nil
	})
}

func TestAClusterBeginsWithWhatTheOthersShare(t *testing.T) {
	t.Parallel()
	east, b := newCluster(t, "east"), newRoot(t)
	j := newJoiner(t)
	acquaint(t, east, j.cluster)
	place := newSharedPlace()
	pinned := func(r *root) ca.Fingerprint {
		f, err := ca.ParseFingerprint(r.fingerprint())
		must(t, err)
		return f
	}
	if _, ok, err := Shared(t.Context(), place, td, j.peers, pinned(east.root)); ok || err != nil {
		t.Fatalf("nothing is shared yet: %v, %v", ok, err)
	}
	install := func() error {
		_, err := Install(t.Context(), InstallConfig{
			Folder: j.folder(), Rotation: j.config().Rotation, RootFingerprint: b.fingerprint(), Chain: b.intermediate(t, j.csr, nil), Exchange: place,
		})
		return err
	}
	wantError(t, install(), "--first")
	e := east.share(t, place)
	e.signed(b, e.startRoot(b), nil)
	soon(t, "east tells", func() bool {
		return place.shared(t, east).says(b) == shared.Believed && place.shared(t, east).says(east.root) == shared.Leaving
	})

	_, _, err := Shared(t.Context(), place, td, nil, pinned(b))
	wantError(t, err, "rotation.peers")
	_, _, err = Shared(t.Context(), place, td, j.peers, pinned(newRoot(t)))
	wantError(t, err, "not among")
	place.set(func() { place.fail = errAway("sealed") })
	_, _, err = Shared(t.Context(), place, td, j.peers, pinned(b))
	wantError(t, err, "sealed")
	place.set(func() { place.fail = nil })

	given, ok, err := Shared(t.Context(), place, td, j.peers, pinned(b))
	must(t, err)
	if !ok || given.Cluster != "east" || len(given.Roots) != 2 {
		t.Fatalf("given: %+v", given)
	}
	// Nobody signs under it yet: east waits for west.
	_, err = j.install(b, b.intermediate(t, j.csr, nil), given)
	wantError(t, err, "not believed by all")
	_, err = e.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Force: true, Authority: b.id()})
	must(t, err)
	soon(t, "it is active", func() bool {
		given, _, err = Shared(t.Context(), place, td, j.peers, pinned(b))
		must(t, err)
		return slices.ContainsFunc(given.Roots, func(r TrustedRoot) bool { return r.Certificate.Equal(b.cert) && r.State == ca.Active })
	})
	must(t, install())
	j.wantRoots(east.root, b)
	w := j.share(t, place)
	w.well()
	soon(t, "the old one stays only as long as east needs it", func() bool { return w.state(east.root.id()) == ca.Retired })
	if s := place.shared(t, east); s.Cluster != "east" {
		t.Errorf("joining has changed what is shared: %+v\n%+v", s, given)
	}
}
