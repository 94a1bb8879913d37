package vault

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/hashicorp/vault/api"

	"github.com/signet-ca/signet/internal/bell"
)

const (
	// pulse is how often Run looks whether Vault is there, so that its absence shows before it is needed.
	pulse = 10 * time.Second
	// shortLived is what a session must live longer than for the next login to follow at once.
	shortLived = 5 * time.Second
	// replacing is how long a file may be unreadable while it is being replaced.
	replacing = 5 * time.Second
	// renewGap is the least time between a renewal that failed and the next.
	renewGap = 10 * time.Second
)

// Run keeps the token alive, logs in again when it ends, and watches whether Vault is there, until ctx ends or Close; then
// it returns nil. Calls work without it, but each session's end then costs the call that meets it a login.
func (c *Client) Run(ctx context.Context) error {
	if !c.running.CompareAndSwap(false, true) {
		return errors.New("the connection to Vault is kept by another Run: call it once")
	}
	defer c.running.Store(false)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.root, cancel)()
	c.mu.Lock()
	c.run = ctx
	c.mu.Unlock()
	var g sync.WaitGroup
	g.Go(func() { c.watch(ctx) })
	c.keep(ctx)
	g.Wait()
	return nil
}

const (
	// maxLoginWait is the most between two tries to log in that nobody waits for.
	maxLoginWait = 30 * time.Second
	// secretPulse is how often the file of a secret that was refused is looked at for another one.
	secretPulse = 2 * time.Second
)

// keep tends one session after the other.
func (c *Client) keep(ctx context.Context) {
	wait := &backoff.ExponentialBackOff{InitialInterval: time.Second, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: maxLoginWait}
	wait.Reset()
	// spent is the session whose renewal is at its end, though its token may still live.
	var spent *session
	for ctx.Err() == nil {
		changed := c.changed.Next()
		s, err := c.other(ctx, spent)
		if err != nil {
			d := jitter(secretPulse)
			if !errors.Is(err, ErrLogin) {
				d = wait.NextBackOff()
			}
			bell.Wait(ctx, d, changed) // somebody else may log in
			continue
		}
		began := c.now()
		c.log.Info("logged in to Vault", "vault", c.address, "method", c.login.Method, "until", c.endOf(s))
		if !c.tend(ctx, s) {
			continue
		}
		spent = s
		if c.now().Sub(began) < shortLived {
			// A token that is at its end already when we get it, or can't be renewed: no login after the other.
			bell.Wait(ctx, wait.NextBackOff(), c.changed.Next())
		} else {
			wait.Reset()
		}
	}
}

func (c *Client) endOf(s *session) any {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.until.IsZero() {
		return "it is revoked"
	}
	return s.until
}

// tend renews a session's token. It returns true when that is at its end, and a new login due; false when there is another
// session or ctx has ended.
func (c *Client) tend(ctx context.Context, s *session) bool {
	auth := s.auth()
	if auth.LeaseDuration == 0 {
		// A token without end: the watcher would take it for one that has ended.
		select {
		case <-ctx.Done():
		case <-s.gone:
		}
		return false
	}
	w, err := s.renewals().NewLifetimeWatcher(&api.LifetimeWatcherInput{
		Secret: &api.Secret{Auth: auth}, RenewBehavior: api.RenewBehaviorIgnoreErrors,
	})
	if err != nil {
		c.log.Error("the token can't be renewed", "err", err)
		return true
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.Start()
	}()
	// It is gone before the next begins; a renewal under way ends with Run, or within the timeout of a call.
	defer func() {
		w.Stop()
		<-ended
	}()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-s.gone:
			return false
		case r := <-w.RenewCh():
			c.renewed(s, r)
		case <-ended:
			select {
			case r := <-w.RenewCh():
				c.renewed(s, r)
			default:
			}
			return true
		}
	}
}

func (c *Client) renewed(s *session, r *api.RenewOutput) {
	seconds := max(0, min(r.Secret.Auth.LeaseDuration, int(maxLife/time.Second)))
	c.mu.Lock()
	defer c.mu.Unlock()
	if seconds > 0 {
		s.renewed(c.now(), seconds, len(r.Secret.Warnings) > 0)
	}
}

// renewals carries what the watcher sends: not too often, past the breaker, and counted.
type renewals struct{ c *Client }

