package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/sds"
	"github.com/signet-ca/signet/trust"
)

// signet runs a command line and returns its exit status.
func signet(ctx context.Context, stdin string, args ...string) (code int, stdout, stderr string) {
	var out, talk bytes.Buffer
	c := &cli{in: strings.NewReader(stdin), out: &out, err: &talk}
	code = c.run(ctx, args)
	return code, out.String(), talk.String()
}

// svidWorld is a root and an agent whose only caller is whoever connects.
type svidWorld struct {
	t    *testing.T
	root *x509.Certificate
	key  *ecdsa.PrivateKey

	mu      sync.Mutex
	svid    *sds.SVID
	err     error
	changed chan struct{}
}

var (
	svidID   = spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/frontend")
	bannedID = spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/banned")
)

func newSVIDWorld(t *testing.T) *svidWorld {
	t.Helper()
	w := &svidWorld{t: t, changed: make(chan struct{})}
	w.key, w.root = w.certificate(nil, nil, func(c *x509.Certificate) {
		c.Subject = pkix.Name{CommonName: "root"}
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org"}}
	})
	w.renew()
	return w
}

func (w *svidWorld) certificate(parent *x509.Certificate, by *ecdsa.PrivateKey, change func(*x509.Certificate)) (*ecdsa.PrivateKey, *x509.Certificate) {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	c := &x509.Certificate{SerialNumber: serial, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour)}
	change(c)
	if parent == nil {
		parent, by = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), by)
	if err != nil {
		w.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		w.t.Fatal(err)
	}
	return key, cert
}

func (w *svidWorld) leaf(change ...func(*x509.Certificate)) (*ecdsa.PrivateKey, *x509.Certificate) {
	return w.certificate(w.root, w.key, func(c *x509.Certificate) {
		c.KeyUsage, c.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		c.URIs = []*url.URL{svidID.URL()}
		for _, f := range change {
			f(c)
		}
	})
}

func pemOf(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

func (w *svidWorld) file(certs ...*x509.Certificate) string {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), "c.pem")
	var text []byte
	for _, c := range certs {
		text = append(text, pemOf(c)...)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// set changes what the caller sees.
func (w *svidWorld) set(svid *sds.SVID, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.svid, w.err = svid, err
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *svidWorld) renew() string {
	key, cert := w.leaf()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		w.t.Fatal(err)
	}
	w.set(&sds.SVID{
		ID: svidID, CertificateChain: pemOf(cert), PrivateKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		NotBefore: cert.NotBefore, NotAfter: cert.NotAfter, Serial: cert.SerialNumber.Text(16), Digest: sha256.Sum256(cert.Raw),
	}, nil)
	return describeCert(cert).Serial
}

func (w *svidWorld) Attest(context.Context, net.Conn) (sds.View, error) { return w, w.Err() }
func (w *svidWorld) Identities() []spiffeid.ID                          { return []spiffeid.ID{svidID} }

func (w *svidWorld) TrustDomain() spiffeid.TrustDomain { return svidID.TrustDomain() }
func (w *svidWorld) TrustDomains() []spiffeid.TrustDomain {
	return []spiffeid.TrustDomain{svidID.TrustDomain()}
}
func (w *svidWorld) Close() {}

func (w *svidWorld) Refusal(id spiffeid.ID) error {
	if id == bannedID {
		return status.Error(codes.PermissionDenied, id.String()+" is banned")
	}
	return nil
}

func (w *svidWorld) SVID(spiffeid.ID) *sds.SVID {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.svid
}

func (w *svidWorld) Bundle(td spiffeid.TrustDomain) (trust.Bundle, bool) {
	b, err := trust.NewBundle(td, 1, []*x509.Certificate{w.root})
	return b, err == nil
}

func (w *svidWorld) Changed() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

func (w *svidWorld) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// serve opens the agent's socket.
func (w *svidWorld) serve() string {
	w.t.Helper()
	return w.serveAs(func(door secretv3.SecretDiscoveryServiceServer) secretv3.SecretDiscoveryServiceServer { return door })
}

func (w *svidWorld) serveAs(as func(secretv3.SecretDiscoveryServiceServer) secretv3.SecretDiscoveryServiceServer) string {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		w.t.Fatal(err)
	}
	door, err := sds.New(sds.Config{Workloads: w})
	if err != nil {
		w.t.Fatal(err)
	}
	server := grpc.NewServer(append(sds.ServerOptions(), grpc.Creds(sds.ConnCredentials()))...)
	secretv3.RegisterSecretDiscoveryServiceServer(server, as(door))
	go server.Serve(l)
	w.t.Cleanup(server.Stop)
	return path
}

