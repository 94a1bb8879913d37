package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protojson"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/internal/config"
	"github.com/signet-ca/signet/server"
)

func (c *cli) logCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "log",
		Short: "Search, show, prove and verify the audit log",
		Long: `Search, show, prove and verify the audit log: everything a server has issued and decided.

All of it works on a log's folder alone, that of a running server or a copy of it, and asks no server. A log is a C2SP
tlog-tiles log (https://c2sp.org/tlog-tiles), so that other tools can check it too.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.logFindCommand(), c.logShowCommand(), c.logProveCommand(), c.logVerifyCommand())
	return cmd
}

// logFolder is which log a command is about.
type logFolder struct{ dir, config, key string }

func (f *logFolder) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.dir, "dir", "", "the log's folder, or a copy of it")
	cmd.Flags().StringVar(&f.config, "config", "", "the configuration file of the server whose log it is")
	cmd.Flags().StringVar(&f.key, "key", "", "the log's verifier key; without it the one in the folder is used")
	_ = cmd.MarkFlagDirname("dir")
	_ = cmd.MarkFlagFilename("config", "yaml", "yml")
	cmd.MarkFlagsMutuallyExclusive("dir", "config")
}

// openLog opens the log. Whoever answers a question of trust with the folder's own key says so.
func (c *cli) openLog(f logFolder, sayKey bool) (*audit.Reader, error) {
	dir, index := f.dir, ""
	switch {
	case f.config != "":
		conf, err := config.LoadServer(f.config)
		if err != nil {
			return nil, err
		}
		dir, index = server.LogDir(conf.StateDir), filepath.Join(conf.StateDir, "log-index.db")
	case dir == "":
		return nil, errors.New("which log? Name its folder with --dir DIR, or its server's configuration with --config FILE")
	}
	r, err := audit.OpenReader(dir, f.key)
	if err != nil {
		return nil, err
	}
	if index == "" {
		index = indexOf(dir, r.VerifierKey())
	}
	r.KeepIndex(index)
	if sayKey && r.KeyFromFolder() {
		fmt.Fprintf(c.err, "the verifier key is the folder's own, so the folder is checked against itself; check it against the log you know with\n  --key %s\n", r.VerifierKey())
	}
	return r, nil
}

// indexOf is where the index of a log is kept that is no server's of ours: with the user, and not in the folder, whose
// maker could have put one there that leaves something out. "" = nowhere.
func indexOf(dir, key string) string {
	cache, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return ""
	}
	cache = filepath.Join(cache, "signet", "log-index")
	if os.MkdirAll(cache, 0o700) != nil {
		return ""
	}
	id := sha256.Sum256([]byte(key + "\n" + dir))
	return filepath.Join(cache, hex.EncodeToString(id[:16])+".db")
}

// logEntry is an entry as find shows it.
type logEntry struct {
	Index        uint64     `json:"index"`
	Time         time.Time  `json:"time"`
	Kind         string     `json:"kind"`
	SPIFFEID     string     `json:"spiffe_id,omitempty"`
	Serial       string     `json:"serial,omitempty"`
	NotBefore    *time.Time `json:"not_before,omitempty"`
	NotAfter     *time.Time `json:"not_after,omitempty"`
	Agent        string     `json:"agent,omitempty"`
	Caller       string     `json:"caller,omitempty"`
	Door         string     `json:"door,omitempty"`
	Instance     string     `json:"instance,omitempty"`
	Registration string     `json:"registration,omitempty"`
	Token        string     `json:"token,omitempty"`
	Authority    string     `json:"authority,omitempty"`
	Change       string     `json:"change,omitempty"`
	Selectors    []string   `json:"selectors,omitempty"`
	KeySHA256    string     `json:"public_key_sha256,omitempty"`
	Proven       bool       `json:"proven,omitempty"`
}

func newLogEntry(index uint64, f audit.Facts) logEntry {
	e := logEntry{
		Index: index, Time: f.Time, Kind: f.Kind, SPIFFEID: f.SPIFFEID, Serial: f.Serial, Agent: f.Agent,
		Caller: f.Evidence.GetCaller(), Door: f.Evidence.GetDoor(), Instance: f.Evidence.GetInstance(),
		Registration: f.Registration, Token: f.Token, Authority: f.Authority, Change: f.Change, Selectors: f.Evidence.GetSelectors(),
		KeySHA256: f.KeySHA256,
	}
	if f.Certificate != nil {
		e.NotBefore, e.NotAfter = &f.NotBefore, &f.NotAfter
	}
	return e
}

func (e logEntry) cells() []string {
	proven := ""
	if e.Proven {
		proven = "yes"
	}
	return []string{
		strconv.FormatUint(e.Index, 10), clock(e.Time), e.Kind, printable(e.SPIFFEID), e.Serial, printable(e.Agent), clockOf(e.NotAfter),
		printable(e.Authority), printable(e.Change), clockOf(e.NotBefore), e.Door, printable(e.Caller), printable(e.Registration), printable(e.Token), printable(e.Instance), printable(strings.Join(e.Selectors, ",")), e.KeySHA256, proven,
	}
}

type logEntries []logEntry

func (l logEntries) columns() []string {
	heads := []string{"INDEX", "TIME", "KIND", "SPIFFE ID", "~SERIAL", "AGENT", "~NOT AFTER", "+AUTHORITY", "+CHANGE", "+NOT BEFORE", "+DOOR", "+CALLER", "+REGISTRATION", "+TOKEN", "+INSTANCE", "+SELECTORS", "+KEY", "+PROVEN"}
	// What became of CAs is shown where there is any of it.
	if l.tellOfCAs() {
		for i, head := range heads {
			switch head {
			case "+AUTHORITY":
				heads[i] = "AUTHORITY"
			case "+CHANGE":
				heads[i] = ">CHANGE"
			}
		}
	}
	return heads
}

func (l logEntries) tellOfCAs() bool {
	return slices.ContainsFunc(l, func(e logEntry) bool { return e.Change != "" })
}

func (l logEntries) rows() [][]string {
	rows := make([][]string, len(l))
	for i, e := range l {
		rows[i] = e.cells()
	}
	return rows
}

func (l logEntries) names() []string {
	names := make([]string, len(l))
	for i, e := range l {
		names[i] = "entry/" + strconv.FormatUint(e.Index, 10)
	}
	return names
}

// printable keeps what a log says, which others have chosen, from speaking to the terminal.
func printable(s string) string {
	quoted := strconv.Quote(s)
	if quoted == `"`+s+`"` {
		return s
	}
	return quoted
}

func (c *cli) logFindCommand() *cobra.Command {
	var folder logFolder
	var q audit.Query
	var since, until, format string
	var prove bool
	cmd := &cobra.Command{
		Use:   "find (--dir DIR | --config FILE)",
		Short: "Find entries by serial number, SPIFFE ID, agent, registration, token, kind and time",
		Long: `Find the entries to which all of the given flags apply, the newest first.

