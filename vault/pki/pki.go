// Package pki lets a mount of Vault's PKI engine sign our intermediates (ca.Upstream), and make a root whose key never leaves
// Vault.
//
// What Vault makes depends on its version, on the mount, on the issuer and on which parameters were left out: it truncates
// lives, takes names from the request or drops them, adds certificates to the chain. So everything is said explicitly, and
// what comes back is compared with the plan.
package pki

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/vault"
)

const (
	// maxIssuers bounds the issuers of a mount that are looked at.
	maxIssuers = 256
	// maxCertificates bounds those in an answer: a chain may hold cross-signed ones beside the path.
	maxCertificates = 4 * ca.MaxChain
	// maxClocks is how far Vault's clock may be behind ours.
	maxClocks = ca.PlanBackdate
)

// DefaultIssuer is Vault's word for the issuer that a mount signs with.
const DefaultIssuer = "default"

// Config says which mount and issuer sign.
type Config struct {
	Vault *vault.Client
	// Mount is where the engine is mounted, without slashes at its ends.
	Mount string
	// Issuer is the name or ID of the issuer to begin with; "" = DefaultIssuer. Under another root than its own, the issuer in
	// the mount that leads there is taken.
	Issuer string
	Now    func() time.Time
	Logger *slog.Logger
}

// Upstream is a mount of Vault's PKI engine.
type Upstream struct {
	c Config
	// vault is the way to the engine.
	vault *vault.Engine
}

var _ ca.Upstream = (*Upstream)(nil)

// New checks the configuration and talks to nobody.
func New(c Config) (*Upstream, error) {
	if c.Issuer == "" {
		c.Issuer = DefaultIssuer
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.Vault == nil:
		return nil, errors.New("vault-pki: no Vault to ask")
	case c.Mount == "" || strings.HasPrefix(c.Mount, "/") || strings.HasSuffix(c.Mount, "/"):
		return nil, fmt.Errorf("vault-pki: mount %.128q: name where the PKI engine is mounted, for example pki, without slashes at its ends", c.Mount)
	case strings.Contains(c.Issuer, "/"):
		return nil, fmt.Errorf("vault-pki: issuer %.128q: give a name or an ID, as `vault list -detailed %s/issuers` shows them", c.Issuer, c.Mount)
	}
	return &Upstream{c, c.Vault.Engine(c.Mount)}, nil
}

// Needs is what Sign needs of a policy. Lists of issuers and their certificates are open to all in Vault.
func Needs(c Config) []vault.Need {
	return []vault.Need{{
		Path: c.Mount + "/issuer/+/sign-intermediate", Capabilities: []string{"update"}, Why: "have intermediates signed, in a rotation of the root by an issuer whose name is not known yet",
		// Another issuer signs only under a root that the configured one does not lead to.
		Asks: []string{c.Mount + "/issuer/" + cmp.Or(c.Issuer, DefaultIssuer) + "/sign-intermediate"},
	}}
}

// LookNeeds is what Look needs beside: what else is said of an issuer is not open to all.
func LookNeeds(c Config) []vault.Need {
	return []vault.Need{{
		Path: c.Mount + "/issuer/+", Capabilities: []string{"read"}, Why: "look whether an issuer has its key and may sign, also between two signatures",
		Asks: []string{c.Mount + "/issuer/" + cmp.Or(c.Issuer, DefaultIssuer)},
	}}
}

func (u *Upstream) String() string { return "Vault's PKI mount " + u.c.Mount }

// issuer is one of the mount.
type issuer struct {
	// ref names it in paths: as it is configured, so that a policy may name it likewise, else its ID.
	ref, id, name string
	cert          *x509.Certificate
	// others are what Vault thinks is above it, in no order that could be relied upon.
	others []*x509.Certificate
}

func (i *issuer) String() string {
	if i.name != "" && i.name != i.ref {
		return fmt.Sprintf("issuer %s (%s)", i.ref, clip(i.name))
	}
	return "issuer " + i.ref
}

