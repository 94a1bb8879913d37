package server

import (
	"context"
	"crypto/x509"
	"errors"
	"math"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/test/doors"
)

func TestAQuotaIsABucketOfItsOwnForEachAgent(t *testing.T) {
	t.Parallel()
	q := quotas{limits: Limits{CertificatesPerSecond: 200, Burst: 5000}}
	now := time.Unix(1_800_000_000, 0)
	for _, step := range []struct {
		agent string
		n     int
		after time.Duration
		wait  time.Duration
	}{
		{"a", 50, 0, 0},
		{"a", 4950, 0, 0},
		{"a", 50, 0, 250 * time.Millisecond},
		// What is refused costs nothing, or a greedy agent would never get anything.
		{"a", 50, 0, 250 * time.Millisecond},
		{"b", 5000, 0, 0},
		{"a", 50, 249 * time.Millisecond, time.Millisecond},
		{"a", 50, 250 * time.Millisecond, 0},
		{"a", 1, 250 * time.Millisecond, 5 * time.Millisecond},
		// An hour later there is a burst again, and no more; and a clock that is set back gives and takes nothing.
		{"a", 5000, time.Hour, 0},
		{"a", 1, time.Hour, 5 * time.Millisecond},
		{"a", 1, 0, 5 * time.Millisecond},
	} {
		if got := q.take(step.agent, step.n, now.Add(step.after)); got.Round(time.Microsecond) != step.wait {
			t.Errorf("%s asks for %d at %s: wait %s, want %s", step.agent, step.n, step.after, got, step.wait)
		}
	}
}

func TestLimitsThatLetNobodyInAreRefused(t *testing.T) {
	t.Parallel()
	for _, l := range []Limits{{CertificatesPerSecond: 1, Burst: maxItems - 1}, {Burst: 5000}, {CertificatesPerSecond: -1, Burst: 5000}, {CertificatesPerSecond: math.NaN(), Burst: 5000}} {
		if l.check() == nil {
			t.Errorf("%+v is accepted", l)
		}
	}
	if err := DefaultLimits.check(); err != nil {
		t.Error(err)
	}
}

func TestWhoAsksForTooMuchHearsWhenToComeAgain(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, func(s *Server) { s.quotas.limits = Limits{CertificatesPerSecond: 0.01, Burst: 50} })
	greedy, other := s.enrol("node-1"), s.enrol("node-2")
	s.apply(false, registration("frontend", "node-1", "node-2"))
	conn := s.dial(greedy)
	items := func(n int) *signetv1.IssueRequest {
		r := &signetv1.IssueRequest{}
		for range n {
			r.Items = append(r.Items, &signetv1.IssueItem{Registration: "frontend", Selectors: shown, Csr: newCSR(t)})
		}
		return r
	}
	_, err := signetv1.NewAgentsClient(conn).Issue(t.Context(), items(50))
	must(t, err)
	hinted := func(err error, low, high time.Duration) {
		t.Helper()
		st := status.Convert(err)
		if st.Code() != codes.ResourceExhausted || len(st.Details()) != 1 {
			t.Fatalf("%v %v", err, st.Details())
		}
		if d := st.Details()[0].(*errdetails.RetryInfo).RetryDelay.AsDuration(); d < low || d > high {
			t.Errorf("come again in %s, want %s to %s", d, low, high)
		}
	}
	_, err = signetv1.NewAgentsClient(conn).Issue(t.Context(), items(2))
	hinted(err, 140*time.Second, 200*time.Second)
	_, err = signetv1.NewAgentsClient(conn).Renew(t.Context(), &signetv1.RenewRequest{Csr: renewal(t, greedy)})
	hinted(err, 40*time.Second, 100*time.Second)
	_, err = doors.Issue(t.Context(), s.dial(other), "frontend", shown, newCSR(t))
	must(t, err)
	if n := counted(t, s, `signet_svid_requests_rejected_total{door="agent",reason="over_quota"}`); n != "2" {
		t.Errorf("%s counted", n)
	}
}

// asAgent is the context of a call of an agent.
func asAgent(ctx context.Context, l *live, agent string) context.Context {
	l.t.Helper()
	leaf, err := x509.ParseCertificate(l.enrol(agent).Chain[0])
	must(l.t, err)
	return peer.NewContext(ctx, &peer.Peer{AuthInfo: agentInfo{name: agent, spki: leaf.RawSubjectPublicKeyInfo, notAfter: leaf.NotAfter}})
}

