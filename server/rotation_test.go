package server

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/trust"
)

// rotations is a client of the part of the admin door that moves CAs.
func (l *live) rotations() adminv1.RotationClient {
	l.t.Helper()
	conn, err := grpc.NewClient("unix:"+l.Doors().Admin, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(l.t, err)
	l.t.Cleanup(func() { conn.Close() })
	return adminv1.NewRotationClient(conn)
}

// listener is an agent's Sync stream that acknowledges what it is told, unless it is deaf.
type listener struct {
	mu     sync.Mutex
	deaf   bool
	held   [][]byte
	bundle trust.Bundle
	// claim is the bundle that it says it has, if it has not what it was told.
	claim   trust.Version
	reissue *signetv1.Reissue
	stream  grpc.BidiStreamingClient[signetv1.SyncRequest, signetv1.SyncResponse]
}

func (l *live) listen(m *doors.Member, deaf bool, held ...[]byte) *listener {
	l.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l.t.Cleanup(cancel)
	stream, err := signetv1.NewAgentsClient(l.dial(m)).Sync(ctx)
	must(l.t, err)
	a := &listener{deaf: deaf, held: held, stream: stream}
	a.say()
	go func() {
		for {
			r, err := stream.Recv()
			if err != nil {
				return
			}
			a.mu.Lock()
			if b := r.GetBundle(); b != nil {
				var roots []*x509.Certificate
				for _, der := range b.Roots {
					c, err := x509.ParseCertificate(der)
					if err != nil {
						panic(err)
					}
					roots = append(roots, c)
				}
				a.bundle, err = trust.NewBundle(td, b.Sequence, roots)
				if err != nil {
					panic(err)
				}
			}
			if x := r.GetReissue(); x != nil {
				a.reissue = x
			}
			a.mu.Unlock()
			a.say()
		}
	}()
	return a
}

// say sends the agent's word.
func (a *listener) say() {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := &signetv1.SyncRequest{IssuersHeld: &signetv1.IssuersHeld{KeyIds: a.held}}
	v := a.bundle.Version()
	if a.claim.Sequence > v.Sequence || a.claim.Sequence == v.Sequence && a.claim.Sequence > 0 {
		v = a.claim
	}
	if v.Sequence > 0 && !a.deaf {
		r.BundleStored = &signetv1.BundleAck{TrustDomain: td.Name(), Digest: v.Digest[:], Sequence: v.Sequence}
		r.BundleAcks = []*signetv1.BundleAck{r.BundleStored}
	}
	_ = a.stream.Send(r)
}

// leaves ends the stream: its agent says nothing more.
func (a *listener) leaves() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.stream.CloseSend()
}

func (a *listener) hears() {
	a.mu.Lock()
	a.deaf = false
	a.mu.Unlock()
	a.say()
}

func (a *listener) holds(ids ...[]byte) {
	a.mu.Lock()
	a.held = ids
	a.mu.Unlock()
	a.say()
}

func (a *listener) believes() trust.Bundle {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.bundle
}

// soon waits for what a running server does by itself.
func soon(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// state is where a CA stands.
func (l *live) state(id string) ca.State {
	row, _ := l.keeper.current.Load().row(id)
	return row.State
}

// signed has a root sign what a rotation asks for, and installs it.
func (l *live) signed(r *root, request *adminv1.PendingRequest, change func(*x509.Certificate)) *adminv1.RotationChangeResponse {
	l.t.Helper()
	done, err := l.rotations().InstallAuthorities(l.t.Context(), &adminv1.InstallAuthoritiesRequest{
		Chains: r.intermediate(l.t, request.Csr, change), RootFingerprint: r.fingerprint(),
	})
	must(l.t, err)
	return done
}

func (r *root) id() string { return rootID(r.cert) }

// leaf has a leaf made and returns its issuer's certificate.
func (l *live) leaf(conn *grpc.ClientConn, registration string) *x509.Certificate {
	l.t.Helper()
	chain, err := doors.Issue(l.t.Context(), conn, registration, shown, newCSR(l.t))
	must(l.t, err)
	issuer, err := x509.ParseCertificate(chain.Chain[1])
	must(l.t, err)
	return issuer
}

func TestAnIntermediateTakesOverWhileTheServerRuns(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	s.apply(false, registration("a", "node-1"))
	conn := s.dial(m)
	before := s.leaf(conn, "a")

	dry, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate", DryRun: true})
	must(t, err)
	if len(dry.Requests) != 0 || len(s.keeper.current.Load().rows) != 3 {
		t.Errorf("a dry run has made %v", dry)
	}
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(t, err)
	again, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(t, err)
	if len(started.Requests) != 1 || len(again.Requests) != 1 || !bytes.Equal(started.Requests[0].Csr, again.Requests[0].Csr) {
		t.Fatalf("asked twice, the requests are %v and %v", started.Requests, again.Requests)
	}
	if s.leaf(conn, "a").SerialNumber.Cmp(before.SerialNumber) != 0 {
		t.Error("an issuer that nobody has signed is in use")
	}
	s.signed(c.root, started.Requests[0], nil)
	if got := s.state("intermediate-2"); got != ca.Active {
		t.Fatalf("the new one is %s", got)
	}
	if got := s.state("intermediate-1"); got != ca.Retired {
		t.Errorf("the old one is %s", got)
	}
	if s.leaf(conn, "a").SerialNumber.Cmp(before.SerialNumber) == 0 {
		t.Error("new leaves come from the old issuer")
	}
	// The same chain again changes nothing, also after a restart.
	must(t, s.stop())
	s = c.start(t, nil)
	if got := s.state("intermediate-2"); got != ca.Active {
		t.Errorf("after a restart the new one is %s", got)
	}
	c.ahead.Store(int64(25 * time.Hour))
	soon(t, "the old issuer is removed when its last leaf has ended", func() bool { return s.state("intermediate-1") == ca.Removed })
	soon(t, "its key is destroyed, and no other", func() bool {
		refs, err := c.keys.List(t.Context())
		must(t, err)
		var left []string
		for _, r := range refs {
			left = append(left, fmt.Sprintf("%s@%d", r.Name, r.Version))
		}
		return slices.Equal(left, []string{"control-ca@1", "intermediate@2", "log@1"})
	})
}

func TestARootIsUsedOnlyWhenEveryAgentHasIt(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.apply(false, registration("a", "node-1", "node-2"))
	m1 := s.enrol("node-1")
	conn := s.dial(m1)
	quick, slow := s.listen(m1, false), s.listen(s.enrol("node-2"), true)
	s.leaf(conn, "a")

	b := newRoot(t)
	start := &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: b.fingerprint()}
	wrong := &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: newRoot(t).fingerprint()}
	if _, err := s.rotations().StartRotation(t.Context(), wrong); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a root that was swapped on its way: %v", err)
	}
	started, err := s.rotations().StartRotation(t.Context(), start)
	must(t, err)
	if len(started.Requests) != 1 {
		t.Fatalf("the requests are %v", started.Requests)
	}
	soon(t, "the new root is told, and the one agent has said that it has it", func() bool {
		return s.acks.of("node-1").oldest.Sequence == 2 && len(slow.believes().Roots()) == 2
	})
	s.signed(b, started.Requests[0], nil)

	advanced, err := s.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{})
	must(t, err)
	i := slices.IndexFunc(advanced.Next, func(x *adminv1.RotationStep) bool { return x.Authority == b.id() })
	if i < 0 || advanced.Next[i].Waits[0].Code != "quorum" || !slices.Equal(advanced.Next[i].Waits[0].Missing, []string{"node-2"}) {
		t.Fatalf("what is next, with one agent missing, is %v", advanced.Next)
	}
	if got := s.state("intermediate-2"); got == ca.Active {
		t.Fatal("signed under a root that an agent does not have")
	}
	slow.hears()
	soon(t, "the switch", func() bool { return s.state("intermediate-2") == ca.Active })
	soon(t, "the old root is retired", func() bool { return s.state(c.root.id()) == ca.Retired })
	if under := s.leaf(conn, "a"); under.CheckSignatureFrom(b.cert) != nil {
		t.Error("new leaves are not under the new root")
	}
	c.ahead.Store(int64(25 * time.Hour))
	soon(t, "the old root is removed when its last leaf has ended", func() bool { return s.state(c.root.id()) == ca.Removed })
	soon(t, "agents stop to believe it", func() bool { return len(quick.believes().Roots()) == 1 })
	if !quick.believes().Roots()[0].Equal(b.cert) {
		t.Error("the wrong root was removed")
	}
}

