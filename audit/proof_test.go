package audit

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/transparency-dev/formats/log"
	tlog "github.com/transparency-dev/formats/proof"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/note"
)

// Nothing of this package is used here but the folder and the verifier key.
func TestALogIsVerifiedByTheClientLibrariesAlone(t *testing.T) {
	dir, vkey := finished(t, 290, 21, 300)
	v, err := note.NewVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	files := client.FileFetcher{Root: dir}
	cp, _, _, err := client.FetchCheckpoint(t.Context(), files.ReadCheckpoint, v, testOrigin)
	if err != nil {
		t.Fatal(err)
	}
	if cp.Size != 611 {
		t.Fatalf("size %d", cp.Size)
	}
	pb, err := client.NewProofBuilder(t.Context(), cp.Size, files.ReadTile)
	if err != nil {
		t.Fatal(err)
	}
	for i := range cp.Size {
		bundle, err := client.GetEntryBundle(t.Context(), files.ReadEntryBundle, i/256, cp.Size)
		if err != nil {
			t.Fatal(err)
		}
		hashes, err := pb.InclusionProof(t.Context(), i)
		if err != nil {
			t.Fatal(err)
		}
		leaf := rfc6962.DefaultHasher.HashLeaf(bundle.Entries[i%256])
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, i, cp.Size, leaf, hashes, cp.Hash); err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
	}
	hashBundle := func(raw []byte) ([][]byte, error) {
		var b api.EntryBundle
		if err := b.UnmarshalText(raw); err != nil {
			return nil, err
		}
		var hashes [][]byte
		for _, e := range b.Entries {
			hashes = append(hashes, rfc6962.DefaultHasher.HashLeaf(e))
		}
		return hashes, nil
	}
	if err := fsck.New(testOrigin, v, files, hashBundle, fsck.Opts{N: 2}).Check(t.Context()); err != nil {
		t.Errorf("fsck: %v", err)
	}
}

// A proof as text, checked with nothing of this package.
func TestAProofIsVerifiedByTheClientLibrariesAlone(t *testing.T) {
	dir, vkey := finished(t, 290)
	r := reader(t, dir, vkey)
	for _, i := range []uint64{0, 1, 255, 256, 289} {
		p, err := r.Prove(t.Context(), i)
		if err != nil {
			t.Fatal(err)
		}
		text, err := p.MarshalText()
		if err != nil {
			t.Fatal(err)
		}

		var parsed tlog.TLogProof
		if err := parsed.Unmarshal(text); err != nil {
			t.Fatal(err)
		}
		v, err := note.NewVerifier(vkey)
		if err != nil {
			t.Fatal(err)
		}
		cp, _, _, err := log.ParseCheckpoint(parsed.Checkpoint, testOrigin, v)
		if err != nil {
			t.Fatal(err)
		}
		var hashes [][]byte
		for _, h := range parsed.Hashes {
			hashes = append(hashes, h[:])
		}
		want, err := marshal(event(int(i)))
		if err != nil {
			t.Fatal(err)
		}
		if parsed.Index != i || !bytes.Equal(parsed.ExtraData, want) {
			t.Errorf("index %d, entry %x", parsed.Index, parsed.ExtraData)
		}
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, parsed.Index, cp.Size, rfc6962.DefaultHasher.HashLeaf(want), hashes, cp.Hash); err != nil {
			t.Error(err)
		}
	}
}

