package agent

import (
	"bytes"
	"context"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/trust"
)

// A trust change goes on when every agent has said that all its workloads have it: nothing is gathered before that word.
func TestTheServerHearsAtOnceThatAllBelieveTheNewestBundle(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t, func(c *Config) {
		c.Attestor = &fakeAttestor{selectors: []identity.Selector{uid}, alive: true}
	})
	s := subscribe(t, connect(t, n.config.Socket), "ROOTCA")
	if _, err := s.next(); err != nil {
		t.Fatal(err)
	}
	told := func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		d, a := w.bundle.Digest(), w.acks["node-1"]
		return len(a) == 1 && bytes.Equal(a[0].Digest, d[:])
	}
	other := newCA(t, "other", nil)
	best := time.Hour
	for sequence := uint64(2); best >= settle && sequence < 22; sequence++ { // a busy machine may be late, but not each time
		b := mustBundle(t, sequence, w.root, other)
		start := time.Now()
		w.change(func() { w.bundle = b })
		if _, err := s.next(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the server is told", told)
		best = min(best, time.Since(start))
		other = newCA(t, "another", nil)
	}
	if best >= settle {
		t.Fatalf("the server was told after %s at best, which is after waiting for more", best)
	}
}

// What one workload leaves unanswered is not said of the agent itself, and the server need not wait for it.
func TestTheServerHearsAtOnceWhatIsStoredWhateverAWorkloadBelieves(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	w.change(func() { w.stored["node-1"] = &signetv1.BundleAck{} })
	n := w.start(t)
	mute, err := secretv3.NewSecretDiscoveryServiceClient(connect(t, n.config.Socket)).StreamSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := mute.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := mute.Recv(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the workloads believe nothing", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		a := w.acks["node-1"]
		return len(a) == 1 && a[0].Sequence == 0
	})
	eventually(t, "the agent has the first", w.onDisk(w.bundle))
	best := time.Hour
	for sequence := uint64(2); best >= settle && sequence < 22; sequence++ { // a busy machine may be late, but not each time
		b := mustBundle(t, sequence, w.root, newCA(t, "other", nil))
		start := time.Now()
		w.change(func() { w.bundle = b })
		eventually(t, "the server is told", w.onDisk(b))
		best = min(best, time.Since(start))
	}
	if best >= settle {
		t.Fatalf("the server was told after %s at best, which is after waiting for more", best)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if a := w.acks["node-1"]; len(a) != 1 || a[0].Sequence != 0 {
		t.Fatalf("the workloads pass for having acknowledged: %v", a)
	}
}

// An agent that has no bundle says so.
func TestAnAgentWithoutABundleNamesNone(t *testing.T) {
	w := newWorld(t)
	first := w.bundle
	w.bundle = trust.Bundle{}
	w.stored["node-1"] = &signetv1.BundleAck{}
	w.open()
	w.start(t)
	eventually(t, "none is told", w.onDisk(trust.Bundle{}))
	w.change(func() { w.bundle = first })
	eventually(t, "the first is told", w.onDisk(first))
}

// A server that has just started refuses leaves until Sync has told it what the agent believes: that refusal must not have to wait for
// the next try of Sync, which may be 15 s off and outlive the leaves.
func TestARefusalWakesTheStreamAsAnAnswerDoes(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	leafOf(t, n.config.Socket)
	woken := func() bool {
		select {
		case <-n.link.answered:
			return true
		default:
			return false
		}
	}
	woken()
	w.change(func() { w.trustFirst = true })
	if _, err := n.link.issue(t.Context(), nil); err == nil {
		t.Fatal("not refused")
	}
	if !woken() {
		t.Error("the server has refused, and who waits to connect is not told that it is there")
	}
	w.close()
	eventually(t, "the agent notices", func() bool { return !n.connected.Load() })
	woken()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := n.link.issue(ctx, nil); err == nil {
		t.Fatal("answered by nobody")
	}
	if woken() {
		t.Error("nobody has answered")
	}
}
