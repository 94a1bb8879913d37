package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/test/lab"
)

// vaulted is the third story: the root is in Vault, no key of a CA lies on a disk of ours, and Vault goes away.
type vaulted struct {
	*demo
	vault    *lab.Vault
	stopLoad func()
	// login is the block of that name in a cluster's configuration.
	login map[*cluster]string
	// first is the token with which east began.
	first lab.VaultToken
	// sealed and unsealed bound the time without Vault.
	sealed, unsealed time.Time

	mu sync.Mutex
	// a and b are the roots; under is which of them a serial that was seen in a handshake stands under.
	a, b  *vaultRoot
	under map[string]*vaultRoot
	// made is when the certificates were made that a sidecar has shown, to the second below, by serial.
	made map[*sidecar]map[string]time.Time
}

// vaultRoot is a root in Vault's PKI engine.
type vaultRoot struct {
	*lab.VaultRoot
	name, id, fingerprint string
}

const (
	pkiMount, transitMount, kvMount = "pki", "transit", "secret"
	lateID                          = "spiffe://example.org/ns/shop/sa/late"
	// Tokens of east's can be renewed once; then there has to be another login.
	tokenLife, tokenMaxLife = 10 * time.Second, 15 * time.Second
	// backdate is how long before they were made leaves begin.
	backdate = time.Second
)

func vaultStory(d *demo) ([]step, func(), func()) {
	v := &vaulted{demo: d, login: map[*cluster]string{}, under: map[string]*vaultRoot{}, made: map[*sidecar]map[string]time.Time{}}
	d.guest, d.guestID, d.guests = "late", lateID, []string{lateID}
	d.west.ttl = time.Minute
	// Backends hold a connection to the other cluster's frontend open all the time.
	d.ways = append(d.ways, way{d.east.backend, d.west.frontend, 0}, way{d.west.backend, d.east.frontend, 0})
	return []step{
		{"a Vault with root A in its PKI engine, with Transit and KV", v.startVault},
		{"east logs in by AppRole, west by JWT; each may do what signet config vault-policy prints", v.allow},
		{"clusters east (intermediates in memory) and west (in Transit) join under A", v.join},
		{"a server and an agent in each cluster", v.start},
		{"registrations", d.register},
		{"a frontend and a backend Envoy in each cluster", d.startEnvoys},
		{"load both ways; leaves live 10 s in east and 60 s in west", v.load},
		{"root B in Vault: the rotation is begun in east, and west hears of it through KV", v.replaceRoot},
		{"Vault is sealed", v.seal},
		{"Vault is stopped", v.stop},
		{"Vault is started again and unsealed", v.comeBack},
		{"east's tokens live 10 s: what was signed at the start goes on being signed", v.logins},
		{"both clusters show certificates under B alone, and the load ends", v.endLoad},
		{"no private key of a CA lies in a folder of east or west", v.noKeys},
		{"both logs verify, and every serial seen on the wire is proven", v.prove},
	}, v.table, v.tryThis
}

func (v *vaulted) say(format string, args ...any) { fmt.Printf("          "+format+"\n", args...) }

func (v *vaulted) startVault(ctx context.Context) (_ string, err error) {
	began := time.Now()
	if v.vault, err = lab.StartVault(v.whole, lab.VaultConfig{Dir: filepath.Join(v.Dir, "vault")}); err != nil {
		return "", err
	}
	v.atEnd = v.vault.Stop
	for mount, engine := range map[string]string{pkiMount: "pki", transitMount: "transit", kvMount: "kv"} {
		if err := v.vault.Mount(ctx, mount, engine); err != nil {
			return "", err
		}
	}
	if v.a, err = v.makeRoot(ctx, "A"); err != nil {
		return "", err
	}
	return fmt.Sprintf("HashiCorp Vault over TLS, unsealed after %.1f s; root A has the fingerprint %s", time.Since(began).Seconds(), short(v.a.fingerprint)), nil
}

