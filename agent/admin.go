package agent

import (
	"cmp"
	"context"
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/identity"
)

// The admin socket tells what this agent does and why. It is for this process's own user and root, and it changes nothing.

const (
	adminSocket     = "admin.sock"
	adminSocketMode = 0o600
	adminMaxRequest = 64 << 10
	adminMaxConns   = 16
	// maxMisses of a kind are told.
	maxMisses = 10
	// maxRefusals of callers are remembered.
	maxRefusals = 64
)

// AdminSocket is where an agent with this state folder answers its admin.
func AdminSocket(stateDir string) string { return filepath.Join(stateDir, adminSocket) }

// mayAdminister: the socket's mode lets in nobody else, but a mode can be changed, and root passes any.
func mayAdminister(uid uint32) bool { return uid == 0 || uid == uint32(os.Geteuid()) } //nolint:gosec // never negative here

func (a *Agent) newAdminServer() *grpc.Server {
	s := grpc.NewServer(grpc.MaxRecvMsgSize(adminMaxRequest), grpc.MaxConcurrentStreams(adminMaxConns), grpc.ConnectionTimeout(connectTimeout))
	adminv1.RegisterAgentAdminServer(s, adminService{a: a})
	return s
}

// pidDescriber is an attestor that can look at any process, identity.UnixAttestor for one.
type pidDescriber interface {
	DescribePID(ctx context.Context, pid int) (identity.Workload, error)
}

type adminService struct {
	adminv1.UnimplementedAgentAdminServer
	a *Agent
}

// timestamp is unset for the zero time.
func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// Status implements the service.
func (s adminService) Status(context.Context, *adminv1.AgentStatusRequest) (*adminv1.AgentStatusResponse, error) {
	a := s.a
	r := &adminv1.AgentStatusResponse{}
	if m := a.member.Load(); m != nil {
		r.Agent, r.Cluster, r.TrustDomain = m.Agent, m.Cluster, m.TrustDomain
		r.Server = &adminv1.AgentServerStatus{
			AgentDoor: m.AgentDoor, Connected: a.connected.Load(), ControlNotAfter: timestamp(m.leaf.NotAfter), TurnedAwaySince: timestamp(a.hub.turnedSince()),
		}
		if last := a.metrics.lastContact.Load(); r.Server.Connected {
			r.Server.LastContact = timestamp(a.now())
		} else if last != 0 {
			r.Server.LastContact = timestamp(time.Unix(0, last))
		}
		if b, ok := a.bundles.Get(m.td); ok {
			roots := b.Roots()
			first := slices.MinFunc(roots, func(x, y *x509.Certificate) int { return x.NotAfter.Compare(y.NotAfter) })
			r.Bundle = &adminv1.AgentBundleStatus{
				Sequence: b.Sequence(), Digest: b.Digest().String(), Roots: uint32(len(roots)), NotAfter: timestamp(first.NotAfter), //nolint:gosec // at most trust.MaxRoots
				Unstored: a.stored.pending(), ReturnedBy: timestamp(a.returnedBy(b)),
			}
			if acks := a.word.get().acks; len(acks) == 1 {
				r.Bundle.Acknowledged = acks[0].Sequence
			}
		}
		size, root := a.witness.Seen()
		r.Witness = &adminv1.AgentWitnessStatus{Size: size, RootHash: root, Contradicted: a.inconsistent.Load()}
		if r.Witness.Contradicted {
			r.Witness.EvidenceFile, r.Witness.Evidence = a.path(evidenceFile), strings.ToValidUTF8(a.evidence(), "")
		}
	}
	r.Identities = a.hub.identities()
	for _, st := range a.sds.Streams() {
		m := &adminv1.AgentStreamStatus{Number: st.Number, Peer: st.Peer, Protocol: st.Protocol, Node: st.Node, Since: timestamp(st.Since)}
		for _, n := range st.Names {
			m.Names = append(m.Names, &adminv1.AgentNameStatus{
				Name: n.Name, Kind: n.Kind, Sent: n.Sent, Acked: n.Acked, Rejected: n.Rejected, Reason: n.Reason, Serial: n.Serial,
			})
		}
		r.Streams = append(r.Streams, m)
	}
	return r, nil
}

