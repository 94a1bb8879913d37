// Package config reads the one YAML file of a server or an agent.
//
// Reading is strict (strictyaml): what is unknown, given twice, of the wrong type or contradicts something else is a finding
// with its place in the file, and a file with findings is not used. Every value knows where it comes from (Settings).
package config

import (
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/internal/strictyaml"
	"github.com/signet-ca/signet/keystore"
)

// Server is the configuration of `signet serve` and of the commands that work on its folder. Paths are absolute.
type Server struct {
	TrustDomain spiffeid.TrustDomain `yaml:"trust_domain"`
	Cluster     string               `yaml:"cluster"`
	// Instance tells apart the servers of a cluster; part of the log's origin. Default <cluster>-1.
	Instance string   `yaml:"instance"`
	StateDir string   `yaml:"state_dir" kind:"path"`
	Keystore Keystore `yaml:"keystore"`
	// Vault is needed by what the blocks keystore, upstream and trust say of it.
	Vault    Vault       `yaml:"vault"`
	Upstream Upstream    `yaml:"upstream"`
	Trust    SharedTrust `yaml:"trust"`
	Listen   Listen      `yaml:"listen"`
	// AdminSocket is a Unix socket. Default <state_dir>/admin.sock.
	AdminSocket string   `yaml:"admin_socket" kind:"path"`
	Leaf        Leaf     `yaml:"leaf"`
	Control     Control  `yaml:"control"`
	Limits      Limits   `yaml:"limits"`
	Rotation    Rotation `yaml:"rotation"`
	Log         Log      `yaml:"log"`
	Logging     Logging  `yaml:"logging"`

	origin origin
}

// Keystore says what seals a server's keys. Neither passphrase = ask on the terminal.
type Keystore struct {
	PassphraseFile string `yaml:"passphrase_file" kind:"path"`
	// PassphraseCredential is the name of a systemd credential.
	PassphraseCredential string `yaml:"passphrase_credential"`
	// Algorithm of the CA keys that are made here.
	Algorithm keystore.Algorithm `yaml:"algorithm"`
	// ControlCA is where the key of the control CA lives: KeysFile or KeysTransit. The log's key, which is no CA's, is a file.
	ControlCA string `yaml:"control_ca"`
	// Intermediates is where their keys live: KeysFile, KeysMemory or KeysTransit.
	Intermediates string  `yaml:"intermediates"`
	Transit       Transit `yaml:"transit"`
}

// Listen holds the TCP addresses of a server, host:port.
type Listen struct {
	Enrol  string `yaml:"enrol"`
	Agents string `yaml:"agents"`
	// HTTP serves /metrics, /livez and /readyz.
	HTTP string `yaml:"http"`
	// What agents are told to dial, if it is not where the server listens: join tokens carry AdvertiseEnrol.
	AdvertiseEnrol  string `yaml:"advertise_enrol"`
	AdvertiseAgents string `yaml:"advertise_agents"`
}

// Leaf is the life of workload certificates.
type Leaf struct {
	TTL    time.Duration `yaml:"ttl"`
	MaxTTL time.Duration `yaml:"max_ttl"`
	// MinUsefulLife is the shortest life that a certificate is issued with when its CA ends soon. 0 in a file = the default,
	// a 96th of TTL, at least 5s.
	MinUsefulLife time.Duration `yaml:"min_useful_life"`
	// Backdate is how far NotBefore lies before the issue, for clocks that are behind.
	Backdate time.Duration `yaml:"backdate"`
}

// Control is the life of the certificates of Signet's own parts.
type Control struct {
	TTL time.Duration `yaml:"ttl"`
}

// Limits bound what one agent may ask for, so that it can't take the server from the others.
type Limits struct {
	// CertificatesPerSecond of one agent, in the long run.
	CertificatesPerSecond int `yaml:"certificates_per_second"`
	// Burst is how many it may ask for at once after a quiet while, as when its node starts.
	Burst int `yaml:"burst"`
}

