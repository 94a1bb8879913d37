package audit

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/transparency-dev/tessera/api/layout"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
)

// Query asks for the entries to which all of its fields apply; an empty field applies to all.
type Query struct {
	// Serial as ParseSerial gives it.
	Serial   string
	SPIFFEID string
	Agent    string
	// Registration is a name, Token the id of a join token.
	Registration, Token string
	// Kind is one of Kinds.
	Kind string
	// Since is included, Until is not.
	Since, Until time.Time
	// Limit is the most to return; 0 = all.
	Limit int
}

func (q Query) matches(f Facts) bool {
	return (q.Serial == "" || q.Serial == f.Serial) && (q.SPIFFEID == "" || q.SPIFFEID == f.SPIFFEID) &&
		(q.Agent == "" || q.Agent == f.Agent) && (q.Kind == "" || q.Kind == f.Kind) &&
		(q.Registration == "" || q.Registration == f.Registration) && (q.Token == "" || q.Token == f.Token) &&
		(q.Since.IsZero() || !f.Time.Before(q.Since)) && (q.Until.IsZero() || f.Time.Before(q.Until))
}

// Found is an entry that was asked for.
type Found struct {
	Index uint64
	// Raw is the entry as stored: what Prove and VerifyProof are about.
	Raw   []byte
	Entry *auditv1.Entry
	Facts Facts
}

// KeepIndex keeps the index in a file, so that the next Reader need not read the whole log. The file is a cache: it may be
// deleted at any time, and one that is broken or of another log is made anew. It must lie where nobody may write whom the
// reader does not trust, so not in a folder that was copied from elsewhere. Without it, or where the file cannot be
// written, Find makes an index in memory.
func (r *Reader) KeepIndex(path string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.indexPath = path
}

// Find returns the entries that match, the newest first. Before it answers it brings the index up to the checkpoint, reading
// what is new and checking that all it has ever read has the checkpoint's root; so an empty answer is the log's own.
func (r *Reader) Find(ctx context.Context, q Query) ([]Found, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	found, err := r.find(ctx, q)
	if err != nil {
		return nil, fmt.Errorf("search the audit log in %s: %w", r.dir, err)
	}
	return found, nil
}

// find asks the index in its file, then one made anew, then one in memory: whatever becomes of a cache, the log answers.
func (r *Reader) find(ctx context.Context, q Query) ([]Found, error) {
	for made := false; ; made = true {
		found, err := r.findIn(ctx, q)
		var broken *indexError
		if !errors.As(err, &broken) || ctx.Err() != nil || r.indexPath == "" && made {
			return found, err
		}
		if cerr := r.index.close(); cerr != nil {
			return nil, errors.Join(err, cerr)
		}
		r.index = nil
		if made || broken.unwritable() || removeIndex(r.indexPath) != nil {
			r.indexPath = ""
		}
	}
}

func (r *Reader) findIn(ctx context.Context, q Query) ([]Found, error) {
	if r.index == nil {
		ix, err := openIndex(ctx, r.indexPath)
		if err != nil {
			return nil, err
		}
		r.index = ix
	}
	cp, places, err := r.index.find(ctx, r, q)
	if err != nil {
		return nil, err
	}
	found := make([]Found, 0, len(places))
	var bundle [][]byte
	at := uint64(0)
	for _, i := range places {
		if n := i / layout.EntryBundleWidth; bundle == nil || n != at {
			if bundle, _, err = r.folder.bundle(n, layout.PartialTileSize(0, n, cp.Size)); err != nil {
				return nil, err
			}
			at = n
		}
		raw := bundle[i%layout.EntryBundleWidth]
		e, facts := read(raw)
		if !q.matches(facts) {
			return nil, &indexError{fmt.Errorf("entry %d is not what the index says", i)}
		}
		found = append(found, Found{Index: i, Raw: raw, Entry: e, Facts: facts})
	}
	return found, nil
}

// read takes from an entry what it says, as far as it can be read: what cannot is still listed.
func read(raw []byte) (*auditv1.Entry, Facts) {
	e, err := DecodeEntry(raw)
	if err != nil {
		e = &auditv1.Entry{}
	}
	f, _ := FactsOf(e)
	return e, f
}

// index finds entries by what they say. It holds nothing that the log does not, and knows exactly up to where: beside its
// rows it keeps the compact range of the tree of all entries it has read.
type index struct{ db *sql.DB }

// indexError is a fault of the index, not of the log.
type indexError struct{ error }

func (e *indexError) Unwrap() error { return e.error }

