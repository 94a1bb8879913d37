//go:build real

package e2e

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/test/lab"
)

// quick makes seconds of what is days elsewhere.
const quick = `leaf: { ttl: 6s, max_ttl: 6s, backdate: 1s }
rotation: { skew: 1s, report_life: 3s }
`

// lingering is quick, but that what is retired stays for a while, long enough to be turned back to on a busy machine: there might be
// leaves under it that live so long.
const lingering = `leaf: { ttl: 6s, max_ttl: 30s, backdate: 1s }
rotation: { skew: 1s, report_life: 3s }
`

// offlineRoot is a root in a folder of its own.
type offlineRoot struct {
	dir, id, fingerprint string
	cert                 *x509.Certificate
}

func (r offlineRoot) pem(w *world) string { return w.path(r.dir, "root.pem") }

// root takes in a root that was made in a folder.
func (w *world) root(t *testing.T, dir, fingerprint string) offlineRoot {
	t.Helper()
	cert := readCerts(t, w.path(dir, "root.pem"))[0]
	sum := sha256.Sum256(cert.Raw)
	return offlineRoot{dir, rotation.RootID(sum[:]), fingerprint, cert}
}

func (w *world) firstRoot(t *testing.T) offlineRoot {
	t.Helper()
	return w.root(t, "root", w.RootFingerprint)
}

