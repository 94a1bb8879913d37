package server

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

// Folder is a cluster's state folder: whose it is, and the keys that belong to it.
//
//	LOCK        held by the one process that uses the folder
//	signet.db   who may ask, which authorities there are (package store)
//	log/        what was issued (package audit)
//	keys/       where the command line keeps the keys, if they are files (package keystore)
type Folder struct {
	Dir         string
	TrustDomain spiffeid.TrustDomain
	Cluster     string
	// Instance tells the servers of a cluster apart; it is part of the log's origin.
	Instance string
	Keys     keystore.Store
	// CheckpointInterval of the log; 0 = the log's default.
	CheckpointInterval time.Duration
	// Now is the clock; nil = time.Now.
	Now    func() time.Time
	Logger *slog.Logger
}

// Names of keys. The first version of each is made by Init.
const (
	ControlKey      = "control-ca"
	IntermediateKey = "intermediate"
	logKey          = "log"
)

// Facts about a folder, written once. logKeyFact also says that Init got as far as having a log.
const (
	trustDomainFact = "trust_domain"
	clusterFact     = "cluster"
	instanceFact    = "instance"
	logKeyFact      = "log_key"
	verifierFact    = "log_verifier_key"
)

func databasePath(dir string) string { return filepath.Join(dir, "signet.db") }

// ErrNoCluster: Init has never been in the state folder.
var ErrNoCluster = errors.New("holds no cluster yet")

// hasCluster refuses a state folder in which Init has never been.
func hasCluster(dir string) error {
	if _, err := os.Stat(databasePath(dir)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("folder %s %w: make one with: signet cluster init", dir, ErrNoCluster)
	}
	return nil
}

// LogDir is where the audit log of a state folder is.
func LogDir(dir string) string { return filepath.Join(dir, "log") }

// Origin is the name of an instance's audit log.
func (f Folder) Origin() string {
	return f.TrustDomain.Name() + "/" + f.Cluster + "/" + f.Instance
}

func (f *Folder) complete() error {
	if f.Now == nil {
		f.Now = time.Now
	}
	if f.Logger == nil {
		f.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case f.Dir == "":
		return errors.New("no state folder")
	case f.TrustDomain.IsZero():
		return errors.New("no trust domain")
	case f.Keys == nil:
		return errors.New("no keystore")
	}
	if err := identity.ParseName("cluster", f.Cluster); err != nil {
		return err
	}
	return identity.ParseName("instance", f.Instance)
}

// opened is a folder in use.
type opened struct {
	lock  *durable.DirLock
	store *store.Store
	log   *audit.Log
}

// open takes the folder and opens its store. A folder in which Init has never been is refused unless it is Init that opens.
func (f *Folder) open(ctx context.Context, init bool) (*opened, error) {
	if err := f.complete(); err != nil {
		return nil, err
	}
	if init {
		if err := durable.Dir(f.Dir); err != nil {
			return nil, err
		}
	} else if err := hasCluster(f.Dir); err != nil {
		return nil, err
	}
	o := &opened{}
	var err error
	if o.lock, err = durable.Lock(f.Dir); err != nil {
		return nil, err
	}
	if o.store, err = store.Open(ctx, store.Config{Path: databasePath(f.Dir), Logger: f.Logger}); err != nil {
		return nil, errors.Join(err, o.close())
	}
	for _, fact := range f.facts() {
		if err := o.store.SetMeta(ctx, fact[0], fact[1]); err != nil {
			return nil, errors.Join(err, o.close())
		}
	}
	return o, nil
}

// facts are what the folder is of. It belongs to one instance of one cluster for ever; the store refuses another value.
func (f *Folder) facts() [][2]string {
	return [][2]string{{trustDomainFact, f.TrustDomain.Name()}, {clusterFact, f.Cluster}, {instanceFact, f.Instance}}
}

