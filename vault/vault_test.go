package vault

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/signet-ca/signet/test/bubble"
)

func TestEveryStatusIsWhatItMeans(t *testing.T) {
	sentinels := []error{ErrAway, ErrNotFound, ErrDenied, ErrRefused, ErrConflict}
	for _, c := range []struct {
		status        int
		message       string
		want          error
		reads, writes int
		says          string
	}{
		{400, "missing input", ErrRefused, 1, 1, "refused (400: missing input)"},
		{400, "check-and-set parameter did not match the current version", ErrConflict, 1, 1, "read it again"},
		{403, "1 error occurred:\n\t* permission denied\n\n", ErrDenied, 1, 1, "(403: permission denied)"},
		{404, "", ErrNotFound, 1, 1, "nothing is there (404)"},
		{405, "unsupported operation", ErrRefused, 1, 1, "405: unsupported operation"},
		{412, "required index state not present", ErrAway, 3, 3, "behind the active one"},
		{429, "request path: rate limit quota exceeded", ErrAway, 3, 3, "too many requests"},
		{472, "", ErrAway, 2, 1, "472"},
		{473, "", ErrAway, 2, 1, "473"},
		{500, "local node not active but active cluster node not found", ErrAway, 2, 1, "local node not active"},
		{500, "unable to fetch corresponding key for issuer", ErrRefused, 1, 1, "refused (500: unable to fetch"},
		{500, "1 error occurred:\n\t* failed to persist: raft: not enough voters\n\n", ErrAway, 2, 1, "can't do it now"},
		{500, "internal error", ErrAway, 2, 1, "internal error"},
		{500, "", ErrAway, 2, 1, "500"},
		{501, "not implemented", nil, 1, 1, "501"},
		{502, "", ErrAway, 2, 1, "502"},
		{503, "Vault is sealed", ErrAway, 2, 1, "unseal it"},
	} {
		t.Run(fmt.Sprint(c.status, c.message), func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				f := newFakeVault()
				var messages []string
				if c.message != "" {
					messages = []string{c.message}
				}
				f.on("GET some/path", refuse(c.status, messages...))
				f.on("PUT some/path", refuse(c.status, messages...))
				cl := connect(t, appRole(t), f)
				_, rerr := cl.Read(t.Context(), "some/path")
				_, werr := cl.Write(t.Context(), "some/path", map[string]any{"a": "b"})
				for _, err := range []error{rerr, werr} {
					var e *Error
					if !errors.As(err, &e) || e.Status != c.status || e.Path != "some/path" {
						t.Fatalf("got %v", err)
					}
					if !strings.Contains(err.Error(), c.says) || strings.ContainsAny(err.Error(), "\n\t") {
						t.Errorf("the error is %q, want one line with %q", err, c.says)
					}
					for _, s := range sentinels {
						if errors.Is(err, s) != (s == c.want) {
							t.Errorf("%v is %v: %v", err, s, errors.Is(err, s))
						}
					}
				}
				if got := f.count("GET some/path"); got != c.reads {
					t.Errorf("read %d times, want %d", got, c.reads)
				}
				if got := f.count("PUT some/path"); got != c.writes {
					t.Errorf("written %d times, want %d", got, c.writes)
				}
				if n := f.loginCount(); n != 1 {
					t.Errorf("%d logins, want 1", n)
				}
			})
		})
	}
}

func TestAnEngineThatCanNotDoItIsNoVaultThatIsAway(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("PUT pki/sign", refuse(500, "requested usage issuing-certificates for issuer but only had usage read-only"))
		f.on("GET a", data(map[string]any{"a": "b"}))
		cl := connect(t, appRole(t), f)
		for range 4 * tripAfter {
			if _, err := cl.Write(t.Context(), "pki/sign", nil); !errors.Is(err, ErrRefused) {
				t.Fatal(err)
			}
			if err := cl.Ready(); err != nil || cl.Status().Away {
				t.Fatalf("%v, %+v", err, cl.Status())
			}
		}
		if _, err := cl.Read(t.Context(), "a"); err != nil {
			t.Error(err)
		}
		// It took so long that it is no word of an engine.
		f.on("GET slow", func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(DefaultTimeout * 2 / 3)
			refuse(500, "it could not be done")(w, r)
		})
		if _, err := cl.Read(t.Context(), "slow"); !errors.Is(err, ErrAway) || !cl.Status().Away {
			t.Errorf("%v, %+v", err, cl.Status())
		}
		// Nor does such a word show that it works.
		for range tripAfter {
			_, _ = cl.Write(t.Context(), "pki/sign", nil)
		}
		if !cl.Status().Away {
			t.Error("an answer 500 is taken for a sign of health")
		}
	})
}

