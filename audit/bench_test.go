package audit

import (
	"bytes"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
)

// cpu is what this process has used so far, all threads, user and system.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkAppend is what logging costs an issue: CPU per entry with so many calls in flight, each of one leaf's entry, the
// checkpoints and their self-check included, and how many entries one write of the tree had, which decides that.
func BenchmarkAppend(b *testing.B) {
	entry := issued(testTime, certificate(b, 1, "spiffe://example.org/ns/shop/sa/frontend"), "node-1")
	for _, tc := range []struct{ inFlight, perCall int }{{16, 1}, {256, 1}, {1024, 1}, {16, 50}} {
		b.Run(fmt.Sprintf("flight=%d/call=%d", tc.inFlight*tc.perCall, tc.perCall), func(b *testing.B) {
			c := testConfig(filepath.Join(b.TempDir(), "log"), testKey(b))
			c.CheckpointInterval = defaultCheckpointInterval
			l := open(b, c)
			call := make([]*auditv1.Entry, tc.perCall)
			for i := range call {
				call[i] = entry
			}
			add(b, l, call...)
			var left atomic.Int64
			left.Store(int64(b.N))
			flushes := countFlushes(b, c.Dir)
			before := cpu(b)
			b.ResetTimer()
			var wg sync.WaitGroup
			for range tc.inFlight {
				wg.Go(func() {
					for left.Add(-int64(tc.perCall)) > -int64(tc.perCall) {
						if _, err := l.Append(b.Context(), call); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			b.ReportMetric(float64((cpu(b)-before).Nanoseconds())/1e3/float64(b.N), "cpu-µs/entry")
			b.ReportMetric(float64(b.N)/float64(flushes()), "entries/flush")
		})
	}
}

// countFlushes counts how often Tessera replaces its state file from here on: once a batch. It watches the
// temporary files too, because the kernel merges equal events in a row.
func countFlushes(b *testing.B, dir string) func() int {
	b.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := unix.InotifyAddWatch(fd, filepath.Join(dir, stateFolder), unix.IN_MOVED_TO|unix.IN_CREATE); err != nil {
		b.Fatal(err)
	}
	return func() (n int) {
		defer unix.Close(fd)
		buf := make([]byte, 64<<10)
		for {
			got, err := unix.Read(fd, buf)
			if err != nil { // nothing more
				return max(n, 1)
			}
			n += bytes.Count(buf[:got], []byte(filepath.Base(treeStateFile)+"\x00"))
		}
	}
}

// BenchmarkIndex is what the first search of a log costs per entry.
func BenchmarkIndex(b *testing.B) {
	dir := filepath.Join(b.TempDir(), "log")
	l := open(b, testConfig(dir, testKey(b)))
	entry := issued(testTime, certificate(b, 1, "spiffe://example.org/ns/shop/sa/frontend"), "node-1")
	const n = 4096
	list := make([]*auditv1.Entry, n)
	for i := range list {
		list[i] = entry
	}
	add(b, l, list...)
	awaitSize(b, l, n)
	b.ResetTimer()
	for range b.N {
		r := reader(b, dir, l.VerifierKey())
		r.KeepIndex(filepath.Join(b.TempDir(), "index.db"))
		if _, err := r.Find(b.Context(), Query{Serial: "ff"}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/n, "µs/entry")
}
