package agent

import "sync"

// bell tells those who wait that something has changed.
type bell struct {
	mu sync.Mutex
	// rung is closed at the next ring; nil while nobody waits.
	rung chan struct{}
}

// next returns a channel that is closed at the next ring. Take it before looking, or a change between is missed.
func (b *bell) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rung == nil {
		b.rung = make(chan struct{})
	}
	return b.rung
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rung != nil {
		close(b.rung)
		b.rung = nil
	}
}
