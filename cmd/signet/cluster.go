package main

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/ceremony"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/server"
)

func (c *cli) clusterCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cluster",
		Short: "Make a cluster and give it its intermediate",
		Long: `A cluster is made in three steps: init makes its keys, its control CA and a request for its intermediate; the
root's holder signs the request (signet root sign); install checks what came back and takes it into use.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(c.clusterInitCommand(), c.clusterInstallCommand(), c.clusterShowCommand())
	return cmd
}

// atHand is the ceremonies of this binary, as package server wants them.
type atHand struct{}

func (atHand) SelfSign(ctx context.Context, log ca.Log, key crypto.Signer, plan ca.Plan, by *auditv1.Evidence) (*x509.Certificate, audit.Receipt, error) {
	return ceremony.SelfSign(ctx, log, key, plan, by)
}

func (atHand) Request(key crypto.Signer, plan ca.Plan) ([]byte, error) {
	return ceremony.Request(key, plan)
}

// folderOf is a server's state folder as its configuration describes it.
func folderOf(cfg *config.Server, keys keystore.Store, logger *slog.Logger) server.Folder {
	return server.Folder{
		Dir: cfg.StateDir, TrustDomain: cfg.TrustDomain, Cluster: cfg.Cluster, Instance: cfg.Instance, Keys: keys,
		CheckpointInterval: cfg.Log.CheckpointInterval, Logger: logger,
	}
}

func (c *cli) clusterInitCommand() *cobra.Command {
	var file, out, fingerprint string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "init --config FILE",
		Short: "Make a cluster's keys, control CA and certificate request",
		Long: `Makes the state folder with the audit log, the control CA and the key of the first intermediate, and writes the
request for its certificate to stdout, or with --csr-out to a file; then stdout gets the fingerprint of the request's key.

Give the request to the root's holder, and the key's fingerprint by another way: signet root sign wants both.

Where the configuration has an upstream that signs by itself (upstream.vault_pki), no request is made: --root-fingerprint
says which root the cluster trusts, as its holder told you by another way, and stdout gets it back. The server has its
intermediates signed as soon as it runs.

It is safe to run again: what is missing is completed, and the same request and fingerprints are printed.

