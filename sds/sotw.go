package sds

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"strconv"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
)

// metadataTrustedCA is the key in the node's metadata by which a sidecar asks for plain trusted_ca. SPIRE's name.
const metadataTrustedCA = "disable_spiffe_cert_validation"

type sotwStream = grpc.BidiStreamingServer[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]

// sotw is one state-of-the-world stream. One goroutine owns all of it and does all sending; a second one receives.
// There is no queue between what changes and what is sent: whoever is slow gets the newest when he is ready.
type sotw struct {
	*Server
	wire   sotwStream
	view   View
	info   *connInfo
	number uint64 // for logs

	started   time.Time
	first     bool // no request yet
	validator Validator
	sub       subscription
	nonces    uint64
	prefix    string // of this stream's nonces
	served    bool   // a first secret was sent
}

// StreamSecrets implements the service, state of the world.
func (s *Server) StreamSecrets(wire sotwStream) error {
	started := s.now()
	view, info, leave, err := s.open(wire.Context())
	if err != nil {
		return err
	}
	defer leave()
	var prefix [4]byte
	_, _ = rand.Read(prefix[:]) // never fails (crypto/rand)
	st := &sotw{
		Server: s, wire: wire, view: view, info: info, number: s.streams.Add(1),
		started: started, first: true, validator: s.validator, prefix: hex.EncodeToString(prefix[:]) + "-",
	}
	streams := s.metrics.streams.WithLabelValues(protocolSotW)
	streams.Inc()
	defer streams.Dec()
	defer func() { st.forget(st.sub.wanted) }()
	return st.run(wire.Context())
}

func (st *sotw) run(ctx context.Context) error {
	requests := make(chan *discoveryv3.DiscoveryRequest)
	received := make(chan error, 1)
	go func() { // ends with the stream: its context ends when run returns
		for {
			r, err := st.wire.Recv()
			if err != nil {
				received <- err
				return
			}
			select {
			case requests <- r:
			case <-ctx.Done():
				return
			}
		}
	}()

	closing := st.closing
	var end <-chan time.Time
	for {
		changed := st.view.Changed()
		if err := st.view.Err(); err != nil {
			return st.ending("SDS stream ends: the caller has lost its identities", st.info, err)
		}
		next, err := st.push()
		if err != nil {
			return err
		}
		var retry <-chan time.Time
		if !next.IsZero() {
			retry = time.After(max(next.Sub(st.now()), time.Second))
		}
		select {
		case r := <-requests:
			if err := st.request(r); err != nil {
				return err
			}
		case err := <-received:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-ctx.Done(): // the receiver may have left with a request in hand
			return status.FromContextError(ctx.Err()).Err()
		case <-changed:
		case <-retry:
		case <-closing:
			closing, end = nil, time.After(st.jitter())
		case <-end:
			return errClosing
		}
	}
}

// request takes in what Envoy says: an answer to something sent, a subscription, or both at once.
func (st *sotw) request(r *discoveryv3.DiscoveryRequest) error {
	if t := r.GetTypeUrl(); t != "" && t != secretType { // may be left out where the service has one type only
		return status.Errorf(codes.InvalidArgument, "type_url %q: this service has %s only", clip(t, 128), secretType)
	}
	names := r.GetResourceNames()
	if len(names) > st.limits.NamesPerStream {
		return status.Errorf(codes.InvalidArgument, "%d resource names in a request: at most %d are allowed", len(names), st.limits.NamesPerStream)
	}
	for _, n := range names {
		if len(n) > st.limits.NameLength {
			return status.Errorf(codes.InvalidArgument, "a resource name of %d bytes: at most %d are allowed", len(n), st.limits.NameLength)
		}
	}
	first := st.first
	if first {
		st.first = false
		// The node comes with the first request only; decided now, the form of bundles can't flip later.
		st.validator = validatorFor(r.GetNode(), st.validator)
		st.log.Debug("SDS stream", "stream", st.number, "peer", st.info.caller.String(),
			"node", foreign(r.GetNode().GetId()), "validator", string(st.validator))
	}

	answered := st.answer(r)
	dropped, changed := st.sub.set(names)
	st.forget(dropped)
	// Asked again for what is already subscribed, and not as the answer to something: Envoy has a new place for the same
	// secret, or missed it. A NACK is never a reason to send again (xDS, "ACK/NACK").
	if !first && !changed && !answered && r.GetErrorDetail() == nil && !st.sub.current(r.GetVersionInfo()) {
		st.sub.resend()
	}
	return nil
}

