package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/trust"
)

// sidecar is an SDS stream that acknowledges whatever comes.
type sidecar struct {
	conn   *grpc.ClientConn
	stream secretv3.SecretDiscoveryService_StreamSecretsClient
	names  []string
}

func connect(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func subscribe(t *testing.T, conn *grpc.ClientConn, names ...string) *sidecar {
	t.Helper()
	s := &sidecar{conn: conn, names: names}
	var err error
	if s.stream, err = secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(t.Context()); err != nil {
		t.Fatal(err)
	}
	// What the server said to a refused request is in the receive.
	if err := s.stream.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "test"}, ResourceNames: names}); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return s
}

// next returns the secrets of the next response, by name.
func (s *sidecar) next() (map[string]*tlsv3.Secret, error) {
	r, err := s.stream.Recv()
	if err != nil {
		return nil, err
	}
	out := map[string]*tlsv3.Secret{}
	for _, res := range r.Resources {
		var sec tlsv3.Secret
		if err := res.UnmarshalTo(&sec); err != nil {
			return nil, err
		}
		out[sec.Name] = &sec
	}
	return out, s.stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: s.names, VersionInfo: r.VersionInfo, ResponseNonce: r.Nonce})
}

// leafOf fetches the default SVID's leaf over the agent's socket.
func leafOf(t *testing.T, socket string) *x509.Certificate {
	t.Helper()
	s := subscribe(t, connect(t, socket), "default")
	got, err := s.next()
	if err != nil {
		t.Fatal(err)
	}
	block := got["default"].GetTlsCertificate().GetCertificateChain().GetInlineBytes()
	return parsePEM(t, block)
}

func parsePEM(t *testing.T, text []byte) *x509.Certificate {
	t.Helper()
	certs := x509.NewCertPool()
	if !certs.AppendCertsFromPEM(text) {
		t.Fatalf("not PEM: %q", text)
	}
	c, err := x509.ParseCertificate(firstDER(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (n *node) ready(t *testing.T) {
	t.Helper()
	eventually(t, "ready", func() bool {
		return n.findings(t).Ready() && n.connected.Load()
	})
}

func TestAWorkloadGetsItsIdentityAndTrustOverTheSocket(t *testing.T) {
	w := newWorld(t)
	w.open()
	// The real attestor: this very process is the workload.
	me := identity.Selector(fmt.Sprintf("unix:uid:%d", os.Getuid()))
	w.setRegistrations(reg("me", "/me", time.Hour, me))
	n := w.start(t, func(c *Config) { c.Attestor = nil; c.Keys = nil })
	n.ready(t) // making the key takes its time where tests are slow
	s := subscribe(t, connect(t, n.config.Socket), "default", "ROOTCA")
	got := map[string]*tlsv3.Secret{}
	for len(got) < 2 {
		more, err := s.next()
		if err != nil {
			t.Fatal(err)
		}
		for k, v := range more {
			got[k] = v
		}
	}
	leaf := parsePEM(t, got["default"].GetTlsCertificate().GetCertificateChain().GetInlineBytes())
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://example.org/me" {
		t.Fatalf("got %v", leaf.URIs)
	}
	if got["ROOTCA"].GetValidationContext() == nil {
		t.Fatal("no trust came with it")
	}
	w.mu.Lock()
	item := w.items[0]
	w.mu.Unlock()
	if !slices.Contains(item.Selectors, string(me)) || item.Instance == "" {
		t.Fatalf("the server was told %v of %q", item.Selectors, item.Instance)
	}
	eventually(t, "the server hears what the workload believes", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		d := w.bundle.Digest()
		a := w.acks["node-1"]
		return len(a) == 1 && a[0].TrustDomain == td.Name() && bytes.Equal(a[0].Digest, d[:])
	})
	// Keys of workloads are in memory only; the agent's own is sealed.
	_ = filepath.WalkDir(n.config.StateDir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %04o", path, info.Mode().Perm())
		}
		raw, err := os.ReadFile(path)
		if bytes.Contains(raw, []byte("BEGIN PRIVATE KEY")) || bytes.Contains(raw, []byte("BEGIN EC PRIVATE KEY")) {
			t.Errorf("%s holds a key in clear", path)
		}
		return err
	})
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := s.next(); err != nil {
			if status.Code(err) != codes.Unavailable {
				t.Fatalf("an orderly stop ends the stream with %v, want Unavailable", err)
			}
			break
		}
	}
	if _, err := os.Lstat(n.config.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Fatal("the socket is still there after the stop")
	}
}

