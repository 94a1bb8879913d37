package main

import (
	"bytes"
	"cmp"
	_ "embed"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"
	"text/template"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/internal/durable"
)

//go:embed performance.md.tmpl
var page string

// number is short: three figures that count, no more than two after the point.
func number(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

func optional(v *float64) string {
	if v == nil {
		return "-"
	}
	return number(*v)
}

// cells are the columns of a row after its name.
func (f figure) cells() []string {
	spread, met := "-", "-"
	if f.most > f.least {
		spread = number(f.least) + "–" + number(f.most)
	}
	if f.Met != nil {
		met = "yes"
		if !*f.Met {
			met = "**no**"
		}
	}
	return []string{number(f.Value) + " " + f.Unit, optional(f.Floor), optional(f.Ratio), spread, optional(f.Mark), met}
}

var columns = []string{"value", "floor", "ratio", "runs", "mark", "met"}

func printTable(w io.Writer, all []figure) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, strings.ToUpper("what\t"+strings.Join(columns, "\t")))
	for _, f := range all {
		fmt.Fprintln(t, f.Name+"\t"+strings.ReplaceAll(strings.Join(f.cells(), "\t"), "*", ""))
	}
	t.Flush()
}

// write makes the three files.
func write(dir string, all []figure) error {
	for i := range all { // of what was measured, three figures count
		f := &all[i]
		f.Value = rounded(f.Value)
		for _, p := range []*float64{f.Floor, f.Ratio} {
			if p != nil {
				*p = rounded(*p)
			}
		}
	}
	list, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	text, err := markdown(all)
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{
		"performance.json": append(list, '\n'), "performance.md": text, "performance.svg": picture(all),
	} {
		if err := durable.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func rounded(v float64) float64 {
	r, err := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 4, 64), 64)
	if err != nil {
		return v
	}
	return r
}

func markdown(all []figure) ([]byte, error) {
	var table strings.Builder
	fmt.Fprintf(&table, "| what | %s |\n|---|%s\n", strings.Join(columns, " | "), strings.Repeat("---:|", len(columns)))
	missed := map[string]bool{}
	for _, f := range all {
		fmt.Fprintf(&table, "| %s | %s |\n", f.Name, strings.Join(f.cells(), " | "))
		if f.Met != nil && !*f.Met {
			missed[f.row] = true
		}
	}
	t, err := template.New("page").Parse(page)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = t.Execute(&out, map[string]any{"Table": table.String(), "Machine": machine(), "Day": time.Now().UTC().Format(time.DateOnly), "Missed": missed})
	return out.Bytes(), err
}

// machine says what matters of where it ran, and nothing that names it.
func machine() string {
	model := "unknown processor"
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				model = strings.TrimSpace(v)
				break
			}
		}
	}
	var name unix.Utsname
	kernel := "unknown kernel"
	if unix.Uname(&name) == nil {
		kernel = unix.ByteSliceToString(name.Sysname[:]) + " " + strings.SplitN(unix.ByteSliceToString(name.Release[:]), "-", 2)[0]
	}
	var info unix.Sysinfo_t
	memory := uint64(0)
	if unix.Sysinfo(&info) == nil {
		memory = info.Totalram * uint64(info.Unit) >> 30
	}
	load := ""
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		load = ", load at the end " + strings.Fields(string(text))[0]
	}
	return fmt.Sprintf("%d virtual cores (%s), %d GiB, log and state on %s, %s, %s%s",
		runtime.NumCPU(), model, memory, fileSystem(os.TempDir()), kernel, runtime.Version(), load)
}

func fileSystem(path string) string {
	var s unix.Statfs_t
	if unix.Statfs(path, &s) != nil {
		return "an unknown file system"
	}
	names := map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "XFS", unix.BTRFS_SUPER_MAGIC: "Btrfs", unix.TMPFS_MAGIC: "tmpfs", unix.OVERLAYFS_SUPER_MAGIC: "overlayfs"}
	return cmp.Or(names[int64(s.Type)], fmt.Sprintf("file system %#x", s.Type)) //nolint:unconvert // its width differs by platform
}

// picture draws each figure that has a ratio and a mark: the bar is the ratio, the line the mark, 1 is the floor.
func picture(all []figure) []byte {
	var shown []figure
	most := 0.0
	for _, f := range all {
		if f.Ratio != nil && f.Mark != nil {
			shown = append(shown, f)
			most = max(most, *f.Ratio, *f.Mark)
		}
	}
	most *= 1.08
	const width, left, top, rowHeight, barHeight = 860, 24, 64, 58, 20
	right := width - 90
	x := func(v float64) float64 { return left + v/most*float64(right-left) }
	height := top + rowHeight*len(shown) + 28
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" font-family="system-ui, sans-serif" font-size="13" role="img" aria-label="Ratios to floors and marks">
<rect width="100%%" height="100%%" fill="#ffffff"/>
<text x="%d" y="26" font-size="17" font-weight="600" fill="#1f2933">Ratio to the floor of the same run; shorter is better</text>
<text x="%d" y="46" fill="#52606d">green: within the mark · orange: beyond it · dark line: the mark · dotted line: the floor itself</text>
`, width, height, width, height, left, left)
	for i, f := range shown {
		y := top + i*rowHeight
		colour := "#2f9e62"
		if !*f.Met {
			colour = "#e07b1f"
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d" fill="#1f2933">%s</text>
<rect x="%d" y="%d" width="%.1f" height="%d" rx="2" fill="%s"/>
<rect x="%.1f" y="%d" width="3" height="%d" fill="#1f2933"/>
<text x="%.1f" y="%d" fill="#1f2933" font-weight="600">%.2f</text><text x="%d" y="%d" fill="#52606d" text-anchor="end">mark %.2f</text>
`,
			left, y+14, html.EscapeString(f.Name),
			left, y+22, x(*f.Ratio)-left, barHeight, colour,
			x(*f.Mark)-1.5, y+18, barHeight+8,
			max(x(*f.Ratio), x(*f.Mark))+8, y+37, *f.Ratio, width-left, y+37, *f.Mark)
	}
	fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#7b8794" stroke-dasharray="2 4"/>
<text x="%.1f" y="%d" fill="#52606d" text-anchor="middle">1.00</text>
</svg>
`, x(1), x(1), top, height-24, x(1), height-10)
	return b.Bytes()
}
