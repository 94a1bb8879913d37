package agent

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
)

const (
	// keyName is the agent's key in its keystore. One key for life: the server knows the agent by it.
	keyName = "agent"
	// enrolCall bounds one try at the enrol door.
	enrolCall = 15 * time.Second
	// maxTokenFile in bytes.
	maxTokenFile = 4 << 10
)

// ErrRefused is the server's no to an enrolment: another try would get the same.
var ErrRefused = errors.New("the server refuses")

// TokenSource gives the join token of an agent that is not enrolled yet; it is not asked otherwise.
type TokenSource func(ctx context.Context) (identity.JoinToken, error)

// JoinTokenFile reads the token from a file that only its owner may read.
func JoinTokenFile(path string) TokenSource {
	return func(context.Context) (identity.JoinToken, error) {
		raw, err := durable.ReadSecret(path, maxTokenFile)
		if errors.Is(err, fs.ErrNotExist) {
			return identity.JoinToken{}, fmt.Errorf("this agent is not enrolled and the join token file %s does not exist: make a token with `signet join-token create` and put it there", path)
		}
		if err != nil {
			return identity.JoinToken{}, fmt.Errorf("join token: %w", err)
		}
		t, err := identity.ParseJoinToken(string(raw))
		if err != nil {
			return identity.JoinToken{}, fmt.Errorf("join token file %s: %w", path, err)
		}
		return t, nil
	}
}

// loadMember restores the enrolment from the state folder; nil when there is none.
func (a *Agent) loadMember(ctx context.Context) (*member, error) {
	var e enrolment
	ok, err := a.load(enrolmentFile, maxEnrolmentFile, &e)
	if !ok || err != nil {
		return nil, err
	}
	damaged := func(err error) error {
		return fmt.Errorf("%s does not fit together: %w; %s", a.path(enrolmentFile), err, remedyFor(enrolmentFile))
	}
	ref, err := keystore.ParseRef(e.Key)
	if err != nil {
		return nil, damaged(err)
	}
	key, err := a.keys.Open(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("open the agent's key: %w", err)
	}
	m, err := newMember(e, key)
	if err != nil {
		return nil, damaged(err)
	}
	return m, nil
}

// ownKey is the agent's key, made where it is not there. It is durable before any token is spent on it,
// so that a crash at any point leaves a key that the server may already know.
func (a *Agent) ownKey(ctx context.Context) (keystore.Key, error) {
	key, err := a.keys.Create(ctx, keyName, keystore.ECDSAP256, 0)
	if err != nil {
		return nil, fmt.Errorf("make or open the agent's key: %w", err)
	}
	return key, nil
}

func csrOf(key keystore.Key) ([]byte, error) {
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("sign a certificate request with the agent's key: %w", err)
	}
	return csr, nil
}

