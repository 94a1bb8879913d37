package rotation

import (
	"slices"
	"time"

	"github.com/signet-ca/signet/ca"
)

// Stale names the issuers whose leaves are to be replaced ahead of time: those that no longer sign and are tainted, or stand
// under a root below which a key was lost while another root's issuer signs.
func Stale(w World, now time.Time) []string {
	active, ok := w.active()
	if !ok {
		return nil
	}
	var ids []string
	for _, a := range w.Authorities {
		if a.Kind == ca.KindIntermediate && a.State == ca.Retired &&
			(!a.Tainted.IsZero() || a.Root != active.Root && !w.exposed(a.Root, now).IsZero()) {
			ids = append(ids, a.ID)
		}
	}
	return ids
}

// Acceptance is what of a cluster accepts what was made under a root, whoever has made it.
type Acceptance struct {
	Root string `json:"root"`
	// Bundle: new agents, exports and clusters that join are given the root, or those that can't acknowledge may have it still.
	Bundle bool `json:"bundle,omitempty"`
	// Agents is how many believe it, or may. Unlike Validators these are all that are not banned: the workloads of one whose
	// identities have ended go on validating.
	Agents int `json:"agents,omitempty"`
}

// Accepts says what of a cluster accepts what was made under a root, as its newest report has it. It is not known where there
// is none, nor, since a root may be added again, where it does not hold any more. That an exposed root is gone is said for good.
func (p Policy) Accepts(r Report, root string, now time.Time) (a Acceptance, known bool) {
	a = Acceptance{Root: root}
	if i := slices.IndexFunc(r.Accepting, func(a Acceptance) bool { return a.Root == root }); i >= 0 {
		a = r.Accepting[i]
	}
	return a, p.Holds(r, now) || slices.Contains(r.Gone, root) && !p.fromTheFuture(r, now)
}
