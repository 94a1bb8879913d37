package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAFileIsReadNoFurtherThanAllowed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("12345"), 0o644); err != nil {
		t.Fatal(err)
	}
	if data, err := ReadFile(path, "number", 5); err != nil || string(data) != "12345" {
		t.Errorf("%q, %v", data, err)
	}
	if _, err := ReadFile(path, "number", 4); err == nil || err.Error() != "read number "+path+": it is larger than 4 bytes" {
		t.Error(err)
	}
	for max, want := range map[int64]string{100: "100 bytes", 64 << 10: "64 KiB", 1 << 20: "1 MiB", 1<<20 + 1: "1048577 bytes"} {
		in := &endless{}
		if _, err := Read(in, "stdin", "number", max); err == nil || err.Error() != "read number stdin: it is larger than "+want || in.given > max+512 {
			t.Errorf("after %d bytes: %v", in.given, err)
		}
	}
	if _, err := ReadFile(t.TempDir(), "number", 5); err == nil || !strings.Contains(err.Error(), "it is a folder") {
		t.Error(err)
	}
	pe := (*fs.PathError)(nil)
	if _, err := ReadFile(path+"x", "number", 5); !errors.Is(err, fs.ErrNotExist) || !errors.As(err, &pe) || !strings.Contains(err.Error(), path+"x") {
		t.Error(err)
	}
}

type endless struct{ given int64 }

func (e *endless) Read(p []byte) (int, error) {
	e.given += int64(len(p))
	return len(p), nil
}
