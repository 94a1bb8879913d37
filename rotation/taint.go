package rotation

import (
	"fmt"
	"slices"
	"time"

	"github.com/signet-ca/signet/ca"
)

// lost reports since when a CA's key is taken for lost, and by the word about which CA: itself, or another one of the same key,
// here or in another cluster. It does not end with that one's certificate. Zero = it is not.
func (w World) lost(a Authority) (of string, since time.Time) {
	note := func(id string, t time.Time) {
		if !t.IsZero() && (since.IsZero() || t.Before(since)) {
			of, since = id, t
		}
	}
	note(a.ID, a.Tainted)
	if a.KeyFingerprint == "" {
		return of, since
	}
	for _, b := range w.Authorities {
		if b.KeyFingerprint == a.KeyFingerprint {
			note(b.ID, b.Tainted)
		}
	}
	for _, p := range w.Peers {
		for _, t := range p.Tainted {
			if t.KeyFingerprint == a.KeyFingerprint {
				note(t.ID+" of cluster "+p.Cluster, t.Since)
			}
		}
	}
	return of, since
}

// LostKey refuses a CA that is new here and has the key of one that is taken for lost, here or in another cluster: it would
// bring back what must go.
func (w World) LostKey(a Authority) error {
	of, since := w.lost(a)
	if since.IsZero() || of == a.ID {
		return nil
	}
	return fmt.Errorf("%s has the key of %s, which is tainted since %s: make one with a new key (a root in Vault's PKI engine by generate/root, without key_ref)", a.ID, of, stamp(since))
}

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
