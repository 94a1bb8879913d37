package agent

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/internal/sockets"
)

const (
	// socketMode: anybody on the host may ask; who asks is told by the kernel. Who may reach the socket at all is
	// decided by the mode of its folder, which is the admin's.
	socketMode = 0o666
	// maxSocketPath is what fits into sockaddr_un with its final zero (unix(7)), in bytes.
	maxSocketPath = 107
	// maxConnections of workloads in all, if the limit of open files allows.
	maxConnections = 16384
	// Each costs two files: itself, and what holds the process behind it.
	filesPerConnection = 2
	// filesOfOurs are those for everything else: state, logs, the server, and attestations under way.
	filesOfOurs = 256
	// Connections to the HTTP door, in all and from one address.
	maxHTTP, maxHTTPFrom = 256, 64
)

// socketConn is a connection that knows by which socket it came, and who is behind it.
type socketConn struct {
	*net.UnixConn
	socket string
	peer   connPeer
	leave  func()
}

// Close closes the connection, lets go of its process and gives its place back.
func (c *socketConn) Close() error {
	defer c.leave()
	defer c.peer.close()
	return c.UnixConn.Close()
}

// workloadCrowd bounds the connections of so many sockets together. One user may take three quarters.
func workloadCrowd(listeners int) *sockets.Crowd[uint32] {
	most := maxConnections
	var files unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &files) == nil {
		ours := min(files.Cur/4, filesOfOurs) + uint64(listeners) //nolint:gosec // a count
		left := files.Cur - min(files.Cur, ours)
		most = int(min(uint64(most), left/filesPerConnection)) //nolint:gosec // at most maxConnections
	}
	return sockets.NewCrowd[uint32](most, most/4*3)
}

// socketListener is a Unix socket whose connections know its name.
type socketListener struct {
	*net.UnixListener
	// name of a dedicated socket; "" = the common one.
	name, path string
	inode      uint64
	crowd      *sockets.Crowd[uint32]
	// allowed says which users may come in.
	allowed func(uid uint32) bool
}

// Accept passes over connections that are too many or not allowed: they are closed before a byte of them is read.
func (l *socketListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := sockets.PeerUID(c)
		if err != nil || !l.allowed(uid) {
			c.Close()
			continue
		}
		leave, ok := l.crowd.Enter(uid)
		if !ok {
			c.Close()
			continue
		}
		return &socketConn{UnixConn: c, socket: l.name, leave: leave}, nil
	}
}

// Close closes the socket and takes its name away, unless the name is another's by now.
func (l *socketListener) Close() error {
	if info, err := os.Lstat(l.path); err == nil && inodeOf(info) == l.inode {
		_ = os.Remove(l.path)
	}
	return l.UnixListener.Close()
}

func inodeOf(info fs.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Ino }

// listen opens a socket for workloads. One that somebody listens on is left alone, one that a dead process left behind is
// replaced. It is bound under another name and renamed, so that it is never there with the wrong mode, and a connection
// finds the old or the new one, never none.
func listen(s Socket, c *sockets.Crowd[uint32]) (*socketListener, error) {
	return listenUnix(s, c, socketMode, func(uint32) bool { return true })
}

// listenAdmin opens the socket of this agent's admin, which has its own few places.
func listenAdmin(path string) (*socketListener, error) {
	return listenUnix(Socket{Path: path}, sockets.NewCrowd[uint32](adminMaxConns, adminMaxConns/4*3), adminSocketMode, mayAdminister)
}