func TestTwoHundredStreamsOfOneIdentityCostOneIssuance(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	at := &fakeAttestor{selectors: []identity.Selector{uid}, alive: true}
	n := w.start(t, func(c *Config) { c.Attestor = at })
	conns := []*grpc.ClientConn{connect(t, n.config.Socket), connect(t, n.config.Socket)}
	var streams []*sidecar
	for i := range 200 {
		streams = append(streams, subscribe(t, conns[i%2], "default"))
	}
	for i, s := range streams {
		if _, err := s.next(); err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
	}
	if got := w.issuances("web"); got != 1 {
		t.Fatalf("200 streams caused %d issuances, want 1", got)
	}
	for _, c := range conns {
		c.Close()
	}
	eventually(t, "every process is let go", func() bool { at.mu.Lock(); defer at.mu.Unlock(); return at.open == 0 })
}

func TestAnUnregisteredProcessIsRefused(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, "unix:uid:4242"))
	n := w.start(t)
	_, err := subscribe(t, connect(t, n.config.Socket), "default").next()
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "unix:uid:1000") {
		t.Fatalf("got %v", err)
	}
	// It is registered now: the next try works, with no restart of anything.
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	eventually(t, "the registration has arrived", func() bool {
		_, err := subscribe(t, connect(t, n.config.Socket), "default").next()
		return err == nil
	})
}

func TestAWithdrawnIdentityEndsTheStream(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	s := subscribe(t, connect(t, n.config.Socket), "default")
	if _, err := s.next(); err != nil {
		t.Fatal(err)
	}
	w.setRegistrations()
	for {
		if _, err := s.next(); err != nil {
			if status.Code(err) != codes.PermissionDenied {
				t.Fatalf("got %v", err)
			}
			return
		}
	}
}

func TestARestartNeedsNeitherTokenNorServer(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	first := leafOf(t, n.config.Socket)
	c := n.config
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	w.close()

	c.JoinToken = func(context.Context) (identity.JoinToken, error) {
		t.Error("the token of an enrolled agent was read")
		return identity.JoinToken{}, errAway
	}
	c.Metrics = nil
	again, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	n = run(t, again)
	// Without a server: it knows who fits and serves what they had, and the others are refused rather than kept waiting.
	if b, ok := n.bundles.Get(td); !ok || b.Sequence() != 1 {
		t.Fatal("the bundle is forgotten")
	}
	if got, err := subscribe(t, connect(t, c.Socket), "ROOTCA").next(); err != nil || got["ROOTCA"] == nil {
		t.Fatalf("trust without a server: %v", err)
	}
	if !leafOf(t, c.Socket).Equal(first) {
		t.Fatal("another certificate than before the restart")
	}
	n.attestor.(*fakeAttestor).set("unix:uid:4242")
	if _, err := subscribe(t, connect(t, c.Socket), "default").next(); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("somebody else: %v", err)
	}
	n.attestor.(*fakeAttestor).set(uid)
	// The server is back: what it has to say comes through.
	s := subscribe(t, connect(t, c.Socket), "default")
	w.open()
	w.setRegistrations(reg("web", "/web", 2*time.Hour, uid))
	for leaf := first; leaf.Equal(first); { // until there is one on the new terms
		got, err := s.next()
		if err != nil {
			t.Fatal(err)
		}
		leaf = parsePEM(t, got["default"].GetTlsCertificate().GetCertificateChain().GetInlineBytes())
	}
}

