package main

import (
	"encoding/json"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/rotation"
)

const planForPeople = `  intermediate-2 → prepared, now: the root above intermediate-1 is being replaced
  intermediate-2 prepared → published, then: it was signed
    - assumed: its request is signed under root-fedcba9876543210
  intermediate-2 published → active, then: the root above intermediate-1 is being replaced
  root-0123456789abcdef retired → removed, in 25h: nothing here signs under it
    - assumed: cluster west reports that nothing there depends on it any more
`

func TestAPlanSaysWhatItAssumes(t *testing.T) {
	wait := func(code, text string) []*adminv1.RotationWait {
		return []*adminv1.RotationWait{{Code: code, For: text}}
	}
	d := &doorman{plan: []*adminv1.RotationStep{
		{Authority: "intermediate-2", Kind: "intermediate", To: "prepared", Because: "the root above intermediate-1 is being replaced", At: ago(0)},
		{
			Authority: "intermediate-2", Kind: "intermediate", From: "prepared", To: "published", Because: "it was signed", At: ago(0),
			Assumed: wait("signature", "its request is signed under "+newRoot),
		},
		{Authority: "intermediate-2", Kind: "intermediate", From: "published", To: "active", Because: "the root above intermediate-1 is being replaced", At: ago(0)},
		{
			Authority: oldRoot, Kind: "root", From: "retired", To: "removed", Because: "nothing here signs under it", At: in(25 * time.Hour),
			Assumed: wait("peer", "cluster west reports that nothing there depends on it any more"),
		},
	}}
	h, east := door(t, d)
	if out, _ := h.must(exitYes, "rotation", "plan", "root", "--config", east); out != planForPeople {
		t.Errorf("the plan is\n%s\nwant\n%s", out, planForPeople)
	}
	out, _ := h.must(exitYes, "rotation", "plan", "root", "--config", east, "-o", "json")
	var steps []struct {
		Ready   bool                         `json:"ready"`
		Assumed []struct{ Code, For string } `json:"assumed"`
	}
	if err := json.Unmarshal([]byte(out), &steps); err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		ready bool
		code  string
	}{{true, ""}, {false, "signature"}, {false, ""}, {false, "peer"}} {
		s, code := steps[i], ""
		if len(s.Assumed) > 0 {
			code = s.Assumed[0].Code
		}
		if s.Ready != want.ready || code != want.code {
			t.Errorf("step %d: ready %t, assumed %+v; want %+v", i, s.Ready, s.Assumed, want)
		}
	}
	contains(t, jsonKeys(t, out), "[].assumed[].code", "[].assumed[].for")
}

// A refusal names the file, and is a no; what can't be read is no answer.
func TestAReportThatIsRefusedIsNamed(t *testing.T) {
	d := &doorman{refuse: status.Error(codes.FailedPrecondition, "report refused: b.report: nobody has signed it")}
	h, east := door(t, d)
	a, b := h.write("a.report", "a note\n"), h.write("b.report", "garbage\n")
	_, errs := h.must(exitNo, "rotation", "advance", "--config", east, "--report", a, "--report", b)
	if errs != "signet: report refused: b.report: nobody has signed it\n" {
		t.Errorf("it says %q", errs)
	}
	if r := d.asked[0].(*adminv1.AdvanceRotationRequest); !slices.Equal(r.ReportNames, []string{a, b}) || len(r.Reports) != 2 {
		t.Errorf("the server is asked %v", r)
	}
	_, errs = h.must(exitCouldNotSay, "rotation", "advance", "--config", east, "--report", a, "--report", a+".not-there")
	contains(t, errs, "a.report.not-there")
	if len(d.asked) != 1 {
		t.Error("the server was asked with a file that can't be read")
	}
}

// What may be configured is what peers believe.
func TestTheLongestReportLifeIsOne(t *testing.T) {
	if config.MaxReportLife != rotation.MaxReportLife {
		t.Errorf("report_life may be %s, reports hold for at most %s", config.MaxReportLife, rotation.MaxReportLife)
	}
}
