package vault

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/bubble"
)

// authority is a throw-away CA.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA " + rand.Text()}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key}
}

func (a authority) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

// keyPair is a certificate with its key, in PEM.
type keyPair struct{ cert, key string }

func (p keyPair) parsed(t testing.TB) *tls.Certificate {
	t.Helper()
	c, err := tls.X509KeyPair([]byte(p.cert), []byte(p.key))
	if err != nil {
		t.Fatal(err)
	}
	return &c
}

// issue makes a certificate for 127.0.0.1 and vault.test.
func (a authority) issue(t testing.TB, name string) keyPair {
	t.Helper()
	return a.issueFor(t, name, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
}

func (a authority) issueFor(t testing.TB, name string, from, until time.Time) keyPair {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: from, NotAfter: until,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"vault.test"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, k.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return keyPair{
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})),
	}
}

// secure serves a handler by TLS, with whatever certificate current holds.
func secure(t *testing.T, h http.Handler, current *atomic.Pointer[tls.Certificate], clients tls.ClientAuthType, maxVersion uint16) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{Certificates: []tls.Certificate{*current.Load()}, ClientAuth: clients, MinVersion: tls.VersionTLS10, MaxVersion: maxVersion}, nil
	}}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL
}

func TestVaultMustBeTheOneThatIsMeant(t *testing.T) {
	f := newFakeVault()
	f.on("GET a", data(map[string]any{"a": "b"}))
	ca, other := newAuthority(t), newAuthority(t)
	var current atomic.Pointer[tls.Certificate]
	current.Store(ca.issue(t, "server").parsed(t))
	address := secure(t, f, &current, tls.NoClientCert, 0)
	old := secure(t, f, &current, tls.NoClientCert, tls.VersionTLS11)
	at := time.Now().Truncate(time.Second)
	var ended, early atomic.Pointer[tls.Certificate]
	ended.Store(ca.issueFor(t, "server", at.Add(-time.Hour), at.Add(-time.Minute)).parsed(t))
	early.Store(ca.issueFor(t, "server", at.Add(time.Hour), at.Add(2*time.Hour)).parsed(t))
	for _, c := range []struct {
		address, ca, name, says string
	}{
		{address, ca.pem(), "", ""},
		{address, ca.pem(), "vault.test", ""},
		{address, other.pem() + ca.pem(), "", ""},
		{address, ca.pem(), "other.test", "check vault.ca_file and vault.server_name"},
		{address, other.pem(), "", "check vault.ca_file and vault.server_name"},
		{address, "", "", "check vault.ca_file and vault.server_name"},
		{secure(t, f, &ended, tls.NoClientCert, 0), ca.pem(), "", `"CN=server" that it shows has expired on ` + at.Add(-time.Minute).UTC().Format(time.RFC3339) + ": renew it there"},
		{secure(t, f, &early, tls.NoClientCert, 0), ca.pem(), "", "begins on " + at.Add(time.Hour).UTC().Format(time.RFC3339) + " only: set the clock right"},
		{old, ca.pem(), "", "protocol version"},
		{strings.Replace(address, "https", "http", 1), "", "", "400"},
	} {
		config := appRole(t)
		config.Address, config.ServerName = c.address, c.name
		if c.ca != "" {
			config.CAFile = secretFile(t, "ca.pem", c.ca)
		}
		before := f.loginCount()
		_, err := dial(t, config).Read(t.Context(), "a")
		switch {
		case c.says == "" && err != nil:
			t.Errorf("name %q: %v", c.name, err)
		case c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says) || f.loginCount() != before):
			t.Errorf("name %q at %s: %v, want %q", c.name, c.address, err, c.says)
		}
	}
}

func TestANewCAFileIsUsedForTheNextConnection(t *testing.T) {
	f := newFakeVault()
	f.on("GET a", data(map[string]any{"a": "b"}))
	first, second := newAuthority(t), newAuthority(t)
	var current atomic.Pointer[tls.Certificate]
	current.Store(first.issue(t, "server").parsed(t))
	config := appRole(t)
	config.Address = secure(t, f, &current, tls.NoClientCert, 0)
	config.CAFile = secretFile(t, "ca.pem", first.pem())
	cl := dial(t, config)
	read := func() error {
		cl.wire.CloseIdleConnections()
		_, err := cl.Read(t.Context(), "a")
		return err
	}
	if err := read(); err != nil {
		t.Fatal(err)
	}
	current.Store(second.issue(t, "server").parsed(t))
	if err := read(); !errors.Is(err, ErrAway) {
		t.Fatalf("another CA: %v", err)
	}
	// What can't be used leaves the old one in use.
	write(t, config.CAFile, "no certificate")
	current.Store(first.issue(t, "server").parsed(t))
	if err := read(); err != nil {
		t.Fatal(err)
	}
	write(t, config.CAFile, second.pem())
	current.Store(second.issue(t, "server").parsed(t))
	if err := read(); err != nil {
		t.Fatal(err)
	}
}

// certLogin is a login by the certificate that put puts into its files.
func certLogin(t testing.TB) (l Login, put func(keyPair)) {
	t.Helper()
	dir := t.TempDir()
	l = Login{Method: "cert", CertFile: filepath.Join(dir, "c.pem"), KeyFile: filepath.Join(dir, "c.key")}
	return l, func(p keyPair) {
		t.Helper()
		write(t, l.CertFile, p.cert)
		write(t, l.KeyFile, p.key)
	}
}

