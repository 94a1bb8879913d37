// Package doors is a client of Signet's enrol and agent doors, written from the protocol alone, so that what it proves
// about the doors does not lean on the agent's code.
package doors

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
)

// Member is an enrolled agent: its key, its control certificate, and the doors it may knock at.
type Member struct {
	Key       crypto.Signer
	Chain     [][]byte
	ControlCA *x509.Certificate
	Reply     *signetv1.EnrolResponse
}

// NewKey makes an ECDSA P-256 key.
func NewKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// CSR makes a certificate request from a template; nil gives the empty one that the doors accept.
func CSR(key crypto.Signer, template *x509.CertificateRequest) ([]byte, error) {
	if template == nil {
		template = &x509.CertificateRequest{}
	}
	return x509.CreateCertificateRequest(rand.Reader, template, key)
}

// Enrol spends a join token.
func Enrol(ctx context.Context, token string) (*Member, error) {
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	csr, err := CSR(key, nil)
	if err != nil {
		return nil, err
	}
	m, err := EnrolWith(ctx, token, csr)
	if err != nil {
		return nil, err
	}
	m.Key = key
	return m, nil
}

// EnrolWith shows a join token with any CSR, or what passes for one. The member has no key.
func EnrolWith(ctx context.Context, token string, csr []byte) (*Member, error) {
	t, err := identity.ParseJoinToken(token)
	if err != nil {
		return nil, err
	}
	var ca *x509.Certificate
	conn, err := grpc.NewClient("passthrough:///"+t.Door, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, //nolint:gosec // checked below against the token's fingerprint
		NextProtos:         []string{"h2"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			for _, c := range cs.PeerCertificates {
				if sum := sha256.Sum256(c.Raw); bytes.Equal(sum[:], t.ControlCA[:]) {
					ca = c
				}
			}
			if ca == nil {
				return errors.New("the server does not show the control CA that the token names")
			}
			return verify(cs.PeerCertificates, ca)
		},
	})))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	reply, err := signetv1.NewEnrolmentClient(conn).Enrol(ctx, &signetv1.EnrolRequest{
		Csr:      csr,
		Evidence: &signetv1.EnrolRequest_JoinToken{JoinToken: &signetv1.JoinToken{Secret: t.Secret}},
	})
	if err != nil {
		return nil, err
	}
	return &Member{Chain: reply.CertificateChain, ControlCA: ca, Reply: reply}, nil
}

func verify(peer []*x509.Certificate, ca *x509.Certificate) error {
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	_, err := peer[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return err
}

// Dial connects to an agent door with this member's certificate; the server is checked against the given control CA.
func (m *Member) Dial(door string, ca *x509.Certificate) (*grpc.ClientConn, error) {
	return Dial(door, ca, &tls.Certificate{Certificate: m.Chain, PrivateKey: m.Key})
}

// Dial connects to an agent door with any certificate, or none.
func Dial(door string, ca *x509.Certificate, cert *tls.Certificate) (*grpc.ClientConn, error) {
	conf := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, //nolint:gosec // the name is a SPIFFE ID, not a host: checked here
		NextProtos:         []string{"h2"},
		VerifyConnection:   func(cs tls.ConnectionState) error { return verify(cs.PeerCertificates, ca) },
	}
	if cert != nil {
		// Sent whatever CAs the server asks for: the door must refuse it, not the client.
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return grpc.NewClient("passthrough:///"+door, grpc.WithTransportCredentials(credentials.NewTLS(conf)))
}

// Issue asks for one certificate under a registration.
func Issue(ctx context.Context, conn *grpc.ClientConn, registration string, selectors []string, csr []byte) (*signetv1.IssuedCertificate, error) {
	r, err := signetv1.NewAgentsClient(conn).Issue(ctx, &signetv1.IssueRequest{Items: []*signetv1.IssueItem{{
		Registration: registration, Instance: "doors", Selectors: selectors, Csr: csr,
	}}})
	if err != nil {
		return nil, err
	}
	if len(r.Results) != 1 {
		return nil, fmt.Errorf("asked for one certificate, got %d results", len(r.Results))
	}
	if ref := r.Results[0].GetRefusal(); ref != nil {
		return nil, fmt.Errorf("%s: %s", ref.Reason, ref.Message)
	}
	return r.Results[0].GetCertificate(), nil
}
