//go:build real

package vault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/signet-ca/signet/test/lab"
)

// shared is the real Vault with an engine for documents.
var shared = sync.OnceValues(func() (*lab.Vault, error) {
	v, err := theVault.Get()
	if err != nil {
		return nil, err
	}
	return v, v.Mount(context.Background(), "secret", "kv")
})

// realVault is the Vault, with a policy of the test's name for what is under secret/<name>/, and something to read there.
func realVault(t *testing.T) (v *lab.Vault, name string) {
	t.Helper()
	v, err := shared()
	if err != nil {
		t.Fatal(err)
	}
	name = strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-"))
	if err := v.Policy(t.Context(), name, Policy(realNeeds(name))); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Root().Write(t.Context(), "secret/data/"+name+"/a", map[string]any{"data": map[string]any{"says": "hello"}}); err != nil {
		t.Fatal(err)
	}
	return v, name
}

func realNeeds(name string) []Need {
	return append(Needs(),
		Need{"secret/data/" + name + "/*", []string{"create", "read", "update", "delete"}, "documents", nil, nil},
		Need{"secret/metadata/" + name + "/*", []string{"read", "list"}, "their names", nil, nil},
	)
}

// logins are the ways to log in, with tokens of a life, to a role or user of the test's name.
var logins = map[string]func(*testing.T, *lab.Vault, string, lab.VaultLife) Login{
	"token": func(t *testing.T, v *lab.Vault, name string, l lab.VaultLife) Login {
		token, err := v.MakeToken(t.Context(), l)
		if err != nil {
			t.Fatal(err)
		}
		return Login{Method: "token", TokenFile: secretFile(t, "token", token+"\n")}
	},
	"approle": func(t *testing.T, v *lab.Vault, name string, l lab.VaultLife) Login {
		id, err := v.AppRole(t.Context(), name, l)
		if err != nil {
			t.Fatal(err)
		}
		secret, err := v.SecretID(t.Context(), name, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		return Login{Method: "approle", RoleID: id, SecretIDFile: secretFile(t, "secret-id", secret)}
	},
	"jwt": func(t *testing.T, v *lab.Vault, name string, l lab.VaultLife) Login {
		j, err := v.JWT(t.Context(), name, l)
		if err != nil {
			t.Fatal(err)
		}
		token, err := j.Token(time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		path := secretFile(t, "jwt", token)
		// As Kubernetes projects it.
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
		return Login{Method: "jwt", Role: name, JWTFile: path}
	},
	"cert": func(t *testing.T, v *lab.Vault, name string, l lab.VaultLife) Login {
		c, err := v.Cert(t.Context(), name, l)
		if err != nil {
			t.Fatal(err)
		}
		certFile, keyFile, err := c.Write(t.TempDir(), "east")
		if err != nil {
			t.Fatal(err)
		}
		return Login{Method: "cert", Role: name, CertFile: certFile, KeyFile: keyFile}
	},
}

// realConfig is patient: what a call may take is a promise of its own, and the machine may be busy.
func realConfig(v *lab.Vault, l Login) Config {
	return Config{Address: v.Address, CAFile: v.CAFile, ServerName: lab.VaultServerName, Login: l, Timeout: 30 * time.Second}
}

// readUntil reads until it succeeds, and says what the last error was if it does not within the limit.
func readUntil(t *testing.T, cl *Client, path string, limit time.Duration) time.Duration {
	t.Helper()
	began := time.Now()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := cl.Read(t.Context(), path)
		if err == nil {
			return time.Since(began)
		}
		if time.Since(began) > limit {
			t.Fatalf("after %s: %v", limit, err)
		}
		<-tick.C
	}
}

// run keeps the connection until the test ends.
func run(t *testing.T, cl *Client) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- cl.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// A token made by hand ends, however it is renewed: by a life of its own, or by the 32 days of Vault's mounts.
func TestRealTheEndOfATokenMadeByHandIsKnown(t *testing.T) {
	v, name := realVault(t)
	type token struct {
		Login
		at time.Time
	}
	made := map[time.Duration]token{}
	for life, of := range map[time.Duration]lab.VaultLife{
		768 * time.Hour: {Policies: []string{name}},
		time.Hour:       {Policies: []string{name}, TTL: 2 * time.Minute, MaxTTL: time.Hour},
		0:               {Policies: []string{name}, TTL: time.Hour},
	} {
		made[life] = token{logins["token"](t, v, name, of), time.Now()}
	}
	time.Sleep(1100 * time.Millisecond) // Vault counts in seconds: a renewal before the first is over is not cut short
	for life, token := range made {
		cl := dial(t, realConfig(v, token.Login))
		readUntil(t, cl, "secret/data/"+name+"/a", 0)
		until := cl.Status().TokenUntil
		run(t, cl)
		err := lab.Until(t.Context(), "the first renewal taken in", 30*time.Second, func() error {
			if renewed := testutil.ToFloat64(cl.metrics.requests.WithLabelValues(opRenew, "ok")); renewed == 0 || cl.Status().TokenUntil.Equal(until) {
				return fmt.Errorf("%v renewals, the token lives until %s", renewed, until)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		switch st := cl.Status(); {
		case life == 0 && st.TokenEnds.IsZero():
		case life == 0, (st.TokenEnds.Sub(token.at) - life).Abs() > 5*time.Second, (st.TokenEnds.Sub(st.TokenBegan) - life).Abs() > 5*time.Second:
			t.Errorf("one of %s is said to live from %s to %s", life, st.TokenBegan, st.TokenEnds)
		}
	}
}

func TestRealEachLoginWorksAndRecoversFromARevokedToken(t *testing.T) {
	for method, login := range logins {
		t.Run(method, func(t *testing.T) {
			v, name := realVault(t)
			life := lab.VaultLife{Policies: []string{name}, TTL: time.Hour}
			l := login(t, v, name, life)
			cl := dial(t, realConfig(v, l))
			path := "secret/data/" + name + "/a"
			s, err := cl.Read(t.Context(), path)
			if err != nil || fmt.Sprint(s.Data["data"]) != "map[says:hello]" {
				t.Fatal(s, err)
			}
			st := cl.Status()
			if left := time.Until(st.TokenUntil); !st.LoggedIn || st.Away || left < 59*time.Minute || left > time.Hour {
				t.Errorf("status is %+v", st)
			}
			token := cl.cur.auth().ClientToken
			if err := v.RevokeToken(t.Context(), token); err != nil {
				t.Fatal(err)
			}
			if method == "token" {
				_, err := cl.Read(t.Context(), path)
				if !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), l.TokenFile) {
					t.Errorf("a revoked token that nobody has replaced: %v", err)
				}
				next, err := v.MakeToken(t.Context(), life)
				if err != nil {
					t.Fatal(err)
				}
				write(t, l.TokenFile, next)
			}
			if _, err := cl.Read(t.Context(), path); err != nil {
				t.Errorf("after the token was revoked: %v", err)
			}
			if cl.cur.auth().ClientToken == token {
				t.Error("the same token")
			}
		})
	}
}

func TestRealALoginThatIsRefusedSaysSo(t *testing.T) {
	v, name := realVault(t)
	life := lab.VaultLife{Policies: []string{name}, TTL: time.Hour}
	var all []Login
	for _, method := range []string{"token", "approle", "jwt", "cert"} {
		all = append(all, logins[method](t, v, name, life))
	}
	write(t, all[0].TokenFile, "hvs.CAESINotAToken")
	write(t, all[1].SecretIDFile, "00000000-0000-0000-0000-000000000000")
	write(t, all[2].JWTFile, "eyJhbGciOiJFUzI1NiIsInR5cCI6IkpXVCJ9.e30.AAAA")
	other := newAuthority(t).issue(t, "stranger")
	write(t, all[3].CertFile, other.cert)
	write(t, all[3].KeyFile, other.key)
	noMount := all[1]
	noMount.Mount = "nowhere"
	noRole := all[2]
	noRole.Role = "nobody"
	for _, l := range append(all, noMount, noRole) {
		_, err := dial(t, realConfig(v, l)).Read(t.Context(), "secret/data/"+name+"/a")
		t.Log(err)
		if !errors.Is(err, ErrDenied) || errors.Is(err, ErrNotFound) || errors.Is(err, ErrAway) {
			t.Errorf("%+v: %v", l, err)
		}
	}
}

func TestRealATokenOfTenSecondsIsLivedThrough(t *testing.T) {
	for name, life := range map[string]lab.VaultLife{
		"renewed":        {TTL: 10 * time.Second},
		"ended-by-Vault": {TTL: 10 * time.Second, MaxTTL: 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v, name := realVault(t)
			life.Policies = []string{name}
			cl := dial(t, realConfig(v, logins["approle"](t, v, name, life)))
			run(t, cl)
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			n, end := 0, time.Now().Add(14*time.Second)
			tokens := map[string]bool{}
			for time.Now().Before(end) {
				if _, err := cl.Read(t.Context(), "secret/data/"+name+"/a"); err != nil {
					t.Fatalf("after %d reads: %v", n, err)
				}
				n++
				cl.mu.Lock()
				tokens[cl.cur.auth().ClientToken] = true
				cl.mu.Unlock()
				<-tick.C
			}
			// The second comes after 7 s or a little later, the third as long after that.
			if want := map[bool][2]int{true: {1, 1}, false: {2, 3}}[life.MaxTTL == 0]; len(tokens) < want[0] || len(tokens) > want[1] {
				t.Errorf("%d tokens in 14 s, want %d to %d", len(tokens), want[0], want[1])
			}
		})
	}
}

func TestRealASecretIDOfOneUseIsReplacedInItsFile(t *testing.T) {
	v, name := realVault(t)
	l := logins["approle"](t, v, name, lab.VaultLife{Policies: []string{name}, TTL: time.Hour})
	path := "secret/data/" + name + "/a"
	put := func() {
		once, err := v.SecretID(t.Context(), name, 1, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		write(t, l.SecretIDFile, once)
	}
	put()
	cl := dial(t, realConfig(v, l))
	if _, err := cl.Read(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if err := v.RevokeToken(t.Context(), cl.cur.auth().ClientToken); err != nil {
		t.Fatal(err)
	}
	if _, err := cl.Read(t.Context(), path); !errors.Is(err, ErrDenied) {
		t.Fatalf("the secret-id is used up: %v", err)
	}
	put()
	if _, err := cl.Read(t.Context(), path); err != nil {
		t.Fatalf("a new secret-id is there: %v", err)
	}
}

func TestRealAJWTIsReadAnewAtEachLogin(t *testing.T) {
	v, name := realVault(t)
	l := logins["jwt"](t, v, name, lab.VaultLife{Policies: []string{name}, TTL: time.Hour})
	cl := dial(t, realConfig(v, l))
	readUntil(t, cl, "secret/data/"+name+"/a", 0)
	// Another key, which is the one that Vault believes from now on.
	j, err := v.JWT(t.Context(), name, lab.VaultLife{Policies: []string{name}, TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	for _, life := range []time.Duration{-10 * time.Minute, time.Hour} {
		token, err := j.Token(life)
		if err != nil {
			t.Fatal(err)
		}
		write(t, l.JWTFile, token)
		if life > 0 {
			readUntil(t, cl, "secret/data/"+name+"/a", 0)
			continue
		}
		if err := v.RevokeToken(t.Context(), cl.cur.auth().ClientToken); err != nil {
			t.Fatal(err)
		}
		_, err = cl.Read(t.Context(), "secret/data/"+name+"/a")
		if !errors.Is(err, ErrDenied) || strings.Contains(err.Error(), token) {
			t.Errorf("a JWT that has ended: %v", err)
		}
	}
}

func TestRealAReplacedCertificateLogsIn(t *testing.T) {
	v, name := realVault(t)
	c, err := v.Cert(t.Context(), name, lab.VaultLife{Policies: []string{name}, TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile, err := c.Write(dir, "east")
	if err != nil {
		t.Fatal(err)
	}
	cl := dial(t, realConfig(v, Login{Method: "cert", Role: name, CertFile: certFile, KeyFile: keyFile}))
	path := "secret/data/" + name + "/a"
	if _, err := cl.Read(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	old := cl.cur.auth().ClientToken
	// Another CA, which is the one that the role believes from now on.
	if c, err = v.Cert(t.Context(), name, lab.VaultLife{Policies: []string{name}, TTL: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if _, _, err = c.Write(dir, "east"); err != nil {
		t.Fatal(err)
	}
	if err := v.RevokeToken(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	if _, err := cl.Read(t.Context(), path); err != nil {
		t.Fatal(err)
	}
}

func TestRealVaultMustBeTheOneThatIsMeant(t *testing.T) {
	v, name := realVault(t)
	l := logins["approle"](t, v, name, lab.VaultLife{Policies: []string{name}, TTL: time.Hour})
	wrongName, wrongCA, noCA := realConfig(v, l), realConfig(v, l), realConfig(v, l)
	wrongName.ServerName = "other.test"
	wrongCA.CAFile = secretFile(t, "ca.pem", newAuthority(t).pem())
	noCA.CAFile = ""
	for _, config := range []Config{wrongName, wrongCA, noCA} {
		_, err := dial(t, config).Read(t.Context(), "secret/data/"+name+"/a")
		if !errors.Is(err, ErrAway) || !strings.Contains(err.Error(), "check vault.ca_file and vault.server_name") {
			t.Errorf("%+v: %v", config, err)
		}
	}
	plain := Config{Address: strings.Replace(v.Address, "https", "http", 1), Login: l}
	if _, err := dial(t, plain).Read(t.Context(), "secret/data/"+name+"/a"); err == nil {
		t.Error("http to a port with TLS")
	} else {
		t.Log(err)
	}
}

func TestRealAnswersAreWhatTheyMean(t *testing.T) {
	v, name := realVault(t)
	ctx := t.Context()
	cl := dial(t, realConfig(v, logins["approle"](t, v, name, lab.VaultLife{Policies: []string{name}, TTL: time.Hour})))
	doc := "secret/data/" + name + "/doc"
	put := func(cas int) error {
		_, err := cl.Write(ctx, doc, map[string]any{"data": map[string]any{"v": cas}, "options": map[string]any{"cas": cas}})
		return err
	}
	if err := errors.Join(put(0), put(1)); err != nil {
		t.Fatal(err)
	}
	if err := put(1); !errors.Is(err, ErrConflict) || errors.Is(err, ErrRefused) {
		t.Errorf("written meanwhile: %v", err)
	}
	if s, err := cl.Read(ctx, doc); err != nil || fmt.Sprint(s.Data["metadata"].(map[string]any)["version"]) != "2" {
		t.Error(s, err)
	}
	if l, err := cl.List(ctx, "secret/metadata/"+name); err != nil && !errors.Is(err, ErrDenied) {
		t.Error(l, err)
	}
	if l, err := cl.List(ctx, "secret/metadata/"+name+"/none"); err != nil || l != nil {
		t.Error(l, err)
	}
	if err := v.Root().Delete(ctx, doc); err != nil {
		t.Error(err)
	}
	s, err := cl.Read(ctx, doc)
	if !errors.Is(err, ErrNotFound) || s == nil || fmt.Sprint(s.Data["metadata"].(map[string]any)["version"]) != "2" {
		t.Errorf("a deleted version: %v %v", s, err)
	}
	if _, err := cl.Read(ctx, "secret/data/"+name+"/none"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	for path, want := range map[string]error{
		"secret/data/elsewhere": ErrDenied, "sys/mounts": ErrDenied, "nowhere/a": ErrDenied,
	} {
		if _, err := cl.Read(ctx, path); !errors.Is(err, want) {
			t.Errorf("%s: %v", path, err)
		} else {
			t.Log(err)
		}
	}
	if _, err := cl.Write(ctx, doc, map[string]any{"data": 7}); !errors.Is(err, ErrRefused) {
		t.Errorf("a request that makes no sense: %v", err)
	}
	if n, err := v.Tokens(ctx, "auth/approle/login"); err != nil || len(n) == 0 {
		t.Error(n, err)
	}
}

func TestRealAQuotaIsWaitedFor(t *testing.T) {
	v, name := realVault(t)
	cl := dial(t, realConfig(v, logins["approle"](t, v, name, lab.VaultLife{Policies: []string{name}, TTL: time.Hour})))
	path := "secret/data/" + name + "/a"
	readUntil(t, cl, path, time.Second)
	if err := v.Mount(t.Context(), "narrow", "kv"); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Root().Write(t.Context(), "sys/quotas/rate-limit/narrow", map[string]any{"path": "narrow/", "rate": 1, "interval": "1s"}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := v.Root().Delete(context.Background(), "sys/quotas/rate-limit/narrow"); err != nil {
			t.Error(err)
		}
	}()
	var busy *Error
	for range 20 {
		_, err := cl.Read(t.Context(), "narrow/data/x")
		var e *Error
		if errors.As(err, &e) && e.Status == 429 {
			busy = e
		}
	}
	if busy == nil || !errors.Is(busy, ErrAway) {
		t.Fatalf("no quota met: %v", busy)
	}
	t.Logf("%v, Retry-After %s", busy, busy.retryAfter)
	readUntil(t, cl, path, 15*time.Second)
}

func TestRealSealedAndUnsealedAndHungAndBack(t *testing.T) {
	v, name := realVault(t)
	config := realConfig(v, logins["approle"](t, v, name, lab.VaultLife{Policies: []string{name}, TTL: time.Hour}))
	config.Timeout = DefaultTimeout
	var log bytes.Buffer
	config.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	path := "secret/data/" + name + "/a"
	cl := dial(t, config)
	if _, err := cl.Read(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	token := cl.cur.auth().ClientToken
	if err := v.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err := cl.Read(t.Context(), path)
	if !errors.Is(err, ErrAway) || !strings.Contains(err.Error(), "unseal it") {
		t.Errorf("sealed: %v", err)
	}
	for range 5 {
		_, err = cl.Read(t.Context(), path)
	}
	if !errors.Is(err, ErrAway) || !strings.Contains(err.Error(), "left alone") || !cl.Status().Away {
		t.Errorf("sealed for long: %v", err)
	}
	if err := v.Unseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("back %s after unsealing", readUntil(t, cl, path, 30*time.Second))

	v.Kill()
	if _, err := cl.Read(t.Context(), path); !errors.Is(err, ErrAway) {
		t.Errorf("killed: %v", err)
	}
	if err := errors.Join(v.Start(t.Context()), v.Unseal(t.Context())); err != nil {
		t.Fatal(err)
	}
	t.Logf("back %s after a restart", readUntil(t, cl, path, 30*time.Second))
	if cl.cur.auth().ClientToken != token {
		t.Error("the token lives in the storage, and yet there was a login")
	}

	if err := v.Halt(t.Context()); err != nil {
		t.Fatal(err)
	}
	within(t, 3*config.Timeout, func() {
		var g sync.WaitGroup
		for range 20 {
			g.Go(func() {
				if _, err := cl.Read(t.Context(), path); !errors.Is(err, ErrAway) {
					t.Errorf("hung: %v", err)
				}
			})
		}
		g.Wait()
	})
	// Where this process was held up until Vault may be tried again, the first call tries it.
	for tries := 3; ; tries-- {
		began := time.Now()
		_, err := cl.Read(t.Context(), path)
		took := time.Since(began)
		if errors.Is(err, ErrAway) && strings.Contains(err.Error(), "left alone") && took <= config.Timeout/2 {
			break
		}
		if tries == 1 {
			t.Errorf("hung for long: after %s: %v", took, err)
			break
		}
	}
	if err := v.Resume(); err != nil {
		t.Fatal(err)
	}
	t.Logf("back %s after it hung", readUntil(t, cl, path, 30*time.Second))
	if strings.Contains(log.String(), token) || !strings.Contains(log.String(), "Vault is back") {
		t.Error(log.String())
	}
}

func TestRealAPolicyOfExactlyTheNeedsLacksNothing(t *testing.T) {
	v, name := realVault(t)
	ctx := t.Context()
	needs := append(realNeeds(name),
		Need{"transit/sign/" + name + "-*", []string{"create", "update"}, "sign", nil, nil},
		Need{"transit/sign/" + name + "-special", []string{"delete"}, "a narrower path has what the wider one has", nil, nil},
		Need{"pki/issuer/+/sign-intermediate", []string{"create", "update"}, "have our intermediates signed", nil, nil},
		Need{"secret/metadata/" + name, []string{"list"}, "see what is there", nil, nil},
	)
	with := func(policy string) *Client {
		t.Helper()
		if err := v.Policy(ctx, name, policy); err != nil {
			t.Fatal(err)
		}
		// Vault's own policy "default" has the connection's needs: a token without it.
		a, err := v.Root().Write(ctx, "auth/token/create", map[string]any{"policies": []string{name}, "no_default_policy": true, "ttl": "1h"})
		if err != nil {
			t.Fatal(err)
		}
		return dial(t, realConfig(v, Login{Method: "token", TokenFile: secretFile(t, "token", a.Auth.Token)}))
	}
	if missing, err := with(Policy(needs)).Missing(ctx, needs); err != nil || len(missing) != 0 {
		t.Fatalf("missing with all: %+v %v", missing, err)
	}
	// The wider path's capabilities are really there at the narrower one.
	if missing, err := with(Policy(needs)).Missing(ctx, []Need{{"transit/sign/" + name + "-special", []string{"update", "delete"}, "", nil, nil}}); err != nil || len(missing) != 0 {
		t.Errorf("%+v %v", missing, err)
	}
	merged := merge(needs)
	for i, left := range merged {
		policy := ""
		for j, n := range merged {
			if j != i {
				policy += Policy([]Need{n}) + "\n"
			}
		}
		missing, err := with(policy).Missing(ctx, needs)
		switch left.Path {
		case lookupPath, capabilitiesPath:
			if !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), left.Path) {
				t.Errorf("without %s: %+v %v", left.Path, missing, err)
			}
		default:
			if err != nil || len(missing) != 1 || missing[0].Path != left.Path || missing[0].Why != left.Why {
				t.Errorf("without %s: missing is %+v %v", left.Path, missing, err)
			}
		}
	}
}

func TestRealALongRunAtDebugLevelShowsNoSecret(t *testing.T) {
	v, name := realVault(t)
	l := logins["approle"](t, v, name, lab.VaultLife{Policies: []string{name}, TTL: 2 * time.Second, MaxTTL: 3 * time.Second})
	var mu sync.Mutex
	var log bytes.Buffer
	config := realConfig(v, l)
	config.Logger = slog.New(slog.NewTextHandler(locked{&mu, &log}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cl := dial(t, config)
	run(t, cl)
	secrets := map[string]bool{}
	if b, err := os.ReadFile(l.SecretIDFile); err != nil {
		t.Fatal(err)
	} else {
		secrets[string(b)] = true
	}
	end := time.Now().Add(6 * time.Second)
	for time.Now().Before(end) {
		readUntil(t, cl, "secret/data/"+name+"/a", 15*time.Second)
		cl.mu.Lock()
		secrets[cl.cur.auth().ClientToken] = true
		cl.mu.Unlock()
		_, _ = cl.Read(t.Context(), "sys/mounts")
	}
	mu.Lock()
	defer mu.Unlock()
	if len(secrets) < 3 || log.Len() == 0 {
		t.Fatalf("%d secrets and a log of %d bytes show nothing", len(secrets), log.Len())
	}
	for s := range secrets {
		if strings.Contains(log.String(), s) {
			t.Errorf("%s is in the log", s)
		}
	}
}

type locked struct {
	mu *sync.Mutex
	b  *bytes.Buffer
}

func (l locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}
