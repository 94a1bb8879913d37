package server

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
)

// unasked is an upstream that nobody asks.
type unasked struct{ ca.Upstream }

// A Vault that is away makes a server unready only where the key that signs is in it.
func TestAVaultThatIsAwayIsFeltWhereTheSigningKeyIs(t *testing.T) {
	c := newCluster(t, "east")
	s, err := New(t.Context(), c.config())
	must(t, err)
	defer func() { must(t, s.closeAll()) }()
	s.config.Vault = func() check.Vault {
		return check.Vault{Address: "https://v:8200", Away: true, Since: time.Now(), Why: "Vault is sealed"}
	}
	var mesh rotation.Authority
	for _, try := range []struct {
		mesh, control string
		upstream      ca.Upstream
		ready         bool
		about, words  string
	}{
		{"vault-transit", keystore.BackendFile, nil, false, "vault-transit", "nothing can be issued: the first certificates of workloads end at "},
		{keystore.BackendFile, "vault-transit", nil, true, "vault-control", "no agent can enrol"},
		{keystore.BackendMemory, keystore.BackendFile, unasked{}, true, "vault-pki", "nor after a restart of this server (Vault is sealed)"},
	} {
		set := *s.keeper.current.Load()
		set.rows = slices.Clone(set.rows)
		for i := range set.rows {
			switch row := &set.rows[i]; {
			case row.Kind == ca.KindIntermediate && row.State == ca.Active:
				row.Key.Backend, mesh = try.mesh, row.Authority
			case row.Kind == ca.KindControl:
				row.Key.Backend = try.control
			}
		}
		s.keeper.current.Store(&set)
		s.config.Upstream = try.upstream
		found := check.NewWatch(s.checks()...).Findings(t.Context())
		found = slices.DeleteFunc(found, func(f check.Finding) bool { return f.Code != check.CodeVault })
		if len(found) != 1 || found[0].About != try.about || !strings.Contains(found[0].Message, try.words) || found.Ready() != try.ready {
			t.Errorf("%s: ready %v: %+v", try.about, found.Ready(), found)
		}
	}
	d := s.duties(s.now())
	due := mesh.NotBefore.Add(time.Duration(0.5 * float64(mesh.NotAfter.Sub(mesh.NotBefore))))
	if !d.Due.Equal(due) || !d.Until.After(due) || d.Until.After(mesh.NotAfter) || d.LeafSpare != rotation.LeastLeft(time.Hour) {
		t.Errorf("%+v of one that lives from %s to %s", d, mesh.NotBefore, mesh.NotAfter)
	}
}
