//go:build real

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/signet-ca/signet/test/lab"
)

// readWorld is a running cluster in which there is something to read: east/tls holds an identity.
func readWorld(t *testing.T) *world {
	t.Helper()
	w := newWorld(t, "")
	w.serve(t)
	w.apply(t, "registrations:\n  - { name: me, spiffe_id: spiffe://example.org/me, agents: [node-1], selectors: ['unix:uid:"+uid()+"'], ttl: 1h }\n")
	a := w.agent(t, "node-1")
	w.must(t, "svid", "fetch", "--socket", a.Socket, "--write", "east/tls")
	if err := errors.Join(os.Symlink(a.Socket, w.path("agent.sock")), os.Symlink("east/tls", w.path("tls"))); err != nil {
		t.Fatal(err)
	}
	w.untilLogged(t, w.east)
	return w
}

// reads is every command that takes -o, and the keys of its JSON: scripts hang on them, so one more is fine to add here,
// and one less is a break.
var reads = map[string]string{
	"root show --dir root": `.fingerprint .key_fingerprint .key_in .log .log.origin .log.size .log.verifier_key .not_after .not_before .path_length .serial .signed
		.signed[].by .signed[].key_fingerprint .signed[].kind .signed[].log_index .signed[].not_after .signed[].not_before .signed[].serial .signed[].subject
		.signed[].time .subject .trust_domain`,
	"cluster show --config east/server.yaml": `.authorities .authorities[].fingerprint .authorities[].hierarchy .authorities[].id .authorities[].key
		.authorities[].key_fingerprint .authorities[].not_after .authorities[].not_before .authorities[].state .authorities[].subject .bundle_sequence .cluster
		.control_ca .instance .log_verifier_key .roots .trust_domain`,
	"registration list --config east/server.yaml": `.registrations .registrations[].agents .registrations[].name .registrations[].priority
		.registrations[].selectors .registrations[].spiffe_id .registrations[].ttl`,
	"ca list --config east/server.yaml": `[].fingerprint [].id [].key [].key_fingerprint [].kind [].not_after [].not_before [].root [].serial [].signing
		[].since [].state [].subject [].wanted`,
	"ca show intermediate-1 --config east/server.yaml": `.chain .fingerprint .id .key .key_fingerprint .kind .not_after .not_before .root .serial .signing
		.since .state .subject .wanted`,
	"rotation status --config east/server.yaml": `.authorities .authorities[].fingerprint .authorities[].id .authorities[].key
		.authorities[].key_fingerprint .authorities[].kind .authorities[].not_after .authorities[].not_before .authorities[].root .authorities[].serial
		.authorities[].signing .authorities[].since .authorities[].state .authorities[].subject .authorities[].wanted .automatic .cluster .clusters
		.clusters[].cluster .clusters[].reported .clusters[].roots .clusters[].roots[].holding .clusters[].roots[].id .clusters[].roots[].leaves_until
		.clusters[].roots[].leaving .clusters[].roots[].missing .clusters[].roots[].signing .clusters[].roots[].trusting .clusters[].roots[].validators .next
		.next[].at .next[].authority .next[].because .next[].kind .next[].ready .next[].to .next[].waits .next[].waits[].code .next[].waits[].for .next[].waits[].forcible
		.next[].waits[].missing .next[].waits[].until .tainted`,
	"rotation plan root --config east/server.yaml": `[].assumed [].assumed[].code [].assumed[].for [].at [].authority [].because [].from [].kind [].ready [].to [].waits`,
	"trust list --config east/server.yaml": `.bundle_digest .bundle_sequence .roots .roots[].fingerprint .roots[].id .roots[].key_fingerprint .roots[].kind
		.roots[].not_after .roots[].not_before .roots[].serial .roots[].signing .roots[].since .roots[].state .roots[].subject .roots[].wanted`,
	"identity list --config east/server.yaml":   ``,
	"join-token list --config east/server.yaml": `[].agent [].created [].expires [].id [].state [].used`,
	"svid fetch --socket agent.sock": `.chain .chain[].issuer .chain[].key .chain[].kind .chain[].not_after .chain[].not_before .chain[].serial
		.chain[].sha256 .chain[].spiffe_id .chain[].subject .not_after .not_before .roots .roots[].issuer .roots[].key .roots[].kind .roots[].not_after
		.roots[].not_before .roots[].serial .roots[].sha256 .roots[].spiffe_id .roots[].subject .serial .spiffe_id`,
	"svid inspect tls/svid.pem":                        `[].issuer [].key [].kind [].not_after [].not_before [].serial [].sha256 [].spiffe_id [].subject`,
	"svid verify tls/svid.pem --bundle tls/bundle.pem": `[].issuer [].key [].kind [].not_after [].not_before [].serial [].sha256 [].spiffe_id`,
	"log find --config east/server.yaml --spiffe-id spiffe://example.org/me --prove": `[].agent [].caller [].door [].index [].instance [].kind [].not_after
		[].not_before [].proven [].public_key_sha256 [].registration [].selectors [].serial [].spiffe_id [].time`,
	"log show --config east/server.yaml": `.checkpoint_published .origin .root_hash .size .verifier_key`,
	"log show 0 --config east/server.yaml": `.caller .certificate .certificate.is_ca .certificate.issuer .certificate.public_key
		.certificate.public_key_sha256 .certificate.signature_algorithm .certificate.subject .door .entry .index .kind .leaf_hash .not_after .not_before
		.proven .public_key_sha256 .serial .spiffe_id .time`,
	"log verify --config east/server.yaml":      `.intact .origin .root_hash .size`,
	"config view --config east/server.yaml":     `[].key [].source [].value`,
	"config view --config east/node-1.yaml":     `[].key [].source [].value`,
	"config validate --config east/server.yaml": ``,
	"version": `.go .platform .version`,
}

