package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/bell"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/sds"
	"github.com/signet-ca/signet/trust"
)

const (
	// maxBatch is what the agent door takes in one call.
	maxBatch = 50
	// gather is how long a first request waits for others to go in the same call.
	gather = 3 * time.Millisecond
	// maxCalls to the agent door at once.
	maxCalls = 4
	// Bounds of one call: long enough for a connection to be made, short enough to leave time for another try.
	minCall, maxCall = time.Second, 10 * time.Second
	// aliveEvery is how often those who connected are looked after.
	aliveEvery = 5 * time.Second
	// maxInstance is what Authorize takes, in bytes.
	maxInstance = 256
)

// issuer is the agent door's Issue.
type issuer interface {
	issue(ctx context.Context, items []*signetv1.IssueItem) ([]*signetv1.IssueResult, error)
}

// hub is the heart of an agent: which registrations it has, who is connected, and for each registration that somebody
// wants one entry with its key and certificate, which all who match share.
//
// Where several registrations give a process one ID, it wants the entry of the first; the next one's only while the first
// fails. When a registration goes and another still gives the ID, the process keeps the certificate that it has until there
// is one of the other.
//
// An entry lives from the first time that a view wants it, or from the cache, until its certificate expires and nobody
// wants it. It is renewed only while somebody does. It is in the scheduler except while a call for it is under way: at its
// renewal time, at the time of its next try, or, while nobody wants it, at its end.
type hub struct {
	issuer  issuer
	bundles *trust.Bundles
	now     func() time.Time
	log     *slog.Logger
	metrics *metrics

	schedule *rotation.Scheduler[string]
	calls    chan struct{}
	running  sync.WaitGroup
	// taken counts the certificates that have come, for Agent.tidy.
	taken atomic.Int64
	// leaves rings when other certificates are held than before.
	leaves bell.Bell

	// mu guards what follows. It is never held over a call, a signature or a verification.
	mu    sync.Mutex
	td    spiffeid.TrustDomain
	agent string
	// registrations is nil until a set was loaded or received; known is closed then.
	registrations []identity.Registration
	known         chan struct{}
	// hashWanted: some registration has a unix:sha256 selector.
	hashWanted bool
	entries    map[string]*entry
	views      map[*view]struct{}
	// cache is nil until the agent is enrolled.
	cache *cache
	// turned is since when the server turns this agent away, zero while it doesn't.
	turned time.Time
	// refusals are the newest, oldest first, for whoever asks why.
	refusals []refusal
	// orders are the issuers, by key identifier, whose leaves the server wants replaced.
	orders map[string]reissueOrder
	// banned are the identities that the server has refused as banned since it last told its registrations.
	banned map[spiffeid.ID]struct{}
	// shut are registrations that give nothing since their identities are banned, for whoever asks why.
	shut []identity.Registration
	// pause holds calls off while they fail as a whole; troubles are why certificates can't be had, by reason.
	pause    pause
	troubles map[string]*trouble
	// unsaidExpired certificates have run out since the log has heard of some, which was at saidExpired.
	saidExpired   time.Time
	unsaidExpired int
}

// entry is the certificate of one registration on this host. Guarded by hub.mu.
type entry struct {
	registration identity.Registration
	wanted       map[*view]struct{}
	current      *held
	inFlight     bool
	// next is its time in the scheduler; replaceAt is when it is replaced ahead of its time, zero = it is not; replaced
	// counts how often that brought a certificate of an issuer that is to be replaced.
	next, replaceAt time.Time
	replaced        int
	// again asks for another issuance because what is in flight was asked under terms that have changed.
	again bool
	// hurried: what failed before may work now, whatever becomes of what is in flight.
	hurried bool
	// attempts that have failed in a row, and why the last one did; trouble is what it waits for.
	attempts  int
	lastError string
	trouble   *trouble
	// parked: it waits for the end of the pause.
	parked bool
	// expiryReported is set once the log has heard that current has run out.
	expiryReported bool
}

// held is a certificate in use. Immutable.
type held struct {
	svid     *sds.SVID
	chain    []*x509.Certificate
	issuer   string // key identifier
	received time.Time
	renewAt  time.Time
}

// good reports whether it is there and has not run out, by the clock on the wall: a clock that jumps counts at once.
func (c *held) good(now time.Time) bool { return c != nil && !now.After(c.svid.NotAfter) }

