package server

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/internal/bell"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/server/shared"
	"github.com/signet-ca/signet/trust"
)

// Exchange is a place that the clusters of a trust domain share, for what else would be carried as files. What lies there is
// signed by the cluster that wrote it, and foreign until that was verified: who can write there can withhold, and show what is
// old; an old document adds no root, since a fresh report must speak of it too.
//
// There are the documents "trust", which each cluster writes (package shared), and "reports/<cluster>", its own report.
// An error with a method Away() bool that returns true says that nothing can be read or written now.
type Exchange interface {
	// Read returns a document and its version. The text is nil where there is none; then the version may still be that of one
	// that was deleted.
	Read(ctx context.Context, name string) (text []byte, version uint64, err error)
	// Write puts a document in the place of the version that was read. It reports false, and has written nothing, when
	// somebody else has changed it since.
	Write(ctx context.Context, name string, text []byte, upon uint64) (bool, error)
}

const (
	trustDocument = "trust"
	reportsFolder = "reports/"

	// exchangeEvery spaces the looks at what others have written, give or take exchangeJitter of it; less where reports hold
	// for less than roundsPerReport of it.
	exchangeEvery   = 5 * time.Second
	leastExchange   = 100 * time.Millisecond
	exchangeJitter  = 0.2
	roundsPerReport = 20
	// A round is bounded in time, in the reports that it reads, and in tries to write upon what others write.
	roundTimeout = 30 * time.Second
	roundReports = 16
	roundTries   = 3
	// longOver is how long a root has expired, by all clocks, when the document is written only to leave it out.
	longOver = 24 * time.Hour
	// slowly is how many rounds may pass until is looked again at what should not have changed.
	slowly = 12
	// settling lets what comes together be told together.
	settling = 100 * time.Millisecond
	// Parts of the time for which peers rely on a report after which it is renewed: while a root leaves, peers wait for one
	// that was made after what was promised before has run out.
	reportRenewals, reportRenewalsLeaving = 2, 24
)

func reportDocument(cluster string) string { return reportsFolder + cluster }

// exchange follows what the other clusters have decided, and tells them of this one. Nothing waits for it but rotations: when
// it can't be reached, work goes on.
type exchange struct {
	keeper *keeper
	place  Exchange
	// self is this cluster as the others know it.
	self  Peer
	every time.Duration
	log   *slog.Logger

	// Of the one goroutine in run.

	// met is what was last gone through.
	met met
	// heard is the newest document of each peer; turn is whose is read next.
	heard map[string][]byte
	turn  int
	// told is the report that the others have, of version told.
	told        rotation.Report
	toldVersion uint64
	// looked is when our report was last read, reported when one was last made.
	looked, reported time.Time

	mu sync.Mutex
	// own is what is known of the shared document; nil before it was loaded.
	own shared.Replica
	// troubles are what can't be read or written, by document; away is for all of them.
	troubles map[string]trouble
	away     trouble
	refused  []refusedRoot
	// untold are roots of which the document lacks a decision.
	untold []string
	// holds is until when the others can rely on our report; read is when the document was last read.
	holds, read time.Time
}

// met is a state of things that needs no second look.
type met struct {
	version uint64
	text    []byte
	set     *authorities
	reports string
	at      time.Time
}

// trouble is something that does not work. The zero value is none.
type trouble struct {
	since time.Time
	err   error
}

// after is what it is after another try, and whether that has begun or ended it.
func (t trouble) after(err error, now time.Time) (_ trouble, turned bool) {
	switch {
	case err == nil:
		return trouble{}, t.err != nil
	case t.err == nil:
		return trouble{now, err}, true
	}
	return trouble{t.since, err}, false
}

func newExchange(k *keeper, place Exchange, verifierKey string) *exchange {
	return &exchange{
		keeper: k, place: place, self: Peer{Cluster: k.folder.Cluster, VerifierKey: verifierKey}, log: k.log,
		every: exchangeEvery, heard: map[string][]byte{}, troubles: map[string]trouble{},
	}
}

