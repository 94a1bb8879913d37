package config

import (
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/strictyaml"
)

// Vault is how a HashiCorp Vault is reached. Without an address there is none.
type Vault struct {
	// Address is https://host:port; plain http is for a Vault on this machine.
	Address string `yaml:"address"`
	// Namespace is of Vault Enterprise; "" = the root namespace.
	Namespace string `yaml:"namespace"`
	// CAFile holds the certificates that Vault's may lead to, PEM; "" = those of the system.
	CAFile string `yaml:"ca_file" kind:"path"`
	// ServerName is the name in Vault's certificate; "" = the host of the address.
	ServerName string `yaml:"server_name"`
	// Timeout bounds one call.
	Timeout time.Duration `yaml:"timeout"`
	Login   VaultLogin    `yaml:"login"`
}

// VaultLogin is how Vault is told who we are. Files are read anew at every login.
type VaultLogin struct {
	// Method is token, approle, jwt, kubernetes or cert.
	Method string `yaml:"method"`
	// Mount is where the method is enabled, below auth/. Default its name; token has none.
	Mount string `yaml:"mount"`
	// Role is of jwt, kubernetes and cert; RoleID of approle.
	Role         string `yaml:"role"`
	RoleID       string `yaml:"role_id"`
	TokenFile    string `yaml:"token_file" kind:"path"`
	SecretIDFile string `yaml:"secret_id_file" kind:"path"`
	// JWTFile holds a JWT that others renew; for kubernetes the default is where a pod has its own.
	JWTFile string `yaml:"jwt_file" kind:"path"`
	// CertFile and KeyFile are of cert, and for any method where Vault's listener wants a client certificate.
	CertFile string `yaml:"cert_file" kind:"path"`
	KeyFile  string `yaml:"key_file" kind:"path"`
}

// The login methods.
const (
	LoginToken      = "token"
	LoginAppRole    = "approle"
	LoginJWT        = "jwt"
	LoginKubernetes = "kubernetes"
	LoginCert       = "cert"
)

// Transit is where keys live in Vault.
type Transit struct {
	Mount string `yaml:"mount"`
	// Prefix goes before the names of the keys, so that several may share the mount.
	Prefix string `yaml:"prefix"`
}

// Upstream is who signs this cluster's intermediates without a ceremony. Without a mount it is a person: signet root sign.
type Upstream struct {
	VaultPKI VaultPKI `yaml:"vault_pki"`
}

// VaultPKI is a mount of Vault's PKI engine that holds the root, or a CA under it.
type VaultPKI struct {
	Mount string `yaml:"mount"`
	// Issuer is the name or ID of the issuer that the cluster begins under; later the one under the root that is trusted is taken.
	Issuer string `yaml:"issuer"`
	// Life of the intermediates.
	Life time.Duration `yaml:"life"`
}

// SharedTrust is where the clusters of a trust domain share their roots and reports. Without a mount they are carried by hand.
type SharedTrust struct {
	VaultKV VaultKV `yaml:"vault_kv"`
}

// VaultKV is a folder in a mount of Vault's KV engine, version 2.
type VaultKV struct {
	Mount string `yaml:"mount"`
	Path  string `yaml:"path"`
}

// Where CA keys live.
const (
	KeysFile    = "file"
	KeysMemory  = "memory"
	KeysTransit = "vault-transit"
)

// UsesVault reports whether anything is kept in Vault or done by it.
func (s *Server) UsesVault() bool { return s.vaultFor() != "" }

// vaultFor is the first key that needs a Vault; "" = none does.
func (s *Server) vaultFor() string {
	switch {
	case s.Keystore.ControlCA == KeysTransit:
		return "keystore.control_ca"
	case s.Keystore.Intermediates == KeysTransit:
		return "keystore.intermediates"
	case s.Upstream.VaultPKI.Mount != "":
		return "upstream.vault_pki.mount"
	case s.Trust.VaultKV.Mount != "":
		return "trust.vault_kv.mount"
	case s.Keystore.Transit.Mount != "":
		return "keystore.transit.mount"
	}
	return ""
}

// UsesTransit reports whether CA keys live in Vault. With a mount alone none is made there, and older ones are used.
func (s *Server) UsesTransit() bool {
	return s.Keystore.ControlCA == KeysTransit || s.Keystore.Intermediates == KeysTransit || s.Keystore.Transit.Mount != ""
}

