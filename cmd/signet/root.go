package main

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/ceremony"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/vault"
	"github.com/signet-ca/signet/vault/pki"
)

func (c *cli) rootCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "root",
		Short: "Make and use the offline root that all clusters trust",
		Long: `The root is a folder: its certificate, its encrypted key, and a log of everything it has signed.
Keep it off the network; it is needed only to give a cluster an intermediate.

Its key may be in Vault instead, in the Transit engine or with the PKI engine. The folder stays, with the certificate and
the log, and says where the key is (key.yaml).`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(c.rootInitCommand(), c.rootSignCommand(), c.rootShowCommand())
	return cmd
}

// passphraseFlag adds --passphrase-file, the one way beside the terminal.
func passphraseFlag(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVar(path, "passphrase-file", "", "file with the passphrase of the keys; without it the terminal is asked")
}

func passphrase(path, prompt string, confirm bool) keystore.Passphrase {
	if path != "" {
		return keystore.PassphraseFile(path)
	}
	return keystore.PassphraseTerminal(prompt, confirm)
}

// atTheCeremony says on whose word a ceremony happens.
func atTheCeremony() *auditv1.Evidence {
	return &auditv1.Evidence{Caller: "uid:" + strconv.Itoa(os.Getuid()), Door: "ceremony"}
}

// onlyWithoutFile refuses flags beside -f: what a ceremony does stands in one reviewed place.
func onlyWithoutFile(cmd *cobra.Command, file string, flags ...string) error {
	for _, f := range flags {
		if file != "" && cmd.Flags().Changed(f) {
			return fmt.Errorf("--%s and -f can't be used together: put it into %s", f, file)
		}
	}
	return nil
}

// refused makes an answer of an error that says what is wrong with what was asked. What can't be read, opened or had for
// oneself is no answer.
func refused(err error) error {
	asked := new(vault.Error)
	if errno := syscall.Errno(0); errors.As(err, &errno) || errors.Is(err, keystore.ErrWrongPassphrase) || errors.Is(err, durable.ErrInUse) ||
		errors.As(err, &asked) || errors.Is(err, vault.ErrAway) {
		return err
	}
	return no("%w", err)
}

