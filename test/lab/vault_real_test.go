//go:build real

package lab

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func startVault(t *testing.T, c VaultConfig) *Vault {
	t.Helper()
	c.Dir = t.TempDir()
	began := time.Now()
	v, err := StartVault(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Stop)
	t.Logf("started in %s", time.Since(began))
	return v
}

func TestAVaultKeepsWhatItHasOverASealARestartAndAPowerCut(t *testing.T) {
	v, ctx := startVault(t, VaultConfig{}), t.Context()
	must(t, v.Mount(ctx, "secret", "kv"))
	if _, err := v.Root().Write(ctx, "secret/data/a", map[string]any{"data": map[string]any{"colour": "green"}}); err != nil {
		t.Fatal(err)
	}
	readBack := func() {
		t.Helper()
		a, err := v.Root().Read(ctx, "secret/data/a")
		if err != nil {
			t.Fatal(err)
		}
		if inner, _ := a.Data["data"].(map[string]any); inner["colour"] != "green" {
			t.Errorf("got %v", a.Data)
		}
	}
	readBack()

	must(t, v.Seal(ctx))
	if _, err := v.Root().Read(ctx, "secret/data/a"); VaultStatus(err) != http.StatusServiceUnavailable {
		t.Errorf("a sealed Vault answers %v, want 503", err)
	}
	must(t, v.Unseal(ctx))
	readBack()

	began := time.Now()
	must(t, v.Restart(ctx))
	t.Logf("restarted in %s", time.Since(began))
	readBack()

	v.Kill()
	if _, err := v.Root().Read(ctx, "secret/data/a"); err == nil || VaultStatus(err) != 0 {
		t.Errorf("a dead Vault answers: %v", err)
	}
	must(t, v.Start(ctx))
	must(t, v.Unseal(ctx))
	readBack()

	keys, err := v.Root().List(ctx, "secret/metadata")
	if err != nil || !slices.Equal(keys, []string{"a"}) {
		t.Errorf("the list is %v, %v", keys, err)
	}
	must(t, v.Root().Delete(ctx, "secret/metadata/a"))
	if _, err := v.Root().Read(ctx, "secret/data/a"); VaultStatus(err) != http.StatusNotFound {
		t.Errorf("what was deleted answers %v, want 404", err)
	}
	v.Stop()
	v.Stop()
}

func TestEachLoginOfTheLabGivesATokenWithItsPolicy(t *testing.T) {
	v, ctx := startVault(t, VaultConfig{}), t.Context()
	must(t, v.Mount(ctx, "transit", "transit"))
	must(t, v.Policy(ctx, "keys", `path "transit/keys/*" { capabilities = ["read", "create", "update"] }`))
	life := VaultLife{Policies: []string{"keys"}, TTL: time.Minute, MaxTTL: time.Hour}
	holds := func(how, token string) {
		t.Helper()
		if _, err := v.As(token).Write(ctx, "transit/keys/"+how, map[string]any{"type": "ecdsa-p256"}); err != nil {
			t.Errorf("%s: %v", how, err)
		}
		if _, err := v.As(token).Read(ctx, "sys/mounts"); VaultStatus(err) != http.StatusForbidden {
			t.Errorf("%s may more than its policy: %v", how, err)
		}
	}
	login := func(how string, body map[string]any) {
		t.Helper()
		a, err := v.As("").Write(ctx, how, body)
		if err != nil {
			t.Errorf("%s: %v", how, err)
			return
		}
		if a.Auth.Seconds != 60 || !a.Auth.Renewable {
			t.Errorf("%s gives a token for %d s, renewable %v", how, a.Auth.Seconds, a.Auth.Renewable)
		}
		holds(how[:4], a.Auth.Token)
	}

	token, err := v.MakeToken(ctx, life)
	must(t, err)
	holds("token", token)
	must(t, v.RevokeToken(ctx, token))
	if _, err := v.As(token).Read(ctx, "transit/keys/token"); VaultStatus(err) != http.StatusForbidden {
		t.Errorf("a revoked token answers %v, want 403", err)
	}

	roleID, err := v.AppRole(ctx, "r", life)
	must(t, err)
	secretID, err := v.SecretID(ctx, "r", 1, time.Minute)
	must(t, err)
	login("auth/approle/login", map[string]any{"role_id": roleID, "secret_id": secretID})
	if _, err := v.As("").Write(ctx, "auth/approle/login", map[string]any{"role_id": roleID, "secret_id": secretID}); err == nil {
		t.Error("a secret-id for one login gave two")
	}

	must(t, v.Userpass(ctx, "u", "p", life))
	began := time.Now().Truncate(time.Second) // as Vault dates tokens
	login("auth/userpass/login/u", map[string]any{"password": "p"})

	tokens, err := v.Tokens(ctx, "auth/userpass/login/u")
	must(t, err)
	if now := time.Now(); len(tokens) != 1 || tokens[0].Made.Before(began) || tokens[0].Made.After(now) ||
		tokens[0].Expires.Before(began.Add(time.Minute)) || tokens[0].Expires.After(now.Add(time.Minute)) {
		t.Errorf("the tokens of one login: %+v", tokens)
	}

	j, err := v.JWT(ctx, "j", life)
	must(t, err)
	good, err := j.Token(time.Minute)
	must(t, err)
	login("auth/jwt/login", map[string]any{"role": "j", "jwt": good})
	ended, err := j.Token(-10 * time.Minute)
	must(t, err)
	if _, err := v.As("").Write(ctx, "auth/jwt/login", map[string]any{"role": "j", "jwt": ended}); VaultStatus(err) != http.StatusBadRequest {
		t.Errorf("a JWT that has ended answers %v, want 400", err)
	}

	c, err := v.Cert(ctx, "c", life)
	must(t, err)
	certFile, keyFile, err := c.Write(t.TempDir(), "client")
	must(t, err)
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	must(t, err)
	transport := v.client.Transport.(*http.Transport).Clone()
	transport.TLSClientConfig.Certificates = []tls.Certificate{pair}
	defer transport.CloseIdleConnections()
	a, err := VaultClient{"", v.Address, &http.Client{Transport: transport}}.Write(ctx, "auth/cert/login", map[string]any{"name": "c"})
	must(t, err)
	holds("cert", a.Auth.Token)
}

