package check

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/rotation"
)

// Life is measured against what is left of it everywhere here, never against days: what is short for ten years is long for
// an hour.

// Rotation is what is known of the CAs of a cluster when it is looked whether their rotation will go on by itself.
type Rotation struct {
	rotation.Policy
	rotation.World
	// Automatic: steps are taken as soon as they can be.
	Automatic bool
	// Online: an upstream at hand signs the requests, and CodeUpstream says when it does not.
	Online bool
	// Shared: reports come by themselves, and CodeShared says when they don't.
	Shared bool
	// LeastLife is what must be left of an issuer's life for a leaf to be made; see leaf.min_useful_life.
	LeastLife time.Duration
	// Forged are the CAs whose keys are lost while somebody still accepts what is made with them.
	Forged []Forged
	// Restored is what was published that the state database does not know of.
	Restored Restored
	// Halt keeps leaves from being made although an intermediate that lives is active; nil = nothing does.
	Halt *Halt
	// Offline: no server works here that a command could ask.
	Offline bool
	// Failed are steps that came by themselves, failed, and are tried again.
	Failed []Failed
}

// Failed is a step that could not be made, since when, and why.
type Failed struct {
	Authority string
	To        ca.State
	Trouble
}

// String says it to people.
func (f Failed) String() string {
	return fmt.Sprintf("it fails since %s, and is tried again: %s", stamp(f.Since), f.Why)
}

// Halt is a key that can't be used, a clock that is not believed, or a log that can't be written.
type Halt struct {
	// Since is when it began; zero = that is not known.
	Since time.Time
	// Why is a clause, Mend a command.
	Why, Mend string
}

// Restored is a state database against what agents hold, and against the log.
type Restored struct {
	// Sequence is the trust bundle's, Newest the greatest that is known.
	Sequence, Newest uint64
	// Agents hold a bundle that was never published, as far as the database knows; Wild claim one that can't be.
	Agents, Wild []string
	// Logged: the log has a later change of the CAs, LoggedRevision, than the database, Revision.
	Logged                   bool
	Revision, LoggedRevision uint64
}

// Forged is a CA whose key is lost.
type Forged struct {
	ID      string
	Cluster string
	// By says of each cluster who believes the root above it, in words; empty = nobody does. Until is the end of its chain.
	By     []string
	Until  time.Time
	Advice string
}

// Commands that mend; FILE is the server's configuration.
const (
	MendStatus  = "signet rotation status --config FILE"
	mendStart   = "signet rotation start --config FILE intermediate"
	mendAdvance = "signet rotation advance --config FILE"
	MendServe   = "signet serve --config FILE"
	mendClock   = "timedatectl set-ntp true"
	mendTrust   = "signet trust republish --config FILE --dry-run"
	// MendRoot helps against the end of a root.
	MendRoot = "signet root init; then: signet rotation start --config FILE root --root ROOT --fingerprint SHA256:…"
)

// Findings says what of the rotation waits for a person, and what will be bad when nobody comes.
func (r Rotation) Findings(now time.Time) (found Findings) {
	steps := rotation.Next(r.Policy, r.World, now)
	active, ok := r.active()
	found = append(found, r.issuing(steps, now)...)
	if ok {
		found = append(found, r.successor(active, steps, now)...)
		found = append(found, r.rootEnd(active, now)...)
	}
	found = append(found, r.signatures(active, now)...)
	found = append(found, r.peers(steps, now)...)
	found = append(found, r.forged()...)
	found = append(found, r.rivals(now)...)
	found = append(found, r.apart(now)...)
	found = append(found, r.Restored.findings()...)
	if !r.Automatic {
		found = append(found, due(steps)...)
	}
	found = append(found, r.failed(steps)...)
	if len(found) == 0 {
		found.add(CodeSuccessor, OK, "rotation", "nothing of it waits for a person", "")
	}
	return found
}

