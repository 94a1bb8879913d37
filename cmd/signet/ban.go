package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
)

// agentAdminCommands are what an admin does about agents, at the server. They stand beside what runs an agent.
func (c *cli) agentAdminCommands() []*cobra.Command {
	return []*cobra.Command{c.agentListCommand(), c.agentBanCommand(), c.agentUnbanCommand()}
}

func (c *cli) agentBanCommand() *cobra.Command {
	var file string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "ban --config FILE NAME",
		Short: "Refuse an agent at every door",
		Long: `Refuses an agent at every door of the cluster's server, from here on and on connections that are open, until it is
unbanned. Certificates that it has got already are good until they expire: signet log find --agent NAME lists them.
Banning it again changes nothing.

The ban holds at once, also when the database can't be written; the exit status is 1 if it is not stored yet.`,
		Example: `  signet agent ban --config east.yaml node-1
  signet agent ban --config east.yaml node-1 --dry-run`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeAgents(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.admin(cmd.Context(), file, func(ctx context.Context, a adminv1.AdminClient) error {
				r, err := a.BanAgent(ctx, &adminv1.BanAgentRequest{Agent: args[0], DryRun: dryRun})
				switch {
				case err != nil:
					return err
				case r.NotStored != "":
					return no("agent %s is banned, but a restart of the server would forget it until it is stored, which the server goes on trying: %s", args[0], r.NotStored)
				case r.Changed && dryRun:
					fmt.Fprintf(c.err, "agent %s would be banned; this was a dry run: nothing is changed\n", args[0])
				case r.Changed:
					fmt.Fprintf(c.err, "agent %s is banned\n", args[0])
				default:
					fmt.Fprintf(c.err, "agent %s was banned already\n", args[0])
				}
				return nil
			})
		},
	}
	serverConfigFlag(cmd, &file)
	dryRunFlag(cmd, &dryRun)
	return cmd
}

func (c *cli) agentUnbanCommand() *cobra.Command {
	var file string
	var dryRun bool
	cmd := &cobra.Command{
		Use:               "unban --config FILE NAME",
		Short:             "Let a banned agent in again",
		Long:              "Lets a banned agent in again, with the key that it enrolled with. Unbanning it again changes nothing.",
		Example:           `  signet agent unban --config east.yaml node-1`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeAgents(true),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.admin(cmd.Context(), file, func(ctx context.Context, a adminv1.AdminClient) error {
				r, err := a.UnbanAgent(ctx, &adminv1.UnbanAgentRequest{Agent: args[0], DryRun: dryRun})
				switch {
				case err != nil:
					return err
				case r.Changed && dryRun:
					fmt.Fprintf(c.err, "agent %s would not be banned any more; this was a dry run: nothing is changed\n", args[0])
				case r.Changed:
					fmt.Fprintf(c.err, "agent %s is not banned any more\n", args[0])
				default:
					fmt.Fprintf(c.err, "agent %s was not banned\n", args[0])
				}
				return nil
			})
		},
	}
	serverConfigFlag(cmd, &file)
	dryRunFlag(cmd, &dryRun)
	return cmd
}

// completeAgents completes the name of an agent that is banned, or is not.
func (c *cli) completeAgents(banned bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return c.completed(cmd, func(ctx context.Context, a adminv1.AdminClient) ([]string, error) {
			r, err := a.ListAgents(ctx, &adminv1.ListAgentsRequest{})
			var names []string
			for _, i := range r.GetAgents() {
				if i.Banned == banned {
					names = append(names, i.Name)
				}
			}
			return names, err
		})
	}
}

// agentShown is an enrolled agent.
type agentShown struct {
	Name        string     `json:"name"`
	Banned      bool       `json:"banned"`
	Connections uint32     `json:"connections"`
	Enrolled    time.Time  `json:"enrolled"`
	LastSeen    *time.Time `json:"last_seen,omitempty"`
	// Key is the fingerprint of the enrolled key.
	Key string `json:"key_fingerprint"`
}

type agentList []agentShown

func (agentList) columns() []string {
	return []string{"NAME", "STATE", "STREAMS", "ENROLLED", "LAST CERTIFICATE", "+KEY FINGERPRINT"}
}

func (l agentList) rows() [][]string {
	now := time.Now()
	var rows [][]string
	for _, a := range l {
		state, seen := "enrolled", ""
		if a.Banned {
			state = "banned"
		}
		if a.LastSeen != nil {
			seen = since(*a.LastSeen, now)
		}
		rows = append(rows, []string{a.Name, state, strconv.FormatUint(uint64(a.Connections), 10), since(a.Enrolled, now), seen, a.Key})
	}
	return rows
}

func (l agentList) names() []string {
	var names []string
	for _, a := range l {
		names = append(names, "agent/"+a.Name)
	}
	return names
}

func (c *cli) agentListCommand() *cobra.Command {
	var file, format string
	cmd := &cobra.Command{
		Use:   "list --config FILE",
		Short: "List the enrolled agents",
		Long:  "Lists the agents that are enrolled with a cluster's server, by name, banned ones too.",
		Example: `  signet agent list --config east.yaml
  signet agent list --config east.yaml -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.admin(cmd.Context(), file, func(ctx context.Context, a adminv1.AdminClient) error {
				r, err := a.ListAgents(ctx, &adminv1.ListAgentsRequest{})
				if err != nil {
					return err
				}
				list := agentList{}
				for _, i := range r.Agents {
					shown := agentShown{
						Name: i.Name, Banned: i.Banned, Connections: i.Connections, Enrolled: i.Enrolled.AsTime(), Key: i.KeyFingerprint,
					}
					if i.LastSeen != nil {
						seen := i.LastSeen.AsTime()
						shown.LastSeen = &seen
					}
					list = append(list, shown)
				}
				return c.show(format, list)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	outputFlag(cmd, &format)
	return cmd
}
