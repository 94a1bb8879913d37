package main

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/agent"
	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
)

// fakeAgentAdmin answers as an agent does.
type fakeAgentAdmin struct {
	adminv1.UnimplementedAgentAdminServer
	// asked is called when its status is asked for.
	asked func()
}

func (f fakeAgentAdmin) Status(context.Context, *adminv1.AgentStatusRequest) (*adminv1.AgentStatusResponse, error) {
	f.asked()
	end := timestamppb.New(time.Date(2126, 1, 2, 3, 4, 5, 0, time.UTC))
	return &adminv1.AgentStatusResponse{
		Agent: "node-1", Cluster: "east", TrustDomain: "example.org",
		Server:  &adminv1.AgentServerStatus{AgentDoor: "127.0.0.1:7442", LastContact: end, ControlNotAfter: end},
		Bundle:  &adminv1.AgentBundleStatus{Sequence: 3, Roots: 2, NotAfter: end, Unstored: true, Acknowledged: 2, ReturnedBy: end},
		Witness: &adminv1.AgentWitnessStatus{Size: 17, Contradicted: true},
		Identities: []*adminv1.AgentIdentityStatus{
			{Registration: "web", SpiffeId: "spiffe://example.org/web", Wanted: 2, Serial: "0a", NotAfter: end, RenewAt: end, IssuerKeyId: []byte{0xca, 0xfe, 1, 2, 3}, ReissueAt: end, FailedTries: 4, LastError: "the server\x1b[31m is away"},
		},
		Streams: []*adminv1.AgentStreamStatus{{Number: 9, Peer: "pid 1 uid 2", Protocol: "delta", Names: []*adminv1.AgentNameStatus{
			{Name: "default", Kind: "svid", Sent: "v1", Acked: "v1", Serial: "0a"},
			{Name: "ROOTCA", Kind: "bundle", Sent: "v3", Acked: "v2", Rejected: "v3", Reason: "bad\x1b[2J root"},
		}}},
	}, nil
}

func (fakeAgentAdmin) Why(_ context.Context, req *adminv1.WhyRequest) (*adminv1.WhyResponse, error) {
	r := &adminv1.WhyResponse{Agent: "node-1"}
	reg := &adminv1.WhyRegistration{Name: "web", SpiffeId: "spiffe://example.org/web", Selectors: []string{"unix:uid:1", "unix:gid:2"}}
	r.Registrations = []*adminv1.WhyRegistration{reg}
	switch q := req.Subject.(type) {
	case *adminv1.WhyRequest_Pid:
		r.Selectors, reg.Fits = []string{"unix:uid:1"}, q.Pid == 42
		if !reg.Fits {
			reg.Lacking = []string{"unix:gid:2"}
		}
	case *adminv1.WhyRequest_SpiffeId:
		reg.Callers = []*adminv1.WhyCaller{{Instance: "pid 7", Refused: timestamppb.Now(), Lacking: []string{"unix:gid:2"}}, {Instance: "pid 8", Socket: "front"}}
	default:
		return nil, status.Error(codes.NotFound, "no registration of agent node-1 is called that")
	}
	return r, nil
}

func fakeAgent(t *testing.T) (stateDir string) {
	t.Helper()
	return fakeAgentAsked(t, func() {})
}

func fakeAgentAsked(t *testing.T, asked func()) (stateDir string) {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("unix", agent.AdminSocket(dir))
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	adminv1.RegisterAgentAdminServer(s, fakeAgentAdmin{asked: asked})
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return dir
}

