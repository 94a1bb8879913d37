package identity

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// hasher hashes executables, each version of a file once.
type hasher struct {
	max int64
	// turn lets one executable be read at a time, so that callers can't make the agent read many.
	turn chan struct{}

	mu    sync.Mutex
	known map[fileVersion]string
}

// fileVersion tells contents apart without reading them: a change of contents changes the ctime, which nobody can set.
type fileVersion struct {
	dev, ino            uint64
	size                int64
	ctimeSec, ctimeNsec int64
}

// maxKnownHashes bounds the memory of a hasher; beyond it, everything is forgotten.
const maxKnownHashes = 1024

func newHasher(maxSize int64) *hasher {
	return &hasher{max: maxSize, turn: make(chan struct{}, 1), known: map[fileVersion]string{}}
}

// sum returns the SHA-256, in hex, of the executable of the process whose /proc folder dir is. It reads the file that is
// executed, wherever its path may lead by now.
func (h *hasher) sum(ctx context.Context, dir int) (string, error) {
	fd, err := unix.Openat(dir, "exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open the executable: %w", err)
	}
	f := os.NewFile(uintptr(fd), "exe")
	defer f.Close()
	before, err := h.version(fd)
	if err != nil {
		return "", err
	}
	if sum, ok := h.get(before); ok {
		return sum, nil
	}
	select {
	case h.turn <- struct{}{}:
		defer func() { <-h.turn }()
	case <-ctx.Done():
		return "", fmt.Errorf("hash the executable: %w", ctx.Err())
	}
	if sum, ok := h.get(before); ok { // by the one before in the queue
		return sum, nil
	}
	digest := sha256.New()
	n, err := io.Copy(digest, io.LimitReader(contextReader{ctx, f}, h.max+1))
	if err != nil {
		return "", fmt.Errorf("hash the executable: %w", err)
	}
	after, err := h.version(fd)
	if err != nil {
		return "", err
	}
	if after != before || n != before.size {
		return "", errors.New("the executable changed while it was hashed")
	}
	sum := hex.EncodeToString(digest.Sum(nil))
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.known) >= maxKnownHashes {
		clear(h.known)
	}
	h.known[before] = sum
	return sum, nil
}

func (h *hasher) get(v fileVersion) (string, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	sum, ok := h.known[v]
	return sum, ok
}

func (h *hasher) version(fd int) (fileVersion, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fileVersion{}, fmt.Errorf("look at the executable: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fileVersion{}, errors.New("the executable is not a regular file")
	}
	if st.Size > h.max {
		return fileVersion{}, fmt.Errorf("the executable has %d bytes, at most %d are hashed", st.Size, h.max)
	}
	return fileVersion{st.Dev, st.Ino, st.Size, st.Ctim.Sec, st.Ctim.Nsec}, nil
}

// contextReader stops reading when the context ends.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
