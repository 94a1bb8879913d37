package pki

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/vault"
)

// Look says, without a signature, who would sign an intermediate of this life under a root, as far as it could be seen, and when
// the first certificate between the two ends, the root's own left out (zero = there is none). The error says why nobody would;
// where it has a method Away that returns true, it could not be told.
func (u *Upstream) Look(ctx context.Context, under *x509.Certificate, life time.Duration) (what string, ends time.Time, err error) {
	candidates, err := u.under(ctx, under)
	for _, c := range candidates {
		var unfit error
		if what, unfit = u.look(ctx, c, life); unfit == nil {
			for _, cert := range append(slices.Clip(c.path), c.cert) {
				if !cert.Equal(under) && (ends.IsZero() || cert.NotAfter.Before(ends)) {
					ends = cert.NotAfter
				}
			}
			return what, ends, nil
		}
		if err == nil {
			err = fmt.Errorf("%s, %s: %w", u, c, unfit)
		}
	}
	if errors.Is(err, vault.ErrAway) || errors.Is(err, vault.ErrLogin) {
		err = awayError{err}
	}
	return "", time.Time{}, err
}

// look looks at one issuer.
func (u *Upstream) look(ctx context.Context, c candidate, life time.Duration) (what string, err error) {
	now := u.c.Now()
	if err := clamp(&ca.Plan{NotAfter: now.Add(life)}, c, now); err != nil {
		return "", err
	}
	what = fmt.Sprintf("%s of %s leads to the root", c, u)
	path := u.c.Mount + "/issuer/" + c.ref
	secret, err := u.vault.Read(ctx, path)
	if errors.Is(err, vault.ErrDenied) && !errors.Is(err, vault.ErrLogin) {
		return fmt.Sprintf("%s; whether it has its key and may sign is not seen, for the policy lacks read on %s", what, path), nil
	}
	if err != nil {
		return "", err
	}
	usage, told := secret.Data["usage"].(string)
	switch key, hasKey := secret.Data["key_id"].(string); {
	case hasKey && key == "":
		return "", fmt.Errorf("its key is not in this mount: import it, or name another issuer (`vault list -detailed %s/issuers`)", u.c.Mount)
	case told && !slices.Contains(strings.Split(usage, ","), signing):
		return "", fmt.Errorf("it may not sign, its usage is %s: `vault patch %s usage=%s`", clip(usage), path, clip(strings.TrimPrefix(usage+","+signing, ",")))
	case !hasKey || !told:
		return what, nil
	}
	return what + ", has its key and may sign", nil
}

// signing is Vault's word for what an issuer needs to be allowed.
const signing = "issuing-certificates"

// awayError says that nothing could be told now.
type awayError struct{ error }

func (e awayError) Unwrap() error { return e.error }

// Away reports that it may pass.
func (awayError) Away() bool { return true }
