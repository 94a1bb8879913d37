package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/server"
)

func (c *cli) trustCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "trust",
		Short: "See and change which roots are believed",
		Long: `The roots that the workloads of a cluster believe. These commands talk to the running server over its admin socket.
A root that is to take over from another one is brought in by signet rotation start root, which adds it too.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(c.trustListCommand(), c.trustAddCommand(), c.trustExportCommand(), c.trustRemoveCommand(), c.trustRepublishCommand())
	return cmd
}

// trustShown is what a cluster believes.
type trustShown struct {
	BundleSequence uint64           `json:"bundle_sequence"`
	BundleDigest   string           `json:"bundle_digest"`
	Roots          []authorityShown `json:"roots"`

	now time.Time
}

func (trustShown) columns() []string {
	return []string{"ROOT", "STATE", "SINCE", "SIGNS", "EXPIRES", "SUBJECT", "+NOT AFTER", "+LEAVES UNTIL", "+FINGERPRINT"}
}

func (s trustShown) rows() [][]string {
	var rows [][]string
	for _, a := range s.Roots {
		rows = append(rows, []string{
			a.ID, a.stands(), moment(a.Since, s.now), a.signs(), momentOf(a.NotAfter, s.now), a.Subject, clockOf(a.NotAfter), clockOf(a.LeavesUntil), a.Fingerprint,
		})
	}
	return rows
}

func (s trustShown) names() []string {
	var names []string
	for _, a := range s.Roots {
		names = append(names, "root/"+a.ID)
	}
	return names
}

// trusted asks for the roots that are in use in some way.
func trusted(ctx context.Context, r adminv1.RotationClient) (trustShown, error) {
	s := trustShown{Roots: []authorityShown{}, now: time.Now()}
	answer, err := r.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
	if err != nil {
		return s, err
	}
	s.BundleSequence, s.BundleDigest = answer.BundleSequence, hex.EncodeToString(answer.BundleDigest)
	all, err := describeAuthorities(answer.Authorities, describeStopped(answer.Stopped))
	for _, a := range all {
		if a.Kind == ca.KindRoot && a.State != string(ca.Removed) {
			s.Roots = append(s.Roots, a)
		}
	}
	return s, err
}

func (c *cli) trustListCommand() *cobra.Command {
	var file, format string
	cmd := &cobra.Command{
		Use:   "list --config FILE",
		Short: "List the roots that are believed",
		Long: `Lists the roots. Workloads believe those that are published, active or retired; a prepared one is published next, and one
that is leaving goes when nothing depends on it.`,
		Example: `  signet trust list --config east.yaml
  signet trust list --config east.yaml -o wide`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				s, err := trusted(ctx, r)
				if err != nil {
					return err
				}
				if format == "table" || format == "wide" {
					if err := (facts{
						{"bundle sequence", strconv.FormatUint(s.BundleSequence, 10)},
						{"bundle digest", "SHA256:" + s.BundleDigest},
					}).print(c.out); err != nil {
						return err
					}
					fmt.Fprintln(c.out)
				}
				return c.show(format, s)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	outputFlag(cmd, &format)
	return cmd
}

func (c *cli) trustAddCommand() *cobra.Command {
	var file, fingerprint string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "add --config FILE ROOT --fingerprint SHA256:…",
		Short: "Begin to believe a root",
		Long: `Begins to believe a root, which stands in PEM in the file ROOT, or - for stdin. Its fingerprint must have come from the
root's holder by another way than the file. Nothing is signed under it until a rotation says so.
Adding it again changes nothing.`,
		Example: `  signet trust add --config east.yaml root-2.pem --fingerprint SHA256:AB:CD:…
  signet trust add --config east.yaml root-2.pem --fingerprint SHA256:AB:CD:… --dry-run`,
		Args: cobra.ExactArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"pem"}, cobra.ShellCompDirectiveFilterFileExt
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := ca.ParseFingerprint(fingerprint); err != nil {
				return fmt.Errorf("--fingerprint: %w", err)
			}
			root, err := c.readRoot(args[0])
			if err != nil {
				return err
			}
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				answer, err := r.AddTrust(ctx, &adminv1.AddTrustRequest{Root: root, RootFingerprint: fingerprint, DryRun: dryRun})
				if err != nil {
					return err
				}
				return c.printChange(answer, dryRun)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&fingerprint, "fingerprint", "", "fingerprint of the root, from its holder")
	_ = cmd.MarkFlagRequired("fingerprint")
	dryRunFlag(cmd, &dryRun)
	return cmd
}

func (c *cli) trustRemoveCommand() *cobra.Command {
	var file string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "remove --config FILE ID",
		Short: "Begin to stop believing a root",
		Long: `Marks a root as leaving. It is retired when nothing signs under it, and no longer believed when nothing that was signed
