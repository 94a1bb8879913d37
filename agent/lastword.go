package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"github.com/signet-ca/signet/internal/bell"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/trust"
)

// lastWord is acknowledged.json: what the workloads were last known to believe and hold.
type lastWord struct {
	// Sequence and Digest of the oldest bundle among them; zero = one of them believed nothing yet.
	Sequence uint64 `json:"sequence"`
	Digest   []byte `json:"digest"`
	// Issuers of their leaves, by key identifier.
	Issuers [][]byte `json:"issuers"`
	// unknown: the file can't be read.
	unknown bool
}

func (w *lastWord) check() error {
	switch {
	case len(w.Digest) != len(trust.Digest{}):
		return fmt.Errorf("a digest of %d bytes, want %d", len(w.Digest), len(trust.Digest{}))
	case len(w.Issuers) > maxIssuers || slices.ContainsFunc(w.Issuers, func(id []byte) bool { return len(id) > maxKeyID }):
		return fmt.Errorf("more issuers than %d, or longer ones than %d bytes", maxIssuers, maxKeyID)
	}
	return nil
}

// version is the bundle that all workloads have believed; zero where that is not known.
func (w *lastWord) version() trust.Version {
	if w.unknown {
		return trust.Version{}
	}
	return trust.Version{Sequence: w.Sequence, Digest: trust.Digest(w.Digest)}
}

// olderThan reports whether it is not known that all have believed this version. Of one number with another content neither is.
func (w *lastWord) olderThan(v trust.Version) bool {
	b := w.version()
	return b != v && b.Sequence <= v.Sequence
}

func (w *lastWord) same(x *lastWord) bool {
	return w.Sequence == x.Sequence && bytes.Equal(w.Digest, x.Digest) && slices.EqualFunc(w.Issuers, x.Issuers, bytes.Equal)
}

// memory is what is known over a restart of workloads that are not back yet. Envoys outlive the agent, and go on with what they
// have until they have found it again: an agent that has heard none of them must not speak as if there were none.
//
// What is on disk is never better than what is so: a word is told before it is written where it says that more is
// acknowledged, so that what a crash takes back is waited for once more. Where it says that less is, an Envoy has come back
// late with an old bundle; a crash before that is written is as if it had come later.
type memory struct {
	// over rings when what was before the start counts no more.
	over bell.Bell
	// first is of the first workload since the start.
	first sync.Once
	// writing is held over a write.
	writing sync.Mutex

	mu sync.Mutex
	// before is what was known before the start, until when it counts; nil = nothing, or no longer. until is zero before the
	// sockets are open.
	before *lastWord
	until  time.Time
	// stored is what is on disk; nil = nothing, or it can't be read. served: some workload was served, now or before.
	stored *lastWord
	served bool
}

// loadLastWord takes what the process before has left. A file that can't be read keeps nobody from starting: it counts as a
// word that nothing is acknowledged.
func (a *Agent) loadLastWord() {
	w := &lastWord{}
	err := durable.ReadValue(a.path(lastWordFile), maxLastWordFile, w)
	if err == nil {
		err = w.check()
	}
	m := &a.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return
	case err != nil:
		a.log.Error("what the workloads had acknowledged before this start is not known: they count as having acknowledged nothing until they may be back",
			"file", a.path(lastWordFile), "returned_within", a.config.returnTime.String(), "err", err)
		w = &lastWord{unknown: true}
	default:
		m.stored = w
	}
	m.before, m.served = w, true
}

// workloadsReturn begins the time in which the workloads of before come back: the sockets are open.
func (a *Agent) workloadsReturn() {
	m := &a.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.before == nil {
		return
	}
	m.until = a.now().Add(a.config.returnTime)
	time.AfterFunc(a.config.returnTime, func() {
		m.mu.Lock()
		m.before = nil
		m.mu.Unlock()
		m.over.Ring()
	})
}

// counting is what was known before the start, and until when that counts; nil = it counts no more.
func (m *memory) counting() (before *lastWord, until time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.before, m.until
}

// returnedBy is until when workloads may come back that have another bundle than the newest; zero = none is waited for.
func (a *Agent) returnedBy(newest trust.Bundle) time.Time {
	by := a.sds.ReturnsBy(newest.TrustDomain(), newest.Digest())
	if before, until := a.memory.counting(); before != nil && before.version().Digest != newest.Digest() && until.After(by) {
		by = until
	}
	return by
}

// serves notes that a workload is about to be served. What the first one is given may be all that it has when this process is
// killed, so that is written before.
func (a *Agent) serves() {
	a.memory.first.Do(func() {
		a.memory.mu.Lock()
		before := a.memory.served
		a.memory.served = true
		a.memory.mu.Unlock()
		if before {
			return
		}
		if err := a.storeLastWord(a.makeWord()); err != nil { // and tried again by keepLastWord
			a.log.Warn("could not write down what the first workload is given", "err", err)
		}
	})
}

// keepLastWord writes what changes, until it works.
func (a *Agent) keepLastWord(ctx context.Context) {
	failing := false
	for {
		changed := a.word.changed.Next()
		var retry <-chan time.Time
		err := a.storeLastWord(a.word.get())
		switch {
		case err != nil:
			retry = time.After(storeRetry)
			if !failing {
				a.log.Warn("could not write down what the workloads have acknowledged; trying again. A restart goes by what is on disk", "err", err)
			}
		case failing:
			a.log.Info("what the workloads have acknowledged is written down now")
		}
		failing = err != nil
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-retry:
		}
	}
}

// storeLastWord writes a word, if there is somebody of whom it is and it is another than the one on disk. What is not known is not
// written over what can't be read.
func (a *Agent) storeLastWord(w word) error {
	m := &a.memory
	m.writing.Lock()
	defer m.writing.Unlock()
	m.mu.Lock()
	served, stored := m.served, m.stored
	m.mu.Unlock()
	if !served || len(w.acks) == 0 || w.held == nil {
		return nil
	}
	last := &lastWord{Sequence: w.acks[0].Sequence, Digest: w.acks[0].Digest, Issuers: w.held.KeyIds}
	if stored != nil && stored.same(last) {
		return nil
	}
	if err := a.store(lastWordFile, last); err != nil {
		return err
	}
	m.mu.Lock()
	m.stored = last
	m.mu.Unlock()
	return nil
}
