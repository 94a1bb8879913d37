package transit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/test/lab"
	"github.com/signet-ca/signet/vault"
)

// theVault is the real one of all tests here that need it. Each mounts an engine of its own.
var theVault lab.OneVault

func TestMain(m *testing.M) { goleak.VerifyTestMain(theVault.During(m)) }

func create(t *testing.T, s *Store, name string, alg keystore.Algorithm, after int) keystore.Key {
	t.Helper()
	k, err := s.Create(t.Context(), name, alg, after)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// signs makes a signature; what it returns is verified by then.
func signs(k keystore.Key) error {
	digest := sha256.Sum256([]byte("x"))
	_, err := k.Sign(rand.Reader, digest[:], crypto.SHA256)
	return err
}

// says wants an error of one sentence with all these parts and without the token.
func says(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one about %q", parts)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("%q does not say %q", err, p)
		}
	}
	if strings.Contains(err.Error(), fakeToken) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 1000 {
		t.Errorf("%q shows the token or is not one sentence", err)
	}
}

func TestTheConfigurationIsChecked(t *testing.T) {
	f := newFakeTransit(t)
	client := f.connect(t)
	for _, c := range []struct {
		config Config
		want   string
	}{
		{Config{Vault: client}, "no prefix"},
		{Config{Vault: client, Prefix: "a/b"}, "prefix"},
		{Config{Vault: client, Prefix: "-a"}, "prefix"},
		{Config{Vault: client, Prefix: "a*"}, "prefix"},
		{Config{Vault: client, Prefix: "a-", Mount: "x//y"}, "Transit engine"},
		{Config{Vault: client, Prefix: "a-", Mount: "../x"}, "Transit engine"},
		{Config{Vault: client, Prefix: "a-", Timeout: -1}, "timeout"},
		{Config{Prefix: "a-"}, "no Vault"},
	} {
		if _, err := New(c.config); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.config, err)
		}
	}
	of := func(uses ...Use) string {
		needs, err := Needs(Config{Prefix: "p-", Mount: "/team/transit/"}, uses...)
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, n := range needs {
			all = append(all, strings.TrimPrefix(n.Path, "team/transit/")+" "+n.Capabilities[0])
		}
		return strings.Join(all, ", ")
	}
	for want, uses := range map[string][]Use{
		"keys/p-ca read, keys/p-ca update, sign/p-ca/sha2-256 update":                                                                    {{Name: "ca", Algorithm: keystore.RSA2048, Made: true}},
		"keys/p-a read, sign/p-a/sha2-384 update, keys/p-b read, sign/p-b update":                                                        {{Name: "a", Algorithm: keystore.ECDSAP384}, {Name: "b", Algorithm: keystore.Ed25519}},
		"keys/p-i read, keys/p-i update, keys/p-i/rotate update, keys/p-i/config update, keys/p-i/trim update, sign/p-i/sha2-256 update": {{Name: "i", Algorithm: keystore.ECDSAP256, Made: true, Grows: true, Shrinks: true}},
		"keys/p-i read, keys/p-i/config update, keys/p-i/trim update, sign/p-i/* update":                                                 {{Name: "i", Shrinks: true}},
		"": nil,
	} {
		if got := of(uses...); got != want {
			t.Errorf("%+v need %s\nwant %s", uses, got, want)
		}
	}
	one, err := Needs(Config{Prefix: "p_"}, Use{Name: "root", Made: true})
	if policy := vault.Policy(one); err != nil || !strings.Contains(policy, `"type" = ["ecdsa-p256", "ecdsa-p384", "`) || strings.Contains(policy, "exportable") {
		t.Errorf("%v, %v", policy, err)
	}
	if list := ListNeeds(Config{}); len(list) != 1 || list[0].Path != "transit/keys" {
		t.Errorf("%+v", list)
	}
	if _, err := Needs(Config{}); err == nil {
		t.Error("needs without a prefix")
	}
}

func TestEachAlgorithmIsAskedForInItsOwnWay(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	digest := func(h crypto.Hash) []byte {
		w := h.New()
		w.Write([]byte("x"))
		return w.Sum(nil)
	}
	for _, alg := range []keystore.Algorithm{keystore.ECDSAP256, keystore.ECDSAP384, keystore.RSA2048} {
		k := create(t, s, "k-"+string(alg), alg, 0)
		for _, h := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
			if _, err := k.Sign(rand.Reader, digest(h), h); err != nil {
				t.Errorf("%s with %s: %v", alg, h, err)
			}
		}
		for _, bad := range []crypto.SignerOpts{crypto.SHA1, crypto.Hash(0), crypto.SHA384, nil} {
			if _, err := k.Sign(rand.Reader, digest(crypto.SHA256), bad); err == nil {
				t.Errorf("%s signed 32 bytes as a digest of %v", alg, bad)
			}
		}
	}
	k, err := s.Open(t.Context(), keystore.Ref{Backend: Backend, Name: "k-rsa-2048", Version: 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, salt := range []int{rsa.PSSSaltLengthEqualsHash, 32} {
		sig, err := k.Sign(rand.Reader, digest(crypto.SHA256), &rsa.PSSOptions{SaltLength: salt, Hash: crypto.SHA256})
		if err != nil || rsa.VerifyPSS(k.Public().(*rsa.PublicKey), crypto.SHA256, digest(crypto.SHA256), sig, &rsa.PSSOptions{SaltLength: 32}) != nil {
			t.Errorf("PSS with salt length %d: %v", salt, err)
		}
	}
	if _, err := k.Sign(rand.Reader, digest(crypto.SHA256), &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto, Hash: crypto.SHA256}); err == nil {
		t.Error("PSS with a salt as long as possible")
	}
	log := create(t, s, "log", keystore.Ed25519, 0)
	sig, err := log.Sign(rand.Reader, []byte("a note"), crypto.Hash(0))
	if err != nil || !ed25519.Verify(log.Public().(ed25519.PublicKey), []byte("a note"), sig) {
		t.Errorf("Ed25519: %v", err)
	}
	for _, bad := range []crypto.SignerOpts{crypto.SHA512, &ed25519.Options{Context: "x"}} {
		if _, err := log.Sign(rand.Reader, digest(crypto.SHA512), bad); err == nil {
			t.Errorf("Ed25519 with %+v", bad)
		}
	}
	if _, err := log.Sign(rand.Reader, make([]byte, maxMessage+1), crypto.Hash(0)); err == nil {
		t.Error("a message of any length")
	}
	if !log.Remote() || log.Ref().String() != "vault-transit:log@1" {
		t.Errorf("%s, remote %t", log.Ref(), log.Remote())
	}
}