// makeRoot makes a root whose key never leaves Vault, and lets Vault sign with it.
func (v *vaulted) makeRoot(ctx context.Context, name string) (*vaultRoot, error) {
	made, err := v.vault.PKIRoot(ctx, pkiMount, "root-"+strings.ToLower(name), lab.TrustDomain, 10*365*24*time.Hour)
	if err != nil {
		return nil, err
	}
	fp := ca.CertificateFingerprint(made.Certificate.Raw)
	pinned, err := ca.ParseFingerprint(fp)
	if err != nil {
		return nil, err
	}
	return &vaultRoot{VaultRoot: made, name: name, id: rotation.RootID(pinned[:]), fingerprint: fp}, v.vault.PKIDefault(ctx, pkiMount, made.IssuerID)
}

func (v *vaulted) other(c *cluster) *cluster {
	if c == v.east {
		return v.west
	}
	return v.east
}

// policy is the name of a cluster's.
func policy(c *cluster) string { return "signet-" + c.Name }

// allow makes each cluster's login, and shows that without its policy nothing begins.
func (v *vaulted) allow(ctx context.Context) (string, error) {
	roleID, err := v.vault.AppRole(ctx, v.east.Name, lab.VaultLife{Policies: []string{policy(v.east)}, TTL: tokenLife, MaxTTL: tokenMaxLife})
	if err != nil {
		return "", err
	}
	secretID, err := v.vault.SecretID(ctx, v.east.Name, 0, 0)
	if err != nil {
		return "", err
	}
	issuer, err := v.vault.JWT(ctx, v.west.Name, lab.VaultLife{Policies: []string{policy(v.west)}})
	if err != nil {
		return "", err
	}
	jwt, err := issuer.Token(time.Hour)
	if err != nil {
		return "", err
	}
	if err := errors.Join(v.Write("east/vault.secret-id", secretID), v.Write("west/vault.jwt", jwt)); err != nil {
		return "", err
	}
	v.login[v.east] = fmt.Sprintf("{ method: approle, role_id: %s, secret_id_file: ./vault.secret-id }", roleID)
	v.login[v.west] = fmt.Sprintf("{ method: jwt, role: %s, jwt_file: ./vault.jwt }", v.west.Name)
	paths := 0
	for _, c := range v.clusters() {
		if err := v.configure(c, ""); err != nil {
			return "", err
		}
		why, err := v.Fails(ctx, 2, v.initArgs(c, v.a.fingerprint)...)
		if err == nil && !strings.Contains(why, "config vault-policy") {
			err = fmt.Errorf("the refusal does not say what to do: %s", why)
		}
		if err != nil {
			return "", fmt.Errorf("%s without its policy: %w", c.Name, err)
		}
		v.refused++
		n, err := v.writePolicy(ctx, c)
		if err != nil {
			return "", err
		}
		paths += n
	}
	return fmt.Sprintf("%d paths in all; without its policy each cluster was refused", paths), nil
}

// writePolicy gives Vault the policy that the configuration needs, and says how many paths it has.
func (v *vaulted) writePolicy(ctx context.Context, c *cluster) (int, error) {
	hcl, err := v.Run(ctx, "config", "vault-policy", "--config", c.Config())
	if err != nil {
		return 0, err
	}
	return strings.Count(hcl, "\npath "), v.vault.Policy(ctx, policy(c), hcl)
}

// configure writes a cluster's configuration; peer is the verifier key of the other's log, "" while it is not known.
func (v *vaulted) configure(c *cluster, peer string) error {
	keys, peers := "memory", ""
	if c == v.west {
		keys = "vault-transit"
	}
	if peer != "" {
		peers = fmt.Sprintf("  peers:\n    - { cluster: %s, log_verifier_key: %q }\n", v.other(c).Name, peer)
	}
	c.Keystore = fmt.Sprintf("  control_ca: vault-transit\n  intermediates: %s\n", keys)
	// What takes days elsewhere takes seconds here: a peer is believed for seconds, and clocks agree to a second.
	return c.Configure(fmt.Sprintf(`vault:
  address: %s
  ca_file: %s
  timeout: 2s
  login: %s
upstream: { vault_pki: { mount: %s, life: 1h } }
trust: { vault_kv: { mount: %s } }
leaf: { ttl: %[6]s, max_ttl: %[6]s, backdate: %[7]s }
rotation:
  skew: 1s
  report_life: 30s
%[8]s`, v.vault.Address, v.vault.CAFile, v.login[c], pkiMount, kvMount, v.life(c), backdate, peers))
}

