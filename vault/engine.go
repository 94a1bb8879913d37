package vault

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/prometheus/client_golang/prometheus"
)

// Engine is the way to one engine of Vault, or to one kind of its work: what is ill there is left alone, and the rest of Vault
// is not; what works elsewhere says nothing of it. A read and a write are told apart as well.
type Engine struct {
	c    *Client
	name string

	mu sync.Mutex
	// lanes are by operation.
	lanes map[string]*breaker
}

// Engine is the way of that name, one for all who ask for it: the mount, and what is behind it where an engine does more than one
// kind of work (transit/sign).
func (c *Client) Engine(name string) *Engine {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, found := slices.BinarySearchFunc(c.engines, name, func(e *Engine, name string) int { return cmp.Compare(e.name, name) })
	if !found {
		c.engines = slices.Insert(c.engines, i, &Engine{c: c, name: name, lanes: map[string]*breaker{}})
	}
	return c.engines[i]
}

// Read is Client.Read by this way.
func (e *Engine) Read(ctx context.Context, path string) (*api.Secret, error) {
	return e.c.read(ctx, e, path)
}

// Write is Client.Write by this way.
func (e *Engine) Write(ctx context.Context, path string, body map[string]any) (*api.Secret, error) {
	return e.c.write(ctx, e, path, body)
}

// List is Client.List by this way.
func (e *Engine) List(ctx context.Context, path string) ([]string, error) {
	return e.c.list(ctx, e, path)
}

// lane is the breaker of an operation.
func (e *Engine) lane(op string) *breaker {
	e.mu.Lock()
	defer e.mu.Unlock()
	b := e.lanes[op]
	if b == nil {
		var said atomic.Bool
		b = newBreaker(e.c.now, func(open bool, why string) {
			// That all of Vault is away is said once.
			switch {
			case open && !e.c.breaker.health().open:
				said.Store(true)
				e.c.log.Warn("an engine of Vault does not do its work, it is left alone for a while", "vault", e.c.address, "engine", e.name, "op", op, "why", why)
			case !open && said.Swap(false):
				e.c.log.Info("the engine of Vault is back", "vault", e.c.address, "engine", e.name, "op", op)
			}
		})
		b.slow = slowTrip
		e.lanes[op] = b
	}
	return b
}

// Ready says, in ErrAway, why a write should not be tried now. Where it is to be tried whether the engine works again, one caller
// hears nil, and is the one that tries.
func (e *Engine) Ready() error {
	if e.c.breaker.health().open {
		return e.c.Ready()
	}
	if err := e.lane(opWrite).ready(); err != nil {
		return fmt.Errorf("%s of %s is away: %w: %w", e.name, e.c, err, ErrAway)
	}
	return nil
}

// Trouble is since when the engine does not do its work, and why; a zero time if it does, or if nobody has asked it of late.
func (e *Engine) Trouble() (since time.Time, why string) {
	for op, h := range e.health() {
		if h.trouble(e.c.now()) && (since.IsZero() || h.first.Before(since)) {
			since = h.first
			why = fmt.Sprintf("%s of Vault at %s has answered no %s since %s: %s", e.name, e.c.address, op, since.UTC().Format(time.RFC3339), h.last)
		}
	}
	return since, why
}

// Quiet is how long nobody has written.
func (e *Engine) Quiet() time.Duration { return e.c.now().Sub(e.lane(opWrite).health().asked) }

// Failing reports whether the newest write that said anything has failed.
func (e *Engine) Failing() bool { return e.lane(opWrite).health().row > 0 }

func (e *Engine) health() map[string]health {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := map[string]health{}
	for op, b := range e.lanes {
		all[op] = b.health()
	}
	return all
}

// admit says whether a call may be made. If so, done must be told what came of it.
func (c *Client) admit(r request) (done func(outcome, string), err error) {
	if r.engine == nil {
		return c.breaker.allow()
	}
	// When the time has come, what is asked of an engine tells as well whether Vault is back.
	if h := c.breaker.health(); h.open && c.now().Before(h.until) {
		return nil, fmt.Errorf("left alone until %s after %d failures in a row, the last: %s", stamp(h.until), h.row, h.last)
	}
	lane := r.engine.lane(r.op)
	in, err := lane.allow()
	if err != nil {
		return nil, err
	}
	return func(o outcome, why string) {
		in(o, why)
		switch {
		case o == well:
			c.breaker.done(false, well, "")
		case o == ill && lane.health().row == 1:
			c.wake() // is it the engine, or Vault?
		}
	}, nil
}

// hold leaves alone what has asked for it.
func (c *Client) hold(r request, d time.Duration) {
	if r.engine != nil {
		r.engine.lane(r.op).hold(d)
		return
	}
	c.breaker.hold(d)
}

// wake has Run look after Vault at its new time.
func (c *Client) wake() {
	select {
	case c.opened <- struct{}{}:
	default:
	}
}

// suspect reports whether an engine fails, and whether nothing has been heard of Vault as such since it began to.
func (c *Client) suspect(whole health) (failing, unheard bool) {
	for _, e := range c.allEngines() {
		for _, h := range e.health() {
			if h.row > 0 && c.now().Sub(h.asked) < newsLasts {
				failing, unheard = true, unheard || !whole.judged.After(h.first)
			}
		}
	}
	return failing, unheard
}

func (c *Client) allEngines() []*Engine {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.engines)
}

var descEngineUp = prometheus.NewDesc("signet_vault_engine_up", "0 while an engine of Vault does not do what it is asked, though Vault may be at work; by mount and kind of work.", []string{"engine", "op"}, nil)

// engineCollector shows the engines that have been asked for anything.
type engineCollector struct{ c *Client }

func (engineCollector) Describe(out chan<- *prometheus.Desc) { out <- descEngineUp }

func (e engineCollector) Collect(out chan<- prometheus.Metric) {
	for _, engine := range e.c.allEngines() {
		for op, h := range engine.health() {
			up := 1.0
			if h.trouble(e.c.now()) {
				up = 0
			}
			out <- prometheus.MustNewConstMetric(descEngineUp, prometheus.GaugeValue, up, engine.name, op)
		}
	}
}
