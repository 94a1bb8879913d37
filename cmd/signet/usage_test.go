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

// What changes how a cluster's CAs, identities and agents stand can be tried first.
func TestEveryWriteAboutCAsIdentitiesAndAgentsHasADryRun(t *testing.T) {
	reads := strings.Fields("list show plan status report export why")
	for _, group := range (&cli{}).command().Commands() {
		if !slices.Contains([]string{"agent", "ca", "identity", "registration", "root", "rotation", "trust"}, group.Name()) {
			continue
		}
		for _, cmd := range group.Commands() {
			if (cmd.Flags().Lookup("dry-run") == nil) != slices.Contains(reads, cmd.Name()) {
				t.Errorf("%s has a dry run: %v", cmd.CommandPath(), cmd.Flags().Lookup("dry-run") != nil)
			}
		}
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
