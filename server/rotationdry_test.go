package server

import (
	"context"
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/server/shared"
	"github.com/signet-ca/signet/trust"
)

// countingKeys counts the keys that are made.
type countingKeys struct {
	keystore.Store
	made atomic.Int64
}

func (k *countingKeys) Create(ctx context.Context, name string, alg keystore.Algorithm, newest int) (keystore.Key, error) {
	k.made.Add(1)
	return k.Store.Create(ctx, name, alg, newest)
}

// touched is all that a change of CAs could have touched.
type touched struct {
	Keys, Changes int64
	Rows          []string
	Revision      uint64
	Bundle        trust.Version
	Past          int
	Reports       map[string]time.Time
}

// rehearsal has everything done twice: dry, then really.
type rehearsal struct {
	*live
	cluster *cluster
	keys    *countingKeys
	admin   adminv1.RotationClient
	changes atomic.Int64
	// said are the lines of all answers.
	said []string
}

func rehearse(t testing.TB, c *cluster) *rehearsal {
	r := &rehearsal{cluster: c, keys: &countingKeys{Store: c.keys}}
	c.stored = r.keys
	r.live = c.start(t, func(s *Server) {
		change := s.keeper.change
		s.keeper.change = func(ctx context.Context, note *store.Note, commit func(*store.Store) error, effect func()) error {
			r.changes.Add(1)
			return change(ctx, note, commit, effect)
		}
	})
	r.admin = r.rotations()
	return r
}

func (r *rehearsal) touched() touched {
	r.t.Helper()
	rows, revision, err := r.store.Authorities(r.t.Context())
	must(r.t, err)
	x := touched{Keys: r.keys.made.Load(), Changes: r.changes.Load(), Revision: revision, Reports: map[string]time.Time{}}
	for _, a := range rows {
		x.Rows = append(x.Rows, fmt.Sprintf("%s %s since %v wanted %v leaving %v aborted %v tainted %v under %q", a.ID, a.State, a.Since, a.Wanted, a.Leaving, a.Aborted, a.Tainted, a.Root))
	}
	x.Bundle = r.keeper.current.Load().bundle.Version()
	r.keeper.mu.Lock()
	defer r.keeper.mu.Unlock()
	x.Past = len(r.keeper.history)
	for c, n := range r.keeper.reports {
		x.Reports[c] = n.At
	}
	return x
}

var newKey = regexp.MustCompile(`^intermediate-\d+ requested.*|^a new intermediate requested.*`)

// lines are what an answer lists, but for the names of new keys.
func lines(a *adminv1.RotationChangeResponse) (all []string) {
	for _, x := range a.GetReports() {
		all = append(all, fmt.Sprintf("report of %s %v", x.Cluster, x.Held == nil))
	}
	for _, line := range a.GetDone() {
		all = append(all, newKey.ReplaceAllString(line, "a new intermediate requested"))
	}
	for _, s := range a.GetTaken() {
		if s.From == "" {
			s.Authority = "a new intermediate"
		}
		all = append(all, s.Authority+" "+s.From+" → "+s.To+": "+s.Because)
	}
	for _, f := range a.GetForced() {
		all = append(all, "forced: "+f)
	}
	return append(all, fmt.Sprintf("changed %v, requested %d", a.GetChanged(), a.GetRequested()))
}

// both asks dry and really, and checks that the one said what the other does, and did nothing.
func (r *rehearsal) both(what string, ask write) {
	r.t.Helper()
	// What comes by itself comes first.
	_, err := r.keeper.do(r.t.Context(), scheduled(), nil)
	must(r.t, err)
	before := r.touched()
	said, dryErr := ask(r.t.Context(), r.admin, true)
	if after := r.touched(); !reflect.DeepEqual(before, after) {
		r.t.Fatalf("a dry run of %s changes\n%+v\nto\n%+v", what, before, after)
	}
	did, err := ask(r.t.Context(), r.admin, false)
	if status.Convert(dryErr).Message() != status.Convert(err).Message() {
		r.t.Fatalf("%s: a dry run says %v, and then there is %v", what, dryErr, err)
	}
	if x, y := lines(said), lines(did); !slices.Equal(x, y) {
		r.t.Fatalf("%s: a dry run says\n%s\nand then there is\n%s", what, strings.Join(x, "\n"), strings.Join(y, "\n"))
	}
	if after := r.touched(); err == nil && did.Changed == reflect.DeepEqual(before, after) {
		r.t.Errorf("%s: it says changed %v, and\n%+v\nis now\n%+v", what, did.Changed, before, after)
	}
	r.said = append(r.said, lines(did)...)
}

// write asks for a write, dry or really.
type write func(ctx context.Context, admin adminv1.RotationClient, dry bool) (*adminv1.RotationChangeResponse, error)

