// Package shared is what the clusters of a trust domain share about their roots: one document (Trust), and the algebra by which
// they all come to the same. It is pure: what was read, what is known and the time go in; where things lie, when somebody looks
// and what becomes of a root are the business of package server (exchange.go, follow.go).
//
// The document holds, of every root, the last decision of an admin about it: that it is believed, or that it is leaving.
// Decisions are numbered for each root, and the one with the highest number holds; of two with the same number the stronger one:
// removed, leaving, believed. So documents can be put together in any order and any number of times (Join). It says nothing of
// how far a cluster is: that is in reports.
//
// Each cluster keeps durably what it knows of the document (Replica), and beside it how each root stood here when it last
// looked. By that, and only by that, it tells a decision that was taken here, which gets the next number, from a root that
// stands otherwise because the document was not followed yet. So:
//
//   - A document that is away, deleted, or older than what is known takes nothing back; it is written again.
//   - A cluster that was away believes roots of which the others have decided meanwhile. It has decided nothing, so it follows.
//   - A root that has gone everywhere stays listed as removed, without its certificate, until it has expired: a cluster that
//     has lost its memory too can't bring it back. Only an admin can, by adding it again.
//   - A root is listed as removed when it is removed in a cluster and all peers have reported that they know it no more. Until
//     then one that joins is told to believe it. Nobody removes a root because of the document: it begins to leave, and goes
//     when nothing depends on it (package rotation).
//
// Every cluster writes it, signed with the key of its log; one is read that this cluster, or a peer of its configuration, has
// signed (Open). Whoever can write where it lies is not trusted: he can withhold it, and show an old one, for it has no time. So
// it adds no root by itself: that takes the checks of a root and a report that holds. Its writer is believed that a root is to
// leave or is tainted, but not that one may go: that is for package rotation, which never lets the only root go. Nor can he
// count decisions to their end (Replica.Admits). docs/security-model.md says, under "With Vault", what remains.
package shared

import (
	"slices"
	"time"

	"github.com/signet-ca/signet/ca"
)

// Trust is the document, in the words of `trust export --format json`.
type Trust struct {
	TrustDomain string `json:"trust_domain"`
	// Cluster has written it, and signed it with the key of its log.
	Cluster string `json:"cluster"`
	// Roots are in the order of fingerprints, each once.
	Roots []Root `json:"roots"`
}

// Root is a root and the last decision about it.
type Root struct {
	// ID is rotation.RootID of the certificate.
	ID string `json:"id"`
	// State is active when all agents of all clusters have been seen to believe it, published before, and removed when it is
	// only remembered.
	State   ca.State `json:"state"`
	Leaving bool     `json:"leaving"`
	Tainted bool     `json:"tainted"`
	// NotAfter is the certificate's: then it is forgotten.
	NotAfter time.Time `json:"not_after"`
	// Fingerprint is the certificate's, as ca.CertificateFingerprint writes it.
	Fingerprint string `json:"fingerprint"`
	// Certificate is PEM; empty where State is removed.
	Certificate string `json:"certificate,omitempty"`
	// Decision counts what was decided about it, from 1 to MaxDecisions; By is the cluster whose admin did so last.
	Decision uint64 `json:"decision"`
	By       string `json:"by"`
}

// Standing reports how the document has the root; never Unknown.
func (r Root) Standing() Standing {
	switch {
	case r.State == ca.Removed:
		return Removed
	case r.Leaving:
		return Leaving
	}
	return Believed
}

// Equal reports whether two roots are the same and so is all that is said of them.
func (r Root) Equal(x Root) bool {
	same := r.NotAfter.Equal(x.NotAfter)
	r.NotAfter, x.NotAfter = time.Time{}, time.Time{}
	return same && r == x
}

// Standing is how a root stands, in the document or in a cluster.
type Standing string

// Strongest last.
const (
	// Unknown: the cluster has never had it, or forgot it when it had expired.
	Unknown Standing = ""
	// Believed: it is to be believed, or is already.
	Believed Standing = "believed"
	// Leaving: it is on its way out, and believed as long as something depends on it.
	Leaving Standing = "leaving"
	// Removed: it is believed no more, and only remembered so that nobody brings it back unasked.
	Removed Standing = "removed"
)

// strength orders standings: of two decisions with the same number the stronger one holds.
func (s Standing) strength() int {
	return slices.Index([]Standing{Unknown, Believed, Leaving, Removed}, s)
}

// Decided is the admin's word by which a root stands so: nobody decides that one is removed, it only leaves until it may be.
func (s Standing) Decided() Standing {
	if s == Removed {
		return Leaving
	}
	return s
}
