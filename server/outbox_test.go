package server

import (
	"context"
	"crypto/ecdsa"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/test/doors"
)

// image copies a cluster's folder as a kill at this moment would leave it. Nobody may be writing but the log's checkpoints.
func (c *cluster) image(t testing.TB, s *Server) *cluster {
	t.Helper()
	to, err := c.imageIn(t.Context(), shortDir(t), s)
	must(t, err)
	return to
}

func (c *cluster) imageIn(ctx context.Context, dir string, s *Server) (*cluster, error) {
	quiet := 0
	for last := ""; quiet < 4; time.Sleep(50 * time.Millisecond) {
		cp, err := s.audit.Checkpoint(ctx)
		if err != nil {
			return nil, err
		}
		if quiet++; string(cp) != last {
			quiet, last = 0, string(cp)
		}
	}
	to := &cluster{name: c.name, dir: dir, root: c.root, keys: c.keys}
	return to, filepath.WalkDir(c.dir, func(path string, e fs.DirEntry, err error) error {
		var info fs.FileInfo
		if err == nil {
			info, err = e.Info()
		}
		rel, _ := filepath.Rel(c.dir, path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // what is written beside a file and then renamed may be gone
		case err != nil:
			return err
		case e.IsDir():
			return os.MkdirAll(filepath.Join(to.dir, rel), info.Mode().Perm())
		case !info.Mode().IsRegular():
			return nil
		}
		raw, err := os.ReadFile(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		}
		return os.WriteFile(filepath.Join(to.dir, rel), raw, info.Mode().Perm())
	})
}

// steps takes an image of the folder before and after each step of a change.
func (c *cluster) steps(t testing.TB, s *Server) map[string]*cluster {
	return c.named(t, s, func(step string, _ int) string { return step })
}

// named is steps where an action is several changes: each step is kept under the name it is given.
func (c *cluster) named(t testing.TB, s *Server, name func(step string, n int) string) map[string]*cluster {
	images := map[string]*cluster{}
	n := 0
	// It runs in the server's goroutines, which must go on whatever becomes of the copy: somebody waits for their answer.
	take := func(as string) {
		to, err := c.imageIn(context.WithoutCancel(t.Context()), shortDir(t), s)
		if err != nil {
			t.Errorf("an image %s: %v", as, err)
			return
		}
		images[as] = to
	}
	around := func(step string, f func() error) error {
		n++
		take(name("before "+step, n))
		err := f()
		take(name("after "+step, n))
		return err
	}
	log, told := s.outbox.log, s.outbox.told
	s.outbox.log = func(ctx context.Context, e ...*auditv1.Entry) error {
		return around("log", func() error { return log(ctx, e...) })
	}
	s.banBook.log = s.outbox.log
	s.outbox.told = func(ctx context.Context, n uint64) error {
		return around("told", func() error { return told(ctx, n) })
	}
	return images
}

// distinct are the entries of a kind; what is there twice must be the same byte for byte.
func distinct(t testing.TB, c *cluster, pick func(*auditv1.Entry) bool) (all []*auditv1.Entry) {
	t.Helper()
	seen := map[string]bool{}
	for _, e := range logged(t, c) {
		if pick(e) && !seen[e.String()] {
			seen[e.String()] = true
			all = append(all, e)
		}
	}
	return all
}

