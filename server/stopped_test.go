package server

import (
	"context"
	"crypto/x509"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/keystore"
)

// stoppedSays is what status and list of the CAs say of why nothing can be issued; they say the same.
func (l *live) stoppedSays() *adminv1.IssuingStopped {
	l.t.Helper()
	st, err := l.rotations().RotationStatus(l.t.Context(), &adminv1.RotationStatusRequest{})
	must(l.t, err)
	list, err := l.rotations().ListAuthorities(l.t.Context(), &adminv1.ListAuthoritiesRequest{})
	must(l.t, err)
	if (st.Stopped == nil) != (list.Stopped == nil) {
		l.t.Errorf("status says %v, and the list of CAs %v", st.Stopped, list.Stopped)
	}
	return st.Stopped
}

func TestALogThatTakesNothingStopsIssuingWhereverThatIsSaid(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, func(s *Server) { s.upkeepEvery = 20 * time.Millisecond })
	able := func() bool {
		mesh, control := gauged(t, s, `signet_issuable_seconds{kind="intermediate"}`), gauged(t, s, `signet_issuable_seconds{kind="control"}`)
		return mesh > 0 && control > 0
	}
	unable := func() bool {
		mesh, control := gauged(t, s, `signet_issuable_seconds{kind="intermediate"}`), gauged(t, s, `signet_issuable_seconds{kind="control"}`)
		return mesh == 0 && control == 0
	}
	soon(t, "certificates can be made", able)
	if said := s.stoppedSays(); said != nil {
		t.Errorf("while they can: %v", said)
	}
	away := LogDir(c.dir) + ".away"
	must(t, os.Rename(LogDir(c.dir), away))
	// Nobody asks for readiness here.
	soon(t, "the metric is 0", unable)
	f, ok := issuingOf(t, s.ready(t))
	if !ok || !f.Blocks() || !strings.HasPrefix(f.Message, "nothing can be issued since ") || !strings.Contains(f.Message, "the log cannot be written") || f.Mend != "df -h "+LogDir(c.dir) {
		t.Errorf("readiness says %+v", f)
	}
	if said := s.stoppedSays(); said == nil || said.Since == nil || !strings.Contains(said.Why, "the log cannot be written") {
		t.Errorf("the status says %v", said)
	}
	must(t, os.Rename(away, LogDir(c.dir)))
	soon(t, "certificates can be made again", able)
	if f, ok := issuingOf(t, s.ready(t)); ok {
		t.Errorf("readiness goes on saying %+v", f)
	}
}

func TestALogThatHangsStopsIssuing(t *testing.T) {
	t.Parallel()
	tried := logTried{begun: time.Now().Add(-time.Second)}
	if h := tried.halt("log", time.Now()); h != nil {
		t.Errorf("after a second: %+v", h)
	}
	now := time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	tried.begun = time.Now().Add(-logPatience - time.Second)
	if h := tried.halt("log", now); h == nil || !strings.Contains(h.Why, "hangs") || now.Sub(h.Since) < logPatience {
		t.Errorf("after %s: %+v", logPatience, h)
	}
}

func TestAnIssuerThatHasEndedIsNotSaidToSign(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	c.manual = true
	s := c.start(t, nil)
	if said := s.stoppedSays(); said != nil {
		t.Errorf("a young one: %v", said)
	}
	c.ahead.Store(int64(1001 * time.Hour))
	said := s.stoppedSays()
	if said == nil || said.Since == nil || !strings.Contains(said.Why, "intermediate-1 expired at ") {
		t.Errorf("it says %v", said)
	}
	if f, _ := issuingOf(t, s.ready(t)); !strings.HasSuffix(f.Message, said.GetWhy()) || f.Mend != said.GetMend() {
		t.Errorf("readiness says %+v, and the status %v", f, said)
	}
}

