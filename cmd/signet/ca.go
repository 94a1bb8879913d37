package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
)

func (c *cli) caCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ca",
		Short: "See the roots and intermediates, and say that a key is lost",
		Long: `The CAs of a cluster are the roots that its workloads believe, and the intermediates that sign for it. A root has the same
ID in every cluster. These commands talk to the running server over its admin socket.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(c.caListCommand(), c.caShowCommand(), c.caTaintCommand())
	return cmd
}

// authorityShown is a CA as -o json has it.
type authorityShown struct {
	ID    string    `json:"id"`
	Kind  string    `json:"kind"`
	Root  string    `json:"root,omitempty"`
	State string    `json:"state"`
	Since time.Time `json:"since"`
	// Signing: leaves are signed by it now, or under it. It is false while nothing can be issued.
	Signing        bool       `json:"signing"`
	Wanted         bool       `json:"wanted"`
	NotBefore      *time.Time `json:"not_before,omitempty"`
	NotAfter       *time.Time `json:"not_after,omitempty"`
	Leaving        *time.Time `json:"leaving,omitempty"`
	Tainted        *time.Time `json:"tainted,omitempty"`
	LeavesUntil    *time.Time `json:"leaves_until,omitempty"`
	Subject        string     `json:"subject,omitempty"`
	Serial         string     `json:"serial,omitempty"`
	Fingerprint    string     `json:"fingerprint,omitempty"`
	KeyFingerprint string     `json:"key_fingerprint,omitempty"`
	Key            string     `json:"key,omitempty"`

	chain []*x509.Certificate
	csr   []byte
	// stopped is why it does not sign although its time is now; nil = it does, or it is not its time.
	stopped *stoppedShown
}

// stoppedShown says that nothing can be issued.
type stoppedShown struct {
	// Since is missing where it is not known.
	Since *time.Time `json:"since,omitempty"`
	Why   string     `json:"why"`
	// Mend is a command that helps.
	Mend string `json:"mend,omitempty"`
}

func describeStopped(m *adminv1.IssuingStopped) *stoppedShown {
	if m == nil {
		return nil
	}
	return &stoppedShown{Since: timeOf(m.Since), Why: printableText(m.Why), Mend: printableText(m.Mend)}
}

func (s stoppedShown) text() string {
	since := ""
	if s.Since != nil {
		since = " since " + clock(*s.Since)
	}
	return "NOTHING CAN BE ISSUED" + since + ", because " + s.Why
}

// authorities asks the server for its CAs.
func authorities(ctx context.Context, r adminv1.RotationClient) ([]authorityShown, error) {
	answer, err := r.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
	if err != nil {
		return nil, err
	}
	return describeAuthorities(answer.Authorities, describeStopped(answer.Stopped))
}

// describeAuthorities says which sign as well, or what stops those that should.
func describeAuthorities(list []*adminv1.AuthorityInfo, stopped *stoppedShown) ([]authorityShown, error) {
	signing := map[string]bool{}
	for _, m := range list {
		if m.Kind == ca.KindIntermediate && m.State == string(ca.Active) {
			signing[m.Id], signing[m.Root] = true, true
		}
	}
	all := []authorityShown{}
	for _, m := range list {
		a := authorityShown{
			ID: m.Id, Kind: m.Kind, Root: m.Root, State: m.State, Since: m.Since.AsTime(), Signing: signing[m.Id] && stopped == nil, Wanted: m.Wanted,
			NotBefore: timeOf(m.NotBefore), NotAfter: timeOf(m.NotAfter), Leaving: timeOf(m.Leaving), Tainted: timeOf(m.Tainted),
			LeavesUntil: timeOf(m.LeavesUntil), Key: m.Key, csr: m.Csr,
		}
		if signing[m.Id] {
			a.stopped = stopped
		}
		for _, der := range m.Chain {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, fmt.Errorf("certificate of %s can't be read: %w", m.Id, err)
			}
			a.chain = append(a.chain, cert)
		}
		if len(a.chain) > 0 {
			own := a.chain[0]
			a.Subject, a.Serial = own.Subject.String(), serialOf(own)
			a.Fingerprint, a.KeyFingerprint = ca.CertificateFingerprint(own.Raw), ca.KeyFingerprint(own.RawSubjectPublicKeyInfo)
		} else if request, err := x509.ParseCertificateRequest(m.Csr); err == nil {
			a.Subject, a.KeyFingerprint = request.Subject.String(), ca.KeyFingerprint(request.RawSubjectPublicKeyInfo)
		}
		all = append(all, a)
	}
	return all, nil
}

// stands is the state with what is special about it.
func (a authorityShown) stands() string {
	words := []string{a.State}
	if a.Wanted {
		words = append(words, "wanted")
	}
	if a.Leaving != nil && a.State != string(ca.Removed) {
		words = append(words, "leaving")
	}
	if a.Tainted != nil {
		words = append(words, "TAINTED")
	}
	return strings.Join(words, ", ")
}

// signs is the cell of a table that says whether it signs.
func (a authorityShown) signs() string {
	switch {
	case a.Signing:
		return "yes"
	case a.stopped != nil:
		return "STOPPED"
	}
	return ""
}

// authorityList is CAs as a table; a zero now leaves out what is said relative to it.
type authorityList struct {
	list []authorityShown
	now  time.Time
}

func (authorityList) columns() []string {
	return []string{"ID", "STATE", "SINCE", "SIGNS", "EXPIRES", "ROOT", "+KIND", "+NOT AFTER", "+LEAVES UNTIL", "+SUBJECT", "+KEY", "+FINGERPRINT"}
}

func (l authorityList) rows() [][]string {
	var rows [][]string
	for _, a := range l.list {
		rows = append(rows, []string{
			a.ID, a.stands(), moment(a.Since, l.now), a.signs(), momentOf(a.NotAfter, l.now), a.Root, a.Kind, clockOf(a.NotAfter), clockOf(a.LeavesUntil),
			a.Subject, a.Key, a.Fingerprint,
		})
	}
	return rows
}

func (l authorityList) names() []string {
	var names []string
	for _, a := range l.list {
		names = append(names, "ca/"+a.ID)
	}
	return names
}

func (l authorityList) MarshalJSON() ([]byte, error) { return json.Marshal(l.list) }

func (c *cli) caListCommand() *cobra.Command {
	var file, format string
	cmd := &cobra.Command{
		Use:   "list --config FILE",
		Short: "List the roots and intermediates",
		Long: `Lists all CAs, roots first. STATE is prepared (made), published (agents get it), active (may be used), retired (no longer
used, still believed) or removed; a root that is being replaced is leaving, a CA whose key is lost is TAINTED. SIGNS says
which intermediate signs now, and under which root; STOPPED where nothing can be issued: signet rotation status says why.`,
		Example: `  signet ca list --config east.yaml
  signet ca list --config east.yaml -o wide`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				list, err := authorities(ctx, r)
				if err != nil {
					return err
				}
				return c.show(format, authorityList{list, time.Now()})
			})
		},
	}
	serverConfigFlag(cmd, &file)
	outputFlag(cmd, &format)
	return cmd
}

// caShown is one CA with all of it.
type caShown struct {
	authorityShown
	// Chain and CSR are PEM; the chain begins with its own certificate and ends with the root.
	Chain string `json:"chain,omitempty"`
	CSR   string `json:"csr,omitempty"`
}

func (caShown) columns() []string { return nil }
func (caShown) rows() [][]string  { return nil }
func (s caShown) names() []string { return []string{"ca/" + s.ID} }

func (s caShown) facts(now time.Time) facts {
	f := facts{{"ca", s.ID}, {"kind", s.Kind}, {"state", s.stands() + ", since " + until(&s.Since, now)}}
	signs := "no"
	switch {
	case s.Signing:
		signs = "yes"
	case s.stopped != nil:
		signs += ": " + s.stopped.text()
	}
	f = append(f, [2]string{"signs", signs})
	for _, one := range []struct {
		name string
		at   *time.Time
	}{
		{"leaving since", s.Leaving},
		{"tainted since", s.Tainted},
		{"valid from", s.NotBefore},
		{"valid until", s.NotAfter},
		{"its leaves live until", s.LeavesUntil},
	} {
		if one.at != nil {
			f = append(f, [2]string{one.name, until(one.at, now)})
		}
	}
	for _, one := range [][2]string{
		{"root", s.Root},
		{"subject", s.Subject},
		{"serial", s.Serial},
		{"key", s.Key},
		{"key fingerprint", s.KeyFingerprint},
		{"fingerprint", s.Fingerprint},
	} {
		if one[1] != "" {
			f = append(f, one)
		}
	}
	return f
}

func (c *cli) caShowCommand() *cobra.Command {
	var file, format string
	cmd := &cobra.Command{
		Use:   "show --config FILE ID",
		Short: "Show a CA with its chain",
		Long: `Shows a CA: state, validity, fingerprints, and in PEM its chain, its own certificate first and the root last; or, while it