func TestAKillAtAnyStepOfAChangeHealsAtStart(t *testing.T) {
	t.Parallel()
	a, b := registration("a", "node-1"), registration("b", "node-1")
	for name, change := range map[string]struct {
		do func(s *live)
		// holds reports whether the change is in effect.
		holds func(s *live) bool
		pick  func(*auditv1.Entry) bool
	}{
		"registration": {
			func(s *live) { s.apply(false, a) },
			func(s *live) bool { _, ok := s.directory.Registration("a"); return ok },
			func(e *auditv1.Entry) bool { return strings.Contains(e.GetRegistrationChanged().GetAfter(), `"a"`) },
		},
		"revoked token": {
			func(s *live) {
				list, err := s.admin().ListJoinTokens(s.t.Context(), &adminv1.ListJoinTokensRequest{})
				must(s.t, err)
				i := slices.IndexFunc(list.Tokens, func(i *adminv1.JoinTokenInfo) bool { return i.Agent == "node-2" })
				_, err = s.admin().RevokeJoinToken(s.t.Context(), &adminv1.RevokeJoinTokenRequest{Id: list.Tokens[i].Id})
				must(s.t, err)
			},
			func(s *live) bool {
				all, err := s.store.ListTokens(s.t.Context())
				must(s.t, err)
				return !all[0].Revoked.IsZero()
			},
			func(e *auditv1.Entry) bool { return e.GetJoinTokenRevoked() != nil },
		},
		"ban": {
			func(s *live) { s.ban("node-1") },
			func(s *live) bool { row, _ := s.directory.Agent("node-1"); return row.Banned },
			func(e *auditv1.Entry) bool { return e.GetAgentBanned().GetAgent() == "node-1" },
		},
		"lifted ban": {
			func(s *live) {
				_, err := s.admin().UnbanAgent(s.t.Context(), &adminv1.UnbanAgentRequest{Agent: "node-3"})
				must(s.t, err)
			},
			func(s *live) bool { row, _ := s.directory.Agent("node-3"); return !row.Banned },
			func(e *auditv1.Entry) bool { return e.GetAgentUnbanned() != nil },
		},
		"enrolment": {
			func(s *live) { s.enrol("node-4") },
			func(s *live) bool { _, ok := s.directory.Agent("node-4"); return ok },
			func(e *auditv1.Entry) bool { return e.GetAgentEnrolled().GetAgent() == "node-4" },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, "east")
			s := c.start(t, nil)
			s.enrol("node-1")
			s.enrol("node-3")
			s.ban("node-3")
			s.token("node-2")
			images := c.steps(t, s.Server)
			change.do(s)
			must(t, s.stop())
			if len(images) < 2 {
				t.Fatalf("steps seen: %d", len(images))
			}
			for step, image := range images {
				s := image.start(t, nil)
				if !change.holds(s) {
					t.Errorf("killed %s: the change is not in effect", step)
				}
				if s.outbox.waiting.Load() {
					t.Errorf("killed %s: something waits still", step)
				}
				r := s.apply(false, b)
				if len(r.Changes) != 1 {
					t.Errorf("killed %s: the next change answered %v", step, r)
				}
				must(t, s.stop())
				if n := len(distinct(t, image, change.pick)); n != 1 {
					t.Errorf("killed %s: the log has %d entries of it, want 1", step, n)
				}
				revisions := map[uint64]int{}
				for _, e := range distinct(t, image, func(e *auditv1.Entry) bool { return e.GetRegistrationChanged() != nil }) {
					if revisions[e.GetRegistrationChanged().Revision]++; revisions[e.GetRegistrationChanged().Revision] > 1 {
						t.Errorf("killed %s: a revision has two contents", step)
					}
				}
			}
		})
	}
}

// breakStore makes a kind of write to a cluster's database fail.
func breakStore(t testing.TB, c *cluster, on string) (mend func()) {
	t.Helper()
	db, err := sql.Open("sqlite", databasePath(c.dir)+"?_pragma=busy_timeout(5000)")
	must(t, err)
	_, err = db.ExecContext(t.Context(), `CREATE TRIGGER broken BEFORE `+on+` BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END`)
	must(t, err)
	return func() {
		_, err := db.ExecContext(context.Background(), `DROP TRIGGER broken`)
		must(t, err)
		must(t, db.Close())
	}
}

