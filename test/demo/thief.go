package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

// stolen is what somebody has made with the key of an issuer: for each sidecar a certificate of the one that it lets in.
type stolen struct {
	issuer *issuer
	certs  map[*sidecar]tls.Certificate
}

// steal opens the key file of one of east's issuers with its passphrase, and forges with it.
func (r *rotating) steal(ctx context.Context, from *issuer) (stolen, error) {
	x := stolen{issuer: from, certs: map[*sidecar]tls.Certificate{}}
	cert, key, err := r.east.openIssuer(ctx, from.chain)
	if err != nil {
		return x, err
	}
	for _, w := range r.ways {
		forged, err := forge(w.from.id, cert, key)
		if err != nil {
			return x, err
		}
		x.certs[w.to] = *forged
	}
	return x, nil
}

// everyEnvoy tries forged certificates at all sidecars. Those are up and let honest workloads in, so that one which is
// simply shut doesn't pass for one that refuses.
func (r *rotating) everyEnvoy(ctx context.Context, x stolen, accepted bool) error {
	for _, s := range r.sidecars() {
		if _, err := r.guestIsIn(ctx, s); err != nil {
			return err
		}
		var err error
		// Of a refusal nothing may be heard but the end of the connection, if the request was being written just then.
		if err := lab.Until(ctx, fmt.Sprintf("%s answers, or refuses by an alert", s), 20*time.Second, func() error {
			if err = ask(ctx, s.in, x.certs[s]); !accepted && err != nil && !strings.Contains(err.Error(), "tls: ") {
				return fmt.Errorf("it failed, but not as a refusal: %w", err)
			}
			return nil
		}); err != nil {
			return err
		}
		switch {
		case accepted && err != nil:
			return fmt.Errorf("%s does not accept what was forged with the key of %s: %w", s, x.issuer.id, err)
		case !accepted && err == nil:
			return fmt.Errorf("%s accepts what was forged with the key of %s", s, x.issuer.id)
		}
	}
	return nil
}

// guestIsIn waits until a sidecar lets the guest in, and returns the certificate that opened. What nobody holds a stream for is
// fetched with the life that it has left, which may be a moment.
func (r *rotating) guestIsIn(ctx context.Context, s *sidecar) (tls.Certificate, error) {
	var cert tls.Certificate
	err := lab.Until(ctx, fmt.Sprintf("%s lets %s in", s, r.guest), time.Minute, func() (err error) {
		if cert, err = r.east.fetchSVID(ctx, r.guest); err != nil {
			return err
		}
		return ask(ctx, s.in, cert)
	})
	return cert, err
}

func (r *rotating) taint(ctx context.Context) (_ string, err error) {
	lost := r.newest(r.east)
	if r.thief, err = r.steal(ctx, lost); err != nil {
		return "", err
	}
	if err := r.everyEnvoy(ctx, r.thief, true); err != nil {
		return "", err
	}
	r.say("the thief opened the key file of %s; all four Envoys accept what he forges", lost)
	if _, err := r.Run(ctx, "ca", "taint", "--config", r.east.Config(), lost.id, "--reason", "its key was stolen", "--yes"); err != nil {
		return "", err
	}
	s, err := r.status(ctx, r.east)
	if err != nil {
		return "", err
	}
	for _, by := range s.acceptedBy() {
		if !by.Bundle || by.Agents != 1 {
			return "", fmt.Errorf("rotation status says of cluster %s that %+v accept a forged certificate: want its trust bundle and its agent", by.Cluster, by)
		}
	}
	if n := len(s.acceptedBy()); n != 2 {
		return "", fmt.Errorf("rotation status says that %d clusters accept a forged certificate: want both", n)
	}
	return lost.id + " is tainted; rotation status names the trust bundles and the agents of both clusters as those that accept a forged certificate", nil
}

func (r *rotating) reissue(ctx context.Context) (string, error) {
	began := time.Now()
	if _, err := r.startRotation(ctx, r.east, r.b, "intermediate"); err != nil {
		return "", err
	}
	if err := lab.Until(ctx, "no agent uses a leaf of "+r.thief.issuer.id, time.Minute, func() error {
		s, err := r.status(ctx, r.east)
		switch {
		case err != nil:
			return err
		case s.Reissue == nil: // before the other issuer signs, and after the last leaf of this one
			return r.is(ctx, r.east, r.thief.issuer.id, "removed")
		case s.Reissue.Holding > 0:
			return fmt.Errorf("rotation status says %+v", *s.Reissue)
		}
		return nil
	}); err != nil {
		return "", err
	}
	r.say("no agent uses a leaf of %s %.1f s after another issuer was asked for", r.thief.issuer.id, time.Since(began).Seconds())
	shown, err := r.untilShown(ctx, began)
	if err != nil {
		return "", err
	}
	// The root above is still believed: re-issue alone doesn't shut him out.
	if err := r.everyEnvoy(ctx, r.thief, true); err != nil {
		return "", err
	}
	return shown + "; what the thief forges is still accepted, as root B is believed", nil
}

