//go:build real

package hostile

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/doors"
)

// bomb is a client certificate, or what passes for one, that costs much to look at.
func bomb(t *testing.T, pub crypto.PublicKey, change func(*x509.Certificate)) []byte {
	t.Helper()
	key, err := doors.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if pub == nil {
		pub = key.Public()
	}
	id, err := url.Parse("spiffe://example.org/signet/cluster/east/agent/evil")
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{id},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if change != nil {
		change(c)
	}
	// By its names it is the control CA's.
	real := site.evil.ControlCA
	parent := &x509.Certificate{Subject: real.Subject, RawSubject: real.RawSubject, SubjectKeyId: real.SubjectKeyId}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func fatRSA(bits int) *rsa.PublicKey {
	n, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), uint(bits-1)))
	return &rsa.PublicKey{N: n.SetBit(n, bits-1, 1).SetBit(n, 0, 1), E: 65537}
}

func TestMistake35CertificateBombsAreCheapToRefuse(t *testing.T) {
	repeated := func(n int, der []byte) [][]byte {
		var chain [][]byte
		for range n {
			chain = append(chain, der)
		}
		return chain
	}
	many := func(n int, name func(i int) string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			for i := range n {
				c.DNSNames = append(c.DNSNames, name(i))
			}
		}
	}
	ca := func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.URIs = true, true, x509.KeyUsageCertSign, nil
		c.Subject, c.ExtKeyUsage = site.evil.ControlCA.Subject, nil
	}
	policies := func(c *x509.Certificate) {
		ca(c)
		var list []struct{ ID asn1.ObjectIdentifier }
		for i := range 1000 {
			list = append(list, struct{ ID asn1.ObjectIdentifier }{asn1.ObjectIdentifier{1, 3, 6, 1, i}})
		}
		der, err := asn1.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 32}, Value: der}}
	}
	bombs := map[string][][]byte{
		"100 certificates":                append([][]byte{site.evil.Chain[0]}, repeated(99, site.evil.ControlCA.Raw)...),
		"100 CAs of one name":             append([][]byte{bomb(t, nil, nil)}, repeated(99, bomb(t, nil, ca))...),
		"the evil agent's and 99 CAs":     append([][]byte{site.evil.Chain[0]}, repeated(99, bomb(t, nil, ca))...),
		"an RSA key of 8192 bits":         {bomb(t, fatRSA(8192), nil)},
		"an RSA key of 16384 bits":        {bomb(t, fatRSA(16384), nil)},
		"100 RSA keys of 16384 bits":      repeated(100, bomb(t, fatRSA(16384), nil))[:80],
		"2,000 names":                     {bomb(t, nil, many(2000, func(i int) string { return fmt.Sprintf("n%d.example.org", i) }))},
		"10,000 names":                    {bomb(t, nil, many(10_000, func(i int) string { return fmt.Sprintf("n%d.example.org", i) }))},
		"a name of 200 KiB":               {bomb(t, nil, many(1, func(int) string { return string(make([]byte, 200<<10)) }))},
		"a tree of policies, 8 deep":      append([][]byte{bomb(t, nil, policies)}, repeated(7, bomb(t, nil, policies))...),
		"more than a handshake may carry": repeated(20, bomb(t, nil, many(1000, func(i int) string { return fmt.Sprintf("n%d.example.org", i) }))),
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	handshake := func(chain [][]byte) error {
		// Go refuses to sign with another kind of key than the certificate's, so a stand-in signs; no bomb gets that far.
		c, err := targets[1].knock(source(0))
		if err != nil {
			return err
		}
		defer c.Close()
		tc := tls.Client(c, &tls.Config{
			InsecureSkipVerify: true, NextProtos: []string{"h2"}, //nolint:gosec // a bad peer
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return &tls.Certificate{Certificate: chain, PrivateKey: key}, nil
			},
		})
		_ = tc.SetDeadline(time.Now().Add(5 * time.Second))
		if err := tc.Handshake(); err != nil {
			return err
		}
		_, err = tc.Read(make([]byte, 1)) // the server's verdict comes after the client's part of TLS 1.3
		return err
	}
	const rounds = 20
	cost := func(name string, chain [][]byte) time.Duration {
		before, err := measure(site.HTTP)
		if err != nil {
			t.Fatal(err)
		}
		for range rounds {
			if err := handshake(chain); err == nil {
				t.Fatalf("%s: let in", name)
			}
		}
		after, err := measure(site.HTTP)
		if err != nil {
			t.Fatal(err)
		}
		return time.Duration((after.cpu - before.cpu) / rounds * float64(time.Second))
	}
	const limit = 10 * time.Millisecond
	for name, chain := range bombs {
		each := cost(name, chain)
		for tries := 1; each > limit && tries < 5; tries++ { // the server does other things as well, and a busy machine is slower at all
			each = min(each, cost(name, chain))
		}
		t.Logf("%s: %s of CPU each", name, each.Round(10*time.Microsecond))
		if each > limit {
			t.Errorf("%s: refused after %s of CPU, want at most %s", name, each, limit)
		}
	}
	// And the others are served while they come one after the other.
	under(t, 64, func(context.Context) {
		for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
			for name, chain := range bombs {
				if err := handshake(chain); err == nil {
					t.Errorf("%s: let in", name)
				}
			}
		}
	})
}
