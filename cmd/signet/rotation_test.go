package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/ceremony"
	"github.com/signet-ca/signet/identity"
)

// doorman is an admin door that answers what a test wants, and remembers what it was asked.
type doorman struct {
	adminv1.UnimplementedRotationServer
	list   *adminv1.ListAuthoritiesResponse
	status *adminv1.RotationStatusResponse
	plan   []*adminv1.RotationStep
	change *adminv1.RotationChangeResponse
	refuse error
	// hangs: it never says how things stand.
	hangs bool
	asked []proto.Message
}

func (d *doorman) answer(m proto.Message) (*adminv1.RotationChangeResponse, error) {
	d.asked = append(d.asked, m)
	if d.refuse != nil {
		return nil, d.refuse
	}
	return d.change, nil
}

func (d *doorman) ListAuthorities(context.Context, *adminv1.ListAuthoritiesRequest) (*adminv1.ListAuthoritiesResponse, error) {
	return d.list, nil
}

func (d *doorman) RotationStatus(ctx context.Context, _ *adminv1.RotationStatusRequest) (*adminv1.RotationStatusResponse, error) {
	if d.hangs {
		<-ctx.Done()
	}
	return d.status, nil
}

func (d *doorman) PlanRotation(_ context.Context, r *adminv1.PlanRotationRequest) (*adminv1.PlanRotationResponse, error) {
	d.asked = append(d.asked, r)
	return &adminv1.PlanRotationResponse{Steps: d.plan}, nil
}

func (d *doorman) StartRotation(_ context.Context, r *adminv1.StartRotationRequest) (*adminv1.RotationChangeResponse, error) {
	return d.answer(r)
}

func (d *doorman) AdvanceRotation(_ context.Context, r *adminv1.AdvanceRotationRequest) (*adminv1.RotationChangeResponse, error) {
	return d.answer(r)
}

func (d *doorman) AbortRotation(_ context.Context, r *adminv1.AbortRotationRequest) (*adminv1.RotationChangeResponse, error) {
	return d.answer(r)
}

func (d *doorman) TaintAuthority(_ context.Context, r *adminv1.TaintAuthorityRequest) (*adminv1.RotationChangeResponse, error) {
	return d.answer(r)
}

func (d *doorman) AddTrust(_ context.Context, r *adminv1.AddTrustRequest) (*adminv1.RotationChangeResponse, error) {
	return d.answer(r)
}

func (d *doorman) RemoveTrust(_ context.Context, r *adminv1.RemoveTrustRequest) (*adminv1.RotationChangeResponse, error) {
	return d.answer(r)
}

func (d *doorman) ReportRotation(context.Context, *adminv1.ReportRotationRequest) (*adminv1.ReportRotationResponse, error) {
	return &adminv1.ReportRotationResponse{Report: []byte("signed\n")}, nil
}

func (d *doorman) BanIdentity(_ context.Context, r *adminv1.BanIdentityRequest) (*adminv1.BanIdentityResponse, error) {
	d.asked = append(d.asked, r)
	return &adminv1.BanIdentityResponse{
		Changed: true, Registrations: []string{"frontend", "frontend-2"}, ValidUntil: timestamppb.New(time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)),
	}, nil
}

func (d *doorman) UnbanIdentity(context.Context, *adminv1.UnbanIdentityRequest) (*adminv1.UnbanIdentityResponse, error) {
	return &adminv1.UnbanIdentityResponse{}, nil
}

func (d *doorman) ListBannedIdentities(context.Context, *adminv1.ListBannedIdentitiesRequest) (*adminv1.ListBannedIdentitiesResponse, error) {
	return &adminv1.ListBannedIdentitiesResponse{Identities: []*adminv1.BannedIdentity{
		{SpiffeId: "spiffe://example.org/x", Since: timestamppb.New(time.Now().Add(-3 * time.Hour)), Reason: "was broken into"},
	}}, nil
}

