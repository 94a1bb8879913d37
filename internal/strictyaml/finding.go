package strictyaml

import (
	"fmt"
	"strings"
)

// Finding is one thing that is wrong with a file.
type Finding struct {
	File string `json:"file"`
	// Line and Column count from 1; 0 = the finding is about what is not there.
	Line   int `json:"line,omitempty"`
	Column int `json:"column,omitempty"`
	// Key is the path of the value, "leaf.ttl", if there is one.
	Key     string `json:"key,omitempty"`
	Message string `json:"message"`
}

// Place is file:line:column as compilers write it, as far as it is known.
func (f Finding) Place() string {
	switch {
	case f.Line == 0:
		return f.File
	case f.Column == 0:
		return fmt.Sprintf("%s:%d", f.File, f.Line)
	}
	return fmt.Sprintf("%s:%d:%d", f.File, f.Line, f.Column)
}

func (f Finding) String() string {
	if f.File == "" {
		return f.Message
	}
	return f.Place() + ": " + f.Message
}

// Findings is all that is wrong with a file, in its order, one a line.
type Findings []Finding

func (f Findings) Error() string {
	lines := make([]string, len(f))
	for i, one := range f {
		lines[i] = one.String()
	}
	return strings.Join(lines, "\n")
}
