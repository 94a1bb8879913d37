package ceremony

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

// maxFile bounds a ceremony file, in bytes.
const maxFile = 64 << 10

// ReadRootFile reads the reviewed file of `root init -f`. Relative paths are relative to the file:
//
//	trust_domain: example.org
//	dir: ./root
//	algorithm: ecdsa-p256   # default
//	life: 10y               # default; 90d and Go durations (2160h) are understood as well
//	path_length: 1          # default
func ReadRootFile(path string) (RootConfig, error) {
	var c RootConfig
	err := readKeys(path, []key{
		{"trust_domain", true, func(s string) (err error) { c.TrustDomain, err = identity.ParseTrustDomain(s); return err }},
		{"dir", true, setPath(path, &c.Dir)},
		{"algorithm", false, func(s string) error { c.Algorithm = keystore.Algorithm(s); return nil }},
		{"life", false, func(s string) (err error) { c.Life, err = ParseLife(s); return err }},
		{"path_length", false, setNumber(&c.PathLen)},
	})
	if err != nil {
		return RootConfig{}, err
	}
	return c, nil
}

// SignFile is the reviewed file of `root sign -f`.
type SignFile struct {
	// SignConfig without the request itself, which is in RequestFile.
	SignConfig
	RequestFile string
	// Dir is the root's folder, Out the file for the chain.
	Dir, Out string
}

// ReadSignFile reads the reviewed file of `root sign -f`. Relative paths are relative to the file:
//
//	dir: ./root
//	trust_domain: example.org
//	cluster: east
//	csr: ./east.csr.pem
//	key_fingerprint: SHA256:ab12:…
//	out: ./east.chain.pem
//	algorithm: ecdsa-p256   # default: any that is allowed
//	life: 90d               # default
//	path_length: 0          # default, and the only one
func ReadSignFile(path string) (SignFile, error) {
	var f SignFile
	err := readKeys(path, []key{
		{"dir", true, setPath(path, &f.Dir)},
		{"trust_domain", true, func(s string) (err error) { f.TrustDomain, err = identity.ParseTrustDomain(s); return err }},
		{"cluster", true, func(s string) error { f.Cluster = s; return identity.ParseName("cluster", s) }},
		{"csr", true, setPath(path, &f.RequestFile)},
		{"key_fingerprint", true, func(s string) error { f.KeyFingerprint = s; return nil }},
		{"out", true, setPath(path, &f.Out)},
		{"algorithm", false, func(s string) error { f.Algorithm = keystore.Algorithm(s); return nil }},
		{"life", false, func(s string) (err error) { f.Life, err = ParseLife(s); return err }},
		{"path_length", false, setNumber(&f.PathLen)},
	})
	if err != nil {
		return SignFile{}, err
	}
	return f, nil
}

// ReadRequestFile reads a certificate request, of at most MaxRequest bytes.
func ReadRequestFile(path string) ([]byte, error) {
	return readFile(path, "certificate request", MaxRequest)
}

// ParseLife reads how long a CA lives: whole years of 365 days (10y), whole days (90d), or a Go duration (36h).
func ParseLife(s string) (time.Duration, error) {
	const day = 24 * time.Hour
	var d time.Duration
	var err error
	if number, ok := strings.CutSuffix(s, "y"); ok {
		d, err = times(number, 365*day)
	} else if number, ok := strings.CutSuffix(s, "d"); ok {
		d, err = times(number, day)
	} else {
		d, err = time.ParseDuration(s)
	}
	if err != nil || d < time.Second || d%time.Second != 0 {
		return 0, fmt.Errorf("life %.32q: want years, days or whole seconds, for example 10y, 90d or 36h", s)
	}
	return d, nil
}

func times(number string, unit time.Duration) (time.Duration, error) {
	n, err := strconv.ParseUint(number, 10, 32)
	if err == nil && n > uint64(math.MaxInt64/unit) {
		err = strconv.ErrRange
	}
	return time.Duration(n) * unit, err
}

