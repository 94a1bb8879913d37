//go:build real

package transit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/ceremony"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/test/lab"
	"github.com/signet-ca/signet/vault"
)

// real is an engine in the real Vault, named after the test.
type real struct {
	*lab.Vault
	mount string
	// clients are those that stores go by.
	clients map[*Store]*vault.Client
}

const realPrefix = "signet-east-"

func realTransit(t *testing.T) real {
	t.Helper()
	v, err := theVault.Get()
	if err != nil {
		t.Fatal(err)
	}
	mount := strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-"))
	if err := v.Mount(t.Context(), mount, "transit"); err != nil {
		t.Fatal(err)
	}
	return real{v, mount, map[*Store]*vault.Client{}}
}

// needs are those of keys of whatever names.
func (r real) needs() []vault.Need {
	change := []string{"read", "update"}
	return append(append(vault.Needs(), ListNeeds(Config{Mount: r.mount})...),
		vault.Need{Path: r.mount + "/keys/" + realPrefix + "*", Capabilities: change, Why: "make and change our keys"},
		vault.Need{Path: r.mount + "/sign/" + realPrefix + "*", Capabilities: change[1:], Why: "sign"})
}

// store logs in with a token that may do with keys of the prefix what Needs lists for one, and nothing else.
func (r real) store(t *testing.T, change ...func(*vault.Config, *Config)) *Store {
	t.Helper()
	return r.allowed(t, vault.Policy(r.needs()), change...)
}

