package main

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestWrongUsageIsAnsweredByWhatIsValid(t *testing.T) {
	h := shortFolder(t)
	for args, want := range map[string]string{
		"ca show --config x":                  "signet ca show is not complete: use signet ca show --config FILE ID",
		"ca show --config x a b":              `"b" is too much for signet ca show: use signet ca show --config FILE ID`,
		"check x":                             `"x" is too much for signet check: use signet check (--config FILE | --agent FILE)`,
		"rotation start --config x":           "use signet rotation start --config FILE intermediate|root",
		"rotation start --config x foo":       `signet rotation start "foo": use intermediate or root`,
		"rotation plan --config x foo":        `signet rotation plan "foo": use intermediate or root`,
		"check":                               "signet check needs one of --config, --agent: use signet check (--config FILE | --agent FILE)",
		"check --config a --agent b":          "--agent and --config can't be used together: use one of --config, --agent",
		"identity ban spiffe://x/y":           "signet identity ban needs --config and --reason: use signet identity ban --config FILE SPIFFE-ID --reason TEXT",
		"ca list --confg x":                   "--confg is not a flag of signet ca list; did you mean --config? See: signet ca list --help",
		"ca list -z":                          "-z is not a flag of signet ca list. See: signet ca list --help",
		"ca list --config":                    "--config has no value: give it the server's configuration file",
		"log find --dir x --limit abc":        `--limit "abc": use a whole number, such as 3`,
		"join-token create --agent a --ttl 5": `--ttl "5": use a duration, such as 90s, 15m or 24h`,
		"cluster install --config x --chain c --root-fingerprint z --trust t": "--trust-digest is missing: --trust and --trust-digest go together",
		"ca lst":         `unknown command "lst" for "signet ca"; did you mean "list"? See: signet ca --help`,
		"chek":           `unknown command "chek" for "signet"; did you mean "check"? See: signet --help`,
		"agent foo":      `unknown command "foo" for "signet agent". See: signet agent --help`,
		"check --config": "--config has no value",
	} {
		_, errs := h.must(exitCouldNotSay, strings.Fields(args)...)
		contains(t, errs, want)
		if strings.Count(errs, "\n") != 1 {
			t.Errorf("signet %s is answered by more than a sentence: %s", args, errs)
		}
	}
}

// readOnly are the commands that change nothing but files that they are told to write their answer to.
var readOnly = []string{
	"root show", "cluster show", "agent list", "agent status", "join-token list", "registration list", "registration why",
	"identity list", "ca list", "ca show", "rotation plan", "rotation status", "rotation report", "trust list", "trust export",
	"svid fetch", "svid watch", "svid inspect", "svid verify", "log find", "log show", "log prove", "log verify", "check",
	"config view", "config validate", "config vault-policy", "version",
}

// longRunning are what they run, and have no end to be foretold.
var longRunning = []string{"serve", "agent"}

// Whatever changes something can be tried first.
func TestEveryWriteHasADryRun(t *testing.T) {
	without := slices.Concat(readOnly, longRunning)
	writes := 0
	var each func(cmd *cobra.Command)
	each = func(cmd *cobra.Command) {
		for _, sub := range cmd.Commands() {
			each(sub)
		}
		_, path, _ := strings.Cut(cmd.CommandPath(), " ")
		i := slices.Index(without, path)
		if i >= 0 {
			without = slices.Delete(without, i, i+1)
		}
		if !cmd.Runnable() || cmd.HasSubCommands() && i < 0 {
			return // a group, or a page of help
		}
		dry := cmd.Flags().Lookup("dry-run") != nil
		if dry == (i >= 0) {
			t.Errorf("%s has a dry run: %v", cmd.CommandPath(), dry)
		}
		if dry {
			writes++
		}
	}
	each((&cli{}).command())
	if len(without) > 0 || writes < 15 {
		t.Errorf("%d commands write, and %q are none", writes, without)
	}
}

// No command says only what is wrong, whatever it is given.
func TestNoCommandAnswersInTheWordsOfALibrary(t *testing.T) {
	h := shortFolder(t)
	bare := regexp.MustCompile(`accepts|invalid argument|required flag|unknown flag|shorthand|strconv|in the group|flag needs`)
	commands := 0
	var each func(cmd *cobra.Command)
	each = func(cmd *cobra.Command) {
		for _, sub := range cmd.Commands() {
			each(sub)
		}
		if cmd.Run == nil && cmd.RunE == nil {
			return // a page of help
		}
		commands++
		path := strings.Fields(cmd.CommandPath())[1:]
		for _, wrong := range [][]string{{"a", "b", "c", "d"}, {"--none"}, {"--output"}} {
			_, errs := h.must(exitCouldNotSay, append(path[:len(path):len(path)], wrong...)...)
			if bare.MatchString(errs) || !strings.Contains(errs, "signet") {
				t.Errorf("signet %s %s: %s", strings.Join(path, " "), wrong, errs)
			}
		}
	}
	each((&cli{}).command())
	if commands < 30 {
		t.Errorf("only %d commands were tried", commands)
	}
}
