package rotation

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
)

const day = 24 * time.Hour

var testPolicy = Policy{
	LongestLeaf: day, Skew: 5 * time.Minute, Quorum: 1, PrepareAt: 0.5, SwitchAt: 0.67, ReportLife: day,
}

// noon is in the middle of the lives of testWorld.
var noon = epoch.Add(10 * day)

func rootA(state ca.State) Authority {
	return Authority{ID: "a", Kind: ca.KindRoot, State: state, Since: epoch, NotBefore: epoch, NotAfter: epoch.Add(400 * day)}
}

func named(id string, a Authority) Authority { a.ID = id; return a }

func under(root, id string, state ca.State) Authority {
	x := Authority{ID: id, Kind: ca.KindIntermediate, Root: root, State: state, Since: epoch, NotBefore: epoch, NotAfter: epoch.Add(30 * day)}
	if id != "i" {
		x.NotAfter = x.NotAfter.Add(day) // made later
	}
	if state == ca.Retired {
		x.LeavesUntil = noon.Add(time.Hour)
	}
	return x
}

// worldOf is a cluster alone with five agents that believe every root in the bundle.
func worldOf(all ...Authority) World {
	w := World{Authorities: all, Own: Report{Cluster: "east", At: noon, Roots: ReportRoots(testPolicy, all, noon)}}
	for i := range w.Own.Roots {
		w.Own.Roots[i].Trusting, w.Own.Roots[i].Validators, w.Own.Roots[i].Holding = 5, 5, 5
	}
	return w
}

// west reports like a cluster that believes the roots and signs under the first.
func west(at time.Time, roots ...string) Report {
	r := Report{Cluster: "west", At: at, Until: at.Add(testPolicy.ReportLife)}
	for i, id := range roots {
		r.Roots = append(r.Roots, RootReport{ID: id, Trusting: 3, Validators: 3, Signing: i == 0, LeavesUntil: at.Add(day), Holding: 3})
	}
	return r
}

// changes tells what has become of whom.
func changes(before, after []Authority) string {
	var said []string
	for _, a := range after {
		i := slices.IndexFunc(before, func(b Authority) bool { return b.ID == a.ID })
		if i < 0 {
			said = append(said, "+"+a.ID+" "+string(a.State))
			continue
		}
		b := before[i]
		if a.State != b.State {
			said = append(said, a.ID+" "+string(a.State))
		}
		for what, is := range map[string][2]bool{
			"leaving": {b.Leaving.IsZero(), a.Leaving.IsZero()}, "tainted": {b.Tainted.IsZero(), a.Tainted.IsZero()},
			"unwanted": {b.Wanted, a.Wanted}, "signed": {!b.signed(), !a.signed()},
		} {
			if is[0] && !is[1] {
				said = append(said, a.ID+" "+what)
			} else if is[1] && !is[0] {
				said = append(said, a.ID+" not "+what)
			}
		}
	}
	slices.Sort(said)
	return strings.Join(said, ", ")
}

func outcome(before, after []Authority, err error) string {
	if err != nil {
		return "refused: " + err.Error()
	}
	return changes(before, after)
}

var verbs = map[string]func(w World, id string) ([]Authority, error){
	"add": func(w World, id string) ([]Authority, error) {
		return AddRoot(testPolicy, w, named(id, rootA("")), noon)
	},
	"start": func(w World, id string) ([]Authority, error) { return StartRoot(w, id, noon) },
	"want": func(w World, _ string) ([]Authority, error) {
		all, _ := Want(testPolicy, w, noon)
		return all, nil
	},
	"signed": func(w World, id string) ([]Authority, error) {
		return Signed(testPolicy, w, id, "a", noon, noon.Add(30*day), noon)
	},
	"remove": func(w World, id string) ([]Authority, error) { return RemoveRoot(w, id, noon) },
	"taint":  func(w World, id string) ([]Authority, error) { return Taint(w, id, noon) },
	"abort":  func(w World, id string) ([]Authority, error) { return Abort(testPolicy, w, id, false, noon) },
}

// What every verb makes of a root in every state, beside root a with its active issuer i; refusals by their sentence.
func TestEveryVerbOnARootInEveryState(t *testing.T) {
	want := map[string]map[ca.State]string{
		"add":    {ca.Prepared: "", ca.Published: "", ca.Active: "", ca.Retired: "b not leaving, b published", ca.Removed: "b not leaving, b prepared"},
		"start":  {ca.Prepared: "a leaving", ca.Published: "a leaving", ca.Active: "a leaving", ca.Retired: "refused: b is being removed", ca.Removed: "refused: b is being removed"},
		"want":   {},
		"signed": {ca.Prepared: "refused: b is not an intermediate", ca.Published: "refused: b is not", ca.Active: "refused: b is not", ca.Retired: "refused: b is not", ca.Removed: "refused: b is not"},
		"remove": {ca.Prepared: "b leaving", ca.Published: "b leaving", ca.Active: "b leaving"},
		"taint":  {ca.Prepared: "b leaving, b tainted", ca.Published: "b leaving, b tainted", ca.Active: "b leaving, b tainted", ca.Retired: "b tainted", ca.Removed: "b tainted"},
		"abort":  {ca.Prepared: "b leaving", ca.Published: "b leaving", ca.Active: "b leaving", ca.Retired: "b not leaving, b published", ca.Removed: "refused: b is removed: there is nothing to abort"},
	}
	for verb, do := range verbs {
		for _, state := range []ca.State{ca.Prepared, ca.Published, ca.Active, ca.Retired, ca.Removed} {
			t.Run(verb+" "+string(state), func(t *testing.T) {
				b := named("b", rootA(state))
				if state == ca.Retired || state == ca.Removed {
					b.Leaving = epoch.Add(day)
				}
				w := worldOf(rootA(ca.Active), b, under("a", "i", ca.Active))
				before := slices.Clone(w.Authorities)
				all, err := do(w, "b")
				if got := outcome(before, all, err); !same(got, want[verb][state]) {
					t.Errorf("got %q, want %q", got, want[verb][state])
				}
				if !slices.Equal(before, w.Authorities) {
					t.Error("the verb has changed what it was given")
				}
			})
		}
	}
}

// What every verb makes of an intermediate in every state; when x is active, i has retired before it.
func TestEveryVerbOnAnIntermediateInEveryState(t *testing.T) {
	no := "refused: x is not a root"
	want := map[string]map[ca.State]string{
		"start":  {ca.Prepared: no, ca.Published: no, ca.Active: no, ca.Retired: no, ca.Removed: no},
		"want":   {ca.Prepared: "x not unwanted", ca.Published: "x not unwanted"},
		"signed": {ca.Prepared: "x signed", ca.Published: "refused: x has a certificate already", ca.Active: "refused: x has a certificate", ca.Retired: "refused: x has a certificate", ca.Removed: "refused: x has a certificate"},
		"remove": {ca.Prepared: no, ca.Published: no, ca.Active: no, ca.Retired: no, ca.Removed: no},
		"taint":  {ca.Prepared: "x tainted", ca.Published: "x tainted", ca.Active: "x tainted", ca.Retired: "x tainted", ca.Removed: "x tainted"},
		"abort":  {ca.Prepared: "x removed", ca.Published: "x removed", ca.Active: "i active, x retired", ca.Retired: "refused: x is retired: there is nothing to abort", ca.Removed: "refused: x is removed: there is nothing to abort"},
	}
	for verb, do := range verbs {
		if verb == "add" {
			continue // takes a certificate, not an ID
		}
		for _, state := range []ca.State{ca.Prepared, ca.Published, ca.Active, ca.Retired, ca.Removed} {
			t.Run(verb+" "+string(state), func(t *testing.T) {
				x, i := under("a", "x", state), under("a", "i", ca.Active)
				if state == ca.Prepared {
					x.Root, x.NotBefore, x.NotAfter = "", time.Time{}, time.Time{}
				}
				if state == ca.Active {
					i = under("a", "i", ca.Retired)
				}
				w := worldOf(rootA(ca.Active), x, i)
				all, err := do(w, "x")
				// "unwanted" turns false when it becomes wanted.
				got := strings.ReplaceAll(outcome(w.Authorities, all, err), "x unwanted", "x not unwanted")
				if !same(got, want[verb][state]) {
					t.Errorf("got %q, want %q", got, want[verb][state])
				}
			})
		}
	}
}

// same compares a refusal by its beginning.
func same(got, want string) bool {
	if strings.HasPrefix(want, "refused: ") {
		return strings.HasPrefix(got, want)
	}
	return got == want
}

func stepOf(t *testing.T, steps []Step, id string) Step {
	t.Helper()
	i := slices.IndexFunc(steps, func(s Step) bool { return s.Authority == id })
	if i < 0 {
		t.Fatalf("no step for %q among %+v", id, steps)
	}
	return steps[i]
}

