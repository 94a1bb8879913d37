package vault

import (
	"context"
	"errors"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/hashicorp/vault/api"
)

// session is one token, from its login to the next.
type session struct {
	// calls and renewals make requests with the token, auth is what the login gave; behind functions as all secrets.
	calls, renewals func() *api.Client
	auth            func() *api.SecretAuth
	renewable       bool
	born            time.Time
	// gone is closed when another has taken its place.
	gone chan struct{}
	// until is when the token ends unless it is renewed, zero for never. Guarded by Client.mu.
	until time.Time
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

// refusal keeps a login that Vault has refused from being tried at once again, unless with another secret.
type refusal struct {
	err    error
	digest [32]byte
	until  time.Time
	wait   *backoff.ExponentialBackOff
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
	defer c.mu.Unlock()
	if err == nil {
		if c.cur != nil {
			close(c.cur.gone)
		}
		c.cur = s
		c.changed.Ring()
	}
	f.s, f.err = s, err
	c.flight = nil
	close(f.done)
}

// tryLogin is one login, unless it is known to be in vain; asked tells whether Vault was.
func (c *Client) tryLogin(ctx context.Context) (_ *session, err error, asked bool) {
	with, err := c.credential()
	if err != nil {
		c.mu.Lock()
		c.refused.err, c.refused.digest = err, [32]byte{}
		c.mu.Unlock()
		return nil, err, false
	}
	c.mu.Lock()
	known := c.refused
	c.mu.Unlock()
	if known.err != nil && known.digest == with.digest && c.now().Before(known.until) {
		return nil, known.err, false
	}
	s, err := c.enter(ctx, with)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil:
		c.refused, c.entered = refusal{}, with.digest
	case errors.Is(err, ErrAway), ctx.Err() != nil:
		// The breaker sees to that.
	default:
		wait := c.refused.wait
		if wait == nil {
			wait = &backoff.ExponentialBackOff{InitialInterval: time.Second, RandomizationFactor: 0.25, Multiplier: 2, MaxInterval: 24 * time.Second}
			wait.Reset()
		}
		c.refused = refusal{err: err, digest: with.digest, until: c.now().Add(wait.NextBackOff()), wait: wait}
	}
	return s, err, true
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
func (c *Client) instead(ctx context.Context, denied *session, r request) (*session, error) {
	if s := c.replaced(denied); s != nil {
		return s, nil
	}
	with, cerr := c.credential()
	c.mu.Lock()
	if cerr == nil && with.digest != c.entered {
		clear(c.vain)
	}
	paused := c.now().Before(c.vain[r.key()].until)
	c.mu.Unlock()
	if paused {
		return nil, nil
	}
	// A path that the policy denies must not cost a login, which is a token kept in Vault, each time.
	_, lerr := c.send(ctx, denied.calls(), request{op: opRead, path: lookupPath})
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
