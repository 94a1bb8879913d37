package identity

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// recorder is a TokenStore that remembers what it was given.
type recorder struct {
	TokenStore
	created Token
	used    [32]byte
	key     []byte
	at      time.Time
	err     error
}

func (r *recorder) CreateToken(_ context.Context, t Token) error {
	r.created = t
	return r.err
}

func (r *recorder) UseToken(_ context.Context, hash [32]byte, key []byte, now time.Time) (Token, error) {
	r.used, r.key, r.at = hash, key, now
	return r.created, r.err
}

func TestAJoinTokenIsKeptAsItsHashAndForAWhile(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for ttl, want := range map[time.Duration]time.Duration{0: 10 * time.Minute, time.Second: time.Second, 24 * time.Hour: 24 * time.Hour} {
		r := &recorder{}
		j := NewJoinTokens(r, func() time.Time { return now })
		token, secret, err := j.Create(t.Context(), "node-1", ttl)
		if err != nil {
			t.Fatal(err)
		}
		hash := sha256.Sum256(secret)
		if len(secret) != 32 || token != r.created || token.Hash != hash || token.ID != hex.EncodeToString(hash[:])[:16] || token.Agent != "node-1" ||
			!token.Created.Equal(now) || !token.Expires.Equal(now.Add(want)) || !token.Used.IsZero() || !token.Revoked.IsZero() {
			t.Errorf("%s: %+v", ttl, token)
		}
		node, err := j.AttestNode(t.Context(), secret, PublicKey{spki: []byte{7}})
		if err != nil || node.Agent() != "node-1" || node.TokenID() != token.ID || r.used != hash || !bytes.Equal(r.key, []byte{7}) || !r.at.Equal(now) {
			t.Errorf("%+v %v", node, err)
		}
	}
}

func TestJoinTokensOfNoUseAreNotMade(t *testing.T) {
	r := &recorder{}
	j := NewJoinTokens(r, nil)
	for name, c := range map[string]struct {
		agent string
		ttl   time.Duration
	}{"name": {"../node", 0}, "nameless": {"", 0}, "too long": {"n", 24*time.Hour + 1}, "negative": {"n", -time.Minute}, "too short": {"n", time.Millisecond}} {
		if token, secret, err := j.Create(t.Context(), c.agent, c.ttl); err == nil || secret != nil || token != (Token{}) {
			t.Errorf("%s: %v", name, err)
		}
	}
	r.err = errors.New("disk full")
	if _, secret, err := j.Create(t.Context(), "node-1", 0); !errors.Is(err, r.err) || secret != nil {
		t.Error("a token that was not kept was handed out")
	}
}

