package identity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
	kind  callerKind
	name  string
	agent AgentRow
}

type callerKind int

const (
	callerNobody callerKind = iota
	callerAgent
	callerNewAgent
	callerServer
)

// AsAgent is an agent known by a verified control certificate of this cluster.
func AsAgent(name string) Caller { return Caller{kind: callerAgent, name: name} }

// AsNewAgent is a node whose evidence (a join token) a NodeAttestor has accepted as the named agent.
func AsNewAgent(n AttestedNode) Caller { return Caller{kind: callerNewAgent, name: n.agent} }

// AsServer is this server itself.
func AsServer(instance string) Caller { return Caller{kind: callerServer, name: instance} }

// Ask is what a caller wants a certificate for: a WorkloadAsk or a ControlAsk.
type Ask interface{ publicKey() PublicKey }

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

func (a WorkloadAsk) publicKey() PublicKey { return a.Key }
func (a ControlAsk) publicKey() PublicKey  { return a.Key }

// Bounds of what an agent may say about a workload.
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
	}
	if err := ParseName("cluster", p.Cluster); err != nil {
		return nil, err
	}
	return &Authorizer{policy: p, directory: d}, nil
}

// Denied is a refusal by name. Reason is from a closed set and may label a metric.
type Denied struct {
	Reason  string
	message string
}

func (d *Denied) Error() string { return d.message }

func deny(reason, format string, args ...any) error {
	return &Denied{Reason: reason, message: fmt.Sprintf(format, args...)}
}

// Authorize decides whether the caller may have what it asks for. What is not allowed by name is denied (*Denied).
func (a *Authorizer) Authorize(_ context.Context, c Caller, ask Ask) (*Grant, error) {
	if ask == nil || len(ask.publicKey().spki) == 0 {
		return nil, deny("no_key", "no public key was proved")
	}
	switch ask := ask.(type) {
	case WorkloadAsk:
		if c.kind == callerAgent {
			return a.workload(c.name, ask)
		}
	case ControlAsk:
		switch c.kind {
		case callerAgent:
			return a.agentRenewal(c.name, ask)
		case callerNewAgent:
			return a.control(RoleAgent, c.name, "enrol", ask)
		case callerServer:
			return a.control(RoleServer, c.name, "self", ask)
		}
	}
	return nil, deny("not_allowed", "this caller may not ask for that")
}

func (a *Authorizer) liveAgent(name string) (AgentRow, error) {
	row, ok := a.directory.Agent(name)
	if !ok {
		return row, deny("unknown_agent", "agent %s is not enrolled in cluster %s; enrol it with a join token", name, a.policy.Cluster)
	}
	if row.Banned {
		return row, deny("banned_agent", "agent %s is banned from cluster %s", name, a.policy.Cluster)
	}
	return row, nil
}

func (a *Authorizer) workload(agent string, ask WorkloadAsk) (*Grant, error) {
	if _, err := a.liveAgent(agent); err != nil {
		return nil, err
	}
	if len(ask.Instance) > maxInstance || len(ask.Selectors) > MaxSelectors*4 {
		return nil, deny("evidence_too_long", "instance or selectors are longer than allowed")
	}
	r, ok := a.directory.Registration(ask.Registration)
	// One answer for "is not" and "is not yours": an agent learns nothing about the registrations of others.
	if !ok || !r.For(agent) {
		return nil, deny("not_registered", "no registration %q for agent %s; apply one that names this agent", clip(ask.Registration), agent)
	}
	// An agent that says which selectors it saw must have seen the registration's.
	if !r.Matches(ask.Selectors) {
		return nil, deny("selectors_differ", "the workload does not show the selectors of registration %s", r.Name)
	}
	ttl := r.TTL
	if ttl == 0 {
		ttl = a.policy.DefaultTTL
	}
	caller, err := Control{a.policy.TrustDomain, a.policy.Cluster, RoleAgent, agent}.ID()
	if err != nil {
		return nil, err
	}
	return &Grant{terms: Terms{
		Hierarchy: Mesh, ID: r.ID, Key: ask.Key, TTL: min(ttl, a.policy.MaxTTL),
		Evidence: Evidence{
			Caller: caller.String(), Door: "agent", Agent: agent, Instance: ask.Instance,
			Registration: r.Name, Revision: r.Revision, Selectors: ask.Selectors,
		},
	}}, nil
}

func (a *Authorizer) agentRenewal(agent string, ask ControlAsk) (*Grant, error) {
	row, err := a.liveAgent(agent)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(row.SPKI, ask.Key.spki) {
		return nil, deny("other_key", "agent %s asks with another key than it enrolled with; enrol it again with a join token", agent)
	}
	return a.control(RoleAgent, agent, "agent", ask)
}

func (a *Authorizer) control(role Role, name, door string, ask ControlAsk) (*Grant, error) {
	id, err := Control{a.policy.TrustDomain, a.policy.Cluster, role, name}.ID()
	if err != nil {
		return nil, err
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
