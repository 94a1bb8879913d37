package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/signet-ca/signet/agent"
	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/ceremony"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/server"
)

// devFlags are those of `serve --dev`.
type devFlags struct {
	on          bool
	dir, socket string
}

func (f *devFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.on, "dev", false, "try Signet out: everything in one process")
	cmd.Flags().StringVar(&f.dir, "dir", filepath.Dir(devSocket), "with --dev: the folder for everything it makes")
	cmd.Flags().StringVar(&f.socket, "socket", "", "with --dev: the Unix socket for SDS (default agent.sock in the folder)")
	_ = cmd.MarkFlagDirname("dir")
}

// Everything in the folder of --dev, by name.
const (
	devMarker     = "SIGNET-DEV"
	devPassphrase = "passphrase"
	devRootDir    = "root"
	devServerDir  = "server"
	devAgentDir   = "agent"
	devServerFile = "server.yaml"
	devEnvoyFile  = "envoy.yaml"
)

const (
	devTrustDomain = "dev.local"
	devCluster     = "dev"
	devAgent       = "dev"
	devUser        = "dev-user"
	// devPrefix is in the names of all CAs made here, so that nobody takes their certificates for others.
	devPrefix = "DEV "
	devLife   = 30 * 24 * time.Hour
)

var devKnown = []string{
	devMarker, devPassphrase, devRootDir, devServerDir, devAgentDir, devServerFile, devEnvoyFile, filepath.Base(devSocket),
}

// dev is the five-minute start: the parts of a cluster as they are elsewhere, wired together in one folder and process.
type dev struct {
	*cli
	dir, socket string
	cfg         *config.Server
	logger      *slog.Logger
	id          spiffeid.ID
}

func (c *cli) serveDev(ctx context.Context, f devFlags) error {
	if err := harden(); err != nil {
		return err
	}
	d := &dev{cli: c}
	var err error
	if d.dir, err = filepath.Abs(f.dir); err != nil {
		return fmt.Errorf("folder %s: %w", f.dir, err)
	}
	d.socket = filepath.Join(d.dir, filepath.Base(devSocket))
	if f.socket != "" {
		if d.socket, err = filepath.Abs(f.socket); err != nil {
			return fmt.Errorf("socket %s: %w", f.socket, err)
		}
	}
	fmt.Fprint(c.err, `
*** DEV *** This is for trying Signet out: a root whose key lies beside it, one user, loopback only. ***
`)
	if err := d.prepare(); err != nil {
		return err
	}
	if err := d.makeCluster(ctx); err != nil {
		return err
	}
	return d.run(ctx, f)
}

// prepare takes the folder, which must be empty or made by an earlier start, and writes the configuration: it is a file
// so that every other command works on this cluster too.
func (d *dev) prepare() error {
	there, err := os.ReadDir(d.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("folder %s: %w", d.dir, err)
	}
	mine := slices.ContainsFunc(there, func(e fs.DirEntry) bool { return e.Name() == devMarker })
	for _, e := range there {
		// Hidden files are what a killed process was about to rename.
		if !mine || !slices.Contains(devKnown, e.Name()) && !strings.HasPrefix(e.Name(), ".") {
			return fmt.Errorf("folder %s holds something that is not --dev's, %q: name an empty or new folder with --dir", d.dir, e.Name())
		}
	}
	if err := durable.Dir(d.dir); err != nil {
		return err
	}
	// The mark first: what a crash leaves behind after this is ours.
	for _, file := range []struct {
		name    string
		content func() (string, error)
	}{
		{devMarker, func() (string, error) {
			return "Made by signet serve --dev. Nothing here is for anything else; remove the folder when you are done.\n", nil
		}},
		{devPassphrase, func() (string, error) { return rand.Text() + "\n", nil }},
		{devServerFile, devServerYAML},
	} {
		path := filepath.Join(d.dir, file.name)
		if _, err := os.Lstat(path); err == nil {
			continue
		}
		text, err := file.content()
		if err != nil {
			return err
		}
		if err := durable.CreateFile(path, []byte(text), 0o600); err != nil {
			return err
		}
	}
	if d.cfg, err = config.LoadServer(filepath.Join(d.dir, devServerFile)); err != nil {
		return err
	}
	d.logger = d.cli.logger(d.cfg.Logging)
	if d.id, err = devIdentity(); err != nil {
		return err
	}
	return d.cfg.CheckLoopback()
}

// devServerYAML is the configuration of the first start. The doors stay where they are then, since the agent remembers.
func devServerYAML() (string, error) {
	var ports [3]string
	for i, preferred := range []string{config.DefaultEnrol, config.DefaultAgents, config.DefaultServerHTTP} {
		port, err := freePort(preferred)
		if err != nil {
			return "", err
		}
		ports[i] = port
	}
	return fmt.Sprintf(`# Made by signet serve --dev. Every command works on this cluster with --config and this file.
trust_domain: `+devTrustDomain+`
cluster: `+devCluster+`
state_dir: ./`+devServerDir+`
keystore: { passphrase_file: ./`+devPassphrase+` }
listen: { enrol: %s, agents: %s, http: %s }
leaf: { ttl: 2m, max_ttl: 1h }
logging: { level: warn }
`, ports[0], ports[1], ports[2]), nil
}

