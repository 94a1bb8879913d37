package agent

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
)

// lines counts what the log has of a level that a person is to read.
func (l *logBuffer) lines(level string) (found []string) {
	for line := range strings.Lines(l.String()) {
		if strings.Contains(line, " level="+level+" ") {
			found = append(found, line)
		}
	}
	return found
}

// nodeOf is a hub with many workloads that all want their certificates.
func nodeOf(t *testing.T, w *world, n int, ttl time.Duration) (*doorless, *logBuffer, *view) {
	var list []identity.Registration
	for i := range n {
		list = append(list, reg(fmt.Sprintf("r%d", i), fmt.Sprintf("/r%d", i), ttl, uid))
	}
	d := newDoorless(t, w, list...)
	log, buffer := newTestLog(t)
	d.hub.log = log
	return d, buffer, d.mustOpen(t, uid)
}

// look wants all certificates, and says how many there are.
func look(v *view) (served int) {
	for _, id := range v.Identities() {
		if v.SVID(id) != nil {
			served++
		}
	}
	return served
}

func TestAnOutageCostsFewCallsAndFewLines(t *testing.T) {
	const workloads, outage = 1000, 10 * time.Minute
	away := func(d *doorless, away bool) { d.away.Store(away) }
	signsNothing := func(d *doorless, away bool) {
		d.world.change(func() {
			if d.world.refuse = nil; away {
				d.world.refuse = func(*signetv1.IssueItem) *signetv1.Refusal {
					return &signetv1.Refusal{Reason: signetv1.Refusal_REASON_UNAVAILABLE, Message: "away"}
				}
			}
		})
	}
	for name, c := range map[string]struct {
		set func(*doorless, bool)
		ttl time.Duration
		// calls are the most that may be made; late is how long after the outage all are served again.
		calls int64
		late  time.Duration
	}{
		// A minute of leaves that are about to end, then one call in 2.5 s to 5 s.
		"the server is away, and all runs out": {away, time.Minute, 360, 6 * time.Second},
		// Of the leaves that end within the outage none has less than 16 s left.
		"the server signs nothing":          {signsNothing, 20 * time.Minute, 100, 6 * time.Second},
		"the server is away, and none does": {away, time.Hour, 30, time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
				d, log, v := nodeOf(t, w, workloads, c.ttl)
				start(d)
				look(v)
				time.Sleep(c.ttl / 3)
				if n := look(v); n != workloads {
					t.Fatalf("%d of %d are served before the outage", n, workloads)
				}
				c.set(d, true)
				before := d.calls.Load()
				time.Sleep(outage)
				calls := d.calls.Load() - before
				c.set(d, false)
				warned, failed := log.lines("WARN"), log.lines("ERROR")
				if calls < 5 || calls > c.calls {
					t.Errorf("%d calls in %s, want at most %d", calls, outage, c.calls)
				}
				if n := len(warned); n < 2 || n > 1+int(outage/sayEvery) {
					t.Errorf("%d warnings in %s:\n%s", n, outage, strings.Join(warned, ""))
				}
				if n, all := len(failed), c.ttl < outage; n > int(outage/sayEvery) || all != (n > 0) {
					t.Errorf("%d errors in %s:\n%s", n, outage, strings.Join(failed, ""))
				}
				time.Sleep(c.late)
				if n, l := look(v), d.life(); n != workloads || l.overdue > 0 {
					t.Errorf("%d of %d are served %s after the server is back, and %d overdue", n, workloads, c.late, l.overdue)
				}
				if n := len(log.lines("WARN")); n != len(warned) {
					t.Errorf("%d warnings more when it is over", n-len(warned))
				}
				if n := strings.Count(log.String(), "no longer waited for"); n != 1 {
					t.Errorf("the end is said %d times", n)
				}
			})
		})
	}
}

