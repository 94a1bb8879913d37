//go:build real

package hostile

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

// caller is who asks: a user of this machine, and the namespaces that are his own.
type caller struct {
	user   int
	spaces uintptr
}

var spaces = []struct {
	name string
	flag uintptr
}{{"PID", syscall.CLONE_NEWPID}, {"user", syscall.CLONE_NEWUSER}, {"mount", syscall.CLONE_NEWNS}, {"net", syscall.CLONE_NEWNET}}

func (c caller) String() string {
	own := []string{}
	for _, s := range spaces {
		if c.spaces&s.flag != 0 {
			own = append(own, s.name)
		}
	}
	if len(own) == 0 {
		own = []string{"no"}
	}
	return fmt.Sprintf("uid %d with %s namespace of its own", c.user, strings.Join(own, ", "))
}

// fetch asks as that caller, with the real command: the identity it gets, or why not.
func (c caller) fetch(t *testing.T, socket string) (id, refusal string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	args := []string{"svid", "fetch", "--socket", socket, "--timeout", "10s", "-o", "json"}
	if c.spaces&syscall.CLONE_NEWUSER != 0 {
		// As whom root's agent looks from there: the command must ask, so that it is the agent who refuses.
		args = append(args, "--agent-uid", "65534")
	}
	cmd := exec.CommandContext(ctx, signet, args...)
	var talk bytes.Buffer
	cmd.Dir, cmd.Stderr = "/", &talk
	//nolint:gosec // users of a test
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: c.spaces, Credential: &syscall.Credential{Uid: uint32(c.user), Gid: uint32(c.user)}}
	if c.spaces&syscall.CLONE_NEWUSER != 0 {
		// Inside it is root, which is what a user namespace is for.
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: c.user, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: c.user, Size: 1}}
		cmd.SysProcAttr.Credential = &syscall.Credential{NoSetGroups: true}
	}
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		return "", strings.TrimSpace(talk.String())
	} else if err != nil {
		t.Fatalf("%v: %v: %s", c, err, talk.String())
	}
	var got struct {
		ID string `json:"spiffe_id"`
	}
	if err := json.Unmarshal(out, &got); err != nil || got.ID == "" {
		t.Fatalf("%v: %v: %s", c, err, out)
	}
	return got.ID, ""
}

// startApart starts an agent by other means than a fork: in namespaces of its own.
func startApart(t *testing.T, name string, start func(args ...string) *exec.Cmd) *lab.Agent {
	t.Helper()
	rules := "registrations:\n"
	for _, user := range []int{0, crowdUser, 65534} {
		rules += fmt.Sprintf("  - { name: %s%d, spiffe_id: %s, agents: [%[1]s], selectors: ['unix:uid:%[2]d'] }\n", name, user, idOf(fmt.Sprintf("%s%d", name, user)))
	}
	err := site.Apply(t.Context(), rules)
	if err != nil {
		t.Fatal(err)
	}
	a, err := site.NewAgent(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(site.Lab.Dir, "east-"+name+".log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	runtime.LockOSThread() // which the agent dies with
	t.Cleanup(runtime.UnlockOSThread)
	cmd := start(signet, "agent", "--config", a.Config())
	cmd.Dir, cmd.Stdout, cmd.Stderr = site.Lab.Dir, log, log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	if err := cmd.Start(); err != nil {
		t.Skipf("no namespaces here: %v", err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if err := lab.Ready(t.Context(), "the agent "+name, a.HTTP); err != nil {
		text, _ := os.ReadFile(log.Name())
		t.Fatalf("%v\n%s", err, text)
	}
	return a
}

// TestNamespacesGiveNobodyAnotherIdentity asks from every combination of namespaces, of callers and of agents. The kernel
// says who asks in numbers of the agent's namespaces, so that a caller of another user namespace may look like anybody.
func TestNamespacesGiveNobodyAnotherIdentity(t *testing.T) {
	if !root() {
		t.Skip("needs root, to make namespaces")
	}
	type row struct {
		// agent tells where it runs; its log is the one of that name.
		agent, log, socket string
		// identity of a user in no user namespace of its own; "" = refused.
		identity func(user int) string
		// why is what a caller is told; the agent's log says what the callers' namespaces have to do with it.
		why, logged string
	}
	const nothing, unknown = "sees nothing", "could not tell who is calling"
	pidApart := func() string {
		return startApart(t, "pidns", func(args ...string) *exec.Cmd {
			return exec.Command("unshare", append([]string{"--pid", "--fork", "--kill-child", "--mount-proc"}, args...)...)
		}).Socket
	}
	userApart := func() string {
		return startApart(t, "userns", func(args ...string) *exec.Cmd {
			cmd := exec.Command(args[0], args[1:]...)
			one := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}} // so that all others look like 65534 to it
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: one, GidMappings: one}
			return cmd
		}).Socket
	}
	mountApart := func() string {
		return startApart(t, "mntns", func(args ...string) *exec.Cmd {
			return exec.Command("unshare", append([]string{"--mount", "--uts", "--ipc"}, args...)...)
		}).Socket
	}
	nobody := func(int) string { return "" }
	for _, r := range []row{
		{"an agent of the machine", "node-1", site.agent.Socket, func(user int) string {
			return map[int]string{0: idOf("me"), crowdUser: idOf(member(0))}[user]
		}, "no registration fits", "of another user namespace"},
		{"an agent with a PID namespace of its own", "pidns", pidApart(), nobody, unknown, "PID namespace that can't be seen from here"},
		{"an agent with a user namespace of its own", "userns", userApart(), nobody, nothing, "of another user namespace"},
		{"an agent with mount namespaces of its own", "mntns", mountApart(), func(user int) string {
			return map[int]string{0: idOf("mntns0"), crowdUser: idOf(fmt.Sprintf("mntns%d", crowdUser)), 65534: idOf("mntns65534")}[user]
		}, "no registration fits", "of another user namespace"},
	} {
		t.Run(r.agent, func(t *testing.T) {
			given, refused := 0, 0
			for _, user := range []int{0, crowdUser, 65534, 43999} {
				for set := range 1 << len(spaces) {
					c := caller{user: user}
					for i, s := range spaces {
						if set&(1<<i) != 0 {
							c.spaces |= s.flag
						}
					}
					want, why := r.identity(user), r.why
					if c.spaces&syscall.CLONE_NEWUSER != 0 {
						want = ""
						if why != unknown {
							why = nothing
						}
					}
					id, refusal := c.fetch(t, r.socket)
					switch {
					case id != want:
						t.Errorf("%v: got %q, want %q; refusal: %s", c, id, want, refusal)
					case want != "":
						given++
					case !strings.Contains(refusal, why):
						t.Errorf("%v: the refusal does not name %q: %s", c, why, refusal)
					default:
						refused++
					}
				}
			}
			if log, err := os.ReadFile(filepath.Join(site.Lab.Dir, "east-"+r.log+".log")); err != nil || !bytes.Contains(log, []byte(r.logged)) {
				t.Errorf("the agent's log does not name %q: %v", r.logged, err)
			}
			t.Logf("%d callers got their identity, %d were refused by name", given, refused)
		})
	}
}