// freePort returns the preferred address, or another on loopback where that one is taken.
func freePort(preferred string) (string, error) {
	for _, address := range []string{preferred, "127.0.0.1:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			continue
		}
		defer l.Close()
		return l.Addr().String(), nil
	}
	return "", errors.New("no free port on loopback")
}

// devIdentity names the caller's own user. What can't stand in a SPIFFE ID is named by number.
func devIdentity() (spiffeid.ID, error) {
	name := "uid-" + strconv.Itoa(os.Geteuid())
	if u, err := user.Current(); err == nil && spiffeid.ValidatePathSegment(u.Username) == nil {
		name = u.Username
	}
	return identity.ParseID("spiffe://" + devTrustDomain + "/ns/default/sa/" + name)
}

func (d *dev) folder(keys keystore.Store) server.Folder { return folderOf(d.cfg, keys, d.logger) }

// makeCluster is root init and cluster init, each as in a real cluster whose root is at hand, each only if it has not been
// done yet.
func (d *dev) makeCluster(ctx context.Context) error {
	keys, err := d.cfg.OpenKeys()
	if err != nil {
		return err
	}
	root, err := devRoot{d}.Root(ctx)
	if err != nil {
		return err
	}
	if now := time.Now(); now.After(root.NotAfter) {
		return fmt.Errorf("what --dev made in %s expired at %s: remove the folder to begin anew", d.dir, clock(root.NotAfter))
	}
	_, err = server.Init(ctx, server.InitConfig{
		Folder: d.folder(keys), Algorithm: d.cfg.Keystore.Algorithm, Ceremony: atHand{}, NamePrefix: devPrefix,
		Upstream: devRoot{d}, Rotation: rotationOf(d.cfg), RootFingerprint: ca.CertificateFingerprint(root.Raw),
	})
	return err
}

// devRoot is the upstream authority of --dev: a root whose key lies in a folder beside, opened when it has to sign. Its log
// tells of what it has signed.
type devRoot struct{ *dev }

var _ ca.Upstream = devRoot{}

// Root is the root, made the first time.
func (d devRoot) Root(ctx context.Context) (root *x509.Certificate, err error) {
	err = d.open(ctx, func(u *ceremony.AtHand) (err error) {
		root, err = u.Root(ctx)
		return err
	})
	return root, err
}

// Sign has the root sign.
func (d devRoot) Sign(ctx context.Context, plan ca.Plan, request []byte) (answer ca.Answer, err error) {
	err = d.open(ctx, func(u *ceremony.AtHand) (err error) {
		answer, err = u.Sign(ctx, plan, request)
		return err
	})
	return answer, err
}

func (d devRoot) open(ctx context.Context, use func(*ceremony.AtHand) error) (err error) {
	dir := filepath.Join(d.dir, devRootDir)
	if err := durable.Dir(dir); err != nil {
		return err
	}
	keys, err := keystore.NewFile(keystore.FileConfig{
		Dir: filepath.Join(dir, "keys"), Passphrase: keystore.PassphraseFile(filepath.Join(d.dir, devPassphrase)),
	})
	if err != nil {
		return err
	}
	logKey, err := keys.Create(ctx, "log", keystore.Ed25519, 0)
	if err != nil {
		return err
	}
	log, err := audit.Open(ctx, audit.Config{Dir: filepath.Join(dir, "log"), Origin: devTrustDomain + "/root/dev", Signer: logKey, Logger: d.logger})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close(context.WithoutCancel(ctx))) }()
	key, err := keys.Create(ctx, "root", keystore.ECDSAP256, 0)
	if err != nil {
		return err
	}
	root, err := d.root(ctx, filepath.Join(dir, "root.pem"), key, log)
	if err != nil {
		return err
	}
	u, err := ceremony.NewAtHand(ceremony.AtHandConfig{Root: root, Key: key, Log: log, By: atTheCeremony()})
	if err != nil {
		return err
	}
	return use(u)
}

func (d *dev) root(ctx context.Context, path string, key keystore.Key, log ca.Log) (*x509.Certificate, error) {
	text, err := os.ReadFile(path)
	if err == nil {
		chain, err := ca.ParseChain(text)
		if err != nil {
			return nil, fmt.Errorf("root %s: %w", path, err)
		}
		return chain[0], nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read root: %w", err)
	}
	fmt.Fprintf(d.err, "making a root in %s\n", d.dir)
	plan, err := ca.NewRootPlan(d.cfg.TrustDomain, key.Public(), time.Now(), devLife)
	if err != nil {
		return nil, err
	}
	plan.CommonName = devPrefix + plan.CommonName
	root, _, err := ceremony.SelfSign(ctx, log, key, plan, atTheCeremony())
	if err != nil {
		return nil, err
	}
	return root, durable.CreateFile(path, ca.EncodeChain(root), 0o644)
}

