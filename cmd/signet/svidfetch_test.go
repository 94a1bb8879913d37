package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// listenAs opens a socket as another user.
func listenAs(t *testing.T, uid int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	dir, err := os.MkdirTemp("", "sg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	// Of this thread only: the system call itself, not the one of package syscall, which changes all threads.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	become := func(uid int) {
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); e != 0 {
			t.Fatal(e)
		}
	}
	become(uid)
	l, err := net.Listen("unix", filepath.Join(dir, "agent.sock"))
	become(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close() // who gets so far is believed
		}
	}()
	return filepath.Join(dir, "agent.sock")
}

func TestASocketOfAStrangerIsNotBelieved(t *testing.T) {
	const stranger = 31337
	socket := listenAs(t, stranger)
	for _, try := range []struct {
		more     []string
		believed bool
	}{{nil, false}, {[]string{"--agent-uid", "31338"}, false}, {[]string{"--agent-uid", fmt.Sprint(stranger)}, true}} {
		code, out, talk := signet(t.Context(), "", append([]string{"svid", "fetch", "--socket", socket, "--timeout", "2s"}, try.more...)...)
		if refused := strings.Contains(talk, "uid 31337 listens there"); code != exitCouldNotSay || out != "" || refused == try.believed {
			t.Errorf("%v: exit %d, %q, %q", try.more, code, out, talk)
		}
	}
	if code, _, talk := signet(t.Context(), "", "svid", "watch", "--socket", socket); code != exitCouldNotSay || !strings.Contains(talk, "--agent-uid 31337") {
		t.Errorf("watch: exit %d, %q", code, talk)
	}
}
