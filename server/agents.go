package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

const (
	// maxItems of one Issue call.
	maxItems = 50
	// maxSyncs of one agent: one it uses, and those of connections that died without a word.
	maxSyncs = 4
	// maxAcks of one SyncRequest.
	maxAcks = 64
	// maxHeld issuers of one SyncRequest, each named by a key identifier of at most maxKeyID bytes.
	maxHeld  = 64
	maxKeyID = 64
	// checkpointEvery spaces the checkpoints an agent is told: each is a proof here and a durable write there.
	checkpointEvery = 10 * time.Second
)

// agentsService is the agent door: mutual TLS; the caller is the agent that the certificate names. Every call has passed
// Server.admit.
type agentsService struct {
	signetv1.UnimplementedAgentsServer
	*Server
}

// Issue answers each item by itself: each is authorised by itself, and all that are granted go to the log in one batch.
func (s agentsService) Issue(ctx context.Context, req *signetv1.IssueRequest) (*signetv1.IssueResponse, error) {
	who, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	agent := who.name
	if n := len(req.GetItems()); n == 0 || n > maxItems {
		return nil, refuse(codes.InvalidArgument, "invalid", fmt.Sprintf("want 1 to %d items", maxItems), fmt.Errorf("agent %s asks for %d items in one call", agent, n))
	}
	if err := s.within(agent, len(req.Items)); err != nil {
		return nil, err
	}
	// Before anything is made, so that a step that is decided meanwhile waits for this agent.
	s.acks.gave(agent, s.now().Add(s.config.MaxTTL))
	if root, ok := s.keeper.unbelieved(s.acks.of(agent)); ok {
		return nil, refuse(codes.Unavailable, "trust_first", "take the newest trust bundle first",
			fmt.Errorf("agent %s has not acknowledged root %s yet: its workloads could not verify others", agent, root))
	}
	results := make([]*signetv1.IssueResult, len(req.Items))
	var grants []*identity.Grant
	var at []int
	for i, item := range req.Items {
		grant, err := s.authorizeItem(ctx, agent, item)
		if err != nil {
			results[i] = s.itemRefused(ctx, agent, err)
			continue
		}
		grants, at = append(grants, grant), append(at, i)
	}
	if len(grants) > 0 {
		for j, r := range s.issue(ctx, grants) {
			if r.Err != nil {
				results[at[j]] = s.itemRefused(ctx, agent, s.notIssued(r.Err))
				continue
			}
			results[at[j]] = &signetv1.IssueResult{Result: &signetv1.IssueResult_Certificate{
				Certificate: &signetv1.IssuedCertificate{Chain: r.Leaf.Chain, LogIndex: r.Leaf.Receipt.Index},
			}}
		}
	}
	if ctx.Err() != nil {
		s.metrics.unread.Add(float64(len(grants)))
	}
	return &signetv1.IssueResponse{Results: results}, nil
}

func (s agentsService) authorizeItem(ctx context.Context, agent string, item *signetv1.IssueItem) (*identity.Grant, error) {
	key, err := identity.ParseCSR(item.GetCsr())
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "invalid", "", err)
	}
	if len(item.Selectors) > identity.MaxSelectors*4 {
		return nil, refuse(codes.InvalidArgument, "invalid", "", fmt.Errorf("%d selectors", len(item.Selectors)))
	}
	ask := identity.WorkloadAsk{Registration: item.Registration, Key: key, Instance: item.Instance}
	for _, text := range item.Selectors {
		selector, err := identity.ParseSelector(text)
		if err != nil {
			return nil, refuse(codes.InvalidArgument, "invalid", "", err)
		}
		ask.Selectors = append(ask.Selectors, selector)
	}
	grant, err := s.authorizer.Authorize(ctx, identity.AsAgent(agent), ask)
	if err != nil {
		return nil, denied(err)
	}
	return grant, nil
}

// itemRefused tells the agent the reason's name; the rest is in the server's log.
func (s agentsService) itemRefused(ctx context.Context, agent string, err error) *signetv1.IssueResult {
	r := &refusal{code: codes.Internal, reason: "internal", cause: err}
	errors.As(err, &r)
	s.rejected(ctx, agentDoor, refuse(r.code, r.reason, "", fmt.Errorf("agent %s: %w", agent, r.cause)))
	reason := signetv1.Refusal_REASON_UNAVAILABLE
	switch r.code {
	case codes.InvalidArgument:
		reason = signetv1.Refusal_REASON_INVALID
	case codes.PermissionDenied:
		reason = signetv1.Refusal_REASON_DENIED
	}
	return &signetv1.IssueResult{Result: &signetv1.IssueResult_Refusal{Refusal: &signetv1.Refusal{Reason: reason, Message: r.reason}}}
}

