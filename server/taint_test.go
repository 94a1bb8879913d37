package server

import (
	"slices"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

// taint takes the key of an intermediate for lost.
func (l *live) taint(id string) *adminv1.RotationChangeResponse {
	l.t.Helper()
	r, err := l.rotations().TaintAuthority(l.t.Context(), &adminv1.TaintAuthorityRequest{Authority: id, Reason: "stolen"})
	must(l.t, err)
	return r
}

// accepting says in words who accepts what is forged with the one key that is lost; status, metric and finding must agree.
func (l *live) accepting() string {
	l.t.Helper()
	st, err := l.rotations().RotationStatus(l.t.Context(), &adminv1.RotationStatusRequest{})
	must(l.t, err)
	if len(st.Tainted) != 1 {
		l.t.Fatalf("status says that these are tainted: %v", st.Tainted)
	}
	var all []string
	for _, a := range st.Tainted[0].AcceptedBy {
		var named []string
		for _, x := range a.Named {
			named = append(named, x.Agent)
		}
		all = append(all, strings.TrimSuffix(acceptedBy(a)+" "+strings.Join(named, " "), " "))
	}
	want := 0.0
	if st.Tainted[0].Accepting > 0 {
		want = 1
	}
	_, ready := get(l.t, l, "/readyz?verbose")
	if metric, found := gauged(l.t.(*testing.T), l, "signet_tainted_accepted"), strings.Contains(ready, check.CodeTaint); metric != want || found != (want == 1) || (len(all) > 0) != found {
		l.t.Errorf("status says %d (%v), the metric %v, a finding %v", st.Tainted[0].Accepting, all, metric, found)
	}
	return strings.Join(all, "; ")
}

// replaced replaces the root of a lone cluster, whoever lacks the new one.
func (l *live) replaced(old, b *root) {
	l.t.Helper()
	started, err := l.rotations().StartRotation(l.t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(l.t, err)
	newest := started.Requests[len(started.Requests)-1]
	l.signed(b, newest, nil)
	soon(l.t, "the old root is removed", func() bool {
		for _, id := range []string{b.id(), newest.Authority, old.id()} {
			_, err := l.rotations().AdvanceRotation(l.t.Context(), &adminv1.AdvanceRotationRequest{Authority: id, Force: true})
			must(l.t, err)
		}
		return l.state(old.id()) == ca.Removed
	})
}

// An agent that fell silent asks for nothing, and no switch waits for it; its workloads go on validating with what they have.
func TestATaintIsNotOverForASilentAgentWhoseLeavesHaveEnded(t *testing.T) {
	t.Parallel()
	for what, end := range map[string]func(*live, func()){
		"it comes back": func(_ *live, back func()) { back() },
		"it is banned": func(l *live, _ func()) {
			_, err := l.admin().BanAgent(l.t.Context(), &adminv1.BanAgentRequest{Agent: "node-2"})
			must(l.t, err)
		},
	} {
		t.Run(what, func(t *testing.T) {
			c := newCluster(t, "east")
			c.life = time.Hour
			s := c.start(t, nil)
			s.apply(false, registration("a", "node-1", "node-2"))
			one, two := s.enrol("node-1"), s.enrol("node-2")
			conn := s.dial(two)
			a, silent := s.listen(one, false), s.listen(two, false, s.leaf(conn, "a").SubjectKeyId)
			soon(t, "both have the root", func() bool { return gauged(t, s, "signet_bundle_validators_acked") == 2 })
			c.ahead.Store(int64(10 * time.Minute))
			silent.say()
			soon(t, "its last word", func() bool { return s.acks.of("node-2").at.After(c.now().Add(-time.Minute)) })
			c.ahead.Store(int64(15 * time.Minute))
			must(t, silent.leaves())
			soon(t, "node-2 is gone", func() bool { return s.sessions.of("node-2") == 0 })
			s.taint("intermediate-1")
			if got := s.accepting(); got != "east (its trust bundle, 2 agents) node-2 node-1" {
				t.Errorf("accepted by %s", got)
			}
			b := newRoot(t)
			s.replaced(c.root, b)
			soon(t, "node-1 has the new roots", func() bool {
				return len(a.believes().Roots()) == 1 && gauged(t, s, "signet_bundle_validators_acked") == 1
			})
			c.ahead.Store(int64(2 * time.Hour)) // all leaves of node-2 have ended
			if n := len(s.keeper.validators(c.now())); n != 1 {
				t.Errorf("a switch waits for %d agents", n)
			}
			if got := s.accepting(); got != "east (1 agent) node-2" {
				t.Errorf("with its leaves ended: accepted by %s", got)
			}
			st, err := s.rotations().RotationStatus(t.Context(), &adminv1.RotationStatusRequest{})
			must(t, err)
			heard := st.Tainted[0].AcceptedBy[0].Named[0].LastHeard
			if ago := c.now().Sub(heard.AsTime()); heard == nil || ago < 105*time.Minute || ago >= 110*time.Minute { // its last word is older
				t.Errorf("it was last heard %s ago", ago)
			}
			// The root that they signed under is told of, to the other clusters too.
			own := s.keeper.report(s.keeper.current.Load(), s.keeper.heard(), c.now())
			if x, known := s.keeper.policy.Accepts(own, c.root.id(), c.now()); !known || x != (rotation.Acceptance{Root: c.root.id(), Agents: 1}) {
				t.Errorf("peers are told %+v", own.Accepting)
			}
			for _, r := range own.Roots {
				if r.ID == c.root.id() && len(r.Missing) > 0 {
					t.Errorf("the removed root is said to be missing at %v", r.Missing)
				}
			}
			set := s.keeper.current.Load()
			lost, _ := set.row("intermediate-1")
			for after, want := range map[time.Duration]int{time.Minute: 1, time.Minute + time.Second: 0} { // clocks may be a minute apart
				now := lost.NotAfter.Add(after)
				if got := s.keeper.tainted(set, s.keeper.world(set, now), now); len(got) != want || want > 0 && got[0].Accepting != 1 {
					t.Errorf("%s after the end of its chain: %v", after, got)
				}
			}
			end(s, func() { s.listen(two, false) })
			soon(t, "it is over", func() bool { return gauged(t, s, "signet_tainted_accepted") == 0 })
			if got := s.accepting(); got != "" {
				t.Errorf("in the end: accepted by %s", got)
			}
		})
	}
}

func TestATaintIsNotOverWhileATrustBundleHoldsTheRoot(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.taint("intermediate-1")
	if got := s.accepting(); got != "east (its trust bundle)" {
		t.Errorf("in a cluster without agents: accepted by %q", got)
	}
	fromOutside := func(config Config) bool {
		found, err := CheckRotation(t.Context(), config, time.Now())
		must(t, err)
		return slices.ContainsFunc(found, func(f check.Finding) bool {
			return f.Code == check.CodeTaint && strings.HasSuffix(f.Message, "by east (its trust bundle)")
		})
	}
	if !fromOutside(c.config()) {
		t.Error("the folder alone does not show it")
	}
	s.replaced(c.root, newRoot(t))
	if got := s.accepting(); got != "" {
		t.Errorf("accepted by %q, and its root is removed", got)
	}
	late := c.config()
	late.Rotation.Delay = time.Hour
	if !fromOutside(late) || fromOutside(c.config()) {
		t.Error("those that can't acknowledge are taken to have let go of it at once, or never")
	}
}

func TestATaintIsNotOverBeforeEveryClusterHasSaidSo(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	e, w := east.startWith(t, west), west.startWith(t, east)
	e.taint("intermediate-1")
	e.replaced(east.root, newRoot(t))
	if got := e.accepting(); got != "west (has never reported)" {
		t.Errorf("before west reports: accepted by %q", got)
	}
	tell(t, w, e)
	if got := e.accepting(); got != "west (its trust bundle)" {
		t.Errorf("west has no agents, and the root: accepted by %q", got)
	}
	w.enrol("node-1") // and says nothing
	w.replaced(east.root, newRoot(t))
	tell(t, w, e)
	if got := e.accepting(); got != "west (1 agent)" {
		t.Errorf("an agent of west may have it: accepted by %q", got)
	}
	_, err := w.admin().BanAgent(t.Context(), &adminv1.BanAgentRequest{Agent: "node-1"})
	must(t, err)
	tell(t, w, e)
	if got := e.accepting(); got != "" {
		t.Errorf("west has let go of it: accepted by %q", got)
	}
	// West, which has not heard of the taint, could add it again.
	r, err := e.rotations().RotationStatus(t.Context(), &adminv1.RotationStatusRequest{})
	must(t, err)
	at := stamp(r.Clusters[1].At.AsTime())
	east.ahead.Store(int64(2 * time.Hour))
	if got := e.accepting(); got != "west (its report of "+at+" does not say how it is now)" {
		t.Errorf("when west's report holds no more: accepted by %q", got)
	}
	west.ahead.Store(int64(2 * time.Hour))
	tell(t, e, w)
	tell(t, w, e)
	east.ahead.Store(int64(4 * time.Hour))
	if got := e.accepting(); got != "" {
		t.Errorf("west knows that it can't be added again: accepted by %q", got)
	}
}

// What was sent after the last acknowledgement may have come.
func TestAnAgentMayHaveWhatWasPublishedSinceItsLastWord(t *testing.T) {
	t.Parallel()
	version := func(sequence uint64) trust.Version {
		return trust.Version{Sequence: sequence, Digest: trust.Digest{byte(sequence)}}
	}
	k := &keeper{}
	for i, roots := range [][]string{{"a"}, {"a", "b"}, {"b"}} {
		v := version(uint64(i) + 1)
		k.history = append(k.history, store.PastBundle{Sequence: v.Sequence, Digest: v.Digest, Roots: roots})
	}
	other := version(3)
	other.Digest[0]++
	for what, c := range map[string]struct {
		v    trust.Version
		a, b bool
	}{
		"the first":             {version(1), true, true},
		"the second":            {version(2), true, true},
		"the newest":            {version(3), false, true},
		"nothing":               {trust.Version{}, true, true},
		"what was never ours":   {other, true, true},
		"what is not there yet": {version(4), true, true},
	} {
		if a, b := k.mayHave(c.v, "a"), k.mayHave(c.v, "b"); a != c.a || b != c.b || k.mayHave(c.v, "c") {
			t.Errorf("an agent that has acknowledged %s may have a: %v, b: %v", what, a, b)
		}
	}
}

// Only what was removed can't come back: a root that was added may be published yet.
func TestARootThatWasAddedIsNotGone(t *testing.T) {
	t.Parallel()
	now := time.Now()
	set := &authorities{}
	var taints []rotation.TaintReport
	for _, state := range []ca.State{ca.Prepared, ca.Removed} {
		id := "root-" + string(state)
		set.rows = append(set.rows, store.Authority{Authority: rotation.Authority{ID: id, Kind: ca.KindRoot, State: state, NotAfter: now.Add(time.Hour)}})
		taints = append(taints, rotation.TaintReport{ID: "i", Root: id, NotAfter: now.Add(time.Hour)})
	}
	all, gone := (&keeper{}).accepting(set, nil, taints, now)
	if len(all) > 0 || !slices.Equal(gone, []string{"root-removed"}) {
		t.Errorf("accepted %v, gone %v", all, gone)
	}
}

// The root may have signed a request before its key was found to be lost, and only then does the chain come here.
func TestAChainThatComesAfterTheKeyWasLostCountsAsAccepted(t *testing.T) {
	t.Parallel()
	r := rehearse(t, newCluster(t, "east"))
	r.both("two are requested", startsIntermediate(2))
	comes := r.signs(r.cluster.root)
	r.both("the first one's key is lost", taints("intermediate-2"))
	if got := r.accepted(); len(got) > 0 {
		t.Errorf("accepted are %v before a certificate is known", got)
	}
	r.both("its chain comes", comes)
	if got, want := r.accepted(), []string{"intermediate-2 east"}; !slices.Equal(got, want) {
		t.Errorf("accepted are %v, not %v", got, want)
	}
	if row, _ := r.keeper.current.Load().row("intermediate-2"); row.State != ca.Removed || row.Root != r.cluster.root.id() {
		t.Errorf("it is %+v", row)
	}
	r.both("its chain comes again", comes)
	must(t, r.stop())
	s := r.cluster.start(t, nil)
	if got, want := s.accepted(), []string{"intermediate-2 east"}; !slices.Equal(got, want) {
		t.Errorf("after a restart accepted are %v, not %v", got, want)
	}
}

// A server that has just started has heard nobody; whom it had heard a moment before is not known to it.
func TestAnAgentThatWasNotHeardSinceTheStartIsSaidToBe(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	one := s.enrol("node-1")
	enrolled := c.now()
	s.listen(one, false)
	soon(t, "it has the root", func() bool { return gauged(t, s, "signet_bundle_validators_acked") == 1 })
	s.taint("intermediate-1")
	must(t, s.stop())
	s = c.start(t, nil)
	named := func() *adminv1.AcceptingAgent {
		st, err := s.rotations().RotationStatus(t.Context(), &adminv1.RotationStatusRequest{})
		must(t, err)
		return st.Tainted[0].AcceptedBy[0].Named[0]
	}
	if n := named(); !n.Unheard || n.LastHeard.AsTime().After(enrolled) {
		t.Errorf("just after the start: %v", n)
	}
	a := s.listen(one, false)
	soon(t, "it is there", func() bool { return named().LastHeard == nil })
	must(t, a.leaves())
	soon(t, "it is gone", func() bool { return named().LastHeard != nil })
	if n := named(); n.Unheard || !n.LastHeard.AsTime().After(enrolled) {
		t.Errorf("after it has gone: %v", n)
	}
}

// Where steps wait for a word, a request whose key is lost is not given up yet.
func TestAChainOfALostKeyCountsBeforeItsRequestIsGivenUp(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	c.manual = true
	r := rehearse(t, c)
	r.both("two are requested", startsIntermediate(2))
	comes := r.signs(r.cluster.root)
	r.both("the first one's key is lost", taints("intermediate-2"))
	r.both("its chain comes", comes)
	if got, want := r.accepted(), []string{"intermediate-2 east"}; !slices.Equal(got, want) || r.state("intermediate-2") != ca.Prepared {
		t.Errorf("accepted are %v, not %v; it is %s", got, want, r.state("intermediate-2"))
	}
	_, err := r.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Authority: "intermediate-2"})
	must(t, err)
	if got, want := r.accepted(), []string{"intermediate-2 east"}; !slices.Equal(got, want) || r.state("intermediate-2") != ca.Removed {
		t.Errorf("given up: accepted are %v, not %v; it is %s", got, want, r.state("intermediate-2"))
	}
}
