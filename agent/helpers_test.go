package agent

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
)

func firstDER(text []byte) []byte {
	b, _ := pem.Decode(text)
	return b.Bytes
}

func base64Of(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

// signerKey is the private form of a log's key (golang.org/x/mod/sumdb/note).
func signerKey(vkey string, key ed25519.PrivateKey) string {
	parts := strings.SplitN(vkey, "+", 3)
	return fmt.Sprintf("PRIVATE+KEY+%s+%s+%s", parts[0], parts[1], base64Of(append([]byte{1}, key.Seed()...)))
}

// counter reads a metric without labels.
func counter(t *testing.T, n *node, name string) float64 {
	t.Helper()
	all, err := n.config.Metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == name {
			return f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

func jsonInto(raw []byte, v any) bool { return json.Unmarshal(raw, v) == nil }
