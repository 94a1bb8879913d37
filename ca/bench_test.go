package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"io"
	"math/big"
	"net/url"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/identity"
)

// Every benchmark here prints xF: the CPU of this process per leaf over that of the floor F, which is to parse a CSR,
// verify it, and make one P-256 signature. Both are measured in turns in the same run, so that a busy machine slows both.
// Marks: 1.15 F for a leaf without the log, 1.35 F with it.

// nullLog keeps nothing.
type nullLog struct{}

func (nullLog) Append(_ context.Context, entries []*auditv1.Entry) ([]audit.Receipt, error) {
	return make([]audit.Receipt, len(entries)), nil
}

// cpuTime is user and system time of this process.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// againstFloor runs leaves(n), which makes n leaves, in turns with n times the floor.
func againstFloor(b *testing.B, csrs [][]byte, leaves func(n int)) {
	b.Helper()
	const turn = 4096
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	floor := func(n int) {
		for n := range n {
			csr, err := x509.ParseCertificateRequest(csrs[n%len(csrs)])
			if err != nil {
				b.Fatal(err)
			}
			if err := csr.CheckSignature(); err != nil {
				b.Fatal(err)
			}
			digest := sha256.Sum256(csr.RawTBSCertificateRequest)
			if _, err := ecdsa.SignASN1(rand.Reader, key, digest[:]); err != nil {
				b.Fatal(err)
			}
		}
	}
	var ours, floors time.Duration
	b.ResetTimer()
	for left := b.N; left > 0; left -= turn {
		n := min(left, turn)
		start := cpuTime(b)
		leaves(n)
		ours += cpuTime(b) - start
		b.StopTimer()
		start = cpuTime(b)
		floor(n)
		floors += cpuTime(b) - start
		b.StartTimer()
	}
	b.ReportMetric(float64(ours)/float64(floors), "xF")
	b.ReportMetric(float64(ours.Microseconds())/float64(b.N), "cpu-µs/leaf")
}

func benchCSRs(b *testing.B) [][]byte {
	b.Helper()
	var all [][]byte
	for range 64 {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			b.Fatal(err)
		}
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, der)
	}
	return all
}

// fromCSRs is the whole path from a CSR to a leaf, each leaves in one call of Issue.
func (w *world) fromCSRs(csrs [][]byte, each int) func(n int) {
	ctx := context.Background()
	caller := identity.AsAgent("node-1")
	selectors := []identity.Selector{"unix:uid:1000", "unix:gid:1000", "systemd:unit:web.service"}
	return func(n int) {
		for n > 0 {
			grants := make([]*identity.Grant, min(n, each))
			n -= len(grants)
			for i := range grants {
				key, err := identity.ParseCSR(csrs[(n+i)%len(csrs)])
				if err != nil {
					w.t.Error(err)
					return
				}
				grants[i], err = w.authorizer.Authorize(ctx, caller, identity.WorkloadAsk{
					Registration: "web", Key: key, Instance: "pid 4711 (uid 1000)", Selectors: selectors,
				})
				if err != nil {
					w.t.Error(err)
					return
				}
			}
			for _, r := range w.authority.Issue(ctx, grants) {
				if r.Err != nil {
					w.t.Error(r.Err)
					return
				}
			}
		}
	}
}

func benchWorld(b *testing.B, log Log) *world {
	return newWorld(b, func(o *worldOptions) {
		o.config = func(c *Config) { c.Log, c.Metrics = log, prometheus.NewRegistry() }
	})
}

// BenchmarkLeaf is the whole path without a log. Mark: 1.15 F.
func BenchmarkLeaf(b *testing.B) {
	w, csrs := benchWorld(b, nullLog{}), benchCSRs(b)
	againstFloor(b, csrs, w.fromCSRs(csrs, 1))
}

// BenchmarkLeaf50InACall is the same with fifty leaves in a call. Mark: 1.15 F.
func BenchmarkLeaf50InACall(b *testing.B) {
	w, csrs := benchWorld(b, nullLog{}), benchCSRs(b)
	againstFloor(b, csrs, w.fromCSRs(csrs, 50))
}

// BenchmarkLeafLogged is the whole path into a log on disk, one leaf in a call, 256 calls at a time. Mark: 1.35 F.
func BenchmarkLeafLogged(b *testing.B) {
	_, signer, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	log, err := audit.Open(b.Context(), audit.Config{Dir: b.TempDir(), Origin: "example.org/east/east-1", Signer: signer})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := log.Close(context.Background()); err != nil {
			b.Error(err)
		}
	}()
	const inFlight = 256
	w, csrs := benchWorld(b, log), benchCSRs(b)
	one := w.fromCSRs(csrs, 1)
	againstFloor(b, csrs, func(n int) {
		var left atomic.Int64
		left.Store(int64(n))
		var all sync.WaitGroup
		for range inFlight {
			all.Go(func() {
				for left.Add(-1) >= 0 {
					one(1)
				}
			})
		}
		all.Wait()
	})
}

// BenchmarkLeafByCreateCertificate is the standard library on the same input, for comparison.
func BenchmarkLeafByCreateCertificate(b *testing.B) {
	w, csrs := benchWorld(b, nullLog{}), benchCSRs(b)
	id := []*url.URL{w.directory["web"].ID.URL()}
	againstFloor(b, csrs, func(n int) {
		for n := range n {
			csr, err := x509.ParseCertificateRequest(csrs[n%len(csrs)])
			if err != nil {
				b.Fatal(err)
			}
			if err := csr.CheckSignature(); err != nil {
				b.Fatal(err)
			}
			if _, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
				SerialNumber: big.NewInt(int64(n) + 1<<60), NotBefore: noon, NotAfter: noon.Add(time.Hour), URIs: id,
				KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
				BasicConstraintsValid: true,
			}, w.mesh.Certificate(), csr.PublicKey, w.meshKey.Signer); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// stillSigner costs nothing.
type stillSigner struct{ crypto.Signer }

func (stillSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return make([]byte, 71), nil
}

// BenchmarkIssueWithoutSigning is what Issue adds to the signature: building, the log's entry, metrics.
func BenchmarkIssueWithoutSigning(b *testing.B) {
	w := benchWorld(b, nullLog{})
	w.meshKey.Signer = stillSigner{w.meshKey.Signer}
	grants := make([]*identity.Grant, b.N)
	for n := range grants {
		grants[n] = w.grant("web")
	}
	b.ReportAllocs()
	b.ResetTimer()
	for n := range b.N {
		if r := w.authority.Issue(context.Background(), grants[n:n+1]); len(r) != 1 { // a sampled signature fails, rightly
			b.Fatal("no result")
		}
	}
}
