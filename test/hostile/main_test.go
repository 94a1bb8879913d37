//go:build real

// Package hostile lets bad peers loose on the real binary, on loopback and for a bounded time: floods, bombs, noise,
// malformed frames and foreign names, at each of its doors. Honest clients must be served meanwhile, memory must stay
// bounded, and afterwards everything must return to where it was.
package hostile

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
)

// signet is the binary; site the installation that all tests share, as an installation is shared by its peers.
var (
	signet string
	site   struct {
		*lab.Cluster
		server *lab.Process
		agent  *lab.Agent
		// honest is an enrolled agent that behaves, evil one that doesn't.
		honest, evil *doors.Member
		// rules are the registrations that all tests count on.
		rules string
	}
)

const (
	secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	// crowd of workloads on the agent, each with a user, or a socket, of its own.
	crowd     = 200
	crowdUser = 42000
	// badUser runs what is hostile on the agent's socket, if root runs the tests.
	badUser = 41999
)

func TestMain(m *testing.M) {
	// The processes die with the thread that started them.
	runtime.LockOSThread()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	scratch, err := os.MkdirTemp("", "bad")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(scratch)
	if err := os.Chmod(scratch, 0o755); err != nil {
		return 0, err
	}
	signet = filepath.Join(scratch, "signet")
	if out, err := exec.Command("go", "build", "-o", signet, "github.com/signet-ca/signet/cmd/signet").CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build signet: %w\n%s", err, out)
	}
	l, err := lab.New(filepath.Join(scratch, "lab"), signet)
	if err != nil {
		return 0, err
	}
	defer l.Close()
	ctx := context.Background()
	if err := settle(ctx, l); err != nil {
		return 0, err
	}
	code := m.Run()
	for _, p := range []*lab.Process{site.server, site.agent.Process} {
		if err := syscall.Kill(p.PID(), 0); err != nil {
			return 1, fmt.Errorf("%s did not survive: %w", p.Name, err)
		}
	}
	if code != 0 {
		logs, _ := filepath.Glob(filepath.Join(l.Dir, "*-*.log"))
		for _, path := range logs {
			text, _ := os.ReadFile(path)
			fmt.Fprintf(os.Stderr, "%s ends with\n%s\n", filepath.Base(path), text[max(0, len(text)-2000):])
		}
	}
	return code, nil
}

// settle makes the installation.
func settle(ctx context.Context, l *lab.Lab) error {
	c, err := l.NewCluster("east", "")
	if err != nil {
		return err
	}
	if err := errors.Join(l.MakeRoot(ctx), c.Join(ctx)); err != nil {
		return err
	}
	site.Cluster = c
	if site.server, err = c.Serve(ctx); err != nil {
		return err
	}
	var sockets []string
	rules := "registrations:\n"
	rule := func(name, agent, selector string) {
		rules += fmt.Sprintf("  - { name: %s, spiffe_id: %s, agents: [%s], selectors: [%q] }\n", name, idOf(name), agent, selector)
	}
	rule("honest", "honest", "unix:uid:1")
	rule("evil", "evil", "unix:uid:1")
	rule("admin", "node-1", "unix:uid:65533")
	rule("me", "node-1", fmt.Sprintf("unix:uid:%d", os.Getuid()))
	if root() {
		rule("bad", "node-1", fmt.Sprintf("unix:uid:%d", badUser))
	}
	for i := range crowd {
		if root() {
			rule(member(i), "node-1", fmt.Sprintf("unix:uid:%d", crowdUser+i))
			continue
		}
		rule(member(i), "node-1", "socket:"+member(i))
		sockets = append(sockets, member(i))
	}
	if err := c.Apply(ctx, rules); err != nil {
		return err
	}
	site.rules = rules
	if site.honest, err = c.Member(ctx, "honest"); err != nil {
		return err
	}
	if site.evil, err = c.Member(ctx, "evil"); err != nil {
		return err
	}
	if site.agent, err = c.StartAgent(ctx, "node-1", sockets...); err != nil {
		return err
	}
	for _, dir := range []string{l.Dir, c.Path(), filepath.Dir(site.agent.Socket)} {
		if err := os.Chmod(dir, 0o711); err != nil {
			return err
		}
	}
	return nil
}

func root() bool              { return os.Geteuid() == 0 }
func member(i int) string     { return fmt.Sprintf("w%d", i) }
func idOf(name string) string { return "spiffe://" + lab.TrustDomain + "/hostile/" + name }

// as dials a Unix socket as another user, in the kernel's eyes, if this process is root's: SO_PEERCRED is the thread's that
// connects.
func as(user int, path string) (net.Conn, error) {
	if !root() {
		return net.Dial("unix", path)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	runtime.LockOSThread()
	if _, _, e := syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), uintptr(user), ^uintptr(0)); e != 0 {
		panic(e)
	}
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	if _, _, e := syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), 0, ^uintptr(0)); e != 0 {
		panic(e)
	}
	runtime.UnlockOSThread()
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err != nil {
		return nil, fmt.Errorf("connect to %s as uid %d: %w", path, user, err)
	}
	return net.FileConn(f)
}