func TestTheServerRestartsAndNobodyNotices(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	first := leafOf(t, n.config.Socket)
	w.close()
	eventually(t, "the agent notices", func() bool { return !n.connected.Load() })
	if got := leafOf(t, n.config.Socket); !got.Equal(first) {
		t.Fatal("another certificate while the server is away")
	}
	if found := n.findings(t); !found.Ready() {
		t.Errorf("not ready while it holds all it needs: %+v", found)
	}
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid), reg("more", "/more", time.Hour, uid))
	eventually(t, "news come through again", func() bool { n.hub.mu.Lock(); defer n.hub.mu.Unlock(); return len(n.hub.registrations) == 2 })
}

func TestAnOlderBundleIsRefusedOverRestartsToo(t *testing.T) {
	w := newWorld(t)
	other := newCA(t, "other", nil)
	w.bundle = mustBundle(t, 5, w.root, other)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	n.ready(t)
	c := n.config
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]trust.Bundle{
		"older":                             mustBundle(t, 4, w.root),
		"other content under the same name": mustBundle(t, 5, other),
	} {
		t.Run(name, func(t *testing.T) {
			w.change(func() { w.bundle = b })
			c.Metrics = nil
			log, text := newTestLog(t)
			c.Logger = log
			again, err := New(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			n := run(t, again)
			n.ready(t)
			eventually(t, "it is said", func() bool { return strings.Contains(text.String(), "older or conflicting") })
			if b, _ := n.bundles.Get(td); b.Sequence() != 5 || len(b.Roots()) != 2 {
				t.Fatalf("sequence %d with %d roots is believed", b.Sequence(), len(b.Roots()))
			}
			if err := n.stop(); err != nil {
				t.Fatal(err)
			}
		})
	}
	w.close()
}

func TestABundleOfAnotherTrustDomainIsNotTaken(t *testing.T) {
	w := newWorld(t)
	w.open()
	n := w.start(t)
	n.ready(t)
	if err := n.takeBundle(&signetv1.Bundle{TrustDomain: "evil.example", Sequence: 9, Roots: [][]byte{w.root.cert.Raw}}); err == nil {
		t.Fatal("taken")
	}
	if err := n.takeBundle(&signetv1.Bundle{TrustDomain: td.Name(), Sequence: 9, Roots: [][]byte{{1}}}); err == nil {
		t.Fatal("garbage was taken")
	}
	if err := n.takeBundle(&signetv1.Bundle{TrustDomain: td.Name(), Sequence: 9}); err == nil {
		t.Fatal("an empty bundle was taken")
	}
}

func TestATokenThatIsUsedOrUnknownIsOneClearSentence(t *testing.T) {
	w := newWorld(t)
	w.open()
	source := w.tokenSource("node-1")
	n := w.start(t, func(c *Config) { c.JoinToken = source })
	n.ready(t)
	second := w.start(t, func(c *Config) { c.JoinToken = source })
	err := second.wait(t)
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "ask for a new one") || strings.Contains(err.Error(), "\n") {
		t.Fatalf("got %v", err)
	}
	select {
	case <-second.Enrolled():
		t.Fatal("a refused agent says that it is enrolled")
	default:
	}
	if _, serr := os.Stat(filepath.Join(second.config.StateDir, enrolmentFile)); !errors.Is(serr, os.ErrNotExist) {
		t.Fatal("a refused agent believes to be enrolled")
	}
}

