package rotation

import (
	"cmp"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
)

func told(plan []Planned) []string {
	var said []string
	for _, s := range plan {
		said = append(said, fmt.Sprintf("day %.1f %s %s", s.At.Sub(epoch).Hours()/24, s.Authority, s.To))
	}
	return said
}

func TestAPlanTellsARootRotation(t *testing.T) {
	a, b := rootA(ca.Active), named("b", rootA(ca.Prepared))
	a.Leaving = noon
	w := worldOf(a, b, under("a", "i", ca.Active))
	w.Peers = []Report{{Cluster: "west"}}
	before := slices.Clone(w.Authorities)
	want := []string{
		"day 10.0 successor-1 prepared", "day 10.0 b published", "day 10.0 b active", "day 10.0 successor-1 published",
		"day 10.0 successor-1 active", "day 10.0 a retired", "day 11.0 i removed", "day 11.0 a removed",
	}
	got := told(Plan(testPolicy, w, noon, 8))
	slices.Sort(got[:2]) // neither waits for the other
	slices.Sort(want[:2])
	if !slices.Equal(got, want) {
		t.Fatalf("got  %q\nwant %q", got, want)
	}
	if !slices.Equal(before, w.Authorities) {
		t.Error("the plan has changed the world")
	}
	// What others have to do for it is said.
	all, west := "quorum: the agents of this cluster acknowledge b", "peer: cluster west reports that its agents have b"
	for _, s := range Plan(testPolicy, w, noon, 8) {
		want := map[string][]string{
			"b active": {all, west}, "successor-1 published": {"signature: its request is signed under b"}, "successor-1 active": {all, west},
			"a removed": {"peer: cluster west reports that nothing there depends on it any more"},
		}[s.Authority+" "+string(s.To)]
		if got := assumed(s); !slices.Equal(got, want) {
			t.Errorf("for %s %s is assumed %q, want %q", s.Authority, s.To, got, want)
		}
	}
}

func assumed(s Planned) (said []string) {
	for _, w := range s.Assumed {
		said = append(said, string(w.Code)+": "+w.For)
	}
	return said
}

// What agents and peers have said already, and what a cluster alone needs from nobody, is not assumed.
func TestAPlanAssumesOnlyWhatIsMissing(t *testing.T) {
	a, b := rootA(ca.Active), named("b", rootA(ca.Published))
	a.Leaving = noon.Add(-time.Hour)
	w := worldOf(a, b, under("a", "i", ca.Active), under("b", "x", ca.Prepared))
	w.Peers = []Report{west(noon, "a", "b")}
	plan := Plan(testPolicy, w, noon, 6)
	want := []string{"day 10.0 b active", "day 10.0 x published", "day 10.0 x active", "day 10.0 a retired", "day 11.0 i removed", "day 11.0 a removed"}
	if got := told(plan); !slices.Equal(got, want) {
		t.Fatalf("got  %q\nwant %q", got, want)
	}
	for _, s := range plan {
		if got := assumed(s); (len(got) > 0) != (s.Authority == "a" && s.To == ca.Removed) {
			t.Errorf("for %s %s is assumed %q", s.Authority, s.To, got)
		}
	}
	// The promise is over a few minutes after the leaves, and a report is waited for in either case.
	if at, promised := plan[5].At, a.Leaving.Add(day+testPolicy.Skew); at.Before(promised) {
		t.Errorf("the root is removed at %s, before %s", at, promised)
	}
	w.Peers = nil
	for _, s := range Plan(testPolicy, w, noon, 6) {
		if got := assumed(s); len(got) > 0 {
			t.Errorf("alone, for %s %s is assumed %q", s.Authority, s.To, got)
		}
	}
	w.Own.Roots[1].Trusting = 4
	if got := assumed(Plan(testPolicy, w, noon, 6)[0]); !slices.Equal(got, []string{"quorum: the agents of this cluster acknowledge b"}) {
		t.Errorf("while an agent lacks the root is assumed %q", got)
	}
}

// Where nothing but what was promised keeps the last step waiting, time goes on all the same.
func TestAPlanWaitsForAPromise(t *testing.T) {
	b := named("b", rootA(ca.Retired))
	b.Leaving = noon
	w := worldOf(rootA(ca.Active), b, under("a", "i", ca.Active))
	w.Peers = []Report{west(noon, "a")}
	plan := Plan(testPolicy, w, noon, 3)
	i := slices.IndexFunc(plan, func(s Planned) bool { return s.Authority == "b" })
	if i < 0 || !plan[i].At.Equal(noon.Add(day+testPolicy.Skew)) || len(assumed(plan[i])) != 1 {
		t.Fatalf("%q", told(plan))
	}
}

func TestAPlanTellsWhatComesByItself(t *testing.T) {
	w := worldOf(rootA(ca.Active), under("a", "i", ca.Active))
	want := []string{"day 15.0 successor-1 prepared", "day 15.0 successor-1 published", "day 20.1 successor-1 active", "day 21.1 i removed", "day 30.0 successor-2 prepared"}
	if got := told(Plan(testPolicy, w, noon, 5)); !slices.Equal(got, want) {
		t.Fatalf("got  %q\nwant %q", got, want)
	}
	if plan := Plan(testPolicy, World{}, noon, 5); len(plan) != 0 {
		t.Fatalf("%v", told(plan))
	}
}