// identities tells of every entry, by registration.
func (h *hub) identities() []*adminv1.AgentIdentityStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]*adminv1.AgentIdentityStatus, 0, len(h.entries))
	for name, e := range h.entries {
		m := &adminv1.AgentIdentityStatus{
			Registration: name, SpiffeId: e.registration.ID.String(), Wanted: uint32(len(e.wanted)), //nolint:gosec // at most maxConnections
			FailedTries: uint32(max(e.attempts, 0)), LastError: e.lastError, //nolint:gosec // far from overflowing
		}
		if c := e.current; c != nil {
			m.IssuerKeyId, m.ReissueAt = []byte(c.issuer), timestamp(e.replaceAt)
			m.Serial, m.NotBefore, m.NotAfter, m.RenewAt = c.svid.Serial, timestamp(c.svid.NotBefore), timestamp(c.svid.NotAfter), timestamp(e.due())
		}
		out = append(out, m)
	}
	slices.SortFunc(out, func(x, y *adminv1.AgentIdentityStatus) int { return strings.Compare(x.Registration, y.Registration) })
	return out
}

// Why implements the service.
func (s adminService) Why(ctx context.Context, req *adminv1.WhyRequest) (*adminv1.WhyResponse, error) {
	if !s.a.hub.isKnown() {
		return nil, status.Error(codes.Unavailable, "this agent has not yet heard from its server whom it may serve: see its log")
	}
	switch q := req.Subject.(type) {
	case *adminv1.WhyRequest_Pid:
		return s.whyPID(ctx, int(q.Pid))
	case *adminv1.WhyRequest_SpiffeId:
		return s.whyRegistration("gives "+clip(q.SpiffeId, 2048), func(r identity.Registration) bool { return r.ID.String() == q.SpiffeId })
	case *adminv1.WhyRequest_Registration:
		return s.whyRegistration("is called "+clip(q.Registration, 63), func(r identity.Registration) bool { return r.Name == q.Registration })
	}
	return nil, status.Error(codes.InvalidArgument, "why what? name a process, a SPIFFE ID or a registration")
}

func (s adminService) whyPID(ctx context.Context, pid int) (*adminv1.WhyResponse, error) {
	describer, ok := s.a.attestor.(pidDescriber)
	if !ok {
		return nil, status.Error(codes.FailedPrecondition, "this agent does not know its workloads by PID")
	}
	w, err := describer.DescribePID(ctx, pid)
	if err != nil {
		return nil, status.Error(codes.NotFound, clip(err.Error(), 512))
	}
	s.a.hub.mu.Lock()
	agent := s.a.hub.agent
	all, shut := s.a.hub.split()
	s.a.hub.mu.Unlock()
	r := &adminv1.WhyResponse{Agent: agent, Selectors: selectorStrings(w.Selectors), Notes: w.Notes}
	for _, reg := range identity.Match(shut, w.Selectors) {
		r.Notes = append(r.Notes, "registration "+reg.Name+" fits, and gives nothing: "+isBanned(reg))
	}
	for _, reg := range identity.Match(all, w.Selectors) {
		r.Registrations = append(r.Registrations, why(reg, nil, true))
	}
	var misses []*adminv1.WhyRegistration
	for _, reg := range all {
		if l := lacking(reg, w.Selectors); len(l) > 0 {
			misses = append(misses, why(reg, l, false))
		}
	}
	r.Registrations = append(r.Registrations, nearest(misses, func(m *adminv1.WhyRegistration) int { return len(m.Lacking) }, func(m *adminv1.WhyRegistration) string { return m.Name })...)
	return r, nil
}

