package rotation

import (
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
)

func TestALostKeyIsNoTaint(t *testing.T) {
	w := worldOf(rootA(ca.Active), under("a", "i", ca.Active))
	all, err := Lost(testPolicy, w, "i", noon)
	if err != nil {
		t.Fatal(err)
	}
	w.Authorities = all
	if i, _ := w.authority("i"); i.State != ca.Retired || !i.Tainted.IsZero() || !i.LeavesUntil.Equal(noon.Add(testPolicy.LongestLeaf)) {
		t.Errorf("it is %+v", i)
	}
	if ids := Stale(w, noon); ids != nil {
		t.Errorf("leaves of %v are called back", ids)
	}
	steps := Next(testPolicy, w, noon)
	if len(steps) == 0 || steps[0].Authority != "" || !steps[0].Ready(false) || steps[0].Because != "no issuer is active" {
		t.Errorf("what comes next is %v", steps)
	}
	if _, err := Lost(testPolicy, w, "a", noon); err == nil || !strings.Contains(err.Error(), "not an intermediate") {
		t.Errorf("a root is lost: %v", err)
	}
}

// The root that leaves bears the cluster until the next one may be signed under, also when the key was lost in between.
func TestAnUpstreamSignsUnderTheRootThatMayBeSignedUnder(t *testing.T) {
	leaving := func(r Authority) Authority { r.Leaving = noon.Add(-time.Hour); return r }
	b := func(s ca.State) Authority {
		r := rootA(s)
		r.ID, r.NotAfter = "b", r.NotAfter.Add(time.Hour)
		return r
	}
	lost := func(i Authority) Authority {
		i.State, i.LeavesUntil = ca.Retired, noon.Add(time.Hour)
		return i
	}
	trusting := Report{At: noon, Roots: []RootReport{{ID: "a"}, {ID: "b"}}}
	deaf := Report{At: noon, Roots: []RootReport{{ID: "a", Trusting: 1, Validators: 1}, {ID: "b", Validators: 1, Missing: []string{"node-1"}}}}
	short := rootA(ca.Active)
	short.NotAfter = noon.Add(time.Hour)
	for name, c := range map[string]struct {
		all  []Authority
		own  Report
		want string
	}{
		"the one that is signed under":                {[]Authority{rootA(ca.Active), b(ca.Active), under("a", "i", ca.Active)}, trusting, "a"},
		"the one that replaces it":                    {[]Authority{leaving(rootA(ca.Active)), b(ca.Published), under("a", "i", ca.Active)}, trusting, "b"},
		"lost, and the next is not trusted yet":       {[]Authority{leaving(rootA(ca.Active)), b(ca.Active), lost(under("a", "i", ca.Active))}, deaf, "a"},
		"lost, and the next is trusted":               {[]Authority{leaving(rootA(ca.Active)), b(ca.Active), lost(under("a", "i", ca.Active))}, trusting, "b"},
		"a lost key, and no other root":               {[]Authority{rootA(ca.Active), func() Authority { i := under("a", "i", ca.Active); i.Tainted = noon; return i }()}, trusting, "a"},
		"a cluster that begins":                       {[]Authority{rootA(ca.Active)}, trusting, "a"},
		"a cluster that begins with several":          {[]Authority{rootA(ca.Active), b(ca.Active)}, trusting, ""},
		"none":                                        {nil, trusting, ""},
		"its end is near, and there is another":       {[]Authority{short, b(ca.Active), under("a", "i", ca.Active)}, trusting, "b"},
		"a tainted one that leaves bears nothing new": {[]Authority{func() Authority { r := leaving(rootA(ca.Active)); r.Tainted = noon; return r }(), b(ca.Active), lost(under("a", "i", ca.Active))}, deaf, "b"},
	} {
		if got := Under(testPolicy, World{Authorities: c.all, Own: c.own}, "x", noon); got != c.want {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

func TestAClusterBeginsUnderTheRootThatItHas(t *testing.T) {
	w := worldOf(rootA(ca.Active))
	b := rootA(ca.Prepared)
	b.ID = "b"
	if _, err := AddRoot(testPolicy, w, b, noon); err == nil || !strings.Contains(err.Error(), "before the cluster has begun") {
		t.Errorf("another root before the first signature: %v", err)
	}
}
