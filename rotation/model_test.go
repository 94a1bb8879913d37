//go:build !race

package rotation

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
)

// Each world is one goroutine that computes: the race detector would find nothing, and take four times as long.

// The model: clusters under shared roots over ten simulated years. Each cluster has a server, whose authorities, issued
// leaves and newest reports of its peers are durable and whose knowledge of its agents is not, and agents that validate and
// present leaves. Admins carry reports by hand, an offline root signs after days, servers crash before and after each
// commit, agents come and go. What is checked is in violated, commit, serverTick and atTheEnd.

const (
	modelLeaf = day
	modelYear = 365 * day
)

var modelPolicy = Policy{
	LongestLeaf: modelLeaf, Skew: 2 * time.Hour, Delay: 3 * time.Hour, Quorum: 1,
	PrepareAt: 0.5, SwitchAt: 0.67, ReportLife: day,
}

// mutant breaks one guard on purpose.
type mutant struct {
	// from is the first world to look at: what a guard is against does not happen in each.
	from   uint64
	policy func(*Policy)
	world  func(*World)
	// drop removes a wait from a step.
	drop func(Step, Wait) bool
	// optimist counts agents that were not heard yet as having the root.
	optimist bool
	// forgetful agents that come back speak for their validators, before these are back, as if there were none.
	forgetful bool
	// keyless tells roots apart by their certificates alone.
	keyless bool
}

func (m mutant) next(p Policy, w World, now time.Time) []Step {
	if m.policy != nil {
		m.policy(&p)
	}
	if m.world != nil {
		m.world(&w)
	}
	steps := Next(p, w, now)
	if m.drop != nil {
		for i, s := range steps {
			steps[i].Waits = slices.DeleteFunc(s.Waits, func(w Wait) bool { return m.drop(s, w) })
		}
	}
	return steps
}

type model struct {
	rng      *rand.Rand
	mutant   mutant
	now      time.Time
	clusters []*modelCluster
	roots    []Authority
	// leafMax bounds the lives of all leaves under each root; exposed are roots below which a key was lost.
	leafMax []time.Time
	exposed uint64
	taints  []modelTaint
	// stolen are keys of roots: a thief who holds one forges under every certificate of it. keys draws which root gets which.
	stolen map[string]bool
	keys   *rand.Rand
	// twins are lost keys that were in several certificates, or came to be. At theft good admins learn of one.
	twins int
	theft time.Time
	// desired is the newest root of the ceremonies; the next one is ready at ceremony.
	desired  int
	ceremony time.Time
	mails    []modelMail
	// Admins err until calmFrom; all must be well from wellFrom on.
	calmFrom, wellFrom time.Time
	broken             string
	activations        int
	rootsRemoved       int
	trace              func(string, ...any)
}

type modelTaint struct {
	root            int
	since, notAfter time.Time
}

type modelMail struct {
	at     time.Time
	from   int
	to     *modelCluster
	report Report
}

type modelCluster struct {
	*model
	name  string
	index int
	// policy is modelPolicy, with a ReportLife of its own.
	policy Policy
	offset time.Duration
	joinAt time.Time
	joined bool

	// Durable.
	all     []Authority
	made    int
	reports []Report // by cluster; zero = never
	peers   []bool   // by cluster: configured
	signAt  map[string]time.Time
	// online: an upstream at hand signs within minutes, and the keys of the issuers are gone when the server was down.
	online bool
	lost   map[string]bool
	// wellAt is when it last could sign the longest leaf.
	wellAt time.Time

	// Memory of the server.
	up      bool
	upAt    time.Time
	bundle  uint64
	version int
	since   [64]int // the version in which a root was published last; durable
	issuer  Authority
	stale   []string
	dirty   bool
	wake    time.Time
	adminAt time.Time

	agents []*modelAgent
}

type modelAgent struct {
	offset    time.Duration
	connected bool
	forgot    bool
	toggleAt  time.Time
	bundle    uint64
	version   int
	root      int // of its leaf; -1 = none
	issuer    string
	notAfter  time.Time
	renewAt   time.Time
	push, ack modelMessage
	next      time.Time

	// Durable at the server: what was issued.
	issued      []time.Time // by root
	lastUntil   time.Time
	issuedCount int
	// Memory of the server.
	known    bool
	has      uint64
	holds    int
	heldAsOf int
}

type modelMessage struct {
	at     time.Time // zero = none
	bundle uint64
	// version counts the bundles of the cluster: one that comes again with the same roots is another one.
	version int
	holds   int
	count   int
	lost    bool
}

