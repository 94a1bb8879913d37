package strictyaml

import (
	"fmt"
	"reflect"
	"strings"
)

// DidYouMean is "; did you mean …?" with the word that was probably meant, or "".
func DidYouMean(got string, known []string) string {
	if name, ok := nearest(got, known); ok {
		return fmt.Sprintf("; did you mean %q?", name)
	}
	return ""
}

// pathsTo lists where else in a file a key is known.
func pathsTo(name, key string, t reflect.Type) []string {
	var paths []string
	for _, f := range fieldsOf(t) {
		path, of := join(key, f.key), f.Type
		if f.key == name {
			paths = append(paths, path)
		}
		if of.Kind() == reflect.Slice {
			path, of = path+"[]", of.Elem()
		}
		if isSection(of) {
			paths = append(paths, pathsTo(name, path, of)...)
		}
	}
	return paths
}

// nearest returns the known word that a third of its letters, at most, tells from the given one.
func nearest(got string, known []string) (string, bool) {
	best, least := "", 0
	for _, k := range known {
		if len(got) > 2*len(k) {
			continue
		}
		got := strings.ReplaceAll(strings.ToLower(got), "-", "_")
		if d := distance(got, k); d <= max(1, len(k)/3) && (best == "" || d < least) {
			best, least = k, d
		}
	}
	return best, best != ""
}

// distance counts the letters to insert, drop, change or swap with their neighbour (optimal string alignment).
func distance(a, b string) int {
	prev2, prev, cur := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], prev2[j-2]+1)
			}
		}
		prev2, prev, cur = prev, cur, prev2
	}
	return prev[len(b)]
}
