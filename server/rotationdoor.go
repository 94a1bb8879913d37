package server

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/rotation"
)

// rotationService is the part of the admin door that shows and moves the life of CAs.
type rotationService struct {
	adminv1.UnimplementedRotationServer
	adminService
}

// maxReason bounds what a person gives as a reason, in bytes.
const maxReason = 512

// answer tells what a change has done, or why it was not made.
func (s rotationService) answer(o outcome, err error) (*adminv1.RotationChangeResponse, error) {
	if err != nil && o.changed {
		err = fmt.Errorf("it is done, but what follows from it could not be, and is tried again: %w", err)
	}
	switch {
	case err == nil:
	case errors.Is(err, errBadReport):
		return nil, plainly(codes.InvalidArgument, "invalid", err)
	case errors.Is(err, store.ErrConflict):
		return nil, plainly(codes.Aborted, "store_unavailable", err)
	case errors.Is(err, errNotLogged), errors.Is(err, context.DeadlineExceeded):
		return nil, plainly(codes.Unavailable, s.whyNot(err), err)
	default:
		return nil, plainly(codes.FailedPrecondition, "invalid", err)
	}
	now := s.now()
	r := &adminv1.RotationChangeResponse{Changed: o.changed, Forced: o.forced}
	for _, step := range o.taken {
		r.Taken = append(r.Taken, stepMessage(step, now))
	}
	for _, step := range o.next {
		r.Next = append(r.Next, stepMessage(step, now))
	}
	for _, a := range o.set.rows {
		// What an upstream at hand signs nobody has to carry anywhere.
		if s.config.Upstream != nil || a.Kind != ca.KindIntermediate || a.State != ca.Prepared || len(a.Chain) > 0 {
			continue
		}
		if request, csr, err := storedRequest(a); err == nil {
			r.Requests = append(r.Requests, &adminv1.PendingRequest{
				Authority: a.ID, Csr: csr, KeyFingerprint: ca.KeyFingerprint(request.RawSubjectPublicKeyInfo),
			})
		}
	}
	return r, nil
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
	return &adminv1.ListAuthoritiesResponse{Authorities: set.messages(), BundleSequence: set.bundle.Sequence(), BundleDigest: digest[:]}, nil
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
	for _, step := range rotation.Next(k.policy.Policy, w, now) {
		r.Steps = append(r.Steps, stepMessage(step, now))
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
	return r, nil
}

// tainted says of every CA whose key is lost who still accepts what a thief makes with it.
func (k *keeper) tainted(set *authorities, w rotation.World, now time.Time) []*adminv1.TaintStatus {
	var all []*adminv1.TaintStatus
	accepting := map[string][]string{} // by root
	for _, c := range append([]rotation.Report{w.Own}, w.Peers...) {
		for _, t := range c.Tainted {
			m := &adminv1.TaintStatus{Id: t.ID, Root: t.Root, Cluster: c.Cluster, Since: timestampOf(t.Since), AcceptedUntil: timestampOf(t.NotAfter)}
			all = append(all, m)
			if now.After(t.NotAfter) {
				continue // nobody accepts it any more
			}
			if _, ok := accepting[t.Root]; !ok {
				accepting[t.Root] = k.accepting(now, t.Root)
			}
			for _, v := range accepting[t.Root] {
				if m.Accepting++; len(m.AcceptingAgents) < maxMissing {
					m.AcceptingAgents = append(m.AcceptingAgents, k.folder.Cluster+"/"+v)
				}
			}
			for _, p := range w.Peers {
				for _, x := range p.Roots {
					if x.ID == t.Root && x.Trusting > 0 {
						m.Accepting += uint32(x.Trusting)
						m.AcceptingAgents = append(m.AcceptingAgents, fmt.Sprintf("%s (%d agents, reported %s)", p.Cluster, x.Trusting, stamp(p.At)))
					}
				}
				if p.At.IsZero() {
					m.Accepting++
					m.AcceptingAgents = append(m.AcceptingAgents, p.Cluster+" (has never reported)")
				}
			}
			if root, ok := set.row(t.Root); ok && root.InBundle() && root.Leaving.IsZero() {
				m.Advice = "make another root (signet root init) and replace this one: signet rotation start root --root FILE --fingerprint SHA256:…"
			}
		}
	}
	return all
}

// accepting names the agents whose workloads believe a root, or may do so.
func (k *keeper) accepting(now time.Time, root string) []string {
	validators := k.validators(now)
	k.mu.Lock()
	defer k.mu.Unlock()
	var all []string
	for _, v := range validators {
		if k.mayBelieve(v.oldest, root) {
			all = append(all, v.agent)
		}
	}
	return all
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
	// What is replaced: with its end the rotation is over.
	var replaced string
	for _, a := range set.rows {
		if a.Kind == ca.KindIntermediate && a.State == ca.Active {
			replaced = a.ID
			if req.Kind == ca.KindRoot {
				replaced = a.Root
			}
		}
	}
	switch req.Kind {
	case "":
	case ca.KindIntermediate:
		if all, ok := rotation.Want(k.policy.Policy, w, now); ok {
			w.Authorities = all
		} else {
			w.Authorities = append(w.Authorities, rotation.Authority{ID: "the next intermediate", Kind: ca.KindIntermediate, State: ca.Prepared, Since: now, Wanted: true})
		}
	case ca.KindRoot:
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
		r.Steps = append(r.Steps, m)
		if p.Authority == replaced && p.To == ca.Removed {
			break
		}
	}
	return r, nil
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
		root, err := parseRoot(req.Root, req.RootFingerprint)
		if err != nil {
			return nil, plainly(codes.InvalidArgument, "invalid", err)
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
	d := decision{verb: "advance", reason: "an admin said so", by: by, dry: req.DryRun, only: req.Authority, force: req.Force, notes: req.Reports}
	if _, ok := s.keeper.current.Load().row(req.Authority); !ok && (req.Force || req.Authority != "") {
		return nil, plainly(codes.InvalidArgument, "invalid", fmt.Errorf("no CA %q to advance: see signet rotation status", clip(req.Authority)))
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
	return s.answer(s.keeper.do(ctx, d, func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
		return set.ifEdited(rotation.Abort(s.keeper.policy.Policy, w, req.Authority, req.Force, now))
	}))
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
	if req.Reason == "" || len(req.Reason) > maxReason {
		return nil, plainly(codes.InvalidArgument, "invalid", fmt.Errorf("taint of %s: give a reason of 1 to %d bytes, for the log", clip(req.Authority), maxReason))
	}
	d := decision{verb: "taint", reason: req.Reason, by: by, dry: req.DryRun}
	return s.answer(s.keeper.do(ctx, d, func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
		lives, err := rotation.Taint(w, req.Authority, now)
		if err != nil {
			return nil, nil, err
		}
		row, _ := set.row(req.Authority)
		if row.TaintReason == "" {
			row.TaintReason = req.Reason
		}
		next, err := set.edit(lives, row)
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
		return s.keeper.install(set, w, now, installation{req.Chains, pinned, given, by})
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
		return nil, plainly(codes.InvalidArgument, "invalid", err)
	}
	d := decision{verb: "add", reason: "an admin trusts it", by: by, dry: req.DryRun}
	return s.answer(s.keeper.do(ctx, d, func(set *authorities, w rotation.World, now time.Time) (*authorities, []*auditv1.Entry, error) {
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
