package vault

import (
	"cmp"
	"fmt"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
)

const (
	// tripAfter failures in a row Vault is left alone.
	tripAfter = 5
	minOpen   = time.Second
	// maxOpen is short beside the least life that is left to leaves when Vault goes away: what waits for it must not wait
	// for long when it is back.
	maxOpen = 5 * time.Second
	// slowTrip is how long an engine may fail without a success between, however few its calls are.
	slowTrip = 5 * time.Second
	// claimLasts is how long the one that was told it may try has for beginning to.
	claimLasts = time.Second
	// newsLasts is how long failures count when nobody has called since: longer than what is asked for in vain is asked again.
	newsLasts = 2 * time.Minute
)

// outcome is what one call says of Vault.
type outcome int

const (
	// well: it works.
	well outcome = iota
	// alive: it answers, which is not enough to forget failures.
	alive
	// ill: it does not work.
	ill
	// unknown: the call was given up.
	unknown
)

// breaker keeps calls from a Vault that is away. After tripAfter failures in a row it is open: calls fail at once. After a
// time, which grows from 1 s to 5 s and is jittered so that many servers don't come back at once, one call may try; it
// decides. (No library has an open time that grows: sony/gobreaker's is fixed.)
type breaker struct {
	now func() time.Time
	// slow, if not 0, is how long failures without a success between are, for it to open before there are tripAfter.
	slow time.Duration
	// turned is told, without the lock, when it opens (with the reason) and closes.
	turned func(open bool, why string)

	mu sync.Mutex
	// heard: Vault has answered since the start.
	heard bool
	// row counts failures since first; last is the newest of them.
	row   int
	first time.Time
	last  string
	// open until then; after it, probing tells whether somebody tries already.
	open    bool
	until   time.Time
	probing bool
	// claimed: somebody was told to try (ready), and may begin until then.
	claimed time.Time
	wait    *backoff.ExponentialBackOff
	// asked is when the last call went out, judged when one last said whether it works.
	asked, judged time.Time
	// held: Vault has asked for peace until then (Retry-After).
	held time.Time
}

func newBreaker(now func() time.Time, turned func(bool, string)) *breaker {
	return &breaker{now: now, turned: turned, wait: &backoff.ExponentialBackOff{
		// A quarter less or more stays between minOpen and maxOpen.
		InitialInterval: minOpen * 4 / 3, MaxInterval: maxOpen * 4 / 5, Multiplier: 2, RandomizationFactor: 0.25,
	}}
}

// allow says whether a call may be made. If so, done must be told what came of it.
func (b *breaker) allow() (done func(outcome, string), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	if now.Before(b.held) {
		return nil, fmt.Errorf("too many requests, and Vault has asked to be left alone until %s", stamp(b.held))
	}
	probe := false
	if b.open {
		if now.Before(b.until) || b.probing {
			return nil, fmt.Errorf("left alone until %s after %d failures in a row, the last: %s", stamp(b.until), b.row, b.last)
		}
		b.probing, probe = true, true
	}
	b.asked = now
	return func(o outcome, why string) { b.done(probe, o, why) }, nil
}

func stamp(t time.Time) string { return t.UTC().Format("15:04:05 UTC") }

func (b *breaker) done(probe bool, o outcome, why string) {
	b.mu.Lock()
	was := b.open
	if probe {
		b.probing = false
	}
	if probe && o == alive && why != "" {
		o = ill // what is tried whether it works is tried once
	}
	switch o {
	case well:
		b.heard, b.row, b.last, b.open, b.judged = true, 0, "", false, b.now()
	case alive:
		b.heard = true
	case ill:
		// A call that began before it opened says nothing new.
		if b.open && !probe {
			break
		}
		now := b.now()
		if b.row == 0 {
			b.first = now
		}
		b.row++
		b.last, b.judged = why, now
		if !b.open && b.row < tripAfter && (b.slow == 0 || now.Sub(b.first) < b.slow) {
			break
		}
		if !b.open {
			b.wait.Reset()
		}
		b.open, b.until = true, now.Add(b.wait.NextBackOff())
	}
	turned := was != b.open
	b.mu.Unlock()
	if turned {
		b.turned(!was, why)
	}
}

// ready says why a call should not be tried now. While it is open, one caller at a time hears that it may, and is the one that
// tries: who asks first has something to lose by a call that fails.
func (b *breaker) ready() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	switch {
	case now.Before(b.held):
		return fmt.Errorf("it has asked to be left alone until %s, the last failure: %s", stamp(b.held), cmp.Or(b.last, "too many requests"))
	case !b.open:
		return nil
	case now.Before(b.until):
		return fmt.Errorf("left alone until %s after %d failures in a row, the last: %s", stamp(b.until), b.row, b.last)
	case b.probing || now.Before(b.claimed):
		return fmt.Errorf("it is being tried whether it works again, the last failure: %s", b.last)
	}
	b.claimed = now.Add(claimLasts)
	return nil
}

// hold keeps all calls back for a time.
func (b *breaker) hold(d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if until := b.now().Add(d); until.After(b.held) {
		b.held = until
	}
}

// health is the breaker's view for Status and metrics.
type health struct {
	heard bool
	row   int
	first time.Time
	last  string
	// asked and judged are when the last call went out, and when one last said whether it works.
	asked, judged time.Time
	// until is when the next call may be made, zero if now.
	until time.Time
	// open: only a probe may be made; probing: one is under way.
	open, probing bool
	// held: Vault has asked for peace until until, or later.
	held bool
}

// trouble reports whether what the breaker guards does not work, by more than one bad answer.
func (h health) trouble(now time.Time) bool {
	return h.row > 0 && (h.open || h.held) && now.Sub(h.asked) < newsLasts
}

func (b *breaker) health() health {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := health{heard: b.heard, row: b.row, first: b.first, last: b.last, asked: b.asked, judged: b.judged, open: b.open, probing: b.probing}
	if b.open {
		h.until = b.until
	}
	if h.held = b.now().Before(b.held); h.held && b.held.After(h.until) {
		h.until = b.held
	}
	return h
}
