package vault

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/signet-ca/signet/internal/durable"
)

// Login says who we are to Vault. Its files are read anew at every login, so that whoever provides them may replace them.
type Login struct {
	// Method is one of token, approle, jwt, kubernetes, cert.
	Method string
	// Mount is where the method is mounted under auth/; "" = its name.
	Mount string
	// Role of jwt and kubernetes, and the certificate role of cert ("" = any that fits).
	Role string
	// RoleID and SecretIDFile are for approle.
	RoleID       string
	SecretIDFile string
	// TokenFile is for token, for example the sink of a Vault Agent.
	TokenFile string
	// JWTFile is for jwt and kubernetes, for which "" = KubernetesToken.
	JWTFile string
	// CertFile and KeyFile are for cert, and for any method where Vault's listener wants a client certificate.
	CertFile, KeyFile string
}

// The login methods.
const (
	loginToken      = "token"
	loginAppRole    = "approle"
	loginJWT        = "jwt"
	loginKubernetes = "kubernetes"
	loginCert       = "cert"
)

// KubernetesToken is where Kubernetes mounts a pod's own token.
const KubernetesToken = "/var/run/secrets/kubernetes.io/serviceaccount/token" // #nosec G101 -- a path

// methods says what each method needs (!) and may have; cert_file and key_file go with each.
var methods = map[string][]string{
	loginToken:      {"!token_file"},
	loginAppRole:    {"mount", "!role_id", "!secret_id_file"},
	loginJWT:        {"mount", "!role", "!jwt_file"},
	loginKubernetes: {"mount", "!role", "jwt_file"},
	loginCert:       {"mount", "role", "!cert_file", "!key_file"},
}

func (l Login) check(scheme string) error {
	fields, ok := methods[l.Method]
	if !ok {
		return fmt.Errorf("vault.login.method %.64q: use one of token, approle, jwt, kubernetes, cert", l.Method)
	}
	given := []struct{ name, value string }{
		{"mount", l.Mount},
		{"role", l.Role},
		{"role_id", l.RoleID},
		{"token_file", l.TokenFile},
		{"secret_id_file", l.SecretIDFile},
		{"jwt_file", l.JWTFile},
		{"cert_file", l.CertFile},
		{"key_file", l.KeyFile},
	}
	for _, f := range given {
		needed := slices.Contains(fields, "!"+f.name)
		switch {
		case needed && f.value == "":
			return fmt.Errorf("vault.login.%s is missing: the method %s needs it", f.name, l.Method)
		case f.value != "" && !needed && !slices.Contains(fields, f.name) && f.name != "cert_file" && f.name != "key_file":
			return fmt.Errorf("vault.login.%s is nothing that the method %s knows: drop it, or choose another method", f.name, l.Method)
		}
	}
	if (l.CertFile == "") != (l.KeyFile == "") {
		return errors.New("vault.login.cert_file and vault.login.key_file belong together: give both or none")
	}
	if l.CertFile != "" && scheme != "https" {
		return errors.New("vault.login.cert_file: a client certificate needs https, but vault.address is http")
	}
	if l.Mount != "" && checkPath(l.Mount) != nil {
		return fmt.Errorf("vault.login.mount %.64q: want the path under auth/, without a slash at either end", l.Mount)
	}
	return nil
}

const (
	maxToken = 8 << 10
	maxJWT   = 64 << 10
	// maxLife is beyond any token's; it keeps Vault's numbers from overflowing ours.
	maxLife = 10 * 365 * 24 * time.Hour
)

// aToken is what Vault's tokens begin with: service, batch, recovery; before Vault 1.10 by one letter.
var aToken = regexp.MustCompile(`^(hv[sbr]\.[A-Za-z0-9_-]{16,}|[sbr]\.[A-Za-z0-9]{24}(\.[A-Za-z0-9]+)?)$`)

// credential is what a login shows, read just now.
type credential struct {
	// digest tells it from another.
	digest [sha256.Size]byte
	// secret is behind a function because no printer looks into one.
	secret func() string
}

func (c *Client) credential() (credential, error) {
	var data []byte
	var err error
	l := c.login
	what, path := "vault.login.token_file", l.TokenFile
	switch l.Method {
	case loginToken:
		data, err = durable.ReadSecret(path, maxToken)
	case loginAppRole:
		what, path = "vault.login.secret_id_file", l.SecretIDFile
		data, err = durable.ReadSecret(path, maxToken)
	case loginJWT, loginKubernetes:
		// A projected token has the mode that the cluster gives it.
		if what, path = "vault.login.jwt_file", l.JWTFile; path == "" {
			path = KubernetesToken
		}
		data, err = durable.ReadFile(path, "the token", maxJWT)
	case loginCert:
		cert, rerr := readCertificate(l)
		if rerr != nil {
			return credential{}, rerr
		}
		return credential{digest: sha256.Sum256(cert.Certificate[0]), secret: func() string { return "" }}, nil
	}
	if err != nil {
		return credential{}, fmt.Errorf("%s: %w", what, err)
	}
	s := strings.TrimSpace(string(data))
	switch {
	case s == "" || !printable(s):
		return credential{}, fmt.Errorf("%s: %s is empty or has more in it than the one secret", what, path)
	case l.Method != loginToken && aToken.MatchString(s):
		return credential{}, fmt.Errorf("%s: %s holds a token of Vault, which is neither a secret-id nor a JWT; if it is a wrapping token, put there what it wraps (vault unwrap)", what, path)
	case l.Method == loginToken && !usable(s):
		return credential{}, fmt.Errorf("%s: %s does not hold a token", what, path)
	}
	return credential{digest: sha256.Sum256([]byte(s)), secret: func() string { return s }}, nil
}

