package ceremony

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"
)

// lints are those that come from RFC 5280; the other sources are rules of the web's CAs.
var lints = sync.OnceValues(func() (lint.Registry, error) {
	return lint.GlobalRegistry().Filter(lint.FilterOptions{IncludeSources: lint.SourceList{lint.RFC5280}})
})

// lintCertificate names the rules of RFC 5280 that a certificate (DER) breaks.
func lintCertificate(der []byte) error {
	registry, err := lints()
	if err != nil {
		return fmt.Errorf("choose lints: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("zlint can't read it: %w", err)
	}
	var broken []string
	for name, r := range zlint.LintCertificateEx(cert, registry).Results {
		if r.Status >= lint.Error {
			broken = append(broken, strings.TrimSpace(name+" "+r.Details))
		}
	}
	if len(broken) > 0 {
		slices.Sort(broken)
		return fmt.Errorf("zlint finds %d errors: %s", len(broken), strings.Join(broken, ", "))
	}
	return nil
}