// enrol joins the cluster of the token and stores the result. While nobody answers it tries for ever; a no is final.
//
// The server may have spent the token although its answer never came here, in this run or one before. While the token lives
// it lets the same key in with it again; afterwards the key alone is evidence enough.
func (a *Agent) enrol(ctx context.Context) (*member, error) {
	if a.config.JoinToken == nil {
		return nil, fmt.Errorf("agent in %s is not enrolled and has no join token: make one with `signet join-token create` and name its file in join_token_file", a.config.StateDir)
	}
	t, err := a.config.JoinToken(ctx)
	if err != nil {
		return nil, err
	}
	key, err := a.ownKey(ctx)
	if err != nil {
		return nil, err
	}
	csr, err := csrOf(key)
	if err != nil {
		return nil, err
	}
	var ca atomic.Pointer[x509.Certificate]
	wrong := &peerError{}
	cc, err := dial(t.Door, enrolTLS(t, a.now, wrong, ca.Store), a.dial)
	if err != nil {
		return nil, fmt.Errorf("enrol door %s: %w", t.Door, err)
	}
	defer cc.Close()
	byToken := &signetv1.EnrolRequest{Csr: csr, Evidence: &signetv1.EnrolRequest_JoinToken{JoinToken: &signetv1.JoinToken{Secret: t.Secret}}}
	answer, err := a.askEnrol(ctx, cc, t.Door, byToken, wrong)
	if err != nil && final(err) && wrong.get() == nil {
		byKey := &signetv1.EnrolRequest{Csr: csr, Evidence: &signetv1.EnrolRequest_EnrolledKey{EnrolledKey: &signetv1.EnrolledKey{Agent: t.Agent}}}
		if again, kerr := a.askEnrol(ctx, cc, t.Door, byKey, wrong); kerr == nil {
			a.log.Info("the join token was spent by an earlier try of this agent; enrolled by its key", "agent", t.Agent)
			answer, err = again, nil
		}
	}
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case wrong.get() != nil:
		return nil, fmt.Errorf("enrol at %s: %w; if the control CA was made anew, ask for a new join token", t.Door, wrong.get())
	case err != nil:
		return nil, fmt.Errorf("enrol agent %s at %s: %w: %s", t.Agent, t.Door, ErrRefused, clip(status.Convert(err).Message(), 256))
	}
	if answer.Agent != t.Agent || answer.TrustDomain != t.TrustDomain || answer.Cluster != t.Cluster {
		return nil, fmt.Errorf("enrol agent %s at %s: the answer is for agent %q of cluster %q in %q", t.Agent, t.Door,
			clip(answer.Agent, 63), clip(answer.Cluster, 63), clip(answer.TrustDomain, 255))
	}
	m, err := newMember(enrolment{
		Agent: t.Agent, TrustDomain: t.TrustDomain, Cluster: t.Cluster, EnrolDoor: t.Door, AgentDoor: answer.AgentDoor,
		ControlCA: ca.Load().Raw, LogVerifierKey: answer.LogVerifierKey, Key: key.Ref().String(),
		Chain: answer.CertificateChain, Received: a.now().UTC(),
	}, key)
	if err != nil {
		return nil, fmt.Errorf("enrol agent %s at %s: what the server answered does not fit together: %w", t.Agent, t.Door, err)
	}
	if err := a.store(enrolmentFile, m.enrolment); err != nil {
		return nil, err
	}
	a.log.Info("enrolled", "agent", m.Agent, "cluster", m.Cluster, "trust_domain", m.TrustDomain, "agent_door", m.AgentDoor, "not_after", utc(m.leaf.NotAfter))
	return m, nil
}

// askEnrol calls the enrol door until somebody answers.
func (a *Agent) askEnrol(ctx context.Context, cc *grpc.ClientConn, door string, req *signetv1.EnrolRequest, wrong *peerError) (*signetv1.EnrolResponse, error) {
	wait := &backoff.ExponentialBackOff{InitialInterval: 500 * time.Millisecond, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: maxReconnect}
	return backoff.Retry(ctx, func() (*signetv1.EnrolResponse, error) {
		call, cancel := context.WithTimeout(ctx, enrolCall)
		defer cancel()
		cc.ResetConnectBackoff()
		r, err := signetv1.NewEnrolmentClient(cc).Enrol(call, req)
		if err != nil && (final(err) || wrong.get() != nil) {
			return nil, backoff.Permanent(err)
		}
		return r, err
	}, backoff.WithBackOff(wait), backoff.WithMaxElapsedTime(0), backoff.WithNotify(func(err error, d time.Duration) {
		a.log.Warn("the enrol door does not answer; trying again", "door", door, "in", d.Round(time.Millisecond).String(), "err", clip(err.Error(), 512))
	}))
}

// final reports whether a server's answer will be the same next time.
func final(err error) bool {
	switch status.Code(err) {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.NotFound, codes.FailedPrecondition, codes.Unimplemented:
		return true
	}
	return false
}

// maxHint bounds what a server may put off a request by.
const maxHint = 5 * time.Minute

// notBefore is when to try again after err: wait, or later where the server has named a time (google.rpc.RetryInfo).
func notBefore(err error, wait time.Duration) time.Duration {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.RetryInfo); ok && info.RetryDelay.CheckValid() == nil {
			wait = max(wait, min(info.RetryDelay.AsDuration(), maxHint))
		}
	}
	return wait
}

// logOrigin reads the log's origin out of its verifier key and checks that it is one of this cluster's logs.
func logOrigin(e enrolment) (string, error) {
	v, err := note.NewVerifier(e.LogVerifierKey)
	if err != nil {
		return "", fmt.Errorf("the audit log's verifier key: %w", err)
	}
	if want := e.TrustDomain + "/" + e.Cluster + "/"; !strings.HasPrefix(v.Name(), want) {
		return "", fmt.Errorf("the audit log's verifier key is of %q, want a log of %s…", clip(v.Name(), 512), want)
	}
	return v.Name(), nil
}

