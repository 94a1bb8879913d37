package config

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/strictyaml"
	"github.com/signet-ca/signet/keystore"
)

// check finds what a server's values can't be, alone or together.
func (s *Server) check(o origin) {
	if s.TrustDomain.IsZero() {
		o.Find("trust_domain", "trust_domain is missing: name the trust domain, for example trust_domain: example.org")
	} else if _, err := identity.ParseTrustDomain(s.TrustDomain.Name()); err != nil {
		o.Find("trust_domain", "%v", err)
	}
	if s.Cluster == "" {
		o.Find("cluster", "cluster is missing: name the cluster, for example cluster: east")
	} else if err := identity.ParseName("cluster", s.Cluster); err != nil {
		o.FindError("cluster", err)
	} else {
		o.FindError("instance", identity.ParseName("instance", s.Instance))
	}
	o.checkPassphrase("keystore", s.Keystore.PassphraseFile, s.Keystore.PassphraseCredential)
	if alg, err := keystore.ParseAlgorithm(string(s.Keystore.Algorithm)); err != nil {
		o.FindError("keystore.algorithm", err)
	} else if alg == keystore.Ed25519 {
		o.Find("keystore.algorithm", "CA keys can't be ed25519, because Envoy takes no Ed25519 certificates: use ecdsa-p256")
	}
	s.checkVault(o)
	s.checkListen(o)
	o.checkSocket("admin_socket", s.AdminSocket)

	o.wholeSeconds("leaf.ttl", s.Leaf.TTL)
	o.wholeSeconds("leaf.max_ttl", s.Leaf.MaxTTL)
	o.wholeSeconds("leaf.backdate", s.Leaf.Backdate)
	o.wholeSeconds("control.ttl", s.Control.TTL)
	switch l := s.Leaf; {
	case l.TTL < identity.MinTTL:
		o.Find("leaf.ttl", "leaf.ttl %s is shorter than the least useful life of %s", l.TTL, identity.MinTTL)
	case l.TTL > l.MaxTTL:
		o.Find("leaf.ttl", "leaf.ttl %s is longer than leaf.max_ttl %s: lower the one or raise the other", l.TTL, l.MaxTTL)
	case l.MinUsefulLife < 0:
		o.Find("leaf.min_useful_life", "leaf.min_useful_life %s is negative: leave it out for the default", l.MinUsefulLife)
	case l.MinUsefulLife > l.TTL:
		o.Find("leaf.min_useful_life", "leaf.min_useful_life %s is longer than leaf.ttl %s, so that nothing could ever be issued: lower it", l.MinUsefulLife, l.TTL)
	}
	o.within("leaf.backdate", s.Leaf.Backdate, time.Second, MaxBackdate)
	if s.Control.TTL < MinControlTTL {
		o.Find("control.ttl", "control.ttl %s is shorter than the least useful %s", s.Control.TTL, MinControlTTL)
	}
	o.between("limits.certificates_per_second", s.Limits.CertificatesPerSecond, 1, MaxLimit)
	o.between("limits.burst", s.Limits.Burst, MinBurst, MaxLimit)
	s.checkRotation(o)
	o.within("log.checkpoint_interval", s.Log.CheckpointInterval, MinCheckpointInterval, MaxCheckpointInterval)
	s.Logging.check(o)
}

func (s *Server) checkRotation(o origin) {
	r := s.Rotation
	o.between("rotation.quorum", r.Quorum, 1, 100)
	o.between("rotation.reissue_rate", r.ReissueRate, 1, MaxLimit)
	o.within("rotation.delay", r.Delay, 0, MaxDelay)
	o.within("rotation.report_life", r.ReportLife, MinReportLife, MaxReportLife)
	switch {
	case r.Skew < 0:
		o.Find("rotation.skew", "rotation.skew %s is negative: 0s says that all clocks agree", r.Skew)
	case r.Skew >= r.ReportLife/2:
		o.Find(o.one("rotation.skew", "rotation.report_life"), "rotation.skew %s is not less than half of rotation.report_life %s, so that a report could be over before it comes: lower the one or raise the other", r.Skew, r.ReportLife)
	}
	switch {
	case r.PrepareAt <= 0 || r.PrepareAt >= 1:
		o.Find("rotation.prepare_at", "rotation.prepare_at %v: want a fraction of an intermediate's life, more than 0 and less than 1", r.PrepareAt)
	case r.SwitchAt <= 0 || r.SwitchAt >= 1:
		o.Find("rotation.switch_at", "rotation.switch_at %v: want a fraction of an intermediate's life, more than 0 and less than 1", r.SwitchAt)
	case r.PrepareAt >= r.SwitchAt:
		o.Find(o.one("rotation.prepare_at", "rotation.switch_at"), "rotation.prepare_at %v is not before rotation.switch_at %v: a successor has to be there before it takes over", r.PrepareAt, r.SwitchAt)
	}
	s.checkPeers(o)
}