func (w *world) makeRoot(t *testing.T, dir string) offlineRoot {
	t.Helper()
	fingerprint, err := w.MakeRootIn(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return w.root(t, dir, fingerprint)
}

// mover is a CA as `ca list` shows it.
type mover struct {
	ID       string     `json:"id"`
	Kind     string     `json:"kind"`
	Root     string     `json:"root"`
	State    string     `json:"state"`
	Signing  bool       `json:"signing"`
	NotAfter *time.Time `json:"not_after"`
	Leaving  *time.Time `json:"leaving"`
	Tainted  *time.Time `json:"tainted"`
}

// authorities asks until it is told: the server may be down for a moment.
func (w *world) authorities(ctx context.Context, c *lab.Cluster) (map[string]mover, error) {
	var list []mover
	if err := w.JSON(ctx, &list, "ca", "list", "--config", c.Config()); err != nil {
		return nil, err
	}
	all := map[string]mover{}
	for _, a := range list {
		all[a.ID] = a
	}
	return all, nil
}

// until waits for something to come about by itself.
func until(t *testing.T, what string, limit time.Duration, ok func() error) {
	t.Helper()
	if err := lab.Until(t.Context(), what, limit, ok); err != nil {
		t.Fatal(err)
	}
}

// are is nil when the CAs of a cluster are in these states, given as "id state" words; "retired|removed" is either.
func (w *world) are(ctx context.Context, c *lab.Cluster, want ...string) error {
	all, err := w.authorities(ctx, c)
	if err != nil {
		return err
	}
	for i := 0; i < len(want); i += 2 {
		if got := all[want[i]].State; !slices.Contains(strings.Split(want[i+1], "|"), got) {
			return fmt.Errorf("%s's %s is %q, not %s", c.Name, want[i], got, want[i+1])
		}
	}
	return nil
}

func (w *world) untilAre(t *testing.T, c *lab.Cluster, want ...string) {
	t.Helper()
	until(t, strings.Join(want, " "), 4*time.Minute, func() error { return w.are(t.Context(), c, want...) })
}

// ask asks for a request, and returns its file and the fingerprints of its keys.
func (w *world) ask(t *testing.T, c *lab.Cluster, start ...string) (csr string, keys []string) {
	t.Helper()
	csr = w.fresh(c.Name, "csr")
	out := w.must(t, append([]string{"rotation", "start", "--config", c.Config(), "--csr-out", csr}, start...)...)
	return csr, strings.Fields(out)
}

// fresh is the path of a file that is not there yet.
func (w *world) fresh(cluster, kind string) string {
	for n := 1; ; n++ {
		path := w.path(cluster, fmt.Sprintf("%s-%d.pem", kind, n))
		if _, err := os.Lstat(path); err != nil {
			return path
		}
	}
}

// startRoot are the words that start a rotation to a root.
func (w *world) startRoot(r offlineRoot) []string {
	return []string{"root", "--root", r.pem(w), "--fingerprint", r.fingerprint}
}

// sign is the ceremony of a root for requests of a cluster; it returns the file with the chains.
func (w *world) sign(t *testing.T, c *lab.Cluster, r offlineRoot, csr string, keys []string, more ...string) (chain string) {
	t.Helper()
	chain = w.fresh(c.Name, "chain")
	args := []string{"root", "sign", "--dir", r.dir, "--passphrase-file", r.dir + ".pass", "--cluster", c.Name, "--csr", csr, "--out", chain}
	for _, k := range keys {
		args = append(args, "--fingerprint", k)
	}
	w.must(t, append(args, more...)...)
	return chain
}

func (w *world) installing(c *lab.Cluster, r offlineRoot, chain string, more ...string) []string {
	return append([]string{"cluster", "install", "--config", c.Config(), "--chain", chain, "--root-fingerprint", r.fingerprint}, more...)
}

// rotate starts a rotation, has the request signed and installs the chain.
func (w *world) rotate(t *testing.T, c *lab.Cluster, under offlineRoot, start ...string) (chain string) {
	t.Helper()
	csr, keys := w.ask(t, c, start...)
	chain = w.sign(t, c, under, csr, keys)
	w.must(t, w.installing(c, under, chain)...)
	return chain
}

// step is what comes next.
type step struct {
	Authority string `json:"authority"`
	To        string `json:"to"`
	Because   string `json:"because"`
	Waits     []struct {
		Code    string    `json:"code"`
		For     string    `json:"for"`
		Until   time.Time `json:"until"`
		Missing []string  `json:"missing"`
	} `json:"waits"`
}

type standing struct {
	Next     []step `json:"next"`
	Clusters []struct {
		Cluster string `json:"cluster"`
		Roots   []struct {
			ID         string `json:"id"`
			Trusting   int    `json:"trusting"`
			Validators int    `json:"validators"`
		} `json:"roots"`
	} `json:"clusters"`
}

func (w *world) status(t *testing.T, c *lab.Cluster) (s standing) {
	t.Helper()
	if err := json.Unmarshal([]byte(w.must(t, "rotation", "status", "--config", c.Config(), "-o", "json")), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// trusting says how many agents of the cluster itself believe a root, of how many.
func (s standing) trusting(root string) (n, of int) {
	for _, r := range s.Clusters[0].Roots {
		if r.ID == root {
			return r.Trusting, r.Validators
		}
	}
	return 0, 0
}

// workload is what an agent gives to this process: a certificate with its key, and what it believes.
type workload struct {
	cert   tls.Certificate
	chain  []*x509.Certificate
	bundle []*x509.Certificate
}

// fetch gets it from the socket of an agent.
func (w *world) fetch(socket string) (*workload, error) {
	dir, err := os.MkdirTemp(w.Dir, "fetched")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if _, err := w.Run(context.Background(), "svid", "fetch", "--socket", socket, "--write", dir, "--timeout", "5s"); err != nil {
		return nil, err
	}
	x := &workload{}
	if x.cert, err = tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem")); err != nil {
		return nil, err
	}
	for _, der := range x.cert.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		x.chain = append(x.chain, cert)
	}
	text, err := os.ReadFile(filepath.Join(dir, "bundle.pem"))
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		x.bundle = append(x.bundle, cert)
	}
	return x, nil
}

// believes is nil when what the workload believes bears the other's certificate, for as long as that lives.
func (x *workload) believes(y *workload) error {
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range x.bundle {
		roots.AddCert(r)
	}
	for _, c := range y.chain[1:] {
		between.AddCert(c)
	}
	_, err := y.chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: y.chain[0].NotAfter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err
}

// under is nil when the agent at the socket gives certificates under the root.
func (w *world) under(socket string, r offlineRoot) error {
	x, err := w.fetch(socket)
	if err != nil {
		return err
	}
	if err := x.chain[len(x.chain)-1].CheckSignatureFrom(r.cert); err != nil {
		return fmt.Errorf("the certificate is not under %s: %w", r.id, err)
	}
	if !slices.ContainsFunc(x.bundle, r.cert.Equal) {
		return fmt.Errorf("the bundle does not hold %s", r.id)
	}
	return nil
}

