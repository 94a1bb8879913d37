package server

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

// sharedOf is a root as the document has it.
func sharedOf(r *root, stands standing, decision uint64, by string) sharedRoot {
	x := sharedRoot{
		ID: r.id(), State: ca.Published, Leaving: stands != rootBelieved, NotAfter: r.cert.NotAfter.UTC(), Fingerprint: r.fingerprint(),
		Certificate: string(ca.EncodeChain(r.cert)), Decision: decision, By: by,
	}
	if stands == rootRemoved {
		x.State, x.Certificate = ca.Removed, ""
	}
	return x
}

// hereOf is a root as it stands in a cluster.
func hereOf(r *root, stands standing) localRoot {
	return localRoot{sharedRoot: sharedOf(r, rootBelieved, 0, ""), stands: stands}
}

// told writes a document in short: the IDs' place is the test's.
func (r replica) told(names map[string]string) string {
	var all []string
	for _, x := range r {
		s := fmt.Sprintf("%s %s %d %s", names[x.ID], x.standing(), x.Decision, x.By)
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
	knows := func(x sharedRoot, here standing) replica { return replica{{x, here}} }
	active := func(l localRoot) localRoot { l.State = ca.Active; return l }
	tainted := func(l localRoot) localRoot { l.Tainted = true; return l }
	now := time.Now()
	for _, c := range []struct {
		what   string
		own    replica
		theirs []sharedRoot
		here   []localRoot
		gone   bool
		want   string
	}{
		{"the first one tells what it has", nil, nil, []localRoot{active(hereOf(a, rootBelieved)), hereOf(b, rootLeaving)}, false, "a believed 1 east active, b leaving 1 east"},
		{"what the others have stays", nil, []sharedRoot{sharedOf(b, rootBelieved, 1, "west")}, []localRoot{hereOf(a, rootBelieved)}, false, "a believed 1 east, b believed 1 west"},
		{"nothing new says nothing", knows(sharedOf(a, rootBelieved, 1, "west"), rootBelieved), []sharedRoot{sharedOf(a, rootBelieved, 1, "west")}, []localRoot{hereOf(a, rootBelieved)}, false, "a believed 1 west"},
		{"it began to leave here", knows(sharedOf(a, rootBelieved, 1, "west"), rootBelieved), []sharedRoot{sharedOf(a, rootBelieved, 1, "west")}, []localRoot{hereOf(a, rootLeaving)}, false, "a leaving 2 east"},
		{"it began to leave there", knows(sharedOf(a, rootBelieved, 1, "west"), rootBelieved), []sharedRoot{sharedOf(a, rootLeaving, 2, "west")}, []localRoot{hereOf(a, rootBelieved)}, false, "a leaving 2 west"},
		{"it was followed, then there was a crash", knows(sharedOf(a, rootLeaving, 2, "west"), rootBelieved), []sharedRoot{sharedOf(a, rootLeaving, 2, "west")}, []localRoot{hereOf(a, rootLeaving)}, false, "a leaving 2 west"},
		{"and meanwhile it was taken back there", knows(sharedOf(a, rootLeaving, 2, "west"), rootBelieved), []sharedRoot{sharedOf(a, rootBelieved, 3, "west")}, []localRoot{hereOf(a, rootLeaving)}, false, "a believed 3 west"},
		{"it could not be followed", knows(sharedOf(a, rootLeaving, 2, "west"), rootBelieved), []sharedRoot{sharedOf(a, rootLeaving, 2, "west")}, []localRoot{hereOf(a, rootBelieved)}, false, "a leaving 2 west"},
		{"it is taken back here", knows(sharedOf(a, rootLeaving, 2, "west"), rootLeaving), []sharedRoot{sharedOf(a, rootLeaving, 2, "west")}, []localRoot{hereOf(a, rootBelieved)}, false, "a believed 3 east"},
		{"both at once, here it begins to leave", knows(sharedOf(a, rootBelieved, 3, "west"), rootBelieved), []sharedRoot{sharedOf(a, rootBelieved, 5, "west")}, []localRoot{hereOf(a, rootLeaving)}, false, "a leaving 6 east"},
		{"both at once, there it begins to leave again", knows(sharedOf(a, rootLeaving, 2, "west"), rootLeaving), []sharedRoot{sharedOf(a, rootLeaving, 4, "west")}, []localRoot{hereOf(a, rootBelieved)}, false, "a leaving 4 west"},
		{"an older document takes nothing back", knows(sharedOf(a, rootLeaving, 2, "west"), rootLeaving), []sharedRoot{sharedOf(a, rootBelieved, 1, "west")}, []localRoot{hereOf(a, rootLeaving)}, false, "a leaving 2 west"},
		{"nor does one that is not there", knows(sharedOf(a, rootLeaving, 2, "west"), rootLeaving), nil, []localRoot{hereOf(a, rootLeaving)}, false, "a leaving 2 west"},
		{"a root of which nobody here knows stays", knows(sharedOf(b, rootBelieved, 1, "west"), rootUnknown), nil, nil, false, "b believed 1 west"},
		{"away while it went", knows(sharedOf(a, rootBelieved, 1, "east"), rootBelieved), []sharedRoot{sharedOf(a, rootRemoved, 2, "west")}, []localRoot{hereOf(a, rootBelieved)}, false, "a removed 2 west"},
		{"away, and without a memory", nil, []sharedRoot{sharedOf(a, rootRemoved, 1, "west")}, []localRoot{hereOf(a, rootBelieved)}, false, "a removed 1 west"},
		{"an admin brings it back", knows(sharedOf(a, rootRemoved, 2, "west"), rootRemoved), []sharedRoot{sharedOf(a, rootRemoved, 2, "west")}, []localRoot{hereOf(a, rootBelieved)}, false, "a believed 3 east"},
		{"removed here, and a peer still has it", knows(sharedOf(a, rootLeaving, 2, "west"), rootLeaving), []sharedRoot{sharedOf(a, rootLeaving, 2, "west")}, []localRoot{hereOf(a, rootRemoved)}, false, "a leaving 2 west"},
		{"removed here, and nobody has it", knows(sharedOf(a, rootLeaving, 2, "west"), rootLeaving), []sharedRoot{sharedOf(a, rootLeaving, 2, "west")}, []localRoot{hereOf(a, rootRemoved)}, true, "a removed 2 west"},
		{"removed long ago, and nobody speaks of it", nil, nil, []localRoot{hereOf(a, rootRemoved)}, false, ""},
		{"nobody has it: it is remembered", nil, nil, []localRoot{hereOf(a, rootRemoved)}, true, "a removed 1 east"},
		{"removed here before anything was shared, and now somebody else has it", nil, []sharedRoot{sharedOf(a, rootBelieved, 1, "west")}, []localRoot{hereOf(a, rootRemoved)}, false, "a leaving 1 east"},
		{"leaving here before anything was shared", nil, []sharedRoot{sharedOf(a, rootBelieved, 1, "west")}, []localRoot{hereOf(a, rootLeaving)}, false, "a leaving 1 east"},
		{"a taint is for ever", knows(sharedOf(a, rootBelieved, 1, "east"), rootBelieved), nil, []localRoot{tainted(hereOf(a, rootBelieved))}, false, "a believed 1 east tainted"},
		{"a leaving root is not active", knows(sharedOf(a, rootBelieved, 1, "east"), rootBelieved), []sharedRoot{sharedOf(a, rootLeaving, 2, "west")}, []localRoot{active(hereOf(a, rootBelieved))}, false, "a leaving 2 west"},
	} {
		next := c.own.meet(c.theirs, c.here, "east", func(string) bool { return c.gone }, now)
		if got := next.told(names); got != c.want {
			t.Errorf("%s: %s\nwant %s", c.what, got, c.want)
		}
		if again := next.meet(next.roots(), c.here, "east", func(string) bool { return c.gone }, now); !again.equal(next) {
			t.Errorf("%s: again: %s", c.what, again.told(names))
		}
		if later := next.meet(next.roots(), nil, "east", func(string) bool { return false }, a.cert.NotAfter.Add(time.Hour)); len(later) != 0 {
			t.Errorf("%s: expired roots are kept: %s", c.what, later.told(names))
		}
	}
}

func TestOfTooManyRemovedRootsThoseThatEndFirstAreForgotten(t *testing.T) {
	now := time.Now()
	var all []sharedRoot
	for i := range maxGone + 5 {
		all = append(all, sharedRoot{Fingerprint: fmt.Sprintf("%04d", i), State: ca.Removed, Leaving: true, NotAfter: now.Add(time.Duration(i+1) * time.Hour)})
	}
	all = append(all, sharedRoot{Fingerprint: "x", State: ca.Published, NotAfter: now.Add(time.Minute)})
	kept := living(all, now)
	if len(kept) != maxGone+1 || kept[0].Fingerprint != "0005" || kept[len(kept)-1].Fingerprint != "x" {
		t.Errorf("%d are kept, from %s", len(kept), kept[0].Fingerprint)
	}
	if len(all) != maxGone+6 || all[0].Fingerprint != "0000" {
		t.Error("the list that was given is changed")
	}
}

// Any roots in any state, as documents may have them.
func drawShared(roots []*root) *rapid.Generator[[]sharedRoot] {
	return rapid.Custom(func(t *rapid.T) []sharedRoot {
		var all []sharedRoot
		for _, r := range roots {
			if !rapid.Bool().Draw(t, "listed") {
				continue
			}
			x := sharedOf(r, rapid.SampledFrom([]standing{rootBelieved, rootLeaving, rootRemoved}).Draw(t, "stands"), rapid.Uint64Range(1, 3).Draw(t, "decision"), rapid.SampledFrom([]string{"east", "west"}).Draw(t, "by"))
			if x.State != ca.Removed && rapid.Bool().Draw(t, "active") {
				x.State = ca.Active
			}
			x.Tainted = rapid.Bool().Draw(t, "tainted")
			all = append(all, x)
		}
		return joinAll(all)
	})
}

func TestDocumentsCanBePutTogetherInAnyOrder(t *testing.T) {
	roots := []*root{newRoot(t), newRoot(t), newRoot(t)}
	equal := func(a, b []sharedRoot) bool { return slices.EqualFunc(a, b, sharedRoot.equal) }
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := drawShared(roots).Draw(t, "a"), drawShared(roots).Draw(t, "b"), drawShared(roots).Draw(t, "c")
		ab := joinAll(a, b)
		switch {
		case !equal(ab, joinAll(b, a)):
			t.Error("the order decides")
		case !equal(joinAll(ab, c), joinAll(a, joinAll(b, c))):
			t.Error("the grouping decides")
		case !equal(joinAll(ab, ab), ab) || !equal(joinAll(ab, a), ab):
			t.Error("once more changes something")
		}
		for _, r := range append(a, b...) {
			i := slices.IndexFunc(ab, func(x sharedRoot) bool { return x.Fingerprint == r.Fingerprint })
			if i < 0 {
				t.Fatalf("%s has vanished", r.ID)
			}
			if x := ab[i]; x.Decision < r.Decision || x.Decision == r.Decision && x.standing().strength() < r.standing().strength() || r.Tainted && !x.Tainted {
				t.Errorf("%+v has become %+v", r, x)
			}
		}
	})
}

