//go:build real

package sds

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/test/envoy"
	"github.com/signet-ca/signet/trust"
)

// These tests use the stock Envoy that `make tools` brings: go test -tags real.

// mesh is a client's and a server's Envoy, each with an agent's socket of its own.
type mesh struct {
	t              *testing.T
	dir            string
	ca             *root
	client, server *side
	url            string
}

type side struct {
	world  *world
	rig    *rig
	socket string
	envoy  *envoy.Process
}

func (m *mesh) agent(t *testing.T, id spiffeid.ID, name string, c Config) *side {
	t.Helper()
	w := &world{
		td: exampleTD, ids: []spiffeid.ID{id}, svids: map[spiffeid.ID]*SVID{id: m.ca.issue(t, leaf{id: id})},
		bundles: map[spiffeid.TrustDomain]trust.Bundle{exampleTD: bundleOf(exampleTD, 1, m.ca)},
		changed: make(chan struct{}), asked: map[spiffeid.ID]int{},
	}
	c.Workloads = w
	socket := filepath.Join(m.dir, name+".sock")
	return &side{world: w, socket: socket, rig: onSocket(t, c, socket)}
}

// meshOptions vary the usual pair of sidecars.
type meshOptions struct {
	config  Config
	sidecar func(*envoy.Sidecar)
	expect  spiffeid.ID // of the server; default its own
	unready bool        // don't wait for the first request to pass
	binary  string      // default the pinned Envoy
}

// newMesh starts web's Envoy as the client of api's, in front of a workload that answers "hello".
func newMesh(t *testing.T, o meshOptions) *mesh {
	t.Helper()
	dir, err := os.MkdirTemp("", "sds") // a socket's path is bounded; t.TempDir has the test's name in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	m := &mesh{t: t, dir: dir, ca: newRoot(t, "root A")}
	m.client = m.agent(t, web, "client", o.config)
	m.server = m.agent(t, api, "server", o.config)
	workload := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
	t.Cleanup(workload.Close)
	if o.expect.IsZero() {
		o.expect = api
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	m.server.start(t, o, envoy.Sidecar{Node: "api", Inbound: &envoy.Inbound{
		AllowSPIFFEIDs: []string{web.String()}, Upstream: workload.Listener.Addr().String(), RequestsPerConnection: 7,
	}})
	target, err := m.server.envoy.Listener(ctx, "inbound")
	if err != nil {
		t.Fatal(err)
	}
	m.client.start(t, o, envoy.Sidecar{Node: "web", Outbound: &envoy.Outbound{
		Target: target, ExpectSPIFFEID: o.expect.String(), RequestsPerConnection: 5,
	}})
	local, err := m.client.envoy.Listener(ctx, "outbound")
	if err != nil {
		t.Fatal(err)
	}
	m.url = "http://" + local + "/"
	if !o.unready {
		for _, s := range []*side{m.client, m.server} {
			if err := s.envoy.Ready(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	return m
}

func (s *side) start(t *testing.T, o meshOptions, c envoy.Sidecar) {
	t.Helper()
	c.SDSSocket = s.socket
	if o.sidecar != nil {
		o.sidecar(&c)
	}
	yaml, err := c.YAML()
	if err != nil {
		t.Fatal(err)
	}
	s.envoy, err = envoy.Start(context.Background(), envoy.Config{Binary: o.binary, YAML: yaml, Dir: s.socket + ".envoy"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.envoy.Stop()
		if t.Failed() {
			b, _ := os.ReadFile(s.envoy.LogPath())
			t.Logf("the end of Envoy's log:\n%s\nours:\n%s", b[max(0, len(b)-2000):], s.rig.logs)
		}
	})
}

// shown is the serials that one request showed.
type shown struct{ client, server string }

func (m *mesh) get() (shown, error) {
	resp, err := http.Get(m.url)
	if err != nil {
		return shown{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return shown{}, err
	}
	if resp.StatusCode != http.StatusOK || string(b) != "hello" {
		return shown{}, fmt.Errorf("%s: %s", resp.Status, b)
	}
	var s shown
	if s.client, err = envoy.ClientSerial(resp.Header); err != nil {
		return s, err
	}
	if s.server, err = envoy.ServerSerial(resp.Header); err != nil {
		return s, err
	}
	if c, v := resp.Header.Get(envoy.HeaderClientID), resp.Header.Get(envoy.HeaderServerID); c != web.String() || !slices.Contains([]string{api.String(), web.String()}, v) {
		return s, fmt.Errorf("peers are %q and %q", c, v)
	}
	return s, nil
}

// until asks until a request shows both serials.
func (m *mesh) until(what string, client, server string) {
	m.t.Helper()
	var last shown
	var err error
	deadline := time.Now().Add(time.Minute)
	for ; time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if last, err = m.get(); err == nil && last == (shown{client, server}) {
			return
		}
	}
	m.t.Fatalf("%s: last seen %+v %v, want %s %s", what, last, err, client, server)
}

func (s *side) serial() string {
	s.world.mu.Lock()
	defer s.world.mu.Unlock()
	return s.world.svids[s.world.ids[0]].Serial
}

func (s *side) renew(t *testing.T, ca *root) {
	t.Helper()
	s.world.setSVID(ca.issue(t, leaf{id: s.world.Identities()[0]}))
}

// load is requests at a steady rate.
type load struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     sync.Mutex
	n      int
	errs   []error
}

// load starts 4 clients that ask every so often.
func (m *mesh) load(every time.Duration) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{cancel: cancel}
	for range 4 {
		l.wg.Go(func() {
			tick := time.NewTicker(every)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				_, err := m.get()
				l.mu.Lock()
				l.n++
				if err != nil {
					l.errs = append(l.errs, err)
				}
				l.mu.Unlock()
			}
		})
	}
	return l
}

func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n
}

