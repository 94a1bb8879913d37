package sds

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/trust"
)

// metadataTrustedCA is the key in the node's metadata by which a sidecar asks for plain trusted_ca. SPIRE's name.
const metadataTrustedCA = "disable_spiffe_cert_validation"

// sendTimeout is how long a peer may leave a response unread while more is waiting for it.
const sendTimeout = 30 * time.Second

// answerTimeout is how long a peer may leave a bundle without an ACK or NACK. Until it has answered, it counts as one that
// does not know a new root; a mute one must not hold up a trust change for ever.
const answerTimeout = 2 * time.Minute

// request is what the requests of both protocols have in common.
type request interface {
	GetTypeUrl() string
	GetNode() *corev3.Node
	GetResponseNonce() string
	GetErrorDetail() *rpcstatus.Status
}

// protocol is one of the two forms of xDS: its words, and nothing that is remembered.
type protocol[R request] interface {
	Context() context.Context
	Recv() (R, error)
	label() string
	// names are the lists of names in a request.
	names(R) [][]string
	// subscribe takes in what a request says of the subscription; answered tells that it answers a push too.
	subscribe(s *subscription, r R, first, answered bool) (dropped []*want)
	push(nonce, name string, s *secret) error
	// withdraw reports whether the protocol has a word for it.
	withdraw(nonce, name string) (sent bool, err error)
}

// stream is one stream of either protocol. One goroutine owns all of it and does all sending; a second one receives.
// There is no queue between what changes and what is sent: whoever is slow gets the newest when he is ready.
type stream struct {
	*Server
	view     View
	info     *connInfo
	number   uint64 // for logs and Streams
	protocol string

	started   time.Time
	first     bool // no request yet
	validator Validator
	nonces    uint64
	prefix    string // of this stream's nonces
	served    bool   // a first secret was sent
	lacks     int    // names reported as having nothing to send
	mute      bool   // it was ended because it leaves a bundle without an answer

	// mu is for Streams: the owner holds it to write what follows, and needs it for nothing else.
	mu   sync.Mutex
	node string
	sub  subscription
}

// converse is the life of a stream.
func converse[R request](s *Server, p protocol[R]) error {
	started := s.now()
	view, info, leave, err := s.open(p.Context())
	if err != nil {
		return err
	}
	defer leave()
	var prefix [4]byte
	_, _ = rand.Read(prefix[:]) // never fails (crypto/rand)
	st := &stream{
		Server: s, view: view, info: info, number: s.streams.Add(1), protocol: p.label(),
		started: started, first: true, validator: s.validator, prefix: hex.EncodeToString(prefix[:]) + "-",
	}
	s.live.add(st)
	defer s.leaves.Ring()
	defer s.live.remove(st)
	count := s.metrics.streams.WithLabelValues(st.protocol)
	count.Inc()
	defer count.Dec()
	defer st.part()
	return run(p.Context(), st, p)
}