func TestForceSaysWhatItBreaksAndTheLogKeepsIt(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	east.manual = true
	west, north := east.sibling(t, "west"), east.sibling(t, "north")
	w := west.start(t, nil)
	s := east.startWith(t, west, north)
	issuer, _ := s.issuers.Snapshot().Active(identity.Mesh)
	s.listen(s.enrol("node-9"), true, issuer.Certificate().SubjectKeyId)
	w.listen(w.enrol("node-4"), true)
	a, b := east.root, newRoot(t)
	_, err := w.rotations().AddTrust(t.Context(), &adminv1.AddTrustRequest{Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	_, err = s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	tell(t, w, s)
	st, err := s.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{})
	must(t, err)
	s.signed(b, st.Requests[0], nil)
	var logged []string
	force := func(id string, want ...string) {
		t.Helper()
		was := s.state(id)
		dry, err := s.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Force: true, Authority: id, DryRun: true})
		must(t, err)
		if s.state(id) != was {
			t.Fatalf("a dry run takes %s from %s to %s", id, was, s.state(id))
		}
		done, err := s.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Force: true, Authority: id})
		must(t, err)
		if s.state(id) == was || !slices.Equal(dry.Forced, done.Forced) || len(done.Forced) != len(want) {
			t.Fatalf("%s is %s, forced by\n%q\nafter it was said\n%q", id, s.state(id), done.Forced, dry.Forced)
		}
		for i, text := range want {
			if !strings.Contains(done.Forced[i], text) {
				t.Errorf("%s: force answers\n%s\nwant\n%s", id, done.Forced[i], text)
			}
		}
		logged = append(logged, done.Forced...)
	}
	before := []string{
		"0 of 1 agents of this cluster have it; 1 more must acknowledge: the workloads of node-9 refuse peers that have a certificate under " + b.id() + ", and get none themselves, until they have it",
		"0 of 1 agents of cluster west have it: the workloads of node-4 there refuse peers that have a certificate under " + b.id() + " until they have it",
		"cluster north has never reported: workloads there that don't have " + b.id() + " refuse peers that have a certificate under it",
	}
	force(b.id(), before...)
	force("intermediate-2") // published
	force("intermediate-2", before...)
	force(a.id()) // retired
	after := "workloads here refuse those of that cluster that have, or are given, a certificate under " + a.id() + " from now on"
	force(a.id(), ": workloads here refuse whoever has such a certificate from now on; node-9 may have some",
		"cluster west may rely on our last report until ", "then cluster west has to report once more: "+after,
		"cluster north may rely on our last report until ", "then cluster north has to report once more: "+after)
	must(t, s.stop())
	var told []string
	for _, e := range distinct(t, east, func(e *auditv1.Entry) bool { return len(e.GetAuthorityChanged().GetForced()) > 0 }) {
		for _, f := range e.GetAuthorityChanged().GetForced() {
			if !slices.Contains(told, f) {
				told = append(told, f)
			}
		}
	}
	for _, f := range logged {
		if !slices.Contains(told, f) {
			t.Errorf("the log does not say %q, but\n%q", f, told)
		}
	}
}

