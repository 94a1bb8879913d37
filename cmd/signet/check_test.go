package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/test/lab"
)

// levels runs signet check and returns the worst level of each code, by its name.
func (h here) levels(args ...string) map[string]string {
	h.t.Helper()
	out, errs, _ := h.type_("", append([]string{"check", "-o", "json"}, args...)...)
	var shown struct {
		Findings []struct{ Code, Level, Message, Mend string }
	}
	if err := json.Unmarshal([]byte(out), &shown); err != nil {
		h.t.Fatalf("signet check %s: %v\n%s%s", strings.Join(args, " "), err, out, errs)
	}
	worst := map[string]string{}
	for _, f := range shown.Findings {
		// They come with the worst first.
		if _, ok := worst[f.Code]; !ok {
			worst[f.Code] = f.Level
		}
	}
	return worst
}

func TestCheckAndBansOnARunningCluster(t *testing.T) {
	lab.DevPorts(t)
	h := shortFolder(t)
	dir := h.path("dev")
	ready := await("Type next")
	stop := h.serve(ready, "--dev", "--dir", dir)
	server := filepath.Join(dir, "server.yaml")
	node := h.write("node.yaml", "state_dir: "+filepath.Join(dir, devAgentDir)+"\nsocket: "+filepath.Join(dir, "agent.sock")+"\n")
	// The agent may still be about to enrol; this waits for it.
	h.must(exitYes, "svid", "fetch", "--socket", filepath.Join(dir, "agent.sock"))
	want := func(got map[string]string, codes ...string) {
		t.Helper()
		for _, c := range codes {
			code, level, _ := strings.Cut(c, " ")
			if got[code] != level {
				t.Errorf("%s is %q, want %q: %v", code, got[code], level, got)
			}
		}
	}
	all := []string{"SGN1001 ok", "SGN1005 ok", "SGN1006 ok", "SGN1007 ok", "SGN1009 ok", "SGN1010 ok", "SGN1018 ok"}
	want(h.levels("--config", server), all...)
	// The server looks at its log too, and what it finds is not shown beside the same.
	out, _, _ := h.type_("", "check", "--config", server)
	if n := strings.Count(out, "the log's last entry"); n != 1 {
		t.Errorf("the clock is held against the log's last entry %d times:\n%s", n, out)
	}
	want(h.levels("--agent", node), "SGN1001 ok", "SGN1007 ok", "SGN1009 ok", "SGN1010 ok", "SGN1016 ok")

	out, _ = h.must(exitYes, "agent", "list", "--config", server, "-o", "name")
	name := strings.TrimPrefix(strings.TrimSpace(out), "agent/")
	for _, step := range []struct {
		verb, says, state string
		status            int
	}{
		{"unban", "was not banned", "enrolled", exitYes},
		{"ban --dry-run", "would be banned; this was a dry run: nothing is changed", "enrolled", exitYes},
		{"ban", "is banned", "banned", exitYes},
		{"ban --dry-run", "was banned already", "banned", exitYes},
		{"ban", "was banned already", "banned", exitYes},
		{"unban --dry-run", "would not be banned any more; this was a dry run: nothing is changed", "banned", exitYes},
		{"unban", "is not banned any more", "enrolled", exitYes},
	} {
		_, errs := h.must(step.status, append(append([]string{"agent"}, strings.Fields(step.verb)...), "--config", server, name)...)
		contains(t, errs, step.says)
		out, _ = h.must(exitYes, "agent", "list", "--config", server, "-o", "wide")
		contains(t, out, name, step.state, "SHA256:")
	}
	_, errs := h.must(exitNo, "agent", "ban", "--config", server, "nobody", "--dry-run")
	contains(t, errs, "not enrolled")
	_, errs = h.must(exitNo, "agent", "ban", "--config", server, "nobody")
	contains(t, errs, "not enrolled")
	create := []string{"join-token", "create", "--config", server, "--agent", "node-9", "--ttl", "1h"}
	for _, more := range [][]string{nil, {"--out", filepath.Join(dir, "node-9.token")}} {
		out, errs = h.must(exitYes, append(append(create[:len(create):len(create)], "--dry-run"), more...)...)
		contains(t, errs, "a join token for agent node-9 would be made, good until ", "; this was a dry run: nothing is changed")
		if _, err := os.Stat(filepath.Join(dir, "node-9.token")); out != "" || err == nil {
			t.Errorf("a token that is none: %q, %v", out, err)
		}
	}
	_, errs = h.must(exitCouldNotSay, "join-token", "create", "--config", server, "--agent", "Node 9", "--dry-run")
	contains(t, errs, "Node 9")
	if out, _ = h.must(exitYes, "join-token", "list", "--config", server); strings.Contains(out, "node-9") {
		t.Errorf("a dry run made a token:\n%s", out)
	}
	h.must(exitYes, create...)
	out, _ = h.must(exitYes, "join-token", "list", "--config", server, "-o", "name")
	token, _, _ := strings.Cut(strings.TrimPrefix(out, "join-token/"), "\n")
	for _, step := range []struct{ flag, says, state string }{
		{"--dry-run=true", "would be revoked; this was a dry run: nothing is changed", "usable"},
		{"--dry-run=false", "is revoked", "revoked"},
		{"--dry-run=true", "was revoked already", "revoked"},
		{"--dry-run=false", "was revoked already", "revoked"},
	} {
		_, errs = h.must(exitYes, "join-token", "revoke", "--config", server, token, step.flag)
		contains(t, errs, "join token "+token+" "+step.says)
		out, _ = h.must(exitYes, "join-token", "list", "--config", server)
		contains(t, out, step.state)
	}
	_, errs = h.must(exitNo, "join-token", "revoke", "--config", server, "0123456789abcdef", "--dry-run")
	contains(t, errs, "no join token")
	out, _ = h.must(exitYes, "__complete", "agent", "ban", "--config", server, "")
	contains(t, out, name+"\n")

	if status := stop(); status != exitYes {
		t.Fatalf("serve --dev ended with %d:\n%s", status, ready)
	}
	out, _ = h.must(exitYes, "log", "find", "--config", server, "--kind", "agent-banned", "-o", "json")
	contains(t, out, name)

	want(h.levels("--config", server), append(all[:4:4], "SGN1009 error", "SGN1010 ok", "SGN1018 ok")...)
	// The agent has seen the log contradict itself.
	evidence := filepath.Join(dir, devAgentDir, "checkpoint.evidence")
	if err := os.WriteFile(evidence, []byte("two checkpoints"), 0o600); err != nil {
		t.Fatal(err)
	}
	want(h.levels("--agent", node), "SGN1010 error")
	var db, checkpoint string
	if err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.Name() == "signet.db":
			db = path
		case path == filepath.Join(dir, devServerDir, "log", "checkpoint"):
			checkpoint = path
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(db, 0o644); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(checkpoint)
	if err != nil {
		t.Fatal(err)
	}
	text[len(text)-5] ^= 1
	if err := os.WriteFile(checkpoint, text, 0o644); err != nil {
		t.Fatal(err)
	}
	want(h.levels("--config", server), "SGN1001 error", "SGN1010 error")
	out, errs = h.must(exitNo, "check", "--config", server, "--fail-on", "error")
	contains(t, out, "× error", "√ ok", "chmod 600 "+db)
	if strings.Contains(out, "\x1b") {
		t.Error("there are colours where nobody sees them")
	}
	contains(t, errs, "findings")
}

