package server

import (
	"context"
	"strings"
	"testing"

	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/keystore"
)

// open is a store whose keys can be taken out of it.
type open struct{ keystore.Store }

type openKey struct{ keystore.Key }

func (openKey) Exposed() string { return "transit/keys/east: the key is exportable" }

func (o open) Open(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	k, err := o.Store.Open(ctx, ref)
	return openKey{k}, err
}

// That a key can leave Vault stops nothing, so only a finding tells of it.
func TestAKeyThatCanBeTakenOutIsFoundAndStopsNothing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	c.stored = open{c.keys}
	s := c.start(t, nil)
	said := map[string]check.Level{}
	for _, f := range s.ready(t) {
		if f.Code == check.CodeKey && strings.Contains(f.Message, "can be taken out of Vault: ") && strings.HasSuffix(f.Message, "(transit/keys/east: the key is exportable)") {
			if said[f.About] = f.Level; f.Blocks() {
				t.Errorf("it makes a server unready: %+v", f)
			}
		}
	}
	if len(said) != 2 || said["intermediate-1"] != check.Error || said["control-ca-1"] != check.Error {
		t.Errorf("readiness says %v", said)
	}
}
