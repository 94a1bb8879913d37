package sds

import (
	"context"
	"io"
	"net"
	"testing"
	"testing/synctest"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
)

// heldWire is a stream whose peer has more to say than is heard, and reads only when let.
type heldWire struct {
	grpc.ServerStream
	ctx      context.Context
	requests chan *discoveryv3.DiscoveryRequest
	release  chan struct{}
}

func (w *heldWire) Context() context.Context { return w.ctx }

func (w *heldWire) Recv() (*discoveryv3.DiscoveryRequest, error) {
	select {
	case r := <-w.requests:
		return r, nil
	default:
	}
	<-w.ctx.Done()
	return nil, io.EOF
}

func (w *heldWire) Send(*discoveryv3.DiscoveryResponse) error {
	<-w.release
	return nil
}

// A connection may end while the sender is busy and the receiver has the next request in hand: whoever of the two leaves
// first, the stream must end, or its caller (a pidfd, a wanted certificate) is held for ever.
func TestAStreamEndsThoughARequestWasNeverHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
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
		wire := &heldWire{ctx: ctx, requests: make(chan *discoveryv3.DiscoveryRequest, 2), release: make(chan struct{})}
		for range 2 {
			wire.requests <- &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"default"}}
		}
		ended := make(chan error, 1)
		go func() { ended <- s.StreamSecrets(wire) }()
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
