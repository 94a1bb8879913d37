//go:build real

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// built is the folder of what the demos are: signet and demo.
var built string

func TestMain(m *testing.M) {
	code, err := build(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func build(run func() int) (code int, err error) {
	if err := os.Chdir("../.."); err != nil { // where the demos are started, see the Makefile
		return 0, err
	}
	if built, err = os.MkdirTemp("", "demo"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(built)
	if out, err := exec.Command("go", "build", "-o", built+"/", "./cmd/signet", "./test/demo").CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build signet and demo: %w\n%s", err, out)
	}
	return run(), nil
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
	args := append([]string{"-dir", filepath.Join(t.TempDir(), "made"), "-signet", filepath.Join(built, "signet")}, story...)
	cmd := exec.CommandContext(t.Context(), filepath.Join(built, "demo"), args...)
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	// It stops what it has started, by itself.
	cmd.Cancel, cmd.WaitDelay = func() error { return cmd.Process.Signal(syscall.SIGTERM) }, time.Minute
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
}
