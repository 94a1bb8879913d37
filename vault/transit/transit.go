// Package transit keeps private keys in the Transit engine of a HashiCorp Vault, which signs with them and never gives them
// out (keystore.Store).
//
// A keystore name is a Transit key, a keystore version is a version of it. A Key is bound to its version and to the public
// key that was there when it was opened: whatever becomes of the key in Vault, there is a good signature or an error.
package transit

import (
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/vault"
)

// Backend is the Backend of references to keys in Transit.
const Backend = "vault-transit"

// DefaultMount and DefaultTimeout are what New takes where nothing is given.
const (
	DefaultMount   = "transit"
	DefaultTimeout = 5 * time.Second
)

// maxVersions bounds the versions of one key that Create makes only to skip them, and twice that those that List tells of.
const maxVersions = 10_000

// Config says where in Vault the keys are.
type Config struct {
	Vault *vault.Client
	// Mount is the path of the Transit engine; "" = DefaultMount.
	Mount string
	// Prefix begins the name of each key in Vault. What begins with it is ours alone.
	Prefix string
	// Timeout bounds one signature, with all waiting and tries; 0 = DefaultTimeout.
	Timeout time.Duration

	Now     func() time.Time
	Logger  *slog.Logger
	Metrics prometheus.Registerer
}

// complete fills in the defaults.
func (c Config) complete() (Config, error) {
	if c.Mount == "" {
		c.Mount = DefaultMount
	}
	c.Mount = strings.Trim(c.Mount, "/")
	if c.Timeout == 0 {
		c.Timeout = DefaultTimeout
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case !validMount.MatchString(c.Mount):
		return c, fmt.Errorf("keys in Vault: %q is no path of a Transit engine: give it as `vault secrets list` shows it", c.Mount)
	case c.Prefix == "":
		return c, errors.New("keys in Vault: no prefix of the keys' names is given: without one the keys of others would be taken for ours")
	case !validPrefix.MatchString(c.Prefix):
		return c, fmt.Errorf("keys in Vault: prefix %q: use up to 128 letters, digits, '-', '_' and '.', beginning with a letter or digit", c.Prefix)
	case c.Timeout < 0:
		return c, fmt.Errorf("keys in Vault: a timeout of %s is no time", c.Timeout)
	}
	return c, nil
}

