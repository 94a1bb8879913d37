//go:build real

package vault

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/test/lab"
)

// lockableRole enables AppRole at a mount of its own, where a role is locked after so few refused logins, and makes a role there.
func lockableRole(t *testing.T, v *lab.Vault, name string, threshold int) (l Login, secretID func() string) {
	t.Helper()
	mount := "lock-" + name
	if err := v.EnableAuth(t.Context(), mount, "approle"); err != nil {
		t.Fatal(err)
	}
	write := func(path string, body map[string]any) *lab.VaultAnswer {
		t.Helper()
		a, err := v.Root().Write(t.Context(), path, body)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	write("sys/auth/"+mount+"/tune", map[string]any{"user_lockout_config": map[string]any{
		"lockout_threshold": fmt.Sprint(threshold), "lockout_duration": "15m", "lockout_counter_reset_duration": "15m",
	}})
	write("auth/"+mount+"/role/"+name, map[string]any{"role_id": name, "token_policies": []string{name}, "token_ttl": "1h"})
	secretID = func() string { return write("auth/"+mount+"/role/"+name+"/secret-id", nil).String("secret_id") }
	return Login{Method: "approle", Mount: mount, RoleID: name, SecretIDFile: secretFile(t, "secret-id", secretID())}, secretID
}

// lockedUsers is what `vault read sys/locked-users` says of a role; "" if it is not locked.
func lockedUsers(t *testing.T, v *lab.Vault, role string) (accessor string) {
	t.Helper()
	a, err := v.Root().Read(t.Context(), "sys/locked-users")
	if err != nil {
		t.Fatal(err)
	}
	spaces, _ := a.Data["by_namespace"].([]any)
	for _, s := range spaces {
		mounts, _ := s.(map[string]any)["mount_accessors"].([]any)
		for _, m := range mounts {
			users, _ := m.(map[string]any)["alias_identifiers"].([]any)
			for _, u := range users {
				if u == role {
					return fmt.Sprint(m.(map[string]any)["mount_accessor"])
				}
			}
		}
	}
	return ""
}

// simulated is a clock that a test puts forward.
type simulated struct{ ahead atomic.Int64 }

func (s *simulated) now() time.Time             { return time.Now().Add(time.Duration(s.ahead.Load())) }
func (s *simulated) putForward(d time.Duration) { s.ahead.Add(int64(d)) }

func TestRealADestroyedSecretIDNeverLocksItsRole(t *testing.T) {
	v, name := realVault(t)
	l, secretID := lockableRole(t, v, name, 2)
	var clock simulated
	config := realConfig(v, l)
	config.Now = clock.now
	cl := dial(t, config)
	path := "secret/data/" + name + "/a"
	if _, err := cl.Read(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	shown, err := os.ReadFile(l.SecretIDFile)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Root().Write(t.Context(), "auth/"+l.Mount+"/role/"+name+"/secret-id/destroy", map[string]any{"secret_id": string(shown)}); err != nil {
		t.Fatal(err)
	}
	if err := v.RevokeToken(t.Context(), cl.cur.auth().ClientToken); err != nil {
		t.Fatal(err)
	}
	for range 120 {
		_, err := cl.Read(t.Context(), path)
		if !errors.Is(err, ErrLogin) || !strings.Contains(err.Error(), "the login is refused (400: invalid role or secret ID)") {
			t.Fatal(err)
		}
		clock.putForward(5 * time.Second)
	}
	if accessor := lockedUsers(t, v, name); accessor != "" {
		t.Fatalf("the role is locked at %s", accessor)
	}
	if st := cl.Status(); st.LoggedIn || !st.Refused || !st.TokenUntil.IsZero() {
		t.Errorf("%+v", st)
	}
	write(t, l.SecretIDFile, secretID())
	if _, err := cl.Read(t.Context(), path); err != nil {
		t.Errorf("a new secret-id after ten minutes: %v", err)
	}
}

func TestRealALockedRoleIsNamedAndUnlocked(t *testing.T) {
	v, name := realVault(t)
	l, secretID := lockableRole(t, v, name, 1)
	right := secretID()
	write(t, l.SecretIDFile, "00000000-0000-0000-0000-000000000000")
	var clock simulated
	config := realConfig(v, l)
	config.Now = clock.now
	cl := dial(t, config)
	path := "secret/data/" + name + "/a"
	if _, err := cl.Read(t.Context(), path); !errors.Is(err, ErrLogin) {
		t.Fatal(err)
	}
	accessor := lockedUsers(t, v, name)
	if accessor == "" {
		t.Fatal("the role is not locked, so there is nothing to see here")
	}
	write(t, l.SecretIDFile, right)
	_, err := cl.Read(t.Context(), path)
	if !errors.Is(err, ErrLogin) || !strings.Contains(err.Error(), "vault read sys/locked-users") || cl.Status().Mend != "vault read sys/locked-users" {
		t.Errorf("%v, %+v", err, cl.Status())
	}
	// As the sentence says.
	if _, err := v.Root().Write(t.Context(), "sys/locked-users/"+accessor+"/unlock/"+name, nil); err != nil {
		t.Fatal(err)
	}
	clock.putForward(90 * time.Second)
	if _, err := cl.Read(t.Context(), path); err != nil {
		t.Errorf("after it was unlocked: %v", err)
	}
}

func TestRealATokenForSomeUsesIsRefused(t *testing.T) {
	v, name := realVault(t)
	l, _ := lockableRole(t, v, name, 5)
	role := "auth/" + l.Mount + "/role/" + name
	if _, err := v.Root().Write(t.Context(), role, map[string]any{"token_num_uses": 5}); err != nil {
		t.Fatal(err)
	}
	var clock simulated
	config := realConfig(v, l)
	config.Now, config.Metrics = clock.now, prometheus.NewRegistry()
	cl := dial(t, config)
	path := "secret/data/" + name + "/a"
	for range 20 {
		if _, err := cl.Read(t.Context(), path); !errors.Is(err, ErrLogin) || !strings.Contains(err.Error(), "token_num_uses=0") {
			t.Fatal(err)
		}
		clock.putForward(5 * time.Second)
	}
	if left, err := v.Tokens(t.Context(), "auth/"+l.Mount+"/login"); err != nil || len(left) != 0 {
		t.Errorf("%d tokens are left behind: %v", len(left), err)
	}
	if _, err := v.Root().Write(t.Context(), role, map[string]any{"token_num_uses": 0}); err != nil {
		t.Fatal(err)
	}
	clock.putForward(90 * time.Second)
	if _, err := cl.Read(t.Context(), path); err != nil {
		t.Errorf("the role is mended: %v", err)
	}

	a, err := v.Root().Write(t.Context(), "auth/token/create", map[string]any{"policies": []string{name}, "num_uses": 3, "ttl": "1h"})
	if err != nil {
		t.Fatal(err)
	}
	cl = dial(t, realConfig(v, Login{Method: "token", TokenFile: secretFile(t, "token", a.Auth.Token)}))
	if _, err := cl.Read(t.Context(), path); !errors.Is(err, ErrLogin) || !strings.Contains(err.Error(), "use-limit") {
		t.Error(err)
	}
}

func TestRealATokenOfThreeSecondsIsLivedThroughUnderLoad(t *testing.T) {
	v, name := realVault(t)
	cl := dial(t, realConfig(v, logins["approle"](t, v, name, lab.VaultLife{Policies: []string{name}, TTL: 3 * time.Second, MaxTTL: 3 * time.Second})))
	run(t, cl)
	results := make(chan error)
	end := time.Now().Add(13 * time.Second)
	const callers = 10
	for range callers {
		go func() {
			for time.Now().Before(end) {
				if _, err := cl.Read(t.Context(), "secret/data/"+name+"/a"); err != nil {
					results <- err
					return
				}
			}
			results <- nil
		}()
	}
	for range callers {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}