--dry-run says which files and keys would be made; Vault is asked whether it would make those that belong there.`,
		Example: `  signet cluster init --config east.yaml --csr-out east.csr.pem
  signet cluster init --config east.yaml > east.csr.pem
  signet cluster init --config east.yaml --dry-run
  signet cluster init --config east.yaml --root-fingerprint SHA256:AB:CD:…`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.LoadServer(file)
			if err != nil {
				return err
			}
			logger := c.warnings(cfg.Logging)
			b, err := openBacking(cmd.Context(), cfg, logger)
			if err != nil {
				return err
			}
			defer b.Close()
			switch {
			case b.upstream == nil && fingerprint != "":
				return fmt.Errorf("--root-fingerprint is for an upstream that signs by itself, and %s has none: it is given to signet cluster install", file)
			case b.upstream != nil && out != "":
				return fmt.Errorf("--csr-out: no request is made, because upstream.vault_pki signs by itself")
			}
			r, err := server.Init(cmd.Context(), server.InitConfig{
				Folder: folderOf(cfg, b.keys, logger), Algorithm: cfg.Keystore.Algorithm, Ceremony: atHand{},
				Upstream: b.upstream, Exchange: b.exchange, Rotation: rotationOf(cfg), RootFingerprint: fingerprint,
				DryRun: dryRun,
			})
			if errors.Is(err, server.ErrOtherRoot) {
				return no("%w", err)
			}
			if err != nil {
				return err
			}
			if dryRun {
				if out != "" {
					r.Would = append(r.Would, "request written to "+out)
				}
				return c.printInit(r)
			}
			state := "made"
			if !r.Created {
				state = "unchanged: it was made before"
			}
			what := facts{
				{"cluster", cfg.Cluster + " of " + cfg.TrustDomain.Name() + ", " + state},
				{"control CA", r.ControlCA},
				{"log verifier key", r.LogVerifierKey},
			}
			if b.upstream != nil {
				if err := append(what, [2]string{"roots trusted", strings.Join(r.Roots, " ")}).print(c.err); err != nil {
					return err
				}
				fmt.Fprintf(c.err, "next: signet serve --config %s\n", file)
				_, err = fmt.Fprintln(c.out, strings.Join(r.Roots, "\n"))
				return err
			}
			what = slices.Insert(what, 1, [2]string{"key of the request", r.KeyFingerprint})
			if out == "" {
				if err := what.print(c.err); err != nil {
					return err
				}
				c.hintSign("the root", cfg.Cluster, "", "", r.KeyFingerprint)
				_, err = c.out.Write(r.CSR)
				return err
			}
			if err := durable.WriteFile(out, r.CSR, 0o644); err != nil {
				return err
			}
			if err := append(what, [2]string{"request", out}).print(c.err); err != nil {
				return err
			}
			c.hintSign("the root", cfg.Cluster, out, "", r.KeyFingerprint)
			_, err = fmt.Fprintln(c.out, r.KeyFingerprint)
			return err
		},
	}
	serverConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&out, "csr-out", "", "write the certificate request to this file")
	cmd.Flags().StringVar(&fingerprint, "root-fingerprint", "", "with an upstream: fingerprint of the root, from the root's holder")
	dryRunFlag(cmd, &dryRun)
	return cmd
}

// printInit says what a dry run of init would make.
func (c *cli) printInit(r server.InitResult) error {
	var b strings.Builder
	for _, line := range r.Would {
		b.WriteString(would(true) + line + "\n")
	}
	if b.Len() == 0 {
		b.WriteString("unchanged\n")
	}
	if _, err := io.WriteString(c.out, b.String()); err != nil {
		return err
	}
	fmt.Fprintln(c.err, "this was a dry run: nothing is changed")
	return nil
}

// hintSign says what the root's holder types next. An empty file stands for the one that stdout went to; turns are flags that
// let several take their turns, "" for none.
func (c *cli) hintSign(root, cluster, file, turns string, keys ...string) {
	fmt.Fprintf(c.err, "next, where %s is: signet root sign --cluster %s --out %[2]s.chain.pem --csr %s%s", root, cluster, cmp.Or(file, "FILE"), turns)
	for _, k := range keys {
		fmt.Fprintf(c.err, " \\\n  --fingerprint %s", k)
	}
	fmt.Fprintln(c.err)
}

func (c *cli) clusterInstallCommand() *cobra.Command {
	var file, chainFile, fingerprint, trustFile, digest string
	var first, dryRun bool
	cmd := &cobra.Command{
		Use:   "install --config FILE --chain FILE --root-fingerprint SHA256:…",
		Short: "Check what the root has signed and take it into use",
		Long: `Checks the chain against the cluster's own request and key, and the root in it against the fingerprint, which must
have come from the root's holder by another way than the chain. The first intermediate is active then, and its root is
trusted. A later one takes over when its time has come: signet rotation status says what it waits for.

The server may be running: then it is asked over its admin socket. Several chains may follow one another in the file, as
signet root sign writes them; all are installed, or none.

A cluster that joins others has to believe all that they believe, for they may be replacing a root: --trust is what
signet trust export --format json wrote in one of them, and --trust-digest the digest that it printed, which must have come
by another way than the file. The digest speaks for the certificates; which of them are leaving is taken from the file.
A chain under a root that is leaving is refused; a root that has expired is left out.

So the first chain of a cluster whose file names others under rotation.peers is refused without --trust, unless
trust.vault_kv tells what they believe. --first is for clusters that are made together under one root: you say that none of
the others serves yet; it is written in the audit log. Later it means nothing.

