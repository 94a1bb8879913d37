package server

import (
	"context"
	"errors"
	"fmt"
	"math"

	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/trust"
)

const (
	// mostLost is how many trust bundles an older copy of the state can lack. An agent that claims to hold a later one still
	// is not believed: the sequence only ever grows, and must not be used up at a stranger's word.
	mostLost = 4096
	// lookedBack is how many entries of the log are looked through for the newest change of the CAs.
	lookedBack = 1 << 20
	changeKind = "authority-changed"
)

// published is a state of the CAs that was in effect once.
type published struct {
	// revision is of the authorities, sequence of the trust bundle; 0 where it is not known.
	revision, sequence uint64
}

// lost is what was published and the state database does not know of: it was restored from an older copy.
type lost struct {
	// present is what the database has, newest the greatest that is known of.
	present, newest published
	// agents hold a bundle that was never published here, as far as is known; those that claim what can't be are not among
	// them, but in wild.
	agents, wild []string
	// logged: the log has a later change than the database.
	logged bool
}

// lost compares the database with what agents hold, and with the log.
func (k *keeper) lost(set *authorities) lost {
	l := lost{present: published{set.revision, set.bundle.Sequence()}}
	in := k.newestLogged()
	l.logged = k.outdated(set)
	l.newest = published{max(l.present.revision, in.revision), max(l.present.sequence, in.sequence)}
	if k.words == nil {
		return l
	}
	most := l.newest.sequence + mostLost
	for _, v := range k.words() {
		held := v.stored
		if v.oldest.Sequence > held.Sequence {
			held = v.oldest
		}
		switch same := held.Digest == set.bundle.Digest(); {
		case held.Sequence < l.present.sequence || held.Sequence == l.present.sequence && same:
		case held.Sequence > most:
			l.wild = append(l.wild, v.agent)
		default:
			l.agents = append(l.agents, v.agent)
			l.newest.sequence = max(l.newest.sequence, held.Sequence)
		}
	}
	return l
}

// newestLogged is the newest state that the audit log knows of; zero where none is known.
func (k *keeper) newestLogged() published {
	if in := k.logged.Load(); in != nil {
		return *in
	}
	return published{}
}

// outdated reports whether the audit log knows of a later state of the CAs than the database.
func (k *keeper) outdated(set *authorities) bool {
	in := k.newestLogged()
	return in.revision > set.revision || in.sequence > set.bundle.Sequence()
}

// needed reports whether the trust bundle has to be published anew.
func (l lost) needed() bool { return l.logged || len(l.agents) > 0 }

// look is for those who check.
func (l lost) look() check.Restored {
	return check.Restored{
		Sequence: l.present.sequence, Newest: l.newest.sequence, Agents: l.agents, Wild: l.wild,
		Logged: l.logged, Revision: l.present.revision, LoggedRevision: l.newest.revision,
	}
}

