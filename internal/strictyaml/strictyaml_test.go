package strictyaml

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

type level string

type part struct {
	Name string   `yaml:"name" required:"true"`
	Tags []string `yaml:"tags" required:"true"`
	Rank int8     `yaml:"rank"`
}

type whole struct {
	Host  netip.Addr    `yaml:"host"`
	Level level         `yaml:"level"`
	Dir   string        `yaml:"dir" kind:"path"`
	Dirs  []string      `yaml:"dirs" kind:"path"`
	Wait  time.Duration `yaml:"wait"`
	Count int           `yaml:"count"`
	On    bool          `yaml:"on"`
	Share float64       `yaml:"share"`
	Parts []part        `yaml:"parts"`
	Deep  struct {
		Er struct {
			Most int `yaml:"most" required:"true"`
		} `yaml:"er"`
	} `yaml:"deep"`

	Unread string
}

var withHost = Options{What: "thing", Parsers: []Parser{Parse(netip.ParseAddr)}}

const full = `host: ::1
level: high
dir: a/../b
dirs: [c, /d]
wait: 90s
count: -7
on: true
share: 0.25
parts:
  - { name: x, tags: [], rank: 127 }
  - name: y
    tags:
      - "1"
deep: { er: { most: 3 } }
`

func TestAFileIsReadWhole(t *testing.T) {
	var got whole
	f, err := Decode("dir/f.yaml", []byte(full), &got, withHost)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.Abs("dir")
	if err != nil {
		t.Fatal(err)
	}
	want := whole{
		Host: netip.IPv6Loopback(), Level: "high", Dir: dir + "/b", Dirs: []string{dir + "/c", "/d"}, Wait: 90 * time.Second, Count: -7, On: true, Share: 0.25,
		Parts: []part{{"x", []string{}, 127}, {"y", []string{"1"}, 0}},
	}
	want.Deep.Er.Most = 3
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	var list []string
	for key, v := range Values(&got) {
		source, _ := f.Source(key)
		list = append(list, fmt.Sprintf("%s=%v %s", key, v, strings.TrimPrefix(source, "dir/f.yaml")))
	}
	if got, want := strings.Join(list, "|"), "host=::1 :1|level=high :2|dir="+dir+"/b :3|dirs[0]="+dir+"/c :4|dirs[1]=/d :4|wait=1m30s :5|count=-7 :6|on=true :7|share=0.25 :8|"+
		"parts[0].name=x :10|parts[0].tags=[] :10|parts[0].rank=127 :10|parts[1].name=y :11|parts[1].tags[0]=1 :13|parts[1].rank=0 :0|deep.er.most=3 :14"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if f.Given("parts[1].rank") || !f.Given("parts[1].tags[0]") {
		t.Error("what is given and what isn't are mixed up")
	}
	for range Values(&got) {
		break // Must end the walk, from within lists and sections too.
	}
}

