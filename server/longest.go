package server

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/signet-ca/signet/internal/store"
)

// longestFact is what the state database knows of the longest life of leaves.
const longestFact = "longest_leaf"

// longest is the longest life that leaves could have when the server was started last, and until when leaves may live that
// were made while it was a longer one.
type longest struct {
	Life  time.Duration `json:"life"`
	Older time.Time     `json:"older,omitzero"`
}

// now is what follows when leaves may have another life from now on. Those that were made before may be as new as now.
func (l longest) now(life time.Duration, now time.Time) longest {
	if end := now.Add(l.Life); life < l.Life && end.After(l.Older) {
		l.Older = end.UTC()
	}
	l.Life = life
	return l
}

func readLongest(ctx context.Context, st *store.Store) (l longest, err error) {
	text, ok, err := st.Meta(ctx, longestFact)
	if err != nil || !ok {
		return l, err
	}
	if err := json.Unmarshal([]byte(text), &l); err != nil {
		return l, fmt.Errorf("what is stored of the longest life of leaves can't be read: %w", err)
	}
	return l, nil
}

// olderLeaves is until when leaves may live that were made while they could live longer than they can now; zero = none were.
func olderLeaves(ctx context.Context, st *store.Store, life time.Duration, now time.Time) (time.Time, error) {
	l, err := readLongest(ctx, st)
	return l.now(life, now).Older, err
}

// rememberLongest is for a server that is about to make leaves of that life, which it notes.
func rememberLongest(ctx context.Context, st *store.Store, life time.Duration, now time.Time) error {
	was, err := readLongest(ctx, st)
	if err != nil {
		return err
	}
	is := was.now(life, now)
	if is == was {
		return nil
	}
	text, err := json.Marshal(is)
	if err != nil {
		return err
	}
	return st.ReplaceMeta(ctx, longestFact, string(text))
}

// inTime is how much later than its decision a change may take effect without more ado: a part of how far clocks may be apart.
func (k *keeper) inTime() time.Duration { return min(time.Second, k.policy.Skew/2) }
