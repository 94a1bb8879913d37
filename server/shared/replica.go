package shared

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/signet-ca/signet/ca"
)

// MaxJump is by how many decisions a document may be ahead of what is known here, more than admins ever take about one root:
// nobody can bring the count to its end.
const MaxJump = 1000

// stateStrength orders states as a root comes to them in the document; -1 for one that is not in it.
func stateStrength(s ca.State) int {
	return slices.Index([]ca.State{ca.Published, ca.Active, ca.Removed}, s)
}

// join is what two documents say together of one root. It is commutative, associative and idempotent. A taint is for ever.
func (r Root) join(x Root) Root {
	tainted, notAfter := r.Tainted || x.Tainted, r.NotAfter
	if x.NotAfter.After(notAfter) {
		notAfter = x.NotAfter
	}
	if c := cmp.Or(cmp.Compare(x.Decision, r.Decision), cmp.Compare(x.Standing().strength(), r.Standing().strength()), cmp.Compare(x.By, r.By)); c > 0 {
		r, x = x, r
	}
	if r.Decision == x.Decision && stateStrength(x.State) > stateStrength(r.State) {
		r.State = x.State
	}
	r.Tainted, r.NotAfter = tainted, notAfter
	return r
}

// Join puts lists together, in the order of fingerprints: of each root the decision that holds, its taint if anybody knows of
// one, and the later end. The order of the lists, how they are grouped and how often one is given change nothing.
func Join(lists ...[]Root) []Root {
	var all []Root
	for _, list := range lists {
		for _, r := range list {
			i, ok := slices.BinarySearchFunc(all, r.Fingerprint, func(a Root, f string) int { return cmp.Compare(a.Fingerprint, f) })
			if ok {
				all[i] = all[i].join(r)
			} else {
				all = slices.Insert(all, i, r)
			}
		}
	}
	return all
}

// Living leaves out what has expired, and of more removed ones than MaxRemoved those that expire first: without an end the
// document would grow for ever, and what has expired nobody can bring back.
func Living(all []Root, now time.Time) []Root {
	all = slices.DeleteFunc(slices.Clone(all), func(r Root) bool { return now.After(r.NotAfter) })
	var gone []Root
	for _, r := range all {
		if r.State == ca.Removed {
			gone = append(gone, r)
		}
	}
	if len(gone) <= MaxRemoved {
		return all
	}
	slices.SortFunc(gone, func(a, b Root) int {
		return cmp.Or(b.NotAfter.Compare(a.NotAfter), cmp.Compare(a.Fingerprint, b.Fingerprint))
	})
	forgotten := map[string]bool{}
	for _, r := range gone[MaxRemoved:] {
		forgotten[r.Fingerprint] = true
	}
	return slices.DeleteFunc(all, func(r Root) bool { return forgotten[r.Fingerprint] })
}

// Replica is what a cluster knows of the document, in the order of fingerprints. It is stored as its JSON.
type Replica []Known

// Known is a root in a replica.
type Known struct {
	Root
	// Here is how it stood in this cluster at the last look.
	Here Standing `json:"here,omitempty"`
}

// Roots are what the document is to say.
func (r Replica) Roots() []Root {
	var all []Root
	for _, x := range r {
		all = append(all, x.Root)
	}
	return all
}

// Equal reports whether nothing is known in one of two replicas that is not in the other.
func (r Replica) Equal(x Replica) bool {
	return slices.EqualFunc(r, x, func(a, b Known) bool { return a.Here == b.Here && a.Root.Equal(b.Root) })
}

// Find returns the root of this fingerprint; false for one that is not known.
func (r Replica) Find(fingerprint string) (Known, bool) {
	i, ok := slices.BinarySearchFunc(r, fingerprint, func(a Known, f string) int { return cmp.Compare(a.Fingerprint, f) })
	if !ok {
		return Known{}, false
	}
	return r[i], true
}

// Admits reports whether a document can be what comes after what is known: who counts ahead, by more than MaxJump, would have
// the last word for ever, since what was taken is kept.
func (r Replica) Admits(theirs Trust) error {
	for _, x := range theirs.Roots {
		known, _ := r.Find(x.Fingerprint)
		if x.Decision > known.Decision+MaxJump {
			return fmt.Errorf("cluster %s has signed decision %d about %s, and %d are known here: at most %d more are believed at once; somebody may have the key of its log: look there, then delete the document; the clusters write it again", theirs.Cluster, x.Decision, x.ID, known.Decision, MaxJump)
		}
	}
	return nil
}

// Local is a root as it stands in this cluster. Its Root says what there is to tell of it, but for the decision: State is the
// one it has here, and Leaving, Decision and By are not read.
type Local struct {
	Root
	Stands Standing
}

// Meet puts together what this cluster knows, what the document says, and what was decided here since the last look; what comes
// of it is to be kept, then followed, and written if the document lacks some of it. It was decided here about a root that
// stands otherwise than at the last look, and otherwise than is known, unless another decision about it has come meanwhile
// that is at least as strong; that one which was leaving is removed now was not decided, but came by itself. Of what was not known
// here, how it stands is the first decision. gone reports whether all clusters are known to have removed a root; cluster is this one.
func (r Replica) Meet(theirs []Root, here []Local, cluster string, gone func(id string) bool, now time.Time) Replica {
	all := Join(r.Roots(), theirs)
	stands := map[string]Standing{}
	for _, l := range here {
		stands[l.Fingerprint] = l.Stands
		i, known := slices.BinarySearchFunc(all, l.Fingerprint, func(a Root, f string) int { return cmp.Compare(a.Fingerprint, f) })
		before, seen := r.Find(l.Fingerprint)
		decided := l.Stands.Decided()
		ours := l.Root
		ours.State, ours.Leaving, ours.Decision, ours.By = ca.Published, decided == Leaving, 1, cluster
		switch {
		case !known && l.Stands == Removed && !gone(l.ID):
			continue // nobody else speaks of it
		case !known:
			all = slices.Insert(all, i, ours)
		case !seen:
			if both := all[i].join(ours); both.Standing() != all[i].Standing() {
				all[i] = both
			}
		case decided != before.Here.Decided() && decided != before.Standing().Decided() && decided != all[i].Standing().Decided() &&
			// Of two that decide at the same time the stronger one prevails.
			(all[i].Decision == before.Decision && all[i].Decision < MaxDecisions || decided.strength() > all[i].Standing().strength()):
			ours.Decision = min(all[i].Decision+1, MaxDecisions)
			ours.Tainted = ours.Tainted || all[i].Tainted
			all[i] = ours
		}
		x := &all[i]
		x.Tainted = x.Tainted || l.Tainted
		switch {
		case l.State == ca.Active && l.Stands == Believed && x.Standing() == Believed:
			x.State = ca.Active
		case l.Stands == Removed && x.Standing() == Leaving && gone(l.ID):
			x.State, x.Certificate = ca.Removed, ""
		}
	}
	var next Replica
	for _, x := range Living(all, now) {
		next = append(next, Known{x, stands[x.Fingerprint]})
	}
	return next
}

// Settle remembers that the roots stand as was followed. What stands otherwise is for the next look: it may be a decision.
func (r Replica) Settle(here []Local) Replica {
	r = slices.Clone(r)
	for _, l := range here {
		if i := slices.IndexFunc(r, func(x Known) bool { return x.Fingerprint == l.Fingerprint }); i >= 0 && l.Stands.Decided() == r[i].Standing().Decided() {
			r[i].Here = l.Stands
		}
	}
	return r
}