func newModel(seed uint64, m mutant) *model {
	rng := rand.New(rand.NewPCG(seed, 17))
	s := &model{rng: rng, mutant: m, now: epoch, desired: -1, trace: func(string, ...any) {}, stolen: map[string]bool{}, keys: rand.New(rand.NewPCG(seed, 18))}
	// Every third world has good admins from the start.
	if seed%3 != 0 {
		s.calmFrom = epoch.Add(8 * modelYear)
	} else {
		s.calmFrom = epoch
	}
	s.wellFrom = s.calmFrom.Add(150 * day)
	s.theft = epoch.Add(10*modelYear - 90*day - time.Duration(s.keys.Int64N(int64(110*day))))
	n := 1 + rng.IntN(3)
	for i := range n {
		c := &modelCluster{
			model: s, name: string(rune('a' + i)), index: i, offset: s.skewed(), signAt: map[string]time.Time{}, online: rng.IntN(3) == 0, lost: map[string]bool{},
			reports: make([]Report, n), peers: make([]bool, n), joinAt: epoch, policy: modelPolicy,
		}
		c.policy.ReportLife = []time.Duration{day / 2, day, 8 * day}[rng.IntN(3)]
		if i > 0 && rng.IntN(3) == 0 {
			c.joinAt = epoch.Add(s.between(30*day, 5*modelYear))
		}
		for range 5 + rng.IntN(4)*rng.IntN(6) {
			c.agents = append(c.agents, &modelAgent{offset: s.skewed(), root: -1, connected: true, toggleAt: s.now.Add(s.between(0, 20*day))})
		}
		s.clusters = append(s.clusters, c)
	}
	return s
}

func (s *model) between(a, b time.Duration) time.Duration {
	return a + time.Duration(s.rng.Int64N(int64(b-a)))
}

func (s *model) chance(f float64) bool { return s.rng.Float64() < f }

// skewed is how far a clock is off: two are at most Skew apart.
func (s *model) skewed() time.Duration {
	return s.between(-modelPolicy.Skew/2, modelPolicy.Skew/2)
}

func (s *model) calm() bool { return !s.now.Before(s.calmFrom) }

func (s *model) fail(format string, args ...any) {
	if s.broken == "" {
		s.broken = fmt.Sprintf("day %.2f: ", s.now.Sub(epoch).Hours()/24) + fmt.Sprintf(format, args...)
	}
}

func (s *model) run(life time.Duration) {
	for end := epoch.Add(life); s.now.Before(end) && s.broken == ""; {
		s.now = s.now.Add(s.between(time.Hour/2, 5*time.Hour))
		s.ceremonies()
		for _, i := range s.rng.Perm(len(s.clusters)) {
			c := s.clusters[i]
			if !c.joined {
				c.join()
				continue
			}
			c.serverTick()
			for _, a := range c.agents {
				if !s.now.Before(a.next) {
					c.agentTick(a)
				}
			}
			c.adminTick()
		}
		s.deliver()
		s.steal()
	}
	if s.broken == "" {
		s.atTheEnd()
	}
}

// ceremonies makes a new root when the newest is old or exposed.
func (s *model) ceremonies() {
	if s.desired >= 0 && !s.mustGo(s.desired) && s.roots[s.desired].NotAfter.Sub(s.now) > 150*day {
		return
	}
	if s.desired >= 0 && s.ceremony.IsZero() {
		s.ceremony = s.now.Add(s.between(day/4, 3*day))
	}
	if s.now.Before(s.ceremony) || len(s.roots) >= 64 {
		return
	}
	s.ceremony = time.Time{}
	last := s.desired
	s.desired = len(s.roots)
	s.roots = append(s.roots, Authority{
		ID: fmt.Sprintf("root-%d", s.desired), NotBefore: s.now.Add(-modelPolicy.Skew),
		NotAfter: s.now.Add(s.between(350*day, 450*day)), KeyFingerprint: fmt.Sprintf("key-%d", s.desired),
	})
	s.leafMax = append(s.leafMax, time.Time{})
	// Some renew the certificate and keep the key, and those who err also a lost one.
	if last < 0 || s.keys.Float64() > 0.4 || s.calm() && s.stolen[s.roots[last].KeyFingerprint] {
		return
	}
	if s.roots[s.desired].KeyFingerprint = s.roots[last].KeyFingerprint; s.stolen[s.roots[last].KeyFingerprint] {
		s.expose(s.desired, s.roots[s.desired].NotAfter)
	}
}

// steal has an admin taint any of the roots that his cluster has had: where a key was stolen from, its certificate may have been
// renewed long ago.
func (s *model) steal() {
	if s.now.Before(s.theft) || s.theft.IsZero() {
		return
	}
	for _, c := range s.clusters {
		if !c.up {
			continue
		}
		had := slices.DeleteFunc(slices.Clone(c.all), func(a Authority) bool { return a.Kind != ca.KindRoot || s.now.After(a.NotAfter) })
		if len(had) > 0 {
			s.theft = time.Time{}
			c.taint(had[s.keys.IntN(len(had))])
			return
		}
	}
}

// mustGo reports whether a cluster says that forged certificates chain to a root, or refuses it for its key, so that people make
// another.
func (s *model) mustGo(root int) bool {
	return slices.ContainsFunc(s.clusters, func(c *modelCluster) bool {
		w := World{Authorities: c.all, Peers: c.heard()}
		return c.up && (!w.exposed(s.roots[root].ID, c.clock()).IsZero() || w.LostKey(s.given(root)) != nil)
	})
}

