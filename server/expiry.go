package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
)

// Closed sets of labels.
var (
	caKinds  = []string{ca.KindRoot, ca.KindIntermediate, ca.KindControl}
	caStates = []ca.State{ca.Prepared, ca.Published, ca.Active, ca.Retired, ca.Removed}
	// rotated are the kinds whose steps package rotation decides about.
	rotated = []string{ca.KindRoot, ca.KindIntermediate}
	waits   = []rotation.WaitCode{
		rotation.WaitTime, rotation.WaitSignature, rotation.WaitQuorum, rotation.WaitPeer, rotation.WaitRoot, rotation.WaitIssuer,
		rotation.WaitLeaves, rotation.WaitNoOther, rotation.WaitShortLived,
	}
)

// lifeCollector shows the ends of everything and what the rotation waits for, from the start and as of one moment.
type lifeCollector struct{ server *Server }

func lifeDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("signet_"+name, help, labels, nil)
}

var (
	descCAs       = lifeDesc("rotation_state", "CAs by kind and state.", "kind", "state")
	descEarliest  = lifeDesc("ca_earliest_not_after_timestamp_seconds", "End of the CA of this kind and state that ends first, of its chain where it has one; NaN = there is none.", "kind", "state")
	descTaintedCA = lifeDesc("ca_tainted", "CAs whose keys are taken for lost and whose chains have not ended, by kind.", "kind")
	descBundleEnd = lifeDesc("bundle_earliest_root_not_after_timestamp_seconds", "End of the root in the trust bundle that ends first; NaN = there is none.", "trust_domain")
	descOwnEnd    = lifeDesc("server_certificate_not_after_timestamp_seconds", "End of the server's own certificate; NaN = it has none.")
	descIssuable  = lifeDesc("issuable_seconds", "How long certificates can be made if nobody does anything; 0 = none can be made now.", "kind")
	descBlocked   = lifeDesc("rotation_blocked", "Next steps that wait, by kind of CA and by what they wait for.", "kind", "reason")
	descReady     = lifeDesc("rotation_ready", "Next steps that wait for nothing; with rotation.automatic off they wait for a person.", "kind")
	descAgents    = lifeDesc("bundle_validators", "Agents with identities that live, or may: those whose workloads validate.")
	descNewest    = lifeDesc("bundle_validators_acked", "Of signet_bundle_validators, those that have acknowledged the newest trust bundle.")
	descHolding   = lifeDesc("reissue_holding", "Agents that use, or may use, leaves that are to be replaced ahead of time.")
	descAccepted  = lifeDesc("tainted_accepted", "1 while a trust bundle or an agent of any cluster accepts, or may accept, what is forged with a lost key.")
	descUpstream  = lifeDesc("upstream_failing_seconds", "How long the upstream authority has signed no request that it was asked to sign; 0 = it signs.")
	descReport    = lifeDesc("rotation_report_age_seconds", "Age of the newest report of another cluster; +Inf = it has never reported.", "cluster")
	descSkew      = lifeDesc("clock_skew_seconds", "How far the clock is off: elapsed = ahead of the time that has passed since the last look, log = behind the latest time that is known.", "source")
)

// Describe says what there may be.
func (lifeCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descCAs, descEarliest, descTaintedCA, descBundleEnd, descOwnEnd, descIssuable, descBlocked, descReady, descAgents, descNewest,
		descHolding, descAccepted, descReport, descSkew, descUpstream,
	} {
		out <- d
	}
}

// unixSeconds is a time as Prometheus has it: NaN where there is none, since 0 would look like an end in 1970 to every alert.
func unixSeconds(t time.Time) float64 {
	if t.IsZero() {
		return math.NaN()
	}
	return float64(t.UnixNano()) / 1e9
}

