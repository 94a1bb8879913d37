package identity

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds of a registration; a set of these is kept in memory by server and agents.
const (
	MaxSelectors      = 32
	MaxSelectorLength = 1024
	MaxAgents         = 1024
	MinTTL            = 5 * time.Second
)

// Selector is one property of a workload, "type:value": "unix:uid:1000", "systemd:unit:web.service", "socket:frontend".
// Selectors are compared whole; there are no patterns.
type Selector string

// ParseSelector checks the form "type:value".
func ParseSelector(s string) (Selector, error) {
	typ, value, ok := strings.Cut(s, ":")
	if !ok || typ == "" || value == "" || len(s) > MaxSelectorLength {
		return "", fmt.Errorf("selector %q: want type:value of at most %d bytes, for example unix:uid:1000", clip(s), MaxSelectorLength)
	}
	for _, r := range s {
		if r < 0x20 || r == 0x7f {
			return "", fmt.Errorf("selector %q: control characters are not allowed", clip(s))
		}
	}
	return Selector(s), nil
}

// Registration says: a workload that shows all these selectors on one of these agents is this SPIFFE ID.
type Registration struct {
	// Name is the key, unique in a cluster, see ParseName.
	Name string
	ID   spiffeid.ID
	// Agents it is for, by name. An agent is told only its own registrations.
	Agents []string
	// Selectors must all be shown by the workload; there is at least one.
	Selectors []Selector
	// TTL is the life of a certificate from its issue; 0 = the server's default.
	TTL time.Duration
	// Priority orders the identities of a workload that matches several: the highest is its `default`,
	// equals are ordered by name.
	Priority int32
	// Revision of the whole set at which this registration last changed; set by the store.
	Revision uint64
}

// Validate checks everything about a registration that doesn't need the rest of the set, and sorts its lists.
func (r *Registration) Validate(td spiffeid.TrustDomain) error {
	if err := ParseName("registration", r.Name); err != nil {
		return err
	}
	if _, err := ParseID(r.ID.String()); err != nil {
		return fmt.Errorf("registration %s: %w", r.Name, err)
	}
	switch {
	case !r.ID.MemberOf(td):
		return fmt.Errorf("registration %s: %s is not of trust domain %s", r.Name, r.ID, td)
	case Reserved(r.ID):
		return fmt.Errorf("registration %s: %s: paths under /%s/ are reserved for Signet's own parts", r.Name, r.ID, reservedSegment)
	case len(r.Agents) == 0:
		return fmt.Errorf("registration %s names no agent: add `agents:` with the agents that may ask for it", r.Name)
	case len(r.Agents) > MaxAgents:
		return fmt.Errorf("registration %s names %d agents: at most %d are allowed", r.Name, len(r.Agents), MaxAgents)
	case len(r.Selectors) == 0:
		return fmt.Errorf("registration %s has no selectors: without them it would fit every process", r.Name)
	case len(r.Selectors) > MaxSelectors:
		return fmt.Errorf("registration %s has %d selectors: at most %d are allowed", r.Name, len(r.Selectors), MaxSelectors)
	case r.TTL != 0 && r.TTL < MinTTL:
		return fmt.Errorf("registration %s: ttl %s is shorter than the least useful %s", r.Name, r.TTL, MinTTL)
	case r.TTL%time.Second != 0:
		return fmt.Errorf("registration %s: ttl %s: X.509 counts in whole seconds", r.Name, r.TTL)
	}
	for _, a := range r.Agents {
		if err := ParseName("agent", a); err != nil {
			return fmt.Errorf("registration %s: %w", r.Name, err)
		}
	}
	for _, s := range r.Selectors {
		if _, err := ParseSelector(string(s)); err != nil {
			return fmt.Errorf("registration %s: %w", r.Name, err)
		}
	}
	slices.Sort(r.Agents)
	slices.Sort(r.Selectors)
	r.Agents, r.Selectors = slices.Compact(r.Agents), slices.Compact(r.Selectors)
	return nil
}

// For reports whether the registration names the agent.
func (r *Registration) For(agent string) bool { return slices.Contains(r.Agents, agent) }

// Matches reports whether a workload with these selectors fits. A registration without selectors fits nobody.
func (r *Registration) Matches(shown []Selector) bool {
	if len(r.Selectors) == 0 {
		return false
	}
	for _, s := range r.Selectors {
		if !slices.Contains(shown, s) {
			return false
		}
	}
	return true
}

// Match returns the registrations that fit, the workload's default first.
func Match(all []Registration, shown []Selector) []Registration {
	var fit []Registration
	for _, r := range all {
		if r.Matches(shown) {
			fit = append(fit, r)
		}
	}
	slices.SortFunc(fit, func(a, b Registration) int {
		if a.Priority != b.Priority {
			if a.Priority > b.Priority {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Name, b.Name)
	})
	return fit
}
