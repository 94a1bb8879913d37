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
	// Assumed is what the plan takes for granted beside the steps before it: what others have to do for this one.
	Assumed []Wait
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

// Plan says which steps would come, in order and at most so many: first those that can be taken as things are, then those
// that would come if acknowledgements, reports and signatures came at once and only time had to pass. Successors, which have
// no ID yet, are called successor-1 and so on; they live as long as the issuer before them, if that is long enough for a leaf, or as
// their root.
func Plan(p Policy, w World, now time.Time, most int) []Planned {
	said := w
	w = w.willing(p, now)
	signed := map[string]string{} // by whom, as the plan assumes
	given := len(w.Authorities)
	var plan []Planned
	for made, known := 0, true; len(plan) < most; {
		ask := said.standing(w.Authorities)
		if !known {
			ask = w.agreed(p, now)
			for i, a := range ask.Authorities {
				if a.Root != w.Authorities[i].Root {
					signed[a.ID] = a.Root
				}
			}
			w = ask
		}
		steps := Next(p, ask, now)
		// Where one that was made goes unused, as under a root at its end, another would too.
		unused := slices.ContainsFunc(w.Authorities[given:], func(a Authority) bool { return a.State == ca.Removed && a.LeavesUntil.IsZero() })
		i := slices.IndexFunc(steps, func(s Step) bool { return s.Ready(false) && (s.From != "" || !unused) })
		if i < 0 && known {
			known = false
			continue
		}
		if i < 0 {
			if now = earliest(steps, now); now.IsZero() {
				return plan
			}
			continue
		}
		s := steps[i]
		var assumed []Wait
		if s.From == "" {
			made++
			s.Authority = fmt.Sprintf("successor-%d", made)
			w.Authorities = append(slices.Clone(w.Authorities), Authority{ID: s.Authority, Kind: s.Kind, State: s.To, Since: now})
		} else {
			if !known {
				assumed = said.standing(w.Authorities).lacks(p, s, signed[s.Authority], now)
			}
			w.Authorities = Apply(p, w.Authorities, s, now)
		}
		plan = append(plan, Planned{At: now, Step: s, Assumed: assumed})
	}
	return plan
}

// earliest is when time next ends a wait; zero if none ends by it.
func earliest(steps []Step, now time.Time) (first time.Time) {
	for _, s := range steps {
		for _, w := range s.Waits {
			if w.Until.After(now) && (first.IsZero() || w.Until.Before(first)) {
				first = w.Until
			}
		}
	}
	return first
}

// standing is what is known now, had the CAs come to stand like this: no agent has acknowledged a root that it does not know yet.
func (w World) standing(all []Authority) World {
	validators := 0
	for _, r := range w.Own.Roots {
		validators = max(validators, r.Validators)
	}
	w.Authorities, w.Own.Roots = all, slices.Clone(w.Own.Roots)
	for _, r := range all {
		if _, ok := w.Own.root(r.ID); !ok && r.InBundle() {
			w.Own.Roots = append(w.Own.Roots, RootReport{ID: r.ID, Validators: validators})
		}
	}
	return w
}

// lacks says what others would have to do for a step, by what they have said. by is the root that is assumed to have signed
// the CA's request.
func (w World) lacks(p Policy, s Step, by string, now time.Time) []Wait {
	a, _ := w.authority(s.Authority)
	root, theirs := a.ID, "that nothing there depends on it any more"
	if a.Kind == ca.KindIntermediate {
		root = a.Root
	}
	if s.To == ca.Active {
		theirs = "that its agents have " + root
	}
	// Whoever is asked alone, with what he has said, and lets it wait, has something to do.
	waits := func(own Report, peers ...Report) bool {
		d := decision{Policy: p, World: World{Authorities: w.Authorities, Own: own, Peers: peers}, now: now}
		step, ok := d.root(a)
		if a.Kind == ca.KindIntermediate {
			step, ok = d.intermediate(a)
		}
		return !ok || !step.Ready(false)
	}
	var all []Wait
	if by != "" && s.To == ca.Published {
		all = append(all, Wait{Code: WaitSignature, For: "its request is signed under " + by})
	}
	if waits(w.Own) {
		all = append(all, Wait{Code: WaitQuorum, For: "the agents of this cluster acknowledge " + root})
	}
	agreed := w.agreed(p, now).Own
	for _, peer := range w.Peers {
		if waits(agreed, peer) {
			all = append(all, Wait{Code: WaitPeer, For: "cluster " + peer.Cluster + " reports " + theirs})
		}
	}
	return all
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
		w.Peers[i].At, w.Peers[i].Until = now, now.Add(p.ReportLife)
	}
	w.Own = Report{Cluster: w.Own.Cluster, At: now, Until: now.Add(p.ReportLife), Roots: ReportRoots(p, w.Authorities, now)}
	for i := range w.Own.Roots {
		w.Own.Roots[i].Holding = 1
	}
	root, life := w.signer(p, now)
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
func (w World) signer(p Policy, now time.Time) (root Authority, life time.Duration) {
	for _, a := range w.Authorities {
		if a.Kind == ca.KindRoot && a.State != ca.Removed && a.Leaving.IsZero() && w.exposed(a.ID, now).IsZero() && a.NotAfter.After(root.NotAfter) {
			root = a
		}
	}
	life = root.NotAfter.Sub(now)
	if active, ok := w.active(); ok && active.NotAfter.Sub(active.NotBefore) > p.LongestLeaf {
		life = active.NotAfter.Sub(active.NotBefore)
	}
	return root, life
}