// Each guard with its code, its sentence, and when it ends.
func TestEachGuardSaysWhatItWaitsFor(t *testing.T) {
	leaving := func(a Authority, since time.Time) Authority { a.Leaving = since; return a }
	tainted := func(a Authority) Authority { a.Tainted = epoch; return a }
	lived := func(a Authority, until time.Time) Authority { a.LeavesUntil = until; return a }
	unsigned := func(a Authority) Authority {
		a.Root, a.NotBefore, a.NotAfter = "", time.Time{}, time.Time{}
		return a
	}
	peer := func(w World, r Report) World { w.Peers = []Report{r}; return w }
	own := func(w World, root string, trusting, holding int) World {
		for i := range w.Own.Roots {
			if x := &w.Own.Roots[i]; x.ID == root {
				x.Trusting, x.Holding = trusting, holding
				x.Missing = []string{"agent-7"}
			}
		}
		return w
	}
	i, aged := under("a", "i", ca.Active), noon.Add(11*day)
	b := named("b", rootA(ca.Published))
	gone := leaving(lived(named("b", rootA(ca.Retired)), noon.Add(-day)), noon.Add(-10*day))
	late := testPolicy
	late.Delay = time.Hour
	westSigns := west(noon, "b")
	westIsOver := west(noon, "a", "b")
	westLeaves := west(noon, "a", "b")
	westLeaves.Roots[1].LeavesUntil = noon.Add(time.Hour)
	westIsOver.Roots[1].LeavesUntil = noon.Add(-day)
	westLacks, westLeavesIt := west(noon, "a", "b"), west(noon, "a", "b")
	westLacks.Roots[1].Trusting, westLacks.Roots[1].Missing = 2, []string{"agent-w"}
	westLeavesIt.Roots[1].Leaving = true
	for name, c := range map[string]struct {
		p    Policy
		w    World
		now  time.Time
		who  string
		to   ca.State
		code WaitCode
		says string
		// until is when the wait ends, after now; zero = not by the clock.
		until    time.Duration
		forcible bool
	}{
		"own agents lack it":       {w: own(worldOf(rootA(ca.Active), b, i), "b", 4, 5), who: "b", to: ca.Active, code: WaitQuorum, says: "4 of 5 agents of this cluster have it; 1 more must acknowledge", forcible: true},
		"own agents are not known": {w: World{Authorities: []Authority{rootA(ca.Active), b, i}}, who: "b", to: ca.Active, code: WaitQuorum, says: "not known which agents", forcible: true},
		"doors that can't acknowledge": {
			p: late, w: worldOf(rootA(ca.Active), Authority{ID: "b", Kind: ca.KindRoot, State: ca.Published, Since: noon, NotAfter: epoch.Add(400 * day)}, i),
			who: "b", to: ca.Active, code: WaitQuorum, says: "those that can't acknowledge have it by 2026-01-11T01:00:00Z", until: time.Hour, forcible: true,
		},
		"a peer never reported":        {w: peer(worldOf(rootA(ca.Active), b, i), Report{Cluster: "west"}), who: "b", to: ca.Active, code: WaitPeer, says: "cluster west has never reported", forcible: true},
		"a peer's report is old":       {w: peer(worldOf(rootA(ca.Active), b, i), west(noon.Add(-day), "a", "b")), who: "b", to: ca.Active, code: WaitPeer, says: "is of 2026-01-10T00:00:00Z, and could be relied upon until 2026-01-10T23:55:00Z", forcible: true},
		"a peer's report is yet to be": {w: peer(worldOf(rootA(ca.Active), b, i), west(noon.Add(time.Hour), "a", "b")), who: "b", to: ca.Active, code: WaitPeer, says: "one of the clocks is wrong", until: 55 * time.Minute, forcible: true},
		"a peer does not trust it":     {w: peer(worldOf(rootA(ca.Active), b, i), west(noon, "a")), who: "b", to: ca.Active, code: WaitPeer, says: "cluster west does not trust it", forcible: true},
		"a peer is about to stop":      {w: peer(worldOf(rootA(ca.Active), b, i), westLeavesIt), who: "b", to: ca.Active, code: WaitPeer, says: "about to stop trusting it", forcible: true},
		"a peer's agents lack it":      {w: peer(worldOf(rootA(ca.Active), b, i), westLacks), who: "b", to: ca.Active, code: WaitPeer, says: "2 of 3 agents of cluster west have it", forcible: true},
		"a root at its end":            {w: worldOf(rootA(ca.Active), Authority{ID: "b", Kind: ca.KindRoot, State: ca.Published, NotAfter: noon.Add(day - 1)}, i), who: "b", to: ca.Active, code: WaitShortLived, says: "too soon for a leaf of 24h0m0s"},
		"an issuer signs":              {w: worldOf(leaving(rootA(ca.Active), noon), named("b", rootA(ca.Active)), i), who: "a", to: ca.Retired, code: WaitIssuer, says: "i still signs under it"},
		"own leaves":                   {w: worldOf(rootA(ca.Active), lived(gone, noon.Add(time.Hour)), i), who: "b", to: ca.Removed, code: WaitLeaves, says: "leaves under it are valid until 2026-01-11T01:00:00Z", until: time.Hour + 5*time.Minute + time.Second, forcible: true},
		"a peer to be removed for":     {w: peer(worldOf(rootA(ca.Active), gone, i), Report{Cluster: "west"}), who: "b", to: ca.Removed, code: WaitPeer, says: "cluster west has never reported", forcible: true},
		"a peer since the promise":     {w: peer(worldOf(rootA(ca.Active), gone, i), west(noon.Add(-9*day), "a")), who: "b", to: ca.Removed, code: WaitPeer, says: "cluster west has not reported since", forcible: true},
		"a peer of tomorrow":           {w: peer(worldOf(rootA(ca.Active), gone, i), west(noon.Add(day), "a")), who: "b", to: ca.Removed, code: WaitPeer, says: "one of the clocks is wrong", until: day - 5*time.Minute, forcible: true},
		"a peer that signs":            {w: peer(worldOf(rootA(ca.Active), gone, i), westSigns), who: "b", to: ca.Removed, code: WaitPeer, says: "cluster west still signs under it", forcible: true},
		"a peer's leaves":              {w: peer(worldOf(rootA(ca.Active), gone, i), westLeaves), who: "b", to: ca.Removed, code: WaitLeaves, says: "leaves of cluster west under it are valid until", until: time.Hour + 5*time.Minute + time.Second, forcible: true},
		"nothing in the way":           {w: peer(worldOf(rootA(ca.Active), gone, i), westIsOver), who: "b", to: ca.Removed},
		"the last root":                {w: worldOf(leaving(rootA(ca.Retired), epoch)), who: "a", to: ca.Removed, code: WaitNoOther, says: "no other root is trusted; add one first"},
		"exposed, and nobody holds":    {w: own(worldOf(rootA(ca.Active), lived(tainted(gone), noon.Add(time.Hour)), i), "b", 5, 0), who: "b", to: ca.Removed},
		"exposed, and somebody holds":  {w: own(worldOf(rootA(ca.Active), lived(tainted(gone), noon.Add(time.Hour)), i), "b", 5, 1), who: "b", to: ca.Removed, code: WaitLeaves, says: "leaves under it", until: time.Hour + 5*time.Minute + time.Second, forcible: true},
		"no signature":                 {w: worldOf(rootA(ca.Active), i, unsigned(under("", "x", ca.Prepared))), who: "x", to: ca.Published, code: WaitSignature, says: "an upstream authority has to sign its request"},
		"the root is not active":       {w: worldOf(rootA(ca.Active), b, i, under("b", "x", ca.Prepared)), who: "x", to: ca.Published, code: WaitRoot, says: "the root above it, b, is not active yet"},
		"its turn has not come":        {w: worldOf(rootA(ca.Active), i, under("a", "x", ca.Published)), who: "x", to: ca.Active, code: WaitTime, says: "its time is 2026-01-21T02:24:00Z", until: 10*day + 2*time.Hour + 24*time.Minute},
		"its turn has come":            {w: worldOf(rootA(ca.Active), i, under("a", "x", ca.Published)), now: aged, who: "x", to: ca.Active},
		"another root leaves":          {w: worldOf(rootA(ca.Active), leaving(named("b", rootA(ca.Active)), noon), i, under("b", "x", ca.Published)), now: aged, who: "x", to: ca.Active, code: WaitRoot, says: "is being replaced"},
		"a root that leaves bears on":  {w: worldOf(leaving(rootA(ca.Active), noon), i, under("a", "x", ca.Published)), now: aged, who: "x", to: ca.Active},
		"leaves of a retired issuer":   {w: worldOf(rootA(ca.Active), i, under("a", "x", ca.Retired)), who: "x", to: ca.Removed, code: WaitTime, says: "leaves under it are valid until", until: time.Hour + 5*time.Minute + time.Second},
		"tainted before its time":      {w: worldOf(rootA(ca.Active), i, tainted(under("a", "x", ca.Published))), who: "x", to: ca.Removed},
		"an intermediate at its end":   {w: worldOf(rootA(ca.Active), i, under("a", "x", ca.Published)), now: epoch.Add(30*day + 1), who: "x", to: ca.Removed},
		"under a root that goes":       {w: worldOf(rootA(ca.Active), gone, i, under("b", "x", ca.Published)), who: "x", to: ca.Removed},
		"never published, and leaves":  {w: worldOf(rootA(ca.Active), leaving(named("b", rootA(ca.Prepared)), noon), i), who: "b", to: ca.Removed},
		"an expired root":              {w: worldOf(rootA(ca.Active), Authority{ID: "b", Kind: ca.KindRoot, State: ca.Active, NotAfter: noon.Add(-day)}, i), who: "b", to: ca.Removed},
	} {
		t.Run(name, func(t *testing.T) {
			p, now := c.p, c.now
			if p == (Policy{}) {
				p = testPolicy
			}
			if now.IsZero() {
				now = noon
			}
			s := stepOf(t, Next(p, c.w, now), c.who)
			if s.To != c.to {
				t.Fatalf("%s goes to %s, want %s", c.who, s.To, c.to)
			}
			if c.code == "" {
				if !s.Ready(false) {
					t.Fatalf("it waits: %+v", s.Waits)
				}
				return
			}
			if len(s.Waits) != 1 || s.Waits[0].Code != c.code || !strings.Contains(s.Waits[0].For, c.says) {
				t.Fatalf("it waits for %+v, want %s: %q", s.Waits, c.code, c.says)
			}
			w := s.Waits[0]
			if c.until == 0 != w.Until.IsZero() || c.until != 0 && !w.Until.Equal(now.Add(c.until)) {
				t.Errorf("it waits until %s, want %s after now", w.Until, c.until)
			}
			if s.Ready(false) || s.Ready(true) != c.forcible {
				t.Errorf("ready %t, by force %t; want false, %t", s.Ready(false), s.Ready(true), c.forcible)
			}
			// What ends by the clock has ended then.
			if !w.Until.IsZero() && w.Code != WaitPeer {
				if later := stepOf(t, Next(p, c.w, w.Until), c.who); slices.ContainsFunc(later.Waits, func(x Wait) bool { return x.For == w.For }) {
					t.Errorf("at %s it waits still", w.Until)
				}
			}
		})
	}
}

