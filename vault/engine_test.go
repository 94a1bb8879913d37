package vault

import (
	"bytes"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/signet-ca/signet/test/bubble"
)

// lines is a log that a test reads.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), what)
}

// TestASickEngineIsLeftAloneAndAWellOneIsNot has only signatures fail, for many who want one.
func TestASickEngineIsLeftAloneAndAWellOneIsNot(t *testing.T) {
	for name, sick := range map[string]http.HandlerFunc{
		"429": refuse(429, "request path: rate limit quota exceeded"), "412": refuse(412, "required index state not present"),
		"500": refuse(500, "internal error"), "503": refuse(503, "request path: overloaded"), "hang": hang,
	} {
		t.Run(name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				const sign = "PUT transit/sign/k"
				f := newFakeVault()
				f.on("GET secret/data/x", data(map[string]any{"a": "b"}))
				f.on(sign, data(map[string]any{"signature": "s"}))
				var log lines
				registry := prometheus.NewRegistry()
				conf := appRole(t)
				conf.Logger, conf.Metrics = slog.New(slog.NewTextHandler(&log, nil)), registry
				cl := connect(t, conf, f)
				signs, shares := cl.Engine("transit/sign"), cl.Engine("secret")
				if signs != cl.Engine("transit/sign") {
					t.Error("two ways of one name")
				}
				up := func() float64 {
					all, err := registry.Gather()
					if err != nil {
						t.Fatal(err)
					}
					for _, m := range all {
						for _, one := range m.GetMetric() {
							for _, l := range one.GetLabel() {
								if m.GetName() == "signet_vault_engine_up" && l.GetValue() == "transit/sign" {
									return one.GetGauge().GetValue()
								}
							}
						}
					}
					t.Fatal("no metric of the engine")
					return 0
				}
				keepFor(t, cl, time.Hour, func() {
					var all sync.WaitGroup
					stop := make(chan struct{})
					for n := range 50 {
						all.Go(func() {
							for {
								select {
								case <-stop:
									return
								case <-time.After(100*time.Millisecond + time.Duration(n)*7*time.Millisecond):
								}
								if signs.Ready() == nil {
									if _, err := signs.Write(t.Context(), "transit/sign/k", nil); err != nil && !errors.Is(err, ErrAway) {
										t.Error(err)
									}
								}
							}
						})
					}
					time.Sleep(10 * time.Second)
					if since, why := signs.Trouble(); !since.IsZero() || up() != 1 {
						t.Fatalf("trouble since %s (%s) though all is well", since, why)
					}
					begun := time.Now()
					f.on(sign, sick)
					time.Sleep(10 * time.Second)
					since, why := signs.Trouble()
					if since.IsZero() || since.Before(begun) || since.After(begun.Add(4*time.Second)) || !strings.Contains(why, "transit/sign of Vault at") || up() != 0 {
						t.Fatalf("trouble since %s (%s), which began at %s", since, why, begun)
					}
					before, calls := f.count(sign), 0
					for range 60 {
						time.Sleep(time.Second)
						if now, _ := signs.Trouble(); now != since {
							t.Fatalf("since %s, before that %s", now, since)
						}
						if st := cl.Status(); st.Away {
							t.Fatalf("all of Vault is away: %+v", st)
						}
						if calls++; calls%5 == 0 {
							if _, err := shares.Read(t.Context(), "secret/data/x"); err != nil {
								t.Errorf("what is well is cut off: %v", err)
							}
						}
					}
					if n := f.count(sign) - before; n < 8 || n > 40 {
						t.Errorf("%d calls in a minute", n)
					}
					f.on(sign, data(map[string]any{"signature": "s"}))
					time.Sleep(10 * time.Second)
					if since, why := signs.Trouble(); !since.IsZero() || up() != 1 {
						t.Errorf("trouble since %s (%s) after it", since, why)
					}
					close(stop)
					all.Wait()
				})
				for line, want := range map[string]int{"an engine of Vault does not do its work": 1, "the engine of Vault is back": 1, "Vault is away": 0} {
					if n := log.count(line); n != want {
						t.Errorf("%q %d times in the log, want %d:\n%s", line, n, want, log.text.String())
					}
				}
			})
		})
	}
}