// alone is nil when the agent at the socket gives certificates under the root, and nothing else to believe. It hears that a root is
// removed a moment after that is so.
func (w *world) alone(socket string, r offlineRoot) error {
	x, err := w.fetch(socket)
	if err == nil && len(x.bundle) != 1 {
		err = fmt.Errorf("%d roots are believed", len(x.bundle))
	}
	return errors.Join(err, w.under(socket, r))
}

// web is a registration that this process meets at the agents of the given names.
func web(agents ...string) string {
	return "registrations:\n  - { name: web, spiffe_id: spiffe://example.org/web, agents: [" + strings.Join(agents, ", ") + "], selectors: ['unix:uid:" + uid() + "'] }\n"
}

// entry is what `log find` shows of one.
type entry struct {
	Index  uint64 `json:"index"`
	Kind   string `json:"kind"`
	Proven bool   `json:"proven"`
}

// logged finds all entries of a cluster's log, each with its proof.
func (w *world) logged(t *testing.T, c *lab.Cluster, more ...string) (entries []entry) {
	t.Helper()
	w.untilLogged(t, c)
	w.must(t, "log", "verify", "--config", c.Config())
	args := append([]string{"log", "find", "--config", c.Config(), "--limit", "0", "--prove", "-o", "json"}, more...)
	if err := json.Unmarshal([]byte(w.must(t, args...)), &entries); err != nil {
		t.Fatal(err)
	}
	if len(entries) == 0 {
		t.Error("the log holds nothing of that")
	}
	for _, e := range entries {
		if !e.Proven {
			t.Errorf("entry %d is not proven", e.Index)
		}
	}
	return entries
}

// moves are the moves of CAs as a cluster's log has them, the newest first.
func (w *world) moves(t *testing.T, c *lab.Cluster) (text string) {
	t.Helper()
	for _, e := range w.logged(t, c, "--kind", "authority-changed") {
		text += w.must(t, "log", "show", strconv.FormatUint(e.Index, 10), "--config", c.Config(), "-o", "json")
	}
	return text
}

func TestAnAgentThatIsCutOffIsNamedThenForcedThenComesBack(t *testing.T) {
	t.Parallel() // it mostly waits
	w := newWorld(t, quick)
	w.serve(t)
	w.apply(t, web("node-1", "node-2"))
	one, two := w.agent(t, "node-1"), w.agent(t, "node-2")
	a, b := w.firstRoot(t), w.makeRoot(t, "root-b")
	for _, x := range []*lab.Agent{one, two} {
		until(t, "certificates under the first root", time.Minute, func() error { return w.under(x.Socket, a) })
	}
	if err := two.Halt(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = two.Resume() }()
	w.rotate(t, w.east, b, w.startRoot(b)...)
	until(t, "node-1 has the new root", time.Minute, func() error {
		if n, of := w.status(t, w.east).trusting(b.id); n != 1 || of != 2 {
			return fmt.Errorf("%d of %d have it", n, of)
		}
		return nil
	})
	refused := w.run(t, "rotation", "advance", "--config", w.east.Config(), b.id)
	if said := strings.Join(strings.Fields(refused.err), " "); refused.code != 1 || !strings.Contains(said, "1 of 2 agents of this cluster have it; 1 more must acknowledge: node-2") {
		t.Errorf("want a refusal that names node-2: %v", refused)
	}
	dry := w.run(t, "rotation", "advance", "--config", w.east.Config(), b.id, "--force", "--dry-run")
	breaks := "1 of 2 agents of this cluster have it; 1 more must acknowledge: the workloads of node-2 refuse peers that have a certificate under " + b.id
	if said := strings.Join(strings.Fields(dry.err), " "); dry.code != 0 || !strings.Contains(said, "forced: "+breaks) {
		t.Errorf("a dry run of force does not say what it breaks: %v", dry)
	}
	if err := w.are(t.Context(), w.east, "intermediate-1", "active", b.id, "published"); err != nil {
		t.Error(err)
	}
	forced := w.run(t, "rotation", "advance", "--config", w.east.Config(), b.id, "--force")
	if said := strings.Join(strings.Fields(forced.err), " "); forced.code != 0 || !strings.Contains(said, "forced: "+breaks) {
		t.Errorf("force does not say what it breaks: %v", forced)
	}
	// What is signed next would be refused by node-2 as well: that is a wait of its own.
	until(t, "the switch", time.Minute, func() error {
		w.run(t, "rotation", "advance", "--config", w.east.Config(), "intermediate-2", "--force")
		return w.are(t.Context(), w.east, "intermediate-2", "active", "intermediate-1", "retired|removed")
	})
	until(t, "certificates under the new root", time.Minute, func() error { return w.under(one.Socket, b) })
	if said := w.moves(t, w.east); !strings.Contains(said, breaks) {
		t.Errorf("the log does not say what was overridden:\n%s", said)
	}
	if err := two.Resume(); err != nil {
		t.Fatal(err)
	}
	until(t, "node-2 is as the others right after it is back", time.Minute, func() error { return w.under(two.Socket, b) })
	until(t, "both believe the new root", time.Minute, func() error {
		if n, of := w.status(t, w.east).trusting(b.id); n != 2 || of != 2 {
			return fmt.Errorf("%d of %d have it", n, of)
		}
		return nil
	})
	w.untilAre(t, w.east, a.id, "removed", "intermediate-1", "removed")
	until(t, "node-2 believes the new root alone", time.Minute, func() error { return w.alone(two.Socket, b) })
	w.logged(t, w.east)
}

