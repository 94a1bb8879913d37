package rotation

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/signet-ca/signet/ca"
)

// Authority is a CA as its life is decided: a root that validators believe, or an intermediate of this cluster.
type Authority struct {
	// ID is unique in the cluster; a root's is the same in every cluster, see RootID.
	ID string
	// Kind is ca.KindRoot or ca.KindIntermediate.
	Kind string
	// Root is the ID of the root above an intermediate; "" while nothing is signed. Empty for a root.
	Root  string
	State ca.State
	// Since is when it came into its state.
	Since time.Time
	// NotBefore and NotAfter bound its whole chain, root included; zero while nothing is signed.
	NotBefore, NotAfter time.Time
	// KeyFingerprint is that of its public key, as ca.KeyFingerprint writes it. Several CAs may have the same: what can be
	// done with a lost key can be done under each certificate of it. "" = it is not known, and no other's.
	KeyFingerprint string
	// Wanted: an admin has asked for it, so it is activated as soon as it may be, not when its predecessor is old.
	Wanted bool
	// Leaving is since when a root is on its way out: no peer is told any more that we trust it. Zero = it stays.
	Leaving time.Time
	// Aborted is since when a root leaves, or stays, because a rotation was aborted by its name: the same abort once more, as after
	// an answer that was lost, changes nothing. Zero = it was not, or something else has made it leave or stay since.
	Aborted time.Time
	// Tainted is since when its key is taken for lost. Zero = it is not.
	Tainted time.Time
	// LeavesUntil bounds the life of every leaf that was made here under it; zero = there was none. While it is active
	// the bound moves on.
	LeavesUntil time.Time
}

// RootID names a root by the SHA-256 of its certificate, so that all clusters mean the same by it.
func RootID(fingerprint []byte) string { return fmt.Sprintf("root-%x", fingerprint[:8]) }

// signed reports whether there is a certificate.
func (a Authority) signed() bool { return !a.NotAfter.IsZero() }

// InBundle reports whether validators are told to believe a root.
func (a Authority) InBundle() bool {
	return a.Kind == ca.KindRoot && (a.State == ca.Published || a.State == ca.Active || a.State == ca.Retired)
}

// Policy is what the configuration fixes.
type Policy struct {
	// LongestLeaf is the longest life a leaf can have.
	LongestLeaf time.Duration
	// OlderLeaves is until when leaves may live that were made here while the longest life was a longer one; zero = none were.
	OlderLeaves time.Time
	// Skew is how far the clocks of validators and clusters may be apart.
	Skew time.Duration
	// Delay is how long after its publication those that can't acknowledge are taken to have a root.
	Delay time.Duration
	// Quorum is the part of a cluster's validators, in (0, 1], that must have a root before anything is signed under it.
	Quorum float64
	// PrepareAt and SwitchAt are fractions of an intermediate's life: when its successor is made, and when it takes over.
	PrepareAt, SwitchAt float64
	// ReportLife is how long this cluster keeps what it has told its peers, and the longest for which it relies on what they
	// have told.
	ReportLife time.Duration
}

// MaxReportLife is the longest that a report may hold.
const MaxReportLife = 30 * 24 * time.Hour

// LeavesUntil bounds the life of every leaf that was made here by now.
func (p Policy) LeavesUntil(now time.Time) time.Time {
	return later(now.Add(p.LongestLeaf), p.OlderLeaves)
}

// Report is what one cluster knows of its validators and issuers. Peers get it signed; our own is made when it is needed.
type Report struct {
	Cluster string `json:"cluster"`
	// At is when it was made; zero = this peer has never reported.
	At time.Time `json:"at"`
	// Until is how long the cluster keeps what it says here of trust: its own ReportLife from At on.
	Until time.Time    `json:"until"`
	Roots []RootReport `json:"roots,omitempty"`
	// Tainted are the CAs whose keys this cluster takes for lost.
	Tainted []TaintReport `json:"tainted,omitempty"`
	// Accepting are the roots under which something is accepted in the cluster, whoever has made it; see Accepts.
	Accepting []Acceptance `json:"accepting,omitempty"`
	// Gone are exposed roots under which nothing is accepted any more in the cluster. They can't be brought back (AddRoot).
	Gone []string `json:"gone,omitempty"`
}

// RootReport is what a cluster knows of one root.
type RootReport struct {
	ID string `json:"id"`
	// Trusting is how many of the cluster's validators believe the root, of Validators; those that don't are named in
	// Missing, as far as it has room. A validator is an agent with unexpired identities.
	Trusting   int      `json:"trusting"`
	Validators int      `json:"validators"`
	Missing    []string `json:"missing,omitempty"`
	// Leaving: the cluster is about to stop trusting it, so nobody may begin to sign under it.
	Leaving bool `json:"leaving,omitempty"`
	// Signing: an issuer of the cluster signs leaves under it now.
	Signing bool `json:"signing,omitempty"`
	// LeavesUntil bounds the life of every leaf that the cluster has made under it; zero = there was none.
	LeavesUntil time.Time `json:"leaves_until,omitzero"`
	// Holding is how many agents use, or may use, a leaf under it.
	Holding int `json:"holding,omitempty"`
}

