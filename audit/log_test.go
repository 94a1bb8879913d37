package audit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
)

func TestWhatIsAppendedKeepsItsOrderAndItsBytes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, testConfig(dir, testKey(t)))
	entries := events(0, 300)
	receipts := add(t, l, entries...)
	for i, r := range receipts {
		if r.Index != uint64(i) {
			t.Fatalf("entry %d has the index %d", i, r.Index)
		}
	}
	awaitSize(t, l, 300)
	r := reader(t, dir, l.VerifierKey())
	for i, e := range entries {
		want, err := proto.MarshalOptions{Deterministic: true}.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		raw, got, err := r.Entry(t.Context(), uint64(i))
		if err != nil || !bytes.Equal(raw, want) || !proto.Equal(got, e) {
			t.Fatalf("entry %d: %v, %v", i, got, err)
		}
	}
	if _, _, err := r.Entry(t.Context(), 300); !errors.Is(err, ErrNotInLog) {
		t.Errorf("an entry beyond the end: %v", err)
	}
}

func TestConcurrentCallersGetEachTheirOwnPlaces(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, testConfig(dir, testKey(t)))
	const callers, calls, each = 16, 5, 7
	var mu sync.Mutex
	places := map[uint64][]byte{}
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for k := range calls {
				entries := events((c*calls+k)*each, each)
				receipts, err := l.Append(t.Context(), entries)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for i, r := range receipts {
					if places[r.Index] != nil {
						t.Errorf("the index %d was given twice", r.Index)
					}
					places[r.Index], _ = marshal(entries[i])
					if i > 0 && r.Index <= receipts[i-1].Index {
						t.Errorf("the places of one call are not in its order: %v", receipts)
					}
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	awaitSize(t, l, callers*calls*each)
	r := reader(t, dir, "")
	for i, want := range places {
		if raw, _, err := r.Entry(t.Context(), i); err != nil || !bytes.Equal(raw, want) {
			t.Fatalf("entry %d is not what its caller appended: %v", i, err)
		}
	}
	if err := r.Verify(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

func TestALogIsOpenedAgainWhereItStopped(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	key := testKey(t)
	for round := range 3 {
		l, err := Open(t.Context(), testConfig(dir, key))
		if err != nil {
			t.Fatal(err)
		}
		if got := add(t, l, event(round))[0].Index; got != uint64(round) {
			t.Fatalf("round %d: index %d", round, got)
		}
		closeLog(t, l)
		raw, err := l.Checkpoint(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseCheckpoint(raw, l.VerifierKey()); err != nil {
			t.Fatal(err)
		}
		onDisk, err := reader(t, dir, "").Checkpoint(t.Context())
		if err != nil || onDisk.Size != uint64(round)+1 {
			t.Fatalf("after close the checkpoint has %d entries, want %d (%v)", onDisk.Size, round+1, err)
		}
	}
}

func TestConsistencyIsProvenBetweenAnySizes(t *testing.T) {
	l := open(t, testConfig(filepath.Join(t.TempDir(), "log"), testKey(t)))
	roots := map[uint64][]byte{}
	var sizes []uint64
	for _, n := range []int{0, 1, 2, 5, 250, 20, 300} {
		add(t, l, events(0, n)...)
		var size uint64
		if len(sizes) > 0 {
			size = sizes[len(sizes)-1]
		}
		cp := awaitSize(t, l, size+uint64(n))
		sizes = append(sizes, cp.Size)
		roots[cp.Size] = cp.RootHash
	}
	for i, from := range sizes {
		for _, to := range sizes[i:] {
			for range 2 { // the second time from memory
				hashes, err := l.Consistency(t.Context(), from, to)
				if err != nil {
					t.Fatal(err)
				}
				if err := proof.VerifyConsistency(rfc6962.DefaultHasher, from, to, hashes, roots[from], roots[to]); err != nil {
					t.Errorf("%d to %d: %v", from, to, err)
				}
			}
		}
	}
	last := sizes[len(sizes)-1]
	if _, err := l.Consistency(t.Context(), last, last+1); err == nil {
		t.Error("proved a size that no checkpoint has")
	}
	if _, err := l.Consistency(t.Context(), 3, 2); err == nil {
		t.Error("proved that a log shrinks consistently")
	}
}

func TestEntriesThatCannotBeLoggedAreRefused(t *testing.T) {
	l := open(t, testConfig(filepath.Join(t.TempDir(), "log"), testKey(t)))
	long := &auditv1.Entry{Time: 1, Event: &auditv1.Entry_CertificateIssued{CertificateIssued: &auditv1.CertificateIssued{Tbs: make([]byte, maxEntry)}}}
	for name, e := range map[string]*auditv1.Entry{
		"nil": nil, "no event": {Time: 1}, "no time": {Event: event(0).Event}, "too long": long,
	} {
		// One that cannot be logged takes the whole call with it.
		if _, err := l.Append(t.Context(), []*auditv1.Entry{event(1), e}); err == nil {
			t.Errorf("%s: was appended", name)
		}
	}
	if got := add(t, l, event(2))[0].Index; got != 0 {
		t.Errorf("%d entries of refused calls are in the log", got)
	}
	longest := &auditv1.Entry{Time: 1, Event: &auditv1.Entry_CertificateIssued{CertificateIssued: &auditv1.CertificateIssued{Tbs: make([]byte, maxEntry-12)}}}
	if raw, err := marshal(longest); err != nil || len(raw) < maxEntry-4 {
		t.Fatalf("the longest entry has %d bytes (%v)", len(raw), err)
	}
	add(t, l, longest)
	if r, err := l.Append(t.Context(), nil); r != nil || err != nil {
		t.Errorf("nothing: %v, %v", r, err)
	}
}

func TestOpenRefusesContradictions(t *testing.T) {
	key := testKey(t)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change func(*Config)
		say    string
	}{
		"no folder":       {func(c *Config) { c.Dir = "" }, "no folder"},
		"no key":          {func(c *Config) { c.Signer = nil }, "no key"},
		"not Ed25519":     {func(c *Config) { c.Signer = ec }, "Ed25519"},
		"space in origin": {func(c *Config) { c.Origin = "a b" }, "origin"},
		"plus in origin":  {func(c *Config) { c.Origin = "a+b" }, "origin"},
		"no origin":       {func(c *Config) { c.Origin = "" }, "origin"},
		"too often":       {func(c *Config) { c.CheckpointInterval = time.Millisecond }, "too often"},
	} {
		c := testConfig(filepath.Join(t.TempDir(), "log"), key)
		tc.change(&c)
		if l, err := Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), tc.say) {
			t.Errorf("%s: %v", name, err)
			if l != nil {
				closeLog(t, l)
			}
		}
	}
}

func TestAFolderOfAnotherLogIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	c := testConfig(dir, testKey(t))
	l, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
	other := c
	other.Signer = testKey(t)
	if _, err := Open(t.Context(), other); err == nil || !strings.Contains(err.Error(), "holds the log") {
		t.Errorf("another key: %v", err)
	}
	other = c
	other.Origin = "example.org/west/west-1"
	if _, err := Open(t.Context(), other); err == nil || !strings.Contains(err.Error(), "holds the log") {
		t.Errorf("another origin: %v", err)
	}
	// The other's key beside this log's checkpoint.
	rewrite(t, filepath.Join(dir, verifierKeyFile), func([]byte) []byte {
		vkey, _, err := noteKey(other.Origin, other.Signer)
		if err != nil {
			t.Fatal(err)
		}
		return []byte(vkey + "\n")
	})
	if _, err := Open(t.Context(), other); !errors.Is(err, ErrDamaged) {
		t.Errorf("a checkpoint of another log: %v", err)
	}
}

