package sds

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// Label values.
const (
	protocolSotW  = "sotw"
	protocolDelta = "delta"
	kindSVID      = "svid"
	kindBundle    = "bundle"

	endUnanswered = "bundle_unanswered"
	endUnread     = "unread"
	endIdentity   = "identity_lost"
	endStopping   = "stopping"
)

type metrics struct {
	streams     *prometheus.GaugeVec
	pushes      *prometheus.CounterVec
	acks        *prometheus.CounterVec
	nacks       *prometheus.CounterVec
	withheld    *prometheus.CounterVec
	removals    prometheus.Counter
	unanswered  *prometheus.CounterVec
	ended       *prometheus.CounterVec
	firstSecret prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	byKind := func(name, help string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{"kind"})
		v.WithLabelValues(kindSVID)
		v.WithLabelValues(kindBundle)
		return v
	}
	m := &metrics{
		streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "signet_sds_streams", Help: "Open SDS streams.",
		}, []string{"protocol"}),
		pushes: byKind("signet_sds_pushes_total", "Secrets sent."),
		acks:   byKind("signet_sds_acks_total", "Secrets acknowledged; not counted: one the same process had rejected before."),
		nacks:  byKind("signet_sds_nacks_total", "Secrets rejected by Envoy."),
		withheld: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_sds_withheld_total", Help: "SVIDs not sent because they failed the check before sending.",
		}, []string{"reason"}),
		removals: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_sds_removals_total", Help: "Secrets withdrawn over incremental SDS because their name is no longer granted.",
		}),
		unanswered: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_sds_unanswered_total", Help: "Names subscribed to that had nothing to send, by why; those that get it later included.",
		}, []string{"reason"}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_sds_streams_ended_total", Help: "SDS streams that were ended from this side, by why.",
		}, []string{"reason"}),
		firstSecret: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "signet_sds_first_secret_duration_seconds",
			Help:    "Time from the opening of a stream to its first secret.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}),
	}
	m.streams.WithLabelValues(protocolSotW)
	m.streams.WithLabelValues(protocolDelta)
	for _, a := range absences {
		m.unanswered.WithLabelValues(string(a))
	}
	for _, r := range []string{withheldKey, withheldIdentity, withheldValidity, withheldChain} {
		m.withheld.WithLabelValues(r)
	}
	for _, r := range []string{endUnanswered, endUnread, endIdentity, endStopping} {
		m.ended.WithLabelValues(r)
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.streams, m.pushes, m.acks, m.nacks, m.withheld, m.removals, m.unanswered, m.ended, m.firstSecret} {
		if err := reg.Register(c); err != nil {
			var already prometheus.AlreadyRegisteredError
			if errors.As(err, &already) {
				return nil, fmt.Errorf("register SDS metrics: there is already a server on this registry; give each its own: %w", err)
			}
			return nil, fmt.Errorf("register SDS metrics: %w", err)
		}
	}
	return m, nil
}