// TestNoBadSignatureIsReturned has the fake answer in all the ways that a Vault, or who stands in between, might.
func TestNoBadSignatureIsReturned(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	k := create(t, s, "ca", keystore.ECDSAP256, 2)
	if k.Ref().Version != 3 {
		t.Fatal(k.Ref())
	}
	first := func(change func(map[string]any)) func([]map[string]any) []map[string]any {
		return func(r []map[string]any) []map[string]any {
			change(r[0])
			return r
		}
	}
	signature := func(text string) func([]map[string]any) []map[string]any {
		return first(func(r map[string]any) { r["signature"] = text })
	}
	for name, c := range map[string]struct {
		results func([]map[string]any) []map[string]any
		want    string
	}{
		"nothing":           {func([]map[string]any) []map[string]any { return nil }, "0 results for 1"},
		"too many":          {func(r []map[string]any) []map[string]any { return append(r, r...) }, "2 results for 1"},
		"empty item":        {func([]map[string]any) []map[string]any { return []map[string]any{{}} }, "no signature"},
		"null item":         {func([]map[string]any) []map[string]any { return []map[string]any{nil} }, "no signature"},
		"other version":     {first(func(r map[string]any) { r["signature"] = strings.Replace(r["signature"].(string), "v3:", "v2:", 1) }), `version "2" of the key instead of 3`},
		"padded version":    {first(func(r map[string]any) { r["signature"] = strings.Replace(r["signature"].(string), "v3:", "v03:", 1) }), `"03"`},
		"no prefix":         {signature("MEUCIQ=="), "no signature"},
		"other prefix":      {signature("vault:3:MEUCIQ=="), "no signature"},
		"not base64":        {signature("vault:v3:%%%"), "not base64"},
		"url base64":        {signature("vault:v3:_-_-"), "not base64"},
		"loose bits":        {signature("vault:v3:QR=="), "not base64"},
		"newlines":          {signature("vault:v3:Q\nQ=="), "not base64"},
		"empty signature":   {signature("vault:v3:"), "not base64"},
		"too long":          {signature("vault:v3:" + strings.Repeat("A", 2000)), "2009 bytes"},
		"not ASN.1":         {signature("vault:v3:AAAA"), "not by the key that was opened"},
		"a bit flipped":     {first(flip), "not by the key that was opened"},
		"an error":          {first(func(r map[string]any) { r["error"] = "internal error " + strings.Repeat("x", 5000) }), "internal error"},
		"number for a text": {first(func(r map[string]any) { r["signature"] = 7 }), "no signature"},
	} {
		f.set(func() { f.results = c.results })
		err := signs(k)
		if says(t, err, "vault-transit:ca@3", c.want); errors.Is(err, keystore.ErrAway) {
			t.Errorf("%s: %v is said to pass", name, err)
		}
	}
	f.set(func() { f.results = nil })
	if err := signs(k); err != nil {
		t.Error(err)
	}
}

func flip(r map[string]any) {
	head, b64 := r["signature"].(string)[:9], r["signature"].(string)[9:]
	raw, err := base64.StdEncoding.DecodeString(b64)
	if err != nil {
		panic(err)
	}
	raw[len(raw)-1] ^= 1
	r["signature"] = head + base64.StdEncoding.EncodeToString(raw)
}

// TestResultsGoToTheirOwnCallers: results that were mixed up verify for none whose place they took; an error is of one item.
func TestResultsGoToTheirOwnCallers(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	k := create(t, s, "ca", keystore.ECDSAP256, 0).(*Key)
	var inputs [][]byte
	for i := range 5 {
		d := sha256.Sum256([]byte{byte(i)})
		inputs = append(inputs, d[:])
	}
	sc := scheme{hash: crypto.SHA256}
	f.set(func() {
		f.results = func(r []map[string]any) []map[string]any {
			r[1], r[2] = r[2], r[1]
			r[4] = map[string]any{"error": "unable to decode input"}
			return r
		}
	})
	answers, err := k.send(t.Context(), sc, inputs)
	if err != nil {
		t.Fatal(err)
	}
	for i, a := range answers {
		good := a.err == nil && sc.verify(k.public, inputs[i], a.signature)
		if want := i == 0 || i == 3; good != want {
			t.Errorf("item %d: good %t, want %t (%v)", i, good, want, a.err)
		}
	}
	says(t, answers[4].err, "unable to decode input")
}

