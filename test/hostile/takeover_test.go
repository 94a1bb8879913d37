//go:build real

package hostile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/test/lab"
)

// swaps of a socket's name in one run.
const swaps = 10_000

// asUser runs f with the file system rights of another user, in this thread. For system calls without a Go runtime between.
func asUser(user int, f func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// Both, so that no capability stays: setfsuid drops those over files (capabilities(7)).
	set := func(id int) {
		_, _, _ = syscall.RawSyscall(unix.SYS_SETFSUID, uintptr(id), 0, 0)
		_, _, _ = syscall.RawSyscall(unix.SYS_SETFSGID, uintptr(id), 0, 0)
	}
	set(user)
	defer set(0)
	f()
}

// visitors fetch by a path, again and again, until stop. Each must get what a registration gives to its user, from
// whichever agent it has reached, or nothing.
func visitors(ctx context.Context, t *testing.T, path string, may func(user int, id string) bool, users ...int) (got, failed *atomic.Int64, wait func()) {
	got, failed = new(atomic.Int64), new(atomic.Int64)
	var work sync.WaitGroup
	for _, user := range users {
		work.Go(func() {
			for ctx.Err() == nil {
				call, cancel := context.WithTimeout(ctx, 20*time.Second)
				ids, err := visit(call, user, path)
				cancel()
				if err != nil {
					failed.Add(1)
					continue
				}
				for _, id := range ids {
					got.Add(1)
					if !may(user, id) {
						t.Errorf("uid %d got %s", user, id)
					}
				}
			}
		})
	}
	return got, failed, work.Wait
}

func visit(ctx context.Context, user int, path string) ([]string, error) {
	s, conn, err := stream(ctx, func() (net.Conn, error) { return as(user, path) })
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := subscribe(s, "default"); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	r, err := s.Recv()
	if err != nil {
		return nil, err
	}
	return identities(r)
}

// TestNobodyTakesASocketOver lets another user try all that could put a listener of his in the place of an agent's socket.
func TestNobodyTakesASocketOver(t *testing.T) {
	if !root() {
		t.Skip("needs root, to be two users")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	socket := site.agent.Socket
	dir := filepath.Dir(socket)
	mine, err := os.MkdirTemp("", "evl")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(mine)
	if err := os.Chown(mine, badUser, badUser); err != nil {
		t.Fatal(err)
	}
	var reached atomic.Int64
	rogue, err := net.Listen("unix", filepath.Join(mine, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer rogue.Close()
	if err := os.Chmod(filepath.Join(mine, "s"), 0o666); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := rogue.Accept()
			if err != nil {
				return
			}
			reached.Add(1)
			c.Close()
		}
	}()
	before, err := os.Lstat(socket)
	if err != nil {
		t.Fatal(err)
	}
	got, failed, wait := visitors(ctx, t, socket, func(user int, id string) bool { return id == idOf(member(user-crowdUser)) }, crowdUser, crowdUser+1)
	tries := []func() error{
		func() error { return unix.Unlink(socket) },
		func() error { return unix.Rename(filepath.Join(mine, "s"), socket) },
		func() error { return unix.Symlink(filepath.Join(mine, "s"), socket+".swap") },
		func() error { return unix.Link(filepath.Join(mine, "s"), filepath.Join(dir, "l.sock")) },
		func() error { return unix.Rename(dir, dir+".gone") },
		func() error { return unix.Rmdir(dir) },
		func() error { return unix.Chmod(socket, 0) },
		func() error { return unix.Chmod(dir, 0o777) },
		func() error { return unix.Chown(socket, badUser, badUser) },
		func() error { return unix.Truncate(socket, 0) },
		func() error {
			return unix.Renameat2(unix.AT_FDCWD, socket, unix.AT_FDCWD, filepath.Join(mine, "s"), unix.RENAME_EXCHANGE)
		},
		func() error { return unix.Mknod(filepath.Join(dir, "n.sock"), unix.S_IFSOCK|0o666, 0) },
		func() error { return unix.Unlink(filepath.Join(dir, "..", "run")) },
		func() error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return nil
			}
			defer unix.Close(fd)
			return unix.Bind(fd, &unix.SockaddrUnix{Name: filepath.Join(dir, "b.sock")})
		},
	}
	for n := range swaps {
		asUser(badUser, func() {
			if err := tries[n%len(tries)](); err == nil {
				t.Errorf("try %d of another user succeeded", n%len(tries))
			}
		})
	}
	for end := time.Now().Add(30 * time.Second); got.Load() < 100 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	wait()
	after, err := os.Lstat(socket)
	if err != nil || !os.SameFile(before, after) || before.Mode() != after.Mode() {
		t.Errorf("the socket is another: %v", err)
	}
	t.Logf("%d tries, %d secrets fetched meanwhile, %d visits failed", swaps, got.Load(), failed.Load())
	if n := reached.Load(); n > 0 {
		t.Errorf("%d clients reached another user's listener", n)
	}
	if got.Load() < 100 || failed.Load() > 2 { // the last ones of all are cut off
		t.Errorf("%d secrets fetched, %d visits failed", got.Load(), failed.Load())
	}
}

