package durable

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// sim is a file system that loses at a crash what was not made durable. A file's bytes are durable after its Sync; names
// are durable after syncDir. Every step is counted, and one may fail or be the last.
type sim struct {
	names  map[string]*inode // as processes see them
	stable map[string]*inode // as the disk has them
	steps  int
	failAt int // this step returns an error, having done nothing
	dieAt  int // at this step and after, nothing happens any more
}

type inode struct {
	data, durable []byte
	mode          fs.FileMode
}

var errInjected = errors.New("injected failure")

func (s *sim) step() error {
	s.steps++
	if s.dieAt != 0 && s.steps >= s.dieAt || s.steps == s.failAt {
		return errInjected
	}
	return nil
}

func (s *sim) create(path string, mode fs.FileMode) (file, error) {
	if err := s.step(); err != nil {
		return nil, err
	}
	if s.names[path] != nil {
		return nil, fs.ErrExist
	}
	s.names[path] = &inode{mode: mode}
	return &simFile{s, s.names[path]}, nil
}

func (s *sim) rename(from, to string) error {
	if err := s.step(); err != nil {
		return err
	}
	s.names[to] = s.names[from]
	delete(s.names, from)
	return nil
}

func (s *sim) link(from, to string) error {
	if err := s.step(); err != nil {
		return err
	}
	if s.names[to] != nil {
		return fs.ErrExist
	}
	s.names[to] = s.names[from]
	return nil
}

func (s *sim) remove(path string) error {
	if err := s.step(); err != nil {
		return err
	}
	delete(s.names, path)
	return nil
}

func (s *sim) syncDir(string) error {
	if err := s.step(); err != nil {
		return err
	}
	s.stable = map[string]*inode{}
	for n, i := range s.names {
		s.stable[n] = i
	}
	return nil
}

type simFile struct {
	s *sim
	i *inode
}

func (f *simFile) Write(p []byte) (int, error) {
	if err := f.s.step(); err != nil {
		// A full disk takes a part.
		f.i.data = append(f.i.data, p[:len(p)/2]...)
		return len(p) / 2, err
	}
	f.i.data = append(f.i.data, p...)
	return len(p), nil
}

func (f *simFile) Chmod(m fs.FileMode) error {
	if err := f.s.step(); err != nil {
		return err
	}
	f.i.mode = m
	return nil
}

func (f *simFile) Sync() error {
	if err := f.s.step(); err != nil {
		return err
	}
	f.i.durable = bytes.Clone(f.i.data)
	return nil
}

func (f *simFile) Close() error { return f.s.step() }

func newSim(old string) *sim {
	s := &sim{names: map[string]*inode{}, stable: map[string]*inode{}}
	if old != "" {
		i := &inode{data: []byte(old), durable: []byte(old), mode: 0o600}
		s.names["/d/f"], s.stable["/d/f"] = i, i
	}
	return s
}

// Each step fails in turn, and at each step the power goes: with the names that the disk had last heard of, or with those
// that the kernel had, since a kernel may write earlier than it is told to.
func TestACrashLeavesTheOldFileOrTheNewOneWhole(t *testing.T) {
	for _, replace := range []bool{true, false} {
		for _, old := range []string{"", "old old old"} {
			if !replace && old != "" {
				continue
			}
			clean := newSim(old)
			if err := write(clean, "/d/f", []byte("new"), 0o640, replace); err != nil {
				t.Fatal(err)
			}
			if got := clean.stable["/d/f"]; got == nil || string(got.durable) != "new" || got.mode != 0o640 {
				t.Fatalf("after success the disk has %+v", got)
			}
			if len(clean.names) != 1 {
				t.Errorf("after success there are %d names", len(clean.names))
			}
			for n := 1; n <= clean.steps; n++ {
				for _, die := range []bool{false, true} {
					s := newSim(old)
					if die {
						s.dieAt = n
					} else {
						s.failAt = n
					}
					err := write(s, "/d/f", []byte("new"), 0o640, replace)
					what := fmt.Sprintf("replace=%v old=%q step=%d die=%v", replace, old, n, die)
					for view, names := range map[string]map[string]*inode{"disk": s.stable, "kernel": s.names} {
						got := ""
						if i := names["/d/f"]; i != nil {
							got = string(i.durable)
						}
						if got != old && got != "new" {
							t.Errorf("%s: in the view of the %s there is %q", what, view, got)
						}
						if err == nil && got != "new" {
							t.Errorf("%s: reported success, but the %s has %q", what, view, got)
						}
					}
					if !die {
						for name := range s.names {
							// Removing the temporary name is the one step whose failure is passed over.
							if name != "/d/f" && err != nil {
								t.Errorf("%s: %s was left behind", what, name)
							}
						}
					}
				}
			}
		}
	}
}

func TestCreateFileNeverReplaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := CreateFile(path, []byte("first"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := CreateFile(path, []byte("second"), 0o600)
	if !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
	if got, _ := os.ReadFile(path); string(got) != "first" {
		t.Errorf("the file has become %q", got)
	}
	if err := WriteFile(path, []byte("third"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); string(got) != "third" {
		t.Errorf("the file is %q", got)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("%d files in the folder, %v", len(entries), err)
	}
}

func TestTheModeIsTheOneAskedForWhateverTheUmask(t *testing.T) {
	dir := t.TempDir()
	defer syscall.Umask(syscall.Umask(0))
	for _, umask := range []int{0, 0o077} {
		syscall.Umask(umask)
		for _, mode := range []fs.FileMode{0o600, 0o644, 0o400} {
			path := filepath.Join(dir, fmt.Sprintf("%o-%o", umask, mode))
			if err := WriteFile(path, nil, mode); err != nil {
				t.Fatal(err)
			}
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
				t.Errorf("umask %o: mode %o, want %o (%v)", umask, info.Mode().Perm(), mode, err)
			}
		}
		folder := filepath.Join(dir, fmt.Sprint("folder", umask), "a", "b")
		if err := Dir(folder); err != nil {
			t.Fatal(err)
		}
		for d := folder; d != dir; d = filepath.Dir(d) {
			if info, err := os.Stat(d); err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("umask %o: folder %s has mode %o (%v)", umask, d, info.Mode().Perm(), err)
			}
		}
	}
}

func TestDirRefusesWhatOthersMayWriteTo(t *testing.T) {
	for mode, ok := range map[fs.FileMode]bool{0o700: true, 0o750: true, 0o755: true, 0o500: true, 0o770: false, 0o702: false, 0o777: false} {
		dir := filepath.Join(t.TempDir(), "d")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		err := Dir(dir)
		if ok != (err == nil) {
			t.Errorf("mode %o: %v", mode, err)
		}
		if err != nil && !strings.Contains(err.Error(), "chmod go-w "+dir) {
			t.Errorf("mode %o: %v: names no remedy", mode, err)
		}
		if mode == 0o500 && os.Geteuid() != 0 {
			continue // it is ours, and nothing can be written to it
		}
		if before := MayDir(dir); fmt.Sprint(before) != fmt.Sprint(err) {
			t.Errorf("mode %o: foretold was %v, and then there is %v", mode, before, err)
		}
	}
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []func(string) error{Dir, MayDir} {
		if err := dir(path); err == nil || !strings.Contains(err.Error(), "not a folder") {
			t.Errorf("a file: %v", err)
		}
		if err := dir(filepath.Join(path, "below")); err == nil {
			t.Error("a folder below a file was made")
		}
	}
	missing := filepath.Join(t.TempDir(), "a", "b")
	if err := MayDir(missing); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Dir(missing)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("to ask for a folder has made one: %v", err)
	}
}

