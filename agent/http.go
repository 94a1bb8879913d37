package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/health"
)

// checks tell whether workloads get what they need here. An agent whose server is away stays ready while it holds what
// it needs: taking its workloads out of service would make an outage out of a disturbance.
func (a *Agent) checks(context.Context) []health.Check {
	m := a.member.Load()
	enrolled := health.Check{Name: "enrolment"}
	if m == nil {
		enrolled.Err = errors.New("not enrolled yet")
	}
	bundle := health.Check{Name: "bundle"}
	if m != nil {
		if _, ok := a.bundles.Get(m.td); !ok {
			bundle.Err = errors.New("no trust bundle has come from the server yet")
		}
	} else {
		bundle.Err = errors.New("not enrolled yet")
	}
	l := a.hub.life()
	identities := health.Check{Name: "identities"}
	if !a.synced.Load() && l.valid == 0 {
		identities.Err = errors.New("the server has not been heard since this start, and no certificate is held")
	} else if l.valid == 0 && l.expired > 0 {
		identities.Err = fmt.Errorf("all %d certificates that were in use have expired", l.expired)
	} else if l.expired+l.pending > 0 {
		identities.Err = fmt.Errorf("%d of %d wanted certificates are missing or expired", l.expired+l.pending, l.valid+l.expired+l.pending)
		identities.Degraded = true
	}
	server := health.Check{Name: "server", Degraded: true}
	if !a.connected.Load() {
		server.Err = errors.New("the server is away")
	}
	control := health.Check{Name: "control-certificate", Degraded: true}
	if m != nil {
		control.Err = identity.CheckTimes(m.leaf, a.now())
	}
	log := health.Check{Name: "audit-log", Degraded: true}
	if a.inconsistent.Load() {
		log.Err = errors.New("the server's audit log contradicts what this agent has seen: see the log and the evidence in the state folder")
	}
	doors := health.Check{Name: "sockets"}
	if !a.serving.Load() {
		doors.Err = errors.New("not open, or being closed")
	}
	return []health.Check{enrolled, bundle, identities, server, control, log, doors}
}
