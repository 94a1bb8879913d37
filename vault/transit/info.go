package transit

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strconv"

	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/vault"
)

// keyInfo is what Vault tells about a key, in the parts that matter here.
type keyInfo struct {
	Name            string                     `json:"name"`
	Type            string                     `json:"type"`
	Derived         bool                       `json:"derived"`
	Exportable      bool                       `json:"exportable"`
	PlaintextBackup bool                       `json:"allow_plaintext_backup"`
	Imported        bool                       `json:"imported_key"`
	AutoRotate      int64                      `json:"auto_rotate_period"` // seconds
	Latest          int                        `json:"latest_version"`
	MinAvailable    int                        `json:"min_available_version"` // 0 = nothing was trimmed
	MinDecryption   int                        `json:"min_decryption_version"`
	MinEncryption   int                        `json:"min_encryption_version"` // of signing as well; 0 = no bound
	Keys            map[string]json.RawMessage `json:"keys"`

	// where is the path of the key in Vault.
	where string
}

// read asks for a key. keystore.ErrNotFound if there is none.
func (s *Store) read(ctx context.Context, name string) (*keyInfo, error) {
	path := s.path("keys", name)
	secret, err := s.keys.Read(ctx, path)
	// Where no engine is mounted, the answer is 404 as well, but with words.
	if e, ok := errors.AsType[*vault.Error](err); ok && errors.Is(err, vault.ErrNotFound) && len(e.Messages) > 0 {
		return nil, fmt.Errorf("no Transit engine is mounted at %s in this Vault: mount it, or set the right path (%w)", s.mount, err)
	}
	switch {
	case errors.Is(err, vault.ErrTooLarge):
		return nil, fmt.Errorf("%s has too many versions, Vault's description of it is over 1 MiB: hide those that are older than any in use (`vault write %s/config min_decryption_version=N`), and see to it that nobody rotates it by hand or by auto_rotate_period (%w)", path, path, err)
	case errors.Is(err, vault.ErrNotFound):
		return nil, fmt.Errorf("%w: there is no %s in Vault; if the mount or the prefix in the configuration was changed, put back what it was; if the key was deleted, restore it from Vault's backup, or, where it is an intermediate's, rotate to a new one", keystore.ErrNotFound, path)
	case errors.Is(err, vault.ErrDenied):
		return nil, denied(err, path, "read", nil)
	case err != nil:
		return nil, err
	}
	return s.parse(name, secret.Data)
}

// change writes to a key, and returns what Vault says of it at that moment.
func (s *Store) change(ctx context.Context, name, op string, body map[string]any) (*keyInfo, error) {
	data, err := s.write(ctx, s.keys, s.path("keys", name)+op, body)
	if err != nil {
		return nil, err
	}
	if len(data) == 0 { // before Vault 1.14
		return s.read(ctx, name)
	}
	return s.parse(name, data)
}

// write returns the data of the answer, nil if there is none.
func (s *Store) write(ctx context.Context, by *vault.Engine, path string, body map[string]any) (map[string]any, error) {
	secret, err := by.Write(ctx, path, body)
	switch {
	case errors.Is(err, vault.ErrDenied):
		if by != s.keys {
			body = nil // of signatures no parameter is bounded
		}
		return nil, denied(err, path, "update", body)
	case err != nil || secret == nil:
		return nil, err
	}
	return secret.Data, nil
}

func (s *Store) parse(name string, data map[string]any) (*keyInfo, error) {
	info := &keyInfo{where: s.path("keys", name)}
	raw, err := json.Marshal(data)
	if err == nil {
		err = json.Unmarshal(raw, info)
	}
	if err != nil {
		return nil, garbled{fmt.Errorf("the answer about %s can't be read: %w", info.where, err)}
	}
	if info.Name != "" && info.Name != s.prefix+name {
		return nil, garbled{fmt.Errorf("the answer about %s is of another key, %s: something on the way to Vault mixes answers up", info.where, bounded(info.Name))}
	}
	if info.Type == "" || info.Latest < 1 || info.MinAvailable < 0 {
		return nil, garbled{fmt.Errorf("the answer about %s is not of a Transit key: type %s, newest version %d, oldest %d", info.where, bounded(info.Type), info.Latest, info.MinAvailable)}
	}
	if info.Latest-info.MinAvailable > 2*maxVersions {
		return nil, fmt.Errorf("%s has too many versions, %d to %d: destroy those that are older than any in use (`vault write %[1]s/config min_decryption_version=N min_encryption_version=N`, then `vault write %[1]s/trim min_available_version=N`), and see to it that nobody rotates it by hand or by auto_rotate_period", info.where, info.oldest(), info.Latest)
	}
	return info, nil
}

// garbled is an answer that Vault does not give: it says nothing of the key, and another try may go better.
type garbled struct{ error }

func (e garbled) Unwrap() error        { return e.error }
func (e garbled) Is(target error) bool { return target == vault.ErrAway }

