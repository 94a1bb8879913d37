//go:build real

package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

// theVault is the real one of all tests here that need it. Each mounts engines of its own.
var theVault lab.OneVault

// block is a fenced one of a page: what stands behind the fence, and the text.
type block struct{ info, text string }

func blocks(t *testing.T, page string) (all []block) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../../docs", page))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("(?ms)^```([^\n]*)\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		all = append(all, block{m[1], m[2]})
	}
	return all
}

// spans are what stands between backquotes in the text and the tables of a page.
func spans(t *testing.T, page string) (all []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../../docs", page))
	if err != nil {
		t.Fatal(err)
	}
	outside := regexp.MustCompile("(?ms)^```[^\n]*\n.*?^```$").ReplaceAllString(string(text), "")
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(outside, -1) {
		all = append(all, strings.ReplaceAll(strings.Join(strings.Fields(m[1]), " "), `\|`, "|"))
	}
	return all
}

// TestTheDocumentationOfVault types what docs/vault.md says into a shell, from an empty Vault on.
func TestTheDocumentationOfVault(t *testing.T) {
	dir := filepath.Join(scratch, "docs")
	v, err := lab.StartVault(t.Context(), lab.VaultConfig{Dir: filepath.Join(dir, "v")})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Stop()
	ports, err := lab.FreePorts(6)
	if err != nil {
		t.Fatal(err)
	}
	here := []string{"https://vault.example.org:8200", v.Address}
	for i, port := range []string{"7440", "7441", "7442", "7450", "7451", "7452"} {
		here = append(here, port, fmt.Sprint(ports[i]))
	}
	local := strings.NewReplacer(here...)
	var script strings.Builder
	script.WriteString("set -eu -o pipefail\n")
	var logins []string
	for _, b := range blocks(t, "vault.md") {
		kind, file, _ := strings.Cut(b.info, " ")
		switch {
		case kind == "sh":
			script.WriteString(local.Replace(b.text))
		case kind == "yaml" && file != "":
			if err := os.WriteFile(filepath.Join(dir, file), []byte(local.Replace(b.text)), 0o600); err != nil {
				t.Fatal(err)
			}
		case kind == "yaml":
			logins = append(logins, strings.Split(strings.TrimSpace(b.text), "\n")...)
		default:
			t.Errorf("a block of kind %q is neither run nor read", b.info)
		}
	}
	ca, err := os.ReadFile(v.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "vault-ca.pem"), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	tools, err := filepath.Abs("../../.tools/bin")
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	shell := exec.CommandContext(ctx, "bash", "-x", "-c", script.String())
	shell.Dir, shell.Stdout, shell.Stderr = dir, out, out
	shell.Env = []string{
		"PATH=" + filepath.Dir(signet) + ":" + tools + ":/usr/bin:/bin", "HOME=" + dir, "XDG_CACHE_HOME=" + filepath.Join(scratch, "cache"),
		"VAULT_ADDR=" + v.Address, "VAULT_CACERT=" + v.CAFile, "VAULT_TOKEN=" + v.RootToken, "UNSEAL_KEY=" + v.UnsealKey,
	}
	shell.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	// The servers are in its group.
	defer func() { _ = syscall.Kill(-shell.Process.Pid, syscall.SIGKILL) }()
	shell.Cancel = func() error { return syscall.Kill(-shell.Process.Pid, syscall.SIGKILL) }
	if err := shell.Wait(); err != nil {
		text, _ := os.ReadFile(out.Name())
		for _, log := range []string{"east.log", "west.log"} {
			said, _ := os.ReadFile(filepath.Join(dir, log))
			t.Logf("%s ends with\n%s", log, said[max(0, len(said)-3000):])
		}
		t.Fatalf("%v\n%s", err, text[max(0, len(text)-6000):])
	}

	run := func(seconds int, command string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "timeout", fmt.Sprint(seconds), "bash", "-c", "set -eu -o pipefail\n"+command)
		cmd.Dir, cmd.Env = dir, shell.Env
		text, err := cmd.CombinedOutput()
		return string(text), err
	}
	t.Run("what is between the blocks can be typed as well", func(t *testing.T) {
		typed := map[string]bool{}
		for _, command := range spans(t, "vault.md") {
			kind, arguments, _ := strings.Cut(command, " ")
			if kind != "vault" && kind != "signet" || arguments == "" || strings.ContainsAny(command, "…<") {
				continue
			}
			typed[command] = true
			whole := kind == "vault" || strings.Contains(command, "--config")
			var text string
			var err error
			switch {
			case !whole: // the name of one, with flags that it has
				words, flags, _ := strings.Cut(command, " --")
				if text, err = run(60, words+" --help"); err == nil && flags != "" && !strings.Contains(text, "--"+flags) {
					err = fmt.Errorf("it has no --%s", flags)
				}
			case strings.Contains(command, " --watch"):
				// It shows what it watches, and goes on; timeout says 124.
				text, err = run(8, command)
				if x := (*exec.ExitError)(nil); errors.As(err, &x) && x.ExitCode() == 124 && text != "" {
					err = nil
				}
			case strings.HasPrefix(command, "signet check "):
				// A rotation is under way, and says so: 1 is that there are findings, 2 that it could not look.
				text, err = run(60, command)
				if x := (*exec.ExitError)(nil); errors.As(err, &x) && x.ExitCode() == 1 && strings.Contains(text, "SGN1026") {
					err = nil
				}
			default:
				text, err = run(60, local.Replace(command))
				if strings.HasPrefix(command, "vault list ") && strings.HasPrefix(text, "No value found") {
					err = nil // there is none, which it says by its exit status too
				}
			}
			if err != nil {
				t.Errorf("%s: %v\n%s", command, err, text)
			}
		}
		for _, one := range []string{"vault kv enable-versioning secret", "vault list -detailed pki/issuers", "vault secrets tune -max-lease-ttl=87600h pki", "signet check --config east.yaml", "signet root init --vault"} {
			if !typed[one] {
				t.Errorf("%q was not typed, but %v", one, slices.Sorted(maps.Keys(typed)))
			}
		}
	})
	t.Run("what Vault has signed and nobody has asked for is found", func(t *testing.T) {
		all := blocks(t, "vault.md")
		i := slices.IndexFunc(all, func(b block) bool { return strings.Contains(b.text, "> forged") })
		if i < 0 {
			t.Fatal("the page says nothing of it")
		}
		if text, err := run(60, all[i].text); err != nil {
			t.Fatalf("before anything was forged: %v\n%s", err, text)
		}
		forge := `openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout forged.key -subj /CN=x -out forged.csr