is unsigned, its request.`,
		Example: `  signet ca show --config east.yaml intermediate-2
  signet ca show --config east.yaml intermediate-2 -o json`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeAuthorities(func(*adminv1.AuthorityInfo) bool { return true }),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				list, err := authorities(ctx, r)
				if err != nil {
					return err
				}
				for _, a := range list {
					if a.ID == args[0] {
						return c.showCA(format, a)
					}
				}
				return no("there is no CA %q: see signet ca list", args[0])
			})
		},
	}
	serverConfigFlag(cmd, &file)
	outputFlag(cmd, &format)
	return cmd
}

func (c *cli) showCA(format string, a authorityShown) error {
	s := caShown{authorityShown: a}
	if len(a.chain) > 0 {
		s.Chain = string(ca.EncodeChain(a.chain...))
	} else if len(a.csr) > 0 {
		s.CSR = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: a.csr}))
	}
	if format != "table" && format != "wide" {
		return c.show(format, s)
	}
	var b bytes.Buffer
	if err := s.facts(time.Now()).print(&b); err != nil {
		return err
	}
	fmt.Fprintf(&b, "\n%s%s", s.Chain, s.CSR)
	_, err := c.out.Write(b.Bytes())
	return err
}

func (c *cli) caTaintCommand() *cobra.Command {
	var file, reason string
	var dryRun, yes bool
	cmd := &cobra.Command{
		Use:   "taint --config FILE ID --reason TEXT",
		Short: "Say that a CA's key is lost, and replace everything under it",
		Long: `Takes the CA's key for lost, and every other CA that has the same key with it, as a root that was renewed may. Nothing is
