package server

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
)

// rotationService is the part of the admin door that shows and moves the life of CAs.
type rotationService struct {
	adminv1.UnimplementedRotationServer
	adminService
}

// maxReason bounds what a person gives as a reason, in bytes.
const maxReason = 512

// checkReason refuses a reason that tells those who read the log nothing, or too much.
func checkReason(what, reason string) error {
	if strings.TrimSpace(reason) == "" || len(reason) > maxReason {
		return plainly(codes.InvalidArgument, "invalid", fmt.Errorf("%s: give a reason of 1 to %d bytes, and not of blanks alone, for the log", what, maxReason))
	}
	return nil
}

// undone is why a change that was not refused could not be made: the database or the log takes no write.
type undone struct{ error }

func (u undone) Unwrap() error { return u.error }

// answer tells what a change has done, or why it was not made.
func (s rotationService) answer(o outcome, err error) (*adminv1.RotationChangeResponse, error) {
	switch {
	case err == nil || !o.changed:
	case o.dry:
		err = fmt.Errorf("it would be done, but what follows from it could not be now: %w", err)
	default:
		err = fmt.Errorf("it is done, but what follows from it could not be, and is tried again: %w", err)
	}
	switch {
	case err == nil:
	case errors.Is(err, store.ErrConflict):
		return nil, plainly(codes.Aborted, "store_unavailable", err)
	case errors.Is(err, errNotLogged), errors.Is(err, errNotTaken), errors.Is(err, context.DeadlineExceeded), errors.Is(err, keystore.ErrAway), errors.As(err, new(undone)), errors.As(err, new(syscall.Errno)):
		return nil, plainly(codes.Unavailable, s.whyNot(err), err)
	default:
		return nil, plainly(codes.FailedPrecondition, "invalid", err)
	}
	now := s.now()
	r := &adminv1.RotationChangeResponse{Changed: o.changed, Done: o.done, Forced: o.forced, Upstream: s.config.Upstream != nil}
	for _, x := range o.reports {
		r.Reports = append(r.Reports, &adminv1.ReportTaken{Cluster: x.Cluster, At: timestampOf(x.At), Held: timestampOf(x.held)})
	}
	for _, step := range o.taken {
		r.Taken = append(r.Taken, stepMessage(step, now))
	}
	for _, step := range o.next {
		r.Next = append(r.Next, stepMessage(step, now))
	}
	for _, a := range o.set.rows {
		if _, was := o.before.row(a.ID); !was && a.Kind == ca.KindIntermediate {
			r.Requested++
		}
		// What an upstream at hand signs nobody has to carry anywhere, nor what a dry run has not made.
		if s.config.Upstream != nil || a.Kind != ca.KindIntermediate || a.State != ca.Prepared || len(a.Chain) > 0 || len(a.CSR) == 0 {
			continue
		}
		if request, csr, err := storedRequest(a); err == nil {
			r.Requests = append(r.Requests, &adminv1.PendingRequest{
				Authority: a.ID, Csr: csr, KeyFingerprint: ca.KeyFingerprint(request.RawSubjectPublicKeyInfo),
			})
		}
	}
	if life := o.set.life(); len(r.Requests) > 1 {
		if stagger := s.keeper.policy.Stagger(life); stagger > 0 {
			r.Life, r.Stagger = durationpb.New(life), durationpb.New(stagger)
		}
	}
	return r, nil
}

// life is how long the active intermediate was made to live, unless its root has cut it short.
func (s *authorities) life() time.Duration {
	i := slices.IndexFunc(s.rows, func(a store.Authority) bool { return a.Kind == ca.KindIntermediate && a.State == ca.Active })
	if i < 0 {
		return ca.DefaultIntermediateLife
	}
	chain := s.chains[s.rows[i].ID]
	if own, root := chain[0], chain[len(chain)-1]; own.NotAfter.Before(root.NotAfter) {
		return own.NotAfter.Sub(own.NotBefore.Add(ca.PlanBackdate)) + time.Second
	}
	return ca.DefaultIntermediateLife
}