// Rotation is the life of the CAs: when intermediates are replaced, and what is waited for.
type Rotation struct {
	// Automatic: steps are taken as soon as they can be; else only by `signet rotation advance`.
	Automatic bool `yaml:"automatic"`
	// Quorum is the part of a cluster's agents, in percent, that must have a root before anything is signed under it.
	Quorum int `yaml:"quorum"`
	// Delay is how long after its publication those that can't acknowledge are taken to have a root.
	Delay time.Duration `yaml:"delay"`
	// Skew is how far the clocks of agents and clusters may be apart.
	Skew time.Duration `yaml:"skew"`
	// PrepareAt and SwitchAt are fractions of an intermediate's life: when its successor is made, and when it takes over.
	PrepareAt float64 `yaml:"prepare_at"`
	SwitchAt  float64 `yaml:"switch_at"`
	// ReportLife is how long this cluster keeps what it has told its peers in a report.
	ReportLife time.Duration `yaml:"report_life"`
	// ReissueRate bounds the certificates per second that are replaced after a taint.
	ReissueRate int `yaml:"reissue_rate"`
	// Peers are the other clusters under the same roots: a root is used only when all of them trust it.
	Peers []Peer `yaml:"peers"`
}

// Peer is another cluster under the same roots.
type Peer struct {
	Cluster string `yaml:"cluster" required:"true"`
	// LogVerifierKey proves its reports; `signet cluster show` prints it there.
	LogVerifierKey string `yaml:"log_verifier_key" required:"true"`
}

// Log is about the audit log.
type Log struct {
	CheckpointInterval time.Duration `yaml:"checkpoint_interval"`
}

// Logging is about the operational log on stderr.
type Logging struct {
	// Level is debug, info, warn or error.
	Level string `yaml:"level"`
	// Format is text, json, or auto: text on a terminal, else json.
	Format string `yaml:"format"`
}

// Agent is the configuration of `signet agent`. Paths are absolute.
type Agent struct {
	StateDir string `yaml:"state_dir" kind:"path"`
	// JoinTokenFile is read only while the agent is not enrolled; "" = none.
	JoinTokenFile string `yaml:"join_token_file" kind:"path"`
	Seal          Seal   `yaml:"seal"`
	// Socket is where workloads ask. Default <state_dir>/agent.sock.
	Socket string `yaml:"socket" kind:"path"`
	// Sockets are dedicated to one registration each, by the selector socket:<name>.
	Sockets []Socket `yaml:"sockets"`
	SDS     SDS      `yaml:"sds"`
	// HTTP serves /metrics, /livez and /readyz; host:port.
	HTTP    string  `yaml:"http"`
	Logging Logging `yaml:"logging"`

	origin origin
}

// Seal says what seals an agent's cache. Neither = a local secret, which is protection by file mode alone.
type Seal struct {
	PassphraseFile       string `yaml:"passphrase_file" kind:"path"`
	PassphraseCredential string `yaml:"passphrase_credential"`
}

// Socket is a Unix socket dedicated to one registration.
type Socket struct {
	Name string `yaml:"name"`
	Path string `yaml:"path" kind:"path"`
}

// SDS is what Envoys are given.
type SDS struct {
	// Validator is ValidatorSPIFFE or ValidatorTrustedCA.
	Validator string `yaml:"validator"`
}

// How Envoy is told to check its peers.
const (
	ValidatorSPIFFE    = "spiffe"
	ValidatorTrustedCA = "trusted_ca"
)

// origin is the file that values come from, as far as they come from one.
type origin struct{ *strictyaml.File }

// load reads a file, which is no secret but bounded.
func load(path string, into any, complete func(origin)) (origin, error) {
	text, err := durable.ReadFile(path, "configuration", maxFile)
	if err != nil {
		return origin{}, err
	}
	return decode(path, text, into, complete)
}

func decode(file string, text []byte, into any, complete func(origin)) (origin, error) {
	f, err := strictyaml.Decode(file, text, into, strictyaml.Options{
		What: "configuration", Parsers: []strictyaml.Parser{strictyaml.Parse(identity.ParseTrustDomain)}, Elsewhere: otherRole,
		Check: func(f *strictyaml.File) { complete(origin{f}) },
	})
	return origin{f}, err
}