func newHub(is issuer, bundles *trust.Bundles, now func() time.Time, log *slog.Logger, m *metrics) *hub {
	return &hub{
		issuer: is, bundles: bundles, now: now, log: log, metrics: m,
		schedule: rotation.NewScheduler[string](rotation.SchedulerConfig{Now: now}),
		calls:    make(chan struct{}, maxCalls),
		known:    make(chan struct{}),
		entries:  map[string]*entry{},
		views:    map[*view]struct{}{},
		troubles: map[string]*trouble{},
	}
}

// run issues and renews until ctx ends; then all calls have ended.
func (h *hub) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { h.watchBundle(ctx) })
	wg.Go(func() { h.watchViews(ctx) })
	h.schedule.Run(ctx, func(names []string) { h.due(ctx, names) })
	h.running.Wait()
	wg.Wait()
}

// as says who this agent is, once it is enrolled.
func (h *hub) as(agent string, td spiffeid.TrustDomain) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.agent, h.td = agent, td
}

// isKnown reports whether a set of registrations was loaded or received.
func (h *hub) isKnown() bool {
	select {
	case <-h.known:
		return true
	default:
		return false
	}
}

// setRegistrations replaces the set. Views that lose their last identity end; the others see what is left. An entry
// whose registration is gone, or names another ID, is dropped with its certificate; one with another lifetime is renewed.
// shut are not of the set, since their identities are banned.
func (h *hub) setRegistrations(list []identity.Registration, shut ...identity.Registration) {
	h.mu.Lock()
	defer h.unlockAndExpunge(h.entriesOf())
	h.registrations, h.shut, h.banned = list, shut, nil
	h.hashWanted = false
	byName := make(map[string]identity.Registration, len(list))
	for _, r := range list {
		byName[r.Name] = r
		h.hashWanted = h.hashWanted || slices.ContainsFunc(r.Selectors, func(s identity.Selector) bool {
			return strings.HasPrefix(string(s), "unix:sha256:")
		})
	}
	// Views first: what a registration that is gone gave them is theirs until another has given them its own.
	for v := range h.views {
		h.match(v)
	}
	for name, e := range h.entries {
		r, ok := byName[name]
		switch {
		case !ok:
			h.drop(name)
		case r.ID != e.registration.ID:
			e.registration, e.current, e.attempts = r, nil, 0
			e.replaceAt, e.replaced = time.Time{}, 0
			h.cache.touch(name)
			h.issueSoon(name, e)
		case r.TTL != e.registration.TTL:
			e.registration, e.attempts = r, 0
			h.issueSoon(name, e)
		default:
			e.registration = r
		}
	}
	if !h.isKnown() {
		close(h.known)
	}
}

// match works out anew what a view is granted. Called with mu held.
func (h *hub) match(v *view) {
	if v.err != nil {
		return
	}
	granted := identity.Match(h.registrations, v.selectors)
	if len(h.banned) > 0 {
		granted = slices.DeleteFunc(granted, func(r identity.Registration) bool { _, banned := h.banned[r.ID]; return banned })
	}
	if v.socket != "" {
		// A dedicated socket is for the registrations that name it, and for no other that the caller might fit as well.
		granted = slices.DeleteFunc(granted, func(r identity.Registration) bool { return !bySocket(r, v.socket) })
	}
	same := slices.EqualFunc(granted, v.granted, func(a, b identity.Registration) bool {
		return a.Name == b.Name && a.ID == b.ID
	})
	v.granted = granted
	for name, e := range v.wants {
		i := slices.IndexFunc(granted, func(r identity.Registration) bool { return r.Name == name })
		if i < 0 {
			h.release(v, name)
		}
		if id := e.registration.ID; e.current != nil && (i < 0 || granted[i].ID != id) {
			if v.kept == nil {
				v.kept = map[spiffeid.ID]*held{}
			}
			v.kept[id] = e.current
		}
	}
	maps.DeleteFunc(v.kept, func(id spiffeid.ID, _ *held) bool { return !gives(granted, id) })
	if len(granted) == 0 {
		h.remember(v)
		h.end(v, status.Error(codes.PermissionDenied, v.refusal(h.agent)))
		return
	}
	if !same {
		v.changed.Ring()
	}
}

