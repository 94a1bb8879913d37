package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/test/lab"
)

const (
	// serveLimit bounds how long a client waits for its first secrets, in seconds.
	serveLimit = 120
	// perProcess sidecars are in one client process at most: an agent bounds the streams of one.
	perProcess = 500
)

// crowds are client processes that work as one.
type crowds []*child

// gather starts the processes of a crowd; they wait for arrive.
func gather(c crowd) (crowds, error) {
	var all crowds
	sockets := c.Sockets
	for left, at := c.Sidecars, 0; left > 0; {
		n := min(left, perProcess)
		one := c
		one.Sidecars, one.Within = n, serveLimit
		one.Sockets = make([]string, n)
		for i := range n {
			one.Sockets[i] = sockets[(at+i)%len(sockets)]
		}
		if c.Deaf > 0 {
			one.Deaf = c.Deaf * n / c.Sidecars
		}
		ch, err := start("crowd", partConfig{Crowd: &one})
		if err != nil {
			all.end()
			return nil, err
		}
		all = append(all, ch)
		left, at = left-n, at+n
	}
	return all, nil
}

// arrive lets all begin at once and adds up what they report.
func (cs crowds) arrive(ctx context.Context) (arrival, error) {
	time.Sleep(500 * time.Millisecond) // until all processes wait for the word
	for _, c := range cs {
		if err := c.say("go"); err != nil {
			return arrival{}, err
		}
	}
	sum := arrival{Sizes: map[string]int{}}
	for _, c := range cs {
		var a arrival
		if err := c.hear(ctx, (serveLimit+10)*time.Second, &a); err != nil {
			return arrival{}, err
		}
		sum.Served += a.Served
		sum.Millis = append(sum.Millis, a.Millis...)
		sum.Errors = append(sum.Errors, a.Errors...)
		for k, v := range a.Sizes {
			sum.Sizes[k] = v
		}
	}
	slices.Sort(sum.Millis)
	return sum, nil
}

func (cs crowds) end() {
	for _, c := range cs {
		c.end()
	}
}

