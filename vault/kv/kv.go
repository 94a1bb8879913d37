// Package kv keeps what the clusters of a trust domain share in a folder of Vault's KV engine, version 2: the document
// "trust", and the report of each cluster (server.Exchange).
//
// A document is one value, `note`, as its writer has signed it; nothing of it is secret, and nothing is believed because it
// lies here. Every write is a check-and-set upon the version that was read, so that none undoes another's. A version that was
// deleted or destroyed is no document, and is written over like an old one.
package kv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/hashicorp/vault/api"

	"github.com/signet-ca/signet/vault"
)

// MaxDocument bounds a document, in bytes: Vault's own storage takes entries of 1 MiB, JSON's escapes included.
const MaxDocument = 768 << 10

// noteKey is the value that a document is.
const noteKey = "note"

// Vault is the part of a connection that is used (vault.Engine).
type Vault interface {
	Read(ctx context.Context, path string) (*api.Secret, error)
	Write(ctx context.Context, path string, body map[string]any) (*api.Secret, error)
}

// Config says where the folder is, and who shares it.
type Config struct {
	Vault Vault
	// Mount is where the KV engine is, Path the folder in it.
	Mount, Path string
	// Cluster is this one, Peers the others: what a token has to be allowed follows from them (Needs).
	Cluster string
	Peers   []string
}

// Folder is what the clusters share.
type Folder struct{ c Config }

// New checks the configuration; it talks to nobody.
func New(c Config) (*Folder, error) {
	switch {
	case c.Vault == nil:
		return nil, errors.New("shared trust in Vault: no connection to Vault")
	case c.Mount == "" || strings.Trim(c.Mount, "/") != c.Mount:
		return nil, fmt.Errorf("shared trust in Vault: mount %.64q: want it as in `vault secrets list`, without a slash at either end", c.Mount)
	case c.Path == "" || strings.Trim(c.Path, "/") != c.Path:
		return nil, fmt.Errorf("shared trust in Vault: path %.64q: want a folder in the mount, without a slash at either end", c.Path)
	}
	return &Folder{c}, nil
}

// where is the path of a document.
func (c Config) where(name string) string { return c.Mount + "/data/" + c.Path + "/" + name }

// Needs is what a token has to be allowed.
func Needs(c Config) []vault.Need {
	ours := []string{"create", "read", "update"}
	needs := []vault.Need{
		{Path: c.where("trust"), Capabilities: ours, Why: "read and write which roots the clusters share"},
		{Path: c.where("reports/" + c.Cluster), Capabilities: ours, Why: "tell the other clusters how far this one is with a rotation"},
	}
	for _, p := range c.Peers {
		needs = append(needs, vault.Need{Path: c.where("reports/" + p), Capabilities: []string{"read"}, Why: "learn how far cluster " + p + " is with a rotation"})
	}
	return needs
}

// awayError says that nothing can be read or written now.
type awayError struct{ error }

func (e awayError) Unwrap() error { return e.error }

// Away reports that it may pass.
func (awayError) Away() bool { return true }

func (f *Folder) failed(err error) error {
	if errors.Is(err, vault.ErrAway) {
		return awayError{err}
	}
	return err
}

// Read returns a document and its version; nil for none, with the version of one that was deleted.
func (f *Folder) Read(ctx context.Context, name string) ([]byte, uint64, error) {
	secret, err := f.c.Vault.Read(ctx, f.c.where(name))
	if errors.Is(err, vault.ErrNotFound) {
		// Vault says the same where nothing is mounted, but with a reason.
		if e := (*vault.Error)(nil); errors.As(err, &e) && len(e.Messages) > 0 {
			return nil, 0, err
		}
		if secret == nil {
			return nil, 0, nil
		}
		version, err := f.version(name, secret.Data["metadata"])
		return nil, version, err
	}
	if err != nil {
		return nil, 0, f.failed(err)
	}
	version, err := f.version(name, secret.Data["metadata"])
	if err != nil {
		return nil, 0, err
	}
	data, ok := secret.Data["data"].(map[string]any)
	note, isText := data[noteKey].(string)
	switch {
	case !ok || !isText || note == "":
		return nil, 0, fmt.Errorf("version %d of %s was not written by a Signet server: it has no text %q; find out who wrote it, and delete it (vault kv delete -mount=%s %s/%s): then it is written again", version, f.c.where(name), noteKey, f.c.Mount, f.c.Path, name)
	case len(note) > MaxDocument:
		return nil, 0, fmt.Errorf("version %d of %s has %d bytes: at most %d are read", version, f.c.where(name), len(note), MaxDocument)
	}
	return []byte(note), version, nil
}

// version reads the number in what KV says beside a document.
func (f *Folder) version(name string, of any) (uint64, error) {
	metadata, _ := of.(map[string]any)
	number, ok := metadata["version"].(json.Number)
	if !ok {
		return 0, fmt.Errorf("what Vault has at %s has no version: %s has to be a KV engine of version 2 (vault kv enable-versioning %s)", f.c.where(name), f.c.Mount, f.c.Mount)
	}
	version, err := strconv.ParseUint(number.String(), 10, 63)
	if err != nil {
		return 0, fmt.Errorf("version %.32q of %s in Vault: %w", number.String(), f.c.where(name), errors.Unwrap(err))
	}
	return version, nil
}

// Write puts a document in the place of the version that was read, 0 for none. It reports false, and has written nothing,
// when the version is another one by now.
func (f *Folder) Write(ctx context.Context, name string, text []byte, upon uint64) (bool, error) {
	if len(text) == 0 || len(text) > MaxDocument || !utf8.Valid(text) {
		return false, fmt.Errorf("write %s to Vault: %d bytes: want 1 to %d, of UTF-8", f.c.where(name), len(text), MaxDocument)
	}
	secret, err := f.c.Vault.Write(ctx, f.c.where(name), map[string]any{
		"data": map[string]any{noteKey: string(text)}, "options": map[string]any{"cas": upon},
	})
	switch {
	case errors.Is(err, vault.ErrConflict):
		return false, nil
	case err != nil:
		return false, f.failed(err)
	case secret == nil:
		return false, fmt.Errorf("write %s to Vault: it answers without a version: %s has to be a KV engine of version 2 (vault kv enable-versioning %s)", f.c.where(name), f.c.Mount, f.c.Mount)
	}
	if _, err := f.version(name, secret.Data); err != nil {
		return false, err
	}
	return true, nil
}