// LoadServer reads and checks a server's file. The error is strictyaml.Findings if the file could be read but can't be used.
func LoadServer(path string) (*Server, error) {
	s := &Server{}
	var err error
	s.origin, err = load(path, s, s.complete)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// NewServer is the configuration of a server that has no file: all defaults in the given folder.
func NewServer(td spiffeid.TrustDomain, cluster, stateDir string) (*Server, error) {
	dir, err := filepath.Abs(stateDir)
	if err != nil {
		return nil, fmt.Errorf("state folder %s: %w", stateDir, err)
	}
	s := &Server{TrustDomain: td, Cluster: cluster, StateDir: dir}
	s.origin = origin{&strictyaml.File{}}
	s.complete(s.origin)
	return s, s.origin.Err()
}

// LoadAgent reads and checks an agent's file. The error is strictyaml.Findings if the file could be read but can't be used.
func LoadAgent(path string) (*Agent, error) {
	a := &Agent{}
	var err error
	a.origin, err = load(path, a, a.complete)
	if err != nil {
		return nil, err
	}
	return a, nil
}

// Settings lists every value that plays a part with its source, in the order of the documentation.
func (s *Server) Settings() []Setting {
	return slices.DeleteFunc(s.origin.settings(s), func(one Setting) bool { return !s.counts(one.Key) })
}

// Settings lists every value with its source, in the order of the documentation.
func (a *Agent) Settings() []Setting { return a.origin.settings(a) }

// orElse sets what a file left out.
func orElse[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// complete fills in the defaults and checks what the values say together.
func (s *Server) complete(o origin) {
	orElse(&s.Instance, s.Cluster+"-1")
	orElse(&s.StateDir, o.Abs(DefaultServerStateDir))
	orElse(&s.Keystore.Algorithm, DefaultAlgorithm)
	orElse(&s.Listen.Enrol, DefaultEnrol)
	orElse(&s.Listen.Agents, DefaultAgents)
	orElse(&s.Listen.HTTP, DefaultServerHTTP)
	orElse(&s.Listen.AdvertiseEnrol, s.Listen.Enrol)
	orElse(&s.Listen.AdvertiseAgents, s.Listen.Agents)
	orElse(&s.AdminSocket, filepath.Join(s.StateDir, serverSocketName))
	orElse(&s.Control.TTL, DefaultControlTTL)
	orElse(&s.Limits.CertificatesPerSecond, DefaultCertificatesPerSecond)
	orElse(&s.Limits.Burst, DefaultBurst)
	s.Rotation.complete(o)
	orElse(&s.Log.CheckpointInterval, DefaultCheckpointInterval)
	orElse(&s.Leaf.MaxTTL, DefaultMaxTTL)
	if !o.Given("leaf.ttl") {
		// A lowered maximum lowers the default with it.
		s.Leaf.TTL = min(DefaultLeafTTL, s.Leaf.MaxTTL)
	}
	orElse(&s.Leaf.Backdate, DefaultBackdate)
	orElse(&s.Leaf.MinUsefulLife, defaultMinUsefulLife(s.Leaf.TTL))
	s.Logging.complete()
	s.completeVault()
	s.check(o)
}

// complete goes by what is given: 0 is a value here, and false is not the default.
func (r *Rotation) complete(o origin) {
	otherwise(o, "rotation.automatic", &r.Automatic, true)
	otherwise(o, "rotation.quorum", &r.Quorum, DefaultQuorum)
	otherwise(o, "rotation.skew", &r.Skew, DefaultSkew)
	otherwise(o, "rotation.prepare_at", &r.PrepareAt, DefaultPrepareAt)
	otherwise(o, "rotation.switch_at", &r.SwitchAt, DefaultSwitchAt)
	otherwise(o, "rotation.report_life", &r.ReportLife, DefaultReportLife)
	otherwise(o, "rotation.reissue_rate", &r.ReissueRate, DefaultReissueRate)
}

// otherwise sets a value that no file gives.
func otherwise[T any](o origin, key string, v *T, d T) {
	if !o.Given(key) {
		*v = d
	}
}

func (a *Agent) complete(o origin) {
	orElse(&a.StateDir, o.Abs(DefaultAgentStateDir))
	orElse(&a.Socket, filepath.Join(a.StateDir, agentSocketName))
	orElse(&a.SDS.Validator, DefaultValidator)
	orElse(&a.HTTP, DefaultAgentHTTP)
	a.Logging.complete()
	a.check(o)
}

func (l *Logging) complete() {
	orElse(&l.Level, DefaultLevel)
	orElse(&l.Format, DefaultFormat)
}
