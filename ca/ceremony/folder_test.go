package ceremony

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
)

// fixed is a passphrase that a test knows.
type fixed string

func (p fixed) Passphrase(context.Context) ([]byte, error) { return []byte(p), nil }

const right = fixed("correct horse")

// oneFolder is made once and copied: each key of a folder costs a derivation of 600,000 rounds.
var oneFolder = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "signet-root-")
	if err != nil {
		return "", err
	}
	_, err = InitRoot(context.Background(), RootConfig{Dir: filepath.Join(dir, "root"), TrustDomain: exampleOrg, Passphrase: right, By: by})
	return dir, err
})

func newFolder(t *testing.T) *Root {
	t.Helper()
	made, dir := must(oneFolder()), t.TempDir()
	if out, err := exec.Command("cp", "-a", filepath.Join(made, "root"), dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return must(OpenRoot(filepath.Join(dir, "root"), nil))
}

// request is what a cluster sends: the request and, by another way, the fingerprint.
func request(t *testing.T, cluster string) (SignConfig, keystore.Key) {
	t.Helper()
	key := newKey(t, keystore.ECDSAP256)
	plan := must(ca.NewIntermediatePlan(exampleOrg, cluster, key.Public(), time.Now(), 0))
	return SignConfig{Cluster: cluster, Request: must(Request(key, plan)), KeyFingerprint: ca.KeyFingerprint(plan.SPKI)}, key
}

func TestARootFolderIsWholeAndPrivate(t *testing.T) {
	r := newFolder(t)
	for path, mode := range map[string]fs.FileMode{
		"": 0o700, "root.pem": 0o644, "keys": 0o700, "keys/root@1.pem": 0o600, "keys/log@1.pem": 0o600, "log": 0o700, "ceremonies": 0o700,
		"ceremonies/0000-root.yaml": 0o644,
	} {
		info, err := os.Stat(filepath.Join(r.dir, path))
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	beside := must(os.ReadDir(must(oneFolder())))
	if len(beside) != 1 {
		t.Errorf("something is left beside the folder: %v", beside)
	}
	again, err := OpenRoot(r.dir, nil)
	if err != nil || !again.Certificate().Equal(r.Certificate()) || again.TrustDomain() != exampleOrg {
		t.Errorf("%v, %v", again, err)
	}
	if life := r.cert.NotAfter.Sub(r.cert.NotBefore); life < ca.DefaultRootLife || r.cert.MaxPathLen != 1 {
		t.Errorf("the root lives %s with path length %d", life, r.cert.MaxPathLen)
	}
}

func TestAnExistingRootIsNeverTouched(t *testing.T) {
	r := newFolder(t)
	before := must(os.ReadFile(filepath.Join(r.dir, "root.pem")))
	_, err := InitRoot(t.Context(), RootConfig{Dir: r.dir, TrustDomain: exampleOrg, Passphrase: fixed("other"), By: by})
	if !errors.Is(err, ErrExists) || !strings.Contains(err.Error(), ca.CertificateFingerprint(r.cert.Raw)) {
		t.Errorf("got %v", err)
	}
	if string(must(os.ReadFile(filepath.Join(r.dir, "root.pem")))) != string(before) {
		t.Error("the root was touched")
	}
	other := t.TempDir()
	if err := os.WriteFile(filepath.Join(other, "thesis.txt"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := InitRoot(t.Context(), RootConfig{Dir: other, TrustDomain: exampleOrg, Passphrase: right, By: by}); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "thesis.txt") {
		t.Errorf("a folder with something else: %v", err)
	}
	if _, err := InitRoot(t.Context(), RootConfig{Dir: t.TempDir(), TrustDomain: exampleOrg, Passphrase: right, By: by}); err != nil {
		t.Errorf("an empty folder: %v", err)
	}
}

func TestAFailedInitLeavesNothing(t *testing.T) {
	parent := t.TempDir()
	for name, c := range map[string]struct {
		edit func(*RootConfig)
		want string
	}{
		"no passphrase":  {func(c *RootConfig) { c.Passphrase = fixed("") }, "empty"},
		"ed25519":        {func(c *RootConfig) { c.Algorithm = keystore.Ed25519 }, "can't be used for a CA"},
		"unknown":        {func(c *RootConfig) { c.Algorithm = "dsa" }, "can't be used for a CA"},
		"too short":      {func(c *RootConfig) { c.Life = time.Hour }, "least useful"},
		"too long":       {func(c *RootConfig) { c.Life = 200 * 365 * 24 * time.Hour }, "at most 100"},
		"no domain":      {func(c *RootConfig) { c.TrustDomain = spiffeid.TrustDomain{} }, "trust domain"},
		"path length":    {func(c *RootConfig) { c.PathLen = 8 }, "path length"},
		"no folder":      {func(c *RootConfig) { c.Dir = "" }, "folder"},
		"under a file":   {func(c *RootConfig) { c.Dir = "/dev/null/root" }, "not a directory"},
		"nobody to sign": {func(c *RootConfig) { c.Passphrase = nil }, "passphrase"},
	} {
		cfg := RootConfig{Dir: filepath.Join(parent, "root"), TrustDomain: exampleOrg, Passphrase: right, By: by}
		c.edit(&cfg)
		if _, err := InitRoot(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
	if left := must(os.ReadDir(parent)); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestARootSignsClustersAndItsLogProvesIt(t *testing.T) {
	r := newFolder(t)
	for _, cluster := range []string{"east", "west"} {
		c, key := request(t, cluster)
		p, err := r.Prepare(c)
		if err != nil {
			t.Fatal(err)
		}
		signed, err := r.Sign(t.Context(), right, by, p)
		if err != nil {
			t.Fatal(err)
		}
		chain, receipt := signed[0].Chain, signed[0].Receipt
		if len(chain) != 2 || !chain[1].Equal(r.cert) {
			t.Errorf("the chain is %v", chain)
		}
		svid, _ := leaf(t, chain[0], key, false)
		if err := openssl(t, r.cert, chain[:1], svid); err != nil {
			t.Error(err)
		}
		var rec record
		if err := yaml.Unmarshal(must(os.ReadFile(r.recordPath(p.Plan(), receipt))), &rec); err != nil {
			t.Fatal(err)
		}
		if rec.Cluster != cluster || rec.Certificate != string(ca.EncodeChain(chain[0])) || rec.LogIndex != receipt.Index {
			t.Errorf("record %+v", rec)
		}
		reader := must(audit.OpenReader(filepath.Join(r.dir, "log"), ""))
		_, entry, err := reader.Entry(t.Context(), receipt.Index)
		if err != nil || !audit.Covers(entry, chain[0]) {
			t.Errorf("entry %d is not of the certificate: %v", receipt.Index, err)
		}
		proof, err := reader.Prove(t.Context(), receipt.Index)
		if err != nil || proof.Index != receipt.Index {
			t.Errorf("proof %v, %v", proof, err)
		}
		reader.Close()
	}
	h, err := r.History(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if h.Size != 3 || len(h.Made) != 3 || h.Made[0].Kind != ca.KindRoot || h.Made[2].Kind != ca.KindIntermediate || !strings.HasPrefix(h.Origin, "example.org/root/") {
		t.Errorf("history %+v", h)
	}
	if string(h.Made[1].Certificate.RawTBSCertificate) == string(h.Made[2].Certificate.RawTBSCertificate) || h.Made[2].By.GetCaller() != "uid:1000" {
		t.Errorf("history %+v", h.Made)
	}
}

func TestASwappedRequestIsNotSigned(t *testing.T) {
	r := newFolder(t)
	mine, _ := request(t, "east")
	theirs, _ := request(t, "east")
	swapped := mine
	swapped.Request = theirs.Request
	if _, err := r.Prepare(swapped); !errors.Is(err, ErrFingerprint) || !strings.Contains(err.Error(), theirs.KeyFingerprint) {
		t.Errorf("got %v", err)
	}
	swapped.KeyFingerprint = ""
	if _, err := r.Prepare(swapped); err == nil || !strings.Contains(err.Error(), "signet cluster init") {
		t.Errorf("without a fingerprint: %v", err)
	}
	if _, err := r.Prepare(mine); err != nil {
		t.Error(err)
	}
}

func TestWhatDoesNotFitIsNotPrepared(t *testing.T) {
	r := newFolder(t)
	good, _ := request(t, "east")
	foreign := spiffeid.RequireTrustDomainFromString("example.com")
	foreignKey := newKey(t, keystore.ECDSAP256)
	foreignPlan := must(ca.NewIntermediatePlan(foreign, "east", foreignKey.Public(), time.Now(), 0))
	for name, c := range map[string]struct {
		edit func(*SignConfig)
		want string
	}{
		"trust domain": {func(c *SignConfig) { c.TrustDomain = foreign }, "but the root in"},
		"request's domain": {func(c *SignConfig) {
			c.Request, c.KeyFingerprint = must(Request(foreignKey, foreignPlan)), ca.KeyFingerprint(foreignPlan.SPKI)
		}, `trust domain "example.com"`},
		"another cluster":       {func(c *SignConfig) { c.Cluster = "west" }, "request of another cluster"},
		"no cluster":            {func(c *SignConfig) { c.Cluster = "" }, "cluster name"},
		"algorithm":             {func(c *SignConfig) { c.Algorithm = keystore.RSA4096 }, "asked for is rsa-4096"},
		"path length":           {func(c *SignConfig) { c.PathLen = 1 }, "signs leaves only"},
		"too short":             {func(c *SignConfig) { c.Life = time.Second }, "too short"},
		"no life":               {func(c *SignConfig) { c.Life = -time.Hour }, "more than nothing"},
		"too long":              {func(c *SignConfig) { c.Life = 101 * 365 * 24 * time.Hour }, "at most 100"},
		"garbage":               {func(c *SignConfig) { c.Request = []byte("garbage") }, "not PEM"},
		"garbled fingerprint":   {func(c *SignConfig) { c.KeyFingerprint = "SHA256:12" }, "64 hexadecimal digits"},
		"a long one is clamped": {func(c *SignConfig) { c.Life = 20 * 365 * 24 * time.Hour }, ""},
	} {
		cfg := good
		c.edit(&cfg)
		p, err := r.Prepare(cfg)
		switch {
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n")):
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		case c.want == "" && (err != nil || !p.Plan().NotAfter.Equal(r.cert.NotAfter)):
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAFolderThatIsNotRightSignsNothing(t *testing.T) {
	r := newFolder(t)
	c, _ := request(t, "east")
	prepare := func() *Prepared { return must(r.Prepare(c)) }
	if _, err := r.Sign(t.Context(), fixed("wrong"), by, prepare()); !errors.Is(err, keystore.ErrWrongPassphrase) {
		t.Errorf("wrong passphrase: %v", err)
	}
	lock := must(durable.Lock(r.dir))
	if _, err := r.Sign(t.Context(), right, by, prepare()); err == nil || !strings.Contains(err.Error(), "in use by process") {
		t.Errorf("a second ceremony at the same time: %v", err)
	}
	lock.Close()
	key := filepath.Join(r.dir, "keys", "root@1.pem")
	if err := os.Rename(key, key+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Sign(t.Context(), right, by, prepare()); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("without its key: %v", err)
	}
	// The key of another root, under the same passphrase.
	elsewhere := t.TempDir()
	if _, err := must(keystore.NewFile(keystore.FileConfig{Dir: elsewhere, Passphrase: right})).Create(t.Context(), "root", keystore.ECDSAP256, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(key, must(os.ReadFile(filepath.Join(elsewhere, "root@1.pem"))), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Sign(t.Context(), right, by, prepare()); err == nil || !strings.Contains(err.Error(), "does not match the certificate") {
		t.Errorf("with another key: %v", err)
	}
	if h := must(r.History(t.Context())); h.Size != 1 {
		t.Errorf("the log has %d entries", h.Size)
	}
	// A log that was changed.
	bundle := filepath.Join(r.dir, "log", "tile", "entries", "000.p", "1")
	raw := must(os.ReadFile(bundle))
	raw[len(raw)/2] ^= 1
	if err := errors.Join(os.Chmod(bundle, 0o600), os.WriteFile(bundle, raw, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.History(t.Context()); !errors.Is(err, audit.ErrDamaged) {
		t.Errorf("a changed log: %v", err)
	}
}

func TestAnExpiredRootSignsNothing(t *testing.T) {
	start := time.Now().Add(-48 * time.Hour)
	dir := filepath.Join(t.TempDir(), "root")
	_, err := InitRoot(t.Context(), RootConfig{
		Dir: dir, TrustDomain: exampleOrg, Passphrase: right, By: by, Life: 36 * time.Hour, Now: func() time.Time { return start },
	})
	if err != nil {
		t.Fatal(err)
	}
	r := must(OpenRoot(dir, nil))
	c, _ := request(t, "east")
	if _, err := r.Prepare(c); err == nil || !strings.Contains(err.Error(), "expired on") {
		t.Errorf("got %v", err)
	}
}

func TestARootCertificateThatIsNoneIsNamed(t *testing.T) {
	dir := t.TempDir()
	if _, err := OpenRoot(dir, nil); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "signet root init") {
		t.Errorf("an empty folder: %v", err)
	}
	root, key := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	for name, text := range map[string][]byte{
		"garbage":         []byte("garbage"),
		"an intermediate": ca.EncodeChain(must(root.sign(t, plan, must(Request(key, plan))))),
		"two":             ca.EncodeChain(root.cert, newRoot(t, keystore.ECDSAP256).cert),
		"huge":            make([]byte, 1<<20),
	} {
		if err := os.WriteFile(filepath.Join(dir, "root.pem"), text, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenRoot(dir, nil); err == nil || !strings.Contains(err.Error(), dir) || len(err.Error()) > 400 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAReadOnlyFolderIsOneSentence(t *testing.T) {
	c, _ := request(t, "east")
	r := newFolder(t)
	p := must(r.Prepare(c))
	parent := filepath.Dir(r.dir)
	for _, dir := range []string{r.dir, parent} {
		if err := os.Chmod(dir, 0o555); err != nil {
			t.Fatal(err)
		}
		defer os.Chmod(dir, 0o700)
	}
	errs := map[string]error{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if os.Geteuid() == 0 {
			// Root may write everywhere. For the file system this thread is somebody else, and it ends with this function.
			runtime.LockOSThread()
			if err := syscall.Setfsuid(65534); err != nil {
				t.Error(err)
			}
		}
		_, errs["init"] = InitRoot(t.Context(), RootConfig{Dir: filepath.Join(parent, "new"), TrustDomain: exampleOrg, Passphrase: right, By: by})
		_, errs["sign"] = r.Sign(t.Context(), right, by, p)
	}()
	<-done
	for what, err := range errs {
		if err == nil || !strings.Contains(err.Error(), "permission denied") || !strings.Contains(err.Error(), parent) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", what, err)
		}
	}
}