func (s *Server) checkPeers(o origin) {
	if len(s.Rotation.Peers) > MaxPeers {
		o.Find("rotation.peers", "rotation.peers lists %d clusters: at most %d are allowed", len(s.Rotation.Peers), MaxPeers)
		return
	}
	seen := map[string]bool{s.Cluster: true}
	for i, p := range s.Rotation.Peers {
		at := fmt.Sprintf("rotation.peers[%d]", i)
		switch err := identity.ParseName("cluster", p.Cluster); {
		case err != nil:
			o.FindError(at+".cluster", err)
		case p.Cluster == s.Cluster:
			o.Find(at+".cluster", "%s: %s is this cluster itself: name the others", at, p.Cluster)
			continue
		case seen[p.Cluster]:
			o.Find(at+".cluster", "%s: cluster %s is listed already: keep one of them", at, p.Cluster)
		}
		seen[p.Cluster] = true
		if len(p.LogVerifierKey) > maxVerifierKey {
			o.Find(at+".log_verifier_key", "%s.log_verifier_key has %d bytes: at most %d are allowed", at, len(p.LogVerifierKey), maxVerifierKey)
			continue
		}
		of := s.TrustDomain.Name() + "/" + p.Cluster + "/"
		switch v, err := note.NewVerifier(p.LogVerifierKey); {
		case err != nil:
			o.Find(at+".log_verifier_key", "%s.log_verifier_key is no verifier key: give the one that `signet cluster show` prints in cluster %s", at, p.Cluster)
		case !strings.HasPrefix(v.Name(), of):
			o.Find(at+".log_verifier_key", "%s.log_verifier_key is of the log %q, and a log of cluster %s begins with %q: give the one that `signet cluster show` prints there", at, v.Name(), p.Cluster, of)
		}
	}
}

// one names the first of two keys that a file gives.
func (o origin) one(key, other string) string {
	if o.Given(key) {
		return key
	}
	return other
}

func (s *Server) checkListen(o origin) {
	l := s.Listen
	doors := []struct{ key, addr string }{
		{"listen.enrol", l.Enrol}, {"listen.agents", l.Agents}, {"listen.http", l.HTTP},
	}
	for i, d := range doors {
		if err := checkAddress(d.addr); err != nil {
			o.Find(d.key, "%s: %v", d.key, err)
			continue
		}
		for _, e := range doors[:i] {
			if collide(e.addr, d.addr) {
				key := d.key
				if !o.Given(key) {
					key = e.key
				}
				o.Find(key, "%s %s and %s %s are the same address: each door needs a port of its own", e.key, e.addr, d.key, d.addr)
			}
		}
	}
	for _, a := range []struct{ key, addr, from string }{
		{"listen.advertise_enrol", l.AdvertiseEnrol, "listen.enrol"},
		{"listen.advertise_agents", l.AdvertiseAgents, "listen.agents"},
	} {
		if !o.Given(a.key) {
			if checkAddress(a.addr) == nil && everywhere(a.addr) {
				o.Find(a.from, "%s %s is every address of this machine, which nobody can dial: add %s with the host:port that agents reach", a.from, a.addr, a.key)
			}
			continue
		}
		if err := checkAddress(a.addr); err != nil {
			o.Find(a.key, "%s: %v", a.key, err)
		} else if everywhere(a.addr) {
			o.Find(a.key, "%s %s names no host that could be dialled: give a name or an address", a.key, a.addr)
		}
	}
}

// CheckLoopback refuses a server that anybody outside this machine could reach, for development mode.
func (s *Server) CheckLoopback() error {
	for _, a := range []string{s.Listen.Enrol, s.Listen.Agents, s.Listen.HTTP} {
		host, _, err := net.SplitHostPort(a)
		if err != nil {
			return fmt.Errorf("listen address %s: %w", a, err)
		}
		if ip, err := netip.ParseAddr(host); err != nil || !ip.Unmap().IsLoopback() {
			return fmt.Errorf("development mode listens on loopback only, but %s is not: use 127.0.0.1 or [::1], or run without --dev", a)
		}
	}
	return nil
}

