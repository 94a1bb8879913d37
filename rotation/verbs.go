package rotation

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/signet-ca/signet/ca"
)

// What people ask for. Each verb returns the authorities as they would be, or one sentence that says why not; nothing is
// changed in place. What follows is Next's business.

// ErrNotNow marks a refusal that a person may override by force.
var ErrNotNow = errors.New("not now")

// NotNow is such a refusal: nothing may begin to be signed under Root before Waits are over. It is an ErrNotNow.
type NotNow struct {
	Root  string
	Waits []Wait
}

func (n *NotNow) Error() string        { return n.Waits[0].For + ": " + ErrNotNow.Error() }
func (n *NotNow) Is(target error) bool { return target == ErrNotNow }

// find returns the index of an authority.
func (w World) find(id string) (int, error) {
	i := slices.IndexFunc(w.Authorities, func(a Authority) bool { return a.ID == id })
	if i < 0 {
		return 0, fmt.Errorf("no CA %q: see signet ca list", id)
	}
	return i, nil
}

// AddRoot begins to trust a root, which is published next. One that is trusted already stays, also when it was about to
// leave.
func AddRoot(p Policy, w World, root Authority, now time.Time) ([]Authority, error) {
	all := slices.Clone(w.Authorities)
	if (decision{Policy: p, World: w, now: now}).tooShort(root) {
		return nil, fmt.Errorf("root %s ends at %s: a leaf may live %s, and nothing may be signed under a root that ends before its leaves", root.ID, stamp(root.NotAfter), p.LongestLeaf)
	}
	root.Kind, root.State, root.Since = ca.KindRoot, ca.Prepared, now
	// What a cluster begins under is not checked against its validators and peers: there are none yet that know of it.
	if d := (decision{Policy: p, World: w, now: now}); d.first() && slices.ContainsFunc(all, func(r Authority) bool { return r.InBundle() && r.ID != root.ID }) {
		return nil, fmt.Errorf("root %s can't be added before the cluster has begun to sign under the root that it has: see signet rotation status", root.ID)
	}
	i, err := w.find(root.ID)
	switch {
	case err != nil:
	case !all[i].Tainted.IsZero():
		return nil, fmt.Errorf("root %s is tainted since %s: make a new one", root.ID, stamp(all[i].Tainted))
	case all[i].State != ca.Removed && all[i].Leaving.IsZero():
		return all, nil
	}
	if err := w.LostKey(root); err != nil {
		return nil, err
	}
	// Peers may know of a taint where we don't know the root.
	if since := w.exposed(root.ID, now); !since.IsZero() {
		return nil, fmt.Errorf("root %s must go: its key or a key below it is tainted since %s; make a new one", root.ID, stamp(since))
	}
	if err != nil {
		return append(all, root), nil
	}
	if all[i].State == ca.Removed {
		all[i].State, all[i].Since = ca.Prepared, now
	}
	keep(&all[i], now)
	return all, nil
}

// leave begins the removal of a root.
func leave(r *Authority, now time.Time) { r.Leaving, r.Aborted = now, time.Time{} }

// keep ends the removal of a root. Whether anything may be signed under it again is Next's to find out.
func keep(r *Authority, now time.Time) {
	r.Leaving, r.Aborted = time.Time{}, time.Time{}
	if r.State == ca.Retired {
		r.State, r.Since = ca.Published, now
	}
}

// MayBring refuses to bring in a root to replace the one of the active issuer while another is to do so already: what it
// leaves behind would be trusted for good, and nobody would know of it.
func MayBring(w World, id string, now time.Time) error {
	if r, known := w.authority(id); known && r.State != ca.Removed && r.Leaving.IsZero() {
		return nil
	}
	signing, _ := w.active()
	above, _ := w.authority(signing.Root)
	if above.Leaving.IsZero() {
		return nil
	}
	for _, r := range w.Authorities {
		if r.Kind != ca.KindRoot || r.ID == above.ID || r.State == ca.Removed || !r.Leaving.IsZero() || !w.exposed(r.ID, now).IsZero() {
			continue
		}
		if !w.exposed(above.ID, now).IsZero() {
			return fmt.Errorf("%s is to replace %s already, which must go: finish that, or add this one (signet trust add) and remove %s (signet trust remove) first", r.ID, above.ID, r.ID)
		}
		return fmt.Errorf("%s is to replace %s already: finish that, or turn it back first with signet rotation abort %s", r.ID, above.ID, r.ID)
	}
	return nil
}