// stream opens an SDS stream over a connection of its own.
func stream(ctx context.Context, dial func() (net.Conn, error)) (secretv3.SecretDiscoveryService_StreamSecretsClient, *grpc.ClientConn, error) {
	conn, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return dial() }))
	if err != nil {
		return nil, nil, err
	}
	s, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return s, conn, nil
}

func subscribe(s secretv3.SecretDiscoveryService_StreamSecretsClient, names ...string) error {
	return s.Send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: names, Node: &corev3.Node{Id: "hostile"}})
}

// identities are the names in the certificates of a response.
func identities(r *discoveryv3.DiscoveryResponse) ([]string, error) {
	var ids []string
	for _, any := range r.Resources {
		var s tlsv3.Secret
		if err := any.UnmarshalTo(&s); err != nil {
			return nil, err
		}
		chain := s.GetTlsCertificate().GetCertificateChain().GetInlineBytes()
		if chain == nil {
			continue
		}
		block, _ := pem.Decode(chain)
		if block == nil {
			return nil, errors.New("a secret without PEM")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		if len(cert.URIs) != 1 {
			return nil, fmt.Errorf("%d URIs", len(cert.URIs))
		}
		ids = append(ids, cert.URIs[0].String())
	}
	return ids, nil
}

// fetchMine is one honest visit: a new connection, a stream, one secret, which must be this user's.
func fetchMine(ctx context.Context) error {
	s, conn, err := stream(ctx, func() (net.Conn, error) { return net.Dial("unix", site.agent.Socket) })
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := subscribe(s, "default"); err != nil {
		return err
	}
	r, err := s.Recv()
	if err != nil {
		return err
	}
	ids, err := identities(r)
	if err == nil && (len(ids) != 1 || ids[0] != idOf("me")) {
		err = fmt.Errorf("got %v", ids)
	}
	return err
}

// served counts what honest clients ask for and get.
type served struct {
	asked, got atomic.Int64
	slowest    atomic.Int64
	mu         sync.Mutex
	failures   []string
}

func (s *served) count(what string, start time.Time, err error) {
	s.asked.Add(1)
	if err == nil {
		s.got.Add(1)
		for d := int64(time.Since(start)); ; {
			if old := s.slowest.Load(); d <= old || s.slowest.CompareAndSwap(old, d) {
				return
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.failures) < 5 {
		s.failures = append(s.failures, what+": "+err.Error())
	}
}

// usage is what a process holds, by its own metrics.
type usage struct{ goroutines, descriptors, resident, cpu float64 }

func measure(addr string) (usage, error) {
	m, err := metrics(addr)
	return usage{m["go_goroutines"], m["process_open_fds"], m["process_resident_memory_bytes"], m["process_cpu_seconds_total"]}, err
}

// metrics reads all series of a process.
func metrics(addr string) (map[string]float64, error) {
	resp, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	all := map[string]float64{}
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if i := strings.LastIndexByte(lines.Text(), ' '); i > 0 && lines.Text()[0] != '#' {
			if all[lines.Text()[:i]], err = strconv.ParseFloat(lines.Text()[i+1:], 64); err != nil {
				return nil, err
			}
		}
	}
	if all["go_goroutines"] == 0 {
		return nil, fmt.Errorf("no metrics at %s", addr)
	}
	return all, nil
}

const mebi = 1 << 20

// honestLimit bounds what an honest client waits for an answer, on a machine that the attackers, and others, keep busy as well.
const honestLimit = 20 * time.Second

// leastAsked is how many honest requests there are at least while an attack runs.
const leastAsked = 20

// under lets honest clients work while an attack runs, and holds the processes to their promises: at least 99.9 % of the
// honest are served, what lives in memory grows by no more than some MiB, and goroutines and descriptors return to where they were.
func under(t *testing.T, growth float64, attack func(ctx context.Context)) {
	t.Helper()
	processes := map[string]string{"server": site.HTTP, "agent": site.agent.HTTP}
	before := map[string]usage{}
	for name, addr := range processes {
		u, err := measure(addr)
		if err != nil {
			t.Fatal(err)
		}
		before[name] = u
	}
	logs := logged(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var s served
	var honest sync.WaitGroup
	conn, err := site.honest.Dial(site.Agents, site.honest.ControlCA)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ask := func(what string, f func(context.Context) error) {
		honest.Go(func() {
			for ctx.Err() == nil {
				call, cancel := context.WithTimeout(context.WithoutCancel(ctx), honestLimit)
				start := time.Now()
				err := f(call)
				cancel()
				s.count(what, start, err)
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	key, err := doors.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := doors.CSR(key, nil)
	if err != nil {
		t.Fatal(err)
	}
	issue := func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := doors.Issue(ctx, conn, "honest", []string{"unix:uid:1"}, csr)
		return err
	}
	ask("issue on an open connection", func(ctx context.Context) error { return issue(ctx, conn) })
	ask("issue on a new connection", func(ctx context.Context) error {
		fresh, err := site.honest.Dial(site.Agents, site.honest.ControlCA)
		if err != nil {
			return err
		}
		defer fresh.Close()
		return issue(ctx, fresh)
	})
	ask("a new SDS stream", fetchMine)
	// And a stream that was open before and must outlive the attack.
	long, longConn, err := stream(ctx, func() (net.Conn, error) { return net.Dial("unix", site.agent.Socket) })
	if err != nil {
		t.Fatal(err)
	}
	defer longConn.Close()
	if err := subscribe(long, "default"); err != nil {
		t.Fatal(err)
	}
	if _, err := long.Recv(); err != nil {
		t.Fatal(err)
	}
	most := map[string]float64{}
	honest.Go(func() {
		for ctx.Err() == nil {
			for name, addr := range processes {
				if u, err := measure(addr); err == nil {
					most[name] = max(most[name], u.resident)
				}
			}
			time.Sleep(200 * time.Millisecond)
		}
	})

	attack(ctx)
	for again := time.Now(); s.asked.Load() < leastAsked && time.Since(again) < time.Minute; {
		attack(ctx) // the machine is busy: what few have asked meanwhile says little
	}
	if err := subscribe(long, "default", "ROOTCA"); err != nil {
		t.Errorf("the stream that was open before: %v", err)
	} else if _, err := long.Recv(); err != nil {
		t.Errorf("the stream that was open before: %v", err)
	}
	stop()
	honest.Wait()
	conn.Close()
	longConn.Close()

	asked, got := s.asked.Load(), s.got.Load()
	t.Logf("%d of %d honest requests were served, the slowest in %s", got, asked, time.Duration(s.slowest.Load()).Round(time.Millisecond))
	if asked < leastAsked || float64(got) < 0.999*float64(asked) {
		t.Errorf("%d of %d honest requests were served: %q", got, asked, s.failures)
	}
	// Whoever can make a line of log at will can fill the disk that the audit log lies on.
	if grown := float64(logged(t)-logs) / mebi; grown > 1 {
		t.Errorf("the logs grew by %.1f MiB", grown)
	}
	for name, addr := range processes {
		// The collector lets garbage grow to as much as lives, and what it has given back to the machine before counts as growth.
		if grown := (most[name] - before[name].resident) / mebi; grown > 2*growth {
			t.Errorf("the %s grew by %.0f MiB, want at most %.0f", name, grown, 2*growth)
		} else {
			t.Logf("the %s grew by %.0f MiB", name, grown)
		}
		err := lab.Until(t.Context(), name+" back to where it was", time.Minute, func() error {
			u, err := measure(addr)
			if err != nil {
				return err
			}
			if u.goroutines > before[name].goroutines+10 || u.descriptors > before[name].descriptors+5 {
				return fmt.Errorf("%.0f goroutines and %.0f descriptors, had %.0f and %.0f", u.goroutines, u.descriptors, before[name].goroutines, before[name].descriptors)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// logged is the size of the processes' logs, in bytes.
func logged(t *testing.T) int64 {
	t.Helper()
	var sum int64
	for _, p := range []*lab.Process{site.server, site.agent.Process} {
		info, err := os.Stat(filepath.Join(site.Lab.Dir, p.Name+".log"))
		if err != nil {
			t.Fatal(err)
		}
		sum += info.Size()
	}
	return sum
}

// target is a door as its peers see it.
type target struct {
	name string
	// method is one that it has.
	method string
	// secured doors are reached by TLS; known ones ask for a certificate, which the evil agent has.
	secured, known bool
	address        func() string
}

var targets = []target{
	{"enrol", "/signet.v1.Enrolment/Enrol", true, false, func() string { return site.Enrol }},
	{"agents", "/signet.v1.Agents/Issue", true, true, func() string { return site.Agents }},
	{"sds", "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets", false, false, func() string { return site.agent.Socket }},
}

// source is an address that is not the honest one's; all of 127.0.0.0/8 is loopback.
func source(n int) string { return fmt.Sprintf("127.0.0.%d", 2+n%200) }

// knock opens the transport beneath: TCP or the socket.
func (d target) knock(from string) (net.Conn, error) {
	if !d.secured {
		return as(badUser, d.address())
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 5 * time.Second}
	return dialer.Dial("tcp", d.address())
}

// enter opens the door as far as gRPC.
func (d target) enter(from string) (net.Conn, error) {
	c, err := d.knock(from)
	if err != nil || !d.secured {
		return c, err
	}
	conf := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13} //nolint:gosec // a bad peer
	if d.known {
		conf.Certificates = []tls.Certificate{{Certificate: site.evil.Chain, PrivateKey: site.evil.Key}}
	}
	tc := tls.Client(c, conf)
	if err := tc.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return nil, err
	}
	if err := tc.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	return tc, tc.SetDeadline(time.Time{})
}
