package ceremony

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
)

// What stands in an offline root folder.
const (
	certificateFile = "root.pem"
	keysDir         = "keys"
	logDir          = "log"
	recordsDir      = "ceremonies"
	rootKey         = "root"
	logKey          = "log"
)

// maxCertificate bounds root.pem, in bytes.
const maxCertificate = 16 << 10

// ErrExists says that the folder holds a root already.
var ErrExists = errors.New("a root is there already")

// Root is an offline root folder.
type Root struct {
	dir  string
	cert *x509.Certificate
	td   spiffeid.TrustDomain
	now  func() time.Time
	// elsewhere holds the key; nil = the folder does.
	elsewhere *Elsewhere
}

// Certificate is the root's.
func (r *Root) Certificate() *x509.Certificate { return r.cert }

// TrustDomain is the one the root is for.
func (r *Root) TrustDomain() spiffeid.TrustDomain { return r.td }

// RootConfig describes a root to be made.
type RootConfig struct {
	// Dir must not be there yet, or be empty.
	Dir         string
	TrustDomain spiffeid.TrustDomain
	// Algorithm of the root's key; empty = ECDSA P-256. Ed25519 is refused.
	Algorithm keystore.Algorithm
	// Life of the root; 0 = ca.DefaultRootLife.
	Life time.Duration
	// PathLen is how many CAs may stand between the root and a leaf; 0 = 1.
	PathLen int
	// Passphrase encrypts the keys in the folder: the root's, if it is there, and that of its log.
	Passphrase keystore.Passphrase
	// Elsewhere holds the root's key; nil = the folder does.
	Elsewhere *Elsewhere
	// By says on whose word, for the log.
	By *auditv1.Evidence
	// Now is the clock; nil = time.Now.
	Now func() time.Time
}

// Validate refuses what would fail later, before anybody is asked for a passphrase.
func (c *RootConfig) Validate() error {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Algorithm == "" {
		c.Algorithm = keystore.ECDSAP256
	}
	if c.Life == 0 {
		c.Life = ca.DefaultRootLife
	}
	if c.PathLen == 0 {
		c.PathLen = 1
	}
	switch c.Algorithm {
	case keystore.ECDSAP256, keystore.ECDSAP384, keystore.RSA2048, keystore.RSA3072, keystore.RSA4096:
	default:
		return fmt.Errorf("root: algorithm %.32q can't be used for a CA; use %s, %s, %s, %s or %s", c.Algorithm,
			keystore.ECDSAP256, keystore.ECDSAP384, keystore.RSA2048, keystore.RSA3072, keystore.RSA4096)
	}
	switch {
	case c.Dir == "":
		return errors.New("root: name the folder to make it in")
	case c.TrustDomain.IsZero():
		return errors.New("root: name its trust domain, for example example.org")
	case c.Life < ca.MinIntermediateLife:
		return fmt.Errorf("root: a life of %s is shorter than the least useful %s", c.Life, ca.MinIntermediateLife)
	case c.Life > maxLife:
		return fmt.Errorf("root: a life of %d years; at most 100 are allowed", c.Life/(365*24*time.Hour))
	case c.PathLen < 1 || c.PathLen > ca.MaxChain-1:
		return fmt.Errorf("root: path length %d; want 1 to %d", c.PathLen, ca.MaxChain-1)
	case c.Elsewhere != nil:
		return c.Elsewhere.validate()
	}
	return nil
}

const maxLife = 100 * 365 * 24 * time.Hour

// InitRoot makes an offline root folder. It appears whole or not at all: it is made beside its place and moved there at
// the end. An existing root is never touched: the error is ErrExists and names its fingerprint.
//
// With the key elsewhere the folder appears before the key is made, and remembers that: after an interruption the same call
// goes on with what was made, and does not leave a second root behind.
func InitRoot(ctx context.Context, c RootConfig) (*Root, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Passphrase == nil {
		return nil, errors.New("root: no source for the passphrase that encrypts its key")
	}
	if begun, err := c.Begun(); err != nil {
		return nil, err
	} else if begun {
		return c.finish(ctx, nil, true)
	}
	if err := vacant(c.Dir); err != nil {
		return nil, err
	}
	if c.Elsewhere == nil {
		var r *Root
		if err := c.place(func(dir string) (err error) {
			r, err = c.make(ctx, dir)
			return err
		}); err != nil {
			return nil, err
		}
		r.dir = c.Dir
		return r, nil
	}
	if err := c.free(ctx); err != nil {
		return nil, err
	}
	var checkpoints keystore.Key
	if err := c.place(func(dir string) (err error) {
		checkpoints, err = c.begin(ctx, dir)
		return err
	}); err != nil {
		return nil, err
	}
	return c.finish(ctx, checkpoints, false)
}

