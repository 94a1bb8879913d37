package agent

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/bell"
)

const (
	// connectTimeout bounds one try to connect, handshake included.
	connectTimeout = 5 * time.Second
	// pingEvery finds a server that went away without a word; the server allows 20 s.
	pingEvery   = 30 * time.Second
	pingTimeout = 10 * time.Second
	// maxReconnect caps the time between tries to connect. A renewal that is due doesn't wait for it, see nudge.
	maxReconnect = 10 * time.Second
)

// dialer opens a connection to host:port.
type dialer func(ctx context.Context, address string) (net.Conn, error)

func dialTCP(ctx context.Context, address string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", address)
}

// dial makes a client connection to one of the server's doors. It connects when it is first used.
func dial(address string, config *tls.Config, d dialer) (*grpc.ClientConn, error) {
	// TLS 1.3 only. Go's own verification wants a DNS name and is off; VerifyConnection makes ours, which runs on
	// every handshake (there are no resumptions without a session cache).
	config.MinVersion = tls.VersionTLS13
	config.InsecureSkipVerify = true
	return grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithContextDialer(d),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 250 * time.Millisecond, Multiplier: 2, Jitter: 0.3, MaxDelay: maxReconnect},
			MinConnectTimeout: connectTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingEvery, Timeout: pingTimeout, PermitWithoutStream: true}),
		grpc.WithDisableServiceConfig(),
		grpc.WithIdleTimeout(0),
		grpc.WithUserAgent("signet-agent"),
	)
}

// peerError is why the other side of a handshake was not believed. gRPC wraps it in an Unavailable like any outage, so
// it is kept aside.
type peerError struct {
	mu  sync.Mutex
	err error
}

func (p *peerError) set(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = err
	return err
}

func (p *peerError) get() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// enrolTLS believes a server of the token's cluster under the control CA whose fingerprint the token carries: nothing is
// trusted on first use. It returns that CA through found.
func enrolTLS(t identity.JoinToken, now func() time.Time, wrong *peerError, found func(*x509.Certificate)) *tls.Config {
	return &tls.Config{VerifyConnection: func(cs tls.ConnectionState) error {
		td, err := identity.ParseTrustDomain(t.TrustDomain)
		if err != nil {
			return wrong.set(err)
		}
		if len(cs.PeerCertificates) > identity.MaxChain {
			return wrong.set(fmt.Errorf("the server shows %d certificates", len(cs.PeerCertificates)))
		}
		for _, c := range cs.PeerCertificates {
			if sha256.Sum256(c.Raw) == t.ControlCA {
				if err := verifyServer(cs.PeerCertificates, c, td, t.Cluster, now()); err != nil {
					return wrong.set(err)
				}
				found(c)
				return wrong.set(nil)
			}
		}
		return wrong.set(fmt.Errorf("what answers is not cluster %s: it does not show the control CA whose fingerprint the join token carries (%x…)", t.Cluster, t.ControlCA[:8]))
	}}
}

// serverTLS believes a server of the cluster under the control CA that was pinned at enrolment. cert is nil at the enrol door.
func serverTLS(m *member, now func() time.Time, wrong *peerError, cert *tls.Certificate) *tls.Config {
	c := &tls.Config{VerifyConnection: func(cs tls.ConnectionState) error {
		return wrong.set(verifyServer(cs.PeerCertificates, m.controlCA, m.td, m.Cluster, now()))
	}}
	if cert != nil {
		c.Certificates = []tls.Certificate{*cert}
	}
	return c
}

// link is the agent door: one connection, re-made with each new control certificate. A call that has begun ends on the
// connection it began on, which is closed after its last call.
type link struct {
	now  func() time.Time
	dial dialer
	// answered holds a token after the server has answered a call: whoever waits to connect need wait no longer.
	answered chan struct{}
	// time is what the server's clock said last; nil = nothing yet.
	time atomic.Pointer[told]

	mu      sync.Mutex
	current *connection
	// replaced rings when current is replaced.
	replaced bell.Bell
}

type connection struct {
	grpc  *grpc.ClientConn
	wrong *peerError
	// users counts calls under way; guarded by link.mu.
	users   int
	retired bool
}

// errNotEnrolled says that there is no agent door to talk to yet.
var errNotEnrolled = errors.New("this agent is not enrolled yet")

// use makes the link connect as m from now on.
func (l *link) use(m *member) error {
	wrong := &peerError{}
	cc, err := dial(m.AgentDoor, serverTLS(m, l.now, wrong, &tls.Certificate{Certificate: m.Chain, PrivateKey: m.key, Leaf: m.leaf}), l.dial)
	if err != nil {
		return fmt.Errorf("agent door %s: %w", m.AgentDoor, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.retire()
	l.current = &connection{grpc: cc, wrong: wrong}
	return nil
}

// retire takes current out of use. Called with mu held.
func (l *link) retire() {
	if c := l.current; c != nil {
		c.retired = true
		if c.users == 0 {
			c.grpc.Close()
		}
		l.current = nil
	}
	l.replaced.Ring()
}

// close ends the link; calls under way are cut off by their contexts.
func (l *link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.retire()
}

// begin takes the connection for one call. replaced is closed when a newer one takes its place; done gives it back.
func (l *link) begin() (c *connection, replaced <-chan struct{}, done func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.current == nil {
		return nil, nil, nil, errNotEnrolled
	}
	c = l.current
	c.users++
	return c, l.replaced.Next(), func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if c.users--; c.users == 0 && c.retired {
			c.grpc.Close()
		}
	}, nil
}

// nudge makes a connection that waits for its next try do it now: when to try is decided by what is due (rotation.RetryAfter).
func (c *connection) nudge() {
	if c.grpc.GetState() == connectivity.TransientFailure {
		c.grpc.ResetConnectBackoff()
	}
	c.grpc.Connect()
}

// explain puts the reason why the server was not believed into an error of a call.
func (c *connection) explain(err error) error {
	if err == nil {
		return nil
	}
	if wrong := c.wrong.get(); wrong != nil {
		return wrong
	}
	return err
}

// call makes one call at the agent door, and takes from the answer that the server is there, and its time.
func call[Q, R any](ctx context.Context, l *link, method func(signetv1.AgentsClient, context.Context, *Q, ...grpc.CallOption) (*R, error), request *Q) (*R, error) {
	c, _, done, err := l.begin()
	if err != nil {
		return nil, err
	}
	defer done()
	c.nudge()
	var header metadata.MD
	r, err := method(signetv1.NewAgentsClient(c.grpc), ctx, request, grpc.WaitForReady(true), grpc.Header(&header))
	l.hearTime(header)
	// A refusal is an answer too: what Sync has to say first, as after the server's start, doesn't wait for its next try.
	if err == nil || ctx.Err() == nil && c.grpc.GetState() == connectivity.Ready {
		l.heard()
	}
	if err != nil {
		return nil, c.explain(err)
	}
	return r, nil
}

// issue implements issuer.
func (l *link) issue(ctx context.Context, items []*signetv1.IssueItem) ([]*signetv1.IssueResult, error) {
	r, err := call(ctx, l, signetv1.AgentsClient.Issue, &signetv1.IssueRequest{Items: items})
	return r.GetResults(), err
}

// renew asks for a new control certificate.
func (l *link) renew(ctx context.Context, csr []byte) ([][]byte, error) {
	r, err := call(ctx, l, signetv1.AgentsClient.Renew, &signetv1.RenewRequest{Csr: csr})
	return r.GetCertificateChain(), err
}

// heard notes that the server is there.
func (l *link) heard() {
	select {
	case l.answered <- struct{}{}:
	default:
	}
}
