package agent

import (
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/check"
)

// findings are those that cost a look into memory.
func (n *node) findings(t *testing.T) (all check.Findings) {
	t.Helper()
	for _, p := range n.checks() {
		if p.Every == 0 {
			all = append(all, p.Look(t.Context())...)
		}
	}
	return all
}

// What is only going to be bad is told apart from what is, and never takes workloads out of service.
func TestAnAgentWhoseServerIsAwayStaysReadyAndSaysHowLong(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	n.ready(t)
	leafOf(t, n.config.Socket)
	about := func(name string) check.Finding {
		t.Helper()
		for _, f := range n.findings(t) {
			if f.About == name {
				return f
			}
		}
		t.Fatalf("nothing is said of %s", name)
		return check.Finding{}
	}
	if f := about("outage-budget"); f.Level != check.OK || !strings.Contains(f.Message, "so long the server may be away") {
		t.Errorf("%+v", f)
	}
	w.close()
	eventually(t, "the server is away", func() bool { return !n.connected.Load() })
	if f := about("server"); f.Level != check.Error || f.Blocks() {
		t.Errorf("%+v", f)
	}
	if f := about("outage-budget"); f.Level != check.OK {
		t.Errorf("%+v", f)
	}
	if !n.findings(t).Ready() {
		t.Error("not ready")
	}
}