// modelCluster follows the document as a server does, without one.
type modelCluster struct {
	*keeper
	set *authorities
	own replica
	// kept is the copy of own that outlives a crash.
	kept replica
	// told is where all have each other's reports.
	told map[string]rotation.Report
}

// acquainted lets clusters read each other's reports.
func acquainted(all ...*modelCluster) {
	told := map[string]rotation.Report{}
	for _, c := range all {
		c.told = told
		c.tell()
	}
}

func (c *modelCluster) tell() {
	if c.told == nil {
		return
	}
	now, lives := time.Now(), c.set.lives()
	c.told[c.folder.Cluster] = rotation.Report{
		Cluster: c.folder.Cluster, At: now, Roots: rotation.ReportRoots(c.policy.Policy, lives, now), Tainted: rotation.ReportTaints(c.policy.Policy, lives, now),
	}
}

func (c *modelCluster) world() rotation.World {
	w := rotation.World{Authorities: c.set.lives()}
	for _, name := range slices.Sorted(maps.Keys(c.told)) {
		if name != c.folder.Cluster {
			w.Peers = append(w.Peers, c.told[name])
		}
	}
	return w
}

// listed reports whether others say of a root that they believe it, and that they go on with it.
func (c *modelCluster) listed(id string) (believed, stays bool) {
	for _, p := range c.world().Peers {
		for _, r := range p.Roots {
			believed, stays = believed || r.ID == id, stays || r.ID == id && !r.Leaving
		}
	}
	return believed, stays
}