// The server spends the token, and its answer is lost: the next try, or the next start, comes with the same key.
func TestACrashBetweenSpendingAndStoringLosesNothing(t *testing.T) {
	w := newWorld(t)
	w.open()
	source, keys := w.tokenSource("node-1"), keystore.NewMemory()
	dir := t.TempDir()
	same := func(c *Config) {
		c.JoinToken, c.Keys, c.StateDir = source, keys, filepath.Join(dir, "state")
	}
	w.mu.Lock()
	w.loseEnrol = 1 << 30
	w.mu.Unlock()
	first := w.start(t, same)
	w.eventuallyEnrolled(t)
	first.stop()
	w.mu.Lock()
	w.loseEnrol = 0
	w.mu.Unlock()
	n := w.start(t, same)
	n.ready(t)
	if refs, _ := keys.List(t.Context()); len(refs) != 1 {
		t.Fatalf("%d keys were made, want 1", len(refs))
	}
}

// eventuallyEnrolled waits until the server has enrolled somebody, whoever hears of it.
func (w *world) eventuallyEnrolled(t *testing.T) {
	t.Helper()
	eventually(t, "an enrolment", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.enrolled > 0
	})
}

func TestALostAnswerIsAskedForAgain(t *testing.T) {
	w := newWorld(t)
	w.open()
	source := w.tokenSource("node-1")
	w.mu.Lock()
	w.loseEnrol = 1
	w.mu.Unlock()
	w.start(t, func(c *Config) { c.JoinToken = source }).ready(t)
}

// The token ends while the answers are lost: the key that it was spent on is enough.
func TestATokenMayEndWhileItsAnswerIsLost(t *testing.T) {
	w := newWorld(t)
	w.open()
	source := w.tokenSource("node-1")
	w.mu.Lock()
	w.loseEnrol = 1
	w.mu.Unlock()
	n := w.start(t, func(c *Config) { c.JoinToken = source })
	w.eventuallyEnrolled(t)
	w.mu.Lock()
	clear(w.tokens)
	w.mu.Unlock()
	n.ready(t)
}

func TestTheServersHintIsHeeded(t *testing.T) {
	hint := func(d time.Duration) error {
		st, err := status.New(codes.ResourceExhausted, "too many certificates").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(d)})
		if err != nil {
			t.Fatal(err)
		}
		return st.Err()
	}
	for _, c := range []struct {
		err  error
		want time.Duration
	}{
		{errors.New("away"), time.Second},
		{status.Error(codes.ResourceExhausted, "too many"), time.Second},
		{hint(7 * time.Second), 7 * time.Second},
		{fmt.Errorf("in a sentence: %w", hint(7*time.Second)), 7 * time.Second},
		{hint(time.Millisecond), time.Second},
		{hint(-time.Hour), time.Second},
		{hint(1000 * time.Hour), maxHint},
	} {
		if got := notBefore(c.err, time.Second); got != c.want {
			t.Errorf("%v: %s, want %s", c.err, got, c.want)
		}
	}
}

func TestNothingIsTrustedOnFirstUse(t *testing.T) {
	w, impostor := newWorld(t), newWorld(t)
	w.open()
	impostor.open()
	for name, c := range map[string]struct {
		token func() identity.JoinToken
		want  string
	}{
		"another server at the address": {func() identity.JoinToken {
			tok := w.token("node-1")
			tok.Door = impostor.enrolAddr
			return tok
		}, "fingerprint"},
		"a fingerprint of something else": {func() identity.JoinToken {
			tok := w.token("node-1")
			tok.ControlCA = sha256.Sum256([]byte("x"))
			return tok
		}, "fingerprint"},
		"another cluster": {func() identity.JoinToken {
			tok := w.token("node-1")
			tok.Cluster = "west"
			return tok
		}, "not a server of cluster west"},
		"another trust domain": {func() identity.JoinToken {
			tok := w.token("node-1")
			tok.TrustDomain = "example.com"
			return tok
		}, "example.com"},
	} {
		t.Run(name, func(t *testing.T) {
			tok := c.token()
			n := w.start(t, func(c *Config) {
				c.JoinToken = func(context.Context) (identity.JoinToken, error) { return tok, nil }
			})
			if err := n.wait(t); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want an error with %q", err, c.want)
			}
			if len(impostor.agents) != 0 {
				t.Fatal("the impostor was given the token")
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			if _, ok := w.tokens[sha256.Sum256(tok.Secret)]; !ok {
				t.Fatal("the token was spent")
			}
		})
	}
}

