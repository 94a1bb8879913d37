package server

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/bell"
	"github.com/signet-ca/signet/internal/store"
)

// directory is who may ask: what the store holds, copied to memory, so that no decision waits for a database.
// It implements identity.Directory. Readers take the view that is current; writers of the store come one at a time, and the
// view is changed after the store and the log (outbox), so that memory never allows more than the disk. A ban takes away, so
// it waits for no database (banBook).
type directory struct {
	store *store.Store

	// writing has a place for the one who writes the store, which may take its time.
	writing chan struct{}
	current atomic.Pointer[view]

	// mu is held while the view is replaced, never while the store is written.
	mu sync.Mutex
	// changed rings when the view is another.
	changed bell.Bell
	// given is when each agent last had a certificate and until when that is good, where that is newer than the view.
	given map[string]given
	// unstored are the agents whose ban the store may not hold yet.
	unstored map[string]bool
}

type given struct{ at, notAfter time.Time }

// view is immutable.
type view struct {
	revision      uint64
	registrations map[string]identity.Registration
	agents        map[string]store.Agent
	// banned are the identities that nobody gets.
	banned map[spiffeid.ID]store.BannedIdentity
	// sets is what each agent is told; the pointer changes only when the content does.
	sets map[string]*signetv1.RegistrationSet
}

func loadDirectory(ctx context.Context, st *store.Store) (*directory, error) {
	v, registrations, err := readStore(ctx, st)
	if err != nil {
		return nil, err
	}
	d := &directory{store: st, writing: make(chan struct{}, 1), given: map[string]given{}, unstored: map[string]bool{}}
	d.current.Store(v.withRegistrations(registrations, v.revision))
	return d, nil
}

// readStore returns what the store holds, as a view that no registrations are in yet, and these.
func readStore(ctx context.Context, st *store.Store) (*view, []identity.Registration, error) {
	agents, err := st.Agents(ctx)
	if err != nil {
		return nil, nil, err
	}
	bans, err := st.BannedIdentities(ctx)
	if err != nil {
		return nil, nil, err
	}
	registrations, revision, err := st.Registrations(ctx)
	if err != nil {
		return nil, nil, err
	}
	v := &view{revision: revision, agents: make(map[string]store.Agent, len(agents)), banned: make(map[spiffeid.ID]store.BannedIdentity, len(bans))}
	for _, a := range agents {
		v.agents[a.Name] = a
	}
	for _, b := range bans {
		v.banned[b.ID] = b
	}
	return v, registrations, nil
}

