package identity

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Hierarchy is one of the two that never meet.
type Hierarchy int

// The hierarchies. The zero value is none.
const (
	// Mesh is what workloads trust: shared root, a cluster's intermediates, leaves.
	Mesh Hierarchy = iota + 1
	// ControlPlane names the parts of one cluster's Signet; its CA is in no trust bundle.
	ControlPlane
)

func (h Hierarchy) String() string {
	switch h {
	case Mesh:
		return "mesh"
	case ControlPlane:
		return "control"
	}
	return "no hierarchy"
}

// Caller is who asks, as a door has authenticated them. The zero value is nobody and is denied everything.
type Caller struct {
	kind callerKind
	name string
}

type callerKind int

const (
	callerNobody callerKind = iota
	callerAgent
	callerNewAgent
	callerReturningAgent
	callerServer
)

// AsAgent is an agent known by a verified control certificate of this cluster.
func AsAgent(name string) Caller { return Caller{kind: callerAgent, name: name} }

// AsNewAgent is a node whose evidence (a join token) a NodeAttestor has accepted as the named agent.
func AsNewAgent(n AttestedNode) Caller { return Caller{kind: callerNewAgent, name: n.agent} }

// AsReturningAgent is an agent that says it has enrolled before and whose control certificate has run out. Nothing is proved
// but that it holds the key it asks with: it gets its own control certificate if that is the enrolled key, and nothing else.
func AsReturningAgent(name string) Caller { return Caller{kind: callerReturningAgent, name: name} }

// AsServer is this server itself.
func AsServer(instance string) Caller { return Caller{kind: callerServer, name: instance} }

// Ask is what a caller wants a certificate for: a WorkloadAsk or a ControlAsk.
type Ask interface{ isAsk() }

// WorkloadAsk asks for a leaf of the mesh under a registration.
type WorkloadAsk struct {
	Registration string
	Key          PublicKey
	// Instance and Selectors are the agent's word; they go into the log.
	Instance  string
	Selectors []Selector
}

// ControlAsk asks for the caller's own control certificate.
type ControlAsk struct{ Key PublicKey }

func (WorkloadAsk) isAsk() {}
func (ControlAsk) isAsk()  {}

// maxInstance bounds what an agent may call a workload, in bytes.
const maxInstance = 256

// AgentRow is what the server knows of an enrolled agent.
type AgentRow struct {
	Name string
	// SPKI of the enrolled key, DER.
	SPKI   []byte
	Banned bool
}

// Directory is who may ask: a copy in memory of what the store holds.
type Directory interface {
	Registration(name string) (Registration, bool)
	Agent(name string) (AgentRow, bool)
	// BannedIdentity reports whether nobody may have certificates for this identity.
	BannedIdentity(id spiffeid.ID) bool
}

// Policy is what the cluster's configuration fixes for every grant.
type Policy struct {
	TrustDomain spiffeid.TrustDomain
	Cluster     string
	// DefaultTTL is for registrations that name none; MaxTTL clamps those that do.
	DefaultTTL, MaxTTL time.Duration
	// ControlTTL is the life of control certificates.
	ControlTTL time.Duration
}

// Authorizer holds the one Authorize that every door ends in.
type Authorizer struct {
	policy    Policy
	directory Directory
}

// NewAuthorizer refuses a policy that contradicts itself.
func NewAuthorizer(p Policy, d Directory) (*Authorizer, error) {
	switch {
	case p.TrustDomain.IsZero():
		return nil, errors.New("authorizer: no trust domain")
	case d == nil:
		return nil, errors.New("authorizer: no directory")
	case p.DefaultTTL < MinTTL || p.MaxTTL < p.DefaultTTL:
		return nil, fmt.Errorf("leaf life: want %s ≤ default (%s) ≤ maximum (%s)", MinTTL, p.DefaultTTL, p.MaxTTL)
	case p.ControlTTL < time.Minute:
		return nil, fmt.Errorf("control certificates of %s are shorter than the least useful 1m", p.ControlTTL)
	case p.DefaultTTL%time.Second != 0 || p.MaxTTL%time.Second != 0 || p.ControlTTL%time.Second != 0:
		return nil, fmt.Errorf("lives of %s, %s and %s: X.509 counts in whole seconds", p.DefaultTTL, p.MaxTTL, p.ControlTTL)
	}
	if err := ParseName("cluster", p.Cluster); err != nil {
		return nil, err
	}
	return &Authorizer{policy: p, directory: d}, nil
}