func TestAFolderIsHeldByOneLogAtATime(t *testing.T) {
	c := testConfig(filepath.Join(t.TempDir(), "log"), testKey(t))
	l := open(t, c)
	if _, err := Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), c.Dir) {
		t.Fatalf("opened twice: %v", err)
	}
	add(t, l, event(0))
}

func TestAFolderThatContradictsItsCheckpointIsNotOpened(t *testing.T) {
	was := filepath.Join(t.TempDir(), "log")
	c := testConfig(was, testKey(t))
	l, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	add(t, l, events(0, 300)...)
	closeLog(t, l)
	restate := func(old, now string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			rewrite(t, filepath.Join(dir, treeStateFile), func(b []byte) []byte { return bytes.Replace(b, []byte(old), []byte(now), 1) })
		}
	}
	setState := func(size uint64) func(t *testing.T, dir string) {
		return restate(`"size":300`, fmt.Sprintf(`"size":%d`, size))
	}
	remove := func(name string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	flip := func(name string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			rewrite(t, filepath.Join(dir, name), func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
		}
	}
	for name, change := range map[string]func(t *testing.T, dir string){
		"state set back":          setState(299),
		"state set to nothing":    setState(0),
		"state set ahead":         setState(301),
		"state set far ahead":     setState(math.MaxUint64),
		"state of another root":   restate(`"root":"`, `"root":"AAAA`),
		"state without a root":    restate(`"root"`, `"roos"`),
		"state with a blank more": restate(`}`, `} `),
		"no state":                remove(".state"),
		"no checkpoint":           remove("checkpoint"),
		"no tiles":                remove("tile"),
		"no verifier key":         remove(verifierKeyFile),
		"another checkpoint byte": flip("checkpoint"),
		"another tile byte":       flip("tile/1/000.p/1"),
		"another key byte":        flip(verifierKeyFile),
		"a key without its end": func(t *testing.T, dir string) {
			rewrite(t, filepath.Join(dir, verifierKeyFile), func(b []byte) []byte { return b[:len(b)-1] })
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := duplicate(t, was)
			change(t, dir)
			before := snapshot(t, dir)
			c := c
			c.Dir = dir
			l, err := Open(t.Context(), c)
			if err == nil {
				closeLog(t, l)
				t.Fatal("was opened")
			}
			t.Log(err)
			for path, data := range before {
				if now, err := os.ReadFile(filepath.Join(dir, path)); err != nil || !bytes.Equal(now, data) {
					t.Errorf("%s was changed (%v)", path, err)
				}
			}
		})
	}
}

