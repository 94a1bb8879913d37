package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/signet-ca/signet/check"
)

// checks is what the agent looks at about itself: whether workloads get what they need here. An agent whose server is away
// stays ready while it holds what it needs: taking its workloads out of service would make an outage out of a disturbance.
func (a *Agent) checks() []check.Part {
	look := func(f func() check.Findings) check.Part {
		return check.Part{Look: func(context.Context) check.Findings { return f() }}
	}
	parts := []check.Part{
		look(func() check.Findings {
			return check.State(check.CodeState, "enrolment", "the agent is a member of its cluster", a.notEnrolled(), "", check.Serving)
		}),
		look(func() check.Findings {
			return check.State(check.CodeBundle, "bundle", "the agent knows whom to trust", a.noBundle(), "", check.Serving)
		}),
		look(a.checkIdentities),
		look(func() check.Findings {
			var err error
			mend := ""
			if t := a.hub.turnedSince(); !t.IsZero() {
				err = fmt.Errorf("since %s the server turns this agent away: it is banned, or none of its own; what is held is served on until it ends", utc(t))
				mend = "on the server: signet agent list; if it is not banned, remove the agent's state folder and enrol it again with a new join token"
			} else if !a.connected.Load() {
				err = errors.New("the server is away; what is held is served on")
			}
			return check.State(check.CodeServer, "server", "the server is there", err, mend)
		}),
		look(a.checkClock),
		look(func() check.Findings {
			m := a.member.Load()
			if m == nil {
				return nil
			}
			return check.Life("control-certificate", m.leaf.NotBefore, m.leaf.NotAfter, a.now(), "")
		}),
		look(func() check.Findings {
			var err error
			if a.inconsistent.Load() {
				err = fmt.Errorf("the server's audit log contradicts what this agent has seen, as %s shows; %s", a.path(evidenceFile), clearing)
			}
			return check.State(check.CodeLog, "audit-log", "the server's log goes on from what this agent has seen", err, "")
		}),
		look(func() check.Findings {
			var err error
			if !a.serving.Load() {
				err = errors.New("not open, or being closed")
			}
			return check.State(check.CodeSocket, "sockets", "the sockets are open", err, "", check.Serving)
		}),
		look(a.checkBudget),
	}
	return append(parts, check.Machine(a.config.private())...)
}

// private is the state folder, with what is in it for others.
func (c *Config) private() check.Private {
	p := check.Private{Dir: c.StateDir, Except: []string{c.Socket}, Entered: true}
	for _, s := range c.Sockets {
		p.Except = append(p.Except, s.Path)
	}
	return p
}

func (a *Agent) notEnrolled() error {
	if a.member.Load() == nil {
		return errors.New("not enrolled yet")
	}
	return nil
}

func (a *Agent) noBundle() error {
	m := a.member.Load()
	if m == nil {
		return a.notEnrolled()
	}
	if _, ok := a.bundles.Get(m.td); !ok {
		return errors.New("no trust bundle has come from the server yet")
	}
	return nil
}

func (a *Agent) checkIdentities() check.Findings {
	l := a.hub.life()
	var err error
	stops := []string{check.Serving}
	switch {
	case !a.synced.Load() && l.valid == 0:
		err = errors.New("the server has not been heard since this start, and no certificate is held")
	case l.valid == 0 && l.expired > 0:
		err = fmt.Errorf("all %d certificates that were in use have expired", l.expired)
	case l.expired+l.pending > 0:
		err, stops = fmt.Errorf("%d of %d wanted certificates are missing or expired", l.expired+l.pending, l.valid+l.expired+l.pending), nil
	}
	return check.State(check.CodeServed, "identities", "every certificate that is wanted is there", err, "", stops...)
}

// checkBudget says how long the server may stay away: until the first certificate ends.
func (a *Agent) checkBudget() check.Findings {
	l := a.hub.life()
	if l.valid == 0 || l.earliest == nil {
		return nil
	}
	svid := l.earliest.svid
	return check.Left("outage-budget", svid.NotBefore, svid.NotAfter, a.now(), !a.connected.Load())
}