// An agent's or a workload's certificate under the right CA does not make a server.
func TestOnlyAServerOfThisClusterIsBelieved(t *testing.T) {
	w := newWorld(t)
	now := time.Now()
	key := newKey(t)
	control := func(path string, a *authority, change ...func(*x509.Certificate)) []*x509.Certificate {
		var out []*x509.Certificate
		for _, der := range a.leaf(t, reg("", path, 0).ID, key.Public(), now.Add(-time.Hour), now.Add(time.Hour), change...) {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, c)
		}
		return out
	}
	const server = "/signet/cluster/east/server/east-1"
	if err := verifyServer(control(server, w.control), w.control.cert, td, "east", now); err != nil {
		t.Fatal(err)
	}
	for name, certs := range map[string][]*x509.Certificate{
		"nobody":           nil,
		"an agent":         control("/signet/cluster/east/agent/node-1", w.control),
		"another cluster":  control("/signet/cluster/west/server/west-1", w.control),
		"a workload":       control("/ns/a/sa/b", w.control),
		"the mesh":         control(server, w.mesh),
		"the CA itself":    {w.control.cert},
		"clients only":     control(server, w.control, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }),
		"two names":        control(server, w.control, func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }),
		"expired":          control(server, w.control, func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) }),
		"may sign":         control(server, w.control, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }),
		"a chain too long": slices.Repeat(control(server, w.control), 5),
	} {
		if err := verifyServer(certs, w.control.cert, td, "east", now); err == nil {
			t.Errorf("%s was believed to be a server", name)
		}
	}
}

// An agent that was off for longer than its certificate lived comes back with its key.
func TestAnExpiredControlCertificateIsRenewedByTheEnrolledKey(t *testing.T) {
	w := newWorld(t)
	var jump atomic.Int64
	w.now = func() time.Time { return time.Now().Add(time.Duration(jump.Load())) }
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	n.ready(t)
	c, old := n.config, n.member.Load()
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	w.close()
	jump.Store(int64(20 * 24 * time.Hour))
	w.open()
	c.Metrics, c.JoinToken = nil, nil
	again, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	n = run(t, again)
	n.ready(t)
	if m := n.member.Load(); m.leaf.Equal(old.leaf) || !m.leaf.NotAfter.After(w.now()) {
		t.Fatal("connected with the old certificate")
	}
	leafOf(t, c.Socket)
}

// The control certificate is renewed while everything runs; the stream moves over to it, and nothing is lost.
func TestTheControlCertificateIsRenewedWhileEverythingRuns(t *testing.T) {
	w := newWorld(t)
	var jump atomic.Int64
	w.now = func() time.Time { return time.Now().Add(time.Duration(jump.Load())) }
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	n.ready(t)
	old := n.member.Load()
	next, err := n.renewControl(t.Context(), old)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the stream runs under the new certificate", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return slices.Contains(w.peers, next.leaf.SerialNumber.String())
	})
	w.setRegistrations(reg("web", "/web", time.Hour, uid), reg("more", "/more", time.Hour, uid))
	eventually(t, "news come through", func() bool { n.hub.mu.Lock(); defer n.hub.mu.Unlock(); return len(n.hub.registrations) == 2 })
	leafOf(t, n.config.Socket)
	// It survives a restart.
	c := n.config
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	c.Metrics = nil
	again, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if got := again.member.Load(); !got.leaf.Equal(next.leaf) {
		t.Fatal("the restart is back at the old certificate")
	}
}

