package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/test/doors"
)

// tree is all that lies at a path, with modes, contents and times of change.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		files[path] = fmt.Sprint(info.Mode(), info.ModTime())
		if info.Mode().IsRegular() {
			text, err := os.ReadFile(path)
			files[path] += string(text)
			return err
		}
		return nil
	}))
	return files
}

func atHand(t testing.TB, r *root) ca.Upstream { return &atOnce{t: t, roots: []*root{r}} }

// rehearsed is a dry run, of which nothing is seen afterwards.
func rehearsed(t *testing.T, c InitConfig) ([]string, error) {
	t.Helper()
	around := filepath.Dir(c.Dir)
	before := tree(t, around)
	keys, err := c.Keys.List(t.Context())
	must(t, err)
	c.DryRun = true
	r, err := Init(t.Context(), c)
	if after := tree(t, around); fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("a dry run changes\n%q\nto\n%q", before, after)
	}
	if after, _ := c.Keys.List(t.Context()); !slices.Equal(keys, after) {
		t.Errorf("a dry run changes the keys %v to %v", keys, after)
	}
	return r.Would, err
}

// failing is a keystore and a ceremony that fail at the n-th thing they are asked to make.
type failing struct {
	keystore.Store
	left *int
}

var errFailing = errors.New("it fails here")

func (f failing) step() error {
	if *f.left--; *f.left < 0 {
		return errFailing
	}
	return nil
}

func (f failing) Create(ctx context.Context, name string, alg keystore.Algorithm, after int) (keystore.Key, error) {
	if err := f.step(); err != nil {
		return nil, err
	}
	k, err := f.Store.Create(ctx, name, alg, after)
	if err != nil {
		return nil, err
	}
	return k, f.step()
}

func (f failing) SelfSign(ctx context.Context, log ca.Log, key crypto.Signer, p ca.Plan, by *auditv1.Evidence) (*x509.Certificate, audit.Receipt, error) {
	if err := f.step(); err != nil {
		return nil, audit.Receipt{}, err
	}
	return byX509{}.SelfSign(ctx, log, key, p, by)
}

func (f failing) Request(key crypto.Signer, p ca.Plan) ([]byte, error) {
	if err := f.step(); err != nil {
		return nil, err
	}
	return byX509{}.Request(key, p)
}

func TestADryRunOfInitNamesTheKeysThatAreMadeThenWhereverTheLastRunEnded(t *testing.T) {
	t.Parallel()
	newKey := regexp.MustCompile(`with a new key, (\S+) \(`)
	whole := 0
	for n := range 9 {
		c := &cluster{name: "east", dir: shortDir(t), keys: keystore.NewMemory()}
		f := failing{c.keys, &n}
		conf := InitConfig{Folder: c.folder(), Ceremony: f}
		conf.Keys = f
		_, err := Init(t.Context(), conf)
		if err == nil {
			whole++
		} else if !errors.Is(err, errFailing) {
			t.Fatal(err)
		}

		*f.left = 100
		would, err := rehearsed(t, conf)
		must(t, err)
		var said, made []keystore.Ref
		for _, line := range would {
			if m := newKey.FindStringSubmatch(line); m != nil {
				ref, err := keystore.ParseRef(m[1])
				must(t, err)
				said = append(said, ref)
			}
		}
		before, _ := c.keys.List(t.Context())
		r, err := Init(t.Context(), conf)
		must(t, err)
		after, _ := c.keys.List(t.Context())
		for _, k := range after {
			if !slices.Contains(before, k) {
				made = append(made, k)
			}
		}
		order := func(a, b keystore.Ref) int { return strings.Compare(a.Name, b.Name) }
		slices.SortFunc(said, order)
		slices.SortFunc(made, order)
		if !slices.Equal(said, made) || r.Created != (len(would) > 0) {
			t.Errorf("a dry run says %q, and made are %v (anything: %v)", would, made, r.Created)
		}
		if would, err := rehearsed(t, conf); err != nil || len(would) > 0 {
			t.Errorf("of what is there a dry run says %q, %v", would, err)
		}
	}
	if whole != 1 {
		t.Errorf("%d runs went through, want the last alone", whole)
	}
}

func TestADryRunOfInitInAFreshPlaceNamesAllThatIsMade(t *testing.T) {
	t.Parallel()
	c := &cluster{name: "east", dir: shortDir(t), keys: keystore.NewMemory()}
	would, err := rehearsed(t, InitConfig{Folder: c.folder(), Ceremony: byX509{}})
	must(t, err)
	if want := []string{
		"state database " + c.dir + "/signet.db made",
		"audit log " + c.dir + "/log begun with a new key, memory:log@1 (ed25519)",
		"control CA made with a new key, memory:control-ca@1 (ecdsa-p256)",
		"intermediate requested with a new key, memory:intermediate@1 (ecdsa-p256)",
	}; !slices.Equal(would, want) {
		t.Errorf("it says %q, want %q", would, want)
	}
}

