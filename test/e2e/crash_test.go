//go:build real

package e2e

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
)

// ledger is what clients were given: by that, and not by what the server says, it is judged what is lost.
type ledger struct {
	mu    sync.Mutex
	certs []*x509.Certificate
}

func (l *ledger) add(t *testing.T, der []byte) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Error(err)
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.certs = append(l.certs, cert)
}

func (l *ledger) all() []*x509.Certificate {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.certs)
}

// grows waits for some more.
func (l *ledger) grows(t *testing.T, more int) {
	t.Helper()
	before := len(l.all())
	until(t, "more certificates are given", time.Minute, func() error {
		if n := len(l.all()) - before; n < more {
			return fmt.Errorf("%d of %d", n, more)
		}
		return nil
	})
}

func TestNothingIsLostWhenServerAndAgentAreKilledUnderLoad(t *testing.T) {
	const serverKills, agentKills, clients = 7, 3, 3
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	chance := rand.New(rand.NewPCG(seed, 0))

	w := newWorld(t, "")
	server := w.serve(t)
	registrations := "registrations:\n  - { name: web, spiffe_id: spiffe://example.org/web, agents: [node-1, m0, m1, m2], selectors: ['unix:uid:" + uid() + "'] }\n"
	w.apply(t, registrations)
	a := w.agent(t, "node-1")
	given := &ledger{}

	// Clients that issue as fast as they can, over all kills.
	load, stop := context.WithCancel(t.Context())
	var work sync.WaitGroup
	for i := range clients {
		m, err := w.east.Member(t.Context(), fmt.Sprintf("m%d", i))
		if err != nil {
			t.Fatal(err)
		}
		given.add(t, m.Chain[0])
		work.Go(func() { w.issueForEver(load, t, m, given) })
	}
	fetch := func() {
		t.Helper()
		dir := w.path(fmt.Sprintf("fetched%d", len(given.all())))
		w.must(t, "svid", "fetch", "--socket", a.Socket, "--write", dir, "--timeout", "60s")
		given.add(t, readCerts(t, dir+"/svid.pem")[0].Raw)
	}
	fetch()

	tokens := map[string]string{} // token to agent
	var promised []string         // registrations that were said to be applied
	for round := range serverKills + agentKills {
		given.grows(t, 6) // it is under load, however slow the machine is
		if round%4 == 3 && round/4 < agentKills {
			time.Sleep(time.Duration(chance.IntN(200)) * time.Millisecond)
			a.Kill()
			p, err := w.Start("east-node-1", "agent", "--config", w.path("east/node-1.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			a.Process = p
			if err := lab.Ready(t.Context(), "the agent after a kill", a.HTTP); err != nil {
				t.Fatal(err)
			}
			fetch()
			continue
		}
		// An admin is at work while it happens. What was said to be done must be done.
		var admin sync.WaitGroup
		name := fmt.Sprintf("r%d", round)
		more := registrations + fmt.Sprintf("  - { name: %s, spiffe_id: spiffe://example.org/%[1]s, agents: [node-1], selectors: ['unix:uid:1'] }\n", name)
		w.write(t, name+".yaml", more)
		var applied, made ran
		admin.Go(func() {
			applied = w.run(t, "registration", "apply", "--config", w.east.Config(), "-f", name+".yaml")
		})
		admin.Go(func() { made = w.run(t, "join-token", "create", "--config", w.east.Config(), "--agent", name) })
		time.Sleep(time.Duration(20+chance.IntN(400)) * time.Millisecond)
		server.Kill()
		admin.Wait()
		if applied.code == 0 {
			promised = append(promised, "registration/"+name)
		}
		if made.code == 0 {
			tokens[strings.TrimSpace(made.out)] = name
		}
		server = w.serve(t)
	}
	time.Sleep(300 * time.Millisecond)
	stop()
	work.Wait()
	w.untilLogged(t, w.east)

	t.Run("every certificate is in the log, with proof, once", func(t *testing.T) {
		var entries []struct {
			Serial   string    `json:"serial"`
			SPIFFEID string    `json:"spiffe_id"`
			NotAfter time.Time `json:"not_after"`
			Proven   bool      `json:"proven"`
		}
		if err := json.Unmarshal([]byte(w.must(t, "log", "find", "--config", w.east.Config(), "--kind", "certificate-issued", "--limit", "0", "--prove", "-o", "json")), &entries); err != nil {
			t.Fatal(err)
		}
		logged := map[string]int{}
		for i, e := range entries {
			if _, twice := logged[e.Serial]; twice {
				t.Errorf("serial %s is in the log twice", e.Serial)
			}
			if !e.Proven {
				t.Errorf("entry of %s is not proven", e.Serial)
			}
			logged[e.Serial] = i
		}
		certs := given.all()
		t.Logf("%d certificates given, %d entries", len(certs), len(entries))
		if len(certs) < 50 {
			t.Errorf("only %d certificates were given: that was no load", len(certs))
		}
		// An agent serves what it holds again after its own restart: the same certificate, not another of its serial.
		seen := map[string]*x509.Certificate{}
		for i, cert := range certs {
			serial := hex.EncodeToString(cert.SerialNumber.Bytes())
			if other := seen[serial]; other != nil && !other.Equal(cert) {
				t.Errorf("serial %s was given to two certificates", serial)
			}
			seen[serial] = cert
			at, ok := logged[serial]
			if !ok {
				t.Errorf("certificate %s of %s was given and is not in the log", serial, cert.URIs[0])
				continue
			}
			if e := entries[at]; e.SPIFFEID != cert.URIs[0].String() || !e.NotAfter.Equal(cert.NotAfter) {
				t.Errorf("certificate %s of %s until %s is in the log as %+v", serial, cert.URIs[0], cert.NotAfter, e)
			}
			if i%(len(certs)/12+1) == 0 { // byte for byte, for some
				w.write(t, "one.pem", chainPEM(cert))
				w.must(t, "log", "prove", "--config", w.east.Config(), "--cert", "one.pem", "--out", w.path("one.proof"))
			}
		}
		w.must(t, "log", "verify", "--config", w.east.Config())
	})
	t.Run("registrations and agents are there", func(t *testing.T) {
		names := w.must(t, "registration", "list", "--config", w.east.Config(), "-o", "name")
		for _, want := range append(promised, "registration/web") {
			if !slices.Contains(strings.Fields(names), want) {
				t.Errorf("%s was applied and is lost; there are %s", want, names)
			}
		}
		if status, text := get(t, a.HTTP, "/readyz?verbose"); status != 200 {
			t.Errorf("the agent is not in order: %s", text)
		}
		fetch()
		if log, _ := os.ReadFile(w.path("east-node-1.log")); strings.Count(string(log), `"msg":"enrolled"`) != 1 {
			t.Error("the agent enrolled again")
		}
	})
	t.Run("a token that was shown admits one, and never two", func(t *testing.T) {
		list := w.must(t, "join-token", "list", "--config", w.east.Config(), "-o", "json")
		for token, agent := range tokens {
			if !strings.Contains(list, `"agent": "`+agent+`"`) {
				t.Errorf("the token for %s is lost", agent)
			}
			if _, err := doors.Enrol(t.Context(), token); err != nil {
				t.Errorf("the token for %s: %v", agent, err)
			}
		}
		if len(tokens) == 0 {
			t.Log("every kill came before the token")
		}
	})

	// Killed in the middle of enrolments with one token.
	t.Run("nor does a kill in the middle of it", func(t *testing.T) {
		for range 2 {
			token, err := w.east.Token(t.Context(), "contested")
			if err != nil {
				t.Fatal(err)
			}
			var admitted int
			var mu sync.Mutex
			var race sync.WaitGroup
			try := func() {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				if _, err := doors.Enrol(ctx, token); err == nil {
					mu.Lock()
					admitted++
					mu.Unlock()
				}
			}
			for range 4 {
				race.Go(try)
			}
			time.Sleep(time.Duration(chance.IntN(60)) * time.Millisecond)
			server.Kill()
			race.Wait()
			server = w.serve(t)
			for range 3 {
				race.Go(try)
			}
			race.Wait()
			if admitted > 1 {
				t.Errorf("one token admitted %d", admitted)
			}
		}
	})
}

// issueForEver asks for certificates, several at a time, and dials again when the server is gone.
func (w *world) issueForEver(ctx context.Context, t *testing.T, m *doors.Member, given *ledger) {
	for ctx.Err() == nil {
		err := func() error {
			conn, err := m.Dial(w.east.Agents, m.ControlCA)
			if err != nil {
				return err
			}
			defer conn.Close()
			for ctx.Err() == nil {
				req := &signetv1.IssueRequest{}
				for range 3 {
					csr, err := doors.CSR(newKey(t), nil)
					if err != nil {
						return err
					}
					req.Items = append(req.Items, &signetv1.IssueItem{Registration: "web", Instance: "load", Selectors: []string{"unix:uid:" + uid()}, Csr: csr})
				}
				r, err := signetv1.NewAgentsClient(conn).Issue(ctx, req)
				if err != nil {
					return err
				}
				for _, result := range r.Results {
					if c := result.GetCertificate(); c != nil {
						given.add(t, c.Chain[0])
					} else if !errors.Is(ctx.Err(), context.Canceled) {
						return fmt.Errorf("refused: %s", result.GetRefusal().GetMessage())
					}
				}
				time.Sleep(5 * time.Millisecond) // the machine has other work
			}
			return nil
		}()
		if err != nil {
			time.Sleep(50 * time.Millisecond)
		}
	}
}
