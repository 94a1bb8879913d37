package audit

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"time"

	"github.com/transparency-dev/formats/log"
	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/api/layout"
	"golang.org/x/mod/sumdb/note"
)

// verifierKeyFile names the file in a log's folder that holds its verifier key, so that a copy explains itself.
const verifierKeyFile = "verifier.key"

// folder reads the files of a tlog-tiles log. Nothing in it is trusted: every file is bounded before it is read.
type folder struct{ files fs.FS }

func (f folder) read(name string, most int64) ([]byte, error) {
	// A pipe or a device in a copied folder would block or never end; it is not opened at all.
	info, err := fs.Stat(f.files, name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	file, err := f.files.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > most {
		return nil, damage(name, "is longer than the %d bytes it can have", most)
	}
	return data, nil
}

// Finding is one thing that is wrong in a log's folder. It is an ErrDamaged.
type Finding struct {
	// File is relative to the log's folder.
	File string
	// What continues a sentence that begins with the file's name.
	What string
}

func (f *Finding) Error() string { return fmt.Sprintf("%v: %s %s", ErrDamaged, f.File, f.What) }
func (f *Finding) Unwrap() error { return ErrDamaged }

func damage(path, format string, args ...any) error {
	return &Finding{File: path, What: fmt.Sprintf(format, args...)}
}

// ReadTile is a client.TileFetcherFunc: the partial tile, or the full one where the partial one is no longer there.
func (f folder) ReadTile(_ context.Context, level, index uint64, p uint8) ([]byte, error) {
	data, _, err := f.partialOrFull(p, layout.TileWidth*sha256.Size, func(p uint8) string { return layout.TilePath(level, index, p) })
	return data, err
}

func (f folder) readBundle(index uint64, p uint8) (data []byte, path string, err error) {
	return f.partialOrFull(p, maxBundle, func(p uint8) string { return layout.EntriesPath(index, p) })
}

// partialOrFull reads what holds p items (0 = full). The full file may stand in for a partial one (tlog-tiles, "Partial tiles").
func (f folder) partialOrFull(p uint8, most int64, path func(uint8) string) ([]byte, string, error) {
	name := path(p)
	data, err := f.read(name, most)
	if p != 0 && errors.Is(err, fs.ErrNotExist) {
		name = path(0)
		if data, err = f.read(name, most); errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("neither %s nor %s: %w", path(p), name, fs.ErrNotExist)
		}
	}
	return data, name, err
}

// bundle returns the entries of a bundle, of which there are p (0 = 256), or all 256 when the full one stands in.
func (f folder) bundle(index uint64, p uint8) (entries [][]byte, path string, err error) {
	raw, path, err := f.readBundle(index, p)
	if err != nil {
		return nil, path, err
	}
	var b api.EntryBundle
	if err := b.UnmarshalText(raw); err != nil {
		return nil, path, damage(path, "is not an entry bundle: %v", err)
	}
	want := items(path == layout.EntriesPath(index, 0), p)
	if len(b.Entries) != want {
		return nil, path, damage(path, "holds %d entries, not %d", len(b.Entries), want)
	}
	return b.Entries, path, nil
}

func items(full bool, p uint8) int {
	if full {
		return layout.TileWidth
	}
	return int(p)
}

// treeState is Tessera's own word of the tree that it has made, which may be beyond the checkpoint.
func (f folder) treeState() (size uint64, root []byte, err error) {
	raw, err := f.read(treeStateFile, maxVerifierKey)
	if err != nil {
		return 0, nil, err
	}
	var state struct {
		Size uint64 `json:"size"`
		Root []byte `json:"root"`
	}
	err = json.Unmarshal(raw, &state)
	again, _ := json.Marshal(state) // can't fail
	if err != nil || !bytes.Equal(again, raw) {
		return 0, nil, damage(treeStateFile, "is not as it was written")
	}
	return state.Size, state.Root, nil
}

// checkpoint reads and verifies the published checkpoint.
func (f folder) checkpoint(v note.Verifier) (Checkpoint, error) {
	raw, err := f.read(layout.CheckpointPath, maxCheckpoint)
	if err != nil {
		return Checkpoint{}, err
	}
	cp, err := parseCheckpoint(raw, v)
	if info, serr := fs.Stat(f.files, layout.CheckpointPath); err == nil && serr == nil {
		cp.Published = info.ModTime().UTC()
	}
	return cp, err
}