// Whose clusters have another report_life each goes by the shorter one: theirs as they say, ours as we do.
func TestAReportHoldsForAsLongAsBothKeepIt(t *testing.T) {
	brief := func(life time.Duration) Report {
		r := west(noon, "a", "b")
		r.Until = noon.Add(life)
		return r
	}
	ours := testPolicy
	ours.ReportLife = time.Hour
	for name, c := range map[string]struct {
		p     Policy
		r     Report
		until time.Duration
	}{
		"the same in both":  {testPolicy, brief(day), day - 5*time.Minute},
		"theirs is shorter": {testPolicy, brief(time.Hour), 55 * time.Minute},
		"ours is shorter":   {ours, brief(day), 55 * time.Minute},
	} {
		last := noon.Add(c.until)
		w := worldOf(rootA(ca.Active), named("b", rootA(ca.Published)), under("a", "i", ca.Active))
		w.Peers = []Report{c.r}
		for at, holds := range map[time.Time]bool{noon: true, last: true, last.Add(1): false} {
			if got := c.p.Holds(c.r, at); got != holds {
				t.Errorf("%s: %s after it was made it holds: %t", name, at.Sub(noon), got)
			}
			if s := stepOf(t, Next(c.p, w, at), "b"); s.Ready(false) != holds {
				t.Errorf("%s: %s after it was made the root waits for %+v", name, at.Sub(noon), s.Waits)
			}
		}
	}
	if (Policy{ReportLife: day}).Holds(Report{}, noon) {
		t.Error("a report that was never made holds")
	}
	// One that is over before it could come is a mistake of somebody's configuration.
	w := worldOf(rootA(ca.Active), named("b", rootA(ca.Published)), under("a", "i", ca.Active))
	w.Peers = []Report{brief(5 * time.Second)}
	s := stepOf(t, Next(testPolicy, w, noon), "b")
	if len(s.Waits) != 1 || !strings.Contains(s.Waits[0].For, "the reports of cluster west hold for 5s, and clocks may be 5m0s apart: set rotation.report_life") {
		t.Errorf("it waits for %+v", s.Waits)
	}
}

func TestOurReportIsRenewedForWhoReliesOnItLeast(t *testing.T) {
	brief := west(noon)
	brief.Until = noon.Add(time.Hour)
	for _, c := range []struct {
		peers []Report
		want  time.Duration
	}{
		{nil, day - 5*time.Minute},
		{[]Report{{Cluster: "north"}, west(noon)}, day - 5*time.Minute},
		{[]Report{west(noon), brief}, 55 * time.Minute},
		{[]Report{{At: noon, Until: noon.Add(6 * time.Second)}}, 3 * time.Second},
	} {
		if got := testPolicy.Relied(c.peers); got != c.want {
			t.Errorf("with peers %+v they rely on ours for %s, want %s", c.peers, got, c.want)
		}
	}
}

// A date is said only where nothing but time is missing.
func TestARemovalThatHasPromisedWaitsForAReportToo(t *testing.T) {
	b := named("b", rootA(ca.Retired))
	b.Leaving = noon.Add(-time.Hour)
	promised := b.Leaving.Add(day + 5*time.Minute)
	w := worldOf(rootA(ca.Active), b, under("a", "i", ca.Active))
	w.Peers = []Report{west(noon, "a")}
	s := stepOf(t, Next(testPolicy, w, noon), "b")
	if len(s.Waits) != 2 || s.Ready(false) || !s.Ready(true) || !strings.Contains(s.Waits[0].For, "cluster west may rely on our last report until "+stamp(promised)) ||
		!s.Waits[0].Until.Equal(promised) || !strings.Contains(s.Waits[1].For, "then cluster west has to report once more") || !s.Waits[1].Until.IsZero() {
		t.Fatalf("it waits for %+v", s.Waits)
	}
	if at := At(s, noon); !at.IsZero() {
		t.Errorf("it is said to come at %s", at)
	}
	// When the promise is over the report is what is missing; one that was made since, by a clock that is ahead, is enough.
	if s = stepOf(t, Next(testPolicy, w, promised), "b"); len(s.Waits) != 1 || !strings.Contains(s.Waits[0].For, "has not reported since "+stamp(promised)) {
		t.Errorf("then it waits for %+v", s.Waits)
	}
	w.Peers = []Report{west(promised, "a")}
	if s = stepOf(t, Next(testPolicy, w, promised.Add(-time.Minute)), "b"); len(s.Waits) != 1 || !At(s, noon).Equal(promised) {
		t.Errorf("with a report of then it waits for %+v", s.Waits)
	}
	if s = stepOf(t, Next(testPolicy, w, promised), "b"); !s.Ready(false) {
		t.Errorf("in the end it waits for %+v", s.Waits)
	}
}

// What was being made when the issuer stopped signing may be on its way to an agent that has said that it holds nothing.
func TestAnExposedRootOutlivesWhatWasBeingMade(t *testing.T) {
	b := named("b", rootA(ca.Retired))
	b.Since, b.Leaving, b.Tainted, b.LeavesUntil = noon, noon.Add(-10*day), noon.Add(-time.Hour), noon.Add(day)
	w := worldOf(rootA(ca.Active), b, under("a", "i", ca.Active))
	for i := range w.Own.Roots {
		w.Own.Roots[i].Holding = 0
	}
	there := noon.Add(5*time.Minute + time.Second)
	for at, ready := range map[time.Time]bool{noon: false, there.Add(-1): false, there: true} {
		if s := stepOf(t, Next(testPolicy, w, at), "b"); s.Ready(false) != ready {
			t.Errorf("%s after the switch its removal waits for %+v", at.Sub(noon), s.Waits)
		}
	}
}

// Nothing is signed again under a root for which certificates may be forged.
func TestAnAbortGivesNothingBackToAnExposedRoot(t *testing.T) {
	before := under("a", "i", ca.Retired)
	all := []Authority{rootA(ca.Active), named("b", rootA(ca.Active)), before, under("b", "x", ca.Active)}
	w := worldOf(all...)
	if after, err := Abort(testPolicy, w, "x", false, noon); err != nil || active(World{Authorities: after}) != "i" {
		t.Fatalf("while nothing is tainted: %v", err)
	}
	lost := under("a", "k", ca.Removed)
	lost.Tainted = noon.Add(-time.Hour)
	elsewhere := worldOf(all...)
	elsewhere.Peers = []Report{west(noon, "a", "b")}
	elsewhere.Peers[0].Tainted = []TaintReport{{ID: "k", Root: "a", Since: noon, NotAfter: noon.Add(day)}}
	for where, w := range map[string]World{"here": worldOf(append(slices.Clone(all), lost)...), "in another cluster": elsewhere} {
		after, err := Abort(testPolicy, w, "x", true, noon)
		if err == nil || !strings.Contains(err.Error(), "no earlier issuer could take over again") {
			t.Errorf("with a key lost %s: %v, %s signs", where, err, active(World{Authorities: after}))
		}
	}
}

