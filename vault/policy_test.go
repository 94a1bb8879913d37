package vault

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/hcl"
)

func TestAPolicyIsTheSameForTheSameNeeds(t *testing.T) {
	needs := []Need{
		{"transit/sign/signet-*", []string{"update", "create"}, "sign with the issuer's key", nil, nil},
		{"secret/data/signet/east", []string{"update"}, "publish\nthe bundle", nil, nil},
		{"secret/data/signet/+", []string{"read"}, "read the bundle", nil, nil},
		{"transit/sign/signet-*", []string{"update"}, "sign with the log's key", nil, nil},
		{"secret/data/signet/east", []string{"create"}, "publish\nthe bundle", nil, nil},
		{"pki/issuer/\"odd\"", []string{"recover", "read"}, "odd", nil, nil},
	}
	want := `# odd
path "pki/issuer/\"odd\"" {
  capabilities = ["recover", "read"]
}

# read the bundle
path "secret/data/signet/+" {
  capabilities = ["read"]
}

# publish the bundle
path "secret/data/signet/east" {
  capabilities = ["create", "read", "update"]
}

# sign with the issuer's key
# sign with the log's key
path "transit/sign/signet-*" {
  capabilities = ["create", "update"]
}
`
	if d := cmp.Diff(want, Policy(needs)); d != "" {
		t.Error(d)
	}
	for range 20 {
		if Policy(needs) != want {
			t.Fatal("another policy for the same needs")
		}
	}
	var parsed map[string]any
	if err := hcl.Decode(&parsed, Policy(append(needs, Needs()...))); err != nil {
		t.Error(err)
	}
	if Policy(nil) != "" {
		t.Error("a policy for nothing")
	}
}

func TestAWiderPathCoversANarrowerOne(t *testing.T) {
	for _, c := range []struct {
		pattern, path string
		want          bool
	}{
		{"a/*", "a/b", true},
		{"a/*", "a/b/c", true},
		{"a/*", "a/*", true},
		{"a/*", "a", false},
		{"a/b*", "a/bc", true},
		{"a/b*", "a/bc/d", true},
		{"a/b*", "a/c", false},
		{"a/+/c", "a/b/c", true},
		{"a/+/c", "a/b/d", false},
		{"a/+/c", "a/b/b/c", false},
		{"a/+", "a/b", true},
		{"+/b", "a/b", true},
		{"a", "a", true},
		{"a", "a/b", false},
		{"*", "a/b", true},
	} {
		if got := covers(c.pattern, c.path); got != c.want {
			t.Errorf("%s covers %s: %v", c.pattern, c.path, got)
		}
	}
}

func TestMissingNamesWhatIsLacking(t *testing.T) {
	f := newFakeVault()
	has := map[string][]string{"a": {"read"}, "b/*": {"create", "update"}, "c": {"deny"}, "d": {"root"}}
	var needs []Need
	for _, p := range []string{"d", "c", "b/*", "a"} {
		needs = append(needs, Need{p, []string{"read", "update"}, "why " + p, nil, nil})
	}
	for i := range 250 {
		p := fmt.Sprintf("many/%03d", i)
		has[p] = []string{"read"}
		needs = append(needs, Need{p, []string{"read"}, "many", nil, nil})
	}
	calls := 0
	f.on("PUT "+capabilitiesPath, func(w http.ResponseWriter, r *http.Request) {
		calls++
		var body struct{ Paths []string }
		_ = json.Unmarshal(f.last(), &body)
		d := map[string]any{}
		for _, p := range body.Paths {
			d[p] = has[p]
		}
		if len(body.Paths) == 1 {
			d["capabilities"] = has[body.Paths[0]]
		}
		answer(w, 200, map[string]any{"data": d})
	})
	cl := connect(t, appRole(t), f)
	missing, err := cl.Missing(t.Context(), needs)
	want := []Need{{"a", []string{"update"}, "why a", nil, nil}, {"b/*", []string{"read"}, "why b/*", nil, nil}, {"c", []string{"read", "update"}, "why c", nil, nil}}
	if d := cmp.Diff(want, missing); err != nil || d != "" || calls != 3 {
		t.Errorf("%v, %d calls: %s", err, calls, d)
	}
	if missing, err := cl.Missing(t.Context(), nil); err != nil || missing != nil {
		t.Error(missing, err)
	}
	f.on("PUT "+capabilitiesPath, data(map[string]any{"other": []string{"read"}}))
	if _, err := cl.Missing(t.Context(), needs[:1]); err == nil || !strings.Contains(err.Error(), "does not answer for d") {
		t.Error(err)
	}
	f.on("PUT "+capabilitiesPath, refuse(403, "permission denied"))
	if _, err := cl.Missing(t.Context(), needs[:1]); !errors.Is(err, ErrDenied) {
		t.Error(err)
	}
}

