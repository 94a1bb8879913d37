package server

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
)

// outbox is how a change and its entries in the log come to be together, although they lie in two files:
//
//  1. the change and its entries are committed to the database, in one transaction;
//  2. the entries are appended to the log;
//  3. the change takes effect: it is in memory, and whoever asked for it is answered;
//  4. the database forgets the entries.
//
// An issuer that is to stop signing goes on until step 3, however long that takes: what bounds the life of its leaves is moved
// on before step 4.
//
// Whatever ends this early leaves entries in the database. They are settled before the next change and at every start: they
// are appended, as they were, and then what the database holds is in effect. So nothing takes effect unlogged, nothing that
// is logged is undone, and a revision has one content. An entry may be in the log twice, byte for byte.
type outbox struct {
	// log and told are steps 2 and 4.
	log  func(ctx context.Context, entries ...*auditv1.Entry) error
	told func(ctx context.Context, change uint64) error
	// waiting: entries may be in the database, or it may hold what memory does not.
	waiting atomic.Bool
	// logged are the changes that are in the log although the database has not forgotten their entries. It belongs to
	// whoever has the turn to write.
	logged map[uint64]bool
}

// stamped is what the log will be told, with the time of now.
func (s *Server) stamped(entries ...*auditv1.Entry) ([][]byte, error) {
	all := make([][]byte, len(entries))
	now := s.now().UnixNano()
	for i, e := range entries {
		e.Time = now
		raw, err := proto.Marshal(e)
		if err != nil {
			return nil, fmt.Errorf("encode an entry of the log: %w", err)
		}
		all[i] = raw
	}
	return all, nil
}

// change makes a change by the steps of outbox. commit writes through the store that it is given. After an error the change
// was refused, or it waits for the log and takes effect when that can be written; the error says which.
func (s *Server) change(ctx context.Context, note *store.Note, commit func(*store.Store) error, effect func()) error {
	if err := s.usable(); err != nil {
		return err
	}
	done, err := s.directory.toWrite(ctx)
	if err != nil {
		return err
	}
	defer done()
	if err := s.settle(ctx); err != nil {
		return fmt.Errorf("an earlier change waits to be settled, so nothing was changed: %w", err)
	}
	if err := commit(s.store.Telling(note)); err != nil {
		// A commit that failed may be found done after all, a refusal not.
		if !errors.As(err, new(*refusal)) && !errors.Is(err, identity.ErrTokenUnusable) {
			s.outbox.waiting.Store(true)
		}
		return err
	}
	if note.Change == 0 {
		return nil
	}
	if err := s.tellLog(ctx, note); err != nil {
		s.outbox.waiting.Store(true)
		return fmt.Errorf("the change is stored and takes effect as soon as it is logged, not before: %w", err)
	}
	effect()
	if stopped, at := stoppedBy(*note); len(stopped) > 0 && s.now().Sub(at) > s.keeper.inTime() {
		s.outbox.waiting.Store(true)
		if err := s.settle(ctx); err != nil {
			s.log.Warn("a change is in effect, later than was foreseen, and how long leaves live could not be noted yet: nothing else is changed before that", "err", err)
		}
		return nil
	}
	s.forgetNote(ctx, note.Change)
	return nil
}

// usable refuses a change that the log could not be told. A dry run asks it too.
func (s *Server) usable() error {
	if err := s.audit.Usable(); err != nil {
		return fmt.Errorf("%w, so nothing was changed: %w", errNotLogged, err)
	}
	return nil
}

// stoppedBy names the issuers that stop signing by a change, and says when it was decided.
func stoppedBy(note store.Note) (issuers []string, decided time.Time) {
	entries, err := entriesOf(note)
	if err != nil {
		return nil, time.Time{} // it would not have been logged
	}
	for _, e := range entries {
		if x := e.GetAuthorityChanged(); x.GetKind() == ca.KindIntermediate && x.GetFrom() == string(ca.Active) && x.GetTo() != string(ca.Active) {
			issuers, decided = append(issuers, x.GetAuthority()), time.Unix(0, e.GetTime())
		}
	}
	return issuers, decided
}

