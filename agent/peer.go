package agent

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/signet-ca/signet/identity"
)

// connPeer is the process behind a connection. It is attested for the first stream and held, by one descriptor, until the
// connection is closed: the streams of a connection have the same process behind them.
type connPeer struct {
	mu sync.Mutex
	// workload is nil until it was attested.
	workload *identity.Workload
	// hashed: its executable was to be hashed when it was attested.
	hashed bool
	held   []func()
	closed bool
}

var errConnectionClosed = errors.New("the connection is closed")

// attest asks the attestor for the first stream, and once more if hashes are wanted since: a registration by hash must not
// wait until an Envoy connects anew. What failed is asked again by the next stream.
func (p *connPeer) attest(ctx context.Context, by identity.WorkloadAttestor, conn net.Conn, hash bool) (identity.Workload, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return identity.Workload{}, errConnectionClosed
	case p.workload != nil && (p.hashed || !hash):
		return *p.workload, nil
	}
	w, err := by.AttestWorkload(ctx, conn)
	if err != nil {
		return identity.Workload{}, err
	}
	p.workload, p.hashed = &w, hash
	if w.Close != nil {
		p.held = append(p.held, w.Close) // at most two: who has been hashed is not asked again
	}
	return w, nil
}

// close lets go of the process; from now on it passes for gone.
func (p *connPeer) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, f := range p.held {
		f()
	}
	p.held = nil
}
