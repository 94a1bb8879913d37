package lab

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// VaultClient speaks to a Vault with a token, as an admin's curl would: it is no client of the product.
type VaultClient struct {
	Token   string
	address string
	client  *http.Client
}

// As is a client with that token; "" is none.
func (v *Vault) As(token string) VaultClient { return VaultClient{token, v.Address, v.client} }

// Root is a client with the root token.
func (v *Vault) Root() VaultClient { return v.As(v.RootToken) }

// VaultError is an answer that is no success.
type VaultError struct {
	Method, Path string
	Status       int
	Errors       []string
}

func (e *VaultError) Error() string {
	return fmt.Sprintf("Vault: %s %s: %d %s", e.Method, e.Path, e.Status, strings.Join(e.Errors, "; "))
}

// VaultStatus is the HTTP status of an answer that was no success, 0 if the error is none.
func VaultStatus(err error) int {
	if e, ok := errors.AsType[*VaultError](err); ok {
		return e.Status
	}
	return 0
}

// VaultAnswer is what Vault answers, in the parts that are used.
type VaultAnswer struct {
	Data map[string]any `json:"data"`
	Auth *struct {
		Token     string   `json:"client_token"`
		Accessor  string   `json:"accessor"`
		Policies  []string `json:"policies"`
		Seconds   int      `json:"lease_duration"`
		Renewable bool     `json:"renewable"`
	} `json:"auth"`
	Warnings []string `json:"warnings"`
}

// String is a string in the data, "" if there is none.
func (a *VaultAnswer) String(name string) string {
	s, _ := a.Data[name].(string)
	return s
}

// Read, Write, List and Delete are Vault's operations on a path without /v1/.
func (c VaultClient) Read(ctx context.Context, path string) (*VaultAnswer, error) {
	return c.answer(ctx, http.MethodGet, path, nil)
}

// Write see Read; a nil body is an empty one.
func (c VaultClient) Write(ctx context.Context, path string, body map[string]any) (*VaultAnswer, error) {
	return c.answer(ctx, http.MethodPost, path, body)
}

// List see Read. No entries are an error with status 404.
func (c VaultClient) List(ctx context.Context, path string) (keys []string, err error) {
	var got struct {
		Data struct {
			Keys []string `json:"keys"`
		} `json:"data"`
	}
	return got.Data.Keys, c.do(ctx, "LIST", path, nil, &got)
}

// Delete see Read.
func (c VaultClient) Delete(ctx context.Context, path string) error {
	return c.do(ctx, http.MethodDelete, path, nil, nil)
}

func (c VaultClient) answer(ctx context.Context, method, path string, body map[string]any) (*VaultAnswer, error) {
	var a VaultAnswer
	if err := c.do(ctx, method, path, body, &a); err != nil {
		return nil, err
	}
	return &a, nil
}

// do asks for a path under /v1/, and decodes the answer unless there is none or nobody wants it.
func (c VaultClient) do(ctx context.Context, method, path string, body map[string]any, into any) error {
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.address+"/v1/"+path, content)
	if err != nil {
		return err
	}
	if c.Token != "" {
		req.Header.Set("X-Vault-Token", c.Token)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	if err != nil {
		return fmt.Errorf("Vault: %s %s: %w", method, path, err)
	}
	if resp.StatusCode >= 300 {
		failed := &VaultError{Method: method, Path: path, Status: resp.StatusCode}
		var said struct {
			Errors []string `json:"errors"`
		}
		if json.Unmarshal(b, &said) == nil {
			failed.Errors = said.Errors
		}
		return failed
	}
	if into == nil || len(b) == 0 {
		return nil
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("Vault: %s %s: %w", method, path, err)
	}
	return nil
}

// Mount enables an engine (pki, transit, kv; kv is version 2) at a path, with leases of up to ten years.
func (v *Vault) Mount(ctx context.Context, path, engine string) error {
	body := map[string]any{"type": engine, "config": map[string]any{"max_lease_ttl": "87600h"}}
	if engine == "kv" {
		body["options"] = map[string]any{"version": "2"}
	}
	if _, err := v.Root().Write(ctx, "sys/mounts/"+path, body); err != nil {
		return err
	}
	if engine != "kv" {
		return nil
	}
	// A new kv answers 400 until it has upgraded itself to version 2.
	return v.until(ctx, "able to serve "+path, func() error {
		_, err := v.Root().Read(ctx, path+"/config")
		return err
	})
}

// EnableAuth enables a login method (approle, jwt, cert, userpass) at auth/<path>, once; another time is nothing.
func (v *Vault) EnableAuth(ctx context.Context, path, method string) error {
	_, err := v.Root().Write(ctx, "sys/auth/"+path, map[string]any{"type": method})
	if VaultStatus(err) == http.StatusBadRequest && strings.Contains(err.Error(), "path is already in use") {
		return nil
	}
	return err
}