// loginPath is what a login asks of Vault.
func (c *Client) loginPath() string {
	if c.login.Method == loginToken {
		return lookupPath
	}
	return "auth/" + cmp.Or(c.login.Mount, c.login.Method) + "/login"
}

// enter logs in, once.
func (c *Client) enter(ctx context.Context, with credential) (*session, *Error) {
	c.shown.Store(&with.secret)
	if c.login.Method == loginToken {
		return c.adopt(ctx, with)
	}
	body := map[string]string{}
	switch c.login.Method {
	case loginAppRole:
		body["role_id"], body["secret_id"] = c.login.RoleID, with.secret()
	case loginJWT, loginKubernetes:
		body["role"], body["jwt"] = c.login.Role, with.secret()
	case loginCert:
		if c.login.Role != "" {
			body["name"] = c.login.Role
		}
	}
	data, _ := json.Marshal(body) // of strings: it does not fail
	r := request{
		op: opLogin, path: c.loginPath(), body: data, fresh: c.login.CertFile != "",
	}
	secret, verr := c.patiently(ctx, c.calls, r)
	if verr != nil {
		if c.login.Method == loginAppRole && verr.denied() {
			verr.why = fmt.Sprintf("the login is refused (%s), which is what Vault says of a role that it has locked after too many refused logins: look for its role_id in `vault read sys/locked-users`, "+
				"and unlock it with `vault write -f sys/locked-users/<mount_accessor>/unlock/<role_id>`, or wait until Vault does (15 min by default)", verr.said())
		}
		return nil, verr
	}
	if secret == nil || secret.Auth == nil || !usable(secret.Auth.ClientToken) {
		return nil, &Error{Op: opLogin, Path: r.path, Status: http.StatusOK, vault: c.address, why: "its answer has no token that can be used; a role that asks for a second factor is of no use here"}
	}
	if e := c.endless(r.path, secret); e != nil {
		// Nobody else has it. That it can't be revoked would only leave it to its end.
		_, _ = c.send(ctx, c.as(secret.Auth.ClientToken, c.calls), request{op: opWrite, path: "auth/token/revoke-self"})
		return nil, e
	}
	return c.newSession(secret.Auth), nil
}

// endless refuses a token that would end after some uses: calls and renewals are without number, and what comes after the last of
// them fails.
func (c *Client) endless(path string, secret *api.Secret) *Error {
	uses, _ := secret.Data[usesKey].(json.Number)
	if uses == "" || uses == "0" {
		return nil
	}
	mend := "set token_num_uses=0 at the role"
	if c.login.Method == loginToken {
		mend = "make one without -use-limit"
	}
	return &Error{Op: opLogin, Path: path, Status: http.StatusOK, vault: c.address, why: "the token that it gives is for a limited number of uses, which is of no use here: " + mend}
}

// adopt takes a token as it is, if Vault knows it.
func (c *Client) adopt(ctx context.Context, with credential) (*session, *Error) {
	auth := &api.SecretAuth{ClientToken: with.secret()}
	secret, verr := c.patiently(ctx, c.as(auth.ClientToken, c.calls), request{op: opRead, path: lookupPath})
	if verr != nil {
		verr.Op = opLogin
		if verr.denied() {
			verr.why = fmt.Sprintf("Vault does not accept the token in %s, or it may not look itself up (403): put a living token there, whose policy lets it read %s, and of a wrapping token what it wraps (vault unwrap)", c.login.TokenFile, lookupPath)
		}
		return nil, verr
	}
	if e := c.endless(lookupPath, secret); e != nil {
		return nil, e
	}
	life, err := secret.TokenTTL()
	if err == nil {
		auth.Renewable, err = secret.TokenIsRenewable()
	}
	if err != nil {
		return nil, &Error{Op: opLogin, Path: lookupPath, Status: http.StatusOK, vault: c.address, why: "its answer does not tell the token's life"}
	}
	auth.LeaseDuration = int(max(0, life) / time.Second)
	if auth.LeaseDuration == 0 && secret.Data["expire_time"] != nil {
		// Its last second, not a token without end.
		auth.LeaseDuration = 1
	}
	s := c.newSession(auth)
	s.span(secret.Data)
	return s, nil
}

func usable(token string) bool {
	return token != "" && len(token) <= maxToken && printable(token) && !strings.Contains(token, " ")
}

// as is one of the api's clients with a token.
func (c *Client) as(token string, base *api.Client) *api.Client {
	a := base.WithNamespace(c.namespace)
	a.SetToken(token)
	return a
}
