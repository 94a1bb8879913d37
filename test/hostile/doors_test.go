//go:build real

package hostile

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
)

// issue has the evil agent be given a certificate of its own, and returns its place in the log.
func issue(t *testing.T) uint64 {
	t.Helper()
	conn, err := site.evil.Dial(site.Agents, site.evil.ControlCA)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	key, err := doors.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := doors.CSR(key, nil)
	if err != nil {
		t.Fatal(err)
	}
	given, err := doors.Issue(t.Context(), conn, "evil", []string{"unix:uid:1"}, csr)
	if err != nil {
		t.Fatal(err)
	}
	return given.LogIndex
}

// nothingIssued holds the log against what an attack with that key has been given since the certificate at that place was issued.
// Others may be given something meanwhile: node-1 still asks for what the crowd of an earlier test wanted, and the door finishes an
// enrolment whose agent was killed.
func nothingIssued(t *testing.T, since uint64, key *ecdsa.PrivateKey) {
	t.Helper()
	until := issue(t)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	attacker := fmt.Sprintf("%x", sha256.Sum256(spki))
	var entries []struct {
		Index  uint64 `json:"index"`
		Agent  string `json:"agent"`
		Serial string `json:"serial"`
		Key    string `json:"public_key_sha256"`
	}
	err = lab.Until(t.Context(), "the log's checkpoint covers the attack", 30*time.Second, func() error {
		out, err := site.Lab.Run(t.Context(), "log", "find", "--config", site.Config(), "--kind", "certificate-issued", "--limit", "0", "-o", "json")
		if err == nil {
			err = json.Unmarshal([]byte(out), &entries)
		}
		if err == nil && entries[0].Index < until { // the newest first
			err = fmt.Errorf("it ends at %d, not %d", entries[0].Index, until)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Index > since && e.Index < until && (e.Agent == "evil" || e.Key == attacker) {
			t.Errorf("a certificate was issued to agent %q: serial %s", e.Agent, e.Serial)
		}
	}
}

func TestMistake01AnAgentGetsNoForeignIdentity(t *testing.T) {
	conn, err := site.evil.Dial(site.Agents, site.evil.ControlCA)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	key, err := doors.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := doors.CSR(key, nil)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"honest", "admin", "me", idOf("honest"), idOf("evil"), "Evil", "evil ", "evil\x00", "../evil", "*", "e*", ".*", "evil|honest", ""}
	for i := len(names); i < 500; i++ {
		names = append(names, member(i%crowd)+strings.Repeat("x", i/crowd))
	}
	before := issue(t)
	for batch := range slices.Chunk(names, 50) {
		req := &signetv1.IssueRequest{}
		for _, n := range batch {
			n = strings.ToValidUTF8(n, "")
			req.Items = append(req.Items, &signetv1.IssueItem{Registration: n, Selectors: []string{"unix:uid:1", "unix:uid:65533", fmt.Sprintf("unix:uid:%d", crowdUser)}, Csr: csr})
		}
		r, err := signetv1.NewAgentsClient(conn).Issue(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		for i, res := range r.Results {
			if res.GetRefusal() == nil {
				t.Errorf("%q was issued", batch[i])
			}
		}
	}
	nothingIssued(t, before, key)
}

func TestMistake05OneTokenManyNodes(t *testing.T) {
	const tokens, racers = 5, 20
	for i := range tokens {
		token, err := site.Token(t.Context(), fmt.Sprintf("racer-%d", i))
		if err != nil {
			t.Fatal(err)
		}
		var won atomic.Int32
		var race sync.WaitGroup
		for range racers {
			race.Go(func() {
				switch _, err := doors.Enrol(t.Context(), token); {
				case err == nil:
					won.Add(1)
				case status.Code(err) != codes.PermissionDenied:
					t.Errorf("a loser hears %v", err)
				}
			})
		}
		race.Wait()
		if won.Load() != 1 {
			t.Errorf("%d agents by one token", won.Load())
		}
	}
}

// good is a request that the agents' door would grant to the evil agent, and the key in it.
func good(t *testing.T) ([]byte, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := doors.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := doors.CSR(key, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := proto.Marshal(&signetv1.IssueRequest{Items: []*signetv1.IssueItem{{Registration: "evil", Selectors: []string{"unix:uid:1"}, Csr: csr}}})
	if err != nil {
		t.Fatal(err)
	}
	return message(uint32(len(body)), 0, body), key
}

// ask makes one call by frames and returns how it ended. A door that has as many of this peer's connections as it takes, since
// it has not heard of the end of the last ones yet, is knocked at again.
func (d target) ask(t *testing.T, body []byte, fields ...[2]string) string {
	t.Helper()
	var r *raw
	if err := lab.Until(t.Context(), "the "+d.name+" door", 30*time.Second, func() (err error) {
		r, err = d.raw(source(0))
		return err
	}); err != nil {
		t.Error(err)
		return "closed: " + err.Error()
	}
	defer r.Close()
	id, err := r.begin(fields...)
	if err == nil {
		err = r.WriteData(id, true, body)
	}
	if err != nil {
		return "closed: " + err.Error()
	}
	return r.answer(id)
}

func TestMistake39OddPathsReachNothing(t *testing.T) {
	body, key := good(t)
	agents := targets[1]
	if got := agents.ask(t, body, call(agents.method)...); got != "0" {
		t.Fatalf("the honest path: %s", got)
	}
	before := issue(t)
	for _, d := range targets {
		service, method, _ := strings.Cut(d.method[1:], "/")
		for _, path := range []string{
			d.method[1:], "/" + d.method, d.method + "/", "/" + service + "//" + method, "/" + service, "/" + service + "/", "/", "",
			strings.ToLower(d.method), strings.ToUpper(d.method), "/" + service + "/" + strings.ToLower(method),
			"/" + service + "%2f" + method, d.method + "?x", d.method + "#", d.method + "\x00", d.method + " ", "/./" + service + "/" + method,
			"/x/.." + d.method, "https://signet" + d.method, "*", "/" + strings.Repeat("a", 8<<10) + "/x", "/" + service + "/Unknown",
			"/signet.admin.v1.Admin/CreateJoinToken", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
			"/grpc.channelz.v1.Channelz/GetServers", "/debug/pprof/heap", "/metrics",
		} {
			got := d.ask(t, body, call(path)...)
			if got == "0" || got == "http 200" {
				t.Errorf("%s: path %.60q was answered with %q", d.name, path, got)
			} else if strings.HasPrefix(path, "/") && strings.Contains(path[1:], "/") && !strings.ContainsAny(path, "\x00 #?") && got != "12" && !strings.HasPrefix(got, "closed") && !strings.HasPrefix(got, "goaway") && !strings.HasPrefix(got, "reset") {
				t.Errorf("%s: path %.60q was answered with %q, want 12 (Unimplemented)", d.name, path, got)
			}
		}
		for _, verb := range []string{"GET", "PUT", "CONNECT", "OPTIONS", "POST2", ""} {
			fields := call(d.method)
			fields[0][1] = verb
			if got := d.ask(t, body, fields...); got == "0" {
				t.Errorf("%s: verb %q was answered with %q", d.name, verb, got)
			}
		}
		for _, kind := range []string{"application/json", "text/plain", "", "application/grpcx", "application/grpc-web"} {
			fields := call(d.method)
			fields[4][1] = kind
			if got := d.ask(t, body, fields...); got == "0" {
				t.Errorf("%s: content of type %q was answered with %q", d.name, kind, got)
			}
		}
	}
	nothingIssued(t, before, key)
}

func TestMistake41WhatIsCompressedIsRefused(t *testing.T) {
	bomb := bytes.Repeat([]byte{0x1f, 0x8b, 8, 0}, 1000)
	for _, d := range targets {
		for _, encoding := range []string{"gzip", "deflate", "snappy", "zstd", "GZIP", "x"} {
			if got := d.ask(t, message(uint32(len(bomb)), 1, bomb), call(d.method, [2]string{"grpc-encoding", encoding})...); got != "12" {
				t.Errorf("%s: a message in %s was answered with %q, want 12 (Unimplemented)", d.name, encoding, got)
			}
		}
		// Compressed, by what is not said.
		if got := d.ask(t, message(uint32(len(bomb)), 1, bomb), call(d.method)...); got == "0" {
			t.Errorf("%s: a compressed message without an encoding was answered with %q", d.name, got)
		}
	}
}

func TestMistake26TheLargestAndOneByteMore(t *testing.T) {
	// What the doors say they take.
	limits := map[string]int{"enrol": 64 << 10, "agents": 1 << 20, "sds": 64 << 10}
	for _, d := range targets {
		for _, claim := range []uint32{uint32(limits[d.name]) + 1, 1 << 30, 1<<32 - 1} {
			if got := d.ask(t, message(claim, 0, []byte("x")), call(d.method)...); got != "8" {
				t.Errorf("%s: a message that claims %d bytes was answered with %q, want 8 (ResourceExhausted)", d.name, claim, got)
			}
		}
		for _, size := range []int{17 << 10, 100 << 10, 1 << 20} {
			got := d.ask(t, nil, call(d.method, [2]string{"x", strings.Repeat("v", min(size, 16<<10)*8/5)})...)
			if got == "0" {
				t.Errorf("%s: %d bytes of headers were taken", d.name, size)
			}
		}
	}
	// Many who send all they may and no end of it. The enrol door knows nobody, so it may give each little.
	under(t, 160, func(ctx context.Context) {
		var work sync.WaitGroup
		var conns []net.Conn
		var mu sync.Mutex
		for _, d := range targets {
			for n := range 100 {
				work.Go(func() {
					r, err := d.raw(source(n))
					if err != nil {
						return // over the limit
					}
					mu.Lock()
					conns = append(conns, r.Conn)
					mu.Unlock()
					size := limits[d.name] - 1
					for range 20 {
						id, err := r.begin(call(d.method)...)
						if err != nil {
							return
						}
						for sent := 0; sent < min(size, 60<<10); sent += 12 << 10 {
							part := make([]byte, 12<<10)
							if sent == 0 {
								part = message(uint32(limits[d.name]), 0, part)
							}
							_ = r.SetWriteDeadline(time.Now().Add(time.Second))
							if r.WriteData(id, false, part) != nil {
								return
							}
						}
					}
				})
			}
		}
		work.Wait()
		t.Logf("%d connections hold what they may", len(conns))
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
		for _, c := range conns {
			c.Close()
		}
	})
}

func TestMistake20NoiseStopsNobody(t *testing.T) {
	// Nothing of it stays: it is garbage of connections that have ended, which the collector lets grow to as much as lives.
	under(t, 160, func(context.Context) {
		var work sync.WaitGroup
		for _, d := range targets {
			work.Go(func() {
				for n := range 300 {
					noise := make([]byte, 1+n*7)
					_, _ = rand.Read(noise)
					switch n % 3 {
					case 0: // beneath TLS
						c, err := d.knock(source(n))
						if err != nil {
							continue
						}
						_, _ = c.Write(noise)
						c.Close()
					case 1: // beneath HTTP/2
						c, err := d.enter(source(n))
						if err != nil {
							continue
						}
						_, _ = c.Write(append([]byte(http2.ClientPreface), noise...))
						c.Close()
					default: // in a message
						if got := d.ask(t, message(uint32(len(noise)), 0, noise), call(d.method)...); got == "0" && d.name != "agents" {
							t.Errorf("%s answers noise with %q", d.name, got)
						}
					}
				}
			})
		}
		work.Wait()
	})
}
