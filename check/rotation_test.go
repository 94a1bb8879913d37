package check

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/rotation"
)

// cluster is a root of ten lives and an intermediate in the given part of its life, which is 1000 hours long.
func cluster(part float64, more ...rotation.Authority) Rotation {
	const life = 1000 * time.Hour
	begun := now.Add(-time.Duration(part * float64(life)))
	return Rotation{
		Policy:    rotation.Policy{LongestLeaf: 10 * time.Hour, Skew: time.Minute, Quorum: 1, PrepareAt: 0.5, SwitchAt: 0.67, ReportLife: 24 * time.Hour},
		Automatic: true, LeastLife: time.Minute,
		World: rotation.World{
			Own: rotation.Report{Cluster: "east", At: now},
			Authorities: append([]rotation.Authority{
				{ID: "root-1", Kind: ca.KindRoot, State: ca.Active, NotBefore: begun, NotAfter: begun.Add(10 * life)},
				{ID: "i-1", Kind: ca.KindIntermediate, State: ca.Active, Root: "root-1", NotBefore: begun, NotAfter: begun.Add(life)},
			}, more...),
		},
	}
}

func request() rotation.Authority {
	return rotation.Authority{ID: "i-2", Kind: ca.KindIntermediate, State: ca.Prepared, Since: now.Add(-time.Hour)}
}

func successor(root string, from, to time.Duration) rotation.Authority {
	return rotation.Authority{ID: "i-2", Kind: ca.KindIntermediate, State: ca.Published, Root: root, NotBefore: now.Add(from), NotAfter: now.Add(to)}
}