// expose notes that forged certificates chain to a root, until then.
func (s *model) expose(root int, notAfter time.Time) {
	s.exposed |= 1 << root
	s.taints = append(s.taints, modelTaint{root: root, since: s.now, notAfter: notAfter})
}

// given is a root as a cluster is given it.
func (s *model) given(r int) Authority {
	x := s.roots[r]
	if s.mutant.keyless {
		x.KeyFingerprint = ""
	}
	return x
}

func (s *model) rootIndex(id string) int {
	return slices.IndexFunc(s.roots, func(r Authority) bool { return r.ID == id })
}

func (s *model) mask(all []Authority) (m uint64) {
	for _, a := range all {
		if a.InBundle() {
			m |= 1 << s.rootIndex(a.ID)
		}
	}
	return m
}

func (c *modelCluster) clock() time.Time { return c.now.Add(c.offset) }

// alive reports whether an honest leaf under the root may be met by who has this clock. Once the root is exposed, leaves
// that were replaced are gone; before, they may live anywhere.
func (s *model) alive(root int, clock time.Time) bool {
	if s.exposed&(1<<root) == 0 || clock.After(s.leafMax[root]) {
		return !clock.After(s.leafMax[root])
	}
	for _, c := range s.clusters {
		for _, a := range c.agents {
			if a.root == root && !clock.After(a.notAfter) {
				return true
			}
		}
	}
	return false
}

// violated is the promise: no validator meets a leaf that its bundle can't verify.
func (s *model) violated(c *modelCluster, a *modelAgent) {
	clock := s.now.Add(a.offset)
	if a.root < 0 || clock.After(a.notAfter) {
		return
	}
	for r := max(0, len(s.roots)-64); r < len(s.roots); r++ {
		if a.bundle&(1<<r) == 0 && !clock.After(s.leafMax[r]) && s.alive(r, clock) {
			s.fail("an agent of %s can't verify a leaf under root-%d, valid until day %.2f", c.name, r, s.leafMax[r].Sub(epoch).Hours()/24)
		}
	}
}

func (s *model) checkAll() {
	for _, c := range s.clusters {
		for _, a := range c.agents {
			s.violated(c, a)
		}
	}
}

// world is what the server knows.
func (c *modelCluster) world() World {
	return World{Authorities: c.all, Own: c.report(), Peers: c.heard()}
}

// heard are the newest reports of the peers.
func (c *modelCluster) heard() (all []Report) {
	for i, configured := range c.peers {
		if configured {
			r := c.reports[i]
			r.Cluster = c.clusters[i].name
			all = append(all, r)
		}
	}
	return all
}

func (c *modelCluster) report() Report {
	now := c.clock()
	r := Report{Cluster: c.name, At: now, Until: now.Add(c.policy.ReportLife), Roots: ReportRoots(c.policy, c.all, now), Tainted: ReportTaints(c.policy, c.all, c.heard(), now)}
	for i := range r.Roots {
		x := &r.Roots[i]
		root := c.rootIndex(x.ID)
		for _, a := range c.agents {
			if a.lastUntil.IsZero() || now.After(a.lastUntil.Add(c.policy.Skew)) {
				continue
			}
			x.Validators++
			if a.known && a.has&(1<<root) != 0 || !a.known && c.mutant.optimist {
				x.Trusting++
			}
			if root < len(a.issued) && !now.After(a.issued[root].Add(c.policy.Skew)) && (!a.known || a.heldAsOf < a.issuedCount || a.holds == root) {
				x.Holding++
			}
		}
	}
	return r
}

// commit is one transaction with all that must hold of any state, then memory; it may crash between the two.
func (c *modelCluster) commit(all []Authority, why string) {
	before := c.all
	c.all = all
	c.trace("%s %s", c.name, why)
	active := 0
	for _, a := range all {
		if a.Kind != ca.KindIntermediate || a.State != ca.Active {
			continue
		}
		active++
		i := slices.IndexFunc(before, func(b Authority) bool { return b.ID == a.ID })
		if i >= 0 && before[i].State == ca.Active {
			continue
		}
		c.activations++
		if a.NotAfter.Sub(c.clock()) < modelLeaf {
			c.fail("%s activates %s, which lives shorter than the longest leaf", c.name, a.ID)
		}
		if a.NotBefore.After(c.clock()) {
			c.fail("%s activates %s before it is valid", c.name, a.ID)
		}
	}
	if active > 1 {
		c.fail("%s has %d active issuers", c.name, active)
	}
	if c.mask(before) != 0 && c.mask(all) == 0 {
		c.fail("the bundle of %s is empty", c.name)
	}
	c.dirty = true
	if c.chance(0.01) {
		c.crash(c.between(time.Hour, 12*time.Hour))
		return
	}
	c.load()
}

