//go:build real

package e2e

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/envoy"
	"github.com/signet-ca/signet/test/lab"
)

// knowEachOther configures both clusters as peers.
func (w *world) knowEachOther(t *testing.T, leaf string) {
	t.Helper()
	key := map[*lab.Cluster]string{}
	for _, c := range []*lab.Cluster{w.east, w.west} {
		var shown struct {
			LogVerifierKey string `json:"log_verifier_key"`
		}
		if err := w.JSON(t.Context(), &shown, "cluster", "show", "--config", c.Config()); err != nil {
			t.Fatal(err)
		}
		key[c] = shown.LogVerifierKey
	}
	for c, other := range map[*lab.Cluster]*lab.Cluster{w.east: w.west, w.west: w.east} {
		if err := c.Configure(fmt.Sprintf("leaf: { ttl: %[1]s, max_ttl: %[1]s, backdate: 1s }\nrotation:\n  skew: 1s\n  report_life: 4s\n  peers: [ { cluster: %[2]s, log_verifier_key: %[3]q } ]\n",
			leaf, other.Name, key[other])); err != nil {
			t.Fatal(err)
		}
	}
}

// joinWest signs and installs the request that west has made, under the first root.
func (w *world) joinWest(t *testing.T, r offlineRoot, more ...string) {
	t.Helper()
	csr, keys := w.westAsks(t)
	w.must(t, w.installing(w.west, r, w.sign(t, w.west, r, csr, keys), more...)...)
}

func (w *world) westAsks(t *testing.T) (csr string, keys []string) {
	t.Helper()
	csr = w.fresh("west", "csr")
	return csr, strings.Fields(w.must(t, "cluster", "init", "--config", w.west.Config(), "--csr-out", csr))
}

// start starts a cluster with an agent, which gives this process an identity.
func (w *world) start(t *testing.T, c *lab.Cluster) (*lab.Process, *lab.Agent) {
	t.Helper()
	p, err := c.Serve(t.Context())
	if err == nil {
		err = c.Apply(t.Context(), web("node-1"))
	}
	if err != nil {
		t.Fatal(err)
	}
	a, err := c.StartAgent(t.Context(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	return p, a
}

// tell carries the report of one cluster to another.
func (w *world) tell(ctx context.Context, from, to *lab.Cluster) error {
	report := w.path(from.Name, "report")
	if _, err := w.Run(ctx, "rotation", "report", "--config", from.Config(), "--out", report); err != nil {
		return err
	}
	_, err := w.Run(ctx, "rotation", "advance", "--config", to.Config(), "--report", report)
	return err
}

// exchange carries reports both ways until something has come about.
func (w *world) exchange(t *testing.T, what string, ok func() error) {
	t.Helper()
	until(t, what, 4*time.Minute, func() error {
		return errors.Join(w.tell(t.Context(), w.east, w.west), w.tell(t.Context(), w.west, w.east), ok())
	})
}

// meet has the workloads of two agents accept each other.
func (w *world) meet(x, y *lab.Agent) error {
	one, err := w.fetch(x.Socket)
	if err != nil {
		return err
	}
	two, err := w.fetch(y.Socket)
	if err != nil {
		return err
	}
	return errors.Join(one.believes(two), two.believes(one))
}

// forged is a certificate for this process's name that an intermediate's key has made, far longer than a leaf lives.
func (w *world) forged(t *testing.T, c *lab.Cluster, issuer *x509.Certificate) tls.Certificate {
	t.Helper()
	keys, err := keystore.NewFile(keystore.FileConfig{Dir: c.Path("state", "keys"), Passphrase: keystore.PassphraseFile(c.Path("server.pass"))})
	if err != nil {
		t.Fatal(err)
	}
	refs, err := keys.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range refs {
		key, err := keys.Open(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(issuer.PublicKey) {
			continue
		}
		own, err := doors.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
			URIs: []*url.URL{{Scheme: "spiffe", Host: lab.TrustDomain, Path: "/web"}}, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}, issuer, own.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: [][]byte{der, issuer.Raw}, PrivateKey: own}
	}
	t.Fatal("the key of the intermediate is not in the keystore")
	return tls.Certificate{}
}

// sidecar starts a stock Envoy that lets in this process's name, with what the agent gives it; the result asks it with a
// certificate, on a fresh connection.
func (w *world) sidecar(t *testing.T, a *lab.Agent) (ask func(tls.Certificate) error) {
	t.Helper()
	back, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})} // no timeouts: see startWorkload in test/demo
	go func() { _ = server.Serve(back) }()
	t.Cleanup(func() { server.Close() })
	ports, err := lab.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	yaml, err := envoy.Sidecar{
		Node: "web", SDSSocket: a.Socket,
		Inbound: &envoy.Inbound{Port: ports[0], AllowSPIFFEIDs: []string{"spiffe://example.org/web"}, Upstream: back.Addr().String()},
	}.YAML()
	if err != nil {
		t.Fatal(err)
	}
	p, err := envoy.Start(t.Context(), envoy.Config{YAML: yaml, Dir: w.path("envoy")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	ready, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := p.Ready(ready); err != nil {
		t.Fatal(err)
	}
	return func(cert tls.Certificate) error {
		client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{
			Certificates:       []tls.Certificate{cert},
			InsecureSkipVerify: true, //nolint:gosec // what is tried is whether the other side lets us in
		}}}
		resp, err := client.Get(fmt.Sprintf("https://127.0.0.1:%d/", ports[0]))
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = errors.New(resp.Status)
		}
		return err
	}
}

