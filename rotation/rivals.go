package rotation

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Rival is a root under which clusters sign while others sign under another one.
type Rival struct {
	Root     string
	Clusters []string
}

// Rivals are roots that are signed under and leave in no cluster, so that they stay side by side for good, as after two
// rotations that were begun at once; nil for fewer than two. The first is the one to go on with: all clusters that know the same
// choose the same, which ends last.
func Rivals(p Policy, w World, now time.Time) []Rival {
	d := decision{Policy: p, World: w, now: now}
	var all []Rival
	signs := func(root, cluster string) {
		if r, _ := d.authority(root); !r.InBundle() || !r.Leaving.IsZero() || !d.exposed(root, now).IsZero() {
			return
		}
		i := slices.IndexFunc(all, func(x Rival) bool { return x.Root == root })
		if i < 0 {
			i, all = len(all), append(all, Rival{Root: root})
		}
		all[i].Clusters = append(all[i].Clusters, cluster)
	}
	if a, ok := d.active(); ok {
		signs(a.Root, w.Own.Cluster)
	}
	// One that is not believed everywhere is Parting's business.
	leaving := map[string]bool{}
	for _, r := range w.Peers {
		if !d.Holds(r, now) {
			continue
		}
		for _, x := range r.Roots {
			if leaving[x.ID] = leaving[x.ID] || x.Leaving; x.Signing {
				signs(x.ID, r.Cluster)
			}
		}
	}
	all = slices.DeleteFunc(all, func(x Rival) bool {
		return leaving[x.Root] || slices.ContainsFunc(w.Peers, func(r Report) bool { return d.Holds(r, now) && r.refuses(x.Root) })
	})
	if len(all) < 2 {
		return nil
	}
	slices.SortFunc(all, func(x, y Rival) int {
		a, _ := d.authority(x.Root)
		b, _ := d.authority(y.Root)
		return cmp.Or(b.NotAfter.Compare(a.NotAfter), cmp.Compare(a.ID, b.ID))
	})
	return all
}

// Parted is how the others have gone on to another root without this cluster.
type Parted struct {
	// Root is what this cluster signs under; "" = nothing.
	Root string
	// Refusing are the clusters that don't believe it, Leaving those that are about to stop although it stays here.
	Refusing, Leaving []string
	// Unknown are the roots under which others sign and that are not believed here.
	Unknown []Rival
	// Next is the root to go on with; "" = none is known.
	Next string
	// Back: an abort here has turned Next back.
	Back bool
}

// Parting says how this cluster stands apart from others, by their reports that hold: a server that was away while its root was
// replaced, or where nobody has begun with that. It is false where all believe whom they meet, and will.
func Parting(p Policy, w World, now time.Time) (x Parted, apart bool) {
	signing, _ := w.current()
	own, _ := w.authority(signing.Root)
	x.Root = signing.Root
	leaving, signs := map[string]bool{}, map[string]bool{}
	var known []string
	for _, r := range w.Peers {
		if !p.Holds(r, now) || len(r.Roots) == 0 {
			continue
		}
		for _, root := range r.Roots {
			leaving[root.ID] = leaving[root.ID] || root.Leaving
			signs[root.ID] = signs[root.ID] || root.Signing
			known = append(known, root.ID)
			if here, _ := w.authority(root.ID); !root.Signing || here.InBundle() {
				continue
			}
			i := slices.IndexFunc(x.Unknown, func(u Rival) bool { return u.Root == root.ID })
			if i < 0 {
				i, x.Unknown = len(x.Unknown), append(x.Unknown, Rival{Root: root.ID})
			}
			x.Unknown[i].Clusters = append(x.Unknown[i].Clusters, r.Cluster)
		}
		theirs, _ := r.root(x.Root)
		switch {
		case x.Root == "":
		case r.refuses(x.Root):
			x.Refusing = append(x.Refusing, r.Cluster)
		case theirs.Leaving && own.Leaving.IsZero():
			x.Leaving = append(x.Leaving, r.Cluster)
		}
	}
	for _, id := range known {
		if id != x.Root && !leaving[id] && w.exposed(id, now).IsZero() && (x.Next == "" || signs[id] && !signs[x.Next]) {
			x.Next = id
		}
	}
	next, _ := w.authority(x.Next)
	x.Back = !next.Leaving.IsZero() && !next.Aborted.IsZero()
	return x, len(x.Refusing)+len(x.Leaving)+len(x.Unknown) > 0
}

// refuses reports whether nobody in a cluster believes a root. One that was removed is told of as long as leaves under it may live.
func (r Report) refuses(root string) bool {
	x, known := r.root(root)
	return len(r.Roots) > 0 && (!known || x.Leaving && x.Validators > 0 && x.Trusting == 0)
}

// why is what the others do, in words.
func (x Parted) why() string {
	var all []string
	if len(x.Refusing) > 0 {
		all = append(all, "what is signed under it is refused in cluster "+strings.Join(x.Refusing, ", "))
	}
	if len(x.Leaving) > 0 {
		all = append(all, "it is being replaced in cluster "+strings.Join(x.Leaving, ", "))
	}
	for _, u := range x.Unknown {
		all = append(all, fmt.Sprintf("%s, under which cluster %s signs, is not believed here", u.Root, strings.Join(u.Clusters, ", ")))
	}
	return strings.Join(all, "; ")
}
