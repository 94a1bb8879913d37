package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/internal/strictyaml"
)

func (c *cli) registrationCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "registration",
		Short: "Say which workload is which identity",
		Long: `A registration says: a workload that shows all these selectors, on one of these agents, is this SPIFFE ID.
These commands talk to the running server over its admin socket; why asks an agent.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(c.registrationApplyCommand(), c.registrationListCommand(), c.registrationWhyCommand())
	return cmd
}

// maxRegistrationFile bounds a file of registrations, in bytes; the admin door takes no more either.
const maxRegistrationFile = 16 << 20

func (c *cli) registrationApplyCommand() *cobra.Command {
	var configFile, file string
	var dryRun, prune bool
	cmd := &cobra.Command{
		Use:   "apply --config FILE -f FILE",
		Short: "Make the registrations be as a file says",
		Long: `Creates what is new and changes what differs; with --prune it also deletes what the file does not name. All of it
happens, or nothing. Running it again changes nothing. The file:

  registrations:
    - name: frontend
      spiffe_id: spiffe://example.org/ns/shop/sa/frontend
      agents: [node-1, node-2]          # the agents that may ask for it
      selectors: [unix:uid:1000]        # a workload must show all of them
      ttl: 1h                           # default: leaf.ttl of the server
      priority: 0                       # the highest that fits is a workload's default

