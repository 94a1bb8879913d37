// Command signet is all of Signet: server, agent, and the tools of admins and auditors.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func main() {
	// Whatever a command makes is for its user alone, unless it says otherwise.
	syscall.Umask(0o077)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c := &cli{in: os.Stdin, out: os.Stdout, err: os.Stderr}
	os.Exit(c.run(ctx, os.Args[1:]))
}

// cli is where commands read and write: data on out, talk on err.
type cli struct {
	in       io.Reader
	out, err io.Writer
	// columns is how wide out is; 0 = as wide as its terminal, and without an end where it is none.
	columns int
}

// The exit codes, one rule for all commands (docs: `signet help exit-codes`).
const (
	exitYes         = 0 // yes, healthy, proven, same, done
	exitNo          = 1 // no, findings, differs, refused
	exitCouldNotSay = 2 // could not tell: wrong usage, unreachable, unreadable
)

// noError is an error that is an answer: no.
type noError struct{ error }

// no marks an error as the answer "no" (exit status 1). Every other error means "could not tell" (2).
func no(format string, args ...any) error { return noError{fmt.Errorf(format, args...)} }

func (e noError) Unwrap() error { return e.error }

func (c *cli) run(ctx context.Context, args []string) int {
	cmd := c.command()
	cmd.SetArgs(args)
	cmd.SetIn(c.in)
	cmd.SetOut(c.out)
	cmd.SetErr(c.err)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return exitYes
	}
	fmt.Fprintf(c.err, "signet: %v\n", err)
	if n := (noError{}); errors.As(err, &n) {
		return exitNo
	}
	return exitCouldNotSay
}

func (c *cli) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "signet",
		Short: "A certificate authority and workload identity service",
		Long: `Signet gives every workload of every cluster a short-lived SPIFFE identity, lets all clusters trust
one shared root, renews everything ahead of expiry, and can prove afterwards what it has issued.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(
		c.rootCommand(),
		c.clusterCommand(),
		c.serveCommand(),
		c.agentCommand(),
		c.joinTokenCommand(),
		c.registrationCommand(),
		c.identityCommand(),
		c.caCommand(),
		c.rotationCommand(),
		c.trustCommand(),
		c.svidCommand(),
		c.logCommand(),
		c.checkCommand(),
		c.configCommand(),
		c.versionCommand(),
		exitCodesTopic(),
	)
	sayUsage(root)
	return root
}

// noEmptyFlags: a variable that was not set must not pass for a flag that was not given.
func noEmptyFlags(cmd *cobra.Command) (err error) {
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if f.Value.Type() == "string" && f.Value.String() == "" {
			err = fmt.Errorf("--%s is empty: give it a value or leave it out", f.Name)
		}
	})
	return err
}

// exitCodesTopic is a page of help, not a command: `signet help exit-codes`.
func exitCodesTopic() *cobra.Command {
	return &cobra.Command{
		Use:   "exit-codes",
		Short: "What the exit status of every command means",
		Long: `Every command exits with

  0   yes: done, healthy, proven, the same, nothing to do
  1   no: refused, findings, differs, not in the log
  2   could not tell: wrong usage, unreachable, unreadable

Data goes to stdout, talk to stderr.`,
	}
}