func snapshot(t *testing.T, dir string) map[string][]byte {
	all := map[string][]byte{}
	for _, path := range files(t, dir) {
		data, err := os.ReadFile(filepath.Join(dir, path))
		if err != nil {
			t.Fatal(err)
		}
		if path != "LOCK" {
			all[path] = data
		}
	}
	return all
}

func TestNothingIsSignedOverADiskThatLies(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, dir string){
		"an entry changed": func(t *testing.T, dir string) {
			rewrite(t, filepath.Join(dir, "tile/entries/000.p/9"), func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
		},
		"a hash changed": func(t *testing.T, dir string) {
			rewrite(t, filepath.Join(dir, "tile/0/000.p/9"), func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
		},
		// Under a checkpoint already, and carried into every later bundle (the file of 9 is a copy of that of 4, and more).
		"an old entry of the last bundle rotten": func(t *testing.T, dir string) {
			rewrite(t, filepath.Join(dir, "tile/entries/000.p/9"), func(b []byte) []byte { b[10] ^= 1; return b })
		},
		"an old hash of the last tile rotten": func(t *testing.T, dir string) {
			rewrite(t, filepath.Join(dir, "tile/0/000.p/9"), func(b []byte) []byte { b[10] ^= 1; return b })
		},
		"the state's root changed": func(t *testing.T, dir string) {
			rewrite(t, filepath.Join(dir, treeStateFile), func(b []byte) []byte {
				return bytes.Replace(b, []byte(`"root":"`), []byte(`"root":"AAAA`), 1)
			})
		},
		"the state set back": func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, treeStateFile), []byte(`{"size":1,"root":""}`), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "log")
			c := testConfig(dir, testKey(t))
			l := open(t, c)
			add(t, l, events(0, 4)...)
			good := awaitSize(t, l, 4)
			publish := holdPublishing(t, dir)
			add(t, l, events(4, 5)...)
			change(t, dir)
			publish()
			// No checkpoint comes, so there is nothing to wait for but the verdict.
			deadline := time.Now().Add(20 * time.Second)
			for l.damaged.Load() == nil {
				if time.Now().After(deadline) {
					t.Fatal("was not noticed")
				}
				time.Sleep(5 * time.Millisecond)
			}
			if _, err := l.Append(t.Context(), events(9, 1)); !errors.Is(err, ErrDamaged) {
				t.Errorf("append: %v", err)
			}
			raw, err := os.ReadFile(filepath.Join(dir, "checkpoint"))
			if err != nil || !bytes.Equal(raw, good.Note) {
				t.Errorf("a checkpoint was published over it: %s (%v)", raw, err)
			}
			if n := testutil.ToFloat64(l.metrics.inconsistencies); n < 1 {
				t.Errorf("signet_log_inconsistencies_total = %v", n)
			}
		})
	}
}

