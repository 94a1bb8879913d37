package main

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/identity"
)

func (c *cli) svidCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "svid",
		Short: "Fetch, watch, inspect and verify identities",
		Long: `An SVID is a certificate that names a workload by a SPIFFE ID. fetch and watch ask the agent on this host as any
workload does, so they show what the calling process would be given; inspect and verify look at files.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.svidFetchCommand(), c.svidWatchCommand(), c.svidInspectCommand(), c.svidVerifyCommand())
	return cmd
}

// maxCertificates bounds what is read out of one file.
const maxCertificates = 256

// certificates reads all certificates of a PEM file, or of stdin for "-". Other blocks are passed over.
func (c *cli) certificates(path, what string) ([]*x509.Certificate, error) {
	data, err := c.readInput(path, what, maxChainFile*4)
	if err != nil {
		return nil, err
	}
	return parseCertificates(data, path)
}

func parseCertificates(data []byte, path string) ([]*x509.Certificate, error) {
	var list []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		if len(list) == maxCertificates {
			return nil, fmt.Errorf("%s holds more than %d certificates", path, maxCertificates)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d in %s can't be read: %w", len(list)+1, path, err)
		}
		list = append(list, cert)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s holds no certificate in PEM (-----BEGIN CERTIFICATE-----)", path)
	}
	return list, nil
}

// certShown is one certificate, for people and scripts.
type certShown struct {
	Kind      string    `json:"kind"`
	SPIFFEID  string    `json:"spiffe_id,omitempty"`
	Subject   string    `json:"subject,omitempty"`
	Issuer    string    `json:"issuer"`
	Serial    string    `json:"serial"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	Key       string    `json:"key"`
	SHA256    string    `json:"sha256"`
	// Finding is the SPIFFE rule that the certificate breaks; empty = none.
	Finding string `json:"finding,omitempty"`
}

func describeCert(cert *x509.Certificate) certShown {
	sum := sha256.Sum256(cert.Raw)
	s := certShown{
		Kind: "leaf", Subject: cert.Subject.String(), Issuer: cert.Issuer.String(), Serial: hex.EncodeToString(cert.SerialNumber.Bytes()),
		NotBefore: cert.NotBefore.UTC(), NotAfter: cert.NotAfter.UTC(), Key: keyKind(cert), SHA256: hex.EncodeToString(sum[:]),
	}
	if len(cert.URIs) > 0 {
		s.SPIFFEID = cert.URIs[0].String()
	}
	if cert.IsCA {
		s.Kind = "ca"
		if cert.CheckSignatureFrom(cert) == nil {
			s.Kind = "root"
		}
		// X509-SVID §3.2, §4.3: what signs has no path in its ID, if it has one, and may sign.
		switch {
		case len(cert.URIs) == 1 && cert.URIs[0].Path != "":
			s.Finding = "a CA's SPIFFE ID has no path (X509-SVID §3.2)"
		case cert.KeyUsage&x509.KeyUsageCertSign == 0:
			s.Finding = "key usage lacks keyCertSign (X509-SVID §4.3)"
		}
	} else if _, err := identity.CheckLeaf(cert); err != nil {
		s.Finding = err.Error()
	}
	return s
}

func keyKind(cert *x509.Certificate) string {
	switch k := cert.PublicKey.(type) {
	case *ecdsa.PublicKey:
		return "ECDSA " + k.Curve.Params().Name
	case *rsa.PublicKey:
		return "RSA " + strconv.Itoa(k.N.BitLen())
	}
	return cert.PublicKeyAlgorithm.String()
}

// certsShown is a chain or a bundle.
type certsShown []certShown

func (certsShown) columns() []string {
	return []string{"#", "KIND", "NAME", "SERIAL", "NOT BEFORE", "EXPIRES", "+KEY", "+ISSUER", "+SHA-256", "SPIFFE"}
}

func (l certsShown) rows() [][]string {
	var rows [][]string
	for i, s := range l {
		name, verdict := s.SPIFFEID, "ok"
		if s.Kind != "leaf" && s.Subject != "" {
			name = s.Subject
		}
		if s.Finding != "" {
			verdict = s.Finding
		}
		rows = append(rows, []string{
			strconv.Itoa(i + 1), s.Kind, printable(name), s.Serial, clock(s.NotBefore), clock(s.NotAfter), s.Key, printable(s.Issuer), s.SHA256, printable(verdict),
		})
	}
	return rows
}

func (l certsShown) names() []string {
	var names []string
	for _, s := range l {
		names = append(names, "certificate/"+s.Serial)
	}
	return names
}

func (c *cli) svidInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "inspect FILE|-",
		Short: "Show what is in a certificate, chain or bundle",
		Long: `Shows each certificate of a PEM file, and the rule of X509-SVID that it breaks, if any. It says nothing about who
signed them: that is what "signet svid verify" is for.`,
		Example: `  signet svid inspect svid.pem
  signet svid inspect -o wide - < bundle.pem`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			list, err := c.certificates(args[0], "certificates")
			if err != nil {
				return err
			}
			shown := make(certsShown, len(list))
			for i, cert := range list {
				shown[i] = describeCert(cert)
			}
			return c.show(format, shown)
		},
	}
	outputFlag(cmd, &format)
	return cmd
}

func (c *cli) svidVerifyCommand() *cobra.Command {
	var bundle, id, format string
	cmd := &cobra.Command{
		Use:   "verify FILE|- --bundle FILE",
		Short: "Check that a chain is a valid SVID under a bundle",
		Long: `Checks a chain, leaf first, as a validator does (X509-SVID §5): the path to a root of the bundle, every validity,
the order, and the rules for the leaf. With --spiffe-id also whose it is.
Exit status: 0 valid, 1 not (and which rule is broken), 2 could not tell.`,
		Example: `  signet svid verify svid.pem --bundle bundle.pem
  signet svid verify svid.pem --bundle bundle.pem --spiffe-id spiffe://example.org/ns/shop/sa/frontend`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if args[0] == "-" && bundle == "-" {
				return fmt.Errorf("only one of chain and bundle can come from stdin")
			}
			if id != "" {
				if _, err := identity.ParseID(id); err != nil {
					return err
				}
			}
			chain, err := c.certificates(args[0], "chain")
			if err != nil {
				return err
			}
			roots, err := c.certificates(bundle, "bundle")
			if err != nil {
				return err
			}
			pool := x509.NewCertPool()
			for i, r := range roots {
				// A leaf among the roots would vouch for itself.
				if !r.IsCA {
					return fmt.Errorf("certificate %d in %s is not a CA's: give the bundle, not a chain", i+1, bundle)
				}
				pool.AddCert(r)
			}
			got, err := identity.VerifySVID(chain, pool, time.Now())
			if err != nil {
				return no("%s is not valid: %w", args[0], err)
			}
			if id != "" && got.String() != id {
				return no("%s is valid, but for %s and not for %s", args[0], got, id)
			}
			return c.show(format, certsShown{describeCert(chain[0])})
		},
	}
	cmd.Flags().StringVar(&bundle, "bundle", "", "the roots to believe, PEM; - = stdin")
	cmd.Flags().StringVar(&id, "spiffe-id", "", "whose it must be")
	_ = cmd.MarkFlagRequired("bundle")
	_ = cmd.MarkFlagFilename("bundle", "pem", "crt")
	outputFlag(cmd, &format)
	return cmd
}