func TestCallsSayWhatVaultHas(t *testing.T) {
	f := newFakeVault()
	f.on("GET a/b", data(map[string]any{"n": 12345678901234567}))
	f.on("PUT a/b", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) })
	f.on("LIST a", data(map[string]any{"keys": []string{"b", "c/"}}))
	f.on("LIST odd", data(map[string]any{"keys": []any{"b", 1}}))
	f.on("GET deleted", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, 404, map[string]any{"data": map[string]any{"data": nil, "metadata": map[string]any{"version": 3}}})
	})
	cl := connect(t, appRole(t), f)
	ctx := t.Context()
	if s, err := cl.Read(ctx, "a/b"); err != nil || fmt.Sprint(s.Data["n"]) != "12345678901234567" {
		t.Errorf("read: %v %v", s, err)
	}
	if s, err := cl.Write(ctx, "a/b", nil); err != nil || s != nil {
		t.Errorf("write: %v %v", s, err)
	}
	if l, err := cl.List(ctx, "a/"); err != nil || fmt.Sprint(l) != "[b c/]" {
		t.Errorf("list: %v %v", l, err)
	}
	if l, err := cl.List(ctx, "none"); err != nil || l != nil {
		t.Errorf("a list of nothing: %v %v", l, err)
	}
	if l, err := cl.List(ctx, "odd"); err == nil {
		t.Errorf("a list that is none: %v", l)
	}
	if s, err := cl.Read(ctx, "deleted"); !errors.Is(err, ErrNotFound) || s == nil {
		t.Errorf("a deleted version: %v %v, want what Vault knows of it beside the error", s, err)
	}
	if s, err := cl.Read(ctx, "none"); !errors.Is(err, ErrNotFound) || s != nil {
		t.Errorf("read of nothing: %v %v", s, err)
	}
}

// Vault says 404 where there is nothing.
func TestAnEmptyAnswerDoesNotMeanThatNothingIsThere(t *testing.T) {
	for _, status := range []int{200, 204} {
		f := newFakeVault()
		empty := func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }
		f.on("GET a", empty)
		f.on("LIST a", empty)
		cl := connect(t, appRole(t), f)
		_, read := cl.Read(t.Context(), "a")
		_, listed := cl.List(t.Context(), "a")
		for of, err := range map[string]error{"read": read, "list": listed} {
			if !errors.Is(err, ErrAway) || errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "is not Vault's JSON") {
				t.Errorf("%s, %d: %v", of, status, err)
			}
		}
	}
}

func TestAPathNamesWhatItSays(t *testing.T) {
	f := newFakeVault()
	cl := connect(t, appRole(t), f)
	for _, path := range []string{"", "/a", "a//b", "a/../b", "..", "a/.", "a\nb", "a\x00", "ä", strings.Repeat("a", 2000), "a/"} {
		if _, err := cl.Read(t.Context(), path); err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("%.20q is read: %v", path, err)
		}
	}
	if len(f.seen) != 0 {
		t.Errorf("Vault was asked: %v", f.seen)
	}
	f.on("GET a?b#c%2f d", data(map[string]any{"x": "y"}))
	if _, err := cl.Read(t.Context(), "a?b#c%2f d"); err != nil {
		t.Error(err)
	}
}

