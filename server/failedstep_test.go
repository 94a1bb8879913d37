package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/test/bubble"
)

// barren makes no further intermediate's key as long as why says so.
type barren struct {
	keystore.Store
	tries atomic.Int64
	why   atomic.Pointer[error]
}

func (b *barren) Create(ctx context.Context, name string, alg keystore.Algorithm, after int) (keystore.Key, error) {
	if why := b.why.Load(); why != nil && name == IntermediateKey {
		b.tries.Add(1)
		return nil, *why
	}
	return b.Store.Create(ctx, name, alg, after)
}

// sealedKeys don't tell either which key that would be.
type sealedKeys struct{ *barren }

func (s sealedKeys) Find(ctx context.Context, name string, alg keystore.Algorithm, after int) (keystore.Ref, bool, error) {
	if why := s.why.Load(); why != nil && name == IntermediateKey {
		return keystore.Ref{}, false, *why
	}
	return s.Store.Find(ctx, name, alg, after)
}

// withSealedKeys is a server on keys that are there as long as why says nothing.
func withSealedKeys(t *testing.T) (sealedKeys, *live) {
	t.Helper()
	c := newCluster(t, "east")
	keys := sealedKeys{&barren{Store: c.keys}}
	c.stored = keys
	return keys, c.start(t, nil)
}

// Who is told to come again, once Vault is back, does not take it for a refusal; and a dry run says the same as the command.
func TestASuccessorWhoseKeyCannotBeMadeIsRefusedInADryRunAsThen(t *testing.T) {
	t.Parallel()
	keys, s := withSealedKeys(t)
	start := startsIntermediate(2)
	for _, try := range []struct {
		why    error
		code   codes.Code
		reason string
	}{
		{fmt.Errorf("Vault is sealed: %w", keystore.ErrAway), codes.Unavailable, "issuer_unavailable"},
		{errors.New("the key is exportable"), codes.FailedPrecondition, "invalid"},
	} {
		keys.why.Store(&try.why)
		for _, dry := range []bool{true, false} {
			_, err := start(t.Context(), s.rotations(), dry)
			if got := status.Convert(err); got.Code() != try.code || got.Message() != try.why.Error() {
				t.Errorf("dry run %v: %v, want %s: %v", dry, err, try.code, try.why)
			}
		}
		_, err := rotationService{adminService: adminService{Server: s.Server}}.answer(s.keeper.startIntermediate(t.Context(), decision{verb: "start", dry: true}, 1))
		if r := (*refusal)(nil); !errors.As(err, &r) || r.reason != try.reason {
			t.Errorf("%v: it counts as %+v, want %s", try.why, r, try.reason)
		}
		// What makes no key asks for none.
		if _, err := adds(newRoot(t))(t.Context(), s.rotations(), true); err != nil {
			t.Errorf("another dry run: %v", err)
		}
	}
	keys.why.Store(nil)
	for _, dry := range []bool{true, false} {
		if r, err := start(t.Context(), s.rotations(), dry); err != nil || r.Requested != 2 {
			t.Errorf("dry run %v: %+v, %v", dry, r, err)
		}
	}
}

func TestADryRunWhoseConsequencesFailDoesNotSayThatItIsDone(t *testing.T) {
	t.Parallel()
	keys, s := withSealedKeys(t)
	sealed := fmt.Errorf("Vault is sealed: %w", keystore.ErrAway)
	keys.why.Store(&sealed)
	for _, try := range []struct {
		dry  bool
		says string
	}{
		{true, "it would be done, but what follows from it could not be now: "},
		{false, "it is done, but what follows from it could not be, and is tried again: "},
	} {
		_, err := taints("intermediate-1")(t.Context(), s.rotations(), try.dry)
		if got := status.Convert(err); got.Code() != codes.Unavailable || !strings.HasPrefix(got.Message(), try.says) || !strings.Contains(got.Message(), "Vault is sealed") {
			t.Errorf("dry run %v: %v", try.dry, err)
		}
	}
}

// successorDue is when a successor is to be made.
func successorDue(c *cluster, s *Server) {
	mesh, _ := s.issuers.Snapshot().Active(identity.Mesh)
	life := mesh.NotAfter().Sub(mesh.Certificate().NotBefore)
	c.ahead.Store(int64(life * 6 / 10))
}