func TestAClusterAStepBehindIsWaitedForAndARemovedRootIsRefused(t *testing.T) {
	t.Parallel() // it mostly waits
	w := newWorld(t, "")
	w.knowEachOther(t, "6s")
	a := w.firstRoot(t)
	w.joinWest(t, a, "--first") // they are made together
	_, east := w.start(t, w.east)
	_, west := w.start(t, w.west)
	until(t, "workloads meet", time.Minute, func() error { return w.meet(east, west) })
	ask := w.sidecar(t, west)
	old := w.forged(t, w.east, readCerts(t, w.path("east/chain.pem"))[0])
	until(t, "a certificate under the old root is accepted", time.Minute, func() error { return ask(old) })

	// East is ready, and west does not know of it yet.
	b := w.makeRoot(t, "root-b")
	w.rotate(t, w.east, b, w.startRoot(b)...)
	waiting := func(word string) {
		t.Helper()
		until(t, "east waits since west "+word, time.Minute, func() error {
			if err := w.tell(t.Context(), w.west, w.east); err != nil {
				return err
			}
			r := w.run(t, "rotation", "advance", "--config", w.east.Config(), b.id)
			if said := strings.Join(strings.Fields(r.err), " "); r.code != 1 || !strings.Contains(said, word) {
				return fmt.Errorf("%v", r)
			}
			return nil
		})
	}
	waiting("cluster west does not trust it")
	if err := w.are(t.Context(), w.east, "intermediate-1", "active", b.id, "published"); err != nil {
		t.Error(err)
	}
	// West trusts the new root and signs under the old one; east is told, west is not: it stays a step behind.
	csr, keys := w.ask(t, w.west, w.startRoot(b)...)
	until(t, "east switches as soon as west's agents have the root", time.Minute, func() error {
		return errors.Join(w.tell(t.Context(), w.west, w.east), w.are(t.Context(), w.east, "intermediate-2", "active"))
	})
	until(t, "east shows the new root", time.Minute, func() error { return w.under(east.Socket, b) })
	// A certificate of seconds may be late on a busy machine.
	until(t, "workloads meet a step apart", time.Minute, func() error { return w.meet(east, west) })
	if err := w.are(t.Context(), w.west, "intermediate-1", "active"); err != nil {
		t.Errorf("a step apart: %v", err)
	}
	// East keeps the old root for west's sake, long after its own leaves are over.
	time.Sleep(8 * time.Second)
	until(t, "who is under the old root is let in, since west still signs under it", time.Minute, func() error {
		return errors.Join(w.tell(t.Context(), w.west, w.east), w.meet(east, west), ask(old))
	})
	if err := w.are(t.Context(), w.east, a.id, "retired"); err != nil {
		t.Errorf("west still signs under the old root: %v", err)
	}
	w.must(t, w.installing(w.west, b, w.sign(t, w.west, b, csr, keys))...)
	w.exchange(t, "the old root is removed in both", func() error {
		return errors.Join(w.are(t.Context(), w.east, a.id, "removed"), w.are(t.Context(), w.west, a.id, "removed"))
	})
	until(t, "both show the new root", time.Minute, func() error {
		return errors.Join(w.under(east.Socket, b), w.under(west.Socket, b), w.meet(east, west))
	})
	until(t, "a certificate under the removed root is refused", time.Minute, func() error {
		honest, err := w.fetch(east.Socket)
		if err != nil {
			return err
		}
		if err := ask(honest.cert); err != nil {
			return fmt.Errorf("an honest one is not let in: %w", err)
		}
		if err := ask(old); err == nil || !strings.Contains(err.Error(), "tls: ") {
			return fmt.Errorf("the forged one is not refused: %w", errors.Join(err, errors.New("no refusal by TLS")))
		}
		return nil
	})
	w.logged(t, w.east)
	w.logged(t, w.west)
}