func newModelCluster(t interface{ Fatalf(string, ...any) }, name string, first *root) *modelCluster {
	policy := testRotation()
	policy.Peers = []Peer{{Cluster: "another"}}
	c := &modelCluster{keeper: newKeeper(&Folder{TrustDomain: td, Cluster: name}, policy)}
	row := store.Authority{
		Authority: rotation.Authority{ID: first.id(), Kind: ca.KindRoot, State: ca.Active, Since: time.Now()},
		Chain:     [][]byte{first.cert.Raw}, Created: time.Now(),
	}
	var err error
	signs := store.Authority{
		Authority: rotation.Authority{ID: "intermediate-1", Kind: ca.KindIntermediate, Root: first.id(), State: ca.Active, Since: time.Now()}, Created: time.Now(),
	}
	if c.set, err = (&authorities{td: td}).edit(nil, row, signs); err != nil {
		t.Fatalf("%v", err)
	}
	return c
}

// round is what exchange.follow does; it may end after any of its steps.
func (c *modelCluster) round(doc []sharedRoot, gone func(string) bool, crash int) (_ []sharedRoot, whole bool) {
	now := time.Now()
	c.tell()
	c.own = c.kept
	next := c.own.meet(doc, c.set.shares(now), c.folder.Cluster, gone, now)
	if crash == 1 {
		return nil, false
	}
	c.kept = next
	if crash == 2 {
		return nil, false
	}
	c.set, _ = c.follow(c.set, c.world(), next, now)
	c.step()
	if crash == 3 {
		return nil, false
	}
	c.kept = next.settle(c.set.shares(now))
	return c.kept.roots(), crash != 4
}

