package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/rotation"
)

func (c *cli) rotationCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotation",
		Short: "Replace intermediates and roots while everything runs",
		Long: `Intermediates and roots go through prepared, published, active, retired and removed. The server takes each step as soon
as nothing is broken by it: before anything is signed under a root, the agents of every cluster must have that root.

A root is replaced like this, with no restart and no pause:

  signet root init --dir root-2 …                      # a new root, in a folder of its own
  signet rotation start root --root root-2/root.pem …  # in each cluster: publishes it, asks for an intermediate
  signet root sign --dir root-2 …                      # signs the requests
  signet cluster install --chain …                     # in each cluster: the server switches when it may
  signet rotation status                               # says what it waits for, until the old root is gone

Clusters under the same roots tell each other how far they are by signed reports, which are carried by hand:
signet rotation report there, signet rotation advance --report here.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(c.rotationPlanCommand(), c.rotationStartCommand(), c.rotationStatusCommand(), c.rotationAdvanceCommand(),
		c.rotationAbortCommand(), c.rotationReportCommand())
	return cmd
}

// rotation calls the running server of a configuration about its CAs.
func (c *cli) rotation(ctx context.Context, configFile string, call func(context.Context, adminv1.RotationClient) error) error {
	cfg, err := config.LoadServer(configFile)
	if err != nil {
		return err
	}
	return c.rotationOf(ctx, cfg, configFile, call)
}

func (c *cli) rotationOf(ctx context.Context, cfg *config.Server, configFile string, call func(context.Context, adminv1.RotationClient) error) error {
	conn, err := dialAdmin(ctx, cfg.AdminSocket, "server", "signet serve --config "+configFile)
	if err != nil {
		return err
	}
	defer conn.Close()
	return answered(call(ctx, adminv1.NewRotationClient(conn)))
}

// completeAuthorities completes the ID of a CA that fits.
func (c *cli) completeAuthorities(fits func(*adminv1.AuthorityInfo) bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		path, err := cmd.Flags().GetString("config")
		if err != nil || path == "" || len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
		defer cancel()
		var found []string
		_ = c.rotation(ctx, path, func(ctx context.Context, r adminv1.RotationClient) error {
			all, err := r.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
			for _, a := range all.GetAuthorities() {
				if fits(a) {
					found = append(found, a.Id+"\t"+a.State)
				}
			}
			return err
		})
		return found, cobra.ShellCompDirectiveNoFileComp
	}
}

func notRemoved(a *adminv1.AuthorityInfo) bool { return a.State != string(ca.Removed) }

func isRoot(a *adminv1.AuthorityInfo) bool { return a.Kind == ca.KindRoot }

func dryRunFlag(cmd *cobra.Command, dryRun *bool) {
	cmd.Flags().BoolVar(dryRun, "dry-run", false, "say what would be and change nothing")
}

// stepShown is one move of one CA.
type stepShown struct {
	// Authority is empty for one that is to be made.
	Authority string      `json:"authority"`
	Kind      string      `json:"kind"`
	From      string      `json:"from,omitempty"`
	To        string      `json:"to"`
	Because   string      `json:"because"`
	Ready     bool        `json:"ready"`
	At        *time.Time  `json:"at,omitempty"`
	Waits     []waitShown `json:"waits"`
	// Assumed is what a plan takes for granted.
	Assumed []assumedShown `json:"assumed,omitempty"`
}

type assumedShown struct {
	Code string `json:"code"`
	For  string `json:"for"`
}

type waitShown struct {
	Code     string     `json:"code"`
	For      string     `json:"for"`
	Until    *time.Time `json:"until,omitempty"`
	Missing  []string   `json:"missing"`
	Forcible bool       `json:"forcible"`
}

func describeSteps(steps []*adminv1.RotationStep) []stepShown {
	list := []stepShown{}
	for _, m := range steps {
		s := stepShown{
			Authority: m.Authority, Kind: m.Kind, From: m.From, To: m.To, Because: m.Because, Ready: len(m.Waits) == 0, At: timeOf(m.At),
			Waits: []waitShown{},
		}
		for _, w := range m.Waits {
			s.Waits = append(s.Waits, waitShown{
				Code: w.Code, For: printableText(w.For), Until: timeOf(w.Until), Missing: printableTexts(w.Missing), Forcible: w.Forcible,
			})
		}
		for _, w := range m.Assumed {
			s.Assumed = append(s.Assumed, assumedShown{w.Code, printableText(w.For)})
		}
		list = append(list, s)
	}
	return list
}

// describePlan is describeSteps for a plan. Ready is what nothing and nobody keeps waiting: those steps come first.
func describePlan(steps []*adminv1.RotationStep, now time.Time) []stepShown {
	list := describeSteps(steps)
	ready := true
	for i, s := range list {
		ready = ready && s.Ready && len(s.Assumed) == 0 && (s.At == nil || !s.At.After(now))
		list[i].Ready = ready
	}
	return list
}

// describeNext is describeSteps where no server is asked.
func describeNext(steps []rotation.Step) []stepShown {
	list := []stepShown{}
	for _, m := range steps {
		s := stepShown{
			Authority: m.Authority, Kind: m.Kind, From: string(m.From), To: string(m.To), Because: m.Because, Ready: len(m.Waits) == 0, Waits: []waitShown{},
		}
		for _, w := range m.Waits {
			shown := waitShown{Code: string(w.Code), For: w.For, Missing: w.Missing, Forcible: w.Code.Forcible()}
			if until := w.Until; !until.IsZero() {
				shown.Until = &until
				if s.At == nil || until.After(*s.At) {
					s.At = &until
				}
			}
			s.Waits = append(s.Waits, shown)
		}
		list = append(list, s)
	}
	return list
}

func printableTexts(texts []string) []string {
	list := []string{}
	for _, t := range texts {
		list = append(list, printableText(t))
	}
	return list
}

// what is the step in a few words.
func (s stepShown) what() string {
	switch {
	case s.Authority == "":
		return "a new " + s.Kind + " → " + s.To
	case s.From == "":
		return s.Authority + " → " + s.To
	}
	return s.Authority + " " + s.From + " → " + s.To
}

// name is the step for -o name.
func (s stepShown) name() string {
	return "step/" + strings.ReplaceAll(cmp.Or(s.Authority, s.Kind), " ", "-") + ":" + s.To
}

// terminalWidth is what texts for people are laid out for.
const terminalWidth = 100

// folded writes a text in lines of at most terminalWidth, each behind the indent.
func folded(w io.Writer, first, indent, text string) {
	line, used := first, len([]rune(first))
	empty := true
	for _, word := range strings.Fields(text) {
		n := len([]rune(word))
		if !empty && used+1+n > terminalWidth {
			fmt.Fprintln(w, line)
			line, used, empty = indent, len([]rune(indent)), true
		}
		if !empty {
			line += " "
			used++
		}
		line += word
		used += n
		empty = false
	}
	fmt.Fprintln(w, line)
}

// some names the first few of many.
func some(names []string) string {
	return someOf(names, len(names))
}

// someOf names those of all that are known, as far as they fit.
func someOf(names []string, all int) string {
	const most = 8
	names = names[:min(len(names), most)]
	if len(names) == all {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names, ", "), all-len(names))
}

// printSteps writes steps for people, each with what it waits for.
func printSteps(w io.Writer, steps []stepShown, now time.Time) {
	for _, s := range steps {
		when := "now"
		switch at := s.At; {
		case !s.Ready && slices.ContainsFunc(s.Waits, func(w waitShown) bool { return w.Until == nil }):
			when = "waits"
		case at != nil && (!s.Ready || !now.IsZero() && at.Sub(now) > time.Minute):
			when = moment(*at, now)
		case !s.Ready:
			when = "later"
		}
		folded(w, "  ", "    ", s.what()+", "+when+": "+s.Because)
		for _, wait := range s.Waits {
			text := wait.For
			if len(wait.Missing) > 0 {
				text += ": " + some(wait.Missing)
			}
			if wait.Forcible {
				text += " (--force overrides this)"
			}
			folded(w, "    - ", "      ", text)
		}
	}
}

// printPlan writes the steps of a plan for people, each with what is assumed for it.
func printPlan(w io.Writer, steps []stepShown, now time.Time) {
	for _, s := range steps {
		when := "then"
		switch {
		case s.Ready:
			when = "now"
		case s.At != nil && s.At.Sub(now) > time.Minute:
			when = moment(*s.At, now)
		}
		folded(w, "  ", "    ", s.what()+", "+when+": "+s.Because)
		for _, a := range s.Assumed {
			folded(w, "    - ", "      ", "assumed: "+a.For)
		}
	}
}

// moment is a time in one word, relative to now unless that is zero.
func moment(t, now time.Time) string {
	if now.IsZero() {
		return clock(t)
	}
	d := t.Sub(now)
	text := coarse(d.Abs())
	if d > 0 {
		return "in " + text
	}
	return text + " ago"
}

func momentOf(t *time.Time, now time.Time) string {
	if t == nil {
		return ""
	}
	return moment(*t, now)
}

// coarse is a span in its largest unit.
func coarse(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d >= 2*day:
		return strconv.FormatInt(int64(d/day), 10) + "d"
	case d >= 2*time.Hour:
		return strconv.FormatInt(int64(d/time.Hour), 10) + "h"
	case d >= 2*time.Minute:
		return strconv.FormatInt(int64(d/time.Minute), 10) + "m"
	}
	return strconv.FormatInt(int64(d/time.Second), 10) + "s"
}

// stepList is a plan.
type stepList []stepShown

func (stepList) columns() []string { return nil }
func (stepList) rows() [][]string  { return nil }

func (l stepList) names() []string {
	var names []string
	for _, s := range l {
		names = append(names, s.name())
	}
	return names
}

var rotationKinds = []string{ca.KindIntermediate, ca.KindRoot}

func (c *cli) rotationPlanCommand() *cobra.Command {
	var file, format string
	cmd := &cobra.Command{
		Use:   "plan --config FILE [intermediate|root]",
		Short: "Show which steps would come",
		Long: `Shows which steps a rotation of the intermediate or of the root would take, in order, and why; without either, those
