package server

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
)

// maxBannedIdentities bounds what is kept in memory.
const maxBannedIdentities = 10_000

// BanIdentity shuts an identity out: nobody gets a certificate for it from now on, and agents withdraw what they hold.
func (s rotationService) BanIdentity(ctx context.Context, req *adminv1.BanIdentityRequest) (*adminv1.BanIdentityResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	id, err := s.memberID("ban", req.SpiffeId)
	if err != nil {
		return nil, err
	}
	if err := checkReason("ban of "+id.String(), req.Reason); err != nil {
		return nil, err
	}
	now := s.now()
	r := &adminv1.BanIdentityResponse{ValidUntil: timestampOf(s.keeper.policy.LeavesUntil(now))}
	all, _ := s.directory.registrations()
	for _, reg := range all {
		if reg.ID == id {
			r.Registrations = append(r.Registrations, reg.Name)
		}
	}
	if s.directory.BannedIdentity(id) {
		return r, nil
	}
	if n := len(s.directory.current.Load().banned); n >= maxBannedIdentities {
		return nil, plainly(codes.ResourceExhausted, "too_many", fmt.Errorf("%d identities are banned: at most %d can be", n, maxBannedIdentities))
	}
	r.Changed = true
	if req.DryRun {
		return r, nil
	}
	ban := store.BannedIdentity{ID: id, Since: now, Reason: req.Reason}
	err = s.changeBans(ctx, &auditv1.Entry{Event: &auditv1.Entry_IdentityBanned{IdentityBanned: &auditv1.IdentityBanned{
		SpiffeId: id.String(), Reason: req.Reason, Evidence: by,
	}}}, func(st *store.Store, ctx context.Context) error { return st.BanIdentity(ctx, ban) },
		func(banned map[spiffeid.ID]store.BannedIdentity) { banned[id] = ban })
	if err != nil {
		return nil, err
	}
	s.log.Info("identity banned", "spiffe_id", id.String(), "by", by.Caller)
	return r, nil
}

// UnbanIdentity lifts the ban of an identity.
func (s rotationService) UnbanIdentity(ctx context.Context, req *adminv1.UnbanIdentityRequest) (*adminv1.UnbanIdentityResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	id, err := s.memberID("unban", req.SpiffeId)
	if err != nil {
		return nil, err
	}
	if !s.directory.BannedIdentity(id) {
		return &adminv1.UnbanIdentityResponse{}, nil
	}
	if req.DryRun {
		return &adminv1.UnbanIdentityResponse{Changed: true}, nil
	}
	err = s.changeBans(ctx, &auditv1.Entry{Event: &auditv1.Entry_IdentityUnbanned{IdentityUnbanned: &auditv1.IdentityUnbanned{
		SpiffeId: id.String(), Evidence: by,
	}}}, func(st *store.Store, ctx context.Context) error { return st.UnbanIdentity(ctx, id) },
		func(banned map[spiffeid.ID]store.BannedIdentity) { delete(banned, id) })
	if err != nil {
		return nil, err
	}
	s.log.Info("ban of an identity lifted", "spiffe_id", id.String(), "by", by.Caller)
	return &adminv1.UnbanIdentityResponse{Changed: true}, nil
}

// changeBans makes a change of the banned identities by the steps of outbox.
func (s rotationService) changeBans(ctx context.Context, e *auditv1.Entry, commit func(*store.Store, context.Context) error, effect func(map[spiffeid.ID]store.BannedIdentity)) error {
	entries, err := s.stamped(e)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), workTimeout)
	defer cancel()
	if err := s.change(ctx, &store.Note{Entries: entries},
		func(st *store.Store) error { return commit(st, ctx) },
		func() { s.directory.bannedIdentities(effect) }); err != nil {
		return plainly(codes.Unavailable, s.whyNot(err), err)
	}
	return nil
}

// memberID reads the identity that a verb is for: a workload's. No registration gives those of Signet's own parts.
func (s rotationService) memberID(verb, text string) (spiffeid.ID, error) {
	id, err := identity.ParseID(text)
	switch {
	case err != nil:
	case !id.MemberOf(s.config.TrustDomain):
		err = fmt.Errorf("%s is not a workload's name in trust domain %s", id, s.config.TrustDomain)
	case identity.Reserved(id):
		part, is := identity.ParseControl(id)
		switch {
		case is != nil || part.Role != identity.RoleAgent:
			err = fmt.Errorf("%s is the name of a part of Signet, not a workload's: for a node there is signet agent %s", id, verb)
		case part.Cluster != s.config.Cluster:
			err = fmt.Errorf("%s is the name of an agent of another cluster, not a workload's: in cluster %s: signet agent %s %s", id, part.Cluster, verb, part.Name)
		default:
			err = fmt.Errorf("%s is the name of an agent, not a workload's: signet agent %s %s", id, verb, part.Name)
		}
	}
	if err != nil {
		return spiffeid.ID{}, plainly(codes.InvalidArgument, "invalid", err)
	}
	return id, nil
}

// ListBannedIdentities lists them by SPIFFE ID.
func (s rotationService) ListBannedIdentities(ctx context.Context, _ *adminv1.ListBannedIdentitiesRequest) (*adminv1.ListBannedIdentitiesResponse, error) {
	if _, err := s.evidence(ctx); err != nil {
		return nil, err
	}
	r := &adminv1.ListBannedIdentitiesResponse{}
	for _, b := range slices.SortedFunc(maps.Values(s.directory.current.Load().banned), func(x, y store.BannedIdentity) int {
		return strings.Compare(x.ID.String(), y.ID.String())
	}) {
		r.Identities = append(r.Identities, &adminv1.BannedIdentity{SpiffeId: b.ID.String(), Since: timestampOf(b.Since), Reason: b.Reason})
	}
	return r, nil
}
