package main

import (
	"context"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
)

const (
	// perCall is as many certificates as an agent asks for in one call.
	perCall = 50
	// mostOfCore is what a re-issue at its default rate may take from one core, in percent: the rest stays for the leaves
	// that are renewed in their turn.
	mostOfCore = 25
)

// reissued is what one taint has cost.
type reissued struct {
	leaves int
	// took is from the taint until the last leaf was replaced; window is what the server gave.
	took, window time.Duration
	// cpu and idle are the server's, in µs: in that time, and a second without a taint.
	cpu, idle float64
	// late is how many came more than a second after their agent's window; busiest is how many came within one second.
	late, busiest int
}

// reissue taints the issuer of many leaves, which another one has succeeded: once as fast as the server can, and once at
// the rate that the configuration sets by default.
func reissue(ctx context.Context, b *bench) ([]figure, error) {
	agents, each, slowly := 100, 100, 60
	if b.quick {
		agents, each, slowly = 20, 20, 40
	}
	before, err := leafFloor()
	if err != nil {
		return nil, err
	}
	fast, err := taint(ctx, b, "reissue-fast", agents, each, 1_000_000)
	if err != nil {
		return nil, err
	}
	after, err := leafFloor()
	if err != nil {
		return nil, err
	}
	const rate = 200 // the default
	bounded, err := taint(ctx, b, "reissue-bounded", agents, slowly, rate)
	if err != nil {
		return nil, err
	}
	floor := (before + after) / 2
	share := func(micros float64, in time.Duration) float64 { return 100 * micros / float64(in.Microseconds()) }
	fastest := fmt.Sprintf("re-issue of %d leaves on %d agents after a taint, at full speed", fast.leaves, agents)
	slowest := fmt.Sprintf("re-issue of %d leaves on %d agents after a taint, at %d/s", bounded.leaves, agents, rate)
	figures := []figure{
		figure{Name: fastest, Value: float64(fast.leaves) / fast.took.Seconds(), Unit: "certificates/s"}.against(1e6/floor*float64(runtime.NumCPU()), 0),
		figure{Name: fastest + ": server CPU per certificate", Value: fast.cpu / float64(fast.leaves), Unit: "µs CPU"}.against(floor, 0),
		figure{Name: slowest + ": replaced within the window, at least", Value: 100 * float64(bounded.leaves-bounded.late) / float64(bounded.leaves), Unit: "%"}.atLeast(100),
		figure{Name: slowest + ": in the busiest second", Value: float64(bounded.busiest), Unit: "certificates"}.against(rate, 0),
		figure{Name: slowest + ": CPU of the server, of one core", Value: share(bounded.cpu, bounded.took), Unit: "%"}.atMost(mostOfCore),
		{Name: slowest + ": CPU of the server before the taint, of one core", Value: share(bounded.idle, time.Second), Unit: "%"},
	}
	return append(figures, reissueSpread(rate)...), nil
}

// reissueSpread simulates the taint of an issuer of 100,000 leaves.
func reissueSpread(rate int) []figure {
	const fleet = 100_000
	from := time.Unix(0, 0)
	window := rotation.ReissueWindow(fleet, float64(rate))
	seconds := make([]int, int(window/time.Second)+1)
	late := 0
	for i := range fleet {
		at := rotation.ReissueAt(binary.BigEndian.AppendUint64(nil, uint64(i)), from, window).Sub(from)
		if at > window {
			late++
			continue
		}
		seconds[at/time.Second]++
	}
	what := fmt.Sprintf("re-issue of 100,000 leaves after a taint, at %d/s (simulated, %s)", rate, window)
	return []figure{
		figure{Name: what + ": within the window, at least", Value: 100 * float64(fleet-late) / fleet, Unit: "%"}.atLeast(100),
		figure{Name: what + ": in the busiest second", Value: float64(slices.Max(seconds)), Unit: "certificates"}.against(float64(rate), 1.5),
	}
}