func (c *modelCluster) load() {
	if b := c.mask(c.all); b != c.bundle {
		c.version++
		for r := range c.roots {
			if b&^c.bundle&(1<<r) != 0 {
				c.since[r] = c.version
			}
		}
		c.bundle = b
		for _, a := range c.agents {
			a.has &= b
		}
	}
	c.issuer = Authority{}
	w := World{Authorities: c.all}
	if a, ok := w.active(); ok {
		c.issuer = a
	}
	c.stale = Stale(c.world(), c.clock())
	for _, a := range c.agents {
		a.next = c.now
	}
}

func (c *modelCluster) crash(away time.Duration) {
	c.trace("%s down for %s", c.name, away)
	c.up, c.upAt = false, c.now.Add(away)
	for _, a := range c.agents {
		a.known, a.has, a.holds, a.heldAsOf = false, 0, -1, 0
		a.ack = modelMessage{}
	}
}

// loseKeys is what a server with keys in memory does first when it starts.
func (c *modelCluster) loseKeys() {
	if !c.online {
		return
	}
	w, any := c.world(), false
	for _, a := range c.all {
		if a.Kind == ca.KindIntermediate && a.State != ca.Retired && a.State != ca.Removed && !c.lost[a.ID] {
			all, err := Lost(c.policy, w, a.ID, c.clock())
			if err != nil {
				c.fail("%s: %v", c.name, err)
			}
			w.Authorities, any, c.lost[a.ID] = all, true, true
		}
	}
	c.wellAt = c.now
	if any {
		c.commit(w.Authorities, "has lost its keys")
	}
}

// signOnline has the upstream sign what waits. It is away at times.
func (c *modelCluster) signOnline() {
	if !c.online || c.chance(0.1) {
		return
	}
	for _, a := range slices.Clone(c.all) {
		if !c.up || !waiting(a) || a.signed() || c.now.Before(c.signAt[a.ID]) {
			continue
		}
		root := Under(c.policy, c.world(), a.ID, c.clock())
		if r := c.rootIndex(root); r >= 0 {
			end := earlier(c.clock().Add(c.between(5*day, 9*day)), c.roots[r].NotAfter)
			if all, err := Signed(c.policy, c.world(), a.ID, root, c.clock(), end, c.clock()); err == nil {
				c.commit(all, a.ID+" is signed at once by "+root)
				continue
			}
		}
		c.signAt[a.ID] = c.now.Add(time.Hour)
	}
}

func (c *modelCluster) request() {
	c.made++
	id := fmt.Sprintf("intermediate-%d", c.made)
	all := append(slices.Clone(c.all), Authority{ID: id, Kind: ca.KindIntermediate, State: ca.Prepared, Since: c.clock()})
	// What is removed and not tainted decides nothing any more, but for the last that has signed.
	last, _ := World{Authorities: all}.current()
	all = slices.DeleteFunc(all, func(a Authority) bool {
		return a.Kind == ca.KindIntermediate && a.State == ca.Removed && a.Tainted.IsZero() && a.ID != last.ID
	})
	c.signAt[id] = c.now.Add(c.between(0, 3*day))
	if c.online {
		c.signAt[id] = c.now.Add(c.between(0, 10*time.Minute))
	}
	c.commit(all, "requests "+id)
}

var modelRank = map[ca.State]int{ca.Prepared: 0, ca.Published: 1, ca.Active: 2, ca.Retired: 3, ca.Removed: 4}

func (c *modelCluster) serverTick() {
	if !c.up {
		if c.now.Before(c.upAt) {
			return
		}
		c.up, c.dirty = true, true
		c.load()
		c.loseKeys()
		if !c.up {
			return
		}
	}
	c.signOnline()
	if !c.up {
		return
	}
	patience := time.Duration(0)
	if c.online {
		patience = day // here they are made for days only, and again after each start
	}
	// Under a tainted root nothing more is signed: that ends when people have made another one.
	signing, _ := World{Authorities: c.all}.current()
	above, _ := World{Authorities: c.all}.authority(signing.Root)
	if c.issuer.NotAfter.Sub(c.clock()) >= modelLeaf || !above.Tainted.IsZero() {
		c.wellAt = c.now
	} else if c.now.After(c.wellFrom) && c.now.Sub(c.joinAt) > 10*day && c.now.Sub(c.wellAt) > patience {
		c.fail("%s has no usable issuer", c.name)
	}
	if c.chance(0.0005) {
		c.crash(c.between(0, 6*time.Hour))
		return
	}
	if !c.calm() && c.chance(0.00005) {
		c.crash(c.between(5*day, 90*day))
		return
	}
	if now := c.now; !c.dirty && now.Before(c.wake) {
		return
	}
	c.dirty = false
	for n := 0; c.up && c.broken == ""; n++ {
		steps := c.mutant.next(c.policy, c.world(), c.clock())
		var ready []Step
		c.wake = c.now.Add(day)
		if c.online {
			c.wake = c.now.Add(time.Hour) // its issuers live for days, not for a month
		}
		for _, s := range steps {
			if s.Ready(false) {
				ready = append(ready, s)
			}
			for _, w := range s.Waits {
				if until := w.Until.Add(-c.offset); w.Until.IsZero() && w.Code == WaitQuorum {
					c.wake = c.now
				} else if !w.Until.IsZero() && until.Before(c.wake) {
					c.wake = until
				}
			}
		}
		if len(ready) == 0 {
			c.dirty = false
			return
		}
		if n > 50 {
			c.fail("%s does not come to rest: %v", c.name, ready[0])
			return
		}
		if c.chance(0.01) {
			c.crash(c.between(time.Hour, 12*time.Hour)) // before the commit
			return
		}
		// Any order.
		s := ready[c.rng.IntN(len(ready))]
		if s.From == "" {
			c.request()
			continue
		}
		if modelRank[s.To] <= modelRank[s.From] {
			c.fail("%s: %s goes back from %s to %s", c.name, s.Authority, s.From, s.To)
		}
		if s.Kind == ca.KindRoot && s.To == ca.Removed {
			c.rootsRemoved++
		}
		c.commit(Apply(c.policy, c.all, s, c.clock()), s.Authority+" "+string(s.To)+": "+s.Because)
	}
}