// at is a quantile of sorted values.
func at(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// node is a cluster with registrations for many dedicated sockets, whose agents are started as they are needed.
type node struct {
	lab     *lab.Lab
	cluster *lab.Cluster
	server  *lab.Process
	sockets []string // names
	agents  int
}

const mostAgents = 12

func newNode(ctx context.Context, b *bench, name string, identities int) (*node, error) {
	l, c, err := newCluster(ctx, b, name, hourlyLeaves)
	if err != nil {
		return nil, err
	}
	n := &node{lab: l, cluster: c}
	if n.server, err = c.Serve(ctx); err != nil {
		l.Close()
		return nil, err
	}
	var names, text strings.Builder
	for i := range mostAgents {
		fmt.Fprintf(&names, "node-%d, ", i)
	}
	text.WriteString("registrations:\n")
	for i := range identities {
		s := "s" + strconv.Itoa(i)
		n.sockets = append(n.sockets, s)
		fmt.Fprintf(&text, "  - { name: %[1]s, spiffe_id: spiffe://%[2]s/ns/bench/sa/%[1]s, agents: [%[3]s], selectors: [\"socket:%[1]s\"] }\n",
			s, lab.TrustDomain, strings.TrimSuffix(names.String(), ", "))
	}
	if err := c.Apply(ctx, text.String()); err != nil {
		l.Close()
		return nil, err
	}
	return n, nil
}

// agent starts a new one, on which nobody has an identity yet, and returns the paths of its sockets.
func (n *node) agent(ctx context.Context, identities int) (*lab.Agent, []string, error) {
	if n.agents == mostAgents {
		return nil, nil, fmt.Errorf("more than %d agents", mostAgents)
	}
	name := "node-" + strconv.Itoa(n.agents)
	n.agents++
	a, err := n.cluster.StartAgent(ctx, name, n.sockets[:identities]...)
	if err != nil {
		return nil, nil, err
	}
	var paths []string
	for _, s := range n.sockets[:identities] {
		paths = append(paths, n.cluster.Path("run", s+".sock"))
	}
	return a, paths, nil
}

// bareOn starts the bare server.
func bareOn(ctx context.Context, b *bench, sizes map[string]int) (*child, string, error) {
	socket := filepath.Join(b.dir, "bare.sock")
	_ = os.Remove(socket)
	ch, err := start("bare", partConfig{Socket: socket, Sizes: sizes})
	if err != nil {
		return nil, "", err
	}
	return ch, socket, ch.hear(ctx, 10*time.Second, &struct{}{})
}

// coldStart opens all sidecars of a node at once on an agent that has issued nothing yet: attest, make a key, ask the
// server, log, sign, check, push. The floor is the bare server, whose answers are made before.
//
// The largest crowd has 20,000 streams on 10,000 connections where the agent may open as many files as that takes: two for
// each connection, itself and what holds the process behind it, one for each dedicated socket, and a quarter of the places
// is kept for other users. That is 28,000 files.
func coldStart(ctx context.Context, b *bench) ([]figure, error) {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return nil, err
	}
	const identities, perSidecar, others = 1000, 2, 300
	most := min(10_000, (int(min(files.Cur, 1<<20))-others-identities)/perSidecar*3/4/100*100)
	shapes := []struct{ sidecars, identities, runs int }{{100, 100, 3}, {1000, identities, 3}, {most, identities, 1}}
	if b.quick {
		shapes = []struct{ sidecars, identities, runs int }{{50, 50, 1}}
	}
	n, err := newNode(ctx, b, "cold", shapes[len(shapes)-1].identities)
	if err != nil {
		return nil, err
	}
	defer n.lab.Close()
	var figures []figure
	for _, s := range shapes {
		var p50, p99, floors, work []float64
		served := 0
		for range s.runs {
			a, sockets, err := n.agent(ctx, s.identities)
			if err != nil {
				return nil, err
			}
			before, err := cpuOf(a.PID(), n.server.PID())
			if err != nil {
				return nil, err
			}
			got, err := arriveAt(ctx, crowd{Sockets: sockets, Sidecars: s.sidecars, Names: []string{ownName, trustName}})
			if err != nil {
				return nil, err
			}
			after, err := cpuOf(a.PID(), n.server.PID())
			if err != nil {
				return nil, err
			}
			work = append(work, (after-before)/float64(s.sidecars))
			if len(got.Errors) > 0 {
				fmt.Fprintf(os.Stderr, "cold start of %d: %s\n", s.sidecars, strings.Join(got.Errors[:min(3, len(got.Errors))], "; "))
			}
			a.Stop()
			served += got.Served
			p50, p99 = append(p50, at(got.Millis, 0.5)), append(p99, at(got.Millis, 0.99))
			bare, socket, err := bareOn(ctx, b, got.Sizes)
			if err != nil {
				return nil, err
			}
			floor, err := arriveAt(ctx, crowd{Sockets: []string{socket}, Sidecars: s.sidecars, Names: []string{ownName, trustName}})
			bare.end()
			if err != nil {
				return nil, err
			}
			floors = append(floors, at(floor.Millis, 0.99))
		}
		what := fmt.Sprintf("cold start of %d sidecars at once, two streams each, %d new identities", s.sidecars, s.identities)
		figures = append(figures,
			figure{Name: what + ": p99", Value: median(p99), Unit: "ms"}.against(median(floors), 0).spread(p99),
			figure{Name: what + ": p50", Value: median(p50), Unit: "ms"}.spread(p50),
			figure{Name: what + ": CPU of agent and server per sidecar", Value: median(work), Unit: "µs CPU"}.spread(work),
			figure{Name: what + ": served, at least", Value: 100 * float64(served) / float64(s.sidecars*s.runs), Unit: "%"}.atLeast(100))
	}
	return figures, nil
}

func cpuOf(pids ...int) (sum float64, err error) {
	for _, pid := range pids {
		v, err := cpuMicros(pid)
		if err != nil {
			return 0, err
		}
		sum += v
	}
	return sum, nil
}

func arriveAt(ctx context.Context, c crowd) (arrival, error) {
	cs, err := gather(c)
	if err != nil {
		return arrival{}, err
	}
	defer cs.end()
	return cs.arrive(ctx)
}

// memory is what a sidecar costs the agent: what is live after a collection, by the benchmark beside the SDS server, and what
// the real agent's process grows by, each against a bare server with the same connections.
func memory(ctx context.Context, b *bench) ([]figure, error) {
	runs, sidecars := 3, 1000
	if b.quick {
		runs, sidecars = 1, 100
	}
	live, err := goBench(ctx, os.Environ(), "./sds", "BenchmarkMemoryPerSidecar", "1x", runs)
	if err != nil {
		return nil, err
	}
	ratios := live["ratio"]
	if len(ratios) == 0 {
		return nil, fmt.Errorf("BenchmarkMemoryPerSidecar printed no ratio")
	}
	mid := slices.Index(ratios, median(ratios))
	figures := []figure{
		figure{
			Name: "live memory per sidecar (one connection, two streams) in the SDS server, after a collection", Value: live["KiB/sidecar"][mid], Unit: "KiB",
		}.against(live["KiB-floor"][mid], 1.3).spread(ratios),
	}

	n, err := newNode(ctx, b, "memory", sidecars)
	if err != nil {
		return nil, err
	}
	defer n.lab.Close()
	var own, floors, resident []float64
	for range runs {
		a, sockets, err := n.agent(ctx, sidecars)
		if err != nil {
			return nil, err
		}
		grown, sizes, err := growth(ctx, a.PID(), crowd{Sockets: sockets, Sidecars: sidecars, Names: []string{ownName, trustName}})
		a.Stop()
		if err != nil {
			return nil, err
		}
		bare, socket, err := bareOn(ctx, b, sizes)
		if err != nil {
			return nil, err
		}
		floor, _, err := growth(ctx, bare.pid(), crowd{Sockets: []string{socket}, Sidecars: sidecars, Names: []string{ownName, trustName}})
		bare.end()
		if err != nil {
			return nil, err
		}
		own, floors, resident = append(own, grown/float64(sidecars)), append(floors, floor/float64(sidecars)), append(resident, grown/floor)
	}
	mid = slices.Index(resident, median(resident))
	return append(figures, figure{
		Name: fmt.Sprintf("resident memory per sidecar in a real agent, %d sidecars, an identity each, garbage included", sidecars), Value: own[mid], Unit: "KiB",
	}.against(floors[mid], 1.3).spread(resident)), nil
}