func TestFindingsHavePlaceAndRemedy(t *testing.T) {
	const most = "deep: {er: {most: 1}}\n"
	for text, want := range map[string]string{
		"":                                     ": deep.er.most is missing",
		"# nothing\n":                          ": deep.er.most is missing",
		"deep:\n":                              ":1:1: deep.er.most is missing",
		"deep: {er: }\n":                       ":1:8: deep.er.most is missing",
		"deep: {er: {most: }}\n":               ":1:19: deep.er.most has no value: give it one",
		"deep: {er: {mots: 1}}\n":              `:1:13: unknown key "mots"; did you mean "most"?`,
		most + "er: 1\n":                       `:2:1: unknown key "er"; did you mean deep.er?`,
		most + "tags: 1\n":                     `:2:1: unknown key "tags"; did you mean parts[].tags?`,
		most + "colour: red\n":                 `:2:1: unknown key "colour"; known are host, level, dir, dirs, wait, count, on, share, parts, deep`,
		most + "parts: [{name: x}]\n":          ":2:9: parts[0].tags is missing",
		most + "parts: [{name: '', tags: []}]": ":2:10: parts[0].name has no value: give it one",
		most + "parts: [{name: x, tags: ~}]\n": ":2:25: parts[0].tags has no value: give it one",
		most + "parts: [{name: x, tags: [~]}]": ":2:26: parts[0].tags[0] has no value: give it one",
		most + "count: 1.5\n":                  `:2:8: count: want a whole number, got "1.5"`,
		most + "on: yes\n":                     `:2:5: on: want true or false, got "yes"`,
		most + "on: \"true\"\n":                `:2:5: on: want true or false, got "true"`,
		most + "on: {}\n":                      ":2:5: on: want true or false, got keys",
		most + "share: half\n":                 `:2:8: share: want a number such as 0.5, got "half"`,
		most + "share: 1e-1\n":                 `:2:8: share: want a number such as 0.5, got "1e-1"`,
		most + "share: .nan\n":                 `:2:8: share: want a number such as 0.5, got ".nan"`,
		most + "share: \"0.5\"\n":              `:2:8: share: want a number such as 0.5, got "0.5"`,
		most + "share: [1]\n":                  ":2:8: share: want a number such as 0.5, got a list",
		most + "count: [1]\n":                  ":2:8: count: want a whole number, got a list",
		most + "count: 1e3\n":                  `:2:8: count: want a whole number, got "1e3"`,
		most + "parts: [{name: x, tags: [], rank: 128}]\n": `:2:35: parts[0].rank: want a whole number from -128 to 127, got "128"`,
		most + "host: x\n":            ":2:7: host: ParseAddr(",
		most + "host: 1\n":            `:2:7: host: want text, got "1"; put it in quotes if it is meant as text`,
		most + "host: {a: b}\n":       ":2:7: host: want text, got keys with values",
		most + "wait: [1s]\n":         ":2:7: wait: want one value, got a list",
		most + "level: no\n":          "",
		most + "level: true\n":        `:2:8: level: want text, got "true"; put it in quotes`,
		most + "level: 010\n":         `:2:8: level: want text, got "010"; put it in quotes`,
		most + "level: ~\n":           ":2:8: level has no value: give it one or remove the key",
		most + "level: &a x\n":        ":2:8: level: anchors and aliases are not used here",
		most + "dirs: [~/x]\n":        `:2:8: dirs[0] "~/x": ~ is not expanded here`,
		most + "level: \"\\e[31m\"\n": ":2:8: level: control characters are not allowed",
		most + "---\n":                ":2:1: a second document begins here",
		"a secret by mistake":         ":1:1: the thing: want keys with values, got text",
		"- 1\n":                       ":1:1: the thing: want keys with values, got a list",
		"{":                           ":1: this is not YAML: ",
	} {
		var w whole
		_, err := Decode("f", []byte(text), &w, withHost)
		var found Findings
		if want == "" {
			if err != nil {
				t.Errorf("%q: %v", text, err)
			}
			continue
		}
		if !errors.As(err, &found) || len(found) != 1 || !strings.HasPrefix(err.Error(), "f"+want) {
			t.Errorf("%q:\ngot  %v\nwant f%s", text, err, want)
		}
	}
}

func TestAnEmptyFileIsToldWhatItNeeds(t *testing.T) {
	var p part
	for _, text := range []string{"", "---\n", "~\n", "# name: x\n"} {
		checked := false
		_, err := Decode("f", []byte(text), &p, Options{Check: func(*File) { checked = true }})
		if err == nil || err.Error() != "f: the file is empty; it needs name, tags" || checked {
			t.Errorf("%q: %v, checked: %t", text, err, checked)
		}
	}
}

func TestTheCallersFindingsStandAmongTheOthers(t *testing.T) {
	var w whole
	_, err := Decode("f", []byte("level: x\nhost: y\ndeep: {er: {most: 1}}\nwiat: 1s\nfoo: 1\n"), &w, Options{
		Parsers:   withHost.Parsers,
		Elsewhere: func(key string) string { return "it belongs to the " + key + "s" },
		Check: func(f *File) {
			f.Find("host", "a second one about the host")
			f.Find("wait", "what is misspelled is not missing")
			f.Find("deep.er.least", "least is missing")
			f.FindError("level", errors.New("unknown level"))
			f.FindError("count", nil)
			f.Find("count", "count is missing")
		},
	})
	want := []string{"f: count is missing", "f:1:1: unknown level", "f:2:7: host: ParseAddr", "f:3:8: least is missing", `f:4:1: unknown key "wiat"; did you mean "wait"?`, `f:5:1: unknown key "foo"; it belongs to the foos`}
	got := strings.Split(fmt.Sprint(err), "\n")
	for i := range want {
		if len(got) != len(want) || !strings.HasPrefix(got[i], want[i]) {
			t.Fatalf("got\n%v\nwant\n%s", err, strings.Join(want, "\n"))
		}
	}
}