func (r renewals) RoundTrip(q *http.Request) (*http.Response, error) {
	c := r.c
	c.mu.Lock()
	run, pause := c.run, time.Until(c.renewAfter)
	c.mu.Unlock()
	ctx, cancel := context.WithCancel(q.Context())
	defer cancel()
	defer context.AfterFunc(run, cancel)()
	// After some failures the watcher of api v1.23.0 tries without any pause: its backoff ends in 0, which it takes for a
	// time to wait (hashicorp/vault#26382 by another way).
	if err := sleep(ctx, pause); err != nil {
		return nil, err
	}
	resp, err := r.once(q.WithContext(ctx))
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.renewAfter = time.Now().Add(jitter(renewGap)); err == nil && resp.StatusCode < 300 {
		c.renewAfter = time.Time{}
	}
	return resp, err
}

func (r renewals) once(q *http.Request) (*http.Response, error) {
	c := r.c
	done, err := c.breaker.allow()
	if err != nil {
		c.metrics.observe(opRenew, ErrAway, 0)
		return nil, err
	}
	ctx := q.Context()
	began := time.Now()
	if c.login.Method == loginCert {
		// Vault holds the certificate of the connection against the role at each renewal, too: an open one may show one that has ended.
		q = q.WithContext(context.WithValue(ctx, freshKey{}, true))
	}
	resp, err := c.wire.RoundTrip(q)
	e := &Error{Op: opRenew, Path: strings.TrimPrefix(q.URL.Path, "/v1/"), vault: c.address}
	switch {
	case err != nil:
		e = c.unanswered(ctx, e, err, time.Since(began), c.secrets(q.Header.Get(api.AuthHeaderName)))
	case resp.StatusCode >= 300:
		e.Status = resp.StatusCode
		e.away = resp.StatusCode >= 500 || resp.StatusCode < 400 || resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusPreconditionFailed
		if wait := retryAfter(resp.Header.Get("Retry-After"), c.now()); e.away && wait > 0 {
			c.breaker.hold(wait)
		}
		if resp.StatusCode == http.StatusForbidden {
			c.log.Warn("Vault denies the renewal of our token: it is revoked, or its policy lacks auth/token/renew-self", "vault", c.address)
		}
	default:
		e = nil
	}
	done(e.outcome(request{op: opRenew}))
	c.metrics.observe(opRenew, e.orNil(), time.Since(began))
	return resp, err
}

// watch looks after Vault when nobody calls it.
func (c *Client) watch(ctx context.Context) {
	for {
		h := c.breaker.health()
		failing, unheard := c.suspect(h)
		d := jitter(pulse)
		switch {
		case h.row > 0:
			d = max(jitter(time.Second), h.until.Sub(c.now())+jitter(100*time.Millisecond))
		case unheard:
			d = jitter(time.Second)
		}
		switch opened := bell.Wait(ctx, d, c.opened); {
		case ctx.Err() != nil:
			return
		case opened:
			continue // while it is open, nobody but this may be trying (Ready)
		}
		if h.row > 0 || failing {
			// That it answers is not enough now: it has to work, with a token.
			if _, err := c.call(ctx, request{op: opRead, path: lookupPath}); errors.Is(err, ErrLogin) {
				// There is none to be had now. That it turns us away shows that it works.
				_, _ = c.send(ctx, c.calls, request{op: opRead, path: lookupPath})
			}
		} else {
			c.feel(ctx)
		}
		c.enterAnew()
	}
}

