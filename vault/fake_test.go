package vault

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-ca/signet/test/lab"
)

// theVault is the real one of all tests here that need it. Each has roles, policies and paths of its own.
var theVault lab.OneVault

func TestMain(m *testing.M) { goleak.VerifyTestMain(theVault.During(m)) }

// fakeVault answers as a test tells it. It knows the logins and tokens, and else only what is in paths.
type fakeVault struct {
	mu sync.Mutex
	// paths answer before anything else, by "METHOD path".
	paths map[string]http.HandlerFunc
	// life of the tokens it gives, in seconds, and whether it renews them.
	life      int
	renewable bool
	// tokens that it takes; nil takes all that it gave.
	tokens map[string]bool
	// seen are all requests as "METHOD path", logins the bodies of those.
	seen   []string
	logins []map[string]any
	heads  []http.Header
	body   []byte
}

// last is the body of the last request.
func (f *fakeVault) last() []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.body
}

func newFakeVault() *fakeVault {
	return &fakeVault{paths: map[string]http.HandlerFunc{}, life: 3600, renewable: true, tokens: map[string]bool{}}
}

func (f *fakeVault) on(what string, h http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.paths[what] = h
}

func (f *fakeVault) revokeAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.tokens)
}

func (f *fakeVault) count(what string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, s := range f.seen {
		if s == what {
			n++
		}
	}
	return n
}

func (f *fakeVault) loginCount() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.logins)
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

func refuse(status int, messages ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		answer(w, status, map[string]any{"errors": append([]string{}, messages...)})
	}
}

func data(d map[string]any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { answer(w, 200, map[string]any{"data": d}) }
}

func hang(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

func (f *fakeVault) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// Read first: a server learns that its client has gone only after the body.
	sent, _ := io.ReadAll(r.Body)
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	method := r.Method
	if method == http.MethodGet && r.URL.Query().Get("list") == "true" {
		method = "LIST"
	}
	f.mu.Lock()
	f.seen = append(f.seen, method+" "+path)
	f.heads, f.body = append(f.heads, r.Header.Clone()), sent
	special := f.paths[method+" "+path]
	life, renewable := f.life, f.renewable
	f.mu.Unlock()
	token := r.Header.Get("X-Vault-Token")
	auth := map[string]any{"client_token": token, "lease_duration": life, "renewable": renewable}
	login := strings.HasPrefix(path, "auth/") && strings.HasSuffix(path, "/login")
	if login {
		var body map[string]any
		_ = json.Unmarshal(sent, &body)
		f.mu.Lock()
		f.logins = append(f.logins, body)
		f.mu.Unlock()
	}
	f.mu.Lock()
	known := f.tokens[token]
	f.mu.Unlock()
	switch {
	case special != nil && (login || known || path == healthPath):
		special(w, r)
	case path == healthPath:
		answer(w, 200, map[string]any{"initialized": true, "sealed": false})
	case login:
		f.mu.Lock()
		given := fmt.Sprintf("hvs.given-%d", len(f.logins))
		f.tokens[given] = true
		f.mu.Unlock()
		auth["client_token"] = given
		answer(w, 200, map[string]any{"auth": auth})
	case !known:
		refuse(403, "2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n")(w, r)
	case path == lookupPath:
		answer(w, 200, map[string]any{"data": map[string]any{"ttl": life, "renewable": renewable}})
	case path == "auth/token/renew-self":
		answer(w, 200, map[string]any{"auth": auth})
	default:
		refuse(404)(w, r)
	}
}

// direct carries requests to a handler without a socket, so that time can be simulated.
type direct struct{ h http.Handler }

func (d direct) RoundTrip(r *http.Request) (*http.Response, error) {
	rec := httptest.NewRecorder()
	if r.Body == nil {
		r.Body = http.NoBody
	}
	d.h.ServeHTTP(rec, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	resp := rec.Result()
	resp.Request = r
	return resp, nil
}

const testSecretID = "a-secret-id-that-nobody-may-see"

// appRole is a configuration that logs in by AppRole, at a loopback address where nobody is.
func appRole(t testing.TB) Config {
	t.Helper()
	return Config{Address: "http://127.0.0.1:1", Login: Login{
		Method: "approle", RoleID: "role", SecretIDFile: secretFile(t, "secret-id", testSecretID),
	}}
}

func secretFile(t testing.TB, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	write(t, path, content)
	return path
}

func write(t testing.TB, path, content string) {
	t.Helper()
	// As an agent replaces a file: at once.
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// connect is a client whose requests go straight to the handler.
func connect(t testing.TB, c Config, to http.Handler) *Client {
	t.Helper()
	cl := dial(t, c)
	cl.wire.pooled, cl.wire.fresh = direct{to}, direct{to}
	return cl
}

func dial(t testing.TB, c Config) *Client {
	t.Helper()
	if c.Logger == nil {
		c.Logger = slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	cl, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cl.Close)
	return cl
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// serve is a client of a handler behind a real socket.
func serve(t testing.TB, c Config, h http.Handler) *Client {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	c.Address = s.URL
	return dial(t, c)
}

func within(t *testing.T, limit time.Duration, f func()) {
	t.Helper()
	began := time.Now()
	f()
	if took := time.Since(began); took > limit {
		t.Errorf("it took %s, want at most %s", took, limit)
	}
}
