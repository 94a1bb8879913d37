package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/sds"
)

func (c *cli) agentCommand() *cobra.Command {
	var file, tokenFile string
	cmd := &cobra.Command{
		Use:   "agent --config FILE",
		Short: "Run a node's agent",
		Long: `Runs the agent of a node: it attests the processes that connect to its Unix sockets, and gives each the identities
that registrations grant it, by SDS, renewed ahead of expiry.

The first start needs a join token, made by "signet join-token create". It is read once: afterwards the agent is known by
its own key. Exit status 1 means that the server refuses the token. The agent stops in order on SIGTERM or SIGINT.

status shows what a running agent has and does. The other commands are for the admin of the agents' server.`,
		Example: `  signet agent --config node-1.yaml
  signet agent --config node-1.yaml --join-token-file node-1.token
  signet agent status --config node-1.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.agent(cmd.Context(), file, tokenFile)
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "the agent's configuration file")
	cmd.Flags().StringVar(&tokenFile, "join-token-file", "", "file with the join token, in place of join_token_file; read only while the agent is not enrolled")
	_ = cmd.MarkFlagRequired("config")
	_ = cmd.MarkFlagFilename("config", "yaml", "yml")
	_ = cmd.MarkFlagFilename("join-token-file")
	cmd.AddCommand(c.agentStatusCommand())
	cmd.AddCommand(c.agentAdminCommands()...)
	return cmd
}

func (c *cli) agent(ctx context.Context, file, tokenFile string) error {
	cfg, err := config.LoadAgent(file)
	if err != nil {
		return err
	}
	if tokenFile != "" {
		if cfg.JoinTokenFile, err = filepath.Abs(tokenFile); err != nil {
			return fmt.Errorf("join token file %s: %w", tokenFile, err)
		}
	}
	if err := harden(); err != nil {
		return err
	}
	collectLess(agentGarbage)
	logger := c.logger(cfg.Logging)
	ac := agent.Config{
		StateDir: cfg.StateDir, Socket: cfg.Socket, HTTP: cfg.HTTP,
		Validator: sds.Validator(cfg.SDS.Validator), Metrics: newRegistry(), Logger: logger,
	}
	for _, s := range cfg.Sockets {
		ac.Sockets = append(ac.Sockets, agent.Socket{Name: s.Name, Path: s.Path})
	}
	if cfg.JoinTokenFile != "" {
		ac.JoinToken = agent.JoinTokenFile(cfg.JoinTokenFile)
	}
	// Without a source in the file the agent makes a local secret, and says so.
	if p, local := cfg.Passphrase(); !local {
		ac.Seal = p
	}
	a, err := agent.New(ctx, ac)
	if err != nil {
		return err
	}
	go func() {
		if awaitReady(ctx, a, logger) {
			c.announce(cfg.Logging, fmt.Sprintf("serving: socket %s, http %s", cfg.Socket, cfg.HTTP))
			notify(logger, daemon.SdNotifyReady)
		}
	}()
	stopping := context.AfterFunc(ctx, func() { notify(logger, daemon.SdNotifyStopping) })
	defer stopping()
	if err = a.Run(ctx); errors.Is(err, agent.ErrRefused) {
		return no("%w", err)
	}
	return err
}

// awaitReady waits until the agent serves and is enrolled: a unit whose join token is refused must show as one that failed
// to start. While the server is away systemd is asked for patience.
func awaitReady(ctx context.Context, a *agent.Agent, logger *slog.Logger) bool {
	const patience = 2 * time.Minute
	select {
	case <-a.Serving():
	case <-ctx.Done():
		return false
	}
	for {
		select {
		case <-a.Enrolled():
			return true
		default:
		}
		notify(logger, fmt.Sprintf("STATUS=enrolling\nEXTEND_TIMEOUT_USEC=%d", patience.Microseconds()))
		select {
		case <-a.Enrolled():
			return true
		case <-time.After(patience / 2):
		case <-ctx.Done():
			return false
		}
	}
}
