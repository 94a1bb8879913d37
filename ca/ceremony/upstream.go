package ceremony

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/durable"
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

// Sign makes the certificate.
func (u *AtHand) Sign(ctx context.Context, plan ca.Plan, request []byte) (ca.Answer, error) {
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

// OfflineConfig says by which files an offline root is reached.
type OfflineConfig struct {
	// Request is where the certificate request is put for whoever carries it to the root.
	Request string
	// Answer is where the signed chain will be: the certificate, then the root.
	Answer string
	// RootFingerprint pins the root that may answer, as `signet root show` prints it.
	RootFingerprint string
}

// Offline is an upstream that people carry files to and from.
type Offline struct {
	request, answer string
	pin             ca.Fingerprint
}

var _ ca.Upstream = (*Offline)(nil)

// NewOffline refuses to trust whatever root answers first: the fingerprint is needed.
func NewOffline(c OfflineConfig) (*Offline, error) {
	if c.Request == "" || c.Answer == "" {
		return nil, errors.New("offline root: name the file for the request and the file for the answer")
	}
	pin, err := ca.ParseFingerprint(c.RootFingerprint)
	if err != nil {
		return nil, fmt.Errorf("offline root: %w; `signet root show` prints it", err)
	}
	return &Offline{request: c.Request, answer: c.Answer, pin: pin}, nil
}

// Sign puts the request in its place and takes the answer if there is one; until then it is pending.
func (u *Offline) Sign(_ context.Context, plan ca.Plan, request []byte) (ca.Answer, error) {
	csr, err := ParseRequest(request)
	if err != nil {
		return ca.Answer{}, err
	}
	if err := checkClaims(csr, plan); err != nil {
		return ca.Answer{}, err
	}
	text, err := durable.ReadFile(u.answer, "signed chain", maxAnswer)
	if errors.Is(err, fs.ErrNotExist) {
		if err := durable.WriteFile(u.request, pemRequest(csr.Raw), 0o644); err != nil {
			return ca.Answer{}, err
		}
		return ca.Answer{Pending: fmt.Sprintf("the offline root's signature: carry %s to it, sign it there with `signet root sign --fingerprint %s`, and bring the chain back as %s",
			u.request, ca.KeyFingerprint(plan.SPKI), u.answer)}, nil
	}
	if err != nil {
		return ca.Answer{}, err
	}
	chain, err := ca.ParseChain(text)
	if err != nil {
		return ca.Answer{}, fmt.Errorf("read %s: %w", u.answer, err)
	}
	i := slices.IndexFunc(chain, func(c *x509.Certificate) bool { return u.pin.Of(c.Raw) })
	if i < 0 {
		top := chain[len(chain)-1]
		return ca.Answer{}, fmt.Errorf("%s does not hold the expected root; its last certificate is %q with fingerprint %s", u.answer, top.Subject.CommonName, ca.CertificateFingerprint(top.Raw))
	}
	roots := []*x509.Certificate{chain[i]}
	if err := plan.Check(chain, roots); err != nil {
		return ca.Answer{}, fmt.Errorf("%s: %w", u.answer, err)
	}
	return ca.Answer{Chain: chain[:len(chain)-1], Roots: roots}, nil
}

// maxAnswer bounds the file of a signed chain, in bytes.
const maxAnswer = 128 << 10
