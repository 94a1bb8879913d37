package server

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/test/bubble"
)

// atOnce is an upstream authority whose roots are at hand, as long as it is not away.
type atOnce struct {
	t     testing.TB
	mu    sync.Mutex
	roots []*root
	away  bool
	asked int
	// swap makes something else of its answer.
	swap func(*ca.Answer)
}

func (u *atOnce) Root(context.Context) (*x509.Certificate, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.away {
		return nil, errors.New("nobody is there")
	}
	return u.roots[0].cert, nil
}

func (u *atOnce) Sign(_ context.Context, p ca.Plan, csr []byte) (ca.Answer, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.asked++
	i := slices.IndexFunc(u.roots, func(r *root) bool { return p.Under != nil && r.cert.Equal(p.Under) })
	switch {
	case u.away:
		return ca.Answer{}, errors.New("nobody is there")
	case i < 0:
		return ca.Answer{}, errors.New("I don't have that root")
	}
	chain, err := ca.ParseChain(u.roots[i].intermediate(u.t, csr, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = p.NotBefore, p.NotAfter
	}))
	if err != nil {
		return ca.Answer{}, err
	}
	a := ca.Answer{Chain: chain[:1], Roots: chain[1:]}
	if u.swap != nil {
		u.swap(&a)
	}
	return a, nil
}

func (u *atOnce) set(change func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	change()
}

// newOnline is a cluster whose root is at hand.
func newOnline(t testing.TB, name string) (*cluster, *atOnce) {
	t.Helper()
	u := &atOnce{t: t, roots: []*root{newRoot(t)}}
	c := &cluster{name: name, dir: shortDir(t), root: u.roots[0], keys: keystore.NewMemory(), upstream: u}
	r, err := Init(t.Context(), InitConfig{Folder: c.folder(), Ceremony: byX509{}, Upstream: u, Rotation: testRotation(), RootFingerprint: c.root.fingerprint()})
	must(t, err)
	if r.CSR != nil || !slices.Equal(r.Roots, []string{c.root.fingerprint()}) {
		t.Fatalf("a cluster with an upstream begins with %+v", r)
	}
	return c, u
}

// often has the server look every moment at what has to be done now and then.
func often(s *Server) { s.upkeepEvery = 50 * time.Millisecond }

func (l *live) signing() string {
	for _, a := range l.keeper.current.Load().rows {
		if a.Kind == ca.KindIntermediate && a.State == ca.Active {
			return a.ID
		}
	}
	return ""
}

func (l *live) said(code string) check.Finding {
	for _, p := range l.checks() {
		for _, f := range p.Look(l.t.Context()) {
			if f.Code == code {
				return f
			}
		}
	}
	l.t.Fatalf("nothing is said about %s", code)
	return check.Finding{}
}

func TestAClusterWithAnUpstreamBeginsWithThePinnedRootOnly(t *testing.T) {
	t.Parallel()
	u := &atOnce{t: t, roots: []*root{newRoot(t)}}
	c := &cluster{name: "east", dir: shortDir(t), keys: keystore.NewMemory(), upstream: u}
	conf := InitConfig{Folder: c.folder(), Ceremony: byX509{}, Upstream: u, Rotation: testRotation()}
	_, err := Init(t.Context(), conf)
	wantError(t, err, "--root-fingerprint")
	conf.RootFingerprint = newRoot(t).fingerprint()
	_, err = Init(t.Context(), conf)
	wantError(t, err, "another root")
	if _, err := New(t.Context(), c.config()); err == nil || !strings.Contains(err.Error(), "trusts no root yet") {
		t.Fatalf("a server without a root: %v", err)
	}
	conf.RootFingerprint = u.roots[0].fingerprint()
	r, err := Init(t.Context(), conf)
	must(t, err)
	if !r.Created {
		t.Error("the root was taken, and nothing is said to be made")
	}
	again, err := Init(t.Context(), conf)
	must(t, err)
	if again.Created || again.ControlCA != r.ControlCA {
		t.Errorf("the second time: %+v", again)
	}
	s := c.start(t, often)
	soon(t, "the first intermediate signs", func() bool { return s.signing() == "intermediate-1" })
	s.apply(false, registration("a", "node-1"))
	leaf := s.leaf(s.dial(s.enrol("node-1")), "a")
	if left := time.Until(leaf.NotAfter); left < 50*time.Minute {
		t.Errorf("the leaf lives %s", left)
	}
}