func TestSeveralSuccessorsAreSignedInOneCeremony(t *testing.T) {
	t.Parallel() // it mostly waits
	w := newWorld(t, quick)
	w.serve(t)
	a := w.firstRoot(t)
	csr, keys := w.ask(t, w.east, "intermediate", "--successors", "3")
	if len(keys) != 3 {
		t.Fatalf("3 successors have the keys %v", keys)
	}
	again, same := w.ask(t, w.east, "intermediate", "--successors", "3")
	if !slices.Equal(keys, same) {
		t.Errorf("asked twice, the keys are %v and %v (%s)", keys, same, again)
	}
	chains := w.sign(t, w.east, a, csr, keys, "--stagger", "60d", "--life", "90d")
	w.must(t, w.installing(w.east, a, chains)...)
	if out := w.must(t, w.installing(w.east, a, chains)...); out != "unchanged\n" {
		t.Errorf("installed again: %q", out)
	}
	w.untilAre(t, w.east, "intermediate-1", "retired|removed", "intermediate-2", "active", "intermediate-3", "published", "intermediate-4", "published")
	var at []time.Time
	for _, id := range []string{"intermediate-3", "intermediate-4"} {
		for _, s := range w.status(t, w.east).Next {
			if s.Authority == id && s.To == "active" {
				if len(s.Waits) != 1 || s.Waits[0].Code != "time" {
					t.Errorf("%s waits for %+v", id, s.Waits)
					continue
				}
				at = append(at, s.Waits[0].Until)
			}
		}
	}
	if len(at) != 2 || !at[0].After(time.Now().AddDate(0, 0, 59)) || !at[1].After(at[0].AddDate(0, 0, 59)) {
		t.Errorf("the successors take over at %v", at)
	}
	w.untilAre(t, w.east, "intermediate-1", "removed")
}

func TestARootThatIsTooShortIsRefusedAndAnIntermediateEndsWithItsRoot(t *testing.T) {
	t.Parallel() // it mostly waits
	w := newWorld(t, "leaf: { ttl: 1h, max_ttl: 168h }\n")
	w.serve(t)
	made := func(dir, life string) offlineRoot {
		if err := w.Passphrase(dir + ".pass"); err != nil {
			t.Fatal(err)
		}
		out := w.must(t, "root", "init", "--trust-domain", lab.TrustDomain, "--dir", dir, "--passphrase-file", dir+".pass", "--life", life)
		return w.root(t, dir, strings.TrimSpace(out))
	}
	short, b := made("root-short", "3d"), made("root-b", "30d")
	for _, args := range [][]string{
		append([]string{"rotation", "start", "--config", w.east.Config()}, w.startRoot(short)...),
		{"trust", "add", "--config", w.east.Config(), short.pem(w), "--fingerprint", short.fingerprint},
	} {
		w.refuses(t, 1, []string{short.id, "a leaf may live 168h0m0s"}, args...)
	}
	csr, keys := w.ask(t, w.east, w.startRoot(b)...)
	page := w.must(t, "root", "sign", "--dir", b.dir, "--cluster", "east", "--csr", csr, "--fingerprint", keys[0], "--life", "90d", "--dry-run")
	if !strings.Contains(page, "cut short: its root ends then") {
		t.Errorf("the ceremony does not say that the life is cut:\n%s", page)
	}
	chain := w.sign(t, w.east, b, csr, keys, "--life", "90d")
	certs := readCerts(t, chain)
	if !certs[0].NotAfter.Equal(certs[1].NotAfter) {
		t.Errorf("the intermediate ends at %s, its root at %s", certs[0].NotAfter, certs[1].NotAfter)
	}
	w.must(t, w.installing(w.east, b, chain)...)
	w.untilAre(t, w.east, "intermediate-2", "active", b.id, "active")
}

