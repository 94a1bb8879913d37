package transit

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/vault"
)

// maxMessage bounds what an Ed25519 key signs, in bytes: such a key is sent the whole message.
const maxMessage = 16 << 10

// Key is one version of a key in Transit. Vault signs; the public key is the one that was there when the key was opened, and
// no signature that it does not verify is ever returned.
type Key struct {
	store  *Store
	ref    keystore.Ref
	public crypto.PublicKey

	mu sync.Mutex
	// batchers by scheme: a request to Vault names one for all its inputs.
	batchers map[scheme]*batcher
	// refused is why Vault did not sign when it was last asked, until when that is taken to hold.
	refused      error
	refusedUntil time.Time
	// exposed is why the private key can have left Vault; "" = it can't.
	exposed string
}

// refusalHolds is how long a refusal is remembered: long beside the tries of many who ask again, short beside the time in
// which somebody mends it.
const refusalHolds = 5 * time.Second

var _ keystore.Key = (*Key)(nil)

// Ref names the key and its version.
func (k *Key) Ref() keystore.Ref { return k.ref }

// Remote is always true.
func (k *Key) Remote() bool { return true }

// Public is the public key as it was when the key was opened.
func (k *Key) Public() crypto.PublicKey { return k.public }

// Ready says why a signature should not be asked for now: Vault is away, or has just refused one.
func (k *Key) Ready() error {
	if err := k.store.signs.Ready(); err != nil {
		return away(err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.refused != nil && k.store.now().Before(k.refusedUntil) {
		return k.refused
	}
	return nil
}

// heed keeps what Vault said to a request for a signature.
func (k *Key) heed(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case err == nil:
		k.refused = nil
	case !errors.Is(err, vault.ErrAway) && !errors.Is(err, context.Canceled):
		k.refused, k.refusedUntil = err, k.store.now().Add(refusalHolds)
	}
}

// Exposed says why the private key can have left Vault, as it was seen when the key was opened and at each Look; "" = it can't.
// Such a key signs all the same.
func (k *Key) Exposed() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.exposed
}

// expose keeps, and says once, that the private key can leave Vault. What could be taken once may have been, whatever is said
// of the key later.
func (k *Key) expose(info *keyInfo) {
	what := info.leaves()
	k.mu.Lock()
	defer k.mu.Unlock()
	if what == "" || k.exposed != "" {
		return
	}
	k.exposed = fmt.Sprintf("%s: %s, for good; Vault's audit log tells by requests to %s/export and %[3]s/backup of it whether somebody has", info.where, what, k.store.mount)
	k.store.logger.Warn("the private key can be taken out of Vault: take it for lost unless it is known that nobody has", "key", k.ref.String(), "because", k.exposed)
}

// probeAfter is how long nobody must have asked for a signature for Look to try whether one could be had: those who ask for
// one find out themselves.
const probeAfter = 10 * time.Second

// Look asks Vault whether the key would still sign, without a signature, and whether it can leave (Exposed). An error that wraps
// keystore.ErrAway is none of the key: it could not be told. Any other is one that will not pass by itself.
func (k *Key) Look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, k.store.timeout)
	defer cancel()
	if err := k.probe(ctx); err != nil {
		return fmt.Errorf("look at key %s: %w", k.ref, err)
	}
	info, err := k.store.read(ctx, k.ref.Name)
	switch {
	case err != nil && !errors.Is(err, keystore.ErrNotFound) && !errors.Is(err, vault.ErrNotFound):
		return fmt.Errorf("look at key %s: %w", k.ref, awayError{err})
	case err != nil:
		return fmt.Errorf("key %s: %w", k.ref, err)
	}
	public, err := info.public(k.ref.Version)
	if err == nil && !samePublic(k.public, public) {
		err = errWrong
	}
	if err != nil {
		return fmt.Errorf("key %s: %w", k.ref, err)
	}
	k.expose(info)
	return nil
}

