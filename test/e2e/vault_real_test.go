//go:build real

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/test/lab"
)

// vaulted is a cluster that has in Vault all that it can: it needs every line of a policy.
type vaulted struct {
	*lab.Lab
	vault *lab.Vault
	east  *lab.Cluster
	// name is of its engines' mounts, its role and its policy.
	name string
}

// newVaulted makes a root in Vault and the configuration of a cluster under it. That has no policy yet.
func newVaulted(t *testing.T, name string) *vaulted {
	t.Helper()
	v, err := theVault.Get()
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	l, err := lab.New(filepath.Join(scratch, name), signet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	for _, engine := range []string{"pki", "transit", "kv"} {
		if err := v.Mount(ctx, engine+"-"+name, engine); err != nil {
			t.Fatal(err)
		}
	}
	root, err := v.PKIRoot(ctx, "pki-"+name, "root-1", lab.TrustDomain, 1000*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	w := &vaulted{Lab: l, vault: v, name: name}
	l.RootFingerprint = ca.CertificateFingerprint(root.Certificate.Raw)
	if w.east, err = l.NewCluster("east", ""); err != nil {
		t.Fatal(err)
	}
	w.east.Keystore = fmt.Sprintf("  control_ca: vault-transit\n  intermediates: vault-transit\n  transit: { mount: transit-%s }\n", name)
	west := "example.org/west/west-1+68b877ca+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop"
	if err := w.east.Configure(fmt.Sprintf(`vault:
  address: %s
  ca_file: %s
  login: { method: approle, role_id: %[3]s, secret_id_file: ./secret-id }
upstream: { vault_pki: { mount: pki-%[3]s, issuer: root-1 } }
trust: { vault_kv: { mount: kv-%[3]s } }
leaf: { ttl: 1h, max_ttl: 1h }
logging: { level: debug }
rotation:
  skew: 1s
  report_life: 4s
  peers: [ { cluster: west, log_verifier_key: %q } ]
`, v.Address, v.CAFile, name, west)); err != nil {
		t.Fatal(err)
	}
	if err := v.EnableAuth(ctx, "approle", "approle"); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Root().Write(ctx, "auth/approle/role/"+name, map[string]any{
		"role_id": name, "token_policies": []string{name}, "token_no_default_policy": true, "token_ttl": "1h",
	}); err != nil {
		t.Fatal(err)
	}
	secret, err := v.SecretID(ctx, name, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Write("east/secret-id", secret+"\n"); err != nil {
		t.Fatal(err)
	}
	return w
}

// printed is the policy that the configuration needs.
func (w *vaulted) printed(t *testing.T) string {
	t.Helper()
	out, err := w.Run(t.Context(), "config", "vault-policy", "--config", w.east.Config())
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (w *vaulted) policy(t *testing.T, hcl string) {
	t.Helper()
	if err := w.vault.Policy(t.Context(), w.name, hcl); err != nil {
		t.Fatal(err)
	}
}

var ruleInPolicy = regexp.MustCompile(`(?s)path "([^"]+)" \{\n.*?\n\}\n`)

// without leaves a path out of a policy.
func without(hcl, path string) string {
	return ruleInPolicy.ReplaceAllStringFunc(hcl, func(rule string) string {
		if ruleInPolicy.FindStringSubmatch(rule)[1] == path {
			return ""
		}
		return rule
	})
}

func (w *vaulted) begin(t *testing.T) ran {
	t.Helper()
	return execute(t, w.Dir, nil, "cluster", "init", "--config", w.east.Config(), "--root-fingerprint", w.RootFingerprint)
}

// finds waits until the running server finds something about itself.
func (w *vaulted) finds(t *testing.T, what string, is func(check.Finding) bool) {
	t.Helper()
	var last []check.Finding
	err := lab.Until(t.Context(), what, 3*time.Minute, func() error {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+w.east.HTTP+"/readyz", nil)
		if err != nil {
			return err
		}
		request.Header.Set("Accept", "application/json")
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		var said struct{ Findings []check.Finding }
		if err := json.NewDecoder(answer.Body).Decode(&said); err != nil {
			return err
		}
		last = said.Findings
		for _, f := range said.Findings {
			if is(f) {
				return nil
			}
		}
		return errors.New("not found")
	})
	if err != nil {
		t.Errorf("%v in %+v", err, last)
	}
}

func says(code string, words ...string) func(check.Finding) bool {
	return func(f check.Finding) bool {
		for _, word := range words {
			if !strings.Contains(f.About+" "+f.Message+" "+f.Mend, word) {
				return false
			}
		}
		return f.Code == code
	}
}

// TestTheSmallestPolicyIsEnoughForAllThatAServerDoes logs in with what signet config vault-policy prints, and nothing else.
func TestTheSmallestPolicyIsEnoughForAllThatAServerDoes(t *testing.T) {
	w := newVaulted(t, "enough")
	// A dry run makes nothing, here or there, and asks Vault whether it would.
	dry := []string{"cluster", "init", "--config", w.east.Config(), "--root-fingerprint", w.RootFingerprint, "--dry-run"}
	const controlKey = "transit-enough/keys/signet-east_example.org_control-ca"
	readOnly := strings.NewReplacer(`["update"]`, `["read"]`, `["read", "update"]`, `["read"]`)
	w.policy(t, ruleInPolicy.ReplaceAllStringFunc(w.printed(t), func(rule string) string {
		if ruleInPolicy.FindStringSubmatch(rule)[1] == controlKey {
			return readOnly.Replace(rule)
		}
		return rule
	}))
	changesNothing(t, w.Dir, func() ran {
		r := execute(t, w.Dir, nil, dry...)
		r.refused(t, 2, `the capability "update" on the path `+controlKey)
		return r
	})
	w.policy(t, w.printed(t))
	changesNothing(t, w.Dir, func() ran {
		r := execute(t, w.Dir, nil, dry...)
		if r.code != 0 || !strings.Contains(r.out, "control CA made with a new key, vault-transit:control-ca@1") || !strings.Contains(r.out, "root "+w.RootFingerprint+" trusted") {
			t.Error(r)
		}
		return r
	})
	if _, err := w.vault.Root().Read(t.Context(), controlKey); lab.VaultStatus(err) != http.StatusNotFound {
		t.Errorf("a dry run made the key in Vault: %v", err)
	}
	if r := w.begin(t); r.code != 0 {
		t.Fatal(r)
	}
	if _, err := w.east.Serve(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := w.east.Member(t.Context(), "node-1"); err != nil {
		t.Fatalf("an agent, certified by a key in Transit: %v", err)
	}
	// The next rotation: a version more in Transit, signed by PKI.
	if r := execute(t, w.Dir, nil, "rotation", "start", "--config", w.east.Config(), "intermediate"); r.code != 0 || strings.Contains(r.out+r.err, "root sign") || strings.Contains(r.out, "BEGIN") {
		t.Fatal("nobody has to carry anything", r)
	}
	if err := lab.Until(t.Context(), "the next intermediate", 3*time.Minute, func() error {
		var all []struct{ ID, State, Key string }
		if err := w.JSON(t.Context(), &all, "ca", "list", "--config", w.east.Config()); err != nil {
			return err
		}
		for _, a := range all {
			if a.ID == "intermediate-2" && a.State == "active" && a.Key == "vault-transit:intermediate@2" {
				return nil
			}
		}
		return fmt.Errorf("%+v", all)
	}); err != nil {
		t.Fatal(err)
	}
	for _, document := range []string{"trust", "reports/east"} {
		if err := lab.Until(t.Context(), document+" in KV", time.Minute, func() error {
			_, err := w.vault.Root().Read(t.Context(), "kv-"+w.name+"/data/signet/example.org/"+document)
			return err
		}); err != nil {
			t.Error(err)
		}
	}
	w.finds(t, "that the token may do all", says(check.CodeVault, "its token may do all that will be asked"))
	// It is enough, and no more than that.
	token, err := w.vault.MakeToken(t.Context(), lab.VaultLife{Policies: []string{w.name}})
	if err != nil {
		t.Fatal(err)
	}
	const prefix = "transit-enough/keys/signet-east_example.org_"
	for path, body := range map[string]map[string]any{
		prefix + "zzz":                 {"type": "ecdsa-p256"},
		prefix + "intermediate":        {"type": "ecdsa-p256", "exportable": true},
		prefix + "control-ca":          {"type": "ecdsa-p256", "allow_plaintext_backup": true},
		prefix + "control-ca/rotate":   {},
		prefix + "intermediate/config": {"exportable": true, "allow_plaintext_backup": true, "deletion_allowed": true},
	} {
		if _, err := w.vault.As(token).Write(t.Context(), path, body); lab.VaultStatus(err) != http.StatusForbidden {
			t.Errorf("%s with %v: %v", path, body, err)
		}
	}
	// Somebody who looks from outside hears the server, and needs no login of his own.
	before, err := w.vault.Root().List(t.Context(), "auth/token/accessors")
	if err != nil {
		t.Fatal(err)
	}
	if r := execute(t, w.Dir, nil, "check", "--config", w.east.Config()); !strings.Contains(r.out, "its token may do all that will be asked") || !strings.Contains(r.out, "vault-transit:intermediate@2, which is left to the server") {
		t.Error(r)
	}
	after, err := w.vault.Root().List(t.Context(), "auth/token/accessors")
	if more := slices.DeleteFunc(after, func(token string) bool { return slices.Contains(before, token) }); err != nil || len(more) > 0 {
		t.Errorf("a check has logged in %d times: %v", len(more), err)
	}
	metrics, err := http.Get("http://" + w.east.HTTP + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer metrics.Body.Close()
	shown, err := io.ReadAll(metrics.Body)
	if err != nil || !strings.Contains(string(shown), "\nsignet_vault_up 1\n") || !strings.Contains(string(shown), `signet_keystore_transit_signatures_total{result="ok"}`) {
		t.Errorf("the metrics lack Vault: %v\n%s", err, shown)
	}
	text, err := os.ReadFile(w.path("east-server.log"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "permission denied") || strings.Contains(string(text), "lacks a capability") {
		t.Errorf("something was denied:\n%s", text)
	}
	secret, err := os.ReadFile(w.path("east/secret-id"))
	if err != nil {
		t.Fatal(err)
	}
	for what, secret := range map[string]string{"the secret-id": strings.TrimSpace(string(secret)), "a token": "hvs."} {
		if strings.Contains(string(text), secret) {
			t.Errorf("%s is in the log", what)
		}
	}
}

// TestAServerThatStartsWhileItsVaultIsSealedWaits for the key of its control CA, alive and not ready, and then begins by itself.
func TestAServerThatStartsWhileItsVaultIsSealedWaits(t *testing.T) {
	w := newVaulted(t, "sealed")
	w.policy(t, w.printed(t))
	if r := w.begin(t); r.code != 0 {
		t.Fatal(r)
	}
	if err := w.vault.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	unseal := func() {
		if err := w.vault.Unseal(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	sealed := true
	defer func() {
		if sealed {
			unseal()
		}
	}()
	r := execute(t, w.Dir, nil, "check", "--config", w.east.Config())
	for _, word := range []string{"SGN1026", "vault-control", "Vault is sealed", "no agent can enrol", "vault status"} {
		if !strings.Contains(r.out, word) {
			t.Errorf("check does not say %q: %s", word, r)
		}
	}
	p, err := w.Start("east-server", "serve", "--config", w.east.Config())
	if err != nil {
		t.Fatal(err)
	}
	w.finds(t, "what it waits for", func(f check.Finding) bool {
		return says(check.CodeVault, "control-ca", "Vault is sealed")(f) && f.Blocks()
	})
	// Between two tries nobody is at the door for a moment.
	if err := lab.Until(t.Context(), "it lives", 20*time.Second, func() error {
		answer, err := http.Get("http://" + w.east.HTTP + "/livez")
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			return errors.New(answer.Status)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	unseal()
	sealed = false
	if err := lab.Until(t.Context(), "ready", 2*time.Minute, func() error {
		select {
		case <-p.Done():
			return errors.New("it has ended")
		default:
			return lab.Ready(t.Context(), "east", w.east.HTTP)
		}
	}); err != nil {
		t.Error(err)
	}
	// A node that comes while the key is away hears that it is to come again, and is let in then.
	node, err := w.east.NewAgent(t.Context(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.vault.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	sealed = true
	if _, err := w.Start("east-node-1", "agent", "--config", node.Config()); err != nil {
		t.Fatal(err)
	}
	if err := lab.Until(t.Context(), "an enrolment that waits", 2*time.Minute, func() error {
		text, err := os.ReadFile(w.path("east-node-1.log"))
		if err == nil && !strings.Contains(string(text), "Unavailable") {
			err = fmt.Errorf("the agent says only %s", text)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	unseal()
	sealed = false
	if err := lab.Until(t.Context(), "the node enrolled", 2*time.Minute, func() error {
		return lab.Ready(t.Context(), "node-1", node.HTTP)
	}); err != nil {
		t.Error(err)
	}
	text, err := os.ReadFile(w.path("east-server.log"))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), "waits and tries again"); n != 1 {
		t.Errorf("it says %d times that it waits:\n%s", n, text)
	}
}

func (w *vaulted) path(name string) string { return filepath.Join(w.Dir, name) }

// TestEachLineOfThePolicyIsMissed leaves each out once. What is missing is said before it is needed, and again where it is.
func TestEachLineOfThePolicyIsMissed(t *testing.T) {
	w := newVaulted(t, "missed")
	whole := w.printed(t)
	rules := ruleInPolicy.FindAllStringSubmatch(whole, -1)
	if len(rules) < 8 {
		t.Fatalf("%d rules in\n%s", len(rules), whole)
	}
	w.policy(t, whole)
	if r := w.begin(t); r.code != 0 {
		t.Fatal(r)
	}
	t.Run("before it is needed", func(t *testing.T) {
		for _, rule := range rules {
			path := rule[1]
			w.policy(t, without(whole, path))
			r := execute(t, w.Dir, nil, "check", "--config", w.east.Config(), "-o", "json")
			var found struct{ Findings []check.Finding }
			if err := json.Unmarshal([]byte(r.out), &found); err != nil {
				t.Fatal(err, r)
			}
			is := says(check.CodePolicy, "lacks", path, "signet config vault-policy --config "+w.east.Config())
			if path == "sys/capabilities-self" {
				is = says(check.CodePolicy, "could not be asked", path, "permission denied", "signet config vault-policy")
			}
			n, others := 0, 0
			for _, f := range found.Findings {
				if is(f) {
					n++
				} else if f.Code == check.CodePolicy {
					others++
				}
			}
			if n != 1 || others != 0 || r.code == 0 {
				t.Errorf("without %s: %d findings of it, %d of others\n%s", path, n, others, r)
			}
		}
	})
	t.Run("where it is needed", func(t *testing.T) {
		transit := 0
		for _, rule := range rules {
			path := rule[1]
			// The first intermediate is made by a server.
			if !strings.HasPrefix(path, "transit-") || strings.Contains(path, "_intermediate") {
				continue
			}
			transit++
			w.policy(t, without(whole, path))
			if err := os.RemoveAll(w.path("east/state")); err != nil {
				t.Fatal(err)
			}
			if r := w.begin(t); r.code == 0 || !strings.Contains(r.err, strings.TrimSuffix(path, "*")) || !strings.Contains(r.err, "permission denied") {
				t.Errorf("without %s: %s", path, r)
			}
		}
		if transit != 2 {
			t.Errorf("%d rules are about the key of the control CA, and its signatures", transit)
		}
		// From here on with a server that runs.
		w.policy(t, whole)
		if err := os.RemoveAll(w.path("east/state")); err != nil {
			t.Fatal(err)
		}
		if r := w.begin(t); r.code != 0 {
			t.Fatal(r)
		}
		if _, err := w.vault.Root().Write(t.Context(), "auth/approle/role/missed", map[string]any{"token_ttl": "4s"}); err != nil {
			t.Fatal(err)
		}
		const pki = "pki-missed/issuer/+/sign-intermediate"
		w.policy(t, without(whole, pki))
		if _, err := w.Start("east-server", "serve", "--config", w.east.Config()); err != nil {
			t.Fatal(err)
		}
		w.finds(t, pki, says(check.CodeUpstream, "sign-intermediate", "permission denied"))
		w.finds(t, pki+", said at the start", says(check.CodePolicy, "lacks update on "+pki))
		w.policy(t, whole)
		// What was refused for long is asked again after up to 90 s.
		if err := lab.Until(t.Context(), "east, with all it needs", 3*time.Minute, func() error {
			return lab.Ready(t.Context(), "east", w.east.HTTP)
		}); err != nil {
			t.Error(err)
		}
		w.finds(t, "that it is mended", says(check.CodeVault, "its token may do all that will be asked"))
		// The signature last, for a version that is there is not made. What versions are destroyed with is missed in vault/transit's
		// tests: it takes a leaf's life until one is.
		const intermediate = "signet-east_example.org_intermediate"
		for _, path := range []string{"keys/" + intermediate, "keys/" + intermediate + "/rotate", "sign/" + intermediate + "/sha2-256"} {
			path = "transit-missed/" + path
			w.policy(t, without(whole, path))
			if r := execute(t, w.Dir, nil, "rotation", "start", "--config", w.east.Config(), "intermediate"); r.code == 0 || !strings.Contains(r.err, path) || !strings.Contains(r.err, "permission denied") {
				t.Errorf("without %s: %s", path, r)
			}
		}
		w.policy(t, without(whole, "auth/token/renew-self"))
		if err := lab.Until(t.Context(), "the renewal that is denied", 3*time.Minute, func() error {
			text, err := os.ReadFile(w.path("east-server.log"))
			if err == nil && !strings.Contains(string(text), "Vault denies the renewal of our token: it is revoked, or its policy lacks auth/token/renew-self") {
				err = errors.New("nothing is said")
			}
			return err
		}); err != nil {
			t.Error(err)
		}
		for _, document := range []string{"trust", "reports/east", "reports/west"} {
			path := "kv-missed/data/signet/example.org/" + document
			w.policy(t, without(whole, path))
			w.finds(t, path, says(check.CodeShared, path, "permission denied"))
		}
	})
}
