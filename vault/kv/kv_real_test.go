//go:build real

package kv

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/lab"
	"github.com/signet-ca/signet/vault"
)

// engine is a KV engine in the real Vault, named after the test.
type engine struct {
	*lab.Vault
	t      *testing.T
	config Config
}

func newEngine(t *testing.T) *engine {
	t.Helper()
	v, err := theVault.Get()
	must(t, err)
	mount := strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-"))
	must(t, v.Mount(t.Context(), mount, "kv"))
	return &engine{v, t, Config{Mount: mount, Path: "signet/example.org", Cluster: "east", Peers: []string{"west"}}}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// as connects with a token that may do what these needs say.
func (e *engine) as(name string, needs []vault.Need) (*vault.Client, *Folder) {
	e.t.Helper()
	policy := e.config.Mount + "-" + name
	must(e.t, e.Policy(e.t.Context(), policy, vault.Policy(append(vault.Needs(), needs...))))
	token, err := e.MakeToken(e.t.Context(), lab.VaultLife{Policies: []string{policy}, TTL: time.Hour})
	must(e.t, err)
	file := filepath.Join(e.t.TempDir(), "token")
	must(e.t, os.WriteFile(file, []byte(token+"\n"), 0o600))
	client, err := vault.New(vault.Config{Address: e.Address, CAFile: e.CAFile, Timeout: 30 * time.Second, Login: vault.Login{Method: "token", TokenFile: file}})
	must(e.t, err)
	e.t.Cleanup(client.Close)
	c := e.config
	c.Vault = client
	f, err := New(c)
	must(e.t, err)
	return client, f
}

// folder is that of east, with exactly what it needs.
func (e *engine) folder() *Folder {
	e.t.Helper()
	_, f := e.as("east", Needs(e.config))
	return f
}

// admin writes as a person would.
func (e *engine) admin(path string, body map[string]any) {
	e.t.Helper()
	_, err := e.Root().Write(e.t.Context(), e.config.Mount+"/"+path, body)
	must(e.t, err)
}

func (e *engine) reads(f *Folder, name, text string, version uint64) {
	e.t.Helper()
	got, at, err := f.Read(e.t.Context(), name)
	must(e.t, err)
	if string(got) != text || at != version || (got == nil) != (text == "") {
		e.t.Errorf("%s is %.64q of version %d, want %.64q of version %d", name, got, at, text, version)
	}
}

func (e *engine) writes(f *Folder, name, text string, upon uint64, want bool) {
	e.t.Helper()
	ok, err := f.Write(e.t.Context(), name, []byte(text), upon)
	must(e.t, err)
	if ok != want {
		e.t.Errorf("writing %s upon version %d: %v", name, upon, ok)
	}
}

func TestADocumentIsWrittenUponTheVersionThatWasRead(t *testing.T) {
	e := newEngine(t)
	f := e.folder()
	e.reads(f, "trust", "", 0)
	e.writes(f, "trust", "one\n— \"east\" ☃\n", 0, true)
	e.reads(f, "trust", "one\n— \"east\" ☃\n", 1)
	e.writes(f, "trust", "two", 1, true)
	// Whoever comes late has written nothing.
	for _, upon := range []uint64{0, 1, 3} {
		e.writes(f, "trust", "late", upon, false)
	}
	e.reads(f, "trust", "two", 2)
	// Somebody else's write counts like one of ours.
	e.admin("data/signet/example.org/trust", map[string]any{"data": map[string]any{"note": "theirs"}})
	e.writes(f, "trust", "mine", 2, false)
	e.reads(f, "trust", "theirs", 3)
	e.writes(f, "trust", "mine", 3, true)
	// Beyond the versions that are kept (ten).
	for v := uint64(4); v < 16; v++ {
		e.writes(f, "trust", fmt.Sprint("version ", v+1), v, true)
	}
	e.reads(f, "trust", "version 16", 16)
	// An engine that wants check-and-set of everybody gets it.
	e.admin("config", map[string]any{"cas_required": true})
	e.writes(f, "reports/east", "report", 0, true)
	e.reads(f, "reports/east", "report", 1)
}

func TestOfTwoThatWriteAtOnceOneHasWritten(t *testing.T) {
	e := newEngine(t)
	f := e.folder()
	const writers, rounds = 8, 5
	for upon := range uint64(rounds) {
		won, wg := make(chan int, writers), sync.WaitGroup{}
		for i := range writers {
			wg.Go(func() {
				ok, err := f.Write(t.Context(), "trust", []byte(fmt.Sprint("writer ", i)), upon)
				if err != nil {
					t.Error(err)
				}
				if ok {
					won <- i
				}
			})
		}
		wg.Wait()
		close(won)
		var all []int
		for i := range won {
			all = append(all, i)
		}
		if len(all) != 1 {
			t.Fatalf("%v have written upon version %d", all, upon)
		}
		e.reads(f, "trust", fmt.Sprint("writer ", all[0]), upon+1)
	}
}

func TestWhatWasDeletedIsNoDocumentAndCanBeWrittenOver(t *testing.T) {
	e := newEngine(t)
	f := e.folder()
	const data, name = "data/signet/example.org/trust", "trust"
	e.writes(f, name, "one", 0, true)
	must(t, e.Root().Delete(t.Context(), e.config.Mount+"/"+data))
	e.reads(f, name, "", 1)
	e.writes(f, name, "not upon nothing", 0, false)
	e.writes(f, name, "two", 1, true)
	e.reads(f, name, "two", 2)

	e.admin("destroy/signet/example.org/trust", map[string]any{"versions": []int{2}})
	e.reads(f, name, "", 2)
	e.writes(f, name, "three", 2, true)

	// Deleted, and somebody else is quicker.
	must(t, e.Root().Delete(t.Context(), e.config.Mount+"/"+data))
	e.reads(f, name, "", 3)
	e.admin(data, map[string]any{"data": map[string]any{"note": "theirs"}})
	e.writes(f, name, "ours", 3, false)
	e.reads(f, name, "theirs", 4)

	// Undeleted: the version is what it was.
	must(t, e.Root().Delete(t.Context(), e.config.Mount+"/"+data))
	e.admin("undelete/signet/example.org/trust", map[string]any{"versions": []int{4}})
	e.reads(f, name, "theirs", 4)

	// With its metadata the numbers are gone too: they begin anew, and what was read before is of no use.
	must(t, e.Root().Delete(t.Context(), e.config.Mount+"/metadata/signet/example.org/trust"))
	e.reads(f, name, "", 0)
	e.writes(f, name, "upon what was", 4, false)
	e.writes(f, name, "again", 0, true)
	e.reads(f, name, "again", 1)
}

func TestWhatSomebodyElseHasWrittenIsNamed(t *testing.T) {
	e := newEngine(t)
	f := e.folder()
	long := strings.Repeat("x", MaxDocument)
	e.writes(f, "trust", long, 0, true)
	e.reads(f, "trust", long, 1)
	version := 1
	for what, data := range map[string]map[string]any{
		"a number": {"note": 5}, "null": {"note": nil}, "a list": {"note": []string{"a"}}, "a map": {"note": map[string]any{"note": "a"}},
		"true": {"note": true}, "nothing": {}, "something else": {"text": "a"}, "empty": {"note": ""}, "too long": {"note": long + "x"},
	} {
		version++
		e.admin("data/signet/example.org/trust", map[string]any{"data": data})
		text, _, err := f.Read(t.Context(), "trust")
		if err == nil || text != nil || !strings.Contains(err.Error(), fmt.Sprintf("version %d of %s/data/signet/example.org/trust", version, e.config.Mount)) || len(err.Error()) > 600 {
			t.Errorf("%s: %.64q, %v", what, text, err)
		}
	}
	// What is larger than an entry of Vault's storage can't be there.
	if _, err := e.Root().Write(t.Context(), e.config.Mount+"/data/signet/example.org/trust", map[string]any{"data": map[string]any{"note": strings.Repeat("x", 1<<20)}}); err == nil {
		t.Error("Vault has taken more than 1 MiB")
	}
	must(t, e.Root().Delete(t.Context(), e.config.Mount+"/data/signet/example.org/trust"))
	e.reads(f, "trust", "", uint64(version))
	e.writes(f, "trust", "good", uint64(version), true)
}

func TestAnEngineThatIsNoneSaysSo(t *testing.T) {
	e := newEngine(t)
	v1 := e.config.Mount + "-v1"
	_, err := e.Root().Write(t.Context(), "sys/mounts/"+v1, map[string]any{"type": "kv", "options": map[string]any{"version": "1"}})
	must(t, err)
	for mount, want := range map[string]string{v1: "version 2", e.config.Mount + "-none": e.config.Mount + "-none/data/signet/example.org/trust"} {
		other := *e
		other.config.Mount = mount
		client, err := vault.New(vault.Config{Address: e.Address, CAFile: e.CAFile, Timeout: 30 * time.Second, Login: vault.Login{Method: "token", TokenFile: e.rootToken()}})
		must(t, err)
		t.Cleanup(client.Close)
		other.config.Vault = client
		f, err := New(other.config)
		must(t, err)
		_, written := f.Write(t.Context(), "trust", []byte("a"), 0)
		_, _, read := f.Read(t.Context(), "trust")
		for what, err := range map[string]error{"write": written, "read": read} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s at %s: %v", what, mount, err)
			}
		}
	}
}

