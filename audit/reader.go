package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"

	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/proto"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
)

// maxVerifierKey bounds a verifier key file, in bytes.
const maxVerifierKey = 4 << 10

// Reader reads a log's folder, that of a running server or a copy on read-only media. It needs no key but the verifier
// key, writes nothing into the folder, and follows no link out of it. Its methods may be called at the same time.
type Reader struct {
	dir      string
	root     *os.Root
	folder   folder
	vkey     string
	verifier note.Verifier
	own      bool

	mu        sync.Mutex
	index     *index
	indexPath string
	// Proofs at one checkpoint share the tiles they read.
	prover   *client.ProofBuilder
	proverCP Checkpoint
	proved   int
}

// OpenReader opens a log's folder. With an empty verifier key the one in the folder is used, which then proves only that
// the folder agrees with itself; KeyFromFolder tells.
func OpenReader(dir, verifierKey string) (_ *Reader, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open the audit log in %s: %w", dir, err)
	}
	defer func() {
		if err != nil {
			root.Close()
		}
	}()
	r := &Reader{dir: dir, root: root, folder: folder{root.FS()}, vkey: strings.TrimSpace(verifierKey)}
	if r.vkey == "" {
		raw, err := r.folder.read(verifierKeyFile, maxVerifierKey)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("open the audit log in %s: it has no file %s; is it a log's folder? If so, name its verifier key", dir, verifierKeyFile)
		}
		if err != nil {
			return nil, fmt.Errorf("open the audit log in %s: %w", dir, err)
		}
		r.vkey, r.own = string(bytes.TrimSpace(raw)), true
	}
	if r.verifier, err = note.NewVerifier(r.vkey); err != nil {
		return nil, fmt.Errorf("open the audit log in %s: the verifier key %.300q is not one: %w", dir, r.vkey, err)
	}
	if _, err := fs.Stat(r.folder.files, layout.CheckpointPath); err != nil {
		return nil, fmt.Errorf("open the audit log in %s: it has no checkpoint; is it a log's folder? %w", dir, err)
	}
	return r, nil
}

// Close gives back the folder and the index.
func (r *Reader) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(r.index.close(), r.root.Close())
}

// VerifierKey is the key that everything is checked with; KeyFromFolder reports whether it came from the folder itself.
func (r *Reader) VerifierKey() string { return r.vkey }

// KeyFromFolder reports whether the verifier key came from the folder itself: then the folder is checked against its own word.
func (r *Reader) KeyFromFolder() bool { return r.own }

// Checkpoint is the published checkpoint, its signature and origin verified. ErrDamaged.
func (r *Reader) Checkpoint(context.Context) (Checkpoint, error) {
	cp, err := r.folder.checkpoint(r.verifier)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("read the audit log in %s: %w", r.dir, err)
	}
	return cp, nil
}

// Entry reads an entry, as stored and decoded. It does not check it against the Merkle tree: Prove does. ErrNotInLog,
// ErrDamaged, ErrNotAnEntry.
func (r *Reader) Entry(ctx context.Context, index uint64) ([]byte, *auditv1.Entry, error) {
	cp, err := r.Checkpoint(ctx)
	if err != nil {
		return nil, nil, err
	}
	raw, err := r.stored(cp, index)
	if err != nil {
		return nil, nil, err
	}
	e, err := DecodeEntry(raw)
	if err != nil {
		return nil, nil, fmt.Errorf("read entry %d: %w", index, err)
	}
	return raw, e, nil
}

// stored reads the bytes of an entry.
func (r *Reader) stored(cp Checkpoint, index uint64) ([]byte, error) {
	if index >= cp.Size {
		return nil, fmt.Errorf("read entry %d: %w: its checkpoint has %d entries", index, ErrNotInLog, cp.Size)
	}
	entries, path, err := r.folder.bundle(index/layout.EntryBundleWidth, layout.PartialTileSize(0, index/layout.EntryBundleWidth, cp.Size))
	if errors.Is(err, fs.ErrNotExist) {
		err = damage(path, "is missing")
	}
	if err != nil {
		return nil, fmt.Errorf("read entry %d: %w", index, err)
	}
	return entries[index%layout.EntryBundleWidth], nil
}

// ErrNotAnEntry: these bytes can't be decoded, whether or not the log holds them.
var ErrNotAnEntry = errors.New("its bytes are not an entry")

// DecodeEntry reads the bytes of an entry. Fields of a newer version are kept as unknown. ErrNotAnEntry.
func DecodeEntry(raw []byte) (*auditv1.Entry, error) {
	e := &auditv1.Entry{}
	if err := proto.Unmarshal(raw, e); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotAnEntry, err)
	}
	return e, nil
}

