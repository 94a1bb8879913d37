package agent

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/sds"
	"github.com/signet-ca/signet/test/bubble"
	"github.com/signet-ca/signet/trust"
)

// doorless is a hub whose issuer is the world itself, without a network between.
type doorless struct {
	*hub
	world *world
	away  atomic.Bool
	calls atomic.Int64
	// batches are the sizes of the calls.
	mu      sync.Mutex
	batches []int
}

func (d *doorless) issue(ctx context.Context, items []*signetv1.IssueItem) ([]*signetv1.IssueResult, error) {
	d.calls.Add(1)
	d.mu.Lock()
	d.batches = append(d.batches, len(items))
	d.mu.Unlock()
	if d.away.Load() {
		return nil, status.Error(codes.Unavailable, errAway.Error())
	}
	return d.world.issueItems(items), nil
}

// newDoorless makes a hub that knows these registrations and trusts the world's root.
func newDoorless(t testing.TB, w *world, list ...identity.Registration) *doorless {
	t.Helper()
	d := &doorless{world: w}
	var bundles trust.Bundles
	if err := bundles.Set(w.bundle); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	if _, ok := t.(*testing.T); ok && !testing.Short() {
		log = testLog(t)
	}
	m, err := newMetrics(prometheus.NewRegistry(), w.now, func() life { return d.life() }, func() time.Time { return time.Time{} }, func() bool { return false })
	if err != nil {
		t.Fatal(err)
	}
	d.hub = newHub(d, &bundles, w.now, log, m)
	d.as("node-1", td)
	d.know(list...)
	return d
}

// know makes server and agent know the registrations.
func (d *doorless) know(list ...identity.Registration) {
	d.world.setRegistrations(list...)
	d.setRegistrations(list)
}

func workload(selectors ...identity.Selector) identity.Workload {
	return identity.Workload{Selectors: selectors, Instance: "pid 1 uid 1000", Alive: func() bool { return true }}
}

func (d *doorless) mustOpen(t testing.TB, selectors ...identity.Selector) *view {
	t.Helper()
	v, err := d.open(workload(selectors...), "")
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// await waits until the view has its SVID, as a stream does.
func await(t testing.TB, v *view) *sds.SVID {
	t.Helper()
	for {
		changed := v.Changed()
		if err := v.Err(); err != nil {
			t.Fatal(err)
		}
		if s := v.SVID(v.Identities()[0]); s != nil {
			return s
		}
		<-changed
	}
}

// inBubble runs f with a running hub in simulated time.
func inBubble(t *testing.T, f func(t *testing.T, w *world, start func(*doorless))) {
	bubble.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		f(t, newWorld(t), func(d *doorless) { go d.run(ctx) })
		cancel()
		synctest.Wait()
	})
}

const uid identity.Selector = "unix:uid:1000"

func TestManyStreamsOfOneIdentityCostOneIssuance(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d := newDoorless(t, w, reg("web", "/web", time.Hour, uid))
		start(d)
		var wg sync.WaitGroup
		got := make([]*sds.SVID, 200)
		for i := range got {
			wg.Go(func() { got[i] = await(t, d.mustOpen(t, uid)) })
		}
		wg.Wait()
		if n := w.issuances("web"); n != 1 {
			t.Fatalf("200 streams caused %d issuances, want 1", n)
		}
		for _, s := range got {
			if s != got[0] {
				t.Fatal("streams of one identity hold different SVIDs")
			}
		}
	})
}

func TestTwoUsersGetTheirOwn(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d := newDoorless(t, w, reg("a", "/a", time.Hour, "unix:uid:1"), reg("b", "/b", time.Hour, "unix:uid:2"))
		start(d)
		a, b := d.mustOpen(t, "unix:uid:1"), d.mustOpen(t, "unix:uid:2")
		if got := await(t, a).ID.Path(); got != "/a" {
			t.Fatalf("uid 1 got %s", got)
		}
		if got := await(t, b).ID.Path(); got != "/b" {
			t.Fatalf("uid 2 got %s", got)
		}
		if s := a.SVID(b.Identities()[0]); s != nil {
			t.Fatalf("uid 1 got %s by naming it", s.ID)
		}
		if _, ok := a.Bundle(td); !ok {
			t.Fatal("uid 1 may not see its own bundle")
		}
	})
}

