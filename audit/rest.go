package audit

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"path"
	"strconv"
	"strings"

	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/api/layout"
)

// maxBundle bounds a file of entries, in bytes.
const maxBundle = layout.EntryBundleWidth * (2 + maxEntry)

// verifyRest holds what the walk did not need against what it has found right: partial tiles and bundles that wider ones
// have superseded, those that came after the checkpoint, and what the folder says of itself. No byte of a tile, an entry, the
// key or the size may be changed unseen, also where nothing depends on it any more.
func (r *Reader) verifyRest(ctx context.Context, cp Checkpoint, found func(error) error) error {
	if err := r.verifyOwnWord(cp, found); err != nil {
		return err
	}
	return fs.WalkDir(r.folder.files, "tile", func(name string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // an empty log, or a partial file that a running server has just removed
		}
		if err != nil || e.IsDir() || !strings.HasSuffix(path.Dir(name), ".p") {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		p, err := strconv.ParseUint(path.Base(name), 10, 8)
		if err != nil || p == 0 {
			return nil // a write under way, or what an interrupted one has left: nobody reads it
		}
		err = r.verifyPartial(cp, name, p)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if errors.Is(err, ErrDamaged) {
			return found(err)
		}
		return err
	})
}

// verifyOwnWord checks the verifier key and the state that lie beside the tiles.
func (r *Reader) verifyOwnWord(cp Checkpoint, found func(error) error) error {
	raw, err := r.folder.read(verifierKeyFile, maxVerifierKey)
	if err == nil && string(raw) != r.vkey+"\n" {
		if err := found(damage(verifierKeyFile, "is not the verifier key that signed the checkpoint")); err != nil {
			return err
		}
	}
	if errors.Is(err, ErrDamaged) {
		err = found(err)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	size, root, err := r.folder.treeState()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // a copy without it can be read, not appended to
	case errors.Is(err, ErrDamaged):
		return found(err)
	case err != nil:
		return err
	case size < cp.Size:
		return found(damage(treeStateFile, "has %d entries, the checkpoint has %d", size, cp.Size))
	case size == cp.Size && !bytes.Equal(root, cp.RootHash):
		return found(damage(treeStateFile, "has another root than the checkpoint"))
	case size > cp.Size:
		// What came after the checkpoint was written before the state.
		last := (size - 1) / layout.TileWidth
		if _, _, err := r.folder.partialOrFull(layout.PartialTileSize(0, last, size), layout.TileWidth*32, func(p uint8) string { return layout.TilePath(0, last, p) }); errors.Is(err, fs.ErrNotExist) {
			return found(damage(treeStateFile, "has %d entries, and there are no tiles for them", size))
		}
	}
	return nil
}

// verifyPartial compares a partial tile or bundle with the one that the checkpoint covers, which it must begin; or with its
// twin, where it doesn't.
func (r *Reader) verifyPartial(cp Checkpoint, name string, p uint64) error {
	level, index, entries, err := parseTilePath(strings.TrimSuffix(path.Dir(name), ".p"))
	if err != nil {
		return damage(name, "has a name that no tile has")
	}
	read := func(p uint8) ([]byte, error) {
		if entries {
			raw, _, err := r.folder.partialOrFull(p, maxBundle, func(p uint8) string { return layout.EntriesPath(index, p) })
			return raw, err
		}
		raw, _, err := r.folder.partialOrFull(p, layout.TileWidth*32, func(p uint8) string { return layout.TilePath(level, index, p) })
		return raw, err
	}
	have, err := r.folder.read(name, maxBundle)
	if err != nil {
		return err
	}
	covered := coveredBy(cp.Size, level, index)
	if covered > 0 {
		good, err := read(layout.PartialTileSize(level, index, cp.Size))
		if err != nil {
			return err
		}
		n := min(len(good), len(have))
		if p <= covered && len(have) <= len(good) && bytes.Equal(good[:n], have[:n]) {
			return nil
		}
	}
	if level > 0 {
		// A batch that a crash has interrupted may have left one that never became part of the tree.
		return nil
	}
	return r.agree(index, uint8(p))
}

// agree holds a partial bundle against the partial tile of the same width. What a crash has left, and what came after the
// checkpoint, is in no tree that was signed, but the two were made together.
func (r *Reader) agree(index uint64, p uint8) error {
	name, tile := layout.EntriesPath(index, p), layout.TilePath(0, index, p)
	raw, err := r.folder.read(name, maxBundle)
	if err != nil {
		return err
	}
	hashes, err := r.folder.read(tile, layout.TileWidth*32)
	if err != nil {
		return err
	}
	var b api.EntryBundle
	if err := b.UnmarshalText(raw); err != nil || len(b.Entries) != int(p) {
		return damage(name, "does not hold %d entries, and is not what %s was made of", p, tile)
	}
	if len(hashes) != int(p)*32 {
		return damage(tile, "has %d bytes, not %d", len(hashes), int(p)*32)
	}
	for i, e := range b.Entries {
		if !bytes.Equal(rfc6962.DefaultHasher.HashLeaf(e), hashes[i*32:(i+1)*32]) {
			return damage(name, "and %s disagree on entry %d", tile, index*layout.EntryBundleWidth+uint64(i))
		}
	}
	return nil
}

// coveredBy is how many items of a tile a tree of that size has.
func coveredBy(size, level, index uint64) uint64 {
	items := size >> (8 * level)
	first := index * layout.TileWidth
	if items <= first {
		return 0
	}
	return min(items-first, layout.TileWidth)
}

// parseTilePath reads "tile/<level>/<index>" or "tile/entries/<index>", the index in groups of three digits of which all but
// the last begin with x (c2sp.org/tlog-tiles).
func parseTilePath(name string) (level, index uint64, entries bool, err error) {
	parts := strings.Split(name, "/")
	if len(parts) < 3 || parts[0] != "tile" {
		return 0, 0, false, errors.New("no tile")
	}
	if entries = parts[1] == "entries"; !entries {
		if level, err = strconv.ParseUint(parts[1], 10, 6); err != nil || level > 7 {
			return 0, 0, false, errors.New("no level")
		}
	}
	for i, group := range parts[2:] {
		digits, more := strings.CutPrefix(group, "x")
		n, err := strconv.ParseUint(digits, 10, 16)
		if err != nil || len(digits) != 3 || more != (i < len(parts)-3) || index > 1<<50 {
			return 0, 0, false, errors.New("no index")
		}
		index = index*1000 + n
	}
	return level, index, entries, nil
}