func TestEvidenceOfAnotherSizeNeverReachesTheStore(t *testing.T) {
	r := &recorder{}
	j := NewJoinTokens(r, nil)
	for _, n := range []int{0, 31, 33, 1 << 20} {
		if _, err := j.AttestNode(t.Context(), make([]byte, n), PublicKey{spki: []byte{7}}); !errors.Is(err, ErrTokenUnusable) || !r.at.IsZero() {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestATokenIsNotSpentWithoutAKey(t *testing.T) {
	r := &recorder{}
	if _, err := NewJoinTokens(r, nil).AttestNode(t.Context(), make([]byte, 32), PublicKey{}); err == nil || !r.at.IsZero() {
		t.Errorf("without a key: %v", err)
	}
}

func TestThePeerAndTheLogReadDifferentThings(t *testing.T) {
	var texts []string
	for _, reason := range []string{"malformed", "unknown", "used", "revoked", "expired"} {
		err := error(&UnusableToken{Reason: reason, ID: "0123456789abcdef", Agent: "node-1"})
		texts = append(texts, err.Error())
		var log bytes.Buffer
		slog.New(slog.NewJSONHandler(&log, nil)).Warn("refused", "cause", err)
		if !errors.Is(err, ErrTokenUnusable) || !strings.Contains(log.String(), reason) || !strings.Contains(log.String(), "0123456789abcdef") {
			t.Errorf("%s: %s", reason, log.String())
		}
	}
	for _, text := range texts {
		if text != ErrTokenUnusable.Error() {
			t.Errorf("a peer could tell: %s", text)
		}
	}
}

func joinToken() JoinToken {
	return JoinToken{
		Door: "ca.example.org:7441", TrustDomain: "example.org", Cluster: "east", Agent: "node-1",
		Secret: bytes.Repeat([]byte{0xA5, 0x5A}, 16), ControlCA: sha256.Sum256([]byte("control CA")),
	}
}

func TestAJoinTokenGoesThereAndBack(t *testing.T) {
	for name, change := range map[string]func(*JoinToken){
		"plain": func(*JoinToken) {}, "IPv6": func(t *JoinToken) { t.Door = "[::1]:1" },
		"longest": func(t *JoinToken) {
			t.Door, t.TrustDomain = strings.Repeat("a", 255)+":65535", strings.Repeat("b", 255)
			t.Cluster, t.Agent = strings.Repeat("c", 63), strings.Repeat("d", 63)
		},
	} {
		token := joinToken()
		change(&token)
		text := token.Encode()
		if !strings.HasPrefix(text, "signet-join-1.") || strings.ContainsAny(text, " \n=+/") || len(text) > maxJoinToken {
			t.Errorf("%s: %q", name, text)
		}
		back, err := ParseJoinToken("\n " + text + "\r\n")
		if err != nil || back.Encode() != text || back.Door != token.Door || back.Agent != token.Agent || !bytes.Equal(back.Secret, token.Secret) || back.ControlCA != token.ControlCA {
			t.Errorf("%s: %s %v", name, back, err)
		}
	}
}

func TestADamagedJoinTokenIsNamedAndNeverRepeated(t *testing.T) {
	text := joinToken().Encode()
	with := func(change func(*JoinToken)) string {
		token := joinToken()
		change(&token)
		return token.Encode()
	}
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(text, joinTokenPrefix))
	if err != nil {
		t.Fatal(err)
	}
	flipped := []byte(text)
	flipped[len(flipped)-20] ^= 1
	damaged := map[string]bool{}
	for _, name := range []string{"prefix only", "cut", "flipped", "twice", "padded", "inner space", "line break", "short"} {
		damaged[name] = true
	}
	for name, s := range map[string]string{
		"nothing": "", "prefix only": joinTokenPrefix, "other version": strings.Replace(text, "-1.", "-2.", 1), "no prefix": text[len(joinTokenPrefix):],
		"cut": text[:len(text)-7], "flipped": string(flipped), "twice": text + text, "padded": text + "=", "inner space": text[:40] + " " + text[40:], "line break": text[:40] + "\n" + text[40:],
		"huge": joinTokenPrefix + strings.Repeat("A", 1<<20), "short": joinTokenPrefix + base64.RawURLEncoding.EncodeToString(raw[:3]),
		"door": with(func(t *JoinToken) { t.Door = "ca.example.org" }), "port 0": with(func(t *JoinToken) { t.Door = "ca:0" }),
		"port": with(func(t *JoinToken) { t.Door = "ca:65536" }), "no host": with(func(t *JoinToken) { t.Door = ":7441" }),
		"host": with(func(t *JoinToken) { t.Door = "a\nb:7441" }), "long host": with(func(t *JoinToken) { t.Door = strings.Repeat("a", 256) + ":1" }),
		"trust domain": with(func(t *JoinToken) { t.TrustDomain = "Example" }), "cluster": with(func(t *JoinToken) { t.Cluster = "" }),
		"agent": with(func(t *JoinToken) { t.Agent = "../x" }), "secret": with(func(t *JoinToken) { t.Secret = t.Secret[1:] }),
		"fingerprint": with(func(t *JoinToken) { t.ControlCA = [32]byte{} }),
	} {
		_, err := ParseJoinToken(s)
		if err == nil {
			t.Errorf("%s was accepted", name)
			continue
		}
		if damaged[name] != strings.Contains(err.Error(), "damaged or cut short") {
			t.Errorf("%s: %v", name, err)
		}
		if strings.Contains(err.Error(), "\n") || len(err.Error()) > 400 || len(s) > 40 && strings.Contains(err.Error(), s[20:40]) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAJoinTokenNeverPrintsItsSecret(t *testing.T) {
	token := joinToken()
	var log bytes.Buffer
	for _, h := range []slog.Handler{slog.NewJSONHandler(&log, nil), slog.NewTextHandler(&log, nil)} {
		slog.New(h).Info("token", "value", token, "pointer", &token, "list", []JoinToken{token})
	}
	out := log.String()
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o", "%t"} {
		out += fmt.Sprintf(verb, token) + fmt.Sprintf(verb, &token) + fmt.Sprintf(verb, []JoinToken{token}) + fmt.Sprintf(verb, struct{ T JoinToken }{token})
	}
	text, err := json.Marshal(map[string]any{"a": token, "b": &token})
	if err != nil {
		t.Fatal(err)
	}
	out += string(text) + fmt.Sprint(errors.Join(fmt.Errorf("%w %v", errJoinToken, token)))
	encoded := token.Encode()
	for what, secret := range map[string]string{
		"bytes": string(token.Secret), "hex": hex.EncodeToString(token.Secret), "base64": base64.StdEncoding.EncodeToString(token.Secret),
		"decimal": "165 90 165", "Go": "0xa5, 0x5a", "encoded": encoded[len(encoded)-60 : len(encoded)-10],
	} {
		if strings.Contains(strings.ToLower(out), strings.ToLower(secret)) {
			t.Errorf("the secret shows as %s", what)
		}
	}
	if !strings.Contains(out, "join token for agent node-1 of cluster east") {
		t.Error("the token can't be told from another")
	}
}

func FuzzParseJoinToken(f *testing.F) {
	f.Add(joinToken().Encode())
	f.Add(joinTokenPrefix)
	f.Add("signet-join-1.AAAAAAAA")
	f.Add(joinToken().Encode()[:100])
	f.Fuzz(func(t *testing.T, s string) {
		token, err := ParseJoinToken(s)
		if err != nil {
			return
		}
		if token.Validate() != nil || token.Encode() != strings.TrimSpace(s) {
			t.Fatalf("%q is written in two ways", s)
		}
	})
}
