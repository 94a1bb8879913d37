package agent

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/identity"
)

func (n *node) admin(t *testing.T) adminv1.AgentAdminClient {
	t.Helper()
	return adminv1.NewAgentAdminClient(connect(t, AdminSocket(n.config.StateDir)))
}

func TestTheAdminSocketIsForOneUserAndRoot(t *testing.T) {
	w := newWorld(t)
	w.open()
	n := w.start(t)
	n.ready(t)
	info, err := os.Lstat(AdminSocket(n.config.StateDir))
	if err != nil || info.Mode().Perm() != 0o600 || info.Mode()&fs.ModeSocket == 0 {
		t.Fatalf("%v, %v", info, err)
	}
	for uid, want := range map[uint32]bool{0: true, uint32(os.Geteuid()): true, uint32(os.Geteuid()) + 1: false, 65534: os.Geteuid() == 65534} {
		if mayAdminister(uid) != want {
			t.Errorf("uid %d: %v", uid, !want)
		}
	}
	if _, err := n.admin(t).Status(t.Context(), &adminv1.AgentStatusRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(AdminSocket(n.config.StateDir)); err == nil {
		t.Fatal("it is still there after the stop")
	}
}

func TestWhoIsNotAllowedIsClosedBeforeAByteIsRead(t *testing.T) {
	path := t.TempDir() + "/admin.sock"
	l, err := listenAdmin(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.allowed = func(uint32) bool { return false }
	go func() { _, _ = l.Accept() }()
	_, err = adminv1.NewAgentAdminClient(connect(t, path)).Status(t.Context(), &adminv1.AgentStatusRequest{})
	if status.Code(err) != codes.Unavailable {
		t.Fatalf("got %v", err)
	}
}

func TestStatusShowsWhatIsHeldAndWhatWasRejected(t *testing.T) {
	w := newWorld(t)
	w.open()
	web := reg("web", "/web", time.Hour, uid)
	web.Priority = 1
	w.setRegistrations(web, reg("stuck", "/stuck", time.Hour, uid))
	w.mu.Lock()
	w.refuse = refuseNamed("stuck")
	w.mu.Unlock()
	n := w.start(t)
	n.ready(t)
	first := leafOf(t, n.config.Socket)
	s := subscribe(t, connect(t, n.config.Socket), "default", "ROOTCA", "spiffe://example.org/stuck", "spiffe://example.org/web")
	got := map[string]bool{}
	for !got["ROOTCA"] || !got["default"] {
		r, err := s.stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var rejected bool
		for _, res := range r.Resources {
			rejected = rejected || strings.Contains(string(res.Value), "ROOTCA")
			got["ROOTCA"] = got["ROOTCA"] || strings.Contains(string(res.Value), "ROOTCA")
			got["default"] = got["default"] || strings.Contains(string(res.Value), "default")
		}
		answer := &discoveryv3.DiscoveryRequest{ResourceNames: s.names, ResponseNonce: r.Nonce, VersionInfo: r.VersionInfo}
		if rejected {
			answer.ErrorDetail = &statuspb.Status{Message: "no such\x1b[31m thing"}
		}
		if err := s.stream.Send(answer); err != nil {
			t.Fatal(err)
		}
	}
	admin := n.admin(t)
	var r *adminv1.AgentStatusResponse
	eventually(t, "the answers have been taken in", func() bool {
		var err error
		if r, err = admin.Status(t.Context(), &adminv1.AgentStatusRequest{}); err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(r.Identities, func(i *adminv1.AgentIdentityStatus) bool { return i.FailedTries > 0 }) {
			return false
		}
		for _, st := range r.Streams {
			for _, name := range st.Names {
				if name.Name == "ROOTCA" && name.Rejected != "" {
					return strings.Contains(name.Reason, "no such") && !strings.Contains(name.Reason, "\x1b") && st.Peer != ""
				}
			}
		}
		return false
	})
	if r.Agent != "node-1" || !r.Server.Connected || r.Bundle.Sequence != 1 || r.Bundle.Roots != 1 || r.Server.ControlNotAfter == nil || r.Witness == nil {
		t.Fatalf("got %v", r)
	}
	names := map[string]*adminv1.AgentIdentityStatus{}
	for _, i := range r.Identities {
		names[i.Registration] = i
	}
	if i := names["web"]; i == nil || i.Serial != serialText(first) || i.Wanted == 0 || !i.NotAfter.AsTime().Equal(first.NotAfter) || i.RenewAt == nil {
		t.Fatalf("web: %v", i)
	}
	if i := names["stuck"]; i == nil || i.Serial != "" || i.FailedTries == 0 || !strings.Contains(i.LastError, "denied") {
		t.Fatalf("stuck: %v", i)
	}
	if text := protojson.Format(r); strings.Contains(text, "PRIVATE") || strings.Contains(text, "BEGIN") {
		t.Fatal("there is more in it than there should be")
	}
	w.close()
	eventually(t, "the server is away, and since when is told", func() bool {
		r, err := admin.Status(t.Context(), &adminv1.AgentStatusRequest{})
		return err == nil && !r.Server.Connected && r.Server.LastContact != nil
	})
}

func TestStatusIsThereBeforeEnrolment(t *testing.T) {
	w := newWorld(t)
	w.open()
	hold := make(chan struct{})
	token := w.tokenSource("node-1")
	n := w.start(t, func(c *Config) {
		c.JoinToken = func(ctx context.Context) (identity.JoinToken, error) { <-hold; return token(ctx) }
	})
	admin := n.admin(t)
	r, err := admin.Status(t.Context(), &adminv1.AgentStatusRequest{})
	if err != nil || r.Agent != "" || r.Server != nil {
		t.Fatalf("%v, %v", r, err)
	}
	if _, err := admin.Why(t.Context(), &adminv1.WhyRequest{Subject: &adminv1.WhyRequest_Pid{Pid: 1}}); status.Code(err) != codes.Unavailable {
		t.Fatalf("why: %v", err)
	}
	select {
	case <-n.Enrolled():
		t.Fatal("it is said to be enrolled")
	default:
	}
	close(hold)
	<-n.Enrolled()
}

func TestWhyNamesTheRuleOrTheNearestMiss(t *testing.T) {
	w := newWorld(t)
	w.open()
	me := identity.Selector(fmt.Sprintf("unix:uid:%d", os.Geteuid()))
	low, high := reg("low", "/low", time.Hour, me), reg("high", "/high", time.Hour, me)
	high.Priority = 5
	near := reg("near", "/near", time.Hour, me, "unix:path:/no/such/program")
	far := reg("far", "/far", time.Hour, "unix:uid:4242", "unix:gid:4242", "socket:front")
	w.setRegistrations(far, near, low, high)
	n := w.start(t, func(c *Config) { c.Attestor = nil })
	n.ready(t)
	admin := n.admin(t)
	ask := func(q *adminv1.WhyRequest) *adminv1.WhyResponse {
		t.Helper()
		r, err := admin.Why(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := ask(&adminv1.WhyRequest{Subject: &adminv1.WhyRequest_Pid{Pid: uint32(os.Getpid())}})
	var order []string
	for _, m := range r.Registrations {
		order = append(order, fmt.Sprintf("%s %v %d", m.Name, m.Fits, len(m.Lacking)))
	}
	if want := []string{"high true 0", "low true 0", "near false 1", "far false 3"}; !slices.Equal(order, want) || !slices.Contains(r.Selectors, string(me)) {
		t.Fatalf("got %v of %v, want %v", order, r.Selectors, want)
	}
	if m := r.Registrations[2]; m.Lacking[0] != "unix:path:/no/such/program" {
		t.Fatalf("near lacks %v", m.Lacking)
	}
	// An identity nobody has: whoever is connected came near.
	leafOf(t, n.config.Socket)
	r = ask(&adminv1.WhyRequest{Subject: &adminv1.WhyRequest_SpiffeId{SpiffeId: near.ID.String()}})
	if len(r.Registrations) != 1 || r.Registrations[0].Fits || len(r.Registrations[0].Callers) == 0 || !slices.Equal(r.Registrations[0].Callers[0].Lacking, []string{"unix:path:/no/such/program"}) {
		t.Fatalf("near: %v", r)
	}
	r = ask(&adminv1.WhyRequest{Subject: &adminv1.WhyRequest_Registration{Registration: "low"}})
	if !r.Registrations[0].Fits || r.Registrations[0].Callers[0].Refused != nil {
		t.Fatalf("low: %v", r)
	}
	for name, q := range map[string]*adminv1.WhyRequest{
		"no such ID":      {Subject: &adminv1.WhyRequest_SpiffeId{SpiffeId: "spiffe://example.org/nobody"}},
		"no such name":    {Subject: &adminv1.WhyRequest_Registration{Registration: "nobody"}},
		"no such process": {Subject: &adminv1.WhyRequest_Pid{Pid: 1 << 30}},
	} {
		if _, err := admin.Why(t.Context(), q); status.Code(err) != codes.NotFound {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := admin.Why(t.Context(), &adminv1.WhyRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("nothing: %v", err)
	}
}

func TestWhyRemembersWhoWasRefused(t *testing.T) {
	w := newWorld(t)
	d := newDoorless(t, w, reg("web", "/web", time.Hour, uid, "unix:gid:7"), reg("front", "/front", time.Hour, uid, "socket:front"))
	for i := range maxRefusals + 10 {
		who := workload("unix:gid:8")
		who.Instance = fmt.Sprintf("pid %d", i)
		if i == maxRefusals {
			who = workload(uid)
			who.Instance = "the near one"
		}
		for range 2 {
			if _, err := d.open(who, ""); err == nil {
				t.Fatal("let in")
			}
		}
	}
	if len(d.refusals) != maxRefusals {
		t.Fatalf("%d refusals are remembered, want %d", len(d.refusals), maxRefusals)
	}
	if _, err := d.open(workload(uid), "back"); err == nil {
		t.Fatal("let in")
	}
	r, err := adminService{a: &Agent{hub: d.hub}}.Why(t.Context(), &adminv1.WhyRequest{Subject: &adminv1.WhyRequest_Registration{Registration: "web"}})
	if err != nil {
		t.Fatal(err)
	}
	callers := r.Registrations[0].Callers
	if len(callers) != maxMisses || r.Registrations[0].Fits {
		t.Fatalf("%d callers", len(callers))
	}
	if i := slices.IndexFunc(callers, func(c *adminv1.WhyCaller) bool { return c.Instance == "the near one" }); i < 0 || i > 1 || callers[i].Refused == nil || !slices.Equal(callers[i].Lacking, []string{"unix:gid:7"}) {
		t.Fatalf("nearest are %v", callers[:2])
	}
}

func TestACallerHearsOfTheBansOfItsOwnIdentitiesAlone(t *testing.T) {
	w := newWorld(t)
	w.open()
	me := identity.Selector(fmt.Sprintf("unix:uid:%d", os.Geteuid()))
	web, late, other := reg("web", "/web", time.Hour, me), reg("late", "/late", time.Hour, me), reg("other", "/other", time.Hour, me)
	foreign := reg("foreign", "/foreign", time.Hour, me, "unix:gid:4294967294")
	apart := reg("apart", "/apart", time.Hour, me, "socket:apart")
	w.shut = []string{"web", "foreign", "apart"}
	w.setRegistrations(web, late, other, foreign, apart)
	n := w.start(t, func(c *Config) { c.Attestor = nil })
	n.ready(t)
	n.hub.shutOut(late.ID) // known from a refusal, before the agent is told anew
	agent := secretv3.NewSecretDiscoveryServiceClient(connect(t, n.config.Socket))
	for r, want := range map[*identity.Registration]codes.Code{
		&web: codes.PermissionDenied, &late: codes.PermissionDenied, &foreign: codes.NotFound, &apart: codes.NotFound, &other: codes.OK,
	} {
		_, err := agent.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{r.ID.String()}})
		if says := strings.Contains(status.Convert(err).Message(), r.ID.String()+" is banned"); status.Code(err) != want || says != (want == codes.PermissionDenied) {
			t.Errorf("%s: %v, want %s", r.Name, err, want)
		}
	}
}

func TestWhyNamesABan(t *testing.T) {
	w := newWorld(t)
	w.open()
	me := identity.Selector(fmt.Sprintf("unix:uid:%d", os.Geteuid()))
	web, other := reg("web", "/web", time.Hour, me), reg("other", "/other", time.Hour, me)
	w.shut = []string{"web"}
	w.setRegistrations(web, other)
	n := w.start(t, func(c *Config) { c.Attestor = nil })
	n.ready(t)
	admin := n.admin(t)
	for what, q := range map[string]*adminv1.WhyRequest{
		"by ID":   {Subject: &adminv1.WhyRequest_SpiffeId{SpiffeId: web.ID.String()}},
		"by name": {Subject: &adminv1.WhyRequest_Registration{Registration: "web"}},
	} {
		if _, err := admin.Why(t.Context(), q); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "registration web of agent node-1 gives nothing: "+web.ID.String()+" is banned") {
			t.Errorf("%s: %v", what, err)
		}
	}
	r, err := admin.Why(t.Context(), &adminv1.WhyRequest{Subject: &adminv1.WhyRequest_Pid{Pid: uint32(os.Getpid())}})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Registrations) != 1 || r.Registrations[0].Name != "other" || !slices.ContainsFunc(r.Notes, func(s string) bool { return strings.Contains(s, "registration web fits, and gives nothing: ") }) {
		t.Errorf("by process: %v", r)
	}
	// Before the agent was told anew, it knows from the refusal.
	n.hub.shutOut(other.ID)
	if _, err := admin.Why(t.Context(), &adminv1.WhyRequest{Subject: &adminv1.WhyRequest_Registration{Registration: "other"}}); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), " is banned") {
		t.Errorf("after a refusal: %v", err)
	}
}