// Root is the root that the configured issuer leads to; of several the nearest.
func (u *Upstream) Root(ctx context.Context) (*x509.Certificate, error) {
	i, err := u.issuer(ctx, u.c.Issuer)
	if missing(err) {
		return nil, fmt.Errorf("%w (%w)", u.noSuchIssuer(), err)
	}
	if err != nil {
		return nil, err
	}
	path := climb(i.others, selfSigned, i.cert)
	if path == nil {
		return nil, fmt.Errorf("%s: the chain of %s holds no root: import the root's certificate into the mount (`vault write %s/issuers/import/cert pem_bundle=@root.pem`)",
			u, i, u.c.Mount)
	}
	return path[len(path)-1], nil
}

func (u *Upstream) noSuchIssuer() error {
	return fmt.Errorf("%s has no issuer %s: give a name or an ID, as `vault list -detailed %s/issuers` shows them", u, u.c.Issuer, u.c.Mount)
}

// missing: an issuer that isn't there is refused by Vault, not unknown to it.
func missing(err error) bool {
	return errors.Is(err, vault.ErrNotFound) || errors.Is(err, vault.ErrRefused)
}

// closed explains why Vault does not tell what every PKI engine tells whoever asks: to who has no policy for a path it says the
// same where nothing is mounted.
func (u *Upstream) closed(err error) error {
	if !errors.Is(err, vault.ErrDenied) || errors.Is(err, vault.ErrLogin) {
		return err
	}
	return fmt.Errorf("a PKI engine tells that to whoever asks, so there is none at %s, or a policy denies it: look at `vault secrets list`, and set the mount (upstream.vault_pki.mount in a server's file, pki.mount in a root's): %w", u.c.Mount, err)
}

// issuers are those of the mount.
type issuers struct {
	all []*issuer
	// configured is nil if it isn't there.
	configured *issuer
	// unread says why others could not be read. A mount may hold what is no concern of ours, or what is gone since it was listed.
	unread []error
}

// mostReads bounds the issuers that are read at once.
const mostReads = 8

// issuers reads all of the mount. The configured one is told apart by looking, for it may be named by name or ID.
func (u *Upstream) issuers(ctx context.Context) (*issuers, error) {
	ids, err := u.vault.List(ctx, u.c.Mount+"/issuers")
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: list its issuers: %w", u, u.closed(err))
	case len(ids) > maxIssuers:
		return nil, fmt.Errorf("%s holds %d issuers, and at most %d are looked through: use a mount with fewer", u, len(ids), maxIssuers)
	case len(ids) == 0:
		return &issuers{}, nil
	}
	refs := ids
	if u.c.Issuer == DefaultIssuer {
		refs = append(slices.Clip(ids), DefaultIssuer)
	}
	read, failed := make([]*issuer, len(refs)), make([]error, len(refs))
	within, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var reading sync.WaitGroup
	next := make(chan int)
	for range min(mostReads, len(refs)) {
		reading.Go(func() {
			for n := range next {
				if read[n], failed[n] = u.issuer(within, refs[n]); errors.Is(failed[n], vault.ErrAway) {
					cancel(failed[n])
				}
			}
		})
	}
	for n := range refs {
		if within.Err() != nil {
			break
		}
		next <- n
	}
	close(next)
	reading.Wait()
	if within.Err() != nil {
		return nil, context.Cause(within)
	}
	m, want := &issuers{}, u.c.Issuer
	for n, i := range read {
		switch {
		case failed[n] != nil:
			m.unread = append(m.unread, failed[n])
		case n == len(ids):
			want = i.id
		default:
			m.all = append(m.all, i)
		}
	}
	for _, i := range m.all {
		if i.id == want || i.name == want {
			i.ref, m.configured = u.c.Issuer, i
		}
	}
	return m, nil
}

