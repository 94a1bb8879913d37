package ca

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

// Issuer is a CA key with its certificate, its chain and its state. It never changes.
type Issuer struct {
	name        string
	hierarchy   identity.Hierarchy
	trustDomain spiffeid.TrustDomain
	state       State
	key         keystore.Key
	certificate *x509.Certificate
	chain       [][]byte
	notBefore   limit // the latest of the chain and its root
	notAfter    limit // the earliest
	builder     leafBuilder
}

// limit is a bound of validity and whose it is.
type limit struct {
	at    time.Time
	whose string
}

// ErrOtherKey: what is there now is not the key that the certificate was made for.
var ErrOtherKey = errors.New("does not match certificate")

// NewIssuer checks that key, certificate, chain and roots belong together and may sign leaves of the trust domain.
// Whether the chain is valid now is not checked here but whenever it is used, see Usable.
func NewIssuer(c IssuerConfig) (*Issuer, error) {
	if err := c.complete(); err != nil {
		return nil, err
	}
	fail := func(format string, args ...any) (*Issuer, error) {
		return nil, fmt.Errorf("issuer "+c.Name+": "+format, args...)
	}
	if err := c.matchKey(); err != nil {
		return fail("%w", err)
	}
	if err := identity.AllowedKey(c.Key.Public()); err != nil {
		return fail("%w", err)
	}
	for n, cert := range c.Chain {
		if err := c.checkCA(cert, n == 0); err != nil {
			return fail("%s %w", nameOf(cert), err)
		}
	}
	path, err := c.path()
	if err != nil {
		return fail("%w", err)
	}
	root := path[len(path)-1]
	i := &Issuer{
		name: c.Name, hierarchy: c.Hierarchy, trustDomain: c.TrustDomain, state: c.State,
		key: c.Key, certificate: c.Chain[0],
	}
	for n, cert := range path {
		// RFC 5280 §4.2.1.9: at most so many CA certificates may follow. Go says -1 for "no limit".
		if cert.MaxPathLen >= 0 && n > cert.MaxPathLen {
			return fail("%s allows %d CA certificates below it (path length), and there are %d; have it signed again with a longer one", nameOf(cert), cert.MaxPathLen, n)
		}
		whose := "issuer " + c.Name
		if n > 0 {
			whose = fmt.Sprintf("%s above issuer %s", nameOf(cert), c.Name)
		}
		i.narrow(cert, whose)
	}
	for _, cert := range c.Chain {
		i.chain = append(i.chain, cert.Raw)
	}
	if i.notAfter.at.Before(i.notBefore.at) {
		return fail("its chain is never valid as a whole: %s begins at %s, %s ended at %s; sign it again",
			i.notBefore.whose, stamp(i.notBefore.at), i.notAfter.whose, stamp(i.notAfter.at))
	}
	// What validators will do, at a time when all are valid: name constraints, unknown critical extensions and the rest.
	roots, above := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	for _, cert := range c.Chain[1:] {
		above.AddCert(cert)
	}
	if _, err := c.Chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: above, CurrentTime: i.notBefore.at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}); err != nil {
		return fail("validators would refuse its chain: %w", err)
	}
	if i.builder, err = newLeafBuilder(i.certificate, c.Key.Public()); err != nil {
		return fail("%w", err)
	}
	return i, nil
}

// complete refuses what is missing, and names an issuer that has no name.
func (c *IssuerConfig) complete() error {
	if c.Key == nil {
		return errors.New("issuer: no key")
	}
	if c.Name == "" {
		c.Name = fmt.Sprintf("%s-%d", c.Key.Ref().Name, c.Key.Ref().Version)
	}
	if err := identity.ParseName("issuer", c.Name); err != nil {
		return err
	}
	switch {
	case c.Hierarchy != identity.Mesh && c.Hierarchy != identity.ControlPlane:
		return fmt.Errorf("issuer %s: say whether it is of the mesh or of the control hierarchy", c.Name)
	case c.TrustDomain.IsZero():
		return fmt.Errorf("issuer %s: no trust domain", c.Name)
	case !c.State.known():
		return fmt.Errorf("issuer %s: unknown state %q", c.Name, string(c.State))
	case len(c.Chain) == 0:
		return fmt.Errorf("issuer %s: no certificate for key %s", c.Name, c.Key.Ref())
	}
	for _, cert := range slices.Concat(c.Chain, c.Roots) {
		if cert == nil || len(cert.Raw) == 0 {
			return fmt.Errorf("issuer %s: chain and roots must be parsed certificates", c.Name)
		}
	}
	return nil
}

