package check

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/durable"
)

const (
	// Shares of a CA's life that are left.
	lifeWarning = 1.0 / 3
	lifeError   = 1.0 / 10
	// allowedSkew is how far two clocks may be apart; certificates are backdated by more.
	allowedSkew = time.Minute
	// scarceBudget is an outage that nobody has time to mend.
	scarceBudget = 15 * time.Minute
	dialTimeout  = 2 * time.Second
)

// Expiry looks at how much of a certificate's life is left.
func Expiry(about string, c *x509.Certificate, now time.Time, mend string) Findings {
	return Life(about, c.NotBefore, c.NotAfter, now, mend)
}

// Life looks at how much of a life is left, in shares of it: what is short for ten years is long for an hour.
func Life(about string, from, until, now time.Time, mend string) (found Findings) {
	left := until.Sub(now)
	share := float64(left) / float64(until.Sub(from))
	message := fmt.Sprintf("%.0f %% of its life are left, until %s, in %s", share*100, stamp(until), short(left))
	switch {
	case now.Before(from):
		found.add(CodeClock, Error, about, fmt.Sprintf("it begins at %s, and it is %s here: the clock is behind", stamp(from), stamp(now)), mendClock)
	case left <= 0:
		found.add(CodeExpiry, Error, about, fmt.Sprintf("it expired at %s", stamp(until)), mend)
	case share < lifeError:
		found.add(CodeExpiry, Error, about, message, mend)
	case share < lifeWarning:
		found.add(CodeExpiry, Warning, about, message, mend)
	default:
		found.add(CodeExpiry, OK, about, message, "")
	}
	return found
}

// IssuerLife is Life of a CA whose certificates have to live for least: it is of use until that much before its end.
func IssuerLife(about string, from, until time.Time, least time.Duration, now time.Time, mend string) Findings {
	found := Life(about, from, until, now, mend)
	last := until.Add(time.Second - least) // until is inclusive (RFC 5280 §4.1.2.5)
	switch f := &found[0]; {
	case now.After(until) || now.Before(from):
	case !now.Before(last):
		f.Level, f.Mend = Error, mend
		f.Message = fmt.Sprintf("it ends at %s, too soon for a certificate that lives %s: it was of use until %s", stamp(until), short(least), stamp(last))
	case f.Level != OK:
		f.Message += "; it can sign until " + stamp(last)
	}
	return found
}

// Successor looks at a CA that is to take over: before its life begins it stands by, and the clock is not to blame.
func Successor(about string, from, until time.Time, least time.Duration, now time.Time, mend string) (found Findings) {
	if !now.Before(from) {
		return IssuerLife(about, from, until, least, now, mend)
	}
	found.add(CodeExpiry, OK, about, fmt.Sprintf("it stands by: its life begins at %s, in %s, and ends at %s", stamp(from), short(from.Sub(now)), stamp(until)), "")
	return found
}

