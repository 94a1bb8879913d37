package vault

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
)

// session is one token, from its login to the next.
type session struct {
	// calls and renewals make requests with the token, auth is what the login gave; behind functions as all secrets.
	calls, renewals func() *api.Client
	auth            func() *api.SecretAuth
	renewable       bool
	born            time.Time
	// began is when the token was made, full what a renewal gives until its greatest life bounds it, in seconds; zero where nobody
	// has to know, or can (span).
	began time.Time
	full  int
	// gone is closed when another has taken its place.
	gone chan struct{}
	// until is when the token ends unless it is renewed, zero for never; ends is when it does all the same, zero where none is known.
	// Guarded by Client.mu.
	until, ends time.Time
}

func (c *Client) newSession(auth *api.SecretAuth) *session {
	auth.LeaseDuration = max(0, min(auth.LeaseDuration, int(maxLife/time.Second)))
	calls, renewals := c.as(auth.ClientToken, c.calls), c.as(auth.ClientToken, c.renewals)
	s := &session{
		calls: func() *api.Client { return calls }, renewals: func() *api.Client { return renewals },
		auth: func() *api.SecretAuth { return auth }, renewable: auth.Renewable,
		born: c.now(), gone: make(chan struct{}),
	}
	s.until = endOf(s.born, auth.LeaseDuration)
	return s
}

// span takes in what Vault says of the whole life of a token that somebody has put into a file, by Vault's own clock.
func (s *session) span(of map[string]any) {
	if s.until.IsZero() {
		return
	}
	number := func(name string) int {
		n, _ := of[name].(json.Number)
		i, _ := n.Int64()
		return int(max(0, i))
	}
	s.began = s.born
	if end, err := time.Parse(time.RFC3339Nano, fmt.Sprint(of["expire_time"])); err == nil && number("creation_time") > 0 {
		made := time.Unix(int64(number("creation_time")), 0)
		s.began = s.until.Add(-max(0, min(end.Sub(made), maxLife)))
	}
	made, _ := of["path"].(string)
	switch greatest := time.Duration(min(number("explicit_max_ttl"), int(maxLife/time.Second))) * time.Second; {
	case !s.renewable:
		s.ends = s.until
	// What a login method has given, whoever logged in replaces.
	case !strings.HasPrefix(made, "auth/token/"):
	case greatest > 0:
		s.ends = s.began.Add(greatest)
	case number("period") == 0:
		s.full = number("creation_ttl")
	}
}

// renewed takes in a renewal, of which Vault may say that it is cut short. The caller holds mu.
func (s *session) renewed(now time.Time, seconds int, cut bool) {
	s.until = endOf(now, seconds)
	switch {
	case s.full == 0:
	case cut && seconds < s.full:
		s.ends = s.until
	default:
		s.ends = time.Time{}
	}
}

// endOf a token: a lease of 0 has no end.
func endOf(from time.Time, seconds int) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return from.Add(time.Duration(seconds) * time.Second)
}

// flight is a login that is under way, for all who wait for it.
type flight struct {
	done chan struct{}
	s    *session
	err  error
}

// refusal keeps what Vault has refused from being shown to it again soon.
type refusal struct {
	// err is nil if nothing was refused since the last login; unread is why the secret can't be read now.
	err, unread error
	// since is when this began.
	since time.Time
	// digest is of the secret that was refused, which is not shown again before until; nor is any other before other.
	digest       [sha256.Size]byte
	until, other time.Time
	// wait grows with each refusal of the same secret; row counts the secrets that were refused one after the other, at is when the
	// last was.
	wait time.Duration
	row  int
	at   time.Time
}

// why there is no login; nil if nothing is wrong.
func (r *refusal) why() error { return cmp.Or(r.unread, r.err) }

const (
	// A login method of Vault that locks users counts their refused logins for as long as each comes within lockoutReset of the
	// one before, and at five it lets the user in no more for 15 minutes, whatever is shown. These are its defaults.
	lockoutReset = 15 * time.Minute
	// mostInARow secrets leave two of the five to others. The same secret again is not in a row: its pause is longer than lockoutReset.
	mostInARow = 3
)

// pauses after a refusal: until the same secret is shown again, from the first to the longest, and until any other is once
// mostInARow were refused in a row.
type pauses struct{ first, longest, other time.Duration }

var (
	// An AppRole is locked if its secret-id is refused too often. What is shown again so rarely never counts as a row.
	lockingPauses = pauses{lockoutReset + 5*time.Minute, time.Hour, lockoutReset + 5*time.Minute}
	freePauses    = pauses{time.Second, 10 * time.Second, 5 * time.Second}
	// Vault has let us in, with a token that is of no use: each try makes one more.
	givenPauses = pauses{time.Second, time.Minute, 5 * time.Second}
)