// probe finds out whether signatures that have failed would come again: it asks for none, which Vault refuses where it could
// have signed.
func (k *Key) probe(ctx context.Context) error {
	signs := k.store.signs
	if !signs.Failing() {
		return nil
	}
	var err error
	if signs.Quiet() >= probeAfter {
		alg := keystore.AlgorithmOf(k.public)
		_, err = k.store.write(ctx, signs, signPath(k.store.path("sign", k.ref.Name), alg), map[string]any{"batch_input": []any{}, "key_version": k.ref.Version})
		if !signs.Failing() {
			return nil
		}
	}
	return awayError{cmp.Or(err, errFailing)}
}

var errFailing = errors.New("its signatures have failed, and those who ask for them try on")

func (k *Key) String() string             { return "key " + k.ref.String() }
func (k *Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, k.String()) }
func (k *Key) LogValue() slog.Value       { return slog.StringValue(k.String()) }

// Sign has Vault sign a digest (SHA-256, SHA-384 or SHA-512), or a message with an Ed25519 key. For RSA, opts chooses
// PKCS #1 v1.5, or PSS with a salt as long as the hash. It takes at most Config.Timeout. The error wraps keystore.ErrAway and
// vault.ErrAway where another try may succeed, and keystore.ErrNotFound where the key is gone.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signature, err := k.sign(digest, opts)
	k.store.metrics.signed(err)
	if err != nil {
		return nil, fmt.Errorf("sign with key %s: %w", k.ref, away(err))
	}
	return signature, nil
}

func (k *Key) sign(digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	s, err := schemeOf(k.public, digest, opts)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), k.store.timeout)
	defer cancel()
	signature, err := k.batcher(s).do(ctx, digest)
	if errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, vault.ErrAway) {
		return nil, fmt.Errorf("no signature came within %s: %w", k.store.timeout, vault.ErrAway)
	}
	if err == nil && !s.verify(k.public, digest, signature) {
		signature, err = nil, errWrong
	}
	k.heed(err)
	return signature, err
}

// errWrong is a signature that must not be used.
var errWrong = errors.New("the signature that came is not by the key that was opened: the key in Vault was deleted and made anew, or the answer was changed on its way; restore the key from Vault's backup, or, where it is an intermediate's, rotate to a new one")

func (k *Key) batcher(s scheme) *batcher {
	k.mu.Lock()
	defer k.mu.Unlock()
	b := k.batchers[s]
	if b == nil {
		b = &batcher{send: func(ctx context.Context, inputs [][]byte) ([]answer, error) { return k.send(ctx, s, inputs) }}
		k.batchers[s] = b
	}
	return b
}

// send is one request to Vault.
func (k *Key) send(ctx context.Context, s scheme, inputs [][]byte) ([]answer, error) {
	k.store.metrics.batch.Observe(float64(len(inputs)))
	items := make([]map[string]string, len(inputs))
	for i, in := range inputs {
		items[i] = map[string]string{"input": base64.StdEncoding.EncodeToString(in)}
	}
	path := k.store.path("sign", k.ref.Name)
	body := map[string]any{"batch_input": items, "key_version": k.ref.Version, "marshaling_algorithm": "asn1"}
	if s.hash != 0 {
		path += "/" + hashNames[s.hash]
		body["prehashed"] = true
	}
	if s.rsa != "" {
		body["signature_algorithm"], body["salt_length"] = s.rsa, "hash"
	}
	data, err := k.store.write(ctx, k.store.signs, path, body)
	if errors.Is(err, vault.ErrRefused) || errors.Is(err, vault.ErrNotFound) {
		err = k.why(ctx, err)
	}
	if err != nil {
		return nil, err
	}
	results, _ := data["batch_results"].([]any)
	if len(results) != len(inputs) {
		return nil, fmt.Errorf("the answer has %d results for %d inputs", len(results), len(inputs))
	}
	answers := make([]answer, len(inputs))
	var reason error // looked up once for all items
	for i, r := range results {
		item, _ := r.(map[string]any)
		text, _ := item["signature"].(string)
		said, _ := item["error"].(string)
		switch {
		case said != "" && reason == nil:
			reason = k.why(ctx, fmt.Errorf("refused by Vault: %s", bounded(said)))
			fallthrough
		case said != "":
			answers[i].err = reason
		default:
			answers[i].signature, answers[i].err = parseSignature(text, k.ref.Version)
		}
	}
	return answers, nil
}