func (e *engine) rootToken() string {
	file := filepath.Join(e.t.TempDir(), "root")
	must(e.t, os.WriteFile(file, []byte(e.RootToken), 0o600))
	return file
}

func TestATokenMayDoWhatIsNeededAndNoMore(t *testing.T) {
	e := newEngine(t)
	client, f := e.as("whole", Needs(e.config))
	missing, err := client.Missing(t.Context(), Needs(e.config))
	must(t, err)
	if len(missing) != 0 {
		t.Errorf("missing: %v", missing)
	}
	e.admin("data/signet/example.org/reports/west", map[string]any{"data": map[string]any{"note": "west"}})
	e.writes(f, "trust", "a", 0, true)
	e.writes(f, "trust", "b", 1, true)
	e.writes(f, "reports/east", "a", 0, true)
	e.writes(f, "reports/east", "b", 1, true)
	e.reads(f, "trust", "b", 2)
	e.reads(f, "reports/east", "b", 2)
	e.reads(f, "reports/west", "west", 1)
	for _, name := range []string{"reports/west", "reports/north", "other"} {
		if ok, err := f.Write(t.Context(), name, []byte("a"), 1); ok || !errors.Is(err, vault.ErrDenied) {
			t.Errorf("%s was written: %v", name, err)
		}
	}
	if _, _, err := f.Read(t.Context(), "reports/north"); !errors.Is(err, vault.ErrDenied) {
		t.Errorf("the report of nobody was read: %v", err)
	}
	if _, err := client.List(t.Context(), e.config.Mount+"/metadata/signet/example.org"); !errors.Is(err, vault.ErrDenied) {
		t.Errorf("the folder was listed: %v", err)
	}
}

