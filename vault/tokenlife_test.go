package vault

import (
	"net/http"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/bubble"
)

// handMade is a token of a fake Vault as somebody has made it for a file.
type handMade struct {
	path string
	made time.Time
	// first is the lease that it got, explicit and mount are greatest lives, of which Vault tells the first only; 0 = none.
	first, explicit, mount time.Duration
	period                 bool
	renewable              bool
	until                  time.Time
	// ahead is how far Vault's clock is.
	ahead time.Duration
}

func (h *handMade) greatest() time.Duration {
	if h.explicit > 0 {
		return h.explicit
	}
	return h.mount
}

func (h *handMade) lookup(w http.ResponseWriter, r *http.Request) {
	if !time.Now().Before(h.until) {
		refuse(403, "permission denied", "invalid token")(w, r)
		return
	}
	of := map[string]any{
		"path": h.path, "creation_time": h.made.Add(h.ahead).Unix(), "creation_ttl": int(h.first.Seconds()), "explicit_max_ttl": int(h.explicit.Seconds()),
		"expire_time": h.until.Add(h.ahead).UTC().Format(time.RFC3339Nano), "renewable": h.renewable, "ttl": int(time.Until(h.until).Seconds()),
	}
	if h.period {
		of["period"] = int(h.first.Seconds())
	}
	data(of)(w, r)
}

func (h *handMade) renew(w http.ResponseWriter, r *http.Request) {
	if !time.Now().Before(h.until) {
		refuse(403, "permission denied", "invalid token")(w, r)
		return
	}
	lease, warnings := h.first, []string(nil)
	if greatest := h.greatest(); greatest > 0 && time.Until(h.made.Add(greatest)) < lease {
		lease, warnings = time.Until(h.made.Add(greatest)), []string{"TTL of \"1h\" exceeded the effective max_ttl; TTL value is capped accordingly"}
	}
	h.until = time.Now().Add(lease)
	answer(w, 200, map[string]any{
		"auth": map[string]any{"client_token": r.Header.Get("X-Vault-Token"), "lease_duration": int(lease.Seconds()), "renewable": true}, "warnings": warnings,
	})
}

// That a token in a file ends, and which share of its life is left, is known from when it can be known to its end: over renewals,
// over looks at the same token and over a restart.
func TestTheEndOfATokenInAFileIsKnownUntilItComes(t *testing.T) {
	const long = 10 * time.Hour
	for name, c := range map[string]struct {
		handMade
		age time.Duration
		// from is when it has to be known, in shares of its life; more than 1 = never.
		from float64
	}{
		"that can't be renewed":                    {handMade{path: "auth/token/create", first: long}, time.Second, 0},
		"met late in its life":                     {handMade{path: "auth/token/create", first: long}, long * 3 / 4, 0},
		"of a minute":                              {handMade{path: "auth/token/create", first: time.Minute}, time.Second, 0},
		"with a greatest life of its own":          {handMade{path: "auth/token/create", first: time.Hour, explicit: long, renewable: true}, time.Second, 0},
		"that the mount bounds, as it was made":    {handMade{path: "auth/token/create", first: long, mount: long, renewable: true}, time.Second, 0},
		"that the mount bounds, met late":          {handMade{path: "auth/token/create", first: long, mount: long, renewable: true}, long * 3 / 4, 0},
		"that the mount bounds":                    {handMade{path: "auth/token/create-orphan", first: long / 3, mount: long, renewable: true}, time.Second, 0.8},
		"that is renewed for ever":                 {handMade{path: "auth/token/create", first: time.Hour, renewable: true}, time.Second, 2},
		"of a period":                              {handMade{path: "auth/token/create/role", first: time.Hour, period: true, renewable: true}, time.Second, 2},
		"of a login, which is made again":          {handMade{path: "auth/approle/login", first: time.Hour, mount: long, renewable: true}, time.Second, 2},
		"of a Vault whose clock is an hour behind": {handMade{path: "auth/token/create", first: long, ahead: -time.Hour}, time.Second, 0},
	} {
		t.Run(name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				h := c.handMade
				h.made = time.Now().Add(-c.age)
				h.until = h.made.Add(h.first)
				f := newFakeVault()
				f.tokens["hvs.one"] = true
				f.on("GET "+lookupPath, h.lookup)
				f.on("PUT auth/token/renew-self", h.renew)
				cl := connect(t, Config{Address: "http://127.0.0.1:1", Login: Login{Method: "token", TokenFile: secretFile(t, "token", "hvs.one")}}, f)
				life := h.greatest()
				if life == 0 {
					life = h.first
				}
				left := time.Until(h.made.Add(life))
				if c.from > 1 && h.greatest() == 0 {
					left = long
				}
				keepFor(t, cl, left, func() {
					step := left / 200
					for end := time.Now().Add(left - 2*step); time.Now().Before(end); {
						time.Sleep(step)
						st, share := cl.Status(), float64(time.Since(h.made))/float64(life)
						switch known := !st.TokenEnds.IsZero(); {
						case !st.LoggedIn:
							t.Fatalf("after %.2f of its life there is no token: %+v", share, st)
						case c.from > 1 && known:
							t.Fatalf("after %s it is said to end at %s", time.Since(h.made), st.TokenEnds)
						case c.from > 1 || !known && share < c.from:
						case !known:
							t.Fatalf("after %.2f of its life nothing is known of its end", share)
						case st.TokenEnds.Sub(h.made.Add(life)).Abs() > 3*time.Second || st.TokenBegan.Sub(h.made).Abs() > 3*time.Second:
							t.Fatalf("after %.2f of its life it is said to live from %s to %s, and does from %s to %s", share, st.TokenBegan, st.TokenEnds, h.made, h.made.Add(life))
						}
					}
				})
			})
		})
	}
}

// What is said of a token that ends is mended by another one in the file: that is not left until the old one ends.
func TestAnotherTokenInTheFileIsTakenSoon(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := newFakeVault()
		f.life, f.renewable = 3600, false
		f.tokens["hvs.first"], f.tokens["hvs.second"] = true, true
		path := secretFile(t, "token", "hvs.first")
		cl := connect(t, Config{Address: "http://127.0.0.1:1", Login: Login{Method: "token", TokenFile: path}}, f)
		keepFor(t, cl, 10*time.Minute, func() {
			time.Sleep(5 * time.Minute)
			first := cl.Status().TokenEnds
			write(t, path, "hvs.refused")
			time.Sleep(2 * pulse)
			if st := cl.Status(); !st.LoggedIn || !st.Refused || !st.TokenEnds.Equal(first) {
				t.Errorf("with a token that Vault does not know in the file: %+v", st)
			}
			write(t, path, "hvs.second")
			time.Sleep(3 * pulse)
			if st := cl.Status(); st.Refused || !st.TokenEnds.After(first.Add(4*time.Minute)) {
				t.Errorf("the old one is used on: %+v, it ended at %s", st, first)
			}
			before := f.count("GET " + lookupPath)
			time.Sleep(2 * time.Minute)
			if n := f.count("GET "+lookupPath) - before; n > 20 {
				t.Errorf("looked up %d times in two minutes", n)
			}
		})
	})
}