func (a *Agent) check(o origin) {
	o.checkPassphrase("seal", a.Seal.PassphraseFile, a.Seal.PassphraseCredential)
	o.checkSocket("socket", a.Socket)
	if len(a.Sockets) > maxSockets {
		o.Find("sockets", "sockets lists %d sockets: at most %d are allowed", len(a.Sockets), maxSockets)
		return
	}
	names, paths := map[string]bool{}, map[string]bool{a.Socket: true}
	for i, s := range a.Sockets {
		key := fmt.Sprintf("sockets[%d]", i)
		switch {
		case s.Name == "":
			o.Find(key+".name", "%s has no name: give the one that the registration's selector socket:<name> uses", key)
		case names[s.Name]:
			o.Find(key+".name", "%s: the name %s is already another socket's: each needs its own", key, s.Name)
		default:
			o.FindError(key+".name", identity.ParseName("socket", s.Name))
		}
		switch {
		case s.Path == "":
			o.Find(key+".path", "%s has no path: say where the socket is to be", key)
		case paths[s.Path]:
			o.Find(key+".path", "%s: the path %s is already another socket's: each needs its own", key, s.Path)
		default:
			o.checkSocket(key+".path", s.Path)
		}
		names[s.Name], paths[s.Path] = true, true
	}
	o.oneOf("sds.validator", a.SDS.Validator, ValidatorSPIFFE, ValidatorTrustedCA)
	if err := checkAddress(a.HTTP); err != nil {
		o.Find("http", "http: %v", err)
	}
	a.Logging.check(o)
}

func (l Logging) check(o origin) {
	o.oneOf("logging.level", l.Level, "debug", "info", "warn", "error")
	o.oneOf("logging.format", l.Format, "auto", "json", "text")
}

func (o origin) checkPassphrase(section, file, credential string) {
	if file != "" && credential != "" {
		o.Find(section+".passphrase_credential", "%s names both a passphrase_file and a passphrase_credential: keep one of them", section)
	}
	if strings.ContainsAny(credential, "/\x00") || credential == "." || credential == ".." {
		o.Find(section+".passphrase_credential", "%s.passphrase_credential %.64q: give the bare name of a systemd credential", section, credential)
	}
}

func (o origin) checkSocket(key, path string) {
	if len(path) > maxSocketPath {
		o.Find(key, "%s: the path of a Unix socket has at most %d bytes, but %.256q has %d: choose a shorter one", key, maxSocketPath, path, len(path))
	}
}

func (o origin) wholeSeconds(key string, d time.Duration) {
	if d%time.Second != 0 {
		o.Find(key, "%s %s: X.509 counts in whole seconds", key, d)
	}
}

func (o origin) within(key string, d, low, high time.Duration) {
	if d < low || d > high {
		o.Find(key, "%s %s: want %s to %s", key, d, short(low), short(high))
	}
}

func (o origin) between(key string, n, low, high int) {
	if n < low || n > high {
		o.Find(key, "%s %d: want %d to %d", key, n, low, high)
	}
}

func (o origin) oneOf(key, value string, allowed ...string) {
	if slices.Contains(allowed, value) {
		return
	}
	o.Find(key, "%s %.64q is unknown: use %s%s", key, value, strings.Join(allowed, ", "), strictyaml.DidYouMean(value, allowed))
}

// checkAddress wants host:port with a real port; the host may be empty, an address or a name.
func checkAddress(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%.256q is not host:port, for example 127.0.0.1:7441", addr)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("%.256q: want a port from 1 to 65535", addr)
	}
	if strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r == '/' || r == '@' || r > '~' }) || len(host) > 253 {
		return fmt.Errorf("%.256q: the host is neither an address nor a name", addr)
	}
	return nil
}

// everywhere reports whether a valid address means every address of the machine.
func everywhere(addr string) bool {
	host, _, _ := net.SplitHostPort(addr)
	ip, err := netip.ParseAddr(host)
	return host == "" || err == nil && ip.Unmap().IsUnspecified()
}

// collide reports whether two valid addresses can't be listened on at the same time.
func collide(a, b string) bool {
	ha, pa, _ := net.SplitHostPort(a)
	hb, pb, _ := net.SplitHostPort(b)
	return pa == pb && (ha == hb || everywhere(a) || everywhere(b))
}