func (c *cli) rootInitCommand() *cobra.Command {
	var file, trustDomain, dir, passphraseFile, life, algorithm, inVault string
	var pathLength int
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a root",
		Long: `Makes a folder with a new root: key (encrypted), certificate, log. The root's fingerprint is printed on stdout;
every cluster compares it when it installs what the root has signed.

An existing root is never touched (exit status 1).

With -f everything is taken from a file that can be reviewed first:

  trust_domain: example.org
  dir: ./root               # relative to the file
  algorithm: ecdsa-p256     # default
  life: 10y                 # default
  path_length: 1            # default

With --vault the key is made in Vault and never leaves it. The file says how Vault is reached, as the block vault of a
server's configuration does, and which engine holds the key. With -f the same blocks stand in that file:

  vault:
    address: https://vault.example.org:8200
    login: {method: token, token_file: ./token}
  transit: {}               # or {mount: transit, prefix: signet_example.org_}; the certificate is made here
  # or: pki: {}             # or {mount: pki, issuer: signet-example.org-root}; Vault makes the certificate too

--dry-run prints the policy that this needs in Vault. After an interruption the same command goes on with what was made.`,
		Example: `  signet root init --trust-domain example.org --dir root
  signet root init --trust-domain example.org --dir root --vault root-vault.yaml
  signet root init --trust-domain example.org --dir root --passphrase-file root.pass
  signet root init -f root.yaml --dry-run`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := onlyWithoutFile(cmd, file, "trust-domain", "dir", "life", "algorithm", "path-length", "vault"); err != nil {
				return err
			}
			var cfg ceremony.RootConfig
			var key *config.RootKey
			var err error
			if file != "" {
				cfg, key, err = readRootFile(file)
			} else if cfg, err = rootConfig(trustDomain, dir, algorithm, life, pathLength); err == nil && inVault != "" {
				key, err = config.LoadRootKey(inVault, cfg.TrustDomain)
			}
			if err != nil {
				return err
			}
			var holder *rootHolder
			if key != nil {
				if holder, err = openRootKey(key, cfg.Algorithm); err != nil {
					return err
				}
				defer holder.Close()
				cfg.Elsewhere = &holder.Elsewhere
			}
			if err := cfg.Validate(); err != nil {
				return err
			}
			begun, err := cfg.Begun()
			if err != nil {
				return refused(err)
			}
			folder := cfg.Dir
			if begun {
				folder += " (begun before, and gone on with)"
			} else if err := cfg.Vacant(); err != nil {
				return existing(err)
			}
			cfg.Passphrase = passphrase(passphraseFile, "Passphrase for the new root's keys", !begun)
			cfg.By = atTheCeremony()
			what := facts{
				{"root of", cfg.TrustDomain.Name()},
				{"folder", folder},
				{"key", string(cfg.Algorithm)},
				{"key in", placeOf(key)},
				{"life", days(cfg.Life)},
				{"path length", strconv.Itoa(cfg.PathLen)},
			}
			if dryRun {
				if err := what.print(c.out); err != nil || holder == nil {
					return err
				}
				_, err := fmt.Fprintf(c.out, "\nThe policy that this needs in Vault:\n\n%s", vault.Policy(append(holder.needs, holder.toMake...)))
				return err
			}
			if err := what.print(c.err); err != nil {
				return err
			}
			if holder != nil {
				if err := holder.allowed(cmd.Context(), append(holder.needs, holder.toMake...)); err != nil {
					return err
				}
			}
			root, err := ceremony.InitRoot(cmd.Context(), cfg)
			if err != nil {
				return existing(err)
			}
			history, err := root.History(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintf(c.err, "The root is in %s; its log's verifier key is %s.\nThe root's fingerprint, to be compared by every cluster:\n", cfg.Dir, history.VerifierKey)
			_, err = fmt.Fprintln(c.out, ca.CertificateFingerprint(root.Certificate().Raw))
			return err
		},
	}
	f := cmd.Flags()
	f.StringVarP(&file, "file", "f", "", "take everything from this reviewed file")
	f.StringVar(&trustDomain, "trust-domain", "", "trust domain, for example example.org")
	f.StringVar(&dir, "dir", "root", "folder to make")
	f.StringVar(&life, "life", "10y", "life of the root: 10y, 3650d or 87600h")
	f.StringVar(&algorithm, "algorithm", string(keystore.ECDSAP256), "key: ecdsa-p256, ecdsa-p384, rsa-2048, rsa-3072 or rsa-4096")
	f.IntVar(&pathLength, "path-length", 1, "how many CAs may stand between the root and a certificate")
	f.StringVar(&inVault, "vault", "", "file that says in which Vault and engine the key is made")
	f.BoolVar(&dryRun, "dry-run", false, "only print what would be made")
	passphraseFlag(cmd, &passphraseFile)
	return cmd
}

func rootConfig(trustDomain, dir, algorithm, life string, pathLength int) (cfg ceremony.RootConfig, err error) {
	if trustDomain == "" {
		return cfg, errors.New("root init: give --trust-domain, for example --trust-domain example.org, or a file with -f")
	}
	if cfg.TrustDomain, err = identity.ParseTrustDomain(trustDomain); err != nil {
		return cfg, err
	}
	if cfg.Life, err = ceremony.ParseLife(life); err != nil {
		return cfg, err
	}
	if pathLength == 0 {
		return cfg, errors.New("root init: with --path-length 0 the root could sign no intermediate; use 1")
	}
	cfg.Dir, cfg.Algorithm, cfg.PathLen = dir, keystore.Algorithm(algorithm), pathLength
	return cfg, nil
}

// existing makes an answer of "there is one already".
func existing(err error) error {
	if errors.Is(err, ceremony.ErrExists) || errors.Is(err, fs.ErrExist) || errors.Is(err, pki.ErrAnother) {
		return no("%w", err)
	}
	return err
}

