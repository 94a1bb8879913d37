package main

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// sayUsage has wrong usage of any command answered by a sentence that says what is valid; the libraries say what is wrong.
func sayUsage(root *cobra.Command) {
	root.SetFlagErrorFunc(wrongFlag)
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		return errors.Join(noEmptyFlags(cmd), missingFlags(cmd), wrongGroup(cmd))
	}
	var of func(cmd *cobra.Command)
	of = func(cmd *cobra.Command) {
		for _, sub := range cmd.Commands() {
			of(sub)
		}
		if takes := cmd.Args; takes != nil {
			cmd.Args = func(cmd *cobra.Command, args []string) error {
				if takes(cmd, args) == nil {
					return nil
				}
				return wrongArguments(cmd, args)
			}
		}
		if cmd.HasSubCommands() && !cmd.Runnable() {
			cmd.Args, cmd.RunE = wrongArguments, func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		}
	}
	of(root)
}

// usage is how a command is used, in one line.
func usage(cmd *cobra.Command) string { return strings.TrimSuffix(cmd.UseLine(), " [flags]") }

// wrongArguments says what a command takes instead of these; none where a group is only asked for its help.
func wrongArguments(cmd *cobra.Command, args []string) error {
	switch wrong := slices.IndexFunc(args, func(a string) bool { return !slices.Contains(cmd.ValidArgs, a) }); {
	case cmd.HasSubCommands() && len(args) > 0:
		cmd.SuggestionsMinimumDistance = 2
		hint := "."
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			hint = fmt.Sprintf("; did you mean %q?", near[0])
		}
		return fmt.Errorf("unknown command %q for %q%s See: %s --help", args[0], cmd.CommandPath(), hint, cmd.CommandPath())
	case cmd.HasSubCommands():
		return nil
	case len(args) == 0:
		return fmt.Errorf("%s is not complete: use %s", cmd.CommandPath(), usage(cmd))
	case len(cmd.ValidArgs) > 0 && wrong >= 0:
		return fmt.Errorf("%s %q: use %s", cmd.CommandPath(), args[wrong], strings.Join(cmd.ValidArgs, " or "))
	}
	return fmt.Errorf("%q is too much for %s: use %s", args[len(args)-1], cmd.CommandPath(), usage(cmd))
}

// forms are what values of a type look like.
var forms = map[string]string{
	"int": "a whole number, such as 3", "uint": "a whole number, such as 3", "uint32": "a whole number, such as 3", "int64": "a whole number, such as 3",
	"float64": "a number, such as 0.5", "duration": "a duration, such as 90s, 15m or 24h", "bool": "true or false",
}

// wrongFlag says what is valid instead of a flag, or of its value.
func wrongFlag(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	var valueless *pflag.ValueRequiredError
	var invalid *pflag.InvalidValueError
	switch {
	case errors.As(err, &unknown):
		name := "--" + unknown.GetSpecifiedName()
		if unknown.GetSpecifiedShortnames() != "" {
			name = "-" + unknown.GetSpecifiedName()
		}
		hint := ". See: "
		if near := nearest(cmd, unknown.GetSpecifiedName()); near != "" {
			hint = "; did you mean --" + near + "? See: "
		}
		return fmt.Errorf("%s is not a flag of %s%s%s --help", name, cmd.CommandPath(), hint, cmd.CommandPath())
	case errors.As(err, &valueless):
		return fmt.Errorf("%s has no value: give it %s", called(valueless.GetFlag()), meant(valueless.GetFlag()))
	case errors.As(err, &invalid):
		if form, ok := forms[invalid.GetFlag().Value.Type()]; ok {
			return fmt.Errorf("%s %q: use %s", called(invalid.GetFlag()), invalid.GetValue(), form)
		}
		return fmt.Errorf("%s %q: %w", called(invalid.GetFlag()), invalid.GetValue(), errors.Unwrap(invalid))
	}
	return fmt.Errorf("%w: use %s, and see: %s --help", err, usage(cmd), cmd.CommandPath())
}

func called(f *pflag.Flag) string { return "--" + f.Name }

// meant is what a flag is given: its form, or what its help says of it.
func meant(f *pflag.Flag) string {
	if form, ok := forms[f.Value.Type()]; ok {
		return form
	}
	return f.Usage
}

// nearest is the flag of a command that may have been meant; "" = none is near.
func nearest(cmd *cobra.Command, name string) (near string) {
	words := &cobra.Command{Use: "flags", SuggestionsMinimumDistance: 2}
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			words.AddCommand(&cobra.Command{Use: f.Name, Run: func(*cobra.Command, []string) {}})
		}
	})
	if all := words.SuggestionsFor(name); len(all) > 0 {
		return all[0]
	}
	return ""
}

// missingFlags names all flags that a command can't do without.
func missingFlags(cmd *cobra.Command) error {
	if cmd.DisableFlagParsing {
		return nil
	}
	var missing []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if needed := f.Annotations[cobra.BashCompOneRequiredFlag]; len(needed) == 1 && needed[0] == strconv.FormatBool(true) && !f.Changed {
			missing = append(missing, called(f))
		}
	})
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("%s needs %s: use %s, and see: %s --help", cmd.CommandPath(), strings.Join(missing, " and "), usage(cmd), cmd.CommandPath())
}

// Groups of flags, as cobra says that they are broken.
var (
	allOrNone = regexp.MustCompile(`^if any flags in the group \[(.*)\] are set they must all be set; missing \[(.*)\]$`)
	oneOf     = regexp.MustCompile(`^at least one of the flags in the group \[(.*)\] is required$`)
	onlyOne   = regexp.MustCompile(`^if any flags in the group \[(.*)\] are set none of the others can be; \[(.*)\] were all set$`)
)

func wrongGroup(cmd *cobra.Command) error {
	if cmd.DisableFlagParsing {
		return nil
	}
	err := cmd.ValidateFlagGroups()
	if err == nil {
		return nil
	}
	list := func(names, joint string) string { return "--" + strings.ReplaceAll(names, " ", joint+"--") }
	text := err.Error()
	switch {
	case allOrNone.MatchString(text):
		m := allOrNone.FindStringSubmatch(text)
		return fmt.Errorf("%s is missing: %s go together", list(m[2], " and "), list(m[1], " and "))
	case oneOf.MatchString(text):
		return fmt.Errorf("%s needs one of %s: use %s", cmd.CommandPath(), list(oneOf.FindStringSubmatch(text)[1], ", "), usage(cmd))
	case onlyOne.MatchString(text):
		m := onlyOne.FindStringSubmatch(text)
		return fmt.Errorf("%s can't be used together: use one of %s", list(m[2], " and "), list(m[1], ", "))
	}
	return err
}