func keysOf(v any, path string, into map[string]bool) {
	switch v := v.(type) {
	case []any:
		for _, item := range v {
			keysOf(item, path+"[]", into)
		}
	case map[string]any:
		for k, item := range v {
			into[path+"."+k] = true
			if path+"."+k != ".entry" { // an entry of the log is as it is: its form is the protobuf's
				keysOf(item, path+"."+k, into)
			}
		}
	}
}

func TestWhatIsReadCanBeReadByPeopleAndPrograms(t *testing.T) {
	w := readWorld(t)
	for line, golden := range reads {
		t.Run(line, func(t *testing.T) {
			args := strings.Fields(line)
			as := func(format string) ran {
				t.Helper()
				r := w.run(t, append(slices.Clone(args), "-o", format)...)
				if r.code != 0 {
					t.Fatal(r)
				}
				return r
			}
			var fromJSON, fromYAML any
			r := as("json")
			if err := json.Unmarshal([]byte(r.out), &fromJSON); err != nil {
				t.Fatal(err, r)
			}
			if err := yaml.Unmarshal([]byte(as("yaml").out), &fromYAML); err != nil {
				t.Fatal(err)
			}
			keys, same := map[string]bool{}, map[string]bool{}
			keysOf(fromJSON, "", keys)
			keysOf(fromYAML, "", same)
			if !maps.Equal(keys, same) || reflect.TypeOf(fromJSON) != reflect.TypeOf(fromYAML) {
				t.Errorf("JSON and YAML differ: %v, %v", slices.Sorted(maps.Keys(keys)), slices.Sorted(maps.Keys(same)))
			}
			got := slices.DeleteFunc(slices.Sorted(maps.Keys(keys)), func(k string) bool { return k == ".revision" }) // of a build from a checkout
			want := slices.Sorted(slices.Values(strings.Fields(golden)))
			if !slices.Equal(got, want) {
				t.Errorf("keys are\n%s\nwant\n%s", strings.Join(got, " "), strings.Join(want, " "))
			}
			for name := range strings.Lines(as("name").out) {
				if !regexp.MustCompile(`^[a-z-]+/\S+\n$`).MatchString(name) {
					t.Errorf("-o name prints %q", name)
				}
			}
			table, wide := as("table").out, as("wide").out
			if len(wide) < len(table) {
				t.Errorf("wide is narrower than the table:\n%s%s", wide, table)
			}
			if strings.ContainsAny(table+wide, "\x1b\r") {
				t.Error("there are terminal codes in what is piped")
			}
			r = w.run(t, append(slices.Clone(args), "-o", "xml")...)
			r.err = withoutHints(r.err)
			if r.out != "" && !strings.Contains(line, "show") || r.code != 2 || !strings.Contains(r.err, `"xml"`) || !strings.Contains(r.err, "json") {
				t.Error(r)
			}
		})
	}
	t.Run("and where nobody takes it", func(t *testing.T) {
		// The agent is told of the log's checkpoint now and then; after that nothing is left to change.
		var log struct{ Size int }
		if err := w.JSON(t.Context(), &log, "log", "show", "--config", "east/server.yaml"); err != nil {
			t.Fatal(err)
		}
		if err := lab.Until(t.Context(), "the agent knows all of the log", 2*time.Minute, func() error {
			raw, err := os.ReadFile(w.path("east/node-1/checkpoint"))
			if err == nil && strings.Split(string(raw), "\n")[1] != strconv.Itoa(log.Size) {
				err = fmt.Errorf("the agent has %q, the log %d entries", raw, log.Size)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		changesNothing(t, w.Dir, func() ran {
			for line := range reads {
				for _, where := range []struct {
					shell string
					codes []int
				}{
					{`exec "$@" >&-`, []int{0, 2}},                 // closed
					{`exec "$@" 2>&- >&- <&-`, []int{0, 2}},        // all of them
					{`exec "$@" >/dev/full`, []int{2}},             // what can't be written must not pass for done
					{`"$@" | head -c 1 >/dev/null`, []int{0}},      // a pipe whose reader goes away
					{`"$@" 2>&1 | head -c 0 >/dev/null`, []int{0}}, // at once
				} {
					args := strings.Fields(line)
					if where.codes[0] == 2 {
						args = append(args, "-o", "json")
					}
					cmd := exec.Command("sh", append([]string{"-c", where.shell, "sh", signet}, args...)...)
					cmd.Dir = w.Dir
					var talk strings.Builder
					cmd.Stderr = &talk
					_ = cmd.Run()
					if code := cmd.ProcessState.ExitCode(); !slices.Contains(where.codes, code) || strings.Contains(talk.String(), "goroutine") {
						t.Errorf("%s, %s: exit status %d: %s", line, where.shell, code, talk.String())
					}
				}
			}
			return ran{}
		})
	})
}

func TestAnAuditorFindsShowsProvesAndVerifies(t *testing.T) {
	w := readWorld(t)
	config := []string{"--config", w.east.Config()}
	logDir := w.east.Path("state", "log")
	key := strings.TrimSpace(readFile(t, filepath.Join(logDir, "verifier.key")))

	w.must(t, append([]string{"log", "prove", "--cert", "tls/svid.pem", "--out", "me.proof"}, config...)...)
	// The proof and the key suffice, away from everything.
	w.must(t, "log", "verify", "--proof", "me.proof", "--cert", "tls/svid.pem", "--key", key)
	w.refuses(t, 2, []string{"--key"}, "log", "verify", "--proof", "me.proof")
	w.refuses(t, 1, []string{"east/chain.pem", "not that of the certificate"}, "log", "verify", "--proof", "me.proof", "--cert", "east/chain.pem", "--key", key)
	proof := readFile(t, w.path("me.proof"))
	for name, bad := range map[string]string{
		"no proof":  "c2sp.org/tlog-proof@v1\n",
		"truncated": proof[:len(proof)/2],
		"altered":   alter(proof),
	} {
		w.write(t, "bad.proof", bad)
		r := w.run(t, "log", "verify", "--proof", "bad.proof", "--key", key)
		if r.code == 0 || r.out != "" || !strings.Contains(r.err, "bad.proof") {
			t.Errorf("%s: %v", name, r)
		}
	}
	// A certificate that only has the serial of a logged one.
	leaf := readCerts(t, w.path("tls/svid.pem"))[0]
	foreign := newRoot(t, goodFor)
	twin := authority(t, "twin", goodFor)
	twin.SerialNumber = leaf.SerialNumber
	w.write(t, "twin.pem", chainPEM(signed(t, twin, foreign.cert, leaf.PublicKey, foreign.key)))
	r := w.run(t, append([]string{"log", "prove", "--cert", "twin.pem"}, config...)...)
	r.err = withoutHints(r.err)
	r.refused(t, 1, "not in the audit log", "serial")
	r = w.run(t, append([]string{"log", "find", "--serial", "00ff00ff00ff00ff"}, config...)...)
	r.refused(t, 1, "nothing")
	r = w.run(t, append([]string{"log", "show", "100000"}, config...)...)
	r.err = withoutHints(r.err)
	r.refused(t, 1, "100000")
	w.refuses(t, 2, []string{"--dir", "--config"}, "log", "verify")
	w.refuses(t, 2, []string{"nowhere"}, "log", "verify", "--dir", "nowhere")

	// One byte of a copy, of which nothing is renamed while it is made.
	w.Close()
	if out, err := exec.Command("cp", "-a", logDir, w.path("copy")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	w.must(t, "log", "verify", "--dir", "copy", "--key", key)
	bundles, _ := filepath.Glob(w.path("copy/tile/entries/*.p/*"))
	if len(bundles) == 0 {
		t.Fatal("the copy has no entries")
	}
	newest := slices.MaxFunc(bundles, func(a, b string) int { return len(readFile(t, a)) - len(readFile(t, b)) })
	text := []byte(readFile(t, newest))
	text[len(text)/2] ^= 1
	if err := os.WriteFile(newest, text, 0o600); err != nil {
		t.Fatal(err)
	}
	r = w.run(t, "log", "verify", "--dir", "copy", "--key", key)
	if r.code != 1 || !strings.Contains(r.out, "tile/entries") || !strings.Contains(r.err, "damaged") {
		t.Error(r)
	}
}

// alter changes one letter in the middle of a text's longest line.
func alter(text string) string {
	lines := strings.Split(text, "\n")
	longest := 0
	for i, line := range lines {
		if len(line) > len(lines[longest]) {
			longest = i
		}
	}
	b := []byte(lines[longest])
	if b[len(b)/2] == 'A' {
		b[len(b)/2] = 'B'
	} else {
		b[len(b)/2] = 'A'
	}
	lines[longest] = string(b)
	return strings.Join(lines, "\n")
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestAnSVIDIsVerifiedAsAValidatorWould(t *testing.T) {
	w := readWorld(t)
	chain := readCerts(t, w.path("tls/svid.pem"))
	slices.Reverse(chain)
	w.write(t, "reversed.pem", chainPEM(chain...))
	w.write(t, "other.pem", chainPEM(newRoot(t, goodFor).cert))
	verify := func(args ...string) []string { return append([]string{"svid", "verify"}, args...) }
	w.must(t, verify("tls/svid.pem", "--bundle", "tls/bundle.pem", "--spiffe-id", "spiffe://example.org/me")...)
	w.refuses(t, 1, []string{"spiffe://example.org/me", "spiffe://example.org/other"}, verify("tls/svid.pem", "--bundle", "tls/bundle.pem", "--spiffe-id", "spiffe://example.org/other")...)
	w.refuses(t, 1, []string{"reversed.pem", "CA"}, verify("reversed.pem", "--bundle", "tls/bundle.pem")...)
	w.refuses(t, 1, []string{"tls/svid.pem"}, verify("tls/svid.pem", "--bundle", "other.pem")...)
	w.refuses(t, 2, []string{"root.pass", "PEM"}, verify("root.pass", "--bundle", "tls/bundle.pem")...)
	w.refuses(t, 2, []string{"absent.pem"}, "svid", "inspect", "absent.pem")
	w.refuses(t, 2, []string{"absent.sock"}, "svid", "fetch", "--socket", "absent.sock")

	// Expired, and not valid yet.
	root := newRoot(t, goodFor)
	w.write(t, "root.pem", chainPEM(root.cert))
	for name, v := range map[string]validity{"expired": {-2 * time.Hour, -time.Hour}, "not": {time.Hour, 2 * time.Hour}} {
		key := newKey(t)
		leaf := authority(t, "", v)
		leaf.IsCA, leaf.KeyUsage, leaf.Subject.Organization = false, 1, nil // digitalSignature
		leaf.URIs[0].Path = "/me"
		w.write(t, "leaf.pem", chainPEM(signed(t, leaf, root.cert, key.Public(), root.key)))
		w.refuses(t, 1, []string{"leaf.pem", name}, verify("leaf.pem", "--bundle", "root.pem")...)
	}
}

// helpOf walks the commands as --help lists them.
func helpOf(t *testing.T, path []string, visit func(path []string, text string, leaf bool)) {
	t.Helper()
	cmd := exec.Command(signet, append(slices.Clone(path), "--help")...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("signet %s --help: %v: %s", strings.Join(path, " "), err, out)
	}
	// Of its own time, so that a busy machine does not make it slow.
	if used := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(); used > time.Second {
		t.Errorf("signet %s --help takes %s", strings.Join(path, " "), used)
	}
	_, list, parent := strings.Cut(string(out), "Available Commands:\n")
	visit(path, string(out), !parent)
	if !parent {
		return
	}
	for line := range strings.Lines(list) {
		if !strings.HasPrefix(line, "  ") {
			break
		}
		if name := strings.Fields(line)[0]; name != "help" && name != "completion" {
			helpOf(t, append(slices.Clone(path), name), visit)
		}
	}
}

func TestHelpOfEveryCommandHasExamplesThatParse(t *testing.T) {
	var commands []string
	helpOf(t, nil, func(path []string, text string, leaf bool) {
		name := strings.Join(path, " ")
		if !leaf {
			return
		}
		commands = append(commands, name)
		_, rest, ok := strings.Cut(text, "Examples:\n")
		if !ok {
			t.Errorf("signet %s --help has no example", name)
			return
		}
		examples, _, _ := strings.Cut(rest, "\n\n")
		if !strings.Contains(examples, "signet "+name) {
			t.Errorf("the examples of signet %s are of something else: %s", name, examples)
		}
		// Flags that examples use exist.
		for _, flag := range regexp.MustCompile(` (--?[a-z][a-z-]*)`).FindAllStringSubmatch(examples, -1) {
			if !regexp.MustCompile(`(?m)^ +(-[a-z], )?` + flag[1] + `\b|^ +` + flag[1] + `, `).MatchString(text) {
				t.Errorf("an example of signet %s uses %s, which it doesn't have", name, flag[1])
			}
		}
	})
	want := strings.Split("agent ban,agent list,agent status,agent unban,ca list,ca show,ca taint,check,cluster init,cluster install,cluster show,config validate,config vault-policy,config view,identity ban,identity list,identity unban,join-token create,join-token list,join-token revoke,"+
		"log find,log prove,log show,log verify,registration apply,registration list,registration why,root init,root show,root sign,"+
		"rotation abort,rotation advance,rotation plan,rotation report,rotation start,rotation status,serve,"+
		"svid fetch,svid inspect,svid verify,svid watch,trust add,trust export,trust list,trust remove,trust republish,version", ",")
	if slices.Sort(commands); !slices.Equal(commands, want) {
		t.Errorf("commands are %q, want %q", commands, want)
	}
	for _, args := range [][]string{{"help", "exit-codes"}, {"exit-codes", "--help"}} {
		r := execute(t, scratch, nil, args...)
		for i, meaning := range []string{"yes", "no", "could not tell"} {
			if !strings.Contains(r.out, fmt.Sprintf("  %d   %s", i, meaning)) {
				t.Error(r)
			}
		}
	}
	for _, args := range [][]string{{"nonsense"}, {"root", "sing"}, {"log", "nonsense"}, {"serve"}, {"serve", "--nonsense"}, {"version", "extra"}, {"svid", "verify"}, {"registration", "nonsense"}} {
		r := execute(t, scratch, nil, args...)
		if r.code != 2 || r.out != "" || !strings.HasPrefix(r.err, "signet: ") {
			t.Error(r)
		}
	}
}

func TestShellsComplete(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		r := execute(t, scratch, nil, "completion", shell)
		if r.code != 0 || len(r.out) < 1000 {
			t.Error(r)
		}
		if bash, err := exec.LookPath("bash"); shell == "bash" && err == nil {
			cmd := exec.Command(bash, "-n")
			cmd.Stdin = strings.NewReader(r.out)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("bash does not take its completion: %v: %s", err, out)
			}
		}
	}
	w := newWorld(t, "")
	w.serve(t)
	w.apply(t, "registrations:\n  - { name: me, spiffe_id: spiffe://example.org/me, agents: [node-1], selectors: ['unix:uid:1'] }\n")
	for line, want := range map[string]string{
		"version -o ": "json", "log find --kind ": "certificate-issued", "join-token ": "revoke", "registration list --config east/server.yaml --agent ": "node-1",
	} {
		changesNothing(t, w.Dir, func() (r ran) {
			// Who presses a key waits 2 s at the most, and a busy machine may need them.
			until(t, fmt.Sprintf("%q completes to %s", line, want), time.Minute, func() error {
				if r = w.run(t, append([]string{"__complete"}, strings.Split(line, " ")...)...); !strings.Contains(r.out, want) {
					return fmt.Errorf("%v", r)
				}
				return nil
			})
			return r
		})
	}
}
