package agent

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// httpServer answers probes and scrapes. Nothing can be changed through it, and it shows no identity.
func (a *Agent) httpServer() *http.Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.config.Metrics, promhttp.HandlerOpts{Timeout: 10 * time.Second, MaxRequestsInFlight: 4}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", a.readyz)
	return &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
}

// check is one line of readyz. One that is degraded shows, but does not make the agent unready.
type check struct {
	name     string
	err      error
	degraded bool
}

// checks tell whether workloads get what they need here. An agent whose server is away stays ready while it holds what
// it needs: taking its workloads out of service would make an outage out of a disturbance.
func (a *Agent) checks() []check {
	m := a.member.Load()
	enrolled := check{name: "enrolment"}
	if m == nil {
		enrolled.err = errors.New("not enrolled yet")
	}
	bundle := check{name: "bundle"}
	if m != nil {
		if _, ok := a.bundles.Get(m.td); !ok {
			bundle.err = errors.New("no trust bundle has come from the server yet")
		}
	} else {
		bundle.err = errors.New("not enrolled yet")
	}
	l := a.hub.life()
	identities := check{name: "identities"}
	if !a.synced.Load() && l.valid == 0 {
		identities.err = errors.New("the server has not been heard since this start, and no certificate is held")
	} else if l.expired+l.pending > 0 {
		identities.err = fmt.Errorf("%d of %d wanted certificates are missing or expired", l.expired+l.pending, l.valid+l.expired+l.pending)
		identities.degraded = true
	}
	server := check{name: "server", degraded: true}
	if !a.connected.Load() {
		server.err = errors.New("the server is away")
	}
	control := check{name: "control-certificate", degraded: true}
	if m != nil {
		control.err = checkTimes(m.leaf, a.now())
	}
	log := check{name: "audit-log", degraded: true}
	if a.inconsistent.Load() {
		log.err = errors.New("the server's audit log contradicts what this agent has seen: see the log and the evidence in the state folder")
	}
	doors := check{name: "sockets"}
	if !a.serving.Load() {
		doors.err = errors.New("not open, or being closed")
	}
	return []check{enrolled, bundle, identities, server, control, log, doors}
}

// readyz answers in the form of Kubernetes' own: each check by name with ?verbose, or when one fails.
func (a *Agent) readyz(w http.ResponseWriter, r *http.Request) {
	var text strings.Builder
	ready := true
	for _, c := range a.checks() {
		switch {
		case c.err == nil:
			fmt.Fprintf(&text, "[+]%s ok\n", c.name)
		case c.degraded:
			fmt.Fprintf(&text, "[!]%s degraded: %s\n", c.name, clip(c.err.Error(), 512))
		default:
			ready = false
			fmt.Fprintf(&text, "[-]%s failed: %s\n", c.name, clip(c.err.Error(), 512))
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
