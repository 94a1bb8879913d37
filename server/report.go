package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

// validator is an agent whose workloads validate: one that is not banned and has, or may have, identities that live.
type validator struct {
	agent string
	said
}

// maxMissing bounds how many agents are named.
const maxMissing = 100

// report is what this cluster knows of its validators and issuers.
func (k *keeper) report(set *authorities, now time.Time) rotation.Report {
	lives := set.lives()
	r := rotation.Report{
		Cluster: k.folder.Cluster, At: now.UTC(),
		Roots: rotation.ReportRoots(k.policy.Policy, lives, now), Tainted: rotation.ReportTaints(k.policy.Policy, lives, now),
	}
	validators := k.validators(now)
	k.mu.Lock()
	defer k.mu.Unlock()
	// A root that was removed is told of as long as somebody still believes it.
	for _, a := range set.rows {
		told := func(x rotation.RootReport) bool { return x.ID == a.ID }
		if a.Kind == ca.KindRoot && a.State == ca.Removed && !slices.ContainsFunc(r.Roots, told) &&
			slices.ContainsFunc(validators, func(v validator) bool { return k.mayBelieve(v.oldest, a.ID) }) {
			r.Roots = append(r.Roots, rotation.RootReport{ID: a.ID, Leaving: true, LeavesUntil: a.LeavesUntil})
		}
	}
	for i := range r.Roots {
		x := &r.Roots[i]
		x.Validators = len(validators)
		for _, v := range validators {
			if k.believes(v.oldest, x.ID) || x.Leaving && k.mayBelieve(v.oldest, x.ID) {
				x.Trusting++
			} else if len(x.Missing) < maxMissing {
				x.Missing = append(x.Missing, v.agent)
			}
			if set.holds(v, x.ID) {
				x.Holding++
			}
		}
	}
	return r
}

// mayBelieve reports whether an agent has not shown that it does not believe a root. Called with mu held.
func (k *keeper) mayBelieve(v trust.Version, root string) bool {
	held, known := k.heldBy(v)
	return !known || slices.Contains(held, root)
}

// heldBy returns the roots of the bundle that somebody has acknowledged; false where that was never ours. Called with mu held.
func (k *keeper) heldBy(v trust.Version) ([]string, bool) {
	i, ok := slices.BinarySearchFunc(k.history, v.Sequence, func(b store.PastBundle, sequence uint64) int { return cmp.Compare(b.Sequence, sequence) })
	if !ok || k.history[i].Digest != v.Digest {
		return nil, false
	}
	return k.history[i].Roots, true
}

// believes reports whether an agent has acknowledged a root since it was last published: one that was removed and added
// again has to be acknowledged again. Called with mu held.
func (k *keeper) believes(v trust.Version, root string) bool {
	for i := len(k.history) - 1; i >= 0 && slices.Contains(k.history[i].Roots, root); i-- {
		if b := k.history[i]; b.Sequence == v.Sequence {
			return b.Digest == v.Digest
		}
	}
	return false
}

// holds reports whether a validator has, or may have, a leaf under the root.
func (s *authorities) holds(v validator, root string) bool {
	if !v.heard {
		return true
	}
	return slices.ContainsFunc(v.held, func(id []byte) bool {
		a, ok := s.byKeyID(id)
		return !ok || a.Root == root
	})
}

// reportTitle is the first line of a report, which no checkpoint has.
const reportTitle = "signet rotation report v1\n"

// What a report may hold: maxReport is in bytes, maxReportName too.
const (
	maxReport       = 1 << 20
	maxReportRoots  = 256
	maxReportTaints = 64
	maxReportName   = 255
	// maxNotes is how many are taken at once.
	maxNotes = 64
)

// signReport makes the report that peers get.
func (k *keeper) signReport(ctx context.Context) ([]byte, error) {
	return k.signed(ctx, k.report(k.current.Load(), k.folder.Now()))
}

// signed is a report as peers get it.
func (k *keeper) signed(ctx context.Context, r rotation.Report) ([]byte, error) {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, err
	}
	return k.signNote(ctx, reportTitle+k.folder.TrustDomain.Name()+"\n"+string(text)+"\n")
}

// signNote signs a text with the key of this cluster's log, by which peers know it.
func (k *keeper) signNote(ctx context.Context, text string) ([]byte, error) {
	ref, ok, err := k.store.Meta(ctx, logKeyFact)
	if err != nil || !ok {
		return nil, errors.Join(err, errors.New("the key of the log is not known"))
	}
	parsed, err := keystore.ParseRef(ref)
	if err != nil {
		return nil, err
	}
	key, err := k.key(ctx, parsed)
	if err != nil {
		return nil, err
	}
	return audit.SignNote(k.folder.Origin(), key, text)
}

