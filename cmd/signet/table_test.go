package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/check"
)

// widest is the longest line of a text.
func widest(text string) (w int) {
	for line := range strings.Lines(text) {
		w = max(w, visible(strings.TrimSuffix(line, "\n")))
	}
	return w
}

func showOn(t *testing.T, columns int, format string, l listing) string {
	t.Helper()
	var out bytes.Buffer
	if err := (&cli{out: &out, columns: columns}).show(format, l); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// found is what stands in the widest tables of findings.
func found(colour bool) checkShown {
	return checkShown{check.Findings{
		{
			Code: check.CodeIssuing, Level: check.Error, About: "issuing", Stops: []string{check.Issuing},
			Message: "nothing can be issued since 2026-05-04T03:01:57Z: intermediate-1 ends at 2026-05-04T03:02:51Z, and a leaf has to live 55s; intermediate-2, which is to take over, is not signed",
			Mend:    "signet ca show --config /etc/signet/east.yaml intermediate-2; then, at the root: signet root sign; then: signet cluster install --config /etc/signet/east.yaml --chain CHAIN --root-fingerprint SHA256:…",
		},
		{Code: check.CodeModes, Level: check.Warning, About: "/var/lib/signet/a/very/long/path/that/does/not/end/for/a/while/east/server/state", Message: "it has mode 0644, so others than its owner may use it", Mend: "chmod 600 x"},
		{Code: check.CodeSwap, Level: check.OK, About: "swap", Message: "memory is not written to disk"},
	}, colour}
}

func change() logEntries {
	return logEntries{
		{Index: 4012, Time: time.Unix(0, 0), Kind: "authority-changed", Authority: "root-0123456789abcdef", Change: strings.Repeat("from published to active, because it was published; ", 5) + "forced"},
		{Index: 4011, Time: time.Unix(0, 0), Kind: "certificate-issued", SPIFFEID: "spiffe://example.org/ns/shop/sa/frontend", Serial: strings.Repeat("4F:", 19) + "91", Agent: "node-1"},
	}
}

func TestTablesFitTheTerminalTheyAreReadOn(t *testing.T) {
	for what, l := range map[string]listing{"findings": found(false), "painted findings": found(true), "changes of CAs": change(), "certificates": change()[1:]} {
		for _, columns := range []int{100, 120, 200} {
			if text := showOn(t, columns, "table", l); widest(text) > columns {
				t.Errorf("%s: %d columns where there are %d:\n%s", what, widest(text), columns, text)
			}
		}
		// Where nobody reads it with eyes, and with -o wide, a row is a line.
		for _, one := range []string{showOn(t, 0, "table", l), showOn(t, 120, "wide", l)} {
			if got := strings.Count(one, "\n"); got != len(l.rows())+1 {
				t.Errorf("%s: %d rows in %d lines:\n%s", what, len(l.rows()), got, one)
			}
		}
	}
}

func TestNothingOfASentenceIsLostInANarrowTable(t *testing.T) {
	squeeze := func(s string) string { return strings.Join(strings.Fields(s), "") }
	text := showOn(t, 120, "table", found(false))
	for _, f := range found(false).Findings {
		contains(t, squeeze(strings.ReplaceAll(text, "/var", " /var")), squeeze(f.Mend))
	}
	contains(t, text, "\n      mend: signet ca show --config /etc/signet/east.yaml intermediate-2; then, at the root: signet root sign;\n",
		"STATE       CODE      ABOUT", "nothing can be issued since 2026-05-04T03:01:57Z:\n", "memory is not written to disk")
	contains(t, squeeze(text), "(stopped:issuing)")
	if strings.Contains(text, "MEND") {
		t.Errorf("what stands below the rows has a column too:\n%s", text)
	}
	text = showOn(t, 120, "table", change())
	contains(t, text, "INDEX   TIME", "AUTHORITY", "root-0123456789abcdef", "\n      change: from published to active, because it was published; from published")
	contains(t, squeeze(text), squeeze(change()[0].Change))
	if strings.Contains(text, "SERIAL") || !strings.Contains(showOn(t, 0, "table", change()), "SERIAL") || !strings.Contains(showOn(t, 200, "table", change()[1:]), "SERIAL") {
		t.Errorf("serial numbers are shown where there is room for them, and only there:\n%s", text)
	}
}

func TestTextIsBrokenAtSpacesThenAtSlashesThenAnywhere(t *testing.T) {
	for text, want := range map[string]string{
		"":                   "",
		"0123456789":         "0123456789",
		"one two three":      "one two|three",
		"0123456789 x":       "0123456789|x",
		"/var/lib/signet/ca": "/var/lib/|signet/ca",
		"0123456789ab":       "0123456789|ab",
		"√√√√√√√√√√√":        "√√√√√√√√√√|√",
	} {
		if got := strings.Join(broken(text, 10), "|"); got != want {
			t.Errorf("%q is broken into %q, want %q", text, got, want)
		}
	}
}
