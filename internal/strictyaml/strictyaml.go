// Package strictyaml reads the YAML files that people write and review, into structs.
//
// A file means what it says or is not used: a key that is unknown or given twice, a value of the wrong type or missing, an
// anchor, a second document are Findings with line and column. All of them are gathered, so that one reading mends a file.
// Every value that was read knows its place, for what the caller finds out later.
//
// # Structs
//
// A field is read if it has the tag yaml:"key". It is a text, an integer, a type with a Parser, a struct of such fields, or
// a list of any of these. Further tags:
//
//	kind:"path"       a path; relative ones are relative to the file's folder, and come out absolute
//	required:"true"   the key must be there and have a value; a list may be []
//
// In errors and in the methods of File a value is named by its path of keys: leaf.ttl, sockets[1].path.
package strictyaml

import (
	"fmt"
	"iter"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"
)

// maxFindings bounds what one file can make us say.
const maxFindings = 100

// Options says how a file is to be read. The zero Options are fine.
type Options struct {
	// What the file is, for findings about it as a whole: "configuration". Default "file".
	What string
	// Parsers read types that are no plain text or number; time.Duration has one, which may be replaced.
	Parsers []Parser
	// Elsewhere says where a key belongs that these structs don't know: "it belongs into …"; "" = nowhere either.
	Elsewhere func(key string) string
	// Check adds what is wrong with values that are right each by itself. It is called also when there are findings already,
	// but not about what is no YAML at all or lacks all that is required.
	Check func(*File)
}

// Parser reads the values of one type from their text.
type Parser struct {
	of    reflect.Type
	parse func(string) (reflect.Value, error)
}

// Parse makes the Parser of a type. The function's error is a finding as it stands, so it must bound what it quotes.
func Parse[T any](parse func(string) (T, error)) Parser {
	return Parser{of: reflect.TypeFor[T](), parse: func(s string) (reflect.Value, error) {
		v, err := parse(s)
		return reflect.ValueOf(v), err
	}}
}

func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("want a duration such as 90s, 15m or 24h, got %q", clip(s))
	}
	return d, nil
}

// position is where something stands in a file; both count from 1.
type position struct{ line, column int }

// File is a file that was read: where its values stand, and what is wrong with it. The zero File is for values that come
// from no file.
type File struct {
	name, dir string
	what      string
	at        map[string]position
	findings  Findings
	// misspelled holds the keys that a misspelled one probably means: these aren't missing as well.
	misspelled map[string]bool
	parsers    map[reflect.Type]Parser
	elsewhere  func(string) string
	// root is what the whole file is read into.
	root reflect.Type
}

// Decode reads text, the content of the file of that name, into the struct that into points to. The error is Findings, but
// for a working folder that can't be told.
func Decode(file string, text []byte, into any, o Options) (*File, error) {
	full, err := filepath.Abs(file)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	f := &File{
		name: file, dir: filepath.Dir(full), what: o.What, at: map[string]position{}, misspelled: map[string]bool{},
		parsers: map[reflect.Type]Parser{}, elsewhere: o.Elsewhere, root: reflect.TypeOf(into).Elem(),
	}
	for _, p := range append([]Parser{Parse(parseDuration)}, o.Parsers...) {
		f.parsers[p.of] = p
	}
	if f.decode(text, reflect.ValueOf(into).Elem()) && o.Check != nil {
		o.Check(f)
	}
	return f, f.Err()
}

// Keys lists the keys at the top of a file, which may be unknown ones, to tell what kind of file it is. The error is
// Findings.
func Keys(file string, text []byte) ([]string, error) {
	f := &File{name: file}
	root, ok := f.document(text)
	if !ok {
		return nil, f.Err()
	}
	var keys []string
	if root != nil {
		for i := 0; i+1 < len(root.Content); i += 2 {
			keys = append(keys, root.Content[i].Value)
		}
	}
	return keys, nil
}

// KeysOf lists the keys at the top of the files that are read into v, a struct.
func KeysOf(v any) []string { return keysOf(reflect.TypeOf(v)) }

// Values gives each value of the struct that v points to under its key, in the order of the fields. An empty list is one
// value.
func Values(v any) iter.Seq2[string, any] {
	return func(yield func(string, any) bool) {
		values("", reflect.ValueOf(v).Elem(), yield)
	}
}

func values(key string, v reflect.Value, yield func(string, any) bool) bool {
	switch {
	case v.Kind() == reflect.Slice && v.Len() > 0:
		for i := range v.Len() {
			if !values(item(key, i), v.Index(i), yield) {
				return false
			}
		}
		return true
	case isSection(v.Type()):
		for _, f := range fieldsOf(v.Type()) {
			if !values(join(key, f.key), v.FieldByIndex(f.Index), yield) {
				return false
			}
		}
		return true
	}
	return yield(key, v.Interface())
}

// Given reports whether the file itself gives a value. An empty text is none, so that a file can show a key without using
// it.
func (f *File) Given(key string) bool {
	_, ok := f.at[key]
	return ok
}

// Source is file:line of a value that the file gives.
func (f *File) Source(key string) (string, bool) {
	p, ok := f.at[key]
	return fmt.Sprintf("%s:%d", f.name, p.line), ok
}

// Abs makes a path that is relative to the file's folder absolute.
func (f *File) Abs(path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(f.dir, path)
}

// Find adds a finding about a key, unless there is one already: the first is the cause. It stands at the key's place, or
// at that of the section which lacks it.
func (f *File) Find(key, format string, args ...any) {
	place := key
	for !f.Given(place) && strings.ContainsAny(place, ".[") {
		place = place[:strings.LastIndexAny(place, ".[")]
	}
	f.findAt(f.at[place], key, format, args...)
}

// FindError is Find of an error, if it is one.
func (f *File) FindError(key string, err error) {
	if err != nil {
		f.Find(key, "%v", err)
	}
}

func (f *File) findAt(p position, key, format string, args ...any) {
	if f.misspelled[key] || slices.ContainsFunc(f.findings, func(one Finding) bool { return one.Key == key }) {
		return
	}
	f.add(p, key, format, args...)
}

func (f *File) add(p position, key, format string, args ...any) {
	if len(f.findings) >= maxFindings {
		return
	}
	f.findings = append(f.findings, Finding{File: f.name, Line: p.line, Column: p.column, Key: key, Message: fmt.Sprintf(format, args...)})
}

// Err is Findings in the order of the file, or nil.
func (f *File) Err() error {
	if len(f.findings) == 0 {
		return nil
	}
	slices.SortStableFunc(f.findings, func(a, b Finding) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return f.findings
}
