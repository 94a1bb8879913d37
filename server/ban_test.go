package server

import (
	"context"
	"crypto/tls"
	"database/sql"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/test/doors"
)

func (l *live) ban(agent string) *adminv1.BanAgentResponse {
	l.t.Helper()
	r, err := l.admin().BanAgent(l.t.Context(), &adminv1.BanAgentRequest{Agent: agent})
	must(l.t, err)
	return r
}

// shut checks that every method of the agent door is refused.
func shut(t testing.TB, conn *grpc.ClientConn, m *doors.Member) {
	t.Helper()
	client, probe := signetv1.NewAgentsClient(conn), healthv1.NewHealthClient(conn)
	for name, try := range map[string]func(context.Context) error{
		"Issue": func(ctx context.Context) error {
			_, err := doors.Issue(ctx, conn, "frontend", shown, newCSR(t))
			return err
		},
		"Renew": func(ctx context.Context) error {
			_, err := client.Renew(ctx, &signetv1.RenewRequest{Csr: renewal(t, m)})
			return err
		},
		"Sync": func(ctx context.Context) error {
			stream, err := client.Sync(ctx)
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		},
		"health": func(ctx context.Context) error {
			_, err := probe.Check(ctx, &healthv1.HealthCheckRequest{})
			return err
		},
		"health watch": func(ctx context.Context) error {
			stream, err := probe.Watch(ctx, &healthv1.HealthCheckRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		err := try(ctx)
		// A ban cuts the connection, it may be under this call: the next one is asked.
		for ; status.Code(err) == codes.Unavailable && ctx.Err() == nil; err = try(ctx) {
			time.Sleep(10 * time.Millisecond)
		}
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
	}
}

// ended waits until a Sync stream has ended, and returns why.
func ended(stream grpc.BidiStreamingClient[signetv1.SyncRequest, signetv1.SyncResponse]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
}

func TestADryRunOfABanOfAnAgentSaysWhatIsDoneThenAndChangesNothing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	s.apply(false, registration("frontend", "node-1"))
	ban := func(name string, dry bool) (bool, error) {
		r, err := s.admin().BanAgent(t.Context(), &adminv1.BanAgentRequest{Agent: name, DryRun: dry})
		return r.GetChanged(), err
	}
	unban := func(name string, dry bool) (bool, error) {
		r, err := s.admin().UnbanAgent(t.Context(), &adminv1.UnbanAgentRequest{Agent: name, DryRun: dry})
		return r.GetChanged(), err
	}
	for _, step := range []struct {
		what   string
		ask    func(name string, dry bool) (bool, error)
		name   string
		banned bool
	}{
		{"an unban of what is not banned", unban, "node-1", false},
		{"a ban of nobody", ban, "node-9", false},
		{"a ban", ban, "node-1", true},
		{"the same ban", ban, "node-1", true},
		{"an unban", unban, "node-1", false},
		{"an unban of nobody", unban, "node-9", false},
	} {
		before, _ := s.directory.agent("node-1")
		says, dryErr := step.ask(step.name, true)
		if now, _ := s.directory.agent("node-1"); now.Banned != before.Banned {
			t.Fatalf("%s: the dry run did it", step.what)
		}
		if !before.Banned {
			s.leaf(s.dial(m), "frontend")
		}
		did, err := step.ask(step.name, false)
		if now, _ := s.directory.agent("node-1"); now.Banned != step.banned {
			t.Errorf("%s: banned is %v", step.what, now.Banned)
		}
		if says != did || status.Convert(dryErr).Message() != status.Convert(err).Message() {
			t.Errorf("%s: a dry run says %v, %v, and then there is %v, %v", step.what, says, dryErr, did, err)
		}
	}
	must(t, s.stop())
	bans := 0
	for _, e := range logged(t, c) {
		if e.GetAgentBanned() != nil || e.GetAgentUnbanned() != nil {
			bans++
		}
	}
	if bans != 2 {
		t.Errorf("the log has %d bans and unbans, want one of each", bans)
	}
}

func TestABanHoldsAtOnceAlsoOnOpenConnections(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m, other := s.enrol("node-1"), s.enrol("node-2")
	s.apply(false, registration("frontend", "node-1", "node-2"))
	conn, otherConn := s.dial(m), s.dial(other)
	stream, err := signetv1.NewAgentsClient(conn).Sync(t.Context())
	must(t, err)
	otherStream, err := signetv1.NewAgentsClient(otherConn).Sync(t.Context())
	must(t, err)
	_, err = stream.Recv()
	must(t, err)
	set := func(r *signetv1.SyncResponse) *signetv1.RegistrationSet { return r.GetRegistrations() }
	if got := next(t, otherStream, set); len(got.Registrations) != 1 {
		t.Errorf("the other agent was told %v", got)
	}
	_, err = doors.Issue(t.Context(), conn, "frontend", shown, newCSR(t))
	must(t, err)
	// A connection that says nothing at all, as of somebody who waits.
	silent, err := tls.Dial("tcp", s.Doors().Agents, &tls.Config{
		InsecureSkipVerify: true, NextProtos: []string{"h2"},
		Certificates: []tls.Certificate{{Certificate: m.Chain, PrivateKey: m.Key}},
	})
	must(t, err)
	defer silent.Close()
	_, err = silent.Read(make([]byte, 1)) // the server's settings: the handshake is over
	must(t, err)
	var end time.Time
	cut := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, silent)
		end = time.Now()
		cut <- err
	}()

	if r := s.ban("node-1"); !r.Changed || r.NotStored != "" {
		t.Errorf("the ban answered %v", r)
	}
	banned := time.Now() // how long a disk took to take it is not its time
	if err := ended(stream); status.Code(err) != codes.PermissionDenied {
		t.Errorf("its stream ended with %v", err)
	}
	shut(t, conn, m)
	shut(t, s.dial(m), m)
	if err := <-cut; err != nil && !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "reset") {
		t.Errorf("its silent connection ended with %v", err)
	}
	if took := end.Sub(banned); took > 5*time.Second {
		t.Errorf("it took %s until nothing of a banned agent was open", took)
	}

	_, err = doors.Issue(t.Context(), otherConn, "frontend", shown, newCSR(t))
	must(t, err)
	s.apply(true)
	if got := next(t, otherStream, set); len(got.Registrations) != 0 {
		t.Errorf("the other agent was told %v", got)
	}

	if r := s.ban("node-1"); r.Changed || r.NotStored != "" {
		t.Errorf("the same ban again answered %v", r)
	}
	must(t, s.stop())
	var bans []string
	for _, e := range logged(t, c) {
		if b := e.GetAgentBanned(); b != nil {
			bans = append(bans, b.Agent+" "+b.Evidence.Door+" "+b.Evidence.Caller[:4])
		}
	}
	if !slices.Equal(bans, []string{"node-1 admin uid:"}) {
		t.Errorf("the log has the bans %q", bans)
	}
}

