package server

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

// authorities are the CAs of a cluster as they are stored, and what follows from that. It is immutable.
type authorities struct {
	td       spiffeid.TrustDomain
	revision uint64
	// rows are oldest first, the control CA among them.
	rows []store.Authority
	// chains are the certificates of those that have one, by ID: its own first, the root last.
	chains map[string][]*x509.Certificate
	bundle trust.Bundle
}

// newAuthorities reads the certificates of the rows and bounds each life by its chain.
func newAuthorities(td spiffeid.TrustDomain, rows []store.Authority, revision uint64, bundle trust.Bundle) (*authorities, error) {
	s := &authorities{td: td, revision: revision, rows: slices.Clone(rows), chains: map[string][]*x509.Certificate{}, bundle: bundle}
	for _, a := range s.rows {
		for _, der := range a.Chain {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, fmt.Errorf("stored certificate of %s can't be read: %w", a.ID, err)
			}
			s.chains[a.ID] = append(s.chains[a.ID], cert)
		}
	}
	for i, a := range s.rows {
		if a.Kind == ca.KindIntermediate && len(a.Chain) > 0 {
			root := s.chains[a.Root]
			if len(root) != 1 {
				return nil, fmt.Errorf("the root of %s, %s, is not stored with it", a.ID, a.Root)
			}
			s.chains[a.ID] = append(s.chains[a.ID], root[0])
		}
		s.rows[i].NotBefore, s.rows[i].NotAfter = bounds(s.chains[a.ID])
		s.rows[i].KeyFingerprint = ""
		if chain := s.chains[a.ID]; len(chain) > 0 {
			s.rows[i].KeyFingerprint = ca.KeyFingerprint(chain[0].RawSubjectPublicKeyInfo)
		}
	}
	return s, nil
}

// bounds are those of a whole chain; zero for none.
func bounds(chain []*x509.Certificate) (notBefore, notAfter time.Time) {
	for i, c := range chain {
		if i == 0 || c.NotBefore.After(notBefore) {
			notBefore = c.NotBefore
		}
		if i == 0 || c.NotAfter.Before(notAfter) {
			notAfter = c.NotAfter
		}
	}
	return notBefore, notAfter
}

// rootID names a root as all clusters do.
func rootID(root *x509.Certificate) string {
	sum := sha256.Sum256(root.Raw)
	return rotation.RootID(sum[:])
}

// lives are those that package rotation decides about.
func (s *authorities) lives() []rotation.Authority {
	var all []rotation.Authority
	for _, a := range s.rows {
		if a.Kind != ca.KindControl {
			all = append(all, a.Authority)
		}
	}
	return all
}

// row returns the stored row of an authority.
func (s *authorities) row(id string) (store.Authority, bool) {
	i := slices.IndexFunc(s.rows, func(a store.Authority) bool { return a.ID == id })
	if i < 0 {
		return store.Authority{}, false
	}
	return s.rows[i], true
}

// byKeyID returns the intermediate whose leaves point to this key identifier.
func (s *authorities) byKeyID(id []byte) (store.Authority, bool) {
	for _, a := range s.rows {
		if chain := s.chains[a.ID]; a.Kind == ca.KindIntermediate && len(chain) > 0 && bytes.Equal(chain[0].SubjectKeyId, id) {
			return a, true
		}
	}
	return store.Authority{}, false
}

// edit returns the authorities with these rows added or replaced, then with these lives. The bundle is what the roots say.
func (s *authorities) edit(lives []rotation.Authority, rows ...store.Authority) (*authorities, error) {
	all := slices.Clone(s.rows)
	for _, row := range rows {
		if i := slices.IndexFunc(all, func(a store.Authority) bool { return a.ID == row.ID }); i >= 0 {
			all[i] = row
		} else {
			all = append(all, row)
		}
	}
	for _, l := range lives {
		if i := slices.IndexFunc(all, func(a store.Authority) bool { return a.ID == l.ID }); i >= 0 {
			all[i].Authority = l
		}
	}
	next, err := newAuthorities(s.td, all, s.revision, s.bundle)
	if err != nil {
		return nil, err
	}
	var believed []*x509.Certificate
	for _, a := range next.rows {
		if a.InBundle() {
			believed = append(believed, next.chains[a.ID][0])
		}
	}
	if len(believed) == 0 {
		return next, nil
	}
	bundle, err := trust.NewBundle(s.td, s.bundle.Sequence()+1, believed)
	if err != nil {
		return nil, err
	}
	if bundle.Digest() != s.bundle.Digest() {
		next.bundle = bundle
	}
	return next, nil
}

// forget drops the oldest removed intermediates but so many, and returns their IDs. The newest number always stays, and
// that of each backend of keys, so that it does not come again.
func (s *authorities) forget(most int) (dropped []string) {
	removed, counted := 0, map[string]bool{}
	for _, a := range slices.Backward(s.rows) {
		if a.Kind != ca.KindIntermediate {
			continue
		}
		newest := !counted[a.Key.Backend]
		counted[a.Key.Backend] = true
		if a.State == ca.Removed && a.Tainted.IsZero() {
			if removed++; removed > most && !newest {
				dropped = append(dropped, a.ID)
			}
		}
	}
	if len(dropped) > 0 {
		s.rows = slices.DeleteFunc(s.rows, func(a store.Authority) bool { return slices.Contains(dropped, a.ID) })
	}
	return dropped
}

