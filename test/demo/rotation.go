package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/test/lab"
)

// rotating is the second story: what stands behind the certificates is replaced under load.
type rotating struct {
	*demo
	a, b, c  *root
	stopLoad func()
	// held are the connections that each sidecar had made when the load began, of those that hold theirs open.
	held map[*sidecar]int64
	// underA was made with a key that signed under root A, thief with one that is tainted then.
	underA, thief stolen

	mu sync.Mutex
	// issuers have been installed, the newest last; behind is who stands behind a serial that was seen.
	issuers map[*cluster][]*issuer
	behind  map[string]*issuer
}

// root is an offline root.
type root struct {
	name, dir, fingerprint, id string
	cert                       *x509.Certificate
}

// issuer is an intermediate of a cluster, with its chain in a file.
type issuer struct {
	id, chain string
	cert      *x509.Certificate
	under     *root
}

func (i *issuer) String() string { return i.id + " under " + i.under.name }

// rotationPolicy makes minutes of what is days elsewhere: a peer is believed for seconds, and clocks agree to a second.
const rotationPolicy = `leaf: { ttl: %[1]s, max_ttl: %[1]s, backdate: 1s }
rotation:
  skew: 1s
  report_life: 5s
  peers:
    - { cluster: %[2]s, log_verifier_key: %[3]q }
`

func newRotating(d *demo) *rotating {
	d.guest, d.guestID, d.guests = "batch", batchID, []string{batchID}
	// Backends hold a connection to the other cluster's frontend open all the time.
	d.ways = append(d.ways, way{d.east.backend, d.west.frontend, 0}, way{d.west.backend, d.east.frontend, 0})
	return &rotating{demo: d, held: map[*sidecar]int64{}, issuers: map[*cluster][]*issuer{}, behind: map[string]*issuer{}}
}

func rotationStory(d *demo) ([]step, func(), func()) {
	r := newRotating(d)
	return []step{
		{"an offline root A for example.org", r.makeRootA},
		{"clusters east and west join under A, and learn the key of each other's log", r.join},
		{"a server and an agent in each cluster", r.start},
		{"registrations", d.register},
		{"a frontend and a backend Envoy in each cluster", d.startEnvoys},
		{"load both ways, on fresh connections and on connections held open; leaves of 10 s are renewed", r.load},
		{"east's intermediate is replaced", r.replaceIntermediate},
		{"east gets a root B beside A; as long as west's agents don't have it, nothing is signed under it", r.addRootB},
		{"both clusters sign under B", r.signUnderB},
		{"root A is retired and removed", r.removeA},
		{"the key of an intermediate is stolen: it is tainted", r.taint},
		{"all leaves under it are re-issued", r.reissue},
		{"root B is replaced by root C", r.replaceB},
		{"every Envoy refuses the forged certificates, and nobody accepts them", r.thiefIsOut},
		{"a workload is banned", r.ban},
		{"the load ends", r.endLoad},
		{"both logs verify, and every serial seen on the wire is proven", r.prove},
	}, r.table, r.tryThis
}

func (r *rotating) makeRoot(ctx context.Context, name, dir string) (*root, error) {
	fp, err := r.MakeRootIn(ctx, dir)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(r.Dir, dir, "root.pem"))
	if err != nil {
		return nil, err
	}
	certs, err := parsePEM(text)
	if err != nil {
		return nil, err
	}
	pinned, err := ca.ParseFingerprint(fp)
	if err != nil {
		return nil, err
	}
	return &root{name: name, dir: dir, fingerprint: fp, id: rotation.RootID(pinned[:]), cert: certs[0]}, nil
}

func (r *rotating) makeRootA(ctx context.Context) (_ string, err error) {
	if r.a, err = r.makeRoot(ctx, "A", "root"); err != nil {
		return "", err
	}
	r.RootFingerprint = r.a.fingerprint
	return "fingerprint " + short(r.a.fingerprint), nil
}

