package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/server"
)

func (c *cli) serveCommand() *cobra.Command {
	var file string
	var clockIsRight bool
	var dev devFlags
	cmd := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Run a cluster's server",
		Long: `Runs the server of a cluster that was made by cluster init and cluster install. It says on stderr when it is ready
(and tells systemd), and stops in order on SIGTERM or SIGINT.

With --dev it is the five-minute start: one process with a root, an intermediate, a server and an agent, on loopback and
Unix sockets only, in a folder of its own. It gives your own user an identity that lives two minutes, so that you can see
it renewed. Nothing that it makes is for anything else.`,
		Example: `  signet serve --config east.yaml
  signet serve --dev`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case dev.on && file != "":
				return fmt.Errorf("--dev and --config can't be used together: --dev makes everything it needs itself")
			case dev.on:
				return c.serveDev(cmd.Context(), dev)
			case file == "":
				return fmt.Errorf("name the configuration with --config FILE, or try it out with --dev")
			}
			return c.serve(cmd.Context(), file, clockIsRight)
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "the server's configuration file")
	cmd.Flags().BoolVar(&clockIsRight, "clock-is-right", false, "start although the audit log has an entry of a later time: the clock was wrong then, and is right now")
	_ = cmd.MarkFlagFilename("config", "yaml", "yml")
	dev.add(cmd)
	return cmd
}

func (c *cli) serve(ctx context.Context, file string, clockIsRight bool) error {
	cfg, err := config.LoadServer(file)
	if err != nil {
		return err
	}
	if err := harden(); err != nil {
		return err
	}
	collectLess(serverGarbage)
	logger := c.logger(cfg.Logging)
	b, err := openBacking(ctx, cfg, logger)
	if err != nil {
		return err
	}
	defer b.Close()
	running, stop := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer stop()
	work.Go(func() { b.run(running) })
	s, err := b.begin(ctx, cfg, func(opening func()) (*server.Server, error) {
		full := serverConfig(cfg, folderOf(cfg, b.keys, logger))
		full.ClockIsRight, full.Opening = clockIsRight, opening
		b.supply(&full, cfg)
		return server.New(ctx, full)
	})
	if err != nil {
		return err
	}
	doors := s.Doors()
	c.announce(cfg.Logging, fmt.Sprintf("ready: cluster %s of %s: enrol %s, agents %s, http %s, admin %s",
		cfg.Cluster, cfg.TrustDomain.Name(), doors.Enrol, doors.Agents, doors.HTTP, doors.Admin))
	notify(logger, daemon.SdNotifyReady)
	stopping := context.AfterFunc(ctx, func() { notify(logger, daemon.SdNotifyStopping) })
	defer stopping()
	return s.Run(ctx)
}

// serverConfig is a server as its configuration describes it.
func serverConfig(cfg *config.Server, folder server.Folder) server.Config {
	return server.Config{
		Folder: folder,
		Enrol:  cfg.Listen.Enrol, Agents: cfg.Listen.Agents, HTTP: cfg.Listen.HTTP,
		AdvertiseEnrol: cfg.Listen.AdvertiseEnrol, AdvertiseAgents: cfg.Listen.AdvertiseAgents,
		AdminSocket: cfg.AdminSocket,
		TTL:         cfg.Leaf.TTL, MaxTTL: cfg.Leaf.MaxTTL, ControlTTL: cfg.Control.TTL,
		MinUsefulLife: cfg.Leaf.MinUsefulLife, Backdate: cfg.Leaf.Backdate,
		Rotation: rotationOf(cfg), Algorithm: cfg.Keystore.Algorithm, Requests: atHand{},
		Limits:  server.Limits{CertificatesPerSecond: float64(cfg.Limits.CertificatesPerSecond), Burst: cfg.Limits.Burst},
		Metrics: newRegistry(),
	}
}

// rotationOf is how a cluster's CAs are rotated as its configuration says.
func rotationOf(cfg *config.Server) server.Rotation {
	r := cfg.Rotation
	all := server.Rotation{
		Policy: rotation.Policy{
			LongestLeaf: cfg.Leaf.MaxTTL, Skew: r.Skew, Delay: r.Delay, Quorum: float64(r.Quorum) / 100,
			PrepareAt: r.PrepareAt, SwitchAt: r.SwitchAt, ReportLife: r.ReportLife,
		},
		Automatic: r.Automatic, ReissueRate: float64(r.ReissueRate),
	}
	for _, p := range r.Peers {
		all.Peers = append(all.Peers, server.Peer{Cluster: p.Cluster, VerifierKey: p.LogVerifierKey})
	}
	return all
}

// announce is a line of the operational log, in its form, that is written at every level.
func (c *cli) announce(l config.Logging, text string) {
	l.Level = slog.LevelInfo.String()
	c.logger(l).Info(text)
}

// warnings is the logger of a command that works on a folder: what it has done it says by itself.
func (c *cli) warnings(l config.Logging) *slog.Logger {
	if l.Level != "error" {
		l.Level = "warn"
	}
	return c.logger(l)
}

// logger is the operational log, on stderr.
func (c *cli) logger(l config.Logging) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(l.Level)) // checked by package config; zero is info
	options := &slog.HandlerOptions{Level: level}
	f, isFile := c.err.(*os.File)
	if l.Format == "text" || l.Format != "json" && isFile && term.IsTerminal(int(f.Fd())) {
		return slog.New(slog.NewTextHandler(c.err, options))
	}
	return slog.New(slog.NewJSONHandler(c.err, options))
}