func TestWhatARotationWaitsForIsFound(t *testing.T) {
	published := rotation.Authority{ID: "root-2", Kind: ca.KindRoot, State: ca.Published, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(9000 * time.Hour)}
	tainted := cluster(0.1)
	tainted.Forged = []Forged{{ID: "i-0", Cluster: "east", By: []string{"east (its trust bundle, 3 agents)", "west (has never reported)"}, Until: now.Add(time.Hour), Advice: "replace it"}, {ID: "i-9", Until: now.Add(time.Hour)}}
	manual := cluster(0.6)
	manual.Automatic = false
	failed := cluster(0.6)
	failed.Failed = []Failed{{To: ca.Prepared, Trouble: Trouble{Since: now.Add(-time.Hour), Why: "the key is exportable"}}, {Authority: "i-9", To: ca.Active, Trouble: Trouble{Since: now, Why: "of one that is gone"}}}
	failedNotDue := cluster(0.1)
	failedNotDue.Failed = failed.Failed
	west := cluster(0.1, published)
	west.Peers = []rotation.Report{{Cluster: "west", At: now.Add(-48 * time.Hour), Until: now.Add(-24 * time.Hour)}}
	west.Own.Roots = []rotation.RootReport{{ID: "root-2"}}
	exchanged := west
	exchanged.Shared = true
	apart := cluster(0.1, rotation.Authority{ID: "root-2", Kind: ca.KindRoot, State: ca.Active, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(11000 * time.Hour)})
	apart.Peers = []rotation.Report{{Cluster: "west", At: now, Until: now.Add(24 * time.Hour), Roots: []rotation.RootReport{{ID: "root-1"}, {ID: "root-2", Signing: true}}}}
	sharing := apart
	sharing.Shared = true
	behind := cluster(0.7, successor("root-2", -time.Hour, 900*time.Hour), published)
	behind.Own.Roots = []rotation.RootReport{{ID: "root-2", Validators: 4, Trusting: 1, Missing: []string{"node-7"}}}
	short := cluster(0.6)
	short.Authorities[0].NotAfter = now.Add(900 * time.Hour)
	atEnd := cluster(0.6)
	atEnd.Authorities[0].NotAfter = now.Add(450 * time.Hour)
	worn := cluster(0.6, successor("root-1", -time.Hour, 300*time.Hour))
	worn.Authorities[1].NotAfter = now.Add(400 * time.Hour)
	worn.Authorities[0].NotAfter = now.Add(300 * time.Hour)
	ahead, wild, logged := cluster(0.1), cluster(0.1), cluster(0.1)
	ahead.Restored = Restored{Sequence: 4, Newest: 9, Agents: []string{"n1", "n2", "n3", "n4", "n5", "n6", "n7"}}
	wild.Restored = Restored{Sequence: 4, Newest: 4, Wild: []string{"n1"}}
	logged.Restored = Restored{Sequence: 4, Newest: 9, Logged: true, Revision: 7, LoggedRevision: 12}
	brief := cluster(0, request())
	brief.LeastLife = 55 * time.Second
	brief.Authorities[1].NotBefore, brief.Authorities[1].NotAfter = now.Add(-35*time.Second), now.Add(50*time.Second)
	stopped := cluster(1.1, request())
	stopped.Offline = true
	next := successor("root-1", -200*time.Hour, 800*time.Hour)
	asleep := cluster(1.1, next)
	asleep.Offline = true
	byHand := cluster(1.1, next)
	byHand.Automatic = false
	online := cluster(1.1, request())
	online.Online = true
	none := cluster(0.5, request())
	none.Authorities[1].State, none.Authorities[1].Since = ca.Retired, now.Add(-time.Hour)
	away := cluster(0.1)
	away.Halt = gone().Halt("i-1")
	doubted := cluster(0.1)
	doubted.Halt = &Halt{Why: "the clock is not to be believed", Mend: mendClock}
	lost := cluster(0.1, request())
	lost.Authorities[1].Tainted = now
	rootLost := cluster(0.1, request())
	rootLost.Authorities[0].Tainted, rootLost.Authorities[1].Tainted = now, now
	otherRoot := cluster(0.1, request(), published)
	otherRoot.Authorities[0].Tainted = now
	together := cluster(0.6, successor("root-1", -time.Hour, 300*time.Hour))
	together.Authorities[1].NotAfter = now.Add(300 * time.Hour)
	atOnce := cluster(0.6, successor("root-1", -time.Hour, 900*time.Hour), successor("root-1", -time.Hour, 900*time.Hour))
	atOnce.Authorities[3].ID = "i-3"
	atRootEnd := atOnce
	atRootEnd.Authorities = slices.Clone(atOnce.Authorities)
	atRootEnd.Authorities[0].NotAfter = now.Add(900 * time.Hour)

	for what, try := range map[string]struct {
		r     Rotation
		code  string
		level Level
		words []string
	}{
		"a young one":                   {cluster(0.1), CodeSuccessor, OK, []string{"nothing of it waits"}},
		"a successor that stands ready": {cluster(0.6, successor("root-1", -time.Hour, 900*time.Hour)), CodeSuccessor, OK, nil},
		"no successor":                  {cluster(0.55), CodeSuccessor, Warning, []string{"55 %", "no successor stands ready", "rotation start"}},
		"no successor, late":            {cluster(0.7), CodeSuccessor, Error, []string{"70 %"}},
		"a request":                     {cluster(0.55, request()), CodeSignature, Warning, []string{"i-2", "2026-05-04T02:02:01Z", "signet ca show --config FILE i-2", "signet root sign", "cluster install"}},
		"a request, late":               {cluster(0.7, request()), CodeSignature, Error, nil},
		"a request after a taint":       {lost, CodeSignature, Error, nil},
		"a request, with no good root":  {rootLost, CodeSignature, Error, []string{"its request waits for a signature since 2026-05-04T02:02:01Z, under a new root, since root-1 is tainted", "signet root init; then: signet rotation start --config FILE root"}},
		"a request for another root":    {otherRoot, CodeSignature, Warning, []string{"under root-2, since root-1 is tainted", "then, at root-2: signet root sign; then: signet cluster install"}},
		"one that waits for agents":     {behind, CodeSuccessor, Error, []string{"1 of 4 agents", "can't take over"}},
		"one that begins too late":      {cluster(0.6, successor("root-1", 405*time.Hour, 1200*time.Hour)), CodeSuccessor, Error, []string{"takes over at", "after the end of i-1"}},
		"one that ends no later":        {worn, CodeSuccessor, Warning, []string{"ends no later", "root init"}},
		"one that ends with it":         {together, CodeSuccessor, Warning, []string{"no successor stands ready"}},
		"one of two of one end":         {atOnce, CodeSuccessor, OK, nil},
		"two that end with their root":  {atRootEnd, CodeRootEnd, Warning, nil},
		"a root that ends too soon":     {short, CodeRootEnd, Warning, []string{"root-1", "in 900h", "1000h", "rotation start --config FILE root"}},
		"a root at its end":             {atEnd, CodeRootEnd, Error, nil},
		"a peer's old report":           {west, CodePeer, Warning, []string{"the report of cluster west is of 2026-05-02T03:02:01Z", "in cluster west: signet rotation report --config west.yaml > west.report; here: signet rotation advance --config FILE --report west.report"}},
		"a peer's, that are exchanged":  {exchanged, CodePeer, Warning, []string{"the report of cluster west is of", "reports are exchanged by themselves: wait", CodeShared}},
		"a lost key":                    {tainted, CodeTaint, Error, []string{"i-0", "accepted, until 2026-05-04T04:02:01Z at the latest, by east (its trust bundle, 3 agents), west (has never reported)", "replace it"}},
		"agents that are ahead":         {ahead, CodeRestored, Error, []string{"restored from an older copy", "7 agents (n1, n2, n3, n4, n5 and 2 more) hold trust bundles up to number 9, and the newest here is 4", "signet trust republish --config FILE"}},
		"an agent that claims too much": {wild, CodeRestored, Warning, []string{"agent n1 holds", "can't have been published", "signet agent ban"}},
		"a log that is ahead":           {logged, CodeRestored, Error, []string{"change 12", "none after 7", "trust republish"}},
		"a root in each cluster":        {apart, CodeRivals, Warning, []string{"root-1", "cluster east signs under it and cluster west under root-2, and neither root leaves", "let root-2 go on, which ends last", "in each cluster: signet trust remove --config FILE root-1"}},
		"a root in each that shares":    {sharing, CodeRivals, Warning, []string{"let root-2 go on", "signet trust remove --config FILE root-1"}},
		"a step for a person":           {manual, CodeStep, Warning, []string{"prepared", "rotation.automatic is off", "rotation advance"}},
		"a step that fails":             {failed, CodeStep, Warning, []string{"it is to become prepared, because ", "but it fails since 2026-05-04T02:02:01Z, and is tried again: the key is exportable", "at once: signet rotation advance --config FILE"}},
		"one that is not due any more":  {failedNotDue, CodeSuccessor, OK, nil},
		"the end in sight":              {cluster(0.75), CodeIssuing, Warning, []string{"nothing can be issued from ", "in 249h59m"}},
		"the end is near":               {cluster(0.997, request()), CodeIssuing, Error, []string{"in 2h59m", "i-2, which is to take over, is not signed", "root sign"}},
		"one that begins later":         {cluster(-0.1), CodeIssuing, Error, []string{"nothing can be issued: i-1 begins at 2026-05-08T07:02:01Z, and it is 2026-05-04T03:02:01Z here", "timedatectl"}},
		"too little is left":            {brief, CodeIssuing, Error, []string{"nothing can be issued since 2026-05-04T03:01:57Z: i-1 ends at 2026-05-04T03:02:51Z, and a leaf has to live 55s; i-2, which is to take over, is not signed", "signet ca show --config FILE i-2; then, at the root: signet root sign; then: signet cluster install"}},
		"it has expired":                {cluster(1.1), CodeIssuing, Error, []string{"nothing can be issued since 2026-04-29T23:01:02Z: i-1 expired at 2026-04-29T23:02:01Z", "rotation start"}},
		"expired, with no server":       {stopped, CodeIssuing, Error, []string{"i-2, which is to take over, is not signed", "signet cluster init --config FILE --csr-out CSR; then, at the root: signet root sign"}},
		"a successor in time, stopped":  {asleep, CodeIssuing, Error, []string{"i-1 expired at", "i-2 takes over as soon as the server runs", "signet serve --config FILE"}},
		"a successor, by hand":          {byHand, CodeIssuing, Error, []string{"i-1 expired at", "i-2 is to take over, and rotation.automatic is off", "signet rotation advance --config FILE i-2"}},
		"expired, with an upstream":     {online, CodeIssuing, Error, []string{"i-2, which is to take over, is not signed", "signet rotation status --config FILE"}},
		"none is active":                {none, CodeIssuing, Error, []string{"nothing can be issued since 2026-05-04T02:02:01Z: no intermediate is active; i-2, which is to take over, is not signed", "signet ca show --config FILE i-2"}},
		"the key is away":               {away, CodeIssuing, Error, []string{"nothing can be issued since 2026-05-04T02:52:01Z: the key of i-1 can't be used (Vault at https://v:8200 is away since", "vault status"}},
		"the clock is doubted":          {doubted, CodeIssuing, Error, []string{"nothing can be issued: the clock is not to be believed", "timedatectl"}},
	} {
		t.Run(what, func(t *testing.T) {
			var of Findings
			for _, f := range try.r.Findings(now) {
				if now := f.Code == CodeIssuing && !strings.Contains(f.Message, " from "); f.Blocks() != now {
					t.Errorf("what is bad now stops issuing, what will be bad nothing: %+v", f)
				}
				if f.Code == try.code {
					of = append(of, f)
				}
			}
			if len(of) == 0 {
				t.Fatalf("no %s in %+v", try.code, try.r.Findings(now))
			}
			is(t, of, try.level, try.words...)
			if try.code == CodeRootEnd && slices.ContainsFunc(try.r.Findings(now), func(f Finding) bool { return strings.Contains(f.Message, "it takes over at") }) {
				t.Errorf("one that never takes over is too late: %+v", try.r.Findings(now))
			}
			if try.r.Shared && strings.Contains(of[0].Mend, "rotation report") {
				t.Errorf("a report is to be carried that comes by itself: %+v", of)
			}
			if try.code == CodeTaint && len(of) != 1 {
				t.Errorf("what nobody accepts is found: %+v", of)
			}
			if try.code == CodeRivals && (len(of) != 1 || try.r.Shared == strings.Contains(of[0].Mend, "in each cluster")) {
				t.Errorf("of two roots: %+v", of)
			}
		})
	}
}