func TestAnIntermediateFollowsByItselfWhereTheRootIsAtHand(t *testing.T) {
	t.Parallel()
	c, u := newOnline(t, "east")
	s := c.start(t, often)
	soon(t, "the first intermediate signs", func() bool { return s.signing() == "intermediate-1" })
	c.ahead.Store(int64(4 * 24 * time.Hour)) // of seven days
	soon(t, "its successor stands ready", func() bool { return s.state("intermediate-2") == ca.Published })
	if got := s.signing(); got != "intermediate-1" {
		t.Errorf("%s signs before its time", got)
	}
	// The authority is away when the next would be made: what there is goes on, and status says it.
	u.set(func() { u.away = true })
	c.ahead.Store(int64(5 * 24 * time.Hour))
	soon(t, "the successor takes over", func() bool { return s.signing() == "intermediate-2" })
	c.ahead.Store(int64(8 * 24 * time.Hour))
	soon(t, "somebody is told", func() bool { return s.said(check.CodeUpstream).Level == check.Warning })
	if f := s.said(check.CodeUpstream); !strings.Contains(f.Message, "nobody is there") || f.Blocks() {
		t.Errorf("the finding is %+v", f)
	}
	if f := gauged(t, s, "signet_upstream_failing_seconds"); f <= 0 {
		t.Errorf("the metric says it fails since %v s", f)
	}
	s.apply(false, registration("a", "node-1"))
	s.leaf(s.dial(s.enrol("node-1")), "a")
	u.set(func() { u.away = false })
	soon(t, "it recovers by itself", func() bool { return s.state("intermediate-3") == ca.Published })
	soon(t, "it is told", func() bool { return s.said(check.CodeUpstream).Level == check.OK })
}

func TestARootFollowsByItselfWhereBothAreAtHand(t *testing.T) {
	t.Parallel()
	c, u := newOnline(t, "east")
	s := c.start(t, often)
	soon(t, "the first intermediate signs", func() bool { return s.signing() != "" })
	s.apply(false, registration("a", "node-1"))
	m := s.enrol("node-1")
	conn, agent := s.dial(m), s.listen(m, false)
	s.leaf(conn, "a")
	soon(t, "the agent has said that it has the first bundle", func() bool { return s.acks.of("node-1").stored.Sequence == 1 })
	b := newRoot(t)
	u.set(func() { u.roots = append(u.roots, b) })
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	if len(started.Requests) > 0 {
		t.Errorf("somebody is to carry %v", started.Requests)
	}
	soon(t, "leaves come from the new root", func() bool {
		return s.leaf(conn, "a").CheckSignatureFrom(b.cert) == nil || s.signing() == "intermediate-2"
	})
	soon(t, "the old root is retired", func() bool { return s.state(c.root.id()) == ca.Retired })
	c.ahead.Store(int64(25 * time.Hour))
	soon(t, "agents stop to believe it", func() bool { return len(agent.believes().Roots()) == 1 })
}