func TestABrokenKeyIsAClearError(t *testing.T) {
	for name, c := range map[string]struct {
		breaks   func(f *fakeTransit, k *fakeKey)
		notFound bool
		want     string
	}{
		"deleted":              {func(f *fakeTransit, _ *fakeKey) { delete(f.keys, "signet-east-ca") }, true, "there is no transit/keys/signet-east-ca in Vault"},
		"made anew":            {func(_ *fakeTransit, k *fakeKey) { k.versions = nil; k.rotate() }, true, "no version above 1"},
		"trimmed":              {func(_ *fakeTransit, k *fakeKey) { k.rotate(); k.minDec, k.minEnc, k.minAvail = 3, 3, 3 }, true, "below 3 were destroyed"},
		"archived":             {func(_ *fakeTransit, k *fakeKey) { k.rotate(); k.minDec, k.minEnc = 3, 3 }, false, "min_decryption_version 3"},
		"not to sign":          {func(_ *fakeTransit, k *fakeKey) { k.rotate(); k.minEnc = 3 }, false, "min_encryption_version 3"},
		"another key":          {func(_ *fakeTransit, k *fakeKey) { k.versions = nil; k.rotate(); k.rotate() }, false, "not by the key that was opened"},
		"another kind":         {func(_ *fakeTransit, k *fakeKey) { k.kind, k.versions = "rsa-2048", nil; k.rotate(); k.rotate() }, false, "not by the key that was opened"},
		"another that refuses": {func(_ *fakeTransit, k *fakeKey) { k.kind, k.versions = "ed25519", nil; k.rotate(); k.rotate() }, false, "not by the key that was opened"},
		"worn out": {func(_ *fakeTransit, k *fakeKey) {
			k.versions = slices.Repeat(k.versions, maxVersions+1)
			k.minDec, k.minEnc = len(k.versions), len(k.versions)
		}, false, "has too many versions, 1 to 20002"},
		"not mounted": {func(f *fakeTransit, _ *fakeKey) { f.before = notMounted }, false, "no Transit engine is mounted at transit"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakeTransit(t)
			s := f.store(t)
			k := create(t, s, "ca", keystore.ECDSAP256, 1)
			if err := signs(k); err != nil {
				t.Fatal(err)
			}
			f.set(func() { c.breaks(f, f.keys["signet-east-ca"]) })
			err := signs(k)
			says(t, err, "sign with key vault-transit:ca@2: ", c.want)
			if errors.Is(err, keystore.ErrNotFound) != c.notFound || errors.Is(err, keystore.ErrAway) {
				t.Errorf("%v: not found %t, away %t", err, errors.Is(err, keystore.ErrNotFound), errors.Is(err, keystore.ErrAway))
			}
			if strings.HasPrefix(name, "another") {
				return // for Open it is as good a key as any; ca.NewIssuer compares it with the certificate
			}
			_, err = s.Open(t.Context(), k.Ref())
			says(t, err, "open key vault-transit:ca@2: ", c.want)
			if errors.Is(err, keystore.ErrNotFound) != c.notFound || errors.Is(err, keystore.ErrAway) {
				t.Errorf("%v: not found %t, away %t", err, errors.Is(err, keystore.ErrNotFound), errors.Is(err, keystore.ErrAway))
			}
		})
	}
}

func notMounted(w http.ResponseWriter, _ *http.Request) bool {
	refuse(w, http.StatusNotFound, `no handler for route "transit/x". route entry not found.`)
	return true
}

func TestARotatedKeySignsWithItsPinnedVersion(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	k := create(t, s, "ca", keystore.ECDSAP256, 0)
	for range 12 {
		f.set(func() { f.keys["signet-east-ca"].rotate() })
	}
	if err := signs(k); err != nil {
		t.Error(err)
	}
	twelfth, err := s.Open(t.Context(), keystore.Ref{Backend: Backend, Name: "ca", Version: 12})
	if err != nil || samePublic(k.Public(), twelfth.Public()) {
		t.Fatalf("version 12: %v", err)
	}
	if err := signs(twelfth); err != nil {
		t.Error(err)
	}
}

func TestOnlyReferencesToTransitAreOpened(t *testing.T) {
	s := newFakeTransit(t).store(t)
	for _, r := range []keystore.Ref{{}, {Backend: "file", Name: "ca", Version: 1}, {Backend: Backend, Name: "../ca", Version: 1}, {Backend: Backend, Name: "ca"}} {
		if _, err := s.Open(t.Context(), r); err == nil {
			t.Errorf("%v was opened", r)
		}
		if err := s.Delete(t.Context(), r); err == nil {
			t.Errorf("%v was deleted", r)
		}
	}
	for _, name := range []string{"", "../x", "A", "a@1"} {
		if _, err := s.Create(t.Context(), name, keystore.ECDSAP256, 0); err == nil {
			t.Errorf("name %q was taken", name)
		}
	}
	if _, err := s.Create(t.Context(), "ca", "dsa", 0); err == nil || !strings.Contains(err.Error(), "ecdsa-p256") {
		t.Errorf("an unknown algorithm: %v", err)
	}
}

func TestCreateReturnsTheFirstVersionAboveAllThatWereUsed(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	for _, step := range []struct{ after, want, rotations int }{
		{0, 1, 0}, {0, 1, 0}, {1, 2, 1}, {1, 2, 1}, {0, 1, 1}, {9, 10, 9}, {2, 3, 9},
	} {
		if k := create(t, s, "ca", keystore.ECDSAP256, step.after); k.Ref().Version != step.want {
			t.Errorf("after %d: %s, want version %d", step.after, k.Ref(), step.want)
		} else if err := signs(k); err != nil {
			t.Error(err)
		}
		if n := f.count("write transit/keys/signet-east-ca/rotate"); n != step.rotations {
			t.Errorf("after %d: rotated %d times, want %d", step.after, n, step.rotations)
		}
	}
	// What Vault no longer signs with is of no use.
	f.set(func() { f.keys["signet-east-ca"].minEnc, f.keys["signet-east-ca"].minDec = 5, 4 })
	if k := create(t, s, "ca", keystore.ECDSAP256, 1); k.Ref().Version != 5 {
		t.Error(k.Ref())
	}
	if _, err := s.Create(t.Context(), "ca", keystore.ECDSAP256, 1_000_000); err == nil || !strings.Contains(err.Error(), "skipped") {
		t.Errorf("a million versions: %v", err)
	}
	// A Vault that answers to a rotation with nothing.
	f.set(func() { f.keys["signet-east-ca"].withoutBody = true })
	if k := create(t, s, "ca", keystore.ECDSAP256, 10); k.Ref().Version != 11 {
		t.Error(k.Ref())
	}
}

