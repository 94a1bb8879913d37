package server

import (
	"context"
	"time"
)

const (
	// upkeepEvery spaces the looks at what has to be done now and then.
	upkeepEvery = 5 * time.Second
	// tokensKept is how long a join token is listed after it was used, revoked or has expired; tokensAtOnce is how many
	// are forgotten in one statement.
	tokensKept   = 30 * 24 * time.Hour
	tokensAtOnce = 1000
)

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