func TestAProofOfSomethingElseIsRefused(t *testing.T) {
	dir, vkey := finished(t, 70)
	otherDir, otherKey := finished(t, 70) // the same entries in another log
	grownDir := duplicate(t, dir)

	r := reader(t, dir, vkey)
	prove := func(r *Reader, i uint64) Proof {
		p, err := r.Prove(t.Context(), i)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	good, next, other := prove(r, 33), prove(r, 34), prove(reader(t, otherDir, otherKey), 33)
	if err := VerifyProof(good, good.Entry, vkey); err != nil {
		t.Fatal(err)
	}
	entry := good.Entry
	older := func() Checkpoint { // of the same log: what it showed when it had 40 entries
		dir := filepath.Join(t.TempDir(), "log")
		key := testKey(t)
		c := testConfig(dir, key)
		l := open(t, c)
		add(t, l, events(0, 40)...)
		first := awaitSize(t, l, 40)
		add(t, l, events(40, 30)...)
		awaitSize(t, l, 70)
		p := prove(reader(t, dir, ""), 33)
		if err := VerifyProof(p, entry, l.VerifierKey()); err != nil {
			t.Fatal(err)
		}
		p.Checkpoint = first.Note
		if err := VerifyProof(p, entry, l.VerifierKey()); !errors.Is(err, ErrBadProof) {
			t.Errorf("under an older checkpoint of the same log: %v", err)
		}
		return first
	}()
	for name, tc := range map[string]struct {
		proof Proof
		entry []byte
		key   string
	}{
		"another entry":              {good, next.Entry, vkey},
		"an entry one byte longer":   {good, append(bytes.Clone(entry), 0), vkey},
		"no entry":                   {good, nil, vkey},
		"the leaf hash as entry":     {good, LeafHash(entry), vkey},
		"another index":              {Proof{Index: 34, Hashes: good.Hashes, Checkpoint: good.Checkpoint}, entry, vkey},
		"an index beyond the size":   {Proof{Index: 33 + 128, Hashes: good.Hashes, Checkpoint: good.Checkpoint}, entry, vkey},
		"another entry's hashes":     {Proof{Index: 33, Hashes: next.Hashes, Checkpoint: good.Checkpoint}, entry, vkey},
		"a hash too few":             {Proof{Index: 33, Hashes: good.Hashes[1:], Checkpoint: good.Checkpoint}, entry, vkey},
		"a hash too many":            {Proof{Index: 33, Hashes: append(good.Hashes[:len(good.Hashes):len(good.Hashes)], good.Hashes[0]), Checkpoint: good.Checkpoint}, entry, vkey},
		"no hashes":                  {Proof{Index: 33, Checkpoint: good.Checkpoint}, entry, vkey},
		"a short hash":               {Proof{Index: 33, Hashes: append([][]byte{good.Hashes[0][:31]}, good.Hashes[1:]...), Checkpoint: good.Checkpoint}, entry, vkey},
		"another log's":              {other, entry, vkey},
		"another log's checkpoint":   {Proof{Index: 33, Hashes: good.Hashes, Checkpoint: other.Checkpoint}, entry, vkey},
		"an older checkpoint's":      {Proof{Index: 33, Hashes: good.Hashes, Checkpoint: older.Note}, entry, vkey},
		"another size in its text":   {Proof{Index: 33, Hashes: good.Hashes, Checkpoint: bytes.Replace(good.Checkpoint, []byte("\n70\n"), []byte("\n71\n"), 1)}, entry, vkey},
		"another origin in its text": {Proof{Index: 33, Hashes: good.Hashes, Checkpoint: bytes.Replace(good.Checkpoint, []byte("east-1"), []byte("east-2"), 1)}, entry, vkey},
		"no checkpoint":              {Proof{Index: 33, Hashes: good.Hashes}, entry, vkey},
		"another key":                {good, entry, otherKey},
	} {
		if err := VerifyProof(tc.proof, tc.entry, tc.key); !errors.Is(err, ErrBadProof) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := VerifyProof(good, entry, ""); err == nil || errors.Is(err, ErrBadProof) {
		t.Errorf("without a key: %v", err)
	}
	// A proof is not made of what does not hold.
	rewrite(t, filepath.Join(grownDir, "tile/entries/000.p/70"), func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
	if _, err := reader(t, grownDir, vkey).Prove(t.Context(), 69); !errors.Is(err, ErrDamaged) {
		t.Errorf("proved a changed entry: %v", err)
	}
	if _, err := r.Prove(t.Context(), 70); !errors.Is(err, ErrNotInLog) {
		t.Errorf("proved what is not there: %v", err)
	}
}

// A changed bit is damage, wherever it is: also where what is left can't be decoded any more.
func TestEveryFlippedBitOfAnEntryIsDamageToItsProof(t *testing.T) {
	dir, vkey := finished(t, 5)
	r := reader(t, dir, vkey)
	good, err := r.Prove(t.Context(), 4)
	if err != nil {
		t.Fatal(err)
	}
	undecodable := 0
	path := filepath.Join(dir, "tile/entries/000.p/5")
	for bit := range 8 * len(good.Entry) {
		flip := func(b []byte) []byte { b[len(b)-len(good.Entry)+bit/8] ^= 1 << (bit % 8); return b }
		if _, err := DecodeEntry(flip(bytes.Clone(good.Entry))); err != nil {
			undecodable++
		}
		rewrite(t, path, flip)
		if _, err := r.Prove(t.Context(), 4); !errors.Is(err, ErrDamaged) || errors.Is(err, ErrNotAnEntry) {
			t.Errorf("bit %d: %v", bit, err)
		}
		rewrite(t, path, flip)
	}
	if undecodable == 0 {
		t.Error("every flip left what can be decoded: the case is not tried")
	}
	if _, err := r.Prove(t.Context(), 4); err != nil {
		t.Errorf("after all is put back: %v", err)
	}
}

// Who has the log's key can append anything. It is in the log, and the log is not damaged.
func TestWhatIsInTheLogAndNoEntryIsSaidToBeThat(t *testing.T) {
	rubbish := []byte{0xff}
	dir, vkey := handmade(t, rubbish)
	r := reader(t, dir, vkey)
	if err := r.Verify(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	_, err := r.Prove(t.Context(), 0)
	if !errors.Is(err, ErrNotAnEntry) || errors.Is(err, ErrDamaged) || !strings.HasPrefix(err.Error(), "prove entry 0: the log holds it, but its bytes are not an entry: ") {
		t.Errorf("rubbish that is in the log: %v", err)
	}
	// Not so when the log does not hold it.
	rewrite(t, filepath.Join(dir, "tile/entries/000.p/1"), func(b []byte) []byte { b[2] ^= 1; return b })
	if _, err := r.Prove(t.Context(), 0); !errors.Is(err, ErrDamaged) || errors.Is(err, ErrNotAnEntry) {
		t.Errorf("rubbish that is not in the log: %v", err)
	}
}

// handmade is the folder of a log that has these bytes as its only entry, and its verifier key.
func handmade(t *testing.T, entry []byte) (dir, vkey string) {
	t.Helper()
	skey, vkey, err := note.GenerateKey(nil, testOrigin)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	leaf := LeafHash(entry)
	checkpoint, err := note.Sign(&note.Note{Text: fmt.Sprintf("%s\n1\n%s\n", testOrigin, base64.StdEncoding.EncodeToString(leaf))}, signer)
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	for name, data := range map[string][]byte{
		"checkpoint":           checkpoint,
		verifierKeyFile:        []byte(vkey + "\n"),
		"tile/0/000.p/1":       leaf,
		"tile/entries/000.p/1": append(binary.BigEndian.AppendUint16(nil, uint16(len(entry))), entry...), //nolint:gosec // short
	} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, data, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	return dir, vkey
}

func TestAProofHasOneText(t *testing.T) {
	dir, vkey := finished(t, 5)
	p, err := reader(t, dir, vkey).Prove(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	text, err := p.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseProof(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := VerifyProof(again, again.Entry, vkey); err != nil {
		t.Error(err)
	}
	for name, bad := range map[string]string{
		"empty":            "",
		"another header":   strings.Replace(string(text), "@v1", "@v2", 1),
		"carriage returns": strings.ReplaceAll(string(text), "\n", "\r\n"),
		"leading zero":     strings.Replace(string(text), "index 3", "index 03", 1),
		"plus":             strings.Replace(string(text), "index 3", "index +3", 1),
		"no index":         strings.Replace(string(text), "index 3\n", "", 1),
		"no checkpoint":    string(text[:bytes.Index(text, []byte("\n\n"))+2]),
		"extra twice":      strings.Replace(string(text), "extra ", "extra AAAA\nextra ", 1),
		"a space":          strings.Replace(string(text), "index 3\n", "index 3 \n", 1),
		"many hashes":      strings.Replace(string(text), "index 3\n", "index 3\n"+strings.Repeat(strings.Repeat("A", 43)+"=\n", 65), 1),
		"too long":         string(text) + strings.Repeat("x", maxProof),
	} {
		if p, err := ParseProof([]byte(bad)); err == nil {
			t.Errorf("%s: %+v", name, p)
		}
	}
}

func FuzzParseProof(f *testing.F) {
	seed, err := os.ReadFile(filepath.Join("testdata", "entry.tlog-proof"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte(proofHeader + "\nindex 0\n\nx"))
	f.Add([]byte(proofHeader + "\nextra \nindex 1\n" + strings.Repeat("A", 43) + "=\n\na\n1\nAAAA\n\n— a AAAAAAAA\n"))
	key := fuzzKey
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := ParseProof(text)
		if err != nil {
			return
		}
		// The formats library reads what we read, and the same.
		var other tlog.TLogProof
		if err := other.Unmarshal(text); err != nil {
			if len(p.Entry) < 40<<10 && len(text) < 60<<10 {
				t.Fatalf("the formats library refuses it: %v", err)
			}
		} else if other.Index != p.Index || len(other.Hashes) != len(p.Hashes) || !bytes.Equal(other.ExtraData, p.Entry) {
			t.Fatalf("the formats library reads %+v, we %+v", other, p)
		}
		again, err := p.MarshalText()
		if err != nil || !bytes.Equal(again, text) {
			t.Fatalf("%q became %q (%v)", text, again, err)
		}
		if err := VerifyProof(p, p.Entry, key); err == nil && !bytes.Equal(text, seed) {
			t.Fatalf("a proof that nobody made: %q", text)
		}
	})
}

// fuzzKey is the verifier key of testdata/entry.tlog-proof, whose private key is forgotten.
var fuzzKey = func() string {
	raw, err := os.ReadFile(filepath.Join("testdata", "verifier.key"))
	if err != nil {
		panic(err)
	}
	return strings.TrimSpace(string(raw))
}()

func TestTheGoldenProofStillHolds(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("testdata", "entry.tlog-proof"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := ParseProof(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := VerifyProof(p, p.Entry, fuzzKey); err != nil {
		t.Error(err)
	}
	if raw, err := marshal(event(7)); err != nil || !bytes.Equal(raw, p.Entry) {
		t.Errorf("the same entry is encoded differently: %v", err)
	}
}

func FuzzCheckpoint(f *testing.F) {
	text, err := os.ReadFile(filepath.Join("testdata", "entry.tlog-proof"))
	if err != nil {
		f.Fatal(err)
	}
	_, seed, _ := bytes.Cut(text, []byte("\n\n"))
	f.Add(seed)
	f.Add([]byte(fmt.Sprintf("%s\n1\nAAAA\n\n— %s AAAAAAAA\n", testOrigin, testOrigin)))
	f.Fuzz(func(t *testing.T, raw []byte) {
		cp, err := ParseCheckpoint(raw, fuzzKey)
		if err == nil && (cp.Size != 20 || cp.Origin != testOrigin || !bytes.HasPrefix(raw, seed[:bytes.Index(seed, []byte("\n\n"))])) {
			t.Fatalf("a checkpoint that nobody signed: %q", raw)
		}
	})
}
