package lab

import (
	"os"
	"path/filepath"
	"syscall"
)

// DevPorts has a test wait until no other one, of any package, serves on the fixed ports of `signet serve --dev`.
func DevPorts(t interface {
	Fatal(args ...any)
	Cleanup(f func())
},
) {
	f, err := os.OpenFile(filepath.Join(os.TempDir(), "signet-test-dev-ports.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
}