func (c *modelCluster) stands(id string) standing {
	for _, l := range c.set.shares(time.Now()) {
		if l.ID == id {
			return l.stands
		}
	}
	return rootUnknown
}

// step takes roots to where they are signed under.
func (c *modelCluster) step() {
	lives := c.set.lives()
	for i, a := range lives {
		if a.Leaving.IsZero() && (a.State == ca.Prepared || a.State == ca.Published) {
			lives[i].State = ca.Active
		}
	}
	if next, err := c.set.edit(lives); err == nil {
		c.set = next
	}
}

// taint is an admin's word about a key; it reports whether it was taken.
func (c *modelCluster) taint(r *root) bool {
	lives, err := rotation.Taint(rotation.World{Authorities: c.set.lives()}, r.id(), time.Now())
	if err != nil {
		return false
	}
	c.set, err = c.set.edit(lives)
	return err == nil
}

// decide is an admin's word; it reports whether it was taken.
func (c *modelCluster) decide(r *root, leave bool) bool {
	now, w := time.Now(), rotation.World{Authorities: c.set.lives()}
	var next *authorities
	var err error
	before := c.stands(r.id())
	if leave {
		var lives []rotation.Authority
		if lives, err = rotation.RemoveRoot(w, r.id(), now); err == nil {
			next, err = c.set.edit(lives)
		}
	} else {
		next, err = c.set.addRoot(c.policy.Policy, w, r.cert, now)
	}
	if err != nil {
		return false
	}
	c.set = next
	c.step()
	return c.stands(r.id()).decided() != before.decided()
}

// remove ends a root that is leaving, whether or not it should.
func (c *modelCluster) remove(id string) {
	lives := c.set.lives()
	for i, a := range lives {
		if a.ID == id && !a.Leaving.IsZero() && a.State != ca.Removed {
			lives[i].State = ca.Removed
			if next, err := c.set.edit(lives); err == nil {
				c.set = next
			}
		}
	}
}

