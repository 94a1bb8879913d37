package audit

import (
	"testing"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
)

func TestWhatAnotherClusterReportedIsOneLine(t *testing.T) {
	by := &auditv1.Evidence{Caller: "uid:0", Door: "admin"}
	for want, says := range map[string][]string{
		"report of cluster west, made at 2026-01-02T03:04:05Z: nothing new": nil,
		"report of cluster west, made at 2026-01-02T03:04:05Z: root-1 is leaving; the key of intermediate-1 under root-1 is tainted since 2026-01-02T03:00:00Z": {
			"root-1 is leaving", "the key of intermediate-1 under root-1 is tainted since 2026-01-02T03:00:00Z",
		},
	} {
		f, err := FactsOf(&auditv1.Entry{Event: &auditv1.Entry_PeerReported{PeerReported: &auditv1.PeerReported{
			Cluster: "west", Made: 1767323045e9, Says: says, Evidence: by,
		}}})
		if err != nil || f.Kind != "peer-reported" || f.Change != want || f.Evidence.GetCaller() != "uid:0" || f.Authority != "" {
			t.Errorf("%+v, %v", f, err)
		}
	}
}
