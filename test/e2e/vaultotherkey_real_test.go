//go:build real

package e2e

import "testing"

// What is to be done about a key that was deleted in Vault is to rotate. Then the numbers before have other keys, which no start
// may stumble over.
func TestAServerStartsAgainAfterTheMendOfAKeyThatWasDeleted(t *testing.T) {
	t.Parallel()
	e := newEstate(t, "other")
	x := e.cluster(t, "east", how{keys: "vault-transit"})
	x.serve(t)
	x.ready(t)
	key := "transit-" + e.name + "/keys/signet-east_example.org_intermediate"
	root := e.vault.Root()
	if _, err := root.Write(t.Context(), key+"/config", map[string]any{"deletion_allowed": true}); err != nil {
		t.Fatal(err)
	}
	if err := root.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	x.followed(t, x.rotate(t))
	x.server.Stop()
	x.begin(t)
	x.mended(t)
}
