package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	tlog "github.com/transparency-dev/formats/log"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/test/bubble"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/trust"
)

func TestEachDoorHasTheseMethodsAndNoMore(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	got := map[string][]string{}
	for _, d := range s.doors {
		if d.grpc == nil {
			continue
		}
		for service, info := range d.grpc.GetServiceInfo() {
			for _, m := range info.Methods {
				got[d.door.name] = append(got[d.door.name], service+"/"+m.Name)
			}
		}
		slices.Sort(got[d.door.name])
	}
	want := map[string][]string{
		"enrol": {"signet.v1.Enrolment/Enrol"},
		"agent": {
			"grpc.health.v1.Health/Check", "grpc.health.v1.Health/List", "grpc.health.v1.Health/Watch",
			"signet.v1.Agents/Issue", "signet.v1.Agents/Renew", "signet.v1.Agents/Sync",
		},
		"admin": {
			"signet.admin.v1.Admin/ApplyRegistrations", "signet.admin.v1.Admin/BanAgent", "signet.admin.v1.Admin/CreateJoinToken",
			"signet.admin.v1.Admin/ListAgents", "signet.admin.v1.Admin/ListJoinTokens", "signet.admin.v1.Admin/ListRegistrations",
			"signet.admin.v1.Admin/RevokeJoinToken", "signet.admin.v1.Admin/UnbanAgent",
			"signet.admin.v1.Rotation/AbortRotation", "signet.admin.v1.Rotation/AddTrust", "signet.admin.v1.Rotation/AdvanceRotation",
			"signet.admin.v1.Rotation/BanIdentity", "signet.admin.v1.Rotation/InstallAuthorities", "signet.admin.v1.Rotation/ListAuthorities",
			"signet.admin.v1.Rotation/ListBannedIdentities", "signet.admin.v1.Rotation/PlanRotation", "signet.admin.v1.Rotation/RemoveTrust",
			"signet.admin.v1.Rotation/ReportRotation", "signet.admin.v1.Rotation/RepublishTrust", "signet.admin.v1.Rotation/RotationStatus",
			"signet.admin.v1.Rotation/StartRotation",
			"signet.admin.v1.Rotation/TaintAuthority", "signet.admin.v1.Rotation/UnbanIdentity",
		},
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("methods are\n%v\nwant\n%v", got, want)
	}
}

func TestOnlyAnAgentOfThisClusterPassesTheAgentDoor(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	west := newCluster(t, "west").start(t, nil)
	member := s.enrol("node-1")
	s.apply(false, registration("frontend", "node-1"))
	mesh, _ := s.issuers.Snapshot().Active(identity.Mesh)
	named := func(id string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			u, _ := url.Parse(id)
			c.URIs = []*url.URL{u}
		}
	}
	lookAlike := func() *doors.Member {
		key, _ := doors.NewKey()
		c := caTemplate(s.control.Subject.CommonName)
		own := sign(t, c, c, key.Public(), key)
		return &doors.Member{Key: key, Chain: [][]byte{sign(t, leafTemplate("spiffe://example.org/signet/cluster/east/agent/node-1"), own, key.Public(), key).Raw, own.Raw}}
	}
	many := s.controlLeaf(nil)
	for range identity.MaxChain {
		many.Chain = append(many.Chain, s.control.Raw)
	}
	for _, who := range []struct {
		what string
		cert *doors.Member
		want codes.Code
	}{
		{"an enrolled agent", member, codes.OK},
		{"nobody", nil, codes.Unavailable},
		{"an agent of another cluster", west.enrol("node-1"), codes.Unavailable},
		{"a self-signed look-alike", lookAlike(), codes.Unavailable},
		{"the mesh's intermediate with an agent's name", s.minted(identity.Mesh, mesh.Certificate(), nil), codes.Unavailable},
		{"the mesh's intermediate with the server's name", s.minted(identity.Mesh, mesh.Certificate(), named("spiffe://example.org/signet/cluster/east/server/east-1")), codes.Unavailable},
		{"our control CA, another cluster's agent", s.controlLeaf(named("spiffe://example.org/signet/cluster/west/agent/node-1")), codes.Unavailable},
		{"our control CA, another trust domain's agent", s.controlLeaf(named("spiffe://other.org/signet/cluster/east/agent/node-1")), codes.Unavailable},
		{"our control CA, a server", s.controlLeaf(named("spiffe://example.org/signet/cluster/east/server/east-1")), codes.Unavailable},
		{"our control CA, an admin", s.controlLeaf(named("spiffe://example.org/signet/cluster/east/admin/node-1")), codes.Unavailable},
		{"our control CA, a workload", s.controlLeaf(named("spiffe://example.org/ns/default/sa/frontend")), codes.Unavailable},
		{"our control CA, two names", s.controlLeaf(func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }), codes.Unavailable},
		{"our control CA, a DNS name beside", s.controlLeaf(func(c *x509.Certificate) { c.DNSNames = []string{"node-1"} }), codes.Unavailable},
		{"our control CA, expired", s.controlLeaf(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), codes.Unavailable},
		{"our control CA, not yet valid", s.controlLeaf(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(30 * time.Minute) }), codes.Unavailable},
		{"our control CA, not for clients", s.controlLeaf(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), codes.Unavailable},
		{"our control CA, a CA", s.controlLeaf(func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), codes.Unavailable},
		{"too many certificates", many, codes.Unavailable},
		{"our control CA, an enrolled agent's name with another key", s.controlLeaf(nil), codes.PermissionDenied},
		{"our control CA, an agent that never enrolled", s.controlLeaf(named("spiffe://example.org/signet/cluster/east/agent/node-9")), codes.PermissionDenied},
	} {
		t.Run(who.what, func(t *testing.T) {
			var cert *tls.Certificate
			if who.cert != nil {
				cert = &tls.Certificate{Certificate: who.cert.Chain, PrivateKey: who.cert.Key}
			}
			conn, err := doors.Dial(s.Doors().Agents, s.control, cert)
			must(t, err)
			defer conn.Close()
			_, err = doors.Issue(t.Context(), conn, "frontend", shown, newCSR(t))
			if got := status.Code(err); got != who.want {
				t.Errorf("Issue: %v, want %v", err, who.want)
			}
			_, err = signetv1.NewAgentsClient(conn).Renew(t.Context(), &signetv1.RenewRequest{Csr: renewal(t, member)})
			if got := status.Code(err); got != who.want {
				t.Errorf("Renew: %v, want %v", err, who.want)
			}
			stream, err := signetv1.NewAgentsClient(conn).Sync(t.Context())
			if err == nil {
				_, err = stream.Recv()
			}
			if got := status.Code(err); got != who.want {
				t.Errorf("Sync: %v, want %v", err, who.want)
			}
		})
	}
}