func (u *Upstream) issuer(ctx context.Context, ref string) (*issuer, error) {
	fail := func(err error) (*issuer, error) {
		return nil, fmt.Errorf("%s: read its issuer %s: %w", u, clip(ref), err)
	}
	if strings.Contains(ref, "/") {
		return fail(errors.New("that is no name of an issuer"))
	}
	secret, err := u.vault.Read(ctx, u.c.Mount+"/issuer/"+ref+"/json")
	if err != nil {
		return fail(u.closed(err))
	}
	own, above, err := certificates(secret.Data, "certificate", "ca_chain")
	if err != nil {
		return fail(err)
	}
	i := &issuer{ref: ref, cert: own, others: above}
	i.id, _ = secret.Data["issuer_id"].(string)
	i.name, _ = secret.Data["issuer_name"].(string)
	return i, nil
}

// Sign has the certificate made by the issuer that leads to the root of the plan. Errors that wrap vault.ErrAway may pass.
func (u *Upstream) Sign(ctx context.Context, p ca.Plan, csr []byte) (ca.Answer, error) {
	fail := func(err error) (ca.Answer, error) {
		return ca.Answer{}, fmt.Errorf("sign %q: %w", p.CommonName, err)
	}
	now := u.c.Now()
	if p.Now == nil {
		p.Now = u.c.Now
	}
	if err := checkAsk(p, csr, now); err != nil {
		return fail(err)
	}
	if p.Under == nil {
		root, err := u.Root(ctx)
		if err != nil {
			return fail(err)
		}
		p.Under = root
	}
	candidates, err := u.under(ctx, p.Under)
	if err != nil {
		return fail(err)
	}
	// The mount may hold issuers that lead there but can't sign: without a key, or not meant to. Vault says so only when asked.
	for _, c := range candidates {
		answer, tried := u.sign(ctx, c, p, csr)
		if tried == nil {
			return answer, nil
		}
		if !errors.Is(tried, errUnfit) {
			return fail(tried)
		}
		if err == nil {
			err = tried
		}
	}
	return fail(err)
}

// checkAsk refuses what Vault can't make, or would make of something else.
func checkAsk(p ca.Plan, csr []byte, now time.Time) error {
	if err := p.Validate(); err != nil {
		return err
	}
	switch {
	case p.SelfSigned():
		return errors.New("a CA that signs itself is signed by nobody else")
	case p.CommonName == "" || p.NotBefore.IsZero() || p.NotAfter.IsZero():
		return errors.New("the plan lacks a common name or its validity, and Vault would choose them")
	case p.NotBefore.After(now):
		return fmt.Errorf("it is to begin on %s, but what Vault signs begins at once: ask for it then", stamp(p.NotBefore))
	case !p.NotAfter.After(now):
		return fmt.Errorf("it is to end on %s, and now is %s: it would be signed expired", stamp(p.NotAfter), stamp(now))
	}
	block, _ := pem.Decode(csr)
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return errors.New("the certificate request is not PEM")
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return errors.New("the certificate request is damaged: it is not in DER (PKCS #10)")
	}
	if !bytes.Equal(req.RawSubjectPublicKeyInfo, p.SPKI) {
		return fmt.Errorf("the certificate request holds the key %s, planned is %s", ca.KeyFingerprint(req.RawSubjectPublicKeyInfo), ca.KeyFingerprint(p.SPKI))
	}
	return nil
}

// candidate is an issuer with the path from what it signs to the root: first the issuer's certificate, or another of the same name
// and key that is nearer to the root.
type candidate struct {
	*issuer
	path []*x509.Certificate
}