// While anything but a report keeps the last step of a rotation waiting nobody can help it, and a rotation that goes as it should
// is no finding.
func TestAReportIsAskedForOnlyWhenNothingElseIsWaitedFor(t *testing.T) {
	const life = 24 * time.Hour
	old := rotation.Authority{ID: "root-0", Kind: ca.KindRoot, State: ca.Retired, Leaving: now, NotBefore: now.Add(-1000 * time.Hour), NotAfter: now.Add(9000 * time.Hour), LeavesUntil: now.Add(30 * time.Hour)}
	for what, try := range map[string]struct {
		at     time.Duration
		shared bool
		// west's newest report.
		reported time.Duration
		leaves   time.Duration
		want     string
	}{
		"the first minute":                    {at: time.Minute, reported: 0},
		"the first minute, exchanged":         {at: time.Minute, shared: true},
		"our promise is over, leaves live":    {at: life + 2*time.Minute, reported: time.Hour},
		"leaves here are over":                {at: 31 * time.Hour, reported: time.Hour, want: "cluster west has not reported since"},
		"exchanged, it reports again soon":    {at: 31 * time.Hour, shared: true, reported: 20 * time.Hour},
		"exchanged, its report holds no more": {at: 50 * time.Hour, shared: true, reported: 20 * time.Hour, want: "has not reported since"},
		"leaves there live":                   {at: 31 * time.Hour, reported: 30 * time.Hour, leaves: 60 * time.Hour},
		"all is told":                         {at: 31 * time.Hour, reported: 30 * time.Hour},
	} {
		for _, north := range []bool{false, true} {
			r := cluster(0.1, old)
			r.Shared, r.ReportLife = try.shared, life
			at := now.Add(try.at)
			peer := func(name string, at, leaves time.Duration) {
				p := rotation.Report{Cluster: name, At: now.Add(at), Until: now.Add(at + life)}
				if leaves > 0 {
					p.Roots = []rotation.RootReport{{ID: "root-0", LeavesUntil: now.Add(leaves), Holding: 1}}
				}
				r.Peers = append(r.Peers, p)
			}
			peer("west", try.reported, try.leaves)
			want := try.want
			if north { // leaves there live longer than all
				peer("north", 30*time.Hour, 90*time.Hour)
				want = ""
			}
			var found Findings
			for _, f := range r.Findings(at) {
				if f.Code == CodePeer {
					found = append(found, f)
				}
			}
			if (want == "") != (len(found) == 0) || want != "" && !strings.Contains(found[0].Message, want) {
				t.Errorf("%s (another cluster waits: %v): %+v, want %q", what, north, found, want)
			}
		}
	}
}