// settle takes every step that is ready, as a server does.
func settle(t *testing.T, w World, now time.Time) World {
	t.Helper()
	for range 50 {
		w.Authorities = slices.Clone(w.Authorities)
		w.Own = worldOf(w.Authorities...).Own
		steps := Next(testPolicy, w, now)
		i := slices.IndexFunc(steps, func(s Step) bool { return s.Ready(false) && s.From != "" })
		if i < 0 {
			return w
		}
		w.Authorities = Apply(testPolicy, w.Authorities, steps[i], now)
	}
	t.Fatal("it does not come to rest")
	return w
}

func active(w World) string { a, _ := w.active(); return a.ID }

func TestTheFirstIssuerWaitsForNobody(t *testing.T) {
	w := World{Peers: []Report{{Cluster: "west"}}}
	all, err := AddRoot(testPolicy, w, rootA(""), noon)
	if err != nil {
		t.Fatal(err)
	}
	w.Authorities = append(all, under("a", "i", ca.Prepared))
	p := testPolicy
	p.Delay = 24 * time.Hour
	for range 4 {
		steps := Next(p, w, noon)
		w.Authorities = Apply(p, w.Authorities, steps[0], noon)
	}
	if active(w) != "i" {
		t.Fatalf("active is %q: %+v", active(w), Next(p, w, noon))
	}
}

func TestOneOfAHundredIsSilentAndNamed(t *testing.T) {
	w := worldOf(rootA(ca.Active), named("b", rootA(ca.Published)), under("a", "i", ca.Active))
	for i := range w.Own.Roots {
		w.Own.Roots[i].Trusting, w.Own.Roots[i].Validators, w.Own.Roots[i].Missing = 99, 100, []string{"agent-42"}
	}
	s := stepOf(t, Next(testPolicy, w, noon), "b")
	if s.Ready(false) || !slices.Equal(s.Waits[0].Missing, []string{"agent-42"}) {
		t.Fatalf("%+v", s)
	}
	p := testPolicy
	p.Quorum = 0.99
	if s := stepOf(t, Next(p, w, noon), "b"); !s.Ready(false) {
		t.Fatalf("99 of 100 are the quorum that is asked for: %+v", s)
	}
	p.Quorum = 0.995
	if s := stepOf(t, Next(p, w, noon), "b"); s.Ready(false) {
		t.Fatal("99 of 100 pass for 99.5 %")
	}
}

func TestSuccessorsWithStaggeredStartsTakeOverInTurn(t *testing.T) {
	w := worldOf(rootA(ca.Active), under("a", "i1", ca.Active))
	for n := 2; n <= 4; n++ {
		x := under("a", fmt.Sprintf("i%d", n), ca.Prepared)
		x.NotBefore = epoch.Add(time.Duration(n-1) * 20 * day)
		x.NotAfter = x.NotBefore.Add(30 * day)
		w.Authorities = append(w.Authorities, x)
	}
	var order []string
	for now := epoch; now.Before(epoch.Add(85 * day)); now = now.Add(6 * time.Hour) {
		w = settle(t, w, now)
		if id := active(w); len(order) == 0 || order[len(order)-1] != id {
			order = append(order, id)
		}
	}
	if !slices.Equal(order, []string{"i1", "i2", "i3", "i4"}) {
		t.Fatalf("order %v", order)
	}
	// Asleep over the whole life of the second: the third takes over.
	w = worldOf(rootA(ca.Active), under("a", "i1", ca.Active))
	for n := 2; n <= 3; n++ {
		x := under("a", fmt.Sprintf("i%d", n), ca.Published)
		x.NotBefore = epoch.Add(time.Duration(n-1) * 25 * day)
		x.NotAfter = x.NotBefore.Add(30 * day)
		w.Authorities = append(w.Authorities, x)
	}
	if w = settle(t, w, epoch.Add(60*day)); active(w) != "i3" {
		t.Fatalf("active is %q", active(w))
	}
}

// Of several that could begin at the same time each shows its own turn: when the one before it has had its share of its life.
func TestEachSuccessorShowsItsOwnTurn(t *testing.T) {
	w := worldOf(rootA(ca.Active), under("a", "i1", ca.Active))
	for n := 2; n <= 4; n++ {
		x := under("a", fmt.Sprintf("i%d", n), ca.Published)
		x.NotBefore = epoch.Add(time.Duration(n) * time.Hour)
		x.NotAfter = x.NotBefore.Add(time.Duration(n) * 30 * day)
		w.Authorities = append(w.Authorities, x)
	}
	var last time.Time
	for n := 2; n <= 4; n++ {
		before, _ := w.authority(fmt.Sprintf("i%d", n-1))
		at := decision{Policy: testPolicy}.at(before, testPolicy.SwitchAt)
		s := stepOf(t, Next(testPolicy, w, noon), fmt.Sprintf("i%d", n))
		if len(s.Waits) != 1 || !s.Waits[0].Until.Equal(at) || !at.After(last) || !strings.HasSuffix(s.Because, "of the life of "+before.ID) || !strings.Contains(s.Waits[0].For, stamp(at)) {
			t.Errorf("i%d comes since %q and waits for %+v, want its turn at %s", n, s.Because, s.Waits, stamp(at))
		}
		last = at
	}
	// Nobody's turn is put off by one that may never have its own.
	w.Authorities = append(w.Authorities, named("b", rootA(ca.Published)))
	w.Authorities[2].Root = "b"
	own := decision{Policy: testPolicy}.at(w.Authorities[1], testPolicy.SwitchAt)
	if s := stepOf(t, Next(testPolicy, w, noon), "i3"); len(s.Waits) != 1 || !s.Waits[0].Until.Equal(own) {
		t.Errorf("behind one whose root waits for others, i3 waits for %+v", s.Waits)
	}
}

// Several of one beginning and end: the second and the third are never of use. What comes next and the plan say the same of them.
func TestOfSeveralThatEndTogetherOneTakesOver(t *testing.T) {
	w := worldOf(rootA(ca.Active), under("a", "i1", ca.Active))
	for _, id := range []string{"i2", "i3", "i4"} {
		x := under("a", id, ca.Published)
		x.NotBefore, x.NotAfter = noon, noon.Add(30*day)
		w.Authorities = append(w.Authorities, x)
	}
	steps := Next(testPolicy, w, noon)
	if s := stepOf(t, steps, "i2"); s.To != ca.Active {
		t.Errorf("i2: %+v", s)
	}
	goes := noon.Add(30*day - testPolicy.LongestLeaf)
	for id, before := range map[string]string{"i3": "i2", "i4": "i2"} {
		s := stepOf(t, steps, id)
		if s.To != ca.Removed || s.Because != "it ends no later than "+before+", which comes before it, and so never takes over" || len(s.Waits) != 1 || !s.Waits[0].Until.Equal(goes) {
			t.Errorf("%s: %+v", id, s)
		}
	}
	var planned []string
	for _, p := range Plan(testPolicy, w, noon, 12) {
		if p.Authority == "i3" || p.Authority == "i4" {
			planned = append(planned, p.Authority+" "+string(p.To)+" "+stamp(p.At))
		}
	}
	if want := []string{"i3 removed " + stamp(goes), "i4 removed " + stamp(goes)}; !slices.Equal(planned, want) {
		t.Errorf("planned is %q, want %q", planned, want)
	}
}

// Where one of a ceremony's was dropped, the one after it begins only when the one before has ended.
func TestASuccessorThatBeginsLateSaysSo(t *testing.T) {
	begins := func(x Authority, at time.Time) Authority {
		x.NotBefore, x.NotAfter = at, at.Add(90*day)
		return x
	}
	for gap, want := range map[time.Duration]string{
		70 * day:  "it begins then, after x",
		100 * day: "it begins then; x ends before, at " + stamp(noon.Add(130*day)) + ", so one more is needed in between",
	} {
		first, x, y := under("a", "i", ca.Active), under("a", "x", ca.Published), under("a", "y", ca.Published)
		w := worldOf(rootA(ca.Active), begins(first, noon), begins(x, noon.Add(40*day)), begins(y, noon.Add(40*day+gap)))
		steps := Next(testPolicy, w, noon)
		i := slices.IndexFunc(steps, func(s Step) bool { return s.Authority == "y" })
		if i < 0 || steps[i].To != ca.Active || steps[i].Because != want || len(steps[i].Waits) != 1 || !steps[i].Waits[0].Until.Equal(noon.Add(40*day+gap)) {
			t.Errorf("%s later: %+v", gap, steps)
		}
	}
}

