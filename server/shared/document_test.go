package shared

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"math/big"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/mod/sumdb/note"

	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/rotation"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// root is a certificate; nothing here asks whether it is good for one.
type root struct{ cert *x509.Certificate }

func newRoot(t testing.TB) *root {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(1000 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &root{cert}
}

func (r *root) fingerprint() string { return ca.CertificateFingerprint(r.cert.Raw) }

func (r *root) id() string {
	f, err := ca.ParseFingerprint(r.fingerprint())
	if err != nil {
		panic(err)
	}
	return rotation.RootID(f[:])
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t testing.TB, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("error is %v\nwant one with %q", err, text)
	}
}

// rootOf is a root as the document has it.
func rootOf(r *root, stands Standing, decision uint64, by string) Root {
	x := Root{
		ID: r.id(), State: ca.Published, Leaving: stands != Believed, NotAfter: r.cert.NotAfter.UTC(), Fingerprint: r.fingerprint(),
		Certificate: string(ca.EncodeChain(r.cert)), Decision: decision, By: by,
	}
	if stands == Removed {
		x.State, x.Certificate = ca.Removed, ""
	}
	return x
}

func TestTheDocumentIsTakenOnlyAsAClusterWritesIt(t *testing.T) {
	a, b := newRoot(t), newRoot(t)
	good := Trust{TrustDomain: td.Name(), Cluster: "west", Roots: Join([]Root{rootOf(a, Believed, 1, "west"), rootOf(b, Removed, 2, "east")})}
	parse := func(s Trust) (Trust, error) {
		text, err := s.Encode()
		must(t, err)
		return parse([]byte(strings.TrimPrefix(text, title)), td, "west")
	}
	read, err := parse(good)
	must(t, err)
	if !slices.EqualFunc(read.Roots, good.Roots, Root.Equal) {
		t.Errorf("read: %+v", read.Roots)
	}
	at := func(id string) func(s *Trust) *Root {
		return func(s *Trust) *Root {
			return &s.Roots[slices.IndexFunc(s.Roots, func(r Root) bool { return r.ID == id })]
		}
	}
	rootA, rootB := at(a.id()), at(b.id())
	for what, bad := range map[string]struct {
		want   string
		change func(*Trust)
	}{
		"another trust domain":       {`of trust domain "other.org"`, func(s *Trust) { s.TrustDomain = "other.org" }},
		"another cluster":            {`of cluster "south"`, func(s *Trust) { s.Cluster = "south" }},
		"a certificate of another":   {`not the one of its fingerprint`, func(s *Trust) { rootA(s).Certificate = string(ca.EncodeChain(b.cert)) }},
		"two certificates":           {`not one certificate`, func(s *Trust) { rootA(s).Certificate += string(ca.EncodeChain(b.cert)) }},
		"no certificate":             {`needs a certificate`, func(s *Trust) { rootA(s).Certificate = "" }},
		"a long certificate":         {`bytes of PEM`, func(s *Trust) { rootA(s).Certificate = strings.Repeat("x", MaxCertificate+1) }},
		"a certificate of a removed": {`needs a certificate unless`, func(s *Trust) { rootB(s).Certificate = string(ca.EncodeChain(b.cert)) }},
		"another id":                 {`not of its fingerprint`, func(s *Trust) { rootA(s).ID = b.id() }},
		"no fingerprint":             {`fingerprint`, func(s *Trust) { rootA(s).Fingerprint = "" }},
		"a long id":                  {"not of its fingerprint", func(s *Trust) { rootA(s).ID = strings.Repeat("x", 100_000) }},
		"a state that is not shared": {`none of published`, func(s *Trust) { rootA(s).State = ca.Retired }},
		"no decision":                {`decision 0`, func(s *Trust) { rootA(s).Decision = 0 }},
		"too many decisions":         {`decision 9007199254740993`, func(s *Trust) { rootA(s).Decision = MaxDecisions + 1 }},
		"nobody's decision":          {`cluster name`, func(s *Trust) { rootA(s).By = "not a name" }},
		"no end":                     {`no end`, func(s *Trust) { rootA(s).NotAfter = time.Time{} }},
		"a root twice":               {`a root twice`, func(s *Trust) { s.Roots = append(s.Roots, s.Roots[0]) }},
	} {
		s := good
		s.Roots = slices.Clone(good.Roots)
		bad.change(&s)
		if _, err := parse(s); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%s: %v, want %q", what, err, bad.want)
		} else if len(err.Error()) > 900 {
			t.Errorf("%s: %d bytes of error", what, len(err.Error()))
		}
	}
}

