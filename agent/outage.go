package agent

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/rotation"
)

// sayEvery spaces what the log hears of one cause while it lasts.
const sayEvery = time.Minute

// pause is how long nothing is asked for since calls fail as a whole: the server is away, or signs nothing now. When it is
// over one call goes first, and the others follow as soon as one is answered. Guarded by hub.mu.
type pause struct {
	// attempts are the calls in a row that failed, but for those that were under way together, which are one; 0 = no pause.
	attempts int
	until    time.Time
	err      error
	// deaf: nothing was answered, so the reason can't lie with what was asked for.
	deaf bool
	// probing: the one call is under way. Until is then when it is not waited for any longer.
	probing bool
}

// aboutAll reports whether an error of a call is about the server or this agent, and so about every other call. Any other may
// come from one of the items, and who was with it in a call must not be so again.
func aboutAll(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Canceled, codes.PermissionDenied, codes.Unauthenticated:
		return true
	}
	return false
}

// admit says for which of those that are due the server is asked now. The others wait for the end of the pause, except who
// has just come while the server answers: what it said of others may not hold for him. Called with mu held.
func (h *hub) admit(names []string, now time.Time) []string {
	p := &h.pause
	if p.attempts == 0 || len(names) == 0 {
		return names
	}
	if now.Before(p.until) {
		return slices.DeleteFunc(names, func(name string) bool {
			e := h.entries[name]
			if !p.deaf && e.attempts == 0 && e.current == nil {
				return false
			}
			// One that has less time left does not wait for as long as those before it.
			if at := now.Add(h.pace(e, now)); !p.probing && at.Before(p.until) {
				p.until = at
			}
			h.park(name, e)
			return true
		})
	}
	// Not always the same ones, in case it lies with one of them.
	slices.SortStableFunc(names, func(a, b string) int { return cmp.Compare(h.entries[a].attempts, h.entries[b].attempts) })
	n := min(len(names), maxBatch)
	p.until, p.probing = now.Add(2*maxCall), true
	for _, name := range names[n:] {
		h.park(name, h.entries[name])
	}
	return names[:n]
}

// park has an entry wait for the end of the pause. Called with mu held.
func (h *hub) park(name string, e *entry) {
	e.parked, e.inFlight = true, false
	e.lastError = clip(h.pause.err.Error(), 512)
	h.waits(name, e, h.pause.err)
	h.plan(name, e, h.pause.until)
}

// pace is how long after a failed call the next may be made for this entry's sake. Called with mu held.
func (h *hub) pace(e *entry, now time.Time) time.Duration {
	left := time.Duration(0)
	if e.current != nil {
		left = max(e.current.svid.NotAfter.Sub(now), 0)
	}
	return rotation.RetryAfter([]byte(h.agent), h.pause.attempts, left)
}

// stands reports whether a pause has begun since these were handed out; then they wait for its end.
func (h *hub) stands(jobs []*job) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if jobs[0].pause >= h.pause.attempts {
		return false
	}
	h.parkJobs(jobs)
	return true
}

// parkJobs is park for those that are still wanted. Called with mu held.
func (h *hub) parkJobs(jobs []*job) {
	for _, j := range jobs {
		if h.entries[j.name] == j.entry {
			h.park(j.name, j.entry)
		}
	}
}

// failedAll puts a whole call off, and every other with it.
func (h *hub) failedAll(jobs []*job, err error, deaf bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p, now, hurried := &h.pause, h.now(), false
	for _, j := range jobs {
		h.metrics.renewals.WithLabelValues(resultFailed).Inc()
		if e := j.entry; h.entries[j.name] == e {
			e.attempts++
			e.parked, e.inFlight = true, false
			hurried = hurried || e.hurried
		}
	}
	if jobs[0].pause >= p.attempts { // else the one that it was under way with has been counted
		p.attempts++
		p.err, p.deaf, p.probing = err, deaf, false
		wait := time.Duration(-1)
		for _, e := range h.entries {
			if at := h.pace(e, now); e.parked && (wait < 0 || at < wait) {
				wait = at
			}
		}
		if hurried || wait < 0 {
			wait = rotation.RetryAfter([]byte(h.agent), 1, 0)
		}
		p.until = now.Add(notBefore(err, wait))
		for name, e := range h.entries {
			if e.parked {
				h.park(name, e)
			}
		}
	} else {
		h.parkJobs(jobs)
	}
	h.say(p.err, p.until.Sub(now))
}

// answered ends the pause: whoever waited for it goes now.
func (h *hub) answered() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pause.attempts == 0 {
		return
	}
	h.pause = pause{}
	for name, e := range h.entries {
		if e.parked {
			e.parked = false
			h.plan(name, e, h.now().Add(gather))
		}
	}
}

