package durable

import (
	"fmt"
	"io"
	"os"
)

// ReadFile reads a file that is no secret, of at most max bytes; what says in errors what it is. A file that can't be
// opened gives an error with its fs.PathError.
func ReadFile(path, what string, max int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", what, err)
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.IsDir() {
		return nil, fmt.Errorf("read %s %s: it is a folder, give a file", what, path)
	}
	return Read(f, path, what, max)
}

// Read is ReadFile of what is open already, for example of stdin.
func Read(from io.Reader, name, what string, max int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(from, max+1))
	if err != nil {
		return nil, fmt.Errorf("read %s %s: %w", what, name, err)
	}
	if int64(len(data)) > max {
		return nil, fmt.Errorf("read %s %s: it is larger than %s", what, name, size(max))
	}
	return data, nil
}

func size(bytes int64) string {
	switch {
	case bytes >= 1<<20 && bytes%(1<<20) == 0:
		return fmt.Sprintf("%d MiB", bytes>>20)
	case bytes >= 1<<10 && bytes%(1<<10) == 0:
		return fmt.Sprintf("%d KiB", bytes>>10)
	}
	return fmt.Sprintf("%d bytes", bytes)
}