func (c *modelCluster) agentTick(a *modelAgent) {
	due := func(t time.Time) bool { return !t.IsZero() && !c.now.Before(t) }
	if due(a.toggleAt) {
		a.connected = !a.connected
		if a.connected {
			a.toggleAt, a.forgot = c.now.Add(c.between(day, 60*day)), c.mutant.forgetful
		} else {
			a.push = modelMessage{}
			a.toggleAt = c.now.Add(c.between(time.Hour, []time.Duration{12 * time.Hour, 3 * day}[c.rng.IntN(2)]))
		}
	}
	// A lost acknowledgement is lost with its connection; it comes again with the next.
	if due(a.ack.at) {
		m := a.ack
		a.ack = modelMessage{}
		if c.up && !m.lost {
			for r := range c.roots {
				if c.since[r] > m.version {
					m.bundle &^= 1 << r
				}
			}
			c.dirty = c.dirty || !a.known || a.has != m.bundle || a.holds != m.holds
			a.known, a.has, a.holds, a.heldAsOf = true, m.bundle, m.holds, m.count
		}
	}
	if due(a.push.at) {
		a.bundle, a.version, a.push, a.forgot = a.push.bundle, a.push.version, modelMessage{}, false
		c.violated(c, a)
	}
	if a.connected && c.up {
		if expired := a.root < 0 || c.now.Add(a.offset).After(a.notAfter); expired || due(a.renewAt) {
			c.issue(a, expired)
		}
		if a.version != c.version && a.push.at.IsZero() {
			lag := c.between(0, 6*time.Hour)
			if c.chance(0.1) {
				lag = c.between(0, 4*day)
			}
			a.push = modelMessage{at: c.now.Add(lag), bundle: c.bundle, version: c.version}
		}
		if slices.Contains(c.stale, a.issuer) && a.renewAt.After(c.now.Add(6*time.Hour)) {
			a.renewAt = c.now.Add(c.between(0, 6*time.Hour))
		}
		// Its word is what its validators have, also where it was started anew and they are not back.
		bundle, version := a.bundle, a.version
		if a.forgot {
			bundle, version = c.bundle, c.version
		}
		if a.ack.at.IsZero() && (!a.known || a.has != bundle&c.bundle || a.holds != a.root || a.heldAsOf != a.issuedCount) {
			a.ack = modelMessage{at: c.now.Add(c.between(0, 5*time.Hour)), bundle: bundle, version: version, holds: a.root, count: a.issuedCount, lost: c.chance(0.1)}
		}
	}
	a.next = c.now.Add(12 * time.Hour)
	for _, t := range []time.Time{a.toggleAt, a.ack.at, a.push.at, a.renewAt} {
		if t.After(c.now) && t.Before(a.next) {
			a.next = t
		}
	}
	if a.connected && c.up && (due(a.renewAt) || a.root < 0) {
		a.next = c.now
	}
}

// issue makes a leaf. Who had none takes the newest bundle with it.
func (c *modelCluster) issue(a *modelAgent, expired bool) {
	now := c.clock()
	end := earlier(now.Add(modelLeaf), c.issuer.NotAfter)
	if end.Sub(now) < modelLeaf/4 {
		return
	}
	root := c.rootIndex(c.issuer.Root)
	for len(a.issued) <= root {
		a.issued = append(a.issued, time.Time{})
	}
	a.issued[root] = later(a.issued[root], end)
	a.lastUntil = later(a.lastUntil, end)
	a.issuedCount++
	fresh := c.leafMax[root].After(c.now.Add(modelLeaf/2)) && c.exposed&(1<<root) == 0
	c.leafMax[root] = later(c.leafMax[root], end)
	if !c.chance(0.03) { // else the answer is lost
		if expired {
			a.bundle, a.version, a.push = c.bundle, c.version, modelMessage{}
		}
		a.root, a.issuer, a.notAfter = root, c.issuer.ID, end
		left := end.Sub(now)
		a.renewAt = c.now.Add(left*2/5 + c.between(0, left/5))
		c.violated(c, a)
	}
	if !fresh {
		c.checkAll()
	}
}

