package main

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/internal/sockets"
	"github.com/signet-ca/signet/rotation"
)

// devSocket is where `signet serve --dev` puts its socket, seen from the folder it was started in; fetch and watch look
// there when they are told nothing.
const devSocket = "signet-dev/agent.sock"

// The names that are asked for.
const (
	defaultSecret = "default"
	bundleSecret  = "ROOTCA"
)

// secrets is what an agent has given: a chain with its key, and the roots.
type secrets struct {
	chain     []*x509.Certificate
	chainPEM  []byte
	keyPEM    []byte
	roots     []*x509.Certificate
	rootsPEM  []byte
	gotSVID   bool
	gotBundle bool
}

// agentSocket is where the agent listens, and as whom.
type agentSocket struct {
	path string
	// uid of the agent, if it is neither root's nor our own; negative = it is.
	uid int64
}

func (s *agentSocket) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.path, "socket", devSocket, "the agent's Unix socket")
	_ = cmd.MarkFlagFilename("socket", "sock")
	cmd.Flags().Int64Var(&s.uid, "agent-uid", -1, "the uid as which the agent runs, if it is neither root's nor your own")
}

// dial connects to whoever listens, and believes root, ourselves and the one who was named. Whoever else could have put a
// socket of theirs there would choose this process's identity and key.
func (s agentSocket) dial(ctx context.Context, path string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	uid, err := sockets.PeerUID(c)
	if err == nil && uid != 0 && uid != uint32(os.Geteuid()) && int64(uid) != s.uid {
		err = fmt.Errorf("uid %d listens there, which is neither root nor you: nothing of it is believed; if the agent runs as that user, say so with --agent-uid %d", uid, uid)
	}
	if err != nil {
		c.Close()
		return nil, &strangerError{err}
	}
	return c, nil
}

// strangerError is why the one who listens is not believed.
type strangerError struct{ err error }

func (e *strangerError) Error() string { return e.err.Error() }

// sdsClient is a stream of secrets from an agent.
type sdsClient struct {
	conn   *grpc.ClientConn
	stream secretv3.SecretDiscoveryService_StreamSecretsClient
	names  []string
	state  secrets
}

// dialAgent opens a stream as this process and asks for one SVID ("" = the default) and the bundle.
func dialAgent(ctx context.Context, s agentSocket, id string) (*sdsClient, error) {
	socket := s.path
	path, err := filepath.Abs(socket)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", socket, err)
	}
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("no agent at %s: %w; name the agent's socket with --socket, or start one with `signet serve --dev`", socket, errors.Unwrap(err))
	}
	// Who listens is looked at on every connection, and the first one that is not believed is the answer.
	var stranger atomic.Pointer[strangerError]
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithUserAgent("signet-svid"),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c, err := s.dial(ctx, path)
			if wrong := new(strangerError); errors.As(err, &wrong) {
				stranger.Store(wrong)
			}
			return c, err
		}))
	if err != nil {
		return nil, fmt.Errorf("agent at %s: %w", socket, err)
	}
	if id == "" {
		id = defaultSecret
	}
	cl := &sdsClient{conn: conn, names: []string{id, bundleSecret}}
	if cl.stream, err = secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx); err == nil {
		// Plain roots, as SPIRE's and our own servers give them on this wish.
		meta := &structpb.Struct{Fields: map[string]*structpb.Value{"disable_spiffe_cert_validation": structpb.NewBoolValue(true)}}
		err = cl.stream.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "signet-svid", Metadata: meta}, ResourceNames: cl.names, TypeUrl: secretType})
	}
	if err != nil {
		// What the server said is in Recv's error; Send's is only EOF.
		if _, rerr := cl.recv(); rerr != nil {
			err = rerr
		}
		conn.Close()
		if wrong := stranger.Load(); wrong != nil {
			return nil, fmt.Errorf("socket %s: %w", socket, wrong)
		}
		return nil, agentError(socket, err)
	}
	if id == defaultSecret {
		return cl, nil
	}
	if err := cl.refusal(ctx); err != nil {
		cl.close()
		return nil, agentError(socket, err)
	}
	return cl, nil
}

// refusalWait bounds how long a refusal is waited for, which comes at once: a server may not serve that call at all.
const refusalWait = time.Second

// refusal is why the SVID is never given, as long as that stands: a stream has no word for it, and passes the name over in
// silence. What else the answer may be, the stream tells.
func (cl *sdsClient) refusal(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, refusalWait)
	defer cancel()
	_, err := secretv3.NewSecretDiscoveryServiceClient(cl.conn).FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{ResourceNames: cl.names[:1], TypeUrl: secretType})
	if status.Code(err) != codes.PermissionDenied {
		return nil
	}
	return err
}

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// leaveWait bounds how long an agent may take to hear that somebody goes.
const leaveWait = time.Second

