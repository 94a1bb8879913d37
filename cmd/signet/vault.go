package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/bell"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/internal/health"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/server"
	"github.com/signet-ca/signet/vault"
	"github.com/signet-ca/signet/vault/kv"
	"github.com/signet-ca/signet/vault/pki"
	"github.com/signet-ca/signet/vault/transit"
)

// backing is what a cluster's process stands on beside its folder: its keys and, where the configuration names one, Vault.
type backing struct {
	keys keystore.Store
	// upstream and exchange are nil where the configuration has none.
	upstream ca.Upstream
	exchange server.Exchange
	// vault is nil where nothing uses one. needs is what will be asked of it until the next rotation is through.
	vault *vault.Client
	needs []vault.Need
	// signing, certifying and sharing are the ways to its engines, nil where none is used.
	signing, certifying, sharing *vault.Engine
	// metrics are those of the connection, which outlive a server that could not begin.
	metrics *prometheus.Registry
	log     *slog.Logger
	// at is how Vault is reached.
	at config.Vault

	mu sync.Mutex
	// asked is when Vault last said which of the needs are missing; unasked is why it could not be asked since.
	asked   time.Time
	unasked string
	missing []vault.Need
}

// openBacking talks to nobody, and refuses what keys at work in Vault can't go with. What it returns has to be closed.
func openBacking(ctx context.Context, cfg *config.Server, logger *slog.Logger) (_ *backing, err error) {
	files, err := cfg.OpenKeys()
	if err != nil {
		return nil, err
	}
	backends := map[string]keystore.Store{keystore.BackendFile: files, keystore.BackendMemory: keystore.NewMemory()}
	b := &backing{
		keys: keystore.Join{
			Backends: backends,
			// Keys of CAs. The log's, which is none, is a file.
			Homes:   homes(cfg),
			Default: keystore.BackendFile,
		},
		metrics: prometheus.NewRegistry(), log: logger, at: cfg.Vault,
	}
	if !cfg.UsesVault() {
		return b, nil
	}
	if b.needs, err = needsOf(ctx, cfg); err != nil {
		return nil, err
	}
	if b.vault, err = vault.New(vaultConfig(cfg.Vault, logger, b.metrics)); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			b.Close()
		}
	}()
	if cfg.UsesTransit() {
		t := transitConfig(cfg)
		t.Vault, t.Logger, t.Metrics = b.vault, logger, b.metrics
		store, err := transit.New(t)
		if err != nil {
			return nil, err
		}
		backends[transit.Backend] = recorded{store, prefixFile(cfg), t.Prefix}
		b.signing = b.vault.Engine(transit.SigningEngine(t))
	}
	if cfg.Upstream.VaultPKI.Mount != "" {
		p := pkiConfig(cfg)
		p.Vault, p.Logger = b.vault, logger
		if b.upstream, err = pki.New(p); err != nil {
			return nil, err
		}
		b.certifying = b.vault.Engine(p.Mount)
	}
	if cfg.Trust.VaultKV.Mount != "" {
		k := kvConfig(cfg)
		b.sharing = b.vault.Engine(k.Mount)
		k.Vault = b.sharing
		if b.exchange, err = kv.New(k); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func transitConfig(cfg *config.Server) transit.Config {
	t := cfg.Keystore.Transit
	return transit.Config{Mount: t.Mount, Prefix: t.Prefix, Timeout: max(cfg.Vault.Timeout, transit.DefaultTimeout)}
}

func pkiConfig(cfg *config.Server) pki.Config {
	return pki.Config{Mount: cfg.Upstream.VaultPKI.Mount, Issuer: cfg.Upstream.VaultPKI.Issuer}
}

func kvConfig(cfg *config.Server) kv.Config {
	k := kv.Config{Mount: cfg.Trust.VaultKV.Mount, Path: cfg.Trust.VaultKV.Path, Cluster: cfg.Cluster}
	for _, p := range cfg.Rotation.Peers {
		k.Peers = append(k.Peers, p.Cluster)
	}
	return k
}

// transitUses are what Transit's keys are used for. The control CA's is made once, and stays what it is. There may be older keys of
// what is made elsewhere by now, where some are at work, or a mount is given in the file.
func transitUses(cfg *config.Server, at inTransit) (uses []transit.Use) {
	for _, name := range slices.Sorted(maps.Keys(homes(cfg))) {
		u := transit.Use{Name: name, Shrinks: name == server.IntermediateKey}
		have, works := at.algorithms[name]
		switch {
		case homes(cfg)[name] == config.KeysTransit:
			u.Algorithm, u.Made, u.Grows = cmp.Or(have, cfg.Keystore.Algorithm), true, u.Shrinks
		case !works && !cfg.OlderInTransit():
			continue
		}
		uses = append(uses, u)
	}
	return uses
}

// homes says where the keys of CAs are made.
func homes(cfg *config.Server) map[string]string {
	return map[string]string{server.ControlKey: cfg.Keystore.ControlCA, server.IntermediateKey: cfg.Keystore.Intermediates}
}

// needsOf is all that a server of this configuration will ask of Vault, with the keys that are at work.
func needsOf(ctx context.Context, cfg *config.Server) (needs []vault.Need, err error) {
	needs = vault.Needs()
	if cfg.UsesTransit() {
		at, err := keysInTransit(ctx, cfg)
		if err == nil {
			err = at.refuses(cfg)
		}
		if err != nil {
			return nil, err
		}
		of, err := transit.Needs(transitConfig(cfg), transitUses(cfg, at)...)
		if err != nil {
			return nil, err
		}
		needs = append(needs, of...)
	}
	if cfg.Upstream.VaultPKI.Mount != "" {
		needs = slices.Concat(needs, pki.Needs(pkiConfig(cfg)), pki.LookNeeds(pkiConfig(cfg)))
	}
	if cfg.Trust.VaultKV.Mount != "" {
		needs = append(needs, kv.Needs(kvConfig(cfg))...)
	}
	return needs, nil
}

// vaultConfig is how Vault is reached.
func vaultConfig(v config.Vault, logger *slog.Logger, metrics prometheus.Registerer) vault.Config {
	l := v.Login
	return vault.Config{
		Address: v.Address, Namespace: v.Namespace, CAFile: v.CAFile, ServerName: v.ServerName, Timeout: v.Timeout,
		Login: vault.Login{
			Method: l.Method, Mount: l.Mount, Role: l.Role, RoleID: l.RoleID,
			TokenFile: l.TokenFile, SecretIDFile: l.SecretIDFile, JWTFile: l.JWTFile, CertFile: l.CertFile, KeyFile: l.KeyFile,
		},
		Logger: logger, Metrics: metrics,
	}
}

// supply adds what the configuration has in Vault to that of a server.
func (b *backing) supply(full *server.Config, cfg *config.Server) {
	full.Upstream, full.UpstreamLife, full.Exchange = b.upstream, cfg.Upstream.VaultPKI.Life, b.exchange
	full.Metrics.MustRegister(b.metrics)
	if b.vault != nil {
		full.Vault = b.look
	}
}

// Close ends the connection.
func (b *backing) Close() {
	if b.vault != nil {
		b.vault.Close()
	}
}

const (
	// asksAgain spaces the questions what the token may do; while something is to be mended it is asked sooner.
	asksAgain, asksSoon = time.Minute, 5 * time.Second
	// askTimeout bounds one.
	askTimeout = 30 * time.Second
)

// run keeps the connection, and asks at the start and then now and then whether Vault will do what is going to be asked of
// it, until ctx ends.
func (b *backing) run(ctx context.Context) {
	if b.vault == nil {
		return
	}
	var work sync.WaitGroup
	defer work.Wait()
	work.Go(func() { _ = b.vault.Run(ctx) }) // says itself what is wrong
	for ctx.Err() == nil {
		wait := asksAgain
		if err := b.ask(ctx); err != nil || b.lacks() {
			wait = asksSoon
		}
		bell.Wait(ctx, wait, nil)
	}
}

// ask asks Vault what the token may do, and says what is new.
func (b *backing) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	missing, err := b.vault.Missing(ctx, b.needs)
	b.mu.Lock()
	defer b.mu.Unlock()
	if errors.Is(err, vault.ErrLogin) {
		return err // no policy is in question
	}
	if err != nil {
		b.unasked = err.Error()
		return err
	}
	same := func(x, y vault.Need) bool { return x.Path == y.Path && slices.Equal(x.Capabilities, y.Capabilities) }
	for _, n := range missing {
		if !slices.ContainsFunc(b.missing, func(old vault.Need) bool { return same(old, n) }) {
			b.log.Warn("the token of Vault lacks a capability: compare its policy with what signet config vault-policy prints",
				"path", n.Path, "lacks", strings.Join(n.Capabilities, ","), "for", n.Why)
		}
	}
	if len(missing) == 0 && (b.asked.IsZero() || len(b.missing) > 0) {
		b.log.Info("the token of Vault may do all that will be asked")
	}
	b.asked, b.unasked, b.missing = time.Now(), "", missing
	return nil
}

