//go:build real

package hostile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/signet-ca/signet/test/lab"
)

// hold keeps what is given to it open until release.
type hold struct {
	mu    sync.Mutex
	conns []net.Conn
}

func (h *hold) keep(c net.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.conns = append(h.conns, c)
}

func (h *hold) release() {
	for _, c := range h.conns {
		c.Close()
	}
}

func TestMistake37HalfOpenConnectionsStarveNobody(t *testing.T) {
	hello := []byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03") // the head of a ClientHello of 512 bytes
	under(t, 160, func(ctx context.Context) {
		var open hold
		defer open.release()
		var work sync.WaitGroup
		for _, d := range targets {
			work.Go(func() {
				for n := range 1500 {
					c, err := d.knock(source(n))
					if err != nil {
						t.Errorf("%s: connection %d: %v", d.name, n, err)
						return
					}
					open.keep(c)
					switch n % 3 {
					case 1:
						_, _ = c.Write(hello[:5])
					case 2:
						_, _ = c.Write(hello)
					}
				}
			})
		}
		work.Wait()
		if ctx.Err() != nil {
			return
		}
		// The doors give up on them by themselves, 5 s after they have taken them.
		const limit = 20 * time.Second
		deadline := time.Now().Add(limit)
		for _, c := range open.conns {
			_ = c.SetReadDeadline(deadline)
			for buf := make([]byte, 4096); ; { // what an HTTP/2 server says first, then the end
				if _, err := c.Read(buf); err == nil {
					continue
				} else if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("a half-open connection to %s is still there after %s", c.RemoteAddr(), limit)
					return
				}
				break
			}
		}
	})
}

func TestMistake37HandshakesOfOnePeerDelayNobody(t *testing.T) {
	var done atomic.Int64
	under(t, 200, func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		began := time.Now()
		var work sync.WaitGroup
		for w := range 4 {
			d := targets[w%2]
			work.Go(func() {
				for ctx.Err() == nil && (time.Since(began) < 4*time.Second || done.Load() < 100) {
					if c, err := d.enter(source(0)); err == nil {
						done.Add(1)
						c.Close()
					}
				}
			})
		}
		work.Wait()
	})
	t.Logf("%d handshakes", done.Load())
	if done.Load() < 100 {
		t.Error("that is no flood")
	}
}

// fromThere is a context that ends some time after begin was called first, or when nobody has within half a minute.
func fromThere(parent context.Context, long time.Duration) (ctx context.Context, begin, cancel func()) {
	ctx, cancel = context.WithTimeout(parent, 30*time.Second)
	return ctx, sync.OnceFunc(func() { time.AfterFunc(long, cancel) }), cancel
}

// floods are what breaks HTTP/2's rules, or the patience of a peer, for as long as the connection lasts.
var floods = map[string]struct {
	settings []http2.Setting
	flood    func(d target, r *raw) error
}{
	"rapid reset": {nil, func(d target, r *raw) error {
		id, err := r.begin(call(d.method)...)
		return errors.Join(err, r.WriteRSTStream(id, http2.ErrCodeCancel))
	}},
	"more streams than allowed": {nil, func(d target, r *raw) error {
		_, err := r.begin(call(d.method)...)
		return err
	}},
	"continuation without an end": {nil, func(d target, r *raw) error {
		if err := r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: r.encode(call(d.method)...)}); err != nil {
			return err
		}
		for {
			if err := r.WriteContinuation(1, false, r.encode([2]string{"x-more", strings.Repeat("y", 1000)})); err != nil {
				return err
			}
		}
	}},
	"empty continuation": {nil, func(d target, r *raw) error {
		if err := r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: r.encode(call(d.method)...)}); err != nil {
			return err
		}
		for {
			if err := r.WriteContinuation(1, false, nil); err != nil {
				return err
			}
		}
	}},
	"settings": {nil, func(_ target, r *raw) error {
		return r.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: 1 << 31})
	}},
	"pings": {nil, func(_ target, r *raw) error { return r.WritePing(false, [8]byte{1}) }},
	"empty data": {nil, func(d target, r *raw) error {
		id, err := r.begin(call(d.method)...)
		for err == nil {
			err = r.WriteData(id, false, nil)
		}
		return err
	}},
	"no window, no reading": {[]http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 0}}, func(d target, r *raw) error {
		id, err := r.begin(call(d.method)...)
		return errors.Join(err, r.WriteData(id, true, message(2, 0, []byte{8, 1})))
	}},
	"windows beyond their end": {nil, func(_ target, r *raw) error { return r.WriteWindowUpdate(0, 1<<31-1) }},
	"priorities": {nil, func(_ target, r *raw) error {
		r.next += 2
		return r.WritePriority(r.next, http2.PriorityParam{StreamDep: 1, Weight: 1})
	}},
	"frames of a kind nobody knows": {nil, func(_ target, r *raw) error { return r.WriteRawFrame(0xfe, 0xff, 1, make([]byte, 1000)) }},
	"headers that grow at the receiver": {nil, func(d target, r *raw) error {
		fields := call(d.method)
		for range 200 { // indexed after the first: two bytes that stand for 4,000
			fields = append(fields, [2]string{"x-bomb", strings.Repeat("z", 4000)})
		}
		_, err := r.begin(fields...)
		return err
	}},
	"a frame that is too large": {nil, func(_ target, r *raw) error {
		_, err := r.Conn.Write(append([]byte{0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1}, make([]byte, 1<<14)...))
		return err
	}},
}

