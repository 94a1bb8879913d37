package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

// Authority is a CA, or one in the making: a root that is believed, an issuer with its key, the control CA.
// Of the times of its life, NotBefore and NotAfter are not kept: they are in the certificates.
type Authority struct {
	rotation.Authority
	// Key is zero for a root.
	Key keystore.Ref
	// Chain is the CA's certificate, then those above it, DER, without the mesh root where it is not that itself; empty
	// while it is unsigned.
	Chain [][]byte
	// CSR is what an upstream authority was asked to sign, DER; nil for what signs itself.
	CSR     []byte
	Created time.Time
	// TaintReason is why its key is taken for lost.
	TaintReason string
}

// Hierarchy is the one the authority belongs to.
func (a Authority) Hierarchy() identity.Hierarchy {
	if a.Kind == ca.KindControl {
		return identity.ControlPlane
	}
	return identity.Mesh
}

// Authorities returns all authorities, oldest first, and the revision of the set.
func (s *Store) Authorities(ctx context.Context) ([]Authority, uint64, error) {
	var all []Authority
	var revision uint64
	err := s.read(ctx, "read the authorities", func(tx *sql.Tx) error {
		if err := tx.QueryRowContext(ctx, `SELECT value FROM revisions WHERE name = 'authorities'`).Scan(&revision); err != nil {
			return err
		}
		at := map[string]int{}
		if err := query(ctx, tx, func(scan func(...any) error) error {
			a, err := scanAuthority(scan)
			if err != nil {
				return err
			}
			at[a.ID] = len(all)
			all = append(all, a)
			return nil
		}, `SELECT id, kind, root, state, since, wanted, leaving, aborted, tainted, taint_reason, leaves_until, key, csr, created
			FROM authorities ORDER BY created, id`); err != nil {
			return err
		}
		return query(ctx, tx, func(scan func(...any) error) error {
			var id string
			var der []byte
			if err := scan(&id, &der); err != nil {
				return err
			}
			i, ok := at[id]
			if !ok {
				return refuse("the chain of authority %s is stored without it", id)
			}
			all[i].Chain = append(all[i].Chain, der)
			return nil
		}, `SELECT authority, der FROM authority_certificates ORDER BY authority, position`)
	})
	if err != nil {
		return nil, 0, err
	}
	return all, revision, nil
}

func scanAuthority(scan func(...any) error) (a Authority, err error) {
	var state, key string
	var kind, root, reason sql.NullString
	var since, leaving, aborted, tainted, leaves, wanted sql.NullInt64
	var created int64
	if err := scan(&a.ID, &kind, &root, &state, &since, &wanted, &leaving, &aborted, &tainted, &reason, &leaves, &key, &a.CSR, &created); err != nil {
		return a, err
	}
	if key != "" {
		if a.Key, err = keystore.ParseRef(key); err != nil {
			return a, refuse("stored authority %s: %w", a.ID, err)
		}
	}
	a.Kind, a.Root, a.State, a.TaintReason = kind.String, root.String, ca.State(state), reason.String
	a.Since, a.Leaving, a.Aborted = fromNullNano(since), fromNullNano(leaving), fromNullNano(aborted)
	a.Tainted, a.LeavesUntil = fromNullNano(tainted), fromNullNano(leaves)
	a.Wanted, a.Created = wanted.Int64 != 0, fromNano(created)
	if err := checkAuthority(a); err != nil {
		return a, refuse("stored %w", err)
	}
	return a, nil
}

// maxChain bounds an authority's chain.
const maxChain = 8

func checkAuthority(a Authority) error {
	switch {
	case a.ID == "" || len(a.ID) > 255:
		return fmt.Errorf("authority id of %d bytes: want 1 to 255", len(a.ID))
	case !slices.Contains([]string{ca.KindRoot, ca.KindIntermediate, ca.KindControl}, a.Kind):
		return fmt.Errorf("authority %s is of no known kind: %.32q", a.ID, a.Kind)
	case !slices.Contains([]ca.State{ca.Prepared, ca.Published, ca.Active, ca.Retired, ca.Removed}, a.State):
		return fmt.Errorf("authority %s is in no known state: %.32q", a.ID, a.State)
	case a.Key.IsZero() != (a.Kind == ca.KindRoot):
		return fmt.Errorf("authority %s: roots are kept without a key, others with a reference to theirs", a.ID)
	case len(a.Chain) > maxChain:
		return fmt.Errorf("authority %s has a chain of %d certificates: at most %d are allowed", a.ID, len(a.Chain), maxChain)
	case a.Created.IsZero():
		return fmt.Errorf("authority %s has no time of creation", a.ID)
	}
	return nil
}

