package audit

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
)

func TestTheLatestOfAKindIsFoundBackwards(t *testing.T) {
	moved := func(revision uint64) *auditv1.Entry {
		e := event(1)
		e.Event = &auditv1.Entry_AuthorityChanged{AuthorityChanged: &auditv1.AuthorityChanged{Authority: "intermediate-1", Revision: revision}}
		return e
	}
	dir := t.TempDir()
	l := open(t, testConfig(dir, testKey(t)))
	add(t, l, events(0, 3)...)
	add(t, l, moved(1), moved(2))
	add(t, l, events(3, 700)...)
	vkey := l.VerifierKey()
	closeLog(t, l)
	r := reader(t, dir, vkey)

	f, ok, err := r.Latest(t.Context(), "authority-changed", 1<<20)
	if err != nil || !ok || f.Index != 4 || f.Entry.GetAuthorityChanged().GetRevision() != 2 || f.Facts.Authority != "intermediate-1" {
		t.Errorf("%+v %v %v", f, ok, err)
	}
	// 705 entries are two bundles and a part of a third; the last 449 end with the second.
	if _, ok, err := r.Latest(t.Context(), "authority-changed", 449); ok || err != nil {
		t.Errorf("among the last 449: %v %v", ok, err)
	}
	if _, ok, err := r.Latest(t.Context(), "identity-banned", 1<<20); ok || err != nil {
		t.Errorf("of a kind that there is none of: %v %v", ok, err)
	}
	if _, _, err := r.Latest(t.Context(), "weather", 10); err == nil {
		t.Error("a kind that is none is looked for")
	}
	// Somebody has written another revision into the bundle.
	rewrite(t, dir+"/tile/entries/000", func(b []byte) []byte {
		at := len(b)
		for i := range b {
			if string(b[i:min(i+14, len(b))]) == "intermediate-1" {
				at = i
			}
		}
		b[at] = 'I'
		return b
	})
	if _, ok, err := r.Latest(t.Context(), "authority-changed", 1<<20); ok || !errors.Is(err, ErrBadProof) {
		t.Errorf("a changed entry: %v %v", ok, err)
	}
}

func TestWhatIsProvenIsRefusedOverAnyFlippedBitThatItStandsOn(t *testing.T) {
	const index = 298 // of 300: its proof leads over the partial tile, and the full one beside it
	dir, vkey := finished(t, 300)
	proven := func() error {
		f, err := reader(t, dir, vkey).Proven(t.Context(), index)
		if err == nil && (f.Index != index || !proto.Equal(f.Entry, event(index)) || !f.Facts.Time.Equal(time.Unix(0, event(index).GetTime()))) {
			t.Errorf("proven: %+v", f)
		}
		return err
	}
	if err := proven(); err != nil {
		t.Fatal(err)
	}
	raw, err := marshal(event(index))
	if err != nil {
		t.Fatal(err)
	}
	// Where its own bytes lie in the bundle; its sibling in the tile of leaves; the root of the first 256 in the tile above.
	for path, all := range map[string]func(file []byte) (from, to int){
		"tile/entries/001.p/44": func(file []byte) (int, int) { at := bytes.Index(file, raw); return at, at + len(raw) },
		"tile/0/001.p/44":       func([]byte) (int, int) { return 43 * 32, 44 * 32 },
		"tile/1/000.p/1":        func([]byte) (int, int) { return 0, 32 },
		"checkpoint":            func(file []byte) (int, int) { return 0, len(file) },
	} {
		full := filepath.Join(dir, path)
		good, err := os.ReadFile(full)
		if err != nil {
			t.Fatal(err)
		}
		from, to := all(good)
		if from < 0 || to > len(good) || from == to {
			t.Fatalf("%s: bytes %d to %d of %d", path, from, to, len(good))
		}
		for i := from; i < to; i++ {
			rewrite(t, full, func(b []byte) []byte { b[i] ^= 1 << (i % 8); return b })
			if err := proven(); err == nil {
				t.Errorf("%s byte %d: it is still proven", path, i)
			}
			rewrite(t, full, func([]byte) []byte { return good })
		}
	}
	if err := proven(); err != nil {
		t.Errorf("after all is put back: %v", err)
	}
}

func TestTheEventOfAnEntryIsKnownWithoutDecodingIt(t *testing.T) {
	entries, _ := mixed(t)
	for _, e := range entries {
		raw, err := marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		_, facts := read(raw)
		if want, ok := fieldOf(facts.Kind); !ok || eventOf(raw) != want {
			t.Errorf("%s: %d, want %d", facts.Kind, eventOf(raw), want)
		}
		for i := range raw {
			_ = eventOf(raw[:i]) // whatever it is, it ends
		}
	}
}