// under finds the issuers that lead to a root: the configured one first, then the nearest.
func (u *Upstream) under(ctx context.Context, root *x509.Certificate) ([]candidate, error) {
	m, err := u.issuers(ctx)
	if err != nil {
		return nil, err
	}
	var found []candidate
	for _, i := range m.all {
		pool := append(slices.Clip(i.others), root)
		if path := climb(pool, root.Equal, append([]*x509.Certificate{i.cert}, twins(i.cert, pool)...)...); path != nil {
			found = append(found, candidate{i, path})
		}
	}
	if len(found) == 0 {
		err := u.noSuchIssuer()
		if len(m.all)+len(m.unread) == 0 {
			err = fmt.Errorf("%w; it has none at all, so look at `vault secrets list` as well: the mount is set by upstream.vault_pki.mount in a server's file, by pki.mount in a root's", err)
		}
		if m.configured != nil {
			err = fmt.Errorf("%s: none of its %d issuers leads to the root %s (%s): bring that root there, or begin a rotation to the root that %s leads to",
				u, len(m.all), nameOf(root), ca.CertificateFingerprint(root.Raw), m.configured)
		}
		if len(m.unread) > 0 {
			err = fmt.Errorf("%w; %d could not be read, the first: %w", err, len(m.unread), m.unread[0])
		}
		return nil, err
	}
	slices.SortStableFunc(found, func(a, b candidate) int {
		switch {
		case a.issuer == m.configured:
			return -1
		case b.issuer == m.configured:
			return 1
		case len(a.path) != len(b.path):
			return len(a.path) - len(b.path)
		}
		return b.cert.NotAfter.Compare(a.cert.NotAfter)
	})
	return found, nil
}

// errUnfit: the issuer can't sign this, another one may.
var errUnfit = errors.New("issuer unfit")

// unfit is an error that is errUnfit as well.
type unfit struct{ error }

func (e unfit) Is(target error) bool { return target == errUnfit }
func (e unfit) Unwrap() error        { return e.error }

// sign asks one issuer.
func (u *Upstream) sign(ctx context.Context, c candidate, p ca.Plan, csr []byte) (ca.Answer, error) {
	fail := func(err error) (ca.Answer, error) {
		return ca.Answer{}, fmt.Errorf("%s, %s: %w", u, c, err)
	}
	now := u.c.Now()
	asked := p
	if err := clamp(&asked, c, now); err != nil {
		return fail(unfit{err})
	}
	id, err := ca.KeyID(p.SPKI)
	if err != nil {
		return fail(err)
	}
	secret, err := u.vault.Write(ctx, u.c.Mount+"/issuer/"+c.ref+"/sign-intermediate", map[string]any{
		"csr":    string(csr),
		"format": "pem",
		// Else the subject, the names and all extensions but the basic constraints are the request's.
		"use_csr_values": false,
		"common_name":    p.CommonName,
		"organization":   []string{p.Organization()},
		// Else a common name that looks like a host becomes a DNS name.
		"exclude_cn_from_sans": true,
		"uri_sans":             []string{p.TrustDomain.IDString()},
		// Else it is the issuer's less one, or unlimited.
		"max_path_length": p.PathLen,
		// Not ttl: the mount's limit cuts that short, by default to 32 days.
		"not_after":           asked.NotAfter.UTC().Format(time.RFC3339),
		"not_before_duration": fmt.Sprintf("%ds", backdate(p, c.cert, now)/time.Second),
		// As everywhere, so that leaves find their issuer also when its key is certified anew by somebody else.
		"skid": hex.EncodeToString(id),
	})
	if err != nil {
		if errors.Is(err, vault.ErrRefused) {
			err = unfit{err}
		}
		return fail(err)
	}
	unusable := func(err error) (ca.Answer, error) { return fail(fmt.Errorf("%w: %w", ca.ErrUnusable, err)) }
	own, above, err := certificates(secret.Data, "certificate", "issuing_ca", "ca_chain")
	if err != nil {
		return unusable(err)
	}
	root := c.path[len(c.path)-1]
	pool := slices.Concat(above, c.path)
	path := climb(pool, root.Equal, own)
	if path == nil {
		path = []*x509.Certificate{own, root} // Check says what is wrong with it.
	}
	chain := path[:len(path)-1]
	check := asked
	check.NotBefore = p.NotBefore.Add(-maxClocks)
	if err := check.Check(chain, []*x509.Certificate{root}); err != nil {
		return unusable(err)
	}
	// The leaves name their issuer by it: with another one they would not find it when the same key is certified anew, or find another.
	// A subject with other parts beside the common name harms nobody.
	if !bytes.Equal(own.SubjectKeyId, id) {
		return unusable(fmt.Errorf("%s has the subject key identifier %x, and %x was asked for, which is of its key", nameOf(own), own.SubjectKeyId, id))
	}
	if end := own.NotAfter; end.Before(asked.NotAfter) && end.Sub(now) < least(p, now) {
		return unusable(fmt.Errorf("it is signed only until %s, and %s was asked for: look at leaf_not_after_behavior and at what is above that issuer", stamp(end), stamp(asked.NotAfter)))
	}
	if err := verify(path, now); err != nil {
		return unusable(fmt.Errorf("validators would refuse %s: %w", nameOf(own), err))
	}
	u.c.Logger.Info("Vault signed a CA", "mount", u.c.Mount, "issuer", c.ref, "serial", fmt.Sprintf("%x", own.SerialNumber), "not_after", own.NotAfter)
	return ca.Answer{Chain: slices.Clone(chain), Roots: []*x509.Certificate{root}}, nil
}