// openLog opens the log with its key.
func (f *Folder) openLog(ctx context.Context, o *opened, key keystore.Key, metrics prometheus.Registerer) (err error) {
	// Once it was begun it must be there: a new one in its place would hide what was issued.
	_, begun, err := o.store.Meta(ctx, verifierFact)
	if err != nil {
		return err
	}
	o.log, err = audit.Open(ctx, audit.Config{
		Dir: LogDir(f.Dir), Origin: f.Origin(), Signer: key, MustExist: begun,
		CheckpointInterval: f.CheckpointInterval, Metrics: metrics, Logger: f.Logger,
	})
	return err
}

// close gives everything back, in the order in which it depends on each other.
func (o *opened) close() error {
	var errs []error
	if o.log != nil {
		ctx, cancel := context.WithTimeout(context.Background(), workTimeout)
		defer cancel()
		errs = append(errs, o.log.Close(ctx))
	}
	if o.store != nil {
		errs = append(errs, o.store.Close())
	}
	if o.lock != nil {
		errs = append(errs, o.lock.Close())
	}
	return errors.Join(errs...)
}

// key opens a key by the reference that is stored.
func (f *Folder) key(ctx context.Context, ref string) (keystore.Key, error) {
	r, err := keystore.ParseRef(ref)
	if err != nil {
		return nil, err
	}
	return f.Keys.Open(ctx, r)
}

// Ceremony makes CA certificates and requests for them (package ca/ceremony, which a server at work does without).
type Ceremony interface {
	// SelfSign logs and makes the certificate of a CA that signs itself.
	SelfSign(ctx context.Context, log ca.Log, key crypto.Signer, plan ca.Plan, by *auditv1.Evidence) (*x509.Certificate, audit.Receipt, error)
	// Request makes a certificate request, PEM.
	Request(key crypto.Signer, plan ca.Plan) ([]byte, error)
}

// InitConfig is what `cluster init` needs.
type InitConfig struct {
	Folder
	// Algorithm of the CA keys; "" = ECDSA P-256.
	Algorithm keystore.Algorithm
	Ceremony  Ceremony
	// NamePrefix goes before the common names of the CAs: "DEV ".
	NamePrefix string
	// Upstream signs the intermediates, so that no request is made here: the server has its first one signed when it starts.
	// nil = a person carries a request to the root.
	Upstream ca.Upstream
	Rotation Rotation
	// RootFingerprint is what the admin was told the root's is. It is needed with an upstream, until the cluster has a root.
	RootFingerprint string
	// Exchange is where other clusters may have said what they believe; nil = nowhere.
	Exchange Exchange
	// DryRun only says what would be made.
	DryRun bool
}

// InitResult is what a person carries to the root, and what they compare there.
type InitResult struct {
	// CSR of the intermediate, PEM; nil where an upstream signs.
	CSR []byte
	// KeyFingerprint is of the CSR's key; `root sign` wants it.
	KeyFingerprint string
	// Roots are the fingerprints of the roots that the cluster begins with, where an upstream signs.
	Roots []string
	// ControlCA is the fingerprint of the control CA's certificate.
	ControlCA string
	// LogVerifierKey is what auditors check the log with.
	LogVerifierKey string
	// Created is false when everything was there already.
	Created bool
	// Would is what would be made, in words, and all that a dry run says.
	Would []string
}

