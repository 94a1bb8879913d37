//go:build real

package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/youmark/pkcs8"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
)

// secretForms is every shape in which some bytes could slip out.
func secretForms(into map[string][]byte, name string, secret []byte) {
	into[name] = secret
	into[name+" in hex"] = []byte(hex.EncodeToString(secret))
	into[name+" in HEX"] = []byte(strings.ToUpper(hex.EncodeToString(secret)))
	// Without the last characters, which depend on what follows; and as a part of something longer it begins anywhere.
	for skip := range 3 {
		for form, encoding := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64url": base64.RawURLEncoding} {
			text := encoding.EncodeToString(secret[skip:])
			into[fmt.Sprintf("%s in %s from byte %d", name, form, skip)] = []byte(text[:min(len(text)-4, 60)])
		}
	}
}

// scalar is the secret part of an EC key, without which nothing of its DER is worth hiding.
func scalar(t *testing.T, key any) []byte {
	t.Helper()
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		t.Fatalf("a key of type %T", key)
	}
	raw, err := ec.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestSecretsStaySecret(t *testing.T) {
	w := newWorld(t, "logging: { level: debug, format: text }\n")
	w.serve(t)
	w.apply(t, "registrations:\n  - { name: me, spiffe_id: spiffe://example.org/me, agents: [node-1], selectors: ['unix:uid:"+uid()+"'] }\n")
	secrets := map[string][]byte{}

	// An enrolment, at debug level.
	token, err := w.east.Token(t.Context(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	ports, err := lab.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	agentHTTP := fmt.Sprintf("127.0.0.1:%d", ports[0])
	w.write(t, "east/seal.pass", "what seals the key of this agent\n")
	w.write(t, "east/node-1.token", token)
	config := w.write(t, "east/node-1.yaml", "state_dir: ./node-1\njoin_token_file: ./node-1.token\nseal: { passphrase_file: ./seal.pass }\nsocket: ./run/node-1.sock\nhttp: "+agentHTTP+
		"\nlogging: { level: debug }\n")
	agent, err := w.Start("east-node-1", "agent", "--config", config)
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Ready(t.Context(), "the agent", agentHTTP); err != nil {
		t.Fatal(err)
	}

	// What commands print, beside what they are asked to give away.
	var said []ran
	say := func(r ran) { said = append(said, r) }
	socket := w.east.Path("run", "node-1.sock")
	say(w.run(t, "svid", "fetch", "--socket", socket, "--write", "tls", "-o", "json"))
	say(w.run(t, "svid", "fetch", "--socket", socket, "--spiffe-id", "spiffe://example.org/other", "--timeout", "1s"))
	for line := range reads {
		if strings.Contains(line, "east/server.yaml") || strings.Contains(line, "node-1.yaml") {
			for _, format := range []string{"wide", "json"} {
				say(w.run(t, append(strings.Fields(line), "-o", format)...))
			}
		}
	}
	var web bytes.Buffer
	for _, addr := range []string{w.east.HTTP, agentHTTP} {
		for _, path := range []string{"/metrics", "/livez", "/readyz?verbose", "/debug/pprof/heap?debug=1", "/debug/vars", "/"} {
			status, text := get(t, addr, path)
			if strings.HasPrefix(path, "/debug") && status != http.StatusNotFound {
				t.Errorf("%s%s answers %d", addr, path, status)
			}
			web.WriteString(text)
		}
	}
	agent.Stop()

	// Refusals: a used token, a token in the wrong place, a file of secrets given for something else.
	if _, err := doors.Enrol(t.Context(), token); err == nil {
		t.Error("a used token admits another")
	}
	w.write(t, "east/again.yaml", "state_dir: ./again\njoin_token_file: ./node-1.token\nsocket: ./run/again.sock\nhttp: "+agentHTTP+"\nlogging: { level: debug }\n")
	again := w.run(t, "agent", "--config", w.path("east/again.yaml"))
	again.refused(t, 1, "join token")
	say(again)
	w.write(t, "east/broken.token", token[:len(token)-9]+"\n")
	w.write(t, "east/broken.yaml", "state_dir: ./broken\njoin_token_file: ./broken.token\nsocket: ./run/broken.sock\nhttp: "+agentHTTP+"\n")
	broken := w.run(t, "agent", "--config", w.path("east/broken.yaml"))
	broken.refused(t, 2, "broken.token")
	say(broken)
	for _, file := range []string{"root.pass", "east/server.pass", "east/seal.pass", "east/node-1.token", "tls/key.pem", "root/keys/root@1.pem"} {
		for _, args := range [][]string{
			{"config", "validate", "--config", file, "--role", "server"},
			{"serve", "--config", file},
			{"svid", "inspect", file},
			{"registration", "apply", "--config", w.east.Config(), "-f", file},
			{"root", "sign", "-f", file},
			{"root", "sign", "--dir", "root", "--cluster", "north", "--fingerprint", "x", "--csr", file},
			{"cluster", "install", "--config", w.west.Config(), "--chain", file, "--root-fingerprint", w.RootFingerprint},
			{"log", "prove", "--config", w.east.Config(), "--cert", file},
			{"log", "verify", "--proof", file, "--key", file},
		} {
			r := w.run(t, args...)
			if r.code == 0 {
				t.Error(r)
			}
			say(r)
		}
	}
	// What is secret.
	for _, file := range []string{"root.pass", "east/server.pass", "east/seal.pass"} {
		secretForms(secrets, file, []byte(strings.TrimSpace(readFile(t, w.path(file)))))
	}
	parsed, err := identity.ParseJoinToken(token)
	if err != nil {
		t.Fatal(err)
	}
	secretForms(secrets, "the join token's secret", parsed.Secret)
	block, _ := pem.Decode([]byte(readFile(t, w.path("tls/key.pem"))))
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	secretForms(secrets, "the workload's key", scalar(t, key))
	for path, pass := range map[string]string{
		"root/keys/root@1.pem": "root.pass", "east/state/keys/intermediate@1.pem": "east/server.pass", "east/state/keys/control-ca@1.pem": "east/server.pass",
		"east/node-1/keys/agent@1.pem": "east/seal.pass",
	} {
		block, _ := pem.Decode([]byte(readFile(t, w.path(path))))
		key, err := pkcs8.ParsePKCS8PrivateKey(block.Bytes, []byte(strings.TrimSpace(readFile(t, w.path(pass)))))
		if err != nil {
			t.Fatal(path, err)
		}
		secretForms(secrets, path, scalar(t, key))
	}

	// Where it must not be: what was said, served, logged, and everything on disk but where it belongs.
	places := map[string][]byte{"the HTTP endpoints": web.Bytes()}
	for _, r := range said {
		places["what is printed by signet "+strings.Join(r.args, " ")] = []byte(r.out + r.err)
	}
	belongs := map[string]bool{
		"root.pass": true, "east/server.pass": true, "west/server.pass": true, "east/seal.pass": true, "east/node-1.token": true, "east/broken.token": true,
		"tls/key.pem": true, "lab.log": true, // the lab's own log of what it ran, with the token it asked for
	}
	err = filepath.WalkDir(w.Dir, func(path string, d fs.DirEntry, err error) error {
		name, _ := filepath.Rel(w.Dir, path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // the server has renamed it meanwhile
		}
		if err != nil || !d.Type().IsRegular() || belongs[name] {
			return err
		}
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		places[name] = data
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, must := range []string{"east-server.log", "east-node-1.log", "east/state/signet.db", "east/state/log/checkpoint", "east/node-1/enrolment.json"} {
		if len(places[must]) == 0 {
			t.Errorf("%s is not among what is searched", must)
		}
	}
	for place, text := range places {
		for name, secret := range secrets {
			if bytes.Contains(text, secret) {
				t.Errorf("%s is in %s", name, place)
			}
		}
		for _, mark := range []string{"BEGIN PRIVATE KEY", "BEGIN EC PRIVATE KEY", "BEGIN RSA PRIVATE KEY"} {
			if bytes.Contains(text, []byte(mark)) {
				t.Errorf("%q is in %s", mark, place)
			}
		}
	}
	// The search itself finds what is there.
	if !bytes.Contains([]byte(token), secrets["the join token's secret in base64url from byte 0"]) &&
		!bytes.Contains([]byte(token), secrets["the join token's secret in base64url from byte 1"]) &&
		!bytes.Contains([]byte(token), secrets["the join token's secret in base64url from byte 2"]) {
		t.Error("the search would not find the secret in the token itself")
	}
	for path, mode := range map[string]fs.FileMode{"tls/key.pem": 0o600, "east/state": 0o700, "east/state/signet.db": 0o600, "root": 0o700} {
		info, err := os.Stat(w.path(path))
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s has mode %v, want %v (%v)", path, info.Mode().Perm(), mode, err)
		}
	}
}
