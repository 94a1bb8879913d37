package kv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"github.com/signet-ca/signet/server"
	"github.com/signet-ca/signet/vault"
)

var _ server.Exchange = (*Folder)(nil)

// fakeVault answers as it is told.
type fakeVault struct {
	secret *api.Secret
	err    error
	path   string
	body   map[string]any
}

func (f *fakeVault) Read(_ context.Context, path string) (*api.Secret, error) {
	f.path = path
	return f.secret, f.err
}

func (f *fakeVault) Write(_ context.Context, path string, body map[string]any) (*api.Secret, error) {
	f.path, f.body = path, body
	return f.secret, f.err
}

func newFolder(t *testing.T, v Vault) *Folder {
	t.Helper()
	f, err := New(Config{Vault: v, Mount: "secret", Path: "signet/example.org", Cluster: "east", Peers: []string{"west"}})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// answer is what Vault says, in its own words.
func answer(t *testing.T, data string) *api.Secret {
	t.Helper()
	s, err := api.ParseSecret(strings.NewReader(`{"data":` + data + `}`))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestAFolderNeedsAPlace(t *testing.T) {
	for _, c := range []Config{
		{Mount: "secret", Path: "p"},
		{Vault: &fakeVault{}, Path: "p"},
		{Vault: &fakeVault{}, Mount: "secret"},
		{Vault: &fakeVault{}, Mount: "/secret", Path: "p"},
		{Vault: &fakeVault{}, Mount: "secret", Path: "p/"},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%+v is a folder", c)
		}
	}
}

func TestNeedsAreWhatIsUsedAndNoMore(t *testing.T) {
	var got []string
	for _, n := range Needs(Config{Mount: "kv/team", Path: "signet/example.org", Cluster: "east", Peers: []string{"west", "north"}}) {
		got = append(got, n.Path+" "+strings.Join(n.Capabilities, ","))
		if n.Why == "" {
			t.Errorf("%s: not said why", n.Path)
		}
	}
	want := []string{
		"kv/team/data/signet/example.org/trust create,read,update",
		"kv/team/data/signet/example.org/reports/east create,read,update",
		"kv/team/data/signet/example.org/reports/west read",
		"kv/team/data/signet/example.org/reports/north read",
	}
	if !slices.Equal(got, want) {
		t.Errorf("needs: %q", got)
	}
}

func TestAnswersAreReadWithCare(t *testing.T) {
	none := &vault.Error{Op: "read", Path: "x", Status: http.StatusNotFound}
	for _, c := range []struct {
		what    string
		secret  string
		err     error
		text    string
		version uint64
		want    string
	}{
		{"a document", `{"data":{"note":"hello"},"metadata":{"version":7}}`, nil, "hello", 7, ""},
		{"with more beside it", `{"data":{"note":"hello","by":"hand"},"metadata":{"version":7}}`, nil, "hello", 7, ""},
		{"nothing", "", none, "", 0, ""},
		{"deleted", `{"data":null,"metadata":{"version":3,"deletion_time":"2026-01-01T00:00:00Z"}}`, none, "", 3, ""},
		{"deleted, with no version", `{"data":null,"metadata":{}}`, none, "", 0, "version 2"},
		{"no engine", "", &vault.Error{Op: "read", Path: "x", Status: http.StatusNotFound, Messages: []string{"no handler for route"}}, "", 0, "no handler"},
		{"version 1", `{"note":"hello"}`, nil, "", 0, "KV engine of version 2"},
		{"no data", `{"metadata":{"version":7}}`, nil, "", 0, "not written by a Signet server"},
		{"a number", `{"data":{"note":5},"metadata":{"version":7}}`, nil, "", 0, "vault kv delete -mount=secret signet/example.org/trust"},
		{"a list", `{"data":{"note":["hello"]},"metadata":{"version":7}}`, nil, "", 0, "version 7"},
		{"empty", `{"data":{"note":""},"metadata":{"version":7}}`, nil, "", 0, "not written by"},
		{"data that is none", `{"data":"hello","metadata":{"version":7}}`, nil, "", 0, "not written by"},
		{"a version that is none", `{"data":{"note":"hello"},"metadata":{"version":"7"}}`, nil, "", 0, "has no version"},
		{"a version below 0", `{"data":{"note":"hello"},"metadata":{"version":-7}}`, nil, "", 0, "version"},
		{"a broken version", `{"data":{"note":"hello"},"metadata":{"version":7.5}}`, nil, "", 0, "version"},
		{"too long", `{"data":{"note":"` + strings.Repeat("x", MaxDocument+1) + `"},"metadata":{"version":7}}`, nil, "", 0, "at most"},
		{"denied", "", &vault.Error{Op: "read", Path: "x", Status: http.StatusForbidden}, "", 0, "x"},
	} {
		f := &fakeVault{err: c.err}
		if c.secret != "" {
			f.secret = answer(t, c.secret)
		}
		text, version, err := newFolder(t, f).Read(t.Context(), "trust")
		switch {
		case c.want == "" && err != nil, c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v", c.what, err)
		case string(text) != c.text || version != c.version || text == nil && c.text != "":
			t.Errorf("%s: %q, version %d", c.what, text, version)
		case err != nil && (len(err.Error()) > 600 || errors.As(err, new(interface{ Away() bool }))):
			t.Errorf("%s: %v", c.what, err)
		}
		if f.path != "secret/data/signet/example.org/trust" {
			t.Errorf("read at %s", f.path)
		}
	}
}

func TestWritesAreUponAVersion(t *testing.T) {
	f := &fakeVault{secret: answer(t, `{"version":8}`)}
	if ok, err := newFolder(t, f).Write(t.Context(), "reports/east", []byte("hello\n"), 7); !ok || err != nil {
		t.Fatalf("%v, %v", ok, err)
	}
	body, err := json.Marshal(f.body)
	if want := `{"data":{"note":"hello\n"},"options":{"cas":7}}`; err != nil || string(body) != want || f.path != "secret/data/signet/example.org/reports/east" {
		t.Errorf("written: %s at %s, %v", body, f.path, err)
	}
	f = &fakeVault{err: fmt.Errorf("written: %w", vault.ErrConflict)}
	if ok, err := newFolder(t, f).Write(t.Context(), "trust", []byte("hello"), 7); ok || err != nil {
		t.Errorf("of a conflict comes %v, %v", ok, err)
	}
	for what, f := range map[string]*fakeVault{"nothing": {}, "no version": {secret: answer(t, `{}`)}, "an error": {err: errors.New("denied")}} {
		if ok, err := newFolder(t, f).Write(t.Context(), "trust", []byte("hello"), 7); ok || err == nil {
			t.Errorf("of %s comes %v, %v", what, ok, err)
		}
	}
	f = &fakeVault{}
	for what, text := range map[string][]byte{"nothing": nil, "too much": make([]byte, MaxDocument+1), "no text": {0xff}} {
		if ok, err := newFolder(t, f).Write(t.Context(), "trust", text, 7); ok || err == nil || f.path != "" {
			t.Errorf("%s was written: %v", what, err)
		}
	}
}

func TestAVaultThatIsAwayIsToldFromOneThatRefuses(t *testing.T) {
	for _, c := range []struct {
		err  error
		away bool
	}{{fmt.Errorf("sealed: %w", vault.ErrAway), true}, {vault.ErrDenied, false}} {
		f := newFolder(t, &fakeVault{err: c.err})
		_, _, read := f.Read(t.Context(), "trust")
		_, written := f.Write(t.Context(), "trust", []byte("x"), 0)
		for _, err := range []error{read, written} {
			var a interface{ Away() bool }
			if errors.As(err, &a) && a.Away() != c.away || !errors.Is(err, c.err) || c.away && a == nil {
				t.Errorf("%v: away is %v", err, a)
			}
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"data":{"data":{"note":"hello"},"metadata":{"version":7}}}`), false)
	f.Add([]byte(`{"data":{"data":null,"metadata":{"version":7}}}`), true)
	f.Add([]byte(`{}`), true)
	f.Fuzz(func(t *testing.T, body []byte, none bool) {
		secret, err := api.ParseSecret(strings.NewReader(string(body)))
		if err != nil {
			return
		}
		v := &fakeVault{secret: secret}
		if none {
			v.err = &vault.Error{Op: "read", Path: "x", Status: http.StatusNotFound}
		} else if secret == nil {
			return // the connection makes that a document that is not there
		}
		text, version, err := newFolder(t, v).Read(t.Context(), "trust")
		if err != nil && (text != nil || version != 0) || len(text) > MaxDocument {
			t.Errorf("%q, %d, %v", text, version, err)
		}
	})
}
