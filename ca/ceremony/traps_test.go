package ceremony

import (
	"bytes"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudflare/cfssl/signer"
	"github.com/cloudflare/cfssl/signer/local"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/keystore"
)

// cfssl v1.6.5 does surprising things; each has a test that holds the door shut.

func TestTrapAnUnknownProfileNameMeansTheDefaultProfile(t *testing.T) {
	root, key := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	policy := policyOf(eastPlan(key, 0))
	s := must(local.NewSigner(root.key, root.cert, signer.DefaultSigAlgo(root.key), policy))
	for _, name := range []string{"", "intermediate", "no such profile"} {
		p, err := signer.Profile(s, name)
		if err != nil || p != policy.Default || !p.CAConstraint.IsCA || len(policy.Profiles) != 0 {
			t.Errorf("profile %q is %+v, %v", name, p, err)
		}
	}
}

func TestTrapWithoutAWhitelistEverythingIsCopiedFromTheRequest(t *testing.T) {
	root, key := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	p := must(Prepare(plan, root.cert, must(Request(key, plan))))
	// A request that got past the comparison with the plan.
	p.csr = pemRequest(must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "evil", Country: []string{"XX"}, ExtraNames: []pkix.AttributeTypeAndValue{{Type: []int{2, 5, 4, 65}, Value: "evil"}}},
		URIs:    []*url.URL{must(url.Parse("spiffe://example.org/signet/cluster/east/server/evil"))}, DNSNames: []string{"evil.example"},
		ExtraExtensions: []pkix.Extension{
			{Id: oidBasicConstraints, Critical: true, Value: []byte{0x30, 6, 1, 1, 0xff, 2, 1, 9}},
			{Id: []int{1, 3, 6, 1, 4, 1, 44363, 44}, Value: []byte{5, 0}}, // cfssl copies this one of its own accord
		},
	}, key)))
	cert, _, err := p.Sign(t.Context(), root.log, root.key, by)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(cert.RawTBSCertificate, p.tbs) || bytes.Contains(cert.Raw, []byte("evil")) {
		t.Errorf("something was copied: %s", cert.Subject)
	}
}

func TestTrapThePathLengthOfTheIssuerIsNotChecked(t *testing.T) {
	root, key, below := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	east := must(root.sign(t, plan, must(Request(key, plan))))
	sub := must(ca.NewIntermediatePlan(exampleOrg, "sub", below.Public(), time.Now(), 0))
	// Without CA:TRUE in the request cfssl would not look at the issuer's path length at all.
	silent := pemRequest(must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, below)))
	for _, request := range [][]byte{silent, must(Request(below, sub))} {
		if _, err := Prepare(sub, east, request); err == nil || !strings.Contains(err.Error(), "path length 0 and may sign no CA") {
			t.Errorf("an intermediate signs a CA: %v", err)
		}
	}
}

func TestTrapNothingIsClampedAndTheIssuerIsNotChecked(t *testing.T) {
	key := newKey(t, keystore.ECDSAP256)
	root := newRoot(t, keystore.ECDSAP256, func(p *ca.Plan) {
		p.NotAfter = time.Now().Add(48 * time.Hour).UTC().Truncate(time.Second)
	})
	plan := eastPlan(key, 0)
	request := must(Request(key, plan))
	if cert := must(root.sign(t, plan, request)); cert.NotAfter.After(root.cert.NotAfter) || cert.NotBefore.Before(root.cert.NotBefore) {
		t.Errorf("it lives from %s to %s, its root from %s to %s", cert.NotBefore, cert.NotAfter, root.cert.NotBefore, root.cert.NotAfter)
	}
	noCA, _ := leaf(t, root.cert, root.key, false)
	if _, err := Prepare(plan, noCA, request); err == nil || !strings.Contains(err.Error(), "not a CA that may sign") {
		t.Errorf("under a leaf: %v", err)
	}
}

func TestTrapShortLivedCAsAreBornExpired(t *testing.T) {
	root, key := newRoot(t, keystore.ECDSAP256, func(p *ca.Plan) { p.NotBefore = p.NotBefore.Add(-time.Hour) }), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 4*time.Minute)
	cert := must(root.sign(t, plan, must(Request(key, plan))))
	if !cert.NotBefore.Equal(plan.NotBefore) || !cert.NotAfter.Equal(plan.NotAfter) || time.Until(cert.NotAfter) < 3*time.Minute {
		t.Errorf("planned %s to %s, got %s to %s", plan.NotBefore, plan.NotAfter, cert.NotBefore, cert.NotAfter)
	}
}

func TestTrapCACertificatesLoseTheirURI(t *testing.T) {
	root := newRoot(t, keystore.ECDSAP256)
	if len(root.cert.URIs) != 1 || root.cert.URIs[0].String() != "spiffe://example.org" || len(root.cert.Extensions) != 4 {
		t.Errorf("URIs %v in %d extensions", root.cert.URIs, len(root.cert.Extensions))
	}
}

func TestTrapNameWhitelistsMatchAnywhere(t *testing.T) {
	key := newKey(t, keystore.ECDSAP256)
	if policyOf(eastPlan(key, 0)).Default.NameWhitelist != nil {
		t.Error("names go by the plan, never by pattern")
	}
}