func TestReadSecretReadsOnlyWhatIsSecret(t *testing.T) {
	dir := t.TempDir()
	secret := func(name string, mode fs.FileMode) string {
		path := filepath.Join(dir, name)
		if err := WriteFile(path, []byte("secret"), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	// As Kubernetes mounts a secret: key -> ..data/key, ..data -> ..2026.
	if err := os.Mkdir(filepath.Join(dir, "..2026"), 0o755); err != nil {
		t.Fatal(err)
	}
	secret("..2026/key", 0o440)
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{
		"..data": "..2026", "key": "..data/key", "out": outside, "up": "../" + filepath.Base(filepath.Dir(outside)) + "/outside", "loop": "loop", "dangling": "nothing",
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := secret("foreign", 0o600)
	if err := os.Chown(foreign, 12345, -1); err != nil {
		foreign = ""
	}
	foreignGroup := secret("foreign-group", 0o640)
	if err := os.Chown(foreignGroup, -1, 12345); err != nil {
		foreignGroup = ""
	}
	for path, want := range map[string]string{ // "" = may be read
		secret("600", 0o600):           "",
		secret("400", 0o400):           "",
		secret("640", 0o640):           "", // of our own group
		secret("660", 0o660):           "mode 0660 lets others at this secret: run `chmod 0600",
		secret("604", 0o604):           "mode 0604",
		secret("644", 0o644):           "mode 0644",
		secret("610", 0o610):           "mode 0610",
		filepath.Join(dir, "key"):      "",
		filepath.Join(dir, "out"):      "symbolic link that leads out of its folder",
		filepath.Join(dir, "up"):       "symbolic link that leads out of its folder",
		filepath.Join(dir, "loop"):     "symbolic link",
		filepath.Join(dir, "dangling"): "no such file",
		filepath.Join(dir, "nothing"):  "no such file",
		filepath.Join(dir, "no", "no"): "no such file",
		filepath.Join(dir, "fifo"):     "not a regular file",
		dir + "/..2026":                "not a regular file",
		foreign:                        "belongs to uid 12345",
		foreignGroup:                   "mode 0640",
	} {
		if path == "" {
			continue // only root can make it
		}
		got, err := ReadSecret(path, 6)
		switch {
		case want == "" && (err != nil || string(got) != "secret"):
			t.Errorf("%s: %q, %v", path, got, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path)):
			t.Errorf("%s: %v, want words %q", path, err, want)
		case want == "no such file" && !errors.Is(err, fs.ErrNotExist):
			t.Errorf("%s: %v is not fs.ErrNotExist", path, err)
		}
	}
	if _, err := ReadSecret(filepath.Join(dir, "600"), 5); err == nil || !strings.Contains(err.Error(), "at most 5 are allowed") {
		t.Errorf("too large: %v", err)
	}
	t.Chdir(dir)
	if got, err := ReadSecret("600", 6); err != nil || string(got) != "secret" {
		t.Errorf("a bare name: %q, %v", got, err)
	}
}

// The tests below need a mount of their own; the test runs itself again inside new namespaces.
const insideMount = "DURABLE_TEST_READ_ONLY"

func TestAReadOnlyFolderIsOneClearSentence(t *testing.T) {
	if dir := os.Getenv(insideMount); dir != "" {
		checkReadOnly(t, dir)
		return
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	script := `mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$2" -test.run '^TestAReadOnlyFolderIsOneClearSentence$' -test.v`
	unshare := []string{"--mount"}
	if os.Geteuid() != 0 {
		unshare = []string{"--user", "--map-root-user", "--mount"}
	}
	if out, err := exec.Command("unshare", append(unshare, "sh", "-c", `mount --bind "$1" "$1"`, "sh", dir)...).CombinedOutput(); err != nil {
		t.Skipf("no mount namespaces here: %v: %s", err, out)
	}
	cmd := exec.Command("unshare", append(unshare, "sh", "-c", script, "sh", dir, os.Args[0])...)
	cmd.Env = append(os.Environ(), insideMount+"="+dir)
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestAReadOnlyFolderIsOneClearSentence")) {
		t.Errorf("inside: %v\n%s", err, out)
	}
}

func checkReadOnly(t *testing.T, dir string) {
	path := filepath.Join(dir, "f")
	_, lockErr := Lock(dir)
	for what, err := range map[string]error{
		"write":  WriteFile(path, []byte("new"), 0o600),
		"create": CreateFile(filepath.Join(dir, "g"), nil, 0o600),
		"dir":    Dir(filepath.Join(dir, "a", "b")),
		"maydir": MayDir(filepath.Join(dir, "a", "b")),
		"itself": MayDir(dir),
		"lock":   lockErr,
	} {
		if err == nil || !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), dir) ||
			!strings.Contains(err.Error(), "read-only file system; choose a folder that can be written to") || strings.Contains(err.Error(), TempPrefix) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "old" {
		t.Errorf("the file is %q, %v", got, err)
	}
}
