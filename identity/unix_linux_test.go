package identity

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// TestMain makes the test binary also the workload that is attested: a child with helperEnv set connects and stays.
func TestMain(m *testing.M) {
	if mode := os.Getenv(helperEnv); mode != "" {
		if err := workloadMain(mode); err != nil {
			fmt.Fprintln(os.Stderr, "workload:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

const (
	helperEnv = "SIGNET_TEST_WORKLOAD"
	socketEnv = "SIGNET_TEST_SOCKET"
	innerEnv  = "SIGNET_TEST_INNER"
)

// workloadMain is a workload: it connects to the socket, then does as it is told.
func workloadMain(mode string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0) // survives an exec
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: os.Getenv(socketEnv)}); err != nil {
		return err
	}
	kind, arg, _ := strings.Cut(mode, " ")
	switch kind {
	case "die":
		return nil
	case "exec":
		// Whoever started us holds the other end of standard input, so that the program stays.
		return syscall.Exec(arg, []string{arg}, nil) //nolint:gosec // a test's own program
	}
	signal.Ignore(syscall.SIGPIPE)
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// bench is a socket and an attestor.
type bench struct {
	*UnixAttestor
	socket   string
	listener *net.UnixListener
}

func newBench(t testing.TB, change ...func(*UnixConfig)) *bench {
	t.Helper()
	// Not t.TempDir: its parent is closed to the other users that tests connect as.
	dir, err := os.MkdirTemp("", "signet-attest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &bench{socket: filepath.Join(dir, "agent.sock")}
	if b.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: b.socket, Net: "unix"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.listener.Close() })
	for path, mode := range map[string]os.FileMode{dir: 0o755, b.socket: 0o777} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	c := UnixConfig{}
	for _, f := range change {
		f(&c)
	}
	if b.UnixAttestor, err = NewUnixAttestor(c); err != nil {
		t.Fatal(err)
	}
	return b
}

// workload is a child process; it ends when its standard input is closed, or with the test.
type workload struct {
	*exec.Cmd
	stdin io.WriteCloser
	once  sync.Once
}

func (w *workload) end() {
	w.once.Do(func() {
		w.stdin.Close()
		w.Wait() //nolint:errcheck // however it ended
	})
}

func (b *bench) start(t testing.TB, mode string, attr *syscall.SysProcAttr, change ...func(*exec.Cmd)) *workload {
	t.Helper()
	// By this name the binary can be run by users who may not enter its folder.
	cmd := exec.Command("/proc/self/exe")
	// The race detector would let every child wait a second before it ends.
	cmd.Env = []string{helperEnv + "=" + mode, socketEnv + "=" + b.socket, "GORACE=atexit_sleep_ms=0"}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = attr
	for _, f := range change {
		f(cmd)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w := &workload{Cmd: cmd, stdin: stdin}
	t.Cleanup(w.end)
	return w
}

func (b *bench) accept(t testing.TB) *net.UnixConn {
	t.Helper()
	if err := b.listener.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	conn, err := b.listener.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (b *bench) attestConn(t testing.TB, conn net.Conn) Workload {
	t.Helper()
	w, err := b.AttestWorkload(context.Background(), conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

func as(uid, gid uint32, groups ...uint32) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid, Groups: groups}}
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, to start processes of other users")
	}
}

// of returns the values shown for a type.
func of(w Workload, typ string) (values []string) {
	for _, s := range w.Selectors {
		if v, ok := strings.CutPrefix(string(s), typ+":"); ok {
			values = append(values, v)
		}
	}
	return values
}

func wantSelectors(t testing.TB, w Workload, typ string, want ...string) {
	t.Helper()
	if have := of(w, typ); !slices.Equal(have, want) {
		t.Errorf("%s is %q, want %q (notes: %q)", typ, have, want, w.Notes)
	}
}

func noted(w Workload, about string) bool {
	return slices.ContainsFunc(w.Notes, func(n string) bool { return strings.Contains(n, about) })
}

// eachWay runs a test with pidfds and as on a kernel without them.
func eachWay(t *testing.T, f func(t *testing.T, b *bench)) {
	t.Run("pidfd", func(t *testing.T) {
		b := newBench(t)
		if !b.pidfds {
			t.Skip("this kernel has no SO_PEERPIDFD")
		}
		f(t, b)
	})
	t.Run("start time", func(t *testing.T) {
		b := newBench(t)
		b.pidfds = false
		f(t, b)
	})
}

func TestAWorkloadIsWhatTheKernelSaysOfItsSocket(t *testing.T) {
	needRoot(t)
	eachWay(t, func(t *testing.T, b *bench) {
		p := b.start(t, "stay", as(12345, 23456, 9, 7, 9, 400000))
		w := b.attestConn(t, b.accept(t))
		wantSelectors(t, w, "unix:uid", "12345")
		wantSelectors(t, w, "unix:gid", "23456")
		wantSelectors(t, w, "unix:supplementary_gid", "7", "9", "400000")
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		wantSelectors(t, w, "unix:path", exe)
		wantSelectors(t, w, "unix:sha256")
		if want := fmt.Sprintf("pid %d uid 12345", p.Process.Pid); w.Instance != want {
			t.Errorf("instance %q, want %q", w.Instance, want)
		}
		if !w.Alive() {
			t.Error("a living process is not alive")
		}
		for _, s := range w.Selectors {
			if _, err := ParseSelector(string(s)); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestAWorkloadOfTheSameUser(t *testing.T) {
	b := newBench(t)
	b.start(t, "stay", nil)
	w := b.attestConn(t, b.accept(t))
	wantSelectors(t, w, "unix:uid", strconv.Itoa(os.Getuid()))
	wantSelectors(t, w, "unix:gid", strconv.Itoa(os.Getgid()))
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if own, err := parseCgroup(text); err == nil {
		wantSelectors(t, w, "cgroup", own)
	} else if !noted(w, err.Error()) {
		t.Errorf("%q does not say %v", w.Notes, err)
	}
}

func TestAProcessThatEndedIsNotAlive(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		p := b.start(t, "stay", nil)
		w := b.attestConn(t, b.accept(t))
		if !w.Alive() {
			t.Fatal("not alive from the start")
		}
		if err := p.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		p.end()
		if w.Alive() {
			t.Error("still alive after its end")
		}
		w.Close()
		w.Close()
		if w.Alive() {
			t.Error("alive after Close")
		}
	})
}

func TestAZombieIsNotAlive(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		p := b.start(t, "stay", nil)
		w := b.attestConn(t, b.accept(t))
		if err := p.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		// Waits for the end and leaves the zombie.
		var info unix.Siginfo
		if err := unix.Waitid(unix.P_PID, p.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
			t.Fatal(err)
		}
		if w.Alive() {
			t.Error("a zombie is alive")
		}
	})
}

func TestAProcessThatEndedBeforeItWasAttestedIsRefused(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		p := b.start(t, "die", nil)
		conn := b.accept(t)
		p.end()
		if w, err := b.AttestWorkload(t.Context(), conn); err == nil {
			t.Errorf("attested as %+v", w)
		} else if strings.Contains(err.Error(), "\n") {
			t.Error(err)
		}
	})
}