The search uses an index that is made from the log when it is missing and follows it from then on; it is checked against
the log's checkpoint before every answer. Entries that are younger than the newest checkpoint, about a second, are not
found yet. With --prove every entry shown is also proven to be in the log. On a terminal that is too narrow for them serial
numbers and ends are left out: -o wide shows all that json has.

Exit status: 0 found, 1 nothing matches, 2 could not tell.`,
		Example: `  signet log find --config east.yaml --spiffe-id spiffe://example.org/ns/shop/sa/frontend --since 24h
  signet log find --dir ./log --serial 4F:0A:91:… --prove -o wide
  signet log find --dir ./log --registration frontend -o wide
  signet log find --dir ./log --kind agent-enrolled -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if q.Serial != "" {
				if q.Serial, err = audit.ParseSerial(q.Serial); err != nil {
					return err
				}
			}
			if q.SPIFFEID != "" {
				if _, err := spiffeid.FromString(q.SPIFFEID); err != nil {
					return fmt.Errorf("--spiffe-id %.256q: %w", q.SPIFFEID, err)
				}
			}
			if q.Limit < 0 {
				return fmt.Errorf("--limit %d: use a number from 1, or 0 for all", q.Limit)
			}
			now := time.Now()
			if q.Since, err = when("--since", since, now); err != nil {
				return err
			}
			if q.Until, err = when("--until", until, now); err != nil {
				return err
			}
			if !q.Until.IsZero() && q.Since.After(q.Until) {
				return fmt.Errorf("--since %s is after --until %s: nothing can lie between", clock(q.Since), clock(q.Until))
			}
			if q.Kind != "" && !slices.Contains(audit.Kinds(), q.Kind) {
				return fmt.Errorf("--kind %q is unknown: use one of %s", q.Kind, strings.Join(audit.Kinds(), ", "))
			}
			return c.logFind(cmd.Context(), folder, q, prove, format)
		},
	}
	folder.flags(cmd)
	fl := cmd.Flags()
	fl.StringVar(&q.Serial, "serial", "", "serial number of a certificate, hex with or without colons")
	fl.StringVar(&q.SPIFFEID, "spiffe-id", "", "SPIFFE ID of a certificate, whole")
	fl.StringVar(&q.Agent, "agent", "", "name of the agent it is about")
	fl.StringVar(&q.Registration, "registration", "", "name of the registration it is about, or by which a certificate was given")
	fl.StringVar(&q.Token, "token", "", "id of a join token, as join-token list shows it")
	fl.StringVar(&q.Kind, "kind", "", "kind of event: "+strings.Join(audit.Kinds(), ", "))
	fl.StringVar(&since, "since", "", "not before this time (RFC 3339), or this long ago (-1h)")
	fl.StringVar(&until, "until", "", "before this time (RFC 3339), or this long ago (-1h)")
	fl.IntVar(&q.Limit, "limit", 1000, "show at most so many; 0 = all")
	fl.BoolVar(&prove, "prove", false, "prove each entry against the log's checkpoint")
	_ = cmd.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions(audit.Kinds(), cobra.ShellCompDirectiveNoFileComp))
	outputFlag(cmd, &format)
	return cmd
}

