package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/server"
	"github.com/signet-ca/signet/test/bubble"
	"github.com/signet-ca/signet/vault"
)

// fakeVault answers what a connection asks about itself. What a real one does is tested in test/e2e.
type fakeVault struct {
	*httptest.Server
	mu sync.Mutex
	// status of every answer; 0 = 200.
	status int
	// token is what lookup-self says of it; denied are paths that it may not use.
	token  map[string]any
	denied map[string]bool
	// asked counts the calls.
	asked int
}

func newFakeVault(t *testing.T) *fakeVault {
	v := &fakeVault{token: map[string]any{"ttl": 3600, "renewable": true}, denied: map[string]bool{}}
	v.Server = httptest.NewServer(v)
	t.Cleanup(v.Close)
	return v
}

func (v *fakeVault) set(change func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	change()
}

func (v *fakeVault) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.asked++
	if v.status != 0 {
		w.WriteHeader(v.status)
		fmt.Fprint(w, `{"errors":["permission denied"]}`)
		return
	}
	data := map[string]any{}
	switch r.URL.Path {
	case "/v1/auth/token/lookup-self":
		data = v.token
	case "/v1/sys/capabilities-self":
		var asked struct{ Paths []string }
		_ = json.NewDecoder(r.Body).Decode(&asked)
		for _, p := range asked.Paths {
			if data[p] = []string{"create", "read", "update", "list"}; v.denied[p] {
				data[p] = []string{"deny"}
			}
		}
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"data": data})
}

// vaultYAML has everything in Vault.
func (h here) vaultYAML(address string) string {
	h.write("token", "hvs.secret\n")
	h.write("pass", "correct horse battery staple\n")
	return h.write("east.yaml", fmt.Sprintf(`trust_domain: example.org
cluster: east
keystore: { passphrase_file: ./pass, control_ca: vault-transit, intermediates: memory }
vault: { address: %q, login: { method: token, token_file: ./token } }
upstream: { vault_pki: { mount: pki } }
trust: { vault_kv: { mount: secret } }
`, address))
}