func (s State) known() bool {
	switch s {
	case Prepared, Published, Active, Retired, Removed:
		return true
	}
	return false
}

// matchKey refuses a certificate for another key, and says so apart when the right one stands further up the chain.
func (c *IssuerConfig) matchKey() error {
	pub, ok := c.Key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok {
		return fmt.Errorf("key %s: its public key of type %T can't be compared", c.Key.Ref(), c.Key.Public())
	}
	if pub.Equal(c.Chain[0].PublicKey) {
		return nil
	}
	for n, cert := range c.Chain[1:] {
		if pub.Equal(cert.PublicKey) {
			return fmt.Errorf("chain is in the wrong order: certificate %d of it, %s, belongs to key %s; put it first, then the one that signed it",
				n+2, nameOf(cert), c.Key.Ref())
		}
	}
	mend := ", or rotate to a new intermediate"
	if c.Hierarchy == identity.ControlPlane {
		mend = ": a control CA has no successor"
	}
	return fmt.Errorf("key %s %w %s: it was deleted and made anew, has come back from another backup, or was swapped; put the right one back%s",
		c.Key.Ref(), ErrOtherKey, nameOf(c.Chain[0]), mend)
}

// checkCA checks one CA certificate by itself; issuer = it is the one that signs leaves.
func (c *IssuerConfig) checkCA(cert *x509.Certificate, issuer bool) error {
	switch {
	// RFC 5280 §4.2.1.9; X509-SVID §4.1.
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return errors.New("is not a CA certificate; have it signed again with CA:TRUE")
	// RFC 5280 §4.2.1.3; X509-SVID §4.3.
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("may not sign certificates: its key usage lacks keyCertSign; have it signed again with it")
	// RFC 5280 §4.1.2.4: the issuer's name is not empty.
	case len(cert.RawSubject) <= len(emptyName):
		return errors.New("has an empty subject; have it signed again with a name of its own")
	// RFC 5280 §4.2.1.2: present in all CA certificates. Leaves point to it.
	case len(cert.SubjectKeyId) == 0:
		return errors.New("has no subject key identifier; have it signed again with one")
	}
	// Go and Windows read the extended key usage of a CA as a bound on what is below it.
	eku := cert.ExtKeyUsage
	if len(eku)+len(cert.UnknownExtKeyUsage) > 0 && !slices.Contains(eku, x509.ExtKeyUsageAny) &&
		(!slices.Contains(eku, x509.ExtKeyUsageServerAuth) || !slices.Contains(eku, x509.ExtKeyUsageClientAuth)) {
		return errors.New("forbids TLS servers or clients below it by its extended key usage; have it signed again without one")
	}
	return c.checkSPIFFEID(cert, issuer)
}

// checkSPIFFEID checks the name of a signing certificate (X509-SVID §3.2): an issuer of ours carries its trust domain's ID;
// those above it may carry none.
func (c *IssuerConfig) checkSPIFFEID(cert *x509.Certificate, issuer bool) error {
	want := c.TrustDomain.IDString()
	var uris []string
	for _, u := range cert.URIs {
		if issuer || u.Scheme == "spiffe" {
			uris = append(uris, u.String())
		}
	}
	switch {
	case len(uris) == 0 && !issuer, len(uris) == 1 && uris[0] == want:
		return nil
	case len(uris) == 0:
		return fmt.Errorf("does not name its trust domain; have it signed again with the URI SAN %s", want)
	case len(uris) > 1:
		return fmt.Errorf("has %d URI SANs where X509-SVID §2 allows one; have it signed again with %s alone", len(uris), want)
	}
	return fmt.Errorf("is for %q, not for %s; install the certificate of this trust domain", shorten(uris[0], 256), want)
}