// feel looks whether Vault is there, and knows our token if we have one: one that was revoked shows before it is needed.
func (c *Client) feel(ctx context.Context) {
	c.mu.Lock()
	s := c.living()
	c.mu.Unlock()
	if s == nil {
		_, _ = c.health(ctx)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	began := time.Now()
	_, err := c.send(ctx, s.calls(), request{op: opRead, path: lookupPath})
	c.metrics.observe(opRead, err.orNil(), time.Since(began))
	if err.dead() {
		c.bury(s)
	}
}

// enterAnew logs in while there is a token yet, if that was refused, or somebody wants another token to be used: so it shows before
// it is needed, and also while an engine fails.
func (c *Client) enterAnew() {
	another := c.another()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.living() != nil && (c.refused.why() != nil || another) {
		c.join()
	}
}

// another reports whether somebody has put another token into the file, or another certificate, with which Vault would not renew the
// token of the one before. What stays unreadable is another, too: the login says why.
func (c *Client) another() bool {
	if c.login.Method != loginToken && c.login.Method != loginCert {
		return false
	}
	with, err := c.credential()
	c.mu.Lock()
	defer c.mu.Unlock()
	switch now := c.now(); {
	case err == nil:
		c.unread = time.Time{}
		return !same(with.digest, c.entered)
	case c.unread.IsZero():
		c.unread = now
		return false
	default:
		return now.Sub(c.unread) >= replacing
	}
}

// jitter is d, a quarter more or less.
func jitter(d time.Duration) time.Duration {
	return d*3/4 + rand.N(d/2)
}

// health asks whether the node is there; it needs no token.
func (c *Client) health(ctx context.Context) (*api.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	began := time.Now()
	secret, err := c.send(ctx, c.calls, request{op: opHealth, path: healthPath})
	c.metrics.observe(opHealth, err.orNil(), time.Since(began))
	return secret, err.orNil()
}

// turned is told when the breaker opens and closes.
func (c *Client) turned(open bool, why string) {
	if open {
		c.log.Warn("Vault is away, it is left alone for a while", "vault", c.address, "why", why)
		c.wake()
		return
	}
	c.log.Info("Vault is back", "vault", c.address)
}

// Status is how the connection is, for checks; asking costs no call.
type Status struct {
	Address, Method string
	// Away: Vault can't be used now, since then.
	Away  bool
	Since time.Time
	// Refused: Vault is there, and the last login came to nothing, since then. While LoggedIn, the token before it lives on.
	Refused bool
	// Why says in a sentence what is wrong, and Mend is a command for whoever looks after our login; "" if nothing is known to be.
	Why, Mend string
	// LoggedIn: there is a token, that lives until TokenUntil (zero: without end) unless it is renewed.
	LoggedIn   bool
	TokenUntil time.Time
	// TokenEnds is when a token from a file, made at TokenBegan, ends whatever is renewed; zero where that is not known.
	TokenBegan, TokenEnds time.Time
}

// Ready says, in ErrAway, why a call should not be tried now: Vault is left alone, or has yet to show that it is back. That is
// tried by Run; without it by the call that asks when the time has come.
func (c *Client) Ready() error {
	h := c.breaker.health()
	switch {
	case c.now().Before(h.until):
		return fmt.Errorf("%s is away and left alone until %s, the last failure: %s: %w", c, stamp(h.until), cmp.Or(h.last, "too many requests"), ErrAway)
	case h.open && (h.probing || c.running.Load()):
		return fmt.Errorf("%s is away, and it is being tried whether it is back, the last failure: %s: %w", c, h.last, ErrAway)
	}
	return nil
}

// Status says how the connection is.
func (c *Client) Status() Status {
	h := c.breaker.health()
	st := Status{Address: c.address, Method: c.login.Method, Away: h.row > 0, Since: h.first, Why: h.last}
	if !st.Away {
		st.Since = time.Time{}
	} else {
		st.Why = fmt.Sprintf("Vault at %s is away since %s: %s", c.address, h.first.UTC().Format(time.RFC3339), h.last)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.living(); s != nil {
		st.LoggedIn, st.TokenUntil, st.TokenBegan, st.TokenEnds = true, s.until, s.began, s.ends
	}
	if why := c.refused.why(); why != nil && !st.Away {
		st.Refused, st.Since, st.Why, st.Mend = true, c.refused.since, why.Error(), c.mend()
	}
	return st
}

// mend is how to look at what refuses our login. The caller holds mu.
func (c *Client) mend() string {
	e, _ := errors.AsType[*Error](c.refused.why())
	mount := "auth/" + cmp.Or(c.login.Mount, c.login.Method)
	switch l := c.login; {
	case e == nil || e.Status == 0:
		return "" // a file, which the sentence names
	case l.Method == loginToken:
		return "vault token create"
	case l.Method == loginAppRole && e.denied():
		return "vault read sys/locked-users"
	case l.Method == loginAppRole:
		return "vault list " + mount + "/role"
	case l.Method == loginCert:
		return "vault list " + mount + "/certs"
	default:
		return "vault read " + mount + "/role/" + l.Role
	}
}
