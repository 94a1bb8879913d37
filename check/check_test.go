package check

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
)

var now = time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)

// is checks the worst level and that each of the words is said or mends.
func is(t *testing.T, found Findings, want Level, words ...string) {
	t.Helper()
	if len(found) == 0 && want != OK {
		t.Fatalf("nothing was found, want %s", want)
	}
	if got := found.Worst(); got != want {
		t.Errorf("it is %s, want %s: %+v", got, want, found)
	}
	var text strings.Builder
	for _, f := range found {
		text.WriteString(f.About + " " + f.Message + " " + f.Mend + "\n")
		if f.Code == "" || f.Message == "" || strings.ContainsAny(f.Message, "\n") {
			t.Errorf("a finding needs a code and one sentence: %+v", f)
		}
	}
	for _, w := range words {
		if !strings.Contains(text.String(), w) {
			t.Errorf("it does not say %q:\n%s", w, text.String())
		}
	}
}

func TestWhatOthersMayReadIsFound(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	file, public := filepath.Join(dir, "keys", "k.pem"), filepath.Join(dir, "agent.sock")
	for _, err := range []error{
		os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, nil, 0o600), os.WriteFile(public, nil, 0o600), os.Chmod(public, 0o666),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	p := Private{Dir: dir, Except: []string{public}}
	is(t, Modes(p), OK, "their owner alone")
	for _, bad := range []struct {
		path string
		mode os.FileMode
		mend string
	}{{file, 0o640, "chmod 600 " + file}, {filepath.Dir(file), 0o755, "chmod 700 " + filepath.Dir(file)}, {dir, 0o711, "chmod 700 " + dir}} {
		info, err := os.Stat(bad.path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(bad.path, bad.mode); err != nil {
			t.Fatal(err)
		}
		is(t, Modes(p), Error, bad.mend)
		if err := os.Chmod(bad.path, info.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
	}
	p.Entered = true
	for mode, want := range map[os.FileMode]Level{0o711: OK, 0o755: OK, 0o777: Error} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		is(t, Modes(p), want)
	}
	is(t, Modes(Private{Dir: filepath.Join(dir, "none")}), Unknown)
}

func TestSwapIsFound(t *testing.T) {
	const head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
	is(t, Swap(head), OK)
	is(t, Swap(head+"/dev/sda2                               partition\t1\t0\t-2\n"), Warning, "/dev/sda2", "swapoff")
}

func TestRoomIsCountedInBytesAndInFiles(t *testing.T) {
	st := unix.Statfs_t{Blocks: 1000, Bavail: 500, Files: 1000, Ffree: 500}
	is(t, space("d", st), OK, "50 %")
	st.Bavail = 50
	is(t, space("d", st), Warning, "5.0 % of the bytes", "df -h d")
	st.Bavail, st.Ffree = 500, 1
	is(t, space("d", st), Error, "0.1 % of the files (inodes)", "df -i d")
	st.Files, st.Ffree = 0, 0
	is(t, space("d", st), OK)
	is(t, Space(filepath.Join(t.TempDir(), "none")), Unknown)
	is(t, Space(t.TempDir()), Space(t.TempDir()).Worst())
}

func TestASlowDiskIsFoundAndNothingIsLeftOnIt(t *testing.T) {
	for took, want := range map[time.Duration]Level{time.Millisecond: OK, 60 * time.Millisecond: Warning, time.Second: Error} {
		is(t, disk("d", took), want, "durable write")
	}
	dir := t.TempDir()
	if got := Disk(dir); got.Worst() == Unknown {
		t.Errorf("%+v", got)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("it left %v (%v)", left, err)
	}
	is(t, Disk(filepath.Join(dir, "none")), Unknown)
}

func certificate(t *testing.T, from, to time.Time) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: from, NotAfter: to}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func TestTheEndIsCountedInFractionsOfALife(t *testing.T) {
	for _, life := range []time.Duration{time.Hour, 3650 * 24 * time.Hour} {
		cert, _ := certificate(t, now, now.Add(life))
		for share, want := range map[float64]Level{0: OK, 0.6: OK, 0.7: Warning, 0.95: Error, 1.01: Error} {
			is(t, Expiry("root", cert, now.Add(time.Duration(share*float64(life))), "mend it"), want)
		}
		found := Expiry("root", cert, now.Add(-time.Minute), "")
		is(t, found, Error, "the clock is behind")
		if found[0].Code != CodeClock {
			t.Errorf("%+v", found)
		}
	}
}