// door is a doorman at the admin socket of a cluster east.
func door(t *testing.T, d *doorman) (h here, config string) {
	t.Helper()
	h = shortFolder(t)
	config = h.write("east.yaml", "trust_domain: example.org\ncluster: east\nadmin_socket: ./admin.sock\n")
	l, err := net.Listen("unix", filepath.Join(h.dir, "admin.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	adminv1.RegisterRotationServer(s, d)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return h, config
}

// agoHolds is for how long what was so long ago is said to be so: ages are told in whole seconds.
const agoHolds = time.Second * 9 / 10

func ago(d time.Duration) *timestamppb.Timestamp {
	return timestamppb.New(time.Now().Add(-d - (time.Second - agoHolds)))
}

func in(d time.Duration) *timestamppb.Timestamp {
	return timestamppb.New(time.Now().Add(d + 30*time.Second))
}

const (
	oldRoot = "root-0123456789abcdef"
	newRoot = "root-fedcba9876543210"
	day     = 24 * time.Hour
)

// inTheMiddle is a root rotation that waits for agents, with a tainted intermediate.
func inTheMiddle() *adminv1.RotationStatusResponse {
	return &adminv1.RotationStatusResponse{
		Cluster: "east", Automatic: true,
		Authorities: []*adminv1.AuthorityInfo{
			{Id: oldRoot, Kind: "root", State: "active", Since: ago(400 * day), NotAfter: in(3250 * day), Leaving: ago(3 * time.Minute)},
			{Id: newRoot, Kind: "root", State: "published", Since: ago(3 * time.Minute), NotAfter: in(3650 * day)},
			{Id: "intermediate-1", Kind: "intermediate", Root: oldRoot, State: "active", Since: ago(30 * day), NotAfter: in(60 * day), Tainted: ago(5 * time.Minute)},
			{Id: "intermediate-2", Kind: "intermediate", Root: newRoot, State: "prepared", Since: ago(50 * time.Second), NotAfter: in(90 * day), Wanted: true},
		},
		Steps: []*adminv1.RotationStep{
			{Authority: newRoot, Kind: "root", From: "published", To: "active", Because: "agents are given it", Waits: []*adminv1.RotationWait{
				{Code: "quorum", For: "7 of 10 agents of cluster east have it, and 10 are needed; without it are", Missing: []string{"node-3", "node-8", "node-9"}, Forcible: true},
				{Code: "peer", For: "cluster north has never reported", Forcible: true},
			}},
			{Authority: "intermediate-2", Kind: "intermediate", From: "prepared", To: "published", Because: "it was signed", At: in(90 * time.Minute), Waits: []*adminv1.RotationWait{
				{Code: "time", For: "its time has not come", Until: in(3 * time.Hour)},
			}},
		},
		Clusters: []*adminv1.ClusterTrust{
			{Cluster: "east", At: ago(0), Roots: []*adminv1.RootTrust{
				{Id: oldRoot, Trusting: 10, Validators: 10, Leaving: true, Signing: true, Holding: 10},
				{Id: newRoot, Trusting: 7, Validators: 10, Missing: []string{"node-3", "node-8", "node-9"}},
			}},
			{Cluster: "west", At: ago(3 * time.Hour), Roots: []*adminv1.RootTrust{{Id: oldRoot, Trusting: 4, Validators: 4, Signing: true, Holding: 4}}},
			{Cluster: "north"},
		},
		Tainted: []*adminv1.TaintStatus{
			{
				Id: "intermediate-1", Root: oldRoot, Cluster: "east", Since: ago(5 * time.Minute), AcceptedUntil: in(60 * day), Accepting: 19,
				AcceptedBy: []*adminv1.Acceptance{
					{Cluster: "east", Bundle: true, Agents: 10, Reported: ago(0), Named: []*adminv1.AcceptingAgent{{Agent: "node-4", LastHeard: ago(70 * time.Second)}, {Agent: "node-5", LastHeard: ago(day), Unheard: true}, {Agent: "node-1"}}},
					{Cluster: "west", Bundle: true, Agents: 4, Reported: ago(3 * time.Hour)},
					{Cluster: "north", Unknown: true},
					{Cluster: "south", Agents: 1, Reported: ago(3 * day), Unknown: true},
				},
				Advice: "have the request of intermediate-2 signed under another root",
			},
		},
		Reissue: &adminv1.ReissueStatus{Holding: 3, Agents: 10, HoldingAgents: []string{"node-1", "node-2", "node-4"}, Until: in(4 * time.Minute), Tainted: []string{"intermediate-1"}},
	}
}

const statusForPeople = `cluster east: each step is taken as soon as it can be

CAs
  ID                      STATE              SINCE      SIGNS   EXPIRES    ROOT
  root-0123456789abcdef   active, leaving    400d ago   yes     in 3250d   -
  root-fedcba9876543210   published          3m ago     -       in 3650d   -
  intermediate-1          active, TAINTED    30d ago    yes     in 60d     root-0123456789abcdef
  intermediate-2          prepared, wanted   50s ago    -       in 90d     root-fedcba9876543210

NEXT
  root-fedcba9876543210 published → active, waits: agents are given it
    - 7 of 10 agents of cluster east have it, and 10 are needed; without it are: node-3, node-8,
      node-9 (--force overrides this)
    - cluster north has never reported (--force overrides this)
  intermediate-2 prepared → published, in 90m: it was signed
    - its time has not come

CLUSTERS
  CLUSTER   REPORT     ROOT                    TRUSTED BY   USE              MISSING
  east      this one   root-0123456789abcdef   10 of 10     signs, leaving   -
                       root-fedcba9876543210   7 of 10      -                node-3 and 2 more
  west      3h ago     root-0123456789abcdef   4 of 4       signs            -
  north     never      -                       -            -                -

TAINTED
  intermediate-1 of cluster east, under root-0123456789abcdef, tainted 5m ago: FORGED CERTIFICATES
    ARE ACCEPTED; that ends in 60d at the latest
    - cluster east: its trust bundle, which new agents and exports get; 10 agents: node-4 (last
      heard 70s ago), node-5 (not heard since the server's start; its last certificate was made 24h
      ago), node-1 and 7 more. After a server's start agents are back within seconds. One that is
      not heard may accept it until it is banned: signet agent ban, if it is gone for good
    - cluster west: its trust bundle, which new agents and exports get; 4 agents (reported 3h ago)
    - cluster north: unknown, as it has never reported
    - cluster south: 1 agent; that was reported 3d ago, and is not known now
    - to do: have the request of intermediate-2 signed under another root

RE-ISSUE
  3 of 10 agents still use a leaf of intermediate-1 (tainted), over in 4m: node-1, node-2, node-4
`

func TestTheStatusOfARotationSaysWhatIsWaitedFor(t *testing.T) {
	d := &doorman{}
	h, east := door(t, d)
	var out, errs string
	for took := agoHolds; took >= agoHolds; {
		began := time.Now()
		d.status = inTheMiddle()
		out, errs = h.must(exitNo, "rotation", "status", "--config", east)
		took = time.Since(began)
	}
	if out != statusForPeople {
		t.Errorf("status is\n%s\nwant\n%s", out, statusForPeople)
	}
	contains(t, errs, "certificates forged with the key of 1 tainted CA are accepted")
	d.status.Tainted[0].Accepting, d.status.Tainted[0].AcceptedBy = 0, nil
	out, _ = h.must(exitYes, "rotation", "status", "--config", east)
	contains(t, strings.Join(strings.Fields(out), " "), "nobody accepts a forged certificate any more")
	for line := range strings.Lines(out) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > terminalWidth {
			t.Errorf("a line of %d columns: %s", n, line)
		}
	}
}

func TestAReissueSaysWhoseLeavesItReplaces(t *testing.T) {
	for want, r := range map[string]reissueShown{
		"1 of 1 agent still uses a leaf of i-5 (tainted)":                                    {Holding: 1, Agents: 1, Tainted: []string{"i-5"}},
		"2 of 3 agents still use a leaf of i-5 (tainted), i-4 (under a root that has to go)": {Holding: 2, Agents: 3, Tainted: []string{"i-5"}, Exposed: []string{"i-4"}},
		"no agent uses a leaf of i-4 (under a root that has to go) any more":                 {Agents: 1, Exposed: []string{"i-4"}},
	} {
		if got := r.text(); got != want {
			t.Errorf("it says %q, want %q", got, want)
		}
	}
}

func jsonKeys(t *testing.T, text string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	keys := map[string]bool{}
	var walk func(v any, path string)
	walk = func(v any, path string) {
		switch v := v.(type) {
		case []any:
			for _, one := range v {
				walk(one, path+"[]")
			}
		case map[string]any:
			for k, one := range v {
				keys[path+"."+k] = true
				walk(one, path+"."+k)
			}
		}
	}
	walk(v, "")
	return strings.Join(slices.Sorted(maps.Keys(keys)), " ")
}

// Scripts hang on these.
func TestTheKeysOfWhatIsReadAboutCAsStay(t *testing.T) {
	d := &doorman{status: inTheMiddle(), plan: inTheMiddle().Steps}
	d.list = &adminv1.ListAuthoritiesResponse{Authorities: d.status.Authorities, BundleSequence: 4, BundleDigest: []byte{1, 2}}
	h, east := door(t, d)
	for line, want := range map[string]string{
		"ca list":            "[].id [].kind [].leaving [].not_after [].root [].signing [].since [].state [].tainted [].wanted",
		"ca show " + oldRoot: ".id .kind .leaving .not_after .signing .since .state .wanted",
		"trust list":         ".bundle_digest .bundle_sequence .roots .roots[].id .roots[].kind .roots[].leaving .roots[].not_after .roots[].signing .roots[].since .roots[].state .roots[].wanted",
		"identity list":      "[].reason [].since [].spiffe_id",
		"rotation plan root": "[].at [].authority [].because [].from [].kind [].ready [].to [].waits [].waits[].code [].waits[].for [].waits[].forcible [].waits[].missing [].waits[].until",
	} {
		out, _ := h.must(exitYes, append(strings.Fields(line), "--config", east, "-o", "json")...)
		if got := jsonKeys(t, out); got != want {
			t.Errorf("%s: keys are\n%s\nwant\n%s", line, got, want)
		}
		names, _ := h.must(exitYes, append(strings.Fields(line), "--config", east, "-o", "name")...)
		if names == "" || strings.Contains(names, " ") {
			t.Errorf("%s: names are %q", line, names)
		}
		h.must(exitYes, append(strings.Fields(line), "--config", east, "-o", "wide")...)
	}
	out, _ := h.must(exitNo, "rotation", "status", "--config", east, "-o", "json")
	for _, want := range []string{
		".automatic", ".cluster", ".clusters[].reported", ".clusters[].roots[].holding", ".clusters[].roots[].missing", ".clusters[].roots[].trusting",
		".clusters[].roots[].validators", ".next[].waits[].missing", ".reissue.agents", ".reissue.holding", ".reissue.until", ".tainted[].accepted_until",
		".reissue.tainted", ".reissue.exposed", ".tainted[].accepting", ".tainted[].accepted_by[].cluster", ".tainted[].accepted_by[].bundle",
		".tainted[].accepted_by[].agents", ".tainted[].accepted_by[].unknown", ".tainted[].accepted_by[].reported", ".tainted[].accepted_by[].named[].agent",
		".tainted[].accepted_by[].named[].last_heard", ".tainted[].advice", ".authorities[].tainted",
	} {
		if !slices.Contains(strings.Fields(jsonKeys(t, out)), want) {
			t.Errorf("status -o json has no %s", want)
		}
	}
	_, errs := h.must(exitNo, "ca", "show", "nobody", "--config", east)
	contains(t, errs, `no CA "nobody"`)
	out, _ = h.must(exitYes, "__complete", "ca", "taint", "--config", east, "")
	if strings.Contains(out, "intermediate-1") || !strings.Contains(out, "intermediate-2\tprepared\n") {
		t.Errorf("completed:\n%s", out)
	}
}

func TestAWriteSaysWhatItDidAndWhatComesNext(t *testing.T) {
	d := &doorman{change: &adminv1.RotationChangeResponse{
		Changed: true, Taken: []*adminv1.RotationStep{{Authority: newRoot, Kind: "root", From: "published", To: "active"}}, Next: inTheMiddle().Steps[1:],
		Forced: []string{"3 agents would refuse what is signed under it"},
	}}
	h, east := door(t, d)
	out, errs := h.must(exitYes, "rotation", "advance", newRoot, "--force", "--dry-run", "--config", east)
	if out != "would be: "+newRoot+" published → active\n" {
		t.Errorf("stdout is %q", out)
	}
	contains(t, errs, "forced: 3 agents would refuse", "next:\n  intermediate-2 prepared → published", "nothing is changed")
	if r := d.asked[0].(*adminv1.AdvanceRotationRequest); !r.Force || !r.DryRun || r.Authority != newRoot {
		t.Errorf("asked %v", r)
	}
	// What was done, in order; a request with its key; and what became of reports.
	d.change.Done, d.change.Requests = []string{newRoot + " added", oldRoot + " leaves"}, []*adminv1.PendingRequest{
		{Authority: "intermediate-3", KeyFingerprint: "SHA256:33"}, {Authority: "intermediate-2", KeyFingerprint: "SHA256:22"},
	}
	d.change.Taken = append(d.change.Taken, &adminv1.RotationStep{Authority: "intermediate-3", Kind: "intermediate", To: "prepared"}, &adminv1.RotationStep{Kind: "intermediate", To: "prepared"})
	made, older := timestamppb.New(time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)), timestamppb.New(time.Date(2030, 1, 1, 3, 4, 5, 0, time.UTC))
	d.change.Reports = []*adminv1.ReportTaken{{Cluster: "west", At: made}, {Cluster: "north", At: older, Held: made}, {Cluster: "south", At: made, Held: made}}
	done := "report of west taken, made at 2030-01-02T03:04:05Z\n" +
		"report of north ignored: made at 2030-01-01T03:04:05Z, older than the one held, of 2030-01-02T03:04:05Z\n" +
		"report of south is held already, made at 2030-01-02T03:04:05Z\n" +
		newRoot + " added\n" + oldRoot + " leaves\n" + newRoot + " published → active\n" +
		"intermediate-3 requested, key SHA256:33\na new intermediate requested (its key would be made)\n"
	if out, _ = h.must(exitYes, "trust", "remove", newRoot, "--config", east); out != done {
		t.Errorf("stdout is\n%swant\n%s", out, done)
	}
	unchanged := "report of south is held already, made at 2030-01-02T03:04:05Z\nunchanged\n"
	d.change = &adminv1.RotationChangeResponse{Reports: d.change.Reports[2:], Requests: d.change.Requests, Next: d.change.Next}
	if out, _ = h.must(exitYes, "rotation", "advance", "--config", east); out != unchanged {
		t.Errorf("stdout is\n%swant\n%s", out, unchanged)
	}
	d.asked = d.asked[:1]
	report := h.write("west.report", "a note\n")
	h.must(exitYes, "rotation", "advance", "--report", report, "--config", east)
	if r := d.asked[1].(*adminv1.AdvanceRotationRequest); len(r.Reports) != 1 || string(r.Reports[0]) != "a note\n" || r.DryRun {
		t.Errorf("asked %v", r)
	}
	_, errs = h.must(exitNo, "rotation", "advance", "intermediate-2", "--config", east)
	contains(t, errs, "intermediate-2 can't go from prepared to published yet")
	_, errs = h.must(exitCouldNotSay, "rotation", "advance", "--force", "--config", east)
	contains(t, errs, "--force needs the ID")
	d.change = &adminv1.RotationChangeResponse{}
	if out, _ = h.must(exitYes, "rotation", "abort", newRoot, "--config", east); out != "unchanged\n" {
		t.Errorf("stdout is %q", out)
	}
	d.refuse = status.Error(codes.FailedPrecondition, "it signs")
	_, errs = h.must(exitNo, "trust", "remove", newRoot, "--config", east)
	if errs != "signet: it signs\n" {
		t.Errorf("refused with %q", errs)
	}
	if out, _ = h.must(exitYes, "rotation", "report", "--config", east); out != "signed\n" {
		t.Errorf("the report is %q", out)
	}
	_, errs = h.must(exitYes, "identity", "ban", "spiffe://example.org/x", "--reason", "lost", "--config", east)
	contains(t, errs, "spiffe://example.org/x is banned\n", "frontend, frontend-2", "good until 2030-01-02T03:04:05Z")
	_, errs = h.must(exitYes, "identity", "unban", "spiffe://example.org/x", "--config", east)
	contains(t, errs, "was not banned")
}