// TaintReport names a CA whose key is lost. A forged certificate chains to Root until NotAfter.
type TaintReport struct {
	ID   string `json:"id"`
	Root string `json:"root"`
	// KeyFingerprint is that of the lost key, with which certificates are forged under every other CA that has it too; "" =
	// the cluster doesn't say.
	KeyFingerprint string    `json:"key_fingerprint,omitempty"`
	Since          time.Time `json:"since"`
	NotAfter       time.Time `json:"not_after"`
}

func (r Report) root(id string) (RootReport, bool) {
	i := slices.IndexFunc(r.Roots, func(x RootReport) bool { return x.ID == id })
	if i < 0 {
		return RootReport{ID: id}, false
	}
	return r.Roots[i], true
}

// World is all that decides the next steps.
type World struct {
	Authorities []Authority
	Own         Report
	// Peers are the other clusters under the shared roots, those that have never reported included.
	Peers []Report
}

func (w World) authority(id string) (Authority, bool) {
	i := slices.IndexFunc(w.Authorities, func(a Authority) bool { return a.ID == id })
	if i < 0 {
		return Authority{}, false
	}
	return w.Authorities[i], true
}

func (w World) active() (Authority, bool) {
	i := slices.IndexFunc(w.Authorities, func(a Authority) bool { return a.Kind == ca.KindIntermediate && a.State == ca.Active })
	if i < 0 {
		return Authority{}, false
	}
	return w.Authorities[i], true
}

// current is the active issuer or, where its key was lost (Lost) and no other has taken over, the last that was. What stood
// under the same root goes on under it.
func (w World) current() (Authority, bool) {
	last, ok := w.active()
	if ok {
		return last, true
	}
	for _, a := range w.Authorities {
		signed := a.State == ca.Retired || a.State == ca.Removed && !a.LeavesUntil.IsZero()
		if a.Kind == ca.KindIntermediate && signed && (!ok || !a.LeavesUntil.Before(last.LeavesUntil)) {
			last, ok = a, true
		}
	}
	return last, ok
}

// exposed reports since when certificates under the root may be forged: its own key or one below it is lost, here or in
// another cluster, and the chain that a forged one would have is not over.
func (w World) exposed(root string, now time.Time) (since time.Time) {
	note := func(t, notAfter time.Time) {
		over := !notAfter.IsZero() && now.After(notAfter)
		if !t.IsZero() && !over && (since.IsZero() || t.Before(since)) {
			since = t
		}
	}
	for _, a := range w.Authorities {
		if a.ID == root || a.Root == root {
			_, t := w.lost(a)
			note(t, a.NotAfter)
		}
	}
	for _, p := range w.Peers {
		for _, t := range p.Tainted {
			if t.Root == root {
				note(t.Since, t.NotAfter)
			}
		}
	}
	return since
}

// Step is one move of one authority, with what it waits for.
type Step struct {
	// Authority is its ID; "" = a successor is to be made.
	Authority string
	Kind      string
	// From is "" for one that is to be made.
	From, To ca.State
	// Because says why the step comes.
	Because string
	// Waits is what has to happen first; empty = it can be taken.
	Waits []Wait
}

// Wait is something that a step waits for.
type Wait struct {
	Code WaitCode
	// For is one sentence for people.
	For string
	// Until is when it ends by itself; zero = not by the clock.
	Until time.Time
	// Missing names who has not acknowledged.
	Missing []string
	// Cluster is whose report, or leaves, are waited for; "" = this cluster's.
	Cluster string
	// Said: its report is here, and says that something has to be done there first.
	Said bool
}

// WaitCode names what is waited for.
type WaitCode string

// The waits. Those that forcible names may be overridden by a person who says so.
const (
	WaitTime       WaitCode = "time"       // its time has not come
	WaitSignature  WaitCode = "signature"  // an upstream authority has to sign
	WaitQuorum     WaitCode = "quorum"     // validators of this cluster don't have the root yet
	WaitPeer       WaitCode = "peer"       // another cluster has not reported
	WaitRoot       WaitCode = "root"       // the root above is not active
	WaitIssuer     WaitCode = "issuer"     // an issuer still signs under it
	WaitLeaves     WaitCode = "leaves"     // leaves under it are still valid
	WaitNoOther    WaitCode = "no_other"   // it is the only root
	WaitShortLived WaitCode = "short_life" // it lives shorter than the longest leaf
)

