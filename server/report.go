package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/mod/sumdb/note"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

// validator is an agent whose workloads validate: one that is not banned.
type validator struct {
	agent string
	said
	// ended: all its identities have. It gets no other before it has what is in use (unbelieved), so a switch doesn't wait for
	// it; but its workloads go on validating.
	ended bool
	// away is when it was last heard; zero while it is connected. unheard: not since the server's start, and away is its last
	// certificate.
	away    time.Time
	unheard bool
}

// validators are the agents that a switch waits for: those that have, or may have, identities that live.
func (k *keeper) validators(now time.Time) []validator { return waitedFor(k.agents(now)) }

func waitedFor(agents []validator) []validator {
	return slices.DeleteFunc(slices.Clone(agents), func(v validator) bool { return v.ended })
}

// maxMissing bounds how many agents are named.
const maxMissing = 100

// report is what this cluster knows of its validators and issuers, having heard that of its peers.
func (k *keeper) report(set *authorities, heard []rotation.Report, now time.Time) rotation.Report {
	lives := set.lives()
	r := rotation.Report{
		Cluster: k.folder.Cluster, At: now.UTC(), Until: now.UTC().Add(k.policy.ReportLife),
		Roots: rotation.ReportRoots(k.policy.Policy, lives, now), Tainted: rotation.ReportTaints(k.policy.Policy, lives, heard, now),
	}
	agents := k.agents(now)
	validators := waitedFor(agents)
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
			} else if !x.Leaving && len(x.Missing) < maxMissing { // what is to go nobody lacks
				x.Missing = append(x.Missing, v.agent)
			}
			if set.holds(v, x.ID) {
				x.Holding++
			}
		}
	}
	r.Accepting, r.Gone = k.accepting(set, agents, r.Tainted, now)
	return r
}

// accepting says of the roots that are believed here who does, or may, and which can't be believed again: those under which a
// key is lost, here (taints) or elsewhere. Called with mu held.
func (k *keeper) accepting(set *authorities, agents []validator, taints []rotation.TaintReport, now time.Time) (all []rotation.Acceptance, gone []string) {
	taints = slices.Clone(taints)
	for _, r := range k.reports {
		taints = append(taints, r.Tainted...)
	}
	held := map[trust.Version]int{}
	for _, v := range agents {
		held[v.oldest]++
	}
	published := map[string]bool{}
	for _, r := range set.bundle.Roots() {
		published[rootID(r)] = true
	}
	for _, a := range set.rows {
		if a.Kind != ca.KindRoot || now.After(a.NotAfter.Add(k.policy.Skew)) {
			continue
		}
		x := rotation.Acceptance{
			Root: a.ID, Bundle: published[a.ID] || a.State == ca.Removed && now.Before(a.Since.Add(k.policy.Delay)),
		}
		for v, n := range held {
			if k.mayHave(v, a.ID) {
				x.Agents += n
			}
		}
		switch {
		case x.Bundle || x.Agents > 0:
			all = append(all, x)
		case a.State == ca.Removed && slices.ContainsFunc(taints, func(t rotation.TaintReport) bool { return t.Root == a.ID && !now.After(t.NotAfter) }):
			gone = append(gone, a.ID)
		}
	}
	return all, gone
}

// mayHave reports whether who has acknowledged a bundle, or nothing yet, may believe a root: it is in that bundle or in a
// later one, which may have come unacknowledged. Called with mu held.
func (k *keeper) mayHave(v trust.Version, root string) bool {
	later := k.history
	if _, known := k.heldBy(v); known {
		later = later[slices.IndexFunc(later, func(b store.PastBundle) bool { return b.Sequence == v.Sequence }):]
	}
	return slices.ContainsFunc(later, func(b store.PastBundle) bool { return slices.Contains(b.Roots, root) })
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
	maxReportTaints = maxAuthorities
	maxReportName   = 255
	// maxNotes is how many are taken at once.
	maxNotes = 64
)