// want notes that a view wants a registration's certificate. Called with mu held.
func (h *hub) want(v *view, r identity.Registration) *entry {
	e, ok := h.entries[r.Name]
	if !ok {
		e = &entry{registration: r, wanted: map[*view]struct{}{}}
		h.entries[r.Name] = e
		h.issueSoon(r.Name, e)
	} else if len(e.wanted) == 0 && e.current != nil && !h.now().Before(e.due()) {
		// Its time came while nobody wanted it.
		h.issueSoon(r.Name, e)
	}
	e.wanted[v] = struct{}{}
	v.wants[r.Name] = e
	return e
}

// gives reports whether one of the registrations gives the ID.
func gives(list []identity.Registration, id spiffeid.ID) bool {
	return slices.ContainsFunc(list, func(r identity.Registration) bool { return r.ID == id })
}

// certificate is what a view may have of an ID now; nil = nothing yet. Called with mu held.
func (h *hub) certificate(v *view, id spiffeid.ID) *held {
	now := h.now()
	var best, other *held // of the first registration that has one, and of any other that is wanted
	asked := false        // an entry is on its way, and has not failed
	for _, r := range v.granted {
		if r.ID != id {
			continue
		}
		e := v.wants[r.Name]
		if e == nil && best == nil && !asked {
			e = h.want(v, r)
		}
		switch {
		case e == nil:
		case best != nil: // one is enough
			h.release(v, r.Name)
		case e.current.good(now):
			if asked { // of one further down, until the first has its own
				if other == nil {
					other = e.current
				}
			} else {
				best = e.current
			}
		case e.attempts == 0:
			asked = true
			if e.current != nil { // run out before its renewal: the clock has jumped, and timers have not heard of it yet
				h.issueSoon(r.Name, e)
			}
		}
	}
	if best != nil {
		delete(v.kept, id)
		return best
	}
	if other == nil && v.kept[id].good(now) {
		other = v.kept[id]
	}
	return other
}

// release is the opposite of want; the entry stays until its time comes. Called with mu held.
func (h *hub) release(v *view, name string) {
	if e, ok := v.wants[name]; ok {
		delete(e.wanted, v)
		delete(v.wants, name)
	}
}

// end makes the view end with this status. Called with mu held.
func (h *hub) end(v *view, err error) {
	for name := range v.wants {
		h.release(v, name)
	}
	v.granted, v.kept, v.err = nil, nil, err
	delete(h.views, v)
	v.changed.Ring()
}

// drop forgets an entry, its key and its certificate. Called with mu held.
func (h *hub) drop(name string) {
	if e, ok := h.entries[name]; ok {
		h.waitsNoMore(name, e)
	}
	delete(h.entries, name)
	h.schedule.Remove(name)
	h.cache.touch(name)
	h.leaves.Ring()
}

// plan sets the time of an entry. Called with mu held.
func (h *hub) plan(name string, e *entry, at time.Time) {
	e.next = at
	h.schedule.Set(name, at)
}

// entriesOf are the certificates in use, by registration. Called with mu held.
func (h *hub) entriesOf() map[string]*held {
	in := make(map[string]*held, len(h.entries))
	for name, e := range h.entries {
		if e.current != nil {
			in[name] = e.current
		}
	}
	return in
}

// unlockAndExpunge gives mu back, and deletes from the disk what was in use before and is not any more: a withdrawn identity
// must not come back with a restart.
func (h *hub) unlockAndExpunge(before map[string]*held) {
	maps.DeleteFunc(before, func(name string, _ *held) bool { e, ok := h.entries[name]; return ok && e.current != nil })
	c := h.cache
	h.mu.Unlock()
	if c != nil && len(before) > 0 {
		c.expunge(slices.Sorted(maps.Keys(before)), h.inUse)
	}
}

// shutOut withdraws an identity that the server says is banned, as if its registrations were gone, until it tells its
// registrations again.
func (h *hub) shutOut(id spiffeid.ID) {
	h.mu.Lock()
	defer h.unlockAndExpunge(h.entriesOf())
	if h.banned == nil {
		h.banned = map[spiffeid.ID]struct{}{}
	}
	h.banned[id] = struct{}{}
	for v := range h.views {
		h.match(v)
	}
	for name, e := range h.entries {
		if e.registration.ID == id {
			h.drop(name)
		}
	}
	h.log.Error("an identity is banned: it is withdrawn, its certificates are deleted, and it is not asked for until the server tells its registrations again", "spiffe_id", id.String())
}