// deliver hands over the reports whose time has come, in any order, old ones again.
func (s *model) deliver() {
	s.rng.Shuffle(len(s.mails), func(i, j int) { s.mails[i], s.mails[j] = s.mails[j], s.mails[i] })
	s.mails = slices.DeleteFunc(s.mails, func(m modelMail) bool {
		if s.now.Before(m.at) {
			return false
		}
		if !m.to.up {
			return !s.chance(0.8)
		}
		if old := m.to.reports[m.from]; m.report.At.After(old.At) {
			m.to.reports[m.from], m.to.dirty = m.report, true
			m.to.stale = Stale(m.to.world(), m.to.clock())
		}
		return true
	})
}

func (c *modelCluster) send() {
	r := c.report()
	for i, configured := range c.peers {
		if !configured || c.chance(0.05) {
			continue
		}
		late := c.between(0, 6*time.Hour)
		if !c.calm() && c.chance(0.2) {
			late = c.between(0, 20*day)
		}
		c.mails = append(c.mails, modelMail{at: c.now.Add(late), from: c.index, to: c.clusters[i], report: r})
		if c.chance(0.1) { // and once more, much later
			c.mails = append(c.mails, modelMail{at: c.now.Add(c.between(0, 20*day)), from: c.index, to: c.clusters[i], report: r})
		}
	}
}

// verb does what a person asks for; refusals are answers too.
func (c *modelCluster) verb(what string, all []Authority, err error) {
	// An issuer can't take over again without its key.
	keyless := func(a Authority) bool { return a.State == ca.Active && c.lost[a.ID] }
	if err == nil && !slices.Equal(all, c.all) && !slices.ContainsFunc(all, keyless) {
		c.commit(all, what)
	}
}

func (c *modelCluster) addRoot(r int) {
	x := c.given(r)
	all, err := AddRoot(c.policy, c.world(), x, c.clock())
	c.verb("adds "+x.ID, all, err)
}

func (c *modelCluster) adminTick() {
	if !c.up || c.now.Before(c.adminAt) {
		return
	}
	c.adminAt = c.now.Add(c.between(20*time.Hour, 26*time.Hour))
	c.sign()
	if !c.calm() && c.chance(0.03) {
		tomorrow := c.adminAt
		if c.err(); c.adminAt.After(tomorrow) {
			return // and is gone
		}
	}
	if c.up && (c.calm() || c.chance(0.5)) {
		c.tidy()
	}
	if c.up && (c.calm() || c.chance(0.7)) {
		c.send()
	}
}

// sign hands requests to the offline root and brings back what it has signed: at times several with staggered starts.
func (c *modelCluster) sign() {
	if c.online {
		return
	}
	start := c.clock()
	for _, a := range slices.Clone(c.all) {
		if !waiting(a) || a.signed() || c.now.Before(c.signAt[a.ID]) {
			continue
		}
		for _, root := range []string{c.roots[c.desired].ID, c.issuer.Root} {
			r := c.rootIndex(root)
			if r < 0 {
				continue
			}
			begin := start
			end := earlier(begin.Add(c.between(25*day, 32*day)), c.roots[r].NotAfter)
			all, err := Signed(c.policy, c.world(), a.ID, root, begin, end, c.clock())
			if err == nil {
				c.commit(all, a.ID+" is signed by "+root)
				start = start.Add(18 * day)
				break
			}
		}
		if !c.up {
			return
		}
	}
	if c.chance(0.01) {
		for range c.rng.IntN(3) {
			c.request()
			if !c.up {
				return
			}
		}
	}
}

// tidy is what a good admin does: go to the newest root, drop the others.
func (c *modelCluster) tidy() {
	if c.chance(0.5) {
		return
	}
	desired := c.roots[c.desired].ID
	c.addRoot(c.desired)
	if !c.up {
		return
	}
	all, err := StartRoot(c.world(), desired, c.clock())
	c.verb("starts "+desired, all, err)
	for _, r := range c.all {
		if c.up && r.InBundle() && r.Leaving.IsZero() && r.ID != desired && r.ID != c.issuer.Root && c.chance(0.3) {
			all, err := RemoveRoot(c.world(), r.ID, c.clock())
			c.verb("removes "+r.ID, all, err)
		}
	}
}

