package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/signet-ca/signet/rotation"
)

func build(ctx context.Context, signet string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", signet, "./cmd/signet")
	cmd.Stderr = os.Stderr
	return cmd.Run()
}

// inProcess runs the benchmarks that stand beside the issuer. Each reports µs of CPU per leaf and its ratio to a floor that
// it measures itself, in turn with the work, so that both see the same machine.
//
// Where the marks are, one core does the work, as it does the floor: two virtual cores are mostly two threads of one real
// core, and what runs on both at once costs each more, which says nothing about the work.
func inProcess(ctx context.Context, b *bench) ([]figure, error) {
	leaves := "24576x"
	if b.quick {
		leaves = "4096x"
	}
	var figures []figure
	for _, r := range []struct {
		bench, name string
		cores       int
		memory      bool // the log on a memory file system
		mark        float64
	}{
		{"BenchmarkLeaf", "CPU per leaf in-process, without the log, one core", 1, false, 1.15},
		{"BenchmarkLeafLogged", "CPU per leaf in-process, with the log on disk, 256 in flight, one core", 1, false, 1.35},
		{"BenchmarkLeafLogged", "CPU per leaf in-process, with the log on disk, 256 in flight, both cores", 2, false, 0},
		{"BenchmarkLeafLogged", "CPU per leaf in-process, with the log on a memory file system, 256 in flight, one core", 1, true, 0},
	} {
		env := append(os.Environ(), "GOGC=400", "GOMAXPROCS="+strconv.Itoa(r.cores)) // GOGC as signet serve runs
		if r.memory {
			if _, err := os.Stat("/dev/shm"); err != nil {
				continue
			}
			env = append(env, "TMPDIR=/dev/shm")
		}
		out, err := goBench(ctx, env, "./ca", r.bench, leaves, b.runs)
		if err != nil {
			return nil, err
		}
		micros, ratios := out["cpu-µs/leaf"], out["xF"]
		if len(ratios) == 0 {
			return nil, fmt.Errorf("%s printed no ratio", r.bench)
		}
		// The run with the median ratio: its value and floor belong together.
		order := make([]int, len(ratios))
		for i := range order {
			order[i] = i
		}
		slices.SortFunc(order, func(i, j int) int {
			if ratios[i] < ratios[j] {
				return -1
			}
			return 1
		})
		mid := order[len(order)/2]
		figures = append(figures, figure{Name: r.name, Value: micros[mid], Unit: "µs CPU"}.against(micros[mid]/ratios[mid], r.mark).spread(ratios))
	}
	return figures, nil
}

// goBench runs one benchmark and returns what it printed, by unit.
func goBench(ctx context.Context, env []string, pkg, name, count string, runs int) (map[string][]float64, error) {
	cmd := exec.CommandContext(ctx, "go", "test", pkg, "-run", "^$", "-bench", "^"+name+"$", "-benchtime", count, "-count", strconv.Itoa(runs))
	cmd.Env, cmd.Stderr = env, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, out)
	}
	values := map[string][]float64{}
	line := regexp.MustCompile(`^` + name + `(-\d+)?\s`)
	for s := bufio.NewScanner(strings.NewReader(string(out))); s.Scan(); {
		if !line.MatchString(s.Text()) {
			continue
		}
		fields := strings.Fields(s.Text())
		for i := 3; i < len(fields); i += 2 {
			v, err := strconv.ParseFloat(fields[i-1], 64)
			if err != nil {
				return nil, err
			}
			values[fields[i]] = append(values[fields[i]], v)
		}
	}
	return values, nil
}

// renewalSpread simulates a fleet that got all its certificates at the same moment.
func renewalSpread(context.Context, *bench) ([]figure, error) {
	const fleet = 100_000
	start := time.Unix(0, 0)
	end := start.Add(24 * time.Hour)
	at := make([]time.Duration, fleet)
	first, last := end.Sub(start), time.Duration(0)
	for i := range at {
		at[i] = rotation.RenewAt(binary.BigEndian.AppendUint64(nil, uint64(i)), start, end).Sub(start)
		first, last = min(first, at[i]), max(last, at[i])
	}
	slices.Sort(at)
	used := 100 * float64(at[fleet*95/100]-at[fleet*5/100]) / float64(last-first)
	var hours [24 * 60]int
	most := 0
	for _, t := range at {
		n := int(t / time.Minute)
		hours[n]++
		most = max(most, hours[n])
	}
	return []figure{
		figure{Name: "renewals of 100,000 identities issued at once (simulated, 24 h): part of the window that the middle 90 % uses, at least", Value: used, Unit: "%"}.atLeast(80),
		{Name: "renewals of 100,000 identities issued at once: in the busiest minute", Value: float64(most), Unit: "renewals"},
	}, nil
}
