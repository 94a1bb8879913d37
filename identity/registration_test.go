package identity

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"
)

func web(change ...func(*Registration)) Registration {
	r := Registration{
		Name: "web", ID: spiffeid.RequireFromPath(td, "/ns/shop/sa/web"),
		Agents: []string{"node-1"}, Selectors: []Selector{"unix:uid:1000"},
	}
	for _, f := range change {
		f(&r)
	}
	return r
}

func TestARegistrationSaysWhatIsWrongWithIt(t *testing.T) {
	many := func(n int, format string) []string {
		var s []string
		for i := range n {
			s = append(s, fmt.Sprintf(format, i))
		}
		return s
	}
	selectors := func(s ...Selector) func(*Registration) { return func(r *Registration) { r.Selectors = s } }
	for name, c := range map[string]struct {
		change func(*Registration)
		about  string // "" = fine
	}{
		"fine":                {func(*Registration) {}, ""},
		"least ttl":           {func(r *Registration) { r.TTL = MinTTL }, ""},
		"all selectors":       {selectors(selectorsOf(many(MaxSelectors, "unix:uid:%d"))...), ""},
		"name":                {func(r *Registration) { r.Name = "Web" }, "registration name"},
		"no id":               {func(r *Registration) { r.ID = spiffeid.ID{} }, "web"},
		"no path":             {func(r *Registration) { r.ID = td.ID() }, "has no path"},
		"other trust domain":  {func(r *Registration) { r.ID = spiffeid.RequireFromString("spiffe://example.com/a") }, "not of trust domain"},
		"reserved":            {func(r *Registration) { r.ID = spiffeid.RequireFromPath(td, "/signet/cluster/east/server/x") }, "reserved"},
		"long id":             {func(r *Registration) { r.ID = spiffeid.RequireFromPath(td, "/"+strings.Repeat("a", 2048)) }, "2048"},
		"no agents":           {func(r *Registration) { r.Agents = nil }, "names no agent"},
		"too many agents":     {func(r *Registration) { r.Agents = many(MaxAgents+1, "n%d") }, "1024"},
		"agent":               {func(r *Registration) { r.Agents = []string{"*"} }, "agent name"},
		"no selectors":        {selectors(), "fit every process"},
		"too many selectors":  {selectors(selectorsOf(many(MaxSelectors+1, "unix:uid:%d"))...), "32"},
		"ttl":                 {func(r *Registration) { r.TTL = MinTTL - time.Second }, "shorter"},
		"negative ttl":        {func(r *Registration) { r.TTL = -time.Hour }, "shorter"},
		"part of a second":    {func(r *Registration) { r.TTL = time.Minute + 1 }, "whole seconds"},
		"bare selector":       {selectors("1000"), "type:value"},
		"empty value":         {selectors("unix:"), "type:value"},
		"long selector":       {selectors(Selector("cgroup:/" + strings.Repeat("a", MaxSelectorLength))), "1024"},
		"newline":             {selectors("unix:path:/a\n"), "printable"},
		"not UTF-8":           {selectors("unix:path:/\xff"), "printable"},
		"change of direction": {selectors("unix:path:/a\u202eb"), "printable"},
		"unknown type":        {selectors("unx:uid:1000"), `"unx"; the types are cgroup, socket, systemd, unix`},
		"unknown kind":        {selectors("unix:user:web"), "unix:uid:N"},
		"not a number":        {selectors("unix:uid:web"), "unix:uid:1000"},
		"two ways to write":   {selectors("unix:uid:01000"), "unix:uid:1000"},
		"signed number":       {selectors("unix:gid:+5"), "unix:gid:1000"},
		"beyond a uid":        {selectors("unix:uid:4294967296"), "unix:uid:1000"},
		"relative path":       {selectors("unix:path:bin/web"), "absolute"},
		"unclean path":        {selectors("unix:path:/bin/../web"), "plain path"},
		"short hash":          {selectors("unix:sha256:abcd"), "64 hexadecimal"},
		"upper case hash":     {selectors(Selector("unix:sha256:" + strings.Repeat("AB", 32))), "lower case"},
		"a slice":             {selectors("systemd:unit:system.slice"), "service or scope"},
		"unit with a path":    {selectors("systemd:unit:a.service/b.service"), "service or scope"},
		"root cgroup":         {selectors("cgroup:/"), "plain path"},
		"socket name":         {selectors("socket:../x"), "socket:NAME"},
		"good selectors": {selectors(Selector("unix:sha256:"+strings.Repeat("ab", 32)), "unix:supplementary_gid:7", "unix:path:/usr/bin/a b",
			"systemd:unit:user@1000.service", "cgroup:/system.slice/a.service/b", "socket:front-end.1"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := web(c.change)
			err := r.Validate(td)
			switch {
			case c.about == "" && err != nil:
				t.Error(err)
			case c.about != "" && err == nil:
				t.Error("was accepted")
			case c.about != "" && (!strings.Contains(err.Error(), c.about) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 1000):
				t.Errorf("does not say %q in one sentence: %v", c.about, err)
			}
		})
	}
}

