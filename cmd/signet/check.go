package main

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/server"
)

func (c *cli) checkCommand() *cobra.Command {
	var serverFile, agentFile, failOn, format string
	cmd := &cobra.Command{
		Use:   "check (--config FILE | --agent FILE)",
		Short: "Find what is wrong with a server or an agent, or will be",
		Long: `Looks at a server (--config) or an agent (--agent) of this machine: file modes, clock, disk, swap, keys against
certificates, ends of life, the outage budget, sockets, the audit log, and what the rotation of the CAs waits for. Each finding has a code that stands for ever, one
sentence, and the command that mends it. Nothing is changed. A copy of a state folder can be looked at too.

Exit status: 0 healthy, 1 findings, 2 something could not be told and nothing else was found.`,
		Example: `  signet check --config east.yaml
  signet check --agent node-1.yaml
  signet check --config east.yaml --fail-on error -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			fail := check.Warning
			switch failOn {
			case "warning":
			case "error":
				fail = check.Error
			default:
				return fmt.Errorf("--fail-on %q is unknown: use warning or error", failOn)
			}
			var found check.Findings
			if serverFile != "" {
				cfg, err := config.LoadServer(serverFile)
				if err != nil {
					return err
				}
				found = checkServer(cmd.Context(), cfg, serverFile, time.Now())
			} else {
				cfg, err := config.LoadAgent(agentFile)
				if err != nil {
					return err
				}
				found = checkAgent(cmd.Context(), cfg, agentFile, time.Now())
			}
			found.Sort()
			if err := c.show(format, checkShown{found, c.colours()}); err != nil {
				return err
			}
			return verdict(found, fail)
		},
	}
	f := cmd.Flags()
	f.StringVar(&serverFile, "config", "", "the configuration file of a server")
	f.StringVar(&agentFile, "agent", "", "the configuration file of an agent")
	f.StringVar(&failOn, "fail-on", "warning", "what makes the exit status 1: warning or error")
	cmd.MarkFlagsOneRequired("config", "agent")
	cmd.MarkFlagsMutuallyExclusive("config", "agent")
	_ = cmd.MarkFlagFilename("config", "yaml", "yml")
	_ = cmd.MarkFlagFilename("agent", "yaml", "yml")
	_ = cmd.RegisterFlagCompletionFunc("fail-on", cobra.FixedCompletions([]string{"warning", "error"}, cobra.ShellCompDirectiveNoFileComp))
	outputFlag(cmd, &format)
	return cmd
}

// verdict makes the exit status of what was found.
func verdict(found check.Findings, fail check.Level) error {
	bad, unknown := 0, 0
	for _, f := range found {
		switch {
		case f.Level >= fail:
			bad++
		case f.Level == check.Unknown:
			unknown++
		}
	}
	switch {
	case bad == 1:
		return no("1 finding")
	case bad > 0:
		return no("%d findings", bad)
	case unknown > 0:
		return fmt.Errorf("%d of %d checks could not be made", unknown, len(found))
	}
	return nil
}

func checkServer(ctx context.Context, cfg *config.Server, file string, now time.Time) check.Findings {
	logDir := server.LogDir(cfg.StateDir)
	// What is in the log is public; nobody else comes there through the state folder.
	found := check.Modes(check.Private{Dir: cfg.StateDir, Except: []string{logDir}})
	for _, secret := range []string{cfg.Keystore.PassphraseFile, cfg.Vault.Login.TokenFile, cfg.Vault.Login.SecretIDFile, cfg.Vault.Login.KeyFile} {
		found = append(found, secretFile(secret)...)
	}
	found = append(found, check.Host()...)
	found = append(found, check.Space(cfg.StateDir)...)
	found = append(found, check.Disk(cfg.StateDir)...)
	found = append(found, check.Budget(cfg.Leaf.TTL, rotation.LeastLeft(cfg.Leaf.TTL))...)
	found = append(found, check.Socket(cfg.AdminSocket, "server", "signet serve --config "+file)...)
	shown, err := server.Show(ctx, cfg.StateDir)
	if err != nil {
		found = append(found, check.Unusable(check.CodeState, cfg.StateDir, err, "")...)
		return append(found, check.Log(ctx, logDir, "", now)...)
	}
	found = append(found, check.Log(ctx, logDir, shown.LogVerifierKey, now)...)
	// What agents have acknowledged, and how it goes with Vault, only the server knows; where it can't be asked, the folder alone
	// is looked at, and Vault is asked from here.
	own, running := ownFindings(ctx, cfg.Listen.HTTP, slices.Concat(rotationCodes, storeCodes, clockCodes, keyCodes, sharedCodes))
	// The server looks at its log too, see check.Log.
	own = slices.DeleteFunc(own, func(f check.Finding) bool { return tells(found, f.Code, f.About) })
	b, unopened := openBacking(ctx, cfg, slog.New(slog.DiscardHandler))
	conf := serverConfig(cfg, folderOf(cfg, nil, nil))
	if unopened == nil {
		defer b.Close()
		conf.Keys, conf.Upstream = &openedOnce{Store: b.keys}, b.upstream
	}
	if !running {
		if own, err = server.CheckRotation(ctx, conf, now); err != nil {
			own = check.Unusable(check.CodeSuccessor, "rotation", err, "")
		}
	}
	if unopened != nil {
		keys := check.Unusable(check.CodeKey, "keys", unopened, "")
		if errors.Is(unopened, errOtherKeys) {
			keys[0].Level = check.Error
		}
		return append(append(found, named(own, file)...), keys...)
	}
	if !running {
		own = append(own, b.check(ctx, cfg, shown, now)...)
	}
	found = append(found, own...)
	authorities := slices.DeleteFunc(checkAuthorities(ctx, conf, shown, helps(own), running, now), func(f check.Finding) bool {
		// What is left to the server it may have said.
		return f.Code == check.CodeKey && tells(own, f.Code, f.About)
	})
	return named(append(found, authorities...), file)
}

// tells reports whether something is found of that code about the same.
func tells(found check.Findings, code, about string) bool {
	return slices.ContainsFunc(found, func(f check.Finding) bool { return f.Code == code && f.About == about })
}

// helps is what helps against the end of the intermediate that signs: what does against the end of issuing.
func helps(found check.Findings) string {
	for _, f := range found {
		if f.Code == check.CodeIssuing && f.Mend != "" {
			return f.Mend
		}
	}
	return check.MendStatus
}

// openedOnce opens a key once: that takes a while, for it is sealed against guessing.
type openedOnce struct {
	keystore.Store
	opened map[keystore.Ref]keystore.Key
}

func (o *openedOnce) Open(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	if key, ok := o.opened[ref]; ok {
		return key, nil
	}
	key, err := o.Store.Open(ctx, ref)
	if err == nil {
		if o.opened == nil {
			o.opened = map[keystore.Ref]keystore.Key{}
		}
		o.opened[ref] = key
	}
	return key, err
}

// What a running process is asked, by code.
var (
	rotationCodes = []string{
		check.CodeIssuing, check.CodeSuccessor, check.CodeSignature, check.CodeRootEnd, check.CodePeer, check.CodeTaint, check.CodeStep, check.CodeRestored,
		check.CodeRivals, check.CodeApart,
	}
	storeCodes  = []string{check.CodeState}
	clockCodes  = []string{check.CodeClock}
	keyCodes    = []string{check.CodeKey}
	sharedCodes = []string{check.CodeShared, check.CodeUpstream, check.CodeVault, check.CodePolicy, check.CodeToken}
)

// named puts the configuration's name into the commands that mend.
func named(found check.Findings, file string) check.Findings {
	for i := range found {
		found[i].Mend = strings.ReplaceAll(found[i].Mend, "--config FILE", "--config "+file)
	}
	return found
}

const (
	// ownWait is how long a process may take to say what it finds wrong with itself; maxFindings bounds that, in bytes.
	ownWait     = 3 * time.Second
	maxFindings = 1 << 20
)

// ownFindings are what the process at an HTTP door finds wrong with itself, of the given codes; false = it can't be asked.
func ownFindings(ctx context.Context, address string, codes []string) (check.Findings, bool) {
	if address == "" {
		return nil, false
	}
	ctx, cancel := context.WithTimeout(ctx, ownWait)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", nil)
	if err != nil {
		return nil, false
	}
	request.Header.Set("Accept", "application/json")
	answer, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
	if err != nil {
		return nil, false
	}
	defer answer.Body.Close()
	var said struct{ Findings check.Findings }
	if err := json.NewDecoder(io.LimitReader(answer.Body, maxFindings)).Decode(&said); err != nil {
		return nil, false
	}
	found := slices.DeleteFunc(said.Findings, func(f check.Finding) bool { return !slices.Contains(codes, f.Code) })
	for i := range found {
		f := &found[i]
		f.About, f.Message, f.Mend = printableText(f.About), printableText(f.Message), printableText(f.Mend)
	}
	return found, len(found) > 0
}

// checkAuthorities looks at the CA certificates and their keys. What is not in a file is left to a server that runs: keys in
// its memory are there alone, and to open one in Vault could cost it its next login. mend is what helps
// against the end of the intermediate that signs.
func checkAuthorities(ctx context.Context, conf server.Config, shown server.Cluster, mend string, running bool, now time.Time) (found check.Findings) {
	for _, r := range shown.RootCertificates {
		found = append(found, check.Expiry("root "+r.Subject.CommonName, r, now, check.MendRoot)...)
	}
	installed := false
	for _, a := range shown.Authorities {
		if a.State == ca.Removed {
			continue // its key is destroyed, and its end concerns nobody
		}
		if a.Certificate == nil {
			continue
		}
		mesh := a.Hierarchy == identity.Mesh.String()
		installed = installed || mesh
		switch {
		case a.State == ca.Retired: // it signs nothing more, and is removed when its leaves have ended
		case mesh && a.State == ca.Active:
			found = append(found, check.IssuerLife(a.ID, *a.NotBefore, *a.NotAfter, conf.LeastLife(conf.TTL), now, mend)...)
		case mesh:
			found = append(found, check.Successor(a.ID, *a.NotBefore, *a.NotAfter, conf.LeastLife(conf.TTL), now, mend)...)
		default:
			found = append(found, check.Expiry(a.ID, a.Certificate, now, "")...) // no command renews it
		}
		if running && a.Ref.Backend != keystore.BackendFile || a.Ref.Backend == keystore.BackendMemory {
			found = append(found, check.Finding{Code: check.CodeKey, Level: check.OK, About: a.ID, Message: "its key is " + a.Ref.String() + ", which is left to the server"})
			continue
		}
		var key keystore.Key
		belongs := check.Key(a.ID, a.Certificate, func() (_ crypto.PublicKey, err error) {
			if key, err = conf.Keys.Open(ctx, a.Ref); err != nil {
				return nil, err
			}
			return key.Public(), nil
		}, "")
		if a.State == ca.Retired && belongs.Worst() != check.OK {
			belongs[0].Level, belongs[0].Message = check.OK, belongs[0].Message+"; nothing is signed with it any more"
			found = append(found, belongs...)
			continue
		}
		if exposed := check.Exposed(a.ID, !mesh, a.State, key); belongs.Worst() == check.OK && len(exposed) > 0 {
			belongs = exposed
		}
		found = append(found, belongs...)
	}
	if !installed || len(shown.RootCertificates) == 0 {
		found = append(found, notInstalled(shown, conf.Upstream != nil, running))
	}
	return found
}

// notInstalled is what to do where no intermediate has been installed: with an upstream that signs, a person only sees to it
// that it can.
func notInstalled(shown server.Cluster, upstream, running bool) check.Finding {
	f := check.Finding{
		Code: check.CodeInstalled, Level: check.Error, About: shown.Cluster, Message: "the cluster has no intermediate yet, so nothing can be issued",
		Mend: "signet cluster install --config FILE --chain CHAIN --root-fingerprint SHA256:…",
	}
	switch {
	case !upstream:
	case len(shown.RootCertificates) == 0:
		f.Message += "; nor has it the root that the upstream authority signs under"
		f.Mend = "signet cluster init --config FILE --root-fingerprint SHA256:…"
	case running:
		f.Message += "; the server has one signed by itself, and tries again until it is: what keeps it from that is said under " +
			strings.Join([]string{check.CodeUpstream, check.CodeVault, check.CodePolicy}, ", ")
		f.Mend = ""
	default:
		f.Message += "; the server has one signed by itself when it runs"
		f.Mend = check.MendServe
	}
	return f
}

// maxSecretFile bounds a passphrase, a token or a key, in bytes.
const maxSecretFile = 64 << 10

// secretFile looks at a file that holds a secret, by the rules by which it is read.
func secretFile(path string) check.Findings {
	if path == "" {
		return nil
	}
	if _, err := durable.ReadSecret(path, maxSecretFile); err != nil {
		return check.Findings{{Code: check.CodeModes, Level: check.Error, About: path, Message: err.Error()}}
	}
	return nil
}

func checkAgent(ctx context.Context, cfg *config.Agent, file string, now time.Time) check.Findings {
	sockets := []string{cfg.Socket}
	for _, s := range cfg.Sockets {
		sockets = append(sockets, s.Path)
	}
	found := check.Modes(check.Private{Dir: cfg.StateDir, Except: sockets, Entered: true})
	found = append(found, secretFile(cfg.Seal.PassphraseFile)...)
	found = append(found, check.Host()...)
	found = append(found, check.Space(cfg.StateDir)...)
	found = append(found, check.Disk(cfg.StateDir)...)
	for _, s := range sockets {
		found = append(found, check.Socket(s, "agent", "signet agent --config "+file)...)
	}
	if own, ok := ownFindings(ctx, cfg.HTTP, slices.Concat(clockCodes, []string{check.CodeServer})); ok {
		found = append(found, own...)
	}
	_, local := cfg.Passphrase()
	found = append(found, check.Seal(cfg.StateDir, local)...)
	cert, logKey, err := enrolment(cfg.StateDir)
	if err != nil {
		return append(found, check.Unusable(check.CodeState, cfg.StateDir, err, "signet agent --config "+file+" --join-token-file FILE")...)
	}
	found = append(found, check.Witness(filepath.Join(cfg.StateDir, "checkpoint"), logKey)...)
	return append(found, check.Expiry("control certificate", cert, now, "signet agent status --config "+file)...)
}

// enrolment reads the agent's own certificate, and the key of its server's log, from its state folder.
func enrolment(dir string) (*x509.Certificate, string, error) {
	const most = 256 << 10
	text, err := durable.ReadFile(filepath.Join(dir, "enrolment.json"), "enrolment", most)
	if err != nil {
		return nil, "", err
	}
	var e struct {
		Chain          [][]byte `json:"chain"`
		LogVerifierKey string   `json:"log_verifier_key"`
	}
	if err := durable.DecodeValue(text, &e); err != nil {
		return nil, "", fmt.Errorf("read enrolment: %w", err)
	}
	if len(e.Chain) == 0 {
		return nil, "", errors.New("read enrolment: it holds no certificate")
	}
	cert, err := x509.ParseCertificate(e.Chain[0])
	return cert, e.LogVerifierKey, err
}

// colours reports whether the table may be coloured (https://no-color.org).
func (c *cli) colours() bool {
	f, ok := c.out.(*os.File)
	return ok && os.Getenv("NO_COLOR") == "" && term.IsTerminal(int(f.Fd()))
}

// checkShown is findings as a table.
type checkShown struct {
	Findings check.Findings `json:"findings"`
	colour   bool
}

func (s checkShown) columns() []string {
	return []string{s.painted("STATE", check.Level(-1)), "CODE", "ABOUT", "FINDING", ">MEND"}
}

func (s checkShown) rows() [][]string {
	signs := map[check.Level]string{check.OK: "√", check.Unknown: "?", check.Warning: "‼", check.Error: "×"}
	var rows [][]string
	for _, f := range s.Findings {
		finding := strings.Join(strings.Fields(f.Message), " ")
		if len(f.Stops) > 0 {
			finding += " (stopped: " + strings.Join(f.Stops, ", ") + ")"
		}
		rows = append(rows, []string{s.painted(signs[f.Level]+" "+f.Level.String(), f.Level), f.Code, f.About, finding, f.Mend})
	}
	return rows
}

// painted colours a cell. All cells of the column are, with codes of one length, so that the table stays even.
func (s checkShown) painted(text string, l check.Level) string {
	if !s.colour {
		return text
	}
	colours := map[check.Level]int{check.OK: 32, check.Unknown: 36, check.Warning: 33, check.Error: 31}
	colour, ok := colours[l]
	if !ok {
		colour = 39 // the terminal's own
	}
	return fmt.Sprintf("\x1b[%dm%s\x1b[0m", colour, text)
}

func (s checkShown) names() []string {
	var names []string
	for _, f := range s.Findings {
		names = append(names, "finding/"+f.Code)
	}
	return names
}