func TestAClosedWorkloadIsNotAlive(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		b.start(t, "stay", nil)
		w := b.attestConn(t, b.accept(t))
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for w.Alive() {
					runtime.Gosched()
				}
			})
		}
		wg.Go(w.Close)
		wg.Wait()
	})
}

// A caller connects and then executes a setuid program: /proc would now say root.
func TestTheUserIsTheOneWhoConnectedNotWhoWasExecuted(t *testing.T) {
	needRoot(t)
	eachWay(t, func(t *testing.T, b *bench) {
		cat, err := exec.LookPath("cat")
		if err != nil {
			t.Skip("no cat here")
		}
		content, err := os.ReadFile(cat)
		if err != nil {
			t.Fatal(err)
		}
		setuid := filepath.Join(filepath.Dir(b.socket), "setuid-cat")
		if err := os.WriteFile(setuid, content, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(setuid, 0o755|os.ModeSetuid); err != nil {
			t.Fatal(err)
		}
		p := b.start(t, "exec "+setuid, as(12345, 23456))
		conn := b.accept(t)
		status := fmt.Sprintf("/proc/%d/status", p.Process.Pid)
		for deadline := time.Now().Add(20 * time.Second); ; runtime.Gosched() {
			exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.Process.Pid))
			if exe == setuid {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("it still executes %s", exe)
			}
		}
		if text, err := os.ReadFile(status); err != nil || !bytes.Contains(text, []byte("Uid:\t12345\t0\t0\t0")) {
			t.Skipf("setuid has no effect on this file system (%v)", err)
		}
		w := b.attestConn(t, conn)
		wantSelectors(t, w, "unix:uid", "12345")
		wantSelectors(t, w, "unix:gid", "23456")
		wantSelectors(t, w, "unix:path", setuid) // a hint, and here it misleads
	})
}

