package sds

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/test/bubble"
)

// heldWire is a stream whose peer has more to say than is heard, and reads only when let.
type heldWire[Q, A any] struct {
	grpc.ServerStream
	ctx      context.Context
	requests chan *Q
	release  chan struct{}
}

func (w *heldWire[Q, A]) Context() context.Context { return w.ctx }

func (w *heldWire[Q, A]) Recv() (*Q, error) {
	select {
	case r := <-w.requests:
		return r, nil
	default:
	}
	<-w.ctx.Done()
	return nil, io.EOF
}

func (w *heldWire[Q, A]) Send(*A) error {
	<-w.release
	return nil
}

// A connection may end while the sender is busy and the receiver has the next request in hand: whoever of the two leaves
// first, the stream must end, or its caller (a pidfd, a wanted certificate) is held for ever.
func TestAStreamEndsThoughARequestWasNeverHeard(t *testing.T) {
	t.Run(protocolSotW, func(t *testing.T) {
		endsUnheard(t, (*Server).StreamSecrets, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})
	})
	t.Run(protocolDelta, func(t *testing.T) {
		endsUnheard(t, (*Server).DeltaSecrets, &discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default"}})
	})
}

func endsUnheard[Q, A any](t *testing.T, method func(*Server, grpc.BidiStreamingServer[Q, A]) error, request *Q) {
	bubble.Test(t, func(t *testing.T) {
		w, _ := newWorld(t)
		s := must(New(Config{Workloads: w}))
		here, there := net.Pipe()
		defer here.Close()
		defer there.Close()
		_, info, err := ConnCredentials().ServerHandshake(here)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(peer.NewContext(t.Context(), &peer.Peer{AuthInfo: info}))
		wire := &heldWire[Q, A]{ctx: ctx, requests: make(chan *Q, 2), release: make(chan struct{})}
		for range 2 {
			wire.requests <- request
		}
		ended := make(chan error, 1)
		go func() { ended <- method(s, wire) }()
		synctest.Wait() // The first is being answered, the second is in the receiver's hand.
		cancel()
		synctest.Wait() // The receiver has left.
		close(wire.release)
		synctest.Wait()
		select {
		case <-ended:
		default:
			t.Fatal("the stream is still there")
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.open != 0 {
			t.Errorf("%d views are still open", w.open)
		}
	})
}

func TestAPeerThatReadsNothingIsClosedAfterHalfAMinute(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		silent := r.unread(t)
		quick := r.open()
		quick.subscribe("default")
		quick.one()
		for range 300 { // many times the window
			w.setSVID(ca.issue(t, leaf{id: web}))
			quick.one()
		}
		time.Sleep(sendTimeout - time.Second)
		synctest.Wait()
		if n := len(r.sds.Streams()); n != 2 {
			t.Fatalf("%d streams before the time is up, want 2", n)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		w.mu.Lock()
		open := w.open
		w.mu.Unlock()
		if n := len(r.sds.Streams()); n != 1 || open != 1 || quick.ended() != nil {
			t.Errorf("%d streams and %d views are left (%v), want the one that is read", n, open, quick.ended())
		}
		var err error
		for err == nil {
			_, err = silent.Recv()
		}
		if status.Code(err) != codes.Unavailable {
			t.Errorf("it ends with %v", err)
		}
		if n := r.metric(r.sds.metrics.ended.WithLabelValues(endUnread)); n != 1 {
			t.Errorf("%v streams counted", n)
		}
		if !strings.Contains(r.logs.String(), "does not read") {
			t.Error("the log does not say why")
		}
	})
}

func TestAPeerThatReadsSlowlyIsNotClosed(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		slow := r.unread(t)
		behind := 0
		for range 12 {
			for range 60 { // more than it reads
				w.setSVID(ca.issue(t, leaf{id: web}))
				synctest.Wait()
			}
			time.Sleep(sendTimeout - time.Second)
			if all := r.sds.Streams(); len(all) == 1 && all[0].Names[0].Serial != w.SVID(web).Serial {
				behind++
			}
			for range 20 {
				if _, err := slow.Recv(); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
		}
		if behind < 6 {
			t.Fatalf("it was behind %d times of 12: nothing waited for it", behind)
		}
	})
}

// unread is a stream for the default name with a small window, of which nothing is read unless asked for.
func (r *rig) unread(t *testing.T) secretv3.SecretDiscoveryService_StreamSecretsClient {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	stream := must(secretv3.NewSecretDiscoveryServiceClient(r.connect(grpc.WithStaticStreamWindowSize(64 << 10))).StreamSecrets(ctx))
	if err := stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}}); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	return stream
}

