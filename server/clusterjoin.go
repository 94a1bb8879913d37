package server

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

// Trust is what a cluster believes, as it tells one that joins while roots are being replaced: it has to believe all that
// the others believe, before its first agent asks.
type Trust struct {
	// Cluster is whose set it is.
	Cluster string
	Roots   []TrustedRoot
	// Digest is what the admin was told the set's is, by another way than the set. It speaks for the certificates alone: by
	// what is said about them nobody is believed who is not in the set.
	Digest string
}

// TrustedRoot is a root and how it stands in the cluster that believes it.
type TrustedRoot struct {
	Certificate *x509.Certificate
	// State is published, active or retired.
	State            ca.State
	Leaving, Tainted bool
}

// blind reports whether the cluster has not begun, and there are others whose set it would have to believe.
func (k *keeper) blind() bool { return k.current.Load().bundle.IsZero() && len(k.policy.Peers) > 0 }

// peerNames names the other clusters.
func (k *keeper) peerNames() string {
	var names []string
	for _, p := range k.policy.Peers {
		names = append(names, p.Cluster)
	}
	return check.Some(names)
}

func (t Trust) isZero() bool { return t.Cluster == "" && len(t.Roots) == 0 && t.Digest == "" }

// trustOf is the set of a request.
func trustOf(r *adminv1.InstallAuthoritiesRequest) (Trust, error) {
	if r.Trust == nil {
		return Trust{}, nil
	}
	t := Trust{Cluster: r.Trust.Cluster, Digest: r.Trust.Digest}
	if len(r.Trust.Roots) > trust.MaxRoots {
		return t, fmt.Errorf("%d trusted roots: at most %d are allowed", len(r.Trust.Roots), trust.MaxRoots)
	}
	for i, m := range r.Trust.Roots {
		cert, err := x509.ParseCertificate(m.Certificate)
		if err != nil {
			return t, fmt.Errorf("trusted root %d can't be read: %w", i+1, err)
		}
		t.Roots = append(t.Roots, TrustedRoot{Certificate: cert, State: ca.State(m.State), Leaving: m.Leaving, Tainted: m.Tainted})
	}
	return t, nil
}

// check compares the set with what its digest says, and each root with what a root of the trust domain is. Expired ones are
// left out.
func (t Trust) check(k *keeper, now time.Time) ([]TrustedRoot, error) {
	if err := identity.ParseName("cluster", t.Cluster); err != nil {
		return nil, fmt.Errorf("trusted roots: %w", err)
	}
	digest, err := ca.ParseFingerprint(t.Digest)
	if err != nil {
		return nil, fmt.Errorf("digest of the trusted roots: %w", err)
	}
	var certs []*x509.Certificate
	for _, r := range t.Roots {
		certs = append(certs, r.Certificate)
	}
	b, err := trust.NewBundle(k.folder.TrustDomain, 1, certs)
	if err != nil {
		return nil, fmt.Errorf("trusted roots of cluster %s: %w", t.Cluster, err)
	}
	if got := b.Digest(); ca.Fingerprint(got) != digest {
		return nil, fmt.Errorf("the digest of the trusted roots is %s, but the one given is another: a root was added, left out or changed on its way, or the set has changed since; ask cluster %s which digest is right before you install anything", TrustDigest(got), t.Cluster)
	}
	var roots []TrustedRoot
	for _, r := range t.Roots {
		if now.After(r.Certificate.NotAfter) {
			continue
		}
		if err := ca.CheckRoot(k.folder.TrustDomain, r.Certificate, now); err != nil {
			return nil, fmt.Errorf("trusted roots of cluster %s: %w", t.Cluster, err)
		}
		switch r.State {
		case ca.Published, ca.Active, ca.Retired:
		default:
			return nil, fmt.Errorf("trusted roots of cluster %s: %s is %q, and only published, active or retired ones are believed", t.Cluster, rootID(r.Certificate), clip(string(r.State)))
		}
		roots = append(roots, r)
	}
	return roots, nil
}

// TrustDigest writes the digest of a bundle for people, who compare it.
func TrustDigest(d trust.Digest) string { return fmt.Sprintf("SHA256:%x", d[:]) }

// unfit says why nothing may begin to be signed under a root; "" = it may.
func (r TrustedRoot) unfit() string {
	switch {
	case r.Tainted:
		return "is tainted"
	case r.State == ca.Retired || r.Leaving:
		return "is being removed"
	case r.State != ca.Active:
		return "is not believed by all agents yet"
	}
	return ""
}

