package server

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
)

const (
	// What a peer is refused for is said of so many at once, and then of one in this time.
	saidAtOnce, sayRefused = 20, 3 * time.Second
	// sayUnable spaces what is said of one reason for which this server can't answer anybody: it is the same for all.
	sayUnable = time.Minute
)

// refusals bounds what the log hears of refusals, for each door and reason by itself: who is noisy hides nobody. Metrics count
// all of them.
type refusals struct {
	mu sync.Mutex
	of map[[2]string]*refusedFor
}

type refusedFor struct {
	limiter *rate.Limiter
	// unlogged were not logged since the last line; they began and ended at these times.
	unlogged    int64
	first, last time.Time
}

// allow says whether one is logged, and how many were not since the last line about the same.
func (rs *refusals) allow(d door, r *refusal, now time.Time) (unlogged int64, ok bool) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	key := [2]string{d.name, r.reason}
	f := rs.of[key]
	if f == nil {
		f = &refusedFor{limiter: rate.NewLimiter(rate.Every(sayRefused), saidAtOnce)}
		if r.code == codes.Unavailable {
			f.limiter = rate.NewLimiter(rate.Every(sayUnable), 1)
		}
		if rs.of == nil {
			rs.of = map[[2]string]*refusedFor{}
		}
		rs.of[key] = f
	}
	if !f.limiter.AllowN(now, 1) {
		if f.unlogged == 0 {
			f.first = now
		}
		f.unlogged, f.last = f.unlogged+1, now
		return 0, false
	}
	unlogged, f.unlogged = f.unlogged, 0
	return unlogged, true
}

// rest tells of those that no later line has told of for a while: so the end of each series is said.
func (rs *refusals) rest(now time.Time, tell func(door, reason string, f refusedFor)) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for key, f := range rs.of {
		if f.unlogged > 0 && now.Sub(f.first) > sayUnable {
			tell(key[0], key[1], *f)
			f.unlogged = 0
		}
	}
}

// rejected counts a refusal and logs it, at a bounded rate.
func (s *Server) rejected(ctx context.Context, d door, r *refusal) {
	s.metrics.reject(d.name, r.reason)
	unlogged, ok := s.refusals.allow(d, r, time.Now())
	if !ok {
		return
	}
	attrs := []slog.Attr{slog.String("door", d.name), slog.String("reason", r.reason)}
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		attrs = append(attrs, slog.String("peer", p.Addr.String()))
	}
	if r.cause != nil {
		attrs = append(attrs, slog.String("err", clip(r.cause.Error())))
		// What a cause keeps from peers it tells the log.
		var more slog.LogValuer
		if errors.As(r.cause, &more) {
			attrs = append(attrs, slog.Any("detail", more))
		}
	} else {
		attrs = append(attrs, slog.String("err", clip(r.public)))
	}
	if unlogged > 0 {
		attrs = append(attrs, slog.Int64("not_logged_before", unlogged))
	}
	s.log.LogAttrs(ctx, slog.LevelWarn, "refused", attrs...)
}

// sayUnlogged tells the log of refusals that it has heard nothing of.
func (s *Server) sayUnlogged() {
	s.refusals.rest(time.Now(), func(door, reason string, f refusedFor) {
		s.log.Warn("refused, and not logged one by one", "door", door, "reason", reason, "count", f.unlogged, "first", stamp(f.first), "last", stamp(f.last))
	})
}