// taint sets up a cluster whose agents hold leaves of intermediate-1, puts intermediate-2 in its place, and taints the first.
func taint(ctx context.Context, b *bench, name string, agents, each, rate int) (reissued, error) {
	r := reissued{leaves: agents * each}
	l, c, err := newCluster(ctx, b, name, hourlyLeaves+"rotation: { reissue_rate: "+strconv.Itoa(rate)+" }\n")
	if err != nil {
		return r, err
	}
	defer l.Close()
	server, err := c.Serve(ctx)
	if err != nil {
		return r, err
	}
	a, err := adminOf(c)
	if err != nil {
		return r, err
	}
	defer a.conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	holders, err := hold(ctx, c, a, agents, each)
	if err != nil {
		return r, err
	}
	defer func() {
		for _, h := range holders {
			h.conn.Close()
		}
	}()
	next, err := rotate(ctx, c, a, "root", l.RootFingerprint, "intermediate")
	if err != nil {
		return r, err
	}
	if err := a.stands(ctx, next, "active", 20*time.Second); err != nil {
		return r, err
	}
	quiet, err := cpuMicros(server.PID())
	if err != nil {
		return r, err
	}
	time.Sleep(b.length)
	cpu, err := cpuMicros(server.PID())
	if err != nil {
		return r, err
	}
	r.idle = (cpu - quiet) / b.length.Seconds()
	start := time.Now()
	if _, err := a.TaintAuthority(ctx, &adminv1.TaintAuthorityRequest{Authority: "intermediate-1", Reason: "a benchmark"}); err != nil {
		return r, err
	}
	var mu sync.Mutex
	var ends []time.Duration
	if err := inParallel(holders, func(h *holder) error {
		window, at, err := h.replace(ctx)
		mu.Lock()
		defer mu.Unlock()
		r.window = max(r.window, window)
		for _, t := range at {
			ends = append(ends, t.Sub(start))
			if t.Sub(h.ordered) > window+time.Second {
				r.late++
			}
		}
		return err
	}); err != nil {
		return r, err
	}
	after, err := cpuMicros(server.PID())
	if err != nil {
		return r, err
	}
	slices.Sort(ends)
	r.cpu, r.took = after-cpu, ends[len(ends)-1]
	for i, j := 0, 0; j < len(ends); j++ {
		for ends[j]-ends[i] > time.Second {
			i++
		}
		r.busiest = max(r.busiest, j-i+1)
	}
	return r, lab.Until(ctx, "no agent holds a tainted leaf", 20*time.Second, func() error {
		s, err := a.RotationStatus(ctx, &adminv1.RotationStatusRequest{})
		if err == nil && s.Reissue.GetHolding() > 0 {
			err = fmt.Errorf("%d agents do: %s …", s.Reissue.Holding, s.Reissue.HoldingAgents[0])
		}
		return err
	})
}

// holder is an agent that holds leaves and does what Sync tells it, without workloads: what it costs must not stand in the
// server's way.
type holder struct {
	conn   *grpc.ClientConn
	client signetv1.AgentsClient
	sync   grpc.BidiStreamingClient[signetv1.SyncRequest, signetv1.SyncResponse]
	items  []*signetv1.IssueItem
	leaves []*x509.Certificate
	order  chan *signetv1.Reissue
	// ordered is when the order came.
	ordered time.Time
}

// hold enrols the agents and gets each its leaves.
func hold(ctx context.Context, c *lab.Cluster, a *admin, agents, each int) ([]*holder, error) {
	var names []string
	for n := range agents {
		names = append(names, "node-"+strconv.Itoa(n))
	}
	text := "registrations:\n"
	for i := range each {
		text += fmt.Sprintf("  - { name: s%[1]d, spiffe_id: spiffe://%[2]s/ns/bench/sa/s%[1]d, agents: [%[3]s], selectors: [\"socket:s%[1]d\"] }\n",
			i, lab.TrustDomain, strings.Join(names, ", "))
	}
	if err := c.Apply(ctx, text); err != nil {
		return nil, err
	}
	tokens, err := a.tokens(ctx, names)
	if err != nil {
		return nil, err
	}
	var holders []*holder
	for _, token := range tokens {
		m, err := doors.Enrol(ctx, token)
		if err != nil {
			return nil, err
		}
		h := &holder{order: make(chan *signetv1.Reissue, 1), leaves: make([]*x509.Certificate, each)}
		if h.conn, err = m.Dial(c.Agents, m.ControlCA); err != nil {
			return nil, err
		}
		h.client = signetv1.NewAgentsClient(h.conn)
		// One CSR for all: what it costs the server is the same.
		key, err := doors.NewKey()
		if err != nil {
			return nil, err
		}
		csr, err := doors.CSR(key, nil)
		if err != nil {
			return nil, err
		}
		for i := range each {
			s := "s" + strconv.Itoa(i)
			h.items = append(h.items, &signetv1.IssueItem{Registration: s, Instance: s, Selectors: []string{"socket:" + s}, Csr: csr})
		}
		holders = append(holders, h)
	}
	return holders, inParallel(holders, func(h *holder) error {
		var all []int
		for i := range each {
			all = append(all, i)
		}
		for some := range slices.Chunk(all, perCall) {
			if err := h.issue(ctx, some); err != nil {
				return err
			}
		}
		var err error
		if h.sync, err = h.client.Sync(ctx); err != nil {
			return err
		}
		go h.listen()
		return h.say()
	})
}