func TestAnAbortThatIsForcedSaysWhatItBreaksAndTheLogKeepsIt(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	s := east.startWith(t, west)
	b := newRoot(t)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	s.signed(b, started.Requests[0], nil)
	for _, id := range []string{b.id(), "intermediate-2"} {
		_, err := s.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Force: true, Authority: id})
		must(t, err)
	}
	abort := func(force, dry bool) (*adminv1.RotationChangeResponse, error) {
		return s.rotations().AbortRotation(t.Context(), &adminv1.AbortRotationRequest{Authority: b.id(), Force: force, DryRun: dry})
	}
	if _, err := abort(false, false); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "west has never reported: not now") {
		t.Fatalf("given back before west has reported: %v", err)
	}
	want := "cluster west has never reported: workloads there that don't have " + east.root.id() + " refuse peers that have a certificate under it"
	dry, err := abort(true, true)
	must(t, err)
	done, err := abort(true, false)
	must(t, err)
	if !slices.Equal(dry.Forced, []string{want}) || !slices.Equal(done.Forced, dry.Forced) || s.state("intermediate-1") != ca.Active {
		t.Errorf("forced by\n%q\nafter it was said\n%q", done.Forced, dry.Forced)
	}
	if says := []string{east.root.id() + " retired → active", east.root.id() + " stays", b.id() + " leaves", "intermediate-1 retired → active", "intermediate-2 active → retired"}; !sameLines(done.Done, says) {
		t.Errorf("it did\n%q\nwant\n%q", done.Done, says)
	}
	must(t, s.stop())
	if len(distinct(t, east, func(e *auditv1.Entry) bool {
		x := e.GetAuthorityChanged()
		return x.GetVerb() == "abort" && slices.Contains(x.GetForced(), want)
	})) == 0 {
		t.Error("the log does not say what was forced")
	}
}

// sameLines compares what was said in any order.
func sameLines(got, want []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want)))
}

// What a write did is what it says, and what was so before is not.
func TestAnAnswerListsWhatTheCallDidAndNothingElse(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	w, s := west.start(t, nil), east.startWith(t, west)
	r := s.rotations()
	b, c := newRoot(t), newRoot(t)
	wants := func(what string, a *adminv1.RotationChangeResponse, err error, want ...string) {
		t.Helper()
		must(t, err)
		if got := lines(a); !slices.Equal(got, want) {
			t.Errorf("%s answers\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	start := func(kind string, root *root, n uint32) (*adminv1.RotationChangeResponse, error) {
		m := &adminv1.StartRotationRequest{Kind: kind, Successors: n}
		if root != nil {
			m.Root, m.RootFingerprint = root.cert.Raw, root.fingerprint()
		}
		return r.StartRotation(t.Context(), m)
	}
	answer, err := start("intermediate", nil, 2)
	wants("a start", answer, err, "a new intermediate requested", "a new intermediate requested", "changed true, requested 2")
	if key := "intermediate-2 requested, key " + answer.Requests[0].KeyFingerprint; answer.Done[0] != key {
		t.Errorf("it did %q, want %q", answer.Done[0], key)
	}
	again, err := start("intermediate", nil, 2)
	wants("the same again", again, err, "changed false, requested 0")
	if len(again.Requests) != 2 {
		t.Errorf("what waits is %v", again.Requests)
	}
	advanced, err := r.AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{})
	wants("an advance with nothing to do", advanced, err, "changed false, requested 0")
	aborted, err := r.AbortRotation(t.Context(), &adminv1.AbortRotationRequest{Authority: "intermediate-3"})
	wants("an abort", aborted, err, "intermediate-3 dropped", "changed true, requested 0")

	a := east.root
	begun, err := start("root", b, 0)
	wants("a start of a root", begun, err, b.id()+" added", a.id()+" leaves", b.id()+" prepared → published: it was added", "changed true, requested 0")
	if _, err := start("root", c, 0); err == nil || !strings.Contains(err.Error(), b.id()+" is to replace "+a.id()+" already") || !strings.Contains(err.Error(), "abort "+b.id()) {
		t.Errorf("a second new root: %v", err)
	}
	if _, ok := s.keeper.current.Load().row(c.id()); ok {
		t.Error("a root that was refused is there")
	}
	same, err := start("root", b, 0)
	wants("the same root again", same, err, "changed false, requested 0")
	if _, err := start("root", b, 3); status.Code(err) != codes.InvalidArgument {
		t.Errorf("three successors under a new root: %v", err)
	}
	// The root that leaves may still sign what bridges the time, and that is said.
	bridge := s.signed(a, answer.Requests[0], nil)
	if got := strings.Join(bridge.Done, "\n"); !strings.Contains(got, "intermediate-2 signed under "+a.id()) || !strings.Contains(got, a.id()+" is leaving: intermediate-2 bridges the time") {
		t.Errorf("a chain under the root that leaves is answered with\n%s", got)
	}
	back, err := r.AbortRotation(t.Context(), &adminv1.AbortRotationRequest{Authority: b.id()})
	must(t, err)
	if want := []string{a.id() + " stays", b.id() + " leaves"}; !sameLines(back.Done, want) {
		t.Errorf("an abort of the new root did %q, want %q", back.Done, want)
	}
	next, err := start("root", c, 0)
	must(t, err)
	if !slices.Contains(next.Done, c.id()+" added") {
		t.Errorf("after the abort the other root: %v", next)
	}
	tainted, err := r.TaintAuthority(t.Context(), &adminv1.TaintAuthorityRequest{Authority: "intermediate-1", Reason: "stolen"})
	must(t, err)
	if !slices.Contains(tainted.Done, "intermediate-1 tainted") {
		t.Errorf("a taint did %q", tainted.Done)
	}
	repeated, err := r.TaintAuthority(t.Context(), &adminv1.TaintAuthorityRequest{Authority: "intermediate-1", Reason: "stolen"})
	wants("a taint again", repeated, err, "changed false, requested 0")

	early, err := w.rotations().ReportRotation(t.Context(), &adminv1.ReportRotationRequest{})
	must(t, err)
	_, err = w.rotations().TaintAuthority(t.Context(), &adminv1.TaintAuthorityRequest{Authority: "intermediate-1", Reason: "stolen"})
	must(t, err)
	late, err := w.rotations().ReportRotation(t.Context(), &adminv1.ReportRotationRequest{})
	must(t, err)
	took, err := r.AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Reports: [][]byte{late.Report}})
	wants("a report with a taint", took, err, "report of west true", "changed true, requested 0")
	for _, old := range [][]byte{early.Report, late.Report} {
		took, err = r.AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Reports: [][]byte{old}})
		wants("a report that is not newer", took, err, "report of west false", "changed false, requested 0")
	}
}

