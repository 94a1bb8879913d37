package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/ceremony"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

// ran is what a command left behind.
type ran struct {
	code     int
	out, err string
}

// root runs `signet root …`.
func root(t *testing.T, args ...string) ran {
	t.Helper()
	var out, talk bytes.Buffer
	c := &cli{in: strings.NewReader(""), out: &out, err: &talk}
	code := c.run(t.Context(), append([]string{"root"}, args...))
	return ran{code, out.String(), talk.String()}
}

func (r ran) expect(t *testing.T, code int, talk string) ran {
	t.Helper()
	if r.code != code || !strings.Contains(r.err, talk) {
		t.Errorf("exit status %d and %q; want %d and %q", r.code, r.err, code, talk)
	}
	return r
}

// ceremonyDesk is a folder with a passphrase, a root, and the request of a cluster.
type ceremonyDesk struct {
	dir, pass, root string
	rootFingerprint string
	csr, key        string
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func newDesk(t *testing.T) ceremonyDesk {
	t.Helper()
	dir := t.TempDir()
	d := ceremonyDesk{dir: dir, pass: write(t, filepath.Join(dir, "pass"), "correct horse\n"), root: filepath.Join(dir, "root")}
	r := root(t, "init", "--trust-domain", "example.org", "--dir", d.root, "--passphrase-file", d.pass).expect(t, exitYes, "The root is in")
	d.rootFingerprint = strings.TrimSpace(r.out)
	d.csr, d.key = d.request(t, "example.org", "east")
	return d
}

func (d ceremonyDesk) request(t *testing.T, trustDomain, cluster string) (path, fingerprint string) {
	t.Helper()
	key, err := keystore.NewMemory().Create(t.Context(), "intermediate", keystore.ECDSAP256, 0)
	if err != nil {
		t.Fatal(err)
	}
	td, err := identity.ParseTrustDomain(trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	plan, err := ca.NewIntermediatePlan(td, cluster, key.Public(), time.Now(), 0)
	if err != nil {
		t.Fatal(err)
	}
	text, err := ceremony.Request(key, plan)
	if err != nil {
		t.Fatal(err)
	}
	return write(t, filepath.Join(d.dir, trustDomain+"."+cluster+".csr.pem"), string(text)), ca.KeyFingerprint(plan.SPKI)
}

// sign runs root sign with what is right where the arguments say nothing else.
func (d ceremonyDesk) sign(t *testing.T, args ...string) ran {
	t.Helper()
	line := []string{"sign"}
	for _, right := range [][2]string{{"--dir", d.root}, {"--csr", d.csr}, {"--fingerprint", d.key}, {"--cluster", "east"}, {"--passphrase-file", d.pass}} {
		if !slices.Contains(args, right[0]) {
			line = append(line, right[:]...)
		}
	}
	return root(t, append(line, args...)...)
}

func TestSeveralSuccessorsAreSignedInOneCeremony(t *testing.T) {
	d := newDesk(t)
	var csrs, keys []string
	all := ""
	for i := range 3 {
		path, key := d.request(t, "example.org", "east")
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		all += string(text)
		csrs, keys = append(csrs, write(t, filepath.Join(d.dir, fmt.Sprintf("successor-%d.pem", i)), string(text))), append(keys, key)
	}
	one := write(t, filepath.Join(d.dir, "all.pem"), all)
	prints := []string{"--fingerprint", keys[0], "--fingerprint", keys[1], "--fingerprint", keys[2]}
	with := func(args ...string) []string { return append(slices.Clone(prints), args...) }

	dry := d.sign(t, with("--csr", one, "--stagger", "60d", "--life", "80d", "--dry-run")...).expect(t, exitYes, "").out
	contains(t, dry, "Request 1 of 3\n", "\n\nRequest 3 of 3\n", keys[0], keys[1], keys[2])
	if strings.Count(dry, "(80 days)") != 3 {
		t.Errorf("each lives from its own start:\n%s", dry)
	}
	out := filepath.Join(d.dir, "chains.pem")
	d.sign(t, with("--csr", csrs[0], "--csr", csrs[1], "--csr", csrs[2], "--stagger", "60d", "--life", "80d", "--out", out)...).
		expect(t, exitYes, "Signed: entries 1 to 3 of the root's log, chains in")
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	chains, err := ca.ParseChain(text)
	if err != nil || len(chains) != 6 {
		t.Fatalf("%d certificates, %v", len(chains), err)
	}
	for i := range keys {
		own, above := chains[2*i], chains[2*i+1]
		begins := time.Now().Add(time.Duration(i)*60*24*time.Hour - ca.PlanBackdate)
		if ca.KeyFingerprint(own.RawSubjectPublicKeyInfo) != keys[i] || ca.CertificateFingerprint(above.Raw) != d.rootFingerprint ||
			own.NotBefore.Sub(begins).Abs() > time.Minute || own.CheckSignatureFrom(above) != nil {
			t.Errorf("chain %d: %s from %s", i, own.Subject, own.NotBefore)
		}
	}
	records, err := os.ReadDir(filepath.Join(d.root, "ceremonies"))
	if err != nil || len(records) != 4 {
		t.Errorf("records: %v, %v", records, err)
	}
	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"too few fingerprints": {[]string{"--csr", one}, exitNo, "there are 3 requests and 1 fingerprints"},
		"another order":        {append([]string{"--csr", one}, "--fingerprint", keys[1], "--fingerprint", keys[0], "--fingerprint", keys[2]), exitNo, "request 1 of 3: the request holds the key"},
		"one twice":            {[]string{"--csr", csrs[0], "--csr", csrs[0], "--fingerprint", keys[0], "--fingerprint", keys[0]}, exitNo, "request 2 of 2 has the same key"},
		"a gap":                {with("--csr", one, "--stagger", "90d"), exitCouldNotSay, "nothing could be issued"},
		"stagger of one":       {[]string{"--stagger", "1d"}, exitCouldNotSay, "--stagger is for several requests"},
		"beyond the root":      {with("--csr", one, "--stagger", "5y", "--life", "6y"), exitNo, "request 3 of 3: root"},
		"something after them": {with("--csr", write(t, filepath.Join(d.dir, "tail.pem"), all+"garbage")), exitNo, "follows request 3"},
		"too many":             {with("--csr", write(t, filepath.Join(d.dir, "many.pem"), strings.Repeat(all, 6))), exitNo, "more than 16 certificate requests"},
	} {
		if r := d.sign(t, append(c.args, "--dry-run")...); r.code != c.code || !strings.Contains(r.err, c.want) || r.out != "" {
			t.Errorf("%s: %+v; want %d and %q", name, r, c.code, c.want)
		}
	}
	// Those that would never take over are named before anything is signed.
	useless := func(want string, args ...string) {
		t.Helper()
		r := d.sign(t, with(append([]string{"--csr", one, "--dry-run"}, args...)...)...).expect(t, exitYes, "")
		if got := strings.Join(strings.Fields(r.err), " "); !strings.HasPrefix(got, want) || (want == "") != (got == "") {
			t.Errorf("with %v it says %q, want %q", args, got, want)
		}
	}
	useless("", "--stagger", "60d")
	useless("of no use: requests 2 and 3 of 3, since each ends no later than the one before it. Give --stagger, as signet rotation start printed it, or have each signed when it is due")
	useless("of no use: request 3 of 3, since it ends no later than the one before it.", "--stagger", "4y", "--life", "9y")
	dry = d.sign(t, with("--csr", one, "--stagger", "4y", "--life", "5y", "--dry-run")...).expect(t, exitYes, "").out
	if strings.Count(dry, "cut short: its root ends then") != 1 {
		t.Errorf("the last one is cut short, and the page must say so:\n%s", dry)
	}
}

// Whoever has two certificates of a lost key can forge under both, and the cluster knows one.
func TestARequestThatWasSignedBeforeIsNamed(t *testing.T) {
	d := newDesk(t)
	said := func(args ...string) string {
		t.Helper()
		r := d.sign(t, args...).expect(t, exitYes, "")
		return strings.Join(strings.Fields(r.out+r.err), " ")
	}
	if text := said("--life", "90d", "--out", filepath.Join(d.dir, "one.pem")); strings.Contains(text, "signed before") {
		t.Error(text)
	}
	other, key := d.request(t, "example.org", "west")
	if text := said("--csr", other, "--fingerprint", key, "--cluster", "west", "--dry-run"); strings.Contains(text, "signed before") {
		t.Error(text)
	}
	text := said("--life", "30d", "--dry-run")
	for _, want := range []string{"signed before: until ", ", entry 1 of the root's log, kept in " + filepath.Join(d.root, "ceremonies")} {
		if !strings.Contains(text, want) {
			t.Errorf("%q does not say %q", text, want)
		}
	}
}

func TestRootCeremonyFromInitToShow(t *testing.T) {
	d := newDesk(t)
	if f, err := ca.ParseFingerprint(d.rootFingerprint); err != nil || strings.Contains(d.rootFingerprint, "\n") {
		t.Errorf("stdout of root init is not the fingerprint alone: %v, %v", f, err)
	}
	// The tool that an admin has beside ours says the same.
	said, err := exec.Command("openssl", "x509", "-in", filepath.Join(d.root, "root.pem"), "-noout", "-fingerprint", "-sha256").Output()
	if err != nil || !strings.HasSuffix(strings.TrimSpace(string(said)), strings.TrimPrefix(d.rootFingerprint, "SHA256:")) {
		t.Errorf("openssl says %q (%v), we %q", said, err, d.rootFingerprint)
	}

	root(t, "init", "--trust-domain", "example.org", "--dir", d.root, "--passphrase-file", d.pass).
		expect(t, exitNo, "a root is there already").expect(t, exitNo, d.rootFingerprint)

	dry := d.sign(t, "--dry-run").expect(t, exitYes, "")
	for _, want := range []string{d.key, d.rootFingerprint, "cluster:", "east", "path length:", "(90 days)", "spiffe://example.org"} {
		if !strings.Contains(dry.out, want) {
			t.Errorf("the dry run does not say %q:\n%s", want, dry.out)
		}
	}

	chainFile := filepath.Join(d.dir, "east.chain.pem")
	signed := d.sign(t, "--out", chainFile).expect(t, exitYes, "Signed: entry 1 of the root's log").expect(t, exitYes, d.key)
	if signed.out != "" {
		t.Errorf("stdout has %q", signed.out)
	}
	text, err := os.ReadFile(chainFile)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := ca.ParseChain(text)
	if err != nil || len(chain) != 2 || ca.CertificateFingerprint(chain[1].Raw) != d.rootFingerprint || ca.KeyFingerprint(chain[0].RawSubjectPublicKeyInfo) != d.key {
		t.Fatalf("the chain is %v, %v", chain, err)
	}
	d.sign(t, "--out", chainFile).expect(t, exitNo, "already exists and is not overwritten")
	toStdout := d.sign(t, "--fingerprint", strings.ToUpper(d.key)).expect(t, exitYes, "Signed: entry 2")
	if chain, err := ca.ParseChain([]byte(toStdout.out)); err != nil || len(chain) != 2 {
		t.Errorf("stdout is not the chain alone: %v", err)
	}

	var shown rootShown
	if err := json.Unmarshal([]byte(root(t, "show", "--dir", d.root, "-o", "json").expect(t, exitYes, "").out), &shown); err != nil {
		t.Fatal(err)
	}
	if shown.Fingerprint != d.rootFingerprint || shown.Log.Size != 3 || len(shown.Signed) != 3 || shown.Signed[1].KeyFingerprint != d.key ||
		!strings.Contains(shown.Log.VerifierKey, shown.Log.Origin) || shown.Signed[1].By == "" {
		t.Errorf("%+v", shown)
	}
	table := root(t, "show", "--dir", d.root).expect(t, exitYes, "").out
	for _, want := range []string{d.rootFingerprint, "3 entries", "KIND", "intermediate", shown.Log.VerifierKey} {
		if !strings.Contains(table, want) {
			t.Errorf("root show does not say %q:\n%s", want, table)
		}
	}
	if got := root(t, "show", "--dir", d.root, "-o", "name").out; got != "root/example.org\n" {
		t.Errorf("-o name: %q", got)
	}
}

func TestRootCeremonyFromReviewedFiles(t *testing.T) {
	dir := t.TempDir()
	d := ceremonyDesk{dir: dir, pass: write(t, filepath.Join(dir, "pass"), "correct horse\n"), root: filepath.Join(dir, "root")}
	d.csr, d.key = d.request(t, "example.org", "east")
	init := write(t, filepath.Join(dir, "root.yaml"), "trust_domain: example.org\ndir: root\nalgorithm: ecdsa-p384\nlife: 20y\npath_length: 2\n")
	if out := root(t, "init", "-f", init, "--dry-run").expect(t, exitYes, "").out; !strings.Contains(out, "ecdsa-p384") || !strings.Contains(out, "7300 days") {
		t.Errorf("dry run: %s", out)
	}
	if _, err := os.Stat(d.root); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a dry run made something")
	}
	root(t, "init", "-f", init, "--life", "1y").expect(t, exitCouldNotSay, "--life and -f can't be used together")
	root(t, "init", "-f", init, "--passphrase-file", d.pass).expect(t, exitYes, "The root is in")

	text := "dir: root\ntrust_domain: example.org\ncluster: east\ncsr: example.org.east.csr.pem\nkey_fingerprint: " + d.key + "\nout: east.pem\nlife: 30d\n"
	sign := write(t, filepath.Join(dir, "sign.yaml"), text)
	if out := root(t, "sign", "-f", sign, "--dry-run").expect(t, exitYes, "").out; !strings.Contains(out, "(30 days)") {
		t.Errorf("dry run: %s", out)
	}
	root(t, "sign", "-f", sign, "--cluster", "west").expect(t, exitCouldNotSay, "--cluster and -f can't be used together")
	root(t, "sign", "-f", sign, "--passphrase-file", d.pass).expect(t, exitYes, "Signed")
	if _, err := os.Stat(filepath.Join(dir, "east.pem")); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		text, want string
		code       int
	}{
		"unknown key":      {text + "clster: east\n", `sign.yaml:8:1: unknown key "clster"; did you mean "cluster"?`, exitCouldNotSay},
		"trust domain":     {strings.Replace(text, "example.org", "example.com", 1), "but the root in", exitNo},
		"algorithm":        {text + "algorithm: rsa-2048\n", "asked for is rsa-2048", exitNo},
		"path length":      {text + "path_length: 1\n", "signs leaves only", exitNo},
		"no such request":  {strings.Replace(text, "csr: ", "csr: x", 1), "no such file", exitCouldNotSay},
		"fingerprint lost": {strings.Replace(text, "key_fingerprint", "# key", 1), "key_fingerprint is missing", exitCouldNotSay},
	} {
		write(t, sign, c.text)
		if r := root(t, "sign", "-f", sign, "--dry-run"); r.code != c.code || !strings.Contains(r.err, c.want) {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

func TestRootSaysInOneSentenceWhatIsWrong(t *testing.T) {
	d := newDesk(t)
	wrong := write(t, filepath.Join(d.dir, "wrong"), "battery staple\n")
	open := write(t, filepath.Join(d.dir, "open"), "correct horse\n")
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	garbage := write(t, filepath.Join(d.dir, "garbage.pem"), "garbage")
	huge := write(t, filepath.Join(d.dir, "huge.pem"), strings.Repeat("x", 10<<20))
	theirs, theirKey := d.request(t, "example.com", "east")
	swapped, _ := d.request(t, "example.org", "west")
	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"wrong passphrase":         {[]string{"--passphrase-file", wrong}, exitCouldNotSay, "wrong passphrase"},
		"passphrase for everybody": {[]string{"--passphrase-file", open}, exitCouldNotSay, "chmod 0600"},
		"no passphrase file":       {[]string{"--passphrase-file", wrong + "x"}, exitCouldNotSay, "no such file"},
		"garbage":                  {[]string{"--csr", garbage}, exitNo, "certificate request is not PEM"},
		"10 MiB":                   {[]string{"--csr", huge}, exitNo, "larger than 256 KiB"},
		"no request":               {[]string{"--csr", huge + "x"}, exitCouldNotSay, "no such file"},
		"swapped request":          {[]string{"--csr", swapped}, exitNo, "it may have been swapped on its way"},
		"another trust domain":     {[]string{"--csr", theirs, "--fingerprint", theirKey}, exitNo, `is for trust domain "example.com", planned is example.org`},
		"another cluster":          {[]string{"--cluster", "west"}, exitNo, "is it the request of another cluster?"},
		"no fingerprint":           {[]string{"--fingerprint", ""}, exitCouldNotSay, "--fingerprint is empty"},
		"garbled fingerprint":      {[]string{"--fingerprint", "SHA256:no"}, exitCouldNotSay, "64 hexadecimal digits"},
		"no cluster":               {[]string{"--cluster", ""}, exitCouldNotSay, "--cluster is empty"},
		"no root":                  {[]string{"--dir", d.dir}, exitCouldNotSay, "make one with `signet root init`"},
		"bad life":                 {[]string{"--life", "soon"}, exitCouldNotSay, `life "soon"`},
		"unknown argument":         {[]string{"now"}, exitCouldNotSay, `"now" is too much for signet root sign`},
	} {
		r := d.sign(t, c.args...)
		if r.code != c.code || !strings.Contains(r.err, c.want) || r.out != "" {
			t.Errorf("%s: %+v; want %d and %q", name, r, c.code, c.want)
		}
		// One sentence; the summary of what would be signed may stand before it.
		if _, sentence, ok := strings.Cut(r.err, "signet: "); !ok || strings.Count(sentence, "\n") != 1 {
			t.Errorf("%s: %q", name, r.err)
		}
	}
	for _, args := range [][]string{
		{"init", "--dir", filepath.Join(d.dir, "new")},
		{"init", "--dir", filepath.Join(d.dir, "new"), "--trust-domain", "https://example.org"},
		{"init", "--dir", filepath.Join(d.dir, "new"), "--trust-domain", "example.org", "--algorithm", "ed25519"},
		{"init", "--dir", filepath.Join(d.dir, "new"), "--trust-domain", "example.org", "--path-length", "0"},
		{"init", "--dir", "/dev/null/new", "--trust-domain", "example.org"},
		{"show", "--dir", d.dir},
		{"show", "--dir", d.root, "-o", "xml"},
	} {
		if r := root(t, args...); r.code != exitCouldNotSay || r.out != "" && args[0] == "init" {
			t.Errorf("%v: %+v", args, r)
		}
	}
	root(t, "init", "--dir", d.dir, "--trust-domain", "example.org").expect(t, exitNo, "choose a folder that is empty or not there yet")
	// What was refused is not in the log.
	var shown rootShown
	if err := json.Unmarshal([]byte(root(t, "show", "--dir", d.root, "-o", "json").out), &shown); err != nil || shown.Log.Size != 1 {
		t.Errorf("the log has %d entries, %v", shown.Log.Size, err)
	}
}
