package ceremony

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
)

// Elsewhere is who holds the key of a root that is not in its folder: Keys or Engine.
type Elsewhere struct {
	// Keys holds the key alone, as root@1. Certificates are made here, as with a key in the folder.
	Keys keystore.Store
	// Engine makes the certificates itself.
	Engine Engine
	// Where is the text that the folder keeps of it, to be found again by.
	Where []byte
}

// Engine holds a root's key and makes certificates with it by its own rules, as Vault's PKI engine does. What it makes is
// compared with the plan, but it can't be predicted to the byte: it is logged when it is made, before anybody sees it.
type Engine interface {
	ca.Upstream
	// MakeRoot makes a root, by a plan without a key, under a name that the engine knows; one of that name must not be there.
	MakeRoot(ctx context.Context, p ca.Plan) (*x509.Certificate, error)
	// FindRoot returns what MakeRoot made by such a plan; nil = nothing has that name. Another root of that name is an error.
	FindRoot(ctx context.Context, p ca.Plan) (*x509.Certificate, error)
}

// whereFile says in a root's folder who holds the key.
const whereFile = "key.yaml"

// maxWhere bounds it, in bytes.
const maxWhere = 64 << 10

func (e *Elsewhere) validate() error {
	switch {
	case (e.Keys == nil) == (e.Engine == nil):
		return errors.New("root: its key is either in a keystore or with an engine")
	case len(e.Where) == 0 || len(e.Where) > maxWhere:
		return fmt.Errorf("root: %d bytes that say where its key is; want 1 to %d", len(e.Where), maxWhere)
	}
	return nil
}

// Where is what the folder keeps of who holds the root's key; nil = the folder does.
func (r *Root) Where() ([]byte, error) { return where(r.dir) }

func where(dir string) ([]byte, error) {
	text, err := durable.ReadFile(filepath.Join(dir, whereFile), "file about the root's key", maxWhere)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return text, err
}

// WherePath is the file that Where is read from.
func (r *Root) WherePath() string { return filepath.Join(r.dir, whereFile) }

// KeyIn says who holds the root's key, for Sign.
func (r *Root) KeyIn(e *Elsewhere) { r.elsewhere = e }

// Begun reports whether the folder remembers a root that was begun, with its key elsewhere, and not finished: InitRoot goes on
// with it.
func (c *RootConfig) Begun() (bool, error) {
	if _, err := os.Lstat(filepath.Join(c.Dir, certificateFile)); err == nil {
		return false, nil
	}
	text, err := where(c.Dir)
	if err != nil || text == nil {
		return false, err
	}
	switch {
	case c.Elsewhere == nil:
		return false, fmt.Errorf("folder %s: a root was begun there whose key is elsewhere (%s): go on with it, or choose another folder", c.Dir, whereFile)
	case !bytes.Equal(text, c.Elsewhere.Where):
		return false, fmt.Errorf("folder %s: a root was begun there whose key is somewhere else (%s) than is asked for now: ask for the same to go on, or see to what was made there and choose another folder",
			c.Dir, whereFile)
	}
	return true, nil
}

// begin puts into a new folder what is needed to go on after an end at any moment, before a key is made elsewhere.
func (c *RootConfig) begin(ctx context.Context, dir string) (keystore.Key, error) {
	files, err := keystore.NewFile(keystore.FileConfig{Dir: filepath.Join(dir, keysDir), Passphrase: c.Passphrase})
	if err != nil {
		return nil, err
	}
	checkpoints, err := makeLogKey(ctx, files)
	if err != nil {
		return nil, err
	}
	return checkpoints, durable.CreateFile(filepath.Join(dir, whereFile), c.Elsewhere.Where, 0o600)
}

// free refuses to make what is there already and of which the folder knows nothing: it is somebody's root.
func (c *RootConfig) free(ctx context.Context) error {
	if c.Elsewhere.Engine != nil {
		p := c.plan("")
		if cert, err := c.Elsewhere.Engine.FindRoot(ctx, p); err != nil || cert == nil {
			return err
		}
		return fmt.Errorf("root: %w where its key is to be made; nothing was touched", ErrExists)
	}
	refs, err := c.Elsewhere.versions(ctx)
	if err == nil && len(refs) > 0 {
		err = fmt.Errorf("root: %w where its key is to be made: %d versions of the key %s; nothing was touched, choose another prefix", ErrExists, len(refs), rootKey)
	}
	return err
}

// versions lists those of the root's key.
func (e *Elsewhere) versions(ctx context.Context) ([]keystore.Ref, error) {
	all, err := e.Keys.List(ctx)
	if err != nil {
		return nil, err
	}
	var refs []keystore.Ref
	for _, ref := range all {
		if ref.Name == rootKey {
			refs = append(refs, ref)
		}
	}
	return refs, nil
}