// Init makes what a cluster consists of before its root has said yes: the log and its key, the control CA, the first
// intermediate's key and the request for its certificate. It may be interrupted anywhere and run again: what is missing
// is completed, what is there is kept, and what was printed once is printed again.
func Init(ctx context.Context, c InitConfig) (_ InitResult, err error) {
	if c.Ceremony == nil {
		return InitResult{}, errors.New("cluster init: no ceremony to make the control CA with")
	}
	if c.Algorithm == "" {
		c.Algorithm = keystore.ECDSAP256
	}
	if c.DryRun {
		would, err := c.rehearse(ctx)
		return InitResult{Would: would}, err
	}
	o, err := c.open(ctx, true)
	if err != nil {
		return InitResult{}, err
	}
	defer func() { err = errors.Join(err, o.close()) }()

	// The log first: everything after this is in it. A crash before the fact is written leaves a key that the next run finds.
	if _, known, err := o.store.Meta(ctx, logKeyFact); err != nil {
		return InitResult{}, err
	} else if err := c.notOrphaned(known); err != nil {
		return InitResult{}, err
	}
	key, err := c.Keys.Create(ctx, logKey, keystore.Ed25519, 0)
	if err != nil {
		return InitResult{}, err
	}
	if err := o.store.SetMeta(ctx, logKeyFact, key.Ref().String()); err != nil {
		return InitResult{}, err
	}
	if err := c.openLog(ctx, o, key, nil); err != nil {
		return InitResult{}, err
	}
	if err := o.store.SetMeta(ctx, verifierFact, o.log.VerifierKey()); err != nil {
		return InitResult{}, err
	}
	r := InitResult{LogVerifierKey: o.log.VerifierKey()}

	rows, revision, err := o.store.Authorities(ctx)
	if err != nil {
		return InitResult{}, err
	}
	control, ok := oldest(rows, ca.KindControl)
	if !ok {
		r.Created = true
		if control, err = c.makeControlCA(ctx, o); err != nil {
			return InitResult{}, err
		}
		if err = o.store.ChangeAuthorities(ctx, store.AuthorityChange{Base: revision, Next: revision + 1, Put: []store.Authority{control}}); err != nil {
			return InitResult{}, err
		}
		revision++
	}
	r.ControlCA = ca.CertificateFingerprint(control.Chain[0])
	if c.Upstream != nil {
		begun, err := c.begin(ctx, o, &r)
		r.Created = r.Created || begun
		return r, err
	}

	bundle, _, err := o.store.Bundle(ctx, c.TrustDomain)
	if err != nil {
		return InitResult{}, err
	}
	intermediate, ok, err := c.awaited(rows, bundle)
	if err != nil {
		return InitResult{}, err
	}
	if !ok {
		r.Created = true
		k := &keeper{folder: &c.Folder, algorithm: c.Algorithm, prefix: c.NamePrefix, requests: c.Ceremony}
		if intermediate, err = k.request(ctx, &authorities{rows: rows}, nil); err != nil {
			return InitResult{}, err
		}
		if err = o.store.ChangeAuthorities(ctx, store.AuthorityChange{Base: revision, Next: revision + 1, Put: []store.Authority{intermediate}}); err != nil {
			return InitResult{}, err
		}
	}
	request, csr, err := storedRequest(intermediate)
	if err != nil {
		return InitResult{}, err
	}
	r.KeyFingerprint, r.CSR = ca.KeyFingerprint(request.RawSubjectPublicKeyInfo), csr
	return r, nil
}

// oldest of a kind is the one that Init makes.
func oldest(rows []store.Authority, kind string) (store.Authority, bool) {
	i := slices.IndexFunc(rows, func(a store.Authority) bool { return a.Kind == kind })
	if i < 0 {
		return store.Authority{}, false
	}
	return rows[i], true
}

// begin gives the cluster the root that its upstream signs under, if it has none yet, and what the other clusters believe.
func (c *InitConfig) begin(ctx context.Context, o *opened, r *InitResult) (begun bool, err error) {
	k, err := c.Folder.keeper(ctx, o, c.Rotation)
	if err != nil {
		return false, err
	}
	if set := k.current.Load(); set.bundle.IsZero() {
		if begun, err = true, c.takeRoot(ctx, k); err != nil {
			return false, fmt.Errorf("give cluster %s its root: %w", c.Cluster, err)
		}
	} else if err := c.trusted(set.bundle); err != nil {
		return false, err
	}
	for _, root := range k.current.Load().bundle.Roots() {
		r.Roots = append(r.Roots, ca.CertificateFingerprint(root.Raw))
	}
	return begun, nil
}

