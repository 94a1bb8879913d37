package identity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// UnixConfig configures a UnixAttestor.
type UnixConfig struct {
	// WantsHash reports whether some registration asks for a unix:sha256 selector now; it is called for every connection.
	// nil = none does, and no executable is read.
	WantsHash func() bool
	// MaxHashSize bounds the executables that are hashed, in bytes; 0 = 256 MiB. A larger one gets no hash.
	MaxHashSize int64
	Logger      *slog.Logger
}

const defaultMaxHashSize = 256 << 20

// Bounds of what is read about a process.
const (
	maxProcFile = 64 << 10
	// maxGroups keeps a workload's selectors under what Authorize takes.
	maxGroups = MaxSelectors * 3
)

// UnixAttestor attests the process at the other end of a Unix socket.
//
// Boundary: uid, gid and supplementary groups are what the kernel noted when the socket was connected, so a process that
// execs a setuid or an approved program afterwards keeps its own. A systemd unit is a place that only root moves a process
// into; so is a cgroup, down to the unit. Hints: the executable's path and hash are read later than the connect and say
// nothing about what else runs in the process; they narrow a registration, they don't carry one.
//
// The process is held by a pidfd taken from the socket itself (SO_PEERPIDFD, Linux 6.5), and what /proc says is believed only
// if the process still lives after it was read: until then its PID can't have been given to another. An attested process
// costs one descriptor: the pidfd, or where the kernel has none its /proc/PID/stat.
//
// Selectors: unix:uid:N, unix:gid:N, unix:supplementary_gid:N, unix:path:/abs, unix:sha256:HEX, systemd:unit:NAME, cgroup:/PATH.
type UnixAttestor struct {
	wantsHash func() bool
	logger    *slog.Logger
	hasher    *hasher

	// ownUserNS as /proc shows it: "user:[4026531837]".
	ownUserNS string
	// mapped is set when every ID exists in our user namespace, so that overflowID is an ID and not "unmapped".
	mapped bool
	pidfds bool
	// unreadable warns once that the namespaces of others' processes can't be read.
	unreadable sync.Once
}

var _ WorkloadAttestor = (*UnixAttestor)(nil)

// overflowID is what the kernel shows in place of an ID that our user namespace has no number for.
const overflowID = 65534

// NewUnixAttestor checks that /proc is the one of this process's own PID namespace.
func NewUnixAttestor(c UnixConfig) (*UnixAttestor, error) {
	a := &UnixAttestor{wantsHash: c.WantsHash, logger: c.Logger}
	if a.logger == nil {
		a.logger = slog.New(slog.DiscardHandler)
	}
	if a.wantsHash == nil {
		a.wantsHash = func() bool { return false }
	}
	switch {
	case c.MaxHashSize < 0:
		return nil, fmt.Errorf("unix attestor: a maximum of %d bytes for hashed executables makes no sense; 0 means %d", c.MaxHashSize, defaultMaxHashSize)
	case c.MaxHashSize == 0:
		c.MaxHashSize = defaultMaxHashSize
	}
	a.hasher = newHasher(c.MaxHashSize)

	self, err := os.Readlink("/proc/self")
	if err != nil {
		return nil, fmt.Errorf("unix attestor: workloads are attested by /proc, which can't be read: mount it (%w)", err)
	}
	if self != strconv.Itoa(os.Getpid()) {
		return nil, fmt.Errorf("unix attestor: /proc belongs to another PID namespace (this process is %d here and %s there): mount the /proc of its own namespace", os.Getpid(), self)
	}
	if a.ownUserNS, err = os.Readlink("/proc/self/ns/user"); err != nil {
		return nil, fmt.Errorf("unix attestor: read own user namespace: %w", err)
	}
	uidMap, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return nil, fmt.Errorf("unix attestor: read own user namespace: %w", err)
	}
	a.mapped = slices.Equal(strings.Fields(string(uidMap)), []string{"0", "0", "4294967295"})
	if a.pidfds, err = probePidfd(); err != nil {
		return nil, fmt.Errorf("unix attestor: ask the kernel for SO_PEERPIDFD: %w", err)
	}
	if !a.pidfds {
		a.logger.Warn("this kernel has no SO_PEERPIDFD (Linux 6.5): workloads are held by /proc and their start time, and a PID that is recycled before it is looked at can't be noticed; run Linux 6.5 or newer")
	}
	return a, nil
}

// probePidfd asks for the pidfd of a socket pair's other end, which is this process.
func probePidfd() (bool, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	fd, err := unix.GetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, unix.Close(fd)
}

// peer is what the socket itself says of who connected it.
type peer struct {
	unix.Ucred
	groups []uint32
	// groupsErr is why groups is empty.
	groupsErr error
	// pidfd is -1 where the kernel has none.
	pidfd int
}

