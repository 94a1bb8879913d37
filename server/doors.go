package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signet-ca/signet/internal/sockets"
)

// Limits on every door; grpc-go's own are open or absent.
const (
	maxHeaderBytes   = 16 << 10
	handshakeTimeout = 5 * time.Second
	// pingEvery is how often a peer may ping; Envoy and our agents do every 30 s.
	pingEvery = 20 * time.Second
	// idlePing finds peers that went away without a word.
	idlePing    = time.Minute
	pingTimeout = 20 * time.Second
)

// door is one listener's name and limits.
type door struct {
	name string
	// maxMessage bounds what is received, in bytes.
	maxMessage int
	// streams bounds the calls under way on one connection: each may hold a message and a window of flow control.
	streams uint32
	// connections bounds what is open in all, perPeer from one address (all of a Unix socket's peers are one).
	connections, perPeer int
	// age a connection reaches before its peer is asked to come anew, so that nobody keeps a place for ever; 0 = any.
	age time.Duration
}

var (
	// Nobody is known here yet, and an agent comes with one request.
	enrolDoor = door{name: "enrol", maxMessage: 64 << 10, streams: 4, connections: 512, perPeer: 64, age: 30 * time.Second}
	// An Issue batch is 50 requests of 8 KiB with their selectors. Many agents may stand behind one address.
	agentDoor = door{name: "agent", maxMessage: 1 << 20, streams: 100, connections: 16384, perPeer: 1024}
	// Registrations are applied as one set. Only this user and root get here at all.
	adminDoor = door{name: "admin", maxMessage: 16 << 20, streams: 100, connections: 64, perPeer: 64}
	httpDoor  = door{name: "http", connections: 256, perPeer: 64}
)

// newGRPC makes a gRPC server with the limits of a door. Every call, of every service, is put before admit.
func (s *Server) newGRPC(d door, creds credentials.TransportCredentials, admit func(context.Context) error) *grpc.Server {
	return grpc.NewServer(
		grpc.Creds(creds),
		grpc.MaxConcurrentStreams(d.streams),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxRecvMsgSize(d.maxMessage),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingEvery, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: idlePing, Timeout: pingTimeout, MaxConnectionAge: d.age, MaxConnectionAgeGrace: pingTimeout,
		}),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (_ any, err error) {
			defer s.edge(ctx, d, &err)
			if err := admit(ctx); err != nil {
				return nil, err
			}
			return h(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
			defer s.edge(ss.Context(), d, &err)
			if err := admit(ss.Context()); err != nil {
				return err
			}
			return h(srv, ss)
		}),
	)
}

// anybody admits whoever has passed the handshake.
func anybody(context.Context) error { return nil }

// refusal is what a peer hears (opaque) beside what the log hears (all of it).
type refusal struct {
	code codes.Code
	// public goes to the peer.
	public string
	// reason is from a closed set: it labels a metric.
	reason string
	cause  error
	// retry is when the same may be asked again; 0 = nothing is said about it.
	retry time.Duration
}

func (r *refusal) Error() string { return r.public }
func (r *refusal) Unwrap() error { return r.cause }

func refuse(code codes.Code, reason, public string, cause error) *refusal {
	return &refusal{code: code, public: public, reason: reason, cause: cause}
}

// edge is where every call ends: a panic is caught, a refusal counted, logged and made opaque.
func (s *Server) edge(ctx context.Context, d door, err *error) {
	if p := recover(); p != nil {
		s.panicked(d, p, err)
	}
	if *err == nil {
		return
	}
	var r *refusal
	// Whoever asked has given up; there is nobody to refuse anything to.
	if gone := ctx.Err(); gone != nil && errors.Is(*err, gone) {
		*err = status.FromContextError(gone).Err()
		return
	}
	if !errors.As(*err, &r) {
		if st, ok := status.FromError(*err); ok {
			*err = st.Err()
			return
		}
		r = refuse(codes.Internal, "internal", "internal error", *err)
	}
	s.rejected(ctx, d, r)
	*err = r.status()
}

// caught makes a panic of a goroutine that works for a call that call's error.
func (s *Server) caught(d door, err *error) {
	if p := recover(); p != nil {
		s.panicked(d, p, err)
	}
}

func (s *Server) panicked(d door, p any, err *error) {
	s.log.Error("a call panicked", "door", d.name, "panic", clip(fmt.Sprint(p)), "stack", string(debug.Stack()))
	*err = refuse(codes.Internal, "internal", "internal error", nil)
}