// renewal is a CSR with the enrolled key.
func renewal(t testing.TB, m *doors.Member) []byte {
	t.Helper()
	csr, err := doors.CSR(m.Key, nil)
	must(t, err)
	return csr
}

func TestACredentialOfOneDoorOpensNoOther(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	member := s.enrol("node-1")
	token := s.token("node-2")
	enrol, err := member.Dial(s.Doors().Enrol, s.control)
	must(t, err)
	defer enrol.Close()
	agent := s.dial(member)
	admin, err := grpc.NewClient("unix:"+s.Doors().Admin, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})))
	must(t, err)
	defer admin.Close()

	if _, err := doors.Issue(t.Context(), enrol, "frontend", shown, newCSR(t)); status.Code(err) != codes.Unimplemented {
		t.Errorf("Issue at the enrol door: %v", err)
	}
	if _, err := signetv1.NewEnrolmentClient(agent).Enrol(t.Context(), enrolBy(t, token.Token, newCSR(t))); status.Code(err) != codes.Unimplemented {
		t.Errorf("Enrol at the agent door: %v", err)
	}
	if _, err := adminv1.NewAdminClient(agent).ListJoinTokens(t.Context(), &adminv1.ListJoinTokensRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("admin method at the agent door: %v", err)
	}
	if _, err := signetv1.NewAgentsClient(admin).Renew(t.Context(), &signetv1.RenewRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("TLS at the admin door: %v", err)
	}
	// A member's certificate is no evidence at the enrol door.
	_, err = signetv1.NewEnrolmentClient(enrol).Enrol(t.Context(), &signetv1.EnrolRequest{Csr: newCSR(t)})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("no evidence: %v", err)
	}
}

func enrolBy(t testing.TB, token string, csr []byte) *signetv1.EnrolRequest {
	t.Helper()
	parsed, err := identity.ParseJoinToken(token)
	must(t, err)
	return &signetv1.EnrolRequest{Csr: csr, Evidence: &signetv1.EnrolRequest_JoinToken{JoinToken: &signetv1.JoinToken{Secret: parsed.Secret}}}
}

func TestOldTLSIsRefused(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	for _, address := range []string{s.Doors().Enrol, s.Doors().Agents} {
		conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}})
		if err == nil {
			conn.Close()
			t.Errorf("TLS 1.2 was accepted at %s", address)
		}
	}
}

func TestNoSessionIsResumed(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	m := s.enrol("node-1")
	cache := tls.NewLRUClientSessionCache(8)
	for range 3 {
		conn, err := tls.Dial("tcp", s.Doors().Agents, &tls.Config{
			InsecureSkipVerify: true, NextProtos: []string{"h2"}, ClientSessionCache: cache, ServerName: "x",
			Certificates: []tls.Certificate{{Certificate: m.Chain, PrivateKey: m.Key}},
		})
		must(t, err)
		// A ticket would come with the first bytes after the handshake: HTTP/2 settings.
		_, err = conn.Read(make([]byte, 1))
		must(t, err)
		if conn.ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
		conn.Close()
	}
}

func TestAJoinTokenLetsExactlyOneIn(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	token := s.token("node-1")
	const racers = 20
	var won atomic.Int32
	var wg sync.WaitGroup
	for range racers {
		wg.Go(func() {
			switch _, err := doors.Enrol(t.Context(), token.Token); {
			case err == nil:
				won.Add(1)
			case status.Code(err) != codes.PermissionDenied:
				t.Errorf("a loser heard %v", err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d of %d got in with one token", won.Load(), racers)
	}
	list, err := s.admin().ListJoinTokens(t.Context(), &adminv1.ListJoinTokensRequest{})
	must(t, err)
	if len(list.Tokens) != 1 || list.Tokens[0].Used == nil || list.Tokens[0].Id != token.Info.Id {
		t.Errorf("the list says %v", list)
	}
}

func TestUnusableTokensLookAlikeOutside(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	used, revoked, expired := s.token("node-1").Token, s.token("node-2"), s.token("node-3").Token
	_, err := doors.Enrol(t.Context(), used)
	must(t, err)
	_, err = s.admin().RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: revoked.Info.Id})
	must(t, err)
	unknown, err := identity.ParseJoinToken(expired)
	must(t, err)
	_, err = rand.Read(unknown.Secret)
	must(t, err)
	c.ahead.Store(int64(2 * time.Minute))
	said := map[string]bool{}
	for what, token := range map[string]string{"used": used, "revoked": revoked.Token, "expired": expired, "unknown": unknown.Encode()} {
		_, err := doors.Enrol(t.Context(), token)
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s token: %v", what, err)
		}
		said[err.Error()] = true
	}
	if len(said) != 1 {
		t.Errorf("refusals can be told apart: %v", said)
	}
	for reason, want := range map[string]string{"token_unusable": "3", "token_replayed": "1"} {
		if n := counted(t, s, `signet_svid_requests_rejected_total{door="enrol",reason="`+reason+`"}`); n != want {
			t.Errorf("counted %s of %s, want %s", n, reason, want)
		}
	}
	_, err = s.admin().RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: revoked.Info.Id})
	must(t, err)
	for id, want := range map[string]codes.Code{usedID(t, used): codes.FailedPrecondition, "0123456789abcdef": codes.NotFound} {
		if _, err = s.admin().RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: id}); status.Code(err) != want {
			t.Errorf("revoke %s: %v, want %v", id, err, want)
		}
	}
}

