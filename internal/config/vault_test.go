package config

import (
	"errors"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/internal/strictyaml"
)

const fullVault = `trust_domain: example.org
cluster: east
keystore:
  passphrase_file: ./east.pass
  control_ca: vault-transit
  intermediates: memory
  transit: { mount: engines/transit, prefix: ca-east- }
vault:
  address: https://vault.example.org:8200
  namespace: teams/ca
  ca_file: ./vault-ca.pem
  server_name: vault.internal
  timeout: 1s
  login:
    method: approle
    mount: machines
    role_id: signet-east
    secret_id_file: ./secret-id
upstream:
  vault_pki: { mount: pki, issuer: root-2026, life: 72h }
trust:
  vault_kv: { mount: secret, path: mesh/example.org }
`

func TestAVaultIsReadWhole(t *testing.T) {
	path := write(t, "east.yaml", fullVault)
	dir := filepath.Dir(path)
	s, err := LoadServer(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := (Vault{
		Address: "https://vault.example.org:8200", Namespace: "teams/ca", CAFile: dir + "/vault-ca.pem", ServerName: "vault.internal",
		Timeout: time.Second,
		Login:   VaultLogin{Method: LoginAppRole, Mount: "machines", RoleID: "signet-east", SecretIDFile: dir + "/secret-id"},
	}); s.Vault != want {
		t.Errorf("vault is %+v, want %+v", s.Vault, want)
	}
	if got := s.Keystore; got.ControlCA != KeysTransit || got.Intermediates != KeysMemory || got.Transit != (Transit{"engines/transit", "ca-east-"}) {
		t.Errorf("keystore is %+v", got)
	}
	if s.Upstream.VaultPKI != (VaultPKI{"pki", "root-2026", 72 * time.Hour}) || s.Trust.VaultKV != (VaultKV{"secret", "mesh/example.org"}) {
		t.Errorf("upstream is %+v, trust is %+v", s.Upstream, s.Trust)
	}
}

const (
	someVault = "vault: { address: \"https://v:8200\", login: { method: token, token_file: t } }\n"
	kvMount   = "trust: { vault_kv: { mount: kv } }\n"
	pkiMount  = "upstream: { vault_pki: { mount: pki } }\n"
)

func TestOnlyWhatPlaysAPartIsShown(t *testing.T) {
	for text, want := range map[string]map[string]string{
		"": {"keystore.control_ca": "file", "keystore.intermediates": "file"},
		someVault + kvMount: {
			"keystore.control_ca": "file", "keystore.intermediates": "file",
			"vault.address": "https://v:8200", "vault.namespace": "", "vault.ca_file": "", "vault.server_name": "", "vault.timeout": "3s",
			"vault.login.method": "token", "vault.login.token_file": "/d/t", "vault.login.cert_file": "", "vault.login.key_file": "",
			"trust.vault_kv.mount": "kv", "trust.vault_kv.path": "signet/example.org",
		},
		"vault: { address: \"https://v:8200\", login: { method: kubernetes, role: r } }\n" + kvMount: {
			"keystore.control_ca": "file", "keystore.intermediates": "file",
			"vault.address": "https://v:8200", "vault.namespace": "", "vault.ca_file": "", "vault.server_name": "", "vault.timeout": "3s",
			"vault.login.method": "kubernetes", "vault.login.mount": "kubernetes", "vault.login.role": "r",
			"vault.login.jwt_file":  "/var/run/secrets/kubernetes.io/serviceaccount/token",
			"vault.login.cert_file": "", "vault.login.key_file": "",
			"trust.vault_kv.mount": "kv", "trust.vault_kv.path": "signet/example.org",
		},
		"vault: { address: \"https://v:8200\", login: { method: cert, cert_file: c, key_file: k } }\nkeystore: { intermediates: memory, control_ca: vault-transit }\n" + pkiMount: {
			"keystore.control_ca": "vault-transit", "keystore.intermediates": "memory",
			"keystore.transit.mount": "transit", "keystore.transit.prefix": "signet-east_example.org_",
			"vault.address": "https://v:8200", "vault.namespace": "", "vault.ca_file": "", "vault.server_name": "", "vault.timeout": "3s",
			"vault.login.method": "cert", "vault.login.mount": "cert", "vault.login.role": "", "vault.login.cert_file": "/d/c", "vault.login.key_file": "/d/k",
			"upstream.vault_pki.mount": "pki", "upstream.vault_pki.issuer": "default", "upstream.vault_pki.life": "168h",
		},
	} {
		s := &Server{}
		var err error
		if s.origin, err = decode("/d/east.yaml", []byte(server(text)), s, s.complete); err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, one := range s.Settings() {
			block, _, _ := strings.Cut(one.Key, ".")
			if block == "vault" || block == "upstream" || block == "trust" || block == "keystore" && !strings.Contains(one.Key, "passphrase") && one.Key != "keystore.algorithm" {
				got[one.Key] = one.Value
			}
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q:\n got %v\nwant %v", text, got, want)
		}
	}
}

func TestWhatUsesVaultIsKnown(t *testing.T) {
	for text, want := range map[string][2]bool{
		"": {false, false}, someVault + kvMount: {true, false}, someVault + pkiMount: {true, false},
		someVault + "keystore: { control_ca: vault-transit }\n":    {true, true},
		someVault + "keystore: { intermediates: vault-transit }\n": {true, true},
		// None is made there any more, but older ones are there.
		someVault + "keystore: { intermediates: file, transit: { mount: transit } }\n": {true, true},
	} {
		s, err := LoadServer(write(t, "c.yaml", server(text)))
		if err != nil {
			t.Fatal(err)
		}
		if got := [2]bool{s.UsesVault(), s.UsesTransit()}; got != want {
			t.Errorf("%q uses Vault, Transit: %v, want %v", text, got, want)
		}
	}
}

// with is a server's file with shared trust in a Vault whose block is as given.
func with(vault string) string { return server("vault: { " + vault + " }\n" + kvMount) }

// of begins a server's file of a trust domain.
func of(td string) string { return "trust_domain: " + td + "\ncluster: east\n" }

// logged adds a login that is right.
func logged(vault string) string { return with(vault + ", login: { method: token, token_file: t }") }

// login is a Vault with that login.
func login(keys string) string { return with("address: \"https://v:8200\", login: { " + keys + " }") }

func TestContradictionsAboutVaultAreNamedWithRemedy(t *testing.T) {
	const address = `address: "https://v:8200"`
	for name, c := range map[string]struct{ text, want string }{
		"used, but nowhere":         {server(kvMount), "3:22: vault.address is missing, and trust.vault_kv.mount needs a Vault: say where it is, for example https://"},
		"keys, but nowhere":         {server("keystore: { intermediates: vault-transit }\n"), "3:13: vault.address is missing, and keystore.intermediates needs a Vault"},
		"PKI, but nowhere":          {server(pkiMount), "vault.address is missing"},
		"there for nothing":         {server(someVault), "3:1: vault is configured, but nothing uses it: name it in keystore, upstream or trust, or leave the block out"},
		"nowhere and for nothing":   {server("vault: { timeout: 1s }\n"), "vault is configured, but nothing uses it"},
		"no address":                {logged("timeout: 1s"), "3:1: vault.address is missing"},
		"no URL":                    {logged(`address: "vault:8200"`), `vault.address "vault:8200": want https://host:port`},
		"another scheme":            {logged(`address: "ftp://v"`), "want https://host:port"},
		"a path":                    {logged(`address: "https://v/v1"`), "want https://host:port"},
		"a query":                   {logged(`address: "https://v?x=1"`), "want https://host:port"},
		"in clear":                  {logged(`address: "http://10.0.0.1:8200"`), "a token would cross the network in clear; use https"},
		"certificates of plain":     {logged(`address: "http://127.0.0.1:8200", ca_file: x`), "is plain http, which has no certificates"},
		"the name of plain":         {logged(`address: "http://localhost:8200", server_name: x`), "is plain http, which has no certificates"},
		"a client's cert in plain":  {with(`address: "http://[::1]:8200", login: { method: cert, cert_file: c, key_file: k }`), "is plain http, which has no certificates: use https, or leave ca_file, server_name and login.cert_file out"},
		"a name with a port":        {logged(address + `, server_name: "v:8200"`), `vault.server_name "v:8200": want a bare name`},
		"short patience":            {logged(address + ", timeout: 10ms"), "vault.timeout 10ms: want 100ms to 30s"},
		"long patience":             {logged(address + ", timeout: 1m"), "vault.timeout 1m0s: want 100ms to 30s"},
		"a namespace of blanks":     {logged(address + `, namespace: "a b"`), `vault.namespace "a b": use segments`},
		"no login":                  {with(address), "3:1: vault.login.method is missing: say how to log in: token, approle, jwt, kubernetes, cert"},
		"an unknown login":          {login("method: apprle"), `vault.login.method "apprle" is unknown: use token, approle, jwt, kubernetes, cert; did you mean "approle"?`},
		"token without its file":    {login("method: token"), "vault.login.token_file is missing, and the method token needs it"},
		"token with a mount":        {login("method: token, token_file: t, mount: token"), "vault.login.mount is not for the method token"},
		"token with another's key":  {login("method: token, token_file: t, jwt_file: j"), "3:76: vault.login.jwt_file is not for the method token: leave it out, or use another method"},
		"approle without its role":  {login("method: approle, secret_id_file: s"), "vault.login.role_id is missing, and the method approle needs it"},
		"approle with jwt's role":   {login("method: approle, role_id: r, secret_id_file: s, role: r"), "vault.login.role is not for the method approle"},
		"approle without secret":    {login("method: approle, role_id: r"), "vault.login.secret_id_file is missing"},
		"jwt without its role":      {login("method: jwt, jwt_file: j"), "vault.login.role is missing, and the method jwt needs it"},
		"kubernetes without role":   {login("method: kubernetes"), "vault.login.role is missing, and the method kubernetes needs it"},
		"half a client certificate": {login("method: token, token_file: t, cert_file: c"), "vault.login.cert_file and vault.login.key_file belong together: give both or none"},
		"cert without its key":      {login("method: cert, cert_file: c"), "vault.login.key_file is missing, and the method cert needs it"},
		"a mount with auth":         {login("method: jwt, role: r, jwt_file: j, mount: auth/east"), `vault.login.mount "auth/east": leave auth/ out: east`},
		"a mount with a slash":      {login("method: jwt, role: r, jwt_file: j, mount: east/"), `vault.login.mount "east/": use segments of letters, digits`},
		"control CA in memory":      {server("keystore: { control_ca: memory }\n"), "3:13: keystore.control_ca: memory: the control CA has to outlive the process, or every agent would have to enrol again: use file or vault-transit"},
		"a home that is none":       {server("keystore: { intermediates: vault }\n"), `keystore.intermediates "vault" is unknown: use file, memory, vault-transit`},
		"nobody signs":              {server("keystore: { intermediates: memory }\n"), "3:13: keystore.intermediates: memory needs somebody who signs at every start: add upstream.vault_pki, or use file or vault-transit"},
		"Transit for nothing":       {server(someVault + "keystore: { transit: { mount: transit } }\n"), "keystore.transit.mount is given, but no key is made in Transit: set keystore.intermediates or keystore.control_ca to vault-transit"},
		"older keys, but nowhere":   {server("keystore: { intermediates: file, transit: { mount: transit } }\n"), "vault.address is missing, and keystore.transit.mount needs a Vault"},
		"a prefix for nothing":      {server("keystore: { intermediates: file, transit: { prefix: x } }\n"), "keystore.transit.prefix is given, but no key"},
		"a prefix that no key has":  {server(someVault + "keystore: { control_ca: vault-transit, transit: { prefix: -x } }\n"), `keystore.transit.prefix "-x": use up to 128 letters, digits`},
		"a trust domain with _":     {of("a_b.org") + someVault + "keystore: { control_ca: vault-transit }\n", "4:1: keystore.transit.prefix is missing: the default would be signet-east_a_b.org_"},
		"a long trust domain":       {of(strings.Repeat("a", 120)) + someVault + "keystore: { control_ca: vault-transit }\n", "keystore.transit.prefix is missing"},
		"a prefix with a slash":     {server(someVault + "keystore: { control_ca: vault-transit, transit: { prefix: a/b } }\n"), `keystore.transit.prefix "a/b": use up to 128 letters, digits`},
		"a mount with ..":           {server(someVault + "keystore: { control_ca: vault-transit, transit: { mount: a/../b } }\n"), `keystore.transit.mount "a/../b": use segments`},
		"PKI without a mount":       {server(someVault + kvMount + "upstream: { vault_pki: { life: 72h } }\n"), "5:13: upstream.vault_pki.mount is missing, and upstream.vault_pki.life is given: say where the engine is mounted, or leave the block out"},
		"an issuer without a mount": {server(someVault + kvMount + "upstream: { vault_pki: { issuer: x } }\n"), "upstream.vault_pki.mount is missing, and upstream.vault_pki.issuer is given"},
		"an issuer that is a path":  {server(someVault + "upstream: { vault_pki: { mount: pki, issuer: a/b } }\n"), `upstream.vault_pki.issuer "a/b": use up to 128 letters, digits`},
		"a short life":              {server(someVault + "upstream: { vault_pki: { mount: pki, life: 47h } }\n"), "4:38: upstream.vault_pki.life 47h is less than twice leaf.max_ttl 24h"},
		"a short life by default":   {server(someVault + pkiMount + "leaf: { max_ttl: 100h }\n"), "5:9: upstream.vault_pki.life 168h is less than twice leaf.max_ttl 100h"},
		"half a second":             {server(someVault + "upstream: { vault_pki: { mount: pki, life: 72h0m0.5s } }\n"), "upstream.vault_pki.life 72h0m0.5s: X.509 counts in whole seconds"},
		"KV without a mount":        {server(someVault + pkiMount + "trust: { vault_kv: { path: x } }\n"), "trust.vault_kv.mount is missing, and trust.vault_kv.path is given"},
		"a path from the root":      {server(someVault + "trust: { vault_kv: { mount: kv, path: /signet } }\n"), `trust.vault_kv.path "/signet": use segments`},
		"a long path":               {server(someVault + "trust: { vault_kv: { mount: kv, path: " + strings.Repeat("a", 256) + " } }\n"), "trust.vault_kv.path has 256 bytes: at most 255 are allowed"},
		"two engines at one mount":  {server(someVault + "trust: { vault_kv: { mount: pki } }\n" + pkiMount), "upstream.vault_pki.mount and trust.vault_kv.mount are both pki: an engine has a mount of its own"},
		"two at the default":        {server(someVault + "keystore: { control_ca: vault-transit }\ntrust: { vault_kv: { mount: transit } }\n"), "5:22: keystore.transit.mount and trust.vault_kv.mount are both transit"},
		"key of the other role":     {"state_dir: x\nsockets: []\nvault: {}\n", `it belongs into the configuration of the server`},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, "c.yaml", c.text)
			var err error
			if strings.Contains(c.text, "sockets") {
				_, err = LoadAgent(path)
			} else {
				_, err = LoadServer(path)
			}
			var found strictyaml.Findings
			if !errors.As(err, &found) || len(found) != 1 {
				t.Fatalf("want one finding, got %v", err)
			}
			if !strings.Contains(found[0].String(), c.want) {
				t.Errorf("got  %s\nwant %s", found[0], c.want)
			}
		})
	}
}

