package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const vaultBlock = "vault:\n  address: https://vault.example.org:8200\n  timeout: 500ms\n  ca_file: ca.pem\n  login: {method: token, token_file: token}\n"

func loadRootKey(t *testing.T, text string) (*RootKey, string, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vault.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := LoadRootKey(path, spiffeid.RequireTrustDomainFromString("example.org"))
	return k, filepath.Dir(path), err
}

func TestARootKeyIsReadAsItIsWritten(t *testing.T) {
	for text, want := range map[string]RootKey{
		"transit: {}\n":                        {Transit: Transit{"transit", "signet_example.org_"}},
		"transit: {mount: a/b, prefix: p}\n":   {Transit: Transit{"a/b", "p"}},
		"pki: {}\n":                            {PKI: RootPKI{"pki", "signet-example.org-root"}},
		"pki: {mount: root, issuer: r-2026}\n": {PKI: RootPKI{"root", "r-2026"}},
	} {
		k, dir, err := loadRootKey(t, vaultBlock+text)
		if err != nil {
			t.Fatal(err)
		}
		want.Vault = Vault{
			Address: "https://vault.example.org:8200", Timeout: 500 * time.Millisecond, CAFile: filepath.Join(dir, "ca.pem"),
			Login: VaultLogin{Method: LoginToken, TokenFile: filepath.Join(dir, "token")},
		}
		if *k != want {
			t.Errorf("%s: %+v, want %+v", text, *k, want)
		}
		written, err := k.Text()
		if err != nil {
			t.Fatal(err)
		}
		again, _, err := loadRootKey(t, string(written))
		if err != nil || *again != want {
			t.Errorf("%s: %+v, %v, from\n%s", text, again, err, written)
		}
	}
}

func TestARootKeyThatContradictsItselfIsRefused(t *testing.T) {
	for text, want := range map[string]string{
		"":                                      ": vault.address is missing",
		"transit: {}\n":                         ": vault.address is missing",
		"vault: {address: ''}\ntransit: {}\n":   "vault.address is missing",
		vaultBlock:                              ":1:1: give either transit",
		vaultBlock + "transit: {}\npki: {}\n":   ":7:1: give either transit",
		vaultBlock + "pki: {issuer: default}\n": "give the root's a name",
		vaultBlock + "pki: {issuer: a/b}\n":     `pki.issuer "a/b"`,
		vaultBlock + "pki: {mount: /pki}\n":     `pki.mount "/pki"`,
		vaultBlock + "transit: {prefix: _}\n":   `transit.prefix "_"`,
		vaultBlock + "transit: {key: x}\n":      `unknown key "key"`,
		"vault: {address: 'https://v', login: {method: nine}}\npki: {}\n": "vault.login.method",
	} {
		_, _, err := loadRootKey(t, text)
		if err == nil || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}