func listenUnix(s Socket, c *sockets.Crowd[uint32], mode fs.FileMode, allowed func(uid uint32) bool) (*socketListener, error) {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("open socket %s: %w", s.Path, fmt.Errorf(format, args...))
	}
	dir := filepath.Dir(s.Path)
	temp := filepath.Join(dir, ".s"+rand.Text()[:8])
	if n := max(len(s.Path), len(temp)); n > maxSocketPath {
		return nil, fail("the path is %d bytes too long for a Unix socket: choose a shorter one", n-maxSocketPath)
	}
	if err := checkSocketDir(dir); err != nil {
		return nil, fail("%w", err)
	}
	switch info, err := os.Lstat(s.Path); {
	case err == nil && info.Mode()&fs.ModeSocket == 0:
		return nil, fail("there is something else than a socket: move it away or choose another path")
	case err == nil:
		conn, err := net.DialTimeout("unix", s.Path, time.Second)
		if err == nil {
			conn.Close()
		}
		// Only a refused connection says that nobody listens; a full backlog or a foreign socket is not ours to replace.
		if !errors.Is(err, unix.ECONNREFUSED) {
			return nil, fail("it is in use by another process: stop that process or choose another path")
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fail("%w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temp, Net: "unix"})
	if err != nil {
		return nil, fail("%w", cause(err))
	}
	l.SetUnlinkOnClose(false) // it would unlink the temporary name
	var info fs.FileInfo
	if err = os.Chmod(temp, mode); err == nil {
		info, err = os.Lstat(temp)
	}
	if err == nil {
		err = os.Rename(temp, s.Path)
	}
	if err != nil {
		l.Close()
		os.Remove(temp)
		return nil, fail("%w", err)
	}
	return &socketListener{UnixListener: l, name: s.Name, path: s.Path, inode: inodeOf(info), crowd: c, allowed: allowed}, nil
}

// checkSocketDir makes the folder if it is missing, and refuses one in which others could put a socket of theirs in the
// place of ours, and so pose as the agent.
func checkSocketDir(dir string) error {
	if err := makeDir(dir); err != nil {
		return err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if mode := info.Mode(); mode.Perm()&0o022 != 0 && mode&fs.ModeSticky == 0 {
		return fmt.Errorf("others may write to its folder (mode %04o): run `chmod go-w %s`, or choose another folder", mode.Perm(), dir)
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; uid != 0 && int(uid) != os.Geteuid() {
		return fmt.Errorf("its folder belongs to uid %d, but this process runs as uid %d: change its owner or choose another folder", uid, os.Geteuid())
	}
	return checkParents(dir)
}

// checkParents refuses a folder that others could move away, with one of theirs in its place: whoever may write to a folder
// may rename what is in it, but for what is another's in a sticky one.
func checkParents(dir string) error {
	named, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	// Links on the way are somebody's too.
	real, err := filepath.EvalSymlinks(named)
	if err != nil {
		return err
	}
	top, err := os.Stat("/")
	if err != nil {
		return err
	}
	// Whoever owns the root of the file system can do anything; in a user namespace that need not be uid 0.
	trusted := func(uid uint32) bool {
		return uid == 0 || int(uid) == os.Geteuid() || uid == top.Sys().(*syscall.Stat_t).Uid
	}
	for _, path := range []string{named, real} {
		for path != "/" {
			info, err := os.Lstat(path)
			if err != nil {
				return err
			}
			if uid := info.Sys().(*syscall.Stat_t).Uid; !trusted(uid) {
				return fmt.Errorf("%s, on the way to it, belongs to uid %d, who could put another in its place: change its owner or choose another folder", path, uid)
			}
			path = filepath.Dir(path)
			if info, err = os.Stat(path); err != nil {
				return err
			}
			st := info.Sys().(*syscall.Stat_t)
			open := info.Mode().Perm() & 0o022
			if st.Gid == st.Uid {
				open &= 0o002 // a user's own group, by the custom of useradd(8)
			}
			if open != 0 && info.Mode()&fs.ModeSticky == 0 {
				return fmt.Errorf("others may write to %s (mode %04o), and so put another folder in the place of %s: run `chmod go-w %s`, or choose another folder", path, info.Mode().Perm(), dir, path)
			}
		}
	}
	return nil
}

// makeDir makes a missing folder with its parents, so that others may pass through it to the socket, whatever the umask.
func makeDir(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := makeDir(filepath.Dir(dir)); err != nil {
		return err
	}
	switch err := os.Mkdir(dir, 0o755); {
	case errors.Is(err, fs.ErrExist):
		return nil
	case err != nil:
		return err
	}
	return os.Chmod(dir, 0o755)
}

// cause is what a net error is about, without the temporary name.
func cause(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// listenHTTP opens the listener for probes and metrics.
func listenHTTP(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("open http at %s: it is in use by another process: stop that process or change http", address)
	}
	if err != nil {
		return nil, fmt.Errorf("open http at %s: %w", address, cause(err))
	}
	return sockets.Limit(l, maxHTTP, maxHTTPFrom), nil
}