func usedID(t testing.TB, token string) string {
	t.Helper()
	parsed, err := identity.ParseJoinToken(token)
	must(t, err)
	sum := sha256.Sum256(parsed.Secret)
	return hex.EncodeToString(sum[:8])
}

func TestABadRequestSpendsNoToken(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	token := s.token("node-1").Token
	conn := s.toEnrol()
	for what, csr := range badCSRs(t) {
		_, err := signetv1.NewEnrolmentClient(conn).Enrol(t.Context(), enrolBy(t, token, csr))
		want := codes.InvalidArgument
		if len(csr) > enrolDoor.maxMessage {
			want = codes.ResourceExhausted
		}
		if status.Code(err) != want {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	if _, err := doors.Enrol(t.Context(), token); err != nil {
		t.Errorf("the token is gone: %v", err)
	}
}

// toEnrol is a connection to the enrol door that checks nothing.
func (l *live) toEnrol() *grpc.ClientConn {
	l.t.Helper()
	conn, err := doors.Dial(l.Doors().Enrol, l.control, nil)
	must(l.t, err)
	l.t.Cleanup(func() { conn.Close() })
	return conn
}

func badCSRs(t testing.TB) map[string][]byte {
	t.Helper()
	key, err := doors.NewKey()
	must(t, err)
	made := func(template x509.CertificateRequest) []byte {
		csr, err := doors.CSR(key, &template)
		must(t, err)
		return csr
	}
	spiffe, _ := url.Parse("spiffe://example.org/ns/default/sa/admin")
	damaged := made(x509.CertificateRequest{})
	damaged[len(damaged)-1] ^= 1
	return map[string][]byte{
		"a subject":           made(x509.CertificateRequest{Subject: pkix.Name{CommonName: "admin"}}),
		"a SAN":               made(x509.CertificateRequest{URIs: []*url.URL{spiffe}}),
		"CA:TRUE":             made(x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}}}),
		"another's signature": damaged,
		"garbage":             bytes.Repeat([]byte{0x30, 0x82}, 500),
		"nothing":             nil,
		"9 KiB":               make([]byte, 9<<10),
		"10 MiB":              make([]byte, 10<<20),
	}
}

func TestAWorkloadsBadRequestIsRefusedByItself(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	m := s.enrol("node-1")
	s.apply(false, registration("frontend", "node-1"))
	conn := s.dial(m)
	for what, csr := range badCSRs(t) {
		r, err := signetv1.NewAgentsClient(conn).Issue(t.Context(), &signetv1.IssueRequest{Items: []*signetv1.IssueItem{
			{Registration: "frontend", Selectors: shown, Csr: csr},
			{Registration: "frontend", Selectors: shown, Csr: newCSR(t)},
		}})
		if len(csr) > agentDoor.maxMessage {
			if status.Code(err) != codes.ResourceExhausted {
				t.Errorf("%s: %v", what, err)
			}
			continue
		}
		must(t, err)
		if r.Results[0].GetRefusal().GetReason() != signetv1.Refusal_REASON_INVALID || r.Results[1].GetCertificate() == nil {
			t.Errorf("%s: %v", what, r.Results)
		}
	}
}

func TestEachItemOfABatchIsAuthorisedByItself(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	m := s.enrol("node-1")
	s.apply(false, registration("frontend", "node-1"), registration("backend", "node-2"))
	client := signetv1.NewAgentsClient(s.dial(m))
	csrs := make([][]byte, maxItems)
	for i := range csrs {
		csrs[i] = newCSR(t)
	}
	for forbidden := range maxItems {
		req := &signetv1.IssueRequest{}
		for i, csr := range csrs {
			item := &signetv1.IssueItem{Registration: "frontend", Instance: "pid 1", Selectors: shown, Csr: csr}
			if i == forbidden {
				item.Registration = "backend"
			}
			req.Items = append(req.Items, item)
		}
		r, err := client.Issue(t.Context(), req)
		must(t, err)
		for i, result := range r.Results {
			if i == forbidden {
				if result.GetRefusal().GetReason() != signetv1.Refusal_REASON_DENIED {
					t.Fatalf("forbidden at %d: got %v", forbidden, result)
				}
				continue
			}
			cert := result.GetCertificate()
			if cert == nil {
				t.Fatalf("forbidden at %d, item %d: %v", forbidden, i, result)
			}
			leaf, err := x509.ParseCertificate(cert.Chain[0])
			must(t, err)
			csr, err := x509.ParseCertificateRequest(csrs[i])
			must(t, err)
			if !bytes.Equal(leaf.RawSubjectPublicKeyInfo, csr.RawSubjectPublicKeyInfo) {
				t.Fatalf("item %d has the answer of another", i)
			}
		}
	}
	for _, n := range []int{0, maxItems + 1} {
		req := &signetv1.IssueRequest{Items: make([]*signetv1.IssueItem, n)}
		for i := range req.Items {
			req.Items[i] = &signetv1.IssueItem{}
		}
		if _, err := client.Issue(t.Context(), req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%d items: %v", n, err)
		}
	}
}

func TestWhatIsNotAllowedByNameIsDenied(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	m := s.enrol("node-1")
	s.apply(false, registration("frontend", "node-1"), registration("backend", "node-2"))
	client := signetv1.NewAgentsClient(s.dial(m))
	for what, item := range map[string]*signetv1.IssueItem{
		"not_registered":    {Registration: "backend", Selectors: shown},
		"selectors_differ":  {Registration: "frontend", Selectors: []string{"unix:uid:0"}},
		"evidence_too_long": {Registration: "frontend", Selectors: shown, Instance: strings.Repeat("x", 300)},
	} {
		item.Csr = newCSR(t)
		r, err := client.Issue(t.Context(), &signetv1.IssueRequest{Items: []*signetv1.IssueItem{item}})
		must(t, err)
		if got := r.Results[0].GetRefusal(); got.GetReason() != signetv1.Refusal_REASON_DENIED || got.GetMessage() != what {
			t.Errorf("%s: %v", what, r.Results[0])
		}
	}
	// Renewal is for the enrolled key only.
	if _, err := client.Renew(t.Context(), &signetv1.RenewRequest{Csr: newCSR(t)}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("renewal with another key: %v", err)
	}
	r, err := client.Renew(t.Context(), &signetv1.RenewRequest{Csr: renewal(t, m)})
	must(t, err)
	if len(r.CertificateChain) != 2 || !bytes.Equal(r.CertificateChain[1], s.control.Raw) {
		t.Errorf("a renewal's chain is %d certificates, want the leaf and the control CA", len(r.CertificateChain))
	}
}