func (c *cli) rootSignCommand() *cobra.Command {
	var ask signAsked
	var file, passphraseFile string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "sign",
		Short: "Sign a cluster's intermediate",
		Long: `Signs the intermediate of a cluster. The fingerprint is the one that "signet cluster init" or "signet rotation start"
printed; bring it by another way than the request, so that a request swapped on its way is noticed (exit status 1).

Nothing but the public key is taken from the request. What will be signed is printed first; the log entry is written
before the signature is made. The chain (intermediate, then root) goes to --out.

Several requests of a cluster are signed in one ceremony: in one file, or --csr repeated, with a --fingerprint for each in
their order. With --stagger each begins that much later than the one before, so that the root can be put away until the
last of them ends. Which of them would never take over, since they end no later than the one before, is said, and which keys
were signed before. The chains follow one another in --out, which "signet cluster install" takes whole.

An intermediate that would outlive its root ends with it; one that would then live less than a day is refused.

With -f everything is taken from a file that can be reviewed first, for one request:

  dir: ./root                        # paths are relative to the file
  trust_domain: example.org
  cluster: east
  csr: ./east.csr.pem
  key_fingerprint: SHA256:ab12:...
  out: ./east.chain.pem
  algorithm: ecdsa-p256              # default: any that is allowed
  life: 90d                          # default
  path_length: 0                     # default, and the only one`,
		Example: `  signet root sign --dir root --csr east.csr.pem --fingerprint SHA256:ab12:... --cluster east --out east.chain.pem
  signet root sign --dir root --csr east.csr.pem --fingerprint SHA256:ab12:... --cluster east --dry-run
  signet root sign --dir root --csr east.csr.pem --fingerprint SHA256:ab12:... --fingerprint SHA256:cd34:... \
    --cluster east --stagger 60d --life 90d --out east.chains.pem
  signet root sign -f sign-east.yaml --passphrase-file root.pass`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := onlyWithoutFile(cmd, file, "dir", "csr", "fingerprint", "cluster", "life", "stagger", "out"); err != nil {
				return err
			}
			sign, err := signConfigs(file, ask)
			if err != nil {
				return err
			}
			root, err := ceremony.OpenRoot(sign[0].Dir, nil)
			if err != nil {
				return err
			}
			holder, err := rootKeyOf(root)
			if err != nil {
				return err
			}
			defer holder.Close()
			if err := holder.signsLater(sign); err != nil {
				return err
			}
			history, unread := root.History(cmd.Context())
			var prepared []*ceremony.Prepared
			var page strings.Builder
			for i, one := range sign {
				p, err := root.Prepare(one.SignConfig)
				if err != nil {
					return refused(ofSeveral(i, len(sign), err))
				}
				if slices.ContainsFunc(prepared, func(q *ceremony.Prepared) bool { return bytes.Equal(q.Plan().SPKI, p.Plan().SPKI) }) {
					return no("request %d of %d has the same key as one before: each intermediate needs a key of its own", i+1, len(sign))
				}
				prepared = append(prepared, p)
				if len(sign) > 1 {
					fmt.Fprintf(&page, "%sRequest %d of %d\n", strings.Repeat("\n", min(i, 1)), i+1, len(sign))
				}
				before := signedBefore(history, p.Plan().SPKI, root)
				if unread != nil { // signing refuses that, with what to do
					before = facts{{"signed before", "not known: " + unread.Error()}}
				}
				if err := append(planFacts(p.Plan(), root, holder), before...).print(&page); err != nil {
					return err
				}
			}
			show := func(to io.Writer) error {
				_, err := io.WriteString(to, page.String())
				if none := useless(prepared); none != "" {
					folded(c.err, "of no use: ", "  ", none)
				}
				return err
			}
			if dryRun {
				return show(c.out)
			}
			out := sign[0].Out
			if _, err := os.Lstat(out); out != "-" && err == nil {
				return no("%s already exists and is not overwritten; move it away or give another --out", out)
			}
			if _, err := os.Stat(filepath.Dir(out)); out != "-" && err != nil {
				return fmt.Errorf("the folder for --out: %w; make it first, nothing was signed", err)
			}
			if err := show(c.err); err != nil {
				return err
			}
			if holder != nil {
				if err := holder.allowed(cmd.Context(), holder.needs); err != nil {
					return err
				}
			}
			signed, err := root.Sign(cmd.Context(), passphrase(passphraseFile, "Passphrase of the root's keys", false), atTheCeremony(), prepared...)
			if err != nil {
				if len(signed) > 0 {
					err = fmt.Errorf("%d of %d were signed, and are kept in %s: %w", len(signed), len(sign), root.RecordsDir(), err)
				}
				return err
			}
			var text []byte
			for _, one := range signed {
				text = append(text, ca.EncodeChain(one.Chain...)...)
			}
			if out == "-" {
				_, err = c.out.Write(text)
			} else {
				err = durable.CreateFile(out, text, 0o644)
			}
			if err != nil {
				return fmt.Errorf("signed, but the chain could not be written: %w; the certificate is kept in %s", err, root.RecordsDir())
			}
			entries, chain := fmt.Sprintf("entry %d", signed[0].Receipt.Index), "chain"
			if n := len(signed); n > 1 {
				entries, chain = fmt.Sprintf("entries %d to %d", signed[0].Receipt.Index, signed[n-1].Receipt.Index), "chains"
			}
			fmt.Fprintf(c.err, "Signed: %s of the root's log, %s in %s. The cluster's admin needs the root's fingerprint as well:\n%s\n",
				entries, chain, out, ca.CertificateFingerprint(root.Certificate().Raw))
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVarP(&file, "file", "f", "", "take everything from this reviewed file")
	f.StringVar(&ask.dir, "dir", "root", "folder of the root")
	f.StringArrayVar(&ask.csrs, "csr", nil, "certificate requests that the cluster wrote; may be repeated")
	f.StringArrayVar(&ask.fingerprints, "fingerprint", nil, "fingerprint of a request's key that the cluster printed; one for each")
	f.StringVar(&ask.cluster, "cluster", "", "name of the cluster")
	f.StringVar(&ask.life, "life", "90d", "life of the intermediate: 90d or 2160h; never beyond the root's")
	f.StringVar(&ask.stagger, "stagger", "", "how much later each of several begins: 60d or 1440h; without it all begin now")
	f.StringVar(&ask.out, "out", "-", "file for the chain; - is stdout")
	f.BoolVar(&dryRun, "dry-run", false, "only print what would be signed; needs no passphrase")
	_ = cmd.MarkFlagDirname("dir")
	_ = cmd.MarkFlagFilename("csr", "pem", "csr")
	passphraseFlag(cmd, &passphraseFile)
	return cmd
}

