package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/trust"
)

// exportedSet is a set as `trust export` writes it, of one root, with the digest that it prints.
func exportedSet(t *testing.T) (text, digest string) {
	t.Helper()
	desk := newDesk(t)
	raw, err := os.ReadFile(filepath.Join(desk.root, "root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	chain, err := ca.ParseChain(raw)
	if err != nil {
		t.Fatal(err)
	}
	td, err := identity.ParseTrustDomain("example.org")
	if err != nil {
		t.Fatal(err)
	}
	b, err := trust.NewBundle(td, 7, chain)
	if err != nil {
		t.Fatal(err)
	}
	sum := b.Digest()
	d := &doorman{list: &adminv1.ListAuthoritiesResponse{BundleSequence: 7, BundleDigest: sum[:], Authorities: []*adminv1.AuthorityInfo{
		{Id: oldRoot, Kind: "root", State: "active", Since: ago(day), Chain: [][]byte{chain[0].Raw}},
	}}}
	h, east := door(t, d)
	out, errs := h.must(exitYes, "trust", "export", "--config", east, "--format", "json")
	_, digest, found := strings.Cut(strings.TrimSpace(errs), "digest:")
	if !found {
		t.Fatalf("trust export prints no digest: %s", errs)
	}
	digest = strings.TrimSpace(digest)
	list, _ := h.must(exitYes, "trust", "list", "--config", east)
	contains(t, list, digest)
	return out, digest
}

func TestWhatAJoiningClusterIsGivenIsReadStrictly(t *testing.T) {
	good, digest := exportedSet(t)
	c := &cli{}
	td, err := identity.ParseTrustDomain("example.org")
	if err != nil {
		t.Fatal(err)
	}
	edited := func(change func(set map[string]any)) string {
		set := map[string]any{}
		if err := json.Unmarshal([]byte(good), &set); err != nil {
			t.Fatal(err)
		}
		change(set)
		text, err := json.Marshal(set)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	root := func(set map[string]any) map[string]any { return set["roots"].([]any)[0].(map[string]any) }
	for _, bad := range []struct{ what, text, digest, want string }{
		{"no JSON", "-----BEGIN CERTIFICATE-----", digest, "trust export --format json"},
		{"nothing", "", digest, "trust export --format json"},
		{"something behind it", good + good, digest, "goes on"},
		{"an unknown field", edited(func(s map[string]any) { s["extra"] = 1 }), digest, "extra"},
		{"another trust domain", edited(func(s map[string]any) { s["trust_domain"] = "other.org" }), digest, "other.org"},
		{"no certificate", edited(func(s map[string]any) { root(s)["certificate"] = "" }), digest, "root 1"},
		{"two in one", edited(func(s map[string]any) { pem := root(s)["certificate"].(string); root(s)["certificate"] = pem + pem }), digest, "2 certificates"},
		{"too long", strings.Repeat(" ", maxTrustFile+1), digest, "larger than"},
		{"no digest", good, "yes", "--trust-digest"},
	} {
		c.in = bytes.NewReader([]byte(bad.text))
		if x, err := c.readTrust(td, "-", bad.digest); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%s: %v, want %q; read %v", bad.what, err, bad.want, x)
		}
	}
	// What the file says of its own digest and fingerprints counts for nothing.
	c.in = strings.NewReader(edited(func(s map[string]any) { s["bundle_digest"], root(s)["fingerprint"] = "00", "00" }))
	x, err := c.readTrust(td, "-", digest)
	if err != nil || len(x.Roots) != 1 || x.Cluster != "east" || x.Digest != digest || x.Roots[0].State != ca.Active {
		t.Errorf("%v: %+v", err, x)
	}
	if m := trustMessage(x); m.Digest != digest || len(m.Roots) != 1 || !bytes.Equal(m.Roots[0].Certificate, x.Roots[0].Certificate.Raw) {
		t.Errorf("the server is told %v", m)
	}
	h := shortFolder(t)
	_, errs := h.must(exitCouldNotSay, "cluster", "install", "--config", "x", "--chain", "x", "--root-fingerprint", "x", "--trust", "x")
	contains(t, errs, "trust-digest")
}
