// Package vault is the connection to HashiCorp Vault (or OpenBao): it logs in, keeps the token alive, and makes calls that
// end in seconds whatever Vault does. What is said over it (Transit, PKI, KV) is said by the packages inside this one.
//
// It promises:
//   - A call ends within Config.Timeout, its login and its retries included; answers over 1 MiB are refused unread.
//   - Whatever passes with time (unreachable, sealed, no leader, too many requests) is ErrAway, and after a few failures in a
//     row Vault is left alone for 1 s to 5 s (breaker.go). The caller goes on with what it has.
//   - There is at most one login at a time, however many calls wait for it (session.go).
//   - Tokens, secret-ids and JWTs are in no error, log line or dump, not even where Vault's answer repeats them.
//   - No environment variable decides anything.
package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/hashicorp/vault/api"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/internal/bell"
)

// DefaultTimeout bounds a call where Config says nothing.
const DefaultTimeout = 3 * time.Second

const (
	minTimeout = 100 * time.Millisecond
	maxTimeout = time.Minute
	// maxAnswer is far above what any path that we use answers with.
	maxAnswer = 1 << 20
	maxPath   = 1 << 10
)

// Config says where Vault is and how to log in to it. Errors name the fields as the configuration file does.
type Config struct {
	// Address is https://host[:port], or http:// for a loopback address.
	Address   string
	Namespace string
	// CAFile has the certificates under which Vault's own must be; "" = the system's. It is read anew when it changes.
	CAFile string
	// ServerName is the name that Vault's certificate must have; "" = the host of Address.
	ServerName string
	// Timeout of one call, from 100 ms to 1 min; 0 = DefaultTimeout.
	Timeout time.Duration
	Login   Login

	Now     func() time.Time
	Logger  *slog.Logger
	Metrics prometheus.Registerer
}

// Client is one connection to Vault, for use by any number of goroutines.
type Client struct {
	address   string
	namespace string
	timeout   time.Duration
	login     Login
	now       func() time.Time
	log       *slog.Logger
	metrics   *metrics
	breaker   *breaker
	wire      *wire
	// calls and renewals make requests without a token, of which each session has a copy with its own. They differ in
	// that a renewal has no caller with a deadline, and is counted where it passes.
	calls, renewals *api.Client
	running         atomic.Bool
	// shown is the secret of the last login.
	shown atomic.Pointer[func() string]
	// root ends with Close, and with it a login, which has no one caller.
	root context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup

	mu     sync.Mutex
	closed bool
	// cur is what calls use; nil before the first login.
	cur     *session
	flight  *flight
	refused refusal
	// forced is when a young session was last given up because Vault denied all that it asked; stillborn counts tokens in a row
	// that were dead at once. said is what the log has of logins.
	forced          time.Time
	stillborn, said int
	// vain says for which calls a new login has not helped, entered with what the last one was made.
	vain    map[string]vain
	entered [32]byte
	// unread is since when Run finds the secret unreadable, zero where it does not.
	unread time.Time
	// run is Run's, which ends the renewals that its watcher sends without a context.
	run context.Context
	// renewAfter is when a token may be renewed, after a renewal that failed.
	renewAfter time.Time
	// changed rings when cur is replaced.
	changed bell.Bell
	// opened has Run look after Vault at the time that the breaker sets.
	opened chan struct{}
	// engines are by name, in order.
	engines []*Engine
}

