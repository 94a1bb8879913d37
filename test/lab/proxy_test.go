package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// proxied stands before a server that answers as a Vault would, with the path that was asked for.
func proxyInFront(t *testing.T) *VaultProxy {
	t.Helper()
	authority, err := newThrowAwayCA("proxy test")
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_ = json.NewEncoder(w).Encode(map[string]any{"data": map[string]any{
			"path": r.URL.Path, "query": r.URL.RawQuery, "method": r.Method, "token": r.Header.Get("X-Vault-Token"), "body": string(body),
		}})
	}))
	t.Cleanup(server.Close)
	p, err := (&Vault{Address: server.URL, authority: authority}).Proxy()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

func askThrough(t *testing.T, p *VaultProxy) VaultClient {
	t.Helper()
	// It believes whom the proxy believes: the same CA.
	transport := &http.Transport{TLSClientConfig: p.client.Transport.(*http.Transport).TLSClientConfig.Clone(), ForceAttemptHTTP2: true}
	transport.TLSClientConfig.ServerName = VaultServerName
	t.Cleanup(transport.CloseIdleConnections)
	return VaultClient{"tok", p.Address, &http.Client{Transport: transport}}
}

func TestAProxyWithoutFaultsPassesEverythingOn(t *testing.T) {
	p := proxyInFront(t)
	a, err := askThrough(t, p).Write(t.Context(), "secret/data/a?x=1", map[string]any{"k": "v"})
	if err != nil {
		t.Fatal(err)
	}
	for k, want := range map[string]string{"path": "/v1/secret/data/a", "query": "x=1", "method": "POST", "token": "tok", "body": `{"k":"v"}`} {
		if got := a.String(k); got != want {
			t.Errorf("%s is %q, want %q", k, got, want)
		}
	}
	if p.Seen("secret/data/a") != 1 || p.Seen("secret/*") != 1 || p.Seen("secret") != 0 {
		t.Error("the request was not counted by its path")
	}
}

func TestEachFaultOfTheProxyHappens(t *testing.T) {
	p := proxyInFront(t)
	c, ctx := askThrough(t, p), t.Context()

	p.Set("a/*", Fault{Status: 429, Errors: []string{"too many"}, Header: http.Header{"Retry-After": {"7"}}, Times: 1})
	if _, err := c.Read(ctx, "other"); err != nil {
		t.Errorf("another path: %v", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.Address+"/v1/a/b", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != 429 || resp.Header.Get("Retry-After") != "7" || string(body) != `{"errors":["too many"]}` {
		t.Errorf("got %s %v %s", resp.Status, resp.Header, body)
	}
	if _, err := c.Read(ctx, "a/b"); err != nil {
		t.Errorf("it was to happen once: %v", err)
	}

	p.Set("a/cut", Fault{Cut: true})
	if _, err := c.Read(ctx, "a/cut"); err == nil || VaultStatus(err) != 0 {
		t.Errorf("a cut answer: %v", err)
	}

	const size = 3 << 20
	p.Set("a/big", Fault{Oversized: size})
	if resp, err := c.client.Get(p.Address + "/v1/a/big"); err != nil {
		t.Error(err)
	} else {
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if len(b) != size || !json.Valid(b) {
			t.Errorf("%d bytes, JSON: %v", len(b), json.Valid(b))
		}
	}

	p.Set("a/slow", Fault{Delay: 60 * time.Millisecond})
	began := time.Now()
	if _, err := c.Read(ctx, "a/slow"); err != nil || time.Since(began) < 60*time.Millisecond {
		t.Errorf("after %s: %v", time.Since(began), err)
	}

	p.Set("a/hung", Fault{Hang: true})
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if _, err := c.Read(short, "a/hung"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a hung request: %v", err)
	}

	p.Set("a/lie", Fault{Rewritten: func(b []byte) []byte { return []byte(strings.ReplaceAll(string(b), "lie", "truth")) }})
	if a, err := c.Read(ctx, "a/lie"); err != nil || a.String("path") != "/v1/a/truth" {
		t.Errorf("got %v, %v", a, err)
	}

	p.Clear()
	for _, path := range []string{"a/cut", "a/big", "a/slow", "a/hung", "a/lie"} {
		if a, err := c.Read(ctx, path); err != nil || a.String("path") != "/v1/"+path {
			t.Errorf("%s after Clear: %v, %v", path, a, err)
		}
	}
}

func TestTwoAnswersAreSwapped(t *testing.T) {
	p := proxyInFront(t)
	c := askThrough(t, p)
	p.Set("a/*", Fault{Swapped: true, Times: 2})
	var got [2]string
	var both sync.WaitGroup
	for i := range got {
		both.Go(func() {
			if a, err := c.Read(t.Context(), fmt.Sprintf("a/%d", i)); err != nil {
				t.Error(err)
			} else {
				got[i] = a.String("path")
			}
		})
	}
	both.Wait()
	if got != [2]string{"/v1/a/1", "/v1/a/0"} {
		t.Errorf("got %v", got)
	}
}

func TestAProxyEndsWithRequestsThatHang(t *testing.T) {
	p := proxyInFront(t)
	p.Set("*", Fault{Hang: true})
	ended := make(chan error, 1)
	go func() {
		_, err := askThrough(t, p).Read(context.Background(), "a")
		ended <- err
	}()
	if err := Until(t.Context(), "the request has come", 20*time.Second, func() error {
		if p.Seen("a") == 0 {
			return errors.New("not yet")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	p.Close()
	if err := <-ended; err == nil {
		t.Error("it was answered")
	}
}
