package rotation

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
)

func keyed(key string, a Authority) Authority { a.KeyFingerprint = key; return a }

// twins are two roots on one key, the first of which ends sooner, and a third that has its own.
func twins() []Authority {
	a, b, r := keyed("k", rootA(ca.Active)), keyed("k", named("b", rootA(ca.Active))), keyed("r", named("r", rootA(ca.Active)))
	a.NotAfter = noon.Add(10 * day)
	return []Authority{a, b, r, under("b", "i", ca.Active)}
}

func TestATaintCoversEveryCertificateOfTheKey(t *testing.T) {
	w := worldOf(twins()...)
	for _, id := range []string{"a", "b"} {
		all, err := Taint(w, id, noon)
		if got := outcome(w.Authorities, all, err); got != "a leaving, a tainted, b leaving, b tainted" {
			t.Errorf("taint of %s: %s", id, got)
		}
	}
	// Whoever has the same key is no refuge, also where one of the two is not known to be tainted.
	w = worldOf(twins()...)
	w.Authorities = slices.Delete(w.Authorities, 2, 3)
	all, err := Taint(w, "a", noon)
	if got := outcome(w.Authorities, all, err); got != "a tainted, b tainted" {
		t.Errorf("with no other key: %s", got)
	}
	// It ends for each with its own certificate, and the newer one is told of when the older has ended.
	w.Authorities = all
	later := noon.Add(20 * day)
	if !w.exposed("a", later).IsZero() || w.exposed("b", later).IsZero() {
		t.Error("the taint ends with the older certificate")
	}
	told := ReportTaints(testPolicy, all, nil, later)
	if len(told) != 2 || told[0].ID != "a" || told[1].ID != "b" || told[1].KeyFingerprint != "k" || !told[1].NotAfter.Equal(all[1].NotAfter) {
		t.Errorf("peers are told %+v", told)
	}
	// An intermediate's key counts like a root's.
	w = worldOf(append(twins(), keyed("k", under("r", "x", ca.Published)))...)
	if all, err := Taint(w, "x", noon); outcome(w.Authorities, all, err) != "a tainted, b tainted, x tainted" {
		t.Error(outcome(w.Authorities, all, err))
	}
}

func TestARootOnATaintedKeyIsRefused(t *testing.T) {
	here := worldOf(twins()[0], twins()[2])
	here.Authorities[0].Tainted, here.Authorities[0].State = noon, ca.Removed
	here.Authorities[0].NotAfter = noon.Add(-time.Hour) // the key is lost for good
	there := worldOf(twins()[2], under("r", "i", ca.Active))
	there.Peers = []Report{{Cluster: "west", At: noon, Tainted: []TaintReport{{ID: "a", Root: "a", KeyFingerprint: "k", Since: noon, NotAfter: noon.Add(-time.Hour)}}}}
	for where, w := range map[string]World{"a": here, "a of cluster west": there} {
		w.Authorities = append(w.Authorities, under("r", "i", ca.Active))
		_, err := AddRoot(testPolicy, w, keyed("k", named("b", rootA(""))), noon)
		if err == nil || !strings.Contains(err.Error(), "b has the key of "+where+", which is tainted since") || !strings.Contains(err.Error(), "with a new key") {
			t.Errorf("tainted is %s: %v", where, err)
		}
		if all, err := AddRoot(testPolicy, w, keyed("n", named("n", rootA(""))), noon); err != nil || len(all) != len(w.Authorities)+1 {
			t.Errorf("a root of another key: %v", err)
		}
	}
	// A second root on a key that is not lost is Vault's everyday renewal.
	w := worldOf(twins()[0], under("a", "i", ca.Active))
	if all, err := AddRoot(testPolicy, w, keyed("k", named("b", rootA(""))), noon); outcome(w.Authorities, all, err) != "+b prepared" {
		t.Error(outcome(w.Authorities, all, err))
	}
}