// when reads a time, or a duration before now with or without its minus sign.
func when(flag, s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	d, err := time.ParseDuration(strings.TrimPrefix(s, "-"))
	if err != nil {
		return time.Time{}, fmt.Errorf("%s %q: want a time such as 2026-11-21T08:00:00Z, or how long ago, such as -1h30m", flag, s)
	}
	return now.Add(-d), nil
}

func (c *cli) logFind(ctx context.Context, folder logFolder, q audit.Query, prove bool, format string) (err error) {
	r, err := c.openLog(folder, prove)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	found, err := r.Find(ctx, q)
	if err != nil {
		return err
	}
	list := make(logEntries, len(found))
	for i, f := range found {
		list[i] = newLogEntry(f.Index, f.Facts)
		if prove {
			p, err := r.Prove(ctx, f.Index)
			if err != nil {
				return err
			}
			// The index led here; what counts is that these very bytes are in the tree.
			if err := audit.VerifyProof(p, f.Raw, r.VerifierKey()); err != nil {
				return err
			}
			list[i].Proven = true
		}
	}
	if len(list) > 0 || format != "table" && format != "wide" {
		if err := c.show(format, list); err != nil {
			return err
		}
	}
	if q.Limit > 0 && len(list) == q.Limit {
		fmt.Fprintf(c.err, "there may be more: these are the newest %d; --limit 0 shows all\n", q.Limit)
	}
	if len(list) == 0 {
		return no("nothing in the log matches")
	}
	return nil
}

