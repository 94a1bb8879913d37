package sds

import (
	"sync"
	"time"
)

// ReturnTime is how long a validator may take to be back after its stream has ended, by default: until then it goes on with the
// bundle and the certificate that it has. Envoy waits up to 30 s before it connects again, where its bootstrap says nothing else
// (envoy.config.core.v3.GrpcService.EnvoyGrpc.retry_policy); the rest is for the connection, the caller's attestation and its
// answer.
const ReturnTime = 45 * time.Second

// ended is what validators go on with whose streams have ended, each until when it counts. It holds as little as there are
// kinds of it, however many streams end.
type ended[K comparable] struct {
	after time.Duration
	// ring is called when something counts no more.
	ring func()

	mu    sync.Mutex
	until map[K]time.Time
}

// add has k count from now on.
func (e *ended[K]) add(k K) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.until == nil {
		e.until = map[K]time.Time{}
	}
	if _, ok := e.until[k]; !ok {
		time.AfterFunc(e.after, func() { e.expire(k) })
	}
	e.until[k] = time.Now().Add(e.after) // which no jump of the clock makes longer
}

// expire takes k out, unless it was added once more.
func (e *ended[K]) expire(k K) {
	e.mu.Lock()
	left := time.Until(e.until[k])
	if left > 0 {
		time.AfterFunc(left, func() { e.expire(k) })
	} else {
		delete(e.until, k)
	}
	e.mu.Unlock()
	if left <= 0 {
		e.ring()
	}
}

// each tells what counts, and until when.
func (e *ended[K]) each(tell func(k K, until time.Time)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for k, until := range e.until {
		tell(k, until)
	}
}
