package agent

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/trust"
)

// The files of a state folder. Each is whole or absent after a crash (internal/durable); none holds a key: the agent's own
// is in keys/, those of workloads are in cache/, sealed (cache.go).
const (
	enrolmentFile     = "enrolment.json"
	bundleFile        = "bundle.json"
	registrationsFile = "registrations.json"
	lastWordFile      = "acknowledged.json"
	witnessFile       = "checkpoint"
	evidenceFile      = witnessFile + ".evidence" // as audit.Witness names it
	keysDir           = "keys"

	maxEvidence          = 32 << 10 // of what is told of it, in bytes
	maxEnrolmentFile     = 256 << 10
	maxBundleFile        = 4 << 20
	maxRegistrationsFile = 64 << 20
	maxLastWordFile      = 64 << 10
)

// enrolment is what an agent knows since a server has taken it in.
type enrolment struct {
	Agent       string `json:"agent"`
	TrustDomain string `json:"trust_domain"`
	Cluster     string `json:"cluster"`
	EnrolDoor   string `json:"enrol_door"`
	AgentDoor   string `json:"agent_door"`
	// ControlCA is DER. Nobody else's word counts at the doors.
	ControlCA []byte `json:"control_ca"`
	// LogVerifierKey pins the audit log, see c2sp.org/signed-note.
	LogVerifierKey string `json:"log_verifier_key"`
	// Key names the enrolled key in the keystore.
	Key string `json:"key"`
	// Chain is the control certificate, DER, leaf first.
	Chain [][]byte `json:"chain"`
	// Received is when the chain came; its renewal time follows from it, over restarts too.
	Received time.Time `json:"received"`
}

// member is an enrolment whose parts have been parsed and checked against each other. Immutable.
type member struct {
	enrolment
	td        spiffeid.TrustDomain
	controlCA *x509.Certificate
	leaf      *x509.Certificate
	key       keystore.Key
}

// newMember refuses an enrolment that contradicts itself. An expired certificate is not a contradiction.
func newMember(e enrolment, key keystore.Key) (*member, error) {
	m := &member{enrolment: e, key: key}
	var err error
	if m.td, err = identity.ParseTrustDomain(e.TrustDomain); err != nil {
		return nil, err
	}
	if m.controlCA, err = x509.ParseCertificate(e.ControlCA); err != nil {
		return nil, fmt.Errorf("control CA: %w", err)
	}
	if len(e.Chain) == 0 || len(e.Chain) > identity.MaxChain {
		return nil, fmt.Errorf("control certificate: chain of %d certificates, want 1 to %d", len(e.Chain), identity.MaxChain)
	}
	if m.leaf, err = x509.ParseCertificate(e.Chain[0]); err != nil {
		return nil, fmt.Errorf("control certificate: %w", err)
	}
	// At its own NotAfter: whether it is still good is asked when it is used.
	c, err := identity.VerifyControl([]*x509.Certificate{m.leaf}, m.controlCA, m.leaf.NotAfter, x509.ExtKeyUsageClientAuth)
	if err != nil {
		return nil, fmt.Errorf("control certificate: %w", err)
	}
	if want := (identity.Control{TrustDomain: m.td, Cluster: e.Cluster, Role: identity.RoleAgent, Name: e.Agent}); c != want {
		return nil, fmt.Errorf("control certificate names %s %s of cluster %s in %s, want agent %s of cluster %s in %s",
			c.Role, c.Name, c.Cluster, c.TrustDomain, e.Agent, e.Cluster, e.TrustDomain)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil || !bytes.Equal(spki, m.leaf.RawSubjectPublicKeyInfo) {
		return nil, errors.New("control certificate is for another key than the agent's")
	}
	if _, err := logOrigin(e); err != nil {
		return nil, err
	}
	return m, nil
}

// storedBundle is bundle.json. The cluster stands in it so that a folder is not taken over to another one unnoticed.
type storedBundle struct {
	TrustDomain string   `json:"trust_domain"`
	Sequence    uint64   `json:"sequence"`
	Roots       [][]byte `json:"roots"`
}

// storedRegistrations is registrations.json.
type storedRegistrations struct {
	Cluster       string               `json:"cluster"`
	Revision      uint64               `json:"revision"`
	Registrations []storedRegistration `json:"registrations"`
}

type storedRegistration struct {
	Name       string              `json:"name"`
	ID         string              `json:"spiffe_id"`
	Selectors  []identity.Selector `json:"selectors"`
	TTLSeconds int64               `json:"ttl_seconds,omitempty"`
	Priority   int32               `json:"priority,omitempty"`
}

func (a *Agent) path(name string) string { return filepath.Join(a.config.StateDir, name) }

// load reads one of the files into v; false when it is not there.
func (a *Agent) load(file string, limit int64, v any) (bool, error) {
	err := durable.ReadValue(a.path(file), limit, v)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case errors.Is(err, durable.ErrDamaged):
		return false, a.damaged(file, err)
	}
	return err == nil, err
}