// answer notes an ACK or NACK, and reports whether the request was one. error_detail alone makes it a NACK.
func (st *sotw) answer(r *discoveryv3.DiscoveryRequest) bool {
	d, ok := st.sub.answered(r.GetResponseNonce())
	if !ok {
		return false
	}
	c := d.content
	if e := r.GetErrorDetail(); e != nil {
		st.sub.rejected = remember(st.sub.rejected, c.digest)
		st.callers.reject(st.info.caller, c.digest)
		st.metrics.nacks.WithLabelValues(c.kind).Inc()
		st.log.Warn("Envoy rejected a secret and keeps the one it has; it is not sent again, the next one will be",
			"stream", st.number, "peer", st.info.caller.String(), "name", parseTarget(d.name), "secret", c, "serial", c.serial,
			"code", e.GetCode(), "reason", foreign(e.GetMessage()))
		return true
	}
	if st.callers.hasRejected(st.info.caller, c.digest) {
		st.log.Warn("Envoy acknowledged a secret that it had rejected before: this means nothing, it has not applied it",
			"stream", st.number, "peer", st.info.caller.String(), "name", parseTarget(d.name), "secret", c)
		return true
	}
	st.metrics.acks.WithLabelValues(c.kind).Inc()
	if w := st.sub.find(d.name); w != nil && w.counted {
		st.beliefs.move(c.td, &w.acknowledged, &c.belief)
		w.acknowledged = c.belief
	}
	return true
}

// forget takes dropped names out of what is believed.
func (st *sotw) forget(dropped []*want) {
	for _, w := range dropped {
		if w.counted {
			st.beliefs.leave(w.bundle, w.acknowledged)
		}
	}
}

// count has a want for a bundle among the beliefs. What was acknowledged and came back under a later sequence, as after
// an aborted rotation, is believed already: it isn't sent again, and must not pass for old.
func (st *sotw) count(w *want, now content) {
	switch {
	case !w.counted:
		w.counted, w.bundle = true, now.td
		st.beliefs.join(now.td)
	case w.acknowledged.digest == now.belief.digest && w.acknowledged != now.belief:
		st.beliefs.move(now.td, &w.acknowledged, &now.belief)
		w.acknowledged = now.belief
	}
}

// push sends every name whose content is owed, each in a response of its own: then the answer tells exactly which one
// was taken. It returns when to look again though nothing changes, or zero.
func (st *sotw) push() (retry time.Time, err error) {
	for _, w := range st.sub.wanted {
		sec, again := st.secrets.resolve(st.view, w.target, st.validator)
		if sec == nil {
			if !again.IsZero() && (retry.IsZero() || again.Before(retry)) {
				retry = again
			}
			if !w.waiting {
				w.waiting = true
				st.log.Info("nothing to send under this name yet: it is not granted to the caller, not issued, or unknown; it is sent if it appears",
					"stream", st.number, "peer", st.info.caller.String(), "name", w.target)
			}
			continue
		}
		w.waiting = false
		if sec.content.kind == kindBundle {
			st.count(w, sec.content)
		}
		if !st.sub.owed(w, sec.content.digest) {
			continue
		}
		st.nonces++
		nonce := st.prefix + strconv.FormatUint(st.nonces, 10)
		if err := st.wire.Send(&discoveryv3.DiscoveryResponse{
			VersionInfo: sec.content.digest.version(),
			Resources:   []*anypb.Any{sec.body},
			TypeUrl:     secretType,
			Nonce:       nonce,
		}); err != nil {
			return time.Time{}, err
		}
		st.sub.delivered(w, sec.content, nonce)
		st.metrics.pushes.WithLabelValues(sec.content.kind).Inc()
		if !st.served {
			st.served = true
			st.metrics.firstSecret.Observe(st.now().Sub(st.started).Seconds())
		}
		st.log.Debug("secret sent", "stream", st.number, "name", w.target, "secret", sec.content, "serial", sec.content.serial)
	}
	return retry, nil
}

// validatorFor is the form of bundles for a node: its own wish, or else the default.
func validatorFor(n *corev3.Node, byDefault Validator) Validator {
	v, ok := n.GetMetadata().GetFields()[metadataTrustedCA]
	if !ok {
		return byDefault
	}
	disable, ok := v.AsInterface().(bool)
	if text, isText := v.AsInterface().(string); isText {
		b, err := strconv.ParseBool(text)
		disable, ok = b, err == nil
	}
	switch {
	case !ok:
		return byDefault
	case disable:
		return TrustedCA
	default:
		return SPIFFE
	}
}
