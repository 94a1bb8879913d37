package audit

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/internal/durable"
)

// How the log is run. The figures are measured: BenchmarkAppend.
const (
	// A batch is written when it has this many entries, or when its first is batchAge old and nothing has joined within
	// batchPoll, at the latest at batchMaxAge. Each costs three files with fsync, whatever is in it, so that under load a
	// few milliseconds more halve the CPU per entry. A batch that goes over the end of a bundle costs three more, and two
	// folders: so where the next bundle fills within batchFillAge at the pace of those before, it is waited for, and what
	// is beyond a bundle's end is left to the next batch.
	batchEntries = 1024
	batchAge     = 10 * time.Millisecond
	batchPoll    = 2 * time.Millisecond
	batchMaxAge  = 30 * time.Millisecond
	batchFillAge = 100 * time.Millisecond
	// handOver is how long Tessera waits for the rest of a batch that is complete already, and handOverEntries what it
	// takes at once: more than a batch, since the last call that joins may bring more than one entry.
	handOver        = 2 * time.Millisecond
	handOverEntries = 2 * batchEntries
	// Tessera removes what 101 full bundles have superseded per run: one run a second keeps up with 25,000 entries/s.
	collectInterval = time.Second
	// republishInterval renews the checkpoint of a log that does not grow, which shows that it is alive.
	republishInterval = 10 * time.Minute
	// appendTimeout bounds one Append. A disk that needs longer is broken.
	appendTimeout = 10 * time.Second
	// shutdownTimeout bounds the wait for the last checkpoint.
	shutdownTimeout = 10 * time.Second
	// What may wait for the disk at once, so that a slow disk costs callers an error and not the process its memory.
	maxPending      = 8192
	maxPendingBytes = 64 << 20

	defaultCheckpointInterval = time.Second
	leastCheckpointInterval   = 100 * time.Millisecond
)

// The names of Tessera's own files below the folder.
const (
	stateFolder   = ".state"
	treeStateFile = stateFolder + "/treeState"
	treeLockFile  = stateFolder + "/treeState.lock"
)

// Config describes the log of one server instance.
type Config struct {
	// Dir is the log's folder; it is made, 0700, where it does not exist.
	Dir string
	// Origin is "<trust domain>/<cluster>/<instance>", without spaces and '+'. It is the log's name for ever.
	Origin string
	// Signer is the Ed25519 key for checkpoints; not a CA's.
	Signer crypto.Signer
	// MustExist refuses to begin a log: the caller knows that there was one.
	MustExist bool
	// CheckpointInterval is the time between checkpoints of a growing log; 0 = 1 s, least 100 ms.
	CheckpointInterval time.Duration
	// Metrics takes the signet_log_* series until Close; nil = none.
	Metrics prometheus.Registerer
	// Logger takes what no caller can be told; nil = nobody.
	Logger *slog.Logger
}

// Log is a log opened for appending.
type Log struct {
	dir     string
	vkey    string
	folder  folder
	logger  *slog.Logger
	metrics *metrics
	guard   *guard

	appender *tessera.Appender
	shutdown func(context.Context) error
	cancel   context.CancelFunc
	lock     *durable.DirLock
	// Calls go from Append to write; the channel is never full, since what is pending is bounded.
	fed chan *call
	// signing wakes the follower: a checkpoint of a size is about to be published.
	signing  chan struct{}
	followed chan struct{}

	// covered is the size of the last checkpoint signed.
	covered atomic.Uint64
	// damaged is set once the log was found to contradict itself: nothing is appended to it any more.
	damaged atomic.Pointer[error]

	mu           sync.Mutex // what callers and Close share
	closing      bool
	pending      int
	pendingBytes int
	idle         chan struct{} // closed when closing and nothing is pending
	failing      bool          // the last append failed; for logging only what changes
	failedAt     time.Time     // when an append failed last
	failure      error         // why; nil when one has worked since
	probe        probe

	cpMu    sync.Mutex // the newest checkpoint, and who waits for it
	current Checkpoint
	changed chan struct{}
	proofs  map[[2]uint64][][]byte // between sizes; renewed with the checkpoint
	unsaid  bool                   // the last checkpoint could not be made; for logging only what changes

	closeOnce sync.Once
	closeErr  error
}