// OlderInTransit reports whether keys may be in Transit that were made there before new ones were to be made elsewhere: who moves
// away says so by a mount.
func (s *Server) OlderInTransit() bool { return s.origin.Given("keystore.transit.mount") }

// loginKeys are what a method needs, and what else it may have. The method token has no mount: nothing is asked of one. A
// client certificate may go with each, for a Vault whose listener wants one.
var loginKeys = map[string]struct{ needs, may []string }{
	LoginToken:      {needs: []string{"token_file"}, may: []string{"cert_file", "key_file"}},
	LoginAppRole:    {needs: []string{"role_id", "secret_id_file"}, may: []string{"mount", "cert_file", "key_file"}},
	LoginJWT:        {needs: []string{"role", "jwt_file"}, may: []string{"mount", "cert_file", "key_file"}},
	LoginKubernetes: {needs: []string{"role"}, may: []string{"mount", "jwt_file", "cert_file", "key_file"}},
	LoginCert:       {needs: []string{"cert_file", "key_file"}, may: []string{"mount", "role"}},
}

// uses reports whether a method has such a key.
func (l VaultLogin) uses(key string) bool {
	keys := loginKeys[l.Method]
	return slices.Contains(keys.needs, key) || slices.Contains(keys.may, key)
}

// counts reports whether a value plays a part: those of a block that is not used play none.
func (s *Server) counts(key string) bool {
	block, rest, _ := strings.Cut(key, ".")
	switch block {
	case "vault":
		login, ok := strings.CutPrefix(rest, "login.")
		return s.Vault.Address != "" && (!ok || login == "method" || s.Vault.Login.uses(login))
	case "upstream":
		return s.Upstream.VaultPKI.Mount != ""
	case "trust":
		return s.Trust.VaultKV.Mount != ""
	case "keystore":
		return s.UsesTransit() || !strings.HasPrefix(rest, "transit.")
	}
	return true
}

// complete fills in what a Vault block leaves out.
func (v *Vault) complete() {
	if v.Address == "" {
		return
	}
	v.Namespace = strings.TrimSuffix(v.Namespace, "/") // as `vault namespace list` shows it
	orElse(&v.Timeout, DefaultVaultTimeout)
	if v.Login.uses("mount") {
		orElse(&v.Login.Mount, v.Login.Method)
	}
	if v.Login.Method == LoginKubernetes {
		orElse(&v.Login.JWTFile, DefaultKubernetesToken)
	}
}

// clusterPrefix is with what the names of a cluster's keys in Transit begin by default: signet-<cluster>_<trust domain>_. What begins with
// it is taken for ours, so it must be the begin of no other's key. Neither the name of a cluster nor that of a key has a
// '_': without one in the trust domain, no two of these names can be read in two ways. With one, and where it is too long, there
// is no default.
func clusterPrefix(cluster string, td spiffeid.TrustDomain) string {
	prefix := "signet-" + cluster + "_" + td.Name() + "_"
	if td.IsZero() || strings.Contains(td.Name(), "_") || len(prefix) > maxVaultName {
		return ""
	}
	return prefix
}

func (s *Server) completeVault() {
	s.Vault.complete()
	orElse(&s.Keystore.ControlCA, KeysFile)
	orElse(&s.Keystore.Intermediates, KeysFile)
	if s.UsesTransit() {
		orElse(&s.Keystore.Transit.Mount, DefaultTransitMount)
		orElse(&s.Keystore.Transit.Prefix, clusterPrefix(s.Cluster, s.TrustDomain))
	}
	if s.Upstream.VaultPKI.Mount != "" {
		orElse(&s.Upstream.VaultPKI.Issuer, DefaultIssuer)
		orElse(&s.Upstream.VaultPKI.Life, DefaultOnlineLife)
	}
	if s.Trust.VaultKV.Mount != "" {
		orElse(&s.Trust.VaultKV.Path, "signet/"+s.TrustDomain.Name())
	}
}

