package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
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
	logKey          = "log"
	controlKey      = "control-ca"
	intermediateKey = "intermediate"
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
	} else if _, err := os.Stat(databasePath(f.Dir)); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("folder %s holds no cluster yet: make one with: signet cluster init", f.Dir)
	}
	o := &opened{}
	var err error
	if o.lock, err = durable.Lock(f.Dir); err != nil {
		return nil, err
	}
	if o.store, err = store.Open(ctx, store.Config{Path: databasePath(f.Dir), Logger: f.Logger}); err != nil {
		return nil, errors.Join(err, o.close())
	}
	// A folder belongs to one instance of one cluster for ever; the store refuses another value.
	for _, fact := range [][2]string{{trustDomainFact, f.TrustDomain.Name()}, {clusterFact, f.Cluster}, {instanceFact, f.Instance}} {
		if err := o.store.SetMeta(ctx, fact[0], fact[1]); err != nil {
			return nil, errors.Join(err, o.close())
		}
	}
	return o, nil
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

// FirstKey opens the newest version of a key, or makes the first: a crash may have come after the key was made and
// before anything pointed to it, and then that key is the one.
func FirstKey(ctx context.Context, keys keystore.Store, name string, alg keystore.Algorithm) (keystore.Key, error) {
	all, err := keys.List(ctx)
	if err != nil {
		return nil, err
	}
	var newest keystore.Ref
	for _, r := range all {
		if r.Name == name && r.Version > newest.Version {
			newest = r
		}
	}
	if !newest.IsZero() {
		return keys.Open(ctx, newest)
	}
	return keys.Create(ctx, name, alg)
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
}

// InitResult is what a person carries to the root, and what they compare there.
type InitResult struct {
	// CSR of the intermediate, PEM.
	CSR []byte
	// KeyFingerprint is of the CSR's key; `root sign` wants it.
	KeyFingerprint string
	// ControlCA is the fingerprint of the control CA's certificate.
	ControlCA string
	// LogVerifierKey is what auditors check the log with.
	LogVerifierKey string
	// Created is false when everything was there already.
	Created bool
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
	o, err := c.open(ctx, true)
	if err != nil {
		return InitResult{}, err
	}
	defer func() { err = errors.Join(err, o.close()) }()

	// The log first: everything after this is in it. A crash before the fact is written leaves a key that the next run finds.
	if err := c.notOrphaned(ctx, o); err != nil {
		return InitResult{}, err
	}
	key, err := FirstKey(ctx, c.Keys, logKey, keystore.Ed25519)
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

	authorities, err := o.store.Authorities(ctx)
	if err != nil {
		return InitResult{}, err
	}
	find := func(h identity.Hierarchy) *store.Authority {
		if i := slices.IndexFunc(authorities, func(a store.Authority) bool { return a.Hierarchy == h }); i >= 0 {
			return &authorities[i]
		}
		return nil
	}
	control := find(identity.ControlPlane)
	if control == nil {
		r.Created = true
		if control, err = c.makeControlCA(ctx, o); err != nil {
			return InitResult{}, err
		}
	}
	r.ControlCA = ca.CertificateFingerprint(control.Chain[0])

	intermediate := find(identity.Mesh)
	if intermediate == nil {
		r.Created = true
		if intermediate, err = c.makeRequest(ctx, o); err != nil {
			return InitResult{}, err
		}
	}
	request, err := x509.ParseCertificateRequest(intermediate.CSR)
	if err != nil {
		return InitResult{}, fmt.Errorf("stored request of %s can't be read: %w", intermediate.ID, err)
	}
	r.KeyFingerprint = ca.KeyFingerprint(request.RawSubjectPublicKeyInfo)
	r.CSR = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: intermediate.CSR})
	return r, nil
}

// notOrphaned refuses a folder whose database is gone: the log is begun only after the database knows its key, so a log that
// the database doesn't know means that agents, registrations and the control CA's certificate are lost with it.
func (c *InitConfig) notOrphaned(ctx context.Context, o *opened) error {
	_, known, err := o.store.Meta(ctx, logKeyFact)
	if err != nil || known {
		return err
	}
	if _, err := os.Stat(filepath.Join(LogDir(c.Dir), "checkpoint")); err == nil {
		return fmt.Errorf("folder %s has the log of a cluster whose state database is gone: put the database back from its newest backup; a new one would shut every agent out", c.Dir)
	}
	return nil
}