func TestAProcessOfAnotherUserNamespaceHasNoUser(t *testing.T) {
	for name, mapping := range map[string]int{"as its root": 0, "as an ordinary user": 1000} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, func(c *UnixConfig) { c.WantsHash = func() bool { return true } })
			attr := &syscall.SysProcAttr{
				Cloneflags:  syscall.CLONE_NEWUSER,
				UidMappings: []syscall.SysProcIDMap{{ContainerID: mapping, HostID: os.Getuid(), Size: 1}},
				GidMappings: []syscall.SysProcIDMap{{ContainerID: mapping, HostID: os.Getgid(), Size: 1}},
			}
			probe := exec.Command("/proc/self/exe", "-test.run=^$")
			probe.SysProcAttr = attr
			if err := probe.Run(); err != nil {
				t.Skipf("no user namespaces here: %v", err)
			}
			b.start(t, "stay", attr)
			w := b.attestConn(t, b.accept(t))
			for _, typ := range []string{"unix:uid", "unix:gid", "unix:supplementary_gid", "unix:path"} {
				wantSelectors(t, w, typ)
			}
			if len(of(w, "unix:sha256")) != 1 || !noted(w, "another user namespace") || !strings.Contains(w.Instance, "another user namespace") || !strings.Contains(w.Foreign, "another user namespace") {
				t.Errorf("%+v", w)
			}
		})
	}
}

// An agent that is not root can't see the namespaces of others' processes: it must take them for foreign.
func TestANamespaceThatCannotBeReadIsTakenForForeign(t *testing.T) {
	if os.Getenv(innerEnv) == "" {
		needRoot(t)
		inner(t, as(12345, 12345), nil)
		return
	}
	var log bytes.Buffer
	b := newBench(t, func(c *UnixConfig) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	for range 2 {
		w := b.attestConn(t, acceptFrom(t, 3))
		wantSelectors(t, w, "unix:uid")
		if !noted(w, "can't be read") || !noted(w, "CAP_SYS_PTRACE") {
			t.Errorf("%q", w.Notes)
		}
	}
	if n := strings.Count(log.String(), "user namespace of a workload can't be read"); n != 1 {
		t.Errorf("said %d times:\n%s", n, log.String())
	}
}

// inner runs the calling test once more in a process of its own, which finds two connections of this process waiting at the
// listener that is its descriptor 3.
func inner(t *testing.T, attr *syscall.SysProcAttr, expectOutput []string) {
	t.Helper()
	b := newBench(t)
	for range 2 {
		conn, err := net.Dial("unix", b.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	listener, err := b.listener.File()
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), innerEnv+"=1")
	cmd.ExtraFiles = []*os.File{listener}
	cmd.SysProcAttr = attr
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	if reason, ok := skipReason(out); ok {
		t.Skip(reason)
	}
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range expectOutput {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

func skipReason(out []byte) (string, bool) {
	if !bytes.Contains(out, []byte("--- SKIP")) {
		return "", false
	}
	last := ""
	for s := bufio.NewScanner(bytes.NewReader(out)); s.Scan(); {
		if strings.Contains(s.Text(), "_test.go:") {
			last = strings.TrimSpace(s.Text())
		}
	}
	return last, true
}

// acceptFrom takes a connection from the listener in an inherited descriptor.
func acceptFrom(t *testing.T, fd int) *net.UnixConn {
	t.Helper()
	conn, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
	if errors.Is(err, unix.EAGAIN) {
		t.Fatal("nobody is waiting at the listener")
	}
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(conn), "conn")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.UnixConn)
}

func newPIDNamespace() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
}

// ownProc mounts the /proc of this PID namespace.
func ownProc(t *testing.T) {
	t.Helper()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Skipf("no mount namespace of our own: %v", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		t.Skipf("no /proc of our own: %v", err)
	}
}

func TestACallerWhosePIDCannotBeSeenIsRefused(t *testing.T) {
	if os.Getenv(innerEnv) == "" {
		needRoot(t)
		inner(t, newPIDNamespace(), nil)
		return
	}
	if _, err := NewUnixAttestor(UnixConfig{}); err == nil || !strings.Contains(err.Error(), "/proc belongs to another PID namespace") {
		t.Errorf("the /proc of others was taken for our own: %v", err)
	}
	ownProc(t)
	b := newBench(t)
	for range 2 {
		_, err := b.AttestWorkload(t.Context(), acceptFrom(t, 3))
		if err == nil || !strings.Contains(err.Error(), "hostPID") || !strings.Contains(err.Error(), "CSI") {
			t.Error(err)
		}
	}
}

