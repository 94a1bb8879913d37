package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/rotation"
)

// baseTLS is TLS 1.3 without session tickets, so that no resumption passes by a check (design §8.16).
func (s *Server) baseTLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.own.certificate() },
	}
}

// agentTLS wants a certificate under this cluster's control CA that names one of its agents.
func (s *Server) agentTLS() *tls.Config {
	c := s.baseTLS()
	// Any, because the check is ours and is made in VerifyConnection, which runs on every handshake.
	c.ClientAuth = tls.RequireAnyClientCert
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := s.verifyAgent(cs.PeerCertificates); err != nil {
			s.rejected(context.Background(), agentDoor, refuse(codes.Unauthenticated, "bad_certificate", "", err))
			return errors.New("certificate refused")
		}
		return nil
	}
	return c
}

// verifyAgent checks that the certificates are an agent's of this cluster.
func (s *Server) verifyAgent(certs []*x509.Certificate) error {
	c, err := identity.VerifyControl(certs, s.control, s.now(), x509.ExtKeyUsageClientAuth)
	if err != nil {
		return err
	}
	if c.TrustDomain != s.config.TrustDomain || c.Cluster != s.config.Cluster || c.Role != identity.RoleAgent {
		return fmt.Errorf("%s %s of cluster %s in %s is not an agent of this cluster", c.Role, c.Name, c.Cluster, c.TrustDomain)
	}
	return nil
}

// mortalTLS is TLS whose connections live no longer than the client certificate that opened them: an agent that has
// renewed comes back with the new one. What the certificate says is read once for all calls of the connection.
type mortalTLS struct {
	credentials.TransportCredentials
	now  func() time.Time
	open *agentConns
}

// agentConns are the connections of agents that are open.
type agentConns struct {
	mu   sync.Mutex
	open map[string]map[net.Conn]struct{}
}

// maxAgentConns of one agent: the one it uses, the one it moves to with a new certificate, and those that died without a word.
const maxAgentConns = 32

// enter reports whether there was room for one more.
func (a *agentConns) enter(agent string, c net.Conn) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.open[agent]) >= maxAgentConns {
		return false
	}
	if a.open == nil {
		a.open = map[string]map[net.Conn]struct{}{}
	}
	if a.open[agent] == nil {
		a.open[agent] = map[net.Conn]struct{}{}
	}
	a.open[agent][c] = struct{}{}
	return true
}

func (a *agentConns) leave(agent string, c net.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.open[agent], c)
	if len(a.open[agent]) == 0 {
		delete(a.open, agent)
	}
}

// cut closes, after a moment in which its calls can still be answered, what an agent has open now.
func (a *agentConns) cut(agent string, moment time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range a.open[agent] {
		time.AfterFunc(moment, func() { c.Close() })
	}
}

// agentInfo is what the handshake has proved.
type agentInfo struct {
	credentials.TLSInfo
	name     string
	spki     []byte
	notAfter time.Time
}

func (m mortalTLS) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, info, err := m.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	fail := func(err error) (net.Conn, credentials.AuthInfo, error) {
		c.Close()
		return nil, nil, err
	}
	t, ok := info.(credentials.TLSInfo)
	if !ok || len(t.State.PeerCertificates) == 0 {
		return fail(errors.New("no client certificate"))
	}
	leaf := t.State.PeerCertificates[0]
	name, err := identity.ControlOf(leaf)
	if err != nil {
		return fail(err)
	}
	if !m.open.enter(name.Name, raw) {
		return fail(fmt.Errorf("agent %s has %d connections open", name.Name, maxAgentConns))
	}
	timer := time.AfterFunc(leaf.NotAfter.Sub(m.now()), func() { raw.Close() })
	gone := sync.OnceFunc(func() {
		timer.Stop()
		m.open.leave(name.Name, raw)
	})
	return &timedConn{Conn: c, gone: gone}, agentInfo{TLSInfo: t, name: name.Name, spki: leaf.RawSubjectPublicKeyInfo, notAfter: leaf.NotAfter}, nil
}

func (m mortalTLS) Clone() credentials.TransportCredentials {
	return mortalTLS{m.TransportCredentials.Clone(), m.now, m.open}
}

