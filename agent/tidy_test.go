package agent

import (
	"context"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/test/bubble"
)

// Memory is given back once after a burst, when it is over, and not for the few that come all the time.
func TestMemoryIsGivenBackAfterABurstAndNotDuringIt(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		a := &Agent{hub: &hub{}}
		ctx, cancel := context.WithCancel(t.Context())
		defer func() { cancel(); synctest.Wait() }()
		go a.tidy(ctx)
		var before uint32
		collected := func() uint32 { // by somebody's wish, since it was last asked
			synctest.Wait()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			n := m.NumForcedGC - before
			before = m.NumForcedGC
			return n
		}
		collected()
		for range burst - 1 {
			a.admitted.Add(1)
			time.Sleep(4 * tidyEvery)
		}
		if n := collected(); n != 0 {
			t.Fatalf("%d collections for a few streams", n)
		}
		for range 20 {
			a.admitted.Add(burst / 2)
			a.hub.taken.Add(burst / 2)
			time.Sleep(tidyEvery / 2)
		}
		if n := collected(); n != 0 {
			t.Fatalf("%d collections during the burst", n)
		}
		time.Sleep(time.Hour)
		if n := collected(); n != 1 {
			t.Fatalf("%d collections after the burst, want 1", n)
		}
	})
}
