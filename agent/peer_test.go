package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/identity"
)

// counting counts the attestations.
type counting struct {
	fakeAttestor
	asked int
}

func (c *counting) AttestWorkload(ctx context.Context, conn net.Conn) (identity.Workload, error) {
	c.mu.Lock()
	c.asked++
	c.mu.Unlock()
	return c.fakeAttestor.AttestWorkload(ctx, conn)
}

func (c *counting) seen() (asked, open int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked, c.open
}

func TestAConnectionIsAttestedOnceForAllItsStreams(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	at := &counting{fakeAttestor: fakeAttestor{selectors: []identity.Selector{uid}, alive: true}}
	n := w.start(t, func(c *Config) { c.Attestor = at })
	n.ready(t)
	conn := connect(t, n.config.Socket)
	for range 20 {
		s := subscribe(t, conn, "default")
		if _, err := s.next(); err != nil {
			t.Fatal(err)
		}
	}
	if asked, open := at.seen(); asked != 1 || open != 1 {
		t.Fatalf("20 streams of one connection: attested %d times, %d held", asked, open)
	}
	s := subscribe(t, connect(t, n.config.Socket), "default")
	if _, err := s.next(); err != nil {
		t.Fatal(err)
	}
	if asked, open := at.seen(); asked != 2 || open != 2 {
		t.Fatalf("another connection: attested %d times, %d held", asked, open)
	}
	// What was attested is looked at again for each stream.
	at.mu.Lock()
	at.alive = false
	at.mu.Unlock()
	if _, err := subscribe(t, conn, "default").next(); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("a stream of a process that is gone: %v", err)
	}
	conn.Close()
	eventually(t, "the process is let go with its connection", func() bool { _, open := at.seen(); return open == 1 })
}

func TestHashesThatAreWantedLaterAreAskedForOnce(t *testing.T) {
	at := &counting{fakeAttestor: fakeAttestor{alive: true}}
	var p connPeer
	for i, hash := range []bool{false, false, true, true, false, true} {
		if _, err := p.attest(t.Context(), at, nil, hash); err != nil {
			t.Fatal(err)
		}
		want := 1
		if i >= 2 {
			want = 2
		}
		if asked, open := at.seen(); asked != want || open != want {
			t.Fatalf("stream %d: attested %d times, %d held", i, asked, open)
		}
	}
	p.close()
	if _, open := at.seen(); open != 0 {
		t.Fatalf("%d are held after the connection", open)
	}
	if _, err := p.attest(t.Context(), at, nil, false); err == nil {
		t.Fatal("a closed connection was attested")
	}
}

func TestDescriptorsThatRunOutAreNoRefusal(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	at := &fakeAttestor{selectors: []identity.Selector{uid}, alive: true}
	n := w.start(t, func(c *Config) { c.Attestor = at })
	n.ready(t)
	client := secretv3.NewSecretDiscoveryServiceClient(connect(t, n.config.Socket))
	ask := func() error {
		_, err := client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})
		return err
	}
	for _, errno := range []error{unix.EMFILE, unix.ENFILE} {
		at.mu.Lock()
		at.err = fmt.Errorf("attest pid 1: %w", errno)
		at.mu.Unlock()
		if err := ask(); status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "limit of open files") {
			t.Errorf("%v: the caller hears %v", errno, err)
		}
	}
	at.mu.Lock()
	at.err = errors.New("who knows")
	at.mu.Unlock()
	if err := ask(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("another error: the caller hears %v", err)
	}
	at.mu.Lock()
	at.err = nil
	at.mu.Unlock()
	if err := ask(); err != nil {
		t.Errorf("on the same connection, when there are some again: %v", err)
	}
}

func TestARefusedCallerIsLoggedOnce(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, "unix:uid:7"))
	log, text := newTestLog(t)
	at := &fakeAttestor{selectors: []identity.Selector{uid}, alive: true}
	n := w.start(t, func(c *Config) { c.Attestor, c.Logger = at, log })
	n.ready(t)
	for _, broken := range []error{nil, errors.New("who knows")} {
		at.mu.Lock()
		at.err = broken
		at.mu.Unlock()
		before := strings.Count(text.String(), "\n")
		if _, err := subscribe(t, connect(t, n.config.Socket), "default").next(); status.Code(err) != codes.PermissionDenied {
			t.Fatal(err)
		}
		var lines []string
		for line := range strings.Lines(strings.Join(strings.SplitAfter(text.String(), "\n")[before:], "")) {
			if strings.Contains(line, "caller") {
				lines = append(lines, line)
			}
		}
		if len(lines) != 1 {
			t.Errorf("one refused caller is %d lines: %q", len(lines), lines)
		}
	}
}