// Denied is a refusal by name.
type Denied struct {
	// Reason is one of "not_allowed", "no_key", "unknown_agent", "banned_agent", "banned_identity", "other_key", "not_registered",
	// "selectors_differ", "evidence_too_long", "evidence_malformed"; it may label a metric.
	Reason  string
	message string
}

func (d *Denied) Error() string { return d.message }

func deny(reason, format string, args ...any) error {
	return &Denied{Reason: reason, message: fmt.Sprintf(format, args...)}
}

var errNoKey = deny("no_key", "no public key was proved")

func bannedAgent(name, cluster string) error {
	return deny("banned_agent", "agent %s is banned from cluster %s", name, cluster)
}

// Authorize decides whether the caller may have what it asks for. What is not allowed by name is denied (*Denied).
func (a *Authorizer) Authorize(_ context.Context, c Caller, ask Ask) (*Grant, error) {
	switch ask := ask.(type) {
	case WorkloadAsk:
		if c.kind == callerAgent {
			return a.workload(c.name, ask)
		}
	case ControlAsk:
		switch c.kind {
		case callerAgent:
			return a.agentRenewal(c.name, "agent", ask)
		case callerReturningAgent:
			return a.agentRenewal(c.name, "enrol", ask)
		case callerNewAgent:
			return a.agentEnrolment(c.name, ask)
		case callerServer:
			return a.control(RoleServer, c.name, "self", ask)
		}
	}
	return nil, deny("not_allowed", "this caller may not ask for that")
}

func (a *Authorizer) liveAgent(name string) (AgentRow, error) {
	row, ok := a.directory.Agent(name)
	if !ok {
		return row, deny("unknown_agent", "agent %s is not enrolled in cluster %s; enrol it with a join token", clip(name), a.policy.Cluster)
	}
	if row.Banned {
		return row, bannedAgent(name, a.policy.Cluster)
	}
	return row, nil
}

func (a *Authorizer) workload(agent string, ask WorkloadAsk) (*Grant, error) {
	if _, err := a.liveAgent(agent); err != nil {
		return nil, err
	}
	if err := checkEvidence(ask); err != nil {
		return nil, err
	}
	r, ok := a.directory.Registration(ask.Registration)
	// One answer for "is not" and "is not yours": an agent learns nothing about the registrations of others.
	if !ok || !r.For(agent) {
		return nil, deny("not_registered", "no registration %q for agent %s; apply one that names this agent", clip(ask.Registration), agent)
	}
	// Checked when it was applied; once more here, because this is the last place that can say no.
	if !r.ID.MemberOf(a.policy.TrustDomain) || r.ID.Path() == "" || Reserved(r.ID) {
		return nil, deny("not_allowed", "registration %s is for %s, which is not a workload's name in trust domain %s", r.Name, r.ID, a.policy.TrustDomain)
	}
	if a.directory.BannedIdentity(r.ID) {
		return nil, deny("banned_identity", "identity %s is banned; lift it with: signet identity unban %s", r.ID, r.ID)
	}
	// An agent that says which selectors it saw must have seen the registration's.
	if !r.Matches(ask.Selectors) {
		return nil, deny("selectors_differ", "the workload does not show the selectors of registration %s", r.Name)
	}
	if len(ask.Key.spki) == 0 {
		return nil, errNoKey
	}
	ttl := cmp.Or(r.TTL, a.policy.DefaultTTL)
	caller, err := Control{a.policy.TrustDomain, a.policy.Cluster, RoleAgent, agent}.ID()
	if err != nil {
		return nil, deny("not_allowed", "%v", err)
	}
	return &Grant{terms: Terms{
		Hierarchy: Mesh, ID: r.ID, Key: ask.Key, TTL: min(ttl, a.policy.MaxTTL),
		Evidence: Evidence{
			Caller: caller.String(), Door: "agent", Agent: agent, Instance: ask.Instance,
			Registration: r.Name, Revision: r.Revision, Selectors: slices.Clone(ask.Selectors),
		},
	}}, nil
}

