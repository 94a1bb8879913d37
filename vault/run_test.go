package vault

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/test/bubble"
)

// keepFor runs it for a simulated time.
func keepFor(t *testing.T, cl *Client, d time.Duration, meanwhile func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- cl.Run(ctx) }()
	if meanwhile != nil {
		meanwhile()
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestRunKeepsATokenAliveByRenewal(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.life = 60
		cl := connect(t, appRole(t), f)
		keepFor(t, cl, time.Hour, func() {
			for range 3590 {
				time.Sleep(time.Second)
				if st := cl.Status(); !st.LoggedIn || st.Away || time.Until(st.TokenUntil) > time.Minute {
					t.Fatalf("status is %+v", st)
				}
			}
			if err := cl.Run(t.Context()); err == nil {
				t.Error("it runs twice")
			}
		})
		if n, renewals := f.loginCount(), f.count("PUT auth/token/renew-self"); n != 1 || renewals < 60 || renewals > 120 {
			t.Errorf("%d logins and %d renewals in an hour with a token of a minute", n, renewals)
		}
		if n := f.count("GET " + lookupPath); n < 250 || n > 500 {
			t.Errorf("%d times asked whether it is there and knows the token", n)
		}
	})
}

func TestRunLogsInAgainWhenRenewalEnds(t *testing.T) {
	for _, c := range []struct {
		name   string
		life   int
		renew  http.HandlerFunc
		logins [2]int
	}{
		{"a batch token", 60, nil, [2]int{60, 90}},
		{"a renewal that is denied", 60, refuse(403, "permission denied"), [2]int{60, 90}},
		{"a renewal that fails", 60, refuse(500, "no"), [2]int{40, 400}},
		{"a renewal that never ends", 60, hang, [2]int{40, 400}},
		// Bounded by the backoff, not by the life: no hot loop.
		{"a token of a second", 1, nil, [2]int{100, 700}},
		{"a token without end", 0, nil, [2]int{1, 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				f := newFakeVault()
				f.life, f.renewable = c.life, c.renew != nil
				if c.renew != nil {
					f.on("PUT auth/token/renew-self", c.renew)
				}
				cl := connect(t, appRole(t), f)
				keepFor(t, cl, time.Hour, nil)
				if n := f.loginCount(); n < c.logins[0] || n > c.logins[1] {
					t.Errorf("%d logins in an hour, want %d to %d", n, c.logins[0], c.logins[1])
				}
			})
		})
	}
}

func TestATokenThatStopsGrowingIsReplacedBeforeItEnds(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.life = 10
		f.on("GET a", data(map[string]any{"a": "b"}))
		born := map[string]time.Time{}
		// As a max_ttl of 30 s does.
		f.on("PUT auth/token/renew-self", func(w http.ResponseWriter, r *http.Request) {
			token := r.Header.Get("X-Vault-Token")
			if born[token].IsZero() {
				born[token] = time.Now()
			}
			left := max(1, min(10, int((30*time.Second-time.Since(born[token])).Seconds())))
			answer(w, 200, map[string]any{"auth": map[string]any{"client_token": token, "lease_duration": left, "renewable": true}})
		})
		cl := connect(t, appRole(t), f)
		keepFor(t, cl, 10*time.Minute, func() {
			for range 5900 {
				time.Sleep(100 * time.Millisecond)
				if st := cl.Status(); !st.LoggedIn {
					t.Fatalf("no token after %d logins: %+v", f.loginCount(), st)
				}
			}
		})
		if n := f.loginCount(); n < 20 || n > 100 {
			t.Errorf("%d logins in ten minutes with tokens of at most 30 s", n)
		}
	})
}