func TestARotationIsTurnedBackFromEveryState(t *testing.T) {
	t.Parallel() // it mostly waits
	w := newWorld(t, lingering)
	w.serve(t)
	w.apply(t, web("node-1"))
	agent := w.agent(t, "node-1")
	a := w.firstRoot(t)
	until(t, "a certificate", time.Minute, func() error { return w.under(agent.Socket, a) })
	abort := func(id string, more ...string) {
		t.Helper()
		args := append([]string{"rotation", "abort", "--config", w.east.Config(), id}, more...)
		w.must(t, append(args, "--dry-run")...)
		w.must(t, args...)
	}
	stands := func(t *testing.T, want ...string) {
		t.Helper()
		w.untilAre(t, w.east, want...)
		until(t, "certificates under the first root", time.Minute, func() error { return w.under(agent.Socket, a) })
	}
	t.Run("intermediate, prepared", func(t *testing.T) {
		w.ask(t, w.east, "intermediate")
		abort("intermediate-2")
		stands(t, "intermediate-1", "active", "intermediate-2", "removed")
		w.run(t, "rotation", "abort", "--config", w.east.Config(), "intermediate-2").refused(t, 1, "intermediate-2", "nothing to abort")
	})
	t.Run("intermediate, active and published", func(t *testing.T) {
		csr, keys := w.ask(t, w.east, "intermediate", "--successors", "2")
		w.must(t, w.installing(w.east, a, w.sign(t, w.east, a, csr, keys, "--stagger", "60d"))...)
		stands(t, "intermediate-1", "retired", "intermediate-3", "active", "intermediate-4", "published")
		abort("intermediate-3")
		stands(t, "intermediate-1", "active")
		abort("intermediate-4")
		stands(t, "intermediate-1", "active", "intermediate-4", "removed")
		stands(t, "intermediate-3", "removed") // when its last leaf is over
	})
	b := w.makeRoot(t, "root-b")
	t.Run("root, published", func(t *testing.T) {
		if err := agent.Halt(t.Context()); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = agent.Resume() }()
		w.ask(t, w.east, w.startRoot(b)...)
		if err := w.are(t.Context(), w.east, a.id, "active", b.id, "published", "intermediate-5", "prepared"); err != nil {
			t.Error(err)
		}
		abort(b.id)
		w.untilAre(t, w.east, a.id, "active", "intermediate-1", "active", b.id, "removed")
	})
	t.Run("root, active, then the one that was leaving", func(t *testing.T) {
		w.ask(t, w.east, w.startRoot(b)...)
		stands(t, b.id, "active", "intermediate-1", "active")
		all, err := w.authorities(t.Context(), w.east)
		if err != nil || all[a.id].Leaving == nil {
			t.Fatalf("%v: the old root is not leaving: %+v", err, all[a.id])
		}
		abort(a.id) // its leaving is what is aborted: both stay
		all, err = w.authorities(t.Context(), w.east)
		if err != nil || all[a.id].Leaving != nil || all[b.id].Leaving != nil {
			t.Errorf("%v: %+v", err, all)
		}
		abort(b.id)
		stands(t, a.id, "active", b.id, "removed", "intermediate-1", "active")
	})
	t.Run("root, signing", func(t *testing.T) {
		c := w.makeRoot(t, "root-c")
		w.rotate(t, w.east, c, w.startRoot(c)...)
		w.untilAre(t, w.east, c.id, "active", a.id, "retired", "intermediate-1", "retired")
		abort(c.id)
		stands(t, "intermediate-1", "active", a.id, "active")
		stands(t, c.id, "removed") // when its last leaf is over
		w.run(t, "rotation", "abort", "--config", w.east.Config(), c.id).refused(t, 1, c.id, "nothing to abort")
	})
	w.logged(t, w.east)
}
