package vault

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

// Whatever an answer holds, it ends as a secret or as a bounded error of one line that does not repeat what was sent.
func FuzzAnswer(f *testing.F) {
	f.Add(200, []byte(`{"data":{"a":"b"}}`), "", "")
	f.Add(403, []byte(`{"errors":["1 error occurred:\n\t* permission denied\n\n"]}`), "", "")
	f.Add(429, []byte(`{"errors":["quota"]}`), "5", "")
	f.Add(503, []byte(`{"errors":["Vault is sealed hvs.the-token"]}`), "Tue, 01 Jan 2030 00:00:05 GMT", "")
	f.Add(307, []byte(``), "", "https://elsewhere/v1/a")
	f.Add(307, []byte(``), "", "://\x00")
	f.Add(404, []byte(`{"data":{"metadata":{"version":3}},"errors":[]}`), "", "")
	f.Add(404, []byte(`null`), "", "")
	f.Add(200, []byte(`{"errors":{"a":1},"x":2}`), "", "")
	f.Add(500, []byte(`{"errors":["`+strings.Repeat("\\u202e", 4000)+`"]}`), "", "")
	f.Add(200, []byte(`{"auth":{"client_token":"x","lease_duration":9223372036854775807}}`), "", "")
	config := appRole(f)
	f.Fuzz(func(t *testing.T, status int, body []byte, wait, location string) {
		if status < 200 || status > 599 || len(body) > 1<<16 || !utf8.ValidString(location) {
			return
		}
		cl := connect(t, config, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", wait)
			w.Header().Set("Location", location)
			w.WriteHeader(status)
			_, _ = w.Write(body)
		}))
		secret, e := cl.send(t.Context(), cl.as("hvs.the-token", cl.calls), request{op: opRead, path: "a"})
		if e == nil {
			if secret != nil && secret.Auth != nil {
				s := cl.newSession(secret.Auth)
				if s.until.Before(s.born) && !s.until.IsZero() {
					t.Fatalf("a token that ends at %s before it began", s.until)
				}
			}
			return
		}
		text := e.Error()
		if len(text) > 2500 || !utf8.ValidString(text) || strings.Contains(text, "hvs.the-token") {
			t.Fatalf("%q", text)
		}
		for _, r := range text {
			if !unicode.IsPrint(r) {
				t.Fatalf("%q", text)
			}
		}
		if e.retryAfter < 0 || e.retryAfter > maxHold {
			t.Fatalf("held for %s", e.retryAfter)
		}
		n := 0
		for _, sentinel := range []error{ErrAway, ErrNotFound, ErrDenied, ErrRefused, ErrConflict} {
			if errors.Is(e, sentinel) {
				n++
			}
		}
		if n > 1 {
			t.Fatalf("%q is several things", text)
		}
	})
}

// What a login's or a lookup's answer says of a token makes a session or an error, and nothing overflows.
func FuzzTokenAnswer(f *testing.F) {
	f.Add([]byte(`{"data":{"ttl":60,"renewable":true}}`))
	f.Add([]byte(`{"data":{"ttl":"60s","renewable":"yes"}}`))
	f.Add([]byte(`{"data":{"ttl":-1}}`))
	f.Add([]byte(`{"data":{"ttl":1e300}}`))
	f.Add([]byte(`{"data":{"ttl":99999999999999999999}}`))
	f.Add([]byte(`{"auth":{"client_token":"hvs.x","lease_duration":-5}}`))
	f.Add([]byte(`{"auth":{"client_token":"hvs.x","num_uses":5}}`))
	f.Add([]byte(`{"auth":{"client_token":"hvs.x","num_uses":"many"}}`))
	f.Add([]byte(`{"auth":{"client_token":"hvs.x","lease_duration":9223372036854775807,"renewable":true}}`))
	byRole := appRole(f)
	byFile := Config{Address: "http://127.0.0.1:1", Login: Login{Method: "token", TokenFile: secretFile(f, "t", "hvs.x")}}
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, config := range []Config{byRole, byFile} {
			cl := connect(t, config, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) }))
			with, err := cl.credential()
			if err != nil {
				t.Fatal(err)
			}
			s, refused := cl.enter(t.Context(), with)
			if (s == nil) == (refused == nil) {
				t.Fatal(s, refused)
			}
			if s != nil && !s.until.IsZero() && (s.until.Before(s.born) || s.until.Sub(s.born) > maxLife) {
				t.Fatalf("from %s to %s", s.born, s.until)
			}
		}
	})
}

func FuzzMessages(f *testing.F) {
	f.Add("1 error occurred:\n\t* permission denied\n\n", "hvs.secret")
	f.Add(strings.Repeat("é", 1000), "")
	f.Add("\xff\xfe", "\xff")
	f.Fuzz(func(t *testing.T, m, secret string) {
		for _, c := range cleanAll([]string{m, m, m, m, m, m}, []string{secret}) {
			if len(c) > maxMessage+len("…") || !utf8.ValidString(c) || strings.ContainsAny(c, "\n\r\t\x1b") {
				t.Fatalf("%q", c)
			}
		}
	})
}

func FuzzRetryAfter(f *testing.F) {
	f.Add("5")
	f.Add("Tue, 01 Jan 2030 00:00:05 GMT")
	f.Fuzz(func(t *testing.T, header string) {
		if d := retryAfter(header, time.Now()); d < 0 || d > maxHold {
			t.Fatal(d)
		}
	})
}

// A path that is let through reaches Vault as the same path.
func FuzzPath(f *testing.F) {
	for _, p := range []string{"a/b", "a/../b", "a//b", "a?b=c", "a%2fb", "a#b", "a;b", `a\b`, "a/b c"} {
		f.Add(p)
	}
	config := appRole(f)
	f.Fuzz(func(t *testing.T, path string) {
		if checkPath(path) != nil {
			return
		}
		got := ""
		cl := connect(t, config, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			got = r.URL.Path
			if r.URL.RawQuery != "" {
				t.Errorf("%q has a query", path)
			}
		}))
		_, _ = cl.send(t.Context(), cl.calls, request{op: opRead, path: path})
		if got != "/v1/"+path {
			t.Fatalf("%q reaches Vault as %q", path, got)
		}
	})
}
