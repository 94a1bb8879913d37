package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"strings"
)

// SQLite keeps no checksums of values, so that a bit that flips on the disk could give an identity to somebody else. Each
// row has one of ours: made at the end of the transaction that wrote the row (triggers mark it), compared when the database
// is opened. It is against accidents: who can write the file can write a checksum.

// sealedTable is a table whose rows have checksums.
type sealedTable struct {
	name string
	// what and key name a row to people: "registration" and the column that holds its name.
	what, key string
}

var sealedTables = []sealedTable{
	{"meta", "the fact", "key"},
	{"revisions", "the revision of", "name"},
	{"agents", "agent", "name"},
	{"join_tokens", "join token", "id"},
	{"registrations", "registration", "name"},
	{"registration_agents", "an agent of registration", "registration"},
	{"registration_selectors", "a selector of registration", "registration"},
	{"authorities", "authority", "id"},
	{"authority_certificates", "a certificate of authority", "authority"},
	{"bundles", "the trust bundle of", "trust_domain"},
	{"bundle_roots", "a root of the trust bundle of", "trust_domain"},
	{"bundle_history", "a trust bundle of the past with root", "root"},
	{"peer_reports", "the report of cluster", "cluster"},
	{"shared_trust", "the shared trust of", "trust_domain"},
	{"banned_identities", "the ban of", "spiffe_id"},
	{"outbox", "what the log is to be told of change", "change"},
}

// sealedRow is one with its checksum as it is stored (nil = none yet) and as it should be.
type sealedRow struct {
	id          int64
	about       string
	stored, sum []byte
}

// rows reads all rows of a table, or those that have no checksum yet.
func (t sealedTable) rows(ctx context.Context, tx *sql.Tx, unsealed bool) (all []sealedRow, err error) {
	var columns []string
	if err := query(ctx, tx, func(scan func(...any) error) error {
		var c string
		err := scan(&c)
		columns = append(columns, c)
		return err
	}, `SELECT name FROM pragma_table_info($1) WHERE name <> 'checksum' ORDER BY cid`, t.name); err != nil {
		return nil, err
	}
	where := ""
	if unsealed {
		where = ` WHERE checksum IS NULL`
	}
	values := make([]string, len(columns))
	into := make([]any, len(columns), len(columns)+3)
	for i := range values {
		into[i] = &values[i]
	}
	var row sealedRow
	into = append(into, &row.id, &row.about, &row.stored)
	err = query(ctx, tx, func(scan func(...any) error) error {
		row.stored = nil
		if err := scan(into...); err != nil {
			return err
		}
		h := sha256.New()
		h.Write([]byte(t.name))
		for i, v := range values {
			// As SQL literals, which tell types and can't run into each other. NULL counts as absent, so that a later schema may
			// add columns.
			if v != "NULL" {
				h.Write([]byte("\x00" + columns[i] + "\x00" + v))
			}
		}
		row.sum = h.Sum(nil)
		all = append(all, row)
		return nil
	}, `SELECT quote("`+strings.Join(columns, `"), quote("`)+`"), rowid, `+t.key+`, checksum FROM `+t.name+where)
	return all, err
}

// seal makes the checksums of the rows that have none.
func seal(ctx context.Context, tx *sql.Tx) error {
	var unsealed []string
	for _, t := range sealedTables {
		unsealed = append(unsealed, `SELECT '`+t.name+`' WHERE EXISTS (SELECT 1 FROM `+t.name+` WHERE checksum IS NULL)`)
	}
	written := map[string]bool{}
	if err := query(ctx, tx, func(scan func(...any) error) error {
		var name string
		err := scan(&name)
		written[name] = true
		return err
	}, strings.Join(unsealed, ` UNION ALL `)); err != nil {
		return err
	}
	for _, t := range sealedTables {
		if !written[t.name] {
			continue
		}
		rows, err := t.rows(ctx, tx, true)
		if err != nil {
			return err
		}
		if err := t.sealRows(ctx, tx, rows); err != nil {
			return err
		}
	}
	return nil
}

func (t sealedTable) sealRows(ctx context.Context, tx *sql.Tx, rows []sealedRow) error {
	update, err := tx.PrepareContext(ctx, `UPDATE `+t.name+` SET checksum = $1 WHERE rowid = $2`)
	if err != nil {
		return err
	}
	defer update.Close()
	for _, r := range rows {
		if _, err := update.ExecContext(ctx, r.sum, r.id); err != nil {
			return err
		}
	}
	return nil
}

// Verify reads every row and compares it with its checksum.
func (s *Store) Verify(ctx context.Context) error {
	return s.read(ctx, "compare it with its checksums", func(tx *sql.Tx) error {
		for _, t := range sealedTables {
			rows, err := t.rows(ctx, tx, false)
			if err != nil {
				return err
			}
			for _, r := range rows {
				if r.stored != nil && !bytes.Equal(r.stored, r.sum) {
					return refuse("state database %s is damaged: %s %.256q is not what was written, its checksum differs; restore it from a backup", s.path, t.what, r.about)
				}
			}
		}
		return nil
	})
}
