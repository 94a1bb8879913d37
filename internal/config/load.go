package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"github.com/signet-ca/signet/identity"
)

// position is where a key stands in the file.
type position struct{ line, column int }

// maxFindings bounds what one file can make us say.
const maxFindings = 100

// origin knows where each value of a file stands, and gathers what is wrong.
type origin struct {
	file, dir string
	at        map[string]position
	findings  Findings
	// misspelled holds the keys that a misspelled one probably means: these aren't missing as well.
	misspelled map[string]bool
	// root is Server or Agent.
	root reflect.Type
}

// given reports whether the file itself gives the value.
func (o *origin) given(key string) bool {
	_, ok := o.at[key]
	return ok
}

func (o *origin) abs(path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(o.dir, path)
}

// find adds a finding about a key, unless there is one already: the first is the cause. It stands at the key's place, or
// at that of the section which lacks it.
func (o *origin) find(key, format string, args ...any) {
	for _, f := range o.findings {
		if f.Key == key {
			return
		}
	}
	if o.misspelled[key] {
		return
	}
	place := key
	for !o.given(place) && strings.ContainsRune(place, '.') {
		place = place[:strings.LastIndexByte(place, '.')]
	}
	o.add(o.at[place], key, format, args...)
}

func (o *origin) findErr(key string, err error) {
	if err != nil {
		o.find(key, "%v", err)
	}
}

func (o *origin) add(p position, key, format string, args ...any) {
	if len(o.findings) >= maxFindings {
		return
	}
	o.findings = append(o.findings, Finding{File: o.file, Line: p.line, Column: p.column, Key: key, Message: fmt.Sprintf(format, args...)})
}

func (o *origin) result() error {
	if len(o.findings) == 0 {
		return nil
	}
	slices.SortStableFunc(o.findings, func(a, b Finding) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return o.findings
}

// read reads a configuration file, which is no secret but bounded.
func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		var pe *os.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return nil, fmt.Errorf("read configuration %s: %w", path, err)
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.IsDir() {
		return nil, fmt.Errorf("read configuration %s: it is a folder, give a file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration %s: %w", path, err)
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("read configuration %s: it is larger than 1 MiB", path)
	}
	return data, nil
}

func load(path string, into any, complete func(*origin)) (origin, error) {
	data, err := read(path)
	if err != nil {
		return origin{}, err
	}
	full, err := filepath.Abs(path)
	if err != nil {
		return origin{}, fmt.Errorf("read configuration %s: %w", path, err)
	}
	o := origin{file: path, dir: filepath.Dir(full)}
	o.parse(data, into, complete)
	return o, o.result()
}

// parse decodes, completes and checks. A file that is no YAML at all is not checked further.
func (o *origin) parse(data []byte, into any, complete func(*origin)) {
	o.at, o.misspelled = map[string]position{}, map[string]bool{}
	root, ok := o.document(data)
	if !ok {
		return
	}
	o.root = reflect.TypeOf(into).Elem()
	if root != nil {
		o.decode(root, "", "", reflect.ValueOf(into).Elem())
	}
	complete(o)
}

var yamlLine = regexp.MustCompile(`^line (\d+): `)

// document parses the file's one document; nil if there is none.
func (o *origin) document(data []byte) (*yaml.Node, bool) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc yaml.Node
	err := dec.Decode(&doc)
	if errors.Is(err, io.EOF) {
		return nil, true
	}
	if err != nil {
		o.syntax(err)
		return nil, false
	}
	var second yaml.Node
	switch err := dec.Decode(&second); {
	case err == nil:
		o.add(position{second.Line, second.Column}, "", "a second document begins here: a configuration is one document, without ---")
		return nil, false
	case !errors.Is(err, io.EOF):
		o.syntax(err)
		return nil, false
	}
	if len(doc.Content) == 0 {
		return nil, true
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.ShortTag() == "!!null" {
		return nil, true
	}
	return root, true
}

func (o *origin) syntax(err error) {
	msg := strings.TrimPrefix(err.Error(), "yaml: ")
	var p position
	if m := yamlLine.FindStringSubmatch(msg); m != nil {
		p.line, _ = strconv.Atoi(m[1])
		msg = msg[len(m[0]):]
	}
	o.add(p, "", "this is not YAML: %s", clip(msg))
}

var (
	durationType    = reflect.TypeFor[time.Duration]()
	trustDomainType = reflect.TypeFor[spiffeid.TrustDomain]()
)

// isSection reports whether v is a struct of keys rather than one value.
func isSection(v reflect.Value) bool {
	return v.Kind() == reflect.Struct && v.Type() != trustDomainType
}

