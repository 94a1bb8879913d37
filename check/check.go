// Package check looks at an installation and says what is wrong with it, or will be: one engine for whoever asks. `signet
// check` looks from outside and needs nothing that runs; a process looks at itself with a Watch, and its readiness is what
// that finds. It changes nothing but probe files, which it removes.
//
// A Finding has a code that stands for ever, one sentence, and the command that mends it. What can't be looked at is a
// finding too (Unknown), never silence.
package check

import (
	"cmp"
	"fmt"
	"slices"
)

// Level is how bad it is.
type Level int

// The levels, from good to bad. Unknown could not be told, which says nothing about the rest.
const (
	OK Level = iota
	Unknown
	Warning
	Error
)

func (l Level) String() string {
	switch l {
	case OK:
		return "ok"
	case Unknown:
		return "unknown"
	case Warning:
		return "warning"
	}
	return "error"
}

// MarshalText writes the level's name.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads the level's name.
func (l *Level) UnmarshalText(text []byte) error {
	for *l = OK; *l <= Error; *l++ {
		if l.String() == string(text) {
			return nil
		}
	}
	*l = Unknown
	return fmt.Errorf("level %.16q is unknown", text)
}

// Codes of findings. A code is never given another meaning.
const (
	CodeModes     = "SGN1001" // files, folders and sockets that others may read or write
	CodeSwap      = "SGN1002" // memory that may be written to disk
	CodeSpace     = "SGN1003" // room on the disk
	CodeDisk      = "SGN1004" // time that the disk takes for a durable write
	CodeClock     = "SGN1005" // the clock, against what has happened
	CodeKey       = "SGN1006" // a key and the certificate it should belong to, and whether it can have left
	CodeExpiry    = "SGN1007" // life left of a CA or of an agent's own certificate
	CodeBudget    = "SGN1008" // how long the server may be away
	CodeSocket    = "SGN1009" // somebody answers
	CodeLog       = "SGN1010" // the audit log against itself
	CodeState     = "SGN1011" // the state database, or an agent's enrolment
	CodeInstalled = "SGN1012" // an intermediate is there and trusted
	CodeBundle    = "SGN1013" // an agent's trust bundle
	CodeServed    = "SGN1014" // certificates of an agent's workloads
	CodeServer    = "SGN1015" // an agent's way to its server
	CodeSeal      = "SGN1016" // what protects keys at rest
	CodeIssuing   = "SGN1017" // nothing can be issued, since when, or from when on
	CodeSuccessor = "SGN1018" // who takes over from the intermediate that signs
	CodeSignature = "SGN1019" // a request that the root's holder has to sign
	CodeRootEnd   = "SGN1020" // a root whose end cuts the life of intermediates short
	CodePeer      = "SGN1021" // another cluster's report that a step waits for
	CodeTaint     = "SGN1022" // a lost key whose forgeries are accepted
	CodeStep      = "SGN1023" // a step that a person has to take, or that fails when it comes by itself
	CodeShared    = "SGN1024" // what the clusters of a trust domain share
	CodeRestored  = "SGN1025" // a state database that is older than what was published
	CodeUpstream  = "SGN1029" // the upstream authority signs what it is asked, and would sign the next
	CodeVault     = "SGN1026" // Vault answers, or what stands still without it, and until when that does no harm
	CodePolicy    = "SGN1027" // what the token of Vault may do, against what will be asked
	CodeToken     = "SGN1028" // the end of a token of Vault that has no successor
	CodeRivals    = "SGN1030" // clusters that sign under different roots, none of which leaves
	CodeApart     = "SGN1031" // clusters that refuse each other's certificates, or will
)

// What can stand still. Without the first three a process is not ready.
const (
	Issuing   = "issuing"   // a server makes certificates
	Answering = "answering" // a server's doors are open and can prove who they are
	Serving   = "serving"   // an agent gives workloads what they need
	Enrolling = "enrolling" // nodes join
	Changing  = "changing"  // registrations, tokens and bans
	Rotating  = "rotating"  // intermediates follow one another
)

// Finding is one thing that was looked at.
type Finding struct {
	Code  string `json:"code"`
	Level Level  `json:"level"`
	// About names what was looked at: a path, an issuer.
	About string `json:"about"`
	// Message is one sentence.
	Message string `json:"message"`
	// Mend is the command that mends it; empty where all is well or no command can.
	Mend string `json:"mend,omitempty"`
	// Stops is what stands still now because of it; empty for what is only going to be bad.
	Stops []string `json:"stops,omitempty"`
}

// Blocks reports whether the process can't do what it is there for.
func (f Finding) Blocks() bool {
	return f.Level == Error && slices.ContainsFunc(f.Stops, func(s string) bool { return s == Issuing || s == Answering || s == Serving })
}

// Findings of one run.
type Findings []Finding

func (f *Findings) add(code string, l Level, about, message, mend string) {
	*f = append(*f, Finding{Code: code, Level: l, About: about, Message: message, Mend: mend})
}

// Worst is the worst level.
func (f Findings) Worst() Level {
	worst := OK
	for _, x := range f {
		worst = max(worst, x.Level)
	}
	return worst
}

// Ready reports whether none of them blocks.
func (f Findings) Ready() bool { return !slices.ContainsFunc(f, Finding.Blocks) }

// Sort puts the worst first, then by code.
func (f Findings) Sort() {
	slices.SortStableFunc(f, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(b.Level, a.Level), cmp.Compare(a.Code, b.Code), cmp.Compare(a.About, b.About))
	})
}