Installing the same chain again changes nothing. Exit status 1 when the chain is refused.`,
		Example: `  signet cluster install --config east.yaml --chain east.chain.pem --root-fingerprint SHA256:AB:CD:…
  signet cluster install --config east.yaml --chain east.chain.pem --root-fingerprint SHA256:AB:CD:… --dry-run
  signet cluster install --config west.yaml --chain west.chain.pem --root-fingerprint SHA256:AB:CD:… \
    --trust east.trust.json --trust-digest SHA256:12ab…
  signet cluster install --config east.yaml --chain east.chain.pem --root-fingerprint SHA256:AB:CD:… --first`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.LoadServer(file)
			if err != nil {
				return err
			}
			if _, err := ca.ParseFingerprint(fingerprint); err != nil {
				return fmt.Errorf("--root-fingerprint: %w", err)
			}
			given, err := c.readTrust(cfg.TrustDomain, trustFile, digest)
			if err != nil {
				return err
			}
			chain, err := c.readInput(chainFile, "certificate chain", maxChainFile)
			if err != nil {
				return err
			}
			logger := c.warnings(cfg.Logging)
			b, err := openBacking(cmd.Context(), cfg, logger)
			if err != nil {
				return err
			}
			defer b.Close()
			r, err := server.Install(cmd.Context(), server.InstallConfig{
				Folder: folderOf(cfg, b.keys, logger), Rotation: rotationOf(cfg), Chain: chain, RootFingerprint: fingerprint,
				Trust: given, First: first, Exchange: b.exchange, DryRun: dryRun,
			})
			if errors.Is(err, durable.ErrInUse) {
				return c.installAtServer(cmd.Context(), cfg, err, &adminv1.InstallAuthoritiesRequest{
					Chains: chain, RootFingerprint: fingerprint, Trust: trustMessage(given), DryRun: dryRun,
				})
			}
			if err != nil {
				return refused(err)
			}
			shown, err := server.Show(cmd.Context(), cfg.StateDir)
			if err != nil {
				return err
			}
			stands := map[string]string{}
			for _, a := range shown.Authorities {
				stands[a.KeyFingerprint] = a.ID + ", " + string(a.State)
			}
			return c.printInstalled(chain, stands, installed{r.Done, describeNext(r.Taken), describeNext(r.Next)}, dryRun)
		},
	}
	serverConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&chainFile, "chain", "", "file that signet root sign wrote, or - for stdin")
	cmd.Flags().StringVar(&fingerprint, "root-fingerprint", "", "fingerprint of the root, from the root's holder")
	cmd.Flags().StringVar(&trustFile, "trust", "", "what another cluster believes: trust export --format json, or - for stdin")
	cmd.Flags().StringVar(&digest, "trust-digest", "", "digest of what it believes, which trust export printed there")
	cmd.Flags().BoolVar(&first, "first", false, "no other cluster of rotation.peers serves yet")
	cmd.MarkFlagsRequiredTogether("trust", "trust-digest")
	cmd.MarkFlagsMutuallyExclusive("trust", "first")
	_ = cmd.MarkFlagFilename("trust", "json")
	_ = cmd.MarkFlagRequired("chain")
	_ = cmd.MarkFlagFilename("chain", "pem")
	_ = cmd.MarkFlagRequired("root-fingerprint")
	dryRunFlag(cmd, &dryRun)
	return cmd
}

// installAtServer installs through the server that holds the folder; inUse is what is told if whoever holds it is none.
func (c *cli) installAtServer(ctx context.Context, cfg *config.Server, inUse error, request *adminv1.InstallAuthoritiesRequest) error {
	conn, err := dialAdmin(ctx, cfg.AdminSocket, "server", "signet serve")
	if errors.Is(err, errSilent) {
		return err
	}
	if err != nil {
		return inUse
	}
	defer conn.Close()
	admin := adminv1.NewRotationClient(conn)
	r, err := admin.InstallAuthorities(ctx, request)
	if err != nil {
		return answered(err)
	}
	all, err := admin.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
	if err != nil {
		return answered(err)
	}
	list, err := describeAuthorities(all.Authorities, describeStopped(all.Stopped))
	if err != nil {
		return err
	}
	stands := map[string]string{}
	for _, a := range list {
		stands[a.KeyFingerprint] = a.ID + ", " + a.State
	}
	return c.printInstalled(request.Chains, stands, installed{r.Done, describeSteps(r.Taken), describeSteps(r.Next)}, request.DryRun)
}

// installed is what an installation has done.
type installed struct {
	// done is what the chains have changed; taken are steps that were due then, for whatever reason.
	done        []string
	taken, next []stepShown
}

// printInstalled says how the intermediates of these chains stand, by the fingerprints of their keys.
func (c *cli) printInstalled(text []byte, stands map[string]string, r installed, dryRun bool) error {
	chains, err := ca.ParseChains(text)
	if err != nil {
		return err
	}
	var what facts
	for _, chain := range chains {
		own, root := chain[0], chain[len(chain)-1]
		end := slices.MinFunc(chain, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
		expires := clock(end)
		if end.Before(own.NotAfter) {
			expires += ", cut short: its root ends then"
		}
		what = append(what, facts{
			{"issuer", stands[ca.KeyFingerprint(own.RawSubjectPublicKeyInfo)]},
			{"expires", expires},
			{"root", ca.CertificateFingerprint(root.Raw)},
		}...)
	}
	if err := what.print(c.err); err != nil {
		return err
	}
	for _, line := range did(r.done, r.taken, nil) {
		folded(c.err, would(dryRun), "  ", line)
	}
	if len(r.next) > 0 {
		fmt.Fprintln(c.err, "next:")
		printSteps(c.err, r.next, time.Now())
	}
	state := "installed"
	switch {
	case len(r.done) == 0:
		state = "unchanged"
	case dryRun:
		state = "would be installed"
	}
	_, err = fmt.Fprintln(c.out, state)
	return err
}

// maxChainFile bounds a chain in PEM, in bytes.
const maxChainFile = 64 << 10

// readInput reads a file, or stdin for "-", of at most so many bytes.
func (c *cli) readInput(path, what string, most int64) ([]byte, error) {
	if path == "-" {
		return durable.Read(c.in, "stdin", what, most)
	}
	return durable.ReadFile(path, what, most)
}

// clusterShown is a cluster with a row for each authority.
type clusterShown struct{ server.Cluster }

func (clusterShown) columns() []string {
	return []string{"ISSUER", "HIERARCHY", "STATE", "EXPIRES", "KEY", "+SUBJECT", "+KEY FINGERPRINT", "+FINGERPRINT"}
}

func (s clusterShown) rows() [][]string {
	var rows [][]string
	for _, a := range s.Authorities {
		rows = append(rows, []string{a.ID, a.Hierarchy, string(a.State), clockOf(a.NotAfter), a.Key, a.Subject, a.KeyFingerprint, a.Fingerprint})
	}
	return rows
}

func (s clusterShown) names() []string { return []string{"cluster/" + s.Cluster.Cluster} }

func (c *cli) clusterShowCommand() *cobra.Command {
	var file, format string
	cmd := &cobra.Command{
		Use:   "show --config FILE",
		Short: "Show a cluster's issuers and fingerprints",
		Long: `Shows the issuers with their states and ends, the fingerprints of the control CA and of the roots that are trusted,
