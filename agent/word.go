package agent

import (
	"bytes"
	"context"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/internal/bell"
)

const (
	// settle gathers what changes while streams come and go into one word.
	settle = 200 * time.Millisecond
	// lookEvery is how often is looked which certificates have ended.
	lookEvery = 10 * time.Second
)

// word is what the server is told of this agent's workloads, and of itself: one workload that believes nothing must not
// make the agent pass for one that does.
type word struct {
	acks []*signetv1.BundleAck
	// held is nil where it is not known.
	held   *signetv1.IssuersHeld
	stored *signetv1.BundleAck
}

func (w word) same(x word) bool {
	return sameAcks(w.acks, x.acks) && proto.Equal(w.stored, x.stored) && proto.Equal(w.held, x.held)
}

func sameAcks(a, b []*signetv1.BundleAck) bool {
	return len(a) == len(b) && (len(a) == 0 || proto.Equal(a[0], b[0]))
}

// newestWord is the word as it was made last: for the server, who may be away, and for the disk.
type newestWord struct {
	// changed rings when there is another.
	changed bell.Bell

	mu   sync.Mutex
	word word
}

func (n *newestWord) get() word {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.word
}

func (n *newestWord) set(w word) {
	n.mu.Lock()
	same := w.same(n.word)
	n.word = w
	n.mu.Unlock()
	if !same {
		n.changed.Ring()
	}
}

func (a *Agent) makeWord() word {
	return word{acks: a.acks(), held: a.issuersHeld(), stored: a.stored.word()}
}

// keepWord makes the word anew when something has changed.
func (a *Agent) keepWord(ctx context.Context) {
	// What is held is looked at when one of these has rung, and not at each turn: it takes a look at every stream.
	streamLeaves, hubLeaves, cacheLeaves := a.sds.LeavesChanged(), a.hub.leaves.Next(), a.cache.leaves.Next()
	// Certificates end by time alone.
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	var settled <-chan time.Time
	leavesChanged := true
	for {
		acksChanged, bundleChanged, stored, over := a.sds.AcksChanged(), a.bundles.Changed(), a.stored.changed.Next(), a.memory.over.Next()
		now := a.word.get()
		if !proto.Equal(now.stored, a.stored.word()) {
			settled = time.After(0) // the server gives no certificate under a root that is not known here
		} else if acks := a.acks(); !sameAcks(now.acks, acks) {
			if wait := a.patience(acks); settled == nil || wait == 0 {
				settled = time.After(wait)
			}
		} else if leavesChanged && settled == nil {
			settled = time.After(settle)
		}
		select {
		case <-ctx.Done():
			return
		case <-acksChanged:
		case <-bundleChanged:
		case <-stored:
		case <-over:
			leavesChanged = true
		case <-streamLeaves:
			streamLeaves, leavesChanged = a.sds.LeavesChanged(), true
		case <-hubLeaves:
			hubLeaves, leavesChanged = a.hub.leaves.Next(), true
		case <-cacheLeaves:
			cacheLeaves, leavesChanged = a.cache.leaves.Next(), true
		case <-look.C:
			leavesChanged = true
		case <-settled:
			settled, leavesChanged = nil, false
			a.word.set(a.makeWord())
		}
	}
}

// patience is how long a word waits for more to change. That all believe the newest bundle waits for nothing: the server
// goes on with a trust change when every agent has said so.
func (a *Agent) patience(word []*signetv1.BundleAck) time.Duration {
	newest, ok := a.bundles.Get(a.member.Load().td)
	if digest := newest.Digest(); ok && len(word) == 1 && bytes.Equal(word[0].Digest, digest[:]) {
		return 0
	}
	return settle
}

// acks says what this agent's workloads believe: the oldest bundle among those that subscribe to one, or have until lately, or,
// where nobody does, the bundle that the next one to come would get. A bundle that is not on disk yet is not among them: the one
// before stands for it.
func (a *Agent) acks() []*signetv1.BundleAck {
	td := a.member.Load().td
	v, ok := a.sds.OldestBundle(td)
	if !ok {
		b, known := a.bundles.Get(td)
		if !known {
			return nil
		}
		v = b.Version()
	}
	if before, _ := a.memory.counting(); before != nil && before.olderThan(v) {
		v = before.version()
	}
	if v, ok = a.stored.honest(v); !ok {
		return nil
	}
	return []*signetv1.BundleAck{{TrustDomain: td.Name(), Digest: v.Digest[:], Sequence: v.Sequence}}
}
