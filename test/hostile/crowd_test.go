//go:build real

package hostile

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/test/lab"
)

// restore takes away all registrations but those that all tests count on.
func restore(ctx context.Context) error {
	const file = "registrations.yaml"
	if err := site.Lab.Write(site.Name+"/"+file, site.rules); err != nil {
		return err
	}
	_, err := site.Lab.Run(ctx, "registration", "apply", "--config", site.Config(), "-f", site.Path(file), "--prune")
	return err
}

// TestMistake11TwoHundredWorkloadsAndNeverAForeignSecret lets 200 workloads of one agent come and go, ask for their own and
// for each other's names, while registrations change, and looks at the name in every certificate that any of them gets.
func TestMistake11TwoHundredWorkloadsAndNeverAForeignSecret(t *testing.T) {
	const length, most = 8 * time.Second, time.Minute
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	ctx, cancel := context.WithTimeout(t.Context(), most)
	defer cancel()
	var secrets, foreign, refused atomic.Int64
	var had sync.Map
	seen := func() (n int) {
		had.Range(func(any, any) bool { n++; return true })
		return n
	}
	enough := func() bool { return secrets.Load() >= crowd && seen() >= crowd/2 }
	time.AfterFunc(length, func() { // and so long that it proves something
		for !enough() && ctx.Err() == nil {
			time.Sleep(100 * time.Millisecond)
		}
		cancel()
	})
	path := func(i int) string {
		if root() {
			return site.agent.Socket
		}
		return site.Path("run", member(i)+".sock")
	}
	// What a workload may have: its own identity, and the shared one that half of them have had at some time.
	may := func(i int, id string) bool { return id == idOf(member(i)) || id == idOf("shared") && i%2 == 0 }
	wander := func(r *rand.Rand, i int) {
		call, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
		defer cancel()
		s, conn, err := stream(call, func() (net.Conn, error) { return as(crowdUser+i, path(i)) })
		if err != nil {
			return
		}
		defer conn.Close()
		names := []string{idOf(member(i)), idOf(member(r.IntN(crowd))), idOf("admin"), "default", idOf("shared"), idOf("me"), "ROOTCA"}
		for range 1 + r.IntN(4) {
			r.Shuffle(len(names), func(a, b int) { names[a], names[b] = names[b], names[a] })
			if r.IntN(2) == 0 { // as an honest one would, among others
				own := slices.Index(names, idOf(member(i)))
				names[0], names[own] = names[own], names[0]
			}
			if subscribe(s, names[:1+r.IntN(len(names))]...) != nil {
				break
			}
			for range r.IntN(3) {
				got, err := s.Recv()
				if err != nil {
					if c := status.Code(err); c == codes.PermissionDenied {
						refused.Add(1)
					}
					return
				}
				ids, err := identities(got)
				if err != nil {
					t.Errorf("workload %d: %v", i, err)
				}
				for _, id := range ids {
					secrets.Add(1)
					had.Store(i, true)
					if !may(i, id) {
						foreign.Add(1)
						t.Errorf("workload %d got %s", i, id)
					}
				}
				if r.IntN(2) == 0 {
					break // without reading the rest
				}
			}
		}
	}
	var work sync.WaitGroup
	next := atomic.Int64{}
	for w := range 16 {
		work.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(w))) //nolint:gosec // a test's choices
			for ctx.Err() == nil {
				i := int(next.Add(1)-1) % crowd
				if r.IntN(3) == 0 {
					i = r.IntN(crowd)
				}
				wander(r, i)
			}
		})
	}
	// Meanwhile a registration that every second workload fits comes, changes and goes.
	gone := func() {
		if err := restore(context.WithoutCancel(ctx)); err != nil {
			t.Errorf("apply: %v", err)
		}
	}
	work.Go(func() {
		defer gone()
		for n := 0; ctx.Err() == nil; n++ {
			if n%4 == 3 {
				gone()
				time.Sleep(500 * time.Millisecond)
				continue
			}
			rules := "registrations:\n"
			for i := range crowd / 2 {
				i *= 2
				selector := "socket:" + member(i)
				if root() {
					selector = fmt.Sprintf("unix:uid:%d", crowdUser+i)
				}
				rules += fmt.Sprintf("  - { name: shared%d, spiffe_id: %s, agents: [node-1], selectors: [%q], priority: %d }\n", i, idOf("shared"), selector, n%3)
			}
			if err := site.Apply(context.WithoutCancel(ctx), rules); err != nil {
				t.Errorf("apply: %v", err)
			}
			time.Sleep(500 * time.Millisecond)
		}
	})
	work.Wait()
	if err := lab.Until(t.Context(), "what is gone is nobody's default", 2*time.Minute, func() error {
		for i := range crowd {
			if ids, err := visit(t.Context(), crowdUser+i, path(i)); err != nil || !slices.Equal(ids, []string{idOf(member(i))}) {
				return fmt.Errorf("workload %d got %v (%v)", i, ids, err)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	t.Logf("%d secrets to %d workloads, %d of them foreign; %d streams refused", secrets.Load(), seen(), foreign.Load(), refused.Load())
	if !enough() {
		t.Errorf("%d secrets to %d workloads prove little", secrets.Load(), seen())
	}
}

func TestMistake10NoSocketWithoutAPath(t *testing.T) {
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]string{}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) == 8 {
			names["socket:["+f[6]+"]"] = f[7]
		}
	}
	ours := []string{}
	for _, pid := range []int{site.server.PID(), site.agent.PID()} {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil || len(fds) == 0 {
			t.Fatalf("no descriptors of process %d: %v", pid, err)
		}
		for _, fd := range fds {
			to, err := os.Readlink(fd)
			if name, ok := names[to]; err == nil && ok {
				ours = append(ours, name)
				if strings.HasPrefix(name, "@") {
					t.Errorf("process %d has the abstract socket %s", pid, name)
				}
			}
		}
	}
	if len(ours) < 2 {
		t.Errorf("only %q are ours", ours)
	}
}