// relied is for how long every other cluster relies on a report of ours.
func (e *exchange) relied() time.Duration {
	k := e.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.policy.Relied(slices.Collect(maps.Values(k.reports)))
}

// pace is the time between two rounds.
func (e *exchange) pace() time.Duration {
	return min(e.every, max(leastExchange, e.relied()/roundsPerReport))
}

// register registers the metrics.
func (e *exchange) register(r prometheus.Registerer) error {
	return errors.Join(r.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "signet_exchange_impaired", Help: "Documents that can't be exchanged with the other clusters, and roots about which their decisions can't be followed.",
	}, func() float64 {
		e.mu.Lock()
		defer e.mu.Unlock()
		n := len(e.troubles) + len(e.refused)
		if e.away.err != nil {
			n++
		}
		return float64(n)
	})), r.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "signet_exchange_read_timestamp_seconds", Help: "When the shared trust was last read; NaN = not since the start.",
	}, func() float64 {
		e.mu.Lock()
		defer e.mu.Unlock()
		return unixSeconds(e.read)
	})))
}

// run exchanges for as long as ctx lives: every few seconds, and when something has changed here.
func (e *exchange) run(ctx context.Context) {
	for ctx.Err() == nil {
		changed := e.keeper.changed.Next()
		e.round(ctx)
		if bell.Wait(ctx, time.Duration(float64(e.pace())*(1+exchangeJitter*(2*rand.Float64()-1))), changed) {
			bell.Wait(ctx, settling, nil)
		}
	}
}

// round reads what the others have written and writes what they lack. What fails is tried again in the next one.
func (e *exchange) round(parent context.Context) {
	ctx, cancel := context.WithTimeout(parent, roundTimeout)
	defer cancel()
	if e.keeper.doubt() {
		return // nothing is to be decided or promised by a wrong clock
	}
	// A root is taken from the document when a report speaks of it: so reports are written and read first.
	var steps []func(context.Context) (name string, err error)
	for range min(len(e.keeper.policy.Peers), roundReports) {
		steps = append(steps, e.hear)
	}
	for _, step := range append(steps, e.tell, e.shareTrust) {
		name, err := step(ctx)
		if parent.Err() != nil {
			return // what fails now says nothing
		}
		if isAway(err) {
			e.noteAway(err)
			return
		}
		e.note(name, err)
	}
	e.noteAway(nil)
}

// isAway reports whether nothing can be read or written now.
func isAway(err error) bool {
	var a interface{ Away() bool }
	return errors.As(err, &a) && a.Away()
}

// noteAway remembers since when nothing can be exchanged.
func (e *exchange) noteAway(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.away = e.turned(e.away, "everything", err)
}

// note remembers what can't be read or written, and since when.
func (e *exchange) note(name string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if t := e.turned(e.troubles[name], name, err); t.err != nil {
		e.troubles[name] = t
	} else {
		delete(e.troubles, name)
	}
}

func (e *exchange) turned(t trouble, name string, err error) trouble {
	after, turned := t.after(err, e.keeper.folder.Now())
	switch {
	case turned && err != nil:
		e.log.Warn("what clusters share can't be exchanged; it is tried again", "document", name, "err", err)
	case turned:
		e.log.Info("what clusters share can be exchanged again", "document", name, "since", stamp(t.since))
	}
	return after
}

