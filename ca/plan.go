package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

// The kinds of CA certificates, as they stand in the log.
const (
	KindRoot         = "root"
	KindIntermediate = "intermediate"
	KindControl      = "control"
)

// Default lives of CA certificates. The intermediate's is for an offline root.
const (
	DefaultRootLife         = 10 * 365 * 24 * time.Hour
	DefaultIntermediateLife = 90 * 24 * time.Hour
	DefaultControlLife      = 10 * 365 * 24 * time.Hour
)

// MinIntermediateLife is the least that an intermediate may live when the end of a CA above it cuts its life short: the
// default life of a leaf. A life that was asked for as such may be shorter.
const MinIntermediateLife = 24 * time.Hour

// PlanBackdate is how far before its start a CA certificate is valid already, for clocks that are late.
const PlanBackdate = 5 * time.Minute

// MaxChain bounds the certificates of a chain, the root included.
const MaxChain = 8

// maxChainPEM bounds the text of a chain, in bytes.
const maxChainPEM = 128 << 10

// Plan says what a CA certificate must look like before anybody signs it. What comes back from whoever signs is
// compared with it (Check), because upstreams clamp, add and forget.
type Plan struct {
	// Kind is KindRoot, KindIntermediate or KindControl. Root and control CA sign themselves.
	Kind        string
	TrustDomain spiffeid.TrustDomain
	// Cluster is empty for a root.
	Cluster string
	// CommonName of the subject, at most 64 bytes (RFC 5280 appendix A.1, ub-common-name). Empty = not compared by Check.
	CommonName string
	// PathLen is how many CA certificates may stand between this one and a leaf (RFC 5280 §4.2.1.9).
	PathLen int
	// NotBefore and NotAfter bound the validity, both inclusive, in whole seconds. A zero time bounds nothing.
	NotBefore, NotAfter time.Time
	// Algorithm of the key; empty = not compared.
	Algorithm keystore.Algorithm
	// SPKI is the SubjectPublicKeyInfo, DER.
	SPKI []byte
	// Serial, big-endian; empty = whoever signs chooses.
	Serial []byte
	// Under is the root that an upstream is to sign under; nil = the one it chooses.
	Under *x509.Certificate `json:"-" yaml:"-"`
	// Now is the clock that Check goes by; nil = time.Now.
	Now func() time.Time `json:"-" yaml:"-"`
}

// Upstream is whoever signs our CA certificates. An offline root answers in days, so "not yet" is an answer.
type Upstream interface {
	// Root is the root under which it would sign now.
	Root(ctx context.Context) (*x509.Certificate, error)
	// Sign asks for a certificate as planned for the key of the request (PEM). Asking again with the same plan and request
	// is how the answer is fetched later. An Answer that isn't pending has passed Plan.Check; one that has not is
	// ErrUnusable.
	Sign(ctx context.Context, p Plan, csr []byte) (Answer, error)
}

// ErrUnusable is in the error of an upstream that has signed something else than was asked for. It keeps a certificate for
// each time that it is asked.
var ErrUnusable = errors.New("what was signed can't be used")

// Answer is pending, or a chain and what it leads to.
type Answer struct {
	// Pending says what is awaited, for people; empty = done.
	Pending string
	// Chain is the CA's certificate, then those above it, without the root.
	Chain []*x509.Certificate
	Roots []*x509.Certificate
}

// NewRootPlan plans a self-signed root that may have intermediates but nothing between them and leaves.
// Life 0 is DefaultRootLife. The public key must be ECDSA P-256 or P-384, or RSA of 2048 to 4096 bits.
func NewRootPlan(td spiffeid.TrustDomain, key crypto.PublicKey, start time.Time, life time.Duration) (Plan, error) {
	p := Plan{Kind: KindRoot, TrustDomain: td, PathLen: 1}
	return p.complete(key, start, orDefault(life, DefaultRootLife))
}

