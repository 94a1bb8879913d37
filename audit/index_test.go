package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"database/sql"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
)

// mixed is one entry of each kind, and some certificates.
func mixed(t testing.TB) ([]*auditv1.Entry, []*x509.Certificate) {
	certs := []*x509.Certificate{
		certificate(t, 0x0abc, "spiffe://example.org/ns/shop/sa/frontend"),
		certificate(t, 0x1f2e3d, "spiffe://example.org/ns/shop/sa/backend"),
		certificate(t, 0xff01, "spiffe://example.org/ns/shop/sa/frontend"),
		certificate(t, 77, "spiffe://example.org"),
	}
	at := func(m int) int64 { return testTime.Add(time.Duration(m) * time.Minute).UnixNano() }
	return []*auditv1.Entry{
		{Time: at(0), Event: &auditv1.Entry_AuthorityCreated{AuthorityCreated: &auditv1.AuthorityCreated{Kind: "root", Tbs: certs[3].RawTBSCertificate}}},
		{Time: at(1), Event: &auditv1.Entry_AuthorityInstalled{AuthorityInstalled: &auditv1.AuthorityInstalled{Kind: "root", Chain: [][]byte{certs[3].Raw}}}},
		{Time: at(2), Event: &auditv1.Entry_RegistrationChanged{RegistrationChanged: &auditv1.RegistrationChanged{Before: `{"name":"frontend"}`, Revision: 1, Evidence: &auditv1.Evidence{Caller: "uid:0", Door: "admin"}}}},
		{Time: at(3), Event: &auditv1.Entry_JoinTokenCreated{JoinTokenCreated: &auditv1.JoinTokenCreated{TokenId: "t", Agent: "node-1"}}},
		{Time: at(4), Event: &auditv1.Entry_JoinTokenUsed{JoinTokenUsed: &auditv1.JoinTokenUsed{TokenId: "t", Agent: "node-1"}}},
		{Time: at(5), Event: &auditv1.Entry_AgentEnrolled{AgentEnrolled: &auditv1.AgentEnrolled{Agent: "node-1"}}},
		issued(testTime.Add(6*time.Minute), certs[0], "node-1"),
		issued(testTime.Add(7*time.Minute), certs[1], "node-2"),
		issued(testTime.Add(8*time.Minute), certs[2], "node-1"),
		{Time: at(9), Event: &auditv1.Entry_JoinTokenRevoked{JoinTokenRevoked: &auditv1.JoinTokenRevoked{TokenId: "t"}}},
		{Time: at(10), Event: &auditv1.Entry_AgentBanned{AgentBanned: &auditv1.AgentBanned{Agent: "node-3"}}},
		{Time: at(11), Event: &auditv1.Entry_AgentUnbanned{AgentUnbanned: &auditv1.AgentUnbanned{Agent: "node-3"}}},
		{Time: at(12), Event: &auditv1.Entry_AuthorityChanged{AuthorityChanged: &auditv1.AuthorityChanged{Authority: "intermediate-2", To: "active"}}},
		{Time: at(13), Event: &auditv1.Entry_IdentityBanned{IdentityBanned: &auditv1.IdentityBanned{SpiffeId: "spiffe://example.org/ns/bad/sa/one"}}},
		{Time: at(14), Event: &auditv1.Entry_IdentityUnbanned{IdentityUnbanned: &auditv1.IdentityUnbanned{SpiffeId: "spiffe://example.org/ns/bad/sa/one"}}},
		{Time: at(15), Event: &auditv1.Entry_AuthorityRequested{AuthorityRequested: &auditv1.AuthorityRequested{Authority: "intermediate-3", PublicKey: certs[3].RawSubjectPublicKeyInfo, Upstream: "Vault", Root: "root-1"}}},
		{Time: at(16), Event: &auditv1.Entry_PeerReported{PeerReported: &auditv1.PeerReported{Cluster: "west", Made: at(15), Says: []string{"root-1 is believed"}}}},
	}, certs
}

func places(found []Found) []uint64 {
	list := []uint64{}
	for _, f := range found {
		list = append(list, f.Index)
	}
	return list
}

func find(t testing.TB, r *Reader, q Query) []uint64 {
	t.Helper()
	found, err := r.Find(t.Context(), q)
	if err != nil {
		t.Fatalf("%+v: %v", q, err)
	}
	return places(found)
}

