// Package agent is a node's process: it joins a cluster once, learns which workloads may have which identity, and gives
// each of them key, certificate and trust over SDS, renewed ahead of expiry without anybody noticing.
//
// What it promises:
//   - A key is made here, for one registration; it goes to the processes that fit that registration and nowhere else.
//     On disk it is only sealed, in the cache, for as long as its certificate is in use.
//   - One issuance per registration, shared by all streams that want it.
//   - While the server is away what is held is served until it really expires, over restarts too, and renewal is tried
//     for ever.
//   - Trust is never turned back: an older bundle is refused, over restarts too, and so is an audit log that forgets.
//
// To read it: agent.go puts the parts together; hub.go is the heart (entries, keys, renewal), reissue.go what is
// replaced ahead of its time, and view.go what one caller sees of it; enrol.go and sync.go talk to the server through door.go;
// word.go is what the server is told of all workloads together. state.go, stored.go and lastword.go are what survives a restart, and
// cache.go with seal.go the part of that which is secret.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/internal/health"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/sds"
	"github.com/signet-ca/signet/trust"
)

// stopTimeout bounds an orderly stop; who still reads nothing then is cut off.
const stopTimeout = 3 * time.Second

// Socket is a Unix socket dedicated to the registrations that have the selector socket:<name>.
type Socket struct {
	Name, Path string
}

// Config of an Agent.
type Config struct {
	// StateDir is this agent's own folder, made if missing; a second process on it is refused.
	StateDir string
	// JoinToken gives the token of an agent that is not enrolled yet; nil = it must be enrolled.
	JoinToken TokenSource
	// Seal protects the agent's key and the cached keys of its workloads at rest; nil = a local secret in StateDir:
	// protection by file mode alone.
	Seal keystore.Passphrase
	// Keys is where the agent's key is kept; nil = files under StateDir, sealed by Seal.
	Keys keystore.Store
	// Socket is where all workloads may ask.
	Socket string
	// Sockets are dedicated ones; there only registrations that name the socket count.
	Sockets []Socket
	// Validator is the form in which Envoys get their trust; "" = sds.SPIFFE.
	Validator sds.Validator
	// HTTP is host:port of /metrics, /livez and /readyz; "" = none.
	HTTP string
	// Attestor tells who is behind a connection; nil = identity.UnixAttestor.
	Attestor identity.WorkloadAttestor

	Now func() time.Time // nil = time.Now
	// Metrics is where the metrics are and what /metrics shows; nil = a registry of its own.
	Metrics *prometheus.Registry
	Logger  *slog.Logger // nil = none

	// Lowered by tests only.
	sealIterations int
	// returnTime is how long workloads may take to be back after a restart, or after their stream has ended.
	returnTime time.Duration
}

func (c *Config) complete() error {
	switch {
	case c.StateDir == "":
		return errors.New("agent: no state folder: name one in state_dir")
	case c.Socket == "":
		return errors.New("agent: no socket: name one in socket")
	}
	seen := map[string]bool{filepath.Clean(c.Socket): true, AdminSocket(c.StateDir): true}
	if len(seen) == 1 {
		return fmt.Errorf("agent: socket %s is the name of the admin's socket: choose another", c.Socket)
	}
	names := map[string]bool{}
	for _, s := range c.Sockets {
		if err := identity.ParseName("socket", s.Name); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
		if p := filepath.Clean(s.Path); s.Path == "" || seen[p] || names[s.Name] {
			return fmt.Errorf("agent: socket %s at %q: each needs a name and a path of its own", s.Name, s.Path)
		}
		seen[filepath.Clean(s.Path)], names[s.Name] = true, true
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = prometheus.NewRegistry()
	}
	if c.sealIterations == 0 {
		c.sealIterations = sealIterations
	}
	if c.returnTime == 0 {
		c.returnTime = sds.ReturnTime
	}
	return nil
}

// Agent is a node's process. Make one with New and call Run.
type Agent struct {
	config   Config
	now      func() time.Time
	log      *slog.Logger
	denials  *limitedLog
	metrics  *metrics
	keys     keystore.Store
	attestor identity.WorkloadAttestor
	dial     dialer
	lock     *durable.DirLock

	hub     *hub
	link    link
	sds     *sds.Server
	bundles trust.Bundles
	stored  storedBundles
	word    newestWord
	memory  memory
	// member is nil until the agent is enrolled; witness and cache are set before it.
	member  atomic.Pointer[member]
	witness *audit.Witness
	cache   *cache

	// trusted is closed when there is a bundle.
	trusted   chan struct{}
	trustOnce sync.Once
	// synced: the server has told its registrations since this start; connected: it is there now.
	synced, connected, inconsistent, serving atomic.Bool
	// admitted counts the streams that have come, for tidy.
	admitted atomic.Int64
	// open is closed when the sockets are open, enrolled when the agent is a member of its cluster.
	open, enrolled chan struct{}
	// lastSet belongs to keepSync.
	lastSet *signetv1.RegistrationSet
}

