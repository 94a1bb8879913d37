package durable

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const holdLock = "DURABLE_TEST_HOLD_LOCK"

// A copy of the test binary that takes a folder, says so, and waits to be killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv(holdLock); dir != "" {
		l, err := Lock(dir)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("held")
		_, _ = os.Stdin.Read(make([]byte, 1)) // until our parent ends us, or ends itself
		_ = l.Close()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestAFolderHasOneProcessUntilThatIsKilled(t *testing.T) {
	dir := t.TempDir()
	other := exec.Command(os.Args[0])
	other.Env = append(os.Environ(), holdLock+"="+dir)
	stdin, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "held\n" {
		t.Fatalf("the other process says %q, %v", line, err)
	}
	_, err = Lock(dir)
	want := fmt.Sprintf("folder %s is in use by process %d: stop that process, or use another folder", dir, other.Process.Pid)
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	if err := other.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = other.Wait()
	l, err := Lock(dir)
	if err != nil {
		t.Fatalf("after kill -9: %v", err)
	}
	if _, err := Lock(dir); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("a second time in the same process: %v", err)
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	l, err = Lock(dir)
	if err != nil {
		t.Fatalf("after Close: %v", err)
	}
	_ = l.Close()
}

func TestAFolderIsLookedAtByOneProcessAndLeftAsItIs(t *testing.T) {
	dir := t.TempDir()
	look := func() *DirLock {
		t.Helper()
		l, err := LockToLook(dir)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	if err := look().Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(dir, lockName)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a folder that was never locked has a lock file: %v", err)
	}
	held, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LockToLook(dir); !errors.Is(err, ErrInUse) {
		t.Errorf("a folder that is in use: %v", err)
	}
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	l := look()
	if text, err := os.ReadFile(filepath.Join(dir, lockName)); err != nil || len(text) > 0 {
		t.Errorf("the lock file says %q: %v", text, err)
	}
	if _, err := Lock(dir); !errors.Is(err, ErrInUse) {
		t.Errorf("a folder that is looked at: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if held, err = Lock(dir); err != nil {
		t.Fatal(err)
	}
	held.Close()
}

func TestLockFollowsNoLinkAndWantsItsFolder(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, filepath.Join(dir, lockName)); err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(dir); err == nil {
		t.Error("a symbolic link was followed")
	}
	if got, _ := os.ReadFile(victim); string(got) != "precious" {
		t.Errorf("the link's target is %q now", got)
	}
	missing := filepath.Join(dir, "missing")
	if _, err := Lock(missing); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("a missing folder: %v", err)
	}
}
