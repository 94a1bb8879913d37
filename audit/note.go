package audit

import (
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/mod/sumdb/note"
)

// maxNote bounds a note that is not a checkpoint, in bytes.
const maxNote = 1 << 20

// noteSigner signs with the log's key what is not a checkpoint.
type noteSigner struct {
	note.Verifier
	key crypto.Signer
}

func (s noteSigner) Sign(text []byte) ([]byte, error) {
	return s.key.Sign(rand.Reader, text, crypto.Hash(0))
}

// SignNote signs a text with the key of the log of this origin (c2sp.org/signed-note). A checkpoint begins with the log's
// origin, so no other text may: whoever verifies one can't take it for the other.
func SignNote(origin string, key crypto.Signer, text string) ([]byte, error) {
	if strings.HasPrefix(text, origin) || len(text) > maxNote {
		return nil, fmt.Errorf("refuse to sign a note of %d bytes that could be taken for a checkpoint of %s, or is too long", len(text), origin)
	}
	_, v, err := noteKey(origin, key)
	if err != nil {
		return nil, err
	}
	return note.Sign(&note.Note{Text: text}, noteSigner{v, key})
}

// Signers are the names in whose a note is signed, for people: nothing of it is verified.
func Signers(signed []byte) (names []string) {
	_, err := note.Open(signed, note.VerifierList())
	if other := (*note.UnverifiedNoteError)(nil); errors.As(err, &other) {
		for _, s := range other.Note.UnverifiedSigs {
			names = append(names, s.Name)
		}
	}
	return names
}

// OpenNote returns the text of a note that the key has signed.
func OpenNote(signed []byte, verifierKey string) (string, error) {
	if len(signed) > maxNote {
		return "", fmt.Errorf("note of %d bytes: at most %d are read", len(signed), maxNote)
	}
	v, err := note.NewVerifier(verifierKey)
	if err != nil {
		return "", fmt.Errorf("verifier key: %w", err)
	}
	n, err := note.Open(signed, note.VerifierList(v))
	var other *note.UnverifiedNoteError
	switch {
	case errors.As(err, &other):
		return "", fmt.Errorf("note is not signed by %s", v.Name())
	case err != nil:
		return "", err
	}
	return n.Text, nil
}