func TestWhatTheStoreRefusesIsNotInTheLog(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	revoked := s.token("node-1")
	for _, on := range []string{"INSERT ON registrations", "INSERT ON outbox"} {
		mend := breakStore(t, c, on)
		if _, err := s.admin().ApplyRegistrations(t.Context(), &adminv1.ApplyRegistrationsRequest{Registrations: []*signetv1.Registration{registration("a", "node-1")}}); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v", on, err)
		}
		mend()
	}
	mend := breakStore(t, c, "UPDATE ON join_tokens")
	if _, err := s.admin().RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: revoked.Info.Id}); status.Code(err) != codes.Unavailable {
		t.Errorf("RevokeJoinToken: %v", err)
	}
	mend()
	mend = breakStore(t, c, "INSERT ON join_tokens")
	if _, err := s.admin().CreateJoinToken(t.Context(), &adminv1.CreateJoinTokenRequest{Agent: "node-9"}); status.Code(err) != codes.Unavailable {
		t.Errorf("CreateJoinToken: %v", err)
	}
	mend()
	s.apply(false, registration("b", "node-1"))
	must(t, s.stop())
	var told []string
	for _, e := range logged(t, c) {
		switch {
		case e.GetRegistrationChanged() != nil:
			told = append(told, fmt.Sprint(e.GetRegistrationChanged().Revision, strings.Contains(e.GetRegistrationChanged().After, `"b"`)))
		case e.GetJoinTokenRevoked() != nil, e.GetJoinTokenCreated().GetAgent() == "node-9":
			told = append(told, e.String())
		}
	}
	if !slices.Equal(told, []string{"1 true"}) {
		t.Errorf("the log has %q", told)
	}
}

func TestWhatIsNotLoggedTakesEffectWhenItIs(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	away := errors.New("no space left on device")
	var broken bool
	s := c.start(t, func(s *Server) {
		s.upkeepEvery = time.Hour
		for _, log := range []*func(context.Context, ...*auditv1.Entry) error{&s.outbox.log, &s.banBook.log} {
			works := *log
			*log = func(ctx context.Context, e ...*auditv1.Entry) error {
				if broken {
					return away
				}
				return works(ctx, e...)
			}
		}
	})
	s.enrol("node-1")
	broken = true
	_, err := s.admin().ApplyRegistrations(t.Context(), &adminv1.ApplyRegistrationsRequest{Registrations: []*signetv1.Registration{registration("a", "node-1")}})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "as soon as it is logged") {
		t.Errorf("ApplyRegistrations: %v", err)
	}
	if _, err := s.admin().BanAgent(t.Context(), &adminv1.BanAgentRequest{Agent: "node-1"}); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "as soon as it is logged") {
		t.Errorf("BanAgent: %v", err)
	}
	if _, ok := s.directory.Registration("a"); ok {
		t.Error("a registration is in effect that is not in the log")
	}
	if row, _ := s.directory.Agent("node-1"); row.Banned {
		t.Error("a ban is in effect that is not in the log")
	}
	s.shows(http.StatusOK, "waits for the log", "the ban of node-1")
	if n := counted(t, s, "signet_log_changes_waiting"); n != "1" {
		t.Errorf("the metric says %s", n)
	}
	// What was never logged must not be overtaken.
	if _, err := s.admin().ApplyRegistrations(t.Context(), &adminv1.ApplyRegistrationsRequest{Registrations: []*signetv1.Registration{registration("b", "node-1")}}); status.Code(err) != codes.Unavailable {
		t.Errorf("ApplyRegistrations: %v", err)
	}
	broken = false
	s.holdBans(t.Context())
	if row, _ := s.directory.Agent("node-1"); !row.Banned {
		t.Error("the ban does not hold")
	}
	s.settleLater(t.Context())
	if _, ok := s.directory.Registration("a"); !ok {
		t.Error("the registration is not in effect")
	}
	if n := counted(t, s, "signet_log_changes_waiting"); n != "0" {
		t.Errorf("the metric says %s", n)
	}
	s.apply(false, registration("b", "node-1"))
	must(t, s.stop())
	var revisions []uint64
	for _, e := range logged(t, c) {
		if r := e.GetRegistrationChanged(); r != nil {
			revisions = append(revisions, r.Revision)
		}
	}
	if !slices.Equal(revisions, []uint64{1, 2}) {
		t.Errorf("the log has the revisions %v", revisions)
	}
}