func (h here) backing(address string, log io.Writer) *backing {
	h.t.Helper()
	cfg, err := config.LoadServer(h.vaultYAML(address))
	if err != nil {
		h.t.Fatal(err)
	}
	b, err := openBacking(h.t.Context(), cfg, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(b.Close)
	return b
}

func TestThePolicyIsMadeOfTheConfiguration(t *testing.T) {
	h := shortFolder(t)
	file := h.vaultYAML("https://vault.example.org:8200")
	out, errs := h.must(exitYes, "config", "vault-policy", "--config", file)
	if errs != "" {
		t.Errorf("it says %q", errs)
	}
	contains(t, out, "# What the server of cluster east of example.org asks of Vault.",
		`path "auth/token/renew-self"`, `path "sys/capabilities-self"`, `path "pki/issuer/+/sign-intermediate"`, "path \"pki/issuer/+\" {\n  capabilities = [\"read\"]",
		`path "transit/keys/signet-east_example.org_control-ca"`, `"type" = ["ecdsa-p256"]`, `path "transit/sign/signet-east_example.org_control-ca/sha2-256"`, `path "secret/data/signet/example.org/trust"`, `path "secret/data/signet/example.org/reports/east"`)
	if strings.Contains(out, "*") || strings.Contains(out, "_intermediate") || strings.Contains(out, "/config") {
		t.Errorf("it allows more than this configuration needs:\n%s", out)
	}
	again, _ := h.must(exitYes, "config", "vault-policy", "--config", file)
	if again != out {
		t.Error("it is another one the second time")
	}
	// Who moves away from Transit leaves the mount in the file: older keys sign on, and are destroyed one day.
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	moved := strings.Replace(string(text), "intermediates: memory", "intermediates: memory, transit: { mount: transit }", 1)
	out, _ = h.must(exitYes, "config", "vault-policy", "--config", h.write("moved.yaml", moved))
	contains(t, out, `path "transit/keys/signet-east_example.org_intermediate" {
  capabilities = ["read"]`, `path "transit/keys/signet-east_example.org_intermediate/trim"`, `path "transit/sign/signet-east_example.org_intermediate/*"`)
	if strings.Contains(out, "rotate") {
		t.Errorf("older keys get no new versions:\n%s", out)
	}
	out, _ = h.must(exitYes, "config", "vault-policy", "--config", h.write("west.yaml", strings.Replace(string(text), "intermediates: memory", "intermediates: vault-transit", 1)))
	contains(t, out, `path "transit/keys/signet-east_example.org_intermediate/rotate"`, `"min_decryption_version" = []`)

	plain := h.write("plain.yaml", rightConfig)
	_, errs = h.must(exitCouldNotSay, "config", "vault-policy", "--config", plain)
	contains(t, errs, plain+" uses no Vault")
}

func TestAPolicyForTheKeysAndTheIssuerInUseIsEnough(t *testing.T) {
	v := newFakeVault(t)
	b := shortFolder(t).backing(v.URL, io.Discard)
	// What the printed policy allows beside what this server calls.
	for _, path := range []string{
		"pki/issuer/+/sign-intermediate", "pki/issuer/+",
		"transit/keys/signet-east_example.org_intermediate", "transit/sign/signet-east_example.org_intermediate/sha2-256",
	} {
		v.set(func() { v.denied[path] = true })
	}
	if err := b.ask(t.Context()); err != nil || b.lacks() {
		t.Errorf("%v, lacks %+v", err, b.missing)
	}
	const used = "transit/sign/signet-east_example.org_control-ca/sha2-256"
	v.set(func() { v.denied[used] = true })
	if err := b.ask(t.Context()); err != nil || !b.lacks() {
		t.Errorf("%v, and %s is not missed", err, used)
	}
}

func TestWhatTheTokenLacksIsSaidOnceAndFound(t *testing.T) {
	v, log := newFakeVault(t), &bytes.Buffer{}
	const path, asked = "pki/issuer/+/sign-intermediate", "pki/issuer/default/sign-intermediate"
	v.set(func() { v.denied[asked] = true })
	b := shortFolder(t).backing(v.URL, log)
	for range 2 {
		if err := b.ask(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(log.String(), "lacks a capability"); n != 1 || !strings.Contains(log.String(), path) {
		t.Errorf("said %d times:\n%s", n, log)
	}
	found := b.look().Findings(check.Duties{}, time.Now())
	if len(found) != 1 || found[0].Code != check.CodePolicy || found[0].About != path {
		t.Errorf("%+v", found)
	}
	v.set(func() { v.denied[asked] = false })
	if err := b.ask(t.Context()); err != nil || b.look().Findings(check.Duties{}, time.Now()).Worst() != check.OK {
		t.Errorf("mended: %v, %+v", err, b.look())
	}
	contains(t, log.String(), "may do all that will be asked")
	if strings.Contains(log.String(), "hvs.secret") {
		t.Error("the token is in the log")
	}
}

func TestARefusedLoginImpairsAsMuchAsAVaultThatIsAway(t *testing.T) {
	v := newFakeVault(t)
	v.set(func() { v.status = http.StatusForbidden })
	b := shortFolder(t).backing(v.URL, io.Discard)
	if b.ask(t.Context()) == nil {
		t.Fatal("it has answered")
	}
	first := b.look()
	if !first.Away || !first.Refused || first.Why == "" || first.Since.IsZero() || b.look().Since != first.Since {
		t.Errorf("%+v, then %+v", first, b.look())
	}
	found := first.Findings(check.Duties{Upstream: true, Due: time.Now(), Until: time.Now().Add(time.Hour)}, time.Now())
	if len(found) != 1 || found[0].Code != check.CodeVault || found[0].Mend != "vault token create" || !found.Ready() {
		t.Errorf("%+v", found)
	}

	v.set(func() { v.status = http.StatusServiceUnavailable })
	b = shortFolder(t).backing(v.URL, io.Discard)
	_ = b.ask(t.Context())
	if got := b.look(); !got.Away || got.Refused {
		t.Errorf("%+v", got)
	}
}

func TestATokenThatEndsForGoodIsSaidInTime(t *testing.T) {
	// of is a token of an hour with that left of it.
	of := func(left time.Duration, with map[string]any) map[string]any {
		end := time.Now().Add(left)
		token := map[string]any{
			"path": "auth/token/create", "creation_time": end.Add(-time.Hour).Unix(), "creation_ttl": 3600, "expire_time": end.Format(time.RFC3339Nano),
			"ttl": int(left.Seconds()), "renewable": false,
		}
		maps.Copy(token, with)
		return token
	}
	for what, c := range map[string]struct {
		token map[string]any
		ends  bool
		level check.Level
	}{
		"renewable":              {of(time.Hour, map[string]any{"renewable": true}), false, check.OK},
		"for good":               {of(time.Hour, nil), true, check.OK},
		"after half of its life": {of(30*time.Minute, nil), true, check.OK},
		// Whoever looks for the first time, after a restart too, sees how old it is.
		"in its last third":  {of(15*time.Minute, nil), true, check.Warning},
		"in its last tenth":  {of(5*time.Minute, nil), true, check.Error},
		"of a greatest life": {of(5*time.Minute, map[string]any{"renewable": true, "explicit_max_ttl": 3600}), true, check.Error},
		"without end":        {map[string]any{"ttl": 0, "renewable": false}, false, check.OK},
	} {
		v := newFakeVault(t)
		v.set(func() { v.token = c.token })
		b := shortFolder(t).backing(v.URL, io.Discard)
		if err := b.ask(t.Context()); err != nil {
			t.Fatal(err)
		}
		got := b.look().Token
		if got.Ends.IsZero() == c.ends || c.ends && (!strings.HasSuffix(got.File, "/token") || !got.Begins.Before(got.Ends) || b.look().Token != got) {
			t.Errorf("%s: %+v, then %+v", what, got, b.look().Token)
		}
		if found := b.look().Findings(check.Duties{}, time.Now()); found.Worst() != c.level || (c.level != check.OK) != slices.ContainsFunc(found, func(f check.Finding) bool { return f.Code == check.CodeToken }) {
			t.Errorf("%s: %+v", what, found)
		}
	}
}

// What is lacking is said in a sentence that ends in what it is needed to do: a verb comes first.
func TestWhatAPolicyIsNeededForIsSomethingToDo(t *testing.T) {
	h := shortFolder(t)
	text, err := os.ReadFile(h.vaultYAML("https://vault.example.org:8200"))
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Replace(string(text), "intermediates: memory", "intermediates: vault-transit", 1) +
		"rotation: { peers: [{ cluster: west, log_verifier_key: \"example.org/west/west-1+68b877ca+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop\" }] }\n"
	cfg, err := config.LoadServer(h.write("all.yaml", all))
	if err != nil {
		t.Fatal(err)
	}
	needs, err := needsOf(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	verbs := []string{"destroy", "have", "keep", "learn", "look", "make", "read", "sign", "tell"}
	for _, n := range needs {
		if first, _, _ := strings.Cut(n.Why, " "); !slices.Contains(verbs, first) {
			t.Errorf("%s is needed to %s", n.Path, n.Why)
		}
	}
	if len(needs) < 15 {
		t.Errorf("only %d needs: %+v", len(needs), needs)
	}
}

func TestWithoutVaultNothingOfItIsThere(t *testing.T) {
	h := shortFolder(t)
	cfg, err := config.LoadServer(h.write("plain.yaml", rightConfig))
	if err != nil {
		t.Fatal(err)
	}
	b, err := openBacking(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	var full server.Config
	full.Metrics = prometheus.NewRegistry()
	b.supply(&full, cfg)
	if b.vault != nil || full.Upstream != nil || full.Exchange != nil || full.Vault != nil {
		t.Errorf("there is one: %+v", full)
	}
	b.run(t.Context()) // ends at once
	if _, err := b.keys.Open(t.Context(), keystore.Ref{Backend: "vault-transit", Name: "intermediate", Version: 1}); err == nil || !strings.Contains(err.Error(), "put its block back") {
		t.Errorf("a key in Vault: %v", err)
	}
}

func TestAServerWaitsForTheKeysThatItBeginsWith(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		b := &backing{log: slog.New(slog.NewTextHandler(&log, nil)), metrics: prometheus.NewRegistry()}
		cfg := &config.Server{Listen: config.Listen{HTTP: "127.0.0.1:-1"}} // nothing of the network in this bubble
		begun, tries := time.Now(), 0
		s, err := b.begin(t.Context(), cfg, func(func()) (*server.Server, error) {
			if tries++; tries < 8 {
				return nil, fmt.Errorf("open the control CA: %w", keystore.ErrAway)
			}
			return &server.Server{}, nil
		})
		if err != nil || s == nil || tries != 8 {
			t.Fatalf("after %d tries: %v", tries, err)
		}
		if took := time.Since(begun); took < 10*time.Second || took > 2*time.Minute {
			t.Errorf("8 tries in %s", took)
		}
		if n := strings.Count(log.String(), "waits and tries again"); n != 1 {
			t.Errorf("said %d times:\n%s", n, log.String())
		}
		// Each start of a process would be one more login that is refused, until Vault locks the role.
		tries = 0
		if s, err := b.begin(t.Context(), cfg, func(func()) (*server.Server, error) {
			if tries++; tries < 8 {
				return nil, fmt.Errorf("open the control CA: %w", vault.ErrLogin)
			}
			return &server.Server{}, nil
		}); err != nil || s == nil || tries != 8 {
			t.Fatalf("after %d tries with a login that is refused: %v", tries, err)
		}
		// Whatever else keeps it from beginning will not pass by itself.
		other := errors.New("wrong passphrase")
		if _, err := b.begin(t.Context(), cfg, func(func()) (*server.Server, error) { return nil, other }); !errors.Is(err, other) {
			t.Errorf("got %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		begun = time.Now()
		if _, err := b.begin(ctx, cfg, func(func()) (*server.Server, error) { return nil, keystore.ErrAway }); err == nil || time.Since(begun) != 3*time.Second {
			t.Errorf("told to stop: %v after %s", err, time.Since(begun))
		}
	})
}

func TestAServerThatWaitsIsAliveAndNotReady(t *testing.T) {
	address := freeAddress(t)
	b := &backing{log: slog.New(slog.DiscardHandler), metrics: prometheus.NewRegistry()}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	answers := func(when, reason string) {
		t.Helper()
		for path, want := range map[string]int{"/livez": http.StatusOK, "/readyz": http.StatusServiceUnavailable, "/metrics": http.StatusOK} {
			answer, err := client.Get("http://" + address + path)
			if err != nil {
				t.Fatalf("%s: %v", when, err)
			}
			text, _ := io.ReadAll(answer.Body)
			answer.Body.Close()
			if answer.StatusCode != want || path == "/readyz" && !strings.Contains(string(text), "SGN1026: "+reason) {
				t.Errorf("%s: %s answers %d %s", when, path, answer.StatusCode, text)
			}
		}
	}
	isFree := func() {
		t.Helper()
		if again, err := freePort(address); err != nil || again != address {
			t.Errorf("the door is still taken: %v", err)
		}
	}
	tries := 0
	_, err := b.begin(t.Context(), &config.Server{Listen: config.Listen{HTTP: address}}, func(opening func()) (*server.Server, error) {
		switch tries++; tries {
		case 1:
			return nil, fmt.Errorf("Vault is sealed: %w", keystore.ErrAway)
		case 2: // which takes as long as Vault hangs
			answers("in a second try", "Vault is sealed")
			opening()
			isFree()
			return nil, fmt.Errorf("Vault hangs: %w", keystore.ErrAway) // after its own doors were open
		}
		answers("in a third try", "Vault hangs")
		return &server.Server{}, nil
	})
	if err != nil || tries != 3 {
		t.Errorf("after %d tries: %v", tries, err)
	}
	isFree()
}