// shareTrust follows the shared document, and writes it if it lacks something.
func (e *exchange) shareTrust(ctx context.Context) (string, error) {
	for range roundTries {
		text, version, err := e.place.Read(ctx, trustDocument)
		if err != nil {
			return trustDocument, err
		}
		now := e.keeper.folder.Now()
		e.mu.Lock()
		e.read = now
		again := len(e.refused) == 0 && e.troubles[trustDocument].err == nil
		e.mu.Unlock()
		seen := met{version, text, e.keeper.current.Load(), e.reportsSeen(), now}
		if last := e.met; again && last.set == seen.set && last.version == version && last.reports == seen.reports && bytes.Equal(last.text, text) && now.Sub(last.at) < slowly*e.pace() && !now.Before(last.at) {
			return trustDocument, nil
		}
		var theirs shared.Trust
		if text != nil {
			known, err := e.load(ctx)
			if err != nil {
				return trustDocument, err
			}
			if theirs, err = shared.Open(text, e.keeper.folder.TrustDomain, writers(append(slices.Clone(e.keeper.policy.Peers), e.self))); err == nil {
				err = known.Admits(theirs)
			}
			if err != nil {
				return trustDocument, fmt.Errorf("version %d of the shared trust is not followed, and not replaced: %w", version, err)
			}
		}
		own, done, err := e.follow(ctx, theirs, version)
		if err != nil {
			return trustDocument, err
		}
		ours, theirRoots := own.Roots(), shared.Living(theirs.Roots, now)
		e.lacks(ours, theirRoots)
		old := slices.ContainsFunc(theirs.Roots, func(r shared.Root) bool { return now.After(r.NotAfter.Add(longOver)) })
		if !old && slices.EqualFunc(ours, theirRoots, shared.Root.Equal) {
			if done {
				e.met = seen
			}
			return trustDocument, nil
		}
		body, err := shared.Trust{TrustDomain: e.keeper.folder.TrustDomain.Name(), Cluster: e.self.Cluster, Roots: ours}.Encode()
		if err != nil {
			return trustDocument, err
		}
		signed, err := e.keeper.signNote(ctx, body)
		if err != nil {
			return trustDocument, err
		}
		written, err := e.place.Write(ctx, trustDocument, signed, version)
		if err != nil {
			return trustDocument, err
		}
		if written {
			e.log.Info("shared trust written", "version", version+1, "roots", len(ours))
			e.lacks(nil, nil)
			return trustDocument, nil
		}
	}
	return trustDocument, fmt.Errorf("the shared trust could not be written: other clusters were quicker %d times", roundTries)
}

// lacks remembers of which roots the document lacks a decision.
func (e *exchange) lacks(ours, theirs []shared.Root) {
	var ids []string
	for _, r := range ours {
		if !slices.ContainsFunc(theirs, r.Equal) {
			ids = append(ids, r.ID)
		}
	}
	e.mu.Lock()
	e.untold = ids
	e.mu.Unlock()
}

// writers are clusters as those whose document is read.
func writers(clusters []Peer) []shared.Writer {
	var all []shared.Writer
	for _, p := range clusters {
		all = append(all, shared.Writer(p))
	}
	return all
}

// reportsSeen names the reports that are held: by them it is known that a root has gone.
func (e *exchange) reportsSeen() string {
	k := e.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	var b strings.Builder
	for _, p := range k.policy.Peers {
		fmt.Fprintf(&b, "%s %d ", p.Cluster, k.reports[p.Cluster].At.UnixNano())
	}
	return b.String()
}

// hear takes the report of the peer whose turn it is.
func (e *exchange) hear(ctx context.Context) (string, error) {
	k := e.keeper
	e.turn = (e.turn + 1) % len(k.policy.Peers)
	peer := k.policy.Peers[e.turn].Cluster
	name := reportDocument(peer)
	text, version, err := e.place.Read(ctx, name)
	if err != nil || text == nil || bytes.Equal(text, e.heard[peer]) {
		return name, err
	}
	d := scheduled()
	d.notes = [][]byte{text}
	if _, err := k.do(ctx, d, nil); errors.Is(err, errBadReport) || errors.Is(err, errNotTaken) {
		return name, fmt.Errorf("version %d of the report of cluster %s: %w", version, peer, err)
	} else if err != nil && !errors.Is(err, errStep) {
		k.log.Error("could not take a step in the life of a CA; it is tried again", "err", err)
	}
	e.heard[peer] = text
	return name, nil
}

