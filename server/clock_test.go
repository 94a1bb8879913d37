package server

import (
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/test/doors"
)

// clocks are a wall clock and the time that passes.
type clocks struct{ wall, passed time.Duration }

var noon = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

func (c *clocks) clock() *clock {
	return newClock(func() time.Time { return noon.Add(c.wall) }, func() time.Duration { return c.passed }, 0, slog.New(slog.DiscardHandler))
}

// pass lets time pass for both, with a look every 5 seconds.
func (c *clocks) pass(k *clock, d time.Duration) {
	for range d / (5 * time.Second) {
		c.wall += 5 * time.Second
		c.passed += 5 * time.Second
		_ = k.believe()
	}
}

func believed(t *testing.T, k *clock, want bool, says ...string) {
	t.Helper()
	err := k.believe()
	if (err == nil) != want {
		t.Fatalf("believed: %v, want %v", err, want)
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %s", err, s)
		}
	}
}

func TestAClockIsBelievedWhileItAgreesWithTheTimeThatPasses(t *testing.T) {
	t.Parallel()
	c := &clocks{}
	k := c.clock()
	c.pass(k, time.Hour)
	believed(t, k, true)
	// A little at once, as NTP steps, and a machine that was suspended: time passed for both.
	c.wall += 50 * time.Second
	believed(t, k, true)
	c.wall -= 50 * time.Second
	believed(t, k, true)
	c.wall, c.passed = c.wall+10*time.Hour, c.passed+10*time.Hour
	believed(t, k, true)
	if k.recent() != "" {
		t.Errorf("a jump is shown: %s", k.recent())
	}
}

func TestAMachineThatIsSuspendedInTheMiddleOfALookIsNotDoubted(t *testing.T) {
	t.Parallel()
	c := &clocks{}
	k := c.clock()
	wall, suspended := k.wall, 10*time.Hour
	k.wall = func() time.Time {
		now := wall()
		c.wall, c.passed, suspended = c.wall+suspended, c.passed+suspended, 0
		return now
	}
	for range 2 {
		believed(t, k, true)
	}
	if !k.base.Equal(noon.Add(10 * time.Hour)) {
		t.Errorf("the look has noted %s", stamp(k.base))
	}
}

func TestAClockThatGoesBackIsNotBelievedUntilItIsRight(t *testing.T) {
	t.Parallel()
	c := &clocks{}
	k := c.clock()
	c.pass(k, time.Hour)
	c.wall -= 24 * time.Hour
	believed(t, k, false, "2026-05-03T13:00:00Z", "2026-05-04T13:00:00Z", "timedatectl")
	c.pass(k, 12*time.Hour)
	believed(t, k, false)
	c.wall += 24 * time.Hour
	believed(t, k, true)
	// The log remembers over a restart.
	k = c.clock()
	k.remember(noon.Add(100 * time.Hour))
	believed(t, k, false, "2026-05-08T16:00:00Z", "newest entry of the audit log")
}

func TestAClockThatJumpsAheadIsBelievedLaterAndOneThatComesBackAtOnce(t *testing.T) {
	t.Parallel()
	c := &clocks{}
	k := c.clock()
	c.wall += 24 * time.Hour
	believed(t, k, false, "2026-05-05T12:00:00Z", "2026-05-04T12:00:00Z")
	c.pass(k, jumpHold-10*time.Second)
	believed(t, k, false)
	c.wall -= 24 * time.Hour
	believed(t, k, true) // nothing was done by the wrong clock
	if k.recent() != "" {
		t.Error("a jump is shown that was taken back")
	}
	c.wall += 24 * time.Hour
	believed(t, k, false)
	c.pass(k, jumpHold)
	believed(t, k, true)
	if got := k.recent(); !strings.Contains(got, "from 2026-05-04T12:0") {
		t.Errorf("the jump is not shown: %q", got)
	}
	c.pass(k, jumpShown+time.Minute)
	if k.recent() != "" {
		t.Error("a jump is shown for ever")
	}
	c.wall -= 24 * time.Hour
	believed(t, k, false)
}

