package identity

import (
	"context"
	"net"
)

// NodeAttestor turns evidence about a node into the name of the agent it may be. Join tokens are the first kind.
type NodeAttestor interface {
	// AttestNode spends the evidence for a key that its holder has proved: with another key, the same evidence fails.
	AttestNode(ctx context.Context, evidence []byte, key PublicKey) (AttestedNode, error)
}

// AttestedNode is a node whose evidence was accepted. Only this package makes one.
type AttestedNode struct {
	agent   string
	tokenID string
}

// Agent is the name the node may carry.
func (n AttestedNode) Agent() string { return n.agent }

// TokenID names the evidence in the log.
func (n AttestedNode) TokenID() string { return n.tokenID }

// WorkloadAttestor turns a connection into the selectors of the process behind it.
type WorkloadAttestor interface {
	// AttestWorkload does not close conn. The error is for the log; it may name local paths and IDs.
	AttestWorkload(ctx context.Context, conn net.Conn) (Workload, error)
}

// Workload is a process that was attested once, when it connected.
type Workload struct {
	Selectors []Selector
	// Instance names the process in the log and in messages: "pid 4711 uid 1000".
	Instance string
	// Notes say which selectors the process was not given and why, a sentence each, for whoever wonders why no registration fits.
	Notes []string
	// Foreign says why its user namespace is not taken for ours, so that its uid, gid and path don't count; empty = it is ours.
	Foreign string
	// Alive reports whether the process that connected is still there; a recycled PID is not.
	Alive func() bool
	// Close releases what holds the process (a pidfd); Alive is false from then on.
	Close func()
}
