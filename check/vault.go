package check

import (
	"fmt"
	"strings"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/rotation"
)

// Vault is what is known of the Vault behind a server, as its client knows it. None of it takes a call.
type Vault struct {
	// Address is for people, as are the file of the CAs that its certificate may lead to and the name in it, "" = none is given.
	Address, CAFile, ServerName string
	// Away: it can't be used, since Since, and Why says it in a sentence. Refused: it is there, and our login is not accepted, which
	// Mend is for; if not Away, the token of the login before is still good, until Ends (zero: without end) unless it is renewed.
	Away, Refused bool
	Since, Ends   time.Time
	Why, Mend     string
	// Asked is when Vault last said what the token may do; zero = never, and Unasked says why not.
	Asked   time.Time
	Unasked string
	// Signing, Certifying and Sharing are what is wrong with the engine that has keys, with the one that signs intermediates, and
	// with the one in which clusters share: each may fail while the others work.
	Signing, Certifying, Sharing Trouble
	Missing                      []Lack
	// Token is how the login ends, if it ends for good.
	Token Token
}

// Trouble is what does not work, since when; none with a zero time. Why says it in a sentence.
type Trouble struct {
	Since time.Time
	Why   string
}

// of adds what all of Vault suffers from: what began first is told of.
func (t Trouble) of(v Vault) Trouble {
	if v.Away && (t.Since.IsZero() || v.Since.Before(t.Since)) {
		return Trouble{v.Since, v.Why}
	}
	return t
}

// Lack is something that will be asked of Vault and that the token may not do.
type Lack struct {
	Path         string
	Capabilities []string
	// Why says what it is for.
	Why string
}

// Token is a token that somebody has put into a file, and that ends without a successor unless somebody does so again.
type Token struct {
	File string
	// Begins and Ends bound what is left of it; a zero end is no such token.
	Begins, Ends time.Time
}

// Duties are what a server has its Vault for, and until when it can do without.
type Duties struct {
	// Leaves and Control: the keys that sign certificates of workloads, and of Signet's own parts, are in Vault.
	Leaves, Control bool
	// LeafSpare and ControlSpare are how long the first of these certificates lives on when none can be renewed.
	LeafSpare, ControlSpare time.Duration
	// None: there are none of these certificates, since no agent has ever enrolled.
	None bool
	// Upstream: Vault signs the intermediates. The next signature is due at Due; if it does not come, nothing can be issued from
	// Until on (zero = now).
	Upstream   bool
	Due, Until time.Time
	// Volatile: the keys of the intermediates end with the process.
	Volatile bool
	// Shared: roots and reports are exchanged through Vault.
	Shared bool
}

const (
	mendPolicy = "signet config vault-policy --config FILE"
	aboutVault = "vault"
)

// Findings says which abilities are impaired, and until when that does no harm.
func (v Vault) Findings(d Duties, now time.Time) (found Findings) {
	found = append(found, v.away(d, now)...)
	if !v.Away && v.Refused {
		ends := "is revoked"
		if !v.Ends.IsZero() {
			ends = "ends, at " + stamp(v.Ends) + " unless it is renewed"
		}
		found.add(CodeVault, Warning, aboutVault, fmt.Sprintf("a new login is refused, so all that needs Vault stops when the present token %s (%s)", ends, v.Why), v.Mend)
	}
	for _, l := range v.Missing {
		found.add(CodePolicy, Error, l.Path, fmt.Sprintf("the token of Vault lacks %s on %s, which is needed to %s", strings.Join(l.Capabilities, ", "), l.Path, l.Why), mendPolicy)
	}
	if v.Unasked != "" && !v.Away {
		found.add(CodePolicy, Unknown, aboutVault, fmt.Sprintf("what the token of Vault may do could not be asked: %s", v.Unasked), mendPolicy)
	}
	found = append(found, v.token(now)...)
	if len(found) == 0 {
		message := "it answers"
		if !v.Asked.IsZero() {
			message += ", and its token may do all that will be asked"
		}
		found.add(CodeVault, OK, aboutVault, message, "")
	}
	return found
}

// away is one finding for each ability that is impaired.
func (v Vault) away(d Duties, now time.Time) (found Findings) {
	mend := v.mend()
	for _, a := range d.impaired(v, now) {
		found = append(found, Finding{
			Code: CodeVault, Level: a.level, About: aboutVault + "-" + a.engine, Stops: a.stops, Message: a.what + " (" + a.why + ")", Mend: mend,
		})
	}
	return found
}

func (v Vault) mend() string {
	if v.Away && v.Refused {
		return v.Mend
	}
	reach := "VAULT_ADDR=" + v.Address
	if v.CAFile != "" {
		reach += " VAULT_CACERT=" + v.CAFile
	}
	if v.ServerName != "" {
		reach += " VAULT_TLS_SERVER_NAME=" + v.ServerName
	}
	return reach + " vault status"
}

// Halt is what a Vault that is away, or does not sign, is for an intermediate whose key is in it; nil if it does.
func (v Vault) Halt(id string) *Halt {
	t := v.Signing.of(v)
	if t.Since.IsZero() {
		return nil
	}
	return &Halt{Since: t.Since, Why: "the key of " + id + " can't be used (" + t.Why + ")", Mend: v.mend()}
}

// ability is one that a server has through an engine of Vault.
type ability struct {
	engine, what string
	level        Level
	stops        []string
	why          string
}