func TestAKeyIsHeldAgainstItsCertificate(t *testing.T) {
	cert, key := certificate(t, now, now.Add(time.Hour))
	_, other := certificate(t, now, now.Add(time.Hour))
	is(t, Key("i", cert, func() (crypto.PublicKey, error) { return key.Public(), nil }, ""), OK)
	is(t, Key("i", cert, func() (crypto.PublicKey, error) { return other.Public(), nil }, ""), Error, "not the one")
	is(t, Key("i", cert, func() (crypto.PublicKey, error) { return nil, errors.New("wrong passphrase") }, ""), Unknown, "wrong passphrase")
}

// leaky is a key that can be taken out of where it is kept, or that says that it can't.
type leaky string

func (l leaky) Exposed() string { return string(l) }

// A promise that is broken, which stops nothing.
func TestAKeyThatCanHaveLeftIsFound(t *testing.T) {
	for _, good := range []any{nil, "a key that can't tell", leaky("")} {
		if found := Exposed("i-1", false, ca.Active, good); len(found) != 0 {
			t.Errorf("of %v it is said %v", good, found)
		}
	}
	for _, try := range []struct {
		control bool
		state   ca.State
		level   Level
		words   []string
	}{
		{false, ca.Active, Error, []string{"take it for lost", "the next rotation fails", "set keystore.intermediates to file", "then: signet rotation start --config FILE intermediate; then", "signet ca taint --config FILE --reason TEXT i-1"}},
		{false, ca.Published, Error, []string{"take it for lost"}},
		{false, ca.Retired, Warning, []string{"it signs no more", "signet ca taint --config FILE --reason TEXT i-1"}},
		{true, ca.Active, Error, []string{"take it for lost", "the control CA has no rotation", "made anew"}},
	} {
		found := Exposed("i-1", try.control, try.state, leaky("transit/keys/i is exportable"))
		is(t, found, try.level, append(try.words, "can be taken out of Vault: ", " (transit/keys/i is exportable)")...)
		if !found.Ready() || found[0].Code != CodeKey {
			t.Errorf("%+v", found)
		}
	}
}

func TestTheBudgetOfAnOutageIsSaid(t *testing.T) {
	is(t, Budget(24*time.Hour, 576*time.Minute), OK, "away 9h36m before", "of 24h dies")
	is(t, Budget(30*time.Minute, 12*time.Minute), Warning, "away 12m before", "leaf.ttl")
}

func TestASocketOnWhichNobodyAnswersIsFound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	is(t, Socket(path, "server", "start it"), Error, "no server answers", "start it")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	is(t, Socket(path, "server", "start it"), OK)
}

func TestAFolderThatIsNoLogCouldNotBeTold(t *testing.T) {
	is(t, Log(t.Context(), t.TempDir(), "", now), Unknown, "log verify")
}

