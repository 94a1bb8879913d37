package transit

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/vault"
)

// fakeToken must show nowhere.
const fakeToken = "hvs.fake-token-that-must-not-be-shown" //nolint:gosec // no credential

// fakeTransit answers as Vault's Transit engine does, as far as this package asks it, so that faults can be made. What the
// engine really does is tested against a real Vault.
type fakeTransit struct {
	*httptest.Server

	mu   sync.Mutex
	keys map[string]*fakeKey // by name in Vault
	// before is asked first and may answer in its place (true).
	before func(w http.ResponseWriter, r *http.Request) bool
	// results may change what sign answers.
	results func(results []map[string]any) []map[string]any
	timeout time.Duration // of a call
	now     func() time.Time
	asked   []string // read or write, and the path
}

type fakeKey struct {
	kind                     string
	exportable, backup       bool
	imported                 bool
	minAvail, minDec, minEnc int
	versions                 []crypto.Signer // the first is version 1
	autoRotate               int
	withoutBody              bool
}

func newFakeTransit(t *testing.T) *fakeTransit {
	f := &fakeTransit{keys: map[string]*fakeKey{}, timeout: 20 * time.Second}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

// store is a Store with the fake behind it.
func (f *fakeTransit) connect(t *testing.T) *vault.Client {
	t.Helper()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte(fakeToken+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	client, err := vault.New(vault.Config{Address: f.URL, Login: vault.Login{Method: "token", TokenFile: token}, Timeout: f.timeout, Now: f.now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

func (f *fakeTransit) store(t *testing.T, change ...func(*Config)) *Store {
	t.Helper()
	c := Config{Vault: f.connect(t), Prefix: "signet-east-", Timeout: 2 * f.timeout, Metrics: prometheus.NewRegistry()}
	for _, ch := range change {
		ch(&c)
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// set changes the fake under its lock.
func (f *fakeTransit) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// count is how often something was asked.
func (f *fakeTransit) count(what string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, a := range f.asked {
		if a == what {
			n++
		}
	}
	return n
}

func refuse(w http.ResponseWriter, status int, messages ...string) {
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": append([]string{}, messages...)})
}

func reply(w http.ResponseWriter, data map[string]any) {
	_ = json.NewEncoder(w).Encode(map[string]any{"request_id": "1", "data": data})
}

func (f *fakeTransit) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	op := "write "
	if r.Method == http.MethodGet {
		op = "read "
	}
	f.asked = append(f.asked, op+path)
	if strings.HasPrefix(path, "auth/token/") {
		reply(w, map[string]any{"renewable": false, "ttl": 0, "id": fakeToken})
		return
	}
	if f.before != nil && f.before(w, r) {
		return
	}
	rest, ok := strings.CutPrefix(path, "transit/")
	if !ok {
		refuse(w, http.StatusNotFound, fmt.Sprintf("no handler for route %q. route entry not found.", path))
		return
	}
	parts := strings.Split(strings.TrimSuffix(rest, "/"), "/")
	var body map[string]any
	_ = json.NewDecoder(r.Body).Decode(&body)
	switch {
	case parts[0] == "keys" && len(parts) == 1:
		names := []string{}
		for n := range f.keys {
			names = append(names, n)
		}
		if len(names) == 0 {
			refuse(w, http.StatusNotFound)
			return
		}
		reply(w, map[string]any{"keys": names})
	case parts[0] == "keys":
		f.key(w, r, parts[1:], body)
	case parts[0] == "sign":
		f.sign(w, parts[1:], body)
	}
}

func (f *fakeTransit) key(w http.ResponseWriter, r *http.Request, parts []string, body map[string]any) {
	name, op := parts[0], strings.Join(parts[1:], "/")
	k := f.keys[name]
	number := func(field string, into *int) {
		if n, ok := body[field].(float64); ok {
			*into = int(n)
		}
	}
	switch {
	case r.Method == http.MethodGet && k == nil:
		refuse(w, http.StatusNotFound)
		return
	case r.Method == http.MethodGet:
	case op == "" && k == nil:
		k = &fakeKey{kind: fmt.Sprint(body["type"]), minDec: 1}
		number("auto_rotate_period", &k.autoRotate)
		k.rotate()
		f.keys[name] = k
	case op == "": // Vault answers as if it had made it
	case k == nil:
		refuse(w, http.StatusBadRequest, "key not found")
		return
	case op == "rotate":
		k.rotate()
	case op == "config":
		number("min_decryption_version", &k.minDec)
		number("min_encryption_version", &k.minEnc)
		number("auto_rotate_period", &k.autoRotate)
	case op == "trim":
		number("min_available_version", &k.minAvail)
	}
	if k.withoutBody && r.Method != http.MethodGet {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	reply(w, k.describe(name))
}

func (k *fakeKey) rotate() {
	var s crypto.Signer
	var err error
	switch keystore.Algorithm(k.kind) {
	case keystore.RSA2048:
		s, err = rsa.GenerateKey(rand.Reader, 2048)
	case keystore.Ed25519:
		_, s, err = ed25519.GenerateKey(rand.Reader)
	case keystore.ECDSAP384:
		s, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	default:
		s, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		panic(err)
	}
	k.versions = append(k.versions, s)
}

func (k *fakeKey) describe(name string) map[string]any {
	keys := map[string]any{}
	for v := max(k.minDec, k.minAvail, 1); v <= len(k.versions); v++ {
		pub := k.versions[v-1].Public()
		if ed, ok := pub.(ed25519.PublicKey); ok {
			keys[strconv.Itoa(v)] = map[string]any{"public_key": base64.StdEncoding.EncodeToString(ed)}
			continue
		}
		der, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil {
			panic(err)
		}
		keys[strconv.Itoa(v)] = map[string]any{"public_key": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}
	}
	return map[string]any{
		"name": name, "type": k.kind, "latest_version": len(k.versions), "min_available_version": k.minAvail,
		"min_decryption_version": k.minDec, "min_encryption_version": k.minEnc, "exportable": k.exportable,
		"allow_plaintext_backup": k.backup, "auto_rotate_period": k.autoRotate, "keys": keys,
		"imported_key": k.imported,
	}
}

func (f *fakeTransit) sign(w http.ResponseWriter, parts []string, body map[string]any) {
	k := f.keys[parts[0]]
	if k == nil {
		refuse(w, http.StatusBadRequest, "signing key not found")
		return
	}
	if len(body["batch_input"].([]any)) == 0 {
		refuse(w, http.StatusBadRequest, "missing batch input to process")
		return
	}
	version := int(body["key_version"].(float64))
	var results []map[string]any
	for _, item := range body["batch_input"].([]any) {
		input, err := base64.StdEncoding.DecodeString(item.(map[string]any)["input"].(string))
		switch {
		case err != nil:
			results = append(results, map[string]any{"error": "unable to decode input"})
			continue
		case version > len(k.versions):
			results = append(results, map[string]any{"error": "requested version for signing is higher than the latest key version"})
			continue
		case version < k.minEnc:
			results = append(results, map[string]any{"error": "requested version for signing is less than the minimum encryption key version"})
			continue
		case version < max(k.minDec, k.minAvail):
			results = append(results, map[string]any{"error": "no such key version"})
			continue
		}
		opts := crypto.SignerOpts(map[string]crypto.Hash{"": 0, "sha2-256": crypto.SHA256, "sha2-384": crypto.SHA384, "sha2-512": crypto.SHA512}[cmp.Or(append(parts[1:], "")...)])
		if body["signature_algorithm"] == "pss" {
			opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: opts.HashFunc()}
		}
		sig, err := k.versions[version-1].Sign(rand.Reader, input, opts)
		if err != nil {
			results = append(results, map[string]any{"error": err.Error()})
			continue
		}
		results = append(results, map[string]any{"signature": fmt.Sprintf("vault:v%d:%s", version, base64.StdEncoding.EncodeToString(sig)), "key_version": version})
	}
	if f.results != nil {
		results = f.results(results)
	}
	reply(w, map[string]any{"batch_results": results})
}
