package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/internal/bell"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

// Rotation is how a cluster's CAs are rotated.
type Rotation struct {
	rotation.Policy
	// Automatic: steps are taken when they can be; else only when an admin says so.
	Automatic bool
	// ReissueRate is how many certificates a second the server is asked for after a taint.
	ReissueRate float64
	// Peers are the other clusters under the shared roots.
	Peers []Peer
}

// Peer is another cluster, known by the key of its log.
type Peer struct{ Cluster, VerifierKey string }

// Requester makes certificate requests, PEM (package ca/ceremony).
type Requester interface {
	Request(key crypto.Signer, plan ca.Plan) ([]byte, error)
}

const (
	// maxSteps bounds how many steps are taken at once.
	maxSteps = 64
	// maxAuthorities bounds how many CAs a cluster has had that are kept.
	maxAuthorities = 1024
	// keptRemoved is how many removed intermediates are kept; the log keeps all.
	keptRemoved = 256
	// MaxSuccessors bounds how many successors are asked for at once.
	MaxSuccessors = 16
)

// keeper moves the mesh's CAs through their lives. It knows how they stand, asks package rotation what comes next, and makes
// it so: in the store with what the log is told, in the log, in memory, in this order.
type keeper struct {
	folder *Folder
	policy Rotation
	// algorithm is of the keys that are made here; prefix goes before the common names.
	algorithm keystore.Algorithm
	prefix    string
	requests  Requester
	// upstream signs requests without a person, for intermediates of this life (0 = the default); nil = people have them signed.
	upstream      ca.Upstream
	life          time.Duration
	upstreamState upstreamState
	store         *store.Store
	log           *slog.Logger
	// record logs what is about to be done, and changes nothing.
	record func(ctx context.Context, entries ...*auditv1.Entry) error
	// change makes a change durable and logged, then calls effect (outbox).
	change func(ctx context.Context, note *store.Note, commit func(*store.Store) error, effect func()) error
	// agents says what is known of those that are not banned.
	agents  func(now time.Time) []validator
	issuers *ca.Issuers
	bundles *trust.Bundles
	// words are what agents have said, where agents are heard.
	words func() []validator
	// logged is the newest state that the audit log knows of, where that was looked for.
	logged atomic.Pointer[published]
	// clock holds off what would come by itself while it is not believed; nil = it is.
	clock *clock

	// turn has a place for the one who changes something.
	turn    chan struct{}
	current atomic.Pointer[authorities]
	// replaced names the issuers whose leaves are to be replaced.
	replaced atomic.Pointer[[][]byte]
	// unopened is why the key of the active issuer could not be opened outside this process; nil = it is, or is no such key.
	unopened atomic.Pointer[trouble]
	// destroyed names the keys that were destroyed since the start, swept the set for which all were that could be. Both
	// belong to the one who keeps.
	destroyed map[keystore.Ref]bool
	swept     *authorities

	mu sync.Mutex
	// failing are the steps that came by themselves, and failed when they were last tried.
	failing map[stepID]*failedStep
	// keys are those that are open, by reference.
	keys map[keystore.Ref]keystore.Key
	// reports are the newest of the peers, by cluster.
	reports map[string]rotation.Report
	// history is what the bundles of the past held, oldest first.
	history []store.PastBundle
	// changed rings when the set or a report has changed.
	changed bell.Bell
}

func newKeeper(f *Folder, policy Rotation) *keeper {
	return &keeper{
		folder: f, policy: policy, log: f.Logger, turn: make(chan struct{}, 1),
		keys: map[keystore.Ref]keystore.Key{}, reports: map[string]rotation.Report{}, destroyed: map[keystore.Ref]bool{},
		failing: map[stepID]*failedStep{},
	}
}

// load reads everything from the store. What was believed and who signs is as it was at the last change.
func (k *keeper) load(ctx context.Context) error {
	rows, revision, err := k.store.Authorities(ctx)
	if err != nil {
		return err
	}
	bundle, _, err := k.store.Bundle(ctx, k.folder.TrustDomain)
	if err != nil {
		return err
	}
	set, err := newAuthorities(k.folder.TrustDomain, rows, revision, bundle)
	if err != nil {
		return err
	}
	issuers, err := k.open(ctx, set, set)
	if err != nil {
		return err
	}
	history, err := k.store.BundleHistory(ctx)
	if err != nil {
		return err
	}
	notes, err := k.store.PeerReports(ctx)
	if err != nil {
		return err
	}
	reports := map[string]rotation.Report{}
	for _, p := range k.policy.Peers {
		if note, ok := notes[p.Cluster]; ok {
			// A key that was changed in the configuration makes the old report void.
			if r, err := openReport(note, p, k.folder.TrustDomain); err == nil {
				reports[p.Cluster] = r
			} else {
				k.log.Warn("the stored report of a peer does not count any more", "peer", p.Cluster, "err", err)
			}
		}
	}
	k.mu.Lock()
	k.history, k.reports = history, reports
	k.mu.Unlock()
	return k.use(set, issuers)
}

