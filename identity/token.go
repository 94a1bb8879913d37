package identity

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/cryptobyte"
)

// Lives of a join token: a stolen one is good for one agent and this long.
const (
	DefaultTokenTTL = 10 * time.Minute
	MaxTokenTTL     = 24 * time.Hour
)

// tokenSecretSize in bytes. The secret is uniformly random, so that its plain SHA-256 is safe to store and to look up by.
const tokenSecretSize = 32

// Token is what is kept of a join token: never its secret.
type Token struct {
	// ID names the token to people and in the log: the first 16 hex digits of Hash.
	ID string
	// Hash is the SHA-256 of the secret.
	Hash [sha256.Size]byte
	// Agent is the one name that whoever shows the token may take.
	Agent            string
	Created, Expires time.Time
	// Used and Revoked are zero while the token is neither.
	Used, Revoked time.Time
}

// TokenStore keeps join tokens.
type TokenStore interface {
	CreateToken(ctx context.Context, t Token) error
	// UseToken marks the token used by a key (SubjectPublicKeyInfo, DER) and returns it, durably, for exactly one of any
	// number of concurrent keys. That key gets it again until it expires, for the answer may have been lost; it must have
	// been proved. Everybody else, and who shows an unknown, used, revoked or expired token, gets an *UnusableToken.
	UseToken(ctx context.Context, hash [sha256.Size]byte, key []byte, now time.Time) (Token, error)
	ListTokens(ctx context.Context) ([]Token, error)
	RevokeToken(ctx context.Context, id string, now time.Time) error
}

// ErrTokenUnusable is all that a peer learns of a token that is not accepted: unknown, used, revoked and expired look alike.
var ErrTokenUnusable = errors.New("join token is not usable: it is unknown, used, revoked or expired; ask for a new one")

// UnusableToken is ErrTokenUnusable with what the server's own log may know. Its text is ErrTokenUnusable's, whatever the reason.
type UnusableToken struct {
	// Reason is one of "malformed", "unknown", "used", "revoked", "expired".
	Reason string
	// ID and Agent are of the token, empty when it is unknown.
	ID, Agent string
}

func (u *UnusableToken) Error() string { return ErrTokenUnusable.Error() }
func (u *UnusableToken) Unwrap() error { return ErrTokenUnusable }

// LogValue gives the reason to the log.
func (u *UnusableToken) LogValue() slog.Value {
	return slog.GroupValue(slog.String("reason", u.Reason), slog.String("token", u.ID), slog.String("agent", u.Agent))
}

// JoinTokens makes join tokens and, as a NodeAttestor, spends them. The evidence is the secret's bytes.
type JoinTokens struct {
	store TokenStore
	now   func() time.Time
}

var _ NodeAttestor = (*JoinTokens)(nil)

// NewJoinTokens works on the store; now nil means time.Now.
func NewJoinTokens(s TokenStore, now func() time.Time) *JoinTokens {
	if now == nil {
		now = time.Now
	}
	return &JoinTokens{store: s, now: now}
}

// Create makes a token for the named agent, good for ttl (0 = DefaultTokenTTL, at most MaxTokenTTL), and returns its secret,
// which is nowhere else.
func (j *JoinTokens) Create(ctx context.Context, agent string, ttl time.Duration) (Token, []byte, error) {
	if err := ParseName("agent", agent); err != nil {
		return Token{}, nil, err
	}
	if ttl == 0 {
		ttl = DefaultTokenTTL
	}
	if ttl < time.Second || ttl > MaxTokenTTL {
		return Token{}, nil, fmt.Errorf("join token of %s for agent %s: want a life between 1s and %s", ttl, agent, MaxTokenTTL)
	}
	secret := make([]byte, tokenSecretSize)
	rand.Read(secret) //nolint:errcheck // never fails since Go 1.24
	hash := sha256.Sum256(secret)
	now := j.now()
	t := Token{ID: hex.EncodeToString(hash[:8]), Hash: hash, Agent: agent, Created: now, Expires: now.Add(ttl)}
	if err := j.store.CreateToken(ctx, t); err != nil {
		return Token{}, nil, fmt.Errorf("keep join token for agent %s: %w", agent, err)
	}
	return t, secret, nil
}

// AttestNode spends the token with this secret. A refusal is an *UnusableToken; any other error is the store's.
func (j *JoinTokens) AttestNode(ctx context.Context, secret []byte, key PublicKey) (AttestedNode, error) {
	if len(secret) != tokenSecretSize {
		return AttestedNode{}, &UnusableToken{Reason: "malformed"}
	}
	if len(key.spki) == 0 {
		return AttestedNode{}, errNoKey
	}
	t, err := j.store.UseToken(ctx, sha256.Sum256(secret), key.spki, j.now())
	if err != nil {
		return AttestedNode{}, err
	}
	return AttestedNode{agent: t.Agent, tokenID: t.ID}, nil
}