func TestTheVerdictTellsFindingsFromWhatCouldNotBeTold(t *testing.T) {
	of := func(levels ...check.Level) (found check.Findings) {
		for _, l := range levels {
			found = append(found, check.Finding{Level: l})
		}
		return found
	}
	for _, try := range []struct {
		found check.Findings
		fail  check.Level
		want  int
	}{
		{of(check.OK, check.OK), check.Warning, exitYes},
		{of(check.OK, check.Warning), check.Warning, exitNo},
		{of(check.OK, check.Warning), check.Error, exitYes},
		{of(check.Error, check.Unknown), check.Error, exitNo},
		{of(check.OK, check.Unknown), check.Warning, exitCouldNotSay},
	} {
		err := verdict(try.found, try.fail)
		got := exitYes
		if _, ok := err.(noError); ok {
			got = exitNo
		} else if err != nil {
			got = exitCouldNotSay
		}
		if got != try.want {
			t.Errorf("%v, failing on %s: %d, want %d", try.found, try.fail, got, try.want)
		}
	}
}

func TestCheckNeedsToBeToldWhat(t *testing.T) {
	h := shortFolder(t)
	h.must(exitCouldNotSay, "check")
	h.must(exitCouldNotSay, "check", "--config", "a", "--agent", "b")
	_, errs := h.must(exitCouldNotSay, "check", "--config", "a", "--fail-on", "never")
	contains(t, errs, "warning or error")
}

