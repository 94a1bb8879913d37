package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/server"
	"github.com/signet-ca/signet/vault/transit"
)

// inTransit is what the state folder tells of the keys of CAs that are at work in Transit; nothing where there is no cluster yet.
type inTransit struct {
	// prefix is what the newest one was made under; "" = it is not known.
	prefix string
	// authorities are whose keys these are. algorithms are by the names of keys, all versions of which are of one kind; "" = it is not known yet.
	authorities []string
	algorithms  map[string]keystore.Algorithm
}

// keysInTransit reads the state folder and talks to nobody.
func keysInTransit(ctx context.Context, cfg *config.Server) (k inTransit, err error) {
	shown, err := server.Show(ctx, cfg.StateDir)
	if errors.Is(err, server.ErrNoCluster) {
		return k, nil
	}
	if err != nil {
		return k, err
	}
	k.algorithms = map[string]keystore.Algorithm{}
	for _, a := range shown.Authorities {
		if a.State == ca.Removed || a.Ref.Backend != transit.Backend {
			continue
		}
		k.authorities = append(k.authorities, a.ID)
		alg := k.algorithms[a.Ref.Name]
		if a.Certificate != nil {
			alg = keystore.AlgorithmOf(a.Certificate.PublicKey)
		}
		k.algorithms[a.Ref.Name] = alg
	}
	if k.prefix, err = readPrefix(prefixFile(cfg)); err != nil {
		return k, fmt.Errorf("what the names of this cluster's keys in Transit begin with can't be read: %w; without that file they are looked for under keystore.transit.prefix", err)
	}
	return k, nil
}

// errOtherKeys: the configuration is for other keys than those at work.
var errOtherKeys = errors.New("the keys that this cluster has in Vault can't be used so")

// refuses a configuration with which keys at work would not be found, or no further one could be made. A running server would say
// so by an outage, and Vault by a key that is not there.
func (k inTransit) refuses(cfg *config.Server) error {
	if !cfg.UsesTransit() || len(k.authorities) == 0 {
		return nil
	}
	refused := func(format string, args ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{errOtherKeys}, args...)...)
	}
	if prefix := cfg.Keystore.Transit.Prefix; k.prefix != "" && k.prefix != prefix {
		return refused("keystore.transit.prefix is %s now, and was %s: the keys of %s are in Vault under that name for as long as they live, for none can be renamed; put %s back (intermediates can get keys elsewhere: set keystore.intermediates)",
			prefix, k.prefix, strings.Join(k.authorities, ", "), k.prefix)
	}
	have, want := k.algorithms[server.IntermediateKey], cmp.Or(cfg.Keystore.Algorithm, config.DefaultAlgorithm)
	if have != "" && have != want && cfg.Keystore.Intermediates == config.KeysTransit {
		return refused("keystore.algorithm is %s now, and was %s when the key %s%s was made in Vault, which stays so in all its versions: put %s back, or set keystore.intermediates to %s or %s, where the next one can be of another algorithm",
			want, have, cfg.Keystore.Transit.Prefix, server.IntermediateKey, have, config.KeysMemory, config.KeysFile)
	}
	return nil
}

// recorded writes down in the state folder what the names of keys begin with, whenever one is made: no reference to a key says it.
type recorded struct {
	keystore.Store
	file, prefix string
}

func (n recorded) Create(ctx context.Context, name string, alg keystore.Algorithm, after int) (keystore.Key, error) {
	key, err := n.Store.Create(ctx, name, alg, after)
	if err != nil {
		return nil, err
	}
	// A crash before it is written leaves a key that nothing refers to: the next try finds it and writes.
	if was, err := readPrefix(n.file); err == nil && was == n.prefix {
		return key, nil
	}
	return key, durable.WriteValue(n.file, transitNames{n.prefix}, 0o600)
}

type transitNames struct {
	Prefix string `json:"prefix"`
}

// prefixFile is where that is written.
func prefixFile(cfg *config.Server) string { return filepath.Join(cfg.StateDir, "transit.json") }

func readPrefix(file string) (string, error) {
	var n transitNames
	err := durable.ReadValue(file, maxTransitNames, &n)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return n.Prefix, err
}

// maxTransitNames bounds that file, in bytes.
const maxTransitNames = 4 << 10
