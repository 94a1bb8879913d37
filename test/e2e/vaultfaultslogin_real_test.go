//go:build real

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/test/lab"
)

// purse holds the tokens that a proxy has seen in logins.
type purse struct {
	mu     sync.Mutex
	tokens []string
}

// watch notes each token that Vault gives through a proxy, from now until its faults are cleared.
func (p *purse) watch(proxy *lab.VaultProxy) {
	proxy.Set("auth/*", lab.Fault{Rewritten: func(body []byte) []byte {
		var a struct {
			Auth struct {
				Token string `json:"client_token"`
			} `json:"auth"`
		}
		if json.Unmarshal(body, &a) == nil && a.Auth.Token != "" {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.tokens = append(p.tokens, a.Auth.Token)
		}
		return body
	}})
}

func (p *purse) all() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.tokens...)
}

// replace puts a secret in the place of another at once, as whoever provides it should.
func replace(t *testing.T, path, secret string) {
	t.Helper()
	if err := errors.Join(os.WriteFile(path+".new", []byte(secret+"\n"), 0o600), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
}

// each has something done whenever it is called and so much time has passed since the last time.
func each(span time.Duration, do func()) func() {
	var last time.Time
	return func() {
		if time.Since(last) >= span {
			last = time.Now()
			do()
		}
	}
}

// signs asks for another intermediate and waits for it: Vault accepts the login.
func (x *holding) signs(t *testing.T, meanwhile ...func()) {
	t.Helper()
	x.followed(t, x.rotate(t), meanwhile...)
}

// jwtIssuer signs for all roles here: Vault believes the one key that it was told of last.
var jwtIssuer = sync.OnceValues(func() (*lab.VaultJWT, error) {
	v, err := theVault.Get()
	if err != nil {
		return nil, err
	}
	return v.JWT(context.Background(), "nobody", lab.VaultLife{})
})

// jwtRole makes a role that is logged in to by the JWTs of its own subject.
func (e *estate) jwtRole(t *testing.T, role string, life lab.VaultLife) *lab.VaultJWT {
	t.Helper()
	issuer, err := jwtIssuer()
	if err != nil {
		t.Fatal(err)
	}
	own := *issuer
	own.Subject = role
	if _, err := e.vault.Root().Write(t.Context(), "auth/jwt/role/"+role, map[string]any{
		"role_type": "jwt", "user_claim": "sub", "bound_audiences": []string{own.Audience}, "bound_subject": own.Subject,
		"token_policies": life.Policies, "token_ttl": life.TTL.String(), "token_max_ttl": life.MaxTTL.String(),
	}); err != nil {
		t.Fatal(err)
	}
	return &own
}

// revoke ends each token that was seen.
func (e *estate) revoke(t *testing.T, tokens []string) {
	t.Helper()
	if len(tokens) == 0 {
		t.Fatal("no login was seen")
	}
	for _, token := range tokens {
		if err := e.vault.RevokeToken(t.Context(), token); err != nil && lab.VaultStatus(err) == 0 {
			t.Fatal(err)
		}
	}
}

// loggedIn makes an estate and a cluster with a login of its own, whose secret is in a file.
func loggedIn(t *testing.T, name string, life lab.VaultLife, login func(e *estate, life lab.VaultLife) (block, secret string)) (*holding, string) {
	t.Helper()
	e := newEstate(t, name)
	c, err := e.NewCluster("east", "")
	if err != nil {
		t.Fatal(err)
	}
	life.Policies = []string{name}
	block, secret := login(e, life)
	file := e.write(t, "east/secret", secret+"\n")
	// A secret-id of one use is spent by a login that Vault was too slow to answer.
	x := e.hold(t, c, how{login: block, role: name, timeout: 10 * time.Second})
	e.must(t, "cluster", "init", "--config", x.Config(), "--root-fingerprint", e.RootFingerprint)
	return x, file
}

func TestLogins(t *testing.T) {
	t.Parallel()

	t.Run("a token is replaced in its file", func(t *testing.T) {
		t.Parallel()
		token := func(e *estate, life lab.VaultLife) string {
			text, err := e.vault.MakeToken(t.Context(), life)
			if err != nil {
				t.Fatal(err)
			}
			return text
		}
		var old string
		x, file := loggedIn(t, "login-token", lab.VaultLife{TTL: time.Hour}, func(e *estate, life lab.VaultLife) (string, string) {
			old = token(e, life)
			return "{ method: token, token_file: ./secret }", old
		})
		life := lab.VaultLife{Policies: []string{"login-token"}, TTL: time.Hour}
		x.serve(t)
		s := x.issuing(t)
		x.mended(t)
		// In time.
		next := token(x.of, life)
		replace(t, file, next)
		x.of.revoke(t, []string{old})
		x.signs(t)
		x.mended(t)
		// Too late.
		x.of.revoke(t, []string{next})
		before := x.rotate(t)
		found := x.impaired(t, "the token is dead", func(f check.Finding) bool { return strings.Contains(f.Message, "does not accept the token in") })
		if strings.Contains(found.Message, next) {
			t.Error("a finding shows the token")
		}
		replace(t, file, token(x.of, life))
		x.followed(t, before)
		x.mended(t)
		// As an agent of Vault's does it: each lives for some seconds, whatever is done.
		life.TTL, life.MaxTTL = 0, 5*time.Second
		provide := each(2*time.Second, func() { replace(t, file, token(x.of, life)) })
		for range 3 {
			provide()
			time.Sleep(2 * time.Second)
			x.signs(t, provide)
		}
		s.unharmed(t, "over all logins")
	})

	t.Run("a secret-id of one use is replaced", func(t *testing.T) {
		t.Parallel()
		secret := func(e *estate) string {
			id, err := e.vault.SecretID(t.Context(), e.name, 1, 0)
			if err != nil {
				t.Fatal(err)
			}
			return id
		}
		x, file := loggedIn(t, "login-approle", lab.VaultLife{TTL: time.Hour}, func(e *estate, life lab.VaultLife) (string, string) {
			id, err := e.vault.AppRole(t.Context(), e.name, life)
			if err != nil {
				t.Fatal(err)
			}
			return fmt.Sprintf("{ method: approle, role_id: %s, secret_id_file: ./secret }", id), secret(e)
		})
		var seen purse
		seen.watch(x.proxy)
		replace(t, file, secret(x.of))
		x.serve(t)
		s := x.issuing(t)
		x.of.revoke(t, seen.all())
		before := x.rotate(t)
		x.impaired(t, "the secret-id is used", func(f check.Finding) bool { return strings.Contains(f.Message, "the login is refused") })
		replace(t, file, secret(x.of))
		x.followed(t, before)
		x.mended(t)
		// With one at hand nobody notices.
		replace(t, file, secret(x.of))
		x.of.revoke(t, seen.all())
		x.signs(t)
		x.mended(t)
		s.unharmed(t, "over all logins")
	})

	t.Run("a JWT of seconds is replaced each second", func(t *testing.T) {
		t.Parallel()
		var issuer *lab.VaultJWT
		token := func() string {
			text, err := issuer.Token(3 * time.Second)
			if err != nil {
				t.Fatal(err)
			}
			return text
		}
		x, file := loggedIn(t, "login-jwt", lab.VaultLife{TTL: 2 * time.Second, MaxTTL: 3 * time.Second}, func(e *estate, life lab.VaultLife) (string, string) {
			issuer = e.jwtRole(t, e.name, life)
			return fmt.Sprintf("{ method: jwt, role: %s, jwt_file: ./secret }", e.name), token()
		})
		x.serve(t)
		s := x.issuing(t)
		provide := each(time.Second, func() { replace(t, file, token()) })
		for second := range 8 {
			provide()
			if second%4 == 3 {
				x.signs(t, provide)
			}
			time.Sleep(time.Second)
		}
		x.mended(t, provide)
		until(t, "logins, one after the other", time.Minute, func() error {
			provide()
			if n := x.metric(t, `signet_vault_requests_total{op="login",result="ok"}`); n < 4 {
				return fmt.Errorf("%v logins", n)
			}
			return nil
		})
		s.unharmed(t, "over all logins")
	})

	t.Run("a token is revoked under the server", func(t *testing.T) {
		t.Parallel()
		x := newEstate(t, "login-revoked").cluster(t, "east", how{keys: "vault-transit", timeout: 10 * time.Second})
		var seen purse
		seen.watch(x.proxy)
		x.serve(t)
		s := x.issuing(t)
		for round := range 2 {
			if round > 0 {
				time.Sleep(6 * time.Second) // one that is revoked as soon as it is made costs a login each time, so that waits
			}
			s.since()
			x.of.revoke(t, seen.all())
			s.unharmed(t, "after the token was revoked")
			x.signs(t)
		}
		x.mended(t)
	})

	t.Run("tokens that end for good after 10 s are lived through", func(t *testing.T) {
		t.Parallel()
		x, _ := loggedIn(t, "login-short", lab.VaultLife{}, func(e *estate, life lab.VaultLife) (string, string) {
			id, err := e.vault.AppRole(t.Context(), e.name, life)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := e.vault.Root().Write(t.Context(), "auth/approle/role/"+e.name, map[string]any{
				"token_policies": life.Policies, "token_ttl": "5s", "token_explicit_max_ttl": "10s",
			}); err != nil {
				t.Fatal(err)
			}
			secret, err := e.vault.SecretID(t.Context(), e.name, 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			return fmt.Sprintf("{ method: approle, role_id: %s, secret_id_file: ./secret }", id), secret
		})
		x.how.keys = "vault-transit"
		x.configure(t)
		x.serve(t)
		s := x.issuing(t)
		for end := time.Now().Add(22 * time.Second); time.Now().Before(end); time.Sleep(4 * time.Second) {
			x.signs(t)
			s.unharmed(t, "with tokens of 10 s")
		}
		x.mended(t)
		x.proves(t, s)
	})
}