// signAsked is what the flags of root sign say.
type signAsked struct {
	dir, cluster, life, stagger, out string
	csrs, fingerprints               []string
}

// ofSeveral says of which of several requests an error is.
func ofSeveral(i, n int, err error) error {
	if n == 1 {
		return err
	}
	return fmt.Errorf("request %d of %d: %w", i+1, n, err)
}

// signConfigs is at least one to sign, all of one root and for one file.
func signConfigs(file string, ask signAsked) ([]ceremony.SignFile, error) {
	if file != "" {
		f, err := ceremony.ReadSignFile(file)
		if err != nil {
			return nil, err
		}
		requests, err := ceremony.ReadRequestFile(f.RequestFile)
		if err != nil {
			return nil, refused(err)
		}
		if len(requests) > 1 {
			return nil, no("%s holds %d certificate requests, and %s is for one: give --csr, --fingerprint for each, and --cluster", f.RequestFile, len(requests), file)
		}
		f.Request = requests[0]
		return []ceremony.SignFile{f}, nil
	}
	switch {
	case ask.cluster == "":
		return nil, errors.New("root sign: give --cluster, the name of the cluster that the request is of, or a file with -f")
	case len(ask.csrs) == 0:
		return nil, errors.New("root sign: give --csr, the request that `signet cluster init` wrote, or a file with -f")
	case len(ask.fingerprints) == 0:
		return nil, errors.New("root sign: give --fingerprint, which `signet cluster init` printed; without it a request swapped on its way would get an intermediate")
	case slices.Contains(ask.fingerprints, ""):
		return nil, errors.New("--fingerprint is empty: give it a value or leave it out")
	}
	for _, one := range ask.fingerprints {
		if _, err := ca.ParseFingerprint(one); err != nil {
			return nil, fmt.Errorf("--fingerprint: %w; `signet cluster init` prints it, bring it by another way than the request", err)
		}
	}
	life, err := ceremony.ParseLife(ask.life)
	if err != nil {
		return nil, err
	}
	var stagger time.Duration
	if ask.stagger != "" {
		if stagger, err = ceremony.ParseLife(ask.stagger); err != nil {
			return nil, fmt.Errorf("--stagger: %w", err)
		}
	}
	var requests [][]byte
	for _, path := range ask.csrs {
		some, err := ceremony.ReadRequestFile(path)
		if err != nil {
			return nil, refused(err)
		}
		requests = append(requests, some...)
	}
	switch {
	case len(requests) > ceremony.MaxRequests:
		return nil, no("root sign: %d requests in one ceremony; at most %d are allowed", len(requests), ceremony.MaxRequests)
	case len(requests) != len(ask.fingerprints):
		return nil, no("root sign: there are %d requests and %d fingerprints: give --fingerprint for each request, in their order", len(requests), len(ask.fingerprints))
	case stagger > 0 && len(requests) == 1:
		return nil, errors.New("root sign: --stagger is for several requests, and there is one")
	case stagger >= life:
		return nil, fmt.Errorf("root sign: --stagger %s is not shorter than --life %s: between one and the next nothing could be issued", ask.stagger, ask.life)
	}
	var all []ceremony.SignFile
	for i, request := range requests {
		f := ceremony.SignFile{Dir: ask.dir, Out: ask.out}
		f.Cluster, f.KeyFingerprint, f.Life, f.Request = ask.cluster, ask.fingerprints[i], life, request
		f.Delay = time.Duration(i) * stagger
		all = append(all, f)
	}
	return all, nil
}

