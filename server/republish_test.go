package server

import (
	"context"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/trust"
)

func (l *live) republish(dry bool) (*adminv1.RepublishTrustResponse, error) {
	l.t.Helper()
	return l.rotations().RepublishTrust(l.t.Context(), &adminv1.RepublishTrustRequest{DryRun: dry})
}

// restored are the findings of an older state database.
func restored(all check.Findings) (found []string) {
	for _, f := range all {
		if f.Code == check.CodeRestored {
			found = append(found, f.About+": "+f.Message)
		}
	}
	return found
}

func (l *live) restored() []string { return restored(l.checkRotation(context.Background())) }

// says makes an agent claim to have a bundle, until it is told a newer one.
func (a *listener) says(v trust.Version) {
	a.mu.Lock()
	a.claim = v
	a.mu.Unlock()
	a.say()
}

// addRoots begins to believe so many more roots.
func (l *live) addRoots(n int) {
	l.t.Helper()
	for range n {
		r := newRoot(l.t)
		_, err := l.rotations().AddTrust(l.t.Context(), &adminv1.AddTrustRequest{Root: r.cert.Raw, RootFingerprint: r.fingerprint()})
		must(l.t, err)
	}
}

func TestAFolderRestoredFromAnOlderCopyIsFoundAndItsTrustPublishedAgain(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	m := s.enrol("node-1")
	old := c.image(t, s.Server)
	s.addRoots(2)
	newer := s.keeper.current.Load().bundle
	must(t, s.stop())

	s = old.start(t, nil)
	if found := s.restored(); len(found) != 0 {
		t.Errorf("before anybody is heard: %q", found)
	}
	if _, err := s.republish(false); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "nothing to publish again") {
		t.Errorf("it is not needed: %v", err)
	}
	a := s.listen(m, false)
	a.says(newer.Version())
	soon(t, "it is found", func() bool { return len(s.restored()) == 1 })
	if found := s.restored()[0]; !strings.Contains(found, "agent node-1 holds trust bundles up to number 3, and the newest here is 1") {
		t.Error(found)
	}
	s.shows(http.StatusOK) // an agent's word makes no server unready
	before := s.keeper.current.Load()
	dry, err := s.republish(true)
	must(t, err)
	if dry.Before != 1 || dry.After != 4 || dry.Ahead != 1 || !slices.Equal(dry.Agents, []string{"node-1"}) || !slices.Equal(dry.Roots, []string{c.root.id()}) {
		t.Errorf("a dry run says %v", dry)
	}
	if s.keeper.current.Load() != before {
		t.Error("a dry run has changed something")
	}
	done, err := s.republish(false)
	must(t, err)
	if done.After != 4 {
		t.Errorf("it says %v", done)
	}
	soon(t, "the agent is told", func() bool { return a.believes().Sequence() == 4 })
	if b := a.believes(); b.Digest() != before.bundle.Digest() || len(b.Roots()) != 1 {
		t.Errorf("the agent is told %d roots", len(b.Roots()))
	}
	soon(t, "nothing is found any more", func() bool { return len(s.restored()) == 0 })
	soon(t, "the agent counts as one that has the root", func() bool {
		own := s.keeper.world(s.keeper.current.Load(), c.now()).Own
		return len(own.Roots) == 1 && own.Roots[0].Trusting == 1
	})
	if _, err := s.republish(false); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("once more: %v", err)
	}
	// What comes next goes on from there, also after a restart.
	must(t, s.stop())
	s = old.start(t, nil)
	if got := s.keeper.current.Load().bundle.Sequence(); got != 4 {
		t.Errorf("after a restart it is %d", got)
	}
	s.addRoots(1)
	if got := s.keeper.current.Load().bundle.Sequence(); got != 5 {
		t.Errorf("the next one is %d", got)
	}
	must(t, s.stop())
	said := distinct(t, old, func(e *auditv1.Entry) bool { return e.GetAuthorityChanged().GetVerb() == "republish" })
	if len(said) != 1 {
		t.Fatalf("the log has %d entries of it", len(said))
	}
	if x := said[0].GetAuthorityChanged(); x.BundleSequence != 4 || x.Authority != c.root.id() || !strings.HasPrefix(x.Evidence.GetCaller(), "uid:") {
		t.Errorf("the log says %v", x)
	}
}

