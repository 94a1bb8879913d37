package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

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

// unbounded: what is measured is the server, not the limit that keeps one agent from taking all of it.
const unbounded = "limits: { certificates_per_second: 1000000, burst: 1000000 }\n"

const hourlyLeaves = "leaf: { ttl: 1h }\n"

// newCluster makes a root and a cluster that has joined it, in a folder of its own.
func newCluster(ctx context.Context, b *bench, name, config string) (*lab.Lab, *lab.Cluster, error) {
	l, err := lab.New(filepath.Join(b.dir, name), b.signet)
	if err != nil {
		return nil, nil, err
	}
	if err := l.MakeRoot(ctx); err != nil {
		return nil, nil, err
	}
	c, err := l.NewCluster("bench", unbounded+config)
	if err != nil {
		return nil, nil, err
	}
	return l, c, c.Join(ctx)
}

// overWire measures the CPU of a real server's process, asked by an enrolled agent over mutual TLS on loopback, with its
// audit log on disk. Each run is judged by floors taken just before and after it.
func overWire(ctx context.Context, b *bench) ([]figure, error) {
	l, c, err := newCluster(ctx, b, "wire", hourlyLeaves)
	if err != nil {
		return nil, err
	}
	defer l.Close()
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
		{"server CPU per certificate, gRPC and TLS, log on disk: one CSR in a call, 64 callers", 64, 1, 2.2},
		{"server CPU per certificate, gRPC and TLS, log on disk: 50 CSRs in a call, 16 callers", 16, 50, 1.45},
	} {
		var values, floors, ratios []float64
		for range b.runs {
			before, err := leafFloor()
			if err != nil {
				return nil, err
			}
			v, err := drive(ctx, c, member, server.PID(), shape.callers, shape.batch, b.length)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", shape.name, err)
			}
			after, err := leafFloor()
			if err != nil {
				return nil, err
			}
			floor := (before + after) / 2
			values, floors, ratios = append(values, v), append(floors, floor), append(ratios, v/floor)
		}
		mid := slices.Index(ratios, median(ratios))
		figures = append(figures, figure{Name: shape.name, Value: values[mid], Unit: "µs CPU"}.against(floors[mid], shape.mark).spread(ratios))
	}
	return figures, nil
}

// leafFloor is F in µs of CPU: parse a CSR, verify it, make one P-256 signature, on one core.
func leafFloor() (float64, error) {
	key, err := doors.NewKey()
	if err != nil {
		return 0, err
	}
	raw, err := doors.CSR(key, nil)
	if err != nil {
		return 0, err
	}
	runtime.LockOSThread() // RUSAGE_THREAD is of this thread
	defer runtime.UnlockOSThread()
	const n = 4096
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &before); err != nil {
		return 0, err
	}
	for range n {
		csr, err := x509.ParseCertificateRequest(raw)
		if err != nil {
			return 0, err
		}
		if err := csr.CheckSignature(); err != nil {
			return 0, err
		}
		digest := sha256.Sum256(csr.RawTBSCertificateRequest)
		if _, err := ecdsa.SignASN1(rand.Reader, key, digest[:]); err != nil {
			return 0, err
		}
	}
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &after); err != nil {
		return 0, err
	}
	used := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
	return float64(used) / 1e3 / n, nil
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