// A successor that can't be made is due for months: nobody may have to read a log to learn of it.
func TestAStepThatFailsIsSaidWhereItIsLookedFor(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	keys := &barren{Store: c.keys}
	c.stored = keys
	s := c.start(t, func(s *Server) { s.upkeepEvery = time.Hour })
	k := s.keeper
	step := func(of func(*failedStep)) { // changes what is known of the step
		t.Helper()
		k.mu.Lock()
		defer k.mu.Unlock()
		of(k.failing[stepID{"", ca.Prepared}])
	}
	itself := func() error { _, err := k.do(t.Context(), scheduled(), nil); return err }
	exportable := errors.New("transit/keys/east: the key is exportable")
	keys.why.Store(&exportable)
	successorDue(c, s.Server)
	if err := itself(); !errors.Is(err, errStep) || !errors.Is(err, exportable) {
		t.Fatalf("the step is taken: %v", err)
	}
	var said check.Finding
	for _, f := range s.ready(t) {
		if f.Code == check.CodeStep {
			said = f
		}
	}
	if said.Level != check.Warning || said.About != "successor" || !strings.Contains(said.Message, "it is to become prepared, because ") || !strings.HasSuffix(said.Message, exportable.Error()) {
		t.Errorf("readiness says %+v", said)
	}
	status, err := s.rotations().RotationStatus(t.Context(), &adminv1.RotationStatusRequest{})
	must(t, err)
	if next := status.Steps; len(next) != 1 || next[0].At != nil || len(next[0].Waits) != 1 || next[0].Waits[0].Code != waitFailed || !strings.HasSuffix(next[0].Waits[0].For, exportable.Error()) {
		t.Errorf("status says %v", next)
	}

	// It is left alone until its time, but for a person who asks.
	step(func(f *failedStep) { f.next = time.Now().Add(time.Hour) })
	before := keys.tries.Load()
	for range 10 {
		if err := itself(); !errors.Is(err, exportable) {
			t.Errorf("meanwhile it says %v", err)
		}
	}
	if n := keys.tries.Load() - before; n != 0 {
		t.Errorf("tried %d times before its time", n)
	}
	_, err = s.rotations().AdvanceRotation(t.Context(), &adminv1.AdvanceRotationRequest{})
	wantError(t, err, exportable.Error())
	if n := keys.tries.Load() - before; n != 1 {
		t.Errorf("tried %d times when a person asked", n)
	}

	keys.why.Store(nil)
	step(func(f *failedStep) { f.next = time.Time{} })
	must(t, itself())
	if got := s.state("intermediate-2"); got != ca.Prepared {
		t.Errorf("the successor is %q", got)
	}
	if left := k.failedSteps(func(error) bool { return false }); len(left) != 0 {
		t.Errorf("still said to fail: %v", left)
	}
}

// What fails on and on is tried seldom, and told seldom: at once when there is something new in it.
func TestAStepThatFailsOnAndOnIsTriedAndToldSeldom(t *testing.T) {
	t.Parallel()
	for name, try := range map[string]struct {
		why  error
		most time.Duration
	}{
		"for good": {errors.New("the key is exportable"), stepAgain},
		"away":     {fmt.Errorf("Vault is sealed: %w", keystore.ErrAway), awayAgain},
	} {
		t.Run(name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				k := newKeeper(&Folder{Now: time.Now, Logger: slog.New(slog.NewTextHandler(&log, nil))}, testRotation())
				s := rotation.Step{To: ca.Prepared}
				told := func() int { return strings.Count(log.String(), "could not take a step in the life of a CA") }
				begun, tries := time.Now(), 0
				for time.Since(begun) < 10*tellAgain {
					if k.pausing(s) == nil {
						k.failed(s, try.why)
						tries++
					}
					time.Sleep(time.Second)
				}
				// Each wait is up to half as long or short again as it would be.
				if most := int(10 * tellAgain / (try.most / 2)); tries > most || tries < most/4 {
					t.Errorf("tried %d times in %s", tries, 10*tellAgain)
				}
				if n := told(); n < 9 || n > 10 {
					t.Errorf("told %d times in %s:\n%s", n, 10*tellAgain, log.String())
				}
				before := told()
				k.failed(s, errors.New("permission denied"))
				if told() != before+1 {
					t.Error("another reason is not told")
				}
				if f := k.failedSteps(func(error) bool { return false }); len(f) != 1 || !f[0].Since.Equal(begun) || f[0].Why != "permission denied" {
					t.Errorf("it is said to fail %v", f)
				}
				k.forgetFailed([]rotation.Step{{To: ca.Prepared, Waits: []rotation.Wait{{Code: rotation.WaitTime}}}})
				if f := k.failedSteps(func(error) bool { return false }); len(f) != 0 {
					t.Errorf("it waits, and is said to fail: %v", f)
				}
			})
		})
	}
}

// What a key in Vault can't be used for, since Vault is away, is said of Vault alone.
func TestAStepThatWaitsForAVaultIsNotSaidTwice(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	keys := &barren{Store: c.keys}
	c.stored = keys
	s, err := New(t.Context(), c.config())
	must(t, err)
	defer func() { must(t, s.closeAll()) }()
	sealed := fmt.Errorf("Vault is sealed: %w", keystore.ErrAway)
	keys.why.Store(&sealed)
	successorDue(c, s)
	_, err = s.keeper.do(t.Context(), scheduled(), nil)
	if !errors.Is(err, keystore.ErrAway) {
		t.Fatal(err)
	}
	for _, try := range []struct {
		vault func() check.Vault
		said  int
	}{
		{nil, 1},
		{func() check.Vault { return check.Vault{} }, 1},
		{func() check.Vault { return check.Vault{Away: true, Since: time.Now(), Why: "Vault is sealed"} }, 0},
	} {
		s.config.Vault = try.vault
		if n := len(s.lookAtRotation(s.keeper.current.Load(), s.now()).Failed); n != try.said {
			t.Errorf("said %d times, want %d", n, try.said)
		}
	}
}