under it is valid, here and in the other clusters. signet rotation abort turns that back. The only root is not removed.`,
		Example: `  signet trust remove --config east.yaml root-0123456789abcdef --dry-run
  signet trust remove --config east.yaml root-0123456789abcdef`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeAuthorities(func(a *adminv1.AuthorityInfo) bool { return isRoot(a) && notRemoved(a) && a.Leaving == nil }),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				answer, err := r.RemoveTrust(ctx, &adminv1.RemoveTrustRequest{Root: args[0], DryRun: dryRun})
				if err != nil {
					return err
				}
				return c.printChange(answer, dryRun)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	dryRunFlag(cmd, &dryRun)
	return cmd
}

func (c *cli) trustRepublishCommand() *cobra.Command {
	var file string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "republish --config FILE",
		Short: "Publish what is believed once more, after the state was restored from an older copy",
		Long: `Agents take no trust bundle that is older than the one they have: trust must not be turned back. So after a server's state
was restored from an older copy they take nothing from it; signet check finds that (SGN1025). This publishes the roots that
the server believes now, with a number above every bundle that agents hold or the audit log knows of.

Agents then believe these roots and no others. Look first: signet trust list. Add what was believed meanwhile and is
missing (signet trust add), or workloads with certificates under it are refused.

It is refused where no agent, and no entry of the log, is ahead. It makes an entry in the audit log.`,
		Example: `  signet trust republish --config east.yaml --dry-run
  signet trust republish --config east.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.rotation(cmd.Context(), file, func(ctx context.Context, r adminv1.RotationClient) error {
				a, err := r.RepublishTrust(ctx, &adminv1.RepublishTrustRequest{DryRun: dryRun})
				if err != nil {
					return err
				}
				what := "published trust bundle"
				if dryRun {
					what = "would publish trust bundle"
				}
				ahead := strconv.FormatUint(uint64(a.Ahead), 10)
				if len(a.Agents) > 0 {
					ahead += ": " + check.Some(printableTexts(a.Agents))
				}
				return facts{
					{what, fmt.Sprintf("%d, in the place of %d", a.After, a.Before)},
					{"roots", strings.Join(printableTexts(a.Roots), ", ")},
					{"agents ahead", ahead},
				}.print(c.out)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	dryRunFlag(cmd, &dryRun)
	return cmd
}

// trustSet is what a cluster that joins is given.
type trustSet struct {
	TrustDomain    string      `json:"trust_domain"`
	Cluster        string      `json:"cluster"`
	BundleSequence uint64      `json:"bundle_sequence"`
	BundleDigest   string      `json:"bundle_digest"`
	Roots          []trustRoot `json:"roots"`
}

// trustRoot is one that workloads believe.
type trustRoot struct {
	ID    string `json:"id"`
	State string `json:"state"`
	// Leaving and Tainted: nothing may begin to sign under it.
	Leaving     bool      `json:"leaving"`
	Tainted     bool      `json:"tainted"`
	NotAfter    time.Time `json:"not_after"`
	Fingerprint string    `json:"fingerprint"`
	// Certificate is PEM.
	Certificate string `json:"certificate"`
}

// setOf is what is believed: a root that is only prepared is not.
func setOf(td spiffeid.TrustDomain, cluster string, s trustShown) (set trustSet, roots []*x509.Certificate) {
	set = trustSet{TrustDomain: td.Name(), Cluster: cluster, BundleSequence: s.BundleSequence, BundleDigest: s.BundleDigest, Roots: []trustRoot{}}
	for _, a := range s.Roots {
		if a.State == string(ca.Prepared) || len(a.chain) == 0 {
			continue
		}
		cert := a.chain[0]
		roots = append(roots, cert)
		set.Roots = append(set.Roots, trustRoot{
			ID: a.ID, State: a.State, Leaving: a.Leaving != nil, Tainted: a.Tainted != nil, NotAfter: cert.NotAfter.UTC(),
			Fingerprint: ca.CertificateFingerprint(cert.Raw), Certificate: string(ca.EncodeChain(cert)),
		})
	}
	return set, roots
}

const trustFormats = "pem|spiffe|json"

func (c *cli) trustExportCommand() *cobra.Command {
	var file, format string
	cmd := &cobra.Command{
		Use:   "export --config FILE",
		Short: "Write the roots that are believed",
		Long: `Writes the roots that workloads believe now, to stdout:

  pem      the certificates one after another, for TLS libraries
  spiffe   a SPIFFE bundle (JWK set), for federation
  json     the roots with their states, which says which of them are leaving, for a cluster that joins:
           signet cluster install --trust

None of it is secret. The digest of the roots goes to stderr: bring it to whoever takes them in by another way, so that
they notice if roots were exchanged.`,
		Example: `  signet trust export --config east.yaml > roots.pem
  signet trust export --config east.yaml --format spiffe > example.org.bundle
  signet trust export --config east.yaml --format json > east.trust.json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.LoadServer(file)
			if err != nil {
				return err
			}
			return c.rotationOf(cmd.Context(), cfg, file, func(ctx context.Context, r adminv1.RotationClient) error {
				s, err := trusted(ctx, r)
				if err != nil {
					return err
				}
				set, roots := setOf(cfg.TrustDomain, cfg.Cluster, s)
				text, err := exported(format, cfg.TrustDomain, set, roots)
				if err != nil {
					return err
				}
				if _, err := c.out.Write(text); err != nil {
					return err
				}
				return facts{{"digest", "SHA256:" + s.BundleDigest}}.print(c.err)
			})
		},
	}
	serverConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&format, "format", "pem", "form of the roots: "+trustFormats)
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(strings.Split(trustFormats, "|"), cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func exported(format string, td spiffeid.TrustDomain, set trustSet, roots []*x509.Certificate) ([]byte, error) {
	switch format {
	case "pem":
		return ca.EncodeChain(roots...), nil
	case "spiffe":
		b := spiffebundle.FromX509Authorities(td, roots)
		b.SetSequenceNumber(set.BundleSequence)
		text, err := b.Marshal()
		if err != nil {
			return nil, fmt.Errorf("write the SPIFFE bundle of %s: %w", td.Name(), err)
		}
		return append(text, '\n'), nil
	case "json":
		text, err := json.MarshalIndent(set, "", "  ")
		return append(text, '\n'), err
	}
	return nil, fmt.Errorf("format %s is unknown: use %s", strconv.Quote(format), strings.ReplaceAll(trustFormats, "|", ", "))
}

// maxTrustFile bounds what a cluster believes, in bytes.
const maxTrustFile = 1 << 20

// readTrust reads what `trust export --format json` wrote. What stands in it beside the certificates and how they stand is
// not believed.
func (c *cli) readTrust(td spiffeid.TrustDomain, path, digest string) (t server.Trust, err error) {
	if path == "" && digest == "" {
		return t, nil
	}
	if _, err := ca.ParseFingerprint(digest); err != nil {
		return t, fmt.Errorf("--trust-digest: %w; signet trust export prints it in the other cluster, bring it by another way than the file", err)
	}
	text, err := c.readInput(path, "trusted roots", maxTrustFile)
	if err != nil {
		return t, err
	}
	var set trustSet
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&set); err != nil {
		return t, no("%s is not what signet trust export --format json writes: %v", path, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return t, no("%s goes on behind the trusted roots: give the file as signet trust export --format json wrote it", path)
	}
	if set.TrustDomain != td.Name() {
		return t, no("%s is of trust domain %s, and this cluster is of %s: roots of another trust domain are never believed here", path, strconv.Quote(set.TrustDomain), td.Name())
	}
	t = server.Trust{Cluster: set.Cluster, Digest: digest}
	for i, r := range set.Roots {
		chain, err := ca.ParseChain([]byte(r.Certificate))
		if err != nil {
			return t, no("root %d of %s: %w", i+1, path, err)
		}
		if len(chain) != 1 {
			return t, no("root %d of %s holds %d certificates, want one", i+1, path, len(chain))
		}
		t.Roots = append(t.Roots, server.TrustedRoot{Certificate: chain[0], State: ca.State(r.State), Leaving: r.Leaving, Tainted: r.Tainted})
	}
	return t, nil
}

// trustMessage is the set for the admin door; nil for none.
func trustMessage(t server.Trust) *adminv1.TrustSet {
	if t.Digest == "" {
		return nil
	}
	m := &adminv1.TrustSet{Cluster: t.Cluster, Digest: t.Digest}
	for _, r := range t.Roots {
		m.Roots = append(m.Roots, &adminv1.TrustedRoot{Certificate: r.Certificate.Raw, State: string(r.State), Leaving: r.Leaving, Tainted: r.Tainted})
	}
	return m
}