// use takes a set into effect.
func (k *keeper) use(set *authorities, issuers []*ca.Issuer) error {
	if err := k.issuers.Replace(issuers...); err != nil {
		return err
	}
	k.current.Store(set)
	k.mu.Lock()
	if n := len(k.history); !set.bundle.IsZero() && (n == 0 || k.history[n-1].Sequence < set.bundle.Sequence()) {
		past := store.PastBundle{Sequence: set.bundle.Sequence(), Digest: set.bundle.Digest()}
		for _, r := range set.bundle.Roots() {
			past.Roots = append(past.Roots, rootID(r))
		}
		k.history = append(k.history, past)
	}
	k.findStale()
	k.changed.Ring()
	k.mu.Unlock()
	if set.bundle.IsZero() {
		return nil
	}
	return k.bundles.Set(set.bundle)
}

// open makes the issuers of a set: those that sign or have signed, the control CA, and those that may sign next. An issuer
// that was active before may be without its key; one that becomes active may not.
func (k *keeper) open(ctx context.Context, set, before *authorities) ([]*ca.Issuer, error) {
	var list []*ca.Issuer
	var why error
	for _, a := range set.rows {
		if a.Kind == ca.KindRoot || len(a.Chain) == 0 || a.State == ca.Removed {
			continue
		}
		was, _ := before.row(a.ID)
		issuer, keyless, err := k.issuer(ctx, set, a)
		switch {
		case err == nil:
			list = append(list, issuer)
		// A certificate that has just come is for the key that was asked with, or for none that will ever sign.
		case !keyless || len(was.Chain) == 0 && errors.Is(err, ca.ErrOtherKey):
			return nil, err
		case a.State != ca.Active:
			// It does not sign. If it is to sign one day, that is refused then.
			k.log.Warn("the key of an issuer that does not sign now can't be used", "issuer", a.ID, "state", string(a.State), "err", err)
		// Where a key is not on this machine, all else goes on without it: another one follows (loseKeys), or it is opened
		// later (reopen).
		case a.Kind != ca.KindIntermediate || was.State != ca.Active || a.Key.Backend == keystore.BackendFile:
			return nil, err
		case a.Key.Backend != keystore.BackendMemory || !errors.Is(err, keystore.ErrNotFound):
			why = err
		}
	}
	var last trouble
	if t := k.unopened.Load(); t != nil {
		last = *t
	}
	now, turned := last.after(why, k.folder.Now())
	if why == nil {
		k.unopened.Store(nil)
		return list, nil
	}
	if turned {
		k.log.Warn("the key of the active issuer can't be used now; it is tried again", "err", why)
	}
	k.unopened.Store(&now)
	return list, nil
}

// issuer makes the issuer of an authority that has a certificate; keyless says that its key is why it can't be made.
func (k *keeper) issuer(ctx context.Context, set *authorities, a store.Authority) (_ *ca.Issuer, keyless bool, err error) {
	key, err := k.key(ctx, a.Key)
	if err != nil {
		return nil, true, fmt.Errorf("issuer %s: %w", a.ID, err)
	}
	conf := ca.IssuerConfig{Name: a.ID, Hierarchy: a.Hierarchy(), TrustDomain: set.td, State: a.State, Key: key, Chain: set.chains[a.ID]}
	if a.Kind == ca.KindIntermediate {
		last := len(conf.Chain) - 1
		conf.Chain, conf.Roots = conf.Chain[:last], conf.Chain[last:]
	}
	issuer, err := ca.NewIssuer(conf)
	if keyless = errors.Is(err, ca.ErrOtherKey); keyless {
		k.forgetKey(a.Key) // the right one may be put back
	}
	return issuer, keyless, err
}

// key opens a key once: opening takes a while, for it is sealed against guessing.
func (k *keeper) key(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	k.mu.Lock()
	key, ok := k.keys[ref]
	k.mu.Unlock()
	if ok {
		return key, nil
	}
	key, err := k.folder.Keys.Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys[ref] = key
	return key, nil
}

func (k *keeper) forgetKey(ref keystore.Ref) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.keys, ref)
}

