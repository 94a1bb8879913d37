// Command bench measures what Signet costs and prints each figure as a ratio to a floor of the same run, since machines
// differ and are noisy. A run of all rows also writes docs/performance.md, .json and .svg.
//
// The floor F of the first rows is the CPU that any CA spends on a leaf: parse a CSR, verify it, make one P-256 signature,
// on one core. The floor of the rows about streams is a bare grpc-go server that sends the same bytes over the same
// connections, to the same clients.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"slices"
	"syscall"
	"time"
)

func init() { runtime.LockOSThread() } // children follow the thread that started them, see lab.Start

// figure is one row. The mark is for the ratio, or for the value where there is no floor. Without a mark a figure is told
// and not judged.
type figure struct {
	Name  string   `json:"name"`
	Value float64  `json:"value"`
	Unit  string   `json:"unit"`
	Floor *float64 `json:"floor"`
	Ratio *float64 `json:"ratio"`
	Mark  *float64 `json:"mark"`
	Met   *bool    `json:"met"`

	// row is the key of what measured it, and least and most are of the runs whose median counts, of what is judged.
	row         string
	least, most float64
}

// against judges a figure by its ratio to a floor; mark 0 = none.
func (f figure) against(floor, mark float64) figure {
	ratio := f.Value / floor
	f.Floor, f.Ratio = &floor, &ratio
	if mark > 0 {
		met := ratio <= mark
		f.Mark, f.Met = &mark, &met
	}
	return f
}

// atMost and atLeast judge a figure by its value.
func (f figure) atMost(mark float64) figure {
	met := f.Value <= mark
	f.Mark, f.Met = &mark, &met
	return f
}

func (f figure) atLeast(mark float64) figure {
	met := f.Value >= mark
	f.Mark, f.Met = &mark, &met
	return f
}

// spread notes the extremes of the runs.
func (f figure) spread(runs []float64) figure {
	f.least, f.most = slices.Min(runs), slices.Max(runs)
	return f
}

// bench is what the rows share.
type bench struct {
	signet string
	dir    string
	quick  bool
	runs   int
	// length of one measurement that goes on for a while.
	length time.Duration
}

// rows in the order of the table.
var rows = []struct {
	key string
	run func(context.Context, *bench) ([]figure, error)
}{
	{"leaf", inProcess},
	{"grpc", overWire},
	{"cold", coldStart},
	{"memory", memory},
	{"trust", trustChange},
	{"agents", trustToAgents},
	{"restart", restart},
	{"spread", renewalSpread},
	{"reissue", reissue},
	{"lost", lost},
	{"vault", vaultAway},
	{"transit", vaultSignatures},
}

func main() {
	if os.Getenv(partVariable) != "" {
		if err := part(os.Getenv(partVariable)); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	signet := flag.String("signet", ".tools/bin/signet", "the signet binary; it is built anew before the run unless -built")
	built := flag.Bool("built", false, "take the signet binary as it is")
	only := flag.String("only", "", "measure the rows whose key matches this `regexp` (leaf grpc cold memory trust agents restart spread reissue lost vault transit); nothing is written")
	quick := flag.Bool("quick", false, "fewer and smaller runs, to see that all rows work; nothing is written")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *signet, *built, *only, *quick); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, signet string, built bool, only string, quick bool) error {
	wanted, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	if !built {
		if err := build(ctx, signet); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp("", "signet-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &bench{signet: signet, dir: dir, quick: quick, runs: 5, length: 6 * time.Second}
	if quick {
		b.runs, b.length = 1, 2*time.Second
	}
	var all []figure
	begun := time.Now()
	for _, r := range rows {
		if !wanted.MatchString(r.key) {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s …\n", r.key)
		figures, err := r.run(ctx, b)
		if err != nil {
			return fmt.Errorf("%s: %w", r.key, err)
		}
		for _, f := range figures {
			f.row = r.key
			all = append(all, f)
		}
	}
	printTable(os.Stdout, all)
	fmt.Fprintf(os.Stderr, "in %s\n", time.Since(begun).Round(time.Second))
	if only != "" || quick {
		return nil
	}
	return write("docs", all)
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