// Checkpoint is a signed statement of the log: this many entries, under this root (https://c2sp.org/tlog-checkpoint).
type Checkpoint struct {
	Origin   string
	Size     uint64
	RootHash []byte
	// Note is the checkpoint as it was signed.
	Note []byte
	// Published is when its file was written, which nobody has signed; zero where it did not come from a folder.
	Published time.Time
}

// ParseCheckpoint reads a checkpoint that was signed with this key, and refuses every other. ErrDamaged.
func ParseCheckpoint(raw []byte, verifierKey string) (Checkpoint, error) {
	v, err := note.NewVerifier(verifierKey)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("read a checkpoint: the verifier key %.300q is not one: %w", verifierKey, err)
	}
	return parseCheckpoint(raw, v)
}

// signedBy names who signed a note that v did not sign at all; a spoiled signature of v's is not that.
func signedBy(raw []byte, v note.Verifier) (string, bool) {
	_, err := note.Open(raw, note.VerifierList())
	var unverified *note.UnverifiedNoteError
	if !errors.As(err, &unverified) || len(unverified.Note.UnverifiedSigs) == 0 {
		return "", false
	}
	for _, s := range unverified.Note.UnverifiedSigs {
		if s.Name == v.Name() && s.Hash == v.KeyHash() {
			return "", false
		}
	}
	s := unverified.Note.UnverifiedSigs[0]
	return fmt.Sprintf("%.256q+%08x", s.Name, s.Hash), true
}

// parseCheckpoint verifies a checkpoint. The origin must be the key's name.
func parseCheckpoint(raw []byte, v note.Verifier) (Checkpoint, error) {
	if len(raw) > maxCheckpoint {
		return Checkpoint{}, damage(layout.CheckpointPath, "is longer than the %d bytes it can have", maxCheckpoint)
	}
	cp, _, n, err := log.ParseCheckpoint(raw, v.Name(), v)
	if err != nil {
		if other, ok := signedBy(raw, v); ok {
			return Checkpoint{}, damage(layout.CheckpointPath, "is signed by %s, and the key given is %s+%08x: this is another log, or the key is", other, v.Name(), v.KeyHash())
		}
		return Checkpoint{}, damage(layout.CheckpointPath, "is not signed by %s with key %08x: %v", v.Name(), v.KeyHash(), err)
	}
	if len(cp.Hash) != sha256.Size {
		return Checkpoint{}, damage(layout.CheckpointPath, "has a root hash of %d bytes, not %d", len(cp.Hash), sha256.Size)
	}
	for _, s := range n.Sigs {
		// note.Open ignores the unused bits of the last base64 digit; a changed byte must not pass.
		if _, err := base64.StdEncoding.Strict().DecodeString(s.Base64); err != nil {
			return Checkpoint{}, damage(layout.CheckpointPath, "has a signature that is not canonical base64")
		}
	}
	return Checkpoint{Origin: cp.Origin, Size: cp.Size, RootHash: cp.Hash, Note: raw}, nil
}

var ranges = compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}

// rootOf is the root hash of a tree whose compact range is r (RFC 6962 §2.1).
func rootOf(r *compact.Range) ([]byte, error) {
	if r.End() == 0 {
		return rfc6962.DefaultHasher.EmptyRoot(), nil
	}
	return r.GetRootHash(nil)
}

// walk re-reads entries and goes on from rng, a tree that is known to be right, to the given size: it hashes the entries
// again and compares every node it makes with the tiles on disk. The caller compares the root.
type walk struct {
	folder
	rng *compact.Range
	// size of the tree on disk, which decides what files there are.
	size uint64
	// leaf is told of every entry; nil = none.
	leaf func(index uint64, data []byte) error
	// damaged is told of everything that is wrong and decides: nil goes on. nil = stop at the first.
	damaged func(error) error
	// progress is told how far it is, after every bundle; nil = none.
	progress func(done uint64)

	open map[tileID]*tileNodes
	bad  bool
}

type tileID struct{ level, index uint64 }

// tileNodes is a run of hashes in a tile, from position first.
type tileNodes struct {
	first  int
	hashes [][]byte
}

