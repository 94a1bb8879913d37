package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/signet-ca/signet/ca"
)

// Every table's heads are upper case words, so that eyes find the same columns everywhere.
func TestAllTablesHaveHeadsOfOneKind(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	head := regexp.MustCompile(`^[+>~]?([A-Z][A-Z0-9]*( [A-Z0-9]+)*|SHA-256|#)$`)
	tables := 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range parsed.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || f.Recv == nil || f.Name.Name != "columns" {
				continue
			}
			tables++
			ast.Inspect(f.Body, func(n ast.Node) bool {
				if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
					if name, err := strconv.Unquote(lit.Value); err != nil || !head.MatchString(name) {
						t.Errorf("%s: the head %s is not of the form SPIFFE ID", file, lit.Value)
					}
				}
				return true
			})
		}
	}
	if tables < 5 {
		t.Errorf("only %d tables were found", tables)
	}
}

// What one command prints as a fingerprint another takes.
func TestFingerprintsHaveOneForm(t *testing.T) {
	for _, printed := range []string{ca.KeyFingerprint([]byte("spki")), ca.CertificateFingerprint([]byte("der"))} {
		if _, err := ca.ParseFingerprint(printed); err != nil {
			t.Error(err)
		}
	}
	h := shortFolder(t)
	for _, args := range [][]string{
		{"root", "sign", "--dir", "root", "--csr", "x", "--cluster", "east", "--fingerprint", "ab:cd"},
		{"root", "sign", "--dir", "root", "--csr", "x", "--cluster", "East", "--fingerprint", ca.KeyFingerprint([]byte("spki"))},
		{"root", "sign", "--dir", "root", "--csr", "x", "--cluster", "east"},
	} {
		h.must(exitCouldNotSay, args...)
	}
}
