package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/transparency-dev/tessera"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/test/bubble"
)

// flushTime is what a batch takes from its first entry.
const flushTime = handOver + 5*time.Millisecond

// flushes is a disk that takes its time for a batch, and notes how many entries each had.
type flushes struct {
	mu    sync.Mutex
	next  uint64
	sizes []int
	open  chan struct{} // closed when the batch being made is durable; nil when none is being made
}

func (f *flushes) add(context.Context, *tessera.Entry) tessera.IndexFuture {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.open == nil {
		f.open = make(chan struct{})
		f.sizes = append(f.sizes, 0)
		time.AfterFunc(flushTime, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			close(f.open)
			f.open = nil
		})
	}
	at, durable := f.next, f.open
	f.next++
	f.sizes[len(f.sizes)-1]++
	return func() (tessera.Index, error) {
		<-durable
		return tessera.Index{Index: at}, nil
	}
}

// appendingAt runs callers that append an entry each, one every pace, onto a log of a size, and returns the batches that
// were made of them and the longest that one waited.
func appendingAt(t *testing.T, size uint64, callers int, pace time.Duration) (sizes []int, longest time.Duration) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, stateFolder), 0o700); err != nil {
		t.Fatal(err)
	}
	state := fmt.Sprintf(`{"size":%d,"root":null}`, size)
	if err := errors.Join(os.WriteFile(filepath.Join(dir, treeLockFile), nil, 0o600), os.WriteFile(filepath.Join(dir, treeStateFile), []byte(state), 0o600)); err != nil {
		t.Fatal(err)
	}
	m, err := newMetrics(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	bubble.Test(t, func(t *testing.T) {
		disk := &flushes{next: size}
		l := &Log{
			dir: dir, folder: folder{os.DirFS(dir)}, logger: slog.New(slog.DiscardHandler), metrics: m, fed: make(chan *call, maxPending),
			appender: &tessera.Appender{Add: disk.add},
		}
		go l.write(size)
		var mu sync.Mutex
		taken := make([]bool, callers)
		var all sync.WaitGroup
		for range callers {
			all.Go(func() {
				begun := time.Now()
				r, err := l.append(t.Context(), []*auditv1.Entry{event(1)})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				taken[r[0].Index-size], longest = true, max(longest, time.Since(begun))
			})
			time.Sleep(pace)
		}
		all.Wait()
		close(l.fed)
		if slices.Contains(taken, false) {
			t.Error("a place was given twice, or not at all")
		}
		sizes = disk.sizes
	})
	return sizes, longest
}

// A batch that goes over the end of a bundle writes twice the files of one that ends there.
func TestUnderLoadABatchEndsWithABundle(t *testing.T) {
	for _, tc := range []struct {
		name    string
		size    uint64
		callers int
		pace    time.Duration
		want    []int
	}{
		{"all at once", 0, 300, 0, []int{256, 44}},
		{"all at once, into a bundle that is begun", 1000, 300, 0, []int{280, 20}},
		{"several bundles", 256, 1000, 0, []int{768, 232}},
		{"filled after longer than a batch waits otherwise", 0, 600, 200 * time.Microsecond, []int{256, 256, 88}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got, _ := appendingAt(t, tc.size, tc.callers, tc.pace); !slices.Equal(got, tc.want) {
				t.Errorf("batches of %v, want %v", got, tc.want)
			}
		})
	}
}

func TestNobodyWaitsForABundleThatDoesNotFill(t *testing.T) {
	for _, tc := range []struct {
		name    string
		callers int
		pace    time.Duration
		atMost  time.Duration
	}{
		{"one", 1, 0, batchAge + flushTime},
		{"one a millisecond", 200, time.Millisecond, flushTime + batchMaxAge + batchPoll + flushTime},
		{"many, and then nobody", 200, 0, batchAge + batchPoll + flushTime},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, longest := appendingAt(t, 100, tc.callers, tc.pace); longest > tc.atMost {
				t.Errorf("one waited for %s, want at most %s", longest, tc.atMost)
			}
		})
	}
}