func TestCreateRefusesAKeyThatIsNotAsOurs(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	create(t, s, "ca", keystore.ECDSAP256, 0)
	_, err := s.Create(t.Context(), "ca", keystore.RSA2048, 0)
	says(t, err, "ecdsa-p256", "wanted is rsa-2048", "delete it in Vault if no CA has a key of it", "keystore.intermediates: memory or file")
	f.set(func() { f.keys["signet-east-ca"].exportable = true })
	_, err = s.Create(t.Context(), "ca", keystore.ECDSAP256, 0)
	says(t, err, "exportable", "delete it in Vault if no CA has a key of it", "keystore.intermediates: memory or file")
	f.set(func() { f.keys["signet-east-ca"].exportable, f.keys["signet-east-ca"].backup = false, true })
	_, err = s.Create(t.Context(), "ca", keystore.ECDSAP256, 0)
	says(t, err, "plaintext backup")
	// Whoever imported it has had its private half: a version of it is not even opened.
	f.set(func() { f.keys["signet-east-ca"].backup, f.keys["signet-east-ca"].imported = false, true })
	_, err = s.Create(t.Context(), "ca", keystore.ECDSAP256, 0)
	says(t, err, "transit/keys/signet-east-ca was imported", "private key in hand", "keystore.intermediates: memory or file")
	_, err = s.Open(t.Context(), keystore.Ref{Backend: Backend, Name: "ca", Version: 1})
	says(t, err, "transit/keys/signet-east-ca was imported", "taint")
	if n := f.count("write transit/keys/signet-east-ca/rotate"); n != 0 {
		t.Errorf("rotated %d times", n)
	}
}

func TestALookFindsWhatWouldNotSign(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	k := create(t, s, "ca", keystore.ECDSAP256, 0)
	look := func() error { return k.(interface{ Look(context.Context) error }).Look(t.Context()) }
	key := func() *fakeKey { return f.keys["signet-east-ca"] }
	good := *key()
	for name, try := range map[string]struct {
		breaks func()
		says   string
	}{
		"well":         {func() {}, ""},
		"rotated":      {func() { key().rotate() }, ""},
		"exportable":   {func() { key().exportable = true }, ""}, // it signs
		"gone":         {func() { delete(f.keys, "signet-east-ca") }, "there is no transit/keys/signet-east-ca"},
		"made anew":    {func() { key().versions = nil; key().rotate() }, "not by the key that was opened"},
		"imported":     {func() { key().imported = true }, "was imported"},
		"down":         {func() { key().rotate(); key().minEnc = 2 }, "min_encryption_version 2"},
		"trimmed":      {func() { key().rotate(); key().minAvail = 2 }, "destroyed"},
		"another kind": {func() { key().kind = "rsa-2048" }, "of type rsa-2048"},
	} {
		f.set(try.breaks)
		switch err := look(); {
		case try.says == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case try.says != "":
			says(t, err, try.says)
			if errors.Is(err, keystore.ErrAway) {
				t.Errorf("%s is taken to pass by itself: %v", name, err)
			}
		}
		f.set(func() { again := good; f.keys["signet-east-ca"] = &again })
	}
	for name, status := range map[string]int{"denied": 403, "sealed": 503, "strange": 400} {
		f.set(func() {
			f.before = func(w http.ResponseWriter, _ *http.Request) bool { refuse(w, status, "no"); return true }
		})
		if err := look(); !errors.Is(err, keystore.ErrAway) {
			t.Errorf("%s: it is said of the key, which may be well: %v", name, err)
		}
		f.set(func() { f.before = nil })
	}
	if n := f.count("write transit/sign/signet-east-ca/sha2-256"); n != 0 {
		t.Errorf("%d signatures were asked for", n)
	}
}

// TestALookFindsOutThatSignaturesComeAgain where nobody asks for one: and none is made to find out.
func TestALookFindsOutThatSignaturesComeAgain(t *testing.T) {
	f := newFakeTransit(t)
	now := time.Now()
	var mu sync.Mutex
	f.now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	s := f.store(t)
	k := create(t, s, "ca", keystore.ECDSAP256, 0)
	look := func() error { return k.(interface{ Look(context.Context) error }).Look(t.Context()) }
	pass := func(d time.Duration) { mu.Lock(); defer mu.Unlock(); now = now.Add(d) }
	f.set(func() {
		f.before = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/sign/") {
				return false
			}
			refuse(w, http.StatusServiceUnavailable, "request path: overloaded")
			return true
		}
	})
	for range 5 {
		_ = signs(k)
	}
	asked := f.count("write transit/sign/signet-east-ca/sha2-256")
	if err := look(); !errors.Is(err, keystore.ErrAway) || f.count("write transit/sign/signet-east-ca/sha2-256") != asked {
		t.Errorf("those who ask for signatures are not the ones to find out: %v", err)
	}
	pass(probeAfter)
	if err := look(); !errors.Is(err, keystore.ErrAway) || f.count("write transit/sign/signet-east-ca/sha2-256") != asked+1 {
		t.Errorf("it was not tried: %v", err)
	}
	f.set(func() { f.before = nil })
	pass(probeAfter)
	if err := look(); err != nil {
		t.Error(err)
	}
	if err := keystore.Ready(k); err != nil {
		t.Errorf("not ready after signatures come again: %v", err)
	}
}