// StartRoot replaces the root of the active issuer by another one, which must have been added. Other roots under which a
// key is tainted go with it.
func StartRoot(w World, id string, now time.Time) ([]Authority, error) {
	i, err := w.find(id)
	if err != nil {
		return nil, err
	}
	next := w.Authorities[i]
	signing, ok := w.active()
	switch {
	case next.Kind != ca.KindRoot:
		return nil, fmt.Errorf("%s is not a root", id)
	case !ok:
		return nil, errors.New("no issuer is active: there is nothing to replace")
	case signing.Root == id:
		return nil, fmt.Errorf("%s is the root of the active issuer already", id)
	case !next.Tainted.IsZero():
		return nil, fmt.Errorf("%s is tainted since %s: make a new root", id, stamp(next.Tainted))
	case !next.Leaving.IsZero() || next.State == ca.Removed || next.State == ca.Retired:
		return nil, fmt.Errorf("%s is being removed: add a new root", id)
	case !w.exposed(id, now).IsZero():
		return nil, fmt.Errorf("the key of %s, or one below it, is tainted since %s: make a new root with a new key", id, stamp(w.exposed(id, now)))
	}
	all := slices.Clone(w.Authorities)
	for j := range all {
		r := &all[j]
		if r.InBundle() && r.ID != id && r.Leaving.IsZero() && (r.ID == signing.Root || !w.exposed(r.ID, now).IsZero()) {
			leave(r, now)
		}
	}
	all[i].Aborted = time.Time{}
	return all, nil
}

// Want asks for the switch to the next intermediate as soon as it may be. It reports false when there is none and one has
// to be made, with Wanted set.
func Want(p Policy, w World, now time.Time) (_ []Authority, found bool) {
	d := decision{Policy: p, World: w, now: now}
	best := -1
	for i, a := range w.Authorities {
		above, _ := d.authority(a.Root)
		if !waiting(a) || a.signed() && (d.tooShort(a) || a.NotBefore.After(now.Add(p.Skew)) || above.State == ca.Retired) {
			continue
		}
		if best < 0 || d.before(a, w.Authorities[best]) {
			best = i
		}
	}
	if best < 0 {
		return w.Authorities, false
	}
	all := slices.Clone(w.Authorities)
	all[best].Wanted = true
	return all, true
}

// Signed takes in that an intermediate has its certificate, under the root. The same once more changes nothing.
func Signed(p Policy, w World, id, root string, notBefore, notAfter, now time.Time) ([]Authority, error) {
	i, err := w.find(id)
	if err != nil {
		return nil, err
	}
	x := w.Authorities[i]
	above, ok := w.authority(root)
	signing, _ := w.current()
	switch {
	case x.Kind != ca.KindIntermediate:
		return nil, fmt.Errorf("%s is not an intermediate", id)
	case x.signed() && x.Root == root && x.NotBefore.Equal(notBefore) && x.NotAfter.Equal(notAfter):
		return slices.Clone(w.Authorities), nil
	case x.signed():
		return nil, fmt.Errorf("%s has a certificate already: start a rotation for another one", id)
	case x.State != ca.Prepared:
		return nil, fmt.Errorf("%s is %s: its request is not waited for any more", id, x.State)
	case !x.Tainted.IsZero():
		return nil, fmt.Errorf("%s is tainted since %s: start a rotation for another one", id, stamp(x.Tainted))
	case !ok || above.State == ca.Removed:
		return nil, fmt.Errorf("the chain of %s leads to root %s, which is not trusted here: add it first with signet trust add", id, root)
	// Until another root may be signed under, the one that leaves has to bear the cluster.
	case above.State == ca.Retired || !above.Leaving.IsZero() && (signing.Root != root || signing.State == ca.Active && (decision{Policy: p, World: w, now: now}).replaced(root)):
		return nil, fmt.Errorf("the chain of %s leads to root %s, which is being removed: have it signed by the root that replaces it", id, root)
	case !above.Tainted.IsZero():
		mend := "have it signed under a new root (signet root init, then signet rotation start root)"
		if _, other := w.Instead(); other != "" {
			mend = "have it signed under " + other
		}
		return nil, fmt.Errorf("the chain of %s leads to root %s, which is tainted: %s", id, root, mend)
	case w.bridges(p, id, root, now):
		return nil, fmt.Errorf("not all validators trust %s yet, and %s ends at %s: have %s signed under %s, to bridge the time", root, signing.ID, stamp(signing.NotAfter), id, signing.Root)
	case (decision{Policy: p, World: w, now: now}).tooShort(Authority{NotAfter: notAfter}):
		return nil, fmt.Errorf("%s ends at %s: it would live shorter than the longest leaf, %s; have it signed for longer", id, stamp(notAfter), p.LongestLeaf)
	}
	all := slices.Clone(w.Authorities)
	all[i].Root, all[i].NotBefore, all[i].NotAfter = root, notBefore, notAfter
	return all, nil
}