// What a newer agent saw of a workload must not keep it from what an older server can tell.
func TestKindsThatOnlyANewerAgentKnowsAreCarriedAndMatchNothing(t *testing.T) {
	for _, s := range []string{"unix:seccomp:strict", "unix:label", "systemd:slice:web.slice", "k8s:ns:default"} {
		if _, err := ParseSelector(s); err != nil {
			t.Errorf("shown: %v", err)
		}
		r := Registration{Name: "web", ID: spiffeid.RequireFromString("spiffe://example.org/web"), Agents: []string{"n"}, Selectors: []Selector{Selector(s)}}
		if err := r.Validate(spiffeid.RequireTrustDomainFromString("example.org")); err == nil {
			t.Errorf("a registration by %s is accepted, which nothing here attests", s)
		}
	}
	for _, s := range []string{"unix:uid", "unix:uid:x", "unix:uid:01", "systemd:unit:x.slice", "unix:", "unix:seccomp:\n"} {
		if _, err := ParseSelector(s); err == nil {
			t.Errorf("%q is accepted", s)
		}
	}
}

func selectorsOf(s []string) []Selector {
	var out []Selector
	for _, x := range s {
		out = append(out, Selector(x))
	}
	return out
}

func TestEqualRegistrationsAreWrittenTheSameWay(t *testing.T) {
	r := web(func(r *Registration) {
		r.Agents = []string{"b", "a", "b"}
		r.Selectors = []Selector{"unix:uid:2", "unix:gid:1", "unix:uid:2"}
	})
	if err := r.Validate(td); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(r.Agents, []string{"a", "b"}) || !slices.Equal(r.Selectors, []Selector{"unix:gid:1", "unix:uid:2"}) {
		t.Errorf("%v %v", r.Agents, r.Selectors)
	}
}

func TestAWorkloadMustShowEverySelectorWhole(t *testing.T) {
	for name, c := range map[string]struct {
		want, shown []Selector
		fits        bool
	}{
		"same":                  {[]Selector{"unix:uid:1"}, []Selector{"unix:uid:1"}, true},
		"more is shown":         {[]Selector{"unix:uid:1"}, []Selector{"unix:gid:1", "unix:uid:1"}, true},
		"one is missing":        {[]Selector{"unix:uid:1", "unix:gid:1"}, []Selector{"unix:uid:1"}, false},
		"nothing is shown":      {[]Selector{"unix:uid:1"}, nil, false},
		"nothing is wanted":     {nil, []Selector{"unix:uid:1"}, false},
		"nothing at all":        {nil, nil, false},
		"a dot is a dot":        {[]Selector{"systemd:unit:a.b.service"}, []Selector{"systemd:unit:axb.service"}, false},
		"a star is a star":      {[]Selector{"cgroup:/a/*"}, []Selector{"cgroup:/a/b"}, false},
		"no prefixes":           {[]Selector{"cgroup:/a"}, []Selector{"cgroup:/a/b"}, false},
		"no suffixes":           {[]Selector{"unix:uid:1"}, []Selector{"unix:uid:11"}, false},
		"case counts":           {[]Selector{"unix:path:/bin/web"}, []Selector{"unix:path:/bin/Web"}, false},
		"gid is not uid":        {[]Selector{"unix:uid:7"}, []Selector{"unix:gid:7", "unix:supplementary_gid:7"}, false},
		"white space is itself": {[]Selector{"unix:path:/a b"}, []Selector{"unix:path:/a  b"}, false},
	} {
		r := Registration{Selectors: c.want}
		if have := r.Matches(c.shown); have != c.fits {
			t.Errorf("%s: %v", name, have)
		}
	}
}