func (r *rotating) thiefIsOut(ctx context.Context) (string, error) {
	began := time.Now()
	if err := r.removed(ctx, r.b, r.c); err != nil {
		return "", err
	}
	if err := lab.Until(ctx, "every Envoy refuses what the thief forged", 20*time.Second, func() error { return r.everyEnvoy(ctx, r.thief, false) }); err != nil {
		return "", err
	}
	if err := r.exchange(ctx, "rotation status says that nobody accepts a forged certificate", func() error {
		return r.inBoth(func(c *cluster) error {
			s, err := r.status(ctx, c)
			switch {
			case err != nil:
				return err
			case len(s.Tainted) != 1 || s.accepting() > 0:
				return fmt.Errorf("%s says: %+v", c.Name, s.Tainted)
			}
			return nil
		})
	}); err != nil {
		return "", err
	}
	r.refused += len(r.sidecars())
	return fmt.Sprintf("root B was removed after %.1f s; rotation status of both clusters: nobody accepts a forged certificate", time.Since(began).Seconds()), nil
}

// ban bans the guest in east: it gets nothing any more, and what it has copied ends with its short life.
func (r *rotating) ban(ctx context.Context) (string, error) {
	var copied tls.Certificate
	if err := lab.Until(ctx, "before the ban the agent holds a certificate of "+r.guest, 20*time.Second, func() (err error) {
		if copied, err = r.guestIsIn(ctx, r.west.backend); err != nil {
			return err
		}
		held, err := r.holds(ctx, r.east.agent, r.guestID)
		if err == nil && !held {
			err = errors.New("it does not")
		}
		return err
	}); err != nil {
		return "", err
	}
	if _, err := r.Run(ctx, "identity", "ban", "--config", r.east.Config(), r.guestID, "--reason", "was broken into"); err != nil {
		return "", err
	}
	began, renewed := time.Now(), map[*sidecar]int{}
	for _, s := range r.sidecars() {
		renewed[s] = r.seen.renewed(s)
	}
	if err := lab.Until(ctx, r.guest+" is refused by its agent", 20*time.Second, func() error {
		if _, err := r.Refuses(ctx, "svid", "fetch", "--socket", r.east.Path("run", r.guest+".sock")); err != nil {
			return err
		}
		held, err := r.holds(ctx, r.east.agent, r.guestID)
		if err == nil && held {
			err = errors.New("the agent holds its certificate")
		}
		return err
	}); err != nil {
		return "", err
	}
	r.say("%.1f s after the ban the agent refuses %s, and has purged its certificate", time.Since(began).Seconds(), r.guest)
	late := false
	if err := lab.Until(ctx, "a copy of "+r.guest+"'s last certificate is refused", time.Minute, func() error {
		over := time.Now().After(copied.Leaf.NotAfter.Add(time.Second)) // which it is good in until its end
		if err := ask(ctx, r.west.backend.in, copied); err != nil {
			return nil //nolint:nilerr // as it is to be
		}
		late = late || over
		return errors.New("west's backend accepts it")
	}); err != nil {
		return "", err
	}
	if late {
		return "", fmt.Errorf("west's backend accepted a copy of %s's last certificate after its end", r.guest)
	}
	r.refused += 2
	if err := lab.Until(ctx, "all others are renewed after the ban", loadLimit, func() error {
		for _, s := range r.sidecars() {
			if r.seen.renewed(s) == renewed[s] {
				return fmt.Errorf("%s is not", s)
			}
		}
		return nil
	}); err != nil {
		return "", err
	}
	return fmt.Sprintf("a copy of its last certificate was refused %.1f s after the ban; all others were renewed meanwhile", time.Since(began).Seconds()), nil
}

// holds reports whether an agent has a certificate of an identity.
func (r *rotating) holds(ctx context.Context, a *lab.Agent, id string) (bool, error) {
	var s struct {
		Identities []struct {
			SPIFFEID string `json:"spiffe_id"`
			Serial   string `json:"serial"`
		} `json:"identities"`
	}
	if err := r.JSON(ctx, &s, "agent", "status", "--config", a.Config()); err != nil {
		return false, err
	}
	for _, i := range s.Identities {
		if i.SPIFFEID == id && i.Serial != "" {
			return true, nil
		}
	}
	return false, nil
}
