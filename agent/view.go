package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/bell"
	"github.com/signet-ca/signet/sds"
	"github.com/signet-ca/signet/trust"
)

// knowWait bounds how long a caller waits for an agent that has just been started for the first time.
const knowWait = 10 * time.Second

// view is what one stream's caller may see: it implements sds.View. Everything but the constants and the bell is guarded by hub.mu.
type view struct {
	hub       *hub
	workload  identity.Workload
	selectors []identity.Selector
	// socket is the dedicated socket it came by; "" = the common one.
	socket string

	granted []identity.Registration
	// wants are the entries of this view, by registration.
	wants map[string]*entry
	// kept, mostly nil, are certificates that it was given under a registration that is gone, while another still gives the ID.
	kept   map[spiffeid.ID]*held
	err    error
	closed bool
	// changed rings at every change. It has a lock of its own, so that waiting streams are not in each other's way.
	changed bell.Bell
}

var _ sds.View = (*view)(nil)

// Attest implements sds.Workloads: it asks who is behind the connection and which registrations that fits.
func (a *Agent) Attest(ctx context.Context, conn net.Conn) (sds.View, error) {
	c, ok := conn.(*socketConn)
	if !ok {
		return nil, status.Error(codes.Internal, "the agent cannot tell by which socket this caller came")
	}
	a.admitted.Add(1)
	start := a.now()
	w, err := c.peer.attest(ctx, a.attestor, c.UnixConn, a.hub.wantsHash())
	a.metrics.attestationTime.Observe(a.now().Sub(start).Seconds())
	if err != nil {
		a.metrics.attestations.WithLabelValues(attestorUnix, resultFailed).Inc()
		a.denials.warn("could not attest a caller", "socket", c.socket, "err", err)
		if identity.NoDescriptors(err) {
			return nil, status.Error(codes.ResourceExhausted, "the agent has no file descriptor left to look at who is calling: raise its limit of open files (LimitNOFILE= in its unit), or close connections, and connect again")
		}
		return nil, status.Error(codes.PermissionDenied, "the agent could not tell who is calling: connect again, and see the agent's log")
	}
	v, err := a.view(ctx, w, c.socket)
	if err != nil {
		result := resultFailed
		if status.Code(err) == codes.PermissionDenied {
			result = resultRefused
		}
		if ctx.Err() == nil {
			a.denials.warn("refused a caller", "instance", clip(w.Instance, maxInstance), "socket", c.socket, "code", status.Code(err).String(), "err", status.Convert(err).Message())
		}
		a.metrics.attestations.WithLabelValues(attestorUnix, result).Inc()
		return nil, err
	}
	a.serves()
	a.metrics.attestations.WithLabelValues(attestorUnix, resultOK).Inc()
	return v, nil
}

func (a *Agent) view(ctx context.Context, w identity.Workload, socket string) (*view, error) {
	if err := a.waitKnown(ctx); err != nil {
		return nil, err
	}
	return a.hub.open(w, socket)
}

// waitKnown waits until the agent knows its registrations and what to trust, within bounds.
func (a *Agent) waitKnown(ctx context.Context) error {
	timer := time.NewTimer(knowWait)
	defer timer.Stop()
	for _, ready := range []<-chan struct{}{a.hub.known, a.trusted, a.enrolled} {
		select {
		case <-ready:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-timer.C:
			return status.Error(codes.Unavailable, "the agent has not yet heard from its server whom it may serve: see its log, or /readyz?verbose, and try again")
		}
	}
	return nil
}

