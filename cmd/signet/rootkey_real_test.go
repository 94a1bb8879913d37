//go:build real

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/test/lab"
)

func TestRootsInRealVault(t *testing.T) {
	v, err := lab.StartVault(t.Context(), lab.VaultConfig{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Stop)
	for _, engine := range []string{"transit", "pki"} {
		if err := v.Mount(t.Context(), engine, engine); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]func(*testing.T, *lab.Vault){
		"it is made once and signs":                rootIsMadeOnceAndSigns,
		"it comes of a reviewed file":              rootComesOfAReviewedFile,
		"an interrupted init is gone on with":      interruptedInitIsGoneOnWith,
		"what changed underneath is noticed":       whatChangedUnderneathIsNoticed,
		"each path that the policy lacks is named": eachPathThatThePolicyLacksIsNamed,
	} {
		t.Run(name, func(t *testing.T) { test(t, v) })
	}
}

// vaultDesk is a desk for ceremonies whose keys are in the real Vault.
type vaultDesk struct {
	ceremonyDesk
	v *lab.Vault
	// file says where the key is, token is the file with the token it names.
	file, token string
}

func newVaultDesk(t *testing.T, v *lab.Vault, engine string) vaultDesk {
	t.Helper()
	dir := t.TempDir()
	d := vaultDesk{v: v, token: filepath.Join(dir, "token")}
	d.dir, d.root, d.pass = dir, filepath.Join(dir, "root"), write(t, filepath.Join(dir, "pass"), "correct horse\n")
	d.file = write(t, filepath.Join(dir, "vault.yaml"), d.blocks(engine))
	d.csr, d.key = d.request(t, "example.org", "east")
	d.may(t, d.needs(t)...)
	return d
}

func (d vaultDesk) blocks(engine string) string {
	return fmt.Sprintf("vault:\n  address: %s\n  ca_file: %s\n  login: {method: token, token_file: token}\n%s\n", d.v.Address, d.v.CAFile, engine)
}

// needs is the policy that the dry run prints: it is for what that is asked to make.
func (d vaultDesk) needs(t *testing.T, args ...string) []string {
	t.Helper()
	write(t, d.token, "none yet")
	out := d.init(t, append(args, "--dry-run")...).expect(t, exitYes, "").out
	_, policy, ok := strings.Cut(out, "The policy that this needs in Vault:\n\n")
	if !ok {
		t.Fatalf("no policy in %s", out)
	}
	var paths []string
	for one := range strings.SplitSeq(policy, "path ") {
		if strings.HasPrefix(one, `"`) {
			paths = append(paths, "path "+one)
		}
	}
	return paths
}

// may makes a token of such a policy.
func (d vaultDesk) may(t *testing.T, policy ...string) {
	t.Helper()
	name := strings.ReplaceAll(strings.ToLower(t.Name()), "/", "-")
	if err := d.v.Policy(t.Context(), name, strings.Join(policy, "\n")); err != nil {
		t.Fatal(err)
	}
	// no_default_policy: what the dry run prints is all there is.
	a, err := d.v.Root().Write(t.Context(), "auth/token/create", map[string]any{"policies": []string{name}, "no_default_policy": true})
	if err != nil {
		t.Fatal(err)
	}
	write(t, d.token, a.Auth.Token)
}

func (d vaultDesk) init(t *testing.T, args ...string) ran {
	t.Helper()
	return root(t, append([]string{"init", "--trust-domain", "example.org", "--dir", d.root, "--passphrase-file", d.pass, "--vault", d.file}, args...)...)
}

// verified signs, and has openssl verify what comes of it down to a fresh chain.
func (d vaultDesk) verified(t *testing.T) {
	t.Helper()
	out := filepath.Join(d.dir, "chain.pem")
	os.Remove(out)
	signed := d.sign(t, "--out", out).expect(t, exitYes, "Signed: entry")
	if strings.Contains(signed.err, "correct horse") {
		t.Error("a secret is shown")
	}
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := ca.ParseChain(text)
	if err != nil || len(chain) != 2 || ca.CertificateFingerprint(chain[1].Raw) != d.rootFingerprint || ca.KeyFingerprint(chain[0].RawSubjectPublicKeyInfo) != d.key {
		t.Fatalf("the chain is %v, %v", chain, err)
	}
	if said, err := exec.Command("openssl", "verify", "-x509_strict", "-CAfile", filepath.Join(d.root, "root.pem"), out).CombinedOutput(); err != nil {
		t.Errorf("openssl: %s", said)
	}
}

func rootIsMadeOnceAndSigns(t *testing.T, v *lab.Vault) {
	for name, c := range map[string]struct{ engine, algorithm, where string }{
		"transit":     {"transit: {}", "ecdsa-p384", "Vault's Transit engine, mount transit, key signet_example.org_root"},
		"transit-rsa": {"transit: {prefix: rsa-}", "rsa-2048", "key rsa-root"},
		"pki":         {"pki: {}", "ecdsa-p256", "Vault's PKI engine, mount pki, issuer signet-example.org-root"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newVaultDesk(t, v, c.engine)
			d.may(t, d.needs(t, "--algorithm", c.algorithm)...)
			made := d.init(t, "--algorithm", c.algorithm, "--life", "20y").expect(t, exitYes, c.where)
			d.rootFingerprint = strings.TrimSpace(made.out)
			if said, err := exec.Command("openssl", "x509", "-in", filepath.Join(d.root, "root.pem"), "-noout", "-text").Output(); err != nil ||
				!strings.Contains(string(said), "URI:spiffe://example.org") || !strings.Contains(string(said), "CA:TRUE, pathlen:1") {
				t.Errorf("%s, %v", said, err)
			}
			d.verified(t)
			d.verified(t)
			var shown rootShown
			if err := json.Unmarshal([]byte(root(t, "show", "--dir", d.root, "-o", "json").expect(t, exitYes, "").out), &shown); err != nil {
				t.Fatal(err)
			}
			if shown.Log.Size != 3 || shown.Fingerprint != d.rootFingerprint || !strings.Contains(shown.KeyIn, c.where) || shown.Signed[1].KeyFingerprint != d.key {
				t.Errorf("%+v", shown)
			}
			if life := shown.NotAfter.Sub(shown.NotBefore); life.Hours() < 20*365*24-1 {
				t.Errorf("it lives %s", life)
			}
			d.init(t).expect(t, exitNo, "a root is there already")
			d.root = filepath.Join(d.dir, "second")
			second := d.init(t, "--algorithm", c.algorithm)
			if second.code == exitYes || !strings.Contains(second.err, "already") {
				t.Errorf("a second root took the key of the first: %+v", second)
			}
			if _, err := os.Stat(d.root); err == nil {
				t.Error("it left a folder behind")
			}
		})
	}
}

