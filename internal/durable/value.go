package durable

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
)

// envelope is the file of a value. A bit that flips on a disk can leave JSON that is well formed and says something else: the
// checksum finds it. It is against accidents: who can write the file can write a checksum.
type envelope struct {
	SHA256 []byte          `json:"sha256"` // of Value without insignificant space
	Value  json.RawMessage `json:"value"`
}

// ErrDamaged is wrapped where a file of a value is not as it was written.
var ErrDamaged = errors.New("its content is not what was written")

// WriteValue is WriteFile with v as JSON, under a checksum.
func WriteValue(path string, v any, mode fs.FileMode) error {
	value, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	sum := sha256.Sum256(value)
	text, err := json.MarshalIndent(envelope{SHA256: sum[:], Value: value}, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	return WriteFile(path, append(text, '\n'), mode)
}

// ReadValue reads into v what WriteValue wrote, under the rules of ReadSecret. Errors of DecodeValue are its own too.
func ReadValue(path string, limit int64, v any) error {
	text, err := ReadSecret(path, limit)
	if err != nil {
		return err
	}
	return DecodeValue(text, v)
}

// DecodeValue is ReadValue of a file that has been read. Its errors wrap ErrDamaged.
func DecodeValue(text []byte, v any) error {
	var e envelope
	if err := json.Unmarshal(text, &e); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	var value bytes.Buffer
	if err := json.Compact(&value, e.Value); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if sum := sha256.Sum256(value.Bytes()); !bytes.Equal(sum[:], e.SHA256) {
		return fmt.Errorf("%w: its checksum differs", ErrDamaged)
	}
	if err := json.Unmarshal(value.Bytes(), v); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}