func TestADryRunOfInitLeavesNoLockInAFolderThatHasNone(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	must(t, os.Remove(filepath.Join(c.dir, "LOCK"))) // as a backup may bring it back
	if would, err := rehearsed(t, InitConfig{Folder: c.folder(), Ceremony: byX509{}}); err != nil || len(would) > 0 {
		t.Errorf("it says %q, %v", would, err)
	}
}

func TestADryRunOfInitAsksForAnotherIntermediateWhereAllHaveEnded(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	c.ahead.Store(int64(2000 * time.Hour))
	conf := InitConfig{Folder: c.folder(), Ceremony: byX509{}}
	would, err := rehearsed(t, conf)
	must(t, err)
	if want := []string{"intermediate requested with a new key, memory:intermediate@2 (ecdsa-p256)"}; !slices.Equal(would, want) {
		t.Errorf("it says %q, want %q", would, want)
	}
	if r, err := Init(t.Context(), conf); err != nil || !r.Created {
		t.Errorf("and then there is %+v, %v", r, err)
	}
}

func TestADryRunOfInitRefusesWhatInitRefuses(t *testing.T) {
	t.Parallel()
	another := newRoot(t)
	for what, c := range map[string]struct {
		want string
		do   func(t *testing.T, c *cluster, conf *InitConfig)
	}{
		"another cluster's folder": {"belongs to one cluster", func(_ *testing.T, _ *cluster, conf *InitConfig) { conf.Cluster = "west" }},
		"no cluster's name":        {"cluster", func(_ *testing.T, _ *cluster, conf *InitConfig) { conf.Cluster = "East!" }},
		"a folder in use":          {"in use by process", func(t *testing.T, c *cluster, _ *InitConfig) { c.start(t, nil) }},
		"others may write to it":   {"chmod go-w", func(t *testing.T, c *cluster, _ *InitConfig) { must(t, os.Chmod(c.dir, 0o777)) }},
		"a file in its place": {"not a folder", func(t *testing.T, c *cluster, _ *InitConfig) {
			must(t, os.RemoveAll(c.dir))
			must(t, os.WriteFile(c.dir, nil, 0o600))
		}},
		"a database that is gone": {"state database is gone", func(t *testing.T, c *cluster, _ *InitConfig) { must(t, os.Remove(databasePath(c.dir))) }},
		"a database that is none": {"state database", func(t *testing.T, c *cluster, _ *InitConfig) {
			must(t, os.WriteFile(databasePath(c.dir), bytes.Repeat([]byte("x"), 8192), 0o600))
		}},
		"a log that is gone": {"open the audit log", func(t *testing.T, c *cluster, _ *InitConfig) { must(t, os.RemoveAll(LogDir(c.dir))) }},
		"the log's key is gone": {"", func(t *testing.T, c *cluster, conf *InitConfig) {
			conf.Keys = keystore.NewMemory()
		}},
		"no such algorithm": {"dsa", func(_ *testing.T, c *cluster, conf *InitConfig) { conf.Algorithm, conf.Dir = "dsa", c.dir+"-2" }},
		"an upstream without a fingerprint": {"--root-fingerprint", func(t *testing.T, c *cluster, conf *InitConfig) {
			conf.Upstream, conf.Dir = atHand(t, c.root), c.dir+"-2"
		}},
		"an upstream of another root": {ErrOtherRoot.Error(), func(t *testing.T, c *cluster, conf *InitConfig) {
			conf.Upstream, conf.Dir, conf.RootFingerprint = atHand(t, c.root), c.dir+"-2", another.fingerprint()
		}},
		"an upstream whose root has ended": {"expired", func(t *testing.T, c *cluster, conf *InitConfig) {
			c.ahead.Store(int64(2000 * time.Hour))
			conf.Upstream, conf.Dir, conf.RootFingerprint = atHand(t, c.root), c.dir+"-2", c.root.fingerprint()
		}},
		"another root than the one that is trusted": {ErrOtherRoot.Error(), func(t *testing.T, c *cluster, conf *InitConfig) {
			conf.Upstream, conf.RootFingerprint = atHand(t, c.root), another.fingerprint()
		}},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			x := newCluster(t, "east")
			conf := InitConfig{Folder: x.folder(), Ceremony: byX509{}, Rotation: testRotation()}
			c.do(t, x, &conf)
			var err error
			if what == "a folder in use" { // the server writes on
				dry := conf
				dry.DryRun = true
				_, err = Init(t.Context(), dry)
			} else {
				_, err = rehearsed(t, conf)
			}
			if err == nil {
				t.Error("a dry run refuses nothing")
			} else {
				wantError(t, err, c.want)
			}
			_, really := Init(t.Context(), conf)
			if really == nil {
				t.Fatal("it is not refused")
			}
			wantError(t, really, c.want)
		})
	}
}

