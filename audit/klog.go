package audit

import (
	"context"
	"log/slog"

	"k8s.io/klog/v2"
)

// Tessera talks through klog, which is one per process and writes to stderr. What matters of it reaches our callers as
// errors, so its lines go to the default logger as debug output. It must be set once, before any goroutine uses it.
func init() { klog.SetSlogLogger(slog.New(tesseraLines{})) }

type tesseraLines struct{}

func (tesseraLines) Enabled(ctx context.Context, _ slog.Level) bool {
	return slog.Default().Enabled(ctx, slog.LevelDebug)
}

func (tesseraLines) Handle(ctx context.Context, r slog.Record) error {
	slog.DebugContext(ctx, r.Message, "component", "tessera")
	return nil
}

func (h tesseraLines) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h tesseraLines) WithGroup(string) slog.Handler      { return h }