func TestAKillAtAnyStepOfARotationHealsAtStart(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	b := newRoot(t)
	images := c.named(t, s.Server, func(step string, n int) string { return fmt.Sprintf("%s %d", step, n) })
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	s.signed(b, started.Requests[0], nil)
	if got := s.state("intermediate-2"); got != ca.Active {
		t.Fatalf("the new issuer is %s", got)
	}
	must(t, s.stop())
	if len(images) < 10 {
		t.Fatalf("steps seen: %d", len(images))
	}
	for step, image := range images {
		s := image.start(t, nil)
		again, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
		if s.state("intermediate-2") != ca.Active {
			must(t, err)
			if len(again.Requests) > 0 {
				s.signed(b, again.Requests[0], nil)
			}
		}
		soon(t, "killed "+step+": the new issuer signs", func() bool {
			active, ok := s.issuers.Snapshot().Active(identity.Mesh)
			return ok && active.Certificate().CheckSignatureFrom(b.cert) == nil
		})
		rows := s.keeper.current.Load().rows
		signing := 0
		for _, a := range rows {
			if a.Kind == ca.KindIntermediate && a.State == ca.Active {
				signing++
			}
		}
		if signing != 1 || len(rows) != 5 {
			t.Errorf("killed %s: %d issuers sign, of %d CAs: %v", step, signing, len(rows), s.keeper.current.Load().lives())
		}
		must(t, s.stop())
		revisions := map[uint64]string{}
		for _, e := range distinct(t, image, func(e *auditv1.Entry) bool { return e.GetAuthorityChanged() != nil }) {
			x := e.GetAuthorityChanged()
			key := x.Authority + x.From + x.To
			if old := revisions[x.Revision]; old != "" && strings.Contains(old, x.Authority) && !strings.Contains(old, key) {
				t.Errorf("killed %s: revision %d has two contents: %s and %s", step, x.Revision, old, key)
			}
			revisions[x.Revision] += " " + key
		}
	}
}

// sibling is another cluster under the same root.
func (c *cluster) sibling(t testing.TB, name string) *cluster {
	t.Helper()
	d := &cluster{name: name, dir: shortDir(t), root: c.root, keys: keystore.NewMemory()}
	r, err := Init(t.Context(), InitConfig{Folder: d.folder(), Ceremony: byX509{}})
	must(t, err)
	_, err = Install(t.Context(), InstallConfig{Folder: d.folder(), Rotation: testRotation(), Chain: c.root.intermediate(t, r.CSR, nil), RootFingerprint: c.root.fingerprint()})
	must(t, err)
	return d
}

// startWith starts a server that knows peers.
func (c *cluster) startWith(t testing.TB, peers ...*cluster) *live {
	t.Helper()
	for _, p := range peers {
		info, err := Show(t.Context(), p.dir)
		must(t, err)
		c.peers = append(c.peers, Peer{Cluster: p.name, VerifierKey: info.LogVerifierKey})
	}
	return c.start(t, nil)
}

// tell carries one server's report to another.
func tell(t testing.TB, from, to *live) *adminv1.RotationChangeResponse {
	t.Helper()
	r, err := from.rotations().ReportRotation(t.Context(), &adminv1.ReportRotationRequest{})
	must(t, err)
	done, err := to.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Reports: [][]byte{r.Report}})
	must(t, err)
	return done
}

func TestClustersChangeTheirRootTogether(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	e, w := east.startWith(t, west), west.startWith(t, east)
	b := newRoot(t)
	start := func(s *live) *adminv1.PendingRequest {
		r, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
		must(t, err)
		return r.Requests[0]
	}
	e.signed(b, start(e), nil)
	if e.state(b.id()) != ca.Published {
		t.Fatal("east uses a root that west has not heard of")
	}
	// West does not trust it yet, and says so.
	tell(t, w, e)
	if e.state(b.id()) != ca.Published {
		t.Fatal("east uses a root that west does not trust")
	}
	w.signed(b, start(w), nil)
	tell(t, w, e)
	if e.state("intermediate-2") != ca.Active {
		t.Fatal("east does not switch although west trusts the root")
	}
	// West must not drop the old root, nor east, before both have said that nothing depends on it.
	tell(t, e, w)
	if w.state("intermediate-2") != ca.Active || w.state(east.root.id()) != ca.Retired {
		t.Fatalf("west's new issuer is %s, its old root %s", w.state("intermediate-2"), w.state(east.root.id()))
	}
	for _, c := range []*cluster{east, west} {
		c.ahead.Store(int64(26 * time.Hour))
	}
	time.Sleep(50 * time.Millisecond)
	if e.state(east.root.id()) != ca.Retired {
		t.Fatal("east drops the old root on a report from before its promise had ended")
	}
	tell(t, w, e)
	tell(t, e, w)
	soon(t, "both drop the old root", func() bool {
		return e.state(east.root.id()) == ca.Removed && w.state(east.root.id()) == ca.Removed
	})
}

func TestReportsAreBelievedFromPeersOnly(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west, south := east.sibling(t, "west"), east.sibling(t, "south")
	e, w, s := east.startWith(t, west), west.start(t, nil), south.start(t, nil)
	report := func(l *live) []byte {
		r, err := l.rotations().ReportRotation(t.Context(), &adminv1.ReportRotationRequest{})
		must(t, err)
		return r.Report
	}
	good := report(w)
	checkpoint, err := w.audit.Checkpoint(t.Context())
	must(t, err)
	for what, note := range map[string][]byte{
		"of no peer": report(s), "its own": report(e), "changed": bytes.Replace(good, []byte("trusting"), []byte("trustinG"), 1),
		"cut": good[:len(good)/2], "empty": nil, "a checkpoint": checkpoint, "too long": bytes.Repeat([]byte("x"), maxReport+1),
	} {
		if _, err := e.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Reports: [][]byte{note}}); status.Code(err) != codes.FailedPrecondition && status.Code(err) != codes.ResourceExhausted {
			t.Errorf("a report that is %s: %v", what, err)
		}
	}
	west.ahead.Store(int64(time.Hour))
	if _, err := e.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Reports: [][]byte{report(w)}}); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "clocks") {
		t.Errorf("a report from the future: %v", err)
	}
	west.ahead.Store(0)
	newer := report(w)
	for _, note := range [][]byte{newer, good} {
		_, err := e.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Reports: [][]byte{note}})
		must(t, err)
	}
	want, err := openReport(newer, east.peers[0], td)
	must(t, err)
	if got := e.keeper.reports["west"]; !got.At.Equal(want.At) {
		t.Errorf("an older report has replaced the newer one")
	}
	must(t, e.stop())
	e = east.start(t, nil)
	if got := e.keeper.reports["west"]; !got.At.Equal(want.At) {
		t.Error("the report is forgotten over a restart")
	}
}