func TestADatabaseOlderThanTheLogIsFoundByTheLogAlone(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	old := c.image(t, s.Server)
	s.addRoots(2)
	now := s.keeper.current.Load()
	must(t, s.stop())
	// The log is whole, the database is not.
	raw, err := os.ReadFile(databasePath(old.dir))
	must(t, err)
	for _, suffix := range []string{"", "-wal", "-shm"} {
		must(t, os.RemoveAll(databasePath(c.dir)+suffix))
	}
	must(t, os.WriteFile(databasePath(c.dir), raw, 0o600))
	if wal, err := os.ReadFile(databasePath(old.dir) + "-wal"); err == nil {
		must(t, os.WriteFile(databasePath(c.dir)+"-wal", wal, 0o600))
	}

	found, err := CheckRotation(t.Context(), c.config(), c.now())
	must(t, err)
	if texts := restored(found); len(texts) != 1 || !strings.HasPrefix(texts[0], "log: ") {
		t.Errorf("from outside: %q", texts)
	}
	s = c.start(t, nil)
	soon(t, "it is found", func() bool { return len(s.restored()) == 1 })
	// Until somebody has looked, no step comes by itself; what a person asks for is done, and no revision is used twice.
	set := s.keeper.current.Load()
	if !s.keeper.heldBack(scheduled(), set) || s.keeper.heldBack(decision{verb: "advance"}, set) {
		t.Error("steps are not held back until somebody asks for them")
	}
	s.addRoots(1)
	if set := s.keeper.current.Load(); set.revision != now.revision+1 {
		t.Errorf("revision %d, want one above %d, which the log has", set.revision, now.revision)
	}
	now.revision++
	if len(s.restored()) != 1 {
		t.Error("the trust bundle is older than the log, and nothing is found")
	}
	done, err := s.republish(false)
	must(t, err)
	if s.keeper.heldBack(scheduled(), s.keeper.current.Load()) {
		t.Error("steps are still held back")
	}
	if done.After != now.bundle.Sequence()+1 {
		t.Errorf("it publishes %d, want one above %d", done.After, now.bundle.Sequence())
	}
	if set := s.keeper.current.Load(); set.revision != now.revision+1 {
		t.Errorf("revision %d, want one above %d, which the log has", set.revision, now.revision)
	}
	if found := s.restored(); len(found) != 0 {
		t.Errorf("it is still found: %q", found)
	}
}

func TestASequenceIsNotUsedUpAtAStrangersWord(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	a := s.listen(s.enrol("node-1"), false)
	for _, sequence := range []uint64{mostLost + 2, 1 << 62, 1<<64 - 1} {
		a.says(trust.Version{Sequence: sequence, Digest: trust.Digest{1}})
		soon(t, "it is found", func() bool {
			found := s.restored()
			return len(found) == 1 && strings.Contains(found[0], "can't have been published") && s.acks.of("node-1").stored.Sequence == sequence
		})
		if _, err := s.republish(false); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "node-1") {
			t.Errorf("%d: %v", sequence, err)
		}
	}
	if got := s.keeper.current.Load().bundle.Sequence(); got != 1 {
		t.Errorf("the sequence is %d", got)
	}
	// Who is banned says nothing any more.
	_, err := s.admin().BanAgent(t.Context(), &adminv1.BanAgentRequest{Agent: "node-1"})
	must(t, err)
	if found := s.restored(); len(found) != 0 {
		t.Errorf("after the ban: %q", found)
	}
}

// Where the sequence is the same and the roots are others, an agent takes nothing either.
func TestAnotherBundleOfTheSameNumberIsFound(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	a := s.listen(s.enrol("node-1"), false)
	a.says(trust.Version{Sequence: 1, Digest: trust.Digest{1}})
	soon(t, "it is found", func() bool { return len(s.restored()) == 1 })
	done, err := s.republish(false)
	must(t, err)
	if done.After != 2 {
		t.Errorf("it publishes %d", done.After)
	}
}
