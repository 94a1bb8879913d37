package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/transparency-dev/tessera/api/layout"
)

// needed lists the files that the log of this size consists of, without what it is kept with.
func needed(dir string, size uint64) map[string]bool {
	need := map[string]bool{"checkpoint": true}
	either := func(partial, full string) {
		if _, err := os.Stat(filepath.Join(dir, partial)); err != nil {
			partial = full
		}
		need[partial] = true
	}
	for level := uint64(0); size>>(8*level) > 0; level++ {
		for i := uint64(0); i*layout.TileWidth < size>>(8*level); i++ {
			p := layout.PartialTileSize(level, i, size)
			either(layout.TilePath(level, i, p), layout.TilePath(level, i, 0))
			if level == 0 {
				either(layout.EntriesPath(i, p), layout.EntriesPath(i, 0))
			}
		}
	}
	return need
}

func TestEveryFlippedBitOfALogIsFound(t *testing.T) {
	dir, vkey := finished(t, 40, 250, 13)
	r := reader(t, dir, vkey)
	if err := r.Verify(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	need := needed(dir, 303)
	flips := 0
	for _, path := range files(t, dir) {
		if strings.HasPrefix(path, ".state/") && path != treeStateFile || path == "LOCK" {
			continue // The writer's own, which says nothing of the log.
		}
		full := filepath.Join(dir, path)
		good, err := os.ReadFile(full)
		if err != nil {
			t.Fatal(err)
		}
		// Every byte of small files and of the beginning of the others; then a sample. The bit changes with the byte.
		for i := 0; i < len(good); i++ {
			if i > 150 && path != "checkpoint" && i%61 != 0 {
				continue
			}
			bad := bytes.Clone(good)
			bad[i] ^= 1 << (i % 8)
			if err := os.WriteFile(full, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			err := r.Verify(t.Context(), nil)
			var d *Damage
			switch found := errors.As(err, &d) && errors.Is(err, ErrDamaged); {
			case !found:
				t.Errorf("%s byte %d: not found (%v)", path, i, err)
			case need[path] && !strings.Contains(err.Error(), strings.SplitN(path, ".p", 2)[0][len("tile/"):]) && path != "checkpoint":
				t.Errorf("%s byte %d: named as %v", path, i, err)
			case !need[path] && !strings.Contains(err.Error(), path):
				t.Errorf("%s byte %d, which nothing depends on any more: named as %v", path, i, err)
			default:
				flips++
			}
		}
		if err := os.WriteFile(full, good, 0o600); err != nil {
			t.Fatal(err)
		}
		delete(need, path)
	}
	if len(need) > 0 {
		t.Errorf("the log lacks %v", need)
	}
	if err := r.Verify(t.Context(), nil); err != nil {
		t.Errorf("after all is put back: %v", err)
	}
	t.Logf("%d flips, all found", flips)
}

func TestTheFoldersOwnKeyIsCheckedToo(t *testing.T) {
	dir, vkey := finished(t, 5)
	path := filepath.Join(dir, verifierKeyFile)
	for i := range len(vkey) {
		rewrite(t, path, func(b []byte) []byte { b[i] ^= 1; return b })
		r, err := OpenReader(dir, "")
		if err == nil {
			err = r.Verify(t.Context(), nil)
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
		if err == nil {
			t.Errorf("byte %d: not found", i)
		}
		rewrite(t, path, func(b []byte) []byte { b[i] ^= 1; return b })
	}
	r := reader(t, dir, "")
	if !r.KeyFromFolder() || r.VerifierKey() != vkey {
		t.Errorf("%v %s", r.KeyFromFolder(), r.VerifierKey())
	}
	if reader(t, dir, vkey).KeyFromFolder() {
		t.Error("a given key is said to be the folder's")
	}
}

func TestWhatIsMissingOrOfTheWrongLengthIsNamed(t *testing.T) {
	dir, vkey := finished(t, 300, 5)
	for name, tc := range map[string]struct {
		change func(path string) error
		paths  []string
	}{
		"missing": {os.Remove, []string{"tile/entries/000", "tile/entries/001.p/49", "tile/0/000", "tile/0/001.p/49", "tile/1/000.p/1"}},
		"cut":     {func(p string) error { return os.Truncate(p, 31) }, []string{"tile/entries/000", "tile/entries/001.p/49", "tile/0/000", "tile/0/001.p/49", "tile/1/000.p/1"}},
		"empty":   {func(p string) error { return os.Truncate(p, 0) }, []string{"tile/entries/000", "tile/0/001.p/49", "checkpoint"}},
		"longer": {func(p string) error {
			f, err := os.OpenFile(p, os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.Write(make([]byte, 32))
			return errors.Join(err, f.Close())
		}, []string{"tile/entries/000", "tile/entries/001.p/49", "tile/0/000", "tile/0/001.p/49", "tile/1/000.p/1"}},
		"a byte longer": {func(p string) error {
			f, err := os.OpenFile(p, os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.Write([]byte{'\n'})
			return errors.Join(err, f.Close())
		}, []string{"tile/entries/000", "tile/0/000", "tile/1/000.p/1", "checkpoint"}},
		"huge": {func(p string) error { return os.Truncate(p, 1<<40) }, []string{"tile/entries/000", "tile/0/000", "checkpoint", verifierKeyFile, treeStateFile}},
	} {
		for _, path := range tc.paths {
			t.Run(name+" "+path, func(t *testing.T) {
				dir := duplicate(t, dir)
				if err := tc.change(filepath.Join(dir, path)); err != nil {
					t.Fatal(err)
				}
				var d *Damage
				if err := reader(t, dir, vkey).Verify(t.Context(), nil); !errors.As(err, &d) || len(d.Findings) == 0 {
					t.Fatalf("not found: %v", err)
				}
				if want := strings.SplitN(path, ".p", 2)[0]; !strings.HasPrefix(d.Findings[0].File, want) {
					t.Errorf("named as %v", d)
				}
			})
		}
	}
}

func TestFindingsAreBounded(t *testing.T) {
	dir, vkey := finished(t, 30*256)
	for i := range 30 {
		rewrite(t, filepath.Join(dir, layout.TilePath(0, uint64(i), 0)), func(b []byte) []byte { b[0] ^= 1; return b })
	}
	var d *Damage
	if err := reader(t, dir, vkey).Verify(t.Context(), nil); !errors.As(err, &d) || len(d.Findings) != maxFindings || !d.More {
		t.Errorf("%v", err)
	}
}

func TestFoldersThatAreNoLogsAreToldApart(t *testing.T) {
	dir, vkey := finished(t, 3)
	_, other := finished(t, 3)
	empty := t.TempDir()
	outside := filepath.Join(t.TempDir(), "checkpoint")
	if err := os.WriteFile(outside, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, open := range map[string]func() (*Reader, error){
		"no folder":    func() (*Reader, error) { return OpenReader(filepath.Join(empty, "none"), vkey) },
		"empty folder": func() (*Reader, error) { return OpenReader(empty, vkey) },
		"no key":       func() (*Reader, error) { return OpenReader(empty, "") },
		"garbage key":  func() (*Reader, error) { return OpenReader(dir, "key") },
	} {
		if r, err := open(); err == nil {
			t.Errorf("%s: opened", name)
			_ = r.Close()
		} else if errors.Is(err, ErrDamaged) {
			t.Errorf("%s: is called damaged: %v", name, err)
		}
	}
	if err := reader(t, dir, other).Verify(t.Context(), nil); !errors.Is(err, ErrDamaged) {
		t.Errorf("with the key of another log: %v", err)
	}
	// A copied folder may hold anything.
	for name, plant := range map[string]func(path string) error{
		"a link out": func(p string) error { return os.Symlink(outside, p) },
		"a pipe":     func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"a folder":   func(p string) error { return os.Mkdir(p, 0o700) },
	} {
		for _, path := range []string{"checkpoint", "tile/0/000.p/3", "tile/entries/000.p/3"} {
			dir := duplicate(t, dir)
			full := filepath.Join(dir, path)
			if err := errors.Join(os.Remove(full), plant(full)); err != nil {
				t.Fatal(err)
			}
			r, err := OpenReader(dir, vkey)
			if err == nil {
				err = r.Verify(t.Context(), nil)
				_ = r.Close()
			}
			if err == nil || strings.Contains(err.Error(), "secret") {
				t.Errorf("%s at %s: %v", name, path, err)
			}
		}
	}
}

func TestVerifyTellsHowFarItIsAndStopsWhenTold(t *testing.T) {
	dir, vkey := finished(t, 600)
	var steps []string
	r := reader(t, dir, vkey)
	if err := r.Verify(t.Context(), func(done, total uint64) { steps = append(steps, fmt.Sprintf("%d/%d", done, total)) }); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(steps, " "); got != "256/600 512/600 600/600" {
		t.Error(got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Verify(ctx, nil); !errors.Is(err, context.Canceled) || errors.Is(err, ErrDamaged) {
		t.Errorf("%v", err)
	}
}

func TestAReaderFollowsALogThatIsBeingWritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, testConfig(dir, testKey(t)))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 40 {
			if _, err := l.Append(t.Context(), events(i*50, 50)); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	r := reader(t, dir, l.VerifierKey())
	last := uint64(0)
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		cp, err := r.Checkpoint(t.Context())
		if err != nil || cp.Size < last {
			t.Fatalf("size %d after %d: %v", cp.Size, last, err)
		}
		last = cp.Size
		if err := r.VerifyAt(t.Context(), cp, nil); err != nil {
			t.Fatal(err)
		}
		if cp.Size > 0 {
			if _, err := r.Prove(t.Context(), cp.Size-1); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestReadOnlyMediaAreEnough(t *testing.T) {
	was, vkey := finished(t, 10)
	dir := filepath.Join(t.TempDir(), "cd")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount(was, dir, "", syscall.MS_BIND, ""); err != nil {
		t.Skipf("needs the right to mount: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	if err := syscall.Mount("", dir, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Skipf("needs the right to mount: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); !errors.Is(err, syscall.EROFS) {
		t.Fatalf("the folder can be written: %v", err)
	}
	r := reader(t, dir, vkey)
	if err := r.Verify(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if _, err := r.Prove(t.Context(), 7); err != nil {
		t.Error(err)
	}
	r.KeepIndex(filepath.Join(dir, "index.db"))
	if found, err := r.Find(t.Context(), Query{Agent: "node-1"}); err != nil || len(found) != 3 {
		t.Errorf("%v, %v", found, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "index.db")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the index: %v", err)
	}
}