func TestARequestSaysThatTheRootThatWasToReplaceTheOtherIsTainted(t *testing.T) {
	a, b := rootA(ca.Active), named("b", rootA(ca.Published))
	a.Leaving, b.Tainted = noon.Add(-time.Hour), noon
	lost := under("a", "i", ca.Active)
	lost.Tainted = noon
	request := Authority{ID: "x", Kind: ca.KindIntermediate, State: ca.Prepared, Since: noon}
	steps := Next(testPolicy, worldOf(a, b, lost, request), noon)
	i := slices.IndexFunc(steps, func(s Step) bool { return s.Authority == "x" })
	if i < 0 || !strings.HasSuffix(steps[i].Waits[0].For, "its request, under a new root (signet rotation start root), since b is tainted") {
		t.Errorf("it says %+v", steps)
	}
	if tainted, other := worldOf(a, b, lost, request, named("c", rootA(ca.Published))).Instead(); tainted != "" || other != "" {
		t.Errorf("with a good one: %q, %q", tainted, other)
	}
}

// With the stagger that is told each takes over when it begins, or soon after, and the root is not needed before the last.
func TestSuccessorsWithTheToldStaggerTakeTheirTurns(t *testing.T) {
	for _, life := range []time.Duration{3 * day, 30 * day, 90 * day, 365 * day} {
		stagger := testPolicy.Stagger(life)
		w := worldOf(rootA(ca.Active), under("a", "i1", ca.Retired))
		w.Authorities[0].NotAfter = epoch.Add(10 * 365 * day)
		for n := range 4 {
			x := under("a", fmt.Sprintf("i%d", n+2), ca.Published)
			x.NotBefore = noon.Add(time.Duration(n) * stagger)
			x.NotAfter, x.Wanted = x.NotBefore.Add(life), n == 0
			w.Authorities = append(w.Authorities, x)
		}
		now, turns := noon, 0
		for _, p := range Plan(testPolicy, w, noon, 100) {
			if p.From == "" {
				break // the next one is requested
			}
			if p.To == ca.Active && p.Kind == ca.KindIntermediate {
				turns, now = turns+1, p.At
			}
		}
		if slack := time.Duration(0.67*float64(life)) - stagger; turns != 4 || now.Before(noon.Add(3*stagger)) || slack < 0 || slack > life/10 {
			t.Errorf("lives of %s, staggered by %s: %d take over before another is requested, the last %s from now", life, stagger, turns, now.Sub(noon))
		}
	}
	if got := testPolicy.Stagger(90 * day); got != 60*day {
		t.Errorf("a life of 90 days is staggered by %s", got)
	}
	if got := testPolicy.Stagger(day); got > 0 {
		t.Errorf("what lives no longer than a leaf is staggered by %s", got)
	}
}

// Where the root above is tainted a request says which root has to sign it.
func TestARequestUnderATaintedRootSaysWhoHasToSignIt(t *testing.T) {
	lost := rootA(ca.Active)
	lost.Tainted = noon
	request := Authority{ID: "x", Kind: ca.KindIntermediate, State: ca.Prepared}
	next := named("b", rootA(ca.Published))
	gone := named("c", rootA(ca.Published))
	gone.Leaving = noon
	for what, c := range map[string]struct {
		w       World
		says    string
		refuses string
	}{
		"nothing is lost":  {worldOf(rootA(ca.Active), under("a", "i", ca.Active), request), "an upstream authority has to sign its request", ""},
		"no other root":    {worldOf(lost, under("a", "i", ca.Active), request), "an upstream authority has to sign its request, under a new root (signet rotation start root), since a is tainted", "the chain of x leads to root a, which is tainted: have it signed under a new root (signet root init, then signet rotation start root)"},
		"another leaves":   {worldOf(lost, gone, under("a", "i", ca.Active), request), "under a new root (signet rotation start root), since a is tainted", "under a new root"},
		"another stays":    {worldOf(lost, next, under("a", "i", ca.Active), request), "an upstream authority has to sign its request, under b, since a is tainted", "the chain of x leads to root a, which is tainted: have it signed under b"},
		"the issuer ended": {worldOf(lost, under("a", "i", ca.Retired), request), "under a new root", "under a new root"},
	} {
		s := stepOf(t, Next(testPolicy, c.w, noon), "x")
		if len(s.Waits) != 1 || s.Waits[0].Code != WaitSignature || !strings.Contains(s.Waits[0].For, c.says) || c.refuses == "" && s.Waits[0].For != c.says {
			t.Errorf("%s: it waits for %+v, want %q", what, s.Waits, c.says)
		}
		_, err := Signed(testPolicy, c.w, "x", "a", noon, noon.Add(30*day), noon)
		if (err == nil) != (c.refuses == "") || err != nil && !strings.Contains(err.Error(), c.refuses) {
			t.Errorf("%s: signed under a: %v, want %q", what, err, c.refuses)
		}
	}
}

func TestOneNewRootIsBroughtInAtATime(t *testing.T) {
	leaving := func(a Authority, since time.Time) Authority { a.Leaving = since; return a }
	tainted := func(a Authority) Authority { a.Tainted = noon; return a }
	leaves := leaving(rootA(ca.Active), noon.Add(-time.Hour))
	for what, x := range map[string]struct {
		w    World
		says string
	}{
		"nothing is replaced":          {w: worldOf(rootA(ca.Active), named("b", rootA(ca.Active)), under("a", "i", ca.Active))},
		"another is to take over":      {w: worldOf(leaves, named("b", rootA(ca.Published)), under("a", "i", ca.Active)), says: "b is to replace a already: finish that, or turn it back first with signet rotation abort b"},
		"another was only added":       {w: worldOf(leaves, named("b", rootA(ca.Prepared)), under("a", "i", ca.Active)), says: "b is to replace a already"},
		"another leaves again":         {w: worldOf(leaves, leaving(named("b", rootA(ca.Published)), noon), under("a", "i", ca.Active))},
		"the other's key is lost":      {w: worldOf(leaves, tainted(named("b", rootA(ca.Published))), under("a", "i", ca.Active))},
		"the other signs":              {w: worldOf(leaves, named("b", rootA(ca.Active)), under("b", "i", ca.Active))},
		"the old one can't stay":       {w: worldOf(tainted(leaves), named("b", rootA(ca.Published)), under("a", "i", ca.Active)), says: "signet trust remove"},
		"it is the one that was meant": {w: worldOf(leaves, named("c", rootA(ca.Published)), named("b", rootA(ca.Published)), under("a", "i", ca.Active))},
		"it was removed before":        {w: worldOf(leaves, leaving(named("c", rootA(ca.Removed)), epoch), named("b", rootA(ca.Published)), under("a", "i", ca.Active)), says: "b is to replace a already"},
	} {
		err := MayBring(x.w, "c", noon)
		if x.says == "" && err != nil || x.says != "" && (err == nil || !strings.Contains(err.Error(), x.says)) {
			t.Errorf("%s: %v, want %q", what, err, x.says)
		}
	}
}

func TestASuccessorThatBeginsTooLateIsNone(t *testing.T) {
	x := under("a", "x", ca.Published)
	x.NotBefore, x.NotAfter = epoch.Add(40*day), epoch.Add(70*day)
	w := worldOf(rootA(ca.Active), under("a", "i", ca.Active), x)
	if s := stepOf(t, Next(testPolicy, w, epoch.Add(16*day)), ""); !s.Ready(false) {
		t.Fatalf("%+v", s)
	}
}

// A ceremony's spare that ends sooner than the issuer does neither takes its place nor keeps a real successor from being
// made; and where a root at its end bounds every chain, requests end.
func TestASpareThatEndsSoonerDoesNotTakeOver(t *testing.T) {
	x := under("a", "x", ca.Published)
	x.NotAfter = epoch.Add(25 * day)
	w := worldOf(rootA(ca.Active), under("a", "i", ca.Active), x)
	now := epoch.Add(21 * day)
	steps := Next(testPolicy, w, now)
	spare := stepOf(t, steps, "x")
	end := x.NotAfter.Add(-testPolicy.LongestLeaf)
	if spare.To != ca.Removed || spare.Ready(true) || spare.Because != "it ends no later than i, which comes before it, and so never takes over" || len(spare.Waits) != 1 || !spare.Waits[0].Until.Equal(end) {
		t.Fatalf("%+v", spare)
	}
	if s := stepOf(t, steps, ""); !s.Ready(false) {
		t.Fatalf("%+v", s)
	}
	// It stands by: for a key that is lost, and for whoever asks for it.
	tainted, wanted := w, w
	tainted.Authorities, wanted.Authorities = slices.Clone(w.Authorities), slices.Clone(w.Authorities)
	tainted.Authorities[1].Tainted, wanted.Authorities[2].Wanted = now, true
	for what, w := range map[string]World{"the issuer's key is lost": tainted, "it is wanted": wanted} {
		if s := stepOf(t, Next(testPolicy, w, now), "x"); s.To != ca.Active || !s.Ready(false) {
			t.Errorf("%s: %+v", what, s)
		}
	}
	if s := stepOf(t, Next(testPolicy, w, end), "x"); s.To != ca.Removed || !s.Ready(false) {
		t.Errorf("at its end: %+v", s)
	}
	x.ID = "y"
	w.Authorities = append(w.Authorities, x)
	if s := stepOf(t, Next(testPolicy, w, now), ""); !s.Ready(false) {
		t.Fatalf("two spares keep a successor from being made: %+v", s)
	}
	w.Authorities[0].NotAfter = x.NotAfter
	if steps := Next(testPolicy, w, now); slices.ContainsFunc(steps, func(s Step) bool { return s.From == "" }) {
		t.Fatalf("a third one is asked for: %+v", steps)
	}
}

