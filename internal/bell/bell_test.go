package bell

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/bubble"
)

func rung(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestARingWakesAllWhoWaitedBeforeIt(t *testing.T) {
	var b Bell
	b.Ring() // nobody waits: nothing is kept of it
	first, second := b.Next(), b.Next()
	if rung(first) || rung(second) {
		t.Fatal("woken by a ring before they waited")
	}
	b.Ring()
	if !rung(first) || !rung(second) {
		t.Fatal("not all who waited were woken")
	}
	if rung(b.Next()) {
		t.Fatal("a ring that is over wakes who waits for the next")
	}
}

// Whoever takes the bell before looking misses no change, however many ring and wait.
func TestNoChangeIsMissed(t *testing.T) {
	var b Bell
	var mu sync.Mutex
	changes := 0
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 100 {
				mu.Lock()
				changes++
				mu.Unlock()
				b.Ring()
			}
		})
		all.Go(func() {
			for {
				next := b.Next()
				mu.Lock()
				n := changes
				mu.Unlock()
				if n == 800 {
					return
				}
				<-next
			}
		})
	}
	all.Wait()
}

func TestWaitEndsWithTheFirstOfThree(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		var b Bell
		start := time.Now()
		if Wait(t.Context(), time.Minute, nil) || time.Since(start) != time.Minute {
			t.Errorf("without a bell: ended after %s", time.Since(start))
		}
		next := b.Next()
		time.AfterFunc(time.Second, b.Ring)
		if start = time.Now(); !Wait(t.Context(), time.Minute, next) || time.Since(start) != time.Second {
			t.Errorf("rung after 1 s: ended after %s", time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if start = time.Now(); Wait(ctx, time.Minute, b.Next()) || time.Since(start) != time.Second {
			t.Errorf("ended by its context after 1 s: ended after %s", time.Since(start))
		}
	})
}