// unwritable reports a place where there can be no index, rather than a broken one.
func (e *indexError) unwritable() bool {
	var s *sqlite.Error
	return errors.Is(e.error, fs.ErrPermission) || errors.Is(e.error, fs.ErrNotExist) || errors.Is(e.error, os.ErrInvalid) ||
		errors.As(e.error, &s) && slices.Contains([]int{sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY}, s.Code()&0xff)
}

// indexVersion changes with the schema, and with what FactsOf makes of an entry.
const indexVersion = "2"

const indexSchema = `
CREATE TABLE IF NOT EXISTS progress (one INTEGER PRIMARY KEY CHECK (one = 1), version TEXT NOT NULL, size INTEGER NOT NULL, nodes BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS entries (i INTEGER PRIMARY KEY, time INTEGER NOT NULL, kind TEXT NOT NULL, serial TEXT, spiffe_id TEXT, agent TEXT, registration TEXT, token TEXT);
CREATE INDEX IF NOT EXISTS entries_serial ON entries (serial) WHERE serial IS NOT NULL;
CREATE INDEX IF NOT EXISTS entries_spiffe_id ON entries (spiffe_id, time) WHERE spiffe_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS entries_agent ON entries (agent, time) WHERE agent IS NOT NULL;
CREATE INDEX IF NOT EXISTS entries_registration ON entries (registration, time) WHERE registration IS NOT NULL;
CREATE INDEX IF NOT EXISTS entries_token ON entries (token) WHERE token IS NOT NULL;
CREATE INDEX IF NOT EXISTS entries_time ON entries (time);
`

const indexForget = `DROP TABLE IF EXISTS entries; DROP TABLE IF EXISTS progress;`

// indexPatience is how long another process may be at the index.
const indexPatience = 20 * time.Second

