package envoy

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
)

// ServerSerial is the serial of the server's certificate in a response that came through an Outbound: hexadecimal,
// without leading zeros. It is read from the certificate in HeaderServerCert (URL-encoded PEM), as Envoy 1.40 has no
// operator for the serial of an upstream's certificate.
func ServerSerial(h http.Header) (string, error) {
	v := h.Get(HeaderServerCert)
	if v == "" || v == "-" {
		return "", errors.New("the response carries no server certificate: it did not come over TLS")
	}
	text, err := url.PathUnescape(v)
	if err != nil {
		return "", fmt.Errorf("server certificate in a response: %w", err)
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return "", errors.New("server certificate in a response: no PEM")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", fmt.Errorf("server certificate in a response: %w", err)
	}
	return c.SerialNumber.Text(16), nil
}

// ClientSerial is the serial of the client's certificate in a response that came through an Inbound, in the same form.
func ClientSerial(h http.Header) (string, error) {
	v := h.Get(HeaderClientSerial)
	if v == "" || v == "-" {
		return "", errors.New("the response carries no client serial: it did not come through a sidecar's inbound")
	}
	if v = strings.TrimLeft(strings.ToLower(v), "0"); v == "" {
		v = "0"
	}
	return v, nil
}
