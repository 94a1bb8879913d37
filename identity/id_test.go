package identity

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func TestSPIFFEIDsKeepTheRules(t *testing.T) {
	long := func(n int) string {
		s := "spiffe://example.org/"
		return s + strings.Repeat("a", n-len(s))
	}
	for name, c := range map[string]struct {
		id string
		ok bool
	}{
		"plain":                         {"spiffe://example.org/ns/shop/sa/web", true},
		"I1 other scheme":               {"https://example.org/a", false},
		"I1 no scheme":                  {"example.org/a", false},
		"I1 no trust domain":            {"spiffe:///a", false},
		"I1 query":                      {"spiffe://example.org/a?b", false},
		"I1 fragment":                   {"spiffe://example.org/a#b", false},
		"I2 user":                       {"spiffe://u@example.org/a", false},
		"I2 port":                       {"spiffe://example.org:80/a", false},
		"I2 upper case host":            {"spiffe://Example.org/a", false},
		"I2 percent host":               {"spiffe://ex%61mple.org/a", false},
		"I2 IPv6":                       {"spiffe://[::1]/a", false},
		"I2 IDN":                        {"spiffe://exämple.org/a", false},
		"I3 like an address":            {"spiffe://1.2.3.4/a", true},
		"I3 no DNS name":                {"spiffe://a_b/a", true},
		"I4 percent path":               {"spiffe://example.org/%61", false},
		"I4 empty segment":              {"spiffe://example.org/a//b", false},
		"I4 dot":                        {"spiffe://example.org/a/./b", false},
		"I4 dot dot":                    {"spiffe://example.org/ns/../x", false},
		"I4 trailing slash":             {"spiffe://example.org/a/", false},
		"I4 other characters":           {"spiffe://example.org/a*b", false},
		"I4 unicode":                    {"spiffe://example.org/ï", false},
		"I4 NUL":                        {"spiffe://example.org/a\x00", false},
		"I4 newline":                    {"spiffe://example.org/a\n", false},
		"I5 2048 bytes":                 {long(2048), true},
		"I5 2049 bytes":                 {long(2049), false},
		"I5 trust domain of 255":        {"spiffe://" + strings.Repeat("a", 255) + "/a", true},
		"I5 trust domain of 256":        {"spiffe://" + strings.Repeat("a", 256) + "/a", false},
		"I6 upper case scheme":          {"SPIFFE://example.org/a", false},
		"X509-SVID §3.1 without a path": {"spiffe://example.org", false},
		"nothing":                       {"", false},
	} {
		t.Run(name, func(t *testing.T) {
			id, err := ParseID(c.id)
			if (err == nil) != c.ok {
				t.Fatalf("%.80q: %v", c.id, err)
			}
			if err == nil && id.String() != c.id {
				t.Errorf("%q became %q", c.id, id)
			}
			if err != nil && len(err.Error()) > 600 {
				t.Errorf("error of %d bytes repeats what it was given", len(err.Error()))
			}
		})
	}
}

func TestPathsOfOtherCaseAreOtherIdentities(t *testing.T) {
	a, errA := ParseID("spiffe://example.org/web")
	b, errB := ParseID("spiffe://example.org/Web")
	if errA != nil || errB != nil || a == b {
		t.Error(a, b, errA, errB)
	}
}

func TestTrustDomainsAreBareNames(t *testing.T) {
	for s, ok := range map[string]bool{
		"example.org": true, "10.0.0.1": true, "a_b": true, strings.Repeat("a", 255): true,
		"": false, "spiffe://example.org": false, "example.org/": false, "example.org/a": false, "Example.org": false, "a:80": false,
		"a b": false, "xn--%": false, strings.Repeat("a", 256): false, strings.Repeat("A", 255): false,
	} {
		td, err := ParseTrustDomain(s)
		if (err == nil) != ok || ok && td.Name() != s {
			t.Errorf("%.40q: %v %v", s, td, err)
		}
	}
}

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"spiffe://example.org/ns/a/sa/b", "spiffe://a", "SPIFFE://a/b", "spiffe://a/%2e", "spiffe://a//b", "spiffe://1.2.3.4/x", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		theirs, errTheirs := spiffeid.FromString(s)
		allowed := errTheirs == nil && len(s) <= MaxIDLength && len(theirs.TrustDomain().Name()) <= MaxTrustDomainLength && theirs.Path() != ""
		if allowed != (err == nil) {
			t.Fatalf("%q: ours %v, go-spiffe %v", s, err, errTheirs)
		}
		if err == nil && (id != theirs || id.String() != s) {
			t.Fatalf("%q became %q", s, id)
		}
	})
}

