package rotation

import (
	"cmp"
	"slices"
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
	all = slices.DeleteFunc(all, func(x Rival) bool { return leaving[x.Root] })
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
