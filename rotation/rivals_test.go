package rotation

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
)

// East and west have begun a rotation each at the same moment.
func TestTwoRootsThatStaySideBySideAreFound(t *testing.T) {
	rivals := func(change func(w *World)) string {
		w := worldOf(rootA(ca.Active), named("b", rootA(ca.Active)), under("a", "i", ca.Active))
		w.Authorities[1].NotAfter = w.Authorities[1].NotAfter.Add(time.Hour)
		w.Peers = []Report{west(noon, "b", "a"), west(noon, "b", "a")}
		w.Peers[1].Cluster = "north"
		change(&w)
		return fmt.Sprint(Rivals(testPolicy, w, noon))
	}
	for what, c := range map[string]struct {
		change func(w *World)
		want   string
	}{
		"each its own":             {func(*World) {}, "[{b [west north]} {a [east]}]"},
		"the other ends last":      {func(w *World) { w.Authorities[0].NotAfter = w.Authorities[1].NotAfter.Add(time.Hour) }, "[{a [east]} {b [west north]}]"},
		"both end at once":         {func(w *World) { w.Authorities[0].NotAfter = w.Authorities[1].NotAfter }, "[{a [east]} {b [west north]}]"},
		"one leaves here":          {func(w *World) { w.Authorities[0].Leaving = noon }, "[]"},
		"one leaves there":         {func(w *World) { w.Peers[1].Roots[1].Leaving = true }, "[]"},
		"one is exposed":           {func(w *World) { w.Authorities[1].Tainted = noon }, "[]"},
		"reports that are too old": {func(w *World) { w.Peers[0].At, w.Peers[1].At = noon.Add(-2*day), noon.Add(-2*day) }, "[]"},
		"one that is not here":     {func(w *World) { w.Authorities[1].State = ca.Removed }, "[]"},
		"one that another refuses": {func(w *World) { w.Peers[1].Roots = w.Peers[1].Roots[:1] }, "[]"},
		"all under one":            {func(w *World) { w.Authorities[2].Root = "b" }, "[]"},
		"two of the others": {func(w *World) {
			w.Authorities[2].State = ca.Retired
			w.Peers[1].Roots[0].Signing, w.Peers[1].Roots[1].Signing = false, true
		}, "[{b [west]} {a [north]}]"},
	} {
		if got := rivals(c.change); got != c.want {
			t.Errorf("%s: %s, want %s", what, got, c.want)
		}
	}
}

// Its root is gone elsewhere, which nothing here would show: what comes next names the way.
func TestARootThatOthersHaveLeftWaitsForAPerson(t *testing.T) {
	w := worldOf(rootA(ca.Active), under("a", "i", ca.Active))
	w.Peers = []Report{west(noon, "b"), west(noon, "b")}
	w.Peers[1].Cluster = "north"
	step := func() (Step, bool) {
		steps := Next(testPolicy, w, noon)
		i := slices.IndexFunc(steps, func(s Step) bool { return s.Authority == "a" })
		if i < 0 {
			return Step{}, false
		}
		return steps[i], true
	}
	s, ok := step()
	if want := "what is signed under it is refused in cluster west, north; b, under which cluster west, north signs, is not believed here"; !ok || s.To != ca.Retired || s.Because != want || s.Ready(true) {
		t.Fatalf("next is %+v", s)
	}
	if want := "an admin has to begin with b here: signet rotation start root"; len(s.Waits) != 1 || s.Waits[0].For != want {
		t.Errorf("it waits for %v", s.Waits)
	}
	// Begun, it goes its way.
	all, err := AddRoot(testPolicy, w, named("b", rootA(ca.Prepared)), noon)
	if err != nil {
		t.Fatal(err)
	}
	w.Authorities = all
	if all, err = StartRoot(w, "b", noon); err != nil {
		t.Fatal(err)
	}
	w.Authorities = all
	if s, ok = step(); !ok || s.Because != "it is being replaced" {
		t.Errorf("next is %+v", s)
	}
	w.Authorities = worldOf(rootA(ca.Active), under("a", "i", ca.Active)).Authorities
	for i := range w.Peers {
		w.Peers[i].At, w.Peers[i].Until = noon.Add(-3*day), noon.Add(-2*day)
	}
	if s, ok = step(); ok {
		t.Errorf("reports that hold no more are believed: %+v", s)
	}
}
