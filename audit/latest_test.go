package audit

import (
	"errors"
	"testing"

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
