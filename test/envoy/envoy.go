// Package envoy starts stock Envoys for tests and the demo, and writes the bootstraps they run with.
package envoy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// stopGrace is how long a stopping Envoy may take before it is killed.
const stopGrace = 5 * time.Second

// Config of one Envoy.
type Config struct {
	// Binary is the program; default .tools/venv/bin/envoy under the module's root, where `make tools` puts it. See Others.
	Binary string
	// YAML is the bootstrap, see Sidecar. Its admin listener must be there; port 0 lets the kernel choose.
	YAML string
	// Dir is for the bootstrap, the log and the admin address; made if it is missing.
	Dir string
	// LogLevel is Envoy's --log-level; default info.
	LogLevel string
	// Concurrency is the number of worker threads; default 1.
	Concurrency int
}

// Process is a running Envoy.
type Process struct {
	dir  string
	cmd  *exec.Cmd
	stop context.CancelFunc
	done chan struct{}
	err  error // of Wait, once done is closed
}

// Start starts an Envoy that ends with ctx, with Stop, or with this process, whichever comes first. It doesn't wait for
// it to be ready. Hot restart is off, so that any number can run on one machine and nothing stays behind in shared memory.
func Start(ctx context.Context, c Config) (*Process, error) {
	if c.Binary == "" {
		b, err := binary()
		if err != nil {
			return nil, err
		}
		c.Binary = b
	}
	if c.Dir == "" {
		return nil, errors.New("start Envoy: no folder given for its bootstrap and log")
	}
	if c.LogLevel == "" {
		c.LogLevel = "info"
	}
	if c.Concurrency == 0 {
		c.Concurrency = 1
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("start Envoy: %w", err)
	}
	p := &Process{dir: c.Dir, done: make(chan struct{})}
	bootstrap := filepath.Join(c.Dir, "envoy.yaml")
	if err := os.WriteFile(bootstrap, []byte(c.YAML), 0o600); err != nil {
		return nil, fmt.Errorf("start Envoy: %w", err)
	}
	if err := os.Remove(p.adminPath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("start Envoy: an old admin address is in the way: %w", err)
	}
	out, err := os.OpenFile(p.LogPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start Envoy: %w", err)
	}
	ctx, p.stop = context.WithCancel(ctx)
	p.cmd = exec.CommandContext(ctx, c.Binary,
		"--config-path", bootstrap,
		"--admin-address-path", p.adminPath(),
		"--concurrency", strconv.Itoa(c.Concurrency),
		"--log-level", c.LogLevel,
		"--disable-hot-restart",
	)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = stopGrace
	started := make(chan error, 1)
	go func() {
		// Pdeathsig is sent when the thread that started the child ends, so that thread is held for as long.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.done)
		defer out.Close()
		if err := p.cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		p.err = p.cmd.Wait()
	}()
	if err := <-started; err != nil {
		p.stop()
		return nil, fmt.Errorf("start Envoy: %w", err)
	}
	return p, nil
}

// binary looks for the stock Envoy at the root of the module.
func binary() (string, error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	b := filepath.Join(root, ".tools", "venv", "bin", "envoy")
	if _, err := os.Stat(b); err != nil {
		return "", fmt.Errorf("no Envoy at %s: run `make tools` first", b)
	}
	return b, nil
}

// Others returns the programs of other versions of Envoy, by version: those in .tools/envoy/<version>/bin under the
// module's root, where `make envoys` puts them. None is no error.
func Others() (map[string]string, error) {
	root, err := moduleRoot()
	if err != nil {
		return nil, err
	}
	found, err := filepath.Glob(filepath.Join(root, ".tools", "envoy", "*", "bin", "envoy"))
	if err != nil {
		return nil, fmt.Errorf("look for other versions of Envoy: %w", err)
	}
	others := map[string]string{}
	for _, b := range found {
		others[filepath.Base(filepath.Dir(filepath.Dir(b)))] = b
	}
	return others, nil
}

// moduleRoot looks from the working directory upwards.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("no Envoy: the working directory is in no Go module, name the binary")
		}
	}
}