// signs reports whether an intermediate is active.
func (s *authorities) signs() bool {
	return slices.ContainsFunc(s.rows, func(a store.Authority) bool { return a.Kind == ca.KindIntermediate && a.State == ca.Active })
}

// changedRow is a row before and after; before is the zero row for a new one.
type changedRow struct{ before, after store.Authority }

// changes are the rows in which s differs from the set before it.
func (s *authorities) changes(before *authorities) []changedRow {
	var all []changedRow
	for _, a := range s.rows {
		b, _ := before.row(a.ID)
		if a.Authority != b.Authority || a.Key != b.Key || a.TaintReason != b.TaintReason || !bytes.Equal(a.CSR, b.CSR) ||
			!slices.EqualFunc(a.Chain, b.Chain, bytes.Equal) {
			all = append(all, changedRow{b, a})
		}
	}
	return all
}

// sameKey says of a CA that is new, or tainted since, which others have its key; "" = none has, or it is neither.
func (s *authorities) sameKey(c changedRow) string {
	if c.after.KeyFingerprint == "" || c.before.ID != "" && c.after.Tainted.IsZero() == c.before.Tainted.IsZero() {
		return ""
	}
	var others []string
	for _, a := range s.rows {
		if a.ID != c.after.ID && a.KeyFingerprint == c.after.KeyFingerprint {
			others = append(others, a.ID)
		}
	}
	switch {
	case len(others) == 0:
		return ""
	case c.after.Tainted.IsZero():
		return "; it replaces no key, for it has that of " + check.Some(others)
	}
	return "; it has the key of " + check.Some(others)
}

// untainted is a CA that is not taken for lost: the one of this ID, or one that has this key; "" = there is none.
func (s *authorities) untainted(id, key string) string {
	for _, a := range s.rows {
		if a.Kind != ca.KindControl && a.Tainted.IsZero() && (a.ID == id || key != "" && a.KeyFingerprint == key) {
			return a.ID
		}
	}
	return ""
}

// taint takes a CA's key for lost, see rotation.Taint.
func (s *authorities) taint(w rotation.World, id, reason string, now time.Time) (*authorities, error) {
	lives, err := rotation.Taint(w, id, now)
	if err != nil {
		return nil, err
	}
	var rows []store.Authority
	for _, a := range lives {
		if row, _ := s.row(a.ID); !a.Tainted.IsZero() && row.TaintReason == "" {
			row.TaintReason = reason
			rows = append(rows, row)
		}
	}
	return s.edit(lives, rows...)
}

// begun refuses a root whose life lies ahead: whatever is signed under it is refused until then.
func begun(root *x509.Certificate, skew time.Duration, now time.Time) error {
	if root.NotBefore.After(now.Add(skew)) {
		return fmt.Errorf("root %s begins at %s, and it is %s here: nothing under it would be accepted before; bring it in then, or set the clock right", rootID(root), stamp(root.NotBefore), stamp(now))
	}
	return nil
}

// addRoot begins to trust a root, see rotation.AddRoot.
func (s *authorities) addRoot(p rotation.Policy, w rotation.World, root *x509.Certificate, now time.Time) (*authorities, error) {
	if err := ca.CheckRoot(s.td, root, now); err != nil {
		return nil, err
	}
	id := rootID(root)
	lives, err := rotation.AddRoot(p, w, rotation.Authority{
		ID: id, NotBefore: root.NotBefore, NotAfter: root.NotAfter, KeyFingerprint: ca.KeyFingerprint(root.RawSubjectPublicKeyInfo),
	}, now)
	if err != nil {
		return nil, err
	}
	if _, ok := s.row(id); ok {
		if have := s.chains[id]; len(have) != 1 || !have[0].Equal(root) {
			return nil, fmt.Errorf("another root is known as %s: this one can't be told from it", id)
		}
		return s.edit(lives)
	}
	return s.edit(lives, store.Authority{Authority: rotation.Authority{ID: id}, Chain: [][]byte{root.Raw}, Created: now})
}

// requested finds the authority whose request a certificate answers.
func (s *authorities) requested(cluster string, cert *x509.Certificate) (store.Authority, error) {
	wanted := ""
	for _, a := range s.rows {
		if a.Kind != ca.KindIntermediate {
			continue
		}
		request, err := x509.ParseCertificateRequest(a.CSR)
		if err != nil {
			return store.Authority{}, fmt.Errorf("stored request of %s can't be read: %w", a.ID, err)
		}
		if bytes.Equal(request.RawSubjectPublicKeyInfo, cert.RawSubjectPublicKeyInfo) {
			return a, nil
		}
		if len(a.Chain) == 0 && a.State != ca.Removed || wanted == "" {
			wanted = ca.KeyFingerprint(request.RawSubjectPublicKeyInfo)
		}
	}
	if wanted == "" {
		return store.Authority{}, fmt.Errorf("cluster %s has made no request yet: run signet cluster init", cluster)
	}
	return store.Authority{}, fmt.Errorf("chain begins with %q for the key %s, but cluster %s asked for %s: the request was swapped on its way, the chain is of another cluster, or it is in the wrong order (our certificate first, the root last)",
		cert.Subject, ca.KeyFingerprint(cert.RawSubjectPublicKeyInfo), cluster, wanted)
}