// The log has it and the database could not note that: it is not told twice in one run.
func TestWhatIsLoggedIsNotToldAgainInTheSameRun(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, func(s *Server) { s.upkeepEvery = time.Hour })
	mend := breakStore(t, c, "DELETE ON outbox")
	s.apply(false, registration("a", "node-1"))
	mend()
	s.apply(false, registration("b", "node-1"))
	must(t, s.stop())
	n := 0
	for _, e := range logged(t, c) {
		if e.GetRegistrationChanged() != nil {
			n++
		}
	}
	if n != 2 {
		t.Errorf("the log has %d changes, want 2", n)
	}
}

// A ban outlives a kill although the database never had it.
func TestABanOutlivesAKillWithTheDatabaseAway(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, func(s *Server) { s.banWait = time.Millisecond })
	m := s.enrol("node-1")
	release := holdStore(t, c)
	if r := s.ban("node-1"); r.NotStored == "" {
		t.Error("it is stored in a database that is away")
	}
	killed := c.image(t, s.Server)
	release()
	must(t, s.stop())
	after := killed.start(t, func(s *Server) { s.upkeepEvery = time.Millisecond })
	shut(t, after.dial(m), m)
	for len(after.directory.unstoredBans()) > 0 {
		time.Sleep(time.Millisecond)
	}
	must(t, after.stop())
	if _, err := os.Stat(filepath.Join(killed.dir, bansFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file of bans is still there: %v", err)
	}
	st, err := store.Open(t.Context(), store.Config{Path: databasePath(killed.dir)})
	must(t, err)
	defer st.Close()
	if agents, err := st.Agents(t.Context()); err != nil || !agents[0].Banned {
		t.Errorf("the store has %v, %v", agents, err)
	}
}

func TestALostAnswerToAnEnrolmentIsGivenAgain(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, func(s *Server) { s.upkeepEvery = time.Hour }) // it would settle what waits, by a log that is exchanged here
	token := s.token("node-1").Token
	key, err := doors.NewKey()
	must(t, err)
	enrol := func(s *live, key *ecdsa.PrivateKey) (*doors.Member, error) {
		csr, err := doors.CSR(key, nil)
		must(t, err)
		return doors.EnrolWith(t.Context(), token, csr)
	}
	// The entries are not logged: the agent hears that it may try again.
	works := s.outbox.log
	s.outbox.log = func(context.Context, ...*auditv1.Entry) error { return errors.New("no space left on device") }
	if _, err := enrol(s, key); status.Code(err) != codes.Unavailable {
		t.Errorf("with the log away: %v", err)
	}
	s.outbox.log = works
	other, err := doors.NewKey()
	must(t, err)
	for i, try := range []struct {
		key  *ecdsa.PrivateKey
		want codes.Code
	}{{key, codes.OK}, {other, codes.PermissionDenied}, {key, codes.OK}} {
		if m, err := enrol(s, try.key); status.Code(err) != try.want || err == nil && m.Reply.Agent != "node-1" {
			t.Errorf("try %d: %v", i, err)
		}
	}
	if n := counted(t, s, `signet_svid_requests_rejected_total{door="enrol",reason="token_replayed"}`); n != "1" {
		t.Errorf("%s replays counted", n)
	}
	c.ahead.Store(int64(2 * time.Minute))
	if _, err := enrol(s, key); status.Code(err) != codes.PermissionDenied {
		t.Errorf("after the token's life: %v", err)
	}
	c.ahead.Store(0)
	s.clock.mu.Lock()
	s.clock.mark = c.now() // as if it had never been ahead
	s.clock.mu.Unlock()
	s.ban("node-1")
	if _, err := enrol(s, key); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a banned agent: %v", err)
	}
	must(t, s.stop())
	for what, pick := range map[string]func(*auditv1.Entry) bool{
		"used tokens": func(e *auditv1.Entry) bool { return e.GetJoinTokenUsed() != nil },
		"enrolments":  func(e *auditv1.Entry) bool { return e.GetAgentEnrolled() != nil },
	} {
		if n := len(distinct(t, c, pick)); n != 1 {
			t.Errorf("the log has %d %s, want 1", n, what)
		}
	}
}
