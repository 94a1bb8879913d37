package store

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/signet-ca/signet/identity"
)

// Note is what the audit log is to be told of one change.
type Note struct {
	// Entries of the log, as they will stand there.
	Entries [][]byte
	// OfToken sets Entries where they depend on the token that UseToken has found. An error undoes the change.
	OfToken func(identity.Token) error
	// Change numbers it, in the order of the changes; 0 while it is not kept.
	Change uint64
}

// Telling returns the store for one change: the note is kept in the transaction of what is written through it, so that
// neither is there without the other. It stays until Told.
func (s *Store) Telling(n *Note) *Store {
	with := *s
	with.note = n
	return &with
}

func (n *Note) put(ctx context.Context, tx *sql.Tx) error {
	if _, err := tx.ExecContext(ctx, `UPDATE revisions SET value = value + 1 WHERE name = 'outbox'`); err != nil {
		return err
	}
	if err := tx.QueryRowContext(ctx, `SELECT value FROM revisions WHERE name = 'outbox'`).Scan(&n.Change); err != nil {
		return err
	}
	for i, e := range n.Entries {
		if _, err := tx.ExecContext(ctx, `INSERT INTO outbox (change, position, entry) VALUES ($1, $2, $3)`, int64(n.Change), i, e); err != nil {
			return err
		}
	}
	return nil
}

// NextNote returns the oldest note that is kept of the changes after the given one, 0 = of all, if there is one.
func (s *Store) NextNote(ctx context.Context, after uint64) (Note, bool, error) {
	var n Note
	err := s.read(ctx, "read what the log is to be told", func(tx *sql.Tx) error {
		return query(ctx, tx, func(scan func(...any) error) error {
			var e []byte
			if err := scan(&n.Change, &e); err != nil {
				return err
			}
			n.Entries = append(n.Entries, e)
			return nil
		}, `SELECT change, entry FROM outbox WHERE change = (SELECT MIN(change) FROM outbox WHERE change > $1) ORDER BY position`, int64(after))
	})
	if err != nil {
		return Note{}, false, err
	}
	return n, len(n.Entries) > 0, nil
}

// Told forgets a note: the log has it.
func (s *Store) Told(ctx context.Context, change uint64) error {
	return s.write(ctx, fmt.Sprintf("forget note %d for the log", change), func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `DELETE FROM outbox WHERE change = $1`, int64(change))
		return err
	})
}