// AuthorityChange is a change of the authorities upon revision Base, by which they become revision Next, a greater one. Put is
// kept, each as a whole, Drop is dropped, and Bundle, unless it is zero, becomes the trust bundle.
type AuthorityChange struct {
	Base, Next uint64
	Put        []Authority
	Drop       []string
	Bundle     trust.Bundle
}

// ChangeAuthorities makes a change in one transaction, since neither authorities nor bundle may be without the other.
// ErrConflict, trust.ErrRollback.
func (s *Store) ChangeAuthorities(ctx context.Context, c AuthorityChange) error {
	if c.Next <= c.Base || c.Next > math.MaxInt64 {
		return fmt.Errorf("revision %d upon %d of the authorities can't be kept", c.Next, c.Base)
	}
	for _, a := range c.Put {
		if err := checkAuthority(a); err != nil {
			return err
		}
		if _, err := keystore.ParseRef(a.Key.String()); err != nil && !a.Key.IsZero() {
			return fmt.Errorf("authority %s: %w", a.ID, err)
		}
	}
	return s.write(ctx, "change the authorities", func(tx *sql.Tx) error {
		n, err := affected(tx.ExecContext(ctx, `UPDATE revisions SET value = $1 WHERE name = 'authorities' AND value = $2`, int64(c.Next), int64(c.Base)))
		if err != nil {
			return err
		}
		if n == 0 {
			return refuse("change the authorities upon revision %d: %w", c.Base, ErrConflict)
		}
		for _, a := range c.Put {
			if err := putAuthority(ctx, tx, a); err != nil {
				return err
			}
		}
		for _, id := range c.Drop {
			if _, err := tx.ExecContext(ctx, `DELETE FROM authorities WHERE id = $1`, id); err != nil {
				return err
			}
		}
		if c.Bundle.IsZero() {
			return nil
		}
		return putBundle(ctx, tx, c.Bundle)
	})
}

