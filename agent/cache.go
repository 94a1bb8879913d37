package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/bell"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
)

const (
	cacheDir     = "cache"
	dataKeyFile  = "data-key"
	sealedSuffix = ".sealed"
	// maxSealedFile holds the longest chain that is accepted and its key, in bytes.
	maxSealedFile = 96 << 10
	// maxCached bounds the files; further identities are served as well, but a restart needs the server for them.
	maxCached = 20_000
	// cacheRetry is the time between tries to write while the disk does not take it.
	cacheRetry = 10 * time.Second
)

// cache keeps the certificates and keys in use on disk, sealed, so that an agent that restarts while the server is away
// serves on. One file for each registration, written behind: nobody waits for the disk to get a certificate, and a crash
// before a file is written costs no more than the cache of that one.
//
// Nothing in it is believed because it is there: what is loaded passes the checks of a fresh answer (hub.verify).
type cache struct {
	dir        string
	seal       keystore.Passphrase
	place      []byte
	iterations int
	log        *slog.Logger

	// io is held over changes of the folder, so that nothing is written into one that is being purged. It guards sealer,
	// which is nil until the first write and after a purge, and files, the registrations that have one.
	io     sync.Mutex
	sealer *sealer
	files  map[string]struct{}
	full   bool // and it was said

	mu sync.Mutex
	// changed are registrations whose file may differ from what is in use.
	changed map[string]struct{}
	// purged: the server has turned this agent away; nothing is written until it lets it in again.
	purged bool
	// onDisk is what is known of the certificates in the files, by registration.
	onDisk map[string]cachedLeaf
	// leaves rings when onDisk has changed.
	leaves bell.Bell
	// wake holds a token when changed is not empty.
	wake chan struct{}
}

// cached is the content of a file.
type cached struct {
	Chain    [][]byte  `json:"chain"`
	Key      []byte    `json:"key"` // PKCS#8
	Received time.Time `json:"received"`
}

// cachedLeaf is what is known of the certificate in a file.
type cachedLeaf struct {
	issuer   string
	notAfter time.Time
}

func newCache(ctx context.Context, dir string, seal keystore.Passphrase, m *member, iterations int, log *slog.Logger) (*cache, error) {
	c := &cache{
		dir: dir, seal: seal, place: place(m), iterations: iterations, log: log,
		files: map[string]struct{}{}, onDisk: map[string]cachedLeaf{}, changed: map[string]struct{}{}, wake: make(chan struct{}, 1),
	}
	if err := durable.Dir(dir); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the cache: %w", err)
	}
	for _, e := range entries {
		name, sealed := strings.CutSuffix(e.Name(), sealedSuffix)
		switch {
		case sealed && identity.ParseName("registration", name) == nil:
			c.files[name] = struct{}{}
		case strings.HasPrefix(e.Name(), durable.TempPrefix): // of a write that a crash cut off
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
	// Where there is no data key the first write makes one: a disk that takes nothing now must not keep an agent from serving.
	c.sealer, err = openSealer(ctx, c.keyPath(), seal, c.place, iterations)
	switch {
	case errors.Is(err, errSeal), errors.Is(err, fs.ErrNotExist) && len(c.files) > 0:
		log.Error("the cache of certificates can't be opened and is deleted; identities come from the server again", "err", err)
		for name := range c.files {
			if err := c.remove(name); err != nil {
				return nil, err
			}
		}
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("cache of certificates: %w", err)
	}
	return c, nil
}

func (c *cache) keyPath() string         { return filepath.Join(c.dir, dataKeyFile) }
func (c *cache) path(name string) string { return filepath.Join(c.dir, name+sealedSuffix) }
func (c *cache) has(name string) bool    { _, ok := c.files[name]; return ok }

// touch notes that what is in use for a registration has changed or gone. A nil cache keeps nothing.
func (c *cache) touch(name string) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed[name] = struct{}{}
	c.rouse()
}

