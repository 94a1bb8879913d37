package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

// here runs commands in one process, as a person would type them in one folder.
type here struct {
	t   *testing.T
	dir string
}

func (h here) path(name string) string { return filepath.Join(h.dir, name) }

func (h here) write(name, text string) string {
	h.t.Helper()
	if err := os.WriteFile(h.path(name), []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
	return h.path(name)
}

func (h here) type_(stdin string, args ...string) (out, errs string, status int) {
	h.t.Helper()
	var o, e bytes.Buffer
	c := &cli{in: strings.NewReader(stdin), out: &o, err: &e}
	status = c.run(h.t.Context(), args)
	return o.String(), e.String(), status
}

// must runs a command that has to end with this status, and returns what it said on stdout and stderr.
func (h here) must(status int, args ...string) (out, errs string) {
	h.t.Helper()
	out, errs, got := h.type_("", args...)
	if got != status {
		h.t.Fatalf("signet %s: exit status %d, want %d\n%s%s", strings.Join(args, " "), got, status, out, errs)
	}
	return out, errs
}

// awaited is a writer from which a test waits for a word.
type awaited struct {
	mu    sync.Mutex
	text  strings.Builder
	word  string
	found chan struct{}
}

func await(word string) *awaited { return &awaited{word: word, found: make(chan struct{})} }

func (a *awaited) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	before := strings.Contains(a.text.String(), a.word)
	a.text.Write(p)
	if !before && strings.Contains(a.text.String(), a.word) {
		close(a.found)
	}
	return len(p), nil
}

func (a *awaited) String() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.text.String()
}

// serve runs `signet serve` until the returned function is called, which returns its exit status.
func (h here) serve(ready *awaited, args ...string) (stop func() int) {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan int, 1)
	c := &cli{in: strings.NewReader(""), out: ready, err: ready}
	go func() { done <- c.run(ctx, append([]string{"serve"}, args...)) }()
	stop = sync.OnceValue(func() int { cancel(); return <-done })
	h.t.Cleanup(func() { stop() })
	select {
	case <-ready.found:
	case status := <-done:
		done <- status
		h.t.Fatalf("signet serve ended with %d:\n%s", status, ready)
	case <-time.After(3 * time.Minute):
		h.t.Fatalf("signet serve is not ready:\n%s", ready)
	}
	return stop
}

func shortFolder(t *testing.T) here {
	t.Helper()
	dir, err := os.MkdirTemp("", "sg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return here{t, dir}
}

// freeAddress is one on loopback that nobody else takes until it is used.
func freeAddress(t *testing.T) string {
	t.Helper()
	ports, err := lab.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", ports[0])
}

func contains(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("%q is missing in:\n%s", w, text)
		}
	}
}