func TestMatchingIsSetInclusionAndNothingElse(t *testing.T) {
	selector := rapid.Custom(func(t *rapid.T) Selector {
		return Selector(rapid.StringOfN(rapid.RuneFrom([]rune("ab.*?[^$")), 1, 4, -1).Draw(t, "selector"))
	})
	rapid.Check(t, func(t *rapid.T) {
		want := rapid.SliceOfN(selector, 0, 4).Draw(t, "want")
		shown := rapid.SliceOfN(selector, 0, 6).Draw(t, "shown")
		fits := len(want) > 0
		for _, w := range want {
			found := false
			for _, s := range shown {
				found = found || string(w) == string(s)
			}
			fits = fits && found
		}
		r := Registration{Selectors: want}
		if r.Matches(shown) != fits {
			t.Fatalf("%q shown to %q: %v", shown, want, !fits)
		}
	})
}

func TestTheDefaultIdentityIsTheHighestPriorityThenTheFirstName(t *testing.T) {
	reg := func(name string, priority int32, s ...Selector) Registration {
		return Registration{Name: name, Priority: priority, Selectors: s}
	}
	all := []Registration{
		reg("zeta", 5, "a"), reg("beta", 0, "a"), reg("alpha", 0, "a"), reg("low", -2147483648, "a"), reg("high", 2147483647, "a"),
		reg("other", 9, "b"), reg("both", 1, "a", "b"),
	}
	names := func(fit []Registration) (n []string) {
		for _, r := range fit {
			n = append(n, r.Name)
		}
		return n
	}
	want := []string{"high", "zeta", "alpha", "beta", "low"}
	for range 5 {
		if have := names(Match(all, []Selector{"a"})); !slices.Equal(have, want) {
			t.Errorf("%v, want %v", have, want)
		}
		all = append(all[1:], all[0]) // whatever the order of the set
	}
	if fit := Match(all, []Selector{"c"}); len(fit) != 0 {
		t.Errorf("%v", names(fit))
	}
}

func TestARegistrationIsForItsAgentsOnly(t *testing.T) {
	r := web(func(r *Registration) { r.Agents = []string{"a.b", "node-1"} })
	for agent, want := range map[string]bool{"node-1": true, "a.b": true, "axb": false, "node-10": false, "node": false, "": false, "Node-1": false} {
		if r.For(agent) != want {
			t.Errorf("%q: %v", agent, !want)
		}
	}
}

func FuzzParseSelector(f *testing.F) {
	for _, s := range []string{"unix:uid:1", "unix:path:/a b", "systemd:unit:a@b.service", "cgroup:/a", "socket:x", "k8s:ns:a", "a:\n", ":", "unix:sha256:00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		s, err := ParseSelector(in)
		if err != nil {
			return
		}
		if string(s) != in || len(in) > MaxSelectorLength || !strings.Contains(in, ":") || strings.ContainsAny(in, "\n\r\x00\x7f") {
			t.Fatalf("%q", in)
		}
	})
}