// The promise of it all: clusters that come and go, crash at any step, read old documents or none, and decide what they like,
// come to the same; and nothing is ever decided but by an admin, so that no root comes back to life or goes by itself.
func TestNothingIsDecidedButByAnAdmin(t *testing.T) {
	roots, another := []*root{newRoot(t), newRoot(t), newRoot(t)}, newRoot(t)
	happened := map[string]int{}
	defer func() {
		for _, what := range []string{"add", "leave", "taint", "follow an add", "follow a leaving", "crash", "pass over what is old"} {
			if happened[what] == 0 && !t.Failed() {
				t.Errorf("of %s nothing was seen", what)
			}
		}
	}()
	rapid.Check(t, func(t *rapid.T) {
		clusters := []*modelCluster{newModelCluster(t, "east", roots[0]), newModelCluster(t, "west", roots[0]), newModelCluster(t, "north", roots[0])}
		acquainted(clusters...)
		var doc []sharedRoot
		history := [][]sharedRoot{nil}
		decisions := map[string]uint64{roots[0].id(): 1}
		everLeft := map[string]bool{}
		drawn := func(string) bool { return rapid.Bool().Draw(t, "gone") }
		check := func() {
			for _, list := range append([][]sharedRoot{doc}, clusters[0].kept.roots(), clusters[1].kept.roots(), clusters[2].kept.roots()) {
				for _, r := range list {
					if r.Decision > decisions[r.ID] {
						t.Fatalf("%s has decision %d, and admins have taken %d", r.ID, r.Decision, decisions[r.ID])
					}
				}
			}
			for _, c := range clusters {
				for _, r := range roots {
					if s := c.stands(r.id()); (s == rootLeaving || s == rootRemoved) && !everLeft[r.id()] {
						t.Fatalf("%s is %s in %s, and nobody has said so", r.id(), s, c.folder.Cluster)
					}
				}
			}
		}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			c := rapid.SampledFrom(clusters).Draw(t, "cluster")
			r := rapid.SampledFrom(roots).Draw(t, "root")
			switch rapid.SampledFrom([]string{"round", "round", "round", "crash", "add", "leave", "remove", "lost", "old", "taint"}).Draw(t, "what") {
			case "round":
				before := c.stands(r.id())
				if next, ok := c.round(doc, drawn, 0); ok {
					doc = next
					history = append(history, doc)
				}
				switch after := c.stands(r.id()); {
				case after == rootBelieved && before != rootBelieved:
					happened["follow an add"]++
				case after == rootLeaving && before == rootBelieved:
					happened["follow a leaving"]++
				}
			case "crash":
				c.round(doc, drawn, rapid.IntRange(1, 4).Draw(t, "after"))
				happened["crash"]++
			case "add":
				if c.decide(r, false) {
					decisions[r.id()]++
					happened["add"]++
				}
			case "leave":
				if c.decide(r, true) {
					decisions[r.id()]++
					happened["leave"]++
					everLeft[r.id()] = true
				}
			case "taint":
				// Each cluster lets it go as soon as it has another one.
				if c.stands(r.id()) != rootUnknown && !rapid.Bool().Draw(t, "spared") && c.taint(r) {
					decisions[r.id()] += uint64(len(clusters))
					happened["taint"]++
					everLeft[r.id()] = true
				}
			case "remove":
				c.remove(r.id())
			case "lost":
				doc = nil
			case "old":
				doc = rapid.SampledFrom(history).Draw(t, "old")
			}
			check()
		}
		// Left alone, all come to the same.
		never := func(string) bool { return false }
		for range 4 {
			for _, c := range clusters {
				doc, _ = c.round(doc, never, 0)
			}
		}
		check()
		stays := 0
		for _, x := range doc {
			if x.standing() == rootBelieved && !x.Tainted {
				stays++
			}
		}
		for _, c := range clusters {
			if !slices.EqualFunc(c.kept.roots(), doc, sharedRoot.equal) {
				t.Errorf("%s knows another document", c.folder.Cluster)
			}
			for _, x := range doc {
				s := c.stands(x.ID)
				// A cluster keeps a root rather than none, and none that is tainted where it has another.
				if x.Tainted {
					continue
				}
				if x.standing() != rootBelieved && s == rootBelieved && stays > 0 || x.standing() == rootBelieved && s != rootBelieved {
					t.Errorf("%s is %s in %s, and all have decided that it is %s", x.ID, s, c.folder.Cluster, x.standing())
				}
			}
			if len(c.set.bundle.Roots()) == 0 {
				t.Errorf("%s believes nothing", c.folder.Cluster)
			}
		}
		// A root that all have removed is not believed again, whatever old document turns up and whoever was away.
		for range rapid.IntRange(0, 10).Draw(t, "more") {
			c := rapid.SampledFrom(clusters).Draw(t, "cluster")
			before := map[string]standing{}
			for _, r := range roots {
				before[r.id()] = c.stands(r.id())
			}
			doc, _ = c.round(rapid.SampledFrom(append(history, doc)).Draw(t, "old"), drawn, 0)
			for _, r := range roots {
				if s := c.stands(r.id()); s == rootBelieved && before[r.id()] != rootBelieved {
					t.Errorf("%s was %s in %s, and is believed again", r.id(), before[r.id()], c.folder.Cluster)
				}
			}
		}
		// One that begins now, or has lost its memory, takes from old documents only what the others say of themselves.
		for _, c := range clusters {
			c.tell()
		}
		late := newModelCluster(t, "late", another)
		late.told = clusters[0].told
		for _, old := range append(history, doc) {
			late.round(old, never, 0)
			for _, r := range roots {
				believed, stays := late.listed(r.id())
				if s := late.stands(r.id()); s == rootLeaving && !believed || s == rootBelieved && !stays {
					t.Errorf("%s is %s in a cluster that begins, and no other says so: %v", r.id(), s, late.told)
				} else if s == rootUnknown {
					happened["pass over what is old"]++
				}
			}
			late.kept = nil
		}
	})
}

