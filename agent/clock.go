package agent

import (
	"fmt"
	"strconv"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/check"
)

const (
	// timeHeader carries the server's time with each of its answers.
	timeHeader = "signet-time"
	// allowedSkew is how far two clocks may be apart, the way of an answer included; certificates are backdated by more.
	allowedSkew = time.Minute
)

// told is what the server's clock said, and ours when that came.
type told struct{ server, here time.Time }

// apart is by how much the server is ahead of us.
func (t *told) apart() time.Duration { return t.server.Sub(t.here) }

// hearTime takes the server's time from the header of an answer. It decides nothing: what is served must be good by our own
// clock. The header is the server's word, so it has no more than a number.
func (l *link) hearTime(md metadata.MD) {
	text := md.Get(timeHeader)
	if len(text) != 1 {
		return
	}
	nanos, err := strconv.ParseInt(text[0], 10, 64)
	if err != nil {
		return
	}
	l.time.Store(&told{time.Unix(0, nanos), l.now()})
}

// clocksApart says both times where the server's clock and ours are too far apart; nil = they are not.
func (l *link) clocksApart() error {
	t := l.time.Load()
	if t == nil || t.apart().Abs() <= allowedSkew {
		return nil
	}
	return fmt.Errorf("when it was %s here, the server's clock said %s: one of them is wrong", stamp(t.here), stamp(t.server))
}

func (a *Agent) checkClock() check.Findings {
	return check.State(check.CodeClock, "clock", "the clock agrees with the server's, as far as it was told", a.link.clocksApart(), "timedatectl set-ntp true")
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