// said is in words what was changed since the set before: what is new first.
func (s *authorities) said(before *authorities) (done []string) {
	all := s.changes(before)
	slices.SortStableFunc(all, func(x, y changedRow) int { return cmp.Compare(min(len(x.before.ID), 1), min(len(y.before.ID), 1)) })
	for _, c := range all {
		a, b := c.after, c.before
		switch {
		case b.ID == "" && a.Kind == ca.KindRoot && a.State == ca.Prepared:
			done = append(done, a.ID+" added"+s.sameKey(c))
		case b.ID == "" && a.Kind == ca.KindRoot:
			done = append(done, a.ID+" added, "+string(a.State)+s.sameKey(c))
		case b.ID == "" && len(a.CSR) == 0:
			done = append(done, "a new intermediate requested (its key would be made)")
		case b.ID == "":
			done = append(done, a.ID+" requested"+keyOf(a))
		case len(b.Chain) == 0 && len(a.Chain) > 0 && !b.Tainted.IsZero():
			done = append(done, a.ID+", whose key is lost, was signed under "+a.Root+": what is forged is accepted as long as that is believed")
		case len(b.Chain) == 0 && len(a.Chain) > 0:
			done = append(done, a.ID+" signed under "+a.Root)
			if above, _ := s.row(a.Root); !above.Leaving.IsZero() {
				done = append(done, a.Root+" is leaving: "+a.ID+" bridges the time until another root is in use, and under that one more intermediate is needed")
			}
		case a.Kind == ca.KindIntermediate && a.State == ca.Removed && b.State != ca.Removed:
			done = append(done, a.ID+" dropped")
		case a.State != b.State:
			done = append(done, a.ID+" "+string(b.State)+" → "+string(a.State))
		}
		if a.Wanted && !b.Wanted && b.ID != "" {
			done = append(done, a.ID+" takes over as soon as it may")
		}
		if a.Leaving.IsZero() != b.Leaving.IsZero() {
			verb := " leaves"
			if a.Leaving.IsZero() {
				verb = " stays"
			}
			done = append(done, a.ID+verb)
		}
		if !a.Tainted.IsZero() && b.Tainted.IsZero() {
			done = append(done, a.ID+" tainted"+s.sameKey(c))
		}
	}
	return done
}

// keyOf is the key that a request is for.
func keyOf(a store.Authority) string {
	request, _, err := storedRequest(a)
	if err != nil {
		return ""
	}
	return ", key " + ca.KeyFingerprint(request.RawSubjectPublicKeyInfo)
}

