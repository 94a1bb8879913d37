package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/ca/ceremony"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/internal/strictyaml"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/vault"
	"github.com/signet-ca/signet/vault/pki"
	"github.com/signet-ca/signet/vault/transit"
)

// maxRootFile bounds the file of root init -f, in bytes.
const maxRootFile = 64 << 10

// caLife is a duration as ceremony.ParseLife reads it; other durations in the file are Go's.
type caLife time.Duration

// readRootFile reads the reviewed file of root init -f, strictly. A nil key is one in the root's folder.
func readRootFile(path string) (cfg ceremony.RootConfig, key *config.RootKey, err error) {
	text, err := durable.ReadFile(path, "ceremony file", maxRootFile)
	if err != nil {
		return cfg, nil, err
	}
	var f struct {
		TrustDomain spiffeid.TrustDomain `yaml:"trust_domain" required:"true"`
		Dir         string               `yaml:"dir" kind:"path" required:"true"`
		Algorithm   keystore.Algorithm   `yaml:"algorithm"`
		Life        caLife               `yaml:"life"`
		PathLen     int                  `yaml:"path_length"`
		Vault       config.Vault         `yaml:"vault"`
		Transit     config.Transit       `yaml:"transit"`
		PKI         config.RootPKI       `yaml:"pki"`
	}
	var in config.RootKey
	_, err = strictyaml.Decode(path, text, &f, strictyaml.Options{
		What: "ceremony file",
		Parsers: []strictyaml.Parser{strictyaml.Parse(identity.ParseTrustDomain), strictyaml.Parse(func(s string) (caLife, error) {
			d, err := ceremony.ParseLife(s)
			return caLife(d), err
		})},
		Check: func(at *strictyaml.File) {
			if at.Given("path_length") && f.PathLen == 0 {
				at.Find("path_length", "path_length 0: the root could sign no intermediate; use 1")
			}
			in = config.RootKey{Vault: f.Vault, Transit: f.Transit, PKI: f.PKI}
			in.Complete(f.TrustDomain, at)
		},
	})
	if err != nil {
		return cfg, nil, err
	}
	if in.Vault.Address != "" {
		key = &in
	}
	return ceremony.RootConfig{
		Dir: f.Dir, TrustDomain: f.TrustDomain, Algorithm: cmp.Or(f.Algorithm, keystore.ECDSAP256), Life: time.Duration(f.Life), PathLen: f.PathLen,
	}, key, nil
}

// rootHolder is the Vault that holds the key of a root.
type rootHolder struct {
	ceremony.Elsewhere
	vault *vault.Client
	// needs is what is asked of Vault to sign, toMake what more to make the root.
	needs, toMake []vault.Need
	// place says for people where the key is.
	place string
}

// openRootKey is the holder of a root's key of the algorithm. It talks to nobody; what it returns has to be closed.
func openRootKey(k *config.RootKey, alg keystore.Algorithm) (_ *rootHolder, err error) {
	h := &rootHolder{needs: vault.Needs(), place: placeOf(k)}
	if h.Where, err = k.Text(); err != nil {
		return nil, err
	}
	if h.vault, err = vault.New(vaultConfig(k.Vault, nil, nil)); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	if k.PKI.Mount != "" {
		c := pki.Config{Vault: h.vault, Mount: k.PKI.Mount, Issuer: k.PKI.Issuer}
		h.needs, h.toMake = append(h.needs, pki.Needs(c)...), pki.RootNeeds(c)
		h.Engine, err = pki.New(c)
		return h, err
	}
	c := transit.Config{Vault: h.vault, Mount: k.Transit.Mount, Prefix: k.Transit.Prefix, Timeout: max(k.Vault.Timeout, transit.DefaultTimeout)}
	needs, err := transit.Needs(c, transit.Use{Name: "root", Algorithm: alg, Made: true})
	if err != nil {
		return nil, err
	}
	h.needs = slices.Concat(h.needs, transit.ListNeeds(c), needs)
	h.Keys, err = transit.New(c)
	return h, err
}

// placeOf says for people where a root's key is.
func placeOf(k *config.RootKey) string {
	switch {
	case k == nil:
		return "the folder"
	case k.PKI.Mount != "":
		return fmt.Sprintf("Vault's PKI engine, mount %s, issuer %s, at %s", k.PKI.Mount, k.PKI.Issuer, k.Vault.Address)
	}
	return fmt.Sprintf("Vault's Transit engine, mount %s, key %sroot, at %s", k.Transit.Mount, k.Transit.Prefix, k.Vault.Address)
}

// loadRootKey reads in a root's folder where its key is; nil = in the folder.
func loadRootKey(root *ceremony.Root) (*config.RootKey, error) {
	if text, err := root.Where(); err != nil || text == nil {
		return nil, err
	}
	return config.LoadRootKey(root.WherePath(), root.TrustDomain())
}

// rootKeyOf is the holder of a root's key; nil = its folder. What it returns has to be closed.
func rootKeyOf(root *ceremony.Root) (*rootHolder, error) {
	k, err := loadRootKey(root)
	if err != nil || k == nil {
		return nil, err
	}
	h, err := openRootKey(k, keystore.AlgorithmOf(root.Certificate().PublicKey))
	if err != nil {
		return nil, err
	}
	root.KeyIn(&h.Elsewhere)
	return h, nil
}

// allowed asks Vault whether it will do what is going to be asked of it, before anything is begun.
func (h *rootHolder) allowed(ctx context.Context, needs []vault.Need) error {
	missing, err := h.vault.Missing(ctx, needs)
	if errors.Is(err, vault.ErrDenied) && !errors.Is(err, vault.ErrLogin) {
		return fmt.Errorf("%w; for a root it is `signet root init --dry-run`", err)
	}
	if err != nil || len(missing) == 0 {
		return err
	}
	var lacks []string
	for _, n := range missing {
		lacks = append(lacks, fmt.Sprintf("%s on %s (%s)", strings.Join(n.Capabilities, " and "), n.Path, n.Why))
	}
	return no("the policy of our role in Vault lacks %s: `signet root init --dry-run` prints the whole policy", strings.Join(lacks, ", "))
}

// Close ends the connection. A nil holder has none.
func (h *rootHolder) Close() {
	if h != nil {
		h.vault.Close()
	}
}

// signsLater refuses what an engine can't do.
func (h *rootHolder) signsLater(sign []ceremony.SignFile) error {
	if h == nil || h.Engine == nil {
		return nil
	}
	for _, one := range sign {
		if one.Delay > 0 {
			return errors.New("root sign: what Vault's PKI engine signs begins at once, so --stagger can't be used with it: sign each when it is due")
		}
	}
	return nil
}
