package server

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/test/doors"
)

// report is what a server tells its peers now.
func (l *live) report() []byte {
	l.t.Helper()
	r, err := l.rotations().ReportRotation(l.t.Context(), &adminv1.ReportRotationRequest{})
	must(l.t, err)
	return r.Report
}

// holds is the report of a cluster that is held, in memory and in the database.
func (l *live) holds(cluster string) rotation.Report {
	l.t.Helper()
	l.keeper.mu.Lock()
	r := l.keeper.reports[cluster]
	l.keeper.mu.Unlock()
	kept, err := l.store.PeerReports(l.t.Context())
	must(l.t, err)
	if _, ok := kept[cluster]; ok == r.At.IsZero() {
		l.t.Errorf("the report of %s that is held is of %s; that one is stored is %t", cluster, r.At, ok)
	}
	return r
}

// reported are the entries of the log about reports that were taken.
func (c *cluster) reported(t testing.TB) []*auditv1.PeerReported {
	t.Helper()
	var all []*auditv1.PeerReported
	for _, e := range distinct(t, c, func(e *auditv1.Entry) bool { return e.GetPeerReported() != nil }) {
		all = append(all, e.GetPeerReported())
	}
	return all
}

func TestAReportSaysUntilWhenItHolds(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	r, err := openReport(s.report(), Peer{Cluster: "east", VerifierKey: s.audit.VerifierKey()}, td)
	must(t, err)
	if life := s.keeper.policy.ReportLife; !r.Until.Equal(r.At.Add(life)) {
		t.Errorf("made at %s, it holds until %s; report_life is %s", r.At, r.Until, life)
	}
}

func TestOfSeveralReportsAllAreTakenOrNone(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west, south := east.sibling(t, "west"), east.sibling(t, "south")
	e, w, s := east.startWith(t, west, south), west.start(t, nil), south.start(t, nil)
	give := func(dry bool, notes ...[]byte) error {
		_, err := e.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{
			Reports: notes, ReportNames: []string{"first.report", "second.report"}, DryRun: dry,
		})
		return err
	}
	good, own := w.report(), e.report()
	changed := bytes.Replace(s.report(), []byte("trusting"), []byte("trustinG"), 1)
	for what, c := range map[string]struct {
		notes [][]byte
		says  string
	}{
		"garbage behind a good one":   {[][]byte{good, []byte("garbage")}, "second.report: nobody has signed it"},
		"garbage before a good one":   {[][]byte{[]byte("garbage"), good}, "first.report: nobody has signed it"},
		"its own behind a good one":   {[][]byte{good, own}, "second.report: it is this cluster's own"},
		"a changed one behind a good": {[][]byte{good, changed}, "second.report: it is not signed with a key that rotation.peers names (of west, south)"},
	} {
		err := give(false, c.notes...)
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(status.Convert(err).Message(), c.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want one sentence with %q", what, err, c.says)
		}
		if r := e.holds("west"); !r.At.IsZero() {
			t.Errorf("%s: the good one of %s was taken", what, r.At)
		}
	}
	must(t, give(true, good, s.report()))
	if !e.holds("west").At.IsZero() || !e.holds("south").At.IsZero() {
		t.Error("a dry run takes reports")
	}
	must(t, give(false, good, s.report()))
	if e.holds("west").At.IsZero() || e.holds("south").At.IsZero() {
		t.Error("good reports are not taken")
	}
	must(t, e.stop())
	if got := east.reported(t); len(got) != 2 {
		t.Errorf("the log knows of %d reports, want the two that were taken: %v", len(got), got)
	}
}

func TestTheLogKnowsWhichReportWasBroughtAndByWhom(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	e, w := east.startWith(t, west), west.start(t, nil)
	tell(t, w, e)
	tell(t, w, e) // nothing new, but brought by a person
	old := w.report()
	_, err := w.rotations().TaintAuthority(t.Context(), &adminv1.TaintAuthorityRequest{Authority: "intermediate-1", Reason: "stolen"})
	must(t, err)
	tell(t, w, e)
	made := e.holds("west").At
	_, err = e.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Reports: [][]byte{old}})
	must(t, err) // overtaken: it changes nothing
	must(t, e.stop())
	got := east.reported(t)
	if len(got) != 3 {
		t.Fatalf("the log knows of %v", got)
	}
	for _, x := range got {
		if x.Cluster != "west" || len(x.Digest) != 32 || x.Evidence.GetDoor() != "admin" || !strings.HasPrefix(x.Evidence.GetCaller(), "uid:") {
			t.Errorf("an entry is %v", x)
		}
	}
	if got[2].Made != made.UnixNano() {
		t.Errorf("the last one was made at %s, the entry says %s", made, time.Unix(0, got[2].Made))
	}
	root := east.root.id()
	if first := []string{root + " is believed, and signed under"}; !slices.Equal(got[0].Says, first) || len(got[1].Says) != 0 {
		t.Errorf("the first two say %q and %q", got[0].Says, got[1].Says)
	}
	if says := got[2].Says; len(says) != 1 || !strings.HasPrefix(says[0], "the key of intermediate-1 under "+root+" is tainted since ") {
		t.Errorf("of the taint it says %q", says)
	}
}

