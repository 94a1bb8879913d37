//go:build soak

package faults

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

// held fetches an identity, which must be good by the clock of this test.
func (s *site) held(t *testing.T, a *lab.Agent, id string) (*x509.Certificate, error) {
	t.Helper()
	dir := s.path(fmt.Sprintf("held%d", time.Now().UnixNano()))
	if _, err := s.Run(t.Context(), "svid", "fetch", "--socket", a.Socket, "--spiffe-id", id, "--write", dir, "--timeout", "3s"); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(dir, "svid.pem"))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	if now := time.Now(); now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		t.Errorf("%s: a certificate from %s to %s is served at %s", id, cert.NotBefore, cert.NotAfter, now)
	}
	return cert, nil
}

var aTime = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)

// apart finds a sentence with two times that are about a day apart.
func apart(text string) string {
	for line := range strings.Lines(text) {
		var said []time.Time
		for _, s := range aTime.FindAllString(line, -1) {
			if at, err := time.Parse(time.RFC3339, s); err == nil {
				said = append(said, at)
			}
		}
		for _, a := range said {
			for _, b := range said {
				if d := a.Sub(b).Abs(); d > 20*time.Hour && d < 26*time.Hour {
					return strings.TrimSpace(line)
				}
			}
		}
	}
	return ""
}

// TestAServersClockJumpsByADay: nothing is issued and nothing is served with times that are not true, the server says both
// times and is not ready, and once the clock is right again everything goes on by itself.
func TestAServersClockJumpsByADay(t *testing.T) {
	binary := skewable(t)
	s := newSite(t)
	clocked := newNode(t, s, binary, "") // the server's clock and its processes
	if _, err := clocked.Start("server", "serve", "--config", s.east.Config()); err != nil {
		t.Fatal(err)
	}
	if err := lab.Ready(t.Context(), "the server", s.east.HTTP); err != nil {
		t.Fatal(err)
	}
	a, err := s.east.StartAgent(t.Context(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	const web, brief = "spiffe://example.org/web", "spiffe://example.org/brief"
	logs := []string{filepath.Join(clocked.Dir, "server.log"), s.path("east-node-1.log")}
	// news is what came into the logs after they had these lengths.
	news := func(from []int) (text string) {
		for i, path := range logs {
			all, _ := os.ReadFile(path)
			text += string(all[min(from[i], len(all)):])
		}
		return text
	}
	lengths := func() (all []int) {
		for _, path := range logs {
			text, _ := os.ReadFile(path)
			all = append(all, len(text))
		}
		return all
	}
	renewed := func(before *x509.Certificate) *x509.Certificate {
		t.Helper()
		var cert *x509.Certificate
		began := time.Now()
		if err := lab.Until(t.Context(), "an identity that is renewed", 2*time.Minute, func() (err error) {
			if cert, err = s.held(t, a, brief); err == nil && before != nil && cert.SerialNumber.Cmp(before.SerialNumber) == 0 {
				err = errors.New("still the old one")
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Logf("renewed after %v", time.Since(began).Round(time.Millisecond))
		return cert
	}
	last := renewed(renewed(nil))
	if _, err := s.held(t, a, web); err != nil {
		t.Fatal(err)
	}
	for _, off := range []time.Duration{-24 * time.Hour, 24 * time.Hour} {
		from := lengths()
		clocked.set(t, off)
		served, withheld, said := 0, 0, ""
		for end := time.Now().Add(25 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
			if _, err := s.held(t, a, web); err != nil {
				t.Errorf("by %v: an identity that has a day to live: %v", off, err)
			}
			if _, err := s.held(t, a, brief); err != nil {
				withheld++
			} else {
				served++
			}
			if said == "" {
				said = apart(news(from))
			}
		}
		code, ready := get(s.east.HTTP, "/readyz?verbose")
		t.Logf("by %v: brief identity served %d times, then withheld %d times; readiness: %s; said: %s", off, served, withheld, strings.ReplaceAll(ready, "\n", "; "), said)
		if said == "" {
			t.Errorf("by %v: nobody says both times", off)
		}
		if code == 200 || apart(ready) == "" {
			t.Errorf("by %v: readiness does not say both times: %s", off, ready)
		}
		clocked.set(t, 0)
		last = renewed(last)
		if err := lab.Ready(t.Context(), "the server, with its clock set right", s.east.HTTP); err != nil {
			t.Error(err)
		}
	}
}
