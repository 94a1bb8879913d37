//go:build real

package e2e

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/test/doors"
)

// badCSRs is what comes where a CSR should, with words of the refusal that an admin reads.
func badCSRs(t *testing.T) map[string]badCSR {
	t.Helper()
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// What Go itself refuses to make.
	rsa1024, err := os.ReadFile("testdata/rsa1024.csr.der")
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	csr := func(key crypto.Signer) []byte {
		der, err := doors.CSR(key, nil)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	forged := csr(rsa2048)
	forged[len(forged)-1] ^= 1
	garbage := make([]byte, 500)
	_, _ = rand.Read(garbage)
	garbage[0] = 0xf6 // a tag that encoding/asn1 describes by its own insides
	return map[string]badCSR{
		"garbage":            {garbage, "certificate request"},
		"nothing":            {nil, "certificate request"},
		"10 MiB":             {bytes.Repeat([]byte{0x30}, 10<<20), "certificate request"},
		"a P-224 key":        {csr(p224), "P-224"},
		"an RSA-1024 key":    {rsa1024, "1024"},
		"an Ed25519 key":     {csr(edKey), "ed25519"},
		"a forged signature": {forged, "signed by its own key"},
		"something after it": {append(csr(newKey(t)), 0), "certificate request"},
	}
}

type badCSR struct {
	der  []byte
	says string
}

func TestARootSignsNoBadCSR(t *testing.T) {
	w := newWorld(t, "")
	for name, c := range badCSRs(t) {
		t.Run(name, func(t *testing.T) {
			w.write(t, "bad.csr", csrPEM(c.der))
			w.refuses(t, 1, []string{c.says}, "root", "sign", "--dir", "root", "--passphrase-file", "root.pass", "--cluster", "north",
				"--csr", "bad.csr", "--fingerprint", fingerprint(c.der), "--out", "north.pem")
		})
	}
	t.Run("raw bytes", func(t *testing.T) {
		w.write(t, "bad.csr", strings.Repeat("\x00\xff\x1b[2J", 1000))
		r := w.run(t, "root", "sign", "--dir", "root", "--passphrase-file", "root.pass", "--cluster", "north", "--csr", "bad.csr", "--fingerprint", fingerprint([]byte("x")), "--out", "-")
		r.refused(t, 1, "PEM")
	})
}

func TestUnsupportedKeysAreNotMade(t *testing.T) {
	w := newWorld(t, "")
	config, err := os.ReadFile(w.west.Config())
	if err != nil {
		t.Fatal(err)
	}
	for _, alg := range []string{"ecdsa-p224", "rsa-1024", "ed25519", "ecdsa-p521", "RSA"} {
		w.refuses(t, 2, []string{alg, "ecdsa-p256"}, "root", "init", "--trust-domain", "example.org", "--dir", "another", "--passphrase-file", "root.pass", "--algorithm", alg)
		w.write(t, "west/bad.yaml", strings.Replace(string(config), "keystore:\n", "keystore:\n  algorithm: "+alg+"\n", 1))
		w.refuses(t, 2, []string{"bad.yaml:5", alg, "ecdsa-p256"}, "cluster", "init", "--config", w.path("west/bad.yaml"))
	}
}

func TestTheDoorsRefuseBadCSRsAndStayOpen(t *testing.T) {
	w := newWorld(t, "")
	w.serve(t)
	w.apply(t, "registrations:\n  - { name: web, spiffe_id: spiffe://example.org/web, agents: [probe], selectors: [unix:uid:1] }\n")
	m, err := w.east.Member(t.Context(), "probe")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := m.Dial(w.east.Agents, m.ControlCA)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	good, err := doors.CSR(newKey(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	issued := func() int {
		var found []json.RawMessage
		r := w.run(t, "log", "find", "--config", w.east.Config(), "--kind", "certificate-issued", "-o", "json", "--limit", "0")
		if err := json.Unmarshal([]byte(r.out), &found); err != nil {
			t.Fatal(err, r)
		}
		return len(found)
	}
	w.untilLogged(t, w.east)
	before := issued()
	for name, c := range badCSRs(t) {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			token, err := w.east.Token(ctx, "next")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := doors.EnrolWith(ctx, token, c.der); err == nil {
				t.Error("the enrol door took it")
			} else {
				opaque(t, err)
			}
			// A request that could not be right costs nobody a token.
			if _, err := doors.Enrol(ctx, token); err != nil {
				t.Errorf("the token is spent by a request that was refused: %v", err)
			}
			before++ // that one

			// In one call with a good one: only the bad one is refused, unless the whole is too large to be read.
			item := func(csr []byte) *signetv1.IssueItem {
				return &signetv1.IssueItem{Registration: "web", Instance: "x", Selectors: []string{"unix:uid:1"}, Csr: csr}
			}
			r, err := signetv1.NewAgentsClient(conn).Issue(ctx, &signetv1.IssueRequest{Items: []*signetv1.IssueItem{item(c.der), item(good)}})
			if len(c.der) > 4<<20 {
				if status.Code(err) != codes.ResourceExhausted {
					t.Errorf("10 MiB got %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if r.Results[0].GetRefusal() == nil || r.Results[1].GetCertificate() == nil {
				t.Errorf("refused %v, issued %v", r.Results[0].GetRefusal(), r.Results[1].GetCertificate() != nil)
			}
			before++
		})
	}
	if _, err := doors.Issue(t.Context(), conn, "web", []string{"unix:uid:1"}, good); err != nil {
		t.Errorf("the connection is of no use any more: %v", err)
	}
	before++
	w.untilLogged(t, w.east)
	if after := issued(); after != before {
		t.Errorf("%d certificates are in the log, want %d: a refusal left one, or one is missing", after, before)
	}
}

// opaque checks that a stranger learns that they are refused and little else.
func opaque(t *testing.T, err error) {
	t.Helper()
	text := status.Convert(err).Message()
	if len(text) > 200 {
		t.Errorf("a stranger is told %d bytes: %s", len(text), text)
	}
	for _, inner := range []string{"sqlite", "/state", ".go:", "panic"} {
		if strings.Contains(text, inner) {
			t.Errorf("a stranger is told of %s: %s", inner, text)
		}
	}
	if !slices.Contains([]codes.Code{codes.InvalidArgument, codes.ResourceExhausted, codes.PermissionDenied}, status.Code(err)) {
		t.Errorf("refused with %v", err)
	}
}
