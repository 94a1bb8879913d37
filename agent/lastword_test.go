package agent

import (
	"context"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/sds"
	"github.com/signet-ca/signet/test/bubble"
	"github.com/signet-ca/signet/trust"
)

// process is an agent in simulated time: its sockets are in memory, its server is the world itself, its disk is real.
type process struct {
	*Agent
	t   *testing.T
	w   *world
	lis *bufconn.Listener
}

// Attest implements sds.Workloads: every caller is uid's.
func (p *process) Attest(context.Context, net.Conn) (sds.View, error) {
	v, err := p.hub.open(workload(uid), "")
	if err != nil {
		return nil, err
	}
	p.serves()
	return v, nil
}

// process starts an agent on a state folder.
func (w *world) process(t *testing.T, dir string) *process {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	a := &Agent{config: Config{StateDir: dir, returnTime: sds.ReturnTime}, now: time.Now, log: testLog(t), trusted: make(chan struct{})}
	var err error
	a.metrics, err = newMetrics(prometheus.NewRegistry(), a.now, func() life { return a.hub.life() }, a.controlNotAfter, a.connected.Load)
	must(err)
	a.hub = newHub(&doorless{world: w}, &a.bundles, a.now, a.log, a.metrics)
	a.hub.as("node-1", td)
	a.hub.setRegistrations(w.registrations)
	a.cache = mustCache(t, filepath.Join(dir, cacheDir), passphrase("one"), "node-1")
	p := &process{Agent: a, t: t, w: w, lis: bufconn.Listen(64 << 10)}
	a.sds, err = sds.New(sds.Config{Workloads: p, ReturnTime: a.config.returnTime})
	must(err)
	m := aMember("node-1")
	must(a.loadBundle(m))
	a.loadLastWord()
	a.member.Store(m)
	a.workloadsReturn()
	a.word.set(a.makeWord())

	server := grpc.NewServer(append(sds.ServerOptions(), grpc.Creds(sds.ConnCredentials()))...)
	secretv3.RegisterSecretDiscoveryServiceServer(server, a.sds)
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { server.Stop(); cancel(); synctest.Wait() })
	go func() { _ = server.Serve(p.lis) }()
	go a.hub.run(ctx)
	go a.keepWord(ctx)
	go a.keepLastWord(ctx)
	must(p.hear(w.bundle))
	return p
}

// hear takes the server's bundle.
func (p *process) hear(b trust.Bundle) error {
	m := &signetv1.Bundle{TrustDomain: td.Name(), Sequence: b.Sequence()}
	for _, r := range b.Roots() {
		m.Roots = append(m.Roots, r.Raw)
	}
	return p.takeBundle(m)
}

// sidecar opens a stream, and takes and acknowledges what there is; version is what it says to have from before.
func (p *process) sidecar(version string) *sidecar {
	p.t.Helper()
	conn, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return p.lis.Dial() }))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	s := &sidecar{conn: conn, names: []string{"ROOTCA", "default"}}
	if s.stream, err = secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	if err := s.stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: s.names, VersionInfo: version}); err != nil {
		p.t.Fatal(err)
	}
	return s
}

// takes takes so many secrets, and acknowledges them.
func (s *sidecar) takes(t *testing.T, n int) {
	t.Helper()
	for range n {
		if _, err := s.next(); err != nil {
			t.Fatal(err)
		}
	}
}

// says looks at what the server is told, once what is under way has come to rest; no issuers = none, nil = it is not known.
func (p *process) says(when string, v trust.Version, issuers ...*authority) {
	p.t.Helper()
	time.Sleep(settle)
	synctest.Wait()
	w := p.word.get()
	if len(w.acks) != 1 || w.acks[0].Sequence != v.Sequence || trust.Digest(w.acks[0].Digest) != v.Digest {
		p.t.Fatalf("%s: acknowledged %v, want %v", when, w.acks, v)
	}
	want := map[string]bool{}
	for _, i := range issuers {
		want[string(i.cert.SubjectKeyId)] = true
	}
	got := map[string]bool{}
	for _, id := range w.held.GetKeyIds() {
		got[string(id)] = true
	}
	if w.held == nil || !maps.Equal(got, want) {
		p.t.Fatalf("%s: holds %v of %d issuers, want %d", when, w.held, len(got), len(want))
	}
}

// killed is the state folder as a kill leaves it now.
func (p *process) killed() string {
	p.t.Helper()
	dir := p.t.TempDir()
	for _, file := range []string{bundleFile, lastWordFile} { // what the cache holds is told besides
		text, err := os.ReadFile(p.path(file))
		if err != nil && file == lastWordFile { // none, or one that can't be read
			continue
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, file), text, 0o600)
		}
		if err != nil {
			p.t.Fatal(err)
		}
	}
	return dir
}

// inProcess runs a test in simulated time, with a state folder.
func inProcess(t *testing.T, f func(t *testing.T, w *world, dir string)) {
	t.Helper()
	bubble.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.setRegistrations(reg("web", "/web", 24*time.Hour, uid))
		f(t, w, t.TempDir())
	})
}