// Policy writes a policy, in HCL.
func (v *Vault) Policy(ctx context.Context, name, hcl string) error {
	_, err := v.Root().Write(ctx, "sys/policies/acl/"+name, map[string]any{"policy": hcl})
	return err
}

// VaultLife is the policies and the life of the tokens that a login gives. A zero TTL is Vault's default of 768 h, a zero
// MaxTTL no other bound.
type VaultLife struct {
	Policies    []string
	TTL, MaxTTL time.Duration
}

func (l VaultLife) body() map[string]any {
	return map[string]any{"token_policies": l.Policies, "token_ttl": l.TTL.String(), "token_max_ttl": l.MaxTTL.String()}
}

// MakeToken makes a token. MaxTTL is its explicit_max_ttl.
func (v *Vault) MakeToken(ctx context.Context, l VaultLife) (string, error) {
	body := map[string]any{"policies": l.Policies, "renewable": true, "no_parent": true}
	if l.TTL != 0 {
		body["ttl"] = l.TTL.String()
	}
	if l.MaxTTL != 0 {
		body["explicit_max_ttl"] = l.MaxTTL.String()
	}
	a, err := v.Root().Write(ctx, "auth/token/create", body)
	if err != nil {
		return "", err
	}
	return a.token()
}

func (a *VaultAnswer) token() (string, error) {
	if a.Auth == nil || a.Auth.Token == "" {
		return "", errors.New("Vault gives no token")
	}
	return a.Auth.Token, nil
}

// VaultToken is a token that lives, as an admin sees it.
type VaultToken struct {
	Accessor string
	// Path is the login that it comes from, such as auth/approle/login.
	Path    string
	Made    time.Time
	Expires time.Time
}

