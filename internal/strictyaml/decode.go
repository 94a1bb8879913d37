package strictyaml

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// decode reports whether it makes sense to check further.
func (f *File) decode(text []byte, into reflect.Value) bool {
	root, ok := f.document(text)
	if !ok {
		return false
	}
	if root == nil {
		if needed := requiredOf(f.root); len(needed) > 0 {
			f.add(position{}, "", "the file is empty; it needs %s", strings.Join(needed, ", "))
			return false
		}
		f.missing("", f.root)
		return true
	}
	f.value(root, "", "", into)
	return true
}

var yamlLine = regexp.MustCompile(`^line (\d+): `)

// document parses the file's one document; nil if there is none.
func (f *File) document(text []byte) (*yaml.Node, bool) {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc yaml.Node
	err := dec.Decode(&doc)
	if errors.Is(err, io.EOF) {
		return nil, true
	}
	if err != nil {
		f.syntax(err)
		return nil, false
	}
	var second yaml.Node
	switch err := dec.Decode(&second); {
	case err == nil:
		f.add(position{second.Line, second.Column}, "", "a second document begins here: the file is to be one document, without ---")
		return nil, false
	case !errors.Is(err, io.EOF):
		f.syntax(err)
		return nil, false
	}
	if len(doc.Content) == 0 || isNull(doc.Content[0]) {
		return nil, true
	}
	return doc.Content[0], true
}

func (f *File) syntax(err error) {
	msg := strings.TrimPrefix(err.Error(), "yaml: ")
	var p position
	if m := yamlLine.FindStringSubmatch(msg); m != nil {
		p.line, _ = strconv.Atoi(m[1])
		msg = msg[len(m[0]):]
	}
	f.add(p, "", "this is not YAML: %s", clip(msg))
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// value puts a node into v. key is the path so far, tag that of the field; the items of a list have their list's.
func (f *File) value(n *yaml.Node, key string, tag reflect.StructTag, v reflect.Value) {
	here := position{n.Line, n.Column}
	what := key
	if what == "" {
		what = "the file"
		if f.what != "" {
			what = "the " + f.what
		}
	}
	parser, parsed := f.parsers[v.Type()]
	switch section, list := !parsed && isSection(v.Type()), !parsed && v.Kind() == reflect.Slice; {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		f.add(here, key, "%s: anchors and aliases are not used here, write the value out", what)
	case isNull(n) && isRequired(tag):
		f.add(here, key, "%s has no value: give it one", what)
	case isNull(n) && section:
		// Every line of it is commented out.
		f.missing(key, v.Type())
	case isNull(n) && list:
	case isNull(n):
		f.add(here, key, "%s has no value: give it one or remove the key", what)
	case section && key == "" && n.Kind == yaml.ScalarNode:
		// Not shown: a file that was named by mistake may be a passphrase, a token or a key.
		f.add(here, key, "%s: want keys with values, got text", what)
	case section && n.Kind != yaml.MappingNode:
		f.add(here, key, "%s: want keys with values, got %s", what, describe(n))
	case section:
		f.section(n, key, v)
	case list && n.Kind != yaml.SequenceNode:
		f.add(here, key, "%s: want a list, got %s", what, describe(n))
	case list:
		v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
		for i, one := range n.Content {
			at := item(key, i)
			f.at[at] = position{one.Line, one.Column}
			f.value(one, at, tag, v.Index(i))
		}
	case !parsed && v.CanInt():
		f.integer(n, here, key, v)
	case !parsed && v.Kind() == reflect.Bool:
		f.boolean(n, here, key, v)
	case !parsed && v.CanFloat():
		f.number(n, here, key, v)
	case v.CanInt() && n.Kind != yaml.ScalarNode:
		f.add(here, key, "%s: want one value, got %s", what, describe(n))
	case !v.CanInt() && (n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str"):
		// What is meant as text and is none without quotes would be another value to other readers of the file: 010, 1e3, no.
		hint := ""
		if n.Kind == yaml.ScalarNode {
			hint = "; put it in quotes if it is meant as text"
		}
		f.add(here, key, "%s: want text, got %s%s", what, describe(n), hint)
	case parsed:
		value, err := parser.parse(n.Value)
		if err != nil {
			f.add(here, key, "%s: %v", what, err)
			return
		}
		v.Set(value)
	case v.Kind() == reflect.String:
		f.text(n, here, key, tag.Get("kind"), v)
	default:
		panic(fmt.Sprintf("strictyaml: %s is of type %s, which has no Parser", key, v.Type()))
	}
}

func (f *File) integer(n *yaml.Node, here position, key string, v reflect.Value) {
	i, err := strconv.ParseInt(n.Value, 10, v.Type().Bits())
	switch {
	case n.Kind != yaml.ScalarNode || err != nil && !errors.Is(err, strconv.ErrRange):
		f.add(here, key, "%s: want a whole number, got %s", key, describe(n))
	case err != nil:
		most := int64(1)<<(v.Type().Bits()-1) - 1
		f.add(here, key, "%s: want a whole number from %d to %d, got %s", key, -most-1, most, describe(n))
	default:
		v.SetInt(i)
	}
}

// boolean takes true and false only: yes, on and 1 are other values to other readers of the file.
func (f *File) boolean(n *yaml.Node, here position, key string, v reflect.Value) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" || n.Value != "true" && n.Value != "false" {
		f.add(here, key, "%s: want true or false, got %s", key, describe(n))
		return
	}
	v.SetBool(n.Value == "true")
}

