package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
)

// rotationShown is where a cluster's CAs stand, as -o json has it.
type rotationShown struct {
	Cluster string `json:"cluster"`
	// Automatic is false where steps are taken by hand only.
	Automatic   bool             `json:"automatic"`
	Authorities []authorityShown `json:"authorities"`
	Next        []stepShown      `json:"next"`
	Clusters    []clusterTrusts  `json:"clusters"`
	Tainted     []taintShown     `json:"tainted"`
	// Stopped is missing while leaves can be made.
	Stopped *stoppedShown `json:"issuing_stopped,omitempty"`
	// Reissue is missing when nothing is replaced after a taint.
	Reissue *reissueShown `json:"reissue,omitempty"`
}

type clusterTrusts struct {
	Cluster string `json:"cluster"`
	// Reported is missing for a cluster that never has.
	Reported *time.Time   `json:"reported,omitempty"`
	Roots    []rootTrusts `json:"roots"`
}

type rootTrusts struct {
	ID          string     `json:"id"`
	Trusting    uint32     `json:"trusting"`
	Validators  uint32     `json:"validators"`
	Missing     []string   `json:"missing"`
	Leaving     bool       `json:"leaving"`
	Signing     bool       `json:"signing"`
	LeavesUntil *time.Time `json:"leaves_until,omitempty"`
	Holding     uint32     `json:"holding"`
}

type taintShown struct {
	ID            string     `json:"id"`
	Root          string     `json:"root"`
	Cluster       string     `json:"cluster"`
	Since         time.Time  `json:"since"`
	AcceptedUntil *time.Time `json:"accepted_until,omitempty"`
	// Accepting counts trust bundles, agents, and clusters of which it is not known.
	Accepting  uint32            `json:"accepting"`
	AcceptedBy []acceptanceShown `json:"accepted_by"`
	Advice     string            `json:"advice,omitempty"`
}

type acceptanceShown struct {
	Cluster string `json:"cluster"`
	Bundle  bool   `json:"bundle"`
	Agents  uint32 `json:"agents"`
	// Named are agents of this cluster, those that were away longest first.
	Named []acceptingShown `json:"named"`
	// Reported is missing for a cluster that never has.
	Reported *time.Time `json:"reported,omitempty"`
	Unknown  bool       `json:"unknown"`
}

type acceptingShown struct {
	Agent string `json:"agent"`
	// LastHeard is missing for one that is connected.
	LastHeard *time.Time `json:"last_heard,omitempty"`
	// Unheard since the server's start: LastHeard is its last certificate.
	Unheard bool `json:"unheard,omitempty"`
}

type reissueShown struct {
	Holding       uint32     `json:"holding"`
	Agents        uint32     `json:"agents"`
	HoldingAgents []string   `json:"holding_agents"`
	Until         *time.Time `json:"until,omitempty"`
	// Tainted are the issuers whose leaves are replaced; Exposed those that have to go only since their root has.
	Tainted []string `json:"tainted"`
	Exposed []string `json:"exposed"`
}

func describeRotation(r *adminv1.RotationStatusResponse) (rotationShown, error) {
	s := rotationShown{
		Cluster: r.Cluster, Automatic: r.Automatic, Next: describeSteps(r.Steps), Clusters: []clusterTrusts{}, Tainted: []taintShown{}, Stopped: describeStopped(r.Stopped),
	}
	var err error
	if s.Authorities, err = describeAuthorities(r.Authorities, s.Stopped); err != nil {
		return s, err
	}
	for _, m := range r.Clusters {
		t := clusterTrusts{Cluster: m.Cluster, Reported: timeOf(m.At), Roots: []rootTrusts{}}
		for _, x := range m.Roots {
			t.Roots = append(t.Roots, rootTrusts{
				ID: printableText(x.Id), Trusting: x.Trusting, Validators: x.Validators, Missing: printableTexts(x.Missing), Leaving: x.Leaving,
				Signing: x.Signing, LeavesUntil: timeOf(x.LeavesUntil), Holding: x.Holding,
			})
		}
		s.Clusters = append(s.Clusters, t)
	}
	for _, m := range r.Tainted {
		t := taintShown{
			ID: printableText(m.Id), Root: printableText(m.Root), Cluster: m.Cluster, Since: m.Since.AsTime(), AcceptedUntil: timeOf(m.AcceptedUntil),
			Accepting: m.Accepting, AcceptedBy: []acceptanceShown{}, Advice: m.Advice,
		}
		for _, a := range m.AcceptedBy {
			by := acceptanceShown{Cluster: a.Cluster, Bundle: a.Bundle, Agents: a.Agents, Named: []acceptingShown{}, Reported: timeOf(a.Reported), Unknown: a.Unknown}
			for _, x := range a.Named {
				by.Named = append(by.Named, acceptingShown{printableText(x.Agent), timeOf(x.LastHeard), x.Unheard})
			}
			t.AcceptedBy = append(t.AcceptedBy, by)
		}
		s.Tainted = append(s.Tainted, t)
	}
	if m := r.Reissue; m != nil {
		s.Reissue = &reissueShown{
			Holding: m.Holding, Agents: m.Agents, HoldingAgents: printableTexts(m.HoldingAgents), Until: timeOf(m.Until),
			Tainted: printableTexts(m.Tainted), Exposed: printableTexts(m.Exposed),
		}
	}
	return s, nil
}

