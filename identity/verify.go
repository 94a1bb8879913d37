package identity

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxChain bounds a certificate chain that somebody else gives us; maxChainBytes all its DER.
const (
	MaxChain      = 8
	maxChainBytes = 32 << 10
)

var (
	oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidAltName  = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// VerifySVID checks a chain, leaf first, as X509-SVID §5 asks of a validator, and returns whose it is: the certification
// path to one of the roots at the time now (RFC 5280 §6), and the rules for the leaf, of which go-spiffe's Verify passes
// over the missing path, the missing key usage and the extended key usage. The error names the rule that is broken.
func VerifySVID(chain []*x509.Certificate, roots *x509.CertPool, now time.Time) (spiffeid.ID, error) {
	if err := checkSize(chain); err != nil {
		return spiffeid.ID{}, err
	}
	id, err := CheckLeaf(chain[0])
	if err != nil {
		return spiffeid.ID{}, err
	}
	inter := x509.NewCertPool()
	for i, c := range chain {
		if err := CheckTimes(c, now); err != nil {
			return spiffeid.ID{}, err
		}
		if i > 0 {
			if !bytes.Equal(chain[i-1].RawIssuer, c.RawSubject) {
				return spiffeid.ID{}, fmt.Errorf("chain is in the wrong order: certificate %d (%s) was not issued by certificate %d (%s) (RFC 5280 §6.1)", i, name(chain[i-1]), i+1, name(c))
			}
			inter.AddCert(c)
		}
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: inter, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}); err != nil {
		return spiffeid.ID{}, fmt.Errorf("no valid path from %s to a root of the bundle (X509-SVID §5.1): %w", id, err)
	}
	return id, nil
}

// CheckLeaf checks the rules that a leaf must keep by itself (X509-SVID §2, §3.1, §4, §5.2) and returns its SPIFFE ID.
func CheckLeaf(leaf *x509.Certificate) (spiffeid.ID, error) {
	if leaf.IsCA {
		return spiffeid.ID{}, errors.New("the first certificate is a CA's and names no workload (X509-SVID §5.2)")
	}
	if len(leaf.URIs) != 1 {
		return spiffeid.ID{}, fmt.Errorf("certificate carries %d URI names: an SVID has exactly one (X509-SVID §2)", len(leaf.URIs))
	}
	id, err := ParseID(leaf.URIs[0].String())
	if err != nil {
		return spiffeid.ID{}, err
	}
	var usage, altName bool
	for _, e := range leaf.Extensions {
		switch {
		case e.Id.Equal(oidKeyUsage):
			usage = e.Critical
		case e.Id.Equal(oidAltName):
			altName = e.Critical
		}
	}
	switch {
	case !usage:
		return spiffeid.ID{}, fmt.Errorf("%s: key usage is missing or not critical (X509-SVID §4.3)", id)
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return spiffeid.ID{}, fmt.Errorf("%s: key usage lacks digitalSignature (X509-SVID §4.3)", id)
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return spiffeid.ID{}, fmt.Errorf("%s: key usage allows to sign certificates or CRLs (X509-SVID §5.2)", id)
	case !altName && len(leaf.Subject.Names) == 0:
		return spiffeid.ID{}, fmt.Errorf("%s: the subject is empty but the alternative name is not critical (X509-SVID §3.1, RFC 5280 §4.2.1.6)", id)
	}
	if eku := leaf.ExtKeyUsage; len(eku)+len(leaf.UnknownExtKeyUsage) > 0 && !slices.Contains(eku, x509.ExtKeyUsageAny) &&
		!(slices.Contains(eku, x509.ExtKeyUsageServerAuth) && slices.Contains(eku, x509.ExtKeyUsageClientAuth)) {
		return spiffeid.ID{}, fmt.Errorf("%s: extended key usage lacks serverAuth or clientAuth (X509-SVID §4.4)", id)
	}
	return id, nil
}

// CheckTimes is RFC 5280 §6.1.3 (a)(2), with both times in the sentence.
func CheckTimes(c *x509.Certificate, now time.Time) error {
	switch {
	case now.Before(c.NotBefore):
		return fmt.Errorf("%s is valid from %s only, and now is %s (RFC 5280 §4.1.2.5): compare the clocks", name(c), utc(c.NotBefore), utc(now))
	case now.After(c.NotAfter):
		return fmt.Errorf("%s expired at %s, and now is %s (RFC 5280 §4.1.2.5)", name(c), utc(c.NotAfter), utc(now))
	}
	return nil
}

func utc(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// name is what to call a certificate in a sentence.
func name(c *x509.Certificate) string {
	if len(c.URIs) == 1 && !c.IsCA {
		return clip(c.URIs[0].String())
	}
	return fmt.Sprintf("%q", clip(c.Subject.String()))
}

// VerifyControl checks that what a peer shows is a control certificate: under exactly this control CA, good now and for this
// use, and nothing but the name of a part of Signet, which it returns. Whether that part may come in is the caller's to say.
func VerifyControl(chain []*x509.Certificate, controlCA *x509.Certificate, now time.Time, usage x509.ExtKeyUsage) (Control, error) {
	if err := checkSize(chain); err != nil {
		return Control{}, err
	}
	leaf := chain[0]
	c, err := ControlOf(leaf)
	if err != nil {
		return Control{}, err
	}
	if err := CheckTimes(leaf, now); err != nil {
		return Control{}, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(controlCA)
	// No intermediates: the control CA signs leaves only (pathlen 0).
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		return Control{}, fmt.Errorf("its certificate is not from this cluster's control CA: %w", err)
	}
	return c, nil
}

// ControlOf reads the name of a part of Signet in its certificate, which has no other names. It verifies no signature.
func ControlOf(leaf *x509.Certificate) (Control, error) {
	id, err := CheckLeaf(leaf)
	if err != nil {
		return Control{}, err
	}
	if len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 {
		return Control{}, fmt.Errorf("certificate of %s has other names as well", id)
	}
	return ParseControl(id)
}

// checkSize stands before anything is looked at.
func checkSize(chain []*x509.Certificate) error {
	size := 0
	for _, c := range chain {
		size += len(c.Raw)
	}
	if len(chain) == 0 || len(chain) > MaxChain || size > maxChainBytes {
		return fmt.Errorf("%d certificates of %d bytes: want 1 to %d of at most %d bytes", len(chain), size, MaxChain, maxChainBytes)
	}
	return nil
}