// shutsOut reports whether something is withdrawn until the registrations are told again.
func (h *hub) shutsOut() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.banned) > 0
}

// issueSoon puts an entry into the next call. Called with mu held.
func (h *hub) issueSoon(name string, e *entry) {
	if e.inFlight {
		e.again = true
		return
	}
	h.plan(name, e, h.now().Add(gather))
}

// hurry tries again at once what has failed before: the server has come back, or a bundle has come that a refused
// certificate may lead to. Hosts differ by the jitter of a first retry.
func (h *hub) hurry() {
	h.mu.Lock()
	defer h.mu.Unlock()
	at := h.now().Add(rotation.RetryAfter([]byte(h.agent), 1, 0))
	if h.pause.attempts > 0 && !h.pause.probing {
		h.pause.until = at
	}
	for name, e := range h.entries {
		switch {
		case e.inFlight:
			e.hurried = true
		case e.attempts > 0 || e.parked:
			h.plan(name, e, at)
		}
	}
}

// job is one issuance under way, with the terms it was asked under.
type job struct {
	name  string
	entry *entry
	id    spiffeid.ID
	item  *signetv1.IssueItem
	key   *ecdsa.PrivateKey
	// attempts and left are from before the call; left is zero where there is no good certificate.
	attempts int
	left     time.Duration
	// pause is how many calls in a row had failed as a whole by then.
	pause int
}

// due starts calls for what the scheduler hands out.
func (h *hub) due(ctx context.Context, names []string) {
	h.mu.Lock()
	now := h.now()
	var expired []*entry
	ready := slices.DeleteFunc(names, func(name string) bool {
		e, ok := h.entries[name]
		if !ok || e.inFlight { // asked for once more between being handed out and getting here: the call has begun since
			return true
		}
		if len(e.wanted) == 0 {
			// Not renewed for nobody, but kept while it is good: a workload, or all of them after a restart of this
			// process, may be back before the server is. Not so if its issuer is to be replaced: a certificate under a lost
			// key is not kept for nobody.
			if e.current.good(now) && !e.toReplace(now) {
				end := e.current.svid.NotAfter.Add(time.Second)
				if !e.replaceAt.IsZero() && e.replaceAt.Before(end) {
					end = e.replaceAt
				}
				h.waitsNoMore(name, e)
				e.parked = false
				h.plan(name, e, end)
			} else {
				h.drop(name)
			}
			return true
		}
		if e.current != nil && !e.current.good(now) && !e.expiryReported {
			e.expiryReported = true
			expired = append(expired, e)
		}
		return false
	})
	h.sayExpired(expired)
	var jobs []*job
	for _, name := range h.admit(ready, now) {
		e := h.entries[name]
		j := &job{name: name, entry: e, id: e.registration.ID, attempts: e.attempts, pause: h.pause.attempts, item: &signetv1.IssueItem{Registration: name}}
		if e.current != nil {
			j.left = max(e.current.svid.NotAfter.Sub(now), 0)
		}
		for v := range e.wanted {
			// The word of one of those who want it now.
			j.item.Instance, j.item.Selectors = clip(v.workload.Instance, maxInstance-len("…")), selectorStrings(v.selectors)
			break
		}
		e.inFlight, e.parked, e.again, e.hurried = true, false, false, false
		jobs = append(jobs, j)
	}
	h.mu.Unlock()
	for batch := range slices.Chunk(jobs, maxBatch) {
		h.running.Go(func() { h.issueBatch(ctx, batch) })
	}
}

