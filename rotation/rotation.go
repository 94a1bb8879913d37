// Package rotation decides when: renewal times as pure functions, and a scheduler that wakes whoever is due.
// Every time is injected or simulated; simulated years run in milliseconds.
//
// What is to be done at that time, and whether it worked, is the business of whoever asked.
package rotation

import (
	"crypto/sha256"
	"encoding/binary"
	"time"
)

// Renewals fall between these fractions of the life that was left at receipt. The middle leaves as much time to repair
// an outage as it leaves to use a certificate; the width spreads a fleet that started at once.
const (
	renewFrom = 0.4
	renewTo   = 0.6
)

// RenewAt says when a certificate is to be renewed: a pure function of its serial and of the life left when it was
// received, in a window of 0.4 to 0.6 of that life. It is never drawn again, so a restart neither bunches renewals nor
// puts them off. What is already expired is due at once.
func RenewAt(serial []byte, received, notAfter time.Time) time.Time {
	left := notAfter.Sub(received)
	if left <= 0 {
		return received
	}
	f := renewFrom + (renewTo-renewFrom)*fraction(serial, 0)
	return received.Add(time.Duration(f * float64(left)))
}

// LeastLeft is how much of a life is left at the latest time that RenewAt gives: so long the issuer may be away from any
// moment on before the first certificate of this life runs out.
func LeastLeft(life time.Duration) time.Duration {
	return time.Duration((1 - renewTo) * float64(life))
}

// Retry intervals begin with firstRetry and double up to a cap that depends on the life that is left.
const (
	firstRetry = 250 * time.Millisecond
	// leastCap bounds how hard a server is pressed by what is about to expire.
	leastCap = time.Second
	// mostCap bounds how long after the end of an outage a renewal may come.
	mostCap = time.Minute
	// expiredCap is for what has no good certificate (any more): somebody is waiting.
	expiredCap = 5 * time.Second
	// capShare of the life that is left: about so many tries happen in each e-fold of it.
	capShare = 16
)

// RetryAfter says how long to wait after the given number of failed attempts in a row (1 or more), when the certificate
// in use still has left to live (zero or less: there is none). It never says "give up". The wait is between half and all
// of a doubling interval, which is capped at a sixteenth of what is left, within 1 s and 1 min, and at 5 s where
// nothing is left; the jitter is a pure function of key and attempt.
func RetryAfter(key []byte, attempts int, left time.Duration) time.Duration {
	limit := expiredCap
	if left > 0 {
		limit = min(max(left/capShare, leastCap), mostCap)
	}
	wait := limit
	// 2^16 × firstRetry is beyond every cap.
	if n := max(attempts-1, 0); n < 16 {
		wait = min(firstRetry<<n, limit)
	}
	return wait/2 + time.Duration(fraction(key, uint64(attempts))*float64(wait/2))
}

// fraction maps a key and a number to [0,1), evenly.
func fraction(key []byte, n uint64) float64 {
	h := sha256.New()
	h.Write(key)
	var suffix [8]byte
	binary.BigEndian.PutUint64(suffix[:], n)
	h.Write(suffix[:])
	v := binary.BigEndian.Uint64(h.Sum(nil))
	const mantissa = 53
	return float64(v>>(64-mantissa)) / (1 << mantissa)
}