// A bundle may rot on the disk between two checkpoints: Tessera copies it into the next one as it is.
func TestWhatTheNextEntryIsWrittenBesideIsReadAgain(t *testing.T) {
	for _, size := range []int{1, 4, 255, 257, 300} {
		for _, what := range []string{"tile/entries", "tile/0"} {
			t.Run(fmt.Sprintf("%s of %d", what, size), func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "log")
				l := open(t, testConfig(dir, testKey(t)))
				add(t, l, events(0, size)...)
				good := awaitSize(t, l, uint64(size))
				rewrite(t, filepath.Join(dir, what, fmt.Sprintf("%03d.p/%d", size/256, size%256)), func(b []byte) []byte { b[10] ^= 1; return b })
				// Entries that no checkpoint will hold; what a client was given before the verdict can't be told from here.
				_, _ = l.Append(t.Context(), events(size, 1))
				deadline := time.Now().Add(20 * time.Second)
				for l.damaged.Load() == nil {
					if time.Now().After(deadline) {
						t.Fatal("was not noticed")
					}
					time.Sleep(5 * time.Millisecond)
				}
				raw, err := os.ReadFile(filepath.Join(dir, "checkpoint"))
				if err != nil || !bytes.Equal(raw, good.Note) {
					t.Errorf("a checkpoint was published over it: %s (%v)", raw, err)
				}
			})
		}
	}
}

// holdPublishing keeps Tessera from looking at the log's state for a checkpoint until the function it returns is called.
// An OFD lock holds even against this process's own fcntl locks (fcntl(2), "Open file description locks").
func holdPublishing(t *testing.T, dir string) (release func()) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, stateFolder, "publish.lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTheLogFailsClosedAndRecovers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	c := testConfig(dir, testKey(t))
	var said bytes.Buffer
	c.Logger = slog.New(slog.NewTextHandler(&said, nil))
	l := open(t, c)
	add(t, l, event(0))
	awaitSize(t, l, 1)

	// The folder is gone, and a file stands in its place.
	away := dir + ".away"
	if err := os.Rename(dir, away); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if receipts, err := l.Append(t.Context(), events(1, 2)); err == nil || receipts != nil {
			t.Fatalf("acknowledged without a disk: %v, %v", receipts, err)
		}
	}
	if l.Usable() == nil {
		t.Error("says it is usable")
	}
	if n := testutil.ToFloat64(l.metrics.errors); n != 3 {
		t.Errorf("signet_log_append_errors_total = %v, want 3", n)
	}
	if err := errors.Join(os.Remove(dir), os.Rename(away, dir)); err != nil {
		t.Fatal(err)
	}
	if got := add(t, l, event(3))[0].Index; got != 1 {
		t.Errorf("after the recovery the next index is %d, want 1", got)
	}
	if err := l.Usable(); err != nil {
		t.Error(err)
	}
	awaitSize(t, l, 2)
	if err := reader(t, dir, "").Verify(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if s := said.String(); strings.Count(s, "level=ERROR") != 1 || strings.Count(s, "can be written again") != 1 {
		t.Errorf("the failure and its end are not logged once each:\n%s", s)
	}
}

func TestWithoutADescriptorTheLogFailsClosedAndTheProcessLives(t *testing.T) {
	l := open(t, testConfig(filepath.Join(t.TempDir(), "log"), testKey(t)))
	add(t, l, event(0))
	awaitSize(t, l, 1)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	_, err := l.Append(t.Context(), events(1, 1))
	ready := l.Ready()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, unix.EMFILE) || !errors.Is(ready, unix.EMFILE) {
		t.Errorf("without a descriptor: append %v, ready %v", err, ready)
	}
	add(t, l, event(2))
	awaitSize(t, l, 2)
	if err := l.Ready(); err != nil {
		t.Error(err)
	}
}

