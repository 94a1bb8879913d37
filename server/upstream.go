package server

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/bell"
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
	// trouble is why it does not sign; none where it does, or was not asked.
	trouble trouble
	// outlook is how it looked when it was last looked at.
	outlook check.Outlook
}

func (u *upstreamState) note(err error, now time.Time) (news bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.trouble, news = u.trouble.after(err, now)
	return news
}

func (u *upstreamState) get() (since time.Time, why error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.trouble.since, u.trouble.err
}

// looker is an upstream authority that can tell, without a signature, whether it would sign an intermediate of this life under a
// root: in words who would, and when the first certificate between that one and the root ends, zero where there is none. An error
// with a method Away() bool that returns true says that it could not be told now.
type looker interface {
	Look(ctx context.Context, under *x509.Certificate, life time.Duration) (signer string, ends time.Time, err error)
}

// LookUpstream looks whether an upstream authority would sign an intermediate under a root; life 0 is the default. It is false where
// that can't be told.
func LookUpstream(ctx context.Context, u ca.Upstream, under *x509.Certificate, life time.Duration, now time.Time) (o check.Outlook, told bool) {
	l, ok := u.(looker)
	if !ok {
		return o, false
	}
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	o = check.Outlook{Looked: now, Life: cmp.Or(life, ca.DefaultIntermediateLife)}
	var err error
	o.Signer, o.Ends, err = l.Look(ctx, under, o.Life)
	var a interface{ Away() bool }
	if ctx.Err() != nil || errors.As(err, &a) && a.Away() {
		return check.Outlook{}, false
	}
	if err != nil {
		o.Unfit = check.Trouble{Since: now, Why: err.Error()}
	}
	return o, true
}

// lookUpstream looks whether the next intermediate would be signed. While that can't be told now, what was seen before stands.
func (k *keeper) lookUpstream(ctx context.Context) (told bool) {
	if _, able := k.upstream.(looker); !able {
		return true // there is nothing to be told, now or later
	}
	set, now := k.current.Load(), k.folder.Now()
	var o check.Outlook
	if under := rotation.Under(k.policy.Policy, k.world(set, now), "", now); under != "" {
		if o, told = LookUpstream(ctx, k.upstream, set.chains[under][0], k.life, now); !told {
			return false
		}
	}
	switch before, unfit := k.upstreamState.see(o); {
	case unfit && !before:
		k.log.Error("the upstream authority would not sign the next intermediate", "err", o.Unfit.Why)
	case before && !unfit:
		k.log.Info("the upstream authority would sign the next intermediate again")
	}
	return true
}

// see takes in a look; it tells whether nothing would have been signed before, and would be now.
func (u *upstreamState) see(o check.Outlook) (before, unfit bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	before, unfit = !u.outlook.Unfit.Since.IsZero(), !o.Unfit.Since.IsZero()
	if before && unfit {
		o.Unfit.Since = u.outlook.Unfit.Since
	}
	u.outlook = o
	return before, unfit
}

func (u *upstreamState) seen() check.Outlook {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.outlook
}

// asking is how it goes with one request. The one goroutine in sign holds it.
type asking struct {
	wait *backoff.ExponentialBackOff
	// next is when to ask again.
	next time.Time
	err  error
	// chain is an answer that could not be taken into use yet, PEM, under the root of the fingerprint.
	chain  []byte
	pinned ca.Fingerprint
	// logged is the root under which the log knows that this is asked for.
	logged string
}

// sign has the requests that wait signed by the upstream authority, for as long as ctx lives. Where it is away, what there
// is goes on.
func (k *keeper) sign(ctx context.Context) {
	all := map[string]*asking{}
	for {
		changed := k.changed.Next()
		wait := k.signWaiting(ctx, all)
		if ctx.Err() != nil {
			return
		}
		bell.Wait(ctx, wait, changed)
	}
}

// signWaiting has each request signed whose turn it is, and says how long nothing is to be done.
func (k *keeper) signWaiting(ctx context.Context, all map[string]*asking) time.Duration {
	wait := signAgain
	waiting := map[string]bool{}
	var errs []error
	for _, row := range k.current.Load().rows {
		if row.Kind != ca.KindIntermediate || row.State != ca.Prepared || len(row.Chain) > 0 || !row.Tainted.IsZero() {
			continue
		}
		a := all[row.ID]
		if a == nil {
			a = &asking{wait: &backoff.ExponentialBackOff{InitialInterval: time.Second, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: signAgain}}
			a.wait.Reset()
			all[row.ID] = a
		}
		waiting[row.ID] = true
		if time.Now().Before(a.next) {
			wait = min(wait, time.Until(a.next))
			errs = append(errs, a.err)
			continue
		}
		if a.err = k.signOne(ctx, row, a); a.err != nil {
			a.wait.MaxInterval = signAgain
			if errors.Is(a.err, ca.ErrUnusable) {
				a.wait.MaxInterval = refusedAgain
			}
			pause := a.wait.NextBackOff()
			a.next, wait = time.Now().Add(pause), min(wait, pause)
		}
		errs = append(errs, a.err)
	}
	maps.DeleteFunc(all, func(id string, _ *asking) bool { return !waiting[id] })
	err := errors.Join(errs...)
	if ctx.Err() == nil && k.upstreamState.note(err, k.folder.Now()) {
		if err != nil {
			k.log.Error("a request of this cluster could not be signed; it is tried again", "err", err)
		} else {
			k.log.Info("requests of this cluster are signed again")
		}
	}
	return wait
}