// The server of a cluster whose clock is set by ahead, while the time that passes goes on.
func TestAServerWithAWrongClockIssuesNothingAndSaysBothTimes(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	var passed atomic.Int64
	s := c.start(t, func(s *Server) {
		begun := time.Now()
		s.clock = newClock(s.now, func() time.Duration { return time.Since(begun) + time.Duration(passed.Load()) }, 0, s.log)
		s.keeper.clock = s.clock
	})
	m := s.enrol("node-1")
	s.apply(false, registration("frontend", "node-1"))
	conn := s.dial(m)
	// issue returns the place of the certificate in the log.
	issue := func() (uint64, error) {
		issued, err := doors.Issue(t.Context(), conn, "frontend", shown, newCSR(t))
		return issued.GetLogIndex(), err
	}
	last, err := issue()
	must(t, err)
	for _, off := range []time.Duration{-24 * time.Hour, 24 * time.Hour} {
		c.ahead.Store(int64(off))
		if _, err := issue(); err == nil {
			t.Errorf("by %s: a certificate was made", off)
		}
		code, text := get(t, s, "/readyz")
		here, there := stamp(c.now())[:13], stamp(time.Now())[:13]
		if code != http.StatusServiceUnavailable || !strings.Contains(text, "[-]clock failed: SGN1005: ") || !strings.Contains(text, here) || !strings.Contains(text, there) {
			t.Errorf("by %s: readyz: %d\n%s", off, code, text)
		}
		c.ahead.Store(0)
		next, err := issue()
		must(t, err)
		if next != last+1 {
			t.Errorf("by %s: %d entries were made", off, next-last-1)
		}
		last = next
		s.shows(http.StatusOK) // right again
	}
	// A rotation goes no further by a clock that is wrong, or a root could go while leaves under it live.
	c.ahead.Store(int64(600 * time.Hour))
	if _, err := s.keeper.do(t.Context(), scheduled(), nil); err != nil {
		t.Error(err)
	}
	for _, a := range s.keeper.current.Load().rows {
		if a.Kind == ca.KindIntermediate && a.ID != "intermediate-1" {
			t.Errorf("%s was made by a wrong clock", a.ID)
		}
	}
	passed.Store(int64(600 * time.Hour)) // it was not: time has passed
	if _, err := s.keeper.do(t.Context(), scheduled(), nil); err != nil {
		t.Error(err)
	}
	if n := len(s.keeper.current.Load().rows); n != 4 {
		t.Errorf("%d CAs, want a root, the control CA, the intermediate and its successor", n)
	}
	passed.Store(0)
	c.ahead.Store(0)
}

func TestAServerWhoseLogIsOfTomorrowStartsOnlyAtAWord(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	c.ahead.Store(int64(24 * time.Hour))
	from := stamp(c.now())[:13]
	must(t, c.start(t, nil).stop())
	to := stamp(c.now())[:13]
	c.ahead.Store(0)
	_, err := New(t.Context(), c.config())
	if err == nil || !strings.Contains(err.Error(), "--clock-is-right") || !strings.Contains(err.Error(), from) && !strings.Contains(err.Error(), to) {
		t.Fatalf("started: %v", err)
	}
	conf := c.config()
	conf.ClockIsRight = true
	s, err := New(t.Context(), conf)
	must(t, err)
	must(t, s.clock.believe())
	must(t, s.closeAll())
	must(t, c.start(t, nil).stop()) // the newest entry is of now
}

func TestAnswersAtTheAgentDoorTellTheTime(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	conn := s.dial(m)
	var md metadata.MD
	_, _ = signetv1.NewAgentsClient(conn).Issue(t.Context(), &signetv1.IssueRequest{Items: []*signetv1.IssueItem{{Registration: "none", Csr: newCSR(t)}}}, grpc.Header(&md))
	if len(md.Get(timeHeader)) != 1 {
		t.Errorf("an answer to Issue: %v", md)
	}
	stream, err := signetv1.NewAgentsClient(conn).Sync(t.Context())
	must(t, err)
	must(t, stream.Send(&signetv1.SyncRequest{}))
	if md, err = stream.Header(); err != nil || len(md.Get(timeHeader)) != 1 {
		t.Errorf("an answer to Sync: %v, %v", md, err)
	}
}