func rootComesOfAReviewedFile(t *testing.T, v *lab.Vault) {
	d := newVaultDesk(t, v, "pki: {issuer: reviewed}")
	file := write(t, filepath.Join(d.dir, "root.yaml"), "trust_domain: example.org\ndir: root\nlife: 5y\n"+d.blocks("pki: {issuer: reviewed}"))
	d.rootFingerprint = strings.TrimSpace(root(t, "init", "-f", file, "--passphrase-file", d.pass).expect(t, exitYes, "The root is in").out)
	d.verified(t)
}

// interruptedInitIsGoneOnWith loses all that comes after Vault has made the key.
func interruptedInitIsGoneOnWith(t *testing.T, v *lab.Vault) {
	for _, engine := range []string{"transit: {prefix: cut-}", "pki: {issuer: cut}"} {
		d := newVaultDesk(t, v, engine)
		first := d.init(t).expect(t, exitYes, "")
		fingerprint := strings.TrimSpace(first.out)
		for _, lost := range []string{"root.pem", "log", "ceremonies"} {
			if err := os.RemoveAll(filepath.Join(d.root, lost)); err != nil {
				t.Fatal(err)
			}
		}
		d.init(t, "--dry-run").expect(t, exitYes, "")
		again := d.init(t).expect(t, exitYes, "begun before, and gone on with")
		d.rootFingerprint = strings.TrimSpace(again.out)
		if strings.HasPrefix(engine, "pki") && d.rootFingerprint != fingerprint {
			t.Error("Vault made a second root")
		}
		if strings.HasPrefix(engine, "transit") {
			a, err := d.v.Root().Read(t.Context(), "transit/keys/cut-root")
			if err != nil || fmt.Sprint(a.Data["latest_version"]) != "1" {
				t.Errorf("the key has versions up to %v, %v", a, err)
			}
		}
		d.verified(t)
	}
}

