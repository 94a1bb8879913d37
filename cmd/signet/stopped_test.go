package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"math/big"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/server"
)

func TestTheStatusSaysThatNothingCanBeIssued(t *testing.T) {
	d := &doorman{status: inTheMiddle()}
	d.status.Tainted, d.status.Reissue = nil, nil
	d.status.Stopped = &adminv1.IssuingStopped{
		Since: timestamppb.New(time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)), Why: "intermediate-1 expired at 2026-05-04T03:02:01Z",
		Mend: "signet rotation start --config FILE intermediate",
	}
	d.list = &adminv1.ListAuthoritiesResponse{Authorities: d.status.Authorities, Stopped: d.status.Stopped}
	h, east := door(t, d)
	out, errs := h.must(exitNo, "rotation", "status", "--config", east)
	contains(t, errs, "nothing can be issued")
	contains(t, strings.Join(strings.Fields(out), " "),
		"STOPPED NOTHING CAN BE ISSUED since 2026-05-04T03:02:01Z, because intermediate-1 expired at 2026-05-04T03:02:01Z - to do: signet rotation start --config "+east+" intermediate CAs")
	for line := range strings.Lines(out) {
		if words := strings.Fields(line); len(words) > 2 && words[0] == "intermediate-1" && (!strings.Contains(line, " STOPPED ") || strings.Contains(line, " yes ")) {
			t.Errorf("it is said to sign: %s", line)
		}
	}
	out, _ = h.must(exitNo, "rotation", "status", "--config", east, "-o", "json")
	keys := jsonKeys(t, out)
	contains(t, keys, ".issuing_stopped.since", ".issuing_stopped.why", ".issuing_stopped.mend")
	for _, list := range []string{"ca list", "trust list"} {
		out, _ = h.must(exitYes, append(strings.Fields(list), "--config", east)...)
		contains(t, out, " STOPPED ")
		out, _ = h.must(exitYes, append(strings.Fields(list), "--config", east, "-o", "json")...)
		if strings.Contains(out, `"signing": true`) {
			t.Errorf("%s says that something signs:\n%s", list, out)
		}
	}
	out, _ = h.must(exitYes, "ca", "show", "--config", east, "intermediate-1")
	contains(t, out, "no: NOTHING CAN BE ISSUED since 2026-05-04T03:02:01Z")
	out, _ = h.must(exitYes, "ca", "show", "--config", east, "intermediate-2")
	if strings.Contains(out, "ISSUED") {
		t.Errorf("what is not to sign is said to be stopped:\n%s", out)
	}
	// A server that says nothing of it issues.
	d.status.Stopped, d.list.Stopped = nil, nil
	out, _ = h.must(exitYes, "rotation", "status", "--config", east)
	if strings.Contains(out, "STOPPED") {
		t.Errorf("it is said to be stopped:\n%s", out)
	}
}

// Scripts ask for a key of each element.
func TestAStepAlwaysNamesItsAuthority(t *testing.T) {
	text, err := json.Marshal(describeSteps([]*adminv1.RotationStep{{Kind: "intermediate", To: "prepared"}}))
	if err != nil || !strings.Contains(string(text), `"authority":""`) {
		t.Errorf("%s, %v", text, err)
	}
}

func TestWhatCouldNotBeDoneIsNoRefusal(t *testing.T) {
	d := &doorman{refuse: status.Error(codes.Unavailable, "the disk is full; make room and repeat"), list: &adminv1.ListAuthoritiesResponse{}}
	h, east := door(t, d)
	_, errs := h.must(exitCouldNotSay, "ca", "taint", "--config", east, "intermediate-1", "--reason", "stolen", "--yes")
	contains(t, errs, "the disk is full")
}

func TestALifeIsToldInDays(t *testing.T) {
	for d, want := range map[time.Duration]string{
		90 * day:               "90 days",
		90*day - time.Second:   "90 days",
		89*day + 5*time.Hour:   "89 days 5h",
		36 * time.Hour:         "36h0m0s",
		2*day - time.Second:    "47h59m59s",
		3650*day + time.Minute: "3650 days",
	} {
		if got := days(d); got != want {
			t.Errorf("%s is told as %q, want %q", d, got, want)
		}
	}
}

// caOf makes a certificate of a CA that ends then, under a parent (nil = itself).
func caOf(t *testing.T, cn string, from, until time.Time, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: cn}, NotBefore: from, NotAfter: until,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func TestAnInstalledChainEndsWithItsRoot(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	root, key := caOf(t, "root", now, now.Add(100*day), nil, nil)
	long, _ := caOf(t, "long", now, now.Add(200*day), root, key)
	short, _ := caOf(t, "short", now, now.Add(50*day), root, key)
	for _, try := range []struct {
		own  *x509.Certificate
		want string
	}{{long, clock(root.NotAfter) + ", cut short: its root ends then\n"}, {short, clock(short.NotAfter) + "\n"}} {
		var out, errs strings.Builder
		c := &cli{out: &out, err: &errs}
		if err := c.printInstalled(ca.EncodeChain(try.own, root), nil, installed{}, false); err != nil {
			t.Fatal(err)
		}
		if _, got, _ := strings.Cut(errs.String(), "expires:"); !strings.HasPrefix(strings.TrimLeft(got, " "), try.want) {
			t.Errorf("%s is said to end so:\n%swant %s", try.own.Subject.CommonName, errs.String(), try.want)
		}
	}
}

// After a ceremony for several successors nothing is wrong, and least of all the clock.
func TestCheckKnowsASuccessorFromAClockThatIsBehind(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	root, key := caOf(t, "root", now.Add(-day), now.Add(100*day), nil, nil)
	shown := server.Cluster{RootCertificates: []*x509.Certificate{root}}
	add := func(id string, state ca.State, from, until, end time.Time) {
		cert, _ := caOf(t, id, from, until, root, key)
		shown.Authorities = append(shown.Authorities, server.AuthorityInfo{
			ID: id, Hierarchy: identity.Mesh.String(), State: state, NotBefore: &from, NotAfter: &end, Certificate: cert,
			Ref: keystore.Ref{Backend: keystore.BackendMemory, Name: id, Version: 1},
		})
	}
	add("i-1", ca.Active, now.Add(-50*day), now.Add(200*day), now.Add(5*day))
	add("i-2", ca.Published, now.Add(30*day), now.Add(120*day), now.Add(100*day))
	add("i-3", ca.Prepared, now.Add(60*day), now.Add(150*day), now.Add(100*day))
	conf := server.Config{TTL: time.Hour}
	found := checkAuthorities(t.Context(), conf, shown, "", true, now)
	said := map[string]check.Finding{}
	for _, f := range found {
		if f.Code == check.CodeClock {
			t.Errorf("the clock is blamed: %+v", f)
		}
		if f.Code == check.CodeExpiry {
			said[f.About] = f
		}
	}
	for id, level := range map[string]check.Level{"i-1": check.Error, "i-2": check.OK, "i-3": check.OK} {
		if said[id].Level != level {
			t.Errorf("%s: %+v, want %s", id, said[id], level)
		}
	}
	if f := said["i-1"]; !strings.Contains(f.Message, "until "+now.Add(5*day).Format(time.RFC3339)) {
		t.Errorf("it does not end with its root: %+v", f)
	}
	shown.Authorities[1].State = ca.Active
	found = checkAuthorities(t.Context(), conf, shown, "", true, now)
	blamed := false
	for _, f := range found {
		blamed = blamed || f.Code == check.CodeClock && f.About == "i-2"
	}
	if !blamed {
		t.Error("one that signs before it begins is not found")
	}
}