// trusted refuses a fingerprint that is of no root that the cluster trusts.
func (c *InitConfig) trusted(bundle trust.Bundle) error {
	if c.RootFingerprint == "" {
		return nil
	}
	pinned, err := ca.ParseFingerprint(c.RootFingerprint)
	if err != nil {
		return fmt.Errorf("root fingerprint: %w", err)
	}
	if !slices.ContainsFunc(bundle.Roots(), func(root *x509.Certificate) bool { return pinned.Of(root.Raw) }) {
		return fmt.Errorf("cluster %s has begun, and the fingerprint given is of %w that it trusts: see signet trust list", c.Cluster, ErrOtherRoot)
	}
	return nil
}

// ErrOtherRoot: what was compared is not the same.
var ErrOtherRoot = errors.New("another root than the one")

func (c *InitConfig) takeRoot(ctx context.Context, k *keeper) error {
	root, err := c.firstRoot(ctx)
	if err != nil {
		return err
	}
	_, err = k.do(ctx, decision{verb: "install", reason: "the cluster begins under it", by: byHand("ceremony")},
		func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
			next, err := set.addRoot(k.policy.Policy, w, root, now)
			return next, nil, err
		})
	return err
}

// firstRoot asks the upstream for the root that the cluster begins under.
func (c *InitConfig) firstRoot(ctx context.Context) (*x509.Certificate, error) {
	if c.RootFingerprint == "" {
		return nil, errors.New("say which root the cluster is to trust: its holder tells you the fingerprint, give it with --root-fingerprint")
	}
	pinned, err := ca.ParseFingerprint(c.RootFingerprint)
	if err != nil {
		return nil, fmt.Errorf("root fingerprint: %w", err)
	}
	root, err := c.Upstream.Root(ctx)
	if err != nil {
		return nil, err
	}
	if !pinned.Of(root.Raw) {
		return nil, fmt.Errorf("the fingerprint given is of %w that the upstream signs under, %s: ask the root's holder which one is right", ErrOtherRoot, ca.CertificateFingerprint(root.Raw))
	}
	if c.Exchange != nil {
		shared, found, err := Shared(ctx, c.Exchange, c.TrustDomain, c.Rotation.Peers, pinned)
		if err != nil {
			return nil, err
		}
		// Nobody asks the others whether they believe what a cluster begins under: it has to be what they all stand under.
		if found && (len(shared.Roots) != 1 || shared.Roots[0].Leaving || shared.Roots[0].State != ca.Active) {
			return nil, fmt.Errorf("the clusters that share this trust domain are replacing a root (cluster %s believes %d): wait until that is over (signet rotation status there), then run signet cluster init again", shared.Cluster, len(shared.Roots))
		}
	}
	return root, nil
}

// notOrphaned refuses a folder whose database is gone: the log is begun only after the database knows its key, so a log that
// the database doesn't know means that agents, registrations and the control CA's certificate are lost with it.
func (c *InitConfig) notOrphaned(known bool) error {
	if known {
		return nil
	}
	if _, err := os.Stat(filepath.Join(LogDir(c.Dir), "checkpoint")); err == nil {
		return fmt.Errorf("folder %s has the log of a cluster whose state database is gone: put the database back from its newest backup; a new one would shut every agent out", c.Dir)
	}
	return nil
}

// awaited returns the intermediate that is asked for: one that waits for a signature, else the first. It reports false when
// there is none, and when all that were signed have ended: then something new is asked for.
func (c *InitConfig) awaited(rows []store.Authority, bundle trust.Bundle) (store.Authority, bool, error) {
	first, ok := oldest(rows, ca.KindIntermediate)
	if !ok {
		return first, false, nil
	}
	set, err := newAuthorities(c.TrustDomain, rows, 0, bundle)
	if err != nil {
		return first, false, err
	}
	lives := false
	for _, a := range set.rows {
		switch {
		case a.Kind != ca.KindIntermediate || a.State == ca.Removed || a.State == ca.Retired || !a.Tainted.IsZero():
		case len(a.Chain) == 0:
			return a, true, nil
		default:
			lives = lives || c.Now().Before(a.NotAfter)
		}
	}
	return first, lives, nil
}