// Forcible reports whether a person may override the wait. Time, signatures and lives can't be talked over.
func (c WaitCode) Forcible() bool {
	return c == WaitQuorum || c == WaitPeer || c == WaitLeaves
}

// Ready reports whether the step can be taken; with force, whether it can be when a person says so.
func (s Step) Ready(force bool) bool {
	return !slices.ContainsFunc(s.Waits, func(w Wait) bool { return !force || !w.Code.Forcible() })
}

// Next says which steps come next, each with what it waits for: those that begin something first, then what is to be made, since
// they may make it needless, then those that end something, roots last. It is a pure function: who takes a step applies it with
// Apply and asks again.
func Next(p Policy, w World, now time.Time) []Step {
	d := decision{Policy: p, World: w, now: now}
	var steps []Step
	for _, a := range w.Authorities {
		var s Step
		var ok bool
		switch a.Kind {
		case ca.KindRoot:
			s, ok = d.root(a)
		case ca.KindIntermediate:
			s, ok = d.intermediate(a)
		}
		if ok {
			s.Authority, s.Kind, s.From = a.ID, a.Kind, a.State
			steps = append(steps, s)
		}
	}
	if s, ok := d.successor(); ok {
		steps = append(steps, s)
	}
	d.inTurn(steps)
	d.unlessReplaced(steps)
	// Of several intermediates that could take over, one does.
	if best, ok := d.next(steps); ok {
		steps = slices.DeleteFunc(steps, func(s Step) bool {
			return s.Kind == ca.KindIntermediate && s.To == ca.Active && s.Authority != best && s.Ready(false)
		})
	}
	rank := map[ca.State]int{ca.Published: 0, ca.Active: 1, ca.Prepared: 2, ca.Retired: 3, ca.Removed: 4}
	slices.SortStableFunc(steps, func(x, y Step) int {
		order := cmp.Compare(rank[x.To], rank[y.To])
		if order == 0 && x.To == ca.Removed {
			order = cmp.Compare(x.Kind, y.Kind) // intermediate, root
		}
		return order
	})
	return steps
}

type decision struct {
	Policy
	World
	now time.Time
}

func (d decision) root(r Authority) (Step, bool) {
	if r.State == ca.Removed {
		return Step{}, false
	}
	switch {
	case r.State == ca.Prepared && !r.Leaving.IsZero():
		return Step{To: ca.Removed, Because: "it was never published"}, true
	case r.State == ca.Prepared:
		return Step{To: ca.Published, Because: "it was added"}, true
	case d.now.After(r.NotAfter.Add(d.Skew)):
		return Step{To: ca.Removed, Because: "it has expired", Waits: d.lastRoot(r)}, true
	case r.State == ca.Retired:
		return Step{To: ca.Removed, Because: "nothing here signs under it", Waits: slices.Concat(d.lastRoot(r), d.leavesUnder(r), d.peersUnder(r))}, true
	case !r.Leaving.IsZero():
		return Step{To: ca.Retired, Because: "it is being replaced", Waits: d.signersUnder(r)}, true
	case r.State == ca.Published:
		return Step{To: ca.Active, Because: "it was published", Waits: d.trust(r.ID)}, true
	}
	if x, apart := Parting(d.Policy, d.World, d.now); apart && x.Root == r.ID {
		begin := "an admin has to begin with " + cmp.Or(x.Next, "the root that follows") + " here: signet rotation start root"
		if x.Back {
			begin = x.Next + " was turned back here: turn it back there too (signet rotation abort " + x.Next + "), or begin with it here again (signet rotation start root)"
		}
		return Step{To: ca.Retired, Because: x.why(), Waits: []Wait{{Code: WaitRoot, For: begin}}}, true
	}
	return Step{}, false
}

// lastRoot: a bundle is never empty.
func (d decision) lastRoot(r Authority) []Wait {
	for _, a := range d.Authorities {
		if a.ID != r.ID && a.InBundle() && !d.now.After(a.NotAfter) {
			return nil
		}
	}
	return []Wait{{Code: WaitNoOther, For: "no other root is trusted; add one first"}}
}

func (d decision) signersUnder(r Authority) []Wait {
	if a, ok := d.current(); ok && a.Root == r.ID {
		if a.State != ca.Active {
			return []Wait{{Code: WaitIssuer, For: "the key of " + a.ID + " is gone, and the next issuer may have to be under it"}}
		}
		return []Wait{{Code: WaitIssuer, For: a.ID + " still signs under it"}}
	}
	return nil
}

// over is when the last of the leaves that live until t has expired for everybody; NotAfter is inclusive (RFC 5280
// §4.1.2.5).
func (d decision) over(t time.Time) time.Time { return t.Add(d.Skew + time.Second) }