func TestNoDefaultPrefixOfKeysIsTheBeginOfAnothersKey(t *testing.T) {
	tds := []string{"a", "b", "a.b", "a-b", "a_b", "a_", "_a", "a_a", "east", "east_a", "a_east", "intermediate", "a_intermediate", "a.b_a", "-a", "root"}
	clusters := []string{"a", "b", "east", "a-b", "root"}
	type holder struct {
		what, prefix string
		names        []string
	}
	var all []holder
	without := 0
	for _, td := range tds {
		td := spiffeid.RequireTrustDomainFromString(td)
		all = append(all, holder{"root of " + td.Name(), rootPrefix(td), []string{"root"}})
		for _, c := range clusters {
			if p := clusterPrefix(c, td); p != "" {
				all = append(all, holder{c + " of " + td.Name(), p, []string{"control-ca", "intermediate", "a", "root"}})
			} else {
				without++
			}
		}
	}
	if without != 8*len(clusters) {
		t.Errorf("%d have no default", without)
	}
	for _, a := range all {
		for _, b := range all {
			for _, name := range b.names {
				// A root's policy names its key.
				if a.what != b.what && (strings.HasPrefix(b.prefix+name, a.prefix) && len(a.names) > 1 || a.prefix+a.names[0] == b.prefix+name) {
					t.Errorf("%s: %s* covers %s%s of %s", a.what, a.prefix, b.prefix, name, b.what)
				}
			}
		}
	}
}

