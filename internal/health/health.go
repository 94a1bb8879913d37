// Package health is the HTTP door of a process: /metrics for Prometheus, /livez and /readyz for whoever keeps it running.
// Nothing can be changed through it, and no workload is named in what it shows.
package health

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/signet-ca/signet/check"
)

const (
	// scrapes at once, and how long each may take.
	scrapes       = 4
	scrapeTimeout = 10 * time.Second
	maxHeader     = 16 << 10
	// maxReason bounds what a failed check may say, in bytes.
	maxReason = 512
)

// Config of the door.
type Config struct {
	// Checks are what the process looks at about itself; the order is kept. Asked once.
	Checks  func() []check.Part
	Metrics prometheus.Gatherer
	Logger  *slog.Logger
}

// NewServer makes the server; its limits stand before anything is parsed.
func NewServer(c Config) *http.Server {
	watch := check.NewWatch(c.Checks()...)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(c.Metrics, promhttp.HandlerOpts{Timeout: scrapeTimeout, MaxRequestsInFlight: scrapes}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { readyz(w, r, watch.Findings(r.Context())) })
	return &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(c.Logger.Handler(), slog.LevelWarn),
	}
}

// readyz answers in the form of Kubernetes' own: each finding by what it is about, with ?verbose or when one blocks. Whoever
// accepts application/json gets them all as they are.
func readyz(w http.ResponseWriter, r *http.Request, found check.Findings) {
	ready := found.Ready()
	status := http.StatusOK
	if !ready {
		status = http.StatusServiceUnavailable
	}
	for i := range found {
		found[i].Message = fmt.Sprintf("%.*s", maxReason, strings.Join(strings.Fields(found[i].Message), " "))
	}
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	if strings.Contains(r.Header.Get("Accept"), "application/json") {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(struct { // nobody to tell
			Ready    bool           `json:"ready"`
			Findings check.Findings `json:"findings"`
		}{ready, found})
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	_, verbose := r.URL.Query()["verbose"]
	switch {
	case !ready:
		fmt.Fprintf(w, "%sreadyz check failed\n", lines(found))
	case verbose:
		fmt.Fprintf(w, "%sreadyz check passed\n", lines(found))
	default:
		fmt.Fprintln(w, "ok")
	}
}

// lines are [-] for what makes the process unready, [!] for what is wrong or will be, [?] for what could not be told.
func lines(found check.Findings) string {
	var text strings.Builder
	for _, f := range found {
		sign, state := "[+]", "ok"
		switch {
		case f.Blocks():
			sign, state = "[-]", "failed"
		case f.Level == check.Error:
			sign, state = "[!]", "degraded"
		case f.Level == check.Warning:
			sign, state = "[!]", "warning"
		case f.Level == check.Unknown:
			sign, state = "[?]", "unknown"
		}
		fmt.Fprintf(&text, "%s%s %s", sign, f.About, state)
		if f.Level != check.OK {
			fmt.Fprintf(&text, ": %s: %s", f.Code, f.Message)
			if len(f.Stops) > 0 {
				fmt.Fprintf(&text, " (stopped: %s)", strings.Join(f.Stops, ", "))
			}
		}
		text.WriteByte('\n')
	}
	return text.String()
}
