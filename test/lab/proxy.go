package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// VaultProxy stands in front of a Vault and does to its answers what networks, proxies and Vaults do on bad days. Without a
// fault it passes everything on, so a client is pointed at it once, and faults come and go while it runs:
//
//	p, err := v.Proxy()
//	defer p.Close()
//	… vault.Config{Address: p.Address, CAFile: v.CAFile, …} …
//	p.Set("transit/sign/*", lab.Fault{Status: 503, Times: 2})
//	p.Clear()
//
// It listens as its Vault does: over TLS with a certificate of the same CA (CAFile, VaultServerName), or in clear with Plain.
// Client certificates are not passed on. The Vault behind it may be stopped and started again; while it doesn't listen, the
// proxy cuts connections without an answer.
type VaultProxy struct {
	// Address is its URL.
	Address string

	upstream string
	client   *http.Client
	server   *http.Server
	served   chan struct{}
	closed   chan struct{}
	close    func()

	mu     sync.Mutex
	faults []*setFault // the newest first
	seen   []string    // method and path of each request, without /v1/
}

// Fault is what happens to a request. The zero value passes it on; Delay goes with each of the others, of which one is given.
type Fault struct {
	// Delay passes before anything else.
	Delay time.Duration
	// Status answers with it and Errors, as Vault words errors, and Header; Vault doesn't get the request.
	Status int
	Errors []string
	Header http.Header
	// Hang never answers; Vault doesn't get the request. It ends with the request or with Close.
	Hang bool
	// Cut ends the connection in the middle of Vault's answer, whose length was announced.
	Cut bool
	// Oversized is the length in bytes of a well-formed answer with status 200, which comes in place of Vault's.
	Oversized int
	// Swapped waits for another request with the same fault; each gets the other's answer. Alone it waits as long as its client.
	Swapped bool
	// Rewritten changes the body of Vault's successful answers.
	Rewritten func(body []byte) []byte
	// Times is how many requests it happens to; 0 = all until Clear.
	Times int
}

type setFault struct {
	Fault
	pattern string
	left    int // with Times
	waiting chan *proxied
}

// proxied is an answer of Vault, or one half of a swap.
type proxied struct {
	status int
	header http.Header
	body   []byte
	swap   chan *proxied
}

// Proxy starts a proxy in front of the Vault. The caller closes it.
func (v *Vault) Proxy() (*VaultProxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &VaultProxy{Address: "http://" + l.Addr().String(), upstream: v.Address, served: make(chan struct{}), closed: make(chan struct{})}
	p.close = sync.OnceFunc(func() { close(p.closed) })
	// A fresh connection for each request, as one that is kept may be dead when Vault was restarted.
	transport := &http.Transport{DisableKeepAlives: true}
	p.client = &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	p.server = &http.Server{Handler: p, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0)}
	serve := func() { _ = p.server.Serve(l) }
	if v.authority != nil {
		cert, key, err := v.authority.issue(listenerCertificate)
		if err != nil {
			l.Close()
			return nil, err
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			l.Close()
			return nil, err
		}
		transport.TLSClientConfig = v.authority.clientConfig()
		p.Address = "https://" + l.Addr().String()
		p.server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{pair}}
		serve = func() { _ = p.server.ServeTLS(l, "", "") }
	}
	go func() { defer close(p.served); serve() }()
	return p, nil
}

// Close ends all requests and connections.
func (p *VaultProxy) Close() {
	p.close()
	p.server.Close()
	<-p.served
}

// Set makes a fault happen to requests for a path, without /v1/; it may end with *, as in a policy. The newest that fits counts.
func (p *VaultProxy) Set(path string, f Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = append([]*setFault{{Fault: f, pattern: path, left: f.Times, waiting: make(chan *proxied)}}, p.faults...)
}

// Clear ends all faults that were set. Requests that they have begun to happen to are not helped.
func (p *VaultProxy) Clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = nil
}

// Seen is how many requests have come for a path, as in Set, those with faults included.
func (p *VaultProxy) Seen(path string) (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.seen {
		if matches(path, s) {
			n++
		}
	}
	return n
}

func matches(pattern, path string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(path, prefix)
	}
	return pattern == path
}

// next counts a request, and says what happens to it.
func (p *VaultProxy) next(path string) *setFault {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen = append(p.seen, path)
	for _, f := range p.faults {
		if !matches(f.pattern, path) || f.Times > 0 && f.left == 0 {
			continue
		}
		f.left--
		return f
	}
	return &setFault{}
}

// ServeHTTP answers for the Vault.
func (p *VaultProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f := p.next(strings.TrimPrefix(r.URL.Path, "/v1/"))
	ctx := r.Context()
	if f.Delay > 0 {
		select {
		case <-time.After(f.Delay):
		case <-ctx.Done():
		case <-p.closed:
		}
	}
	switch {
	case f.Hang:
		select {
		case <-ctx.Done():
		case <-p.closed:
		}
		panic(http.ErrAbortHandler)
	case f.Status != 0:
		body, _ := json.Marshal(map[string]any{"errors": append([]string{}, f.Errors...)})
		header := f.Header.Clone()
		if header == nil {
			header = http.Header{}
		}
		header.Set("Content-Type", "application/json")
		(&proxied{status: f.Status, header: header, body: body}).write(w, false)
		return
	case f.Oversized > 0:
		w.Header().Set("Content-Type", "application/json")
		oversized(w, f.Oversized)
		return
	}
	a, err := p.ask(r)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if f.Rewritten != nil && a.status < 300 {
		a.body = f.Rewritten(a.body)
	}
	if f.Swapped {
		if a = p.swap(ctx, f, a); a == nil {
			panic(http.ErrAbortHandler)
		}
	}
	a.write(w, f.Cut)
}

// ask passes a request on.
func (p *VaultProxy) ask(r *http.Request) (*proxied, error) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 8<<20))
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(r.Context(), r.Method, p.upstream+r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = r.Header.Clone()
	resp, err := p.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(io.LimitReader(resp.Body, 8<<20)); err != nil {
		return nil, err
	}
	header := resp.Header.Clone()
	header.Del("Content-Length")
	return &proxied{status: resp.StatusCode, header: header, body: body}, nil
}

// swap gives this answer for another one.
func (p *VaultProxy) swap(ctx context.Context, f *setFault, mine *proxied) *proxied {
	mine.swap = make(chan *proxied, 1)
	select {
	case f.waiting <- mine: // somebody was waiting and will tell
		return <-mine.swap
	case other := <-f.waiting:
		other.swap <- mine
		return other
	case <-ctx.Done():
	case <-p.closed:
	}
	return nil
}

// write sends the answer, or only its first half.
func (a *proxied) write(w http.ResponseWriter, cut bool) {
	for k, v := range a.header {
		w.Header()[k] = v
	}
	if len(a.body) > 0 {
		w.Header().Set("Content-Length", fmt.Sprint(len(a.body)))
	}
	w.WriteHeader(a.status)
	if !cut {
		_, _ = w.Write(a.body)
		return
	}
	_, _ = w.Write(a.body[:len(a.body)/2])
	_ = http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

// oversized writes JSON of that many bytes.
func oversized(w io.Writer, size int) {
	const begin, end = `{"data":{"padding":"`, `"}}`
	_, _ = io.WriteString(w, begin)
	block := bytes.Repeat([]byte("x"), 32<<10)
	for left := size - len(begin) - len(end); left > 0; left -= len(block) {
		if _, err := w.Write(block[:min(left, len(block))]); err != nil {
			return
		}
	}
	_, _ = io.WriteString(w, end)
}
