package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

// prove finds every serial that was seen on the wire in its cluster's log, and proves its inclusion.
func (d *demo) prove(ctx context.Context) (string, error) {
	for _, c := range d.clusters() {
		for _, serial := range d.seen.serials(c) {
			if err := lab.Until(ctx, "serial "+serial+" in "+c.Name+"'s log", 30*time.Second, func() error {
				_, err := d.Run(ctx, "log", "prove", "--config", c.Config(), "--serial", serial)
				return err
			}); err != nil {
				return "", err
			}
			d.proven++
		}
		if _, err := d.Refuses(ctx, "log", "prove", "--config", c.Config(), "--serial", "00c0ffee"); err != nil {
			return "", fmt.Errorf("a serial that was never issued: %w", err)
		}
	}
	if d.proven == 0 {
		return "", errors.New("no serial was seen")
	}
	return fmt.Sprintf("%d serials proven; one that was never issued is not", d.proven), nil
}

// tamper changes one byte in a copy of east's log.
func (d *demo) tamper(ctx context.Context) (string, error) {
	copied := d.east.Path("log-copy")
	// The server goes on writing there, and what it writes beside a file and then renames may be gone when it is to be copied.
	if err := lab.Until(ctx, "a copy of east's log", 20*time.Second, func() error {
		return errors.Join(os.RemoveAll(copied), os.CopyFS(copied, os.DirFS(d.east.Path("state", "log"))))
	}); err != nil {
		return "", err
	}
	var show struct {
		VerifierKey string `json:"verifier_key"`
		Size        uint64 `json:"size"`
	}
	if err := d.JSON(ctx, &show, "log", "show", "--dir", copied); err != nil {
		return "", err
	}
	if show.VerifierKey == "" || show.Size == 0 {
		return "", errors.New("log show gives no verifier key or no size")
	}
	verify := []string{"log", "verify", "--dir", copied, "--key", show.VerifierKey}
	if _, err := d.Run(ctx, verify...); err != nil {
		return "", fmt.Errorf("the copy as it was: %w", err)
	}
	bundle := firstEntries(copied, show.Size)
	data, err := os.ReadFile(bundle)
	if err != nil {
		return "", err
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(bundle, data, 0o600); err != nil {
		return "", err
	}
	if _, err := d.Refuses(ctx, verify...); err != nil {
		return "", err
	}
	d.refused++
	return "the copy verified, then one bit of an entry was turned, and it did not", nil
}

// firstEntries is the file that holds the first entries of a log of that size (c2sp.org/tlog-tiles): a full bundle of 256,
// or the partial one that the checkpoint covers; wider ones are of entries that came after it.
func firstEntries(dir string, size uint64) string {
	const bundle = 256
	path := filepath.Join(dir, "tile", "entries", "000")
	if size < bundle {
		path = filepath.Join(path+".p", strconv.FormatUint(size, 10))
	}
	return path
}