func TestABanOutlivesRestartsUntilItIsLifted(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	s.apply(false, registration("frontend", "node-1"))
	s.ban("node-1")
	must(t, s.stop())

	s = c.start(t, nil)
	shut(t, s.dial(m), m)
	list, err := s.admin().ListAgents(t.Context(), &adminv1.ListAgentsRequest{})
	must(t, err)
	if len(list.Agents) != 1 || !list.Agents[0].Banned || list.Agents[0].KeyFingerprint == "" || list.Agents[0].LastSeen == nil {
		t.Errorf("the list is %v", list)
	}
	for i, changed := range []bool{true, false} {
		r, err := s.admin().UnbanAgent(t.Context(), &adminv1.UnbanAgentRequest{Agent: "node-1"})
		must(t, err)
		if r.Changed != changed {
			t.Errorf("lifting it for the %d. time answered %v", i+1, r)
		}
	}
	_, err = doors.Issue(t.Context(), s.dial(m), "frontend", shown, newCSR(t))
	must(t, err)
	must(t, s.stop())

	s = c.start(t, nil)
	_, err = doors.Issue(t.Context(), s.dial(m), "frontend", shown, newCSR(t))
	must(t, err)
	must(t, s.stop())
	lifted := 0
	for _, e := range logged(t, c) {
		if e.GetAgentUnbanned() != nil {
			lifted++
		}
	}
	if lifted != 1 {
		t.Errorf("the log has it lifted %d times", lifted)
	}
}

// holdStore keeps everybody else from writing to a cluster's database.
func holdStore(t testing.TB, c *cluster) (release func()) {
	t.Helper()
	db, err := sql.Open("sqlite", databasePath(c.dir)+"?_pragma=busy_timeout(5000)") // the server may be writing
	must(t, err)
	conn, err := db.Conn(t.Context())
	must(t, err)
	_, err = conn.ExecContext(t.Context(), "BEGIN IMMEDIATE")
	must(t, err)
	return func() {
		_, err := conn.ExecContext(context.Background(), "ROLLBACK")
		must(t, err)
		must(t, conn.Close())
		must(t, db.Close())
	}
}

