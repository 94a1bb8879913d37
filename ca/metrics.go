package ca

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

type metrics struct {
	issued            *prometheus.CounterVec
	loggedNotReleased prometheus.Counter
	issueDuration     *prometheus.HistogramVec
	signDuration      *prometheus.HistogramVec
	signErrors        *prometheus.CounterVec
}

// From 50 µs, an in-process signature, to 13 s, more than any remote key may take.
var durationBuckets = prometheus.ExponentialBuckets(50e-6, 4, 10)

func newMetrics(r prometheus.Registerer, issuers *Issuers) (*metrics, error) {
	m := &metrics{
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_svids_issued_total", Help: "Certificates logged, signed and released.",
		}, []string{"issuer", "door"}),
		loggedNotReleased: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_logged_not_released_total", Help: "Certificates that are in the log but were never released, because signing failed.",
		}),
		issueDuration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "signet_issue_duration_seconds", Help: "Time of one call, of one or many certificates, logging included.", Buckets: durationBuckets,
		}, []string{"door"}),
		signDuration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "signet_sign_duration_seconds", Help: "Time of one signature by an issuer's key.", Buckets: durationBuckets,
		}, []string{"backend"}),
		signErrors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_sign_errors_total", Help: "Signatures that an issuer's key refused or got wrong.",
		}, []string{"backend"}),
	}
	for _, i := range issuers.Snapshot().All() {
		doors := []string{"agent"}
		if i.hierarchy == identity.ControlPlane {
			doors = []string{"agent", "enrol", "self"}
		}
		for _, door := range doors {
			m.issued.WithLabelValues(i.name, door)
			m.issueDuration.WithLabelValues(door)
		}
		m.signDuration.WithLabelValues(i.key.Ref().Backend)
		m.signErrors.WithLabelValues(i.key.Ref().Backend)
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.issued, m.loggedNotReleased, m.issueDuration, m.signDuration, m.signErrors, issuerCollector{issuers}} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of issuing: %w", err)
		}
	}
	return m, nil
}

// observe takes the time of a call. A call comes through one door.
func (m *metrics) observe(drafts []draft, took time.Duration) {
	for n := range drafts {
		if drafts[n].issuer != nil {
			m.issueDuration.WithLabelValues(drafts[n].terms.Evidence.Door).Observe(took.Seconds())
			return
		}
	}
}

// issuerCollector shows the issuers as they are when it is asked.
type issuerCollector struct{ issuers *Issuers }

var (
	descInfo = prometheus.NewDesc("signet_ca_info", "Issuers; always 1.",
		[]string{"issuer", "kind", "state", "backend", "alg"}, nil)
	descNotBefore = prometheus.NewDesc("signet_ca_not_before_timestamp_seconds", "When the issuer's chain, its root included, becomes valid.",
		[]string{"issuer", "kind", "state"}, nil)
	descNotAfter = prometheus.NewDesc("signet_ca_not_after_timestamp_seconds", "When the issuer's chain, its root included, ceases to be valid.",
		[]string{"issuer", "kind", "state"}, nil)
)

func (c issuerCollector) Describe(out chan<- *prometheus.Desc) {
	out <- descInfo
	out <- descNotBefore
	out <- descNotAfter
}

func (c issuerCollector) Collect(out chan<- prometheus.Metric) {
	for _, i := range c.issuers.Snapshot().All() {
		kind := "intermediate"
		if i.hierarchy == identity.ControlPlane {
			kind = "control"
		}
		gauge := func(d *prometheus.Desc, v float64, more ...string) {
			out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, append([]string{i.name, kind, string(i.state)}, more...)...)
		}
		gauge(descInfo, 1, i.key.Ref().Backend, string(keystore.AlgorithmOf(i.key.Public())))
		gauge(descNotBefore, float64(i.notBefore.at.Unix()))
		gauge(descNotAfter, float64(i.notAfter.at.Unix()))
	}
}
