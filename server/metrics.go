package server

import (
	"context"
	"errors"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
)

// reasons is the closed set of what labels a refusal.
var reasons = []string{
	// What identity.Authorize says.
	"no_key", "not_allowed", "unknown_agent", "banned_agent", "evidence_too_long", "evidence_malformed", "not_registered", "selectors_differ", "other_key", "banned_identity",
	// What package ca says.
	"spent_grant", "bad_grant", "issuer_unavailable", "canceled", "log_unavailable", "sign_failed",
	// What the doors say.
	"invalid", "bad_certificate", "token_unusable", "token_replayed", "over_quota", "expired_too_long", "store_unavailable", "too_many", "internal",
	"clock_wrong", "trust_first",
}

const otherReason = "other"

type metrics struct {
	rejected *prometheus.CounterVec
	ahead    prometheus.Counter
	// doubts counts by what an agent says of the log and by how many say so.
	doubts *prometheus.CounterVec
	unread prometheus.Counter
}

// newMetrics registers the server's own metrics; those of the log and of issuing are registered by their packages.
func newMetrics(s *Server) (*metrics, error) {
	m := &metrics{
		rejected: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_svid_requests_rejected_total", Help: "Requests that were refused, or could not be answered, by door and reason.",
		}, []string{"door", "reason"}),
		ahead: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_log_witness_ahead_total", Help: "Times an agent had seen a larger log than this server holds: the log was rolled back or replaced.",
		}),
		doubts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_log_witness_contradictions_total", Help: "Reports of agents that contradict the log: a size it does not have, or another root hash; by how many agents do so now.",
		}, []string{"claim", "agents"}),
		unread: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_svid_requests_abandoned_total", Help: "Certificates that were being made when the agent that had asked for them was gone: their entries may be in the log.",
		}),
	}
	for _, claim := range []string{claimAhead, claimFork} {
		for _, agents := range []string{sayOne, saySeveral} {
			m.doubts.WithLabelValues(claim, agents)
		}
	}
	for _, d := range []door{enrolDoor, agentDoor, adminDoor} {
		for _, reason := range append(slices.Clone(reasons), otherReason) {
			m.rejected.WithLabelValues(d.name, reason)
		}
	}
	td := prometheus.Labels{"trust_domain": s.config.TrustDomain.Name()}
	gauge := func(name, help string, labels prometheus.Labels, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, f)
	}
	var errs []error
	for _, c := range []prometheus.Collector{
		m.rejected, m.ahead, m.doubts, m.unread,
		lifeCollector{s},
		gauge("signet_log_changes_waiting", "1 while a change that is stored waits for the log, and is not in effect.", nil, func() float64 {
			if s.settled() != nil {
				return 1
			}
			return 0
		}),
		gauge("signet_bundle_generation", "Sequence of the trust bundle that agents are told.", td, func() float64 {
			b, _ := s.bundles.Get(s.config.TrustDomain)
			return float64(b.Sequence())
		}),
		gauge("signet_bundle_roots", "Roots in the trust bundle.", td, func() float64 {
			b, _ := s.bundles.Get(s.config.TrustDomain)
			return float64(len(b.Roots()))
		}),
		gauge("signet_bundle_subscribers", "Sync streams of agents that are open.", nil, func() float64 {
			b, _ := s.bundles.Get(s.config.TrustDomain)
			open, _ := s.sessions.count(b)
			return float64(open)
		}),
		gauge("signet_bundle_subscribers_acked", "Sync streams whose agent has acknowledged the current trust bundle.", nil, func() float64 {
			b, _ := s.bundles.Get(s.config.TrustDomain)
			_, acked := s.sessions.count(b)
			return float64(acked)
		}),
		gauge("signet_store_up", "1 while the state database answers.", nil, func() float64 {
			if s.storeUp(context.Background()) != nil {
				return 0
			}
			return 1
		}),
	} {
		errs = append(errs, s.config.Metrics.Register(c))
	}
	return m, errors.Join(errs...)
}

func (m *metrics) reject(door, reason string) {
	if !slices.Contains(reasons, reason) {
		reason = otherReason
	}
	m.rejected.WithLabelValues(door, reason).Inc()
}