// trouble is one reason for which certificates can't be had. Guarded by hub.mu.
type trouble struct {
	since time.Time
	// waiting are the entries that it has failed last, by registration.
	waiting map[string]*entry
	// tries have failed since it began, unsaid of them since the log has heard of it, which was at said; open: it has heard
	// of the beginning, and not of the end.
	tries, unsaid int
	said          time.Time
	open          bool
}

// reasonOf puts errors of one kind together, however each is worded.
func reasonOf(err error) string {
	if r := (refused{}); errors.As(err, &r) {
		return r.Error()
	}
	if st, ok := status.FromError(err); ok {
		return st.Code().String()
	}
	return "not usable"
}

// recently reports whether something was said so lately that it is not said again. A clock that was set back does not count.
func recently(said, now time.Time) bool {
	ago := now.Sub(said)
	return !said.IsZero() && ago >= 0 && ago < sayEvery
}

// waits notes why there is no new certificate. Called with mu held.
func (h *hub) waits(name string, e *entry, err error) {
	reason, now := reasonOf(err), h.now()
	t := h.troubles[reason]
	if t == nil {
		maps.DeleteFunc(h.troubles, func(_ string, t *trouble) bool { return len(t.waiting) == 0 && !recently(t.said, now) })
		t = &trouble{waiting: map[string]*entry{}}
		h.troubles[reason] = t
	}
	if !t.open && len(t.waiting) == 0 {
		t.since, t.tries = now, 0
	}
	if before := e.trouble; before != nil && before != t {
		delete(before.waiting, name) // another reason is no end of waiting
		before.open = before.open && len(before.waiting) > 0
	}
	e.trouble, t.waiting[name] = t, e
}

// waitsNoMore is the opposite of waits: there is a certificate, or nobody wants it. Called with mu held.
func (h *hub) waitsNoMore(name string, e *entry) {
	t := e.trouble
	if t == nil {
		return
	}
	e.trouble = nil
	delete(t.waiting, name)
	if len(t.waiting) > 0 || !t.open {
		return
	}
	for reason, same := range h.troubles {
		if same == t {
			h.log.Info("certificates that could not be had are no longer waited for", "reason", reason, "lasted", h.now().Sub(t.since).Round(time.Second).String(), "tries", t.tries)
		}
	}
	t.unsaid, t.open = 0, false
}

// say counts a call that failed, or a request in it, and tells the log when it is time to: of each reason at once, then each
// minute for as long as it lasts. Called with mu held.
func (h *hub) say(err error, in time.Duration) {
	t, now := h.troubles[reasonOf(err)], h.now()
	if t == nil {
		return // whoever it was is gone
	}
	t.tries++
	t.unsaid++
	if recently(t.said, now) {
		return
	}
	// Those whose call is under way wait as well.
	waiting := maps.Clone(t.waiting)
	for name, e := range h.entries {
		if e.inFlight && h.pause.attempts > 0 {
			waiting[name] = e
		}
	}
	var first time.Time
	expired := 0
	for _, e := range waiting {
		switch {
		case !e.current.good(now):
			expired++
		case first.IsZero() || e.current.svid.NotAfter.Before(first):
			first = e.current.svid.NotAfter
		}
	}
	what := []any{
		"waiting", len(waiting), "registrations", clip(strings.Join(slices.Sorted(maps.Keys(waiting)), " "), 512),
		"without", expired, "tries", t.unsaid, "since", utc(t.since), "in", in.Round(time.Millisecond).String(),
	}
	if !first.IsZero() {
		what = append(what, "first_end", utc(first))
	}
	h.log.Warn("could not get certificates; trying again", append(what, "err", clip(err.Error(), 512))...)
	t.said, t.unsaid, t.open = now, 0, true
}

// sayExpired tells the log of certificates that have run out, at most once a minute. Called with mu held.
func (h *hub) sayExpired(expired []*entry) {
	now := h.now()
	h.unsaidExpired += len(expired)
	if len(expired) == 0 || recently(h.saidExpired, now) {
		return
	}
	first := slices.MinFunc(expired, func(a, b *entry) int { return a.current.svid.NotAfter.Compare(b.current.svid.NotAfter) })
	names := make([]string, len(expired))
	for i, e := range expired {
		names[i] = e.registration.Name
	}
	slices.Sort(names)
	h.log.Error("certificates have expired before they could be renewed and are withheld", "count", h.unsaidExpired, "registrations", clip(strings.Join(names, " "), 512),
		"spiffe_id", first.registration.ID.String(), "serial", first.current.svid.Serial, "not_after", utc(first.current.svid.NotAfter))
	h.saidExpired, h.unsaidExpired = now, 0
}

// putOffByServer reports whether the server's no to one request is about itself.
func putOffByServer(err error) bool {
	r := refused{}
	return errors.As(err, &r) && r.refusal.GetReason() == signetv1.Refusal_REASON_UNAVAILABLE
}
