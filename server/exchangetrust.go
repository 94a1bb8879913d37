package server

import (
	"bytes"
	"cmp"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/rotation"
)

// What clusters share about their roots is one document. It holds, of every root, the last decision of an admin about it:
// that it is believed, or that it is leaving. Decisions are numbered for each root, and the one with the highest number holds;
// of two with the same number the stronger one: removed, leaving, believed. So documents can be put together in any order and
// any number of times, and all clusters come to the same (join). It says nothing of how far a cluster is: that is in reports.
//
// Each cluster keeps durably what it knows of the document (replica), and beside it how each root stood here when it last
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

const (
	// sharedTitle is the first line of the document, which neither a checkpoint nor a report has.
	sharedTitle = "signet shared trust v1\n"
	// maxShared bounds the document, in bytes; maxSharedRoots how many roots it may list, and maxGone how many of those are
	// removed ones.
	maxShared      = 512 << 10
	maxSharedRoots = 512
	maxGone        = 192
	// maxSharedCertificate is in bytes of PEM.
	maxSharedCertificate = 16 << 10
	// maxDecisions is where the count ends: from there on only the stronger decision prevails.
	maxDecisions = 1 << 53
	// maxJump is by how many decisions a document may be ahead of what is known here, more than admins ever take about one
	// root: nobody can bring the count to its end.
	maxJump = 1000
)

// sharedTrust is the document, in the words of `trust export --format json`.
type sharedTrust struct {
	TrustDomain string `json:"trust_domain"`
	// Cluster has written it, and signed it with the key of its log.
	Cluster string       `json:"cluster"`
	Roots   []sharedRoot `json:"roots"`
}

// sharedRoot is a root and the last decision about it.
type sharedRoot struct {
	ID string `json:"id"`
	// State is active when all agents of all clusters have been seen to believe it, published before, and removed when it is
	// only remembered.
	State   ca.State `json:"state"`
	Leaving bool     `json:"leaving"`
	Tainted bool     `json:"tainted"`
	// NotAfter is the certificate's: then it is forgotten.
	NotAfter    time.Time `json:"not_after"`
	Fingerprint string    `json:"fingerprint"`
	// Certificate is PEM; empty where State is removed.
	Certificate string `json:"certificate,omitempty"`
	// Decision counts what was decided about it; By is the cluster whose admin did so last.
	Decision uint64 `json:"decision"`
	By       string `json:"by"`
}

// standing is how a root stands, in the document or in a cluster.
type standing string

// Strongest last. A cluster that does not know a root has none of them.
const (
	rootUnknown  standing = ""
	rootBelieved standing = "believed"
	rootLeaving  standing = "leaving"
	rootRemoved  standing = "removed"
)

func (s standing) strength() int {
	return slices.Index([]standing{rootUnknown, rootBelieved, rootLeaving, rootRemoved}, s)
}

// decided is the admin's word by which a root stands so.
func (s standing) decided() standing {
	if s == rootRemoved {
		return rootLeaving
	}
	return s
}

func (r sharedRoot) standing() standing {
	switch {
	case r.State == ca.Removed:
		return rootRemoved
	case r.Leaving:
		return rootLeaving
	}
	return rootBelieved
}

func (r sharedRoot) equal(x sharedRoot) bool {
	same := r.NotAfter.Equal(x.NotAfter)
	r.NotAfter, x.NotAfter = time.Time{}, time.Time{}
	return same && r == x
}

// stateStrength orders states as a root comes to them in the document; -1 for one that is not in it.
func stateStrength(s ca.State) int {
	return slices.Index([]ca.State{ca.Published, ca.Active, ca.Removed}, s)
}