func TestTheCertLoginShowsTheNewestCertificate(t *testing.T) {
	f := newFakeVault()
	f.on("GET a", data(map[string]any{"a": "b"}))
	ca := newAuthority(t)
	var shown atomic.Pointer[string]
	f.on("PUT auth/mesh/login", func(w http.ResponseWriter, r *http.Request) {
		name := "nobody"
		if len(r.TLS.PeerCertificates) > 0 {
			name = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		shown.Store(&name)
		f.mu.Lock()
		f.tokens["hvs."+name] = true
		f.mu.Unlock()
		answer(w, 200, map[string]any{"auth": map[string]any{"client_token": "hvs." + name, "lease_duration": 3600, "renewable": true}})
	})
	var current atomic.Pointer[tls.Certificate]
	current.Store(ca.issue(t, "server").parsed(t))
	address := secure(t, f, &current, tls.RequestClientCert, 0)
	l, put := certLogin(t)
	l.Mount, l.Role = "mesh", "east"
	put(ca.issue(t, "first"))
	now := &clock{at: time.Now()}
	cl := dial(t, Config{
		Now: now.now, Address: address, CAFile: secretFile(t, "ca.pem", ca.pem()), Login: l,
	})
	if _, err := cl.Read(t.Context(), "a"); err != nil || *shown.Load() != "first" || f.logins[0]["name"] != "east" {
		t.Fatal(err, *shown.Load(), f.logins)
	}
	put(ca.issue(t, "second"))
	f.revokeAll()
	// An open connection, which shows the old certificate, is there to be used.
	if _, err := cl.Read(t.Context(), "a"); err != nil || *shown.Load() != "second" {
		t.Fatal(err, *shown.Load())
	}
	// Half of the pair is replaced: a moment in which it can't be used.
	write(t, l.CertFile, ca.issue(t, "third").cert)
	f.revokeAll()
	now.add(young)
	if _, err := cl.Read(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), "cert_file") {
		t.Fatal(err)
	}
	put(ca.issue(t, "fourth"))
	if _, err := cl.Read(t.Context(), "a"); err != nil || *shown.Load() != "fourth" {
		t.Fatal(err, *shown.Load())
	}
}

// shows carries requests as a connection does on which that certificate was shown.
type shows struct {
	direct
	certificate func() *tls.Certificate
}

func (s shows) RoundTrip(r *http.Request) (*http.Response, error) {
	r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{s.certificate().Leaf}}
	return s.direct.RoundTrip(r)
}

func TestARenewalShowsTheNewestCertificate(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		ca := newAuthority(t)
		l, put := certLogin(t)
		put(ca.issue(t, "first"))
		var mu sync.Mutex
		seen := map[string]int{}
		note := func(what string) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				defer mu.Unlock()
				seen[what+" by "+r.TLS.PeerCertificates[0].Subject.CommonName]++
				f.mu.Lock()
				f.tokens["hvs.by-cert"] = true
				f.mu.Unlock()
				answer(w, 200, map[string]any{"auth": map[string]any{"client_token": "hvs.by-cert", "lease_duration": 60, "renewable": true}})
			}
		}
		f.on("PUT auth/cert/login", note("login"))
		f.on("PUT auth/token/renew-self", note("renewal"))
		c := Config{Address: "https://127.0.0.1:1", Login: l, Logger: slog.New(slog.DiscardHandler)}
		cl := connect(t, c, f)
		trust, err := newTrust(c, "127.0.0.1")
		if err != nil {
			t.Fatal(err)
		}
		first := trust.own.get()
		cl.wire.pooled = shows{direct{f}, func() *tls.Certificate { return first }}
		cl.wire.fresh = shows{direct{f}, trust.own.get}
		during := func() map[string]int {
			mu.Lock()
			clear(seen)
			mu.Unlock()
			time.Sleep(10 * time.Minute)
			mu.Lock()
			defer mu.Unlock()
			return maps.Clone(seen)
		}
		keepFor(t, cl, time.Hour, func() {
			if n := during(); n["login by first"] != 1 || n["renewal by first"] < 10 || len(n) != 2 {
				t.Errorf("the first: %v", n)
			}
			// Half of the pair is replaced, and stays so.
			write(t, l.CertFile, ca.issue(t, "half").cert)
			if n, st := during(), cl.Status(); n["renewal by first"] < 10 || len(n) != 1 || !st.Refused || !st.LoggedIn {
				t.Errorf("half a pair: %v, %+v", n, st)
			}
			put(ca.issue(t, "second"))
			if n, st := during(), cl.Status(); n["login by second"] != 1 || n["renewal by second"] < 10 || len(n) != 2 || st.Refused {
				t.Errorf("the second: %v, %+v", n, st)
			}
		})
	})
}

func TestACertificateIsTakenOnceItsKeyIsForUsAlone(t *testing.T) {
	ca := newAuthority(t)
	l, put := certLogin(t)
	put(ca.issue(t, "first"))
	own, err := newReloaded(slog.New(slog.DiscardHandler), func() (*tls.Certificate, error) { return readCertificate(l) }, l.CertFile, l.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	put(ca.issue(t, "second"))
	if err := os.Chmod(l.KeyFile, 0o644); err != nil {
		t.Fatal(err)
	}
	if got := own.get().Leaf.Subject.CommonName; got != "first" {
		t.Errorf("mode 0644: %s", got)
	}
	if err := os.Chmod(l.KeyFile, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := own.get().Leaf.Subject.CommonName; got != "second" {
		t.Errorf("mode 0600 again: %s", got)
	}
}
