package health

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/check"
)

func ask(t *testing.T, path, method, accept string, found ...check.Finding) (int, string) {
	t.Helper()
	s := NewServer(Config{
		Checks: func() []check.Part {
			return []check.Part{{Look: func(context.Context) check.Findings { return found }}}
		},
		Metrics: prometheus.NewRegistry(), Logger: slog.New(slog.DiscardHandler),
	})
	r := httptest.NewRequest(method, path, nil)
	r.Header.Set("Accept", accept)
	w := httptest.NewRecorder()
	s.Handler.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

func get(t *testing.T, path string, found ...check.Finding) (int, string) {
	t.Helper()
	return ask(t, path, http.MethodGet, "*/*", found...)
}

var (
	store    = check.Finding{Code: check.CodeState, About: "store"}
	full     = check.Finding{Code: check.CodeLog, Level: check.Error, About: "log", Message: "disk is full", Stops: []string{check.Issuing}}
	away     = check.Finding{Code: check.CodeState, Level: check.Error, About: "store", Message: "away", Stops: []string{check.Enrolling}}
	soon     = check.Finding{Code: check.CodeExpiry, Level: check.Warning, About: "issuer-mesh", Message: "3 % are left, in 3h"}
	untold   = check.Finding{Code: check.CodeSpace, Level: check.Unknown, About: "/state", Message: "no answer"}
	allKinds = []check.Finding{store, full, away, soon, untold}
)

func TestWhatStopsTheProcessMakesItUnreadyAndIsNamedByCode(t *testing.T) {
	code, body := get(t, "/readyz", store, full)
	if code != http.StatusServiceUnavailable || body != "[+]store ok\n[-]log failed: SGN1010: disk is full (stopped: issuing)\nreadyz check failed\n" {
		t.Errorf("%d %q", code, body)
	}
}

func TestWhatOnlyWillBeBadShowsAndTheProcessStaysReady(t *testing.T) {
	code, body := get(t, "/readyz?verbose", away, soon, untold)
	want := "[!]store degraded: SGN1011: away (stopped: enrolling)\n[!]issuer-mesh warning: SGN1007: 3 % are left, in 3h\n[?]/state unknown: SGN1003: no answer\nreadyz check passed\n"
	if code != http.StatusOK || body != want {
		t.Errorf("%d %q", code, body)
	}
	if code, body := get(t, "/readyz", away, soon, untold); code != http.StatusOK || body != "ok\n" {
		t.Errorf("not verbose: %d %q", code, body)
	}
}

func TestAProgramGetsTheFindingsAsTheyAre(t *testing.T) {
	for ready, found := range map[bool][]check.Finding{false: allKinds, true: {store, away}} {
		code, body := ask(t, "/readyz", http.MethodGet, "application/json", found...)
		var got struct {
			Ready    bool
			Findings []struct {
				Code, Level, About, Message string
				Stops                       []string
			}
		}
		if err := json.Unmarshal([]byte(body), &got); err != nil {
			t.Fatalf("%v: %s", err, body)
		}
		if got.Ready != ready || (code == http.StatusOK) != ready || len(got.Findings) != len(found) {
			t.Errorf("%d %s", code, body)
		}
		last := got.Findings[1]
		if last.Code != found[1].Code || last.Level != "error" || len(last.Stops) != 1 {
			t.Errorf("%+v", last)
		}
	}
}

func TestALongReasonIsCut(t *testing.T) {
	long := full
	long.Message = "a\n[+]b ok\n" + strings.Repeat("x", 10_000)
	_, body := get(t, "/readyz", long)
	if len(body) > maxReason+100 || strings.Count(body, "\n") != 2 {
		t.Errorf("%d bytes: %q", len(body), body)
	}
}

func TestNothingCanBeChangedHere(t *testing.T) {
	for _, path := range []string{"/livez", "/readyz", "/metrics"} {
		if code, _ := ask(t, path, http.MethodPost, "*/*"); code != http.StatusMethodNotAllowed {
			t.Errorf("POST %s: %d", path, code)
		}
		if code, _ := get(t, path); code != http.StatusOK {
			t.Errorf("GET %s: %d", path, code)
		}
	}
}
