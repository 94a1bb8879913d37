//go:build real

// Package e2e proves from outside, with the real binary, what an admin, a workload and an auditor are promised: what bad
// input gets, that nothing is lost, who gets which identity, and that secrets stay secret.
package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/test/lab"
)

// signet is the binary that all tests run; scratch is where they work. Both are short, for Unix sockets' sake.
var signet, scratch string

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	var err error
	if scratch, err = os.MkdirTemp("", "e2e"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(scratch)
	if err := os.Chmod(scratch, 0o755); err != nil { // other users run the binary too
		return 0, err
	}
	signet = filepath.Join(scratch, "signet")
	// Never with -race: each opening of a key would take seconds, and what runs in the process is raced by its own tests.
	if out, err := exec.Command("go", "build", "-o", signet, "github.com/signet-ca/signet/cmd/signet").CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build signet: %w\n%s", err, out)
	}
	// Indexes of logs are kept with the user.
	if err := os.Setenv("XDG_CACHE_HOME", filepath.Join(scratch, "cache")); err != nil {
		return 0, err
	}
	return theVault.During(m).Run(), nil
}

// world is an installation that is this test's own: an offline root in root/, cluster east with its intermediate, and
// cluster west, whose request is not signed yet.
type world struct {
	*lab.Lab
	east, west *lab.Cluster
}

// made is one such installation, made by the commands, of which every test gets a copy: it costs many key openings.
var made = sync.OnceValues(func() (*lab.Lab, error) {
	l, err := lab.New(filepath.Join(scratch, "made"), signet)
	if err != nil {
		return nil, err
	}
	east, err := l.NewCluster("east", "")
	if err != nil {
		return nil, err
	}
	west, err := l.NewCluster("west", "")
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	if err := errors.Join(l.MakeRoot(ctx), east.Join(ctx)); err != nil {
		return nil, err
	}
	_, err = west.Initialize(ctx)
	return l, err
})

var worlds struct {
	sync.Mutex
	n int
}

// newWorld copies the installation; extra is appended to the server's configuration.
func newWorld(t *testing.T, extra string) *world {
	t.Helper()
	from, err := made()
	if err != nil {
		t.Fatal(err)
	}
	worlds.Lock()
	worlds.n++
	dir := filepath.Join(scratch, fmt.Sprintf("w%d", worlds.n))
	worlds.Unlock()
	l, err := from.Copy(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Close()
		if !t.Failed() {
			os.RemoveAll(dir)
			return
		}
		logs, _ := filepath.Glob(filepath.Join(dir, "*-*.log"))
		for _, path := range logs {
			text, _ := os.ReadFile(path)
			t.Logf("%s ends with\n%s", filepath.Base(path), text[max(0, len(text)-3000):])
		}
	})
	east, err := l.Cluster("east", extra)
	if err != nil {
		t.Fatal(err)
	}
	west, err := l.Cluster("west", extra)
	if err != nil {
		t.Fatal(err)
	}
	return &world{Lab: l, east: east, west: west}
}

// path is in the world's folder.
func (w *world) path(elem ...string) string {
	return filepath.Join(append([]string{w.Dir}, elem...)...)
}

func (w *world) write(t *testing.T, name, text string) string {
	t.Helper()
	if err := w.Write(name, text); err != nil {
		t.Fatal(err)
	}
	return w.path(name)
}

