//go:build real

package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/test/lab"
)

// TestNoSecretOfVaultShows lets servers that log all they can log in, fail, be insulted and recover, then searches everything.
func TestNoSecretOfVaultShows(t *testing.T) {
	t.Parallel()
	e := newEstate(t, "secrets")
	secrets := map[string][]byte{}
	purses := map[string]*purse{}
	clusters := map[string]*holding{}
	for _, c := range []struct{ name, keys string }{{"east", "memory"}, {"west", "vault-transit"}, {"south", "memory"}} {
		made, err := e.NewCluster(c.name, "")
		if err != nil {
			t.Fatal(err)
		}
		role := e.name + "-" + c.name
		life := lab.VaultLife{Policies: []string{role}, TTL: time.Hour}
		var block, secret string
		switch c.name {
		case "east":
			id, rerr := e.vault.AppRole(t.Context(), role, life)
			secret, err = e.vault.SecretID(t.Context(), role, 0, 0)
			block = fmt.Sprintf("{ method: approle, role_id: %s, secret_id_file: ./secret }", id)
			if rerr != nil {
				t.Fatal(rerr)
			}
		case "west":
			secret, err = e.jwtRole(t, role, life).Token(time.Hour)
			block = fmt.Sprintf("{ method: jwt, role: %s, jwt_file: ./secret }", role)
		default:
			secret, err = e.vault.MakeToken(t.Context(), life)
			block = "{ method: token, token_file: ./secret }"
		}
		if err != nil {
			t.Fatal(err)
		}
		e.write(t, c.name+"/secret", secret+"\n")
		secretForms(secrets, "what "+c.name+" logs in with", []byte(secret))
		x := e.hold(t, made, how{login: block, role: role, keys: c.keys, path: c.name})
		purses[c.name] = &purse{}
		purses[c.name].watch(x.proxy)
		e.must(t, "cluster", "init", "--config", x.Config(), "--root-fingerprint", e.RootFingerprint)
		clusters[c.name] = x
	}
	var said []ran
	var web bytes.Buffer
	for _, x := range clusters {
		x.begin(t)
	}
	for name, x := range clusters {
		x.ready(t)
		x.issuing(t)
		// Vault says back what it was told, as it does for a login that it refuses.
		own := strings.TrimSpace(readFile(t, x.Path("secret")))
		tokens := purses[name].all()
		if len(tokens) > 0 { // its own, of the newest login
			tokens = tokens[len(tokens)-1:]
		}
		for _, f := range []lab.Fault{
			{Status: 400, Errors: append([]string{"invalid secret " + own, "and " + strings.Repeat("x", 280) + own}, tokens...)},
			{Status: 403, Errors: []string{"permission denied for " + own + strings.Join(tokens, " ")}},
		} {
			x.proxy.Set("*", f)
			// What a login is told of is its secret alone.
			f.Errors = []string{"invalid secret id or jwt: " + own}
			x.proxy.Set("auth/approle/login", f)
			x.proxy.Set("auth/jwt/login", f)
			said = append(said, e.run(t, "rotation", "start", "--config", x.Config(), "intermediate"))
			x.impaired(t, "it is refused", func(f check.Finding) bool { return strings.Contains(f.Message, "40") })
			said = append(said, e.run(t, "check", "--config", x.Config()), e.run(t, "check", "--config", x.Config(), "-o", "json"))
		}
		x.proxy.Clear()
		purses[name].watch(x.proxy)
		x.mended(t)
		x.signs(t)
		for _, line := range []string{"cluster show", "ca list", "config view", "config vault-policy", "config validate", "rotation status", "trust list", "check", "log verify"} {
			said = append(said, e.run(t, append(strings.Fields(line), "--config", x.Config())...))
		}
		// A file of secrets is given for something else.
		for _, args := range [][]string{
			{"serve", "--config", x.Path("secret")},
			{"config", "validate", "--config", x.Path("secret"), "--role", "server"},
			{"trust", "add", "--config", x.Config(), x.Path("secret"), "--fingerprint", e.RootFingerprint},
		} {
			r := e.run(t, args...)
			if r.code == 0 {
				t.Error(r)
			}
			said = append(said, r)
		}
		for _, path := range []string{"/metrics", "/readyz?verbose", "/livez"} {
			_, text := get(t, x.HTTP, path)
			web.WriteString(text)
		}
		pid := x.server.PID()
		for _, file := range []string{"cmdline", "environ"} {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
			if err != nil || file == "cmdline" && !bytes.Contains(text, []byte("serve")) {
				t.Errorf("%s of %s: %q, %v", file, name, text, err)
			}
			web.Write(text)
		}
		// Memory of a process that holds keys goes nowhere.
		limits := readFile(t, fmt.Sprintf("/proc/%d/limits", pid))
		if !strings.Contains(strings.Join(strings.Fields(limits), " "), "Max core file size 0 0 bytes") {
			t.Errorf("%s may leave a core: %s", name, limits)
		}
	}
	for name, p := range purses {
		tokens := p.all()
		if len(tokens) < 2 && name != "south" { // which is given one
			t.Errorf("%d logins of %s were seen", len(tokens), name)
		}
		for i, token := range tokens {
			secretForms(secrets, fmt.Sprintf("token %d of %s", i, name), []byte(token))
		}
	}
	public := map[string]string{} // of CAs
	for name, x := range clusters {
		all, err := e.authorities(t.Context(), x.Cluster)
		if err != nil {
			t.Fatal(err)
		}
		for id := range all {
			if chain := x.chainOf(t, id); len(chain) > 0 {
				public[string(chain[0].RawSubjectPublicKeyInfo)] = name + "'s " + id
			}
		}
	}
	if len(public) < 7 {
		t.Errorf("keys of %d CAs are known", len(public))
	}
	for _, x := range clusters {
		x.server.Stop()
	}

	places := map[string][]byte{"the HTTP endpoints, arguments and environments": web.Bytes()}
	for _, r := range said {
		places["what is printed by signet "+strings.Join(r.args, " ")] = []byte(r.out + r.err)
	}
	if err := filepath.WalkDir(e.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || d.Name() == "secret" {
			return err
		}
		name, _ := filepath.Rel(e.Dir, path)
		data, err := os.ReadFile(path)
		places[name] = data
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, must := range []string{"east-server.log", "west-server.log", "south-server.log", "east/state/signet.db", "lab.log"} {
		if len(places[must]) == 0 {
			t.Errorf("%s is not among what is searched", must)
		}
	}
	for name := range clusters {
		if !bytes.Contains(places[name+"-server.log"], []byte("[secret]")) {
			t.Errorf("the log of %s says nothing of what Vault said back", name)
		}
	}
	for place, text := range places {
		for what, secret := range secrets {
			if bytes.Contains(text, secret) {
				t.Errorf("%s is in %s", what, place)
			}
		}
		if token := aToken.Find(text); token != nil {
			t.Errorf("a token that begins with %.8s is in %s", token, place)
		}
		for _, mark := range []string{"BEGIN PRIVATE KEY", "BEGIN EC PRIVATE KEY", "BEGIN RSA PRIVATE KEY"} {
			if bytes.Contains(text, []byte(mark)) {
				t.Errorf("%q is in %s", mark, place)
			}
		}
		for key := range keysIn(text) {
			if ca, ok := public[key]; ok {
				t.Errorf("the key of %s is in %s", ca, place)
			}
		}
	}
	// The search finds what is there.
	key := newKey(t)
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if !keysIn(append([]byte("before"), der...))[string(spki)] {
		t.Error("the search would not find a key")
	}
	if kept, err := filepath.Glob(e.path("*", "state", "keys", "*")); err != nil || len(kept) == 0 {
		t.Errorf("no key is kept: %v", err)
	} else {
		for _, path := range kept {
			if strings.Contains(path, "intermediate") {
				t.Errorf("a key of an intermediate is kept in %s", path)
			}
		}
	}
}

// aToken is one of Vault's. Its first four bytes alone would be among so many random ones, of hashes and signatures, now and then.
var aToken = regexp.MustCompile(`hvs\.[A-Za-z0-9_-]{8}`)

// keysIn finds plain DER of P-256 keys (RFC 5915), and returns their public keys.
func keysIn(text []byte) map[string]bool {
	found := map[string]bool{}
	begin := []byte{0x02, 0x01, 0x01, 0x04, 32} // version 1, then the scalar
	for {
		i := bytes.Index(text, begin)
		if i < 0 || len(text) < i+len(begin)+32 {
			return found
		}
		text = text[i+len(begin):]
		key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), text[:32])
		if err != nil {
			continue
		}
		if spki, err := x509.MarshalPKIXPublicKey(key.Public()); err == nil {
			found[string(spki)] = true
		}
	}
}