func TestAnOldDocumentAddsNoRootWhereNothingIsKnown(t *testing.T) {
	a, b := newRoot(t), newRoot(t)
	none, all := func(string) bool { return false }, func(string) bool { return true }
	var old [][]sharedRoot
	east := newModelCluster(t, "east", a)
	acquainted(east)
	doc, _ := east.round(nil, none, 0)
	for _, change := range []func(){func() { east.decide(b, false) }, func() { east.taint(b) }, func() { east.decide(b, true) }, func() { east.remove(b.id()) }} {
		change()
		doc, _ = east.round(doc, all, 0)
		old = append(old, doc)
	}
	if east.stands(b.id()) != rootRemoved {
		t.Fatal("east has not removed it")
	}
	begun := func(report rotation.Report) *modelCluster {
		west := newModelCluster(t, "west", a)
		west.told = map[string]rotation.Report{"east": report}
		return west
	}
	now := time.Now()
	says := func(at time.Time, roots ...rotation.RootReport) rotation.Report {
		return rotation.Report{Cluster: "east", At: at, Roots: append(roots, rotation.RootReport{ID: a.id()})}
	}
	believed, leaving := rotation.RootReport{ID: b.id()}, rotation.RootReport{ID: b.id(), Leaving: true}
	exposed := says(now, believed)
	exposed.Tainted = []rotation.TaintReport{{ID: "intermediate-7", Root: b.id(), Since: now, NotAfter: now.Add(time.Hour)}}
	tainted := slices.Clone(old[0])
	for i := range tainted {
		tainted[i].Tainted = tainted[i].ID == b.id()
	}
	policy := testRotation()
	for _, c := range []struct {
		what   string
		report rotation.Report
		doc    []sharedRoot
		want   standing
		why    string
	}{
		{"as it is now", east.told["east"], old[0], rootUnknown, "none believes it to stay"},
		{"tainted, as it is now", east.told["east"], tainted, rootUnknown, "none believes it to stay"},
		{"tainted and leaving, as it is now", east.told["east"], old[1], rootUnknown, ""},
		{"leaving, as it is now", east.told["east"], old[2], rootUnknown, ""},
		{"removed", east.told["east"], old[3], rootUnknown, ""},
		{"when it was believed", says(now, believed), old[0], rootBelieved, ""},
		{"when it was about to go", says(now, leaving), old[0], rootUnknown, "none believes it to stay"},
		{"and the document says so", says(now, leaving), old[2], rootLeaving, ""},
		{"when a key below it was lost", exposed, old[0], rootUnknown, "a key below it is tainted"},
		{"a report that holds no more", says(now.Add(-policy.ReportLife), believed), old[0], rootUnknown, "of another there is none that holds"},
		{"that was yet to come", says(now.Add(time.Hour), believed), old[0], rootUnknown, "there is none that holds"},
		{"no report", rotation.Report{}, old[0], rootUnknown, "there is none that holds"},
		{"no report, of one that leaves", rotation.Report{}, old[2], rootUnknown, "there is none that holds"},
	} {
		c.report.Cluster = "another"
		west := begun(c.report)
		for range 2 {
			west.round(c.doc, none, 0)
		}
		if got := west.stands(b.id()); got != c.want {
			t.Errorf("%s: it is %q in a cluster that begins, want %q", c.what, got, c.want)
		}
		var why []string
		_, refused := west.follow(west.set, west.world(), west.kept, now)
		for _, r := range refused {
			why = append(why, r.why.Error())
		}
		if got := strings.Join(why, "; "); c.why == "" && got != "" || !strings.Contains(got, c.why) {
			t.Errorf("%s: refused because %q, want %q", c.what, got, c.why)
		}
	}
	// Nor is one that leaves here, or was removed, believed again when the memory of the document is lost.
	for _, stands := range []standing{rootLeaving, rootRemoved} {
		west := begun(says(now, believed))
		west.round(old[0], none, 0)
		west.decide(b, true)
		if stands == rootRemoved {
			west.remove(b.id())
		}
		west.kept = nil
		west.told["east"] = says(now, leaving)
		later := slices.Clone(old[0])
		for i := range later {
			later[i].Decision += 5
		}
		west.round(later, none, 0)
		if got := west.stands(b.id()); got != stands {
			t.Errorf("it was %s, and is %q", stands, got)
		}
		west.told["east"] = says(now, believed)
		west.round(later, none, 0)
		if got := west.stands(b.id()); got != rootBelieved {
			t.Errorf("it was %s, all have taken it back, and it is %q", stands, got)
		}
	}
}

func TestNobodyHasTheLastWordByCountingAhead(t *testing.T) {
	a, b := newRoot(t), newRoot(t)
	own := replica{{sharedOf(a, rootBelieved, 3, "east"), rootBelieved}}
	for _, c := range []struct {
		roots []sharedRoot
		want  string
	}{
		{[]sharedRoot{sharedOf(a, rootLeaving, 3+maxJump, "west"), sharedOf(b, rootBelieved, maxJump, "west")}, ""},
		{[]sharedRoot{sharedOf(a, rootLeaving, 4+maxJump, "east")}, "cluster west has signed decision 1004 about " + a.id()},
		{[]sharedRoot{sharedOf(b, rootBelieved, maxJump+1, "west")}, "and 0 are known here"},
		{[]sharedRoot{sharedOf(b, rootRemoved, maxDecisions, "west")}, "look there"},
	} {
		if err := own.follows(sharedTrust{Cluster: "west", Roots: c.roots}); c.want == "" {
			must(t, err)
		} else {
			wantError(t, err, c.want)
		}
	}

	// Where the count has come to its end, the stronger decision prevails, and what is written can be read.
	now, none := time.Now(), func(string) bool { return false }
	end := []sharedRoot{sharedOf(b, rootBelieved, maxDecisions, "west")}
	step := func(r replica, here standing, doc []sharedRoot) replica {
		t.Helper()
		r = r.meet(doc, []localRoot{hereOf(b, here)}, "east", none, now)
		text, err := sharedTrust{TrustDomain: td.Name(), Cluster: "east", Roots: r.roots()}.encode()
		must(t, err)
		read, err := parseShared([]byte(strings.TrimPrefix(text, sharedTitle)), td, "east")
		must(t, err)
		if !slices.EqualFunc(read.Roots, r.roots(), sharedRoot.equal) {
			t.Errorf("read again: %+v", read.Roots)
		}
		return r.settle([]localRoot{hereOf(b, here)})
	}
	r := step(replica{}, rootBelieved, end)
	r = step(r, rootLeaving, end) // an admin removes it
	if got, _ := r.find(b.fingerprint()); got.standing() != rootLeaving || got.By != "east" || got.Decision != maxDecisions {
		t.Errorf("removed at the end of the count, it is %+v", got)
	}
	r = step(r, rootBelieved, end) // and adds it again: too late
	if got, _ := r.find(b.fingerprint()); got.standing() != rootLeaving {
		t.Errorf("added at the end of the count, it is %+v", got)
	}
}