func (r *rotating) join(ctx context.Context) (string, error) {
	keys := map[*cluster]string{}
	for _, c := range r.clusters() {
		if _, err := c.Initialize(ctx); err != nil {
			return "", err
		}
		var shown struct {
			LogVerifierKey string `json:"log_verifier_key"`
		}
		if err := r.JSON(ctx, &shown, "cluster", "show", "--config", c.Config()); err != nil {
			return "", err
		}
		keys[c] = shown.LogVerifierKey
	}
	for _, c := range r.clusters() {
		other := r.other(c)
		if err := errors.Join(c.Configure(fmt.Sprintf(rotationPolicy, r.ttl, other.Name, keys[other])), c.Join(ctx, "--first")); err != nil {
			return "", err
		}
	}
	return "each cluster's file names the other as a peer; they have no connection, reports are carried by hand", nil
}

func (r *rotating) other(c *cluster) *cluster {
	if c == r.east {
		return r.west
	}
	return r.east
}

func (r *rotating) start(ctx context.Context) (string, error) {
	seen, err := r.startServersAndAgents(ctx)
	if err != nil {
		return "", err
	}
	for _, c := range r.clusters() {
		if _, err := r.learn(ctx, c, r.a, c.Path("chain.pem")); err != nil {
			return "", err
		}
	}
	return seen, nil
}

// authority is a CA as `ca list` shows it.
type authority struct {
	ID          string     `json:"id"`
	State       string     `json:"state"`
	Signing     bool       `json:"signing"`
	Tainted     *time.Time `json:"tainted"`
	Fingerprint string     `json:"fingerprint"`
}

func (r *rotating) authorities(ctx context.Context, c *cluster) (all []authority, err error) {
	return all, r.JSON(ctx, &all, "ca", "list", "--config", c.Config())
}

// is reports whether a CA of the cluster is in a state, or in another that it may have come to since.
func (r *rotating) is(ctx context.Context, c *cluster, id string, states ...string) error {
	all, err := r.authorities(ctx, c)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(a authority) bool { return a.ID == id })
	if i < 0 {
		return fmt.Errorf("%s has no %s", c.Name, id)
	}
	if !slices.Contains(states, all[i].State) {
		return fmt.Errorf("%s's %s is %s, not %s", c.Name, id, all[i].State, states[0])
	}
	return nil
}

// learn notes an issuer whose chain was installed.
func (r *rotating) learn(ctx context.Context, c *cluster, under *root, chain string) (*issuer, error) {
	text, err := os.ReadFile(chain)
	if err != nil {
		return nil, err
	}
	certs, err := parsePEM(text)
	if err != nil {
		return nil, err
	}
	all, err := r.authorities(ctx, c)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(a authority) bool { return a.Fingerprint == ca.CertificateFingerprint(certs[0].Raw) })
	if i < 0 {
		return nil, fmt.Errorf("%s does not list the intermediate of %s", c.Name, chain)
	}
	x := &issuer{id: all[i].ID, chain: chain, cert: certs[0], under: under}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.issuers[c] = append(r.issuers[c], x)
	return x, nil
}

// newest is the issuer that was installed last.
func (r *rotating) newest(c *cluster) *issuer {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.issuers[c][len(r.issuers[c])-1]
}

// signing is a request of a cluster for an intermediate, under the root that is to sign it.
type signing struct {
	cluster                 *cluster
	under                   *root
	csr, chain, fingerprint string
}

// startRotation starts one, has the request signed by the root, and installs the chain, while the server runs.
func (r *rotating) startRotation(ctx context.Context, c *cluster, under *root, start ...string) (*issuer, error) {
	x, err := r.requestSigning(ctx, c, under, start...)
	if err != nil {
		return nil, err
	}
	return r.signAndInstall(ctx, x)
}

func (r *rotating) requestSigning(ctx context.Context, c *cluster, under *root, start ...string) (*signing, error) {
	n := len(r.issuers[c]) + 1
	x := &signing{cluster: c, under: under, csr: c.Path(fmt.Sprintf("intermediate-%d.csr", n)), chain: c.Path(fmt.Sprintf("chain-%d.pem", n))}
	fp, err := r.Run(ctx, append([]string{"rotation", "start", "--config", c.Config(), "--csr-out", x.csr}, start...)...)
	x.fingerprint = strings.TrimSpace(fp)
	return x, err
}