func TestPriorityDecidesTheDefault(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		low, high := reg("a-low", "/low", time.Hour, uid), reg("z-high", "/high", time.Hour, uid)
		high.Priority = 10
		twin := reg("b-twin", "/low", time.Hour, uid)
		d := newDoorless(t, w, low, high, twin)
		start(d)
		v := d.mustOpen(t, uid)
		ids := v.Identities()
		if len(ids) != 2 || ids[0] != high.ID || ids[1] != low.ID {
			t.Fatalf("identities %v, want %s and %s, each once", ids, high.ID, low.ID)
		}
	})
}

func TestADedicatedSocketServesOnlyItsRegistration(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d := newDoorless(t, w, reg("by-uid", "/uid", time.Hour, uid), reg("by-socket", "/socket", time.Hour, uid, "socket:front"))
		start(d)
		v, err := d.open(workload(uid), "front")
		if err != nil {
			t.Fatal(err)
		}
		if ids := v.Identities(); len(ids) != 1 || ids[0].Path() != "/socket" {
			t.Fatalf("on the dedicated socket: %v", ids)
		}
		if ids := d.mustOpen(t, uid).Identities(); len(ids) != 1 || ids[0].Path() != "/uid" {
			t.Fatalf("on the common socket: %v", ids)
		}
		await(t, v)
		if n := len(w.items); n != 1 || !slices.Contains(w.items[0].Selectors, "socket:front") {
			t.Fatalf("the server was not shown the socket's selector: %v", w.items)
		}
		if _, err := d.open(workload(uid), "back"); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "socket:back") {
			t.Fatalf("another dedicated socket: %v", err)
		}
	})
}

func TestARefusedCallerIsToldWhatWasSeenAndWhatToDo(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d := newDoorless(t, w, reg("web", "/web", time.Hour, uid))
		many := []identity.Selector{"unix:uid:0", "unix:path:/x\x1b[31m" + identity.Selector(strings.Repeat("y", 2000))}
		for i := range 60 {
			many = append(many, identity.Selector(fmt.Sprintf("unix:supplementary_gid:%d", i)))
		}
		_, err := d.open(workload(many...), "")
		if status.Code(err) != codes.PermissionDenied {
			t.Fatalf("got %v, want PermissionDenied", err)
		}
		msg := status.Convert(err).Message()
		for _, want := range []string{`"unix:uid:0"`, "and 50 more", "node-1", "signet registration apply"} {
			if !strings.Contains(msg, want) {
				t.Errorf("%q lacks %q", msg, want)
			}
		}
		if len(msg) > 2048 || strings.Contains(msg, "\x1b") {
			t.Errorf("foreign text is not bounded or not quoted: %d bytes, %q", len(msg), msg)
		}
		if len(d.views) != 0 {
			t.Error("a refused caller left a view behind")
		}
	})
}

func TestAWithdrawnRegistrationEndsItsStreamsAndLeavesTheOthers(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		a, b := reg("a", "/a", time.Hour, "unix:uid:1"), reg("b", "/b", time.Hour, "unix:gid:2")
		d := newDoorless(t, w, a, b)
		start(d)
		only, both := d.mustOpen(t, "unix:uid:1"), d.mustOpen(t, "unix:uid:1", "unix:gid:2")
		await(t, only)
		await(t, both)
		gone, left := only.Changed(), both.Changed()
		d.know(b)
		<-gone
		<-left
		if err := only.Err(); status.Code(err) != codes.PermissionDenied {
			t.Fatalf("a stream without identities ends with %v", err)
		}
		if only.SVID(a.ID) != nil || both.SVID(a.ID) != nil {
			t.Fatal("a withdrawn identity is still served")
		}
		if ids := both.Identities(); both.Err() != nil || len(ids) != 1 || ids[0] != b.ID {
			t.Fatalf("the other stream sees %v, %v", ids, both.Err())
		}
		if s := await(t, both); s.ID != b.ID {
			t.Fatalf("the other stream got %s", s.ID)
		}
	})
}

