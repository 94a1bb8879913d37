package store

import (
	"bytes"
	"context"
	"database/sql"
	"embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/pressly/goose/v3"
	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlitelib "modernc.org/sqlite/lib"
)

//go:embed migrations/*.sql
var migrations embed.FS

// busyTimeout, in milliseconds, is how long a statement waits for another process (a backup, say).
const busyTimeout = "5000"

// Open opens the state database, makes it when it is not there, and brings its schema up to date. It refuses a file that
// others may read, one that is damaged, and one of a newer Signet. With Config.ReadOnly it changes nothing.
func Open(ctx context.Context, c Config) (*Store, error) {
	if c.Path == "" {
		return nil, errors.New("state database: no path is given")
	}
	path, err := filepath.Abs(c.Path)
	if err != nil {
		return nil, fmt.Errorf("state database %s: %w", c.Path, err)
	}
	logger := c.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	if c.ReadOnly {
		return openReadOnly(ctx, path)
	}
	if err := ownFile(path); err != nil {
		return nil, err
	}
	if err := whole(path); err != nil {
		return nil, err
	}
	// FULL: a commit is on the disk before anybody hears of it, so that a power cut can't make a used token new again.
	dsn := url.URL{Scheme: "file", Path: path, RawQuery: url.Values{
		"_pragma": {"busy_timeout(" + busyTimeout + ")", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)", "trusted_schema(0)"},
		"_txlock": {"immediate"},
	}.Encode()}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, failed(path, "open it", err)
	}
	// SQLite has one writer; a single connection makes the others wait in Go, in order, instead of by retrying on a lock.
	db.SetMaxOpenConns(1)
	if err := prepare(ctx, db, path, logger); err != nil {
		_ = db.Close() // err says more
		return nil, err
	}
	s := &Store{db: db, path: path}
	if s.file, err = os.Stat(path); err != nil {
		err = fmt.Errorf("state database %s: %w", path, err)
	} else if err = s.write(ctx, "write its checksums", func(*sql.Tx) error { return nil }); err == nil {
		err = s.Verify(ctx)
	}
	if err != nil {
		_ = db.Close() // err says more
		return nil, err
	}
	return s, nil
}

// openReadOnly opens a database that may lie on read-only media or belong to somebody else.
func openReadOnly(ctx context.Context, path string) (*Store, error) {
	values := url.Values{"mode": {"ro"}, "_pragma": {"busy_timeout(" + busyTimeout + ")", "query_only(1)", "trusted_schema(0)"}}
	// A file without a write-ahead log is at rest and whole; as immutable it needs no lock file beside it, for which a
	// read-only file system has no place. Whoever works on a database has such a log beside it.
	if _, err := os.Lstat(path + "-wal"); errors.Is(err, fs.ErrNotExist) {
		values.Set("immutable", "1")
	}
	switch info, err := os.Lstat(path); {
	case err != nil:
		return nil, fmt.Errorf("state database %s can't be read: %w", path, err)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("state database %s is not a regular file: give the path of the file itself", path)
	}
	if err := whole(path); err != nil {
		return nil, err
	}
	dsn := url.URL{Scheme: "file", Path: path, RawQuery: values.Encode()}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, failed(path, "open it", err)
	}
	db.SetMaxOpenConns(1)
	if err := legible(ctx, db, path); err != nil {
		_ = db.Close() // err says more
		return nil, err
	}
	s := &Store{db: db, path: path}
	if err := s.Verify(ctx); err != nil {
		_ = db.Close() // err says more
		return nil, err
	}
	return s, nil
}

// legible checks the file and that its schema is one that this Signet reads.
func legible(ctx context.Context, db *sql.DB, path string) error {
	if err := sound(ctx, db, path); err != nil {
		return err
	}
	p, err := provider(db)
	if err != nil {
		return err
	}
	var current int64
	if err := db.QueryRowContext(ctx, `SELECT COALESCE(MAX(version_id), 0) FROM goose_db_version`).Scan(&current); err != nil {
		return failed(path, "read the version of its schema", err)
	}
	sources := p.ListSources()
	switch target := sources[len(sources)-1].Version; {
	case current > target:
		return newer(path, current, target)
	case current < target:
		return fmt.Errorf("state database %s has schema %d and this signet reads schema %d: start the server on it once, which brings it up to date, or read it with the signet that wrote it", path, current, target)
	}
	return nil
}

// ownFile makes the database file or checks the one that is there. The journal files that SQLite puts beside it get its mode.
func ownFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("state database %s: the folder does not exist; make it first, with mode 0700", path)
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("state database %s is a symbolic link: give the path of the file itself", path)
	case errors.Is(err, unix.EISDIR):
		return fmt.Errorf("state database %s is a folder: give the path of a file", path)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		return fmt.Errorf("state database %s can't be written: run as the user who owns it, on a file system that is not read-only (%w)", path, err)
	case err != nil:
		return fmt.Errorf("state database %s: %w", path, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("state database %s: %w", path, err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("state database %s is not a regular file: give the path of a file", path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("state database %s has mode %04o, others may read it: chmod 600 %s", path, mode, path)
	}
	return nil
}

// whole refuses a file that is shorter than its header says. SQLite counts the beginning of a last page as the page, and
// reads zeros for the rest of it, which it does not miss where the page has room. A file that is not at rest may be short:
// a checkpoint writes its first page first, and what is missing is in the log beside it.
func whole(path string) error {
	for _, log := range []string{path + "-wal", path + "-journal"} {
		if info, err := os.Lstat(log); err == nil && info.Size() > 0 {
			return nil
		}
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("state database %s can't be read: %w", path, err)
	}
	defer f.Close()
	// https://sqlite.org/fileformat2.html §1.3. What is no header is for SQLite to refuse, and a new file has none.
	header := make([]byte, 100)
	switch _, err := io.ReadFull(f, header); {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil
	case err != nil:
		return fmt.Errorf("state database %s can't be read: %w", path, err)
	}
	size, pages := int64(binary.BigEndian.Uint16(header[16:])), int64(binary.BigEndian.Uint32(header[28:]))
	if size == 1 {
		size = 1 << 16
	}
	// The number of pages counts only if the change that wrote it was the last.
	if !bytes.HasPrefix(header, []byte("SQLite format 3\x00")) || !bytes.Equal(header[24:28], header[92:96]) {
		return nil
	}
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("state database %s: %w", path, err)
	}
	if info.Size() < size*pages {
		return damaged(path, fmt.Errorf("it has %d bytes of the %d that its header names", info.Size(), size*pages))
	}
	return nil
}