// republish publishes the present trust bundle once more, above everything that is known to have been published, so that
// agents take it in place of what they have.
func (k *keeper) republish(ctx context.Context, d decision) (lost, trust.Bundle, error) {
	done, err := k.myTurn(ctx)
	if err != nil {
		return lost{}, trust.Bundle{}, err
	}
	defer done()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), workTimeout)
	defer cancel()
	set, now := k.current.Load(), k.folder.Now()
	l := k.lost(set)
	switch {
	case set.bundle.IsZero():
		return l, trust.Bundle{}, errors.New("nothing is believed yet, so there is nothing to publish again")
	case !l.needed() && len(l.wild) > 0:
		return l, trust.Bundle{}, fmt.Errorf("agents claim to hold trust bundles that can't have been published here (more than %d after number %d): %s; look at these agents, they may be broken into: signet agent ban", mostLost, l.newest.sequence, check.Some(l.wild))
	case !l.needed():
		return l, trust.Bundle{}, fmt.Errorf("trust bundle %d is the newest that any agent, or the log, knows of: there is nothing to publish again", l.present.sequence)
	case l.newest.sequence >= math.MaxInt64 || l.newest.revision >= math.MaxInt64:
		return l, trust.Bundle{}, fmt.Errorf("trust bundle %d has no successor", l.newest.sequence)
	}
	bundle, err := trust.NewBundle(k.folder.TrustDomain, l.newest.sequence+1, set.bundle.Roots())
	if err != nil || d.dry {
		return l, bundle, err
	}
	next := *set
	next.bundle, next.revision = bundle, l.newest.revision+1
	issuers, err := k.open(ctx, &next, set)
	if err != nil {
		return l, bundle, err
	}
	var entries []*auditv1.Entry
	for _, a := range set.rows {
		if !a.InBundle() {
			continue
		}
		entries = append(entries, &auditv1.Entry{Event: &auditv1.Entry_AuthorityChanged{AuthorityChanged: &auditv1.AuthorityChanged{
			Authority: a.ID, Kind: a.Kind, From: string(a.State), To: string(a.State), Verb: d.verb, Reason: d.reason,
			Revision: next.revision, BundleSequence: bundle.Sequence(), Evidence: d.by,
		}}})
	}
	note, err := noteOf(now, entries)
	if err != nil {
		return l, bundle, err
	}
	if err := k.change(ctx, note, func(st *store.Store) error {
		return st.ChangeAuthorities(ctx, store.AuthorityChange{Base: set.revision, Next: next.revision, Bundle: bundle})
	}, func() { err = k.use(&next, issuers) }); err != nil {
		return l, bundle, err
	}
	if err == nil {
		k.log.Warn("the trust bundle was published once more, above what was published before the state was restored", "by", d.by.GetCaller(),
			"from", l.present.sequence, "to", bundle.Sequence(), "agents_ahead", len(l.agents))
	}
	return l, bundle, err
}

// RepublishTrust publishes what is believed once more.
func (s rotationService) RepublishTrust(ctx context.Context, req *adminv1.RepublishTrustRequest) (*adminv1.RepublishTrustResponse, error) {
	by, err := s.evidence(ctx)
	if err != nil {
		return nil, err
	}
	d := decision{verb: "republish", reason: "the state was restored from an older copy", by: by, dry: req.DryRun}
	l, bundle, err := s.keeper.republish(ctx, d)
	switch {
	case errors.Is(err, store.ErrConflict):
		return nil, plainly(codes.Aborted, "store_unavailable", err)
	case errors.Is(err, errNotLogged), errors.Is(err, context.DeadlineExceeded):
		return nil, plainly(codes.Unavailable, s.whyNot(err), err)
	case err != nil:
		return nil, plainly(codes.FailedPrecondition, "invalid", err)
	}
	r := &adminv1.RepublishTrustResponse{
		Before: l.present.sequence, After: bundle.Sequence(), Ahead: uint32(len(l.agents)), Agents: l.agents[:min(len(l.agents), maxMissing)],
	}
	for _, root := range bundle.Roots() {
		r.Roots = append(r.Roots, rootID(root))
	}
	return r, nil
}

// lookBack finds the newest change of the CAs in the log.
func (s *Server) lookBack(ctx context.Context) {
	in, err := newestChange(ctx, LogDir(s.config.Dir), s.audit.VerifierKey())
	if err != nil {
		if ctx.Err() == nil {
			s.log.Warn("could not look whether the audit log knows of changes of the CAs that the state database lacks", "err", err)
		}
		return
	}
	s.keeper.logged.Store(&in)
	if l := s.keeper.lost(s.keeper.current.Load()); l.logged {
		s.log.Error("the audit log knows of changes of the CAs that the state database lacks: it was restored from an older copy; see signet trust republish",
			"revision", l.present.revision, "logged", l.newest.revision)
	}
}

// newestChange is what the newest change of the CAs in the log says; zero where there is none.
func newestChange(ctx context.Context, dir, verifierKey string) (published, error) {
	r, err := audit.OpenReader(dir, verifierKey)
	if err != nil {
		return published{}, err
	}
	defer r.Close()
	found, ok, err := r.Latest(ctx, changeKind, lookedBack)
	if err != nil || !ok {
		return published{}, err
	}
	x := found.Entry.GetAuthorityChanged()
	return published{x.GetRevision(), x.GetBundleSequence()}, nil
}