func inParallel(holders []*holder, do func(*holder) error) error {
	failed := make(chan error, len(holders))
	for _, h := range holders {
		go func() { failed <- do(h) }()
	}
	var err error
	for range holders {
		if e := <-failed; err == nil {
			err = e
		}
	}
	return err
}

// listen waits for the order on the Sync stream.
func (h *holder) listen() {
	for {
		r, err := h.sync.Recv()
		if err != nil {
			return
		}
		if order := r.GetReissue(); order != nil {
			h.ordered = time.Now()
			h.order <- order
			return
		}
	}
}

// say tells the server whose leaves are held.
func (h *holder) say() error {
	held := map[string]bool{}
	r := &signetv1.SyncRequest{IssuersHeld: &signetv1.IssuersHeld{}}
	for _, leaf := range h.leaves {
		if id := string(leaf.AuthorityKeyId); !held[id] {
			held[id] = true
			r.IssuersHeld.KeyIds = append(r.IssuersHeld.KeyIds, leaf.AuthorityKeyId)
		}
	}
	return h.sync.Send(r)
}

// issue gets new leaves for some of the items.
func (h *holder) issue(ctx context.Context, some []int) error {
	req := &signetv1.IssueRequest{}
	for _, i := range some {
		req.Items = append(req.Items, h.items[i])
	}
	reply, err := h.client.Issue(ctx, req)
	if err != nil {
		return err
	}
	for n, r := range reply.Results {
		if r.GetCertificate() == nil {
			return fmt.Errorf("refused: %s", r.GetRefusal().GetMessage())
		}
		if h.leaves[some[n]], err = x509.ParseCertificate(r.GetCertificate().Chain[0]); err != nil {
			return err
		}
	}
	return nil
}

// replace waits for the order, and gets each leaf anew when its time has come. It returns when each was there.
func (h *holder) replace(ctx context.Context) (window time.Duration, at []time.Time, err error) {
	var order *signetv1.Reissue
	select {
	case order = <-h.order:
	case <-time.After(20 * time.Second):
		return 0, nil, fmt.Errorf("an agent was not told of a taint within 20 s")
	}
	window = time.Duration(order.WindowMs) * time.Millisecond
	stale := func(leaf *x509.Certificate) bool {
		return slices.ContainsFunc(order.IssuerKeyIds, func(id []byte) bool { return string(id) == string(leaf.AuthorityKeyId) })
	}
	due := make([]time.Time, len(h.leaves))
	var left []int
	for i, leaf := range h.leaves {
		if !stale(leaf) {
			return window, nil, fmt.Errorf("an agent was told to replace leaves of other issuers than the one that it has")
		}
		due[i] = rotation.ReissueAt(leaf.SerialNumber.Bytes(), h.ordered, window)
		left = append(left, i)
	}
	slices.SortFunc(left, func(x, y int) int { return due[x].Compare(due[y]) })
	for len(left) > 0 {
		time.Sleep(time.Until(due[left[0]]))
		n := 0
		for n < min(len(left), perCall) && !due[left[n]].After(time.Now()) {
			n++
		}
		if err := h.issue(ctx, left[:n]); err != nil {
			return window, at, err
		}
		for _, i := range left[:n] {
			if stale(h.leaves[i]) {
				return window, at, fmt.Errorf("a leaf was replaced by one of the tainted issuer")
			}
			at = append(at, time.Now())
		}
		left = left[n:]
	}
	return window, at, h.say()
}
