//go:build real

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/check"
)

// restoredFindings are what `signet check` says of an older state.
func (w *world) restoredFindings(t *testing.T) (found []check.Finding) {
	t.Helper()
	var said struct {
		Findings []check.Finding `json:"findings"`
	}
	out, err := w.Run(t.Context(), "check", "--config", w.east.Config(), "-o", "json")
	if jsonErr := json.Unmarshal([]byte(out), &said); jsonErr != nil {
		t.Fatalf("signet check: %v", errors.Join(jsonErr, err))
	}
	for _, f := range said.Findings {
		if f.Code == check.CodeRestored {
			found = append(found, f)
		}
	}
	return found
}

// A state folder from before a rotation of the root is put back: agents know more than their server.
func TestAStateFromBeforeARotationIsFoundAndAgentsTakeItsTrustAgain(t *testing.T) {
	for _, whole := range []bool{true, false} {
		t.Run(map[bool]string{true: "the whole folder", false: "the database alone"}[whole], func(t *testing.T) {
			t.Parallel() // it mostly waits
			leaves, gone := quick, "removed"
			if !whole {
				// With the folder's keys of today, the server of then must have its own still.
				leaves, gone = lingering, "retired"
			}
			w := newWorld(t, leaves)
			a, b := w.firstRoot(t), w.makeRoot(t, "root-b")
			server, agent := w.start(t, w.east)
			until(t, "the workload is under A", time.Minute, func() error { return w.under(agent.Socket, a) })
			state := w.east.Path("state")
			server.Stop()
			if out, err := exec.Command("cp", "-a", state, state+".older").CombinedOutput(); err != nil {
				t.Fatalf("%v %s", err, out)
			}
			server, err := w.east.Serve(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			w.rotate(t, w.east, b, w.startRoot(b)...)
			w.untilAre(t, w.east, "intermediate-2", "active", a.id, gone)
			until(t, "the workload is under B", time.Minute, func() error { return w.under(agent.Socket, b) })
			server.Stop()

			if whole {
				err = errors.Join(os.Rename(state, state+".newer"), os.Rename(state+".older", state))
			} else {
				for _, file := range []string{"signet.db", "signet.db-wal", "signet.db-shm"} {
					err = errors.Join(err, os.RemoveAll(state+"/"+file))
					if old, readErr := os.ReadFile(state + ".older/" + file); readErr == nil {
						err = errors.Join(err, os.WriteFile(state+"/"+file, old, 0o600))
					}
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			if found := w.restoredFindings(t); (len(found) == 0) != whole {
				t.Errorf("before the start: %+v", found)
			}
			if _, err := w.east.Serve(t.Context()); err != nil {
				t.Fatal(err)
			}
			until(t, "it is found that the agent is ahead", time.Minute, func() error {
				for _, f := range w.restoredFindings(t) {
					if strings.Contains(f.Message, "agent node-1 holds") && strings.HasPrefix(f.Mend, "signet trust republish --config "+w.east.Config()) {
						return nil
					}
				}
				return errors.New("not yet")
			})
			dry := w.must(t, "trust", "republish", "--config", w.east.Config(), "--dry-run")
			if !strings.Contains(dry, "would publish") || !strings.Contains(dry, a.id) || !strings.Contains(dry, "node-1") {
				t.Errorf("a dry run says\n%s", dry)
			}
			if err := w.under(agent.Socket, a); err == nil && whole {
				t.Error("the workload believes the old root before anything was published")
			}
			w.must(t, "trust", "republish", "--config", w.east.Config())
			until(t, "the workload is under A again, and believes nothing else", time.Minute, func() error {
				if err := w.under(agent.Socket, a); err != nil {
					return err
				}
				x, err := w.fetch(agent.Socket)
				if err == nil && len(x.bundle) != 1 {
					err = fmt.Errorf("it believes %d roots", len(x.bundle))
				}
				return err
			})
			until(t, "nothing is found any more", time.Minute, func() error {
				if found := w.restoredFindings(t); len(found) > 0 {
					return fmt.Errorf("%+v", found)
				}
				return nil
			})
			if why, err := w.Refuses(t.Context(), "trust", "republish", "--config", w.east.Config()); err != nil || !strings.Contains(why, "nothing to publish again") {
				t.Errorf("once more: %v %s", err, why)
			}
			if moves := w.moves(t, w.east); !strings.Contains(moves, "republish") {
				t.Errorf("the log does not say it:\n%s", moves)
			}
		})
	}
}
