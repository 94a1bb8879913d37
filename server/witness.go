package server

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/time/rate"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/audit"
)

// What an agent may say of the log that can't be true of ours, and how many say so: labels of a metric.
const (
	claimAhead = "ahead"
	claimFork  = "fork"
	sayOne     = "one"
	saySeveral = "several"
)

const (
	// Reports are looked at once in reportEvery for each agent, after a few at once: each may cost a proof.
	reportEvery = time.Second
	reportBurst = 8
	// doubtLogged spaces what is logged of one agent's contradictions.
	doubtLogged = time.Minute
	// maxRoots is how many roots of former sizes are remembered.
	maxRoots = 4096
)

// witness compares what agents have seen of the log with the log.
//
// One agent that contradicts it may be broken into, and several could be: so their word is counted, logged and shown, and
// makes nobody stop. When a second agent says so too, which is what a log that was rolled back looks like, readiness shows
// it as well, without the server becoming unready.
type witness struct {
	log *audit.Log

	mu sync.Mutex
	// roots are those of our log that were proved, by size.
	roots map[uint64][]byte
	// doubts are the agents whose newest report contradicts the log.
	doubts map[string]time.Time
	// reports bounds each agent's.
	reports map[string]*rate.Limiter
}

// heed looks at a report. claim is empty when it fits the log, or was not looked at; several says whether more agents than
// this one contradict the log now, first whether it is worth a line in the log.
func (w *witness) heed(ctx context.Context, agent string, c *signetv1.CheckpointSeen, now time.Time) (claim, detail string, several, first bool) {
	if c.Size == 0 || !w.due(agent, now) {
		return "", "", false, false
	}
	claim, detail, err := w.compare(ctx, c.Size, c.RootHash)
	if err != nil {
		return "", "", false, false // the log can't be read just now, which shows elsewhere
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if claim == "" {
		delete(w.doubts, agent)
		return "", "", false, false
	}
	if w.doubts == nil {
		w.doubts = map[string]time.Time{}
	}
	last, known := w.doubts[agent]
	if first = !known || now.Sub(last) >= doubtLogged; first {
		w.doubts[agent] = now
	}
	return claim, detail, len(w.doubts) > 1, first
}

// due reports whether an agent's report is to be looked at.
func (w *witness) due(agent string, now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.reports[agent]
	if l == nil {
		if w.reports == nil {
			w.reports = map[string]*rate.Limiter{}
		}
		l = rate.NewLimiter(rate.Every(reportEvery), reportBurst)
		w.reports[agent] = l
	}
	return l.AllowN(now, 1)
}

// compare holds a size and a root hash against the log.
func (w *witness) compare(ctx context.Context, size uint64, root []byte) (claim, detail string, err error) {
	note, err := w.log.Checkpoint(ctx)
	if err != nil {
		return "", "", err
	}
	ours, err := parseCheckpoint(note)
	if err != nil {
		return "", "", err
	}
	if size > ours.size {
		return claimAhead, fmt.Sprintf("it has seen %d entries, the log has %d", size, ours.size), nil
	}
	w.mu.Lock()
	known, ok := w.roots[size]
	w.mu.Unlock()
	if size == ours.size {
		known, ok = ours.root, true
	}
	fork := fmt.Sprintf("it has seen another root hash at %d entries", size)
	if ok {
		if !bytes.Equal(known, root) {
			return claimFork, fork, nil
		}
		return "", "", nil
	}
	hashes, err := w.log.Consistency(ctx, size, ours.size)
	if err != nil {
		return "", "", err
	}
	// A proof of our own log holds for the root that it had at that size, and for no other (RFC 6962 §2.1.2).
	if proof.VerifyConsistency(rfc6962.DefaultHasher, size, ours.size, hashes, root, ours.root) != nil {
		return claimFork, fork, nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.roots) >= maxRoots || w.roots == nil {
		w.roots = map[uint64][]byte{}
	}
	w.roots[size] = bytes.Clone(root)
	return "", "", nil
}

// doubt says when more than one agent contradicts the log.
func (w *witness) doubt() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.doubts) < 2 {
		return nil
	}
	return fmt.Errorf("%d agents have seen another log than this one (%s): it was rolled back or replaced; stop issuing and compare both",
		len(w.doubts), clip(strings.Join(slices.Sorted(maps.Keys(w.doubts)), ", ")))
}

// heed takes an agent's report of a checkpoint.
func (s *Server) heed(ctx context.Context, agent string, c *signetv1.CheckpointSeen) {
	claim, detail, several, first := s.witness.heed(ctx, agent, c, s.now())
	if claim == "" {
		return
	}
	by, text := sayOne, "an agent contradicts the audit log, and no other does: look at that agent first, it may be broken into or restored from an older copy"
	if several {
		by, text = saySeveral, "SEVERAL AGENTS CONTRADICT THE AUDIT LOG: it was rolled back or replaced; stop issuing and compare both"
	}
	s.metrics.doubts.WithLabelValues(claim, by).Inc()
	if claim == claimAhead {
		s.metrics.ahead.Inc()
	}
	if first {
		s.log.Error(text, "agent", agent, "claim", claim, "detail", detail)
	}
}

// ourCheckpoint is what our own log has signed.
type ourCheckpoint struct {
	size uint64
	root []byte
}

// parseCheckpoint reads the second and third line of a checkpoint of our own (c2sp.org/tlog-checkpoint).
func parseCheckpoint(note []byte) (c ourCheckpoint, err error) {
	if c.size, err = checkpointSize(note); err != nil {
		return c, err
	}
	lines := strings.SplitN(string(note), "\n", 4)
	if len(lines) < 4 {
		return c, errors.New("the log's checkpoint is not a note")
	}
	c.root, err = base64.StdEncoding.DecodeString(lines[2])
	return c, err
}
