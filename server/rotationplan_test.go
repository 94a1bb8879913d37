package server

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
)

// plans are the steps of a plan in words, with the codes of what is assumed.
func (l *live) plans(kind string) (said []string) {
	l.t.Helper()
	r, err := l.rotations().PlanRotation(l.t.Context(), &adminv1.PlanRotationRequest{Kind: kind})
	must(l.t, err)
	for _, s := range r.Steps {
		text := fmt.Sprintf("%s %s", s.Authority, s.To)
		for _, a := range s.Assumed {
			text += " " + a.Code
		}
		said = append(said, text)
	}
	return said
}

func TestAPlanGoesOnToTheEndOfTheRotationThatIsUnderWay(t *testing.T) {
	t.Parallel()
	east := newCluster(t, "east")
	east.manual = true
	west := east.sibling(t, "west")
	s, w := east.startWith(t, west), west.start(t, nil)
	s.apply(false, registration("a", "node-1"))
	m := s.enrol("node-1")
	s.leaf(s.dial(m), "a")
	s.listen(m, false)
	old, b := east.root.id(), newRoot(t)
	last := func(plan []string, want string) {
		t.Helper()
		if len(plan) == 0 || plan[len(plan)-1] != want {
			t.Errorf("the plan ends with %q, want %q:\n%q", plan[max(0, len(plan)-1):], want, plan)
		}
	}
	invented := func(plan []string) bool {
		return slices.ContainsFunc(plan, func(s string) bool { return strings.HasPrefix(s, "the new root") })
	}
	// Before it, one is planned.
	before := s.plans("root")
	last(before, old+" removed peer")
	if !invented(before) {
		t.Errorf("without a rotation no new root is planned: %q", before)
	}
	_, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: b.cert.Raw, RootFingerprint: b.fingerprint()})
	must(t, err)
	for _, kind := range []string{"", "root"} {
		plan := s.plans(kind)
		if invented(plan) || !slices.Contains(plan, old+" removed peer") || !slices.Contains(plan, b.id()+" active quorum peer") ||
			!slices.Contains(plan, "successor-1 published signature") {
			t.Errorf("plan %q of a rotation that is under way: %q", kind, plan)
		}
	}
	last(s.plans("root"), old+" removed peer")

	// With the switch made it is not over.
	steps, err := s.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{})
	must(t, err)
	w.signed(b, w.startRoot(b), nil)
	s.signed(b, steps.Requests[0], nil)
	there, here := w.rotations(), s.rotations()
	carry := func() {
		t.Helper()
		r, err := there.ReportRotation(t.Context(), &adminv1.ReportRotationRequest{})
		must(t, err)
		_, err = here.AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{Reports: [][]byte{r.Report}})
		must(t, err)
	}
	soon(t, "the switch", func() bool { carry(); return s.state(old) == ca.Retired })
	for _, kind := range []string{"", "root"} {
		if plan := s.plans(kind); invented(plan) || !slices.Contains(plan, old+" removed peer") {
			t.Errorf("plan %q after the switch: %q", kind, plan)
		}
	}
	// When it is over the next one is another.
	east.ahead.Store(int64(26 * time.Hour))
	west.ahead.Store(int64(26 * time.Hour))
	soon(t, "the old root is removed", func() bool { carry(); return s.state(old) == ca.Removed })
	if plan := s.plans("root"); !invented(plan) {
		t.Errorf("after the rotation: %q", plan)
	} else {
		last(plan, b.id()+" removed peer")
	}
}