// keepControl renews the agent's own certificate for as long as ctx lives: at its time by the agent door, and once it has
// expired by the enrol door, where the enrolled key alone is evidence enough for 30 days. It never gives up.
func (a *Agent) keepControl(ctx context.Context) {
	s := rotation.NewScheduler[struct{}](rotation.SchedulerConfig{Now: a.now})
	attempts := 0
	m := a.member.Load()
	s.Set(struct{}{}, rotation.RenewAt(m.leaf.SerialNumber.Bytes(), m.Received, m.leaf.NotAfter))
	s.Run(ctx, func([]struct{}) {
		m := a.member.Load()
		next, err := a.renewControl(ctx, m)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			attempts = 0
			a.metrics.controlRenewals.WithLabelValues(resultOK).Inc()
			a.log.Info("control certificate renewed", "not_after", utc(next.leaf.NotAfter))
			s.Set(struct{}{}, rotation.RenewAt(next.leaf.SerialNumber.Bytes(), next.Received, next.leaf.NotAfter))
			return
		}
		a.hub.turnedAway(err)
		attempts++
		result := resultFailed
		if status.Code(err) == codes.PermissionDenied {
			result = resultRefused
		}
		a.metrics.controlRenewals.WithLabelValues(result).Inc()
		left := m.leaf.NotAfter.Sub(a.now())
		wait := notBefore(err, rotation.RetryAfter([]byte(m.Agent), attempts, left))
		a.log.Warn("could not renew the control certificate; trying again", "attempt", attempts, "in", wait.Round(time.Millisecond).String(),
			"not_after", utc(m.leaf.NotAfter), "err", clip(err.Error(), 512))
		s.Set(struct{}{}, a.now().Add(wait))
	})
}

// renewControl gets, checks, stores and takes into use a new control certificate for the enrolled key.
func (a *Agent) renewControl(ctx context.Context, m *member) (*member, error) {
	csr, err := csrOf(m.key)
	if err != nil {
		return nil, err
	}
	e := m.enrolment
	e.Received = a.now().UTC()
	if left := m.leaf.NotAfter.Sub(a.now()); left > 0 {
		call, cancel := context.WithTimeout(ctx, min(max(left/3, minCall), maxCall))
		defer cancel()
		if e.Chain, err = a.link.renew(call, csr); err != nil {
			return nil, err
		}
	} else {
		answer, err := a.byEnrolledKey(ctx, m, csr)
		if err != nil {
			return nil, err
		}
		e.Chain, e.AgentDoor = answer.CertificateChain, answer.AgentDoor
	}
	next, err := newMember(e, m.key)
	if err != nil {
		return nil, fmt.Errorf("what the server sent does not fit together: %w", err)
	}
	if err := identity.CheckTimes(next.leaf, a.now()); err != nil {
		return nil, err
	}
	// Durable before use, so that a restart doesn't fall back to one that the server may no longer expect.
	if err := a.store(enrolmentFile, next.enrolment); err != nil {
		return nil, err
	}
	if err := a.link.use(next); err != nil {
		return nil, err
	}
	a.member.Store(next)
	return next, nil
}

func (a *Agent) byEnrolledKey(ctx context.Context, m *member, csr []byte) (*signetv1.EnrolResponse, error) {
	wrong := &peerError{}
	cc, err := dial(m.EnrolDoor, serverTLS(m, a.now, wrong, nil), a.dial)
	if err != nil {
		return nil, fmt.Errorf("enrol door %s: %w", m.EnrolDoor, err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(ctx, enrolCall)
	defer cancel()
	answer, err := signetv1.NewEnrolmentClient(cc).Enrol(ctx, &signetv1.EnrolRequest{
		Csr: csr, Evidence: &signetv1.EnrolRequest_EnrolledKey{EnrolledKey: &signetv1.EnrolledKey{Agent: m.Agent}},
	})
	switch {
	case wrong.get() != nil:
		return nil, fmt.Errorf("enrol door %s: %w", m.EnrolDoor, wrong.get())
	case err != nil:
		return nil, fmt.Errorf("enrol door %s, by the enrolled key: %w", m.EnrolDoor, err)
	}
	if answer.LogVerifierKey != m.LogVerifierKey {
		// The pin holds: a log that is replaced must not pass unseen. Checkpoints will be refused and say so.
		a.log.Error("the server names another audit log than the one pinned at enrolment; the pin is kept", "pinned", m.LogVerifierKey, "named", clip(answer.LogVerifierKey, 512))
	}
	return answer, nil
}

// controlNotAfter is the end of the control certificate; zero while there is none.
func (a *Agent) controlNotAfter() time.Time {
	if m := a.member.Load(); m != nil {
		return m.leaf.NotAfter
	}
	return time.Time{}
}
