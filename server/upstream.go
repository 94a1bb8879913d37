package server

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
)

const (
	// signTimeout bounds one ask of the upstream authority.
	signTimeout = 15 * time.Second
	// signAgain spaces the looks for requests that wait; failures are repeated sooner. refusedAgain is the most between two
	// asks when what is answered can't be used: the authority keeps a certificate for each.
	signAgain    = time.Minute
	refusedAgain = 10 * time.Minute
	// byUpstream is the door of evidence that an upstream authority has signed without a person.
	byUpstream = "upstream"
)

// upstreamState is how it goes with the upstream authority.
type upstreamState struct {
	mu sync.Mutex
	// failing is since when it does not sign; zero = it does, or was not asked.
	failing time.Time
	why     error
}

func (u *upstreamState) note(err error, now time.Time) (news bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	news = (err == nil) != (u.why == nil)
	if u.why = err; err == nil {
		u.failing = time.Time{}
	} else if u.failing.IsZero() {
		u.failing = now
	}
	return news
}

func (u *upstreamState) get() (since time.Time, why error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.failing, u.why
}

// sign has the requests that wait signed by the upstream authority, for as long as ctx lives. Where it is away, what there
// is goes on.
func (k *keeper) sign(ctx context.Context) {
	again := &backoff.ExponentialBackOff{InitialInterval: time.Second, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: signAgain}
	again.Reset()
	for {
		bell := k.changed.Next()
		wait := signAgain
		err := k.signWaiting(ctx)
		if ctx.Err() != nil {
			return
		}
		if k.upstreamState.note(err, k.folder.Now()) {
			if err != nil {
				k.log.Error("the upstream authority does not sign; it is asked again", "err", err)
			} else {
				k.log.Info("the upstream authority signs again")
			}
		}
		if err != nil {
			again.MaxInterval = signAgain
			if errors.Is(err, ca.ErrUnusable) {
				again.MaxInterval = refusedAgain
			}
			wait, bell = again.NextBackOff(), nil // a change of ours makes it no better
		} else {
			again.Reset()
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-bell:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// signWaiting has each request that waits signed. One that fails does not keep the others waiting.
func (k *keeper) signWaiting(ctx context.Context) error {
	var errs []error
	for _, row := range k.current.Load().rows {
		if row.Kind == ca.KindIntermediate && row.State == ca.Prepared && len(row.Chain) == 0 && row.Tainted.IsZero() {
			errs = append(errs, k.signOne(ctx, row))
		}
	}
	return errors.Join(errs...)
}

func (k *keeper) signOne(ctx context.Context, row store.Authority) error {
	if k.doubt() {
		return nil
	}
	set, now := k.current.Load(), k.folder.Now()
	if slices.ContainsFunc(set.rows, func(a store.Authority) bool { return a.Kind == ca.KindRoot && a.State == ca.Prepared && a.Leaving.IsZero() }) {
		return nil // in a moment it is published, and may be the one
	}
	under := rotation.Under(k.policy.Policy, k.world(set, now), row.ID, now)
	if under == "" {
		return fmt.Errorf("%s can't be signed now: there is not one root that is trusted, lives long enough and stays; see signet trust list", row.ID)
	}
	root := set.chains[under][0]
	request, err := x509.ParseCertificateRequest(row.CSR)
	if err != nil {
		return fmt.Errorf("stored request of %s can't be read: %w", row.ID, err)
	}
	plan, err := ca.NewIntermediatePlan(k.folder.TrustDomain, k.folder.Cluster, request.PublicKey, now, k.life)
	if err != nil {
		return err
	}
	plan.CommonName, plan.Under, plan.Now = request.Subject.CommonName, root, k.folder.Now
	asking, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	answer, err := k.upstream.Sign(asking, plan, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: row.CSR}))
	if err != nil {
		return fmt.Errorf("have %s signed under %s: %w", row.ID, under, err)
	}
	if answer.Pending != "" {
		return nil
	}
	if err := plan.Check(answer.Chain, []*x509.Certificate{root}); err != nil {
		return fmt.Errorf("%w: %w", ca.ErrUnusable, err)
	}
	pinned, err := ca.ParseFingerprint(ca.CertificateFingerprint(root.Raw))
	if err != nil {
		return err
	}
	by := &auditv1.Evidence{Door: byUpstream}
	chain := ca.EncodeChain(append(slices.Clone(answer.Chain), root)...)
	_, err = k.do(ctx, decision{verb: "install", reason: "the upstream authority has signed it", by: by},
		func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
			next, entries, err := k.install(set, w, now, installation{chains: chain, pinned: pinned, by: by})
			if err != nil {
				err = fmt.Errorf("%w: %w", ca.ErrUnusable, err)
			}
			return next, entries, err
		})
	return err
}

// loseKeys takes in which keys are gone with the process that held them.
func (k *keeper) loseKeys(ctx context.Context) error {
	var lost []string
	for _, a := range k.current.Load().rows {
		if a.Kind == ca.KindIntermediate && a.Key.Backend == keystore.BackendMemory && a.State != ca.Retired && a.State != ca.Removed {
			if _, err := k.key(ctx, a.Key); errors.Is(err, keystore.ErrNotFound) {
				lost = append(lost, a.ID)
			}
		}
	}
	if len(lost) == 0 || k.doubt() {
		return nil
	}
	d := scheduled()
	d.reason = "its key was in memory, and is gone with the process that held it"
	_, err := k.do(ctx, d, func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
		for _, id := range lost {
			lives, err := rotation.Lost(k.policy.Policy, w, id, now)
			if err != nil {
				return nil, nil, err
			}
			w.Authorities = lives
		}
		next, err := set.edit(w.Authorities)
		return next, nil, err
	})
	return err
}

// reopen opens the active issuer if its key was away before.
func (k *keeper) reopen(ctx context.Context) error {
	if !k.away.Load() {
		return nil
	}
	select {
	case k.turn <- struct{}{}:
		defer func() { <-k.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	set := k.current.Load()
	issuers, err := k.open(ctx, set, set)
	if err != nil {
		return err
	}
	if err := k.issuers.Replace(issuers...); err != nil {
		return err
	}
	if !k.away.Load() {
		k.log.Info("the key of the active issuer can be used again")
		k.changed.Ring()
	}
	return nil
}

// checkUpstream tells that the authority above does not sign while that can still be mended.
func (s *Server) checkUpstream(context.Context) check.Findings {
	f := check.Finding{Code: check.CodeUpstream, Level: check.OK, About: "upstream", Message: "the upstream authority signs what it is asked"}
	if since, why := s.keeper.upstreamState.get(); why != nil {
		f.Level, f.Stops = check.Error, []string{check.Rotating}
		f.Message = fmt.Sprintf("since %s the upstream authority has signed no request", stamp(since))
		if issuer, ok := s.issuers.Snapshot().Active(identity.Mesh); ok {
			f.Message += fmt.Sprintf(", and the intermediate that signs now lasts until %s", stamp(issuer.NotAfter()))
			if left := issuer.NotAfter().Sub(s.now()); left > issuer.NotAfter().Sub(issuer.Certificate().NotBefore)/10 {
				f.Level = check.Warning
			}
		}
		f.Message += ": " + why.Error() // last, for it may be long and is cut then
	}
	return check.Findings{f}
}