func TestWhatIsMadeForNobodyIsCounted(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.apply(false, registration("frontend", "node-1"))
	ctx, cancel := context.WithCancel(asAgent(t.Context(), s, "node-1"))
	cancel()
	_, _ = agentsService{Server: s.Server}.Issue(ctx, &signetv1.IssueRequest{Items: []*signetv1.IssueItem{{Registration: "frontend", Selectors: shown, Csr: newCSR(t)}}})
	if n := counted(t, s, "signet_svid_requests_abandoned_total"); n != "1" {
		t.Errorf("%s counted", n)
	}
}

// panickyStream fails in the worst way when it is read.
type panickyStream struct {
	grpc.BidiStreamingServer[signetv1.SyncRequest, signetv1.SyncResponse]
	ctx context.Context
}

func (p panickyStream) Context() context.Context           { return p.ctx }
func (panickyStream) Send(*signetv1.SyncResponse) error    { return nil }
func (panickyStream) Recv() (*signetv1.SyncRequest, error) { panic("a mistake") }

func TestAPanicOfWhoeverListensEndsItsStreamOnly(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	err := agentsService{Server: s.Server}.Sync(panickyStream{ctx: asAgent(t.Context(), s, "node-1")})
	var r *refusal
	if !errors.As(err, &r) || r.code != codes.Internal {
		t.Errorf("the stream ended with %v", err)
	}
}

func TestASelectorThatOnlyANewerAgentKnowsIsHarmless(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	s.apply(false, registration("frontend", "node-1"))
	conn := s.dial(m)
	newer := []string{"unix:seccomp:strict", "systemd:slice:web.slice", "moon:phase:full"}
	_, err := doors.Issue(t.Context(), conn, "frontend", append(newer, shown...), newCSR(t))
	must(t, err)
	if _, err := doors.Issue(t.Context(), conn, "frontend", newer, newCSR(t)); err == nil || !strings.Contains(err.Error(), "selectors_differ") {
		t.Errorf("by what nobody here knows: %v", err)
	}
	must(t, s.stop())
	var seen []string
	for _, e := range logged(t, c) {
		if i := e.GetCertificateIssued(); i.GetEvidence().GetRegistration() == "frontend" {
			seen = i.Evidence.Selectors
		}
	}
	if !strings.Contains(strings.Join(seen, " "), "unix:seccomp:strict") {
		t.Errorf("the log has the selectors %q", seen)
	}
}

func TestAnAgentsWordAgainstTheLogIsComparedAndAloneStopsNobody(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.apply(false, registration("frontend", "node-1"))
	for s.checkpointSize() < 4 {
		time.Sleep(10 * time.Millisecond)
	}
	note, err := s.audit.Checkpoint(t.Context())
	must(t, err)
	old, err := parseCheckpoint(note)
	must(t, err)
	s.apply(false, registration("backend", "node-1"))
	for s.checkpointSize() <= old.size {
		time.Sleep(10 * time.Millisecond)
	}
	wrong := append([]byte{old.root[0] ^ 1}, old.root[1:]...)
	say := func(agent string, size uint64, root []byte) {
		s.heed(t.Context(), agent, &signetv1.CheckpointSeen{Size: size, RootHash: root})
	}
	check := func(claim, agents, want string) {
		t.Helper()
		if n := counted(t, s, `signet_log_witness_contradictions_total{agents="`+agents+`",claim="`+claim+`"}`); n != want {
			t.Errorf("%s by %s: %s, want %s", claim, agents, n, want)
		}
	}
	ready := func(text string) {
		t.Helper()
		s.shows(http.StatusOK, text)
	}
	for range 2 { // from the tiles, then from memory
		say("node-1", old.size, old.root)
	}
	say("node-1", 0, nil)
	check("fork", "one", "0")
	say("node-1", old.size, wrong)
	say("node-2", old.size, old.root)
	check("fork", "one", "1")
	say("node-1", 1<<40, old.root)
	check("ahead", "one", "1")
	ready("[+]witnesses ok")
	say("node-2", old.size, nil)
	check("fork", "several", "1")
	ready("2 agents have seen another log than this one (node-1, node-2)")
	// It was the agent: it has been put right.
	say("node-1", old.size, old.root)
	ready("[+]witnesses ok")
	// Nobody makes the server prove without end.
	now := s.now()
	looked := 0
	for range 100 {
		if s.witness.due("node-3", now) {
			looked++
		}
	}
	if looked != reportBurst {
		t.Errorf("%d of 100 reports of one agent were looked at, want %d", looked, reportBurst)
	}
}

func (l *live) checkpointSize() uint64 {
	note, err := l.audit.Checkpoint(l.t.Context())
	must(l.t, err)
	size, err := checkpointSize(note)
	must(l.t, err)
	return size
}