// more waits for that many further requests.
func (l *load) more(t *testing.T, n int) {
	t.Helper()
	until := l.count() + n
	eventually(t, "requests go on", func() bool { return l.count() >= until })
}

// stop ends the load, of which nothing may have failed.
func (l *load) stop(t *testing.T) {
	t.Helper()
	l.cancel()
	l.wg.Wait()
	http.DefaultClient.CloseIdleConnections()
	t.Logf("%d requests, %d failed", l.n, len(l.errs))
	if len(l.errs) > 0 || l.n == 0 {
		t.Errorf("%d of %d requests failed; first: %v", len(l.errs), l.n, l.errs[:min(1, len(l.errs))])
	}
}

func TestEnvoyGetsItsSecretsAndSpeaksMutualTLS(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.until("first requests", m.client.serial(), m.server.serial())
	for _, s := range []*side{m.client, m.server} {
		eventually(t, "both names are acknowledged", func() bool {
			return s.rig.metric(s.rig.sds.metrics.acks.WithLabelValues(kindSVID)) == 1 && s.rig.metric(s.rig.sds.metrics.acks.WithLabelValues(kindBundle)) == 1
		})
		if d, ok := s.rig.sds.OldestBundle(exampleTD); !ok || d != s.world.bundles[exampleTD].Version() {
			t.Errorf("believed: %s %v", d, ok)
		}
		if n := s.rig.metric(s.rig.sds.metrics.nacks.WithLabelValues(kindSVID)); n != 0 {
			t.Errorf("%v NACKs", n)
		}
	}
}

func TestEnvoyRotatesUnderLoadWithoutALostRequest(t *testing.T) {
	for name, perConnection := range map[string]struct{ client, server int }{
		"the client ends connections": {5, 0}, "the server ends connections": {0, 3}, "both do": {5, 7},
	} {
		for _, delta := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, %s", name, protocolOf(delta)), func(t *testing.T) {
				rotateUnderLoad(t, newMesh(t, meshOptions{sidecar: func(c *envoy.Sidecar) {
					c.Delta = delta
					if c.Inbound != nil {
						c.Inbound.RequestsPerConnection = perConnection.server
					} else {
						c.Outbound.RequestsPerConnection = perConnection.client
					}
				}}), protocolOf(delta), 3)
			})
		}
	}
}

