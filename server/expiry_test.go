package server

import (
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
)

func gauged(t *testing.T, s *live, series string) float64 {
	t.Helper()
	v, err := strconv.ParseFloat(counted(t, s, series), 64)
	if err != nil {
		t.Errorf("%s: %v", series, err)
	}
	return v
}

func TestTheEndsOfEverythingAreMetricsFromTheStart(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	c.peers = []Peer{{Cluster: "west", VerifierKey: "none"}}
	s := c.start(t, nil)
	_, text := get(t, s, "/metrics")
	series := 0
	for _, kind := range caKinds {
		for _, state := range caStates {
			for _, name := range []string{"signet_rotation_state", "signet_ca_earliest_not_after_timestamp_seconds"} {
				if series++; !strings.Contains(text, name+`{kind="`+kind+`",state="`+string(state)+`"} `) {
					t.Errorf("no %s of %s, %s", name, kind, state)
				}
			}
		}
	}
	for _, kind := range rotated {
		for _, code := range waits {
			counted(t, s, `signet_rotation_blocked{kind="`+kind+`",reason="`+string(code)+`"}`)
		}
	}
	mesh, _ := s.issuers.Snapshot().Active(identity.Mesh)
	for series, want := range map[string]float64{
		`signet_rotation_state{kind="root",state="active"}`:                                   1,
		`signet_ca_earliest_not_after_timestamp_seconds{kind="root",state="active"}`:          float64(c.root.cert.NotAfter.Unix()),
		`signet_ca_earliest_not_after_timestamp_seconds{kind="intermediate",state="active"}`:  float64(mesh.NotAfter().Unix()),
		`signet_bundle_earliest_root_not_after_timestamp_seconds{trust_domain="example.org"}`: float64(c.root.cert.NotAfter.Unix()),
		`signet_rotation_blocked{kind="intermediate",reason="time"}`:                          1,
		`signet_bundle_validators`:               0,
		`signet_reissue_holding`:                 0,
		`signet_tainted_accepted`:                0,
		`signet_ca_tainted{kind="intermediate"}`: 0,
		`signet_rotation_ready{kind="root"}`:     0,
	} {
		if got := gauged(t, s, series); got != want {
			t.Errorf("%s is %v, want %v", series, got, want)
		}
	}
	for series, least := range map[string]float64{
		`signet_issuable_seconds{kind="intermediate"}`:          900 * 3600,
		`signet_issuable_seconds{kind="control"}`:               900 * 3600,
		`signet_server_certificate_not_after_timestamp_seconds`: float64(time.Now().Unix()),
		`signet_rotation_report_age_seconds{cluster="west"}`:    1e300, // +Inf
	} {
		if got := gauged(t, s, series); !(got > least) {
			t.Errorf("%s is %v, want more than %v", series, got, least)
		}
	}
	if got := counted(t, s, `signet_ca_earliest_not_after_timestamp_seconds{kind="intermediate",state="retired"}`); got != "NaN" {
		t.Errorf("the end of what is not there: %s", got)
	}
	c.ahead.Store(int64(1100 * time.Hour))
	if got := gauged(t, s, `signet_issuable_seconds{kind="intermediate"}`); got != 0 {
		t.Errorf("after the end: %v s", got)
	}
}

func TestATaintAndAWaitingRotationShowInReadinessAndMetrics(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	a := s.listen(s.enrol("node-1"), false)
	soon(t, "the agent's word", func() bool { return !a.believes().IsZero() })
	soon(t, "it counts", func() bool { return gauged(t, s, `signet_bundle_validators_acked`) == 1 })
	_, err := s.rotations().TaintAuthority(t.Context(), &adminv1.TaintAuthorityRequest{Authority: "intermediate-1", Reason: "lost"})
	must(t, err)
	for series, want := range map[string]float64{
		`signet_tainted_accepted`: 1, `signet_ca_tainted{kind="intermediate"}`: 1,
		`signet_rotation_blocked{kind="intermediate",reason="signature"}`: 1,
	} {
		if got := gauged(t, s, series); got != want {
			t.Errorf("%s is %v, want %v", series, got, want)
		}
	}
	s.shows(http.StatusOK, "[!]intermediate-1 degraded: "+check.CodeTaint, "[!]intermediate-2 degraded: "+check.CodeSignature)
	// From outside, on the folder alone, while the server works on it.
	found, err := CheckRotation(t.Context(), c.config(), time.Now())
	must(t, err)
	codes := ""
	for _, f := range found {
		codes += f.Code + " "
	}
	if !strings.Contains(codes, check.CodeTaint) || !strings.Contains(codes, check.CodeSignature) {
		t.Errorf("from outside: %+v", found)
	}
}

