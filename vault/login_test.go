package vault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/signet-ca/signet/test/bubble"
)

// lockingVault refuses every secret-id but one, and locks the role as Vault does by default.
type lockingVault struct {
	*fakeVault
	right string
	// count of refused logins in a row, the last at last; locks counts how often the role was locked.
	count, locks int
	last         time.Time
}

func lockable(right string) *lockingVault {
	f := &lockingVault{fakeVault: newFakeVault(), right: right}
	f.on("GET a", data(map[string]any{"a": "b"}))
	f.on("PUT auth/approle/login", f.login)
	return f
}

func (f *lockingVault) login(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	const threshold, reset, lasts = 5, 15 * time.Minute, 15 * time.Minute
	since := time.Since(f.last)
	switch {
	case f.count >= threshold && since < lasts:
		refuse(403, "permission denied")(w, r)
	case f.right != "" && f.logins[len(f.logins)-1]["secret_id"] == f.right:
		f.count = 0
		token := fmt.Sprintf("hvs.given-%d", len(f.logins))
		f.tokens[token] = true
		answer(w, 200, map[string]any{"auth": map[string]any{"client_token": token, "lease_duration": 3600, "renewable": true, "num_uses": 0}})
	default:
		if since > reset {
			f.count = 0
		}
		if f.count, f.last = f.count+1, time.Now(); f.count == threshold {
			f.locks++
		}
		refuse(400, "invalid role or secret ID")(w, r)
	}
}

func (f *lockingVault) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func TestOurOwnTriesNeverLockARole(t *testing.T) {
	for what, secret := range map[string]func(minute int) string{
		"the same secret-id":        func(int) string { return "wrong" },
		"another each minute":       func(m int) string { return fmt.Sprint("wrong-", m) },
		"another every ten minutes": func(m int) string { return fmt.Sprint("wrong-", m/10) },
		"two that take turns":       func(m int) string { return fmt.Sprint("wrong-", m%2) },
		"a burst after each hour":   func(m int) string { return fmt.Sprint("wrong-", m/60, max(0, 5-m%60)) },
	} {
		t.Run(what, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				f, config := lockable("right"), appRole(t)
				cl := connect(t, config, f)
				keepFor(t, cl, 5*time.Hour, func() {
					for m := range 4 * 60 {
						write(t, config.Login.SecretIDFile, secret(m))
						time.Sleep(time.Minute)
						_, _ = cl.Read(t.Context(), "a")
					}
					if n := f.loginCount(); f.locks != 0 || n < 4 || n > 36 {
						t.Errorf("locked %d times by %d logins in four hours", f.locks, n)
					}
				})
			})
		})
	}
}

func TestANewSecretIDIsTriedWithinSecondsThoughNobodyCalls(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f, config := lockable("right"), appRole(t)
		cl := connect(t, config, f)
		keepFor(t, cl, time.Hour, func() {
			time.Sleep(30 * time.Minute)
			before := f.loginCount()
			write(t, config.Login.SecretIDFile, "right")
			time.Sleep(2 * secretPulse)
			if st := cl.Status(); !st.LoggedIn || st.Refused || f.loginCount() != before+1 {
				t.Errorf("after %d logins: %+v", f.loginCount()-before, st)
			}
		})
	})
}

func TestASecretThatBecomesGoodIsTriedAgain(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		for method, longest := range map[string]time.Duration{"approle": 75 * time.Minute, "jwt": 13 * time.Second} {
			f, config := lockable(""), appRole(t)
			if method == "jwt" {
				config.Login = Login{Method: "jwt", Role: "role", JWTFile: secretFile(t, "jwt", testSecretID)}
				f.on("PUT auth/jwt/login", refuse(400, "error validating token: token not yet valid"))
			}
			cl := connect(t, config, f)
			keepFor(t, cl, 10*time.Hour, func() {
				// As one does whose role is made later.
				time.Sleep(6 * time.Hour)
				f.set(func() { f.right = testSecretID; delete(f.paths, "PUT auth/jwt/login") })
				began := time.Now()
				for !cl.Status().LoggedIn && time.Since(began) < 3*time.Hour {
					time.Sleep(time.Second)
				}
				if took := time.Since(began); took > longest+2*secretPulse {
					t.Errorf("by %s it took %s, want at most %s", method, took, longest)
				}
			})
		}
	})
}

func TestARoleThatOthersHaveLockedIsNamedAndTriedOn(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := lockable(testSecretID)
		f.count, f.last = 5, time.Now()
		cl := connect(t, appRole(t), f)
		keepFor(t, cl, time.Hour, func() {
			time.Sleep(time.Minute)
			st := cl.Status()
			if !st.Refused || st.Mend != "vault read sys/locked-users" || !strings.Contains(st.Why, "locked") || !strings.Contains(st.Why, "vault write -f sys/locked-users/") {
				t.Errorf("%+v", st)
			}
			f.set(func() { f.count = 0 }) // unlocked
			time.Sleep(80 * time.Second)
			if st := cl.Status(); !st.LoggedIn {
				t.Errorf("a minute after it was unlocked: %+v", st)
			}
		})
	})
}

