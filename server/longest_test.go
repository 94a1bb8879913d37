package server

import (
	"context"
	"crypto/x509"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/store"
)

// stops reports whether an issuer stops signing by what is about to be logged.
func stops(entries []*auditv1.Entry) bool {
	for _, e := range entries {
		if x := e.GetAuthorityChanged(); x.GetFrom() == string(ca.Active) && x.GetTo() == string(ca.Retired) {
			return true
		}
	}
	return false
}

// leavesUntil are how long leaves under an issuer and the root above it are waited for.
func (l *live) leavesUntil(issuer string) (under, underRoot time.Time) {
	row, _ := l.keeper.current.Load().row(issuer)
	above, _ := l.keeper.current.Load().row(row.Root)
	return row.LeavesUntil, above.LeavesUntil
}

// switches begins a rotation of the intermediate, and installs what is signed; the answer may be an error.
func (l *live) switches(r *root) error {
	l.t.Helper()
	started, err := l.rotations().StartRotation(l.t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(l.t, err)
	_, err = l.rotations().InstallAuthorities(l.t.Context(), &adminv1.InstallAuthoritiesRequest{
		Chains: r.intermediate(l.t, started.Requests[0].Csr, nil), RootFingerprint: r.fingerprint(),
	})
	return err
}

// An issuer signs until it is replaced in memory, however long the database and the log took for that.
func TestLeavesCountFromWhenASwitchTookEffect(t *testing.T) {
	t.Parallel()
	const stall = 3 * time.Hour
	// effect is a time at which the switch had not taken effect yet, but nearly.
	check := func(t *testing.T, c *cluster, s *live, effect time.Time) {
		t.Helper()
		if s.state("intermediate-1") != ca.Retired || s.state("intermediate-2") != ca.Active {
			t.Fatal("the switch is not in effect")
		}
		look := func(s *live) {
			t.Helper()
			under, underRoot := s.leavesUntil("intermediate-1")
			for _, until := range []time.Time{under, underRoot} {
				if want := effect.Add(24 * time.Hour); until.Before(want) || until.After(want.Add(time.Minute)) {
					t.Errorf("leaves of the old issuer are waited for until %s, want %s", until, want)
				}
			}
		}
		look(s)
		must(t, s.stop())
		look(c.start(t, nil))
	}
	t.Run("the log stalls", func(t *testing.T) {
		c := newCluster(t, "east")
		s := c.start(t, func(s *Server) {
			works := s.outbox.log
			s.outbox.log = func(ctx context.Context, e ...*auditv1.Entry) error {
				if stops(e) {
					c.ahead.Add(int64(stall))
				}
				return works(ctx, e...)
			}
		})
		stalled := c.now().Add(stall)
		must(t, s.switches(c.root))
		check(t, c, s, stalled)
	})
	t.Run("the log is away", func(t *testing.T) {
		c := newCluster(t, "east")
		var broken atomic.Bool
		broken.Store(true)
		s := c.start(t, func(s *Server) {
			s.upkeepEvery = time.Hour
			works := s.outbox.log
			s.outbox.log = func(ctx context.Context, e ...*auditv1.Entry) error {
				if broken.Load() && stops(e) {
					return errors.New("no space left on device")
				}
				return works(ctx, e...)
			}
		})
		if err := s.switches(c.root); err == nil {
			t.Fatal("it is in effect without being logged")
		}
		c.ahead.Add(int64(stall))
		broken.Store(false)
		back := c.now()
		s.settleLater(t.Context())
		check(t, c, s, back)
	})
	t.Run("killed before it is logged, and started much later", func(t *testing.T) {
		for _, by := range []string{"a server", "an installation"} {
			t.Run(by, func(t *testing.T) {
				c := newCluster(t, "east")
				var killed *cluster
				s := c.start(t, func(s *Server) {
					works := s.outbox.log
					s.outbox.log = func(ctx context.Context, e ...*auditv1.Entry) error {
						if stops(e) {
							var err error
							if killed, err = c.imageIn(ctx, shortDir(t), s); err != nil {
								return err
							}
						}
						return works(ctx, e...)
					}
				})
				must(t, s.switches(c.root))
				must(t, s.stop())
				killed.ahead.Add(int64(stall))
				later := killed.now()
				if by == "an installation" {
					st, err := store.Open(t.Context(), store.Config{Path: databasePath(killed.dir)})
					must(t, err)
					rows, _, err := st.Authorities(t.Context())
					must(t, err)
					must(t, st.Close())
					var chain []byte
					for _, a := range rows {
						if a.ID == "intermediate-2" {
							cert, err := x509.ParseCertificate(a.Chain[0])
							must(t, err)
							chain = ca.EncodeChain(cert, c.root.cert)
						}
					}
					_, err = Install(t.Context(), InstallConfig{Folder: killed.folder(), Rotation: testRotation(), Chain: chain, RootFingerprint: c.root.fingerprint()})
					must(t, err)
				}
				check(t, killed, killed.start(t, nil), later)
			})
		}
	})
	t.Run("nothing stalls", func(t *testing.T) {
		c := newCluster(t, "east")
		s := c.start(t, nil)
		revision, before := s.keeper.current.Load().revision, c.now()
		must(t, s.switches(c.root))
		// A request, its certificate, its publication, the switch: nothing is written twice.
		if got := s.keeper.current.Load().revision - revision; got != 4 {
			t.Errorf("%d changes, want 4", got)
		}
		check(t, c, s, before)
	})
}

func TestLeavesOfALongerLifeAreWaitedForWhenItIsLowered(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	must(t, c.start(t, nil).stop()) // leaves of up to 24 h
	start := func(life time.Duration) *live {
		t.Helper()
		c.life = life
		return c.start(t, nil)
	}
	lowered := c.now()
	must(t, start(12*time.Hour).stop())
	c.ahead.Store(int64(20 * time.Hour))
	s := start(time.Hour)
	// Made with 12 h until now, and with 24 h until 20 h ago: the former end last.
	if got, want := s.keeper.policy.OlderLeaves, c.now().Add(12*time.Hour); got.Before(want.Add(-time.Minute)) || got.After(want) {
		t.Errorf("older leaves live until %s, want %s", got, want)
	}
	if got := s.keeper.policy.OlderLeaves; got.Before(lowered.Add(24 * time.Hour)) {
		t.Errorf("older leaves live until %s, but some were made at %s for 24 h", got, lowered)
	}
	must(t, s.switches(c.root))
	under, underRoot := s.leavesUntil("intermediate-1")
	if want := s.keeper.policy.OlderLeaves; !under.Equal(want) || !underRoot.Equal(want) {
		t.Errorf("leaves are waited for until %s, and under the root until %s, want %s", under, underRoot, want)
	}
	w := s.keeper.world(s.keeper.current.Load(), c.now())
	if x := w.Own.Roots[0]; x.LeavesUntil.Before(s.keeper.policy.OlderLeaves) {
		t.Errorf("peers are told of leaves until %s, want %s", x.LeavesUntil, s.keeper.policy.OlderLeaves)
	}
	older := s.keeper.policy.OlderLeaves
	must(t, s.stop())
	// The same once more, and again a longer one: what was is not forgotten.
	s = start(time.Hour)
	if got := s.keeper.policy.OlderLeaves; !got.Equal(older) {
		t.Errorf("after a restart older leaves live until %s, want %s", got, older)
	}
	must(t, s.stop())
	s = start(2 * time.Hour)
	if got := s.keeper.policy.OlderLeaves; !got.Equal(older) {
		t.Errorf("with a longer life older leaves live until %s, want %s", got, older)
	}
	if s.state("intermediate-1") != ca.Retired {
		t.Error("the old issuer is removed while leaves of it live")
	}
}

// An agent that is not heard after the start of a server counts as long as it may have leaves.
func TestAnAgentWithLeavesOfALongerLifeCounts(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.enrol("node-1")
	must(t, s.stop())
	c.life = time.Hour
	c.ahead.Store(int64(2 * time.Hour))
	s = c.start(t, nil)
	c.ahead.Store(int64(25 * time.Hour))
	if n := len(s.keeper.validators(c.now())); n != 1 {
		t.Errorf("%d agents count, want the one that may have leaves of 24 h", n)
	}
	c.ahead.Store(int64(8 * 24 * time.Hour))
	if n := len(s.keeper.validators(c.now())); n != 0 {
		t.Errorf("%d agents count, though all that they had has ended", n)
	}
}