// Exposed takes in the certificate of an intermediate whose key is lost, which was unsigned as far as was known here, and is given up
// or about to be. It never signs; but what is forged under it is accepted as long as the root is believed, so that is tainted like any other.
func Exposed(w World, id, root string, notBefore, notAfter, now time.Time) ([]Authority, error) {
	i, err := w.find(id)
	if err != nil {
		return nil, err
	}
	x := w.Authorities[i]
	_, known := w.authority(root)
	switch {
	case x.Kind != ca.KindIntermediate || x.Tainted.IsZero() || x.signed():
		return nil, fmt.Errorf("the key of %s was not lost before its certificate was known", id)
	case !known:
		return nil, fmt.Errorf("the chain of %s leads to root %s, which was never trusted here: leave that chain out", id, root)
	}
	all := slices.Clone(w.Authorities)
	all[i].Root, all[i].NotBefore, all[i].NotAfter = root, notBefore, notAfter
	return Taint(World{Authorities: all, Own: w.Own, Peers: w.Peers}, id, now)
}

// bridges: the last request is kept for the root that can be signed under, when another certificate waits already for one
// that can't, see late.
func (w World) bridges(p Policy, id, root string, now time.Time) bool {
	d := decision{Policy: p, World: w, now: now}
	if signing, _ := d.current(); signing.Root == root || !d.late(root) {
		return false
	}
	held := false
	for _, a := range d.Authorities {
		if waiting(a) && !a.signed() && a.ID != id {
			return false
		}
		held = held || waiting(a) && a.Root == root
	}
	return held
}

// replaced reports whether another root is ready to be signed under, in time for the issuer's successor.
func (d decision) replaced(root string) bool {
	return slices.ContainsFunc(d.Authorities, func(a Authority) bool {
		return a.ID != root && a.Kind == ca.KindRoot && a.State == ca.Active && a.Leaving.IsZero() && !d.late(a.ID)
	})
}

// onlyRoot refuses that the last root goes.
func (w World) onlyRoot(id string) error {
	if slices.ContainsFunc(w.Authorities, func(a Authority) bool {
		return a.ID != id && a.Kind == ca.KindRoot && a.State != ca.Removed && a.Leaving.IsZero()
	}) {
		return nil
	}
	return fmt.Errorf("%s is the only root that stays: add another one first", id)
}

// RemoveRoot begins to remove a root: it is retired when nothing signs under it, and removed when nothing depends on it.
func RemoveRoot(w World, id string, now time.Time) ([]Authority, error) {
	i, err := w.find(id)
	if err != nil {
		return nil, err
	}
	if w.Authorities[i].Kind != ca.KindRoot {
		return nil, fmt.Errorf("%s is not a root", id)
	}
	if err := w.onlyRoot(id); err != nil {
		return nil, err
	}
	all := slices.Clone(w.Authorities)
	if all[i].Leaving.IsZero() && all[i].State != ca.Removed {
		leave(&all[i], now)
	}
	return all, nil
}

