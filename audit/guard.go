package audit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"

	"github.com/transparency-dev/formats/log"
	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"
	"golang.org/x/mod/sumdb/note"
)

// guard signs checkpoints, and is their first auditor: before it signs it reads back from disk every entry and tile that
// is new since the last checkpoint, hashes them itself, and goes on from the tree it signed last. So a disk that lies, a
// tree state that was changed or a log that shrank is never signed over (the ends of the CT logs Nimbus, Yeti and Oak).
type guard struct {
	verifier note.Verifier
	key      crypto.Signer
	folder   folder
	origin   string
	// ctx ends with the log; note.Signer has none.
	ctx context.Context
	// signed is told of every checkpoint about to be published; refused of every one that must not be.
	signed  func(size uint64)
	refused func(error)

	mu  sync.Mutex
	rng *compact.Range // the tree under the last checkpoint signed
}

// newGuard starts from the last checkpoint, and checks that the folder still has its tree.
func newGuard(ctx context.Context, f folder, v note.Verifier, key crypto.Signer, last Checkpoint) (*guard, error) {
	g := &guard{verifier: v, key: key, folder: f, origin: v.Name(), ctx: ctx, rng: ranges.NewEmptyRange(0)}
	if last.Size == 0 {
		return g, nil
	}
	hashes, err := client.FetchRangeNodes(ctx, last.Size, f.ReadTile)
	if err != nil {
		return nil, fmt.Errorf("%w: the tiles of its checkpoint at size %d: %w", ErrDamaged, last.Size, err)
	}
	if g.rng, err = ranges.NewRange(0, last.Size, hashes); err != nil {
		return nil, err
	}
	root, err := rootOf(g.rng)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(root, last.RootHash) {
		return nil, fmt.Errorf("%w: its tiles at size %d have the root %x, its checkpoint says %x", ErrDamaged, last.Size, root, last.RootHash)
	}
	// The last bundle is copied whenever it grows, with whatever has become of it on the disk: hold it against its tile.
	full := last.Size - last.Size%layout.EntryBundleWidth
	if full == last.Size {
		return g, nil
	}
	w := walk{folder: f, rng: ranges.NewEmptyRange(0), size: last.Size}
	if full > 0 {
		if hashes, err = client.FetchRangeNodes(ctx, full, f.ReadTile); err != nil {
			return nil, fmt.Errorf("%w: the tiles of its first %d entries: %w", ErrDamaged, full, err)
		}
		if w.rng, err = ranges.NewRange(0, full, hashes); err != nil {
			return nil, err
		}
	}
	return g, w.to(ctx, last.Size)
}

// Name, KeyHash and Sign make guard a note.Signer.
func (g *guard) Name() string    { return g.verifier.Name() }
func (g *guard) KeyHash() uint32 { return g.verifier.KeyHash() }

func (g *guard) Sign(text []byte) ([]byte, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	size, err := g.approve(text)
	if err != nil {
		g.refused(err)
		return nil, err
	}
	sig, err := g.key.Sign(rand.Reader, text, crypto.Hash(0))
	if err == nil && !g.verifier.Verify(text, sig) {
		err = errors.New("the key made a signature that does not verify")
	}
	if err != nil {
		err = fmt.Errorf("sign the audit log's checkpoint: %w", err)
		g.refused(err)
		return nil, err
	}
	g.signed(size)
	return sig, nil
}

// approve brings the guard's own tree to the size of the checkpoint and compares the roots.
func (g *guard) approve(text []byte) (uint64, error) {
	var cp log.Checkpoint
	if rest, err := cp.Unmarshal(text); err != nil || len(rest) > 0 || cp.Origin != g.origin {
		return 0, fmt.Errorf("refuse to sign what is not a checkpoint of %s", g.origin)
	}
	// On a copy, so that a failure on the way (a full file table) can be tried again.
	next, err := ranges.NewRange(0, g.rng.End(), append([][]byte(nil), g.rng.Hashes()...))
	if err != nil {
		return 0, err
	}
	w := walk{folder: g.folder, rng: next, size: cp.Size}
	if err := w.to(g.ctx, cp.Size); err != nil {
		return 0, fmt.Errorf("re-read the audit log before signing its checkpoint: %w", err)
	}
	root, err := rootOf(next)
	if err != nil {
		return 0, err
	}
	if !bytes.Equal(root, cp.Hash) {
		return 0, fmt.Errorf("%w: its entries up to %d have the root %x, its state says %x", ErrDamaged, cp.Size, root, cp.Hash)
	}
	g.rng = next
	return cp.Size, nil
}

// noteKey is the verifier key of an Ed25519 key under a name (https://c2sp.org/signed-note, algorithm 0x01).
func noteKey(origin string, key crypto.Signer) (string, note.Verifier, error) {
	if key == nil {
		return "", nil, errors.New("open the audit log: no key to sign its checkpoints")
	}
	pub, ok := key.Public().(ed25519.PublicKey)
	if !ok {
		return "", nil, fmt.Errorf("open the audit log: its checkpoints want an Ed25519 key, not %T", key.Public())
	}
	vkey, err := note.NewEd25519VerifierKey(origin, pub)
	if err != nil {
		return "", nil, err
	}
	v, err := note.NewVerifier(vkey)
	if err != nil {
		return "", nil, fmt.Errorf("open the audit log: origin %q must be <trust domain>/<cluster>/<instance>, without spaces and '+'", origin)
	}
	return vkey, v, nil
}
