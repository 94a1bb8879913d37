package keystore

import (
	"context"
	"fmt"
	"slices"
)

// Join is several stores as one. A key is made where its name belongs, and opened where its reference says.
type Join struct {
	// Backends are the stores, by the Backend of their references.
	Backends map[string]Store
	// Homes is the backend in which keys of a name are made; a name that is not there has its home in Default.
	Homes   map[string]string
	Default string
}

var _ Store = Join{}

func (j Join) of(backend string, doing string) (Store, error) {
	if s := j.Backends[backend]; s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("%s: keys of the backend %q are not configured here; put its block back into the configuration", doing, backend)
}

// Create asks the store where keys of that name belong, see Store.
func (j Join) Create(ctx context.Context, name string, alg Algorithm, after int) (Key, error) {
	s, err := j.home(name)
	if err != nil {
		return nil, err
	}
	return s.Create(ctx, name, alg, after)
}

// Find asks the store where keys of that name belong, see Store.
func (j Join) Find(ctx context.Context, name string, alg Algorithm, after int) (Ref, bool, error) {
	s, err := j.home(name)
	if err != nil {
		return Ref{}, false, err
	}
	return s.Find(ctx, name, alg, after)
}

func (j Join) home(name string) (Store, error) {
	home, ok := j.Homes[name]
	if !ok {
		home = j.Default
	}
	return j.of(home, "create key "+name)
}

// Open opens a key.
func (j Join) Open(ctx context.Context, ref Ref) (Key, error) {
	s, err := j.of(ref.Backend, "open key "+ref.String())
	if err != nil {
		return nil, err
	}
	return s.Open(ctx, ref)
}

// List returns the references of the keys of all stores, by name and version.
func (j Join) List(ctx context.Context) ([]Ref, error) {
	var all []Ref
	for _, s := range j.Backends {
		refs, err := s.List(ctx)
		if err != nil {
			return nil, err
		}
		all = append(all, refs...)
	}
	slices.SortFunc(all, compareRefs)
	return all, nil
}

// Delete destroys a key. ErrKept where its store is not configured any more.
func (j Join) Delete(ctx context.Context, ref Ref) error {
	s, err := j.of(ref.Backend, "delete key "+ref.String())
	if err != nil {
		return fmt.Errorf("%w: %w", ErrKept, err)
	}
	return s.Delete(ctx, ref)
}