func TestOtherEnvoysRotateUnderLoadWithoutALostRequest(t *testing.T) {
	others, err := envoy.Others()
	if err != nil {
		t.Fatal(err)
	}
	if len(others) == 0 {
		t.Skip("no other Envoys here: `make envoys` brings them")
	}
	for version, binary := range others {
		for _, delta := range []bool{false, true} {
			t.Run(version+" "+protocolOf(delta), func(t *testing.T) {
				rotateUnderLoad(t, newMesh(t, meshOptions{binary: binary, sidecar: func(c *envoy.Sidecar) { c.Delta = delta }}), protocolOf(delta), 2)
			})
		}
	}
}

func protocolOf(delta bool) string {
	if delta {
		return protocolDelta
	}
	return protocolSotW
}

// rotateUnderLoad renews both sides' certificates in turn.
func rotateUnderLoad(t *testing.T, m *mesh, protocol string, times int) {
	t.Helper()
	m.until("before the load", m.client.serial(), m.server.serial())
	l := m.load(8 * time.Millisecond)
	for i := range times {
		m.client.renew(t, m.ca)
		m.until(fmt.Sprint("the client's renewal ", i), m.client.serial(), m.server.serial())
		l.more(t, 100)
		m.server.renew(t, m.ca)
		m.until(fmt.Sprint("the server's renewal ", i), m.client.serial(), m.server.serial())
		l.more(t, 100)
	}
	l.stop(t)
	for _, s := range []*side{m.client, m.server} {
		if n := s.rig.metric(s.rig.sds.metrics.pushes.WithLabelValues(kindBundle)); n != 1 {
			t.Errorf("the bundle was pushed %v times, want once: renewals of leaves don't touch it", n)
		}
		if n := s.rig.metric(s.rig.sds.metrics.streams.WithLabelValues(protocol)); n != 2 {
			t.Errorf("%v streams of %s, want one for each name", n, protocol)
		}
		// A certificate is in handshakes before its ACK is heard.
		eventually(t, "each stream has one name, and has acknowledged what it was sent last", func() bool {
			return !slices.ContainsFunc(s.rig.sds.Streams(), func(stream StreamStatus) bool {
				n := stream.Names
				return len(n) != 1 || n[0].Acked != n[0].Sent || n[0].Rejected != ""
			})
		})
	}
}

func TestEnvoyRotatesTheRootUnderLoadWithoutALostRequest(t *testing.T) {
	for _, delta := range []bool{false, true} {
		t.Run(protocolOf(delta), func(t *testing.T) { rotateRootUnderLoad(t, delta) })
	}
}

func rotateRootUnderLoad(t *testing.T, delta bool) {
	m := newMesh(t, meshOptions{sidecar: func(c *envoy.Sidecar) { c.Delta = delta }})
	m.until("before", m.client.serial(), m.server.serial())
	l := m.load(8 * time.Millisecond)
	b := newRoot(t, "root B")
	acked := func(bundle trust.Bundle) {
		t.Helper()
		for _, s := range []*side{m.client, m.server} {
			s.world.setBundle(bundle)
		}
		for _, s := range []*side{m.client, m.server} {
			eventually(t, "the bundle is acknowledged", func() bool { d, ok := s.rig.sds.OldestBundle(exampleTD); return ok && d == bundle.Version() })
		}
		l.more(t, 100)
	}
	acked(bundleOf(exampleTD, 2, m.ca, b))
	m.client.renew(t, b)
	m.server.renew(t, b)
	m.until("leaves of the new root", m.client.serial(), m.server.serial())
	acked(bundleOf(exampleTD, 3, b))
	m.until("without the old root", m.client.serial(), m.server.serial())
	l.more(t, 100)
	l.stop(t)
}

