package rotation

import (
	"testing"
	"time"
)

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
