// Package health is the HTTP door of a process: /metrics for Prometheus, /livez and /readyz for whoever keeps it running.
// Nothing can be changed through it, and no workload is named in what it shows.
package health

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	// scrapes at once, and how long each may take.
	scrapes       = 4
	scrapeTimeout = 10 * time.Second
	maxHeader     = 16 << 10
	// maxReason bounds what a failed check may say, in bytes.
	maxReason = 512
)

// Check is one line of /readyz.
type Check struct {
	Name string
	// Err is nil when all is well.
	Err error
	// Degraded: an error shows, but doesn't make the process unready.
	Degraded bool
}

// Config of the door.
type Config struct {
	// Checks are asked at every /readyz; the order is kept.
	Checks  func(context.Context) []Check
	Metrics prometheus.Gatherer
	Logger  *slog.Logger
}

// NewServer makes the server; its limits stand before anything is parsed.
func NewServer(c Config) *http.Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(c.Metrics, promhttp.HandlerOpts{Timeout: scrapeTimeout, MaxRequestsInFlight: scrapes}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { readyz(w, r, c.Checks(r.Context())) })
	return &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(c.Logger.Handler(), slog.LevelWarn),
	}
}

// readyz answers in the form of Kubernetes' own: each check by name with ?verbose, or when one fails.
func readyz(w http.ResponseWriter, r *http.Request, checks []Check) {
	var text strings.Builder
	ready := true
	for _, c := range checks {
		switch {
		case c.Err == nil:
			fmt.Fprintf(&text, "[+]%s ok\n", c.Name)
		case c.Degraded:
			fmt.Fprintf(&text, "[!]%s degraded: %.*s\n", c.Name, maxReason, c.Err.Error())
		default:
			ready = false
			fmt.Fprintf(&text, "[-]%s failed: %.*s\n", c.Name, maxReason, c.Err.Error())
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, verbose := r.URL.Query()["verbose"]
	switch {
	case !ready:
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintf(w, "%sreadyz check failed\n", text.String())
	case verbose:
		fmt.Fprintf(w, "%sreadyz check passed\n", text.String())
	default:
		fmt.Fprintln(w, "ok")
	}
}