// entriesOf reads the entries of a note.
func entriesOf(note store.Note) ([]*auditv1.Entry, error) {
	entries := make([]*auditv1.Entry, len(note.Entries))
	for i, raw := range note.Entries {
		entries[i] = &auditv1.Entry{}
		if err := proto.Unmarshal(raw, entries[i]); err != nil {
			return nil, fmt.Errorf("stored entry %d of change %d for the log can't be read: %w", i, note.Change, err)
		}
	}
	return entries, nil
}

func (s *Server) tellLog(ctx context.Context, note *store.Note) error {
	entries, err := entriesOf(*note)
	if err != nil {
		return err
	}
	if err := s.outbox.log(ctx, entries...); err != nil {
		return fmt.Errorf("%w: %w", errNotLogged, err)
	}
	s.outbox.logged[note.Change] = true
	return nil
}

// forgetNote is the last step. A change is whole without it.
func (s *Server) forgetNote(ctx context.Context, change uint64) {
	if err := s.outbox.told(ctx, change); err != nil {
		s.outbox.waiting.Store(true)
		s.log.Warn("a change is logged and in effect, but the state database could not note that", "err", err)
		return
	}
	delete(s.outbox.logged, change)
}

// settle tells the log what it has not been told, and takes into effect what the store holds. The caller has the turn to write.
func (s *Server) settle(ctx context.Context) error {
	if !s.outbox.waiting.Load() {
		return nil
	}
	var changes []uint64
	var stopped []string
	for last := uint64(0); ; changes = append(changes, last) {
		note, ok, err := s.store.NextNote(ctx, last)
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		if !s.outbox.logged[note.Change] {
			if err := s.tellLog(ctx, &note); err != nil {
				return err
			}
		}
		last = note.Change
		issuers, _ := stoppedBy(note)
		stopped = append(stopped, issuers...)
	}
	if err := s.directory.reload(ctx); err != nil {
		return err
	}
	if err := s.keeper.load(ctx); err != nil {
		return err
	}
	if extended, err := s.store.ExtendLeaves(ctx, stopped, s.keeper.policy.LeavesUntil(s.now())); err != nil {
		return err
	} else if extended {
		if err := s.keeper.load(ctx); err != nil {
			return err
		}
	}
	for _, change := range changes {
		if err := s.outbox.told(ctx, change); err != nil {
			return err
		}
		delete(s.outbox.logged, change)
	}
	s.outbox.waiting.Store(false)
	if len(changes) > 0 {
		s.log.Warn("changes that had been interrupted are settled: they are in the log and in effect", "changes", len(changes))
	}
	return nil
}

// settleNow settles what waits, if anything does.
func (s *Server) settleNow(ctx context.Context) error {
	if !s.outbox.waiting.Load() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, workTimeout)
	defer cancel()
	done, err := s.directory.toWrite(ctx)
	if err != nil {
		return err
	}
	defer done()
	return s.settle(ctx)
}

// settleLater is settleNow for upkeep.
func (s *Server) settleLater(ctx context.Context) {
	if err := s.settleNow(ctx); err != nil {
		s.log.Error("a change waits for the log and is not in effect yet", "err", err)
	}
}

// startOutbox settles what the last run left: the doors are closed still, so nobody sees anything in between.
func (s *Server) startOutbox(ctx context.Context) error {
	s.outbox.waiting.Store(true)
	done, err := s.directory.toWrite(ctx)
	if err != nil {
		return err
	}
	defer done()
	if err := s.settle(ctx); err != nil {
		return fmt.Errorf("settle what the last run left: %w", err)
	}
	return s.takeUpBans(ctx)
}

// errWaiting shows in readiness: something that an admin asked for is not in effect.
var errWaiting = errors.New("a change waits for the log and is not in effect yet")

func (s *Server) settled() error {
	if s.outbox.waiting.Load() {
		return errWaiting
	}
	return nil
}