// status is what the peer gets.
func (r *refusal) status() error {
	st := status.New(r.code, r.public)
	if r.retry > 0 {
		if with, err := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(r.retry)}); err == nil {
			st = with
		}
	}
	return st.Err()
}

// clip bounds foreign text before it is logged.
func clip(s string) string {
	if len(s) > 512 {
		return s[:512] + "…"
	}
	return s
}

// places is how many connections a door takes, and at most half of the files this process may open: the log and the store
// need theirs.
func (d door) places() int {
	var files unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &files) == nil && files.Cur/2 < uint64(d.connections) {
		return int(files.Cur / 2)
	}
	return d.connections
}

// limit makes a listener keep to a door's number of connections.
func limit(l net.Listener, d door) net.Listener { return sockets.Limit(l, d.places(), d.perPeer) }

// listenTCP opens a TCP door.
func listenTCP(what, address string, d door) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("open the %s door: %s is in use by another process: stop it, or change listen.%s", d.name, address, what)
		}
		return nil, fmt.Errorf("open the %s door at listen.%s: %w", d.name, what, err)
	}
	return limit(l, d), nil
}

// listenUnix opens a Unix socket that only this user may connect to. A socket that somebody listens on is left alone; one
// that a dead process left behind is replaced. The socket is bound under another name and renamed, so that it is never
// there with the wrong mode, and never not there while it is replaced.
func listenUnix(path string, d door) (net.Listener, error) {
	// sun_path of unix(7), with its terminating zero.
	const longest = 107
	temp := filepath.Join(filepath.Dir(path), "."+strconv.FormatInt(int64(os.Getpid()), 36))
	if n := max(len(temp), len(path)); n > longest {
		return nil, fmt.Errorf("open the %s socket %s: the path is too long for a Unix socket by %d bytes: choose a shorter one", d.name, path, n-longest)
	}
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode()&os.ModeSocket == 0:
		return nil, fmt.Errorf("open the %s socket %s: there is something else than a socket: move it away or choose another path", d.name, path)
	case err == nil:
		c, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			c.Close()
		}
		// Only a refused connection says that nobody listens; a full backlog or a foreign socket is not ours to replace.
		if !errors.Is(err, unix.ECONNREFUSED) {
			return nil, fmt.Errorf("open the %s socket %s: it is in use by another process: stop it or choose another path", d.name, path)
		}
	case !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("open the %s socket: %w", d.name, err)
	}
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open the %s socket %s: remove what is left of an earlier start: %w", d.name, path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("open the %s socket %s: %w", d.name, path, err)
	}
	l.SetUnlinkOnClose(false) // it would unlink the temporary name
	if err = os.Chmod(temp, 0o600); err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		l.Close()
		os.Remove(temp)
		return nil, fmt.Errorf("open the %s socket %s: %w", d.name, path, err)
	}
	return &unixListener{Listener: limit(l, d), path: path}, nil
}

type unixListener struct {
	net.Listener
	path string
}

// Close closes the socket and takes its name away; a name that is already another process's cannot be, since the state
// folder is locked.
func (l *unixListener) Close() error {
	os.Remove(l.path)
	return l.Listener.Close()
}

// localPeers is the admin door's handshake: no cryptography, but the peer's uid from the socket, which must be this
// process's own or root.
type localPeers struct{}

// localPeer is who is at the other end of a Unix socket.
type localPeer struct {
	credentials.CommonAuthInfo
	uid uint32
}

func (localPeer) AuthType() string { return "unix-peer" }

func (localPeers) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	fail := func(err error) (net.Conn, credentials.AuthInfo, error) {
		c.Close()
		return nil, nil, err
	}
	uid, err := sockets.PeerUID(c)
	if err != nil {
		return fail(err)
	}
	if !mayAdminister(uid) {
		return fail(fmt.Errorf("uid %d may not use the admin socket", uid))
	}
	return c, localPeer{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, uid: uid}, nil
}

// mayAdminister: the socket's mode lets in nobody else, but a mode can be changed, and root passes any.
func mayAdminister(uid uint32) bool { return uid == 0 || uid == uint32(os.Geteuid()) }

func (localPeers) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("for servers only")
}

func (localPeers) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}
func (localPeers) Clone() credentials.TransportCredentials { return localPeers{} }
func (localPeers) OverrideServerName(string) error         { return nil }