// err is what else admins do.
func (c *modelCluster) err() {
	any := c.all[c.rng.IntN(len(c.all))]
	w, now := c.world(), c.clock()
	switch c.rng.IntN(10) {
	case 0:
		all, found := Want(c.policy, w, now)
		if c.verb("wants", all, nil); !found {
			c.request()
		}
	case 1, 2:
		all, err := Abort(c.policy, w, any.ID, false, now)
		c.verb("aborts "+any.ID, all, err)
	case 3:
		all, err := Abort(c.policy, w, c.issuer.ID, false, now)
		c.verb("aborts "+c.issuer.ID, all, err)
	case 4:
		id := any.ID
		if c.chance(0.5) {
			id = c.roots[c.desired].ID // what others go to
		}
		all, err := RemoveRoot(w, id, now)
		c.verb("removes "+id, all, err)
	case 5:
		all, err := StartRoot(w, any.ID, now)
		c.verb("starts "+any.ID, all, err)
	case 6:
		c.addRoot(c.rng.IntN(len(c.roots)))
	case 7:
		if !c.chance(0.2) {
			return
		}
		if c.chance(0.5) && c.issuer.ID != "" {
			any = c.issuer
		}
		c.taint(any)
	case 8, 9:
		// What others go to, and tells nobody for days.
		all, err := Abort(c.policy, w, c.roots[c.desired].ID, false, now)
		c.verb("aborts "+c.roots[c.desired].ID, all, err)
		c.adminAt = c.now.Add(c.between(2*day, 12*day))
	}
}

func (c *modelCluster) taint(a Authority) {
	all, err := Taint(c.world(), a.ID, c.clock())
	if err != nil {
		return
	}
	if a.Kind == ca.KindRoot {
		key := c.roots[c.rootIndex(a.ID)].KeyFingerprint
		c.stolen[key] = true
		for r, x := range c.roots {
			if x.KeyFingerprint == key {
				if c.expose(r, x.NotAfter); x.ID != a.ID {
					c.twins++
				}
			}
		}
	} else if a.signed() {
		c.expose(c.rootIndex(a.Root), a.NotAfter)
	}
	c.verb("taints "+a.ID, all, err)
}

// join begins a cluster: the others have it among their peers first, then it gets the trust set of one that signs, and an
// intermediate under the root that one signs under.
func (c *modelCluster) join() {
	if c.now.Before(c.joinAt) || c.desired < 0 {
		return
	}
	// In the middle of a rotation, where there is one within the year.
	if late := c.joinAt.After(epoch); late && c.now.Sub(c.joinAt) < modelYear && !slices.ContainsFunc(c.clusters, func(o *modelCluster) bool {
		return slices.ContainsFunc(o.all, func(r Authority) bool {
			return r.InBundle() && (r.State == ca.Published || !r.Leaving.IsZero())
		})
	}) {
		return
	}
	trusted, under := []string{c.roots[c.desired].ID}, c.roots[c.desired].ID
	for _, o := range c.clusters {
		if o == c {
			continue
		}
		if o.joinAt.After(epoch) && !o.joined {
			continue
		}
		c.peers[o.index], o.peers[c.index], o.dirty = true, true, true
		if o.joined && o.up && o.issuer.ID != "" {
			trusted, under = nil, o.issuer.Root
			for _, r := range o.all {
				if r.InBundle() {
					trusted = append(trusted, r.ID)
				}
			}
		} else if o.joined && len(trusted) == 1 && c.joinAt.After(epoch) {
			return // later
		}
	}
	if c.online && len(trusted) > 1 {
		for _, o := range c.clusters { // when that rotation is over, for which nobody waits for it
			c.peers[o.index], o.peers[c.index] = false, false
		}
		return
	}
	w, now := World{}, c.clock()
	for _, id := range trusted {
		all, err := AddRoot(c.policy, w, c.given(c.rootIndex(id)), now)
		if err != nil {
			return // a root at its end: once it is gone
		}
		w.Authorities = all
	}
	w.Authorities = append(w.Authorities, Authority{ID: "intermediate-0", Kind: ca.KindIntermediate, State: ca.Prepared, Since: now})
	end := earlier(now.Add(30*day), c.roots[c.rootIndex(under)].NotAfter)
	all, err := Signed(c.policy, w, "intermediate-0", under, now, end, now)
	if err != nil {
		return
	}
	c.joined, c.up, c.joinAt, c.adminAt = true, true, c.now, c.now
	c.commit(all, "joins under "+under)
}

// atTheEnd checks what has to have come about, once admins were good for long.
func (s *model) atTheEnd() {
	if s.now.Before(s.wellFrom) {
		return
	}
	s.checkAll()
	for _, c := range s.clusters {
		for _, r := range c.all {
			if c.joined && r.InBundle() && !r.Leaving.IsZero() && s.now.Sub(r.Leaving) > 60*day {
				s.fail("%s is stuck: %s leaves since day %.0f", c.name, r.ID, r.Leaving.Sub(epoch).Hours()/24)
			}
		}
	}
	for _, t := range s.taints {
		if s.now.Sub(later(t.since, s.calmFrom)) < 60*day || s.now.After(t.notAfter) {
			continue
		}
		for _, c := range s.clusters {
			for _, a := range c.agents {
				if a.bundle&(1<<t.root) != 0 && a.root >= 0 && !s.now.After(a.notAfter) {
					s.fail("an agent of %s accepts root-%d, exposed since day %.0f", c.name, t.root, t.since.Sub(epoch).Hours()/24)
				}
			}
		}
	}
}