// checkEvidence bounds what an agent says and the log repeats.
func checkEvidence(ask WorkloadAsk) error {
	if len(ask.Instance) > maxInstance || len(ask.Selectors) > MaxSelectors*4 {
		return deny("evidence_too_long", "instance or selectors are longer than allowed")
	}
	if !printable(ask.Instance) {
		return deny("evidence_malformed", "the instance holds characters that can't be printed")
	}
	for _, s := range ask.Selectors {
		if len(s) > MaxSelectorLength {
			return deny("evidence_too_long", "instance or selectors are longer than allowed")
		}
		if !printable(string(s)) {
			return deny("evidence_malformed", "a selector holds characters that can't be printed")
		}
	}
	return nil
}

func (a *Authorizer) agentRenewal(agent, door string, ask ControlAsk) (*Grant, error) {
	row, err := a.liveAgent(agent)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(row.SPKI, ask.Key.spki) {
		return nil, deny("other_key", "agent %s asks with another key than it enrolled with; enrol it again with a join token", agent)
	}
	return a.control(RoleAgent, agent, door, ask)
}

// agentEnrolment lets a node take a name, also one that is taken, with another key: whoever made the token wanted that.
// A ban stands above a token.
func (a *Authorizer) agentEnrolment(agent string, ask ControlAsk) (*Grant, error) {
	if row, ok := a.directory.Agent(agent); ok && row.Banned {
		return nil, bannedAgent(agent, a.policy.Cluster)
	}
	return a.control(RoleAgent, agent, "enrol", ask)
}

func (a *Authorizer) control(role Role, name, door string, ask ControlAsk) (*Grant, error) {
	if len(ask.Key.spki) == 0 {
		return nil, errNoKey
	}
	id, err := Control{a.policy.TrustDomain, a.policy.Cluster, role, name}.ID()
	if err != nil {
		return nil, deny("not_allowed", "%v", err)
	}
	ev := Evidence{Caller: id.String(), Door: door}
	if role == RoleAgent {
		ev.Agent = name
	}
	return &Grant{terms: Terms{Hierarchy: ControlPlane, ID: id, Key: ask.Key, TTL: a.policy.ControlTTL, Evidence: ev}}, nil
}

// Evidence is on whose word a certificate is made; it goes into the log.
type Evidence struct {
	Caller, Door, Agent, Instance, Registration string
	Revision                                    uint64
	Selectors                                   []Selector
}

// Terms is all that a leaf is built from, beside the issuer and the clock.
type Terms struct {
	Hierarchy Hierarchy
	ID        spiffeid.ID
	Key       PublicKey
	TTL       time.Duration
	Evidence  Evidence
}

// Grant is a yes of Authorize, good for one certificate. No other package can make one.
type Grant struct {
	terms Terms
	spent atomic.Bool
}

// ErrSpent says that a grant was empty or has been used.
var ErrSpent = errors.New("grant is empty or already spent")

// Spend gives the terms, once.
func (g *Grant) Spend() (Terms, error) {
	if g == nil || g.terms.Hierarchy == 0 || !g.spent.CompareAndSwap(false, true) {
		return Terms{}, ErrSpent
	}
	return g.terms, nil
}
