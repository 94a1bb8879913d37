package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/signet-ca/signet/test/envoy"
	"github.com/signet-ca/signet/test/lab"
)

const (
	frontendID = "spiffe://example.org/ns/shop/sa/frontend"
	backendID  = "spiffe://example.org/ns/shop/sa/backend"
	intruderID = "spiffe://example.org/ns/shop/sa/intruder"
	batchID    = "spiffe://example.org/ns/shop/sa/batch"
	probeID    = "spiffe://example.org/ns/shop/sa/probe"
)

// demo is one run: what stands in the lab, and what has been seen.
type demo struct {
	*lab.Lab
	// whole is the life of what runs beside the steps: sidecars and workloads.
	whole      context.Context
	started    time.Time
	east, west *cluster
	ways       []way
	// guest is a workload on a socket of its own, which has guestID; the sidecars let guests in as well.
	guest, guestID string
	guests         []string
	// ttl is the life of the sidecars' leaves. delta: all sidecars are served incrementally, else west's.
	ttl   time.Duration
	delta bool

	seen    *sightings
	refused int
	proven  int
	// atEnd ends what else a story has started.
	atEnd func()
}

// cluster is a lab's cluster with an agent and two sidecars.
type cluster struct {
	*lab.Cluster
	agent             *lab.Agent
	frontend, backend *sidecar
	// ttl is the life of its sidecars' leaves; 0 = the demo's.
	ttl time.Duration
}

// sidecar is an Envoy beside a workload.
type sidecar struct {
	cluster  *cluster
	role, id string
	// out is its port for requests in clear, which go to the other cluster; in is its port for mutual TLS.
	out, in int
	envoy   *envoy.Process
}

// way is where the requests of a sidecar go.
type way struct {
	from, to *sidecar
	// perConnection is after how many requests there is a fresh connection, with a handshake of its own; 0 = it is held open.
	perConnection int
}

func (w way) String() string { return w.from.String() + " to " + w.to.String() }

func (s *sidecar) String() string { return s.cluster.Name + " " + s.role }

func newDemo(ctx context.Context, dir, signet string) (*demo, error) {
	l, err := lab.New(dir, signet)
	if err != nil {
		return nil, err
	}
	d := &demo{Lab: l, whole: ctx, started: time.Now(), guest: "intruder", guestID: intruderID, ttl: 10 * time.Second, seen: newSightings(), atEnd: func() {}}
	for name, into := range map[string]**cluster{"east": &d.east, "west": &d.west} {
		lc, err := l.NewCluster(name, "")
		if err != nil {
			return nil, err
		}
		ports, err := lab.FreePorts(4)
		if err != nil {
			return nil, err
		}
		c := &cluster{Cluster: lc}
		c.frontend = &sidecar{cluster: c, role: "frontend", id: frontendID, out: ports[0], in: ports[1]}
		c.backend = &sidecar{cluster: c, role: "backend", id: backendID, out: ports[2], in: ports[3]}
		*into = c
	}
	d.ways = []way{
		{d.east.frontend, d.west.backend, requestsPerConnection},
		{d.west.frontend, d.east.backend, requestsPerConnection},
	}
	return d, nil
}

func (d *demo) clusters() []*cluster { return []*cluster{d.east, d.west} }

func (d *demo) sidecars() []*sidecar {
	return []*sidecar{d.east.frontend, d.east.backend, d.west.frontend, d.west.backend}
}

// step runs one part of the story and prints a line about it.
func (d *demo) step(ctx context.Context, title string, do func(context.Context) (string, error)) error {
	fmt.Printf("[%5.1fs] %s\n", time.Since(d.started).Seconds(), title)
	detail, err := do(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", title, err)
	}
	if name, ended := d.Ended(); ended {
		return fmt.Errorf("%s: %s has ended by itself", title, name)
	}
	if err := d.unharmed(); err != nil {
		return fmt.Errorf("%s: %w", title, err)
	}
	fmt.Printf("         ok: %s\n", detail)
	return nil
}