// checkVault finds contradictions between what is to be in Vault and how it is reached.
func (s *Server) checkVault(o origin) {
	switch user := s.vaultFor(); {
	case user != "" && s.Vault.Address == "":
		key := "vault.address"
		if !o.Given("vault") {
			key = user
		}
		o.Find(key, "vault.address is missing, and %s needs a Vault: say where it is, for example https://vault.example.org:8200", user)
	case user == "" && s.Vault != (Vault{}):
		o.Find("vault", "vault is configured, but nothing uses it: name it in keystore, upstream or trust, or leave the block out")
	default:
		s.Vault.check(o)
	}
	if s.Keystore.ControlCA == KeysMemory {
		o.Find("keystore.control_ca", "keystore.control_ca: %s: the control CA has to outlive the process, or every agent would have to enrol again: use %s or %s", KeysMemory, KeysFile, KeysTransit)
	}
	o.oneOf("keystore.control_ca", s.Keystore.ControlCA, KeysFile, KeysTransit)
	o.oneOf("keystore.intermediates", s.Keystore.Intermediates, KeysFile, KeysMemory, KeysTransit)
	if s.Keystore.Intermediates == KeysMemory && s.Upstream.VaultPKI.Mount == "" {
		o.Find("keystore.intermediates", "keystore.intermediates: %s needs somebody who signs at every start: add upstream.vault_pki, or use %s or %s", KeysMemory, KeysFile, KeysTransit)
	}
	s.checkTransit(o)
	s.checkUpstream(o)
	s.checkSharedTrust(o)
	s.checkMounts(o)
}

func (s *Server) checkTransit(o origin) {
	const mount, prefix = "keystore.transit.mount", "keystore.transit.prefix"
	given := o.one(mount, prefix)
	switch k := s.Keystore; {
	case k.ControlCA == KeysTransit || k.Intermediates == KeysTransit:
	case !o.Given(mount) && !o.Given(prefix):
		return
	case !o.Given("keystore.intermediates") || !o.Given(mount):
		// A key must not come to lie on a disk because a line was forgotten.
		o.Find(given, "%s is given, but no key is made in Transit: set keystore.intermediates or keystore.control_ca to %s; where only older keys are there, give the mount and say where new ones are made", given, KeysTransit)
		return
	}
	o.checkPath(mount, s.Keystore.Transit.Mount)
	switch p := s.Keystore.Transit.Prefix; {
	case o.Given(prefix) && p != "":
		o.checkName(prefix, p)
	case p == "" && !s.TrustDomain.IsZero() && identity.ParseName("cluster", s.Cluster) == nil: // which have findings of their own
		o.Find(prefix, "%s is missing: the default would be signet-%.64s_%.255s_, but in a trust domain with '_' or of such a length it can't tell this cluster's keys from all others: give one that begins the name of no other key in that mount", prefix, s.Cluster, s.TrustDomain.Name())
	}
}

func (s *Server) checkUpstream(o origin) {
	const mount, issuer, life = "upstream.vault_pki.mount", "upstream.vault_pki.issuer", "upstream.vault_pki.life"
	pki := s.Upstream.VaultPKI
	if pki.Mount == "" {
		o.withoutMount(mount, issuer, life)
		return
	}
	o.checkPath(mount, pki.Mount)
	o.checkName(issuer, pki.Issuer)
	o.wholeSeconds(life, pki.Life)
	if pki.Life < 2*s.Leaf.MaxTTL {
		o.Find(o.one(life, "leaf.max_ttl"), "%s %s is less than twice leaf.max_ttl %s, so that an intermediate would be too old for a leaf before its successor is there: raise the one or lower the other", life, short(pki.Life), short(s.Leaf.MaxTTL))
	}
}

func (s *Server) checkSharedTrust(o origin) {
	const mount, path = "trust.vault_kv.mount", "trust.vault_kv.path"
	kv := s.Trust.VaultKV
	if kv.Mount == "" {
		o.withoutMount(mount, path)
		return
	}
	o.checkPath(mount, kv.Mount)
	if o.Given(path) || !s.TrustDomain.IsZero() {
		o.checkPath(path, kv.Path)
	}
}

// withoutMount finds what is said of an engine whose mount is not.
func (o origin) withoutMount(mount string, others ...string) {
	for _, key := range others {
		if o.Given(key) {
			o.Find(mount, "%s is missing, and %s is given: say where the engine is mounted, or leave the block out", mount, key)
		}
	}
}