func TestATaintedIntermediateIsReplacedAndItsLeavesAreCalledBack(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.apply(false, registration("a", "node-1"))
	m := s.enrol("node-1")
	conn := s.dial(m)
	lost := s.leaf(conn, "a")
	a := s.listen(m, false, lost.SubjectKeyId)
	taint := &adminv1.TaintAuthorityRequest{Authority: "intermediate-1", Reason: "its key was on a stolen disk"}
	if _, err := s.rotations().TaintAuthority(t.Context(), &adminv1.TaintAuthorityRequest{Authority: "intermediate-1"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a taint without a reason: %v", err)
	}
	tainted, err := s.rotations().TaintAuthority(t.Context(), taint)
	must(t, err)
	if len(tainted.Requests) != 1 {
		t.Fatalf("the requests are %v", tainted.Requests)
	}
	s.signed(c.root, tainted.Requests[0], nil)
	soon(t, "agents are told to replace the leaves", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.reissue != nil && len(a.reissue.IssuerKeyIds) == 1 && bytes.Equal(a.reissue.IssuerKeyIds[0], lost.SubjectKeyId)
	})
	st, err := s.rotations().RotationStatus(t.Context(), &adminv1.RotationStatusRequest{})
	must(t, err)
	if st.Reissue.GetHolding() != 1 || len(st.Tainted) != 1 || st.Tainted[0].Accepting != 2 || !strings.Contains(st.Tainted[0].Advice, "signet rotation start root") {
		t.Fatalf("status says %v, %v", st.Reissue, st.Tainted)
	}
	// The root above goes too, sooner than its leaves end, since the agent says that it holds none.
	b := newRoot(t)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	s.signed(b, started.Requests[0], nil)
	soon(t, "an issuer under the new root", func() bool { return s.state("intermediate-3") == ca.Active })
	time.Sleep(50 * time.Millisecond)
	if s.state(c.root.id()) == ca.Removed {
		t.Fatal("the old root is removed while an agent uses leaves under it")
	}
	a.holds(s.leaf(conn, "a").SubjectKeyId)
	c.ahead.Store(int64(2 * time.Minute)) // what was under way at the switch has come by then
	soon(t, "the exposed root is removed", func() bool { return s.state(c.root.id()) == ca.Removed })
	soon(t, "nobody accepts a forged certificate", func() bool {
		st, err := s.rotations().RotationStatus(t.Context(), &adminv1.RotationStatusRequest{})
		must(t, err)
		return len(st.Tainted) == 1 && st.Tainted[0].Accepting == 0
	})
}

