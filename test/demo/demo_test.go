//go:build real

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

func TestMain(m *testing.M) {
	if err := os.Chdir("../.."); err != nil { // where the demos are started, see the Makefile
		panic(err)
	}
	os.Exit(m.Run())
}

// The demo is what a visitor sees first: it has to hold at every change.
func TestTheDemoPasses(t *testing.T) { passes(t, story) }

func TestTheRotationDemoPasses(t *testing.T) { passes(t, rotationStory) }

func TestTheRootIsReplacedThreeTimesOverWithEveryEnvoyOnDelta(t *testing.T) { passes(t, rootsStory) }

func passes(t *testing.T, tell teller) {
	t.Helper()
	runtime.LockOSThread() // which the processes die with
	defer runtime.UnlockOSThread()
	dir := t.TempDir()
	signet := filepath.Join(dir, "signet")
	if out, err := exec.Command("go", "build", "-o", signet, "./cmd/signet").CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	if err := run(t.Context(), tell, filepath.Join(dir, "demo"), signet, false); err != nil {
		t.Fatal(err)
	}
}