// Taint takes a CA's key for lost, and with it every CA that has the same one: nothing is signed with it as soon as another
// issuer can, and what was signed is replaced. Where another root stands ready, the roots above begin to leave; else status
// says that one is needed.
func Taint(w World, id string, now time.Time) ([]Authority, error) {
	i, err := w.find(id)
	if err != nil {
		return nil, err
	}
	all := slices.Clone(w.Authorities)
	above := map[string]bool{}
	for j := range all {
		a := &all[j]
		if j != i && (a.KeyFingerprint == "" || a.KeyFingerprint != all[i].KeyFingerprint) {
			continue
		}
		if a.Tainted.IsZero() {
			a.Tainted = now
		}
		above[a.ID], above[a.Root] = true, true
	}
	tainted := World{Authorities: all, Own: w.Own, Peers: w.Peers}
	if slices.ContainsFunc(all, func(a Authority) bool {
		return !above[a.ID] && a.Kind == ca.KindRoot && a.State == ca.Active && a.Leaving.IsZero() && tainted.exposed(a.ID, now).IsZero()
	}) {
		for j := range all {
			if r := &all[j]; above[r.ID] && r.Kind == ca.KindRoot && r.State != ca.Removed && r.Leaving.IsZero() {
				leave(r, now)
			}
		}
	}
	return all, nil
}

// Lost takes in that the key of an intermediate is gone for good, and nobody else has it either: it lived in memory. What
// it has signed stays good.
func Lost(p Policy, w World, id string, now time.Time) ([]Authority, error) {
	i, err := w.find(id)
	if err != nil {
		return nil, err
	}
	all := slices.Clone(w.Authorities)
	switch a := &all[i]; {
	case a.Kind != ca.KindIntermediate:
		return nil, fmt.Errorf("%s is not an intermediate", id)
	case a.State == ca.Active:
		retire(p, all, i, now)
	case a.State == ca.Prepared || a.State == ca.Published:
		a.State, a.Since, a.Wanted = ca.Removed, now, false
	}
	return all, nil
}

// Under says under which root an upstream that is at hand is to sign a request now: the one that is signed under already,
// while it stays, else the one that stays and ends last. One that not everybody trusts yet is left for a request that has
// time. It is "" while there is none, and where a cluster that has never signed has several.
func Under(p Policy, w World, id string, now time.Time) string {
	d := decision{Policy: p, World: w, now: now}
	good := func(r Authority) bool {
		return r.InBundle() && r.State != ca.Retired && r.Leaving.IsZero() && w.exposed(r.ID, now).IsZero() && !d.tooShort(r)
	}
	signing, signs := w.current()
	if r, ok := d.authority(signing.Root); signs && ok && good(r) {
		return r.ID
	}
	var best Authority
	for _, r := range w.Authorities {
		// Which of several roots the peers sign under is not known to a cluster that begins.
		if d.first() && best.ID != "" && r.InBundle() {
			return ""
		}
		if good(r) && (best.ID == "" || r.NotAfter.After(best.NotAfter)) {
			best = r
		}
	}
	// Until the other root may be signed under, the one that leaves has to bear the cluster.
	above, _ := d.authority(signing.Root)
	if !signs || !above.InBundle() || above.State == ca.Retired || !above.Tainted.IsZero() || d.tooShort(above) {
		return best.ID
	}
	lost := signing.State != ca.Active
	if best.ID == "" || lost && len(d.mayBegin(best.ID)) > 0 || !lost && w.bridges(p, id, best.ID, now) {
		return above.ID
	}
	return best.ID
}

// Abort turns a rotation back. A CA that was never used is dropped. An issuer that has taken over gives back to the one
// before it. A root that was to replace another leaves instead of it. What can't be turned back says so; ErrNotNow can be
// forced.
func Abort(p Policy, w World, id string, force bool, now time.Time) ([]Authority, error) {
	i, err := w.find(id)
	if err != nil {
		return nil, err
	}
	d := decision{Policy: p, World: World{Authorities: slices.Clone(w.Authorities), Own: w.Own, Peers: w.Peers}, now: now}
	if a := d.Authorities[i]; a.Kind == ca.KindRoot {
		err = d.abortRoot(i, force)
	} else {
		err = d.abortIntermediate(i, force)
	}
	if err != nil {
		return nil, err
	}
	return d.Authorities, nil
}

