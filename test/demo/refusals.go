package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
)

// refusals tries what must fail. Each attempt stands beside one that differs in the one point only and must succeed,
// so that a door which is simply shut doesn't pass for one that refuses.
func (d *demo) refusals(ctx context.Context) (string, error) {
	for _, try := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"west's backend refuses a certificate of another root, and the right root with another SPIFFE ID", d.foreignCertificates},
		{"the agent refuses a process that nobody registered", d.unregisteredProcess},
		{"a used join token enrols nobody", d.usedToken},
		{"east's doors refuse west's agent, and names minted by west's intermediate", d.foreignAgents},
		{"an agent gets nothing that is registered for another agent", d.othersRegistration},
		{"a CSR with a subject, a SAN or CA:TRUE is refused", d.greedyCSRs},
	} {
		tryCtx, cancel := context.WithTimeout(ctx, 2*time.Minute)
		err := try.do(tryCtx)
		cancel()
		if err != nil {
			return "", fmt.Errorf("%s: %w", try.what, err)
		}
		fmt.Printf("          refused: %s\n", try.what)
	}
	return fmt.Sprintf("%d attempts refused", d.refused), nil
}

// fetchSVID writes an identity that the agent gives to this process on a socket of its own.
func (c *cluster) fetchSVID(ctx context.Context, socket string) (tls.Certificate, error) {
	out := c.Path("fetched-" + socket)
	if _, err := c.Lab.Run(ctx, "svid", "fetch", "--socket", c.Path("run", socket+".sock"), "--write", out); err != nil {
		return tls.Certificate{}, err
	}
	return tls.LoadX509KeyPair(filepath.Join(out, "svid.pem"), filepath.Join(out, "key.pem"))
}

// ask makes a request to a sidecar's mutual-TLS port with a certificate of ours.
func ask(ctx context.Context, port int, cert tls.Certificate) error {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{
		Certificates:       []tls.Certificate{cert},
		InsecureSkipVerify: true, //nolint:gosec // what is tried here is whether the other side lets us in
	}}}
	_, err := get(ctx, client, fmt.Sprintf("https://127.0.0.1:%d/", port))
	return err
}

func (d *demo) foreignCertificates(ctx context.Context) error {
	port := d.west.backend.in
	// One that is fetched may be at its end.
	if err := lab.Until(ctx, "the frontend's own certificate is accepted", 20*time.Second, func() error {
		good, err := d.east.fetchSVID(ctx, "frontend")
		if err != nil {
			return err
		}
		return ask(ctx, port, good)
	}); err != nil {
		return err
	}
	otherRoot, err := selfMade(frontendID)
	if err != nil {
		return err
	}
	if err := d.mustFail("a certificate of another root", ask(ctx, port, otherRoot)); err != nil {
		return err
	}
	intruder, err := d.east.fetchSVID(ctx, "intruder")
	if err != nil {
		return err
	}
	return d.mustFail("the right root with "+intruderID, ask(ctx, port, intruder))
}

func (d *demo) unregisteredProcess(ctx context.Context) error {
	// The same user as the backend's Envoy, but another executable.
	if _, err := d.Refuses(ctx, "svid", "fetch", "--socket", d.east.agent.Socket); err != nil {
		return err
	}
	d.refused++
	return nil
}

func (d *demo) usedToken(ctx context.Context) error {
	if _, err := d.east.Member(ctx, "probe"); err != nil {
		return fmt.Errorf("a fresh token: %w", err)
	}
	_, err := doors.Enrol(ctx, d.east.agent.Token)
	return d.mustFail("a used join token", err)
}

// asked reports whether an agent door let the connection in: an answer to an item, even a refusal, is being let in.
func asked(ctx context.Context, conn *grpc.ClientConn) error {
	defer conn.Close()
	_, err := signetv1.NewAgentsClient(conn).Issue(ctx, &signetv1.IssueRequest{Items: []*signetv1.IssueItem{{Registration: "frontend"}}})
	return err
}

