package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/agent"
	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/internal/config"
)

// agentFlags say which agent of this host is asked.
type agentFlags struct{ config, stateDir string }

func (f *agentFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.config, "config", "", "the agent's configuration file")
	cmd.Flags().StringVar(&f.stateDir, "state-dir", config.DefaultAgentStateDir, "the agent's state folder, in place of --config")
	cmd.MarkFlagsMutuallyExclusive("config", "state-dir")
	_ = cmd.MarkFlagFilename("config", "yaml", "yml")
	_ = cmd.MarkFlagDirname("state-dir")
}

// agentCallTimeout bounds one question to an agent of this host.
const agentCallTimeout = 10 * time.Second

// askAgent calls a running agent by its admin socket.
func (f agentFlags) askAgent(ctx context.Context, call func(context.Context, adminv1.AgentAdminClient) error) error {
	dir, start := f.stateDir, "signet agent --config FILE, or name the state folder of another with --state-dir"
	if f.config != "" {
		cfg, err := config.LoadAgent(f.config)
		if err != nil {
			return err
		}
		dir, start = cfg.StateDir, "signet agent --config "+f.config
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("state folder %s: %w", f.stateDir, err)
	}
	ctx, cancel := context.WithTimeout(ctx, agentCallTimeout)
	defer cancel()
	conn, err := dialAdmin(ctx, agent.AdminSocket(dir), "agent", start)
	if err != nil {
		return err
	}
	defer conn.Close()
	return answered(call(ctx, adminv1.NewAgentAdminClient(conn)))
}

func (c *cli) agentStatusCommand() *cobra.Command {
	var which agentFlags
	var format string
	var watch bool
	cmd := &cobra.Command{
		Use:   "status [--config FILE | --state-dir DIR]",
		Short: "Show what an agent of this host has and serves",
		Long: `Shows whether the agent has its server, which trust bundle it serves and which checkpoint of the audit log it has seen;
the identities it keeps, until when, and why a renewal fails; and the SDS streams: who, what they have, what they have
acknowledged and what they have rejected, in their own words.

Should the audit log have contradicted what the agent had seen, both signed checkpoints are shown. That stays until it is
cleared by hand: stop the agent, move the evidence away, and the file "checkpoint" beside it too if the log that is there
now is to be believed, and start the agent.

It asks the agent's admin socket, which is for the agent's own user and root. Asking changes nothing.`,
		Example: `  signet agent status --config node-1.yaml
  signet agent status --state-dir /var/lib/signet/agent -o wide
  signet agent status --config node-1.yaml --watch`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !watch {
				s, err := which.status(cmd.Context())
				if err != nil {
					return err
				}
				return c.showAgent(format, s, time.Now())
			}
			return c.watchAgent(cmd.Context(), which, format)
		},
	}
	which.add(cmd)
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show it again whenever it has changed, until interrupted")
	outputFlag(cmd, &format)
	return cmd
}

func (f agentFlags) status(ctx context.Context) (s agentStatusShown, err error) {
	err = f.askAgent(ctx, func(ctx context.Context, a adminv1.AgentAdminClient) error {
		r, err := a.Status(ctx, &adminv1.AgentStatusRequest{})
		if err == nil {
			s = describeAgent(r)
		}
		return err
	})
	return s, err
}

// watchEvery spaces the questions of --watch.
const watchEvery = time.Second