// What comes over a real socket from something that is not well.
func TestABrokenAnswerEndsACallInTime(t *testing.T) {
	elsewhere := 0
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere++ }))
	defer other.Close()
	for _, c := range []struct {
		name string
		h    http.HandlerFunc
		away bool
		says string
	}{
		{"cut", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = w.Write([]byte(`{"data":{`))
		}, true, "unexpected EOF"},
		{"reset", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, true, "not reachable"},
		{"hung", hang, true, "no answer within"},
		{"dripping", func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				_, _ = w.Write([]byte(" "))
				_ = http.NewResponseController(w).Flush()
				select {
				case <-r.Context().Done():
				case <-time.After(10 * time.Millisecond):
				}
			}
		}, true, "no answer within"},
		{"not JSON", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>sign in, please</html>")) }, true, "not Vault's JSON"},
		{"half JSON", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{"data":{"a":`)) }, true, "not Vault's JSON"},
		{"other JSON", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`[1,2]`)) }, true, "not Vault's JSON"},
		{"another server's 404", http.NotFound, true, "(404) is not Vault's JSON"},
		{"an HTML error", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(502)
			_, _ = w.Write([]byte("<html>bad gateway</html>"))
		}, true, "(502) is not Vault's JSON: another server or a proxy answers in its place"},
		{"a load balancer without a Vault", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "<html>no server is available</html>", http.StatusServiceUnavailable)
		}, true, "(503) is not Vault's JSON: another server or a proxy answers in its place"},
		{"oversized", func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(bytes.Repeat([]byte(" "), maxAnswer+1))
		}, false, "larger than 1 MiB"},
		{"oversized, as announced", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "10000000000")
			w.WriteHeader(200)
		}, false, "larger than 1 MiB"},
		{"an oversized error", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(500)
			_, _ = w.Write(bytes.Repeat([]byte("x"), 3*maxAnswer))
		}, false, "larger than 1 MiB"},
		{"redirected elsewhere", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL+"/v1/a", http.StatusTemporaryRedirect)
		}, true, "redirects are not followed"},
		{"redirected to itself", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
		}, true, "redirects are not followed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFakeVault()
			f.on("GET a", c.h)
			f.on("PUT a", c.h)
			config := appRole(t)
			// Only what never ends is waited for, each call once.
			config.Timeout = 20 * time.Second
			limit := config.Timeout
			if c.says == "no answer within" {
				config.Timeout, limit = time.Second, 4*time.Second
			}
			cl := serve(t, config, f)
			within(t, limit, func() {
				_, rerr := cl.Read(t.Context(), "a")
				_, werr := cl.Write(t.Context(), "a", map[string]any{"a": "b"})
				for _, err := range []error{rerr, werr} {
					if err == nil || errors.Is(err, ErrNotFound) || errors.Is(err, ErrAway) != c.away || !strings.Contains(err.Error(), c.says) {
						t.Errorf("away: %v, want %v: %v", errors.Is(err, ErrAway), c.away, err)
					}
					if err != nil && (strings.Contains(err.Error(), "html") || len(err.Error()) > 600) {
						t.Errorf("foreign text: %v", err)
					}
				}
			})
			if n := f.count("PUT a"); n != 1 {
				t.Errorf("written %d times", n)
			}
		})
	}
	if elsewhere != 0 {
		t.Errorf("%d requests went elsewhere, with the token", elsewhere)
	}
}

func TestAnAnswerOfTheLargestSizeIsTaken(t *testing.T) {
	f := newFakeVault()
	f.on("GET a", func(w http.ResponseWriter, _ *http.Request) {
		body := []byte(`{"data":{"a":"b"}}`)
		_, _ = w.Write(append(body, bytes.Repeat([]byte(" "), maxAnswer-len(body))...))
	})
	if s, err := serve(t, appRole(t), f).Read(t.Context(), "a"); err != nil || s.Data["a"] != "b" {
		t.Error(s, err)
	}
}

func TestRetryAfterIsHonouredAndBounded(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		began := time.Now()
		f.on("PUT quick", func(w http.ResponseWriter, r *http.Request) {
			if time.Since(began) < time.Second {
				w.Header().Set("Retry-After", "1")
				refuse(429)(w, r)
				return
			}
			data(map[string]any{"a": "b"})(w, r)
		})
		f.on("GET quick", data(map[string]any{"a": "b"}))
		f.on("PUT slow", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", "86400")
			refuse(429)(w, r)
		})
		cl := connect(t, appRole(t), f)
		if _, err := cl.Write(t.Context(), "quick", nil); err != nil || time.Since(began) < time.Second || f.count("PUT quick") != 2 {
			t.Errorf("after %s and %d tries: %v", time.Since(began), f.count("PUT quick"), err)
		}
		began = time.Now()
		if _, err := cl.Write(t.Context(), "slow", nil); !errors.Is(err, ErrAway) || time.Since(began) > 0 {
			t.Errorf("what can't end in time waits for %s: %v", time.Since(began), err)
		}
		if _, err := cl.Read(t.Context(), "quick"); !errors.Is(err, ErrAway) || f.count("GET quick") != 0 {
			t.Errorf("Vault has asked for peace, and is asked again: %v", err)
		}
		time.Sleep(maxHold)
		if _, err := cl.Read(t.Context(), "quick"); err != nil {
			t.Errorf("a Retry-After of a day holds longer than %s: %v", maxHold, err)
		}
	})
}

func TestRetryAfterReadsSecondsAndDates(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	for header, want := range map[string]time.Duration{
		"": 0, "0": 0, "2": 2 * time.Second, "99999999999999999999": 0, "4000000000": maxHold, "-1": 0, "x": 0,
		"Tue, 01 Jan 2030 00:00:05 GMT": 5 * time.Second, "Tue, 01 Jan 2019 00:00:05 GMT": 0, "Tue, 01 Jan 2040 00:00:05 GMT": maxHold,
	} {
		if got := retryAfter(header, now); got != want {
			t.Errorf("%q: %s, want %s", header, got, want)
		}
	}
}

func TestManyCallsShareOneLogin(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("GET a", data(map[string]any{"a": "b"}))
		var once sync.Once
		f.on("PUT auth/approle/login", func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(time.Second)
			once.Do(func() { f.on("PUT auth/approle/login", nil) })
			f.mu.Lock()
			f.tokens["hvs.slow"] = true
			f.mu.Unlock()
			answer(w, 200, map[string]any{"auth": map[string]any{"client_token": "hvs.slow", "lease_duration": 3600}})
		})
		cl := connect(t, appRole(t), f)
		all := func() {
			var g sync.WaitGroup
			for range 100 {
				g.Go(func() {
					if _, err := cl.Read(t.Context(), "a"); err != nil {
						t.Error(err)
					}
				})
			}
			g.Wait()
		}
		all()
		if n := f.loginCount(); n != 1 {
			t.Errorf("%d logins at the start", n)
		}
		f.revokeAll()
		all()
		if n := f.loginCount(); n != 2 {
			t.Errorf("%d logins after the token was revoked, want 2", n)
		}
	})
}

func TestALoginThatHangsHoldsNobodyBeyondTheirDeadline(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("PUT auth/approle/login", hang)
		cl := connect(t, appRole(t), f)
		for _, patience := range []time.Duration{time.Millisecond, time.Second, time.Hour} {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			began := time.Now()
			_, err := cl.Read(ctx, "a")
			if took := time.Since(began); !errors.Is(err, ErrAway) || !errors.Is(err, context.DeadlineExceeded) || took > min(patience, DefaultTimeout) {
				t.Errorf("after %s: %v", took, err)
			}
			cancel()
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := cl.Read(ctx, "a"); !errors.Is(err, context.Canceled) || errors.Is(err, ErrAway) {
			t.Errorf("a caller who has gone: %v", err)
		}
	})
}

func TestARevokedTokenCostsOneLoginAndOneMoreTry(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("GET a", data(map[string]any{"a": "b"}))
		cl := connect(t, appRole(t), f)
		for i := 1; i < 10; i++ {
			if _, err := cl.Read(t.Context(), "a"); err != nil || f.loginCount() != i {
				t.Fatalf("%d logins for %d revoked tokens: %v", f.loginCount()-1, i-1, err)
			}
			f.revokeAll()
			time.Sleep(shortLived)
		}
	})
}

func TestWhatThePolicyDeniesIsNoReasonToLogInAgainAndAgain(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		for _, lookup := range []bool{true, false} {
			f := newFakeVault()
			f.on("GET a", refuse(403, "permission denied"))
			if !lookup {
				f.on("GET "+lookupPath, refuse(403, "permission denied"))
			}
			cl := connect(t, appRole(t), f)
			for range 100 {
				if _, err := cl.Read(t.Context(), "a"); !errors.Is(err, ErrDenied) {
					t.Fatal(err)
				}
			}
			if n := f.loginCount(); n > 2 {
				t.Errorf("%d logins for a denied path (its own lookup allowed: %v)", n, lookup)
			}
			// The role's policies may be others by now, which a new login would have.
			time.Sleep(young)
			before := f.count("GET a")
			_, _ = cl.Read(t.Context(), "a")
			if n, tries := f.loginCount(), f.count("GET a")-before; n < 2 || tries != 2 {
				t.Errorf("%d logins and %d tries with an old token, want a new login and one more try", n, tries)
			}
		}
	})
}

func TestWhatIsDeniedForDaysCostsFewLogins(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		for _, lookup := range []bool{true, false} {
			f := newFakeVault()
			f.life = 0
			f.on("GET denied", refuse(403, "permission denied"))
			f.on("GET also", refuse(403, "permission denied"))
			f.on("GET a", data(map[string]any{"a": "b"}))
			if !lookup {
				f.on("GET "+lookupPath, refuse(403, "permission denied"))
			}
			c := appRole(t)
			cl := connect(t, c, f)
			ask := func(d, every time.Duration) int {
				t.Helper()
				before := f.loginCount()
				for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(every) {
					for _, path := range []string{"denied", "also"} {
						if _, err := cl.Read(t.Context(), path); !errors.Is(err, ErrDenied) {
							t.Fatal(err)
						}
					}
					if _, err := cl.Read(t.Context(), "a"); err != nil {
						t.Fatal(err)
					}
				}
				return f.loginCount() - before
			}
			// 1, 2, 4 … 60 minutes apart, for each path.
			if n := ask(2*time.Hour, 5*time.Second); n < 2 || n > 18 {
				t.Errorf("%d logins in two hours", n)
			}
			if n := ask(24*time.Hour, time.Minute); n < 12 || n > 50 {
				t.Errorf("%d logins in the day after", n)
			}
			// What works gets its login at once, whatever else is denied.
			f.revokeAll()
			if _, err := cl.Read(t.Context(), "a"); err != nil {
				t.Errorf("after the token is revoked: %v", err)
			}
			ask(10*time.Minute, 10*time.Second)
			// So does the rest, with another secret or once it has worked.
			write(t, c.Login.SecretIDFile, "another secret-id")
			if n := ask(10*time.Second, time.Second); n < 1 {
				t.Error("another secret is not tried")
			}
			ask(3*time.Hour, time.Minute)
			f.on("GET denied", data(map[string]any{"a": "b"}))
			if _, err := cl.Read(t.Context(), "denied"); err != nil {
				t.Error(err)
			}
			f.revokeAll()
			if _, err := cl.Read(t.Context(), "denied"); err != nil {
				t.Errorf("after it has worked: %v", err)
			}
		}
	})
}

func TestATokenThatWorksIsKeptWhenANewLoginIsRefused(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("GET a", data(map[string]any{"a": "b"}))
		f.on("GET denied", refuse(403, "permission denied"))
		cl := connect(t, appRole(t), f)
		if _, err := cl.Read(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		f.on("PUT auth/approle/login", refuse(400, "invalid role or secret ID"))
		for range 10 {
			time.Sleep(2 * young)
			if _, err := cl.Read(t.Context(), "denied"); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "permission denied") {
				t.Fatal(err)
			}
			if _, err := cl.Read(t.Context(), "a"); err != nil {
				t.Fatalf("the token was given up: %v", err)
			}
		}
	})
}

func TestARefusedLoginIsNotTriedAgainAtOnceUnlessWithAnotherSecret(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		// Only what counts towards a lockout of the role is left for so long.
		for status, logins := range map[int][2]int{400: {1, 1}, 403: {45, 66}, 404: {45, 66}} {
			f := newFakeVault()
			f.on("GET a", data(map[string]any{"a": "b"}))
			f.on("PUT auth/approle/login", func(w http.ResponseWriter, r *http.Request) {
				f.mu.Lock()
				last := f.logins[len(f.logins)-1]["secret_id"]
				f.mu.Unlock()
				if last != "a-new-one" {
					refuse(status, "invalid role or secret ID")(w, r)
					return
				}
				f.mu.Lock()
				f.tokens["hvs.x"] = true
				f.mu.Unlock()
				answer(w, 200, map[string]any{"auth": map[string]any{"client_token": "hvs.x"}})
			})
			config := appRole(t)
			cl := connect(t, config, f)
			for range 100 {
				_, err := cl.Read(t.Context(), "a")
				if !errors.Is(err, ErrDenied) || errors.Is(err, ErrNotFound) || errors.Is(err, ErrRefused) || errors.Is(err, ErrAway) {
					t.Fatalf("a login refused with %d: %v", status, err)
				}
			}
			if n := f.loginCount(); n != 1 {
				t.Errorf("%d logins at once", n)
			}
			for range 600 {
				time.Sleep(time.Second)
				_, _ = cl.Read(t.Context(), "a")
			}
			if n := f.loginCount(); n < logins[0] || n > logins[1] {
				t.Errorf("%d logins in ten minutes with what is refused with %d, want %d to %d", n, status, logins[0], logins[1])
			}
			if st := cl.Status(); st.LoggedIn || st.Away || !st.Refused || !strings.Contains(st.Why, "login is refused") {
				t.Errorf("status is %+v", st)
			}
			write(t, config.Login.SecretIDFile, "a-new-one\n")
			if _, err := cl.Read(t.Context(), "a"); err != nil {
				t.Errorf("the secret-id was replaced, and still: %v", err)
			}
			if st := cl.Status(); !st.LoggedIn || st.Why != "" || !st.TokenUntil.IsZero() {
				t.Errorf("status is %+v", st)
			}
		}
	})
}

// Vault's own minimal build has no kubernetes login, so this is a fake of it, as its documentation says that it is.
type fakeKubernetesLogin struct {
	*fakeVault
	role, jwt string
}

func (f *fakeKubernetesLogin) login(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	last := f.logins[len(f.logins)-1]
	ok := last["role"] == f.role && last["jwt"] == f.jwt && len(last) == 2
	if ok {
		f.tokens["hvs.kubernetes"] = true
	}
	f.mu.Unlock()
	if !ok {
		refuse(403, "permission denied")(w, r)
		return
	}
	answer(w, 200, map[string]any{"auth": map[string]any{"client_token": "hvs.kubernetes", "lease_duration": 60, "renewable": true}})
}

func TestTheKubernetesLoginReadsItsTokenAnew(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := &fakeKubernetesLogin{newFakeVault(), "signet", "header.claims-1.sig"}
		f.on("PUT auth/kubernetes/login", f.login)
		f.on("GET a", data(map[string]any{"a": "b"}))
		path := secretFile(t, "token", "header.claims-1.sig\n")
		cl := connect(t, Config{Address: "http://localhost:1", Login: Login{Method: "kubernetes", Role: "signet", JWTFile: path}}, f)
		if _, err := cl.Read(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		// The kubelet replaces it long before Vault's token ends.
		f.mu.Lock()
		f.jwt = "header.claims-2.sig"
		f.mu.Unlock()
		write(t, path, "header.claims-2.sig")
		time.Sleep(61 * time.Second)
		f.revokeAll()
		if _, err := cl.Read(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		if n := f.loginCount(); n != 2 {
			t.Errorf("%d logins", n)
		}
	})
}

func TestTheNamespaceIsInEachRequestButThatForHealth(t *testing.T) {
	f := newFakeVault()
	f.on("GET a", data(map[string]any{"a": "b"}))
	config := appRole(t)
	config.Namespace = "mesh/east"
	cl := connect(t, config, f)
	if _, err := cl.Read(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := cl.health(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, h := range f.heads {
		want := "mesh/east"
		if strings.HasSuffix(f.seen[i], healthPath) {
			want = ""
		}
		if got := h.Get("X-Vault-Namespace"); got != want || h.Get("X-Vault-Request") != "true" {
			t.Errorf("%s has the namespace %q, want %q", f.seen[i], got, want)
		}
	}
	if len(f.seen) != 3 {
		t.Error(f.seen)
	}
}

func TestTheEnvironmentDecidesNothing(t *testing.T) {
	f := newFakeVault()
	f.on("GET a", data(map[string]any{"a": "b"}))
	for name, value := range map[string]string{
		"VAULT_TOKEN": "hvs.of-the-environment", "VAULT_NAMESPACE": "env", "VAULT_HEADERS": `{"X-Env":"1"}`, "VAULT_ADDR": "http://127.0.0.1:2",
		"VAULT_WRAP_TTL": "60s", "HTTP_PROXY": "http://127.0.0.1:3", "VAULT_HTTP_PROXY": "http://127.0.0.1:3", "VAULT_MAX_RETRIES": "7", "VAULT_CLIENT_TIMEOUT": "1ms",
	} {
		t.Setenv(name, value)
	}
	cl := serve(t, appRole(t), f)
	if _, err := cl.Read(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	for _, h := range f.heads {
		for name, values := range h {
			if s := fmt.Sprint(name, values); strings.Contains(s, "nv") && name != "X-Vault-Token" && !strings.HasPrefix(s, "Accept") || strings.Contains(s, "of-the-environment") || name == "X-Vault-Wrap-Ttl" {
				t.Errorf("from the environment: %s", s)
			}
		}
	}
	t.Setenv("VAULT_MAX_RETRIES", "many")
	if _, err := New(appRole(t)); err == nil || !strings.Contains(err.Error(), "VAULT_") {
		t.Errorf("a broken variable: %v", err)
	}
}

// echo is a server that says all it gets, where errors and logs are made of what it says.
type echo struct{ *fakeVault }

func (e echo) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.fakeVault.ServeHTTP(httptest.NewRecorder(), r)
	var body bytes.Buffer
	e.mu.Lock()
	if n := len(e.logins); n > 0 {
		fmt.Fprint(&body, e.logins[n-1])
	}
	e.mu.Unlock()
	said := []string{
		"got " + r.Header.Get("X-Vault-Token") + " and " + body.String(), strings.Repeat("x", maxMessage-8) + r.Header.Get("X-Vault-Token"),
		"\x1b[31mred\x07\u202e" + strings.Repeat("long ", 5000), "two\nlines", "five", "six",
	}
	switch r.URL.Path {
	case "/v1/auth/jwt/login", "/v1/auth/approle/login":
		if !strings.Contains(body.String(), "good") {
			refuse(400, said...)(w, r)
			return
		}
		answer(w, 200, map[string]any{"auth": map[string]any{"client_token": "hvs.given-and-secret", "lease_duration": 60}})
	case "/v1/redirect":
		http.Redirect(w, r, "https://"+r.Header.Get("X-Vault-Token")+"@"+r.Header.Get("X-Vault-Token")+".elsewhere/"+r.Header.Get("X-Vault-Token"), http.StatusTemporaryRedirect)
	default:
		refuse(500, said...)(w, r)
	}
}

func TestNoSecretIsInErrorsLogsOrDumps(t *testing.T) {
	secrets := []string{"good-secret-id", "bad-secret-id", "hvs.given-and-secret", "good.jwt", "bad.jwt", "hvs.from-file"}
	for _, l := range []Login{
		{Method: "approle", RoleID: "r", SecretIDFile: secretFile(t, "s", "good-secret-id")},
		{Method: "approle", RoleID: "r", SecretIDFile: secretFile(t, "s", "bad-secret-id")},
		{Method: "jwt", Role: "r", JWTFile: secretFile(t, "s", "good.jwt")},
		{Method: "jwt", Role: "r", JWTFile: secretFile(t, "s", "bad.jwt")},
		{Method: "token", TokenFile: secretFile(t, "s", "hvs.from-file")},
	} {
		bubble.Test(t, func(t *testing.T) {
			var log bytes.Buffer
			config := Config{Address: "http://127.0.0.1:1", Login: l, Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})), Metrics: prometheus.NewRegistry()}
			cl := connect(t, config, echo{newFakeVault()})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			var said strings.Builder
			for _, path := range []string{"a", "redirect"} {
				_, err := cl.Read(ctx, path)
				if err == nil || len(err.Error()) > 3000 {
					t.Errorf("an error of %d bytes", len(err.Error()))
				}
				for _, r := range err.Error() {
					if r < ' ' || r == '\u202e' {
						t.Errorf("control characters in %q", err)
						break
					}
				}
				fmt.Fprintf(&said, "%v %+v %#v\n", err, err, err)
			}
			_ = cl.Run(ctx)
			cl.mu.Lock()
			s := cl.cur
			cl.mu.Unlock()
			fmt.Fprintf(&said, "%v %+v %#v %s\n", cl, cl, cl, cl)
			fmt.Fprintf(&said, "%v %+v %#v\n", config, config, config)
			fmt.Fprintf(&said, "%+v %#v %+v %#v\n", cl.Status(), cl.Status(), s, s)
			slog.New(slog.NewTextHandler(&log, nil)).Info("x", "client", cl, "config", config, "status", cl.Status())
			if !strings.Contains(log.String(), "Vault") {
				t.Error("nothing is in the log: this shows nothing")
			}
			for _, secret := range secrets {
				for where, text := range map[string]string{"what was said": said.String(), "the log": log.String()} {
					// Not even where a bound cuts a message within the secret.
					if strings.Contains(text, secret[:7]) {
						t.Errorf("%s has %q in it: %s", where, secret, text)
					}
				}
			}
		})
	}
}

func TestAConfigurationThatContradictsItselfIsRefused(t *testing.T) {
	good := appRole(t)
	for _, c := range []struct {
		change func(*Config)
		says   string
	}{
		{func(c *Config) { c.Address = "" }, "vault.address is missing"},
		{func(c *Config) { c.Address = "vault.example.org:8200" }, "want https://"},
		{func(c *Config) { c.Address = "https://user:pass@vault.example.org" }, "want https://"},
		{func(c *Config) { c.Address = "https://vault.example.org?a=b" }, "want https://"},
		{func(c *Config) { c.Address = "http://vault.example.org:8200" }, "in the clear"},
		{func(c *Config) { c.Address = "http://10.0.0.1:8200" }, "in the clear"},
		{func(c *Config) { c.Address = "unix:///run/vault.sock" }, "want https://"},
		{func(c *Config) { c.CAFile = "/nowhere" }, "for https"},
		{func(c *Config) { c.Address, c.CAFile = "https://v", "/nowhere" }, "vault.ca_file"},
		{func(c *Config) { c.Address, c.CAFile = "https://v", c.Login.SecretIDFile }, "no certificate in it"},
		{func(c *Config) { c.Timeout = time.Millisecond }, "vault.timeout"},
		{func(c *Config) { c.Timeout = time.Hour }, "vault.timeout"},
		{func(c *Config) { c.Namespace = "/a/" }, "vault.namespace"},
		{func(c *Config) { c.Namespace = "a\r\nX-Evil: 1" }, "vault.namespace"},
		{func(c *Config) { c.Login.Method = "userpass" }, "use one of"},
		{func(c *Config) { c.Login.Method = "" }, "use one of"},
		{func(c *Config) { c.Login.RoleID = "" }, "role_id is missing"},
		{func(c *Config) { c.Login.SecretIDFile = "" }, "secret_id_file is missing"},
		{func(c *Config) { c.Login.TokenFile = "/t" }, "token_file is nothing that the method approle knows"},
		{func(c *Config) { c.Login.Role = "r" }, "role is nothing"},
		{func(c *Config) { c.Login.Mount = "../x" }, "vault.login.mount"},
		{func(c *Config) { c.Login.CertFile = "/c" }, "belong together"},
		{func(c *Config) { c.Login.CertFile, c.Login.KeyFile = "/c", "/k" }, "needs https"},
		{func(c *Config) { c.Login = Login{Method: "token"} }, "token_file is missing"},
		{func(c *Config) { c.Login = Login{Method: "jwt", JWTFile: "/j"} }, "role is missing"},
		{func(c *Config) { c.Login = Login{Method: "kubernetes", JWTFile: "/j"} }, "role is missing"},
		{func(c *Config) { c.Login = Login{Method: "cert", Role: "r"} }, "cert_file is missing"},
		{func(c *Config) {
			c.Address, c.Login = "https://v", Login{Method: "cert", CertFile: "/nowhere/c", KeyFile: "/nowhere/k"}
		}, "cert_file"},
	} {
		bad := good
		c.change(&bad)
		if cl, err := New(bad); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: %v, want %q", bad, err, c.says)
			if cl != nil {
				cl.Close()
			}
		}
	}
	for _, address := range []string{"http://127.0.0.1:8200", "http://[::1]:8200", "http://localhost:8200/", "https://vault.example.org", "https://vault.example.org:8200/behind/a/path"} {
		ok := good
		ok.Address = address
		cl, err := New(ok)
		if err != nil {
			t.Errorf("%s: %v", address, err)
			continue
		}
		cl.Close()
	}
}

func TestMetricsAreThereFromTheStart(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("GET a", data(map[string]any{"a": "b"}))
		f.on("GET sealed", refuse(503, "Vault is sealed"))
		config := appRole(t)
		registry := prometheus.NewRegistry()
		config.Metrics = registry
		cl := connect(t, config, f)
		if n := testutil.CollectAndCount(cl.metrics.requests); n != len(operations)*len(results) {
			t.Errorf("%d series at the start", n)
		}
		gauge := func(name string) float64 {
			t.Helper()
			all, err := registry.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range all {
				if m.GetName() == name {
					return m.GetMetric()[0].GetGauge().GetValue()
				}
			}
			t.Fatalf("no %s", name)
			return 0
		}
		if gauge("signet_vault_up") != 0 || gauge("signet_vault_token_expiry_timestamp_seconds") != 0 {
			t.Error("up before anything was heard")
		}
		_, _ = cl.Read(t.Context(), "a")
		if got, want := gauge("signet_vault_token_expiry_timestamp_seconds"), float64(time.Now().Unix()+3600); gauge("signet_vault_up") != 1 || got != want {
			t.Errorf("up %v, token until %v, want %v", gauge("signet_vault_up"), got, want)
		}
		_, _ = cl.Read(t.Context(), "none")
		_, _ = cl.Read(t.Context(), "sealed")
		if gauge("signet_vault_up") != 0 {
			t.Error("up while sealed")
		}
		for result, want := range map[string]float64{"ok": 1, "not_found": 1, "away": 1, "denied": 0} {
			if got := testutil.ToFloat64(cl.metrics.requests.WithLabelValues(opRead, result)); got != want {
				t.Errorf("%v reads were %s, want %v", got, result, want)
			}
		}
		if got := testutil.ToFloat64(cl.metrics.requests.WithLabelValues(opLogin, "ok")); got != 1 {
			t.Errorf("%v logins", got)
		}
		if _, err := New(config); err == nil {
			t.Error("two connections share one set of metrics")
		}
	})
}

func TestALoginWithoutAUsableTokenIsRefused(t *testing.T) {
	for _, body := range []string{
		``, `{}`, `{"auth":null}`, `{"auth":{}}`, `{"auth":{"client_token":""}}`, `{"auth":{"client_token":"a\nb"}}`, `{"auth":{"client_token":"a b"}}`,
		`{"auth":{"client_token":"` + strings.Repeat("a", maxToken+1) + `"}}`, `{"auth":{"mfa_requirement":{"mfa_request_id":"x"}}}`, `{"wrap_info":{"token":"hvs.wrapped"}}`,
	} {
		f := newFakeVault()
		f.on("PUT auth/approle/login", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(body)) })
		cl := connect(t, appRole(t), f)
		if _, err := cl.Read(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), "no token") || errors.Is(err, ErrNotFound) {
			t.Errorf("%.40s: %v", body, err)
		}
	}
}

func TestASecretFileHoldsOneSecret(t *testing.T) {
	for _, content := range []string{"", "\n", "a\nb", "a\x00b", strings.Repeat("a", maxToken+1)} {
		config := appRole(t)
		write(t, config.Login.SecretIDFile, content)
		f := newFakeVault()
		if _, err := connect(t, config, f).Read(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), "secret_id_file") || f.loginCount() != 0 {
			t.Errorf("%.10q: %v", content, err)
		}
	}
}

// TestATokenWhereASecretIDBelongsIsNotShown: whoever has wrapped a secret-id has a token in hand, and Vault would only say that the
// login is refused, and after a few times lock the role.
func TestATokenWhereASecretIDBelongsIsNotShown(t *testing.T) {
	for _, token := range []string{"hvs.CAESIJzWrapped0Token0That0Is0Long", "hvb.AAAAAQJzBatch0Token0That0Is0Long", "s.9zDx2bYkWrapped0Token012", "s.9zDx2bYkWrapped0Token012.nsid1"} {
		config := appRole(t)
		write(t, config.Login.SecretIDFile, token+"\n")
		f := newFakeVault()
		_, err := connect(t, config, f).Read(t.Context(), "a")
		if err == nil || !strings.Contains(err.Error(), config.Login.SecretIDFile+" holds a token of Vault") || !strings.Contains(err.Error(), "vault unwrap") || f.loginCount() != 0 {
			t.Errorf("%.4s: %v after %d logins", token, err, f.loginCount())
		}
		if err != nil && strings.Contains(err.Error(), token[4:]) {
			t.Errorf("the token is said: %v", err)
		}
	}
	// Who makes secret-ids of his own may begin them like that.
	for _, id := range []string{"s.short", "hvs.", "hvsx.CAESIJzWrapped0Token0That0Is0Long"} {
		config := appRole(t)
		write(t, config.Login.SecretIDFile, id)
		f := newFakeVault()
		if _, err := connect(t, config, f).Read(t.Context(), "a"); err != nil && strings.Contains(err.Error(), "holds a token") {
			t.Errorf("%s: %v", id, err)
		}
	}
}

func TestDigestsTellSecretsApart(t *testing.T) {
	config := appRole(t)
	cl := dial(t, config)
	a, err := cl.credential()
	if err != nil || a.digest != sha256.Sum256([]byte(testSecretID)) {
		t.Fatal(err)
	}
}