// issueBatch makes the keys, asks, and takes what comes.
func (h *hub) issueBatch(ctx context.Context, jobs []*job) {
	select {
	case h.calls <- struct{}{}:
		defer func() { <-h.calls }()
	case <-ctx.Done():
		return
	}
	if h.stands(jobs) {
		return
	}
	results, err := h.ask(ctx, jobs)
	if err != nil {
		if ctx.Err() == nil {
			h.turnedAway(err)
			if aboutAll(err) {
				h.failedAll(jobs, err, true)
				return
			}
			for _, j := range jobs {
				h.failed(j, err)
			}
			h.answered()
		}
		return
	}
	var putOff []*job
	var why error
	for i, j := range jobs {
		got, err := h.check(j, results[i])
		if putOffByServer(err) {
			putOff, why = append(putOff, j), err
			continue
		}
		if err != nil {
			if r := (refused{}); errors.As(err, &r) {
				switch {
				case r.turnsAway():
					h.turnedAway(status.Error(codes.PermissionDenied, err.Error()))
				case r.banned():
					h.shutOut(j.id)
				}
			}
			h.failed(j, err)
			continue
		}
		h.took(j, got)
	}
	if len(putOff) == len(jobs) {
		h.failedAll(jobs, why, false)
		return
	}
	h.answered()
	for _, j := range putOff {
		h.failed(j, why)
	}
}

func (h *hub) ask(ctx context.Context, jobs []*job) ([]*signetv1.IssueResult, error) {
	items := make([]*signetv1.IssueItem, len(jobs))
	timeout := maxCall
	for i, j := range jobs {
		var err error
		if j.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, fmt.Errorf("make a key: %w", err)
		}
		// Nothing but the key and the proof that it is ours: the server gives the name.
		if j.item.Csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, j.key); err != nil {
			return nil, fmt.Errorf("make a certificate request: %w", err)
		}
		items[i] = j.item
		if j.left > 0 {
			timeout = min(timeout, max(j.left/3, minCall))
		}
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	results, err := h.issuer.issue(ctx, items)
	if err != nil {
		return nil, err
	}
	if len(results) != len(jobs) {
		return nil, fmt.Errorf("the server answered %d requests with %d results", len(jobs), len(results))
	}
	return results, nil
}

// refused is the server's no to one request.
type refused struct{ refusal *signetv1.Refusal }

func (r refused) Error() string {
	what := "refused"
	switch r.refusal.GetReason() {
	case signetv1.Refusal_REASON_INVALID:
		what = "refused as malformed"
	case signetv1.Refusal_REASON_DENIED:
		what = "denied"
	case signetv1.Refusal_REASON_UNAVAILABLE:
		what = "put off"
	}
	return fmt.Sprintf("the server %s it (%s)", what, clip(r.refusal.GetMessage(), 128))
}

// turnsAway reports whether it is about this agent and not about what was asked: the same word as at the connection, where
// an agent that is banned during a call only hears it as the answer to its items.
func (r refused) turnsAway() bool {
	if r.refusal.GetReason() != signetv1.Refusal_REASON_DENIED {
		return false
	}
	switch r.refusal.GetMessage() {
	case "banned_agent", "unknown_agent":
		return true
	}
	return false
}

// banned reports whether the identity that was asked for is shut out.
func (r refused) banned() bool {
	return r.refusal.GetReason() == signetv1.Refusal_REASON_DENIED && r.refusal.GetMessage() == "banned_identity"
}

// check looks at the server's answer to one request.
func (h *hub) check(j *job, r *signetv1.IssueResult) (*held, error) {
	cert := r.GetCertificate()
	if cert == nil {
		return nil, refused{r.GetRefusal()}
	}
	return h.verify(j.id, cert.Chain, j.key, h.now())
}

// verify looks at chain and key as a set before anything is replaced by it, whether it comes from the server or from the
// cache: the certificate leads to the bundle that is served, is valid now, is of that ID, and is for that key.
func (h *hub) verify(want spiffeid.ID, der [][]byte, private *ecdsa.PrivateKey, received time.Time) (*held, error) {
	if n := len(der); n == 0 || n > identity.MaxChain {
		return nil, fmt.Errorf("a chain of %d certificates", n)
	}
	chain := make([]*x509.Certificate, len(der))
	var text []byte
	digest := sha256.New()
	for i, der := range der {
		var err error
		if chain[i], err = x509.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("certificate %d of the chain: %w", i+1, err)
		}
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
		digest.Write(der)
	}
	leaf, now := chain[0], h.now()
	b, ok := h.bundles.Get(want.TrustDomain())
	if !ok {
		return nil, errors.New("there is no trust bundle yet to check the certificate against")
	}
	id, err := identity.VerifySVID(chain, b.Pool(), now)
	if err != nil {
		return nil, fmt.Errorf("the certificate is not good by trust bundle %d: %w", b.Sequence(), err)
	}
	if id != want {
		return nil, fmt.Errorf("a certificate of %s for a registration of %s", id, want)
	}
	if !private.PublicKey.Equal(leaf.PublicKey) {
		return nil, errors.New("a certificate for another key")
	}
	key, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, fmt.Errorf("encode the key: %w", err)
	}
	svid := &sds.SVID{
		ID: id, CertificateChain: text, PrivateKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, Serial: serialText(leaf),
		Issuer: issuerOf(leaf),
	}
	digest.Sum(svid.Digest[:0])
	return &held{svid: svid, chain: chain, issuer: issuerOf(leaf), received: received, renewAt: rotation.RenewAt(leaf.SerialNumber.Bytes(), received, leaf.NotAfter)}, nil
}

