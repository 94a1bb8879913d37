package agent

import (
	"context"
	"sync"
	"time"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/internal/bell"
	"github.com/signet-ca/signet/trust"
)

// storeRetry is the time between tries to write a bundle while the disk does not take it.
const storeRetry = time.Second

// storedBundles is how far the bundle in use is on disk. A bundle that a restart would take back must not be acknowledged:
// the server would go on, and the workloads that come after the restart would not know the new root.
type storedBundles struct {
	// writing is held over a write, so that an older one never replaces a newer one.
	writing sync.Mutex
	// changed rings when a bundle has been stored, owed when one could not be.
	changed, owed bell.Bell

	mu sync.Mutex
	// last is what is on disk; zero = nothing.
	last trust.Bundle
	// newest is the sequence of the bundle in use.
	newest uint64
}

// loaded notes what was found on disk.
func (s *storedBundles) loaded(b trust.Bundle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last, s.newest = b, b.Sequence()
}

// taken notes that a bundle is about to be used.
func (s *storedBundles) taken(b trust.Bundle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.newest = max(s.newest, b.Sequence())
}

// pending reports whether a bundle is in use that is not on disk.
func (s *storedBundles) pending() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.newest > s.last.Sequence()
}

// honest is what may be acknowledged where v is believed; false = nothing.
func (s *storedBundles) honest(v trust.Version) (trust.Version, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.Sequence <= s.last.Sequence() {
		return v, true
	}
	return s.last.Version(), !s.last.IsZero()
}

// word is the bundle that a restart would begin with, as the server is told; nil = none.
func (s *storedBundles) word() *signetv1.BundleAck {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last.IsZero() {
		return nil
	}
	d := s.last.Digest()
	return &signetv1.BundleAck{TrustDomain: s.last.TrustDomain().Name(), Digest: d[:], Sequence: s.last.Sequence()}
}

// storeNewest writes the bundle in use.
func (a *Agent) storeNewest() error {
	s := &a.stored
	s.writing.Lock()
	defer s.writing.Unlock()
	b, ok := a.bundles.Get(a.member.Load().td)
	if !ok {
		return nil
	}
	if err := a.storeBundle(b); err != nil {
		s.owed.Ring()
		return err
	}
	s.mu.Lock()
	s.last = b
	s.mu.Unlock()
	s.changed.Ring()
	return nil
}

// keepStored writes until it works what could not be written at once.
func (a *Agent) keepStored(ctx context.Context) {
	for {
		owed := a.stored.owed.Next()
		var retry <-chan time.Time
		if a.stored.pending() {
			retry = time.After(storeRetry)
		}
		select {
		case <-ctx.Done():
			return
		case <-owed:
			continue
		case <-retry:
		}
		if err := a.storeNewest(); err != nil {
			a.log.Warn("still could not store the trust bundle in use: the server is told of the one before, and goes on with no trust change that needs it", "err", err)
		} else {
			a.log.Info("the trust bundle in use is stored now")
		}
	}
}
