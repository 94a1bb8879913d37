package rotation

import (
	"fmt"
	"slices"
	"time"

	"github.com/signet-ca/signet/ca"
)

// Planned is a step with the time at which it would be taken.
type Planned struct {
	At time.Time
	Step
}

// At says when a step can be taken: now, or when the last of its waits ends. Zero if something doesn't end by the clock.
func At(s Step, now time.Time) time.Time {
	at := now
	for _, w := range s.Waits {
		if w.Until.IsZero() {
			return time.Time{}
		}
		at = later(at, w.Until)
	}
	return at
}

// Plan says which steps would come, in order and at most so many, if acknowledgements, reports and signatures came at once
// and only time had to pass. Successors, which have no ID yet, are called successor-1 and so on; they live as long as the
// issuer before them, or as their root.
func Plan(p Policy, w World, now time.Time, most int) []Planned {
	w = w.willing(p, now)
	var plan []Planned
	for made := 0; len(plan) < most; {
		w = w.agreed(p, now)
		steps := Next(p, w, now)
		i := slices.IndexFunc(steps, func(s Step) bool { return s.Ready(false) })
		if i < 0 {
			next := earliest(steps, now)
			if next.IsZero() {
				break
			}
			now = next
			continue
		}
		s := steps[i]
		if s.From == "" {
			made++
			s.Authority = fmt.Sprintf("successor-%d", made)
			w.Authorities = append(w.Authorities, Authority{ID: s.Authority, Kind: s.Kind, State: s.To, Since: now})
		} else {
			w.Authorities = Apply(p, w.Authorities, s, now)
		}
		plan = append(plan, Planned{At: now, Step: s})
	}
	return plan
}

// earliest is when the first of the steps can be taken that wait for nothing but time; zero if there is none.
func earliest(steps []Step, now time.Time) (first time.Time) {
	for _, s := range steps {
		if at := At(s, now); at.After(now) && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// willing is the world with peers that sign under what stays from now on.
func (w World) willing(p Policy, now time.Time) World {
	peers := make([]Report, len(w.Peers))
	for i, old := range w.Peers {
		peers[i] = Report{Cluster: old.Cluster, Tainted: old.Tainted}
		for _, r := range w.Authorities {
			x, _ := old.root(r.ID)
			if x.Signing || old.At.IsZero() {
				x.LeavesUntil = later(x.LeavesUntil, earlier(now.Add(p.LongestLeaf), r.NotAfter))
			}
			peers[i].Roots = append(peers[i].Roots, RootReport{ID: r.ID, LeavesUntil: x.LeavesUntil, Holding: 1})
		}
	}
	w.Peers = peers
	return w
}

// agreed is the world in which all that others have to do has been done by now.
func (w World) agreed(p Policy, now time.Time) World {
	w.Authorities, w.Peers = slices.Clone(w.Authorities), slices.Clone(w.Peers)
	for i := range w.Peers {
		w.Peers[i].At = now
	}
	w.Own = Report{Cluster: w.Own.Cluster, At: now, Roots: ReportRoots(p, w.Authorities, now)}
	for i := range w.Own.Roots {
		w.Own.Roots[i].Holding = 1
	}
	root, life := w.signer(now)
	for i, a := range w.Authorities {
		if !waiting(a) || a.signed() || root.ID == "" {
			continue
		}
		if all, err := Signed(p, w, a.ID, root.ID, now, earlier(now.Add(life), root.NotAfter), now); err == nil {
			w.Authorities[i] = all[i]
		}
	}
	return w
}

// signer guesses under which root a request will be signed, the one that ends last of those that stay, and for how long.
func (w World) signer(now time.Time) (root Authority, life time.Duration) {
	for _, a := range w.Authorities {
		if a.Kind == ca.KindRoot && a.State != ca.Removed && a.Leaving.IsZero() && w.exposed(a.ID, now).IsZero() && a.NotAfter.After(root.NotAfter) {
			root = a
		}
	}
	if active, ok := w.active(); ok {
		return root, active.NotAfter.Sub(active.NotBefore)
	}
	return root, root.NotAfter.Sub(now)
}
