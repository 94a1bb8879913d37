// Package trust holds what trust domains believe: for each, a bundle of roots with a durable sequence and a digest,
// and who wants to hear of changes.
//
// Bundles of different trust domains are never merged (SPIFFE Federation §4.2). Where a bundle is kept over restarts
// is the business of the server's store and of the agent's state folder.
package trust

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/internal/bell"
)

// Digest is the SHA-256 over the sorted DER of a bundle's roots, each preceded by its length.
// Acknowledgements are keyed by it, because it says what somebody believes, not what it was numbered.
type Digest [sha256.Size]byte

func (d Digest) String() string { return hex.EncodeToString(d[:8]) }

// Version names a bundle by what it holds and as which it was published: the same content may be published again, after
// other content. The zero value names none.
type Version struct {
	Sequence uint64
	Digest   Digest
}

func (v Version) String() string { return fmt.Sprintf("%d of digest %s", v.Sequence, v.Digest) }

// Bundle is an immutable set of roots. The zero value is no bundle.
type Bundle struct {
	td       spiffeid.TrustDomain
	sequence uint64
	digest   Digest
	roots    []*x509.Certificate
	pem      []byte
}

// MaxRoots bounds a bundle.
const MaxRoots = 64

// NewBundle makes a bundle of at least one root. Each must be a CA certificate; repeated roots are taken once.
// Roots are ordered by their DER, so that equal sets give equal bytes.
func NewBundle(td spiffeid.TrustDomain, sequence uint64, roots []*x509.Certificate) (Bundle, error) {
	switch {
	case td.IsZero():
		return Bundle{}, errors.New("bundle without a trust domain")
	case sequence == 0:
		return Bundle{}, fmt.Errorf("bundle of %s: sequence 0; sequences begin with 1", td)
	case len(roots) == 0:
		return Bundle{}, fmt.Errorf("bundle of %s has no root", td)
	case len(roots) > MaxRoots:
		return Bundle{}, fmt.Errorf("bundle of %s has %d roots: at most %d are allowed", td, len(roots), MaxRoots)
	}
	b := Bundle{td: td, sequence: sequence, roots: slices.Clone(roots)}
	slices.SortFunc(b.roots, func(x, y *x509.Certificate) int { return bytes.Compare(x.Raw, y.Raw) })
	b.roots = slices.CompactFunc(b.roots, (*x509.Certificate).Equal)
	h := sha256.New()
	var text bytes.Buffer
	for _, r := range b.roots {
		if !r.BasicConstraintsValid || !r.IsCA {
			return Bundle{}, fmt.Errorf("bundle of %s: %q is not a CA certificate", td, r.Subject)
		}
		fmt.Fprintf(h, "%d:", len(r.Raw))
		h.Write(r.Raw)
		if err := pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: r.Raw}); err != nil {
			return Bundle{}, fmt.Errorf("bundle of %s: %w", td, err)
		}
	}
	h.Sum(b.digest[:0])
	b.pem = text.Bytes()
	return b, nil
}

// IsZero reports whether there is no bundle.
func (b Bundle) IsZero() bool { return b.sequence == 0 }

// TrustDomain is whose roots these are.
func (b Bundle) TrustDomain() spiffeid.TrustDomain { return b.td }

// Sequence grows with every change of content, over restarts.
func (b Bundle) Sequence() uint64 { return b.sequence }

// Digest identifies the content.
func (b Bundle) Digest() Digest { return b.digest }

// Version names the bundle.
func (b Bundle) Version() Version { return Version{b.sequence, b.digest} }

// Roots returns a copy of the list.
func (b Bundle) Roots() []*x509.Certificate { return slices.Clone(b.roots) }

// PEM returns the roots in PEM, in a fixed order. The caller must not change it.
func (b Bundle) PEM() []byte { return b.pem }

// Pool returns the roots as a pool for verification.
func (b Bundle) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	for _, r := range b.roots {
		p.AddCert(r)
	}
	return p
}

// ErrRollback says that an older bundle, or another one with the same sequence, was offered.
var ErrRollback = errors.New("older or conflicting trust bundle")

// Bundles is the current bundle of every trust domain, and a bell that rings at changes. The zero value is ready.
type Bundles struct {
	changed bell.Bell

	mu      sync.Mutex
	current map[spiffeid.TrustDomain]Bundle
}

// Get returns the current bundle of the trust domain.
func (s *Bundles) Get(td spiffeid.TrustDomain) (Bundle, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.current[td]
	return b, ok
}

// Set takes a newer bundle. The same one again changes nothing; an older one, or other content under the same sequence,
// is ErrRollback: trust must not be turned back by replaying what was once true.
func (s *Bundles) Set(b Bundle) error {
	if b.IsZero() {
		return errors.New("empty trust bundle")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.current[b.td]; ok {
		if old.sequence == b.sequence && old.digest == b.digest {
			return nil
		}
		if b.sequence <= old.sequence {
			return fmt.Errorf("bundle of %s, sequence %d digest %s offered over sequence %d digest %s: %w",
				b.td, b.sequence, b.digest, old.sequence, old.digest, ErrRollback)
		}
	}
	if s.current == nil {
		s.current = map[spiffeid.TrustDomain]Bundle{}
	}
	s.current[b.td] = b
	s.changed.Ring()
	return nil
}

// Changed returns a channel that is closed at the next change. Take it before Get, or a change between is missed.
func (s *Bundles) Changed() <-chan struct{} { return s.changed.Next() }
