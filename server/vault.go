package server

import (
	"context"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/bell"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
)

// checkVault says which abilities a Vault that is away impairs, and what it will refuse.
func (s *Server) checkVault(context.Context) check.Findings {
	now := s.now()
	return s.config.Vault().Findings(s.duties(now), now)
}

// vaultTells reports whether a finding about Vault says that the key of a hierarchy does not sign.
func (s *Server) vaultTells(h identity.Hierarchy) bool {
	if s.config.Vault == nil {
		return false
	}
	now := s.now()
	d := s.duties(now)
	return (h == identity.Mesh && d.Leaves || h == identity.ControlPlane && d.Control) && s.config.Vault().Halt("") != nil
}

const (
	// keysEvery spaces the looks at keys that are not in this process, and at the upstream authority; keysAgain those while one of
	// them does not sign, or it can't be told whether it would: what keeps it from that is missed until somebody has asked again.
	keysEvery, keysAgain = time.Minute, 10 * time.Second
	// keysTimeout bounds one.
	keysTimeout = 15 * time.Second
)

// lookAtKeys looks whether the keys that sign would, and the upstream authority, also while nobody asks for it, for as long as ctx
// lives.
func (s *Server) lookAtKeys(ctx context.Context) {
	var last time.Time
	told := true
	for ; ctx.Err() == nil; bell.Wait(ctx, keysAgain, nil) {
		_, mesh := s.authority.Unsigned(identity.Mesh)
		_, control := s.authority.Unsigned(identity.ControlPlane)
		well := mesh == nil && control == nil && told && s.keeper.upstreamState.seen().Unfit.Since.IsZero()
		if well && time.Since(last) < keysEvery-keysAgain/2 {
			continue
		}
		last = time.Now()
		within, cancel := context.WithTimeout(ctx, keysTimeout)
		s.authority.Look(within)
		cancel()
		if s.config.Upstream != nil {
			told = s.keeper.lookUpstream(ctx)
		}
	}
}

// duties are what the server has its Vault for now: by the keys that sign, not by where the next ones will be made.
func (s *Server) duties(now time.Time) check.Duties {
	set := s.keeper.current.Load()
	d := check.Duties{
		LeafSpare: rotation.LeastLeft(s.config.TTL), ControlSpare: rotation.LeastLeft(s.config.ControlTTL),
		Upstream: s.config.Upstream != nil, Shared: s.config.Exchange != nil,
		None: len(s.directory.current.Load().agents) == 0,
	}
	for _, a := range set.rows {
		if a.State != ca.Active || a.Kind == ca.KindRoot {
			continue
		}
		switch a.Key.Backend {
		case keystore.BackendFile:
		case keystore.BackendMemory:
			d.Volatile = true
		default:
			d.Leaves = d.Leaves || a.Kind == ca.KindIntermediate
			d.Control = d.Control || a.Kind == ca.KindControl
		}
	}
	if d.Upstream {
		look := s.lookAtRotation(set, now)
		d.Due, d.Until = look.NextDue(), look.IssuableUntil(now)
	}
	return d
}