With --dry-run nothing changes: the differences are shown, and the exit status is 1 if there are any, 0 if there are none.`,
		Example: `  signet registration apply --config east.yaml -f registrations.yaml
  signet registration apply --config east.yaml -f registrations.yaml --prune --dry-run
  generate | signet registration apply --config east.yaml -f -`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := c.readInput(file, "registrations", maxRegistrationFile)
			if err != nil {
				return err
			}
			name := file
			if name == "-" {
				name = "stdin"
			}
			list, err := parseRegistrations(name, text)
			if err != nil {
				return no("%w", err)
			}
			return c.admin(cmd.Context(), configFile, func(ctx context.Context, a adminv1.AdminClient) error {
				r, err := a.ApplyRegistrations(ctx, &adminv1.ApplyRegistrationsRequest{Registrations: list, DryRun: dryRun, Prune: prune})
				if err != nil {
					return err
				}
				differs, err := printChanges(c.out, r.Changes, dryRun)
				if err == nil && dryRun && differs {
					return no("the server's registrations differ from %s", name)
				}
				return err
			})
		},
	}
	serverConfigFlag(cmd, &configFile)
	f := cmd.Flags()
	f.StringVarP(&file, "file", "f", "", "file of registrations, or - for stdin")
	f.BoolVar(&dryRun, "dry-run", false, "show what would change and change nothing")
	f.BoolVar(&prune, "prune", false, "delete what the file does not name")
	_ = cmd.MarkFlagRequired("file")
	_ = cmd.MarkFlagFilename("file", "yaml", "yml")
	return cmd
}

// printChanges prints a line for each registration, and with details what differs in it.
func printChanges(w io.Writer, changes []*adminv1.RegistrationChange, details bool) (differs bool, err error) {
	words := map[adminv1.RegistrationChange_Action]string{
		adminv1.RegistrationChange_ACTION_UNCHANGED: "unchanged", adminv1.RegistrationChange_ACTION_CREATED: "created",
		adminv1.RegistrationChange_ACTION_CHANGED: "changed", adminv1.RegistrationChange_ACTION_DELETED: "deleted",
	}
	var b strings.Builder
	for _, ch := range changes {
		name := ch.GetAfter().GetName()
		if name == "" {
			name = ch.GetBefore().GetName()
		}
		fmt.Fprintf(&b, "registration/%s %s\n", name, words[ch.Action])
		if ch.Action == adminv1.RegistrationChange_ACTION_UNCHANGED {
			continue
		}
		differs = true
		if !details {
			continue
		}
		before, after := fields(ch.Before), fields(ch.After)
		for i, name := range fieldNames {
			if before[i] == after[i] {
				continue
			}
			if before[i] != "" {
				fmt.Fprintf(&b, "  - %s: %s\n", name, before[i])
			}
			if after[i] != "" {
				fmt.Fprintf(&b, "  + %s: %s\n", name, after[i])
			}
		}
	}
	_, err = io.WriteString(w, b.String())
	return differs, err
}

var fieldNames = [...]string{"spiffe_id", "agents", "selectors", "ttl", "priority"}

// fields are those of a registration as they stand in a file; all empty for none.
func fields(r *signetv1.Registration) (f [len(fieldNames)]string) {
	if r == nil {
		return f
	}
	return [...]string{
		r.SpiffeId, "[" + strings.Join(r.Agents, ", ") + "]", "[" + strings.Join(r.Selectors, ", ") + "]",
		ttlText(r.TtlSeconds), strconv.Itoa(int(r.Priority)),
	}
}

func ttlText(seconds int64) string {
	if seconds == 0 {
		return "default"
	}
	return (time.Duration(seconds) * time.Second).String()
}

// registrationsFile is what registration apply reads.
type registrationsFile struct {
	Registrations []struct {
		Name      string        `yaml:"name" required:"true"`
		SPIFFEID  string        `yaml:"spiffe_id" required:"true"`
		Agents    []string      `yaml:"agents" required:"true"`
		Selectors []string      `yaml:"selectors" required:"true"`
		TTL       time.Duration `yaml:"ttl"`
		Priority  int32         `yaml:"priority"`
	} `yaml:"registrations" required:"true"`
}

// parseRegistrations reads a file of registrations, strictly: an error is strictyaml.Findings. What the values mean is the
// server's to judge.
func parseRegistrations(name string, text []byte) ([]*signetv1.Registration, error) {
	var file registrationsFile
	if _, err := strictyaml.Decode(name, text, &file, strictyaml.Options{Parsers: []strictyaml.Parser{strictyaml.Parse(parseTTL)}}); err != nil {
		return nil, err
	}
	var list []*signetv1.Registration
	for _, r := range file.Registrations {
		list = append(list, &signetv1.Registration{
			Name: r.Name, SpiffeId: r.SPIFFEID, Agents: r.Agents, Selectors: r.Selectors,
			TtlSeconds: int64(r.TTL / time.Second), Priority: r.Priority,
		})
	}
	return list, nil
}

func parseTTL(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 || d%time.Second != 0 {
		return 0, fmt.Errorf("want whole seconds, for example 10s or 24h, got %.64q", s)
	}
	return d, nil
}

// registrationShown is a registration as a file would have it.
type registrationShown struct {
	Name      string   `json:"name"`
	SPIFFEID  string   `json:"spiffe_id"`
	Agents    []string `json:"agents"`
	Selectors []string `json:"selectors"`
	TTL       string   `json:"ttl,omitempty"`
	Priority  int32    `json:"priority"`
}

// registrationList shows as a file that can be applied.
type registrationList struct {
	Registrations []registrationShown `json:"registrations"`
}

func (registrationList) columns() []string {
	return []string{"NAME", "SPIFFE ID", "AGENTS", "SELECTORS", "TTL", "+PRIORITY"}
}

func (l registrationList) rows() [][]string {
	var rows [][]string
	for _, r := range l.Registrations {
		ttl := r.TTL
		if ttl == "" {
			ttl = ttlText(0)
		}
		rows = append(rows, []string{r.Name, r.SPIFFEID, strings.Join(r.Agents, ","), strings.Join(r.Selectors, ","), ttl, strconv.Itoa(int(r.Priority))})
	}
	return rows
}

func (l registrationList) names() []string {
	var names []string
	for _, r := range l.Registrations {
		names = append(names, "registration/"+r.Name)
	}
	return names
}

func (c *cli) registrationListCommand() *cobra.Command {
	var file, agent, format string
	cmd := &cobra.Command{
		Use:   "list --config FILE",
		Short: "List the registrations",
		Long:  "Lists the registrations by name. With -o yaml the output is a file that registration apply takes.",
		Example: `  signet registration list --config east.yaml
  signet registration list --config east.yaml --agent node-1 -o wide
  signet registration list --config east.yaml -o yaml > registrations.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.admin(cmd.Context(), file, func(ctx context.Context, a adminv1.AdminClient) error {
				r, err := a.ListRegistrations(ctx, &adminv1.ListRegistrationsRequest{Agent: agent})
				if err != nil {
					return err
				}
				list := registrationList{Registrations: []registrationShown{}}
				for _, m := range r.Registrations {
					shown := registrationShown{Name: m.Name, SPIFFEID: m.SpiffeId, Agents: m.Agents, Selectors: m.Selectors, Priority: m.Priority}
					if m.TtlSeconds != 0 {
						shown.TTL = ttlText(m.TtlSeconds)
					}
					list.Registrations = append(list.Registrations, shown)
				}
				return c.show(format, list)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&agent, "agent", "", "only those that name this agent")
	_ = cmd.RegisterFlagCompletionFunc("agent", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return c.completed(cmd, func(ctx context.Context, a adminv1.AdminClient) ([]string, error) {
			r, err := a.ListRegistrations(ctx, &adminv1.ListRegistrationsRequest{})
			var agents []string
			for _, m := range r.GetRegistrations() {
				agents = append(agents, m.Agents...)
			}
			slices.Sort(agents)
			return slices.Compact(agents), err
		})
	})
	outputFlag(cmd, &format)
	return cmd
}