// facts is a short text of names and values for people.
type facts [][2]string

func (f facts) print(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, line := range f {
		fmt.Fprintf(tw, "%s:\t%s\n", line[0], line[1])
	}
	return tw.Flush()
}

func planFacts(p ca.Plan, root *ceremony.Root, holder *rootHolder) facts {
	cert := root.Certificate()
	serial, place := hex.EncodeToString(p.Serial), ""
	if holder != nil {
		place = ", with its key in " + holder.place
		if holder.Engine != nil {
			serial = "of Vault's choice"
		}
	}
	life := days(p.NotAfter.Sub(p.NotBefore.Add(ca.PlanBackdate)) + time.Second)
	if !p.NotAfter.Before(cert.NotAfter) {
		life += ", cut short: its root ends then"
	}
	return facts{
		{"sign", p.Kind},
		{"trust domain", p.TrustDomain.Name()},
		{"cluster", p.Cluster},
		{"subject", fmt.Sprintf("CN=%s, O=%s", p.CommonName, p.Organization())},
		{"URI", p.TrustDomain.IDString()},
		{"key", string(p.Algorithm)},
		{"key fingerprint", ca.KeyFingerprint(p.SPKI)},
		{"valid from", clock(p.NotBefore)},
		{"valid until", fmt.Sprintf("%s (%s)", clock(p.NotAfter), life)},
		{"path length", strconv.Itoa(p.PathLen)},
		{"serial", serial},
		{"signed by", cert.Subject.CommonName + place},
		{"root fingerprint", ca.CertificateFingerprint(cert.Raw)},
	}
}

// days writes a life of days as such; what is cut short ends within an hour of that.
func days(d time.Duration) string {
	const day = 24 * time.Hour
	if d < 2*day {
		return d.String()
	}
	d = d.Round(time.Hour)
	text := fmt.Sprintf("%d days", d/day)
	if hours := d % day / time.Hour; hours > 0 {
		text += fmt.Sprintf(" %dh", hours)
	}
	return text
}

// lifeFlag writes a life as flags take it.
func lifeFlag(d time.Duration) string {
	const day = 24 * time.Hour
	if d%day == 0 {
		return fmt.Sprintf("%dd", d/day)
	}
	return d.String()
}

// useless says which of several of one cluster would never take over; "" = each does. They were planned one after another.
func useless(prepared []*ceremony.Prepared) string {
	var which []string
	for i := 1; i < len(prepared); i++ {
		if prepared[i].Plan().NotAfter.Before(prepared[i-1].Plan().NotAfter.Add(time.Minute)) {
			which = append(which, strconv.Itoa(i+1))
		}
	}
	const mend = " ends no later than the one before it. Give --stagger, as signet rotation start printed it, or have each signed when it is due"
	switch n := len(which); n {
	case 0:
		return ""
	case 1:
		return fmt.Sprintf("request %s of %d, since it"+mend, which[0], len(prepared))
	default:
		return fmt.Sprintf("requests %s and %s of %d, since each"+mend, strings.Join(which[:n-1], ", "), which[n-1], len(prepared))
	}
}

// signedBefore says of a key which certificates it has from this root that have not ended yet: a cluster takes one for a key, and
// if the key is lost, what is forged under any is accepted.
func signedBefore(h ceremony.History, spki []byte, root *ceremony.Root) (said facts) {
	now := time.Now()
	for _, m := range h.Made {
		if bytes.Equal(m.Certificate.RawSubjectPublicKeyInfo, spki) && now.Before(m.Certificate.NotAfter) {
			said = append(said, [2]string{"signed before", fmt.Sprintf("until %s, entry %d of the root's log, kept in %s; a cluster takes one certificate for a key",
				clock(m.Certificate.NotAfter), m.Index, root.RecordsDir())})
		}
	}
	return said
}

// rootShown is what `root show` shows.
type rootShown struct {
	TrustDomain    string       `json:"trust_domain"`
	Fingerprint    string       `json:"fingerprint"`
	Subject        string       `json:"subject"`
	Serial         string       `json:"serial"`
	NotBefore      time.Time    `json:"not_before"`
	NotAfter       time.Time    `json:"not_after"`
	PathLength     int          `json:"path_length"`
	KeyFingerprint string       `json:"key_fingerprint"`
	KeyIn          string       `json:"key_in"`
	Log            rootLogShown `json:"log"`
	Signed         []signedCA   `json:"signed"`
}

