package agent

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func mustListen(t *testing.T, path string) *socketListener {
	t.Helper()
	l, err := listen(Socket{Path: path}, workloadCrowd(1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestASocketIsMadeWithItsFolderForAllToReach(t *testing.T) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	path := filepath.Join(t.TempDir(), "a", "b", "agent.sock")
	l := mustListen(t, path)
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o666 {
		t.Fatalf("socket: %v %v", info, err)
	}
	if info, err = os.Stat(filepath.Dir(path)); err != nil || info.Mode().Perm() != 0o755 {
		t.Fatalf("folder: %v %v", info, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 0 {
		t.Fatalf("left after close: %v", left)
	}
}

func TestAStaleSocketIsReplacedAndALiveOneIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	first := mustListen(t, path)
	_, err = listen(Socket{Path: path}, workloadCrowd(1))
	if err == nil || !strings.Contains(err.Error(), "in use by another process") || !strings.Contains(err.Error(), path) {
		t.Fatalf("a second listener: %v", err)
	}
	// Whoever took the name over keeps it when the first one goes.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second := mustListen(t, path)
	first.Close()
	if _, err := os.Stat(path); err != nil {
		t.Fatal("the first took the second's name away")
	}
	second.Close()
}

func TestWhatMakesASocketUnsafeIsRefused(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		file:                                 "something else than a socket",
		filepath.Join(open, "s"):             "others may write to its folder",
		filepath.Join(file, "s"):             "not a directory",
		"/" + strings.Repeat("x", 120):       "too long",
		dir + "/" + strings.Repeat("y", 107): "too long",
	} {
		if l, err := listen(Socket{Path: path}, workloadCrowd(1)); err == nil || !strings.Contains(err.Error(), want) {
			if l != nil {
				l.Close()
			}
			t.Errorf("%s: %v, want an error with %q", path, err, want)
		}
	}
	if os.Geteuid() == 0 {
		foreign := filepath.Join(dir, "foreign")
		if err := os.Mkdir(foreign, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(foreign, 4242, 4242); err != nil {
			t.Fatal(err)
		}
		if _, err := listen(Socket{Path: filepath.Join(foreign, "s")}, workloadCrowd(1)); err == nil || !strings.Contains(err.Error(), "belongs to uid 4242") {
			t.Errorf("a folder of another user: %v", err)
		}
	}
}

func TestOneUserCannotTakeAllConnections(t *testing.T) {
	c := workloadCrowd(1)
	takes := func(uid uint32) (n int) {
		for {
			if _, ok := c.Enter(uid); !ok {
				return n
			}
			n++
		}
	}
	one, others := takes(1), takes(2)
	if one == 0 || one != (one+others)/4*3 {
		t.Errorf("one user took %d places, which left %d for the others; it may take three quarters", one, others)
	}
	if n := takes(3); n != 0 {
		t.Errorf("all together are not bounded: %d more came in", n)
	}
}
