package durable

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

type said struct {
	Name  string            `json:"name"`
	Count uint64            `json:"count"`
	Bytes [][]byte          `json:"bytes"`
	More  map[string]string `json:"more,omitempty"`
}

// The disk may forget a file or rot a bit of it: what is read is what was written, or nothing.
func TestAFlippedBitNeverChangesAValue(t *testing.T) {
	path := filepath.Join(t.TempDir(), "value.json")
	want := said{Name: `<a "b" & ü>`, Count: 1, Bytes: [][]byte{{1, 2, 3}, {0xff}}, More: map[string]string{"k": "v"}}
	if err := WriteValue(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	noticed := 0
	for i := range text {
		for bit := range 8 {
			text[i] ^= 1 << bit
			if err := os.WriteFile(path, text, 0o600); err != nil {
				t.Fatal(err)
			}
			text[i] ^= 1 << bit
			var got said
			if err := ReadValue(path, 1<<20, &got); errors.Is(err, ErrDamaged) {
				noticed++
			} else if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("bit %d of byte %d: %+v, %v", bit, i, got, err)
			}
		}
	}
	if noticed < len(text)*4 {
		t.Errorf("of %d flipped bits %d were noticed", len(text)*8, noticed)
	}
}

func FuzzDecodeValue(f *testing.F) {
	path := filepath.Join(f.TempDir(), "value.json")
	if err := WriteValue(path, said{Name: "web", Count: 7}, 0o600); err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	for _, text := range []string{string(good), `{"sha256":"","value":null}`, `{}`, ``} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var got said
		err := DecodeValue(text, &got)
		if accepted := reflect.DeepEqual(got, said{Name: "web", Count: 7}); err == nil != accepted || err != nil && !errors.Is(err, ErrDamaged) {
			t.Errorf("%q was read as %+v, %v", text, got, err)
		}
	})
}
