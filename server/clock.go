package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
)

const (
	// leastTolerance is how far two times may be apart however well clocks agree; certificates are backdated by more.
	leastTolerance = time.Minute
	// jumpHold is how long nothing is issued after the clock has jumped ahead: time to put it right. Nobody here can tell a
	// wrong clock from a machine that was frozen without its knowing (a virtual one), so it is believed in the end.
	jumpHold = 5 * time.Minute
	// jumpShown is how long a jump that is believed shows.
	jumpShown = time.Hour
)

// errClock marks what was refused because of the clock.
var errClock = errors.New("the clock is not to be believed")

// clock holds the wall clock against what has happened and against the time that has passed. What is made by a wrong clock
// is worth nothing (a leaf that has not begun) or too much (what has ended is believed again, what is still in use is
// taken for over), so nothing is issued, and no step of a rotation is taken by itself, while it is not believed:
//
//   - It is behind the newest entry of the log, or the latest time at which it was believed since the start. This ends when
//     it is right. Where the entry is from a time when the clock was ahead, a person says so at the start (ClockIsRight).
//   - It has jumped ahead, measured by the time since the machine was started, which counts suspension. This ends when it
//     has come back, or after jumpHold.
//
// Nothing that an agent says counts here.
type clock struct {
	wall func() time.Time
	// elapsed goes on whatever the wall clock does.
	elapsed   func() time.Duration
	tolerance time.Duration
	log       *slog.Logger

	mu sync.Mutex
	// mark is the latest time that was believed; whose says whose it is.
	mark  time.Time
	whose string
	// base was the wall clock when elapsed was at; both are of the last look at a clock that was believed.
	base time.Time
	at   time.Duration
	// ahead: the clock is; jumped is what elapsed was when that was first seen.
	ahead  bool
	jumped time.Duration
	// believed is the newest jump that is believed; believedAt is what elapsed was then.
	believed   string
	believedAt time.Duration
	// off is by how much the clock was ahead at the last look.
	off    time.Duration
	doubts bool
	// doubted is what elapsed was when the doubt began.
	doubted time.Duration
}

func newClock(wall func() time.Time, elapsed func() time.Duration, skew time.Duration, log *slog.Logger) *clock {
	c := &clock{wall: wall, elapsed: elapsed, tolerance: max(skew, leastTolerance), log: log}
	c.base, c.at = c.together()
	c.mark, c.whose = c.base, "before it was"
	return c
}

// remember takes what the log has.
func (c *clock) remember(newest time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if newest.After(c.mark) {
		c.mark, c.whose = newest, "the newest entry of the audit log is of"
	}
}

// believe reports why the clock is not to be believed; nil = it is.
func (c *clock) believe() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.look()
	switch {
	case err != nil && !c.doubts:
		c.log.Error("nothing is issued, and no step of a rotation is taken, while the clock is not to be believed", "err", err)
	case err == nil && c.doubts:
		c.log.Info("the clock is believed again", "time", stamp(c.base))
	}
	if err != nil && !c.doubts {
		c.doubted = c.elapsed()
	}
	c.doubts = err != nil
	return err
}

// since is when the doubt began, by the clock that is doubted.
func (c *clock) since() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.wall().Add(c.doubted - c.elapsed())
}

// together reads both at one moment: a machine that was suspended between the two readings would seem to have jumped at the
// next look.
func (c *clock) together() (now time.Time, passed time.Duration) {
	for {
		before := c.elapsed()
		now, passed = c.wall().Round(0), c.elapsed()
		if (passed - before).Abs() < c.tolerance {
			return now, passed
		}
	}
}

func (c *clock) look() error {
	now, passed := c.together()
	expected := c.base.Add(passed - c.at)
	c.off = now.Sub(expected)
	if now.Before(c.mark.Add(-c.tolerance)) {
		c.ahead = false
		return fmt.Errorf("%w: it is %s here, and %s %s: set it right (timedatectl set-ntp true)", errClock, stamp(now), c.whose, stamp(c.mark))
	}
	if c.off > c.tolerance {
		if !c.ahead {
			c.ahead, c.jumped = true, passed
		}
		if held := passed - c.jumped; held < jumpHold {
			return fmt.Errorf("%w: it is %s here, and by the time that has passed it should be %s: set it right; in %s it is believed", errClock, stamp(now), stamp(expected), (jumpHold - held).Round(time.Second))
		}
		c.believed, c.believedAt = fmt.Sprintf("the clock jumped from %s to %s", stamp(expected), stamp(now)), passed
		c.log.Warn("the clock jumped ahead, and was not set back: it is believed", "from", stamp(expected), "to", stamp(now))
	}
	c.base, c.at, c.ahead = now, passed, false
	if now.After(c.mark) {
		c.mark, c.whose = now, "before it was"
	}
	return nil
}

