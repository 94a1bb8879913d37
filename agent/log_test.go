package agent

import (
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
)

// logBuffer keeps what was logged, for tests that look at it, and shows it when a test fails.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newTestLog(t testing.TB) (*slog.Logger, *logBuffer) {
	b := &logBuffer{}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("log:\n" + b.String())
		}
	})
	return slog.New(slog.NewTextHandler(io.Writer(b), &slog.HandlerOptions{Level: slog.LevelDebug})), b
}

func testLog(t testing.TB) *slog.Logger {
	l, _ := newTestLog(t)
	return l
}
