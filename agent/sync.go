package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/cenkalti/backoff/v5"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/trust"
)

const (
	// orderWait is how long after its registrations a stream may take to bring an order to replace leaves, which comes right
	// behind them: what is not told again by then was lifted while the agent was away.
	orderWait = 10 * time.Second
	// maxRegistrations bounds what a server may make an agent hold.
	maxRegistrations = 100_000
)

// keepSync holds the Sync stream open for as long as ctx lives.
func (a *Agent) keepSync(ctx context.Context) {
	wait := &backoff.ExponentialBackOff{InitialInterval: 250 * time.Millisecond, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: maxReconnect}
	for {
		heard, err := a.sync(ctx)
		if ctx.Err() != nil {
			return
		}
		if heard {
			wait.Reset()
		}
		a.hub.turnedAway(err)
		if err == nil {
			continue // the connection was replaced by one with a newer certificate
		}
		d := wait.NextBackOff()
		a.log.Warn("lost the server, or never had it; what is held is served on, and the connection is tried again",
			"agent_door", a.member.Load().AgentDoor, "in", d.Round(time.Millisecond).String(), "err", clip(err.Error(), 512))
		select {
		case <-a.link.answered: // from before the loss
		default:
		}
		select {
		case <-ctx.Done():
			return
		case <-a.link.answered:
		case <-time.After(d):
		}
	}
}

// sync runs one stream. It returns nil when a newer connection has taken the place of the one it ran on; heard reports
// whether the server said anything.
func (a *Agent) sync(ctx context.Context) (heard bool, err error) {
	c, replaced, done, err := a.link.begin()
	if err != nil {
		return false, err
	}
	defer done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.nudge()
	stream, err := signetv1.NewAgentsClient(c.grpc).Sync(ctx)
	if err != nil {
		return false, c.explain(err)
	}
	received := make(chan *signetv1.SyncResponse)
	ended := make(chan error, 1)
	go func() { // ends with the stream, whose context ends when sync returns
		for {
			r, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case received <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	defer func() {
		if a.connected.Swap(false) {
			a.metrics.lastContact.Store(a.now().UnixNano())
		}
	}()

	// Each message says everything: it replaces the one before.
	said := a.word.get()
	say := func(seen *signetv1.CheckpointSeen) error {
		req := &signetv1.SyncRequest{BundleAcks: said.acks, CheckpointSeen: seen, IssuersHeld: said.held, BundleStored: said.stored}
		if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) {
			return c.explain(err)
		}
		return nil
	}
	if err := say(a.seen()); err != nil {
		return false, err
	}
	var lifted <-chan time.Time
	told := false // whether there is an order to replace leaves, or that there is none
	for {
		changed := a.word.changed.Next()
		if now := a.word.get(); !now.same(said) {
			said = now
			if err := say(nil); err != nil {
				return heard, err
			}
		}
		select {
		case <-ctx.Done(): // the receiver may have left with a message in hand
			return heard, ctx.Err()
		case <-replaced:
			return heard, nil
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				err = status.Error(codes.Unavailable, "the server ended the stream")
			}
			return heard, c.explain(err)
		case r := <-received:
			if !heard {
				heard = true
				a.connected.Store(true)
				if header, err := stream.Header(); err == nil {
					a.link.hearTime(header)
				}
				if err := a.link.clocksApart(); err != nil {
					a.log.Warn("the server's clock and this one are far apart", "err", err)
				}
				a.log.Info("connected", "agent_door", a.member.Load().AgentDoor)
				a.hub.letIn()
				a.hub.hurry()
			}
			switch r.GetUpdate().(type) {
			case *signetv1.SyncResponse_Reissue:
				told, lifted = true, nil
			case *signetv1.SyncResponse_Registrations:
				if !told && lifted == nil {
					lifted = time.After(orderWait)
				}
			case *signetv1.SyncResponse_Checkpoint: // comes behind an order
				if !told {
					told, lifted = true, nil
					a.hub.reissue(nil, 0)
				}
			}
			if a.take(r) {
				if err := say(a.seen()); err != nil {
					return heard, err
				}
			}
		case <-changed:
		case <-lifted:
			told, lifted = true, nil
			a.hub.reissue(nil, 0)
		}
	}
}

func (a *Agent) seen() *signetv1.CheckpointSeen {
	size, root := a.witness.Seen()
	return &signetv1.CheckpointSeen{Size: size, RootHash: root}
}