// Collect looks once.
func (c lifeCollector) Collect(out chan<- prometheus.Metric) {
	s := c.server
	k := s.keeper
	if k == nil || k.current.Load() == nil || s.own == nil {
		return // not started
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	set, now := k.current.Load(), s.now()
	collectLives(set, now, gauge)
	var bundleEnd time.Time
	for _, r := range set.bundle.Roots() {
		bundleEnd = earliest(bundleEnd, r.NotAfter)
	}
	gauge(descBundleEnd, unixSeconds(bundleEnd), s.config.TrustDomain.Name())
	var own time.Time
	if l := s.own.current.Load(); l != nil {
		own = l.notAfter
	}
	gauge(descOwnEnd, unixSeconds(own))
	if s.config.Upstream != nil {
		failing := 0.0
		if since, why := k.upstreamState.get(); why != nil {
			failing = max(now.Sub(since).Seconds(), 0)
		}
		gauge(descUpstream, failing)
	}

	look := s.lookAtRotation(set, now)
	look.Halt = s.halt(set)
	gauge(descIssuable, left(look.IssuableUntil(now), now), ca.KindIntermediate)
	control := s.controlUntil(now)
	if s.halted() != nil {
		control = time.Time{}
	}
	gauge(descIssuable, left(control, now), ca.KindControl)
	steps := rotation.Next(look.Policy, look.World, now)
	for _, kind := range rotated {
		ready := 0
		blocked := map[rotation.WaitCode]int{}
		for _, step := range steps {
			if step.Kind != kind {
				continue
			}
			if step.Ready(false) {
				ready++
			}
			// A step that waits for the same of several counts once.
			seen := map[rotation.WaitCode]bool{}
			for _, w := range step.Waits {
				if !seen[w.Code] {
					seen[w.Code] = true
					blocked[w.Code]++
				}
			}
		}
		gauge(descReady, float64(ready), kind)
		for _, code := range waits {
			gauge(descBlocked, float64(blocked[code]), kind, string(code))
		}
	}
	k.collectAgents(set, now, gauge)
	accepted := 0.0
	for _, f := range look.Forged {
		if len(f.By) > 0 {
			accepted = 1
		}
	}
	gauge(descAccepted, accepted)
	for _, p := range look.Peers {
		age := math.Inf(1)
		if !p.At.IsZero() {
			age = now.Sub(p.At).Seconds()
		}
		gauge(descReport, age, p.Cluster)
	}
	ahead, behind := s.clock.apart()
	gauge(descSkew, ahead.Seconds(), "elapsed")
	gauge(descSkew, behind.Seconds(), "log")
}

// collectLives counts the CAs and finds the first end of each kind and state.
func collectLives(set *authorities, now time.Time, gauge func(*prometheus.Desc, float64, ...string)) {
	for _, kind := range caKinds {
		tainted := 0
		for _, state := range caStates {
			n, end := 0, time.Time{}
			for _, a := range set.rows {
				if a.Kind != kind || a.State != state {
					continue
				}
				n++
				if !a.NotAfter.IsZero() {
					end = earliest(end, a.NotAfter)
				}
				if !a.Tainted.IsZero() && now.Before(a.NotAfter) {
					tainted++
				}
			}
			gauge(descCAs, float64(n), kind, string(state))
			gauge(descEarliest, unixSeconds(end), kind, string(state))
		}
		gauge(descTaintedCA, float64(tainted), kind)
	}
}

// collectAgents counts what agents have said.
func (k *keeper) collectAgents(set *authorities, now time.Time, gauge func(*prometheus.Desc, float64, ...string)) {
	all := k.validators(now)
	acked := 0
	for _, v := range all {
		if v.oldest == set.bundle.Version() {
			acked++
		}
	}
	gauge(descAgents, float64(len(all)))
	gauge(descNewest, float64(acked))
	holding := 0.0
	if r := k.reissueStatus(set, now); r != nil {
		holding = float64(r.Holding)
	}
	gauge(descHolding, holding)
}

// earliest of two times, of which the zero one is none.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

func left(until, now time.Time) float64 {
	if until.IsZero() {
		return 0
	}
	return max(until.Sub(now).Seconds(), 0)
}

// LeastLife is what must be left of an issuer's life for a certificate of this life.
func (c *Config) LeastLife(ttl time.Duration) time.Duration {
	least := c.MinUsefulLife
	if least <= 0 {
		least = identity.MinTTL
	}
	return min(least, ttl)
}

// controlUntil is until when certificates of our own parts can be made; zero = none can be made now.
func (s *Server) controlUntil(now time.Time) time.Time {
	issuer, ok := s.issuers.Snapshot().Active(identity.ControlPlane)
	if !ok || issuer.Usable(now) != nil {
		return time.Time{}
	}
	if until := issuer.NotAfter().Add(time.Second - s.config.LeastLife(s.config.ControlTTL)); now.Before(until) {
		return until
	}
	return time.Time{}
}

// lookAtRotation is what there is to look at.
func (s *Server) lookAtRotation(set *authorities, now time.Time) check.Rotation {
	k := s.keeper
	look := check.Rotation{Policy: k.policy.Policy, World: k.world(set, now), Automatic: k.policy.Automatic, Online: s.config.Upstream != nil, Shared: s.exchange != nil, LeastLife: s.config.LeastLife(s.config.TTL)}
	for _, t := range k.tainted(set, look.World, now) {
		f := check.Forged{ID: t.Id, Cluster: t.Cluster, Until: t.AcceptedUntil.AsTime(), Advice: t.Advice}
		for _, a := range t.AcceptedBy {
			f.By = append(f.By, acceptedBy(a))
		}
		look.Forged = append(look.Forged, f)
	}
	look.Restored = k.lost(set).look()
	vaultTells := s.config.Vault != nil && s.config.Vault().Halt("") != nil
	look.Failed = k.failedSteps(func(err error) bool { return vaultTells && errors.Is(err, keystore.ErrAway) })
	return look
}

// checkRotation is what readiness says of it.
func (s *Server) checkRotation(context.Context) check.Findings {
	set, now := s.keeper.current.Load(), s.now()
	look := s.lookAtRotation(set, now)
	look.Halt = s.halt(set)
	return look.Findings(now)
}

// halted is what keeps everything from being issued, whatever issuer lives.
func (s *Server) halted() *check.Halt {
	if err := s.clock.believe(); err != nil {
		return &check.Halt{Since: s.clock.since(), Why: err.Error(), Mend: "timedatectl set-ntp true"}
	}
	return s.logTried.halt(LogDir(s.config.Dir), s.now())
}

// halt is what keeps leaves from being made although an intermediate lives.
func (s *Server) halt(set *authorities) *check.Halt {
	if h := s.halted(); h != nil {
		return h
	}
	row, ok := set.issuing()
	if !ok {
		return nil
	}
	remote := row.Key.Backend != keystore.BackendFile && row.Key.Backend != keystore.BackendMemory
	if s.config.Vault != nil && remote {
		if h := s.config.Vault().Halt(row.ID); h != nil {
			return h
		}
	}
	cant := func(since time.Time, err error) *check.Halt {
		return &check.Halt{Since: since, Why: fmt.Sprintf("the key of %s can't be used: %v", row.ID, err)}
	}
	if since, err := s.authority.Unsigned(identity.Mesh); err != nil {
		return cant(since, err)
	}
	if _, ok := s.issuers.Snapshot().Active(identity.Mesh); ok {
		return nil
	}
	if unopened := s.keeper.unopened.Load(); unopened != nil {
		return cant(unopened.since, unopened.err)
	}
	return cant(s.begun, errors.New("it was in memory, and is gone with the process that held it"))
}

// issuing is the row of the intermediate that is active.
func (set *authorities) issuing() (store.Authority, bool) {
	i := slices.IndexFunc(set.rows, func(a store.Authority) bool { return a.Kind == ca.KindIntermediate && a.State == ca.Active })
	if i < 0 {
		return store.Authority{}, false
	}
	return set.rows[i], true
}

// CheckRotation looks at the rotation in a folder from outside, also while a server works on it. What agents have
// acknowledged only the server knows; here they count as not having said anything. With c.Keys it is looked whether the key of
// the intermediate that signs is there.
func CheckRotation(ctx context.Context, c Config, now time.Time) (_ check.Findings, err error) {
	if err := hasCluster(c.Dir); err != nil {
		return nil, err
	}
	c.Rotation.LongestLeaf = c.MaxTTL
	st, err := store.Open(ctx, store.Config{Path: databasePath(c.Dir), ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	rows, revision, err := st.Authorities(ctx)
	if err != nil {
		return nil, err
	}
	bundle, _, err := st.Bundle(ctx, c.TrustDomain)
	if err != nil {
		return nil, err
	}
	set, err := newAuthorities(c.TrustDomain, rows, revision, bundle)
	if err != nil {
		return nil, err
	}
	agents, err := st.Agents(ctx)
	if err != nil {
		return nil, err
	}
	notes, err := st.PeerReports(ctx)
	if err != nil {
		return nil, err
	}
	k := newKeeper(&c.Folder, c.Rotation)
	if k.history, err = st.BundleHistory(ctx); err != nil {
		return nil, err
	}
	for _, p := range c.Rotation.Peers {
		if r, err := openReport(notes[p.Cluster], p, c.TrustDomain); err == nil {
			k.reports[p.Cluster] = r
		}
	}
	if k.policy.OlderLeaves, err = olderLeaves(ctx, st, k.policy.LongestLeaf, now); err != nil {
		return nil, err
	}
	k.agents = silent(agents, k.policy.Policy)
	logKey, ok, err := st.Meta(ctx, verifierFact)
	if err != nil {
		return nil, err
	}
	if ok {
		// A log that can't be read is found by who looks at it.
		if in, err := newestChange(ctx, LogDir(c.Dir), logKey); err == nil {
			k.logged.Store(&in)
		}
	}
	look := (&Server{config: c, keeper: k}).lookAtRotation(set, now)
	look.Offline = !answers(ctx, c.AdminSocket)
	if row, ok := set.issuing(); ok && c.Keys != nil && row.Key.Backend != keystore.BackendMemory {
		// One that can't be read by whoever looks may well be good for the server.
		if _, _, err := k.issuer(ctx, set, row); errors.Is(err, keystore.ErrNotFound) || errors.Is(err, keystore.ErrAway) || errors.Is(err, ca.ErrOtherKey) {
			look.Halt = &check.Halt{Why: fmt.Sprintf("the key of %s can't be opened: %v", row.ID, err)}
		}
	}
	return look.Findings(now), nil
}

// answers reports whether a server listens on its admin socket.
func answers(ctx context.Context, socket string) bool {
	conn, err := (&net.Dialer{Timeout: storePatience}).DialContext(ctx, "unix", socket)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// silent are the agents of a folder, of which nothing is heard.
func silent(agents []store.Agent, policy rotation.Policy) func(now time.Time) []validator {
	return func(now time.Time) []validator {
		var all []validator
		for _, a := range agents {
			if !a.Banned {
				all = append(all, validator{agent: a.Name, away: lastSeen(a), unheard: true, ended: !now.Before(policy.LeavesUntil(a.NotAfter))})
			}
		}
		return all
	}
}

// lastSeen is when an agent has enrolled or last had a certificate.
func lastSeen(a store.Agent) time.Time { return latest(a.Enrolled, a.LastSeen) }