func TestASlowRootRotationIsBridged(t *testing.T) {
	a := rootA(ca.Active)
	a.Leaving = noon
	w := worldOf(a, named("b", rootA(ca.Published)), under("a", "i", ca.Active), under("b", "x", ca.Prepared))
	w.Peers = []Report{{Cluster: "west"}}
	if steps := Next(testPolicy, w, noon); slices.ContainsFunc(steps, func(s Step) bool { return s.From == "" }) {
		t.Fatalf("a second successor is asked for while there is time: %+v", steps)
	}
	bridged(t, w)
}

// The root was believed by all when it became active; by the time its intermediate is signed, reports have lapsed.
func TestARootOfWhichNothingIsKnownAnyMoreIsBridged(t *testing.T) {
	a := rootA(ca.Active)
	a.Leaving = noon
	w := worldOf(a, named("b", rootA(ca.Active)), under("a", "i", ca.Active), under("b", "x", ca.Published))
	w.Peers = []Report{{Cluster: "west"}}
	bridged(t, w)
}

// bridged checks that one more intermediate is asked for when i is due, is signed under a and not under b, and takes over.
func bridged(t *testing.T, w World) {
	t.Helper()
	now := epoch.Add(21 * day)
	s := stepOf(t, Next(testPolicy, w, now), "")
	if !s.Ready(false) || !strings.Contains(s.Because, "not all validators trust b yet") {
		t.Fatalf("%+v", s)
	}
	w.Authorities = append(w.Authorities, Authority{ID: "y", Kind: ca.KindIntermediate, State: ca.Prepared})
	if _, err := Signed(testPolicy, w, "y", "b", now, now.Add(30*day), now); err == nil || !strings.Contains(err.Error(), "have y signed under a") {
		t.Fatal(err)
	}
	all, err := Signed(testPolicy, w, "y", "a", now, now.Add(30*day), now)
	if err != nil {
		t.Fatal(err)
	}
	w.Authorities = all
	if w = settle(t, w, now); active(w) != "y" {
		t.Fatalf("active is %q", active(w))
	}
}

// It would leave the cluster without an issuer before its own successor can be signed.
func TestOneAtItsEndDoesNotTakeOverForANewRoot(t *testing.T) {
	a := rootA(ca.Active)
	a.Leaving = noon
	i, x := under("a", "i", ca.Active), under("b", "x", ca.Published)
	x.NotAfter = i.NotAfter.Add(-5 * day)
	w := worldOf(a, named("b", rootA(ca.Active)), i, x)
	if s := stepOf(t, Next(testPolicy, w, noon), "x"); s.To != ca.Active || !s.Ready(false) {
		t.Fatalf("while most of its life is left: %+v", s)
	}
	now := x.NotAfter.Add(-2 * day)
	if s := stepOf(t, Next(testPolicy, w, now), "x"); s.To != ca.Removed {
		t.Fatalf("at its end: %+v", s)
	}
	if s := stepOf(t, Next(testPolicy, w, now), ""); !s.Ready(false) || !strings.Contains(s.Because, "the root above i is being replaced") {
		t.Fatalf("%+v", s)
	}
	i.Tainted = noon
	if s := stepOf(t, Next(testPolicy, worldOf(a, named("b", rootA(ca.Active)), i, x), now), "x"); s.To != ca.Active {
		t.Fatalf("a lost key signs on: %+v", s)
	}
}

func TestWhatLivesShorterThanTheLongestLeafIsRefused(t *testing.T) {
	short := rootA("")
	short.NotAfter = noon.Add(day - 1)
	begun := worldOf(named("b", rootA(ca.Active)), under("b", "i", ca.Active))
	if _, err := AddRoot(testPolicy, begun, short, noon); err == nil || !strings.Contains(err.Error(), "nothing may be signed under a root that ends before its leaves") {
		t.Fatal(err)
	}
	w := worldOf(rootA(ca.Active), under("a", "i", ca.Active), Authority{ID: "x", Kind: ca.KindIntermediate, State: ca.Prepared})
	if _, err := Signed(testPolicy, w, "x", "a", noon, noon.Add(day-1), noon); err == nil || !strings.Contains(err.Error(), "shorter than the longest leaf") {
		t.Fatal(err)
	}
}

// There is nothing better to wait for: leaves are cut short. What has ended is nothing to begin with.
func TestAClusterBeginsWithWhatItIsGiven(t *testing.T) {
	short := rootA("")
	short.NotAfter = noon.Add(time.Hour)
	all, err := AddRoot(testPolicy, World{}, short, noon)
	if err != nil {
		t.Fatal(err)
	}
	w := World{Authorities: append(all, Authority{ID: "x", Kind: ca.KindIntermediate, State: ca.Prepared})}
	if w.Authorities, err = Signed(testPolicy, w, "x", short.ID, noon, short.NotAfter, noon); err != nil {
		t.Fatal(err)
	}
	if w = settle(t, w, noon); active(w) != "x" {
		t.Fatalf("active is %q", active(w))
	}
	if _, err := AddRoot(testPolicy, World{}, short, noon.Add(2*time.Hour)); err == nil {
		t.Fatal("a root that has ended was added")
	}
}

// The bounds of an intermediate are those of its chain: one that outlives its root ends with it.
func TestTheRootBoundsAnIntermediate(t *testing.T) {
	a := rootA(ca.Active)
	a.NotAfter = epoch.Add(12 * day)
	i, x := under("a", "i", ca.Active), under("a", "x", ca.Published)
	i.NotAfter, x.NotAfter = a.NotAfter.Add(-time.Hour), a.NotAfter
	w := worldOf(a, i, x)
	if s := stepOf(t, Next(testPolicy, w, epoch.Add(11*day+1)), "x"); s.To != ca.Removed {
		t.Fatalf("%+v", s)
	}
	if s := stepOf(t, Next(testPolicy, w, epoch.Add(10*day)), "x"); s.To != ca.Active || !s.Ready(false) {
		t.Fatalf("the switch comes at 67 %% of the shorter life: %+v", s)
	}
	all := Apply(testPolicy, w.Authorities, stepOf(t, Next(testPolicy, w, epoch.Add(10*day)), "x"), epoch.Add(11*day+time.Hour))
	if until := all[1].LeavesUntil; !until.Equal(i.NotAfter) || !all[0].LeavesUntil.Equal(i.NotAfter) {
		t.Fatalf("leaves live until %s, the chain until %s", until, a.NotAfter)
	}
}

func TestAServerThatSleptThroughEverythingKeepsABundle(t *testing.T) {
	w := worldOf(rootA(ca.Active), named("b", rootA(ca.Published)), under("a", "i", ca.Active), under("a", "x", ca.Published))
	now := epoch.Add(800 * day)
	w = settle(t, w, now)
	if !slices.ContainsFunc(w.Authorities, Authority.InBundle) {
		t.Fatalf("the bundle is empty: %+v", w.Authorities)
	}
	if active(w) != "i" {
		t.Fatalf("active is %q", active(w))
	}
	c := named("c", rootA(""))
	c.NotAfter = now.Add(400 * day)
	all, err := AddRoot(testPolicy, w, c, now)
	if err != nil {
		t.Fatal(err)
	}
	y := under("c", "y", ca.Prepared)
	y.NotBefore, y.NotAfter = now, now.Add(30*day)
	w.Authorities = append(all, y)
	if w = settle(t, w, now); active(w) != "y" {
		t.Fatalf("active is %q: %+v", active(w), Next(testPolicy, w, now))
	}
	for _, id := range []string{"a", "b"} {
		if r, _ := w.authority(id); r.State != ca.Removed {
			t.Errorf("%s has expired and is %s", id, r.State)
		}
	}
}