// destroyKeys destroys the keys of intermediates that were removed, each time after something has changed.
func (k *keeper) destroyKeys(ctx context.Context) error {
	set := k.current.Load()
	if k.swept == set || k.doubt() {
		return nil
	}
	var errs []error
	for _, a := range set.rows {
		if a.Kind != ca.KindIntermediate || a.State != ca.Removed || k.destroyed[a.Key] {
			continue
		}
		err := k.folder.Keys.Delete(ctx, a.Key)
		if errors.Is(err, keystore.ErrKept) {
			continue // when those before it are gone
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		k.destroyed[a.Key] = true
		k.forgetKey(a.Key)
		k.log.Debug("key of a removed intermediate destroyed, or gone before", "authority", a.ID, "key", a.Key.String())
	}
	if len(errs) == 0 {
		k.swept = set
	}
	return errors.Join(errs...)
}

// world is all that decides what comes next, with reports that are newer than those taken.
func (k *keeper) world(set *authorities, now time.Time, newer ...rotation.Report) rotation.World {
	heard := k.heard(newer...)
	return rotation.World{Authorities: set.lives(), Own: k.report(set, heard, now), Peers: heard}
}

// heard are the newest reports of the peers, those that have never reported included.
func (k *keeper) heard(newer ...rotation.Report) (all []rotation.Report) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, p := range k.policy.Peers {
		r, ok := k.reports[p.Cluster]
		if !ok {
			r = rotation.Report{Cluster: p.Cluster}
		}
		for _, n := range newer {
			if n.Cluster == p.Cluster && n.At.After(r.At) {
				r = n
			}
		}
		all = append(all, r)
	}
	return all
}

// outcome is what a change has done, or would do.
type outcome struct {
	changed bool
	// reports are what became of those that were given; done is what was changed before the steps that were taken.
	reports []heardReport
	done    []string
	taken   []rotation.Step
	forced  []string
	// dry: nothing was done.
	dry bool
	// before is the set as it was.
	before, set *authorities
	// world is what the last decision was taken by; next is what it left.
	world rotation.World
	next  []rotation.Step
}

// decision is what a person has asked for, or the schedule.
type decision struct {
	verb, reason string
	by           *auditv1.Evidence
	dry          bool
	// only is the authority whose steps are taken; "" = all.
	only string
	// force overrides the waits of the next step of that authority, where they can be.
	force bool
	// overridden is what the edit itself has overridden, sentences; nil = it can't.
	overridden *[]string
	// notes are reports of peers; names are what who gave them calls them.
	notes [][]byte
	names []string
}

// selfDoor is the door of what comes by itself.
const selfDoor = "self"

// scheduled is what comes by itself.
func scheduled() decision { return decision{verb: "schedule", by: &auditv1.Evidence{Door: selfDoor}} }

// byItself reports whether nobody has asked for it.
func (d decision) byItself() bool { return d.by.GetDoor() == selfDoor }

// do makes a change that a person asked for, then every step that follows from it. edit gets the set as it stands and
// returns it as it is to be; nil = no change but the steps.
func (k *keeper) do(ctx context.Context, d decision, edit func(*authorities, rotation.World, time.Time) (*authorities, []*auditv1.Entry, error)) (outcome, error) {
	done, err := k.myTurn(ctx)
	if err != nil {
		return outcome{}, err
	}
	defer done()
	// Begun, it is finished: a client that hangs up must not stop it half way.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), workTimeout)
	defer cancel()
	o := outcome{dry: d.dry, before: k.current.Load(), set: k.current.Load()}
	var reports []rotation.Report
	if o.reports, err = k.takeReports(ctx, d); err != nil {
		return o, err
	}
	for _, r := range o.reports {
		if r.newer() {
			reports, o.changed = append(reports, r.Report), true
		}
	}
	if edit != nil {
		now := k.folder.Now()
		next, entries, err := edit(o.set, k.world(o.set, now, reports...), now)
		if err != nil {
			return o, err
		}
		if next != nil {
			if d.overridden != nil {
				o.forced = *d.overridden
			}
			before := o.set
			if err := k.commit(ctx, &o, next, d, now, d.reason, o.forced, entries...); err != nil {
				return o, err
			}
			o.done = next.said(before)
		}
	}
	return o, k.advance(ctx, &o, d, reports)
}