// close unsubscribes before it goes. What a stream that is cut off has acknowledged counts on for a while, for its workload may be
// back: a trust change would wait for this process.
func (cl *sdsClient) close() {
	defer cl.conn.Close()
	timer := time.AfterFunc(leaveWait, func() { cl.conn.Close() })
	defer timer.Stop()
	if cl.stream.Send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType}) != nil || cl.stream.CloseSend() != nil {
		return
	}
	for { // until the agent has ended its side
		if _, err := cl.stream.Recv(); err != nil {
			return
		}
	}
}

func (cl *sdsClient) recv() (*discoveryv3.DiscoveryResponse, error) {
	if cl.stream == nil {
		return nil, errors.New("no stream")
	}
	return cl.stream.Recv()
}

// next waits for the next response, takes what is in it and acknowledges it. changed reports whether the SVID is another.
func (cl *sdsClient) next() (changed bool, err error) {
	r, err := cl.recv()
	if err != nil {
		return false, err
	}
	for _, res := range r.Resources {
		var s tlsv3.Secret
		if err := res.UnmarshalTo(&s); err != nil {
			return false, fmt.Errorf("the agent sent something else than a secret: %w", err)
		}
		switch s.Name {
		case bundleSecret:
			pem := s.GetValidationContext().GetTrustedCa().GetInlineBytes()
			if cl.state.roots, err = parseCertificates(pem, "the agent's bundle"); err != nil {
				return false, err
			}
			cl.state.rootsPEM, cl.state.gotBundle = pem, true
		case cl.names[0]:
			t := s.GetTlsCertificate()
			chain, err := parseCertificates(t.GetCertificateChain().GetInlineBytes(), "the agent's chain")
			if err != nil {
				return false, err
			}
			cl.state.chain, cl.state.chainPEM, cl.state.keyPEM, cl.state.gotSVID = chain, t.GetCertificateChain().GetInlineBytes(), t.GetPrivateKey().GetInlineBytes(), true
			changed = true
		}
	}
	return changed, cl.stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: cl.names, TypeUrl: secretType, VersionInfo: r.VersionInfo, ResponseNonce: r.Nonce})
}

