package identity

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

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

// ParseSelector checks the form "type:value", and the value where Signet attests the type. Types, and kinds of unix and
// systemd selectors, that only a newer Signet knows are left alone: they match nothing here.
func ParseSelector(s string) (Selector, error) {
	typ, value, ok := strings.Cut(s, ":")
	if !ok || typ == "" || value == "" || len(s) > MaxSelectorLength {
		return "", fmt.Errorf("selector %q: want type:value of at most %d bytes, for example unix:uid:1000", clip(s), MaxSelectorLength)
	}
	if !printable(s) {
		return "", fmt.Errorf("selector %q: only printable characters are allowed", clip(s))
	}
	if check, ok := selectorTypes[typ]; ok {
		if want := check(value); want != "" && Selector(s).knownKind() {
			return "", fmt.Errorf("selector %q: want %s", clip(s), want)
		}
	}
	return Selector(s), nil
}

// known refuses a type that nothing here attests: in a registration it is a slip, and would only show when no workload fits.
func (s Selector) known() error {
	typ, _, _ := strings.Cut(string(s), ":")
	if _, ok := selectorTypes[typ]; !ok {
		return fmt.Errorf("selector %q: there is no type %q; the types are %s", clip(string(s)), clip(typ), strings.Join(slices.Sorted(maps.Keys(selectorTypes)), ", "))
	}
	if !s.knownKind() {
		_, value, _ := strings.Cut(string(s), ":")
		return fmt.Errorf("selector %q: want %s", clip(string(s)), selectorTypes[typ](value))
	}
	return nil
}

// selectorKinds are the kinds of the types that have some.
var selectorKinds = map[string][]string{
	"unix":    {"uid", "gid", "supplementary_gid", "path", "sha256"},
	"systemd": {"unit"},
}

// knownKind reports whether the selector's kind is one that is attested here; a type without kinds has no unknown ones.
func (s Selector) knownKind() bool {
	typ, value, _ := strings.Cut(string(s), ":")
	kinds, ok := selectorKinds[typ]
	kind, _, _ := strings.Cut(value, ":")
	return !ok || slices.Contains(kinds, kind)
}

// selectorTypes check the part after the type, and say what it should have been when it is wrong.
var selectorTypes = map[string]func(value string) (want string){
	"unix": func(value string) string {
		kind, v, _ := strings.Cut(value, ":")
		switch kind {
		case "uid", "gid", "supplementary_gid":
			// Compared as text, so that there is one way to write a number.
			if n, err := strconv.ParseUint(v, 10, 32); err != nil || strconv.FormatUint(n, 10) != v {
				return "unix:" + kind + ":N with a decimal number, for example unix:" + kind + ":1000"
			}
			return ""
		case "path":
			if !path.IsAbs(v) || path.Clean(v) != v {
				return "unix:path:/… with an absolute, plain path"
			}
			return ""
		case "sha256":
			if b, err := hex.DecodeString(v); err != nil || len(b) != sha256.Size || v != strings.ToLower(v) {
				return "unix:sha256:… with 64 hexadecimal digits in lower case"
			}
			return ""
		}
		return "one of unix:uid:N, unix:gid:N, unix:supplementary_gid:N, unix:path:/…, unix:sha256:HEX"
	},
	"systemd": func(value string) string {
		if unit, ok := strings.CutPrefix(value, "unit:"); !ok || systemdUnit(unit) != unit {
			return "systemd:unit:NAME with a service or scope of the system, for example systemd:unit:web.service"
		}
		return ""
	},
	"cgroup": func(value string) string {
		if !path.IsAbs(value) || path.Clean(value) != value || value == "/" {
			return "cgroup:/… with an absolute, plain path, for example cgroup:/system.slice/web.service"
		}
		return ""
	},
	"socket": func(value string) string {
		if ParseName("socket", value) != nil {
			return "socket:NAME with the name of one of the agent's sockets"
		}
		return ""
	},
}

// printable reports whether s is UTF-8 that shows as it is: no control characters, line separators or changes of direction.
func printable(s string) bool {
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return utf8.ValidString(s)
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
		if err := s.known(); err != nil {
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
		return cmp.Or(cmp.Compare(b.Priority, a.Priority), strings.Compare(a.Name, b.Name))
	})
	return fit
}
