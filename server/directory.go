package server

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
)

// directory is who may ask: what the store holds, copied to memory, so that no decision waits for a database.
// It implements identity.Directory. Readers take the view that is current; writers come one at a time, and the store is
// always written before the view is changed, so that memory never says more than the disk.
type directory struct {
	store *store.Store

	writing sync.Mutex
	current atomic.Pointer[view]

	mu sync.Mutex
	// changed is closed at the next change of the view; nil while nobody waits.
	changed chan struct{}
	// seen is when each agent last had a certificate, where that is newer than the view.
	seen map[string]time.Time
}

// view is immutable.
type view struct {
	revision      uint64
	registrations map[string]identity.Registration
	agents        map[string]store.Agent
	// sets is what each agent is told; the pointer changes only when the content does.
	sets map[string]*signetv1.RegistrationSet
}

func loadDirectory(ctx context.Context, st *store.Store) (*directory, error) {
	agents, err := st.Agents(ctx)
	if err != nil {
		return nil, err
	}
	registrations, revision, err := st.Registrations(ctx)
	if err != nil {
		return nil, err
	}
	v := &view{agents: map[string]store.Agent{}}
	for _, a := range agents {
		v.agents[a.Name] = a
	}
	d := &directory{store: st, seen: map[string]time.Time{}}
	d.current.Store(v.withRegistrations(registrations, revision))
	return d, nil
}

// withRegistrations returns a view with other registrations and the sets that follow from them.
func (v *view) withRegistrations(all []identity.Registration, revision uint64) *view {
	next := &view{revision: revision, agents: v.agents, registrations: make(map[string]identity.Registration, len(all)), sets: map[string]*signetv1.RegistrationSet{}}
	slices.SortFunc(all, func(a, b identity.Registration) int { return strings.Compare(a.Name, b.Name) })
	for _, r := range all {
		next.registrations[r.Name] = r
		// An agent is told only its own, and not who else has it.
		told := registrationMessage(r)
		told.Agents = nil
		for _, agent := range r.Agents {
			set := next.sets[agent]
			if set == nil {
				set = &signetv1.RegistrationSet{Revision: revision}
				next.sets[agent] = set
			}
			set.Registrations = append(set.Registrations, told)
		}
	}
	for agent, set := range next.sets {
		if old := v.sets[agent]; old != nil && slices.EqualFunc(old.Registrations, set.Registrations, sameMessage) {
			next.sets[agent] = old
		}
	}
	return next
}

func sameMessage(a, b *signetv1.Registration) bool { return proto.Equal(a, b) }

// Registration implements identity.Directory.
func (d *directory) Registration(name string) (identity.Registration, bool) {
	r, ok := d.current.Load().registrations[name]
	return r, ok
}

// Agent implements identity.Directory.
func (d *directory) Agent(name string) (identity.AgentRow, bool) {
	a, ok := d.current.Load().agents[name]
	return a.AgentRow, ok
}

// agent returns the whole row, with when the agent last had a certificate.
func (d *directory) agent(name string) (store.Agent, bool) {
	a, ok := d.current.Load().agents[name]
	d.mu.Lock()
	defer d.mu.Unlock()
	if t := d.seen[name]; t.After(a.LastSeen) {
		a.LastSeen = t
	}
	return a, ok
}

// registrations returns all of them, by name.
func (d *directory) registrations() ([]identity.Registration, uint64) {
	v := d.current.Load()
	return slices.SortedFunc(maps.Values(v.registrations), func(a, b identity.Registration) int { return strings.Compare(a.Name, b.Name) }), v.revision
}

// noRegistrations is what an agent without any is told.
var noRegistrations = &signetv1.RegistrationSet{}

// set returns what an agent is told.
func (d *directory) set(agent string) *signetv1.RegistrationSet {
	if s := d.current.Load().sets[agent]; s != nil {
		return s
	}
	return noRegistrations
}

// bell returns a channel that is closed at the next change. Take it before reading, or a change between is missed.
func (d *directory) bell() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.changed == nil {
		d.changed = make(chan struct{})
	}
	return d.changed
}

func (d *directory) swap(v *view) {
	d.current.Store(v)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.changed != nil {
		close(d.changed)
		d.changed = nil
	}
}

// putAgent stores an agent's row; of a row that exists it keeps the ban.
func (d *directory) putAgent(ctx context.Context, a store.Agent) error {
	d.writing.Lock()
	defer d.writing.Unlock()
	v := d.current.Load()
	a.Banned = v.agents[a.Name].Banned
	if err := d.store.PutAgent(ctx, a); err != nil {
		return err
	}
	next := *v
	next.agents = maps.Clone(v.agents)
	next.agents[a.Name] = a
	d.swap(&next)
	return nil
}

// heard notes that an agent is getting a certificate. It is in memory at once and in the store when that can be reached.
func (d *directory) heard(ctx context.Context, agent string, now time.Time) error {
	d.mu.Lock()
	d.seen[agent] = now
	d.mu.Unlock()
	d.writing.Lock()
	defer d.writing.Unlock()
	a, ok := d.agent(agent)
	if !ok {
		return nil
	}
	return d.store.PutAgent(ctx, a)
}

// applyRegistrations stores a change that was made upon the given revision.
func (d *directory) applyRegistrations(ctx context.Context, base uint64, put []identity.Registration, del []string) error {
	d.writing.Lock()
	defer d.writing.Unlock()
	revision, err := d.store.ApplyRegistrations(ctx, base, put, del)
	if err != nil {
		return err
	}
	v := d.current.Load()
	all := maps.Clone(v.registrations)
	for _, name := range del {
		delete(all, name)
	}
	for _, r := range put {
		r.Revision = revision
		all[r.Name] = r
	}
	d.swap(v.withRegistrations(slices.Collect(maps.Values(all)), revision))
	return nil
}

func registrationMessage(r identity.Registration) *signetv1.Registration {
	m := &signetv1.Registration{
		Name: r.Name, SpiffeId: r.ID.String(), TtlSeconds: int64(r.TTL / time.Second), Priority: r.Priority,
		Agents: slices.Clone(r.Agents), Selectors: make([]string, len(r.Selectors)),
	}
	for i, s := range r.Selectors {
		m.Selectors[i] = string(s)
	}
	return m
}
