package agent

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
)

func TestAnAgentSaysBothTimesWhenTheServersClockIsFarFromIts(t *testing.T) {
	here := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	a := &Agent{link: link{now: func() time.Time { return here }}}
	finding := func() check.Finding { return a.checkClock()[0] }
	says := func(text ...string) {
		md := metadata.MD{}
		md.Append(timeHeader, text...)
		a.link.hearTime(md)
	}
	at := func(d time.Duration) string { return strconv.FormatInt(here.Add(d).UnixNano(), 10) }
	for _, nothing := range [][]string{nil, {}, {"noon"}, {at(time.Hour), at(time.Hour)}} {
		if says(nothing...); finding().Level != check.OK {
			t.Errorf("%q: %+v", nothing, finding())
		}
	}
	for off, want := range map[time.Duration]check.Level{0: check.OK, 59 * time.Second: check.OK, -59 * time.Second: check.OK, 24 * time.Hour: check.Error, -24 * time.Hour: check.Error} {
		says(at(off))
		f := finding()
		if f.Level != want || f.Blocks() || f.Code != check.CodeClock {
			t.Errorf("by %s: %+v", off, f)
		}
		if want != check.OK && (!strings.Contains(f.Message, "2026-05-04T12:00:00Z") || !strings.Contains(f.Message, here.Add(off).Format(time.RFC3339))) {
			t.Errorf("by %s: it does not say both times: %s", off, f.Message)
		}
	}
	says(at(0))
	if finding().Level != check.OK {
		t.Error("it shows when the clocks agree again")
	}
}

func TestAFolderThatOthersCouldReplaceIsRefusedForASocket(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "a", "b", "c")
	parent := filepath.Dir(filepath.Dir(dir))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(top, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	for _, try := range []struct {
		mode os.FileMode
		want string
	}{
		{0o755, ""},
		{0o777, "others may write to " + parent},
		{0o757, "chmod go-w " + parent},
		{0o777 | os.ModeSticky, ""},
		{0o775, ""}, // the user's own group
	} {
		if err := os.Chmod(parent, try.mode); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{dir, link} {
			err := checkSocketDir(path)
			if try.want == "" && err != nil || try.want != "" && (err == nil || !strings.Contains(err.Error(), try.want)) {
				t.Errorf("%s under a folder of mode %v: %v, want %q", path, try.mode, err, try.want)
			}
		}
	}
	if os.Geteuid() != 0 {
		return
	}
	if err := os.Chmod(parent, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	for _, theirs := range []string{filepath.Dir(dir), parent} {
		if err := os.Chown(theirs, 4242, 4242); err != nil {
			t.Fatal(err)
		}
		if err := checkSocketDir(dir); err == nil || !strings.Contains(err.Error(), theirs+", on the way to it, belongs to uid 4242") {
			t.Errorf("%s is another's: %v", theirs, err)
		}
		if err := os.Chown(theirs, 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	// A group of more than one.
	if err := os.Chown(parent, 0, 4242); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(parent, 0o775); err != nil {
		t.Fatal(err)
	}
	if err := checkSocketDir(dir); err == nil {
		t.Error("a group may write above")
	}
}

func TestACallerOfAnotherUserNamespaceHearsWhyItIsRefused(t *testing.T) {
	v := &view{workload: identity.Workload{Foreign: "it is in another user namespace, where any user may take any uid"}}
	if got := v.refusal("node-1"); !strings.Contains(got, "no registration fits this caller, whose uid, gid and path don't count since it is in another user namespace") {
		t.Error(got)
	}
	v.workload.Foreign = ""
	if got := v.refusal("node-1"); strings.Contains(got, "namespace") {
		t.Error(got)
	}
}

func TestTheServersTimeIsHeardWithEveryAnswer(t *testing.T) {
	w := newWorld(t)
	w.ahead.Store(int64(24 * time.Hour))
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	n.ready(t)
	// Sync has told it.
	if err := n.link.clocksApart(); err == nil || !n.findings(t).Ready() {
		t.Errorf("after Sync: %v", err)
	}
	w.ahead.Store(0)
	leafOf(t, n.config.Socket)
	if err := n.link.clocksApart(); err != nil {
		t.Errorf("after Issue: %v", err)
	}
}