// Roots are compared by what is said of them: so what says the same must be the same.
func TestWhatSaysTheSameIsReadAsTheSame(t *testing.T) {
	a, b := newRoot(t), newRoot(t)
	text, err := Trust{TrustDomain: td.Name(), Cluster: "west", Roots: Join([]Root{rootOf(a, Believed, 1, "west"), rootOf(b, Removed, 2, "east")})}.Encode()
	must(t, err)
	otherwise := Trust{TrustDomain: td.Name(), Cluster: "west", Roots: []Root{rootOf(a, Believed, 1, "west"), rootOf(b, Removed, 2, "east")}}
	for i := range otherwise.Roots {
		r := &otherwise.Roots[i]
		r.Fingerprint = strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(r.Fingerprint, "SHA256:"), ":", ""))
		r.Certificate = strings.ReplaceAll(r.Certificate, "\n", "\r\n")
		r.NotAfter = r.NotAfter.In(time.FixedZone("", 3600))
		r.Leaving = false
	}
	slices.SortFunc(otherwise.Roots, func(a, b Root) int { return strings.Compare(b.Fingerprint, a.Fingerprint) })
	body, err := json.Marshal(otherwise)
	must(t, err)
	read, err := parse(body, td, "west")
	must(t, err)
	if again, err := read.Encode(); err != nil || again != text {
		t.Errorf("%v\n%s\nwant\n%s", err, again, text)
	}
}

func TestNobodyWritesMoreThanIsRead(t *testing.T) {
	// Removed ones are the shortest, so more of them fit than are read.
	many := func(n int) Trust {
		s := Trust{TrustDomain: td.Name(), Cluster: "west"}
		for i := range n {
			f := ca.Fingerprint{byte(i >> 8), byte(i)}
			s.Roots = append(s.Roots, Root{ID: rotation.RootID(f[:]), State: ca.Removed, Leaving: true, NotAfter: time.Now().UTC(), Fingerprint: f.String(), Decision: 1, By: "west"})
		}
		return s
	}
	text, err := many(MaxRoots).Encode()
	must(t, err)
	read, err := parse([]byte(strings.TrimPrefix(text, title)), td, "west")
	must(t, err)
	if len(read.Roots) != MaxRoots {
		t.Errorf("of %d roots %d are read", MaxRoots, len(read.Roots))
	}
	_, err = many(MaxRoots + 1).Encode()
	wantError(t, err, "513 roots")
	body, err := json.Marshal(many(MaxRoots + 1))
	must(t, err)
	_, err = parse(body, td, "west")
	wantError(t, err, "513 roots")

	long := func(n int) Trust { return Trust{Roots: []Root{{Certificate: strings.Repeat("x", n)}}} }
	empty, err := long(0).Encode()
	must(t, err)
	room := MaxSize - (len(empty) - len(title) - 1) - len(`,
      "certificate": ""`)
	text, err = long(room).Encode()
	must(t, err)
	if len(text) != len(title)+MaxSize+1 {
		t.Errorf("%d bytes are written", len(text))
	}
	_, err = long(room + 1).Encode()
	wantError(t, err, fmt.Sprintf("%d bytes", MaxSize+1))
}

// writer is a cluster with the key of its log.
type writer struct {
	Writer
	origin string
	key    ed25519.PrivateKey
}

func newWriter(t testing.TB, cluster string) writer {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	origin := "example.org/" + cluster + "/server-1"
	vkey, err := note.NewEd25519VerifierKey(origin, pub)
	must(t, err)
	return writer{Writer{cluster, vkey}, origin, key}
}

func (w writer) sign(t testing.TB, text string) []byte {
	t.Helper()
	signed, err := audit.SignNote(w.origin, w.key, text)
	must(t, err)
	return signed
}

func TestOnlyWhatAWriterHasSignedIsRead(t *testing.T) {
	east, west, stranger := newWriter(t, "east"), newWriter(t, "west"), newWriter(t, "west")
	writers := []Writer{east.Writer, west.Writer}
	a := newRoot(t)
	said := Trust{TrustDomain: td.Name(), Cluster: "west", Roots: []Root{rootOf(a, Believed, 7, "north")}}
	text, err := said.Encode()
	must(t, err)
	good := west.sign(t, text)
	read, err := Open(good, td, writers)
	must(t, err)
	if read.Cluster != "west" || !slices.EqualFunc(read.Roots, said.Roots, Root.Equal) {
		t.Errorf("read: %+v", read)
	}
	for what, bad := range map[string]struct {
		signed []byte
		want   string
	}{
		"nothing":                  {nil, "not signed by"},
		"no signature":             {[]byte(text), "but by nobody: "},
		"a stranger's":             {stranger.sign(t, text), "but by " + strconv.Quote(stranger.origin) + ": if that is a cluster of yours, see to it that in each the rotation.peers name all the others"},
		"another writer's":         {east.sign(t, text), `of cluster "west", and signed by east`},
		"changed on its way":       {bytes.Replace(good, []byte(`"decision": 7`), []byte(`"decision": 8`), 1), "not signed by"},
		"cut":                      {good[:len(good)/2], "not signed by"},
		"something else":           {west.sign(t, "signet rotation report v1\n"+text), "no shared trust that this version reads"},
		"of a later version":       {west.sign(t, strings.Replace(text, " v1\n", " v2\n", 1)), "no shared trust that this version reads"},
		"no document":              {west.sign(t, title+"[]\n"), "it can't be read"},
		"more behind its end":      {west.sign(t, text+"{}\n"), "goes on behind its end"},
		"as long as can be":        {west.sign(t, title+strings.Repeat(" ", MaxSize)+"\n"), "it can't be read"},
		"longer":                   {bytes.Repeat([]byte("x"), MaxSize+4097), "at most"},
		"longer, signed by a peer": {west.sign(t, title+strings.Repeat(" ", MaxSize+4096)+"\n"), "at most"},
	} {
		if _, err := Open(bad.signed, td, writers); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%s: %v, want %q", what, err, bad.want)
		}
	}
	_, err = Open(good, spiffeid.RequireTrustDomainFromString("other.org"), writers)
	wantError(t, err, `of trust domain "example.org"`)
	_, err = Open(good, td, nil)
	wantError(t, err, "rotation.peers")
	// A newer version may say more.
	_, err = Open(west.sign(t, strings.Replace(text, `"by":`, `"why": "it was asked for", "by":`, 1)), td, writers)
	must(t, err)
}