// Open opens the log in a folder, or begins one. What was acknowledged before a crash is there. It refuses a folder that
// another process holds, that belongs to another log, or whose files contradict the last checkpoint (ErrDamaged).
// The log outlives ctx; Close ends it.
func Open(ctx context.Context, c Config) (_ *Log, err error) {
	vkey, verifier, err := noteKey(c.Origin, c.Signer)
	if err != nil {
		return nil, err
	}
	interval := c.CheckpointInterval
	if interval == 0 {
		interval = defaultCheckpointInterval
	}
	if interval < leastCheckpointInterval {
		return nil, fmt.Errorf("open the audit log: a checkpoint every %v is too often, the least is %v", interval, leastCheckpointInterval)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Dir == "" {
		return nil, errors.New("open the audit log: no folder is named")
	}

	if err := durable.Dir(c.Dir); err != nil {
		return nil, fmt.Errorf("open the audit log: %w", err)
	}
	lock, err := durable.Lock(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("open the audit log: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()

	// The log lives as long as it is not closed, whatever becomes of the caller's context.
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			cancel()
		}
	}()
	l := &Log{
		dir: c.Dir, vkey: vkey, folder: folder{os.DirFS(c.Dir)}, logger: c.Logger, lock: lock, cancel: cancel,
		fed: make(chan *call, maxPending), signing: make(chan struct{}, 1), followed: make(chan struct{}),
		idle: make(chan struct{}), changed: make(chan struct{}),
	}
	if _, err := fs.Stat(l.folder.files, layout.CheckpointPath); c.MustExist && errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open the audit log in %s: %w: it is gone; put the folder back from its newest backup, for a new log would hide what was issued", c.Dir, ErrDamaged)
	}
	if err := l.identify(); err != nil {
		return nil, err
	}
	last, err := l.lastCheckpoint(c.Origin, verifier)
	if err != nil {
		return nil, err
	}
	if l.guard, err = newGuard(running, l.folder, verifier, c.Signer, last); err != nil {
		return nil, fmt.Errorf("open the audit log in %s: %w", c.Dir, err)
	}
	l.guard.signed, l.guard.refused = l.willPublish, l.willNotPublish
	l.covered.Store(last.Size)
	size, err := l.integrated(last)
	if errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("%w; restore the folder from its newest backup", err)
	}
	if err != nil {
		return nil, fmt.Errorf("open the audit log in %s: %w", c.Dir, err)
	}

	if l.metrics, err = newMetrics(c.Dir, c.Metrics); err != nil {
		return nil, fmt.Errorf("open the audit log: %w", err)
	}
	defer func() {
		if err != nil {
			l.metrics.unregister()
		}
	}()

	driver, err := posix.New(running, posix.Config{Path: c.Dir})
	if err != nil {
		return nil, fmt.Errorf("open the audit log in %s: %w", c.Dir, err)
	}
	appender, shutdown, _, err := tessera.NewAppender(running, driver, tessera.NewAppendOptions().
		WithCheckpointSigner(l.guard).
		WithBatching(handOverEntries, handOver).
		WithCheckpointInterval(interval).
		WithCheckpointRepublishInterval(max(republishInterval, interval)).
		WithGarbageCollectionInterval(collectInterval).
		WithShutdownTimeout(shutdownTimeout))
	if err != nil {
		return nil, fmt.Errorf("open the audit log in %s: %w", c.Dir, err)
	}
	l.appender, l.shutdown = appender, shutdown

	l.metrics.size.Set(float64(size))

	go l.follow(running, verifier)
	l.wakeFollower()
	if err := l.firstCheckpoint(ctx); err != nil {
		return nil, err
	}
	go l.write(size)
	return l, nil
}

// identify writes the verifier key beside the log, or refuses a folder that has another.
func (l *Log) identify() error {
	path := filepath.Join(l.dir, verifierKeyFile)
	was, err := l.folder.read(verifierKeyFile, maxVerifierKey)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := fs.Stat(l.folder.files, treeStateFile); err == nil {
			return fmt.Errorf("open the audit log in %s: %w: its %s is missing; restore it from its newest backup", l.dir, ErrDamaged, verifierKeyFile)
		}
		if err := durable.CreateFile(path, []byte(l.vkey+"\n"), 0o644); err != nil {
			return fmt.Errorf("open the audit log: %w", err)
		}
		return nil
	case err != nil:
		return fmt.Errorf("open the audit log in %s: %w", l.dir, err)
	case string(bytes.TrimSpace(was)) != l.vkey:
		return fmt.Errorf("open the audit log in %s: the folder holds the log %.300q, not %q: each server has a log, and a key for it, of its own", l.dir, bytes.TrimSpace(was), l.vkey)
	case string(was) != l.vkey+"\n": // as Verify has it
		return fmt.Errorf("open the audit log in %s: %w: its %s is not as it was written; restore it from its newest backup", l.dir, ErrDamaged, verifierKeyFile)
	}
	return nil
}

