package main

import (
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"
)

// table is the end of the story in numbers.
func (d *demo) table() {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "\nSIDECAR\tRENEWALS SEEN\tCERTIFICATES SEEN\tPROVEN IN THE LOG")
	for _, s := range d.sidecars() {
		n := d.seen.renewed(s)
		fmt.Fprintf(w, "%s\t%d\t%d\tall\n", s, n, n+1)
	}
	w.Flush()
	d.tableOfRequests(w)
}

// tableOfRequests is what ends the table of a story.
func (d *demo) tableOfRequests(w *tabwriter.Writer) {
	fmt.Fprintln(w, "\nREQUESTS\tFAILED\tREFUSED ATTEMPTS\tPROOFS\tSECONDS")
	fmt.Fprintf(w, "%d\t%d\t%d\t%d\t%.1f\n", d.requests(), d.failures(), d.refused, d.proven, time.Since(d.started).Seconds())
	w.Flush()
	fmt.Println()
}

// tryThis prints what a visitor may type while it all runs.
func (d *demo) tryThis() {
	rel := func(c *cluster) string { return d.Dir + "/" + c.Name }
	fmt.Printf(`It goes on running; Ctrl-C ends it. In another terminal:

  a request from east's frontend to west's backend, and the certificates both saw:
    curl -si http://127.0.0.1:%d/ | head -12
  your own identity on a socket of its own, renewed before your eyes:
    .tools/bin/signet svid watch --socket %s/run/intruder.sock
  who got what in the last minute:
    .tools/bin/signet log find --config %s/server.yaml --since 1m
  is the log whole?
    .tools/bin/signet log verify --config %s/server.yaml
  what the server is doing:
    curl -s 'http://%s/readyz?verbose'

`, d.east.frontend.out, rel(d.east), rel(d.east), rel(d.east), d.east.HTTP)
}

// table is what was seen of each sidecar, by the root that it stood under.
func (r *rotating) table() {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "\nSIDECAR\tCERTIFICATES SEEN\tUNDER ROOT A\tB\tC\tPROVEN IN THE LOG")
	for _, s := range r.sidecars() {
		under := map[*root]int{}
		for serial := range r.seen.bySide[s] {
			if x := r.behind[serial]; x != nil {
				under[x.under]++
			}
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\tall\n", s, len(r.seen.bySide[s]), under[r.a], under[r.b], under[r.c])
	}
	w.Flush()
	fmt.Fprintln(w, "\nCLUSTER\tISSUERS, IN THEIR ORDER")
	for _, c := range r.clusters() {
		var names []string
		for _, x := range r.issuers[c] {
			name := x.String()
			if x == r.thief.issuer {
				name += " (stolen)"
			}
			names = append(names, name)
		}
		fmt.Fprintf(w, "%s\t%s\n", c.Name, strings.Join(names, ", "))
	}
	w.Flush()
	r.tableOfRequests(w)
}

// tryThis prints what a visitor may type while it all runs.
func (r *rotating) tryThis() {
	config := r.east.Config()
	fmt.Printf(`It goes on running; Ctrl-C ends it. In another terminal:

  where every CA stands, and who accepts what a thief forges:
    .tools/bin/signet rotation status --config %[1]s
  what a rotation of the intermediate would do, and one:
    .tools/bin/signet rotation plan --config %[1]s intermediate
    .tools/bin/signet rotation start --config %[1]s intermediate
  the banned workload, and letting it in again:
    .tools/bin/signet svid fetch --socket %[2]s
    .tools/bin/signet identity unban --config %[1]s %[3]s
  a request from east's frontend to west's backend, and the certificates both saw:
    curl -si http://127.0.0.1:%[4]d/ | head -12

`, config, r.east.Path("run", r.guest+".sock"), r.guestID, r.east.frontend.out)
}
