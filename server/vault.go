package server

import (
	"context"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
)

// checkVault says which abilities a Vault that is away impairs, and what it will refuse.
func (s *Server) checkVault(context.Context) check.Findings {
	now := s.now()
	return s.config.Vault().Findings(s.duties(now), now)
}

// duties are what the server has its Vault for now: by the keys that sign, not by where the next ones will be made.
func (s *Server) duties(now time.Time) check.Duties {
	set := s.keeper.current.Load()
	d := check.Duties{
		LeafSpare: rotation.LeastLeft(s.config.TTL), ControlSpare: rotation.LeastLeft(s.config.ControlTTL),
		Upstream: s.config.Upstream != nil, Shared: s.config.Exchange != nil,
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