// path returns the chain and the root it leads to; of several roots with one key, the one that lives longest.
func (c *IssuerConfig) path() ([]*x509.Certificate, error) {
	if c.Hierarchy == identity.ControlPlane {
		return c.Chain, c.checkControl()
	}
	for n, cert := range c.Chain {
		if selfSigned(cert) {
			if n == 0 {
				return nil, fmt.Errorf("%s is a root; workloads' certificates are signed by an intermediate under it", nameOf(cert))
			}
			return nil, fmt.Errorf("chain holds the root %s; leave it out, validators have it already", nameOf(cert))
		}
		if n+1 == len(c.Chain) {
			break
		}
		if err := signedBy(cert, c.Chain[n+1]); err != nil {
			return nil, fmt.Errorf("chain is in the wrong order or has a gap: %s is not signed by %s, which follows it: %w; put the issuer's certificate first, then each time the one that signed it",
				nameOf(cert), nameOf(c.Chain[n+1]), err)
		}
	}
	top := c.Chain[len(c.Chain)-1]
	var root *x509.Certificate
	var why error
	for _, r := range c.Roots {
		if !bytes.Equal(top.RawIssuer, r.RawSubject) {
			continue
		}
		if err := signedBy(top, r); err != nil {
			why = fmt.Errorf("%s is not signed by the root %s, whose name it bears: %w; have it signed by that root, or install the root that signed it", nameOf(top), nameOf(r), err)
		} else if err := c.checkCA(r, false); err != nil {
			why = fmt.Errorf("root %s %w", nameOf(r), err)
		} else if root == nil || r.NotAfter.After(root.NotAfter) {
			root = r
		}
	}
	switch {
	case root != nil:
		return append(slices.Clone(c.Chain), root), nil
	case why != nil:
		return nil, why
	case len(c.Roots) == 0:
		return nil, fmt.Errorf("no root was given for its chain, which leads to %q; install that root", shorten(top.Issuer.String(), 128))
	}
	return nil, fmt.Errorf("chain is of another root: it leads to %q, and the roots of %s are %s; have it signed by one of them",
		shorten(top.Issuer.String(), 128), c.TrustDomain, listNames(c.Roots))
}

// CheckRoot says why validators of the trust domain should not be told to believe a root. One that begins later is fine.
func CheckRoot(td spiffeid.TrustDomain, root *x509.Certificate, now time.Time) error {
	fail := func(err error) error { return fmt.Errorf("root %s %w", nameOf(root), err) }
	c := IssuerConfig{TrustDomain: td}
	if err := c.checkCA(root, false); err != nil {
		return fail(err)
	}
	switch {
	case !selfSigned(root):
		return fail(errors.New("is not self-signed; only roots are believed by themselves"))
	case now.After(root.NotAfter):
		return fail(fmt.Errorf("expired on %s, and now is %s", stamp(root.NotAfter), stamp(now)))
	case len(root.UnhandledCriticalExtensions) > 0:
		return fail(fmt.Errorf("carries the critical extension %s, which validators may not know", root.UnhandledCriticalExtensions[0]))
	// RFC 5280 §4.2.1.9: an intermediate follows at least. Go says -1 for "no limit".
	case root.MaxPathLen == 0:
		return fail(errors.New("has a path length of 0, so that no intermediate can stand under it; make one with a path length of 1 or more"))
	case excludes(root, td.Name()):
		return fail(fmt.Errorf("allows no URIs of %s by its name constraints, so that validators would refuse every certificate under it; make one without them", td.Name()))
	}
	if err := identity.AllowedKey(root.PublicKey); err != nil {
		return fail(fmt.Errorf("can't be believed: %w", err))
	}
	if err := signedBy(root, root); err != nil {
		return fail(fmt.Errorf("is not signed by its own key: %w", err))
	}
	return nil
}

