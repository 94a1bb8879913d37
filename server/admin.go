package server

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
)

// Bounds of what is kept in memory and told to agents.
const (
	maxRegistrations = 50_000
	// maxSet is what one agent may be told, in bytes: it goes out as one message, and gRPC clients take 4 MiB.
	maxSet = 3 << 20
	// maxLogged is what one change may take in the log, in bytes; an entry has at most 64 KiB.
	maxLogged = 60 << 10
)

// adminService is the admin door. Its callers are this user and root, so refusals say all there is to say.
type adminService struct {
	adminv1.UnimplementedAdminServer
	*Server
}

// evidence says on whose word something is done.
func (s adminService) evidence(ctx context.Context) (*auditv1.Evidence, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, refuse(codes.Unauthenticated, "not_allowed", "not authenticated", nil)
	}
	local, ok := p.AuthInfo.(localPeer)
	if !ok {
		return nil, refuse(codes.Unauthenticated, "not_allowed", "not authenticated", nil)
	}
	return &auditv1.Evidence{Caller: fmt.Sprintf("uid:%d", local.uid), Door: adminDoor.name}, nil
}

// plainly refuses with the whole reason.
func plainly(code codes.Code, reason string, err error) error {
	return refuse(code, reason, err.Error(), err)
}

// CreateJoinToken makes a token and shows it once.
func (s adminService) CreateJoinToken(ctx context.Context, req *adminv1.CreateJoinTokenRequest) (*adminv1.CreateJoinTokenResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	if err := identity.ParseName("agent", req.Agent); err != nil {
		return nil, plainly(codes.InvalidArgument, "invalid", err)
	}
	if row, ok := s.directory.Agent(req.Agent); ok && row.Banned {
		return nil, plainly(codes.FailedPrecondition, "banned_agent", fmt.Errorf("agent %s is banned", req.Agent))
	}
	ttl := identity.DefaultTokenTTL
	if req.Ttl != nil {
		if ttl = req.Ttl.AsDuration(); req.Ttl.CheckValid() != nil || ttl < time.Second || ttl > identity.MaxTokenTTL {
			return nil, plainly(codes.InvalidArgument, "invalid", fmt.Errorf("join token for agent %s: want a life between 1s and %s", req.Agent, identity.MaxTokenTTL))
		}
	}
	if req.DryRun {
		if err := s.usable(); err != nil {
			return nil, plainly(codes.Unavailable, s.whyNot(err), err)
		}
		now := s.now()
		return &adminv1.CreateJoinTokenResponse{Info: tokenInfo(identity.Token{Agent: req.Agent, Created: now, Expires: now.Add(ttl)})}, nil
	}
	tokens := identity.NewJoinTokens(loggedTokens{s.store, s.Server, by}, s.now)
	token, secret, err := tokens.Create(ctx, req.Agent, ttl)
	if err != nil {
		return nil, plainly(codes.Unavailable, s.whyNot(err), err)
	}
	s.log.Info("join token made", "token", token.ID, "agent", token.Agent, "expires", token.Expires, "by", by.Caller)
	whole := identity.JoinToken{
		Door: s.advertiseEnrol, TrustDomain: s.config.TrustDomain.Name(), Cluster: s.config.Cluster, Agent: token.Agent,
		Secret: secret, ControlCA: sha256.Sum256(s.control.Raw),
	}
	return &adminv1.CreateJoinTokenResponse{Info: tokenInfo(token), Token: whole.Encode()}, nil
}

// loggedTokens changes tokens by the steps of outbox.
type loggedTokens struct {
	identity.TokenStore
	server *Server
	// by makes tokens; whoever uses one speaks for itself.
	by *auditv1.Evidence
}

func (l loggedTokens) CreateToken(ctx context.Context, t identity.Token) error {
	entries, err := l.server.stamped(&auditv1.Entry{Event: &auditv1.Entry_JoinTokenCreated{JoinTokenCreated: &auditv1.JoinTokenCreated{
		TokenId: t.ID, Agent: t.Agent, Expires: t.Expires.Unix(), Evidence: l.by,
	}}})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), workTimeout)
	defer cancel()
	// It takes effect when somebody is given the secret.
	return l.server.change(ctx, &store.Note{Entries: entries}, func(st *store.Store) error { return st.CreateToken(ctx, t) }, func() {})
}

