package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/health"
)

// checks tell whether the server can sign and log. A store that stalls stops enrolment and changes, but what agents ask
// for most is decided from memory, so it alone must not take the server away from them.
func (s *Server) checks(ctx context.Context) []health.Check {
	all := []health.Check{
		{Name: "store", Err: errors.Join(s.storeUp(ctx), s.bansStored()), Degraded: true},
		{Name: "log", Err: s.audit.Ready()},
	}
	for _, h := range []identity.Hierarchy{identity.Mesh, identity.ControlPlane} {
		issuer, ok := s.issuers.Snapshot().Active(h)
		c := health.Check{Name: "issuer-" + h.String()}
		if !ok {
			c.Err = errors.New("none is active")
		} else {
			c.Err = issuer.Usable(s.now())
		}
		all = append(all, c)
	}
	all = append(all, health.Check{Name: "certificate", Err: s.own.usable()})
	doors := health.Check{Name: "doors"}
	for _, d := range s.doors {
		if !d.serving.Load() {
			doors.Err = errors.Join(doors.Err, fmt.Errorf("the %s door is closed", d.door.name))
		}
	}
	select {
	case <-s.stopping:
		doors.Err = errors.New("the server is stopping")
	default:
	}
	return append(all, doors)
}

func (s *Server) storeUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, _, err := s.store.Meta(ctx, clusterFact)
	return err
}
