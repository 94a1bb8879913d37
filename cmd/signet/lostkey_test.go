package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
)

// Another root is where a taint leads to only if it has another key.
func TestATaintNamesTheRootsOfTheSameKey(t *testing.T) {
	key := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	root := func(id string, of *ecdsa.PrivateKey) *adminv1.AuthorityInfo {
		c := &x509.Certificate{SerialNumber: big.NewInt(int64(len(id))), NotAfter: time.Now().Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, c, c, of.Public(), of)
		if err != nil {
			t.Fatal(err)
		}
		return &adminv1.AuthorityInfo{Id: id, Kind: "root", State: "active", Chain: [][]byte{der}}
	}
	lost := key()
	d := &doorman{change: &adminv1.RotationChangeResponse{Changed: true}}
	d.list = &adminv1.ListAuthoritiesResponse{Authorities: []*adminv1.AuthorityInfo{
		root("root-a", lost), root("root-twin", lost), {Id: "intermediate-1", Kind: "intermediate", Root: "root-twin", State: "active"},
	}}
	h, east := door(t, d)
	says := func(words ...string) {
		t.Helper()
		_, errs := h.must(exitYes, "ca", "taint", "root-a", "--config", east, "--reason", "stolen", "--dry-run")
		contains(t, strings.Join(strings.Fields(errs), " "), words...)
	}
	both := "accepted as long as root-a or root-twin is believed"
	says("root-twin is tainted too: it has the same key", both, "it must be replaced (signet root init")
	d.list.Authorities = append(d.list.Authorities, root("root-other", key()))
	says(both, "it begins to leave here, for root-other", "(signet trust remove root-a; signet trust remove root-twin)")
	d.list.Authorities[0].State = "removed"
	says("accepted as long as root-twin is believed", "for root-other")
}
