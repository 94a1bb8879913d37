package check

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/rotation"
)

// gone is a Vault that is away since ten minutes.
func gone() Vault {
	return Vault{Address: "https://v:8200", Away: true, Since: now.Add(-10 * time.Minute), Why: "Vault at https://v:8200 is away since 2026-05-04T02:52:01Z: it is sealed"}
}

func TestWhatAVaultThatIsAwayImpairsIsSaidWithItsTime(t *testing.T) {
	day := 24 * time.Hour
	for what, try := range map[string]struct {
		d     Duties
		level Level
		ready bool
		words []string
	}{
		"keys of leaves are in it": {
			Duties{Leaves: true, LeafSpare: time.Hour},
			Error, false,
			[]string{"vault-transit", "away since 2026-05-04T02:52:01Z", "nothing can be issued", "end at 2026-05-04T03:52:01Z (Vault at https://v:8200 is away", "it is sealed)", "VAULT_ADDR=https://v:8200 vault status"},
		},
		"the key of the control CA is": {
			Duties{Control: true, ControlSpare: 2 * time.Hour},
			Error, true,
			[]string{"vault-control", "no agent can enrol", "end at 2026-05-04T04:52:01Z"},
		},
		"keys of leaves are in it, for long": {
			Duties{Leaves: true, LeafSpare: 10 * time.Minute}, Error, false, []string{"nothing can be issued: certificates of workloads are ending (Vault"},
		},
		"keys of leaves that are none": {
			Duties{Leaves: true, LeafSpare: time.Hour, None: true}, Error, false, []string{"nothing can be issued: there are no certificates of workloads yet (Vault"},
		},
		"the key of the control CA is, of no agent": {
			Duties{Control: true, ControlSpare: time.Hour, None: true}, Error, true, []string{"no agent can enrol", "there are no certificates of agents yet (Vault"},
		},
		"it signs, not soon": {
			Duties{Upstream: true, Due: now.Add(day), Until: now.Add(2 * day)},
			Warning, true,
			[]string{"vault-pki", "the next is due at 2026-05-05T03:02:01Z", "nothing can be issued from 2026-05-06T03:02:01Z on, in 48h"},
		},
		"a signature is due": {
			Duties{Upstream: true, Due: now.Add(-time.Hour), Until: now.Add(day)}, Warning, true, []string{"nothing can be issued from 2026-05-05T03:02:01Z on, in 24h"},
		},
		"a signature is overdue": {
			Duties{Upstream: true, Due: now.Add(-day), Until: now.Add(time.Hour)}, Error, true, []string{"in 1h"},
		},
		"keys that end with the process": {
			Duties{Upstream: true, Volatile: true, Due: now.Add(day), Until: now.Add(2 * day)}, Warning, true, []string{"nor after a restart of this server"},
		},
		"nobody can issue":       {Duties{Upstream: true}, Error, true, []string{"there is none that could issue"}},
		"clusters share through": {Duties{Shared: true}, Warning, true, []string{"vault-kv", "a rotation of the root waits"}},
	} {
		t.Run(what, func(t *testing.T) {
			found := gone().Findings(try.d, now)
			is(t, found, try.level, try.words...)
			if len(found) != 1 || found[0].Code != CodeVault || found.Ready() != try.ready {
				t.Errorf("ready %v: %+v", found.Ready(), found)
			}
		})
	}
	all := gone().Findings(Duties{Leaves: true, Control: true, Upstream: true, Shared: true}, now)
	about := map[string]bool{}
	for _, f := range all {
		about[f.About] = true
	}
	if len(all) != 4 || len(about) != 4 {
		t.Errorf("%+v", all)
	}
	shut := gone()
	shut.Refused, shut.Why, shut.Mend = true, "the login is refused", "vault list auth/approle/role"
	for _, f := range shut.Findings(Duties{Shared: true}, now) {
		if f.Mend != shut.Mend || f.Level != Warning {
			t.Errorf("what would vault status say: %+v", f)
		}
	}
	known := gone()
	known.CAFile, known.ServerName = "/etc/vault-ca.pem", "vault.test"
	is(t, known.Findings(Duties{Shared: true}, now), Warning, "VAULT_ADDR=https://v:8200 VAULT_CACERT=/etc/vault-ca.pem VAULT_TLS_SERVER_NAME=vault.test vault status")
	back := gone()
	back.Away = false
	is(t, back.Findings(Duties{Leaves: true}, now), OK, "it answers")
}

