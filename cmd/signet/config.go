package main

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/internal/strictyaml"
)

func (c *cli) configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Show and check configuration files",
		Long: `A server and an agent are each configured by one YAML file. It is read strictly: a key that is not known is refused,
not passed over. Whether a file is a server's or an agent's is told from its keys.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(c.configViewCommand(), c.configValidateCommand(), c.configVaultPolicyCommand())
	return cmd
}

func (c *cli) configViewCommand() *cobra.Command {
	var file, role, format string
	cmd := &cobra.Command{
		Use:   "view --config FILE",
		Short: "Show every value and where it comes from",
		Long: `Show every value that holds, defaults included, and its source: "default", or file and line.
Secrets are not shown: a configuration only names the files they are in.`,
		Example: `  signet config view --config east.yaml
  signet config view --config node-1.yaml --role agent -o yaml`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, list, err := loadConfig(file, role)
			if found := strictyaml.Findings(nil); errors.As(err, &found) {
				return no("%w", err)
			}
			if err != nil {
				return err
			}
			return c.show(format, list)
		},
	}
	configFlags(cmd, &file, &role)
	outputFlag(cmd, &format)
	return cmd
}

func (c *cli) configValidateCommand() *cobra.Command {
	var file, role, format string
	cmd := &cobra.Command{
		Use:   "validate --config FILE",
		Short: "Check a configuration file",
		Long: `Check a configuration file and list everything that is wrong with it.
Exit status: 0 it is valid, 1 something is wrong, 2 it could not be read.`,
		Example: `  signet config validate --config east.yaml
  signet config validate --config node-1.yaml -o json`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			as, _, err := loadConfig(file, role)
			found := strictyaml.Findings{}
			if err != nil && !errors.As(err, &found) {
				return err
			}
			// A table of nothing says nothing; the other formats are read by programs.
			if len(found) > 0 || format != "table" && format != "wide" {
				if err := c.show(format, findingList(found)); err != nil {
					return err
				}
			}
			switch len(found) {
			case 0:
				fmt.Fprintf(c.err, "%s is a valid configuration of the %s\n", file, as)
				return nil
			case 1:
				return no("%s has 1 finding: mend it before the file is used", file)
			}
			return no("%s has %d findings: mend them before the file is used", file, len(found))
		},
	}
	configFlags(cmd, &file, &role)
	outputFlag(cmd, &format)
	return cmd
}

func configFlags(cmd *cobra.Command, file, role *string) {
	cmd.Flags().StringVar(file, "config", "", "the configuration file")
	cmd.Flags().StringVar(role, "role", "", "whose configuration it is, server or agent, where the keys don't tell")
	_ = cmd.MarkFlagRequired("config")
	_ = cmd.MarkFlagFilename("config", "yaml", "yml")
	_ = cmd.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{string(config.RoleServer), string(config.RoleAgent)}, cobra.ShellCompDirectiveNoFileComp))
}

// loadConfig loads a file of either role; "" finds the role out.
func loadConfig(file, role string) (config.Role, settingList, error) {
	as := config.Role(role)
	if as == "" {
		var err error
		if as, err = config.RoleOf(file); err != nil {
			return "", nil, err
		}
	}
	switch as {
	case config.RoleServer:
		s, err := config.LoadServer(file)
		if err != nil {
			return as, nil, err
		}
		return as, s.Settings(), nil
	case config.RoleAgent:
		a, err := config.LoadAgent(file)
		if err != nil {
			return as, nil, err
		}
		return as, a.Settings(), nil
	}
	return "", nil, fmt.Errorf("--role %q is unknown: use server or agent", role)
}

type settingList []config.Setting

func (l settingList) columns() []string { return []string{"KEY", "VALUE", "SOURCE"} }

func (l settingList) rows() [][]string {
	rows := make([][]string, len(l))
	for i, s := range l {
		rows[i] = []string{s.Key, s.Value, s.Source}
	}
	return rows
}

func (l settingList) names() []string {
	names := make([]string, len(l))
	for i, s := range l {
		names[i] = "setting/" + s.Key
	}
	return names
}

type findingList strictyaml.Findings

func (l findingList) columns() []string { return []string{"PLACE", "FINDING", "+KEY"} }

func (l findingList) rows() [][]string {
	rows := make([][]string, len(l))
	for i, f := range l {
		rows[i] = []string{f.Place(), f.Message, f.Key}
	}
	return rows
}

func (l findingList) names() []string {
	names := make([]string, len(l))
	for i, f := range l {
		names[i] = "finding/" + cmp.Or(f.Key, f.Place())
	}
	return names
}