func TestAClusterWithoutAMemoryRevivesNothing(t *testing.T) {
	a, b := newRoot(t), newRoot(t)
	east, west := newModelCluster(t, "east", a), newModelCluster(t, "west", a)
	acquainted(east, west)
	none := func(string) bool { return false }
	doc, _ := east.round(nil, none, 0)
	west.round(doc, none, 0)
	east.decide(b, false)
	east.decide(a, true)
	doc, _ = east.round(doc, none, 0)
	east.remove(a.id())
	doc, _ = east.round(doc, func(string) bool { return true }, 0)
	west.kept = nil
	doc, _ = west.round(doc, none, 0)
	east.round(doc, none, 0)
	if west.stands(a.id()) != rootLeaving || west.stands(b.id()) != rootBelieved || east.stands(a.id()) != rootRemoved {
		t.Errorf("west has %s, %s; east %s", west.stands(a.id()), west.stands(b.id()), east.stands(a.id()))
	}
}

func TestAWordThatFollowsAtOnceIsHeard(t *testing.T) {
	a, b := newRoot(t), newRoot(t)
	east, west := newModelCluster(t, "east", a), newModelCluster(t, "west", a)
	acquainted(east, west)
	none := func(string) bool { return false }
	doc, _ := east.round(nil, none, 0)
	doc, _ = west.round(doc, none, 0)
	east.decide(b, false)
	east.decide(a, true)
	doc, _ = east.round(doc, none, 0)
	doc, _ = west.round(doc, none, 0)
	if west.stands(a.id()) != rootLeaving {
		t.Fatal("west does not follow")
	}
	west.decide(a, false) // before it has looked again
	doc, _ = west.round(doc, none, 0)
	east.round(doc, none, 0)
	if west.stands(a.id()) != rootBelieved || east.stands(a.id()) != rootBelieved {
		t.Errorf("taken back in west, it is %s there and %s in east", west.stands(a.id()), east.stands(a.id()))
	}
}

func TestWhatFollowsFromATaintElsewhereIsTold(t *testing.T) {
	a, b := newRoot(t), newRoot(t)
	east, west := newModelCluster(t, "east", a), newModelCluster(t, "west", a)
	acquainted(east, west)
	none := func(string) bool { return false }
	doc, _ := east.round(nil, none, 0)
	doc, _ = west.round(doc, none, 0)
	east.taint(a) // its only root, so it stays
	west.decide(b, false)
	doc, _ = east.round(doc, none, 0)
	for range 2 {
		doc, _ = west.round(doc, none, 0) // has another one, so this one leaves
	}
	east.round(doc, none, 0)
	if west.stands(a.id()) != rootLeaving || east.stands(a.id()) != rootLeaving || east.stands(b.id()) != rootBelieved {
		t.Errorf("the tainted root is %s in west and %s in east", west.stands(a.id()), east.stands(a.id()))
	}
}

func TestNoMoreRootsAreTakenThanABundleHolds(t *testing.T) {
	east := newModelCluster(t, "east", newRoot(t))
	var doc []sharedRoot
	west := rotation.Report{Cluster: "west", At: time.Now()}
	for i := range trust.MaxRoots + 5 {
		doc = append(doc, sharedOf(newRoot(t), []standing{rootBelieved, rootLeaving}[i%2], 1, "west"))
		west.Roots = append(west.Roots, rotation.RootReport{ID: doc[i].ID, Leaving: i%2 == 1})
	}
	east.told = map[string]rotation.Report{"west": west}
	doc = joinAll(doc)
	all, _ := east.round(doc, func(string) bool { return false }, 0)
	if n := len(east.set.bundle.Roots()); n != trust.MaxRoots {
		t.Errorf("%d roots are believed", n)
	}
	if len(all) != len(doc)+1 {
		t.Errorf("of %d roots %d are told", len(doc)+1, len(all))
	}
}