func (r Rotation) first(is func(rotation.Authority) bool) (rotation.Authority, bool) {
	i := slices.IndexFunc(r.Authorities, is)
	if i < 0 {
		return rotation.Authority{}, false
	}
	return r.Authorities[i], true
}

func (r Rotation) active() (rotation.Authority, bool) {
	return r.first(func(a rotation.Authority) bool { return a.Kind == ca.KindIntermediate && a.State == ca.Active })
}

// at is when a fraction of an intermediate's life is over.
func at(a rotation.Authority, fraction float64) time.Time {
	return a.NotBefore.Add(time.Duration(fraction * float64(a.NotAfter.Sub(a.NotBefore))))
}

// waiting are the intermediates that may yet become issuers.
func (r Rotation) waiting(is func(rotation.Authority) bool) (all []rotation.Authority) {
	for _, a := range r.Authorities {
		if a.Kind == ca.KindIntermediate && (a.State == ca.Prepared || a.State == ca.Published) && a.Tainted.IsZero() && is(a) {
			all = append(all, a)
		}
	}
	return all
}

func signed(a rotation.Authority) bool { return !a.NotAfter.IsZero() }

// IssuableUntil is until when leaves can be made if only time passes: no signature, acknowledgement or report comes any
// more. Zero = nothing can be made now.
func (r Rotation) IssuableUntil(now time.Time) time.Time {
	active, ok := r.active()
	if !ok || now.Before(active.NotBefore) || r.Halt != nil {
		return time.Time{}
	}
	return r.issuableUntil(active, rotation.Next(r.Policy, r.World, now), now)
}

func (r Rotation) issuableUntil(active rotation.Authority, steps []rotation.Step, now time.Time) time.Time {
	until := r.lastUse(active)
	for _, x := range r.waiting(signed) {
		i := slices.IndexFunc(steps, func(s rotation.Step) bool { return s.Authority == x.ID })
		if i < 0 || !r.Automatic || !x.NotAfter.After(active.NotAfter) {
			continue
		}
		s := steps[i]
		// One that is prepared becomes published first; that takes no time.
		if s.To != ca.Active && !(s.To == ca.Published && len(s.Waits) == 0) {
			continue
		}
		if takes := rotation.At(s, now); !takes.IsZero() && takes.Before(until) {
			until = later(until, r.lastUse(x))
		}
	}
	if !now.Before(until) {
		return time.Time{}
	}
	return until
}

