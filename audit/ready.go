package audit

import (
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/signet-ca/signet/internal/durable"
)

const (
	// probeFile is written anew to see whether the folder takes a write: a full disk shows in no other way.
	probeFile = ".ready"
	// probeInterval bounds what readiness costs the disk, whoever asks for it how often.
	probeInterval = 500 * time.Millisecond
	// failureShown is how long an append that failed shows, since the probe need not meet what it met.
	failureShown = 5 * time.Second
)

// probe is the newest try to write.
type probe struct {
	mu  sync.Mutex
	at  time.Time
	err error
}

// Ready reports why entries can't be logged now, as far as can be known without logging one: Usable, no append that has
// just failed, and a small durable write in the log's folder.
func (l *Log) Ready() error {
	if err := l.Usable(); err != nil {
		return err
	}
	l.mu.Lock()
	at, err := l.failedAt, l.failure
	l.mu.Unlock()
	if err != nil && time.Since(at) < failureShown {
		return err
	}
	l.probe.mu.Lock()
	defer l.probe.mu.Unlock()
	if time.Since(l.probe.at) >= probeInterval {
		l.probe.err = durable.WriteFile(filepath.Join(l.dir, probeFile), []byte("probe\n"), 0o600)
		l.probe.at = time.Now()
	}
	if l.probe.err != nil {
		return fmt.Errorf("the log cannot be written: %w", l.probe.err)
	}
	return nil
}