// Near the issuer's end and after it the request that waits is what matters, and no successor is invented that changes nothing.
func TestAPlanAtTheEndOfTheIssuer(t *testing.T) {
	request := Authority{ID: "x", Kind: ca.KindIntermediate, State: ca.Prepared, Since: epoch}
	for what, c := range map[string]struct {
		i      Authority
		policy Policy
		from   time.Time
	}{
		"an issuer of 30 days":                {under("a", "i", ca.Active), testPolicy, epoch.Add(28 * day)},
		"an issuer of two of the longest":     {Authority{ID: "i", NotAfter: epoch.Add(2 * day)}, testPolicy, epoch.Add(time.Hour)},
		"an issuer too short for the longest": {Authority{ID: "i", NotAfter: epoch.Add(day / 2)}, testPolicy, epoch},
		"clocks may be a leaf's life apart":   {under("a", "i", ca.Active), Policy{LongestLeaf: day, Skew: 25 * time.Hour, Quorum: 1, PrepareAt: 0.5, SwitchAt: 0.67, ReportLife: 3 * day}, epoch.Add(28 * day)},
	} {
		c.i.Kind, c.i.Root, c.i.State, c.i.Since, c.i.NotBefore = ca.KindIntermediate, "a", ca.Active, epoch, epoch
		for now := c.from; now.Before(c.i.NotAfter.Add(3 * day)); now = now.Add(time.Hour) {
			for _, waiting := range []bool{true, false} {
				w, first := worldOf(rootA(ca.Active), c.i), "successor-1"
				if waiting {
					w.Authorities, first = append(w.Authorities, request), "x"
				}
				plan := Plan(c.policy, w, now, 64)
				made, takes := 0, ""
				for _, s := range plan {
					if s.From == "" {
						made++
					}
					if s.To == ca.Active && s.Kind == ca.KindIntermediate {
						made, takes = 0, cmp.Or(takes, s.Authority)
					}
					// Under a root at its end there may be as many of no use as are asked for at all.
					if made > mostWorn || made > 1 && s.At.Before(now.Add(30*day)) || made > 0 && waiting && takes == "" {
						t.Fatalf("%s, %s before its end, request %t: more is made than is needed: %q", what, c.i.NotAfter.Sub(now), waiting, told(plan))
					}
				}
				if takes != first {
					t.Fatalf("%s, %s before its end, request %t: %q takes over, want %s: %q", what, c.i.NotAfter.Sub(now), waiting, takes, first, told(plan))
				}
			}
		}
	}
}

func TestAStepIsExpectedWhenItsLastWaitEnds(t *testing.T) {
	s := Step{Waits: []Wait{{Until: noon.Add(2 * time.Hour)}, {Until: noon.Add(time.Hour)}}}
	if at := At(s, noon); !at.Equal(noon.Add(2 * time.Hour)) {
		t.Error(at)
	}
	if at := At(Step{}, noon); !at.Equal(noon) {
		t.Error(at)
	}
	s.Waits = append(s.Waits, Wait{Code: WaitQuorum})
	if at := At(s, noon); !at.IsZero() {
		t.Error(at)
	}
}

func TestLeavesOfATaintedIssuerAreReplacedAtABoundedRate(t *testing.T) {
	const leaves, rate = 100_000, 200.0
	window := ReissueWindow(leaves, rate)
	if window != 500*time.Second {
		t.Fatalf("window %s, want 500 s", window)
	}
	perSecond := map[int64]int{}
	for i := range leaves {
		at := ReissueAt(serial(i), epoch, window)
		if at.Before(epoch) || !at.Before(epoch.Add(window)) {
			t.Fatalf("leaf %d at %s, want within %s", i, at.Sub(epoch), window)
		}
		perSecond[int64(at.Sub(epoch)/time.Second)]++
	}
	if len(perSecond) != 500 {
		t.Errorf("%d of 500 seconds are used", len(perSecond))
	}
	// Five standard deviations of a Poisson count, √200 each.
	for second, n := range perSecond {
		if n > 271 || n < 129 {
			t.Errorf("second %d: %d leaves, want 200 ± 71", second, n)
		}
	}
	if a, b := ReissueAt(serial(1), epoch, window), ReissueAt(serial(1), epoch, window); !a.Equal(b) {
		t.Error("drawn again")
	}
	for _, none := range []time.Duration{ReissueWindow(0, 200), ReissueWindow(5, 0), -time.Second} {
		if at := ReissueAt(serial(1), epoch, none); !at.Equal(epoch) {
			t.Errorf("window %s: at %s, want at once", none, at)
		}
	}
}

// All agents hear the order at the same moment; what they ask for at the same moment the server writes in one batch.
func TestLeavesAreReplacedOnABeat(t *testing.T) {
	const leaves = 1000
	window := 10*time.Second + reissueBeat/3
	at := map[time.Duration]int{}
	for i := range leaves {
		at[ReissueAt(serial(i), epoch, window).Sub(epoch)]++
	}
	if len(at) != int(window/reissueBeat)+1 {
		t.Errorf("%d moments, want %d", len(at), int(window/reissueBeat)+1)
	}
	for when := range at {
		if when%reissueBeat != 0 || when < 0 || when > window {
			t.Errorf("%s is not on a beat of %s within %s", when, reissueBeat, window)
		}
	}
}