func TestABannedAgentFindsEveryDoorClosed(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	token := s.token("node-1").Token
	s.apply(false, registration("frontend", "node-1"))
	must(t, s.stop())
	st, err := store.Open(t.Context(), store.Config{Path: databasePath(c.dir)})
	must(t, err)
	agents, err := st.Agents(t.Context())
	must(t, err)
	agents[0].Banned = true
	must(t, st.PutAgent(t.Context(), agents[0]))
	must(t, st.Close())

	s = c.start(t, nil)
	conn := s.dial(m)
	client := signetv1.NewAgentsClient(conn)
	if _, err := doors.Issue(t.Context(), conn, "frontend", shown, newCSR(t)); status.Code(err) != codes.PermissionDenied {
		t.Errorf("Issue: %v", err)
	}
	if _, err := client.Renew(t.Context(), &signetv1.RenewRequest{Csr: renewal(t, m)}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("Renew: %v", err)
	}
	stream, err := client.Sync(t.Context())
	must(t, err)
	if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("Sync: %v", err)
	}
	if _, err := signetv1.NewEnrolmentClient(s.toEnrol()).Enrol(t.Context(), enrolByKey("node-1", renewal(t, m))); status.Code(err) != codes.PermissionDenied {
		t.Errorf("by its enrolled key: %v", err)
	}
	// The token was made for the old server's address.
	if _, err := signetv1.NewEnrolmentClient(s.toEnrol()).Enrol(t.Context(), enrolBy(t, token, newCSR(t))); status.Code(err) != codes.PermissionDenied {
		t.Errorf("by a token: %v", err)
	}
	if _, err := s.admin().CreateJoinToken(t.Context(), &adminv1.CreateJoinTokenRequest{Agent: "node-1"}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("another token: %v", err)
	}
}

func enrolByKey(agent string, csr []byte) *signetv1.EnrolRequest {
	return &signetv1.EnrolRequest{Csr: csr, Evidence: &signetv1.EnrolRequest_EnrolledKey{EnrolledKey: &signetv1.EnrolledKey{Agent: agent}}}
}

func TestAnAgentComesBackWithItsEnrolledKeyForThirtyDays(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	client := signetv1.NewEnrolmentClient(s.toEnrol())
	life := s.config.ControlTTL
	for _, try := range []struct {
		what  string
		ahead time.Duration
		req   *signetv1.EnrolRequest
		want  codes.Code
	}{
		{"with another key", 0, enrolByKey("node-1", newCSR(t)), codes.PermissionDenied},
		{"under another name", 0, enrolByKey("node-2", renewal(t, m)), codes.PermissionDenied},
		{"under no name", 0, enrolByKey("../node-1", renewal(t, m)), codes.InvalidArgument},
		// The clock only goes forward, or it is not believed.
		{"some weeks after the end", life + renewalGrace - time.Hour, enrolByKey("node-1", renewal(t, m)), codes.OK},
		{"a month after it was heard of, which begins anew each time", 2*life + renewalGrace - time.Hour, enrolByKey("node-1", renewal(t, m)), codes.OK},
		{"a month and a bit after the end", 3*life + 2*renewalGrace + time.Hour, enrolByKey("node-1", renewal(t, m)), codes.PermissionDenied},
	} {
		c.ahead.Store(int64(try.ahead))
		r, err := client.Enrol(t.Context(), try.req)
		if status.Code(err) != try.want {
			t.Errorf("%s: %v, want %v", try.what, err, try.want)
		}
		if err == nil && (r.Agent != "node-1" || r.AgentDoor != s.Doors().Agents || r.LogVerifierKey != s.audit.VerifierKey()) {
			t.Errorf("%s: answered %v", try.what, r)
		}
	}
}

func TestARestartKeepsEverything(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	token := s.token("node-2").Token
	s.apply(false, registration("frontend", "node-1"))
	vkey := s.audit.VerifierKey()
	must(t, s.stop())

	s = c.start(t, nil)
	if s.audit.VerifierKey() != vkey {
		t.Error("the log has another key")
	}
	_, err := doors.Issue(t.Context(), s.dial(m), "frontend", shown, newCSR(t))
	must(t, err)
	_, err = signetv1.NewEnrolmentClient(s.toEnrol()).Enrol(t.Context(), enrolBy(t, token, newCSR(t)))
	must(t, err)
}

func TestWithoutALogNothingIsIssuedAndReadyzIsRed(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	token := s.token("node-2").Token
	s.apply(false, registration("frontend", "node-1"))
	conn := s.dial(m)
	s.shows(http.StatusOK, "[+]log ok")
	away := LogDir(c.dir) + ".away"
	must(t, os.Rename(LogDir(c.dir), away))
	r, err := signetv1.NewAgentsClient(conn).Issue(t.Context(), &signetv1.IssueRequest{Items: []*signetv1.IssueItem{{Registration: "frontend", Selectors: shown, Csr: newCSR(t)}}})
	must(t, err)
	if got := r.Results[0].GetRefusal(); got.GetReason() != signetv1.Refusal_REASON_UNAVAILABLE || got.GetMessage() != "log_unavailable" {
		t.Errorf("Issue: %v", r.Results[0])
	}
	if _, err := doors.Enrol(t.Context(), token); status.Code(err) != codes.Unavailable {
		t.Errorf("Enrol: %v", err)
	}
	if _, err := s.admin().ApplyRegistrations(t.Context(), &adminv1.ApplyRegistrationsRequest{Registrations: []*signetv1.Registration{registration("x", "node-1")}}); status.Code(err) != codes.Unavailable {
		t.Errorf("ApplyRegistrations: %v", err)
	}
	for _, dry := range []bool{true, false} {
		if _, err := s.admin().CreateJoinToken(t.Context(), &adminv1.CreateJoinTokenRequest{Agent: "node-3", DryRun: dry}); status.Code(err) != codes.Unavailable {
			t.Errorf("CreateJoinToken (dry run %v): %v", dry, err)
		}
	}
	if code, text := get(t, s, "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(text, "[-]log failed") {
		t.Errorf("readyz: %d\n%s", code, text)
	}
	if code, _ := get(t, s, "/livez"); code != http.StatusOK {
		t.Errorf("livez: %d", code)
	}
	must(t, os.Rename(away, LogDir(c.dir)))
	// What was refused had no effect, and what was asked for too early can be asked for again: the token is unspent.
	if _, err := doors.Enrol(t.Context(), token); err != nil {
		t.Errorf("Enrol, when the log is back: %v", err)
	}
	if list, _ := s.directory.registrations(); len(list) != 1 {
		t.Errorf("registrations are %v", list)
	}
}