func TestRunWaitsForAVaultThatIsAwayAndNoticesItsReturn(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("GET a", data(map[string]any{"a": "b"}))
		var sealed, asked atomic.Int64
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			if sealed.Load() == 1 {
				refuse(503, "Vault is sealed")(w, r)
				return
			}
			f.ServeHTTP(w, r)
		})
		cl := connect(t, appRole(t), h)
		sealed.Store(1)
		keepFor(t, cl, time.Hour, func() {
			time.Sleep(5 * time.Minute)
			st := cl.Status()
			if !st.Away || st.LoggedIn || !strings.Contains(st.Why, "unseal it") || time.Since(st.Since) < 4*time.Minute {
				t.Errorf("status is %+v", st)
			}
			if n := asked.Load(); n > 100 {
				t.Errorf("asked %d times in five minutes", n)
			}
			for !time.Now().Before(cl.breaker.health().until) {
				time.Sleep(10 * time.Millisecond) // it is being tried
			}
			if _, err := cl.Read(t.Context(), "a"); !errors.Is(err, ErrAway) || !strings.Contains(err.Error(), "left alone") {
				t.Error(err)
			}
			sealed.Store(0)
			time.Sleep(2 * maxOpen)
			if st := cl.Status(); st.Away || !st.LoggedIn || st.Why != "" || !st.Since.IsZero() {
				t.Errorf("status after unsealing is %+v", st)
			}
			if _, err := cl.Read(t.Context(), "a"); err != nil {
				t.Error(err)
			}
			// It goes away while nobody calls.
			sealed.Store(1)
			time.Sleep(2 * pulse)
			if st := cl.Status(); !st.Away {
				t.Errorf("not noticed within %s: %+v", 2*pulse, st)
			}
			sealed.Store(0)
			time.Sleep(2 * maxOpen)
			if st := cl.Status(); st.Away || f.loginCount() != 1 {
				t.Errorf("%d logins, status %+v", f.loginCount(), st)
			}
		})
	})
}

func TestAStandbyIsNoFailure(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		for status, away := range map[int]bool{200: false, 429: false, 472: false, 473: false, 474: true, 500: true, 501: true, 503: true} {
			f := newFakeVault()
			f.on("GET "+healthPath, func(w http.ResponseWriter, _ *http.Request) {
				answer(w, status, map[string]any{"initialized": true, "standby": true})
			})
			cl := connect(t, appRole(t), f)
			if _, err := cl.health(t.Context()); errors.Is(err, ErrAway) != away {
				t.Errorf("%d: %v", status, err)
			}
			if cl.Status().Away != away {
				t.Errorf("%d: %+v", status, cl.Status())
			}
		}
	})
}

func TestThatANodeIsThereDoesNotMeanThatItWorks(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		cl := connect(t, appRole(t), f)
		_, _ = cl.Read(t.Context(), "a")
		// A standby without a leader is well by its own account.
		f.on("GET a", refuse(500, "local node not active but active cluster node not found"))
		f.on("GET "+lookupPath, refuse(500, "local node not active but active cluster node not found"))
		keepFor(t, cl, 10*time.Minute, func() {
			for range 5 {
				_, _ = cl.Read(t.Context(), "a")
			}
			for range 500 {
				time.Sleep(time.Second)
				if !cl.Status().Away {
					t.Fatal("it is taken to work")
				}
			}
		})
	})
}

func TestATokenFileIsReadAnewWhenItsTokenEnds(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("GET a", data(map[string]any{"a": "b"}))
		f.life, f.renewable = 60, false
		f.tokens["hvs.first"] = true
		path := secretFile(t, "token", "hvs.first\n")
		cl := connect(t, Config{Address: "http://127.0.0.1:1", Login: Login{Method: "token", TokenFile: path}}, f)
		keepFor(t, cl, time.Hour, func() {
			if _, err := cl.Read(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			// As a Vault Agent does: it writes a new one, and the old one ends.
			f.mu.Lock()
			f.tokens["hvs.second"] = true
			f.mu.Unlock()
			write(t, path, "hvs.second")
			time.Sleep(time.Minute)
			f.mu.Lock()
			delete(f.tokens, "hvs.first")
			f.mu.Unlock()
			if _, err := cl.Read(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			// Nobody replaces it: calls say so, and Vault is not asked all the time.
			f.revokeAll()
			before := f.count("GET " + lookupPath)
			time.Sleep(10 * time.Minute)
			for range 100 {
				if _, err := cl.Read(t.Context(), "a"); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), path) {
					t.Fatal(err)
				}
			}
			if n := f.count("GET "+lookupPath) - before; n > 60 {
				t.Errorf("asked %d times in ten minutes", n)
			}
			if st := cl.Status(); st.LoggedIn || !strings.Contains(st.Why, "does not accept the token in "+path) {
				t.Errorf("status is %+v", st)
			}
			f.mu.Lock()
			f.tokens["hvs.third"] = true
			f.mu.Unlock()
			write(t, path, "hvs.third")
			if _, err := cl.Read(t.Context(), "a"); err != nil {
				t.Error(err)
			}
		})
		if f.loginCount() != 0 {
			t.Error("it logs in by itself")
		}
	})
}