// lacks reports whether something was missing when Vault was asked last.
func (b *backing) lacks() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.missing) > 0
}

// look is what is known of Vault now; it takes no call.
func (b *backing) look() check.Vault {
	s := b.vault.Status()
	b.mu.Lock()
	defer b.mu.Unlock()
	v := check.Vault{
		Address: s.Address, CAFile: b.at.CAFile, ServerName: b.at.ServerName, Away: s.Away || s.Refused && !s.LoggedIn, Refused: s.Refused, Since: s.Since, Ends: s.TokenUntil, Why: s.Why, Mend: s.Mend,
		Asked: b.asked, Unasked: b.unasked,
		Signing: troubleOf(b.signing), Certifying: troubleOf(b.certifying), Sharing: troubleOf(b.sharing),
	}
	for _, n := range b.missing {
		v.Missing = append(v.Missing, check.Lack{Path: n.Path, Capabilities: n.Capabilities, Why: n.Why})
	}
	if s.LoggedIn {
		v.Token = check.Token{File: b.at.Login.TokenFile, Begins: s.TokenBegan, Ends: s.TokenEnds}
	}
	return v
}

func troubleOf(e *vault.Engine) (t check.Trouble) {
	if e != nil {
		t.Since, t.Why = e.Trouble()
	}
	return t
}

