//go:build real

package hostile

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
)

// say puts a text wherever a peer may put one: names at the TLS handshake, paths, headers, messages, node and errors.
func say(t *testing.T, text string) {
	t.Helper()
	for _, d := range targets {
		if d.secured {
			c, err := d.knock(source(0))
			if err != nil {
				t.Fatal(err)
			}
			tc := tls.Client(c, &tls.Config{InsecureSkipVerify: true, ServerName: strings.Map(printable, text) + ".org", NextProtos: []string{text[:min(len(text), 200)], "h2"}}) //nolint:gosec // a bad peer
			_ = tc.SetDeadline(time.Now().Add(2 * time.Second))
			_ = tc.Handshake()
			c.Close()
		}
		d.ask(t, message(3, 0, []byte{0xa, 1, 'x'}), call("/"+text+"/"+text, [2]string{"user-agent", text})...)
		d.ask(t, message(3, 0, []byte{0xa, 1, 'x'}), call(d.method, [2]string{"user-agent", text}, [2]string{"grpc-timeout", text}, [2]string{"x-" + strings.ToLower(strings.Map(printable, text)), text})...)
		d.ask(t, nil, append(call(d.method), [2]string{"grpc-encoding", text})...)
	}
	key, err := doors.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := doors.CSR(key, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	conn, err := site.evil.Dial(site.Agents, site.evil.ControlCA)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = signetv1.NewAgentsClient(conn).Issue(ctx, &signetv1.IssueRequest{Items: []*signetv1.IssueItem{
		{Registration: text, Csr: csr},
		{Registration: "evil", Instance: text[:min(len(text), 200)], Selectors: []string{"unix:uid:1"}, Csr: csr},
		{Registration: "evil", Selectors: []string{text, "unix:path:" + text}, Csr: csr},
		{Registration: "evil", Csr: []byte(text)},
	}})
	if err != nil {
		t.Errorf("the evil agent's call: %v", err)
	}
	enrol, err := doors.Dial(site.Enrol, site.evil.ControlCA, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer enrol.Close()
	token := identity.JoinToken{Secret: []byte(text)}
	for _, req := range []*signetv1.EnrolRequest{
		{Csr: csr, Evidence: &signetv1.EnrolRequest_JoinToken{JoinToken: &signetv1.JoinToken{Secret: token.Secret}}},
		{Csr: csr, Evidence: &signetv1.EnrolRequest_EnrolledKey{EnrolledKey: &signetv1.EnrolledKey{Agent: text}}},
	} {
		if _, err := signetv1.NewEnrolmentClient(enrol).Enrol(ctx, req); err == nil {
			t.Error("enrolled by a text")
		}
	}
	s, sds, err := stream(ctx, func() (net.Conn, error) { return net.Dial("unix", site.agent.Socket) })
	if err != nil {
		t.Fatal(err)
	}
	defer sds.Close()
	for _, nonce := range []string{"", text} {
		if err := s.Send(&discoveryv3.DiscoveryRequest{
			TypeUrl: secretType, ResourceNames: []string{text, "default"}, VersionInfo: text, ResponseNonce: nonce,
			Node: &corev3.Node{Id: text, Cluster: text, UserAgentName: text},
		}); err != nil {
			t.Fatal(err)
		}
	}
	r, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	// A refusal with reasons of its own, and an end by a type that nobody knows.
	if err := s.Send(&discoveryv3.DiscoveryRequest{
		TypeUrl: secretType, ResourceNames: []string{"default"}, ResponseNonce: r.Nonce, ErrorDetail: &rpcstatus.Status{Code: 3, Message: text},
	}); err != nil {
		t.Fatal(err)
	}
	_ = s.Send(&discoveryv3.DiscoveryRequest{TypeUrl: "type.googleapis.com/" + text, ResourceNames: []string{text}})
	for err == nil {
		_, err = s.Recv()
	}
}

func printable(r rune) rune {
	if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
		return r
	}
	return -1
}

func TestMistake54PeersTextStaysOnOneLine(t *testing.T) {
	const canary = "zqcanary"
	for _, text := range []string{
		canary + "\n{\"level\":\"ERROR\",\"msg\":\"forged\"}\r\n", canary + "\x1b[2J\x1b]0;owned\x07", canary + "<script>alert(1)</script>",
		canary + "%s%n%!d(MISSING)", canary + " \u2028\u202e\ufeff", canary + strings.Repeat("a", 1900),
	} {
		say(t, text)
	}
	seen := false
	for _, path := range []string{"east-server.log", "east-node-1.log"} {
		var log []byte
		if err := lab.Until(t.Context(), path+" read between two lines", 20*time.Second, func() (err error) {
			// The process goes on writing there: its last line may be half there.
			if log, err = os.ReadFile(site.Lab.Dir + "/" + path); err == nil && !bytes.HasSuffix(log, []byte("\n")) {
				err = fmt.Errorf("it ends with %.300q", log[bytes.LastIndexByte(log, '\n')+1:])
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(log)) {
			var entry map[string]any
			switch err := json.Unmarshal([]byte(line), &entry); {
			case err != nil && strings.HasPrefix(line, "{"):
				t.Errorf("%s: not one JSON value: %.300q", path, line)
			case entry["msg"] == "forged":
				t.Errorf("%s: a peer wrote a line of its own: %.300q", path, line)
			case strings.ContainsFunc(strings.TrimSuffix(line, "\n"), func(r rune) bool { return r < ' ' || r == 0x7f }):
				t.Errorf("%s: control characters: %.300q", path, line)
			case len(line) > 6<<10:
				t.Errorf("%s: a line of %d bytes: %.300q", path, len(line), line)
			}
			seen = seen || strings.Contains(line, canary)
		}
	}
	if !seen {
		t.Error("no text of the peers is in any log, so nothing was tried")
	}
}

func TestMistake32PeersMakeNoSeries(t *testing.T) {
	const canary = "zqseries"
	say(t, canary) // whatever appears with the first of its kind
	series := func() map[string]bool {
		all := map[string]bool{}
		for _, addr := range []string{site.HTTP, site.agent.HTTP} {
			m, err := metrics(addr)
			if err != nil {
				t.Fatal(err)
			}
			for name := range m {
				all[addr+" "+name] = true
				if strings.Contains(name, canary) {
					t.Errorf("a peer's text is in a series: %s", name)
				}
			}
		}
		return all
	}
	before := series()
	for n := range 30 {
		say(t, fmt.Sprint(canary, n))
	}
	for name := range series() {
		if !before[name] {
			t.Errorf("a new series: %s", name)
		}
	}
}