// join is what two documents say together of one root. It is commutative, associative and idempotent. A taint is for ever.
func (r sharedRoot) join(x sharedRoot) sharedRoot {
	tainted := r.Tainted || x.Tainted
	notAfter := latest(r.NotAfter, x.NotAfter)
	if c := cmp.Or(cmp.Compare(x.Decision, r.Decision), cmp.Compare(x.standing().strength(), r.standing().strength()), cmp.Compare(x.By, r.By)); c > 0 {
		r, x = x, r
	}
	if r.Decision == x.Decision && stateStrength(x.State) > stateStrength(r.State) {
		r.State = x.State
	}
	r.Tainted, r.NotAfter = tainted, notAfter
	return r
}

// joinAll puts lists together, in the order of fingerprints.
func joinAll(lists ...[]sharedRoot) []sharedRoot {
	var all []sharedRoot
	for _, list := range lists {
		for _, r := range list {
			i, ok := slices.BinarySearchFunc(all, r.Fingerprint, func(a sharedRoot, f string) int { return cmp.Compare(a.Fingerprint, f) })
			if ok {
				all[i] = all[i].join(r)
			} else {
				all = slices.Insert(all, i, r)
			}
		}
	}
	return all
}

// living leaves out what has expired, and of too many removed ones those that expire first.
func living(all []sharedRoot, now time.Time) []sharedRoot {
	all = slices.DeleteFunc(slices.Clone(all), func(r sharedRoot) bool { return now.After(r.NotAfter) })
	var gone []sharedRoot
	for _, r := range all {
		if r.State == ca.Removed {
			gone = append(gone, r)
		}
	}
	if len(gone) <= maxGone {
		return all
	}
	slices.SortFunc(gone, func(a, b sharedRoot) int {
		return cmp.Or(b.NotAfter.Compare(a.NotAfter), cmp.Compare(a.Fingerprint, b.Fingerprint))
	})
	forgotten := map[string]bool{}
	for _, r := range gone[maxGone:] {
		forgotten[r.Fingerprint] = true
	}
	return slices.DeleteFunc(all, func(r sharedRoot) bool { return forgotten[r.Fingerprint] })
}

// replica is what a cluster knows of the document, in the order of fingerprints.
type replica []replicaRoot

type replicaRoot struct {
	sharedRoot
	// Here is how it stood in this cluster at the last look.
	Here standing `json:"here,omitempty"`
}

func (r replica) roots() []sharedRoot {
	var all []sharedRoot
	for _, x := range r {
		all = append(all, x.sharedRoot)
	}
	return all
}

func (r replica) equal(x replica) bool {
	return slices.EqualFunc(r, x, func(a, b replicaRoot) bool { return a.Here == b.Here && a.equal(b.sharedRoot) })
}

func (r replica) find(fingerprint string) (replicaRoot, bool) {
	i, ok := slices.BinarySearchFunc(r, fingerprint, func(a replicaRoot, f string) int { return cmp.Compare(a.Fingerprint, f) })
	if !ok {
		return replicaRoot{}, false
	}
	return r[i], true
}

// follows reports whether a document can be what comes after what is known: who counts ahead would have the last word for
// ever, since what was taken is kept.
func (r replica) follows(theirs sharedTrust) error {
	for _, x := range theirs.Roots {
		known, _ := r.find(x.Fingerprint)
		if x.Decision > known.Decision+maxJump {
			return fmt.Errorf("cluster %s has signed decision %d about %s, and %d are known here: at most %d more are believed at once; somebody may have the key of its log: look there, then delete the document; the clusters write it again", theirs.Cluster, x.Decision, x.ID, known.Decision, maxJump)
		}
	}
	return nil
}

// localRoot is a root as it stands in this cluster. Its sharedRoot says what there is to tell of it, but for the decision.
type localRoot struct {
	sharedRoot
	stands standing
}