signed with it as soon as another issuer can sign; if none stands ready, a request for one is made. Agents replace what it
has signed, spread over time (rotation.reissue_rate). Whoever has the key can forge certificates that are accepted as long as
the root above is believed, so that root has to be replaced too, in every cluster, by one with another key: signet rotation
status says who still accepts a forged certificate, until nobody does.

It can't be taken back. On a terminal it is asked for once more; elsewhere --yes is needed.`,
		Example: `  signet ca taint --config east.yaml intermediate-1 --reason "backup of the key was stolen" --dry-run
  signet ca taint --config east.yaml intermediate-1 --reason "backup of the key was stolen"`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeAuthorities(func(a *adminv1.AuthorityInfo) bool { return a.Tainted == nil }),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				request := &adminv1.TaintAuthorityRequest{Authority: args[0], Reason: reason, DryRun: true}
				if dryRun || !yes {
					answer, err := r.TaintAuthority(ctx, request)
					switch {
					case err == nil && !answer.Changed:
						return c.printChange(answer, dryRun)
					case err == nil:
						all, err := r.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
						if err != nil {
							return err
						}
						if !dryRun {
							fmt.Fprintf(c.err, "Tainting %s can't be taken back. This would happen:\n", args[0])
						}
						for _, text := range tainting(all.Authorities, args[0], answer, time.Now()) {
							folded(c.err, "- ", "  ", text)
						}
						if dryRun {
							return c.printChange(answer, dryRun)
						}
						for _, line := range did(answer.Done, describeSteps(answer.Taken), answer.Requests) {
							fmt.Fprintln(c.err, would(true)+line)
						}
						c.talkOfChange(answer, false)
					case dryRun || status.Code(err) != codes.Unavailable:
						return err
					default:
						// A lost key is not to wait for Vault, nor for a disk: what follows from the taint is tried again.
						folded(c.err, "", "  ", "Tainting "+args[0]+" can't be taken back. What would happen can't be said: "+printableText(status.Convert(err).Message()))
					}
					if err := c.confirm("Type "+args[0]+" to taint it: ", args[0]); err != nil {
						return err
					}
				}
				request.DryRun = false
				answer, err := r.TaintAuthority(ctx, request)
				if err != nil {
					return err
				}
				if answer.Changed {
					fmt.Fprintf(c.err, "%s is tainted; follow what comes with: signet rotation status --config %s --watch\n", args[0], file)
				}
				return c.printChange(answer, false)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&reason, "reason", "", "what happened, for the audit log")
	cmd.Flags().BoolVar(&yes, "yes", false, "don't ask")
	_ = cmd.MarkFlagRequired("reason")
	dryRunFlag(cmd, &dryRun)
	return cmd
}