func (k *keeper) signOne(ctx context.Context, row store.Authority, a *asking) error {
	if k.doubt() {
		return nil
	}
	if a.chain == nil {
		if err := k.ask(ctx, row, a); err != nil || a.chain == nil {
			return err
		}
	}
	by := &auditv1.Evidence{Door: byUpstream}
	_, err := k.do(ctx, decision{verb: "install", reason: "the upstream authority has signed it", by: by},
		func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
			next, entries, err := k.install(set, w, now, installation{chains: a.chain, pinned: a.pinned, by: by})
			if err != nil {
				a.chain = nil
				err = fmt.Errorf("%w: %w", ca.ErrUnusable, err)
			}
			return next, entries, err
		})
	return err
}

// storedRequest is a request as it is stored, read and in PEM.
func storedRequest(row store.Authority) (*x509.CertificateRequest, []byte, error) {
	request, err := x509.ParseCertificateRequest(row.CSR)
	if err != nil {
		return nil, nil, fmt.Errorf("stored request of %s can't be read: %w", row.ID, err)
	}
	return request, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: row.CSR}), nil
}

// ask has a request signed. There is no chain afterwards where it has to wait.
func (k *keeper) ask(ctx context.Context, row store.Authority, a *asking) error {
	set, now := k.current.Load(), k.folder.Now()
	if slices.ContainsFunc(set.rows, func(a store.Authority) bool {
		return a.Kind == ca.KindRoot && a.State == ca.Prepared && a.Leaving.IsZero()
	}) {
		return nil // in a moment it is published, and may be the one
	}
	under := rotation.Under(k.policy.Policy, k.world(set, now), row.ID, now)
	if under == "" {
		return fmt.Errorf("%s can't be signed now: there is not one root that is trusted, lives long enough and stays; see signet trust list", row.ID)
	}
	root := set.chains[under][0]
	request, csr, err := storedRequest(row)
	if err != nil {
		return err
	}
	plan, err := ca.NewIntermediatePlan(k.folder.TrustDomain, k.folder.Cluster, request.PublicKey, now, k.life)
	if err != nil {
		return err
	}
	plan.CommonName, plan.Under, plan.Now = request.Subject.CommonName, root, k.folder.Now
	if err := k.sayAsked(ctx, row, request, under, a); err != nil {
		return err
	}
	asking, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	answer, err := k.upstream.Sign(asking, plan, csr)
	if err != nil {
		return fmt.Errorf("have %s signed under %s: %w", row.ID, under, err)
	}
	if answer.Pending != "" {
		return nil
	}
	plan.NotBefore = time.Time{} // that goes by the clock of whoever signed
	if err := plan.Check(answer.Chain, []*x509.Certificate{root}); err != nil {
		return fmt.Errorf("%w: %w", ca.ErrUnusable, err)
	}
	a.chain, a.pinned = ca.EncodeChain(append(slices.Clone(answer.Chain), root)...), ca.FingerprintOf(root.Raw)
	return nil
}

// sayAsked tells the log what is about to be asked for, once: an answer may be lost, but whatever the authority has signed on
// this key was asked for here.
func (k *keeper) sayAsked(ctx context.Context, row store.Authority, request *x509.CertificateRequest, under string, a *asking) error {
	if a.logged == under {
		return nil
	}
	whom := "the upstream authority"
	if s, ok := k.upstream.(fmt.Stringer); ok {
		whom = s.String()
	}
	e := &auditv1.Entry{Time: k.folder.Now().UnixNano(), Event: &auditv1.Entry_AuthorityRequested{AuthorityRequested: &auditv1.AuthorityRequested{
		Authority: row.ID, Kind: row.Kind, CommonName: request.Subject.CommonName, PublicKey: request.RawSubjectPublicKeyInfo,
		Upstream: whom, Root: under, Evidence: scheduled().by,
	}}}
	if err := k.record(ctx, e); err != nil {
		return fmt.Errorf("%s was not sent to be signed, since the log can't be told of it before: %w", row.ID, err)
	}
	a.logged = under
	return nil
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

// reopen opens the active issuer if its key could not be opened before.
func (k *keeper) reopen(ctx context.Context) error {
	if k.unopened.Load() == nil {
		return nil
	}
	done, err := k.myTurn(ctx)
	if err != nil {
		return err
	}
	defer done()
	set := k.current.Load()
	issuers, err := k.open(ctx, set, set)
	if err != nil {
		return err
	}
	if err := k.issuers.Replace(issuers...); err != nil {
		return err
	}
	if k.unopened.Load() == nil {
		k.log.Info("the key of the active issuer can be used again")
		k.changed.Ring()
	}
	return nil
}

// checkUpstream tells that the authority above does not sign, or would not, while that can still be mended.
func (s *Server) checkUpstream(context.Context) check.Findings {
	since, why := s.keeper.upstreamState.get()
	if why == nil {
		now := s.now()
		return s.keeper.upstreamState.seen().Findings(s.duties(now), now)
	}
	f := check.Finding{Code: check.CodeUpstream, Level: check.Error, About: "upstream", Stops: []string{check.Rotating}}
	f.Message = fmt.Sprintf("since %s no request of this cluster has been signed", stamp(since))
	if issuer, ok := s.issuers.Snapshot().Active(identity.Mesh); ok {
		f.Message += fmt.Sprintf(", and the intermediate that signs now lasts until %s", stamp(issuer.NotAfter()))
		if s.duties(s.now()).Volatile {
			f.Message += ", but not beyond a restart of this server"
		}
		if left := issuer.NotAfter().Sub(s.now()); left > issuer.NotAfter().Sub(issuer.Certificate().NotBefore)/10 {
			f.Level = check.Warning
		}
	}
	f.Message += ": " + why.Error() // last, for it may be long and is cut then
	return check.Findings{f}
}
