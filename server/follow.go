package server

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/server/shared"
	"github.com/signet-ca/signet/trust"
)

// taintedElsewhere is the reason of a taint that is followed: the document does not say whose it is.
const taintedElsewhere = "tainted in another cluster"

// refusedRoot is one about which another cluster has decided what can't be followed here.
type refusedRoot struct {
	id, by string
	why    error
}

// follow does here what the others have decided, and returns what all have decided, this cluster included; done says that
// nothing is left to be tried again. What is known is kept before it is followed: then a crash in between leaves it to be
// followed, and nothing that looks like a decision.
func (e *exchange) follow(ctx context.Context, theirs shared.Trust, version uint64) (_ shared.Replica, done bool, err error) {
	own, err := e.load(ctx)
	if err != nil {
		return nil, false, err
	}
	met := false
	k := e.keeper
	d := scheduled()
	d.reason = fmt.Sprintf("the clusters share it: version %d, written by cluster %s", version, theirs.Cluster)
	var refused []refusedRoot
	o, err := k.do(ctx, d, func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
		next := own.Meet(theirs.Roots, set.shares(now), e.self.Cluster, goneBy(w), now)
		if err := e.keep(ctx, own, next); err != nil {
			return nil, nil, err
		}
		own, met = next, true
		var after *authorities
		if after, refused = k.follow(set, w, own, now); after == set {
			return nil, nil, nil
		}
		return after, nil, nil
	})
	e.mu.Lock()
	for _, r := range refused {
		if !slices.ContainsFunc(e.refused, func(x refusedRoot) bool { return x.id == r.id && x.why.Error() == r.why.Error() }) {
			e.log.Warn("what another cluster has decided about a root can't be followed", "root", r.id, "cluster", r.by, "err", r.why)
		}
	}
	e.refused = refused
	e.mu.Unlock()
	if err != nil && !met {
		return nil, false, err
	}
	if err != nil && !errors.Is(err, errStep) {
		e.log.Error("could not take a step in the life of a CA; it is tried again", "err", err)
	}
	settled := own.Settle(o.set.shares(k.folder.Now()))
	return settled, err == nil, e.keep(ctx, own, settled)
}

// goneBy reports of a root whether every cluster has said that it is not believed any more.
func goneBy(w rotation.World) func(id string) bool {
	return func(id string) bool {
		for _, r := range append([]rotation.Report{w.Own}, w.Peers...) {
			if r.At.IsZero() || slices.ContainsFunc(r.Roots, func(x rotation.RootReport) bool { return x.ID == id }) {
				return false
			}
		}
		return true
	}
}

// load returns what is known of the shared document.
func (e *exchange) load(ctx context.Context) (shared.Replica, error) {
	e.mu.Lock()
	own := e.own
	e.mu.Unlock()
	if own != nil {
		return own, nil
	}
	text, err := e.keeper.store.SharedTrust(ctx, e.keeper.folder.TrustDomain)
	if err != nil {
		return nil, err
	}
	own = shared.Replica{}
	if text != nil {
		if err := json.Unmarshal(text, &own); err != nil {
			return nil, fmt.Errorf("the stored shared trust can't be read: %w", err)
		}
	}
	e.mu.Lock()
	e.own = own
	e.mu.Unlock()
	return own, nil
}

// keep makes durable what is known of the shared document.
func (e *exchange) keep(ctx context.Context, before, after shared.Replica) error {
	if after.Equal(before) {
		return nil
	}
	text, err := json.Marshal(after)
	if err != nil {
		return err
	}
	if err := e.keeper.store.PutSharedTrust(ctx, e.keeper.folder.TrustDomain, text); err != nil {
		return err
	}
	e.mu.Lock()
	e.own = after
	e.mu.Unlock()
	return nil
}

// follow brings the roots to where the clusters want them, as far as each may go there: what is to be believed first, so that
// something stays when the others leave. It returns the same set where nothing is to be done.
func (k *keeper) follow(set *authorities, w rotation.World, known shared.Replica, now time.Time) (*authorities, []refusedRoot) {
	var refused []refusedRoot
	try := func(r shared.Known, change func() (*authorities, error)) {
		next, err := change()
		if err != nil {
			refused = append(refused, refusedRoot{r.ID, r.By, err})
			return
		}
		set, w.Authorities = next, next.lives()
	}
	at := map[string]shared.Standing{}
	for _, l := range set.shares(now) {
		at[l.Fingerprint] = l.Stands
	}
	// A taint follows the key, so that it comes first: no root is taken that has a lost one.
	told := w.Peers
	for _, r := range known {
		if !r.Tainted {
			continue
		}
		key := sharedKey(r.Root)
		told = append(slices.Clip(told), rotation.Report{Cluster: r.By, Tainted: []rotation.TaintReport{{ID: r.ID, Root: r.ID, KeyFingerprint: key, Since: now, NotAfter: r.NotAfter}}})
		if id := set.untainted(r.ID, key); id != "" {
			try(r, func() (*authorities, error) { return set.taint(w, id, taintedElsewhere, now) })
		}
	}
	for _, r := range known {
		here, wanted := at[r.Fingerprint], r.Standing()
		switch {
		case here == shared.Unknown && (wanted == shared.Leaving && len(k.policy.Peers) > 0 || wanted == shared.Believed && r.Tainted):
			try(r, func() (*authorities, error) {
				if found, err := k.vouched(w, r.ID, wanted, now); err != nil || !found {
					return set, err // one that leaves and that nobody has is not needed here
				}
				return k.adopt(set, r.Root, now)
			})
		case wanted == shared.Believed && here != shared.Believed:
			try(r, func() (*authorities, error) {
				if _, err := k.vouched(w, r.ID, wanted, now); err != nil {
					return nil, err
				}
				cert, err := set.room(r.Root)
				if err != nil {
					return nil, err
				}
				return set.addRoot(k.policy.Policy, rotation.World{Authorities: w.Authorities, Own: w.Own, Peers: told}, cert, now)
			})
		}
	}
	for _, r := range known {
		here, wanted := at[r.Fingerprint], r.Standing()
		if here == shared.Believed && (wanted == shared.Leaving || wanted == shared.Removed) {
			try(r, func() (*authorities, error) {
				lives, err := rotation.RemoveRoot(w, r.ID, now)
				if err != nil {
					return nil, err
				}
				return set.edit(lives)
			})
		}
	}
	return set, refused
}

