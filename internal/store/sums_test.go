package store

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	sqlitelib "modernc.org/sqlite/lib"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
)

// filled has a row in each table.
func filled(t *testing.T) *Store {
	t.Helper()
	s := newStore(t)
	ctx := t.Context()
	note := &Note{Entries: [][]byte{[]byte("entry")}}
	_, err := s.Telling(note).ApplyRegistrations(ctx, 0, []identity.Registration{registration("web")}, nil)
	for _, err := range []error{
		err,
		s.SetMeta(ctx, "cluster", "east"),
		s.PutAgent(ctx, Agent{AgentRow: identity.AgentRow{Name: "node-1", SPKI: []byte("key")}, Enrolled: now}),
		s.CreateToken(ctx, identity.Token{ID: "01", Hash: [32]byte{1}, Agent: "node-2", Created: now, Expires: now}),
		keepAuthority(ctx, s, Authority{Authority: rotation.Authority{ID: "a", Kind: ca.KindIntermediate, State: ca.Active}, Key: keystore.Ref{Backend: "file", Name: "k", Version: 1}, Chain: [][]byte{{1}, {2}}, Created: now}),
		keepBundle(ctx, s, newBundle(t, 1, newRoot(t), newRoot(t))),
		s.PutPeerReports(ctx, map[string][]byte{"west": []byte("note")}),
		s.PutSharedTrust(ctx, spiffeid.RequireTrustDomainFromString("example.org"), []byte("[]")),
		s.BanIdentity(ctx, BannedIdentity{ID: spiffeid.RequireFromString("spiffe://example.org/ns/a/sa/b"), Since: now, Reason: "stolen"}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func TestEveryRowHasAChecksumOfItsOwn(t *testing.T) {
	s := filled(t)
	var tables []string
	sums := map[string]string{}
	if err := s.read(t.Context(), "look", func(tx *sql.Tx) error {
		if err := query(t.Context(), tx, func(scan func(...any) error) error {
			var name string
			err := scan(&name)
			tables = append(tables, name)
			return err
		}, `SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'goose_%' AND name NOT LIKE 'sqlite_%'`); err != nil {
			return err
		}
		for _, table := range sealedTables {
			rows, err := table.rows(t.Context(), tx, false)
			if err != nil {
				return err
			}
			if len(rows) == 0 {
				t.Errorf("%s has no row to try", table.name)
			}
			for _, r := range rows {
				if !bytes.Equal(r.stored, r.sum) || sums[string(r.sum)] != "" {
					t.Errorf("%s %s: checksum %x, want %x, of none but itself (%q)", table.what, r.about, r.stored, r.sum, sums[string(r.sum)])
				}
				sums[string(r.sum)] = table.name + r.about
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(tables) != len(sealedTables) {
		t.Errorf("there are the tables %v, and %d of them have checksums", tables, len(sealedTables))
	}
}

func TestAValueThatRotsIsNamedAtTheStart(t *testing.T) {
	for was, c := range map[string]struct{ now, about string }{
		"spiffe://example.org/ns/shop/sa/web": {"spiffe://example.org/ns/shop/sa/wec", `registration "web"`},
		"unix:uid:1000":                       {"unix:uid:1001", `a selector of registration "web"`},
		"file:k@1":                            {"file:k@3", `authority "a"`},
		"node-2":                              {"node-3", `join token "01"`},
		"east":                                {"easu", `the fact "cluster"`},
	} {
		t.Run(was, func(t *testing.T) {
			s := filled(t)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			data, err := os.ReadFile(s.path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Contains(data, []byte(was)) {
				t.Fatalf("%q is not in the file", was)
			}
			// Every copy of it, so that table and index agree.
			if err := os.WriteFile(s.path, bytes.ReplaceAll(data, []byte(was), []byte(c.now)), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, readOnly := range []bool{false, true} {
				got, err := Open(t.Context(), Config{Path: s.path, ReadOnly: readOnly})
				if err == nil {
					_ = got.Close()
				}
				oneSentence(t, err, c.about)
				oneSentence(t, err, "restore it from a backup")
			}
		})
	}
}

// An index that rots would hide a row from those who look for it by name.
func TestAnIndexThatRotsIsFound(t *testing.T) {
	s := filled(t)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	key := bytes.Repeat([]byte{0}, 31)
	key = append([]byte{1}, key...)
	if n := bytes.Count(data, key); n < 2 {
		t.Fatalf("the token's hash stands %d times in the file", n)
	}
	data[bytes.LastIndex(data, key)] ^= 2
	if err := os.WriteFile(s.path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), Config{Path: s.path})
	oneSentence(t, err, "damaged")
}

func TestADatabaseThatIsGoneIsNotWritable(t *testing.T) {
	for name, c := range map[string]struct {
		do    func(path string) error
		about string
	}{
		"deleted":    {os.Remove, "it is gone"},
		"its log is": {func(path string) error { return os.Remove(path + "-wal") }, "it is gone"},
		"moved":      {func(path string) error { return os.Rename(path, path+".old") }, "it is gone"},
		"another file": {func(path string) error {
			return errors.Join(os.Rename(path, path+".old"), os.WriteFile(path, nil, 0o600))
		}, "another file"},
		"another folder": {func(path string) error { return os.Rename(filepath.Dir(path), filepath.Dir(path)+".old") }, "it is gone"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			s := open(t, filepath.Join(dir, "state.db"))
			if err := s.Writable(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := c.do(s.path); err != nil {
				t.Fatal(err)
			}
			oneSentence(t, s.Writable(t.Context()), c.about)
		})
	}
}

func TestAProbeIsAWriteAndLeavesNoTrace(t *testing.T) {
	s := filled(t)
	for range 3 {
		if err := s.Writable(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	if _, revision, err := s.Registrations(t.Context()); revision != 1 || err != nil {
		t.Errorf("revision %d, %v", revision, err)
	}
	// A database that can be read only, which is what a file system becomes that meets an error.
	if _, err := s.db.ExecContext(t.Context(), `PRAGMA query_only(1)`); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Registrations(t.Context()); err != nil {
		t.Error(err)
	}
	oneSentence(t, s.Writable(t.Context()), "can't be written")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Writable(ctx); err == nil {
		t.Error("a probe that nobody waits for succeeded")
	}
}

func TestWhatSQLiteSaysIsExplained(t *testing.T) {
	cause := errors.New("cause")
	for code, about := range map[int]string{
		sqlitelib.SQLITE_FULL: "the disk is full", sqlitelib.SQLITE_IOERR_WRITE: "quota", sqlitelib.SQLITE_IOERR_FSYNC: "the disk does not take it",
		sqlitelib.SQLITE_READONLY_DBMOVED: "can't be written", sqlitelib.SQLITE_BUSY_SNAPSHOT: "another process", sqlitelib.SQLITE_CORRUPT_INDEX: "is damaged",
	} {
		err := explain(code, "/state.db", "keep agent n", cause)
		oneSentence(t, err, about)
		if !errors.Is(err, cause) || !strings.Contains(err.Error(), "/state.db") {
			t.Errorf("%d: %v", code, err)
		}
	}
}