// meet puts together what this cluster knows, what the document says, and what was decided here since the last look. gone
// reports whether all clusters are known to have removed a root.
func (r replica) meet(theirs []sharedRoot, here []localRoot, cluster string, gone func(id string) bool, now time.Time) replica {
	all := joinAll(r.roots(), theirs)
	stands := map[string]standing{}
	for _, l := range here {
		stands[l.Fingerprint] = l.stands
		i, known := slices.BinarySearchFunc(all, l.Fingerprint, func(a sharedRoot, f string) int { return cmp.Compare(a.Fingerprint, f) })
		before, seen := r.find(l.Fingerprint)
		decided := l.stands.decided()
		ours := l.sharedRoot
		ours.State, ours.Leaving, ours.Decision, ours.By = ca.Published, decided == rootLeaving, 1, cluster
		switch {
		case !known && l.stands == rootRemoved && !gone(l.ID):
			continue // nobody else speaks of it
		case !known:
			all = slices.Insert(all, i, ours)
		case !seen:
			if both := all[i].join(ours); both.standing() != all[i].standing() {
				all[i] = both
			}
		case l.stands != before.Here && decided != before.standing().decided() && decided != all[i].standing().decided() &&
			// Of two that decide at the same time the stronger one prevails.
			(all[i].Decision == before.Decision && all[i].Decision < maxDecisions || decided.strength() > all[i].standing().strength()):
			ours.Decision = min(all[i].Decision+1, maxDecisions)
			ours.Tainted = ours.Tainted || all[i].Tainted
			all[i] = ours
		}
		x := &all[i]
		x.Tainted = x.Tainted || l.Tainted
		switch {
		case l.State == ca.Active && l.stands == rootBelieved && x.standing() == rootBelieved:
			x.State = ca.Active
		case l.stands == rootRemoved && x.standing() == rootLeaving && gone(l.ID):
			x.State, x.Certificate = ca.Removed, ""
		}
	}
	var next replica
	for _, x := range living(all, now) {
		next = append(next, replicaRoot{x, stands[x.Fingerprint]})
	}
	return next
}

// settle remembers that the roots stand as was followed. What stands otherwise is for the next look: it may be a decision.
func (r replica) settle(here []localRoot) replica {
	r = slices.Clone(r)
	for _, l := range here {
		if i := slices.IndexFunc(r, func(x replicaRoot) bool { return x.Fingerprint == l.Fingerprint }); i >= 0 && l.stands.decided() == r[i].standing().decided() {
			r[i].Here = l.stands
		}
	}
	return r
}

// shares are the roots of a cluster as the document names them. Those that were never published count as believed: somebody
// has decided so.
func (s *authorities) shares(now time.Time) []localRoot {
	var all []localRoot
	for _, a := range s.rows {
		if a.Kind != ca.KindRoot || len(s.chains[a.ID]) != 1 || now.After(a.NotAfter) {
			continue
		}
		cert := s.chains[a.ID][0]
		l := localRoot{stands: rootBelieved, sharedRoot: sharedRoot{
			ID: a.ID, State: a.State, Tainted: !a.Tainted.IsZero(), NotAfter: cert.NotAfter.UTC(),
			Fingerprint: ca.CertificateFingerprint(cert.Raw), Certificate: string(ca.EncodeChain(cert)),
		}}
		switch {
		case a.State == ca.Removed:
			l.stands = rootRemoved
		case !a.Leaving.IsZero():
			l.stands = rootLeaving
		}
		all = append(all, l)
	}
	return all
}

// encode writes the document, as it is signed.
func (s sharedTrust) encode() (string, error) {
	if len(s.Roots) > maxSharedRoots {
		return "", fmt.Errorf("the shared trust would list %d roots: at most %d are read", len(s.Roots), maxSharedRoots)
	}
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return "", err
	}
	if len(text) > maxShared {
		return "", fmt.Errorf("the shared trust would have %d bytes: at most %d are read", len(text), maxShared)
	}
	return sharedTitle + string(text) + "\n", nil
}

