package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
)

const registration = `registrations:
  - name: bench
    spiffe_id: spiffe://example.org/ns/bench/sa/bench
    agents: [bench]
    selectors: ["socket:bench"]
`

// overWire measures the CPU of a real server's process, asked by an enrolled agent over mutual TLS on loopback, with its
// audit log on disk.
func overWire(ctx context.Context, dir, signet string, length time.Duration, runs int) ([]figure, error) {
	l, err := lab.New(dir, signet)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	if err := l.MakeRoot(ctx); err != nil {
		return nil, err
	}
	c, err := l.NewCluster("bench", "leaf: { ttl: 1h }\n")
	if err != nil {
		return nil, err
	}
	if err := c.Join(ctx); err != nil {
		return nil, err
	}
	server, err := c.Serve(ctx)
	if err != nil {
		return nil, err
	}
	if err := c.Apply(ctx, registration); err != nil {
		return nil, err
	}
	member, err := c.Member(ctx, "bench")
	if err != nil {
		return nil, err
	}
	var figures []figure
	for _, shape := range []struct {
		name           string
		callers, batch int
		mark           float64
	}{
		{"server, gRPC and TLS, log included: one CSR a call, 64 callers", 64, 1, 2.2},
		{"server, gRPC and TLS, log included: 50 CSRs a call, 16 callers", 16, 50, 1.45},
	} {
		var values []float64
		for range runs {
			v, err := drive(ctx, c, member, server.PID(), shape.callers, shape.batch, length)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", shape.name, err)
			}
			values = append(values, v)
		}
		figures = append(figures, figure{name: shape.name, value: median(values), mark: shape.mark})
	}
	return figures, nil
}

// drive keeps callers busy for a while and returns the server's CPU in µs per certificate.
func drive(ctx context.Context, c *lab.Cluster, m *doors.Member, pid, callers, batch int, length time.Duration) (float64, error) {
	conn, err := m.Dial(c.Agents, m.ControlCA)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	client := signetv1.NewAgentsClient(conn)
	// A CSR may be used again: what it costs the server is the same, and the client's cost must not stand in its way.
	req := &signetv1.IssueRequest{}
	for range batch {
		key, err := doors.NewKey()
		if err != nil {
			return 0, err
		}
		csr, err := doors.CSR(key, nil)
		if err != nil {
			return 0, err
		}
		req.Items = append(req.Items, &signetv1.IssueItem{Registration: "bench", Instance: "bench", Selectors: []string{"socket:bench"}, Csr: csr})
	}
	if _, err := client.Issue(ctx, req); err != nil { // connection and caches, not counted
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	before, err := cpuMicros(pid)
	if err != nil {
		return 0, err
	}
	var issued atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for ctx.Err() == nil {
				reply, err := client.Issue(context.WithoutCancel(ctx), req)
				if err == nil {
					for _, r := range reply.Results {
						if r.GetCertificate() == nil {
							err = fmt.Errorf("refused: %s", r.GetRefusal().GetMessage())
						}
					}
				}
				if err != nil {
					failed.Store(&err)
					return
				}
				issued.Add(int64(batch))
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	after, err := cpuMicros(pid)
	if err != nil {
		return 0, err
	}
	return (after - before) / float64(issued.Load()), nil
}

// cpuMicros is user and system time of a process, from /proc (ticks of 10 ms).
func cpuMicros(pid int) (float64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	var ticks float64
	for _, i := range []int{11, 12} { // utime, stime
		v, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return 0, err
		}
		ticks += v
	}
	return ticks * 10_000, nil
}
