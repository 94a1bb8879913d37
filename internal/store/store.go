// Package store keeps a cluster's durable state: who may ask (agents, registrations, join tokens), which authorities there
// are, what the trust domain believes, and whose folder this is. What was issued is in the audit log, not here.
//
// It is one SQLite file. The schema and every statement are plain SQL that PostgreSQL understands too; what is SQLite's own
// is in sqlite.go. Every write is one transaction and durable when its method returns.
package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/signet-ca/signet/identity"
)

// Config says where the state is.
type Config struct {
	// Path of the database file; it is made, with mode 0600, when it does not exist. Its folder must.
	Path string
	// ReadOnly opens a file that is there, also on a file system that can't be written to, beside a server that works on
	// it, or one that belongs to somebody else. Nothing is changed, the schema neither.
	ReadOnly bool
	Logger   *slog.Logger
}

// Store is a cluster's state. Its methods may be called at the same time.
type Store struct {
	db   *sql.DB
	path string
	// file is what was opened: another one may lie at the path later.
	file fs.FileInfo
	// note goes with what is written, see Telling.
	note *Note
}

var _ identity.TokenStore = (*Store)(nil)

// Errors that callers tell apart.
var (
	// ErrConflict says that somebody else has changed the set since it was read.
	ErrConflict = errors.New("changed by somebody else meanwhile; read it again and repeat")
	// ErrTokenUsed says that there is nothing left to revoke.
	ErrTokenUsed = errors.New("revoking it changes nothing")
	// ErrNotFound says that there is no such row.
	ErrNotFound = errors.New("not found")
	// ErrFixed says that a fact about the folder was to be changed.
	ErrFixed = errors.New("a state folder belongs to one cluster for ever; use another folder")
)

// Agent is an enrolled agent.
type Agent struct {
	identity.AgentRow
	// LastSeen is zero for an agent that was never seen after it enrolled.
	Enrolled, LastSeen time.Time
	// NotAfter is the end of the newest certificate it was given, zero if none was noted.
	NotAfter time.Time
}

// Close releases the file.
func (s *Store) Close() error {
	if err := s.db.Close(); err != nil {
		return failed(s.path, "close it", err)
	}
	return nil
}

// write runs f in a transaction that is durable when write returns nil; f's own refusals pass unchanged.
func (s *Store) write(ctx context.Context, what string, f func(tx *sql.Tx) error) error {
	return s.transact(ctx, nil, what, func(tx *sql.Tx) error {
		if err := f(tx); err != nil || s.note == nil {
			return err
		}
		return s.note.put(ctx, tx)
	})
}

// read runs f on one consistent state.
func (s *Store) read(ctx context.Context, what string, f func(tx *sql.Tx) error) error {
	return s.transact(ctx, &sql.TxOptions{ReadOnly: true}, what, f)
}

func (s *Store) transact(ctx context.Context, opts *sql.TxOptions, what string, f func(tx *sql.Tx) error) error {
	tx, err := s.db.BeginTx(ctx, opts)
	if err != nil {
		return failed(s.path, what, err)
	}
	defer tx.Rollback() //nolint:errcheck // after a commit it does nothing
	if err := f(tx); err != nil {
		return failed(s.path, what, err)
	}
	if opts == nil {
		if err := seal(ctx, tx); err != nil {
			return failed(s.path, what, err)
		}
	}
	if err := tx.Commit(); err != nil {
		return failed(s.path, what, err)
	}
	return nil
}