func startsIntermediate(n uint32) write {
	return func(ctx context.Context, admin adminv1.RotationClient, dry bool) (*adminv1.RotationChangeResponse, error) {
		return admin.StartRotation(ctx, &adminv1.StartRotationRequest{Kind: "intermediate", Successors: n, DryRun: dry})
	}
}

func startsRoot(r *root) write {
	return func(ctx context.Context, admin adminv1.RotationClient, dry bool) (*adminv1.RotationChangeResponse, error) {
		return admin.StartRotation(ctx, &adminv1.StartRotationRequest{Kind: "root", Root: r.cert.Raw, RootFingerprint: r.fingerprint(), DryRun: dry})
	}
}

func aborts(id string, force bool) write {
	return func(ctx context.Context, admin adminv1.RotationClient, dry bool) (*adminv1.RotationChangeResponse, error) {
		return admin.AbortRotation(ctx, &adminv1.AbortRotationRequest{Authority: id, Force: force, DryRun: dry})
	}
}

func taints(id string) write {
	return func(ctx context.Context, admin adminv1.RotationClient, dry bool) (*adminv1.RotationChangeResponse, error) {
		return admin.TaintAuthority(ctx, &adminv1.TaintAuthorityRequest{Authority: id, Reason: "stolen", DryRun: dry})
	}
}

func adds(r *root) write {
	return func(ctx context.Context, admin adminv1.RotationClient, dry bool) (*adminv1.RotationChangeResponse, error) {
		return admin.AddTrust(ctx, &adminv1.AddTrustRequest{Root: r.cert.Raw, RootFingerprint: r.fingerprint(), DryRun: dry})
	}
}

func removes(id string) write {
	return func(ctx context.Context, admin adminv1.RotationClient, dry bool) (*adminv1.RotationChangeResponse, error) {
		return admin.RemoveTrust(ctx, &adminv1.RemoveTrustRequest{Root: id, DryRun: dry})
	}
}

func advances(id string, force bool, reports ...[]byte) write {
	return func(ctx context.Context, admin adminv1.RotationClient, dry bool) (*adminv1.RotationChangeResponse, error) {
		return admin.AdvanceRotation(ctx, &adminv1.AdvanceRotationRequest{Authority: id, Force: force, Reports: reports, DryRun: dry})
	}
}

func installs(by *root, chain []byte) write {
	return func(ctx context.Context, admin adminv1.RotationClient, dry bool) (*adminv1.RotationChangeResponse, error) {
		return admin.InstallAuthorities(ctx, &adminv1.InstallAuthoritiesRequest{Chains: chain, RootFingerprint: by.fingerprint(), DryRun: dry})
	}
}

// signs is the installation of the first request that waits, signed by a root for 40 days; nil = none waits.
func (r *rehearsal) signs(by *root) write {
	r.t.Helper()
	for _, a := range r.keeper.current.Load().rows {
		if a.Kind == ca.KindIntermediate && a.State == ca.Prepared && len(a.Chain) == 0 {
			_, csr, err := storedRequest(a)
			must(r.t, err)
			return installs(by, by.intermediate(r.t, csr, func(x *x509.Certificate) { x.NotAfter = time.Now().Add(960 * time.Hour).Truncate(time.Second) }))
		}
	}
	return nil
}

// Before it is published, and before anybody is sent to a ceremony with it.
func TestARootThatNothingCanStandUnderIsNotTakenIn(t *testing.T) {
	t.Parallel()
	r := rehearse(t, newCluster(t, "east"))
	bad := newRoot(t)
	for want, spoil := range map[string]func(*x509.Certificate){
		"path length of 0": func(*x509.Certificate) {},
		"URIs of example.org": func(c *x509.Certificate) {
			c.MaxPathLen, c.MaxPathLenZero, c.PermittedURIDomains = 1, false, []string{"foo.org"}
		},
	} {
		c := caTemplate("a root of no use")
		spoil(c)
		bad.cert = sign(t, c, c, bad.key.Public(), bad.key)
		for _, way := range []write{adds(bad), startsRoot(bad)} {
			r.both(want, way)
			_, err := way(t.Context(), r.admin, true)
			wantError(t, err, want)
		}
		if _, err := r.keeper.adopt(r.keeper.current.Load(), shared.Root{
			ID: bad.id(), NotAfter: bad.cert.NotAfter, Fingerprint: bad.fingerprint(), Certificate: string(ca.EncodeChain(bad.cert)),
		}, time.Now()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("from what others share it is taken in: %v", err)
		}
	}
}