// leavesUnder waits until no leaf that was made here under the root can be in use. Where the root is exposed, agents that
// say they hold none are believed before the leaves have expired: what delays its end helps a thief.
func (d decision) leavesUnder(r Authority) []Wait {
	end := d.over(r.LeavesUntil)
	if r.LeavesUntil.IsZero() || !d.now.Before(end) {
		return nil
	}
	// What was being made at the switch has come to its agent by then, and the agent has said so.
	if own, known := d.Own.root(r.ID); known && own.Holding == 0 && !d.exposed(r.ID, d.now).IsZero() && !d.now.Before(d.over(r.Since)) {
		return nil
	}
	return []Wait{{Code: WaitLeaves, For: "leaves under it are valid until " + stamp(r.LeavesUntil), Until: end}}
}

// peersUnder waits until every peer has said, after the last promise we made it has run out, that nothing of it depends
// on the root.
func (d decision) peersUnder(r Authority) []Wait {
	var waits []Wait
	promised := r.Leaving.Add(d.ReportLife + d.Skew)
	for _, p := range d.Peers {
		x, _ := p.root(r.ID)
		switch {
		case d.now.Before(promised):
			waits = append(waits, Wait{Code: WaitPeer, Cluster: p.Cluster, For: "cluster " + p.Cluster + " may rely on our last report until " + stamp(promised), Until: promised})
			if p.At.Before(promised) {
				waits = append(waits, Wait{Code: WaitPeer, Cluster: p.Cluster, For: "then cluster " + p.Cluster + " has to report once more"})
			}
		case p.At.IsZero():
			waits = append(waits, Wait{Code: WaitPeer, Cluster: p.Cluster, For: "cluster " + p.Cluster + " has never reported"})
		case d.fromTheFuture(p, d.now):
			waits = append(waits, d.wrongClock(p))
		case p.At.Before(promised):
			waits = append(waits, Wait{Code: WaitPeer, Cluster: p.Cluster, For: "cluster " + p.Cluster + " has not reported since " + stamp(promised)})
		case x.Signing:
			waits = append(waits, Wait{Code: WaitPeer, Cluster: p.Cluster, Said: true, For: "cluster " + p.Cluster + " still signs under it"})
		case !x.LeavesUntil.IsZero() && d.now.Before(d.over(x.LeavesUntil)) && (x.Holding > 0 || d.exposed(r.ID, d.now).IsZero()):
			waits = append(waits, Wait{
				Code: WaitLeaves, Until: d.over(x.LeavesUntil), Cluster: p.Cluster,
				For: "leaves of cluster " + p.Cluster + " under it are valid until " + stamp(x.LeavesUntil),
			})
		}
	}
	return waits
}

// Holds reports whether a peer's report can be relied upon: there is one, and what it promises is not over.
func (p Policy) Holds(r Report, now time.Time) bool {
	return !r.At.IsZero() && !p.fromTheFuture(r, now) && !now.After(p.holdsUntil(r))
}

// holdsUntil is until when a peer's report can be relied upon: as long as it promises, but not longer than one of ours would.
// That ends a little earlier for us than for those who gave it.
func (p Policy) holdsUntil(r Report) time.Time {
	return earlier(r.Until, r.At.Add(p.ReportLife)).Add(-p.Skew)
}

// Relied is for how long every peer relies on a report of ours: each for as long as one of its own holds, as far as that is
// known, less how far clocks are apart there. That is less than half of it wherever it is set.
func (p Policy) Relied(peers []Report) time.Duration {
	life := p.ReportLife
	for _, r := range peers {
		if !r.At.IsZero() {
			life = min(life, r.Until.Sub(r.At))
		}
	}
	return max(life-p.Skew, life/2)
}

// fromTheFuture: a report that was made later than now says nothing of how long its promises hold. A clock is wrong.
func (p Policy) fromTheFuture(r Report, now time.Time) bool { return r.At.After(now.Add(p.Skew)) }

func (d decision) wrongClock(p Report) Wait {
	return Wait{
		Code: WaitPeer, Until: p.At.Add(-d.Skew), Cluster: p.Cluster,
		For: fmt.Sprintf("the report of cluster %s is of %s, which is yet to come: one of the clocks is wrong", p.Cluster, stamp(p.At)),
	}
}