type rootLogShown struct {
	Origin      string `json:"origin"`
	Size        uint64 `json:"size"`
	VerifierKey string `json:"verifier_key"`
}

type signedCA struct {
	LogIndex       uint64    `json:"log_index"`
	Time           time.Time `json:"time"`
	Kind           string    `json:"kind"`
	Subject        string    `json:"subject"`
	Serial         string    `json:"serial"`
	NotBefore      time.Time `json:"not_before"`
	NotAfter       time.Time `json:"not_after"`
	KeyFingerprint string    `json:"key_fingerprint"`
	By             string    `json:"by"`
}

func (rootShown) columns() []string {
	return []string{"LOG", "TIME", "KIND", "SUBJECT", "NOT AFTER", "SERIAL", "+NOT BEFORE", "+KEY FINGERPRINT", "+BY"}
}

func (s rootShown) rows() [][]string {
	var rows [][]string
	for _, m := range s.Signed {
		rows = append(rows, []string{
			strconv.FormatUint(m.LogIndex, 10), clock(m.Time), m.Kind, m.Subject, clock(m.NotAfter), m.Serial,
			clock(m.NotBefore), m.KeyFingerprint, m.By,
		})
	}
	return rows
}

func (s rootShown) names() []string { return []string{"root/" + s.TrustDomain} }

func (c *cli) rootShowCommand() *cobra.Command {
	var dir, format string
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Show a root and what it has signed",
		Long:  `Shows the root's certificate, its fingerprint, and what its log says it has signed. Needs no passphrase.`,
		Example: `  signet root show --dir root
  signet root show --dir root -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			root, err := ceremony.OpenRoot(dir, nil)
			if err != nil {
				return err
			}
			history, err := root.History(cmd.Context())
			if err != nil {
				return err
			}
			key, err := loadRootKey(root)
			if err != nil {
				return err
			}
			shown := showRoot(root, history, placeOf(key))
			if format == "table" || format == "wide" {
				if err := shown.facts().print(c.out); err != nil {
					return err
				}
				fmt.Fprintln(c.out)
			}
			return c.show(format, shown)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "root", "folder of the root")
	outputFlag(cmd, &format)
	return cmd
}

func showRoot(root *ceremony.Root, h ceremony.History, keyIn string) rootShown {
	cert := root.Certificate()
	s := rootShown{
		TrustDomain: root.TrustDomain().Name(), Fingerprint: ca.CertificateFingerprint(cert.Raw), Subject: cert.Subject.String(),
		Serial: serialOf(cert), NotBefore: cert.NotBefore.UTC(), NotAfter: cert.NotAfter.UTC(), PathLength: cert.MaxPathLen,
		KeyFingerprint: ca.KeyFingerprint(cert.RawSubjectPublicKeyInfo),
		KeyIn:          keyIn,
		Log:            rootLogShown{Origin: h.Origin, Size: h.Size, VerifierKey: h.VerifierKey},
		Signed:         []signedCA{},
	}
	for _, m := range h.Made {
		s.Signed = append(s.Signed, signedCA{
			LogIndex: m.Index, Time: m.Time, Kind: m.Kind, Subject: m.Certificate.Subject.String(), Serial: serialOf(m.Certificate),
			NotBefore: m.Certificate.NotBefore.UTC(), NotAfter: m.Certificate.NotAfter.UTC(),
			KeyFingerprint: ca.KeyFingerprint(m.Certificate.RawSubjectPublicKeyInfo), By: m.By.GetCaller(),
		})
	}
	return s
}

func (s rootShown) facts() facts {
	return facts{
		{"root of", s.TrustDomain},
		{"fingerprint", s.Fingerprint},
		{"subject", s.Subject},
		{"serial", s.Serial},
		{"valid", clock(s.NotBefore) + " to " + clock(s.NotAfter)},
		{"path length", strconv.Itoa(s.PathLength)},
		{"key fingerprint", s.KeyFingerprint},
		{"key in", s.KeyIn},
		{"log", fmt.Sprintf("%d entries, origin %s", s.Log.Size, s.Log.Origin)},
		{"log verifier key", s.Log.VerifierKey},
	}
}

func serialOf(cert *x509.Certificate) string { return hex.EncodeToString(cert.SerialNumber.Bytes()) }