func TestTheDocumentIsTakenOnlyAsAClusterWritesIt(t *testing.T) {
	a, b := newRoot(t), newRoot(t)
	good := sharedTrust{TrustDomain: td.Name(), Cluster: "west", Roots: joinAll([]sharedRoot{sharedOf(a, rootBelieved, 1, "west"), sharedOf(b, rootRemoved, 2, "east")})}
	parse := func(s sharedTrust) (sharedTrust, error) {
		text, err := s.encode()
		must(t, err)
		return parseShared([]byte(strings.TrimPrefix(text, sharedTitle)), td, "west")
	}
	read, err := parse(good)
	must(t, err)
	if !slices.EqualFunc(read.Roots, good.Roots, sharedRoot.equal) {
		t.Errorf("read: %+v", read.Roots)
	}
	at := func(id string) func(s *sharedTrust) *sharedRoot {
		return func(s *sharedTrust) *sharedRoot {
			return &s.Roots[slices.IndexFunc(s.Roots, func(r sharedRoot) bool { return r.ID == id })]
		}
	}
	rootA, rootB := at(a.id()), at(b.id())
	for what, change := range map[string]func(*sharedTrust){
		"another trust domain":       func(s *sharedTrust) { s.TrustDomain = "other.org" },
		"another cluster":            func(s *sharedTrust) { s.Cluster = "south" },
		"a certificate of another":   func(s *sharedTrust) { rootA(s).Certificate = string(ca.EncodeChain(b.cert)) },
		"two certificates":           func(s *sharedTrust) { rootA(s).Certificate += string(ca.EncodeChain(b.cert)) },
		"no certificate":             func(s *sharedTrust) { rootA(s).Certificate = "" },
		"a long certificate":         func(s *sharedTrust) { rootA(s).Certificate = strings.Repeat("x", maxSharedCertificate+1) },
		"a certificate of a removed": func(s *sharedTrust) { rootB(s).Certificate = string(ca.EncodeChain(b.cert)) },
		"another id":                 func(s *sharedTrust) { rootA(s).ID = b.id() },
		"no fingerprint":             func(s *sharedTrust) { rootA(s).Fingerprint = "" },
		"a state that is not shared": func(s *sharedTrust) { rootA(s).State = ca.Retired },
		"no decision":                func(s *sharedTrust) { rootA(s).Decision = 0 },
		"too many decisions":         func(s *sharedTrust) { rootA(s).Decision = maxDecisions + 1 },
		"nobody's decision":          func(s *sharedTrust) { rootA(s).By = "not a name" },
		"no end":                     func(s *sharedTrust) { rootA(s).NotAfter = time.Time{} },
		"a root twice":               func(s *sharedTrust) { s.Roots = append(s.Roots, s.Roots[0]) },
	} {
		bad := good
		bad.Roots = slices.Clone(good.Roots)
		change(&bad)
		if _, err := parse(bad); err == nil {
			t.Errorf("%s: taken", what)
		} else if len(err.Error()) > 900 {
			t.Errorf("%s: %d bytes of error", what, len(err.Error()))
		}
	}
	if _, err := (sharedTrust{Roots: make([]sharedRoot, maxSharedRoots+1)}).encode(); err == nil {
		t.Error("more roots than are read were written")
	}
	if _, err := (sharedTrust{Roots: []sharedRoot{{Certificate: strings.Repeat("x", maxShared)}}}).encode(); err == nil {
		t.Error("more bytes than are read were written")
	}
}

func FuzzSharedTrust(f *testing.F) {
	text, err := json.Marshal(sharedTrust{TrustDomain: td.Name(), Cluster: "west", Roots: []sharedRoot{{
		ID: "root-0000000000000000", State: ca.Removed, Leaving: true, NotAfter: time.Unix(4e9, 0), Fingerprint: "SHA256:" + strings.Repeat("0", 64), Decision: 1, By: "west",
	}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"roots":[{"certificate":"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		s, err := parseShared(body, td, "west")
		if err != nil {
			return
		}
		// What was taken can be written, and is the same when it is read again.
		again, err := s.encode()
		if err != nil {
			t.Skip() // larger in our form
		}
		x, err := parseShared(bytes.TrimPrefix([]byte(again), []byte(sharedTitle)), td, "west")
		if err != nil || !slices.EqualFunc(x.Roots, s.Roots, sharedRoot.equal) {
			t.Errorf("%v: %+v\n%+v", err, s.Roots, x.Roots)
		}
		for _, r := range s.Roots {
			if der, err := r.der(); err == nil && der != nil {
				_, _ = x509.ParseCertificate(der)
			}
		}
	})
}
