package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

// Validators that we did not write accept every kind of leaf of every kind of issuer.
func TestStrangersAcceptOurLeaves(t *testing.T) {
	opensslPath, noOpenSSL := exec.LookPath("openssl")
	registry, err := lint.GlobalRegistry().Filter(lint.FilterOptions{IncludeSources: lint.SourceList{lint.RFC5280, lint.RFC5480, lint.RFC8813}})
	if err != nil {
		t.Fatal(err)
	}
	if len(registry.Names()) < 80 {
		t.Fatalf("only %d lints were selected", len(registry.Names()))
	}
	for _, issuerAlg := range algorithms[:3] {
		w := newWorld(t, func(o *worldOptions) { o.algorithm = issuerAlg })
		w.register("long", "spiffe://example.org/"+strings.Repeat("x", 2048-len("spiffe://example.org/")), 0)
		for _, keyAlg := range algorithms {
			key, err := identity.OwnKey(keysByAlgorithm()[keyAlg][0])
			if err != nil {
				t.Fatal(err)
			}
			for name, g := range map[string]*identity.Grant{"web": w.grant("web", key), "long": w.grant("long", key), "control": w.serverGrant(key)} {
				t.Run(fmt.Sprintf("%s signs %s for %s", issuerAlg, name, keyAlg), func(t *testing.T) {
					leaf, cert := w.issue(g)
					root := w.root
					if name == "control" {
						root = w.control.Certificate()
					}
					goAccepts(t, leaf, cert, root)
					spiffeAccepts(t, leaf, root, keyAlg)
					zlintAccepts(t, registry, cert)
					if noOpenSSL != nil {
						t.Skip("openssl is not on PATH: its strict check was left out")
					}
					opensslAccepts(t, opensslPath, leaf, root)
				})
			}
		}
	}
}

func goAccepts(t *testing.T, leaf *Leaf, cert, root *x509.Certificate) {
	t.Helper()
	roots, above := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	for _, der := range leaf.Chain[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		above.AddCert(c)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, Intermediates: above, CurrentTime: noon, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Errorf("crypto/x509: %v", err)
		}
	}
}

func spiffeAccepts(t *testing.T, leaf *Leaf, root *x509.Certificate, keyAlg keystore.Algorithm) {
	t.Helper()
	keyDER, err := x509.MarshalPKCS8PrivateKey(keysByAlgorithm()[keyAlg][0])
	if err != nil {
		t.Fatal(err)
	}
	svid, err := x509svid.ParseRaw(bytes.Join(leaf.Chain, nil), keyDER)
	if err != nil {
		t.Fatalf("go-spiffe does not parse it: %v", err)
	}
	id, _, err := x509svid.Verify(svid.Certificates, x509bundle.FromX509Authorities(exampleOrg, []*x509.Certificate{root}), x509svid.WithTime(noon))
	if err != nil || id != svid.ID {
		t.Errorf("go-spiffe: %v, %v", id, err)
	}
}

// zlintAccepts wants neither errors nor warnings.
func zlintAccepts(t *testing.T, registry lint.Registry, cert *x509.Certificate) {
	t.Helper()
	z, err := zx509.ParseCertificate(cert.Raw)
	if err != nil {
		t.Fatalf("zcrypto does not parse it: %v", err)
	}
	passed := 0
	for name, r := range zlint.LintCertificateEx(z, registry).Results {
		switch r.Status {
		case lint.Warn, lint.Error, lint.Fatal:
			t.Errorf("zlint %s: %s %s", name, r.Status, r.Details)
		case lint.Pass:
			passed++
		}
	}
	if passed < 20 {
		t.Errorf("zlint: only %d lints applied", passed)
	}
}

func opensslAccepts(t *testing.T, openssl string, leaf *Leaf, root *x509.Certificate) {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, ders ...[]byte) string {
		var out []byte
		for _, der := range ders {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, out, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	leafFile, chainFile, rootFile := write("leaf.pem", leaf.Chain[0]), write("chain.pem", leaf.Chain[1:]...), write("root.pem", root.Raw)
	for _, purpose := range []string{"sslserver", "sslclient"} {
		out, err := exec.CommandContext(t.Context(), openssl, "verify", "-x509_strict", "-attime", fmt.Sprint(noon.Unix()), "-purpose", purpose,
			"-CAfile", rootFile, "-untrusted", chainFile, leafFile).CombinedOutput()
		if err != nil {
			t.Errorf("openssl verify -x509_strict -purpose %s: %v\n%s", purpose, err, out)
		}
	}
}