func TestALoginThatIsRefusedIsSaidWhileTheTokenLives(t *testing.T) {
	v := Vault{Address: "https://v:8200", Refused: true, Since: now, Ends: now.Add(time.Hour), Why: "the login is refused (400)", Mend: "vault list auth/approle/role", Asked: now}
	found := v.Findings(Duties{Leaves: true}, now)
	is(t, found, Warning, "a new login is refused", "ends, at 2026-05-04T04:02:01Z unless it is renewed", "the login is refused (400)", v.Mend)
	if len(found) != 1 || found[0].Code != CodeVault || !found.Ready() {
		t.Errorf("%+v", found)
	}
	v.Ends = time.Time{}
	is(t, v.Findings(Duties{}, now), Warning, "when the present token is revoked")
}

// TestWhatOneEngineDoesNotDoImpairsWhatItIsFor, and nothing else.
func TestWhatOneEngineDoesNotDoImpairsWhatItIsFor(t *testing.T) {
	all := Duties{Leaves: true, LeafSpare: time.Hour, Control: true, ControlSpare: 2 * time.Hour, Upstream: true, Shared: true}
	ill := Trouble{now.Add(-time.Minute), "it has answered no write: too many requests"}
	for what, try := range map[string]struct {
		v     Vault
		d     Duties
		ready bool
		about []string
	}{
		"keys":               {Vault{Signing: ill}, all, false, []string{"vault-transit", "vault-control"}},
		"keys that are none": {Vault{Signing: ill}, Duties{Upstream: true, Shared: true}, true, nil},
		"PKI":                {Vault{Certifying: ill}, all, true, []string{"vault-pki"}},
		"KV":                 {Vault{Sharing: ill}, all, true, []string{"vault-kv"}},
		"nothing":            {Vault{}, all, true, nil},
	} {
		found := try.v.Findings(try.d, now)
		var about []string
		for _, f := range found {
			if f.Level != OK {
				about = append(about, f.About)
				if f.Code != CodeVault || !strings.Contains(f.Message, "too many requests") {
					t.Errorf("%s: %+v", what, f)
				}
			}
		}
		if !slices.Equal(about, try.about) || found.Ready() != try.ready {
			t.Errorf("%s: ready %v, findings about %v, want %v", what, found.Ready(), about, try.about)
		}
		if halts := try.v.Halt("i-1") != nil; halts != strings.HasPrefix(what, "keys") {
			t.Errorf("%s: issuing halts: %v", what, halts)
		}
	}
	// What began first is told of.
	both := gone()
	both.Signing = Trouble{both.Since.Add(-time.Minute), "slow"}
	is(t, both.Findings(Duties{Leaves: true, LeafSpare: time.Hour}, now), Error, "end at 2026-05-04T03:51:01Z (slow)")
	both.Signing.Since = now
	is(t, both.Findings(Duties{Leaves: true, LeafSpare: time.Hour}, now), Error, "end at 2026-05-04T03:52:01Z (Vault at https://v:8200 is away")
}

func TestAMissingCapabilityIsSaidBeforeItIsNeeded(t *testing.T) {
	v := Vault{Asked: now, Missing: []Lack{{"pki/issuer/+/sign-intermediate", []string{"update"}, "sign the next intermediate"}}}
	found := v.Findings(Duties{Upstream: true}, now)
	is(t, found, Error, "lacks update on pki/issuer/+/sign-intermediate, which is needed to sign the next intermediate", "signet config vault-policy --config FILE")
	if len(found) != 1 || found[0].Code != CodePolicy || !found.Ready() {
		t.Errorf("%+v", found)
	}
	v.Missing = nil
	is(t, v.Findings(Duties{}, now), OK, "its token may do all that will be asked")

	v = Vault{Unasked: "permission denied"}
	is(t, v.Findings(Duties{}, now), Unknown, "permission denied", "vault-policy")
	v.Away, v.Since = true, now
	for _, f := range v.Findings(Duties{Shared: true}, now) {
		if f.Code == CodePolicy {
			t.Errorf("that Vault is away is said already: %+v", f)
		}
	}
}