func TestAForkedOrRolledBackLogShowsAndIsNeverAccepted(t *testing.T) {
	w := newWorld(t)
	signer, err := note.NewSigner(signerKey(w.vkey, w.logKey))
	if err != nil {
		t.Fatal(err)
	}
	checkpoint := func(size uint64, root byte) []byte {
		hash := bytes.Repeat([]byte{root}, 32)
		msg, err := note.Sign(&note.Note{Text: fmt.Sprintf("example.org/east/east-1\n%d\n%s\n", size, base64Of(hash))}, signer)
		if err != nil {
			t.Fatal(err)
		}
		return msg
	}
	w.open()
	n := w.start(t)
	n.ready(t)
	if err := n.takeCheckpoint(&signetv1.Checkpoint{Note: checkpoint(7, 1)}); err != nil {
		t.Fatal(err)
	}
	for name, cp := range map[string]*signetv1.Checkpoint{
		"rollback": {Note: checkpoint(6, 1)},
		"fork":     {Note: checkpoint(7, 2)},
		"no proof": {Note: checkpoint(9, 3), FromSize: 7},
	} {
		before := counter(t, n, "signet_log_inconsistencies_total")
		if err := n.takeCheckpoint(cp); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got := counter(t, n, "signet_log_inconsistencies_total"); got != before+1 {
			t.Errorf("%s: inconsistencies %v, want %v", name, got, before+1)
		}
		if size, _ := n.witness.Seen(); size != 7 {
			t.Fatalf("%s: accepted, seen is %d", name, size)
		}
	}
	if err := n.takeCheckpoint(&signetv1.Checkpoint{Note: []byte("garbage")}); err == nil {
		t.Fatal("garbage was taken")
	}
	if evidence, err := os.ReadFile(n.path(witnessFile) + ".evidence"); err != nil || !bytes.Contains(evidence, []byte("example.org/east/east-1")) {
		t.Fatalf("no evidence is kept: %v", err)
	}
	for _, f := range n.findings(t) {
		if f.About == "audit-log" && f.Level != check.Error {
			t.Error("readyz does not show it")
		}
	}
}

func TestCheckpointsSeenAreToldAndKept(t *testing.T) {
	w := newWorld(t)
	signer, err := note.NewSigner(signerKey(w.vkey, w.logKey))
	if err != nil {
		t.Fatal(err)
	}
	msg, err := note.Sign(&note.Note{Text: "example.org/east/east-1\n3\n" + base64Of(make([]byte, 32)) + "\n"}, signer)
	if err != nil {
		t.Fatal(err)
	}
	w.checkpoint = func(seen uint64) *signetv1.Checkpoint {
		if seen == 3 {
			return nil
		}
		return &signetv1.Checkpoint{Note: msg}
	}
	w.open()
	n := w.start(t)
	eventually(t, "the server hears that size 3 was seen", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return slices.Contains(w.seen, 3)
	})
	c := n.config
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	c.Metrics = nil
	again, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if size, _ := again.witness.Seen(); size != 3 {
		t.Fatalf("after a restart, seen is %d", size)
	}
}

func TestASecondProcessOnTheFolderIsRefused(t *testing.T) {
	w := newWorld(t)
	w.open()
	n := w.start(t)
	c := n.config
	c.Metrics = nil
	_, err := New(t.Context(), c)
	if err == nil || !strings.Contains(err.Error(), "in use by process") {
		t.Fatalf("got %v", err)
	}
}