func whatChangedUnderneathIsNoticed(t *testing.T, v *lab.Vault) {
	d := newVaultDesk(t, v, "transit: {prefix: changed-}")
	d.rootFingerprint = strings.TrimSpace(d.init(t).expect(t, exitYes, "").out)
	admin := func(path string, body map[string]any) {
		t.Helper()
		if _, err := d.v.Root().Write(t.Context(), path, body); err != nil {
			t.Fatal(err)
		}
	}
	admin("transit/keys/changed-root/rotate", nil)
	d.verified(t) // the first version signs on
	admin("transit/keys/changed-root/config", map[string]any{"deletion_allowed": true})
	if err := d.v.Root().Delete(t.Context(), "transit/keys/changed-root"); err != nil {
		t.Fatal(err)
	}
	d.sign(t).expect(t, exitCouldNotSay, "its key is not there")
	admin("transit/keys/changed-root", map[string]any{"type": "ecdsa-p256"})
	d.sign(t).expect(t, exitCouldNotSay, "does not match the certificate")

	p := newVaultDesk(t, v, "pki: {issuer: changed}")
	p.rootFingerprint = strings.TrimSpace(p.init(t).expect(t, exitYes, "").out)
	other := newVaultDesk(t, v, "pki: {issuer: changed-other}")
	other.init(t).expect(t, exitYes, "")
	if err := p.v.Root().Delete(t.Context(), "pki/issuer/changed"); err != nil {
		t.Fatal(err)
	}
	p.sign(t).expect(t, exitCouldNotSay, "has no issuer changed")
}

func eachPathThatThePolicyLacksIsNamed(t *testing.T, v *lab.Vault) {
	for _, engine := range []string{"transit: {prefix: needs-}", "pki: {issuer: needs}"} {
		d := newVaultDesk(t, v, engine)
		whole := d.needs(t)
		if len(whole) < 5 {
			t.Fatalf("the policy has %d paths", len(whole))
		}
		for i, lacking := range whole {
			path := strings.Split(lacking, `"`)[1]
			if path == "auth/token/renew-self" {
				continue // a ceremony is over before
			}
			d.may(t, slices.Delete(slices.Clone(whole), i, i+1)...)
			got := d.init(t)
			if got.code == exitYes || !strings.Contains(got.err, path) || strings.Count(strings.SplitN(got.err, "signet: ", 2)[1], "\n") != 1 {
				t.Errorf("without %s: %+v", path, got)
			}
			if _, err := os.Stat(d.root); err == nil {
				t.Fatalf("without %s a folder was made", path)
			}
		}
		d.may(t, whole...)
		d.rootFingerprint = strings.TrimSpace(d.init(t).expect(t, exitYes, "").out)
		d.verified(t)
		d.may(t, slices.DeleteFunc(slices.Clone(whole), func(one string) bool { return !strings.Contains(one, "-self") })...)
		d.sign(t).expect(t, exitNo, "the policy of our role in Vault lacks")
		write(t, d.token, "s.wrong")
		if wrong := d.sign(t); wrong.code != exitCouldNotSay || strings.Contains(wrong.err, "s.wrong") {
			t.Errorf("a wrong token: %+v", wrong)
		}
	}
}