// AttestWorkload attests the process that connected conn, a *net.UnixConn.
func (a *UnixAttestor) AttestWorkload(ctx context.Context, conn net.Conn) (Workload, error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return Workload{}, fmt.Errorf("attest a workload: a %T has no process behind it; listen on a Unix socket", conn)
	}
	p, err := a.peerOf(uc)
	if err != nil {
		return Workload{}, fmt.Errorf("attest a workload: %w", err)
	}
	h, err := hold(p)
	if err != nil {
		return Workload{}, fmt.Errorf("attest pid %d uid %d: %w", p.Pid, p.Uid, err)
	}
	w, err := a.attest(ctx, p, h)
	if err != nil {
		h.close()
		return Workload{}, fmt.Errorf("attest pid %d uid %d: %w", p.Pid, p.Uid, err)
	}
	h.slim()
	for _, note := range w.Notes {
		a.logger.DebugContext(ctx, "selector withheld", "instance", w.Instance, "reason", note)
	}
	return w, nil
}

func (a *UnixAttestor) peerOf(conn *net.UnixConn) (peer, error) {
	p := peer{pidfd: -1}
	raw, err := conn.SyscallConn()
	if err != nil {
		return p, err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			inner = fmt.Errorf("ask the socket who is there (SO_PEERCRED): %w", err)
			return
		}
		p.Ucred = *cred
		if p.Pid <= 0 {
			inner = errors.New("the caller is in a PID namespace that can't be seen from here (the kernel shows pid 0): run the agent with hostPID, or give the workload a socket of its own through the CSI driver")
			return
		}
		if p.Uid == ^uint32(0) || p.Gid == ^uint32(0) {
			inner = errors.New("the socket names no user: it was not connected by a process")
			return
		}
		p.groups, p.groupsErr = peerGroups(int(fd))
		if !a.pidfds {
			return
		}
		if p.pidfd, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD); err != nil {
			p.pidfd = -1
			inner = fmt.Errorf("hold pid %d (SO_PEERPIDFD): it may have ended already (%w)", p.Pid, err)
		}
	}); err != nil {
		return p, err
	}
	return p, inner
}

// NoDescriptors reports whether an attestation failed because this process, or the machine, has no file descriptor left. It
// says nothing about the caller.
func NoDescriptors(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE)
}

var errTooManyGroups = fmt.Errorf("it is in more than %d supplementary groups", maxGroups)

// peerGroups returns the supplementary groups the process had when it connected (SO_PEERGROUPS, Linux 4.13).
func peerGroups(fd int) ([]uint32, error) {
	groups := make([]uint32, maxGroups)
	size := uint32(len(groups) * 4) //nolint:gosec // a constant
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
		uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
	switch errno {
	case 0:
		groups = groups[:size/4]
		slices.Sort(groups)
		return slices.Compact(groups), nil
	case unix.ERANGE:
		return nil, errTooManyGroups
	default:
		return nil, errno
	}
}

// held is a process that can be asked whether it is still the same one.
type held struct {
	mu sync.RWMutex
	// dir is /proc/PID, opened once: it never shows another process, even after the PID is recycled. It is -1 after slim.
	dir int
	// pidfd is -1 where the kernel has none; then stat is /proc/PID/stat, opened once too, whose start time is compared.
	pidfd, stat int
	start       string
	closed      bool
}

func hold(p peer) (*held, error) {
	dir, err := unix.Open("/proc/"+strconv.Itoa(int(p.Pid)), unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	h := &held{dir: dir, pidfd: p.pidfd, stat: -1}
	if err != nil {
		h.close()
		if errors.Is(err, unix.ENOENT) {
			return nil, errors.New("the process ended before it was attested, or /proc hides it (hidepid): mount /proc so that the agent sees all processes")
		}
		return nil, fmt.Errorf("open its folder in /proc: %w", err)
	}
	if h.pidfd < 0 {
		if h.stat, err = unix.Openat(dir, "stat", unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0); err == nil {
			h.start, err = h.startTime()
		}
		if err != nil {
			h.close()
			return nil, fmt.Errorf("read its start time: %w", err)
		}
	}
	return h, nil
}

func (h *held) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for _, fd := range []*int{&h.dir, &h.pidfd, &h.stat} {
		if *fd >= 0 {
			_ = unix.Close(*fd)
			*fd = -1
		}
	}
}

// slim gives up the folder: all that is asked from now on is whether the process is still there.
func (h *held) slim() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.dir >= 0 {
		_ = unix.Close(h.dir)
		h.dir = -1
	}
}

