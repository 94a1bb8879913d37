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

// guard signs checkpoints, and is their first auditor: before it signs it reads back from disk every entry and tile since
// the start of the last bundle, hashes them itself, and goes on from the tree it signed last. So a disk that lies, a tree
// state that was changed or a log that shrank is never signed over (the ends of the CT logs Nimbus, Yeti and Oak). The last
// bundle is read whole each time because it is copied whenever it grows, with whatever has become of it on the disk.
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

	mu   sync.Mutex
	size uint64         // of the last checkpoint signed
	root []byte         // its root hash
	full *compact.Range // its tree up to the last full bundle; never changed, only replaced
}

// newGuard starts from the last checkpoint, and checks that the folder still has its tree.
func newGuard(ctx context.Context, f folder, v note.Verifier, key crypto.Signer, last Checkpoint) (*guard, error) {
	g := &guard{verifier: v, key: key, folder: f, origin: v.Name(), ctx: ctx, size: last.Size, root: last.RootHash, full: ranges.NewEmptyRange(0)}
	if last.Size == 0 {
		return g, nil
	}
	tree, err := g.tree(last.Size)
	if err != nil {
		return nil, err
	}
	root, err := rootOf(tree)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(root, last.RootHash) {
		return nil, fmt.Errorf("%w: its tiles at size %d have the root %x, its checkpoint says %x", ErrDamaged, last.Size, root, last.RootHash)
	}
	if n := last.Size - last.Size%layout.EntryBundleWidth; n > 0 {
		if g.full, err = g.tree(n); err != nil {
			return nil, err
		}
	}
	_, _, err = g.grow(last.Size)
	return g, err
}

// tree is what the tiles say of the first n entries.
func (g *guard) tree(n uint64) (*compact.Range, error) {
	hashes, err := client.FetchRangeNodes(g.ctx, n, g.folder.ReadTile)
	if err != nil {
		return nil, fmt.Errorf("%w: the tiles of its first %d entries: %w", ErrDamaged, n, err)
	}
	return ranges.NewRange(0, n, hashes)
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
	full, root, err := g.grow(cp.Size)
	if err != nil {
		return 0, fmt.Errorf("re-read the audit log before signing its checkpoint: %w", err)
	}
	if !bytes.Equal(root, cp.Hash) {
		return 0, fmt.Errorf("%w: its entries up to %d have the root %x, its state says %x", ErrDamaged, cp.Size, root, cp.Hash)
	}
	g.size, g.root, g.full = cp.Size, root, full
	return cp.Size, nil
}

// grow re-reads the log from the last full bundle to n entries, by way of the tree that was signed last. It returns the
// tree up to the last full bundle, and the root of the whole. The guard stays as it is, so that a failure on the way (a
// full file table) can be tried again.
func (g *guard) grow(n uint64) (full *compact.Range, root []byte, err error) {
	if n < g.size {
		return nil, nil, fmt.Errorf("%w: it has %d entries where it had %d", ErrDamaged, n, g.size)
	}
	next, err := clone(g.full)
	if err != nil {
		return nil, nil, err
	}
	full = g.full
	w := walk{folder: g.folder, rng: next, size: n}
	for _, at := range []uint64{g.size, n - n%layout.EntryBundleWidth, n} {
		if at > next.End() {
			if err := w.to(g.ctx, at); err != nil {
				return nil, nil, err
			}
		}
		if root, err = rootOf(next); err != nil {
			return nil, nil, err
		}
		if at == g.size && !bytes.Equal(root, g.root) {
			return nil, nil, fmt.Errorf("%w: its entries up to %d have the root %x, its last checkpoint has %x", ErrDamaged, at, root, g.root)
		}
		if at%layout.EntryBundleWidth == 0 && next.End() == at {
			if full, err = clone(next); err != nil {
				return nil, nil, err
			}
		}
	}
	return full, root, nil
}

func clone(r *compact.Range) (*compact.Range, error) {
	return ranges.NewRange(r.Begin(), r.End(), append([][]byte(nil), r.Hashes()...))
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