// clamp ends the plan with the first of the path that ends, and refuses a path that can't carry it. Vault goes by its issuer's own
// certificate, also where there is a nearer one.
func clamp(p *ca.Plan, by candidate, now time.Time) error {
	path := by.path
	if !path[0].Equal(by.cert) {
		if err := clamp(p, candidate{by.issuer, []*x509.Certificate{by.cert}}, now); err != nil {
			return err
		}
	}
	first := p.NotAfter
	for i, c := range path {
		limit := c.MaxPathLen
		switch {
		case now.After(c.NotAfter):
			return fmt.Errorf("%s expired on %s, and now is %s", nameOf(c), stamp(c.NotAfter), stamp(now))
		case now.Before(c.NotBefore):
			return fmt.Errorf("%s begins on %s, and now is %s: set the clock right or wait", nameOf(c), stamp(c.NotBefore), stamp(now))
		// Vault looks at a limit of 0 only, and only at its own issuer's.
		case (limit > 0 || c.MaxPathLenZero) && i+1+p.PathLen > limit:
			return fmt.Errorf("%s allows %d CA certificates below it (path length), and there would be %d: have it signed again with a longer one, or use an issuer further up",
				nameOf(c), limit, i+1+p.PathLen)
		}
		if c.NotAfter.Before(p.NotAfter) {
			p.NotAfter = c.NotAfter.UTC()
		}
	}
	if left := p.NotAfter.Sub(now); p.NotAfter.Before(first) && left < least(ca.Plan{NotAfter: first}, now) {
		return fmt.Errorf("its chain ends on %s, in %s: what it signs now would live shorter than the least useful %s; make a new root or issuer",
			stamp(p.NotAfter), left.Truncate(time.Second), ca.MinIntermediateLife)
	}
	return nil
}

// least is what must be left of a plan's life.
func least(p ca.Plan, now time.Time) time.Duration {
	return min(p.NotAfter.Sub(now), ca.MinIntermediateLife)
}

// backdate is how far before Vault's now the certificate begins. Vault refuses to begin before the issuer does. Its clock
// may differ from ours: of a young issuer only half its age is used. And 0 is read as the default of 30 s.
func backdate(p ca.Plan, issuer *x509.Certificate, now time.Time) time.Duration {
	d := min(now.Sub(p.NotBefore), now.Sub(issuer.NotBefore)/2)
	return max(d.Truncate(time.Second), time.Second)
}

// verify does what validators will do, name constraints and extended key usages of those above included.
func verify(path []*x509.Certificate, now time.Time) error {
	roots, above := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(path[len(path)-1])
	for _, c := range path[1 : len(path)-1] {
		above.AddCert(c)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := path[0].Verify(x509.VerifyOptions{
			Roots: roots, Intermediates: above, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
		}); err != nil {
			return err
		}
	}
	return nil
}