// number takes plain decimals: no exponent, no infinity.
func (f *File) number(n *yaml.Node, here position, key string, v reflect.Value) {
	x, err := strconv.ParseFloat(n.Value, v.Type().Bits())
	if n.Kind != yaml.ScalarNode || n.ShortTag() == "!!str" || err != nil || strings.Trim(n.Value, "-0123456789.") != "" {
		f.add(here, key, "%s: want a number such as 0.5, got %s", key, describe(n))
		return
	}
	v.SetFloat(x)
}

func (f *File) text(n *yaml.Node, here position, key, kind string, v reflect.Value) {
	if strings.ContainsFunc(n.Value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		f.add(here, key, "%s: control characters are not allowed", key)
		return
	}
	value := n.Value
	if kind == "path" && value != "" {
		if value == "~" || strings.HasPrefix(value, "~/") {
			f.add(here, key, "%s %q: ~ is not expanded here, write the folder out", key, clip(value))
			return
		}
		value = f.Abs(value)
	}
	v.SetString(value)
	if value == "" {
		delete(f.at, key)
	}
}

func (f *File) section(n *yaml.Node, key string, v reflect.Value) {
	fields := fieldsOf(v.Type())
	seen := map[string]position{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, value := n.Content[i], n.Content[i+1]
		here := position{k.Line, k.Column}
		if k.Kind != yaml.ScalarNode {
			f.add(here, key, "a key must be a plain word, got %s", describe(k))
			continue
		}
		known := slices.IndexFunc(fields, func(one field) bool { return one.key == k.Value })
		if known < 0 {
			f.unknown(here, key, k.Value, v.Type())
			continue
		}
		path := join(key, k.Value)
		if first, ok := seen[k.Value]; ok {
			f.add(here, path, "%s is given twice, first in line %d: keep one of them", path, first.line)
			continue
		}
		seen[k.Value] = here
		f.at[path] = here
		one := fields[known]
		f.value(value, path, one.Tag, v.FieldByIndex(one.Index))
		if isRequired(one.Tag) && !f.Given(path) {
			f.findAt(here, path, "%s has no value: give it one", path)
		}
	}
	f.missing(key, v.Type())
}

// missing finds what a section requires and hasn't, also in the sections within that are left out.
func (f *File) missing(key string, t reflect.Type) {
	for _, one := range fieldsOf(t) {
		path := join(key, one.key)
		switch _, parsed := f.parsers[one.Type]; {
		case f.Given(path):
		case isRequired(one.Tag):
			f.Find(path, "%s is missing", path)
		case !parsed && isSection(one.Type):
			f.missing(path, one.Type)
		}
	}
}

func (f *File) unknown(here position, section, name string, t reflect.Type) {
	hint := ""
	if near, ok := nearest(name, keysOf(t)); ok {
		hint = fmt.Sprintf("did you mean %q?", near)
		f.misspelled[join(section, near)] = true
	} else if paths := pathsTo(name, "", f.root); len(paths) > 0 {
		hint = fmt.Sprintf("did you mean %s?", strings.Join(paths, " or "))
	} else if f.elsewhere != nil {
		hint = f.elsewhere(name)
	}
	if hint == "" {
		hint = "known are " + strings.Join(keysOf(t), ", ")
	}
	// Quoted without its quotes: the key goes to terminals.
	quoted := strings.Trim(strconv.Quote(clip(name)), `"`)
	f.add(here, join(section, quoted), "unknown key %q; %s", clip(name), hint)
}

// field is one that a file can set.
type field struct {
	reflect.StructField
	key string
}

func fieldsOf(t reflect.Type) []field {
	var list []field
	for i := range t.NumField() {
		if key := t.Field(i).Tag.Get("yaml"); key != "" {
			list = append(list, field{t.Field(i), key})
		}
	}
	return list
}

func keysOf(t reflect.Type) []string {
	var keys []string
	for _, f := range fieldsOf(t) {
		keys = append(keys, f.key)
	}
	return keys
}

func requiredOf(t reflect.Type) []string {
	var keys []string
	for _, f := range fieldsOf(t) {
		if isRequired(f.Tag) {
			keys = append(keys, f.key)
		}
	}
	return keys
}

func isRequired(tag reflect.StructTag) bool { return tag.Get("required") == "true" }

// isSection reports whether a type is a struct of keys rather than one value.
func isSection(t reflect.Type) bool { return t.Kind() == reflect.Struct && len(fieldsOf(t)) > 0 }

func join(key, name string) string {
	if key == "" {
		return name
	}
	return key + "." + name
}

func item(key string, i int) string { return key + "[" + strconv.Itoa(i) + "]" }

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