that come by themselves, up to the end of a rotation that is under way. Nothing is changed. While the root is being replaced,
plan root shows how that goes on.

The times hold if others do their part at once: the holder of an offline root signs, agents acknowledge a root, other clusters
report. Each step says what of this is assumed for it. With -o json it is in assumed, and ready is true only for what needs
neither that nor time.`,
		Example: `  signet rotation plan --config east.yaml
  signet rotation plan --config east.yaml root
  signet rotation plan --config east.yaml intermediate -o json`,
		Args:      cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs),
		ValidArgs: rotationKinds,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				request := &adminv1.PlanRotationRequest{}
				if len(args) > 0 {
					request.Kind = args[0]
				}
				answer, err := r.PlanRotation(ctx, request)
				if err != nil {
					return err
				}
				now := time.Now()
				steps := stepList(describePlan(answer.Steps, now))
				if format != "table" && format != "wide" {
					return c.show(format, steps)
				}
				if len(steps) == 0 {
					_, err := fmt.Fprintln(c.out, "nothing is to be done")
					return err
				}
				var b bytes.Buffer
				printPlan(&b, steps, now)
				_, err = c.out.Write(b.Bytes())
				return err
			})
		},
	}
	serverConfigFlag(cmd, &file)
	outputFlag(cmd, &format)
	return cmd
}

// printChange writes what a write has done, or would do: the steps on stdout, what is overridden and what comes next on stderr.
func (c *cli) printChange(r *adminv1.RotationChangeResponse, dryRun bool) error {
	var b bytes.Buffer
	for _, x := range r.Reports {
		b.WriteString(reportTaken(x, dryRun) + "\n")
	}
	for _, line := range did(r.Done, describeSteps(r.Taken), r.Requests) {
		b.WriteString(would(dryRun) + line + "\n")
	}
	if !r.Changed {
		b.WriteString("unchanged\n")
	} else if b.Len() == 0 {
		b.WriteString(would(dryRun) + "changed\n")
	}
	if _, err := c.out.Write(b.Bytes()); err != nil {
		return err
	}
	c.talkOfChange(r, dryRun)
	return nil
}

func would(dryRun bool) string {
	if dryRun {
		return "would be: "
	}
	return ""
}

// did is what a write has done, or would do, one a line: what was asked for, then the steps that followed.
func did(done []string, taken []stepShown, requests []*adminv1.PendingRequest) []string {
	lines := printableTexts(done)
	for _, s := range taken {
		lines = append(lines, s.did(requests))
	}
	return lines
}

// did is what a step has done. One that makes an intermediate is a request, whose key is told where somebody has to carry it.
func (s stepShown) did(requests []*adminv1.PendingRequest) string {
	if s.From != "" || s.Kind != ca.KindIntermediate {
		return s.what()
	}
	if s.Authority == "" {
		return "a new intermediate requested (its key would be made)"
	}
	for _, p := range requests {
		if p.Authority == s.Authority {
			return s.Authority + " requested, key " + p.KeyFingerprint
		}
	}
	return s.Authority + " requested"
}

// reportTaken is what became of a report.
func reportTaken(r *adminv1.ReportTaken, dryRun bool) string {
	of, made := "report of "+r.Cluster, clock(r.At.AsTime())
	switch {
	case r.Held == nil:
		return would(dryRun) + of + " taken, made at " + made
	case r.Held.AsTime().Equal(r.At.AsTime()):
		return of + " is held already, made at " + made
	}
	return of + " ignored: made at " + made + ", older than the one held, of " + clock(r.Held.AsTime())
}

func (c *cli) talkOfChange(r *adminv1.RotationChangeResponse, dryRun bool) {
	for _, f := range r.Forced {
		folded(c.err, "forced: ", "  ", printableText(f))
	}
	if len(r.Next) > 0 {
		fmt.Fprintln(c.err, "next:")
		printSteps(c.err, describeSteps(r.Next), time.Now())
	}
	if dryRun {
		fmt.Fprintln(c.err, "this was a dry run: nothing is changed")
	}
}

func (c *cli) rotationStartCommand() *cobra.Command {
	var file, rootFile, fingerprint, out string
	var successors uint32
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "start --config FILE intermediate|root",
		Short: "Start replacing the intermediate or the root",
		Long: `start intermediate makes the key of a successor, and the request for its certificate, or takes the successor that stands