// place fills a folder and puts it into its place.
func (c *RootConfig) place(fill func(dir string) error) error {
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return fmt.Errorf("root folder %s: %w", c.Dir, err)
	}
	parent := filepath.Dir(dir)
	if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
		if err := durable.Dir(parent); err != nil {
			return err
		}
	}
	temp, err := os.MkdirTemp(parent, "."+filepath.Base(dir)+".new-") // 0700
	if err != nil {
		return fmt.Errorf("root folder %s: its parent can't be written to (%w); choose another place", c.Dir, cause(err))
	}
	done := false
	defer func() {
		if !done {
			os.RemoveAll(temp) // nothing in it has been shown to anybody
		}
	}()
	if err := fill(temp); err != nil {
		return err
	}
	// rename(2) replaces an empty folder but no other, so of two that come here at once one fails.
	if err := unix.Rename(temp, dir); err != nil {
		if v := vacant(c.Dir); v != nil {
			return v
		}
		return fmt.Errorf("root folder %s: can't be put in place (%w); choose a folder that is not there yet", c.Dir, err)
	}
	done = true
	if err := syncDir(parent); err != nil {
		return fmt.Errorf("root folder %s: made, but not known to be safe on disk: %w", c.Dir, err)
	}
	return nil
}

// make does the ceremony in a new folder.
func (c *RootConfig) make(ctx context.Context, dir string) (*Root, error) {
	keys, err := keystore.NewFile(keystore.FileConfig{Dir: filepath.Join(dir, keysDir), Passphrase: c.Passphrase})
	if err != nil {
		return nil, err
	}
	key, err := keys.Create(ctx, rootKey, c.Algorithm, 0)
	if err != nil {
		return nil, fmt.Errorf("make the root's key: %w", err)
	}
	checkpoints, err := makeLogKey(ctx, keys)
	if err != nil {
		return nil, err
	}
	r := &Root{dir: dir, td: c.TrustDomain, now: c.Now}
	return r, c.selfSign(ctx, r, key, checkpoints)
}

func makeLogKey(ctx context.Context, keys keystore.Store) (keystore.Key, error) {
	key, err := keys.Create(ctx, logKey, keystore.Ed25519, 0)
	if err != nil {
		return nil, fmt.Errorf("make the key of the root's log: %w", err)
	}
	return key, nil
}

// selfSign makes the root's certificate, and keeps it in the folder.
func (c *RootConfig) selfSign(ctx context.Context, r *Root, key, checkpoints keystore.Key) error {
	plan, err := ca.NewRootPlan(c.TrustDomain, key.Public(), c.Now(), c.Life)
	if err != nil {
		return err
	}
	if plan.Algorithm != c.Algorithm {
		return fmt.Errorf("the root's key is %s, asked for is %s", plan.Algorithm, c.Algorithm)
	}
	plan.PathLen, plan.Now = c.PathLen, c.Now
	var receipt audit.Receipt
	err = r.withLog(ctx, plan.SPKI, checkpoints, func(log ca.Log) (err error) {
		r.cert, receipt, err = SelfSign(ctx, log, key, plan, c.By)
		return err
	})
	if err != nil {
		return err
	}
	return r.keep(plan, receipt)
}

// keep puts the certificate of a new root into its folder, which makes it one.
func (r *Root) keep(plan ca.Plan, receipt audit.Receipt) error {
	if err := r.record(plan, r.cert, receipt); err != nil {
		return err
	}
	return durable.CreateFile(filepath.Join(r.dir, certificateFile), ca.EncodeChain(r.cert), 0o644)
}

// Vacant reports why the root can't be made there: ErrExists, or fs.ErrExist for something else.
func (c *RootConfig) Vacant() error { return vacant(c.Dir) }

// vacant reports why nothing can be made at dir: a root or something else is there.
func vacant(dir string) error {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("root folder %s: %w; choose another place", dir, cause(err))
	case len(entries) == 0:
		return nil
	}
	if r, err := OpenRoot(dir, nil); err == nil {
		return fmt.Errorf("folder %s: %w, for trust domain %s, valid until %s, fingerprint %s; nothing was touched", dir, ErrExists,
			r.td.Name(), r.cert.NotAfter.UTC().Format(time.DateOnly), ca.CertificateFingerprint(r.cert.Raw))
	}
	return fmt.Errorf("folder %s: %w; it holds %s and is left alone, choose a folder that is empty or not there yet", dir, fs.ErrExist, entries[0].Name())
}

