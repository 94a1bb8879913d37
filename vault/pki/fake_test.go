package pki

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/vault"
)

var exampleOrg = spiffeid.RequireTrustDomainFromString("example.org")

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newKey() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }

// authority is a CA of a fake Vault.
type authority struct {
	id, name string
	cert     *x509.Certificate
	key      *ecdsa.PrivateKey
	above    []*x509.Certificate
	// keyless: the certificate was imported alone. usage is what it may be used for, all if "".
	keyless bool
	usage   string
}

// again certifies an authority's key anew, as Vault does with `issuers/generate/root/existing`.
func (a *authority) again(name string, spoil ...func(*x509.Certificate)) *authority {
	c := *a.cert
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	for _, s := range spoil {
		s(&c)
	}
	return &authority{
		id: "id-" + name, name: name, key: a.key,
		cert: must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, &c, &c, a.key.Public(), a.key)))),
	}
}

// newAuthority makes a root, or an intermediate under another authority.
func newAuthority(name string, under *authority, spoil ...func(*x509.Certificate)) *authority {
	a := &authority{id: "id-" + name, name: name, key: newKey()}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour).Truncate(time.Second),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: -1,
	}
	for _, s := range spoil {
		s(c)
	}
	parent, key := c, a.key
	if under != nil {
		parent, key = under.cert, under.key
		a.above = append([]*x509.Certificate{under.cert}, under.above...)
	}
	a.cert = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, c, parent, a.key.Public(), key))))
	return a
}

// fakeVault is no Vault: it answers the few paths that are asked for, wrongly if told so.
type fakeVault struct {
	issuers []*authority
	// spoil changes what is signed, key whose key signs it, answer what is answered.
	spoil  func(*x509.Certificate)
	public crypto.PublicKey
	signer *authority
	answer func(map[string]any)
	// odd answers in the place of an issuer, by its ID; it may also be listed and no longer there.
	odd map[string]http.HandlerFunc
	// status of sign-intermediate, if not 200.
	status int
	// noMount answers as Vault does where nothing is mounted, to a token with a policy for this path alone; unread is what a policy
	// that lacks read on issuers does.
	noMount, unread bool
	asked           []map[string]any
	signed          []string
}

func encode(c *x509.Certificate) string { return strings.TrimSpace(string(ca.EncodeChain(c))) }

func chainOf(certs ...*x509.Certificate) []any {
	var out []any
	for _, c := range certs {
		out = append(out, encode(c))
	}
	return out
}

func (f *fakeVault) find(ref string) *authority {
	if ref == DefaultIssuer && len(f.issuers) > 0 {
		return f.issuers[0]
	}
	for _, i := range f.issuers {
		if i.id == ref || i.name == ref {
			return i
		}
	}
	return nil
}

func (f *fakeVault) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	reply := func(status int, data map[string]any, errors ...string) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		if errors != nil {
			_ = json.NewEncoder(w).Encode(map[string]any{"errors": errors})
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"data": data})
	}
	switch rest, of := strings.CutPrefix(path, "pki/issuer/"); {
	case f.noMount && strings.HasPrefix(path, "pki/"), f.unread && of && !strings.Contains(rest, "/"):
		reply(403, nil, "1 error occurred:\n\t* permission denied\n\n")
	case path == "auth/token/lookup-self":
		reply(200, map[string]any{"ttl": 3600, "renewable": false, "id": "x", "policies": []string{"p"}})
	case strings.TrimSuffix(path, "/") == "pki/issuers" && len(f.issuers) > 0:
		var ids []string
		for _, i := range f.issuers {
			ids = append(ids, i.id)
		}
		for id := range f.odd {
			if f.find(id) == nil {
				ids = append(ids, id)
			}
		}
		reply(200, map[string]any{"keys": ids})
	case path == "pki/issuers/generate/root/internal":
		f.generate(r, reply)
	case of && strings.HasSuffix(rest, "/json"):
		if odd := f.odd[strings.TrimSuffix(rest, "/json")]; odd != nil {
			odd(w, r)
			return
		}
		i := f.find(strings.TrimSuffix(rest, "/json"))
		if i == nil {
			reply(500, nil, "unable to find PKI issuer for reference")
			return
		}
		reply(200, map[string]any{
			"certificate": encode(i.cert), "ca_chain": chainOf(append([]*x509.Certificate{i.cert}, i.above...)...),
			"issuer_id": i.id, "issuer_name": i.name,
		})
	case of && !strings.Contains(rest, "/") && f.find(rest) != nil:
		i := f.find(rest)
		key, usage := "key-of-"+i.id, cmp.Or(i.usage, "crl-signing,issuing-certificates,ocsp-signing,read-only")
		if i.keyless {
			key = ""
		}
		reply(200, map[string]any{"key_id": key, "usage": usage, "issuer_id": i.id})
	case of && strings.HasSuffix(rest, "/sign-intermediate"):
		f.sign(strings.TrimSuffix(rest, "/sign-intermediate"), r, reply)
	default:
		reply(404, nil, "no handler for route")
	}
}