// finish makes the root in a folder that begin has prepared. After an error it can be called again, begun is true then.
func (c *RootConfig) finish(ctx context.Context, checkpoints keystore.Key, begun bool) (*Root, error) {
	lock, err := durable.Lock(c.Dir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if begun {
		// Somebody else may have gone on meanwhile.
		if begun, err = c.Begun(); err != nil || !begun {
			return nil, errors.Join(err, vacant(c.Dir))
		}
		keys, err := keystore.NewFile(keystore.FileConfig{Dir: filepath.Join(c.Dir, keysDir), Passphrase: c.Passphrase})
		if err != nil {
			return nil, err
		}
		if checkpoints, err = keys.Open(ctx, keystore.Ref{Backend: keystore.BackendFile, Name: logKey, Version: 1}); err != nil {
			return nil, fmt.Errorf("root folder %s: %w", c.Dir, err)
		}
	}
	r := &Root{dir: c.Dir, td: c.TrustDomain, now: c.Now}
	if c.Elsewhere.Engine != nil {
		err = c.makeWithEngine(ctx, r, checkpoints, begun)
	} else {
		var key keystore.Key
		if key, err = c.keyElsewhere(ctx, begun); err == nil {
			err = c.selfSign(ctx, r, key, checkpoints)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("root folder %s: begun, and can be gone on with by the same command: %w", c.Dir, err)
	}
	return r, nil
}

// keyElsewhere makes the root's key, or opens the one that was made before an interruption.
func (c *RootConfig) keyElsewhere(ctx context.Context, begun bool) (keystore.Key, error) {
	if begun {
		refs, err := c.Elsewhere.versions(ctx)
		switch {
		case err != nil:
			return nil, err
		case len(refs) == 1 && refs[0].Version == 1:
			return c.Elsewhere.Keys.Open(ctx, refs[0])
		case len(refs) > 0:
			return nil, fmt.Errorf("key %s has %d versions now, and a root has one: somebody else has made or rotated it; choose another prefix and folder", rootKey, len(refs))
		}
	}
	key, err := c.Elsewhere.Keys.Create(ctx, rootKey, c.Algorithm, 0)
	if err != nil {
		return nil, fmt.Errorf("make the root's key: %w", err)
	}
	if key.Ref().Version != 1 {
		return nil, fmt.Errorf("make the root's key: somebody else has made a key %s at the same time, ours is %s: choose another prefix and folder", rootKey, key.Ref())
	}
	return key, nil
}

// plan is that of a root whose key an engine is going to make.
func (c *RootConfig) plan(name string) ca.Plan {
	start := c.Now().UTC().Truncate(time.Second)
	return ca.Plan{
		Kind: ca.KindRoot, TrustDomain: c.TrustDomain, CommonName: name, PathLen: c.PathLen, Algorithm: c.Algorithm, Now: c.Now,
		NotBefore: start.Add(-ca.PlanBackdate), NotAfter: start.Add(c.Life - time.Second),
	}
}

// makeWithEngine has the engine make the root, or finds the one that it made before an interruption, and logs it.
func (c *RootConfig) makeWithEngine(ctx context.Context, r *Root, checkpoints keystore.Key, begun bool) (err error) {
	name, err := c.nameAfter(checkpoints)
	if err != nil {
		return err
	}
	plan := c.plan(name)
	if begun {
		if r.cert, err = c.Elsewhere.Engine.FindRoot(ctx, plan); err != nil {
			return err
		}
	}
	if r.cert == nil {
		if r.cert, err = c.Elsewhere.Engine.MakeRoot(ctx, plan); err != nil {
			return err
		}
	}
	plan.SPKI = r.cert.RawSubjectPublicKeyInfo
	if err := lintCertificate(r.cert.Raw); err != nil {
		return fmt.Errorf("root %q: %w", name, err)
	}
	var receipt audit.Receipt
	err = r.withLog(ctx, plan.SPKI, checkpoints, func(log ca.Log) (err error) {
		receipt, err = logMade(ctx, log, plan, r.cert, c.By)
		return err
	})
	if err != nil {
		return err
	}
	return r.keep(plan, receipt)
}

// nameAfter names a root after the key of its log: its own key is not known before the certificate is there, and a root that
// was made before an interruption must be told from somebody else's.
func (c *RootConfig) nameAfter(checkpoints crypto.Signer) (string, error) {
	spki, err := x509.MarshalPKIXPublicKey(checkpoints.Public())
	if err != nil {
		return "", err
	}
	id := sha256.Sum256(spki)
	return ca.RootName(c.TrustDomain, id[:]), nil
}

// logMade logs a certificate that an engine has made.
func logMade(ctx context.Context, log ca.Log, plan ca.Plan, cert *x509.Certificate, by *auditv1.Evidence) (audit.Receipt, error) {
	receipts, err := log.Append(ctx, []*auditv1.Entry{entryOf(plan, cert.RawTBSCertificate, by)})
	if err == nil && len(receipts) != 1 {
		err = fmt.Errorf("the log gave %d receipts for one entry", len(receipts))
	}
	if err != nil {
		return audit.Receipt{}, fmt.Errorf("%q (serial %x) was made but could not be logged, so it is not given out: %w", plan.CommonName, cert.SerialNumber, err)
	}
	return receipts[0], nil
}

// signWith has an engine make what was prepared. It works once, as Sign does.
func (p *Prepared) signWith(ctx context.Context, log ca.Log, engine Engine, by *auditv1.Evidence) ([]*x509.Certificate, audit.Receipt, error) {
	fail := func(err error) ([]*x509.Certificate, audit.Receipt, error) {
		return nil, audit.Receipt{}, fmt.Errorf("sign %q: %w", p.plan.CommonName, err)
	}
	if !p.spent.CompareAndSwap(false, true) {
		return fail(errors.New("it has been signed already; prepare another"))
	}
	plan := p.plan
	plan.Serial, plan.Under = nil, p.issuer
	answer, err := engine.Sign(ctx, plan, p.csr)
	if err != nil {
		return fail(err)
	}
	if answer.Pending != "" || len(answer.Chain) == 0 {
		return fail(fmt.Errorf("it is not signed yet: %s", answer.Pending))
	}
	cert := answer.Chain[0]
	plan.NotBefore = time.Time{} // The engine's clock is its own; how far it may be off was its upstream's to check.
	if err := plan.Check(answer.Chain, []*x509.Certificate{p.issuer}); err != nil {
		return fail(err)
	}
	if err := lintCertificate(cert.Raw); err != nil {
		return fail(err)
	}
	receipt, err := logMade(ctx, log, plan, cert, by)
	if err != nil {
		return fail(err)
	}
	return append(answer.Chain, p.issuer), receipt, nil
}
