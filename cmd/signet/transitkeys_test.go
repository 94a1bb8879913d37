package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/vault/transit"
)

// inTransit makes a state folder whose CAs have keys in Transit, of P-256, under the default prefix.
func (h here) inTransit(state ca.State) {
	h.t.Helper()
	dir := h.path("state")
	if err := durable.Dir(dir); err != nil {
		h.t.Fatal(err)
	}
	st, err := store.Open(h.t.Context(), store.Config{Path: h.path("state/signet.db")})
	if err != nil {
		h.t.Fatal(err)
	}
	defer st.Close()
	var rows []store.Authority
	for i, kind := range []string{ca.KindControl, ca.KindIntermediate} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			h.t.Fatal(err)
		}
		c := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1)), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
		if err != nil {
			h.t.Fatal(err)
		}
		name := []string{"control-ca", "intermediate"}[i]
		rows = append(rows, store.Authority{
			Authority: rotation.Authority{ID: name + "-1", Kind: kind, State: state, Root: []string{"", "root-1"}[i]}, Key: keystore.Ref{Backend: transit.Backend, Name: name, Version: 1},
			Chain: [][]byte{der}, Created: time.Now(),
		})
		if kind == ca.KindIntermediate {
			rows = append(rows, store.Authority{Authority: rotation.Authority{ID: "root-1", Kind: ca.KindRoot, State: state}, Chain: [][]byte{der}, Created: time.Now()})
		}
	}
	if err := st.ChangeAuthorities(h.t.Context(), store.AuthorityChange{Next: 1, Put: rows}); err != nil {
		h.t.Fatal(err)
	}
	if err := durable.WriteValue(h.path("state/transit.json"), transitNames{"signet-east_example.org_"}, 0o600); err != nil {
		h.t.Fatal(err)
	}
}

// TestAConfigurationForOtherKeysInTransitIsRefused: with it no key at work would be found, or no next one could be made. Nobody asks
// Vault, which would answer with a key that is not there.
func TestAConfigurationForOtherKeysInTransitIsRefused(t *testing.T) {
	const at = "control_ca: vault-transit, intermediates: vault-transit"
	for what, c := range map[string]struct {
		state   ca.State
		in      string
		refused []string // nil = it is not
		policy  []string
	}{
		"nothing is changed": {ca.Active, at, nil, []string{`_intermediate/sha2-256"`, `_control-ca/sha2-256"`}},
		"another prefix": {
			ca.Active, at + ", transit: { prefix: east-b_ }",
			[]string{"keystore.transit.prefix is east-b_ now, and was signet-east_example.org_", "control-ca-1, intermediate-1", "put signet-east_example.org_ back"},
			nil,
		},
		"another prefix, for older keys": {
			ca.Retired, "intermediates: file, transit: { mount: transit, prefix: east-b_ }",
			[]string{"keystore.transit.prefix is east-b_ now"},
			nil,
		},
		"another prefix, when all are gone": {ca.Removed, at + ", transit: { prefix: east-b_ }", nil, []string{"east-b_intermediate"}},
		"another algorithm": {
			ca.Active, at + ", algorithm: ecdsa-p384",
			[]string{"keystore.algorithm is ecdsa-p384 now, and was ecdsa-p256", "signet-east_example.org_intermediate", "put ecdsa-p256 back", "memory or file"},
			nil,
		},
		// The control CA stays what it is, and signs on.
		"another algorithm, elsewhere": {
			ca.Active, "control_ca: vault-transit, intermediates: memory, algorithm: ecdsa-p384", nil,
			[]string{`_control-ca/sha2-256"`, `_intermediate/*"`, `_intermediate/trim"`},
		},
	} {
		t.Run(what, func(t *testing.T) {
			h := shortFolder(t)
			h.inTransit(c.state)
			v := newFakeVault(t)
			text, err := os.ReadFile(h.vaultYAML(v.URL))
			if err != nil {
				t.Fatal(err)
			}
			file := h.write("east.yaml", strings.Replace(string(text), "control_ca: vault-transit, intermediates: memory", c.in, 1)+
				"state_dir: ./state\nlisten: { http: \"127.0.0.1:1\" }\n")
			out, errs, status := h.type_("", "config", "vault-policy", "--config", file)
			contains(t, out, c.policy...)
			contains(t, strings.Join(strings.Fields(errs), " "), c.refused...)
			if (status != exitYes) != (c.refused != nil) || c.refused != nil && out != "" {
				t.Errorf("vault-policy ends with %d: %s%s", status, out, errs)
			}
			if strings.Contains(out, "sha2-384") {
				t.Errorf("it allows what is asked of no key at work:\n%s", out)
			}
			if c.refused == nil {
				return
			}
			for _, verb := range []string{"serve", "cluster init"} {
				_, errs := h.must(exitCouldNotSay, append(strings.Fields(verb), "--config", file)...)
				contains(t, strings.Join(strings.Fields(errs), " "), c.refused...)
			}
			found := h.levels("--config", file, "-o", "json")
			if found["SGN1006"] != "error" {
				t.Errorf("check finds %v", found)
			}
			v.set(func() {
				if v.asked > 0 {
					t.Errorf("Vault was asked %d times", v.asked)
				}
			})
		})
	}
}

func TestUnderWhichPrefixKeysWereMadeIsWrittenDown(t *testing.T) {
	h := shortFolder(t)
	cfg := &config.Server{StateDir: h.dir}
	file := prefixFile(cfg)
	if was, err := readPrefix(file); was != "" || err != nil {
		t.Errorf("before any key: %q, %v", was, err)
	}
	for _, prefix := range []string{"a_", "a_", "b_"} {
		made := recorded{keystore.NewMemory(), file, prefix}
		if _, err := made.Create(t.Context(), "ca", "no-such", 0); err == nil {
			t.Fatal("a key of no kind")
		}
		if was, _ := readPrefix(file); prefix == "b_" && was != "a_" {
			t.Errorf("without a key it is %q", was)
		}
		if _, err := made.Create(t.Context(), "ca", keystore.ECDSAP256, 0); err != nil {
			t.Fatal(err)
		}
		if was, err := readPrefix(file); was != prefix || err != nil {
			t.Errorf("under %s it is %q, %v", prefix, was, err)
		}
	}
	// One that can't be read is no reason to look for keys elsewhere.
	h.inTransit(ca.Active)
	cfg.StateDir = h.path("state")
	h.write("state/transit.json", "{}")
	if _, err := keysInTransit(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "keystore.transit.prefix") {
		t.Errorf("damaged: %v", err)
	}
}
