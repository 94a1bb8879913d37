package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
)

const (
	// diskNews is how long a write to the database that worked stands for the next one (the log has its own bound, in
	// audit.Ready); selfCheck spaces looks that read a lot.
	diskNews  = 250 * time.Millisecond
	selfCheck = time.Minute
	// storePatience is less than that of those who ask for readiness, so that they hear the reason.
	storePatience = 600 * time.Millisecond
)

// checks is what the server looks at about itself. A store that stalls stops enrolment and changes, but what agents ask
// for most is decided from memory, so it alone must not take the server away from them.
func (s *Server) checks() []check.Part {
	c := s.config
	parts := []check.Part{
		{Code: check.CodeState, About: "store", Every: diskNews, Stops: []string{check.Enrolling, check.Changing}, Look: func(ctx context.Context) check.Findings {
			err := errors.Join(s.storeUp(ctx), s.bansStored(), s.settled())
			return check.State(check.CodeState, "store", "the state database takes writes", err, "", check.Enrolling, check.Changing)
		}},
		{Code: check.CodeLog, About: "log", Every: 1, Stops: []string{check.Issuing}, Look: func(context.Context) check.Findings {
			return check.State(check.CodeLog, "log", "the audit log takes entries", s.tryLog(), "", check.Issuing)
		}},
		{Look: func(context.Context) check.Findings {
			return check.State(check.CodeLog, "witnesses", "no agent contradicts the audit log", s.witness.doubt(), "")
		}},
	}
	parts = append(parts, check.Part{Look: s.checkClock}, check.Part{Look: s.checkRotation})
	if s.exchange != nil {
		parts = append(parts, check.Part{Look: s.exchange.check})
	}
	if c.Upstream != nil {
		parts = append(parts, check.Part{Look: s.checkUpstream})
	}
	if c.Vault != nil {
		parts = append(parts, check.Part{Look: s.checkVault})
	}
	for _, h := range []identity.Hierarchy{identity.Mesh, identity.ControlPlane} {
		parts = append(parts, check.Part{Look: func(context.Context) check.Findings { return s.checkIssuer(h) }})
	}
	parts = append(parts, check.Part{Look: func(context.Context) check.Findings { return s.checkExposed() }})
	parts = append(parts, check.Part{Look: func(context.Context) check.Findings {
		return check.State(check.CodeExpiry, "certificate", "the server can prove who it is", s.own.usable(), "", check.Answering)
	}}, check.Part{Look: func(context.Context) check.Findings {
		return check.State(check.CodeSocket, "doors", "all doors are open", s.doorsOpen(), "", check.Answering)
	}}, check.Part{Look: func(context.Context) check.Findings {
		return check.Budget(c.TTL, rotation.LeastLeft(c.TTL))
	}})
	logDir := LogDir(c.Dir)
	parts = append(parts, check.Machine(check.Private{Dir: c.Dir, Except: []string{logDir}})...)
	return append(parts, check.Part{Code: check.CodeLog, About: logDir, Every: selfCheck, Look: func(ctx context.Context) check.Findings {
		return check.Log(ctx, logDir, s.audit.VerifierKey(), s.now())
	}}, check.Part{Code: check.CodeState, About: databasePath(c.Dir), Every: selfCheck, Look: func(ctx context.Context) check.Findings {
		return check.State(check.CodeState, databasePath(c.Dir), "every row has its checksum", s.store.Verify(ctx), "")
	}})
}

// checkIssuer looks at an issuer of a hierarchy. Until when it can issue is decided elsewhere, for all who ask: for workloads'
// by check.Rotation, for our own parts' by controlUntil.
func (s *Server) checkIssuer(h identity.Hierarchy) check.Findings {
	about := "issuer-" + h.String()
	issuer, ok := s.issuers.Snapshot().Active(h)
	if !ok {
		why := errors.New("none is active")
		if unopened := s.keeper.unopened.Load(); h == identity.Mesh && unopened != nil {
			why = fmt.Errorf("the key of the active one can't be used: %w", unopened.err)
		}
		return check.State(check.CodeInstalled, about, "", why, "", check.Issuing)
	}
	// That a key is away is told of by what it is away with, if that knows.
	if _, err := s.authority.Unsigned(h); err != nil && !(errors.Is(err, keystore.ErrAway) && s.vaultTells(h)) {
		stops := check.Issuing
		if h == identity.ControlPlane {
			stops = check.Enrolling
		}
		return check.State(check.CodeKey, about, "", fmt.Errorf("its key does not sign: %w", err), "", stops)
	}
	now := s.now()
	ttl, until := s.config.ControlTTL, s.controlUntil(now)
	if h == identity.Mesh {
		ttl, until = s.config.TTL, s.lookAtRotation(s.keeper.current.Load(), now).IssuableUntil(now)
	}
	found := check.IssuerLife(about, issuer.Certificate().NotBefore, issuer.NotAfter(), s.config.LeastLife(ttl), now, "")
	if until.IsZero() {
		found[0].Level, found[0].Stops = check.Error, []string{check.Issuing}
	}
	return found
}

// checkExposed says of which CAs the private keys can have left where they are kept.
func (s *Server) checkExposed() (found check.Findings) {
	k := s.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, a := range k.current.Load().rows {
		if key, open := k.keys[a.Key]; open && a.State != ca.Removed {
			found = append(found, check.Exposed(a.ID, a.Kind == ca.KindControl, a.State, key)...)
		}
	}
	return found
}

func (s *Server) doorsOpen() (err error) {
	select {
	case <-s.stopping:
		return errors.New("the server is stopping")
	default:
	}
	for _, d := range s.doors {
		if !d.serving.Load() {
			err = errors.Join(err, fmt.Errorf("the %s door is closed", d.door.name))
		}
	}
	return err
}

// storeUp reports why the state database takes no write.
func (s *Server) storeUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, storePatience)
	defer cancel()
	return s.store.Writable(ctx)
}
