package transit

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/test/bubble"
)

// echo answers each input with itself, after a time, and remembers the sizes of the batches.
type echo struct {
	takes time.Duration
	fails func(batch int) error

	mu    sync.Mutex
	sizes []int
	now   int // batches under way
	most  int
}

func (e *echo) send(ctx context.Context, inputs [][]byte) ([]answer, error) {
	e.mu.Lock()
	e.sizes = append(e.sizes, len(inputs))
	batch := len(e.sizes)
	e.now++
	e.most = max(e.most, e.now)
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		e.now--
		e.mu.Unlock()
	}()
	select {
	case <-time.After(e.takes):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if e.fails != nil {
		if err := e.fails(batch); err != nil {
			return nil, err
		}
	}
	answers := make([]answer, len(inputs))
	for i, in := range inputs {
		answers[i].signature = in
		if string(in) == "bad" {
			answers[i] = answer{err: errors.New("bad input")}
		}
	}
	return answers, nil
}

// ask asks for one and wants that one.
func ask(t *testing.T, b *batcher, input string, within time.Duration) error {
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	got, err := b.do(ctx, []byte(input))
	if err == nil && string(got) != input {
		t.Errorf("asked for %q, got %q", input, got)
	}
	return err
}

// idle wants nothing to be left once all callers are gone.
func (b *batcher) idle(t *testing.T) {
	synctest.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.flying != 0 || len(b.waiting) != 0 || b.patience != nil {
		t.Errorf("left over: %d batches, %d calls", b.flying, len(b.waiting))
	}
}

func TestALoneCallIsSentAtOnce(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		e := &echo{takes: 5 * time.Millisecond}
		b := &batcher{send: e.send}
		for range 3 {
			start := time.Now()
			if err := ask(t, b, "x", time.Second); err != nil || time.Since(start) != e.takes {
				t.Errorf("took %s: %v", time.Since(start), err)
			}
		}
		b.idle(t)
	})
}

func TestACallWaitsForTheOneBeforeItOnlyForAMoment(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		// Vault is near: the second goes when the first is back.
		e := &echo{takes: gatherTime / 2}
		b := &batcher{send: e.send}
		took := func() time.Duration {
			var first sync.WaitGroup
			first.Go(func() { _ = ask(t, b, "first", time.Second) })
			synctest.Wait()
			start := time.Now()
			if err := ask(t, b, "second", time.Second); err != nil {
				t.Error(err)
			}
			defer first.Wait()
			return time.Since(start)
		}
		if d := took(); d != 2*e.takes {
			t.Errorf("took %s", d)
		}
		// It is far away, or hangs.
		e.takes = time.Second / 2
		if d := took(); d != e.takes+gatherTime {
			t.Errorf("took %s", d)
		}
		b.idle(t)
	})
}

func TestACrowdIsGatheredIntoBoundedBatches(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		e := &echo{takes: 10 * time.Millisecond}
		b := &batcher{send: e.send}
		const callers, rounds = 256, 20
		var all sync.WaitGroup
		for i := range callers {
			all.Go(func() {
				for r := range rounds {
					if err := ask(t, b, fmt.Sprintf("%d in round %d", i, r), time.Minute); err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
		total := 0
		for _, n := range e.sizes {
			if n < 1 || n > mostInBatch {
				t.Errorf("a batch of %d", n)
			}
			total += n
		}
		if total != callers*rounds {
			t.Errorf("%d inputs were sent for %d calls", total, callers*rounds)
		}
		if e.most != mostFlying {
			t.Errorf("up to %d batches were under way, want %d", e.most, mostFlying)
		}
		// Were all full, there would be 80.
		if len(e.sizes) > 120 {
			t.Errorf("%d batches for %d signatures", len(e.sizes), total)
		}
		b.idle(t)
	})
}

func TestCallsAreServedInTheOrderOfArrival(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		e := &echo{takes: 10 * time.Millisecond}
		b := &batcher{send: e.send}
		var served atomic.Int32
		var all sync.WaitGroup
		const callers = mostInBatch * mostFlying * 3
		for i := range callers {
			all.Go(func() {
				if err := ask(t, b, fmt.Sprint(i), time.Minute); err != nil {
					t.Error(err)
				}
				// Batches overlap, so a call may be overtaken by those of the batches under way.
				if n := int(served.Add(1)); n < i-mostInBatch*mostFlying || n > i+1+mostInBatch*mostFlying {
					t.Errorf("call %d was served as number %d", i, n)
				}
			})
			synctest.Wait()
		}
		all.Wait()
	})
}

func TestAFailedBatchFailsOnlyItsOwnCallers(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		broken := errors.New("broken")
		e := &echo{takes: 10 * time.Millisecond, fails: func(batch int) error {
			if batch == 2 {
				return broken
			}
			return nil
		}}
		b := &batcher{send: e.send}
		var failed, good, bad atomic.Int32
		var all sync.WaitGroup
		for i := range 4 * mostInBatch {
			all.Go(func() {
				input := fmt.Sprint(i)
				if i == 4*mostInBatch-1 {
					input = "bad"
				}
				switch err := ask(t, b, input, time.Minute); {
				case errors.Is(err, broken):
					failed.Add(1)
				case err != nil:
					bad.Add(1)
				default:
					good.Add(1)
				}
			})
			synctest.Wait()
		}
		all.Wait()
		if int(failed.Load()) != e.sizes[1] || int(failed.Load()+good.Load()+bad.Load()) != 4*mostInBatch || bad.Load() != 1 {
			t.Errorf("%d failed with the batch of %d, %d alone, %d were served", failed.Load(), e.sizes[1], bad.Load(), good.Load())
		}
	})
}

func TestEachCallersDeadlineIsKept(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		e := &echo{takes: time.Hour}
		b := &batcher{send: e.send}
		start := time.Now()
		var all sync.WaitGroup
		for i := range 3 * mostInBatch * mostFlying {
			within := time.Duration(1+i%7) * time.Second
			all.Go(func() {
				if err := ask(t, b, "x", within); !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
				if took := time.Since(start); took != within {
					t.Errorf("took %s, want %s", took, within)
				}
			})
			synctest.Wait()
		}
		all.Wait()
		b.idle(t)
		// Only those that never came to be sent, because all four batches hung, are missing.
		sent := 0
		for _, n := range e.sizes {
			sent += n
		}
		if sent >= 3*mostInBatch*mostFlying {
			t.Errorf("%d inputs were sent, also of callers that had given up", sent)
		}
	})
}