// lastUse is when a leaf of an intermediate's would live too short; NotAfter is inclusive (RFC 5280 §4.1.2.5).
func (r Rotation) lastUse(x rotation.Authority) time.Time {
	return x.NotAfter.Add(time.Second - r.LeastLife)
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// Stopped says since when and why nothing can be issued, and what helps; nil = leaves can be made. It is what SGN1017 says.
func (r Rotation) Stopped(now time.Time) *Halt {
	active, ok := r.active()
	since, why, mend := r.stopped(active, ok, rotation.Next(r.Policy, r.World, now), now)
	if why == "" {
		return nil
	}
	return &Halt{Since: since, Why: why, Mend: mend}
}

// issuing says whether leaves can be made, to all who ask: readiness, signet check, (Stopped) the status and (IssuableUntil)
// the metric. There is a finding from the first warning on, without a gap, until they can be made for long again; while none can
// be made it stops the server.
func (r Rotation) issuing(steps []rotation.Step, now time.Time) (found Findings) {
	active, ok := r.active()
	if since, why, mend := r.stopped(active, ok, steps, now); why != "" {
		message := "nothing can be issued: " + why
		if !since.IsZero() {
			message = fmt.Sprintf("nothing can be issued since %s: %s", stamp(since), why)
		}
		return Findings{{Code: CodeIssuing, Level: Error, About: Issuing, Message: message, Mend: mend, Stops: []string{Issuing}}}
	}
	until := r.issuableUntil(active, steps, now)
	level, share := OK, float64(until.Sub(now))/float64(active.NotAfter.Sub(active.NotBefore))
	switch {
	case share < lifeError:
		level = Error
	case share < lifeWarning:
		level = Warning
	default:
		return nil
	}
	message := fmt.Sprintf("nothing can be issued from %s on, in %s", stamp(until), short(until.Sub(now)))
	why, mend := r.next(steps)
	if why != "" {
		message += ": " + why
	}
	found.add(CodeIssuing, level, Issuing, message, mend)
	return found
}

// stopped says since when, and why, no leaf can be made now; without a why one can.
func (r Rotation) stopped(active rotation.Authority, ok bool, steps []rotation.Step, now time.Time) (since time.Time, why, mend string) {
	switch {
	case !ok:
		for _, a := range r.Authorities {
			if a.Kind == ca.KindIntermediate && a.State == ca.Retired {
				since = later(since, a.Since)
			}
		}
		why = "no intermediate is active"
	case now.Before(active.NotBefore):
		return since, fmt.Sprintf("%s begins at %s, and it is %s here", active.ID, stamp(active.NotBefore), stamp(now)), mendClock
	case r.issuableUntil(active, steps, now).IsZero():
		since = later(r.lastUse(active), active.Since)
		why = fmt.Sprintf("%s ends at %s, and a leaf has to live %s", active.ID, stamp(active.NotAfter), short(r.LeastLife))
		if now.After(active.NotAfter) {
			why = fmt.Sprintf("%s expired at %s", active.ID, stamp(active.NotAfter))
		}
	case r.Halt != nil:
		return r.Halt.Since, r.Halt.Why, r.Halt.Mend
	default:
		return since, "", ""
	}
	next, mend := r.next(steps)
	if next != "" {
		why += "; " + next
	}
	return since, why, mend
}

// next says what keeps the intermediate that is to take over from it, and what helps.
func (r Rotation) next(steps []rotation.Step) (why, mend string) {
	mend = mendStart
	if r.Offline {
		mend = r.mendSign("")
	}
	for _, x := range r.waiting(func(rotation.Authority) bool { return true }) {
		who := x.ID + ", which is to take over, "
		if !signed(x) {
			return who + "is not signed", r.mendSign(x.ID)
		}
		i := slices.IndexFunc(steps, func(s rotation.Step) bool { return s.Authority == x.ID && s.To != ca.Removed })
		switch {
		case i < 0:
		case len(steps[i].Waits) > 0:
			why, mend = who+"waits: "+steps[i].Waits[0].For, MendStatus
		case !r.Automatic:
			why, mend = x.ID+" is to take over, and rotation.automatic is off", mendAdvance+" "+x.ID
		case r.Offline:
			why, mend = x.ID+" takes over as soon as the server runs", MendServe
		}
	}
	return why, mend
}

// mendSign has the request of an intermediate signed; without an ID, that of a new one.
func (r Rotation) mendSign(id string) string {
	show := "signet ca show --config FILE " + id
	switch {
	case r.Online && r.Offline:
		return MendServe // it asks the upstream
	case r.Online:
		return MendStatus
	case r.Offline: // a server that could not issue would not start, and so not show it
		show = "signet cluster init --config FILE --csr-out CSR"
	}
	at := "the root"
	if tainted, other := r.Instead(); tainted != "" {
		if other == "" {
			return MendRoot
		}
		at = other
	}
	return show + "; then, at " + at + ": signet root sign; then: signet cluster install --config FILE --chain CHAIN --root-fingerprint SHA256:…"
}

// successor says that the one who is to take over is missing, or will come too late.
func (r Rotation) successor(active rotation.Authority, steps []rotation.Step, now time.Time) (found Findings) {
	if now.Before(at(active, r.PrepareAt)) {
		return nil
	}
	// One that ends with its root is said below; any other that never takes over is as if it were not there.
	ready := r.waiting(func(x rotation.Authority) bool {
		root, _ := r.first(func(a rotation.Authority) bool { return a.ID == x.Root })
		return !signed(x) || !x.NotAfter.Before(root.NotAfter) ||
			!slices.ContainsFunc(steps, func(s rotation.Step) bool { return s.Authority == x.ID && s.To == ca.Removed })
	})
	late := !now.Before(at(active, r.SwitchAt))
	if len(ready) == 0 {
		level := Warning
		if late {
			level = Error
		}
		found.add(CodeSuccessor, level, active.ID, fmt.Sprintf("%s of its life are over, and no successor stands ready; it ends at %s", percent(active, now), stamp(active.NotAfter)), mendStart)
		return found
	}
	for _, x := range ready {
		i := slices.IndexFunc(steps, func(s rotation.Step) bool { return s.Authority == x.ID })
		if !signed(x) || i < 0 {
			continue // signatures
		}
		takes := rotation.At(steps[i], now)
		switch blocked := waits(steps[i]); {
		case !x.NotAfter.After(active.NotAfter):
			found.add(CodeSuccessor, Warning, x.ID, fmt.Sprintf("it is to follow %s, and ends no later, at %s: the root above ends", active.ID, stamp(x.NotAfter)), MendRoot)
		case steps[i].To == ca.Removed: // another one like it takes over
		case blocked != "" && late:
			found.add(CodeSuccessor, Error, x.ID, fmt.Sprintf("it can't take over from %s, which ends at %s: %s", active.ID, stamp(active.NotAfter), blocked), MendStatus)
		case !takes.IsZero() && !takes.Before(active.NotAfter.Add(-r.LeastLife)):
			found.add(CodeSuccessor, Error, x.ID, fmt.Sprintf("it takes over at %s, after the end of %s at %s", stamp(takes), active.ID, stamp(active.NotAfter)), mendStart)
		}
	}
	return found
}

// waits is what keeps a step from being taken and doesn't end by the clock; "" = nothing.
func waits(s rotation.Step) string {
	var all []string
	for _, w := range s.Waits {
		if w.Until.IsZero() {
			all = append(all, w.For)
		}
	}
	return strings.Join(all, "; ")
}

func percent(a rotation.Authority, now time.Time) string {
	return fmt.Sprintf("%.0f %%", 100*float64(now.Sub(a.NotBefore))/float64(a.NotAfter.Sub(a.NotBefore)))
}

// rootEnd says that the root ends before an intermediate under it could live as long as the one before.
func (r Rotation) rootEnd(active rotation.Authority, now time.Time) (found Findings) {
	life := active.NotAfter.Sub(active.NotBefore)
	long := func(a rotation.Authority) bool {
		return a.Kind == ca.KindRoot && a.State != ca.Removed && a.Leaving.IsZero() && !now.Add(life).After(a.NotAfter)
	}
	root, ok := r.first(func(a rotation.Authority) bool { return a.ID == active.Root })
	if _, other := r.first(long); !ok || other || now.Before(at(active, r.PrepareAt)) {
		return nil
	}
	level, left := Warning, root.NotAfter.Sub(now)
	if float64(left) < lifeError*float64(root.NotAfter.Sub(root.NotBefore)) || left < life/2 {
		level = Error
	}
	found.add(CodeRootEnd, level, root.ID, fmt.Sprintf("it ends at %s, in %s: no intermediate under it can live %s any more", stamp(root.NotAfter), short(left), short(life)), MendRoot)
	return found
}

// signatures are requests that a person has to carry to the root.
func (r Rotation) signatures(active rotation.Authority, now time.Time) (found Findings) {
	if r.Online {
		return nil
	}
	for _, x := range r.waiting(func(a rotation.Authority) bool { return !signed(a) }) {
		level := Warning
		if signed(active) && (!now.Before(at(active, r.SwitchAt)) || !active.Tainted.IsZero()) {
			level = Error
		}
		message := "its request waits for a signature since " + stamp(x.Since)
		if tainted, other := r.Instead(); tainted != "" {
			message += ", under " + cmp.Or(other, "a new root") + ", since " + tainted + " is tainted"
		}
		found.add(CodeSignature, level, x.ID, message, r.mendSign(x.ID))
	}
	return found
}

// peers says which reports a step waits for, where it waits for nothing else: before that none helps. Where they come by
// themselves, the next one does while the last one holds.
func (r Rotation) peers(steps []rotation.Step, now time.Time) (found Findings) {
	for _, s := range steps {
		if slices.ContainsFunc(s.Waits, func(w rotation.Wait) bool { return w.Code != rotation.WaitPeer || !w.Until.IsZero() }) {
			continue
		}
		for _, w := range s.Waits {
			message, mend := w.For, fmt.Sprintf("in cluster %[1]s: %[2]ssignet rotation report --config %[1]s.yaml > %[1]s.report; here: %[3]s --report %[1]s.report", w.Cluster, r.beforeReport(s, w), mendAdvance)
			if r.Shared {
				message, mend = message+"; reports are exchanged by themselves: wait, and if none comes, see "+CodeShared+" here and there", ""
			}
			coming := r.Shared && slices.ContainsFunc(r.Peers, func(p rotation.Report) bool { return p.Cluster == w.Cluster && r.Holds(p, now) })
			if coming || slices.ContainsFunc(found, func(f Finding) bool { return f.Message == message }) {
				continue
			}
			found.add(CodePeer, Warning, s.Authority, message, mend)
		}
	}
	return found
}

// forged says who still accepts what a thief makes.
func (r Rotation) forged() (found Findings) {
	for _, f := range r.Forged {
		if len(f.By) == 0 {
			continue
		}
		mend := f.Advice
		if mend == "" {
			mend = MendStatus
		}
		found.add(CodeTaint, Error, f.ID, fmt.Sprintf("its key (of cluster %s) is lost, and certificates forged with it are accepted, until %s at the latest, by %s", f.Cluster, stamp(f.Until), Some(f.By)), mend)
	}
	return found
}

// rivals says that the clusters stand under several roots for good.
func (r Rotation) rivals(now time.Time) (found Findings) {
	all := rotation.Rivals(r.Policy, r.World, now)
	for i, x := range all {
		if i == 0 {
			continue
		}
		mend := "signet trust remove --config FILE " + x.Root
		if !r.Shared {
			mend = "in each cluster: " + mend
		}
		found.add(CodeRivals, Warning, x.Root, fmt.Sprintf("cluster %s signs under it and cluster %s under %s, and neither root leaves, as after two rotations of the root that were begun at once: let %s go on, which ends last", Some(x.Clusters), Some(all[0].Clusters), all[0].Root, all[0].Root), mend)
	}
	return found
}

// beforeReport is what has to be done in a cluster before another report of it helps, as it is there that something is missing.
func (r Rotation) beforeReport(s rotation.Step, w rotation.Wait) string {
	if !w.Said {
		return ""
	}
	root := s.Authority
	if s.Kind == ca.KindIntermediate {
		a, _ := r.first(func(a rotation.Authority) bool { return a.ID == s.Authority })
		root = a.Root
	}
	believed, leaving := false, false
	for _, p := range r.Peers {
		for _, x := range p.Roots {
			if p.Cluster == w.Cluster && x.ID == root {
				believed, leaving = true, x.Leaving
			}
		}
	}
	// It has not begun with the root that is to come, or to leave the one that goes.
	if !believed || s.To == ca.Removed && !leaving {
		return fmt.Sprintf("signet rotation start --config %s.yaml root --root ROOT --fingerprint SHA256:…, and what follows; then: ", w.Cluster)
	}
	return fmt.Sprintf("signet rotation status --config %s.yaml says what it waits for; then: ", w.Cluster)
}

// apart says that others have gone on to another root without this cluster.
func (r Rotation) apart(now time.Time) (found Findings) {
	x, apart := rotation.Parting(r.Policy, r.World, now)
	if !apart {
		return nil
	}
	own, _ := r.first(func(a rotation.Authority) bool { return a.ID == x.Root })
	_, known := r.first(func(a rotation.Authority) bool { return a.ID == x.Next && a.InBundle() })
	mend := MendRoot
	switch {
	case r.Shared, known && !own.Leaving.IsZero():
		mend = MendStatus // it is under way, or comes with what is shared
	case x.Back && len(x.Refusing) == 0:
		mend = fmt.Sprintf("there too, signet rotation abort %s; or go on with it here: signet rotation start --config FILE root --root ROOT --fingerprint SHA256:…", x.Next)
	case x.Next != "":
		mend = fmt.Sprintf("signet rotation start --config FILE root --root ROOT --fingerprint SHA256:…, where ROOT is the certificate of %s, which its holder has, and signet trust export in another cluster", x.Next)
	}
	if len(x.Refusing) > 0 {
		found.add(CodeApart, Error, x.Root, fmt.Sprintf("what this cluster signs under it is refused in cluster %s, where it is not believed", Some(x.Refusing)), mend)
	}
	for _, u := range x.Unknown {
		found.add(CodeApart, Error, u.Root, fmt.Sprintf("cluster %s signs under it, and it is not believed here: what is signed there is refused here", Some(u.Clusters)), mend)
	}
	// Where decisions are shared, this one is about to come.
	if len(x.Leaving) > 0 && !r.Shared {
		found.add(CodeApart, Warning, x.Root, fmt.Sprintf("it is being replaced in cluster %s, which waits until this cluster begins too", Some(x.Leaving)), mend)
	}
	return found
}

// due are steps that a person has to take, since they don't come by themselves.
func due(steps []rotation.Step) (found Findings) {
	for _, s := range steps {
		if !s.Ready(false) {
			continue
		}
		about, mend := aboutStep(s)
		found.add(CodeStep, Warning, about, fmt.Sprintf("it is to become %s, because %s, and rotation.automatic is off", s.To, s.Because), mend)
	}
	return found
}

// failed are steps that would come by themselves if they could be made.
func (r Rotation) failed(steps []rotation.Step) (found Findings) {
	for _, s := range steps {
		for _, f := range r.Failed {
			if f.Authority == s.Authority && f.To == s.To && s.Ready(false) {
				about, mend := aboutStep(s)
				found.add(CodeStep, Warning, about, fmt.Sprintf("it is to become %s, because %s, but %s", s.To, s.Because, f), "when that is mended, at once: "+mend)
			}
		}
	}
	return found
}

// aboutStep names what a step is about, and takes it.
func aboutStep(s rotation.Step) (about, mend string) {
	if s.Authority == "" {
		return "successor", mendAdvance
	}
	return s.Authority, mendAdvance + " " + s.Authority
}

// findings say that an older state database is at work.
func (r Restored) findings() (found Findings) {
	const lead = "the state database was restored from an older copy: "
	if r.Logged {
		found.add(CodeRestored, Error, "log", fmt.Sprintf(lead+"the audit log knows of change %d of the CAs, and the database of none after %d; what was decided between is not in effect", r.LoggedRevision, r.Revision), mendTrust)
	}
	if len(r.Agents) > 0 {
		found.add(CodeRestored, Error, "trust", fmt.Sprintf(lead+"%s trust bundles up to number %d, and the newest here is %d; until one above is published, they take none", holders(r.Agents), r.Newest, r.Sequence), mendTrust)
	}
	if len(r.Wild) > 0 {
		found.add(CodeRestored, Warning, "agents", fmt.Sprintf("%s trust bundles that can't have been published here: look there, somebody may have broken in", holders(r.Wild)), "signet agent ban --config FILE NAME")
	}
	return found
}

func holders(agents []string) string {
	if len(agents) == 1 {
		return "agent " + agents[0] + " holds"
	}
	return fmt.Sprintf("%d agents (%s) hold", len(agents), Some(agents))
}

// Some are the first few of many names.
func Some(all []string) string {
	const most = 5
	if len(all) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(all[:most], ", "), len(all)-most)
	}
	return strings.Join(all, ", ")
}