// vouched reports whether a peer says, in a report that holds still, that a root is believed there and stays, or for one that
// is leaving, that it may be met. The shared document has no time: an old one has good signatures, and a cluster without a
// memory can't tell. It is an error when that is not known, or when nobody speaks of what is to be believed.
func (k *keeper) vouched(w rotation.World, id string, wanted shared.Standing, now time.Time) (bool, error) {
	var silent []string
	for _, p := range w.Peers {
		if !k.policy.Holds(p, now) {
			silent = append(silent, p.Cluster)
		} else if slices.ContainsFunc(p.Roots, func(x rotation.RootReport) bool { return x.ID == id && (wanted == shared.Leaving || !x.Leaving) }) {
			return true, nil
		}
	}
	switch {
	case len(w.Peers) == 0:
		return false, errors.New("the document may be an old one, and rotation.peers names no cluster whose report could say that it is not: if it is right, add the root with signet trust add")
	case len(silent) > 0:
		return false, fmt.Errorf("no report says that another cluster believes it, and of %s there is none that holds: the document may be an old one; it is followed as soon as a report says so", check.Some(silent))
	case wanted == shared.Believed:
		return false, errors.New("all other clusters have reported, and none believes it to stay: the document may be an old one, or nobody has published the root yet; it is followed as soon as a report says so")
	}
	return false, nil
}

// room reads a shared root, if there is room for it.
func (s *authorities) room(r shared.Root) (*x509.Certificate, error) {
	der, err := r.DER()
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("its certificate can't be read: %w", err)
	}
	if !cert.NotAfter.Equal(r.NotAfter) {
		return nil, fmt.Errorf("it is said to end at %s, and its certificate at %s", stamp(r.NotAfter), stamp(cert.NotAfter))
	}
	used := 0
	for _, a := range s.rows {
		if a.Kind == ca.KindRoot && a.State != ca.Removed && a.ID != r.ID {
			used++
		}
	}
	if used >= trust.MaxRoots || len(s.rows) >= maxAuthorities {
		return nil, fmt.Errorf("%d roots are in use, of %d CAs: there is no room for another", used, len(s.rows))
	}
	return cert, nil
}

// adopt believes a root that others believe and that is on its way out or tainted: leaves under it may be met.
func (k *keeper) adopt(set *authorities, r shared.Root, now time.Time) (*authorities, error) {
	cert, err := set.room(r)
	if err != nil {
		return nil, err
	}
	if err := ca.CheckRoot(k.folder.TrustDomain, cert, now); err != nil {
		return nil, err
	}
	if _, ok := set.row(r.ID); ok {
		return nil, fmt.Errorf("another root is known as %s: this one can't be told from it", r.ID)
	}
	row := store.Authority{
		Authority: rotation.Authority{ID: r.ID, Kind: ca.KindRoot, State: ca.Published, Since: now}, Chain: [][]byte{cert.Raw}, Created: now,
	}
	if r.Standing() == shared.Leaving {
		row.Leaving = now
	}
	row.KeyFingerprint = ca.KeyFingerprint(cert.RawSubjectPublicKeyInfo)
	if lost := (rotation.World{Authorities: set.lives(), Peers: k.heard()}).LostKey(row.Authority); r.Tainted || lost != nil {
		row.Tainted, row.TaintReason = now, taintedElsewhere
	}
	return set.edit(nil, row)
}

// sharedKey is the fingerprint of a shared root's key; "" where it has no certificate that can be read.
func sharedKey(r shared.Root) string {
	der, err := r.DER()
	if err != nil || der == nil {
		return ""
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return ""
	}
	return ca.KeyFingerprint(cert.RawSubjectPublicKeyInfo)
}

// shares are the roots of a cluster as the document names them. Those that were never published count as believed: somebody
// has decided so.
func (s *authorities) shares(now time.Time) []shared.Local {
	var all []shared.Local
	for _, a := range s.rows {
		if a.Kind != ca.KindRoot || len(s.chains[a.ID]) != 1 || now.After(a.NotAfter) {
			continue
		}
		cert := s.chains[a.ID][0]
		l := shared.Local{Stands: shared.Believed, Root: shared.Root{
			ID: a.ID, State: a.State, Tainted: !a.Tainted.IsZero(), NotAfter: cert.NotAfter.UTC(),
			Fingerprint: ca.CertificateFingerprint(cert.Raw), Certificate: string(ca.EncodeChain(cert)),
		}}
		switch {
		case a.State == ca.Removed:
			l.Stands = shared.Removed
		case !a.Leaving.IsZero():
			l.Stands = shared.Leaving
		}
		all = append(all, l)
	}
	return all
}