func TestANamespaceIsTakenAsVaultShowsIt(t *testing.T) {
	s, err := LoadServer(write(t, "c.yaml", logged(`address: "https://v:8200", namespace: team/a/`)))
	if err != nil || s.Vault.Namespace != "team/a" {
		t.Errorf("%v, %v", s, err)
	}
}

func TestAPasswordInTheAddressIsNotShown(t *testing.T) {
	for _, address := range []string{"https://me:geheim@v:8200", "https://me:ge heim@v", "me:geheim@v"} {
		_, err := LoadServer(write(t, "c.yaml", logged("address: \""+address+"\"")))
		if err == nil || !strings.Contains(err.Error(), "names a user") || strings.Contains(err.Error(), "geheim") || strings.Contains(err.Error(), "heim@") {
			t.Errorf("%v", err)
		}
	}
}

func TestAMistakeElsewhereIsNotOneOfVaultAsWell(t *testing.T) {
	for _, text := range []string{
		"cluster: east\n" + someVault + kvMount,
		"trust_domain: example.org\ncluster: East One\n" + someVault + "keystore: { control_ca: vault-transit }\n",
	} {
		_, err := LoadServer(write(t, "c.yaml", text))
		var found strictyaml.Findings
		if !errors.As(err, &found) || len(found) != 1 || strings.Contains(found[0].Key, "vault") || strings.Contains(found[0].Key, "transit") {
			t.Errorf("%v", err)
		}
	}
}