// makeControlCA: a crash after the log's entry and before the row leaves an entry of a control CA that never was; the
// next run makes another certificate for the same key, and only that one is ever shown to anybody.
func (c *InitConfig) makeControlCA(ctx context.Context, o *opened) (*store.Authority, error) {
	key, err := FirstKey(ctx, c.Keys, controlKey, c.Algorithm)
	if err != nil {
		return nil, err
	}
	plan, err := ca.NewControlPlan(c.TrustDomain, c.Cluster, key.Public(), c.Now(), 0)
	if err != nil {
		return nil, err
	}
	plan.Now = c.Now
	plan.CommonName = prefixed(c.NamePrefix, plan.CommonName)
	cert, _, err := c.Ceremony.SelfSign(ctx, o.log, key, plan, byHand("ceremony"))
	if err != nil {
		return nil, fmt.Errorf("make the control CA of cluster %s: %w", c.Cluster, err)
	}
	a := store.Authority{
		ID: authorityID(key.Ref()), Hierarchy: identity.ControlPlane, State: ca.Active,
		Key: key.Ref(), Chain: [][]byte{cert.Raw}, Created: c.Now(),
	}
	return &a, o.store.PutAuthority(ctx, a)
}

// makeRequest: until the row is stored nobody has seen the request, so a new one for the same key harms nobody.
func (c *InitConfig) makeRequest(ctx context.Context, o *opened) (*store.Authority, error) {
	key, err := FirstKey(ctx, c.Keys, intermediateKey, c.Algorithm)
	if err != nil {
		return nil, err
	}
	plan, err := ca.NewIntermediatePlan(c.TrustDomain, c.Cluster, key.Public(), c.Now(), 0)
	if err != nil {
		return nil, err
	}
	plan.CommonName = prefixed(c.NamePrefix, plan.CommonName)
	text, err := c.Ceremony.Request(key, plan)
	if err != nil {
		return nil, fmt.Errorf("make the request for the intermediate of cluster %s: %w", c.Cluster, err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("make the request for the intermediate of cluster %s: what was made is not PEM", c.Cluster)
	}
	a := store.Authority{
		ID: authorityID(key.Ref()), Hierarchy: identity.Mesh, State: ca.Prepared,
		Key: key.Ref(), CSR: block.Bytes, Created: c.Now(),
	}
	return &a, o.store.PutAuthority(ctx, a)
}

// prefixed puts a prefix before a common name and keeps to the 64 characters of RFC 5280 appendix A.1.
func prefixed(prefix, name string) string {
	s := prefix + name
	return s[:min(len(s), 64)]
}

// authorityID is also the issuer's name in metrics and messages: "intermediate-1".
func authorityID(r keystore.Ref) string { return fmt.Sprintf("%s-%d", r.Name, r.Version) }

// byHand is the evidence of a person at this machine.
func byHand(door string) *auditv1.Evidence {
	return &auditv1.Evidence{Caller: fmt.Sprintf("uid:%d", os.Geteuid()), Door: door}
}

// InstallConfig is what `cluster install` needs.
type InstallConfig struct {
	Folder
	// Chain is what the root's holder sent: PEM, the intermediate first, the root last.
	Chain []byte
	// RootFingerprint is what the admin was told the root's is, by another way than the chain.
	RootFingerprint string
}

// InstallResult says what stands now.
type InstallResult struct {
	Issuer string
	// Root is the root's fingerprint; NotAfter is the end of the intermediate.
	Root     string
	NotAfter time.Time
	// Changed is false when the same chain was installed already.
	Changed bool
}

// Install checks what came back from the root and takes it into use. The same chain again changes nothing.
func Install(ctx context.Context, c InstallConfig) (_ InstallResult, err error) {
	pinned, err := ca.ParseFingerprint(c.RootFingerprint)
	if err != nil {
		return InstallResult{}, fmt.Errorf("root fingerprint: %w", err)
	}
	chain, err := ca.ParseChain(c.Chain)
	if err != nil {
		return InstallResult{}, err
	}
	root := chain[len(chain)-1]
	if !bytes.Equal(root.RawIssuer, root.RawSubject) {
		return InstallResult{}, fmt.Errorf("chain ends with %q, which is not a root: give the whole file that `signet root sign` wrote, in its order: our certificate first, the root last", root.Subject)
	}
	if !pinned.Of(root.Raw) {
		return InstallResult{}, fmt.Errorf("the root in the chain is %s, but the fingerprint given is %s: ask the root's holder which one is right before you install anything",
			ca.CertificateFingerprint(root.Raw), clip(c.RootFingerprint))
	}
	chain = chain[:len(chain)-1]
	if len(chain) == 0 {
		return InstallResult{}, errors.New("chain holds the root only: give the whole file that `signet root sign` wrote")
	}

	o, err := c.open(ctx, false)
	if err != nil {
		return InstallResult{}, err
	}
	defer func() { err = errors.Join(err, o.close()) }()
	authority, err := c.requested(ctx, o, chain[0])
	if err != nil {
		return InstallResult{}, err
	}
	result := InstallResult{Issuer: authority.ID, Root: ca.CertificateFingerprint(root.Raw), NotAfter: chain[0].NotAfter}
	bundle, changed, err := c.bundleWith(ctx, o, root)
	if err != nil {
		return InstallResult{}, err
	}
	der := make([][]byte, len(chain))
	for i, cert := range chain {
		der[i] = cert.Raw
	}
	if len(authority.Chain) > 0 {
		if changed || !slices.EqualFunc(authority.Chain, der, bytes.Equal) {
			return InstallResult{}, fmt.Errorf("%s is installed already, with another chain: the intermediate in use is never replaced under the same key", authority.ID)
		}
		return result, nil
	}
	if err := c.check(ctx, authority, chain, root); err != nil {
		return InstallResult{}, err
	}
	if err := c.logInstalled(ctx, o, append(slices.Clone(der), root.Raw)); err != nil {
		return InstallResult{}, err
	}
	// Trust before use: an authority is never active under a root that nobody is told of. Each step again changes nothing.
	if err := o.store.PutBundle(ctx, bundle); err != nil {
		return InstallResult{}, err
	}
	authority.Chain, authority.State = der, ca.Active
	if err := o.store.PutAuthority(ctx, *authority); err != nil {
		return InstallResult{}, err
	}
	result.Changed = true
	return result, nil
}

// requested finds the authority whose request this certificate answers.
func (f *Folder) requested(ctx context.Context, o *opened, cert *x509.Certificate) (*store.Authority, error) {
	authorities, err := o.store.Authorities(ctx)
	if err != nil {
		return nil, err
	}
	wanted := ""
	for i, a := range authorities {
		if a.Hierarchy != identity.Mesh {
			continue
		}
		request, err := x509.ParseCertificateRequest(a.CSR)
		if err != nil {
			return nil, fmt.Errorf("stored request of %s can't be read: %w", a.ID, err)
		}
		if bytes.Equal(request.RawSubjectPublicKeyInfo, cert.RawSubjectPublicKeyInfo) {
			return &authorities[i], nil
		}
		wanted = ca.KeyFingerprint(request.RawSubjectPublicKeyInfo)
	}
	if wanted == "" {
		return nil, fmt.Errorf("cluster %s has made no request yet: run signet cluster init", f.Cluster)
	}
	return nil, fmt.Errorf("chain begins with %q for the key %s, but cluster %s asked for %s: the request was swapped on its way, the chain is of another cluster, or it is in the wrong order (our certificate first, the root last)",
		cert.Subject, ca.KeyFingerprint(cert.RawSubjectPublicKeyInfo), f.Cluster, wanted)
}

// bundleWith returns the trust domain's bundle with this root, and whether that is a change. Another root than the one
// that is trusted already comes by a rotation, not by an installation.
func (f *Folder) bundleWith(ctx context.Context, o *opened, root *x509.Certificate) (trust.Bundle, bool, error) {
	b, ok, err := o.store.Bundle(ctx, f.TrustDomain)
	if err != nil {
		return trust.Bundle{}, false, err
	}
	if !ok {
		b, err = trust.NewBundle(f.TrustDomain, 1, []*x509.Certificate{root})
		return b, true, err
	}
	if !slices.ContainsFunc(b.Roots(), root.Equal) {
		return trust.Bundle{}, false, fmt.Errorf("cluster %s trusts the root %s, and the chain leads to another, %s", f.Cluster,
			ca.CertificateFingerprint(b.Roots()[0].Raw), ca.CertificateFingerprint(root.Raw))
	}
	return b, false, nil
}

// check compares the chain with what was asked for, and makes sure that the issuer would work.
func (f *Folder) check(ctx context.Context, a *store.Authority, chain []*x509.Certificate, root *x509.Certificate) error {
	request, err := x509.ParseCertificateRequest(a.CSR)
	if err != nil {
		return fmt.Errorf("stored request of %s can't be read: %w", a.ID, err)
	}
	plan, err := ca.NewIntermediatePlan(f.TrustDomain, f.Cluster, request.PublicKey, time.Time{}, 0)
	if err != nil {
		return err
	}
	plan.CommonName, plan.Now = request.Subject.CommonName, f.Now
	if err := plan.Check(chain, []*x509.Certificate{root}); err != nil {
		return err
	}
	key, err := f.Keys.Open(ctx, a.Key)
	if err != nil {
		return err
	}
	_, err = ca.NewIssuer(ca.IssuerConfig{
		Name: a.ID, Hierarchy: a.Hierarchy, TrustDomain: f.TrustDomain, State: ca.Active, Key: key,
		Chain: chain, Roots: []*x509.Certificate{root},
	})
	return err
}

func (f *Folder) logInstalled(ctx context.Context, o *opened, chain [][]byte) error {
	ref, ok, err := o.store.Meta(ctx, logKeyFact)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("folder %s has no log: the making of the cluster was interrupted; run signet cluster init again", f.Dir)
	}
	key, err := f.key(ctx, ref)
	if err != nil {
		return err
	}
	if err := f.openLog(ctx, o, key, nil); err != nil {
		return err
	}
	_, err = o.log.Append(ctx, []*auditv1.Entry{{
		Time: f.Now().UnixNano(),
		Event: &auditv1.Entry_AuthorityInstalled{AuthorityInstalled: &auditv1.AuthorityInstalled{
			Kind: ca.KindIntermediate, Chain: chain, Evidence: byHand("ceremony"),
		}},
	}})
	if err != nil {
		return fmt.Errorf("the installation could not be logged, so nothing was installed: %w", err)
	}
	return nil
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
}