func TestAnAgentThatIsTurnedAwayIsNotSaidToMissItsServer(t *testing.T) {
	since := time.Date(2126, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, connected := range []bool{false, true} {
		s := agentStatusShown{Enrolled: true, Server: &serverShown{AgentDoor: "127.0.0.1:7442", Connected: connected, TurnedAwaySince: &since}, Witness: &witnessShown{}}
		var out strings.Builder
		if err := s.facts(since).print(&out); err != nil {
			t.Fatal(err)
		}
		if text := out.String(); !strings.Contains(text, "REFUSES this agent (127.0.0.1:7442) since 2126-01-02T03:04:05Z") || strings.Contains(text, "AWAY") {
			t.Errorf("connected %v: %s", connected, text)
		}
	}
}

func TestAgentStatusShowsWhoHasWhatAndWhatWasRejected(t *testing.T) {
	dir := fakeAgent(t)
	code, out, talk := signet(t.Context(), "", "agent", "status", "--state-dir", dir, "-o", "wide")
	if code != exitYes {
		t.Fatalf("%d %s", code, talk)
	}
	for _, want := range []string{
		"node-1 of cluster east", "AWAY (127.0.0.1:7442) since 2126", "sequence 3, 2 roots", "NOT STORED YET", "sequence 2 acknowledged: until 2126-01-02T03:04:05Z a workload", "cafe0102 ", "its issuer is to be replaced", "CONTRADICTS", "4 tries have failed: the server", "spiffe://example.org/web",
		"pid 1 uid 2", "delta", "v3: bad", "yes",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("lacks %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "\x1b") {
		t.Error("a peer's escape sequence reaches the terminal")
	}
	code, out, _ = signet(t.Context(), "", "agent", "status", "--state-dir", dir, "-o", "json")
	var v agentStatusShown
	if err := json.Unmarshal([]byte(out), &v); code != exitYes || err != nil || v.Streams[0].Names[1].Rejected != "v3" || v.Identities[0].FailedTries != 4 ||
		v.Identities[0].IssuerKeyID != "cafe010203" || v.Identities[0].ReissueAt == nil || !v.Bundle.Unstored ||
		v.Bundle.Acknowledged != 2 || v.Bundle.ReturnedBy == nil {
		t.Fatalf("%d, %v, %s", code, err, out)
	}
	if code, out, _ = signet(t.Context(), "", "agent", "status", "--state-dir", dir, "-o", "name"); code != exitYes || out != "agent/node-1\n" {
		t.Fatalf("%d %q", code, out)
	}
	code, _, talk = signet(t.Context(), "", "agent", "status", "--state-dir", filepath.Join(dir, "no"))
	if code != exitCouldNotSay || !strings.Contains(talk, "no agent answers") || !strings.Contains(talk, "--state-dir") {
		t.Fatalf("without an agent: %d %q", code, talk)
	}
}

func TestAgentStatusWatchPrintsWhatChangesOnly(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var asked atomic.Int32
	dir := fakeAgentAsked(t, func() {
		if asked.Add(1) == 3 { // two answers are the same by then
			cancel()
		}
	})
	code, out, talk := signet(ctx, "", "agent", "status", "--state-dir", dir, "-w")
	if n := strings.Count(out, "node-1 of cluster east"); code != exitYes || n != 1 {
		t.Fatalf("%d, printed %d times, %s", code, n, talk)
	}
}

func TestRegistrationWhyAnswersByItsExitStatus(t *testing.T) {
	dir := fakeAgent(t)
	for subject, want := range map[string]struct {
		code int
		text []string
	}{
		"42":                       {exitYes, []string{"shows unix:uid:1", "web", "yes", "/proc"}},
		"43":                       {exitNo, []string{"unix:gid:2", "no registration of agent node-1 fits process 43"}},
		"spiffe://example.org/web": {exitNo, []string{"pid 7 was refused", "lacks unix:gid:2", "by the dedicated socket front", "no process that is connected"}},
		"nobody":                   {exitNo, []string{"is called that"}},
	} {
		code, out, talk := signet(t.Context(), "", "registration", "why", "--state-dir", dir, subject)
		for _, text := range want.text {
			if code != want.code || !strings.Contains(out+talk, text) {
				t.Errorf("%s: %d, want %d and %q in:\n%s%s", subject, code, want.code, text, out, talk)
			}
		}
	}
	code, out, _ := signet(t.Context(), "", "registration", "why", "--state-dir", dir, "42", "-o", "json")
	var v whyShown
	if err := json.Unmarshal([]byte(out), &v); code != exitYes || err != nil || v.Basis != "proc" || !v.Registrations[0].Fits {
		t.Fatalf("%d, %v, %s", code, err, out)
	}
}

// systemd must hear READY only from an agent that is a member of its cluster.
func TestAnAgentThatIsNotEnrolledNeverSaysThatItIsReady(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", socket)
	file := filepath.Join(dir, "agent.yaml")
	if err := os.WriteFile(file, []byte("state_dir: ./s\njoin_token_file: ./none\nhttp: "+freeAddress(t)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, talk := signet(t.Context(), "", "agent", "--config", file)
	if code != exitCouldNotSay || strings.Contains(talk, "serving:") || !strings.Contains(talk, "join token") {
		t.Fatalf("%d %s", code, talk)
	}
	_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	buf := make([]byte, 1024)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return
		}
		if strings.Contains(string(buf[:n]), "READY=1") {
			t.Fatal("it says that it is ready")
		}
	}
}