func TestAClusterIsMadeAndServedByItsCommands(t *testing.T) {
	h := shortFolder(t)
	h.write("pass", "correct horse battery staple\n")
	east := h.write("east.yaml", fmt.Sprintf(`trust_domain: example.org
cluster: east
keystore: { passphrase_file: ./pass }
listen: { enrol: %q, agents: %q, http: %q }
logging: { format: json }
`, freeAddress(t), freeAddress(t), freeAddress(t)))
	with := func(args ...string) []string { return append(args, "--config", east) }

	_, errs := h.must(exitCouldNotSay, with("serve")...)
	contains(t, errs, "signet cluster init")
	_, errs = h.must(exitCouldNotSay, with("cluster", "show")...)
	contains(t, errs, "signet cluster init")
	_, errs = h.must(exitCouldNotSay, with("join-token", "list")...)
	contains(t, errs, "no server answers on "+h.path("state/admin.sock"), "start it with: signet serve --config "+east)

	rootPrint, _ := h.must(exitYes, "root", "init", "--trust-domain", "example.org", "--dir", h.path("root"), "--passphrase-file", h.path("pass"))
	for _, dry := range []struct {
		args []string
		more string
	}{{nil, ""}, {[]string{"--csr-out", h.path("east.csr")}, "would be: request written to " + h.path("east.csr") + "\n"}} {
		out, errs := h.must(exitYes, append(with("cluster", "init", "--dry-run"), dry.args...)...)
		if want := strings.ReplaceAll(`would be: state database DIR/signet.db made
would be: audit log DIR/log begun with a new key, file:log@1 (ed25519)
would be: control CA made with a new key, file:control-ca@1 (ecdsa-p256)
would be: intermediate requested with a new key, file:intermediate@1 (ecdsa-p256)
`, "DIR", h.path("state")) + dry.more; out != want || errs != "this was a dry run: nothing is changed\n" {
			t.Errorf("a dry run of init says\n%s%swant\n%s", out, errs, want)
		}
		for _, made := range []string{"state", "east.csr"} {
			if _, err := os.Lstat(h.path(made)); err == nil {
				t.Errorf("a dry run makes %s", made)
			}
		}
	}
	keyPrint, errs := h.must(exitYes, with("cluster", "init", "--csr-out", h.path("east.csr"))...)
	contains(t, errs, "control CA:", "key of the request:", "log verifier key:",
		"signet root sign --cluster east --out east.chain.pem --csr "+h.path("east.csr")+" \\\n  --fingerprint "+keyPrint)
	if out, _ := h.must(exitYes, with("cluster", "init", "--dry-run")...); out != "unchanged\n" {
		t.Errorf("a dry run of what was made says %q", out)
	}
	csr, errs := h.must(exitYes, with("cluster", "init")...)
	contains(t, errs, "unchanged", strings.TrimSpace(keyPrint))
	if file, err := os.ReadFile(h.path("east.csr")); err != nil || string(file) != csr {
		t.Errorf("the request was not the same the second time: %v", err)
	}
	_, errs = h.must(exitCouldNotSay, with("serve")...)
	contains(t, errs, "signet cluster install")

	h.must(exitYes, "root", "sign", "--dir", h.path("root"), "--csr", h.path("east.csr"), "--fingerprint", strings.TrimSpace(keyPrint),
		"--cluster", "east", "--out", h.path("east.chain"), "--passphrase-file", h.path("pass"))
	install := func(print string) []string {
		return with("cluster", "install", "--chain", h.path("east.chain"), "--root-fingerprint", strings.TrimSpace(print))
	}
	_, errs = h.must(exitNo, install("SHA256:"+strings.Repeat("00", 32))...)
	contains(t, errs, strings.TrimSpace(rootPrint))
	if out, _ := h.must(exitYes, append(install(rootPrint), "--dry-run")...); out != "would be installed\n" {
		t.Errorf("a dry run of install says %q", out)
	}
	out, errs := h.must(exitYes, install(rootPrint)...)
	contains(t, errs, "issuer:", "expires:", "root:", "intermediate-1 signed under ")
	if out != "installed\n" || strings.Contains(errs, "{") {
		t.Errorf("install says more than what it has done, or less:\n%s%s", out, errs)
	}
	if out, _ := h.must(exitYes, install(rootPrint)...); out != "unchanged\n" {
		t.Errorf("install again says %q", out)
	}
	out, _ = h.must(exitYes, with("cluster", "show", "-o", "json")...)
	var shown struct {
		Roots       []string
		Authorities []struct{ ID, State string }
	}
	if err := json.Unmarshal([]byte(out), &shown); err != nil || len(shown.Roots) != 1 || shown.Roots[0] != strings.TrimSpace(rootPrint) || len(shown.Authorities) != 2 {
		t.Errorf("cluster show -o json: %v\n%s", err, out)
	}

	ready := await("ready: cluster east of example.org")
	stop := h.serve(ready, "--config", east)
	_, errs = h.must(exitCouldNotSay, with("serve")...)
	contains(t, errs, "in use by process")

	// The same command, through the server that holds the folder now.
	if out, _ := h.must(exitYes, install(rootPrint)...); out != "unchanged\n" {
		t.Errorf("install at the server says %q", out)
	}
	h.must(exitNo, install("SHA256:"+strings.Repeat("00", 32))...)
	h.must(exitYes, with("rotation", "start", "intermediate", "--dry-run")...)
	keyPrint, _ = h.must(exitYes, with("rotation", "start", "intermediate", "--csr-out", h.path("east-2.csr"))...)
	h.must(exitYes, "root", "sign", "--dir", h.path("root"), "--csr", h.path("east-2.csr"), "--fingerprint", strings.TrimSpace(keyPrint),
		"--cluster", "east", "--out", h.path("east.chain-2"), "--passphrase-file", h.path("pass"))
	second := with("cluster", "install", "--chain", h.path("east.chain-2"), "--root-fingerprint", strings.TrimSpace(rootPrint))
	if out, _ := h.must(exitYes, append(second, "--dry-run")...); out != "would be installed\n" {
		t.Errorf("a dry run at the server says %q", out)
	}
	out, errs = h.must(exitYes, second...)
	if out != "installed\n" {
		t.Errorf("install at the server says %q", out)
	}
	contains(t, errs, "intermediate-2, ", "expires:", strings.TrimSpace(rootPrint))
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if out, _ = h.must(exitYes, with("ca", "list", "-o", "name")...); strings.Contains(out, "ca/intermediate-2\n") {
			out, _ = h.must(exitYes, with("ca", "show", "intermediate-2", "-o", "json")...)
			if strings.Contains(out, `"state": "active"`) {
				break
			}
		}
	}
	contains(t, out, `"state": "active"`, `"signing": true`)
	out, _ = h.must(exitYes, with("rotation", "status")...)
	contains(t, out, "NEXT\n", "east      this one", "intermediate-2")
	_, errs = h.must(exitYes, with("identity", "ban", "spiffe://example.org/ns/shop/sa/lost", "--reason", "lost")...)
	contains(t, errs, "spiffe://example.org/ns/shop/sa/lost is banned")

	token, errs := h.must(exitYes, with("join-token", "create", "--agent", "node-1")...)
	contains(t, errs, "node-1", "expires:")
	if !strings.HasPrefix(token, "signet-join-1.") || strings.Count(token, "\n") != 1 {
		t.Errorf("stdout is not the token alone: %q", token)
	}
	out, _ = h.must(exitYes, with("join-token", "list", "-o", "name")...)
	id := strings.TrimPrefix(strings.TrimSpace(out), "join-token/")
	out, _ = h.must(exitYes, "__complete", "join-token", "revoke", "--config", east, "")
	contains(t, out, id+"\tnode-1\n")
	h.must(exitYes, with("join-token", "revoke", id)...)
	h.must(exitYes, with("join-token", "revoke", id)...)
	h.must(exitNo, with("join-token", "revoke", "0000000000000000")...)
	out, _ = h.must(exitYes, with("join-token", "list", "-o", "wide")...)
	contains(t, out, id, "revoked")
	_, errs = h.must(exitCouldNotSay, with("join-token", "create", "--agent", "Node 1")...)
	contains(t, errs, "use 1 to 63")

	file := h.write("r.yaml", `registrations:
  - name: frontend
    spiffe_id: spiffe://example.org/ns/shop/sa/frontend
    agents: [node-1]
    selectors: [unix:uid:1000]
    ttl: 10s
`)
	apply := with("registration", "apply", "-f", file)
	out, _ = h.must(exitNo, append(apply, "--dry-run")...)
	contains(t, out, "registration/frontend created\n", "+ ttl: 10s")
	if out, _ = h.must(exitYes, apply...); out != "registration/frontend created\n" {
		t.Errorf("apply says %q", out)
	}
	if out, _ = h.must(exitYes, append(apply, "--dry-run")...); out != "registration/frontend unchanged\n" {
		t.Errorf("dry run of the same says %q", out)
	}
	list, _ := h.must(exitYes, with("registration", "list", "-o", "yaml")...)
	out, errs, status := h.type_(strings.ReplaceAll(list, "10s", "20s"), with("registration", "apply", "-f", "-", "--dry-run")...)
	if status != exitNo {
		t.Errorf("a listed set can't be applied: %s", errs)
	}
	contains(t, out, "registration/frontend changed\n  - ttl: 10s\n  + ttl: 20s\n")
	h.write("r.yaml", "registrations: []\n")
	if out, _ = h.must(exitYes, append(apply, "--prune")...); out != "registration/frontend deleted\n" {
		t.Errorf("prune says %q", out)
	}
	_, errs, status = h.type_("registrations:\n- name: a\n  spiffe_id: spiffe://other.org/x\n  agents: [n]\n  selectors: [a:b]\n", with("registration", "apply", "-f", "-")...)
	if status != exitCouldNotSay || !strings.Contains(errs, "is not of trust domain example.org") {
		t.Errorf("another trust domain: %d %s", status, errs)
	}
	if status := stop(); status != exitYes {
		t.Errorf("serve ended with %d:\n%s", status, ready)
	}
	if strings.Contains(ready.String(), strings.TrimSpace(token)) {
		t.Error("the token stands in the log")
	}
}