func TestATaintIsAskedForOrSaidTwice(t *testing.T) {
	d := &doorman{change: &adminv1.RotationChangeResponse{Changed: true}}
	d.list = &adminv1.ListAuthoritiesResponse{Authorities: []*adminv1.AuthorityInfo{
		{Id: oldRoot, Kind: "root", State: "active"},
		{Id: "intermediate-1", Kind: "intermediate", Root: oldRoot, State: "active"},
	}}
	h, east := door(t, d)
	taint := []string{"ca", "taint", "intermediate-1", "--config", east, "--reason", "stolen"}
	_, errs := h.must(exitCouldNotSay, taint...)
	contains(t, errs, "say --yes", "nothing is changed")
	h.must(exitYes, append(taint, "--dry-run")...)
	follows := func(words ...string) {
		t.Helper()
		_, errs := h.must(exitYes, append(taint, "--dry-run")...)
		contains(t, strings.Join(strings.Fields(errs), " "), words...)
	}
	// Also when no step is ready it says what will be, and who has to do what.
	d.change.Taken = []*adminv1.RotationStep{{Kind: "intermediate", To: "prepared"}}
	follows("a request for a new intermediate is made", oldRoot+", or the root that replaces it, has to sign it", "intermediate-1 goes on signing until then",
		"accepted as long as "+oldRoot+" is believed", "it must be replaced (signet root init", "nothing is changed")
	// Who is asked is told the same as by the dry run.
	d.change.Done = []string{"intermediate-1 tainted"}
	dry, _ := h.must(exitYes, append(taint, "--dry-run")...)
	if want := "would be: intermediate-1 tainted\nwould be: a new intermediate requested (its key would be made)\n"; dry != want {
		t.Errorf("the dry run says\n%s", dry)
	}
	_, errs = h.must(exitCouldNotSay, taint...)
	contains(t, errs, dry)
	d.change.Taken, d.change.Requests = nil, []*adminv1.PendingRequest{{Authority: "intermediate-2"}}
	follows("the request of intermediate-2 waits for its signature")
	d.change.Taken, d.change.Requests = []*adminv1.RotationStep{{Authority: "intermediate-2", Kind: "intermediate", From: "published", To: "active"}}, nil
	d.list.Authorities = append(d.list.Authorities, &adminv1.AuthorityInfo{Id: newRoot, Kind: "root", State: "active"})
	d.change.Done = []string{oldRoot + " leaves", "intermediate-1 tainted"}
	follows("intermediate-2 signs in its place", "it begins to leave here, for "+newRoot, "signet trust remove "+oldRoot)
	// What is on its way out already, or gone, does not begin to leave.
	d.change.Taken, d.change.Done = nil, []string{"intermediate-1 tainted"}
	d.list.Authorities[0].Leaving, d.list.Authorities[1].State = ago(3*time.Hour), "retired"
	follows("accepted as long as "+oldRoot+" is believed", "it began to leave here 3h ago; say the same in the other clusters")
	d.list.Authorities[0].State, d.list.Authorities[0].Since = "removed", ago(16*time.Minute)
	follows(oldRoot + " above it was removed here 16m ago, so nothing more is to be done here; signet rotation status says who accepts what is forged under it, if anybody does")
	if _, errs := h.must(exitYes, append(taint, "--dry-run")...); strings.Contains(errs, "begins to leave") || strings.Contains(errs, "replace what was signed") {
		t.Errorf("with the root gone it says\n%s", errs)
	}
	d.list.Authorities[0].State, d.list.Authorities[0].Leaving, d.list.Authorities[1].State = "active", nil, "active"
	for _, m := range d.asked {
		if !m.(*adminv1.TaintAuthorityRequest).DryRun {
			t.Fatal("it was tainted without a word")
		}
	}
	// A lost key doesn't wait for what only follows from the taint: it is asked all the same.
	d.refuse = status.Error(codes.Unavailable, "it would be done, but what follows from it could not be now: Vault is sealed")
	_, errs = h.must(exitCouldNotSay, append(taint, "--dry-run")...)
	contains(t, errs, "Vault is sealed")
	_, errs = h.must(exitCouldNotSay, taint...)
	contains(t, strings.Join(strings.Fields(errs), " "), "Vault is sealed", "say --yes")
	d.refuse = nil
	h.must(exitYes, append(taint, "--yes")...)
	if r := d.asked[len(d.asked)-1].(*adminv1.TaintAuthorityRequest); r.DryRun || r.Reason != "stolen" || r.Authority != "intermediate-1" {
		t.Errorf("asked %v", r)
	}
	h.must(exitCouldNotSay, "ca", "taint", "intermediate-1", "--config", east)
}

