package audit

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		child(dir)
	}
	goleak.VerifyTestMain(m)
}

const testOrigin = "example.org/east/east-1"

// testKey is one key for all logs of a test, which is what opening a log again needs.
func testKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func testConfig(dir string, key ed25519.PrivateKey) Config {
	return Config{Dir: dir, Origin: testOrigin, Signer: key, CheckpointInterval: leastCheckpointInterval}
}

func open(t testing.TB, c Config) *Log {
	t.Helper()
	l, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeLog(t, l) })
	return l
}

func closeLog(t testing.TB, l *Log) {
	t.Helper()
	if err := l.Close(context.WithoutCancel(t.Context())); err != nil {
		t.Errorf("close: %v", err)
	}
	// Its goroutines may still be ending, and may make a lock file anew in a folder that is being removed.
	t.Cleanup(func() {
		for range 1000 {
			if os.RemoveAll(l.dir) == nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
}

func reader(t testing.TB, dir, key string) *Reader {
	t.Helper()
	r, err := OpenReader(dir, key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("close reader: %v", err)
		}
	})
	return r
}

// event is a small entry that no other is equal to.
func event(n int) *auditv1.Entry {
	return &auditv1.Entry{Time: testTime.UnixNano() + int64(n), Event: &auditv1.Entry_JoinTokenUsed{
		JoinTokenUsed: &auditv1.JoinTokenUsed{TokenId: fmt.Sprintf("%016x", n), Agent: fmt.Sprintf("node-%d", n%3)},
	}}
}

func events(from, n int) []*auditv1.Entry {
	list := make([]*auditv1.Entry, n)
	for i := range list {
		list[i] = event(from + i)
	}
	return list
}

var testTime = time.Date(2026, 11, 21, 8, 0, 0, 0, time.UTC)

func add(t testing.TB, l *Log, entries ...*auditv1.Entry) []Receipt {
	t.Helper()
	receipts, err := l.Append(t.Context(), entries)
	if err != nil {
		t.Fatal(err)
	}
	return receipts
}

// awaitSize waits for a checkpoint of at least this size.
func awaitSize(t testing.TB, l *Log, size uint64) Checkpoint {
	t.Helper()
	for {
		changed := l.Changed()
		raw, err := l.Checkpoint(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		cp, err := ParseCheckpoint(raw, l.VerifierKey())
		if err != nil {
			t.Fatal(err)
		}
		if cp.Size >= size {
			return cp
		}
		select {
		case <-changed:
		case <-time.After(20 * time.Second):
			t.Fatalf("no checkpoint of size %d came; the newest has %d", size, cp.Size)
		}
	}
}

// finished is the folder of a closed log with n small entries, and its verifier key. The folder is a copy: the log's own
// goroutines may still be ending.
func finished(t testing.TB, batches ...int) (dir, vkey string) {
	t.Helper()
	was := filepath.Join(t.TempDir(), "log")
	l, err := Open(t.Context(), testConfig(was, testKey(t)))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, b := range batches {
		add(t, l, events(n, b)...)
		n += b
		awaitSize(t, l, uint64(n))
	}
	closeLog(t, l)
	return duplicate(t, was), l.VerifierKey()
}

// duplicate copies a log's folder.
func duplicate(t testing.TB, dir string) string {
	t.Helper()
	for {
		to := filepath.Join(t.TempDir(), "copy")
		err := os.CopyFS(to, os.DirFS(dir))
		if err == nil {
			return to
		}
		// The log may just have removed a partial file that a full one has superseded.
		if !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

var leafKey = sync.OnceValue(func() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
})

// certificate makes a certificate for a SPIFFE ID.
func certificate(t testing.TB, serial int64, id string) *x509.Certificate {
	t.Helper()
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), URIs: []*url.URL{uri}, NotBefore: testTime, NotAfter: testTime.Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, leafKey().Public(), leafKey())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func issued(at time.Time, cert *x509.Certificate, agent string) *auditv1.Entry {
	return &auditv1.Entry{Time: at.UnixNano(), Event: &auditv1.Entry_CertificateIssued{CertificateIssued: &auditv1.CertificateIssued{
		Tbs:      cert.RawTBSCertificate,
		Evidence: &auditv1.Evidence{Caller: "spiffe://example.org/signet/agent/" + agent, Door: "agent", Agent: agent, Registration: "frontend", Selectors: []string{"unix:uid:1000"}},
	}}}
}

// files lists the regular files of a folder.
func files(t testing.TB, dir string) []string {
	t.Helper()
	var list []string
	err := fs.WalkDir(os.DirFS(dir), ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			list = append(list, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func rewrite(t testing.TB, path string, change func([]byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, change(bytes.Clone(data)), 0o600); err != nil {
		t.Fatal(err)
	}
}
