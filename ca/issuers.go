package ca

import (
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/signet-ca/signet/identity"
)

// Issuers holds the issuers of a server, of both hierarchies and in any state, behind one snapshot.
type Issuers struct {
	current atomic.Pointer[Snapshot]
}

// Snapshot is a set of issuers at one moment. It never changes.
type Snapshot struct {
	all    []*Issuer
	active map[identity.Hierarchy]*Issuer
}

// NewIssuers refuses a set in which two issuers share a name or are active in one hierarchy. An empty set issues nothing.
func NewIssuers(list ...*Issuer) (*Issuers, error) {
	s := &Issuers{}
	if err := s.Replace(list...); err != nil {
		return nil, err
	}
	return s, nil
}

// Replace sets the whole set; calls of Issue that are under way finish on the one they began with.
func (s *Issuers) Replace(list ...*Issuer) error {
	next := &Snapshot{all: slices.Clone(list), active: map[identity.Hierarchy]*Issuer{}}
	names := map[string]bool{}
	for _, i := range list {
		if names[i.name] {
			return fmt.Errorf("two issuers are named %s; give each a name of its own", i.name)
		}
		names[i.name] = true
		if i.state != Active {
			continue
		}
		if other := next.active[i.hierarchy]; other != nil {
			return fmt.Errorf("issuers %s and %s are both active in the %s hierarchy; retire one", other.name, i.name, i.hierarchy)
		}
		next.active[i.hierarchy] = i
	}
	s.current.Store(next)
	return nil
}

// Snapshot returns the present set.
func (s *Issuers) Snapshot() *Snapshot { return s.current.Load() }

// Active returns the issuer that signs new leaves of the hierarchy.
func (s *Snapshot) Active(h identity.Hierarchy) (*Issuer, bool) {
	i, ok := s.active[h]
	return i, ok
}

// All returns the issuers in the order they were given. The caller must not change it.
func (s *Snapshot) All() []*Issuer { return s.all }