func TestAnAnswerThatIsNotAsPlannedIsRefused(t *testing.T) {
	t.Parallel()
	other := newRoot(t)
	for name, c := range map[string]struct {
		swap func(*ca.Answer)
		says string
	}{
		"another key": {func(a *ca.Answer) {
			key := must1(keystore.NewMemory().Create(t.Context(), "x", keystore.ECDSAP256, 0))
			csr := must1(byX509{}.Request(key, must1(ca.NewIntermediatePlan(td, "east", key.Public(), time.Now(), time.Hour))))
			a.Chain = must1(ca.ParseChain(other.intermediate(t, csr, nil)))[:1]
		}, "another"},
		"another root": {func(a *ca.Answer) {
			a.Chain = []*x509.Certificate{sign(t, caTemplate(a.Chain[0].Subject.CommonName), other.cert, a.Chain[0].PublicKey, other.key)}
		}, "root"},
	} {
		t.Run(name, func(t *testing.T) {
			cl, u := newOnline(t, "east")
			u.set(func() { u.swap = c.swap })
			s := cl.start(t, often)
			soon(t, "it is refused", func() bool { return strings.Contains(s.said(check.CodeUpstream).Message, c.says) })
			if got := s.signing(); got != "" {
				t.Errorf("%s signs", got)
			}
			u.set(func() { u.swap = nil })
			soon(t, "a good answer is taken", func() bool { return s.signing() == "intermediate-1" })
		})
	}
}

func TestKeysInMemoryAreReplacedAtTheStart(t *testing.T) {
	t.Parallel()
	c, u := newOnline(t, "east")
	s := c.start(t, often)
	soon(t, "the first intermediate signs", func() bool { return s.signing() == "intermediate-1" })
	s.apply(false, registration("a", "node-1"))
	m := s.enrol("node-1")
	s.leaf(s.dial(m), "a")
	must(t, s.stop())
	c.forgetKeys(t)

	// Nobody signs, but all else goes on.
	u.set(func() { u.away = true })
	s = c.start(t, often)
	soon(t, "the lost issuer is retired", func() bool { return s.state("intermediate-1") == ca.Retired })
	soon(t, "another one is asked for", func() bool { return s.state("intermediate-2") == ca.Prepared })
	if f := s.said(check.CodeInstalled); !f.Blocks() {
		t.Errorf("a server that can't issue says %+v", f)
	}
	if f := s.said(check.CodeIssuing); !f.Blocks() || !strings.HasPrefix(f.Message, "nothing can be issued since ") || !strings.Contains(f.Message, "no intermediate is active; intermediate-2, which is to take over, is not signed") {
		t.Errorf("a server that can't issue says of issuing %+v", f)
	}
	u.set(func() { u.away = false })
	soon(t, "the second intermediate signs", func() bool { return s.signing() == "intermediate-2" })
	if chain := s.keeper.current.Load().chains["intermediate-2"]; !chain[len(chain)-1].Equal(c.root.cert) {
		t.Error("it is under another root")
	}
	s.leaf(s.dial(m), "a")
	must(t, s.stop())

	// However often it starts, no number comes again and the old ones are forgotten at last.
	for range 3 {
		c.forgetKeys(t)
		before := s.signing()
		s = c.start(t, often)
		soon(t, "the next intermediate signs", func() bool { return s.signing() != "" && s.signing() != before })
		must(t, s.stop())
	}
	if got := s.signing(); got != "intermediate-5" {
		t.Errorf("%s signs after five starts", got)
	}
}

func must1[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// forgetKeys takes the intermediates' keys away, as the end of a process does with those in memory.
func (c *cluster) forgetKeys(t testing.TB) {
	t.Helper()
	refs := must1(c.keys.List(t.Context()))
	for _, r := range refs {
		if r.Name == IntermediateKey {
			must(t, c.keys.Delete(t.Context(), r))
		}
	}
}

func TestRemovedIntermediatesAreForgottenButForTheNewest(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, often)
	set := s.keeper.current.Load()
	for i := range 5 {
		row := set.rows[len(set.rows)-1]
		row.ID, row.Kind, row.State, row.Chain, row.Root = strings.Repeat("x", i+1), ca.KindIntermediate, ca.Removed, nil, ""
		set = must1(set.edit(nil, row))
	}
	// Each backend counts its own keys: the newest of another one stays, however old it is.
	set.rows = slices.Insert(set.rows, 1, set.rows[len(set.rows)-1])
	set.rows[1].ID, set.rows[1].Key.Backend = "elsewhere", "elsewhere"
	before := len(set.rows)
	if dropped := set.forget(2); !slices.Equal(dropped, []string{"xxx", "xx", "x"}) || len(set.rows) != before-3 {
		t.Errorf("dropped %v, and %d of %d are left", dropped, len(set.rows), before)
	}
	if dropped := set.forget(2); dropped != nil {
		t.Errorf("then dropped %v", dropped)
	}
}

