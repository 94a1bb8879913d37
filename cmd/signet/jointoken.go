package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/durable"
)

func (c *cli) joinTokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "join-token",
		Short: "Let new agents in",
		Long: `A join token lets one agent of one name enrol, once. It is one string that carries the address, the secret and the
fingerprint of the control CA. These commands talk to the running server over its admin socket.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(c.joinTokenCreateCommand(), c.joinTokenListCommand(), c.joinTokenRevokeCommand())
	return cmd
}

func (c *cli) joinTokenCreateCommand() *cobra.Command {
	var file, agent, out string
	var ttl time.Duration
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "create --config FILE --agent NAME",
		Short: "Make a join token",
		Long: `Makes a join token and writes it to a file that only you can read, or alone to stdout; what is to be known about it goes
to stderr. The token is a secret until it is used. If an agent spends it and gets no answer, make another.`,
		Example: `  signet join-token create --config east.yaml --agent node-1 --out node-1.token
  signet join-token create --config east.yaml --agent node-1 --ttl 1h | ssh node-1 'umask 077; cat > /etc/signet/join.token'
  signet join-token create --config east.yaml --agent node-1 --ttl 1h --dry-run`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.admin(cmd.Context(), file, func(ctx context.Context, a adminv1.AdminClient) error {
				r, err := a.CreateJoinToken(ctx, &adminv1.CreateJoinTokenRequest{Agent: agent, Ttl: durationpb.New(ttl), DryRun: dryRun})
				if err != nil {
					return err
				}
				if dryRun {
					fmt.Fprintf(c.err, "a join token for agent %s would be made, good until %s; this was a dry run: nothing is changed\n",
						r.Info.GetAgent(), clock(r.Info.GetExpires().AsTime()))
					return nil
				}
				if err := (facts{
					{"token", r.Info.GetId()},
					{"for agent", r.Info.GetAgent()},
					{"expires", clock(r.Info.GetExpires().AsTime())},
				}).print(c.err); err != nil {
					return err
				}
				if out != "" {
					return durable.WriteFile(out, []byte(r.Token+"\n"), 0o600)
				}
				_, err = fmt.Fprintln(c.out, r.Token)
				return err
			})
		},
	}
	serverConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&agent, "agent", "", "the one name that may enrol with it")
	cmd.Flags().StringVar(&out, "out", "", "write the token to this file, 0600, in place of stdout")
	cmd.Flags().DurationVar(&ttl, "ttl", identity.DefaultTokenTTL, "how long it is good for, at most 24h")
	_ = cmd.MarkFlagRequired("agent")
	dryRunFlag(cmd, &dryRun)
	return cmd
}

// tokenShown is a join token without its secret.
type tokenShown struct {
	ID      string     `json:"id"`
	Agent   string     `json:"agent"`
	State   string     `json:"state"`
	Created time.Time  `json:"created"`
	Expires time.Time  `json:"expires"`
	Used    *time.Time `json:"used,omitempty"`
	Revoked *time.Time `json:"revoked,omitempty"`
}

type tokenList []tokenShown

func (tokenList) columns() []string {
	return []string{"ID", "AGENT", "STATE", "CREATED", "EXPIRES", "+USED", "+REVOKED"}
}

func (l tokenList) rows() [][]string {
	now := time.Now()
	var rows [][]string
	for _, t := range l {
		rows = append(rows, []string{t.ID, t.Agent, t.State, since(t.Created, now), since(t.Expires, now), clockOf(t.Used), clockOf(t.Revoked)})
	}
	return rows
}

func (l tokenList) names() []string {
	var names []string
	for _, t := range l {
		names = append(names, "join-token/"+t.ID)
	}
	return names
}

func shownTokens(infos []*adminv1.JoinTokenInfo, now time.Time) tokenList {
	at := func(t *timestamppb.Timestamp) *time.Time {
		if t == nil {
			return nil
		}
		v := t.AsTime()
		return &v
	}
	list := tokenList{}
	for _, i := range infos {
		t := tokenShown{
			ID: i.Id, Agent: i.Agent, State: "usable", Created: i.Created.AsTime(), Expires: i.Expires.AsTime(),
			Used: at(i.Used), Revoked: at(i.Revoked),
		}
		switch {
		case t.Used != nil:
			t.State = "used"
		case t.Revoked != nil:
			t.State = "revoked"
		case !t.Expires.After(now):
			t.State = "expired"
		}
		list = append(list, t)
	}
	return list
}

func (c *cli) joinTokenListCommand() *cobra.Command {
	var file, format string
	cmd := &cobra.Command{
		Use:   "list --config FILE",
		Short: "List the join tokens, newest first",
		Long: `Lists the join tokens, newest first, up to 30 days after they were used, revoked or expired; all that were ever made
are in the log (signet log find --kind join-token-created). Their secrets are not kept anywhere.`,
		Example: `  signet join-token list --config east.yaml
  signet join-token list --config east.yaml -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.admin(cmd.Context(), file, func(ctx context.Context, a adminv1.AdminClient) error {
				r, err := a.ListJoinTokens(ctx, &adminv1.ListJoinTokensRequest{})
				if err != nil {
					return err
				}
				return c.show(format, shownTokens(r.Tokens, time.Now()))
			})
		},
	}
	serverConfigFlag(cmd, &file)
	outputFlag(cmd, &format)
	return cmd
}

func (c *cli) joinTokenRevokeCommand() *cobra.Command {
	var file string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "revoke --config FILE ID",
		Short: "Make a join token useless",
		Long: `Makes a join token that is not used yet useless. Revoking it again changes nothing.
Exit status 1 when there is no such token or it was used.`,
		Example: `  signet join-token revoke --config east.yaml 3f9a0c51d2e4b687
  signet join-token revoke --config east.yaml 3f9a0c51d2e4b687 --dry-run`,
		Args: cobra.ExactArgs(1),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return c.completed(cmd, func(ctx context.Context, a adminv1.AdminClient) ([]string, error) {
				r, err := a.ListJoinTokens(ctx, &adminv1.ListJoinTokensRequest{})
				var ids []string
				for _, t := range shownTokens(r.GetTokens(), time.Now()) {
					if t.State == "usable" {
						ids = append(ids, t.ID+"\t"+t.Agent)
					}
				}
				return ids, err
			})
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.admin(cmd.Context(), file, func(ctx context.Context, a adminv1.AdminClient) error {
				r, err := a.RevokeJoinToken(ctx, &adminv1.RevokeJoinTokenRequest{Id: args[0], DryRun: dryRun})
				switch {
				case err != nil:
					return err
				case !r.Changed:
					fmt.Fprintf(c.err, "join token %s was revoked already\n", args[0])
				case dryRun:
					fmt.Fprintf(c.err, "join token %s would be revoked; this was a dry run: nothing is changed\n", args[0])
				default:
					fmt.Fprintf(c.err, "join token %s is revoked\n", args[0])
				}
				return nil
			})
		},
	}
	serverConfigFlag(cmd, &file)
	dryRunFlag(cmd, &dryRun)
	return cmd
}