// trust waits until the validators of every cluster believe the root, and none of them is about to stop.
func (d decision) trust(root string) []Wait {
	r, ok := d.authority(root)
	if !ok || !r.InBundle() {
		return []Wait{{Code: WaitRoot, For: "root " + root + " is not trusted here"}}
	}
	if d.tooShort(r) {
		return []Wait{{Code: WaitShortLived, For: fmt.Sprintf("root %s ends at %s, too soon for a leaf of %s", root, stamp(r.NotAfter), d.LongestLeaf)}}
	}
	if d.first() && slices.ContainsFunc(d.Authorities, func(a Authority) bool { return waiting(a) && a.Root == root }) {
		return nil
	}
	var waits []Wait
	if since := r.Since.Add(d.Delay); r.State == ca.Published && d.now.Before(since) {
		waits = append(waits, Wait{Code: WaitQuorum, For: "those that can't acknowledge have it by " + stamp(since), Until: since})
	}
	own, known := d.Own.root(root)
	if !known {
		waits = append(waits, Wait{Code: WaitQuorum, For: "it is not known which agents of this cluster have it"})
	}
	if short := d.short(own); short > 0 {
		waits = append(waits, Wait{
			Code: WaitQuorum, Missing: own.Missing,
			For: fmt.Sprintf("%d of %d agents of this cluster have it; %d more must acknowledge", own.Trusting, own.Validators, short),
		})
	}
	return append(waits, d.peersTrust(root)...)
}

// first reports whether this cluster has never signed. It has no validators then, and what a person installs is what it
// begins with: a root under which its peers sign already.
func (d decision) first() bool {
	return !slices.ContainsFunc(d.Authorities, func(a Authority) bool {
		return a.Kind == ca.KindIntermediate && a.State == ca.Active || !a.LeavesUntil.IsZero() // also a root's
	})
}

func (d decision) peersTrust(root string) []Wait {
	var waits []Wait
	for _, p := range d.Peers {
		x, known := p.root(root)
		w := Wait{Code: WaitPeer, Cluster: p.Cluster}
		switch {
		case p.At.IsZero():
			w.For = "cluster " + p.Cluster + " has never reported"
		case d.fromTheFuture(p, d.now):
			w = d.wrongClock(p)
		case !d.Holds(p, d.now):
			w.For = fmt.Sprintf("the report of cluster %s is of %s, and could be relied upon until %s", p.Cluster, stamp(p.At), stamp(d.holdsUntil(p)))
			if life := p.Until.Sub(p.At); life <= d.Skew {
				w.For = fmt.Sprintf("the reports of cluster %s hold for %s, and clocks may be %s apart: set rotation.report_life there to what it is here", p.Cluster, life, d.Skew)
			}
		case !known:
			w.Said, w.For = true, "cluster "+p.Cluster+" does not trust it"
		case x.Leaving:
			w.Said, w.For = true, "cluster "+p.Cluster+" is about to stop trusting it"
		case d.short(x) > 0:
			w.Said = true
			w.For, w.Missing = fmt.Sprintf("%d of %d agents of cluster %s have it", x.Trusting, x.Validators, p.Cluster), x.Missing
		default:
			continue
		}
		waits = append(waits, w)
	}
	return waits
}

// short is how many validators are missing for the quorum.
func (d decision) short(r RootReport) int {
	need := int(d.Quorum * float64(r.Validators))
	if float64(need) < d.Quorum*float64(r.Validators) {
		need++
	}
	return max(0, need-r.Trusting)
}

func (d decision) intermediate(x Authority) (Step, bool) {
	above, _ := d.authority(x.Root)
	switch x.State {
	case ca.Removed, ca.Active:
		return Step{}, false
	case ca.Retired:
		end := d.over(x.LeavesUntil)
		s := Step{To: ca.Removed, Because: "it was replaced"}
		if d.now.Before(end) {
			s.Waits = []Wait{{Code: WaitTime, For: "leaves under it are valid until " + stamp(x.LeavesUntil), Until: end}}
		}
		return s, true
	}
	if !x.Tainted.IsZero() {
		return Step{To: ca.Removed, Because: "its key is tainted"}, true
	}
	if !x.signed() {
		w := Wait{Code: WaitSignature, For: "an upstream authority has to sign its request"}
		if tainted, other := d.Instead(); tainted != "" {
			w.For += ", under " + cmp.Or(other, "a new root (signet rotation start root)") + ", since " + tainted + " is tainted"
		}
		return Step{To: ca.Published, Because: "its request was made", Waits: []Wait{w}}, true
	}
	switch {
	case above.State == ca.Removed:
		return Step{To: ca.Removed, Because: "the root above it is removed"}, true
	case d.tooShort(x):
		return Step{To: ca.Removed, Because: fmt.Sprintf("it ends at %s, too soon for a leaf of %s", stamp(x.NotAfter), d.LongestLeaf)}, true
	case above.State == ca.Retired:
		return d.kept(above), true
	case x.State == ca.Prepared:
		s := Step{To: ca.Published, Because: "it was signed"}
		if above.State != ca.Active {
			s.Waits = []Wait{{Code: WaitRoot, For: "the root above it, " + x.Root + ", is not active yet"}}
		}
		return s, true
	}
	because, at := d.due(x)
	if because == "" {
		now, _ := d.active()
		return d.spare(x, now), true
	}
	s := Step{To: ca.Active, Because: because}
	if at = later(at, x.NotBefore); d.now.Before(at) {
		s.Waits = append(s.Waits, Wait{Code: WaitTime, For: "its time is " + stamp(at), Until: at})
	}
	s.Waits = append(s.Waits, d.mayBegin(x.Root)...)
	return s, true
}