// recent names a jump that was believed not long ago; "" = there was none.
func (c *clock) recent() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.believed == "" || c.elapsed()-c.believedAt > jumpShown {
		return ""
	}
	return c.believed
}

// apart is by how much the clock is ahead of the time that has passed, and how far it is behind the latest time believed.
func (c *clock) apart() (ahead, behind time.Duration) {
	_ = c.believe() // logged
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.off, max(c.mark.Sub(c.wall()), 0)
}

// checkClock is what readiness says of it.
func (s *Server) checkClock(context.Context) check.Findings {
	err := s.clock.believe()
	if jump := s.clock.recent(); err == nil && jump != "" {
		return check.Findings{{Code: check.CodeClock, Level: check.Warning, About: "clock", Message: jump + ", and is believed since it was not set back", Mend: "timedatectl status"}}
	}
	return check.State(check.CodeClock, "clock", "the clock agrees with the time that has passed and with the audit log", err, "timedatectl set-ntp true", check.Issuing)
}

// startClock begins to watch the clock, from the newest entry of the log on.
func (s *Server) startClock(ctx context.Context) error {
	s.clock = newClock(s.now, s.config.Elapsed, s.config.Rotation.Skew, s.log)
	newest, err := newestEntry(ctx, LogDir(s.config.Dir), s.audit.VerifierKey())
	if err != nil {
		return fmt.Errorf("read the newest entry of the log, to hold the clock against it: %w", err)
	}
	switch behind := newest.Sub(s.now()); {
	case behind <= s.clock.tolerance:
		s.clock.remember(newest)
	case s.config.ClockIsRight:
		s.log.Warn("the clock is believed although the log has a later entry, since an admin says so", "time", stamp(s.now()), "newest_entry", stamp(newest))
	default:
		return fmt.Errorf("it is %s here, and the newest entry of the audit log is of %s: set the clock right and start again; if the clock is right and was ahead when that entry was made, start once with --clock-is-right", stamp(s.now()), stamp(newest))
	}
	return nil
}

// newestEntry is the time of the log's last entry; zero while it has none.
func newestEntry(ctx context.Context, dir, verifierKey string) (time.Time, error) {
	r, err := audit.OpenReader(dir, verifierKey)
	if err != nil {
		return time.Time{}, err
	}
	defer r.Close()
	cp, err := r.Checkpoint(ctx)
	if err != nil || cp.Size == 0 {
		return time.Time{}, err
	}
	_, last, err := r.Entry(ctx, cp.Size-1)
	if err != nil {
		return time.Time{}, err
	}
	return time.Unix(0, last.GetTime()), nil
}

// issue makes certificates by a clock that is believed.
func (s *Server) issue(ctx context.Context, grants []*identity.Grant) []ca.Result {
	err := s.clock.believe()
	if err == nil {
		return s.authority.Issue(ctx, grants)
	}
	results := make([]ca.Result, len(grants))
	for i := range results {
		results[i].Err = err
	}
	return results
}

// sinceBoot is the time since the machine was started, suspension included.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0 // Linux has it since 2.6.39; a time that stands still would show as a jump that is believed later
	}
	return time.Duration(ts.Nano())
}

// elapsedBy is the time that has passed: the machine's, or, where the time is simulated, the same as that.
func elapsedBy(now func() time.Time) func() time.Duration {
	if now == nil {
		return sinceBoot
	}
	begun := now()
	return func() time.Duration { return now().Sub(begun) }
}

// timeHeader carries the server's time with every answer at the agent door, so that an agent can say both times.
const timeHeader = "signet-time"

// tellTime puts the server's time into the header of an answer.
func (s *Server) tellTime(ctx context.Context) {
	_ = grpc.SetHeader(ctx, metadata.Pairs(timeHeader, strconv.FormatInt(s.now().UnixNano(), 10))) // a stream that has begun to answer has told it
}

// doubt reports whether no step may be taken by itself.
func (k *keeper) doubt() bool { return k.clock != nil && k.clock.believe() != nil }