func TestARotationOfTheRootNeedsItsFingerprint(t *testing.T) {
	desk := newDesk(t)
	csr, err := os.ReadFile(desk.csr)
	if err != nil {
		t.Fatal(err)
	}
	d := &doorman{change: &adminv1.RotationChangeResponse{Changed: true, Requests: []*adminv1.PendingRequest{
		{Authority: "intermediate-2", Csr: csr, KeyFingerprint: desk.key},
	}}}
	h, east := door(t, d)
	root := filepath.Join(desk.root, "root.pem")
	start := func(args ...string) []string { return append([]string{"rotation", "start", "--config", east}, args...) }
	h.must(exitCouldNotSay, start("root", "--root", root)...)
	h.must(exitCouldNotSay, start("root", "--root", root, "--fingerprint", "SHA256:no")...)
	h.must(exitCouldNotSay, start("root", "--fingerprint", desk.rootFingerprint)...)
	h.must(exitCouldNotSay, start("intermediate", "--root", root)...)
	h.must(exitCouldNotSay, start("leaf")...)
	h.must(exitCouldNotSay, start()...)
	h.must(exitNo, start("root", "--root", desk.csr, "--fingerprint", desk.rootFingerprint)...)
	if len(d.asked) != 0 {
		t.Errorf("the server was asked %v", d.asked)
	}
	out, errs := h.must(exitYes, start("root", "--root", root, "--fingerprint", desk.rootFingerprint)...)
	if out != string(csr) {
		t.Errorf("stdout is not the request alone: %s", out)
	}
	contains(t, errs, "key of intermediate-2:", "where the new root is: signet root sign --cluster east --out east.chain.pem --csr FILE \\\n  --fingerprint "+desk.key)
	out, _ = h.must(exitYes, start("root", "--root", root, "--fingerprint", desk.rootFingerprint, "--csr-out", h.path("x.csr"))...)
	if out != desk.key+"\n" {
		t.Errorf("stdout is not the fingerprint alone: %s", out)
	}
	if text, err := ceremony.ReadRequestFile(h.path("x.csr")); err != nil || len(text) != 1 {
		t.Errorf("the request: %v", err)
	}
	// Of several each begins later than the one before, and the command says by how much.
	one := d.change.Requests
	d.change.Requests = append(slices.Clone(one), one...)
	d.change.Life, d.change.Stagger = durationpb.New(90*day), durationpb.New(60*day)
	_, errs = h.must(exitYes, start("intermediate", "--successors", "2", "--csr-out", h.path("two.csr"))...)
	contains(t, errs, "signet root sign --cluster east --out east.chain.pem --csr "+h.path("two.csr")+" --life 90d --stagger 60d \\\n  --fingerprint "+desk.key)
	d.change.Life, d.change.Stagger = durationpb.New(36*time.Hour), durationpb.New(24*time.Hour+90*time.Second)
	_, errs = h.must(exitYes, start("intermediate", "--successors", "2", "--csr-out", h.path("two.csr"))...)
	contains(t, errs, " --life 36h0m0s --stagger 24h1m30s ")
	d.change.Life, d.change.Stagger, d.change.Requests = nil, nil, one
	// What waits from before is not what would be done.
	d.change.Done, d.change.Requested = []string{"a new intermediate requested (its key would be made)"}, 1
	out, errs = h.must(exitYes, start("intermediate", "--successors", "3", "--dry-run")...)
	if out != "would be: a new intermediate requested (its key would be made)\n" {
		t.Errorf("a dry run says\n%s", out)
	}
	contains(t, errs, "waiting: intermediate-2 was requested before, key "+desk.key)
	_, errs = h.must(exitCouldNotSay, start("root", "--root", root, "--fingerprint", desk.rootFingerprint, "--successors", "3")...)
	contains(t, errs, "--successors is for start intermediate")
	// Where nothing is to be carried, a file for it is refused, and nothing is done.
	d.change, d.asked = &adminv1.RotationChangeResponse{Changed: true, Upstream: true, Requested: 1}, nil
	_, errs = h.must(exitNo, start("intermediate", "--csr-out", h.path("y.csr"))...)
	contains(t, errs, "--csr-out: there is nothing to carry", "signs by itself", "nothing is changed")
	d.change = &adminv1.RotationChangeResponse{Changed: true}
	h.write("manual.yaml", "trust_domain: example.org\ncluster: east\nadmin_socket: ./admin.sock\nrotation: { automatic: false }\n")
	_, errs = h.must(exitNo, "rotation", "start", "--config", h.path("manual.yaml"), "root", "--root", root, "--fingerprint", desk.rootFingerprint, "--csr-out", h.path("y.csr"))
	contains(t, errs, "--csr-out: nothing is requested now, because with rotation.automatic: false", "signet rotation advance", "signet ca show", "nothing is changed")
	_, errs = h.must(exitNo, start("root", "--root", root, "--fingerprint", desk.rootFingerprint, "--csr-out", h.path("y.csr"))...)
	contains(t, errs, "--csr-out: nothing is requested now", "signet rotation status")
	for _, m := range d.asked {
		if !m.(*adminv1.StartRotationRequest).DryRun {
			t.Error("it was started without its file")
		}
	}
	if _, err := os.Stat(h.path("y.csr")); err == nil {
		t.Error("there is a file")
	}
	h.must(exitYes, "trust", "add", "--config", east, root, "--fingerprint", desk.rootFingerprint)
}