// openReport verifies a peer's report.
func openReport(signed []byte, p Peer, td spiffeid.TrustDomain) (rotation.Report, error) {
	fail := func(format string, args ...any) (rotation.Report, error) {
		return rotation.Report{}, fmt.Errorf("report of cluster "+p.Cluster+": "+format, args...)
	}
	text, err := audit.OpenNote(signed, p.VerifierKey)
	if err != nil {
		return fail("%w", err)
	}
	body, ok := strings.CutPrefix(text, reportTitle+td.Name()+"\n")
	if !ok {
		return fail("it is not a rotation report of trust domain %s", td)
	}
	var r rotation.Report
	// What a newer version adds is passed over.
	if err := json.Unmarshal([]byte(body), &r); err != nil {
		return fail("it can't be read: %w", err)
	}
	switch {
	case r.Cluster != p.Cluster:
		return fail("it is of cluster %q", clip(r.Cluster))
	case r.At.IsZero():
		return fail("it has no time")
	case len(r.Roots) > maxReportRoots || len(r.Tainted) > maxReportTaints:
		return fail("it names %d roots and %d tainted CAs: at most %d and %d are believed", len(r.Roots), len(r.Tainted), maxReportRoots, maxReportTaints)
	}
	for _, t := range r.Tainted {
		if len(t.ID) > maxReportName || len(t.Root) > maxReportName {
			return fail("a name in it is longer than %d bytes", maxReportName)
		}
	}
	for _, x := range r.Roots {
		if len(x.ID) > maxReportName || len(x.Missing) > maxMissing || slices.ContainsFunc(x.Missing, func(m string) bool { return len(m) > maxReportName }) {
			return fail("a name in it is longer than %d bytes, or it names more than %d agents", maxReportName, maxMissing)
		}
		if x.Trusting < 0 || x.Validators < 0 || x.Holding < 0 || x.Trusting > x.Validators {
			return fail("its counts of validators contradict each other")
		}
	}
	return r, nil
}

// takeReports takes what peers have signed; the caller has the turn. An older report than the one that is held changes nothing: it may have been
// overtaken on its way.
func (k *keeper) takeReports(ctx context.Context, notes [][]byte, dry bool) (taken []rotation.Report, err error) {
	if len(notes) > maxNotes {
		return nil, fmt.Errorf("%w: %d of them; at most %d are taken at once", errBadReport, len(notes), maxNotes)
	}
	now := k.folder.Now()
	for _, signed := range notes {
		r, err := k.openAny(signed)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errBadReport, err)
		}
		if r.At.After(now.Add(k.policy.Skew)) {
			return nil, fmt.Errorf("%w: that of cluster %s is of %s, and it is %s here: set the clocks right (rotation.skew is %s)", errBadReport, r.Cluster, stamp(r.At), stamp(now), k.policy.Skew)
		}
		k.mu.Lock()
		old := k.reports[r.Cluster]
		k.mu.Unlock()
		if !r.At.After(old.At) {
			continue
		}
		if !dry {
			if err := k.store.PutPeerReport(ctx, r.Cluster, signed); err != nil {
				return nil, err
			}
			k.mu.Lock()
			k.reports[r.Cluster] = r
			k.findStale()
			k.changed.Ring()
			k.mu.Unlock()
		}
		taken = append(taken, r)
	}
	return taken, nil
}

// errBadReport says that a report of a peer is not taken.
var errBadReport = errors.New("report refused")

// openAny finds the peer that has signed.
func (k *keeper) openAny(signed []byte) (rotation.Report, error) {
	if len(signed) > maxReport {
		return rotation.Report{}, fmt.Errorf("%d bytes: at most %d are read", len(signed), maxReport)
	}
	if len(k.policy.Peers) == 0 {
		return rotation.Report{}, errors.New("no peers are configured: name the other clusters and the keys of their logs under rotation.peers")
	}
	var errs []error
	for _, p := range k.policy.Peers {
		r, err := openReport(signed, p, k.folder.TrustDomain)
		if err == nil {
			return r, nil
		}
		errs = append(errs, err)
	}
	return rotation.Report{}, errors.Join(errs...)
}

// unbelieved names a root that is in use and that an agent does not have. Whoever gets a leaf must be able to verify those
// of others; an agent whose identities had all expired was not waited for. What counts is what the agent itself has, since
// one workload that does not answer must not cost the others their identities. An agent that is ahead of us knows of a
// later state than this one, which was restored from an older copy; it judges for itself what it can verify. Where there
// has been one bundle only, there is nothing to be late for.
func (k *keeper) unbelieved(w said) (root string, ok bool) {
	set := k.current.Load()
	if set.bundle.Sequence() <= 1 || w.stored.Sequence > set.bundle.Sequence() {
		return "", false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, a := range set.rows {
		if a.Kind == ca.KindRoot && a.State == ca.Active && !k.believes(w.stored, a.ID) {
			return a.ID, true
		}
	}
	return "", false
}