type timedConn struct {
	net.Conn
	gone func()
}

func (c *timedConn) Close() error {
	c.gone()
	return c.Conn.Close()
}

// admit stands before every call on the agent door, of whatever service: the caller is an agent by the certificate that the
// handshake verified, again by the clock, and by its row.
func (s *Server) admit(ctx context.Context) error {
	s.tellTime(ctx)
	who, err := caller(ctx)
	if err != nil {
		return err
	}
	if now := s.now(); now.After(who.notAfter) {
		return refuse(codes.Unauthenticated, "bad_certificate", "not authenticated", fmt.Errorf("the certificate of agent %s expired at %s", who.name, stamp(who.notAfter)))
	}
	return s.standing(who)
}

// caller is the agent behind a call that was admitted.
func caller(ctx context.Context) (agentInfo, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if who, ok := p.AuthInfo.(agentInfo); ok {
			return who, nil
		}
	}
	return agentInfo{}, refuse(codes.Unauthenticated, "bad_certificate", "not authenticated", nil)
}

// standing refuses an agent that is not enrolled (any more), is banned, or has enrolled anew with another key since.
func (s *Server) standing(who agentInfo) error {
	row, ok := s.directory.Agent(who.name)
	switch {
	case !ok:
		return refuse(codes.PermissionDenied, "unknown_agent", "not enrolled", fmt.Errorf("agent %s has no row in the store: enrol it with a join token", who.name))
	case row.Banned:
		return refuse(codes.PermissionDenied, "banned_agent", "not enrolled", fmt.Errorf("agent %s is banned", who.name))
	case !bytes.Equal(row.SPKI, who.spki):
		return refuse(codes.PermissionDenied, "other_key", "not enrolled", fmt.Errorf("agent %s comes with another key than it is enrolled with", who.name))
	}
	return nil
}

// ownCertificate is the server's control certificate. Its key lives and ends with the process.
type ownCertificate struct {
	issue   func(context.Context, identity.PublicKey) (*ca.Leaf, error)
	now     func() time.Time
	failed  func(error)
	current atomic.Pointer[ownLeaf]
}

type ownLeaf struct {
	tls      *tls.Certificate
	serial   []byte
	received time.Time
	notAfter time.Time
}

func (o *ownCertificate) certificate() (*tls.Certificate, error) {
	l := o.current.Load()
	if l == nil {
		return nil, errors.New("the server has no certificate yet")
	}
	return l.tls, nil
}

// usable reports whether a peer would accept the certificate now.
func (o *ownCertificate) usable() error {
	l := o.current.Load()
	if l == nil {
		return errors.New("the server has no certificate yet")
	}
	if o.now().After(l.notAfter) {
		return fmt.Errorf("the server's own certificate expired at %s", l.notAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// renew makes a new key and certificate. Connections that are open keep theirs.
func (o *ownCertificate) renew(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	pub, err := identity.OwnKey(key)
	if err != nil {
		return err
	}
	leaf, err := o.issue(ctx, pub)
	if err != nil {
		return fmt.Errorf("issue the server's own certificate: %w", err)
	}
	o.current.Store(&ownLeaf{
		tls:    &tls.Certificate{Certificate: leaf.Chain, PrivateKey: key},
		serial: leaf.Serial, received: o.now(), notAfter: leaf.NotAfter,
	})
	return nil
}

// keep renews for as long as ctx lives: at its time, and after a failure until it works.
func (o *ownCertificate) keep(ctx context.Context) {
	// A timer stands still while a machine sleeps, so the clock is looked at now and then.
	const recheck = time.Minute
	l := o.current.Load()
	due, attempts := rotation.RenewAt(l.serial, l.received, l.notAfter), 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(min(max(due.Sub(o.now()), 0), recheck)):
		}
		now := o.now()
		if now.Before(due) {
			continue
		}
		if err := o.renew(ctx); err != nil {
			if ctx.Err() != nil {
				return
			}
			attempts++
			o.failed(err)
			due = now.Add(rotation.RetryAfter(l.serial, attempts, l.notAfter.Sub(now)))
			continue
		}
		l = o.current.Load()
		due, attempts = rotation.RenewAt(l.serial, l.received, l.notAfter), 0
	}
}