// lastCheckpoint is what was published last, if anything was. Tessera would begin anew over a folder whose state file is
// gone, and sign whatever its state file says where the checkpoint is gone; neither is left to it.
func (l *Log) lastCheckpoint(origin string, v note.Verifier) (Checkpoint, error) {
	cp, err := l.folder.checkpoint(v)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := fs.Stat(l.folder.files, "tile"); err == nil {
			return Checkpoint{}, fmt.Errorf("open the audit log in %s: %w: it has tiles and no checkpoint; restore the file %s from its newest backup", l.dir, ErrDamaged, layout.CheckpointPath)
		}
		return Checkpoint{Origin: origin, RootHash: rfc6962.DefaultHasher.EmptyRoot()}, nil
	}
	if err != nil {
		return Checkpoint{}, fmt.Errorf("open the audit log in %s: %w", l.dir, err)
	}
	if _, err := fs.Stat(l.folder.files, treeStateFile); err != nil {
		return Checkpoint{}, fmt.Errorf("open the audit log in %s: %w: it has a checkpoint and no state: %w; a copy can be read, not appended to", l.dir, ErrDamaged, err)
	}
	path := filepath.Join(l.dir, layout.CheckpointPath)
	if info, err := os.Stat(path); err == nil && time.Until(info.ModTime()) > 0 {
		// Tessera publishes when the file is older than the interval, which one from the future (a clock set back, a
		// copied folder) would not be for a long time.
		if err := os.Chtimes(path, time.Time{}, time.Now()); err != nil {
			return Checkpoint{}, fmt.Errorf("open the audit log in %s: %w", l.dir, err)
		}
	}
	return cp, nil
}

// integrated is how many entries the log has: what was durable but not yet under a checkpoint when the process ended is
// found by Tessera's own state. Tessera would go on from it whatever it says, so it is held against what the next checkpoint
// will be held against.
func (l *Log) integrated(last Checkpoint) (uint64, error) {
	size, root, err := l.folder.treeState()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, nil // A log that is being begun; lastCheckpoint refuses every other.
	case err != nil:
		return 0, err
	case size < last.Size:
		return 0, fmt.Errorf("%w: it has %d entries, its checkpoint has %d", ErrDamaged, size, last.Size)
	}
	_, is, err := l.guard.grow(size)
	if err != nil {
		return 0, fmt.Errorf("its state tells of %d entries: %w", size, err)
	}
	if !bytes.Equal(is, root) {
		return 0, damage(treeStateFile, "says that its %d entries have the root %.32x, they have %x", size, root, is)
	}
	return size, nil
}

// firstCheckpoint waits until there is one; only a log that was killed while it was begun has none at once.
func (l *Log) firstCheckpoint(ctx context.Context) error {
	for {
		l.cpMu.Lock()
		have, changed := l.current.Note != nil, l.changed
		l.cpMu.Unlock()
		if have {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("open the audit log in %s: wait for its first checkpoint: %w", l.dir, ctx.Err())
		}
	}
}

// Append appends the entries, in order, and returns their places in the same order. When it returns without an error they
// are durable and integrated; a checkpoint covers them within about the checkpoint interval. An error means that nothing
// may be released on their word: they may be in the log or not, in part or all.
//
// It waits for the disk at most until ctx ends, or 10 s. ErrOverloaded, ErrDamaged and ErrClosed can be told apart.
func (l *Log) Append(ctx context.Context, entries []*auditv1.Entry) ([]Receipt, error) {
	if len(entries) == 0 {
		return nil, nil
	}
	start := time.Now()
	receipts, err := l.append(ctx, entries)
	l.metrics.duration.Observe(time.Since(start).Seconds())
	if err != nil {
		l.metrics.errors.Inc()
		return nil, fmt.Errorf("append %d entries to the audit log: %w", len(entries), err)
	}
	return receipts, nil
}

// call is one Append on its way.
type call struct {
	leaves  []*tessera.Entry
	futures []tessera.IndexFuture
	size    int // of all leaves, in bytes
	done    chan result
}

type result struct {
	receipts []Receipt
	err      error
}

