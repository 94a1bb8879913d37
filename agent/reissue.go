package agent

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"time"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/rotation"
)

const (
	// maxIssuers that the server may want replaced, and that it is told of; maxKeyID bounds the key identifier of each, in bytes.
	maxIssuers, maxKeyID = 64, 64
	// maxReissue bounds the window in which leaves are replaced.
	maxReissue = 24 * time.Hour
	// Where the server gives another leaf of an issuer that it wants replaced, it is asked again after the first of these
	// times, then after twice as long, up to the last.
	reissueAgain, maxReissueAgain = time.Minute, time.Hour
)

// reissueOrder is the server's wish to have the leaves of an issuer replaced.
type reissueOrder struct {
	received time.Time
	window   time.Duration
}

// takeReissue takes an order, which replaces the one before. What is ordered again keeps its first time: a server that
// repeats itself at every connection must not put anything off.
func (a *Agent) takeReissue(m *signetv1.Reissue) error {
	if n := len(m.GetIssuerKeyIds()); n > maxIssuers {
		return fmt.Errorf("order to replace the leaves of %d issuers: at most %d are taken", n, maxIssuers)
	}
	// Compared before it is a duration: that would overflow.
	window := time.Duration(min(m.GetWindowMs(), maxReissue.Milliseconds())) * time.Millisecond
	if window < 0 {
		return fmt.Errorf("order to replace leaves within %d ms", m.GetWindowMs())
	}
	ids := make(map[string]struct{}, len(m.GetIssuerKeyIds()))
	for _, id := range m.GetIssuerKeyIds() {
		if len(id) == 0 || len(id) > maxKeyID {
			return fmt.Errorf("order to replace the leaves of an issuer with a key identifier of %d bytes: want 1 to %d", len(id), maxKeyID)
		}
		ids[string(id)] = struct{}{}
	}
	a.hub.reissue(ids, window)
	return nil
}

func (h *hub) reissue(ids map[string]struct{}, window time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	orders := make(map[string]reissueOrder, len(ids))
	for id := range ids {
		o, ok := h.orders[id]
		if !ok {
			o = reissueOrder{received: now, window: window}
			h.log.Warn("the server wants the certificates of an issuer replaced", "issuer_key_id", shortKeyID(id), "within", window.String())
		}
		orders[id] = o
	}
	for id := range h.orders {
		if _, ok := orders[id]; !ok {
			h.log.Info("the server no longer wants the certificates of an issuer replaced", "issuer_key_id", shortKeyID(id))
		}
	}
	h.orders = orders
	for name, e := range h.entries {
		if e.current == nil {
			continue
		}
		o, ok := orders[e.current.issuer]
		switch {
		case ok && e.replaceAt.IsZero():
			e.replaceAt = rotation.ReissueAt(e.current.chain[0].SerialNumber.Bytes(), o.received, o.window)
			if soon := now.Add(gather); e.replaceAt.Before(soon) { // with the others that are due at once
				e.replaceAt = soon
			}
			if !e.inFlight && e.replaceAt.Before(e.next) {
				h.plan(name, e, e.replaceAt)
			}
		case !ok && !e.replaceAt.IsZero():
			early := e.next.Equal(e.replaceAt)
			e.replaceAt, e.replaced = time.Time{}, 0
			if !e.inFlight && early {
				h.plan(name, e, e.due())
			}
		}
	}
}

// ordered notes what an order says of a certificate that has just come. One of an issuer that is to be replaced has no
// better one behind it yet: it is asked for again, with patience. Called with mu held.
func (h *hub) ordered(e *entry) {
	if _, ok := h.orders[e.current.issuer]; !ok {
		e.replaceAt, e.replaced = time.Time{}, 0
		return
	}
	wait := maxReissueAgain
	if e.replaced < 6 { // beyond is the longest anyway
		wait = min(reissueAgain<<e.replaced, maxReissueAgain)
	}
	e.replaced++
	e.replaceAt = rotation.ReissueAt(e.current.chain[0].SerialNumber.Bytes(), h.now().Add(wait/2), wait/2)
}

// due is when an entry is renewed: at its time, or before it where its issuer is to be replaced.
func (e *entry) due() time.Time {
	if !e.replaceAt.IsZero() && e.replaceAt.Before(e.current.renewAt) {
		return e.replaceAt
	}
	return e.current.renewAt
}

// toReplace reports whether an entry has been ordered to be replaced by now.
func (e *entry) toReplace(now time.Time) bool {
	return !e.replaceAt.IsZero() && !now.Before(e.replaceAt)
}

// shortKeyID is a key identifier for people.
func shortKeyID(id string) string { return fmt.Sprintf("%.4x", id) }

// leaves are the issuers, by key identifier, with the end of the last leaf of each.
type leaves map[string]time.Time

func (l leaves) add(issuer string, notAfter time.Time) {
	if issuer != "" && len(issuer) <= maxKeyID && notAfter.After(l[issuer]) {
		l[issuer] = notAfter
	}
}

// held adds the certificates in use, and those that views keep of registrations that are gone.
func (h *hub) held(l leaves) {
	h.mu.Lock()
	defer h.mu.Unlock()
	add := func(c *held) {
		if c != nil {
			l.add(c.issuer, c.svid.NotAfter)
		}
	}
	for _, e := range h.entries {
		add(e.current)
	}
	for v := range h.views {
		for _, c := range v.kept {
			add(c)
		}
	}
}

// issuersHeld names the issuers of the leaves that are held here and can still be used: by this process, in its cache, and
// by the streams that have not acknowledged a newer one, or had not when they ended. It is nil where that is not known.
func (a *Agent) issuersHeld() *signetv1.IssuersHeld {
	l := leaves(a.sds.Leaves())
	if before, until := a.memory.counting(); before != nil {
		if before.unknown {
			return nil
		}
		for _, id := range before.Issuers {
			l.add(string(id), until)
		}
	}
	a.hub.held(l)
	a.cache.held(l)
	now := a.now()
	maps.DeleteFunc(l, func(_ string, end time.Time) bool { return now.After(end) })
	ids := slices.Collect(maps.Keys(l))
	if len(ids) > maxIssuers {
		slices.SortFunc(ids, func(x, y string) int { return cmp.Or(l[y].Compare(l[x]), cmp.Compare(x, y)) })
		ids = ids[:maxIssuers]
	}
	slices.Sort(ids)
	out := make([][]byte, len(ids))
	for i, id := range ids {
		out[i] = []byte(id)
	}
	return &signetv1.IssuersHeld{KeyIds: out}
}

// issuerOf is the authority key identifier of a certificate.
func issuerOf(c *x509.Certificate) string { return string(c.AuthorityKeyId) }