// run starts server and agent and lets the agent in.
func (d *dev) run(ctx context.Context, f devFlags) error {
	keys, err := d.cfg.OpenKeys()
	if err != nil {
		return err
	}
	full := serverConfig(d.cfg, d.folder(keys))
	full.Upstream, full.UpstreamLife, full.NamePrefix = devRoot{d}, config.DefaultOnlineLife, devPrefix
	s, err := server.New(ctx, full)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	// The server stops after the agent, which would call it away otherwise.
	serving, stopServer := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServer()
	group.Go(func() error { return s.Run(serving) })
	group.Go(func() error {
		defer stopServer()
		a, err := agent.New(ctx, agent.Config{
			StateDir: filepath.Join(d.dir, devAgentDir), Socket: d.socket, JoinToken: d.token,
			Seal: keystore.PassphraseFile(filepath.Join(d.dir, devPassphrase)), Logger: d.logger,
		})
		if err != nil {
			return err
		}
		group.Go(func() error {
			select {
			case <-a.Serving():
				return d.ready(ctx, f)
			case <-ctx.Done():
				return nil
			}
		})
		return a.Run(ctx)
	})
	return group.Wait()
}

// token is the agent's join token, asked for by the same door as every admin's.
func (d *dev) token(ctx context.Context) (t identity.JoinToken, err error) {
	err = d.admin(ctx, filepath.Join(d.dir, devServerFile), func(ctx context.Context, a adminv1.AdminClient) error {
		r, err := a.CreateJoinToken(ctx, &adminv1.CreateJoinTokenRequest{Agent: devAgent})
		if err != nil {
			return err
		}
		t, err = identity.ParseJoinToken(r.Token)
		return err
	})
	return t, err
}

// signing waits for the first intermediate, without which nothing that is typed next would work.
func (d *dev) signing(ctx context.Context) (server.Cluster, error) {
	for {
		shown, err := server.Show(ctx, d.cfg.StateDir)
		if err != nil || slices.ContainsFunc(shown.Authorities, func(a server.AuthorityInfo) bool {
			return a.Hierarchy == identity.Mesh.String() && a.State == ca.Active
		}) {
			return shown, err
		}
		select {
		case <-ctx.Done():
			return shown, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

//go:embed dev_envoy.yaml
var devEnvoy string

// ready registers the caller's own user, writes the Envoy bootstrap and says what to type next.
func (d *dev) ready(ctx context.Context, f devFlags) error {
	err := d.admin(ctx, filepath.Join(d.dir, devServerFile), func(ctx context.Context, a adminv1.AdminClient) error {
		_, err := a.ApplyRegistrations(ctx, &adminv1.ApplyRegistrationsRequest{Registrations: []*signetv1.Registration{{
			Name: devUser, SpiffeId: d.id.String(), Agents: []string{devAgent}, Selectors: []string{"unix:uid:" + strconv.Itoa(os.Geteuid())},
		}}})
		return err
	})
	if err != nil {
		return err
	}
	plain, err := freePort("127.0.0.1:7460")
	if err != nil {
		return err
	}
	tls, err := freePort("127.0.0.1:7461")
	if err != nil {
		return err
	}
	port := func(address string) string { return address[strings.LastIndexByte(address, ':')+1:] }
	quoted := func(s string) string {
		b, _ := json.Marshal(s) // a JSON string is a YAML string; a string always has one
		return string(b)
	}
	var text bytes.Buffer
	if err := template.Must(template.New("envoy").Parse(devEnvoy)).Execute(&text, map[string]string{
		"Dir": f.dir, "Plain": port(plain), "TLS": port(tls), "ID": quoted(d.id.String()), "Socket": quoted(d.socket),
	}); err != nil {
		return fmt.Errorf("write the Envoy bootstrap: %w", err)
	}
	envoy := filepath.Join(d.dir, devEnvoyFile)
	if err := durable.WriteFile(envoy, text.Bytes(), 0o644); err != nil {
		return err
	}
	// As this was called, so that it works where signet is not on the PATH.
	watch := os.Args[0] + " svid watch"
	if looked, err := filepath.Abs(devSocket); err != nil || looked != d.socket {
		watch += " --socket " + d.socket
	}
	shown, err := d.signing(ctx)
	if err != nil {
		return err
	}
	if err := (facts{
		{"your identity", d.id.String() + ", renewed every minute or so"},
		{"root", strings.Join(shown.Roots, " ")},
		{"socket (SDS)", d.socket},
		{"folder", d.dir},
	}).print(d.err); err != nil {
		return err
	}
	_, err = fmt.Fprintf(d.out, `
Type next, in another terminal:

  %s
  envoy -c %s --use-dynamic-base-id    # then: curl -i http://127.0.0.1:%s/

`, watch, filepath.Join(f.dir, devEnvoyFile), port(plain))
	return err
}