// myTurn waits for the turn to change something; it ends with the function that it returns.
func (k *keeper) myTurn(ctx context.Context) (done func(), err error) {
	select {
	case k.turn <- struct{}{}:
		return func() { <-k.turn }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// heldBack reports whether no step is taken now, but for what a person has just asked for: steps depend on the time, and where
// they are not automatic, or the database was restored from an older copy, on somebody's word. Without an issuer there is
// nothing to wait for: what a cluster begins with, or goes on with after its key in memory was lost, needs no other word.
func (k *keeper) heldBack(d decision, set *authorities) bool {
	return k.doubt() || set.signs() && (!k.policy.Automatic || k.outdated(set)) && d.verb != "advance"
}

// advance takes every step that can be taken. One that can't be made does not keep the others waiting.
func (k *keeper) advance(ctx context.Context, o *outcome, d decision, reports []rotation.Report) error {
	var failed []rotation.Step
	var errs []error
	for range maxSteps {
		now := k.folder.Now()
		o.world = k.world(o.set, now, reports...)
		o.next = rotation.Next(k.policy.Policy, o.world, now)
		if k.heldBack(d, o.set) {
			break
		}
		i := slices.IndexFunc(o.next, func(s rotation.Step) bool {
			same := func(f rotation.Step) bool { return f.Authority == s.Authority && f.To == s.To }
			if d.only != "" && s.Authority != d.only || slices.ContainsFunc(failed, same) {
				return false
			}
			if s.Authority == "" && k.requests == nil {
				return false // without a server nothing is made; it does so when it starts
			}
			return s.Ready(d.force)
		})
		if i < 0 {
			break
		}
		step := o.next[i]
		if err := k.pausing(step); err != nil && d.byItself() {
			failed, errs = append(failed, step), append(errs, err)
			continue
		}
		taken, forced, err := k.take(ctx, o, d, step, now)
		if err != nil {
			failed, errs = append(failed, step), append(errs, err)
			if d.byItself() {
				k.failed(step, err)
			}
			continue
		}
		o.taken, o.forced = append(o.taken, taken), append(o.forced, forced...)
		if step.Authority == d.only {
			d.force = false // the next step of that authority is another decision
		}
	}
	if d.byItself() {
		k.forgetFailed(o.next)
		if len(errs) > 0 {
			return fmt.Errorf("%w: %w", errStep, errors.Join(errs...))
		}
	}
	return errors.Join(errs...)
}

// take takes one step, and returns it with the name of what it has made, and what was overridden.
func (k *keeper) take(ctx context.Context, o *outcome, d decision, step rotation.Step, now time.Time) (_ rotation.Step, forced []string, err error) {
	root := step.Authority
	if row, _ := o.set.row(step.Authority); row.Kind == ca.KindIntermediate {
		root = row.Root
	}
	forced = k.breaks(o.set, root, step.Waits, step.To == ca.Removed, now)
	var next *authorities
	if step.Authority == "" {
		row, err := k.successor(ctx, d, o.set, nil)
		if err != nil {
			return step, nil, err
		}
		next, err = o.set.edit(nil, row)
		if err != nil {
			return step, nil, err
		}
		if !o.dry {
			step.Authority = row.ID
		}
	} else if next, err = o.set.edit(rotation.Apply(k.policy.Policy, o.set.lives(), step, now)); err != nil {
		return step, nil, err
	}
	if err := k.commit(ctx, o, next, d, now, step.Because, forced); err != nil {
		return step, nil, err
	}
	if !o.dry {
		k.log.Info("CA moved", "authority", step.Authority, "from", string(step.From), "to", string(step.To), "because", step.Because)
		if len(forced) > 0 {
			k.log.Warn("a step was forced", "authority", step.Authority, "by", d.by.GetCaller(), "overridden", forced)
		}
	}
	return step, forced, nil
}

// rehearse refuses what would be refused then, since who is to sign can't: a dry run opens no other keys.
func (k *keeper) rehearse(ctx context.Context, o *outcome, next *authorities) error {
	for _, a := range next.rows {
		if was, _ := o.set.row(a.ID); a.Kind == ca.KindIntermediate && a.State == ca.Active && was.State != ca.Active {
			if _, _, err := k.issuer(ctx, next, a); err != nil {
				return err
			}
		}
	}
	return nil
}

// breaks says of each wait that is overridden who notices. Workloads validate with what their agent believes: before others
// sign under a root, those refuse that don't have it; after it is removed, those here that had it.
func (k *keeper) breaks(set *authorities, root string, waits []rotation.Wait, removed bool, now time.Time) (forced []string) {
	for _, w := range waits {
		text := w.For + ": "
		switch {
		case removed && w.Code == rotation.WaitLeaves && w.Cluster == "":
			text += "workloads here refuse whoever has such a certificate from now on"
			if holding := k.holding(set, root, now); len(holding) > 0 {
				text += "; " + check.Some(holding) + " may have some"
			}
		case removed && w.Code == rotation.WaitLeaves:
			text += "workloads here refuse those of cluster " + w.Cluster + " that have such a certificate from now on"
		case removed:
			text += "workloads here refuse those of that cluster that have, or are given, a certificate under " + root + " from now on"
		case w.Code == rotation.WaitPeer && len(w.Missing) > 0:
			text += "the workloads of " + check.Some(w.Missing) + " there refuse peers that have a certificate under " + root + " until they have it"
		case w.Code == rotation.WaitPeer:
			text += "workloads there that don't have " + root + " refuse peers that have a certificate under it"
		case len(w.Missing) > 0:
			text += "the workloads of " + check.Some(w.Missing) + " refuse peers that have a certificate under " + root + ", and get none themselves, until they have it"
		default:
			text += "workloads that don't have " + root + " yet refuse peers that have a certificate under it"
		}
		forced = append(forced, text)
	}
	return forced
}

// holding names the agents that have, or may have, a leaf under the root.
func (k *keeper) holding(set *authorities, root string, now time.Time) (agents []string) {
	for _, v := range k.validators(now) {
		if set.holds(v, root) {
			agents = append(agents, v.agent)
		}
	}
	return agents
}

// commit makes the next set the present one: stored and logged, then in effect. A dry run only looks whether it could be.
func (k *keeper) commit(ctx context.Context, o *outcome, next *authorities, d decision, now time.Time, reason string, forced []string, entries ...*auditv1.Entry) error {
	changes := next.changes(o.set)
	if len(changes) == 0 {
		return nil
	}
	// Of two contents of a revision, nobody could tell from the log which one was in effect.
	next.revision = max(o.set.revision, k.newestLogged().revision) + 1
	forgotten := next.forget(keptRemoved)
	if len(next.rows) > maxAuthorities {
		return fmt.Errorf("the cluster would have %d CAs: at most %d are kept", len(next.rows), maxAuthorities)
	}
	if o.dry {
		if err := k.rehearse(ctx, o, next); err != nil {
			return err
		}
		o.set, o.changed = next, true
		return nil
	}
	// What could not work must not be stored: keys are opened and chains checked before.
	issuers, err := k.open(ctx, next, o.set)
	if err != nil {
		return err
	}
	if _, err := ca.NewIssuers(issuers...); err != nil {
		return err
	}
	rows := make([]store.Authority, len(changes))
	for i, c := range changes {
		rows[i] = c.after
		entries = append(entries, &auditv1.Entry{Event: &auditv1.Entry_AuthorityChanged{AuthorityChanged: &auditv1.AuthorityChanged{
			Authority: c.after.ID, Kind: c.after.Kind, From: string(c.before.State), To: string(c.after.State),
			Verb: d.verb, Reason: reason + next.sameKey(c), Forced: forced, Revision: next.revision, BundleSequence: next.bundle.Sequence(), Evidence: d.by,
		}}})
	}
	note, err := noteOf(now, entries)
	if err != nil {
		return err
	}
	var bundle trust.Bundle
	if next.bundle.Sequence() != o.set.bundle.Sequence() {
		bundle = next.bundle
	}
	if err := k.change(ctx, note, func(st *store.Store) error {
		return st.ChangeAuthorities(ctx, store.AuthorityChange{Base: o.set.revision, Next: next.revision, Put: rows, Drop: forgotten, Bundle: bundle})
	}, func() { err = k.use(next, issuers) }); err != nil {
		return undone{err}
	}
	if err != nil {
		return err
	}
	o.set, o.changed = k.current.Load(), true // which is next, but for what it took longer to come into effect
	return nil
}

// noteOf is what the log is to be told of a change that was decided now.
func noteOf(now time.Time, entries []*auditv1.Entry) (*store.Note, error) {
	note := &store.Note{}
	for _, e := range entries {
		e.Time = now.UnixNano()
		raw, err := proto.Marshal(e)
		if err != nil {
			return nil, fmt.Errorf("encode an entry of the log: %w", err)
		}
		note.Entries = append(note.Entries, raw)
	}
	return note, nil
}

// successor asks for the next intermediate. In a dry run there is no key, only a look whether it could be made, and what would be
// has no name.
func (k *keeper) successor(ctx context.Context, d decision, set *authorities, also []store.Authority) (store.Authority, error) {
	if !d.dry {
		return k.request(ctx, set, also)
	}
	rows, unnamed := slices.Concat(set.rows, also), 0
	for _, a := range rows {
		if a.Kind == ca.KindIntermediate && a.Key.IsZero() {
			unnamed++
		}
	}
	if _, _, err := k.folder.Keys.Find(ctx, IntermediateKey, k.algorithm, k.folder.newestKey(ctx, k.algorithm, rows)+unnamed); err != nil {
		return store.Authority{}, err
	}
	now := k.folder.Now()
	return store.Authority{
		Authority: rotation.Authority{ID: fmt.Sprintf("new intermediate %d", unnamed+1), Kind: ca.KindIntermediate, State: ca.Prepared, Since: now}, Created: now,
	}, nil
}

// request makes the key of the next intermediate and the request for its certificate. A key that an earlier try has made
// and nothing points to is taken, so that tries don't pile up keys.
func (k *keeper) request(ctx context.Context, set *authorities, also []store.Authority) (store.Authority, error) {
	rows := slices.Concat(set.rows, also)
	key, err := k.folder.Keys.Create(ctx, IntermediateKey, k.algorithm, k.folder.newestKey(ctx, k.algorithm, rows))
	if err != nil {
		return store.Authority{}, err
	}
	now := k.folder.Now()
	plan, err := ca.NewIntermediatePlan(k.folder.TrustDomain, k.folder.Cluster, key.Public(), now, 0)
	if err != nil {
		return store.Authority{}, err
	}
	plan.CommonName = prefixed(k.prefix, plan.CommonName)
	text, err := k.requests.Request(key, plan)
	if err != nil {
		return store.Authority{}, fmt.Errorf("make the request for an intermediate of cluster %s: %w", k.folder.Cluster, err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return store.Authority{}, fmt.Errorf("make the request for an intermediate of cluster %s: what was made is not PEM", k.folder.Cluster)
	}
	return store.Authority{
		Authority: rotation.Authority{ID: nextIntermediate(rows), Kind: ca.KindIntermediate, State: ca.Prepared, Since: now},
		Key:       key.Ref(), CSR: block.Bytes, Created: now,
	}, nil
}

// newestKey is the newest version that an intermediate's key has had where the next is made. Each backend counts its own: one
// that can't skip versions makes those that are passed over.
func (f *Folder) newestKey(ctx context.Context, alg keystore.Algorithm, rows []store.Authority) int {
	newest, all := map[string]int{}, 0
	for _, a := range rows {
		if a.Key.Name == IntermediateKey {
			newest[a.Key.Backend] = max(newest[a.Key.Backend], a.Key.Version)
			all = max(all, a.Key.Version)
		}
	}
	if all == 0 {
		return 0
	}
	home, _, err := f.Keys.Find(ctx, IntermediateKey, alg, 0)
	if err != nil {
		return all // after which no number comes again either; what is wrong shows when the key is made
	}
	return newest[home.Backend]
}

// nextIntermediate is the ID of the next intermediate: they count on wherever their keys are.
func nextIntermediate(rows []store.Authority) string {
	newest := 0
	for _, a := range rows {
		if number, ok := strings.CutPrefix(a.ID, IntermediateKey+"-"); ok && a.Kind == ca.KindIntermediate {
			n, _ := strconv.Atoi(number)
			newest = max(newest, n)
		}
	}
	return authorityID(IntermediateKey, newest+1)
}

// keep takes the steps that come by themselves, for as long as ctx lives: when something changed, when a time has come, and
// every few seconds, since clocks jump.
func (k *keeper) keep(ctx context.Context, every time.Duration, woken <-chan struct{}) {
	kept := ""
	for {
		changed := k.changed.Next()
		wait := every
		if err := errors.Join(k.loseKeys(ctx), k.reopen(ctx)); err != nil && ctx.Err() == nil {
			k.log.Error("could not take in how it stands with the keys of the issuers; it is tried again", "err", err)
		}
		o, _ := k.do(ctx, scheduled(), nil) // what fails is told of where it does
		if err := k.destroyKeys(ctx); err == nil {
			kept = ""
		} else if ctx.Err() == nil && kept != err.Error() {
			kept = err.Error()
			k.log.Error("could not destroy the keys of removed intermediates; it is tried again", "err", err)
		}
		if at := firstEnd(o.next, k.folder.Now()); !at.IsZero() {
			wait = min(max(at.Sub(k.folder.Now()), 0)+time.Millisecond, every)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-changed:
		case <-woken:
			// Acknowledgements come by the thousand, and each look costs in proportion to the agents.
			bell.Wait(ctx, max(100*time.Millisecond, time.Duration(validators(o.world.Own))*perValidator), nil)
		case <-timer.C:
		}
		timer.Stop()
	}
}

// perValidator spaces the looks at what agents say, so that they take a small part of a core however many agents there are.
const perValidator = 100 * time.Microsecond

// validators is how many agents a report counts.
func validators(r rotation.Report) int {
	if len(r.Roots) == 0 {
		return 0
	}
	return r.Roots[0].Validators
}

// firstEnd is when the clock next ends a wait; zero = none does.
func firstEnd(steps []rotation.Step, now time.Time) (at time.Time) {
	for _, s := range steps {
		for _, w := range s.Waits {
			if w.Until.After(now) && (at.IsZero() || w.Until.Before(at)) {
				at = w.Until
			}
		}
	}
	return at
}

// stale names the issuers, by key identifier, whose leaves agents are to replace ahead of time.
func (k *keeper) stale() [][]byte { return *k.replaced.Load() }

// findStale is for when the set or a report has changed. Called with mu held.
func (k *keeper) findStale() {
	set := k.current.Load()
	w := rotation.World{Authorities: set.lives()}
	for _, r := range k.reports {
		w.Peers = append(w.Peers, r)
	}
	var ids [][]byte
	for _, a := range rotation.Stale(w, k.folder.Now()) {
		if chain := set.chains[a]; len(chain) > 0 {
			ids = append(ids, chain[0].SubjectKeyId)
		}
	}
	slices.SortFunc(ids, bytes.Compare)
	k.replaced.Store(&ids)
}

// installation is what an admin gives to install.
type installation struct {
	// chains is PEM, each ours first and the root last.
	chains []byte
	pinned ca.Fingerprint
	trust  Trust
	// first: nobody can tell yet what the other clusters believe.
	first bool
	by    *auditv1.Evidence
}

// install takes chains that an upstream has signed, and the roots that the cluster is to believe beside theirs.
func (k *keeper) install(set *authorities, w rotation.World, now time.Time, x installation) (*authorities, []*auditv1.Entry, error) {
	chains, err := ca.ParseChains(x.chains)
	if err != nil {
		return nil, nil, err
	}
	pinned, by := x.pinned, x.by
	before := set
	if x.trust.isZero() && !x.first && k.blind() {
		return nil, nil, fmt.Errorf("cluster %s begins, and %s may believe or sign under other roots by now: take signet trust export --format json from one that serves and give it with --trust, or say --first if none serves yet", k.folder.Cluster, k.peerNames())
	}
	if set, err = k.join(set, x.trust, chains, now); err != nil {
		return nil, nil, err
	}
	w.Authorities = set.lives()
	var entries []*auditv1.Entry
	for i, chain := range chains {
		root := chain[len(chain)-1]
		switch {
		case !bytes.Equal(root.RawIssuer, root.RawSubject):
			return nil, nil, fmt.Errorf("chain ends with %q, which is not a root: give the whole file that `signet root sign` wrote, in its order: our certificate first, the root last", root.Subject)
		case !pinned.Of(root.Raw):
			return nil, nil, fmt.Errorf("the root in the chain is %s, but the fingerprint given is another one: ask the root's holder which one is right before you install anything", ca.CertificateFingerprint(root.Raw))
		case len(chain) == 1 && len(chains) > 1:
			return nil, nil, errors.New("chain is in the wrong order: our certificate comes first, the root last")
		case len(chain) == 1:
			return nil, nil, errors.New("chain holds the root only: give the whole file that `signet root sign` wrote")
		}
		row, err := set.requested(k.folder.Cluster, chain[0])
		if err != nil {
			return nil, nil, err
		}
		der := make([][]byte, len(chain)-1)
		for i, c := range chain[:len(chain)-1] {
			der[i] = c.Raw
		}
		if len(row.Chain) > 0 {
			if !slices.EqualFunc(row.Chain, der, bytes.Equal) {
				return nil, nil, fmt.Errorf("%s is installed already, with another chain: an intermediate is never replaced under the same key", row.ID)
			}
			continue
		}
		// One whose key is lost never signs. But that it has a certificate has to be known, since what is forged under it is accepted.
		exposed := !row.Tainted.IsZero()
		if row.State == ca.Removed && !exposed {
			return nil, nil, fmt.Errorf("%s was given up (see signet ca show %s): start a rotation and have the new request signed", row.ID, row.ID)
		}
		plan, err := ca.NewIntermediatePlan(k.folder.TrustDomain, k.folder.Cluster, chain[0].PublicKey, time.Time{}, 0)
		if err != nil {
			return nil, nil, err
		}
		request, err := x509.ParseCertificateRequest(row.CSR)
		if err != nil {
			return nil, nil, fmt.Errorf("stored request of %s can't be read: %w", row.ID, err)
		}
		plan.CommonName = request.Subject.CommonName
		// One that begins later is for later, but a cluster can't begin with it.
		plan.Now = func() time.Time { return now }
		if _, begun := set.activeRoot(); begun || i > 0 {
			plan.Now = func() time.Time { return latest(now, chain[0].NotBefore) }
		}
		if err := plan.Check(chain[:len(chain)-1], chain[len(chain)-1:]); err != nil {
			return nil, nil, err
		}
		above := chain[:len(chain)-1]
		if exposed {
			above = above[1:]
		}
		for _, c := range above {
			if err := w.LostKey(rotation.Authority{ID: fmt.Sprintf("%q in the chain of %s", c.Subject, row.ID), KeyFingerprint: ca.KeyFingerprint(c.RawSubjectPublicKeyInfo)}); err != nil {
				return nil, nil, err
			}
		}
		id := rootID(root)
		if len(set.bundle.Roots()) == 0 && !exposed {
			// What a person installs first is what the cluster begins with.
			if set, err = set.addRoot(k.policy.Policy, w, root, now); err != nil {
				return nil, nil, err
			}
			w.Authorities = set.lives()
		}
		notBefore, notAfter := bounds(chain)
		var lives []rotation.Authority
		if exposed {
			lives, err = rotation.Exposed(w, row.ID, id, notBefore, notAfter, now)
		} else {
			lives, err = rotation.Signed(k.policy.Policy, w, row.ID, id, notBefore, notAfter, now)
		}
		if err != nil {
			return nil, nil, err
		}
		row.Chain = der
		if set, err = set.edit(lives, row); err != nil {
			return nil, nil, err
		}
		w.Authorities = set.lives()
		raw := make([][]byte, len(chain))
		for i, c := range chain {
			raw[i] = c.Raw
		}
		entries = append(entries, &auditv1.Entry{Event: &auditv1.Entry_AuthorityInstalled{AuthorityInstalled: &auditv1.AuthorityInstalled{
			Kind: ca.KindIntermediate, Chain: raw, Evidence: by,
		}}})
	}
	if len(entries) == 0 && set == before {
		return nil, nil, nil
	}
	return set, entries, nil
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// startIntermediate asks for the next intermediate: the one that stands ready, and requests for as many as are wanted to
// stand ready; for one more where those that do can't begin yet.
func (k *keeper) startIntermediate(ctx context.Context, d decision, successors int) (outcome, error) {
	if successors < 1 || successors > MaxSuccessors {
		return outcome{set: k.current.Load()}, fmt.Errorf("%d successors: want 1 to %d", successors, MaxSuccessors)
	}
	return k.do(ctx, d, func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
		all, ok := rotation.Want(k.policy.Policy, w, now)
		missing := successors - set.waiting()
		if !ok {
			missing = max(missing, 1)
		}
		var rows []store.Authority
		for range missing {
			row, err := k.successor(ctx, d, set, rows)
			if err != nil {
				return nil, nil, err
			}
			row.Wanted = !ok && len(rows) == 0
			rows = append(rows, row)
		}
		next, err := set.edit(all, rows...)
		return next, nil, err
	})
}

// waiting is how many successors stand ready or wait for a signature.
func (s *authorities) waiting() int {
	n := 0
	for _, a := range s.rows {
		above, _ := s.row(a.Root)
		if a.Kind == ca.KindIntermediate && (a.State == ca.Prepared || a.State == ca.Published) && a.Tainted.IsZero() && above.State != ca.Retired {
			n++
		}
	}
	return n
}

// startRoot begins to replace the root of the active issuer: the new one is published, and a request is made for an
// intermediate under it.
func (k *keeper) startRoot(ctx context.Context, d decision, root *x509.Certificate) (outcome, error) {
	return k.do(ctx, d, func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
		if err := rotation.MayBring(w, rootID(root), now); err != nil {
			return nil, nil, err
		}
		if err := begun(root, k.policy.Skew, now); err != nil {
			return nil, nil, err
		}
		next, err := set.addRoot(k.policy.Policy, w, root, now)
		if err != nil {
			return nil, nil, err
		}
		w.Authorities = next.lives()
		return next.ifEdited(rotation.StartRoot(w, rootID(root), now))
	})
}

// abort turns a rotation back, see rotation.Abort; with force although what is to take over again may not yet.
func (k *keeper) abort(ctx context.Context, d decision, id string, force bool) (outcome, error) {
	d.overridden = new([]string)
	return k.do(ctx, d, func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
		lives, err := rotation.Abort(k.policy.Policy, w, id, false, now)
		var early *rotation.NotNow
		if force && errors.As(err, &early) {
			*d.overridden = k.breaks(set, early.Root, early.Waits, false, now)
			lives, err = rotation.Abort(k.policy.Policy, w, id, true, now)
		}
		return set.ifEdited(lives, err)
	})
}