func (d decision) abortIntermediate(i int, force bool) error {
	a := &d.Authorities[i]
	switch a.State {
	case ca.Prepared, ca.Published:
		a.State, a.Since, a.Wanted = ca.Removed, d.now, false
		return nil
	case ca.Retired, ca.Removed:
		return fmt.Errorf("%s is %s: there is nothing to abort", a.ID, a.State)
	}
	return d.giveBack(i, "", force)
}

// giveBack lets the issuer before the active one take over again; if root is given, one under that root.
func (d decision) giveBack(i int, root string, force bool) error {
	a := &d.Authorities[i]
	before := -1
	for j, b := range d.Authorities {
		if b.Kind != ca.KindIntermediate || b.State != ca.Retired || !b.Tainted.IsZero() || d.tooShort(b) || root != "" && b.Root != root {
			continue
		}
		if above, _ := d.authority(b.Root); above.InBundle() && d.exposed(b.Root, d.now).IsZero() && (before < 0 || b.Since.After(d.Authorities[before].Since)) {
			before = j
		}
	}
	if before < 0 {
		return fmt.Errorf("%s signs, and no earlier issuer could take over again: start a rotation to a new one", a.ID)
	}
	b := &d.Authorities[before]
	waits := d.mayBegin(b.Root)
	// What can't be overridden is said first.
	if i := slices.IndexFunc(waits, func(w Wait) bool { return !w.Code.Forcible() }); i >= 0 {
		return fmt.Errorf("%s can't take over again from %s: %s", b.ID, a.ID, waits[i].For)
	}
	if len(waits) > 0 && !force {
		return fmt.Errorf("%s can't take over again from %s: %w", b.ID, a.ID, &NotNow{b.Root, waits})
	}
	retire(d.Policy, d.Authorities, i, d.now)
	b.State, b.Since = ca.Active, d.now
	return nil
}

func (d decision) abortRoot(i int, force bool) error {
	a := &d.Authorities[i]
	switch {
	case a.State == ca.Removed:
		return fmt.Errorf("%s is removed: there is nothing to abort", a.ID)
	case !a.Aborted.IsZero() && !d.replaces(*a):
		return nil
	case !a.Leaving.IsZero():
		// Its removal is what is aborted.
		if !d.exposed(a.ID, d.now).IsZero() {
			return fmt.Errorf("%s must go: a key at or below it is tainted", a.ID)
		}
		keep(a, d.now)
		a.Aborted = d.now
		return nil
	}
	signing, signs := d.active()
	if old := d.leavingFor(signing); old >= 0 {
		b := &d.Authorities[old]
		if !d.exposed(b.ID, d.now).IsZero() {
			return fmt.Errorf("%s can't stay in the place of %s: a key at or below it is tainted", b.ID, a.ID)
		}
		keep(b, d.now)
		if signs && signing.Root == a.ID {
			j, _ := d.find(signing.ID)
			if err := d.giveBack(j, b.ID, force); err != nil {
				return err
			}
			b.State = ca.Active
		}
	} else if signs && signing.Root == a.ID {
		return fmt.Errorf("%s is what everything stands under, and no root is leaving for it: to go back to one that is believed, or on to a new one, start a rotation to that", a.ID)
	}
	if err := d.onlyRoot(a.ID); err != nil {
		return err
	}
	a.Leaving, a.Aborted = d.now, d.now
	return nil
}

// replaces reports whether another root has begun to leave since an abort has kept this one, which replaces it now: to turn that
// back is another decision.
func (d decision) replaces(a Authority) bool {
	return a.Leaving.IsZero() && slices.ContainsFunc(d.Authorities, func(r Authority) bool {
		return r.Kind == ca.KindRoot && r.ID != a.ID && r.State != ca.Removed && r.Leaving.After(a.Aborted)
	})
}

// leavingFor finds the root that was to be replaced: the one that is still signed under, else the last one that began to
// leave.
func (d decision) leavingFor(signing Authority) int {
	old := -1
	for j, b := range d.Authorities {
		if !b.InBundle() || b.Leaving.IsZero() {
			continue
		}
		if b.ID == signing.Root {
			return j
		}
		if old < 0 || b.Leaving.After(d.Authorities[old].Leaving) {
			old = j
		}
	}
	return old
}
