package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// lockName is the file in a folder that its process holds. It stays when the process ends: removing it would let two
// processes hold two different files of the same name.
const lockName = "LOCK"

// ErrInUse is a folder that another process holds.
var ErrInUse = errors.New("in use")

// DirLock is a folder held by this process.
type DirLock struct {
	close func() error
}

// Lock takes an existing folder for this process alone, until Close or the end of the process, however it ends.
// When another process has it, the error names the folder and that process.
func Lock(dir string) (*DirLock, error) { return lock(dir, os.O_CREATE) }

// LockToLook takes a folder as Lock does and leaves no trace in it. One that was never locked is nobody's: then there is
// nothing to hold.
func LockToLook(dir string) (*DirLock, error) {
	l, err := lock(dir, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return &DirLock{close: func() error { return nil }}, nil
	}
	return l, err
}

// lock makes the file and writes into it with os.O_CREATE alone.
func lock(dir string, create int) (*DirLock, error) {
	path := filepath.Join(dir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|create|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, explain("lock folder", dir, err)
	}
	// flock and not fcntl locks: it belongs to this open file, so nothing else this process opens can lose it.
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		defer f.Close()
		return nil, heldBy(dir, f)
	}
	if err == nil && create == 0 {
		return &DirLock{close: sync.OnceValue(f.Close)}, nil
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		f.Close()
		return nil, explain("lock folder", dir, err)
	}
	return &DirLock{close: sync.OnceValue(func() error {
		return errors.Join(f.Truncate(0), f.Close())
	})}, nil
}

func heldBy(dir string, f io.Reader) error {
	b, _ := io.ReadAll(io.LimitReader(f, 32))
	// The other process may be between taking the lock and writing its number.
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 0 {
		return fmt.Errorf("folder %s is %w by another process: stop it, or use another folder", dir, ErrInUse)
	}
	return fmt.Errorf("folder %s is %w by process %d: stop that process, or use another folder", dir, ErrInUse, pid)
}

// Close gives the folder back. Further calls do nothing.
func (l *DirLock) Close() error { return l.close() }
