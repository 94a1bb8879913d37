package main

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"golang.org/x/term"
)

const (
	gap = "   "
	// leastText is how narrow the last column may become before others do, leastWidth how narrow any.
	leastText  = 60
	leastWidth = 16
	// inset is what stands before what is set below a row.
	inset = "      "
)

// column is one of a table's, with a cell for each row.
type column struct {
	name string
	// kind is '>' for what may be set below its row, '~' for what may be left out.
	kind  byte
	cells []string
}

func (c column) width() int {
	w := visible(c.name)
	for _, cell := range c.cells {
		w = max(w, visible(cell))
	}
	return w
}

// table is laid out for a width; 0 = each row is one line, however long.
type table struct {
	width   int
	columns []column
}

func (t *table) fits() bool {
	sum := len(gap) * (len(t.columns) - 1)
	for _, c := range t.columns {
		sum += c.width()
	}
	return t.width == 0 || sum <= t.width
}

// text is the table. Where it is too wide, what may be is set below its row, then what may be left out is, and at last cells
// are broken into lines.
func (t *table) text(rows int) string {
	var below []column
	if !t.fits() {
		below = slices.DeleteFunc(slices.Clone(t.columns), func(c column) bool { return c.kind != '>' })
		t.columns = slices.DeleteFunc(t.columns, func(c column) bool { return c.kind == '>' })
	}
	for i := len(t.columns) - 1; i >= 0 && !t.fits(); i-- {
		if t.columns[i].kind == '~' {
			t.columns = slices.Delete(t.columns, i, i+1)
		}
	}
	widths := t.widths()
	var b strings.Builder
	line := func(cell func(column) string) {
		lines := make([][]string, len(t.columns))
		most := 1
		for i, c := range t.columns {
			lines[i] = broken(cell(c), widths[i])
			most = max(most, len(lines[i]))
		}
		for n := range most {
			var row strings.Builder
			for i := range t.columns {
				text := ""
				if n < len(lines[i]) {
					text = lines[i][n]
				}
				row.WriteString(text)
				if i < len(t.columns)-1 {
					row.WriteString(strings.Repeat(" ", widths[i]-visible(text)) + gap)
				}
			}
			b.WriteString(strings.TrimRight(row.String(), " ") + "\n")
		}
	}
	line(func(c column) string { return c.name })
	for r := range rows {
		line(func(c column) string { return c.cells[r] })
		for _, c := range below {
			if c.cells[r] == "-" {
				continue
			}
			for n, text := range broken(strings.ToLower(c.name)+": "+c.cells[r], t.width-2*len(inset)) {
				b.WriteString(inset)
				if n > 0 {
					b.WriteString(inset)
				}
				b.WriteString(text + "\n")
			}
		}
	}
	return b.String()
}

// widths are those of the columns: where they don't fit, the widest give way, the last one first down to leastText.
func (t *table) widths() []int {
	over := -t.width + len(gap)*(len(t.columns)-1)
	all := make([]int, len(t.columns))
	for i, c := range t.columns {
		all[i] = c.width()
		over += all[i]
	}
	if t.width == 0 || len(all) == 0 {
		return all
	}
	give := func(i, least int) {
		by := min(over, all[i]-least)
		if by > 0 {
			all[i], over = all[i]-by, over-by
		}
	}
	give(len(all)-1, leastText)
	for over > 0 {
		widest := slices.Index(all, slices.Max(all))
		if all[widest] <= leastWidth {
			break // there is no room for a table
		}
		give(widest, leastWidth)
	}
	return all
}

// broken cuts a text into lines at its spaces, and where a word is too long after a slash of it, or anywhere.
func broken(text string, width int) (lines []string) {
	for visible(text) > width {
		// What follows may be a space, which goes with the end of the line.
		cut := []rune(text)[:width+1]
		at := lastOf(cut, ' ', width)
		if at <= 0 {
			if at = lastOf(cut, '/', width-1) + 1; at <= 1 {
				at = width
			}
		}
		head := string(cut[:at])
		lines = append(lines, strings.TrimRight(head, " "))
		text = strings.TrimLeft(text[len(head):], " ")
	}
	return append(lines, text)
}

// lastOf is where a rune stands last, not after the given place; -1 = nowhere.
func lastOf(text []rune, r rune, upTo int) int {
	for i := min(upTo, len(text)-1); i >= 0; i-- {
		if text[i] == r {
			return i
		}
	}
	return -1
}

var painting = regexp.MustCompile("\x1b\\[[0-9;]*m")

// visible is how many places a text takes on a terminal.
func visible(text string) int {
	if strings.Contains(text, "\x1b") {
		text = painting.ReplaceAllString(text, "")
	}
	return utf8.RuneCountInString(text)
}

// width is how wide a table may be; 0 = there is no end to it, since nobody reads it on a terminal.
func (c *cli) width() int {
	if c.columns > 0 {
		return c.columns
	}
	f, ok := c.out.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0
	}
	w, _, err := term.GetSize(int(f.Fd()))
	if err != nil || w <= 0 {
		return 0
	}
	return w
}