func TestAnAbortGivesBack(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	abort := func(id string) error {
		_, err := s.rotations().AbortRotation(t.Context(), &adminv1.AbortRotationRequest{Authority: id})
		return err
	}
	if err := abort("intermediate-1"); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("the only issuer was aborted: %v", err)
	}
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(t, err)
	s.signed(c.root, started.Requests[0], nil)
	must(t, abort("intermediate-2"))
	if s.state("intermediate-1") != ca.Active || s.state("intermediate-2") != ca.Retired {
		t.Errorf("after the abort: %s, %s", s.state("intermediate-1"), s.state("intermediate-2"))
	}
	b := newRoot(t)
	_, err = s.rotations().AddTrust(t.Context(), &adminv1.AddTrustRequest{Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	must(t, abort(b.id()))
	soon(t, "a root that nobody used is removed", func() bool { return s.state(b.id()) == ca.Removed })
	if roots := s.keeper.current.Load().bundle.Roots(); len(roots) != 1 || !roots[0].Equal(c.root.cert) {
		t.Errorf("%d roots are trusted", len(roots))
	}
}

func TestSuccessorsTakeTheirTurns(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate", Successors: 3})
	must(t, err)
	if len(started.Requests) != 3 {
		t.Fatalf("%d requests", len(started.Requests))
	}
	var chains []byte
	for i, r := range started.Requests {
		chains = append(chains, c.root.intermediate(t, r.Csr, func(x *x509.Certificate) {
			x.NotBefore = time.Now().Add(time.Duration(i) * 300 * time.Hour).Truncate(time.Second)
			x.NotAfter = x.NotBefore.Add(700 * time.Hour)
		})...)
	}
	_, err = s.rotations().InstallAuthorities(t.Context(), &adminv1.InstallAuthoritiesRequest{Chains: chains, RootFingerprint: c.root.fingerprint()})
	must(t, err)
	for i, at := range []time.Duration{0, 700 * 67 / 100 * time.Hour} {
		c.ahead.Store(int64(at + 2*time.Hour))
		id := started.Requests[i].Authority
		soon(t, id+" signs in its turn", func() bool { return s.state(id) == ca.Active })
	}
}

func TestAServerThatWasAwayForTooLongSaysHowToGoOn(t *testing.T) {
	t.Parallel()
	d := &cluster{name: "west", dir: shortDir(t), root: newRootUntil(t, time.Now().Add(5000*time.Hour)), keys: keystore.NewMemory()}
	r, err := Init(t.Context(), InitConfig{Folder: d.folder(), Ceremony: byX509{}})
	must(t, err)
	install := func(csr []byte) {
		t.Helper()
		_, err := Install(t.Context(), InstallConfig{Folder: d.folder(), Rotation: testRotation(), Chain: d.root.intermediate(t, csr, func(x *x509.Certificate) {
			x.NotAfter = d.now().Add(1000 * time.Hour).Truncate(time.Second)
		}), RootFingerprint: d.root.fingerprint()})
		must(t, err)
	}
	install(r.CSR)
	again, err := Init(t.Context(), InitConfig{Folder: d.folder(), Ceremony: byX509{}})
	must(t, err)
	if again.Created || !bytes.Equal(again.CSR, r.CSR) {
		t.Error("a second init asks for something else")
	}
	d.ahead.Store(int64(2000 * time.Hour))
	_, err = New(t.Context(), d.config())
	wantError(t, err, "expired")
	wantError(t, err, "signet cluster init")
	next, err := Init(t.Context(), InitConfig{Folder: d.folder(), Ceremony: byX509{}})
	must(t, err)
	if bytes.Equal(next.CSR, r.CSR) {
		t.Fatal("the same request is printed although its certificate has expired")
	}
	install(next.CSR)
	if s := d.start(t, nil); s.state("intermediate-2") != ca.Active {
		t.Errorf("the new issuer is %s", s.state("intermediate-2"))
	}
}

func TestASuccessorThatStandsReadyTakesOverAtTheStart(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate", Successors: 2})
	must(t, err)
	s.signed(c.root, started.Requests[0], func(x *x509.Certificate) { x.NotAfter = time.Now().Add(200 * time.Hour) })
	s.signed(c.root, started.Requests[1], func(x *x509.Certificate) { x.NotBefore = time.Now().Add(100 * time.Hour) })
	must(t, s.stop())
	c.ahead.Store(int64(500 * time.Hour))
	s = c.start(t, nil)
	if got := s.state("intermediate-3"); got != ca.Active {
		t.Errorf("after an absence in which the issuer has expired, its successor is %s", got)
	}
}

func TestABannedIdentityIsRefusedAtOnce(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.apply(false, registration("a", "node-1"), registration("b", "node-1"))
	m := s.enrol("node-1")
	conn := s.dial(m)
	stream, err := signetv1.NewAgentsClient(conn).Sync(t.Context())
	must(t, err)
	set := func(r *signetv1.SyncResponse) *signetv1.RegistrationSet { return r.GetRegistrations() }
	next(t, stream, set)
	ban := &adminv1.BanIdentityRequest{SpiffeId: "spiffe://example.org/ns/default/sa/a", Reason: "stolen"}
	got, err := s.rotations().BanIdentity(t.Context(), ban)
	must(t, err)
	if !got.Changed || !slices.Equal(got.Registrations, []string{"a"}) {
		t.Errorf("the ban answers %v", got)
	}
	if told := next(t, stream, set); len(told.Registrations) != 1 || told.Registrations[0].Name != "b" {
		t.Errorf("the agent is told %v", told)
	}
	refusedNow := func() {
		t.Helper()
		if _, err := doors.Issue(t.Context(), s.dial(m), "a", shown, newCSR(t)); err == nil || !strings.Contains(err.Error(), "banned_identity") {
			t.Errorf("a banned identity: %v", err)
		}
		s.leaf(s.dial(m), "b")
	}
	refusedNow()
	must(t, s.stop())
	s = c.start(t, nil)
	refusedNow()
	for _, bad := range []string{"", "spiffe://other.org/ns/default/sa/a", "spiffe://example.org", "a"} {
		if _, err := s.rotations().BanIdentity(t.Context(), &adminv1.BanIdentityRequest{SpiffeId: bad, Reason: "x"}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("ban of %q: %v", bad, err)
		}
	}
	lifted, err := s.rotations().UnbanIdentity(t.Context(), &adminv1.UnbanIdentityRequest{SpiffeId: ban.SpiffeId})
	must(t, err)
	if !lifted.Changed {
		t.Error("nothing was lifted")
	}
	s.leaf(s.dial(m), "a")
	must(t, s.stop())
	var events []string
	for _, e := range logged(t, c) {
		if e.GetIdentityBanned() != nil || e.GetIdentityUnbanned() != nil {
			events = append(events, e.GetIdentityBanned().GetReason())
		}
	}
	if !slices.Equal(events, []string{"stolen", ""}) {
		t.Errorf("the log has %q", events)
	}
}

func TestAuthoritiesThatContradictEachOtherAreNotServed(t *testing.T) {
	t.Parallel()
	orphan := store.Authority{Authority: rotation.Authority{ID: "intermediate-1", Kind: ca.KindIntermediate, Root: "root-0", State: ca.Active}, Chain: [][]byte{newRoot(t).cert.Raw}}
	if _, err := newAuthorities(td, []store.Authority{orphan}, 1, trust.Bundle{}); err == nil {
		t.Error("an intermediate without its root was read")
	}
}

func TestInDoubtOfTheClockNoStepIsTakenWhoeverAsks(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(t, err)
	s.signed(c.root, started.Requests[0], nil)
	begun := time.Now()
	s.clock.mu.Lock()
	s.clock.elapsed = func() time.Duration { return time.Since(begun) }
	s.clock.base, s.clock.at = begun, 0
	s.clock.mu.Unlock()
	c.ahead.Store(int64(72 * time.Hour))
	if s.clock.believe() == nil {
		t.Fatal("a clock that is three days ahead of the time that has passed is believed")
	}
	b := newRoot(t)
	_, err = s.rotations().AddTrust(t.Context(), &adminv1.AddTrustRequest{Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	must(t, s.keeper.destroyKeys(t.Context()))
	if s.state("intermediate-1") != ca.Retired || s.state(b.id()) != ca.Prepared {
		t.Errorf("the old issuer is %s, the new root %s", s.state("intermediate-1"), s.state(b.id()))
	}
	c.ahead.Store(0)
	soon(t, "with the clock right again the new root is used", func() bool { return s.state(b.id()) == ca.Active })
}

func TestTheKeyOfARetiredIssuerMayBeGone(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(t, err)
	s.signed(c.root, started.Requests[0], nil)
	must(t, s.stop())
	must(t, c.keys.Delete(t.Context(), keystore.Ref{Backend: "memory", Name: IntermediateKey, Version: 1}))
	s = c.start(t, nil)
	if s.state("intermediate-2") != ca.Active {
		t.Errorf("the new issuer is %s", s.state("intermediate-2"))
	}
	// What can't sign does not take over.
	for _, dry := range []bool{true, false} {
		_, err := s.rotations().AbortRotation(t.Context(), &adminv1.AbortRotationRequest{Authority: "intermediate-2", DryRun: dry})
		if err == nil || !strings.Contains(err.Error(), "issuer intermediate-1: ") || !strings.Contains(err.Error(), "no such key") || strings.Contains(err.Error(), "it is done") {
			t.Errorf("given back to an issuer without a key (dry %v): %v", dry, err)
		}
	}
	if s.state("intermediate-2") != ca.Active {
		t.Errorf("after that the new issuer is %s", s.state("intermediate-2"))
	}
}

// noNewKeys is a keystore that has no room.
type noNewKeys struct{ keystore.Store }

func (noNewKeys) Create(context.Context, string, keystore.Algorithm, int) (keystore.Key, error) {
	return nil, errors.New("no space left on device")
}

func TestAStepThatCantBeMadeKeepsNoOtherWaiting(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, func(s *Server) { s.keeper.folder.Keys = noNewKeys{c.keys} })
	a := s.listen(s.enrol("node-1"), true)
	b := newRoot(t)
	_, err := s.rotations().AddTrust(t.Context(), &adminv1.AddTrustRequest{Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	_, err = s.rotations().TaintAuthority(t.Context(), &adminv1.TaintAuthorityRequest{Authority: "intermediate-1", Reason: "stolen"})
	if err == nil || !strings.Contains(err.Error(), "it is done") || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("a taint whose successor can't be made answers %v", err)
	}
	if row, _ := s.keeper.current.Load().row("intermediate-1"); row.Tainted.IsZero() {
		t.Error("it is not tainted")
	}
	a.hears()
	soon(t, "the root that all have is used", func() bool { return s.state(b.id()) == ca.Active })
}

func TestWithoutAutomaticStepsTheyAreTakenByAdvanceAlone(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	c.manual = true
	s := c.start(t, nil)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(t, err)
	s.signed(c.root, started.Requests[0], nil)
	b := newRoot(t)
	_, err = s.rotations().AddTrust(t.Context(), &adminv1.AddTrustRequest{Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	if s.state("intermediate-2") != ca.Prepared || s.state(b.id()) != ca.Prepared {
		t.Fatalf("without a word: %s, %s", s.state("intermediate-2"), s.state(b.id()))
	}
	// The control CA is none that is rotated.
	for _, id := range []string{"no-such-ca", "control-ca-1"} {
		for _, force := range []bool{false, true} {
			_, err := s.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Authority: id, Force: force})
			if status.Code(err) != codes.FailedPrecondition || status.Convert(err).Message() != `no CA "`+id+`": see signet ca list` {
				t.Errorf("an unknown CA (forced %v): %v", force, err)
			}
		}
	}
	_, err = s.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Authority: "intermediate-2"})
	must(t, err)
	if s.state("intermediate-2") != ca.Active || s.state(b.id()) != ca.Prepared {
		t.Errorf("with a word for one: %s, %s", s.state("intermediate-2"), s.state(b.id()))
	}
}

func TestForceIsForOneStep(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	c.manual = true
	s := c.start(t, nil)
	s.listen(s.enrol("node-1"), true)
	b := newRoot(t)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	advance := func(id string, force bool) *adminv1.RotationChangeResponse {
		t.Helper()
		r, err := s.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Authority: id, Force: force})
		must(t, err)
		return r
	}
	if len(started.Requests) == 0 {
		started = advance("", false)
	}
	s.signed(b, started.Requests[0], nil)
	advance(b.id(), true)
	advance("intermediate-2", true) // published
	advance("intermediate-2", true) // active
	if s.state("intermediate-2") != ca.Active || s.state(b.id()) != ca.Active {
		t.Fatalf("by force: %s, %s", s.state("intermediate-2"), s.state(b.id()))
	}
	advance(c.root.id(), true)
	if got := s.state(c.root.id()); got == ca.Removed {
		t.Error("one word has retired the old root and removed it while its leaves live")
	}
}