var (
	validMount  = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$`)
	validPrefix = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)
)

// SigningEngine is the name of the way to Vault by which signatures go.
func SigningEngine(c Config) string {
	return strings.Trim(cmp.Or(c.Mount, DefaultMount), "/") + "/sign"
}

// Use is what one of our keys is used for: it signs, and what else is said here.
type Use struct {
	Name string
	// Algorithm is what it is made of; "" where that is not known.
	Algorithm keystore.Algorithm
	// Made: the key is made, if it is not there. Grows: it gets new versions, too. Shrinks: versions are destroyed.
	Made, Grows, Shrinks bool
}

// Needs lists what a token must be allowed for these keys, and no more: Vault refuses a key of another name, one that could be
// taken out, and what would change it so. Deleting keys is not in it: versions are destroyed by trimming.
func Needs(c Config, uses ...Use) (needs []vault.Need, err error) {
	if c, err = c.complete(); err != nil {
		return nil, err
	}
	for _, u := range uses {
		key, sign := c.Mount+"/keys/"+c.Prefix+u.Name, c.Mount+"/sign/"+c.Prefix+u.Name
		add := func(path, capability, why string, parameters map[string][]string) {
			needs = append(needs, vault.Need{Path: path, Capabilities: []string{capability}, Why: why, Parameters: parameters})
		}
		add(key, "read", "read the public half of "+u.Name+", and look whether it is there", nil)
		if u.Made {
			kinds := []string{string(u.Algorithm)}
			if u.Algorithm == "" {
				kinds = nil
				for _, alg := range keystore.Algorithms() {
					kinds = append(kinds, string(alg))
				}
			}
			add(key, "update", "make "+u.Name, map[string][]string{"type": kinds})
		}
		if u.Grows {
			add(key+"/rotate", "update", "make a new version of "+u.Name, nil)
		}
		if u.Shrinks {
			add(key+"/config", "update", "destroy versions of "+u.Name+" that are no longer needed: first none is used", map[string][]string{"min_decryption_version": nil, "min_encryption_version": nil})
			add(key+"/trim", "update", "destroy versions of "+u.Name+" that are no longer needed", nil)
		}
		if u.Algorithm == "" {
			add(sign+"/*", "update", "sign with "+u.Name+", by the hash that goes with its algorithm, which is not known here", nil)
		} else {
			add(signPath(sign, u.Algorithm), "update", "sign with "+u.Name, nil)
		}
	}
	return needs, nil
}

// ListNeeds lists what a ceremony needs beside, which finds out what keys there are.
func ListNeeds(c Config) []vault.Need {
	return []vault.Need{{Path: strings.Trim(cmp.Or(c.Mount, DefaultMount), "/") + "/keys", Capabilities: []string{"list"}, Why: "find our keys"}}
}

// signPath is that by which a CA of the algorithm signs.
func signPath(key string, alg keystore.Algorithm) string {
	hash := crypto.SHA256
	switch alg {
	case keystore.ECDSAP384:
		hash = crypto.SHA384
	case keystore.Ed25519: // it signs the message itself
		return key
	}
	return key + "/" + hashNames[hash]
}

// Store is a keystore.Store. It holds no key and no connection of its own.
type Store struct {
	// keys is the way to what Vault has of keys, signs to their signatures.
	vault       *vault.Client
	keys, signs *vault.Engine
	mount       string
	prefix      string
	timeout     time.Duration
	now         func() time.Time
	logger      *slog.Logger
	metrics     *metrics
}

var _ keystore.Store = (*Store)(nil)

// New checks the configuration; it does not ask Vault.
func New(c Config) (*Store, error) {
	c, err := c.complete()
	if err != nil {
		return nil, err
	}
	if c.Vault == nil {
		return nil, errors.New("keys in Vault: no Vault is given")
	}
	m, err := newMetrics(c.Metrics)
	if err != nil {
		return nil, err
	}
	return &Store{vault: c.Vault, keys: c.Vault.Engine(c.Mount + "/keys"), signs: c.Vault.Engine(SigningEngine(c)), mount: c.Mount, prefix: c.Prefix, timeout: c.Timeout, now: c.Now, logger: c.Logger, metrics: m}, nil
}

// String says where the keys are.
func (s *Store) String() string {
	return "keys in Vault under " + s.mount + "/keys/" + s.prefix + "*"
}
func (s *Store) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }
func (s *Store) LogValue() slog.Value       { return slog.StringValue(s.String()) }

func (s *Store) path(op, name string) string { return s.mount + "/" + op + "/" + s.prefix + name }

// Create returns the first version of the named key above after: one that is there, else it makes the key, or rotates it. When
// an answer is lost, the next try with the same after finds what was made; so do several callers at the same time.
func (s *Store) Create(ctx context.Context, name string, alg keystore.Algorithm, after int) (keystore.Key, error) {
	k, err := s.create(ctx, name, alg, after)
	if err != nil {
		return nil, fmt.Errorf("create key %.63q in Vault: %w", name, away(err))
	}
	return k, nil
}

func (s *Store) create(ctx context.Context, name string, alg keystore.Algorithm, after int) (*Key, error) {
	info, err := s.look(ctx, name, alg)
	if errors.Is(err, keystore.ErrNotFound) {
		// Of a key that another has made meanwhile, Vault answers what that is.
		info, err = s.change(ctx, name, "", map[string]any{"type": string(alg)})
	}
	if err != nil {
		return nil, err
	}
	if err := info.mayGrow(alg, after); err != nil {
		return nil, err
	}
	for info.signsFrom(after+1) > info.Latest {
		if info, err = s.rotate(ctx, name, info.Latest); err != nil {
			return nil, err
		}
	}
	return s.key(keystore.Ref{Backend: Backend, Name: name, Version: info.signsFrom(after + 1)}, info)
}

// Find says which key Create would return, and whether it is there already. Where it is not, it asks Vault whether it may be
// made.
func (s *Store) Find(ctx context.Context, name string, alg keystore.Algorithm, after int) (keystore.Ref, bool, error) {
	ref, there, err := s.find(ctx, name, alg, after)
	if err != nil {
		return keystore.Ref{}, false, fmt.Errorf("create key %.63q in Vault: %w", name, away(err))
	}
	return ref, there, nil
}

func (s *Store) find(ctx context.Context, name string, alg keystore.Algorithm, after int) (ref keystore.Ref, there bool, err error) {
	info, err := s.look(ctx, name, alg)
	path, body := s.path("keys", name), map[string]any{"type": string(alg)}
	switch {
	case errors.Is(err, keystore.ErrNotFound):
		ref = keystore.Ref{Backend: Backend, Name: name, Version: max(after, 0) + 1}
	case err != nil:
		return ref, false, err
	default:
		if err := info.mayGrow(alg, after); err != nil {
			return ref, false, err
		}
		ref = keystore.Ref{Backend: Backend, Name: name, Version: info.signsFrom(after + 1)}
		if ref.Version <= info.Latest {
			return ref, true, nil
		}
		path, body = path+"/rotate", nil
	}
	missing, err := s.vault.Missing(ctx, []vault.Need{{Path: path, Capabilities: []string{"update"}}})
	if err == nil && len(missing) > 0 {
		err = denied(vault.ErrDenied, path, "update", body)
	}
	return ref, false, err
}

// look reads the key that one of these is to be made of. keystore.ErrNotFound if there is none.
func (s *Store) look(ctx context.Context, name string, alg keystore.Algorithm) (*keyInfo, error) {
	if _, err := keystore.ParseAlgorithm(string(alg)); err != nil {
		return nil, err
	}
	if !validRef(keystore.Ref{Backend: Backend, Name: name, Version: 1}) {
		return nil, errors.New("use 1 to 63 of a-z, 0-9 and '-' for its name, beginning with a letter")
	}
	return s.read(ctx, name)
}

// rotate makes one version more.
func (s *Store) rotate(ctx context.Context, name string, before int) (*keyInfo, error) {
	info, err := s.change(ctx, name, "/rotate", nil)
	if err == nil && info.Latest <= before {
		err = fmt.Errorf("%s was rotated, but its newest version is still %d", info.where, info.Latest)
	}
	return info, err
}

// Open binds a key to its version and to the public key that Vault has now. ErrNotFound if that version is gone for good;
// other errors if it is there and can't be used, or if Vault is away (keystore.ErrAway).
func (s *Store) Open(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	if ref.Backend != Backend || !validRef(ref) {
		return nil, fmt.Errorf("open key %s: not a reference to a key in Vault's Transit engine", ref)
	}
	info, err := s.read(ctx, ref.Name)
	if err != nil {
		return nil, fmt.Errorf("open key %s: %w", ref, away(err))
	}
	k, err := s.key(ref, info)
	if err != nil {
		return nil, fmt.Errorf("open key %s: %w", ref, err)
	}
	// Not refused: the key is at work, and who could take a copy has had the time to. A version more it does not get.
	k.expose(info)
	if info.AutoRotate != 0 {
		s.logger.Warn("Vault rotates the key by itself, which leaves versions that nobody uses: set auto_rotate_period to 0",
			"key", ref.String(), "path", info.where)
	}
	return k, nil
}

func (s *Store) key(ref keystore.Ref, info *keyInfo) (*Key, error) {
	public, err := info.public(ref.Version)
	if err != nil {
		return nil, err
	}
	return &Key{store: s, ref: ref, public: public, batchers: map[scheme]*batcher{}}, nil
}

// List returns all versions that are not destroyed, also those that Vault was told not to sign with. Keys with other names,
// or of kinds that we don't make, are passed over.
func (s *Store) List(ctx context.Context) ([]keystore.Ref, error) {
	refs, err := s.list(ctx)
	if err != nil {
		return nil, fmt.Errorf("list keys: %w", away(err))
	}
	return refs, nil
}

func (s *Store) list(ctx context.Context) ([]keystore.Ref, error) {
	names, err := s.keys.List(ctx, s.mount+"/keys")
	if errors.Is(err, vault.ErrDenied) {
		return nil, denied(err, s.mount+"/keys", "list", nil)
	}
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	var refs []keystore.Ref
	for _, full := range names {
		name, ours := strings.CutPrefix(full, s.prefix)
		ref := keystore.Ref{Backend: Backend, Name: name, Version: 1}
		if !ours || !validRef(ref) {
			continue
		}
		info, err := s.read(ctx, name)
		if errors.Is(err, keystore.ErrNotFound) {
			continue // deleted since
		}
		if err != nil {
			return nil, err
		}
		if _, err := keystore.ParseAlgorithm(info.Type); err != nil {
			continue
		}
		for ref.Version = info.oldest(); ref.Version <= info.Latest; ref.Version++ {
			refs = append(refs, ref)
		}
	}
	return refs, nil
}

// Delete destroys a version for good. Transit destroys from the oldest on and never the newest: for all others the error is
// keystore.ErrKept. One that was interrupted is taken up by the next.
func (s *Store) Delete(ctx context.Context, ref keystore.Ref) error {
	if ref.Backend != Backend || !validRef(ref) {
		return fmt.Errorf("delete key %s: not a reference to a key in Vault's Transit engine", ref)
	}
	if err := s.destroy(ctx, ref); err != nil {
		return fmt.Errorf("delete key %s: %w", ref, away(err))
	}
	return nil
}

func (s *Store) destroy(ctx context.Context, ref keystore.Ref) error {
	info, err := s.read(ctx, ref.Name)
	switch {
	case errors.Is(err, keystore.ErrNotFound):
		return nil
	case err != nil:
		return err
	case ref.Version < info.oldest() || ref.Version > info.Latest:
		return nil
	case ref.Version > info.oldest():
		return fmt.Errorf("%w: Vault destroys the oldest version first, and %s still has version %d", keystore.ErrKept, info.where, info.oldest())
	case ref.Version == info.Latest:
		return fmt.Errorf("%w: it is the newest version of %s, which Vault keeps until there is a newer one", keystore.ErrKept, info.where)
	}
	// What is below both of these can no longer be used, and only that can be trimmed.
	next := ref.Version + 1
	if info.MinDecryption < next || info.MinEncryption < next {
		if _, err := s.change(ctx, ref.Name, "/config", map[string]any{
			"min_decryption_version": max(info.MinDecryption, next), "min_encryption_version": max(info.MinEncryption, next),
		}); err != nil {
			return err
		}
	}
	// An end here leaves a version that can't be used but is there: List shows it, and the next Delete trims it.
	_, err = s.change(ctx, ref.Name, "/trim", map[string]any{"min_available_version": next})
	return err
}

func validRef(r keystore.Ref) bool {
	_, err := keystore.ParseRef(r.String())
	return err == nil
}

// denied says what the token's policy lacks. Where it has the capability, it may allow other parameters than those of the request.
func denied(err error, path, capability string, body map[string]any) error {
	if errors.Is(err, vault.ErrLogin) {
		return err // a login that is refused has no policy
	}
	err = fmt.Errorf("%w; give the policy of its token the capability %q on the path %s", err, capability, path)
	if len(body) == 0 {
		return err
	}
	var given []string
	for _, name := range slices.Sorted(maps.Keys(body)) {
		given = append(given, fmt.Sprintf("%s=%v", name, body[name]))
	}
	return fmt.Errorf("%w; if it has that, look at its allowed_parameters: they have to let %s pass", err, strings.Join(given, " and "))
}

// away marks an error of a Vault that is away as keystore.ErrAway.
func away(err error) error {
	if errors.Is(err, vault.ErrAway) {
		return awayError{err}
	}
	return err
}

type awayError struct{ error }

func (e awayError) Unwrap() []error { return []error{e.error, keystore.ErrAway} }

// bounded makes foreign text fit for an error.
func bounded(s string) string {
	const most = 200
	if len(s) > most {
		s = s[:most] + "…"
	}
	return fmt.Sprintf("%q", strings.ToValidUTF8(s, "?"))
}

type metrics struct {
	batch      prometheus.Histogram
	signatures *prometheus.CounterVec
}

// What may become of a signature, as it stands in the metric.
const (
	resultOK      = "ok"
	resultAway    = "away"
	resultWrong   = "wrong"
	resultRefused = "refused"
)

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		batch: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "signet_keystore_transit_batch_size", Help: "Signatures asked of Vault's Transit engine in one request.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 7), // to mostInBatch
		}),
		signatures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_keystore_transit_signatures_total", Help: "Signatures asked of keys in Vault's Transit engine, by what came of them.",
		}, []string{"result"}),
	}
	for _, result := range []string{resultOK, resultAway, resultWrong, resultRefused} {
		m.signatures.WithLabelValues(result)
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.batch, m.signatures} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of keys in Vault: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) signed(err error) {
	result := resultRefused
	switch {
	case err == nil:
		result = resultOK
	case errors.Is(err, vault.ErrAway):
		result = resultAway
	case errors.Is(err, errWrong):
		result = resultWrong
	}
	m.signatures.WithLabelValues(result).Inc()
}
