//go:build real

package envoy

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// asParent makes this test binary start an Envoy, print its PID and wait to be killed.
const asParent = "ENVOY_TEST_AS_PARENT"

func TestMain(m *testing.M) {
	if dir := os.Getenv(asParent); dir != "" {
		p, err := Start(context.Background(), Config{YAML: plain, Dir: dir})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(p.PID())
		select {}
	}
	goleak.VerifyTestMain(m)
}

// plain is a bootstrap without certificates.
const plain = `
admin: { address: { socket_address: { address: 127.0.0.1, port_value: 0 } } }
static_resources:
  listeners:
  - name: outbound
    address: { socket_address: { address: 127.0.0.1, port_value: 0 } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.echo
        typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo }
`

func TestStockEnvoysTakeTheBootstraps(t *testing.T) {
	bin, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	bins, err := Others()
	if err != nil {
		t.Fatal(err)
	}
	bins["pinned"] = bin
	for version, bin := range bins {
		for name, s := range variants() {
			t.Run(version+" "+name, func(t *testing.T) {
				text, err := s.YAML()
				if err != nil {
					t.Fatal(err)
				}
				path := filepath.Join(t.TempDir(), "envoy.yaml")
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
				if out, err := exec.Command(bin, "--mode", "validate", "--config-path", path, "--log-level", "warning", "--disable-hot-restart").CombinedOutput(); err != nil {
					t.Errorf("%v\n%s\n%s", err, out, text)
				}
			})
		}
	}
}

func TestAnEnvoyStartsAndStops(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	dir := t.TempDir()
	p, err := Start(ctx, Config{YAML: plain, Dir: dir, LogLevel: "warning"})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop()
	if err := p.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	if a, err := p.Listener(ctx, "outbound"); err != nil || !strings.HasPrefix(a, "127.0.0.1:") {
		t.Errorf("listener at %q: %v", a, err)
	}
	if n, err := p.Stat(ctx, "server.concurrency"); err != nil || n != 1 {
		t.Errorf("concurrency %d: %v", n, err)
	}
	p.Stop()
	p.Stop()
	if alive(p.PID()) {
		t.Error("it lives on")
	}
}

func TestAnEnvoyEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	p, err := Start(ctx, Config{YAML: plain, Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case <-p.Done():
	case <-time.After(stopGrace + 30*time.Second):
		t.Fatal("it lives on")
	}
}

func TestABadBootstrapSaysWhatEnvoySaid(t *testing.T) {
	p, err := Start(t.Context(), Config{YAML: "nonsense: true", Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop()
	if err := p.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("got %v", err)
	}
}

func TestAnEnvoyDoesNotOutliveItsParent(t *testing.T) {
	parent := exec.Command(os.Args[0])
	parent.Env = append(os.Environ(), asParent+"="+t.TempDir())
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	if !alive(pid) {
		t.Fatal("it never lived")
	}
	_ = parent.Process.Kill() // SIGKILL: it can't tidy up
	_ = parent.Wait()
	for deadline := time.Now().Add(30 * time.Second); alive(pid); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			t.Fatal("it outlived its parent")
		}
	}
}

// alive tells a running process from a gone one, and from one that only waits to be reaped.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, state, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(state, "Z") && !strings.HasPrefix(state, "X")
}