// key is one key of a ceremony file.
type key struct {
	name     string
	required bool
	set      func(value string) error
}

func setPath(file string, into *string) func(string) error {
	return func(s string) error {
		if s == "" {
			return errors.New("the path is empty")
		}
		if !filepath.IsAbs(s) {
			s = filepath.Join(filepath.Dir(file), s)
		}
		*into = s
		return nil
	}
}

func setNumber(into *int) func(string) error {
	return func(s string) (err error) {
		if *into, err = strconv.Atoi(s); err != nil {
			return fmt.Errorf("%.32q is not a number", s)
		}
		return nil
	}
}

// readKeys reads a file of plain keys and values, strictly: what is unknown, repeated, nested or missing is an error
// with its line and column.
func readKeys(path string, keys []key) error {
	text, err := readFile(path, "ceremony file", maxFile)
	if err != nil {
		return err
	}
	at := func(n *yaml.Node, format string, args ...any) error {
		return fmt.Errorf("%s:%d:%d: %w", path, n.Line, n.Column, fmt.Errorf(format, args...))
	}
	var doc, more yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(text))
	if err := dec.Decode(&doc); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: %w", path, err)
	}
	if len(doc.Content) == 0 {
		return fmt.Errorf("%s: the file is empty; it needs %s", path, strings.Join(names(keys, true), ", "))
	}
	root := doc.Content[0]
	if root.Kind != yaml.MappingNode {
		return at(root, "want lines of key: value")
	}
	if dec.Decode(&more) != io.EOF {
		return fmt.Errorf("%s: a second document follows; one file is one ceremony", path)
	}
	seen := map[string]bool{}
	for i := 0; i < len(root.Content); i += 2 {
		k, v := root.Content[i], root.Content[i+1]
		j := slices.IndexFunc(keys, func(known key) bool { return known.name == k.Value })
		switch {
		case j < 0:
			return at(k, "unknown key %.64q%s", k.Value, didYouMean(k.Value, names(keys, false)))
		case seen[k.Value]:
			return at(k, "%s is given twice", k.Value)
		case v.Kind != yaml.ScalarNode || v.Tag == "!!null":
			return at(v, "%s: want one value", k.Value)
		}
		seen[k.Value] = true
		if err := keys[j].set(v.Value); err != nil {
			return at(v, "%s: %w", k.Value, err)
		}
	}
	for _, k := range keys {
		if k.required && !seen[k.name] {
			return fmt.Errorf("%s: %s is missing", path, k.name)
		}
	}
	return nil
}

func names(keys []key, requiredOnly bool) []string {
	var out []string
	for _, k := range keys {
		if k.required || !requiredOnly {
			out = append(out, k.name)
		}
	}
	return out
}

// didYouMean suggests the known word that takes the fewest changes, if these are few.
func didYouMean(word string, known []string) string {
	best, least := "", len(word)/3+1
	for _, k := range known {
		if d := distance(word, k); len(word) <= 64 && d <= least {
			best, least = k, d-1
		}
	}
	if best == "" {
		return "; known are " + strings.Join(known, ", ")
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// distance counts the insertions, removals and replacements between two words (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0]++
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(diagonal+cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// readFile reads a file that is no secret, of at most most bytes. errors.Is(err, fs.ErrNotExist).
func readFile(path, what string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", what, err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("read %s: %w", what, err)
	case info.IsDir():
		return nil, fmt.Errorf("read %s %s: it is a folder", what, path)
	case info.Size() > most:
		return nil, fmt.Errorf("read %s %s: it has %d bytes, at most %d are allowed", what, path, info.Size(), most)
	}
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", what, err)
	}
	if int64(len(text)) > most {
		return nil, fmt.Errorf("read %s %s: it has more than the allowed %d bytes", what, path, most)
	}
	return text, nil
}