func TestAChangedRegistrationIsIssuedAnew(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		r := reg("web", "/web", time.Hour, uid)
		d := newDoorless(t, w, r)
		start(d)
		v := d.mustOpen(t, uid)
		first := await(t, v)

		r.TTL = 2 * time.Hour
		changed := v.Changed()
		d.know(r)
		if v.SVID(r.ID) == nil {
			t.Fatal("the good certificate is withheld while one of another lifetime is fetched")
		}
		<-changed
		if s := await(t, v); s.Serial == first.Serial || s.NotAfter.Sub(first.NotAfter) < 50*time.Minute {
			t.Fatalf("after a change of ttl: not after %s, before %s", s.NotAfter, first.NotAfter)
		}

		old := r.ID
		r.ID = reg("web", "/other", 0).ID
		d.know(r)
		if v.SVID(old) != nil {
			t.Fatal("the old ID is still served")
		}
		if s := await(t, v); s.ID != r.ID {
			t.Fatalf("after a change of ID: %s", s.ID)
		}
	})
}

// The call for a registration is under way when its ID changes: what comes back is of the old ID and must not be used.
func TestWhatIsInFlightIsMeasuredByWhatHolds(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		r := reg("web", "/web", time.Hour, uid)
		d := newDoorless(t, w, r)
		changed := false
		w.refuse = func(*signetv1.IssueItem) *signetv1.Refusal {
			if !changed {
				changed = true
				r.ID = reg("web", "/other", 0).ID
				d.setRegistrations([]identity.Registration{r})
			}
			return nil
		}
		start(d)
		v := d.mustOpen(t, uid)
		v.SVID(v.Identities()[0])
		time.Sleep(time.Second)
		w.change(func() { w.registrations = []identity.Registration{r} })
		time.Sleep(time.Minute)
		if s := v.SVID(r.ID); s == nil || s.ID != r.ID {
			t.Fatalf("got %v", s)
		}
	})
}

func TestWhatIsDueAtOnceGoesInOneCall(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		var list []identity.Registration
		for i := range 120 {
			list = append(list, reg(fmt.Sprintf("r%d", i), fmt.Sprintf("/r%d", i), time.Hour, uid))
		}
		d := newDoorless(t, w, list...)
		start(d)
		v := d.mustOpen(t, uid)
		for _, id := range v.Identities() {
			v.SVID(id)
		}
		time.Sleep(time.Second)
		for _, id := range v.Identities() {
			if v.SVID(id) == nil {
				t.Fatalf("%s has no certificate", id)
			}
		}
		if n := d.calls.Load(); n != 3 || slices.Max(d.batches) > maxBatch {
			t.Fatalf("120 identities went in %d calls of %v, want 3 of at most %d", n, d.batches, maxBatch)
		}
	})
}

func TestNobodyWantsItNobodyRenewsIt(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d := newDoorless(t, w, reg("web", "/web", time.Hour, uid))
		start(d)
		v := d.mustOpen(t, uid)
		first := await(t, v)
		v.Close()
		v.Close()
		// A sidecar that comes back soon finds what is there.
		time.Sleep(time.Minute)
		v = d.mustOpen(t, uid)
		if s := v.SVID(v.Identities()[0]); s == nil || s.Serial != first.Serial {
			t.Fatalf("after a minute: %v", s)
		}
		v.Close()
		time.Sleep(24 * time.Hour)
		if n := w.issuances("web"); n != 1 {
			t.Fatalf("%d issuances for nobody", n)
		}
		if n := d.life(); n.valid+n.expired+n.pending != 0 {
			t.Fatalf("entries are left: %+v", n)
		}
	})
}

func TestAProcessThatIsGoneGetsNothingAndItsViewEnds(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d := newDoorless(t, w, reg("web", "/web", time.Hour, uid))
		start(d)
		var alive atomic.Bool
		alive.Store(true)
		wl := workload(uid)
		wl.Alive = alive.Load
		v, err := d.open(wl, "")
		if err != nil {
			t.Fatal(err)
		}
		await(t, v)
		changed := v.Changed()
		alive.Store(false)
		if v.SVID(v.Identities()[0]) != nil {
			t.Fatal("a process that is gone was given a key")
		}
		<-changed
		if status.Code(v.Err()) != codes.PermissionDenied {
			t.Fatalf("its view ends with %v", v.Err())
		}

		alive.Store(true)
		if v, err = d.open(wl, ""); err != nil {
			t.Fatal(err)
		}
		changed = v.Changed()
		alive.Store(false)
		began := time.Now()
		<-changed
		if d := time.Since(began); d > aliveEvery {
			t.Fatalf("a silent death was noticed after %s", d)
		}
	})
}

