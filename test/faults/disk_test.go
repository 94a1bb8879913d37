//go:build real || soak

package faults

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/test/lab"
)

// privateMounts gives the test, and what it starts, a mount namespace that ends with it.
func privateMounts(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // never unlocked: the thread, and the namespace with it, end with the test
	err := unix.Unshare(unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err != nil {
		t.Skipf("no private mounts here (root has them): %v", err)
	}
}

// mount puts a file system over a folder and the folder's content into it.
func mount(t *testing.T, dir string, args ...string) {
	t.Helper()
	aside := dir + ".aside"
	if err := errors.Join(os.Rename(dir, aside), os.Mkdir(dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", append(args, dir)...).CombinedOutput(); err != nil {
		t.Skipf("mount %v: %v %s", args, err, out)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", aside+"/.", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil { // what lies there was there before
		t.Fatal(err)
	}
}

// fill takes all bytes, or all inodes, of the file system that a folder is on, and returns what gives them back.
func fill(t *testing.T, dir string, inodes bool) (free func()) {
	t.Helper()
	into := filepath.Join(dir, "fill")
	if err := os.Mkdir(into, 0o700); err != nil {
		t.Fatal(err)
	}
	var err error
	if inodes {
		for i := 0; err == nil; i++ {
			err = os.WriteFile(filepath.Join(into, fmt.Sprint(i)), nil, 0o600)
		}
	} else {
		var f *os.File
		if f, err = os.Create(filepath.Join(into, "bytes")); err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for size := 1 << 20; size > 0; size /= 2 { // to the last byte
			for err = nil; err == nil; {
				_, err = f.Write(make([]byte, size))
			}
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filled %s until %v", dir, err)
	}
	return func() {
		if err := os.RemoveAll(into); err != nil {
			t.Fatal(err)
		}
	}
}

// fetch asks an agent for the identity of this process.
func (s *site) fetch(t *testing.T, a *lab.Agent) {
	t.Helper()
	if _, err := s.Run(t.Context(), "svid", "fetch", "--socket", a.Socket, "--timeout", "60s"); err != nil {
		t.Error(err)
	}
}

func TestAFullDiskStopsIssuingAndNothingElse(t *testing.T) {
	for _, what := range []string{"bytes", "inodes"} {
		t.Run(what, func(t *testing.T) {
			s := newSite(t)
			privateMounts(t)
			mount(t, s.east.Path("state"), "-t", "tmpfs", "-o", "size=16m,nr_inodes=2000", "tmpfs")
			agents := s.east.Path("node-1")
			if err := os.Mkdir(agents, 0o700); err != nil {
				t.Fatal(err)
			}
			mount(t, agents, "-t", "tmpfs", "-o", "size=4m,nr_inodes=200", "tmpfs")
			s.serve(t)
			a, err := s.east.StartAgent(t.Context(), "node-1")
			if err != nil {
				t.Fatal(err)
			}
			s.fetch(t, a)
			if err := s.issue(t.Context(), s.member); err != nil {
				t.Fatal(err)
			}

			free := fill(t, s.east.Path("state"), what == "inodes")
			red(t, s.east.HTTP) // before anybody has asked for anything
			for range 3 {
				if err := s.issue(t.Context(), s.member); err == nil {
					t.Error("a certificate was issued with a full disk") // what a bundle's tail leaves free is not enough
				} else if !unavailable(err) {
					t.Errorf("the client hears: %v", err)
				}
			}
			freeAgent := fill(t, agents, what == "inodes")
			s.fetch(t, a)
			if code, text := get(a.HTTP, "/readyz"); code != 200 {
				t.Errorf("the agent is not ready: %s", text)
			}
			freeAgent()
			free()
			s.heals(t)
			s.fetch(t, a)
			s.verify(t)
		})
	}
}

// Not in parallel: the thread that ends with it, see privateMounts, may have started processes of other tests, which would die with it.
func TestAPowerCutLosesNothingThatWasGiven(t *testing.T) {
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("no mkfs.ext4 here")
	}
	s := newSite(t)
	privateMounts(t)
	image := s.path("disk")
	f, err := os.OpenFile(image, os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = errors.Join(f.Truncate(64<<20), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", image).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	state := s.east.Path("state")
	mount(t, state, "-o", "loop", image)
	for cut := range cuts {
		s.serve(t)
		token := s.token(t, fmt.Sprintf("n%d", cut))
		agent, err := s.enrol(t.Context(), token)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.east.Apply(t.Context(), fmt.Sprintf("registrations:\n  - { name: r%d, spiffe_id: spiffe://example.org/r%[1]d, agents: [m], selectors: ['unix:uid:1'] }\n"+registrations[len("registrations:\n"):], cut, os.Getuid())); err != nil {
			t.Fatal(err)
		}
		for range 3 + cut {
			if err := s.issue(t.Context(), s.member); err != nil {
				t.Fatal(err)
			}
		}
		cutPower(t, state)
		s.server.Kill()
		// Whoever looks at mounts, and the loop device that is given back, may hold on to it for a moment.
		if err := errors.Join(lab.Until(t.Context(), "the disk taken out", 20*time.Second, func() error { return unix.Unmount(state, 0) }),
			lab.Until(t.Context(), "the disk put in again", 20*time.Second, func() error {
				if out, err := exec.Command("mount", "-o", "loop", image, state).CombinedOutput(); err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
				return nil
			})); err != nil {
			t.Fatal(err)
		}
		s.serve(t)
		s.judge(t)
		if _, err := s.enrol(t.Context(), token); err == nil {
			t.Error("a token was used before and after a power cut")
		}
		// Known, though no registration names it: an agent whose row is lost would not get as far as that.
		if err := s.issue(t.Context(), agent); err == nil || !strings.HasPrefix(err.Error(), "REASON_DENIED") {
			t.Errorf("an agent that was enrolled before a power cut hears: %v", err)
		}
		if list, err := s.Run(t.Context(), "registration", "list", "--config", s.east.Config(), "-o", "name"); err != nil || !slices.Contains(strings.Fields(list), fmt.Sprintf("registration/r%d", cut)) {
			t.Errorf("registration r%d was applied and is lost: %v", cut, err)
		}
		s.server.Stop()
	}
	s.serve(t)
	s.verify(t)
}

// cuts of the power in one run.
const cuts = 3

// cutPower drops all that the file system has not brought onto its disk, and lets every later call fail.
func cutPower(t *testing.T, dir string) {
	t.Helper()
	const shutdown, noLogFlush = 0x8004587d, 2 // EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
	time.Sleep(10 * time.Millisecond)
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := unix.IoctlSetPointerInt(int(d.Fd()), shutdown, noLogFlush); err != nil {
		t.Skipf("this kernel can't cut the power of an ext4: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "after"), nil, 0o600); !errors.Is(err, unix.EIO) {
		t.Fatalf("the power is cut and a write gives %v", err)
	}
}
