package sds

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
)

// Bounds of the listener, design §8.19. grpc-go's own defaults are open.
const (
	// MaxConcurrentStreams of one connection. Envoy opens one stream per secret name, and another connection beyond this.
	MaxConcurrentStreams = 128
	// MaxHeaderList in bytes of a request's headers.
	MaxHeaderList = 16 << 10
	// MaxRequest in bytes of a DiscoveryRequest, node metadata included.
	MaxRequest = 64 << 10
	// minPing is how often a client may ping: half of the 30 s that an Envoy with connection_keepalive needs.
	minPing = 15 * time.Second
	// connectTimeout bounds a connection until its HTTP/2 settings are exchanged.
	connectTimeout = 5 * time.Second
	// bufferSize of a connection's reads and writes, in bytes: a sidecar sends little and seldom.
	bufferSize = 4 << 10
	// window of flow control in bytes, fixed: on a Unix socket there is no bandwidth to estimate.
	window = 64 << 10
)

// ServerOptions are the limits for the gRPC server that carries this service. Credentials are added by the caller,
// see ConnCredentials. No compressor is registered here: a compressed request is refused as Unimplemented.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxConcurrentStreams(MaxConcurrentStreams),
		grpc.MaxHeaderListSize(MaxHeaderList),
		grpc.MaxRecvMsgSize(MaxRequest),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.ReadBufferSize(bufferSize),
		grpc.WriteBufferSize(bufferSize),
		grpc.StaticStreamWindowSize(window),
		grpc.StaticConnWindowSize(window),
	}
}

// ConnCredentials are transport credentials for a server on a Unix socket. They add no security of their own: they hand
// the accepted connection to those who attest the caller by it, see ConnFromContext.
func ConnCredentials() credentials.TransportCredentials { return connCredentials{} }

// ConnFromContext returns the accepted connection under a call of a server that has ConnCredentials.
func ConnFromContext(ctx context.Context) (net.Conn, bool) {
	info, ok := infoFromContext(ctx)
	if !ok {
		return nil, false
	}
	return info.conn, true
}

func infoFromContext(ctx context.Context) (*connInfo, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	info, ok := p.AuthInfo.(*connInfo)
	return info, ok
}

// connInfo is the AuthInfo of a connection.
type connInfo struct {
	credentials.CommonAuthInfo
	conn net.Conn
	// caller groups connections of one process, to bound it as a whole and to remember what it rejected.
	caller callerKey
}

// AuthType implements credentials.AuthInfo.
func (*connInfo) AuthType() string { return "unix" }

// callerKey names a process by its peer credentials; where the kernel tells none, or the process lives in a PID namespace
// that this one can't see (pid 0), the connection stands for it.
type callerKey struct {
	pid  int32
	uid  uint32
	conn *connInfo
}

func (k callerKey) String() string {
	if k.conn != nil {
		return "connection"
	}
	return fmt.Sprintf("pid %d uid %d", k.pid, k.uid)
}

type connCredentials struct{}

// ServerHandshake implements credentials.TransportCredentials.
func (connCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info := &connInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		conn:           conn,
	}
	info.caller = callerKey{conn: info}
	if pid, uid, ok := peerCredentials(conn); ok && pid > 0 {
		info.caller = callerKey{pid: pid, uid: uid}
	}
	return conn, info, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (connCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for servers only: a client dials the socket with insecure credentials")
}

// Info implements credentials.TransportCredentials.
func (connCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone implements credentials.TransportCredentials.
func (c connCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials.
func (connCredentials) OverrideServerName(string) error { return nil }