func TestOneMuteWorkloadCostsTheOthersOfItsNodeNothing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.apply(false, registration("a", "node-1"))
	m := s.enrol("node-1")
	conn := s.dial(m)
	b := newRoot(t)
	_, err := s.rotations().AddTrust(t.Context(), &adminv1.AddTrustRequest{Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	stream, err := signetv1.NewAgentsClient(conn).Sync(t.Context())
	must(t, err)
	v := s.keeper.current.Load().bundle.Version()
	nobody := make([]byte, len(trust.Digest{}))
	must(t, stream.Send(&signetv1.SyncRequest{
		BundleAcks:   []*signetv1.BundleAck{{TrustDomain: td.Name(), Digest: nobody}},
		BundleStored: &signetv1.BundleAck{TrustDomain: td.Name(), Digest: v.Digest[:], Sequence: v.Sequence},
	}))
	soon(t, "the agent's word arrives", func() bool { return s.acks.of("node-1").stored == v })
	s.leaf(conn, "a")
	if got := s.state(b.id()); got != ca.Published {
		t.Errorf("the root that a workload has not acknowledged is %s", got)
	}
}

func TestTheWordOfAnOlderStreamIsOld(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	newer := said{session: 2, stored: trust.Version{Sequence: 7}}
	s.acks.hear("node-1", newer)
	s.acks.hear("node-1", said{session: 1, stored: trust.Version{Sequence: 3}})
	if got := s.acks.of("node-1"); !got.same(newer) {
		t.Errorf("it counts that %+v was said", got)
	}
}

func TestAsManySuccessorsAsAskedForStandReady(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	for _, n := range []uint32{1, 3} {
		r, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate", Successors: n})
		must(t, err)
		if len(r.Requests) != int(n) {
			t.Errorf("asked for %d, %d wait for a signature", n, len(r.Requests))
		}
	}
}

// Those of a ceremony that begin later keep their turns: what is wanted at once is one more, asked for once.
func TestOneIsAskedForAtOnceWhereThoseThatStandByBeginLater(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	start := func(n uint32, dry bool) *adminv1.RotationChangeResponse {
		t.Helper()
		r, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate", Successors: n, DryRun: dry})
		must(t, err)
		return r
	}
	for i, r := range start(2, false).Requests {
		s.signed(c.root, r, func(x *x509.Certificate) {
			x.NotBefore = time.Now().Add(time.Duration(i+1) * 300 * time.Hour).Truncate(time.Second)
			x.NotAfter = x.NotBefore.Add(700 * time.Hour)
		})
	}
	if r := start(1, true); r.Requested != 1 {
		t.Errorf("a dry run would ask for %d: %v", r.Requested, r)
	}
	asked := start(1, false)
	if asked.Requested != 1 || len(asked.Requests) != 1 {
		t.Fatalf("%d are asked for: %v", asked.Requested, asked)
	}
	if again := start(1, false); again.Changed || len(again.Requests) != 1 {
		t.Errorf("the same again: %v", again)
	}
	s.signed(c.root, asked.Requests[0], nil)
	for id, want := range map[string]ca.State{"intermediate-2": ca.Published, "intermediate-3": ca.Published, "intermediate-4": ca.Active} {
		if got := s.state(id); got != want {
			t.Errorf("%s is %s, want %s", id, got, want)
		}
	}
}

// A ceremony's successors keep their keys and chains until the root above them can't come back.
func TestAnAbortBringsBackWhatStoodByUnderTheRoot(t *testing.T) {
	t.Parallel()
	c := &cluster{name: "east", dir: shortDir(t), root: newRootUntil(t, time.Now().Add(5000*time.Hour)), keys: keystore.NewMemory()}
	first, err := Init(t.Context(), InitConfig{Folder: c.folder(), Ceremony: byX509{}})
	must(t, err)
	_, err = Install(t.Context(), InstallConfig{Folder: c.folder(), Rotation: testRotation(), Chain: c.root.intermediate(t, first.CSR, nil), RootFingerprint: c.root.fingerprint()})
	must(t, err)
	s := c.start(t, nil)
	r := s.rotations()
	started, err := r.StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate", Successors: 2})
	must(t, err)
	for i, m := range started.Requests {
		s.signed(c.root, m, func(x *x509.Certificate) {
			x.NotBefore = time.Now().Add(time.Duration(i+1) * 600 * time.Hour).Truncate(time.Second)
			x.NotAfter = x.NotBefore.Add(1000 * time.Hour)
		})
	}
	old, b := c.root, newRoot(t)
	ends := func(next []*adminv1.RotationStep, what string) {
		t.Helper()
		n := 0
		for _, step := range next {
			said := step.Because
			for _, w := range step.Waits {
				said += " " + w.For
			}
			if (step.Authority == "intermediate-2" || step.Authority == "intermediate-3") && strings.Contains(said, what) {
				n++
			}
		}
		if n != 2 {
			t.Errorf("%d of two are said to be %q: %v", n, what, next)
		}
	}
	for _, dry := range []bool{true, false} {
		began, err := r.StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: b.fingerprint(), DryRun: dry})
		must(t, err)
		ends(began.Next, "only if no other root is signed under by then")
	}
	s.signed(b, s.requested(), nil)
	soon(t, "the switch", func() bool { return s.state(old.id()) == ca.Retired })
	status, err := r.RotationStatus(t.Context(), &adminv1.RotationStatusRequest{})
	must(t, err)
	ends(status.Steps, "it is kept until "+old.id()+" is removed")
	_, err = r.AbortRotation(t.Context(), &adminv1.AbortRotationRequest{Authority: b.id()})
	must(t, err)
	if s.state("intermediate-1") != ca.Active {
		t.Fatalf("after the abort intermediate-1 is %s", s.state("intermediate-1"))
	}
	c.ahead.Store(int64(700 * time.Hour))
	soon(t, "one of the ceremony signs", func() bool { return s.state("intermediate-2") == ca.Active })
}