// NewIntermediatePlan plans a cluster's intermediate, which signs leaves only (pathlen 0).
// Life 0 is DefaultIntermediateLife. A zero start leaves the validity open: that is for checking what an offline root
// answered days later, with a life that its admin chose.
func NewIntermediatePlan(td spiffeid.TrustDomain, cluster string, key crypto.PublicKey, start time.Time, life time.Duration) (Plan, error) {
	p := Plan{Kind: KindIntermediate, TrustDomain: td, Cluster: cluster}
	return p.complete(key, start, orDefault(life, DefaultIntermediateLife))
}

// NewControlPlan plans a cluster's self-signed control CA. Life 0 is DefaultControlLife.
func NewControlPlan(td spiffeid.TrustDomain, cluster string, key crypto.PublicKey, start time.Time, life time.Duration) (Plan, error) {
	p := Plan{Kind: KindControl, TrustDomain: td, Cluster: cluster}
	return p.complete(key, start, orDefault(life, DefaultControlLife))
}

func orDefault(life, def time.Duration) time.Duration {
	if life == 0 {
		return def
	}
	return life
}

func (p Plan) complete(key crypto.PublicKey, start time.Time, life time.Duration) (Plan, error) {
	if err := identity.AllowedKey(key); err != nil {
		return Plan{}, fmt.Errorf("plan of %s: %w", p.what(), err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return Plan{}, fmt.Errorf("plan of %s: encode the public key: %w", p.what(), err)
	}
	p.SPKI, p.Algorithm = spki, keystore.AlgorithmOf(key)
	id, err := KeyID(spki)
	if err != nil {
		return Plan{}, fmt.Errorf("plan of %s: %w", p.what(), err)
	}
	switch p.Kind {
	case KindRoot:
		p.CommonName = RootName(p.TrustDomain, id)
	case KindIntermediate:
		// A DN of its own for each key: Go leaves the authority key identifier out where issuer and subject are equal,
		// and two CAs of one name make path building guess.
		p.CommonName = commonName("Signet ", p.Cluster, nameEnd(id))
	case KindControl:
		p.CommonName = commonName("Signet control CA ", p.Cluster, "")
	}
	if !start.IsZero() {
		start = start.UTC().Truncate(time.Second)
		// Inclusive (RFC 5280 §4.1.2.5): the last second belongs to the life.
		p.NotBefore, p.NotAfter = start.Add(-PlanBackdate), start.Add(life-time.Second).Truncate(time.Second)
	}
	if err := p.Validate(); err != nil {
		return Plan{}, err
	}
	return p, nil
}

// RootName is the common name of a root, which the first 4 bytes of an identifier tell from the others of its trust domain.
func RootName(td spiffeid.TrustDomain, id []byte) string {
	return commonName("Signet root ", td.Name(), nameEnd(id))
}

func nameEnd(id []byte) string { return " " + hex.EncodeToString(id[:4]) }

// maxNamePart is ub-common-name and ub-organization-name of RFC 5280 appendix A.1, in characters.
const maxNamePart = 64

// commonName shortens the middle where the whole would be too long; what tells names apart is at the end.
func commonName(before, middle, after string) string {
	return before + shorten(middle, maxNamePart-len(before)-len(after)) + after
}

func shorten(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return s[:most-3] + "..."
}

// Organization is the O of the subject: the trust domain, shortened to what RFC 5280 allows there.
func (p Plan) Organization() string { return shorten(p.TrustDomain.Name(), maxNamePart) }

// SelfSigned reports whether the plan is of a CA that signs itself.
func (p Plan) SelfSigned() bool { return p.Kind == KindRoot || p.Kind == KindControl }

// what names the planned certificate in sentences.
func (p Plan) what() string {
	switch p.Kind {
	case KindRoot:
		return fmt.Sprintf("the root of %s", p.TrustDomain.Name())
	case KindIntermediate:
		return fmt.Sprintf("the intermediate of cluster %s", p.Cluster)
	case KindControl:
		return fmt.Sprintf("the control CA of cluster %s", p.Cluster)
	}
	return fmt.Sprintf("a CA of unknown kind %q", p.Kind)
}

// Validate refuses a plan that contradicts itself or that nobody should sign.
func (p Plan) Validate() error {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("plan of %s: %w", p.what(), fmt.Errorf(format, args...))
	}
	switch p.Kind {
	case KindRoot:
		if p.Cluster != "" {
			return fail("a root belongs to no cluster, but the plan names %q", p.Cluster)
		}
		if p.PathLen < 1 || p.PathLen > MaxChain-1 {
			return fail("path length %d: want 1 to %d, so that the root can sign intermediates", p.PathLen, MaxChain-1)
		}
	case KindIntermediate, KindControl:
		if err := identity.ParseName("cluster", p.Cluster); err != nil {
			return fail("%w", err)
		}
		if p.PathLen != 0 {
			return fail("path length %d: it signs leaves only, so want 0", p.PathLen)
		}
	default:
		return fail("want %s, %s or %s", KindRoot, KindIntermediate, KindControl)
	}
	if _, err := identity.ParseTrustDomain(p.TrustDomain.Name()); err != nil {
		return fail("%w", err)
	}
	key, err := x509.ParsePKIXPublicKey(p.SPKI)
	if err != nil {
		return fail("its public key can't be read: %w", err)
	}
	if err := identity.AllowedKey(key); err != nil {
		return fail("%w", err)
	}
	switch alg := keystore.AlgorithmOf(key); {
	case p.Algorithm != "" && p.Algorithm != alg:
		return fail("the key is %s, planned is %s", alg, p.Algorithm)
	case len(p.CommonName) > maxNamePart:
		return fail("a common name of %d bytes; at most %d are allowed (RFC 5280, ub-common-name)", len(p.CommonName), maxNamePart)
	case len(p.Serial) > 20 || len(p.Serial) > 0 && (p.Serial[0] == 0 || p.Serial[0] > 0x7f):
		return fail("the serial number must be positive, without leading zeros, of at most 20 bytes (RFC 5280 §4.1.2.2)")
	case !p.NotBefore.IsZero() && !p.NotAfter.IsZero() && !p.NotAfter.After(p.NotBefore):
		return fail("it would end (%s) before it begins (%s)", stamp(p.NotAfter), stamp(p.NotBefore))
	case p.NotBefore.Nanosecond() != 0 || p.NotAfter.Nanosecond() != 0:
		return fail("validity from %s to %s: X.509 counts in whole seconds", p.NotBefore, p.NotAfter)
	}
	return nil
}