func (r real) allowed(t *testing.T, policy string, change ...func(*vault.Config, *Config)) *Store {
	t.Helper()
	name := r.mount + "-" + strings.ToLower(rand.Text())
	if err := r.Policy(t.Context(), name, policy); err != nil {
		t.Fatal(err)
	}
	token, err := r.MakeToken(t.Context(), lab.VaultLife{Policies: []string{name}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	// An RSA-4096 key takes Vault seconds to make.
	vc := vault.Config{Address: r.Address, CAFile: r.CAFile, Timeout: time.Minute, Login: vault.Login{Method: "token", TokenFile: file}}
	c := Config{Mount: r.mount, Prefix: realPrefix, Timeout: 30 * time.Second, Metrics: prometheus.NewRegistry()}
	for _, ch := range change {
		ch(&vc, &c)
	}
	client, err := vault.New(vc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	c.Vault = client
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	r.clients[s] = client
	return s
}

// admin does something to a key behind our back.
func (r real) admin(t *testing.T, op, name string, body map[string]any) {
	t.Helper()
	path := r.mount + "/keys/" + realPrefix + name
	if op != "" {
		path += "/" + op
	}
	if _, err := r.Root().Write(t.Context(), path, body); err != nil {
		t.Fatal(err)
	}
}

func (r real) remove(t *testing.T, name string) {
	t.Helper()
	r.admin(t, "config", name, map[string]any{"deletion_allowed": true})
	if err := r.Root().Delete(t.Context(), r.mount+"/keys/"+realPrefix+name); err != nil {
		t.Fatal(err)
	}
}

// certifies makes a CA certificate with the key and a leaf under it, and has crypto/x509 verify both.
func certifies(k keystore.Key, alg x509.SignatureAlgorithm) error {
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SignatureAlgorithm: alg,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, k.Public(), k)
	if err != nil {
		return err
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, DNSNames: []string{"leaf"}, SignatureAlgorithm: alg,
	}
	if der, err = x509.CreateCertificate(rand.Reader, leaf, root, leafKey.Public(), k); err != nil {
		return err
	}
	signed, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	_, err = signed.Verify(x509.VerifyOptions{Roots: pool, DNSName: "leaf"})
	return err
}

// made is a key for which Vault may need longer than a call may take, as it does now and then for RSA-4096 on a busy machine: whoever
// wants one asks again.
func (r real) made(t *testing.T, s *Store, name string, alg keystore.Algorithm) (k keystore.Key) {
	t.Helper()
	var refused error
	err := lab.Until(t.Context(), "a key of "+string(alg), 10*time.Minute, func() (err error) {
		if k, err = s.Create(t.Context(), name, alg, 0); errors.Is(err, keystore.ErrAway) {
			return err
		}
		refused = err
		return nil
	})
	if err := errors.Join(err, refused); err != nil {
		t.Fatal(err)
	}
	return k
}

func TestRealKeysOfEachAlgorithmSignCertificates(t *testing.T) {
	r := realTransit(t)
	s := r.store(t)
	missing, err := r.clients[s].Missing(t.Context(), r.needs())
	if err != nil || len(missing) != 0 {
		t.Fatalf("with the policy of our own needs: %v, %v", missing, err)
	}
	for _, alg := range keystore.Algorithms() {
		k := r.made(t, s, "k-"+string(alg), alg)
		if keystore.AlgorithmOf(k.Public()) != alg || k.Ref().Version != 1 {
			t.Errorf("%s: got %s, %s", alg, keystore.AlgorithmOf(k.Public()), k.Ref())
		}
		if alg == keystore.Ed25519 {
			sig, err := k.Sign(rand.Reader, []byte("example.org/east\n1\n"), crypto.Hash(0))
			if err != nil || !ed25519.Verify(k.Public().(ed25519.PublicKey), []byte("example.org/east\n1\n"), sig) {
				t.Errorf("%s: %v", alg, err)
			}
			continue
		}
		kinds := []x509.SignatureAlgorithm{x509.UnknownSignatureAlgorithm}
		if _, ok := k.Public().(*rsa.PublicKey); ok {
			kinds = append(kinds, x509.SHA384WithRSA, x509.SHA512WithRSA, x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS)
		} else {
			kinds = append(kinds, x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512)
		}
		for _, kind := range kinds {
			if err := certifies(k, kind); err != nil {
				t.Errorf("%s as %s: %v", alg, kind, err)
			}
		}
		// And as another process would, in which nothing is left of this one.
		again, err := r.store(t).Open(t.Context(), k.Ref())
		if err != nil || !samePublic(k.Public(), again.Public()) {
			t.Fatalf("%s opened again: %v", alg, err)
		}
		if err := certifies(again, 0); err != nil {
			t.Errorf("%s opened again: %v", alg, err)
		}
	}
	refs, err := s.List(t.Context())
	if err != nil || len(refs) != len(keystore.Algorithms()) {
		t.Errorf("%v, %v", refs, err)
	}
}

// memoryLog is a ca.Log that keeps the entries.
type memoryLog struct{ entries []*auditv1.Entry }

func (l *memoryLog) Append(_ context.Context, entries []*auditv1.Entry) ([]audit.Receipt, error) {
	l.entries = append(l.entries, entries...)
	return make([]audit.Receipt, len(entries)), nil
}

func TestRealARootInTransitHoldsItsCeremony(t *testing.T) {
	r := realTransit(t)
	s := r.store(t)
	td := spiffeid.RequireTrustDomainFromString("example.org")
	for _, alg := range []keystore.Algorithm{keystore.ECDSAP256, keystore.ECDSAP384, keystore.RSA2048} {
		log := &memoryLog{}
		rootKey := create(t, s, "root-"+string(alg), alg, 0)
		rootPlan, err := ca.NewRootPlan(td, rootKey.Public(), time.Now(), 0)
		if err != nil {
			t.Fatal(err)
		}
		root, _, err := ceremony.SelfSign(t.Context(), log, rootKey, rootPlan, &auditv1.Evidence{Caller: "test"})
		if err != nil {
			t.Fatalf("root with %s: %v", alg, err)
		}
		key := create(t, s, "intermediate-"+string(alg), alg, 0)
		plan, err := ca.NewIntermediatePlan(td, "east", key.Public(), time.Now(), 0)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := ceremony.Request(key, plan)
		if err != nil {
			t.Fatalf("request with %s: %v", alg, err)
		}
		up, err := ceremony.NewAtHand(ceremony.AtHandConfig{Root: root, Key: rootKey, Log: log, By: &auditv1.Evidence{Caller: "test"}})
		if err != nil {
			t.Fatal(err)
		}
		answer, err := up.Sign(t.Context(), plan, csr)
		if err != nil {
			t.Fatalf("intermediate with %s: %v", alg, err)
		}
		if err := plan.Check(answer.Chain, []*x509.Certificate{root}); err != nil || len(log.entries) != 2 {
			t.Errorf("%s: %v, %d entries", alg, err, len(log.entries))
		}
	}
}

func TestRealAKeyThatIsRotatedUnderneathSignsWithItsPinnedVersion(t *testing.T) {
	r := realTransit(t)
	s := r.store(t)
	k := create(t, s, "ca", keystore.ECDSAP256, 0)
	for range 12 {
		r.admin(t, "rotate", "ca", nil)
	}
	if err := certifies(k, 0); err != nil {
		t.Error(err)
	}
	var all []keystore.Key
	for v := 1; v <= 13; v++ {
		at, err := s.Open(t.Context(), keystore.Ref{Backend: Backend, Name: "ca", Version: v})
		if err != nil {
			t.Fatal(err)
		}
		if err := certifies(at, 0); err != nil {
			t.Errorf("version %d: %v", v, err)
		}
		if slices.ContainsFunc(all, func(o keystore.Key) bool { return samePublic(o.Public(), at.Public()) }) {
			t.Errorf("version %d has the key of another", v)
		}
		all = append(all, at)
	}
	if !samePublic(all[0].Public(), k.Public()) {
		t.Error("version 1 is another key than was made")
	}
	if next := create(t, s, "ca", keystore.ECDSAP256, 15); next.Ref().Version != 16 {
		t.Error(next.Ref())
	}
}

// TestRealWhatAnAdminCanBreak does to a key in use what an admin can, and wants one clear sentence and no signature.
func TestRealWhatAnAdminCanBreak(t *testing.T) {
	r := realTransit(t)
	s := r.store(t)
	for name, c := range map[string]struct {
		breaks     func(name string)
		notFound   bool
		sign, open string // what the error says; "" = Open has nothing to object
		repairs    func(name string)
	}{
		"deleted": {
			breaks: func(n string) { r.remove(t, n) }, notFound: true, sign: "there is no ", open: "there is no ",
		},
		"anew": {
			breaks: func(n string) {
				r.remove(t, n)
				r.admin(t, "", n, map[string]any{"type": "ecdsa-p256"})
				r.admin(t, "rotate", n, nil)
			}, sign: "not by the key that was opened",
		},
		"anew-shorter": {
			breaks: func(n string) {
				r.remove(t, n)
				r.admin(t, "", n, map[string]any{"type": "ecdsa-p256"})
			}, notFound: true, sign: "no version above 1", open: "no version above 1",
		},
		"other-type": {
			breaks: func(n string) {
				r.remove(t, n)
				r.admin(t, "", n, map[string]any{"type": "rsa-2048"})
				r.admin(t, "rotate", n, nil)
			}, sign: "not by the key that was opened",
		},
		"other-type-that-refuses": {
			breaks: func(n string) {
				r.remove(t, n)
				r.admin(t, "", n, map[string]any{"type": "ed25519"})
				r.admin(t, "rotate", n, nil)
			}, sign: "not by the key that was opened",
		},
		"no-signing-type": {
			breaks: func(n string) {
				r.remove(t, n)
				r.admin(t, "", n, map[string]any{"type": "aes256-gcm96"})
				r.admin(t, "rotate", n, nil)
			}, sign: "signs no certificates", open: "signs no certificates",
		},
		"min-encryption": {
			breaks: func(n string) {
				r.admin(t, "rotate", n, nil)
				r.admin(t, "config", n, map[string]any{"min_encryption_version": 3})
			}, sign: "min_encryption_version 3", open: "min_encryption_version 3",
			repairs: func(n string) { r.admin(t, "config", n, map[string]any{"min_encryption_version": 0}) },
		},
		"min-decryption": {
			breaks: func(n string) {
				r.admin(t, "rotate", n, nil)
				r.admin(t, "config", n, map[string]any{"min_decryption_version": 3})
			}, sign: "min_decryption_version 3", open: "min_decryption_version 3",
			repairs: func(n string) { r.admin(t, "config", n, map[string]any{"min_decryption_version": 1}) },
		},
		"trimmed": {
			breaks: func(n string) {
				r.admin(t, "rotate", n, nil)
				r.admin(t, "config", n, map[string]any{"min_decryption_version": 3, "min_encryption_version": 3})
				r.admin(t, "trim", n, map[string]any{"min_available_version": 3})
			}, notFound: true, sign: "below 3 were destroyed", open: "below 3 were destroyed",
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := create(t, s, name, keystore.ECDSAP256, 1)
			if err := certifies(k, 0); err != nil {
				t.Fatal(err)
			}
			c.breaks(name)
			err := certifies(k, 0)
			says(t, err, "sign with key vault-transit:"+name+"@2: ", c.sign)
			if errors.Is(err, keystore.ErrNotFound) != c.notFound || errors.Is(err, keystore.ErrAway) {
				t.Errorf("not found %t, away %t: %v", errors.Is(err, keystore.ErrNotFound), errors.Is(err, keystore.ErrAway), err)
			}
			_, err = s.Open(t.Context(), k.Ref())
			if c.open == "" {
				if err != nil {
					t.Error(err)
				}
			} else if says(t, err, "open key vault-transit:"+name+"@2: ", c.open); errors.Is(err, keystore.ErrNotFound) != c.notFound {
				t.Errorf("not found %t: %v", errors.Is(err, keystore.ErrNotFound), err)
			}
			if c.repairs == nil {
				return
			}
			c.repairs(name)
			if err := certifies(k, 0); err != nil {
				t.Errorf("once it is repaired: %v", err)
			}
		})
	}
}

func TestRealAnExportableKeyGoesOnButDoesNotGrow(t *testing.T) {
	r := realTransit(t)
	var log bytes.Buffer
	s := r.store(t, func(_ *vault.Config, c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	for _, flag := range []string{"exportable", "allow_plaintext_backup"} {
		name := strings.ReplaceAll(flag, "_", "-")
		k := create(t, s, name, keystore.ECDSAP256, 0)
		if _, err := s.Open(t.Context(), k.Ref()); err != nil || log.Len() > 0 {
			t.Fatalf("%v, %s", err, log.String())
		}
		r.admin(t, "config", name, map[string]any{flag: true})
		if err := k.(*Key).Look(t.Context()); err != nil || k.(*Key).Exposed() == "" {
			t.Errorf("%s: a look says %v and %q", flag, err, k.(*Key).Exposed())
		}
		again, err := s.Open(t.Context(), k.Ref())
		if err != nil {
			t.Fatal(err)
		}
		if err := certifies(again, 0); err != nil {
			t.Error(err)
		}
		if !strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), "can be taken out of Vault") {
			t.Errorf("%s: the log says %q", flag, log.String())
		}
		log.Reset()
		_, err = s.Create(t.Context(), name, keystore.ECDSAP256, 0)
		says(t, err, "delete it in Vault if no CA has a key of it")
	}
	_, err := s.Create(t.Context(), "exportable", keystore.RSA2048, 0)
	says(t, err, "is of type \"ecdsa-p256\"", "wanted is rsa-2048")
}

// TestRealAKeyThatWasImportedIsNotTaken: whoever imported it has its private half.
func TestRealAKeyThatWasImportedIsNotTaken(t *testing.T) {
	r := realTransit(t)
	s := r.store(t)
	for name, more := range map[string][]string{"ca": nil, "grows": {"allow_rotation=true"}} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		path := r.mount + "/keys/" + realPrefix + name
		args := append([]string{"transit", "import", path, base64.StdEncoding.EncodeToString(der), "type=ecdsa-p256"}, more...)
		cmd := exec.CommandContext(t.Context(), "../../.tools/bin/vault", args...)
		cmd.Env = []string{"VAULT_ADDR=" + r.Address, "VAULT_CACERT=" + r.CAFile, "VAULT_TOKEN=" + r.RootToken, "HOME=" + t.TempDir()}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		_, err = s.Create(t.Context(), name, keystore.ECDSAP256, 0)
		says(t, err, path+" was imported into Vault", "private key in hand", "delete it in Vault if no CA has a key of it")
		_, err = s.Create(t.Context(), name, keystore.ECDSAP256, 1)
		says(t, err, "was imported")
		_, err = s.Open(t.Context(), keystore.Ref{Backend: Backend, Name: name, Version: 1})
		says(t, err, "was imported", "taint")
		if info, err := r.Root().Read(t.Context(), path); err != nil || fmt.Sprint(info.Data["latest_version"]) != "1" {
			t.Errorf("%v, %v: a version was added to it", info, err)
		}
	}
}