func TestTheClockOfWhoeverSignsMayBeLate(t *testing.T) {
	t.Parallel()
	c, u := newOnline(t, "east")
	u.set(func() {
		u.swap = func(a *ca.Answer) {
			r := u.roots[0]
			late := caTemplate(a.Chain[0].Subject.CommonName)
			late.NotBefore, late.NotAfter = a.Chain[0].NotBefore.Add(-2*time.Second), a.Chain[0].NotAfter
			a.Chain = []*x509.Certificate{sign(t, late, r.cert, a.Chain[0].PublicKey, r.key)}
		}
	})
	s := c.start(t, often)
	soon(t, "it is taken", func() bool { return s.signing() == "intermediate-1" })
}

func TestOneRequestDoesNotWaitForAnother(t *testing.T) {
	t.Parallel()
	c, u := newOnline(t, "east")
	s := c.start(t, often)
	soon(t, "the first intermediate signs", func() bool { return s.signing() == "intermediate-1" })
	// The next is never answered well; those after it are.
	u.set(func() {
		u.swap = func(a *ca.Answer) {
			if set := s.keeper.current.Load(); a.Chain[0].Subject.CommonName == requestOf(t, set, "intermediate-2") {
				other := newRoot(t)
				a.Chain = []*x509.Certificate{sign(t, caTemplate(a.Chain[0].Subject.CommonName), other.cert, a.Chain[0].PublicKey, other.key)}
			}
		}
	})
	_, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate", Successors: 2})
	must(t, err)
	soon(t, "the other one takes over", func() bool { return s.state("intermediate-3") == ca.Published || s.signing() == "intermediate-3" })
	if got := s.state("intermediate-2"); got != ca.Prepared {
		t.Errorf("the one whose answer can't be used is %s", got)
	}
}

func requestOf(t testing.TB, set *authorities, id string) string {
	t.Helper()
	row, ok := set.row(id)
	if !ok {
		return ""
	}
	return must1(x509.ParseCertificateRequest(row.CSR)).Subject.CommonName
}

// asker is a cluster's keeper alone, with one request that waits to be signed.
type asker struct {
	*keeper
	u   *atOnce
	row store.Authority
	// asked are the asks since it was made; logged is what the log was told, by the number of asks before; full is why it can't be.
	asked  func() int
	logged map[int]*auditv1.AuthorityRequested
	full   error
}

func newAsker(t *testing.T) *asker {
	c, u := newOnline(t, "east")
	s := c.start(t, often)
	soon(t, "the first intermediate signs", func() bool { return s.signing() == "intermediate-1" })
	must(t, s.stop())
	k := newKeeper(&Folder{TrustDomain: td, Cluster: "east", Keys: c.keys, Now: c.now, Logger: slog.New(slog.DiscardHandler)}, testRotation())
	row := must1(s.keeper.request(t.Context(), s.keeper.current.Load(), nil))
	k.current.Store(must1(s.keeper.current.Load().edit(nil, row)))
	k.upstream, k.agents = u, func(time.Time) []validator { return nil }
	before := u.asked
	a := &asker{keeper: k, u: u, row: row, logged: map[int]*auditv1.AuthorityRequested{}, asked: func() int { return u.asked - before }}
	k.record = func(_ context.Context, entries ...*auditv1.Entry) error {
		for _, e := range entries {
			if a.full == nil {
				a.logged[a.asked()] = e.GetAuthorityRequested()
			}
		}
		return a.full
	}
	return a
}