func TestAKeyThatCanLeaveVaultIsOpenedWithAWarning(t *testing.T) {
	f := newFakeTransit(t)
	var log bytes.Buffer
	s := f.store(t, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	k := create(t, s, "ca", keystore.ECDSAP256, 0)
	open := func() string {
		log.Reset()
		again, err := s.Open(t.Context(), k.Ref())
		if err != nil {
			t.Fatal(err)
		}
		if err := signs(again); err != nil {
			t.Error(err)
		}
		return log.String()
	}
	if l := open(); l != "" {
		t.Errorf("a good key: %s", l)
	}
	f.set(func() { f.keys["signet-east-ca"].exportable = true })
	if l := open(); !strings.Contains(l, "level=WARN") || !strings.Contains(l, "exportable") || !strings.Contains(l, "transit/keys/signet-east-ca") {
		t.Errorf("an exportable key: %s", l)
	}
	f.set(func() { f.keys["signet-east-ca"].exportable, f.keys["signet-east-ca"].autoRotate = false, 3600 })
	if l := open(); !strings.Contains(l, "auto_rotate_period") {
		t.Errorf("a key that rotates by itself: %s", l)
	}
}

// A key may be made exportable while it is at work.
func TestALookFindsAKeyThatCanLeaveVault(t *testing.T) {
	for name, opens := range map[string]func(*fakeKey){
		"exportable":       func(k *fakeKey) { k.exportable = true },
		"plaintext backup": func(k *fakeKey) { k.backup = true },
	} {
		f := newFakeTransit(t)
		var log bytes.Buffer
		s := f.store(t, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
		k := create(t, s, "ca", keystore.ECDSAP256, 0).(*Key)
		look := func() string {
			t.Helper()
			if err := k.Look(t.Context()); err != nil {
				t.Errorf("%s: it is said not to sign: %v", name, err)
			}
			return k.Exposed()
		}
		if said := look(); said != "" || log.Len() > 0 {
			t.Errorf("of a good key: %s, %s", said, log.String())
		}
		f.set(func() { opens(f.keys["signet-east-ca"]) })
		for range 3 {
			says(t, errors.New(look()), "transit/keys/signet-east-ca: the key ", name, "requests to transit/export and transit/backup of it")
		}
		if n := strings.Count(log.String(), "can be taken out of Vault"); n != 1 {
			t.Errorf("%s: the log is told %d times: %s", name, n, log.String())
		}
		again, err := s.Open(t.Context(), k.Ref())
		if err != nil || again.(*Key).Exposed() != k.Exposed() {
			t.Errorf("%s: opened again: %v", name, err)
		}
		// A copy that was taken is not given back.
		f.set(func() { f.keys["signet-east-ca"].exportable, f.keys["signet-east-ca"].backup = false, false })
		if look() == "" {
			t.Errorf("%s: forgotten", name)
		}
	}
}

// TestTriesThatFailMakeOneVersion: what fails after the version is made is tried again for hours.
func TestTriesThatFailMakeOneVersion(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	create(t, s, "ca", keystore.ECDSAP256, 0)
	f.set(func() {
		f.before = func(_ http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "/rotate") {
				f.keys["signet-east-ca"].rotate()
				panic(http.ErrAbortHandler) // done, and the connection is cut
			}
			return false
		}
	})
	_, err := s.Create(t.Context(), "ca", keystore.ECDSAP256, 1)
	if !errors.Is(err, vault.ErrAway) || !errors.Is(err, keystore.ErrAway) {
		t.Errorf("a lost answer: %v", err)
	}
	f.set(func() { f.before = nil })
	for range 10 {
		k := create(t, s, "ca", keystore.ECDSAP256, 1)
		if err := signs(k); err != nil || k.Ref().Version != 2 {
			t.Errorf("%s: %v", k.Ref(), err)
		}
	}
	if refs, err := s.List(t.Context()); err != nil || len(refs) != 2 {
		t.Errorf("%v, %v", refs, err)
	}
}

func TestAKeyOfThousandsOfVersionsSaysWhatToDo(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	k := create(t, s, "ca", keystore.ECDSAP256, 0)
	f.set(func() { f.keys["signet-east-ca"].versions = slices.Repeat(f.keys["signet-east-ca"].versions, 2000) })
	if _, err := s.Open(t.Context(), k.Ref()); err != nil {
		t.Errorf("2000 versions: %v", err)
	}
	f.set(func() { f.keys["signet-east-ca"].versions = slices.Repeat(f.keys["signet-east-ca"].versions, 4) })
	_, err := s.Open(t.Context(), k.Ref())
	says(t, err, "too many versions", "over 1 MiB", "vault write transit/keys/signet-east-ca/config min_decryption_version")
	if errors.Is(err, keystore.ErrNotFound) || errors.Is(err, keystore.ErrAway) {
		t.Errorf("it is there: %v", err)
	}
	f.set(func() { f.keys["signet-east-ca"].minDec = 7999 })
	if _, err := s.Open(t.Context(), keystore.Ref{Backend: Backend, Name: "ca", Version: 8000}); err != nil {
		t.Errorf("after the remedy: %v", err)
	}
}

func TestARefusalIsRememberedForAWhile(t *testing.T) {
	f := newFakeTransit(t)
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	s := f.store(t, func(c *Config) { c.Now = func() time.Time { return now } })
	for name, breaks := range map[string]func(w http.ResponseWriter) bool{
		"denied":  func(w http.ResponseWriter) bool { refuse(w, http.StatusForbidden, "permission denied"); return true },
		"refused": func(w http.ResponseWriter) bool { refuse(w, http.StatusBadRequest, "no"); return true },
		"another key": func(http.ResponseWriter) bool {
			f.keys["signet-east-ca"].versions = nil
			f.keys["signet-east-ca"].rotate()
			return false
		},
		"gone": func(http.ResponseWriter) bool { delete(f.keys, "signet-east-ca"); return false },
	} {
		k := create(t, s, "ca", keystore.ECDSAP256, 0)
		f.set(func() {
			f.before = func(w http.ResponseWriter, r *http.Request) bool {
				return strings.Contains(r.URL.Path, "/sign/") && breaks(w)
			}
		})
		if err := keystore.Ready(k); err != nil {
			t.Errorf("%s: not ready before anything was refused: %v", name, err)
		}
		refused := signs(k)
		ready := keystore.Ready(k)
		if refused == nil || ready == nil || errors.Is(ready, keystore.ErrAway) || !strings.Contains(refused.Error(), ready.Error()) {
			t.Errorf("%s: Sign says %v, and Ready %v", name, refused, ready)
		}
		now = now.Add(refusalHolds)
		if err := keystore.Ready(k); err != nil {
			t.Errorf("%s: it is never tried again: %v", name, err)
		}
		_ = signs(k)
		f.set(func() { f.before = nil })
		if name == "denied" || name == "refused" {
			if err := signs(k); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if err := keystore.Ready(k); err != nil {
				t.Errorf("%s: not ready after a signature: %v", name, err)
			}
		}
		// What a caller asks wrongly says nothing of the key.
		other := create(t, s, "other", keystore.ECDSAP256, 0)
		if _, err := other.Sign(nil, []byte("x"), crypto.SHA256); err == nil || keystore.Ready(other) != nil {
			t.Errorf("%s: %v, %v", name, err, keystore.Ready(other))
		}
	}
}

func TestClientsThatMakeTheKeyAtOnceMakeOne(t *testing.T) {
	f := newFakeTransit(t)
	const clients = 8
	// None makes the key before all have seen that there is none.
	var looked sync.WaitGroup
	looked.Add(clients)
	f.before = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && f.keys["signet-east-ca"] == nil {
			f.mu.Unlock()
			defer f.mu.Lock()
			looked.Done()
			looked.Wait()
		}
		return false
	}
	var all sync.WaitGroup
	for range clients {
		s := f.store(t)
		all.Go(func() {
			if k, err := s.Create(t.Context(), "ca", keystore.ECDSAP256, 0); err != nil || k.Ref().Version != 1 {
				t.Errorf("%v, %v", k, err)
			}
		})
	}
	all.Wait()
	if n := len(f.keys["signet-east-ca"].versions); n != 1 {
		t.Errorf("%d versions", n)
	}
}