func TestAReportIsBounded(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	w := west.start(t, nil)
	info, err := Show(t.Context(), west.dir)
	must(t, err)
	peer := Peer{Cluster: "west", VerifierKey: info.LogVerifierKey}
	ref, _, err := w.store.Meta(t.Context(), logKeyFact)
	must(t, err)
	key, err := w.config.key(t.Context(), ref)
	must(t, err)
	sign := func(change func(*rotation.Report)) []byte {
		now := time.Now()
		r := rotation.Report{Cluster: "west", At: now, Until: now.Add(time.Hour)}
		change(&r)
		text, err := json.Marshal(r)
		must(t, err)
		note, err := audit.SignNote(w.config.Origin(), key, reportTitle+td.Name()+"\n"+string(text)+"\n")
		must(t, err)
		return note
	}
	for _, change := range []func(*rotation.Report){
		func(*rotation.Report) {}, func(r *rotation.Report) { r.Until = r.At.Add(rotation.MaxReportLife) },
	} {
		if _, err := openReport(sign(change), peer, td); err != nil {
			t.Fatal(err)
		}
	}
	for what, change := range map[string]func(*rotation.Report){
		"many roots":      func(r *rotation.Report) { r.Roots = make([]rotation.RootReport, maxReportRoots+1) },
		"many taints":     func(r *rotation.Report) { r.Tainted = make([]rotation.TaintReport, maxReportTaints+1) },
		"a long name":     func(r *rotation.Report) { r.Tainted = []rotation.TaintReport{{ID: strings.Repeat("x", 300)}} },
		"many agents":     func(r *rotation.Report) { r.Roots = []rotation.RootReport{{Missing: make([]string, maxMissing+1)}} },
		"counts that lie": func(r *rotation.Report) { r.Roots = []rotation.RootReport{{Trusting: 2, Validators: 1}} },
		"many accepted": func(r *rotation.Report) {
			r.Accepting, r.Gone = make([]rotation.Acceptance, maxAuthorities), []string{"x"}
		},
		"fewer than none": func(r *rotation.Report) { r.Accepting = []rotation.Acceptance{{Agents: -1}} },
		"a long root":     func(r *rotation.Report) { r.Accepting = []rotation.Acceptance{{Root: strings.Repeat("x", 300)}} },
		"a long one gone": func(r *rotation.Report) { r.Gone = []string{strings.Repeat("x", 300)} },
		"another cluster": func(r *rotation.Report) { r.Cluster = "south" },
		"no time":         func(r *rotation.Report) { r.At = time.Time{} },
		"no end":          func(r *rotation.Report) { r.Until = time.Time{} },
		"an end before":   func(r *rotation.Report) { r.Until = r.At },
		"a far end":       func(r *rotation.Report) { r.Until = r.At.Add(rotation.MaxReportLife + 1) },
	} {
		if _, err := openReport(sign(change), peer, td); err == nil {
			t.Errorf("a report with %s was believed", what)
		}
	}
}

func FuzzReport(f *testing.F) {
	f.Add([]byte("signet rotation report v1\nexample.org\n{}\n\n— example.org/west/west-1 AAAAAAAA\n"))
	f.Add([]byte(""))
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	vkey, err := note.NewEd25519VerifierKey("example.org/west/west-1", pub)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, signed []byte) {
		if r, err := openReport(signed, Peer{Cluster: "west", VerifierKey: vkey}, td); err == nil {
			t.Errorf("a report that nobody has signed was believed: %+v", r)
		}
	})
}