// excludes reports whether a CA's name constraints forbid URIs of a host (RFC 5280 §4.2.1.10): a domain is that host alone, or
// with a period before it all that is below. An empty one is all, as Go reads it.
func excludes(cert *x509.Certificate, host string) bool {
	covers := func(domain string) bool {
		domain = strings.ToLower(domain)
		return domain == "" || domain == host || domain[0] == '.' && strings.HasSuffix(host, domain)
	}
	return slices.ContainsFunc(cert.ExcludedURIDomains, covers) ||
		len(cert.PermittedURIDomains) > 0 && !slices.ContainsFunc(cert.PermittedURIDomains, covers)
}

// listNames names a few certificates for a sentence.
func listNames(certs []*x509.Certificate) string {
	var all []string
	for _, cert := range certs[:min(len(certs), 3)] {
		all = append(all, nameOf(cert))
	}
	if more := len(certs) - len(all); more > 0 {
		all = append(all, fmt.Sprintf("%d more", more))
	}
	return strings.Join(all, ", ")
}

// checkControl: the control CA is its own root and stands alone.
func (c *IssuerConfig) checkControl() error {
	own := c.Chain[0]
	if len(c.Chain) != 1 || !selfSigned(own) {
		return fmt.Errorf("%s is no control CA: that is one self-signed certificate, not a chain; make it with `signet cluster init`", nameOf(own))
	}
	if err := signedBy(own, own); err != nil {
		return fmt.Errorf("%s is not signed by its own key: %w", nameOf(own), err)
	}
	if len(c.Roots) > 0 && !slices.ContainsFunc(c.Roots, own.Equal) {
		return fmt.Errorf("control CA %s is not among the roots given with it; it is its own root, give none", nameOf(own))
	}
	return nil
}

func selfSigned(cert *x509.Certificate) bool { return bytes.Equal(cert.RawIssuer, cert.RawSubject) }

// narrow takes a certificate's validity into the chain's.
func (i *Issuer) narrow(cert *x509.Certificate, whose string) {
	if i.notBefore.at.IsZero() || cert.NotBefore.After(i.notBefore.at) {
		i.notBefore = limit{cert.NotBefore, whose}
	}
	if i.notAfter.at.IsZero() || cert.NotAfter.Before(i.notAfter.at) {
		i.notAfter = limit{cert.NotAfter, whose}
	}
}

// Usable says why the issuer can't sign at this time: something in its chain, root included, is expired or not yet valid.
func (i *Issuer) Usable(now time.Time) error {
	switch {
	case now.Before(i.notBefore.at):
		return fmt.Errorf("%s is not valid before %s, and it is %s; check the clock, or wait", i.notBefore.whose, stamp(i.notBefore.at), stamp(now))
	// RFC 5280 §4.1.2.5: valid through NotAfter, inclusive.
	case now.After(i.notAfter.at):
		return fmt.Errorf("%s expired at %s, and it is %s; install and activate a new one", i.notAfter.whose, stamp(i.notAfter.at), stamp(now))
	}
	return nil
}

// Name is the issuer's name in messages and metrics.
func (i *Issuer) Name() string { return i.name }

// Hierarchy is the one the issuer belongs to.
func (i *Issuer) Hierarchy() identity.Hierarchy { return i.hierarchy }

// State is where the issuer stands in its life.
func (i *Issuer) State() State { return i.state }

// Certificate is the issuer's own. The caller must not change it.
func (i *Issuer) Certificate() *x509.Certificate { return i.certificate }

// KeyID is the issuer's subject key identifier, which its leaves point to. The caller must not change it.
func (i *Issuer) KeyID() []byte { return i.certificate.SubjectKeyId }

// Chain is what goes with a leaf: the issuer's certificate and those above it, DER, without a root of the mesh.
// The caller must not change it.
func (i *Issuer) Chain() [][]byte { return i.chain }

// NotAfter is the last second at which the issuer's whole chain is valid, its root included.
func (i *Issuer) NotAfter() time.Time { return i.notAfter.at }
