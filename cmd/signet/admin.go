package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/internal/config"
)

// serverConfigFlag adds --config to a command that works on one server.
func serverConfigFlag(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVar(path, "config", "", "the server's configuration file")
	_ = cmd.MarkFlagRequired("config")
	_ = cmd.MarkFlagFilename("config", "yaml", "yml")
}

const (
	// maxAnswer bounds what the admin door may answer, in bytes: every registration there can be.
	maxAnswer = 256 << 20
	// connectWait is how long whoever has the admin socket may take until it speaks, callWait until it has answered: a server
	// gives up earlier.
	connectWait = 10 * time.Second
	callWait    = time.Minute
)

// errSilent is a process that does nothing: the kernel takes connections for it.
var errSilent = errors.New("took the connection and does not answer")

// admin calls the running server of a configuration.
func (c *cli) admin(ctx context.Context, configFile string, call func(context.Context, adminv1.AdminClient) error) error {
	cfg, err := config.LoadServer(configFile)
	if err != nil {
		return err
	}
	conn, err := dialAdmin(ctx, cfg.AdminSocket, "server", "signet serve --config "+configFile)
	if err != nil {
		return err
	}
	defer conn.Close()
	return answered(call(ctx, adminv1.NewAdminClient(conn)))
}

// dialAdmin connects to the admin socket of a server or an agent, which start starts. One that hangs is said, here and by calls.
func dialAdmin(ctx context.Context, socket, what, start string) (*grpc.ClientConn, error) {
	var dialer net.Dialer
	dial := func(ctx context.Context, _ string) (net.Conn, error) { return dialer.DialContext(ctx, "unix", socket) }
	// Tried once by hand, because the reason for which gRPC could not connect is hard to read.
	probe := func(ctx context.Context) error {
		c, err := dial(ctx, "")
		if err == nil {
			return c.Close()
		}
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		return fmt.Errorf("no %s answers on %s (%w): start it with: %s", what, socket, err, start)
	}
	if err := probe(ctx); err != nil {
		return nil, err
	}
	silent := fmt.Errorf("the %s on %s %w: it is stopped or overloaded; if it stays so, end its process and start it with: %s", what, socket, errSilent, start)
	answers := func(ctx context.Context, method string, request, answer any, conn *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		ctx, cancel := context.WithTimeout(ctx, callWait)
		defer cancel()
		err := call(ctx, method, request, answer, conn, opts...)
		if status.Code(err) == codes.DeadlineExceeded {
			return silent
		}
		return err
	}
	conn, err := grpc.NewClient("passthrough:///admin",
		// The socket's folder and mode say who is there.
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(dial), grpc.WithUnaryInterceptor(answers),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
	if err != nil {
		return nil, err
	}
	waiting, cancel := context.WithTimeout(ctx, connectWait)
	defer cancel()
	conn.Connect()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		if !conn.WaitForStateChange(waiting, state) {
			conn.Close()
			if errors.Is(ctx.Err(), context.Canceled) {
				return nil, ctx.Err()
			}
			// It may have ended meanwhile.
			if err := probe(context.WithoutCancel(ctx)); errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			return nil, silent
		}
	}
	return conn, nil
}

// answered tells the server's "no" from "could not tell", which what was typed wrong is too.
func answered(err error) error {
	st, ok := status.FromError(err)
	if !ok || err == nil {
		return err
	}
	switch st.Code() {
	case codes.NotFound, codes.FailedPrecondition, codes.PermissionDenied, codes.ResourceExhausted, codes.Aborted:
		return no("%s", st.Message())
	}
	return errors.New(st.Message())
}

// completed asks the running server for what can be completed; whatever is wrong, there is just nothing to complete.
func (c *cli) completed(cmd *cobra.Command, call func(context.Context, adminv1.AdminClient) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	path, err := cmd.Flags().GetString("config")
	if err != nil || path == "" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
	defer cancel()
	var found []string
	_ = c.admin(ctx, path, func(ctx context.Context, a adminv1.AdminClient) (err error) {
		found, err = call(ctx, a)
		return err
	})
	return found, cobra.ShellCompDirectiveNoFileComp
}