func (r *rotating) signAndInstall(ctx context.Context, x *signing) (*issuer, error) {
	if _, err := r.Run(ctx, "root", "sign", "--dir", x.under.dir, "--passphrase-file", x.under.dir+".pass", "--cluster", x.cluster.Name,
		"--csr", x.csr, "--fingerprint", x.fingerprint, "--out", x.chain); err != nil {
		return nil, err
	}
	if _, err := r.Run(ctx, "cluster", "install", "--config", x.cluster.Config(), "--chain", x.chain, "--root-fingerprint", x.under.fingerprint); err != nil {
		return nil, err
	}
	return r.learn(ctx, x.cluster, x.under, x.chain)
}

// replaceRoot is what startRotation is told for the root of a cluster.
func replaceRoot(next *root) []string {
	return []string{"root", "--root", filepath.Join(next.dir, "root.pem"), "--fingerprint", next.fingerprint}
}

// report writes what a cluster tells the other.
func (r *rotating) report(ctx context.Context, from *cluster) (file string, err error) {
	file = from.Path(from.Name + ".report")
	_, err = r.Run(ctx, "rotation", "report", "--config", from.Config(), "--out", file)
	return file, err
}

// exchange carries a report each way until something has come about by it.
func (r *rotating) exchange(ctx context.Context, what string, ok func() error) error {
	return lab.Until(ctx, what, 2*time.Minute, func() error {
		for _, from := range r.clusters() {
			file, err := r.report(ctx, from)
			if err != nil {
				return err
			}
			if _, err := r.Run(ctx, "rotation", "advance", "--config", r.other(from).Config(), "--report", file); err != nil {
				return err
			}
		}
		return ok()
	})
}

// inBoth asks about both clusters.
func (r *rotating) inBoth(ok func(*cluster) error) error { return errors.Join(ok(r.east), ok(r.west)) }

func (r *rotating) load(ctx context.Context) (_ string, err error) {
	if r.stopLoad, err = r.startLoadBeside(ctx, r.look); err != nil {
		return "", err
	}
	for _, w := range r.ways {
		if w.perConnection == 0 {
			if r.held[w.from], err = w.from.envoy.Stat(ctx, connectionsMade); err != nil {
				return "", err
			}
		}
	}
	if err := r.untilRenewed(ctx, 1); err != nil {
		return "", err
	}
	return "every sidecar was seen with a renewed certificate", nil
}

// connectionsMade is how many connections an Envoy has made to its peer.
const connectionsMade = "cluster.peer.upstream_cx_total"