// TestAVaultThatIsAwayIsFoundOutByWhatItsEnginesLack: that nothing works is known soon, though only one engine is asked.
func TestAVaultThatIsAwayIsFoundOutByWhatItsEnginesLack(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		h := http.HandlerFunc(f.ServeHTTP)
		away := false
		var mu sync.Mutex
		cl := connect(t, appRole(t), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			shut := away
			mu.Unlock()
			if shut {
				refuse(503, "Vault is sealed")(w, r)
				return
			}
			h(w, r)
		}))
		f.on("PUT transit/sign/k", data(map[string]any{"signature": "s"}))
		signs := cl.Engine("transit/sign")
		keepFor(t, cl, time.Hour, func() {
			if _, err := signs.Write(t.Context(), "transit/sign/k", nil); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			mu.Lock()
			away = true
			mu.Unlock()
			_, _ = signs.Write(t.Context(), "transit/sign/k", nil)
			time.Sleep(2 * time.Second)
			if !cl.Status().Away {
				t.Error("one engine was asked, and nobody looked at the rest")
			}
			mu.Lock()
			away = false
			mu.Unlock()
			time.Sleep(2 * maxOpen)
			if cl.Status().Away {
				t.Error("it is not back")
			}
			if since, why := signs.Trouble(); !since.IsZero() {
				t.Errorf("%s: one failure is no trouble", why)
			}
		})
	})
}

// TestWhileAnEngineIsTriedOneHearsThatItIsReady, and the others that it is not: each would lose what it has written before.
func TestWhileAnEngineIsTriedOneHearsThatItIsReady(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("PUT transit/sign/k", refuse(503, "overloaded"))
		signs := connect(t, appRole(t), f).Engine("transit/sign")
		for range tripAfter {
			_, _ = signs.Write(t.Context(), "transit/sign/k", nil)
		}
		if err := signs.Ready(); !errors.Is(err, ErrAway) || !strings.Contains(err.Error(), "overloaded") {
			t.Errorf("ready: %v", err)
		}
		for range 3 { // whoever heard it may have gone away
			time.Sleep(maxOpen)
			n := 0
			for range 50 {
				if signs.Ready() == nil {
					n++
				}
			}
			if n != 1 {
				t.Errorf("%d may try", n)
			}
		}
		time.Sleep(newsLasts)
		if since, why := signs.Trouble(); !since.IsZero() {
			t.Errorf("nobody has asked for %s, and it is said that %s", newsLasts, why)
		}
	})
}

func TestAnEngineIsHeldAloneForARetryAfter(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("GET secret/data/x", data(map[string]any{"a": "b"}))
		f.on("PUT transit/sign/k", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", "20")
			refuse(429, "rate limit quota exceeded")(w, r)
		})
		cl := connect(t, appRole(t), f)
		signs := cl.Engine("transit/sign")
		if _, err := signs.Write(t.Context(), "transit/sign/k", nil); !errors.Is(err, ErrAway) {
			t.Fatal(err)
		}
		time.Sleep(15 * time.Second)
		_, err := signs.Write(t.Context(), "transit/sign/k", nil)
		if since, _ := signs.Trouble(); since.IsZero() || err == nil || signs.Ready() == nil || f.count("PUT transit/sign/k") != 1 {
			t.Errorf("it is not left alone: trouble since %s, %v", since, err)
		}
		if _, err := cl.Engine("secret").Read(t.Context(), "secret/data/x"); err != nil {
			t.Error(err)
		}
	})
}

func TestEnginesAreThereOnceTheyWereAsked(t *testing.T) {
	f := newFakeVault()
	registry := prometheus.NewRegistry()
	conf := appRole(t)
	conf.Metrics = registry
	cl := connect(t, conf, f)
	e := cl.Engine("secret")
	if n, err := testutil.GatherAndCount(registry, "signet_vault_engine_up"); err != nil || n != 0 {
		t.Errorf("%d series, %v", n, err)
	}
	_, _ = e.Read(t.Context(), "secret/data/x")
	_, _ = e.List(t.Context(), "secret/metadata")
	if n, err := testutil.GatherAndCount(registry, "signet_vault_engine_up"); err != nil || n != 2 {
		t.Errorf("%d series, %v", n, err)
	}
}

// Nobody may ask a failing engine for minutes; a refused login that has become good shows all the same.
func TestALoginIsTriedAgainWhileAnEngineFails(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.on("PUT transit/sign/k", refuse(503, "overloaded"))
		cl := connect(t, appRole(t), f)
		keepFor(t, cl, time.Hour, func() {
			time.Sleep(2 * time.Minute) // a new token may have other permissions
			denied := refuse(403, "permission denied")
			f.on("GET secret/data/x", denied)
			f.on("PUT auth/approle/login", denied)
			_, err := cl.Engine("transit/sign").Write(t.Context(), "transit/sign/k", nil)
			if err == nil {
				t.Fatal("signed")
			}
			if _, err := cl.Read(t.Context(), "secret/data/x"); err == nil || !cl.Status().Refused {
				t.Fatalf("%v, %+v", err, cl.Status())
			}
			f.mu.Lock()
			delete(f.paths, "PUT auth/approle/login")
			f.mu.Unlock()
			time.Sleep(40 * time.Second)
			if st := cl.Status(); st.Refused || !st.LoggedIn {
				t.Fatalf("40 s after it would be accepted again: %+v", st)
			}
		})
	})
}