func TestEnvoyRejectsABadCertificateAndKeepsTheOld(t *testing.T) {
	m := newMesh(t, meshOptions{})
	before := m.server.serial()
	m.until("before", m.client.serial(), before)
	metrics := m.server.rig.sds.metrics
	// P-224 is a fine set to our check, and no key that Envoy takes.
	bad := m.ca.issue(t, leaf{id: api, key: must(ecdsa.GenerateKey(elliptic.P224(), rand.Reader))})
	m.server.world.setSVID(bad)
	eventually(t, "the NACK is counted", func() bool { return m.server.rig.metric(metrics.nacks.WithLabelValues(kindSVID)) == 1 })
	for range 30 {
		if s, err := m.get(); err != nil || s.server != before {
			t.Fatalf("after the NACK: %+v %v, want the certificate from before", s, err)
		}
	}
	m.server.world.change(func(*world) {})
	if n, err := m.server.envoy.Stat(t.Context(), "sds.default.update_rejected"); err != nil || n != 1 {
		t.Errorf("Envoy rejected %d updates (%v), want 1: the same content is not sent again", n, err)
	}
	m.server.renew(t, m.ca)
	m.until("the next good one", m.client.serial(), m.server.serial())
	if n := m.server.rig.metric(metrics.nacks.WithLabelValues(kindSVID)); n != 1 {
		t.Errorf("%v NACKs counted, want 1", n)
	}
}

func TestEnvoyAcknowledgesARepeatedBadSecretAndThatMeansNothing(t *testing.T) {
	m := newMesh(t, meshOptions{})
	good := m.server.serial()
	m.until("before", m.client.serial(), good)
	s := m.server
	s.rig.sds.secrets.check = func(_ *SVID, b trust.Bundle, now time.Time) verdict { // past our own check
		return verdict{checked: true, bundle: b.Digest(), until: now.Add(time.Hour)}
	}
	swapped := m.ca.issue(t, leaf{id: api})
	swapped.PrivateKey = m.ca.issue(t, leaf{id: api}).PrivateKey
	s.world.setSVID(swapped)
	eventually(t, "the NACK is counted", func() bool { return s.rig.metric(s.rig.sds.metrics.nacks.WithLabelValues(kindSVID)) == 1 })
	eventually(t, "the reason is in the log", func() bool { return strings.Contains(s.rig.logs.String(), "KEY_VALUES_MISMATCH") })
	acks := s.rig.metric(s.rig.sds.metrics.acks.WithLabelValues(kindSVID))
	// Losing the identity for a moment ends the streams; Envoy comes back and is sent the same again.
	s.world.change(func(w *world) { w.err, w.refuse = errNoIdentity, errNoIdentity })
	eventually(t, "the streams have ended", func() bool { return s.rig.metric(s.rig.sds.metrics.streams.WithLabelValues(protocolSotW)) == 0 })
	s.world.change(func(w *world) { w.err, w.refuse = nil, nil })
	eventually(t, "Envoy acknowledges what it rejected", func() bool { return strings.Contains(s.rig.logs.String(), "means nothing") })
	if n := s.rig.metric(s.rig.sds.metrics.acks.WithLabelValues(kindSVID)); n != acks {
		t.Errorf("%v ACKs counted, want %v as before", n, acks)
	}
	m.until("the old one stays", m.client.serial(), good)
}

func TestEnvoyWaitsForANameThatIsNotGrantedYet(t *testing.T) {
	m := newMesh(t, meshOptions{unready: true, sidecar: func(c *envoy.Sidecar) {
		if c.Inbound != nil {
			c.CertificateName = web.String() // of somebody else, for now
		}
	}, expect: web})
	s := m.server
	eventually(t, "the name is known to be waited for", func() bool { return strings.Contains(s.rig.logs.String(), "nothing to send under this name yet") })
	if _, err := m.get(); err == nil {
		t.Fatal("a request passed without a certificate")
	}
	given := m.ca.issue(t, leaf{id: web})
	s.world.change(func(w *world) { w.ids, w.svids[web] = append(w.ids, web), given })
	m.until("once granted", m.client.serial(), given.Serial)
}