// look makes a fresh handshake with every sidecar a few times a second, and notes what certificate it shows.
func (r *rotating) look(ctx context.Context) {
	for ctx.Err() == nil {
		for _, s := range r.sidecars() {
			if chain, err := handshake(ctx, s.in); err == nil {
				_, _ = r.shows(s, chain)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// handshake returns what is shown at a port for mutual TLS.
func handshake(ctx context.Context, port int) (chain []*x509.Certificate, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	dialer := &tls.Dialer{Config: &tls.Config{
		InsecureSkipVerify: true, //nolint:gosec // what is shown is looked at by the caller
		VerifyConnection:   func(cs tls.ConnectionState) error { chain = cs.PeerCertificates; return nil },
	}}
	conn, err := dialer.DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err == nil {
		conn.Close()
	}
	if len(chain) > 0 {
		return chain, nil // that we show none comes after
	}
	return nil, errors.Join(err, errors.New("no certificate was shown"))
}

// shows finds out who stands behind a chain that a sidecar shows: it must verify under that issuer's root alone.
func (r *rotating) shows(s *sidecar, chain []*x509.Certificate) (*issuer, error) {
	if len(chain) != 2 {
		return nil, fmt.Errorf("%s shows %d certificates, not a leaf and an intermediate", s, len(chain))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range r.issuers[s.cluster] {
		if !bytes.Equal(x.cert.Raw, chain[1].Raw) {
			continue
		}
		roots, between := x509.NewCertPool(), x509.NewCertPool()
		roots.AddCert(x.under.cert)
		between.AddCert(chain[1])
		if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			return nil, fmt.Errorf("%s shows a chain that does not verify under %s: %w", s, x.under.name, err)
		}
		serial := chain[0].SerialNumber.Text(16)
		r.behind[serial] = x
		r.seen.saw(s, serial)
		return x, nil
	}
	return nil, fmt.Errorf("%s shows a chain of %q, which is not known", s, chain[1].Subject)
}

// untilShown waits until the newest issuer of each cluster stands behind both sides of fresh handshakes: what sidecars
// show when asked, and what they have shown each other. It says how long it took since then.
func (r *rotating) untilShown(ctx context.Context, began time.Time) (string, error) {
	err := lab.Until(ctx, "the newest issuers on both sides of fresh handshakes", time.Minute, func() error {
		for _, s := range r.sidecars() {
			want := r.newest(s.cluster)
			chain, err := handshake(ctx, s.in)
			if err != nil {
				return fmt.Errorf("%s: %w", s, err)
			}
			got, err := r.shows(s, chain)
			if err != nil {
				return err
			}
			r.seen.mu.Lock()
			serial := r.seen.newest[s]
			r.seen.mu.Unlock()
			r.mu.Lock()
			used := r.behind[serial]
			r.mu.Unlock()
			if got != want || used != want {
				return fmt.Errorf("%s shows a leaf of %s, and used one of %s; want %s", s, got, used, want)
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("fresh handshakes show %s in east and %s in west on both sides after %.1f s",
		r.newest(r.east), r.newest(r.west), time.Since(began).Seconds()), nil
}

func (r *rotating) say(format string, args ...any) { fmt.Printf("          "+format+"\n", args...) }

func (r *rotating) replaceIntermediate(ctx context.Context) (string, error) {
	began, before := time.Now(), r.newest(r.east)
	next, err := r.startRotation(ctx, r.east, r.a, "intermediate")
	if err != nil {
		return "", err
	}
	if err := lab.Until(ctx, next.id+" signs", 30*time.Second, func() error {
		return errors.Join(r.is(ctx, r.east, next.id, "active"), r.is(ctx, r.east, before.id, "retired", "removed"))
	}); err != nil {
		return "", err
	}
	r.say("%s was requested, signed by root A, installed while the server ran, and signs; %s is retired", next.id, before.id)
	return r.untilShown(ctx, began)
}

func (r *rotating) addRootB(ctx context.Context) (_ string, err error) {
	if r.b, err = r.makeRoot(ctx, "B", "root-b"); err != nil {
		return "", err
	}
	next, err := r.startRotation(ctx, r.east, r.b, replaceRoot(r.b)...)
	if err != nil {
		return "", err
	}
	if err := lab.Until(ctx, "east believes B", 30*time.Second, func() error { return r.is(ctx, r.east, r.b.id, "published") }); err != nil {
		return "", err
	}
	// West believes B too, but its agent, which is stopped meanwhile, has not heard of it. That is for no longer than needed: leaves
	// live for seconds here, and a stopped agent renews none.
	if err := r.untilYoung(ctx, r.west); err != nil {
		return "", err
	}
	if err := r.west.agent.Halt(ctx); err != nil {
		return "", err
	}
	refusal, request, err := r.refusedWithoutWest(ctx)
	if err := errors.Join(err, r.west.agent.Resume()); err != nil {
		return "", err
	}
	if _, err := r.signAndInstall(ctx, request); err != nil {
		return "", err
	}
	if err := r.is(ctx, r.east, next.id, "prepared"); err != nil {
		return "", err
	}
	r.refused++
	return fmt.Sprintf("%s stands ready; refused: %s", next, refusal), nil
}

// untilYoung waits until both sidecars of a cluster show leaves that have most of their life before them.
func (r *rotating) untilYoung(ctx context.Context, c *cluster) error {
	return lab.Until(ctx, c.Name+"'s sidecars show young leaves", time.Minute, func() error {
		for _, s := range []*sidecar{c.frontend, c.backend} {
			chain, err := handshake(ctx, s.in)
			if err != nil {
				return fmt.Errorf("%s: %w", s, err)
			}
			made := chain[0].NotBefore.Add(time.Second) // by the backdate of rotationPolicy
			if age := time.Since(made); age > r.ttl*3/10 {
				return fmt.Errorf("%s shows one that is %s old", s, age.Round(time.Millisecond))
			}
		}
		return nil
	})
}

// refusedWithoutWest starts the rotation in west, and shows that east knows who doesn't have the root. West's request is still to be
// signed.
func (r *rotating) refusedWithoutWest(ctx context.Context) (refusal string, request *signing, err error) {
	if request, err = r.requestSigning(ctx, r.west, r.b, replaceRoot(r.b)...); err != nil {
		return "", nil, err
	}
	file, err := r.report(ctx, r.west)
	if err != nil {
		return "", nil, err
	}
	why, err := r.Refuses(ctx, "rotation", "advance", "--config", r.east.Config(), "--report", file, r.b.id)
	if err != nil {
		return "", nil, err
	}
	const want = "0 of 1 agents of cluster west have it: node-1"
	if why = strings.Join(strings.Fields(why), " "); !strings.Contains(why, want) {
		return "", nil, fmt.Errorf("the refusal does not say %q, but %q", want, why)
	}
	return want, request, nil
}

func (r *rotating) signUnderB(ctx context.Context) (_ string, err error) {
	// Kept for later, when it must be refused.
	if r.underA, err = r.steal(ctx, r.issuers[r.east][1]); err != nil {
		return "", err
	}
	if err := r.everyEnvoy(ctx, r.underA, true); err != nil {
		return "", err
	}
	return r.switchTo(ctx, r.b)
}

// switchTo waits until both clusters sign under a root.
func (r *rotating) switchTo(ctx context.Context, next *root) (string, error) {
	began := time.Now()
	if err := r.exchange(ctx, "both clusters sign under "+next.name, func() error {
		return r.inBoth(func(c *cluster) error { return r.is(ctx, c, r.newest(c).id, "active") })
	}); err != nil {
		return "", err
	}
	r.say("reports were carried both ways; both have switched after %.1f s", time.Since(began).Seconds())
	return r.untilShown(ctx, began)
}

// removed waits until a root is gone, and no agent has it.
func (r *rotating) removed(ctx context.Context, old, stays *root) error {
	return r.exchange(ctx, "root "+old.name+" is removed", func() error {
		return r.inBoth(func(c *cluster) error {
			if err := r.is(ctx, c, old.id, "removed"); err != nil {
				return err
			}
			s, err := r.status(ctx, c)
			if err != nil {
				return err
			}
			for _, x := range s.Clusters[0].Roots {
				if x.ID == old.id && x.Trusting > 0 || x.ID == stays.id && x.Trusting < x.Validators {
					return fmt.Errorf("%d of %d agents of %s believe %s", x.Trusting, x.Validators, c.Name, x.ID)
				}
			}
			return nil
		})
	})
}

// standing is what `rotation status` shows.
type standing struct {
	Clusters []struct {
		Roots []struct {
			ID         string `json:"id"`
			Trusting   int    `json:"trusting"`
			Validators int    `json:"validators"`
		} `json:"roots"`
	} `json:"clusters"`
	Tainted []struct {
		ID         string       `json:"id"`
		Cluster    string       `json:"cluster"`
		Accepting  int          `json:"accepting"`
		AcceptedBy []acceptance `json:"accepted_by"`
	} `json:"tainted"`
	Reissue *struct {
		Holding int      `json:"holding"`
		By      []string `json:"holding_agents"`
	} `json:"reissue"`
}

// acceptance is what of a cluster accepts what is forged.
type acceptance struct {
	Cluster string `json:"cluster"`
	Bundle  bool   `json:"bundle"`
	Agents  int    `json:"agents"`
}

// status asks for it; the command must say by its exit status whether a forged certificate is accepted.
func (r *rotating) status(ctx context.Context, c *cluster) (s standing, err error) {
	out, err := r.Run(ctx, "rotation", "status", "--config", c.Config(), "-o", "json")
	var exit *lab.CommandError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode != 1) {
		return s, err
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return s, fmt.Errorf("rotation status of %s: %w", c.Name, err)
	}
	if len(s.Clusters) != 2 {
		return s, fmt.Errorf("rotation status of %s shows %d clusters, not 2", c.Name, len(s.Clusters))
	}
	if accepted := s.accepting() > 0; accepted != (exit != nil) {
		return s, fmt.Errorf("rotation status of %s ends with %v, and says that %d accept a forged certificate", c.Name, err, s.accepting())
	}
	return s, nil
}

func (s standing) acceptedBy() (all []acceptance) {
	for _, t := range s.Tainted {
		all = append(all, t.AcceptedBy...)
	}
	return all
}

func (s standing) accepting() (n int) {
	for _, t := range s.Tainted {
		n += t.Accepting
	}
	return n
}

func (r *rotating) removeA(ctx context.Context) (string, error) {
	began := time.Now()
	if err := r.removedAndRefused(ctx, r.a, r.b, r.underA); err != nil {
		return "", err
	}
	return fmt.Sprintf("after %.1f s, when the last leaf under it was over; a certificate under it, accepted before, is refused by all four Envoys", time.Since(began).Seconds()), nil
}

// removedAndRefused waits until a root is gone, and what was made under it before is refused.
func (r *rotating) removedAndRefused(ctx context.Context, old, stays *root, made stolen) error {
	if err := r.removed(ctx, old, stays); err != nil {
		return err
	}
	if err := lab.Until(ctx, "certificates under "+old.name+" are refused", 20*time.Second, func() error { return r.everyEnvoy(ctx, made, false) }); err != nil {
		return err
	}
	r.refused += len(r.sidecars())
	return nil
}

func (r *rotating) replaceB(ctx context.Context) (_ string, err error) {
	if r.c, err = r.makeRoot(ctx, "C", "root-c"); err != nil {
		return "", err
	}
	return r.replaceBy(ctx, r.c)
}

// replaceBy replaces the root in both clusters.
func (r *rotating) replaceBy(ctx context.Context, next *root) (string, error) {
	for _, c := range r.clusters() {
		if _, err := r.startRotation(ctx, c, next, replaceRoot(next)...); err != nil {
			return "", err
		}
	}
	return r.switchTo(ctx, next)
}

func (r *rotating) endLoad(ctx context.Context) (string, error) {
	r.stopLoad()
	if err := r.unharmed(); err != nil {
		return "", err
	}
	for _, w := range r.ways {
		if w.perConnection > 0 {
			continue
		}
		made, err := w.from.envoy.Stat(ctx, connectionsMade)
		if err != nil {
			return "", err
		}
		if made != r.held[w.from] {
			return "", fmt.Errorf("the connection from %s was held open, and yet there were %d new ones", w, made-r.held[w.from])
		}
	}
	return fmt.Sprintf("%d requests of honest workloads, 0 failed; the connections held open are those of the beginning", r.requests()), nil
}

func (r *rotating) prove(ctx context.Context) (string, error) {
	for _, c := range r.clusters() {
		if _, err := r.Run(ctx, "log", "verify", "--config", c.Config()); err != nil {
			return "", err
		}
		for _, cert := range r.thief.certs {
			if _, err := r.Refuses(ctx, "log", "prove", "--config", c.Config(), "--serial", cert.Leaf.SerialNumber.Text(16)); err != nil {
				return "", fmt.Errorf("a forged certificate: %w", err)
			}
		}
	}
	seen, err := r.demo.prove(ctx)
	return "both verify; " + seen + ", and the forged certificates are in none", err
}
