//go:build real

package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
)

// estate is a lab with engines of its own in the Vault, and a root there.
type estate struct {
	*world
	vault *lab.Vault
	name  string
	root  *lab.VaultRoot
}

func newEstate(t *testing.T, name string) *estate {
	t.Helper()
	v, err := theVault.Get()
	if err != nil {
		t.Fatal(err)
	}
	l, err := lab.New(filepath.Join(scratch, name), signet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Close()
		if !t.Failed() {
			os.RemoveAll(l.Dir)
			return
		}
		logs, _ := filepath.Glob(filepath.Join(l.Dir, "*-server.log"))
		for _, path := range logs {
			text, _ := os.ReadFile(path)
			t.Logf("%s ends with\n%s", filepath.Base(path), text[max(0, len(text)-3000):])
		}
	})
	for _, engine := range []string{"pki", "transit", "kv"} {
		if err := v.Mount(t.Context(), engine+"-"+name, engine); err != nil {
			t.Fatal(err)
		}
	}
	e := &estate{world: &world{Lab: l}, vault: v, name: name}
	e.root = e.newRoot(t, "root-1")
	l.RootFingerprint = ca.CertificateFingerprint(e.root.Certificate.Raw)
	return e
}

// newRoot makes a root in the PKI engine.
func (e *estate) newRoot(t *testing.T, name string) *lab.VaultRoot {
	t.Helper()
	root, err := e.vault.PKIRoot(t.Context(), "pki-"+e.name, name, lab.TrustDomain, 1000*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// holding is a cluster that comes to the Vault through a proxy of its own.
type holding struct {
	*lab.Cluster
	of     *estate
	proxy  *lab.VaultProxy
	server *lab.Process
	how    how
}

// how a cluster is set up.
type how struct {
	// keys of intermediates, by default in memory.
	keys string
	// path in KV, by default that of all in the estate.
	path string
	// login is the block of that name, by default by AppRole; role is whose policy is written, by default that of the login.
	login, role string
	// ttl of leaves and their greatest, by default an hour.
	ttl time.Duration
	// timeout of a call to Vault, by default 3 s.
	timeout time.Duration
	// peers is in the block rotation.
	peers string
	// direct goes past the proxy.
	direct bool
}

// cluster makes a cluster that has a policy, and has begun.
func (e *estate) cluster(t *testing.T, name string, h how) *holding {
	t.Helper()
	c, err := e.NewCluster(name, "")
	if err != nil {
		t.Fatal(err)
	}
	x := e.hold(t, c, h)
	until(t, "cluster "+name+" is made", time.Minute, func() error { // its calls to Vault have the usual timeout
		_, err := e.Run(t.Context(), "cluster", "init", "--config", x.Config(), "--root-fingerprint", e.RootFingerprint)
		if err != nil && strings.Contains(err.Error(), "the login is refused") {
			x.secret(t)
		}
		return err
	})
	return x
}

// secret gives a cluster another secret-id. Vault tidies them up each minute, and takes one that is being made for a leftover
// (vault 1.21, builtin/credential/approle/path_tidy_user_id.go: accessors are listed before the roles).
func (x *holding) secret(t *testing.T) {
	t.Helper()
	secret, err := x.of.vault.SecretID(t.Context(), x.how.role, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	x.of.write(t, x.Name+"/secret-id", secret+"\n")
}

// hold configures a cluster, and lets it in.
func (e *estate) hold(t *testing.T, c *lab.Cluster, h how) *holding {
	t.Helper()
	p, err := e.vault.Proxy()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	x := &holding{Cluster: c, of: e, proxy: p, how: h}
	if x.how.login == "" {
		role := e.name + "-" + c.Name
		id, err := e.vault.AppRole(t.Context(), role, lab.VaultLife{Policies: []string{role}, TTL: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		x.how.login, x.how.role = fmt.Sprintf("{ method: approle, role_id: %s, secret_id_file: ./secret-id }", id), role
		x.secret(t)
	}
	x.configure(t)
	return x
}

// usualTimeout of a call to Vault.
const usualTimeout = 3 * time.Second

// configure writes configuration and policy.
func (x *holding) configure(t *testing.T) {
	t.Helper()
	e, h := x.of, x.how
	keys, path, ttl, timeout, address := "memory", "", time.Hour, usualTimeout, x.proxy.Address
	if h.direct {
		address = e.vault.Address
	}
	if h.keys != "" {
		keys = h.keys
	}
	if h.path != "" {
		path = ", path: " + h.path
	}
	if h.ttl != 0 {
		ttl = h.ttl
	}
	if h.timeout != 0 {
		timeout = h.timeout
	}
	x.Keystore = fmt.Sprintf("  intermediates: %s\n  transit: { mount: transit-%s }\n", keys, e.name)
	if err := x.Configure(fmt.Sprintf(`vault:
  address: %[1]s
  ca_file: %[2]s
  timeout: %[8]s
  login: %[3]s
upstream: { vault_pki: { mount: pki-%[4]s, issuer: root-1, life: 24h } }
trust: { vault_kv: { mount: kv-%[4]s%[5]s } }
leaf: { ttl: %[6]s, max_ttl: %[6]s, backdate: 1s }
logging: { level: debug }
rotation:
  skew: 1s
  report_life: 4s
%[7]s`, address, e.vault.CAFile, h.login, e.name, path, ttl, h.peers, timeout)); err != nil {
		t.Fatal(err)
	}
	if err := e.vault.Policy(t.Context(), h.role, e.must(t, "config", "vault-policy", "--config", x.Config())); err != nil {
		t.Fatal(err)
	}
}

// begin starts the server; it may not be ready yet.
func (x *holding) begin(t *testing.T) {
	t.Helper()
	p, err := x.of.Start(x.Name+"-server", "serve", "--config", x.Config())
	if err != nil {
		t.Fatal(err)
	}
	x.server = p
}

// serve starts the server and waits until it issues.
func (x *holding) serve(t *testing.T) {
	t.Helper()
	x.begin(t)
	x.ready(t)
}

func (x *holding) ready(t *testing.T) {
	t.Helper()
	until(t, x.Name+" is ready", 3*time.Minute, func() error {
		s, err := x.health(t.Context())
		if err == nil && !s.Ready {
			err = fmt.Errorf("%+v", s.Findings)
		}
		return err
	})
}

// health is what a server says of itself.
type health struct {
	Ready    bool            `json:"ready"`
	Findings []check.Finding `json:"findings"`
}

// worse are the findings that are not ok.
func (s health) worse() (all []check.Finding) {
	for _, f := range s.Findings {
		if f.Level != check.OK {
			all = append(all, f)
		}
	}
	return all
}

func (x *holding) health(ctx context.Context) (s health, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+x.HTTP+"/readyz", nil)
	if err != nil {
		return s, err
	}
	request.Header.Set("Accept", "application/json")
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return s, err
	}
	defer answer.Body.Close()
	return s, json.NewDecoder(answer.Body).Decode(&s)
}

// lives is nil when liveness is green.
func (x *holding) lives(ctx context.Context) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+x.HTTP+"/livez", nil)
	if err != nil {
		return err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("/livez answers %s", answer.Status)
	}
	return nil
}

// aboutVault are the codes of what depends on it.
var aboutVault = []string{check.CodeVault, check.CodePolicy, check.CodeUpstream, check.CodeShared, check.CodeKey}

// impaired waits until the server finds something of Vault that is not ok and that is as wanted.
func (x *holding) impaired(t *testing.T, what string, is func(check.Finding) bool) check.Finding {
	t.Helper()
	var found check.Finding
	until(t, x.Name+" says what is wrong: "+what, time.Minute, func() error {
		s, err := x.health(t.Context())
		if err != nil {
			return err
		}
		for _, f := range s.worse() {
			if slices.Contains(aboutVault, f.Code) && is(f) {
				found = f
				return nil
			}
		}
		return fmt.Errorf("it finds %+v", s.Findings)
	})
	return found
}

// mended waits until nothing of Vault is found any more.
func (x *holding) mended(t *testing.T, meanwhile ...func()) {
	t.Helper()
	until(t, x.Name+" misses nothing", 3*time.Minute, func() error {
		for _, do := range meanwhile {
			do()
		}
		s, err := x.health(t.Context())
		if err != nil {
			return err
		}
		for _, f := range s.worse() {
			if slices.Contains(aboutVault, f.Code) {
				return fmt.Errorf("it finds %+v", f)
			}
		}
		if !s.Ready {
			return fmt.Errorf("it is not ready: %+v", s.Findings)
		}
		return nil
	})
}

// signer is the intermediate that signs.
func (x *holding) signer(ctx context.Context) (mover, error) {
	all, err := x.of.authorities(ctx, x.Cluster)
	if err != nil {
		return mover{}, err
	}
	for _, a := range all {
		if a.Kind == ca.KindIntermediate && a.Signing {
			return a, nil
		}
	}
	return mover{}, fmt.Errorf("nobody signs in %s: %+v", x.Name, all)
}

// followed waits until another intermediate signs. What was refused for long is asked again after up to 90 s.
func (x *holding) followed(t *testing.T, before string, meanwhile ...func()) mover {
	t.Helper()
	var next mover
	until(t, "another intermediate follows "+before+" in "+x.Name, 3*time.Minute, func() (err error) {
		for _, do := range meanwhile {
			do()
		}
		if next, err = x.signer(t.Context()); err == nil && next.ID == before {
			err = errors.New(before + " still signs")
		}
		return err
	})
	return next
}

// rotate asks for another intermediate, for which Vault is needed.
func (x *holding) rotate(t *testing.T) (before string) {
	t.Helper()
	now, err := x.signer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	x.of.must(t, "rotation", "start", "--config", x.Config(), "intermediate")
	return now.ID
}

// stream is a member that asks for certificates all the time.
type stream struct {
	given ledger
	// stop ends it, once or more.
	stop func()

	mu     sync.Mutex
	failed []error
	took   []time.Duration
}

// patience is how long a call may take before it counts as failed: more than Vault's time and that of a signature.
const patience = 4 * usualTimeout

// issuing starts a stream, which ends with the test.
func (x *holding) issuing(t *testing.T) *stream {
	t.Helper()
	if err := x.Apply(t.Context(), "registrations:\n  - { name: web, spiffe_id: spiffe://example.org/web, agents: [node-1], selectors: ['unix:uid:1'] }\n"); err != nil {
		t.Fatal(err)
	}
	m, err := x.Member(t.Context(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := m.Dial(x.Agents, m.ControlCA)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := doors.CSR(newKey(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var work sync.WaitGroup
	s := &stream{stop: func() { stop(); work.Wait(); conn.Close() }}
	work.Go(func() {
		for ctx.Err() == nil {
			one, cancel := context.WithTimeout(ctx, patience)
			began := time.Now()
			got, err := doors.Issue(one, conn, "web", []string{"unix:uid:1"}, csr)
			cancel()
			took := time.Since(began)
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				s.given.add(t, got.Chain[0])
			}
			s.note(took, err)
			time.Sleep(10 * time.Millisecond) // the machine has other work
		}
	})
	t.Cleanup(s.stop)
	return s
}

func (s *stream) note(took time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.took = append(s.took, took)
	if err != nil {
		s.failed = append(s.failed, err)
	}
}

// since returns what has happened since the last time, and begins anew.
func (s *stream) since() (took []time.Duration, failed []error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	took, failed = s.took, s.failed
	s.took, s.failed = nil, nil
	return took, failed
}

// unharmed checks that the stream went on without a failure, and that nothing of it waited for Vault.
func (s *stream) unharmed(t *testing.T, when string) {
	t.Helper()
	until(t, "certificates "+when, time.Minute, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.took) < 20 {
			return fmt.Errorf("%d answers, failed %v", len(s.took), s.failed)
		}
		return nil
	})
	took, failed := s.since()
	if len(failed) > 0 {
		t.Errorf("%s %d of %d issues failed: %v", when, len(failed), len(took), failed[0])
	}
	slices.Sort(took)
	// One call to a Vault that hangs takes all of its time.
	if usual := took[len(took)/2]; usual > usualTimeout/2 {
		t.Errorf("%s half of %d issues took longer than %s", when, len(took), usual)
	}
	t.Logf("%s: %d issued, median %s, slowest %s", when, len(took), took[len(took)/2].Round(time.Microsecond), took[len(took)-1].Round(time.Millisecond))
}

// fault is a bad day of Vault's.
type fault struct {
	name string
	lab.Fault
	// says is in what the server finds.
	says []string
}

func rewritten(text string) lab.Fault {
	return lab.Fault{Rewritten: func([]byte) []byte { return []byte(text) }}
}

// badDays are in groups, of which each takes about as long.
var badDays = [][]fault{
	{
		{"hangs", lab.Fault{Hang: true}, []string{"no answer within"}},
		{"answers 400", lab.Fault{Status: 400, Errors: []string{"what is this"}}, []string{"what is this"}},
		{"answers 403", lab.Fault{Status: 403, Errors: []string{"permission denied"}}, []string{"permission denied"}},
	}, {
		{"answers 500", lab.Fault{Status: 500, Errors: []string{"internal error"}}, []string{"internal error"}},
		{"answers 429", lab.Fault{Status: 429, Errors: []string{"request path: rate limit quota exceeded"}}, []string{"too many requests"}},
		{"cuts its answers", lab.Fault{Cut: true}, []string{"not reachable"}},
	}, {
		{"answers 503", lab.Fault{Status: 503, Errors: []string{"Vault is sealed"}}, []string{"Vault is sealed"}},
		{"answers 404", lab.Fault{Status: 404}, nil},
		{"swaps its answers", lab.Fault{Swapped: true}, nil},
	}, {
		{"answers too much", lab.Fault{Oversized: 4 << 20}, []string{"larger than 1 MiB"}},
		{"answers in HTML", rewritten("<html>welcome</html>"), []string{"not Vault's JSON"}},
		{"answers nothing", rewritten("{}"), nil},
	},
}

// endure lets a bad day come over a server with its key in memory, and go.
func (x *holding) endure(t *testing.T, s *stream, f fault) {
	t.Helper()
	when := "while Vault " + f.name
	s.since()
	x.proxy.Set("*", f.Fault)
	before := x.rotate(t)
	found := x.impaired(t, f.name, func(g check.Finding) bool {
		for _, word := range f.says {
			if !strings.Contains(g.Message, word) {
				return false
			}
		}
		return true
	})
	h, err := x.health(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !h.Ready {
		t.Errorf("%s a server that can issue is not ready: %+v", when, h.worse())
	}
	if err := x.lives(t.Context()); err != nil {
		t.Errorf("%s: %v", when, err)
	}
	// Where answers are swapped it comes and goes: one that is swapped for its like is none.
	until(t, when+" check says what the server finds", time.Minute, func() error {
		if r := x.of.run(t, "check", "--config", x.Config()); !strings.Contains(r.out, found.Code) {
			return fmt.Errorf("%+v: %v", found, r)
		}
		return nil
	})
	for _, g := range h.worse() {
		if (g.Code == check.CodeUpstream || g.About == "vault-pki") && !saysUntil(g.Message) {
			t.Errorf("%s it is not said until when that does no harm: %+v", when, g)
		}
	}
	s.unharmed(t, when)
	if now, err := x.signer(t.Context()); err != nil || now.ID != before {
		t.Errorf("%s %+v signs: %v", when, now, err)
	}
	x.proxy.Clear()
	began := time.Now()
	x.followed(t, before)
	x.mended(t)
	t.Logf("%q mended after %s", f.name, time.Since(began).Round(10*time.Millisecond))
	s.unharmed(t, "after Vault "+f.name)
}

// saysUntil looks for a time that is after now.
func saysUntil(text string) bool {
	for word := range strings.FieldsSeq(text) {
		at, err := time.Parse(time.RFC3339, strings.Trim(word, ",;:.()"))
		if err == nil && at.After(time.Now()) {
			return true
		}
	}
	return false
}

// TestABadDayOfVaultCostsNoIssue has each kind of failure between a server that has its intermediate in memory and its Vault,
// while that is needed for the next one.
func TestABadDayOfVaultCostsNoIssue(t *testing.T) {
	for i, days := range badDays {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			x := newEstate(t, fmt.Sprintf("bad%d", i)).cluster(t, "east", how{})
			x.serve(t)
			s := x.issuing(t)
			x.mended(t)
			for _, f := range days {
				x.endure(t, s, f)
			}
			x.proves(t, s)
		})
	}
}

// TestAVaultThatIsKilledAndSealedStopsOnlyWhatNeedsIt ends it as a power cut does, then seals it, for a server with its
// intermediate in memory and for one that has it in Transit.
func TestAVaultThatIsKilledAndSealedStopsOnlyWhatNeedsIt(t *testing.T) {
	e := newEstate(t, "dead")
	east := e.cluster(t, "east", how{direct: true})
	west := e.cluster(t, "west", how{direct: true, keys: "vault-transit", path: "west"})
	streams := map[*holding]*stream{}
	for _, x := range []*holding{east, west} {
		x.begin(t)
	}
	for _, x := range []*holding{east, west} {
		x.ready(t)
		streams[x] = x.issuing(t)
		x.mended(t)
	}
	// Whatever happens, the next test has a Vault.
	away := func() error { return nil }
	back := func() {
		if err := away(); err != nil {
			t.Fatal(err)
		}
		away = func() error { return nil }
	}
	defer back()
	for _, day := range []struct {
		name, says string
		begin, end func() error
	}{
		{"is dead", "not reachable", func() error { e.vault.Kill(); return nil }, func() error {
			return errors.Join(e.vault.Start(context.Background()), e.vault.Unseal(context.Background()))
		}},
		{"is sealed", "Vault is sealed", func() error { return e.vault.Seal(t.Context()) }, func() error { return e.vault.Unseal(context.Background()) }},
	} {
		when := "while Vault " + day.name
		streams[east].since()
		away = day.end
		if err := day.begin(); err != nil {
			t.Fatal(err)
		}
		before := east.rotate(t)
		found := east.impaired(t, day.name, func(f check.Finding) bool { return f.About == "vault-pki" && strings.Contains(f.Message, day.says) })
		if !saysUntil(found.Message) {
			t.Errorf("%s it is not said until when that does no harm: %+v", when, found)
		}
		west.stopped(t, streams[west], when, true)
		for _, x := range []*holding{east, west} {
			if err := x.lives(t.Context()); err != nil {
				t.Errorf("%s, %s: %v", when, x.Name, err)
			}
			h, err := x.health(t.Context())
			if err != nil || h.Ready != (x == east) {
				t.Errorf("%s %s is ready: %v, %v", when, x.Name, h.Ready, err)
			}
			r := e.run(t, "check", "--config", x.Config())
			for _, word := range []string{check.CodeVault, "vault-pki", day.says} {
				if !strings.Contains(r.out, word) {
					t.Errorf("%s check does not say %q: %v", when, word, r)
				}
			}
		}
		streams[east].unharmed(t, when)
		back()
		east.followed(t, before)
		west.issuesAgain(t, streams[west])
		east.mended(t)
		west.mended(t)
		streams[east].unharmed(t, "after Vault "+day.name)
	}
	for _, x := range []*holding{east, west} {
		x.proves(t, streams[x])
	}
}

// TestABadDayOfVaultStopsATransitClusterAndNoLonger has failures between a server that has its intermediate in Transit and its
// Vault: no certificate with a wrong signature, no long wait, and no end of it that a person has to bring about.
func TestABadDayOfVaultStopsATransitClusterAndNoLonger(t *testing.T) {
	t.Parallel()
	e := newEstate(t, "badtransit")
	x := e.cluster(t, "east", how{keys: "vault-transit"})
	x.serve(t)
	s := x.issuing(t)
	x.mended(t)
	wrong := lab.Fault{Rewritten: func(body []byte) []byte {
		// The signature of something else, well-formed.
		key := newKey(t)
		sum := sha256.Sum256(body)
		signature, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
		if err != nil {
			t.Error(err)
		}
		var answer map[string]any
		if json.Unmarshal(body, &answer) != nil {
			return body
		}
		if data, _ := answer["data"].(map[string]any); data != nil && data["batch_results"] != nil {
			results, _ := data["batch_results"].([]any)
			for _, r := range results {
				if item, _ := r.(map[string]any); item != nil {
					item["signature"] = "vault:v1:" + base64.StdEncoding.EncodeToString(signature)
				}
			}
		}
		out, _ := json.Marshal(answer)
		return out
	}}
	for _, day := range []struct {
		fault
		// known: then Vault is left alone.
		known bool
	}{
		{fault{"hangs", lab.Fault{Hang: true}, nil}, true},
		{fault{"answers 503", lab.Fault{Status: 503, Errors: []string{"Vault is sealed"}}, nil}, true},
		{fault{"cuts its answers", lab.Fault{Cut: true}, nil}, true},
		{fault{"answers 403", lab.Fault{Status: 403, Errors: []string{"permission denied"}}, nil}, false},
		{fault{"gives wrong signatures", wrong, nil}, false},
	} {
		when := "while Vault " + day.name
		path := "*"
		if day.Rewritten != nil {
			path = "transit-" + e.name + "/sign/*"
		}
		x.proxy.Set(path, day.Fault)
		x.stopped(t, s, when, day.known)
		if err := x.lives(t.Context()); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		x.proxy.Clear()
		began := time.Now()
		x.issuesAgain(t, s)
		x.mended(t)
		t.Logf("%q mended after %s", day.name, time.Since(began).Round(10*time.Millisecond))
	}
	x.proves(t, s)
	under := x509.NewCertPool()
	under.AddCert(x.chainOf(t, "intermediate-1")[0])
	for _, c := range s.given.all() {
		if _, err := c.Verify(x509.VerifyOptions{Roots: under, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Fatal(err)
		}
	}
}

// stopped checks how a server that has its intermediate in Transit does not issue: soon, with a reason, and where it is known
// that Vault is away nothing is logged for what nobody gets.
func (x *holding) stopped(t *testing.T, s *stream, when string, known bool) {
	t.Helper()
	fails := func(what string, atLeast int) []time.Duration {
		t.Helper()
		s.since()
		var took []time.Duration
		var failed []error
		until(t, what, 90*time.Second, func() error {
			more, why := s.since()
			took, failed = append(took, more...), append(failed, why...)
			if len(failed) < atLeast {
				return fmt.Errorf("%d of %d", len(failed), len(took))
			}
			return nil
		})
		for _, err := range failed {
			if !strings.Contains(err.Error(), "sign_failed") { // all that a caller is told; why is in the log
				t.Errorf("%s an issue fails with %v", when, err)
			}
		}
		return took
	}
	fails("no issue "+when, 1)
	found := x.impaired(t, when, func(f check.Finding) bool { return slices.Contains(f.Stops, check.Issuing) })
	t.Logf("%s %s finds %s", when, x.Name, found.Message)
	if !known {
		return
	}
	until(t, "Vault is left alone "+when, 90*time.Second, func() error {
		if text := readFile(t, x.of.path(x.Name+"-server.log")); strings.Count(text, "it is left alone") <= strings.Count(text, ` is back"`) {
			return errors.New("not yet")
		}
		return nil
	})
	before, began := x.metric(t, unreleased), time.Now()
	took := fails("more issues fail "+when, 60)
	slices.Sort(took)
	// Some probe whether it is back.
	if usual := took[len(took)/2]; usual > usualTimeout/2 {
		t.Errorf("%s half of %d issues took longer than %s to fail", when, len(took), usual)
	}
	// One each second at the most.
	if more, within := x.metric(t, unreleased)-before, time.Since(began); int(more) > 5+int(within/time.Second) {
		t.Errorf("%s %v certificates were logged within %s that nobody got", when, more, within)
	}
}

// issuesAgain waits until a stream goes on.
func (x *holding) issuesAgain(t *testing.T, s *stream) {
	t.Helper()
	n := len(s.given.all())
	until(t, x.Name+" issues again", 2*time.Minute, func() error {
		if len(s.given.all()) < n+5 {
			_, failed := s.since()
			return fmt.Errorf("%v", failed)
		}
		return nil
	})
}

// proves ends a stream, and checks that all that was given is in the log, with proof, once, and that the log verifies.
func (x *holding) proves(t *testing.T, s *stream) {
	t.Helper()
	s.stop()
	w := x.of
	w.untilLogged(t, x.Cluster)
	w.must(t, "log", "verify", "--config", x.Config())
	var entries []struct {
		Serial string `json:"serial"`
		Proven bool   `json:"proven"`
	}
	if err := json.Unmarshal([]byte(w.must(t, "log", "find", "--config", x.Config(), "--kind", "certificate-issued", "--limit", "0", "--prove", "-o", "json")), &entries); err != nil {
		t.Fatal(err)
	}
	logged := map[string]int{}
	for _, e := range entries {
		if logged[e.Serial]++; logged[e.Serial] > 1 {
			t.Errorf("serial %s is in the log of %s %d times", e.Serial, x.Name, logged[e.Serial])
		}
		if !e.Proven {
			t.Errorf("the entry of %s is not proven", e.Serial)
		}
	}
	certs := s.given.all()
	if len(certs) == 0 {
		t.Error("no certificate was given")
	}
	missing := 0
	for _, cert := range certs {
		if logged[serialOf(cert)] == 0 {
			missing++
		}
	}
	if missing > 0 {
		t.Errorf("%d of %d certificates that were given are not in the log", missing, len(certs))
	}
}

func serialOf(cert *x509.Certificate) string { return fmt.Sprintf("%x", cert.SerialNumber.Bytes()) }

// unreleased counts certificates that are in the log and were never made.
const unreleased = "signet_logged_not_released_total"

func (x *holding) metric(t *testing.T, series string) float64 {
	t.Helper()
	return metric(t, x.Cluster, series)
}

// metric reads a series of a server's.
func metric(t *testing.T, c *lab.Cluster, series string) float64 {
	t.Helper()
	_, page := get(t, c.HTTP, "/metrics")
	for line := range strings.Lines(page) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("%s has no metric %s", c.Name, series)
	return 0
}