func TestAPlainVaultMakesARootWhoseKeyStaysInIt(t *testing.T) {
	v, ctx := startVault(t, VaultConfig{Plain: true}), t.Context()
	must(t, v.Mount(ctx, "pki", "pki"))
	a, err := v.PKIRoot(ctx, "pki", "a", TrustDomain, 10*365*24*time.Hour)
	must(t, err)
	b, err := v.PKIRoot(ctx, "pki", "b", TrustDomain, time.Hour)
	must(t, err)
	must(t, v.PKIDefault(ctx, "pki", "b"))
	def, err := v.Root().Read(ctx, "pki/cert/ca")
	must(t, err)
	if def.String("certificate") != b.PEM {
		t.Error("the default issuer is not the one that was made it")
	}
	if len(a.Certificate.URIs) != 1 || a.Certificate.URIs[0].String() != "spiffe://"+TrustDomain {
		t.Errorf("the root's names: %v", a.Certificate.URIs)
	}
	if left := time.Until(a.Certificate.NotAfter); left < 9*365*24*time.Hour {
		t.Errorf("the root lives %s", left)
	}
}

func TestAProxyOutlivesTheVaultBehindIt(t *testing.T) {
	v, ctx := startVault(t, VaultConfig{}), t.Context()
	p, err := v.Proxy()
	must(t, err)
	defer p.Close()
	through := VaultClient{v.RootToken, p.Address, v.client}
	if _, err := through.Read(ctx, "sys/mounts"); err != nil {
		t.Error(err)
	}
	v.Stop()
	if _, err := through.Read(ctx, "sys/mounts"); err == nil || VaultStatus(err) != 0 {
		t.Errorf("without a Vault it answers: %v", err)
	}
	must(t, v.Restart(ctx))
	if _, err := through.Read(ctx, "sys/mounts"); err != nil {
		t.Error(err)
	}
}

// inTests is what a package's tests do with the Vault they share.
type inTests func() int

func (f inTests) Run() int { return f() }

func TestTheVaultOfAPackageEndsWithItsTests(t *testing.T) {
	var unused OneVault
	if code := unused.During(inTests(func() int { return 3 })).Run(); code != 3 {
		t.Errorf("the tests' own exit status is %d, want 3", code)
	}
	if v, err := unused.Get(); err == nil || v != nil {
		t.Errorf("after the tests somebody is given %v", v)
	}

	one := OneVault{Plain: true}
	var v *Vault
	one.During(inTests(func() int {
		var err error
		v, err = one.Get()
		must(t, err)
		if again, err := one.Get(); again != v || err != nil {
			t.Errorf("another time it is %p, %v, not %p", again, err, v)
		}
		return 0
	})).Run()
	if !v.proc.ended() {
		t.Error("it still runs")
	}
	if _, err := os.Stat(v.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its folder is left: %v", err)
	}
}

// dyingTests is set in a child that starts the Vault of its tests, says which process it is, and never ends by itself.
const dyingTests = "SIGNET_LAB_DYING_TESTS"

func TestTheVaultOfAPackageDiesWithItsTests(t *testing.T) {
	if os.Getenv(dyingTests) != "" {
		one := OneVault{Plain: true}
		v, err := one.Get()
		must(t, err)
		fmt.Println("PID", v.PID())
		select {}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	child := exec.CommandContext(ctx, os.Args[0], "-test.run=^"+t.Name()+"$", "-test.timeout=1m")
	child.Env = append(os.Environ(), dyingTests+"=yes", "TMPDIR="+t.TempDir())
	out, err := child.StdoutPipe()
	must(t, err)
	must(t, child.Start())
	defer func() { _ = child.Wait() }()
	pid := 0
	if _, err := fmt.Fscanf(out, "PID %d\n", &pid); err != nil {
		t.Fatalf("the child names no Vault: %v", err)
	}
	vault, err := unix.PidfdOpen(pid, 0)
	must(t, err)
	defer unix.Close(vault)
	must(t, child.Process.Kill())
	if err := Until(ctx, "Vault ended", 30*time.Second, func() error {
		// A pidfd can be read once its process has ended.
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(vault), Events: unix.POLLIN}}, 0); n != 1 {
			return fmt.Errorf("it runs: %v", err)
		}
		return nil
	}); err != nil {
		t.Error(err)
		must(t, unix.Kill(pid, unix.SIGKILL))
	}
}

func TestAMissingVaultSaysHowToGetIt(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "go.mod"), nil, 0o600))
	t.Chdir(dir)
	if _, err := StartVault(t.Context(), VaultConfig{Dir: dir}); err == nil || !strings.Contains(err.Error(), "make tools") {
		t.Errorf("got %v", err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