func modelRun(seed uint64, m mutant) *model {
	s := newModel(seed, m)
	s.run(10 * modelYear)
	return s
}

// modelSeeds walks worlds on all processors.
func modelSeeds(t *testing.T, seeds uint64) {
	var next atomic.Uint64
	var mu sync.Mutex
	activations, removed, twins := 0, 0, 0
	var walkers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		walkers.Go(func() {
			for seed := next.Add(1) - 1; seed < seeds; seed = next.Add(1) - 1 {
				s := modelRun(seed, mutant{})
				if s.broken != "" {
					t.Errorf("seed %d: %s", seed, s.broken)
				}
				mu.Lock()
				activations, removed, twins = activations+s.activations, removed+s.rootsRemoved, twins+s.twins
				mu.Unlock()
				if (seed+1)%500 == 0 {
					t.Logf("%d worlds", seed+1)
				}
			}
		})
	}
	walkers.Wait()
	t.Logf("%d worlds of ten years: %d issuers activated, %d roots removed, %d others on lost keys", seeds, activations, removed, twins)
	if activations < 100*int(seeds) || removed < 5*int(seeds) || twins < int(seeds)/3 {
		t.Error("there was hardly anything to see")
	}
}

func TestNoValidatorEverMeetsALeafThatItCannotVerify(t *testing.T) {
	t.Parallel()
	modelSeeds(t, 24)
}

func saying(parts ...string) func(Step, Wait) bool {
	return func(_ Step, w Wait) bool {
		return slices.ContainsFunc(parts, func(p string) bool { return strings.Contains(w.For, p) })
	}
}

// Each guard is broken on purpose: the model must see it, or it proves nothing.
func TestTheModelFindsEveryBrokenGuard(t *testing.T) {
	t.Parallel()
	for name, m := range brokenGuards {
		t.Run(name, func(t *testing.T) {
			for seed := m.from; seed < m.from+60; seed++ {
				if s := modelRun(seed, m); s.broken != "" && !strings.Contains(s.broken, "no usable issuer") {
					t.Logf("seed %d: %s", seed, s.broken)
					return
				}
			}
			t.Error("sixty worlds went well without this guard")
		})
	}
}

var brokenGuards = map[string]mutant{
	"agents of this cluster have the root":        {drop: saying("of this cluster")},
	"agents not heard of don't count":             {from: 10, optimist: true},
	"validators that are not back yet count":      {forgetful: true},
	"peers trust the root":                        {drop: func(s Step, w Wait) bool { return s.To == ca.Active && w.Code == WaitPeer }},
	"a peer's agents have the root":               {drop: saying("agents of cluster")},
	"a peer that does not trust it is waited for": {drop: saying("does not trust it")},
	"promises end":                                {drop: saying("could be relied upon")},
	"a peer's promise ends when it says":          {from: 430, world: promisedForEver},
	"what was promised is kept":                   {drop: saying("may rely on", "has not reported since")},
	"peers that sign are waited for":              {drop: saying("still signs under it")},
	"leaves are waited for":                       {drop: func(s Step, w Wait) bool { return w.Code == WaitLeaves }},
	"own leaves are waited for":                   {drop: saying("leaves under it are valid")},
	"leaves of peers are waited for":              {drop: saying("leaves of cluster")},
	"leaves in use are waited for after a taint":  {from: 7, world: nobodyHolds},
	"a lost key is lost in each certificate":      {from: 12, keyless: true},
	"a short life is no life":                     {from: 625, policy: func(p *Policy) { p.LongestLeaf = 0 }},
	"what is not valid yet does not sign":         {drop: func(s Step, w Wait) bool { return s.To == ca.Active && w.Code == WaitTime }},
	"the last root stays": {drop: func(_ Step, w Wait) bool {
		return w.Code == WaitNoOther || w.Code == WaitIssuer || w.Code == WaitPeer || w.Code == WaitLeaves
	}},
}

// promisedForEver takes the promises of peers to hold for as long as our own.
func promisedForEver(w *World) {
	w.Peers = slices.Clone(w.Peers)
	for i := range w.Peers {
		w.Peers[i].Until = w.Peers[i].At.Add(modelYear)
	}
}

// nobodyHolds takes every leaf of an exposed root for replaced.
func nobodyHolds(w *World) {
	w.Peers = slices.Clone(w.Peers)
	forget := func(roots []RootReport) []RootReport {
		roots = slices.Clone(roots)
		for i := range roots {
			roots[i].Holding = 0
		}
		return roots
	}
	w.Own.Roots = forget(w.Own.Roots)
	for i := range w.Peers {
		w.Peers[i].Roots = forget(w.Peers[i].Roots)
	}
}