// New checks the configuration, its CA file and client certificate included. It talks to nobody.
func New(c Config) (*Client, error) {
	address, err := checkAddress(c.Address)
	if err != nil {
		return nil, err
	}
	if err := c.Login.check(address.Scheme); err != nil {
		return nil, err
	}
	if strings.Trim(c.Namespace, "/") != c.Namespace || !printable(c.Namespace) {
		return nil, fmt.Errorf("vault.namespace %.64q: want it as in `vault namespace list`, without a slash at either end", c.Namespace)
	}
	switch {
	case c.Timeout == 0:
		c.Timeout = DefaultTimeout
	case c.Timeout < minTimeout || c.Timeout > maxTimeout:
		return nil, fmt.Errorf("vault.timeout %s: want %s to %s for one call", c.Timeout, minTimeout, maxTimeout)
	}
	if address.Scheme == "http" && (c.CAFile != "" || c.ServerName != "") {
		return nil, fmt.Errorf("vault.ca_file and vault.server_name are for https, but vault.address is %s: drop one of them", c.Address)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	cl := &Client{
		address: strings.TrimSuffix(c.Address, "/"), namespace: c.Namespace, timeout: c.Timeout, login: c.Login,
		now: c.Now, log: c.Logger, opened: make(chan struct{}, 1),
	}
	cl.breaker = newBreaker(c.Now, cl.turned)
	if cl.wire, err = newWire(c); err != nil {
		return nil, err
	}
	if cl.calls, err = newAPI(c, 0, cl.wire); err != nil {
		return nil, err
	}
	if cl.renewals, err = newAPI(c, c.Timeout, renewals{cl}); err != nil {
		return nil, err
	}
	if cl.metrics, err = newMetrics(c.Metrics, cl); err != nil {
		return nil, err
	}
	cl.root, cl.end = context.WithCancel(context.Background())
	return cl, nil
}

func checkAddress(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case s == "":
		return nil, errors.New("vault.address is missing: give the address of Vault's API, for example https://vault.example.org:8200")
	case err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || (u.Scheme != "https" && u.Scheme != "http"):
		return nil, errors.New("vault.address: want https://host:port, with no user, query or fragment in it")
	case u.Scheme == "http" && !loopback(u.Hostname()):
		return nil, fmt.Errorf("vault.address %.200s: the token would cross the network in the clear: use https, http is for loopback addresses only", s)
	}
	return u, nil
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// newAPI undoes what the api takes from the environment (VAULT_TOKEN, VAULT_NAMESPACE, VAULT_HEADERS, VAULT_WRAP_TTL).
func newAPI(c Config, timeout time.Duration, by http.RoundTripper) (*api.Client, error) {
	client, err := api.NewClient(&api.Config{
		Address: strings.TrimSuffix(c.Address, "/"),
		HttpClient: &http.Client{
			Transport:     by,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		// A redirect takes the token along to wherever an answer points: none is followed.
		DisableRedirects: true,
		Timeout:          timeout,
		MaxRetries:       0,
		CheckRetry:       func(context.Context, *http.Response, error) (bool, error) { return false, nil },
	})
	if err != nil {
		return nil, fmt.Errorf("set up the Vault client: %s: if a VAULT_ variable in this process's environment is the cause, unset it, for none is used", clean(err.Error()))
	}
	client.SetHeaders(http.Header{api.RequestHeaderName: {"true"}})
	client.ClearToken()
	client.SetWrappingLookupFunc(func(string, string) string { return "" })
	client.SetNamespace(c.Namespace)
	return client, nil
}

// Close ends Run and a login that is under way, and closes the connections. Calls fail after it.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.end()
	c.wg.Wait()
	c.wire.CloseIdleConnections()
}

func (c *Client) String() string               { return "Vault at " + c.address }
func (c *Client) Format(s fmt.State, _ rune)   { _, _ = io.WriteString(s, c.String()) }
func (c *Client) LogValue() slog.Value         { return slog.StringValue(c.String()) }
func (c *Client) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// Operations, as errors and metrics name them.
const (
	opRead   = "read"
	opWrite  = "write"
	opList   = "list"
	opLogin  = "login"
	opRenew  = "renew"
	opHealth = "health"
)

const (
	healthPath = "sys/health"
	lookupPath = "auth/token/lookup-self"
)

// request is one call as it goes to Vault, perhaps more than once.
type request struct {
	op, path string
	body     []byte
	// engine is by which way it goes; nil for what is the connection's own.
	engine *Engine
	// try counts from 1; 0 for what is not tried again.
	try int
	// fresh asks for a connection of its own, so that the newest client certificate is shown.
	fresh bool
}

// Read returns what is at the path, and ErrNotFound where there is nothing. Beside ErrNotFound the answer may still be
// there: that of KV for a deleted version, with its number.
func (c *Client) Read(ctx context.Context, path string) (*api.Secret, error) {
	return c.read(ctx, nil, path)
}

func (c *Client) read(ctx context.Context, by *Engine, path string) (*api.Secret, error) {
	return c.call(ctx, request{op: opRead, path: path, engine: by})
}

// Write sends the body and returns the answer, nil for an empty one.
func (c *Client) Write(ctx context.Context, path string, body map[string]any) (*api.Secret, error) {
	return c.write(ctx, nil, path, body)
}

func (c *Client) write(ctx context.Context, by *Engine, path string, body map[string]any) (*api.Secret, error) {
	data, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("write %s to Vault: encode the request: %w", path, err)
	}
	secret, err := c.call(ctx, request{op: opWrite, path: path, body: data, engine: by})
	if err != nil {
		return nil, err
	}
	return secret, nil
}

// List returns the names under the path, folders with a slash at the end; nil where there is nothing.
func (c *Client) List(ctx context.Context, path string) ([]string, error) {
	return c.list(ctx, nil, path)
}

func (c *Client) list(ctx context.Context, by *Engine, path string) ([]string, error) {
	path = strings.TrimSuffix(path, "/")
	secret, err := c.call(ctx, request{op: opList, path: path, engine: by})
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	names, ok := stringsOf(secret.Data["keys"])
	if !ok {
		return nil, &Error{Op: opList, Path: path, Status: http.StatusOK, vault: c.address, why: "its answer is not a list of names"}
	}
	return names, nil
}

func stringsOf(v any) ([]string, bool) {
	list, ok := v.([]any)
	if !ok {
		return nil, false
	}
	out := make([]string, len(list))
	for i := range list {
		if out[i], ok = list[i].(string); !ok {
			return nil, false
		}
	}
	return out, true
}