// Who says nothing of a bundle must not hold up a trust change for ever; whoever answers is left alone.
func TestAStreamThatLeavesABundleUnansweredIsEnded(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		honest, rejects, late, deltas := r.open(), r.open(), r.open(), r.delta()
		honest.subscribe("ROOTCA")
		honest.ack(honest.one(), "ROOTCA")
		rejects.subscribe("ROOTCA")
		rejects.ack(rejects.one(), "ROOTCA")
		late.subscribe("ROOTCA")
		late.one() // answers the next only
		onlyLeaf := r.open()
		onlyLeaf.subscribe("default")
		onlyLeaf.one()
		mute := r.open()
		mute.subscribe("ROOTCA", "default")
		mute.take()
		deltas.subscribe(exampleTD.IDString())
		deltas.one()

		time.Sleep(answerTimeout - time.Second)
		newest := bundleOf(exampleTD, 2, ca, newRoot(t, "root B"))
		w.setBundle(newest)
		honest.ack(honest.one(), "ROOTCA")
		rejects.nack(rejects.one(), "", "no", "ROOTCA")
		late.ack(late.one(), "ROOTCA")
		mute.one()
		// Nothing that it says without an answer, and nothing that comes for it, gives it more time.
		mute.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"ROOTCA", "default"}, VersionInfo: "older"})
		mute.take()
		deltas.one()
		if mute.ended() != nil || deltas.ended() != nil {
			t.Fatalf("ended before the time is up: %v, %v", mute.ended(), deltas.ended())
		}
		time.Sleep(2 * time.Second)
		mute.wantEnd(codes.Unavailable)
		deltas.wantEnd(codes.Unavailable)
		if n := r.metric(r.sds.metrics.ended.WithLabelValues(endUnanswered)); n != 2 {
			t.Errorf("%v streams counted, want 2", n)
		}
		lines := 0
		for line := range strings.Lines(r.logs.String()) {
			if strings.Contains(line, "neither accepted nor rejected") {
				lines++
				if !strings.Contains(line, `"peer":"connection"`) || !strings.Contains(line, "sidecar") {
					t.Errorf("the log does not name the caller: %s", line)
				}
			}
		}
		if lines != 2 {
			t.Errorf("%d lines in the log, want 2", lines)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		for _, c := range []*client{honest, rejects, late, onlyLeaf} {
			if c.ended() != nil {
				t.Errorf("one that answers, or has no bundle: %v", c.ended())
			}
		}
		rejects.cancel()
		synctest.Wait()
		time.Sleep(ReturnTime)
		synctest.Wait()
		if v, ok := r.sds.OldestBundle(exampleTD); !ok || v != newest.Version() {
			t.Errorf("oldest %v %v, want the newest: only the mute ones were behind", v, ok)
		}
	})
}

func TestAnAnswerStandsForWhatWasSentBeforeIt(t *testing.T) {
	at := time.Now()
	c := &content{kind: kindBundle}
	var s subscription
	s.set([]string{"ROOTCA", "ALL"})
	w, other := s.wanted[0], s.wanted[1]
	push := func(w *want, c *content, nonce string) {
		at = at.Add(time.Second)
		s.pushed(w, c, nonce, at)
	}
	since := func(want time.Time) {
		t.Helper()
		if !w.waiting.Equal(want) {
			t.Fatalf("waits since %s, want %s", w.waiting, want)
		}
	}
	push(w, c, "1")
	first := at
	push(other, c, "other")
	push(w, c, "2")
	push(w, c, "3")
	third := at
	since(first)
	s.answered("2")
	since(third)
	s.answered("1")
	since(third)
	s.answered("3")
	since(time.Time{})
	push(w, c, "4")
	push(w, c, "5")
	push(w, c, "6")
	s.answered("6")
	push(w, nil, "withdrawn")
	s.answered("4")
	since(time.Time{})
	if s.waiting() != other {
		t.Fatal("the other name was not answered")
	}
}

// A node that starts all at once is slow to speak.
func TestAConnectionHasTimeToBegin(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, _ *world, _ *root) {
		slow, silent := must(r.dial()), must(r.dial())
		defer silent.Close()
		time.Sleep(connectTimeout - time.Second)
		dial := r.dial
		r.dial = func() (net.Conn, error) { return slow, nil }
		c := r.open()
		c.subscribe("default")
		c.one()
		r.dial = dial
		time.Sleep(2 * time.Second)
		synctest.Wait()
		_ = silent.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := io.Copy(io.Discard, silent); err != nil {
			t.Errorf("one that never begins: %v, want that it is closed", err)
		}
	})
}