func get(t testing.TB, s *live, path string) (int, string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get("http://" + s.Doors().HTTP + path)
	must(t, err)
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	must(t, err)
	return r.StatusCode, string(text)
}

// shows waits until readiness answers with a code and these words: that the disk is busy for a moment is an answer too.
func (l *live) shows(code int, words ...string) (text string) {
	l.t.Helper()
	var last int
	defer func() {
		if l.t.Failed() {
			l.t.Logf("readyz: %d\n%s", last, text)
		}
	}()
	soon(l.t, fmt.Sprintf("readyz: %d with %q", code, words), func() bool {
		last, text = get(l.t, l, "/readyz?verbose")
		return last == code && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(text, w) })
	})
	return text
}

func counted(t testing.TB, s *live, series string) string {
	t.Helper()
	_, text := get(t, s, "/metrics")
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, series+" "); ok {
			return strings.TrimSpace(rest)
		}
	}
	t.Errorf("no series %s", series)
	return ""
}

func TestHTTPAnswersProbesAndNothingElse(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	want := "[+]store ok\n[+]log ok\n[+]witnesses ok\n[+]clock ok\n[+]rotation ok\n[+]issuer-mesh ok\n[+]issuer-control ok\n[+]certificate ok\n[+]doors ok\n"
	if text := s.shows(http.StatusOK, want); !strings.HasPrefix(text, want) || !strings.HasSuffix(text, "\nreadyz check passed\n") {
		t.Errorf("readyz:\n%s", text)
	}
	for _, path := range []string{"/", "/debug/pprof/", "/debug/vars", "/metrics/x"} {
		if code, _ := get(t, s, path); code != http.StatusNotFound {
			t.Errorf("%s: %d", path, code)
		}
	}
	for _, path := range []string{"/readyz", "/livez", "/metrics"} {
		r, err := http.Post("http://"+s.Doors().HTTP+path, "text/plain", nil)
		must(t, err)
		r.Body.Close()
		if r.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("POST %s: %d", path, r.StatusCode)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	for _, series := range []string{
		`signet_svid_requests_rejected_total{door="agent",reason="log_unavailable"}`, `signet_bundle_generation{trust_domain="example.org"}`,
		"signet_bundle_subscribers", "signet_bundle_subscribers_acked", "signet_store_up", "signet_log_size_entries", "signet_log_witness_ahead_total",
		`signet_log_witness_contradictions_total{agents="several",claim="fork"}`, "signet_log_changes_waiting", "signet_svid_requests_abandoned_total",
		`signet_svids_issued_total{door="agent",issuer="intermediate-1"}`,
	} {
		counted(t, s, series)
	}
}

func TestRegistrationsAreAppliedOnceAndLogged(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	a, b := registration("a", "node-1"), registration("b", "node-1", "node-2")
	actions := func(r *adminv1.ApplyRegistrationsResponse) string {
		var all []string
		for _, ch := range r.Changes {
			all = append(all, changeName(ch)+":"+strings.ToLower(strings.TrimPrefix(ch.Action.String(), "ACTION_")))
		}
		return strings.Join(all, " ")
	}
	check := func(got *adminv1.ApplyRegistrationsResponse, want string) {
		t.Helper()
		if actions(got) != want {
			t.Errorf("changes are %q, want %q", actions(got), want)
		}
	}
	dry, err := s.admin().ApplyRegistrations(t.Context(), &adminv1.ApplyRegistrationsRequest{Registrations: []*signetv1.Registration{a}, DryRun: true})
	must(t, err)
	check(dry, "a:created")
	check(s.apply(false, b, a), "a:created b:created")
	check(s.apply(false, a, b), "a:unchanged b:unchanged")
	b.TtlSeconds = 30
	check(s.apply(false, b), "b:changed")
	check(s.apply(true, b), "a:deleted b:unchanged")
	check(s.apply(true), "b:deleted")

	for what, bad := range map[string]*signetv1.Registration{
		"another trust domain": {Name: "x", SpiffeId: "spiffe://other.org/x", Agents: []string{"n"}, Selectors: shown},
		"a reserved path":      {Name: "x", SpiffeId: "spiffe://example.org/signet/x", Agents: []string{"n"}, Selectors: shown},
		"no agents":            {Name: "x", SpiffeId: "spiffe://example.org/x", Selectors: shown},
		"no selectors":         {Name: "x", SpiffeId: "spiffe://example.org/x", Agents: []string{"n"}},
		"too long a life":      {Name: "x", SpiffeId: "spiffe://example.org/x", Agents: []string{"n"}, Selectors: shown, TtlSeconds: 25 * 3600},
		"an endless life":      {Name: "x", SpiffeId: "spiffe://example.org/x", Agents: []string{"n"}, Selectors: shown, TtlSeconds: 1 << 62},
	} {
		// Everything or nothing.
		_, err := s.admin().ApplyRegistrations(t.Context(), &adminv1.ApplyRegistrationsRequest{Registrations: []*signetv1.Registration{a, bad}})
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err = s.admin().ApplyRegistrations(t.Context(), &adminv1.ApplyRegistrationsRequest{Registrations: []*signetv1.Registration{a, a}})
	wantError(t, err, "twice")
	if list, err := s.admin().ListRegistrations(t.Context(), &adminv1.ListRegistrationsRequest{}); err != nil || len(list.Registrations) != 0 {
		t.Errorf("the list is %v, %v", list, err)
	}
	must(t, s.stop())
	var changes []string
	for _, e := range logged(t, c) {
		if r := e.GetRegistrationChanged(); r != nil {
			if want := fmt.Sprintf("uid:%d", os.Geteuid()); r.Evidence.Caller != want || r.Evidence.Door != "admin" {
				t.Errorf("on the word of %v, want %s", r.Evidence, want)
			}
			changes = append(changes, fmt.Sprintf("%d:%t>%t", r.Revision, r.Before != "", r.After != ""))
		}
	}
	if want := "[1:false>true 1:false>true 2:true>true 3:true>false 4:true>false]"; fmt.Sprint(changes) != want {
		t.Errorf("the log has %v, want %s", changes, want)
	}
}

// logged reads the whole log of a cluster that is stopped.
func logged(t testing.TB, c *cluster) []*auditv1.Entry {
	t.Helper()
	r, err := audit.OpenReader(LogDir(c.dir), "")
	must(t, err)
	cp, err := r.Checkpoint(t.Context())
	must(t, err)
	var all []*auditv1.Entry
	for i := range cp.Size {
		_, e, err := r.Entry(t.Context(), i)
		must(t, err)
		all = append(all, e)
	}
	return all
}

func TestTheLogTellsTheWholeLifeOfAnAgent(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	revoked := s.token("node-2")
	_, err := s.admin().RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: revoked.Info.Id})
	must(t, err)
	s.apply(false, registration("frontend", "node-1"))
	_, err = doors.Issue(t.Context(), s.dial(m), "frontend", shown, newCSR(t))
	must(t, err)
	must(t, s.stop())
	var events []string
	for _, e := range logged(t, c) {
		event := strings.TrimPrefix(fmt.Sprintf("%T", e.Event), "*auditv1.Entry_")
		if issued := e.GetCertificateIssued(); issued != nil {
			event += ":" + issued.Evidence.Door
		}
		if moved := e.GetAuthorityChanged(); moved != nil {
			event = moved.Kind + ":" + moved.To
		}
		events = append(events, event)
	}
	want := "AuthorityCreated AuthorityInstalled intermediate:prepared root:prepared root:published root:active intermediate:published intermediate:active " +
		"CertificateIssued:self JoinTokenCreated JoinTokenUsed AgentEnrolled " +
		"CertificateIssued:enrol JoinTokenCreated JoinTokenRevoked RegistrationChanged CertificateIssued:agent"
	if got := strings.Join(events, " "); got != want {
		t.Errorf("the log has\n%s\nwant\n%s", got, want)
	}
}