// AuthorityInfo is one issuer, or one in the making.
type AuthorityInfo struct {
	ID             string     `json:"id"`
	Hierarchy      string     `json:"hierarchy"`
	State          ca.State   `json:"state"`
	Key            string     `json:"key"`
	KeyFingerprint string     `json:"key_fingerprint"`
	Subject        string     `json:"subject"`
	NotBefore      *time.Time `json:"not_before,omitempty"`
	NotAfter       *time.Time `json:"not_after,omitempty"`
	Fingerprint    string     `json:"fingerprint,omitempty"`
	// Certificate is nil for one in the making; Ref names its key.
	Certificate *x509.Certificate `json:"-"`
	Ref         keystore.Ref      `json:"-"`
}

// Show reads a folder, also while a server works on it or where nothing can be written, and needs no key.
func Show(ctx context.Context, dir string) (_ Cluster, err error) {
	if _, err := os.Stat(databasePath(dir)); errors.Is(err, fs.ErrNotExist) {
		return Cluster{}, fmt.Errorf("folder %s holds no cluster yet: make one with: signet cluster init", dir)
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
	authorities, err := st.Authorities(ctx)
	if err != nil {
		return Cluster{}, err
	}
	for _, a := range authorities {
		info := AuthorityInfo{ID: a.ID, Hierarchy: a.Hierarchy.String(), State: a.State, Key: a.Key.String(), Ref: a.Key}
		if len(a.Chain) > 0 {
			cert, err := x509.ParseCertificate(a.Chain[0])
			if err != nil {
				return Cluster{}, fmt.Errorf("stored certificate of %s can't be read: %w", a.ID, err)
			}
			info.Certificate = cert
			info.KeyFingerprint, info.Subject = ca.KeyFingerprint(cert.RawSubjectPublicKeyInfo), cert.Subject.String()
			info.NotBefore, info.NotAfter, info.Fingerprint = &cert.NotBefore, &cert.NotAfter, ca.CertificateFingerprint(cert.Raw)
			if a.Hierarchy == identity.ControlPlane {
				c.ControlCA = info.Fingerprint
			}
		} else if request, err := x509.ParseCertificateRequest(a.CSR); err == nil {
			info.KeyFingerprint, info.Subject = ca.KeyFingerprint(request.RawSubjectPublicKeyInfo), request.Subject.String()
		}
		c.Authorities = append(c.Authorities, info)
	}
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