// The server is away for most of a life: the good certificate is served until the last second, and not a second longer.
func TestTheGoodCertificateIsServedUntilItReallyExpires(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		const ttl = time.Hour
		d := newDoorless(t, w, reg("web", "/web", ttl, uid))
		start(d)
		v := d.mustOpen(t, uid)
		first := await(t, v)
		id := first.ID
		d.away.Store(true)
		time.Sleep(ttl * 9 / 10)
		if s := v.SVID(id); s != first {
			t.Fatalf("after 90 %% of its life: %v", s)
		}
		if l := d.life(); l.overdue != 1 || l.valid != 1 {
			t.Fatalf("life: %+v, want one overdue", l)
		}
		d.away.Store(false)
		changed := v.Changed()
		<-changed
		second := v.SVID(id)
		if second == nil || second == first {
			t.Fatal("not renewed after the server came back")
		}
		if late := time.Since(first.NotAfter.Add(-ttl / 10)); late > time.Minute {
			t.Fatalf("renewed %s after the server came back", late)
		}

		d.away.Store(true)
		time.Sleep(time.Until(second.NotAfter))
		if v.SVID(id) != second {
			t.Fatal("withheld before its last second was over (RFC 5280 §4.1.2.5: not after is inclusive)")
		}
		time.Sleep(time.Second)
		if s := v.SVID(id); s != nil {
			t.Fatalf("an expired certificate is served: %s, now %s", s.NotAfter, time.Now())
		}
		if l := d.life(); l.expired != 1 {
			t.Fatalf("life: %+v, want one expired", l)
		}
		time.Sleep(6 * time.Hour)
		d.away.Store(false)
		began := time.Now()
		await(t, v)
		if waited := time.Since(began); waited > 5*time.Second {
			t.Fatalf("hours later, somebody waited %s for the server that was back", waited)
		}
	})
}

func TestAReturnOfTheServerIsUsedAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d := newDoorless(t, w, reg("web", "/web", 24*time.Hour, uid))
		start(d)
		v := d.mustOpen(t, uid)
		first := await(t, v)
		d.away.Store(true)
		time.Sleep(16 * time.Hour)
		d.away.Store(false)
		now := time.Now()
		changed := v.Changed()
		d.hurry()
		<-changed
		if s := v.SVID(first.ID); s == first || time.Since(now) > time.Second {
			t.Fatalf("renewed after %s", time.Since(now))
		}
	})
}

func TestWhatTheServerSendsIsCheckedAsASet(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		r := reg("web", "/web", time.Hour, uid)
		d := newDoorless(t, w, r)
		j := &job{name: "web", id: r.ID, key: newKey(t), item: &signetv1.IssueItem{}}
		now, good := time.Now(), func() [][]byte {
			return w.mesh.leaf(t, r.ID, j.key.Public(), time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
		}
		other := newCA(t, "other", newCA(t, "foreign root", nil))
		chain := good()
		for name, c := range map[string]struct {
			chain [][]byte
			want  string
		}{
			"nothing":         {nil, "chain of 0"},
			"garbage":         {[][]byte{{1, 2, 3}}, "certificate 1"},
			"another root":    {other.leaf(t, r.ID, j.key.Public(), now, now.Add(time.Hour)), "X509-SVID §5.1"},
			"no intermediate": {chain[:1], "X509-SVID §5.1"},
			"wrong order":     {[][]byte{chain[1], chain[0]}, "CA's"},
			"another ID":      {w.mesh.leaf(t, reg("", "/x", 0).ID, j.key.Public(), now, now.Add(time.Hour)), "registration of"},
			"another key":     {w.mesh.leaf(t, r.ID, newKey(t).Public(), now, now.Add(time.Hour)), "another key"},
			"expired":         {w.mesh.leaf(t, r.ID, j.key.Public(), now.Add(-2*time.Hour), now.Add(-time.Hour)), "expired at"},
			"not yet valid":   {w.mesh.leaf(t, r.ID, j.key.Public(), now.Add(time.Hour), now.Add(2*time.Hour)), "valid from"},
			"too long":        {slices.Repeat(chain, 5), "chain of 10"},
		} {
			_, err := d.check(j, &signetv1.IssueResult{Result: &signetv1.IssueResult_Certificate{Certificate: &signetv1.IssuedCertificate{Chain: c.chain}}})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v, want an error with %q", name, err, c.want)
			}
		}
		if _, err := d.check(j, &signetv1.IssueResult{}); err == nil {
			t.Error("an empty result was taken")
		}
		got, err := d.check(j, &signetv1.IssueResult{Result: &signetv1.IssueResult_Certificate{Certificate: &signetv1.IssuedCertificate{Chain: chain}}})
		if err != nil {
			t.Fatal(err)
		}
		if want := rotation.RenewAt(got.chain[0].SerialNumber.Bytes(), time.Now(), got.svid.NotAfter); !got.renewAt.Equal(want) {
			t.Errorf("renewal at %s, want %s", got.renewAt, want)
		}
	})
}