func TestTheRootsAreExportedForWhoeverNeedsThem(t *testing.T) {
	desk := newDesk(t)
	text, err := os.ReadFile(filepath.Join(desk.root, "root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	chain, err := ca.ParseChain(text)
	if err != nil {
		t.Fatal(err)
	}
	td, err := identity.ParseTrustDomain("example.org")
	if err != nil {
		t.Fatal(err)
	}
	der := [][]byte{chain[0].Raw}
	d := &doorman{list: &adminv1.ListAuthoritiesResponse{BundleSequence: 7, Authorities: []*adminv1.AuthorityInfo{
		{Id: oldRoot, Kind: "root", State: "active", Since: ago(day), Leaving: ago(day), Chain: der},
		{Id: "root-1", Kind: "root", State: "prepared", Since: ago(day), Chain: der},
		{Id: "root-2", Kind: "root", State: "removed", Since: ago(day), Chain: der},
		{Id: "intermediate-1", Kind: "intermediate", State: "active", Root: oldRoot, Since: ago(day), Chain: der},
	}}}
	h, east := door(t, d)
	export := func(format string) string {
		out, _ := h.must(exitYes, "trust", "export", "--config", east, "--format", format)
		return out
	}
	if out := export("pem"); out != string(text) {
		t.Errorf("pem is\n%s", out)
	}
	b, err := spiffebundle.Parse(td, []byte(export("spiffe")))
	if err != nil || len(b.X509Authorities()) != 1 {
		t.Fatalf("%v", err)
	}
	if n, ok := b.SequenceNumber(); !ok || n != 7 || !b.X509Authorities()[0].Equal(chain[0]) {
		t.Errorf("the bundle has sequence %d", n)
	}
	var set trustSet
	if err := json.Unmarshal([]byte(export("json")), &set); err != nil || len(set.Roots) != 1 || !set.Roots[0].Leaving || set.Roots[0].Certificate != string(text) || set.TrustDomain != "example.org" {
		t.Errorf("%v: %+v", err, set)
	}
	h.must(exitCouldNotSay, "trust", "export", "--config", east, "--format", "xml")
	out, _ := h.must(exitYes, "ca", "show", "--config", east, oldRoot)
	contains(t, out, "ca:", fmt.Sprintf("fingerprint:      %s", ca.CertificateFingerprint(chain[0].Raw)), "-----BEGIN CERTIFICATE-----")
}