// KeyID is the subject key identifier of a public key: the leftmost 160 bits of the SHA-256 over the subjectPublicKey
// bits (RFC 7093 §2, method 1), as crypto/x509 makes it. It depends on the key alone, so a CA that is signed anew keeps it.
func KeyID(spki []byte) ([]byte, error) {
	bits, err := keyBits(spki)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(bits)
	return sum[:20], nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// nameOf names a certificate in sentences, bounded, since the text may be foreign.
func nameOf(c *x509.Certificate) string {
	name := c.Subject.String()
	if len(name) > 128 {
		name = name[:128] + "…"
	}
	return fmt.Sprintf("%q (serial %x)", name, c.SerialNumber)
}

var (
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidNameConstraints  = asn1.ObjectIdentifier{2, 5, 29, 30}
)

// Check compares what came back with the plan, in one sentence for the first thing that differs. The chain is the CA's
// own certificate first, then those above it, with or without the root; it must lead to one of the roots.
// For a CA that signs itself the chain is that one certificate, and roots may be empty.
func (p Plan) Check(chain []*x509.Certificate, roots []*x509.Certificate) error {
	if err := p.Validate(); err != nil {
		return err
	}
	if err := p.check(chain, roots); err != nil {
		return fmt.Errorf("certificate chain of %s refused: %w", p.what(), err)
	}
	return nil
}

func (p Plan) check(chain, roots []*x509.Certificate) error {
	switch {
	case len(chain) == 0:
		return errors.New("it holds no certificate")
	case len(chain) > MaxChain:
		return fmt.Errorf("it holds %d certificates; at most %d are allowed", len(chain), MaxChain)
	case slices.Contains(chain, nil) || slices.Contains(roots, nil):
		return errors.New("a certificate in it is missing")
	}
	for i, c := range chain {
		if j := slices.IndexFunc(chain, c.Equal); j != i {
			return fmt.Errorf("%s stands in it twice", nameOf(c))
		}
	}
	if !bytes.Equal(chain[0].RawSubjectPublicKeyInfo, p.SPKI) {
		if i := slices.IndexFunc(chain, func(c *x509.Certificate) bool {
			return bytes.Equal(c.RawSubjectPublicKeyInfo, p.SPKI)
		}); i > 0 {
			return fmt.Errorf("it is in the wrong order: the certificate of our key stands at place %d and must be first", i+1)
		}
		return fmt.Errorf("%s is for another key (%s) than planned (%s)", nameOf(chain[0]),
			KeyFingerprint(chain[0].RawSubjectPublicKeyInfo), KeyFingerprint(p.SPKI))
	}
	path, err := p.path(chain, roots)
	if err != nil {
		return err
	}
	now := time.Now
	if p.Now != nil {
		now = p.Now
	}
	if err := checkPath(path, now()); err != nil {
		return err
	}
	return p.checkOwn(chain[0], p.SelfSigned())
}

// path returns the chain up to and including its root.
func (p Plan) path(chain, roots []*x509.Certificate) ([]*x509.Certificate, error) {
	for i, c := range chain[:len(chain)-1] {
		if signedBy(c, chain[i+1]) == nil {
			continue
		}
		if slices.ContainsFunc(chain, func(above *x509.Certificate) bool { return above != c && signedBy(c, above) == nil }) {
			return nil, fmt.Errorf("it is in the wrong order: %s must be followed by the certificate that signed it", nameOf(c))
		}
		return nil, fmt.Errorf("%s is not signed by %s, which follows it: %w", nameOf(c), nameOf(chain[i+1]), signedBy(c, chain[i+1]))
	}
	last := chain[len(chain)-1]
	if p.SelfSigned() {
		if len(chain) != 1 {
			return nil, fmt.Errorf("it holds %d certificates, but %s signs itself and stands alone", len(chain), p.what())
		}
		if err := signedBy(last, last); err != nil {
			return nil, fmt.Errorf("%s does not sign itself: %w", nameOf(last), err)
		}
		if len(roots) > 0 && !slices.ContainsFunc(roots, last.Equal) {
			return nil, fmt.Errorf("%s (%s) is none of the expected roots", nameOf(last), CertificateFingerprint(last.Raw))
		}
		return chain, nil
	}
	if len(roots) == 0 {
		return nil, errors.New("no root to compare it with was given")
	}
	if slices.ContainsFunc(roots, last.Equal) {
		if len(chain) == 1 {
			return nil, fmt.Errorf("%s is itself a root", nameOf(last))
		}
		return chain, nil
	}
	for _, r := range roots {
		if signedBy(last, r) == nil {
			return append(slices.Clone(chain), r), nil
		}
	}
	var want []string
	for _, r := range roots {
		want = append(want, fmt.Sprintf("%s (%s)", nameOf(r), CertificateFingerprint(r.Raw)))
	}
	if signedBy(last, last) == nil {
		return nil, fmt.Errorf("it leads to another root, %s (%s); expected is %s", nameOf(last), CertificateFingerprint(last.Raw),
			strings.Join(want, " or "))
	}
	return nil, fmt.Errorf("%s is not signed by an expected root; expected is %s", nameOf(last), strings.Join(want, " or "))
}

// signedBy checks names (RFC 5280 §6.1.3 (a)(4)), key identifiers and the signature itself, CA:TRUE and keyCertSign included.
func signedBy(c, above *x509.Certificate) error {
	switch {
	case !bytes.Equal(c.RawIssuer, above.RawSubject):
		return fmt.Errorf("it names another issuer, %q", shorten(c.Issuer.String(), 128))
	case len(c.AuthorityKeyId) > 0 && len(above.SubjectKeyId) > 0 && !bytes.Equal(c.AuthorityKeyId, above.SubjectKeyId):
		return errors.New("its authority key identifier is of another key")
	}
	return c.CheckSignatureFrom(above)
}

// checkPath checks what a validator checks of a path whose signatures are good: times, path lengths, critical extensions.
func checkPath(path []*x509.Certificate, now time.Time) error {
	for i, c := range path {
		switch {
		case now.Before(c.NotBefore):
			return fmt.Errorf("%s is not yet valid: it begins on %s, and now is %s; set the clock right or wait", nameOf(c), stamp(c.NotBefore), stamp(now))
		case now.After(c.NotAfter):
			return fmt.Errorf("%s expired on %s, and now is %s; have a new one signed", nameOf(c), stamp(c.NotAfter), stamp(now))
		case !c.BasicConstraintsValid || !c.IsCA:
			return fmt.Errorf("%s is not a CA certificate (CA:TRUE is missing)", nameOf(c))
		case len(c.UnhandledCriticalExtensions) > 0:
			return fmt.Errorf("%s carries the critical extension %s, which validators may not know", nameOf(c), c.UnhandledCriticalExtensions[0])
		}
		// path[0] is itself an intermediate below path[i], so i CA certificates stand between path[i] and a leaf.
		if limit := c.MaxPathLen; (limit > 0 || c.MaxPathLenZero) && i > limit {
			return fmt.Errorf("%s allows a path length of %d, but %d CA certificates stand below it (RFC 5280 §4.2.1.9)", nameOf(c), limit, i)
		}
	}
	return nil
}

// checkOwn compares the CA's own certificate with the plan.
func (p Plan) checkOwn(c *x509.Certificate, selfSigned bool) error {
	const caUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	want := p.TrustDomain.IDString()
	switch {
	case !selfSigned && bytes.Equal(c.RawSubject, c.RawIssuer):
		return fmt.Errorf("%s carries its issuer's name; a CA needs a name of its own", nameOf(c))
	case p.CommonName != "" && c.Subject.CommonName != p.CommonName:
		return fmt.Errorf("%s is not named as planned (%q)", nameOf(c), p.CommonName)
	case len(c.URIs) != 1 || c.URIs[0].String() != want || len(c.DNSNames)+len(c.EmailAddresses)+len(c.IPAddresses) > 0:
		return fmt.Errorf("%s must carry exactly one name, the URI %s; it carries %s", nameOf(c), want, names(c))
	case !critical(c, oidBasicConstraints):
		return fmt.Errorf("%s: its CA:TRUE is not marked critical (RFC 5280 §4.2.1.9)", nameOf(c))
	case c.MaxPathLen != p.PathLen || c.MaxPathLen == 0 && !c.MaxPathLenZero:
		if c.MaxPathLen < 0 || c.MaxPathLen == 0 && !c.MaxPathLenZero {
			return fmt.Errorf("%s has no path length; planned is %d", nameOf(c), p.PathLen)
		}
		return fmt.Errorf("%s has path length %d; planned is %d", nameOf(c), c.MaxPathLen, p.PathLen)
	case c.KeyUsage != caUsage || !critical(c, oidKeyUsage):
		return fmt.Errorf("%s must have exactly the key usages keyCertSign and cRLSign, marked critical (RFC 5280 §4.2.1.3)", nameOf(c))
	case len(c.SubjectKeyId) == 0:
		return fmt.Errorf("%s has no subject key identifier, which every CA certificate must have (RFC 5280 §4.2.1.2)", nameOf(c))
	case len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0:
		return fmt.Errorf("%s is bound to extended key usages, which the plan has not; leaves under it might not be accepted", nameOf(c))
	case slices.ContainsFunc(c.Extensions, isExtension(oidNameConstraints)):
		return fmt.Errorf("%s carries name constraints, which the plan has not", nameOf(c))
	case !p.NotBefore.IsZero() && c.NotBefore.Before(p.NotBefore):
		return fmt.Errorf("%s begins on %s, earlier than planned (%s)", nameOf(c), stamp(c.NotBefore), stamp(p.NotBefore))
	case !p.NotAfter.IsZero() && c.NotAfter.After(p.NotAfter):
		return fmt.Errorf("%s ends on %s, later than planned (%s)", nameOf(c), stamp(c.NotAfter), stamp(p.NotAfter))
	case len(p.Serial) > 0 && c.SerialNumber.Cmp(new(big.Int).SetBytes(p.Serial)) != 0:
		return fmt.Errorf("%s has another serial number than planned (%x)", nameOf(c), p.Serial)
	}
	return nil
}

// isExtension matches an extension by its OID.
func isExtension(oid asn1.ObjectIdentifier) func(pkix.Extension) bool {
	return func(e pkix.Extension) bool { return e.Id.Equal(oid) }
}

func critical(c *x509.Certificate, oid asn1.ObjectIdentifier) bool {
	i := slices.IndexFunc(c.Extensions, isExtension(oid))
	return i >= 0 && c.Extensions[i].Critical
}

// names lists the subject alternative names for a sentence.
func names(c *x509.Certificate) string {
	var all []string
	for _, u := range c.URIs {
		all = append(all, u.String())
	}
	all = append(append(all, c.DNSNames...), c.EmailAddresses...)
	for _, ip := range c.IPAddresses {
		all = append(all, ip.String())
	}
	if len(all) == 0 {
		return "none"
	}
	return shorten(strings.Join(all, ", "), 256)
}

// ParseChain reads certificates in PEM, in the order they stand. Anything else in the text is an error: a private key
// that somebody put beside its certificate must not pass unnoticed.
func ParseChain(text []byte) ([]*x509.Certificate, error) {
	chain, err := parseCertificates(text)
	if err == nil && len(chain) > MaxChain {
		err = fmt.Errorf("certificate chain of more than %d certificates", MaxChain)
	}
	if err != nil {
		return nil, err
	}
	return chain, nil
}

// ParseChains reads several chains, one after the other as a ceremony writes them: each ends with its root, or with the text.
func ParseChains(text []byte) ([][]*x509.Certificate, error) {
	all, err := parseCertificates(text)
	if err != nil {
		return nil, err
	}
	var chains [][]*x509.Certificate
	begin := 0
	for i, c := range all {
		if !selfSigned(c) && i+1 < len(all) {
			continue
		}
		if i-begin >= MaxChain {
			return nil, fmt.Errorf("certificate chain of more than %d certificates", MaxChain)
		}
		chains, begin = append(chains, all[begin:i+1]), i+1
	}
	return chains, nil
}

func parseCertificates(text []byte) ([]*x509.Certificate, error) {
	if len(text) > maxChainPEM {
		return nil, fmt.Errorf("certificate chain of %d bytes: at most %d are allowed", len(text), maxChainPEM)
	}
	var chain []*x509.Certificate
	for rest := bytes.TrimSpace(text); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		if !bytes.HasPrefix(rest, []byte("-----BEGIN ")) {
			return nil, errors.New("certificate chain holds text that is not PEM; give certificates only, each between -----BEGIN CERTIFICATE----- and -----END CERTIFICATE-----")
		}
		before := rest
		// Decode skips a damaged block in favour of the next good one: nothing may be skipped.
		if block, rest = pem.Decode(rest); block == nil || bytes.Count(before[:len(before)-len(rest)], []byte("-----BEGIN ")) != 1 {
			return nil, errors.New("certificate chain holds damaged PEM; copy it again from where it was made")
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("certificate chain holds a block of type %q; give certificates only", shorten(block.Type, 64))
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the chain can't be read: %w", len(chain)+1, err)
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, errors.New("certificate chain is empty")
	}
	return chain, nil
}

// EncodeChain writes certificates in PEM, in the order given.
func EncodeChain(chain ...*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range chain {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a bytes.Buffer takes all
	}
	return b.Bytes()
}