func TestATighterPolicyThanOursLacksNothing(t *testing.T) {
	f := newFakeVault()
	has := map[string][]string{}
	f.on("PUT "+capabilitiesPath, func(w http.ResponseWriter, _ *http.Request) {
		var body struct{ Paths []string }
		_ = json.Unmarshal(f.last(), &body)
		d := map[string]any{}
		for _, p := range body.Paths {
			if d[p] = has[p]; has[p] == nil {
				d[p] = []string{"deny"}
			}
		}
		answer(w, 200, map[string]any{"data": d})
	})
	cl := connect(t, appRole(t), f)
	needs := []Need{
		{"keys/p-*", []string{"read", "update"}, "make", []string{"keys/p-a", "keys/p-b"}, nil},
		{"keys/p-*", []string{"update"}, "change", []string{"keys/p-a/rotate", "keys/p-a/config"}, nil},
		{"issuer/+/sign", []string{"update"}, "sign", []string{"issuer/default/sign"}, nil},
	}
	if p := Policy(needs); strings.Count(p, "path ") != 2 || !strings.Contains(p, `path "keys/p-*"`) || !strings.Contains(p, `path "issuer/+/sign"`) {
		t.Errorf("the policy is\n%s", p)
	}
	for _, step := range []struct {
		grant string
		caps  []string
		want  []Need
	}{
		{"", nil, []Need{{"issuer/+/sign", []string{"update"}, "sign", nil, nil}, {"keys/p-*", []string{"read", "update"}, "make; change", nil, nil}}},
		{"issuer/default/sign", []string{"update"}, []Need{{"keys/p-*", []string{"read", "update"}, "make; change", nil, nil}}},
		{"keys/p-a", []string{"read", "update"}, []Need{
			{"keys/p-b", []string{"read", "update"}, "make; change", nil, nil},
			{"keys/p-a/rotate", []string{"update"}, "make; change", nil, nil},
			{"keys/p-a/config", []string{"update"}, "make; change", nil, nil},
		}},
		{"keys/p-b", []string{"read", "update"}, []Need{
			{"keys/p-a/rotate", []string{"update"}, "make; change", nil, nil}, {"keys/p-a/config", []string{"update"}, "make; change", nil, nil},
		}},
		{"keys/p-a/rotate", []string{"update"}, []Need{{"keys/p-a/config", []string{"update"}, "make; change", nil, nil}}},
		{"keys/p-a/config", []string{"update"}, nil},
	} {
		has[step.grant] = step.caps
		missing, err := cl.Missing(t.Context(), needs)
		if d := cmp.Diff(step.want, missing); err != nil || d != "" {
			t.Errorf("with %s: %v %s", step.grant, err, d)
		}
	}
}

func TestNeedsAreInOrder(t *testing.T) {
	for _, n := range Needs() {
		if n.Why == "" || strings.ContainsRune(n.Why, '\n') || !slices.Equal(n.Capabilities, inOrder(slices.Clone(n.Capabilities))) {
			t.Errorf("%+v", n)
		}
	}
}