// tell writes our report when it says something new, and in time before the one before it ends.
func (e *exchange) tell(ctx context.Context) (string, error) {
	name := reportDocument(e.self.Cluster)
	k := e.keeper
	if len(k.policy.Peers) == 0 {
		return name, nil
	}
	for range roundTries {
		now := k.folder.Now()
		// It may have been deleted.
		if since := now.Sub(e.looked); since < 0 || since >= slowly*e.pace() {
			if err := e.look(ctx, name, now); err != nil {
				return name, err
			}
		}
		if since := now.Sub(e.reported); since >= 0 && since < time.Duration(validators(e.told))*perValidator {
			return name, nil
		}
		r := k.report(k.current.Load(), k.heard(), now)
		e.reported = now
		if !due(e.told, r, e.relied()) {
			return name, nil
		}
		signed, err := k.signed(ctx, r)
		if err != nil {
			return name, err
		}
		written, err := e.place.Write(ctx, name, signed, e.toldVersion)
		if err != nil {
			return name, err
		}
		if written {
			e.toldVersion++
			e.say(r)
			return name, nil
		}
		e.looked, e.reported = time.Time{}, time.Time{}
	}
	return name, fmt.Errorf("the report of cluster %s could not be written: somebody else writes it too; each cluster has a name of its own", e.self.Cluster)
}

// look reads our own report as the others have it. What is not ours counts as none, and is replaced.
func (e *exchange) look(ctx context.Context, name string, now time.Time) error {
	text, version, err := e.place.Read(ctx, name)
	if err != nil {
		return err
	}
	var r rotation.Report
	if text != nil {
		r, err = openReport(text, e.self, e.keeper.folder.TrustDomain)
		if err != nil || r.At.After(now.Add(e.keeper.policy.Skew)) {
			e.log.Warn("what lies in the place of our report is of no use; it is written again", "document", name, "version", version, "at", stamp(r.At), "err", err)
			r = rotation.Report{}
		}
	}
	e.toldVersion, e.looked = version, now
	e.say(r)
	return nil
}

func (e *exchange) say(r rotation.Report) {
	e.told = r
	relied := e.relied()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.holds = (time.Time{}); !r.At.IsZero() {
		e.holds = r.At.Add(relied)
	}
}

// due reports whether the others are to get another report than the one they have, on which they rely for life from its making on.
func due(told, now rotation.Report, life time.Duration) bool {
	if !now.At.After(told.At) {
		return false // peers take newer ones only
	}
	parts := reportRenewals
	if slices.ContainsFunc(now.Roots, func(x rotation.RootReport) bool { return x.Leaving }) {
		parts = reportRenewalsLeaving
	}
	return now.At.Sub(told.At) >= life/time.Duration(parts) || now.Until.Sub(now.At) != told.Until.Sub(told.At) || !slices.EqualFunc(told.Roots, now.Roots, sameRoot) ||
		!slices.EqualFunc(told.Tainted, now.Tainted, func(a, b rotation.TaintReport) bool {
			return a.ID == b.ID && a.Root == b.Root && a.KeyFingerprint == b.KeyFingerprint && a.Since.Equal(b.Since) && a.NotAfter.Equal(b.NotAfter)
		}) || !slices.Equal(told.Accepting, now.Accepting) || !slices.Equal(told.Gone, now.Gone)
}

// sameRoot compares what two reports say of a root. While it is signed under, the end of its leaves moves with the time.
func sameRoot(a, b rotation.RootReport) bool {
	return a.ID == b.ID && a.Trusting == b.Trusting && a.Validators == b.Validators && slices.Equal(a.Missing, b.Missing) && a.Leaving == b.Leaving &&
		a.Signing == b.Signing && a.Holding == b.Holding && (a.Signing || a.LeavesUntil.Equal(b.LeavesUntil))
}