func openIndex(ctx context.Context, path string) (*index, error) {
	dsn := ":memory:"
	if path != "" {
		abs, err := filepath.Abs(path)
		if err != nil {
			return nil, &indexError{err}
		}
		f, err := os.OpenFile(abs, os.O_CREATE|os.O_RDWR, 0o600) // SQLite would make it readable by all.
		if err != nil {
			return nil, &indexError{err}
		}
		if err := f.Close(); err != nil {
			return nil, &indexError{err}
		}
		// WAL survives a kill; what a power failure may lose is made anew. Another process may be at it: wait for it.
		dsn = (&url.URL{Scheme: "file", Path: abs, RawQuery: fmt.Sprintf("_txlock=immediate&_pragma=busy_timeout(%d)&_pragma=journal_mode(WAL)&_pragma=synchronous(NORMAL)", indexPatience.Milliseconds())}).String()
	}
	db, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, &indexError{err}
	}
	db.SetMaxOpenConns(1) // In memory, every connection is a database of its own.
	// Who makes a new file is not waited for by SQLite itself: whoever would turn it into one with a WAL too is told so at once.
	for began := time.Now(); ; {
		_, err := db.ExecContext(ctx, indexSchema)
		if err == nil {
			return &index{db}, nil
		}
		if s := (*sqlite.Error)(nil); !errors.As(err, &s) || s.Code()&0xff != sqlite3.SQLITE_BUSY || time.Since(began) > indexPatience {
			return nil, errors.Join(&indexError{err}, db.Close())
		}
		select {
		case <-ctx.Done(): // which the next try says
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (ix *index) close() error {
	if ix == nil {
		return nil
	}
	return ix.db.Close()
}

func removeIndex(path string) error {
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Remove(path + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// indexChunk is how many entries one transaction takes; others that wait for the index wait that long.
const indexChunk = 64 * layout.EntryBundleWidth

// find brings the index up to the newest checkpoint, checks that it has read exactly that log, and answers.
func (ix *index) find(ctx context.Context, r *Reader, q Query) (Checkpoint, []uint64, error) {
	anew := false
	for {
		cp, places, done, err := ix.step(ctx, r, q)
		switch {
		case err == nil && done:
			return cp, places, nil
		case err == nil:
		case errors.Is(err, ErrDamaged) && !anew:
			// Perhaps it is the index that is wrong: of another log, or of a later state of this one than the copy at hand.
			anew = true
			if err := ix.forget(ctx); err != nil {
				return Checkpoint{}, nil, &indexError{err}
			}
		default:
			return Checkpoint{}, nil, err
		}
	}
}

func (ix *index) forget(ctx context.Context) error {
	tx, err := ix.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx, indexForget+indexSchema); err != nil {
		return err
	}
	return tx.Commit()
}

// step adds one chunk, and answers when it was the last, in one transaction: several processes may take turns.
func (ix *index) step(ctx context.Context, r *Reader, q Query) (cp Checkpoint, places []uint64, done bool, err error) {
	tx, err := ix.db.BeginTx(ctx, nil)
	if err != nil {
		return cp, nil, false, &indexError{err}
	}
	defer tx.Rollback()
	// Read now that no one else extends the index: it cannot be behind what the index has.
	if cp, err = r.folder.checkpoint(r.verifier); err != nil {
		return cp, nil, false, err
	}
	var size uint64
	var nodes []byte
	var version string
	switch err := tx.QueryRowContext(ctx, "SELECT version, size, nodes FROM progress").Scan(&version, &size, &nodes); {
	case errors.Is(err, sql.ErrNoRows):
	case err != nil:
		return cp, nil, false, &indexError{err}
	case version != indexVersion || len(nodes)%sha256.Size != 0:
		return cp, nil, false, &indexError{fmt.Errorf("version %.10q", version)}
	}
	var hashes [][]byte
	for h := range slices.Chunk(nodes, sha256.Size) {
		hashes = append(hashes, h)
	}
	rng, err := ranges.NewRange(0, size, hashes)
	if err != nil {
		return cp, nil, false, &indexError{err}
	}

	insert, err := tx.PrepareContext(ctx, "INSERT INTO entries (i, time, kind, serial, spiffe_id, agent, registration, token) VALUES (?, ?, ?, nullif(?, ''), nullif(?, ''), nullif(?, ''), nullif(?, ''), nullif(?, ''))")
	if err != nil {
		return cp, nil, false, &indexError{err}
	}
	defer insert.Close()
	w := walk{folder: r.folder, rng: rng, size: cp.Size, leaf: func(i uint64, raw []byte) error {
		_, f := read(raw)
		if _, err := insert.ExecContext(ctx, i, f.Time.UnixNano(), f.Kind, f.Serial, f.SPIFFEID, f.Agent, f.Registration, f.Token); err != nil {
			return &indexError{err}
		}
		return nil
	}}
	to := min(cp.Size, (size/indexChunk+1)*indexChunk)
	if cp.Size < size {
		to = cp.Size // which walk refuses
	}
	if err := w.to(ctx, to); err != nil {
		return cp, nil, false, err
	}
	if rng.End() > size {
		if _, err := tx.ExecContext(ctx, "INSERT OR REPLACE INTO progress (one, version, size, nodes) VALUES (1, ?, ?, ?)", indexVersion, rng.End(), slices.Concat(rng.Hashes()...)); err != nil {
			return cp, nil, false, &indexError{err}
		}
	}
	if done = rng.End() == cp.Size; done {
		root, err := rootOf(rng)
		if err != nil {
			return cp, nil, false, err
		}
		if string(root) != string(cp.RootHash) {
			return cp, nil, false, fmt.Errorf("%w: its entries have the root %x, its checkpoint says %x", ErrDamaged, root, cp.RootHash)
		}
		if places, err = ask(ctx, tx, q); err != nil {
			return cp, nil, false, &indexError{err}
		}
	}
	if err := tx.Commit(); err != nil {
		return cp, nil, false, &indexError{err}
	}
	return cp, places, done, nil
}

// ask returns the places of what matches, the newest first.
func ask(ctx context.Context, tx *sql.Tx, q Query) ([]uint64, error) {
	where, args := []string{"true"}, []any{}
	for _, c := range []struct {
		use  bool
		text string
		arg  any
	}{
		{q.Serial != "", "serial = ?", q.Serial},
		{q.SPIFFEID != "", "spiffe_id = ?", q.SPIFFEID},
		{q.Agent != "", "agent = ?", q.Agent},
		{q.Registration != "", "registration = ?", q.Registration},
		{q.Token != "", "token = ?", q.Token},
		{q.Kind != "", "kind = ?", q.Kind},
		{!q.Since.IsZero(), "time >= ?", q.Since.UnixNano()},
		{!q.Until.IsZero(), "time < ?", q.Until.UnixNano()},
	} {
		if c.use {
			where, args = append(where, c.text), append(args, c.arg)
		}
	}
	limit := -1
	if q.Limit > 0 {
		limit = q.Limit
	}
	rows, err := tx.QueryContext(ctx, "SELECT i FROM entries WHERE "+strings.Join(where, " AND ")+" ORDER BY i DESC LIMIT ?", append(args, limit)...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var places []uint64
	for rows.Next() {
		var i uint64
		if err := rows.Scan(&i); err != nil {
			return nil, err
		}
		places = append(places, i)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	return places, nil
}