// take takes in one message of the server. It reports whether the server is to be told which checkpoint was seen.
func (a *Agent) take(r *signetv1.SyncResponse) (tellSeen bool) {
	var err error
	switch u := r.GetUpdate().(type) {
	case *signetv1.SyncResponse_Bundle:
		err = a.takeBundle(u.Bundle)
	case *signetv1.SyncResponse_Registrations:
		err = a.takeRegistrations(u.Registrations)
	case *signetv1.SyncResponse_Checkpoint:
		err, tellSeen = a.takeCheckpoint(u.Checkpoint), true
	case *signetv1.SyncResponse_Reissue:
		err = a.takeReissue(u.Reissue)
	}
	if err != nil {
		a.log.Error("could not take what the server sent", "err", clip(err.Error(), 1024))
	}
	return tellSeen
}

// takeBundle takes a newer bundle of our own trust domain, and only that.
func (a *Agent) takeBundle(m *signetv1.Bundle) error {
	member := a.member.Load()
	if m.GetTrustDomain() != member.td.Name() {
		return fmt.Errorf("bundle of trust domain %q: this agent is of %s", clip(m.GetTrustDomain(), 255), member.td)
	}
	b, err := parseBundle(member.td, m.Sequence, m.Roots)
	if err != nil {
		return err
	}
	old, had := a.bundles.Get(member.td)
	a.stored.taken(b)
	if err := a.bundles.Set(b); err != nil {
		return err
	}
	if had && old.Sequence() == b.Sequence() {
		return nil
	}
	a.trustNow(b)
	// In use already: workloads must have it even where the disk is full. It is acknowledged when it is stored.
	return a.storeNewest()
}

// trustNow notes that there is a bundle.
func (a *Agent) trustNow(b trust.Bundle) {
	a.metrics.generation.WithLabelValues(b.TrustDomain().Name()).Set(float64(b.Sequence()))
	a.metrics.roots.WithLabelValues(b.TrustDomain().Name()).Set(float64(len(b.Roots())))
	a.log.Info("trust bundle in use", "trust_domain", b.TrustDomain().Name(), "sequence", b.Sequence(), "digest", b.Digest().String(), "roots", len(b.Roots()))
	a.trustOnce.Do(func() { close(a.trusted) })
}

// takeRegistrations takes the whole set. One that is malformed is left out and named; the rest holds.
func (a *Agent) takeRegistrations(set *signetv1.RegistrationSet) error {
	if a.lastSet != nil && proto.Equal(a.lastSet, set) && !a.hub.shutsOut() {
		a.synced.Store(true)
		return nil
	}
	if n := len(set.GetRegistrations()) + len(set.GetBanned()); n > maxRegistrations {
		return fmt.Errorf("%d registrations: at most %d are taken", n, maxRegistrations)
	}
	m := a.member.Load()
	var wrong error
	read := func(told []*signetv1.Registration) []identity.Registration {
		list := make([]identity.Registration, 0, len(told))
		for _, r := range told {
			selectors := make([]identity.Selector, len(r.Selectors))
			for i, s := range r.Selectors {
				selectors[i] = identity.Selector(s)
			}
			reg, err := registration(m, storedRegistration{Name: r.Name, ID: r.SpiffeId, Selectors: selectors, TTLSeconds: r.TtlSeconds, Priority: r.Priority})
			if err != nil {
				wrong = err
				continue
			}
			list = append(list, reg)
		}
		return list
	}
	list := read(set.Registrations)
	a.hub.setRegistrations(list, read(set.Banned)...)
	a.synced.Store(true) // not before: who is told that the agent is ready asks at once
	a.lastSet = set
	a.log.Info("registrations in use", "count", len(list), "revision", set.Revision)
	return errors.Join(wrong, a.storeRegistrations(m, set.Revision, list))
}

// clearing says how a contradiction is put down. It takes hands on the state folder, so that no server can bring it about.
const clearing = "this shows until the evidence is moved away while the agent is stopped, and with it the file checkpoint if the log that is there now is to be believed"

// takeCheckpoint makes this agent a witness of the audit log: what has been seen must be contained in what is shown.
func (a *Agent) takeCheckpoint(c *signetv1.Checkpoint) error {
	err := a.witness.Advance(c.GetNote(), c.GetFromSize(), c.GetConsistencyProof())
	switch {
	case errors.Is(err, audit.ErrFork), errors.Is(err, audit.ErrRollback):
		a.metrics.inconsistencies.Inc()
		a.inconsistent.Store(true)
		a.log.Error("THE AUDIT LOG CONTRADICTS WHAT THIS AGENT HAS SEEN: the checkpoint is refused; keep the evidence, stop issuing and compare with other agents; "+clearing, "err", err)
		return nil
	case err != nil:
		// Not evidence: a proof from another size crosses a message of ours now and then. The server is told again.
		return err
	}
	return nil
}