// refuse notes a login that came to nothing though Vault is there. The caller holds mu.
func (c *Client) refuse(e *Error, digest [sha256.Size]byte) {
	r, now := &c.refused, c.now()
	p := freePauses
	// Vault answers 403 for a role that is locked already, and 404 where no method is mounted: neither counts.
	switch {
	case c.login.Method == loginAppRole && e.Status == http.StatusBadRequest:
		p = lockingPauses
	case e.Status == http.StatusOK:
		p = givenPauses
	}
	another := r.err == nil || !same(r.digest, digest)
	if another {
		r.wait = 0
	}
	if now.Sub(r.at) > lockoutReset {
		r.row = 0
	}
	if another || r.row == 0 {
		r.row++
	}
	if r.why() == nil {
		r.since = now
	}
	r.wait = max(p.first, min(2*r.wait, p.longest))
	r.err, r.unread, r.digest, r.at = e, nil, digest, now
	r.until = now.Add(later(r.wait))
	if r.row >= mostInARow {
		r.other = now.Add(later(p.other))
	}
	e.next = r.next(now)
}

// next says when a login is tried again.
func (r *refusal) next(now time.Time) string {
	if now.Before(r.other) {
		return fmt.Sprintf("%d secrets were refused in a row, so this one is tried again at %s, another at %s", r.row, stamp(r.until), stamp(r.other))
	}
	return "this secret is tried again at " + stamp(r.until) + ", another at once"
}

// later is d, and up to a quarter more.
func later(d time.Duration) time.Duration { return d + rand.N(d/4) }

func same(x, y [sha256.Size]byte) bool { return subtle.ConstantTimeCompare(x[:], y[:]) == 1 }

// inVainNow is the refusal that a login would end with again; nil if one may be tried.
func (c *Client) inVainNow(with credential) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refused.unread = nil
	if r, now := &c.refused, c.now(); r.err != nil && (now.Before(r.other) || same(r.digest, with.digest) && now.Before(r.until)) {
		return r.err
	}
	return nil
}

// unreadable notes that there is no secret to show.
func (c *Client) unreadable(err error) error {
	e := &Error{Op: opLogin, Path: c.loginPath(), vault: c.address, cause: err}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refused.why() == nil {
		c.refused.since = c.now()
	}
	c.refused.unread = e
	return e
}

var errClosed = errors.New("the connection is closed")

// session is the one to make calls with; it logs in if there is none.
func (c *Client) session(ctx context.Context) (*session, error) {
	return c.other(ctx, nil)
}

// other is a session other than that one (which may be nil): the one that has taken its place, or of a new login.
func (c *Client) other(ctx context.Context, than *session) (*session, error) {
	c.mu.Lock()
	if s := c.living(); s != nil && s != than {
		c.mu.Unlock()
		return s, nil
	}
	f := c.join()
	c.mu.Unlock()
	return c.await(ctx, f)
}

// living is the current session unless its token has ended. The caller holds mu.
func (c *Client) living() *session {
	if s := c.cur; s != nil && (s.until.IsZero() || c.now().Before(s.until)) {
		return s
	}
	return nil
}

// await gives up with the caller's deadline; the login goes on for the others.
func (c *Client) await(ctx context.Context, f *flight) (*session, error) {
	select {
	case <-f.done:
		return f.s, f.err
	case <-ctx.Done():
		e := &Error{Op: opLogin, Path: "auth/" + c.login.Method, vault: c.address, cause: ctx.Err(), neutral: true}
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			e.away, e.why = true, "the login takes too long"
		}
		return nil, e
	}
}

// join is the login under way, or one that begins now. The caller holds mu.
func (c *Client) join() *flight {
	if c.flight != nil {
		return c.flight
	}
	f := &flight{done: make(chan struct{})}
	if c.closed {
		f.err = errClosed
		close(f.done)
		return f
	}
	c.flight = f
	c.wg.Go(func() { c.fly(f) })
	return f
}

// fly logs in with a time of its own, not that of the caller who happened to be the first.
func (c *Client) fly(f *flight) {
	ctx, cancel := context.WithTimeout(c.root, c.timeout)
	defer cancel()
	began := time.Now()
	s, err, asked := c.tryLogin(ctx)
	if asked {
		c.metrics.observe(opLogin, err, time.Since(began))
	}
	c.mu.Lock()
	if err == nil {
		if c.cur != nil {
			close(c.cur.gone)
		}
		c.cur = s
		c.changed.Ring()
	}
	// Said when it begins, and once more when it turns from a Vault that is away to a login that is refused. The end is said by Run,
	// and who runs none hears of it all by the call's error.
	state := stateOf(err)
	news := state > c.said && c.running.Load() && c.root.Err() == nil
	if news || state == loginWorks {
		c.said = state
	}
	f.s, f.err = s, err
	c.flight = nil
	close(f.done)
	c.mu.Unlock()
	if news {
		c.log.Warn("no login to Vault, trying on", "vault", c.address, "err", err)
	}
}