// next reads a Sync stream until something of a kind comes.
func next[T any](t testing.TB, stream grpc.BidiStreamingClient[signetv1.SyncRequest, signetv1.SyncResponse], pick func(*signetv1.SyncResponse) *T) *T {
	t.Helper()
	for {
		r, err := stream.Recv()
		must(t, err)
		if v := pick(r); v != nil {
			return v
		}
	}
}

func TestSyncTellsAnAgentItsOwnAtOnceAndAtEveryChange(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, func(s *Server) { s.checkpointEvery = time.Millisecond })
	m := s.enrol("node-1")
	s.apply(false, registration("a", "node-1", "node-2"), registration("b", "node-2"))
	stream, err := signetv1.NewAgentsClient(s.dial(m)).Sync(t.Context())
	must(t, err)
	bundle := func(r *signetv1.SyncResponse) *signetv1.Bundle { return r.GetBundle() }
	set := func(r *signetv1.SyncResponse) *signetv1.RegistrationSet { return r.GetRegistrations() }
	checkpoint := func(r *signetv1.SyncResponse) *signetv1.Checkpoint { return r.GetCheckpoint() }

	b := next(t, stream, bundle)
	if b.Sequence != 1 || len(b.Roots) != 1 || !bytes.Equal(b.Roots[0], c.root.cert.Raw) {
		t.Errorf("the bundle is %v", b)
	}
	own := next(t, stream, set)
	if len(own.Registrations) != 1 || own.Registrations[0].Name != "a" || len(own.Registrations[0].Agents) != 0 {
		t.Errorf("it is told %v, want its own alone and without other agents' names", own)
	}

	// A change for others says nothing to this agent; the next change of its own does.
	s.apply(false, registration("c", "node-2"))
	s.apply(false, registration("d", "node-1"))
	if own = next(t, stream, set); len(own.Registrations) != 2 || own.Revision != 3 {
		t.Errorf("it is told %v", own)
	}
	s.apply(true)
	if own = next(t, stream, set); len(own.Registrations) != 0 {
		t.Errorf("it is told %v", own)
	}

	// Checkpoints come once the agent has said what it has seen, each with the proof that it continues that.
	verifier, err := note.NewVerifier(m.Reply.LogVerifierKey)
	must(t, err)
	read := func(n []byte) *tlog.Checkpoint {
		cp, _, _, err := tlog.ParseCheckpoint(n, s.config.Origin(), verifier)
		must(t, err)
		return cp
	}
	must(t, stream.Send(&signetv1.SyncRequest{}))
	first := next(t, stream, checkpoint)
	seen := read(first.Note)
	if first.FromSize != 0 || len(first.ConsistencyProof) != 0 || seen.Size == 0 {
		t.Errorf("the first checkpoint is %v", first)
	}
	s.apply(false, registration("e", "node-1"))
	must(t, stream.Send(&signetv1.SyncRequest{CheckpointSeen: &signetv1.CheckpointSeen{Size: seen.Size, RootHash: seen.Hash}}))
	second := next(t, stream, checkpoint)
	newer := read(second.Note)
	if second.FromSize != seen.Size || newer.Size <= seen.Size {
		t.Errorf("the second checkpoint is from %d to %d, the first was %d", second.FromSize, newer.Size, seen.Size)
	}
	must(t, proof.VerifyConsistency(rfc6962.DefaultHasher, seen.Size, newer.Size, second.ConsistencyProof, seen.Hash, newer.Hash))

	// One that has seen more than there is gets the checkpoint all the same, so that it sees the rollback too.
	must(t, stream.Send(&signetv1.SyncRequest{CheckpointSeen: &signetv1.CheckpointSeen{Size: newer.Size + 100, RootHash: newer.Hash}}))
	s.apply(false, registration("f", "node-1"))
	third := next(t, stream, checkpoint)
	if third.FromSize != 0 || len(third.ConsistencyProof) != 0 {
		t.Errorf("the checkpoint after a rollback is %v", third)
	}
	soon(t, "the rollback is counted", func() bool { return counted(t, s, "signet_log_witness_ahead_total") != "0" })
}

