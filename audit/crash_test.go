package audit

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/api/layout"
)

// childEnv names the folder of the log to a child process of this test binary.
const childEnv = "SIGNET_AUDIT_TEST_CHILD"

// child appends for ever, and prints an entry's number and index when it is acknowledged.
func child(dir string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	seed, err := os.ReadFile(filepath.Join(filepath.Dir(dir), "seed"))
	if err != nil {
		fail(err)
	}
	from, err := strconv.Atoi(os.Getenv(childEnv + "_FROM"))
	if err != nil {
		fail(err)
	}
	l, err := Open(context.Background(), testConfig(dir, ed25519.NewKeyFromSeed(seed)))
	if err != nil {
		fail(err)
	}
	for n := from; ; {
		batch := 1 + rand.IntN(120)
		receipts, err := l.Append(context.Background(), events(n, batch))
		if err != nil {
			fail(err)
		}
		var out bytes.Buffer
		for i, r := range receipts {
			fmt.Fprintf(&out, "%d %d\n", n+i, r.Index)
		}
		if _, err := os.Stdout.Write(out.Bytes()); err != nil {
			fail(err)
		}
		n += batch
	}
}

func TestWhatWasAcknowledgedSurvivesSIGKILL(t *testing.T) {
	key := testKey(t)
	dir := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(filepath.Join(filepath.Dir(dir), "seed"), key.Seed(), 0o600); err != nil {
		t.Fatal(err)
	}
	acknowledged := map[uint64]int{}
	last := Checkpoint{}
	from := 0
	for round := range 20 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir, childEnv+"_FROM="+strconv.Itoa(from))
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// At any moment: while it opens, between flushes, in the middle of one. In every other round not before it has appended
		// something, however long that takes here.
		killSoon := func() *time.Timer {
			return time.AfterFunc(time.Duration(20+rand.IntN(350))*time.Millisecond, func() { _ = cmd.Process.Kill() })
		}
		var timer *time.Timer
		if round%2 == 0 {
			timer = killSoon()
		}
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if timer == nil {
				timer = killSoon()
			}
			var n int
			var index uint64
			if _, err := fmt.Sscanf(lines.Text(), "%d %d", &n, &index); err != nil {
				continue // The last line may be torn.
			}
			if was, ok := acknowledged[index]; ok {
				t.Fatalf("round %d: the index %d of entry %d was given to entry %d", round, index, was, n)
			}
			acknowledged[index] = n
			from = max(from, n+1)
		}
		if timer != nil {
			timer.Stop()
		}
		if err := cmd.Wait(); err == nil || stderr.Len() > 0 {
			t.Fatalf("round %d: the child ended by itself: %v\n%s", round, err, &stderr)
		}
		from += 1000 // What was in flight has numbers of its own.

		// A reader finds the folder right as it lies there, and never behind what it showed before.
		r, err := OpenReader(dir, "")
		if _, serr := os.Stat(filepath.Join(dir, layout.CheckpointPath)); errors.Is(serr, fs.ErrNotExist) && len(acknowledged) == 0 {
			if err == nil {
				t.Fatalf("round %d: a folder without a checkpoint was taken for a log", round)
			}
			continue // It was killed while it began the log.
		}
		if err != nil {
			t.Fatal(err)
		}
		cp, err := r.Checkpoint(t.Context())
		if err == nil {
			err = r.VerifyAt(t.Context(), cp, nil)
		}
		if err != nil || cp.Size < last.Size {
			t.Fatalf("round %d: size %d after %d: %v", round, cp.Size, last.Size, err)
		}
		last = cp
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(acknowledged) == 0 {
		t.Fatal("no child lived long enough to append anything")
	}

	l := open(t, testConfig(dir, key))
	size := add(t, l, event(from))[0].Index + 1
	awaitSize(t, l, size)
	r := reader(t, dir, l.VerifierKey())
	if err := r.Verify(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for index, n := range acknowledged {
		want, err := marshal(event(n))
		if err != nil {
			t.Fatal(err)
		}
		if raw, _, err := r.Entry(t.Context(), index); err != nil || !bytes.Equal(raw, want) {
			t.Fatalf("acknowledged entry %d is not at its index %d: %v", n, index, err)
		}
	}
	t.Logf("%d acknowledged entries of %d in the log survived 20 kills", len(acknowledged), size)
}