func run[R request](ctx context.Context, st *stream, p protocol[R]) error {
	requests := make(chan R)
	received := make(chan error, 1)
	go func() { // ends with the stream: its context ends when run returns
		for {
			r, err := p.Recv()
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
			st.metrics.ended.WithLabelValues(endIdentity).Inc()
			return st.ending("SDS stream ends: the caller has lost its identities", st.info, err)
		}
		next, err := push(st, p)
		if err != nil {
			return err
		}
		var retry <-chan time.Time
		if !next.IsZero() {
			retry = time.After(max(next.Sub(st.now()), time.Second))
		}
		var mute <-chan time.Time
		if w := st.sub.waiting(); w != nil {
			left := answerTimeout - st.now().Sub(w.waiting)
			if left <= 0 {
				return st.unanswered(w)
			}
			mute = time.After(left)
		}
		select {
		case r := <-requests:
			if err := hear(st, p, r); err != nil {
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
		case <-mute:
		case <-closing:
			closing, end = nil, time.After(st.jitter())
		case <-end:
			st.metrics.ended.WithLabelValues(endStopping).Inc()
			return errClosing
		}
	}
}

// unanswered is the end of a stream that has left a bundle without an answer.
func (st *stream) unanswered(w *want) error {
	st.mute = true
	st.metrics.ended.WithLabelValues(endUnanswered).Inc()
	st.logRefusal(slog.LevelWarn, "SDS stream ended: its peer has neither accepted nor rejected a trust bundle, and a trust change would wait for it",
		"stream", st.number, "protocol", st.protocol, "peer", st.info.caller.String(), "node", st.node, "name", w.target, "waited", answerTimeout.String())
	return status.Errorf(codes.Unavailable, "the trust bundle under %s got neither an ACK nor a NACK for %s; connect again", w.shown(), answerTimeout)
}

// hear takes in what Envoy says: an answer to something sent, a subscription, or both at once.
func hear[R request](st *stream, p protocol[R], r R) error {
	if err := st.checkType(r.GetTypeUrl()); err != nil {
		return err
	}
	for _, names := range p.names(r) {
		if err := st.checkNames(names); err != nil {
			return err
		}
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	first := st.first
	if first {
		st.first = false
		// The node comes with the first request only; decided now, the form of bundles can't flip later.
		st.validator = validatorFor(r.GetNode(), st.validator)
		st.node = strconv.Quote(foreign(r.GetNode().GetId()).clean())
		st.log.Debug("SDS stream", "stream", st.number, "protocol", st.protocol, "peer", st.info.caller.String(),
			"node", foreign(r.GetNode().GetId()), "validator", string(st.validator))
	}
	answered := st.answer(r.GetResponseNonce(), r.GetErrorDetail())
	st.forget(p.subscribe(&st.sub, r, first, answered))
	return st.checkCount(len(st.sub.wanted))
}

// answer notes an ACK or NACK, and reports whether there was one. error_detail alone makes it a NACK.
func (st *stream) answer(nonce string, e *rpcstatus.Status) bool {
	d, ok := st.sub.answered(nonce)
	if !ok {
		return false
	}
	c, w := d.content, st.sub.find(d.name)
	if c != nil && c.kind == kindSVID {
		defer st.leaves.Ring()
	}
	switch {
	case c == nil && e == nil: // of a withdrawal
	case c == nil:
		st.log.Warn("Envoy rejected the withdrawal of a secret and goes on using it",
			"stream", st.number, "peer", st.info.caller.String(), "name", parseTarget(d.name), "code", e.GetCode(), "reason", foreign(e.GetMessage()))
	case e != nil:
		st.sub.rejected = remember(st.sub.rejected, c.digest)
		st.callers.reject(st.info.caller, c.digest)
		st.metrics.nacks.WithLabelValues(c.kind).Inc()
		if w != nil {
			w.refused, w.reason = c, foreign(e.GetMessage()).printable()
			w.hasNot(c)
		}
		st.log.Warn("Envoy rejected a secret and keeps the one it has; it is not sent again, the next one will be",
			"stream", st.number, "peer", st.info.caller.String(), "name", parseTarget(d.name), "secret", c, "serial", c.serial,
			"code", e.GetCode(), "reason", foreign(e.GetMessage()))
	default:
		if st.taken(w, parseTarget(d.name), c) {
			st.metrics.acks.WithLabelValues(c.kind).Inc()
		}
	}
	return true
}

// taken notes that the peer says to use the content now, and reports whether that can be believed.
func (st *stream) taken(w *want, name target, c *content) bool {
	if st.callers.hasRejected(st.info.caller, c.digest) {
		if w != nil && (w.refused == nil || w.refused.digest != c.digest) {
			w.refused, w.reason = c, "rejected on an earlier stream; acknowledged since, which means nothing"
		}
		st.log.Warn("Envoy acknowledged a secret that it had rejected before: this means nothing, it has not applied it",
			"stream", st.number, "peer", st.info.caller.String(), "name", name, "secret", c)
		return false
	}
	if w == nil {
		return true
	}
	w.acked, w.refused, w.reason = c, nil, ""
	for i := range w.believed {
		b := &w.believed[i]
		if j := slices.IndexFunc(c.says, func(s stated) bool { return s.td == b.td }); j >= 0 {
			st.beliefs.move(b.td, &b.belief, &c.says[j].belief)
			*b = c.says[j]
		}
	}
	return true
}

// part is the end of the stream. Its validator goes on with what it has, until it is back: that counts on. A mute one was waited
// for long enough.
func (st *stream) part() {
	for _, w := range st.sub.wanted {
		for _, b := range w.believed {
			if kept, ok := b.kept(w.came); ok && !st.mute {
				st.beliefs.ended.add(kept)
			}
		}
	}
	now := st.now()
	st.sub.leaves(func(issuer string, notAfter time.Time) {
		if !now.After(notAfter) {
			st.endedLeaves.add(issuer)
		}
	})
	st.forget(st.sub.wanted)
}

// forget takes dropped names out of what is believed.
func (st *stream) forget(dropped []*want) {
	for _, w := range dropped {
		for _, b := range w.believed {
			st.beliefs.leave(b.td, b.belief)
		}
		w.believed = nil
	}
	if len(dropped) > 0 {
		st.leaves.Ring()
	}
}

// count has a want for bundles among the beliefs. What was acknowledged and came back under a later sequence, as after
// an aborted rotation, is believed already: it isn't sent again, and must not pass for old.
func (st *stream) count(w *want, now *content) {
	if slices.Equal(w.believed, now.says) {
		return
	}
	next := make([]stated, 0, len(now.says))
	for _, n := range now.says {
		i := slices.IndexFunc(w.believed, func(b stated) bool { return b.td == n.td })
		switch {
		case i < 0:
			st.beliefs.join(n.td)
			next = append(next, stated{td: n.td, first: n.belief})
		case w.believed[i].digest == n.digest:
			st.beliefs.move(n.td, &w.believed[i].belief, &n.belief)
			next = append(next, n)
		default:
			next = append(next, w.believed[i])
		}
	}
	for _, b := range w.believed {
		if !slices.ContainsFunc(next, func(n stated) bool { return n.td == b.td }) {
			st.beliefs.leave(b.td, b.belief)
		}
	}
	w.believed = next
}

// push sends every name whose content is owed, each in a response of its own: then the answer tells exactly which one
// was taken. Bundles go first, and certificates are measured by those: a validator on the stream that is given a certificate
// under a new root has been given the root. It returns when to look again though nothing changes, or zero.
func push[R request](st *stream, p protocol[R]) (retry time.Time, err error) {
	view := &steady{View: st.view}
	bundles, err := pushAll(st, p, view, target.bundles)
	if err != nil {
		return time.Time{}, err
	}
	svids, err := pushAll(st, p, view, func(t target) bool { return !t.bundles() })
	if retry = bundles; retry.IsZero() || !svids.IsZero() && svids.Before(retry) {
		retry = svids
	}
	return retry, err
}

// steady is a view whose bundles don't change.
type steady struct {
	View
	known []trust.Bundle
}

// Bundle implements View.
func (v *steady) Bundle(td spiffeid.TrustDomain) (trust.Bundle, bool) {
	for _, b := range v.known {
		if b.TrustDomain() == td {
			return b, true
		}
	}
	b, ok := v.View.Bundle(td)
	if ok && !b.IsZero() {
		v.known = append(v.known, b)
	}
	return b, ok
}

// pushAll is push for the names of one sort.
func pushAll[R request](st *stream, p protocol[R], view View, sort func(target) bool) (retry time.Time, err error) {
	for _, w := range st.sub.wanted {
		if !sort(w.target) {
			continue
		}
		sec, why, again := st.secrets.resolve(view, w.target, st.validator)
		if sec == nil {
			if !again.IsZero() && (retry.IsZero() || again.Before(retry)) {
				retry = again
			}
			if err := lack(st, p, w, why); err != nil {
				return time.Time{}, err
			}
			continue
		}
		if !st.offer(w, sec.content) {
			continue
		}
		nonce := st.nonce()
		if err := st.send(func() error { return p.push(nonce, w.name, sec) }); err != nil {
			return time.Time{}, err
		}
		st.note(w, sec.content, nonce)
		st.metrics.pushes.WithLabelValues(sec.content.kind).Inc()
		if !st.served {
			st.served = true
			st.metrics.firstSecret.Observe(st.now().Sub(st.started).Seconds())
		}
		st.log.Debug("secret sent", "stream", st.number, "name", w.target, "secret", sec.content, "serial", sec.content.serial)
	}
	return retry, nil
}

// offer notes that there is content for the name, and reports whether it is to be sent.
func (st *stream) offer(w *want, c *content) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	w.absent = ""
	st.count(w, c)
	if w.claimed == c.version() { // from an earlier stream; a claim is believed as much as an ACK
		w.sent = c
		st.taken(w, w.target, c)
	}
	w.claimed = ""
	return st.sub.owed(w, c)
}

// lack notes that there is nothing for the name, and withdraws what the stream holds of it if it is no longer granted.
// What is withdrawn is forgotten: granted once more, it is sent once more.
func lack[R request](st *stream, p protocol[R], w *want, why absence) error {
	if w.absent != why {
		st.metrics.unanswered.WithLabelValues(string(why)).Inc()
		level := slog.LevelInfo
		if st.lacks++; st.lacks > st.limits.NamesPerStream { // names that come and go must not fill the log
			level = slog.LevelDebug
		}
		st.log.Log(context.Background(), level, "nothing to send under this name yet; it is sent if it appears",
			"stream", st.number, "peer", st.info.caller.String(), "name", w.target, "reason", why)
	}
	held := w.sent != nil || w.claimed != ""
	st.mu.Lock()
	w.absent = why
	if why == absentNotGranted {
		st.forget([]*want{w})
		w.sent, w.claimed, w.waiting = nil, "", time.Time{}
	}
	st.mu.Unlock()
	if why != absentNotGranted || !held {
		return nil
	}
	nonce := st.nonce()
	sent := false
	err := st.send(func() (err error) { sent, err = p.withdraw(nonce, w.name); return err })
	if err != nil || !sent {
		return err
	}
	st.note(w, nil, nonce)
	st.metrics.removals.Inc()
	st.log.Info("secret withdrawn: its name is no longer granted to the caller", "stream", st.number, "peer", st.info.caller.String(), "name", w.target)
	return nil
}

func (st *stream) note(w *want, c *content, nonce string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.sub.pushed(w, c, nonce, st.now())
	if c != nil && c.kind == kindSVID {
		st.leaves.Ring()
	}
}

func (st *stream) nonce() string {
	st.nonces++
	return st.prefix + strconv.FormatUint(st.nonces, 10)
}

// send bounds how long a peer may not read. A stream that can't be written to can't be ended in order either, because its
// status would wait behind what is unread; so its connection is closed, and with it what the same process has there.
func (st *stream) send(f func() error) error {
	timer := time.AfterFunc(sendTimeout, func() { _ = st.info.conn.Close() })
	err := f()
	if !timer.Stop() {
		st.metrics.ended.WithLabelValues(endUnread).Inc()
		st.log.Warn("SDS connection closed: its peer does not read what it is sent", "stream", st.number, "peer", st.info.caller.String(), "waited", sendTimeout.String())
		return status.Errorf(codes.Unavailable, "nothing was read for %s; connect again", sendTimeout)
	}
	return err
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