// A root is taken out of trust: what hangs on it is replaced without waiting for its renewal.
func TestABundleThatNoLongerCoversALeafBringsANewLeaf(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d := newDoorless(t, w, reg("web", "/web", time.Hour, uid))
		start(d)
		v := d.mustOpen(t, uid)
		first := await(t, v)
		next := newCA(t, "next root", nil)
		w.change(func() { w.mesh = newCA(t, "east-2", next) })
		changed := v.Changed()
		if err := d.bundles.Set(mustBundle(t, 2, w.root, next)); err != nil {
			t.Fatal(err)
		}
		<-changed
		synctest.Wait()
		if s := v.SVID(first.ID); s != first {
			t.Fatal("replaced while its root is still believed")
		}
		if err := d.bundles.Set(mustBundle(t, 3, next)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if s := v.SVID(first.ID); s == nil || s == first {
			t.Fatalf("a second after its root was taken away: %v", s)
		}
	})
}

func TestADeniedRegistrationIsAskedForAgainWithPatience(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		d := newDoorless(t, w, reg("web", "/web", time.Hour, uid), reg("ok", "/ok", time.Hour, uid))
		w.refuse = func(i *signetv1.IssueItem) *signetv1.Refusal {
			if i.Registration == "web" {
				return &signetv1.Refusal{Reason: signetv1.Refusal_REASON_DENIED, Message: "not_registered"}
			}
			return nil
		}
		start(d)
		v := d.mustOpen(t, uid)
		for _, id := range v.Identities() {
			v.SVID(id)
		}
		time.Sleep(10 * time.Minute)
		if v.SVID(reg("", "/ok", 0).ID) == nil {
			t.Fatal("one refusal in a call took the others with it")
		}
		if n := d.calls.Load(); n < 100 || n > 300 {
			t.Fatalf("asked %d times in ten minutes, want about one in 4 s", n)
		}
	})
}

// A year of a node: leaves of a day, an issuer that is away at random, now and then for longer than a life. Never is an
// expired certificate served, never is a good one lost, and after every outage everybody is soon served again.
func TestAYearOfANode(t *testing.T) {
	const ttl = 24 * time.Hour
	bubble.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var list []identity.Registration
		for i := range 2 {
			list = append(list, reg(fmt.Sprintf("r%d", i), fmt.Sprintf("/r%d", i), ttl, uid))
		}
		d := newDoorless(t, w, list...)
		d.hub.log = slog.New(slog.DiscardHandler)
		d.schedule = rotation.NewScheduler[string](rotation.SchedulerConfig{Recheck: time.Hour})
		ctx, cancel := context.WithTimeout(t.Context(), 365*24*time.Hour)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { d.schedule.Run(ctx, func(names []string) { d.due(ctx, names) }); d.running.Wait() })

		random := rand.New(rand.NewPCG(1, 2))
		var outages, long int
		var backSince atomic.Int64
		backSince.Store(time.Now().UnixNano())
		wg.Go(func() {
			for {
				up := time.Duration(random.ExpFloat64() * float64(70*time.Hour))
				down := time.Duration(random.ExpFloat64() * float64(time.Hour))
				if outages%60 == 59 {
					down += ttl // more than is left: what there is runs out
				}
				for i, span := range []time.Duration{up, down} {
					d.away.Store(i == 1)
					if i == 1 {
						outages++
						if down > ttl/2 {
							long++
						}
					} else {
						backSince.Store(time.Now().UnixNano())
					}
					select {
					case <-ctx.Done():
						return
					case <-time.After(span):
					}
				}
			}
		})

		v := d.mustOpen(t, uid)
		last := map[string]*sds.SVID{}
		var served, withheld int
		for range 365 * 24 * 4 {
			now := time.Now()
			for _, r := range list {
				s := v.SVID(r.ID)
				switch before := last[r.Name]; {
				case s != nil && now.After(s.NotAfter):
					t.Fatalf("%s: an expired certificate is served at %s, not after %s", r.Name, now, s.NotAfter)
				case s == nil && before != nil && !now.After(before.NotAfter):
					t.Fatalf("%s: a good certificate was lost at %s, not after %s", r.Name, now, before.NotAfter)
				case s == nil && before != nil && !d.away.Load() && now.Sub(time.Unix(0, backSince.Load())) > time.Minute:
					t.Fatalf("%s: nothing is served though the server has been there since %s", r.Name, time.Unix(0, backSince.Load()))
				case s != nil:
					last[r.Name] = s
					served++
				case before != nil:
					withheld++
				}
			}
			time.Sleep(15 * time.Minute)
		}
		cancel()
		wg.Wait()
		t.Logf("%d outages, %d longer than half a life; %d looks served, %d after expiry; %d issuances of r0", outages, long, served, withheld, w.issuances("r0"))
		if outages < 100 || long == 0 || withheld == 0 || served < 60_000 {
			t.Fatal("the year was too quiet to show anything")
		}
	})
}

