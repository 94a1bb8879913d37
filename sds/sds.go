// Package sds is Envoy's door: the SecretDiscoveryService. It keeps, for each stream, what is subscribed, what was sent,
// and what Envoy said to it; it knows nothing of how an identity comes about.
//
// A stream reads in this order: stream.go is its life, sotw.go and delta.go the two ways to speak, subscription.go what it
// wants and has been told, resource.go what a name stands for and whether it may leave, acks.go what all streams together
// believe, leaves.go what they use, ended.go for how long that counts when a stream ends. fetch.go answers once without a stream,
// status.go shows the streams to people.
package sds

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/trust"
)

// SVID is a certificate chain with its key, checked as a set. Immutable; streams share it by its pointer, and with it
// the check and the bytes that go out, so it must not be copied.
type SVID struct {
	ID spiffeid.ID
	// CertificateChain is PEM, leaf first; PrivateKey is PKCS#8 PEM.
	CertificateChain    []byte
	PrivateKey          []byte `json:"-"`
	NotBefore, NotAfter time.Time
	// Serial of the leaf, hexadecimal.
	Serial string
	// Issuer is the authority key identifier of the leaf.
	Issuer string
	// Digest of the chain; SVIDs of equal digest are equal.
	Digest [sha256.Size]byte

	shared sharedSVID
}

// Format implements fmt.Formatter: whatever the verb, the key is not printed.
func (s *SVID) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "SVID of %s, serial %s", s.ID, s.Serial) }

// LogValue implements slog.LogValuer.
func (s *SVID) LogValue() slog.Value { return slog.StringValue(fmt.Sprint(s)) }

// Workloads tells who is behind a connection.
type Workloads interface {
	// Attest is called once a stream, also when another stream of the connection was attested before. An error ends the
	// stream; one with a gRPC status has been logged by whoever worded it, and is passed on.
	Attest(ctx context.Context, conn net.Conn) (View, error)
}

// View is what one caller may see, now and later.
type View interface {
	// Identities granted to the caller, the default first.
	Identities() []spiffeid.ID
	// SVID returns the current SVID of one of the identities, or nil while there is none; asking makes the agent obtain
	// one and keep it renewed until Close.
	SVID(id spiffeid.ID) *SVID
	// Refusal is why an identity that would be the caller's is not granted, as a gRPC status; nil where there is nothing to
	// say, or nothing that this caller may know.
	Refusal(id spiffeid.ID) error
	// TrustDomain is the caller's own.
	TrustDomain() spiffeid.TrustDomain
	// TrustDomains are those whose bundles the caller may see, in any order.
	TrustDomains() []spiffeid.TrustDomain
	// Bundle returns the bundle of a trust domain the caller may see; false while there is none.
	Bundle(td spiffeid.TrustDomain) (trust.Bundle, bool)
	// Changed returns a channel that is closed at the next change of any of the above. Take it before reading.
	Changed() <-chan struct{}
	// Err is not nil once the caller has lost every identity or is gone: the stream ends with this gRPC status.
	Err() error
	Close()
}
