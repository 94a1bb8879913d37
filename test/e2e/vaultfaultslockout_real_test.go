//go:build real

package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/test/lab"
)

const (
	refusedLogins = `signet_vault_requests_total{op="login",result="denied"}`
	noSecretID    = "00000000-0000-0000-0000-000000000000"
)

// lockable has the estate's role log in where Vault locks it at the second refused login, not the fifth.
func lockable(t *testing.T, e *estate, life lab.VaultLife) (block string, secretID func() string) {
	t.Helper()
	mount, write := "lock-"+e.name, func(path string, body map[string]any) *lab.VaultAnswer {
		t.Helper()
		a, err := e.vault.Root().Write(t.Context(), path, body)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	if err := e.vault.EnableAuth(t.Context(), mount, "approle"); err != nil {
		t.Fatal(err)
	}
	write("sys/auth/"+mount+"/tune", map[string]any{"user_lockout_config": map[string]any{"lockout_threshold": "2"}})
	write("auth/"+mount+"/role/"+e.name, map[string]any{"role_id": e.name, "token_policies": life.Policies, "token_ttl": "1h"})
	return fmt.Sprintf("{ method: approle, mount: %s, role_id: %s, secret_id_file: ./secret }", mount, e.name), func() string {
		return write("auth/"+mount+"/role/"+e.name+"/secret-id", nil).String("secret_id")
	}
}

// notLocked is what `vault read sys/locked-users` has to say of a role.
func (e *estate) notLocked(t *testing.T) {
	t.Helper()
	a, err := e.vault.Root().Read(t.Context(), "sys/locked-users")
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := json.Marshal(a.Data); strings.Contains(string(text), `"`+e.name+`"`) {
		t.Errorf("Vault has locked %s: %s", e.name, text)
	}
}

func TestARefusedSecretID(t *testing.T) {
	t.Parallel()

	t.Run("is not shown until its role is locked", func(t *testing.T) {
		t.Parallel()
		var secretID func() string
		var shown string
		x, file := loggedIn(t, "login-locked", lab.VaultLife{}, func(e *estate, life lab.VaultLife) (block, secret string) {
			block, secretID = lockable(t, e, life)
			shown = secretID()
			return block, shown
		})
		x.how.keys = "vault-transit"
		x.configure(t)
		var seen purse
		seen.watch(x.proxy)
		x.serve(t)
		s := x.issuing(t)
		s.unharmed(t, "before")
		if _, err := x.of.vault.Root().Write(t.Context(), "auth/lock-"+x.of.name+"/role/"+x.of.name+"/secret-id/destroy", map[string]any{"secret_id": shown}); err != nil {
			t.Fatal(err)
		}
		x.of.revoke(t, seen.all())
		found := x.impaired(t, "the login is refused", func(f check.Finding) bool {
			return f.Code == check.CodeVault && strings.Contains(f.Message, "nothing can be issued") &&
				strings.Contains(f.Message, "the login is refused (400: invalid role or secret ID)")
		})
		if found.Level != check.Error || found.Mend != "vault list auth/lock-login-locked/role" {
			t.Errorf("it finds %+v", found)
		}
		for end := time.Now().Add(12 * time.Second); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
			now, err := x.health(t.Context())
			if err != nil || now.Ready {
				t.Fatalf("ready without a login: %+v, %v", now, err)
			}
			for _, f := range now.worse() {
				if f.Code == check.CodePolicy || strings.Contains(f.Message+f.Mend, "vault-policy") {
					t.Errorf("the policy is blamed: %+v", f)
				}
			}
			if up, until := x.metric(t, "signet_vault_up"), x.metric(t, "signet_vault_token_expiry_timestamp_seconds"); up != 0 || until != 0 {
				t.Fatalf("signet_vault_up %v, a token until %v", up, until)
			}
		}
		if n := x.metric(t, refusedLogins); n != 1 {
			t.Errorf("%v refused logins", n)
		}
		x.of.notLocked(t)
		began := time.Now()
		replace(t, file, secretID())
		x.mended(t)
		t.Logf("mended %s after there was a new secret-id", time.Since(began))
		s.since()
		s.unharmed(t, "after")
		log := readFile(t, x.of.path("east-server.log"))
		if in, out := strings.Count(log, `"logged in to Vault"`), strings.Count(log, `"no login to Vault, trying on"`); in != 2 || out < 1 || out > 3 { // on a busy machine also a call that took too long
			t.Errorf("the log has %d logins and %d lines that there is none", in, out)
		}
	})

	t.Run("at the start is waited for", func(t *testing.T) {
		t.Parallel()
		var secretID func() string
		x, file := loggedIn(t, "login-wrong", lab.VaultLife{}, func(e *estate, life lab.VaultLife) (block, secret string) {
			block, secretID = lockable(t, e, life)
			return block, secretID()
		})
		replace(t, file, noSecretID)
		x.begin(t)
		x.impaired(t, "the login is refused", func(f check.Finding) bool { return strings.Contains(f.Message, "the login is refused") })
		time.Sleep(8 * time.Second)
		if n := x.metric(t, refusedLogins); n != 1 {
			t.Errorf("%v refused logins", n)
		}
		replace(t, file, secretID())
		x.ready(t)
		x.mended(t)
		x.of.notLocked(t)
	})

	t.Run("keeps a server from beginning, not from living", func(t *testing.T) {
		t.Parallel()
		w := newVaulted(t, "login-begin")
		w.policy(t, w.printed(t))
		if r := w.begin(t); r.code != 0 {
			t.Fatal(r)
		}
		secret, file := readFile(t, w.path("east/secret-id")), w.path("east/secret-id")
		replace(t, file, noSecretID)
		x := &holding{Cluster: w.east, of: &estate{world: &world{Lab: w.Lab}, vault: w.vault, name: w.name}}
		x.begin(t)
		x.impaired(t, "the key of the control CA can't be had", func(f check.Finding) bool { return strings.Contains(f.Message, "the login is refused") })
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			if err := x.lives(t.Context()); err != nil {
				t.Fatalf("between two tries to begin, or in one: %v", err)
			}
		}
		replace(t, file, strings.TrimSpace(secret))
		x.ready(t)
		x.mended(t)
		x.of.notLocked(t)
		if n := x.metric(t, refusedLogins); n != 1 {
			t.Errorf("%v refused logins", n)
		}
	})

	t.Run("is no better than one whose tokens are for some uses", func(t *testing.T) {
		t.Parallel()
		x, _ := loggedIn(t, "login-uses", lab.VaultLife{}, func(e *estate, life lab.VaultLife) (block, secret string) {
			block, secretID := lockable(t, e, life)
			return block, secretID()
		})
		role := "auth/lock-login-uses/role/login-uses"
		limit := func(uses int) {
			t.Helper()
			if _, err := x.of.vault.Root().Write(t.Context(), role, map[string]any{"token_num_uses": uses}); err != nil {
				t.Fatal(err)
			}
		}
		limit(5)
		x.how.keys = "vault-transit"
		x.configure(t)
		x.begin(t)
		found := x.impaired(t, "tokens are for 5 uses", func(f check.Finding) bool {
			return f.Code == check.CodeVault && strings.Contains(f.Message, "set token_num_uses=0 at the role")
		})
		if found.Mend != "vault list auth/lock-login-uses/role" {
			t.Errorf("it finds %+v", found)
		}
		limit(0)
		until(t, "the server is ready", 4*time.Minute, func() error {
			s, err := x.health(t.Context())
			if err == nil && !s.Ready {
				err = fmt.Errorf("%+v", s.Findings)
			}
			return err
		})
		x.mended(t)
	})
}