func TestSVIDFetchShowsAndWritesWhatTheAgentGives(t *testing.T) {
	w := newSVIDWorld(t)
	socket, dir := w.serve(), filepath.Join(t.TempDir(), "tls")
	code, out, talk := signet(t.Context(), "", "svid", "fetch", "--socket", socket, "--write", dir, "-o", "json")
	if code != exitYes {
		t.Fatalf("exit %d: %s", code, talk)
	}
	var got svidShown
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if got.SPIFFEID != svidID.String() || len(got.Chain) != 1 || len(got.Roots) != 1 || strings.Contains(out, "PRIVATE") {
		t.Fatalf("shown: %s", out)
	}
	if info, err := os.Stat(filepath.Join(dir, "key.pem")); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("key.pem: %v, %v", info, err)
	}
	code, _, talk = signet(t.Context(), "", "svid", "verify", filepath.Join(dir, "svid.pem"), "--bundle", filepath.Join(dir, "bundle.pem"))
	if code != exitYes {
		t.Fatalf("what was written does not verify: exit %d, %s", code, talk)
	}
}

func TestSVIDFetchTellsARefusalFromAnAbsence(t *testing.T) {
	w := newSVIDWorld(t)
	socket := w.serve()
	w.set(nil, status.Error(codes.PermissionDenied, "no registration fits\x1b[31m this caller"))
	code, out, talk := signet(t.Context(), "", "svid", "fetch", "--socket", socket)
	if code != exitNo || out != "" || !strings.Contains(talk, "no registration fits") || strings.Contains(talk, "\x1b") {
		t.Errorf("refused: exit %d, %q, %q", code, out, talk)
	}
	w.set(nil, nil)
	if code, _, talk = signet(t.Context(), "", "svid", "fetch", "--socket", socket, "--timeout", "100ms"); code != exitCouldNotSay || !strings.Contains(talk, "--timeout") {
		t.Errorf("nothing in time: exit %d, %q", code, talk)
	}
	if code, _, talk = signet(t.Context(), "", "svid", "fetch", "--socket", socket+".not"); code != exitCouldNotSay || !strings.Contains(talk, "--socket") {
		t.Errorf("no agent: exit %d, %q", code, talk)
	}
}

// To wait would not help: an agent never gives what is banned.
func TestABannedIdentityIsRefusedAtOnceThoughTheProcessHasAnother(t *testing.T) {
	socket := newSVIDWorld(t).serve()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // for one that waits
	defer cancel()
	for what, more := range map[string][]string{"fetch": {"--timeout", "1h"}, "watch": nil} {
		code, out, talk := signet(ctx, "", append([]string{"svid", what, "--socket", socket, "--spiffe-id", bannedID.String()}, more...)...)
		if code != exitNo || out != "" || !strings.Contains(talk, "refuses: "+bannedID.String()+" is banned") {
			t.Errorf("%s: exit %d, %q, %q", what, code, out, talk)
		}
	}
	if code, _, talk := signet(t.Context(), "", "svid", "fetch", "--socket", socket, "--spiffe-id", svidID.String()); code != exitYes {
		t.Errorf("the other one: exit %d, %q", code, talk)
	}
	// What is not given yet may come.
	code, _, talk := signet(t.Context(), "", "svid", "fetch", "--socket", socket, "--spiffe-id", "spiffe://example.org/x", "--timeout", "100ms")
	if code != exitCouldNotSay || !strings.Contains(talk, "gave no spiffe://example.org/x in time") {
		t.Errorf("nobody's: exit %d, %q", code, talk)
	}
}

// streamsOnly never answers a fetch.
type streamsOnly struct {
	secretv3.SecretDiscoveryServiceServer
}

func (streamsOnly) FetchSecrets(ctx context.Context, _ *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	<-ctx.Done()
	return nil, status.FromContextError(ctx.Err()).Err()
}

