// Command bench measures what Signet costs and prints each figure as a ratio to a floor of the same run, since machines
// differ and are noisy. The floor F is the CPU that any CA spends on a leaf: parse a CSR, verify it, make one P-256
// signature, on one core.
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

func init() { runtime.LockOSThread() } // children follow the thread that started them, see lab.Start

// figure is one row: value in µs of CPU per certificate, ratio to F, and the mark it has to reach.
type figure struct {
	name        string
	value       float64
	ratio, mark float64
}

func main() {
	signet := flag.String("signet", ".tools/bin/signet", "the signet binary")
	seconds := flag.Int("seconds", 8, "length of each gRPC measurement")
	runs := flag.Int("runs", 3, "runs of each; the median counts")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	figures, err := measure(ctx, *signet, time.Duration(*seconds)*time.Second, *runs)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "WHAT\tCPU µs PER CERTIFICATE\tRATIO TO F\tMARK\tMET")
	for _, f := range figures {
		met := "yes"
		if f.mark > 0 && f.ratio > f.mark {
			met = "NO"
		}
		mark := fmt.Sprintf("%.2f", f.mark)
		if f.mark == 0 {
			met, mark = "-", "-"
		}
		fmt.Fprintf(w, "%s\t%.1f\t%.2f\t%s\t%s\n", f.name, f.value, f.ratio, mark, met)
	}
	w.Flush()
}

func measure(ctx context.Context, signet string, length time.Duration, runs int) ([]figure, error) {
	inProcess, floor, err := inProcess(ctx, runs)
	if err != nil {
		return nil, fmt.Errorf("in-process figures: %w", err)
	}
	dir, err := os.MkdirTemp("", "signet-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	overWire, err := overWire(ctx, filepath.Join(dir, "lab"), signet, length, runs)
	if err != nil {
		return nil, fmt.Errorf("gRPC figures: %w", err)
	}
	all := append([]figure{{name: "F: parse a CSR, verify it, one P-256 signature, one core", value: floor, ratio: 1}}, inProcess...)
	for _, f := range overWire {
		f.ratio = f.value / floor
		all = append(all, f)
	}
	return all, nil
}

// inProcess runs the benchmarks that stand beside the issuer. Each reports µs/cert of CPU and its ratio to a floor that it
// measures itself, in turn with the work, so that both see the same machine.
func inProcess(ctx context.Context, runs int) ([]figure, float64, error) {
	marks := []struct {
		bench, name string
		mark        float64
	}{
		{"BenchmarkLeaf", "leaf in-process, without the log", 1.15},
		{"BenchmarkLeafLogged", "leaf in-process, with the log, 256 in flight", 1.35},
	}
	cmd := exec.CommandContext(ctx, "go", "test", "./ca", "-run", "^$", "-bench", "^BenchmarkLeaf(Logged)?$", "-benchtime", "16384x", "-count", strconv.Itoa(runs))
	cmd.Env = append(os.Environ(), "GOGC=400") // as signet serve runs
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %s", err, out)
	}
	micros, ratios := map[string][]float64{}, map[string][]float64{}
	line := regexp.MustCompile(`^(Benchmark\S+?)(?:-\d+)?\s`)
	for s := bufio.NewScanner(strings.NewReader(string(out))); s.Scan(); {
		m := line.FindStringSubmatch(s.Text())
		if m == nil {
			continue
		}
		fields := strings.Fields(s.Text())
		for i := 1; i < len(fields); i++ {
			v, err := strconv.ParseFloat(fields[i-1], 64)
			if err != nil {
				continue
			}
			switch fields[i] {
			case "cpu-µs/leaf":
				micros[m[1]] = append(micros[m[1]], v)
			case "xF":
				ratios[m[1]] = append(ratios[m[1]], v)
			}
		}
	}
	var figures []figure
	var floors []float64
	for _, m := range marks {
		if len(ratios[m.bench]) == 0 {
			return nil, 0, fmt.Errorf("no %s in: %s", m.bench, out)
		}
		figures = append(figures, figure{m.name, median(micros[m.bench]), median(ratios[m.bench]), m.mark})
		for i, ratio := range ratios[m.bench] {
			floors = append(floors, micros[m.bench][i]/ratio)
		}
	}
	return figures, median(floors), nil
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