func TestALogIsHeldAgainstItsLastEntry(t *testing.T) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "log")
	l, err := audit.Open(t.Context(), audit.Config{Dir: dir, Origin: "example.org/east/east-1", Signer: key})
	if err != nil {
		t.Fatal(err)
	}
	used := &auditv1.Entry{Time: now.UnixNano(), Event: &auditv1.Entry_JoinTokenUsed{JoinTokenUsed: &auditv1.JoinTokenUsed{Agent: "node-1"}}}
	_, err = l.Append(t.Context(), []*auditv1.Entry{used, used})
	if err := errors.Join(err, l.Close(t.Context())); err != nil {
		t.Fatal(err)
	}
	look := func(at time.Time) Findings { return Log(t.Context(), dir, l.VerifierKey(), at) }
	is(t, look(now), OK, "checkpoint of 2 entries", "of 2026-05-04T03:02:01Z")
	is(t, look(now.Add(-time.Hour)), Error, "it is 2026-05-04T02:02:01Z here: the clock went back", "timedatectl")
	// The last byte of the last entry, the hash of its sibling, and the signature.
	for path, at := range map[string]func(file []byte) int{
		"tile/entries/000.p/2": func(file []byte) int { return len(file) - 1 },
		"tile/0/000.p/2":       func([]byte) int { return 0 },
		"checkpoint":           func(file []byte) int { return len(file) - 10 },
	} {
		full := filepath.Join(dir, path)
		good, err := os.ReadFile(full)
		if err != nil {
			t.Fatal(err)
		}
		bad := bytes.Clone(good)
		bad[at(bad)] ^= 1
		if err := os.WriteFile(full, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		is(t, look(now), Error, "does not pass", "signet log verify --dir "+dir)
		if err := os.WriteFile(full, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	is(t, look(now), OK)
}

func TestTheUseOfAnIssuerEndsBeforeItsLife(t *testing.T) {
	const least = 10 * time.Minute
	for left, want := range map[time.Duration]struct {
		level Level
		words []string
	}{
		90 * time.Hour:   {OK, nil},
		30 * time.Hour:   {Warning, []string{"30 % of its life are left, until 2026-05-05T09:02:01Z, in 30h; it can sign until 2026-05-05T08:52:02Z"}},
		9 * time.Hour:    {Error, []string{"9 %", "it can sign until"}},
		5 * time.Minute:  {Error, []string{"it ends at 2026-05-04T03:07:01Z, too soon for a certificate that lives 10m: it was of use until 2026-05-04T02:57:02Z", "mend it"}},
		-5 * time.Minute: {Error, []string{"it expired at 2026-05-04T02:57:01Z", "mend it"}},
		101 * time.Hour:  {Error, []string{"it begins at"}},
	} {
		until := now.Add(left)
		found := IssuerLife("i-1", until.Add(-100*time.Hour), until, least, now, "mend it")
		is(t, found, want.level, want.words...)
		if len(found) != 1 {
			t.Errorf("%s before its end: %+v", left, found)
		}
	}
}

func TestTheWorstComesFirst(t *testing.T) {
	f := Findings{{Code: "b", Level: OK}, {Code: "c", Level: Warning}, {Code: "a", Level: OK}, {Code: "d", Level: Error}, {Code: "e", Level: Unknown}}
	f.Sort()
	var order string
	for _, x := range f {
		order += x.Code
	}
	if order != "dceab" {
		t.Errorf("the order is %s", order)
	}
}

func TestWhatAnAgentHasSeenOfTheLogIsLookedAt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "checkpoint")
	is(t, Witness(path, "key"), OK, "no checkpoint")
	if err := os.WriteFile(path, []byte("example.org/east/east-1\n1\nAAAA\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	is(t, Witness(path, "key"), Error, "does not pass")
	if err := os.WriteFile(path+".evidence", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	is(t, Witness(path, "key"), Error, "contradicted", "checkpoint.evidence")
	is(t, Seal("d", true), OK, "file mode alone")
}

// Several are signed in one ceremony, to take their turns months apart.
func TestASuccessorThatHasNotBegunStandsBy(t *testing.T) {
	from, until := now.Add(60*24*time.Hour), now.Add(150*24*time.Hour)
	is(t, Successor("i-2", from, until, time.Minute, now, "mend it"), OK, "i-2", "it stands by: its life begins at 2026-07-03T03:02:01Z")
	// From then on it is looked at as any other.
	is(t, Successor("i-2", from, until, time.Minute, until.Add(-time.Hour), "mend it"), Error, "0 %", "mend it")
	if f := IssuerLife("i-1", from, until, time.Minute, now, ""); f[0].Code != CodeClock || f[0].Level != Error {
		t.Errorf("one that signs before it begins: %+v", f)
	}
}
