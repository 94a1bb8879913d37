//go:build real

package e2e

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/test/lab"
)

// shares is what the clusters of an estate have in KV.
const shares = "signet/" + lab.TrustDomain + "/"

func (e *estate) kvPath(name string) string { return "kv-" + e.name + "/data/" + shares + name }

// shared is the newest text of a document, "" for none.
func (e *estate) shared(t *testing.T, name string) string {
	t.Helper()
	a, err := e.vault.Root().Read(t.Context(), e.kvPath(name))
	if lab.VaultStatus(err) == 404 {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	data, _ := a.Data["data"].(map[string]any)
	note, _ := data["note"].(string)
	return note
}

// put writes into KV, as anybody could who may.
func (e *estate) put(t *testing.T, name string, data map[string]any) {
	t.Helper()
	if _, err := e.vault.Root().Write(t.Context(), e.kvPath(name), map[string]any{"data": data}); err != nil {
		t.Fatal(err)
	}
}

func note(text string) map[string]any { return map[string]any{"note": text} }

// drop deletes a document, with all its versions and their number if that is wanted.
func (e *estate) drop(t *testing.T, name string, wholly bool) {
	t.Helper()
	path := e.kvPath(name)
	if wholly {
		path = strings.Replace(path, "/data/", "/metadata/", 1)
	}
	if err := e.vault.Root().Delete(t.Context(), path); err != nil {
		t.Fatal(err)
	}
}

// pairOf makes two clusters that know each other.
func (e *estate) pairOf(t *testing.T) (east, west *holding) {
	t.Helper()
	keys := map[string]string{}
	for _, name := range []string{"east", "west"} {
		x := e.cluster(t, name, how{})
		var shown struct {
			Key string `json:"log_verifier_key"`
		}
		if err := json.Unmarshal([]byte(e.must(t, "cluster", "show", "--config", x.Config(), "-o", "json")), &shown); err != nil {
			t.Fatal(err)
		}
		keys[name] = shown.Key
		if name == "east" {
			east = x
		} else {
			west = x
		}
	}
	for _, x := range []*holding{east, west} {
		other := "east"
		if x == east {
			other = "west"
		}
		x.how.peers = fmt.Sprintf("  peers: [ { cluster: %s, log_verifier_key: %q } ]\n", other, keys[other])
		x.configure(t)
	}
	return east, west
}

func rootIDOf(r *lab.VaultRoot) string {
	sum := sha256.Sum256(r.Certificate.Raw)
	return rotation.RootID(sum[:])
}

// trusts is nil when a cluster believes these roots and no others.
func (x *holding) trusts(t *testing.T, want ...string) error {
	all, err := x.of.authorities(t.Context(), x.Cluster)
	if err != nil {
		return err
	}
	var got []string
	for _, a := range all {
		if a.Kind == ca.KindRoot && a.State != string(ca.Removed) {
			if a.Leaving != nil || a.Tainted != nil {
				return fmt.Errorf("in %s %s is leaving since %v, tainted since %v", x.Name, a.ID, a.Leaving, a.Tainted)
			}
			got = append(got, a.ID)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		return fmt.Errorf("%s trusts %v, and %v were decided", x.Name, got, want)
	}
	return nil
}

// TestWhatIsSharedInVaultCanBeWithheldAndNoMore has somebody at work who may write in KV, and one who changes what is read.
func TestWhatIsSharedInVaultCanBeWithheldAndNoMore(t *testing.T) {
	t.Parallel()
	e := newEstate(t, "shared")
	east, west := e.pairOf(t)
	both := []*holding{east, west}
	for _, x := range both {
		x.begin(t)
	}
	for _, x := range both {
		x.ready(t)
		x.mended(t)
	}
	a, b := e.root, e.newRoot(t, "root-2")
	ids := []string{rootIDOf(a), rootIDOf(b)}
	until(t, "the first document", time.Minute, func() error {
		if e.shared(t, "trust") == "" || e.shared(t, "reports/east") == "" || e.shared(t, "reports/west") == "" {
			return errors.New("not yet")
		}
		return nil
	})
	first, firstReport := e.shared(t, "trust"), e.shared(t, "reports/east")
	// One decision, in one cluster: another root is believed.
	e.write(t, "root-2.pem", b.PEM)
	e.must(t, "trust", "add", "--config", east.Config(), "root-2.pem", "--fingerprint", ca.CertificateFingerprint(b.Certificate.Raw))
	holds := func(what string) {
		t.Helper()
		for _, x := range both {
			if err := x.trusts(t, slices.Clone(ids)...); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	until(t, "the decision is followed", time.Minute, func() error { return west.trusts(t, slices.Clone(ids)...) })
	holds("at first")
	second := e.shared(t, "trust")
	whole := func() error {
		if text := e.shared(t, "trust"); !strings.Contains(text, ids[0]) || !strings.Contains(text, ids[1]) {
			return errors.New("the document lacks a root")
		}
		return nil
	}

	// A cluster that nobody here knows, with a root of its own.
	foreign := newEstate(t, "foreign")
	north := foreign.cluster(t, "north", how{})
	north.serve(t)
	until(t, "a foreign document", time.Minute, func() error {
		if foreign.shared(t, "trust") == "" {
			return errors.New("not yet")
		}
		return nil
	})

	t.Run("what is gone or old is written again", func(t *testing.T) {
		for what, harm := range map[string]func(){
			"older":             func() { e.put(t, "trust", note(first)) },
			"deleted":           func() { e.drop(t, "trust", false) },
			"deleted wholly":    func() { e.drop(t, "trust", true) },
			"no report":         func() { e.drop(t, "reports/east", true); e.drop(t, "reports/west", false) },
			"an old report":     func() { e.put(t, "reports/east", note(firstReport)) },
			"another's report":  func() { e.put(t, "reports/west", note(firstReport)) },
			"a report of noise": func() { e.put(t, "reports/west", note("noise")) },
		} {
			harm()
			until(t, what+", and then whole", time.Minute, func() error {
				if err := whole(); err != nil {
					return err
				}
				for _, c := range []string{"east", "west"} {
					if r := e.shared(t, "reports/"+c); r == "noise" || r == firstReport || !strings.Contains(r, "— example.org/"+c) {
						return fmt.Errorf("the report of %s is %.60q", c, r)
					}
				}
				return nil
			})
			holds(what)
		}
		for _, x := range both {
			x.mended(t)
		}
	})

	t.Run("what nobody of them has signed is named, and neither followed nor replaced", func(t *testing.T) {
		for _, bad := range []struct {
			what string
			data map[string]any
			says string
		}{
			{"noise", note("noise"), "not signed"},
			{"no text", map[string]any{"trust": "me"}, "was not written by a Signet server"},
			{"too much", note(strings.Repeat("x", 700<<10)), "at most"},
			{"a report", note(e.shared(t, "reports/east")), "is no shared trust"},
			{"a foreign document", note(foreign.shared(t, "trust")), "not signed"},
			{"one word changed", note(strings.Replace(second, `"leaving": false`, `"leaving": true `, 1)), "not signed"},
			{"half of it", note(second[:len(second)/2]), "not signed"},
		} {
			e.put(t, "trust", bad.data)
			for _, x := range both {
				x.impaired(t, bad.what, func(f check.Finding) bool {
					return f.Code == check.CodeShared && f.About == "trust" && strings.Contains(f.Message, bad.says)
				})
			}
			holds(bad.what)
			if r := e.run(t, "check", "--config", west.Config()); !strings.Contains(r.out, bad.says) {
				t.Errorf("%s: check does not say %q: %v", bad.what, bad.says, r)
			}
			if text := e.shared(t, "trust"); text == second {
				t.Errorf("%s was replaced", bad.what)
			}
			e.drop(t, "trust", false)
			until(t, bad.what+" is repaired", time.Minute, whole)
			for _, x := range both {
				x.mended(t)
			}
			holds(bad.what + ", repaired")
		}
	})

	t.Run("on the way to one cluster", func(t *testing.T) {
		body := func(text string) lab.Fault {
			return lab.Fault{Rewritten: func(body []byte) []byte {
				var answer map[string]any
				if json.Unmarshal(body, &answer) != nil {
					return body
				}
				data, _ := answer["data"].(map[string]any)
				if data == nil || data["data"] == nil { // the answer to a write
					return body
				}
				data["data"] = note(text)
				out, _ := json.Marshal(answer)
				return out
			}}
		}
		for _, bad := range []struct {
			what, document string
			fault          lab.Fault
			says           string
		}{
			{"an older document for ever", "trust", body(first), ""},
			{"the trust in a report's place", "reports/east", body(second), "report of cluster east"},
			{"its own report in the other's place", "reports/east", body(e.shared(t, "reports/west")), "report of cluster east"},
			{"a report in the trust's place", "trust", body(firstReport), "no shared trust"},
			{"too much", "trust", lab.Fault{Oversized: 3 << 20}, "larger than 1 MiB"},
			{"another's trust", "trust", body(foreign.shared(t, "trust")), "not signed"},
		} {
			west.proxy.Set(e.kvPath(bad.document), bad.fault)
			if bad.says == "" {
				time.Sleep(2 * time.Second) // several rounds
			} else {
				west.impaired(t, bad.what, func(f check.Finding) bool {
					return f.Code == check.CodeShared && f.About == bad.document && strings.Contains(f.Message, bad.says)
				})
			}
			holds(bad.what)
			west.proxy.Clear()
			west.mended(t)
			until(t, bad.what+" is over", time.Minute, whole)
			holds(bad.what + ", over")
		}
	})
	for _, x := range both {
		e.must(t, "log", "verify", "--config", x.Config())
	}
}