// OpenRoot looks at an offline root folder, without its keys. A nil clock is time.Now.
func OpenRoot(dir string, now func() time.Time) (*Root, error) {
	if now == nil {
		now = time.Now
	}
	fail := func(err error) (*Root, error) {
		return nil, fmt.Errorf("root folder %s: %w", dir, err)
	}
	path := filepath.Join(dir, certificateFile)
	text, err := durable.ReadFile(path, "root certificate", maxCertificate)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("root folder %s: there is no root (%s is missing); make one with `signet root init`: %w", dir, certificateFile, fs.ErrNotExist)
	}
	if err != nil {
		return fail(err)
	}
	chain, err := ca.ParseChain(text)
	if err != nil {
		return fail(fmt.Errorf("%s: %w", certificateFile, err))
	}
	cert := chain[0]
	if len(chain) != 1 || len(cert.URIs) != 1 || !cert.IsCA || cert.CheckSignatureFrom(cert) != nil {
		return fail(fmt.Errorf("%s is not one self-signed root with a trust domain; restore it from a copy", certificateFile))
	}
	td, err := spiffeid.TrustDomainFromString(cert.URIs[0].String())
	if err != nil || td.IDString() != cert.URIs[0].String() {
		return fail(fmt.Errorf("%s names no trust domain; restore it from a copy", certificateFile))
	}
	return &Root{dir: dir, cert: cert, td: td, now: now}, nil
}

// SignConfig is what an intermediate is asked for with. Every field is for a person to review.
type SignConfig struct {
	// TrustDomain must be the root's; zero = the root's.
	TrustDomain spiffeid.TrustDomain
	Cluster     string
	// Algorithm that the request's key must have; empty = any allowed.
	Algorithm keystore.Algorithm
	// Request is the certificate request, PEM.
	Request []byte
	// KeyFingerprint is what `cluster init` printed, brought by another way than the request (a request swapped
	// on its way would get an intermediate).
	KeyFingerprint string
	// Delay is how much later than now it begins: for a successor of another one; 0 = at once.
	Delay time.Duration
	// Life from its beginning; 0 = ca.DefaultIntermediateLife.
	Life time.Duration
	// PathLen must be 0: an intermediate signs leaves only. It is here to be reviewed.
	PathLen int
}

// ErrFingerprint says that the request holds another key than the one whose fingerprint was given.
var ErrFingerprint = errors.New("key fingerprint differs")

// Prepare plans an intermediate and does all that needs no key.
func (r *Root) Prepare(c SignConfig) (*Prepared, error) {
	if c.TrustDomain.IsZero() {
		c.TrustDomain = r.td
	}
	if c.TrustDomain != r.td {
		return nil, fmt.Errorf("asked for trust domain %s, but the root in %s is for %s", c.TrustDomain.Name(), r.dir, r.td.Name())
	}
	if err := identity.ParseName("cluster", c.Cluster); err != nil {
		return nil, err
	}
	csr, err := ParseRequest(c.Request)
	if err != nil {
		return nil, err
	}
	want, err := ca.ParseFingerprint(c.KeyFingerprint)
	if err != nil {
		return nil, fmt.Errorf("key of the request: %w; `signet cluster init` prints it, bring it by another way than the request", err)
	}
	if !want.Of(csr.RawSubjectPublicKeyInfo) {
		return nil, fmt.Errorf("the request holds the key %s: %w from the one given, so it may have been swapped on its way; get request and fingerprint again from the cluster's admin",
			ca.KeyFingerprint(csr.RawSubjectPublicKeyInfo), ErrFingerprint)
	}
	switch {
	case c.Delay < 0 || c.Delay > maxLife:
		return nil, fmt.Errorf("intermediate: to begin in %s; want now or later, and at most 100 years", c.Delay)
	case c.Life < 0 || c.Life > maxLife:
		return nil, fmt.Errorf("intermediate: a life of %s; want more than nothing and at most 100 years", c.Life)
	case c.Life != 0 && c.Life < time.Minute:
		return nil, fmt.Errorf("intermediate: a life of %s is too short to be of use; want at least 1m", c.Life)
	}
	plan, err := ca.NewIntermediatePlan(c.TrustDomain, c.Cluster, csr.PublicKey, r.now().Add(c.Delay), c.Life)
	if err != nil {
		return nil, err
	}
	if c.Algorithm != "" && c.Algorithm != plan.Algorithm {
		return nil, fmt.Errorf("the request's key is %s, asked for is %s", plan.Algorithm, c.Algorithm)
	}
	plan.PathLen, plan.Now = c.PathLen, r.now
	return Prepare(plan, r.cert, c.Request)
}