func TestEnvoyComesBackToARestartedServerAndGetsSecretsAtOnce(t *testing.T) {
	for _, delta := range []bool{false, true} {
		t.Run(protocolOf(delta), func(t *testing.T) { comeBack(t, delta) })
	}
}

func comeBack(t *testing.T, delta bool) {
	m := newMesh(t, meshOptions{sidecar: func(c *envoy.Sidecar) { c.Delta = delta }})
	m.until("before", m.client.serial(), m.server.serial())
	l := m.load(20 * time.Millisecond)
	s := m.server

	// An orderly stop with Envoy on it returns by itself (S18).
	s.rig.sds.Shutdown()
	stopped := make(chan struct{})
	started := time.Now()
	go func() { s.rig.grpc.GracefulStop(); close(stopped) }()
	select {
	case <-stopped:
		t.Logf("GracefulStop returned after %s", time.Since(started).Round(time.Millisecond))
	case <-time.After(30 * time.Second):
		t.Fatal("GracefulStop hangs")
	}
	// What was renewed meanwhile, and what was not, are both there after the restart.
	s.world.svids[api] = m.ca.issue(t, leaf{id: api})
	_ = os.Remove(s.socket)
	restarted := time.Now()
	again := onSocket(t, Config{Workloads: s.world}, s.socket)
	m.until("after the restart", m.client.serial(), s.serial())
	t.Logf("the new certificate was in handshakes %s after the restart", time.Since(restarted).Round(time.Millisecond))
	// The bundle is believed in either case: delta says that it has it, state of the world is sent it again.
	eventually(t, "both are acknowledged", func() bool {
		d, ok := again.sds.OldestBundle(exampleTD)
		return again.metric(again.sds.metrics.acks.WithLabelValues(kindSVID)) == 1 && ok && d == s.world.bundles[exampleTD].Version()
	})
	sent := again.metric(again.sds.metrics.pushes.WithLabelValues(kindBundle))
	if delta && sent != 0 || !delta && sent != 1 {
		t.Errorf("the bundle was sent %v times", sent)
	}
	l.stop(t)
}

func TestEnvoyKeepsASecretThatIsRemovedAndTakesItAnewWhenGrantedAgain(t *testing.T) {
	m := newMesh(t, meshOptions{sidecar: func(c *envoy.Sidecar) {
		c.Delta = true
		if c.Inbound != nil {
			c.CertificateName = api.String()
		}
	}})
	s := m.server
	before := s.serial()
	m.until("before", m.client.serial(), before)
	s.world.change(func(w *world) { w.ids = []spiffeid.ID{web} }) // another identity in its place
	eventually(t, "the removal is sent", func() bool { return s.rig.metric(s.rig.sds.metrics.removals) == 1 })
	for range 10 {
		if got, err := m.get(); err != nil || got.server != before {
			t.Fatalf("after the removal: %+v %v, want the certificate from before", got, err)
		}
	}
	given := m.ca.issue(t, leaf{id: api})
	s.world.change(func(w *world) { w.ids, w.svids[api] = []spiffeid.ID{api}, given })
	m.until("granted again", m.client.serial(), given.Serial)
}

