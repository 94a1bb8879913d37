// Package server is a cluster's process: the doors that agents, admins and probes come to, enrolment, and what agents are
// told. It decides nothing itself: who may have what is identity.Authorize, what is built and signed is package ca.
//
// What a server holds is a state folder (Folder) made by Init and Install; New takes it, opens the doors and Run serves
// until told to stop. The doors, their limits and their methods:
//
//	enrol   TLS 1.3, server-authenticated: Enrol, by join token or enrolled key
//	agent   TLS 1.3, mutual, under this cluster's control CA only: Issue, Renew, Sync
//	admin   Unix socket, 0600, own uid or root: join tokens, registrations
//	http    /metrics /livez /readyz
//
// Peers hear short refusals; the whole reason is in the log and, as one of a closed set of words, in
// signet_svid_requests_rejected_total.
package server

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	grpchealth "google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/health"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/trust"
)

const (
	// workTimeout bounds work that is finished although its caller has gone.
	workTimeout = 15 * time.Second
	// logPart is how many entries go into the log in one call.
	logPart = 1024
	// enrolments is how many nodes are let in at the same time; the others wait. Nobody has proved anything yet at this
	// door, and each try costs a signature check and a look into the store.
	enrolments = 16
	// stopTimeout is how long calls under way may take when the server stops.
	stopTimeout = 5 * time.Second
)

// Config is what a server needs beside its folder.
type Config struct {
	Folder
	// Enrol and Agents are where to listen, host:port. HTTP may be empty: no such door.
	Enrol, Agents, HTTP string
	// Opening is called before the doors are opened, so that whatever stood in for them ends; nil = nothing does.
	Opening func()
	// AdvertiseEnrol and AdvertiseAgents are what agents are told to dial; "" or port 0 = where the server listens.
	AdvertiseEnrol, AdvertiseAgents string
	// AdminSocket is a path.
	AdminSocket string
	// TTL and MaxTTL are the default and the greatest life of a workload's certificate; ControlTTL that of our own parts.
	TTL, MaxTTL, ControlTTL time.Duration
	// MinUsefulLife and Backdate, see ca.Config.
	MinUsefulLife, Backdate time.Duration
	// Rotation is how the CAs are rotated; Algorithm is of the keys that are made for it ("" = ECDSA P-256), Requests makes the
	// requests for their certificates, and NamePrefix goes before their common names.
	Rotation   Rotation
	Algorithm  keystore.Algorithm
	Requests   Requester
	NamePrefix string
	// Upstream signs intermediates without a person, for UpstreamLife (0 = the default); nil = people have them signed.
	Upstream     ca.Upstream
	UpstreamLife time.Duration
	// Exchange is what the clusters of the trust domain share; nil = people carry roots and reports.
	Exchange Exchange
	// Vault is what is known of the Vault behind keys, upstream and exchange, at no cost; nil = none is.
	Vault func() check.Vault
	// ClockIsRight believes the clock at the start although the log has an entry of a later time.
	ClockIsRight bool
	// Elapsed is the time that passes whatever the clock does; nil = by Now, or where that is nil the machine's own.
	Elapsed func() time.Duration
	// Limits bound what one agent may ask for; zero = DefaultLimits.
	Limits Limits
	// Metrics is where the metrics are and what /metrics shows; nil = a registry of its own.
	Metrics *prometheus.Registry
}