func serialText(c *x509.Certificate) string { return hex.EncodeToString(c.SerialNumber.Bytes()) }

// restore takes what the cache holds into use, as far as it passes the checks of a fresh answer and its registration is
// still there; the rest is deleted. From now on the cache follows what is in use.
func (h *hub) restore(c *cache) {
	h.mu.Lock()
	byName := make(map[string]identity.Registration, len(h.registrations))
	for _, r := range h.registrations {
		byName[r.Name] = r
	}
	h.mu.Unlock()
	found := map[string]*held{}
	for _, name := range c.names() {
		r, ok := byName[name]
		if !ok {
			c.forget(name, errors.New("its registration is gone"))
			continue
		}
		chain, key, received, err := c.read(name)
		if err != nil {
			c.forget(name, err)
			continue
		}
		got, err := h.verify(r.ID, chain, key, received)
		if err != nil {
			c.forget(name, err)
			continue
		}
		found[name] = got
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cache = c
	for name, got := range found {
		e := &entry{registration: byName[name], wanted: map[*view]struct{}{}, current: got}
		h.entries[name] = e
		h.plan(name, e, got.renewAt)
	}
	if len(found) > 0 {
		h.log.Info("certificates restored from the cache", "count", len(found))
	}
}

// inUse is what the cache is to hold for a registration; nil = nothing.
func (h *hub) inUse(name string) *held {
	h.mu.Lock()
	defer h.mu.Unlock()
	if e, ok := h.entries[name]; ok {
		return e.current
	}
	return nil
}

// turnedAway is told of errors of the server's doors. The server's word that this agent is not (or no longer) one of its
// own purges the cache at once. What is in memory is served until it expires, as in any outage, but not over a restart.
func (h *hub) turnedAway(err error) {
	if status.Code(err) != codes.PermissionDenied {
		return
	}
	h.mu.Lock()
	c := h.cache
	if h.turned.IsZero() {
		h.turned = h.now()
	}
	h.mu.Unlock()
	if c != nil && c.purge() {
		h.log.Error("the server turns this agent away: its cache of certificates is deleted, and what is in use ends with its certificates or this process; if the agent is not banned, remove its state folder and enrol it again with a new join token", "err", clip(err.Error(), 512))
	}
}

// turnedSince is since when the server turns this agent away; zero = it doesn't, as far as is known.
func (h *hub) turnedSince() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.turned
}

// letIn is the opposite of turnedAway.
func (h *hub) letIn() {
	h.mu.Lock()
	c, names := h.cache, slices.Collect(maps.Keys(h.entries))
	h.turned = time.Time{}
	h.mu.Unlock()
	if c != nil {
		c.resume(names)
	}
}

// took swaps a checked certificate in and tells those who want it.
func (h *hub) took(j *job, got *held) {
	h.mu.Lock()
	defer h.mu.Unlock()
	e := j.entry
	if h.entries[j.name] != e {
		return
	}
	e.inFlight = false
	if e.registration.ID != j.id {
		h.issueSoon(j.name, e)
		return
	}
	h.taken.Add(1)
	h.waitsNoMore(j.name, e)
	first := e.current == nil
	e.current, e.attempts, e.lastError, e.expiryReported = got, 0, "", false
	h.cache.touch(j.name)
	h.ordered(e)
	h.leaves.Ring()
	h.metrics.renewals.WithLabelValues(resultOK).Inc()
	h.log.Info("certificate in use", "registration", j.name, "spiffe_id", j.id.String(), "serial", got.svid.Serial,
		"not_after", utc(got.svid.NotAfter), "renew_at", utc(got.renewAt), "first", first)
	if e.again {
		h.issueSoon(j.name, e)
	} else {
		h.plan(j.name, e, e.due())
	}
	for v := range e.wanted {
		v.changed.Ring()
	}
}