// In a PID namespace of its own the test decides which PID comes next, and gives that of a workload that has ended to another
// process: an approved one of root.
func TestARecycledPIDInheritsNothing(t *testing.T) {
	if os.Getenv(innerEnv) == "" {
		needRoot(t)
		inner(t, newPIDNamespace(), nil)
		return
	}
	ownProc(t)
	const lastPID = "/proc/sys/kernel/ns_last_pid"
	// recycle starts processes until one has the PID.
	recycle := func(t *testing.T, b *bench, pid int) *workload {
		t.Helper()
		for range 2000 {
			if err := os.WriteFile(lastPID, []byte(strconv.Itoa(pid-1)), 0); err != nil {
				t.Skipf("can't choose the next PID: %v", err)
			}
			w := b.start(t, "stay", nil)
			if w.Process.Pid == pid {
				return w
			}
			w.end()
		}
		t.Skipf("PID %d never came again", pid)
		return nil
	}
	eachWay(t, func(t *testing.T, b *bench) {
		attested, late := b.start(t, "stay", as(12345, 12345)), (*workload)(nil)
		w := b.attestConn(t, b.accept(t))
		attested.end()
		recycle(t, b, attested.Process.Pid)
		b.accept(t)
		if w.Alive() {
			t.Error("another process with the same PID passes for the one that was attested")
		}
		if !b.pidfds {
			return // what is recycled before the first look can't be noticed, as the log says
		}
		late = b.start(t, "stay", as(12345, 12345))
		conn := b.accept(t)
		late.end()
		recycle(t, b, late.Process.Pid)
		if w, err := b.AttestWorkload(t.Context(), conn); err == nil {
			t.Errorf("the new owner of the PID was attested for the old: %+v", w)
		}
	})
}

func TestProcessesThatConnectAndDieAreNeverTakenForOthers(t *testing.T) {
	needRoot(t)
	b := newBench(t)
	for i := range 60 {
		p := b.start(t, "die", as(uint32(20000+i), 5))
		w, err := b.AttestWorkload(t.Context(), b.accept(t))
		p.end()
		if err != nil {
			continue
		}
		wantSelectors(t, w, "unix:uid", strconv.Itoa(20000+i))
		if !strings.Contains(w.Instance, fmt.Sprintf("pid %d ", p.Process.Pid)) || w.Alive() {
			t.Errorf("%q of pid %d, alive %v", w.Instance, p.Process.Pid, w.Alive())
		}
		w.Close()
	}
}

func TestAProcessInTooManyGroupsShowsNone(t *testing.T) {
	needRoot(t)
	b := newBench(t)
	var groups []uint32
	for i := range maxGroups {
		groups = append(groups, uint32(1000+i))
	}
	b.start(t, "stay", as(1, 1, groups...))
	w := b.attestConn(t, b.accept(t))
	if len(of(w, "unix:supplementary_gid")) != maxGroups || len(w.Selectors) > MaxSelectors*4 {
		t.Errorf("%d groups, %d selectors", len(of(w, "unix:supplementary_gid")), len(w.Selectors))
	}
	b.start(t, "stay", as(1, 1, append(groups, 1)...))
	w = b.attestConn(t, b.accept(t))
	wantSelectors(t, w, "unix:supplementary_gid")
	wantSelectors(t, w, "unix:uid", "1")
	if !noted(w, "supplementary groups") {
		t.Errorf("%q", w.Notes)
	}
}

