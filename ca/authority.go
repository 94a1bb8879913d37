package ca

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

// DefaultBackdate is how far NotBefore lies in the past, for the sake of slow clocks.
const DefaultBackdate = 5 * time.Minute

// maxBackdate: more than a working clock needs is a mistake in the configuration.
const maxBackdate = time.Hour

// maxEvidence bounds what a caller's word may take in a log entry, in bytes: an entry is at most 64 KiB.
const maxEvidence = 32 << 10

// Config is what an Authority works with.
type Config struct {
	Issuers *Issuers
	Log     Log
	// Backdate lies between now and NotBefore; 0 = DefaultBackdate, at most an hour.
	Backdate time.Duration
	// MinUsefulLife is the least that may be left of the life that was granted when an issuer's end cuts it short;
	// 0 = identity.MinTTL.
	MinUsefulLife time.Duration
	Now           func() time.Time
	Metrics       prometheus.Registerer
	Logger        *slog.Logger
}

// Authority issues leaves: built from a grant, logged, signed, released, in this order and no other.
type Authority struct {
	issuers       *Issuers
	log           Log
	backdate      time.Duration
	minUsefulLife time.Duration
	now           func() time.Time
	metrics       *metrics
	logger        *slog.Logger
	failing       atomic.Bool // the last that was reported; for logging only what changes
	// unsigned is by hierarchy the newest signature, if it failed.
	unsigned [identity.ControlPlane + 1]atomic.Pointer[unsigned]
}

// unsigned is a signature that failed.
type unsigned struct {
	// since is of the first that failed, at of the newest.
	since, at time.Time
	err       error
	// stays: it counts until the key was looked at and found well (Look). seen: a look has found it, not a signature.
	stays, seen bool
}

// looker is a key that can say without a signature whether it would give one. ErrAway says that it can't be told now.
type looker interface {
	Look(ctx context.Context) error
}

// unsignedNews is how long a signature that failed counts at least, when none is asked for after it; for a key that can't be
// looked at, at most.
const unsignedNews = time.Minute