// Server is a cluster's process. Make one with New and call Run.
type Server struct {
	config  Config
	now     func() time.Time
	log     *slog.Logger
	metrics *metrics
	folder  *opened
	// begun is when leaves of this configuration could be made first.
	begun     time.Time
	store     *store.Store
	audit     *audit.Log
	control   *x509.Certificate
	issuers   *ca.Issuers
	authority *ca.Authority
	keeper    *keeper
	clock     *clock
	exchange  *exchange // nil = nothing is shared
	acks      *acks
	directory *directory
	outbox    outbox
	logTried  logTried
	banBook   banBook
	witness   witness
	quotas    quotas

	authorizer *identity.Authorizer
	tokens     identity.NodeAttestor
	bundles    trust.Bundles
	own        *ownCertificate
	sessions   sessions
	conns      agentConns
	health     *grpchealth.Server
	// enrolling has a place for each enrolment under way.
	enrolling chan struct{}
	// storing is the writing of bans that nobody waits for any more.
	storing sync.WaitGroup
	// applying is held while a set of registrations is logged and stored.
	applying sync.Mutex

	advertiseEnrol, advertiseAgents string
	checkpointEvery                 time.Duration
	upkeepEvery, banWait            time.Duration

	// refusals bounds how many refusals are logged.
	refusals refusals

	doors []*running
	// stopping is closed when the server begins to stop.
	stopping chan struct{}
}

// running is an open door.
type running struct {
	door     door
	listener net.Listener
	grpc     *grpc.Server
	http     *http.Server
	serving  atomic.Bool
}

// Doors is where a server listens.
type Doors struct {
	Enrol, Agents, HTTP, Admin string
}

// Doors says where the server listens.
func (s *Server) Doors() Doors {
	d := Doors{Admin: s.config.AdminSocket}
	for _, r := range s.doors {
		switch r.door.name {
		case enrolDoor.name:
			d.Enrol = r.listener.Addr().String()
		case agentDoor.name:
			d.Agents = r.listener.Addr().String()
		case httpDoor.name:
			d.HTTP = r.listener.Addr().String()
		}
	}
	return d
}