func TestListShowsOurKeysOnly(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	if refs, err := s.List(t.Context()); err != nil || len(refs) != 0 {
		t.Errorf("an empty engine: %v, %v", refs, err)
	}
	create(t, s, "root", keystore.ECDSAP256, 0)
	create(t, s, "ca", keystore.ECDSAP256, 2)
	f.set(func() {
		for _, n := range []string{"signet-west-ca", "ca", "signet-east-", "signet-east-Upper", "signet-east-a.b"} {
			k := &fakeKey{kind: "ecdsa-p256"}
			k.rotate()
			f.keys[n] = k
		}
		other := &fakeKey{kind: "aes256-gcm96"}
		other.rotate()
		f.keys["signet-east-data"] = other
		f.keys["signet-east-ca"].minAvail = 2
	})
	refs, err := s.List(t.Context())
	if err != nil || fmt.Sprint(refs) != "[vault-transit:ca@2 vault-transit:ca@3 vault-transit:root@1]" {
		t.Errorf("%v, %v", refs, err)
	}
	if ours, foreign := f.count("read transit/keys/signet-east-ca"), f.count("read transit/keys/signet-west-ca"); ours == 0 || foreign != 0 {
		t.Errorf("our key was read %d times, a foreign one %d times", ours, foreign)
	}
	_, err = s.Open(t.Context(), keystore.Ref{Backend: Backend, Name: "data", Version: 1})
	says(t, err, "aes256-gcm96", "signs no certificates")
}

func TestVersionsAreDestroyedFromTheOldestOn(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	create(t, s, "ca", keystore.ECDSAP256, 2)
	ref := func(v int) keystore.Ref { return keystore.Ref{Backend: Backend, Name: "ca", Version: v} }
	for v, want := range map[int]string{2: "still has version 1", 3: "still has version 1"} {
		if err := s.Delete(t.Context(), ref(v)); !errors.Is(err, keystore.ErrKept) || !strings.Contains(err.Error(), want) {
			t.Errorf("version %d: %v", v, err)
		}
	}
	for range 2 { // again is no error
		if err := s.Delete(t.Context(), ref(1)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Open(t.Context(), ref(1)); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("a destroyed version: %v", err)
	}
	// Cut off between the two steps: the version is listed, and destroyed by the next try.
	f.set(func() {
		f.before = func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "/trim") {
				refuse(w, http.StatusServiceUnavailable, "Vault is sealed")
				return true
			}
			return false
		}
	})
	if err := s.Delete(t.Context(), ref(2)); !errors.Is(err, keystore.ErrAway) {
		t.Errorf("a sealed Vault: %v", err)
	}
	f.set(func() { f.before = nil })
	if refs, err := s.List(t.Context()); err != nil || len(refs) != 2 || refs[0] != ref(2) {
		t.Errorf("%v, %v", refs, err)
	}
	if err := s.Delete(t.Context(), ref(2)); err != nil {
		t.Error(err)
	}
	k, err := s.Open(t.Context(), ref(3))
	if err != nil {
		t.Fatal(err)
	}
	if err := signs(k); err != nil {
		t.Error(err)
	}
	if err := s.Delete(t.Context(), ref(3)); !errors.Is(err, keystore.ErrKept) || !strings.Contains(err.Error(), "newest") {
		t.Errorf("the newest: %v", err)
	}
	for _, gone := range []keystore.Ref{ref(9), {Backend: Backend, Name: "none", Version: 1}} {
		if err := s.Delete(t.Context(), gone); err != nil {
			t.Errorf("%s: %v", gone, err)
		}
	}
}

func TestAMissingPermissionIsNamed(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	k := create(t, s, "ca", keystore.ECDSAP256, 1)
	ref1 := keystore.Ref{Backend: Backend, Name: "ca", Version: 1}
	for _, c := range []struct {
		denied, path, capability, parameters string
		do                                   func() error
	}{
		{"/sign/", "transit/sign/signet-east-ca/sha2-256", "update", "", func() error { return signs(k) }},
		{"/keys/signet-east-ca", "transit/keys/signet-east-ca", "read", "", func() error { _, err := s.Open(t.Context(), k.Ref()); return err }},
		{"/keys", "transit/keys", "list", "", func() error { _, err := s.List(t.Context()); return err }},
		{"/keys/signet-east-new", "transit/keys/signet-east-new", "update", "type=ecdsa-p256 pass", func() error {
			_, err := s.Create(t.Context(), "new", keystore.ECDSAP256, 0)
			return err
		}},
		{"/rotate", "transit/keys/signet-east-ca/rotate", "update", "", func() error {
			_, err := s.Create(t.Context(), "ca", keystore.ECDSAP256, 2)
			return err
		}},
		{"/config", "transit/keys/signet-east-ca/config", "update", "min_decryption_version=2 and min_encryption_version=2 pass", func() error { return s.Delete(t.Context(), ref1) }},
		{"/trim", "transit/keys/signet-east-ca/trim", "update", "min_available_version=2 pass", func() error { return s.Delete(t.Context(), ref1) }},
	} {
		f.set(func() {
			f.before = func(w http.ResponseWriter, r *http.Request) bool {
				post := r.Method != http.MethodGet
				if !strings.Contains(r.URL.Path, c.denied) || post != (c.capability == "update") {
					return false
				}
				refuse(w, http.StatusForbidden, "1 error occurred:\n\t* permission denied\n\n")
				return true
			}
		})
		err := c.do()
		says(t, err, fmt.Sprintf("the capability %q on the path %s", c.capability, c.path), c.parameters)
		if c.parameters == "" && strings.Contains(err.Error(), "allowed_parameters") {
			t.Errorf("%s has no bounded parameters, and the error speaks of some: %v", c.path, err)
		}
		if !errors.Is(err, vault.ErrDenied) {
			t.Errorf("%v is not ErrDenied", err)
		}
	}
}

