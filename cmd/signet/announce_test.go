package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/signet-ca/signet/internal/config"
)

func TestWhatIsAnnouncedHasTheFormOfTheLogAndShowsAtEveryLevel(t *testing.T) {
	for _, level := range []string{"debug", "info", "warn", "error"} {
		var out bytes.Buffer
		c := &cli{err: &out}
		c.announce(config.Logging{Level: level, Format: "json"}, "ready: cluster east")
		var line struct{ Level, Msg string }
		if err := json.Unmarshal(out.Bytes(), &line); err != nil || line.Msg != "ready: cluster east" || line.Level != "INFO" {
			t.Errorf("at level %s: %q, %v", level, out.String(), err)
		}
		out.Reset()
		c.announce(config.Logging{Level: level, Format: "text"}, "ready: cluster east")
		if !strings.Contains(out.String(), `msg="ready: cluster east"`) {
			t.Errorf("at level %s: %q", level, out.String())
		}
	}
}