func TestALogBegunAndKilledAtOnceBegins(t *testing.T) {
	// Every prefix of what a first Open leaves behind.
	dir := filepath.Join(t.TempDir(), "log")
	c := testConfig(dir, testKey(t))
	l, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
	for _, without := range []string{"checkpoint", "checkpoint .state/treeState", "checkpoint .state", "checkpoint .state verifier.key"} {
		c.Dir = duplicate(t, dir)
		for _, name := range strings.Fields(without) {
			if err := os.RemoveAll(filepath.Join(c.Dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		l, err := Open(t.Context(), c)
		if err != nil {
			t.Fatalf("without %s: %v", without, err)
		}
		if got := add(t, l, event(0))[0].Index; got != 0 {
			t.Errorf("without %s: index %d", without, got)
		}
		closeLog(t, l)
	}
}

// Tessera takes a full tile that begins where the log ends for the beginning of the tile that it makes there.
func TestTheTilesOfABatchThatWasCutShortAreNotBuiltUpon(t *testing.T) {
	for _, c := range []struct{ had, cut int }{{0, 256}, {0, 600}, {256, 300}, {100, 600}} {
		t.Run(fmt.Sprintf("%d after %d", c.cut, c.had), func(t *testing.T) {
			config := testConfig(filepath.Join(t.TempDir(), "log"), testKey(t))
			l, err := Open(t.Context(), config)
			if err != nil {
				t.Fatal(err)
			}
			if c.had > 0 {
				add(t, l, events(0, c.had)...)
			}
			closeLog(t, l)
			killed, full := duplicate(t, config.Dir), duplicate(t, config.Dir)
			config.Dir = full
			if l, err = Open(t.Context(), config); err != nil {
				t.Fatal(err)
			}
			add(t, l, events(c.had, c.cut)...)
			closeLog(t, l)
			left := 0
			for i := uint64(0); i < 3; i++ {
				name := layout.TilePath(0, i, 0)
				data, err := os.ReadFile(filepath.Join(full, name))
				if _, has := os.Stat(filepath.Join(killed, name)); err != nil || has == nil {
					continue
				}
				left++
				if err := errors.Join(os.MkdirAll(filepath.Join(killed, filepath.Dir(name)), 0o700), os.WriteFile(filepath.Join(killed, name), data, 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			if left == 0 {
				t.Fatal("the batch made no full tile")
			}

			config.Dir = killed
			l = open(t, config)
			size := c.had
			for _, n := range []int{(256 - size%256) % 256, 1, 255, 1} { // to the end of a tile, and over it
				if n > 0 {
					add(t, l, events(10_000+size, n)...)
					size += n
					awaitSize(t, l, uint64(size))
				}
			}
			if err := reader(t, killed, l.VerifierKey()).Verify(t.Context(), nil); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestTheTilesOfABatchThatFailedAreNotBuiltUpon(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, testConfig(dir, testKey(t)))
	good := l.appender
	add(t, l, events(0, 256)...)
	l.appender = &tessera.Appender{Add: func(context.Context, *tessera.Entry) tessera.IndexFuture {
		err := os.WriteFile(filepath.Join(dir, layout.TilePath(0, 1, 0)), make([]byte, layout.TileWidth*32), 0o600)
		return func() (tessera.Index, error) { return tessera.Index{}, errors.Join(syscall.ENOSPC, err) }
	}}
	if _, err := l.Append(t.Context(), events(256, 1)); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	l.appender = good
	add(t, l, events(256, 1)...)
	awaitSize(t, l, 257)
}