// growth is by how many KiB a process has grown when all are served.
func growth(ctx context.Context, pid int, c crowd) (float64, map[string]int, error) {
	before, err := residentKiB(pid)
	if err != nil {
		return 0, nil, err
	}
	cs, err := gather(c)
	if err != nil {
		return 0, nil, err
	}
	defer cs.end()
	got, err := cs.arrive(ctx)
	if err != nil {
		return 0, nil, err
	}
	if got.Served != c.Sidecars {
		return 0, nil, fmt.Errorf("%d of %d sidecars were served: %v", got.Served, c.Sidecars, got.Errors)
	}
	time.Sleep(time.Second)
	after, err := residentKiB(pid)
	return after - before, got.Sizes, err
}

func residentKiB(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64)
		}
	}
	return 0, fmt.Errorf("process %d has no VmRSS", pid)
}

// trustChange tells 10,000 streams, each on a connection of its own, of another bundle. The agent's SDS server runs in a
// process of its own, with a source of trust that changes at a word, so that nothing else is in the time.
func trustChange(ctx context.Context, b *bench) ([]figure, error) {
	streams, rounds := 10_000, 5
	if b.quick {
		streams, rounds = 500, 2
	}
	medians, spreads := map[string]float64{}, map[string][]float64{}
	sizes := map[string]int{}
	for _, shape := range []struct {
		name, part string
		deaf       int
	}{{"sds", "sds", 0}, {"bare", "bare", 0}, {"deaf", "sds", streams / 100}} {
		var server *child
		var socket string
		var err error
		if shape.part == "bare" {
			server, socket, err = bareOn(ctx, b, sizes)
		} else {
			socket = filepath.Join(b.dir, "sds.sock")
			_ = os.Remove(socket)
			if server, err = start("sds", partConfig{Socket: socket}); err == nil {
				err = server.hear(ctx, 10*time.Second, &struct{}{})
			}
		}
		if err != nil {
			return nil, err
		}
		times, got, err := pushRounds(ctx, server, crowd{Sockets: []string{socket}, Sidecars: streams, Names: []string{trustName}, Deaf: shape.deaf}, rounds)
		server.end()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", shape.name, err)
		}
		medians[shape.name], spreads[shape.name], sizes = median(times), times, got
	}
	return []figure{
		figure{Name: fmt.Sprintf("a trust change to %d streams until all have acknowledged", streams), Value: medians["sds"], Unit: "ms"}.
			against(medians["bare"], 1.5).spread(scaled(spreads["sds"], 1/medians["bare"])),
		figure{Name: fmt.Sprintf("a trust change to %d streams, of which %d neither read nor answer, until the others have acknowledged", streams, streams/100), Value: medians["deaf"], Unit: "ms"}.
			against(medians["sds"], 0).spread(scaled(spreads["deaf"], 1/medians["sds"])),
	}, nil
}

func scaled(v []float64, by float64) []float64 {
	out := make([]float64, len(v))
	for i := range v {
		out[i] = v[i] * by
	}
	return out
}

func pushRounds(ctx context.Context, server *child, c crowd, rounds int) ([]float64, map[string]int, error) {
	cs, err := gather(c)
	if err != nil {
		return nil, nil, err
	}
	defer cs.end()
	got, err := cs.arrive(ctx)
	if err != nil {
		return nil, nil, err
	}
	if got.Served != c.Sidecars {
		return nil, nil, fmt.Errorf("%d of %d streams were served: %v", got.Served, c.Sidecars, got.Errors)
	}
	deaf := 0
	for n := c.Sidecars; n > 0; n -= perProcess {
		deaf += c.Deaf * min(n, perProcess) / c.Sidecars
	}
	var times []float64
	for range rounds {
		var p pushed
		want := int64(c.Sidecars - deaf)
		if err := server.tell(ctx, fmt.Sprintf("push %d", want), pushLimit+20*time.Second, &p); err != nil {
			return nil, nil, err
		}
		if p.Acked < want {
			return nil, nil, fmt.Errorf("%d of %d streams have acknowledged within %s", p.Acked, want, pushLimit)
		}
		times = append(times, p.Millis)
	}
	return times, got.Sizes, nil
}
