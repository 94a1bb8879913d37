package lab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"
)

// VaultServerName is in the certificate of every Vault here, beside 127.0.0.1.
const VaultServerName = "vault.test"

// VaultConfig says how a Vault is run.
type VaultConfig struct {
	// Dir is for its configuration, certificates, storage and log; made if it is missing. What is stored there outlives the
	// process, not StartVault, which begins with an empty storage.
	Dir string
	// Plain listens without TLS.
	Plain bool
	// LogLevel of Vault itself; default info.
	LogLevel string
	// Binary is the program; default .tools/bin/vault under the module's root, where `make tools` puts it.
	Binary string
}

// Vault is a real HashiCorp Vault with a storage on disk, initialised and unsealed by one key share. Its methods are for one
// goroutine at a time; clients of it are for any number.
type Vault struct {
	// Address is its URL, the same after a restart.
	Address string
	// CAFile is the root certificate of its listener, in PEM; "" with Plain.
	CAFile    string
	RootToken string
	UnsealKey string
	Dir       string

	life      context.Context
	binary    string
	authority *throwAwayCA // nil with Plain
	client    *http.Client
	proc      *Process
}

// vaultStart bounds a start with all that belongs to it.
const vaultStart = 2 * time.Minute

// StartVault starts a Vault, initialises and unseals it, and waits until it answers. It ends with ctx, with Stop or with this
// process, whichever comes first.
func StartVault(ctx context.Context, c VaultConfig) (*Vault, error) {
	if c.Dir == "" {
		return nil, errors.New("start Vault: no folder given for its storage and log")
	}
	if c.Binary == "" {
		b, err := vaultBinary()
		if err != nil {
			return nil, err
		}
		c.Binary = b
	}
	if c.LogLevel == "" {
		c.LogLevel = "info"
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "data")
	if err := errors.Join(os.RemoveAll(data), os.MkdirAll(data, 0o700)); err != nil {
		return nil, fmt.Errorf("start Vault: %w", err)
	}
	ports, err := FreePorts(2)
	if err != nil {
		return nil, err
	}
	v := &Vault{Dir: dir, life: ctx, binary: c.Binary}
	transport := &http.Transport{MaxIdleConnsPerHost: 4}
	scheme, listener := "http", "tls_disable = true"
	if !c.Plain {
		if err := v.makeCertificates(); err != nil {
			return nil, fmt.Errorf("certificates for Vault: %w", err)
		}
		transport.TLSClientConfig = v.authority.clientConfig()
		scheme, listener = "https", fmt.Sprintf("tls_cert_file = %q\n  tls_key_file = %q", filepath.Join(dir, "tls.pem"), filepath.Join(dir, "tls.key"))
	}
	// No redirects: one node has nobody to send a client to.
	v.client = &http.Client{Transport: transport, Timeout: 20 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	v.Address = fmt.Sprintf("%s://127.0.0.1:%d", scheme, ports[0])
	config := fmt.Sprintf(`storage "raft" {
  path = %q
  node_id = "lab"
  performance_multiplier = 1
}
listener "tcp" {
  address = "127.0.0.1:%d"
  cluster_address = "127.0.0.1:%d"
  %s
}
telemetry {
  disable_hostname = true
  usage_gauge_period = "0"
}
api_addr = %q
cluster_addr = "https://127.0.0.1:%[3]d"
disable_mlock = true
log_level = %[6]q
`, data, ports[0], ports[1], listener, v.Address, c.LogLevel)
	if err := os.WriteFile(v.configPath(), []byte(config), 0o600); err != nil {
		return nil, fmt.Errorf("start Vault: %w", err)
	}
	if err := v.begin(); err != nil {
		v.Stop()
		return nil, err
	}
	return v, nil
}

// begin is the first start: it makes the one key share and the root token.
func (v *Vault) begin() error {
	ctx, cancel := context.WithTimeout(v.life, vaultStart)
	defer cancel()
	if err := v.start(ctx); err != nil {
		return err
	}
	var made struct {
		Keys      []string `json:"keys"`
		RootToken string   `json:"root_token"`
	}
	if err := v.As("").do(ctx, http.MethodPut, "sys/init", map[string]any{"secret_shares": 1, "secret_threshold": 1}, &made); err != nil {
		return v.explain(fmt.Errorf("initialise Vault: %w", err))
	}
	if len(made.Keys) != 1 || made.RootToken == "" {
		return errors.New("initialise Vault: it gives no key or no root token")
	}
	v.UnsealKey, v.RootToken = made.Keys[0], made.RootToken
	return v.Unseal(ctx)
}

// start starts the process and waits until it listens, sealed.
func (v *Vault) start(ctx context.Context) error {
	cmd := exec.CommandContext(v.life, v.binary, "server", "-config", v.configPath())
	cmd.Dir = v.Dir
	cmd.Env = []string{"HOME=" + v.Dir, "PATH=/usr/bin:/bin"} // none of the caller's VAULT_*
	started := make(chan error, 1)
	go func() {
		// The thread that starts the child is held until it ends: the caller's may be gone before.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		p, err := start("vault", cmd, v.LogPath())
		if err == nil {
			v.proc = p
		}
		started <- err
		if err == nil {
			<-p.done
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start Vault: %w", err)
	}
	return v.until(ctx, "listening", func() error {
		var status struct{}
		return v.As("").do(ctx, http.MethodGet, "sys/seal-status", nil, &status)
	})
}

// until polls, because Vault has no other way to wait.
func (v *Vault) until(ctx context.Context, what string, ok func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		last := ok()
		if last == nil {
			return nil
		}
		select {
		case <-v.proc.done:
			return v.explain(fmt.Errorf("wait for Vault to be %s: it has ended", what))
		case <-ctx.Done():
			return v.explain(fmt.Errorf("wait for Vault to be %s: %w; last seen: %w", what, ctx.Err(), last))
		case <-tick.C:
		}
	}
}

// explain adds the end of Vault's log.
func (v *Vault) explain(err error) error {
	b, _ := os.ReadFile(v.LogPath())
	return fmt.Errorf("%w; the last of %s: %s", err, v.LogPath(), b[max(0, len(b)-1500):])
}

// Seal seals it: it listens on and answers 503.
func (v *Vault) Seal(ctx context.Context) error {
	return v.Root().do(ctx, http.MethodPut, "sys/seal", nil, nil)
}

// Unseal unseals it, and waits until it is active.
func (v *Vault) Unseal(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, vaultStart)
	defer cancel()
	var status struct {
		Sealed bool `json:"sealed"`
	}
	if err := v.As("").do(ctx, http.MethodPut, "sys/unseal", map[string]any{"key": v.UnsealKey}, &status); err != nil {
		return v.explain(fmt.Errorf("unseal Vault: %w", err))
	}
	if status.Sealed {
		return errors.New("unseal Vault: it is sealed still")
	}
	return v.until(ctx, "active", func() error { return v.As("").do(ctx, http.MethodGet, "sys/health", nil, nil) })
}