func TestDamagedStateIsNamedWithItsRemedy(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	n.ready(t)
	eventually(t, "all is stored", func() bool {
		_, err := os.Stat(n.path(registrationsFile))
		return err == nil
	})
	c := n.config
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{enrolmentFile, bundleFile, registrationsFile} {
		path := filepath.Join(c.StateDir, file)
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		flipped := bytes.Clone(whole)
		flipped[len(flipped)/2] ^= 1
		for name, content := range map[string][]byte{"cut": whole[:len(whole)/2], "empty": nil, "other": []byte(`{}`), "one bit": flipped} {
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			c.Metrics = nil
			if a, err := New(t.Context(), c); err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("%s, %s: %v, want an error that names the file", file, name, err)
				if a != nil {
					a.Close()
				}
			}
		}
		if err := os.WriteFile(path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c.Metrics = nil
	a, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
}

func TestHTTPTellsWhetherItIsReady(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	addr := freeAddress(t)
	var hold atomic.Bool
	hold.Store(true)
	token := w.tokenSource("node-1")
	n := w.start(t, func(c *Config) {
		c.HTTP = addr
		c.JoinToken = func(ctx context.Context) (identity.JoinToken, error) {
			for hold.Load() && ctx.Err() == nil {
				time.Sleep(time.Millisecond)
			}
			return token(ctx)
		}
	})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (int, string) {
		r, err := client.Get("http://" + addr + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		body, _ := io.ReadAll(r.Body)
		return r.StatusCode, string(body)
	}
	if code, body := get("/readyz"); code != 503 || !strings.Contains(body, "[-]enrolment failed") {
		t.Fatalf("before enrolment: %d %s", code, body)
	}
	if code, _ := get("/livez"); code != 200 {
		t.Fatalf("livez: %d", code)
	}
	hold.Store(false)
	n.ready(t)
	leafOf(t, n.config.Socket)
	if code, body := get("/readyz?verbose"); code != 200 || !strings.Contains(body, "[+]enrolment ok") {
		t.Fatalf("when ready: %d %s", code, body)
	}
	code, body := get("/metrics")
	if code != 200 {
		t.Fatalf("metrics: %d", code)
	}
	for _, want := range []string{
		`signet_renewals_total{result="ok"} 1`, `signet_renewals_total{result="failed"} 0`, `signet_attestations_total{attestor="unix",result="ok"} 1`,
		`signet_agent_svids{state="valid"} 1`, "signet_log_inconsistencies_total 0", `signet_bundle_generation{trust_domain="example.org"} 1`,
		"signet_agent_earliest_svid_not_after_timestamp_seconds 1", "signet_agent_last_contact_timestamp_seconds 1", "signet_renewals_overdue 0",
		"signet_attestation_duration_seconds_count", `signet_sds_streams{protocol="sotw"}`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	if strings.Contains(body, "/web") {
		t.Error("a SPIFFE ID is in the metrics")
	}
}

func TestWhoeverComesBeforeTheAgentKnowsAnythingIsKeptWaiting(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	release := make(chan struct{})
	token := w.tokenSource("node-1")
	n := w.start(t, func(c *Config) {
		c.JoinToken = func(ctx context.Context) (identity.JoinToken, error) { <-release; return token(ctx) }
	})
	s := subscribe(t, connect(t, n.config.Socket), "default")
	eventually(t, "it is being attested", func() bool {
		at := n.attestor.(*fakeAttestor)
		at.mu.Lock()
		defer at.mu.Unlock()
		return at.open == 1
	})
	close(release)
	if _, err := s.next(); err != nil {
		t.Fatal(err)
	}
}

func TestContradictionsInTheConfigurationAreRefused(t *testing.T) {
	for name, c := range map[string]Config{
		"no folder":    {Socket: "/x"},
		"no socket":    {StateDir: t.TempDir()},
		"same path":    {StateDir: t.TempDir(), Socket: "/x", Sockets: []Socket{{"a", "/x"}}},
		"same name":    {StateDir: t.TempDir(), Socket: "/x", Sockets: []Socket{{"a", "/y"}, {"a", "/z"}}},
		"no name":      {StateDir: t.TempDir(), Socket: "/x", Sockets: []Socket{{"", "/y"}}},
		"admin's path": {StateDir: "/s", Socket: "/s/admin.sock"},
		"no such form": {StateDir: t.TempDir(), Socket: "/x", Validator: "best"},
	} {
		if a, err := New(t.Context(), c); err == nil {
			a.Close()
			t.Errorf("%s was accepted", name)
		}
	}
	a, err := New(t.Context(), Config{StateDir: t.TempDir() + "/s", Socket: t.TempDir() + "/x", Keys: keystore.NewMemory()})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "signet join-token create") {
		t.Fatalf("not enrolled and without a token: %v", err)
	}
}
