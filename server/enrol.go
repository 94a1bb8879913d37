package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
)

// renewalGrace is how long after the end of its certificate an agent may come back with its enrolled key alone, so that
// an outage never ends in a deadlock.
const renewalGrace = 30 * 24 * time.Hour

// noteTimeout is how long a renewal waits for the store, which it can do without.
const noteTimeout = 2 * time.Second

// enrolment is the enrol door. Whoever comes here has no certificate yet, or one that has expired.
type enrolment struct {
	signetv1.UnimplementedEnrolmentServer
	*Server
}

// Enrol gives a node its control certificate, by a join token or by the key it enrolled with.
func (s enrolment) Enrol(ctx context.Context, req *signetv1.EnrolRequest) (*signetv1.EnrolResponse, error) {
	select {
	case s.enrolling <- struct{}{}:
		defer func() { <-s.enrolling }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	// Everything that can be refused is refused before the token is spent.
	key, err := identity.ParseCSR(req.GetCsr())
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "invalid", "certificate request refused", err)
	}
	var agent string
	var leaf *ca.Leaf
	switch evidence := req.GetEvidence().(type) {
	case *signetv1.EnrolRequest_JoinToken:
		agent, leaf, err = s.byToken(ctx, evidence.JoinToken.GetSecret(), key)
	case *signetv1.EnrolRequest_EnrolledKey:
		agent = evidence.EnrolledKey.GetAgent()
		leaf, err = s.byEnrolledKey(ctx, agent, key)
	default:
		err = refuse(codes.InvalidArgument, "invalid", "no evidence", nil)
	}
	if err != nil {
		return nil, err
	}
	return &signetv1.EnrolResponse{
		Agent: agent, TrustDomain: s.config.TrustDomain.Name(), Cluster: s.config.Cluster,
		CertificateChain: leaf.Chain, AgentDoor: s.advertiseAgents, LogVerifierKey: s.audit.VerifierKey(),
	}, nil
}

// byToken spends the token and issues. What the token brings, its use and the agent's row, is one change (outbox). The key
// that has used it may come again while it lives and gets another certificate: an answer that was lost is no harm. Another
// key hears what it would hear of an unknown token.
func (s enrolment) byToken(ctx context.Context, secret []byte, key identity.PublicKey) (string, *ca.Leaf, error) {
	if err := s.canIssue(identity.ControlPlane); err != nil {
		return "", nil, refuse(codes.Unavailable, "issuer_unavailable", "try again later", err)
	}
	// From here on the work is done even if the node hangs up: its token may be spent.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), workTimeout)
	defer cancel()
	node, err := s.tokens.AttestNode(ctx, secret, key)
	var unusable *identity.UnusableToken
	switch {
	case errors.As(err, &unusable):
		reason := "token_unusable"
		if unusable.Reason == "used" {
			reason = "token_replayed"
		}
		return "", nil, refuse(codes.PermissionDenied, reason, identity.ErrTokenUnusable.Error(), err)
	case errors.As(err, new(*refusal)):
		return "", nil, err
	case err != nil:
		return "", nil, refuse(codes.Unavailable, s.whyNot(err), "try again later", err)
	}
	agent := node.Agent()
	grant, err := s.authorizer.Authorize(ctx, identity.AsNewAgent(node), identity.ControlAsk{Key: key})
	if err != nil {
		return "", nil, denied(err)
	}
	leaf, err := s.give(ctx, agent, grant)
	return agent, leaf, err
}