// Tokens lists those that live, of one login path, the oldest first.
func (v *Vault) Tokens(ctx context.Context, path string) ([]VaultToken, error) {
	accessors, err := v.Root().List(ctx, "auth/token/accessors")
	if err != nil {
		return nil, err
	}
	var tokens []VaultToken
	for _, accessor := range accessors {
		a, err := v.Root().Write(ctx, "auth/token/lookup-accessor", map[string]any{"accessor": accessor})
		if status := VaultStatus(err); status == http.StatusNotFound || status == http.StatusForbidden || status == http.StatusBadRequest {
			continue // it has ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		made, _ := a.Data["creation_time"].(float64)
		expires, _ := time.Parse(time.RFC3339Nano, a.String("expire_time"))
		if a.String("path") == path {
			tokens = append(tokens, VaultToken{Accessor: accessor, Path: path, Made: time.Unix(int64(made), 0), Expires: expires})
		}
	}
	slices.SortFunc(tokens, func(x, y VaultToken) int { return x.Made.Compare(y.Made) })
	return tokens, nil
}

// RevokeToken ends a token at once.
func (v *Vault) RevokeToken(ctx context.Context, token string) error {
	_, err := v.Root().Write(ctx, "auth/token/revoke", map[string]any{"token": token})
	return err
}

// AppRole makes a role of the login method approle (at auth/approle, which is enabled), or writes it anew.
func (v *Vault) AppRole(ctx context.Context, role string, l VaultLife) (roleID string, err error) {
	if err := v.EnableAuth(ctx, "approle", "approle"); err != nil {
		return "", err
	}
	if _, err := v.Root().Write(ctx, "auth/approle/role/"+role, l.body()); err != nil {
		return "", err
	}
	a, err := v.Root().Read(ctx, "auth/approle/role/"+role+"/role-id")
	if err != nil {
		return "", err
	}
	return a.String("role_id"), nil
}

// SecretID makes a secret-id for a role of approle, for so many logins and so long; 0 is without bound.
func (v *Vault) SecretID(ctx context.Context, role string, uses int, ttl time.Duration) (string, error) {
	a, err := v.Root().Write(ctx, "auth/approle/role/"+role+"/secret-id", map[string]any{"num_uses": uses, "ttl": ttl.String()})
	if err != nil {
		return "", err
	}
	return a.String("secret_id"), nil
}

// Userpass makes a user of the login method userpass (at auth/userpass, which is enabled).
func (v *Vault) Userpass(ctx context.Context, user, password string, l VaultLife) error {
	if err := v.EnableAuth(ctx, "userpass", "userpass"); err != nil {
		return err
	}
	body := l.body()
	body["password"] = password
	_, err := v.Root().Write(ctx, "auth/userpass/users/"+user, body)
	return err
}

// VaultJWT signs the JWTs that a Vault believes, as a Kubernetes cluster would.
type VaultJWT struct {
	Issuer, Audience, Subject string
	key                       *ecdsa.PrivateKey
}

// JWT makes a role of the login method jwt (at auth/jwt, which is enabled), for one subject and audience. The newest call's
// key is the one that is believed.
func (v *Vault) JWT(ctx context.Context, role string, l VaultLife) (*VaultJWT, error) {
	if err := v.EnableAuth(ctx, "jwt", "jwt"); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	j := &VaultJWT{Issuer: "https://kubernetes.test", Audience: "vault", Subject: "system:serviceaccount:signet:" + role, key: key}
	if _, err := v.Root().Write(ctx, "auth/jwt/config", map[string]any{
		"jwt_validation_pubkeys": []string{string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}, "bound_issuer": j.Issuer,
	}); err != nil {
		return nil, err
	}
	body := l.body()
	body["role_type"], body["user_claim"], body["bound_audiences"], body["bound_subject"] = "jwt", "sub", []string{j.Audience}, j.Subject
	_, err = v.Root().Write(ctx, "auth/jwt/role/"+role, body)
	return j, err
}

// Token signs a JWT (ES256) that ends after a time; less than 0 has ended.
func (j *VaultJWT) Token(life time.Duration) (string, error) {
	now := time.Now()
	claims, err := json.Marshal(map[string]any{
		"iss": j.Issuer, "aud": []string{j.Audience}, "sub": j.Subject, "jti": rand.Text(),
		"iat": now.Add(-time.Hour).Unix(), "nbf": now.Add(-time.Hour).Unix(), "exp": now.Add(life).Unix(),
	})
	if err != nil {
		return "", err
	}
	input := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"ES256","typ":"JWT"}`)) + "." + base64.RawURLEncoding.EncodeToString(claims)
	digest := sha256.Sum256([]byte(input))
	r, s, err := ecdsa.Sign(rand.Reader, j.key, digest[:])
	if err != nil {
		return "", err
	}
	var sig [64]byte // RFC 7518 §3.4
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return input + "." + base64.RawURLEncoding.EncodeToString(sig[:]), nil
}

// VaultCert makes the client certificates that a Vault believes.
type VaultCert struct {
	authority *throwAwayCA
}

// Cert makes a role of the login method cert (at auth/cert, which is enabled), for all client certificates of one CA.
func (v *Vault) Cert(ctx context.Context, role string, l VaultLife) (*VaultCert, error) {
	if err := v.EnableAuth(ctx, "cert", "cert"); err != nil {
		return nil, err
	}
	authority, err := newThrowAwayCA("clients of " + role)
	if err != nil {
		return nil, err
	}
	body := l.body()
	body["certificate"] = string(authority.pem)
	_, err = v.Root().Write(ctx, "auth/cert/certs/"+role, body)
	return &VaultCert{authority}, err
}

// Write makes a client certificate with that common name: <dir>/<name>.pem and <dir>/<name>.key. Another time replaces them.
func (c *VaultCert) Write(dir, name string) (certFile, keyFile string, err error) {
	cert, key, err := c.authority.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return "", "", err
	}
	certFile, keyFile = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
	return certFile, keyFile, errors.Join(os.WriteFile(keyFile, key, 0o600), os.WriteFile(certFile, cert, 0o600))
}

// VaultRoot is a root CA in a Vault's pki engine.
type VaultRoot struct {
	IssuerID    string
	Certificate *x509.Certificate
	PEM         string
}

// PKIRoot makes a root for a trust domain in a pki mount, whose key never leaves it, and gives it a name there.
func (v *Vault) PKIRoot(ctx context.Context, mount, name, trustDomain string, ttl time.Duration) (*VaultRoot, error) {
	a, err := v.Root().Write(ctx, mount+"/issuers/generate/root/internal", map[string]any{
		"common_name": name, "issuer_name": name, "key_type": "ec", "key_bits": 256, "ttl": ttl.String(),
		"uri_sans": "spiffe://" + trustDomain, "exclude_cn_from_sans": true,
	})
	if err != nil {
		return nil, err
	}
	text := a.String("certificate")
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("Vault gives no certificate for a new root")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	return &VaultRoot{IssuerID: a.String("issuer_id"), Certificate: cert, PEM: text}, nil
}

// PKIDefault makes an issuer, by name or id, the default of a pki mount.
func (v *Vault) PKIDefault(ctx context.Context, mount, issuer string) error {
	_, err := v.Root().Write(ctx, mount+"/config/issuers", map[string]any{"default": issuer})
	return err
}