// oldest is the oldest version that is not destroyed.
func (i *keyInfo) oldest() int { return max(i.MinAvailable, 1) }

// signsFrom is the first version from that one on that Vault signs with, if it is there.
func (i *keyInfo) signsFrom(version int) int {
	return max(version, i.oldest(), i.MinDecryption, i.MinEncryption)
}

// leaves says why the private key can be taken out of Vault; "" = it can't.
func (i *keyInfo) leaves() string {
	switch {
	case i.Exportable:
		return "the key is exportable"
	case i.PlaintextBackup:
		return "the key allows a plaintext backup"
	}
	return ""
}

// replace is how to come away from a key that is to have no further version. Another prefix is none for a cluster that has keys: they
// are not found under it.
const replace = "delete it in Vault if no CA has a key of it; else have the next key made elsewhere (keystore.intermediates: memory or file, with keystore.transit.mount in the file still), rotate to it, and delete this one when the last CA with a key of it is removed"

// imported refuses a key that was made elsewhere: whoever imported it has had the private key, and may have it still.
func (i *keyInfo) imported() error {
	if i.Imported {
		return fmt.Errorf("%s was imported into Vault (imported_key), so that whoever did that has had its private key in hand: find out who did; if a CA has been made with it, taint that; let Vault make another: %s", i.where, replace)
	}
	return nil
}

// mayGrow refuses what a new version above after must not be part of.
func (i *keyInfo) mayGrow(alg keystore.Algorithm, after int) error {
	if err := i.imported(); err != nil {
		return err
	}
	switch what := i.leaves(); {
	case i.Type != string(alg):
		return fmt.Errorf("%s is of type %s and stays so in all its versions, wanted is %s: keep that algorithm, or %s", i.where, bounded(i.Type), alg, replace)
	case i.Derived:
		return fmt.Errorf("%s is derived, so that it has no public key of its own: no CA can have a key of it: delete it in Vault", i.where)
	case what != "":
		return fmt.Errorf("%s: %s, which can't be taken back, so a new version would not be safe in Vault: %s", i.where, what, replace)
	case i.signsFrom(after+1)-i.Latest > maxVersions+1:
		return fmt.Errorf("%s has %d versions, and more than %d beyond %d would have to be skipped: %s", i.where, i.Latest, maxVersions, after, replace)
	}
	return nil
}

// public is the public key of a version that Vault signs with.
func (i *keyInfo) public(version int) (crypto.PublicKey, error) {
	if err := i.imported(); err != nil {
		return nil, err
	}
	alg, err := keystore.ParseAlgorithm(i.Type)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s is of type %s, which signs no certificates: use one of %v", i.where, bounded(i.Type), keystore.Algorithms())
	case i.Derived:
		return nil, fmt.Errorf("%s is derived, so that it has no public key of its own", i.where)
	case version > i.Latest:
		return nil, fmt.Errorf("%w: %s has no version above %d; it was deleted and made anew, or comes from an old backup", keystore.ErrNotFound, i.where, i.Latest)
	case version < i.MinAvailable:
		return nil, fmt.Errorf("%w: the versions of %s below %d were destroyed (trimmed)", keystore.ErrNotFound, i.where, i.MinAvailable)
	case version < i.MinDecryption:
		return nil, fmt.Errorf("%s has min_decryption_version %d, so Vault does not sign with version %d: lower it", i.where, i.MinDecryption, version)
	case version < i.MinEncryption:
		return nil, fmt.Errorf("%s has min_encryption_version %d, so Vault does not sign with version %d: lower it, or set it to 0", i.where, i.MinEncryption, version)
	}
	raw, ok := i.Keys[strconv.Itoa(version)]
	if !ok {
		return nil, fmt.Errorf("the answer about %s lacks version %d", i.where, version)
	}
	var k struct {
		PublicKey string `json:"public_key"`
	}
	if err := json.Unmarshal(raw, &k); err != nil {
		return nil, fmt.Errorf("the answer about %s has no public key for version %d", i.where, version)
	}
	public, err := parsePublic(k.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("the public key of version %d of %s %w", version, i.where, err)
	}
	if got := keystore.AlgorithmOf(public); got != alg {
		return nil, fmt.Errorf("the public key of version %d of %s is %s, but the key is of type %s", version, i.where, cmp.Or(got, "of another kind"), alg)
	}
	return public, nil
}

// maxPublic bounds the text of a public key. That of an RSA-4096 key takes 800 bytes.
const maxPublic = 2048

// parsePublic reads PEM (PKIX), or the 32 bytes of an Ed25519 key in base64, as Vault gives those.
func parsePublic(text string) (crypto.PublicKey, error) {
	if len(text) > maxPublic {
		return nil, fmt.Errorf("is too long, %d bytes", len(text))
	}
	if raw, err := base64.StdEncoding.DecodeString(text); err == nil && len(raw) == ed25519.PublicKeySize {
		return ed25519.PublicKey(raw), nil
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, errors.New("is not in PEM")
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("can't be read: %w", err)
	}
	return public, nil
}
