package server

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/server/shared"
	"github.com/signet-ca/signet/trust"
)

// sharedOf is a root as the document has it.
func sharedOf(r *root, stands shared.Standing, decision uint64, by string) shared.Root {
	x := shared.Root{
		ID: r.id(), State: ca.Published, Leaving: stands != shared.Believed, NotAfter: r.cert.NotAfter.UTC(), Fingerprint: r.fingerprint(),
		Certificate: string(ca.EncodeChain(r.cert)), Decision: decision, By: by,
	}
	if stands == shared.Removed {
		x.State, x.Certificate = ca.Removed, ""
	}
	return x
}

// modelCluster follows the document as a server does, without one.
type modelCluster struct {
	*keeper
	set *authorities
	own shared.Replica
	// kept is the copy of own that outlives a crash.
	kept shared.Replica
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
		Cluster: c.folder.Cluster, At: now, Until: now.Add(c.policy.ReportLife), Roots: rotation.ReportRoots(c.policy.Policy, lives, now), Tainted: rotation.ReportTaints(c.policy.Policy, lives, c.heard(), now),
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
func (c *modelCluster) round(doc []shared.Root, gone func(string) bool, crash int) (_ []shared.Root, whole bool) {
	now := time.Now()
	c.tell()
	c.own = c.kept
	next := c.own.Meet(doc, c.set.shares(now), c.folder.Cluster, gone, now)
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
	c.kept = next.Settle(c.set.shares(now))
	return c.kept.Roots(), crash != 4
}

func (c *modelCluster) stands(id string) shared.Standing {
	for _, l := range c.set.shares(time.Now()) {
		if l.ID == id {
			return l.Stands
		}
	}
	return shared.Unknown
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
	return c.stands(r.id()).Decided() != before.Decided()
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
	t.Parallel()
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
		var doc []shared.Root
		history := [][]shared.Root{nil}
		decisions := map[string]uint64{roots[0].id(): 1}
		everLeft := map[string]bool{}
		drawn := func(string) bool { return rapid.Bool().Draw(t, "gone") }
		check := func() {
			for _, list := range append([][]shared.Root{doc}, clusters[0].kept.Roots(), clusters[1].kept.Roots(), clusters[2].kept.Roots()) {
				for _, r := range list {
					if r.Decision > decisions[r.ID] {
						t.Fatalf("%s has decision %d, and admins have taken %d", r.ID, r.Decision, decisions[r.ID])
					}
				}
			}
			for _, c := range clusters {
				for _, r := range roots {
					if s := c.stands(r.id()); (s == shared.Leaving || s == shared.Removed) && !everLeft[r.id()] {
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
				case after == shared.Believed && before != shared.Believed:
					happened["follow an add"]++
				case after == shared.Leaving && before == shared.Believed:
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
				if c.stands(r.id()) != shared.Unknown && !rapid.Bool().Draw(t, "spared") && c.taint(r) {
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
			if x.Standing() == shared.Believed && !x.Tainted {
				stays++
			}
		}
		for _, c := range clusters {
			if !slices.EqualFunc(c.kept.Roots(), doc, shared.Root.Equal) {
				t.Errorf("%s knows another document", c.folder.Cluster)
			}
			for _, x := range doc {
				s := c.stands(x.ID)
				// A cluster keeps a root rather than none, and none that is tainted where it has another.
				if x.Tainted {
					continue
				}
				if x.Standing() != shared.Believed && s == shared.Believed && stays > 0 || x.Standing() == shared.Believed && s != shared.Believed {
					t.Errorf("%s is %s in %s, and all have decided that it is %s", x.ID, s, c.folder.Cluster, x.Standing())
				}
			}
			if len(c.set.bundle.Roots()) == 0 {
				t.Errorf("%s believes nothing", c.folder.Cluster)
			}
		}
		// A root that all have removed is not believed again, whatever old document turns up and whoever was away.
		for range rapid.IntRange(0, 10).Draw(t, "more") {
			c := rapid.SampledFrom(clusters).Draw(t, "cluster")
			before := map[string]shared.Standing{}
			for _, r := range roots {
				before[r.id()] = c.stands(r.id())
			}
			doc, _ = c.round(rapid.SampledFrom(append(history, doc)).Draw(t, "old"), drawn, 0)
			for _, r := range roots {
				if s := c.stands(r.id()); s == shared.Believed && before[r.id()] != shared.Believed {
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
				if s := late.stands(r.id()); s == shared.Leaving && !believed || s == shared.Believed && !stays {
					t.Errorf("%s is %s in a cluster that begins, and no other says so: %v", r.id(), s, late.told)
				} else if s == shared.Unknown {
					happened["pass over what is old"]++
				}
			}
			late.kept = nil
		}
	})
}

func TestAnOldDocumentAddsNoRootWhereNothingIsKnown(t *testing.T) {
	t.Parallel()
	a, b := newRoot(t), newRoot(t)
	none, all := func(string) bool { return false }, func(string) bool { return true }
	var old [][]shared.Root
	east := newModelCluster(t, "east", a)
	acquainted(east)
	doc, _ := east.round(nil, none, 0)
	for _, change := range []func(){func() { east.decide(b, false) }, func() { east.taint(b) }, func() { east.decide(b, true) }, func() { east.remove(b.id()) }} {
		change()
		doc, _ = east.round(doc, all, 0)
		old = append(old, doc)
	}
	if east.stands(b.id()) != shared.Removed {
		t.Fatal("east has not removed it")
	}
	begun := func(report rotation.Report) *modelCluster {
		west := newModelCluster(t, "west", a)
		west.told = map[string]rotation.Report{"east": report}
		return west
	}
	now := time.Now()
	says := func(at time.Time, roots ...rotation.RootReport) rotation.Report {
		return rotation.Report{Cluster: "east", At: at, Until: at.Add(time.Hour), Roots: append(roots, rotation.RootReport{ID: a.id()})}
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
		doc    []shared.Root
		want   shared.Standing
		why    string
	}{
		{"as it is now", east.told["east"], old[0], shared.Unknown, "none believes it to stay"},
		{"tainted, as it is now", east.told["east"], tainted, shared.Unknown, "none believes it to stay"},
		{"tainted and leaving, as it is now", east.told["east"], old[1], shared.Unknown, ""},
		{"leaving, as it is now", east.told["east"], old[2], shared.Unknown, ""},
		{"removed", east.told["east"], old[3], shared.Unknown, ""},
		{"when it was believed", says(now, believed), old[0], shared.Believed, ""},
		{"when it was about to go", says(now, leaving), old[0], shared.Unknown, "none believes it to stay"},
		{"and the document says so", says(now, leaving), old[2], shared.Leaving, ""},
		{"when a key below it was lost", exposed, old[0], shared.Unknown, "a key below it is tainted"},
		{"a report that holds no more", says(now.Add(-policy.ReportLife), believed), old[0], shared.Unknown, "of another there is none that holds"},
		{"that was yet to come", says(now.Add(time.Hour), believed), old[0], shared.Unknown, "there is none that holds"},
		{"no report", rotation.Report{}, old[0], shared.Unknown, "there is none that holds"},
		{"no report, of one that leaves", rotation.Report{}, old[2], shared.Unknown, "there is none that holds"},
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
	for _, stands := range []shared.Standing{shared.Leaving, shared.Removed} {
		west := begun(says(now, believed))
		west.round(old[0], none, 0)
		west.decide(b, true)
		if stands == shared.Removed {
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
		if got := west.stands(b.id()); got != shared.Believed {
			t.Errorf("it was %s, all have taken it back, and it is %q", stands, got)
		}
	}
}

func TestAClusterWithoutAMemoryRevivesNothing(t *testing.T) {
	t.Parallel()
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
	if west.stands(a.id()) != shared.Leaving || west.stands(b.id()) != shared.Believed || east.stands(a.id()) != shared.Removed {
		t.Errorf("west has %s, %s; east %s", west.stands(a.id()), west.stands(b.id()), east.stands(a.id()))
	}
}

func TestAWordThatFollowsAtOnceIsHeard(t *testing.T) {
	t.Parallel()
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
	if west.stands(a.id()) != shared.Leaving {
		t.Fatal("west does not follow")
	}
	west.decide(a, false) // before it has looked again
	doc, _ = west.round(doc, none, 0)
	east.round(doc, none, 0)
	if west.stands(a.id()) != shared.Believed || east.stands(a.id()) != shared.Believed {
		t.Errorf("taken back in west, it is %s there and %s in east", west.stands(a.id()), east.stands(a.id()))
	}
}

func TestWhatFollowsFromATaintElsewhereIsTold(t *testing.T) {
	t.Parallel()
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
	if west.stands(a.id()) != shared.Leaving || east.stands(a.id()) != shared.Leaving || east.stands(b.id()) != shared.Believed {
		t.Errorf("the tainted root is %s in west and %s in east", west.stands(a.id()), east.stands(a.id()))
	}
}

func TestNoMoreRootsAreTakenThanABundleHolds(t *testing.T) {
	t.Parallel()
	east := newModelCluster(t, "east", newRoot(t))
	var doc []shared.Root
	west := rotation.Report{Cluster: "west", At: time.Now(), Until: time.Now().Add(time.Hour)}
	for i := range trust.MaxRoots + 5 {
		doc = append(doc, sharedOf(newRoot(t), []shared.Standing{shared.Believed, shared.Leaving}[i%2], 1, "west"))
		west.Roots = append(west.Roots, rotation.RootReport{ID: doc[i].ID, Leaving: i%2 == 1})
	}
	east.told = map[string]rotation.Report{"west": west}
	doc = shared.Join(doc)
	all, _ := east.round(doc, func(string) bool { return false }, 0)
	if n := len(east.set.bundle.Roots()); n != trust.MaxRoots {
		t.Errorf("%d roots are believed", n)
	}
	if len(all) != len(doc)+1 {
		t.Errorf("of %d roots %d are told", len(doc)+1, len(all))
	}
}
