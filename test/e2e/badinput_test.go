//go:build real

package e2e

import (
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

func TestAWrongPassphraseOpensNothing(t *testing.T) {
	w := newWorld(t, "")
	server := w.serve(t)
	agent := w.sealedAgent(t)
	agent.Stop()
	server.Stop()

	w.write(t, "wrong.pass", "not the passphrase that was given\n")
	w.write(t, "east/server.pass", "not the passphrase that was given\n")
	w.write(t, "east/seal.pass", "not the passphrase that was given\n")
	csr := w.west.Path("intermediate.csr")
	says := []string{"passphrase"}
	w.refuses(t, 2, append(says, "wrong.pass"), "root", "sign", "--dir", "root", "--passphrase-file", "wrong.pass", "--cluster", "west", "--csr", csr,
		"--fingerprint", keyFingerprint(t, readCSR(t, csr).Raw), "--out", "chain.pem")
	w.refuses(t, 2, append(says, "server.pass"), "cluster", "init", "--config", w.east.Config())
	w.refuses(t, 2, append(says, "server.pass"), "cluster", "init", "--config", w.east.Config(), "--dry-run")
	w.refuses(t, 2, append(says, "server.pass"), "serve", "--config", w.east.Config())
	w.refuses(t, 2, append(says, "seal.pass"), "agent", "--config", w.path("east/sealed.yaml"))

	fp := w.signWest(t)
	w.write(t, "west/server.pass", "not the passphrase that was given\n")
	w.refuses(t, 2, append(says, "server.pass"), w.west.InstallArgs(fp)...)

	t.Run("nor does none", func(t *testing.T) {
		for _, content := range []string{"", "\n"} {
			w.write(t, "wrong.pass", content)
			w.refuses(t, 2, []string{"wrong.pass", "empty"}, "root", "init", "--trust-domain", "example.org", "--dir", "another", "--passphrase-file", "wrong.pass")
		}
		w.refuses(t, 2, []string{"absent.pass"}, "root", "init", "--trust-domain", "example.org", "--dir", "another", "--passphrase-file", "absent.pass")
		w.refuses(t, 2, []string{"--passphrase-file"}, "root", "init", "--trust-domain", "example.org", "--dir", "another")
		if err := os.Chmod(w.path("root.pass"), 0o644); err != nil {
			t.Fatal(err)
		}
		w.refuses(t, 2, []string{"root.pass", "chmod"}, "root", "init", "--trust-domain", "example.org", "--dir", "another", "--passphrase-file", "root.pass")
	})
}

// sealedAgent is an agent whose key is sealed by a passphrase in east/seal.pass; its configuration is east/sealed.yaml.
func (w *world) sealedAgent(t *testing.T) *lab.Process {
	t.Helper()
	token, err := w.east.Token(t.Context(), "sealed")
	if err != nil {
		t.Fatal(err)
	}
	ports, err := lab.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	http := fmt.Sprintf("127.0.0.1:%d", ports[0])
	w.write(t, "east/seal.pass", "what seals this agent's key\n")
	w.write(t, "east/sealed.token", token)
	w.write(t, "east/sealed.yaml", "state_dir: ./sealed\njoin_token_file: ./sealed.token\nseal: { passphrase_file: ./seal.pass }\nsocket: ./run/sealed.sock\nhttp: "+http+"\n")
	p, err := w.Start("east-sealed", "agent", "--config", w.path("east/sealed.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Ready(t.Context(), "the agent", http); err != nil {
		t.Fatal(err)
	}
	return p
}

// signWest lets the root sign west's request and returns the root's fingerprint.
func (w *world) signWest(t *testing.T) string {
	t.Helper()
	csr := w.west.Path("intermediate.csr")
	w.must(t, w.west.SignArgs(keyFingerprint(t, readCSR(t, csr).Raw))...)
	return w.RootFingerprint
}

func TestAKeyThatDoesNotMatchItsCertificateIsNotUsed(t *testing.T) {
	w := newWorld(t, "")
	w.signWest(t)
	other := newWorld(t, "")
	server := other.serve(t)
	other.sealedAgent(t).Stop()
	server.Stop()

	swap := func(t *testing.T, a, b string) {
		t.Helper()
		for _, step := range [][2]string{{a, a + ".was"}, {b, a}, {a + ".was", b}} {
			if err := os.Rename(step[0], step[1]); err != nil {
				t.Fatal(err)
			}
		}
	}
	key := func(w *world, cluster, name string) string { return w.path(cluster, "state", "keys", name+"@1.pem") }

	t.Run("by serve", func(t *testing.T) {
		swap(t, key(w, "east", "intermediate"), key(w, "east", "control-ca"))
		w.refuses(t, 2, []string{"does not match", "control-ca"}, "serve", "--config", w.east.Config())
		swap(t, key(w, "east", "intermediate"), key(w, "east", "control-ca"))
	})
	t.Run("by cluster install", func(t *testing.T) {
		swap(t, key(w, "west", "intermediate"), key(w, "west", "control-ca"))
		w.refuses(t, 1, []string{"does not match", "certificate"}, w.west.InstallArgs(w.RootFingerprint)...)
		swap(t, key(w, "west", "intermediate"), key(w, "west", "control-ca"))
	})
	t.Run("by root sign", func(t *testing.T) {
		foreign := newRoot(t, goodFor)
		was, err := os.ReadFile(w.path("root/root.pem"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(w.west.Path("chain.pem"), w.path("chain.was")); err != nil {
			t.Fatal(err)
		}
		w.write(t, "root/root.pem", chainPEM(foreign.cert))
		w.refuses(t, 2, []string{"root"}, w.west.SignArgs(keyFingerprint(t, readCSR(t, w.west.Path("intermediate.csr")).Raw))...)
		w.write(t, "root/root.pem", string(was))
		if err := os.Rename(w.path("chain.was"), w.west.Path("chain.pem")); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("by an agent", func(t *testing.T) {
		// Another agent's key file, under the passphrase that opens it.
		keys := filepath.Join(other.path("east/sealed/keys"), "*.pem")
		found, _ := filepath.Glob(keys)
		if len(found) != 1 {
			t.Fatalf("%s: %d files", keys, len(found))
		}
		next := newWorld(t, "")
		nextServer := next.serve(t)
		next.sealedAgent(t).Stop()
		nextServer.Stop()
		foreign, err := os.ReadFile(found[0])
		if err != nil {
			t.Fatal(err)
		}
		next.write(t, "east/sealed/keys/"+filepath.Base(found[0]), string(foreign))
		next.refuses(t, 2, []string{"another key", "enrolment.json"}, "agent", "--config", next.path("east/sealed.yaml"))
	})
	// Nothing of all this has spoilt anything.
	w.must(t, w.west.InstallArgs(w.RootFingerprint)...)
	w.serve(t)
}

func TestAChainThatIsNotTheAnswerIsNotInstalled(t *testing.T) {
	w := newWorld(t, "")
	w.signWest(t)
	chain := readCerts(t, w.west.Path("chain.pem"))
	own, root := chain[0], chain[1]
	csr := readCSR(t, w.west.Path("intermediate.csr"))
	foreign := newRoot(t, goodFor)
	expiredRoot, futureRoot := newRoot(t, validity{-20 * day, -day}), newRoot(t, validity{day, 20 * day})
	eastChain := readCerts(t, w.east.Path("chain.pem"))
	leafKey := newKey(t)

	for name, c := range map[string]struct {
		chain string
		root  string // the fingerprint given; "" = of the chain's last
		says  []string
	}{
		"in the wrong order":                         {chain: chainPEM(root, own), root: w.RootFingerprint, says: []string{"order"}},
		"without its root":                           {chain: chainPEM(own), says: []string{"not a root", "root sign"}},
		"of the root only":                           {chain: chainPEM(root), says: []string{"root only", "root sign"}},
		"of another root than the fingerprint's":     {chain: chainPEM(foreign.sign(t, csr, goodFor), foreign.cert), root: w.RootFingerprint, says: []string{"fingerprint", "root's holder"}},
		"with a root that has not signed it":         {chain: chainPEM(own, foreign.cert), says: []string{"not signed by"}},
		"of another cluster":                         {chain: chainPEM(eastChain...), says: []string{"west", "another cluster"}},
		"with an expired intermediate":               {chain: chainPEM(foreign.sign(t, csr, validity{-10 * day, -day}), foreign.cert), says: []string{"expired", "signed"}},
		"with an intermediate that is not valid yet": {chain: chainPEM(foreign.sign(t, csr, validity{day, 10 * day}), foreign.cert), says: []string{"not yet valid", "clock"}},
		"with an expired root":                       {chain: chainPEM(expiredRoot.sign(t, csr, goodFor), expiredRoot.cert), says: []string{"expired"}},
		"with a root that is not valid yet":          {chain: chainPEM(futureRoot.sign(t, csr, goodFor), futureRoot.cert), says: []string{"not yet valid"}},
		"with a certificate that may not sign":       {chain: chainPEM(signed(t, noCA(t, csr), foreign.cert, csr.PublicKey, foreign.key), foreign.cert), says: []string{"CA"}},
		"for another key":                            {chain: chainPEM(signed(t, authority(t, "x", goodFor), foreign.cert, leafKey.Public(), foreign.key), foreign.cert), says: []string{"key"}},
		"of text that is no PEM":                     {chain: "give me an intermediate\n", root: w.RootFingerprint, says: []string{"PEM"}},
		"of nothing":                                 {chain: "", root: w.RootFingerprint, says: []string{"chain"}},
		"of damaged PEM":                             {chain: strings.Replace(chainPEM(own, root), "MII", "!!!", 1), root: w.RootFingerprint, says: []string{"PEM"}},
		"of PEM that is no certificate":              {chain: "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", root: w.RootFingerprint, says: []string{"certificate 1"}},
		"with a private key":                         {chain: chainPEM(own, root) + "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", root: w.RootFingerprint, says: []string{"certificates only"}},
		"pinned by what is no fingerprint":           {chain: chainPEM(own, root), root: "SHA256:zz", says: []string{"fingerprint"}},
		"longer than any chain":                      {chain: strings.Repeat(chainPEM(own, root), 100), root: w.RootFingerprint, says: []string{"chain"}},
	} {
		t.Run(name, func(t *testing.T) {
			w.write(t, "bad.pem", c.chain)
			if c.root == "" {
				certs := readCerts(t, w.path("bad.pem"))
				c.root = fingerprint(certs[len(certs)-1].Raw)
			}
			code := 1
			if name == "longer than any chain" || name == "pinned by what is no fingerprint" { // typed wrong
				code = 2
			}
			w.refuses(t, code, c.says, "cluster", "install", "--config", w.west.Config(), "--chain", "bad.pem", "--root-fingerprint", c.root)
		})
	}
	// A server without an intermediate says what is missing.
	w.refuses(t, 2, []string{"no intermediate", "root sign", "cluster install"}, "serve", "--config", w.west.Config())
	// And the right chain is installed after all that, once.
	if out := w.must(t, w.west.InstallArgs(w.RootFingerprint)...); out != "installed\n" {
		t.Errorf("install says %q", out)
	}
	if out := w.must(t, w.west.InstallArgs(w.RootFingerprint)...); out != "unchanged\n" {
		t.Errorf("install again says %q", out)
	}
	w.write(t, "bad.pem", chainPEM(foreign.sign(t, csr, goodFor), foreign.cert))
	w.refuses(t, 1, []string{"another"}, "cluster", "install", "--config", w.west.Config(), "--chain", "bad.pem", "--root-fingerprint", fingerprint(foreign.cert.Raw))
}

// noCA is what a careless signer makes of an intermediate's CSR.
func noCA(t *testing.T, csr *x509.CertificateRequest) *x509.Certificate {
	c := authority(t, "", goodFor)
	c.RawSubject, c.IsCA, c.KeyUsage = csr.RawSubject, false, x509.KeyUsageDigitalSignature
	return c
}

func TestAnIntermediateThatHasExpiredIssuesNothingAndSaysSo(t *testing.T) {
	t.Parallel() // it mostly waits
	w := newWorld(t, "leaf: { ttl: 5s, max_ttl: 5s }\n")
	root := newRoot(t, goodFor)
	const life = time.Minute // enough to install it and start with it on a busy machine
	cert := root.sign(t, readCSR(t, w.west.Path("intermediate.csr")), validity{-time.Hour, life})
	w.write(t, "chain.pem", chainPEM(cert, root.cert))
	w.must(t, "cluster", "install", "--config", w.west.Config(), "--chain", "chain.pem", "--root-fingerprint", fingerprint(root.cert.Raw))
	server, err := w.west.Serve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Until(t.Context(), "the end of the intermediate", 2*time.Minute, func() error {
		status, text := get(t, w.west.HTTP, "/readyz")
		if status != http.StatusServiceUnavailable || !strings.Contains(text, "[-]issuer-mesh failed") || !strings.Contains(text, "expired") {
			return fmt.Errorf("readyz answers %d %s", status, text)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if status, _ := get(t, w.west.HTTP, "/livez"); status != http.StatusOK {
		t.Error("a server that can't issue is killed by its liveness probe")
	}
	server.Stop()
	w.refuses(t, 2, []string{"expired", "install"}, "serve", "--config", w.west.Config())
}

func get(t *testing.T, addr, path string) (int, string) {
	t.Helper()
	resp, err := http.Get("http://" + addr + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var b strings.Builder
	if err := resp.Write(&b); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, b.String()
}

func TestAnAddressInUseIsLeftAlone(t *testing.T) {
	w := newWorld(t, "")
	server := w.serve(t)
	a := w.agent(t, "node-1")
	a.Stop()
	server.Stop()
	config, err := os.ReadFile(w.east.Config())
	if err != nil {
		t.Fatal(err)
	}

	hold := func(t *testing.T, network, addr string) {
		t.Helper()
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		answered := make(chan struct{}, 8)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
				answered <- struct{}{}
			}
		}()
		t.Cleanup(func() {
			defer l.Close()
			for len(answered) > 0 {
				<-answered
			}
			c, err := net.Dial(network, addr)
			if err != nil {
				t.Errorf("who listened on %s is cut off: %v", addr, err)
				return
			}
			c.Close()
			select {
			case <-answered:
			case <-time.After(5 * time.Second):
				t.Errorf("who listened on %s is not reached any more", addr)
			}
		})
	}
	serve := []string{"serve", "--config", w.east.Config()}
	agent := []string{"agent", "--config", w.path("east/node-1.yaml")}
	for _, addr := range []string{w.east.Enrol, w.east.Agents, w.east.HTTP} {
		t.Run("serve "+addr, func(t *testing.T) {
			hold(t, "tcp", addr)
			w.refuses(t, 2, []string{addr, "in use"}, serve...)
		})
	}
	t.Run("agent "+a.HTTP, func(t *testing.T) {
		hold(t, "tcp", a.HTTP)
		w.refuses(t, 2, []string{a.HTTP, "in use"}, agent...)
	})
	t.Run("admin socket", func(t *testing.T) {
		hold(t, "unix", w.east.Path("state", "admin.sock"))
		w.refuses(t, 2, []string{"admin.sock", "in use"}, serve...)
	})
	t.Run("SDS socket", func(t *testing.T) {
		hold(t, "unix", a.Socket)
		w.refuses(t, 2, []string{a.Socket, "another"}, agent...)
	})
	t.Run("something else at a socket's path", func(t *testing.T) {
		w.write(t, "east/run/node-1.sock", "precious")
		w.refuses(t, 2, []string{a.Socket, "something else than a socket"}, agent...)
		w.write(t, "east/state/admin.sock", "precious")
		w.refuses(t, 2, []string{"admin.sock"}, serve...)
		for _, path := range []string{a.Socket, w.east.Path("state", "admin.sock")} {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("a path too long for a socket", func(t *testing.T) {
		w.write(t, "east/server.yaml", string(config)+"admin_socket: ./"+strings.Repeat("long/", 30)+"admin.sock\n")
		w.refuses(t, 2, []string{"107 bytes", "shorter"}, serve...)
		w.write(t, "east/server.yaml", string(config))
	})
	t.Run("what a dead process left behind is replaced", func(t *testing.T) {
		for _, path := range []string{a.Socket, w.east.Path("state", "admin.sock")} {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			l.Close()
		}
		w.serve(t)
		if _, err := w.Start("east-node-1", agent...); err != nil {
			t.Fatal(err)
		}
		if err := lab.Ready(t.Context(), "the agent", a.HTTP); err != nil {
			t.Error(err)
		}
		w.must(t, "join-token", "list", "--config", w.east.Config())
	})
}

func TestASecondProcessOnTheSameFolderIsRefused(t *testing.T) {
	w := newWorld(t, "")
	server := w.serve(t)
	a := w.agent(t, "node-1")
	// Even with addresses of its own: it is the folder that has one holder.
	twin, err := w.Cluster("east", "")
	if err != nil {
		t.Fatal(err)
	}
	pid := fmt.Sprintf("process %d", server.PID())
	state := w.east.Path("state")
	w.refuses(t, 2, []string{state, pid, "stop"}, "serve", "--config", twin.Config())
	w.refuses(t, 2, []string{state, pid}, "cluster", "init", "--config", twin.Config())
	w.refuses(t, 2, []string{state, pid}, "cluster", "init", "--config", twin.Config(), "--dry-run")
	// The server that holds it is asked instead.
	if out := w.must(t, w.east.InstallArgs(w.RootFingerprint)...); out != "unchanged\n" {
		t.Errorf("install beside a server says %q", out)
	}
	w.write(t, "east/twin.yaml", "state_dir: ./node-1\nsocket: ./run/twin.sock\n")
	w.refuses(t, 2, []string{w.east.Path("node-1"), fmt.Sprintf("process %d", a.PID()), "stop"}, "agent", "--config", w.path("east/twin.yaml"))
	// Both still work.
	for _, addr := range []string{a.HTTP, w.east.HTTP} {
		if status, text := get(t, addr, "/readyz"); status != http.StatusOK {
			t.Errorf("%s answers %d %s", addr, status, text)
		}
	}
	// Readers don't need the folder for themselves.
	w.must(t, "cluster", "show", "--config", twin.Config())
	w.must(t, "log", "verify", "--config", twin.Config())
}

func TestAnUnknownKeyIsRefusedWithItsPlace(t *testing.T) {
	w := newWorld(t, "")
	config, err := os.ReadFile(w.east.Config())
	if err != nil {
		t.Fatal(err)
	}
	typo := strings.Replace(string(config), "listen:\n  enrol:", "listen:\n  enroll:", 1)
	typo = strings.Replace(typo, "cluster:", "clster:", 1)
	w.write(t, "typo.yaml", typo)
	says := []string{"typo.yaml:2:1", "clster", `did you mean "cluster"?`}
	for _, args := range [][]string{
		{"serve"},
		{"cluster", "init"},
		{"cluster", "install", "--chain", "root.pass", "--root-fingerprint", "x"},
		{"cluster", "show"},
		{"join-token", "create", "--agent", "node-1"},
		{"join-token", "list"},
		{"join-token", "revoke", "abc"},
		{"registration", "list"},
		{"log", "find"},
		{"log", "show"},
		{"log", "prove", "--index", "0"},
		{"log", "verify"},
	} {
		t.Run(strings.Join(args[:min(len(args), 2)], " "), func(t *testing.T) {
			before := snapshot(t, w.Dir)
			r := w.run(t, append(args, "--config", "typo.yaml")...)
			if r.code != 2 || r.out != "" {
				t.Error(r)
			}
			for _, word := range append(says, "typo.yaml:7:3", `did you mean "enrol"?`) {
				if !strings.Contains(r.err, word) {
					t.Errorf("does not say %s: %v", word, r)
				}
			}
			unchanged(t, r, before, snapshot(t, w.Dir))
		})
	}
	w.write(t, "agent.yaml", "state_dir: ./a\nsoket: ./a.sock\n")
	w.refuses(t, 2, []string{"agent.yaml:2:1", "soket", `did you mean "socket"?`}, "agent", "--config", "agent.yaml")
	w.write(t, "root.yaml", "trust_domain: example.org\ndir: ./another\nlive: 10y\n")
	w.refuses(t, 2, []string{"root.yaml:3:1", "live", `did you mean "life"?`}, "root", "init", "-f", "root.yaml", "--passphrase-file", "root.pass")
	w.write(t, "sign.yaml", "dir: ./root\ntrust_domain: example.org\nclutser: west\ncsr: ./west/intermediate.csr\nkey_fingerprint: SHA256:00\nout: ./west.pem\n")
	w.refuses(t, 2, []string{"sign.yaml:3:1", "clutser", `did you mean "cluster"?`}, "root", "sign", "-f", "sign.yaml", "--passphrase-file", "root.pass")
	w.write(t, "reg.yaml", "registrations:\n  - name: x\n    spifeid: spiffe://example.org/x\n    agents: [node-1]\n    selectors: ['unix:uid:1']\n")
	w.refuses(t, 1, []string{"reg.yaml:3:5", "spifeid", `did you mean "spiffe_id"?`}, "registration", "apply", "--config", w.east.Config(), "-f", "reg.yaml")

	r := w.run(t, "config", "validate", "--config", "typo.yaml", "-o", "json")
	if r.code != 1 || !strings.Contains(r.out, `"line": 2`) || !strings.Contains(r.out, "did you mean") {
		t.Error(r)
	}
	// Contradictions refuse to start as well.
	w.write(t, "east/contradiction.yaml", string(config)+"leaf: { ttl: 48h, max_ttl: 24h }\n")
	w.refuses(t, 2, []string{"contradiction.yaml", "ttl", "48h"}, "serve", "--config", w.path("east/contradiction.yaml"))
}