func TestAnExecutableThatWasReplacedHasNoPath(t *testing.T) {
	b := newBench(t, func(c *UnixConfig) { c.WantsHash = func() bool { return true } })
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(filepath.Dir(b.socket), "workload")
	if err := os.WriteFile(copied, self, 0o755); err != nil {
		t.Fatal(err)
	}
	b.start(t, "stay", nil, func(c *exec.Cmd) { c.Path = copied })
	conn := b.accept(t)
	if err := os.Remove(copied); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(copied, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	w := b.attestConn(t, conn)
	wantSelectors(t, w, "unix:path")
	if !noted(w, "deleted or replaced") {
		t.Errorf("%q", w.Notes)
	}
	// The hash is of what is executed, not of what now has its name.
	sum := sha256.Sum256(self)
	wantSelectors(t, w, "unix:sha256", hex.EncodeToString(sum[:]))
}

func TestExecutablesAreHashedOnceAndOnlyIfWanted(t *testing.T) {
	wanted := false
	b := newBench(t, func(c *UnixConfig) { c.WantsHash = func() bool { return wanted } })
	b.start(t, "stay", nil)
	conn := b.accept(t)
	wantSelectors(t, b.attestConn(t, conn), "unix:sha256")
	if len(b.hasher.known) != 0 {
		t.Error("an executable was read that nobody asked for")
	}
	wanted = true
	first := of(b.attestConn(t, conn), "unix:sha256")
	if len(first) != 1 || len(b.hasher.known) != 1 {
		t.Fatalf("%q, %d known", first, len(b.hasher.known))
	}
	for v := range b.hasher.known {
		b.hasher.known[v] = strings.Repeat("ab", 32) // shows where the next answer comes from
	}
	wantSelectors(t, b.attestConn(t, conn), "unix:sha256", strings.Repeat("ab", 32))

	b.hasher = newHasher(1000)
	if w := b.attestConn(t, conn); len(of(w, "unix:sha256")) != 0 || !noted(w, "at most 1000 are hashed") {
		t.Errorf("%q %q", w.Selectors, w.Notes)
	}
	b.hasher = newHasher(defaultMaxHashSize)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w, err := b.AttestWorkload(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if len(of(w, "unix:sha256")) != 0 || len(b.hasher.known) != 0 {
		t.Errorf("%q", w.Selectors)
	}
}

func TestAHashIsKnownByTheFilesVersion(t *testing.T) {
	h := newHasher(defaultMaxHashSize)
	dir := t.TempDir()
	file := filepath.Join(dir, "exe")
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for i, content := range []string{"one", "longer", "again!"} {
		// Another file under the same name: whatever the clock's grain, the inode or ctime differs.
		next := filepath.Join(dir, strconv.Itoa(i))
		if err := os.WriteFile(next, []byte(content), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, file); err != nil {
			t.Fatal(err)
		}
		want := sha256.Sum256([]byte(content))
		if sum, err := h.sum(t.Context(), fd); err != nil || sum != hex.EncodeToString(want[:]) {
			t.Errorf("%q: %s %v", content, sum, err)
		}
	}
	for i := range maxKnownHashes {
		h.known[fileVersion{ino: uint64(i), size: -1}] = "x"
	}
	if err := os.WriteFile(file, []byte("one more"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := h.sum(t.Context(), fd); err != nil || len(h.known) > maxKnownHashes {
		t.Errorf("%d known, %v", len(h.known), err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(file, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := h.sum(t.Context(), fd); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Error(err)
	}
}

func TestFilesOfProcAreReadWholeOrNotAtAll(t *testing.T) {
	dir := t.TempDir()
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	h := &held{dir: fd, pidfd: -1, stat: -1}
	for _, n := range []int{0, 1, 1023, 1024, 1025, 5000, maxProcFile, maxProcFile + 1, maxProcFile * 3} {
		want := bytes.Repeat([]byte("0123456789"), n/10+1)[:n]
		if err := os.WriteFile(filepath.Join(dir, "cgroup"), want, 0o600); err != nil {
			t.Fatal(err)
		}
		have, err := h.read("cgroup")
		if tooLong := n > maxProcFile; tooLong != (err != nil) || !tooLong && !bytes.Equal(have, want) {
			t.Errorf("%d bytes: %d, %v", n, len(have), err)
		}
	}
	if err := os.Symlink("/etc/hostname", filepath.Join(dir, "stat")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.read("stat"); err == nil {
		t.Error("a symbolic link was followed")
	}
}

func TestOnlyUnixSocketsHaveProcessesBehindThem(t *testing.T) {
	b := newBench(t)
	a, c := net.Pipe()
	defer a.Close()
	defer c.Close()
	if _, err := b.AttestWorkload(t.Context(), a); err == nil || !strings.Contains(err.Error(), "Unix socket") {
		t.Error(err)
	}
	b.start(t, "stay", nil)
	conn := b.accept(t)
	conn.Close()
	if _, err := b.AttestWorkload(t.Context(), conn); err == nil {
		t.Error("a closed connection was attested")
	}
}

func TestAttestationLeavesNoDescriptorsBehind(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		count := func() int {
			entries, err := os.ReadDir("/proc/self/fd")
			if err != nil {
				t.Fatal(err)
			}
			return len(entries)
		}
		stays, dies := b.start(t, "stay", nil), (*workload)(nil)
		conn := b.accept(t)
		dies = b.start(t, "die", nil)
		dead := b.accept(t)
		dies.end()
		before := count()
		for range 20 {
			w, err := b.AttestWorkload(t.Context(), conn)
			if err != nil {
				t.Fatal(err)
			}
			w.Close()
			if _, err := b.AttestWorkload(t.Context(), dead); err == nil {
				t.Fatal("a dead process was attested")
			}
		}
		if after := count(); after > before {
			t.Errorf("%d descriptors before, %d after", before, after)
		}
		stays.end()
	})
}

// openDescriptors counts those of this process.
func openDescriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestAnAttestedProcessCostsOneDescriptor(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		p := b.start(t, "stay", nil)
		conn := b.accept(t)
		before := openDescriptors(t)
		w := b.attestConn(t, conn)
		if after := openDescriptors(t); after != before+1 {
			t.Errorf("it costs %d descriptors", after-before)
		}
		if !w.Alive() {
			t.Error("it passes for dead")
		}
		p.end()
		if w.Alive() {
			t.Error("it passes for alive")
		}
	})
}

// The limit of open files is lowered step by step, so that the attestation fails at each of its own: always for want of
// descriptors, never with fewer selectors than the process has.
func TestTooFewDescriptorsAreNoWordAboutTheCaller(t *testing.T) {
	if os.Getenv(innerEnv) == "" {
		inner(t, &syscall.SysProcAttr{}, nil) // a process of its own: the limit holds for all of it
		return
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	eachWay(t, func(t *testing.T, b *bench) {
		b.wantsHash = func() bool { return true }
		b.start(t, "stay", nil)
		conn := b.accept(t)
		whole := b.attestConn(t, conn)
		highest := 0
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			n, _ := strconv.Atoi(e.Name())
			highest = max(highest, n)
		}
		failed := 0
		for limit := uint64(highest) + 8; limit > 3; limit-- {
			lower := files
			lower.Cur = limit
			if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lower); err != nil {
				t.Fatal(err)
			}
			w, err := b.AttestWorkload(t.Context(), conn)
			if err2 := unix.Setrlimit(unix.RLIMIT_NOFILE, &files); err2 != nil {
				t.Fatal(err2)
			}
			switch {
			case err == nil:
				if !slices.Equal(w.Selectors, whole.Selectors) {
					t.Errorf("limit %d: %q, want %q", limit, w.Selectors, whole.Selectors)
				}
				w.Close()
			case !NoDescriptors(err):
				t.Errorf("limit %d: %v", limit, err)
			default:
				failed++
			}
			if !whole.Alive() {
				t.Fatalf("limit %d: who was attested before passes for dead", limit)
			}
		}
		if failed < 3 {
			t.Errorf("it failed %d times only", failed)
		}
	})
}

func TestAnAttestorSaysWhatItCannotDo(t *testing.T) {
	if _, err := NewUnixAttestor(UnixConfig{MaxHashSize: -1}); err == nil {
		t.Error("a negative size was taken")
	}
	// IDs that our user namespace has no number for all look alike.
	b := newBench(t)
	p := peer{Ucred: unix.Ucred{Pid: int32(os.Getpid()), Uid: overflowID, Gid: 5}, groups: []uint32{overflowID, 6}, pidfd: -1}
	for _, mapped := range []bool{true, false} {
		b.mapped = mapped
		h, err := hold(p)
		if err != nil {
			t.Fatal(err)
		}
		w, err := b.attest(t.Context(), p, h)
		if err != nil {
			t.Fatal(err)
		}
		w.Close()
		wantSelectors(t, w, "unix:gid", "5")
		if mapped {
			wantSelectors(t, w, "unix:uid", "65534")
			wantSelectors(t, w, "unix:supplementary_gid", "65534", "6")
		} else {
			wantSelectors(t, w, "unix:uid")
			wantSelectors(t, w, "unix:supplementary_gid", "6")
		}
	}
}

func BenchmarkAttestWorkload(b *testing.B) {
	bench := newBench(b)
	bench.start(b, "stay", nil)
	conn := bench.accept(b)
	for b.Loop() {
		w, err := bench.AttestWorkload(context.Background(), conn)
		if err != nil {
			b.Fatal(err)
		}
		w.Close()
	}
}
