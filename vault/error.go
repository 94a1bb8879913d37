package vault

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/vault/api"
)

// What a call that failed means to its caller.
var (
	// ErrAway is for what passes: Vault is not reachable, sealed, without a leader, overloaded, or did not answer in time.
	// Go on with what is there and try again later.
	ErrAway = errors.New("vault is away")
	// ErrNotFound: nothing is at the path, or nothing of that kind is mounted there.
	ErrNotFound = errors.New("not found in Vault")
	// ErrDenied: neither the token nor one of a new login may do that, or the login itself was refused, whatever its status.
	ErrDenied = errors.New("denied by Vault")
	// ErrLogin: our login is not accepted, or its secret can't be read, or its token is dead. No policy has come to bear.
	ErrLogin = errors.New("no login to Vault")
	// ErrRefused: the request makes no sense to Vault, or its engine can't do it as things are set there.
	ErrRefused = errors.New("refused by Vault")
	// ErrConflict: somebody else has written meanwhile (KV's check-and-set).
	ErrConflict = errors.New("changed in Vault meanwhile")
	// ErrTooLarge: the answer was not read to its end.
	ErrTooLarge = errors.New("its answer is larger than 1 MiB, which is refused")
)

// Error is what came of a call: errors.Is tells which of the sentinels above it is.
type Error struct {
	Op, Path string
	// Status is HTTP's, 0 where there was no answer.
	Status int
	// Messages are Vault's own words, bounded and printable, at most four.
	Messages []string

	vault string
	// why is in our words, where neither Status nor cause tells it.
	why string
	// next says when it is tried again, where that is by another rule than the caller's.
	next  string
	cause error
	away  bool
	// passing: another try may well go better. neutral: it says nothing of Vault.
	passing, neutral bool
	retryAfter       time.Duration
}

// orNil keeps a nil *Error from becoming an error that is not nil.
func (e *Error) orNil() error {
	if e == nil {
		return nil
	}
	return e
}

func (e *Error) Unwrap() error { return e.cause }

// Is maps the status to the sentinels.
func (e *Error) Is(target error) bool {
	login := e.Op == opLogin && !e.away && !e.neutral
	if login && e.Status != 0 {
		// A login method that is not there (404) must not look like a document that is not there.
		return target == ErrDenied || target == ErrLogin
	}
	switch target {
	case ErrLogin:
		return login || e.dead()
	case ErrAway:
		return e.away
	case ErrNotFound:
		return e.Status == http.StatusNotFound && !e.away
	case ErrDenied:
		return e.denied()
	case ErrConflict:
		return e.conflict()
	case ErrRefused:
		return !e.away && !e.conflict() && e.Status >= 400 && e.Status <= 500 && e.Status != http.StatusNotFound && e.Status != http.StatusForbidden
	}
	return false
}

func (e *Error) denied() bool { return e.Status == http.StatusForbidden && !e.away }

// dead: Vault does not know the token of the call (any more), whatever its policy.
func (e *Error) dead() bool {
	return e != nil && e.denied() && strings.Contains(strings.Join(e.Messages, " "), "invalid token")
}

// conflict: KV v2 answers 400 with "check-and-set parameter did not match the current version".
func (e *Error) conflict() bool {
	return e.Status == http.StatusBadRequest && strings.Contains(strings.Join(e.Messages, " "), "check-and-set parameter did not match")
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s %s of Vault at %s: %s", e.Op, e.Path, e.vault, e.what())
}

func (e *Error) what() string {
	if e.next != "" {
		return e.trouble() + "; " + e.next
	}
	return e.trouble()
}

// said is the status, with Vault's own words.
func (e *Error) said() string {
	said := strconv.Itoa(e.Status)
	if len(e.Messages) > 0 {
		said += ": " + strings.Join(e.Messages, "; ")
	}
	return said
}

func (e *Error) trouble() string {
	said := e.said()
	switch {
	case e.why != "":
		return e.why
	case e.cause != nil:
		if inner, ok := errors.AsType[*Error](e.cause); ok {
			return inner.Op + " " + inner.Path + ": " + inner.what()
		}
		return e.cause.Error()
	case e.Op == opLogin && e.Status >= 400 && !e.away:
		return "the login is refused (" + said + "): check vault.login, and in Vault the role and what it is bound to"
	case e.conflict():
		return "somebody else has written it meanwhile (" + said + "): read it again"
	case e.Status == http.StatusBadRequest, e.Status == http.StatusInternalServerError && !e.away:
		return "the request is refused (" + said + ")"
	case e.dead():
		return "our token is dead (" + said + "): it was revoked or is used up, and a new login follows"
	case e.Status == http.StatusForbidden:
		return "permission denied (" + said + "): compare the policy of our role with what `signet config vault-policy` prints"
	case e.Status == http.StatusNotFound:
		return "nothing is there (" + said + ")"
	case e.Status == http.StatusPreconditionFailed:
		return "the node that answers is behind the active one (" + said + "): try again"
	case e.Status == http.StatusTooManyRequests:
		return "too many requests for Vault's quotas (" + said + "): try again later, or raise the quota"
	case e.sealed():
		return "Vault is sealed (" + said + "): unseal it"
	case e.away:
		return "Vault can't do it now (" + said + "): look at its own log"
	}
	return "Vault answers " + said
}

