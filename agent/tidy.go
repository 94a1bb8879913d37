package agent

import (
	"context"
	"runtime/debug"
	"time"
)

const (
	// tidyEvery is how often tidy looks, and for how long nothing may have come before it does something.
	tidyEvery = 250 * time.Millisecond
	// burst is how many streams and certificates must have come since the last time for it to be worth a collection.
	burst = 50
)

// tidy gives memory back after many sidecars have come at once, as they do when a node starts: what they took for a moment
// would be kept for days by a process that allocates little from then on. It also lets the stacks of streams shrink.
func (a *Agent) tidy(ctx context.Context) {
	tick := time.NewTicker(tidyEvery)
	defer tick.Stop()
	var done, before int64
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := a.admitted.Load() + a.hub.taken.Load()
		if now == before && now-done >= burst {
			debug.FreeOSMemory()
			done = now
		}
		before = now
	}
}
