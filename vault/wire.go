package vault

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/signet-ca/signet/internal/durable"
)

// freshKey in a request's context asks for a connection of its own.
type freshKey struct{}

// wire carries requests: TLS by files that may change, answers bounded, no proxy of the environment.
type wire struct {
	pooled, fresh http.RoundTripper
}

const (
	maxConns   = 64
	maxPEM     = 1 << 20
	maxKeyFile = 1 << 16
)

func newWire(c Config) (*wire, error) {
	u, err := url.Parse(c.Address)
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: c.Timeout, KeepAlive: 15 * time.Second}
	w := &wire{}
	// HTTP/1.1: a connection that hangs then holds one call, not all.
	pooled := &http.Transport{
		DialContext: dialer.DialContext, DisableCompression: true, MaxResponseHeaderBytes: 64 << 10,
		MaxConnsPerHost: maxConns, MaxIdleConnsPerHost: maxConns, IdleConnTimeout: 90 * time.Second,
	}
	if u.Scheme == "https" {
		trust, err := newTrust(c, u.Hostname())
		if err != nil {
			return nil, err
		}
		pooled.DialTLSContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			// The transport does not pass the request's deadline on to here.
			ctx, cancel := context.WithTimeout(ctx, c.Timeout)
			defer cancel()
			raw, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			conn := tls.Client(raw, trust.config())
			if err := conn.HandshakeContext(ctx); err != nil {
				_ = raw.Close()
				return nil, err
			}
			return conn, nil
		}
	}
	fresh := pooled.Clone()
	fresh.DisableKeepAlives = true
	w.pooled, w.fresh = pooled, fresh
	return w, nil
}

// RoundTrip reads the whole answer, as far as it is allowed to be large.
func (w *wire) RoundTrip(r *http.Request) (*http.Response, error) {
	by := w.pooled
	if r.Context().Value(freshKey{}) != nil {
		by = w.fresh
	}
	resp, err := by.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.ContentLength > maxAnswer {
		return nil, ErrTooLarge
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("its answer ends in the middle: %w", err)
	}
	if len(data) > maxAnswer {
		return nil, ErrTooLarge
	}
	resp.Body = io.NopCloser(bytes.NewReader(data))
	return resp, nil
}

// CloseIdleConnections closes what no call uses.
func (w *wire) CloseIdleConnections() {
	if c, ok := w.pooled.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// serverTrust makes the TLS settings of each new connection from what the files hold then.
type serverTrust struct {
	name  string
	roots *reloaded[*x509.CertPool]
	own   *reloaded[*tls.Certificate]
}

func newTrust(c Config, host string) (*serverTrust, error) {
	t := &serverTrust{name: c.ServerName}
	if t.name == "" {
		t.name = host
	}
	var err error
	if c.CAFile != "" {
		t.roots, err = newReloaded(c.Logger, func() (*x509.CertPool, error) { return readRoots(c.CAFile) }, c.CAFile)
		if err != nil {
			return nil, err
		}
	}
	if c.Login.CertFile != "" {
		t.own, err = newReloaded(c.Logger, func() (*tls.Certificate, error) { return readCertificate(c.Login) }, c.Login.CertFile, c.Login.KeyFile)
		if err != nil {
			return nil, err
		}
	}
	return t, nil
}

func (t *serverTrust) config() *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.name}
	if t.roots != nil {
		c.RootCAs = t.roots.get()
	}
	if t.own != nil {
		// Whatever CAs Vault's listener names: the login's own CA is none of them.
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return t.own.get(), nil }
	}
	return c
}

func readRoots(path string) (*x509.CertPool, error) {
	data, err := durable.ReadFile(path, "vault.ca_file", maxPEM)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("vault.ca_file %s has no certificate in it: give the PEM file of the CA that signed Vault's certificate", path)
	}
	return pool, nil
}

func readCertificate(l Login) (*tls.Certificate, error) {
	chain, err := durable.ReadFile(l.CertFile, "vault.login.cert_file", maxPEM)
	if err != nil {
		return nil, err
	}
	key, err := durable.ReadSecret(l.KeyFile, maxKeyFile)
	if err != nil {
		return nil, fmt.Errorf("vault.login.key_file: %w", err)
	}
	cert, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("vault.login.cert_file %s with vault.login.key_file %s: %w", l.CertFile, l.KeyFile, err)
	}
	return &cert, nil
}

// reloaded is what a file held when it could last be read. A file that is being replaced, or broken, leaves the old value.
type reloaded[T any] struct {
	paths []string
	load  func() (T, error)
	log   *slog.Logger

	mu    sync.Mutex
	stamp string
	value T
}

func newReloaded[T any](log *slog.Logger, load func() (T, error), paths ...string) (*reloaded[T], error) {
	r := &reloaded[T]{paths: paths, load: load, log: log, stamp: stampOf(paths)}
	var err error
	r.value, err = load()
	return r, err
}

func (r *reloaded[T]) get() T {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := stampOf(r.paths)
	if now == r.stamp {
		return r.value
	}
	value, err := r.load()
	if err != nil {
		// Not before it changes again: what failed once fails the same way on each connection.
		r.stamp = now
		r.log.Warn("a changed file for the connection to Vault can't be used, the old contents stay in use", "err", err)
		return r.value
	}
	r.stamp, r.value = now, value
	return value
}

// stampOf changes whenever one of the files is written or replaced, or gets another mode or owner, for which a secret may have been
// refused.
func stampOf(paths []string) string {
	var b strings.Builder
	for _, p := range paths {
		info, err := os.Stat(p)
		if err != nil {
			fmt.Fprintf(&b, "%s\n", err)
			continue
		}
		var inode uint64
		var owner, group uint32
		if s, ok := info.Sys().(*syscall.Stat_t); ok {
			inode, owner, group = s.Ino, s.Uid, s.Gid
		}
		fmt.Fprintf(&b, "%d %d %d %s %d %d\n", info.ModTime().UnixNano(), info.Size(), inode, info.Mode(), owner, group)
	}
	return b.String()
}