// UseToken spends a token and enrols its agent.
func (l loggedTokens) UseToken(ctx context.Context, hash [sha256.Size]byte, key []byte, now time.Time) (t identity.Token, err error) {
	s := l.server
	note := &store.Note{}
	note.OfToken = func(t identity.Token) error {
		if row, ok := s.directory.Agent(t.Agent); ok && row.Banned {
			return refuse(codes.PermissionDenied, "banned_agent", "not allowed", fmt.Errorf("agent %s is banned and came with join token %s", t.Agent, t.ID))
		}
		id, err := identity.Control{TrustDomain: s.config.TrustDomain, Cluster: s.config.Cluster, Role: identity.RoleAgent, Name: t.Agent}.ID()
		if err != nil {
			return err
		}
		note.Entries, err = s.stamped(
			&auditv1.Entry{Event: &auditv1.Entry_JoinTokenUsed{JoinTokenUsed: &auditv1.JoinTokenUsed{TokenId: t.ID, Agent: t.Agent}}},
			&auditv1.Entry{Event: &auditv1.Entry_AgentEnrolled{AgentEnrolled: &auditv1.AgentEnrolled{
				Agent: t.Agent, PublicKey: key, Evidence: &auditv1.Evidence{Caller: id.String(), Door: enrolDoor.name, Agent: t.Agent},
			}}},
		)
		return err
	}
	err = s.change(ctx, note,
		func(st *store.Store) (err error) {
			t, err = st.UseToken(ctx, hash, key, now)
			return err
		},
		func() {
			s.directory.enrolled(store.Agent{AgentRow: identity.AgentRow{Name: t.Agent, SPKI: key}, Enrolled: now, LastSeen: now})
			s.log.Info("agent enrolled", "agent", t.Agent, "token", t.ID)
		},
	)
	if err == nil && note.Change == 0 {
		s.log.Info("an agent enrols once more with the token and the key of its first time: the answer was lost, or it was restarted", "agent", t.Agent, "token", t.ID)
	}
	return t, err
}

// byEnrolledKey renews for an agent whose certificate has run out: its row must hold the key that signed the request, and
// its last certificate must not have ended too long ago. Where that end was not noted, a crash having come between, the
// certificate is no younger than the row and so ended at most a control certificate's life later.
func (s enrolment) byEnrolledKey(ctx context.Context, agent string, key identity.PublicKey) (*ca.Leaf, error) {
	if err := identity.ParseName("agent", agent); err != nil {
		return nil, refuse(codes.InvalidArgument, "invalid", "no evidence", err)
	}
	grant, err := s.authorizer.Authorize(ctx, identity.AsReturningAgent(agent), identity.ControlAsk{Key: key})
	if err != nil {
		return nil, denied(err)
	}
	row, _ := s.directory.agent(agent)
	last := row.NotAfter
	if last.IsZero() {
		last = row.Enrolled
		if row.LastSeen.After(last) {
			last = row.LastSeen
		}
		last = last.Add(s.config.ControlTTL)
	}
	if end := last.Add(renewalGrace); s.now().After(end) {
		return nil, refuse(codes.PermissionDenied, "expired_too_long", "not allowed",
			fmt.Errorf("the last certificate of agent %s ended at %s, and its key was good for enrolment until %s: enrol it again with a join token", agent, stamp(last), stamp(end)))
	}
	return s.give(ctx, agent, grant)
}

// give makes an agent's certificate and notes, durably, until when it is good.
func (s *Server) give(ctx context.Context, agent string, grant *identity.Grant) (*ca.Leaf, error) {
	r := s.issue(ctx, []*identity.Grant{grant})[0]
	if r.Err != nil {
		return nil, s.notIssued(r.Err)
	}
	note, cancel := context.WithTimeout(ctx, noteTimeout)
	defer cancel()
	if err := s.directory.gave(note, agent, given{at: s.now(), notAfter: r.Leaf.NotAfter}); err != nil {
		// The certificate matters more than the note: without a store an agent must still be able to renew.
		s.log.Warn("could not note until when an agent's certificate is good", "agent", agent, "err", err)
	}
	return r.Leaf, nil
}

// notIssued tells what may work later from what never will.
func (s *Server) notIssued(err error) error {
	var e *ca.Error
	switch {
	case errors.Is(err, errClock):
		return refuse(codes.Unavailable, "clock_wrong", "try again later", err)
	case !errors.As(err, &e) || e.Reason == ca.ReasonSpent:
		return refuse(codes.Internal, "internal", "internal error", err)
	case e.Retry():
		return refuse(codes.Unavailable, s.whyNot(err), "try again later", err)
	}
	return refuse(codes.InvalidArgument, s.whyNot(err), "request refused", err)
}

// denied makes a refusal of what Authorize said.
func denied(err error) error {
	var d *identity.Denied
	if errors.As(err, &d) {
		return refuse(codes.PermissionDenied, d.Reason, "not allowed", err)
	}
	return err
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
