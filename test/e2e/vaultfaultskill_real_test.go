//go:build real

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/test/lab"
)

// TestAServerIsKilledWhileVaultSigns kills it at any moment from its start until its new intermediate signs, since its key was
// in memory; then while Vault signs the next one.
func TestAServerIsKilledWhileVaultSigns(t *testing.T) {
	t.Parallel()
	for _, keys := range []string{"memory", "vault-transit"} {
		t.Run(keys, func(t *testing.T) {
			t.Parallel()
			killedWhileVaultSigns(t, keys)
		})
	}
}

func killedWhileVaultSigns(t *testing.T, keys string) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	chance := rand.New(rand.NewPCG(seed, 0))
	e := newEstate(t, "kill-"+keys)
	x := e.cluster(t, "east", how{keys: keys, ttl: 5 * time.Second})
	x.serve(t)
	s := x.issuing(t)
	kills := 6
	if keys != "memory" {
		kills = 4
	}
	asks := "pki-" + e.name + "/issuer/root-1/sign-intermediate"
	signing, asked := 0, x.proxy.Seen(asks)
	for round := range kills {
		// Every other time the answer is late, so that the kill comes before it does.
		late := round%2 == 0
		if late {
			x.proxy.Set(asks, lab.Fault{Delay: 600 * time.Millisecond})
		}
		// What was in memory is gone with the one that was killed, and is replaced without a word.
		if keys != "memory" || round == 0 {
			until(t, "a rotation begins", time.Minute, func() error {
				_, err := e.Run(t.Context(), "rotation", "start", "--config", x.Config(), "intermediate")
				return err
			})
		}
		if late {
			until(t, "Vault is asked to sign", time.Minute, func() error {
				if x.proxy.Seen(asks) == asked {
					return errors.New("not yet")
				}
				return nil
			})
			signing++
		}
		most := 400 // ms
		if !late && keys == "memory" {
			most = 1500 // some come before it has opened a key, some when it signs
		}
		time.Sleep(time.Duration(chance.IntN(most)) * time.Millisecond)
		x.server.Kill()
		x.proxy.Clear()
		asked = x.proxy.Seen(asks) // now: the next one may ask before anything else is done here
		x.begin(t)
	}
	x.ready(t)
	x.mended(t)
	x.issuesAgain(t, s)
	t.Logf("%d kills, %d of them while Vault signed; it was asked %d times", kills, signing, x.proxy.Seen(asks))

	// What was not needed goes by itself, as soon as the last leaf under it has ended.
	var all map[string]mover
	until(t, "what was left behind is removed", 3*time.Minute, func() (err error) {
		if all, err = e.authorities(t.Context(), x.Cluster); err != nil {
			return err
		}
		var left []string
		for _, a := range all {
			if a.Kind == ca.KindIntermediate && !a.Signing && a.State != string(ca.Removed) {
				left = append(left, a.ID+" "+a.State)
			}
		}
		if len(left) > 0 {
			return fmt.Errorf("%v are left", left)
		}
		return nil
	})
	last, err := x.signer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	x.proves(t, s)
	x.numbered(t, last.ID, kills)
}

// numbered checks by the log that no number came twice, and that there are not many more than were needed.
func (x *holding) numbered(t *testing.T, last string, kills int) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(x.of.moves(t, x.Cluster)))
	made := map[string]string{} // by its number, the entry in which it was prepared
	state := map[string]string{}
	var moves []moved
	for dec.More() {
		var m moved
		if err := dec.Decode(&m); err != nil {
			t.Fatal(err)
		}
		moves = append(moves, m)
	}
	seen := map[string]bool{}
	for _, m := range slices.Backward(moves) {
		if seen[m.LeafHash] {
			continue // of a step that a kill has interrupted
		}
		seen[m.LeafHash] = true
		c := m.Entry.Changed
		if _, ok := strings.CutPrefix(c.Authority, "intermediate-"); !ok {
			continue
		}
		if c.From == "" {
			if other, twice := made[c.Authority]; twice {
				t.Errorf("%s was made by entry %s and by %d", c.Authority, other, m.Index)
			}
			made[c.Authority] = fmt.Sprint(m.Index)
		}
		if state[c.Authority] != c.From {
			t.Errorf("entry %d takes %s from %q to %q, and it was %q", m.Index, c.Authority, c.From, c.To, state[c.Authority])
		}
		state[c.Authority] = c.To
	}
	n, err := strconv.Atoi(strings.TrimPrefix(last, "intermediate-"))
	if err != nil || n > 2*kills+3 {
		t.Errorf("%s signs after %d kills: %v", last, kills, err)
	}
	t.Logf("%s signs, %d were made", last, len(made))
}
