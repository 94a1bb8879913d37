//go:build real

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

func uid() string { return strconv.Itoa(os.Getuid()) }

// withoutHints takes the two lines away by which log commands say that they trust the folder's own key.
func withoutHints(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "the verifier key is the folder's own") && !strings.HasPrefix(line, "  --key ") {
			b.WriteString(line)
		}
	}
	return b.String()
}

func TestProcessesOfDifferentUsersGetTheirOwnIdentityAndNeverTheOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to start processes of other users")
	}
	w := newWorld(t, "")
	w.serve(t)
	w.apply(t, `registrations:
  - { name: first,  spiffe_id: spiffe://example.org/first,  agents: [node-1], selectors: ["unix:uid:31001"] }
  - { name: second, spiffe_id: spiffe://example.org/second, agents: [node-1], selectors: ["unix:uid:31002"] }
  - { name: group,  spiffe_id: spiffe://example.org/group,  agents: [node-1], selectors: ["unix:uid:31002", "unix:supplementary_gid:31099"], priority: 5 }
`)
	a := w.agent(t, "node-1")
	// The folder of the socket decides who may reach it.
	for _, dir := range []string{w.Dir, w.east.Path(), filepath.Dir(a.Socket)} {
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	fetch := func(user uint32, groups []uint32, args ...string) ran {
		cmd := exec.Command(signet, append([]string{"svid", "fetch", "--socket", a.Socket, "-o", "json"}, args...)...)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user, Groups: groups}}
		var out, talk bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &talk
		_ = cmd.Run()
		return ran{args, cmd.ProcessState.ExitCode(), out.String(), talk.String()}
	}
	id := func(r ran) string {
		var v struct {
			SPIFFEID string `json:"spiffe_id"`
			Serial   string `json:"serial"`
		}
		if r.code != 0 || json.Unmarshal([]byte(r.out), &v) != nil {
			return ""
		}
		return v.SPIFFEID
	}
	// At the same time, over and over, so that a mix-up between connections would show.
	var work sync.WaitGroup
	for user, want := range map[uint32]string{31001: "spiffe://example.org/first", 31002: "spiffe://example.org/second"} {
		work.Go(func() {
			for range 5 {
				if r := fetch(user, nil); id(r) != want {
					t.Errorf("user %d: %v", user, r)
				}
			}
		})
	}
	work.Go(func() {
		for range 5 {
			r := fetch(31003, nil)
			r.refused(t, 1, "no registration fits", "unix:uid:31003", "registration apply")
		}
	})
	work.Wait()

	// By its name, another's identity is not had either.
	r := fetch(31001, nil, "--spiffe-id", "spiffe://example.org/second", "--timeout", "2s")
	r.refused(t, 2, "spiffe://example.org/second")
	// A supplementary group adds an identity, of a higher priority; both can be had by name.
	groups := []uint32{31099}
	if r := fetch(31002, groups); id(r) != "spiffe://example.org/group" {
		t.Error(r)
	}
	if r := fetch(31002, groups, "--spiffe-id", "spiffe://example.org/second"); id(r) != "spiffe://example.org/second" {
		t.Error(r)
	}
	if r := fetch(31001, groups); id(r) != "spiffe://example.org/first" {
		t.Error(r)
	}
	// Who was given what is in the log, with who asked.
	var entries []struct {
		SPIFFEID  string   `json:"spiffe_id"`
		Selectors []string `json:"selectors"`
		Agent     string   `json:"agent"`
	}
	w.untilLogged(t, w.east)
	if err := json.Unmarshal([]byte(w.must(t, "log", "find", "--config", w.east.Config(), "--agent", "node-1", "--kind", "certificate-issued", "-o", "json")), &entries); err != nil {
		t.Fatal(err)
	}
	uids := map[string]string{"first": "31001", "second": "31002", "group": "31002"}
	for name, user := range uids {
		found := false
		for _, e := range entries {
			if e.SPIFFEID == "spiffe://example.org/"+name {
				found = found || strings.Contains(fmt.Sprint(e.Selectors), "unix:uid:"+user)
				if strings.Contains(fmt.Sprint(e.Selectors), "unix:uid:31003") {
					t.Errorf("%s was given to a process with %v", name, e.Selectors)
				}
			}
		}
		if !found {
			t.Errorf("the log does not say that %s was given to user %s: %+v", name, user, entries)
		}
	}
}