// fit are the roots of a set under which a cluster may begin to sign. While the others wait for the root that is to replace
// theirs, and so for this cluster too, that is the one that leaves: they keep it as long as one that they name signs under it.
func fit(roots []TrustedRoot) []TrustedRoot {
	may := func(is func(TrustedRoot) bool) []TrustedRoot {
		return slices.DeleteFunc(slices.Clone(roots), func(r TrustedRoot) bool { return !is(r) })
	}
	if stay := may(func(r TrustedRoot) bool { return r.unfit() == "" }); len(stay) > 0 {
		return stay
	}
	return may(func(r TrustedRoot) bool { return r.State == ca.Active && !r.Tainted })
}

// join adds the roots that another cluster believes and this one does not know, and refuses chains under those that are on
// their way out. What is known here stays as it is, so that an old set turns nothing back.
func (k *keeper) join(set *authorities, t Trust, chains [][]*x509.Certificate, now time.Time) (*authorities, error) {
	if t.isZero() {
		return set, nil
	}
	roots, err := t.check(k, now)
	if err != nil {
		return nil, err
	}
	var under []string
	for _, chain := range chains {
		if row, err := set.requested(k.folder.Cluster, chain[0]); err == nil && len(row.Chain) > 0 {
			continue // installed before: nothing begins
		}
		if err := k.mayJoin(t, roots, chain[len(chain)-1]); err != nil {
			return nil, err
		}
		under = append(under, rootID(chain[len(chain)-1]))
	}
	var rows []store.Authority
	w := rotation.World{Authorities: set.lives(), Peers: k.heard()}
	for _, r := range roots {
		if r.Tainted {
			w.Authorities = append(w.Authorities, r.life(now))
		}
	}
	for _, r := range roots {
		id := rootID(r.Certificate)
		if _, known := set.row(id); known || slices.ContainsFunc(rows, func(a store.Authority) bool { return a.ID == id }) {
			continue
		}
		row := store.Authority{
			Authority: rotation.Authority{ID: id, Kind: ca.KindRoot, State: ca.Published, Since: now}, Chain: [][]byte{r.Certificate.Raw}, Created: now,
		}
		if r.State == ca.Retired {
			row.State = ca.Retired
		}
		if r.State == ca.Retired || r.Leaving {
			// What the cluster begins under leaves when it starts its own rotation to the root that follows.
			if !k.blind() || !slices.Contains(under, id) {
				row.Leaving = now
			}
			// Only peers can say when nothing of theirs needs it any more. Without them it would go at once.
			if !slices.ContainsFunc(k.policy.Peers, func(p Peer) bool { return p.Cluster == t.Cluster }) {
				return nil, fmt.Errorf("cluster %s still needs %s, which it is removing: name it with its log verifier key under rotation.peers, so that this cluster knows how long", t.Cluster, id)
			}
		}
		if r.Tainted {
			row.Tainted, row.TaintReason = now, "tainted in cluster "+t.Cluster
		} else if err := w.LostKey(r.life(now)); err != nil {
			return nil, fmt.Errorf("trusted roots of cluster %s: %w", t.Cluster, err)
		}
		rows = append(rows, row)
	}
	if len(rows) == 0 {
		return set, nil
	}
	if set, err = set.edit(nil, rows...); err != nil {
		return nil, err
	}
	// What is known here and has a key that is lost there is lost here too.
	for _, row := range rows {
		if added, _ := set.row(row.ID); !added.Tainted.IsZero() && set.untainted("", added.KeyFingerprint) != "" {
			if set, err = set.taint(rotation.World{Authorities: set.lives()}, row.ID, row.TaintReason, now); err != nil {
				return nil, err
			}
		}
	}
	return set, nil
}

// life is the root as package rotation decides about it.
func (r TrustedRoot) life(now time.Time) rotation.Authority {
	a := rotation.Authority{ID: rootID(r.Certificate), Kind: ca.KindRoot, KeyFingerprint: ca.KeyFingerprint(r.Certificate.RawSubjectPublicKeyInfo)}
	if r.Tainted {
		a.Tainted = now
	}
	return a
}

// mayJoin refuses a chain under a root that nobody should begin to sign under, and names one that is right.
func (k *keeper) mayJoin(t Trust, roots []TrustedRoot, above *x509.Certificate) error {
	var names []string
	for _, r := range fit(roots) {
		if r.Certificate.Equal(above) {
			return nil
		}
		names = append(names, fmt.Sprintf("%s (%s)", rootID(r.Certificate), ca.CertificateFingerprint(r.Certificate.Raw)))
	}
	why := "is not believed"
	for _, r := range roots {
		if r.Certificate.Equal(above) {
			why = r.unfit()
		}
	}
	advice := "have the request signed by " + strings.Join(names, " or ")
	if len(names) == 0 {
		advice = "no root of the set may be signed under now: wait until one is active there (signet trust list), and have the request signed by that"
	}
	return errors.New("the chain leads to root " + rootID(above) + ", which in cluster " + t.Cluster + " " + why + ": " + advice)
}