// New takes the state folder and loads what is in it. Nothing is listened on and nobody is called before Run, which also
// gives the folder back; Close does so where Run is not called.
func New(ctx context.Context, c Config) (_ *Agent, err error) {
	if err := c.complete(); err != nil {
		return nil, err
	}
	a := &Agent{config: c, now: c.Now, log: c.Logger, keys: c.Keys, attestor: c.Attestor, dial: dialTCP, trusted: make(chan struct{}), open: make(chan struct{}), enrolled: make(chan struct{})}
	a.denials = &limitedLog{log: c.Logger, limit: rate.NewLimiter(1, 20)}
	if err := durable.Dir(c.StateDir); err != nil {
		return nil, err
	}
	if a.lock, err = durable.Lock(c.StateDir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			a.Close()
		}
	}()
	if a.metrics, err = newMetrics(c.Metrics, a.now, func() life { return a.hub.life() }, a.controlNotAfter, a.connected.Load); err != nil {
		return nil, err
	}
	a.link = link{now: a.now, answered: make(chan struct{}, 1), dial: func(ctx context.Context, addr string) (net.Conn, error) { return a.dial(ctx, addr) }}
	a.hub = newHub(&a.link, &a.bundles, a.now, a.log, a.metrics)
	if a.config.Seal == nil {
		a.config.Seal = keystore.PassphraseLocal(c.StateDir)
		a.log.Info("no seal is configured: the agent's key and the cached keys of its workloads are protected by file mode alone", "state_dir", c.StateDir)
	}
	if a.keys == nil {
		if a.keys, err = keystore.NewFile(keystore.FileConfig{Dir: a.path(keysDir), Passphrase: a.config.Seal}); err != nil {
			return nil, err
		}
	}
	if a.attestor == nil {
		if a.attestor, err = identity.NewUnixAttestor(identity.UnixConfig{WantsHash: a.hub.wantsHash, Logger: a.log}); err != nil {
			return nil, err
		}
	}
	if a.sds, err = sds.New(sds.Config{Workloads: a, Validator: c.Validator, ReturnTime: a.config.returnTime, Metrics: c.Metrics, Logger: a.log, Now: a.now}); err != nil {
		return nil, err
	}
	m, err := a.loadMember(ctx)
	if err != nil {
		return nil, err
	}
	if m != nil {
		if err := a.become(ctx, m); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// become takes an enrolment into use, with what the state folder remembers of its cluster.
func (a *Agent) become(ctx context.Context, m *member) error {
	origin, err := logOrigin(m.enrolment)
	if err != nil {
		return err
	}
	if a.witness, err = audit.NewWitness(a.path(witnessFile), origin, m.LogVerifierKey); err != nil {
		return err
	}
	if a.evidence() != "" {
		a.inconsistent.Store(true)
		a.log.Error("the audit log has contradicted what this agent had seen, before this start; "+clearing, "evidence", a.path(evidenceFile))
	}
	if err := a.loadBundle(m); err != nil {
		return err
	}
	a.loadLastWord()
	a.hub.as(m.Agent, m.td)
	if err := a.loadRegistrations(m); err != nil {
		return err
	}
	if b, ok := a.bundles.Get(m.td); ok {
		a.trustNow(b)
	}
	if a.cache, err = newCache(ctx, a.path(cacheDir), a.config.Seal, m, a.config.sealIterations, a.log); err != nil {
		return err
	}
	a.hub.restore(a.cache)
	a.member.Store(m)
	if err := a.link.use(m); err != nil {
		return err
	}
	close(a.enrolled)
	return nil
}

// Close gives the state folder back. Run does it by itself.
func (a *Agent) Close() error {
	a.link.close()
	return a.lock.Close()
}

// Serving is closed when the sockets are open. Who connects before the agent has heard from its server is kept waiting.
func (a *Agent) Serving() <-chan struct{} { return a.open }

// Enrolled is closed when the agent is a member of its cluster: at once where it has been one before.
func (a *Agent) Enrolled() <-chan struct{} { return a.enrolled }

// Run opens the sockets, enrols if that is still to be done, and serves until ctx ends; then it stops in order: streams
// end with Unavailable, calls under way have their time. The error is nil after such a stop.
func (a *Agent) Run(ctx context.Context) (err error) {
	defer a.Close()
	var listeners []*socketListener
	var admin *socketListener
	var httpDoor net.Listener
	closeAll := func() {
		for _, l := range listeners {
			l.Close()
		}
		if admin != nil {
			admin.Close()
		}
		if httpDoor != nil {
			httpDoor.Close()
		}
	}
	// Before enrolment: a path that can't be used must not cost a token.
	people := workloadCrowd(1 + len(a.config.Sockets))
	for _, s := range append([]Socket{{Path: a.config.Socket}}, a.config.Sockets...) {
		l, err := listen(s, people)
		if err != nil {
			closeAll()
			return err
		}
		listeners = append(listeners, l)
	}
	if admin, err = listenAdmin(AdminSocket(a.config.StateDir)); err != nil {
		closeAll()
		return err
	}
	if a.config.HTTP != "" {
		if httpDoor, err = listenHTTP(a.config.HTTP); err != nil {
			closeAll()
			return err
		}
	}

	server := grpc.NewServer(append(append(sds.ServerOptions(), grpc.Creds(sds.ConnCredentials())), a.edges()...)...)
	secretv3.RegisterSecretDiscoveryServiceServer(server, a.sds)
	adminServer := a.newAdminServer()
	web := health.NewServer(health.Config{Checks: a.checks, Metrics: a.config.Metrics, Logger: a.log})

	// The first part that fails stops the rest. Work in the background goes on until the streams have ended.
	failed := make(chan error, len(listeners)+3)
	background, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var serving, working sync.WaitGroup
	for _, l := range listeners {
		serving.Go(func() {
			if err := server.Serve(l); err != nil {
				failed <- fmt.Errorf("socket %s: %w", l.path, err)
			}
		})
	}
	serving.Go(func() {
		if err := adminServer.Serve(admin); err != nil {
			failed <- fmt.Errorf("socket %s: %w", admin.path, err)
		}
	})
	if httpDoor != nil {
		serving.Go(func() {
			if err := web.Serve(httpDoor); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("http at %s: %w", a.config.HTTP, err)
			}
		})
	}
	a.serving.Store(true)
	close(a.open)
	working.Go(func() { a.hub.run(background) })
	working.Go(func() { a.tidy(background) })
	working.Go(func() {
		if err := a.work(ctx, background); err != nil && ctx.Err() == nil {
			failed <- err
		}
	})

	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	a.serving.Store(false)
	a.stop(server)
	adminServer.Stop()
	_ = web.Close()
	cancel()
	serving.Wait()
	working.Wait()
	if a.cache != nil {
		a.cache.flush(context.WithoutCancel(ctx), a.hub.inUse)
	}
	return err
}

