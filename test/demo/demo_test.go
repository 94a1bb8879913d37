//go:build real

package main

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// The demo is what a visitor sees first: it has to hold at every change.
func TestTheDemoPasses(t *testing.T) {
	t.Chdir("../..")
	dir := t.TempDir()
	signet := filepath.Join(dir, "signet")
	if out, err := exec.Command("go", "build", "-o", signet, "./cmd/signet").CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	if err := run(t.Context(), filepath.Join(dir, "demo"), signet, false); err != nil {
		t.Fatal(err)
	}
}