// Prove makes a proof for the entry at an index, under the newest checkpoint. The proof holds: it was verified.
// ErrNotInLog, ErrDamaged, ErrNotAnEntry.
func (r *Reader) Prove(ctx context.Context, index uint64) (Proof, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	cp, err := r.Checkpoint(ctx)
	if err != nil {
		return Proof{}, err
	}
	raw, err := r.stored(cp, index)
	if err != nil {
		return Proof{}, err
	}
	if !bytes.Equal(cp.Note, r.proverCP.Note) || r.proved >= proofsPerBuilder {
		if r.prover, err = client.NewProofBuilder(ctx, cp.Size, r.folder.ReadTile); err != nil {
			return Proof{}, err
		}
		r.proverCP, r.proved = cp, 0
	}
	r.proved++
	p := Proof{Index: index, Checkpoint: cp.Note, Entry: raw}
	if p.Hashes, err = r.prover.InclusionProof(ctx, index); err == nil {
		err = VerifyProof(p, raw, r.vkey)
	}
	if err != nil {
		r.proverCP = Checkpoint{} // Its tiles may be what is wrong.
		var io *fs.PathError
		if errors.As(err, &io) && !errors.Is(err, fs.ErrNotExist) || ctx.Err() != nil {
			return Proof{}, fmt.Errorf("prove entry %d: %w", index, err)
		}
		return Proof{}, fmt.Errorf("prove entry %d: %w: its tiles and entries do not lead to its checkpoint: %w", index, ErrDamaged, err)
	}
	// Only now: a flipped bit can make an entry that can't be decoded, and must not pass for one that was logged so.
	if _, err := DecodeEntry(raw); err != nil {
		return Proof{}, fmt.Errorf("prove entry %d: the log holds it, but %w; what appended it was at fault or was not signet: keep the folder as it is, and find out who has the log's key", index, err)
	}
	return p, nil
}

// LeafHash is what the log's Merkle tree has for an entry's bytes (RFC 6962 §2.1).
func LeafHash(entry []byte) []byte { return rfc6962.DefaultHasher.HashLeaf(entry) }

// proofsPerBuilder bounds the tiles that a proof builder keeps: 8 KiB for each proof at most, and a few.
const proofsPerBuilder = 1024

// Damage is everything that Verify found. It is an ErrDamaged.
type Damage struct {
	Findings []*Finding
	// More reports that there were more than maxFindings.
	More bool
}

const maxFindings = 20

func (d *Damage) Error() string {
	parts := make([]string, len(d.Findings))
	for i, f := range d.Findings {
		parts[i] = f.File + " " + f.What
	}
	if d.More {
		parts = append(parts, "and more")
	}
	return fmt.Sprintf("%v: %s", ErrDamaged, strings.Join(parts, "; "))
}

func (d *Damage) Unwrap() error { return ErrDamaged }

// Verify checks the whole log up to its newest checkpoint, as VerifyAt does.
func (r *Reader) Verify(ctx context.Context, progress func(done, total uint64)) error {
	cp, err := r.Checkpoint(ctx)
	if err == nil {
		return r.VerifyAt(ctx, cp, progress)
	}
	if f := (*Finding)(nil); errors.As(err, &f) {
		return &Damage{Findings: []*Finding{f}}
	}
	return err
}

// VerifyAt checks the whole log up to a checkpoint: it reads every entry, builds the tree anew, and compares it with every
// tile and with the checkpoint's root. A *Damage names what does not fit; another error means that it could not be told.
// progress (nil = none) is told of the entries checked so far and in all.
//
// It does what Tessera's fsck does, and is not it: that one stops answering when more than a few tiles are wrong, and
// panics over a bundle with too few entries.
func (r *Reader) VerifyAt(ctx context.Context, cp Checkpoint, progress func(done, total uint64)) error {
	d := &Damage{}
	w := walk{folder: r.folder, rng: ranges.NewEmptyRange(0), size: cp.Size, damaged: d.add}
	if progress != nil {
		w.progress = func(done uint64) { progress(done, cp.Size) }
	}
	err := w.to(ctx, cp.Size)
	if err != nil && !errors.Is(err, ErrDamaged) {
		return fmt.Errorf("verify the audit log in %s: %w", r.dir, err)
	}
	if len(d.Findings) > 0 {
		return d // The root would only say so again.
	}
	root, err := rootOf(w.rng)
	if err != nil {
		return err
	}
	if !bytes.Equal(root, cp.RootHash) {
		d.Findings = []*Finding{{layout.CheckpointPath, fmt.Sprintf("has the root %x, the entries have %x", cp.RootHash, root)}}
		return d
	}
	if err := r.verifyRest(ctx, cp, d.add); err != nil && !errors.Is(err, ErrDamaged) {
		return fmt.Errorf("verify the audit log in %s: %w", r.dir, err)
	}
	if len(d.Findings) > 0 {
		return d
	}
	return nil
}

// add takes a finding, and ends the search when there are enough of them.
func (d *Damage) add(err error) error {
	var f *Finding
	if !errors.As(err, &f) {
		return err
	}
	if len(d.Findings) == maxFindings {
		d.More = true
		return d
	}
	d.Findings = append(d.Findings, f)
	return nil
}