func TestLookingForAKeyMakesNoneAndAsksWhetherItMayBeMade(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	var denied string
	f.set(func() {
		f.before = func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/v1/sys/capabilities-self" {
				return false
			}
			var asked struct{ Paths []string }
			_ = json.NewDecoder(r.Body).Decode(&asked)
			data := map[string]any{}
			for _, p := range asked.Paths {
				if data[p] = []string{"update"}; p == denied {
					data[p] = []string{"read"}
				}
			}
			reply(w, data)
			return true
		}
	})
	find := func(alg keystore.Algorithm, after, version int, there bool) {
		t.Helper()
		ref, is, err := s.Find(t.Context(), "ca", alg, after)
		if want := (keystore.Ref{Backend: Backend, Name: "ca", Version: version}); err != nil || ref != want || is != there {
			t.Errorf("found %v (there: %v), want %v (%v): %v", ref, is, want, there, err)
		}
	}
	find(keystore.ECDSAP256, 0, 1, false)
	f.set(func() { denied = "transit/keys/signet-east-ca" })
	_, _, err := s.Find(t.Context(), "ca", keystore.ECDSAP256, 0)
	if says(t, err, `the capability "update" on the path transit/keys/signet-east-ca`, "type=ecdsa-p256 pass"); !errors.Is(err, vault.ErrDenied) {
		t.Error(err)
	}
	f.set(func() {
		if len(f.keys) != 0 {
			t.Errorf("made were %v", f.keys)
		}
	})

	create(t, s, "ca", keystore.ECDSAP256, 0)
	find(keystore.ECDSAP256, 0, 1, true) // what is there, nobody needs to be allowed to make
	find(keystore.ECDSAP256, 1, 2, false)
	f.set(func() { denied = "transit/keys/signet-east-ca/rotate" })
	_, _, err = s.Find(t.Context(), "ca", keystore.ECDSAP256, 1)
	says(t, err, "transit/keys/signet-east-ca/rotate")
	_, _, err = s.Find(t.Context(), "ca", keystore.ECDSAP384, 0)
	says(t, err, "ecdsa-p256", "wanted is ecdsa-p384")
	f.set(func() {
		if n := len(f.keys["signet-east-ca"].versions); n != 1 {
			t.Errorf("%d versions, want the one that was made", n)
		}
	})
}

func TestAVaultThatIsAwayIsSaidSoInTime(t *testing.T) {
	f := newFakeTransit(t)
	f.timeout = time.Second
	s := f.store(t)
	k := create(t, s, "ca", keystore.ECDSAP256, 0)
	check := func(name string, limit time.Duration) {
		t.Helper()
		var all sync.WaitGroup
		for what, do := range map[string]func() error{
			"sign": func() error { return signs(k) },
			"open": func() error { _, err := s.Open(t.Context(), k.Ref()); return err },
			"list": func() error { _, err := s.List(t.Context()); return err },
			"create": func() error {
				_, err := s.Create(t.Context(), "ca", keystore.ECDSAP256, 0)
				return err
			},
		} {
			all.Go(func() {
				start := time.Now()
				err := do()
				if !errors.Is(err, vault.ErrAway) || !errors.Is(err, keystore.ErrAway) || time.Since(start) > limit {
					t.Errorf("%s, %s: %v after %s", name, what, err, time.Since(start))
				}
				says(t, err)
			})
		}
		all.Wait()
	}
	if err := keystore.Ready(k); err != nil {
		t.Errorf("a key whose Vault answers: %v", err)
	}
	f.set(func() {
		f.before = func(w http.ResponseWriter, _ *http.Request) bool {
			refuse(w, http.StatusServiceUnavailable, "Vault is sealed")
			return true
		}
	})
	check("sealed", 4*time.Second)
	check("sealed for longer", 4*time.Second)
	for range 3 {
		_ = signs(k)
	}
	if err := keystore.Ready(k); !errors.Is(err, keystore.ErrAway) || !errors.Is(err, vault.ErrAway) {
		t.Errorf("a key that would not even be asked: %v", err)
	}
	if n := testutil.ToFloat64(s.metrics.signatures.WithLabelValues(resultAway)); n < 1 {
		t.Errorf("the metric counts %g signatures that found Vault away", n)
	}

	// Another connection to one that hangs, whose calls are bound by the signature's time.
	hang := make(chan struct{})
	g := newFakeTransit(t)
	g.timeout = f.timeout
	s = g.store(t)
	k = create(t, s, "ca", keystore.ECDSAP256, 0)
	g.set(func() {
		g.before = func(_ http.ResponseWriter, r *http.Request) bool {
			g.mu.Unlock()
			defer g.mu.Lock()
			select {
			case <-hang:
			case <-r.Context().Done():
			}
			return false
		}
	})
	check("hung", 4*time.Second)
	close(hang)
}