// open makes a view of a workload that fits at least one registration.
func (h *hub) open(w identity.Workload, socket string) (*view, error) {
	v := &view{hub: h, workload: w, selectors: slices.Clone(w.Selectors), socket: socket, wants: map[string]*entry{}}
	if socket != "" {
		v.selectors = append(v.selectors, socketSelector(socket))
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.views[v] = struct{}{}
	h.match(v)
	return v, v.err
}

// refusal says what was seen and what to do about it.
func (v *view) refusal(agent string) string {
	const most = 12
	var seen []string
	for i, s := range v.selectors {
		if i == most {
			seen = append(seen, fmt.Sprintf("and %d more", len(v.selectors)-most))
			break
		}
		seen = append(seen, fmt.Sprintf("%q", clip(string(s), 128)))
	}
	if len(seen) == 0 {
		seen = []string{"nothing"}
	}
	which := ""
	if v.socket != "" {
		which = fmt.Sprintf(" that names %q", socketSelector(v.socket))
	}
	if v.workload.Foreign != "" {
		return fmt.Sprintf("no registration%s fits this caller, whose uid, gid and path don't count since %s; agent %s sees %s: run it in the agent's user namespace, or apply a registration by what is seen, or by a socket of its own",
			which, clip(v.workload.Foreign, 256), agent, strings.Join(seen, ", "))
	}
	return fmt.Sprintf("no registration%s fits this caller, of which agent %s sees %s: apply one for this agent with some of these selectors, by `signet registration apply`; if there is one, its identity may be banned: see `signet identity list`",
		which, agent, strings.Join(seen, ", "))
}

// Identities implements sds.View. An ID that several registrations give is named once, at its first place.
func (v *view) Identities() []spiffeid.ID {
	v.hub.mu.Lock()
	defer v.hub.mu.Unlock()
	ids := make([]spiffeid.ID, 0, len(v.granted))
	for _, r := range v.granted {
		if !slices.Contains(ids, r.ID) {
			ids = append(ids, r.ID)
		}
	}
	return ids
}

// SVID implements sds.View. An expired certificate is withheld.
func (v *view) SVID(id spiffeid.ID) *sds.SVID {
	// Before a key leaves: is the process that was attested still the one that is there?
	if !v.alive() {
		return nil
	}
	v.hub.mu.Lock()
	defer v.hub.mu.Unlock()
	if v.err != nil || v.closed {
		return nil
	}
	if c := v.hub.certificate(v, id); c != nil {
		return c.svid
	}
	return nil
}

// alive ends the view if its process is gone.
func (v *view) alive() bool {
	v.hub.mu.Lock()
	defer v.hub.mu.Unlock()
	if v.closed || v.err != nil {
		return false
	}
	// One poll(2) that doesn't wait.
	if v.workload.Alive == nil || v.workload.Alive() {
		return true
	}
	v.hub.end(v, status.Error(codes.PermissionDenied, "the process that opened this connection is gone: connect again"))
	return false
}

// Refusal implements sds.View: a caller is told of the ban of an identity that its own selectors would give it, and of no other.
func (v *view) Refusal(id spiffeid.ID) error {
	v.hub.mu.Lock()
	defer v.hub.mu.Unlock()
	_, shut := v.hub.split()
	for _, r := range identity.Match(shut, v.selectors) {
		if r.ID == id && bySocket(r, v.socket) {
			return status.Error(codes.PermissionDenied, isBanned(r))
		}
	}
	return nil
}

// TrustDomain implements sds.View.
func (v *view) TrustDomain() spiffeid.TrustDomain {
	v.hub.mu.Lock()
	defer v.hub.mu.Unlock()
	return v.hub.td
}

// TrustDomains implements sds.View: a caller sees its own.
func (v *view) TrustDomains() []spiffeid.TrustDomain { return []spiffeid.TrustDomain{v.TrustDomain()} }

// Bundle implements sds.View: a caller sees the bundle of its own trust domain.
func (v *view) Bundle(td spiffeid.TrustDomain) (trust.Bundle, bool) {
	if td != v.TrustDomain() {
		return trust.Bundle{}, false
	}
	return v.hub.bundles.Get(td)
}

// Changed implements sds.View.
func (v *view) Changed() <-chan struct{} { return v.changed.Next() }

// errClosed is what Err says after Close.
var errClosed = errors.New("view is closed")

// Err implements sds.View.
func (v *view) Err() error {
	v.hub.mu.Lock()
	defer v.hub.mu.Unlock()
	if v.err == nil && v.closed {
		return errClosed
	}
	return v.err
}

// Close implements sds.View.
func (v *view) Close() {
	v.hub.mu.Lock()
	defer v.hub.mu.Unlock()
	if v.closed {
		return
	}
	v.closed = true
	for name := range v.wants {
		v.hub.release(v, name)
	}
	delete(v.hub.views, v)
}
