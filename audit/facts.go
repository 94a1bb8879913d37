package audit

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"time"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
	"google.golang.org/protobuf/reflect/protoreflect"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
)

// Facts is what people ask an entry for.
type Facts struct {
	// Kind is the event's name: "certificate-issued"; "unknown" for one of a newer version.
	Kind string
	Time time.Time
	// Serial, SPIFFEID and the times are those of the certificate in the entry, if there is one. The serial is lower-case
	// hex of whole bytes, without leading zero bytes.
	Serial, SPIFFEID    string
	NotBefore, NotAfter time.Time
	// Agent is the agent the event is about, or on whose word it happened.
	Agent string
	// Registration is the name of the one it is about, or by which a certificate was given; Token the id of a join token.
	Registration, Token string
	// Authority is the CA the event is about; Change is what became of it, why an identity was banned, or what another cluster
	// has reported, for people.
	Authority, Change string
	// Certificate is what of the entry's certificate was logged: its signature is not. Nil where there is none.
	Certificate *x509.Certificate
	// KeySHA256 is of the public key that the event is about (SubjectPublicKeyInfo, DER), lower-case hex: the certificate's, the
	// request's or the agent's.
	KeySHA256 string
	Evidence  *auditv1.Evidence
}

var entryEvents = (&auditv1.Entry{}).ProtoReflect().Descriptor().Oneofs().ByName("event")

const unknownKind = "unknown"

// Kinds are the kinds of entries, as Facts and Query name them.
func Kinds() []string {
	var kinds []string
	for i := range entryEvents.Fields().Len() {
		kinds = append(kinds, kindOf(entryEvents.Fields().Get(i)))
	}
	return kinds
}

func kindOf(f protoreflect.FieldDescriptor) string {
	return strings.ReplaceAll(string(f.Name()), "_", "-")
}

// FactsOf reads an entry. A certificate in it that does not parse is an error; the other facts are there all the same.
func FactsOf(e *auditv1.Entry) (Facts, error) {
	f := Facts{Kind: unknownKind, Time: time.Unix(0, e.GetTime()).UTC()}
	field := e.ProtoReflect().WhichOneof(entryEvents)
	if field == nil {
		return f, nil
	}
	f.Kind = kindOf(field)
	// By what the events have in common, so that the next one needs no line here.
	event := e.ProtoReflect().Get(field).Message().Interface()
	if ev, ok := event.(interface{ GetEvidence() *auditv1.Evidence }); ok {
		f.Evidence = ev.GetEvidence()
		f.Agent, f.Registration = f.Evidence.GetAgent(), f.Evidence.GetRegistration()
	}
	if ev, ok := event.(interface{ GetTokenId() string }); ok {
		f.Token = ev.GetTokenId()
	}
	if ev := e.GetRegistrationChanged(); ev != nil {
		f.Registration = cmp.Or(nameIn(ev.GetAfter()), nameIn(ev.GetBefore()), f.Registration)
	}
	if ev, ok := event.(interface{ GetAgent() string }); ok {
		f.Agent = ev.GetAgent()
	}
	if ev, ok := event.(interface{ GetSpiffeId() string }); ok {
		f.SPIFFEID = ev.GetSpiffeId()
	}
	switch ev := event.(type) {
	case *auditv1.AuthorityChanged:
		f.Authority, f.Change = ev.GetAuthority(), changeOf(ev)
	case *auditv1.IdentityBanned:
		f.Change = ev.GetReason()
	case *auditv1.AuthorityRequested:
		f.Authority, f.Change = ev.GetAuthority(), "asked of "+ev.GetUpstream()+" under "+ev.GetRoot()
	case *auditv1.PeerReported:
		f.Change = reportOf(ev)
	}
	if ev, ok := event.(interface{ GetPublicKey() []byte }); ok {
		f.KeySHA256 = keyText(ev.GetPublicKey())
	}
	var err error
	switch ev := event.(type) {
	case interface{ GetTbs() []byte }:
		f.Certificate, err = parseTBS(ev.GetTbs())
	case interface{ GetChain() [][]byte }:
		if chain := ev.GetChain(); len(chain) > 0 {
			f.Certificate, err = x509.ParseCertificate(chain[0])
		}
	}
	if err != nil {
		return f, fmt.Errorf("the certificate in the entry: %w", err)
	}
	if c := f.Certificate; c != nil {
		f.Serial, f.KeySHA256 = serialText(c.SerialNumber), keyText(c.RawSubjectPublicKeyInfo)
		f.NotBefore, f.NotAfter = c.NotBefore.UTC(), c.NotAfter.UTC()
		if len(c.URIs) == 1 {
			f.SPIFFEID = c.URIs[0].String()
		}
	}
	return f, nil
}