ready; it takes over as soon as it is signed and may, instead of when its predecessor is old. Where those that stand ready
begin later, one more is requested, and they keep their turns.

start root begins to trust a new root, marks the one in use as leaving, and makes a request for an intermediate under the
new one. The fingerprint must have come from the new root's holder by another way than the file. While one new root is not
in use yet, another is refused: turn the first back with signet rotation abort. Successors that stand ready under the old root
end with the switch to the new one, which it says; they are kept until the old root is removed, and an abort brings them back.

The requests go to stdout, or with --csr-out to a file; then stdout gets the fingerprints of their keys, one a line.
signet root sign wants both. With --successors several are requested at once, to be signed in one ceremony; the command for it
is printed with a --stagger by which each takes over from the one before.
Starting again what has been started changes nothing and prints the same requests. Where there is none to print, --csr-out is
refused (exit status 1): an upstream authority signs by itself, or with rotation.automatic: false the request comes with
signet rotation advance, and signet ca show prints it.`,
		Example: `  signet rotation start --config east.yaml intermediate --csr-out east-2.csr.pem
  signet rotation start --config east.yaml root --root root-2.pem --fingerprint SHA256:AB:CD:… --csr-out east-2.csr.pem
  signet rotation start --config east.yaml intermediate --successors 4 --csr-out east.csr.pem
  signet rotation start --config east.yaml root --root root-2.pem --fingerprint SHA256:AB:CD:… --dry-run`,
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: rotationKinds,
		RunE: func(cmd *cobra.Command, args []string) error {
			request := &adminv1.StartRotationRequest{Kind: args[0], Successors: successors, DryRun: dryRun, RootFingerprint: fingerprint}
			switch {
			case successors == 0:
				return errors.New("rotation start: --successors 0 would request nothing: give 1 or more")
			case args[0] == ca.KindRoot && successors > 1:
				return errors.New("rotation start root: --successors is for start intermediate: one intermediate under the new root is requested; ask for more when it is in use")
			case args[0] == ca.KindIntermediate && (rootFile != "" || fingerprint != ""):
				return errors.New("rotation start intermediate: --root and --fingerprint are for start root: the intermediate stays under the root that is in use")
			case args[0] == ca.KindRoot && rootFile == "":
				return errors.New("rotation start root: give --root, the certificate of the new root, which `signet root init` made as root.pem")
			case args[0] == ca.KindRoot && fingerprint == "":
				return errors.New("rotation start root: give --fingerprint, which the new root's holder has told you; without it a root swapped on its way would be trusted")
			case args[0] == ca.KindRoot:
				if _, err := ca.ParseFingerprint(fingerprint); err != nil {
					return fmt.Errorf("--fingerprint: %w", err)
				}
				var err error
				if request.Root, err = c.readRoot(rootFile); err != nil {
					return err
				}
			}
			cfg, err := config.LoadServer(file)
			if err != nil {
				return err
			}
			return c.rotationOf(cmd.Context(), cfg, file, func(ctx context.Context, r adminv1.RotationClient) error {
				if out != "" && !dryRun {
					if err := mayRequest(ctx, r, request, cfg.Rotation.Automatic); err != nil {
						return err
					}
				}
				answer, err := r.StartRotation(ctx, request)
				if err != nil {
					return err
				}
				if dryRun {
					for _, p := range answer.Requests {
						fmt.Fprintf(c.err, "waiting: %s was requested before, key %s\n", p.Authority, p.KeyFingerprint)
					}
				}
				if dryRun || len(answer.Requests) == 0 {
					return c.printChange(answer, dryRun)
				}
				root := "the root"
				if args[0] == ca.KindRoot {
					root = "the new root"
				}
				return c.printRequests(root, cfg.Cluster, answer, out)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	f := cmd.Flags()
	f.StringVar(&rootFile, "root", "", "certificate of the new root, PEM, or - for stdin")
	f.StringVar(&fingerprint, "fingerprint", "", "fingerprint of the new root, from its holder")
	f.Uint32Var(&successors, "successors", 1, "how many intermediates shall stand ready or be requested")
	f.StringVar(&out, "csr-out", "", "write the certificate requests to this file")
	_ = cmd.MarkFlagFilename("root", "pem")
	dryRunFlag(cmd, &dryRun)
	return cmd
}

// mayRequest refuses to start what leaves no request for a file.
func mayRequest(ctx context.Context, r adminv1.RotationClient, request *adminv1.StartRotationRequest, automatic bool) error {
	dry := proto.CloneOf(request)
	dry.DryRun = true
	answer, err := r.StartRotation(ctx, dry)
	if err != nil {
		return err
	}
	why := "nothing is requested now, and nothing waits for a signature: leave it out, and see signet rotation status for what comes"
	switch {
	case answer.Upstream:
		why = "there is nothing to carry, because the upstream authority of this cluster signs by itself: leave it out"
	case answer.Requested > 0 || len(answer.Requests) > 0:
		return nil
	case !automatic:
		why = "nothing is requested now, because with rotation.automatic: false each step waits for signet rotation advance: leave it out, advance, and take the request from signet ca show"
	}
	return no("--csr-out: %s; nothing is changed", why)
}

// printRequests writes the requests of a rotation as `cluster init` writes its one.
func (c *cli) printRequests(root, cluster string, r *adminv1.RotationChangeResponse, file string) error {
	var requests, keys bytes.Buffer
	var what facts
	var prints []string
	for _, p := range r.Requests {
		requests.Write(p.Csr)
		fmt.Fprintln(&keys, p.KeyFingerprint)
		prints = append(prints, p.KeyFingerprint)
		what = append(what, [2]string{"key of " + p.Authority, p.KeyFingerprint})
	}
	data := requests.Bytes()
	if file != "" {
		if err := durable.WriteFile(file, data, 0o644); err != nil {
			return err
		}
		what = append(what, [2]string{"requests", file})
		data = keys.Bytes()
	}
	for _, line := range did(r.Done, describeSteps(r.Taken), r.Requests) {
		fmt.Fprintln(c.err, line)
	}
	if err := what.print(c.err); err != nil {
		return err
	}
	c.talkOfChange(r, false)
	turns := ""
	if r.Stagger != nil {
		turns = " --life " + lifeFlag(r.Life.AsDuration()) + " --stagger " + lifeFlag(r.Stagger.AsDuration())
	}
	c.hintSign(root, cluster, file, turns, prints...)
	_, err := c.out.Write(data)
	return err
}

// readRoot reads the one certificate in a file, as DER.
func (c *cli) readRoot(path string) ([]byte, error) {
	text, err := c.readInput(path, "root certificate", maxChainFile)
	if err != nil {
		return nil, err
	}
	chain, err := ca.ParseChain(text)
	if err != nil {
		return nil, no("%s: %w", path, err)
	}
	if len(chain) != 1 || !selfIssued(chain[0]) {
		return nil, no("%s holds no root alone: give the file root.pem that `signet root init` made, with nothing else in it", path)
	}
	return chain[0].Raw, nil
}

func selfIssued(cert *x509.Certificate) bool { return bytes.Equal(cert.RawIssuer, cert.RawSubject) }

// maxReport bounds a signed report, in bytes.
const maxReport = 1 << 20

func (c *cli) rotationAdvanceCommand() *cobra.Command {
	var file string
	var reports []string
	var force, dryRun bool
	cmd := &cobra.Command{
		Use:   "advance --config FILE [ID]",
		Short: "Take in reports, then every step that can be taken",
		Long: `Takes in the reports of other clusters, all that are given or none, then takes every step that can be taken; with the ID of
