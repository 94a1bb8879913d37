package envoy

import (
	"encoding/json"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

func variants() map[string]Sidecar {
	in := &Inbound{AllowSPIFFEIDs: []string{"spiffe://example.org/a", "spiffe://example.org/b"}, Upstream: "127.0.0.1:8080", RequestsPerConnection: 3}
	out := &Outbound{Target: "127.0.0.1:8443", ExpectSPIFFEID: "spiffe://example.org/c", RequestsPerConnection: 2}
	return map[string]Sidecar{
		"inbound":        {SDSSocket: "/run/agent.sock", Inbound: in},
		"outbound":       {SDSSocket: "/run/agent.sock", Outbound: out},
		"delta":          {SDSSocket: "/run/agent.sock", Inbound: in, Outbound: out, Delta: true},
		"both":           {Node: "n", SDSSocket: "/run/a \"quoted\" path: {x}.sock", Inbound: in, Outbound: out, TrustedCA: true, CertificateName: "spiffe://example.org/a", BundleName: "spiffe://example.org"},
		"without limits": {SDSSocket: "/s", Inbound: &Inbound{AllowSPIFFEIDs: in.AllowSPIFFEIDs, Upstream: in.Upstream}, Outbound: &Outbound{Target: "[::1]:8443", ExpectSPIFFEID: out.ExpectSPIFFEID}},
	}
}

// What the SDS contract asks of a bootstrap (reference §2b): the cluster of the agent first, one sds_config for all names
// byte for byte, client certificates required, and names of peers in every validation context.
func TestBootstrapsKeepTheContract(t *testing.T) {
	for name, s := range variants() {
		t.Run(name, func(t *testing.T) {
			text, err := s.YAML()
			if err != nil {
				t.Fatal(err)
			}
			var doc map[string]any
			if err := yaml.Unmarshal([]byte(text), &doc); err != nil {
				t.Fatalf("%v in\n%s", err, text)
			}
			clusters := doc["static_resources"].(map[string]any)["clusters"].([]any)
			if first := clusters[0].(map[string]any)["name"]; first != "signet_agent" {
				t.Errorf("the first cluster is %v", first)
			}
			var sources []string
			contexts, required := 0, 0
			walk(doc, func(key string, v any) {
				switch key {
				case "sds_config":
					b, _ := json.Marshal(v)
					sources = append(sources, string(b))
				case "default_validation_context":
					contexts++
					if n, _ := v.(map[string]any)["match_typed_subject_alt_names"].([]any); len(n) == 0 {
						t.Error("a validation context names no peers")
					}
				case "require_client_certificate":
					if v == true {
						required++
					}
				}
			})
			legs := 0
			if s.Inbound != nil {
				legs++
			}
			if s.Outbound != nil {
				legs++
			}
			if len(sources) != 2*legs || contexts != legs {
				t.Errorf("%d sds_config and %d contexts for %d legs", len(sources), contexts, legs)
			}
			for _, c := range sources {
				if c != sources[0] {
					t.Errorf("sds_config differs: %s and %s", c, sources[0])
				}
				if strings.Contains(c, `"DELTA_GRPC"`) != s.Delta || strings.Contains(c, `"GRPC"`) == s.Delta {
					t.Errorf("delta is %v, and sds_config is %s", s.Delta, c)
				}
			}
			if (required == 1) != (s.Inbound != nil) {
				t.Errorf("client certificates required %d times", required)
			}
		})
	}
}

func walk(v any, f func(key string, v any)) {
	switch v := v.(type) {
	case map[string]any:
		for k, w := range v {
			f(k, w)
			walk(w, f)
		}
	case []any:
		for _, w := range v {
			walk(w, f)
		}
	}
}

func TestABootstrapThatWouldAllowTooMuchIsRefused(t *testing.T) {
	for want, s := range map[string]Sidecar{
		"no SDS socket":     {Inbound: &Inbound{AllowSPIFFEIDs: []string{"spiffe://a/b"}, Upstream: "h:1"}},
		"neither":           {SDSSocket: "/s"},
		"allows no SPIFFE":  {SDSSocket: "/s", Inbound: &Inbound{Upstream: "h:1"}},
		"expects no SPIFFE": {SDSSocket: "/s", Outbound: &Outbound{Target: "h:1"}},
		"missing port":      {SDSSocket: "/s", Outbound: &Outbound{Target: "h", ExpectSPIFFEID: "spiffe://a/b"}},
	} {
		if _, err := s.YAML(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want a sentence with %q", err, want)
		}
	}
}