// A peer that doesn't tell the key is matched by the root's ID.
func TestWhatPeersTakeForLostIsMatchedByKey(t *testing.T) {
	w := worldOf(twins()...)
	lost := TaintReport{ID: "z", Root: "z", KeyFingerprint: "k", Since: noon.Add(-time.Hour), NotAfter: noon.Add(-time.Minute)}
	tell := func(all ...TaintReport) { w.Peers = []Report{{Cluster: "west", At: noon, Tainted: all}} }
	tell(lost)
	for root, want := range map[string]time.Time{"a": lost.Since, "b": lost.Since, "r": {}} {
		if got := w.exposed(root, noon); !got.Equal(want) {
			t.Errorf("%s is exposed since %s", root, got)
		}
	}
	if _, err := StartRoot(w, "a", noon); err == nil || !strings.Contains(err.Error(), "the key of a, or one below it, is tainted") {
		t.Error(err)
	}
	// West does not know that b has that key, and others may not either.
	if told := ReportTaints(testPolicy, w.Authorities, w.Peers, noon); len(told) != 2 || told[0].ID != "a" || told[1].ID != "b" || !told[1].Since.Equal(lost.Since) {
		t.Errorf("told: %+v", told)
	}
	if told := ReportTaints(testPolicy, w.Authorities, w.Peers, noon.Add(20*day)); len(told) != 1 || told[0].ID != "b" {
		t.Errorf("when a has ended: %+v", told)
	}
	own := lost
	own.ID, own.Root = "b", "b"
	tell(lost, own)
	if told := ReportTaints(testPolicy, w.Authorities, w.Peers, noon); len(told) != 1 || told[0].ID != "a" {
		t.Errorf("of b they know: %+v", told)
	}
	lost.KeyFingerprint, lost.Root, lost.NotAfter = "", "a", noon.Add(day)
	tell(lost)
	if w.exposed("a", noon).IsZero() || !w.exposed("b", noon).IsZero() {
		t.Error("without a key it is another root's")
	}
}

// What waits for a root that not everybody has is not asked for again: a tainted root could not bridge the time.
func TestATaintedRootBridgesNothing(t *testing.T) {
	w := worldOf(rootA(ca.Active), named("b", rootA(ca.Published)), under("a", "i", ca.Active), under("b", "x", ca.Prepared))
	w.Authorities[0].Leaving = noon
	late := noon.Add(15 * day)
	asks := func() bool {
		return slices.ContainsFunc(Next(testPolicy, w, late), func(s Step) bool { return s.From == "" && s.Ready(false) })
	}
	if !asks() {
		t.Error("nothing bridges the time")
	}
	if w.Authorities[0].Tainted = noon; asks() {
		t.Error("another one under b is asked for")
	}
}

// Only a report that holds says that nobody accepts it.
func TestWhatAReportSaysOfWhoAccepts(t *testing.T) {
	bundle := Acceptance{Root: "a", Bundle: true}
	silent := Acceptance{Root: "a", Agents: 2}
	told := func(all ...Acceptance) Report {
		return Report{Cluster: "west", At: noon, Until: noon.Add(testPolicy.ReportLife), Accepting: append(all, Acceptance{Root: "b", Bundle: true})}
	}
	gone := told()
	gone.Gone = []string{"c", "a"}
	life := testPolicy.ReportLife - testPolicy.Skew
	for what, c := range map[string]struct {
		r     Report
		after time.Duration
		want  Acceptance
		known bool
	}{
		"never reported":      {Report{Cluster: "west"}, 0, Acceptance{Root: "a"}, false},
		"in its trust bundle": {told(bundle), 0, bundle, true},
		"at agents only":      {told(silent), life, silent, true},
		"as it was told once": {told(silent), life + 1, silent, false},
		"nobody has it":       {told(), life, Acceptance{Root: "a"}, true},
		"nobody had it":       {told(), life + 1, Acceptance{Root: "a"}, false},
		"it can't come back":  {gone, life + 1, Acceptance{Root: "a"}, true},
		"it will be gone":     {gone, -testPolicy.Skew - 1, Acceptance{Root: "a"}, false},
		"nobody will have it": {told(), -testPolicy.Skew - 1, Acceptance{Root: "a"}, false},
	} {
		if got, known := testPolicy.Accepts(c.r, "a", noon.Add(c.after)); got != c.want || known != c.known {
			t.Errorf("%s: %+v, known %v; want %+v, %v", what, got, known, c.want, c.known)
		}
	}
}
