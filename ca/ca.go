// Package ca makes certificates: it holds the issuers of both hierarchies and their states, builds leaves from grants,
// and says what a CA certificate must look like (Plan) and who may sign it (Upstream).
//
// The order of an issue is fixed: built, logged, signed, released (docs/architecture.md, "The life of a leaf").
// Making CA certificates is rare and lives in ca/ceremony, the only place that links cfssl.
package ca

import (
	"context"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

// Log is what issuing needs of the audit log: when Append returns, the entries are durable.
type Log interface {
	Append(ctx context.Context, entries []*auditv1.Entry) ([]audit.Receipt, error)
}

// State is where a CA stands in its life.
type State string

// The states, in order.
const (
	Prepared  State = "prepared"
	Published State = "published"
	Active    State = "active"
	Retired   State = "retired"
	Removed   State = "removed"
)

// IssuerConfig describes an issuer as it comes out of the store and the keystore.
type IssuerConfig struct {
	// Name stands in messages, metrics and status, unique among the issuers of a server: "east-2".
	// Empty = the name and version of its key: "intermediate-2".
	Name        string
	Hierarchy   identity.Hierarchy
	TrustDomain spiffeid.TrustDomain
	State       State
	Key         keystore.Key
	// Chain is the issuer's certificate, then those above it, without the root.
	// For the control CA, which is its own root, it holds just that.
	Chain []*x509.Certificate
	// Roots is what validators believe; the chain must lead to one of them. Empty for the control CA.
	Roots []*x509.Certificate
}

// Leaf is an issued certificate.
type Leaf struct {
	// DER of the certificate, then of what stands above it, without a self-signed root of the mesh.
	// For the control hierarchy the control CA is included: it is what an agent pins.
	Chain               [][]byte
	Serial              []byte
	NotBefore, NotAfter time.Time
	Receipt             audit.Receipt
}

// Result is the answer to one grant.
type Result struct {
	Leaf *Leaf
	Err  error
}
