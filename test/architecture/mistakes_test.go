package architecture

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const repository = "../.."

// TestEveryMistakeHasItsTest holds docs/mistakes.md to what it says: all rows are there, in order, and each test that a
// row names exists.
func TestEveryMistakeHasItsTest(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(repository, "docs", "mistakes.md"))
	if err != nil {
		t.Fatal(err)
	}
	const rows = 54
	named := regexp.MustCompile("`([a-z0-9/]+)\\.((?:Test|Fuzz)[A-Za-z0-9_]+)`")
	tests := map[string]bool{}
	next := 1
	for _, f := range named.FindAllStringSubmatch(string(text), -1) {
		tests[f[1]+"."+f[2]] = true
		if !hasTest(t, f[1], f[2]) {
			t.Errorf("there is no %s in %s", f[2], f[1])
		}
	}
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		n, err := strconv.Atoi(strings.TrimSpace(cells[0]))
		if err != nil || len(cells) < 2 {
			continue
		}
		if n != next {
			t.Fatalf("row %d stands where row %d is due", n, next)
		}
		next++
		if len(cells) != 4 {
			t.Errorf("row %d has %d cells, want 4", n, len(cells))
			continue
		}
		if !named.MatchString(cells[3]) && !strings.Contains(cells[3], "not here yet: ") {
			t.Errorf("row %d names no test and does not say that there is nothing to test yet", n)
		}
	}
	if next != rows+1 {
		t.Errorf("%d rows, want %d", next-1, rows)
	}
	// And back: a test that is named after a row stands in the table.
	for _, path := range files(t, "_test.go") {
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^func (TestMistake[A-Za-z0-9_]+)`).FindAllSubmatch(source, -1) {
			dir, _ := filepath.Rel(repository, filepath.Dir(path))
			if name := dir + "." + string(m[1]); !tests[name] {
				t.Errorf("%s is in no row of docs/mistakes.md", name)
			}
		}
	}
}

func hasTest(t *testing.T, dir, name string) bool {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(repository, dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(paths, func(path string) bool {
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(source, []byte("\nfunc "+name+"("))
	})
}

// files lists the repository's own files that end so, but for what lies in folders with a dot.
func files(t *testing.T, suffix string) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(repository, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != repository:
			return fs.SkipDir
		case d.Type().IsRegular() && strings.HasSuffix(path, suffix):
			list = append(list, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(list) < 20 {
		t.Fatalf("only %d files end with %q", len(list), suffix)
	}
	return list
}

func TestMistake13NoKeyComesWithTheCode(t *testing.T) {
	key := regexp.MustCompile(`-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/]{20}`)
	for _, path := range files(t, "") {
		info, err := os.Stat(path)
		if err != nil || info.Size() > 4<<20 {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			continue // gone since it was listed
		}
		if key.Match(text) {
			t.Errorf("%s holds a private key: it is everybody's", path)
		}
	}
}

func TestMistake29NothingStartsAProgram(t *testing.T) {
	for _, p := range packages(t) {
		if r := room(p.ImportPath); r != "test" && (slices.Contains(p.Imports, "os/exec") || slices.Contains(p.Imports, "plugin")) {
			t.Errorf("%s can start programs: whoever writes its input might name one", p.ImportPath)
		}
	}
}

// A compressor that is linked registers itself for all gRPC servers of the process.
func TestMistake41NothingDecompresses(t *testing.T) {
	notLinked(t, "google.golang.org/grpc/encoding/gzip")
}

func TestMistake12NoDebuggerIsLinked(t *testing.T) {
	notLinked(t, "net/http/pprof", "google.golang.org/grpc/reflection", "google.golang.org/grpc/channelz/service", "google.golang.org/grpc/admin")
}

func notLinked(t *testing.T, unwanted ...string) {
	t.Helper()
	seen := 0
	for _, p := range packages(t) {
		if room(p.ImportPath) == "test" {
			continue
		}
		seen++
		for _, u := range unwanted {
			if slices.Contains(p.Deps, u) {
				t.Errorf("%s links %s", p.ImportPath, u)
			}
		}
	}
	if seen < 8 {
		t.Errorf("only %d packages were looked at", seen)
	}
}

func TestMistake15NoPatternDecides(t *testing.T) {
	for _, p := range packages(t) {
		switch room(p.ImportPath) {
		case "identity", "server", "server/shared", "agent", "ca", "trust":
			if slices.Contains(p.Imports, "regexp") {
				t.Errorf("%s imports regexp: rules compare whole values", p.ImportPath)
			}
		}
	}
}