func TestATokenThatCannotBeReadIsSaidWhileTheOneBeforeLives(t *testing.T) {
	for what, put := range map[string]func(path string) error{
		"empty":     func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"a BOM":     func(path string) error { return os.WriteFile(path, []byte("\ufeffhvs.second"), 0o600) },
		"two lines": func(path string) error { return os.WriteFile(path, []byte("hvs.second\nhvs.third\n"), 0o600) },
		"gone":      os.Remove,
	} {
		bubble.Test(t, func(t *testing.T) {
			f := newFakeVault()
			f.tokens["hvs.first"], f.tokens["hvs.second"] = true, true
			path := secretFile(t, "token", "hvs.first")
			var log bytes.Buffer
			cl := connect(t, Config{Address: "http://127.0.0.1:1", Login: Login{Method: "token", TokenFile: path}, Logger: slog.New(slog.NewTextHandler(&log, nil))}, f)
			keepFor(t, cl, time.Hour, func() {
				time.Sleep(time.Second)
				// While it is replaced, it may be like that for a moment.
				for range 50 {
					if err := put(path); err != nil {
						t.Fatal(err)
					}
					time.Sleep(2 * time.Second)
					write(t, path, "hvs.first")
					time.Sleep(2 * pulse)
					if st := cl.Status(); st.Refused {
						t.Fatalf("%s, for a moment: %+v", what, st)
					}
				}
				if err := put(path); err != nil {
					t.Fatal(err)
				}
				time.Sleep(3 * pulse)
				if st := cl.Status(); !st.Refused || !st.LoggedIn || !strings.Contains(st.Why, "vault.login.token_file") || !strings.Contains(st.Why, path) {
					t.Errorf("%s: %+v", what, st)
				}
				time.Sleep(10 * time.Minute)
				write(t, path, "hvs.second")
				time.Sleep(2 * pulse)
				if st := cl.Status(); st.Refused || !st.LoggedIn {
					t.Errorf("%s, then a good one: %+v", what, st)
				}
			})
			if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "no login to Vault, trying on") {
				t.Errorf("%s: said %d times\n%s", what, n, log.String())
			}
		})
	}
}

func TestRunEndsAtOnceWhateverHangs(t *testing.T) {
	for n := range 4 {
		closed, after := n%2 == 0, time.Second
		if n > 1 {
			after += rand.N(20 * time.Second)
		}
		for _, path := range []string{"PUT auth/token/renew-self", "PUT auth/approle/login", "GET " + healthPath, "GET " + lookupPath} {
			bubble.Test(t, func(t *testing.T) {
				f := newFakeVault()
				f.life = 60
				f.on(path, hang)
				cl := connect(t, appRole(t), f)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					_ = cl.Run(ctx)
				}()
				time.Sleep(after)
				began := time.Now()
				if closed {
					cl.Close()
				} else {
					cancel()
				}
				<-ended
				if took := time.Since(began); took > 0 {
					t.Errorf("%s hangs, and Run ends %s late, told so after %s", path, took, after)
				}
			})
		}
	}
}