func TestEntriesAreFoundByWhatTheySay(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, testConfig(dir, testKey(t)))
	entries, certs := mixed(t)
	add(t, l, entries...)
	awaitSize(t, l, uint64(len(entries)))
	for _, indexPath := range []string{"", filepath.Join(t.TempDir(), "odd name?#%.db")} {
		r := reader(t, dir, l.VerifierKey())
		r.KeepIndex(indexPath)
		for name, tc := range map[string]struct {
			q    Query
			want []uint64
		}{
			"all":               {Query{}, []uint64{16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0}},
			"limit":             {Query{Limit: 2}, []uint64{16, 15}},
			"serial":            {Query{Serial: "0abc"}, []uint64{6}},
			"serial of a CA":    {Query{Serial: "4d"}, []uint64{1, 0}},
			"SPIFFE ID":         {Query{SPIFFEID: "spiffe://example.org/ns/shop/sa/frontend"}, []uint64{8, 6}},
			"not a prefix":      {Query{SPIFFEID: "spiffe://example.org/ns/shop"}, []uint64{}},
			"agent":             {Query{Agent: "node-1"}, []uint64{8, 6, 5, 4, 3}},
			"banned identity":   {Query{SPIFFEID: "spiffe://example.org/ns/bad/sa/one"}, []uint64{14, 13}},
			"kind":              {Query{Kind: "certificate-issued"}, []uint64{8, 7, 6}},
			"agent and kind":    {Query{Agent: "node-1", Kind: "agent-enrolled"}, []uint64{5}},
			"since is included": {Query{Since: testTime.Add(8 * time.Minute)}, []uint64{16, 15, 14, 13, 12, 11, 10, 9, 8}},
			"until is not":      {Query{Until: testTime.Add(time.Minute)}, []uint64{0}},
			"a window":          {Query{Since: testTime.Add(3 * time.Minute), Until: testTime.Add(5 * time.Minute)}, []uint64{4, 3}},
			"registration":      {Query{Registration: "frontend"}, []uint64{8, 7, 6, 2}},
			"token":             {Query{Token: "t"}, []uint64{9, 4, 3}},
			"token and agent":   {Query{Token: "t", Agent: "node-1"}, []uint64{4, 3}},
			"nothing":           {Query{Agent: "node-9"}, []uint64{}},
			"a quote":           {Query{Agent: "' OR 1=1 --"}, []uint64{}},
		} {
			if got := find(t, r, tc.q); !slices.Equal(got, tc.want) {
				t.Errorf("%s: %v, want %v", name, got, tc.want)
			}
		}
		found, err := r.Find(t.Context(), Query{Serial: "1f2e3d"})
		if err != nil || len(found) != 1 {
			t.Fatal(found, err)
		}
		f := found[0]
		if f.Facts.SPIFFEID != "spiffe://example.org/ns/shop/sa/backend" || f.Facts.Agent != "node-2" || !f.Facts.NotAfter.Equal(certs[1].NotAfter) ||
			!f.Facts.Time.Equal(testTime.Add(7*time.Minute)) || f.Facts.Evidence.GetRegistration() != "frontend" || !Covers(f.Entry, certs[1]) || Covers(f.Entry, certs[0]) {
			t.Errorf("%+v", f)
		}
		p, err := r.Prove(t.Context(), f.Index)
		if err != nil {
			t.Fatal(err)
		}
		if err := VerifyProof(p, f.Raw, l.VerifierKey()); err != nil {
			t.Error(err)
		}
	}
}

func TestEveryKindHasAName(t *testing.T) {
	entries, certs := mixed(t)
	seen := map[string]bool{}
	for _, e := range entries {
		f, err := FactsOf(e)
		if err != nil {
			t.Error(err)
		}
		seen[f.Kind] = true
	}
	for _, k := range Kinds() {
		if !seen[k] {
			t.Errorf("no entry of kind %s is tested", k)
		}
	}
	if !Covers(entries[0], certs[3]) || !Covers(entries[1], certs[3]) || Covers(entries[3], certs[3]) || Covers(entries[0], certs[0]) {
		t.Error("an authority's entry does not cover its certificate alone")
	}
	if f, err := FactsOf(&auditv1.Entry{Time: 1}); err != nil || f.Kind != unknownKind {
		t.Errorf("of a newer version: %+v, %v", f, err)
	}
	broken := issued(testTime, certs[0], "node-1")
	broken.GetCertificateIssued().Tbs[0] ^= 1
	if f, err := FactsOf(broken); err == nil || f.Agent != "node-1" || f.Kind != "certificate-issued" {
		t.Errorf("with a broken certificate: %+v, %v", f, err)
	}
}