func (v *vaulted) initArgs(c *cluster, root string) []string {
	return []string{"cluster", "init", "--config", c.Config(), "--root-fingerprint", root}
}

// shownCluster is what `cluster show` says.
type shownCluster struct {
	LogVerifierKey string `json:"log_verifier_key"`
	Authorities    []struct {
		Key            string `json:"key"`
		KeyFingerprint string `json:"key_fingerprint"`
	} `json:"authorities"`
}

func (v *vaulted) show(ctx context.Context, c *lab.Cluster) (s shownCluster, err error) {
	return s, v.JSON(ctx, &s, "cluster", "show", "--config", c.Config())
}

// keys names the keys of a cluster's CAs, by where they are, and gives their fingerprints.
func (s shownCluster) keys() (refs, fingerprints []string) {
	for _, a := range s.Authorities {
		if a.Key != "" {
			refs, fingerprints = append(refs, a.Key), append(fingerprints, a.KeyFingerprint)
		}
	}
	return refs, fingerprints
}

func (v *vaulted) join(ctx context.Context) (string, error) {
	keys := map[*cluster]string{}
	for _, c := range v.clusters() {
		if _, err := v.Fails(ctx, 1, v.initArgs(c, "SHA256:"+strings.Repeat("00", 32))...); err != nil {
			return "", fmt.Errorf("another root than Vault's: %w", err)
		}
		v.refused++
		if _, err := v.Run(ctx, v.initArgs(c, v.a.fingerprint)...); err != nil {
			return "", err
		}
		s, err := v.show(ctx, c.Cluster)
		if err != nil {
			return "", err
		}
		keys[c] = s.LogVerifierKey
	}
	for _, c := range v.clusters() {
		if err := v.configure(c, keys[v.other(c)]); err != nil {
			return "", err
		}
		// It names the other's report now.
		if _, err := v.writePolicy(ctx, c); err != nil {
			return "", err
		}
	}
	return "without a ceremony: Vault signs. Another root's fingerprint was refused", nil
}

func (v *vaulted) start(ctx context.Context) (string, error) {
	seen, err := v.startServersAndAgents(ctx)
	if err != nil {
		return "", err
	}
	for _, c := range v.clusters() {
		s, err := v.show(ctx, c.Cluster)
		if err != nil {
			return "", err
		}
		refs, _ := s.keys()
		v.say("keys of %s's CAs: %s", c.Name, strings.Join(refs, ", "))
	}
	// Between the end of one token and the next login there may be none.
	if err := lab.Until(ctx, "east has a token", 20*time.Second, func() (err error) {
		v.first, err = v.newestToken(ctx)
		return err
	}); err != nil {
		return "", err
	}
	return seen, nil
}

// newestToken is the token that east has, as Vault knows it.
func (v *vaulted) newestToken(ctx context.Context) (lab.VaultToken, error) {
	tokens, err := v.vault.Tokens(ctx, "auth/approle/login")
	if err == nil && len(tokens) == 0 {
		err = errors.New("no token of east is known to Vault")
	}
	if err != nil {
		return lab.VaultToken{}, err
	}
	return tokens[len(tokens)-1], nil
}

func (v *vaulted) load(ctx context.Context) (_ string, err error) {
	if v.stopLoad, err = v.startLoadBeside(ctx, v.look); err != nil {
		return "", err
	}
	if err := v.renewed(ctx, v.east, time.Now()); err != nil {
		return "", err
	}
	return v.renewedSoFar(), nil
}

// since is how many certificates a sidecar has shown that were made after some time.
func (v *vaulted) since(s *sidecar, t time.Time) (n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, made := range v.made[s] {
		if made.After(t) {
			n++
		}
	}
	return n
}

// renewed waits until both sidecars of a cluster show certificates that were made after some time.
func (v *vaulted) renewed(ctx context.Context, c *cluster, since time.Time) error {
	// Requests fail once the old ones have ended.
	return v.until(ctx, c.Name+"'s sidecars show new certificates", v.life(c)+20*time.Second, func() error {
		for _, s := range []*sidecar{c.frontend, c.backend} {
			if v.since(s, since) == 0 {
				return fmt.Errorf("%s does not", s)
			}
		}
		return nil
	})
}