// Stop asks it to end (SIGTERM), by force after 20 s. Twice is once.
func (v *Vault) Stop() { v.end((*Process).Stop) }

// Kill ends it at once (SIGKILL), as a power cut would.
func (v *Vault) Kill() { v.end((*Process).Kill) }

func (v *Vault) end(how func(*Process)) {
	if v.proc == nil {
		return
	}
	how(v.proc)
	v.client.CloseIdleConnections()
}

// Start starts it again after Stop or Kill, on what it had stored. It is sealed then.
func (v *Vault) Start(ctx context.Context) error {
	if !v.proc.ended() {
		return errors.New("start Vault: it runs")
	}
	ctx, cancel := context.WithTimeout(ctx, vaultStart)
	defer cancel()
	return v.start(ctx)
}

// Restart is Stop, Start and Unseal.
func (v *Vault) Restart(ctx context.Context) error {
	v.Stop()
	if err := v.Start(ctx); err != nil {
		return err
	}
	return v.Unseal(ctx)
}

// PID of the process.
func (v *Vault) PID() int { return v.proc.PID() }

// Halt stops it where it is: it hangs, until Resume.
func (v *Vault) Halt(ctx context.Context) error { return v.proc.Halt(ctx) }

// Resume lets it go on after Halt.
func (v *Vault) Resume() error { return v.proc.Resume() }

// LogPath is the file with what Vault says.
func (v *Vault) LogPath() string { return filepath.Join(v.Dir, "vault.log") }

func (v *Vault) configPath() string { return filepath.Join(v.Dir, "vault.hcl") }

// vaultBinary looks from the working directory upwards.
func vaultBinary() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("no Vault: the working directory is in no Go module, name the binary")
		}
	}
	b := filepath.Join(dir, ".tools", "bin", "vault")
	if _, err := os.Stat(b); err != nil {
		return "", fmt.Errorf("no Vault at %s: run `make tools` first", b)
	}
	return b, nil
}

// makeCertificates makes a throw-away CA (ca.pem) and the listener's certificate under it (tls.pem, tls.key).
func (v *Vault) makeCertificates() (err error) {
	if v.authority, err = newThrowAwayCA("Vault's listener"); err != nil {
		return err
	}
	cert, key, err := v.authority.issue(listenerCertificate)
	if err != nil {
		return err
	}
	v.CAFile = filepath.Join(v.Dir, "ca.pem")
	return errors.Join(
		os.WriteFile(v.CAFile, v.authority.pem, 0o600),
		os.WriteFile(filepath.Join(v.Dir, "tls.pem"), cert, 0o600),
		os.WriteFile(filepath.Join(v.Dir, "tls.key"), key, 0o600),
	)
}

// listenerCertificate is what the certificates of listeners are for.
var listenerCertificate = &x509.Certificate{
	DNSNames: []string{VaultServerName}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
}

// throwAwayCA lives as long as a test; its key is in memory only.
type throwAwayCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newThrowAwayCA(name string) (*throwAwayCA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template(name, true), template(name, true), key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &throwAwayCA{cert: cert, key: key, pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}, nil
}

// clientConfig believes it and nobody else.
func (a *throwAwayCA) clientConfig() *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return &tls.Config{RootCAs: pool}
}

func template(name string, isCA bool) *x509.Certificate {
	usage := x509.KeyUsageDigitalSignature
	if isCA {
		usage = x509.KeyUsageCertSign
	}
	return &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes([]byte(rand.Text())[:16]), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: isCA, BasicConstraintsValid: true, KeyUsage: usage,
	}
}

// issue makes a certificate with names and usages as wanted, and a key of its own, both in PEM.
func (a *throwAwayCA) issue(want *x509.Certificate) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	t := template(want.Subject.CommonName, false)
	t.DNSNames, t.IPAddresses, t.URIs, t.ExtKeyUsage = want.DNSNames, want.IPAddresses, want.URIs, want.ExtKeyUsage
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), nil
}