// climb finds the shortest way up from one of some certificates to one that is wanted, both included; nil = there is none. Of two
// equally short ones it takes that whose end lives longer.
func climb(pool []*x509.Certificate, wanted func(*x509.Certificate) bool, from ...*x509.Certificate) []*x509.Certificate {
	seen := slices.Clone(from)
	var level [][]*x509.Certificate
	for _, c := range from {
		level = append(level, []*x509.Certificate{c})
	}
	for len(level) > 0 {
		var best []*x509.Certificate
		var next [][]*x509.Certificate
		for _, path := range level {
			top := path[len(path)-1]
			if wanted(top) {
				if best == nil || top.NotAfter.After(best[len(best)-1].NotAfter) {
					best = path
				}
				continue
			}
			for _, c := range pool {
				if !slices.ContainsFunc(seen, c.Equal) && signedBy(top, c) {
					seen = append(seen, c)
					next = append(next, append(slices.Clip(path), c))
				}
			}
		}
		if best != nil {
			return best
		}
		level = next
	}
	return nil
}

// twins are other certificates of the same name and key. What one has signed, each has: they are no levels of a path, as
// self-issued ones are not where its length counts (RFC 5280 §6.1).
func twins(c *x509.Certificate, pool []*x509.Certificate) (same []*x509.Certificate) {
	for _, t := range pool {
		if !t.Equal(c) && bytes.Equal(t.RawSubject, c.RawSubject) && bytes.Equal(t.RawSubjectPublicKeyInfo, c.RawSubjectPublicKeyInfo) && bytes.Equal(t.SubjectKeyId, c.SubjectKeyId) {
			same = append(same, t)
		}
	}
	return same
}

func signedBy(c, above *x509.Certificate) bool {
	return bytes.Equal(c.RawIssuer, above.RawSubject) && c.CheckSignatureFrom(above) == nil
}

func selfSigned(c *x509.Certificate) bool { return signedBy(c, c) }

// certificates reads an answer: the one of the first name, and without doubles those of the further names that are there.
// A private key in an answer is a mistake that somebody must hear of, wherever it is.
func certificates(data map[string]any, first string, further ...string) (own *x509.Certificate, above []*x509.Certificate, err error) {
	if _, ok := data["private_key"]; ok {
		return nil, nil, errors.New("the answer holds a private key, which must never leave Vault: take that key out of use")
	}
	one := func(name string, value any) (*x509.Certificate, error) {
		text, ok := value.(string)
		if !ok || text == "" {
			return nil, fmt.Errorf("the answer has no %s", name)
		}
		chain, err := ca.ParseChain([]byte(text))
		if err == nil && len(chain) != 1 {
			err = fmt.Errorf("it holds %d certificates, and one is expected", len(chain))
		}
		if err != nil {
			return nil, fmt.Errorf("%s of the answer is refused: %w", name, err)
		}
		return chain[0], nil
	}
	if own, err = one(first, data[first]); err != nil {
		return nil, nil, err
	}
	for _, name := range further {
		values, ok := data[name].([]any)
		if text, single := data[name].(string); single && !ok {
			values = []any{text}
		}
		if len(values) > maxCertificates {
			return nil, nil, fmt.Errorf("%s of the answer holds %d certificates; at most %d are allowed", name, len(values), maxCertificates)
		}
		for _, v := range values {
			c, err := one(name, v)
			if err != nil {
				return nil, nil, err
			}
			if !c.Equal(own) && !slices.ContainsFunc(above, c.Equal) {
				above = append(above, c)
			}
		}
	}
	return own, above, nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// nameOf names a certificate in sentences, bounded, since the text may be foreign.
func nameOf(c *x509.Certificate) string {
	return fmt.Sprintf("%q (serial %x)", clip(c.Subject.String()), c.SerialNumber)
}

func clip(s string) string {
	if len(s) > 128 {
		return s[:128] + "…"
	}
	return s
}
