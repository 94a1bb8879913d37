package vault

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
}

var (
	operations = []string{opRead, opWrite, opList, opLogin, opRenew, opHealth}
	results    = []string{"ok", "not_found", "denied", "refused", "conflict", "away", "canceled", "error"}
)

func newMetrics(r prometheus.Registerer, c *Client) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_vault_requests_total", Help: "Calls to Vault, by operation and what came of them; away: not reachable, sealed, overloaded, too slow, or left alone after failures.",
		}, []string{"op", "result"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "signet_vault_request_duration_seconds", Help: "Time of one call to Vault, with its retries and a login if it needed one.",
			// From 0.5 ms, a Vault next door, to more than the longest timeout.
			Buckets: prometheus.ExponentialBuckets(500e-6, 2.5, 13),
		}, []string{"op"}),
	}
	for _, op := range operations {
		m.duration.WithLabelValues(op)
		for _, result := range results {
			m.requests.WithLabelValues(op, result)
		}
	}
	if r == nil {
		return m, nil
	}
	up := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "signet_vault_up", Help: "1 if the last call that reached a verdict found Vault at work, and there is a token or no login was refused."}, func() float64 {
		st := c.Status()
		if h := c.breaker.health(); !h.heard || h.row > 0 || st.Refused && !st.LoggedIn {
			return 0
		}
		return 1
	})
	expiry := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "signet_vault_token_expiry_timestamp_seconds", Help: "When the token in use ends unless it is renewed; 0 without a token or for one without end."}, func() float64 {
		if until := c.Status().TokenUntil; !until.IsZero() {
			return float64(until.UnixMilli()) / 1000
		}
		return 0
	})
	for _, collector := range []prometheus.Collector{m.requests, m.duration, up, expiry, engineCollector{c}} {
		if err := r.Register(collector); err != nil {
			return nil, fmt.Errorf("register the metrics of the connection to Vault: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) observe(op string, err error, took time.Duration) {
	m.requests.WithLabelValues(op, resultOf(err)).Inc()
	m.duration.WithLabelValues(op).Observe(took.Seconds())
}

func resultOf(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, ErrNotFound):
		return "not_found"
	case errors.Is(err, ErrDenied):
		return "denied"
	case errors.Is(err, ErrConflict):
		return "conflict"
	case errors.Is(err, ErrRefused):
		return "refused"
	case errors.Is(err, ErrAway):
		return "away"
	case errors.Is(err, context.Canceled):
		return "canceled"
	}
	return "error"
}