// watchAgent shows the agent whenever what is shown differs. Only the first question must be answered.
func (c *cli) watchAgent(ctx context.Context, which agentFlags, format string) error {
	var shown []byte
	var lost string
	for first := true; ; first = false {
		s, err := which.status(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && first:
			return err
		case err != nil:
			if lost != err.Error() {
				lost = err.Error()
				fmt.Fprintf(c.err, "%v; trying again\n", err)
			}
		default:
			lost = ""
			var b bytes.Buffer
			// What is said relative to now would change every second.
			if err := (&cli{out: &b, err: c.err}).showAgent(format, s, time.Time{}); err != nil {
				return err
			}
			if !bytes.Equal(shown, b.Bytes()) {
				if shown != nil && (format == "table" || format == "wide") {
					fmt.Fprintf(c.out, "\n--- %s\n", clock(time.Now()))
				}
				shown = b.Bytes()
				if _, err := c.out.Write(shown); err != nil {
					return err
				}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(watchEvery):
		}
	}
}

// agentStatusShown is an agent as -o json has it.
type agentStatusShown struct {
	Agent       string          `json:"agent,omitempty"`
	Cluster     string          `json:"cluster,omitempty"`
	TrustDomain string          `json:"trust_domain,omitempty"`
	Enrolled    bool            `json:"enrolled"`
	Server      *serverShown    `json:"server,omitempty"`
	Bundle      *bundleShown    `json:"bundle,omitempty"`
	Witness     *witnessShown   `json:"audit_log,omitempty"`
	Identities  []identityShown `json:"identities"`
	Streams     []streamShown   `json:"streams"`
}

type serverShown struct {
	AgentDoor string `json:"agent_door"`
	Connected bool   `json:"connected"`
	// LastContact is set while the server is away.
	LastContact     *time.Time `json:"last_contact,omitempty"`
	TurnedAwaySince *time.Time `json:"turned_away_since,omitempty"`
	ControlNotAfter *time.Time `json:"control_not_after,omitempty"`
}

type bundleShown struct {
	Sequence uint64     `json:"sequence"`
	Digest   string     `json:"digest"`
	Roots    uint32     `json:"roots"`
	NotAfter *time.Time `json:"not_after,omitempty"`
	// Unstored: it is in use but not on disk yet, and the server is told of the one before.
	Unstored bool `json:"unstored"`
	// Acknowledged is the sequence of the oldest bundle among the workloads, as the server is told.
	Acknowledged uint64 `json:"acknowledged"`
	// ReturnedBy is until when workloads may come back that have another one; unset = none is waited for.
	ReturnedBy *time.Time `json:"returned_by,omitempty"`
}

type witnessShown struct {
	Size         uint64 `json:"size"`
	RootHash     string `json:"root_hash,omitempty"`
	Contradicted bool   `json:"contradicted"`
	// The evidence: both signed checkpoints, and the file that they are in.
	EvidenceFile string `json:"evidence_file,omitempty"`
	Evidence     string `json:"evidence,omitempty"`
}

type identityShown struct {
	Registration string     `json:"registration"`
	SPIFFEID     string     `json:"spiffe_id"`
	Wanted       uint32     `json:"wanted"`
	Serial       string     `json:"serial,omitempty"`
	NotBefore    *time.Time `json:"not_before,omitempty"`
	NotAfter     *time.Time `json:"not_after,omitempty"`
	RenewAt      *time.Time `json:"renew_at,omitempty"`
	// IssuerKeyID is the authority key identifier of the certificate, hexadecimal.
	IssuerKeyID string `json:"issuer_key_id,omitempty"`
	// ReissueAt is when it is replaced ahead of its time, because the server wants its issuer replaced.
	ReissueAt   *time.Time `json:"reissue_at,omitempty"`
	FailedTries uint32     `json:"failed_tries"`
	LastError   string     `json:"last_error,omitempty"`
}

type streamShown struct {
	Number   uint64      `json:"number"`
	Peer     string      `json:"peer"`
	Protocol string      `json:"protocol"`
	Node     string      `json:"node,omitempty"`
	Since    *time.Time  `json:"since,omitempty"`
	Names    []nameShown `json:"names"`
}

type nameShown struct {
	Name     string `json:"name"`
	Kind     string `json:"kind,omitempty"`
	Sent     string `json:"sent,omitempty"`
	Acked    string `json:"acked,omitempty"`
	Rejected string `json:"rejected,omitempty"`
	Reason   string `json:"reason,omitempty"`
	Serial   string `json:"serial,omitempty"`
}

func timeOf(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	at := t.AsTime()
	return &at
}

func describeAgent(r *adminv1.AgentStatusResponse) agentStatusShown {
	s := agentStatusShown{
		Agent: r.Agent, Cluster: r.Cluster, TrustDomain: r.TrustDomain, Enrolled: r.Agent != "",
		Identities: []identityShown{}, Streams: []streamShown{},
	}
	if m := r.Server; m != nil {
		s.Server = &serverShown{AgentDoor: m.AgentDoor, Connected: m.Connected, TurnedAwaySince: timeOf(m.TurnedAwaySince), ControlNotAfter: timeOf(m.ControlNotAfter)}
		if !m.Connected {
			s.Server.LastContact = timeOf(m.LastContact)
		}
	}
	if m := r.Bundle; m != nil {
		s.Bundle = &bundleShown{Sequence: m.Sequence, Digest: m.Digest, Roots: m.Roots, NotAfter: timeOf(m.NotAfter), Unstored: m.Unstored, Acknowledged: m.Acknowledged, ReturnedBy: timeOf(m.ReturnedBy)}
	}
	if m := r.Witness; m != nil {
		s.Witness = &witnessShown{
			Size: m.Size, RootHash: hex.EncodeToString(m.RootHash), Contradicted: m.Contradicted, EvidenceFile: m.EvidenceFile, Evidence: m.Evidence,
		}
	}
	for _, m := range r.Identities {
		s.Identities = append(s.Identities, identityShown{
			Registration: m.Registration, SPIFFEID: m.SpiffeId, Wanted: m.Wanted, Serial: m.Serial, NotBefore: timeOf(m.NotBefore),
			NotAfter: timeOf(m.NotAfter), RenewAt: timeOf(m.RenewAt), FailedTries: m.FailedTries, LastError: printableText(m.LastError),
			IssuerKeyID: hex.EncodeToString(m.IssuerKeyId), ReissueAt: timeOf(m.ReissueAt),
		})
	}
	for _, m := range r.Streams {
		st := streamShown{Number: m.Number, Peer: m.Peer, Protocol: m.Protocol, Node: printableText(m.Node), Since: timeOf(m.Since), Names: []nameShown{}}
		for _, n := range m.Names {
			st.Names = append(st.Names, nameShown{
				Name: printableText(n.Name), Kind: n.Kind, Sent: n.Sent, Acked: n.Acked, Rejected: n.Rejected, Reason: printableText(n.Reason), Serial: n.Serial,
			})
		}
		s.Streams = append(s.Streams, st)
	}
	return s
}

func (agentStatusShown) columns() []string { return nil }
func (agentStatusShown) rows() [][]string  { return nil }
func (s agentStatusShown) names() []string { return []string{"agent/" + s.Agent} }

// showAgent prints an agent; a zero now leaves out what is said relative to it.
func (c *cli) showAgent(format string, s agentStatusShown, now time.Time) error {
	if format != "table" && format != "wide" {
		return c.show(format, s)
	}
	if err := s.facts(now).print(c.out); err != nil {
		return err
	}
	if s.Witness != nil && s.Witness.Evidence != "" {
		fmt.Fprintln(c.out)
		for line := range strings.Lines(s.Witness.Evidence) {
			fmt.Fprintln(c.out, strings.TrimRight("  | "+printableText(strings.TrimSuffix(line, "\n")), " "))
		}
	}
	for _, l := range []listing{identitiesShown{s.Identities, now}, streamsShown(s.Streams)} {
		fmt.Fprintln(c.out)
		if len(l.rows()) == 0 {
			what := "nobody has asked for an identity"
			if _, ok := l.(streamsShown); ok {
				what = "no SDS streams are open"
			}
			fmt.Fprintln(c.out, what)
			continue
		}
		if err := c.show(format, l); err != nil {
			return err
		}
	}
	return nil
}

func (s agentStatusShown) facts(now time.Time) facts {
	if !s.Enrolled {
		return facts{{"agent", "not enrolled yet"}}
	}
	server := "connected to " + s.Server.AgentDoor
	if t := s.Server.TurnedAwaySince; t != nil {
		server = fmt.Sprintf("REFUSES this agent (%s) since %s: it is banned, or none of its own", s.Server.AgentDoor, clock(*t))
	} else if !s.Server.Connected {
		server = fmt.Sprintf("AWAY (%s), not heard since this agent's start", s.Server.AgentDoor)
		if t := s.Server.LastContact; t != nil {
			server = fmt.Sprintf("AWAY (%s) since %s", s.Server.AgentDoor, clock(*t))
		}
	}
	f := facts{
		{"agent", fmt.Sprintf("%s of cluster %s in %s", s.Agent, s.Cluster, s.TrustDomain)},
		{"server", server},
		{"own certificate", "until " + until(s.Server.ControlNotAfter, now)},
	}
	bundle := "none has come yet"
	if b := s.Bundle; b != nil {
		bundle = fmt.Sprintf("sequence %d, %d roots, the first ends %s", b.Sequence, b.Roots, until(b.NotAfter, now))
		if b.Unstored {
			bundle += "; NOT STORED YET, so it is not acknowledged: see the agent's log"
		}
		if b.ReturnedBy != nil {
			bundle += fmt.Sprintf("; sequence %d acknowledged: until %s a workload that is cut off may be back with it", b.Acknowledged, clock(*b.ReturnedBy))
		}
	}
	log := "no checkpoint seen yet"
	if w := s.Witness; w.Size > 0 {
		log = fmt.Sprintf("checkpoint of %d entries seen", w.Size)
	}
	if s.Witness.Contradicted {
		log += "; THE LOG CONTRADICTS WHAT WAS SEEN, by " + s.Witness.EvidenceFile
	}
	return append(f, [2]string{"trust bundle", bundle}, [2]string{"audit log", log})
}

// until is a time and how far it is.
func until(t *time.Time, now time.Time) string {
	switch {
	case t == nil:
		return ""
	case now.IsZero():
		return clock(*t)
	case now.After(*t):
		return clock(*t) + " (" + now.Sub(*t).Round(time.Second).String() + " ago)"
	}
	return clock(*t) + " (in " + t.Sub(now).Round(time.Second).String() + ")"
}

type identitiesShown struct {
	list []identityShown
	now  time.Time
}

func (identitiesShown) columns() []string {
	return []string{"REGISTRATION", "SPIFFE ID", "EXPIRES", "RENEWAL", "ISSUER", "WANTED BY", "+SERIAL", "PROBLEM"}
}

func (l identitiesShown) rows() [][]string {
	var rows [][]string
	for _, i := range l.list {
		problem := i.LastError
		if i.FailedTries > 0 {
			problem = fmt.Sprintf("%d tries have failed: %s", i.FailedTries, i.LastError)
		}
		renewal := clockOf(i.RenewAt)
		if i.ReissueAt != nil {
			renewal += " (its issuer is to be replaced)"
		}
		rows = append(rows, []string{
			i.Registration, i.SPIFFEID, until(i.NotAfter, l.now), renewal, shortKeyID(i.IssuerKeyID), strconv.Itoa(int(i.Wanted)), i.Serial, problem,
		})
	}
	return rows
}

func (identitiesShown) names() []string { return nil }

// shortKeyID is as much of a key identifier as tells the issuers of a cluster apart.
func shortKeyID(id string) string { return id[:min(len(id), 8)] }

type streamsShown []streamShown

func (streamsShown) columns() []string {
	return []string{"STREAM", "PEER", "+NODE", "+PROTOCOL", "+SINCE", "NAME", "HAS", "ACKNOWLEDGED", "REJECTED"}
}

// rows has one for each name; a stream that asks for none has one as well.
func (l streamsShown) rows() [][]string {
	var rows [][]string
	for _, st := range l {
		names := st.Names
		if len(names) == 0 {
			names = []nameShown{{}}
		}
		for _, n := range names {
			rejected := n.Rejected
			if n.Rejected != "" && n.Reason != "" {
				rejected = fmt.Sprintf("%s: %s", n.Rejected, n.Reason)
			}
			has := cmp.Or(n.Serial, n.Sent)
			acknowledged := n.Acked
			if acknowledged != "" && acknowledged == n.Sent {
				acknowledged = "yes"
			}
			rows = append(rows, []string{
				strconv.FormatUint(st.Number, 10), st.Peer, st.Node, st.Protocol, clockOf(st.Since), n.Name, has, acknowledged, strings.TrimSpace(rejected),
			})
		}
	}
	return rows
}

func (streamsShown) names() []string { return nil }