func (e *Error) sealed() bool {
	return e.Status == http.StatusServiceUnavailable && strings.Contains(strings.Join(e.Messages, " "), "sealed")
}

// illness are words of an answer 500 that speaks of Vault itself: it has no leader, or can't read or write, or did not find the time.
// Other answers 500 are of an engine that can't do what it was asked, and often such that it never will: no key, wrong usage.
var illness = []string{
	"not active", "standby", "leader", "raft", "quorum", "sealed", "barrier", "storage", "consul", "etcd", "persist",
	"internal error", "audit", "deadline", "timeout", "timed out", "cancel", "connection", "connect:", "dial ", "eof", "i/o ", "no space", "too many open",
	"shutting down", "unavailable", "replication", "try again", "retry", "locked", "database",
}

// refusal reports whether an answer 500 is an engine's word, given in time.
func (e *Error) refusal(took, timeout time.Duration) bool {
	if e.Status != http.StatusInternalServerError || len(e.Messages) == 0 || e.Op == opLogin || e.Op == opHealth || took > timeout/2 {
		return false
	}
	said := strings.ToLower(strings.Join(e.Messages, " "))
	return !slices.ContainsFunc(illness, func(word string) bool { return strings.Contains(said, word) })
}

const (
	notVault = "its answer (%d) is not Vault's JSON: check that vault.address is Vault's API, and that no other server or proxy answers there"
	// A load balancer says so where it finds no Vault.
	notItsError = "its answer (%d) is not Vault's JSON: another server or a proxy answers in its place, as a load balancer does that finds no Vault behind it: look there, and at vault.address"
)

// judge turns an answer, or its absence, into one or the other.
func (c *Client) judge(ctx context.Context, r request, resp *api.Response, err error, took time.Duration, hide []string) (*api.Secret, *Error) {
	e := &Error{Op: r.op, Path: r.path, vault: c.address}
	if resp != nil {
		defer resp.Body.Close()
		e.Status = resp.StatusCode
	}
	var said *api.ResponseError
	switch {
	case resp == nil || err != nil && !errors.As(err, &said):
		return nil, c.unanswered(ctx, e, err, took, hide)
	case said != nil && !said.RawError:
		e.Messages = cleanAll(said.Errors, hide)
	}
	switch {
	case r.path == healthPath && (e.Status == http.StatusTooManyRequests || e.Status == 472 || e.Status == 473):
		// Standby, disaster recovery secondary, performance standby: each is well.
	case e.Status >= 300 && e.Status < 400:
		return nil, c.redirected(e, resp, hide)
	case said != nil && said.RawError && e.Status < 500:
		// Not even its 404 means that something is not there.
		e.away = true
		e.why = fmt.Sprintf(notVault, e.Status)
		return nil, e
	case e.Status == http.StatusNotFound:
		// KV v2 says here what it knows of a deleted version.
		secret, _ := parse(resp.Body)
		if secret != nil && len(secret.Data) == 0 {
			secret = nil
		}
		return secret, e
	case e.refusal(took, c.timeout):
		return nil, e
	case e.Status == http.StatusTooManyRequests, e.Status == http.StatusPreconditionFailed, e.Status >= 472 && e.Status <= 474,
		e.Status >= 500 && (e.Status != http.StatusNotImplemented || r.path == healthPath):
		// 474: a standby that does not see the active node. 501 of sys/health: not initialised.
		e.away, e.passing = true, true
		e.retryAfter = retryAfter(resp.Header.Get("Retry-After"), c.now())
		if said != nil && said.RawError && strings.TrimSpace(strings.Join(said.Errors, "")) != "" {
			e.why = fmt.Sprintf(notItsError, e.Status)
		}
		return nil, e
	case e.Status >= 400:
		return nil, e
	}
	secret, perr := parse(resp.Body)
	// Where there is nothing to be read or listed, Vault says 404; an empty answer is somebody else's.
	if perr != nil || secret == nil && (r.op == opRead || r.op == opList) {
		e.away, e.passing = true, true
		e.why = fmt.Sprintf(notVault, e.Status)
		return nil, e
	}
	return secret, nil
}

// parse decodes an answer, which wire has bounded. An empty one is nil.
func parse(body io.Reader) (*api.Secret, error) {
	data, err := io.ReadAll(body)
	if err != nil || len(bytes.TrimSpace(data)) == 0 {
		return nil, err
	}
	if !json.Valid(data) {
		return nil, errors.New("not JSON")
	}
	secret, err := api.ParseSecret(bytes.NewReader(data))
	if err != nil || secret == nil || secret.Auth == nil {
		return secret, err
	}
	// The api leaves it out.
	var login struct {
		Auth struct {
			Uses json.Number `json:"num_uses"`
		}
	}
	if err := json.Unmarshal(data, &login); err != nil {
		return nil, err
	}
	secret.Data = map[string]any{usesKey: login.Auth.Uses}
	return secret, nil
}