func TestAnAnswerThatCouldNotBeInstalledIsNotAskedForAgain(t *testing.T) {
	t.Parallel()
	k := newAsker(t)
	full := errors.New("no space left on device")
	tries := 0
	k.change = func(context.Context, *store.Note, func(*store.Store) error, func()) error { tries++; return full }
	a := &asking{}
	for range 3 {
		if err := k.signOne(t.Context(), k.row, a); !errors.Is(err, full) {
			t.Fatal(err)
		}
	}
	if n := k.asked(); n != 1 || tries < 3 {
		t.Errorf("the authority was asked %d times for %d tries to install", n, tries)
	}
}

// So whoever compares the authority's own list with the log finds there the key of each certificate, also of those whose
// answers were lost.
func TestWhatIsAskedForIsLoggedBefore(t *testing.T) {
	t.Parallel()
	k := newAsker(t)
	k.full = errors.New("no space left on device")
	a := &asking{}
	if err := k.signOne(t.Context(), k.row, a); !errors.Is(err, k.full) || k.asked() > 0 {
		t.Fatalf("asked %d times though the log could not be told of it: %v", k.asked(), err)
	}
	k.full = nil
	var signed []*x509.Certificate
	k.u.swap = func(answer *ca.Answer) {
		signed = append(signed, answer.Chain[0])
		answer.Chain = nil // it is lost
	}
	for range 5 {
		if err := k.signOne(t.Context(), k.row, a); err == nil {
			t.Fatal("a lost answer was taken")
		}
	}
	e := k.logged[0]
	if len(k.logged) != 1 || e == nil {
		t.Fatalf("for %d asks the log has %v", k.asked(), k.logged)
	}
	for _, c := range signed {
		if !slices.Equal(e.PublicKey, c.RawSubjectPublicKeyInfo) || e.CommonName != c.Subject.CommonName {
			t.Errorf("signed was %s on a key that the log has not: %v", c.Subject, e)
		}
	}
	if e.Authority != k.row.ID || e.Kind != ca.KindIntermediate || e.Root != rootID(k.u.roots[0].cert) || e.Upstream == "" || e.Evidence.GetDoor() != "self" || len(signed) != 5 {
		t.Errorf("after %d asks the log says %v", len(signed), e)
	}
	// Another process does not know what this one has asked for.
	_ = k.signOne(t.Context(), k.row, &asking{})
	if len(k.logged) != 2 || k.logged[5] == nil {
		t.Errorf("then it has %v", k.logged)
	}
}

// The authority keeps a certificate for each ask, so one whose answers can't be used is asked rarely; one that is away is not
// bothered by an ask a minute, and signs soon when it is back.
func TestAnAuthorityWhoseAnswersCantBeUsedIsAskedRarely(t *testing.T) {
	t.Parallel()
	const long = 6 * time.Hour
	for name, c := range map[string]struct {
		set         func(*atOnce)
		least, most int
	}{
		// 1 s, 2 s, 4 s … half of 10 min to one and a half.
		"unusable": {func(u *atOnce) { u.swap = func(a *ca.Answer) { a.Chain = nil } }, int(long / (refusedAgain * 3 / 2)), 12 + int(long/(refusedAgain/2))},
		"away":     {func(u *atOnce) { u.away = true }, int(long / (signAgain * 3 / 2)), 12 + int(long/(signAgain/2))},
	} {
		t.Run(name, func(t *testing.T) {
			k := newAsker(t)
			c.set(k.u)
			began := k.folder.Now()
			bubble.Test(t, func(t *testing.T) {
				start := time.Now()
				k.folder.Now = func() time.Time { return began.Add(time.Since(start)) }
				ctx, cancel := context.WithTimeout(t.Context(), long)
				defer cancel()
				k.sign(ctx)
			})
			if n := k.asked(); n < c.least || n > c.most {
				t.Errorf("asked %d times in %s, want %d to %d", n, long, c.least, c.most)
			}
			if len(k.logged) != 1 {
				t.Errorf("the log has %d entries of one request", len(k.logged))
			}
		})
	}
}