func TestAClockThatJumpsBackTakesNothingBack(t *testing.T) {
	a := rootA(ca.Active)
	a.Leaving = noon
	w := settle(t, worldOf(a, named("b", rootA(ca.Active)), under("a", "i", ca.Active), under("b", "x", ca.Published)), noon)
	if active(w) != "x" {
		t.Fatalf("active is %q", active(w))
	}
	for _, back := range []time.Duration{time.Hour, 5 * day, 400 * day} {
		for _, s := range Next(testPolicy, w, noon.Add(-back)) {
			if s.Ready(false) {
				t.Errorf("%s back: %+v", back, s)
			}
		}
	}
}

func TestAStepTwiceIsAStepOnce(t *testing.T) {
	w := worldOf(rootA(ca.Active), under("a", "i", ca.Active), under("a", "x", ca.Published))
	s := stepOf(t, Next(testPolicy, w, noon.Add(11*day)), "x")
	once := Apply(testPolicy, w.Authorities, s, noon.Add(11*day))
	if twice := Apply(testPolicy, once, s, noon.Add(12*day)); !slices.Equal(once, twice) {
		t.Fatal(changes(once, twice))
	}
	if got := changes(w.Authorities, once); got != "i retired, x active" {
		t.Fatal(got)
	}
}

func TestAnAbortedRootRotationGivesBack(t *testing.T) {
	a := rootA(ca.Active)
	a.Leaving = noon.Add(-time.Hour)
	before := worldOf(a, named("b", rootA(ca.Active)), under("a", "i", ca.Active), under("b", "x", ca.Published))
	w := settle(t, before, noon)
	all, err := Abort(testPolicy, w, "b", false, noon)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := changes(w.Authorities, all), "a active, a not leaving, b leaving, i active, x retired"; got != want {
		t.Fatalf("%q, want %q", got, want)
	}
	// Peers that have stopped trusting the old root stand in the way, and can be overridden.
	w.Peers = []Report{west(noon, "b")}
	var early *NotNow
	if _, err := Abort(testPolicy, w, "b", false, noon); !errors.Is(err, ErrNotNow) || !errors.As(err, &early) || early.Root != "a" || early.Waits[0].Code != WaitPeer {
		t.Fatal(err)
	}
	if _, err := Abort(testPolicy, w, "b", true, noon); err != nil {
		t.Fatal(err)
	}
	// The root that is signed under stays, not one that left before.
	z := named("z", rootA(ca.Retired))
	z.Leaving = noon.Add(-day)
	w = worldOf(z, a, named("b", rootA(ca.Published)), under("a", "i", ca.Active))
	all, err = Abort(testPolicy, w, "b", false, noon)
	if got := outcome(w.Authorities, all, err); got != "a not leaving, b leaving" {
		t.Fatal(got)
	}
}

// Whoever got no answer to an abort asks again: what it has decided must not be turned round by that.
func TestTheSameAbortOnceMoreChangesNothing(t *testing.T) {
	for _, switched := range []bool{false, true} {
		a := rootA(ca.Active)
		a.Leaving = noon.Add(-time.Hour)
		b := named("b", rootA(ca.Published))
		before := worldOf(a, b, under("a", "i", ca.Active), under("b", "x", ca.Prepared))
		if switched {
			before = settle(t, worldOf(a, named("b", rootA(ca.Active)), under("a", "i", ca.Active), under("b", "x", ca.Published)), noon)
		}
		for id, leaves := range map[string]bool{"b": true, "a": false} {
			w := before
			var err error
			if w.Authorities, err = Abort(testPolicy, w, id, false, noon); err != nil {
				t.Fatal(err)
			}
			again, err := Abort(testPolicy, w, id, false, noon.Add(time.Minute))
			if got := outcome(w.Authorities, again, err); got != "" {
				t.Errorf("switched %v, %s: the second abort: %q", switched, id, got)
			}
			if r, _ := w.authority(id); r.Leaving.IsZero() == leaves {
				t.Errorf("switched %v, %s: leaving %s", switched, id, r.Leaving)
			}
			if k, ok := w.authority("x"); !switched && leaves {
				held := w
				held.Peers = []Report{west(noon, "b")}
				held = settle(t, held, noon)
				if s := stepOf(t, Next(testPolicy, held, noon), k.ID); !ok || len(s.Waits) != 1 || !strings.Contains(s.Waits[0].For, "signet rotation start root") || strings.Contains(s.Waits[0].For, "abort") {
					t.Errorf("what was to sign under an aborted root: %+v", s)
				}
			}
			// Whoever then wants it the other way round says so, and may abort that.
			w.Authorities = again
			if leaves {
				w.Authorities, err = AddRoot(testPolicy, w, b, noon)
			} else {
				w.Authorities, err = RemoveRoot(w, id, noon)
			}
			if err != nil {
				t.Fatal(err)
			}
			if r, _ := w.authority(id); r.Leaving.IsZero() != leaves || !r.Aborted.IsZero() {
				t.Errorf("switched %v, %s: the other way round: %+v", switched, id, r)
			}
		}
	}
}

// A root that an abort has kept may come to replace another one: that can be turned back too, as MayBring tells.
func TestAnAbortLongAgoIsNotTheSameAbort(t *testing.T) {
	for what, w := range map[string]World{
		"it was to be removed": worldOf(rootA(ca.Active), named("b", rootA(ca.Published)), under("a", "i", ca.Active)),
		"it has signed before": worldOf(named("b", rootA(ca.Published)), rootA(ca.Active), under("a", "i", ca.Active), under("b", "x", ca.Retired)),
	} {
		at := noon
		do := func(all []Authority, err error) {
			t.Helper()
			if err != nil {
				t.Fatal(what, err)
			}
			w.Authorities, at = all, at.Add(time.Hour)
		}
		do(RemoveRoot(w, "b", at))
		do(Abort(testPolicy, w, "b", false, at))
		do(RemoveRoot(w, "a", at))
		if err := MayBring(w, "c", at); err == nil || !strings.Contains(err.Error(), "signet rotation abort b") {
			t.Errorf("%s: %v", what, err)
		}
		do(Abort(testPolicy, w, "b", false, at))
		a, _ := w.authority("a")
		if b, _ := w.authority("b"); !a.Leaving.IsZero() || b.Leaving.IsZero() {
			t.Errorf("%s: a leaves %s, b %s", what, a.Leaving, b.Leaving)
		}
	}
}

// A ceremony's successors stand by for as long as the root above them can come back; then they go before it does.
func TestWhatStandsByUnderARootComesBackWithIt(t *testing.T) {
	a, b := rootA(ca.Active), named("b", rootA(ca.Active))
	i, x := under("a", "i", ca.Active), under("b", "x", ca.Published)
	y, z := under("a", "y", ca.Published), under("a", "z", ca.Published)
	y.NotBefore, y.NotAfter = epoch.Add(20*day), epoch.Add(50*day)
	z.NotBefore, z.NotAfter = epoch.Add(40*day), epoch.Add(70*day)
	w := worldOf(a, b, i, x, y, z)
	says := func(w World, id string) string {
		s := stepOf(t, Next(testPolicy, w, noon), id)
		return fmt.Sprintf("%s: %s %v", s.To, s.Because, s.Waits)
	}
	// As soon as the root is being replaced it is said what becomes of them.
	all, err := StartRoot(w, "b", noon)
	if err != nil {
		t.Fatal(err)
	}
	w.Authorities = all
	for _, id := range []string{"y", "z"} {
		if got := says(w, id); !strings.Contains(got, "but only if no other root is signed under by then: that ends it, since a is being replaced") {
			t.Errorf("%s is to become %s", id, got)
		}
	}
	w = settle(t, w, noon)
	ends := noon.Add(testPolicy.LongestLeaf + testPolicy.Skew + time.Second)
	for _, id := range []string{"y", "z"} {
		s := stepOf(t, Next(testPolicy, w, noon), id)
		if s.From != ca.Published || s.To != ca.Removed || len(s.Waits) != 1 || s.Waits[0].For != "it is kept until a is removed: signet rotation abort a brings both back" || !s.Waits[0].Until.Equal(ends) {
			t.Errorf("after the switch: %+v", s)
		}
	}
	// Nothing more is needed for what signs now, and none of them is taken for a successor of it.
	if s := stepOf(t, Next(testPolicy, w, noon), ""); s.Ready(true) {
		t.Errorf("%+v", s)
	}
	if all, found := Want(testPolicy, w, epoch.Add(45*day)); found {
		t.Errorf("under a root that goes one is wanted: %s", changes(w.Authorities, all))
	}
	for abort, signs := range map[string]string{"a": "x", "b": "i"} {
		all, err := Abort(testPolicy, w, abort, false, noon)
		if err != nil {
			t.Fatal(err)
		}
		back := settle(t, World{Authorities: all, Own: w.Own}, noon)
		for id, before := range map[string]string{"y": signs, "z": "y"} {
			if got := says(back, id); !strings.HasPrefix(got, "active: 67 % of the life of "+before+" [{time ") {
				t.Errorf("after the abort of %s, %s is to become %s", abort, id, got)
			}
		}
	}
	peered := w
	peered.Peers = []Report{west(noon, "a")}
	if s := stepOf(t, Next(testPolicy, peered, noon), "y"); len(s.Waits) != 1 || !s.Waits[0].Until.IsZero() {
		t.Errorf("while another cluster signs under the root: %+v", s)
	}
	lost := World{Authorities: slices.Clone(w.Authorities), Own: w.Own}
	lost.Authorities[0].Tainted = noon
	if s := stepOf(t, Next(testPolicy, lost, noon), "y"); !s.Ready(false) {
		t.Errorf("under a root that can't come back: %+v", s)
	}
	var order []string
	for _, s := range Plan(testPolicy, w, noon, 4) {
		order = append(order, s.Authority)
	}
	if !slices.Equal(order, []string{"i", "y", "z", "a"}) {
		t.Errorf("removed are %q", order)
	}
	if w = settle(t, w, ends); len(Next(testPolicy, w, ends)) != 1 {
		t.Errorf("after the end: %+v", Next(testPolicy, w, ends))
	}
}