// Anything may happen at any time; still nobody ever sees a secret that no registration gives him at that moment.
func TestChurnNeverShowsAForeignSecret(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world, start func(*doorless)) {
		pool := []identity.Registration{
			reg("a", "/a", 10*time.Second, "unix:uid:1"), reg("b", "/b", 20*time.Second, "unix:uid:2"),
			reg("c", "/c", 10*time.Second, "unix:uid:1", "unix:gid:3"), reg("d", "/d", 30*time.Second, "unix:gid:3"),
		}
		d := newDoorless(t, w, pool...)
		start(d)
		random := rand.New(rand.NewPCG(3, 4))
		var mu sync.Mutex
		current := pool
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var seen atomic.Int64
		for i := range 20 {
			r := rand.New(rand.NewPCG(5, uint64(i)))
			wg.Go(func() {
				for ctx.Err() == nil {
					shown := []identity.Selector{identity.Selector(fmt.Sprintf("unix:uid:%d", 1+r.IntN(3)))}
					if r.IntN(2) == 0 {
						shown = append(shown, "unix:gid:3")
					}
					v, err := d.open(workload(shown...), "")
					if err != nil {
						time.Sleep(time.Duration(r.Int64N(int64(time.Second))))
						continue
					}
					for range r.IntN(20) {
						// The set stands still while it is looked at.
						mu.Lock()
						for _, reg := range pool {
							s := v.SVID(reg.ID)
							if s == nil {
								continue
							}
							seen.Add(1)
							if !slices.ContainsFunc(current, func(c identity.Registration) bool { return c.ID == s.ID && c.Matches(shown) }) {
								t.Errorf("%v was shown %s", shown, s.ID)
							}
							if s.ID != reg.ID {
								t.Errorf("asked for %s, got %s", reg.ID, s.ID)
							}
						}
						mu.Unlock()
						time.Sleep(time.Duration(r.Int64N(int64(2 * time.Second))))
					}
					v.Close()
				}
			})
		}
		for range 300 {
			var next []identity.Registration
			for _, r := range pool {
				if random.IntN(3) > 0 {
					if random.IntN(5) == 0 {
						r.Selectors = []identity.Selector{"unix:uid:3"}
					}
					next = append(next, r)
				}
			}
			mu.Lock()
			current = next
			d.know(next...)
			mu.Unlock()
			d.away.Store(random.IntN(4) == 0)
			time.Sleep(time.Duration(random.Int64N(int64(3 * time.Second))))
		}
		cancel()
		wg.Wait()
		if seen.Load() < 1000 {
			t.Fatalf("only %d secrets were seen", seen.Load())
		}
		time.Sleep(time.Hour)
		if l := d.life(); l.valid+l.expired+l.pending != 0 || len(d.views) != 0 {
			t.Fatalf("left over: %+v, %d views", l, len(d.views))
		}
	})
}
