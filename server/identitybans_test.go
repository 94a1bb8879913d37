package server

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
)

const identityA = "spiffe://example.org/ns/default/sa/a"

// Leaves of a longer life, made before it was lowered, are good beyond the one that is given now.
func TestABanSaysTheTrueEndOfWhatWasIssued(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	must(t, s.stop())
	longest := c.now().Add(24 * time.Hour) // what the configuration allowed until now
	c.life = time.Hour
	s = c.start(t, nil)
	for _, dry := range []bool{true, false} {
		got, err := s.rotations().BanIdentity(t.Context(), &adminv1.BanIdentityRequest{SpiffeId: identityA, Reason: "stolen", DryRun: dry})
		must(t, err)
		if end := got.ValidUntil.AsTime(); end.Before(longest) || end.After(longest.Add(time.Minute)) {
			t.Errorf("dry run %v: what was issued is good until %s, want %s", dry, stamp(end), stamp(longest))
		}
	}
}

// bannedNow are the identities that are banned, in memory and in the database.
func (l *live) bannedNow() (memory, stored int) {
	l.t.Helper()
	rows, err := l.store.BannedIdentities(l.t.Context())
	must(l.t, err)
	return len(l.directory.current.Load().banned), len(rows)
}

// Whoever copies the ID of a node from a certificate must not believe that it is shut out.
func TestTheNameOfAPartOfSignetIsNotBannedAsAnIdentity(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	for id, want := range map[string]string{
		"spiffe://example.org/signet/cluster/east/agent/east-2":  "signet agent VERB east-2",
		"spiffe://example.org/signet/cluster/west/agent/west-2":  "in cluster west: signet agent VERB west-2",
		"spiffe://example.org/signet/cluster/east/server/east-1": "not a workload's: for a node there is signet agent VERB",
		"spiffe://example.org/signet/agent/east-2":               "not a workload's: for a node there is signet agent VERB",
		"spiffe://example.org/signet":                            "not a workload's: for a node there is signet agent VERB",
	} {
		for _, dry := range []bool{true, false} {
			_, err := s.rotations().BanIdentity(t.Context(), &adminv1.BanIdentityRequest{SpiffeId: id, Reason: "broken into", DryRun: dry})
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), strings.ReplaceAll(want, "VERB", "ban")) {
				t.Errorf("ban of %s (dry run %v): %v", id, dry, err)
			}
			_, err = s.rotations().UnbanIdentity(t.Context(), &adminv1.UnbanIdentityRequest{SpiffeId: id, DryRun: dry})
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), strings.ReplaceAll(want, "VERB", "unban")) {
				t.Errorf("unban of %s (dry run %v): %v", id, dry, err)
			}
		}
	}
	if memory, stored := s.bannedNow(); memory != 0 || stored != 0 {
		t.Errorf("%d are banned, and %d in the database", memory, stored)
	}
}

// A ban and a taint can be asked for with a reason that says something alone, and a dry run says so too.
func TestAReasonSaysSomething(t *testing.T) {
	t.Parallel()
	s := newCluster(t, "east").start(t, nil)
	for _, reason := range []string{"", " ", "\t\n\u00a0", strings.Repeat("x", maxReason+1)} {
		for _, dry := range []bool{true, false} {
			_, err := s.rotations().BanIdentity(t.Context(), &adminv1.BanIdentityRequest{SpiffeId: identityA, Reason: reason, DryRun: dry})
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "ban of "+identityA+": give a reason") {
				t.Errorf("ban for %.8q (dry run %v): %v", reason, dry, err)
			}
			_, err = s.rotations().TaintAuthority(t.Context(), &adminv1.TaintAuthorityRequest{Authority: "intermediate-1", Reason: reason, DryRun: dry})
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "taint of intermediate-1: give a reason") {
				t.Errorf("taint for %.8q (dry run %v): %v", reason, dry, err)
			}
		}
	}
	if memory, stored := s.bannedNow(); memory != 0 || stored != 0 {
		t.Errorf("%d are banned, and %d in the database", memory, stored)
	}
	if row, _ := s.keeper.current.Load().row("intermediate-1"); !row.Tainted.IsZero() {
		t.Error("it is tainted")
	}
}

func TestADryRunOfABanChangesNothing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	s.apply(false, registration("a", "node-1"), registration("b", "node-1"))
	m := s.enrol("node-1")
	conn := s.dial(m)
	stream, err := signetv1.NewAgentsClient(conn).Sync(t.Context())
	must(t, err)
	set := func(r *signetv1.SyncResponse) *signetv1.RegistrationSet { return r.GetRegistrations() }
	next(t, stream, set)
	// The agent is told of the next change, and of none before it.
	told := func(want ...string) {
		t.Helper()
		var got []string
		for _, r := range next(t, stream, set).Registrations {
			got = append(got, r.Name)
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("the agent is told of %v, want %v", got, want)
		}
	}
	are := func(want int) {
		t.Helper()
		if memory, stored := s.bannedNow(); memory != want || stored != want {
			t.Errorf("%d are banned, and %d in the database, want %d", memory, stored, want)
		}
	}
	ban := func(dry bool) {
		t.Helper()
		got, err := s.rotations().BanIdentity(t.Context(), &adminv1.BanIdentityRequest{SpiffeId: identityA, Reason: "stolen", DryRun: dry})
		must(t, err)
		if !got.Changed || !slices.Equal(got.Registrations, []string{"a"}) {
			t.Errorf("the ban (dry run %v) answers %v", dry, got)
		}
	}
	unban := func(dry bool) {
		t.Helper()
		got, err := s.rotations().UnbanIdentity(t.Context(), &adminv1.UnbanIdentityRequest{SpiffeId: identityA, DryRun: dry})
		must(t, err)
		if !got.Changed {
			t.Errorf("the unban (dry run %v) answers %v", dry, got)
		}
	}
	revision := s.directory.current.Load().revision
	ban(true)
	are(0)
	if got := s.directory.current.Load().revision; got != revision {
		t.Errorf("the directory came from revision %d to %d", revision, got)
	}
	s.leaf(conn, "a")
	s.apply(false, registration("c", "node-1"))
	told("a", "b", "c")

	ban(false)
	told("b", "c")
	are(1)
	unban(true)
	are(1)
	s.apply(false, registration("d", "node-1"))
	told("b", "c", "d")
	unban(false)
	told("a", "b", "c", "d")
	are(0)
	must(t, s.stop())
	bans, unbans := 0, 0
	for _, e := range logged(t, c) {
		if e.GetIdentityBanned() != nil {
			bans++
		}
		if e.GetIdentityUnbanned() != nil {
			unbans++
		}
	}
	if bans != 1 || unbans != 1 {
		t.Errorf("the log has %d bans and %d unbans, want one of each that was no dry run", bans, unbans)
	}
}
