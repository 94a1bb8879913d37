package server

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
)

// Limits bound what one agent may ask for, so that it can't take the log and the signing keys from the others.
type Limits struct {
	// CertificatesPerSecond of one agent, in the long run.
	CertificatesPerSecond float64
	// Burst is how many it may ask for at once, after it has asked for nothing for a while.
	Burst int
}

// DefaultLimits let a node of 1,000 workloads start all of them at once, several times over.
var DefaultLimits = Limits{CertificatesPerSecond: 200, Burst: 5000}

func (l Limits) check() error {
	if !(l.CertificatesPerSecond > 0) || l.Burst < maxItems {
		return fmt.Errorf("limits of %g certificates per second and %d at once: want more than 0, and at least %d at once, which is one call", l.CertificatesPerSecond, l.Burst, maxItems)
	}
	return nil
}

// quotas has a token bucket for each agent that has asked, so at most for each that is enrolled.
type quotas struct {
	limits Limits
	mu     sync.Mutex
	of     map[string]*rate.Limiter
}

// take takes n certificates from an agent's bucket, or says how long it must wait until there are so many.
func (q *quotas) take(agent string, n int, now time.Time) (wait time.Duration) {
	q.mu.Lock()
	bucket := q.of[agent]
	if bucket == nil {
		if q.of == nil {
			q.of = map[string]*rate.Limiter{}
		}
		bucket = rate.NewLimiter(rate.Limit(q.limits.CertificatesPerSecond), q.limits.Burst)
		q.of[agent] = bucket
	}
	q.mu.Unlock()
	r := bucket.ReserveN(now, n)
	if wait = r.DelayFrom(now); wait > 0 {
		r.CancelAt(now)
	}
	return wait
}

// within refuses a call that is more than its agent may ask for now. What it asks for counts, not what it gets: a request
// that is refused costs the looking at it.
func (s *Server) within(agent string, n int) error {
	wait := s.quotas.take(agent, n, s.now())
	if wait <= 0 {
		return nil
	}
	r := refuse(codes.ResourceExhausted, "over_quota", "too many certificates", fmt.Errorf("agent %s asks for more than %g certificates per second: the next %d in %s",
		agent, s.quotas.limits.CertificatesPerSecond, n, wait.Round(time.Millisecond)))
	r.retry = wait
	return r
}