func TestMistake28NothingIsWrittenThroughALink(t *testing.T) {
	outside := filepath.Join(site.Path(), "outside")
	if err := os.MkdirAll(outside, 0o700); err != nil {
		t.Fatal(err)
	}
	victim := filepath.Join(outside, "victim")
	if err := os.WriteFile(victim, []byte("untouched"), 0o600); err != nil {
		t.Fatal(err)
	}
	state := site.Path("swapped")
	if err := os.MkdirAll(state, 0o700); err != nil {
		t.Fatal(err)
	}
	conf := "state_dir: ./swapped\njoin_token_file: ./swapped.token\nsocket: ./run/swapped.sock\n"
	if err := site.Lab.Write("east/swapped.yaml", conf); err != nil {
		t.Fatal(err)
	}
	// Whoever may write to these folders is the agent's own user; even so no link may lead a write out of them.
	paths := []string{
		filepath.Join(state, "enrolment"), filepath.Join(state, "bundle"), filepath.Join(state, "seal"), filepath.Join(state, "LOCK"),
		filepath.Join(state, "keys"), filepath.Join(state, "checkpoint"), site.Path("run", "swapped.sock"),
	}
	if entries, err := os.ReadDir(site.Path("node-1")); err == nil { // the names that an agent really writes
		for _, e := range entries {
			if p := filepath.Join(state, e.Name()); !slices.Contains(paths, p) {
				paths = append(paths, p)
			}
		}
	}
	const least = 1000 // swaps that prove something
	var swaps atomic.Int64
	served := 0
	for i, path := range paths {
		token, err := site.Token(t.Context(), "swapped")
		if err == nil {
			err = site.Lab.Write("east/swapped.token", token)
		}
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		var work sync.WaitGroup
		work.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-done:
					return
				default:
				}
				// Made beside and put over what is there, so that it is never seen half done.
				temp := path + ".swap"
				if os.Symlink([]string{victim, outside}[n%2], temp) == nil && os.Rename(temp, path) == nil {
					swaps.Add(1)
				}
				_ = os.Remove(temp)
				if n%3 == 0 {
					_ = os.Remove(path)
					time.Sleep(time.Duration(n%7) * time.Millisecond)
				}
			}
		})
		p, err := site.Lab.Start("swapped", "agent", "--config", site.Path("swapped.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(600 * time.Millisecond)
		if syscall.Kill(p.PID(), 0) == nil {
			served++
		}
		for end := time.Now().Add(10 * time.Second); swaps.Load() < int64(least*(i+1)/len(paths)) && time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
		}
		p.Kill()
		close(done)
		work.Wait()
		_ = os.RemoveAll(path)
	}
	t.Logf("%d swaps of %d paths; the agent lived through %d of them", swaps.Load(), len(paths), served)
	if swaps.Load() < least || served == 0 {
		t.Error("that proves little")
	}
	text, err := os.ReadFile(victim)
	if err != nil || string(text) != "untouched" {
		t.Errorf("the victim holds %q, %v", text, err)
	}
	info, err := os.Stat(victim)
	if err != nil || info.Mode().Perm() != 0o600 || info.Sys().(*syscall.Stat_t).Nlink != 1 {
		t.Errorf("the victim is %v, %v", info, err)
	}
	if entries, err := os.ReadDir(outside); err != nil || len(entries) != 1 {
		t.Errorf("outside holds %v, %v", entries, err)
	}
	if info, err := os.Stat(outside); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("outside is %v, %v", info, err)
	}
}