// makeControlCA: a crash after the log's entry and before the row leaves an entry of a control CA that never was; the
// next run makes another certificate for the same key, and only that one is ever shown to anybody.
func (c *InitConfig) makeControlCA(ctx context.Context, o *opened) (store.Authority, error) {
	key, err := c.Keys.Create(ctx, ControlKey, c.Algorithm, 0)
	if err != nil {
		return store.Authority{}, err
	}
	plan, err := ca.NewControlPlan(c.TrustDomain, c.Cluster, key.Public(), c.Now(), 0)
	if err != nil {
		return store.Authority{}, err
	}
	plan.Now = c.Now
	plan.CommonName = prefixed(c.NamePrefix, plan.CommonName)
	cert, _, err := c.Ceremony.SelfSign(ctx, o.log, key, plan, byHand("ceremony"))
	if err != nil {
		return store.Authority{}, fmt.Errorf("make the control CA of cluster %s: %w", c.Cluster, err)
	}
	return store.Authority{
		Authority: rotation.Authority{ID: authorityID(ControlKey, key.Ref().Version), Kind: ca.KindControl, State: ca.Active, Since: c.Now()},
		Key:       key.Ref(), Chain: [][]byte{cert.Raw}, Created: c.Now(),
	}, nil
}

// prefixed puts a prefix before a common name and keeps to the 64 characters of RFC 5280 appendix A.1.
func prefixed(prefix, name string) string {
	s := prefix + name
	return s[:min(len(s), 64)]
}

// authorityID is also the issuer's name in metrics and messages: "intermediate-1".
func authorityID(name string, number int) string { return fmt.Sprintf("%s-%d", name, number) }

// byHand is the evidence of a person at this machine.
func byHand(door string) *auditv1.Evidence {
	return &auditv1.Evidence{Caller: fmt.Sprintf("uid:%d", os.Geteuid()), Door: door}
}

// InstallConfig is what `cluster install` needs.
type InstallConfig struct {
	Folder
	Rotation Rotation
	// Chain is what the root's holder sent: PEM, the intermediate first, the root last; several may follow one another.
	Chain []byte
	// RootFingerprint is what the admin was told the root's is, by another way than the chain.
	RootFingerprint string
	// Trust is what another cluster believes, for one that joins it; the zero value = the root of the chain alone.
	Trust Trust
	// First: no other cluster serves yet, an admin says, so that there is nothing to be told of what they believe.
	First bool
	// Exchange is where other clusters may have said what they believe; nil = nowhere.
	Exchange Exchange
	// DryRun only looks whether the chain would be taken.
	DryRun bool
}

// InstallResult says what stands now.
type InstallResult struct {
	Issuer string
	// State is where the issuer stands; one that is not active waits for what Next says.
	State ca.State
	Next  []rotation.Step
	// Root is the root's fingerprint; NotAfter is the end of the intermediate.
	Root     string
	NotAfter time.Time
	// Done is what was changed, in words; nothing when the same chain was installed already. Taken are steps that were due besides.
	Done  []string
	Taken []rotation.Step
}