// Renew renews the agent's own control certificate.
func (s agentsService) Renew(ctx context.Context, req *signetv1.RenewRequest) (*signetv1.RenewResponse, error) {
	who, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	agent := who.name
	if err := s.within(agent, 1); err != nil {
		return nil, err
	}
	key, err := identity.ParseCSR(req.GetCsr())
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "invalid", "certificate request refused", err)
	}
	grant, err := s.authorizer.Authorize(ctx, identity.AsAgent(agent), identity.ControlAsk{Key: key})
	if err != nil {
		return nil, denied(err)
	}
	leaf, err := s.give(ctx, agent, grant)
	if ctx.Err() != nil {
		s.metrics.unread.Inc()
	}
	if err != nil {
		return nil, err
	}
	return &signetv1.RenewResponse{CertificateChain: leaf.Chain}, nil
}

// session is one Sync stream: what its agent has said.
type session struct {
	agent string
	// number grows with every stream.
	number uint64
	// poke wakes the sender when the agent has said something.
	poke chan struct{}

	mu   sync.Mutex
	acks map[string]trust.Digest
	// seen is the size of the newest checkpoint the agent has verified; answered is whether it has said so since we last
	// sent one (or at all).
	seen     uint64
	answered bool
}

// sessions are the Sync streams that are open.
type sessions struct {
	mu   sync.Mutex
	open map[*session]struct{}
	per  map[string]int
	last uint64
}

func (ss *sessions) enter(n *session) bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.per[n.agent] >= maxSyncs {
		return false
	}
	if ss.open == nil {
		ss.open, ss.per = map[*session]struct{}{}, map[string]int{}
	}
	ss.open[n] = struct{}{}
	ss.per[n.agent]++
	ss.last++
	n.number = ss.last
	return true
}

func (ss *sessions) leave(n *session) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	delete(ss.open, n)
	if ss.per[n.agent]--; ss.per[n.agent] == 0 {
		delete(ss.per, n.agent)
	}
}

// of returns how many streams an agent has open.
func (ss *sessions) of(agent string) int {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.per[agent]
}

// count returns how many streams are open, and on how many the agent has acknowledged this bundle.
func (ss *sessions) count(b trust.Bundle) (open, acked int) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for n := range ss.open {
		n.mu.Lock()
		if d, ok := n.acks[b.TrustDomain().Name()]; ok && d == b.Digest() {
			acked++
		}
		n.mu.Unlock()
	}
	return len(ss.open), acked
}

// Sync tells the agent what it has to know, at once and at every change. There is no queue: what is sent is always what
// is true at that moment, so a slow reader misses steps but never falls behind, and delays nobody else.
func (s agentsService) Sync(stream grpc.BidiStreamingServer[signetv1.SyncRequest, signetv1.SyncResponse]) error {
	ctx := stream.Context()
	who, err := caller(ctx)
	if err != nil {
		return err
	}
	n := &session{agent: who.name, poke: make(chan struct{}, 1)}
	if !s.sessions.enter(n) {
		return refuse(codes.ResourceExhausted, "too_many", "too many streams", fmt.Errorf("agent %s has %d Sync streams open", who.name, maxSyncs))
	}
	defer s.sessions.leave(n)
	defer s.acks.left(who.name)
	s.log.Info("agent connected", "agent", who.name)
	defer s.log.Info("agent disconnected", "agent", who.name)

	// The receiver ends with the stream, which ends when this function returns.
	heard := make(chan error, 1)
	go func() {
		// Outside of the call's own goroutine a panic would end the process.
		var err error
		defer func() { heard <- err }()
		defer s.caught(agentDoor, &err)
		err = s.hear(stream, n)
	}()
	return s.tell(stream, who, n, heard)
}

// hear takes what the agent says until the stream ends.
func (s agentsService) hear(stream grpc.BidiStreamingServer[signetv1.SyncRequest, signetv1.SyncResponse], n *session) error {
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		if len(req.BundleAcks) > maxAcks {
			return refuse(codes.InvalidArgument, "invalid", "too many acknowledgements", nil)
		}
		acks := make(map[string]trust.Digest, len(req.BundleAcks))
		for _, a := range req.BundleAcks {
			if len(a.Digest) != len(trust.Digest{}) || len(a.TrustDomain) > identity.MaxTrustDomainLength {
				return refuse(codes.InvalidArgument, "invalid", "malformed acknowledgement", nil)
			}
			acks[a.TrustDomain] = trust.Digest(a.Digest)
		}
		held := req.GetIssuersHeld().GetKeyIds()
		if len(held) > maxHeld || slices.ContainsFunc(held, func(id []byte) bool { return len(id) > maxKeyID }) {
			return refuse(codes.InvalidArgument, "invalid", "too many issuers", nil)
		}
		word := said{session: n.number, held: held, heard: req.IssuersHeld != nil}
		for _, a := range req.BundleAcks {
			if a.TrustDomain == s.config.TrustDomain.Name() {
				word.oldest = trust.Version{Sequence: a.Sequence, Digest: trust.Digest(a.Digest)}
			}
		}
		if b := req.BundleStored; b.GetTrustDomain() == s.config.TrustDomain.Name() && len(b.GetDigest()) == len(trust.Digest{}) {
			word.stored = trust.Version{Sequence: b.Sequence, Digest: trust.Digest(b.Digest)}
		}
		s.acks.hear(n.agent, word)
		n.mu.Lock()
		n.acks = acks
		// The first message counts as an answer also when it names no checkpoint: this agent has seen none.
		if c := req.CheckpointSeen; c != nil {
			n.seen, n.answered = c.Size, true
		} else if n.seen == 0 {
			n.answered = true
		}
		n.mu.Unlock()
		if c := req.CheckpointSeen; c != nil {
			s.heed(stream.Context(), n.agent, c)
		}
		select {
		case n.poke <- struct{}{}:
		default:
		}
	}
}