// work is what an agent does beside serving: enrol until until ends, then keep in touch with the server until ctx ends.
func (a *Agent) work(until, ctx context.Context) error {
	if a.member.Load() == nil {
		m, err := a.enrol(until)
		if err != nil {
			return err
		}
		if err := a.become(until, m); err != nil {
			return err
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { a.cache.run(ctx, a.hub.inUse) })
	wg.Go(func() { a.keepControl(ctx) })
	a.workloadsReturn()
	a.word.set(a.makeWord())
	wg.Go(func() { a.keepStored(ctx) })
	wg.Go(func() { a.keepWord(ctx) })
	wg.Go(func() { a.keepLastWord(ctx) })
	wg.Go(func() { a.keepSync(ctx) })
	wg.Wait()
	return nil
}

// stop ends the streams in order, and then those that don't go.
func (a *Agent) stop(server *grpc.Server) {
	a.sds.Shutdown()
	timer := time.AfterFunc(stopTimeout, server.Stop)
	defer timer.Stop()
	server.GracefulStop()
}

// limitedLog writes a bounded number of lines about what peers can cause, and counts the rest.
type limitedLog struct {
	log   *slog.Logger
	limit *rate.Limiter
	left  atomic.Int64
}

func (l *limitedLog) warn(msg string, args ...any) {
	if !l.limit.Allow() {
		l.left.Add(1)
		return
	}
	if n := l.left.Swap(0); n > 0 {
		args = append(args, "not_logged_before", n)
	}
	l.log.Warn(msg, args...)
}
