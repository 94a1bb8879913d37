package keystore

import (
	"errors"
	"strings"
	"testing"
)

func TestAReferenceIsWrittenOneWay(t *testing.T) {
	for _, s := range []string{"file:ca@1", "memory:a-1@20", "vault:" + "a" + strings.Repeat("b", 62) + "@1"} {
		r, err := ParseRef(s)
		if err != nil || r.String() != s || r.IsZero() {
			t.Errorf("%s: %v, %v", s, r, err)
		}
	}
	for _, s := range []string{
		"", "ca@1", "file:ca", "file:ca@", "file:ca@0", "file:ca@-1", "file:ca@01", "file:ca@+1", ":ca@1", "file:@1",
		"file:../x@1", "file:a@b@1", "file:A@1", "file:1a@1", "file:" + strings.Repeat("a", 64) + "@1", "file:ca@1 ", "file:ca@99999999999999999999",
	} {
		if r, err := ParseRef(s); err == nil {
			t.Errorf("%q was read as %v", s, r)
		}
	}
}

func TestKeysInMemoryAreFoundByTheirReference(t *testing.T) {
	m := NewMemory()
	a1, b1, a2 := create(t, m, "a", ECDSAP256), create(t, m, "b", Ed25519), create(t, m, "a", ECDSAP384)
	refs, err := m.List(t.Context())
	if err != nil || len(refs) != 3 || refs[0] != a1.Ref() || refs[1] != a2.Ref() || refs[2] != b1.Ref() {
		t.Errorf("%v, %v", refs, err)
	}
	if a2.Ref().Version != 2 {
		t.Errorf("second version is %v", a2.Ref())
	}
	got, err := m.Open(t.Context(), a1.Ref())
	if err != nil || got != a1 {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := m.Open(t.Context(), Ref{"memory", "c", 1}); !errors.Is(err, ErrNotFound) {
		t.Errorf("a missing key: %v", err)
	}
	if _, err := m.Create(t.Context(), "Bad", ECDSAP256, 0); err == nil {
		t.Error("a bad name was taken")
	}
	if _, err := m.Create(t.Context(), "a", "dsa", 0); err == nil {
		t.Error("an unknown algorithm was taken")
	}
}

func FuzzParseRef(f *testing.F) {
	f.Add("file:ca@1")
	f.Add("a:b@2@3")
	f.Fuzz(func(t *testing.T, s string) {
		if r, err := ParseRef(s); err == nil && (r.String() != s || validName(r.Name) != nil || r.Version < 1) {
			t.Fatalf("%q was read as %v", s, r)
		}
	})
}