// decode puts a node into v. key is the path so far, kind the field's tag of that name.
func (o *origin) decode(n *yaml.Node, key, kind string, v reflect.Value) {
	here := position{n.Line, n.Column}
	what := key
	if what == "" {
		what = "the configuration"
	}
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		o.add(here, key, "%s: anchors and aliases are not used here, write the value out", what)
		return
	}
	null := n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
	switch {
	case null && (isSection(v) || v.Kind() == reflect.Slice):
		// A section of which every line is commented out.
	case null:
		o.add(here, key, "%s has no value: give it one or remove the key", what)
	case isSection(v):
		if n.Kind != yaml.MappingNode {
			o.add(here, key, "%s: want keys with values, got %s", what, describe(n))
			return
		}
		o.decodeStruct(n, key, v)
	case v.Kind() == reflect.Slice:
		if n.Kind != yaml.SequenceNode {
			o.add(here, key, "%s: want a list, got %s", what, describe(n))
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
		for i, item := range n.Content {
			o.at[fmt.Sprintf("%s[%d]", key, i)] = position{item.Line, item.Column}
			o.decode(item, fmt.Sprintf("%s[%d]", key, i), "", v.Index(i))
		}
	case v.Type() == durationType:
		d, err := time.ParseDuration(n.Value)
		if n.Kind != yaml.ScalarNode || err != nil {
			o.add(here, key, "%s: want a duration such as 90s, 15m or 24h, got %s", what, describe(n))
			return
		}
		v.SetInt(int64(d))
	case n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str":
		hint := ""
		if n.Kind == yaml.ScalarNode {
			hint = "; put it in quotes if it is meant as text"
		}
		o.add(here, key, "%s: want text, got %s%s", what, describe(n), hint)
	case v.Type() == trustDomainType:
		td, err := identity.ParseTrustDomain(n.Value)
		if err != nil {
			o.add(here, key, "%s: %s", what, clip(err.Error()))
			return
		}
		v.Set(reflect.ValueOf(td))
	default:
		o.decodeText(n, here, key, kind, v)
	}
}

func (o *origin) decodeText(n *yaml.Node, here position, key, kind string, v reflect.Value) {
	if strings.ContainsFunc(n.Value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		o.add(here, key, "%s: control characters are not allowed", key)
		return
	}
	value := n.Value
	if kind == "path" && value != "" {
		if value == "~" || strings.HasPrefix(value, "~/") {
			o.add(here, key, "%s %q: ~ is not expanded here, write the folder out", key, clip(value))
			return
		}
		value = o.abs(value)
	}
	v.SetString(value)
	if value == "" {
		// An empty text is the same as none, so that a file can show a key without using it.
		delete(o.at, key)
	}
}

func (o *origin) decodeStruct(n *yaml.Node, key string, v reflect.Value) {
	names := keysOf(v.Type())
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, value := n.Content[i], n.Content[i+1]
		here := position{k.Line, k.Column}
		if k.Kind != yaml.ScalarNode {
			o.add(here, key, "a key must be a plain word, got %s", describe(k))
			continue
		}
		path := join(key, k.Value)
		field := slices.Index(names, k.Value)
		if field < 0 {
			hint := elsewhere(k.Value, o.root)
			if name, ok := nearest(k.Value, names); ok {
				hint = fmt.Sprintf("; did you mean %q?", name)
				o.misspelled[join(key, name)] = true
			}
			// Quoted without its quotes: the key goes to terminals.
			quoted := strings.Trim(strconv.Quote(clip(k.Value)), `"`)
			o.add(here, join(key, quoted), "unknown key %q%s", clip(k.Value), hint)
			continue
		}
		if line, ok := seen[k.Value]; ok {
			o.add(here, path, "%s is given twice, first in line %d: keep one of them", path, line)
			continue
		}
		seen[k.Value] = k.Line
		o.at[path] = here
		f := v.Type().Field(fieldIndexes(v.Type())[field])
		o.decode(value, path, f.Tag.Get("kind"), v.FieldByIndex(f.Index))
	}
}

func join(key, name string) string {
	if key == "" {
		return name
	}
	return key + "." + name
}

// fieldIndexes lists the fields that a file can set.
func fieldIndexes(t reflect.Type) []int {
	var idx []int
	for i := range t.NumField() {
		if t.Field(i).Tag.Get("yaml") != "" {
			idx = append(idx, i)
		}
	}
	return idx
}

func keysOf(t reflect.Type) []string {
	var names []string
	for _, i := range fieldIndexes(t) {
		names = append(names, t.Field(i).Tag.Get("yaml"))
	}
	return names
}

func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "keys with values"
	case yaml.SequenceNode:
		return "a list"
	}
	return fmt.Sprintf("%q", clip(n.Value))
}

// clip bounds foreign text before it goes into an error.
func clip(s string) string {
	const most = 128
	if len(s) <= most {
		return s
	}
	s = s[:most]
	for !utf8.ValidString(s) && len(s) > most-utf8.UTFMax {
		s = s[:len(s)-1]
	}
	return s + "…"
}