// ListJoinTokens lists the tokens, newest first, without secrets; those that ended long ago are forgotten (forgetTokens).
func (s adminService) ListJoinTokens(ctx context.Context, _ *adminv1.ListJoinTokensRequest) (*adminv1.ListJoinTokensResponse, error) {
	if _, err := s.evidence(ctx); err != nil {
		return nil, err
	}
	all, err := s.store.ListTokens(ctx)
	if err != nil {
		return nil, plainly(codes.Unavailable, "store_unavailable", err)
	}
	r := &adminv1.ListJoinTokensResponse{}
	for _, t := range all {
		r.Tokens = append(r.Tokens, tokenInfo(t))
	}
	return r, nil
}

// RevokeJoinToken makes a token useless.
func (s adminService) RevokeJoinToken(ctx context.Context, req *adminv1.RevokeJoinTokenRequest) (*adminv1.RevokeJoinTokenResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	all, err := s.store.ListTokens(ctx)
	if err != nil {
		return nil, plainly(codes.Unavailable, "store_unavailable", err)
	}
	i := slices.IndexFunc(all, func(t identity.Token) bool { return t.ID == req.Id })
	switch {
	case i < 0:
		return nil, plainly(codes.NotFound, "invalid", fmt.Errorf("no join token %q: see signet join-token list", clip(req.Id)))
	case !all[i].Used.IsZero():
		return nil, plainly(codes.FailedPrecondition, "invalid", fmt.Errorf("join token %s was used at %s: there is nothing left to revoke", req.Id, stamp(all[i].Used)))
	case !all[i].Revoked.IsZero():
		return &adminv1.RevokeJoinTokenResponse{}, nil
	case req.DryRun:
		if err := s.usable(); err != nil {
			return nil, plainly(codes.Unavailable, s.whyNot(err), err)
		}
		return &adminv1.RevokeJoinTokenResponse{Changed: true}, nil
	}
	entries, err := s.stamped(&auditv1.Entry{Event: &auditv1.Entry_JoinTokenRevoked{JoinTokenRevoked: &auditv1.JoinTokenRevoked{TokenId: req.Id, Evidence: by}}})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), workTimeout)
	defer cancel()
	var refused error
	if err := s.change(ctx, &store.Note{Entries: entries}, func(st *store.Store) error {
		refused = st.RevokeToken(ctx, req.Id, s.now())
		return refused
	}, func() {}); err != nil {
		code := codes.Unavailable
		if errors.Is(refused, store.ErrTokenUsed) {
			code = codes.FailedPrecondition
		}
		return nil, plainly(code, s.whyNot(err), err)
	}
	s.log.Info("join token revoked", "token", req.Id, "by", by.Caller)
	return &adminv1.RevokeJoinTokenResponse{Changed: true}, nil
}

func tokenInfo(t identity.Token) *adminv1.JoinTokenInfo {
	at := func(t time.Time) *timestamppb.Timestamp {
		if t.IsZero() {
			return nil
		}
		return timestamppb.New(t)
	}
	return &adminv1.JoinTokenInfo{Id: t.ID, Agent: t.Agent, Created: at(t.Created), Expires: at(t.Expires), Used: at(t.Used), Revoked: at(t.Revoked)}
}