// failed puts one request off: never does it give up, and the more life is left, the longer it waits.
func (h *hub) failed(j *job, err error) {
	result := resultFailed
	if errors.As(err, &refused{}) && !putOffByServer(err) {
		result = resultRefused
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.metrics.renewals.WithLabelValues(result).Inc()
	e := j.entry
	if h.entries[j.name] != e {
		return
	}
	e.inFlight = false
	if e.again {
		h.issueSoon(j.name, e)
		return
	}
	e.attempts++
	e.lastError = clip(err.Error(), 512)
	jitter := []byte(h.agent + "/" + j.name)
	wait := notBefore(err, rotation.RetryAfter(jitter, e.attempts, j.left))
	if e.hurried {
		wait = notBefore(err, rotation.RetryAfter(jitter, 1, 0))
	}
	h.plan(j.name, e, h.now().Add(wait))
	h.waits(j.name, e, err)
	h.say(err, wait)
}

// watchBundle tells all views of a new bundle and re-issues what doesn't lead to it.
func (h *hub) watchBundle(ctx context.Context) {
	for {
		changed := h.bundles.Changed()
		h.bundleChanged()
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

func (h *hub) bundleChanged() {
	h.mu.Lock()
	td := h.td
	held := make(map[*entry]*held, len(h.entries))
	for _, e := range h.entries {
		if e.current != nil {
			held[e] = e.current
		}
	}
	for v := range h.views {
		v.changed.Ring()
	}
	h.mu.Unlock()
	b, ok := h.bundles.Get(td)
	if !ok {
		return
	}
	h.hurry()
	now, pool := h.now(), b.Pool()
	for e, cert := range held {
		if !cert.good(now) {
			continue // expired: being renewed anyway
		}
		if _, err := identity.VerifySVID(cert.chain, pool, now); err == nil {
			continue
		} else {
			h.log.Warn("a certificate in use does not lead to the new bundle: getting another", "spiffe_id", cert.svid.ID.String(), "serial", cert.svid.Serial, "err", err)
		}
		h.mu.Lock()
		if name := e.registration.Name; h.entries[name] == e && e.current == cert {
			h.issueSoon(name, e)
		}
		h.mu.Unlock()
	}
}

// watchViews ends the views of processes that are gone.
func (h *hub) watchViews(ctx context.Context) {
	tick := time.NewTicker(aliveEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		h.mu.Lock()
		views := slices.Collect(maps.Keys(h.views))
		h.mu.Unlock()
		for _, v := range views {
			v.alive()
		}
	}
}

// life is what health and metrics want to know of the entries.
type life struct {
	valid, expired, pending, overdue, replacing int
	// earliest is the certificate that ends first among the valid ones, and where none is valid, among the expired ones.
	earliest *held
}

func (h *hub) life() life {
	h.mu.Lock()
	defer h.mu.Unlock()
	var l life
	now := h.now()
	first := func(a, b *held) *held {
		if a == nil || b.svid.NotAfter.Before(a.svid.NotAfter) {
			return b
		}
		return a
	}
	var expired *held
	for _, e := range h.entries {
		if !e.replaceAt.IsZero() {
			l.replacing++
		}
		switch c := e.current; {
		case c == nil:
			l.pending++
		case !c.good(now):
			l.expired++
			l.overdue++
			expired = first(expired, c)
		default:
			l.valid++
			if e.attempts > 0 || e.parked {
				l.overdue++
			}
			l.earliest = first(l.earliest, c)
		}
	}
	if l.earliest == nil {
		l.earliest = expired
	}
	return l
}

func selectorStrings(list []identity.Selector) []string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = string(s)
	}
	return out
}

// bySocket reports whether a registration may be had by a socket; "" = the common one.
func bySocket(r identity.Registration, socket string) bool {
	return socket == "" || slices.Contains(r.Selectors, socketSelector(socket))
}

func socketSelector(name string) identity.Selector { return identity.Selector("socket:" + name) }

// wantsHash reports whether a registration asks for the hash of an executable.
func (h *hub) wantsHash() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.hashWanted
}