// kept is the step of one that was to sign under a root that is retired now: it goes with that one, but not before, since an
// abort brings the root back.
func (d decision) kept(above Authority) Step {
	s := Step{To: ca.Removed, Because: "the root above it is being removed"}
	if end, _ := d.root(above); !end.Ready(false) && d.exposed(above.ID, d.now).IsZero() {
		back := "signet rotation abort " + above.ID
		if !above.Aborted.IsZero() { // once more changes nothing
			back = "signet rotation start root, with " + above.ID + ","
		}
		s.Waits = []Wait{{Code: WaitRoot, For: "it is kept until " + above.ID + " is removed: " + back + " brings both back", Until: At(end, d.now)}}
	}
	return s
}

// spare is the step of one that would take over only to end no later than the one before it. It stands by until it is too
// short for a leaf: that one's key may be lost.
func (d decision) spare(x, before Authority) Step {
	s := Step{To: ca.Removed, Because: "it ends no later than " + before.ID + ", which comes before it, and so never takes over"}
	if end := x.NotAfter.Add(-d.LongestLeaf); d.now.Before(end) {
		s.Waits = []Wait{{Code: WaitTime, For: "it stands by until " + stamp(end), Until: end}}
	}
	return s
}

// tooShort: what lives shorter than the longest leaf is never activated. A cluster begins with what it is given: there is
// nothing better to wait for, and its leaves are cut short.
func (d decision) tooShort(x Authority) bool {
	return d.now.Add(d.LongestLeaf).After(x.NotAfter) && (!d.first() || d.now.After(x.NotAfter))
}

// Instead says under which root a request is to be signed since the one above the issuer is tainted, or the only one that was to
// replace that: another that stays, the one that ends last, or "" where a new one is needed. tainted is "" where no other one has to.
func (w World) Instead() (tainted, other string) {
	signing, _ := w.current()
	above, _ := w.authority(signing.Root)
	var best, lost Authority
	for _, r := range w.Authorities {
		if r.Kind != ca.KindRoot || r.State == ca.Removed || !r.Leaving.IsZero() {
			continue
		}
		if _, since := w.lost(r); !since.IsZero() {
			lost = r
		} else if r.NotAfter.After(best.NotAfter) {
			best = r
		}
	}
	switch {
	case !above.Tainted.IsZero():
		return above.ID, best.ID
	case !above.Leaving.IsZero() && best.ID == "":
		return lost.ID, ""
	}
	return "", ""
}

// mayBegin waits until signing under a root may begin. Peers don't remove a root under which they know us to sign, so an
// issuer that takes over from another one under the same root needs no new promise.
func (d decision) mayBegin(root string) []Wait {
	if now, ok := d.current(); ok && now.Root == root {
		return nil
	}
	if r, _ := d.authority(root); !r.Leaving.IsZero() {
		return []Wait{{Code: WaitRoot, For: "the root above it, " + root + ", is being replaced"}}
	}
	return d.trust(root)
}

// due says when and why an intermediate takes over from the one that is active; it never does without a reason.
func (d decision) due(x Authority) (because string, at time.Time) {
	now, ok := d.active()
	above, _ := d.authority(now.Root)
	switch {
	case !ok:
		return "no issuer is active", time.Time{}
	case !now.Tainted.IsZero():
		return "the key of " + now.ID + " is tainted", time.Time{}
	case !above.Leaving.IsZero() && now.Root != x.Root && !d.spent(x, now):
		return "the root above " + now.ID + " is being replaced", time.Time{}
	case x.Wanted:
		return "it was asked for", time.Time{}
	case worn(x, now):
		return "", time.Time{}
	}
	return d.turn(x, now)
}

// Stagger is how much later than the one before it each of several intermediates with this life should begin: it takes over
// then, or soon after, and none is requested before the last of them is worn. Zero or less = nothing fits.
func (p Policy) Stagger(life time.Duration) time.Duration {
	s := min(time.Duration(p.SwitchAt*float64(life)), life-p.LongestLeaf)
	for _, unit := range []time.Duration{24 * time.Hour, time.Hour, time.Minute} {
		if s >= 2*unit {
			return s.Truncate(unit)
		}
	}
	return s.Truncate(time.Second)
}

// turn is when an intermediate takes over from the one before it, and why then.
func (d decision) turn(x, before Authority) (because string, at time.Time) {
	at = d.at(before, d.SwitchAt)
	switch {
	case !x.NotBefore.After(at):
		return fmt.Sprintf("%.0f %% of the life of %s", d.SwitchAt*100, before.ID), at
	case before.NotAfter.Before(x.NotBefore): // as where one of a ceremony's was dropped
		return "it begins then; " + before.ID + " ends before, at " + stamp(before.NotAfter) + ", so one more is needed in between", x.NotBefore
	}
	return "it begins then, after " + before.ID, x.NotBefore
}

