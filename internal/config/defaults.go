package config

import (
	"time"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

// What holds where a file says nothing. Paths are relative to the configuration file's folder.
const (
	DefaultServerStateDir = "./state"
	DefaultAgentStateDir  = "./agent"

	DefaultEnrol      = "127.0.0.1:7441"
	DefaultAgents     = "127.0.0.1:7442"
	DefaultServerHTTP = "127.0.0.1:7440"
	DefaultAgentHTTP  = "127.0.0.1:7450"

	DefaultLeafTTL            = 24 * time.Hour
	DefaultMaxTTL             = 24 * time.Hour
	DefaultBackdate           = 5 * time.Minute
	DefaultControlTTL         = 7 * 24 * time.Hour
	DefaultCheckpointInterval = time.Second

	// A node of 1,000 workloads may start all of them at once, several times over.
	DefaultCertificatesPerSecond = 200
	DefaultBurst                 = 5000

	DefaultQuorum      = 100
	DefaultSkew        = 5 * time.Minute
	DefaultPrepareAt   = 0.5
	DefaultSwitchAt    = 0.67
	DefaultReportLife  = 24 * time.Hour
	DefaultReissueRate = 200

	DefaultVaultTimeout = 3 * time.Second
	// DefaultKubernetesToken is where Kubernetes mounts a pod's own token.
	DefaultKubernetesToken = "/var/run/secrets/kubernetes.io/serviceaccount/token" //nolint:gosec // a path
	DefaultTransitMount    = "transit"
	DefaultIssuer          = "default"
	DefaultOnlineLife      = 7 * 24 * time.Hour

	DefaultAlgorithm = keystore.ECDSAP256
	DefaultValidator = ValidatorSPIFFE
	DefaultLevel     = "info"
	DefaultFormat    = "auto"

	// Names inside the state folder.
	serverSocketName = "admin.sock"
	agentSocketName  = "agent.sock"
	keysName         = "keys"
)

// The bounds of what a file may say.
const (
	MinControlTTL         = time.Minute
	MaxBackdate           = time.Hour
	MinCheckpointInterval = 100 * time.Millisecond
	MaxCheckpointInterval = time.Minute
	// One call of an agent asks for up to 50 certificates.
	MinBurst = 50
	MaxLimit = 1_000_000

	MinReportLife = time.Second
	MaxReportLife = 30 * 24 * time.Hour
	MaxDelay      = 30 * 24 * time.Hour
	// MaxPeers is as many clusters as roots may have beside this one.
	MaxPeers = 1024

	MinVaultTimeout = 100 * time.Millisecond
	MaxVaultTimeout = 30 * time.Second
	// maxVaultPath bounds a path in Vault, maxVaultName one name there, in bytes.
	maxVaultPath = 255
	maxVaultName = 128

	// maxFile bounds a configuration file, in bytes.
	maxFile = 1 << 20
	// maxSocketPath is what fits into sockaddr_un with its final zero (unix(7)), in bytes.
	maxSocketPath = 107
	// maxSockets bounds the dedicated sockets of an agent.
	maxSockets = 1024
	// maxVerifierKey bounds a verifier key, in bytes.
	maxVerifierKey = 4 << 10
)

// defaultMinUsefulLife is a 96th of a leaf's life (15 minutes of a day), so that a CA close to its end refuses only what
// would be of no use; but not below what identity.MinTTL calls useful.
func defaultMinUsefulLife(ttl time.Duration) time.Duration {
	return max(ttl/96, identity.MinTTL).Truncate(time.Second)
}