func (l *Log) append(ctx context.Context, entries []*auditv1.Entry) ([]Receipt, error) {
	c := &call{leaves: make([]*tessera.Entry, len(entries)), done: make(chan result, 1)}
	for i, e := range entries {
		raw, err := marshal(e)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		c.leaves[i] = tessera.NewEntry(raw)
		c.size += len(raw)
	}
	if l.damaged.Load() != nil {
		err := l.Usable()
		l.report(err)
		return nil, err
	}
	if err := l.enter(len(entries), c.size); err != nil {
		return nil, err
	}
	l.fed <- c
	timeout := time.NewTimer(appendTimeout)
	defer timeout.Stop()
	select {
	case r := <-c.done:
		return r.receipts, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("the entries are not durable yet: %w", context.Cause(ctx))
	case <-timeout.C:
		return nil, fmt.Errorf("the entries are not durable after %v: the disk does not answer", appendTimeout)
	}
}

// write makes batches of what is fed, hands them to Tessera and waits for their places, one batch after the other, as
// Tessera does. Its Add blocks while the disk does, and its futures do, and neither knows a context: so callers, who do,
// wait beside it. What a call holds is given back when it is settled, not when its caller loses patience: that is what
// bounds what a stuck disk can pile up. next is the place of the next entry.
func (l *Log) write(next uint64) {
	var waiting []*call
	cut := true // as far as is known: the batch before may have been cut short, by a crash or by a full disk
	for {
		if len(waiting) == 0 {
			first, fed := <-l.fed
			if !fed {
				return
			}
			waiting = append(waiting, first)
		}
		waiting = l.gather(waiting)
		batch := waiting[:fitting(waiting, next)]
		// Tessera panics when the folder is gone, so this is asked as late as can be.
		covered, err := l.covered.Load(), l.Usable()
		if err == nil && cut {
			err = l.removeCut()
		}
		cut = false
		if err == nil {
			for _, c := range batch {
				c.futures = make([]tessera.IndexFuture, len(c.leaves))
				for i, leaf := range c.leaves {
					c.futures[i] = l.appender.Add(context.Background(), leaf)
				}
			}
		}
		for _, c := range batch {
			r := result{err: err}
			if err == nil {
				r.receipts, r.err = l.places(c, covered)
			}
			if r.err == nil {
				next = r.receipts[len(r.receipts)-1].Index + 1
			} else {
				cut = true
			}
			l.report(r.err)
			l.leave(len(c.leaves), c.size)
			c.done <- r
		}
		waiting = slices.Delete(waiting, 0, len(batch))
	}
}

// removeCut removes the full tiles that a batch has left which was cut short before the log was said to have its entries.
// Tessera would take the first of them for the beginning of its next tile, as soon as the log ends where that one begins.
func (l *Log) removeCut() error {
	size, _, err := l.folder.treeState()
	if err != nil {
		return fmt.Errorf("the log cannot be written: %w", err)
	}
	if covered := l.covered.Load(); size < covered {
		err := fmt.Errorf("%w: its state has %d entries, its last checkpoint %d", ErrDamaged, size, covered)
		l.condemn(err)
		return err
	}
	for i := (size + layout.TileWidth - 1) / layout.TileWidth; i <= (size+maxPending)/layout.TileWidth; i++ {
		if err := durable.Remove(filepath.Join(l.dir, layout.TilePath(0, i, 0))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("the log cannot be written: %w", err)
		}
	}
	return nil
}

// gather waits for others to join those that wait.
func (l *Log) gather(waiting []*call) []*call {
	n := entriesOf(waiting)
	joined := func() (some bool) {
		for n < batchEntries {
			select {
			case c := <-l.fed: // not closed while something is pending
				waiting, n, some = append(waiting, c), n+len(c.leaves), true
			default:
				return some
			}
		}
		return some
	}
	begun := time.Now()
	joined() // what has come while the batch before was written
	for wait := batchAge - handOver; n < batchEntries; wait = batchPoll {
		age := time.Since(begun)
		// n / age is the pace, and a bundle / batchFillAge what it must be.
		soon := n < layout.EntryBundleWidth && time.Duration(n)*batchFillAge >= layout.EntryBundleWidth*age
		if age >= batchMaxAge && !soon {
			break
		}
		time.Sleep(wait)
		if !joined() {
			break
		}
	}
	return waiting
}

// fitting is how many of the calls make the batch whose first entry is at next: all, but of a bundle's worth and more only
// those up to the last that ends where a bundle does.
func fitting(calls []*call, next uint64) int {
	fit := len(calls)
	if entriesOf(calls) < layout.EntryBundleWidth {
		return fit
	}
	for i, c := range calls {
		if next += uint64(len(c.leaves)); next%layout.EntryBundleWidth == 0 {
			fit = i + 1
		}
	}
	return fit
}

