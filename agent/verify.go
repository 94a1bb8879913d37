package agent

import (
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/identity"
)

func utc(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// clip bounds foreign text before it goes into an error or a log.
func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "…"
	}
	return s
}

// verifyServer checks that a chain is a control certificate of a server of this cluster: under exactly this control CA,
// good now, for servers, and nothing but a part of Signet (docs/security-model.md, "Two hierarchies").
func verifyServer(certs []*x509.Certificate, controlCA *x509.Certificate, td spiffeid.TrustDomain, cluster string, now time.Time) error {
	c, err := identity.VerifyControl(certs, controlCA, now, x509.ExtKeyUsageServerAuth)
	if err != nil {
		return fmt.Errorf("what answers is not a server of cluster %s: %w", cluster, err)
	}
	if c.Role != identity.RoleServer || c.Cluster != cluster || c.TrustDomain != td {
		return fmt.Errorf("what answers is %s %s of cluster %s in %s, not a server of cluster %s in %s", c.Role, c.Name, c.Cluster, c.TrustDomain, cluster, td)
	}
	return nil
}