func TestADryRunOfInitAsksTheUpstreamForItsRoot(t *testing.T) {
	t.Parallel()
	c := &cluster{name: "east", dir: shortDir(t), root: newRoot(t), keys: keystore.NewMemory()}
	conf := InitConfig{Folder: c.folder(), Ceremony: byX509{}, Rotation: testRotation(), Upstream: atHand(t, c.root), RootFingerprint: c.root.fingerprint()}
	would, err := rehearsed(t, conf)
	must(t, err)
	if len(would) != 4 || would[3] != "root "+c.root.fingerprint()+" trusted" {
		t.Errorf("it says %q", would)
	}
	_, err = Init(t.Context(), conf)
	must(t, err)
	for _, fingerprint := range []string{"", c.root.fingerprint()} {
		conf.RootFingerprint = fingerprint
		if would, err := rehearsed(t, conf); err != nil || len(would) > 0 {
			t.Errorf("of what is there a dry run says %q, %v", would, err)
		}
	}
}

func TestADryRunOfAJoinTokenChecksAllAndLeavesNothing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.enrol("node-1")
	_, err := s.admin().BanAgent(t.Context(), &adminv1.BanAgentRequest{Agent: "node-1"})
	must(t, err)
	open, gone := s.token("node-2"), s.token("node-3")
	_, err = s.admin().RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: gone.Info.Id})
	must(t, err)
	all := func() string {
		t.Helper()
		r, err := s.admin().ListJoinTokens(t.Context(), &adminv1.ListJoinTokensRequest{})
		must(t, err)
		return r.String()
	}

	none := all()
	r, err := s.admin().CreateJoinToken(t.Context(), &adminv1.CreateJoinTokenRequest{Agent: "node-9", Ttl: durationpb.New(time.Hour), DryRun: true})
	must(t, err)
	if life := r.Info.Expires.AsTime().Sub(r.Info.Created.AsTime()); r.Token != "" || r.Info.Id != "" || r.Info.Agent != "node-9" || life != time.Hour {
		t.Errorf("a dry run says %v", r)
	}
	if made := all(); made != none {
		t.Errorf("a dry run changes the tokens from\n%s\nto\n%s", none, made)
	}
	for _, bad := range []*adminv1.CreateJoinTokenRequest{
		{Agent: "Node 9"}, {Agent: "node-1"}, {Agent: "node-9", Ttl: durationpb.New(25 * time.Hour)}, {Agent: "node-9", Ttl: durationpb.New(time.Millisecond)},
	} {
		_, really := s.admin().CreateJoinToken(t.Context(), bad)
		bad.DryRun = true
		if _, dry := s.admin().CreateJoinToken(t.Context(), bad); really == nil || fmt.Sprint(dry) != fmt.Sprint(really) {
			t.Errorf("%v: a dry run says %v, and then there is %v", bad, dry, really)
		}
	}

	revoke := func(id string, dry bool) (*adminv1.RevokeJoinTokenResponse, error) {
		return s.admin().RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: id, DryRun: dry})
	}
	used := s.token("node-4")
	_, err = doors.Enrol(t.Context(), used.Token)
	must(t, err)
	for what, id := range map[string]string{"used": used.Info.Id, "unknown": "0123456789abcdef"} {
		_, really := revoke(id, false)
		if _, dry := revoke(id, true); really == nil || fmt.Sprint(dry) != fmt.Sprint(really) {
			t.Errorf("%s: a dry run says %v, and then there is %v", what, dry, really)
		}
	}
	before := all()
	for id, want := range map[string]bool{open.Info.Id: true, gone.Info.Id: false} {
		if r, err := revoke(id, true); err != nil || r.Changed != want {
			t.Errorf("a dry run of revoking %s says %v: %v", id, r, err)
		}
	}
	if after := all(); before != after {
		t.Errorf("dry runs change the tokens from\n%s\nto\n%s", before, after)
	}
	if r, err := revoke(open.Info.Id, false); err != nil || !r.Changed {
		t.Errorf("it is revoked for the first time: %v %v", r, err)
	}
	if r, err := revoke(open.Info.Id, false); err != nil || r.Changed {
		t.Errorf("it was revoked before: %v %v", r, err)
	}
	must(t, s.stop())
	made, revoked := 0, 0
	for _, e := range logged(t, c) {
		if e.GetJoinTokenCreated() != nil {
			made++
		}
		if e.GetJoinTokenRevoked() != nil {
			revoked++
		}
	}
	if made != 4 || revoked != 2 {
		t.Errorf("the log has %d tokens made and %d revoked, want 4 and 2", made, revoked)
	}
}