func TestAFullDiskAcknowledgesNothing(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("needs the right to mount a small file system: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	logDir := filepath.Join(dir, "log")
	l := open(t, testConfig(logDir, testKey(t)))
	acknowledged := 0
	ballast := filepath.Join(dir, "ballast")
	for full := false; !full; {
		switch receipts, err := l.Append(t.Context(), events(acknowledged, 50)); {
		case err != nil && acknowledged == 0:
			t.Fatal(err)
		case err != nil:
			full = true
			t.Logf("after %d entries: %v", acknowledged, err)
		default:
			acknowledged = int(receipts[49].Index) + 1
			awaitSize(t, l, uint64(acknowledged))
			if acknowledged == 100 {
				// No room any more.
				err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600)
				if !errors.Is(err, syscall.ENOSPC) {
					t.Fatalf("the disk is not full: %v", err)
				}
			}
		}
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	first := int(add(t, l, events(acknowledged, 10)...)[0].Index)
	if first < acknowledged {
		t.Errorf("the index %d was acknowledged before", first)
	}
	awaitSize(t, l, uint64(first+10))
	r := reader(t, logDir, "")
	if err := r.Verify(t.Context(), nil); err != nil {
		t.Error(err)
	}
	for i := range acknowledged {
		raw, _, err := r.Entry(t.Context(), uint64(i))
		if want, _ := marshal(event(i)); err != nil || !bytes.Equal(raw, want) {
			t.Fatalf("acknowledged entry %d is lost: %v", i, err)
		}
	}
}

func TestWhatWaitsForTheDiskIsBounded(t *testing.T) {
	l := open(t, testConfig(filepath.Join(t.TempDir(), "log"), testKey(t)))
	if err := l.enter(maxPending-1, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append(t.Context(), events(0, 2)); !errors.Is(err, ErrOverloaded) {
		t.Errorf("too many entries: %v", err)
	}
	add(t, l, event(0))
	l.leave(maxPending-1, 0)
	if err := l.enter(1, maxPendingBytes); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append(t.Context(), events(0, 1)); !errors.Is(err, ErrOverloaded) {
		t.Errorf("too many bytes: %v", err)
	}
	l.leave(1, maxPendingBytes)
	if _, err := l.Append(t.Context(), events(0, maxPending+1)); !errors.Is(err, ErrOverloaded) {
		t.Errorf("more than there is room for: %v", err)
	}
	add(t, l, events(0, maxPending)...)
}

func TestACallerThatGivesUpIsNotAcknowledged(t *testing.T) {
	l := open(t, testConfig(filepath.Join(t.TempDir(), "log"), testKey(t)))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r, err := l.Append(ctx, events(0, 1)); r != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("%v, %v", r, err)
	}
	add(t, l, event(1))
}

func TestAClosedLogTakesNothing(t *testing.T) {
	registry := prometheus.NewRegistry()
	c := testConfig(filepath.Join(t.TempDir(), "log"), testKey(t))
	c.Metrics = registry
	l, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	// What is in flight when Close is called is finished.
	var wg sync.WaitGroup
	acknowledged := make(chan uint64, 64)
	for i := range 32 {
		wg.Go(func() {
			r, err := l.Append(t.Context(), events(i, 1))
			switch {
			case err == nil:
				acknowledged <- r[0].Index
			case !errors.Is(err, ErrClosed):
				t.Error(err)
			}
		})
	}
	closeLog(t, l)
	closeLog(t, l)
	wg.Wait()
	close(acknowledged)
	if _, err := l.Append(t.Context(), events(0, 1)); !errors.Is(err, ErrClosed) {
		t.Errorf("append: %v", err)
	}
	r := reader(t, c.Dir, "")
	cp, err := r.Checkpoint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range acknowledged {
		if i >= cp.Size {
			t.Errorf("entry %d was acknowledged and is not under the last checkpoint, of size %d", i, cp.Size)
		}
	}
	again, err := Open(t.Context(), c) // which registers the metrics anew
	if err != nil {
		t.Fatal(err)
	}
	closeLog(t, again)
}

func TestMetricsAreThereFromTheStart(t *testing.T) {
	registry := prometheus.NewRegistry()
	c := testConfig(filepath.Join(t.TempDir(), "log"), testKey(t))
	c.Metrics = registry
	l := open(t, c)
	want := []string{
		"signet_log_size_entries", "signet_log_pending_entries", "signet_log_checkpoint_timestamp_seconds", "signet_log_self_check_timestamp_seconds",
		"signet_log_append_duration_seconds", "signet_log_append_errors_total", "signet_log_inconsistencies_total", "signet_log_disk_available_bytes",
	}
	if n, err := testutil.GatherAndCount(registry, want...); err != nil || n != len(want) {
		t.Errorf("%d series, want %d (%v)", n, len(want), err)
	}
	add(t, l, events(0, 5)...)
	awaitSize(t, l, 5)
	if n := testutil.ToFloat64(l.metrics.size); n != 5 {
		t.Errorf("size %v", n)
	}
	if n := testutil.ToFloat64(l.metrics.pending); n != 0 {
		t.Errorf("pending %v", n)
	}
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
}

// failingKey is a key that can be made to fail, or to lie.
type failingKey struct {
	ed25519.PrivateKey
	mu    sync.Mutex
	fail  error
	wrong bool
}

func (k *failingKey) set(err error) { k.mu.Lock(); defer k.mu.Unlock(); k.fail, k.wrong = err, false }
func (k *failingKey) setWrong()     { k.mu.Lock(); defer k.mu.Unlock(); k.wrong = true }

func (k *failingKey) Sign(r io.Reader, msg []byte, o crypto.SignerOpts) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return nil, k.fail
	}
	sig, err := k.PrivateKey.Sign(r, msg, o)
	if k.wrong {
		sig[0] ^= 1
	}
	return sig, err
}

