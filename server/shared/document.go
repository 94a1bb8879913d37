package shared

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/rotation"
)

// title is the first line of the document, which neither a checkpoint nor a report has: the same key signs all three.
const title = "signet shared trust v1\n"

// What a document may hold.
const (
	// MaxSize is in bytes, without title and signature.
	MaxSize = 512 << 10
	// MaxRoots is how many roots are listed at most; MaxRemoved how many of those are removed ones.
	MaxRoots   = 512
	MaxRemoved = 192
	// MaxCertificate is in bytes of PEM.
	MaxCertificate = 16 << 10
	// MaxDecisions is where the count of a root ends: from there on only the stronger decision prevails.
	MaxDecisions = 1 << 53
)

// Encode writes the document, as it is to be signed (audit.SignNote). It fails where nobody would read it: it is too long, or
// lists too many roots.
func (s Trust) Encode() (string, error) {
	if len(s.Roots) > MaxRoots {
		return "", fmt.Errorf("the shared trust would list %d roots: at most %d are read", len(s.Roots), MaxRoots)
	}
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return "", err
	}
	if len(text) > MaxSize {
		return "", fmt.Errorf("the shared trust would have %d bytes: at most %d are read", len(text), MaxSize)
	}
	return title + string(text) + "\n", nil
}

// Writer is a cluster whose document is read, known by the key of its log.
type Writer struct{ Cluster, VerifierKey string }

// Open verifies a document that one of the writers has signed, and reads it. Nothing is believed of it before: who it is from
// and for is in the bytes that were signed. Errors speak of the document as "it".
//
// What a newer version adds is passed over. One root that can't have been written by a cluster spoils it all; whether a
// certificate is good for a root each cluster judges for itself, root by root.
func Open(signed []byte, td spiffeid.TrustDomain, writers []Writer) (Trust, error) {
	// Notes are longer by a title and a signature.
	if len(signed) > MaxSize+4096 {
		return Trust{}, fmt.Errorf("it has %d bytes: at most %d are read", len(signed), MaxSize)
	}
	for _, w := range writers {
		text, err := audit.OpenNote(signed, w.VerifierKey)
		if err != nil {
			continue
		}
		body, ok := bytes.CutPrefix([]byte(text), []byte(title))
		if !ok {
			return Trust{}, fmt.Errorf("what cluster %s has written is no shared trust that this version reads", w.Cluster)
		}
		return parse(body, td, w.Cluster)
	}
	by := "nobody"
	if names := audit.Signers(signed); len(names) > 0 {
		by = strconv.Quote(clip(strings.Join(names, ", ")))
	}
	return Trust{}, fmt.Errorf("it is not signed by this cluster, nor with the key of one that rotation.peers names, but by %s: if that is a cluster of yours, see to it that in each the rotation.peers name all the others, with the keys that `signet cluster show` prints there; "+
		"if not, find out who has written it, and delete it: the clusters write it again", by)
}

// parse reads what stands behind the title.
func parse(body []byte, td spiffeid.TrustDomain, writer string) (s Trust, err error) {
	d := json.NewDecoder(bytes.NewReader(body))
	if err := d.Decode(&s); err != nil {
		return s, fmt.Errorf("it can't be read: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return s, errors.New("it goes on behind its end")
	}
	switch {
	case s.TrustDomain != td.Name():
		return s, fmt.Errorf("it is of trust domain %q, and this cluster is of %s: let each trust domain have a path of its own", clip(s.TrustDomain), td.Name())
	case s.Cluster != writer:
		return s, fmt.Errorf("it is of cluster %q, and signed by %s", clip(s.Cluster), writer)
	case len(s.Roots) > MaxRoots:
		return s, fmt.Errorf("it lists %d roots: at most %d are read", len(s.Roots), MaxRoots)
	}
	for i := range s.Roots {
		if err := s.Roots[i].check(); err != nil {
			return s, fmt.Errorf("root %d: %w", i+1, err)
		}
	}
	n := len(s.Roots)
	if s.Roots = Join(s.Roots); len(s.Roots) != n {
		return s, errors.New("it lists a root twice")
	}
	return s, nil
}

// check looks whether a root can be what a cluster has written, and brings its certificate into one form, so that equal roots
// are equal in bytes.
func (r *Root) check() error {
	fingerprint, err := ca.ParseFingerprint(r.Fingerprint)
	if err != nil {
		return err
	}
	if err := identity.ParseName("cluster", r.By); err != nil {
		return err
	}
	der, err := r.DER()
	if err != nil {
		return err
	}
	switch {
	case r.ID != rotation.RootID(fingerprint[:]):
		return fmt.Errorf("its id %q is not of its fingerprint", clip(r.ID))
	case stateStrength(r.State) < 0:
		return fmt.Errorf("its state %q is none of published, active and removed", clip(string(r.State)))
	case r.Decision == 0 || r.Decision > MaxDecisions:
		return fmt.Errorf("decision %d: want 1 to %d", r.Decision, uint64(MaxDecisions))
	case r.NotAfter.IsZero():
		return errors.New("it has no end")
	case (r.State == ca.Removed) != (der == nil):
		return errors.New("it needs a certificate unless it is removed, and none then")
	case der != nil && !fingerprint.Of(der):
		return errors.New("its certificate is not the one of its fingerprint")
	}
	if der != nil {
		r.Certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	r.Leaving = r.Leaving || r.State == ca.Removed
	r.Fingerprint, r.NotAfter = fingerprint.String(), r.NotAfter.UTC()
	return nil
}

// DER is the certificate, not parsed; nil for none. It fails where Certificate is anything else than one of them in PEM, of at
// most MaxCertificate bytes; never for a root that Open has returned.
func (r Root) DER() ([]byte, error) {
	if r.Certificate == "" {
		return nil, nil
	}
	if len(r.Certificate) > MaxCertificate {
		return nil, fmt.Errorf("its certificate has %d bytes of PEM: at most %d are read", len(r.Certificate), MaxCertificate)
	}
	block, rest := pem.Decode([]byte(r.Certificate))
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("its certificate is not one certificate in PEM")
	}
	return block.Bytes, nil
}

// clip bounds foreign text before it goes into an error.
func clip(s string) string {
	if len(s) > 512 {
		return s[:512] + "…"
	}
	return s
}
