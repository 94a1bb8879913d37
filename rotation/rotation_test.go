package rotation

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-ca/signet/test/bubble"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func serial(n int) []byte { return binary.BigEndian.AppendUint64(nil, uint64(n)) }

func TestRenewalsOfAFleetAreSpreadOverTheWindow(t *testing.T) {
	const fleet = 100_000
	life := 24 * time.Hour
	random := make([]byte, 16)
	for name, serials := range map[string]func(int) []byte{
		"counted": serial,
		"random":  func(int) []byte { _, _ = rand.Read(random); return random },
	} {
		t.Run(name, func(t *testing.T) {
			at := make([]float64, fleet)
			for i := range at {
				at[i] = float64(RenewAt(serials(i), epoch, epoch.Add(life)).Sub(epoch)) / float64(life)
			}
			slices.Sort(at)
			if at[0] < renewFrom || at[fleet-1] >= renewTo {
				t.Fatalf("renewals between %.4f and %.4f of the life, want within [%.1f, %.1f)", at[0], at[fleet-1], renewFrom, renewTo)
			}
			used := (at[fleet*95/100] - at[fleet*5/100]) / (renewTo - renewFrom)
			if used < 0.8 {
				t.Fatalf("the middle 90 %% of renewals use %.0f %% of the window, want 80 %% or more", used*100)
			}
		})
	}
}

func TestARenewalTimeIsNeverDrawnAgain(t *testing.T) {
	a := RenewAt([]byte("serial"), epoch, epoch.Add(time.Hour))
	if b := RenewAt([]byte("serial"), epoch, epoch.Add(time.Hour)); !a.Equal(b) {
		t.Fatalf("two calls give %s and %s", a, b)
	}
	if b := RenewAt([]byte("other"), epoch, epoch.Add(time.Hour)); a.Equal(b) {
		t.Fatal("another serial gives the same time")
	}
}

func TestWhatIsExpiredIsDueAtOnce(t *testing.T) {
	for _, notAfter := range []time.Time{epoch, epoch.Add(-time.Hour)} {
		if at := RenewAt([]byte("s"), epoch, notAfter); !at.Equal(epoch) {
			t.Fatalf("not after %s: renewal at %s, want at once", notAfter, at)
		}
	}
}

// A leaf of ten seconds, of which some are already gone at receipt, must be tried several times before it expires.
func TestAShortLifeHasSeveralTries(t *testing.T) {
	for life := 5 * time.Second; life <= 10*time.Second; life += time.Second {
		for n := range 1000 {
			s, end := serial(n), epoch.Add(life)
			now, tries := RenewAt(s, epoch, end), 0
			for now.Before(end) {
				tries++
				now = now.Add(RetryAfter(s, tries, end.Sub(now)))
			}
			if tries < 3 {
				t.Fatalf("a leaf of %s, serial %d: %d tries before it expires, want 3 or more", life, n, tries)
			}
		}
	}
}

func TestRetriesNeverGiveUpAndKeepTheirBounds(t *testing.T) {
	for _, left := range []time.Duration{-time.Hour, 0, 1, time.Second, 10 * time.Second, time.Hour, 90 * 24 * time.Hour} {
		limit := expiredCap
		if left > 0 {
			limit = min(max(left/capShare, leastCap), mostCap)
		}
		for attempts := range 200 {
			got := RetryAfter([]byte("k"), attempts, left)
			if got <= 0 || got > limit {
				t.Fatalf("attempt %d with %s left: wait %s, want more than 0 and at most %s", attempts, left, got, limit)
			}
			if attempts > 20 && got < limit/2 {
				t.Fatalf("attempt %d with %s left: wait %s, want at least half of the cap %s", attempts, left, got, limit)
			}
		}
	}
	if RetryAfter([]byte("a"), 9, time.Hour) == RetryAfter([]byte("b"), 9, time.Hour) {
		t.Fatal("two keys retry at the same time")
	}
}

