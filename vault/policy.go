package vault

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Need is what a policy in Vault must allow us.
type Need struct {
	// Path as in a policy: it may end in * and have + for a segment.
	Path string
	// Capabilities are Vault's words: create, read, update, patch, delete, list, sudo.
	Capabilities []string
	// Why says in a line what it is for.
	Why string
}

// capabilities in the order in which policies are written.
var capabilities = []string{"create", "read", "update", "patch", "delete", "list", "sudo"}

// Needs are those of the connection itself. Vault's policy "default" has them too, but not each role has that.
func Needs() []Need {
	return []Need{
		{lookupPath, []string{"read"}, "learn how long the token lives, and whether it does"},
		{"auth/token/renew-self", []string{"update"}, "keep the token alive"},
		{capabilitiesPath, []string{"update"}, "tell at the start what this policy lacks"},
	}
}

const (
	capabilitiesPath = "sys/capabilities-self"
	// pathsPerCall keeps request and answer small.
	pathsPerCall = 100
)

// Missing asks Vault which of the needs our token does not have, and returns those with what is lacking of each.
func (c *Client) Missing(ctx context.Context, needs []Need) ([]Need, error) {
	merged := merge(needs)
	var missing []Need
	for chunk := range slices.Chunk(merged, pathsPerCall) {
		paths := make([]string, len(chunk))
		for i := range chunk {
			paths[i] = chunk[i].Path
		}
		body, err := json.Marshal(map[string]any{"paths": paths})
		if err != nil {
			return nil, err
		}
		secret, err := c.call(ctx, request{op: opWrite, path: capabilitiesPath, body: body})
		if err != nil {
			return nil, fmt.Errorf("ask for our own permissions: %w", err)
		}
		for _, n := range chunk {
			var has []string
			ok := false
			if secret != nil {
				has, ok = stringsOf(secret.Data[n.Path])
			}
			if !ok {
				return nil, fmt.Errorf("ask for our own permissions: Vault at %s does not answer for %s", c.address, n.Path)
			}
			if lacks := lacking(n.Capabilities, has); len(lacks) > 0 {
				missing = append(missing, Need{Path: n.Path, Capabilities: lacks, Why: n.Why})
			}
		}
	}
	return missing, nil
}

func lacking(want, has []string) []string {
	if slices.Contains(has, "root") {
		return nil
	}
	var out []string
	for _, w := range want {
		if !slices.Contains(has, w) {
			out = append(out, w)
		}
	}
	return out
}

// Policy writes the smallest policy that has the needs, in HCL: sorted, each path once, with what it is for.
func Policy(needs []Need) string {
	var b strings.Builder
	for i, n := range merge(needs) {
		if i > 0 {
			b.WriteByte('\n')
		}
		for why := range strings.SplitSeq(n.Why, "; ") {
			fmt.Fprintf(&b, "# %s\n", clean(why))
		}
		quoted := make([]string, len(n.Capabilities))
		for j, c := range n.Capabilities {
			quoted[j] = strconv.Quote(c)
		}
		fmt.Fprintf(&b, "path %s {\n  capabilities = [%s]\n}\n", strconv.Quote(n.Path), strings.Join(quoted, ", "))
	}
	return b.String()
}

// merge has each path once, sorted. A path has the capabilities of the wider ones that cover it as well, because Vault
// applies the most specific rule alone.
func merge(needs []Need) []Need {
	byPath := map[string]*Need{}
	var paths []string
	for _, n := range needs {
		m := byPath[n.Path]
		if m == nil {
			m = &Need{Path: n.Path}
			byPath[n.Path] = m
			paths = append(paths, n.Path)
		}
		m.Capabilities = append(m.Capabilities, n.Capabilities...)
		if !slices.Contains(strings.Split(m.Why, "; "), n.Why) {
			m.Why = strings.TrimPrefix(m.Why+"; "+n.Why, "; ")
		}
	}
	slices.Sort(paths)
	out := make([]Need, len(paths))
	for i, p := range paths {
		out[i] = *byPath[p]
		for _, n := range needs {
			if covers(n.Path, p) {
				out[i].Capabilities = append(out[i].Capabilities, n.Capabilities...)
			}
		}
		out[i].Capabilities = inOrder(out[i].Capabilities)
	}
	return out
}

func inOrder(have []string) []string {
	slices.SortFunc(have, func(a, b string) int {
		return cmp.Or(slices.Index(capabilities, a)-slices.Index(capabilities, b), strings.Compare(a, b))
	})
	return slices.Compact(have)
}

// covers reports whether a rule for pattern would match path, were there none for path itself.
func covers(pattern, path string) bool {
	prefix, glob := strings.CutSuffix(pattern, "*")
	want, have := strings.Split(prefix, "/"), strings.Split(path, "/")
	if len(have) < len(want) || !glob && len(have) != len(want) {
		return false
	}
	for i, w := range want {
		last := glob && i == len(want)-1
		switch {
		case w == "+" && !last, w == have[i]:
		case last && strings.HasPrefix(have[i], w):
		default:
			return false
		}
	}
	return true
}