// An intermediate of 85 s whose leaves have to live 55 s, and whose successor is not signed: second by second.
func TestTheEndOfIssuingIsFoundWithoutAGap(t *testing.T) {
	begun := now
	r := cluster(0, rotation.Authority{ID: "i-2", Kind: ca.KindIntermediate, State: ca.Prepared, Since: begun})
	r.LeastLife = 55 * time.Second
	r.Policy.LongestLeaf = 55 * time.Second
	r.Authorities[1].Since, r.Authorities[1].NotAfter = begun, begun.Add(85*time.Second)
	last := begun.Add(31 * time.Second)
	level, warned := OK, time.Time{}
	for at := begun; at.Before(begun.Add(300 * time.Second)); at = at.Add(time.Second) {
		var of Findings
		for _, f := range r.Findings(at) {
			if f.Code == CodeIssuing {
				of = append(of, f)
			}
		}
		if len(of) == 0 {
			if !warned.IsZero() || !at.Before(last.Add(-8*time.Second)) {
				t.Fatalf("%s after its beginning nothing is said of it (warned since %s)", at.Sub(begun), stamp(warned))
			}
			continue
		}
		if warned.IsZero() {
			warned = at
		}
		if len(of) > 1 || of[0].Level < level {
			t.Errorf("%s after its beginning: %+v, and it was %s before", at.Sub(begun), of, level)
		}
		level = of[0].Level
		over := !at.Before(last)
		says := "nothing can be issued from " + stamp(last) + " on, in "
		if over {
			says = "nothing can be issued since " + stamp(last) + ": i-1 "
		}
		f := of[0]
		if !strings.HasPrefix(f.Message, says) || f.Blocks() != over || over && f.Level != Error || r.IssuableUntil(at).IsZero() != over ||
			!strings.Contains(f.Message, "i-2, which is to take over, is not signed") || f.Mend != r.mendSign("i-2") {
			t.Errorf("%s after its beginning: %+v, until %s", at.Sub(begun), f, r.IssuableUntil(at))
		}
	}
	if warned.IsZero() || !warned.Before(last) || level != Error {
		t.Errorf("warned since %s, and at the end %s", warned, level)
	}
}