func TestAClusterJoinsInTheMiddleOfARotation(t *testing.T) {
	t.Parallel() // it mostly waits
	// What is retired stays until west has joined, on a busy machine too.
	w := newWorld(t, "leaf: { ttl: 20s, max_ttl: 45s, backdate: 1s }\nrotation: { skew: 1s, report_life: 4s }\n")
	a, b := w.firstRoot(t), w.makeRoot(t, "root-b")
	server, east := w.start(t, w.east)
	until(t, "east shows the old root", time.Minute, func() error { return w.under(east.Socket, a) })
	before, err := w.fetch(east.Socket)
	if err != nil {
		t.Fatal(err)
	}
	w.rotate(t, w.east, b, w.startRoot(b)...)
	w.untilAre(t, w.east, "intermediate-2", "active", a.id, "retired")
	server.Stop()
	w.knowEachOther(t, "20s")
	if _, err := w.east.Serve(t.Context()); err != nil {
		t.Fatal(err)
	}

	export := w.run(t, "trust", "export", "--config", w.east.Config(), "--format", "json")
	_, digest, ok := strings.Cut(export.err, "digest:")
	if digest = strings.TrimSpace(digest); !ok || export.code != 0 {
		t.Fatal(export)
	}
	file := w.write(t, "east.trust.json", export.out)
	with := func(file, digest string) []string { return []string{"--trust", file, "--trust-digest", digest} }
	var set struct {
		BundleDigest string           `json:"bundle_digest"`
		Roots        []map[string]any `json:"roots"`
	}
	if err := json.Unmarshal([]byte(export.out), &set); err != nil || len(set.Roots) != 2 {
		t.Fatalf("%v:\n%s", err, export.out)
	}
	list := w.must(t, "trust", "list", "--config", w.east.Config())
	if !strings.Contains(list, digest) {
		t.Errorf("trust list does not show %s:\n%s", digest, list)
	}
	lessRoots, err := json.Marshal(map[string]any{"trust_domain": lab.TrustDomain, "cluster": "east", "bundle_digest": set.BundleDigest, "roots": set.Roots[:1]})
	if err != nil {
		t.Fatal(err)
	}
	less := w.write(t, "less.json", string(lessRoots))
	foreign := w.write(t, "foreign.json", strings.Replace(export.out, `"example.org"`, `"other.org"`, 1))

	csr, keys := w.westAsks(t)
	underA, underB := w.sign(t, w.west, a, csr, keys), w.sign(t, w.west, b, csr, keys)
	refuses := func(code int, says []string, args ...string) {
		t.Helper()
		changesNothing(t, w.path("west"), func() ran {
			r := w.run(t, args...)
			r.refused(t, code, says...)
			return r
		})
	}
	refuses(1, []string{"east may believe", "signet trust export", "--first"}, w.installing(w.west, b, underB)...)
	refuses(1, []string{a.id, "being removed", "signed by " + b.id}, w.installing(w.west, a, underA, with(file, digest)...)...)
	refuses(1, []string{"left out"}, w.installing(w.west, b, underB, with(less, digest)...)...)
	refuses(1, []string{"other.org"}, w.installing(w.west, b, underB, with(foreign, digest)...)...)
	refuses(1, []string{digest}, w.installing(w.west, b, underB, with(file, "SHA256:"+strings.Repeat("ab", 32))...)...)
	refuses(2, []string{"trust-digest"}, w.installing(w.west, b, underB, "--trust", file)...)
	if out := w.must(t, w.installing(w.west, b, underB, append(with(file, digest), "--dry-run")...)...); out != "would be installed\n" {
		t.Errorf("a dry run says %q", out)
	}
	for _, want := range []string{"installed\n", "unchanged\n"} {
		if out := w.must(t, w.installing(w.west, b, underB, with(file, digest)...)...); out != want {
			t.Errorf("install says %q, want %q", out, want)
		}
	}
	_, west := w.start(t, w.west)
	until(t, "west shows the new root", time.Minute, func() error { return w.under(west.Socket, b) })
	x, err := w.fetch(west.Socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := x.believes(before); err != nil {
		t.Errorf("west does not believe what was signed under the old root: %v", err)
	}
	until(t, "workloads meet", time.Minute, func() error { return w.meet(east, west) })
	w.exchange(t, "the old root is removed in both", func() error {
		return errors.Join(w.are(t.Context(), w.east, a.id, "removed"), w.are(t.Context(), w.west, a.id, "removed", "intermediate-1", "active"))
	})
	if out := w.must(t, w.installing(w.west, b, underB, with(file, digest)...)...); out != "unchanged\n" {
		t.Errorf("the old set says %q to the running server", out)
	}
	until(t, "workloads meet in the end", time.Minute, func() error { return w.meet(east, west) })
}

func TestAServerThatWasAwayThroughAWholeRotationComesBackRight(t *testing.T) {
	t.Parallel() // it mostly waits
	w := newWorld(t, "")
	w.knowEachOther(t, "6s")
	a, b := w.firstRoot(t), w.makeRoot(t, "root-b")
	w.joinWest(t, a, "--first") // they are made together
	_, east := w.start(t, w.east)
	server, west := w.start(t, w.west)
	until(t, "workloads meet", time.Minute, func() error { return w.meet(east, west) })
	server.Kill()

	// East goes through all of it by force: nobody answers there.
	w.rotate(t, w.east, b, w.startRoot(b)...)
	force := func(ids ...string) {
		for _, id := range ids {
			w.run(t, "rotation", "advance", "--config", w.east.Config(), id, "--force")
		}
	}
	until(t, "east has replaced its root", 4*time.Minute, func() error {
		force(b.id, "intermediate-2")
		if err := w.are(t.Context(), w.east, "intermediate-2", "active", "intermediate-1", "removed"); err != nil {
			return err
		}
		force(a.id)
		return w.are(t.Context(), w.east, a.id, "removed")
	})

	// West comes back as it was, a root behind, and its admin does there what was done in east.
	server, err := w.west.Serve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.are(t.Context(), w.west, "intermediate-1", "active", a.id, "active"); err != nil {
		t.Error(err)
	}
	w.rotate(t, w.west, b, w.startRoot(b)...)
	w.exchange(t, "west has replaced its root", func() error {
		return w.are(t.Context(), w.west, "intermediate-2", "active", "intermediate-1", "removed", a.id, "removed")
	})
	until(t, "workloads meet under the new root", time.Minute, func() error {
		return errors.Join(w.under(east.Socket, b), w.under(west.Socket, b), w.meet(east, west))
	})
	for _, x := range []*lab.Agent{east, west} {
		until(t, "the new root alone is believed", time.Minute, func() error { return w.alone(x.Socket, b) })
	}
	w.logged(t, w.west)
	server.Stop()
}
