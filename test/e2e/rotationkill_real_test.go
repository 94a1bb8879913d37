//go:build real

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

// mortal is a server that dies at random moments and is started again at once, as a supervisor does.
type mortal struct {
	w    *world
	done sync.WaitGroup
	mu   sync.Mutex
	p    *lab.Process
	dead int
}

func (m *mortal) live(t *testing.T, ctx context.Context, chance *rand.Rand) {
	for i := 0; ctx.Err() == nil; i++ {
		life := time.Duration(50+chance.IntN(900)) * time.Millisecond
		if i%3 == 2 {
			// Now and then the agent comes back and has time to say what it has, however busy the machine is.
			life = 3 * time.Second
			if err := lab.Until(ctx, "the agent is back", 2*time.Minute, func() error { return m.heard(ctx) }); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(life):
			m.kill(t)
		}
	}
}

// heard is nil while an agent is connected.
func (m *mortal) heard(ctx context.Context) error {
	var agents []struct {
		Connections int `json:"connections"`
	}
	if err := m.w.JSON(ctx, &agents, "agent", "list", "--config", m.w.east.Config()); err != nil {
		return err
	}
	if len(agents) != 1 || agents[0].Connections == 0 {
		return fmt.Errorf("agents %+v", agents)
	}
	return nil
}

// kill ends it at once, and has it start again.
func (m *mortal) kill(t *testing.T) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.p.Kill()
	m.dead++
	// It may find the folder in use by a command that was quicker: then it is started once more.
	if err := lab.Until(context.WithoutCancel(t.Context()), "the server after a kill", time.Minute, func() (err error) {
		select {
		case <-m.p.Done():
			if m.p, err = m.w.Start("east-server", "serve", "--config", m.w.east.Config()); err != nil {
				return err
			}
		default:
		}
		return m.w.are(context.WithoutCancel(t.Context()), m.w.east)
	}); err != nil {
		t.Error(err)
	}
}

// insist repeats a command until it is answered: whoever is cut off does so, and it must do no harm.
func (w *world) insist(t *testing.T, args ...string) (out string) {
	t.Helper()
	until(t, "signet "+strings.Join(args, " "), 90*time.Second, func() (err error) {
		out, err = w.Run(t.Context(), args...)
		return err
	})
	return out
}

func TestAServerIsKilledAtEachStepOfRotations(t *testing.T) {
	t.Parallel() // it mostly waits
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	w := newWorld(t, quick)
	m := &mortal{w: w, p: w.serve(t)}
	w.apply(t, web("node-1"))
	agent := w.agent(t, "node-1")
	a, b := w.firstRoot(t), w.makeRoot(t, "root-b")

	rotate := func(under offlineRoot, start ...string) {
		t.Helper()
		csr := w.fresh("east", "csr")
		keys := strings.Fields(w.insist(t, append([]string{"rotation", "start", "--config", w.east.Config(), "--csr-out", csr}, start...)...))
		m.kill(t)
		chain := w.sign(t, w.east, under, csr, keys)
		w.insist(t, w.installing(w.east, under, chain)...)
		m.kill(t)
		if out := w.insist(t, w.installing(w.east, under, chain)...); out != "unchanged\n" {
			t.Errorf("installed again after a kill: %q", out)
		}
	}
	stands := func(want ...string) {
		t.Helper()
		w.untilAre(t, w.east, want...)
		m.kill(t)
		until(t, "the same after a kill", 90*time.Second, func() error { return w.are(t.Context(), w.east, want...) })
	}
	ctx, stop := context.WithCancel(t.Context())
	defer m.done.Wait()
	defer stop()
	m.done.Go(func() { m.live(t, ctx, rand.New(rand.NewPCG(seed, 0))) })

	rotate(a, "intermediate")
	// What is retired may have gone on before anybody could see it; nothing goes back.
	stands("intermediate-2", "active", "intermediate-1", "retired|removed")
	rotate(b, w.startRoot(b)...)
	stands("intermediate-3", "active", b.id, "active", "intermediate-2", "retired|removed")
	stands("intermediate-1", "removed", "intermediate-2", "removed", a.id, "removed")
	stop()
	m.done.Wait()
	t.Logf("the server was killed %d times", m.dead)
	if m.dead < 8 {
		t.Errorf("killed %d times only", m.dead)
	}

	until(t, "certificates under the new root", 90*time.Second, func() error { return w.under(agent.Socket, b) })
	all, err := w.authorities(t.Context(), w.east)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := slices.Sorted(maps.Keys(all)), slices.Sorted(slices.Values([]string{"intermediate-1", "intermediate-2", "intermediate-3", a.id, b.id})); !slices.Equal(got, want) {
		t.Errorf("the CAs are %v, want %v: a kill has left one behind, or lost one", got, want)
	}

	// By what the log says of each CA's moves everybody comes to how it stands: nothing is missing, nothing twice.
	log := map[string]string{"intermediate-1": "prepared"} // by cluster init
	steps := 0
	dec := json.NewDecoder(strings.NewReader(w.moves(t, w.east)))
	var moves []moved
	for dec.More() {
		var e moved
		if err := dec.Decode(&e); err != nil {
			t.Fatal(err)
		}
		moves = append(moves, e)
	}
	seen := map[string]bool{}
	for _, e := range slices.Backward(moves) {
		// One that a kill has interrupted may be there twice, byte for byte.
		if seen[e.LeafHash] {
			continue
		}
		seen[e.LeafHash] = true
		c := e.Entry.Changed
		if log[c.Authority] != c.From {
			t.Errorf("entry %d takes %s from %q to %q, and it was %q", e.Index, c.Authority, c.From, c.To, log[c.Authority])
		}
		log[c.Authority] = c.To
		steps++
	}
	for id, x := range all {
		if log[id] != x.State {
			t.Errorf("%s is %s, and the log says %q", id, x.State, log[id])
		}
	}
	t.Logf("%d moves are logged", steps)
	if r := w.run(t, "check", "--config", w.east.Config()); strings.Contains(r.out, "intermediate-1") || !strings.Contains(r.out, "intermediate-3") {
		t.Errorf("what is checked is not what there is: %v", r)
	}
	for _, root := range []offlineRoot{a, b} {
		w.must(t, "log", "verify", "--dir", w.path(root.dir, "log"))
	}
}

// moved is a move of a CA as `log show` has it.
type moved struct {
	Index    uint64 `json:"index"`
	LeafHash string `json:"leaf_hash"`
	Entry    struct {
		Changed struct {
			Authority string `json:"authority"`
			From      string `json:"from"`
			To        string `json:"to"`
		} `json:"authority_changed"`
	} `json:"entry"`
}