// Install checks what came back from the root and takes it into use, on a folder that no server works on. The same chain
// again changes nothing.
func Install(ctx context.Context, c InstallConfig) (_ InstallResult, err error) {
	pinned, err := ca.ParseFingerprint(c.RootFingerprint)
	if err != nil {
		return InstallResult{}, fmt.Errorf("root fingerprint: %w", err)
	}
	chains, err := ca.ParseChains(c.Chain)
	if err != nil {
		return InstallResult{}, err
	}
	o, err := c.open(ctx, false)
	if err != nil {
		return InstallResult{}, err
	}
	defer func() { err = errors.Join(err, o.close()) }()
	ref, ok, err := o.store.Meta(ctx, logKeyFact)
	if err != nil {
		return InstallResult{}, err
	}
	if !ok {
		return InstallResult{}, fmt.Errorf("folder %s has no log: the making of the cluster was interrupted; run signet cluster init again", c.Dir)
	}
	key, err := c.key(ctx, ref)
	if err != nil {
		return InstallResult{}, err
	}
	if err := c.openLog(ctx, o, key, nil); err != nil {
		return InstallResult{}, err
	}
	k, err := c.keeper(ctx, o, c.Rotation)
	if err != nil {
		return InstallResult{}, err
	}
	by := byHand("ceremony")
	reason := "a chain was installed"
	if k.blind() && c.Trust.isZero() {
		switch {
		case c.First:
			reason += "; no other cluster serves yet, an admin says"
		case c.Exchange != nil:
			if c.Trust, _, err = Shared(ctx, c.Exchange, c.TrustDomain, c.Rotation.Peers, pinned); err != nil {
				return InstallResult{}, err
			}
		}
	}
	done, err := k.do(ctx, decision{verb: "install", reason: reason, by: by, dry: c.DryRun},
		func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
			return k.install(set, w, now, installation{c.Chain, pinned, c.Trust, c.First, by})
		})
	if err != nil {
		return InstallResult{}, err
	}
	first := chains[0]
	row, err := done.set.requested(c.Cluster, first[0])
	if err != nil {
		return InstallResult{}, err
	}
	now := c.Now()
	return InstallResult{
		Issuer: row.ID, State: row.State, Root: ca.CertificateFingerprint(first[len(first)-1].Raw), NotAfter: row.NotAfter,
		Done: done.done, Taken: done.taken, Next: rotation.Next(k.policy.Policy, k.world(done.set, now), now),
	}, nil
}

// keeper is for a folder that no server works on: no agent is heard.
func (f *Folder) keeper(ctx context.Context, o *opened, policy Rotation) (*keeper, error) {
	agents, err := o.store.Agents(ctx)
	if err != nil {
		return nil, err
	}
	k := newKeeper(f, policy)
	k.store, k.change = o.store, o.change
	if k.policy.OlderLeaves, err = olderLeaves(ctx, o.store, policy.LongestLeaf, f.Now()); err != nil {
		return nil, err
	}
	k.agents = silent(agents, k.policy.Policy)
	if k.issuers, err = ca.NewIssuers(); err != nil {
		return nil, err
	}
	k.bundles = &trust.Bundles{}
	if err := o.settle(ctx, k); err != nil {
		return nil, err
	}
	return k, k.load(ctx)
}

// settle tells the log what an earlier change has left. Whoever stopped signing by it has signed until the server ended.
func (o *opened) settle(ctx context.Context, k *keeper) error {
	for {
		left, ok, err := o.store.NextNote(ctx, 0)
		if err != nil || !ok {
			return err
		}
		stopped, _ := stoppedBy(left)
		if _, err := o.store.ExtendLeaves(ctx, stopped, k.policy.LeavesUntil(k.folder.Now())); err != nil {
			return err
		}
		if err := o.tellLog(ctx, left); err != nil {
			return err
		}
	}
}

// change makes a change durable, then logged, as the outbox of a server does.
func (o *opened) change(ctx context.Context, note *store.Note, commit func(*store.Store) error, effect func()) error {
	if err := commit(o.store.Telling(note)); err != nil {
		return err
	}
	if err := o.tellLog(ctx, *note); err != nil {
		return fmt.Errorf("the change is stored and takes effect as soon as it is logged, not before: run it again: %w", err)
	}
	effect()
	return nil
}

func (o *opened) tellLog(ctx context.Context, note store.Note) error {
	entries, err := entriesOf(note)
	if err != nil {
		return err
	}
	if _, err := o.log.Append(ctx, entries); err != nil {
		return fmt.Errorf("%w: %w", errNotLogged, err)
	}
	return o.store.Told(ctx, note.Change)
}