// signReport makes the report that peers get.
func (k *keeper) signReport(ctx context.Context) ([]byte, error) {
	return k.signed(ctx, k.report(k.current.Load(), k.heard(), k.folder.Now()))
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
	text, err := audit.OpenNote(signed, p.VerifierKey)
	if err != nil {
		return rotation.Report{}, fmt.Errorf("report of cluster %s: %w", p.Cluster, err)
	}
	return readReport(text, p, td)
}

// readReport checks what a peer has signed.
func readReport(text string, p Peer, td spiffeid.TrustDomain) (rotation.Report, error) {
	fail := func(format string, args ...any) (rotation.Report, error) {
		return rotation.Report{}, fmt.Errorf("report of cluster "+p.Cluster+": "+format, args...)
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
	case !r.Until.After(r.At) || r.Until.Sub(r.At) > rotation.MaxReportLife:
		return fail("it was made at %s and holds until %s: that must be later, and at most %s later", stamp(r.At), stamp(r.Until), rotation.MaxReportLife)
	case len(r.Roots) > maxReportRoots || len(r.Tainted) > maxReportTaints || len(r.Accepting)+len(r.Gone) > maxAuthorities:
		return fail("it names %d roots, %d tainted CAs and %d roots that are accepted or gone: at most %d, %d and %d are believed", len(r.Roots), len(r.Tainted), len(r.Accepting)+len(r.Gone), maxReportRoots, maxReportTaints, maxAuthorities)
	}
	for _, x := range r.Accepting {
		if len(x.Root) > maxReportName || x.Agents < 0 {
			return fail("a root that it accepts has a name of more than %d bytes, or fewer than 0 agents", maxReportName)
		}
	}
	if slices.ContainsFunc(r.Gone, func(id string) bool { return len(id) > maxReportName }) {
		return fail("a name in it is longer than %d bytes", maxReportName)
	}
	for _, t := range r.Tainted {
		if max(len(t.ID), len(t.Root), len(t.KeyFingerprint)) > maxReportName {
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

// heardReport is a report that was given.
type heardReport struct {
	rotation.Report
	// held is of when the one is that is held already, where this one is not newer; zero where it is.
	held time.Time
}

func (h heardReport) newer() bool { return h.held.IsZero() }

// takeReports takes what peers have signed, all of it or nothing; the caller has the turn. An older report than the one that is
// held changes nothing: it may have been overtaken on its way.
func (k *keeper) takeReports(ctx context.Context, d decision) (all []heardReport, err error) {
	if len(d.notes) > maxNotes {
		return nil, fmt.Errorf("%w: %d of them; at most %d are taken at once", errBadReport, len(d.notes), maxNotes)
	}
	now := k.folder.Now()
	k.mu.Lock()
	held := maps.Clone(k.reports)
	k.mu.Unlock()
	taken := map[string][]byte{}
	var entries []*auditv1.Entry
	for i, signed := range d.notes {
		r, err := k.openAny(signed)
		if err == nil && r.At.After(now.Add(k.policy.Skew)) {
			err = fmt.Errorf("that of cluster %s is of %s, and it is %s here: set the clocks right (rotation.skew is %s)", r.Cluster, stamp(r.At), stamp(now), k.policy.Skew)
		}
		switch {
		case err != nil && i < len(d.names):
			return nil, fmt.Errorf("%w: %s: %w", errBadReport, clip(d.names[i]), err)
		case err != nil:
			return nil, fmt.Errorf("%w: %w", errBadReport, err)
		}
		old := held[r.Cluster]
		if !r.At.After(old.At) {
			all = append(all, heardReport{r, old.At})
			continue
		}
		all = append(all, heardReport{Report: r})
		held[r.Cluster], taken[r.Cluster] = r, signed
		if says := news(old, r); len(says) > 0 || d.by.GetDoor() != selfDoor {
			digest := sha256.Sum256(signed)
			entries = append(entries, &auditv1.Entry{Event: &auditv1.Entry_PeerReported{PeerReported: &auditv1.PeerReported{
				Cluster: r.Cluster, Made: r.At.UnixNano(), Digest: digest[:], Says: says, Evidence: d.by,
			}}})
		}
	}
	if d.dry || len(taken) == 0 {
		return all, nil
	}
	put := func(st *store.Store) error { return st.PutPeerReports(ctx, taken) }
	use := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		for cluster := range taken {
			k.reports[cluster] = held[cluster]
		}
		k.findStale()
		k.changed.Ring()
	}
	if len(entries) == 0 {
		if err := put(k.store); err != nil {
			return nil, fmt.Errorf("%w: %w", errNotTaken, err)
		}
		use()
		return all, nil
	}
	note, err := noteOf(now, entries)
	if err != nil {
		return nil, err
	}
	if err := k.change(ctx, note, put, use); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotTaken, err)
	}
	return all, nil
}