func (s adminService) whyRegistration(what string, is func(identity.Registration) bool) (*adminv1.WhyResponse, error) {
	h := s.a.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	r := &adminv1.WhyResponse{Agent: h.agent}
	all, shut := h.split()
	for _, reg := range all {
		if !is(reg) {
			continue
		}
		m := why(reg, nil, false)
		for v := range h.views {
			m.Callers = append(m.Callers, h.caller(reg, v.workload.Instance, v.socket, v.selectors, time.Time{}))
		}
		for _, refused := range h.refusals {
			m.Callers = append(m.Callers, h.caller(reg, refused.instance, refused.socket, refused.selectors, refused.at))
		}
		m.Callers = nearest(m.Callers, func(c *adminv1.WhyCaller) int {
			if c.Fits {
				return -1
			}
			return len(c.Lacking)
		}, func(c *adminv1.WhyCaller) string { return c.Instance })
		m.Fits = len(m.Callers) > 0 && m.Callers[0].Fits && m.Callers[0].Refused == nil
		r.Registrations = append(r.Registrations, m)
	}
	if i := slices.IndexFunc(shut, is); len(r.Registrations) == 0 && i >= 0 {
		return nil, status.Errorf(codes.NotFound, "registration %s of agent %s gives nothing: %s", shut[i].Name, h.agent, isBanned(shut[i]))
	}
	if len(r.Registrations) == 0 {
		return nil, status.Errorf(codes.NotFound, "no registration of agent %s %s: the server tells an agent only what names it, see signet registration list --agent %s", h.agent, what, h.agent)
	}
	return r, nil
}

// split are the registrations that give something, and those that give nothing since their identities are banned. Called with
// mu held.
func (h *hub) split() (all, shut []identity.Registration) {
	shut = slices.Clone(h.shut)
	for _, r := range h.registrations {
		if _, banned := h.banned[r.ID]; banned {
			shut = append(shut, r)
		} else {
			all = append(all, r)
		}
	}
	return all, shut
}

func isBanned(r identity.Registration) string {
	return r.ID.String() + " is banned, and issued to nobody: signet identity list says since when and why"
}

// caller measures one process by one registration. Called with mu held.
func (h *hub) caller(reg identity.Registration, instance, socket string, shown []identity.Selector, refused time.Time) *adminv1.WhyCaller {
	l := lacking(reg, shown)
	c := &adminv1.WhyCaller{Instance: clip(instance, maxInstance), Socket: socket, Lacking: selectorStrings(l), Refused: timestamp(refused)}
	c.Fits = len(l) == 0 && bySocket(reg, socket)
	return c
}

// lacking are the selectors of a registration that a caller does not show.
func lacking(r identity.Registration, shown []identity.Selector) []identity.Selector {
	return slices.DeleteFunc(slices.Clone(r.Selectors), func(s identity.Selector) bool { return slices.Contains(shown, s) })
}

func why(r identity.Registration, lacking []identity.Selector, fits bool) *adminv1.WhyRegistration {
	return &adminv1.WhyRegistration{
		Name: r.Name, SpiffeId: r.ID.String(), Selectors: selectorStrings(r.Selectors), Priority: r.Priority, Lacking: selectorStrings(lacking), Fits: fits,
	}
}

// nearest orders by distance and cuts off what is far.
func nearest[T any](list []T, distance func(T) int, name func(T) string) []T {
	slices.SortStableFunc(list, func(a, b T) int {
		return cmp.Or(cmp.Compare(distance(a), distance(b)), strings.Compare(name(a), name(b)))
	})
	return list[:min(len(list), maxMisses)]
}

// refusal is a caller that no registration fitted.
type refusal struct {
	instance, socket string
	selectors        []identity.Selector
	at               time.Time
}

// remember keeps the newest refusals, one for each process and socket. Called with mu held.
func (h *hub) remember(v *view) {
	h.refusals = slices.DeleteFunc(h.refusals, func(r refusal) bool { return r.instance == v.workload.Instance && r.socket == v.socket })
	if len(h.refusals) >= maxRefusals {
		h.refusals = slices.Delete(h.refusals, 0, 1)
	}
	h.refusals = append(h.refusals, refusal{v.workload.Instance, v.socket, v.selectors, h.now()})
}