func TestSyncTellsANewBundleAndCountsWhoHasIt(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	stream, err := signetv1.NewAgentsClient(s.dial(s.enrol("node-1"))).Sync(t.Context())
	must(t, err)
	bundle := func(r *signetv1.SyncResponse) *signetv1.Bundle { return r.GetBundle() }
	next(t, stream, bundle)
	old, _ := s.bundles.Get(td)
	b, err := trust.NewBundle(td, 2, append(old.Roots(), newRoot(t).cert))
	must(t, err)
	must(t, s.bundles.Set(b))
	if got := next(t, stream, bundle); got.Sequence != 2 || len(got.Roots) != 2 {
		t.Errorf("told %v", got)
	}
	if open, acked := s.sessions.count(b); open != 1 || acked != 0 {
		t.Errorf("%d open, %d acknowledged", open, acked)
	}
	digest := b.Digest()
	must(t, stream.Send(&signetv1.SyncRequest{BundleAcks: []*signetv1.BundleAck{{TrustDomain: td.Name(), Digest: digest[:]}}}))
	// The server answers the first request with a checkpoint: by then it has heard the acknowledgement.
	next(t, stream, func(r *signetv1.SyncResponse) *signetv1.Checkpoint { return r.GetCheckpoint() })
	if open, acked := s.sessions.count(b); open != 1 || acked != 1 {
		t.Errorf("%d open, %d acknowledged", open, acked)
	}
	must(t, stream.Send(&signetv1.SyncRequest{BundleAcks: []*signetv1.BundleAck{{TrustDomain: td.Name(), Digest: []byte("short")}}}))
	for err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("a malformed acknowledgement: %v", err)
	}
}

func TestOneAgentHoldsSoManyStreamsAndNoMore(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	client := signetv1.NewAgentsClient(s.dial(s.enrol("node-1")))
	for i := range maxSyncs + 1 {
		stream, err := client.Sync(t.Context())
		must(t, err)
		_, err = stream.Recv()
		if want := codes.OK; i == maxSyncs {
			want = codes.ResourceExhausted
			if status.Code(err) != want {
				t.Errorf("stream %d: %v, want %v", i+1, err, want)
			}
		} else {
			must(t, err)
		}
	}
}

func TestAStopEndsStreamsWithUnavailable(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	stream, err := signetv1.NewAgentsClient(s.dial(s.enrol("node-1"))).Sync(t.Context())
	must(t, err)
	_, err = stream.Recv()
	must(t, err)
	must(t, s.stop())
	for err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ended with %v", err)
	}
	if _, err := os.Lstat(s.Doors().Admin); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the admin socket is still there: %v", err)
	}
}

func TestASocketInUseIsLeftAloneAndAStaleOneReplaced(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	path := c.config().AdminSocket
	other, err := net.Listen("unix", path)
	must(t, err)
	_, err = New(t.Context(), c.config())
	wantError(t, err, "in use by another process")
	other.(*net.UnixListener).SetUnlinkOnClose(false) // as after a kill -9
	other.Close()
	s := c.start(t, nil)
	info, err := os.Lstat(path)
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v", info.Mode())
	}
	s.token("node-1")
	must(t, s.stop())

	must(t, os.WriteFile(path, []byte("precious"), 0o600))
	_, err = New(t.Context(), c.config())
	wantError(t, err, "something else than a socket")
	if kept, _ := os.ReadFile(path); string(kept) != "precious" {
		t.Error("the file is gone")
	}
	conf := c.config()
	conf.AdminSocket = filepath.Join(c.dir, strings.Repeat("x", 120))
	_, err = New(t.Context(), conf)
	wantError(t, err, "too long")
}

// askAdmin is the child process of the next test.
func askAdmin(path string) {
	conn, err := net.Dial("unix", path)
	if err == nil {
		_, err = conn.Read(make([]byte, 1))
	}
	fmt.Print(err)
	os.Exit(0)
}

// Not beside others: a child that is forked holds the locks of their folders for a moment.
func TestTheAdminDoorIsForThisUserAndRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can become somebody else")
	}
	s := newCluster(t, "east").start(t, nil)
	path := s.Doors().Admin
	// Even where every mode on the way would let them in.
	for dir := filepath.Dir(path); dir != filepath.Clean(os.TempDir()) && dir != "/"; dir = filepath.Dir(dir) {
		must(t, os.Chmod(dir, 0o755))
	}
	must(t, os.Chmod(path, 0o666))
	self, err := os.ReadFile(os.Args[0])
	must(t, err)
	binary := filepath.Join(filepath.Dir(filepath.Dir(path)), "test.binary")
	must(t, os.WriteFile(binary, self, 0o755))
	child := exec.Command(binary)
	child.Dir = "/"
	child.Env = []string{"SIGNET_TEST_ADMIN=" + path}
	child.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := child.CombinedOutput()
	must(t, err)
	if string(out) != "EOF" && !strings.Contains(string(out), "reset") {
		t.Errorf("another user heard %q, want a closed connection", out)
	}
	s.token("node-1")
}

