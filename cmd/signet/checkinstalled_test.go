package main

import (
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/server"
)

// Where a person has the intermediate signed, he is told how to install it; where Vault signs, there is nothing to install.
func TestWhatToDoWithoutAnIntermediateGoesByWhoSigns(t *testing.T) {
	signs := struct{ ca.Upstream }{}
	rooted := server.Cluster{Cluster: "east", RootCertificates: []*x509.Certificate{{NotAfter: time.Now().Add(time.Hour)}}}
	for name, c := range map[string]struct {
		conf       server.Config
		shown      server.Cluster
		running    bool
		mend, says string
	}{
		"a person signs":              {server.Config{}, server.Cluster{Cluster: "east"}, false, "signet cluster install --config FILE --chain", ""},
		"a person signs for a server": {server.Config{}, server.Cluster{Cluster: "east"}, true, "signet cluster install --config FILE --chain", ""},
		"Vault signs":                 {server.Config{Upstream: signs}, rooted, false, "signet serve --config FILE", "when it runs"},
		"Vault does not sign":         {server.Config{Upstream: signs}, rooted, true, "", "SGN1029, SGN1026, SGN1027"},
		"there is no root yet":        {server.Config{Upstream: signs}, server.Cluster{Cluster: "east"}, false, "signet cluster init --config FILE --root-fingerprint", "root"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, f := range checkAuthorities(t.Context(), c.conf, c.shown, "", c.running, time.Now()) {
				if f.Code != check.CodeInstalled {
					continue
				}
				if !strings.HasPrefix(f.Mend, c.mend) || c.mend == "" && f.Mend != "" || !strings.Contains(f.Message, c.says) || f.Level != check.Error {
					t.Errorf("it says %+v", f)
				}
				return
			}
			t.Error("nothing is said")
		})
	}
}