func TestNamesCanStandAsSegmentFileAndLabel(t *testing.T) {
	for s, ok := range map[string]bool{
		"a": true, "0": true, "node-1": true, "ip-10-0-0-1.ec2.internal": true, strings.Repeat("a", 63): true,
		"": false, "-a": false, "a-": false, ".a": false, "a.": false, "..": false, "A": false, "a_b": false, "a/b": false, "a b": false, "ä": false,
		"a\n": false, "a\x00": false, strings.Repeat("a", 64): false,
	} {
		if err := ParseName("agent", s); (err == nil) != ok {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestControlNamesGoThereAndBack(t *testing.T) {
	for _, role := range []Role{RoleServer, RoleAgent, RoleAdmin} {
		c := Control{td, "east", role, "node-1.rack-2"}
		id, err := c.ID()
		if err != nil {
			t.Fatal(err)
		}
		if want := "spiffe://example.org/signet/cluster/east/" + string(role) + "/node-1.rack-2"; id.String() != want {
			t.Errorf("%s, want %s", id, want)
		}
		if back, err := ParseControl(id); err != nil || back != c {
			t.Errorf("%+v %v", back, err)
		}
		if !Reserved(id) {
			t.Errorf("%s is not reserved", id)
		}
	}
}

func TestControlNamesThatCannotBeAreNotMade(t *testing.T) {
	for name, c := range map[string]Control{
		"zero":            {},
		"no trust domain": {spiffeid.TrustDomain{}, "east", RoleAgent, "n"},
		"no cluster":      {td, "", RoleAgent, "n"},
		"cluster":         {td, "East", RoleAgent, "n"},
		"no role":         {td, "east", "", "n"},
		"unknown role":    {td, "east", "owner", "n"},
		"role as cluster": {td, "EAST", "cluster", "n"},
		"no name":         {td, "east", RoleAgent, ""},
		"name":            {td, "east", RoleAgent, "a/b"},
	} {
		if id, err := c.ID(); err == nil {
			t.Errorf("%s: made %s", name, id)
		}
	}
}

func TestLookAlikesAreNotPartsOfSignet(t *testing.T) {
	for _, path := range []string{
		"", "/signet", "/signet/cluster/east/agent", "/signet/cluster/east/agent/n/x", "/Signet/cluster/east/agent/n", "/signet/clusters/east/agent/n",
		"/signet/cluster/East/agent/n", "/signet/cluster/east/Agent/n", "/signet/cluster/east/owner/n", "/signet/cluster/east/agent/N",
		"/signet/cluster/east/agent/-n", "/signet/cluster/east/agent/a_b", "/x/signet/cluster/east/agent/n", "/ns/signet/cluster/east/agent",
	} {
		id := spiffeid.RequireFromPath(td, path)
		if c, err := ParseControl(id); err == nil {
			t.Errorf("%s was taken for %+v", id, c)
		}
	}
	if c, err := ParseControl(spiffeid.ID{}); err == nil {
		t.Errorf("no ID was taken for %+v", c)
	}
}

func TestOnlyTheWholeFirstSegmentIsReserved(t *testing.T) {
	for path, want := range map[string]bool{"/signet": true, "/signet/x": true, "/signets": false, "/signet.x/y": false, "/ns/signet": false, "/Signet": false, "": false} {
		if have := Reserved(spiffeid.RequireFromPath(td, path)); have != want {
			t.Errorf("%q: %v", path, have)
		}
	}
}
