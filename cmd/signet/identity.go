package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
)

func (c *cli) identityCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "identity",
		Short: "Ban identities",
		Long: `A banned SPIFFE ID is issued to nobody, whatever the registrations say, and agents take it away from those that have it.
These commands talk to the running server over its admin socket.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(c.identityListCommand(), c.identityBanCommand(), c.identityUnbanCommand())
	return cmd
}

func (c *cli) identityBanCommand() *cobra.Command {
	var file, reason string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "ban --config FILE SPIFFE-ID --reason TEXT",
		Short: "Issue an identity to nobody any more",
		Long: `Issues the SPIFFE ID to nobody any more, from here on and until it is unbanned. Agents take it away from their workloads
and purge it from their caches. A certificate that a workload has copied is good until it expires; until when that can be
is said. Banning it again changes nothing. The name of a node is refused: for that there is signet agent ban.`,
		Example: `  signet identity ban --config east.yaml spiffe://example.org/ns/shop/sa/frontend --reason "was broken into"
  signet identity ban --config east.yaml spiffe://example.org/ns/shop/sa/frontend --reason "was broken into" --dry-run`,
		Args: cobra.ExactArgs(1),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return c.completed(cmd, func(ctx context.Context, a adminv1.AdminClient) ([]string, error) {
				r, err := a.ListRegistrations(ctx, &adminv1.ListRegistrationsRequest{})
				var ids []string
				for _, m := range r.GetRegistrations() {
					ids = append(ids, m.SpiffeId+"\t"+m.Name)
				}
				return ids, err
			})
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				answer, err := r.BanIdentity(ctx, &adminv1.BanIdentityRequest{SpiffeId: args[0], Reason: reason, DryRun: dryRun})
				switch {
				case err != nil:
					return err
				case !answer.Changed:
					fmt.Fprintf(c.err, "%s was banned already\n", args[0])
					return nil
				case dryRun:
					fmt.Fprintf(c.err, "%s would be banned; this was a dry run: nothing is changed\n", args[0])
				default:
					fmt.Fprintf(c.err, "%s is banned\n", args[0])
				}
				registrations := "none gives it"
				if len(answer.Registrations) > 0 {
					registrations = strings.Join(answer.Registrations, ", ")
				}
				good := "there is none"
				if t := timeOf(answer.ValidUntil); t != nil {
					good = "good until " + clock(*t) + " at the latest, where they were copied"
				}
				return facts{{"registrations", registrations}, {"certificates", good}}.print(c.err)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&reason, "reason", "", "what happened, for the audit log")
	_ = cmd.MarkFlagRequired("reason")
	dryRunFlag(cmd, &dryRun)
	return cmd
}

func (c *cli) identityUnbanCommand() *cobra.Command {
	var file string
	var dryRun bool
	cmd := &cobra.Command{
		Use:     "unban --config FILE SPIFFE-ID",
		Short:   "Issue a banned identity again",
		Long:    "Issues a banned SPIFFE ID again to those that the registrations name. Unbanning it again changes nothing.",
		Example: `  signet identity unban --config east.yaml spiffe://example.org/ns/shop/sa/frontend`,
		Args:    cobra.ExactArgs(1),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			path, err := cmd.Flags().GetString("config")
			if err != nil || path == "" || len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
			defer cancel()
			var ids []string
			_ = c.rotation(ctx, path, func(ctx context.Context, r adminv1.RotationClient) error {
				answer, err := r.ListBannedIdentities(ctx, &adminv1.ListBannedIdentitiesRequest{})
				for _, i := range answer.GetIdentities() {
					ids = append(ids, i.SpiffeId+"\t"+i.Reason)
				}
				return err
			})
			return ids, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				answer, err := r.UnbanIdentity(ctx, &adminv1.UnbanIdentityRequest{SpiffeId: args[0], DryRun: dryRun})
				switch {
				case err != nil:
					return err
				case !answer.Changed:
					fmt.Fprintf(c.err, "%s was not banned\n", args[0])
				case dryRun:
					fmt.Fprintf(c.err, "%s would not be banned any more; this was a dry run: nothing is changed\n", args[0])
				default:
					fmt.Fprintf(c.err, "%s is not banned any more\n", args[0])
				}
				return nil
			})
		},
	}
	serverConfigFlag(cmd, &file)
	dryRunFlag(cmd, &dryRun)
	return cmd
}

// bannedShown is a banned identity.
type bannedShown struct {
	SPIFFEID string    `json:"spiffe_id"`
	Since    time.Time `json:"since"`
	Reason   string    `json:"reason"`
}

type bannedList []bannedShown

func (bannedList) columns() []string { return []string{"SPIFFE ID", "BANNED", "REASON", "+SINCE"} }

func (l bannedList) rows() [][]string {
	var rows [][]string
	for _, b := range l {
		rows = append(rows, []string{b.SPIFFEID, moment(b.Since, time.Now()), b.Reason, clock(b.Since)})
	}
	return rows
}

func (l bannedList) names() []string {
	var names []string
	for _, b := range l {
		names = append(names, "identity/"+b.SPIFFEID)
	}
	return names
}

func (c *cli) identityListCommand() *cobra.Command {
	var file, format string
	cmd := &cobra.Command{
		Use:   "list --config FILE",
		Short: "List the banned identities",
		Long:  "Lists the identities that are banned, with when and why. What is not banned stands in signet registration list.",
		Example: `  signet identity list --config east.yaml
  signet identity list --config east.yaml -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				answer, err := r.ListBannedIdentities(ctx, &adminv1.ListBannedIdentitiesRequest{})
				if err != nil {
					return err
				}
				list := bannedList{}
				for _, i := range answer.Identities {
					list = append(list, bannedShown{SPIFFEID: i.SpiffeId, Since: i.Since.AsTime(), Reason: printableText(i.Reason)})
				}
				return c.show(format, list)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	outputFlag(cmd, &format)
	return cmd
}
