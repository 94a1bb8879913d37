//go:build real

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if err := os.Chdir("../.."); err != nil { // where the demos are started, see the Makefile
		panic(err)
	}
	os.Exit(m.Run())
}

// The demo is what a visitor sees first: it has to hold at every change.
func TestTheDemoPasses(t *testing.T) { passes(t) }

func TestTheRotationDemoPasses(t *testing.T) { passes(t, "rotation") }

func TestTheRootIsReplacedThreeTimesOverWithEveryEnvoyOnDelta(t *testing.T) { passes(t, "roots") }

func TestTheVaultDemoPasses(t *testing.T) { passes(t, "vault") }

// passes runs a demo as a visitor does.
func passes(t *testing.T, story ...string) {
	t.Helper()
	runtime.LockOSThread() // which the process dies with
	defer runtime.UnlockOSThread()
	dir := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", dir+"/", "./cmd/signet", "./test/demo").CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	args := append([]string{"-dir", filepath.Join(dir, "made"), "-signet", filepath.Join(dir, "signet")}, story...)
	cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "demo"), args...)
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	// It stops what it has started, by itself.
	cmd.Cancel, cmd.WaitDelay = func() error { return cmd.Process.Signal(syscall.SIGTERM) }, time.Minute
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
}
