package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
	"github.com/signet-ca/signet/vault"
	"github.com/signet-ca/signet/vault/transit"
)

// vaultAway compares two real servers, asked as in overWire: one that knows nothing of Vault, and one whose intermediate was
// signed by Vault's PKI engine, with its key in memory, and whose Vault has ended since.
func vaultAway(ctx context.Context, b *bench) ([]figure, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	v, err := lab.StartVault(ctx, lab.VaultConfig{Dir: filepath.Join(b.dir, "pki"), LogLevel: "warn"})
	if err != nil {
		return nil, err
	}
	defer v.Stop()
	without, c, err := newCluster(ctx, b, "without", hourlyLeaves)
	if err != nil {
		return nil, err
	}
	defer without.Close()
	with, d, err := vaultCluster(ctx, b, v)
	if err != nil {
		return nil, err
	}
	defer with.Close()
	type side struct {
		cluster *lab.Cluster
		member  *doors.Member
		pid     int
		micros  []float64
	}
	sides := []*side{{cluster: c}, {cluster: d}}
	for _, s := range sides {
		p, err := s.cluster.Serve(ctx)
		if err != nil {
			return nil, err
		}
		if err := s.cluster.Apply(ctx, registration); err != nil {
			return nil, err
		}
		if s.member, err = s.cluster.Member(ctx, "bench"); err != nil {
			return nil, err
		}
		s.pid = p.PID()
	}
	v.Kill()
	var ratios []float64
	for range b.runs {
		for _, s := range sides {
			micros, err := drive(ctx, s.cluster, s.member, s.pid, 64, 1, b.length/3)
			if err != nil {
				return nil, err
			}
			s.micros = append(s.micros, micros)
		}
		n := len(ratios)
		ratios = append(ratios, sides[1].micros[n]/sides[0].micros[n])
	}
	mid := slices.Index(ratios, median(ratios))
	return []figure{figure{
		Name: "server CPU per certificate while Vault is down, the issuer's key in memory, 64 callers; the floor is a server without a Vault", Value: sides[1].micros[mid], Unit: "µs CPU",
	}.against(sides[0].micros[mid], 1.1).spread(ratios)}, nil
}

// vaultCluster makes a cluster under a root in Vault, whose intermediate's key is nowhere but in the server's memory.
func vaultCluster(ctx context.Context, b *bench, v *lab.Vault) (*lab.Lab, *lab.Cluster, error) {
	if err := v.Mount(ctx, "pki", "pki"); err != nil {
		return nil, nil, err
	}
	root, err := v.PKIRoot(ctx, "pki", "bench", lab.TrustDomain, 24*365*time.Hour)
	if err != nil {
		return nil, nil, err
	}
	if err := v.PKIDefault(ctx, "pki", root.IssuerID); err != nil {
		return nil, nil, err
	}
	l, err := lab.New(filepath.Join(b.dir, "with"), b.signet)
	if err != nil {
		return nil, nil, err
	}
	file := filepath.Join(l.Dir, "token")
	c, err := l.NewCluster("bench", "")
	if err != nil {
		return nil, nil, err
	}
	c.Keystore = "  intermediates: memory\n"
	if err := c.Configure(unbounded + hourlyLeaves + fmt.Sprintf("vault: { address: %q, ca_file: %q, login: { method: token, token_file: %q } }\n", v.Address, v.CAFile, file) +
		"upstream: { vault_pki: { mount: pki } }\n"); err != nil {
		return nil, nil, err
	}
	policy, err := l.Run(ctx, "config", "vault-policy", "--config", c.Config())
	if err != nil {
		return nil, nil, err
	}
	if err := v.Policy(ctx, "server", policy); err != nil {
		return nil, nil, err
	}
	token, err := v.MakeToken(ctx, lab.VaultLife{Policies: []string{"server"}})
	if err != nil {
		return nil, nil, err
	}
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		return nil, nil, err
	}
	_, err = l.Run(ctx, "cluster", "init", "--config", c.Config(), "--root-fingerprint", ca.CertificateFingerprint(root.Certificate.Raw))
	return l, c, err
}

// rawBatch is what a batch of the floor holds, and rawFlying how many are under way: about where Vault gives most.
const (
	rawBatch  = 64
	rawFlying = 4
)