// tell sends whatever is newer than what was sent.
func (s agentsService) tell(stream grpc.BidiStreamingServer[signetv1.SyncRequest, signetv1.SyncResponse], who agentInfo, n *session, heard <-chan error) error {
	ctx := stream.Context()
	var sequence, told uint64
	var set *signetv1.RegistrationSet
	var stale [][]byte
	checkpoints := time.NewTicker(s.checkpointEvery)
	defer checkpoints.Stop()
	due := true
	for {
		// Bells before values, so that no change is missed between.
		bundles, registrations, rotated := s.bundles.Changed(), s.directory.changed.Next(), s.keeper.changed.Next()
		if err := s.standing(who); err != nil {
			return err
		}
		if b, ok := s.bundles.Get(s.config.TrustDomain); ok && b.Sequence() > sequence {
			m := &signetv1.Bundle{TrustDomain: b.TrustDomain().Name(), Sequence: b.Sequence()}
			for _, r := range b.Roots() {
				m.Roots = append(m.Roots, r.Raw)
			}
			if err := stream.Send(&signetv1.SyncResponse{Update: &signetv1.SyncResponse_Bundle{Bundle: m}}); err != nil {
				return err
			}
			sequence = b.Sequence()
		}
		if now := s.directory.set(n.agent); now != set {
			if err := stream.Send(&signetv1.SyncResponse{Update: &signetv1.SyncResponse_Registrations{Registrations: now}}); err != nil {
				return err
			}
			set = now
		}
		if ids := s.keeper.stale(); !slices.EqualFunc(ids, stale, bytes.Equal) {
			window := rotation.ReissueWindow(s.directory.identities(), s.config.Rotation.ReissueRate)
			m := &signetv1.Reissue{IssuerKeyIds: ids, WindowMs: window.Milliseconds()}
			if err := stream.Send(&signetv1.SyncResponse{Update: &signetv1.SyncResponse_Reissue{Reissue: m}}); err != nil {
				return err
			}
			stale = ids
		}
		if due {
			c, err := s.checkpointFor(ctx, n, told)
			if err != nil {
				// Trust and registrations go on; the next tick tries again.
				s.log.Warn("no checkpoint for an agent", "agent", n.agent, "err", err)
				due = false
			} else if c != nil {
				if err := stream.Send(&signetv1.SyncResponse{Update: &signetv1.SyncResponse_Checkpoint{Checkpoint: c.message}}); err != nil {
					return err
				}
				told, due = c.size, false
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.stopping:
			return status.Error(codes.Unavailable, "server is stopping")
		case err := <-heard:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-bundles:
		case <-registrations:
		case <-rotated:
		case <-n.poke:
		case <-checkpoints.C:
			due = true
		}
	}
}

type checkpoint struct {
	size    uint64
	message *signetv1.Checkpoint
}

// checkpointFor returns the log's newest checkpoint with the proof that it continues the one the agent has seen, or nil
// when there is nothing to say: the agent has not answered the last one, or has seen this one.
func (s *Server) checkpointFor(ctx context.Context, n *session, told uint64) (*checkpoint, error) {
	n.mu.Lock()
	seen, answered := n.seen, n.answered
	n.mu.Unlock()
	if !answered {
		return nil, nil
	}
	note, err := s.audit.Checkpoint(ctx)
	if err != nil {
		return nil, err
	}
	size, err := checkpointSize(note)
	if err != nil {
		return nil, err
	}
	if size == told || size == seen || size == 0 {
		return nil, nil
	}
	c := &checkpoint{size: size, message: &signetv1.Checkpoint{Note: note}}
	switch {
	case seen > size:
		// The agent has seen more than this log holds (heed). It gets the note without a proof, so that it sees the rollback too.
	case seen > 0:
		if c.message.ConsistencyProof, err = s.audit.Consistency(ctx, seen, size); err != nil {
			return nil, err
		}
		c.message.FromSize = seen
	}
	n.mu.Lock()
	n.answered = false
	n.mu.Unlock()
	return c, nil
}

// checkpointSize reads the second line of a checkpoint that our own log has signed (c2sp.org/tlog-checkpoint).
func checkpointSize(note []byte) (uint64, error) {
	lines := strings.SplitN(string(note), "\n", 3)
	if len(lines) < 3 {
		return 0, errors.New("the log's checkpoint is not a note")
	}
	return strconv.ParseUint(lines[1], 10, 64)
}
