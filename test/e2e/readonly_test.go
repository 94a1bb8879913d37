//go:build real

package e2e

import (
	"os"
	"os/exec"
	"testing"
)

// readOnly wraps a command so that it finds these folders mounted read-only; to root, modes of files say nothing.
func readOnly(t *testing.T, folders ...string) []string {
	t.Helper()
	wrap := []string{"unshare", "--mount"}
	if os.Geteuid() != 0 {
		wrap = append(wrap, "--map-root-user")
	}
	if out, err := exec.Command(wrap[0], append(wrap[1:], "true")...).CombinedOutput(); err != nil {
		t.Skipf("needs a mount namespace of its own: %v: %s", err, out)
	}
	script := `set -e; while [ "$1" != -- ]; do mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; done; shift; exec "$@"`
	wrap = append(wrap, "sh", "-c", script, "sh")
	return append(append(wrap, folders...), "--")
}

func TestAReadOnlyFolderIsSaidToBeOneAndLeftWhole(t *testing.T) {
	w := newWorld(t, "")
	w.write(t, "empty/.keep", "")
	server := w.serve(t)
	w.apply(t, "registrations:\n  - { name: me, spiffe_id: spiffe://example.org/me, agents: [node-1], selectors: ['unix:uid:"+uid()+"'] }\n")
	a := w.agent(t, "node-1")
	socket := a.Socket
	w.must(t, "svid", "fetch", "--socket", socket)
	w.refusesWith(t, readOnly(t, w.path("empty")), 2, []string{"empty/tls", "read-only"}, "svid", "fetch", "--socket", socket, "--write", "empty/tls")
	a.Stop()
	server.Stop()

	csr := w.west.Path("intermediate.csr")
	fp := keyFingerprint(t, readCSR(t, csr).Raw)
	for name, c := range map[string]struct {
		folder string
		says   []string
		args   []string
	}{
		"root init":       {"empty", []string{"empty/root"}, []string{"root", "init", "--trust-domain", "example.org", "--dir", "empty/root", "--passphrase-file", "root.pass"}},
		"root sign":       {"root", []string{"root"}, w.west.SignArgs(fp)},
		"cluster init":    {"east", []string{"state"}, []string{"cluster", "init", "--config", w.east.Config()}},
		"init --dry-run":  {"east", []string{"state"}, []string{"cluster", "init", "--config", w.east.Config(), "--dry-run"}},
		"cluster install": {"east", []string{"state"}, w.east.InstallArgs(w.RootFingerprint)},
		"serve":           {"east", []string{"state"}, []string{"serve", "--config", w.east.Config()}},
		"agent":           {"east", []string{"node-1"}, []string{"agent", "--config", w.path("east/node-1.yaml")}},
		"log prove --out": {"empty", []string{"empty/proof"}, []string{"log", "prove", "--config", w.east.Config(), "--index", "0", "--out", "empty/proof"}},
		"csr-out":         {"empty", []string{"empty/csr"}, []string{"cluster", "init", "--config", w.west.Config(), "--csr-out", "empty/csr"}},
	} {
		t.Run(name, func(t *testing.T) {
			before := snapshot(t, w.Dir)
			r := execute(t, w.Dir, readOnly(t, w.path(c.folder)), c.args...)
			if r.code != 2 || r.out != "" {
				t.Errorf("want exit status 2 and no talk on stdout: %v", r)
			}
			r.err = withoutHints(r.err)
			r.says(t, append(c.says, "read-only")...)
			unchanged(t, r, before, snapshot(t, w.Dir))
		})
	}
	t.Run("where the chain goes", func(t *testing.T) {
		// The root has signed and logged by then, so the certificate must not be lost.
		args := append(w.west.SignArgs(fp)[:len(w.west.SignArgs(fp))-1], "empty/chain.pem")
		r := execute(t, w.Dir, readOnly(t, w.path("empty")), args...)
		r.refused(t, 2, "empty/chain.pem", "read-only", "kept in")
	})
	t.Run("what only reads works", func(t *testing.T) {
		for _, args := range [][]string{
			{"root", "show", "--dir", "root"},
			{"log", "find", "--config", w.east.Config(), "--kind", "certificate-issued"},
			{"log", "find", "--dir", w.east.Path("state", "log"), "--kind", "certificate-issued", "--prove"},
			{"log", "show", "0", "--config", w.east.Config()},
			{"log", "prove", "--index", "0", "--config", w.east.Config()},
			{"log", "verify", "--config", w.east.Config()},
			{"config", "view", "--config", w.east.Config()},
			{"cluster", "show", "--config", w.east.Config()},
		} {
			before := snapshot(t, w.Dir)
			if r := execute(t, w.Dir, readOnly(t, w.Dir), args...); r.code != 0 || r.out == "" {
				t.Error(r)
			}
			unchanged(t, ran{args: args}, before, snapshot(t, w.Dir))
		}
	})
}