func TestTheServersOwnCertificateIsRenewedInTime(t *testing.T) {
	t.Parallel()
	bubble.Test(t, func(t *testing.T) {
		const life = 7 * 24 * time.Hour
		ctx, cancel := context.WithCancel(t.Context())
		var issued, failures atomic.Int32
		var outage atomic.Bool
		o := &ownCertificate{now: time.Now, failed: func(error) { failures.Add(1) }}
		o.issue = func(context.Context, identity.PublicKey) (*ca.Leaf, error) {
			if outage.Load() {
				return nil, errors.New("no log")
			}
			n := issued.Add(1)
			now := time.Now()
			return &ca.Leaf{Serial: []byte{byte(n), byte(n >> 8)}, NotBefore: now, NotAfter: now.Add(life), Chain: [][]byte{{}}}, nil
		}
		must(t, o.renew(ctx))
		done := make(chan struct{})
		go func() { defer close(done); o.keep(ctx) }()
		const days = 90
		for day := range days {
			// Two days without a log in each month.
			outage.Store(day%30 < 2)
			time.Sleep(24 * time.Hour)
			if err := o.usable(); err != nil {
				t.Fatalf("day %d: %v", day, err)
			}
		}
		if low, high := int32(days/5), int32(days/2); issued.Load() < low || issued.Load() > high || failures.Load() == 0 {
			t.Errorf("%d certificates and %d failures in %d days of 7-day certificates, want %d to %d, and some", issued.Load(), failures.Load(), days, low, high)
		}
		outage.Store(true)
		time.Sleep(life + time.Hour)
		if o.usable() == nil {
			t.Error("it is called usable after its end")
		}
		outage.Store(false)
		time.Sleep(time.Minute)
		must(t, o.usable())
		cancel()
		<-done
	})
}

// handshaken is TransportCredentials whose handshake has happened.
type handshaken struct {
	credentials.TransportCredentials
	leaf *x509.Certificate
}

func (h handshaken) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{h.leaf}}}, nil
}

func TestAConnectionEndsWithTheCertificateThatOpenedIt(t *testing.T) {
	t.Parallel()
	bubble.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		key, err := plainGenerate("")
		must(t, err)
		template := leafTemplate("spiffe://example.org/signet/cluster/east/agent/node-1")
		m := mortalTLS{handshaken{leaf: sign(t, template, template, key.Public(), key)}, time.Now, &agentConns{}}
		_, _, err = m.ServerHandshake(here)
		must(t, err)
		ended := make(chan time.Time, 1)
		start := time.Now()
		go func() {
			_, _ = there.Read(make([]byte, 1))
			ended <- time.Now()
		}()
		if life := (<-ended).Sub(start); life != time.Hour {
			t.Errorf("the connection lived %s", life)
		}
	})
}

func TestADoorKeepsToItsNumberOfConnections(t *testing.T) {
	t.Parallel()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	l := limit(inner, door{connections: 3, perPeer: 2})
	accepted := make(chan net.Conn)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", inner.Addr().String())
		must(t, err)
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	first := <-accepted
	dial()
	second := <-accepted
	third := dial()
	if _, err := third.Read(make([]byte, 1)); err == nil {
		t.Error("the third connection was not closed")
	}
	first.Close()
	first.Close() // counted once
	dial()
	(<-accepted).Close()
	second.Close()
	for range 2 { // all places were given back
		dial()
		defer (<-accepted).Close()
	}
	l.Close()
	<-done
}

func TestAPanicIsOneCallsTroubleOnly(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	var err error
	func() {
		defer s.edge(t.Context(), agentDoor, &err)
		panic("secret of somebody")
	}()
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "secret") {
		t.Errorf("the caller hears %v", err)
	}
}

func TestTheAdminDoorSaysWhyInFull(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	_, err := s.admin().CreateJoinToken(t.Context(), &adminv1.CreateJoinTokenRequest{Agent: "Node 1"})
	wantError(t, err, "use 1 to 63 of")
	for _, ttl := range []time.Duration{25 * time.Hour, time.Millisecond, -time.Hour} {
		_, err = s.admin().CreateJoinToken(t.Context(), &adminv1.CreateJoinTokenRequest{Agent: "node-1", Ttl: durationpb.New(ttl)})
		wantError(t, err, "between 1s and 24h")
	}
}

func TestASetThatDoesNotFitIntoOneMessageIsRefused(t *testing.T) {
	t.Parallel()
	var want []identity.Registration
	for i := range 1000 {
		r := identity.Registration{Name: fmt.Sprintf("r%d", i), ID: td.ID(), Agents: []string{"node-1"}}
		for j := range 8 {
			r.Selectors = append(r.Selectors, identity.Selector(fmt.Sprintf("x:%d:%s", j, strings.Repeat("y", 400))))
		}
		want = append(want, r)
	}
	p := planRegistrations(nil, want, false)
	wantError(t, p.fits(), "in one message")
	p = planRegistrations(nil, want[:800], false)
	must(t, p.fits())
	v := (&view{}).withRegistrations(want[:800], 1)
	if n := proto.Size(v.sets["node-1"]); n > maxSet {
		t.Errorf("what fits takes %d bytes, more than %d", n, maxSet)
	}
}

func TestAThousandRegistrationsAreOneChange(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	var list []*signetv1.Registration
	for i := range logPart + 1 {
		list = append(list, registration(fmt.Sprintf("r%d", i), "node-1"))
	}
	s.apply(true, list...)
	if have, revision := s.directory.registrations(); len(have) != len(list) || revision != 1 {
		t.Errorf("%d registrations at revision %d", len(have), revision)
	}
	large := registration("large", "node-1")
	for i := range identity.MaxSelectors {
		large.Selectors = append(large.Selectors[:i], fmt.Sprintf("cgroup:/%d/%s", i, strings.Repeat("y", 1000)))
	}
	for i := range identity.MaxAgents {
		large.Agents = append(large.Agents[:i], fmt.Sprintf("node-%d.%s", i, strings.Repeat("z", 50)))
	}
	_, err := s.admin().ApplyRegistrations(t.Context(), &adminv1.ApplyRegistrationsRequest{Registrations: []*signetv1.Registration{large}})
	wantError(t, err, "name fewer agents or selectors")
}

func TestEnrolmentsWaitForEachOther(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	for range enrolments {
		s.enrolling <- struct{}{}
	}
	waiting := s.token("node-1").Token
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := doors.Enrol(ctx, waiting); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("with no place left: %v", err)
	}
	<-s.enrolling
	if _, err := doors.Enrol(t.Context(), s.token("node-2").Token); err != nil {
		t.Errorf("with a place: %v", err)
	}
}