// New takes the folder, checks every issuer, loads what decisions need into memory, opens the doors, and makes the
// server's own certificate. Nobody is answered before Run; after an error nothing is left open.
func New(ctx context.Context, c Config) (_ *Server, err error) {
	if c.Limits == (Limits{}) {
		c.Limits = DefaultLimits
	}
	if c.Elapsed == nil {
		c.Elapsed = elapsedBy(c.Now)
	}
	if err := c.complete(); err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	if c.Metrics == nil {
		c.Metrics = prometheus.NewRegistry()
	}
	s := &Server{
		config: c, now: c.Now, log: c.Logger, stopping: make(chan struct{}), checkpointEvery: checkpointEvery,
		upkeepEvery: upkeepEvery, banWait: banWait,
		health:    grpchealth.NewServer(),
		enrolling: make(chan struct{}, enrolments), quotas: quotas{limits: c.Limits},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.closeAll())
		}
	}()
	if s.folder, err = c.open(ctx, false); err != nil {
		return nil, err
	}
	s.store = s.folder.store
	if s.metrics, err = newMetrics(s); err != nil {
		return nil, err
	}
	ref, ok, err := s.store.Meta(ctx, logKeyFact)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(LogDir(c.Dir)); !ok && err == nil {
		return nil, fmt.Errorf("folder %s has a log that its state database does not know: the database was lost or replaced; restore it from its newest backup", c.Dir)
	}
	if !ok {
		return nil, fmt.Errorf("folder %s has no log: the making of the cluster was interrupted; run signet cluster init again", c.Dir)
	}
	logKey, err := c.key(ctx, ref)
	if err != nil {
		return nil, err
	}
	if err := c.openLog(ctx, s.folder, logKey, c.Metrics); err != nil {
		return nil, err
	}
	s.audit = s.folder.log
	if err := s.startClock(ctx); err != nil {
		return nil, err
	}
	s.begun = s.now()
	s.outbox = outbox{log: s.record, told: s.store.Told, logged: map[uint64]bool{}}
	s.banBook = banBook{log: s.record}
	s.witness.log = s.audit
	s.acks = newAcks(s)
	if err := s.loadAuthorities(ctx); err != nil {
		return nil, err
	}
	if s.authority, err = ca.New(ca.Config{
		Issuers: s.issuers, Log: s.audit, Backdate: c.Backdate, MinUsefulLife: c.MinUsefulLife,
		Now: c.Now, Metrics: c.Metrics, Logger: c.Logger,
	}); err != nil {
		return nil, err
	}
	if s.directory, err = loadDirectory(ctx, s.store); err != nil {
		return nil, err
	}
	if s.authorizer, err = identity.NewAuthorizer(identity.Policy{
		TrustDomain: c.TrustDomain, Cluster: c.Cluster, DefaultTTL: c.TTL, MaxTTL: c.MaxTTL, ControlTTL: c.ControlTTL,
	}, s.directory); err != nil {
		return nil, err
	}
	s.tokens = identity.NewJoinTokens(loggedTokens{TokenStore: s.store, server: s}, c.Now)
	if err := s.startOutbox(ctx); err != nil {
		return nil, err
	}
	if err := s.foundation(ctx); err != nil {
		return nil, err
	}
	if err := rememberLongest(ctx, s.store, c.MaxTTL, s.begun); err != nil {
		return nil, err
	}
	if c.Exchange != nil {
		s.exchange = newExchange(s.keeper, c.Exchange, s.audit.VerifierKey())
		if err := s.exchange.register(c.Metrics); err != nil {
			return nil, err
		}
	}
	s.own = &ownCertificate{issue: s.issueOwn, now: c.Now, failed: func(err error) {
		s.log.Error("could not renew the server's own certificate", "err", err)
	}}
	// The doors first: a start that fails at an address in use must not leave a certificate in the log each time.
	if err := s.openDoors(); err != nil {
		return nil, err
	}
	if err := s.own.renew(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

func (c *Config) complete() error {
	if err := c.Folder.complete(); err != nil {
		return err
	}
	switch {
	case c.Enrol == "" || c.Agents == "":
		return errors.New("no address for the enrol and agent doors")
	case c.AdminSocket == "":
		return errors.New("no path for the admin socket")
	case c.Requests == nil:
		return errors.New("nothing to make certificate requests with")
	}
	if c.Algorithm == "" {
		c.Algorithm = keystore.ECDSAP256
	}
	c.Rotation.LongestLeaf = c.MaxTTL
	return c.Limits.check()
}

// loadAuthorities opens every authority that has a certificate, checked as ca.NewIssuer checks it, and the trust bundle.
func (s *Server) loadAuthorities(ctx context.Context) (err error) {
	c := &s.config
	k := newKeeper(&c.Folder, c.Rotation)
	k.algorithm, k.requests, k.prefix = c.Algorithm, c.Requests, c.NamePrefix
	k.upstream, k.life = c.Upstream, c.UpstreamLife
	k.clock = s.clock
	k.store, k.record, k.change, k.agents, k.bundles = s.store, s.record, s.change, s.acks.agents, &s.bundles
	k.words = s.acks.words
	if k.issuers, err = ca.NewIssuers(); err != nil {
		return err
	}
	if k.policy.OlderLeaves, err = olderLeaves(ctx, s.store, c.MaxTTL, s.begun); err != nil {
		return err
	}
	s.keeper, s.issuers = k, k.issuers
	return k.load(ctx)
}

// foundation refuses to start without what a cluster stands on. A successor that is ready takes over first: the server may
// have been away for long.
func (s *Server) foundation(ctx context.Context) error {
	_, _ = s.keeper.do(ctx, scheduled(), nil) // what fails is told of where it does
	set := s.keeper.current.Load()
	for _, a := range set.rows {
		if a.Kind == ca.KindControl {
			s.control = set.chains[a.ID][0]
		}
	}
	control, ok := s.issuers.Snapshot().Active(identity.ControlPlane)
	if !ok {
		return fmt.Errorf("cluster %s has no control CA: its making was interrupted; run signet cluster init again", s.config.Cluster)
	}
	// Refused at start, where somebody is looking: nobody could come in.
	if err := control.Usable(s.now()); err != nil {
		return err
	}
	if s.config.Upstream != nil {
		if set.bundle.IsZero() {
			return fmt.Errorf("cluster %s trusts no root yet: its making was interrupted; run signet cluster init again", s.config.Cluster)
		}
		return nil // it signs as soon as it can be asked
	}
	if _, ok := set.activeRoot(); !ok {
		return fmt.Errorf("cluster %s has no intermediate yet: have the root's holder sign its request (signet root sign), then run: signet cluster install --chain FILE --root-fingerprint SHA256:…", s.config.Cluster)
	}
	if mesh, ok := s.issuers.Snapshot().Active(identity.Mesh); ok {
		if err := mesh.Usable(s.now()); err != nil {
			return fmt.Errorf("%w: signet cluster init prints the request for its certificate, then signet root sign and signet cluster install", err)
		}
	}
	return nil
}

// issueOwn is the server's own certificate, by the same way as everybody's.
func (s *Server) issueOwn(ctx context.Context, key identity.PublicKey) (*ca.Leaf, error) {
	grant, err := s.authorizer.Authorize(ctx, identity.AsServer(s.config.Instance), identity.ControlAsk{Key: key})
	if err != nil {
		return nil, err
	}
	r := s.issue(ctx, []*identity.Grant{grant})[0]
	return r.Leaf, r.Err
}

func (s *Server) openDoors() error {
	add := func(d door, l net.Listener, err error) (*running, error) {
		if err != nil {
			return nil, err
		}
		r := &running{door: d, listener: l}
		s.doors = append(s.doors, r)
		return r, nil
	}
	c := s.config
	if c.Opening != nil {
		c.Opening()
	}

	l, err := listenTCP("enrol", c.Enrol, enrolDoor)
	r, err := add(enrolDoor, l, err)
	if err != nil {
		return err
	}
	s.advertiseEnrol = advertised(c.AdvertiseEnrol, l)
	r.grpc = s.newGRPC(enrolDoor, credentials.NewTLS(s.baseTLS()), anybody)
	signetv1.RegisterEnrolmentServer(r.grpc, enrolment{Server: s})

	l, err = listenTCP("agents", c.Agents, agentDoor)
	if r, err = add(agentDoor, l, err); err != nil {
		return err
	}
	s.advertiseAgents = advertised(c.AdvertiseAgents, l)
	r.grpc = s.newGRPC(agentDoor, mortalTLS{credentials.NewTLS(s.agentTLS()), s.now, &s.conns}, s.admit)
	signetv1.RegisterAgentsServer(r.grpc, agentsService{Server: s})
	healthv1.RegisterHealthServer(r.grpc, s.health)

	l, err = listenUnix(c.AdminSocket, adminDoor)
	if r, err = add(adminDoor, l, err); err != nil {
		return err
	}
	r.grpc = s.newGRPC(adminDoor, localPeers{}, anybody)
	adminv1.RegisterAdminServer(r.grpc, adminService{Server: s})
	adminv1.RegisterRotationServer(r.grpc, rotationService{adminService: adminService{Server: s}})

	if c.HTTP != "" {
		l, err = listenTCP("http", c.HTTP, httpDoor)
		if r, err = add(httpDoor, l, err); err != nil {
			return err
		}
		r.http = health.NewServer(health.Config{Checks: s.checks, Metrics: c.Metrics, Logger: s.log})
	}
	return nil
}

func advertised(configured string, l net.Listener) string {
	if configured == "" || strings.HasSuffix(configured, ":0") {
		return l.Addr().String()
	}
	return configured
}

// Run serves until ctx ends, then stops in order: no new connections, streams end with Unavailable, calls under way may
// finish for a moment, then the log, the store and the folder are given back. Run must be called, if only with a context
// that has ended, to give back what New took.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var work sync.WaitGroup
	for _, d := range s.doors {
		d.serving.Store(true)
		work.Go(func() {
			err := d.serve()
			d.serving.Store(false)
			if err != nil {
				cancel(fmt.Errorf("the %s door at %s closed by itself: %w", d.door.name, d.listener.Addr(), err))
			}
		})
	}
	work.Go(func() { s.own.keep(ctx) })
	work.Go(func() { s.upkeep(ctx) })
	work.Go(func() { s.tryLogOften(ctx) })
	work.Go(func() { s.lookBack(ctx) })
	work.Go(func() { s.lookAtKeys(ctx) })
	work.Go(func() { s.keeper.keep(ctx, s.upkeepEvery, s.acks.woken) })
	if s.exchange != nil {
		work.Go(func() { s.exchange.run(ctx) })
	}
	if s.config.Upstream != nil {
		work.Go(func() { s.keeper.sign(ctx) })
	}
	doors := s.Doors()
	s.log.Info("server is ready", "trust_domain", s.config.TrustDomain.Name(), "cluster", s.config.Cluster, "instance", s.config.Instance,
		"enrol", doors.Enrol, "agents", doors.Agents, "http", doors.HTTP, "admin", doors.Admin)

	<-ctx.Done()
	s.log.Info("server is stopping")
	s.stop()
	work.Wait()
	s.storing.Wait()
	_ = s.storeBans(context.Background()) // logged
	err := s.closeAll()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		err = errors.Join(cause, err)
	}
	return err
}

