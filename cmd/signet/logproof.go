package main

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/internal/durable"
)

func (c *cli) logProveCommand() *cobra.Command {
	var folder logFolder
	var index, serial, cert, out string
	cmd := &cobra.Command{
		Use:   "prove (--index N | --serial HEX | --cert FILE) (--dir DIR | --config FILE)",
		Short: "Prove that an entry, or a certificate, is in the log",
		Long: `Prove that an entry is in the log, and write the proof (https://c2sp.org/tlog-proof, with the entry inside) for somebody
who has the log's verifier key and nothing else. They check it with "signet log verify --proof".

With --cert the certificate in a PEM file is looked for, and what of it was signed is compared with what was logged, byte
for byte: a certificate that merely has the serial number of a logged one is not in the log.

Exit status: 0 proven, 1 not in the log, 2 could not tell.`,
		Example: `  signet log prove --config east.yaml --cert frontend.pem --out frontend.tlog-proof
  signet log prove --dir ./log --serial 4f0a91… > entry.tlog-proof
  signet log prove --dir ./log --index 1042`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			r, err := c.openLog(folder, true)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, r.Close()) }()
			at, err := which(cmd.Context(), r, index, serial, cert)
			if err != nil {
				return err
			}
			p, err := r.Prove(cmd.Context(), at)
			if errors.Is(err, audit.ErrNotInLog) {
				return no("%w", err)
			}
			if err != nil {
				return err
			}
			text, err := p.MarshalText()
			if err != nil {
				return err
			}
			if out == "" {
				_, err = c.out.Write(text)
			} else {
				err = durable.WriteFile(out, text, 0o644)
			}
			if err != nil {
				return err
			}
			cp, err := audit.ParseCheckpoint(p.Checkpoint, r.VerifierKey())
			if err != nil {
				return err
			}
			fmt.Fprintf(c.err, "proven: it is entry %d of %d in %s\n", p.Index, cp.Size, cp.Origin)
			return nil
		},
	}
	folder.flags(cmd)
	cmd.Flags().StringVar(&index, "index", "", "the entry at this index")
	cmd.Flags().StringVar(&serial, "serial", "", "the certificate with this serial number, hex with or without colons")
	cmd.Flags().StringVar(&cert, "cert", "", "the certificate in this PEM file")
	cmd.Flags().StringVar(&out, "out", "", "write the proof to this file instead of stdout")
	cmd.MarkFlagsOneRequired("index", "serial", "cert")
	cmd.MarkFlagsMutuallyExclusive("index", "serial", "cert")
	_ = cmd.MarkFlagFilename("cert", "pem", "crt", "cer")
	return cmd
}

// which finds the entry that is to be proven.
func which(ctx context.Context, r *audit.Reader, index, serial, file string) (uint64, error) {
	if index != "" {
		at, err := strconv.ParseUint(index, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("--index %q is not a number", index)
		}
		return at, nil
	}
	var cert *x509.Certificate
	var err error
	if file != "" {
		if cert, err = readCertificate(file); err != nil {
			return 0, err
		}
		serial = hex.EncodeToString(cert.SerialNumber.Bytes())
	}
	wanted, err := audit.ParseSerial(serial)
	if err != nil {
		return 0, err
	}
	found, err := r.Find(ctx, audit.Query{Serial: wanted})
	if err != nil {
		return 0, err
	}
	slices.Reverse(found) // The entry that was there first is the one that the signature waited for.
	for _, f := range found {
		if cert == nil || audit.Covers(f.Entry, cert) {
			return f.Index, nil
		}
	}
	if len(found) > 0 {
		return 0, no("the certificate in %s is %w: entry %d has its serial number, %s, but is about another certificate", file, audit.ErrNotInLog, found[0].Index, wanted)
	}
	return 0, no("the certificate with the serial number %s is %w", wanted, audit.ErrNotInLog)
}

// maxInput bounds the files that people hand to log commands, in bytes.
const maxInput = 1 << 20

// readCertificate reads the first certificate of a PEM file, which is the leaf where there is a chain.
func readCertificate(path string) (*x509.Certificate, error) {
	data, err := durable.ReadFile(path, "certificate", maxInput)
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("read the certificate in %s: %w", path, err)
		}
		return cert, nil
	}
	return nil, fmt.Errorf("read the certificate in %s: it has no PEM block CERTIFICATE", path)
}