// An auditor compares what an authority above has signed with what it was asked for, by the key.
func TestARequestAndItsCertificateHaveOneKey(t *testing.T) {
	entries, certs := mixed(t)
	sum := sha256.Sum256(certs[3].RawSubjectPublicKeyInfo)
	for _, i := range []int{0, 1, 15} {
		f, err := FactsOf(entries[i])
		if err != nil || f.KeySHA256 != hex.EncodeToString(sum[:]) {
			t.Errorf("%s: key %q, %v", f.Kind, f.KeySHA256, err)
		}
	}
	if f, err := FactsOf(entries[15]); err != nil || f.Authority != "intermediate-3" || f.Change != "asked of Vault under root-1" {
		t.Errorf("%+v, %v", f, err)
	}
	if f, err := FactsOf(entries[10]); err != nil || f.KeySHA256 != "" {
		t.Errorf("a ban has the key %q, %v", f.KeySHA256, err)
	}
}

func TestSerialsAreReadAsPeopleWriteThem(t *testing.T) {
	for in, want := range map[string]string{
		"0abc": "0abc", "abc": "0abc", "0A:BC": "0abc", "0x0ABC": "0abc", "00:00:0a:bc": "0abc", " 0abc\n": "0abc",
	} {
		if got, err := ParseSerial(in); err != nil || got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "xyz", ":", "0x", "-1", string(bytes.Repeat([]byte("1"), 1000))} {
		if got, err := ParseSerial(in); err == nil {
			t.Errorf("%q: %q", in, got)
		}
	}
}

func TestAnIndexFollowsItsLog(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, testConfig(dir, testKey(t)))
	r := reader(t, dir, l.VerifierKey())
	r.KeepIndex(filepath.Join(t.TempDir(), "index.db"))
	n := 0
	for _, batch := range []int{0, 1, 2, 300, 1, 600} {
		add(t, l, events(n, batch)...)
		n += batch
		awaitSize(t, l, uint64(n))
		if got := find(t, r, Query{}); len(got) != n {
			t.Fatalf("%d entries found of %d", len(got), n)
		}
	}
}

func TestABigLogIsIndexedInSteps(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, testConfig(dir, testKey(t)))
	const n = indexChunk + 1000
	for i := 0; i < n; i += 4000 {
		add(t, l, events(i, min(4000, n-i))...)
	}
	awaitSize(t, l, n)
	r := reader(t, dir, l.VerifierKey())
	if got := find(t, r, Query{Agent: "node-0"}); len(got) != (n+2)/3 {
		t.Errorf("%d found", len(got))
	}
}