and the key that auditors check the log with. It reads the state folder, also while the server runs, and needs no key.`,
		Example: `  signet cluster show --config east.yaml
  signet cluster show --config east.yaml -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.LoadServer(file)
			if err != nil {
				return err
			}
			shown, err := server.Show(cmd.Context(), cfg.StateDir)
			if err != nil {
				return err
			}
			if format == "table" || format == "wide" {
				if err := (facts{
					{"trust domain", shown.TrustDomain},
					{"cluster", shown.Cluster},
					{"instance", shown.Instance},
					{"control CA", shown.ControlCA},
					{"roots trusted", strings.Join(shown.Roots, " ")},
					{"bundle sequence", strconv.FormatUint(shown.BundleSequence, 10)},
					{"log verifier key", shown.LogVerifierKey},
				}).print(c.out); err != nil {
					return err
				}
				fmt.Fprintln(c.out)
			}
			return c.show(format, clusterShown{shown})
		},
	}
	serverConfigFlag(cmd, &file)
	outputFlag(cmd, &format)
	return cmd
}

// since is how long ago, or until when, in whole seconds.
func since(t, now time.Time) string {
	if d := t.Sub(now).Round(time.Second); d > 0 {
		return "in " + d.String()
	}
	return now.Sub(t).Round(time.Second).String() + " ago"
}