// TestRealAPolicyAllowsNoMoreThanIsUsed with the policy of two keys.
func TestRealAPolicyAllowsNoMoreThanIsUsed(t *testing.T) {
	r := realTransit(t)
	needs, err := Needs(Config{Mount: r.mount, Prefix: realPrefix},
		Use{Name: "intermediate", Algorithm: keystore.ECDSAP256, Made: true, Grows: true, Shrinks: true}, Use{Name: "control-ca", Algorithm: keystore.ECDSAP384, Made: true})
	if err != nil {
		t.Fatal(err)
	}
	s := r.allowed(t, vault.Policy(append(vault.Needs(), needs...)))
	client := r.clients[s]
	if missing, err := client.Missing(t.Context(), needs); err != nil || len(missing) != 0 {
		t.Fatalf("%v, %v", missing, err)
	}
	if err := certifies(create(t, s, "control-ca", keystore.ECDSAP384, 0), 0); err != nil {
		t.Error(err)
	}
	for version := range 3 {
		if err := certifies(create(t, s, "intermediate", keystore.ECDSAP256, version), 0); err != nil {
			t.Error(err)
		}
	}
	for version := 1; version <= 2; version++ {
		if err := s.Delete(t.Context(), keystore.Ref{Backend: Backend, Name: "intermediate", Version: version}); err != nil {
			t.Error(err)
		}
	}
	// Each of these would let the key out of Vault, end it, or make another.
	for _, refused := range []struct {
		path string
		body map[string]any
	}{
		{"keys/" + realPrefix + "zzz", map[string]any{"type": "ecdsa-p256"}},
		{"keys/" + realPrefix + "zzz", map[string]any{"type": "rsa-2048", "exportable": true}},
		{"keys/" + realPrefix + "intermediate", map[string]any{"type": "ecdsa-p256", "exportable": true}},
		{"keys/" + realPrefix + "intermediate", map[string]any{"type": "ecdsa-p256", "allow_plaintext_backup": true}},
		{"keys/" + realPrefix + "intermediate", map[string]any{"type": "rsa-2048"}},
		{"keys/" + realPrefix + "intermediate/config", map[string]any{"exportable": true}},
		{"keys/" + realPrefix + "intermediate/config", map[string]any{"allow_plaintext_backup": true}},
		{"keys/" + realPrefix + "intermediate/config", map[string]any{"deletion_allowed": true}},
		{"keys/" + realPrefix + "intermediate/config", map[string]any{"auto_rotate_period": "1h"}},
		{"keys/" + realPrefix + "intermediate/import_version", map[string]any{"ciphertext": "x"}},
		{"keys/" + realPrefix + "control-ca/rotate", nil},
		{"keys/" + realPrefix + "control-ca/config", map[string]any{"min_decryption_version": 1}},
		{"sign/" + realPrefix + "zzz/sha2-256", map[string]any{"input": ""}},
		{"sign/" + realPrefix + "intermediate/sha2-512", map[string]any{"input": ""}},
		{"sign/" + realPrefix + "intermediate", map[string]any{"input": ""}},
	} {
		if _, err := client.Write(t.Context(), r.mount+"/"+refused.path, refused.body); !errors.Is(err, vault.ErrDenied) {
			t.Errorf("%s with %v: %v", refused.path, refused.body, err)
		}
	}
	for _, path := range []string{"export/signing-key/" + realPrefix + "intermediate", "backup/" + realPrefix + "intermediate", "keys/" + realPrefix + "zzz"} {
		if _, err := client.Read(t.Context(), r.mount+"/"+path); !errors.Is(err, vault.ErrDenied) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestRealALookFindsWhatWouldNotSign, with a key behind our back.
func TestRealALookFindsWhatWouldNotSign(t *testing.T) {
	r := realTransit(t)
	s := r.store(t)
	k := create(t, s, "ca", keystore.ECDSAP256, 0).(*Key)
	if err := k.Look(t.Context()); err != nil {
		t.Fatal(err)
	}
	// What it asks where signatures have failed, Vault refuses where it could have signed, and nowhere else.
	_, err := r.clients[s].Write(t.Context(), r.mount+"/sign/"+realPrefix+"ca/sha2-256", map[string]any{"batch_input": []any{}, "key_version": 1})
	if !errors.Is(err, vault.ErrRefused) || !strings.Contains(err.Error(), "missing batch input") {
		t.Errorf("an empty batch: %v", err)
	}
	r.admin(t, "rotate", "ca", nil)
	r.admin(t, "config", "ca", map[string]any{"min_encryption_version": 2})
	says(t, k.Look(t.Context()), "min_encryption_version 2")
	r.admin(t, "config", "ca", map[string]any{"min_encryption_version": 0})
	if err := k.Look(t.Context()); err != nil {
		t.Error(err)
	}
	r.remove(t, "ca")
	if err := k.Look(t.Context()); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("deleted: %v", err)
	}
	r.admin(t, "", "ca", map[string]any{"type": "ecdsa-p256"})
	says(t, k.Look(t.Context()), "deleted and made anew")
}

func TestRealClientsThatMakeTheKeyAtOnceMakeOne(t *testing.T) {
	r := realTransit(t)
	const clients, each = 2, 8
	var all sync.WaitGroup
	keys := make([]keystore.Key, clients*each)
	for c := range clients {
		s := r.store(t)
		for i := range each {
			all.Go(func() {
				k, err := s.Create(t.Context(), "ca", keystore.ECDSAP256, 0)
				if err != nil {
					t.Error(err)
					return
				}
				keys[c*each+i] = k
			})
		}
	}
	all.Wait()
	if t.Failed() {
		return
	}
	again, err := r.store(t).Open(t.Context(), keystore.Ref{Backend: Backend, Name: "ca", Version: 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		if k.Ref().Version != 1 || !samePublic(again.Public(), k.Public()) {
			t.Errorf("%s: Create and Open differ", k.Ref())
		}
	}
	if a, err := r.Root().Read(t.Context(), r.mount+"/keys/"+realPrefix+"ca"); err != nil || fmt.Sprint(a.Data["latest_version"]) != "1" {
		t.Errorf("%v, %v", a, err)
	}
}

func TestRealListShowsOurKeysOnly(t *testing.T) {
	r := realTransit(t)
	s := r.store(t)
	if refs, err := s.List(t.Context()); err != nil || len(refs) != 0 {
		t.Errorf("an empty engine: %v, %v", refs, err)
	}
	if _, err := s.Open(t.Context(), keystore.Ref{Backend: Backend, Name: "ca", Version: 1}); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("no key: %v", err)
	}
	create(t, s, "ca", keystore.ECDSAP256, 1)
	for _, n := range []string{"signet-west-ca", "ca", "signet-east-a.b"} {
		if _, err := r.Root().Write(t.Context(), r.mount+"/keys/"+n, map[string]any{"type": "ecdsa-p256"}); err != nil {
			t.Fatal(err)
		}
	}
	r.admin(t, "", "data", map[string]any{"type": "aes256-gcm96"})
	for i := range 40 {
		create(t, s, fmt.Sprintf("k%d", i), keystore.ECDSAP256, 0)
	}
	refs, err := s.List(t.Context())
	if err != nil || len(refs) != 42 || refs[0].String() != "vault-transit:ca@1" || refs[1].String() != "vault-transit:ca@2" {
		t.Errorf("%v, %v", refs, err)
	}
}

func TestRealVersionsAreDestroyedFromTheOldestOn(t *testing.T) {
	r := realTransit(t)
	s := r.store(t)
	newest := create(t, s, "ca", keystore.ECDSAP256, 2)
	ref := func(v int) keystore.Ref { return keystore.Ref{Backend: Backend, Name: "ca", Version: v} }
	for _, v := range []int{2, 3} {
		if err := s.Delete(t.Context(), ref(v)); !errors.Is(err, keystore.ErrKept) {
			t.Errorf("version %d: %v", v, err)
		}
	}
	for v := 1; v <= 2; v++ {
		for range 2 {
			if err := s.Delete(t.Context(), ref(v)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.Open(t.Context(), ref(v)); !errors.Is(err, keystore.ErrNotFound) {
			t.Errorf("destroyed version %d: %v", v, err)
		}
		if refs, err := s.List(t.Context()); err != nil || len(refs) != 3-v {
			t.Errorf("%v, %v", refs, err)
		}
	}
	if err := s.Delete(t.Context(), ref(3)); !errors.Is(err, keystore.ErrKept) {
		t.Errorf("the newest: %v", err)
	}
	if err := certifies(newest, 0); err != nil {
		t.Error(err)
	}
	// The archive is no way back.
	if _, err := r.Root().Write(t.Context(), r.mount+"/keys/"+realPrefix+"ca/config", map[string]any{"min_decryption_version": 1, "min_encryption_version": 1}); err == nil {
		t.Error("Vault takes a version below those that were trimmed")
	}
	if next := create(t, s, "ca", keystore.ECDSAP256, 3); next.Ref().Version != 4 {
		t.Error(next.Ref())
	}
}

func TestRealAMissingPermissionIsNamed(t *testing.T) {
	r := realTransit(t)
	full := r.store(t)
	k := create(t, full, "ca", keystore.ECDSAP256, 1)
	keys := r.mount + "/keys/" + realPrefix
	for _, c := range []struct {
		path, capability, asked string
		do                      func(*Store) error
	}{
		{r.mount + "/keys", "list", r.mount + "/keys", func(s *Store) error { _, err := s.List(t.Context()); return err }},
		{keys + "*", "read", keys + "ca", func(s *Store) error { _, err := s.Open(t.Context(), k.Ref()); return err }},
		{keys + "*", "update", keys + "ca/rotate", func(s *Store) error {
			_, err := s.Create(t.Context(), "ca", keystore.ECDSAP256, 2)
			return err
		}},
		{keys + "*", "update", keys + "new", func(s *Store) error {
			_, err := s.Create(t.Context(), "new", keystore.ECDSAP256, 0)
			return err
		}},
		{keys + "*", "update", keys + "ca/config", func(s *Store) error {
			return s.Delete(t.Context(), keystore.Ref{Backend: Backend, Name: "ca", Version: 1})
		}},
		{r.mount + "/sign/" + realPrefix + "*", "update", r.mount + "/sign/" + realPrefix + "ca/sha2-256", func(s *Store) error {
			k, err := s.Open(t.Context(), k.Ref())
			if err != nil {
				return err
			}
			return signs(k)
		}},
	} {
		var needs []vault.Need
		for _, n := range r.needs() {
			if n.Path == c.path {
				n.Capabilities = slices.DeleteFunc(slices.Clone(n.Capabilities), func(s string) bool { return s == c.capability })
			}
			if len(n.Capabilities) > 0 {
				needs = append(needs, n)
			}
		}
		s := r.allowed(t, vault.Policy(needs))
		missing, err := r.clients[s].Missing(t.Context(), r.needs())
		if err != nil || len(missing) != 1 || missing[0].Path != c.path || !slices.Equal(missing[0].Capabilities, []string{c.capability}) {
			t.Errorf("without %s on %s, at the start: %v, %v", c.capability, c.path, missing, err)
		}
		err = c.do(s)
		says(t, err, fmt.Sprintf("the capability %q on the path %s", c.capability, c.asked))
		if !errors.Is(err, vault.ErrDenied) || errors.Is(err, keystore.ErrAway) {
			t.Errorf("%v", err)
		}
	}
	s := r.store(t, func(_ *vault.Config, c *Config) { c.Mount = "elsewhere" })
	if _, err := s.Open(t.Context(), k.Ref()); !errors.Is(err, vault.ErrDenied) {
		t.Errorf("a mount outside the policy: %v", err)
	}
	s = r.allowed(t, `path "*" { capabilities = ["read", "list", "update"] }`, func(_ *vault.Config, c *Config) { c.Mount = "elsewhere" })
	if _, err := s.Open(t.Context(), k.Ref()); err == nil || errors.Is(err, keystore.ErrNotFound) || !strings.Contains(err.Error(), "no Transit engine is mounted at elsewhere") {
		t.Errorf("a mount that is not there: %v", err)
	}
}

func TestRealACrowdIsGatheredIntoBatches(t *testing.T) {
	r := realTransit(t)
	// Vault takes its time, so that the size of a batch is not a matter of how fast the callers are.
	p, err := r.Proxy()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	p.Set(r.mount+"/sign/*", lab.Fault{Delay: 200 * time.Millisecond})
	metrics := prometheus.NewRegistry()
	s := r.store(t, func(vc *vault.Config, c *Config) { vc.Address, c.Metrics = p.Address, metrics })
	k := create(t, s, "ca", keystore.ECDSAP256, 0)
	const callers, each = 256, 4
	var all sync.WaitGroup
	for c := range callers {
		all.Go(func() {
			for i := range each {
				digest := sha256.Sum256(fmt.Appendf(nil, "%d %d", c, i))
				sig, err := k.Sign(rand.Reader, digest[:], crypto.SHA256)
				if err != nil || !ecdsa.VerifyASN1(k.Public().(*ecdsa.PublicKey), digest[:], sig) {
					t.Errorf("caller %d: %v", c, err)
				}
			}
		})
	}
	all.Wait()
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "signet_keystore_transit_batch_size" {
			continue
		}
		h := f.GetMetric()[0].GetHistogram()
		if h.GetSampleSum() != callers*each || h.GetSampleCount() > callers*each/8 {
			t.Errorf("%d requests for %g signatures", h.GetSampleCount(), h.GetSampleSum())
		}
		return
	}
	t.Error("no metric of batch sizes")
}

// TestRealABadWayToVault has a proxy in between do its worst: no answer of it becomes a signature.
func TestRealABadWayToVault(t *testing.T) {
	r := realTransit(t)
	p, err := r.Proxy()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	const limit = 3 * time.Second
	s := r.store(t, func(vc *vault.Config, c *Config) { vc.Address, vc.Timeout, c.Timeout = p.Address, limit, limit })
	a, b := create(t, s, "a", keystore.ECDSAP256, 0), create(t, s, "b", keystore.ECDSAP256, 0)
	sign := r.mount + "/sign/*"
	for name, f := range map[string]lab.Fault{
		"hung": {Hang: true}, "cut": {Cut: true}, "oversized": {Oversized: 2 << 20}, "unavailable": {Status: 503, Errors: []string{"Vault is sealed"}},
		"altered": {Rewritten: func(b []byte) []byte { return bytes.Replace(b, []byte("vault:v1:MEU"), []byte("vault:v1:MEQ"), 1) }},
		"renamed": {Rewritten: func(b []byte) []byte { return bytes.Replace(b, []byte("vault:v1:"), []byte("vault:v2:"), 1) }},
		"no json": {Rewritten: func([]byte) []byte { return []byte("<html>") }},
		"empty":   {Rewritten: func([]byte) []byte { return nil }},
	} {
		p.Set(sign, f)
		var err error
		var took time.Duration
		for tries := 0; tries == 0 || err == nil && name == "altered" && tries < 21; tries++ { // every other signature is not long enough to begin so
			start := time.Now()
			err = signs(a)
			took = time.Since(start)
		}
		says(t, err, "vault-transit:a@1")
		if took > 2*limit {
			t.Errorf("%s: took %s", name, took)
		}
		p.Clear()
		recovers(t, func() error { return signs(a) })
	}
	// Each gets the answer to the other's question.
	p.Set(sign, lab.Fault{Swapped: true})
	var both sync.WaitGroup
	for _, k := range []keystore.Key{a, b} {
		both.Go(func() {
			if err := signs(k); !errors.Is(err, errWrong) {
				t.Errorf("%s: %v", k.Ref(), err)
			}
		})
	}
	both.Wait()
}

// recovers waits for what is to work again: the connection rests for a second or so after failures.
func recovers(t *testing.T, do func() error) {
	t.Helper()
	if err := lab.Until(t.Context(), "signing again", 30*time.Second, do); err != nil {
		t.Fatal(err)
	}
}

func TestRealAVaultThatIsAwayIsSaidSoInTime(t *testing.T) {
	r := realTransit(t)
	const limit = 3 * time.Second
	s := r.store(t, func(vc *vault.Config, c *Config) { vc.Timeout, c.Timeout = limit, limit })
	k := create(t, s, "ca", keystore.ECDSAP256, 0)
	check := func(name string) {
		t.Helper()
		var all sync.WaitGroup
		for what, do := range map[string]func() error{
			"sign": func() error { return signs(k) },
			"open": func() error { _, err := s.Open(t.Context(), k.Ref()); return err },
			"list": func() error { _, err := s.List(t.Context()); return err },
			"create": func() error {
				_, err := s.Create(t.Context(), "ca", keystore.ECDSAP256, 0)
				return err
			},
			"delete": func() error { return s.Delete(t.Context(), k.Ref()) },
		} {
			all.Go(func() {
				start := time.Now()
				err := do()
				says(t, err)
				if !errors.Is(err, vault.ErrAway) || !errors.Is(err, keystore.ErrAway) || time.Since(start) > 2*limit {
					t.Errorf("%s, %s: %v after %s", name, what, err, time.Since(start))
				}
			})
		}
		all.Wait()
	}
	back := func() {
		t.Helper()
		recovers(t, func() error { return certifies(k, 0) })
	}
	if err := r.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	check("sealed")
	if err := r.Unseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	back()

	if err := r.Halt(t.Context()); err != nil {
		t.Fatal(err)
	}
	check("halted")
	if err := r.Resume(); err != nil {
		t.Fatal(err)
	}
	back()

	r.Kill()
	check("killed")
	if err := errors.Join(r.Start(t.Context()), r.Unseal(t.Context())); err != nil {
		t.Fatal(err)
	}
	back()
}