// elsewhere is a store of keys outside this process, which may be unreadable.
type elsewhere struct {
	*keystore.Memory
	fails *atomic.Pointer[error]
}

type elsewhereKey struct{ keystore.Key }

func (k elsewhereKey) Remote() bool      { return true }
func (k elsewhereKey) Ref() keystore.Ref { r := k.Key.Ref(); r.Backend = "elsewhere"; return r }

func (e elsewhere) Create(ctx context.Context, name string, alg keystore.Algorithm, after int) (keystore.Key, error) {
	k, err := e.Memory.Create(ctx, name, alg, after)
	return elsewhereKey{k}, err
}

func (e elsewhere) Find(ctx context.Context, name string, alg keystore.Algorithm, after int) (keystore.Ref, bool, error) {
	ref, there, err := e.Memory.Find(ctx, name, alg, after)
	ref.Backend = "elsewhere"
	return ref, there, err
}

func (e elsewhere) Open(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	if err := e.fails.Load(); err != nil && ref.Name == IntermediateKey {
		return nil, *err
	}
	ref.Backend = keystore.BackendMemory
	k, err := e.Memory.Open(ctx, ref)
	return elsewhereKey{k}, err
}

func TestAServerStartsThoughTheKeyOfItsIssuerCantBeOpened(t *testing.T) {
	t.Parallel()
	u := &atOnce{t: t, roots: []*root{newRoot(t)}}
	fails := &atomic.Pointer[error]{}
	keys := elsewhere{keystore.NewMemory(), fails}
	c := &cluster{name: "east", dir: shortDir(t), root: u.roots[0], upstream: u, stored: keys}
	_, err := Init(t.Context(), InitConfig{Folder: c.folder(), Ceremony: byX509{}, Upstream: u, Rotation: testRotation(), RootFingerprint: c.root.fingerprint()})
	must(t, err)
	s := c.start(t, often)
	soon(t, "the first intermediate signs", func() bool { return s.signing() == "intermediate-1" })
	s.apply(false, registration("a", "node-1"))
	m := s.enrol("node-1")
	s.leaf(s.dial(m), "a")
	must(t, s.stop())

	for _, why := range []error{keystore.ErrNotFound, keystore.ErrAway, errors.New("permission denied")} {
		fails.Store(&why)
		s = c.start(t, often)
		f := s.said(check.CodeInstalled)
		if !f.Blocks() || !strings.Contains(f.Message, why.Error()) {
			t.Errorf("%v: readiness says %+v", why, f)
		}
		f = s.said(check.CodeIssuing)
		if !f.Blocks() || !strings.HasPrefix(f.Message, "nothing can be issued since ") || !strings.Contains(f.Message, "the key of intermediate-1 can't be used: ") || !strings.Contains(f.Message, why.Error()) {
			t.Errorf("%v: of issuing readiness says %+v", why, f)
		}
		fails.Store(nil)
		soon(t, "it is opened when it can be", func() bool {
			_, active := s.issuers.Snapshot().Active(identity.Mesh)
			return active
		})
		s.leaf(s.dial(m), "a")
		must(t, s.stop())
	}
	// The way out where it is gone for good is another one.
	gone := error(keystore.ErrNotFound)
	fails.Store(&gone)
	found, err := CheckRotation(t.Context(), c.config(), c.now())
	must(t, err)
	if f, _ := issuingOf(t, found); !f.Blocks() || !strings.Contains(f.Message, "the key of intermediate-1 can't be opened: ") {
		t.Errorf("from outside: %+v", f)
	}
	s = c.start(t, often)
	_, err = s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate", Successors: 1})
	must(t, err)
	fails.Store(nil)
	soon(t, "the next one signs", func() bool { return s.signing() == "intermediate-2" })
}