func (d Duties) impaired(v Vault, now time.Time) (all []ability) {
	signing, certifying, sharing := v.Signing.of(v), v.Certifying.of(v), v.Sharing.of(v)
	if d.Leaves && !signing.Since.IsZero() {
		all = append(all, ability{
			"transit", "nothing can be issued: " + ends("certificates of workloads", d.None, signing.Since.Add(d.LeafSpare), now), Error, []string{Issuing}, signing.Why,
		})
	}
	if d.Control && !signing.Since.IsZero() {
		all = append(all, ability{
			"control", "no agent can enrol, or renew its own certificate: " + ends("certificates of agents", d.None, signing.Since.Add(d.ControlSpare), now), Error, []string{Enrolling}, signing.Why,
		})
	}
	if d.Upstream && !certifying.Since.IsZero() {
		all = append(all, ability{"pki", "no intermediate can be signed: " + d.unsigned(now), d.unsignedLevel(now), []string{Rotating}, certifying.Why})
	}
	if d.Shared && !sharing.Since.IsZero() {
		all = append(all, ability{"kv", "roots and reports are not exchanged with other clusters: a rotation of the root waits", Warning, nil, sharing.Why})
	}
	return all
}

// ends says when certificates that nobody renews begin to.
func ends(what string, none bool, first, now time.Time) string {
	switch {
	case none:
		return "there are no " + what + " yet"
	case now.Before(first):
		return "the first " + what + " end at " + stamp(first)
	}
	return what + " are ending"
}

// unsigned says until when no signature is needed.
func (d Duties) unsigned(now time.Time) string {
	if d.Until.IsZero() {
		return "there is none that could issue"
	}
	text := fmt.Sprintf("nothing can be issued from %s on, in %s", stamp(d.Until), short(d.Until.Sub(now)))
	if now.Before(d.Due) {
		text = fmt.Sprintf("the next is due at %s, and %s", stamp(d.Due), text)
	}
	if d.Volatile {
		text += ", nor after a restart of this server"
	}
	return text
}

// unsignedLevel goes by the share of the time between due and too late.
func (d Duties) unsignedLevel(now time.Time) Level {
	if d.Until.IsZero() || float64(d.Until.Sub(now)) < lifeWarning*float64(d.Until.Sub(d.Due)) {
		return Error
	}
	return Warning
}

// token says that somebody has to bring a new one.
func (v Vault) token(now time.Time) (found Findings) {
	t := v.Token
	if t.Ends.IsZero() {
		return nil
	}
	level := OK
	switch left := float64(t.Ends.Sub(now)) / float64(t.Ends.Sub(t.Begins)); {
	case left < lifeError:
		level = Error
	case left < lifeWarning:
		level = Warning
	default:
		return nil
	}
	ends := fmt.Sprintf("ends for good at %s, in %s", stamp(t.Ends), short(t.Ends.Sub(now)))
	if !now.Before(t.Ends) {
		ends = "has ended at " + stamp(t.Ends)
	}
	found.add(CodeToken, level, t.File, "the token of Vault "+ends+": put a new one into the file", "vault token create")
	return found
}

// Outlook is whether an upstream authority would sign the next intermediate, as far as that is seen without a signature.
type Outlook struct {
	// Looked is when that was looked at; zero = it was not, or can't be.
	Looked time.Time
	// Unfit is why nothing would be signed.
	Unfit Trouble
	// Signer says who would sign, and Ends when the first certificate between that one and the root does; zero = there is none.
	Signer string
	Ends   time.Time
	// Life is that of the intermediates that are asked for.
	Life time.Duration
}

// Findings say no more than was looked at.
func (o Outlook) Findings(d Duties, now time.Time) (found Findings) {
	next := later(now, d.Due)
	soon := !o.Ends.IsZero() && o.Ends.Before(next.Add(o.Life))
	level, message := OK, "no request of this cluster waits for the upstream authority in vain; whether it would sign the next one was not looked at"
	var stops []string
	switch {
	case !o.Unfit.Since.IsZero():
		level, stops = d.unsignedLevel(now), []string{Rotating}
		message = fmt.Sprintf("no intermediate would be signed: %s: %s", d.unsigned(now), o.Unfit.Why) // last, for it may be long and is cut then
	case soon && o.Ends.Before(next.Add(min(o.Life, ca.MinIntermediateLife))):
		level, message = d.unsignedLevel(now), fmt.Sprintf("no intermediate will be signed any more when the next is due: %s: %s, but a certificate on the way there ends at %s", d.unsigned(now), o.Signer, stamp(o.Ends))
	case soon:
		level, message = Warning, fmt.Sprintf("no intermediate can live %s any more: %s, but a certificate on the way there ends at %s, in %s", short(o.Life), o.Signer, stamp(o.Ends), short(o.Ends.Sub(now)))
	case !o.Looked.IsZero():
		message = fmt.Sprintf("%s, as seen at %s", o.Signer, stamp(o.Looked))
	}
	found.add(CodeUpstream, level, "upstream", message, "")
	found[0].Stops = stops
	return found
}

// NextDue is when the next signature of an intermediate is due: the newest that is signed has come to the fraction of its life
// at which its successor is made. Zero = at once, since none is signed.
func (r Rotation) NextDue() time.Time {
	var newest rotation.Authority
	for _, a := range r.Authorities {
		lasts := a.Kind == ca.KindIntermediate && signed(a) && a.Tainted.IsZero() && a.State != ca.Retired && a.State != ca.Removed
		if lasts && a.NotAfter.After(newest.NotAfter) {
			newest = a
		}
	}
	if newest.ID == "" {
		return time.Time{}
	}
	return at(newest, r.PrepareAt)
}
