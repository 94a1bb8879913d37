package store

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/signet-ca/signet/identity"
)

// files of a folder, with what is in them.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, fmt.Sprintf("%s %x", e.Name(), data))
	}
	return all
}

func TestReadingOnlyChangesNothing(t *testing.T) {
	s := newStore(t)
	if err := s.SetMeta(t.Context(), "cluster", "east"); err != nil {
		t.Fatal(err)
	}
	read := func() {
		t.Helper()
		before := files(t, filepath.Dir(s.path))
		r, err := Open(t.Context(), Config{Path: s.path, ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		if v, _, err := r.Meta(t.Context(), "cluster"); v != "east" || err != nil {
			t.Errorf("it reads %q, %v", v, err)
		}
		if err := r.SetMeta(t.Context(), "instance", "east-1"); err == nil {
			t.Error("it can be written")
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		after := files(t, filepath.Dir(s.path))
		// The shared-memory index is a lock file; what it holds is of the moment.
		shm := func(f string) bool { return len(f) > 14 && f[:13] == "state.db-shm " }
		if !slices.Equal(slices.DeleteFunc(before, shm), slices.DeleteFunc(after, shm)) {
			t.Error("reading has changed the folder")
		}
	}
	// Beside a process that works on it, with what is in the write-ahead log alone; then at rest, as a copy.
	read()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(s.path, 0o444); err != nil {
		t.Fatal(err)
	}
	read()
}

func TestWhatCanNotBeReadIsNotMade(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	_, err := Open(t.Context(), Config{Path: path, ReadOnly: true})
	oneSentence(t, err, path, "can't be read")
	if _, err := os.Lstat(path); err == nil {
		t.Error("the file was made")
	}
}

func TestAnOlderSchemaIsBroughtUpToDateByWhoeverMayWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	if err := ownFile(path); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	p, err := provider(db)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.UpTo(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(t.Context(), `INSERT INTO agents (name, spki, banned, enrolled) VALUES ('node-1', x'01', true, 1)`); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), Config{Path: path, ReadOnly: true})
	oneSentence(t, err, path, "schema 1", "start the server")
	s := open(t, path)
	agents, err := s.Agents(t.Context())
	if err != nil || len(agents) != 1 || !agents[0].Banned || !agents[0].NotAfter.IsZero() {
		t.Errorf("agents are %v, %v", agents, err)
	}
}

func TestOldTokensAreForgottenAFewAtATime(t *testing.T) {
	s := newStore(t)
	add := func(i byte, expires time.Time, change func(context.Context) error) {
		t.Helper()
		if err := s.CreateToken(t.Context(), identity.Token{
			ID: fmt.Sprintf("%02x", i), Hash: [32]byte{i}, Agent: "node-1", Created: now.Add(time.Duration(i)), Expires: expires,
		}); err != nil {
			t.Fatal(err)
		}
		if change == nil {
			return
		}
		if err := change(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	hour := now.Add(time.Hour)
	add(1, hour, nil)
	add(2, hour, func(ctx context.Context) error {
		_, err := s.UseToken(ctx, [32]byte{2}, []byte{1}, now)
		return err
	})
	add(3, hour, func(ctx context.Context) error { return s.RevokeToken(ctx, "03", now) })
	add(4, now.Add(2*time.Hour), nil)
	for _, step := range []struct {
		before time.Time
		n      int
		left   []string
	}{
		{now, 0, []string{"04", "03", "02", "01"}},
		{now.Add(time.Minute), 2, []string{"04", "01"}},
		{hour, 0, []string{"04", "01"}},
		{hour.Add(1), 1, []string{"04"}},
	} {
		n, err := s.PurgeTokens(t.Context(), step.before, 2)
		all, lerr := s.ListTokens(t.Context())
		var left []string
		for _, token := range all {
			left = append(left, token.ID)
		}
		if err != nil || lerr != nil || n != step.n || !slices.Equal(left, step.left) {
			t.Errorf("before %s: %d went, %q are left, want %d and %q (%v, %v)", step.before, n, left, step.n, step.left, err, lerr)
		}
	}
	for i := range byte(3) {
		add(10+i, now, nil)
	}
	if n, err := s.PurgeTokens(t.Context(), hour, 2); n != 2 || err != nil {
		t.Errorf("%d went in one statement, want 2 (%v)", n, err)
	}
}