// checkMounts finds two engines at one mount.
func (s *Server) checkMounts(o origin) {
	at := map[string]string{}
	for _, m := range []struct {
		key, mount string
		used       bool
	}{
		{"keystore.transit.mount", s.Keystore.Transit.Mount, s.UsesTransit()},
		{"upstream.vault_pki.mount", s.Upstream.VaultPKI.Mount, true},
		{"trust.vault_kv.mount", s.Trust.VaultKV.Mount, true},
	} {
		if !m.used || m.mount == "" {
			continue
		}
		if other, ok := at[m.mount]; ok {
			o.Find(o.one(m.key, other), "%s and %s are both %s: an engine has a mount of its own", other, m.key, m.mount)
			continue
		}
		at[m.mount] = m.key
	}
}

// check finds what can't be said together about reaching Vault.
func (v Vault) check(o origin) {
	if v.Address == "" {
		return
	}
	u, err := url.Parse(v.Address)
	switch {
	case strings.Contains(v.Address, "@"):
		// Not shown: it may be a password.
		o.Find("vault.address", "vault.address names a user: want https://host:port, and say in vault.login who we are")
	case err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.RawQuery != "" || u.Fragment != "" || u.Path != "" && u.Path != "/":
		o.Find("vault.address", "vault.address %.256q: want https://host:port", v.Address)
	case u.Scheme == "http" && !loopback(u.Hostname()):
		o.Find("vault.address", "vault.address %.256q: a token would cross the network in clear; use https", v.Address)
	case u.Scheme == "http" && (v.CAFile != "" || v.ServerName != "" || v.Login.CertFile != ""):
		o.Find("vault.address", "vault.address %.256q is plain http, which has no certificates: use https, or leave ca_file, server_name and login.cert_file out", v.Address)
	}
	if strings.ContainsAny(v.ServerName, "/: ") {
		o.Find("vault.server_name", "vault.server_name %.256q: want a bare name, as it stands in Vault's certificate", v.ServerName)
	}
	o.within("vault.timeout", v.Timeout, MinVaultTimeout, MaxVaultTimeout)
	if v.Namespace != "" {
		o.checkPath("vault.namespace", v.Namespace)
	}
	v.Login.check(o)
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// check wants exactly what a method needs.
func (l VaultLogin) check(o origin) {
	const at = "vault.login."
	methods := []string{LoginToken, LoginAppRole, LoginJWT, LoginKubernetes, LoginCert}
	if l.Method == "" {
		o.Find(at+"method", "vault.login.method is missing: say how to log in: %s", strings.Join(methods, ", "))
		return
	}
	keys, known := loginKeys[l.Method]
	if !known {
		o.oneOf(at+"method", l.Method, methods...)
		return
	}
	for key, value := range strictyaml.Values(&l) {
		switch {
		case slices.Contains(keys.needs, key) && value == "":
			o.Find(at+key, "vault.login.%s is missing, and the method %s needs it", key, l.Method)
		case key != "method" && !l.uses(key) && value != "":
			o.Find(at+key, "vault.login.%s is not for the method %s: leave it out, or use another method", key, l.Method)
		}
	}
	if (l.CertFile == "") != (l.KeyFile == "") {
		o.Find(at+"key_file", "vault.login.cert_file and vault.login.key_file belong together: give both or none")
	}
	if l.uses("mount") {
		if rest, ok := strings.CutPrefix(l.Mount, "auth/"); ok {
			o.Find(at+"mount", "vault.login.mount %.256q: leave auth/ out: %.256s", l.Mount, rest)
		}
		o.checkPath(at+"mount", l.Mount)
	}
}

// checkPath wants the path of a mount or below one: segments that stand in a Vault path as they are.
func (o origin) checkPath(key, path string) {
	for s := range strings.SplitSeq(path, "/") {
		if !segment(s) {
			o.Find(key, "%s %.256q: use segments of letters, digits, '.', '_' and '-' that don't begin with '.' or '-', and '/' between them", key, path)
			return
		}
	}
	if len(path) > maxVaultPath {
		o.Find(key, "%s has %d bytes: at most %d are allowed", key, len(path), maxVaultPath)
	}
}

// checkName wants what Vault takes as a name, or as the begin of one.
func (o origin) checkName(key, s string) {
	if !segment(s) || s[0] == '_' || len(s) > maxVaultName {
		o.Find(key, "%s %.256q: use up to %d letters, digits, '.', '_' and '-', with a letter or digit first", key, s, maxVaultName)
	}
}

func segment(s string) bool {
	return s != "" && s[0] != '.' && s[0] != '-' && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._-", r)
	})
}