func entriesOf(calls []*call) (n int) {
	for _, c := range calls {
		n += len(c.leaves)
	}
	return n
}

// marshal makes the bytes that are stored and hashed, once.
func marshal(e *auditv1.Entry) ([]byte, error) {
	if e.GetEvent() == nil || e.GetTime() <= 0 {
		return nil, errors.New("it has no event or no time")
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(e)
	if err != nil {
		return nil, err
	}
	if len(raw) > maxEntry {
		return nil, fmt.Errorf("it has %d bytes, an entry has at most %d", len(raw), maxEntry)
	}
	return raw, nil
}

// Usable reports why the log takes no entries just now; nil when it does. It is cheap: readiness asks it.
func (l *Log) Usable() error {
	if err := l.damaged.Load(); err != nil {
		return fmt.Errorf("%w; nothing more is appended to it: run `signet log verify --dir %s`", *err, l.dir)
	}
	// Tessera panics, on a goroutine of its own, when it cannot open its lock file; so that it could not has to be seen before
	// it is asked: the folder is gone or read-only, or no descriptor is left. Not by opening the file: closing it would drop
	// Tessera's lock (fcntl(2) F_SETLK), but for O_PATH, which opens no more than the way there.
	path := filepath.Join(l.dir, treeLockFile)
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err == nil {
		_ = unix.Close(fd) // no data hangs on it
		err = unix.Access(path, unix.W_OK)
	}
	if err != nil {
		return fmt.Errorf("the log cannot be written: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	return nil
}

// places waits for all entries of a call. covered is the size of the last checkpoint when they were added.
func (l *Log) places(c *call, covered uint64) ([]Receipt, error) {
	receipts := make([]Receipt, len(c.futures))
	var failed error
	for i, future := range c.futures {
		at, err := future()
		if err != nil {
			failed = cmp.Or(failed, fmt.Errorf("the log cannot be written: %w", err))
			continue
		}
		if at.Index < covered {
			// Somebody has set the tree back under our feet; what is there now was overwritten.
			err := fmt.Errorf("%w: an entry got the index %d, below the last checkpoint's size %d", ErrDamaged, at.Index, covered)
			l.condemn(err)
			failed = err
			continue
		}
		receipts[i] = Receipt{Index: at.Index}
		l.metrics.size.Set(float64(at.Index + 1)) // Calls are settled in the order of their places.
	}
	if failed != nil {
		return nil, failed
	}
	return receipts, nil
}

func (l *Log) enter(n, size int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closing {
		return ErrClosed
	}
	if l.pending+n > maxPending || l.pendingBytes+size > maxPendingBytes {
		return fmt.Errorf("%w: %d entries wait for the disk", ErrOverloaded, l.pending)
	}
	l.pending += n
	l.pendingBytes += size
	l.metrics.pending.Set(float64(l.pending))
	return nil
}

func (l *Log) leave(n, size int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending -= n
	l.pendingBytes -= size
	l.metrics.pending.Set(float64(l.pending))
	if l.closing && l.pending == 0 {
		close(l.idle)
	}
}

// report logs when appending begins to fail and when it works again.
func (l *Log) report(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil && !l.failing:
		l.logger.Error("the audit log cannot be written: nothing is issued until it can", "dir", l.dir, "err", err)
	case err == nil && l.failing:
		l.logger.Info("the audit log can be written again", "dir", l.dir)
	}
	l.failing = err != nil
	l.failedAt, l.failure = time.Now(), err
}

// condemn ends appending for good: the log contradicts what was signed.
func (l *Log) condemn(err error) {
	if l.damaged.CompareAndSwap(nil, &err) {
		l.metrics.inconsistencies.Inc()
		l.logger.Error("the audit log is damaged: nothing more is appended or signed", "dir", l.dir, "err", err)
	}
}

func (l *Log) willPublish(size uint64) {
	l.covered.Store(size)
	l.metrics.selfCheckTime.SetToCurrentTime()
	l.wakeFollower()
}

func (l *Log) willNotPublish(err error) {
	if errors.Is(err, ErrDamaged) {
		l.condemn(err)
		return
	}
	l.cpMu.Lock()
	defer l.cpMu.Unlock()
	if !l.unsaid {
		l.unsaid = true
		l.logger.Error("the audit log's checkpoint cannot be made", "dir", l.dir, "err", err)
	}
}

func (l *Log) wakeFollower() {
	select {
	case l.signing <- struct{}{}:
	default:
	}
}

// follow takes notice of every checkpoint that is published. Tessera tells when one is signed, not when it is in place,
// which is a rename later.
func (l *Log) follow(ctx context.Context, v note.Verifier) {
	defer close(l.followed)
	var retry <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.signing:
		case <-retry:
		}
		retry = nil
		cp, err := l.folder.checkpoint(v)
		if err == nil && cp.Size >= l.covered.Load() {
			l.published(cp)
			continue
		}
		retry = time.After(5 * time.Millisecond)
	}
}

