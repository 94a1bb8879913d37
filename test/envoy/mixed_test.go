//go:build real

package envoy_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/envoy"
	"github.com/signet-ca/signet/test/lab"
)

// mixed is a bootstrap that asks for the certificate in one way and for the trust in the other, over one cluster, which is
// one connection.
func mixed(t *testing.T, s envoy.Sidecar) string {
	t.Helper()
	text, err := s.YAML()
	if err != nil {
		t.Fatal(err)
	}
	ways := []string{"GRPC", "DELTA_GRPC"}
	if s.Delta {
		ways[0], ways[1] = ways[1], ways[0]
	}
	other := fmt.Sprintf("{ resource_api_version: V3, initial_fetch_timeout: 5s, api_config_source: { api_type: %s, transport_api_version: V3, set_node_on_first_message_only: true, grpc_services: [ { envoy_grpc: { cluster_name: signet_agent } } ] } }", ways[1])
	const of = `name: "ROOTCA", sds_config: `
	if !strings.Contains(text, of+"*sds") || !strings.Contains(text, "api_type: "+ways[0]) {
		t.Fatalf("this bootstrap has no place for it:\n%s", text)
	}
	return strings.ReplaceAll(text, of+"*sds", of+other)
}

// TestOneConnectionCarriesBothKindsOfSDS lets Envoys of all versions ask a real agent in both ways at once, and speak
// mutual TLS with each other.
func TestOneConnectionCarriesBothKindsOfSDS(t *testing.T) {
	runtime.LockOSThread() // which the processes die with
	defer runtime.UnlockOSThread()
	dir, err := os.MkdirTemp("", "mix") // short, for sockets' sake
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	signet := filepath.Join(dir, "signet")
	if out, err := exec.Command("go", "build", "-o", signet, "github.com/signet-ca/signet/cmd/signet").CombinedOutput(); err != nil {
		t.Fatalf("build signet: %v\n%s", err, out)
	}
	l, err := lab.New(filepath.Join(dir, "lab"), signet)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	east, err := l.NewCluster("east", "leaf: { min_useful_life: 2s }\n")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(l.MakeRoot(ctx), east.Join(ctx)); err != nil {
		t.Fatal(err)
	}
	if _, err := east.Serve(ctx); err != nil {
		t.Fatal(err)
	}
	// Leaves short enough to be renewed while the test looks on.
	if err := east.Apply(ctx, `registrations:
  - { name: web, spiffe_id: spiffe://example.org/web, ttl: 10s, agents: [node-1], selectors: ['socket:web'] }
  - { name: api, spiffe_id: spiffe://example.org/api, ttl: 10s, agents: [node-1], selectors: ['socket:api'] }
`); err != nil {
		t.Fatal(err)
	}
	if _, err := east.StartAgent(ctx, "node-1", "web", "api"); err != nil {
		t.Fatal(err)
	}
	workload := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
	defer workload.Close()
	defer http.DefaultClient.CloseIdleConnections()

	binaries, err := envoy.Others()
	if err != nil {
		t.Fatal(err)
	}
	binaries["pinned"] = ""
	if len(binaries) < 3 {
		t.Errorf("only the Envoys %v are here: run `make tools`", binaries)
	}
	for version, binary := range binaries {
		for _, delta := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, certificate %s", version, map[bool]string{false: "state of the world", true: "incremental"}[delta]), func(t *testing.T) {
				ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
				defer cancel()
				home := filepath.Join(dir, fmt.Sprint(version, delta))
				start := func(name string, s envoy.Sidecar) *envoy.Process {
					s.Node, s.SDSSocket, s.Delta = name, east.Path("run", name+".sock"), delta
					p, err := envoy.Start(ctx, envoy.Config{Binary: binary, YAML: mixed(t, s), Dir: filepath.Join(home, name)})
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() {
						p.Stop()
						if t.Failed() {
							text, _ := os.ReadFile(p.LogPath())
							t.Logf("%s's log ends with\n%s", name, text[max(0, len(text)-2000):])
						}
					})
					return p
				}
				server := start("api", envoy.Sidecar{Inbound: &envoy.Inbound{
					AllowSPIFFEIDs: []string{"spiffe://example.org/web"}, Upstream: workload.Listener.Addr().String(), RequestsPerConnection: 1,
				}, Outbound: &envoy.Outbound{Target: "127.0.0.1:1", ExpectSPIFFEID: "spiffe://example.org/none"}})
				target, err := server.Listener(ctx, "inbound")
				if err != nil {
					t.Fatal(err)
				}
				client := start("web", envoy.Sidecar{Outbound: &envoy.Outbound{Target: target, ExpectSPIFFEID: "spiffe://example.org/api", RequestsPerConnection: 1}})
				local, err := client.Listener(ctx, "outbound")
				if err != nil {
					t.Fatal(err)
				}
				// Until both have shown two certificates, the second of which came by an update.
				serials, requests, failures := map[string]map[string]bool{"client": {}, "server": {}}, 0, 0
				err = lab.Until(ctx, "two certificates of each side seen", time.Minute, func() error {
					resp, err := http.Get("http://" + local + "/")
					if err != nil {
						return err
					}
					defer resp.Body.Close()
					requests++
					if resp.StatusCode != http.StatusOK {
						if len(serials["client"]) > 0 {
							failures++
						}
						return errors.New(resp.Status)
					}
					c, err1 := envoy.ClientSerial(resp.Header)
					s, err2 := envoy.ServerSerial(resp.Header)
					if err := errors.Join(err1, err2); err != nil {
						return err
					}
					serials["client"][c], serials["server"][s] = true, true
					if len(serials["client"]) < 2 || len(serials["server"]) < 2 {
						return fmt.Errorf("seen so far: %v", serials)
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				if failures > 0 {
					t.Errorf("%d of %d requests failed once the first had passed", failures, requests)
				}
				for name, p := range map[string]*envoy.Process{"api": server, "web": client} {
					if n, err := p.Stat(ctx, "cluster.signet_agent.upstream_cx_active"); err != nil || n != 1 {
						t.Errorf("%s has %d connections to its agent, want 1: %v", name, n, err)
					}
					if n, err := p.Stat(ctx, "cluster.signet_agent.upstream_cx_total"); err != nil || n != 1 {
						t.Errorf("%s has made %d connections to its agent, want 1: %v", name, n, err)
					}
				}
				var status struct {
					Streams []struct {
						Protocol string `json:"protocol"`
					} `json:"streams"`
				}
				if err := l.JSON(ctx, &status, "agent", "status", "--config", east.Path("node-1.yaml")); err != nil {
					t.Error(err)
				}
				ways := map[string]int{}
				for _, s := range status.Streams {
					ways[s.Protocol]++
				}
				if ways["sotw"] != 2 || ways["delta"] != 2 {
					t.Errorf("the agent sees the streams %v, want two of each kind", ways)
				}
				t.Logf("%d requests, streams %v", requests, ways)
			})
		}
	}
}
