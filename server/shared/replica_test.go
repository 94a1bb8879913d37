package shared

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/signet-ca/signet/ca"
)

// hereOf is a root as it stands in a cluster.
func hereOf(r *root, stands Standing) Local {
	return Local{Root: rootOf(r, Believed, 0, ""), Stands: stands}
}

// told writes a document in short: the IDs' place is the test's.
func (r Replica) told(names map[string]string) string {
	var all []string
	for _, x := range r {
		s := fmt.Sprintf("%s %s %d %s", names[x.ID], x.Standing(), x.Decision, x.By)
		if x.State == ca.Active {
			s += " active"
		}
		if x.Tainted {
			s += " tainted"
		}
		all = append(all, s)
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

func TestWhatClustersDecideComesTogether(t *testing.T) {
	a, b := newRoot(t), newRoot(t)
	names := map[string]string{a.id(): "a", b.id(): "b"}
	knows := func(x Root, here Standing) Replica { return Replica{{x, here}} }
	active := func(l Local) Local { l.State = ca.Active; return l }
	tainted := func(l Local) Local { l.Tainted = true; return l }
	now := time.Now()
	for _, c := range []struct {
		what   string
		own    Replica
		theirs []Root
		here   []Local
		gone   bool
		want   string
	}{
		{"the first one tells what it has", nil, nil, []Local{active(hereOf(a, Believed)), hereOf(b, Leaving)}, false, "a believed 1 east active, b leaving 1 east"},
		{"what the others have stays", nil, []Root{rootOf(b, Believed, 1, "west")}, []Local{hereOf(a, Believed)}, false, "a believed 1 east, b believed 1 west"},
		{"nothing new says nothing", knows(rootOf(a, Believed, 1, "west"), Believed), []Root{rootOf(a, Believed, 1, "west")}, []Local{hereOf(a, Believed)}, false, "a believed 1 west"},
		{"it began to leave here", knows(rootOf(a, Believed, 1, "west"), Believed), []Root{rootOf(a, Believed, 1, "west")}, []Local{hereOf(a, Leaving)}, false, "a leaving 2 east"},
		{"it began to leave there", knows(rootOf(a, Believed, 1, "west"), Believed), []Root{rootOf(a, Leaving, 2, "west")}, []Local{hereOf(a, Believed)}, false, "a leaving 2 west"},
		{"it was followed, then there was a crash", knows(rootOf(a, Leaving, 2, "west"), Believed), []Root{rootOf(a, Leaving, 2, "west")}, []Local{hereOf(a, Leaving)}, false, "a leaving 2 west"},
		{"and meanwhile it was taken back there", knows(rootOf(a, Leaving, 2, "west"), Believed), []Root{rootOf(a, Believed, 3, "west")}, []Local{hereOf(a, Leaving)}, false, "a believed 3 west"},
		{"it is taken back there, and before that was followed its time here was over", knows(rootOf(a, Believed, 3, "west"), Leaving), []Root{rootOf(a, Believed, 3, "west")}, []Local{hereOf(a, Removed)}, false, "a believed 3 west"},
		{"it could not be followed", knows(rootOf(a, Leaving, 2, "west"), Believed), []Root{rootOf(a, Leaving, 2, "west")}, []Local{hereOf(a, Believed)}, false, "a leaving 2 west"},
		{"it is taken back here", knows(rootOf(a, Leaving, 2, "west"), Leaving), []Root{rootOf(a, Leaving, 2, "west")}, []Local{hereOf(a, Believed)}, false, "a believed 3 east"},
		{"both at once, here it begins to leave", knows(rootOf(a, Believed, 3, "west"), Believed), []Root{rootOf(a, Believed, 5, "west")}, []Local{hereOf(a, Leaving)}, false, "a leaving 6 east"},
		{"both at once, there it begins to leave again", knows(rootOf(a, Leaving, 2, "west"), Leaving), []Root{rootOf(a, Leaving, 4, "west")}, []Local{hereOf(a, Believed)}, false, "a leaving 4 west"},
		{"an older document takes nothing back", knows(rootOf(a, Leaving, 2, "west"), Leaving), []Root{rootOf(a, Believed, 1, "west")}, []Local{hereOf(a, Leaving)}, false, "a leaving 2 west"},
		{"nor does one that is not there", knows(rootOf(a, Leaving, 2, "west"), Leaving), nil, []Local{hereOf(a, Leaving)}, false, "a leaving 2 west"},
		{"a root of which nobody here knows stays", knows(rootOf(b, Believed, 1, "west"), Unknown), nil, nil, false, "b believed 1 west"},
		{"away while it went", knows(rootOf(a, Believed, 1, "east"), Believed), []Root{rootOf(a, Removed, 2, "west")}, []Local{hereOf(a, Believed)}, false, "a removed 2 west"},
		{"away, and without a memory", nil, []Root{rootOf(a, Removed, 1, "west")}, []Local{hereOf(a, Believed)}, false, "a removed 1 west"},
		{"an admin brings it back", knows(rootOf(a, Removed, 2, "west"), Removed), []Root{rootOf(a, Removed, 2, "west")}, []Local{hereOf(a, Believed)}, false, "a believed 3 east"},
		{"removed here, and a peer still has it", knows(rootOf(a, Leaving, 2, "west"), Leaving), []Root{rootOf(a, Leaving, 2, "west")}, []Local{hereOf(a, Removed)}, false, "a leaving 2 west"},
		{"removed here, and nobody has it", knows(rootOf(a, Leaving, 2, "west"), Leaving), []Root{rootOf(a, Leaving, 2, "west")}, []Local{hereOf(a, Removed)}, true, "a removed 2 west"},
		{"removed long ago, and nobody speaks of it", nil, nil, []Local{hereOf(a, Removed)}, false, ""},
		{"nobody has it: it is remembered", nil, nil, []Local{hereOf(a, Removed)}, true, "a removed 1 east"},
		{"removed here before anything was shared, and now somebody else has it", nil, []Root{rootOf(a, Believed, 1, "west")}, []Local{hereOf(a, Removed)}, false, "a leaving 1 east"},
		{"leaving here before anything was shared", nil, []Root{rootOf(a, Believed, 1, "west")}, []Local{hereOf(a, Leaving)}, false, "a leaving 1 east"},
		{"the same was decided before anything was shared", nil, []Root{rootOf(a, Believed, 1, "bern")}, []Local{hereOf(a, Believed)}, false, "a believed 1 bern"},
		{"the same was decided there meanwhile", knows(rootOf(a, Believed, 1, "west"), Believed), []Root{rootOf(a, Leaving, 1, "north")}, []Local{hereOf(a, Leaving)}, false, "a leaving 1 north"},
		{"a taint is for ever", knows(rootOf(a, Believed, 1, "east"), Believed), nil, []Local{tainted(hereOf(a, Believed))}, false, "a believed 1 east tainted"},
		{"a leaving root is not active", knows(rootOf(a, Believed, 1, "east"), Believed), []Root{rootOf(a, Leaving, 2, "west")}, []Local{active(hereOf(a, Believed))}, false, "a leaving 2 west"},
	} {
		next := c.own.Meet(c.theirs, c.here, "east", func(string) bool { return c.gone }, now)
		if got := next.told(names); got != c.want {
			t.Errorf("%s: %s\nwant %s", c.what, got, c.want)
		}
		text, err := Trust{TrustDomain: td.Name(), Cluster: "east", Roots: next.Roots()}.Encode()
		must(t, err)
		if read, err := parse([]byte(strings.TrimPrefix(text, title)), td, "east"); err != nil || !slices.EqualFunc(read.Roots, next.Roots(), Root.Equal) {
			t.Errorf("%s: told to others it is %+v, %v", c.what, read.Roots, err)
		}
		if again := next.Meet(next.Roots(), c.here, "east", func(string) bool { return c.gone }, now); !again.Equal(next) {
			t.Errorf("%s: again: %s", c.what, again.told(names))
		}
		if later := next.Meet(next.Roots(), nil, "east", func(string) bool { return false }, a.cert.NotAfter.Add(time.Hour)); len(later) != 0 {
			t.Errorf("%s: expired roots are kept: %s", c.what, later.told(names))
		}
	}
}

func TestOfTooManyRemovedRootsThoseThatEndFirstAreForgotten(t *testing.T) {
	now := time.Now()
	var all []Root
	for i := range MaxRemoved + 5 {
		all = append(all, Root{Fingerprint: fmt.Sprintf("%04d", i), State: ca.Removed, Leaving: true, NotAfter: now.Add(time.Duration(i+1) * time.Hour)})
	}
	all = append(all, Root{Fingerprint: "x", State: ca.Published, NotAfter: now.Add(time.Minute)})
	kept := Living(all, now)
	if len(kept) != MaxRemoved+1 || kept[0].Fingerprint != "0005" || kept[len(kept)-1].Fingerprint != "x" {
		t.Errorf("%d are kept, from %s", len(kept), kept[0].Fingerprint)
	}
	if len(all) != MaxRemoved+6 || all[0].Fingerprint != "0000" {
		t.Error("the list that was given is changed")
	}
}

// Any roots in any state, as documents may have them.
func drawRoots(roots []*root) *rapid.Generator[[]Root] {
	return rapid.Custom(func(t *rapid.T) []Root {
		var all []Root
		for _, r := range roots {
			if !rapid.Bool().Draw(t, "listed") {
				continue
			}
			x := rootOf(r, rapid.SampledFrom([]Standing{Believed, Leaving, Removed}).Draw(t, "stands"), rapid.Uint64Range(1, 3).Draw(t, "decision"), rapid.SampledFrom([]string{"east", "west"}).Draw(t, "by"))
			if x.State != ca.Removed && rapid.Bool().Draw(t, "active") {
				x.State = ca.Active
			}
			x.Tainted = rapid.Bool().Draw(t, "tainted")
			x.NotAfter = x.NotAfter.Add(time.Duration(rapid.IntRange(0, 2).Draw(t, "ends")) * time.Hour)
			all = append(all, x)
		}
		return Join(all)
	})
}

func TestDocumentsCanBePutTogetherInAnyOrder(t *testing.T) {
	roots := []*root{newRoot(t), newRoot(t), newRoot(t)}
	equal := func(a, b []Root) bool { return slices.EqualFunc(a, b, Root.Equal) }
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := drawRoots(roots).Draw(t, "a"), drawRoots(roots).Draw(t, "b"), drawRoots(roots).Draw(t, "c")
		ab := Join(a, b)
		switch {
		case !equal(ab, Join(b, a)):
			t.Error("the order decides")
		case !equal(Join(ab, c), Join(a, Join(b, c))):
			t.Error("the grouping decides")
		case !equal(Join(ab, ab), ab) || !equal(Join(ab, a), ab):
			t.Error("once more changes something")
		}
		for _, r := range append(a, b...) {
			i := slices.IndexFunc(ab, func(x Root) bool { return x.Fingerprint == r.Fingerprint })
			if i < 0 {
				t.Fatalf("%s has vanished", r.ID)
			}
			if x := ab[i]; x.Decision < r.Decision || x.Decision == r.Decision && x.Standing().strength() < r.Standing().strength() || r.Tainted && !x.Tainted || x.NotAfter.Before(r.NotAfter) {
				t.Errorf("%+v has become %+v", r, x)
			}
		}
	})
}