func timestampOf(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func stepMessage(s rotation.Step, now time.Time) *adminv1.RotationStep {
	m := &adminv1.RotationStep{Authority: s.Authority, Kind: s.Kind, From: string(s.From), To: string(s.To), Because: s.Because, At: timestampOf(rotation.At(s, now))}
	for _, w := range s.Waits {
		m.Waits = append(m.Waits, &adminv1.RotationWait{Code: string(w.Code), For: w.For, Until: timestampOf(w.Until), Missing: w.Missing, Forcible: w.Code.Forcible()})
	}
	return m
}

func (s *authorities) message(a store.Authority) *adminv1.AuthorityInfo {
	m := &adminv1.AuthorityInfo{
		Id: a.ID, Kind: a.Kind, Root: a.Root, State: string(a.State), Since: timestampOf(a.Since),
		NotBefore: timestampOf(a.NotBefore), NotAfter: timestampOf(a.NotAfter), Leaving: timestampOf(a.Leaving),
		Tainted: timestampOf(a.Tainted), LeavesUntil: timestampOf(a.LeavesUntil), Wanted: a.Wanted, Csr: a.CSR,
	}
	if !a.Key.IsZero() {
		m.Key = a.Key.String()
	}
	for _, c := range s.chains[a.ID] {
		m.Chain = append(m.Chain, c.Raw)
	}
	return m
}

// messages are the CAs of the mesh, roots first.
func (s *authorities) messages() []*adminv1.AuthorityInfo {
	var all []*adminv1.AuthorityInfo
	for _, kind := range []string{ca.KindRoot, ca.KindIntermediate} {
		for _, a := range s.rows {
			if a.Kind == kind {
				all = append(all, s.message(a))
			}
		}
	}
	return all
}

// ListAuthorities shows how the CAs stand.
func (s rotationService) ListAuthorities(ctx context.Context, _ *adminv1.ListAuthoritiesRequest) (*adminv1.ListAuthoritiesResponse, error) {
	if _, err := s.evidence(ctx); err != nil {
		return nil, err
	}
	set := s.keeper.current.Load()
	digest := set.bundle.Digest()
	return &adminv1.ListAuthoritiesResponse{
		Authorities: set.messages(), BundleSequence: set.bundle.Sequence(), BundleDigest: digest[:], Stopped: s.stoppedMessage(set, s.now()),
	}, nil
}

// stoppedMessage says why no leaf can be made; nil = one can.
func (s *Server) stoppedMessage(set *authorities, now time.Time) *adminv1.IssuingStopped {
	look := s.lookAtRotation(set, now)
	look.Halt = s.halt(set)
	h := look.Stopped(now)
	if h == nil {
		return nil
	}
	return &adminv1.IssuingStopped{Since: timestampOf(h.Since), Why: h.Why, Mend: h.Mend}
}

// RotationStatus shows how the CAs stand, what comes next and what it waits for, in all clusters.
func (s rotationService) RotationStatus(ctx context.Context, _ *adminv1.RotationStatusRequest) (*adminv1.RotationStatusResponse, error) {
	if _, err := s.evidence(ctx); err != nil {
		return nil, err
	}
	k := s.keeper
	set, now := k.current.Load(), s.now()
	w := k.world(set, now)
	r := &adminv1.RotationStatusResponse{Cluster: s.config.Cluster, Automatic: k.policy.Automatic, Authorities: set.messages()}
	failed := k.failedSteps(func(error) bool { return false })
	for _, step := range rotation.Next(k.policy.Policy, w, now) {
		m := stepMessage(step, now)
		for _, f := range failed {
			if f.Authority == step.Authority && f.To == step.To && step.Ready(false) {
				m.At, m.Waits = nil, []*adminv1.RotationWait{{Code: waitFailed, For: f.String()}}
			}
		}
		r.Steps = append(r.Steps, m)
	}
	for _, c := range append([]rotation.Report{w.Own}, w.Peers...) {
		m := &adminv1.ClusterTrust{Cluster: c.Cluster, At: timestampOf(c.At)}
		for _, x := range c.Roots {
			m.Roots = append(m.Roots, &adminv1.RootTrust{
				Id: x.ID, Trusting: uint32(x.Trusting), Validators: uint32(x.Validators), Missing: x.Missing, Leaving: x.Leaving,
				Signing: x.Signing, LeavesUntil: timestampOf(x.LeavesUntil), Holding: uint32(x.Holding),
			})
		}
		r.Clusters = append(r.Clusters, m)
	}
	r.Tainted = k.tainted(set, w, now)
	r.Reissue = k.reissueStatus(set, now)
	r.Stopped = s.stoppedMessage(set, now)
	return r, nil
}

// tainted says of every CA whose key is lost who still accepts what a thief makes with it.
func (k *keeper) tainted(set *authorities, w rotation.World, now time.Time) []*adminv1.TaintStatus {
	var all []*adminv1.TaintStatus
	clusters := append([]rotation.Report{w.Own}, w.Peers...)
	for _, c := range clusters {
		for _, t := range c.Tainted {
			until := t.NotAfter.Add(k.policy.Skew)
			if now.After(until) {
				continue // nobody accepts it any more
			}
			m := &adminv1.TaintStatus{Id: t.ID, Root: t.Root, Cluster: c.Cluster, Since: timestampOf(t.Since), AcceptedUntil: timestampOf(until)}
			all = append(all, m)
			for i, by := range clusters {
				a := k.acceptance(by, t.Root, now)
				if i == 0 {
					a.Named, a.Agents = k.acceptingAgents(t.Root, now)
				}
				n := a.Agents
				if a.Bundle {
					n++
				}
				if a.Unknown {
					n++
				}
				if n > 0 {
					m.Accepting += n
					m.AcceptedBy = append(m.AcceptedBy, a)
				}
			}
			if root, ok := set.row(t.Root); ok && root.InBundle() && root.Leaving.IsZero() {
				m.Advice = "make another root (signet root init) and replace this one: signet rotation start root --root FILE --fingerprint SHA256:…"
			}
		}
	}
	return all
}

// acceptance is what a cluster's report says of who accepts what was made under a root.
func (k *keeper) acceptance(r rotation.Report, root string, now time.Time) *adminv1.Acceptance {
	a, known := k.policy.Accepts(r, root, now)
	return &adminv1.Acceptance{Cluster: r.Cluster, Bundle: a.Bundle, Agents: uint32(a.Agents), Reported: timestampOf(r.At), Unknown: !known}
}

// acceptingAgents names the agents here whose workloads believe a root, or may, as far as there is room, and says how many
// there are: those that were away longest first.
func (k *keeper) acceptingAgents(root string, now time.Time) (named []*adminv1.AcceptingAgent, all uint32) {
	agents := k.agents(now)
	k.mu.Lock()
	agents = slices.DeleteFunc(agents, func(v validator) bool { return !k.mayHave(v.oldest, root) })
	k.mu.Unlock()
	slices.SortStableFunc(agents, func(x, y validator) int {
		if x.away.IsZero() != y.away.IsZero() {
			if x.away.IsZero() {
				return 1
			}
			return -1
		}
		return x.away.Compare(y.away)
	})
	for _, v := range agents[:min(len(agents), maxMissing)] {
		named = append(named, &adminv1.AcceptingAgent{Agent: v.agent, LastHeard: timestampOf(v.away), Unheard: v.unheard})
	}
	return named, uint32(len(agents))
}

// acceptedBy says in words who of a cluster accepts what is forged.
func acceptedBy(a *adminv1.Acceptance) string {
	var who []string
	if a.Bundle {
		who = append(who, "its trust bundle")
	}
	switch {
	case a.Agents == 1:
		who = append(who, "1 agent")
	case a.Agents > 1:
		who = append(who, fmt.Sprintf("%d agents", a.Agents))
	}
	switch {
	case a.Unknown && a.Reported == nil:
		who = append(who, "has never reported")
	case a.Unknown:
		who = append(who, "its report of "+stamp(a.Reported.AsTime())+" does not say how it is now")
	}
	return a.Cluster + " (" + strings.Join(who, ", ") + ")"
}

// reissueStatus says who has leaves that are to be replaced; nil when none are.
func (k *keeper) reissueStatus(set *authorities, now time.Time) *adminv1.ReissueStatus {
	stale := k.stale()
	if len(stale) == 0 {
		return nil
	}
	r := &adminv1.ReissueStatus{}
	for _, a := range set.rows {
		if chain := set.chains[a.ID]; len(chain) > 0 && slices.ContainsFunc(stale, func(id []byte) bool { return bytes.Equal(id, chain[0].SubjectKeyId) }) {
			if a.Tainted.IsZero() {
				r.Exposed = append(r.Exposed, a.ID)
			} else {
				r.Tainted = append(r.Tainted, a.ID)
			}
			if r.Until == nil || a.LeavesUntil.After(r.Until.AsTime()) {
				r.Until = timestampOf(a.LeavesUntil)
			}
		}
	}
	for _, v := range k.validators(now) {
		r.Agents++
		has := func(id []byte) bool {
			return slices.ContainsFunc(stale, func(s []byte) bool { return bytes.Equal(s, id) })
		}
		if !v.heard || slices.ContainsFunc(v.held, has) {
			if r.Holding++; len(r.HoldingAgents) < maxMissing {
				r.HoldingAgents = append(r.HoldingAgents, v.agent)
			}
		}
	}
	return r
}

// PlanRotation says which steps would come.
func (s rotationService) PlanRotation(ctx context.Context, req *adminv1.PlanRotationRequest) (*adminv1.PlanRotationResponse, error) {
	if _, err := s.evidence(ctx); err != nil {
		return nil, err
	}
	k := s.keeper
	now := s.now()
	set := k.current.Load()
	w := k.world(set, now)
	replaced, underWay := set.replaced(req.Kind)
	switch {
	case req.Kind == "", req.Kind == ca.KindRoot && underWay:
	case req.Kind == ca.KindIntermediate:
		if all, ok := rotation.Want(k.policy.Policy, w, now); ok {
			w.Authorities = all
		} else {
			w.Authorities = append(w.Authorities, rotation.Authority{ID: "the next intermediate", Kind: ca.KindIntermediate, State: ca.Prepared, Since: now, Wanted: true})
		}
	case req.Kind == ca.KindRoot:
		active, ok := set.activeRoot()
		if !ok {
			return nil, plainly(codes.FailedPrecondition, "invalid", errors.New("no issuer is active: there is no root to replace"))
		}
		life := active.NotAfter.Sub(active.NotBefore)
		next := rotation.Authority{ID: "the new root", NotBefore: now, NotAfter: now.Add(life)}
		all, err := rotation.AddRoot(k.policy.Policy, w, next, now)
		if err == nil {
			w.Authorities = all
			all, err = rotation.StartRoot(w, next.ID, now)
		}
		if err != nil {
			return nil, plainly(codes.FailedPrecondition, "invalid", err)
		}
		w.Authorities = all
	default:
		return nil, plainly(codes.InvalidArgument, "invalid", fmt.Errorf("rotation of %q: want %s or %s", clip(req.Kind), ca.KindIntermediate, ca.KindRoot))
	}
	r := &adminv1.PlanRotationResponse{}
	for _, p := range rotation.Plan(k.policy.Policy, w, now, maxSteps) {
		m := stepMessage(p.Step, now)
		m.At = timestampOf(p.At)
		for _, w := range p.Assumed {
			m.Assumed = append(m.Assumed, &adminv1.RotationWait{Code: string(w.Code), For: w.For})
		}
		r.Steps = append(r.Steps, m)
		if i := slices.Index(replaced, p.Authority); i >= 0 && p.To == ca.Removed {
			if replaced = slices.Delete(replaced, i, i+1); len(replaced) == 0 {
				break
			}
		}
	}
	return r, nil
}

// replaced names what a rotation of that kind replaces: with its removal the rotation is over. Without a kind it is all that
// goes. underWay says that the root is being replaced already.
func (s *authorities) replaced(kind string) (ids []string, underWay bool) {
	signing, signs := s.activeRoot()
	for _, a := range s.rows {
		switch {
		case a.Kind == ca.KindIntermediate && a.State == ca.Active && kind != ca.KindRoot:
			ids = append(ids, a.ID)
		case a.Kind == ca.KindRoot && kind != ca.KindIntermediate && !a.Leaving.IsZero() && a.State != ca.Removed:
			ids = append(ids, a.ID)
			// One that was never signed under here is only in the way.
			underWay = underWay || a.ID == signing.ID || !a.LeavesUntil.IsZero()
		}
	}
	if kind == ca.KindRoot && signs && !underWay {
		ids = []string{signing.ID}
	}
	return ids, underWay
}

// activeRoot is the root of the issuer that signs.
func (s *authorities) activeRoot() (store.Authority, bool) {
	for _, a := range s.rows {
		if a.Kind == ca.KindIntermediate && a.State == ca.Active {
			return s.row(a.Root)
		}
	}
	return store.Authority{}, false
}

// StartRotation begins to replace the intermediate or the root.
func (s rotationService) StartRotation(ctx context.Context, req *adminv1.StartRotationRequest) (*adminv1.RotationChangeResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	d := decision{verb: "start", reason: "a rotation of the " + req.Kind + " was asked for", by: by, dry: req.DryRun}
	switch req.Kind {
	case ca.KindIntermediate:
		return s.answer(s.keeper.startIntermediate(ctx, d, int(max(req.Successors, 1))))
	case ca.KindRoot:
		if req.Successors > 1 {
			return nil, plainly(codes.InvalidArgument, "invalid", fmt.Errorf("%d successors: a rotation of the root asks for one intermediate under it; ask for more with a rotation of the intermediate", req.Successors))
		}
		root, err := parseRoot(req.Root, req.RootFingerprint)
		if err != nil {
			return nil, plainly(codes.FailedPrecondition, "invalid", err)
		}
		return s.answer(s.keeper.startRoot(ctx, d, root))
	}
	return nil, plainly(codes.InvalidArgument, "invalid", fmt.Errorf("rotation of %q: want %s or %s", clip(req.Kind), ca.KindIntermediate, ca.KindRoot))
}

// parseRoot reads a root and compares it with what its holder says.
func parseRoot(der []byte, fingerprint string) (*x509.Certificate, error) {
	pinned, err := ca.ParseFingerprint(fingerprint)
	if err != nil {
		return nil, fmt.Errorf("root fingerprint: %w", err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("root certificate can't be read: %w", err)
	}
	if !pinned.Of(root.Raw) {
		return nil, fmt.Errorf("the root is %s, but the fingerprint given is another one: ask the root's holder which one is right", ca.CertificateFingerprint(root.Raw))
	}
	return root, nil
}

// AdvanceRotation takes the peers' reports, then every step that can be taken.
func (s rotationService) AdvanceRotation(ctx context.Context, req *adminv1.AdvanceRotationRequest) (*adminv1.RotationChangeResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	d := decision{verb: "advance", reason: "an admin said so", by: by, dry: req.DryRun, only: req.Authority, force: req.Force, notes: req.Reports, names: req.ReportNames}
	is := func(a rotation.Authority) bool { return a.ID == req.Authority }
	if (req.Force || req.Authority != "") && !slices.ContainsFunc(s.keeper.current.Load().lives(), is) {
		return nil, plainly(codes.FailedPrecondition, "invalid", fmt.Errorf("no CA %q: see signet ca list", clip(req.Authority)))
	}
	return s.answer(s.keeper.do(ctx, d, nil))
}

// AbortRotation turns a rotation back.
func (s rotationService) AbortRotation(ctx context.Context, req *adminv1.AbortRotationRequest) (*adminv1.RotationChangeResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	d := decision{verb: "abort", reason: "an admin said so", by: by, dry: req.DryRun}
	return s.answer(s.keeper.abort(ctx, d, req.Authority, req.Force))
}

// ifEdited is edit for what a verb returned.
func (s *authorities) ifEdited(lives []rotation.Authority, err error) (*authorities, []*auditv1.Entry, error) {
	if err != nil {
		return nil, nil, err
	}
	next, err := s.edit(lives)
	return next, nil, err
}

// TaintAuthority takes a CA's key for lost.
func (s rotationService) TaintAuthority(ctx context.Context, req *adminv1.TaintAuthorityRequest) (*adminv1.RotationChangeResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkReason("taint of "+clip(req.Authority), req.Reason); err != nil {
		return nil, err
	}
	d := decision{verb: "taint", reason: req.Reason, by: by, dry: req.DryRun}
	return s.answer(s.keeper.do(ctx, d, func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
		next, err := set.taint(w, req.Authority, req.Reason, now)
		return next, nil, err
	}))
}

// InstallAuthorities takes what the root's holder has signed.
func (s rotationService) InstallAuthorities(ctx context.Context, req *adminv1.InstallAuthoritiesRequest) (*adminv1.RotationChangeResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	pinned, err := ca.ParseFingerprint(req.RootFingerprint)
	if err != nil {
		return nil, plainly(codes.InvalidArgument, "invalid", fmt.Errorf("root fingerprint: %w", err))
	}
	given, err := trustOf(req)
	if err != nil {
		return nil, plainly(codes.InvalidArgument, "invalid", err)
	}
	d := decision{verb: "install", reason: "a chain was installed", by: by, dry: req.DryRun}
	return s.answer(s.keeper.do(ctx, d, func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
		return s.keeper.install(set, w, now, installation{chains: req.Chains, pinned: pinned, trust: given, by: by})
	}))
}

