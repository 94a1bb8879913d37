package agent

import (
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Label values.
const (
	resultOK      = "ok"
	resultFailed  = "failed"
	resultRefused = "refused"
	attestorUnix  = "unix"
)

// metrics of an agent. No SPIFFE ID and no serial is ever a label.
type metrics struct {
	renewals        *prometheus.CounterVec
	controlRenewals *prometheus.CounterVec
	attestations    *prometheus.CounterVec
	attestationTime prometheus.Observer
	inconsistencies prometheus.Counter
	generation      *prometheus.GaugeVec
	roots           *prometheus.GaugeVec
	// lastContact in nanoseconds since the epoch; 0 = never.
	lastContact atomic.Int64
}

// newMetrics registers everything, so that all series are there from the start. The gauges of the earliest certificate
// are NaN while there is none: a 0 would look like an expiry in 1970 to every alert.
func newMetrics(reg prometheus.Registerer, now func() time.Time, lives func() life, controlNotAfter func() time.Time, connected func() bool) (*metrics, error) {
	results := func(v *prometheus.CounterVec, labels ...string) *prometheus.CounterVec {
		for _, r := range []string{resultOK, resultFailed, resultRefused} {
			v.WithLabelValues(append(labels, r)...)
		}
		return v
	}
	attestationTime := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "signet_attestation_duration_seconds", Help: "Time a new stream waited for its caller to be attested, which happens once a connection.",
		Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5},
	}, []string{"attestor"})
	m := &metrics{
		renewals: results(prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_renewals_total", Help: "Tries to get a workload's certificate, the first one and renewals.",
		}, []string{"result"})),
		controlRenewals: results(prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_agent_control_renewals_total", Help: "Tries to renew the agent's own control certificate.",
		}, []string{"result"})),
		attestations: results(prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_attestations_total", Help: "Streams by who opened them: ok = attested and at least one registration fits, refused = none does.",
		}, []string{"attestor", "result"}), attestorUnix),
		attestationTime: attestationTime.WithLabelValues(attestorUnix),
		inconsistencies: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_log_inconsistencies_total", Help: "Checkpoints of the audit log that contradict what this agent has seen: forks and rollbacks.",
		}),
		generation: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "signet_bundle_generation", Help: "Sequence of the trust bundle in use.",
		}, []string{"trust_domain"}),
		roots: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "signet_bundle_roots", Help: "Roots in the trust bundle in use.",
		}, []string{"trust_domain"}),
	}
	seconds := func(t time.Time) float64 {
		if t.IsZero() {
			return math.NaN()
		}
		return float64(t.UnixNano()) / 1e9
	}
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
	}
	states := func(state string, f func(life) int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "signet_agent_svids", Help: "Certificates of workloads by state.", ConstLabels: prometheus.Labels{"state": state},
		}, func() float64 { return float64(f(lives())) })
	}
	all := []prometheus.Collector{
		m.renewals, m.controlRenewals, m.attestations, attestationTime, m.inconsistencies, m.generation, m.roots,
		states("valid", func(l life) int { return l.valid }),
		states("expired", func(l life) int { return l.expired }),
		states("pending", func(l life) int { return l.pending }),
		gauge("signet_agent_reissues_pending", "Certificates of workloads that are to be replaced ahead of time because the server wants their issuer replaced.",
			func() float64 { return float64(lives().replacing) }),
		gauge("signet_renewals_overdue", "Certificates of workloads whose renewal has failed at least once or waits because others' have, or that have expired.",
			func() float64 { return float64(lives().overdue) }),
		gauge("signet_agent_earliest_svid_not_after_timestamp_seconds", "End of the valid workload certificate that ends first; where all have expired, of the one that ended first; NaN = there is none.",
			func() float64 {
				if e := lives().earliest; e != nil {
					return seconds(e.svid.NotAfter)
				}
				return math.NaN()
			}),
		gauge("signet_agent_earliest_svid_not_before_timestamp_seconds", "Start of the same certificate; NaN = there is none.",
			func() float64 {
				if e := lives().earliest; e != nil {
					return seconds(e.svid.NotBefore)
				}
				return math.NaN()
			}),
		gauge("signet_agent_outage_budget_seconds", "How long no workload would notice that the server is away; 0 = all certificates have expired; NaN = there is none.",
			func() float64 {
				if e := lives().earliest; e != nil {
					return max(e.svid.NotAfter.Sub(now()).Seconds(), 0)
				}
				return math.NaN()
			}),
		gauge("signet_agent_control_not_after_timestamp_seconds", "End of the agent's own control certificate; NaN = not enrolled.",
			func() float64 { return seconds(controlNotAfter()) }),
		gauge("signet_agent_last_contact_timestamp_seconds", "When the server was last heard; 0 = never.",
			func() float64 {
				if connected() {
					return seconds(now())
				}
				return float64(m.lastContact.Load()) / 1e9
			}),
	}
	for _, c := range all {
		if err := reg.Register(c); err != nil {
			var already prometheus.AlreadyRegisteredError
			if errors.As(err, &already) {
				return nil, fmt.Errorf("register the agent's metrics: there is already an agent on this registry; give each its own: %w", err)
			}
			return nil, fmt.Errorf("register the agent's metrics: %w", err)
		}
	}
	return m, nil
}