func (d *demo) foreignAgents(ctx context.Context) error {
	ours, err := d.east.Member(ctx, "probe")
	if err != nil {
		return err
	}
	theirs, err := d.west.Member(ctx, "probe")
	if err != nil {
		return err
	}
	for _, own := range []struct {
		c *cluster
		m *doors.Member
	}{{d.east, ours}, {d.west, theirs}} {
		conn, err := own.m.Dial(own.c.Agents, own.m.ControlCA)
		if err != nil {
			return err
		}
		if err := asked(ctx, conn); err != nil {
			return fmt.Errorf("%s's agent at its own door: %w", own.c.Name, err)
		}
	}
	conn, err := theirs.Dial(d.east.Agents, ours.ControlCA)
	if err != nil {
		return err
	}
	if err := d.mustNotOpen("west's agent at east's door", asked(ctx, conn)); err != nil {
		return err
	}
	for _, name := range []string{"agent/probe", "agent/node-1", "server/east-1"} {
		cert, err := d.west.mint(ctx, "spiffe://"+lab.TrustDomain+"/signet/cluster/east/"+name)
		if err != nil {
			return err
		}
		conn, err := doors.Dial(d.east.Agents, ours.ControlCA, cert)
		if err != nil {
			return err
		}
		if err := d.mustNotOpen(name+" minted by west's intermediate", asked(ctx, conn)); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) othersRegistration(ctx context.Context) error {
	conn, csr, err := d.asProbe(ctx, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := doors.Issue(ctx, conn, "probe", []string{"socket:probe"}, csr); err != nil {
		return fmt.Errorf("the probe's own registration: %w", err)
	}
	_, err = doors.Issue(ctx, conn, "frontend", []string{"socket:frontend"}, csr)
	return d.mustFail("a registration for another agent", err)
}

func (d *demo) greedyCSRs(ctx context.Context) error {
	admin, err := url.Parse("spiffe://" + lab.TrustDomain + "/ns/shop/sa/admin")
	if err != nil {
		return err
	}
	caTrue, err := asn1.Marshal(struct{ CA bool }{true})
	if err != nil {
		return err
	}
	for what, template := range map[string]*x509.CertificateRequest{
		"a subject": {Subject: pkix.Name{CommonName: "admin"}},
		"a SAN":     {URIs: []*url.URL{admin}},
		"CA:TRUE":   {ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: caTrue}}},
	} {
		conn, csr, err := d.asProbe(ctx, template)
		if err != nil {
			return err
		}
		_, err = doors.Issue(ctx, conn, "probe", []string{"socket:probe"}, csr)
		conn.Close()
		if err := d.mustFail("a CSR with "+what, err); err != nil {
			return err
		}
	}
	return nil
}

// asProbe connects to east as an agent of the demo's own, with a CSR at hand.
func (d *demo) asProbe(ctx context.Context, template *x509.CertificateRequest) (*grpc.ClientConn, []byte, error) {
	m, err := d.east.Member(ctx, "probe")
	if err != nil {
		return nil, nil, err
	}
	key, err := doors.NewKey()
	if err != nil {
		return nil, nil, err
	}
	csr, err := doors.CSR(key, template)
	if err != nil {
		return nil, nil, err
	}
	conn, err := m.Dial(d.east.Agents, m.ControlCA)
	return conn, csr, err
}

// mustFail turns a refusal into success and counts it.
func (d *demo) mustFail(what string, err error) error {
	if err == nil {
		return fmt.Errorf("%s was NOT refused", what)
	}
	d.Note("refused: %s: %v", what, err)
	d.refused++
	return nil
}

// mustNotOpen is mustFail for a connection that a door must not let in; a deadline that passes is no refusal.
func (d *demo) mustNotOpen(what string, err error) error {
	if code := status.Code(err); err != nil && code != codes.Unavailable && code != codes.Unauthenticated {
		return fmt.Errorf("%s failed, but not as a refusal: %w", what, err)
	}
	return d.mustFail(what, err)
}

// selfMade makes a certificate for a SPIFFE ID under a root that nobody trusts.
func selfMade(id string) (tls.Certificate, error) {
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "another root"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	raw, err := x509.CreateCertificate(rand.Reader, root, root, rootKey.Public(), rootKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	if root, err = x509.ParseCertificate(raw); err != nil {
		return tls.Certificate{}, err
	}
	cert, err := forge(id, root, rootKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	return *cert, nil
}

// mint is what somebody does who holds the key of this cluster's first intermediate: any name he likes.
func (c *cluster) mint(ctx context.Context, id string) (*tls.Certificate, error) {
	issuer, key, err := c.openIssuer(ctx, c.Path("chain.pem"))
	if err != nil {
		return nil, err
	}
	return forge(id, issuer, key)
}

// openIssuer opens the key of an intermediate of this cluster, whose chain is in a file.
func (c *cluster) openIssuer(ctx context.Context, chainFile string) (*x509.Certificate, crypto.Signer, error) {
	keys, err := keystore.NewFile(keystore.FileConfig{Dir: c.Path("state", "keys"), Passphrase: keystore.PassphraseFile(c.Path("server.pass"))})
	if err != nil {
		return nil, nil, err
	}
	chain, err := os.ReadFile(chainFile)
	if err != nil {
		return nil, nil, err
	}
	certs, err := parsePEM(chain)
	if err != nil {
		return nil, nil, err
	}
	refs, err := keys.List(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, ref := range refs {
		key, err := keys.Open(ctx, ref)
		if errors.Is(err, keystore.ErrNotFound) {
			continue // of an issuer that was just removed
		}
		if err != nil {
			return nil, nil, err
		}
		if pub, ok := key.Public().(*ecdsa.PublicKey); ok && pub.Equal(certs[0].PublicKey) {
			return certs[0], key, nil
		}
	}
	return nil, nil, errors.New("the intermediate's key is not in the keystore")
}