func (w *world) serve(t *testing.T) *lab.Process {
	t.Helper()
	p, err := w.east.Serve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (w *world) agent(t *testing.T, name string, sockets ...string) *lab.Agent {
	t.Helper()
	a, err := w.east.StartAgent(t.Context(), name, sockets...)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (w *world) apply(t *testing.T, yaml string) {
	t.Helper()
	if err := w.east.Apply(t.Context(), yaml); err != nil {
		t.Fatal(err)
	}
}

// ran is what a command did.
type ran struct {
	args     []string
	code     int
	out, err string
}

func (r ran) String() string {
	return fmt.Sprintf("signet %s: exit status %d\nstdout: %s\nstderr: %s", strings.Join(r.args, " "), r.code, r.out, r.err)
}

// commandTime is what a command is given that hangs.
const commandTime = 90 * time.Second

// execute runs signet in a folder, by way of a wrapping command if there is one.
func execute(t *testing.T, dir string, wrap []string, args ...string) ran {
	t.Helper()
	argv := append(slices.Clone(wrap), append([]string{signet}, args...)...)
	ctx, cancel := context.WithTimeout(t.Context(), commandTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var out, talk bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &talk
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("signet %s: %v", strings.Join(args, " "), err)
	}
	return ran{args, cmd.ProcessState.ExitCode(), out.String(), talk.String()}
}

func (w *world) run(t *testing.T, args ...string) ran {
	t.Helper()
	return execute(t, w.Dir, nil, args...)
}

// must runs a command that must succeed and returns what it printed.
func (w *world) must(t *testing.T, args ...string) string {
	t.Helper()
	r := w.run(t, args...)
	if r.code != 0 {
		t.Fatal(r)
	}
	return r.out
}

// refuses runs a command that must fail with the given exit status, one clear sentence that says all these words, nothing
// on stdout, and no trace in the world's folder.
func (w *world) refuses(t *testing.T, code int, says []string, args ...string) {
	t.Helper()
	w.refusesWith(t, nil, code, says, args...)
}

func (w *world) refusesWith(t *testing.T, wrap []string, code int, says []string, args ...string) {
	t.Helper()
	changesNothing(t, w.Dir, func() ran {
		r := execute(t, w.Dir, wrap, args...)
		r.refused(t, code, says...)
		return r
	})
}

// changesNothing holds the folder before against the folder after. A server or an agent that runs meanwhile may have written what
// it writes behind: where nothing but that differs it is tried again, and the command must have done nothing in one try.
func changesNothing(t *testing.T, dir string, do func() ran) {
	t.Helper()
	for tries := 1; ; tries++ {
		before := snapshot(t, dir)
		r := do()
		after := snapshot(t, dir)
		if tries < 5 && behind(before, after) {
			time.Sleep(time.Second) // until the next checkpoint
			continue
		}
		unchanged(t, r, before, after)
		return
	}
}

// behind reports whether nothing differs but what others write some time after what it is about: a server its log, an agent what it
// has heard of that, what it is told, and in its cache what it gives.
func behind(before, after map[string]string) bool {
	differ := false
	for _, pair := range [][2]map[string]string{{before, after}, {after, before}} {
		for name, was := range pair[0] {
			if pair[1][name] == was {
				continue
			}
			base := filepath.Base(name)
			if !strings.Contains(name, "/log/") && !strings.Contains(name, "/cache/") && !strings.HasPrefix(base, durable.TempPrefix) &&
				!slices.Contains([]string{"checkpoint", "bundle.json", "registrations.json"}, base) {
				return false
			}
			differ = true
		}
	}
	return differ
}

// refused checks how a command has failed.
func (r ran) refused(t *testing.T, code int, says ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("want exit status %d: %v", code, r)
	}
	if r.out != "" {
		t.Errorf("there is talk on stdout: %v", r)
	}
	r.says(t, says...)
}

// says checks that stderr is one sentence, beside the operational log and the facts that a ceremony shows first.
func (r ran) says(t *testing.T, words ...string) {
	t.Helper()
	var sentence string
	for line := range strings.Lines(strings.TrimSpace(r.err)) {
		line = strings.TrimSuffix(line, "\n")
		switch name, _, fact := strings.Cut(line, ":  "); {
		case strings.HasPrefix(line, "signet: ") && sentence == "":
			sentence = line
		case strings.HasPrefix(line, "{") || strings.HasPrefix(line, "serving: ") || fact && name != "" && sentence == "":
		default:
			t.Errorf("stderr is not one sentence, it has %q: %v", line, r)
		}
	}
	if sentence == "" {
		t.Errorf("no sentence on stderr: %v", r)
	}
	for _, word := range words {
		if !strings.Contains(sentence, word) {
			t.Errorf("the sentence does not say %q: %v", word, r)
		}
	}
	for _, noise := range []string{"rpc error", "code = ", "%!", "<nil>", "panic", "goroutine", "0x", "SQLSTATE", "EOF"} {
		if strings.Contains(sentence, noise) {
			t.Errorf("the sentence says %q, which helps nobody: %v", noise, r)
		}
	}
	if len(sentence) > 600 {
		t.Errorf("a sentence of %d characters: %v", len(sentence), r)
	}
}

// snapshot is what a folder holds, by content: all but what the lab and running processes write, locks, what an agent hears of its
// workloads, SQLite's shared memory and journals, which come and go with who reads, and Tessera's note of what it has tidied up.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		base := filepath.Base(path)
		if base == "LOCK" || base == "acknowledged.json" || strings.HasSuffix(base, "-wal") || strings.HasSuffix(base, "-shm") || strings.HasPrefix(base, "gcState") || filepath.Dir(name) == "." && strings.HasSuffix(base, ".log") {
			return nil
		}
		files[name] = info.Mode().String()
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) { // it was renamed meanwhile
				delete(files, name)
				return nil
			}
			if err != nil {
				return err
			}
			files[name] += fmt.Sprintf(" %d bytes %x", len(data), sha256.Sum256(data))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func unchanged(t *testing.T, r ran, before, after map[string]string) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(before)) {
		if got, ok := after[name]; !ok {
			t.Errorf("%s is lost: %v", name, r)
		} else if got != before[name] {
			t.Errorf("%s was %s and is %s: %v", name, before[name], got, r)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(after)) {
		if _, ok := before[name]; !ok {
			t.Errorf("%s was left behind: %v", name, r)
		}
	}
}

// untilLogged waits until a checkpoint covers what is now in the log of a server that runs.
func (w *world) untilLogged(t *testing.T, c *lab.Cluster) {
	t.Helper()
	size := metric(t, c, "signet_log_size_entries")
	until(t, "a checkpoint of "+c.Name+"'s log", time.Minute, func() error {
		lines := strings.Split(readFile(t, c.Path("state", "log", "checkpoint")), "\n")
		if n, err := strconv.ParseFloat(lines[1], 64); err != nil || n < size {
			return fmt.Errorf("it is for %s of %v entries: %w", lines[1], size, err)
		}
		return nil
	})
}