func putAuthority(ctx context.Context, tx *sql.Tx, a Authority) error {
	key := ""
	if !a.Key.IsZero() {
		key = a.Key.String()
	}
	var wanted int64
	if a.Wanted {
		wanted = 1
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO authorities
			(id, kind, root, state, since, wanted, leaving, aborted, tainted, taint_reason, leaves_until, key, csr, created)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
		ON CONFLICT (id) DO UPDATE SET kind = excluded.kind, root = excluded.root, state = excluded.state, since = excluded.since,
			wanted = excluded.wanted, leaving = excluded.leaving, aborted = excluded.aborted, tainted = excluded.tainted, taint_reason = excluded.taint_reason,
			leaves_until = excluded.leaves_until, key = excluded.key, csr = excluded.csr, created = excluded.created`,
		a.ID, a.Kind, a.Root, string(a.State), toNullNano(a.Since), wanted, toNullNano(a.Leaving), toNullNano(a.Aborted), toNullNano(a.Tainted),
		a.TaintReason, toNullNano(a.LeavesUntil), key, a.CSR, a.Created.UnixNano()); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, `DELETE FROM authority_certificates WHERE authority = $1`, a.ID); err != nil {
		return err
	}
	for i, der := range a.Chain {
		if _, err := tx.ExecContext(ctx, `INSERT INTO authority_certificates (authority, position, der) VALUES ($1, $2, $3)`, a.ID, i, der); err != nil {
			return err
		}
	}
	return nil
}

// ExtendLeaves notes that leaves under these issuers, and so under the roots above them, may live until then at least. What
// lives longer by what is stored stays. It is a new revision of the set if it changes anything, so that nothing is decided by
// the times before. It reports whether it did.
func (s *Store) ExtendLeaves(ctx context.Context, issuers []string, until time.Time) (extended bool, err error) {
	err = s.write(ctx, "extend the time that leaves may live", func(tx *sql.Tx) error {
		var changed int64
		for _, id := range issuers {
			n, err := affected(tx.ExecContext(ctx, `UPDATE authorities SET leaves_until = $1
				WHERE (id = $2 OR id = (SELECT root FROM authorities WHERE id = $2)) AND (leaves_until IS NULL OR leaves_until < $1)`,
				until.UnixNano(), id))
			if err != nil {
				return err
			}
			changed += n
		}
		if extended = changed > 0; !extended {
			return nil
		}
		_, err := tx.ExecContext(ctx, `UPDATE revisions SET value = value + 1 WHERE name = 'authorities'`)
		return err
	})
	return extended, err
}

// Bundle returns the trust domain's bundle, and whether there is one.
func (s *Store) Bundle(ctx context.Context, td spiffeid.TrustDomain) (trust.Bundle, bool, error) {
	var b trust.Bundle
	err := s.read(ctx, "read the trust bundle of "+td.Name(), func(tx *sql.Tx) error {
		var sequence uint64
		var digest []byte
		row := tx.QueryRowContext(ctx, `SELECT sequence, digest FROM bundles WHERE trust_domain = $1`, td.Name())
		if err := row.Scan(&sequence, &digest); errors.Is(err, sql.ErrNoRows) {
			return nil
		} else if err != nil {
			return err
		}
		var roots []*x509.Certificate
		if err := query(ctx, tx, func(scan func(...any) error) error {
			var der []byte
			if err := scan(&der); err != nil {
				return err
			}
			root, err := x509.ParseCertificate(der)
			if err != nil {
				return refuse("stored trust bundle of %s: %w", td, err)
			}
			roots = append(roots, root)
			return nil
		}, `SELECT der FROM bundle_roots WHERE trust_domain = $1 ORDER BY position`, td.Name()); err != nil {
			return err
		}
		read, err := trust.NewBundle(td, sequence, roots)
		if err != nil {
			return refuse("stored %w", err)
		}
		if d := read.Digest(); !bytes.Equal(d[:], digest) {
			return refuse("stored trust bundle of %s, sequence %d, does not have the digest it was stored with: its roots were changed behind Signet's back", td, sequence)
		}
		b = read
		return nil
	})
	if err != nil {
		return trust.Bundle{}, false, err
	}
	return b, !b.IsZero(), nil
}

// putBundle keeps a newer bundle of its trust domain. The same one again changes nothing; an older one, or another one with
// the same sequence, is trust.ErrRollback.
func putBundle(ctx context.Context, tx *sql.Tx, b trust.Bundle) error {
	if b.Sequence() > math.MaxInt64 {
		return refuse("trust bundle of %q with sequence %d can't be kept", b.TrustDomain().Name(), b.Sequence())
	}
	td, digest := b.TrustDomain().Name(), b.Digest()
	n, err := affected(tx.ExecContext(ctx, `INSERT INTO bundles (trust_domain, sequence, digest) VALUES ($1, $2, $3)
		ON CONFLICT (trust_domain) DO UPDATE SET sequence = excluded.sequence, digest = excluded.digest
		WHERE bundles.sequence < excluded.sequence`, td, int64(b.Sequence()), digest[:]))
	if err != nil {
		return err
	}
	if n == 0 {
		var sequence uint64
		var old []byte
		if err := tx.QueryRowContext(ctx, `SELECT sequence, digest FROM bundles WHERE trust_domain = $1`, td).Scan(&sequence, &old); err != nil {
			return err
		}
		if sequence == b.Sequence() && bytes.Equal(old, digest[:]) {
			return nil
		}
		return refuse("trust bundle of %s, sequence %d, over sequence %d: %w", td, b.Sequence(), sequence, trust.ErrRollback)
	}
	if _, err := tx.ExecContext(ctx, `DELETE FROM bundle_roots WHERE trust_domain = $1`, td); err != nil {
		return err
	}
	for i, root := range b.Roots() {
		if _, err := tx.ExecContext(ctx, `INSERT INTO bundle_roots (trust_domain, position, der) VALUES ($1, $2, $3)`, td, i, root.Raw); err != nil {
			return err
		}
		sum := sha256.Sum256(root.Raw)
		if _, err := tx.ExecContext(ctx, `INSERT INTO bundle_history (sequence, digest, root) VALUES ($1, $2, $3)`, int64(b.Sequence()), digest[:], rotation.RootID(sum[:])); err != nil {
			return err
		}
	}
	return nil
}

// PastBundle is what a bundle of the past held.
type PastBundle struct {
	Sequence uint64
	Digest   trust.Digest
	// Roots by their IDs.
	Roots []string
}

// BundleHistory returns the bundles of our own trust domain, oldest first.
func (s *Store) BundleHistory(ctx context.Context) ([]PastBundle, error) {
	var all []PastBundle
	err := s.read(ctx, "read the history of the trust bundle", func(tx *sql.Tx) error {
		return query(ctx, tx, func(scan func(...any) error) error {
			var b PastBundle
			var digest []byte
			var root string
			if err := scan(&b.Sequence, &digest, &root); err != nil {
				return err
			}
			if len(digest) != len(b.Digest) {
				return refuse("stored digest of trust bundle %d has %d bytes", b.Sequence, len(digest))
			}
			b.Digest = trust.Digest(digest)
			if n := len(all); n == 0 || all[n-1].Sequence != b.Sequence {
				all = append(all, b)
			}
			last := &all[len(all)-1]
			last.Roots = append(last.Roots, root)
			return nil
		}, `SELECT sequence, digest, root FROM bundle_history ORDER BY sequence, root`)
	})
	return all, err
}

// PeerReports returns the newest report of each peer, as it was signed, by cluster.
func (s *Store) PeerReports(ctx context.Context) (map[string][]byte, error) {
	all := map[string][]byte{}
	err := s.read(ctx, "read the peers' reports", func(tx *sql.Tx) error {
		return query(ctx, tx, func(scan func(...any) error) error {
			var cluster string
			var note []byte
			err := scan(&cluster, &note)
			all[cluster] = note
			return err
		}, `SELECT cluster, note FROM peer_reports`)
	})
	return all, err
}

// PutPeerReports keeps peers' reports, by cluster, in the place of those before: all of them or none.
func (s *Store) PutPeerReports(ctx context.Context, notes map[string][]byte) error {
	return s.write(ctx, "keep the reports of peers", func(tx *sql.Tx) error {
		for cluster, note := range notes {
			if _, err := tx.ExecContext(ctx, `INSERT INTO peer_reports (cluster, note) VALUES ($1, $2)
				ON CONFLICT (cluster) DO UPDATE SET note = excluded.note`, cluster, note); err != nil {
				return err
			}
		}
		return nil
	})
}

// SharedTrust returns what PutSharedTrust has kept; nil for nothing.
func (s *Store) SharedTrust(ctx context.Context, td spiffeid.TrustDomain) ([]byte, error) {
	var roots []byte
	err := s.read(ctx, "read the shared trust of "+td.Name(), func(tx *sql.Tx) error {
		err := tx.QueryRowContext(ctx, `SELECT roots FROM shared_trust WHERE trust_domain = $1`, td.Name()).Scan(&roots)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		return err
	})
	return roots, err
}

// PutSharedTrust keeps what the clusters have decided about their roots, in the place of what was kept before.
func (s *Store) PutSharedTrust(ctx context.Context, td spiffeid.TrustDomain, roots []byte) error {
	return s.write(ctx, "keep the shared trust of "+td.Name(), func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO shared_trust (trust_domain, roots) VALUES ($1, $2)
			ON CONFLICT (trust_domain) DO UPDATE SET roots = excluded.roots`, td.Name(), roots)
		return err
	})
}

