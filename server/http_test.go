package server

import (
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
)

// A database that can't be written stops enrolment and changes. What agents ask for most goes on from memory, so the
// server stays in service, and says which of its abilities it has not.
func TestAFailingDatabaseShowsWithinASecondAndIssuingGoesOn(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	s.apply(false, registration("frontend", "node-1"))
	conn := s.dial(m)
	s.shows(http.StatusOK, "[+]store ok\n")
	must(t, os.Rename(databasePath(c.dir), databasePath(c.dir)+".away"))
	broken := time.Now()
	for text := ""; !strings.Contains(text, "[!]store degraded: SGN1011: "); {
		asked := time.Since(broken)
		if _, text = get(t, s, "/readyz?verbose"); asked > time.Second && !strings.Contains(text, "[!]store degraded: SGN1011: ") {
			t.Fatalf("a second after the database went: %s", text)
		}
	}
	s.shows(http.StatusOK, "[!]store degraded: SGN1011: ", "(stopped: enrolling, changing)", "it is gone")
	r, err := signetv1.NewAgentsClient(conn).Issue(t.Context(), &signetv1.IssueRequest{Items: []*signetv1.IssueItem{{Registration: "frontend", Selectors: shown, Csr: newCSR(t)}}})
	if err != nil || r.Results[0].GetRefusal() != nil {
		t.Errorf("a certificate, with the database away: %v, %v", r, err)
	}
	must(t, os.Rename(databasePath(c.dir)+".away", databasePath(c.dir)))
	s.shows(http.StatusOK, "[+]store ok\n")
}

func TestWhatWillBeBadIsToldFromWhatIs(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	mesh, _ := s.issuers.Snapshot().Active(identity.Mesh)
	ends := mesh.NotAfter()
	for _, try := range []struct {
		left time.Duration
		line string
		code int
	}{
		{3 * time.Hour, "[!]issuer-mesh degraded: SGN1007: 0 % of its life are left, until ", http.StatusOK},
		{-time.Hour, "[-]issuer-mesh failed: SGN1007: it expired at ", http.StatusServiceUnavailable},
	} {
		c.ahead.Store(int64(time.Until(ends) - try.left))
		// The server's own certificate ends too; this is about the CA.
		code, text := get(t, s, "/readyz?verbose")
		if !strings.Contains(text, try.line) || try.code == http.StatusServiceUnavailable && code != try.code {
			t.Errorf("%s before the end: %d\n%s", try.left, code, text)
		}
		for _, f := range s.checkIssuer(identity.Mesh) {
			if f.Blocks() != (try.code != http.StatusOK) || f.Level != check.Error {
				t.Errorf("%s before the end: %+v", try.left, f)
			}
		}
	}
}