func TestTheEndOfATokenIsCountedInFractionsOfItsLife(t *testing.T) {
	for left, want := range map[time.Duration]Level{50 * time.Hour: OK, 30 * time.Hour: Warning, 9 * time.Hour: Error, -time.Hour: Error} {
		v := Vault{Token: Token{"/run/token", now.Add(left - 100*time.Hour), now.Add(left)}}
		found := v.Findings(Duties{}, now)
		is(t, found, want)
		if want != OK {
			is(t, found, want, "/run/token", map[bool]string{true: "ends for good", false: "has ended"}[left > 0], "put a new one into the file")
		}
	}
}

func TestTheNextSignatureIsDueByTheNewestThatIsSigned(t *testing.T) {
	alone := cluster(0.1)
	active := alone.Authorities[len(alone.Authorities)-1]
	for what, try := range map[string]struct {
		r    Rotation
		want time.Time
	}{
		"alone":                     {alone, at(active, alone.PrepareAt)},
		"its successor is asked":    {cluster(0.1, request()), at(active, alone.PrepareAt)},
		"its successor is there":    {cluster(0.1, successor("root-1", 100*time.Hour, 2100*time.Hour)), now.Add(1100 * time.Hour)},
		"there is none":             {Rotation{}, time.Time{}},
		"one that is away for good": {Rotation{World: rotation.World{Authorities: []rotation.Authority{{ID: "i", Kind: ca.KindIntermediate, State: ca.Retired, NotAfter: now}}}}, time.Time{}},
	} {
		if got := try.r.NextDue(); !got.Equal(try.want) {
			t.Errorf("%s: %s, want %s", what, got, try.want)
		}
	}
}

// TestWhatWillNotBeSignedIsSaidByWhenItMatters: what is looked at is said, and no more.
func TestWhatWillNotBeSignedIsSaidByWhenItMatters(t *testing.T) {
	const day = 24 * time.Hour
	soon, late := Duties{Upstream: true, Due: now.Add(3 * day), Until: now.Add(6 * day)}, Duties{Upstream: true, Due: now.Add(-3 * day), Until: now.Add(day / 2)}
	volatile := soon
	volatile.Volatile = true
	gone := Outlook{Looked: now, Unfit: Trouble{now, "the issuer is gone"}, Life: 7 * day}
	good := Outlook{Looked: now, Signer: "issuer a leads to the root", Life: 7 * day}
	ends := func(left time.Duration) Outlook { o := good; o.Ends = now.Add(left); return o }
	for what, try := range map[string]struct {
		o     Outlook
		d     Duties
		level Level
		stops int
		words []string
	}{
		"nothing was looked at":    {Outlook{}, soon, OK, 0, []string{"waits for the upstream authority in vain", "was not looked at"}},
		"all is well":              {good, soon, OK, 0, []string{"issuer a leads to the root, as seen at 2026-05-04T03:02:01Z"}},
		"it is not due":            {gone, soon, Warning, 1, []string{"no intermediate would be signed: the next is due at 2026-05-07T03:02:01Z, and nothing can be issued from 2026-05-10T03:02:01Z on, in 144h", ": the issuer is gone"}},
		"it is overdue":            {gone, late, Error, 1, []string{"nothing can be issued from 2026-05-04T15:02:01Z on, in 12h: the issuer is gone"}},
		"a restart makes it felt":  {gone, volatile, Warning, 1, []string{"nor after a restart of this server: the issuer is gone"}},
		"nobody can issue":         {gone, Duties{Upstream: true}, Error, 1, []string{"there is none that could issue: the issuer is gone"}},
		"the next still lives":     {ends(10*day + time.Second), soon, OK, 0, []string{"as seen at"}},
		"the next is cut short":    {ends(9 * day), soon, Warning, 0, []string{"no intermediate can live 168h any more", "ends at 2026-05-13T03:02:01Z, in 216h"}},
		"the next is not signed":   {ends(3*day + time.Hour), soon, Warning, 0, []string{"when the next is due: the next is due at 2026-05-07T03:02:01Z", "ends at 2026-05-07T04:02:01Z"}},
		"and that matters at once": {ends(time.Hour), late, Error, 0, []string{"no intermediate will be signed any more"}},
	} {
		found := try.o.Findings(try.d, now)
		is(t, found, try.level, try.words...)
		if len(found) != 1 || found[0].Code != CodeUpstream || len(found[0].Stops) != try.stops || !found.Ready() {
			t.Errorf("%s: ready %v: %+v", what, found.Ready(), found)
		}
	}
}
