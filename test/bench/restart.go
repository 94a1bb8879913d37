package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/server"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/test/lab"
)

// restart kills a server whose log is long, starts it again at once, and asks for a certificate until there is one. Its
// agent's connection is made anew for each try, as after any loss.
func restart(ctx context.Context, b *bench) ([]figure, error) {
	entries, runs := 1_000_000, 3
	if b.quick {
		entries, runs = 20_000, 1
	}
	l, c, err := newCluster(ctx, b, "restart", hourlyLeaves)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	begun := time.Now()
	if err := fill(ctx, c, entries); err != nil {
		return nil, fmt.Errorf("fill the log: %w", err)
	}
	filled := time.Since(begun)
	p, err := c.Serve(ctx)
	if err != nil {
		return nil, err
	}
	if err := c.Apply(ctx, registration); err != nil {
		return nil, err
	}
	m, err := c.Member(ctx, "bench")
	if err != nil {
		return nil, err
	}
	if err := issueOne(ctx, c, m); err != nil {
		return nil, err
	}
	var seconds []float64
	for range runs {
		start := time.Now()
		p.Kill()
		if p, err = l.Start("bench-server", "serve", "--config", c.Config()); err != nil {
			return nil, err
		}
		for {
			err := issueOne(ctx, c, m)
			if err == nil {
				break
			}
			if time.Since(start) > time.Minute {
				return nil, fmt.Errorf("no certificate within a minute of the restart: %w", err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		seconds = append(seconds, time.Since(start).Seconds())
	}
	return []figure{
		figure{Name: fmt.Sprintf("SIGKILL to issuing again, %d entries in the log", entries), Value: median(seconds), Unit: "s"}.atMost(3).spread(seconds),
		{Name: "entries appended to the log in bulk, 100 in a call", Value: float64(entries) / filled.Seconds(), Unit: "entries/s"},
	}, nil
}

func issueOne(ctx context.Context, c *lab.Cluster, m *doors.Member) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	key, err := doors.NewKey()
	if err != nil {
		return err
	}
	csr, err := doors.CSR(key, nil)
	if err != nil {
		return err
	}
	var conn *grpc.ClientConn
	if conn, err = m.Dial(c.Agents, m.ControlCA); err != nil {
		return err
	}
	defer conn.Close()
	_, err = doors.Issue(ctx, conn, "bench", []string{"socket:bench"}, csr)
	return err
}

// fill appends to the log of a cluster that does not run, as its server would.
func fill(ctx context.Context, c *lab.Cluster, entries int) error {
	keys, err := keystore.NewFile(keystore.FileConfig{Dir: c.Path("state", "keys"), Passphrase: keystore.PassphraseFile(c.Path("server.pass"))})
	if err != nil {
		return err
	}
	refs, err := keys.List(ctx)
	if err != nil {
		return err
	}
	var key keystore.Key
	for _, r := range refs {
		if r.Name == "log" {
			if key, err = keys.Open(ctx, r); err != nil {
				return err
			}
		}
	}
	if key == nil {
		return fmt.Errorf("the cluster has no log key")
	}
	f := server.Folder{
		Dir: c.Path("state"), TrustDomain: spiffeid.RequireTrustDomainFromString(lab.TrustDomain), Cluster: c.Name, Instance: c.Name + "-1",
	}
	log, err := audit.Open(ctx, audit.Config{Dir: server.LogDir(f.Dir), Origin: f.Origin(), Signer: key})
	if err != nil {
		return err
	}
	const each, flight = 100, 64
	entry := &auditv1.Entry{Time: time.Now().UnixNano(), Event: &auditv1.Entry_CertificateIssued{CertificateIssued: &auditv1.CertificateIssued{
		Tbs: make([]byte, 400), IssuerKeyId: make([]byte, 20),
		Evidence: &auditv1.Evidence{Caller: "agent/bench", Door: "agent", Agent: "bench", Instance: "bench", Registration: "bench", Selectors: []string{"socket:bench"}},
	}}}
	call := make([]*auditv1.Entry, each)
	for i := range call {
		call[i] = entry
	}
	failed := make(chan error, flight)
	for range flight {
		go func() {
			for range entries / each / flight {
				if _, err := log.Append(ctx, call); err != nil {
					failed <- err
					return
				}
			}
			failed <- nil
		}()
	}
	for range flight {
		if e := <-failed; e != nil && err == nil {
			err = e
		}
	}
	if err != nil {
		return err
	}
	for range (entries - entries/each/flight*each*flight) / each {
		if _, err := log.Append(ctx, call); err != nil {
			return err
		}
	}
	return log.Close(ctx)
}