// at is when a fraction of an intermediate's life is over, and never so late that it could not sign the longest leaf.
func (d decision) at(x Authority, fraction float64) time.Time {
	t := x.NotBefore.Add(time.Duration(fraction * float64(x.NotAfter.Sub(x.NotBefore))))
	return earlier(t, x.NotAfter.Add(-d.LongestLeaf))
}

// next chooses who takes over: whose root stays, then who has a certificate, then who was asked for, then who begins first.
func (d decision) next(steps []Step) (best string, ok bool) {
	var chosen Authority
	for _, s := range steps {
		if s.Kind != ca.KindIntermediate || s.To != ca.Active || !s.Ready(false) {
			continue
		}
		x, _ := d.authority(s.Authority)
		if !ok || d.before(x, chosen) {
			chosen, ok = x, true
		}
	}
	return chosen.ID, ok
}

// inTurn has intermediates that wait for their time wait for those before them as well: of several with staggered starts each
// takes over from the last. It keeps no step waiting that is ready, nor one whose turn may come before that of the last.
func (d decision) inTurn(steps []Step) {
	type turn struct {
		a Authority
		s *Step
	}
	var queue []turn
	for i := range steps {
		if s := &steps[i]; s.Kind == ca.KindIntermediate && s.To == ca.Active {
			a, _ := d.authority(s.Authority)
			queue = append(queue, turn{a, s})
		}
	}
	slices.SortStableFunc(queue, func(x, y turn) int {
		switch {
		case d.before(x.a, y.a):
			return -1
		case d.before(y.a, x.a):
			return 1
		}
		return 0
	})
	if len(queue) == 0 {
		return
	}
	last := queue[0]
	for _, x := range queue[1:] {
		if slices.ContainsFunc(last.s.Waits, func(w Wait) bool { return w.Code != WaitTime }) {
			return
		}
		j := slices.IndexFunc(x.s.Waits, func(w Wait) bool { return w.Code == WaitTime })
		// What was asked for, and begins later, keeps that for its reason.
		switch because, at := d.turn(x.a, last.a); {
		case j >= 0 && worn(x.a, last.a):
			s := d.spare(x.a, last.a)
			x.s.To, x.s.Because, x.s.Waits = s.To, s.Because, s.Waits
			continue
		case j >= 0 && (at.After(x.s.Waits[j].Until) || !x.a.Wanted && at.Equal(x.s.Waits[j].Until)):
			x.s.Because = because
			x.s.Waits[j].Until, x.s.Waits[j].For = at, "its time is "+stamp(at)
		}
		last = x
	}
}

// unlessReplaced: what waits for its turn under a root that is being replaced never gets it if another root is signed under before.
func (d decision) unlessReplaced(steps []Step) {
	for i := range steps {
		s := &steps[i]
		x, _ := d.authority(s.Authority)
		timed := slices.ContainsFunc(s.Waits, func(w Wait) bool { return w.Code == WaitTime })
		if s.Kind == ca.KindIntermediate && s.To == ca.Active && timed && !d.stays(x.Root) {
			s.Because += ", but only if no other root is signed under by then: that ends it, since " + x.Root + " is being replaced"
		}
	}
}

func (d decision) before(x, y Authority) bool {
	xRoot, _ := d.authority(x.Root)
	yRoot, _ := d.authority(y.Root)
	if stays := xRoot.Leaving.IsZero(); stays != yRoot.Leaving.IsZero() {
		return stays
	}
	if x.signed() != y.signed() {
		return x.signed()
	}
	if x.Wanted != y.Wanted {
		return x.Wanted
	}
	return x.NotBefore.Before(y.NotBefore)
}

// late: the active issuer is due to go, and nothing may be signed under the root that its successor is under: validators don't all
// believe it, or it is not known any more that they do. How long that takes is for others to say, so that the cluster needs one
// more issuer under the root that it has. A tainted one bears none.
func (d decision) late(root string) bool {
	r, _ := d.authority(root)
	now, ok := d.active()
	above, _ := d.authority(now.Root)
	return ok && above.Tainted.IsZero() && !d.now.Before(d.at(now, d.SwitchAt)) && (r.State != ca.Active || len(d.mayBegin(root)) > 0)
}

// mostWorn is how many certificates that end with their root, too soon, may wait before no further one is asked for.
const mostWorn = 2

// worn: it would take over only to end sooner than the one before it.
func worn(x, now Authority) bool { return !x.NotAfter.After(now.NotAfter) }

