package audit

import (
	"context"
	"fmt"

	"github.com/transparency-dev/tessera/api/layout"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Latest returns the newest entry of one of Kinds among the last ones, as many as most, proven by the checkpoint; false =
// there is none. It looks backwards through the entries and needs no index.
func (r *Reader) Latest(ctx context.Context, kind string, most uint64) (_ Found, found bool, err error) {
	wanted, ok := fieldOf(kind)
	if !ok {
		return Found{}, false, fmt.Errorf("search the audit log in %s: there are no entries of kind %q", r.dir, kind)
	}
	cp, err := r.Checkpoint(ctx)
	if err != nil {
		return Found{}, false, err
	}
	for end := cp.Size; end > 0 && cp.Size-end < most; {
		if err := ctx.Err(); err != nil {
			return Found{}, false, err
		}
		n := (end - 1) / layout.EntryBundleWidth
		first := n * layout.EntryBundleWidth
		entries, _, err := r.folder.bundle(n, layout.PartialTileSize(0, n, cp.Size))
		if err != nil {
			return Found{}, false, fmt.Errorf("search the audit log in %s: %w", r.dir, err)
		}
		for i := end - first; i > 0; i-- {
			if eventOf(entries[i-1]) == wanted {
				f, err := r.Proven(ctx, first+i-1)
				return f, err == nil, err
			}
		}
		end = first
	}
	return Found{}, false, nil
}

// Proven returns the entry at an index, of which a proof showed that the newest checkpoint holds these very bytes.
// ErrNotInLog, ErrDamaged.
func (r *Reader) Proven(ctx context.Context, index uint64) (Found, error) {
	proof, err := r.Prove(ctx, index)
	if err != nil {
		return Found{}, err
	}
	e, facts := read(proof.Entry)
	return Found{Index: index, Raw: proof.Entry, Entry: e, Facts: facts}, nil
}

func fieldOf(kind string) (protoreflect.FieldNumber, bool) {
	for i := range entryEvents.Fields().Len() {
		if f := entryEvents.Fields().Get(i); kindOf(f) == kind {
			return f.Number(), true
		}
	}
	return 0, false
}

// eventOf is the number of the field in which an entry has its event; 0 where it has none that is known. Nothing is decoded:
// a million entries are looked at to find one.
func eventOf(raw []byte) protoreflect.FieldNumber {
	for len(raw) > 0 {
		number, _, n := protowire.ConsumeField(raw)
		if n < 0 {
			return 0
		}
		if entryEvents.Fields().ByNumber(number) != nil {
			return number
		}
		raw = raw[n:]
	}
	return 0
}