func TestALoginThatIsRefusedAfterItsTokenDiedShowsAtOnce(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f, config, registry := lockable(testSecretID), appRole(t), prometheus.NewRegistry()
		var log bytes.Buffer
		config.Logger, config.Metrics = slog.New(slog.NewTextHandler(&log, nil)), registry
		cl := connect(t, config, f)
		const up, expiry = "signet_vault_up", "signet_vault_token_expiry_timestamp_seconds"
		gauge := func(name string) (value float64) {
			all, err := registry.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range all {
				if m.GetName() == name {
					value = m.GetMetric()[0].GetGauge().GetValue()
				}
			}
			return value
		}
		keepFor(t, cl, 10*time.Minute, func() {
			time.Sleep(time.Minute)
			if gauge(up) != 1 || gauge(expiry) == 0 {
				t.Errorf("at work: up %v, until %v", gauge(up), gauge(expiry))
			}
			log.Reset()
			f.set(func() { f.right = "another" })
			f.revokeAll()
			// Nobody calls.
			time.Sleep(pulse + pulse/2)
			st := cl.Status()
			if st.LoggedIn || st.Away || !st.Refused || time.Since(st.Since) > pulse+pulse/2 || st.Mend != "vault list auth/approle/role" || !strings.Contains(st.Why, "the login is refused (400") {
				t.Errorf("%+v", st)
			}
			if gauge(up) != 0 || gauge(expiry) != 0 {
				t.Errorf("up %v, until %v", gauge(up), gauge(expiry))
			}
			for range 100 {
				time.Sleep(time.Second)
				_, err := cl.Read(t.Context(), "a")
				if !errors.Is(err, ErrLogin) || !errors.Is(err, ErrDenied) || strings.Contains(err.Error(), "policy") {
					t.Fatal(err)
				}
			}
			write(t, config.Login.SecretIDFile, "another")
			time.Sleep(2 * secretPulse)
			if st := cl.Status(); !st.LoggedIn || st.Refused || gauge(up) != 1 || gauge(expiry) == 0 {
				t.Errorf("mended: %+v", st)
			}
		})
		if text := log.String(); strings.Count(text, "\n") != 2 || strings.Count(text, "no login to Vault") != 1 || strings.Count(text, "logged in to Vault") != 1 {
			t.Errorf("want a line when it begins and one when it ends:\n%s", text)
		}
	})
}

func TestAVaultThatComesBackToALoginThatIsRefusedIsNotAway(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := lockable("right")
		var sealed atomic.Bool
		cl := connect(t, appRole(t), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if sealed.Load() {
				refuse(503, "Vault is sealed")(w, r)
				return
			}
			f.ServeHTTP(w, r)
		}))
		keepFor(t, cl, 10*time.Minute, func() {
			time.Sleep(time.Minute)
			sealed.Store(true)
			time.Sleep(time.Minute)
			if st := cl.Status(); !st.Away || st.Refused {
				t.Errorf("sealed: %+v", st)
			}
			sealed.Store(false)
			time.Sleep(2 * maxOpen)
			if st := cl.Status(); st.Away || !st.Refused || !strings.Contains(st.Why, "the login is refused") {
				t.Errorf("unsealed: %+v", st)
			}
		})
		if f.loginCount() != 1 {
			t.Errorf("%d logins", f.loginCount())
		}
	})
}

func TestALoginThatIsRefusedWhileTheTokenLivesShows(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f, config := lockable(testSecretID), appRole(t)
		f.on("GET denied", refuse(403, "permission denied"))
		cl := connect(t, config, f)
		keepFor(t, cl, time.Hour, func() {
			time.Sleep(2 * young)
			f.set(func() { f.right = "another" })
			// A new login might help it.
			_, _ = cl.Read(t.Context(), "denied")
			if st := cl.Status(); !st.LoggedIn || !st.Refused || st.Why == "" || st.TokenUntil.IsZero() {
				t.Errorf("%+v", st)
			}
			if _, err := cl.Read(t.Context(), "a"); err != nil {
				t.Error(err)
			}
			write(t, config.Login.SecretIDFile, "another")
			time.Sleep(2 * pulse)
			if st := cl.Status(); !st.LoggedIn || st.Refused || st.Why != "" {
				t.Errorf("with the right secret-id: %+v", st)
			}
		})
	})
}