func TestWhatKeepsFromIssuingIsCountedInTheMetricToo(t *testing.T) {
	r := cluster(0.1)
	r.Halt = &Halt{Why: "the key is away"}
	if got := r.IssuableUntil(now); !got.IsZero() {
		t.Errorf("until %s", got)
	}
}

func TestUntilWhenCanBeIssuedCountsWhatComesByItself(t *testing.T) {
	end := now.Add(900*time.Hour - time.Minute + time.Second)
	follow := cluster(0.1, successor("root-1", 100*time.Hour, 2000*time.Hour))
	byHand := follow
	byHand.Automatic = false
	gone := cluster(1.1)
	for what, try := range map[string]struct {
		r    Rotation
		want time.Time
	}{
		"alone":                         {cluster(0.1), end},
		"a successor takes over":        {follow, now.Add(2000*time.Hour - time.Minute + time.Second)},
		"a successor waits for a word":  {byHand, end},
		"a successor is not signed":     {cluster(0.1, request()), end},
		"a successor begins afterwards": {cluster(0.1, successor("root-1", 901*time.Hour, 2000*time.Hour)), end},
		"it is over":                    {gone, time.Time{}},
		"it has not begun":              {cluster(-0.1), time.Time{}},
		"there is none":                 {Rotation{}, time.Time{}},
	} {
		if got := try.r.IssuableUntil(now); !got.Equal(try.want) {
			t.Errorf("%s: until %s, want %s", what, got, try.want)
		}
	}
}