// why looks at the key for the reason of a refusal. Vault's own words are of its insides; they stand where nothing better is
// found.
func (k *Key) why(ctx context.Context, said error) error {
	info, err := k.store.read(ctx, k.ref.Name)
	switch {
	case errors.Is(err, vault.ErrDenied) || errors.Is(err, vault.ErrAway):
		return said
	case err != nil:
		return err
	}
	public, err := info.public(k.ref.Version)
	if err != nil {
		return err
	}
	if !samePublic(k.public, public) {
		return errWrong
	}
	return said
}

func samePublic(a, b crypto.PublicKey) bool {
	equal, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && equal.Equal(b)
}

// scheme is how a key signs.
type scheme struct {
	hash crypto.Hash // 0 = the message itself
	rsa  string      // Vault's signature_algorithm; "" for other keys
}

// hashNames are Vault's names of the hashes that we sign.
var hashNames = map[crypto.Hash]string{crypto.SHA256: "sha2-256", crypto.SHA384: "sha2-384", crypto.SHA512: "sha2-512"}

func schemeOf(public crypto.PublicKey, digest []byte, opts crypto.SignerOpts) (scheme, error) {
	if opts == nil {
		return scheme{}, errors.New("the hash of what is to be signed is not given")
	}
	s := scheme{hash: opts.HashFunc()}
	if _, ok := public.(ed25519.PublicKey); ok {
		o, isEd := opts.(*ed25519.Options)
		switch {
		case s.hash != 0 || isEd && o.Context != "":
			return scheme{}, errors.New("an Ed25519 key signs the message itself, without a context")
		case len(digest) > maxMessage:
			return scheme{}, fmt.Errorf("a message of %d bytes is too long, at most %d are sent to Vault", len(digest), maxMessage)
		}
		return s, nil
	}
	if hashNames[s.hash] == "" || len(digest) != s.hash.Size() {
		return scheme{}, fmt.Errorf("it signs digests of SHA-256, SHA-384 and SHA-512 only, not %d bytes of %s", len(digest), s.hash)
	}
	if _, ok := public.(*rsa.PublicKey); ok {
		s.rsa = "pkcs1v15"
		if pss, ok := opts.(*rsa.PSSOptions); ok {
			// With a salt of any other length crypto/x509 would not verify it (RFC 4055 §3.1).
			if pss.SaltLength != rsa.PSSSaltLengthEqualsHash && pss.SaltLength != s.hash.Size() {
				return scheme{}, errors.New("it signs RSA-PSS with a salt as long as the hash only")
			}
			s.rsa = "pss"
		}
	}
	return s, nil
}

func (s scheme) verify(public crypto.PublicKey, digest, signature []byte) bool {
	switch p := public.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(p, digest, signature)
	case *rsa.PublicKey:
		if s.rsa == "pss" {
			return rsa.VerifyPSS(p, s.hash, digest, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(p, s.hash, digest, signature) == nil
	case ed25519.PublicKey:
		return ed25519.Verify(p, digest, signature)
	}
	return false
}

// maxSignature bounds the text of a signature. An RSA-4096 one takes 700 bytes.
const maxSignature = 1024

// parseSignature reads "vault:v12:<base64>" and wants the version that was asked for.
func parseSignature(text string, version int) ([]byte, error) {
	if len(text) > maxSignature {
		return nil, fmt.Errorf("the answer holds a signature of %d bytes", len(text))
	}
	rest, ok := strings.CutPrefix(text, "vault:v")
	number, encoded, ok2 := strings.Cut(rest, ":")
	if !ok || !ok2 {
		return nil, fmt.Errorf("the answer is no signature: %s", bounded(text))
	}
	if number != strconv.Itoa(version) {
		return nil, fmt.Errorf("it was signed with version %s of the key instead of %d", bounded(number), version)
	}
	signature, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil || len(signature) == 0 || base64.StdEncoding.EncodeToString(signature) != encoded { // which ignores newlines and loose bits
		return nil, errors.New("the answer holds a signature that is not base64")
	}
	return signature, nil
}
