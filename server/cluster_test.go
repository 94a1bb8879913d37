package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/test/doors"
)

func TestInitTwiceMakesNoSecondSet(t *testing.T) {
	t.Parallel()
	c := &cluster{name: "east", dir: shortDir(t), keys: keystore.NewMemory()}
	conf := InitConfig{Folder: c.folder(), Ceremony: byX509{}}
	first, err := Init(t.Context(), conf)
	must(t, err)
	if !first.Created {
		t.Error("the first run does not say that it made anything")
	}
	again, err := Init(t.Context(), conf)
	must(t, err)
	if again.Created {
		t.Error("the second run says that it made something")
	}
	again.Created = true
	if fmt.Sprint(first) != fmt.Sprint(again) {
		t.Errorf("the second run shows something else:\n%v\n%v", first, again)
	}
	if refs, _ := c.keys.List(t.Context()); len(refs) != 3 {
		t.Errorf("keys are %v, want three", refs)
	}
	if info, err := os.Stat(c.dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("state folder: %v %v, want mode 0700", info.Mode(), err)
	}
}

func TestAFolderBelongsToOneClusterForEver(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	for what, change := range map[string]func(*Folder){
		"trust domain": func(f *Folder) { f.TrustDomain, _ = identity.ParseTrustDomain("other.org") },
		"cluster":      func(f *Folder) { f.Cluster = "west" },
		"instance":     func(f *Folder) { f.Instance = "east-2" },
	} {
		f := c.folder()
		change(&f)
		_, err := Init(t.Context(), InitConfig{Folder: f, Ceremony: byX509{}})
		wantError(t, err, what)
	}
}

// dying kills the process at the n-th thing it is asked to do.
type dying struct {
	plainKeys
	left *int
}

func (d dying) step() {
	if *d.left--; *d.left < 0 {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

func (d dying) Create(ctx context.Context, name string, alg keystore.Algorithm, after int) (keystore.Key, error) {
	d.step()
	defer d.step()
	return d.plainKeys.Create(ctx, name, alg, after)
}

func (d dying) List(ctx context.Context) ([]keystore.Ref, error) {
	d.step()
	return d.plainKeys.List(ctx)
}

func (d dying) SelfSign(ctx context.Context, log ca.Log, key crypto.Signer, p ca.Plan, by *auditv1.Evidence) (*x509.Certificate, audit.Receipt, error) {
	d.step()
	defer d.step()
	return byX509{}.SelfSign(ctx, log, key, p, by)
}

func (d dying) Request(key crypto.Signer, p ca.Plan) ([]byte, error) {
	d.step()
	defer d.step()
	return byX509{}.Request(key, p)
}

func initAt(ctx context.Context, dir string, steps int) (InitResult, error) {
	left := steps
	d := dying{plainKeys(filepath.Join(dir, "keys")), &left}
	return Init(ctx, InitConfig{
		Folder:   Folder{Dir: filepath.Join(dir, "state"), TrustDomain: td, Cluster: "east", Instance: "east-1", Keys: d, CheckpointInterval: 100 * time.Millisecond},
		Ceremony: d,
	})
}

// initAndDie is the child process of the next test.
func initAndDie(dir string) {
	steps, _ := strconv.Atoi(os.Getenv("SIGNET_TEST_STEPS"))
	if _, err := initAt(context.Background(), dir, steps); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Not beside others: a child that is forked holds the locks of their folders for a moment.
func TestInitMayBeKilledAnywhere(t *testing.T) {
	const steps = 10
	survived := 0
	for n := range steps + 1 {
		dir := filepath.Dir(shortDir(t))
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), "SIGNET_TEST_INIT="+dir, "SIGNET_TEST_STEPS="+strconv.Itoa(n))
		out, err := child.CombinedOutput()
		switch {
		case err == nil:
			survived++
		case !strings.Contains(err.Error(), "killed"):
			t.Fatalf("step %d: %v\n%s", n, err, out)
		}
		first, err := initAt(t.Context(), dir, 1000)
		if err != nil {
			t.Fatalf("killed at step %d, the second run failed: %v", n, err)
		}
		again, err := initAt(t.Context(), dir, 1000)
		must(t, err)
		if again.Created || first.ControlCA != again.ControlCA || first.KeyFingerprint != again.KeyFingerprint || !bytes.Equal(first.CSR, again.CSR) {
			t.Errorf("killed at step %d: the run after shows %+v, the one after that %+v", n, first, again)
		}
		keys, _ := os.ReadDir(filepath.Join(dir, "keys"))
		if len(keys) != 3 {
			t.Errorf("killed at step %d: %d keys, want 3: %v", n, len(keys), keys)
		}
	}
	// The last must have run through, else the steps above don't cover everything.
	if survived != 1 {
		t.Errorf("%d of the children survived, want exactly the last: %d steps are not what Init does", survived, steps)
	}
}

func TestInstallTakesOnlyWhatWasAskedFor(t *testing.T) {
	t.Parallel()
	c := &cluster{name: "east", dir: shortDir(t), root: newRoot(t), keys: keystore.NewMemory()}
	conf := InstallConfig{Folder: c.folder(), Rotation: testRotation(), RootFingerprint: c.root.fingerprint(), Chain: ca.EncodeChain(c.root.cert, c.root.cert)}
	_, err := Install(t.Context(), conf)
	wantError(t, err, "signet cluster init")

	r, err := Init(t.Context(), InitConfig{Folder: c.folder(), Ceremony: byX509{}})
	must(t, err)
	good := c.root.intermediate(t, r.CSR, nil)
	foreign, err := doors.NewKey()
	must(t, err)
	foreignCSR, err := doors.CSR(foreign, nil)
	must(t, err)
	foreignPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: foreignCSR})
	blocks := bytes.SplitAfter(good, []byte("-----END CERTIFICATE-----\n"))

	for _, bad := range []struct {
		what, want string
		chain      []byte
		pin        string
	}{
		{"another root than pinned", "but the fingerprint given is", good, newRoot(t).fingerprint()},
		{"no fingerprint", "fingerprint", good, "yes"},
		{"a certificate for another key", "swapped", c.root.intermediate(t, foreignPEM, nil), c.root.fingerprint()},
		{"the wrong order", "wrong order", append(bytes.Clone(blocks[1]), blocks[0]...), c.root.fingerprint()},
		{"no root", "not a root", blocks[0], c.root.fingerprint()},
		{"the root alone", "root only", blocks[1], c.root.fingerprint()},
		{"nothing", "empty", nil, c.root.fingerprint()},
		{"a private key", "PRIVATE KEY", append(bytes.Clone(good), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})...), c.root.fingerprint()},
		{"too much", "at most", bytes.Repeat(good, 300), c.root.fingerprint()},
		{"an expired intermediate", "expired", c.root.intermediate(t, r.CSR, func(x *x509.Certificate) { x.NotAfter = time.Now().Add(-time.Minute) }), c.root.fingerprint()},
		{"one not yet valid", "not yet valid", c.root.intermediate(t, r.CSR, func(x *x509.Certificate) { x.NotBefore = time.Now().Add(time.Hour) }), c.root.fingerprint()},
		{"another name", "not named as planned", c.root.intermediate(t, r.CSR, func(x *x509.Certificate) { x.Subject.CommonName = "west" }), c.root.fingerprint()},
		{"no CA", "CA", c.root.intermediate(t, r.CSR, func(x *x509.Certificate) { x.IsCA, x.MaxPathLenZero, x.KeyUsage = false, false, 0 }), c.root.fingerprint()},
	} {
		_, err := Install(t.Context(), InstallConfig{Folder: c.folder(), Rotation: testRotation(), Chain: bad.chain, RootFingerprint: bad.pin})
		if err == nil {
			t.Fatalf("%s was installed", bad.what)
		}
		wantError(t, err, bad.want)
	}
	_, err = New(t.Context(), c.config())
	wantError(t, err, "signet cluster install")

	conf.Chain = good
	first, err := Install(t.Context(), conf)
	must(t, err)
	again, err := Install(t.Context(), conf)
	must(t, err)
	if len(first.Done) == 0 || len(again.Done)+len(again.Taken) > 0 {
		t.Errorf("changed: first %q, again %q; want something, nothing, and no steps: %v", first.Done, again.Done, again.Taken)
	}
	conf.Chain = c.root.intermediate(t, r.CSR, nil)
	_, err = Install(t.Context(), conf)
	wantError(t, err, "another chain")

	info, err := Show(t.Context(), c.dir)
	must(t, err)
	if len(info.Authorities) != 2 || info.Roots[0] != c.root.fingerprint() || info.ControlCA != r.ControlCA || info.LogVerifierKey != r.LogVerifierKey {
		t.Errorf("shown is %+v", info)
	}
	c.start(t, nil)
	if _, err := Show(t.Context(), c.dir); err != nil {
		t.Errorf("a running server's folder can't be shown: %v", err)
	}
}

