package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/test/lab"
)

// admin is the admin door of a running server, without the start of a command in the time.
type admin struct {
	adminv1.AdminClient
	adminv1.RotationClient
	conn *grpc.ClientConn
}

func adminOf(c *lab.Cluster) (*admin, error) {
	conn, err := grpc.NewClient("unix://"+c.Path("state", "admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &admin{adminv1.NewAdminClient(conn), adminv1.NewRotationClient(conn), conn}, nil
}

// tokens makes a join token for each agent.
func (a *admin) tokens(ctx context.Context, agents []string) ([]string, error) {
	var all []string
	for _, name := range agents {
		r, err := a.CreateJoinToken(ctx, &adminv1.CreateJoinTokenRequest{Agent: name})
		if err != nil {
			return nil, err
		}
		all = append(all, r.Token)
	}
	return all, nil
}

// trust adds a root, as `signet trust add` does, and returns its ID.
func (a *admin) trust(ctx context.Context, root *x509.Certificate) (string, error) {
	_, err := a.AddTrust(ctx, &adminv1.AddTrustRequest{Root: root.Raw, RootFingerprint: ca.CertificateFingerprint(root.Raw)})
	return idOf(ca.CertificateFingerprint(root.Raw)), err
}

// idOf a root with this fingerprint.
func idOf(fingerprint string) string {
	f, err := ca.ParseFingerprint(fingerprint)
	if err != nil {
		panic(err) // it comes from Signet itself
	}
	return rotation.RootID(f[:])
}

// believed waits until so many agents have said that all their workloads believe a root.
func (a *admin) believed(ctx context.Context, root string, agents int, limit time.Duration) error {
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		s, err := a.RotationStatus(ctx, &adminv1.RotationStatusRequest{})
		if err != nil {
			return err
		}
		n := 0
		for _, r := range s.Clusters[0].Roots { // the server's own cluster comes first
			if r.Id == root {
				n = int(r.Trusting)
			}
		}
		if n >= agents {
			return nil
		}
		if time.Since(begun) > limit {
			return fmt.Errorf("%d of %d agents believe root %s after %s", n, agents, root, limit)
		}
	}
}

// stands waits until a CA is in a state.
func (a *admin) stands(ctx context.Context, id, state string, limit time.Duration) error {
	return lab.Until(ctx, id+" is "+state, limit, func() error {
		r, err := a.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
		if err != nil {
			return err
		}
		for _, x := range r.Authorities {
			if x.Id == id {
				if x.State == state {
					return nil
				}
				return fmt.Errorf("it is %s", x.State)
			}
		}
		return fmt.Errorf("there is no %s", id)
	})
}

// rotate starts a rotation, has the request signed by the root in a folder of the lab, and installs the chain, as a person
// does it while the server runs. It returns the ID of the new intermediate.
func rotate(ctx context.Context, c *lab.Cluster, a *admin, root, rootFingerprint string, start ...string) (string, error) {
	l := c.Lab
	csr, chain := c.Path("under-"+root+".csr"), c.Path("under-"+root+".pem")
	known := map[string]bool{}
	before, err := a.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
	if err != nil {
		return "", err
	}
	for _, x := range before.Authorities {
		known[x.Id] = true
	}
	fp, err := l.Run(ctx, append([]string{"rotation", "start", "--config", c.Config(), "--csr-out", csr}, start...)...)
	if err != nil {
		return "", err
	}
	if _, err := l.Run(ctx, "root", "sign", "--dir", root, "--passphrase-file", root+".pass", "--cluster", c.Name,
		"--csr", csr, "--fingerprint", strings.TrimSpace(fp), "--out", chain); err != nil {
		return "", err
	}
	if _, err := l.Run(ctx, "cluster", "install", "--config", c.Config(), "--chain", chain, "--root-fingerprint", rootFingerprint); err != nil {
		return "", err
	}
	after, err := a.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
	if err != nil {
		return "", err
	}
	for _, x := range after.Authorities {
		if !known[x.Id] && x.Kind == ca.KindIntermediate {
			return x.Id, nil
		}
	}
	return "", fmt.Errorf("no new intermediate after `signet rotation start %s`", strings.Join(start, " "))
}
