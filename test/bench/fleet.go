package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/signet-ca/signet/agent"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/sds"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
	"github.com/signet-ca/signet/trust"
)

// fleet is the work of a process with several agents: real ones, or bare ones, which pass on what the door tells to bare
// servers and answer when all their streams have acknowledged it.
type fleet struct {
	Dir     string   `json:"dir"`
	Tokens  []string `json:"tokens"` // of one agent each
	Bare    bool     `json:"bare"`
	Streams int      `json:"streams"` // of each agent
}

func fleetSocket(dir, name string) string { return filepath.Join(dir, name+".sock") }

// playFleet runs the agents until its input ends.
func playFleet(in lineReader, out func(any) error, f fleet) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	failed := make(chan error, len(f.Tokens))
	for _, text := range f.Tokens {
		token, err := identity.ParseJoinToken(text)
		if err != nil {
			return err
		}
		if f.Bare {
			// One after the other: the enrol door takes few connections from one address, and agents try again where these don't.
			m, err := doors.Enrol(ctx, text)
			if err != nil {
				return err
			}
			go func() { failed <- bareAgent(ctx, f, m) }()
			continue
		}
		a, err := agent.New(ctx, agent.Config{
			StateDir: filepath.Join(f.Dir, token.Agent), Socket: fleetSocket(f.Dir, token.Agent), Keys: keystore.NewMemory(),
			JoinToken: func(context.Context) (identity.JoinToken, error) { return token, nil },
		})
		if err != nil {
			return err
		}
		go func() { failed <- a.Run(ctx) }()
	}
	if err := out(struct{}{}); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { _, err := in.line(); ended <- err }()
	select {
	case err := <-failed:
		return err
	case err := <-ended:
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}
}

// bareAgent is the floor of an agent.
func bareAgent(ctx context.Context, f fleet, m *doors.Member) error {
	conn, err := m.Dial(m.Reply.AgentDoor, m.ControlCA)
	if err != nil {
		return err
	}
	defer conn.Close()
	sync, err := signetv1.NewAgentsClient(conn).Sync(ctx)
	if err != nil {
		return err
	}
	if err := sync.Send(&signetv1.SyncRequest{}); err != nil {
		return err
	}
	b := newBare(nil)
	l, err := net.Listen("unix", fleetSocket(f.Dir, m.Reply.Agent))
	if err != nil {
		return err
	}
	g := grpc.NewServer(append(sds.ServerOptions(), grpc.Creds(sds.ConnCredentials()))...)
	secretv3.RegisterSecretDiscoveryServiceServer(g, b)
	defer g.Stop()
	go func() { _ = g.Serve(l) }()
	td, err := spiffeid.TrustDomainFromString(m.Reply.TrustDomain)
	if err != nil {
		return err
	}
	for {
		r, err := sync.Recv()
		if err != nil {
			return err
		}
		if r.GetBundle() == nil {
			continue
		}
		var roots []*x509.Certificate
		for _, raw := range r.GetBundle().Roots {
			c, err := x509.ParseCertificate(raw)
			if err != nil {
				return err
			}
			roots = append(roots, c)
		}
		bundle, err := trust.NewBundle(td, r.GetBundle().Sequence, roots)
		if err != nil {
			return err
		}
		b.size(trustName, len(bundle.PEM()))
		before := b.acks.Load()
		if err := b.change(); err != nil {
			return err
		}
		for bundle.Sequence() > 1 && b.acks.Load()-before < int64(f.Streams) {
			time.Sleep(time.Millisecond)
		}
		digest := bundle.Digest()
		if err := sync.Send(&signetv1.SyncRequest{BundleAcks: []*signetv1.BundleAck{{TrustDomain: td.Name(), Digest: digest[:], Sequence: bundle.Sequence()}}}); err != nil {
			return err
		}
	}
}