func TestACallerCanReadDurationsAnotherWay(t *testing.T) {
	var w whole
	o := withHost
	o.Parsers = append(o.Parsers, Parse(func(s string) (time.Duration, error) { return time.Duration(len(s)), nil }))
	if _, err := Decode("f", []byte("wait: forever\ndeep: {er: {most: 1}}\n"), &w, o); err != nil || w.Wait != 7 {
		t.Errorf("%d, %v", w.Wait, err)
	}
}

func TestValuesOfNoFileHaveFindingsWithoutPlace(t *testing.T) {
	var f File
	f.Find("a.b", "a.b is wrong")
	if err := f.Err(); err == nil || err.Error() != "a.b is wrong" {
		t.Error(err)
	}
	if _, ok := f.Source("a.b"); ok || f.Given("a.b") {
		t.Error("given by no file")
	}
}

func TestTheKeysTellWhatAFileIs(t *testing.T) {
	if keys, err := Keys("f", []byte("b: 1\n? [x]\n: y\na: {c: 2}\n")); err != nil || !reflect.DeepEqual(keys, []string{"b", "", "a"}) {
		t.Errorf("%q, %v", keys, err)
	}
	if keys, err := Keys("f", nil); err != nil || keys != nil {
		t.Errorf("%q, %v", keys, err)
	}
	var found Findings
	if _, err := Keys("f", []byte("{")); !errors.As(err, &found) {
		t.Error(err)
	}
	if keys := KeysOf(part{}); !reflect.DeepEqual(keys, []string{"name", "tags", "rank"}) {
		t.Errorf("%q", keys)
	}
}

func TestFindingsAreBounded(t *testing.T) {
	var b strings.Builder
	for i := range 5000 {
		b.WriteString("k" + strings.Repeat("x", i%7) + string(rune('a'+i%26)) + strings.Repeat("y", i%300) + ": 1\n")
	}
	var w whole
	_, err := Decode("f", []byte(b.String()), &w, withHost)
	var found Findings
	if !errors.As(err, &found) || len(found) != maxFindings || len(err.Error()) > maxFindings*512 {
		t.Errorf("%d findings of %d bytes, want %d", len(found), len(fmt.Sprint(err)), maxFindings)
	}
}

func TestWhatAFileCannotHoldIsAMistakeOfOurs(t *testing.T) {
	defer func() {
		if p := recover(); p == nil || !strings.Contains(fmt.Sprint(p), "host is of type netip.Addr") {
			t.Errorf("recovered %v", p)
		}
	}()
	_, _ = Decode("f", []byte("host: ::1\n"), &whole{}, Options{})
}

// Whatever the bytes, there are findings or values that are what the struct asks for, and all that is said is bounded and
// fit for a terminal.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("parts: [{}, null, 1, [x]]\ncount: 99999999999999999999\nwait: -5h\nwait: x\n? [a]\n: b"))
	f.Add([]byte("\xff\xfea\x00:\x00"))
	f.Add([]byte("deep: {er: {most: !!binary AA==}, <<: {}}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > 1<<14 {
			t.Skip()
		}
		var w whole
		file, err := Decode("/d/f", text, &w, withHost)
		if err == nil {
			for i, p := range w.Parts {
				if p.Name == "" || !file.Given(fmt.Sprintf("parts[%d].tags", i)) {
					t.Fatalf("accepted without what is required: %+v", w)
				}
			}
			if !file.Given("deep.er.most") || w.Dir != "" && !filepath.IsAbs(w.Dir) {
				t.Fatalf("accepted %+v", w)
			}
			return
		}
		var found Findings
		if !errors.As(err, &found) || len(found) == 0 || len(found) > maxFindings {
			t.Fatalf("%d findings: %v", len(found), err)
		}
		for _, one := range found {
			if one.Message == "" || len(one.Message) > 2048 || strings.ContainsAny(one.Message+one.Key, "\x00\x1b\n") {
				t.Fatalf("finding %+q", one)
			}
		}
	})
}