// JoinToken is everything a new agent needs, as one string: where to go, whom to trust there, and the secret.
// It prints redacted; Encode gives the real thing.
type JoinToken struct {
	// Door is host:port of the enrol door.
	Door        string
	TrustDomain string
	Cluster     string
	Agent       string
	// Secret of the token, 32 bytes.
	Secret []byte
	// ControlCA is the SHA-256 of the control CA's certificate, DER: nothing is trusted on first use.
	ControlCA [sha256.Size]byte
}

const (
	joinTokenPrefix = "signet-join-1."
	// maxJoinToken bounds the string: the longest door, trust domain and names, in base64, fit.
	maxJoinToken = 1024
)

var (
	errJoinToken        = errors.New("join token: want " + joinTokenPrefix + "… as `signet join-token create` printed it")
	errDamagedJoinToken = errors.New("join token is damaged or cut short: copy the whole line that `signet join-token create` printed")
)

// Encode returns the string to hand to the agent. It is a secret.
func (t JoinToken) Encode() string {
	var b cryptobyte.Builder
	for _, s := range []string{t.Door, t.TrustDomain, t.Cluster, t.Agent, string(t.Secret)} {
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(s)) })
	}
	b.AddBytes(t.ControlCA[:])
	body := b.BytesOrPanic()
	// A checksum, so that a token damaged by copying is told from one that the server refuses.
	b.AddUint32(crc32.ChecksumIEEE(body))
	return joinTokenPrefix + base64.RawURLEncoding.EncodeToString(b.BytesOrPanic())
}

// ParseJoinToken reads what Encode wrote, with white space around it ignored. Errors never repeat the input.
func ParseJoinToken(s string) (JoinToken, error) {
	s = strings.TrimSpace(s)
	text, ok := strings.CutPrefix(s, joinTokenPrefix)
	if !ok || len(s) > maxJoinToken {
		return JoinToken{}, errJoinToken
	}
	raw, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil {
		return JoinToken{}, errDamagedJoinToken
	}
	in := cryptobyte.String(raw)
	var t JoinToken
	var secret string
	for _, field := range []*string{&t.Door, &t.TrustDomain, &t.Cluster, &t.Agent, &secret} {
		var v cryptobyte.String
		if !in.ReadUint16LengthPrefixed(&v) {
			return JoinToken{}, errDamagedJoinToken
		}
		*field = string(v)
	}
	t.Secret = []byte(secret)
	// The checksum, what may follow it, and base64 written in another way are all told by writing the token again.
	if !in.CopyBytes(t.ControlCA[:]) || t.Encode() != s {
		return JoinToken{}, errDamagedJoinToken
	}
	if err := t.Validate(); err != nil {
		return JoinToken{}, err
	}
	return t, nil
}

// Validate refuses a token that could not be used; makers call it before Encode.
func (t JoinToken) Validate() error {
	host, port, err := net.SplitHostPort(t.Door)
	if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 || host == "" || len(host) > 255 || !graphic(host) {
		return fmt.Errorf("join token: enrol door %q: want host:port, for example ca.example.org:7441", clip(t.Door))
	}
	if _, err := ParseTrustDomain(t.TrustDomain); err != nil {
		return fmt.Errorf("join token: %w", err)
	}
	if err := ParseName("cluster", t.Cluster); err != nil {
		return fmt.Errorf("join token: %w", err)
	}
	if err := ParseName("agent", t.Agent); err != nil {
		return fmt.Errorf("join token: %w", err)
	}
	if len(t.Secret) != tokenSecretSize {
		return fmt.Errorf("join token: secret of %d bytes, want %d", len(t.Secret), tokenSecretSize)
	}
	if t.ControlCA == [sha256.Size]byte{} {
		return errors.New("join token: no fingerprint of the control CA")
	}
	return nil
}

// graphic reports whether s is printable ASCII without spaces.
func graphic(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// String names the token without its secret.
func (t JoinToken) String() string {
	return fmt.Sprintf("join token for agent %s of cluster %s at %s (secret redacted)", t.Agent, t.Cluster, t.Door)
}

// Format prints String for every verb, %#v and %x included.
func (t JoinToken) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, t.String()) }

// LogValue is String.
func (t JoinToken) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalText is String, so that neither JSON nor YAML show the secret.
func (t JoinToken) MarshalText() ([]byte, error) { return []byte(t.String()), nil }