// openShared verifies the document and reads it. What a newer version adds is passed over; a root that is no good is taken
// as it is: each cluster judges for itself.
func openShared(signed []byte, td spiffeid.TrustDomain, writers []Peer) (sharedTrust, error) {
	// Notes are longer by a title and a signature.
	if len(signed) > maxShared+4096 {
		return sharedTrust{}, fmt.Errorf("it has %d bytes: at most %d are read", len(signed), maxShared)
	}
	for _, w := range writers {
		text, err := audit.OpenNote(signed, w.VerifierKey)
		if err != nil {
			continue
		}
		body, ok := bytes.CutPrefix([]byte(text), []byte(sharedTitle))
		if !ok {
			return sharedTrust{}, fmt.Errorf("what cluster %s has written is no shared trust that this version reads", w.Cluster)
		}
		return parseShared(body, td, w.Cluster)
	}
	return sharedTrust{}, errors.New("it is not signed by this cluster, nor by one that rotation.peers names: name the cluster that has written it, or if none has, find out who did and delete it; the clusters then write it again")
}

func parseShared(body []byte, td spiffeid.TrustDomain, writer string) (s sharedTrust, err error) {
	d := json.NewDecoder(bytes.NewReader(body))
	if err := d.Decode(&s); err != nil {
		return s, fmt.Errorf("it can't be read: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return s, errors.New("it goes on behind its end")
	}
	switch {
	case s.TrustDomain != td.Name():
		return s, fmt.Errorf("it is of trust domain %q, and this cluster is of %s: let each trust domain have a path of its own", clip(s.TrustDomain), td.Name())
	case s.Cluster != writer:
		return s, fmt.Errorf("it is of cluster %q, and signed by %s", clip(s.Cluster), writer)
	case len(s.Roots) > maxSharedRoots:
		return s, fmt.Errorf("it lists %d roots: at most %d are read", len(s.Roots), maxSharedRoots)
	}
	for i := range s.Roots {
		if err := s.Roots[i].check(); err != nil {
			return s, fmt.Errorf("root %d: %w", i+1, err)
		}
	}
	n := len(s.Roots)
	if s.Roots = joinAll(s.Roots); len(s.Roots) != n {
		return s, errors.New("it lists a root twice")
	}
	return s, nil
}

// check looks whether a root can be what a cluster has written, and brings its certificate into one form.
func (r *sharedRoot) check() error {
	fingerprint, err := ca.ParseFingerprint(r.Fingerprint)
	if err != nil {
		return err
	}
	if err := identity.ParseName("cluster", r.By); err != nil {
		return err
	}
	der, err := r.der()
	if err != nil {
		return err
	}
	switch {
	case r.ID != rotation.RootID(fingerprint[:]):
		return fmt.Errorf("its id %q is not of its fingerprint", clip(r.ID))
	case stateStrength(r.State) < 0:
		return fmt.Errorf("its state %q is none of published, active and removed", clip(string(r.State)))
	case r.Decision == 0 || r.Decision > maxDecisions:
		return fmt.Errorf("decision %d: want 1 to %d", r.Decision, uint64(maxDecisions))
	case r.NotAfter.IsZero():
		return errors.New("it has no end")
	case (r.State == ca.Removed) != (der == nil):
		return errors.New("it needs a certificate unless it is removed, and none then")
	case der != nil && !fingerprint.Of(der):
		return errors.New("its certificate is not the one of its fingerprint")
	}
	if der != nil {
		r.Certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	r.Leaving = r.Leaving || r.State == ca.Removed
	r.Fingerprint, r.NotAfter = fingerprint.String(), r.NotAfter.UTC()
	return nil
}

// der is the certificate, not parsed; nil for none.
func (r sharedRoot) der() ([]byte, error) {
	if r.Certificate == "" {
		return nil, nil
	}
	if len(r.Certificate) > maxSharedCertificate {
		return nil, fmt.Errorf("its certificate has %d bytes of PEM: at most %d are read", len(r.Certificate), maxSharedCertificate)
	}
	block, rest := pem.Decode([]byte(r.Certificate))
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("its certificate is not one certificate in PEM")
	}
	return block.Bytes, nil
}