func TestAFiveMinuteStartCanBeRepeated(t *testing.T) {
	lab.DevPorts(t)
	h := shortFolder(t)
	dir := h.path("dev")
	var before string
	for range 2 {
		ready := await("Type next")
		stop := h.serve(ready, "--dev", "--dir", dir)
		contains(t, ready.String(), "*** DEV ***", "svid watch --socket "+filepath.Join(dir, "agent.sock"), "envoy -c "+filepath.Join(dir, "envoy.yaml"))
		out, _ := h.must(exitYes, "cluster", "show", "--config", filepath.Join(dir, "server.yaml"), "-o", "wide")
		contains(t, out, "CN=DEV Signet dev ")
		if before != "" && out != before {
			t.Errorf("the second start made something anew:\n%s\n%s", before, out)
		}
		before = out
		out, errs, status := h.type_("", "svid", "fetch", "--socket", filepath.Join(dir, "agent.sock"))
		if status != exitYes || !strings.Contains(out, "spiffe://dev.local/ns/default/sa/") {
			t.Errorf("svid fetch: %d\n%s%s", status, out, errs)
		}
		if status := stop(); status != exitYes {
			t.Errorf("serve --dev ended with %d:\n%s", status, ready)
		}
		if strings.Contains(ready.String(), "lost the server") {
			t.Errorf("the server was stopped before its agent:\n%s", ready)
		}
	}
	// What a killed start leaves behind is no stranger; anything else is.
	if err := os.WriteFile(filepath.Join(dir, ".envoy.yaml.tmp"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "mine"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, errs := h.must(exitCouldNotSay, "serve", "--dev", "--dir", dir)
	contains(t, errs, `"mine"`, "--dir")
	foreign := h.path("foreign")
	if err := os.MkdirAll(filepath.Join(foreign, "thesis"), 0o700); err != nil {
		t.Fatal(err)
	}
	h.must(exitCouldNotSay, "serve", "--dev", "--dir", foreign)
	if there, err := os.ReadDir(foreign); err != nil || len(there) != 1 {
		t.Errorf("the foreign folder now holds %v", there)
	}
	// Nobody outside this machine may reach it, whatever somebody writes into its file.
	if err := os.Remove(filepath.Join(dir, "mine")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "server.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, bytes.Replace(text, []byte("enrol: 127.0.0.1"), []byte("enrol: 192.0.2.1"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	_, errs = h.must(exitCouldNotSay, "serve", "--dev", "--dir", dir)
	contains(t, errs, "loopback only")
}

func TestServeNeedsToBeToldWhat(t *testing.T) {
	h := shortFolder(t)
	_, errs := h.must(exitCouldNotSay, "serve")
	contains(t, errs, "--config", "--dev")
	_, errs = h.must(exitCouldNotSay, "serve", "--dev", "--config", "x.yaml")
	contains(t, errs, "can't be used together")
}

func TestAnInputIsReadNoFurtherThanAllowed(t *testing.T) {
	c := &cli{in: io.LimitReader(endless{}, 1<<30)}
	if _, err := c.readInput("-", "chain", 100); err == nil || !strings.Contains(err.Error(), "larger than 100 bytes") {
		t.Errorf("error is %v", err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }
