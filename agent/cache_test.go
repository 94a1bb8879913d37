package agent

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/sds"
	"github.com/signet-ca/signet/test/bubble"
)

// passphrase is a seal of a test.
type passphrase string

func (p passphrase) Passphrase(context.Context) ([]byte, error) { return []byte(p), nil }

func aMember(agent string) *member {
	return &member{enrolment: enrolment{Agent: agent, Cluster: "east", TrustDomain: td.Name()}, td: td}
}

func mustCache(t testing.TB, dir string, seal keystore.Passphrase, agent string) *cache {
	t.Helper()
	c, err := newCache(t.Context(), dir, seal, aMember(agent), 1, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// filled makes a cache of certificates for these registrations by way of a hub, and says what they are.
func filled(t *testing.T, w *world, dir string, list ...identity.Registration) map[string]*held {
	t.Helper()
	d := newDoorless(t, w, list...)
	c := mustCache(t, dir, passphrase("one"), "node-1")
	d.restore(c)
	out := map[string]*held{}
	for _, r := range list {
		key := newKey(t)
		chain := w.mesh.leaf(t, r.ID, key.Public(), w.now().Add(-time.Minute), w.now().Add(r.TTL))
		got, err := d.verify(r.ID, chain, key, w.now())
		if err != nil {
			t.Fatal(err)
		}
		out[r.Name] = got
		if err := c.write(t.Context(), r.Name, got); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// restored is what a hub that begins on the folder has in use, by registration.
func restored(t testing.TB, w *world, dir string, list ...identity.Registration) map[string]*sds.SVID {
	t.Helper()
	d := newDoorless(t, w, list...)
	d.restore(mustCache(t, dir, passphrase("one"), "node-1"))
	out := map[string]*sds.SVID{}
	for name, e := range d.entries {
		out[name] = e.current.svid
	}
	return out
}

// The server goes away right after a certificate was issued and stays away for 90 % of its life and more; the agent
// restarts again and again. Its workloads have what they had, to the second of its end, and a new one soon after the return.
func TestNoIdentityIsLostOverRestartsWhileTheServerIsAway(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		const life = 24 * time.Hour
		w := newWorld(t)
		dir := filepath.Join(t.TempDir(), "cache")
		list := []identity.Registration{reg("a", "/a", life, "unix:uid:1"), reg("b", "/b", life, "unix:uid:2")}
		var away atomic.Bool
		// process is one life of the agent.
		process := func(f func(d *doorless)) {
			d := newDoorless(t, w, list...)
			d.away.Store(away.Load())
			c := mustCache(t, dir, passphrase("one"), "node-1")
			d.restore(c)
			ctx, cancel := context.WithCancel(t.Context())
			go d.run(ctx)
			go c.run(ctx, d.inUse)
			f(d)
			cancel()
			synctest.Wait()
		}
		var first [2]*sds.SVID
		process(func(d *doorless) {
			first[0], first[1] = await(t, d.mustOpen(t, "unix:uid:1")), await(t, d.mustOpen(t, "unix:uid:2"))
			time.Sleep(time.Second)
		})
		away.Store(true)
		for n := 0; time.Until(first[0].NotAfter) > life/50; n++ {
			process(func(d *doorless) {
				// The first renewal time passes while nobody is there.
				if n%3 == 2 {
					time.Sleep(life / 50)
				}
				for i, u := range []identity.Selector{"unix:uid:1", "unix:uid:2"} {
					v := d.mustOpen(t, u)
					if s := v.SVID(v.Identities()[0]); s == nil || s.Serial != first[i].Serial || !bytes.Equal(s.PrivateKey, first[i].PrivateKey) || s.Digest != first[i].Digest {
						t.Fatalf("restart %d, %s before the end: %v, want %v", n, time.Until(first[i].NotAfter), s, first[i])
					}
				}
				if d.inUse("a").renewAt.Before(time.Now()) && d.calls.Load() == 0 {
					time.Sleep(time.Minute)
					if d.calls.Load() == 0 {
						t.Fatal("what is due is not asked for")
					}
				}
				time.Sleep(life / 50)
			})
		}
		process(func(d *doorless) {
			v := d.mustOpen(t, "unix:uid:1")
			time.Sleep(time.Until(first[0].NotAfter))
			if v.SVID(first[0].ID) == nil {
				t.Fatal("withheld in its last second")
			}
			time.Sleep(2 * time.Second)
			if v.SVID(first[0].ID) != nil {
				t.Fatal("an expired certificate is served")
			}
			away.Store(false)
			d.away.Store(false)
			if s := await(t, v); s.Serial == first[0].Serial {
				t.Fatal("the old one again")
			}
			if late := time.Since(first[0].NotAfter); late > 10*time.Second {
				t.Fatalf("%s until a waiting workload got its certificate", late)
			}
			time.Sleep(time.Second)
		})
		// The expired one of the other is not served, and its file is gone.
		process(func(d *doorless) {
			v := d.mustOpen(t, "unix:uid:2")
			if s := v.SVID(first[1].ID); s != nil {
				t.Fatalf("served: %v", s)
			}
		})
	})
}

func TestADamagedCacheFileIsFoundAndNeverServed(t *testing.T) {
	w, dir := newWorld(t), filepath.Join(t.TempDir(), "cache")
	r := reg("web", "/web", time.Hour, uid)
	filled(t, w, dir, r)
	path := filepath.Join(dir, "web"+sealedSuffix)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	try := func(what string, n int, content []byte) {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		d := newDoorless(t, w, r)
		c := mustCache(t, dir, passphrase("one"), "node-1")
		d.restore(c)
		if len(d.entries) != 0 {
			t.Fatalf("%s at %d of %d bytes: served", what, n, len(whole))
		}
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("%s at %d: the file is still there", what, n)
		}
	}
	for i := range whole {
		flipped := bytes.Clone(whole)
		flipped[i] ^= 1 << (i % 8)
		try("flipped", i, flipped)
		try("torn", i, whole[:i])
	}
	try("longer", len(whole), append(bytes.Clone(whole), 0))
	try("too long", maxSealedFile, append(bytes.Clone(whole), make([]byte, maxSealedFile)...))
	// The check can be passed.
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := restored(t, w, dir, r); len(got) != 1 {
		t.Fatalf("the whole file: %v", got)
	}
}

func TestADamagedDataKeyCostsTheCacheAndNothingElse(t *testing.T) {
	w, dir := newWorld(t), filepath.Join(t.TempDir(), "cache")
	r := reg("web", "/web", time.Hour, uid)
	filled(t, w, dir, r)
	keyPath, filePath := filepath.Join(dir, dataKeyFile), filepath.Join(dir, "web"+sealedSuffix)
	key, err := os.ReadFile(keyPath)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(filePath)
	if err != nil {
		t.Fatal(err)
	}
	for i := range key {
		flipped := bytes.Clone(key)
		flipped[i] ^= 1 << (i % 7)
		for what, content := range map[string][]byte{"flipped": flipped, "torn": key[:i]} {
			if err := errors.Join(os.WriteFile(keyPath, content, 0o600), os.WriteFile(filePath, file, 0o600)); err != nil {
				t.Fatal(err)
			}
			got := restored(t, w, dir, r)
			// JSON has bytes that mean nothing: white space, the padding of base64. What it opens is then the same key.
			if s := got["web"]; s != nil && !sameDataKey(key, content) {
				t.Fatalf("data key %s at byte %d: served", what, i)
			}
		}
	}
	if err := errors.Join(os.Remove(keyPath), os.WriteFile(filePath, file, 0o600)); err != nil {
		t.Fatal(err)
	}
	if got := restored(t, w, dir, r); len(got) != 0 {
		t.Fatalf("a new data key opened an old file: %v", got)
	}
}

func sameDataKey(a, b []byte) bool {
	var x, y storedDataKey
	return jsonInto(a, &x) && jsonInto(b, &y) && bytes.Equal(x.Salt, y.Salt) && bytes.Equal(x.Sealed, y.Sealed) && x.Version == y.Version
}

func TestCacheFilesOpenOnlyWhereTheyWereWritten(t *testing.T) {
	w, base := newWorld(t), t.TempDir()
	dir, other := filepath.Join(base, "cache"), filepath.Join(base, "other")
	a, b := reg("a", "/a", time.Hour, "unix:uid:1"), reg("b", "/b", time.Hour, "unix:uid:2")
	filled(t, w, dir, a, b)
	filled(t, w, other, a, b)
	read := func(dir, name string) []byte {
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	write := func(dir, name string, raw []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fileA, fileB, foreign := read(dir, "a.sealed"), read(dir, "b.sealed"), read(other, "a.sealed")
	reset := func() { write(dir, "a.sealed", fileA); write(dir, "b.sealed", fileB) }

	write(dir, "a.sealed", fileB)
	if got := restored(t, w, dir, a, b); got["a"] != nil || got["b"] == nil {
		t.Fatalf("b's file as a's: %v", got)
	}
	reset()
	// Both registrations name one ID now, so that the certificate alone would not tell.
	twin := b
	twin.ID = a.ID
	write(dir, "b.sealed", fileA)
	if got := restored(t, w, dir, a, twin); got["b"] != nil || got["a"] == nil {
		t.Fatalf("a's file as its twin's: %v", got)
	}
	reset()
	write(dir, "a.sealed", foreign)
	if got := restored(t, w, dir, a, b); got["a"] != nil {
		t.Fatalf("a file of another folder: %v", got)
	}
	reset()
	// The header of one file on the body of another.
	head := len(sealMagic) + 1 + int(fileA[len(sealMagic)])
	headB := len(sealMagic) + 1 + int(fileB[len(sealMagic)])
	write(dir, "a.sealed", slices.Concat(fileA[:head], fileB[headB:]))
	if got := restored(t, w, dir, a, b); got["a"] != nil {
		t.Fatalf("head and body of two files: %v", got)
	}
	reset()
	// The whole folder under another agent's name.
	d := newDoorless(t, w, a, b)
	d.restore(mustCache(t, dir, passphrase("one"), "node-2"))
	if len(d.entries) != 0 {
		t.Fatal("another agent took the folder over")
	}
}

func TestTheWrongSealOpensNothing(t *testing.T) {
	w, dir := newWorld(t), filepath.Join(t.TempDir(), "cache")
	r := reg("web", "/web", time.Hour, uid)
	filled(t, w, dir, r)
	log, text := newTestLog(t)
	c, err := newCache(t.Context(), dir, passphrase("two"), aMember("node-1"), 1, log)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(c.names()); n != 0 {
		t.Fatalf("%d files are left", n)
	}
	if s := text.String(); !bytes.Contains([]byte(s), []byte("can't be opened and is deleted")) {
		t.Fatalf("not said: %s", s)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Fatalf("in the folder: %v", entries)
	}
	// The next write makes a data key under the new seal.
	d := newDoorless(t, w, r)
	d.restore(c)
	key := newKey(t)
	got, err := d.verify(r.ID, w.mesh.leaf(t, r.ID, key.Public(), w.now().Add(-time.Minute), w.now().Add(r.TTL)), key, w.now())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.write(t.Context(), r.Name, got); err != nil {
		t.Fatal(err)
	}
	if c, err = newCache(t.Context(), dir, passphrase("two"), aMember("node-1"), 1, log); err != nil || len(c.names()) != 1 {
		t.Fatalf("%v, %v", c.names(), err)
	}
	failing := func(context.Context) ([]byte, error) { return nil, errAway }
	if _, err := newCache(t.Context(), dir, passphraseFunc(failing), aMember("node-1"), 1, log); !errors.Is(err, errAway) {
		t.Fatalf("a seal that can't be asked: %v", err)
	}
}

type passphraseFunc func(context.Context) ([]byte, error)

func (f passphraseFunc) Passphrase(ctx context.Context) ([]byte, error) { return f(ctx) }

// What is in the cache passes the checks of a fresh answer, or goes.
func TestTheCacheIsBelievedNoMoreThanTheServer(t *testing.T) {
	base := reg("web", "/web", time.Hour, uid)
	for name, change := range map[string]func(w *world, r *identity.Registration){
		"another ID is registered": func(_ *world, r *identity.Registration) { r.ID = reg("", "/other", 0).ID },
		"the registration is gone": func(_ *world, r *identity.Registration) { r.Name = "another" },
		"another bundle":           func(w *world, _ *identity.Registration) { w.bundle = mustBundle(w.t, 2, newCA(w.t, "other", nil)) },
		"it has expired": func(w *world, _ *identity.Registration) {
			w.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
		},
		"it is not valid yet": func(w *world, _ *identity.Registration) {
			w.now = func() time.Time { return time.Now().Add(-time.Hour) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, dir, r := newWorld(t), filepath.Join(t.TempDir(), "cache"), base
			filled(t, w, dir, r)
			change(w, &r)
			if got := restored(t, w, dir, r); len(got) != 0 {
				t.Fatalf("served: %v", got)
			}
			if _, err := os.Stat(filepath.Join(dir, "web.sealed")); !errors.Is(err, fs.ErrNotExist) {
				t.Fatal("it is still there")
			}
		})
	}
}

func TestTheCacheIsPrivateAndSealed(t *testing.T) {
	w, dir := newWorld(t), filepath.Join(t.TempDir(), "cache")
	got := filled(t, w, dir, reg("web", "/web", time.Hour, uid))
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("folder: %v, %v", info.Mode(), err)
	}
	block, _ := pem.Decode(got["web"].svid.PrivateKey)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Fatalf("%v, %v", entries, err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", e.Name(), info.Mode(), err)
		}
		raw, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		// The scalar, and all of it as it was encoded for the file.
		for _, secret := range [][]byte{block.Bytes[36:68], []byte(base64Of(block.Bytes))[:40], []byte("PRIVATE KEY")} {
			if bytes.Contains(raw, secret) {
				t.Errorf("%s holds the key in clear", e.Name())
			}
		}
	}
	// One that others may read is not believed either.
	if err := os.Chmod(filepath.Join(dir, "web.sealed"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := restored(t, w, dir, reg("web", "/web", time.Hour, uid)); len(got) != 0 {
		t.Fatal("a file that anybody may read is served")
	}
}

func TestAWithdrawnRegistrationIsDeletedFromTheCacheAtOnce(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("a", "/a", time.Hour, uid), reg("b", "/b", time.Hour, uid))
	n := w.start(t)
	subscribeBoth := subscribe(t, connect(t, n.config.Socket), "spiffe://example.org/a", "spiffe://example.org/b")
	file := func(name string) bool {
		_, err := os.Stat(filepath.Join(n.path(cacheDir), name+sealedSuffix))
		return err == nil
	}
	if _, err := subscribeBoth.next(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both are cached", func() bool { return file("a") && file("b") })
	w.setRegistrations(reg("b", "/b", time.Hour, uid))
	eventually(t, "a's file is gone", func() bool { return !file("a") })
	if !file("b") {
		t.Fatal("b's file went with it")
	}
	// Another ID under the same name: the old certificate goes, the new one comes.
	before, err := os.ReadFile(filepath.Join(n.path(cacheDir), "b.sealed"))
	if err != nil {
		t.Fatal(err)
	}
	w.setRegistrations(reg("b", "/c", time.Hour, uid))
	eventually(t, "the file is another", func() bool {
		now, err := os.ReadFile(filepath.Join(n.path(cacheDir), "b.sealed"))
		return err != nil || !bytes.Equal(before, now)
	})
}

func TestABanPurgesTheCacheAtOnce(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.setRegistrations(reg("web", "/web", time.Hour, uid))
	n := w.start(t)
	first := leafOf(t, n.config.Socket)
	files := func() int {
		entries, err := os.ReadDir(n.path(cacheDir))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	eventually(t, "it is cached", func() bool { return files() == 2 })
	w.change(func() { w.ban = true })
	eventually(t, "nothing is left, the data key least of all", func() bool { return files() == 0 })
	if !leafOf(t, n.config.Socket).Equal(first) {
		t.Fatal("what is in memory changed with it")
	}
	// While it is banned, nothing comes back to the disk.
	n.hub.cache.touch("web")
	n.hub.cache.flush(t.Context(), n.hub.inUse)
	if files() != 0 {
		t.Fatal("it was written again")
	}
	// Who looks at this agent is told that it is refused, not to look at the network.
	said := func() string {
		for _, f := range n.findings(t) {
			if f.About == "server" {
				return f.Message
			}
		}
		return ""
	}
	turned := func() *timestamppb.Timestamp {
		st, err := adminService{a: n.Agent}.Status(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return st.Server.TurnedAwaySince
	}
	if text := said(); !strings.Contains(text, "the server turns this agent away") || turned() == nil {
		t.Errorf("it says %q, turned away since %v", text, turned())
	}
	w.change(func() { w.ban = false })
	eventually(t, "it is let in again, and the cache is back", func() bool { return files() == 2 })
	eventually(t, "that is said", func() bool { return said() == "the server is there" && turned() == nil })
	c := n.config
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	w.close()
	c.Metrics = nil
	again, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	n = run(t, again)
	if !leafOf(t, c.Socket).Equal(first) {
		t.Fatal("the cache that came back does not serve")
	}
}

// A no to one item, or a server that is away, is no reason to throw anything away.
func TestNoOtherErrorPurgesTheCache(t *testing.T) {
	w, dir := newWorld(t), filepath.Join(t.TempDir(), "cache")
	r := reg("web", "/web", time.Hour, uid)
	filled(t, w, dir, r)
	d := newDoorless(t, w, r)
	d.restore(mustCache(t, dir, passphrase("one"), "node-1"))
	for _, code := range []codes.Code{codes.Unavailable, codes.Unauthenticated, codes.Internal, codes.NotFound, codes.InvalidArgument, codes.ResourceExhausted, codes.DeadlineExceeded} {
		d.turnedAway(status.Error(code, "no"))
	}
	d.turnedAway(errAway)
	d.turnedAway(nil)
	d.turnedAway(refused{&signetv1.Refusal{Reason: signetv1.Refusal_REASON_DENIED}})
	if n := len(d.cache.names()); n != 1 {
		t.Fatalf("%d files are left", n)
	}
}

func TestADiskThatTakesNothingDelaysNobodyAndHeals(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		w := newWorld(t)
		dir := filepath.Join(t.TempDir(), "cache")
		d := newDoorless(t, w, reg("web", "/web", time.Hour, uid))
		c := mustCache(t, dir, passphrase("one"), "node-1")
		d.restore(c)
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer func() { cancel(); synctest.Wait() }()
		go d.run(ctx)
		go c.run(ctx, d.inUse)
		start := time.Now()
		await(t, d.mustOpen(t, uid))
		if took := time.Since(start); took > time.Second {
			t.Fatalf("the workload waited %s", took)
		}
		time.Sleep(time.Minute)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * cacheRetry)
		if _, err := os.Stat(filepath.Join(dir, "web.sealed")); err != nil {
			t.Fatal(err)
		}
	})
}

func TestWhatACrashCutOffIsCleanedUp(t *testing.T) {
	w, dir := newWorld(t), filepath.Join(t.TempDir(), "cache")
	r := reg("web", "/web", time.Hour, uid)
	filled(t, w, dir, r)
	if err := os.WriteFile(filepath.Join(dir, ".tmp-CUTOFF"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := restored(t, w, dir, r); len(got) != 1 {
		t.Fatalf("%v", got)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 2 {
		t.Fatalf("%v", entries)
	}
}

func FuzzOpenSealed(f *testing.F) {
	s := &sealer{key: make([]byte, dataKeySize), place: []byte("here")}
	whole, err := s.seal("web", "0102", []byte("content"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add([]byte(sealMagic))
	f.Add([]byte(sealMagic + "\xff"))
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, file []byte) {
		serial, data, err := s.open("web", file)
		if (err == nil) != bytes.Equal(file, whole) || err == nil && (serial != "0102" || string(data) != "content") {
			t.Fatalf("%q opened as %q, %q, %v", file, serial, data, err)
		}
	})
}
