package envoy

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"text/template"
)

// Headers by which a caller sees what certificates were used. Serials are hexadecimal without leading zeros.
const (
	// HeaderClientSerial and HeaderClientID are of the client's certificate as the server's Envoy saw it.
	HeaderClientSerial = "x-client-cert-serial"
	HeaderClientID     = "x-client-spiffe-id"
	// HeaderServerCert is the server's certificate as the client's Envoy saw it, see ServerSerial; HeaderServerID its ID.
	HeaderServerCert = "x-server-cert"
	HeaderServerID   = "x-server-spiffe-id"
)

// Sidecar is the bootstrap of an Envoy that takes certificate and trust over SDS from an agent's Unix socket.
type Sidecar struct {
	// Node is node.id. The agent doesn't believe it.
	Node string
	// SDSSocket is the path of the agent's socket.
	SDSSocket string
	// Delta is incremental SDS; otherwise it is state of the world.
	Delta bool
	// TrustedCA asks the agent for plain trusted_ca in place of the SPIFFE validator.
	TrustedCA bool
	// CertificateName and BundleName are the names asked for; default "default" and "ROOTCA".
	CertificateName, BundleName string
	// AdminPort on loopback; 0 lets the kernel choose.
	AdminPort int
	Inbound   *Inbound
	Outbound  *Outbound
}

// Inbound takes mutual TLS and passes on in clear to the workload on loopback.
type Inbound struct {
	// Port to listen on, on loopback; 0 lets the kernel choose.
	Port int
	// AllowSPIFFEIDs of clients, exactly; at least one.
	AllowSPIFFEIDs []string
	// Upstream is the workload's address, host:port.
	Upstream string
	// RequestsPerConnection ends a client's connection after that many; 0 = never.
	RequestsPerConnection int
}

// Outbound takes requests in clear from the workload and passes them on over mutual TLS.
type Outbound struct {
	// Port to listen on, on loopback; 0 lets the kernel choose.
	Port int
	// Target is the other side's address, host:port.
	Target string
	// ExpectSPIFFEID of the server, exactly.
	ExpectSPIFFEID string
	// RequestsPerConnection makes a new connection, with a handshake of its own, after that many; 0 = never.
	RequestsPerConnection int
}

//go:embed sidecar.yaml
var sidecarText string

var sidecar = template.Must(template.New("sidecar").Funcs(template.FuncMap{
	"q": func(v any) (string, error) { // a JSON string is a YAML string
		b, err := json.Marshal(v)
		return string(b), err
	},
	"host": func(address string) (string, error) { h, _, err := net.SplitHostPort(address); return h, err },
	"port": func(address string) (int, error) {
		_, p, err := net.SplitHostPort(address)
		if err != nil {
			return 0, err
		}
		return strconv.Atoi(p)
	},
}).Parse(sidecarText))

// YAML writes the bootstrap.
func (s Sidecar) YAML() (string, error) {
	switch {
	case s.SDSSocket == "":
		return "", errors.New("sidecar bootstrap: no SDS socket")
	case s.Inbound == nil && s.Outbound == nil:
		return "", errors.New("sidecar bootstrap: neither inbound nor outbound")
	case s.Inbound != nil && len(s.Inbound.AllowSPIFFEIDs) == 0:
		return "", errors.New("sidecar bootstrap: inbound allows no SPIFFE ID; without one Envoy would allow all of the trust domain")
	case s.Outbound != nil && s.Outbound.ExpectSPIFFEID == "":
		return "", errors.New("sidecar bootstrap: outbound expects no SPIFFE ID; without one Envoy would accept all of the trust domain")
	}
	if s.Node == "" {
		s.Node = "sidecar"
	}
	if s.CertificateName == "" {
		s.CertificateName = "default"
	}
	if s.BundleName == "" {
		s.BundleName = "ROOTCA"
	}
	var b bytes.Buffer
	if err := sidecar.Execute(&b, s); err != nil {
		return "", fmt.Errorf("sidecar bootstrap: %w", err)
	}
	return b.String(), nil
}
