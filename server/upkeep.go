package server

import (
	"context"
	"sync"
	"time"

	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/internal/bell"
)

const (
	// upkeepEvery spaces the looks at what has to be done now and then.
	upkeepEvery = 5 * time.Second
	// tokensKept is how long a join token is listed after it was used, revoked or has expired; tokensAtOnce is how many
	// are forgotten in one statement.
	tokensKept   = 30 * 24 * time.Hour
	tokensAtOnce = 1000
)

// logPatience is how long a try of the log may take before it counts as stopped: its disk hangs.
const logPatience = 10 * time.Second

// logTried is what the newest tries of the audit log say of it, to who must not touch a disk to know: a metric, a status.
type logTried struct {
	mu sync.Mutex
	// begun is of the tries under way the first; zero = none is.
	begun    time.Time
	underWay int
	// since is when tries began to fail; err is why the newest did.
	since time.Time
	err   error
}

// tryLog reports why entries can't be logged now, and remembers it.
func (s *Server) tryLog() error {
	t := &s.logTried
	t.mu.Lock()
	if t.underWay++; t.underWay == 1 {
		t.begun = time.Now()
	}
	t.mu.Unlock()
	err := s.audit.Ready()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.underWay--; t.underWay == 0 {
		t.begun = time.Time{}
	}
	if err != nil && t.err == nil {
		t.since = s.now()
	}
	t.err = err
	return err
}

// tryLogOften does so for as long as ctx lives, whether or not anybody asks for readiness.
func (s *Server) tryLogOften(ctx context.Context) {
	for ; ctx.Err() == nil; bell.Wait(ctx, s.upkeepEvery, nil) {
		_ = s.tryLog() // remembered
	}
}

// halt is what keeps everything from being issued; nil = the log can be written, as far as is known.
func (t *logTried) halt(dir string, now time.Time) *check.Halt {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := check.Halt{Since: t.since, Mend: "df -h " + dir}
	if t.err != nil {
		h.Why = t.err.Error()
		return &h
	}
	if waits := time.Since(t.begun); !t.begun.IsZero() && waits > logPatience {
		h.Since, h.Why = now.Add(-waits), "the log cannot be written: its disk hangs, or is very busy"
		return &h
	}
	return nil
}

// forgetTokens forgets the join tokens that ended long ago, and returns when to look again. The log keeps all of them.
func (s *Server) forgetTokens(ctx context.Context) time.Time {
	now := s.now()
	n, err := s.store.PurgeTokens(ctx, now.Add(-tokensKept), tokensAtOnce)
	switch {
	case err != nil:
		if ctx.Err() == nil {
			s.log.Warn("could not forget old join tokens", "err", err)
		}
		return now.Add(time.Hour)
	case n == tokensAtOnce:
		return now // there may be more
	case n > 0:
		s.log.Info("old join tokens forgotten", "tokens", n)
	}
	return now.Add(24 * time.Hour)
}

// upkeep does what has to be done now and then, for as long as ctx lives.
func (s *Server) upkeep(ctx context.Context) {
	ticker := time.NewTicker(s.upkeepEvery)
	defer ticker.Stop()
	var tokens time.Time
	for {
		_ = s.clock.believe() // logged
		s.holdBans(ctx)
		_ = s.storeBans(ctx) // logged, and tried again
		s.settleLater(ctx)
		s.sayUnlogged()
		if !s.now().Before(tokens) {
			tokens = s.forgetTokens(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