func TestABrokenIndexIsMadeAnew(t *testing.T) {
	dir, vkey := finished(t, 300)
	otherDir, otherKey := finished(t, 400)
	path := filepath.Join(t.TempDir(), "index.db")
	ask := func(dir, vkey string) []uint64 {
		t.Helper()
		r, err := OpenReader(dir, vkey)
		if err != nil {
			t.Fatal(err)
		}
		r.KeepIndex(path)
		got := find(t, r, Query{Agent: "node-1"})
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		return got
	}
	want := ask(dir, vkey)
	if len(want) != 100 {
		t.Fatalf("%d found", len(want))
	}
	exec := func(statement string) func() {
		return func() {
			t.Helper()
			db, err := sql.Open("sqlite", path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := db.Exec(statement); err != nil {
				t.Fatal(err)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, breakIt := range map[string]func(){
		"deleted":       func() { _ = removeIndex(path) },
		"garbage":       func() { rewrite(t, path, func(b []byte) []byte { return bytes.Repeat([]byte("x"), len(b)) }) },
		"cut":           func() { _ = os.Truncate(path, 5000) },
		"empty":         func() { _ = os.Truncate(path, 0) },
		"another log's": func() { _ = removeIndex(path); ask(otherDir, otherKey) },
		"other tables":  exec("DROP TABLE entries; CREATE TABLE entries (x)"),
		"other version": exec("UPDATE progress SET version = '0'"),
		"ahead":         exec("UPDATE progress SET size = size + 1"),
		"odd nodes":     exec("UPDATE progress SET nodes = x'00'"),
		"other nodes":   exec("UPDATE progress SET nodes = zeroblob(length(nodes))"),
		"behind":        exec("UPDATE progress SET size = 0, nodes = x''"),
		"wrong rows":    exec("UPDATE entries SET agent = 'node-1' WHERE i = 0"),
	} {
		t.Run(name, func(t *testing.T) {
			breakIt()
			if got := ask(dir, vkey); !slices.Equal(got, want) {
				t.Errorf("%d found, want %d", len(got), len(want))
			}
			if _, err := os.Stat(path); err != nil {
				t.Errorf("the index was not kept: %v", err)
			}
		})
	}
}

func TestAnIndexThatIsAheadOfACopyIsMadeAnew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, testConfig(dir, testKey(t)))
	add(t, l, events(0, 5)...)
	awaitSize(t, l, 5)
	older := duplicate(t, dir)
	add(t, l, events(5, 5)...)
	awaitSize(t, l, 10)
	path := filepath.Join(t.TempDir(), "index.db")
	for dir, want := range map[string]int{dir: 10, older: 5} {
		r := reader(t, dir, l.VerifierKey())
		r.KeepIndex(path)
		if got := find(t, r, Query{}); len(got) != want {
			t.Errorf("%d found, want %d", len(got), want)
		}
	}
}

func TestADamagedLogGivesNoAnswer(t *testing.T) {
	dir, vkey := finished(t, 300)
	path := filepath.Join(t.TempDir(), "index.db")
	rewrite(t, filepath.Join(dir, "tile/entries/000"), func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
	r := reader(t, dir, vkey)
	r.KeepIndex(path)
	if found, err := r.Find(t.Context(), Query{Agent: "nobody"}); !errors.Is(err, ErrDamaged) {
		t.Errorf("%v, %v", found, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Find(ctx, Query{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestSeveralReadersShareOneIndex(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, testConfig(dir, testKey(t)))
	path := filepath.Join(t.TempDir(), "index.db")
	var wg sync.WaitGroup
	for range 4 {
		r := reader(t, dir, l.VerifierKey())
		r.KeepIndex(path)
		wg.Go(func() {
			last := 0
			for last < 1000 {
				found, err := r.Find(t.Context(), Query{})
				if err != nil || len(found) < last {
					t.Errorf("%d found after %d: %v", len(found), last, err)
					return
				}
				last = len(found)
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.indexPath == "" {
				t.Error("gave up the file")
			}
		})
	}
	for i := range 10 {
		add(t, l, events(i*100, 100)...)
	}
	wg.Wait()
}

func TestAnIndexThatSomebodyElseMakesIsWaitedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index.db")
	maker, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer maker.Close()
	maker.SetMaxOpenConns(1)
	if _, err := maker.Exec("BEGIN IMMEDIATE"); err != nil {
		t.Fatal(err)
	}
	opened := make(chan error, 1)
	go func() {
		ix, err := openIndex(t.Context(), path)
		opened <- errors.Join(err, ix.close())
	}()
	select {
	case err := <-opened:
		t.Fatalf("nobody was waited for: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	if _, err := maker.Exec("ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err != nil {
		t.Error(err)
	}
}

func FuzzEntry(f *testing.F) {
	entries, _ := mixed(f)
	for _, e := range entries {
		raw, err := marshal(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		_, facts := read(raw)
		if c := facts.Certificate; c != nil {
			e, err := DecodeEntry(raw)
			if err != nil {
				t.Fatal(err)
			}
			if e.GetCertificateIssued() != nil && !Covers(e, c) {
				t.Fatal("the certificate made of a to-be-signed one has another")
			}
			if s, err := ParseSerial(facts.Serial); facts.Serial != "" && (err != nil || s != facts.Serial) {
				t.Fatalf("serial %q reads as %q, %v", facts.Serial, s, err)
			}
		}
		if facts.Kind != unknownKind && !slices.Contains(Kinds(), facts.Kind) {
			t.Fatalf("kind %q", facts.Kind)
		}
	})
}