// query calls each for every row.
func query(ctx context.Context, tx *sql.Tx, each func(scan func(...any) error) error, text string, args ...any) error {
	rows, err := tx.QueryContext(ctx, text, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := each(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// refusal is an error that says all there is to say; failed adds nothing to it.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

func refuse(format string, args ...any) error { return refusal{fmt.Errorf(format, args...)} }

// Agents returns all enrolled agents, by name.
func (s *Store) Agents(ctx context.Context) ([]Agent, error) {
	var all []Agent
	err := s.read(ctx, "read the agents", func(tx *sql.Tx) error {
		return query(ctx, tx, func(scan func(...any) error) error {
			var a Agent
			var enrolled int64
			var seen, end sql.NullInt64
			if err := scan(&a.Name, &a.SPKI, &a.Banned, &enrolled, &seen, &end); err != nil {
				return err
			}
			a.Enrolled, a.LastSeen, a.NotAfter = fromNano(enrolled), fromNullNano(seen), fromNullNano(end)
			all = append(all, a)
			return nil
		}, `SELECT name, spki, banned, enrolled, last_seen, not_after FROM agents ORDER BY name`)
	})
	return all, err
}

// PutAgent adds the agent or replaces the row of that name as a whole. Whoever changes one part of a row must see to it
// that nobody changes another meanwhile.
func (s *Store) PutAgent(ctx context.Context, a Agent) error {
	if err := identity.ParseName("agent", a.Name); err != nil {
		return err
	}
	if len(a.SPKI) == 0 || a.Enrolled.IsZero() {
		return fmt.Errorf("agent %s: a row needs the enrolled key and the time of enrolment", a.Name)
	}
	return s.write(ctx, "keep agent "+a.Name, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO agents (name, spki, banned, enrolled, last_seen, not_after) VALUES ($1, $2, $3, $4, $5, $6)
			ON CONFLICT (name) DO UPDATE SET spki = excluded.spki, banned = excluded.banned,
				enrolled = excluded.enrolled, last_seen = excluded.last_seen, not_after = excluded.not_after`,
			a.Name, a.SPKI, a.Banned, a.Enrolled.UnixNano(), toNullNano(a.LastSeen), toNullNano(a.NotAfter))
		return err
	})
}

// Registrations returns the whole set, by name, and its revision. The revision of the empty set that nobody has touched is 0.
// A row that no longer passes identity.Registration.Validate is an error: nothing of a set that was edited by hand is believed.
func (s *Store) Registrations(ctx context.Context) ([]identity.Registration, uint64, error) {
	var all []identity.Registration
	var revision uint64
	err := s.read(ctx, "read the registrations", func(tx *sql.Tx) (err error) {
		all, revision, err = registrations(ctx, tx)
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	return all, revision, nil
}

func registrations(ctx context.Context, tx *sql.Tx) ([]identity.Registration, uint64, error) {
	var revision uint64
	if err := tx.QueryRowContext(ctx, `SELECT value FROM revisions WHERE name = 'registrations'`).Scan(&revision); err != nil {
		return nil, 0, err
	}
	var all []identity.Registration
	at := map[string]int{}
	err := query(ctx, tx, func(scan func(...any) error) error {
		var r identity.Registration
		var id string
		if err := scan(&r.Name, &id, &r.TTL, &r.Priority, &r.Revision); err != nil {
			return err
		}
		var err error
		if r.ID, err = identity.ParseID(id); err != nil {
			return refuse("stored registration %s: %w", r.Name, err)
		}
		at[r.Name] = len(all)
		all = append(all, r)
		return nil
	}, `SELECT name, spiffe_id, ttl, priority, revision FROM registrations ORDER BY name`)
	if err != nil {
		return nil, 0, err
	}
	parts := func(text string, add func(r *identity.Registration, part string)) error {
		return query(ctx, tx, func(scan func(...any) error) error {
			var name, part string
			if err := scan(&name, &part); err != nil {
				return err
			}
			i, ok := at[name]
			if !ok {
				return refuse("the parts of registration %s are stored without it", name)
			}
			add(&all[i], part)
			return nil
		}, text)
	}
	if err := parts(`SELECT registration, agent FROM registration_agents`, func(r *identity.Registration, part string) {
		r.Agents = append(r.Agents, part)
	}); err != nil {
		return nil, 0, err
	}
	if err := parts(`SELECT registration, selector FROM registration_selectors`, func(r *identity.Registration, part string) {
		r.Selectors = append(r.Selectors, identity.Selector(part))
	}); err != nil {
		return nil, 0, err
	}
	for i := range all {
		if err := all[i].Validate(all[i].ID.TrustDomain()); err != nil {
			return nil, 0, refuse("stored %w", err)
		}
	}
	return all, revision, nil
}

// ApplyRegistrations changes the set in one transaction and returns its new revision, which is also that of each registration
// that changed. It is refused with ErrConflict unless the set is still at baseRevision. What is put as it already stands, and
// names to delete that are not there, change nothing; a call that changes nothing keeps the revision.
func (s *Store) ApplyRegistrations(ctx context.Context, baseRevision uint64, put []identity.Registration, del []string) (uint64, error) {
	put = slices.Clone(put)
	seen := map[string]bool{}
	for i := range put {
		put[i].Agents, put[i].Selectors = slices.Clone(put[i].Agents), slices.Clone(put[i].Selectors)
		if err := put[i].Validate(put[i].ID.TrustDomain()); err != nil {
			return 0, err
		}
		if seen[put[i].Name] {
			return 0, fmt.Errorf("registration %s is given twice", put[i].Name)
		}
		seen[put[i].Name] = true
	}
	for _, name := range del {
		if seen[name] {
			return 0, fmt.Errorf("registration %s is both to be put and to be deleted", name)
		}
	}
	revision := baseRevision
	err := s.write(ctx, "apply registrations", func(tx *sql.Tx) error {
		all, current, err := registrations(ctx, tx)
		if err != nil {
			return err
		}
		if current != baseRevision {
			return refuse("apply registrations on revision %d: the set is at revision %d: %w", baseRevision, current, ErrConflict)
		}
		stand := make(map[string]identity.Registration, len(all))
		for _, r := range all {
			stand[r.Name] = r
		}
		changed := false
		next := baseRevision + 1
		for _, name := range del {
			if _, ok := stand[name]; !ok {
				continue
			}
			changed = true
			if _, err := tx.ExecContext(ctx, `DELETE FROM registrations WHERE name = $1`, name); err != nil {
				return err
			}
		}
		for _, r := range put {
			if old, ok := stand[r.Name]; ok && sameRegistration(old, r) {
				continue
			}
			changed = true
			if err := putRegistration(ctx, tx, r, next); err != nil {
				return err
			}
		}
		if !changed {
			return nil
		}
		// Compared once more in the statement itself, which is what counts where transactions run side by side.
		n, err := affected(tx.ExecContext(ctx, `UPDATE revisions SET value = $1 WHERE name = 'registrations' AND value = $2`,
			int64(next), int64(baseRevision)))
		if err != nil {
			return err
		}
		if n != 1 {
			return refuse("apply registrations on revision %d: %w", baseRevision, ErrConflict)
		}
		revision = next
		return nil
	})
	if err != nil {
		return 0, err
	}
	return revision, nil
}

func sameRegistration(a, b identity.Registration) bool {
	return a.ID == b.ID && a.TTL == b.TTL && a.Priority == b.Priority &&
		slices.Equal(a.Agents, b.Agents) && slices.Equal(a.Selectors, b.Selectors)
}

func putRegistration(ctx context.Context, tx *sql.Tx, r identity.Registration, revision uint64) error {
	if _, err := tx.ExecContext(ctx, `DELETE FROM registrations WHERE name = $1`, r.Name); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO registrations (name, spiffe_id, ttl, priority, revision) VALUES ($1, $2, $3, $4, $5)`,
		r.Name, r.ID.String(), int64(r.TTL), r.Priority, int64(revision)); err != nil {
		return err
	}
	for _, a := range r.Agents {
		if _, err := tx.ExecContext(ctx, `INSERT INTO registration_agents (registration, agent) VALUES ($1, $2)`, r.Name, a); err != nil {
			return err
		}
	}
	for _, sel := range r.Selectors {
		if _, err := tx.ExecContext(ctx, `INSERT INTO registration_selectors (registration, selector) VALUES ($1, $2)`, r.Name, string(sel)); err != nil {
			return err
		}
	}
	return nil
}

// CreateToken keeps a new join token.
func (s *Store) CreateToken(ctx context.Context, t identity.Token) error {
	return s.write(ctx, "keep join token "+t.ID, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO join_tokens (hash, id, agent, created, expires) VALUES ($1, $2, $3, $4, $5)`,
			t.Hash[:], t.ID, t.Agent, t.Created.UnixNano(), t.Expires.UnixNano())
		return err
	})
}

// UseToken spends the token with this hash for a key, see identity.TokenStore, and enrols its agent with that key in the same
// transaction: a row that is there keeps its ban. Of a key that comes again nothing is written, and no note is taken.
func (s *Store) UseToken(ctx context.Context, hash [32]byte, key []byte, now time.Time) (identity.Token, error) {
	var t identity.Token
	// What goes with it depends on whose token it is.
	bare := *s
	bare.note = nil
	err := bare.write(ctx, "use a join token", func(tx *sql.Tx) error {
		// One statement decides who wins; looking first and marking afterwards let one token in twice elsewhere.
		n, err := affected(tx.ExecContext(ctx, `UPDATE join_tokens SET used = $1, used_by = $2
			WHERE hash = $3 AND used IS NULL AND revoked IS NULL AND expires > $4`, now.UnixNano(), key, hash[:], now.UnixNano()))
		if err != nil {
			return err
		}
		found := false
		if err := query(ctx, tx, func(scan func(...any) error) error {
			found = true
			return scanToken(scan, &t)
		}, selectTokens+` WHERE hash = $1`, hash[:]); err != nil {
			return err
		}
		if n == 1 && found {
			return s.enrol(ctx, tx, t, key, now)
		}
		u := &identity.UnusableToken{Reason: "unknown"}
		if found {
			u.ID, u.Agent = t.ID, t.Agent
			again, err := usedBy(ctx, tx, t, key)
			switch {
			case err != nil:
				return err
			case again && now.Before(t.Expires):
				return nil
			case !t.Used.IsZero():
				u.Reason = "used"
			case !t.Revoked.IsZero():
				u.Reason = "revoked"
			default:
				u.Reason = "expired"
			}
		}
		return refusal{u}
	})
	if err != nil {
		return identity.Token{}, err
	}
	return t, nil
}

// enrol writes the agent's row of a token that was just spent, and what the log is told.
func (s *Store) enrol(ctx context.Context, tx *sql.Tx, t identity.Token, key []byte, now time.Time) error {
	if _, err := tx.ExecContext(ctx, `INSERT INTO agents (name, spki, banned, enrolled, last_seen) VALUES ($1, $2, $3, $4, $5)
		ON CONFLICT (name) DO UPDATE SET spki = excluded.spki, enrolled = excluded.enrolled, last_seen = excluded.last_seen, not_after = NULL`,
		t.Agent, key, false, now.UnixNano(), now.UnixNano()); err != nil {
		return err
	}
	if s.note == nil {
		return nil
	}
	if s.note.OfToken != nil {
		if err := s.note.OfToken(t); err != nil {
			return refusal{err}
		}
	}
	return s.note.put(ctx, tx)
}

// usedBy reports whether a token was used by this key, and its agent is still enrolled with it.
func usedBy(ctx context.Context, tx *sql.Tx, t identity.Token, key []byte) (bool, error) {
	var n int
	err := tx.QueryRowContext(ctx, `SELECT COUNT(*) FROM join_tokens JOIN agents ON agents.name = join_tokens.agent
		WHERE join_tokens.hash = $1 AND join_tokens.used_by = $2 AND agents.spki = $3`, t.Hash[:], key, key).Scan(&n)
	return n == 1, err
}

// PurgeTokens forgets, of the tokens that were used, revoked or had expired before that time, as many as may go in one
// statement, and returns how many those were.
func (s *Store) PurgeTokens(ctx context.Context, before time.Time, most int) (int, error) {
	var n int64
	err := s.write(ctx, "forget old join tokens", func(tx *sql.Tx) (err error) {
		n, err = affected(tx.ExecContext(ctx, `DELETE FROM join_tokens WHERE hash IN (
			SELECT hash FROM join_tokens WHERE COALESCE(used, revoked, expires) < $1 ORDER BY created LIMIT $2)`, before.UnixNano(), most))
		return err
	})
	if err != nil {
		return 0, err
	}
	return int(n), nil
}

// ListTokens returns the tokens that are kept, newest first.
func (s *Store) ListTokens(ctx context.Context) ([]identity.Token, error) {
	var all []identity.Token
	err := s.read(ctx, "read the join tokens", func(tx *sql.Tx) error {
		return query(ctx, tx, func(scan func(...any) error) error {
			var t identity.Token
			if err := scanToken(scan, &t); err != nil {
				return err
			}
			all = append(all, t)
			return nil
		}, selectTokens+` ORDER BY created DESC, id`)
	})
	return all, err
}

// RevokeToken makes the token useless. One that is revoked already stays as it is; one that was used can't be revoked any more.
func (s *Store) RevokeToken(ctx context.Context, id string, now time.Time) error {
	return s.write(ctx, "revoke join token", func(tx *sql.Tx) error {
		n, err := affected(tx.ExecContext(ctx, `UPDATE join_tokens SET revoked = $1 WHERE id = $2 AND used IS NULL AND revoked IS NULL`,
			now.UnixNano(), id))
		if err != nil || n == 1 {
			return err
		}
		var t identity.Token
		found := false
		if err := query(ctx, tx, func(scan func(...any) error) error {
			found = true
			return scanToken(scan, &t)
		}, selectTokens+` WHERE id = $1`, id); err != nil {
			return err
		}
		switch {
		case !found:
			return refuse("revoke join token %.32q: %w; `signet join-token list` shows those there are", id, ErrNotFound)
		case !t.Used.IsZero():
			return refuse("join token %s was used at %s: agent %s has enrolled with it, %w",
				id, t.Used.Format(time.RFC3339), t.Agent, ErrTokenUsed)
		}
		return nil
	})
}

const selectTokens = `SELECT hash, id, agent, created, expires, used, revoked FROM join_tokens`

func scanToken(scan func(...any) error, t *identity.Token) error {
	var hash []byte
	var created, expires int64
	var used, revoked sql.NullInt64
	if err := scan(&hash, &t.ID, &t.Agent, &created, &expires, &used, &revoked); err != nil {
		return err
	}
	if copy(t.Hash[:], hash) != len(t.Hash) || len(hash) != len(t.Hash) {
		return refuse("stored join token %s has a hash of %d bytes, want %d", t.ID, len(hash), len(t.Hash))
	}
	t.Created, t.Expires = fromNano(created), fromNano(expires)
	t.Used, t.Revoked = fromNullNano(used), fromNullNano(revoked)
	return nil
}

// Meta returns a fact about the folder, and whether it is there.
func (s *Store) Meta(ctx context.Context, key string) (string, bool, error) {
	var value string
	var ok bool
	err := s.read(ctx, "read "+key, func(tx *sql.Tx) error {
		err := tx.QueryRowContext(ctx, `SELECT value FROM meta WHERE key = $1`, key).Scan(&value)
		ok = err == nil
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		return err
	})
	return value, ok && err == nil, err
}

// SetMeta writes a fact about the folder (trust_domain, cluster, instance) once. The same value again changes nothing,
// another one is ErrFixed.
func (s *Store) SetMeta(ctx context.Context, key, value string) error {
	return s.write(ctx, "keep "+key, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING`, key, value); err != nil {
			return err
		}
		var stands string
		if err := tx.QueryRowContext(ctx, `SELECT value FROM meta WHERE key = $1`, key).Scan(&stands); err != nil {
			return err
		}
		return s.fixed(key, stands, value)
	})
}

// MayMeta refuses what SetMeta would refuse, and writes nothing.
func (s *Store) MayMeta(ctx context.Context, key, value string) error {
	stands, ok, err := s.Meta(ctx, key)
	if err != nil || !ok {
		return err
	}
	return s.fixed(key, stands, value)
}

func (s *Store) fixed(key, stands, value string) error {
	if stands == value {
		return nil
	}
	return refuse("state database %s was made for %s %q, not %.256q: %w", s.path, strings.ReplaceAll(key, "_", " "), stands, value, ErrFixed)
}

// ReplaceMeta keeps a fact that changes, in place of what it was.
func (s *Store) ReplaceMeta(ctx context.Context, key, value string) error {
	return s.write(ctx, "keep the fact "+key, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value`, key, value)
		return err
	})
}

func affected(r sql.Result, err error) (int64, error) {
	if err != nil {
		return 0, err
	}
	return r.RowsAffected()
}

func fromNano(n int64) time.Time { return time.Unix(0, n).UTC() }

func fromNullNano(n sql.NullInt64) time.Time {
	if !n.Valid {
		return time.Time{}
	}
	return fromNano(n.Int64)
}

func toNullNano(t time.Time) sql.NullInt64 {
	return sql.NullInt64{Int64: t.UnixNano(), Valid: !t.IsZero()}
}