// check asks Vault once, for a server that does not run.
func (b *backing) check(ctx context.Context, cfg *config.Server, shown server.Cluster, now time.Time) check.Findings {
	if b.vault == nil {
		return nil
	}
	_ = b.ask(ctx) // the findings say it
	d := check.Duties{
		LeafSpare: rotation.LeastLeft(cfg.Leaf.TTL), ControlSpare: rotation.LeastLeft(cfg.Control.TTL),
		Upstream: b.upstream != nil, Shared: b.exchange != nil, Volatile: cfg.Keystore.Intermediates == config.KeysMemory,
		None: shown.Agents == 0,
	}
	for _, a := range shown.Authorities {
		if a.State != ca.Active || a.Certificate == nil {
			continue
		}
		mesh := a.Hierarchy == identity.Mesh.String()
		if a.Ref.Backend == transit.Backend {
			d.Leaves, d.Control = d.Leaves || mesh, d.Control || !mesh
		}
		if from, until := a.Certificate.NotBefore, a.Certificate.NotAfter; mesh && a.Ref.Backend != keystore.BackendMemory && now.Before(until) {
			d.Due, d.Until = from.Add(time.Duration(cfg.Rotation.PrepareAt*float64(until.Sub(from)))), until
		}
	}
	found := b.look().Findings(d, now)
	if o, told := b.outlook(ctx, cfg, shown, now); told {
		found = append(found, o.Findings(d, now)...)
	}
	return found
}