// ApplyRegistrations makes the set be as the request says: what is new is created, what differs is changed, and with
// prune what the request does not name is deleted. Everything or nothing happens.
func (s adminService) ApplyRegistrations(ctx context.Context, req *adminv1.ApplyRegistrationsRequest) (*adminv1.ApplyRegistrationsResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	want, err := s.parseRegistrations(req.Registrations)
	if err != nil {
		return nil, plainly(codes.InvalidArgument, "invalid", err)
	}
	// One at a time, so that what is logged is what the store will say.
	s.applying.Lock()
	defer s.applying.Unlock()
	if err := s.settleNow(ctx); err != nil {
		return nil, plainly(codes.Unavailable, s.whyNot(err), fmt.Errorf("an earlier change waits to be settled, so nothing was changed: %w", err))
	}
	have, revision := s.directory.registrations()
	plan := planRegistrations(have, want, req.Prune)
	if err := plan.fits(); err != nil {
		return nil, plainly(codes.ResourceExhausted, "too_many", err)
	}
	if req.DryRun || len(plan.put)+len(plan.del) == 0 {
		return plan.response, nil
	}
	// Begun, it is finished: a client that hangs up must not leave the log and the store apart.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), workTimeout)
	defer cancel()
	entries, err := s.stamped(plan.entries(revision+1, by)...)
	if err != nil {
		return nil, err
	}
	if err := s.change(ctx, &store.Note{Entries: entries},
		func(st *store.Store) error {
			_, err := st.ApplyRegistrations(ctx, revision, plan.put, plan.del)
			return err
		},
		func() { s.directory.registered(revision+1, plan.put, plan.del) },
	); err != nil {
		code := codes.Unavailable
		if errors.Is(err, store.ErrConflict) {
			code = codes.Aborted
		}
		return nil, plainly(code, s.whyNot(err), err)
	}
	s.log.Info("registrations applied", "revision", revision+1, "put", len(plan.put), "deleted", len(plan.del), "by", by.Caller)
	return plan.response, nil
}

func (s adminService) parseRegistrations(messages []*signetv1.Registration) ([]identity.Registration, error) {
	if len(messages) > maxRegistrations {
		return nil, fmt.Errorf("%d registrations: at most %d are allowed", len(messages), maxRegistrations)
	}
	all := make([]identity.Registration, 0, len(messages))
	names := map[string]bool{}
	for _, m := range messages {
		id, err := identity.ParseID(m.SpiffeId)
		if err != nil {
			return nil, fmt.Errorf("registration %q: %w", clip(m.Name), err)
		}
		const longest = int64(1<<63-1) / int64(time.Second)
		if m.TtlSeconds < 0 || m.TtlSeconds > longest {
			return nil, fmt.Errorf("registration %q: ttl of %d seconds is not a life", clip(m.Name), m.TtlSeconds)
		}
		r := identity.Registration{
			Name: m.Name, ID: id, Agents: slices.Clone(m.Agents), TTL: time.Duration(m.TtlSeconds) * time.Second, Priority: m.Priority,
		}
		for _, text := range m.Selectors {
			r.Selectors = append(r.Selectors, identity.Selector(text))
		}
		if err := r.Validate(s.config.TrustDomain); err != nil {
			return nil, err
		}
		if r.TTL > s.config.MaxTTL {
			return nil, fmt.Errorf("registration %s: ttl %s is longer than leaf.max_ttl, %s", r.Name, r.TTL, s.config.MaxTTL)
		}
		if names[r.Name] {
			return nil, fmt.Errorf("registration %s is given twice", r.Name)
		}
		names[r.Name] = true
		all = append(all, r)
	}
	return all, nil
}

// registrationPlan is what an apply would do.
type registrationPlan struct {
	put      []identity.Registration
	del      []string
	after    []identity.Registration
	response *adminv1.ApplyRegistrationsResponse
}

func planRegistrations(have, want []identity.Registration, prune bool) registrationPlan {
	p := registrationPlan{response: &adminv1.ApplyRegistrationsResponse{}}
	stands := make(map[string]identity.Registration, len(have))
	for _, r := range have {
		stands[r.Name] = r
	}
	note := func(action adminv1.RegistrationChange_Action, before, after *signetv1.Registration) {
		p.response.Changes = append(p.response.Changes, &adminv1.RegistrationChange{Action: action, Before: before, After: after})
	}
	for _, r := range want {
		p.after = append(p.after, r)
		after := registrationMessage(r)
		old, ok := stands[r.Name]
		delete(stands, r.Name)
		if !ok {
			p.put = append(p.put, r)
			note(adminv1.RegistrationChange_ACTION_CREATED, nil, after)
			continue
		}
		before := registrationMessage(old)
		if proto.Equal(before, after) {
			note(adminv1.RegistrationChange_ACTION_UNCHANGED, before, after)
			continue
		}
		p.put = append(p.put, r)
		note(adminv1.RegistrationChange_ACTION_CHANGED, before, after)
	}
	for _, r := range have {
		if _, left := stands[r.Name]; !left {
			continue
		}
		if !prune {
			p.after = append(p.after, r)
			continue
		}
		p.del = append(p.del, r.Name)
		note(adminv1.RegistrationChange_ACTION_DELETED, registrationMessage(r), nil)
	}
	slices.SortFunc(p.response.Changes, func(a, b *adminv1.RegistrationChange) int {
		return strings.Compare(changeName(a), changeName(b))
	})
	return p
}