// drawReplica is what a cluster may know, and drawHere how those roots may stand there.
func drawReplica(roots []*root) *rapid.Generator[Replica] {
	return rapid.Custom(func(t *rapid.T) (all Replica) {
		for _, r := range drawRoots(roots).Draw(t, "known") {
			all = append(all, Known{r, rapid.SampledFrom([]Standing{Unknown, Believed, Leaving, Removed}).Draw(t, "here")})
		}
		return all
	})
}

func drawHere(roots []*root) *rapid.Generator[[]Local] {
	return rapid.Custom(func(t *rapid.T) (all []Local) {
		for _, r := range roots {
			if s := rapid.SampledFrom([]Standing{Unknown, Believed, Leaving, Removed}).Draw(t, "stands"); s != Unknown {
				all = append(all, hereOf(r, s))
			}
		}
		return all
	})
}

func TestMeetingTakesNothingBack(t *testing.T) {
	roots := []*root{newRoot(t), newRoot(t), newRoot(t)}
	now := time.Now()
	rapid.Check(t, func(t *rapid.T) {
		own, theirs, here := drawReplica(roots).Draw(t, "own"), drawRoots(roots).Draw(t, "theirs"), drawHere(roots).Draw(t, "here")
		before := slices.Clone(own)
		next := own.Meet(theirs, here, "east", func(string) bool { return rapid.Bool().Draw(t, "gone") }, now)
		for _, r := range slices.Concat(own.Roots(), theirs) {
			x, ok := next.Find(r.Fingerprint)
			if !ok || x.Decision < r.Decision || x.Decision == r.Decision && x.Standing().strength() < r.Standing().strength() || r.Tainted && !x.Tainted {
				t.Errorf("%+v has become %+v", r, x)
			}
		}
		for _, x := range next {
			i := slices.IndexFunc(here, func(l Local) bool { return l.Fingerprint == x.Fingerprint })
			if i < 0 && x.Here != Unknown || i >= 0 && x.Here != here[i].Stands {
				t.Errorf("it is remembered that %s stands as %q", x.ID, x.Here)
			}
		}
		if !own.Equal(before) {
			t.Error("what was known is changed")
		}
	})
}