func (c *cli) logVerifyCommand() *cobra.Command {
	var folder logFolder
	var proof, cert, format string
	cmd := &cobra.Command{
		Use:   "verify (--dir DIR | --config FILE | --proof FILE --key VKEY [--cert FILE])",
		Short: "Verify a whole log, or one proof without the log",
		Long: `Verify a whole log: every entry is read and hashed, the Merkle tree is built anew, and compared with every tile and with
the signed checkpoint. What does not fit is listed.

With --proof a proof written by "signet log prove" is checked instead, and needs no log: only the log's verifier key. With
--cert the entry it proves must be that of the certificate in the PEM file.

Exit status: 0 intact or proven, 1 damaged or not proven, 2 could not tell.`,
		Example: `  signet log verify --config east.yaml
  signet log verify --dir /media/copy/log --key 'example.org/east/east-1+…'
  signet log verify --proof frontend.tlog-proof --cert frontend.pem --key 'example.org/east/east-1+…'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if proof != "" {
				return c.verifyProof(proof, cert, folder.key, format)
			}
			if cert != "" {
				return errors.New("--cert goes with --proof; to look for a certificate in a log, use `signet log prove --cert`")
			}
			return c.verifyLog(cmd.Context(), folder, format)
		},
	}
	folder.flags(cmd)
	cmd.Flags().StringVar(&proof, "proof", "", "check this proof instead of a log")
	cmd.Flags().StringVar(&cert, "cert", "", "the certificate in this PEM file is what must be proven")
	cmd.MarkFlagsMutuallyExclusive("proof", "dir", "config")
	_ = cmd.MarkFlagFilename("proof", "tlog-proof")
	_ = cmd.MarkFlagFilename("cert", "pem", "crt", "cer")
	outputFlag(cmd, &format)
	return cmd
}

func (c *cli) verifyProof(file, certFile, key, format string) error {
	if key == "" {
		return errors.New("whose proof? Name the log's verifier key with --key; a key that came with the proof would prove nothing")
	}
	text, err := durable.ReadFile(file, "proof", maxInput)
	if err != nil {
		return err
	}
	p, err := audit.ParseProof(text)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if p.Entry == nil {
		return fmt.Errorf("%s carries no entry: it was not made by `signet log prove`", file)
	}
	err = audit.VerifyProof(p, p.Entry, key)
	if errors.Is(err, audit.ErrBadProof) {
		return no("%s: %w", file, err)
	}
	if err != nil {
		return err
	}
	cp, err := audit.ParseCheckpoint(p.Checkpoint, key)
	if err != nil {
		return err
	}
	if certFile != "" {
		cert, err := readCertificate(certFile)
		if err != nil {
			return err
		}
		e, err := audit.DecodeEntry(p.Entry)
		if err != nil {
			return err
		}
		if !audit.Covers(e, cert) {
			return no("%s proves an entry that is not that of the certificate in %s", file, certFile)
		}
	}
	v, err := newEntryView(p)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.err, "proven: it is entry %d of %d in %s\n", p.Index, cp.Size, cp.Origin)
	return c.show(format, v)
}

// logVerdict is what verify says of a log.
type logVerdict struct {
	Origin   string       `json:"origin,omitempty"`
	Size     uint64       `json:"size,omitempty"`
	RootHash string       `json:"root_hash,omitempty"`
	Intact   bool         `json:"intact"`
	Findings []logFinding `json:"findings,omitempty"`
	More     bool         `json:"more_findings,omitempty"`
}

type logFinding struct {
	File    string `json:"file"`
	Finding string `json:"finding"`
}

func (v logVerdict) columns() []string {
	if v.Intact {
		return []string{"LOG", "SIZE", "ROOT HASH", "VERDICT"}
	}
	return []string{"FILE", "FINDING"}
}

func (v logVerdict) rows() [][]string {
	if v.Intact {
		return [][]string{{printable(v.Origin), strconv.FormatUint(v.Size, 10), v.RootHash, "intact"}}
	}
	rows := [][]string{}
	for _, f := range v.Findings {
		rows = append(rows, []string{f.File, printable(f.Finding)})
	}
	if v.More {
		rows = append(rows, []string{"…", "and more"})
	}
	return rows
}

func (v logVerdict) names() []string {
	if v.Intact {
		return []string{"log/" + v.Origin}
	}
	names := []string{}
	for _, f := range v.Findings {
		names = append(names, "file/"+f.File)
	}
	return names
}

func (c *cli) verifyLog(ctx context.Context, folder logFolder, format string) (err error) {
	r, err := c.openLog(folder, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	verdict := logVerdict{Intact: true}
	cp, err := r.Checkpoint(ctx)
	if err == nil {
		verdict.Origin, verdict.Size, verdict.RootHash = cp.Origin, cp.Size, hex.EncodeToString(cp.RootHash)
		err = r.VerifyAt(ctx, cp, c.progress("verified", "entries"))
	}
	var damage *audit.Damage
	var finding *audit.Finding
	switch {
	case errors.As(err, &damage):
		verdict.Intact, verdict.More = false, damage.More
		for _, f := range damage.Findings {
			verdict.Findings = append(verdict.Findings, logFinding{f.File, f.What})
		}
	case errors.As(err, &finding): // the checkpoint itself
		verdict.Intact, verdict.Findings = false, []logFinding{{finding.File, finding.What}}
	case err != nil:
		return err
	}
	if err := c.show(format, verdict); err != nil {
		return err
	}
	if !verdict.Intact {
		return no("%w: keep the folder as it is, and compare it with a copy and with the checkpoints that the agents keep", audit.ErrDamaged)
	}
	return nil
}

// progress shows on a terminal how far something is, a few times a second; elsewhere nothing.
func (c *cli) progress(done, of string) func(n, total uint64) {
	f, ok := c.err.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	var last time.Time
	return func(n, total uint64) {
		if n < total && time.Since(last) < 200*time.Millisecond {
			return
		}
		last = time.Now()
		fmt.Fprintf(f, "\r%s %d of %d %s", done, n, total, of)
		if n >= total {
			fmt.Fprint(f, "\r\x1b[K")
		}
	}
}