// spent: it would end sooner than the one before it, and would have to be replaced as soon as it had taken over. That is of use only
// where the one before it must not sign at all.
func (d decision) spent(x, now Authority) bool {
	return worn(x, now) && now.Tainted.IsZero() && !d.now.Before(d.at(x, d.SwitchAt))
}

// waiting reports whether an intermediate may yet become an issuer.
func waiting(a Authority) bool {
	return a.Kind == ca.KindIntermediate && (a.State == ca.Prepared || a.State == ca.Published) && a.Tainted.IsZero()
}

// stays reports whether a root is not on its way out.
func (d decision) stays(root string) bool {
	r, ok := d.authority(root)
	return ok && r.Leaving.IsZero()
}

// successor says whether another intermediate is to be made.
func (d decision) successor() (Step, bool) {
	now, ok := d.active()
	if !ok {
		for _, a := range d.Authorities {
			if waiting(a) && (!a.signed() || !d.tooShort(a)) {
				return Step{}, false
			}
		}
		if !slices.ContainsFunc(d.Authorities, Authority.InBundle) {
			return Step{}, false // the root that a cluster begins under is given by a person
		}
		return Step{Kind: ca.KindIntermediate, To: ca.Prepared, Because: "no issuer is active"}, true
	}
	above, _ := d.authority(now.Root)
	// One that begins only when the active one is at its end, or is needed now, is none.
	soon := d.now.Add(d.Skew)
	needed := later(now.NotAfter.Add(-d.LongestLeaf), soon)
	urgent := !now.Tainted.IsZero() || !above.Leaving.IsZero()
	if urgent {
		needed = soon
	}
	bridge, useless := "", 0
	for _, a := range d.Authorities {
		if waiting(a) && a.signed() && d.stays(a.Root) && d.late(a.Root) {
			bridge = fmt.Sprintf("%s ends at %s, and not all validators trust %s yet", now.ID, stamp(now.NotAfter), a.Root)
		}
		if waiting(a) && (!a.signed() || d.stays(a.Root) && !d.tooShort(a) && !a.NotBefore.After(needed) && !d.late(a.Root) && (!worn(a, now) || urgent && !d.spent(a, now))) {
			return Step{}, false
		}
		if root, _ := d.authority(a.Root); waiting(a) && root.State != ca.Retired && worn(a, now) && !a.NotAfter.Before(root.NotAfter) {
			useless++
		}
	}
	// Where a root at its end bounds every chain, asking again and again would not help; the one that replaces it doesn't.
	if useless >= mostWorn && (d.stays(now.Root) || bridge != "") {
		return Step{}, false
	}
	s := Step{Kind: ca.KindIntermediate, To: ca.Prepared}
	switch at := d.at(now, d.PrepareAt); {
	case bridge != "":
		s.Because = bridge
	case !now.Tainted.IsZero():
		s.Because = "the key of " + now.ID + " is tainted"
	case !above.Leaving.IsZero():
		s.Because = "the root above " + now.ID + " is being replaced"
	default:
		s.Because = fmt.Sprintf("%.0f %% of the life of %s", d.PrepareAt*100, now.ID)
		if d.now.Before(at) {
			s.Waits = []Wait{{Code: WaitTime, For: "its time is " + stamp(at), Until: at}}
		}
	}
	return s, true
}

// Apply makes a step in a copy of the authorities: at one moment all is as before, at the next all is as after.
// A step that was made already, or whose authority has moved meanwhile, changes nothing. Making a successor is left to the
// caller, who has the keys.
func Apply(p Policy, all []Authority, s Step, now time.Time) []Authority {
	all = slices.Clone(all)
	if !slices.ContainsFunc(all, func(a Authority) bool { return a.ID == s.Authority && a.State == s.From }) {
		return all
	}
	for i := range all {
		a := &all[i]
		switch {
		case a.ID == s.Authority:
			a.State, a.Since = s.To, now
			if s.To == ca.Active || s.To == ca.Removed {
				a.Wanted = false
			}
			if a.Kind == ca.KindRoot && (s.To == ca.Retired || s.To == ca.Removed) && a.Leaving.IsZero() {
				leave(a, now)
			}
		case s.Kind == ca.KindIntermediate && s.To == ca.Active && a.Kind == ca.KindIntermediate && a.State == ca.Active:
			retire(p, all, i, now)
		}
	}
	return all
}

// retire ends the signing of an active issuer.
func retire(p Policy, all []Authority, i int, now time.Time) {
	a := &all[i]
	a.State, a.Since = ca.Retired, now
	a.LeavesUntil = later(a.LeavesUntil, earlier(p.LeavesUntil(now), a.NotAfter))
	for j := range all {
		if all[j].ID == a.Root {
			all[j].LeavesUntil = later(all[j].LeavesUntil, a.LeavesUntil)
		}
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