func (p *Process) adminPath() string { return filepath.Join(p.dir, "admin") }

// LogPath is the file with what Envoy says.
func (p *Process) LogPath() string { return filepath.Join(p.dir, "envoy.log") }

// PID of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Stop ends the process in order, and by force after some seconds. It returns when it is gone; twice is once.
func (p *Process) Stop() {
	p.stop()
	<-p.done
}

// AdminURL is the address of the admin listener, known soon after the start.
func (p *Process) AdminURL() (string, error) {
	b, err := os.ReadFile(p.adminPath())
	if err != nil {
		return "", fmt.Errorf("admin address of Envoy: %w", err)
	}
	if len(b) == 0 {
		return "", errors.New("admin address of Envoy: not written yet")
	}
	return "http://" + strings.TrimSpace(string(b)), nil
}

// Ready waits until Envoy says that it is, which means that its listeners are open: with certificates, or without when
// none came within initial_fetch_timeout.
func (p *Process) Ready(ctx context.Context) error {
	return p.until(ctx, "ready", func() error {
		body, err := p.Admin(ctx, "/ready")
		if err == nil && strings.TrimSpace(body) != "LIVE" {
			err = fmt.Errorf("it is %s", strings.TrimSpace(body))
		}
		return err
	})
}

// until polls, because Envoy's admin has no other way to wait.
func (p *Process) until(ctx context.Context, what string, try func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		last := try()
		if last == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("wait for Envoy to be %s: it ended (%v); the last of its log: %s", what, p.err, p.tail())
		case <-ctx.Done():
			return fmt.Errorf("wait for Envoy to be %s: %w; last seen: %v; its log is %s", what, ctx.Err(), last, p.LogPath())
		case <-tick.C:
		}
	}
}

// tail is the end of the log.
func (p *Process) tail() string {
	b, err := os.ReadFile(p.LogPath())
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

// Admin asks the admin listener, for example "/stats?filter=sds".
func (p *Process) Admin(ctx context.Context, path string) (string, error) {
	url, err := p.AdminURL()
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+path, nil)
	if err != nil {
		return "", err
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", fmt.Errorf("ask Envoy's admin for %s: %w", path, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	if err != nil {
		return "", fmt.Errorf("ask Envoy's admin for %s: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusServiceUnavailable { // /ready while not ready
		return "", fmt.Errorf("ask Envoy's admin for %s: %s", path, resp.Status)
	}
	return string(b), nil
}

// Stat is the value of one counter or gauge by its full name, 0 if there is none of that name yet.
func (p *Process) Stat(ctx context.Context, name string) (int64, error) {
	text, err := p.Admin(ctx, "/stats")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), ": "); ok && k == name {
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("statistic %s of Envoy is %q, no number", name, v)
			}
			return n, nil
		}
	}
	return 0, nil
}

// Listener waits for a listener by name (Inbound and Outbound name theirs "inbound" and "outbound") and returns its
// address, host:port, which tells the port where the bootstrap says 0.
func (p *Process) Listener(ctx context.Context, name string) (string, error) {
	var address string
	err := p.until(ctx, "listening as "+name, func() error {
		text, err := p.Admin(ctx, "/listeners?format=json")
		if err != nil {
			return err
		}
		var got struct {
			Statuses []struct {
				Name    string `json:"name"`
				Address struct {
					Socket struct {
						Host string `json:"address"`
						Port int    `json:"port_value"`
					} `json:"socket_address"`
				} `json:"local_address"`
			} `json:"listener_statuses"`
		}
		if err := json.Unmarshal([]byte(text), &got); err != nil {
			return fmt.Errorf("listeners of Envoy: %w", err)
		}
		for _, s := range got.Statuses {
			if s.Name == name && s.Address.Socket.Port != 0 {
				address = fmt.Sprintf("%s:%d", s.Address.Socket.Host, s.Address.Socket.Port)
				return nil
			}
		}
		return fmt.Errorf("no listener %s yet", name)
	})
	return address, err
}
