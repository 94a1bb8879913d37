package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

// standing is what a folder's database says; all of it is zero where there is none.
type standing struct {
	logKey, verifier string
	rows             []store.Authority
	bundle           trust.Bundle
}

// rehearse is a dry run of Init: it says what would be made and refuses what would be refused, as far as that shows before.
// The folder, its files and the keys stay as they are.
func (c *InitConfig) rehearse(ctx context.Context) (would []string, err error) {
	if err := c.complete(); err != nil {
		return nil, err
	}
	if err := durable.MayDir(c.Dir); err != nil {
		return nil, err
	}
	var s standing
	if _, err := os.Lstat(databasePath(c.Dir)); errors.Is(err, fs.ErrNotExist) {
		would = append(would, "state database "+databasePath(c.Dir)+" made")
	} else {
		// Nobody else works on what is looked at.
		lock, err := durable.LockToLook(c.Dir)
		if err != nil {
			return nil, err
		}
		defer lock.Close()
		if s, err = c.standing(ctx); err != nil {
			return nil, err
		}
	}
	// add says what would be done, and with which key: one that an interrupted try has left is taken.
	add := func(done, name string, alg keystore.Algorithm, after int) {
		if err != nil {
			return
		}
		var ref keystore.Ref
		var there bool
		if ref, there, err = c.Keys.Find(ctx, name, alg, after); there {
			would = append(would, fmt.Sprintf("%s with the key %s, which is there", done, ref))
		} else {
			would = append(would, fmt.Sprintf("%s with a new key, %s (%s)", done, ref, alg))
		}
	}
	if err := c.notOrphaned(s.logKey != ""); err != nil {
		return nil, err
	}
	if s.verifier == "" {
		add("audit log "+LogDir(c.Dir)+" begun", logKey, keystore.Ed25519, 0)
	} else {
		err = c.logThere(ctx, s)
	}
	if _, ok := oldest(s.rows, ca.KindControl); !ok {
		add("control CA made", ControlKey, c.Algorithm, 0)
	}
	if err != nil {
		return nil, err
	}
	if c.Upstream != nil {
		root, err := c.rehearseRoot(ctx, s)
		return append(would, root...), err
	}
	if _, ok, err := c.awaited(s.rows, s.bundle); err != nil {
		return nil, err
	} else if !ok {
		add("intermediate requested", IntermediateKey, c.Algorithm, c.newestKey(ctx, c.Algorithm, s.rows))
	}
	return would, err
}

func (c *InitConfig) standing(ctx context.Context) (s standing, err error) {
	st, err := store.Open(ctx, store.Config{Path: databasePath(c.Dir), ReadOnly: true})
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	for _, fact := range c.facts() {
		if err := st.MayMeta(ctx, fact[0], fact[1]); err != nil {
			return s, err
		}
	}
	if s.logKey, _, err = st.Meta(ctx, logKeyFact); err != nil {
		return s, err
	}
	if s.verifier, _, err = st.Meta(ctx, verifierFact); err != nil {
		return s, err
	}
	if s.rows, _, err = st.Authorities(ctx); err != nil {
		return s, err
	}
	s.bundle, _, err = st.Bundle(ctx, c.TrustDomain)
	return s, err
}

// logThere: once it was begun, log and key must be there.
func (c *InitConfig) logThere(ctx context.Context, s standing) error {
	if _, err := c.key(ctx, s.logKey); err != nil {
		return err
	}
	log, err := audit.OpenReader(LogDir(c.Dir), s.verifier)
	if err != nil {
		return err
	}
	_, err = log.Checkpoint(ctx)
	return errors.Join(err, log.Close())
}

// rehearseRoot is begin without writing.
func (c *InitConfig) rehearseRoot(ctx context.Context, s standing) (would []string, err error) {
	if !s.bundle.IsZero() {
		return nil, c.trusted(s.bundle)
	}
	root, err := c.firstRoot(ctx)
	if err == nil {
		set := &authorities{td: c.TrustDomain}
		_, err = set.addRoot(c.Rotation.Policy, rotation.World{}, root, c.Now())
	}
	if err != nil {
		return nil, fmt.Errorf("give cluster %s its root: %w", c.Cluster, err)
	}
	return []string{"root " + ca.CertificateFingerprint(root.Raw) + " trusted"}, nil
}