// A root key outside Signet signs what it likes.
func TestAnIntermediateEndsWithItsRootWhereverItIsShown(t *testing.T) {
	t.Parallel()
	end := time.Now().Add(100 * time.Hour).UTC().Truncate(time.Second)
	root := newRootUntil(t, end)
	c := &cluster{name: "east", dir: shortDir(t), root: root, keys: keystore.NewMemory()}
	r, err := Init(t.Context(), InitConfig{Folder: c.folder(), Ceremony: byX509{}})
	must(t, err)
	_, err = Install(t.Context(), InstallConfig{
		Folder: c.folder(), Rotation: testRotation(), RootFingerprint: root.fingerprint(),
		Chain: root.intermediate(t, r.CSR, func(x *x509.Certificate) { x.NotAfter = end.Add(100 * time.Hour) }),
	})
	must(t, err)
	shown, err := Show(t.Context(), c.dir)
	must(t, err)
	for _, a := range shown.Authorities {
		if a.ID != "intermediate-1" {
			continue
		}
		if !a.NotAfter.Equal(end) || !a.Certificate.NotAfter.After(end) {
			t.Errorf("it is shown to end at %s, want %s", a.NotAfter, end)
		}
		return
	}
	t.Error("it is not shown")
}

func TestARootThatHasNotBegunIsNotBelieved(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	key := newRoot(t)
	template := caTemplate("tomorrow")
	template.MaxPathLen, template.MaxPathLenZero = 1, false
	template.NotBefore = time.Now().Add(24 * time.Hour)
	cert := sign(t, template, template, key.key.Public(), key.key)
	for what, ask := range map[string]func() error{
		"trust add": func() error {
			_, err := s.rotations().AddTrust(t.Context(), &adminv1.AddTrustRequest{Root: cert.Raw, RootFingerprint: ca.CertificateFingerprint(cert.Raw)})
			return err
		},
		"rotation start root": func() error {
			_, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "root", Root: cert.Raw, RootFingerprint: ca.CertificateFingerprint(cert.Raw), DryRun: true})
			return err
		},
	} {
		if err := ask(); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "begins at "+stamp(cert.NotBefore)) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if got := len(s.keeper.current.Load().bundle.Roots()); got != 1 {
		t.Errorf("%d roots are believed", got)
	}
	// Within the skew it is the clocks that differ.
	c.ahead.Store(int64(24*time.Hour - s.keeper.policy.Skew/2))
	_, err := s.rotations().AddTrust(context.WithoutCancel(t.Context()), &adminv1.AddTrustRequest{Root: cert.Raw, RootFingerprint: ca.CertificateFingerprint(cert.Raw)})
	must(t, err)
}

func TestWhatCouldNotBeStoredIsNotARefusal(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	c.manual = true
	s := c.start(t, nil)
	for on, ask := range map[string]func() error{
		"INSERT ON banned_identities": func() error {
			_, err := s.rotations().BanIdentity(t.Context(), &adminv1.BanIdentityRequest{SpiffeId: identityA, Reason: "stolen"})
			return err
		},
		"UPDATE ON authorities": func() error {
			_, err := s.rotations().TaintAuthority(t.Context(), &adminv1.TaintAuthorityRequest{Authority: "intermediate-1", Reason: "stolen"})
			return err
		},
	} {
		mend := breakStore(t, c, on)
		if err := ask(); status.Code(err) != codes.Unavailable {
			t.Errorf("%s fails: %v", on, err)
		}
		mend()
	}
}

// An agent withdraws what it is not given, and can say why only if it is told.
func TestAnAgentIsToldWhichOfItsIdentitiesAreBanned(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.enrol("node-1")
	s.apply(false, registration("a", "node-1"), registration("b", "node-1"))
	told := func() string {
		var gives, shut []string
		for _, r := range s.directory.set("node-1").Registrations {
			gives = append(gives, r.Name)
		}
		for _, r := range s.directory.set("node-1").Banned {
			shut = append(shut, r.Name)
		}
		return strings.Join(gives, " ") + "; banned: " + strings.Join(shut, " ")
	}
	_, err := s.rotations().BanIdentity(t.Context(), &adminv1.BanIdentityRequest{SpiffeId: identityA, Reason: "stolen"})
	must(t, err)
	if got, want := told(), "b; banned: a"; got != want {
		t.Errorf("it is told %q, want %q", got, want)
	}
	_, err = s.rotations().UnbanIdentity(t.Context(), &adminv1.UnbanIdentityRequest{SpiffeId: identityA})
	must(t, err)
	if got, want := told(), "a b; banned: "; got != want {
		t.Errorf("it is told %q, want %q", got, want)
	}
}