func TestEnvoyTakesAllTrustDomainsInOneSecret(t *testing.T) {
	friend := spiffeid.RequireTrustDomainFromString("friend.test")
	m := newMesh(t, meshOptions{sidecar: func(c *envoy.Sidecar) { c.Delta, c.BundleName = c.Inbound != nil, "ALL" }})
	m.until("its own alone", m.client.serial(), m.server.serial())
	theirs := bundleOf(friend, 1, newRoot(t, "friend"))
	for _, s := range []*side{m.client, m.server} {
		s.world.setBundle(theirs)
		eventually(t, "both bundles are acknowledged", func() bool {
			d, ok := s.rig.sds.OldestBundle(friend)
			return ok && d == theirs.Version()
		})
	}
	m.client.renew(t, m.ca)
	m.until("with a second trust domain", m.client.serial(), m.server.serial())
	// A root of one trust domain signs for the other: refused, because each is kept apart.
	forger := newRoot(t, "forger")
	m.server.world.setBundle(bundleOf(friend, 2, forger))
	m.client.world.change(func(w *world) {
		w.bundles[exampleTD], w.svids[web] = bundleOf(exampleTD, 2, m.ca, forger), forger.issue(t, leaf{id: web})
	})
	eventually(t, "requests are refused", func() bool { _, err := m.get(); return err != nil })
	m.server.refused(t, "fail_verify_error")
}

func TestEnvoyWorksWithPlainTrustedCA(t *testing.T) {
	for name, o := range map[string]meshOptions{
		"by configuration": {config: Config{Validator: TrustedCA}},
		"by node metadata": {sidecar: func(c *envoy.Sidecar) { c.TrustedCA = true }},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, o)
			m.until("plain trusted_ca", m.client.serial(), m.server.serial())
			dump, err := m.server.envoy.Admin(t.Context(), "/config_dump?resource=dynamic_active_secrets")
			if err != nil || strings.Contains(dump, "envoy.tls.cert_validator.spiffe") || !strings.Contains(dump, "trusted_ca") {
				t.Errorf("Envoy's secrets are not of that form (%v): %s", err, dump)
			}
		})
	}
}

func TestEnvoyRefusesAnotherIdentityAndAnotherRoot(t *testing.T) {
	t.Run("the right root with another SPIFFE ID", func(t *testing.T) {
		m := newMesh(t, meshOptions{expect: web}) // the server is api
		// An Envoy that still waits for its secrets refuses too, for another reason.
		eventually(t, "Envoy counts it", func() bool {
			if s, err := m.get(); err == nil {
				t.Fatalf("a request passed: %+v", s)
			}
			return m.client.counts(t, "fail_verify_san")
		})
	})
	t.Run("another root", func(t *testing.T) {
		m := newMesh(t, meshOptions{})
		m.until("before", m.client.serial(), m.server.serial())
		stranger := newRoot(t, "stranger")
		m.client.world.change(func(w *world) {
			w.bundles[exampleTD], w.svids[web] = bundleOf(exampleTD, 2, m.ca, stranger), stranger.issue(t, leaf{id: web})
		})
		eventually(t, "requests are refused", func() bool { _, err := m.get(); return err != nil })
		m.server.refused(t, "fail_verify_error")
	})
	t.Run("no certificate", func(t *testing.T) {
		m := newMesh(t, meshOptions{})
		m.until("before", m.client.serial(), m.server.serial())
		address, err := m.server.envoy.Listener(t.Context(), "inbound")
		if err != nil {
			t.Fatal(err)
		}
		bare := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} // the server is not what is checked
		defer bare.CloseIdleConnections()
		if resp, err := (&http.Client{Transport: bare}).Get("https://" + address); err == nil {
			t.Errorf("a client without a certificate got %s", resp.Status)
		}
		m.server.refused(t, "fail_verify_no_cert")
	})
}

// refused checks that Envoy counted a failed handshake for that reason.
func (s *side) refused(t *testing.T, reason string) {
	t.Helper()
	eventually(t, "Envoy counts "+reason, func() bool { return s.counts(t, reason) })
}

// counts reports whether Envoy has counted a failed handshake for that reason.
func (s *side) counts(t *testing.T, reason string) bool {
	t.Helper()
	text, err := s.envoy.Admin(t.Context(), "/stats?usedonly&filter=ssl.fail_verify")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ": "); ok && strings.HasSuffix(name, "ssl."+reason) && value != "0" {
			return true
		}
	}
	return false
}
