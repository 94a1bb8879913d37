package sds

import (
	"testing"
	"time"
)

func TestAGoodVerdictEndsAtBothEndsOfTheCertificate(t *testing.T) {
	r := newRoot(t, "root")
	from := time.Now().Truncate(time.Second)
	to := from.Add(time.Hour)
	b := bundleOf(exampleTD, 1, r)
	v := checkSVID(r.issue(t, leaf{id: web, notBefore: from, notAfter: to}), b, from.Add(time.Minute))
	for at, want := range map[time.Time]bool{from.Add(-time.Second): false, from: true, to: true, to.Add(time.Second): false} {
		if v.holds(b, at) != want {
			t.Errorf("at %s, valid from %s to %s: %v", at, from, to, !want)
		}
	}
}