// Clusters of different versions share the document, and a database outlives a version: what was signed and stored before is
// read now, and written so now. Files and key were made once; nobody has the key.
func TestWhatWasWrittenBeforeIsReadAndWrittenSo(t *testing.T) {
	const vkey = "example.org/west/server-1+5fb722e2+AY9tezYDPgZzuul1rR1WPi0+4rwtqMhIMybc/JoTr7DF"
	signed, err := os.ReadFile("testdata/trust.note")
	must(t, err)
	stored, err := os.ReadFile("testdata/replica.json")
	must(t, err)
	end := time.Date(2036, 5, 4, 3, 2, 1, 0, time.UTC)
	want := Replica{
		{Root{ID: "root-197478d9d4cc7d5b", State: ca.Published, Decision: 7, By: "west-2"}, Unknown},
		{Root{ID: "root-3d70d6f7a99d3824", State: ca.Active, Decision: 1, By: "east"}, Believed},
		{Root{ID: "root-9d9b983684d25e34", State: ca.Active, Leaving: true, Tainted: true, Decision: 2, By: "west"}, Leaving},
		{Root{ID: "root-da44cc0160911f03", State: ca.Removed, Leaving: true, Decision: MaxDecisions, By: "east"}, Removed},
	}
	s, err := Open(signed, td, []Writer{{"west", vkey}})
	must(t, err)
	if s.TrustDomain != "example.org" || s.Cluster != "west" || len(s.Roots) != len(want) {
		t.Fatalf("read: %+v", s)
	}
	for i, r := range s.Roots {
		der, err := r.DER()
		must(t, err)
		if r.State != ca.Removed && ca.CertificateFingerprint(der) != r.Fingerprint {
			t.Errorf("%s has the certificate of another", r.ID)
		}
		want[i].Fingerprint, want[i].Certificate, want[i].NotAfter = r.Fingerprint, r.Certificate, end
		if !r.Equal(want[i].Root) {
			t.Errorf("read: %+v\nwant %+v", r, want[i].Root)
		}
	}
	text, err := s.Encode()
	must(t, err)
	if before, _, _ := bytes.Cut(signed, []byte("\n\n")); text != string(before)+"\n" {
		t.Errorf("written:\n%s", text)
	}

	var known Replica
	must(t, json.Unmarshal(stored, &known))
	if !known.Equal(want) {
		t.Errorf("stored: %+v\nwant %+v", known, want)
	}
	again, err := json.Marshal(known)
	must(t, err)
	if string(again)+"\n" != string(stored) {
		t.Errorf("stored again:\n%s", again)
	}
}

func FuzzDocument(f *testing.F) {
	text, err := json.Marshal(Trust{TrustDomain: td.Name(), Cluster: "west", Roots: []Root{{
		ID: "root-0000000000000000", State: ca.Removed, Leaving: true, NotAfter: time.Unix(4e9, 0), Fingerprint: "SHA256:" + strings.Repeat("0", 64), Decision: 1, By: "west",
	}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	signed, err := os.ReadFile("testdata/trust.note")
	if err != nil {
		f.Fatal(err)
	}
	before, _, _ := bytes.Cut(signed, []byte("\n\n"))
	f.Add(bytes.TrimPrefix(before, []byte(title)))
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"roots":[{"certificate":"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		s, err := parse(body, td, "west")
		if err != nil {
			return
		}
		// What was taken can be written, and is the same when it is read again.
		again, err := s.Encode()
		if err != nil {
			t.Skip() // larger in our form
		}
		x, err := parse(bytes.TrimPrefix([]byte(again), []byte(title)), td, "west")
		if err != nil || !slices.EqualFunc(x.Roots, s.Roots, Root.Equal) {
			t.Errorf("%v: %+v\n%+v", err, s.Roots, x.Roots)
		}
		for _, r := range s.Roots {
			if der, err := r.DER(); err != nil || (der == nil) != (r.Standing() == Removed) {
				t.Errorf("%s is %s, and its certificate has %d bytes: %v", r.ID, r.Standing(), len(der), err)
			}
		}
	})
}
