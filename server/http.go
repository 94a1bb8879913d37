package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/signet-ca/signet/identity"
)

// httpServer answers probes and scrapes. Nothing can be changed through it.
func (s *Server) httpServer() *http.Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.config.Metrics, promhttp.HandlerOpts{Timeout: 10 * time.Second, MaxRequestsInFlight: 4}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", s.readyz)
	return &http.Server{
		Handler: mux, ReadHeaderTimeout: handshakeTimeout, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: maxHeaderBytes, ErrorLog: nil,
	}
}

// check is one line of readyz. One that is degraded shows but does not make the server unready.
type check struct {
	name     string
	err      error
	degraded bool
}

// checks tell whether the server can sign and log. A store that stalls stops enrolment and changes, but what agents ask
// for most is decided from memory, so it alone must not take the server away from them.
func (s *Server) checks(ctx context.Context) []check {
	all := []check{
		{name: "store", err: s.storeUp(ctx), degraded: true},
		{name: "log", err: s.audit.Usable()},
	}
	for _, h := range []identity.Hierarchy{identity.Mesh, identity.ControlPlane} {
		issuer, ok := s.issuers.Snapshot().Active(h)
		c := check{name: "issuer-" + h.String()}
		if !ok {
			c.err = errors.New("none is active")
		} else {
			c.err = issuer.Usable(s.now())
		}
		all = append(all, c)
	}
	all = append(all, check{name: "certificate", err: s.own.usable()})
	doors := check{name: "doors"}
	for _, d := range s.doors {
		if !d.serving.Load() {
			doors.err = errors.Join(doors.err, fmt.Errorf("the %s door is closed", d.door.name))
		}
	}
	select {
	case <-s.stopping:
		doors.err = errors.New("the server is stopping")
	default:
	}
	return append(all, doors)
}

func (s *Server) storeUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, _, err := s.store.Meta(ctx, clusterFact)
	return err
}

// readyz answers in the form of Kubernetes' own: each check by name with ?verbose, or when one fails.
func (s *Server) readyz(w http.ResponseWriter, r *http.Request) {
	var text strings.Builder
	ready := true
	for _, c := range s.checks(r.Context()) {
		switch {
		case c.err == nil:
			fmt.Fprintf(&text, "[+]%s ok\n", c.name)
		case c.degraded:
			fmt.Fprintf(&text, "[!]%s degraded: %s\n", c.name, clip(c.err.Error()))
		default:
			ready = false
			fmt.Fprintf(&text, "[-]%s failed: %s\n", c.name, clip(c.err.Error()))
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
