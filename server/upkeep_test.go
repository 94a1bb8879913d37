package server

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
)

func TestOldJoinTokensAreForgottenAtStartAndDaily(t *testing.T) {
	t.Parallel()
	kept := func(s *live, want int) {
		t.Helper()
		admin := s.admin()
		for deadline := time.Now().Add(30 * time.Second); ; {
			r, err := admin.ListJoinTokens(t.Context(), &adminv1.ListJoinTokensRequest{})
			must(t, err)
			if len(r.Tokens) == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d join tokens are kept, want %d", len(r.Tokens), want)
			}
			time.Sleep(time.Millisecond)
		}
	}
	c := newCluster(t, "east")
	s := c.start(t, func(s *Server) { s.upkeepEvery = time.Millisecond })
	s.enrol("node-1")
	c.ahead.Store(int64(2 * time.Hour))
	s.token("node-2")
	kept(s, 2)
	c.ahead.Store(int64(tokensKept + time.Hour))
	kept(s, 1)
	c.ahead.Store(int64(tokensKept + 26*time.Hour))
	kept(s, 0)

	c = newCluster(t, "west")
	s = c.start(t, nil)
	s.token("node-1")
	must(t, s.stop())
	c.ahead.Store(int64(tokensKept + time.Hour))
	kept(c.start(t, nil), 0)
}

// The life of control certificates may be configured anew while an agent is away.
func TestTheMonthOfReturnCountsFromTheCertificatesEnd(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	c.manual = true // a step taken while the clock is ahead would be in the log, and the next start refused
	s := c.start(t, nil)
	long := s.enrol("node-1")
	life := s.config.ControlTTL
	must(t, s.stop())
	for _, ttl := range []time.Duration{time.Hour, 2 * life} {
		s = c.start(t, func(s *Server) { s.config.ControlTTL = ttl })
		client := signetv1.NewEnrolmentClient(s.toEnrol())
		_, _ = client.Enrol(t.Context(), &signetv1.EnrolRequest{}) // the connection is made before the clock jumps
		c.ahead.Store(int64(life + renewalGrace + time.Minute))
		if _, err := client.Enrol(t.Context(), enrolByKey("node-1", renewal(t, long))); status.Code(err) != codes.PermissionDenied {
			t.Errorf("with control.ttl %s, a month and a minute after the end: %v", ttl, err)
		}
		row, _ := s.directory.agent("node-1")
		if left := time.Until(row.NotAfter) - life; left < -time.Hour || left > 0 {
			t.Errorf("the row's end is %s", row.NotAfter)
		}
		must(t, s.stop())
		c.ahead.Store(0)
	}
	s = c.start(t, func(s *Server) { s.config.ControlTTL = time.Hour })
	client := signetv1.NewEnrolmentClient(s.toEnrol())
	_, _ = client.Enrol(t.Context(), &signetv1.EnrolRequest{})
	c.ahead.Store(int64(life + renewalGrace - time.Hour))
	_, err := client.Enrol(t.Context(), enrolByKey("node-1", renewal(t, long)))
	must(t, err)
}
