package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"
)

// devFlags are those of `serve --dev`.
type devFlags struct {
	on          bool
	dir, socket string
}

func (f *devFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.on, "dev", false, "try Signet out: everything in one process")
	cmd.Flags().StringVar(&f.dir, "dir", "signet-dev", "with --dev: the folder for everything it makes")
	cmd.Flags().StringVar(&f.socket, "socket", "", "with --dev: the Unix socket for SDS (default agent.sock in the folder)")
}

func (c *cli) serveDev(context.Context, devFlags) error {
	return errors.New("--dev is not built into this binary")
}