// Signed is what came of one that was prepared.
type Signed struct {
	// Chain is the intermediate, then the root.
	Chain   []*x509.Certificate
	Receipt audit.Receipt
}

// Sign opens the keys and signs what Prepare returned, in one ceremony with an entry of the log and a record for each. When
// one fails the rest is not signed, and those before it are returned with the error.
func (r *Root) Sign(ctx context.Context, pass keystore.Passphrase, by *auditv1.Evidence, prepared ...*Prepared) ([]Signed, error) {
	lock, err := durable.Lock(r.dir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	files, err := keystore.NewFile(keystore.FileConfig{Dir: filepath.Join(r.dir, keysDir), Passphrase: pass})
	if err != nil {
		return nil, err
	}
	sign, err := r.signer(ctx, files, by)
	if err != nil {
		return nil, fmt.Errorf("root folder %s: %w", r.dir, err)
	}
	checkpoints, err := files.Open(ctx, keystore.Ref{Backend: keystore.BackendFile, Name: logKey, Version: 1})
	if err != nil {
		return nil, fmt.Errorf("root folder %s: %w", r.dir, err)
	}
	var signed []Signed
	err = r.withLog(ctx, r.cert.RawSubjectPublicKeyInfo, checkpoints, func(log ca.Log) error {
		for _, p := range prepared {
			chain, receipt, err := sign(log, p)
			if err != nil {
				return err
			}
			signed = append(signed, Signed{chain, receipt})
		}
		return nil
	})
	for i, s := range signed {
		err = errors.Join(err, r.record(prepared[i].plan, s.Chain[0], s.Receipt))
	}
	return signed, err
}

// signer is what signs with the root's key, wherever that is.
func (r *Root) signer(ctx context.Context, files keystore.Store, by *auditv1.Evidence) (func(ca.Log, *Prepared) ([]*x509.Certificate, audit.Receipt, error), error) {
	keys, ref := files, keystore.Ref{Backend: keystore.BackendFile, Name: rootKey, Version: 1}
	if e := r.elsewhere; e != nil && e.Engine != nil {
		return func(log ca.Log, p *Prepared) ([]*x509.Certificate, audit.Receipt, error) {
			return p.signWith(ctx, log, e.Engine, by)
		}, nil
	} else if e != nil {
		refs, err := e.versions(ctx)
		if err != nil {
			return nil, err
		}
		// Later versions are no keys of this root.
		i := slices.IndexFunc(refs, func(one keystore.Ref) bool { return one.Version == 1 })
		if i < 0 {
			return nil, fmt.Errorf("its key is not there (%s says where): %w", whereFile, keystore.ErrNotFound)
		}
		keys, ref = e.Keys, refs[i]
	} else if text, err := r.Where(); err != nil || text != nil {
		return nil, errors.Join(err, fmt.Errorf("its key is elsewhere, as %s says", whereFile))
	}
	key, err := keys.Open(ctx, ref)
	if err != nil {
		return nil, err
	}
	return func(log ca.Log, p *Prepared) ([]*x509.Certificate, audit.Receipt, error) {
		cert, receipt, err := p.Sign(ctx, log, key, by)
		return []*x509.Certificate{cert, r.cert}, receipt, err
	}, nil
}

// withLog opens the folder's log for one ceremony. When it returns nil, the log is closed and its checkpoint covers
// what was appended.
func (r *Root) withLog(ctx context.Context, rootSPKI []byte, checkpoints keystore.Key, do func(ca.Log) error) error {
	id, err := ca.KeyID(rootSPKI)
	if err != nil {
		return err
	}
	log, err := audit.Open(ctx, audit.Config{
		Dir:    filepath.Join(r.dir, logDir),
		Origin: r.td.Name() + "/root/" + hex.EncodeToString(id[:4]),
		Signer: checkpoints,
		// Few entries are all that comes: don't let the checkpoint be waited for.
		CheckpointInterval: 100 * time.Millisecond,
	})
	if err != nil {
		return fmt.Errorf("open the root's log: %w", err)
	}
	err = do(log)
	if cerr := log.Close(ctx); err == nil && cerr != nil {
		err = fmt.Errorf("close the root's log: %w", cerr)
	}
	return err
}

// record is what a ceremony leaves for people. The log is what proves.
type record struct {
	Kind        string    `yaml:"kind"`
	Time        time.Time `yaml:"time"`
	LogIndex    uint64    `yaml:"log_index"`
	TrustDomain string    `yaml:"trust_domain"`
	Cluster     string    `yaml:"cluster,omitempty"`
	Subject     string    `yaml:"subject"`
	Serial      string    `yaml:"serial"`
	NotBefore   time.Time `yaml:"not_before"`
	NotAfter    time.Time `yaml:"not_after"`
	PathLength  int       `yaml:"path_length"`
	Key         string    `yaml:"key_fingerprint"`
	Fingerprint string    `yaml:"certificate_fingerprint"`
	Certificate string    `yaml:"certificate"`
}

// RecordsDir is where the records of ceremonies are.
func (r *Root) RecordsDir() string { return filepath.Join(r.dir, recordsDir) }

func (r *Root) recordPath(p ca.Plan, at audit.Receipt) string {
	return filepath.Join(r.RecordsDir(), fmt.Sprintf("%04d-%s.yaml", at.Index, strings.TrimSuffix(p.Kind+"-"+p.Cluster, "-")))
}

func (r *Root) record(p ca.Plan, cert *x509.Certificate, at audit.Receipt) error {
	text, err := yaml.Marshal(record{
		Kind: p.Kind, Time: r.now().UTC().Truncate(time.Second), LogIndex: at.Index, TrustDomain: r.td.Name(), Cluster: p.Cluster,
		Subject: cert.Subject.String(), Serial: hex.EncodeToString(cert.SerialNumber.Bytes()),
		NotBefore: cert.NotBefore.UTC(), NotAfter: cert.NotAfter.UTC(), PathLength: cert.MaxPathLen,
		Key: ca.KeyFingerprint(cert.RawSubjectPublicKeyInfo), Fingerprint: ca.CertificateFingerprint(cert.Raw),
		Certificate: string(ca.EncodeChain(cert)),
	})
	if err != nil {
		return fmt.Errorf("write the record of the ceremony: %w", err)
	}
	if err := durable.Dir(r.RecordsDir()); err != nil {
		return err
	}
	return durable.CreateFile(r.recordPath(p, at), text, 0o644)
}

// Made is one certificate that the root's key was asked to sign, as its log tells.
type Made struct {
	Index uint64
	Time  time.Time
	Kind  string
	// Certificate is parsed from the logged bytes: it has no signature.
	Certificate *x509.Certificate
	// By says on whose word.
	By *auditv1.Evidence
}

// History is what the root's log holds.
type History struct {
	Origin string
	Size   uint64
	// VerifierKey proves the log's checkpoints. It was found in the folder: compare it with what root init printed.
	VerifierKey string
	Made        []Made
}

// History reads the folder's log and verifies all of it. It needs no key.
func (r *Root) History(ctx context.Context) (History, error) {
	fail := func(err error) (History, error) {
		return History{}, fmt.Errorf("read the log of root folder %s: %w", r.dir, err)
	}
	reader, err := audit.OpenReader(filepath.Join(r.dir, logDir), "")
	if err != nil {
		return fail(err)
	}
	defer reader.Close()
	// A root signs a few times a year: the whole log is read again at once.
	if err := reader.Verify(ctx, nil); err != nil {
		return fail(err)
	}
	cp, err := reader.Checkpoint(ctx)
	if err != nil {
		return fail(err)
	}
	h := History{Origin: cp.Origin, Size: cp.Size, VerifierKey: reader.VerifierKey()}
	for i := range cp.Size {
		_, entry, err := reader.Entry(ctx, i)
		if err != nil {
			return fail(err)
		}
		facts, err := audit.FactsOf(entry)
		if err != nil {
			return fail(fmt.Errorf("entry %d: %w", i, err))
		}
		if made := entry.GetAuthorityCreated(); made != nil {
			h.Made = append(h.Made, Made{Index: i, Time: facts.Time, Kind: made.GetKind(), Certificate: facts.Certificate, By: facts.Evidence})
		}
	}
	return h, nil
}

// cause is the reason in a path error: the path is in our own sentence.
func cause(err error) error {
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
