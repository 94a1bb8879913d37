package rotation

import (
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
