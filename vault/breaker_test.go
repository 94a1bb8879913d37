package vault

import (
	"strings"
	"sync"
	"testing"
	"time"
)

// clock is a time that a test sets.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func testBreaker() (*breaker, *clock, *[]bool) {
	c := &clock{at: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
	var turns []bool
	return newBreaker(c.now, func(open bool, _ string) { turns = append(turns, open) }), c, &turns
}

func ask(t *testing.T, b *breaker, o outcome, why string) bool {
	t.Helper()
	done, err := b.allow()
	if err != nil {
		if why != "" && !strings.Contains(err.Error(), why) {
			t.Errorf("it says %q, want %q", err, why)
		}
		return false
	}
	done(o, why)
	return true
}

func TestAFewFailuresInARowOpenTheBreaker(t *testing.T) {
	b, c, turns := testBreaker()
	for range 3 {
		for range tripAfter - 1 {
			ask(t, b, ill, "it hangs")
		}
		ask(t, b, well, "")
	}
	if len(*turns) != 0 || !ask(t, b, well, "") {
		t.Fatal("it is open after failures that were not in a row")
	}
	for range tripAfter {
		// That it answers and that a caller gave up are no reasons to forget failures, nor more of them.
		if !ask(t, b, ill, "it hangs") || !b.closed() {
			continue
		}
		ask(t, b, alive, "")
		ask(t, b, unknown, "")
	}
	if ask(t, b, well, "after 5 failures in a row, the last: it hangs") || len(*turns) != 1 {
		t.Fatal("it is not open")
	}
	c.add(maxOpen)
	for range 2 {
		if !ask(t, b, well, "") {
			t.Fatal("it has not closed")
		}
	}
	if len(*turns) != 2 {
		t.Error(*turns)
	}
}

func (b *breaker) closed() bool { return b.health().until.IsZero() }

func TestTheBreakerStaysOpenForLongerAndLongerUpToABound(t *testing.T) {
	seen := map[time.Duration]bool{}
	var last time.Duration
	for range 50 {
		b, c, _ := testBreaker()
		for range tripAfter {
			ask(t, b, ill, "x")
		}
		for n := range 12 {
			open := b.health().until.Sub(c.now())
			if open < minOpen || open > maxOpen || n == 0 && open > 2*minOpen || n > 6 && open < maxOpen/2 {
				t.Fatalf("open for %s at the %dth time", open, n)
			}
			seen[open], last = true, open
			c.add(open - 1)
			if ask(t, b, ill, "x") {
				t.Fatal("a call before the time")
			}
			c.add(1)
			if !ask(t, b, ill, "x") {
				t.Fatal("no call after the time")
			}
		}
		// It begins anew after Vault was well.
		c.add(maxOpen)
		ask(t, b, well, "")
		for range tripAfter {
			ask(t, b, ill, "x")
		}
		if open := b.health().until.Sub(c.now()); open > 2*minOpen {
			t.Fatalf("open for %s at the first time again", open)
		}
	}
	if len(seen) < 300 {
		t.Errorf("only %d different times (%s): many servers would come back at once", len(seen), last)
	}
}

func TestOneProbeAtATime(t *testing.T) {
	b, c, _ := testBreaker()
	late, err := b.allow()
	if err != nil {
		t.Fatal(err)
	}
	for range tripAfter {
		ask(t, b, ill, "x")
	}
	// A call that began before it opened has nothing new to say of a failure.
	until := b.health().until
	late(ill, "late")
	if b.health().until != until {
		t.Error("a late failure holds it open for longer")
	}
	c.add(maxOpen)
	probe, err := b.allow()
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if ask(t, b, well, "left alone") {
			t.Fatal("two probes")
		}
	}
	// The one that probes was given up: the next may.
	probe(unknown, "")
	if !ask(t, b, ill, "x") || ask(t, b, well, "") {
		t.Fatal("the second probe does not decide")
	}
}

func TestAHoldKeepsCallsBack(t *testing.T) {
	b, c, _ := testBreaker()
	b.hold(10 * time.Second)
	b.hold(time.Second)
	c.add(10*time.Second - 1)
	if ask(t, b, well, "asked to be left alone until 00:00:10 UTC") {
		t.Fatal("a call during the hold")
	}
	if b.health().until.IsZero() {
		t.Error("the hold does not show")
	}
	c.add(1)
	if !ask(t, b, well, "") || !b.closed() {
		t.Fatal("no call after the hold")
	}
}
