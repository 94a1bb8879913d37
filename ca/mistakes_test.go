package ca

import (
	"bytes"
	"encoding/pem"
	"strings"
	"testing"
	"time"
)

// The mistakes of others, by their row in docs/mistakes.md.

func TestMistake34BrokenPEMIsCheap(t *testing.T) {
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: make([]byte, 48)})
	for what, text := range map[string]string{
		"begins without an end":         strings.Repeat("-----BEGIN CERTIFICATE-----\n", maxChainPEM/28),
		"begins on one line":            strings.Repeat("-----BEGIN ", maxChainPEM/11),
		"ends without a begin":          "-----BEGIN CERTIFICATE-----\n" + strings.Repeat("-----END X-----\n", maxChainPEM/16-3),
		"headers without an end":        "-----BEGIN CERTIFICATE-----\n" + strings.Repeat("a: b\n", maxChainPEM/5-10),
		"an armour line of one length":  "-----BEGIN " + strings.Repeat("A", maxChainPEM-20),
		"a thousand empty certificates": strings.Repeat("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", maxChainPEM/54),
		"certificates that are none":    string(bytes.Repeat(block, maxChainPEM/len(block))),
	} {
		if len(text) > maxChainPEM {
			t.Fatalf("%s: %d bytes are refused by their size alone", what, len(text))
		}
		// The best of some tries: others compute here too.
		best := time.Hour
		for range 10 {
			start := time.Now()
			if _, err := ParseChain([]byte(text)); err == nil {
				t.Fatalf("%s: taken for a chain", what)
			}
			best = min(best, time.Since(start))
		}
		if best > 20*time.Millisecond {
			t.Errorf("%s: refused after %s", what, best)
		}
	}
}