func TestATokenForSomeUsesIsRefusedAndNotLeftBehind(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		revoked := 0
		f.on("PUT auth/approle/login", func(w http.ResponseWriter, _ *http.Request) {
			f.mu.Lock()
			f.tokens["hvs.five"] = true
			f.mu.Unlock()
			answer(w, 200, map[string]any{"auth": map[string]any{"client_token": "hvs.five", "lease_duration": 3600, "num_uses": 5}})
		})
		f.on("PUT auth/token/revoke-self", func(http.ResponseWriter, *http.Request) { revoked++ })
		cl := connect(t, appRole(t), f)
		for range 600 {
			_, err := cl.Read(t.Context(), "a")
			if !errors.Is(err, ErrLogin) || !strings.Contains(err.Error(), "token_num_uses=0") || strings.Contains(err.Error(), "policy") {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		if n := f.loginCount(); n < 5 || n > 20 || revoked != n {
			t.Errorf("%d logins in ten minutes, %d of their tokens revoked", n, revoked)
		}

		for _, uses := range []any{4, -1} {
			f := newFakeVault()
			f.tokens["hvs.x"] = true
			f.on("GET "+lookupPath, data(map[string]any{"ttl": 60, "renewable": true, "num_uses": uses}))
			cl := connect(t, Config{Address: "http://127.0.0.1:1", Login: Login{Method: "token", TokenFile: secretFile(t, "token", "hvs.x")}}, f)
			if _, err := cl.Read(t.Context(), "a"); !errors.Is(err, ErrLogin) || !strings.Contains(err.Error(), "without -use-limit") {
				t.Error(err)
			}
		}
	})
}

// shortTokens gives tokens that end before their time.
func shortTokens(lasts func(*http.Request) bool) *fakeVault {
	f := newFakeVault()
	f.life, f.renewable = 3, false
	f.on("GET a", func(w http.ResponseWriter, r *http.Request) {
		if !lasts(r) {
			refuse(403, "2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n")(w, r)
			return
		}
		answer(w, 200, map[string]any{"data": map[string]any{"a": "b"}})
	})
	return f
}

func TestATokenThatDiedYoungCostsOneLoginAndOneMoreTry(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		born := map[string]time.Time{}
		// By Vault's clock it is at its end sooner than by ours.
		f := shortTokens(func(r *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			token := r.Header.Get("X-Vault-Token")
			if born[token].IsZero() {
				born[token] = time.Now()
			}
			return time.Since(born[token]) < 2500*time.Millisecond
		})
		cl := connect(t, appRole(t), f)
		keepFor(t, cl, time.Minute, func() {
			var g sync.WaitGroup
			for range 30 {
				g.Go(func() {
					for range 550 {
						if _, err := cl.Read(t.Context(), "a"); err != nil {
							t.Error(err)
						}
						time.Sleep(100 * time.Millisecond)
					}
				})
			}
			g.Wait()
		})
		if n := f.loginCount(); n < 15 || n > 60 {
			t.Errorf("%d logins in a minute with tokens of 3 s", n)
		}
	})
}

func TestTokensThatAreDeadAtOnceCostFewLogins(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := shortTokens(func(*http.Request) bool { return false })
		cl := connect(t, appRole(t), f)
		var last error
		for range 3600 {
			if _, last = cl.Read(t.Context(), "a"); last == nil {
				t.Fatal("it has worked")
			}
			time.Sleep(time.Second)
		}
		if n := f.loginCount(); n < 50 || n > 90 {
			t.Errorf("%d logins in an hour", n)
		}
		if !errors.Is(last, ErrLogin) || strings.Contains(last.Error(), "policy") || !strings.Contains(last.Error(), "end at once") {
			t.Error(last)
		}
		// It works once, and all is as if it always had.
		f.on("GET a", data(map[string]any{"a": "b"}))
		time.Sleep(80 * time.Second)
		if _, err := cl.Read(t.Context(), "a"); err != nil {
			t.Error(err)
		}
	})
}

func TestADeadTokenIsReplacedWhateverWasDenied(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("GET a", refuse(403, "permission denied"))
		cl := connect(t, appRole(t), f)
		for range 3 {
			_, _ = cl.Read(t.Context(), "a")
			time.Sleep(2 * time.Second)
		}
		before := f.loginCount()
		f.revokeAll()
		f.on("GET a", data(map[string]any{"a": "b"}))
		if _, err := cl.Read(t.Context(), "a"); err != nil || f.loginCount() != before+1 {
			t.Errorf("%d logins: %v", f.loginCount()-before, err)
		}
	})
}

func TestASecretThatCanNotBeReadIsNoRefusalOfVault(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f, config := lockable(testSecretID), appRole(t)
		config.Metrics = prometheus.NewRegistry()
		if err := os.Remove(config.Login.SecretIDFile); err != nil {
			t.Fatal(err)
		}
		cl := connect(t, config, f)
		_, err := cl.Read(t.Context(), "a")
		if !errors.Is(err, ErrLogin) || errors.Is(err, ErrDenied) || errors.Is(err, ErrAway) || errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if st := cl.Status(); !st.Refused || st.Mend != "" || !strings.Contains(st.Why, config.Login.SecretIDFile) || f.loginCount() != 0 {
			t.Errorf("%+v", st)
		}
		write(t, config.Login.SecretIDFile, testSecretID)
		if _, err := cl.Read(t.Context(), "a"); err != nil || cl.Status().Refused {
			t.Errorf("%v, %+v", err, cl.Status())
		}
		if got := testutil.ToFloat64(cl.metrics.requests.WithLabelValues(opLogin, "ok")); got != 1 {
			t.Errorf("%v logins", got)
		}
	})
}