// TestSwappedSocketsGiveNobodyAForeignSecret swaps, as only an admin can, a socket's name between two agents, and the
// symbolic link of its folder between theirs, while workloads connect.
func TestSwappedSocketsGiveNobodyAForeignSecret(t *testing.T) {
	if !root() {
		t.Skip("needs root, to be many users")
	}
	const users = 8
	rules := "registrations:\n"
	for i := range users {
		rules += fmt.Sprintf("  - { name: other%d, spiffe_id: %s, agents: [node-2], selectors: ['unix:uid:%d'] }\n", i, idOf(fmt.Sprintf("other%d", i)), crowdUser+i)
	}
	if err := site.Apply(t.Context(), rules); err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	second, err := site.StartAgent(t.Context(), "node-2")
	if err != nil {
		t.Fatal(err)
	}
	defer second.Stop()
	if err := lab.Until(t.Context(), "the second agent serves", 30*time.Second, func() error {
		_, err := visit(t.Context(), crowdUser, second.Socket)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	who := make([]int, users)
	for i := range who {
		who[i] = crowdUser + i
	}
	may := func(user int, id string) bool {
		i := user - crowdUser
		return id == idOf(member(i)) || id == idOf(fmt.Sprintf("other%d", i))
	}
	dir, err := os.MkdirTemp(site.Path(), "swap")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o711), os.Mkdir(filepath.Join(dir, "b"), 0o755), os.Mkdir(filepath.Join(dir, "a"), 0o755),
		os.Symlink(site.agent.Socket, filepath.Join(dir, "a/x.sock")), os.Symlink(second.Socket, filepath.Join(dir, "b/x.sock"))); err != nil {
		t.Fatal(err)
	}
	// The name of the socket, then the folder that it is in: a client passes through both.
	put := func(to, name string) error {
		temp := name + ".swap"
		_ = os.Remove(temp)
		return errors.Join(os.Symlink(to, temp), os.Rename(temp, name))
	}
	link, folder := filepath.Join(dir, "x.sock"), filepath.Join(dir, "run")
	if err := errors.Join(put(second.Socket, link), put("a", folder)); err != nil {
		t.Fatal(err)
	}
	for what, way := range map[string]struct {
		path string
		swap func(n int) error
	}{
		"the socket": {link, func(n int) error { return put([]string{site.agent.Socket, second.Socket}[n%2], link) }},
		"its folder": {filepath.Join(folder, "x.sock"), func(n int) error { return put([]string{"a", "b"}[n%2], folder) }},
	} {
		t.Run(what, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			got, failed, wait := visitors(ctx, t, way.path, may, who...)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			chance := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // a test's choices
			for n := range swaps {
				if err := way.swap(n); err != nil {
					t.Fatal(err)
				}
				if chance.IntN(20) == 0 {
					time.Sleep(time.Duration(chance.IntN(2000)) * time.Microsecond)
				}
			}
			for end := time.Now().Add(30 * time.Second); got.Load() < 200 && time.Now().Before(end); {
				time.Sleep(10 * time.Millisecond)
			}
			cancel()
			wait()
			t.Logf("%d swaps, %d secrets fetched meanwhile, %d visits failed", swaps, got.Load(), failed.Load())
			if got.Load() < 200 || failed.Load() > users {
				t.Errorf("%d secrets fetched, %d visits failed", got.Load(), failed.Load())
			}
		})
	}
}
