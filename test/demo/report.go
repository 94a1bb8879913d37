package main

import (
	"fmt"
	"os"
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
	fmt.Fprintln(w, "\nREQUESTS\tFAILED\tREFUSED ATTEMPTS\tPROOFS\tSECONDS")
	fmt.Fprintf(w, "%d\t%d\t%d\t%d\t%.1f\n", d.requests(), d.seen.failures[d.east]+d.seen.failures[d.west], d.refused, d.proven, time.Since(d.started).Seconds())
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

`, d.east.frontend.port, rel(d.east), rel(d.east), rel(d.east), d.east.HTTP)
}
