// Package identity answers one question: who is asking, and what may they be called?
//
// It leads from a connection or a token to a SPIFFE ID: attestors turn a connection into selectors, registrations
// say which selectors on which agents mean which SPIFFE ID, and Authorize is the one place in Signet that says yes.
// What it says yes to is a Grant, which can be spent once and from which alone a certificate is built.
//
// The package signs nothing and stores nothing.
package identity

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of SPIFFE-ID §2.3; go-spiffe checks neither.
const (
	MaxIDLength          = 2048
	MaxTrustDomainLength = 255
)

// reservedSegment is the first path segment under which Signet names its own parts. No registration may use it.
const reservedSegment = "signet"

// ParseTrustDomain parses a trust domain name such as "example.org".
func ParseTrustDomain(s string) (spiffeid.TrustDomain, error) {
	if len(s) > MaxTrustDomainLength {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain of %d bytes: at most %d are allowed (SPIFFE-ID §2.3)", len(s), MaxTrustDomainLength)
	}
	if strings.Contains(s, "/") {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %q: give the bare name, without scheme or path", clip(s))
	}
	td, err := spiffeid.TrustDomainFromString(s)
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %q: %w", clip(s), err)
	}
	return td, nil
}

// ParseID parses the SPIFFE ID of a workload: it has a path (X509-SVID §3.1) and keeps the length limits of SPIFFE-ID §2.3.
func ParseID(s string) (spiffeid.ID, error) {
	if len(s) > MaxIDLength {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID of %d bytes: at most %d are allowed (SPIFFE-ID §2.3)", len(s), MaxIDLength)
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %q: %w", clip(s), err)
	}
	if len(id.TrustDomain().Name()) > MaxTrustDomainLength {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %q: trust domain longer than %d bytes (SPIFFE-ID §2.3)", clip(s), MaxTrustDomainLength)
	}
	if id.Path() == "" {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %q has no path: a workload's identity needs one (X509-SVID §3.1)", clip(s))
	}
	return id, nil
}

// Reserved reports whether the ID lies under /signet/, where only Signet's own parts are named.
func Reserved(id spiffeid.ID) bool {
	first, _, _ := strings.Cut(strings.TrimPrefix(id.Path(), "/"), "/")
	return first == reservedSegment
}

// Role is what a part of Signet does in its cluster.
type Role string

// The roles that the control CA certifies.
const (
	RoleServer Role = "server"
	RoleAgent  Role = "agent"
	RoleAdmin  Role = "admin"
)

// Control is the name of a part of Signet: spiffe://<td>/signet/cluster/<cluster>/<role>/<name>.
type Control struct {
	TrustDomain spiffeid.TrustDomain
	Cluster     string
	Role        Role
	Name        string
}

// ID returns the control identity's SPIFFE ID.
func (c Control) ID() (spiffeid.ID, error) {
	switch c.Role {
	case RoleServer, RoleAgent, RoleAdmin:
	default:
		return spiffeid.ID{}, fmt.Errorf("%q is no role of a part of Signet", clip(string(c.Role)))
	}
	if err := ParseName("cluster", c.Cluster); err != nil {
		return spiffeid.ID{}, err
	}
	if err := ParseName(string(c.Role), c.Name); err != nil {
		return spiffeid.ID{}, err
	}
	return spiffeid.FromSegments(c.TrustDomain, reservedSegment, "cluster", c.Cluster, string(c.Role), c.Name)
}

// ParseControl reads a control identity. It refuses everything that ID would not have produced.
func ParseControl(id spiffeid.ID) (Control, error) {
	seg := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	if len(seg) != 5 || seg[0] != reservedSegment || seg[1] != "cluster" {
		return Control{}, notOurs(id)
	}
	c := Control{TrustDomain: id.TrustDomain(), Cluster: seg[2], Role: Role(seg[3]), Name: seg[4]}
	if again, err := c.ID(); err != nil || again != id {
		return Control{}, notOurs(id)
	}
	return c, nil
}

func notOurs(id spiffeid.ID) error {
	return fmt.Errorf("%s is not the name of a part of Signet", clip(id.String()))
}

// ParseName checks the name of a cluster, agent, server instance or registration: 1 to 63 of [a-z0-9.-],
// beginning and ending with a letter or digit, so that it can stand as a path segment, a file name and a label.
func ParseName(what, s string) error {
	ok := len(s) >= 1 && len(s) <= 63
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		ok = alnum || (c == '-' || c == '.') && i > 0 && i < len(s)-1
	}
	if !ok {
		return fmt.Errorf("%s name %q: use 1 to 63 of a-z, 0-9, '-' and '.', beginning and ending with a letter or digit", what, clip(s))
	}
	return nil
}

// clip bounds foreign text before it goes into an error.
func clip(s string) string {
	if len(s) > 256 {
		return s[:256] + "…"
	}
	return s
}
