package keystore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
)

// BackendMemory is the Backend of references to keys in memory.
const BackendMemory = "memory"

// Memory is a Store whose keys end with the process.
type Memory struct {
	mu   sync.Mutex
	keys map[Ref]Key
}

var _ Store = (*Memory)(nil)

// NewMemory returns an empty store.
func NewMemory() *Memory { return &Memory{keys: map[Ref]Key{}} }

// Create returns the first version of the named key above after.
func (m *Memory) Create(_ context.Context, name string, alg Algorithm, after int) (Key, error) {
	if err := validName(name); err != nil {
		return nil, err
	}
	signer, err := generate(alg)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	ref := m.next(name, alg, after)
	if m.keys[ref] == nil {
		m.keys[ref] = newLocalKey(ref, signer)
	}
	return m.keys[ref], nil
}

// Find says which key Create would return, and whether it is there already.
func (m *Memory) Find(_ context.Context, name string, alg Algorithm, after int) (Ref, bool, error) {
	_, err := ParseAlgorithm(string(alg))
	if err := errors.Join(validName(name), err); err != nil {
		return Ref{}, false, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	ref := m.next(name, alg, after)
	return ref, m.keys[ref] != nil, nil
}

// next is the key that Create returns: one that is there, or the first that is not. m.mu is held.
func (m *Memory) next(name string, alg Algorithm, after int) Ref {
	ref := Ref{Backend: BackendMemory, Name: name, Version: max(after, 0) + 1}
	for m.keys[ref] != nil && AlgorithmOf(m.keys[ref].Public()) != alg {
		ref.Version++
	}
	return ref
}

// Open returns a key made by Create of the same store.
func (m *Memory) Open(_ context.Context, ref Ref) (Key, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if k := m.keys[ref]; k != nil {
		return k, nil
	}
	return nil, fmt.Errorf("open key %s: %w in this process's memory", ref, ErrNotFound)
}

// Delete forgets a key.
func (m *Memory) Delete(_ context.Context, ref Ref) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.keys, ref)
	return nil
}

// List returns the references of all keys, by name and version.
func (m *Memory) List(context.Context) ([]Ref, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	refs := make([]Ref, 0, len(m.keys))
	for r := range m.keys {
		refs = append(refs, r)
	}
	slices.SortFunc(refs, compareRefs)
	return refs, nil
}

func (*Memory) String() string               { return "keys in memory" }
func (m *Memory) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, m.String()) }
func (m *Memory) LogValue() slog.Value       { return slog.StringValue(m.String()) }

func compareRefs(a, b Ref) int {
	if c := strings.Compare(a.Name, b.Name); c != 0 {
		return c
	}
	return a.Version - b.Version
}