// tainting says what a taint leads to, and what people have to do, whether or not a step is ready now.
func tainting(all []*adminv1.AuthorityInfo, id string, answer *adminv1.RotationChangeResponse, now time.Time) []string {
	root, signs, successor := id, "", ""
	same := sameKey(all, id)
	for _, a := range all {
		if a.Id == id && a.Kind == ca.KindIntermediate {
			root = a.Root
		}
		if a.Kind == ca.KindIntermediate && a.State == string(ca.Active) && (a.Id == id || a.Root == id || slices.Contains(same, a.Root)) {
			signs = a.Id
		}
	}
	for _, a := range all {
		if isRoot(a) && a.Id != root && !slices.Contains(same, a.Id) && a.State == string(ca.Active) && a.Leaving == nil && a.Tainted == nil {
			successor = a.Id
		}
	}
	signers := root + ", or the root that replaces it, has"
	switch {
	case successor != "":
		signers = successor + " has"
	case root == id:
		signers = "the root that replaces " + id + " has"
	}
	takes, makes := "", ""
	for _, s := range answer.Taken {
		switch {
		case s.Authority == "":
			makes = "a request for a new intermediate is made (signet rotation start intermediate prints it)"
		case s.Kind == ca.KindIntermediate && s.To == string(ca.Active):
			takes = s.Authority
		}
	}
	if len(answer.Requests) > 0 {
		makes = "the request of " + answer.Requests[0].Authority + " waits for its signature"
	}
	var texts []string
	if len(same) > 0 {
		texts = append(texts, strings.Join(same, " and ")+" is tainted too: it has the same key")
	}
	switch {
	case signs == "":
	case takes != "":
		texts = append(texts, signs+" stops signing at once, and "+takes+" signs in its place")
	case makes != "":
		texts = append(texts, makes+": "+signers+" to sign it (signet root sign), and it has to be installed (signet cluster install)",
			signs+" goes on signing until then")
	}
	above := slices.IndexFunc(all, func(a *adminv1.AuthorityInfo) bool { return a.Id == root })
	gone := above >= 0 && all[above].State == string(ca.Removed)
	if gone && len(same) == 0 {
		return append(texts, root+" above it was removed here "+moment(all[above].Since.AsTime(), now)+
			", so nothing more is to be done here; signet rotation status says who accepts what is forged under it, if anybody does")
	}
	if root == "" {
		// What was signed and never installed is not known here.
		return append(texts, "if its request was signed already, forged certificates are accepted: whoever holds the root knows (signet root show); "+
			"install that chain too then (signet cluster install), so that signet rotation status says who accepts them, and until when")
	}
	texts = append(texts, "agents replace what was signed by it, spread over time")
	every := same
	if !gone {
		every = append([]string{root}, same...)
	}
	must := "forged certificates are accepted as long as " + strings.Join(every, " or ") + " is believed, in every cluster: "
	if leaves := "it begins to leave here, for " + successor; successor != "" {
		if above >= 0 && all[above].Leaving != nil {
			leaves = "it began to leave here " + moment(all[above].Leaving.AsTime(), now)
		}
		return append(texts, must+leaves+"; say the same in the other clusters (signet trust remove "+strings.Join(every, "; signet trust remove ")+")")
	}
	return append(texts, must+"it must be replaced (signet root init, then signet rotation start root in each cluster)")
}

// sameKey names the other roots, but for those that are removed, that have a CA's key.
func sameKey(all []*adminv1.AuthorityInfo, id string) (others []string) {
	key := func(a *adminv1.AuthorityInfo) string {
		if len(a.Chain) == 0 {
			return ""
		}
		cert, err := x509.ParseCertificate(a.Chain[0])
		if err != nil {
			return ""
		}
		return ca.KeyFingerprint(cert.RawSubjectPublicKeyInfo)
	}
	lost := ""
	for _, a := range all {
		if a.Id == id {
			lost = key(a)
		}
	}
	for _, a := range all {
		if lost != "" && isRoot(a) && a.Id != id && a.State != string(ca.Removed) && key(a) == lost {
			others = append(others, a.Id)
		}
	}
	return others
}

// confirm asks on the terminal for a word.
func (c *cli) confirm(question, word string) error {
	f, ok := c.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return errors.New("there is no terminal to ask on: say --yes if you mean it; nothing is changed")
	}
	fmt.Fprint(c.err, question)
	answer, err := bufio.NewReader(f).ReadString('\n')
	if err != nil || strings.TrimSpace(answer) != word {
		return no("not confirmed; nothing is changed")
	}
	return nil
}
