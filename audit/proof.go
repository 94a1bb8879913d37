package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"

	tlog "github.com/transparency-dev/formats/proof"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"
)

// Proof shows that an entry is in a log, to somebody who has nothing but the log's verifier key.
// Its text form is https://c2sp.org/tlog-proof, with the entry as the extra data.
type Proof struct {
	Index uint64
	// Hashes is the inclusion proof, from the leaf's sibling to the root's child (RFC 6962 §2.1.1).
	Hashes [][]byte
	// Checkpoint is the signed note that the proof leads to.
	Checkpoint []byte
	// Entry is the entry as it is stored. It is carried for convenience: what it says counts only when VerifyProof was given it.
	Entry []byte
}

const (
	maxProof       = 512 << 10 // bytes of its text
	maxProofHashes = 64        // a tree has at most 2^64 leaves
	proofHeader    = "c2sp.org/tlog-proof@v1"
)

// MarshalText makes the tlog-proof text.
func (p Proof) MarshalText() ([]byte, error) {
	t := tlog.TLogProof{Index: p.Index, Checkpoint: p.Checkpoint, ExtraData: p.Entry}
	for _, h := range p.Hashes {
		if len(h) != sha256.Size {
			return nil, fmt.Errorf("write a proof: a hash has %d bytes, not %d", len(h), sha256.Size)
		}
		t.Hashes = append(t.Hashes, [sha256.Size]byte(h))
	}
	return t.Marshal(), nil
}

// ParseProof reads what MarshalText wrote, and nothing that could be read in two ways. It verifies nothing.
//
// (The parser of the formats library reads lines of at most 64 KiB, which an entry in base64 may exceed.)
func ParseProof(text []byte) (Proof, error) {
	p, err := parseProof(text)
	if err != nil {
		return Proof{}, fmt.Errorf("read a proof: %w", err)
	}
	return p, nil
}

func parseProof(text []byte) (Proof, error) {
	if len(text) > maxProof {
		return Proof{}, fmt.Errorf("it has more than %d bytes", maxProof)
	}
	head, checkpoint, ok := bytes.Cut(text, []byte("\n\n"))
	lines := bytes.Split(head, []byte("\n"))
	if string(lines[0]) != proofHeader {
		return Proof{}, fmt.Errorf("its first line is not %q", proofHeader)
	}
	if !ok || len(checkpoint) == 0 {
		return Proof{}, errors.New("it has no checkpoint")
	}
	lines = lines[1:]
	p := Proof{Checkpoint: checkpoint}
	var err error
	if len(lines) > 0 {
		if extra, ok := bytes.CutPrefix(lines[0], []byte("extra ")); ok {
			if p.Entry, err = base64.StdEncoding.Strict().AppendDecode([]byte{}, extra); err != nil {
				return Proof{}, errors.New("its extra line is not base64")
			}
			lines = lines[1:]
		}
	}
	var index []byte
	if len(lines) > 0 {
		index, ok = bytes.CutPrefix(lines[0], []byte("index "))
	}
	if p.Index, err = strconv.ParseUint(string(index), 10, 64); !ok || err != nil {
		return Proof{}, errors.New("it has no index")
	}
	for _, line := range lines[1:] {
		h, err := base64.StdEncoding.Strict().DecodeString(string(line))
		if err != nil || len(h) != sha256.Size || len(p.Hashes) == maxProofHashes {
			return Proof{}, errors.New("its hashes are not at most 64 lines of base64, 32 bytes each")
		}
		p.Hashes = append(p.Hashes, h)
	}
	// Leading zeros, carriage returns and the like: one proof has one text.
	if again, err := p.MarshalText(); err != nil || !bytes.Equal(again, text) {
		return Proof{}, errors.New("it is not in canonical form")
	}
	return p, nil
}

// VerifyProof checks that the log with this verifier key holds exactly these bytes at the proof's index. The leaf hash is
// made from the bytes, never taken from the proof; origin, size and root come from the checkpoint that the key has signed.
// Anything else is an ErrBadProof.
func VerifyProof(p Proof, entry []byte, verifierKey string) error {
	v, err := note.NewVerifier(verifierKey)
	if err != nil {
		return fmt.Errorf("verify a proof: the verifier key %.300q is not one: %w", verifierKey, err)
	}
	cp, err := parseCheckpoint(p.Checkpoint, v)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrBadProof, err)
	}
	if len(p.Hashes) > maxProofHashes {
		return fmt.Errorf("%w: it has %d hashes", ErrBadProof, len(p.Hashes))
	}
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, p.Index, cp.Size, rfc6962.DefaultHasher.HashLeaf(entry), p.Hashes, cp.RootHash); err != nil {
		var mismatch proof.RootMismatchError
		if errors.As(err, &mismatch) {
			return fmt.Errorf("%w: it does not lead from this entry at index %d to the root that %s signed at size %d", ErrBadProof, p.Index, cp.Origin, cp.Size)
		}
		return fmt.Errorf("%w: index %d, size %d: %w", ErrBadProof, p.Index, cp.Size, err)
	}
	return nil
}
