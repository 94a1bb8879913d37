package main

import (
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sys/unix"
)

// What every long-lived signet process does about itself, server and agent alike.

// By how many percent of what is live the heap grows before it is collected. A server holds little and allocates fast, and a
// third of the collector's work is a better use of a few megabytes. An agent holds more, for each sidecar, and shares its
// machine with what the machine is there for.
const (
	serverGarbage = 400
	agentGarbage  = 200
)

// collectLess sets that; GOGC in the environment wins.
func collectLess(percent int) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(percent)
	}
}

// newRegistry holds what is known of any process; its parts add their own.
func newRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "signet_build_info", Help: "The running binary; always 1.",
		ConstLabels: prometheus.Labels{"version": version, "go": runtime.Version()},
	})
	build.Set(1)
	r.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// notify tells systemd, if it is there.
func notify(logger *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		logger.Warn("could not notify systemd", "state", state, "err", err)
	}
}

// harden keeps a process that holds keys to itself: no core dumps, no reading of its memory by others of the same user.
func harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switch core dumps off: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("make the process undumpable: %w", err)
	}
	return nil
}