// stop ends the Envoys, then everything else.
func (d *demo) stop() {
	for _, s := range d.sidecars() {
		if s.envoy != nil {
			s.envoy.Stop()
		}
	}
	d.Close()
	d.atEnd()
}

func (d *demo) makeRoot(ctx context.Context) (string, error) {
	if err := d.MakeRoot(ctx); err != nil {
		return "", err
	}
	return "fingerprint " + short(d.RootFingerprint), nil
}

// join is the ceremony: the cluster's CSR goes to the root, the chain comes back, fingerprints are compared both ways.
func (d *demo) join(ctx context.Context, c *cluster) (string, error) {
	fp, err := c.Initialize(ctx)
	if err != nil {
		return "", err
	}
	if _, err := d.Refuses(ctx, c.SignArgs("SHA256:"+strings.Repeat("ab", 32))...); err != nil {
		return "", fmt.Errorf("a CSR swapped on the way: %w", err)
	}
	if _, err := os.Stat(c.Path("chain.pem")); err == nil {
		return "", errors.New("a refused ceremony left a chain behind")
	}
	if _, err := d.Run(ctx, c.SignArgs(fp)...); err != nil {
		return "", err
	}
	if _, err := d.Refuses(ctx, c.InstallArgs("SHA256:"+strings.Repeat("00", 32))...); err != nil {
		return "", fmt.Errorf("another root: %w", err)
	}
	if _, err := d.Run(ctx, c.InstallArgs(d.RootFingerprint)...); err != nil {
		return "", err
	}
	d.refused += 2
	return "intermediate " + short(fp) + " signed and installed; a swapped CSR and another root were refused", nil
}

func (d *demo) startServersAndAgents(ctx context.Context) (string, error) {
	for _, c := range d.clusters() {
		if _, err := c.Serve(ctx); err != nil {
			return "", err
		}
		var err error
		if c.agent, err = c.StartAgent(ctx, "node-1", "frontend", d.guest); err != nil {
			return "", err
		}
	}
	return "4 processes; each agent enrolled with a one-time join token", nil
}

// register gives the frontend's Envoy a socket of its own, and knows the backend's Envoy by user and executable.
func (d *demo) register(ctx context.Context) (string, error) {
	hash, err := envoyHash(ctx)
	if err != nil {
		return "", err
	}
	const regs = `registrations:
  - name: frontend
    spiffe_id: %s
    agents: [node-1]
    selectors: ["socket:frontend"]
    ttl: %[7]s
  - name: backend
    spiffe_id: %[2]s
    agents: [node-1]
    selectors: ["unix:uid:%[5]d", "unix:sha256:%[6]s"]
    ttl: %[7]s
  - name: %[8]s
    spiffe_id: %[3]s
    agents: [node-1]
    selectors: ["socket:%[8]s"]
    ttl: %[7]s
  - name: probe
    spiffe_id: %[4]s
    agents: [probe]
    selectors: ["socket:probe"]
`
	for _, c := range d.clusters() {
		regs := fmt.Sprintf(regs, frontendID, backendID, d.guestID, probeID, os.Getuid(), hash, cmp.Or(c.ttl, d.ttl), d.guest)
		dryRun := []string{"registration", "apply", "--config", c.Config(), "-f", c.Path("registrations.yaml"), "--dry-run"}
		if err := d.Write(c.Name+"/registrations.yaml", regs); err != nil {
			return "", err
		}
		if _, err := d.Refuses(ctx, dryRun...); err != nil { // 1 = it would change something
			return "", fmt.Errorf("dry run before: %w", err)
		}
		if err := c.Apply(ctx, regs); err != nil {
			return "", err
		}
		if _, err := d.Run(ctx, dryRun...); err != nil { // 0 = nothing to change
			return "", fmt.Errorf("dry run after: %w", err)
		}
	}
	return "4 in each cluster; a second apply would change nothing", nil
}

func short(fingerprint string) string {
	if len(fingerprint) > 23 {
		return fingerprint[:23] + "…"
	}
	return fingerprint
}
