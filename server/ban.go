package server

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
)

const (
	// banMoment is how long after a ban the agent's connections live, so that it hears why its streams have ended.
	banMoment = 2 * time.Second
	// banWait is how long an admin waits for a ban to be stored. It holds meanwhile.
	banWait = 3 * time.Second
)

// BanAgent refuses an agent at every door from here on. It is noted in a file and logged, then holds in memory, on open
// connections too, and then it is stored: without a log nothing can be issued to anybody, but a database that is away must
// not keep a banned agent in (banBook).
func (s adminService) BanAgent(ctx context.Context, req *adminv1.BanAgentRequest) (*adminv1.BanAgentResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	row, err := s.enrolledAgent(req.Agent)
	if err != nil {
		return nil, err
	}
	if req.DryRun {
		return &adminv1.BanAgentResponse{Changed: !row.Banned}, nil
	}
	// Begun, it is finished, also for a client that hangs up.
	ctx = context.WithoutCancel(ctx)
	if !row.Banned {
		logging, cancel := context.WithTimeout(ctx, workTimeout)
		defer cancel()
		entries, err := s.stamped(&auditv1.Entry{Event: &auditv1.Entry_AgentBanned{AgentBanned: &auditv1.AgentBanned{Agent: req.Agent, Evidence: by}}})
		if err != nil {
			return nil, err
		}
		if err := s.banBook.add(logging, req.Agent, entries[0], s.banHolds); err != nil {
			return nil, plainly(codes.Unavailable, s.whyNot(err), err)
		}
		s.log.Warn("agent banned", "agent", req.Agent, "by", by.Caller)
	}
	r := &adminv1.BanAgentResponse{Changed: !row.Banned}
	// SQLite waits for a lock as long as it likes, whatever its context says; the admin need not.
	stored := make(chan error, 1)
	s.storing.Go(func() { stored <- s.storeBans(ctx) })
	select {
	case err := <-stored:
		if err != nil {
			r.NotStored = clip(err.Error())
		}
	case <-time.After(s.banWait):
		r.NotStored = "the state database has not answered yet"
	}
	return r, nil
}

// UnbanAgent lets an agent in again, with the key that it enrolled with.
func (s adminService) UnbanAgent(ctx context.Context, req *adminv1.UnbanAgentRequest) (*adminv1.UnbanAgentResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	row, err := s.enrolledAgent(req.Agent)
	if err != nil {
		return nil, err
	}
	if !row.Banned || req.DryRun {
		return &adminv1.UnbanAgentResponse{Changed: row.Banned}, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), workTimeout)
	defer cancel()
	// A ban that the database does not have yet would come back after it was lifted.
	if err := s.storeBans(ctx); err != nil {
		return nil, plainly(codes.Unavailable, "store_unavailable", fmt.Errorf("agent %s is still banned: %w", req.Agent, err))
	}
	entries, err := s.stamped(&auditv1.Entry{Event: &auditv1.Entry_AgentUnbanned{AgentUnbanned: &auditv1.AgentUnbanned{Agent: req.Agent, Evidence: by}}})
	if err != nil {
		return nil, err
	}
	again := false
	if err := s.change(ctx, &store.Note{Entries: entries},
		func(st *store.Store) error {
			row, _ := s.directory.agent(req.Agent)
			row.Banned = false
			return st.PutAgent(ctx, row)
		},
		func() { again = !s.directory.unban(req.Agent) },
	); err != nil {
		return nil, plainly(codes.Unavailable, s.whyNot(err), fmt.Errorf("agent %s is still banned: %w", req.Agent, err))
	}
	if again {
		return nil, plainly(codes.Aborted, "store_unavailable", fmt.Errorf("agent %s is still banned: it was banned again meanwhile", req.Agent))
	}
	s.log.Warn("agent unbanned", "agent", req.Agent, "by", by.Caller)
	return &adminv1.UnbanAgentResponse{Changed: true}, nil
}

func (s adminService) enrolledAgent(name string) (identity.AgentRow, error) {
	if err := identity.ParseName("agent", name); err != nil {
		return identity.AgentRow{}, plainly(codes.InvalidArgument, "invalid", err)
	}
	row, ok := s.directory.Agent(name)
	if !ok {
		return row, plainly(codes.NotFound, "unknown_agent", fmt.Errorf("agent %s is not enrolled in cluster %s: to keep it out, revoke its join token", name, s.config.Cluster))
	}
	return row, nil
}

// ListAgents lists the enrolled agents, by name, from memory.
func (s adminService) ListAgents(ctx context.Context, _ *adminv1.ListAgentsRequest) (*adminv1.ListAgentsResponse, error) {
	if _, err := s.evidence(ctx); err != nil {
		return nil, err
	}
	r := &adminv1.ListAgentsResponse{}
	for _, a := range s.directory.agents() {
		info := &adminv1.AgentInfo{
			Name: a.Name, Banned: a.Banned, Enrolled: timestamppb.New(a.Enrolled), Connections: uint32(s.sessions.of(a.Name)),
			KeyFingerprint: ca.KeyFingerprint(a.SPKI),
		}
		if !a.LastSeen.IsZero() {
			info.LastSeen = timestamppb.New(a.LastSeen)
		}
		r.Agents = append(r.Agents, info)
	}
	return r, nil
}

// storeBans writes the bans that are in memory alone.
func (s *Server) storeBans(ctx context.Context) error {
	names := s.directory.unstoredBans()
	if len(names) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, workTimeout)
	defer cancel()
	err := s.directory.storeBans(ctx, names, s.banBook.stored)
	if err != nil {
		s.log.Error("A BAN IS NOT STORED YET: it holds, by the file "+bansFile+" also after a restart", "agents", names, "err", err)
	}
	return err
}

// bansStored says which bans the database does not have, and which do not even hold.
func (s *Server) bansStored() error {
	if names := s.banBook.waiting(); len(names) > 0 {
		return fmt.Errorf("not logged and so not in effect yet: the ban of %s", clip(strings.Join(names, ", ")))
	}
	if names := s.directory.unstoredBans(); len(names) > 0 {
		return fmt.Errorf("not stored yet: the ban of %s", clip(strings.Join(names, ", ")))
	}
	return nil
}