// withRegistrations returns a view with other registrations and the sets that follow from them.
func (v *view) withRegistrations(all []identity.Registration, revision uint64) *view {
	next := &view{revision: revision, agents: v.agents, banned: v.banned, registrations: make(map[string]identity.Registration, len(all)), sets: map[string]*signetv1.RegistrationSet{}}
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
			// What is not among its registrations an agent withdraws.
			if _, banned := v.banned[r.ID]; banned {
				set.Banned = append(set.Banned, told)
			} else {
				set.Registrations = append(set.Registrations, told)
			}
		}
	}
	for agent, set := range next.sets {
		if old := v.sets[agent]; old != nil && slices.EqualFunc(old.Registrations, set.Registrations, sameMessage) && slices.EqualFunc(old.Banned, set.Banned, sameMessage) {
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

// BannedIdentity implements identity.Directory.
func (d *directory) BannedIdentity(id spiffeid.ID) bool {
	_, banned := d.current.Load().banned[id]
	return banned
}

// bannedIdentities takes into effect which identities are banned.
func (d *directory) bannedIdentities(f func(map[spiffeid.ID]store.BannedIdentity)) {
	d.change(func(v *view) *view {
		next := *v
		next.banned = maps.Clone(v.banned)
		f(next.banned)
		return next.withRegistrations(slices.Collect(maps.Values(v.registrations)), v.revision)
	})
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
	if g := d.given[name]; g.at.After(a.LastSeen) {
		a.LastSeen, a.NotAfter = g.at, g.notAfter
	}
	return a, ok
}

// registrations returns all of them, by name.
func (d *directory) registrations() ([]identity.Registration, uint64) {
	v := d.current.Load()
	return slices.SortedFunc(maps.Values(v.registrations), func(a, b identity.Registration) int { return strings.Compare(a.Name, b.Name) }), v.revision
}

// identities is how many identities all agents together are told.
func (d *directory) identities() int {
	n := 0
	for _, set := range d.current.Load().sets {
		n += len(set.Registrations)
	}
	return n
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

// change replaces the view and rings. What f sees is what it replaces; it is called with mu held.
func (d *directory) change(f func(v *view) *view) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.current.Store(f(d.current.Load()))
	d.changed.Ring()
}

// toWrite waits for the turn to write the store; the turn ends with the function that it returns.
func (d *directory) toWrite(ctx context.Context) (done func(), err error) {
	select {
	case d.writing <- struct{}{}:
		return func() { <-d.writing }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("the state database is busy: %w", ctx.Err())
	}
}

// withAgent returns a view with this row; of a row that is there it keeps the ban.
func (v *view) withAgent(a store.Agent) *view {
	a.Banned = v.agents[a.Name].Banned
	return v.with(a)
}

func (v *view) with(a store.Agent) *view {
	next := *v
	next.agents = maps.Clone(v.agents)
	next.agents[a.Name] = a
	return &next
}

// enrolled takes into effect that an agent has enrolled; of a row that is there it keeps the ban.
func (d *directory) enrolled(a store.Agent) {
	d.change(func(v *view) *view { return v.withAgent(a) })
}

// agents returns all of them, by name, with when each last had a certificate.
func (d *directory) agents() []store.Agent {
	var all []store.Agent
	for _, name := range slices.Sorted(maps.Keys(d.current.Load().agents)) {
		a, _ := d.agent(name)
		all = append(all, a)
	}
	return all
}

// ban refuses the agent from here on. It is in memory alone until storeBans has written it.
func (d *directory) ban(name string) {
	d.change(func(v *view) *view {
		a, ok := v.agents[name]
		if !ok {
			return v
		}
		d.unstored[name] = true
		a.Banned = true
		return v.with(a)
	})
}

// unstoredBans names the agents whose ban the store may not hold yet.
func (d *directory) unstoredBans() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.unstored))
}

// storeBans writes bans that are in memory alone; stored is called when the store has them.
func (d *directory) storeBans(ctx context.Context, names []string, stored func([]string) error) error {
	done, err := d.toWrite(ctx)
	if err != nil {
		return err
	}
	defer done()
	for _, name := range names {
		a, _ := d.agent(name)
		if err := d.store.PutAgent(ctx, a); err != nil {
			return err
		}
	}
	if err := stored(names); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, name := range names {
		delete(d.unstored, name)
	}
	return nil
}

// unban takes into effect that a ban was lifted in the store, unless it came again meanwhile.
func (d *directory) unban(name string) (lifted bool) {
	d.change(func(v *view) *view {
		a := v.agents[name]
		if lifted = !d.unstored[name]; !lifted {
			return v
		}
		a.Banned = false
		return v.with(a)
	})
	return lifted
}

// gave notes that an agent has got a certificate. It is in memory at once and in the store when that can be reached.
func (d *directory) gave(ctx context.Context, agent string, g given) error {
	d.mu.Lock()
	d.given[agent] = g
	d.mu.Unlock()
	done, err := d.toWrite(ctx)
	if err != nil {
		return err
	}
	defer done()
	a, ok := d.agent(agent)
	if !ok {
		return nil
	}
	return d.store.PutAgent(ctx, a)
}

// registered takes into effect what the store holds at a revision.
func (d *directory) registered(revision uint64, put []identity.Registration, del []string) {
	d.change(func(v *view) *view {
		all := maps.Clone(v.registrations)
		for _, name := range del {
			delete(all, name)
		}
		for _, r := range put {
			r.Revision = revision
			all[r.Name] = r
		}
		return v.withRegistrations(slices.Collect(maps.Values(all)), revision)
	})
}

// reload takes into effect all that the store holds, and keeps the bans that it does not hold yet. The caller has the turn
// to write.
func (d *directory) reload(ctx context.Context) error {
	next, registrations, err := readStore(ctx, d.store)
	if err != nil {
		return err
	}
	d.change(func(v *view) *view {
		for name := range d.unstored {
			if a, ok := next.agents[name]; ok {
				a.Banned = true
				next.agents[name] = a
			}
		}
		next.sets = v.sets // those that don't change stay as they are
		return next.withRegistrations(registrations, next.revision)
	})
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
