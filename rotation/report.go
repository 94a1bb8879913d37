package rotation

import (
	"slices"
	"time"

	"github.com/signet-ca/signet/ca"
)

// ReportRoots says what a cluster reports of its roots, but for the counts of agents, which the caller knows. A root is
// listed when validators are told to believe it, or as leaving while leaves that were made under it may live. An issuer
// counts as signing as long as it is active, expired or not, or was until its key was lost, for it may be followed by
// another under the same root at any time.
func ReportRoots(p Policy, all []Authority, now time.Time) []RootReport {
	var roots []RootReport
	signing, signs := World{Authorities: all}.current()
	for _, r := range all {
		if !r.InBundle() && (r.Kind != ca.KindRoot || r.State != ca.Removed || now.After(r.LeavesUntil.Add(p.Skew))) {
			continue
		}
		x := RootReport{ID: r.ID, Leaving: !r.Leaving.IsZero() || r.State == ca.Removed, LeavesUntil: r.LeavesUntil}
		if signs && signing.Root == r.ID {
			x.Signing = true
			x.LeavesUntil = later(x.LeavesUntil, earlier(p.LeavesUntil(now), signing.NotAfter))
		}
		roots = append(roots, x)
	}
	return roots
}

// ReportTaints says which CAs with lost keys a cluster tells its peers of: those whose chains are still valid, and roots for
// good, for their keys may be in certificates that live longer. What only others take for lost is told too where they may not
// know that a CA here has that key.
func ReportTaints(p Policy, all []Authority, peers []Report, now time.Time) []TaintReport {
	w := World{Authorities: all, Peers: peers}
	var taints []TaintReport
	for _, a := range all {
		_, since := w.lost(a)
		over := now.After(a.NotAfter.Add(p.Skew))
		if since.IsZero() || !a.signed() || over && (a.Kind != ca.KindRoot || a.Tainted.IsZero()) || a.Tainted.IsZero() && w.spokenOf(a) {
			continue
		}
		t := TaintReport{ID: a.ID, Root: a.Root, KeyFingerprint: a.KeyFingerprint, Since: since, NotAfter: a.NotAfter}
		if a.Kind == ca.KindRoot {
			t.Root = a.ID
		}
		taints = append(taints, t)
	}
	return taints
}

// spokenOf reports whether every peer that takes the key of a CA for lost speaks of that CA itself.
func (w World) spokenOf(a Authority) bool {
	return !slices.ContainsFunc(w.Peers, func(p Report) bool {
		return slices.ContainsFunc(p.Tainted, func(t TaintReport) bool { return t.KeyFingerprint == a.KeyFingerprint }) &&
			!slices.ContainsFunc(p.Tainted, func(t TaintReport) bool { return t.ID == a.ID })
	})
}