// What the log has of logins.
const (
	loginWorks = iota
	loginFails
	loginRefused
)

func stateOf(err error) int {
	switch {
	case err == nil:
		return loginWorks
	case errors.Is(err, ErrLogin):
		return loginRefused
	}
	return loginFails
}

// tryLogin is one login, unless it is known to be in vain; asked tells whether Vault was.
func (c *Client) tryLogin(ctx context.Context) (_ *session, err error, asked bool) {
	with, err := c.credential()
	if err != nil {
		return nil, c.unreadable(err), false
	}
	if err := c.inVainNow(with); err != nil {
		return nil, err, false
	}
	s, e := c.enter(ctx, with)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case e == nil:
		c.refused, c.entered = refusal{}, with.digest
	case e.away, ctx.Err() != nil:
		// The breaker sees to that.
	default:
		c.refuse(e, with.digest)
	}
	return s, e.orNil(), true
}

// stillborn is the age up to which a token that is dead tells against the login that gave it.
const stillborn = time.Second

// bury gives a session up whose token Vault does not know any more.
func (c *Client) bury(s *session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cur != s {
		return
	}
	c.cur = nil
	close(s.gone)
	now := c.now()
	age := now.Sub(s.born)
	if age >= stillborn {
		c.stillborn = 0
		return
	}
	// Once may be chance, and costs one login more. After that each is as good as refused.
	if c.stillborn++; c.stillborn == 1 {
		return
	}
	e := &Error{Op: opLogin, Path: c.loginPath(), Status: http.StatusOK, vault: c.address, why: fmt.Sprintf(
		"the tokens that it gives end at once, the last after %s: look for a limit of their uses at the role (token_num_uses), or for whoever revokes them", age.Round(time.Millisecond))}
	wait := min(givenPauses.first<<min(c.stillborn-2, 10), givenPauses.longest)
	c.refused = refusal{err: e, since: now, digest: c.entered, until: now.Add(later(wait))}
	e.next = c.refused.next(now)
}

// young is the age up to which a session's permissions are taken to be those that a new login would give.
const young = time.Minute

const (
	// maxVain is the longest pause between two logins for what is denied again and again: each leaves a token in Vault until
	// its end, and may spend a use of the secret.
	maxVain = time.Hour
	// mostVain bounds the calls that are remembered.
	mostVain = 256
)

// vain is a call that was denied after a new login as well: the next is not before until, unless with another secret.
type vain struct {
	wait  time.Duration
	until time.Time
}

func (r request) key() string { return r.op + " " + r.path }

// inVain notes that a new login did not help.
func (c *Client) inVain(r request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	v, known := c.vain[r.key()]
	switch {
	case known && now.Before(v.until):
		return // others have noted the same login
	case !known && len(c.vain) >= mostVain:
		clear(c.vain)
	}
	if c.vain == nil {
		c.vain = map[string]vain{}
	}
	wait := max(young, min(2*v.wait, maxVain))
	c.vain[r.key()] = vain{wait, now.Add(wait)}
}

// notInVain forgets that a call was denied: the next time a new login may help.
func (c *Client) notInVain(r request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.vain, r.key())
}

// instead is the session to try once more with what Vault has denied; nil if there is none that could do more.
func (c *Client) instead(ctx context.Context, denied *session, r request, said *Error) (*session, error) {
	if s := c.replaced(denied); s != nil {
		return s, nil
	}
	if said.dead() {
		c.bury(denied)
		return c.other(ctx, denied)
	}
	with, cerr := c.credential()
	c.mu.Lock()
	if cerr == nil && !same(with.digest, c.entered) {
		clear(c.vain)
	}
	paused := c.now().Before(c.vain[r.key()].until)
	c.mu.Unlock()
	if paused {
		return nil, nil
	}
	// A path that the policy denies must not cost a login, which is a token kept in Vault, each time.
	_, lerr := c.send(ctx, denied.calls(), request{op: opRead, path: lookupPath})
	if lerr.dead() {
		c.bury(denied)
		return c.other(ctx, denied)
	}
	// Before Vault 1.14 that is how it said so.
	dead := lerr != nil && lerr.denied()
	c.mu.Lock()
	now := c.now()
	// A policy may also deny that the token looks itself up.
	skip := c.cur == denied && (!dead && now.Sub(denied.born) < young || dead && now.Sub(c.forced) < shortLived)
	c.mu.Unlock()
	if skip {
		return nil, nil
	}
	s, err := c.other(ctx, denied)
	if err != nil {
		if !dead {
			// The token works, for other paths.
			c.inVain(r)
			return nil, nil
		}
		return nil, err
	}
	c.mu.Lock()
	c.forced = now
	c.mu.Unlock()
	return s, nil
}

// replaced is the session that has taken another's place, if one has.
func (c *Client) replaced(s *session) *session {
	c.mu.Lock()
	defer c.mu.Unlock()
	if living := c.living(); living != s {
		return living
	}
	return nil
}