func TestTheSchedulerHandsOutWhatIsDueInOrder(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		s := NewScheduler[string](SchedulerConfig{})
		start := time.Now()
		s.Set("late", start.Add(time.Hour))
		s.Set("soon", start.Add(time.Minute))
		s.Set("gone", start.Add(time.Second))
		s.Set("close", start.Add(time.Minute+DefaultWindow/2))
		s.Set("moved", start.Add(time.Second))
		s.Set("moved", start.Add(2*time.Hour))
		s.Remove("gone")
		s.Remove("never there")
		type batch struct {
			at   time.Duration
			keys string
		}
		var got []batch
		ctx, cancel := context.WithCancel(t.Context())
		go s.Run(ctx, func(keys []string) {
			b := batch{at: time.Since(start)}
			for _, k := range keys {
				b.keys += k + " "
			}
			got = append(got, b)
		})
		time.Sleep(30 * time.Second)
		s.Set("new", start.Add(40*time.Second))
		time.Sleep(3 * time.Hour)
		cancel()
		synctest.Wait()
		want := []batch{{40 * time.Second, "new "}, {time.Minute, "soon close "}, {time.Hour, "late "}, {2 * time.Hour, "moved "}}
		if !slices.Equal(got, want) {
			t.Fatalf("got %v, want %v", got, want)
		}
		if s.Len() != 0 {
			t.Fatalf("%d keys are left", s.Len())
		}
	})
}

func TestAKeySetWhileItIsHandedOutComesAgain(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		s := NewScheduler[int](SchedulerConfig{})
		s.Set(0, time.Now())
		n := 0
		ctx, cancel := context.WithCancel(t.Context())
		go s.Run(ctx, func(keys []int) {
			n++
			s.Set(0, time.Now().Add(time.Second))
		})
		time.Sleep(100*time.Second + time.Millisecond)
		cancel()
		synctest.Wait()
		if n != 101 {
			t.Fatalf("handed out %d times in 100 s, want 101", n)
		}
	})
}

// A timer stands still while the machine sleeps, and a set clock is not its business; the wall clock is what expires certificates.
func TestAClockThatJumpsIsNoticedSoon(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		var jump atomic.Int64
		now := func() time.Time { return time.Now().Add(time.Duration(jump.Load())) }
		s := NewScheduler[string](SchedulerConfig{Now: now})
		start := time.Now()
		s.Set("renew", now().Add(12*time.Hour))
		due := make(chan time.Duration, 1)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go s.Run(ctx, func([]string) { due <- time.Since(start) })
		time.Sleep(time.Minute)
		jump.Store(int64(24 * time.Hour))
		select {
		case at := <-due:
			if at > time.Minute+DefaultRecheck {
				t.Fatalf("noticed after %s, want within %s of the jump", at, DefaultRecheck)
			}
		case <-time.After(time.Hour):
			t.Fatal("a day's jump of the clock was not noticed within an hour")
		}
		cancel()
		synctest.Wait()
	})
}

// The whole of a leaf's life over a year, with an issuer that is away at random for up to half of a leaf's life
// minus what retries need: never is an expired certificate in use.
func TestAYearOfRenewalsNeverMeetsAnExpiry(t *testing.T) {
	const life, identities = 24 * time.Hour, 4
	bubble.Test(t, func(t *testing.T) {
		type leaf struct {
			serial   []byte
			notAfter time.Time
			attempts int
		}
		var state [identities]leaf
		s := NewScheduler[int](SchedulerConfig{Recheck: time.Hour})
		start, issued := time.Now(), 0
		away := func(at time.Time) bool { // 9 of every 40 hours
			return int(at.Sub(start).Hours())%40 >= 31
		}
		for i := range state {
			state[i] = leaf{serial: serial(i), notAfter: start.Add(life)}
			s.Set(i, RenewAt(state[i].serial, start, state[i].notAfter))
		}
		ctx, cancel := context.WithTimeout(t.Context(), 365*24*time.Hour)
		defer cancel()
		s.Run(ctx, func(keys []int) {
			now := time.Now()
			for _, k := range keys {
				l := &state[k]
				if !now.Before(l.notAfter) {
					t.Fatalf("identity %d expired at %s and is tried at %s", k, l.notAfter, now)
				}
				if away(now) {
					l.attempts++
					s.Set(k, now.Add(RetryAfter(l.serial, l.attempts, l.notAfter.Sub(now))))
					continue
				}
				issued++
				*l = leaf{serial: serial(identities + issued), notAfter: now.Add(life)}
				s.Set(k, RenewAt(l.serial, now, l.notAfter))
			}
		})
		if perDay := float64(issued) / identities / 365; perDay < 1.5 || perDay > 2.5 {
			t.Fatalf("%.2f renewals a day and identity, want about 2", perDay)
		}
	})
}