func TestEachPermissionThatIsMissingIsNamed(t *testing.T) {
	e := newEngine(t)
	all := Needs(e.config)
	read := func(name string) func(*Folder) error {
		return func(f *Folder) error { _, _, err := f.Read(t.Context(), name); return err }
	}
	write := func(name string, upon uint64) func(*Folder) error {
		return func(f *Folder) error { _, err := f.Write(t.Context(), name, []byte("a"), upon); return err }
	}
	for i, n := range all {
		name := strings.TrimPrefix(n.Path, e.config.where(""))
		for _, capability := range n.Capabilities {
			needs := append([]vault.Need{}, all...)
			needs[i].Capabilities = nil
			for _, c := range n.Capabilities {
				if c != capability {
					needs[i].Capabilities = append(needs[i].Capabilities, c)
				}
			}
			if len(needs[i].Capabilities) == 0 {
				needs = append(needs[:i:i], needs[i+1:]...)
			}
			// create is for the first version only, update for the others.
			must(t, e.Root().Delete(t.Context(), e.config.Mount+"/metadata/signet/example.org/"+name))
			try := map[string]func(*Folder) error{"read": read(name), "create": write(name, 0), "update": write(name, 1)}[capability]
			if capability != "create" {
				e.admin("data/signet/example.org/"+name, map[string]any{"data": map[string]any{"note": "a"}})
			}
			client, f := e.as(fmt.Sprintf("%d-%s", i, capability), needs)
			err := try(f)
			if !errors.Is(err, vault.ErrDenied) || !strings.Contains(err.Error(), n.Path) || len(err.Error()) > 600 {
				t.Errorf("without %s of %s: %v", capability, n.Path, err)
			}
			missing, err := client.Missing(t.Context(), all)
			must(t, err)
			if len(missing) != 1 || missing[0].Path != n.Path || len(missing[0].Capabilities) != 1 || missing[0].Capabilities[0] != capability {
				t.Errorf("without %s of %s, missing is %+v", capability, n.Path, missing)
			}
		}
	}
}

// The last one: it seals the Vault of all.
func TestZWhileVaultIsAwayEveryCallSaysSo(t *testing.T) {
	e := newEngine(t)
	f := e.folder()
	e.writes(f, "trust", "a", 0, true)
	away := func(what string) {
		t.Helper()
		began := time.Now()
		_, _, read := f.Read(t.Context(), "trust")
		_, written := f.Write(t.Context(), "trust", []byte("b"), 1)
		for _, err := range []error{read, written} {
			var a interface{ Away() bool }
			if !errors.As(err, &a) || !a.Away() {
				t.Errorf("%s: %v", what, err)
			}
		}
		if took := time.Since(began); took > 2*vault.DefaultTimeout {
			t.Errorf("%s: it took %s to say so", what, took)
		}
	}
	must(t, e.Seal(t.Context()))
	away("sealed")
	must(t, e.Unseal(t.Context()))
	_, f = e.as("after", Needs(e.config))
	e.reads(f, "trust", "a", 1)
	e.Stop()
	away("stopped")
	must(t, e.Start(t.Context()))
	must(t, e.Unseal(t.Context()))
	_, f = e.as("again", Needs(e.config))
	e.reads(f, "trust", "a", 1)
	e.writes(f, "trust", "b", 1, true)
}