// to goes on until the tree has n entries.
func (w *walk) to(ctx context.Context, n uint64) error {
	w.open = map[tileID]*tileNodes{}
	from := w.rng.End()
	if n < from {
		return fmt.Errorf("%w: it has %d entries where it had %d", ErrDamaged, n, from)
	}
	for ri := range layout.Range(from, n-from, w.size) {
		if err := ctx.Err(); err != nil {
			return err
		}
		entries, path, err := w.bundle(ri.Index, ri.Partial)
		var hashes [][]byte
		switch {
		case err == nil:
			for i := ri.First; i < ri.First+ri.N; i++ {
				hashes = append(hashes, rfc6962.DefaultHasher.HashLeaf(entries[i]))
				if w.leaf == nil {
					continue
				}
				if err := w.leaf(ri.Index*layout.EntryBundleWidth+uint64(i), entries[i]); err != nil {
					return err
				}
			}
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, ErrDamaged):
			if errors.Is(err, fs.ErrNotExist) {
				err = damage(path, "is missing")
			}
			if err := w.found(err); err != nil {
				return err
			}
			// What the entries were is lost, what they hashed to is not: with the tile's word the rest can still be checked.
			if hashes, err = w.tileRun(tileID{0, ri.Index}, int(ri.First), int(ri.N)); err != nil {
				return w.found(err)
			}
		default:
			return fmt.Errorf("read %s: %w", path, err)
		}
		for _, h := range hashes {
			if err := w.rng.Append(h, w.made); err != nil {
				return err
			}
		}
		if err := w.compare(true); err != nil {
			return err
		}
		if w.progress != nil {
			w.progress(w.rng.End())
		}
	}
	return w.compare(false)
}

// made notes a node of the tree that belongs into a tile.
func (w *walk) made(id compact.NodeID, h []byte) {
	if id.Level%layout.TileHeight != 0 {
		return
	}
	t := tileID{uint64(id.Level / layout.TileHeight), id.Index / layout.TileWidth}
	n := w.open[t]
	if n == nil {
		n = &tileNodes{first: int(id.Index % layout.TileWidth)}
		w.open[t] = n
	}
	n.hashes = append(n.hashes, h)
}

// compare holds the tiles on disk against what was computed, those that are complete or all.
func (w *walk) compare(completeOnly bool) error {
	// Lowest level first: what is wrong there explains what is wrong above.
	for _, id := range slices.SortedFunc(maps.Keys(w.open), func(a, b tileID) int {
		return cmp.Or(cmp.Compare(a.level, b.level), cmp.Compare(a.index, b.index))
	}) {
		n := w.open[id]
		if completeOnly && n.first+len(n.hashes) < layout.TileWidth {
			continue
		}
		delete(w.open, id)
		if id.level > 0 && w.bad {
			continue // It follows from what was found below.
		}
		onDisk, err := w.tileRun(id, n.first, len(n.hashes))
		if err == nil {
			for i := range onDisk {
				if string(onDisk[i]) == string(n.hashes[i]) {
					continue
				}
				at, p := n.first+i, layout.PartialTileSize(id.level, id.index, w.size)
				if id.level == 0 {
					err = damage(layout.EntriesPath(id.index, p), "and %s disagree on entry %d", layout.TilePath(0, id.index, p), id.index*layout.TileWidth+uint64(at))
				} else {
					err = damage(layout.TilePath(id.level, id.index, p), "has a node, %d, that is not the hash of what is below it", at)
				}
				break
			}
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, ErrDamaged) {
			return err
		}
		if err := w.found(err); err != nil {
			return err
		}
	}
	return nil
}

// tileRun reads n hashes from position first of a tile.
func (w *walk) tileRun(id tileID, first, n int) ([][]byte, error) {
	p := layout.PartialTileSize(id.level, id.index, w.size)
	raw, path, err := w.partialOrFull(p, layout.TileWidth*sha256.Size, func(p uint8) string { return layout.TilePath(id.level, id.index, p) })
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, damage(path, "is missing")
	case errors.Is(err, ErrDamaged):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if want := items(path == layout.TilePath(id.level, id.index, 0), p) * sha256.Size; len(raw) != want {
		return nil, damage(path, "has %d bytes, not %d", len(raw), want)
	}
	var t api.HashTile
	if err := t.UnmarshalText(raw); err != nil {
		return nil, damage(path, "is not a tile: %v", err)
	}
	return t.Nodes[first : first+n], nil
}

func (w *walk) found(err error) error {
	w.bad = true
	if w.damaged == nil {
		return err
	}
	return w.damaged(err)
}