// check is what readiness says of the exchange. It stops nothing.
func (e *exchange) check(context.Context) check.Findings {
	now := e.keeper.folder.Now()
	relied := e.relied()
	e.mu.Lock()
	defer e.mu.Unlock()
	var found check.Findings
	add := func(l check.Level, about, message string) {
		found = append(found, check.Finding{Code: check.CodeShared, Level: l, About: about, Message: message})
	}
	waits, urgent := e.waits(now)
	level := func(t trouble) check.Level {
		if urgent && now.Sub(t.since) > relied/reportRenewals {
			return check.Error
		}
		return check.Warning
	}
	if e.away.err != nil {
		add(level(e.away), "exchange", fmt.Sprintf("nothing can be exchanged with the other clusters since %s: %v; %s", stamp(e.away.since), e.away.err, waits))
	}
	for _, name := range slices.Sorted(maps.Keys(e.troubles)) {
		t := e.troubles[name]
		add(level(t), name, fmt.Sprintf("it can't be exchanged since %s: %v; %s", stamp(t.since), t.err, waits))
	}
	for _, r := range e.refused {
		add(check.Warning, r.id, fmt.Sprintf("what cluster %s has decided about it can't be followed: %v", r.by, r.why))
	}
	if len(found) == 0 {
		message := "nothing was exchanged with the other clusters yet"
		if !e.read.IsZero() {
			message = "the shared trust was read at " + stamp(e.read)
		}
		add(check.OK, "exchange", message)
	}
	return found
}

// waits says what waits for the exchange, and whether anything does now. Called with mu held.
func (e *exchange) waits(now time.Time) (string, bool) {
	var moving []string
	untold := slices.Clone(e.untold)
	set := e.keeper.current.Load()
	for _, l := range set.shares(now) {
		row, _ := set.row(l.ID)
		if l.Stands == shared.Leaving || l.Stands == shared.Believed && row.State != ca.Active {
			moving = append(moving, l.ID)
		}
		if r, ok := e.own.Find(l.Fingerprint); (!ok || r.Here != l.Stands) && l.Stands != shared.Removed && !slices.Contains(untold, l.ID) {
			untold = append(untold, l.ID)
		}
	}
	var all []string
	if len(untold) > 0 {
		all = append(all, "the other clusters are not told what was decided here about "+strings.Join(untold, ", "))
	}
	if len(moving) > 0 && len(e.keeper.policy.Peers) > 0 {
		all = append(all, "the rotation of "+strings.Join(moving, ", ")+" waits for reports")
	}
	if len(all) == 0 {
		all = append(all, "nothing waits for it now")
	}
	if !e.holds.IsZero() {
		all = append(all, "the others can rely on our last report until "+stamp(e.holds))
	}
	return strings.Join(all, "; "), len(untold)+len(moving) > 0
}

// Shared returns what the clusters of a trust domain share, for one that begins (InstallConfig.Trust): the pinned root must
// be among what they believe. It reports false where nothing is shared yet: the cluster is the first one. peers are the other
// clusters, one of which must have written it.
func Shared(ctx context.Context, place Exchange, td spiffeid.TrustDomain, peers []Peer, pinned ca.Fingerprint) (Trust, bool, error) {
	text, version, err := place.Read(ctx, trustDocument)
	if err != nil || text == nil {
		return Trust{}, false, err
	}
	fail := func(err error) (Trust, bool, error) {
		return Trust{}, false, fmt.Errorf("version %d of the shared trust of %s: %w", version, td.Name(), err)
	}
	s, err := shared.Open(text, td, writers(peers))
	if err != nil {
		return fail(err)
	}
	t := Trust{Cluster: s.Cluster}
	var certs []*x509.Certificate
	var names []string
	found := false
	for _, r := range s.Roots {
		if r.State == ca.Removed {
			continue
		}
		der, err := r.DER()
		if err != nil {
			return fail(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return fail(fmt.Errorf("%s can't be read: %w", r.ID, err))
		}
		certs, names, found = append(certs, cert), append(names, r.Fingerprint), found || pinned.Of(der)
		t.Roots = append(t.Roots, TrustedRoot{Certificate: cert, State: r.State, Leaving: r.Leaving, Tainted: r.Tainted})
	}
	if !found {
		return fail(fmt.Errorf("the root of the fingerprint given is not among what the clusters believe (%s): ask the root's holder which one is right", strings.Join(names[:min(len(names), 8)], ", ")))
	}
	b, err := trust.NewBundle(td, 1, certs)
	if err != nil {
		return fail(err)
	}
	t.Digest = TrustDigest(b.Digest())
	return t, true, nil
}
