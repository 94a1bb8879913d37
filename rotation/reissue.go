package rotation

import "time"

// reissueDraw keeps the times of ReissueAt apart from those of RenewAt, which is drawn from the same serial.
const reissueDraw = 1 << 63

// ReissueWindow says how long it takes to replace so many leaves at a bounded rate, in certificates per second. Zero or
// less: at once.
func ReissueWindow(identities int, perSecond float64) time.Duration {
	if identities <= 0 || perSecond <= 0 {
		return 0
	}
	return time.Duration(float64(identities) / perSecond * float64(time.Second))
}

// reissueBeat is what the times of ReissueAt are whole multiples of. An agent asks for what falls between two beats in one
// call; and as all agents hear the order at the same moment, the server writes one batch of its log for what would be a
// hundred. A certificate for itself costs many times what its share of a batch does.
const reissueBeat = 250 * time.Millisecond

// ReissueAt says when a leaf is replaced whose issuer is tainted: evenly within the window that begins at from, on a beat, a
// pure function of its serial, so that agents which are given the same window don't bunch. One that is started again, or comes back
// later, is given a window that begins then.
func ReissueAt(serial []byte, from time.Time, window time.Duration) time.Time {
	return from.Add(time.Duration(fraction(serial, reissueDraw) * float64(max(window, 0))).Truncate(reissueBeat))
}