// Where reports come every few seconds, the log is told what is new in them.
func TestTheLogIsToldOfReportsThatComeByThemselvesWhenTheySaySomethingNew(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	e, w := east.startWith(t, west), west.start(t, nil)
	hear := func() {
		t.Helper()
		d := scheduled()
		d.notes = [][]byte{w.report()}
		_, err := e.keeper.do(t.Context(), d, nil)
		must(t, err)
	}
	hear()
	for range 5 {
		hear()
	}
	_, err := w.rotations().TaintAuthority(t.Context(), &adminv1.TaintAuthorityRequest{Authority: "intermediate-1", Reason: "stolen"})
	must(t, err)
	hear()
	hear()
	if len(e.holds("west").Tainted) != 1 {
		t.Error("the taint is not known")
	}
	must(t, e.stop())
	got := east.reported(t)
	if len(got) != 2 || got[0].Evidence.GetDoor() != "self" || len(got[1].Says) != 1 || !strings.Contains(got[1].Says[0], "is tainted since") {
		t.Errorf("the log knows of %v", got)
	}
}

// What can't be logged is not taken, and comes again.
func TestAReportThatCantBeLoggedIsNotTaken(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	west := east.sibling(t, "west")
	e, w := east.startWith(t, west), west.start(t, nil)
	place := newSharedPlace()
	place.put(reportDocument("west"), w.report())
	ex := newExchange(e.keeper, place, e.audit.VerifierKey())
	change := e.keeper.change
	done, err := e.keeper.myTurn(t.Context())
	must(t, err)
	e.keeper.change = func(context.Context, *store.Note, func(*store.Store) error, func()) error { return errNotLogged }
	done()
	if _, err := ex.hear(t.Context()); !errors.Is(err, errNotTaken) || !e.holds("west").At.IsZero() {
		t.Errorf("with a log that is full: %v", err)
	}
	done, err = e.keeper.myTurn(t.Context())
	must(t, err)
	e.keeper.change = change
	done()
	if _, err := ex.hear(t.Context()); err != nil || e.holds("west").At.IsZero() {
		t.Errorf("with a log that can be written again: %v", err)
	}
}

func TestWhatAReportSaysAnewIsSaid(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	roots := func(all ...rotation.RootReport) rotation.Report { return rotation.Report{Roots: all} }
	for _, c := range []struct {
		before, after rotation.Report
		want          []string
	}{
		{roots(), roots(rotation.RootReport{ID: "a"}), []string{"a is believed"}},
		{roots(rotation.RootReport{ID: "a", Trusting: 1}), roots(rotation.RootReport{ID: "a", Trusting: 2, Holding: 1, LeavesUntil: at}), nil},
		{roots(rotation.RootReport{ID: "a", Signing: true}), roots(rotation.RootReport{ID: "a", Leaving: true}), []string{"a is leaving"}},
		{roots(rotation.RootReport{ID: "a"}), roots(rotation.RootReport{ID: "b"}), []string{"a is not spoken of any more", "b is believed"}},
		{rotation.Report{}, rotation.Report{Tainted: []rotation.TaintReport{{ID: "i", Root: "a", Since: at}}}, []string{"the key of i under a is tainted since 2026-01-02T03:04:05Z"}},
		{rotation.Report{}, rotation.Report{Tainted: []rotation.TaintReport{{ID: "a", Root: "a", Since: at}}}, []string{"the key of a is tainted since 2026-01-02T03:04:05Z"}},
	} {
		if got := news(c.before, c.after); !slices.Equal(got, c.want) {
			t.Errorf("%+v after %+v says %q, want %q", c.after, c.before, got, c.want)
		}
	}
	var many rotation.Report
	for i := range maxReportRoots {
		many.Roots = append(many.Roots, rotation.RootReport{ID: strings.Repeat("x", maxReportName-1) + string(rune('!'+i))})
	}
	if got := news(rotation.Report{}, many); len(got) != maxNews+1 || got[maxNews] != "and 192 more" {
		t.Errorf("of %d roots %d sentences are logged", maxReportRoots, len(got))
	}
}

// Whoever gets a leaf must be able to verify those of others.
func TestAnAgentWithoutARootInUseGetsNoLeafUntilItHasIt(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.apply(false, registration("a", "node-1"))
	b := newRoot(t)
	_, err := s.rotations().AddTrust(t.Context(), &adminv1.AddTrustRequest{Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	if s.state(b.id()) != ca.Active {
		t.Fatalf("without agents the root is %s", s.state(b.id()))
	}
	m := s.enrol("node-1")
	conn := s.dial(m)
	ask := func() error {
		_, err := doors.Issue(t.Context(), conn, "a", shown, newCSR(t))
		return err
	}
	if err := ask(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "take the newest trust bundle first") {
		t.Errorf("before it has said what it has: %v", err)
	}
	a := s.listen(m, true)
	soon(t, "it is told", func() bool { return len(a.believes().Roots()) == 2 })
	if err := ask(); status.Code(err) != codes.Unavailable {
		t.Errorf("told, but not acknowledged: %v", err)
	}
	a.hears()
	soon(t, "it has acknowledged, and gets a leaf", func() bool { return ask() == nil })
}
