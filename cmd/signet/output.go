package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
)

// listing is what a read command shows. Its JSON form is the value itself.
type listing interface {
	// columns of the table; those that begin with '+' are shown by -o wide only. On a terminal where the others don't fit, those
	// that begin with '>' are set below their rows, and those with '~' are left out, the last first.
	columns() []string
	rows() [][]string
	// names, one per item, for -o name: "registration/frontend".
	names() []string
}

const outputFormats = "table|wide|json|yaml|name"

// outputFlag adds -o to a read command.
func outputFlag(cmd *cobra.Command, format *string) {
	cmd.Flags().StringVarP(format, "output", "o", "table", "output format: "+outputFormats)
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(strings.Split(outputFormats, "|"), cobra.ShellCompDirectiveNoFileComp))
}

// show prints a listing to stdout in the wanted format.
func (c *cli) show(format string, l listing) error {
	switch format {
	case "json":
		enc := json.NewEncoder(c.out)
		enc.SetIndent("", "  ")
		return enc.Encode(l)
	case "yaml":
		// By way of JSON, so that both forms have the same names.
		raw, err := json.Marshal(l)
		if err != nil {
			return err
		}
		var v any
		if err := yaml.Unmarshal(raw, &v); err != nil {
			return err
		}
		enc := yaml.NewEncoder(c.out)
		enc.SetIndent(2)
		defer enc.Close()
		return enc.Encode(v)
	case "name":
		for _, n := range l.names() {
			if _, err := fmt.Fprintln(c.out, n); err != nil {
				return err
			}
		}
		return nil
	case "table", "wide":
		t := table{width: c.width()}
		if format == "wide" {
			t.width = 0
		}
		rows := l.rows()
		for i, head := range l.columns() {
			if strings.HasPrefix(head, "+") && format != "wide" {
				continue
			}
			col := column{name: strings.TrimLeft(head, "+>~"), kind: head[0]}
			for _, row := range rows {
				col.cells = append(col.cells, cmp.Or(row[i], "-"))
			}
			t.columns = append(t.columns, col)
		}
		_, err := io.WriteString(c.out, t.text(len(rows)))
		return err
	}
	return fmt.Errorf("output format %q is unknown: use %s", format, strings.ReplaceAll(outputFormats, "|", ", "))
}

// clock writes a time as everything here does.
func clock(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// clockOf is clock, or nothing for none.
func clockOf(t *time.Time) string {
	if t == nil {
		return ""
	}
	return clock(*t)
}