// trustToAgents adds a root at a real server that has 100 agents with 100 streams each, until the server has every agent's
// word that all its streams have acknowledged it.
func trustToAgents(ctx context.Context, b *bench) ([]figure, error) {
	agents, streams, rounds := 100, 100, 5
	if b.quick {
		agents, streams, rounds = 20, 20, 2
	}
	floors, _, err := trustRounds(ctx, b, true, agents, streams, rounds)
	if err != nil {
		return nil, err
	}
	times, answers, err := trustRounds(ctx, b, false, agents, streams, rounds)
	if err != nil {
		return nil, err
	}
	floor := median(floors)
	what := fmt.Sprintf("a root added at one server with %d agents with %d streams each", agents, streams)
	return []figure{
		figure{Name: what + ", until the server has every agent's word", Value: median(times), Unit: "ms"}.against(floor, 1.5).spread(scaled(times, 1/floor)),
		figure{Name: what + ": of it, until it is logged, stored and told", Value: median(answers), Unit: "ms"}.spread(answers),
	}, nil
}

// trustRounds measures until all agents have answered, and of it until the admin was answered, in ms.
func trustRounds(ctx context.Context, b *bench, bare bool, agents, streams, rounds int) (times, answers []float64, err error) {
	const perFleet = 10
	l, c, err := newCluster(ctx, b, "agents-"+strconv.FormatBool(bare), hourlyLeaves)
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	if _, err := c.Serve(ctx); err != nil {
		return nil, nil, err
	}
	var names, sockets []string
	dir := c.Path("run")
	for n := range agents {
		name := "node-" + strconv.Itoa(n)
		names, sockets = append(names, name), append(sockets, fleetSocket(dir, name))
	}
	if err := c.Apply(ctx, fmt.Sprintf("registrations:\n  - { name: bench, spiffe_id: spiffe://%s/ns/bench/sa/bench, agents: [%s], selectors: [\"unix:uid:%d\"] }\n",
		lab.TrustDomain, strings.Join(names, ", "), os.Getuid())); err != nil {
		return nil, nil, err
	}
	a, err := adminOf(c)
	if err != nil {
		return nil, nil, err
	}
	defer a.conn.Close()
	tokens, err := a.tokens(ctx, names)
	if err != nil {
		return nil, nil, err
	}
	var all crowds
	defer func() { all.end() }()
	for some := range slices.Chunk(tokens, perFleet) {
		ch, err := start("fleet", partConfig{Fleet: &fleet{Dir: dir, Bare: bare, Streams: streams, Tokens: some}})
		if err != nil {
			return nil, nil, err
		}
		all = append(all, ch)
		if err := ch.hear(ctx, 30*time.Second, &struct{}{}); err != nil {
			return nil, nil, err
		}
	}
	if err := a.believed(ctx, idOf(l.RootFingerprint), agents, time.Minute); err != nil {
		return nil, nil, err
	}
	var cs crowds
	defer func() { cs.end() }()
	// One fleet after the other: how many can come at once is the business of the cold start.
	for some := range slices.Chunk(sockets, perFleet) {
		these, err := gather(crowd{Sockets: some, Sidecars: len(some) * streams, Names: []string{trustName}})
		if err != nil {
			return nil, nil, err
		}
		cs = append(cs, these...)
		got, err := these.arrive(ctx)
		if err != nil {
			return nil, nil, err
		}
		if got.Served != len(some)*streams {
			return nil, nil, fmt.Errorf("%d of %d streams were served: %v", got.Served, len(some)*streams, got.Errors)
		}
	}
	for n := range rounds {
		time.Sleep(time.Second) // what an agent gathers has been said
		next, _, err := newRoot("root "+strconv.Itoa(n), spiffeid.RequireTrustDomainFromString(lab.TrustDomain))
		if err != nil {
			return nil, nil, err
		}
		start := time.Now()
		id, err := a.trust(ctx, next)
		if err != nil {
			return nil, nil, err
		}
		answers = append(answers, float64(time.Since(start).Microseconds())/1e3)
		if err := a.believed(ctx, id, agents, pushLimit); err != nil {
			return nil, nil, err
		}
		times = append(times, float64(time.Since(start).Microseconds())/1e3)
	}
	return times, answers, nil
}
