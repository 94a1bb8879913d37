package identity

import (
	"crypto/elliptic"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

type fakeDirectory struct {
	registrations map[string]Registration
	agents        map[string]AgentRow
	banned        map[spiffeid.ID]bool
}

func (d fakeDirectory) BannedIdentity(id spiffeid.ID) bool { return d.banned[id] }

func (d fakeDirectory) Registration(name string) (Registration, bool) {
	r, ok := d.registrations[name]
	return r, ok
}

func (d fakeDirectory) Agent(name string) (AgentRow, bool) {
	r, ok := d.agents[name]
	return r, ok
}

func newKey(t testing.TB) PublicKey {
	t.Helper()
	k, err := OwnKey(ecKey(t, elliptic.P256()))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func policy(change ...func(*Policy)) Policy {
	p := Policy{TrustDomain: td, Cluster: "east", DefaultTTL: time.Hour, MaxTTL: 24 * time.Hour, ControlTTL: 168 * time.Hour}
	for _, f := range change {
		f(&p)
	}
	return p
}

// world is a cluster with two agents, a banned one, and a registration for each.
func world(t testing.TB) (a *Authorizer, enrolled map[string]PublicKey) {
	t.Helper()
	enrolled = map[string]PublicKey{}
	d := fakeDirectory{map[string]Registration{}, map[string]AgentRow{}, nil}
	for _, agent := range []string{"node-1", "node-2", "banned", "node.1"} {
		enrolled[agent] = newKey(t)
		d.agents[agent] = AgentRow{Name: agent, SPKI: enrolled[agent].SPKI(), Banned: agent == "banned"}
		d.registrations["of-"+agent] = Registration{
			Name: "of-" + agent, ID: spiffeid.RequireFromPath(td, "/ns/x/sa/"+agent), Agents: []string{agent},
			Selectors: []Selector{"unix:uid:1000"}, Revision: 7,
		}
	}
	for name, id := range map[string]string{
		"edited-reserved": "spiffe://example.org/signet/cluster/east/server/x",
		"edited-foreign":  "spiffe://example.com/ns/x/sa/web", "edited-bare": "spiffe://example.org",
	} {
		d.registrations[name] = Registration{Name: name, ID: spiffeid.RequireFromString(id), Agents: []string{"node-1"}, Selectors: []Selector{"unix:uid:1000"}}
	}
	d.registrations["edited-open"] = Registration{Name: "edited-open", ID: spiffeid.RequireFromPath(td, "/x"), Agents: []string{"node-1"}}
	a, err := NewAuthorizer(policy(), d)
	if err != nil {
		t.Fatal(err)
	}
	return a, enrolled
}

// Every caller asks for everything. What is not in the list of what is allowed must be denied, by name.
func TestOnlyWhatIsAllowedByNameIsGranted(t *testing.T) {
	a, enrolled := world(t)
	key := newKey(t)
	callers := map[string]Caller{
		"nobody":              {},
		"node-1":              AsAgent("node-1"),
		"node-2":              AsAgent("node-2"),
		"node.1":              AsAgent("node.1"),
		"nodex1":              AsAgent("nodex1"),
		"banned":              AsAgent("banned"),
		"stranger":            AsAgent("stranger"),
		"nameless agent":      AsAgent(""),
		"new":                 AsNewAgent(AttestedNode{agent: "node-9", tokenID: "1"}),
		"node-1 again":        AsNewAgent(AttestedNode{agent: "node-1", tokenID: "2"}),
		"banned again":        AsNewAgent(AttestedNode{agent: "banned", tokenID: "3"}),
		"unattested":          AsNewAgent(AttestedNode{}),
		"node-1 returning":    AsReturningAgent("node-1"),
		"banned returning":    AsReturningAgent("banned"),
		"stranger returning":  AsReturningAgent("stranger"),
		"server":              AsServer("east-1"),
		"server by bad name":  AsServer("../east"),
		"caller of no kind":   {kind: 99, name: "node-1"},
		"nobody with a name":  {name: "node-1"},
		"server as an agent":  AsAgent("east-1"),
		"agent as the server": {kind: callerNobody, name: "east-1"},
	}
	show := []Selector{"unix:gid:1", "unix:uid:1000"}
	workload := func(registration string, change ...func(*WorkloadAsk)) Ask {
		ask := WorkloadAsk{Registration: registration, Key: key, Instance: "pid 1 uid 1000", Selectors: show}
		for _, f := range change {
			f(&ask)
		}
		return ask
	}
	asks := map[string]Ask{
		"nothing":         nil,
		"of node-1":       workload("of-node-1"),
		"of node-2":       workload("of-node-2"),
		"of node.1":       workload("of-node.1"),
		"of banned":       workload("of-banned"),
		"of nobody":       workload("none"),
		"no registration": workload(""),
		"pattern":         workload("of-node-*"),
		"edited-reserved": workload("edited-reserved"),
		"edited-foreign":  workload("edited-foreign"),
		"edited-bare":     workload("edited-bare"),
		"edited-open":     workload("edited-open"),
		"no key":          workload("of-node-1", func(w *WorkloadAsk) { w.Key = PublicKey{} }),
		"no selectors":    workload("of-node-1", func(w *WorkloadAsk) { w.Selectors = nil }),
		"other selectors": workload("of-node-1", func(w *WorkloadAsk) { w.Selectors = []Selector{"unix:uid:1001"} }),
		"many selectors":  workload("of-node-1", func(w *WorkloadAsk) { w.Selectors = append(make([]Selector, MaxSelectors*4), "unix:uid:1000") }),
		"long selector": workload("of-node-1", func(w *WorkloadAsk) {
			w.Selectors = []Selector{"unix:uid:1000", Selector(strings.Repeat("a", MaxSelectorLength+1))}
		}),
		"selector of 2 lines": workload("of-node-1", func(w *WorkloadAsk) { w.Selectors = []Selector{"unix:uid:1000", "a:b\nc"} }),
		"long instance":       workload("of-node-1", func(w *WorkloadAsk) { w.Instance = strings.Repeat("a", maxInstance+1) }),
		"instance of 2 lines": workload("of-node-1", func(w *WorkloadAsk) { w.Instance = "a\nb" }),
		"pointer":             &WorkloadAsk{Registration: "of-node-1", Key: key, Selectors: show},
		"nil pointer":         (*ControlAsk)(nil),
		"control, new key":    ControlAsk{Key: key},
		"control, key 1":      ControlAsk{Key: enrolled["node-1"]},
		"control, key 2":      ControlAsk{Key: enrolled["node-2"]},
		"control, key 3":      ControlAsk{Key: enrolled["banned"]},
		"control, key 4":      ControlAsk{Key: enrolled["node.1"]},
		"control, no key":     ControlAsk{},
	}
	control := func(role, name string) string {
		return "control spiffe://example.org/signet/cluster/east/" + role + "/" + name
	}
	allowed := map[[2]string]string{
		{"node-1", "of node-1"}:                "mesh spiffe://example.org/ns/x/sa/node-1",
		{"node-2", "of node-2"}:                "mesh spiffe://example.org/ns/x/sa/node-2",
		{"node.1", "of node.1"}:                "mesh spiffe://example.org/ns/x/sa/node.1",
		{"node-1", "control, key 1"}:           control("agent", "node-1"),
		{"node-2", "control, key 2"}:           control("agent", "node-2"),
		{"node.1", "control, key 4"}:           control("agent", "node.1"),
		{"node-1 returning", "control, key 1"}: control("agent", "node-1"),
	}
	for _, ask := range []string{"control, new key", "control, key 1", "control, key 2", "control, key 3", "control, key 4"} {
		allowed[[2]string{"new", ask}] = control("agent", "node-9")
		allowed[[2]string{"node-1 again", ask}] = control("agent", "node-1")
		allowed[[2]string{"server", ask}] = control("server", "east-1")
	}
	granted := 0
	for callerName, caller := range callers {
		for askName, ask := range asks {
			grant, err := a.Authorize(t.Context(), caller, ask)
			want, ok := allowed[[2]string{callerName, askName}]
			if !ok {
				var d *Denied
				if grant != nil || !errors.As(err, &d) || d.Reason == "" || strings.Contains(err.Error(), "\n") {
					t.Errorf("%s asks for %s: %v %v", callerName, askName, grant, err)
				}
				continue
			}
			granted++
			if err != nil {
				t.Errorf("%s asks for %s: %v", callerName, askName, err)
				continue
			}
			terms, err := grant.Spend()
			if have := terms.Hierarchy.String() + " " + terms.ID.String(); err != nil || have != want || len(terms.Key.SPKI()) == 0 {
				t.Errorf("%s asks for %s and gets %s, want %s (%v)", callerName, askName, have, want, err)
			}
		}
	}
	if granted != len(allowed) {
		t.Errorf("%d of %d allowed cells were met", granted, len(allowed))
	}
}

func TestARefusalHasTheReasonThatMendsIt(t *testing.T) {
	a, enrolled := world(t)
	key := newKey(t)
	ok := []Selector{"unix:uid:1000"}
	for _, c := range []struct {
		caller        Caller
		ask           Ask
		reason, about string
	}{
		{AsAgent("stranger"), WorkloadAsk{Key: key}, "unknown_agent", "join token"},
		{AsAgent("banned"), ControlAsk{Key: enrolled["banned"]}, "banned_agent", "banned"},
		{AsNewAgent(AttestedNode{agent: "banned"}), ControlAsk{Key: key}, "banned_agent", "banned"},
		{AsAgent("node-1"), WorkloadAsk{Registration: "of-node-1", Selectors: ok}, "no_key", "public key"},
		{AsAgent("node-1"), WorkloadAsk{Registration: "none", Key: key, Selectors: ok}, "not_registered", `no registration "none" for agent node-1`},
		{AsAgent("node-1"), WorkloadAsk{Registration: "of-node-2", Key: key, Selectors: ok}, "not_registered", `no registration "of-node-2" for agent node-1`},
		{AsAgent("node-1"), WorkloadAsk{Registration: "of-node-1", Key: key}, "selectors_differ", "selectors"},
		{AsAgent("node-1"), WorkloadAsk{Registration: "of-node-1", Key: key, Selectors: ok, Instance: strings.Repeat("a", 257)}, "evidence_too_long", "longer"},
		{AsAgent("node-1"), WorkloadAsk{Registration: "of-node-1", Key: key, Selectors: ok, Instance: "\x1b[2J"}, "evidence_malformed", "printed"},
		{AsAgent("node-1"), ControlAsk{Key: key}, "other_key", "another key"},
		{AsServer("east-1"), WorkloadAsk{Registration: "of-node-1", Key: key}, "not_allowed", "may not"},
	} {
		_, err := a.Authorize(t.Context(), c.caller, c.ask)
		var d *Denied
		if !errors.As(err, &d) || d.Reason != c.reason || !strings.Contains(err.Error(), c.about) {
			t.Errorf("want %s (%s), have %v %+v", c.reason, c.about, err, d)
		}
	}
}

func TestAnAgentLearnsNothingOfOthersRegistrations(t *testing.T) {
	a, _ := world(t)
	answer := func(registration string) string {
		_, err := a.Authorize(t.Context(), AsAgent("node-1"), WorkloadAsk{Registration: registration, Key: newKey(t)})
		return strings.ReplaceAll(err.Error(), registration, "X")
	}
	if there, not := answer("of-node-2"), answer("of-node-3"); there != not {
		t.Errorf("one answer for what there is, another for what there is not:\n%s\n%s", there, not)
	}
}

func TestAGrantCarriesOnWhoseWordItIs(t *testing.T) {
	a, _ := world(t)
	key := newKey(t)
	shown := []Selector{"unix:uid:1000", "unix:gid:5"}
	g, err := a.Authorize(t.Context(), AsAgent("node-1"), WorkloadAsk{Registration: "of-node-1", Key: key, Instance: "pid 7 uid 1000", Selectors: shown})
	if err != nil {
		t.Fatal(err)
	}
	shown[0] = "unix:uid:0" // what was authorised stays what it was
	terms, err := g.Spend()
	if err != nil {
		t.Fatal(err)
	}
	ev := terms.Evidence
	if ev.Caller != "spiffe://example.org/signet/cluster/east/agent/node-1" || ev.Door != "agent" || ev.Agent != "node-1" || ev.Instance != "pid 7 uid 1000" ||
		ev.Registration != "of-node-1" || ev.Revision != 7 || len(ev.Selectors) != 2 || ev.Selectors[0] != "unix:uid:1000" || terms.TTL != time.Hour {
		t.Errorf("%+v", terms)
	}
	for door, caller := range map[string]Caller{"self": AsServer("east-1"), "enrol": AsNewAgent(AttestedNode{agent: "node-9"})} {
		g, err := a.Authorize(t.Context(), caller, ControlAsk{Key: key})
		if err != nil {
			t.Fatal(err)
		}
		if terms, _ := g.Spend(); terms.Evidence.Door != door || terms.TTL != 168*time.Hour || (terms.Evidence.Agent == "node-9") != (door == "enrol") {
			t.Errorf("%+v", terms)
		}
	}
}

func TestLeavesLiveAsRegisteredWithinWhatThePolicyAllows(t *testing.T) {
	for name, c := range map[string]struct{ ttl, want time.Duration }{
		"default": {0, time.Hour}, "own": {time.Minute, time.Minute}, "longest": {24 * time.Hour, 24 * time.Hour}, "clamped": {48 * time.Hour, 24 * time.Hour},
	} {
		d := fakeDirectory{map[string]Registration{"web": web(func(r *Registration) { r.TTL = c.ttl })}, map[string]AgentRow{"node-1": {Name: "node-1"}}, nil}
		a, err := NewAuthorizer(policy(), d)
		if err != nil {
			t.Fatal(err)
		}
		g, err := a.Authorize(t.Context(), AsAgent("node-1"), WorkloadAsk{Registration: "web", Key: newKey(t), Selectors: []Selector{"unix:uid:1000"}})
		if err != nil {
			t.Fatal(err)
		}
		if terms, _ := g.Spend(); terms.TTL != c.want {
			t.Errorf("%s: %s", name, terms.TTL)
		}
	}
}

func TestAGrantIsSpentOnce(t *testing.T) {
	a, _ := world(t)
	g, err := a.Authorize(t.Context(), AsServer("east-1"), ControlAsk{Key: newKey(t)})
	if err != nil {
		t.Fatal(err)
	}
	var spent atomic.Int32
	var wg sync.WaitGroup
	start := make(chan struct{})
	for range 50 {
		wg.Go(func() {
			<-start
			switch terms, err := g.Spend(); {
			case err == nil && terms.Hierarchy == ControlPlane:
				spent.Add(1)
			case !errors.Is(err, ErrSpent) || terms.Hierarchy != 0:
				t.Errorf("%+v %v", terms, err)
			}
		})
	}
	close(start)
	wg.Wait()
	if spent.Load() != 1 {
		t.Errorf("spent %d times", spent.Load())
	}
	for name, g := range map[string]*Grant{"nil": nil, "zero": {}} {
		if _, err := g.Spend(); !errors.Is(err, ErrSpent) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAPolicyThatContradictsItselfIsRefused(t *testing.T) {
	for name, change := range map[string]func(*Policy){
		"no trust domain": func(p *Policy) { p.TrustDomain = spiffeid.TrustDomain{} },
		"cluster":         func(p *Policy) { p.Cluster = "East" },
		"default life":    func(p *Policy) { p.DefaultTTL = MinTTL - time.Second },
		"longest life":    func(p *Policy) { p.MaxTTL = p.DefaultTTL - time.Second },
		"control life":    func(p *Policy) { p.ControlTTL = time.Second },
		"part of second":  func(p *Policy) { p.DefaultTTL += time.Millisecond },
	} {
		if _, err := NewAuthorizer(policy(change), fakeDirectory{}); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := NewAuthorizer(policy(), nil); err == nil {
		t.Error("no directory was needed")
	}
}