func TestTrapUnknownUsagesAreDropped(t *testing.T) {
	key := newKey(t, keystore.ECDSAP256)
	ku, eku, unknown := policyOf(eastPlan(key, 0)).Default.Usages()
	if ku != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(eku) != 0 || len(unknown) != 0 {
		t.Errorf("usages %v %v, unknown %v", ku, eku, unknown)
	}
}

func TestTrapTheLinterDoesNotRun(t *testing.T) {
	key := newKey(t, keystore.ECDSAP256)
	plan := must(ca.NewRootPlan(exampleOrg, key.Public(), time.Now(), 0))
	plan.Serial = newSerial()
	if _, err := predict(plan, nil); err != nil {
		t.Fatal(err)
	}
	plan.CommonName = strings.Repeat("x", 65) // RFC 5280 appendix A.1, ub-common-name
	if _, err := predict(plan, nil); err == nil || !strings.Contains(err.Error(), "e_subject_common_name_max_length") {
		t.Errorf("a common name of 65 characters: %v", err)
	}
	plan = must(ca.NewRootPlan(exampleOrg, key.Public(), time.Now(), 0))
	plan.Serial = append([]byte{1}, newSerial()...)
	if _, err := predict(plan, nil); err == nil || !strings.Contains(err.Error(), "serial_number") {
		t.Errorf("a serial number of 21 bytes: %v", err)
	}
}

func TestTrapRenewalKeepsTheSerial(t *testing.T) {
	root, key := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	request := must(Request(key, plan))
	a, b := must(root.sign(t, plan, request)), must(root.sign(t, plan, request))
	if a.SerialNumber.Cmp(b.SerialNumber) == 0 {
		t.Error("two certificates have one serial number")
	}
	if !bytes.Equal(a.SubjectKeyId, b.SubjectKeyId) || !bytes.Equal(a.RawSubject, b.RawSubject) {
		t.Error("a CA that is signed anew has another name or key identifier")
	}
}

func TestTrapASelfSigningSignerChangesUnderItsUsers(t *testing.T) {
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			key, log := newKey(t, keystore.ECDSAP256), &memoryLog{}
			plan := must(ca.NewRootPlan(exampleOrg, key.Public(), time.Now(), 0))
			if _, _, err := SelfSign(t.Context(), log, key, plan, by); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

func TestTrapKeyIdentifiersAreSHA1(t *testing.T) {
	root := newRoot(t, keystore.ECDSAP256)
	want := must(ca.KeyID(root.cert.RawSubjectPublicKeyInfo))
	if !bytes.Equal(root.cert.SubjectKeyId, want) {
		t.Errorf("key identifier %x, want %x", root.cert.SubjectKeyId, want)
	}
	spki := root.cert.RawSubjectPublicKeyInfo
	if old := sha1.Sum(spki[len(spki)-65:]); bytes.Equal(root.cert.SubjectKeyId, old[:]) {
		t.Error("the key identifier is a SHA-1")
	}
	// crypto/x509 makes the same one, so tools agree on it.
	plain := must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: root.cert.SerialNumber, IsCA: true, BasicConstraintsValid: true,
	}, &x509.Certificate{}, root.cert.PublicKey, root.key))))
	if !bytes.Equal(plain.SubjectKeyId, want) {
		t.Errorf("crypto/x509 makes %x, we %x", plain.SubjectKeyId, want)
	}
}

func TestTrapEqualNamesLoseTheAuthorityKeyIdentifier(t *testing.T) {
	root, key := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	cert := must(root.sign(t, plan, must(Request(key, plan))))
	if bytes.Equal(cert.RawSubject, cert.RawIssuer) || len(cert.AuthorityKeyId) == 0 || !bytes.Equal(cert.AuthorityKeyId, root.cert.SubjectKeyId) {
		t.Errorf("authority key identifier %x, root's %x", cert.AuthorityKeyId, root.cert.SubjectKeyId)
	}
	other := newKey(t, keystore.ECDSAP256)
	if eastPlan(other, 0).CommonName == plan.CommonName {
		t.Error("two intermediates of one cluster have one name")
	}
}

func TestTrapSerialNumbers(t *testing.T) {
	for range 100 {
		if s := newSerial(); len(s) != 20 || s[0] < 0x40 || s[0] > 0x7f {
			t.Fatalf("serial number %x", s)
		}
	}
	key := newKey(t, keystore.ECDSAP256)
	if !policyOf(eastPlan(key, 0)).Default.ClientProvidesSerialNumbers {
		t.Error("cfssl chooses the serial number, so it can't be logged before")
	}
}

func TestTrapCTLogsAreDialled(t *testing.T) {
	key := newKey(t, keystore.ECDSAP256)
	if len(policyOf(eastPlan(key, 0)).Default.CTLogServers) != 0 {
		t.Error("a ceremony dials nobody")
	}
}

func TestTrapErrorsAreJSON(t *testing.T) {
	root, key := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	p := must(Prepare(plan, root.cert, must(Request(key, plan))))
	_, _, err := p.Sign(t.Context(), root.log, &watched{Signer: root.key, fail: errors.New("the key is away")}, by)
	if err == nil || !strings.Contains(err.Error(), "the key is away") || strings.ContainsAny(err.Error(), "{}") {
		t.Errorf("got %v", err)
	}
}