// New refuses a configuration that contradicts itself.
func New(c Config) (*Authority, error) {
	switch {
	case c.Issuers == nil:
		return nil, errors.New("authority: no issuers")
	case c.Log == nil:
		return nil, errors.New("authority: no log: nothing is issued that is not logged")
	case c.Backdate < 0 || c.Backdate > maxBackdate:
		return nil, fmt.Errorf("backdate of %s: use 0 to %s", c.Backdate, maxBackdate)
	case c.MinUsefulLife < 0:
		return nil, fmt.Errorf("minimum useful life of %s: use a positive duration", c.MinUsefulLife)
	}
	if c.Backdate == 0 {
		c.Backdate = DefaultBackdate
	}
	if c.MinUsefulLife == 0 {
		c.MinUsefulLife = identity.MinTTL
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	m, err := newMetrics(c.Metrics, c.Issuers)
	if err != nil {
		return nil, err
	}
	return &Authority{
		issuers: c.Issuers, log: c.Log, backdate: c.Backdate, minUsefulLife: c.MinUsefulLife,
		now: c.Now, metrics: m, logger: c.Logger,
	}, nil
}

// Reason says why nothing was issued. The set is closed; it may label a metric.
type Reason string

// The reasons.
const (
	// ReasonSpent: the grant was empty or used before.
	ReasonSpent Reason = "spent_grant"
	// ReasonBadGrant: the grant's name, key or evidence can't stand in a certificate or in the log.
	ReasonBadGrant Reason = "bad_grant"
	// ReasonNoIssuer: no issuer is active, or the active one is expired, not yet valid, or ends too soon.
	ReasonNoIssuer Reason = "no_issuer"
	// ReasonCanceled: the caller gave up before anything was logged.
	ReasonCanceled Reason = "canceled"
	// ReasonLog: the audit log can't be written.
	ReasonLog Reason = "log_unavailable"
	// ReasonSign: the issuer's key is away, or its signature is wrong.
	ReasonSign Reason = "sign_failed"
)

// Error is why a grant brought no certificate.
type Error struct {
	Reason Reason
	err    error
}

func (e *Error) Error() string { return e.err.Error() }

func (e *Error) Unwrap() error { return e.err }

// Retry reports whether the same ask may succeed later.
func (e *Error) Retry() bool {
	return e.Reason == ReasonNoIssuer || e.Reason == ReasonLog || e.Reason == ReasonSign || e.Reason == ReasonCanceled
}

// draft is a leaf that is built but not signed.
type draft struct {
	terms               identity.Terms
	issuer              *Issuer
	serial              []byte
	notBefore, notAfter time.Time
	tbs                 []byte
}

// Issue spends each grant and answers each, in order; errors are *Error. The whole call works on one snapshot of the
// issuers and makes one batch in the log. Nothing is signed before the log has it: if the log can't be written, all fail.
// The context is heeded until the log has taken the batch.
func (a *Authority) Issue(ctx context.Context, grants []*identity.Grant) []Result {
	start := time.Now()
	results := make([]Result, len(grants))
	drafts := make([]draft, len(grants))
	entries := make([]*auditv1.Entry, 0, len(grants))
	snapshot, now := a.issuers.Snapshot(), a.now()
	for n, g := range grants {
		d, err := a.build(snapshot, now, g)
		if err != nil {
			results[n].Err = err
			continue
		}
		drafts[n] = d
		entries = append(entries, d.entry(now))
	}
	if len(entries) == 0 {
		a.report(results)
		return results
	}
	receipts, logErr := a.append(ctx, entries)
	var remote sync.WaitGroup
	logged := 0
	for n := range drafts {
		d := &drafts[n]
		if d.issuer == nil {
			continue
		}
		if logErr != nil {
			results[n].Err = &Error{logErr.Reason, fmt.Errorf("cannot sign for %s: %w", d.terms.ID, logErr.err)}
			continue
		}
		receipt := receipts[logged]
		logged++
		if d.issuer.key.Remote() {
			remote.Go(func() { results[n] = a.release(d, receipt) }) // what is asked for at once goes over the wire together
		} else {
			results[n] = a.release(d, receipt)
		}
	}
	remote.Wait()
	a.report(results)
	a.metrics.observe(drafts, time.Since(start))
	return results
}

// build spends the grant and makes of it what is to be signed.
func (a *Authority) build(s *Snapshot, now time.Time, g *identity.Grant) (draft, error) {
	terms, err := g.Spend()
	if err != nil {
		return draft{}, &Error{ReasonSpent, fmt.Errorf("cannot sign: %w; ask for a new one", err)}
	}
	fail := func(r Reason, err error) (draft, error) {
		return draft{}, &Error{r, fmt.Errorf("cannot sign for %s: %w", terms.ID, err)}
	}
	issuer, ok := s.Active(terms.Hierarchy)
	if !ok {
		return fail(ReasonNoIssuer, fmt.Errorf("no issuer of the %s hierarchy is active; install one with `signet cluster install`", terms.Hierarchy))
	}
	if err := issuer.mayName(terms); err != nil {
		return fail(ReasonBadGrant, err)
	}
	// Else the log would fill with what nobody gets, each time somebody asks again.
	if err := keystore.Ready(issuer.key); err != nil {
		return fail(ReasonSign, fmt.Errorf("key %s of issuer %s can't sign now: %w", issuer.key.Ref(), issuer.name, err))
	}
	d := draft{terms: terms, issuer: issuer, serial: make([]byte, serialLength)}
	if d.notBefore, d.notAfter, err = a.validity(issuer, now, terms.TTL); err != nil {
		return fail(ReasonNoIssuer, err)
	}
	newSerial(d.serial)
	d.tbs, err = issuer.builder.tbs(leafContent{
		serial: d.serial, notBefore: d.notBefore, notAfter: d.notAfter, spiffeID: terms.ID.String(), spki: terms.Key.SPKI(),
	})
	if err != nil {
		return fail(ReasonBadGrant, err)
	}
	return d, nil
}

// mayName holds the two hierarchies apart once more, whatever made the grant.
func (i *Issuer) mayName(t identity.Terms) error {
	size := len(t.Evidence.Instance)
	for _, s := range t.Evidence.Selectors {
		size += len(s)
	}
	switch {
	case !t.ID.MemberOf(i.trustDomain):
		return fmt.Errorf("issuer %s is of trust domain %s", i.name, i.trustDomain)
	case t.ID.Path() == "" || len(t.ID.String()) > identity.MaxIDLength: // X509-SVID §3.1, SPIFFE-ID §2.3
		return errors.New("that is not the SPIFFE ID of a workload")
	case identity.Reserved(t.ID) != (i.hierarchy == identity.ControlPlane):
		return fmt.Errorf("issuer %s of the %s hierarchy may not give that name", i.name, i.hierarchy)
	case size > maxEvidence:
		return fmt.Errorf("instance and selectors take %d bytes, more than the %d that a log entry holds; name fewer selectors", size, maxEvidence)
	}
	return nil
}

// validity is [now − backdate, now + ttl − 1 s] in whole seconds, for both ends count (RFC 5280 §4.1.2.5), within that of
// the issuer's chain. It refuses a life so short that it would be renewed for nothing.
func (a *Authority) validity(i *Issuer, now time.Time, ttl time.Duration) (notBefore, notAfter time.Time, err error) {
	now = now.UTC()
	if err := i.Usable(now); err != nil {
		return notBefore, notAfter, err
	}
	now = now.Truncate(time.Second)
	notBefore = now.Add(-a.backdate).Truncate(time.Second)
	if notBefore.Before(i.notBefore.at) {
		notBefore = i.notBefore.at
	}
	ttl = ttl.Truncate(time.Second)
	if ttl < time.Second {
		return notBefore, notAfter, fmt.Errorf("a life of %s is shorter than the second in which X.509 counts", ttl)
	}
	notAfter = now.Add(ttl - time.Second)
	if notAfter.After(i.notAfter.at) {
		notAfter = i.notAfter.at
	}
	left := notAfter.Sub(now) + time.Second
	if least := min(a.minUsefulLife, ttl); left < least {
		return notBefore, notAfter, fmt.Errorf("%s expires in %s, less than the minimum useful life %s; install and activate a new one",
			i.notAfter.whose, left, least)
	}
	return notBefore, notAfter, nil
}

// entry is what the log keeps of the draft.
func (d *draft) entry(now time.Time) *auditv1.Entry {
	ev := &d.terms.Evidence
	e := &struct {
		entry    auditv1.Entry
		event    auditv1.Entry_CertificateIssued
		issued   auditv1.CertificateIssued
		evidence auditv1.Evidence
	}{}
	e.evidence.Caller, e.evidence.Door, e.evidence.Agent = ev.Caller, ev.Door, ev.Agent
	e.evidence.Instance, e.evidence.Registration, e.evidence.RegistrationRevision = ev.Instance, ev.Registration, ev.Revision
	e.evidence.Selectors = make([]string, len(ev.Selectors))
	for n, s := range ev.Selectors {
		e.evidence.Selectors[n] = string(s)
	}
	e.issued.Tbs, e.issued.IssuerKeyId, e.issued.Evidence = d.tbs, d.issuer.KeyID(), &e.evidence
	e.event.CertificateIssued = &e.issued
	e.entry.Time, e.entry.Event = now.UnixNano(), &e.event
	return &e.entry
}

// append puts the batch into the log, or says for every item of it why nothing may be signed.
func (a *Authority) append(ctx context.Context, entries []*auditv1.Entry) (_ []audit.Receipt, failed *Error) {
	if err := ctx.Err(); err != nil {
		return nil, &Error{ReasonCanceled, fmt.Errorf("given up before it was logged: %w", err)}
	}
	receipts, err := a.log.Append(ctx, entries)
	if err == nil && len(receipts) != len(entries) {
		err = fmt.Errorf("%d receipts for %d entries", len(receipts), len(entries))
	}
	switch {
	case err == nil:
		return receipts, nil
	case ctx.Err() != nil:
		return nil, &Error{ReasonCanceled, fmt.Errorf("given up while it was being logged: %w", err)}
	}
	return nil, &Error{ReasonLog, fmt.Errorf("issuing is stopped because the audit log can't be written: %w; see to the log's disk, what is already issued is still served", err)}
}

// release signs what the log has.
func (a *Authority) release(d *draft, receipt audit.Receipt) Result {
	chain, err := a.sign(d)
	if err != nil {
		a.metrics.loggedNotReleased.Inc()
		return Result{Err: err}
	}
	a.metrics.issued.WithLabelValues(d.issuer.name, d.terms.Evidence.Door).Inc()
	return Result{Leaf: &Leaf{Chain: chain, Serial: d.serial, NotBefore: d.notBefore, NotAfter: d.notAfter, Receipt: receipt}}
}

// sign makes the certificate of a draft that the log has, and returns it with its chain.
func (a *Authority) sign(d *draft) ([][]byte, error) {
	i := d.issuer
	backend := i.key.Ref().Backend
	newest := &a.unsigned[i.hierarchy]
	fail := func(err error) ([][]byte, error) {
		a.metrics.signErrors.WithLabelValues(backend).Inc()
		_, looks := i.key.(looker)
		u := &unsigned{since: a.now(), at: a.now(), err: err, stays: looks}
		if before := newest.Load(); before != nil {
			u.since = before.since
		}
		newest.Store(u)
		return nil, &Error{ReasonSign, fmt.Errorf("cannot sign for %s with key %s of issuer %s: %w", d.terms.ID, i.key.Ref(), i.name, err)}
	}
	h := i.builder.hash.New()
	h.Write(d.tbs)
	start := time.Now()
	signature, err := i.key.Sign(rand.Reader, h.Sum(nil), i.builder.hash)
	a.metrics.signDuration.WithLabelValues(backend).Observe(time.Since(start).Seconds())
	if err != nil {
		return fail(err)
	}
	if i.key.Remote() || sampled(d.serial) {
		if err := i.certificate.CheckSignature(i.builder.algorithm, d.tbs, signature); err != nil {
			return fail(fmt.Errorf("the signature it gave is wrong, another key may stand behind it: %w", err))
		}
	}
	der, err := i.builder.certificate(d.tbs, signature)
	if err != nil {
		return fail(err)
	}
	if newest.Load() != nil {
		newest.Store(nil)
	}
	return append([][]byte{der}, i.chain...), nil
}

// Look asks the keys that sign whether they would, so that one that is gone is known before it is needed, and one that is back
// though nobody asks. Where a signature has failed, that it has says more, for a while.
func (a *Authority) Look(ctx context.Context) {
	snapshot := a.issuers.Snapshot()
	for _, h := range []identity.Hierarchy{identity.Mesh, identity.ControlPlane} {
		issuer, ok := snapshot.Active(h)
		if !ok {
			continue
		}
		key, ok := issuer.key.(looker)
		if !ok {
			continue
		}
		before := a.unsigned[h].Load()
		err := key.Look(ctx)
		passing := before == nil || before.seen || errors.Is(before.err, keystore.ErrAway)
		now := a.now()
		switch {
		case errors.Is(err, keystore.ErrAway), ctx.Err() != nil:
		case err == nil && before != nil && (passing || now.Sub(before.at) >= unsignedNews):
			if a.unsigned[h].CompareAndSwap(before, nil) && before.seen {
				a.logger.Info("the key of an issuer signs again", "issuer", issuer.name)
			}
		case err != nil && passing:
			u := &unsigned{since: now, at: now, err: err, stays: true, seen: true}
			if before != nil {
				u.since = before.since
			}
			if a.unsigned[h].CompareAndSwap(before, u) && (before == nil || !before.seen) {
				a.logger.Error("the key of an issuer does not sign", "issuer", issuer.name, "error", err)
			}
		}
	}
}

// Unsigned says why the newest signature of a hierarchy failed, or would, and since when all have; nil if it didn't, or, for a
// key that can't be looked at, is of more than a minute ago.
func (a *Authority) Unsigned(h identity.Hierarchy) (since time.Time, err error) {
	if u := a.unsigned[h].Load(); u != nil && (u.stays || a.now().Sub(u.at) < unsignedNews) {
		return u.since, u.err
	}
	return time.Time{}, nil
}

// sampled picks one in 256 signatures of in-process keys to be verified: a check costs twice what it checks.
func sampled(serial []byte) bool { return serial[len(serial)-1] == 0 }

// report tells the operator when log or key begin to fail and when issuing works again, not every call in between;
// single refusals are the door's to tell.
func (a *Authority) report(results []Result) {
	var trouble *Error
	issued := false
	for _, r := range results {
		var e *Error
		if errors.As(r.Err, &e) && (e.Reason == ReasonLog || e.Reason == ReasonSign) {
			trouble = e
		}
		issued = issued || r.Leaf != nil
	}
	switch {
	case trouble != nil && a.failing.CompareAndSwap(false, true):
		a.logger.Error("issuing fails", "reason", string(trouble.Reason), "error", trouble)
	case trouble == nil && issued && a.failing.CompareAndSwap(true, false):
		a.logger.Info("issuing works again")
	}
}