a CA, that CA's alone.
The server does the same by itself unless rotation.automatic is false; then this is how steps are taken.

--force takes the next step of the CA although agents have not acknowledged it or clusters have not reported. What that
breaks is said, and written in the audit log. Try it with --dry-run first. Times, signatures and lives can't be forced.

Exit status: 0 steps were taken, or there are none; 1 a report is refused, or the step of the CA still waits; 2 it could not
be told, for instance since a file can't be read.`,
		Example: `  signet rotation advance --config east.yaml --report west.report --report north.report
  signet rotation advance --config east.yaml intermediate-2 --dry-run
  signet rotation advance --config east.yaml intermediate-2 --force`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: c.completeAuthorities(notRemoved),
		RunE: func(cmd *cobra.Command, args []string) error {
			request := &adminv1.AdvanceRotationRequest{Force: force, DryRun: dryRun}
			if len(args) > 0 {
				request.Authority = args[0]
			} else if force {
				return errors.New("rotation advance: --force needs the ID of the CA whose step is forced; see signet rotation status")
			}
			for _, path := range reports {
				report, err := c.readInput(path, "report", maxReport)
				if err != nil {
					return err
				}
				if path == "-" {
					path = "stdin"
				}
				request.Reports = append(request.Reports, report)
				request.ReportNames = append(request.ReportNames, strings.ToValidUTF8(path, "?"))
			}
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				answer, err := r.AdvanceRotation(ctx, request)
				if err != nil {
					return err
				}
				if err := c.printChange(answer, dryRun); err != nil {
					return err
				}
				moved := slices.ContainsFunc(answer.Taken, func(s *adminv1.RotationStep) bool { return s.Authority == request.Authority })
				for _, s := range answer.Next {
					if s.Authority == request.Authority && s.Authority != "" && !moved {
						return no("%s can't go from %s to %s yet", s.Authority, s.From, s.To)
					}
				}
				return nil
			})
		},
	}
	serverConfigFlag(cmd, &file)
	cmd.Flags().StringArrayVar(&reports, "report", nil, "signed report of another cluster, or - for stdin; may be repeated")
	cmd.Flags().BoolVar(&force, "force", false, "take the step although acknowledgements or reports are missing")
	_ = cmd.MarkFlagFilename("report", "report")
	dryRunFlag(cmd, &dryRun)
	return cmd
}

