package transit

import (
	"context"
	"slices"
	"sync"
	"time"
)

const (
	// mostInBatch bounds a batch. Vault signs its items one after the other, so a larger one keeps its callers waiting for
	// longer than it saves.
	mostInBatch = 64
	// mostFlying bounds the batches of one key that are under way. Several, since each occupies one core of Vault, and since
	// one may hang.
	mostFlying = 4
	// gatherTime is how long a call waits for the batch under way to end, and for others to join it. A request costs Vault
	// ten times what a signature does, so it pays to have few; but an answer from afar takes longer than this.
	gatherTime = 2 * time.Millisecond
)

// answer is what came back for one input.
type answer struct {
	signature []byte
	err       error
}

// batcher gathers the inputs of concurrent callers into batches. It has goroutines only while calls are under way.
type batcher struct {
	// send gives one answer for each input, in order, or an error for all of them.
	send func(ctx context.Context, inputs [][]byte) ([]answer, error)

	mu sync.Mutex
	// waiting is in the order of arrival, so that nobody is overtaken by more than the batches under way.
	waiting []*call
	flying  int // batches under way
	// patience runs while calls wait though there is room for a batch.
	patience *time.Timer
}

type call struct {
	input []byte
	until time.Time
	done  chan answer // room for one, so that an answer to nobody is no hindrance
}

// do waits for the answer until ctx ends, which must have a deadline.
func (b *batcher) do(ctx context.Context, input []byte) ([]byte, error) {
	until, _ := ctx.Deadline()
	c := &call{input: input, until: until, done: make(chan answer, 1)}
	b.mu.Lock()
	b.waiting = append(b.waiting, c)
	b.launch(false)
	b.mu.Unlock()
	select {
	case a := <-c.done:
		return a.signature, a.err
	case <-ctx.Done():
		b.mu.Lock()
		defer b.mu.Unlock()
		b.waiting = slices.DeleteFunc(b.waiting, func(w *call) bool { return w == c })
		b.launch(false)
		return nil, ctx.Err()
	}
}

// launch sends what waits: at once if nothing is under way, else once a batch is full or a call has waited for long enough.
// The caller holds mu.
func (b *batcher) launch(late bool) {
	for len(b.waiting) > 0 && b.flying < mostFlying && (b.flying == 0 || len(b.waiting) >= mostInBatch || late) {
		n := min(len(b.waiting), mostInBatch)
		batch := slices.Clone(b.waiting[:n])
		b.waiting = slices.Delete(b.waiting, 0, n)
		b.flying++
		late = false
		go b.fly(batch)
	}
	switch wait := len(b.waiting) > 0 && b.flying < mostFlying; {
	case !wait && b.patience != nil:
		b.patience.Stop()
		b.patience = nil
	case wait && b.patience == nil:
		b.patience = time.AfterFunc(gatherTime, func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.patience = nil
			b.launch(true)
		})
	}
}

// fly sends one batch, and then the next.
func (b *batcher) fly(batch []*call) {
	inputs := make([][]byte, len(batch))
	var until time.Time
	for i, c := range batch {
		inputs[i] = c.input
		if c.until.After(until) {
			until = c.until
		}
	}
	ctx, cancel := context.WithDeadline(context.Background(), until)
	defer cancel()
	answers, err := b.send(ctx, inputs)
	b.mu.Lock()
	b.flying--
	b.launch(false)
	b.mu.Unlock()
	for i, c := range batch {
		if err != nil {
			c.done <- answer{err: err}
			continue
		}
		c.done <- answers[i]
	}
}
