package main

import (
	"fmt"
	"os"
	"text/tabwriter"
	"time"
)

// table is what was seen of each sidecar, by the root that it stood under.
func (v *vaulted) table() {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "\nSIDECAR\tCERTIFICATES SEEN\tUNDER ROOT A\tB\tPROVEN IN THE LOG")
	for _, s := range v.sidecars() {
		under := map[*vaultRoot]int{}
		for serial := range v.seen.bySide[s] {
			under[v.under[serial]]++
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\tall\n", s, len(v.seen.bySide[s]), under[v.a], under[v.b])
	}
	w.Flush()
	fmt.Fprintln(w, "\nREQUESTS\tFAILED\tREFUSED ATTEMPTS\tPROOFS\tWITHOUT VAULT\tSECONDS")
	fmt.Fprintf(w, "%d\t%d\t%d\t%d\t%.1f s\t%.1f\n", v.requests(), v.failures(), v.refused, v.proven, v.unsealed.Sub(v.sealed).Seconds(), time.Since(v.started).Seconds())
	w.Flush()
	fmt.Println()
}

// tryThis prints what a visitor may type while it all runs.
func (v *vaulted) tryThis() {
	fmt.Printf(`It goes on running; Ctrl-C ends it. In another terminal:

  Vault, as its admin:
    export VAULT_ADDR=%[1]s VAULT_CACERT=%[2]s VAULT_TOKEN=%[3]s
    .tools/bin/vault list %[4]s/issuers
    .tools/bin/vault kv get %[5]s/signet/example.org/trust
  seal it, see what is said of it, and unseal it again:
    .tools/bin/vault operator seal
    curl -s 'http://%[6]s/readyz?verbose'
    .tools/bin/vault operator unseal %[7]s
  the policy that east's server needs there:
    .tools/bin/signet config vault-policy --config %[8]s
  where east's keys are:
    .tools/bin/signet cluster show --config %[8]s
  a request from east's frontend to west's backend, and the certificates both saw:
    curl -si http://127.0.0.1:%[9]d/ | head -12

`, v.vault.Address, v.vault.CAFile, v.vault.RootToken, pkiMount, kvMount, v.west.HTTP, v.vault.UnsealKey, v.east.Config(), v.east.frontend.out)
}