func TestAChainThatIsInstalledAgainIsUnchangedWhateverElseIsDue(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(t, err)
	must(t, s.stop())
	conf := InstallConfig{
		Folder: c.folder(), Rotation: testRotation(), RootFingerprint: c.root.fingerprint(), Chain: c.root.intermediate(t, started.Requests[0].Csr, nil),
	}
	install := func(ahead time.Duration) InstallResult {
		t.Helper()
		c.ahead.Store(int64(ahead))
		r, err := Install(t.Context(), conf)
		must(t, err)
		return r
	}
	if r := install(0); len(r.Done) == 0 || r.State != ca.Active {
		t.Errorf("installed: %+v", r)
	}
	if r := install(48 * time.Hour); len(r.Done) > 0 || len(r.Taken) == 0 {
		t.Errorf("installed again when the old one is due to be removed: %+v", r)
	}
}

func TestAServerRefusesWhatItCannotServe(t *testing.T) {
	t.Parallel()
	t.Run("no cluster", func(t *testing.T) {
		c := &cluster{name: "east", dir: shortDir(t), keys: keystore.NewMemory()}
		_, err := New(t.Context(), c.config())
		wantError(t, err, "signet cluster init")
		if _, err := os.Stat(c.dir); err == nil {
			t.Error("a folder was made")
		}
	})
	t.Run("another process", func(t *testing.T) {
		c := newCluster(t, "east")
		c.start(t, nil)
		_, err := New(t.Context(), c.config())
		wantError(t, err, fmt.Sprintf("in use by process %d", os.Getpid()))
	})
	t.Run("expired intermediate", func(t *testing.T) {
		c := newCluster(t, "east")
		c.ahead.Store(int64(2000 * time.Hour))
		_, err := New(t.Context(), c.config())
		wantError(t, err, "expired")
	})
	t.Run("key gone", func(t *testing.T) {
		c := newCluster(t, "east")
		c.keys = keystore.NewMemory()
		_, err := New(t.Context(), c.config())
		wantError(t, err, "no such key")
	})
	t.Run("address in use", func(t *testing.T) {
		c, d := newCluster(t, "east"), newCluster(t, "west")
		first := c.start(t, nil)
		conf := d.config()
		conf.Agents = first.Doors().Agents
		_, err := New(t.Context(), conf)
		wantError(t, err, "change listen.agents")
		conf.Agents = "127.0.0.1:0"
		s, err := New(t.Context(), conf) // nothing was left behind
		must(t, err)
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		must(t, s.Run(ended))
	})
}