// AddTrust begins to trust a root.
func (s rotationService) AddTrust(ctx context.Context, req *adminv1.AddTrustRequest) (*adminv1.RotationChangeResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	root, err := parseRoot(req.Root, req.RootFingerprint)
	if err != nil {
		return nil, plainly(codes.FailedPrecondition, "invalid", err)
	}
	d := decision{verb: "add", reason: "an admin trusts it", by: by, dry: req.DryRun}
	return s.answer(s.keeper.do(ctx, d, func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
		if err := begun(root, s.keeper.policy.Skew, now); err != nil {
			return nil, nil, err
		}
		next, err := set.addRoot(s.keeper.policy.Policy, w, root, now)
		return next, nil, err
	}))
}

// RemoveTrust begins to remove a root.
func (s rotationService) RemoveTrust(ctx context.Context, req *adminv1.RemoveTrustRequest) (*adminv1.RotationChangeResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	d := decision{verb: "remove", reason: "an admin removes it", by: by, dry: req.DryRun}
	return s.answer(s.keeper.do(ctx, d, func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
		return set.ifEdited(rotation.RemoveRoot(w, req.Root, now))
	}))
}

// ReportRotation is what this cluster tells its peers.
func (s rotationService) ReportRotation(ctx context.Context, _ *adminv1.ReportRotationRequest) (*adminv1.ReportRotationResponse, error) {
	if _, err := s.evidence(ctx); err != nil {
		return nil, err
	}
	report, err := s.keeper.signReport(ctx)
	if err != nil {
		return nil, plainly(codes.Unavailable, s.whyNot(err), err)
	}
	return &adminv1.ReportRotationResponse{Report: report}, nil
}
