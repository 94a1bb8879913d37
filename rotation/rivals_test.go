package rotation

import (
	"fmt"
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
