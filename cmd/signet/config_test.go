package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// config runs `signet config …` and returns what it printed.
func runConfig(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, talk bytes.Buffer
	c := &cli{in: strings.NewReader(""), out: &out, err: &talk}
	cmd := c.configCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&talk)
	err = cmd.ExecuteContext(t.Context())
	return out.String(), talk.String(), err
}

func configFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const rightConfig = "trust_domain: example.org\ncluster: east\nleaf: {ttl: 1h}\n"

func TestConfigViewShowsEveryValueWithItsSource(t *testing.T) {
	path := configFile(t, rightConfig)
	out, _, err := runConfig(t, "view", "--config", path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]string{{"KEY", "VALUE", "SOURCE"}, {"leaf.ttl", "1h", path + ":3"}, {"leaf.max_ttl", "24h", "default"}, {"keystore.passphrase_file", "-", "default"}} {
		found := false
		for line := range strings.Lines(out) {
			found = found || strings.Join(strings.Fields(line), " ") == strings.Join(want, " ")
		}
		if !found {
			t.Errorf("no line %v in\n%s", want, out)
		}
	}
	for format, parse := range map[string]func([]byte, any) error{"json": json.Unmarshal, "yaml": yaml.Unmarshal} {
		out, _, err := runConfig(t, "view", "--config", path, "-o", format)
		if err != nil {
			t.Fatal(err)
		}
		var got []map[string]string
		if err := parse([]byte(out), &got); err != nil || len(got) < 20 || got[0]["key"] != "trust_domain" || got[0]["value"] != "example.org" || got[0]["source"] != path+":1" {
			t.Errorf("%s: %v\n%s", format, err, out)
		}
	}
	if out, _, err := runConfig(t, "view", "--config", path, "-o", "name"); err != nil || !strings.HasPrefix(out, "setting/trust_domain\nsetting/cluster\n") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestConfigValidateAnswersByItsExitStatus(t *testing.T) {
	isNo := func(err error) bool { n := (noError{}); return errors.As(err, &n) }

	path := configFile(t, rightConfig)
	out, talk, err := runConfig(t, "validate", "--config", path)
	if err != nil || out != "" || talk != path+" is a valid configuration of the server\n" {
		t.Errorf("valid: %v, stdout %q, stderr %q", err, out, talk)
	}
	if out, _, err := runConfig(t, "validate", "--config", path, "-o", "json"); err != nil || strings.TrimSpace(out) != "[]" {
		t.Errorf("valid, json: %v, %q", err, out)
	}

	path = configFile(t, "trust_domain: example.org\ncluster: east\nlisen: {}\nleaf: {ttl: 25h}\n")
	out, _, err = runConfig(t, "validate", "--config", path)
	if !isNo(err) || !strings.Contains(err.Error(), "2 findings") {
		t.Errorf("two findings: %v", err)
	}
	for _, want := range []string{path + `:3:1`, `unknown key "lisen"; did you mean "listen"?`, path + ":4:8", "longer than leaf.max_ttl"} {
		if !strings.Contains(out, want) {
			t.Errorf("stdout lacks %q:\n%s", want, out)
		}
	}
	out, _, err = runConfig(t, "validate", "--config", path, "-o", "json")
	var found []struct {
		File, Key, Message string
		Line, Column       int
	}
	if jerr := json.Unmarshal([]byte(out), &found); jerr != nil || !isNo(err) || len(found) != 2 || found[0].Line != 3 || found[0].Column != 1 || found[0].Key != "lisen" || found[0].File != path {
		t.Errorf("json: %v, %v, %+v", err, jerr, found)
	}
	if _, _, err := runConfig(t, "view", "--config", path); !isNo(err) {
		t.Errorf("view of a file with findings: %v", err)
	}

	// Not an answer, so neither yes nor no.
	for name, args := range map[string][]string{
		"missing file":   {"validate", "--config", path + ".none"},
		"no role":        {"validate", "--config", configFile(t, "state_dir: x\n")},
		"unknown role":   {"validate", "--config", path, "--role", "king"},
		"unknown format": {"validate", "--config", path, "-o", "xml"},
		"no file":        {"validate"},
		"an argument":    {"validate", "--config", path, "x"},
	} {
		if _, _, err := runConfig(t, args...); err == nil || isNo(err) {
			t.Errorf("%s: %v, want an error that is no answer", name, err)
		}
	}
	if _, talk, err := runConfig(t, "validate", "--role", "agent", "--config", configFile(t, "state_dir: x\n")); err != nil || !strings.Contains(talk, "of the agent") {
		t.Errorf("a given role: %v, %q", err, talk)
	}
}