func TestWhoHasDecidedNothingOnlyPutsTogether(t *testing.T) {
	roots := []*root{newRoot(t), newRoot(t), newRoot(t)}
	now := time.Now()
	rapid.Check(t, func(t *rapid.T) {
		own, theirs := drawReplica(roots).Draw(t, "own"), drawRoots(roots).Draw(t, "theirs")
		// All stands as at the last look, whether or not that is what was decided.
		var here []Local
		for _, x := range own {
			i := slices.IndexFunc(roots, func(r *root) bool { return r.fingerprint() == x.Fingerprint })
			if x.Here != Unknown {
				here = append(here, hereOf(roots[i], x.Here))
			}
		}
		next := own.Meet(theirs, here, "east", func(string) bool { return false }, now)
		if !slices.EqualFunc(next.Roots(), Join(own.Roots(), theirs), Root.Equal) {
			t.Errorf("%+v\nwith %+v\nare %+v", own, theirs, next)
		}
	})
}

func TestOnlyWhatWasFollowedIsRemembered(t *testing.T) {
	a := newRoot(t)
	for _, c := range []struct{ decided, before, stands, want Standing }{
		{Believed, Unknown, Believed, Believed},
		{Believed, Leaving, Believed, Believed},
		{Leaving, Believed, Leaving, Leaving},
		{Leaving, Leaving, Removed, Removed},
		{Removed, Believed, Leaving, Leaving},
		{Believed, Believed, Leaving, Believed}, // an admin was quicker: it is a decision
		{Leaving, Leaving, Believed, Leaving},
		{Removed, Leaving, Believed, Leaving},
	} {
		known := Replica{{rootOf(a, c.decided, 1, "west"), c.before}}
		settled := known.Settle([]Local{hereOf(a, c.stands), hereOf(newRoot(t), Believed)})
		if len(settled) != 1 || settled[0].Here != c.want || known[0].Here != c.before {
			t.Errorf("%s everywhere, %q here before, %s now: %+v", c.decided, c.before, c.stands, settled)
		}
	}
}

