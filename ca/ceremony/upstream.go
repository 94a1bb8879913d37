package ceremony

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
)

// AtHandConfig describes a root whose key is in this process.
type AtHandConfig struct {
	Root *x509.Certificate
	Key  crypto.Signer
	// Log takes the entry before the key signs.
	Log ca.Log
	// By says on whose word, for the log.
	By *auditv1.Evidence
}

// AtHand is an upstream whose root key is at hand: it answers at once.
type AtHand struct{ c AtHandConfig }

var _ ca.Upstream = (*AtHand)(nil)

// NewAtHand refuses a key that is not the root's.
func NewAtHand(c AtHandConfig) (*AtHand, error) {
	if c.Root == nil || c.Key == nil || c.Log == nil {
		return nil, errors.New("upstream: root certificate, key and log are all needed")
	}
	if pub, ok := c.Key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(c.Root.PublicKey) {
		return nil, fmt.Errorf("upstream: the key does not match the root certificate %q", c.Root.Subject.CommonName)
	}
	return &AtHand{c}, nil
}

// Root is the root.
func (u *AtHand) Root(context.Context) (*x509.Certificate, error) { return u.c.Root, nil }

// Sign makes the certificate.
func (u *AtHand) Sign(ctx context.Context, plan ca.Plan, request []byte) (ca.Answer, error) {
	if plan.Under != nil && !plan.Under.Equal(u.c.Root) {
		return ca.Answer{}, fmt.Errorf("sign %q: the root to be signed under is %q, but the one at hand is %q", plan.CommonName, plan.Under.Subject.CommonName, u.c.Root.Subject.CommonName)
	}
	p, err := Prepare(plan, u.c.Root, request)
	if err != nil {
		return ca.Answer{}, err
	}
	cert, _, err := p.Sign(ctx, u.c.Log, u.c.Key, u.c.By)
	if err != nil {
		return ca.Answer{}, err
	}
	return ca.Answer{Chain: []*x509.Certificate{cert}, Roots: []*x509.Certificate{u.c.Root}}, nil
}