// changeOf puts a move of a CA into one line: "published → active, schedule: it was asked for".
func changeOf(ev *auditv1.AuthorityChanged) string {
	text := ev.GetTo()
	switch {
	case ev.GetFrom() == ev.GetTo():
		text = "stays " + text
	case ev.GetFrom() != "":
		text = ev.GetFrom() + " → " + text
	}
	text += ", " + ev.GetVerb() + ": " + ev.GetReason()
	if forced := ev.GetForced(); len(forced) > 0 {
		text += " (forced: " + strings.Join(forced, "; ") + ")"
	}
	return text
}

// reportOf puts what another cluster has reported into one line.
func reportOf(ev *auditv1.PeerReported) string {
	says := "nothing new"
	if len(ev.GetSays()) > 0 {
		says = strings.Join(ev.GetSays(), "; ")
	}
	return "report of cluster " + ev.GetCluster() + ", made at " + time.Unix(0, ev.GetMade()).UTC().Format(time.RFC3339) + ": " + says
}

// nameIn is the name of a registration in its JSON form; "" where there is none.
func nameIn(text string) string {
	var r struct {
		Name string `json:"name"`
	}
	if json.Unmarshal([]byte(text), &r) != nil {
		return ""
	}
	return r.Name
}

// Covers reports whether the entry is the record of this certificate: its to-be-signed part, byte for byte.
func Covers(e *auditv1.Entry, cert *x509.Certificate) bool {
	switch {
	case e.GetCertificateIssued() != nil:
		return bytes.Equal(e.GetCertificateIssued().GetTbs(), cert.RawTBSCertificate)
	case e.GetAuthorityCreated() != nil:
		return bytes.Equal(e.GetAuthorityCreated().GetTbs(), cert.RawTBSCertificate)
	case e.GetAuthorityInstalled() != nil:
		chain := e.GetAuthorityInstalled().GetChain()
		return len(chain) > 0 && bytes.Equal(chain[0], cert.Raw)
	}
	return false
}

// parseTBS parses a to-be-signed certificate by putting it into a certificate without a signature (RFC 5280 §4.1).
func parseTBS(tbs []byte) (*x509.Certificate, error) {
	var fields, algorithm cryptobyte.String
	s := cryptobyte.String(tbs)
	version := asn1.Tag(0).Constructed().ContextSpecific()
	if !s.ReadASN1(&fields, asn1.SEQUENCE) || !fields.SkipOptionalASN1(version) || !fields.SkipASN1(asn1.INTEGER) ||
		!fields.ReadASN1Element(&algorithm, asn1.SEQUENCE) || !s.Empty() {
		return nil, errors.New("it is not a to-be-signed certificate")
	}
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes(algorithm)
		b.AddASN1BitString(nil)
	})
	der, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func serialText(n *big.Int) string { return hex.EncodeToString(n.Bytes()) }

func keyText(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}

// ParseSerial reads a serial number as people write it, in hex with or without colons, in any case, and gives it as Facts has it.
func ParseSerial(s string) (string, error) {
	digits := strings.ToLower(strings.ReplaceAll(strings.TrimSpace(s), ":", ""))
	digits = strings.TrimPrefix(digits, "0x")
	if len(digits)%2 == 1 {
		digits = "0" + digits
	}
	raw, err := hex.DecodeString(digits)
	if err != nil || len(raw) == 0 || len(raw) > 64 {
		return "", fmt.Errorf("serial number %.140q: want hex digits, with or without colons", s)
	}
	n := new(big.Int).SetBytes(raw)
	if n.Sign() == 0 {
		return "", fmt.Errorf("serial number %.140q: a certificate's is greater than zero (RFC 5280 §4.1.2.2)", s)
	}
	return serialText(n), nil
}