// Three hours before the end is told from the end.
func TestNotAbleSoonIsToldFromNotAble(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	mesh, _ := s.issuers.Snapshot().Active(identity.Mesh)
	for _, try := range []struct {
		left  time.Duration
		want  string
		never string
		code  int
	}{
		{3 * time.Hour, "[!]issuing degraded: " + check.CodeIssuing + ": nothing can be issued from ", "stopped: issuing", http.StatusOK},
		{identity.MinTTL / 2, "[-]issuing failed: " + check.CodeIssuing + ": nothing can be issued since ", "[!]issuing", http.StatusServiceUnavailable},
		// A leaf of the shortest useful life does not fit any more.
		{identity.MinTTL / 2, "[-]issuer-mesh failed: " + check.CodeExpiry + ": it ends at ", "[!]issuing", http.StatusServiceUnavailable},
	} {
		aim := func(left time.Duration) { c.ahead.Store(int64(time.Until(mesh.NotAfter()) - left)) }
		aim(try.left + 30*time.Second) // that takes its time, too
		must(t, s.own.renew(t.Context()))
		soon(t, fmt.Sprintf("%s before the end: %d %s", try.left, try.code, try.want), func() bool {
			aim(try.left)
			code, text := get(t, s, "/readyz?verbose")
			seen := code == try.code && strings.Contains(text, try.want)
			if seen && strings.Contains(text, try.never) {
				t.Errorf("%s before the end: %d\n%s", try.left, code, text)
			}
			return seen
		})
		aim(try.left)
		if able := gauged(t, s, `signet_issuable_seconds{kind="intermediate"}`); able > 0 != (try.code == http.StatusOK) || able > try.left.Seconds() {
			t.Errorf("%s before the end: %v s", try.left, able)
		}
	}
}

// issuingOf is the one finding of whether leaves can be made, with what counts down taken out.
func issuingOf(t *testing.T, found check.Findings) (said check.Finding, ok bool) {
	t.Helper()
	for _, f := range found {
		if f.Code != check.CodeIssuing {
			continue
		}
		if ok {
			t.Errorf("it is said twice: %+v, %+v", said, f)
		}
		said, ok = f, true
	}
	said.Message = regexp.MustCompile(`, in [0-9hms]+`).ReplaceAllString(said.Message, "")
	return said, ok
}

// ready asks the HTTP door as a program does.
func (l *live) ready(t *testing.T) (found check.Findings) {
	t.Helper()
	request := must1(http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+l.Doors().HTTP+"/readyz", nil))
	request.Header.Set("Accept", "application/json")
	answer, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
	must(t, err)
	defer answer.Body.Close()
	var said struct{ Findings check.Findings }
	must(t, json.NewDecoder(answer.Body).Decode(&said))
	return said.Findings
}

// Through the life of an intermediate whose successor nobody signs.
func TestReadinessAndCheckSayTheSameOfTheEndOfIssuing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	mesh, _ := s.issuers.Snapshot().Active(identity.Mesh)
	for _, try := range []struct {
		left  time.Duration
		level check.Level
		over  bool
		words string
	}{
		{700 * time.Hour, check.OK, false, ""},
		{300 * time.Hour, check.Warning, false, "nothing can be issued from "},
		{50 * time.Hour, check.Error, false, "nothing can be issued from "},
		{2 * identity.MinTTL, check.Error, false, "nothing can be issued from "},
		{identity.MinTTL / 2, check.Error, true, "nothing can be issued since "},
		{-time.Second, check.Error, true, "intermediate-1 expired at "},
		{-100 * time.Hour, check.Error, true, "intermediate-1 expired at "},
	} {
		// Each look is at that time, however long the one before took.
		aim := func() { c.ahead.Store(int64(time.Until(mesh.NotAfter()) - try.left)) }
		aim()
		_, err := s.keeper.do(t.Context(), scheduled(), nil)
		must(t, err)
		aim()
		within, ok := issuingOf(t, s.ready(t))
		aim()
		found, err := CheckRotation(t.Context(), c.config(), c.now())
		must(t, err)
		outside, alike := issuingOf(t, found)
		if ok != alike || !reflect.DeepEqual(within, outside) {
			t.Errorf("%s before the end readiness says %+v, and check %+v", try.left, within, outside)
		}
		if ok != (try.level != check.OK) || within.Level != try.level || within.Blocks() != try.over || !strings.Contains(within.Message, try.words) {
			t.Errorf("%s before the end: %+v", try.left, within)
		}
		if ok && (!strings.Contains(within.Message, "intermediate-2, which is to take over, is not signed") || !strings.Contains(within.Mend, "signet ca show --config FILE intermediate-2; ")) {
			t.Errorf("%s before the end it is not said what helps: %+v", try.left, within)
		}
		aim()
		if able := gauged(t, s, `signet_issuable_seconds{kind="intermediate"}`); able > 0 == try.over {
			t.Errorf("%s before the end: %v s", try.left, able)
		}
	}
	// With the server away nobody shows a request but cluster init.
	must(t, s.stop())
	found, err := CheckRotation(t.Context(), c.config(), c.now())
	must(t, err)
	if f, _ := issuingOf(t, found); !f.Blocks() || !strings.HasPrefix(f.Mend, "signet cluster init --config FILE --csr-out CSR; ") {
		t.Errorf("without a server: %+v", f)
	}
}

func TestAClockInDoubtIsSaidToStopIssuing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	begun := time.Now()
	s.clock.mu.Lock()
	s.clock.elapsed = func() time.Duration { return time.Since(begun) }
	s.clock.base, s.clock.at = begun, 0
	s.clock.mu.Unlock()
	c.ahead.Store(int64(72 * time.Hour))
	f, _ := issuingOf(t, s.ready(t))
	since := c.now().UTC().Format("nothing can be issued since 2006-01-02T15:")
	if !f.Blocks() || !strings.HasPrefix(f.Message, since) || !strings.Contains(f.Message, errClock.Error()) || f.Mend != "timedatectl set-ntp true" {
		t.Errorf("%+v", f)
	}
	if able := gauged(t, s, `signet_issuable_seconds{kind="intermediate"}`); able != 0 {
		t.Errorf("%v s", able)
	}
	c.ahead.Store(0)
	if f, ok := issuingOf(t, s.ready(t)); ok {
		t.Errorf("with the clock right again: %+v", f)
	}
}