func TestATokenInItsLastSecondIsNotWithoutEnd(t *testing.T) {
	for _, c := range []struct {
		data map[string]any
		end  bool
	}{
		{map[string]any{"ttl": 0, "expire_time": nil, "renewable": false}, false},
		{map[string]any{"ttl": 0, "expire_time": "2030-01-01T00:00:00Z", "renewable": true}, true},
		{map[string]any{"ttl": 5, "expire_time": "2030-01-01T00:00:00Z", "renewable": true}, true},
	} {
		f := newFakeVault()
		f.tokens["hvs.x"] = true
		f.on("GET "+lookupPath, data(c.data))
		cl := connect(t, Config{Address: "http://127.0.0.1:1", Login: Login{Method: "token", TokenFile: secretFile(t, "token", "hvs.x")}}, f)
		_, _ = cl.Read(t.Context(), "a")
		if st := cl.Status(); st.TokenUntil.IsZero() == c.end || !st.LoggedIn {
			t.Errorf("%v: %+v", c.data, st)
		}
	}
}

func TestAfterCloseNothingGoesOut(t *testing.T) {
	f := newFakeVault()
	cl := connect(t, appRole(t), f)
	cl.Close()
	if _, err := cl.Read(t.Context(), "a"); err == nil || len(f.seen) != 0 {
		t.Errorf("%v, and Vault saw %v", err, f.seen)
	}
}

func TestNothingIsReadyWhileItIsTriedWhetherVaultIsBack(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("GET a", data(map[string]any{"a": "b"}))
		cl := connect(t, appRole(t), f)
		if _, err := cl.Read(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		keepFor(t, cl, 10*time.Minute, func() {
			time.Sleep(time.Second)
			f.on("GET a", hang)
			f.on("GET "+lookupPath, hang)
			f.on("GET "+healthPath, hang)
			for cl.Ready() == nil {
				_, _ = cl.Read(t.Context(), "a")
			}
			// Nobody calls from here on: who is not ready is not asked.
			for range 3000 {
				time.Sleep(100 * time.Millisecond)
				if err := cl.Ready(); !errors.Is(err, ErrAway) {
					t.Fatalf("ready while Vault hangs: %v", err)
				}
			}
			f.on("GET "+lookupPath, data(map[string]any{"ttl": 3600}))
			f.on("GET "+healthPath, data(nil))
			time.Sleep(2*maxOpen + DefaultTimeout)
			if err := cl.Ready(); err != nil {
				t.Errorf("not noticed that Vault is back: %v", err)
			}
		})
	})
}

func TestAVaultThatComesBackAtOnceIsReadySoon(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		cl := connect(t, appRole(t), f)
		keepFor(t, cl, time.Minute, func() {
			time.Sleep(time.Second)
			f.on("GET a", refuse(503, "Vault is sealed"))
			for range tripAfter {
				_, _ = cl.Read(t.Context(), "a")
			}
			if cl.Ready() == nil {
				t.Fatal("ready while sealed")
			}
			// Its next look after a healthy Vault would be as far as pulse.
			time.Sleep(2 * time.Second)
			if err := cl.Ready(); err != nil {
				t.Error(err)
			}
		})
	})
}

func TestWithoutRunTheCallThatAsksWhenTheTimeHasComeIsTheProbe(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("GET a", refuse(503, "Vault is sealed"))
		cl := connect(t, appRole(t), f)
		for range tripAfter {
			_, _ = cl.Read(t.Context(), "a")
		}
		if cl.Ready() == nil {
			t.Error("ready while sealed")
		}
		time.Sleep(maxOpen)
		if err := cl.Ready(); err != nil {
			t.Fatalf("nobody would ever ask: %v", err)
		}
		f.on("GET a", hang)
		go func() { _, _ = cl.Read(t.Context(), "a") }()
		synctest.Wait()
		if cl.Ready() == nil {
			t.Error("ready while the probe hangs")
		}
		time.Sleep(DefaultTimeout)
	})
}
