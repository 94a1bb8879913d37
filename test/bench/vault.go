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
	var values, floors, ratios []float64
	for range b.runs {
		// There and back again, so that a load on the machine that grows or falls meets both.
		var micros [2]float64
		for _, i := range []int{0, 1, 1, 0} {
			s := sides[i]
			m, err := drive(ctx, s.cluster, s.member, s.pid, 64, 1, b.length/6)
			if err != nil {
				return nil, err
			}
			micros[i] += m / 2
		}
		values, floors, ratios = append(values, micros[1]), append(floors, micros[0]), append(ratios, micros[1]/micros[0])
	}
	mid := slices.Index(ratios, median(ratios))
	return []figure{figure{
		Name: "server CPU per certificate while Vault is down, the issuer's key in memory, 64 callers; the floor is a server without a Vault", Value: values[mid], Unit: "µs CPU",
	}.against(floors[mid], 1.1).spread(ratios)}, nil
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
	key, token, done, err := transitKey(ctx, b, v)
	if err != nil {
		return nil, err
	}
	defer done()
	raw, err := newRawVault(v, token)
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
		callers int
		// flying requests of the floor, with so many signatures in each; 0 = one, not as a batch.
		flying, batch int
		floor         string
		mark          float64 // of Vault's CPU; 0 = none
	}{
		{1, 1, 0, "one signature in a plain request", 1.2},
		{16, 16, 0, "one signature in a plain request, 16 at a time", 0.5},
		{256, 256, 0, "one signature in a plain request, 256 at a time", 0},
		{256, rawFlying, rawBatch, fmt.Sprintf("%d signatures in a plain request, %d at a time", rawBatch, rawFlying), 1.5},
	}
	// Short turns: the machine is not the same from one second to the next.
	const turns = 2
	length := b.length / 8 / turns
	var figures []figure
	for _, s := range shapes {
		key, floor := newWork(v.PID(), s.callers, ours), newWork(v.PID(), s.flying, func(ctx context.Context) (int, error) { return raw.sign(ctx, s.batch) })
		var rates, micros []float64 // against the floor
		for range b.runs {
			key.begin()
			floor.begin()
			for range turns {
				if err := errors.Join(key.turn(ctx, length), floor.turn(ctx, length)); err != nil {
					return nil, fmt.Errorf("%d callers: %w", s.callers, err)
				}
			}
			rates, micros = append(rates, key.rate()/floor.rate()), append(micros, key.micros()/floor.micros())
		}
		mid := slices.Index(rates, median(rates))
		name := fmt.Sprintf("P-256 key in Vault's Transit, %d at a time; the floor is %s", s.callers, s.floor)
		figures = append(figures, figure{Name: "signatures by a " + name, Value: key.rates[mid], Unit: "signatures/s"}.against(floor.rates[mid], 0).spread(rates))
		if s.mark > 0 {
			mid = slices.Index(micros, median(micros))
			figures = append(figures, figure{Name: "CPU of Vault for a signature by a " + name, Value: key.cpu[mid], Unit: "µs CPU"}.against(floor.cpu[mid], s.mark).spread(micros))
		}
	}
	return figures, nil
}

// work is something that callers do over and over, in turns with something else, and what it costs another process.
type work struct {
	pid, callers int
	do           func(context.Context) (int, error)

	count int64
	took  time.Duration
	used  float64 // µs CPU
	// rates and cpu of the runs so far.
	rates, cpu []float64
}

func newWork(pid, callers int, do func(context.Context) (int, error)) *work {
	return &work{pid: pid, callers: callers, do: do}
}

// begin begins a run.
func (w *work) begin() { w.count, w.took, w.used = 0, 0, 0 }

// turn has the callers work for a while. What begins before its end counts, and so does the time it takes.
func (w *work) turn(ctx context.Context, length time.Duration) error {
	before, err := cpuMicros(w.pid)
	if err != nil {
		return err
	}
	var count atomic.Int64
	var failed atomic.Pointer[error]
	var all sync.WaitGroup
	start := time.Now()
	for range w.callers {
		all.Go(func() {
			for time.Since(start) < length && ctx.Err() == nil {
				n, err := w.do(ctx)
				if err != nil {
					failed.Store(&err)
					return
				}
				count.Add(int64(n))
			}
		})
	}
	all.Wait()
	w.took += time.Since(start)
	if err := failed.Load(); err != nil {
		return *err
	}
	after, err := cpuMicros(w.pid)
	w.count, w.used = w.count+count.Load(), w.used+after-before
	return errors.Join(err, ctx.Err())
}

// rate ends a run: how much was done in a second.
func (w *work) rate() float64 {
	w.rates = append(w.rates, float64(w.count)/w.took.Seconds())
	return w.rates[len(w.rates)-1]
}

// micros ends a run: the CPU of one piece, in µs.
func (w *work) micros() float64 {
	w.cpu = append(w.cpu, w.used/float64(w.count))
	return w.cpu[len(w.cpu)-1]
}

// transitKey makes a key as signet serve would, with a token that may do what that needs.
func transitKey(ctx context.Context, b *bench, v *lab.Vault) (_ keystore.Key, token string, done func(), err error) {
	c := transit.Config{Prefix: "signet-bench-"}
	needs, err := transit.Needs(c, transit.Use{Name: "ca", Algorithm: keystore.ECDSAP256, Made: true})
	if err != nil {
		return nil, "", nil, err
	}
	if err := v.Policy(ctx, "bench", vault.Policy(append(vault.Needs(), needs...))); err != nil {
		return nil, "", nil, err
	}
	token, err = v.MakeToken(ctx, lab.VaultLife{Policies: []string{"bench"}})
	if err != nil {
		return nil, "", nil, err
	}
	file := filepath.Join(b.dir, "vault", "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		return nil, "", nil, err
	}
	c.Vault, err = vault.New(vault.Config{Address: v.Address, CAFile: v.CAFile, Login: vault.Login{Method: "token", TokenFile: file}})
	if err != nil {
		return nil, "", nil, err
	}
	store, err := transit.New(c)
	if err != nil {
		c.Vault.Close()
		return nil, "", nil, err
	}
	key, err := store.Create(ctx, "ca", keystore.ECDSAP256, 0)
	if err != nil {
		c.Vault.Close()
		return nil, "", nil, err
	}
	return key, token, c.Vault.Close, nil
}

// rawVault asks for signatures by that key with nothing of ours in between, and with the same token: of root Vault asks less.
type rawVault struct {
	url    string
	token  string
	client *http.Client
}

func newRawVault(v *lab.Vault, token string) (*rawVault, error) {
	text, err := os.ReadFile(v.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, errors.New("the CA file of the Vault holds no certificate")
	}
	return &rawVault{
		url: v.Address + "/v1/transit/sign/signet-bench-ca/sha2-256", token: token,
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
