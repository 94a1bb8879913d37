//go:build real

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

// dev is a running `signet serve --dev`.
type dev struct {
	cmd *exec.Cmd
	// watch and envoy are the two commands it said to type next, url what it said to ask.
	watch, envoy, url string
	talk              *bytes.Buffer
}

func (d *dev) stop(t *testing.T) {
	t.Helper()
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	if err := d.cmd.Wait(); err != nil {
		t.Errorf("serve --dev stopped with %v: %s", err, d.talk)
	}
}

func startDev(t *testing.T, cwd string, args ...string) *dev {
	t.Helper()
	d := &dev{cmd: exec.Command(signet, append([]string{"serve", "--dev"}, args...)...), talk: &bytes.Buffer{}}
	d.cmd.Dir, d.cmd.Stderr = cwd, d.talk
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(commandTime, func() { _ = d.cmd.Process.Kill() })
	defer late.Stop()
	for lines := bufio.NewScanner(out); d.url == "" && lines.Scan(); {
		switch line := strings.TrimSpace(lines.Text()); {
		case strings.Contains(line, " svid watch"):
			d.watch = line
		case strings.HasPrefix(line, "envoy -c "):
			d.envoy = line
			d.url = regexp.MustCompile(`http://\S+`).FindString(line)
		}
	}
	if d.watch == "" || d.url == "" {
		_ = d.cmd.Process.Kill()
		_ = d.cmd.Wait()
		t.Fatalf("serve --dev does not say what to type next: %s", d.talk)
	}
	return d
}

func TestTheFiveMinuteStart(t *testing.T) {
	lab.DevPorts(t)
	cwd := filepath.Join(scratch, "dev")
	if err := os.Mkdir(cwd, 0o700); err != nil {
		t.Fatal(err)
	}
	started := time.Now()
	d := startDev(t, cwd)
	t.Logf("ready after %s", time.Since(started).Round(time.Millisecond))
	stopped := false
	defer func() {
		if !stopped {
			d.stop(t)
		}
	}()

	t.Run("the first command shows an identity of DEV", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), commandTime)
		defer cancel()
		cmd := exec.CommandContext(ctx, "sh", "-c", "exec "+d.watch)
		cmd.Dir = cwd
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; n < 2 && lines.Scan(); n++ { // the head, and the certificate that is there
		}
		if !regexp.MustCompile(`[0-9a-f]{32}`).MatchString(lines.Text()) {
			t.Errorf("watch prints %q", lines.Text())
		}
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			t.Errorf("watch, stopped by hand: %v", err)
		}

		var svid struct {
			SPIFFEID  string    `json:"spiffe_id"`
			NotBefore time.Time `json:"not_before"`
			NotAfter  time.Time `json:"not_after"`
			Chain     []struct {
				Issuer string `json:"issuer"`
			} `json:"chain"`
		}
		r := execute(t, cwd, nil, "svid", "fetch", "-o", "json") // without --socket: it is found where --dev makes it
		if err := json.Unmarshal([]byte(r.out), &svid); err != nil {
			t.Fatal(err, r)
		}
		for _, c := range svid.Chain {
			if !strings.Contains(c.Issuer, "DEV") {
				t.Errorf("issuer %q does not say DEV", c.Issuer)
			}
		}
		if left := time.Until(svid.NotAfter); left > 2*time.Minute || left < 20*time.Second {
			t.Errorf("the certificate lives another %s", left)
		}
	})

	t.Run("the second gives an Envoy that works as it is", func(t *testing.T) {
		bin, err := filepath.Abs("../../.tools/venv/bin")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(bin, "envoy")); err != nil {
			t.Fatalf("no Envoy, run make tools: %v", err)
		}
		cmd := exec.Command("sh", "-c", "exec "+d.envoy)
		cmd.Dir, cmd.Env = cwd, append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		var log bytes.Buffer
		cmd.Stdout, cmd.Stderr = &log, &log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
		err = lab.Until(t.Context(), "a request through Envoy", time.Minute, func() error {
			resp, err := http.Get(d.url)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if id := resp.Header.Get("x-peer-spiffe-id"); err != nil || resp.StatusCode != 200 || !strings.HasPrefix(id, "spiffe://dev.local/") {
				return fmt.Errorf("%s, peer %q, %s %w", resp.Status, id, body, err)
			}
			return nil
		})
		if err != nil {
			_ = cmd.Process.Kill()
			t.Errorf("%v\n%s", err, log.Bytes()[max(0, log.Len()-3000):])
		}
	})

	t.Run("every other command works on it", func(t *testing.T) {
		for _, args := range [][]string{{"cluster", "show"}, {"registration", "list"}, {"join-token", "list"}, {"log", "verify"}} {
			if r := execute(t, cwd, nil, append(args, "--config", "signet-dev/server.yaml")...); r.code != 0 {
				t.Error(r)
			}
		}
	})

	show := func() (v struct{ Roots []string }) {
		t.Helper()
		r := execute(t, cwd, nil, "cluster", "show", "--config", "signet-dev/server.yaml", "-o", "json")
		if err := json.Unmarshal([]byte(r.out), &v); err != nil || len(v.Roots) != 1 {
			t.Fatal(err, r)
		}
		return v
	}
	refusesDev := func(says []string, args ...string) {
		t.Helper()
		changesNothing(t, cwd, func() ran {
			r := execute(t, cwd, nil, append([]string{"serve", "--dev"}, args...)...)
			if banner, rest, ok := strings.Cut(r.err, " ***\n"); ok && strings.HasPrefix(strings.TrimSpace(banner), "*** DEV ***") {
				r.err = rest
			}
			r.refused(t, 2, says...)
			return r
		})
	}
	refusesDev([]string{"in use by process", "signet-dev"})
	root := show().Roots[0]
	stopped = true
	d.stop(t)

	t.Run("a restart uses what is there", func(t *testing.T) {
		d := startDev(t, cwd)
		if again := show().Roots[0]; again != root {
			t.Errorf("the root was %s and is %s", root, again)
		}
		if r := execute(t, cwd, nil, "svid", "fetch"); r.code != 0 {
			t.Error(r)
		}
		d.stop(t)
	})
	t.Run("a folder with anything else is left alone", func(t *testing.T) {
		if err := errors.Join(os.Mkdir(filepath.Join(cwd, "mine"), 0o700), os.WriteFile(filepath.Join(cwd, "mine", "thesis.tex"), []byte("years of work"), 0o600)); err != nil {
			t.Fatal(err)
		}
		refusesDev([]string{"thesis.tex", "--dir"}, "--dir", "mine")
		stray := filepath.Join(cwd, "signet-dev", "thesis.tex")
		if err := os.WriteFile(stray, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		refusesDev([]string{"thesis.tex", "--dir"})
		if err := os.Remove(stray); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("nothing but loopback", func(t *testing.T) {
		path := filepath.Join(cwd, "signet-dev", "server.yaml")
		config, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, door := range []string{"enrol", "agents", "http"} {
			open := regexp.MustCompile(door+`: 127\.0\.0\.1:`).ReplaceAllString(string(config), door+": 192.0.2.1:")
			if open == string(config) {
				t.Fatalf("no %s in %s", door, config)
			}
			if err := os.WriteFile(path, []byte(open), 0o600); err != nil {
				t.Fatal(err)
			}
			refusesDev([]string{"loopback", "192.0.2.1"})
		}
		refusesDev([]string{"--dev", "--config"}, "--config", "signet-dev/server.yaml")
	})
}