// vaultSignatures measures a key in Vault's Transit engine against what Vault itself gives to plain HTTP requests over TLS,
// whose answers nobody reads, let alone verifies. All on the same cores, in turns.
func vaultSignatures(ctx context.Context, b *bench) ([]figure, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	v, err := lab.StartVault(ctx, lab.VaultConfig{Dir: filepath.Join(b.dir, "vault"), LogLevel: "warn"})
	if err != nil {
		return nil, err
	}
	defer v.Stop()
	if err := v.Mount(ctx, "transit", "transit"); err != nil {
		return nil, err
	}
	key, done, err := transitKey(ctx, b, v)
	if err != nil {
		return nil, err
	}
	defer done()
	raw, err := newRawVault(v)
	if err != nil {
		return nil, err
	}
	defer raw.client.CloseIdleConnections()

	ours := func(context.Context) (int, error) {
		digest := sha256.Sum256([]byte(rand.Text()))
		_, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
		return 1, err
	}
	shapes := []struct {
		callers, floorCallers, floorBatch int
		floor                             string
		mark                              float64 // least part of the floor, in %
	}{
		{1, 1, 0, "one signature in a request, one at a time", 80},
		{16, 16, 0, "one signature in a request, 16 at a time", 100},
		{256, 256, 0, "one signature in a request, 256 at a time", 100},
		{256, rawFlying, rawBatch, fmt.Sprintf("%d signatures in a request, %d at a time", rawBatch, rawFlying), 0},
	}
	rates, floors := make([][]float64, len(shapes)), make([][]float64, len(shapes))
	length := b.length / 8
	for range b.runs {
		for i, s := range shapes {
			if s.floorBatch == 0 {
				r, err := rate(ctx, s.callers, length, ours)
				if err != nil {
					return nil, fmt.Errorf("%d callers: %w", s.callers, err)
				}
				rates[i] = append(rates[i], r)
			} else {
				rates[i] = append(rates[i], rates[i-1][len(rates[i-1])-1]) // as many callers as the shape before
			}
			f, err := rate(ctx, s.floorCallers, length, func(ctx context.Context) (int, error) { return raw.sign(ctx, s.floorBatch) })
			if err != nil {
				return nil, fmt.Errorf("floor, %s: %w", s.floor, err)
			}
			floors[i] = append(floors[i], f)
		}
	}
	var figures []figure
	for i, s := range shapes {
		var ratios []float64
		for n := range rates[i] {
			ratios = append(ratios, 100*rates[i][n]/floors[i][n])
		}
		mid := slices.Index(ratios, median(ratios))
		name := fmt.Sprintf("signatures by a P-256 key in Vault's Transit, %d at a time, against plain requests: %s", s.callers, s.floor)
		figures = append(figures, figure{Name: name, Value: rates[i][mid], Unit: "signatures/s"}.against(floors[i][mid], 0))
		if s.mark > 0 {
			figures = append(figures, figure{Name: name + ": part of the floor, at least", Value: ratios[mid], Unit: "%"}.atLeast(s.mark).spread(ratios))
		}
	}
	return figures, nil
}

// transitKey makes a key as signet serve would, with a token that may do what that needs.
func transitKey(ctx context.Context, b *bench, v *lab.Vault) (_ keystore.Key, done func(), err error) {
	c := transit.Config{Prefix: "signet-bench-"}
	needs, err := transit.Needs(c)
	if err != nil {
		return nil, nil, err
	}
	if err := v.Policy(ctx, "bench", vault.Policy(append(vault.Needs(), needs...))); err != nil {
		return nil, nil, err
	}
	token, err := v.MakeToken(ctx, lab.VaultLife{Policies: []string{"bench"}})
	if err != nil {
		return nil, nil, err
	}
	file := filepath.Join(b.dir, "vault", "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		return nil, nil, err
	}
	c.Vault, err = vault.New(vault.Config{Address: v.Address, CAFile: v.CAFile, Login: vault.Login{Method: "token", TokenFile: file}})
	if err != nil {
		return nil, nil, err
	}
	store, err := transit.New(c)
	if err != nil {
		c.Vault.Close()
		return nil, nil, err
	}
	key, err := store.Create(ctx, "ca", keystore.ECDSAP256, 0)
	if err != nil {
		c.Vault.Close()
		return nil, nil, err
	}
	return key, c.Vault.Close, nil
}

// rawVault asks for signatures by that key with nothing of ours in between.
type rawVault struct {
	url    string
	token  string
	client *http.Client
}

func newRawVault(v *lab.Vault) (*rawVault, error) {
	text, err := os.ReadFile(v.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, errors.New("the CA file of the Vault holds no certificate")
	}
	return &rawVault{
		url: v.Address + "/v1/transit/sign/signet-bench-ca/sha2-256", token: v.RootToken,
		client: &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, MaxIdleConnsPerHost: 256}},
	}, nil
}

// sign makes one request: for one signature, or for a batch.
func (r *rawVault) sign(ctx context.Context, batch int) (int, error) {
	body := map[string]any{"prehashed": true, "key_version": 1}
	input := func() string {
		digest := sha256.Sum256([]byte(rand.Text()))
		return base64.StdEncoding.EncodeToString(digest[:])
	}
	if batch == 0 {
		body["input"] = input()
	} else {
		items := make([]map[string]string, batch)
		for i := range items {
			items[i] = map[string]string{"input": input()}
		}
		body["batch_input"] = items
	}
	text, err := json.Marshal(body)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.url, bytes.NewReader(text))
	if err != nil {
		return 0, err
	}
	req.Header.Set("X-Vault-Token", r.token)
	resp, err := r.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusOK {
		return 0, errors.New(resp.Status)
	}
	return max(batch, 1), nil
}

// rate is how much so many callers get done in a second. What begins before the end counts, and so does the time it takes.
func rate(ctx context.Context, callers int, length time.Duration, do func(context.Context) (int, error)) (float64, error) {
	var count atomic.Int64
	var failed atomic.Pointer[error]
	var all sync.WaitGroup
	start := time.Now()
	for range callers {
		all.Go(func() {
			for time.Since(start) < length && ctx.Err() == nil {
				n, err := do(ctx)
				if err != nil {
					failed.Store(&err)
					return
				}
				count.Add(int64(n))
			}
		})
	}
	all.Wait()
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	return float64(count.Load()) / time.Since(start).Seconds(), ctx.Err()
}