vault write -field=serial_number pki/issuer/root-2026/sign-intermediate csr=@forged.csr common_name=forged ttl=1h > forged.serial`
		if text, err := run(60, forge); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		text, err := run(60, all[i].text)
		found, _ := os.ReadFile(filepath.Join(dir, "forged"))
		forged, _ := os.ReadFile(filepath.Join(dir, "forged.serial"))
		if err == nil || len(forged) == 0 || strings.TrimSpace(string(found)) != strings.TrimSpace(string(forged)) {
			t.Errorf("forged was %s, found is %q: %v\n%s", forged, found, err, text)
		}
	})
	t.Run("the logins that it shows are valid", func(t *testing.T) {
		if len(logins) < 4 {
			t.Fatalf("%d logins", len(logins))
		}
		for _, l := range logins {
			l, _, _ = strings.Cut(l, " #")
			path := filepath.Join(dir, "login.yaml")
			text := "trust_domain: example.org\ncluster: east\nvault:\n  address: https://v:8200\n  " + l + "\ntrust: { vault_kv: { mount: kv } }\n"
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if r := execute(t, dir, nil, "config", "validate", "--config", path); r.code != 0 {
				t.Error(l, r)
			}
		}
	})
	t.Run("so is the reference", func(t *testing.T) {
		r := execute(t, dir, nil, "config", "validate", "--config", "reference.yaml")
		if r.code != 0 {
			t.Error(r)
		}
		// What it gives as defaults are the defaults.
		whole, err := os.ReadFile(filepath.Join(dir, "reference.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		short := regexp.MustCompile(`(?m)^ +(timeout|mount|transit|namespace|ca_file|server_name): .*\n|, issuer: default, life: 168h|, path: signet/example.org`).ReplaceAllString(string(whole), "")
		if err := os.WriteFile(filepath.Join(dir, "short.yaml"), []byte(short), 0o600); err != nil {
			t.Fatal(err)
		}
		value := func(file string) string {
			r := execute(t, dir, nil, "config", "view", "--config", file)
			if r.code != 0 {
				t.Fatal(r, short)
			}
			return regexp.MustCompile(`(?m) +\S+$`).ReplaceAllString(r.out, "")
		}
		if a, b := value("reference.yaml"), value("short.yaml"); a != b || len(short) >= len(whole) {
			t.Errorf("with the defaults written out\n%s\nand without\n%s", a, b)
		}
	})
	t.Run("no key of a CA is on a disk", func(t *testing.T) {
		for _, cluster := range []string{"east", "west"} {
			files, err := filepath.Glob(filepath.Join(dir, cluster, "keys", "*.pem"))
			if err != nil || len(files) != 1 || filepath.Base(files[0]) != "log@1.pem" {
				t.Errorf("%s has %v, %v", cluster, files, err)
			}
		}
	})
	t.Run("no secret is in a log", func(t *testing.T) {
		secrets := []string{v.RootToken}
		for _, file := range []string{"root.token", "east.secret-id", "west.secret-id", "root.pass", "east.pass", "west.pass"} {
			text, err := os.ReadFile(filepath.Join(dir, file))
			if err != nil {
				t.Fatal(err)
			}
			secrets = append(secrets, strings.TrimSpace(string(text)))
		}
		for _, log := range []string{"east.log", "west.log"} {
			text, err := os.ReadFile(filepath.Join(dir, log))
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range secrets {
				if strings.Contains(string(text), s) {
					t.Errorf("%s has a secret of %d bytes in it", log, len(s))
				}
			}
			if strings.Contains(string(text), "hvs.") {
				t.Errorf("%s has a token in it", log)
			}
		}
	})
}

// TestTheTableOfTroublesQuotesWhatIsSaid: the sentences that people look for are those that the program has.
func TestTheTableOfTroublesQuotesWhatIsSaid(t *testing.T) {
	page, err := os.ReadFile("../../docs/vault.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(page), "| it says | do |")
	var source strings.Builder
	for _, dir := range []string{"vault", "vault/transit", "vault/pki", "vault/kv", "cmd/signet", "server", "server/shared", "check"} {
		files, err := filepath.Glob(filepath.Join("../..", dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range slices.DeleteFunc(files, func(f string) bool { return strings.HasSuffix(f, "_test.go") }) {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			source.Write(text)
		}
	}
	quoted := regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(table, -1)
	if len(quoted) < 10 {
		t.Fatalf("only %d sentences", len(quoted))
	}
	for _, q := range quoted {
		if !strings.Contains(source.String(), q[1]) {
			t.Errorf("nothing says %q", q[1])
		}
	}
}
