package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"

	"github.com/signet-ca/signet/internal/durable"
)

// Witness remembers the newest checkpoint that one agent has seen of one log, over restarts, and takes the next only when
// the log has grown without changing. The first is taken on the word of the connection that brought it.
type Witness struct {
	path     string
	verifier note.Verifier

	mu   sync.Mutex
	seen Checkpoint
}

// NewWitness begins with what the file holds, if it exists. A file that holds no checkpoint of this log is refused, since
// forgetting what was seen is what a forger would want.
func NewWitness(path string, origin, verifierKey string) (*Witness, error) {
	v, err := note.NewVerifier(verifierKey)
	if err != nil {
		return nil, fmt.Errorf("watch the audit log %s: the verifier key %.300q is not one: %w", origin, verifierKey, err)
	}
	if v.Name() != origin {
		return nil, fmt.Errorf("watch the audit log %s: the verifier key is that of %s", origin, v.Name())
	}
	w := &Witness{path: path, verifier: v}
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return w, nil
	}
	if err != nil {
		return nil, fmt.Errorf("watch the audit log %s: read the newest checkpoint seen: %w", origin, err)
	}
	if w.seen, err = parseCheckpoint(raw, v); err != nil {
		return nil, fmt.Errorf("watch the audit log %s: %s does not hold a checkpoint of it: %w; if this agent was enrolled anew with another server, remove the file", origin, path, err)
	}
	return w, nil
}

// Seen is the size and root hash of the newest checkpoint; 0 and nil before the first.
func (w *Witness) Seen() (size uint64, root []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen.Size, w.seen.RootHash
}

// Advance takes a newer checkpoint, whose proof must start at the size that was seen last. It is durable when Advance
// returns nil. ErrRollback and ErrFork have both checkpoints in their message, and in a file beside the witness's own,
// with the ending .evidence, that is never overwritten.
func (w *Witness) Advance(raw []byte, fromSize uint64, hashes [][]byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	origin := w.verifier.Name()
	cp, err := parseCheckpoint(raw, w.verifier)
	if err != nil {
		return fmt.Errorf("take a checkpoint of the audit log %s: %w", origin, err)
	}
	seen := w.seen
	switch {
	case seen.Note == nil:
	case cp.Size < seen.Size:
		return w.contradiction(ErrRollback, cp, nil)
	case cp.Size == seen.Size && !bytes.Equal(cp.RootHash, seen.RootHash):
		return w.contradiction(ErrFork, cp, nil)
	case cp.Size == seen.Size:
		return nil
	case fromSize != seen.Size:
		return fmt.Errorf("take a checkpoint of the audit log %s: its proof starts at size %d, the checkpoint seen last has %d", origin, fromSize, seen.Size)
	default:
		if len(hashes) > 2*maxProofHashes {
			return fmt.Errorf("take a checkpoint of the audit log %s: its proof has %d hashes", origin, len(hashes))
		}
		if err := proof.VerifyConsistency(rfc6962.DefaultHasher, seen.Size, cp.Size, hashes, seen.RootHash, cp.RootHash); err != nil {
			return w.contradiction(ErrFork, cp, hashes)
		}
	}
	if err := durable.WriteFile(w.path, raw, 0o600); err != nil {
		return fmt.Errorf("keep the checkpoint of the audit log %s: %w", origin, err)
	}
	w.seen = cp
	return nil
}

// contradiction is an error that shows both checkpoints. Each is signed by the log, so together they convict it.
func (w *Witness) contradiction(kind error, cp Checkpoint, hashes [][]byte) error {
	evidence := fmt.Appendf(nil, "%s: %v\n\nseen before:\n\n%s\nshown now:\n\n%s", w.verifier.Name(), kind, w.seen.Note, cp.Note)
	if len(hashes) > 0 {
		evidence = append(evidence, "\nproof shown with it, which does not hold:\n\n"...)
		for _, h := range hashes {
			evidence = fmt.Appendf(evidence, "%x\n", h)
		}
	}
	path := w.path + ".evidence"
	err := fmt.Errorf("%w: %s showed size %d with root %x, and now shows size %d with root %x; both signed checkpoints are in %s",
		kind, w.verifier.Name(), w.seen.Size, w.seen.RootHash, cp.Size, cp.RootHash, path)
	if werr := durable.CreateFile(path, evidence, 0o600); werr != nil && !errors.Is(werr, fs.ErrExist) {
		err = fmt.Errorf("%w (which could not be written: %w)", err, werr)
	}
	return err
}