// usesKey is where an answer says how often a token can be used, 0 = without limit; that of a login as that of a lookup.
const usesKey = "num_uses"

// minPatience is how long a caller must have waited for its deadline to say something of Vault.
const minPatience = 200 * time.Millisecond

func (c *Client) unanswered(ctx context.Context, e *Error, err error, took time.Duration, hide []string) *Error {
	e.Status = 0
	switch {
	case errors.Is(err, ErrTooLarge):
		e.cause = ErrTooLarge
	case errors.Is(ctx.Err(), context.Canceled):
		e.cause, e.neutral = context.Canceled, true
	case errors.Is(err, context.DeadlineExceeded), ctx.Err() != nil:
		e.why = fmt.Sprintf("no answer within %s: check the way to Vault and its load", took.Round(time.Millisecond))
		e.cause, e.away, e.neutral = context.DeadlineExceeded, true, took < min(minPatience, c.timeout/2)
	default:
		// The error of the HTTP client repeats method and address.
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err
		}
		e.why = "Vault is not reachable: " + strings.Join(cleanAll([]string{err.Error()}, hide), "")
		var invalid x509.CertificateInvalidError
		switch _, unverified := errors.AsType[*tls.CertificateVerificationError](err); {
		case errors.As(err, &invalid) && invalid.Reason == x509.Expired && invalid.Cert != nil:
			e.why = "Vault is not reachable: " + c.untimely(invalid.Cert)
		case unverified:
			e.why += ": check vault.ca_file and vault.server_name"
		}
		e.away, e.passing = true, true
	}
	return e
}

// untimely is what a certificate that is not valid now needs.
func (c *Client) untimely(cert *x509.Certificate) string {
	name := clean(cert.Subject.String())
	if c.now().Before(cert.NotBefore) {
		return fmt.Sprintf("the certificate %q that it shows begins on %s only: set the clock right, here or where it was made", name, cert.NotBefore.UTC().Format(time.RFC3339))
	}
	return fmt.Sprintf("the certificate %q that it shows has expired on %s: renew it there (tls_cert_file of its listener, or the CA above it)", name, cert.NotAfter.UTC().Format(time.RFC3339))
}

func (c *Client) redirected(e *Error, resp *api.Response, hide []string) *Error {
	to := "elsewhere"
	if u, err := resp.Location(); err == nil && u.Host != "" {
		to = "to " + strings.Join(cleanAll([]string{u.Scheme + "://" + u.Host}, hide), "")
	}
	e.away = true
	e.why = fmt.Sprintf("it sends us %s (%d), and redirects are not followed, for they would carry the token along: set vault.address to the active node or to a load balancer in front of all", to, e.Status)
	return e
}

// notYet: Vault has not carried out the call, since there are too many, or since this node does not know enough yet.
func (e *Error) notYet() bool {
	return e.Status == http.StatusTooManyRequests || e.Status == http.StatusPreconditionFailed
}

// outcome tells the breaker what a call says of Vault's health.
func (e *Error) outcome(r request) (o outcome, why string) {
	switch {
	case e != nil && e.neutral:
		return unknown, ""
	case e != nil && e.notYet() && r.try > 0 && r.try < maxTries && e.retryAfter == 0:
		return alive, e.what() // it is tried again in a moment, and that counts
	case e != nil && e.away:
		return ill, e.what()
	case r.op == opHealth || e != nil && e.Status == http.StatusInternalServerError:
		return alive, ""
	}
	return well, ""
}

const (
	maxMessages = 4
	maxMessage  = 300
)

// cleanAll makes Vault's messages fit for a log: few, short, in one line, and without the secrets that were sent.
func cleanAll(messages, hide []string) []string {
	var out []string
	for _, m := range messages {
		for _, h := range hide {
			if h != "" {
				m = strings.ReplaceAll(m, h, "[secret]")
			}
		}
		if m = clean(m); m == "" {
			continue
		}
		if out = append(out, m); len(out) == maxMessages {
			break
		}
	}
	return out
}

func clean(m string) string {
	if len(m) > 4*maxMessage {
		m = m[:4*maxMessage]
	}
	m = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, m)
	m = strings.Join(strings.Fields(m), " ")
	// As Vault puts several errors into one: "1 error occurred: * permission denied".
	if head, rest, ok := strings.Cut(m, " occurred: * "); ok && (strings.HasSuffix(head, " error") || strings.HasSuffix(head, " errors")) && len(head) < 12 {
		m = strings.ReplaceAll(rest, " * ", ", ")
	}
	if len(m) > maxMessage {
		m = m[:maxMessage]
		for !utf8.ValidString(m) {
			m = m[:len(m)-1]
		}
		m += "…"
	}
	return m
}

// retryAfter reads the header, in seconds or as a date (RFC 9110 §10.2.3), from 0 to maxHold.
func retryAfter(header string, now time.Time) time.Duration {
	if header == "" {
		return 0
	}
	if n, err := strconv.ParseUint(header, 10, 32); err == nil {
		return min(time.Duration(n)*time.Second, maxHold)
	}
	if at, err := http.ParseTime(header); err == nil {
		return max(0, min(at.Sub(now), maxHold))
	}
	return 0
}