var (
	// errBadReport says that a report of a peer is not taken.
	errBadReport = errors.New("report refused")
	// errNotTaken says that one is good, and could not be taken now.
	errNotTaken = errors.New("the reports are not taken")
)

// maxNews is how much that a report says goes into the log.
const maxNews = 64

// news is what a report says of roots and lost keys that the one before did not. How many agents are how far, it says all the
// time.
func news(before, after rotation.Report) []string {
	claims := func(r rotation.Report) map[string]string {
		all := map[string]string{}
		for _, x := range r.Roots {
			is := "is believed"
			if x.Leaving {
				is = "is leaving"
			}
			if x.Signing {
				is += ", and signed under"
			}
			all[x.ID] = is
		}
		for _, t := range r.Tainted {
			what := "the key of " + t.ID
			if t.Root != t.ID {
				what += " under " + t.Root
			}
			all[what] = "is tainted since " + stamp(t.Since)
		}
		return all
	}
	was, is := claims(before), claims(after)
	var says []string
	for what, now := range is {
		if was[what] != now {
			says = append(says, what+" "+now)
		}
	}
	for what := range was {
		if is[what] == "" {
			says = append(says, what+" is not spoken of any more")
		}
	}
	slices.Sort(says)
	if more := len(says) - maxNews; more > 0 {
		says = append(says[:maxNews], fmt.Sprintf("and %d more", more))
	}
	return says
}

// openAny finds the peer that has signed.
func (k *keeper) openAny(signed []byte) (rotation.Report, error) {
	if len(signed) > maxReport {
		return rotation.Report{}, fmt.Errorf("%d bytes: at most %d are read", len(signed), maxReport)
	}
	if len(k.policy.Peers) == 0 {
		return rotation.Report{}, errors.New("no peers are configured: name the other clusters and the keys of their logs under rotation.peers")
	}
	var names []string
	for _, p := range k.policy.Peers {
		if text, err := audit.OpenNote(signed, p.VerifierKey); err == nil {
			return readReport(text, p, k.folder.TrustDomain)
		}
		names = append(names, p.Cluster)
	}
	// Whose it claims to be tells only where to look for the mistake.
	var claimed *note.UnverifiedNoteError
	_, err := note.Open(signed, note.VerifierList())
	switch {
	case !errors.As(err, &claimed):
		return rotation.Report{}, errors.New("nobody has signed it: give the file that `signet rotation report` wrote in another cluster")
	case slices.ContainsFunc(claimed.Note.UnverifiedSigs, func(s note.Signature) bool { return s.Name == k.folder.Origin() }):
		return rotation.Report{}, errors.New("it is this cluster's own: take it to the other clusters, and bring theirs here")
	}
	return rotation.Report{}, fmt.Errorf("it is not signed with a key that rotation.peers names (of %s): was it changed on its way, or is the key another one now?", check.Some(names))
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