// TestCallersWhoseTurnDoesNotComeAreToldThatVaultIsAway: more than fit into the batches that hang.
func TestCallersWhoseTurnDoesNotComeAreToldThatVaultIsAway(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t, func(c *Config) { c.Timeout = 500 * time.Millisecond })
	k := create(t, s, "ca", keystore.ECDSAP256, 0)
	hang := make(chan struct{})
	f.before = func(http.ResponseWriter, *http.Request) bool {
		f.mu.Unlock()
		defer f.mu.Lock()
		<-hang
		return true
	}
	start := time.Now()
	var all sync.WaitGroup
	for range 2 * mostInBatch * mostFlying {
		all.Go(func() {
			if err := signs(k); !errors.Is(err, keystore.ErrAway) || !errors.Is(err, vault.ErrAway) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	close(hang)
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
}

func TestNothingShowsTheToken(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	k := create(t, s, "ca", keystore.ECDSAP256, 0)
	var out bytes.Buffer
	for _, v := range []any{s, *s, k} {
		fmt.Fprintf(&out, "%v %+v %#v %s\n", v, v, v, v)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "v", v)
		if b, err := json.Marshal(v); err == nil {
			out.Write(b)
		}
	}
	if strings.Contains(out.String(), "hvs.") {
		t.Error(out.String())
	}
	if !strings.Contains(out.String(), "keys in Vault under transit/keys/signet-east-*") {
		t.Error(out.String())
	}
}

func TestMetricsAreThereFromTheStart(t *testing.T) {
	r := prometheus.NewRegistry()
	f := newFakeTransit(t)
	s := f.store(t, func(c *Config) { c.Metrics = r })
	want := `# HELP signet_keystore_transit_signatures_total Signatures asked of keys in Vault's Transit engine, by what came of them.
# TYPE signet_keystore_transit_signatures_total counter
signet_keystore_transit_signatures_total{result="away"} 0
signet_keystore_transit_signatures_total{result="ok"} %d
signet_keystore_transit_signatures_total{result="refused"} 0
signet_keystore_transit_signatures_total{result="wrong"} %d
`
	compare := func(ok, wrong int) {
		t.Helper()
		if err := testutil.GatherAndCompare(r, strings.NewReader(fmt.Sprintf(want, ok, wrong)), "signet_keystore_transit_signatures_total"); err != nil {
			t.Error(err)
		}
	}
	compare(0, 0)
	k := create(t, s, "ca", keystore.ECDSAP256, 0)
	if err := signs(k); err != nil {
		t.Error(err)
	}
	f.set(func() {
		f.results = func(r []map[string]any) []map[string]any { flip(r[0]); return r }
	})
	_ = signs(k)
	compare(1, 1)
	if n := testutil.CollectAndCount(s.metrics.batch); n != 1 {
		t.Errorf("%d series of batch sizes", n)
	}
	if _, err := New(Config{Vault: f.connect(t), Prefix: "x-", Metrics: r}); err == nil {
		t.Error("the same metrics were registered twice")
	}
}

func FuzzParseSignature(f *testing.F) {
	f.Add("vault:v1:MEUCIQ==", 1)
	f.Add("vault:v12:MEUCIQ==", 12)
	f.Add("vault:v012:MEUCIQ==", 12)
	f.Add("vault:v+1:MEUCIQ==", 1)
	f.Add("vault:v1:", 1)
	f.Fuzz(func(t *testing.T, text string, version int) {
		sig, err := parseSignature(text, version)
		if err == nil && text != fmt.Sprintf("vault:v%d:%s", version, base64.StdEncoding.EncodeToString(sig)) {
			t.Fatalf("%q was read as version %d", text, version)
		}
		if err != nil && len(err.Error()) > 1000 {
			t.Fatalf("an error of %d bytes", len(err.Error()))
		}
	})
}

// FuzzKeyInfo: whatever is said of a key, what is opened is of the kind that was said, or it is an error.
func FuzzKeyInfo(f *testing.F) {
	k := &fakeKey{kind: "ecdsa-p256"}
	k.rotate()
	good, err := json.Marshal(k.describe("signet-east-ca"))
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{
		string(good), strings.Replace(string(good), "ecdsa-p256", "ecdsa-p384", 1), strings.Replace(string(good), "ecdsa-p256", "ed25519", 1), `{}`, `{"type":"ecdsa-p256","latest_version":1,"keys":{"1":1700000000}}`,
		`{"type":"ed25519","latest_version":1,"keys":{"1":{"public_key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}}`,
		`{"type":"rsa-2048","latest_version":1,"keys":{"1":{"public_key":"x"}}}`, `{"type":"ecdsa-p256","latest_version":99999999}`,
		`{"type":"ecdsa-p256","latest_version":-1}`, `{"latest_version":"x"}`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var data map[string]any
		if json.Unmarshal([]byte(text), &data) != nil {
			return
		}
		s := &Store{mount: "transit", prefix: "signet-east-"}
		info, err := s.parse("ca", data)
		if err != nil {
			return
		}
		if pub, err := info.public(1); err == nil && string(keystore.AlgorithmOf(pub)) != info.Type {
			t.Fatalf("%s opened as %s", info.Type, keystore.AlgorithmOf(pub))
		}
		_ = info.mayGrow(keystore.ECDSAP256, 0)
	})
}

// What a proxy that mixes answers up says of a key is of another.
func TestAnAnswerAboutAnotherKeySaysNothingOfThisOne(t *testing.T) {
	f := newFakeTransit(t)
	s := f.store(t)
	ctx := t.Context()
	for _, name := range []string{"control-ca", "intermediate"} {
		if _, err := s.Create(ctx, name, keystore.ECDSAP256, 0); err != nil {
			t.Fatal(err)
		}
	}
	ref := keystore.Ref{Backend: Backend, Name: "control-ca", Version: 1}
	key, err := s.Open(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	for what, answer := range map[string]func(w http.ResponseWriter){
		"another key": func(w http.ResponseWriter) {
			reply(w, f.keys["signet-east-intermediate"].describe("signet-east-intermediate"))
		},
		"nothing":     func(w http.ResponseWriter) { reply(w, nil) },
		"empty":       func(w http.ResponseWriter) { w.WriteHeader(http.StatusNoContent) },
		"wrong types": func(w http.ResponseWriter) { reply(w, map[string]any{"type": 5}) },
	} {
		f.set(func() {
			f.before = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, "/keys/signet-east-control-ca") {
					return false
				}
				answer(w)
				return true
			}
		})
		_, opened := s.Open(ctx, ref)
		for of, err := range map[string]error{"opened": opened, "looked at": key.(*Key).Look(ctx)} {
			if !errors.Is(err, keystore.ErrAway) {
				t.Errorf("%s, %s: %v", what, of, err)
			}
		}
	}
}