func TestAnIdentityIsFetchedFromAServerThatOnlyStreams(t *testing.T) {
	socket := newSVIDWorld(t).serveAs(func(door secretv3.SecretDiscoveryServiceServer) secretv3.SecretDiscoveryServiceServer {
		return streamsOnly{door}
	})
	if code, _, talk := signet(t.Context(), "", "svid", "fetch", "--socket", socket, "--spiffe-id", svidID.String(), "--timeout", "5s"); code != exitYes {
		t.Errorf("exit %d, %q", code, talk)
	}
}

func TestSVIDWatchPrintsALineForEachRenewal(t *testing.T) {
	w := newSVIDWorld(t)
	first := w.renew()
	socket := w.serve()
	ctx, cancel := context.WithCancel(t.Context())
	r, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ended := make(chan int, 1)
	go func() {
		c := &cli{in: strings.NewReader(""), out: out, err: &bytes.Buffer{}}
		ended <- c.run(ctx, []string{"svid", "watch", "--socket", socket, "-o", "json"})
		out.Close()
	}()
	dec := json.NewDecoder(r)
	for _, want := range []string{first, ""} {
		if want == "" {
			want = w.renew()
		}
		var got renewalShown
		if err := dec.Decode(&got); err != nil {
			t.Fatal(err)
		}
		if got.Serial != want || !got.RenewedBy.Before(got.NotAfter) {
			t.Fatalf("got %+v, want serial %s", got, want)
		}
	}
	cancel()
	if code := <-ended; code != exitYes {
		t.Fatalf("stopped by its user: exit %d", code)
	}

	w.set(nil, status.Error(codes.PermissionDenied, "withdrawn"))
	if code, _, talk := signet(t.Context(), "", "svid", "watch", "--socket", socket); code != exitNo || !strings.Contains(talk, "withdrawn") {
		t.Fatalf("withdrawn: exit %d, %q", code, talk)
	}
}

func TestSVIDVerifyAnswersByItsExitStatus(t *testing.T) {
	w := newSVIDWorld(t)
	_, good := w.leaf()
	other := newSVIDWorld(t)
	_, old := w.leaf(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })
	_, pathless := w.leaf(func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org"}} })
	bundle, garbage := w.file(w.root), filepath.Join(t.TempDir(), "garbage")
	if err := os.WriteFile(garbage, []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args []string
		want int
		says string
	}{
		"valid":          {[]string{w.file(good)}, exitYes, ""},
		"valid and his":  {[]string{w.file(good), "--spiffe-id", svidID.String()}, exitYes, ""},
		"not his":        {[]string{w.file(good), "--spiffe-id", "spiffe://example.org/x"}, exitNo, svidID.String()},
		"expired":        {[]string{w.file(old)}, exitNo, "now is"},
		"no path":        {[]string{w.file(pathless)}, exitNo, "X509-SVID §3.1"},
		"another root":   {[]string{w.file(good), "--bundle", other.file(other.root)}, exitNo, "X509-SVID §5.1"},
		"its own root":   {[]string{w.file(good), "--bundle", w.file(good)}, exitCouldNotSay, "not a CA's"},
		"garbage":        {[]string{garbage}, exitCouldNotSay, "certificate 1"},
		"no such file":   {[]string{garbage + ".not"}, exitCouldNotSay, "no such file"},
		"no certificate": {[]string{"/dev/null"}, exitCouldNotSay, "no certificate"},
		"not an ID":      {[]string{w.file(good), "--spiffe-id", "frontend"}, exitCouldNotSay, "frontend"},
	} {
		args := append([]string{"svid", "verify", "--bundle", bundle}, c.args...)
		if code, _, talk := signet(t.Context(), "", args...); code != c.want || !strings.Contains(talk, c.says) {
			t.Errorf("%s: exit %d, want %d; %q, want %q in it", name, code, c.want, talk, c.says)
		}
	}
}

func TestSVIDInspectNamesTheRuleThatIsBroken(t *testing.T) {
	w := newSVIDWorld(t)
	_, good := w.leaf()
	_, two := w.leaf(func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) })
	text := string(pemOf(good)) + string(pemOf(two)) + string(pemOf(w.root))
	code, out, talk := signet(t.Context(), text, "svid", "inspect", "-", "-o", "json")
	if code != exitYes {
		t.Fatalf("exit %d: %s", code, talk)
	}
	var got certsShown
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != 3 || got[0].Finding != "" || !strings.Contains(got[1].Finding, "§2") || got[2].Kind != "root" || got[2].Finding != "" {
		t.Fatalf("got %+v", got)
	}
}