func (l *Log) published(cp Checkpoint) {
	l.cpMu.Lock()
	defer l.cpMu.Unlock()
	if bytes.Equal(cp.Note, l.current.Note) {
		return
	}
	if l.unsaid {
		l.unsaid = false
		l.logger.Info("the audit log's checkpoints are made again", "dir", l.dir)
	}
	l.current = cp
	l.proofs = map[[2]uint64][][]byte{}
	close(l.changed)
	l.changed = make(chan struct{})
	l.metrics.checkpointTime.SetToCurrentTime()
}

// VerifierKey is what checkpoints are verified with (https://c2sp.org/signed-note, "Verifier keys").
func (l *Log) VerifierKey() string { return l.vkey }

// Checkpoint is the newest published checkpoint, a signed note. It costs no disk access.
func (l *Log) Checkpoint(context.Context) ([]byte, error) {
	l.cpMu.Lock()
	defer l.cpMu.Unlock()
	return l.current.Note, nil
}

// Changed is closed when there is a newer checkpoint than there was at the call: ask it first, then for Checkpoint.
func (l *Log) Changed() <-chan struct{} {
	l.cpMu.Lock()
	defer l.cpMu.Unlock()
	return l.changed
}

// Consistency proves that the log of size to continues the log of size from (RFC 6962 §2.1.2). Both are at most the size
// of the newest checkpoint.
func (l *Log) Consistency(ctx context.Context, from, to uint64) ([][]byte, error) {
	l.cpMu.Lock()
	cp, hashes := l.current, l.proofs[[2]uint64{from, to}]
	l.cpMu.Unlock()
	if from > to || to > cp.Size {
		return nil, fmt.Errorf("prove the audit log's consistency from %d to %d: its checkpoint has %d entries", from, to, cp.Size)
	}
	if hashes != nil || from == 0 || from == to {
		return hashes, nil
	}
	pb, err := client.NewProofBuilder(ctx, cp.Size, l.folder.ReadTile)
	if err == nil {
		hashes, err = pb.ConsistencyProof(ctx, from, to)
	}
	if err != nil {
		return nil, fmt.Errorf("prove the audit log's consistency from %d to %d: %w", from, to, err)
	}
	l.cpMu.Lock()
	defer l.cpMu.Unlock()
	// All agents that follow the log ask for the same few proofs.
	if len(l.proofs) < maxProofs && bytes.Equal(cp.Note, l.current.Note) {
		l.proofs[[2]uint64{from, to}] = hashes
	}
	return hashes, nil
}

const maxProofs = 1024

// Close waits for what is in flight and for the checkpoint that covers it, and gives the folder back. After an error
// (ctx ended, the disk is stuck) the process should end: the folder is then free, and nothing acknowledged is lost.
func (l *Log) Close(ctx context.Context) error {
	l.closeOnce.Do(func() { l.closeErr = l.close(ctx) })
	return l.closeErr
}

func (l *Log) close(ctx context.Context) error {
	l.mu.Lock()
	l.closing = true
	if l.pending == 0 {
		close(l.idle)
	}
	l.mu.Unlock()
	select {
	case <-l.idle:
	case <-ctx.Done():
		// Cancelling now would leave Tessera's futures without an answer for ever.
		return fmt.Errorf("close the audit log in %s: entries still wait for the disk: %w", l.dir, ctx.Err())
	}
	close(l.fed)
	var err error
	if l.damaged.Load() == nil { // Else no checkpoint will come.
		if err = l.shutdown(ctx); err != nil {
			err = fmt.Errorf("close the audit log in %s: wait for its last checkpoint: %w", l.dir, err)
		}
	}
	l.cancel()
	<-l.followed
	l.metrics.unregister()
	return errors.Join(err, l.lock.Close())
}
