package health

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func get(t *testing.T, path, method string, checks ...Check) (int, string) {
	t.Helper()
	s := NewServer(Config{
		Checks:  func(context.Context) []Check { return checks },
		Metrics: prometheus.NewRegistry(), Logger: slog.New(slog.DiscardHandler),
	})
	w := httptest.NewRecorder()
	s.Handler.ServeHTTP(w, httptest.NewRequest(method, path, nil))
	return w.Code, w.Body.String()
}

func TestOneFailedCheckMakesTheProcessUnreadyAndIsNamed(t *testing.T) {
	code, body := get(t, "/readyz", http.MethodGet, Check{Name: "store"}, Check{Name: "log", Err: errors.New("disk is full")})
	if code != http.StatusServiceUnavailable || !strings.Contains(body, "[+]store ok\n[-]log failed: disk is full\n") {
		t.Errorf("%d %q", code, body)
	}
}

func TestADegradedCheckShowsButTheProcessStaysReady(t *testing.T) {
	degraded := Check{Name: "server", Err: errors.New("away"), Degraded: true}
	if code, body := get(t, "/readyz?verbose", http.MethodGet, degraded); code != http.StatusOK || !strings.Contains(body, "[!]server degraded: away") {
		t.Errorf("%d %q", code, body)
	}
	if code, body := get(t, "/readyz", http.MethodGet, degraded); code != http.StatusOK || body != "ok\n" {
		t.Errorf("not verbose: %d %q", code, body)
	}
}

func TestALongReasonIsCut(t *testing.T) {
	_, body := get(t, "/readyz", http.MethodGet, Check{Name: "log", Err: errors.New(strings.Repeat("x", 10_000))})
	if len(body) > maxReason+100 {
		t.Errorf("%d bytes", len(body))
	}
}

func TestNothingCanBeChangedHere(t *testing.T) {
	for _, path := range []string{"/livez", "/readyz", "/metrics"} {
		if code, _ := get(t, path, http.MethodPost); code != http.StatusMethodNotAllowed {
			t.Errorf("POST %s: %d", path, code)
		}
		if code, _ := get(t, path, http.MethodGet); code != http.StatusOK {
			t.Errorf("GET %s: %d", path, code)
		}
	}
}
