//go:build soak

package server

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/test/doors"
)

// One agent that asks for ten times its quota costs the others little: the p99 of their calls is at most half as high again as
// beside one that keeps to its quota, it always hears when to come again, and nobody is taken for a stranger.
func TestAGreedyAgentDelaysTheOthersLittle(t *testing.T) {
	const quota, window = 100, 10 * time.Second
	c := newCluster(t, "east")
	s := c.start(t, func(s *Server) { s.quotas.limits = Limits{CertificatesPerSecond: quota, Burst: maxItems} })
	greedy, other := s.dial(s.enrol("node-1")), s.dial(s.enrol("node-2"))
	s.apply(false, registration("frontend", "node-1", "node-2"))
	csr := newCSR(t)
	var refused, wrong atomic.Int64
	// ask lets the first agent ask at a rate until the context ends.
	ask := func(ctx context.Context, perSecond int) {
		var calls sync.WaitGroup
		defer calls.Wait()
		const each = 10
		tick := time.NewTicker(time.Second * each / time.Duration(perSecond))
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			calls.Go(func() {
				r := &signetv1.IssueRequest{}
				for range each {
					r.Items = append(r.Items, &signetv1.IssueItem{Registration: "frontend", Selectors: shown, Csr: csr})
				}
				_, err := signetv1.NewAgentsClient(greedy).Issue(ctx, r)
				switch status.Code(err) {
				case codes.OK, codes.Canceled:
				case codes.ResourceExhausted:
					refused.Add(1)
					if len(status.Convert(err).Details()) == 0 {
						wrong.Add(1)
					}
				default:
					wrong.Add(1)
				}
			})
		}
	}
	p99 := func(perSecond int) time.Duration {
		ctx, cancel := context.WithCancel(t.Context())
		var work sync.WaitGroup
		work.Go(func() { ask(ctx, perSecond) })
		var took []time.Duration
		for end := time.Now().Add(window); time.Now().Before(end); time.Sleep(15 * time.Millisecond) {
			begin := time.Now()
			_, err := doors.Issue(t.Context(), other, "frontend", shown, csr)
			took = append(took, time.Since(begin))
			must(t, err)
		}
		cancel()
		work.Wait()
		slices.Sort(took)
		return took[len(took)*99/100]
	}
	fair := p99(quota)
	before := refused.Load()
	beside := p99(10 * quota)
	t.Logf("p99 of the others: %s beside an agent at its quota, %s beside one at ten times its quota; %d calls refused", fair, beside, refused.Load()-before)
	if beside > fair*3/2 {
		t.Errorf("the others wait %s, more than 1.5 × %s", beside, fair)
	}
	if refused.Load() == before || wrong.Load() > 0 {
		t.Errorf("%d calls refused, %d answers of another kind or without a hint", refused.Load()-before, wrong.Load())
	}
}
