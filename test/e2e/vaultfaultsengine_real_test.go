//go:build real

package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
)

// crowd asks for certificates from many workloads at once, for as long as the test lives, as often as an agent that waits for one
// does.
func (x *holding) crowd(t *testing.T, s *stream, size int) (good func() int) {
	t.Helper()
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
	var all sync.WaitGroup
	var given atomic.Int64
	done := make(chan struct{})
	for range size {
		all.Go(func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(500 * time.Millisecond):
				}
				if _, err := doors.Issue(t.Context(), conn, "web", []string{"unix:uid:1"}, csr); err == nil {
					given.Add(1)
				}
			}
		})
	}
	t.Cleanup(func() { close(done); all.Wait(); conn.Close() })
	return func() int { return int(given.Load()) }
}

// stoppedBy is what is said of Transit, where that stops the server.
func (x *holding) stoppedBy(t *testing.T) (f check.Finding) {
	t.Helper()
	s, err := x.health(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range s.worse() {
		if f.Code == check.CodeVault && f.About == "vault-transit" {
			if s.Ready {
				t.Errorf("%+v, and it is ready", f)
			}
			return f
		}
	}
	return f
}

// TestASickTransitIsSaidAndIsNotHammered has signatures alone fail: what else Vault does, it does well. One cluster has its
// intermediate in Transit, the other its control CA alone.
func TestASickTransitIsSaidAndIsNotHammered(t *testing.T) {
	t.Parallel()
	e := newEstate(t, "sick")
	west := e.cluster(t, "west", how{keys: "vault-transit"})
	west.serve(t)
	s := west.issuing(t)
	west.mended(t)
	west.issuesAgain(t, s)
	s.stop()
	const size = 30
	good := west.crowd(t, s, size)
	sign := "transit-" + e.name + "/sign/*"
	for _, day := range []fault{
		{"answers 429", lab.Fault{Status: 429, Errors: []string{"request path: rate limit quota exceeded"}}, []string{"too many requests"}},
		{"answers 503", lab.Fault{Status: 503, Errors: []string{"overloaded"}}, []string{"overloaded"}},
		{"hangs", lab.Fault{Hang: true}, []string{"no answer within"}},
	} {
		t.Run(day.name, func(t *testing.T) {
			log := func(what string) int { return strings.Count(readFile(t, e.path("west-server.log")), what) }
			ills, backs, aways := log("an engine of Vault does not do its work"), log("the engine of Vault is back"), log(`"Vault is away`)
			n := good()
			until(t, "certificates are made", time.Minute, func() error {
				if good() < n+size {
					return fmt.Errorf("%d", good()-n)
				}
				return nil
			})
			west.proxy.Set(sign, day.Fault)
			var first check.Finding
			until(t, "it is said", time.Minute, func() error {
				if first = west.stoppedBy(t); first.Code == "" {
					return errors.New("not yet")
				}
				return nil
			})
			for _, word := range append(day.says, "nothing can be issued: the first certificates of workloads end at ") {
				if !strings.Contains(first.Message, word) {
					t.Errorf("%q is not in %q", word, first.Message)
				}
			}
			ends := func(f check.Finding) string { end, _, _ := strings.Cut(f.Message, " ("); return end }
			until(t, "those who were on their way have come", time.Minute, func() error {
				n = good()
				time.Sleep(usualTimeout + time.Second)
				if more := good() - n; more > 0 {
					return fmt.Errorf("%d have come", more)
				}
				return nil
			})
			began := time.Now()
			seen, unreleasedBefore := west.proxy.Seen(sign), west.metric(t, unreleased)
			for range 20 {
				time.Sleep(500 * time.Millisecond)
				if now := west.stoppedBy(t); ends(now) != ends(first) {
					t.Errorf("it says %+v, before that %+v", now, first)
				}
			}
			if up := west.metric(t, `signet_vault_engine_up{engine="transit-`+e.name+`/sign",op="write"}`); up != 0 {
				t.Errorf("the metric of the engine is %v", up)
			}
			if up := west.metric(t, "signet_vault_up"); up != 1 {
				t.Errorf("the metric of Vault is %v", up)
			}
			if n != good() {
				t.Error("there were certificates: nothing was tested")
			}
			// One each second at the most.
			more, notGiven := west.proxy.Seen(sign)-seen, west.metric(t, unreleased)-unreleasedBefore
			took := time.Since(began)
			most := int(took/time.Second) + 2
			if more < 1 || more > most {
				t.Errorf("%d signatures were asked for in %s by %d workloads", more, took, size)
			}
			if int(notGiven) > most {
				t.Errorf("%v certificates were logged in %s that nobody got", notGiven, took)
			}
			west.proxy.Clear()
			until(t, "certificates are made again", time.Minute, func() error {
				if good() < n+size {
					return fmt.Errorf("%d", good()-n)
				}
				return nil
			})
			west.mended(t)
			if ill, back, away := log("an engine of Vault does not do its work")-ills, log("the engine of Vault is back")-backs, log(`"Vault is away`)-aways; ill != 1 || back != 1 || away != 0 {
				t.Errorf("the log says %d times that it begins, %d times that it ends, and %d times that all of Vault is away", ill, back, away)
			}
		})
	}
	west.proves(t, s)
}

// TestAKeyThatIsGoneFromTransitIsFoundWhileNobodyAsks: on a cluster without a workload, and after a restart too.
func TestAKeyThatIsGoneFromTransitIsFoundWhileNobodyAsks(t *testing.T) {
	t.Parallel()
	e := newEstate(t, "idle")
	x := e.cluster(t, "east", how{keys: "vault-transit"})
	x.serve(t)
	x.mended(t)
	key := "transit-" + e.name + "/keys/signet-east_example.org_intermediate"
	root := e.vault.Root()
	set := func(op string, body map[string]any) {
		t.Helper()
		if _, err := root.Write(t.Context(), key+op, body); err != nil {
			t.Fatal(err)
		}
	}
	said := func(what string, words ...string) {
		t.Helper()
		until(t, what, 3*time.Minute, func() error {
			s, err := x.health(t.Context())
			if err != nil {
				return err
			}
			if i := slices.IndexFunc(s.Findings, func(f check.Finding) bool { return f.Code == check.CodeKey && f.Level == check.Error }); i >= 0 && !s.Ready {
				for _, word := range words {
					if !strings.Contains(s.Findings[i].Message, word) {
						return fmt.Errorf("it says %+v", s.Findings[i])
					}
				}
				return nil
			}
			return fmt.Errorf("ready: %v, %+v", s.Ready, s.worse())
		})
	}
	set("/rotate", nil)
	set("/config", map[string]any{"min_encryption_version": 2})
	said("that Vault does not sign with the pinned version", "min_encryption_version 2")
	set("/config", map[string]any{"min_encryption_version": 0})
	x.mended(t)
	set("/config", map[string]any{"deletion_allowed": true})
	if err := root.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	said("that the key is gone", "there is no "+key)
	x.server.Stop()
	x.begin(t)
	until(t, "after a restart", 3*time.Minute, func() error {
		s, err := x.health(t.Context())
		if err != nil {
			return err
		}
		for _, f := range s.worse() {
			if f.Level == check.Error && f.Blocks() && strings.Contains(f.Message, "there is no "+key) {
				return nil
			}
		}
		return fmt.Errorf("ready: %v, %+v", s.Ready, s.worse())
	})
	set("", map[string]any{"type": "ecdsa-p256"})
	looked := x.proxy.Seen(key)
	until(t, "what was made anew is looked at, and once more", 3*time.Minute, func() error {
		s, err := x.health(t.Context())
		if err != nil {
			return err
		}
		if s.Ready {
			t.Fatal("another key is taken for it")
		}
		if n := x.proxy.Seen(key) - looked; n < 2 {
			return fmt.Errorf("%d times", n)
		}
		return nil
	})
}
