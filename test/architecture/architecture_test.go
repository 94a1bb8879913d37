// Package architecture holds the house to its plan: which room may know which (docs/architecture.md).
package architecture

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/signet-ca/signet/"

// arrows lists what each room may import of ours. `api`, `internal/bell`, `internal/durable`, `internal/sockets` and `internal/strictyaml` are open to all.
var arrows = map[string]string{
	"api":         "",
	"identity":    "",
	"trust":       "",
	"keystore":    "",
	"audit":       "",
	"ca":          "keystore audit identity",
	"ca/ceremony": "ca keystore audit identity",
	"rotation":    "ca trust",
	"sds":         "trust",
	"agent":       "identity trust sds rotation keystore audit check",
	"server":      "ca identity trust audit rotation keystore check server/shared internal/store",
	"check":       "audit ca rotation",

	"server/shared": "ca identity audit rotation",

	"vault":         "",
	"vault/transit": "vault keystore",
	"vault/pki":     "vault ca keystore",
	"vault/kv":      "vault",

	"internal/durable":    "",
	"internal/strictyaml": "",
	"internal/bell":       "",
	"internal/sockets":    "",
	"internal/health":     "check",
	"internal/store":      "identity ca trust keystore rotation",
	"internal/config":     "identity keystore",
}

type goPackage struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func packages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", module+"...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []goPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// room is the part of the house a package belongs to.
func room(path string) string {
	path = strings.TrimPrefix(path, module)
	for _, deep := range []string{"ca/ceremony", "internal/", "server/shared", "vault/"} {
		if strings.HasPrefix(path, deep) {
			return path
		}
	}
	return strings.SplitN(path, "/", 2)[0]
}

func TestArrowsPointOneWay(t *testing.T) {
	for _, p := range packages(t) {
		from := room(p.ImportPath)
		if from == "cmd" || from == "test" {
			continue
		}
		allowed, known := arrows[from]
		if !known {
			t.Errorf("%s is a room that the plan doesn't know: add it to docs/architecture.md and here", from)
			continue
		}
		may := append(strings.Fields(allowed), from, "api", "internal/bell", "internal/durable", "internal/sockets", "internal/strictyaml", "internal/health")
		for _, imp := range p.Imports {
			if !strings.HasPrefix(imp, module) {
				continue
			}
			if to := room(imp); !slices.Contains(may, to) {
				t.Errorf("%s imports %s: the plan has no such arrow", from, to)
			}
		}
	}
}

func TestOnlyTheRoomsOfVaultLinkItsClient(t *testing.T) {
	found := false
	for _, p := range packages(t) {
		r := room(p.ImportPath)
		links := slices.ContainsFunc(p.Deps, func(dep string) bool { return strings.HasPrefix(dep, "github.com/hashicorp/vault/") })
		found = found || r == "vault" && links
		if r != "vault" && !strings.HasPrefix(r, "vault/") && r != "cmd" && r != "test" && links {
			t.Errorf("%s links Vault's client", p.ImportPath)
		}
	}
	if !found {
		t.Error("vault does not link Vault's client")
	}
}

// Under the race detector a bubble of its own on several processors crashes now and then, see test/bubble.
func TestSimulatedTimeRunsInOurBubble(t *testing.T) {
	for _, path := range files(t, "_test.go") {
		if text, err := os.ReadFile(path); err == nil && strings.Contains(string(text), "synctest.Test"+"(") {
			t.Errorf("%s calls synctest: bubble.Test does, and keeps the race detector alive", path)
		}
	}
}

func TestOnlyColdPathsLinkCfssl(t *testing.T) {
	seen := 0
	for _, p := range packages(t) {
		r := room(p.ImportPath)
		if r == "ca/ceremony" || r == "cmd" || r == "test" {
			continue
		}
		seen++
		for _, dep := range p.Deps {
			if strings.HasPrefix(dep, "github.com/cloudflare/cfssl") || strings.HasPrefix(dep, "github.com/zmap/zlint") {
				t.Errorf("%s links %s", p.ImportPath, dep)
				break
			}
		}
	}
	if seen < 8 {
		t.Errorf("only %d packages were looked at", seen)
	}
}