func (a *Agent) damaged(file string, err error) error {
	return fmt.Errorf("%s is damaged: %w; %s", a.path(file), err, remedyFor(file))
}

func remedyFor(file string) string {
	if file == enrolmentFile {
		return "remove it and enrol this agent again with a new join token"
	}
	return "remove it, it is fetched again from the server"
}

// evidence is what convicts the audit log; "" = nothing does. Its file stays until somebody moves it away.
func (a *Agent) evidence() string {
	f, err := os.Open(a.path(evidenceFile))
	if errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	if err == nil {
		defer f.Close()
		var text []byte
		if text, err = io.ReadAll(io.LimitReader(f, maxEvidence)); err == nil {
			return string(text)
		}
	}
	return "the evidence can't be read: " + err.Error()
}

func (a *Agent) store(file string, v any) error { return durable.WriteValue(a.path(file), v, 0o600) }

// loadBundle restores what was last believed, so that neither a restart without a server leaves workloads without trust,
// nor a restart lets an older bundle in again.
func (a *Agent) loadBundle(m *member) error {
	var s storedBundle
	ok, err := a.load(bundleFile, maxBundleFile, &s)
	if !ok || err != nil {
		return err
	}
	if s.TrustDomain != m.TrustDomain {
		return fmt.Errorf("%s is of trust domain %s, but this agent is enrolled in %s: give it a state folder of its own", a.path(bundleFile), clip(s.TrustDomain, 255), m.TrustDomain)
	}
	b, err := parseBundle(m.td, s.Sequence, s.Roots)
	if err != nil {
		return a.damaged(bundleFile, err)
	}
	a.stored.loaded(b)
	return a.bundles.Set(b)
}

func (a *Agent) storeBundle(b trust.Bundle) error {
	s := storedBundle{TrustDomain: b.TrustDomain().Name(), Sequence: b.Sequence()}
	for _, r := range b.Roots() {
		s.Roots = append(s.Roots, r.Raw)
	}
	return a.store(bundleFile, s)
}

func parseBundle(td spiffeid.TrustDomain, sequence uint64, der [][]byte) (trust.Bundle, error) {
	if len(der) > trust.MaxRoots {
		return trust.Bundle{}, fmt.Errorf("bundle of %d roots: at most %d are allowed", len(der), trust.MaxRoots)
	}
	roots := make([]*x509.Certificate, len(der))
	for i, d := range der {
		var err error
		if roots[i], err = x509.ParseCertificate(d); err != nil {
			return trust.Bundle{}, fmt.Errorf("root %d of the bundle: %w", i+1, err)
		}
	}
	return trust.NewBundle(td, sequence, roots)
}

func (a *Agent) loadRegistrations(m *member) error {
	var s storedRegistrations
	ok, err := a.load(registrationsFile, maxRegistrationsFile, &s)
	if !ok || err != nil {
		return err
	}
	if s.Cluster != m.Cluster {
		return fmt.Errorf("%s is of cluster %s, but this agent is enrolled in %s: give it a state folder of its own", a.path(registrationsFile), clip(s.Cluster, 63), m.Cluster)
	}
	list := make([]identity.Registration, 0, len(s.Registrations))
	for _, r := range s.Registrations {
		reg, err := registration(m, r)
		if err != nil {
			return a.damaged(registrationsFile, err)
		}
		list = append(list, reg)
	}
	a.hub.setRegistrations(list)
	return nil
}

func (a *Agent) storeRegistrations(m *member, revision uint64, list []identity.Registration) error {
	s := storedRegistrations{Cluster: m.Cluster, Revision: revision, Registrations: []storedRegistration{}}
	for _, r := range list {
		s.Registrations = append(s.Registrations, storedRegistration{
			Name: r.Name, ID: r.ID.String(), Selectors: r.Selectors, TTLSeconds: int64(r.TTL / time.Second), Priority: r.Priority,
		})
	}
	return a.store(registrationsFile, s)
}

// registration checks one that came from the server or the disk. An agent is told only its own, without the list of agents.
func registration(m *member, r storedRegistration) (identity.Registration, error) {
	id, err := identity.ParseID(r.ID)
	if err != nil {
		return identity.Registration{}, fmt.Errorf("registration %q: %w", clip(r.Name, 63), err)
	}
	const most = int64(100 * 365 * 24 * time.Hour / time.Second)
	if r.TTLSeconds < 0 || r.TTLSeconds > most {
		return identity.Registration{}, fmt.Errorf("registration %q: ttl of %d s", clip(r.Name, 63), r.TTLSeconds)
	}
	reg := identity.Registration{
		Name: r.Name, ID: id, Agents: []string{m.Agent}, Selectors: r.Selectors,
		TTL: time.Duration(r.TTLSeconds) * time.Second, Priority: r.Priority,
	}
	return reg, reg.Validate(m.td)
}