// next makes the world believe one more root.
func (w *world) next(t *testing.T) trust.Version {
	b := mustBundle(t, w.bundle.Sequence()+1, w.root, newCA(t, "next", nil))
	w.change(func() { w.bundle = b })
	return b.Version()
}

// Envoys outlive their agent, and go on with what they have until they have found it again.
func TestAfterARestartNothingIsAcknowledgedForWorkloadsThatMayNotBeBack(t *testing.T) {
	inProcess(t, func(t *testing.T, w *world, dir string) {
		old, issuer := w.bundle.Version(), w.mesh
		p := w.process(t, dir)
		p.sidecar("").takes(t, 2)
		p.says("served", old, issuer)
		left := p.killed()

		newest := w.next(t)
		w.switchTo("east 2")
		p = w.process(t, left)
		p.says("after the start", old, issuer)
		time.Sleep(20 * time.Second)
		back := p.sidecar("of before")
		p.says("one is back, and has not answered", trust.Version{}, issuer, w.mesh)
		back.takes(t, 2)
		p.says("one is back, and others may not be", old, issuer, w.mesh)

		// Killed once more, before they are: their time begins anew.
		left = p.killed()
		p = w.process(t, left)
		p.says("after the second start", old, issuer, w.mesh)
		time.Sleep(sds.ReturnTime - 3*settle)
		p.says("for so long", old, issuer, w.mesh)
		time.Sleep(settle)
		p.says("they are back, or gone", newest)
	})
}

// An Envoy that is cut off from a running agent goes on with what it has, too.
func TestWhatAWorkloadThatIsCutOffHasIsToldUntilItMayBeBack(t *testing.T) {
	inProcess(t, func(t *testing.T, w *world, dir string) {
		old, issuer := w.bundle.Version(), w.mesh
		p := w.process(t, dir)
		cut, other := p.sidecar(""), p.sidecar("")
		cut.takes(t, 2)
		other.takes(t, 2)
		p.says("served", old, issuer)
		cut.conn.Close()
		synctest.Wait()
		start := time.Now()
		newest := w.next(t)
		w.switchTo("east 2")
		if err := p.hear(w.bundle); err != nil {
			t.Fatal(err)
		}
		p.hub.mu.Lock()
		p.hub.issueSoon("web", p.hub.entries["web"])
		p.hub.mu.Unlock()
		other.takes(t, 2)
		p.cache.flush(t.Context(), p.hub.inUse)
		b, _ := p.bundles.Get(td)
		p.says("the other one has both", old, issuer, w.mesh)
		if by := p.returnedBy(b); !by.Equal(start.Add(sds.ReturnTime)) {
			t.Fatalf("status says until %s, want %s", by, start.Add(sds.ReturnTime))
		}
		time.Sleep(time.Until(start.Add(sds.ReturnTime)) - 2*settle)
		p.says("for so long", old, issuer, w.mesh)
		time.Sleep(settle)
		p.says("it is back, or gone", newest, w.mesh)
		if by := p.returnedBy(b); !by.IsZero() {
			t.Fatalf("status says until %s, want nobody is waited for", by)
		}
	})
}

// What the first workload ever is given is all that it has when the agent is killed then.
func TestAKillRightAfterTheFirstWorkloadIsServedIsRemembered(t *testing.T) {
	inProcess(t, func(t *testing.T, w *world, dir string) {
		old := w.bundle.Version()
		p := w.process(t, dir)
		s := p.sidecar("")
		if _, err := s.stream.Recv(); err != nil { // it has the bundle, and its answer is lost
			t.Fatal(err)
		}
		left := p.killed()
		newest := w.next(t)
		p = w.process(t, left)
		p.says("after the start", old)
		time.Sleep(sds.ReturnTime)
		p.says("it had its time", newest)
	})
}

func TestAnAgentThatHasServedNobodyWaitsForNobody(t *testing.T) {
	inProcess(t, func(t *testing.T, w *world, dir string) {
		p := w.process(t, dir)
		p.says("just enrolled", w.bundle.Version())
		left := p.killed()
		newest := w.next(t)
		p = w.process(t, left)
		p.says("after the start", newest)
		if _, err := os.Stat(p.path(lastWordFile)); !os.IsNotExist(err) {
			t.Fatalf("there is a word of workloads that never were: %v", err)
		}
	})
}