func TestCheckAsksTheProcessForWhatOnlyItKnows(t *testing.T) {
	asked := 0
	door := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		if r.URL.Path != "/readyz" || r.Header.Get("Accept") != "application/json" {
			t.Errorf("asked %s as %s", r.URL, r.Header.Get("Accept"))
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprint(w, `{"ready":false,"findings":[{"code":"SGN1005","level":"error","about":"clock","message":"both times\u001b[31m"},
			{"code":"SGN1018","level":"warning","about":"i-1","message":"late","mend":"signet rotation status --config FILE"},
			{"code":"SGN1015","level":"error","about":"server","message":"away"},
			{"code":"SGN1001","level":"ok","about":"files","message":"well"}]}`)
	}))
	defer door.Close()
	address := strings.TrimPrefix(door.URL, "http://")
	found, ok := ownFindings(t.Context(), address, slices.Concat(rotationCodes, clockCodes))
	if !ok || len(found) != 2 || found[0].Level != check.Error || strings.Contains(found[0].Message, "\x1b") || found[1].Code != check.CodeSuccessor {
		t.Errorf("found %+v, %v", found, ok)
	}
	if named(found, "east.yaml"); found[1].Mend != "signet rotation status --config east.yaml" {
		t.Errorf("%q", found[1].Mend)
	}
	// An agent is asked for its clock, and how it gets on with its server.
	h := shortFolder(t)
	node := h.write("node.yaml", "state_dir: "+h.path("state")+"\nsocket: "+h.path("agent.sock")+"\nhttp: "+address+"\n")
	if got := h.levels("--agent", node); got["SGN1005"] != "error" || got["SGN1015"] != "error" || asked != 2 {
		t.Errorf("of the agent: %v, asked %d times", got, asked)
	}
	for _, wrong := range []string{"", "127.0.0.1:1"} {
		if _, ok := ownFindings(t.Context(), wrong, clockCodes); ok {
			t.Errorf("%q answers", wrong)
		}
	}
}

// Where the server is away, what the folder says of the rotation is found.
func TestCheckFindsWhatARotationWaitsForInAFolder(t *testing.T) {
	h := shortFolder(t)
	h.write("pass", "correct horse battery staple\n")
	east := h.write("east.yaml", fmt.Sprintf("trust_domain: example.org\ncluster: east\nkeystore: { passphrase_file: ./pass }\nlisten: { http: %q }\n", freeAddress(t)))
	h.must(exitYes, "cluster", "init", "--config", east)
	if got := h.levels("--config", east); got["SGN1019"] != "warning" || got["SGN1017"] != "error" {
		t.Errorf("a request that is not signed: %v", got)
	}
	out, _ := h.must(exitNo, "check", "--config", east)
	contains(t, out, "intermediate-1", "its request waits for a signature since", "signet cluster init --config "+east+" --csr-out CSR; ", "signet root sign",
		"nothing can be issued: no intermediate is active; intermediate-1, which is to take over, is not signed")
}