// prepare checks the file and brings the schema up to date.
func prepare(ctx context.Context, db *sql.DB, path string, logger *slog.Logger) error {
	if err := sound(ctx, db, path); err != nil {
		return err
	}
	p, err := provider(db)
	if err != nil {
		return err
	}
	current, target, err := p.GetVersions(ctx)
	if err != nil {
		return failed(path, "read the version of its schema", err)
	}
	if current > target {
		return newer(path, current, target)
	}
	done, err := p.Up(ctx)
	if err != nil {
		return failed(path, "bring its schema up to date", err)
	}
	if len(done) > 0 {
		logger.InfoContext(ctx, "state database brought up to date", "path", path, "from", current, "to", target)
	}
	return nil
}

func newer(path string, current, target int64) error {
	return fmt.Errorf("state database %s has schema %d and this signet knows schemas up to %d: run the newer signet that wrote it, or restore a backup from before the upgrade", path, current, target)
}

// sound reads the whole file once, the indexes against their tables: state decides who may have which name, and half of it is worse than none.
func sound(ctx context.Context, db *sql.DB, path string) error {
	var verdict string
	if err := db.QueryRowContext(ctx, `PRAGMA integrity_check(1)`).Scan(&verdict); err != nil {
		return failed(path, "check it", err)
	}
	if verdict != "ok" {
		return damaged(path, fmt.Errorf("%.200s", strings.Join(strings.Fields(verdict), " ")))
	}
	return nil
}

// provider is the migrations that this binary carries.
func provider(db *sql.DB) (*goose.Provider, error) {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, fmt.Errorf("state database: embedded migrations: %w", err)
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, files, goose.WithDisableGlobalRegistry(true), goose.WithLogger(goose.NopLogger()))
	if err != nil {
		return nil, fmt.Errorf("state database: embedded migrations: %w", err)
	}
	return p, nil
}

func damaged(path string, err error) error {
	return fmt.Errorf("state database %s is damaged: restore it from a backup; the audit log is another file and tells what was issued (%w)", path, err)
}

// failed says in one sentence what was tried on the database and what stood in its way.
func failed(path, what string, err error) error {
	var r refusal
	if errors.As(err, &r) {
		return r.error
	}
	var e *sqlite.Error
	if errors.As(err, &e) {
		return explain(e.Code(), path, what, err)
	}
	return fmt.Errorf("state database %s: %s: %w", path, what, err)
}

// explain says what SQLite's result code asks of a person (https://sqlite.org/rescode.html).
func explain(code int, path, what string, err error) error {
	remedy := ""
	switch code & 0xff { // the primary result code
	case sqlitelib.SQLITE_CORRUPT, sqlitelib.SQLITE_NOTADB:
		return damaged(path, err)
	case sqlitelib.SQLITE_BUSY, sqlitelib.SQLITE_LOCKED:
		remedy = "another process holds it; stop that process and repeat"
	case sqlitelib.SQLITE_FULL:
		remedy = "the disk is full; make room and repeat"
	case sqlitelib.SQLITE_IOERR:
		// SQLite knows ENOSPC as full, and EDQUOT only as a write that failed.
		remedy = "the disk does not take it: it fails, or the quota of the folder's owner is used up; look at the kernel's log and at quota, and repeat"
	case sqlitelib.SQLITE_READONLY, sqlitelib.SQLITE_PERM, sqlitelib.SQLITE_CANTOPEN:
		remedy = "it can't be written; see to the folder's owner, mode and mount"
	default:
		return fmt.Errorf("state database %s: %s: %w", path, what, err)
	}
	return fmt.Errorf("state database %s: %s: %s (%w)", path, what, remedy, err)
}

// Writable makes a small durable write, and looks whether the file is still the one that was opened: SQLite goes on
// writing to one that was deleted.
func (s *Store) Writable(ctx context.Context) error {
	for _, name := range []string{s.path, s.path + "-wal"} {
		info, err := os.Lstat(name)
		switch {
		case err != nil:
			return fmt.Errorf("state database %s: it is gone, and what is written now is lost; stop the server and restore the file from its newest backup (%w)", s.path, err)
		case name == s.path && !os.SameFile(info, s.file):
			return fmt.Errorf("state database %s: another file lies in its place, and what is written now is lost; restart the server", s.path)
		}
	}
	return s.write(ctx, "write to it", func(tx *sql.Tx) error {
		// Unchanged, and written all the same: the row's checksum is made anew.
		_, err := tx.ExecContext(ctx, `UPDATE revisions SET value = value WHERE name = 'registrations'`)
		return err
	})
}