// check looks at what was given as a workload should: the key is the chain's, and the chain leads to the bundle.
func (s *secrets) check(now time.Time) error {
	block, _ := pem.Decode(s.keyPEM)
	if block == nil {
		return errors.New("the agent sent no key in PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return errors.New("the agent sent a key that is not PKCS#8")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return errors.New("the agent sent a key that can't sign")
	}
	if pub, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(s.chain[0].PublicKey) {
		return errors.New("the agent sent a key that is not the certificate's")
	}
	pool := x509.NewCertPool()
	for _, r := range s.roots {
		pool.AddCert(r)
	}
	_, err = identity.VerifySVID(s.chain, pool, now)
	return err
}

// agentError is an answer of the agent as a sentence: a refusal is a no, everything else could not be told.
func agentError(socket string, err error) error {
	st := status.Convert(err)
	switch st.Code() {
	case codes.PermissionDenied, codes.Unauthenticated:
		return no("the agent at %s refuses: %s", socket, printableText(st.Message()))
	case codes.Unavailable:
		return fmt.Errorf("the agent at %s could not be asked: %s", socket, printableText(st.Message()))
	case codes.DeadlineExceeded:
		return fmt.Errorf("the agent at %s did not give everything in time: its server may be away, see its log and /readyz?verbose, or wait longer with --timeout", socket)
	}
	return fmt.Errorf("the agent at %s: %s", socket, printableText(st.Message()))
}

// printableText bounds a peer's text and takes out what a terminal would obey.
func printableText(s string) string {
	if len(s) > 2048 {
		s = s[:2048] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}

// svidShown is an SVID as fetch shows it. It never holds the key.
type svidShown struct {
	SPIFFEID  string     `json:"spiffe_id"`
	Serial    string     `json:"serial"`
	NotBefore time.Time  `json:"not_before"`
	NotAfter  time.Time  `json:"not_after"`
	Chain     certsShown `json:"chain"`
	Roots     certsShown `json:"roots"`
}

func (s *secrets) shown() svidShown {
	out := svidShown{}
	for _, cert := range s.chain {
		out.Chain = append(out.Chain, describeCert(cert))
	}
	for _, cert := range s.roots {
		out.Roots = append(out.Roots, describeCert(cert))
	}
	leaf := out.Chain[0]
	out.SPIFFEID, out.Serial, out.NotBefore, out.NotAfter = leaf.SPIFFEID, leaf.Serial, leaf.NotBefore, leaf.NotAfter
	return out
}

func (svidShown) columns() []string {
	return []string{"SPIFFE ID", "SERIAL", "NOT BEFORE", "EXPIRES", "ISSUER", "+CHAIN", "+ROOTS"}
}

func (s svidShown) rows() [][]string {
	return [][]string{{s.SPIFFEID, s.Serial, clock(s.NotBefore), clock(s.NotAfter), printable(s.Chain[0].Issuer), fmt.Sprint(len(s.Chain)), fmt.Sprint(len(s.Roots))}}
}

func (s svidShown) names() []string { return []string{"svid/" + s.SPIFFEID} }

func (c *cli) svidFetchCommand() *cobra.Command {
	var socket agentSocket
	var id, dir, format string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "fetch [--socket PATH]",
		Short: "Fetch this process's identity from the agent",
		Long: `Asks the agent on this host as the calling process, checks what it gives, and shows it. With --write it also writes
svid.pem (the chain), key.pem (0600) and bundle.pem (the roots) into a folder. Files are not renewed: fetch again before the
certificate expires, or use SDS.
Exit status: 0 fetched, 1 refused (the agent says why), 2 the agent could not be asked.`,
		Example: `  signet svid fetch
  signet svid fetch --socket /run/signet/agent.sock --write ./tls
  signet svid fetch -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if id != "" {
				if _, err := identity.ParseID(id); err != nil {
					return err
				}
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			cl, err := dialAgent(ctx, socket, id)
			if err != nil {
				return err
			}
			defer cl.close()
			for !cl.state.gotSVID || !cl.state.gotBundle {
				if _, err := cl.next(); err != nil {
					// It may still become this process's.
					if id != "" && status.Code(err) == codes.DeadlineExceeded {
						return fmt.Errorf("the agent at %s gave no %s in time: see without --spiffe-id what this process is given, or wait longer with --timeout", socket.path, id)
					}
					return agentError(socket.path, err)
				}
			}
			if err := cl.state.check(time.Now()); err != nil {
				return no("what the agent at %s gave is not valid: %w", socket.path, err)
			}
			if dir != "" {
				if err := cl.state.write(dir); err != nil {
					return err
				}
				fmt.Fprintf(c.err, "wrote svid.pem, key.pem and bundle.pem to %s\n", dir)
			}
			return c.show(format, cl.state.shown())
		},
	}
	socket.flags(cmd)
	cmd.Flags().StringVar(&id, "spiffe-id", "", "which of this process's identities; default the one of highest priority")
	cmd.Flags().StringVar(&dir, "write", "", "folder to write svid.pem, key.pem and bundle.pem to")
	cmd.Flags().DurationVar(&timeout, "timeout", 15*time.Second, "how long to wait for the agent")
	_ = cmd.MarkFlagDirname("write")
	outputFlag(cmd, &format)
	return cmd
}

// write puts the set on disk, the key first: a chain must never be there before its key.
func (s *secrets) write(dir string) error {
	if err := durable.Dir(dir); err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
		mode os.FileMode
	}{{"key.pem", s.keyPEM, 0o600}, {"svid.pem", s.chainPEM, 0o644}, {"bundle.pem", s.rootsPEM, 0o644}} {
		if err := durable.WriteFile(filepath.Join(dir, f.name), f.data, f.mode); err != nil {
			return err
		}
	}
	return nil
}

// renewalShown is one line of watch.
type renewalShown struct {
	Time     time.Time `json:"time"`
	SPIFFEID string    `json:"spiffe_id"`
	Serial   string    `json:"serial"`
	NotAfter time.Time `json:"not_after"`
	// RenewedBy is the latest time at which the agent renews; earlier if it had the certificate before we did.
	RenewedBy time.Time `json:"renewed_by"`
}

func (c *cli) svidWatchCommand() *cobra.Command {
	var socket agentSocket
	var id, format string
	cmd := &cobra.Command{
		Use:   "watch [--socket PATH]",
		Short: "Watch this process's identity being renewed",
		Long: `Keeps a stream open to the agent on this host and prints a line for each certificate that comes; -o json prints a
JSON object per line. On a terminal a bar shows the life that is left. It ends when you stop it, or when the agent says that
this process has no identity (any more).
Exit status: 0 stopped by you, 1 refused, 2 the agent could not be asked.`,
		Example: `  signet svid watch
  signet svid watch --socket /run/signet/agent.sock -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "table" && format != "json" {
				return fmt.Errorf("output format %q: watch knows table and json", format)
			}
			if id != "" {
				if _, err := identity.ParseID(id); err != nil {
					return err
				}
			}
			return c.watch(cmd.Context(), socket, id, format)
		},
	}
	socket.flags(cmd)
	cmd.Flags().StringVar(&id, "spiffe-id", "", "which of this process's identities; default the one of highest priority")
	cmd.Flags().StringVarP(&format, "output", "o", "table", "output format: table|json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// watch follows one identity over interruptions of the stream. Only the first connection must succeed.
func (c *cli) watch(ctx context.Context, socket agentSocket, id, format string) error {
	w := &watcher{cli: c, json: format == "json"}
	for first := true; ; first = false {
		err := w.follow(ctx, socket, id)
		w.clear()
		if ctx.Err() != nil {
			return nil
		}
		if n := (noError{}); errors.As(err, &n) || first && w.shown == "" {
			return err
		}
		fmt.Fprintf(c.err, "%v; trying again\n", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

// watcher prints what comes.
type watcher struct {
	*cli
	json bool
	// shown is the serial of the newest certificate.
	shown    string
	from, to time.Time
	renewal  time.Time
	bar      bool
}

func (w *watcher) follow(ctx context.Context, socket agentSocket, id string) error {
	cl, err := dialAgent(ctx, socket, id)
	if err != nil {
		return err
	}
	defer cl.conn.Close()
	type event struct {
		svid *x509.Certificate
		err  error
	}
	events := make(chan event)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		for {
			changed, err := cl.next()
			var e event
			switch {
			case err != nil:
				e.err = agentError(socket.path, err)
			case changed:
				e.svid = cl.state.chain[0]
			default:
				continue
			}
			select {
			case events <- e:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-events:
			if e.err != nil {
				return e.err
			}
			if err := w.line(e.svid, time.Now()); err != nil {
				return err
			}
		case <-tick.C:
			w.draw(time.Now())
		}
	}
}

// line prints a certificate that came now; one that was printed before (on another stream) is not news.
func (w *watcher) line(leaf *x509.Certificate, now time.Time) error {
	s := describeCert(leaf)
	if s.Serial == w.shown {
		return nil
	}
	first := w.shown == ""
	w.shown, w.from, w.to = s.Serial, now, leaf.NotAfter
	w.renewal = rotation.RenewAt(leaf.SerialNumber.Bytes(), now, leaf.NotAfter)
	w.clear()
	r := renewalShown{Time: now.UTC(), SPIFFEID: s.SPIFFEID, Serial: s.Serial, NotAfter: s.NotAfter, RenewedBy: w.renewal.UTC()}
	if w.json {
		return json.NewEncoder(w.out).Encode(r)
	}
	const layout = "%-20s  %-40s  %-20s  %s\n" // a serial has 20 octets
	if first {
		fmt.Fprintf(w.err, "watching %s\n", s.SPIFFEID)
		fmt.Fprintf(w.out, layout, "RECEIVED", "SERIAL", "EXPIRES", "RENEWED BY")
	}
	_, err := fmt.Fprintf(w.out, layout, clock(now), s.Serial, clock(s.NotAfter), clock(w.renewal))
	return err
}

// draw shows on a terminal how much life is left.
func (w *watcher) draw(now time.Time) {
	f, ok := w.err.(*os.File)
	if w.json || w.shown == "" || !ok || !term.IsTerminal(int(f.Fd())) || os.Getenv("TERM") == "dumb" {
		return
	}
	const width = 40
	total, left := w.to.Sub(w.from), max(w.to.Sub(now), 0)
	full := 0
	if total > 0 {
		full = min(int(float64(width)*float64(left)/float64(total)), width)
	}
	renewal := "renewal is due"
	if d := w.renewal.Sub(now); d > 0 {
		renewal = "renewal within " + d.Round(time.Second).String()
	}
	fmt.Fprintf(f, "\r[%s%s] %s left, %s\x1b[K", strings.Repeat("#", full), strings.Repeat(".", width-full), left.Round(time.Second), renewal)
	w.bar = true
}

// clear takes the bar away before something else is printed.
func (w *watcher) clear() {
	if w.bar {
		fmt.Fprint(w.err, "\r\x1b[K")
		w.bar = false
	}
}