// BannedIdentity is an identity that nobody gets a certificate for.
type BannedIdentity struct {
	ID     spiffeid.ID
	Since  time.Time
	Reason string
}

// BannedIdentities returns them by SPIFFE ID.
func (s *Store) BannedIdentities(ctx context.Context) ([]BannedIdentity, error) {
	var all []BannedIdentity
	err := s.read(ctx, "read the banned identities", func(tx *sql.Tx) error {
		return query(ctx, tx, func(scan func(...any) error) error {
			var id string
			var since int64
			var b BannedIdentity
			if err := scan(&id, &since, &b.Reason); err != nil {
				return err
			}
			var err error
			if b.ID, err = identity.ParseID(id); err != nil {
				return refuse("stored ban: %w", err)
			}
			b.Since = fromNano(since)
			all = append(all, b)
			return nil
		}, `SELECT spiffe_id, since, reason FROM banned_identities ORDER BY spiffe_id`)
	})
	return all, err
}

// BanIdentity keeps a ban; one that is there stays as it is.
func (s *Store) BanIdentity(ctx context.Context, b BannedIdentity) error {
	return s.write(ctx, "ban "+b.ID.String(), func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO banned_identities (spiffe_id, since, reason) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING`,
			b.ID.String(), b.Since.UnixNano(), b.Reason)
		return err
	})
}

// UnbanIdentity lifts a ban.
func (s *Store) UnbanIdentity(ctx context.Context, id spiffeid.ID) error {
	return s.write(ctx, "lift the ban of "+id.String(), func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `DELETE FROM banned_identities WHERE spiffe_id = $1`, id.String())
		return err
	})
}