// What waits under a root at its end, and is of no use since it ends with it, keeps nobody from asking the root that replaces it.
func TestSparesOfARootAtItsEndDontKeepTheNextOneWaiting(t *testing.T) {
	a := rootA(ca.Active)
	a.NotAfter = epoch.Add(20 * day)
	i, x, y := under("a", "i", ca.Active), under("a", "x", ca.Published), under("a", "y", ca.Published)
	i.NotAfter, x.NotAfter, y.NotAfter = a.NotAfter, a.NotAfter, a.NotAfter
	w := worldOf(a, named("b", rootA(ca.Published)), i, x, y)
	now := epoch.Add(15 * day)
	if steps := Next(testPolicy, w, now); slices.ContainsFunc(steps, func(s Step) bool { return s.From == "" }) {
		t.Fatalf("under the same root one more is asked for: %+v", steps)
	}
	all, err := StartRoot(w, "b", now)
	if err != nil {
		t.Fatal(err)
	}
	w.Authorities = all
	if s := stepOf(t, Next(testPolicy, w, now), ""); !s.Ready(false) || s.Because != "the root above i is being replaced" {
		t.Fatalf("%+v", s)
	}
}

// What takes over late makes the request needless that is due by then.
func TestNothingIsAskedForThatAStepMakesNeedless(t *testing.T) {
	leaves := rootA(ca.Active)
	leaves.Leaving = noon
	late, other := under("a", "x", ca.Prepared), under("b", "x", ca.Prepared)
	late.NotBefore, late.NotAfter = epoch.Add(29*day+12*time.Hour), epoch.Add(60*day)
	other.NotAfter = epoch.Add(60 * day)
	for what, c := range map[string]struct {
		w   World
		now time.Time
	}{
		"it is signed in the last day of the issuer":           {worldOf(rootA(ca.Active), under("a", "i", ca.Active), late), late.NotBefore.Add(time.Minute)},
		"it is signed after the end of the issuer":             {worldOf(rootA(ca.Active), under("a", "i", ca.Active), late), epoch.Add(31 * day)},
		"the other root becomes active when the issuer is due": {worldOf(leaves, named("b", rootA(ca.Published)), under("a", "i", ca.Active), other), epoch.Add(21 * day)},
	} {
		w := c.w
		for range 5 {
			steps := Next(testPolicy, w, c.now)
			i := slices.IndexFunc(steps, func(s Step) bool { return s.Ready(false) })
			if i < 0 {
				break
			}
			if steps[i].From == "" {
				t.Fatalf("%s: one more is asked for since %s", what, steps[i].Because)
			}
			w.Authorities = Apply(testPolicy, w.Authorities, steps[i], c.now)
		}
		if active(w) != "x" {
			t.Errorf("%s: active is %q", what, active(w))
		}
	}
}

func TestTheOnlyRootIsNotRemoved(t *testing.T) {
	w := worldOf(rootA(ca.Active))
	for verb, do := range map[string]func() ([]Authority, error){
		"remove": func() ([]Authority, error) { return RemoveRoot(w, "a", noon) },
		"abort":  func() ([]Authority, error) { return Abort(testPolicy, w, "a", false, noon) },
	} {
		if _, err := do(); err == nil || !strings.Contains(err.Error(), "the only root that stays") {
			t.Errorf("%s: %v", verb, err)
		}
	}
}

func TestATaintedIssuerIsReplacedAtOnce(t *testing.T) {
	w := worldOf(rootA(ca.Active), named("b", rootA(ca.Active)), under("a", "i", ca.Active), under("b", "x", ca.Published))
	all, err := Taint(w, "i", noon)
	if got := outcome(w.Authorities, all, err); got != "a leaving, i tainted" {
		t.Fatal(got)
	}
	w.Authorities = all
	w = settle(t, w, noon)
	if got := Stale(w, noon); active(w) != "x" || !slices.Equal(got, []string{"i"}) {
		t.Fatalf("active %q, stale %v", active(w), got)
	}
	if _, err := AddRoot(testPolicy, w, rootA(""), noon); err == nil || !strings.Contains(err.Error(), "a key below it is tainted") {
		t.Fatal(err)
	}
	if _, err := StartRoot(w, "a", noon); err == nil {
		t.Fatal("a rotation to an exposed root is started")
	}
	// Nor is one added that only a peer knows of.
	elsewhere := worldOf(rootA(ca.Active), under("a", "i", ca.Active))
	elsewhere.Peers = []Report{{Cluster: "west", At: noon, Tainted: []TaintReport{{ID: "x", Root: "b", Since: noon, NotAfter: noon.Add(time.Hour)}}}}
	if _, err := AddRoot(testPolicy, elsewhere, named("b", rootA("")), noon); err == nil || !strings.Contains(err.Error(), "root b must go") {
		t.Fatal(err)
	}
	if all, err := AddRoot(testPolicy, elsewhere, named("b", rootA("")), noon.Add(2*time.Hour)); outcome(elsewhere.Authorities, all, err) != "+b prepared" {
		t.Fatal(outcome(elsewhere.Authorities, all, err))
	}
	if _, err := Abort(testPolicy, w, "a", true, noon); err == nil || !strings.Contains(err.Error(), "must go") {
		t.Fatal(err)
	}
	// With no other root, a successor under the same one is asked for, and status says what is missing.
	w = worldOf(rootA(ca.Active), under("a", "i", ca.Active))
	if w.Authorities, err = Taint(w, "i", noon); err != nil {
		t.Fatal(err)
	}
	if s := stepOf(t, Next(testPolicy, w, noon), ""); !s.Ready(false) || s.Because != "the key of i is tainted" {
		t.Fatalf("%+v", s)
	}
}

func TestAReportListsWhatIsTrusted(t *testing.T) {
	gone := named("g", rootA(ca.Removed))
	gone.LeavesUntil = noon.Add(time.Hour)
	roots := ReportRoots(testPolicy, []Authority{rootA(ca.Active), named("p", rootA(ca.Prepared)), gone, under("a", "i", ca.Active)}, noon)
	if len(roots) != 2 || roots[0].ID != "a" || !roots[0].Signing || !roots[0].LeavesUntil.Equal(noon.Add(day)) || roots[1].ID != "g" || !roots[1].Leaving {
		t.Fatalf("%+v", roots)
	}
	i := under("a", "i", ca.Retired)
	i.Tainted = noon
	if taints := ReportTaints(testPolicy, []Authority{rootA(ca.Active), i}, nil, noon); len(taints) != 1 || taints[0].Root != "a" || !taints[0].NotAfter.Equal(i.NotAfter) {
		t.Fatalf("%+v", taints)
	}
	if taints := ReportTaints(testPolicy, []Authority{i}, nil, i.NotAfter.Add(day)); len(taints) != 0 {
		t.Fatalf("%+v", taints)
	}
}

// Who has turned a root back is not told to begin with it, while another cluster goes on.
func TestWhatWasTurnedBackIsNotToBeBegunWith(t *testing.T) {
	a := rootA(ca.Active)
	a.Leaving = noon.Add(-time.Hour)
	w := worldOf(a, named("b", rootA(ca.Published)), under("a", "i", ca.Active))
	w.Peers = []Report{west(noon, "a", "b")}
	w.Peers[0].Roots[0].Leaving = true
	var err error
	if w.Authorities, err = Abort(testPolicy, w, "b", false, noon); err != nil {
		t.Fatal(err)
	}
	s := stepOf(t, Next(testPolicy, w, noon), "a")
	if len(s.Waits) != 1 || !strings.Contains(s.Waits[0].For, "signet rotation abort b") || strings.Contains(s.Waits[0].For, "has to begin") {
		t.Errorf("%+v", s)
	}
}