// template reads what was asked for.
func (f *fakeVault) template(r *http.Request) *x509.Certificate {
	var body map[string]any
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		panic(err)
	}
	f.asked = append(f.asked, body)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: body["common_name"].(string)},
		NotBefore: time.Now().Add(-must(time.ParseDuration(body["not_before_duration"].(string)))),
		NotAfter:  must(time.Parse(time.RFC3339, body["not_after"].(string))),
		KeyUsage:  x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
		MaxPathLen: int(body["max_path_length"].(float64)),
		URIs:       []*url.URL{must(url.Parse(body["uri_sans"].([]any)[0].(string)))},
	}
	c.MaxPathLenZero = c.MaxPathLen == 0
	if id, ok := body["skid"].(string); ok {
		c.SubjectKeyId = must(hex.DecodeString(id))
	}
	if f.spoil != nil {
		f.spoil(c)
	}
	return c
}

func (f *fakeVault) sign(ref string, r *http.Request, reply func(int, map[string]any, ...string)) {
	c := f.template(r)
	i := f.find(ref)
	if f.status != 0 || i == nil || i.keyless {
		reply(max(f.status, 500), nil, "unable to fetch corresponding key for issuer")
		return
	}
	block, _ := pem.Decode([]byte(f.asked[len(f.asked)-1]["csr"].(string)))
	public := must(x509.ParseCertificateRequest(block.Bytes)).PublicKey
	if f.public != nil {
		public = f.public
	}
	if f.signer != nil {
		i = f.signer
	}
	f.signed = append(f.signed, i.id)
	cert := must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, c, i.cert, public, i.key))))
	data := map[string]any{
		"certificate": encode(cert), "issuing_ca": encode(i.cert),
		"ca_chain": chainOf(append([]*x509.Certificate{cert, i.cert}, i.above...)...),
	}
	if f.answer != nil {
		f.answer(data)
	}
	reply(200, data)
}

func (f *fakeVault) generate(r *http.Request, reply func(int, map[string]any, ...string)) {
	c := f.template(r)
	name := f.asked[len(f.asked)-1]["issuer_name"].(string)
	if f.find(name) != nil {
		reply(400, nil, "issuer name already in use")
		return
	}
	i := &authority{id: "id-" + name, name: name, key: newKey()}
	i.cert = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, c, c, i.key.Public(), i.key))))
	f.issuers = append(f.issuers, i)
	data := map[string]any{"certificate": encode(i.cert), "issuing_ca": encode(i.cert), "issuer_id": i.id, "issuer_name": name}
	if f.answer != nil {
		f.answer(data)
	}
	reply(200, data)
}

// upstream starts the fake and speaks to it.
func (f *fakeVault) upstream(t *testing.T, issuer string) *Upstream {
	t.Helper()
	server := httptest.NewServer(f)
	t.Cleanup(server.Close)
	return newUpstream(t, server.URL, "", "fake", "pki", issuer)
}

func newUpstream(t *testing.T, address, caFile, token, mount, issuer string) *Upstream {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	// Vault may take seconds to make an RSA key.
	client, err := vault.New(vault.Config{Address: address, CAFile: caFile, Timeout: 30 * time.Second, Login: vault.Login{Method: "token", TokenFile: file}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	u, err := New(Config{Vault: client, Mount: mount, Issuer: issuer})
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// ask is a plan for a new key, with its request; life 0 = a week.
func ask(t *testing.T, life time.Duration) (ca.Plan, []byte) {
	t.Helper()
	if life == 0 {
		life = 7 * 24 * time.Hour
	}
	key := newKey()
	return planFor(t, key, life), requestOf(t, key)
}

func planFor(t *testing.T, key crypto.Signer, life time.Duration) ca.Plan {
	t.Helper()
	p, err := ca.NewIntermediatePlan(exampleOrg, "east", key.Public(), time.Now(), life)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// requestOf claims much that is not planned, so that it shows if something is taken from it.
func requestOf(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "of the request", Country: []string{"XX"}},
		URIs:    []*url.URL{{Scheme: "spiffe", Host: "evil.example"}}, DNSNames: []string{"evil.example"},
		ExtraExtensions: []pkix.Extension{
			{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 6, 1, 1, 0xff, 2, 1, 9}}, // CA:TRUE, pathlen 9
			{Id: []int{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 0, 0xff}},                // all key usages
		},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}
