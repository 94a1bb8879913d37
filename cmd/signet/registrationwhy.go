package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
)

func (c *cli) registrationWhyCommand() *cobra.Command {
	var which agentFlags
	var format string
	cmd := &cobra.Command{
		Use:   "why [--config FILE | --state-dir DIR] PID|SPIFFE-ID|NAME",
		Short: "Say which registration gives a process its identity, or what is lacking",
		Long: `Asks an agent of this host.

For a PID: which of the agent's registrations fit the process, the first being its default, and which almost fit and
what the process lacks. The process is looked at in /proc, as it is now. That is for diagnosis only: who really connects
is told by the kernel at the moment it connects.

For a SPIFFE ID or the name of a registration: which processes have it, and which came near: those that are connected,
and those that were refused not long ago.

The exit status is 0 if there is an identity, and 1 if there is none.`,
		Example: `  signet registration why --config node-1.yaml $(pidof envoy)
  signet registration why --config node-1.yaml spiffe://example.org/ns/shop/sa/frontend
  signet registration why --state-dir /var/lib/signet/agent frontend -o json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return which.askAgent(cmd.Context(), func(ctx context.Context, a adminv1.AgentAdminClient) error {
				r, err := a.Why(ctx, whyRequest(args[0]))
				if err != nil {
					return err
				}
				return c.showWhy(format, args[0], describeWhy(r))
			})
		},
	}
	which.add(cmd)
	outputFlag(cmd, &format)
	return cmd
}

func whyRequest(subject string) *adminv1.WhyRequest {
	if pid, err := strconv.ParseUint(subject, 10, 31); err == nil {
		return &adminv1.WhyRequest{Subject: &adminv1.WhyRequest_Pid{Pid: uint32(pid)}}
	}
	if strings.Contains(subject, "://") {
		return &adminv1.WhyRequest{Subject: &adminv1.WhyRequest_SpiffeId{SpiffeId: subject}}
	}
	return &adminv1.WhyRequest{Subject: &adminv1.WhyRequest_Registration{Registration: subject}}
}

// whyShown is the answer as -o json has it.
type whyShown struct {
	Agent string `json:"agent"`
	// Basis is "proc" for a PID, and "connections" otherwise.
	Basis         string                 `json:"basis"`
	Selectors     []string               `json:"selectors,omitempty"`
	Notes         []string               `json:"notes,omitempty"`
	Registrations []whyRegistrationShown `json:"registrations"`
}

type whyRegistrationShown struct {
	Name      string           `json:"name"`
	SPIFFEID  string           `json:"spiffe_id"`
	Selectors []string         `json:"selectors"`
	Priority  int32            `json:"priority"`
	Fits      bool             `json:"fits"`
	Lacking   []string         `json:"lacking,omitempty"`
	Callers   []whyCallerShown `json:"callers,omitempty"`
}

type whyCallerShown struct {
	Instance string   `json:"instance"`
	Socket   string   `json:"socket,omitempty"`
	Fits     bool     `json:"fits"`
	Lacking  []string `json:"lacking,omitempty"`
	Refused  string   `json:"refused,omitempty"`
}

func describeWhy(r *adminv1.WhyResponse) whyShown {
	clean := func(list []string) []string {
		var out []string
		for _, s := range list {
			out = append(out, printableText(s))
		}
		return out
	}
	w := whyShown{Agent: r.Agent, Basis: "connections", Selectors: clean(r.Selectors), Notes: clean(r.Notes), Registrations: []whyRegistrationShown{}}
	if len(r.Selectors)+len(r.Notes) > 0 {
		w.Basis = "proc"
	}
	for _, m := range r.Registrations {
		shown := whyRegistrationShown{
			Name: m.Name, SPIFFEID: m.SpiffeId, Selectors: clean(m.Selectors), Priority: m.Priority, Fits: m.Fits, Lacking: clean(m.Lacking),
		}
		for _, caller := range m.Callers {
			s := whyCallerShown{Instance: printableText(caller.Instance), Socket: caller.Socket, Fits: caller.Fits, Lacking: clean(caller.Lacking)}
			if caller.Refused != nil {
				s.Refused = clock(caller.Refused.AsTime())
			}
			shown.Callers = append(shown.Callers, s)
		}
		w.Registrations = append(w.Registrations, shown)
	}
	return w
}

// fits reports whether there is an identity.
func (w whyShown) fits() bool {
	for _, r := range w.Registrations {
		if r.Fits {
			return true
		}
	}
	return false
}

func (whyShown) columns() []string {
	return []string{"REGISTRATION", "SPIFFE ID", "FITS", "LACKING", "+PRIORITY"}
}

func (w whyShown) rows() [][]string {
	var rows [][]string
	for _, r := range w.Registrations {
		rows = append(rows, []string{r.Name, r.SPIFFEID, yesNo(r.Fits), strings.Join(r.Lacking, " "), strconv.Itoa(int(r.Priority))})
	}
	return rows
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func (w whyShown) names() []string {
	var names []string
	for _, r := range w.Registrations {
		if r.Fits {
			names = append(names, "registration/"+r.Name)
		}
	}
	return names
}

func (c *cli) showWhy(format, subject string, w whyShown) error {
	err := error(nil)
	switch {
	case format != "table" && format != "wide":
		err = c.show(format, w)
	case w.Basis == "proc":
		fmt.Fprintln(c.err, "from /proc, as the process is now; what decides is what the kernel says when it connects")
		if err = w.process(c.out); err == nil && len(w.Registrations) > 0 {
			err = c.show(format, w)
		}
	default:
		err = w.callers(c.out)
	}
	if err != nil {
		return err
	}
	if !w.fits() {
		if w.Basis == "proc" {
			return no("no registration of agent %s fits process %s", w.Agent, subject)
		}
		return no("no process that is connected to agent %s has %s", w.Agent, subject)
	}
	return nil
}

// process prints what a process shows.
func (w whyShown) process(out io.Writer) error {
	var b strings.Builder
	for _, s := range w.Selectors {
		fmt.Fprintf(&b, "shows %s\n", s)
	}
	for _, n := range w.Notes {
		fmt.Fprintf(&b, "but %s\n", n)
	}
	b.WriteString("\n")
	_, err := io.WriteString(out, b.String())
	return err
}

// callers prints who has a registration's identity and who came near it.
func (w whyShown) callers(out io.Writer) error {
	var b strings.Builder
	for _, r := range w.Registrations {
		fmt.Fprintf(&b, "registration/%s gives %s to what shows %s\n", r.Name, r.SPIFFEID, strings.Join(r.Selectors, " "))
		if len(r.Callers) == 0 {
			b.WriteString("  nobody is connected, and nobody was refused not long ago\n")
		}
		for _, caller := range r.Callers {
			fmt.Fprintf(&b, "  %s %s\n", caller.Instance, caller.sentence())
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func (c whyCallerShown) sentence() string {
	state := "is connected"
	if c.Refused != "" {
		state = "was refused at " + c.Refused
	}
	switch {
	case c.Fits && c.Refused == "":
		return state + " and has it"
	case c.Fits:
		return state + " and would have it now"
	case len(c.Lacking) > 0:
		return state + " and lacks " + strings.Join(c.Lacking, " ")
	}
	return fmt.Sprintf("%s by the dedicated socket %s, which serves only registrations that name socket:%s", state, c.Socket, c.Socket)
}