// rouse wakes run. Called with mu held.
func (c *cache) rouse() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// take returns what is to be written; nothing after a purge.
func (c *cache) take() map[string]struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.purged {
		return nil
	}
	names := c.changed
	c.changed = map[string]struct{}{}
	return names
}

// run writes what changes until ctx ends. inUse tells what a registration's certificate is now, nil for none.
func (c *cache) run(ctx context.Context, inUse func(name string) *held) {
	for {
		var retry <-chan time.Time
		if !c.flush(ctx, inUse) {
			retry = time.After(cacheRetry)
		}
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		case <-retry:
		}
	}
}

// flush writes what has changed. What the disk does not take stays changed.
func (c *cache) flush(ctx context.Context, inUse func(name string) *held) bool {
	var failed error
	for name := range c.take() {
		if failed == nil {
			failed = c.writeInUse(ctx, name, inUse)
			if failed == nil {
				continue
			}
		}
		c.mu.Lock()
		c.changed[name] = struct{}{}
		c.mu.Unlock()
	}
	if failed != nil {
		c.log.Warn("could not write the cache of certificates: what is in use is served on, but would not survive a restart while the server is away; trying again", "err", failed)
	}
	return failed == nil
}

// writeInUse makes the file of a registration be as what is in use.
func (c *cache) writeInUse(ctx context.Context, name string, inUse func(string) *held) error {
	c.io.Lock()
	defer c.io.Unlock()
	// Asked for here: what is withdrawn while we wait must not be written after its file has been deleted.
	return c.write(ctx, name, inUse(name))
}

// write makes the file of a registration hold h. Called with io held.
func (c *cache) write(ctx context.Context, name string, h *held) error {
	c.mu.Lock()
	purged := c.purged
	c.mu.Unlock()
	switch {
	case h == nil:
		return c.remove(name)
	case purged:
		return nil
	case !c.has(name) && len(c.files) >= maxCached:
		if !c.full {
			c.full = true
			c.log.Warn("the cache of certificates is full: further ones would not survive a restart while the server is away", "most", maxCached)
		}
		return nil
	case c.sealer == nil:
		var err error
		if c.sealer, err = makeSealer(ctx, c.keyPath(), c.seal, c.place, c.iterations); err != nil {
			return err
		}
	}
	data, err := encodeCached(h)
	if err != nil {
		return err
	}
	file, err := c.sealer.seal(name, h.svid.Serial, data)
	if err != nil {
		return fmt.Errorf("seal %s: %w", c.path(name), err)
	}
	if err := durable.WriteFile(c.path(name), file, 0o600); err != nil {
		return err
	}
	c.files[name] = struct{}{}
	c.note(name, cachedLeaf{issuer: h.issuer, notAfter: h.svid.NotAfter})
	return nil
}

func encodeCached(h *held) ([]byte, error) {
	block, _ := pem.Decode(h.svid.PrivateKey)
	if block == nil {
		return nil, errors.New("encode a key for the cache: it is not PEM")
	}
	v := cached{Key: block.Bytes, Received: h.received}
	for _, cert := range h.chain {
		v.Chain = append(v.Chain, cert.Raw)
	}
	return json.Marshal(v)
}