// call makes one call with the session at hand, all within one deadline.
func (c *Client) call(ctx context.Context, r request) (*api.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	began := time.Now()
	secret, err := c.callWithin(ctx, r)
	c.metrics.observe(r.op, err, time.Since(began))
	return secret, err
}

func (c *Client) callWithin(ctx context.Context, r request) (*api.Secret, error) {
	if err := checkPath(r.path); err != nil {
		return nil, &Error{Op: r.op, Path: r.path, vault: c.address, why: err.Error()}
	}
	s, err := c.session(ctx)
	if err != nil {
		return nil, c.failed(r, err)
	}
	secret, verr := c.patiently(ctx, s.calls(), r)
	if verr == nil || !verr.denied() {
		c.notInVain(r)
		return secret, verr.orNil()
	}
	// Denied by the policy, or the token is dead, which not every Vault tells apart. One new login, one more try.
	next, err := c.instead(ctx, s, r, verr)
	if err != nil {
		return nil, c.failed(r, err)
	}
	if next == nil {
		return secret, verr
	}
	switch secret, verr = c.patiently(ctx, next.calls(), r); {
	case verr.dead():
		c.bury(next)
	case verr != nil && verr.denied():
		c.inVain(r)
	default:
		c.notInVain(r)
	}
	return secret, verr.orNil()
}

// failed says that a call was not made because the login before it failed.
func (c *Client) failed(r request, err error) error {
	return &Error{Op: r.op, Path: r.path, vault: c.address, cause: err}
}

// checkPath refuses what would name another path once it is cleaned on its way.
func checkPath(path string) error {
	if path == "" || len(path) > maxPath || !printable(path) {
		return errors.New("that is no path in Vault: want 1 to 1024 printable characters")
	}
	for segment := range strings.SplitSeq(path, "/") {
		if segment == "" || segment == "." || segment == ".." {
			return errors.New("that is no path in Vault: it has an empty segment, `.` or `..` in it")
		}
	}
	return nil
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}

const (
	// tries of a call that Vault has surely not carried out (412, 429).
	maxTries = 3
	// maxHold bounds what a Retry-After can do to us.
	maxHold = 30 * time.Second
)

// patiently makes a call again where that is safe and there is time for it.
func (c *Client) patiently(ctx context.Context, a *api.Client, r request) (*api.Secret, *Error) {
	wait := &backoff.ExponentialBackOff{InitialInterval: 100 * time.Millisecond, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: time.Second}
	wait.Reset()
	for r.try = 1; ; r.try++ {
		secret, err := c.send(ctx, a, r)
		if err == nil || !err.again(r) {
			return secret, err
		}
		pause := wait.NextBackOff()
		if err.retryAfter > 0 {
			// Not all at the same moment, and none before it.
			pause += err.retryAfter
		}
		if until, ok := ctx.Deadline(); ok && time.Until(until) <= pause {
			return secret, err
		}
		if sleep(ctx, pause) != nil {
			return secret, err
		}
	}
}

// again reports whether a call that failed so may be made once more. A read may at any time, another only if Vault said
// that it did not carry it out.
func (e *Error) again(r request) bool {
	switch {
	case e.notYet():
		return r.try < maxTries
	case r.op == opRead || r.op == opList:
		return r.try < 2 && e.passing
	}
	return false
}

func sleep(ctx context.Context, d time.Duration) error {
	bell.Wait(ctx, d, nil)
	return ctx.Err()
}

// send makes a call once, if the breaker lets it.
func (c *Client) send(ctx context.Context, a *api.Client, r request) (*api.Secret, *Error) {
	done, err := c.admit(r)
	if err != nil {
		return nil, &Error{Op: r.op, Path: r.path, vault: c.address, away: true, cause: err}
	}
	began := time.Now()
	resp, err := c.transmit(ctx, a, r)
	secret, e := c.judge(ctx, r, resp, err, time.Since(began), c.secrets(a.Token()))
	if e != nil && e.retryAfter > 0 {
		c.hold(r, e.retryAfter)
	}
	done(e.outcome(r))
	return secret, e
}

// secrets are what no error may repeat of an answer: the token of the request, and what the last login showed.
func (c *Client) secrets(token string) []string {
	hide := []string{token}
	if shown := c.shown.Load(); shown != nil {
		hide = append(hide, (*shown)())
	}
	return hide
}

func (c *Client) transmit(ctx context.Context, a *api.Client, r request) (*api.Response, error) {
	if r.path == healthPath {
		// It exists in the root namespace only.
		a = a.WithNamespace("")
	}
	if r.fresh {
		ctx = context.WithValue(ctx, freshKey{}, true)
	}
	l := a.Logical()
	switch r.op {
	case opWrite, opLogin:
		return l.WriteRawWithContext(ctx, r.path, r.body)
	case opList:
		return l.ReadRawWithDataWithContext(ctx, r.path, url.Values{"list": {"true"}})
	}
	return l.ReadRawWithContext(ctx, r.path)
}