// life is that of a cluster's leaves.
func (v *vaulted) life(c *cluster) time.Duration { return cmp.Or(c.ttl, v.ttl) }

// until is lab.Until that ends with the first request that fails.
func (v *vaulted) until(ctx context.Context, what string, limit time.Duration, ok func() error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var harm error
	err := lab.Until(ctx, what, limit, func() error {
		if harm = v.unharmed(); harm != nil {
			cancel()
			return harm
		}
		return ok()
	})
	if harm != nil {
		return fmt.Errorf("while it was waited until %s: %w", what, harm)
	}
	return err
}

// look makes a fresh handshake with every sidecar a few times a second, and notes what it shows.
func (v *vaulted) look(ctx context.Context) {
	for ctx.Err() == nil {
		for _, s := range v.sidecars() {
			_, _ = v.shows(ctx, s)
		}
		select {
		case <-ctx.Done():
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// shows makes a fresh handshake with a sidecar and finds out under which root its chain stands: under that one alone.
func (v *vaulted) shows(ctx context.Context, s *sidecar) (*vaultRoot, error) {
	chain, err := handshake(ctx, s.in)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, r := range []*vaultRoot{v.a, v.b} {
		if r == nil {
			continue
		}
		roots, between := x509.NewCertPool(), x509.NewCertPool()
		roots.AddCert(r.Certificate)
		for _, c := range chain[1:] {
			between.AddCert(c)
		}
		if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err == nil {
			serial := chain[0].SerialNumber.Text(16)
			v.under[serial] = r
			if v.made[s] == nil {
				v.made[s] = map[string]time.Time{}
			}
			v.made[s][serial] = chain[0].NotBefore.Add(backdate)
			v.seen.saw(s, serial)
			return r, nil
		}
	}
	return nil, fmt.Errorf("%s shows a chain that verifies under no root of Vault's", s)
}

// standingCA is a root or an intermediate as `ca list` shows it.
type standingCA struct {
	ID      string `json:"id"`
	Kind    string `json:"kind"`
	Root    string `json:"root"`
	State   string `json:"state"`
	Signing bool   `json:"signing"`
}

func (v *vaulted) authorities(ctx context.Context, c *cluster) (all []standingCA, err error) {
	return all, v.JSON(ctx, &all, "ca", "list", "--config", c.Config())
}

// signsUnder reports whether a cluster signs under a root, and which CA does.
func (v *vaulted) signsUnder(ctx context.Context, c *cluster, r *vaultRoot) (signer string, err error) {
	all, err := v.authorities(ctx, c)
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(all, func(a standingCA) bool { return a.Kind == ca.KindIntermediate && a.Signing })
	if i < 0 {
		return "", fmt.Errorf("in %s nobody signs", c.Name)
	}
	if all[i].Root != r.id {
		return "", fmt.Errorf("in %s %s signs, under %s", c.Name, all[i].ID, all[i].Root)
	}
	return all[i].ID, nil
}

// replaceRoot begins in east. Nothing is carried: the root and the reports come to west through KV.
func (v *vaulted) replaceRoot(ctx context.Context) (string, error) {
	b, err := v.makeRoot(ctx, "B")
	if err != nil {
		return "", err
	}
	v.mu.Lock()
	v.b = b
	v.mu.Unlock()
	if err := v.Write("root-b.pem", b.PEM); err != nil {
		return "", err
	}
	start := []string{"rotation", "start", "--config", v.east.Config(), "root", "--root", "root-b.pem", "--fingerprint"}
	if _, err := v.Fails(ctx, 1, append(start, v.a.fingerprint)...); err != nil {
		return "", fmt.Errorf("the fingerprint of another root: %w", err)
	}
	v.refused++
	began := time.Now()
	if _, err := v.Run(ctx, append(start, b.fingerprint)...); err != nil {
		return "", err
	}
	said := map[string]bool{}
	if err := v.until(ctx, "both clusters sign under B", time.Minute, func() error {
		if err := v.progress(ctx, said, began); err != nil {
			return err
		}
		for _, c := range v.clusters() {
			if _, err := v.signsUnder(ctx, c, b); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return "", err
	}
	return fmt.Sprintf("both clusters sign under B after %.1f s; no file was carried, and A's fingerprint in place of B's was refused", time.Since(began).Seconds()), nil
}

// progress says what `rotation status` says of root B, once each.
func (v *vaulted) progress(ctx context.Context, said map[string]bool, began time.Time) error {
	for _, c := range v.clusters() {
		out, err := v.Run(ctx, "rotation", "status", "--config", c.Config(), "-o", "json")
		var s struct {
			Authorities []standingCA `json:"authorities"`
		}
		if err := errors.Join(err, json.Unmarshal([]byte(out), &s)); err != nil {
			return err
		}
		for _, a := range s.Authorities {
			if a.ID == v.b.id && !said[c.Name+a.State] {
				said[c.Name+a.State] = true
				v.say("%4.1f s: root B is %s in %s", time.Since(began).Seconds(), a.State, c.Name)
			}
		}
	}
	return nil
}

// impaired returns what a server says that Vault's absence stops, and whether it is ready.
func (v *vaulted) impaired(ctx context.Context, c *cluster) (about, stops []string, ready bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.HTTP+"/readyz", nil)
	if err != nil {
		return nil, nil, false, err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, nil, false, err
	}
	defer resp.Body.Close()
	var s struct {
		Ready    bool `json:"ready"`
		Findings []struct {
			Level   string   `json:"level"`
			About   string   `json:"about"`
			Message string   `json:"message"`
			Stops   []string `json:"stops"`
		} `json:"findings"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		return nil, nil, false, err
	}
	for _, f := range s.Findings {
		if strings.HasPrefix(f.About, "vault-") && f.Level != "ok" {
			about, stops = append(about, strings.TrimPrefix(f.About, "vault-")), append(stops, f.Stops...)
		}
	}
	return about, stops, s.Ready, nil
}

// missesNothing waits until no cluster misses Vault.
func (v *vaulted) missesNothing(ctx context.Context) error {
	for _, c := range v.clusters() {
		if err := v.until(ctx, c.Name+" does not miss Vault", 35*time.Second, func() error {
			about, _, ready, err := v.impaired(ctx, c)
			if err == nil && (len(about) > 0 || !ready) {
				err = fmt.Errorf("it does for %v", about)
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// seal shows that east goes on by what it has in memory, and that west goes on with the certificates that it has given.
func (v *vaulted) seal(ctx context.Context) (string, error) {
	if err := v.missesNothing(ctx); err != nil {
		return "", err
	}
	// Both of west's leaves are to become due without Vault, and Vault is to be back for some time before either ends.
	if err := v.until(ctx, "west's sidecars show young certificates", 2*v.west.ttl, func() error {
		for _, s := range []*sidecar{v.west.frontend, v.west.backend} {
			if v.since(s, time.Now().Add(-v.west.ttl/3)) == 0 {
				return fmt.Errorf("that of %s is older than a third of its life", s)
			}
		}
		return nil
	}); err != nil {
		return "", err
	}
	if err := v.vault.Seal(ctx); err != nil {
		return "", err
	}
	v.sealed = time.Now()
	if _, err := v.vault.Root().Read(ctx, "sys/mounts"); lab.VaultStatus(err) != http.StatusServiceUnavailable {
		return "", fmt.Errorf("a sealed Vault answers: %w", err)
	}
	// A workload that comes for the first time gets a certificate in the one cluster and not in the other.
	late, err := v.east.fetchSVID(ctx, v.guest)
	if err != nil {
		return "", fmt.Errorf("%s in east, while Vault is sealed: %w", v.guest, err)
	}
	if err := ask(ctx, v.west.backend.in, late); err != nil {
		return "", fmt.Errorf("%s of east, in west: %w", v.guest, err)
	}
	if _, err := v.Fails(ctx, 2, "svid", "fetch", "--socket", v.west.Path("run", v.guest+".sock"), "--timeout", "2s"); err != nil {
		return "", fmt.Errorf("%s in west, while Vault is sealed: %w", v.guest, err)
	}
	v.refused++
	for _, c := range v.clusters() {
		if err := v.until(ctx, c.Name+" says that Vault is missed", 15*time.Second, func() error {
			about, stops, ready, err := v.impaired(ctx, c)
			switch {
			case err != nil:
				return err
			case len(about) == 0:
				return errors.New("it does not")
			case slices.Contains(stops, "issuing") != (c == v.west):
				return fmt.Errorf("it says that %v are stopped", stops)
			}
			v.say("%s says: missed for %s; stopped: %s; ready: %v", c.Name, strings.Join(about, ", "), strings.Join(stops, ", "), ready)
			return nil
		}); err != nil {
			return "", err
		}
	}
	if err := v.renewed(ctx, v.east, v.sealed); err != nil {
		return "", err
	}
	return "it answers 503. East renews its leaves, and a workload that comes for the first time gets one; in west it gets none", nil
}

func (v *vaulted) stop(ctx context.Context) (string, error) {
	v.vault.Stop()
	if _, err := v.vault.Root().Read(ctx, "sys/mounts"); err == nil || lab.VaultStatus(err) != 0 {
		return "", fmt.Errorf("a Vault that was stopped answers: %v", err)
	}
	if err := v.renewed(ctx, v.east, time.Now()); err != nil {
		return "", err
	}
	// West's leaves come to the age at which they are renewed.
	if err := v.until(ctx, "west's agent has failed to renew both sidecars' certificates", v.west.ttl, func() error {
		n, err := metric(ctx, v.west.agent.HTTP, "signet_renewals_overdue")
		if err == nil && n < 2 {
			err = fmt.Errorf("it has failed for %.0f", n)
		}
		return err
	}); err != nil {
		return "", err
	}
	for _, s := range []*sidecar{v.west.frontend, v.west.backend} {
		if n := v.since(s, v.sealed); n > 0 {
			return "", fmt.Errorf("%s was renewed %d times without Vault", s, n)
		}
	}
	return "nobody listens. East renews its leaves; west's are due, can't be renewed, and are served as they are", nil
}

func (v *vaulted) comeBack(ctx context.Context) (string, error) {
	if err := v.vault.Start(ctx); err != nil {
		return "", err
	}
	back := time.Now().Truncate(time.Second).Add(-1) // certificates are dated to the second
	if err := v.vault.Unseal(ctx); err != nil {
		return "", err
	}
	v.unsealed = time.Now()
	east := v.since(v.east.frontend, v.sealed) + v.since(v.east.backend, v.sealed)
	if err := v.renewed(ctx, v.west, back); err != nil {
		return "", err
	}
	v.say("west's sidecars show new certificates %.1f s after Vault was unsealed", time.Since(v.unsealed).Seconds())
	if _, err := v.west.fetchSVID(ctx, v.guest); err != nil {
		return "", fmt.Errorf("%s in west, with Vault: %w", v.guest, err)
	}
	if err := v.missesNothing(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("Vault was away for %.1f s: east's sidecars had %d new certificates meanwhile, west's none; west recovered by itself",
		v.unsealed.Sub(v.sealed).Seconds(), east), nil
}

// logins shows that east is asked for something that needs a token, long after the one that it began with has ended.
func (v *vaulted) logins(ctx context.Context) (string, error) {
	before, err := v.signsUnder(ctx, v.east, v.b)
	if err != nil {
		return "", err
	}
	if _, err := v.Run(ctx, "rotation", "start", "--config", v.east.Config(), "intermediate"); err != nil {
		return "", err
	}
	var next string
	if err := v.until(ctx, "another intermediate signs in east", time.Minute, func() (err error) {
		if next, err = v.signsUnder(ctx, v.east, v.b); err == nil && next == before {
			err = errors.New(before + " still does")
		}
		return err
	}); err != nil {
		return "", err
	}
	// There may be none for a moment, see start; and Vault, which has just come back, clears away by and by what has ended.
	if err := v.until(ctx, "Vault knows a newer token of east's, and its first no more", 20*time.Second, func() error {
		tokens, err := v.vault.Tokens(ctx, v.first.Path)
		switch {
		case err != nil:
			return err
		case slices.ContainsFunc(tokens, func(t lab.VaultToken) bool { return t.Accessor == v.first.Accessor }):
			return fmt.Errorf("the token of %s, which was to live until %s, lives", v.first.Made.Format(time.TimeOnly), v.first.Expires.Format(time.TimeOnly))
		case !slices.ContainsFunc(tokens, func(t lab.VaultToken) bool { return t.Made.After(v.first.Expires) }):
			return errors.New("it knows no newer one")
		}
		return nil
	}); err != nil {
		return "", err
	}
	n, err := metric(ctx, v.east.HTTP, `signet_vault_requests_total{op="login",result="ok"}`)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("Vault signed %s, whose key is in memory; %.0f logins so far, and of east's first token Vault knows nothing any more", next, n), nil
}

// metric reads a series from a process.
func metric(ctx context.Context, addr, series string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), series+" "); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, errors.Join(lines.Err(), fmt.Errorf("%s has no metric %s", addr, series))
}

func (v *vaulted) endLoad(ctx context.Context) (string, error) {
	if err := v.until(ctx, "fresh handshakes show certificates under B alone", v.west.ttl, func() error {
		for _, s := range v.sidecars() {
			r, err := v.shows(ctx, s)
			if err == nil && r != v.b {
				err = fmt.Errorf("%s shows one under %s", s, r.name)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return "", err
	}
	if err := v.until(ctx, "root A is retired in both clusters", 20*time.Second, func() error {
		for _, c := range v.clusters() {
			all, err := v.authorities(ctx, c)
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(all, func(a standingCA) bool {
				return a.ID == v.a.id && slices.Contains([]string{string(ca.Retired), string(ca.Removed)}, a.State)
			}) {
				return fmt.Errorf("in %s it is not", c.Name)
			}
		}
		return nil
	}); err != nil {
		return "", err
	}
	v.stopLoad()
	if err := v.unharmed(); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d requests, 0 failed; root A is retired in both clusters; %s", v.requests(), v.renewedSoFar()), nil
}

// noKeys searches the clusters' folders, their logs, databases and caches included.
func (v *vaulted) noKeys(ctx context.Context) (string, error) {
	// A cluster that has its keys in files shows that the search finds them.
	north, err := v.NewCluster("north", "")
	if err != nil {
		return "", err
	}
	if _, err := north.Initialize(ctx); err != nil {
		return "", err
	}
	found := map[*lab.Cluster]int{}
	var others int
	for _, c := range []*lab.Cluster{v.east.Cluster, v.west.Cluster, north} {
		s, err := v.show(ctx, c)
		if err != nil {
			return "", err
		}
		_, wanted := s.keys()
		if len(wanted) < 2 {
			return "", fmt.Errorf("%s shows %d keys of CAs, not those of a control CA and an intermediate", c.Name, len(wanted))
		}
		var passphrases [][]byte // of the server, and of its agent
		for _, path := range []string{c.Path("server.pass"), c.Path("node-1", "seal")} {
			if p, err := os.ReadFile(path); err == nil {
				passphrases = append(passphrases, bytes.TrimSpace(p))
			}
		}
		lying, err := keysIn(c.Path(), passphrases...)
		if err != nil {
			return "", err
		}
		for _, fingerprint := range wanted {
			path, ok := lying[fingerprint]
			if ok && c != north {
				return "", fmt.Errorf("the key of a CA of %s lies in %s", c.Name, path)
			}
			if ok {
				found[c]++
			}
		}
		others += len(lying) - found[c]
	}
	if found[north] != 2 {
		return "", fmt.Errorf("the search finds %d keys of CAs where there are 2", found[north])
	}
	return fmt.Sprintf("none among the %d keys of other things there; in a cluster that has its keys in files the same search finds both", others), nil
}

func (v *vaulted) prove(ctx context.Context) (string, error) {
	for _, c := range v.clusters() {
		if _, err := v.Run(ctx, "log", "verify", "--config", c.Config()); err != nil {
			return "", err
		}
	}
	seen, err := v.demo.prove(ctx)
	return "both verify; " + seen, err
}