func (c *cli) rotationAbortCommand() *cobra.Command {
	var file string
	var force, dryRun bool
	cmd := &cobra.Command{
		Use:   "abort --config FILE ID",
		Short: "Turn a rotation back",
		Long: `Turns back what was started with a CA. One that was never used is dropped; an intermediate that has taken over gives back
to the one before it; a new root leaves in place of the old one; a root that is leaving stays. With a root come back the
successors that stood ready under it.

What can't be turned back is refused (exit status 1). Where only acknowledgements or reports are missing, --force does it
nevertheless; what that breaks is said, and written in the audit log.`,
		Example: `  signet rotation abort --config east.yaml intermediate-2 --dry-run
  signet rotation abort --config east.yaml intermediate-2`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeAuthorities(notRemoved),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				answer, err := r.AbortRotation(ctx, &adminv1.AbortRotationRequest{Authority: args[0], Force: force, DryRun: dryRun})
				if err != nil {
					return err
				}
				return c.printChange(answer, dryRun)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	cmd.Flags().BoolVar(&force, "force", false, "turn it back although acknowledgements or reports are missing")
	dryRunFlag(cmd, &dryRun)
	return cmd
}

func (c *cli) rotationReportCommand() *cobra.Command {
	var file, out string
	cmd := &cobra.Command{
		Use:   "report --config FILE",
		Short: "Write what this cluster tells the others",
		Long: `Writes how far this cluster is: which roots how many of its agents believe, under which it signs, which CAs are tainted.
It is signed with the key of the cluster's audit log. Carry it to the other clusters, whose files name this cluster and its
log verifier key under rotation.peers: signet rotation advance --report FILE.

What it promises holds for rotation.report_life of this cluster, which it says, and not longer than the others' own.`,
		Example: `  signet rotation report --config west.yaml --out west.report
  signet rotation report --config west.yaml > west.report`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				answer, err := r.ReportRotation(ctx, &adminv1.ReportRotationRequest{})
				if err != nil {
					return err
				}
				if out == "-" {
					_, err = c.out.Write(answer.Report)
					return err
				}
				return durable.WriteFile(out, answer.Report, 0o644)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&out, "out", "-", "file for the report; - is stdout")
	_ = cmd.MarkFlagFilename("out", "report")
	return cmd
}