// alive reports whether the process has not ended. A zombie has ended.
func (h *held) alive() bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.closed {
		return false
	}
	if h.pidfd < 0 {
		start, err := h.startTime()
		return err == nil && start == h.start
	}
	for {
		fds := []unix.PollFd{{Fd: int32(h.pidfd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
		n, err := unix.Poll(fds, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n == 0
	}
}

// read returns the named file of /proc/PID.
func (h *held) read(name string) ([]byte, error) {
	fd, err := unix.Openat(h.dir, name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 0, 1024)
	for len(buf) <= maxProcFile {
		if len(buf) == cap(buf) {
			buf = slices.Grow(buf, len(buf))
		}
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, err
		case n == 0:
			return buf, nil
		default:
			buf = buf[:len(buf)+n]
		}
	}
	return nil, fmt.Errorf("/proc/PID/%s is longer than %d bytes", name, maxProcFile)
}

// link returns where a symbolic link of /proc/PID leads.
func (h *held) link(name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(h.dir, name, buf)
	if err != nil {
		return "", err
	}
	if n == len(buf) {
		return "", unix.ENAMETOOLONG
	}
	return string(buf[:n]), nil
}

// startTime is field 22 of /proc/PID/stat, in clock ticks since boot; an error when the process has ended.
func (h *held) startTime() (string, error) {
	stat := make([]byte, 4096) // its 52 numbers and a name of 64 bytes are far less (proc(5))
	n, err := unix.Pread(h.stat, stat, 0)
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Pread(h.stat, stat, 0)
	}
	if err != nil {
		return "", err
	}
	stat = stat[:n]
	// The name, field 2, is in parentheses and may hold anything.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return "", errors.New("/proc/PID/stat has too few fields")
	}
	if state := string(fields[0]); state == "Z" || state == "X" {
		return "", errors.New("the process has ended")
	}
	return string(fields[19]), nil
}

// attest collects the selectors of a held process.
func (a *UnixAttestor) attest(ctx context.Context, p peer, h *held) (Workload, error) {
	w := Workload{Instance: fmt.Sprintf("pid %d uid %d", p.Pid, p.Uid), Alive: h.alive, Close: h.close}
	note := func(format string, args ...any) { w.Notes = append(w.Notes, fmt.Sprintf(format, args...)) }
	add := func(typ, value string) {
		s, err := ParseSelector(typ + ":" + value)
		if err != nil {
			note("%s is left out: %v", typ, err)
			return
		}
		w.Selectors = append(w.Selectors, s)
	}
	number := func(typ string, id uint32) {
		if id == overflowID && !a.mapped {
			note("%s is left out: %d may stand for any ID that the agent's user namespace has no number for", typ, id)
			return
		}
		add(typ, strconv.FormatUint(uint64(id), 10))
	}

	ours, why := a.ourUserNamespace(h)
	if ours {
		number("unix:uid", p.Uid)
		number("unix:gid", p.Gid)
		if p.groupsErr != nil {
			note("unix:supplementary_gid is left out: %v", p.groupsErr)
		}
		for _, g := range p.groups {
			number("unix:supplementary_gid", g)
		}
	} else {
		w.Instance += " of another user namespace"
		w.Foreign = why
		note("unix:uid, unix:gid, unix:supplementary_gid and unix:path are left out: %s", why)
	}

	if text, err := h.read("cgroup"); NoDescriptors(err) {
		return Workload{}, fmt.Errorf("read its cgroup: %w", err)
	} else if err != nil {
		note("cgroup and systemd:unit are left out: %v", err)
	} else if cgroup, err := parseCgroup(text); err != nil {
		note("cgroup and systemd:unit are left out: %v", err)
	} else {
		add("cgroup", cgroup)
		if unit := systemdUnit(cgroup); unit != "" {
			add("systemd:unit", unit)
		}
	}

	exe, err := h.link("exe")
	switch {
	case err != nil:
		note("unix:path is left out: the executable can't be read, run the agent as root or with CAP_SYS_PTRACE (%v)", err)
	case strings.HasSuffix(exe, " (deleted)"):
		note("unix:path is left out: the executable has been deleted or replaced since the process began")
	case path.Clean(exe) != exe || !path.IsAbs(exe):
		note("unix:path is left out: the executable has no path here")
	case ours:
		add("unix:path", exe)
	}
	if a.wantsHash() {
		if sum, err := a.hasher.sum(ctx, h.dir); NoDescriptors(err) {
			return Workload{}, fmt.Errorf("hash its executable: %w", err)
		} else if err != nil {
			note("unix:sha256 is left out: %v", err)
		} else {
			add("unix:sha256", sum)
		}
	}

	// Last of all: nothing of the above is believed unless the process that connected was there until it was read.
	if !h.alive() {
		return Workload{}, errors.New("the process ended while it was attested")
	}
	return w, nil
}

// ourUserNamespace reports whether the process is in our user namespace, and if not, why that is believed. Elsewhere an
// unprivileged user can be any uid (user_namespaces(7)). What can't be read is taken for foreign.
func (a *UnixAttestor) ourUserNamespace(h *held) (bool, string) {
	ns, err := h.link("ns/user")
	if err != nil {
		a.unreadable.Do(func() {
			a.logger.Warn("the user namespace of a workload can't be read, so that its uid and gid selectors are withheld: run the agent as root or with CAP_SYS_PTRACE", "err", err)
		})
		return false, fmt.Sprintf("its user namespace can't be read, run the agent as root or with CAP_SYS_PTRACE (%v)", err)
	}
	if ns != a.ownUserNS {
		return false, "it is in another user namespace, where any user may take any uid"
	}
	return true, ""
}