func (r *running) serve() error {
	if r.http != nil {
		if err := r.http.Serve(r.listener); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	}
	if err := r.grpc.Serve(r.listener); !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// stop ends the doors. GracefulStop alone would wait for streams that have no end (S18).
func (s *Server) stop() {
	close(s.stopping)
	s.health.Shutdown()
	var work sync.WaitGroup
	for _, d := range s.doors {
		work.Go(func() {
			if d.http != nil {
				ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
				defer cancel()
				if d.http.Shutdown(ctx) != nil {
					d.http.Close()
				}
				return
			}
			late := time.AfterFunc(stopTimeout, d.grpc.Stop)
			defer late.Stop()
			d.grpc.GracefulStop()
		})
	}
	work.Wait()
}

// closeAll gives back what New took.
func (s *Server) closeAll() error {
	for _, d := range s.doors {
		d.listener.Close()
	}
	var err error
	if s.folder != nil {
		err = s.folder.close()
	}
	return err
}

// errNotLogged marks what could not be done because it could not be logged.
var errNotLogged = errors.New("the audit log can't be written")

// record logs what is about to take effect. After an error nothing may.
func (s *Server) record(ctx context.Context, entries ...*auditv1.Entry) error {
	// The log takes so many at once that a large set of registrations goes in parts; an entry of a part that is in the log
	// when a later one fails comes once more with the whole set (outbox).
	for part := range slices.Chunk(entries, logPart) {
		if _, err := s.audit.Append(ctx, part); err != nil {
			return err
		}
	}
	return nil
}

// canIssue says why no certificate of a hierarchy can be made now.
func (s *Server) canIssue(h identity.Hierarchy) error {
	issuer, ok := s.issuers.Snapshot().Active(h)
	if !ok {
		return fmt.Errorf("no issuer of the %s hierarchy is active", h)
	}
	if err := issuer.Usable(s.now()); err != nil {
		return err
	}
	if err := s.clock.believe(); err != nil {
		return err
	}
	return s.audit.Usable()
}

// whyNot names, from a closed set, why nothing was issued or changed.
func (s *Server) whyNot(err error) string {
	var e *ca.Error
	switch {
	case errors.As(err, &e):
		if e.Reason == ca.ReasonNoIssuer {
			return "issuer_unavailable"
		}
		return string(e.Reason)
	case errors.Is(err, errNotLogged):
		return "log_unavailable"
	case errors.Is(err, keystore.ErrAway):
		return "issuer_unavailable"
	}
	return "store_unavailable"
}
