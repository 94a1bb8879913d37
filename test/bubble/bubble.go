// Package bubble runs tests in simulated time.
package bubble

import (
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
)

// running counts the bubbles of this process, and keeps what GOMAXPROCS was before the first.
var running struct {
	sync.Mutex
	bubbles, procs int
}

// Test is synctest.Test, on one processor while the race detector watches: the timers of a bubble share one context of the
// detector, and a timer that is due when it is looked at uses it from its own goroutine, which crashes the detector if
// another processor fires a timer just then (go.dev/issue/78156).
func Test(t *testing.T, f func(*testing.T)) {
	t.Helper()
	if raceDetector {
		oneProcessor()
		defer allProcessors()
	}
	synctest.Test(t, f)
}

func oneProcessor() {
	running.Lock()
	defer running.Unlock()
	if running.bubbles++; running.bubbles == 1 {
		running.procs = runtime.GOMAXPROCS(1)
	}
}

func allProcessors() {
	running.Lock()
	defer running.Unlock()
	if running.bubbles--; running.bubbles == 0 {
		runtime.GOMAXPROCS(running.procs)
	}
}