// One peer per door floods it, with one kind after the other; all at once would starve the honest of the processor that
// the attackers themselves run on.
func TestMistake38HTTP2FloodsDelayNobody(t *testing.T) {
	under(t, 200, func(ctx context.Context) {
		n := 0
		for name, f := range floods {
			var begun, ended atomic.Int64
			var work sync.WaitGroup
			for _, d := range targets {
				n++
				from := source(n)
				work.Go(func() {
					ctx, begin, cancel := fromThere(ctx, 700*time.Millisecond)
					defer cancel()
					for ctx.Err() == nil {
						r, err := d.raw(from, f.settings...)
						if err != nil {
							// Limits on connections and bad greetings are answers too.
							time.Sleep(20 * time.Millisecond)
							continue
						}
						begin()
						begun.Add(1)
						stop := context.AfterFunc(ctx, func() { r.Close() })
						for frames := 0; frames < 20_000 && err == nil; frames++ {
							err = f.flood(d, r)
						}
						if err != nil && ctx.Err() == nil {
							ended.Add(1)
						}
						stop()
						r.Close()
					}
				})
			}
			work.Wait()
			t.Logf("%s: %d floods, of which %d were cut short", name, begun.Load(), ended.Load())
			if begun.Load() < int64(len(targets)) {
				t.Errorf("%s: only %d floods took place", name, begun.Load())
			}
		}
	})
}

func TestMistake53TenThousandNamesAreRefused(t *testing.T) {
	names := make([]string, 10_000)
	for i := range names {
		names[i] = fmt.Sprint("n", i)
	}
	under(t, 64, func(ctx context.Context) {
		for what, ask := range map[string][]string{
			"65 names": names[:65], "10,000 names": names, "a name of 2,049 bytes": {strings.Repeat("n", 2049)},
			"a name of 60,000 bytes": {strings.Repeat("n", 60_000)}, "a name of 1,000,000 bytes": {strings.Repeat("n", 1_000_000)},
		} {
			s, conn, err := stream(ctx, func() (net.Conn, error) { return as(badUser, site.agent.Socket) })
			if err != nil {
				t.Errorf("%s: %v", what, err)
				continue
			}
			if err = subscribe(s, ask...); err == nil || errors.Is(err, io.EOF) {
				_, err = s.Recv()
			}
			if err == nil {
				t.Errorf("%s: taken", what)
			}
			conn.Close()
		}
		time.Sleep(time.Second)
	})
}

// TestMistake37DescriptorsRunOutForNobodyElse gives an agent few descriptors and lets one user take what it can get.
func TestMistake37DescriptorsRunOutForNobodyElse(t *testing.T) {
	if !root() {
		t.Skip("needs root, to be two users")
	}
	ports, err := lab.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	token, err := site.Token(t.Context(), "narrow")
	if err != nil {
		t.Fatal(err)
	}
	http := fmt.Sprintf("127.0.0.1:%d", ports[0])
	conf := "state_dir: ./narrow\njoin_token_file: ./narrow.token\nsocket: ./run/narrow.sock\nhttp: " + http + "\n"
	if err := errors.Join(site.Lab.Write("east/narrow.token", token), site.Lab.Write("east/narrow.yaml", conf)); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(site.Path("narrow.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	agent := exec.Command("sh", "-c", `ulimit -n 128; exec "$0" agent --config "$1"`, signet, site.Path("narrow.yaml"))
	agent.Stdout, agent.Stderr = log, log
	agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = agent.Process.Kill(); _ = agent.Wait() }()
	if err := lab.Ready(t.Context(), "the agent", http); err != nil {
		t.Fatal(err)
	}
	socket := site.Path("run", "narrow.sock")
	before, err := measure(http)
	if err != nil {
		t.Fatal(err)
	}
	var greedy hold
	for range 500 {
		c, err := as(badUser, socket)
		if err != nil {
			break // the backlog is full
		}
		greedy.keep(c)
	}
	ask := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		s, conn, err := stream(ctx, func() (net.Conn, error) { return net.Dial("unix", socket) })
		if err != nil {
			return err
		}
		defer conn.Close()
		// A refusal may be there before the request is.
		if err := subscribe(s, "ROOTCA"); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		// No registration names this agent, so a refusal by name is an answer; silence is none.
		if _, err = s.Recv(); err == nil || strings.Contains(err.Error(), "no registration fits") {
			return nil
		}
		return err
	}
	for range 50 {
		if err := ask(); err != nil {
			t.Fatalf("another user, while one holds what it can get: %v", err)
		}
	}
	greedy.release()
	if err := lab.Until(t.Context(), "back to where it was", 30*time.Second, func() error {
		u, err := measure(http)
		if err == nil && (u.descriptors > before.descriptors+5 || u.goroutines > before.goroutines+10) {
			err = fmt.Errorf("%.0f descriptors and %.0f goroutines, had %.0f and %.0f", u.descriptors, u.goroutines, before.descriptors, before.goroutines)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}