func (rotationShown) columns() []string { return nil }
func (rotationShown) rows() [][]string  { return nil }

func (s rotationShown) names() []string {
	var names []string
	for _, step := range s.Next {
		names = append(names, step.name())
	}
	return names
}

// accepted is how many tainted CAs have forged certificates that somebody would accept.
func (s rotationShown) accepted() int {
	n := 0
	for _, t := range s.Tainted {
		if t.Accepting > 0 {
			n++
		}
	}
	return n
}

// print writes the status for people; a zero now leaves out what is said relative to it.
func (s rotationShown) print(w io.Writer, wide bool, now time.Time) error {
	how := "each step is taken as soon as it can be"
	if !s.Automatic {
		how = "steps are taken by signet rotation advance only (rotation.automatic is false)"
	}
	fmt.Fprintf(w, "cluster %s: %s\n", s.Cluster, how)

	if s.Stopped != nil {
		fmt.Fprint(w, "\nSTOPPED\n")
		folded(w, "  ", "    ", s.Stopped.text())
		if s.Stopped.Mend != "" {
			folded(w, "    - ", "      ", "to do: "+s.Stopped.Mend)
		}
	}

	fmt.Fprint(w, "\nCAs\n")
	format := "table"
	if wide {
		format = "wide"
	}
	var b bytes.Buffer
	if err := (&cli{out: &b}).show(format, authorityList{s.Authorities, now}); err != nil {
		return err
	}
	indent(w, b.String())

	fmt.Fprint(w, "\nNEXT\n")
	if len(s.Next) == 0 {
		fmt.Fprintln(w, "  nothing is to be done")
	}
	printSteps(w, s.Next, now)

	fmt.Fprint(w, "\nCLUSTERS\n")
	b.Reset()
	tw := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "CLUSTER\tREPORT\tROOT\tTRUSTED BY\tUSE\tMISSING")
	for i, t := range s.Clusters {
		report := "never"
		switch {
		case i == 0:
			report = "this one"
		case t.Reported != nil:
			report = moment(*t.Reported, now)
		}
		name := t.Cluster
		if len(t.Roots) == 0 {
			fmt.Fprintf(tw, "%s\t%s\t-\t-\t-\t-\n", name, report)
		}
		for _, r := range t.Roots {
			fmt.Fprintf(tw, "%s\t%s\t%s\t%d of %d\t%s\t%s\n", name, report, r.ID, r.Trusting, r.Validators, cmp.Or(r.use(wide), "-"), cmp.Or(few(r.Missing, wide), "-"))
			name, report = "", ""
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	indent(w, b.String())

	if len(s.Tainted) > 0 {
		fmt.Fprint(w, "\nTAINTED\n")
	}
	for _, t := range s.Tainted {
		t.print(w, now)
	}
	if r := s.Reissue; r != nil {
		fmt.Fprint(w, "\nRE-ISSUE\n")
		text := r.text()
		if r.Until != nil {
			text += ", over " + moment(*r.Until, now)
		}
		if len(r.HoldingAgents) > 0 {
			text += ": " + some(r.HoldingAgents)
		}
		folded(w, "  ", "    ", text)
	}
	return nil
}

// few names one of many, to fit a table.
func few(names []string, all bool) string {
	if all || len(names) <= 1 {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", names[0], len(names)-1)
}

// use is what the cluster does with a root; all of it says how many agents hold what was signed under it.
func (r rootTrusts) use(all bool) string {
	var words []string
	if r.Signing {
		words = append(words, "signs")
	}
	if r.Leaving {
		words = append(words, "leaving")
	}
	if all && r.Holding > 0 {
		words = append(words, "held by "+count(r.Holding, "agent"))
	}
	return strings.Join(words, ", ")
}

func indent(w io.Writer, text string) {
	for line := range strings.Lines(text) {
		fmt.Fprint(w, "  ", strings.TrimRight(line, " \n"), "\n")
	}
}

func (t taintShown) print(w io.Writer, now time.Time) {
	text := fmt.Sprintf("%s of cluster %s, under %s, tainted %s: ", t.ID, t.Cluster, t.Root, moment(t.Since, now))
	if t.Accepting == 0 {
		folded(w, "  ", "    ", text+"nobody accepts a forged certificate any more")
	} else {
		text += "FORGED CERTIFICATES ARE ACCEPTED"
		if t.AcceptedUntil != nil {
			text += "; that ends " + moment(*t.AcceptedUntil, now) + " at the latest"
		}
		folded(w, "  ", "    ", text)
		for i, a := range t.AcceptedBy {
			folded(w, "    - ", "      ", a.text(i == 0, now))
		}
	}
	if t.Advice != "" {
		folded(w, "    - ", "      ", "to do: "+t.Advice)
	}
}

// text says who of a cluster accepts it. What is told of another one is as old as its report.
func (a acceptanceShown) text(own bool, now time.Time) string {
	var who []string
	if a.Bundle {
		who = append(who, "its trust bundle, which new agents and exports get")
	}
	away, unheard := 0, 0
	if a.Agents > 0 {
		var names []string
		for _, x := range a.Named {
			if x.LastHeard == nil {
				names = append(names, x.Agent)
				continue
			}
			away++
			heard := "last heard "
			if x.Unheard {
				unheard++
				heard = "not heard since the server's start; its last certificate was made "
			}
			names = append(names, x.Agent+" ("+heard+moment(*x.LastHeard, now)+")")
		}
		agents := count(a.Agents, "agent")
		if len(names) > 0 {
			agents += ": " + someOf(names, int(a.Agents))
		}
		who = append(who, agents)
	}
	text := "cluster " + a.Cluster + ": " + strings.Join(who, "; ")
	switch {
	case a.Unknown && a.Reported == nil:
		return text + "unknown, as it has never reported"
	case a.Unknown && len(who) == 0:
		return text + "unknown, as its report of " + moment(*a.Reported, now) + " does not say how it is now"
	case a.Unknown:
		return text + "; that was reported " + moment(*a.Reported, now) + ", and is not known now"
	case !own:
		text += " (reported " + moment(*a.Reported, now) + ")"
	case away > 0:
		if unheard > 0 {
			text += ". After a server's start agents are back within seconds"
		}
		text += ". One that is not heard may accept it until it is banned: signet agent ban, if it is gone for good"
	}
	return text
}

func count(n uint32, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// text is how far it is.
func (r reissueShown) text() string {
	var issuers []string
	for _, id := range r.Tainted {
		issuers = append(issuers, id+" (tainted)")
	}
	for _, id := range r.Exposed {
		issuers = append(issuers, id+" (under a root that has to go)")
	}
	leaf := "a leaf of " + some(issuers)
	if r.Holding == 0 {
		return "no agent uses " + leaf + " any more"
	}
	return r.progress() + " " + leaf
}

// progress is how many are left.
func (r reissueShown) progress() string {
	use := "use"
	if r.Holding == 1 {
		use = "uses"
	}
	return fmt.Sprintf("%d of %s still %s", r.Holding, count(r.Agents, "agent"), use)
}

func (c *cli) rotationStatusCommand() *cobra.Command {
	var file, format string
	var watch bool
	cmd := &cobra.Command{
		Use:   "status --config FILE",
		Short: "Show where every CA stands and what is waited for",
		Long: `Shows, while nothing can be issued, since when, why, and what helps; the CAs with their states; which steps come next,
what each waits for and who is missing; how many agents of each cluster believe each root, as of its last report; and for each
tainted CA who accepts a forged certificate, until when: trust bundles that hold the root above it, agents that may have it and
are not banned, and clusters of which it is not known.

Exit status: 0 nobody accepts what a tainted CA has signed; 1 somebody does, or may, or nothing can be issued; 2 the server
could not be asked. With --watch it is shown again whenever it has changed, until interrupted, and the exit status is 0.`,
		Example: `  signet rotation status --config east.yaml
  signet rotation status --config east.yaml --watch
  signet rotation status --config east.yaml -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if watch {
				return c.watchRotation(cmd.Context(), file, format)
			}
			s, err := c.rotationStatus(cmd.Context(), file)
			if err != nil {
				return err
			}
			if err := c.showRotation(format, s, time.Now()); err != nil {
				return err
			}
			if n := s.accepted(); n > 0 {
				return no("certificates forged with the key of %s are accepted", count(uint32(n), "tainted CA"))
			}
			if s.Stopped != nil {
				return no("nothing can be issued")
			}
			return nil
		},
	}
	serverConfigFlag(cmd, &file)
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show it again whenever it has changed, until interrupted")
	outputFlag(cmd, &format)
	return cmd
}

func (c *cli) rotationStatus(ctx context.Context, file string) (s rotationShown, err error) {
	err = c.rotation(ctx, file, func(ctx context.Context, r adminv1.RotationClient) error {
		answer, err := r.RotationStatus(ctx, &adminv1.RotationStatusRequest{})
		if err == nil {
			s, err = describeRotation(answer)
		}
		if s.Stopped != nil {
			s.Stopped.Mend = strings.ReplaceAll(s.Stopped.Mend, "--config FILE", "--config "+file)
		}
		return err
	})
	return s, err
}

func (c *cli) showRotation(format string, s rotationShown, now time.Time) error {
	if format != "table" && format != "wide" {
		return c.show(format, s)
	}
	var b bytes.Buffer
	if err := s.print(&b, format == "wide", now); err != nil {
		return err
	}
	_, err := c.out.Write(b.Bytes())
	return err
}

// watchRotation shows the status whenever what people see of it differs. Only the first question must be answered.
func (c *cli) watchRotation(ctx context.Context, file, format string) error {
	var seen []byte
	var lost string
	var bar reissueBar
	if f, ok := c.err.(*os.File); ok && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb" {
		bar.to = f
	}
	defer bar.clear()
	for first := true; ; first = false {
		s, err := c.rotationStatus(ctx, file)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && first:
			return err
		case err != nil:
			if lost != err.Error() {
				lost = err.Error()
				bar.clear()
				fmt.Fprintf(c.err, "%v; trying again\n", err)
			}
		default:
			lost = ""
			var b bytes.Buffer
			// What is said relative to now would change every second.
			if err := s.print(&b, true, time.Time{}); err != nil {
				return err
			}
			if !bytes.Equal(seen, b.Bytes()) {
				bar.clear()
				if seen != nil && (format == "table" || format == "wide") {
					fmt.Fprintf(c.out, "\n--- %s\n", clock(time.Now()))
				}
				seen = b.Bytes()
				if err := c.showRotation(format, s, time.Time{}); err != nil {
					return err
				}
			}
			bar.draw(s.Reissue)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(watchEvery):
		}
	}
}

// reissueBar shows on a terminal how far the re-issue is; elsewhere nothing.
type reissueBar struct {
	to    io.Writer
	shown bool
}

func (b *reissueBar) draw(r *reissueShown) {
	if b.to == nil || r == nil || r.Agents == 0 || r.Holding == 0 {
		b.clear()
		return
	}
	const width = 40
	full := min(int(uint64(width)*uint64(r.Agents-min(r.Holding, r.Agents))/uint64(r.Agents)), width)
	fmt.Fprintf(b.to, "\r[%s%s] %s\x1b[K", strings.Repeat("#", full), strings.Repeat(".", width-full), r.progress()+" a leaf that is to be replaced")
	b.shown = true
}

func (b *reissueBar) clear() {
	if b.shown {
		fmt.Fprint(b.to, "\r\x1b[K")
		b.shown = false
	}
}