func TestNobodyHasTheLastWordByCountingAhead(t *testing.T) {
	a, b := newRoot(t), newRoot(t)
	own := Replica{{rootOf(a, Believed, 3, "east"), Believed}}
	for _, c := range []struct {
		roots []Root
		want  string
	}{
		{[]Root{rootOf(a, Leaving, 3+MaxJump, "west"), rootOf(b, Believed, MaxJump, "west")}, ""},
		{[]Root{rootOf(a, Leaving, 4+MaxJump, "east")}, "cluster west has signed decision 1004 about " + a.id()},
		{[]Root{rootOf(b, Believed, MaxJump+1, "west")}, "and 0 are known here"},
		{[]Root{rootOf(b, Removed, MaxDecisions, "west")}, "look there"},
	} {
		if err := own.Admits(Trust{Cluster: "west", Roots: c.roots}); c.want == "" {
			must(t, err)
		} else {
			wantError(t, err, c.want)
		}
	}

	// Where the count has come to its end, the stronger decision prevails, and what is written can be read.
	now, none := time.Now(), func(string) bool { return false }
	end := []Root{rootOf(b, Believed, MaxDecisions, "west")}
	step := func(r Replica, here Standing, doc []Root) Replica {
		t.Helper()
		r = r.Meet(doc, []Local{hereOf(b, here)}, "east", none, now)
		text, err := Trust{TrustDomain: td.Name(), Cluster: "east", Roots: r.Roots()}.Encode()
		must(t, err)
		read, err := parse([]byte(strings.TrimPrefix(text, title)), td, "east")
		must(t, err)
		if !slices.EqualFunc(read.Roots, r.Roots(), Root.Equal) {
			t.Errorf("read again: %+v", read.Roots)
		}
		return r.Settle([]Local{hereOf(b, here)})
	}
	r := step(Replica{}, Believed, end)
	r = step(r, Leaving, end) // an admin removes it
	if got, _ := r.Find(b.fingerprint()); got.Standing() != Leaving || got.By != "east" || got.Decision != MaxDecisions {
		t.Errorf("removed at the end of the count, it is %+v", got)
	}
	r = step(r, Believed, end) // and adds it again: too late
	if got, _ := r.Find(b.fingerprint()); got.Standing() != Leaving {
		t.Errorf("added at the end of the count, it is %+v", got)
	}
}