func changeName(c *adminv1.RegistrationChange) string {
	if c.After != nil {
		return c.After.Name
	}
	return c.Before.Name
}

// fits refuses a set that could not be kept in memory or told to an agent.
func (p registrationPlan) fits() error {
	if len(p.after) > maxRegistrations {
		return fmt.Errorf("the cluster would have %d registrations: at most %d are allowed", len(p.after), maxRegistrations)
	}
	for _, e := range p.entries(1, nil) {
		if n := proto.Size(e); n > maxLogged {
			r := e.GetRegistrationChanged()
			return fmt.Errorf("a registration takes %d bytes in the log, before and after together, and at most %d fit (%s): name fewer agents or selectors", n, maxLogged, clip(r.After+r.Before))
		}
	}
	sizes := map[string]int{}
	for _, r := range p.after {
		told := registrationMessage(r)
		told.Agents = nil
		// 8 bytes for the tag and length of the message in its list.
		size := proto.Size(told) + 8
		for _, agent := range r.Agents {
			if sizes[agent] += size; sizes[agent] > maxSet {
				return fmt.Errorf("agent %s would have registrations of more than %d bytes: an agent is told them in one message; spread them over several agents", agent, maxSet)
			}
		}
	}
	return nil
}

// registrationRecord is how a registration stands in the log. The names are for ever.
type registrationRecord struct {
	Name      string              `json:"name"`
	SPIFFEID  string              `json:"spiffe_id"`
	Agents    []string            `json:"agents"`
	Selectors []identity.Selector `json:"selectors"`
	// TTL as a Go duration; "0s" = the server's default.
	TTL      string `json:"ttl"`
	Priority int32  `json:"priority"`
}

func (p registrationPlan) entries(revision uint64, by *auditv1.Evidence) []*auditv1.Entry {
	var all []*auditv1.Entry
	text := func(m *signetv1.Registration) string {
		if m == nil {
			return ""
		}
		r := registrationRecord{
			Name: m.Name, SPIFFEID: m.SpiffeId, Agents: m.Agents, TTL: (time.Duration(m.TtlSeconds) * time.Second).String(), Priority: m.Priority,
		}
		for _, s := range m.Selectors {
			r.Selectors = append(r.Selectors, identity.Selector(s))
		}
		raw, _ := json.Marshal(r) // strings and numbers only: cannot fail
		return string(raw)
	}
	for _, c := range p.response.Changes {
		if c.Action == adminv1.RegistrationChange_ACTION_UNCHANGED {
			continue
		}
		all = append(all, &auditv1.Entry{Event: &auditv1.Entry_RegistrationChanged{RegistrationChanged: &auditv1.RegistrationChanged{
			Before: text(c.Before), After: text(c.After), Revision: revision, Evidence: by,
		}}})
	}
	return all
}

// ListRegistrations lists all of them, or those of one agent, by name.
func (s adminService) ListRegistrations(ctx context.Context, req *adminv1.ListRegistrationsRequest) (*adminv1.ListRegistrationsResponse, error) {
	if _, err := s.evidence(ctx); err != nil {
		return nil, err
	}
	all, _ := s.directory.registrations()
	r := &adminv1.ListRegistrationsResponse{}
	for _, reg := range all {
		if req.Agent == "" || reg.For(req.Agent) {
			r.Registrations = append(r.Registrations, registrationMessage(reg))
		}
	}
	return r, nil
}
