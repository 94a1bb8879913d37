// Package bell wakes those who wait for a change.
package bell

import (
	"context"
	"sync"
	"time"
)

// Bell tells those who wait that something has changed. The zero value is ready.
type Bell struct {
	mu sync.Mutex
	// rung is closed at the next ring; nil while nobody waits.
	rung chan struct{}
}

// Next returns a channel that is closed at the next ring. Take it before looking, or a change between is missed.
func (b *Bell) Next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rung == nil {
		b.rung = make(chan struct{})
	}
	return b.rung
}

// Ring wakes them.
func (b *Bell) Ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rung != nil {
		close(b.rung)
		b.rung = nil
	}
}

// Wait waits for so long, or until ctx ends, or until it is rung, which may be never (nil). It reports whether it was rung.
func Wait(ctx context.Context, d time.Duration, rung <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-rung:
		return true
	}
	return false
}
