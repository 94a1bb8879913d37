package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/internal/durable"
)

const (
	bansFile    = "bans.json"
	maxBansFile = 16 << 20
)

// banBook is the outbox of bans, a file of its own: a database that is away must not keep a banned agent in, nor a restart
// let it in again. A ban stands in it from before it is logged until the database has it.
type banBook struct {
	path string
	// log appends to the log.
	log func(ctx context.Context, entries ...*auditv1.Entry) error

	mu   sync.Mutex
	bans []pendingBan
}

// pendingBan is a ban that is not in the database yet. Entry is how it stands in the log.
type pendingBan struct {
	Agent string `json:"agent"`
	Entry []byte `json:"entry"`
	// logged: it holds.
	logged bool
}

// open reads what the last run left.
func (b *banBook) open(dir string) error {
	b.path = filepath.Join(dir, bansFile)
	err := durable.ReadValue(b.path, maxBansFile, &b.bans)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the bans that the state database did not have yet, %s: %w; ban those agents again once the file is out of the way", b.path, err)
	}
	return nil
}

// keep replaces the file. Called with mu held.
func (b *banBook) keep(bans []pendingBan) error {
	var err error
	if len(bans) == 0 {
		if err = os.Remove(b.path); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	} else {
		err = durable.WriteValue(b.path, bans, 0o600)
	}
	if err != nil {
		return fmt.Errorf("note a ban in %s: %w", b.path, err)
	}
	b.bans = bans
	return nil
}

// holds logs the bans that are not logged yet and calls effect for each that now is. Called with mu held.
func (b *banBook) holds(ctx context.Context, effect func(agent string)) error {
	for i := range b.bans {
		ban := &b.bans[i]
		if ban.logged {
			continue
		}
		var e auditv1.Entry
		if err := proto.Unmarshal(ban.Entry, &e); err != nil {
			return fmt.Errorf("the ban of %s in %s can't be read: %w", ban.Agent, b.path, err)
		}
		if err := b.log(ctx, &e); err != nil {
			return fmt.Errorf("%w: %w", errNotLogged, err)
		}
		ban.logged = true
		effect(ban.Agent)
	}
	return nil
}

// add keeps a ban, logs it and calls effect.
func (b *banBook) add(ctx context.Context, agent string, entry []byte, effect func(agent string)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.ContainsFunc(b.bans, func(p pendingBan) bool { return p.Agent == agent }) {
		if err := b.keep(append(slices.Clone(b.bans), pendingBan{Agent: agent, Entry: entry})); err != nil {
			return err
		}
	}
	if err := b.holds(ctx, effect); err != nil {
		return fmt.Errorf("the ban of agent %s is noted and holds as soon as it is logged, not before: %w", agent, err)
	}
	return nil
}

// stored takes out the bans of these agents, as far as they hold.
func (b *banBook) stored(agents []string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	left := slices.DeleteFunc(slices.Clone(b.bans), func(p pendingBan) bool { return p.logged && slices.Contains(agents, p.Agent) })
	if len(left) == len(b.bans) {
		return nil
	}
	return b.keep(left)
}

// waiting names the agents whose ban does not hold yet.
func (b *banBook) waiting() []string {
	if !b.mu.TryLock() {
		return nil // about to hold, or not
	}
	defer b.mu.Unlock()
	var all []string
	for _, p := range b.bans {
		if !p.logged {
			all = append(all, p.Agent)
		}
	}
	return all
}

// takeUpBans makes hold what the last run had noted.
func (s *Server) takeUpBans(ctx context.Context) error {
	if err := s.banBook.open(s.config.Dir); err != nil {
		return err
	}
	s.banBook.mu.Lock()
	defer s.banBook.mu.Unlock()
	return s.banBook.holds(ctx, s.directory.ban)
}

// banHolds is the effect of a ban.
func (s *Server) banHolds(agent string) {
	s.directory.ban(agent)
	s.conns.cut(agent, banMoment)
}

// holdBans makes hold, for upkeep, what could not be logged when it was asked for.
func (s *Server) holdBans(ctx context.Context) {
	if len(s.banBook.waiting()) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, workTimeout)
	defer cancel()
	s.banBook.mu.Lock()
	defer s.banBook.mu.Unlock()
	if err := s.banBook.holds(ctx, s.banHolds); err != nil {
		s.log.Error("A BAN DOES NOT HOLD YET: the log can't be written", "err", err)
	}
}