func TestAnOutageSaysHowManyWaitAndUntilWhenItDoesNoHarm(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d, log, v := nodeOf(t, w, 3, time.Hour)
		start(d)
		look(v)
		time.Sleep(time.Second)
		var ends time.Time
		d.hub.mu.Lock()
		for _, e := range d.entries {
			ends = e.current.svid.NotAfter
		}
		d.hub.mu.Unlock()
		d.away.Store(true)
		time.Sleep(50 * time.Minute)
		w.change(func() {
			w.refuse = func(*signetv1.IssueItem) *signetv1.Refusal {
				return &signetv1.Refusal{Reason: signetv1.Refusal_REASON_UNAVAILABLE, Message: "away"}
			}
		})
		warned := log.lines("WARN")
		last := warned[len(warned)-1]
		for _, want := range []string{"waiting=3", `registrations="r0 r1 r2"`, "without=0", "first_end=" + utc(ends), errAway.Error()} {
			if !strings.Contains(last, want) {
				t.Errorf("%q lacks %q", last, want)
			}
		}
		// Another cause is said at once.
		d.away.Store(false)
		before := len(warned)
		time.Sleep(40 * time.Second)
		if warned = log.lines("WARN"); len(warned) != before+1 || !strings.Contains(warned[before], "put off") {
			t.Errorf("of another cause the log has %q", warned[before:])
		}
		time.Sleep(20 * time.Minute)
		warned = log.lines("WARN")
		if last = warned[len(warned)-1]; !strings.Contains(last, "without=3") || strings.Contains(last, "first_end") {
			t.Errorf("when all have run out: %q", last)
		}
		w.change(func() { w.refuse = nil })
		time.Sleep(time.Minute)
		if n := look(v); n != 3 {
			t.Errorf("%d are served", n)
		}
	})
}

// Two causes in turn are as quiet as one.
func TestCausesThatAlternateAreNotSaidEachTime(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d, log, v := nodeOf(t, w, 10, time.Minute)
		n := 0
		w.refuse = func(*signetv1.IssueItem) *signetv1.Refusal {
			n++
			return &signetv1.Refusal{Reason: signetv1.Refusal_REASON_UNAVAILABLE, Message: fmt.Sprint("reason ", n/10%2)}
		}
		start(d)
		look(v)
		time.Sleep(10 * time.Minute)
		if n := len(log.lines("WARN")); n < 4 || n > 22 {
			t.Errorf("%d lines in ten minutes", n)
		}
	})
}

// What the server says about one workload is that one's business.
func TestARefusalOfOneHoldsUpNoOther(t *testing.T) {
	for _, reason := range []signetv1.Refusal_Reason{signetv1.Refusal_REASON_DENIED, signetv1.Refusal_REASON_UNAVAILABLE} {
		t.Run(reason.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
				d, _, v := nodeOf(t, w, 20, time.Minute)
				w.refuse = func(i *signetv1.IssueItem) *signetv1.Refusal {
					if i.Registration == "r7" {
						return &signetv1.Refusal{Reason: reason, Message: "no"}
					}
					return nil
				}
				start(d)
				look(v)
				for range 600 {
					time.Sleep(time.Second)
					if n := look(v); n != 19 {
						t.Fatalf("%d of 19 are served", n)
					}
					// Never later than a sixteenth of what was left, so at a good half of the life.
					if left := d.life().earliest.svid.NotAfter.Sub(w.now()); left < 15*time.Second {
						t.Fatalf("one has %s left", left)
					}
				}
				// Nor does anybody wait who has just come.
				d.know(append(d.registrations, reg("late", "/late", time.Minute, "unix:uid:7"))...)
				late := d.mustOpen(t, "unix:uid:7")
				began := time.Now()
				await(t, late)
				if waited := time.Since(began); waited > 100*time.Millisecond {
					t.Errorf("who has just come waited %s", waited)
				}
			})
		})
	}
}

// A call that is refused for what one of its items does to the server is not repeated as it was.
func TestAnItemThatSpoilsItsCallIsSoonAlone(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d, _, v := nodeOf(t, w, 20, time.Hour)
		spoils := &spoiled{doorless: d, name: "r7"}
		d.issuer = spoils
		start(d)
		look(v)
		time.Sleep(time.Minute)
		if n := look(v); n != 19 {
			t.Errorf("%d of 19 are served", n)
		}
	})
}

// spoiled fails every call in which a certain registration is asked for.
type spoiled struct {
	*doorless
	name string
}

func (s *spoiled) issue(ctx context.Context, items []*signetv1.IssueItem) ([]*signetv1.IssueResult, error) {
	for _, i := range items {
		if i.Registration == s.name {
			return nil, status.Error(codes.Internal, "internal error")
		}
	}
	return s.doorless.issue(ctx, items)
}