// outlook is whether the next intermediate would be signed. Which of several roots that would be under, the server decides: one is
// enough.
func (b *backing) outlook(ctx context.Context, cfg *config.Server, shown server.Cluster, now time.Time) (_ check.Outlook, told bool) {
	var first check.Outlook
	for _, root := range shown.RootCertificates {
		o, ok := server.LookUpstream(ctx, b.upstream, root, cfg.Upstream.VaultPKI.Life, now)
		switch {
		case !ok:
		case o.Unfit.Since.IsZero():
			return o, true
		case !told:
			first, told = o, true
		}
	}
	return first, told
}

const (
	// firstWait and mostWait space the tries of a server to begin while its keys are away.
	firstWait, mostWait = time.Second, 15 * time.Second
)

// begin makes the server. While a key that is needed to begin is in a Vault that is away, or that refuses our login, it waits: to
// end would help nobody, and a process that is started again and again with the same secret-id has Vault lock its role. start calls
// its argument before the server opens its own doors.
func (b *backing) begin(ctx context.Context, cfg *config.Server, start func(opening func()) (*server.Server, error)) (*server.Server, error) {
	var door *waitingDoor
	shut := func() {
		if door != nil {
			door.close()
			door = nil
		}
	}
	defer shut()
	for wait := firstWait; ; wait = min(2*wait, mostWait) {
		s, err := start(shut)
		if err == nil || !errors.Is(err, keystore.ErrAway) && !errors.Is(err, vault.ErrLogin) || ctx.Err() != nil {
			return s, err
		}
		if wait == firstWait {
			b.log.Warn("a key that the server needs to begin can't be had; it waits and tries again", "err", err)
		}
		if door == nil {
			door = b.openWaitingDoor(cfg.Listen.HTTP, err)
		} else {
			door.why.Store(&err)
		}
		wait := wait/2 + rand.N(wait/2+1)
		notify(b.log, fmt.Sprintf("STATUS=waiting for Vault\nEXTEND_TIMEOUT_USEC=%d", (wait+time.Minute).Microseconds()))
		bell.Wait(ctx, wait, nil)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
}

// waitingDoor is the HTTP door while the server can't begin. It says that the process lives and why it is not ready: whoever
// restarted it now would gain nothing. It stays open while the server tries again, which takes long where Vault hangs.
type waitingDoor struct {
	http    *http.Server
	serving sync.WaitGroup
	why     atomic.Pointer[error]
}

// openWaitingDoor returns nil where nothing can listen: a server that can't says so itself.
func (b *backing) openWaitingDoor(address string, why error) *waitingDoor {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil
	}
	d := &waitingDoor{}
	d.why.Store(&why)
	d.http = health.NewServer(health.Config{
		Checks: func() []check.Part {
			return []check.Part{{Look: func(context.Context) check.Findings {
				return check.State(check.CodeVault, "vault", "", *d.why.Load(), "", check.Answering, check.Issuing)
			}}}
		},
		Metrics: b.metrics, Logger: b.log,
	})
	d.serving.Go(func() { _ = d.http.Serve(l) })
	return d
}

func (d *waitingDoor) close() {
	d.http.Close()
	d.serving.Wait()
}

func (c *cli) configVaultPolicyCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "vault-policy --config FILE",
		Short: "Print the policy that a server needs in Vault",
		Long: `Prints the smallest policy for Vault with which the server of this configuration can do all that it will ever ask for, the
next rotation included, with what each line is for. No Vault is asked. Where the cluster has been made, the keys that it has in
Vault are read from its state folder: run it there, as the server's user, when the configuration has changed.

A running server asks Vault itself whether its token may do all of this, and says what is missing: signet check.
Exit status 2 if the configuration uses no Vault.`,
		Example: `  signet config vault-policy --config east.yaml
  signet config vault-policy --config east.yaml | vault policy write signet-east -`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.LoadServer(file)
			if err != nil {
				return err
			}
			if !cfg.UsesVault() {
				return fmt.Errorf("%s uses no Vault: nothing in keystore, upstream or trust names it, so no policy is needed", file)
			}
			needs, err := needsOf(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.out, "# What the server of cluster %s of %s asks of Vault.\n\n%s", cfg.Cluster, cfg.TrustDomain.Name(), vault.Policy(needs))
			return err
		},
	}
	serverConfigFlag(cmd, &file)
	return cmd
}
