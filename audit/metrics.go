package audit

import (
	"errors"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of one open log. They exist, unregistered, where nobody asked for them.
type metrics struct {
	size, pending, checkpointTime, selfCheckTime prometheus.Gauge
	duration                                     prometheus.Histogram
	errors, inconsistencies                      prometheus.Counter
	disk                                         prometheus.GaugeFunc

	registered prometheus.Registerer
}

func newMetrics(dir string, r prometheus.Registerer) (*metrics, error) {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		size:           gauge("signet_log_size_entries", "Entries that are durable in the audit log."),
		pending:        gauge("signet_log_pending_entries", "Entries that wait to be durable."),
		checkpointTime: gauge("signet_log_checkpoint_timestamp_seconds", "When the newest checkpoint was published."),
		selfCheckTime:  gauge("signet_log_self_check_timestamp_seconds", "When the newest entries were last re-read from disk, re-hashed and found right."),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "signet_log_append_duration_seconds",
			Help:    "Time from Append to durable, per call.",
			Buckets: []float64{.001, .0025, .005, .01, .015, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}),
		errors:          counter("signet_log_append_errors_total", "Calls to Append that failed."),
		inconsistencies: counter("signet_log_inconsistencies_total", "Times the log contradicted what was signed before."),
		disk: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "signet_log_disk_available_bytes", Help: "Bytes free for the log on its file system.",
		}, func() float64 {
			var s syscall.Statfs_t
			if syscall.Statfs(dir, &s) != nil {
				return 0
			}
			return float64(s.Bavail) * float64(s.Bsize)
		}),
	}
	if r == nil {
		return m, nil
	}
	m.registered = r
	var errs []error
	for _, c := range m.all() {
		errs = append(errs, r.Register(c))
	}
	if err := errors.Join(errs...); err != nil {
		m.unregister()
		return nil, err
	}
	return m, nil
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.size, m.pending, m.checkpointTime, m.selfCheckTime, m.duration, m.errors, m.inconsistencies, m.disk}
}

func (m *metrics) unregister() {
	if m.registered == nil {
		return
	}
	for _, c := range m.all() {
		m.registered.Unregister(c)
	}
}