// read opens the file of a registration; the error names it.
func (c *cache) read(name string) (chain [][]byte, key *ecdsa.PrivateKey, received time.Time, err error) {
	file, err := durable.ReadSecret(c.path(name), maxSealedFile)
	if err != nil {
		return nil, nil, time.Time{}, err
	}
	fail := func(err error) ([][]byte, *ecdsa.PrivateKey, time.Time, error) {
		return nil, nil, time.Time{}, fmt.Errorf("open %s: %w", c.path(name), err)
	}
	serial, data, err := c.sealer.open(name, file)
	if err != nil {
		return fail(err)
	}
	var v cached
	if err := json.Unmarshal(data, &v); err != nil {
		return fail(errSeal)
	}
	k, err := x509.ParsePKCS8PrivateKey(v.Key)
	if err != nil {
		return fail(errSeal)
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok || len(v.Chain) == 0 {
		return fail(errSeal)
	}
	leaf, err := x509.ParseCertificate(v.Chain[0])
	if err != nil || serialText(leaf) != serial {
		return fail(errSeal)
	}
	c.note(name, cachedLeaf{issuer: issuerOf(leaf), notAfter: leaf.NotAfter})
	return v.Chain, key, v.Received, nil
}

// remove deletes the file of a registration.
func (c *cache) remove(name string) error {
	if err := os.Remove(c.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete from the cache: %w", err)
	}
	delete(c.files, name)
	c.note(name, cachedLeaf{})
	return nil
}

// sync makes deletions hold over a power cut too.
func (c *cache) sync() error {
	d, err := os.Open(c.dir)
	if err != nil {
		return fmt.Errorf("sync the cache: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}

// expunge deletes the files of registrations that are withdrawn, at once and durably. What can't be deleted is tried again by
// run.
func (c *cache) expunge(names []string, inUse func(name string) *held) {
	c.io.Lock()
	defer c.io.Unlock()
	var failed error
	deleted := false
	for _, name := range names {
		if c.has(name) && inUse(name) == nil {
			failed, deleted = errors.Join(failed, c.remove(name)), true
		}
	}
	if deleted {
		failed = errors.Join(failed, c.sync())
	}
	if failed != nil {
		c.log.Error("could not delete certificates of withdrawn identities from the cache; trying again", "folder", c.dir, "err", failed)
	}
}

// note says which certificate is in the file of a registration; zero = none.
func (c *cache) note(name string, leaf cachedLeaf) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.onDisk[name]
	if delete(c.onDisk, name); leaf != (cachedLeaf{}) {
		c.onDisk[name] = leaf
	}
	if leaf != before {
		c.leaves.Ring()
	}
}

// held adds the certificates in the files. A nil cache has none.
func (c *cache) held(l leaves) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, leaf := range c.onDisk {
		l.add(leaf.issuer, leaf.notAfter)
	}
}

// purge deletes everything at once, the data key first: without it the rest is noise. Nothing is written any more until
// resume. It reports whether there was something to do.
func (c *cache) purge() bool {
	c.mu.Lock()
	already := c.purged
	c.purged = true
	c.mu.Unlock()
	c.io.Lock()
	defer c.io.Unlock()
	if already && c.sealer == nil && len(c.files) == 0 {
		return false
	}
	var failed error
	if err := os.Remove(c.keyPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		failed = err
	}
	c.sealer = nil
	for name := range c.files {
		failed = errors.Join(failed, c.remove(name))
	}
	failed = errors.Join(failed, c.sync())
	if failed != nil {
		c.log.Error("could not delete the whole cache of certificates: delete it by hand", "folder", c.dir, "err", failed)
	}
	return true
}

// resume ends a purge: the server has let this agent in again. What is in use is written anew.
func (c *cache) resume(inUse []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.purged {
		return
	}
	c.purged = false
	for _, name := range inUse {
		c.changed[name] = struct{}{}
	}
	c.rouse()
}

// names of the files that are there.
func (c *cache) names() []string {
	c.io.Lock()
	defer c.io.Unlock()
	out := make([]string, 0, len(c.files))
	for name := range c.files {
		out = append(out, name)
	}
	return out
}

// forget deletes one file that must not be used, and says why.
func (c *cache) forget(name string, why error) {
	c.io.Lock()
	defer c.io.Unlock()
	c.log.Warn("a cached certificate is not used and is deleted; another comes from the server", "registration", name, "err", clip(why.Error(), 512))
	if err := c.remove(name); err != nil {
		c.log.Warn("could not delete a cached certificate", "registration", name, "err", err)
	}
}