func (c *cli) logShowCommand() *cobra.Command {
	var folder logFolder
	var format string
	cmd := &cobra.Command{
		Use:   "show [INDEX] (--dir DIR | --config FILE)",
		Short: "Show an entry in full, or facts about the log",
		Long: `Show the entry at an index in full: what was signed or decided, when, and on whose word. It is proven to be in the log
before it is shown. Without an index: the log's name, size, root hash and verifier key.

Exit status: 0 shown, 1 no such entry, 2 could not tell.`,
		Example: `  signet log show --config east.yaml
  signet log show 1042 --dir ./log
  signet log show 1042 --dir ./log -o json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			r, err := c.openLog(folder, true)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, r.Close()) }()
			if len(args) == 0 {
				cp, err := r.Checkpoint(cmd.Context())
				if err != nil {
					return err
				}
				return c.show(format, logFacts{cp.Origin, cp.Size, hex.EncodeToString(cp.RootHash), cp.Published, r.VerifierKey()})
			}
			index, err := strconv.ParseUint(args[0], 10, 64)
			if err != nil {
				return fmt.Errorf("index %q is not a number", args[0])
			}
			p, err := r.Prove(cmd.Context(), index)
			if errors.Is(err, audit.ErrNotInLog) {
				return no("%w", err)
			}
			if err != nil {
				return err
			}
			v, err := newEntryView(p)
			if err != nil {
				return err
			}
			return c.show(format, v)
		},
	}
	folder.flags(cmd)
	outputFlag(cmd, &format)
	return cmd
}

// logFacts is what show says of a log.
type logFacts struct {
	Origin      string    `json:"origin"`
	Size        uint64    `json:"size"`
	RootHash    string    `json:"root_hash"`
	Published   time.Time `json:"checkpoint_published"`
	VerifierKey string    `json:"verifier_key"`
}

func (f logFacts) columns() []string { return []string{"FACT", "VALUE"} }
func (f logFacts) rows() [][]string {
	return [][]string{
		{"origin", printable(f.Origin)},
		{"size", strconv.FormatUint(f.Size, 10)},
		{"root hash", f.RootHash},
		{"checkpoint published", clock(f.Published)},
		{"verifier key", printable(f.VerifierKey)},
	}
}
func (f logFacts) names() []string { return []string{"log/" + f.Origin} }

// entryView is an entry in full.
type entryView struct {
	logEntry
	Certificate *certificateView `json:"certificate,omitempty"`
	// Event is the entry as it was logged, with everything that is in it.
	Event    json.RawMessage `json:"entry"`
	LeafHash string          `json:"leaf_hash"`
	Unread   string          `json:"unread,omitempty"`
}

type certificateView struct {
	Subject     string `json:"subject,omitempty"`
	Issuer      string `json:"issuer"`
	PublicKey   string `json:"public_key"`
	KeySHA256   string `json:"public_key_sha256"`
	Signature   string `json:"signature_algorithm"`
	IsCA        bool   `json:"is_ca"`
	IssuerKeyID string `json:"issuer_key_id,omitempty"`
}

func newEntryView(p audit.Proof) (entryView, error) {
	e, err := audit.DecodeEntry(p.Entry)
	if err != nil {
		return entryView{}, err
	}
	f, unread := audit.FactsOf(e)
	v := entryView{logEntry: newLogEntry(p.Index, f), LeafHash: hex.EncodeToString(audit.LeafHash(p.Entry))}
	v.Proven = true
	if unread != nil {
		v.Unread = unread.Error()
	}
	if x := f.Certificate; x != nil {
		v.Certificate = &certificateView{
			Subject: x.Subject.String(), Issuer: x.Issuer.String(), PublicKey: x.PublicKeyAlgorithm.String(), KeySHA256: f.KeySHA256,
			Signature: x.SignatureAlgorithm.String(), IsCA: x.IsCA, IssuerKeyID: hex.EncodeToString(x.AuthorityKeyId),
		}
	}
	v.Event, err = eventJSON(e)
	return v, err
}

// eventJSON is the protobuf JSON form, in one spacing (protojson varies it on purpose).
func eventJSON(e *auditv1.Entry) (json.RawMessage, error) {
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(e)
	if err != nil {
		return nil, err
	}
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, err
	}
	return json.Marshal(v)
}

func (v entryView) columns() []string { return []string{"FACT", "VALUE"} }

func (v entryView) rows() [][]string {
	rows := [][]string{}
	add := func(name, value string) {
		if value != "" {
			rows = append(rows, []string{name, printable(value)})
		}
	}
	add("index", strconv.FormatUint(v.Index, 10))
	add("time", v.Time.Format(time.RFC3339Nano))
	add("kind", v.Kind)
	add("SPIFFE ID", v.SPIFFEID)
	add("serial", v.Serial)
	add("not before", clockOf(v.NotBefore))
	add("not after", clockOf(v.NotAfter))
	add("public key SHA-256", v.KeySHA256)
	if x := v.Certificate; x != nil {
		add("subject", x.Subject)
		add("issuer", x.Issuer)
		add("issuer key id", x.IssuerKeyID)
		add("public key", x.PublicKey)
		add("signature algorithm", x.Signature)
		add("CA", strconv.FormatBool(x.IsCA))
	}
	add("agent", v.Agent)
	add("caller", v.Caller)
	add("door", v.Door)
	add("instance", v.Instance)
	add("registration", v.Registration)
	add("join token", v.Token)
	for _, s := range v.Selectors {
		add("selector", s)
	}
	add("unread", v.Unread)
	if v.Certificate == nil {
		rows = append(rows, []string{"entry", string(v.Event)}) // JSON has no control characters.
	}
	add("leaf hash", v.LeafHash)
	return rows
}

func (v entryView) names() []string { return logEntries{v.logEntry}.names() }