func TestABanHoldsWithTheDatabaseAwayAndIsStoredWhenItIsBack(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, func(s *Server) { s.banWait, s.upkeepEvery = 50*time.Millisecond, 10*time.Millisecond })
	m := s.enrol("node-1")
	conn := s.dial(m)
	stream, err := signetv1.NewAgentsClient(conn).Sync(t.Context())
	must(t, err)
	release := holdStore(t, c)
	before := time.Now()
	if r := s.ban("node-1"); !r.Changed || !strings.Contains(r.NotStored, "state database has not answered") {
		t.Errorf("the ban answered %v", r)
	}
	if err := ended(stream); status.Code(err) != codes.PermissionDenied {
		t.Errorf("its stream ended with %v", err)
	}
	if d := time.Since(before); d > 5*time.Second {
		t.Errorf("the ban held after %s", d)
	}
	shut(t, conn, m)
	s.shows(http.StatusOK, "not stored yet: the ban of node-1")
	release()
	for len(s.directory.unstoredBans()) > 0 {
		time.Sleep(time.Millisecond)
	}
	s.shows(http.StatusOK, "[+]store ok")
	must(t, s.stop())
	s = c.start(t, nil)
	shut(t, s.dial(m), m)
}

func TestABanIsLiftedInTheDatabaseFirst(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	s.ban("node-1")
	must(t, s.store.Close())
	if _, err := s.admin().UnbanAgent(t.Context(), &adminv1.UnbanAgentRequest{Agent: "node-1"}); status.Code(err) != codes.Unavailable {
		t.Errorf("UnbanAgent: %v", err)
	}
	shut(t, s.dial(m), m)
}

func TestABanThatCanNotBeLoggedChangesNothing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	s.apply(false, registration("frontend", "node-1"))
	must(t, s.audit.Close(t.Context()))
	if _, err := s.admin().BanAgent(t.Context(), &adminv1.BanAgentRequest{Agent: "node-1"}); status.Code(err) != codes.Unavailable {
		t.Errorf("BanAgent: %v", err)
	}
	// Nothing is issued to it either: that needs the log too.
	if _, err := doors.Issue(t.Context(), s.dial(m), "frontend", shown, newCSR(t)); err == nil || status.Code(err) == codes.PermissionDenied {
		t.Errorf("Issue: %v", err)
	}
}

func TestOnlyAnEnrolledAgentCanBeBanned(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	for name, want := range map[string]codes.Code{"node-1": codes.NotFound, "../node-1": codes.InvalidArgument, "": codes.InvalidArgument} {
		if _, err := s.admin().BanAgent(t.Context(), &adminv1.BanAgentRequest{Agent: name}); status.Code(err) != want {
			t.Errorf("BanAgent %q: %v", name, err)
		}
		if _, err := s.admin().UnbanAgent(t.Context(), &adminv1.UnbanAgentRequest{Agent: name}); status.Code(err) != want {
			t.Errorf("UnbanAgent %q: %v", name, err)
		}
	}
}

// What is under way when a ban comes must not put the old row back.
func TestNoWriteLiftsABan(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.enrol("node-1")
	row, _ := s.directory.agent("node-1")
	row.Banned = false
	done, err := s.directory.toWrite(t.Context())
	must(t, err)
	wrote := make(chan error, 1)
	go func() { wrote <- s.directory.gave(t.Context(), "node-1", given{at: s.now(), notAfter: s.now()}) }()
	// A ban does not wait for whoever writes.
	s.directory.ban("node-1")
	s.directory.enrolled(row)
	must(t, s.directory.reload(t.Context()))
	done()
	must(t, <-wrote)
	must(t, s.storeBans(t.Context()))
	if now, _ := s.directory.Agent("node-1"); !now.Banned {
		t.Error("memory has forgotten the ban")
	}
	must(t, s.stop())
	st, err := store.Open(t.Context(), store.Config{Path: databasePath(c.dir)})
	must(t, err)
	defer st.Close()
	if agents, err := st.Agents(t.Context()); err != nil || !agents[0].Banned {
		t.Errorf("the store has %v, %v", agents, err)
	}
}