// silent reports whether the last checkpoint could not be made.
func (l *Log) silent() bool {
	l.cpMu.Lock()
	defer l.cpMu.Unlock()
	return l.unsaid
}

func TestAKeyThatFailsDelaysOnlyTheCheckpoint(t *testing.T) {
	key := &failingKey{PrivateKey: testKey(t)}
	c := testConfig(filepath.Join(t.TempDir(), "log"), key.PrivateKey)
	c.Signer = key
	l := open(t, c)
	key.set(errors.New("the token is away"))
	add(t, l, event(0))
	for !l.silent() {
		time.Sleep(5 * time.Millisecond)
	}
	add(t, l, event(1))
	key.set(nil)
	awaitSize(t, l, 2)
	if l.silent() {
		t.Error("still says that no checkpoint can be made")
	}
	// A signature that does not verify is no signature.
	key.setWrong()
	add(t, l, event(2))
	for !l.silent() {
		time.Sleep(5 * time.Millisecond)
	}
	if cp := awaitSize(t, l, 0); cp.Size != 2 {
		t.Errorf("published size %d", cp.Size)
	}
	key.set(nil)
	awaitSize(t, l, 3)
}

func TestTheVerifierKeyIsTheNotePackages(t *testing.T) {
	key := testKey(t)
	vkey, v, err := noteKey(testOrigin, key)
	if err != nil {
		t.Fatal(err)
	}
	g := guard{verifier: v, key: key}
	if g.Name() != testOrigin || g.KeyHash() != v.KeyHash() || !strings.HasPrefix(vkey, fmt.Sprintf("%s+%08x+", testOrigin, v.KeyHash())) {
		t.Errorf("%s", vkey)
	}
}

func TestALogThatMustBeThereIsNotBegunAnew(t *testing.T) {
	_, signer, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "log")
	if l, err := Open(t.Context(), Config{Dir: dir, Origin: "example.org/east/east-1", Signer: signer, MustExist: true}); !errors.Is(err, ErrDamaged) {
		if err == nil {
			l.Close(t.Context())
		}
		t.Fatalf("a log that is gone: %v, want ErrDamaged", err)
	}
	if _, err := os.Stat(filepath.Join(dir, verifierKeyFile)); err == nil {
		t.Error("something was written into its place")
	}
}