// Cluster is what `cluster show` tells.
type Cluster struct {
	TrustDomain    string          `json:"trust_domain"`
	Cluster        string          `json:"cluster"`
	Instance       string          `json:"instance"`
	ControlCA      string          `json:"control_ca,omitempty"`
	Roots          []string        `json:"roots"`
	BundleSequence uint64          `json:"bundle_sequence"`
	LogVerifierKey string          `json:"log_verifier_key,omitempty"`
	Authorities    []AuthorityInfo `json:"authorities"`
	// RootCertificates are those that Roots names.
	RootCertificates []*x509.Certificate `json:"-"`
	// Agents is how many have enrolled.
	Agents int `json:"-"`
}

// AuthorityInfo is one issuer, or one in the making.
type AuthorityInfo struct {
	ID             string   `json:"id"`
	Hierarchy      string   `json:"hierarchy"`
	State          ca.State `json:"state"`
	Key            string   `json:"key"`
	KeyFingerprint string   `json:"key_fingerprint"`
	Subject        string   `json:"subject"`
	// NotBefore and NotAfter bound its whole chain.
	NotBefore   *time.Time `json:"not_before,omitempty"`
	NotAfter    *time.Time `json:"not_after,omitempty"`
	Fingerprint string     `json:"fingerprint,omitempty"`
	// Certificate is nil for one in the making; Ref names its key.
	Certificate *x509.Certificate `json:"-"`
	Ref         keystore.Ref      `json:"-"`
}

// Show reads a folder, also while a server works on it or where nothing can be written, and needs no key.
func Show(ctx context.Context, dir string) (_ Cluster, err error) {
	if err := hasCluster(dir); err != nil {
		return Cluster{}, err
	}
	st, err := store.Open(ctx, store.Config{Path: databasePath(dir), ReadOnly: true})
	if err != nil {
		return Cluster{}, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	c := Cluster{Roots: []string{}, Authorities: []AuthorityInfo{}}
	for fact, to := range map[string]*string{
		trustDomainFact: &c.TrustDomain, clusterFact: &c.Cluster, instanceFact: &c.Instance, verifierFact: &c.LogVerifierKey,
	} {
		if *to, _, err = st.Meta(ctx, fact); err != nil {
			return Cluster{}, err
		}
	}
	rows, revision, err := st.Authorities(ctx)
	if err != nil {
		return Cluster{}, err
	}
	set, err := newAuthorities(spiffeid.TrustDomain{}, rows, revision, trust.Bundle{})
	if err != nil {
		return Cluster{}, err
	}
	for _, a := range set.rows {
		if a.Kind == ca.KindRoot {
			continue
		}
		info := AuthorityInfo{ID: a.ID, Hierarchy: a.Hierarchy().String(), State: a.State, Key: a.Key.String(), Ref: a.Key}
		if chain := set.chains[a.ID]; len(chain) > 0 {
			cert := chain[0]
			info.Certificate = cert
			info.KeyFingerprint, info.Subject = ca.KeyFingerprint(cert.RawSubjectPublicKeyInfo), cert.Subject.String()
			info.NotBefore, info.NotAfter, info.Fingerprint = &a.NotBefore, &a.NotAfter, ca.CertificateFingerprint(cert.Raw)
			if a.Kind == ca.KindControl {
				c.ControlCA = info.Fingerprint
			}
		} else if request, err := x509.ParseCertificateRequest(a.CSR); err == nil {
			info.KeyFingerprint, info.Subject = ca.KeyFingerprint(request.RawSubjectPublicKeyInfo), request.Subject.String()
		}
		c.Authorities = append(c.Authorities, info)
	}
	agents, err := st.Agents(ctx)
	if err != nil {
		return Cluster{}, err
	}
	c.Agents = len(agents)
	if td, err := identity.ParseTrustDomain(c.TrustDomain); err == nil {
		b, ok, err := st.Bundle(ctx, td)
		if err != nil {
			return Cluster{}, err
		}
		if ok {
			c.BundleSequence, c.RootCertificates = b.Sequence(), b.Roots()
			for _, r := range b.Roots() {
				c.Roots = append(c.Roots, ca.CertificateFingerprint(r.Raw))
			}
		}
	}
	return c, nil
}
