package server

import (
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/signet-ca/signet/trust"
)

// acks is what agents have said they believe and hold. It outlives their connections, but not the server: what is not known
// counts as not acknowledged.
type acks struct {
	server *Server
	// started bounds what was issued before: no leaf of that time lives longer than the longest from then.
	started time.Time
	// woken is told that something changed.
	woken chan struct{}

	mu   sync.Mutex
	said map[string]said
	// leaves is the end of the last leaf that each agent was given since the start, gone the end of its last stream.
	leaves, gone map[string]time.Time
}

// said is the newest word of an agent.
type said struct {
	// session is the number of the stream it came by: a later stream's word is newer, whatever comes by an earlier one.
	session uint64
	// oldest is the oldest bundle among its streams, stored what it has itself; zero while it has said nothing.
	oldest, stored trust.Version
	// held are the key identifiers of the issuers whose leaves it has, heard is whether it has said so.
	held  [][]byte
	heard bool
	// at is when it was said.
	at time.Time
}

func (s said) same(o said) bool {
	return s.oldest == o.oldest && s.stored == o.stored && s.heard == o.heard && slices.EqualFunc(s.held, o.held, slices.Equal)
}

func newAcks(s *Server) *acks {
	return &acks{server: s, started: s.now(), woken: make(chan struct{}, 1), said: map[string]said{}, leaves: map[string]time.Time{}, gone: map[string]time.Time{}}
}

// hear takes an agent's word.
func (a *acks) hear(agent string, s said) {
	s.at = a.server.now()
	a.mu.Lock()
	old := a.said[agent]
	if s.session < old.session {
		a.mu.Unlock()
		return
	}
	a.said[agent] = s
	a.mu.Unlock()
	if s.same(old) {
		return
	}
	select {
	case a.woken <- struct{}{}:
	default:
	}
}

// of returns the newest word of an agent.
func (a *acks) of(agent string) said {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.said[agent]
}

// gave notes that an agent was given a leaf.
func (a *acks) gave(agent string, notAfter time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if notAfter.After(a.leaves[agent]) {
		a.leaves[agent] = notAfter
	}
}

// left notes that a stream of an agent has ended: until then it was there.
func (a *acks) left(agent string) {
	now := a.server.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.gone[agent] = now
}

// words are what agents have said that are not banned, by name.
func (a *acks) words() []validator {
	a.mu.Lock()
	all := make([]validator, 0, len(a.said))
	for name, s := range a.said {
		all = append(all, validator{agent: name, said: s})
	}
	a.mu.Unlock()
	all = slices.DeleteFunc(all, func(v validator) bool {
		row, known := a.server.directory.Agent(v.agent)
		return !known || row.Banned
	})
	slices.SortFunc(all, func(x, y validator) int { return strings.Compare(x.agent, y.agent) })
	return all
}

// agents are those that are not banned, connected or not, by name. A banned one gets nothing new and nothing waits for it:
// an admin has said that it is none of ours.
func (a *acks) agents(now time.Time) []validator {
	d := a.server.directory
	if d == nil { // nobody has come yet
		return nil
	}
	// Before the start the server has given what it does not remember.
	policy := a.server.keeper.policy
	before := now.Before(policy.LeavesUntil(a.started))
	var all []validator
	for name, row := range d.current.Load().agents {
		row, _ = d.agent(name)
		if row.Banned {
			continue
		}
		a.mu.Lock()
		s, leaf, gone := a.said[name], a.leaves[name], a.gone[name]
		a.mu.Unlock()
		v := validator{agent: name, said: s}
		if a.server.sessions.of(name) == 0 {
			v.away, v.unheard = latest(latest(s.at, gone), lastSeen(row)), s.at.IsZero() && gone.IsZero()
			v.ended = now.After(leaf) && !(before && now.Before(policy.LeavesUntil(row.NotAfter)))
		}
		all = append(all, v)
	}
	slices.SortFunc(all, func(x, y validator) int { return strings.Compare(x.agent, y.agent) })
	return all
}