// What is told may be newer than what is on disk, for a restart takes it back; what is on disk is never newer than what is so.
func TestAKillBetweenTheWordAndItsWriteTakesBackWhatWasAcknowledged(t *testing.T) {
	inProcess(t, func(t *testing.T, w *world, dir string) {
		old := w.bundle.Version()
		p := w.process(t, dir)
		s := p.sidecar("")
		s.takes(t, 2)
		p.says("served", old, w.mesh)
		newest := w.next(t)

		// The disk takes no word: it can't be replaced by a file.
		path := p.path(lastWordFile)
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := p.hear(w.bundle); err != nil {
			t.Fatal(err)
		}
		s.takes(t, 1)
		p.says("acknowledged, and not written", newest, w.mesh)
		left := p.killed()
		if err := os.WriteFile(filepath.Join(left, lastWordFile), before, 0o600); err != nil {
			t.Fatal(err)
		}
		q := w.process(t, left)
		q.says("after the start", old, w.mesh)

		// The disk takes it again.
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(storeRetry)
		synctest.Wait()
		q = w.process(t, p.killed())
		q.says("written at last", newest, w.mesh)
		// One comes back late with something older: the word on disk follows.
		late := p.sidecar("something older")
		p.says("it has not answered", trust.Version{}, w.mesh)
		q = w.process(t, p.killed())
		q.says("after a kill then", trust.Version{}, w.mesh)
		late.takes(t, 2)
		p.says("it has answered", newest, w.mesh)
	})
}

// The word is written when it changes, not with each certificate.
func TestTheLastWordIsNotWrittenAnewForNothing(t *testing.T) {
	inProcess(t, func(t *testing.T, w *world, dir string) {
		p := w.process(t, dir)
		p.sidecar("").takes(t, 2)
		p.says("served", w.bundle.Version(), w.mesh)
		first, err := os.Stat(p.path(lastWordFile))
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			more := p.sidecar("")
			more.takes(t, 2)
			more.conn.Close()
			p.hub.mu.Lock()
			p.hub.issueSoon("web", p.hub.entries["web"])
			p.hub.mu.Unlock()
			time.Sleep(time.Minute)
		}
		p.says("five renewals later", w.bundle.Version(), w.mesh)
		if w.issuances("web") < 5 {
			t.Fatalf("%d issuances: the check fails nothing", w.issuances("web"))
		}
		if last, err := os.Stat(p.path(lastWordFile)); err != nil || !os.SameFile(first, last) {
			t.Fatalf("it was written anew: %v", err)
		}
	})
}

// What can't be read counts as a word that nothing is acknowledged, and that it is not known whose leaves are held.
func TestADamagedLastWordCountsAsNothingAcknowledged(t *testing.T) {
	value := func(v any) func(path string) error {
		return func(path string) error { return durable.WriteValue(path, v, 0o600) }
	}
	text := func(s string) func(path string) error {
		return func(path string) error { return os.WriteFile(path, []byte(s), 0o600) }
	}
	long := make([]byte, maxKeyID+1)
	for name, damage := range map[string]func(path string) error{
		"empty":           text(""),
		"not ours":        text(`{"sequence":1}`),
		"a bit flipped":   text(`{"sha256":"AAAA","value":{"sequence":9,"digest":"","issuers":[]}}`),
		"no digest":       value(lastWord{Sequence: 1}),
		"a long issuer":   value(lastWord{Digest: make([]byte, 32), Issuers: [][]byte{long}}),
		"issuers no end":  value(lastWord{Digest: make([]byte, 32), Issuers: slices.Repeat([][]byte{{1}}, maxIssuers+1)}),
		"too long a file": text(strings.Repeat(" ", maxLastWordFile+1)),
		"unreadable":      func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			inProcess(t, func(t *testing.T, w *world, dir string) {
				if err := damage(filepath.Join(dir, lastWordFile)); err != nil {
					t.Fatal(err)
				}
				unknown := func(p *process, when string) {
					t.Helper()
					time.Sleep(settle)
					synctest.Wait()
					if word := p.word.get(); len(word.acks) != 1 || word.acks[0].Sequence != 0 || word.held != nil {
						t.Fatalf("%s: says %v", when, word)
					}
				}
				p := w.process(t, dir)
				unknown(p, "after the start")
				s := p.sidecar("")
				s.takes(t, 2)
				unknown(p, "one is there")
				if left := p.killed(); name != "unreadable" {
					p = w.process(t, left)
					unknown(p, "after another start")
					p.sidecar("").takes(t, 2)
				}
				time.Sleep(sds.ReturnTime)
				p.says("they are back, or gone", w.bundle.Version(), w.mesh)
				if name == "unreadable" { // a folder stays one
					return
				}
				newest := w.next(t)
				p = w.process(t, p.killed())
				p.says("it was written anew", trust.Version{Sequence: newest.Sequence - 1, Digest: mustBundle(t, 1, w.root).Digest()}, w.mesh)
			})
		})
	}
}

// A bundle whose number is the same and whose content is not was believed by nobody.
func TestAWordOfAnotherBundleWithTheSameNumberIsNotTheSame(t *testing.T) {
	a, b := trust.Digest{1}, trust.Digest{2}
	w := &lastWord{Sequence: 4, Digest: a[:]}
	for v, want := range map[trust.Version]bool{
		{Sequence: 4, Digest: a}: false, {Sequence: 4, Digest: b}: true, {Sequence: 5, Digest: b}: true, {Sequence: 3, Digest: b}: false,
	} {
		if got := w.olderThan(v); got != want {
			t.Errorf("older than %v: %v", v, got)
		}
	}
}