// North was away, or has not begun, while the others went from root-1 to root-2.
func TestAClusterThatIsLeftBehindSaysSo(t *testing.T) {
	const start = "signet rotation start --config FILE root --root ROOT --fingerprint SHA256:…, where ROOT is the certificate of root-2"
	for what, try := range map[string]struct {
		theirs []rotation.RootReport
		change func(*Rotation)
		want   Level
		words  []string
	}{
		"removed there":   {[]rotation.RootReport{{ID: "root-2", Signing: true}}, nil, Error, []string{"root-1 what this cluster signs under it is refused in cluster west", "root-2 cluster west signs under it, and it is not believed here", start}},
		"removed of late": {[]rotation.RootReport{{ID: "root-2", Signing: true}, {ID: "root-1", Leaving: true, Validators: 2}}, nil, Error, []string{"is refused in cluster west"}},
		"known here, and under way": {[]rotation.RootReport{{ID: "root-2", Signing: true}}, func(r *Rotation) {
			r.Authorities[0].Leaving = now
			r.Authorities = append(r.Authorities, rotation.Authority{ID: "root-2", Kind: ca.KindRoot, State: ca.Published, Since: now, NotBefore: now, NotAfter: now.Add(9000 * time.Hour)})
		}, Error, []string{"is refused in cluster west", MendStatus}},
		"it comes by itself":                  {[]rotation.RootReport{{ID: "root-2", Signing: true}}, func(r *Rotation) { r.Shared = true }, Error, []string{MendStatus}},
		"begun there":                         {[]rotation.RootReport{{ID: "root-1", Leaving: true, Signing: true, Validators: 2, Trusting: 2}, {ID: "root-2"}}, nil, Warning, []string{"root-1 it is being replaced in cluster west", start}},
		"begun there, and it comes by itself": {[]rotation.RootReport{{ID: "root-1", Leaving: true, Signing: true, Validators: 2, Trusting: 2}, {ID: "root-2"}}, func(r *Rotation) { r.Shared = true }, OK, nil},
		"begun in both":                       {[]rotation.RootReport{{ID: "root-1", Leaving: true, Signing: true, Validators: 2, Trusting: 2}, {ID: "root-2"}}, func(r *Rotation) { r.Authorities[0].Leaving = now }, OK, nil},
		"an old report":                       {[]rotation.RootReport{{ID: "root-2", Signing: true}}, func(r *Rotation) { r.Peers[0].At = now.Add(-48 * time.Hour) }, OK, nil},
		"all under one":                       {[]rotation.RootReport{{ID: "root-1", Signing: true}}, nil, OK, nil},
	} {
		r := cluster(0.1)
		r.Peers = []rotation.Report{{Cluster: "west", At: now, Until: now.Add(24 * time.Hour), Roots: try.theirs}}
		if try.change != nil {
			try.change(&r)
		}
		var of Findings
		for _, f := range r.Findings(now) {
			if f.Code == CodeApart {
				of = append(of, f)
			}
			if f.Blocks() {
				t.Errorf("%s: the server is not ready: %+v", what, f)
			}
		}
		t.Run(what, func(t *testing.T) { is(t, of, try.want, try.words...) })
	}
}

// What helps is said: only where a report is missing, another one does.
func TestWhatHasToBeDoneInAnotherClusterIsSaid(t *testing.T) {
	begin, look := "in cluster west: signet rotation start --config west.yaml root --root ROOT", "in cluster west: signet rotation status --config west.yaml says"
	for what, try := range map[string]struct {
		leaving bool
		theirs  []rotation.RootReport
		want    string
	}{
		"it does not know the new root":   {false, []rotation.RootReport{{ID: "root-1", Signing: true}}, begin},
		"its agents don't have it":        {false, []rotation.RootReport{{ID: "root-1", Signing: true}, {ID: "root-2", Validators: 3, Trusting: 1}}, look},
		"it has not begun to leave":       {true, []rotation.RootReport{{ID: "root-0", Signing: true}, {ID: "root-1"}}, begin},
		"it has begun to leave":           {true, []rotation.RootReport{{ID: "root-0", Signing: true, Leaving: true}, {ID: "root-1"}}, look},
		"nothing is known: a report does": {false, nil, "in cluster west: signet rotation report"},
	} {
		added := rotation.Authority{ID: "root-2", Kind: ca.KindRoot, State: ca.Published, Since: now, NotBefore: now, NotAfter: now.Add(9000 * time.Hour)}
		if try.leaving {
			added.ID, added.State, added.Leaving = "root-0", ca.Retired, now.Add(-100*time.Hour)
		}
		r := cluster(0.1, added)
		r.Own.Roots = []rotation.RootReport{{ID: "root-2"}}
		west := rotation.Report{Cluster: "west", Roots: try.theirs}
		if try.theirs != nil {
			west.At, west.Until = now, now.Add(24*time.Hour)
		}
		r.Peers = []rotation.Report{west}
		var of Findings
		for _, f := range r.Findings(now) {
			if f.Code == CodePeer {
				of = append(of, f)
			}
		}
		t.Run(what, func(t *testing.T) {
			is(t, of, Warning, try.want, "signet rotation report --config west.yaml > west.report; here: signet rotation advance")
		})
	}
}