// What is asked for is told with a life and a stagger that fit, and what comes back without them is told to be of no use.
func TestSeveralSuccessorsAreToldHowToBeSignedAndWhichAreOfNoUse(t *testing.T) {
	t.Parallel()
	r := rehearse(t, newCluster(t, "east"))
	life := 960 * time.Hour
	begin := time.Now().Truncate(time.Second)
	dates := func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = begin.Add(-ca.PlanBackdate), begin.Add(life-time.Second)
	}
	started, err := r.admin.StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(t, err)
	if started.Stagger != nil || started.Life != nil {
		t.Errorf("one request is to be staggered by %s", started.Stagger.AsDuration())
	}
	_, err = installs(r.cluster.root, r.cluster.root.intermediate(t, started.Requests[0].Csr, dates))(t.Context(), r.admin, false)
	must(t, err)
	started, err = r.admin.StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate", Successors: 3})
	must(t, err)
	if got, want := started.Stagger.AsDuration(), r.keeper.policy.Stagger(life); started.Life.AsDuration() != life || got != want || got < 20*24*time.Hour {
		t.Errorf("lives of %s, staggered by %s; want %s and %s", started.Life.AsDuration(), got, life, want)
	}
	begin = begin.Add(time.Hour)
	var chains []byte
	for _, request := range started.Requests {
		chains = append(chains, r.cluster.root.intermediate(t, request.Csr, dates)...)
	}
	for _, dry := range []bool{true, false} {
		answer, err := installs(r.cluster.root, chains)(t.Context(), r.admin, dry)
		must(t, err)
		var useless []string
		for _, s := range answer.Next {
			if s.To == string(ca.Removed) && strings.Contains(s.Because, "ends no later than intermediate-3") {
				useless = append(useless, s.Authority)
			}
		}
		if !slices.Equal(useless, []string{"intermediate-4", "intermediate-5"}) {
			t.Errorf("dry run %v: of no use are %v: %v", dry, useless, answer.Next)
		}
	}
}

func TestADryRunSaysWhatIsDoneThenAndChangesNothing(t *testing.T) {
	t.Parallel()
	all := ""
	for seed, manual := range []bool{false, true} {
		c := newCluster(t, "east")
		c.manual = manual
		west := c.sibling(t, "west")
		info, err := Show(t.Context(), west.dir)
		must(t, err)
		c.peers = []Peer{{Cluster: "west", VerifierKey: info.LogVerifierKey}}
		w, r := west.start(t, nil), rehearse(t, c)
		r.listen(r.enrol("node-1"), true)
		soon(t, "the agent is heard", func() bool { return r.acks.of("node-1").heard })
		report := func() []byte {
			a, err := w.rotations().ReportRotation(t.Context(), &adminv1.ReportRotationRequest{})
			must(t, err)
			return a.Report
		}
		a, b, x := c.root, newRoot(t), newRoot(t)
		// A rotation of each kind, with all that can happen to it.
		r.both("two successors", startsIntermediate(2))
		r.both("the first is signed", r.signs(a))
		r.both("it takes over", advances("", false))
		r.both("a successor is dropped", aborts("intermediate-3", false))
		r.both("another root", adds(x))
		r.both("it is published", advances("", false))
		r.both("it leaves", removes(x.id()))
		r.both("the new root", startsRoot(b))
		r.both("it is published, and an intermediate is requested", advances("", false))
		r.both("a report", advances("", false, report()))
		r.both("the request is signed", r.signs(b))
		for range 4 {
			r.both("the new root is forced", advances(b.id(), true))
			r.both("the new issuer is forced", advances("intermediate-4", true))
			r.both("the old root is forced", advances(a.id(), true))
		}
		r.both("the new issuer is tainted", taints("intermediate-4"))
		r.both("what follows", advances("", false))
		all += strings.Join(r.said, "\n")

		// Then anything, in any order.
		rng := rand.New(rand.NewPCG(uint64(seed), 1))
		roots := []*root{a, b, newRoot(t), newRoot(t), newRoot(t)}
		for range 40 {
			rows := r.keeper.current.Load().lives()
			id, other, force := rows[rng.IntN(len(rows))].ID, roots[rng.IntN(len(roots))], rng.IntN(2) == 0
			what := []write{
				startsIntermediate(1 + rng.Uint32N(3)), startsRoot(other), startsRoot(other), aborts(id, force), adds(other), removes(id), taints(id),
				advances("", false, report()), advances(id, force), advances(id, force), r.signs(other), r.signs(other),
			}
			n := rng.IntN(len(what))
			if what[n] != nil {
				r.both(fmt.Sprintf("write %d of %s or %s (force %v)", n, id, other.id(), force), what[n])
			}
		}
	}
	for _, want := range []string{
		"a new intermediate requested", "a new intermediate  → prepared", "prepared → published", "published → active", "active → retired",
		"retired → removed", " added", " dropped", " leaves", " tainted", " signed under ", "forced: ", "report of west true", "changed false", "requested 2",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("nothing was answered with %q:\n%s", want, all)
		}
	}
}