// Left says how long a server may stay away from an agent: until the first certificate that is in use ends. It is worth a
// warning only while the server is away.
func Left(about string, from, until, now time.Time, away bool) (found Findings) {
	level := OK
	if share := float64(until.Sub(now)) / float64(until.Sub(from)); away && share < lifeError {
		level = Error
	} else if away && share < lifeWarning {
		level = Warning
	}
	found.add(CodeBudget, level, about, fmt.Sprintf("the first certificate in use ends at %s, in %s: so long the server may be away", stamp(until), short(until.Sub(now))), "")
	return found
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// Key holds a key against the certificate it should belong to. open is asked for the key.
func Key(about string, c *x509.Certificate, open func() (crypto.PublicKey, error), mend string) (found Findings) {
	key, err := open()
	if err != nil {
		found.add(CodeKey, Unknown, about, fmt.Sprintf("its key could not be opened: %v", err), mend)
		return found
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	switch {
	case err != nil:
		found.add(CodeKey, Unknown, about, fmt.Sprintf("its key could not be read: %v", err), mend)
	case !bytes.Equal(spki, c.RawSubjectPublicKeyInfo):
		found.add(CodeKey, Error, about, "its key is not the one in its certificate", mend)
	default:
		found.add(CodeKey, OK, about, "its key belongs to its certificate", "")
	}
	return found
}

// Exposed says that the private key of a CA can have left where it is kept, though it signs, if the key can tell. That stops
// nothing: it is a promise that was broken.
func Exposed(about string, control bool, state ca.State, key any) (found Findings) {
	k, ok := key.(interface{ Exposed() string })
	if !ok || k.Exposed() == "" {
		return nil
	}
	level, mend := Error, mendExposed+mendTaint+about
	message := "its private key can be taken out of Vault: take it for lost unless it is known that nobody has; "
	switch {
	case control:
		mend = ""
		message += "who has it can be this cluster's server, agents and admins, and since the control CA has no rotation, only a cluster made anew ends that (signet cluster init, another keystore.transit.prefix)"
	case state == ca.Retired:
		level, mend = Warning, mendTaint+about
		message += "it signs no more, but what is made with a copy is accepted"
	default:
		message += "no new version is made of it, so the next rotation fails"
	}
	found.add(CodeKey, level, about, message+" ("+k.Exposed()+")", mend)
	return found
}

const (
	mendTaint = "signet ca taint --config FILE --reason TEXT "
	// mendExposed has the next key made elsewhere: all versions of a key in Transit can leave when one can.
	mendExposed = "set keystore.intermediates to file, or to memory if an upstream signs, leave keystore.transit as it is, and restart; then: signet rotation start --config FILE intermediate; then, unless nobody can have taken the key: "
)

// Budget says how long the server may be away, when certificates of this life are renewed with least of it left.
func Budget(life, least time.Duration) (found Findings) {
	level, mend := OK, ""
	if least < scarceBudget {
		level, mend = Warning, "set a longer leaf.ttl"
	}
	found.add(CodeBudget, level, "leaf.ttl", fmt.Sprintf("the server may be away %s before the first identity of %s dies", short(least), short(life)), mend)
	return found
}

// short writes a duration without zero parts at its end: 9h36m, not 9h36m0s.
func short(d time.Duration) string {
	s := d.Round(time.Second).String()
	for _, zero := range []string{"m0s", "h0m"} {
		if n := len(s) - len(zero); n > 0 && s[n:] == zero {
			s = s[:n+1]
		}
	}
	return s
}

// Socket looks whether somebody answers on a Unix socket.
func Socket(path, who, start string) (found Findings) {
	c, err := net.DialTimeout("unix", path, dialTimeout)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		if errors.Is(err, fs.ErrPermission) {
			found.add(CodeSocket, Unknown, path, fmt.Sprintf("whether the %s runs could not be told: %v", who, err), "")
			return found
		}
		found.add(CodeSocket, Error, path, fmt.Sprintf("no %s answers: %v", who, err), start)
		return found
	}
	c.Close()
	found.add(CodeSocket, OK, path, "the "+who+" answers", "")
	return found
}

// Log looks at an audit log: the checkpoint's signature, its right edge, and the time of the last entry. With an empty
// verifier key it is held against its own word.
func Log(ctx context.Context, dir, verifierKey string, now time.Time) (found Findings) {
	const mend = "signet log verify --dir "
	broken := func(err error) Findings {
		level := Unknown
		if errors.Is(err, audit.ErrDamaged) || errors.Is(err, audit.ErrBadProof) {
			level = Error
		}
		found.add(CodeLog, level, dir, fmt.Sprintf("the log does not pass: %v", err), mend+dir)
		return found
	}
	r, err := audit.OpenReader(dir, verifierKey)
	if err != nil {
		return broken(err)
	}
	defer r.Close()
	cp, err := r.Checkpoint(ctx)
	if err != nil {
		return broken(err)
	}
	if cp.Size == 0 {
		found.add(CodeLog, OK, dir, "the checkpoint is signed; the log has no entries yet", "")
		return found
	}
	last, err := r.Proven(ctx, cp.Size-1)
	if err != nil {
		return broken(err)
	}
	at := last.Facts.Time
	found.add(CodeLog, OK, dir, fmt.Sprintf("the checkpoint of %d entries is signed and holds the last one, of %s", cp.Size, stamp(at)), "")
	if at.Sub(now) > allowedSkew {
		found.add(CodeClock, Error, dir, fmt.Sprintf("the last entry of the log is of %s, and it is %s here: the clock went back", stamp(at), stamp(now)), mendClock)
	} else {
		found.add(CodeClock, OK, dir, "the clock is not behind the log's last entry", "")
	}
	return found
}

// maxCheckpoint bounds a checkpoint's file, in bytes.
const maxCheckpoint = 64 << 10

// Witness looks at the newest checkpoint that an agent has seen of its server's log, and whether the log has contradicted
// itself since: then the evidence lies beside it.
func Witness(path, verifierKey string) (found Findings) {
	if _, err := os.Lstat(path + ".evidence"); err == nil {
		found.add(CodeLog, Error, path, "the server's audit log has contradicted what this agent had seen: the evidence is in "+path+".evidence", "signet log verify --dir DIR")
		return found
	}
	raw, err := durable.ReadFile(path, "checkpoint", maxCheckpoint)
	if errors.Is(err, fs.ErrNotExist) {
		found.add(CodeLog, OK, path, "no checkpoint of the server's log was seen yet", "")
		return found
	}
	if err != nil {
		found.add(CodeLog, Unknown, path, fmt.Sprintf("the newest checkpoint seen could not be read: %v", err), "")
		return found
	}
	cp, err := audit.ParseCheckpoint(raw, verifierKey)
	if err != nil {
		found.add(CodeLog, Error, path, fmt.Sprintf("the newest checkpoint seen does not pass: %v", err), "")
		return found
	}
	found.add(CodeLog, OK, path, fmt.Sprintf("the newest checkpoint seen of %s has %d entries", cp.Origin, cp.Size), "")
	return found
}

// Seal says what protects an agent's keys at rest; local = a secret that lies beside them.
func Seal(dir string, local bool) (found Findings) {
	message := "keys at rest are sealed with a passphrase that does not lie beside them"
	if local {
		message = "keys at rest are protected by file mode alone: no seal is configured"
	}
	found.add(CodeSeal, OK, dir, message, "")
	return found
}

// Unusable is what can't be read at all.
func Unusable(code, about string, err error, mend string) Findings {
	return Findings{{Code: code, Level: Unknown, About: about, Message: err.Error(), Mend: mend}}
}
