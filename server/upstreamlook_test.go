package server

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/test/bubble"
)

// lookedAt is an upstream authority that says whether it would sign.
type lookedAt struct {
	*atOnce
	why   error
	ends  time.Time
	under []*x509.Certificate
}

func (l *lookedAt) Look(_ context.Context, under *x509.Certificate, life time.Duration) (string, time.Time, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.under = append(l.under, under)
	if life < time.Hour {
		return "", time.Time{}, errors.New("that is no life of an intermediate")
	}
	return "the one issuer leads to the root", l.ends, l.why
}

type errPassing struct{ error }

func (errPassing) Away() bool { return true }

// A key in memory ends with the process, whether a request has failed or a look says that the next would.
func TestAnUpstreamThatDoesNotSignIsFeltAtARestartWhereKeysAreInMemory(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s, err := New(t.Context(), c.config())
	must(t, err)
	defer func() { must(t, s.closeAll()) }()
	s.config.Upstream = unasked{}
	s.keeper.upstreamState.note(errors.New("the issuer is gone"), s.now())
	for backend, felt := range map[string]bool{keystore.BackendMemory: true, keystore.BackendFile: false} {
		set := *s.keeper.current.Load()
		set.rows = slices.Clone(set.rows)
		for i := range set.rows {
			set.rows[i].Key.Backend = backend
		}
		s.keeper.current.Store(&set)
		f := s.checkUpstream(t.Context())[0]
		if strings.Contains(f.Message, "not beyond a restart of this server") != felt || !strings.HasSuffix(f.Message, ": the issuer is gone") {
			t.Errorf("%s: %s", backend, f.Message)
		}
	}
}

// It signs once in days, so whether it would the next time is looked at meanwhile, at the pace at which keys are.
func TestAnUpstreamThatWouldNotSignIsSeenWithinAMinute(t *testing.T) {
	t.Parallel()
	c, u := newOnline(t, "east")
	l := &lookedAt{atOnce: u}
	c.upstream = l
	s := c.start(t, often)
	soon(t, "the first intermediate signs", func() bool { return s.signing() == "intermediate-1" })
	must(t, s.stop())
	began, asked := s.now(), u.asked
	bubble.Test(t, func(t *testing.T) {
		start := time.Now()
		now := func() time.Time { return began.Add(time.Since(start)) }
		s.now, s.keeper.folder.Now = now, now
		s.keeper.upstreamState = upstreamState{}
		said := func() check.Finding { return s.checkUpstream(t.Context())[0] }
		if f := said(); f.Level != check.OK || !strings.Contains(f.Message, "was not looked at") {
			t.Errorf("before anybody has looked: %+v", f)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			s.lookAtKeys(ctx)
		}()
		time.Sleep(150 * time.Second)
		if f := said(); f.Level != check.OK || !strings.HasPrefix(f.Message, "the one issuer leads to the root, as seen at ") {
			t.Errorf("while it would sign: %+v", f)
		}
		// Vault was away when it was looked at, and counts as missed until somebody has asked again: that must not take a minute.
		u.set(func() { l.why = errPassing{errors.New("Vault is sealed")} })
		time.Sleep(keysEvery + time.Second)
		if f := said(); f.Level != check.OK {
			t.Errorf("while it can't be told, and it was well before: %+v", f)
		}
		u.set(func() { l.why = nil })
		time.Sleep(keysAgain + time.Second)
		if seen := s.keeper.upstreamState.seen().Looked; now().Sub(seen) > keysAgain+time.Second {
			t.Errorf("since Vault is back it was looked at %s ago", now().Sub(seen))
		}
		u.set(func() { l.why = errors.New("the issuer is gone") })
		since := now()
		time.Sleep(keysEvery + time.Second)
		f := said()
		if f.Level != check.Warning || f.Blocks() || len(f.Stops) != 1 || !strings.Contains(f.Message, "no intermediate would be signed: the next is due at ") ||
			!strings.Contains(f.Message, "nothing can be issued from ") || !strings.HasSuffix(f.Message, ": the issuer is gone") {
			t.Errorf("a minute after the issuer is gone: %+v", f)
		}
		first := s.keeper.upstreamState.seen().Unfit.Since
		// That it can't be told says nothing new.
		u.set(func() { l.why = errPassing{errors.New("Vault is sealed")} })
		time.Sleep(5 * time.Minute)
		if got := said(); got.Level != f.Level || !strings.HasSuffix(got.Message, ": the issuer is gone") {
			t.Errorf("while it can't be told: %+v", got)
		}
		if at := s.keeper.upstreamState.seen().Unfit.Since; !at.Equal(first) || at.Before(since) {
			t.Errorf("it is gone since %s, and it is said since %s, then %s", since, first, at)
		}
		u.set(func() { l.why = nil })
		time.Sleep(keysAgain + time.Second)
		if f := said(); f.Level != check.OK {
			t.Errorf("mended: %+v", f)
		}
		cancel()
		<-ended
		if n := len(l.under); n < 30 || n > 60 || !l.under[n-1].Equal(u.roots[0].cert) {
			t.Errorf("looked %d times in ten minutes", n)
		}
	})
	if u.asked != asked {
		t.Error("something was signed for it")
	}
}
