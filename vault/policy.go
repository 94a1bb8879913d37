package vault

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
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
	// Asks are the paths that will be used, where Path is wider than these; none = Path itself.
	Asks []string
	// Parameters are all that may be given in a change, with the values that each may have, none = any; nil = whatever there is.
	Parameters map[string][]string
}

// capabilities in the order in which policies are written.
var capabilities = []string{"create", "read", "update", "patch", "delete", "list", "sudo"}

// Needs are those of the connection itself. Vault's policy "default" has them too, but not each role has that.
func Needs() []Need {
	return []Need{
		{lookupPath, []string{"read"}, "learn how long the token lives, and whether it does", nil, nil},
		{"auth/token/renew-self", []string{"update"}, "keep the token alive", nil, nil},
		{capabilitiesPath, []string{"update"}, "tell at the start what this policy lacks", nil, nil},
	}
}

const (
	capabilitiesPath = "sys/capabilities-self"
	// pathsPerCall keeps request and answer small.
	pathsPerCall = 100
)

// Missing asks Vault which of the needs our token does not have, and returns those with what is lacking of each. Where a need
// has paths to ask for, and some are allowed, it names the others in place of its own: a policy may be tighter than ours.
func (c *Client) Missing(ctx context.Context, needs []Need) ([]Need, error) {
	merged := merge(needs)
	asks := make([][]Need, len(merged))
	var paths []string
	for i, m := range merged {
		asks[i] = m.asked(needs)
		for _, a := range asks[i] {
			paths = append(paths, a.Path)
		}
	}
	slices.Sort(paths)
	has := map[string][]string{}
	for chunk := range slices.Chunk(slices.Compact(paths), pathsPerCall) {
		body, err := json.Marshal(map[string]any{"paths": chunk})
		if err != nil {
			return nil, err
		}
		secret, err := c.call(ctx, request{op: opWrite, path: capabilitiesPath, body: body})
		if err != nil {
			return nil, fmt.Errorf("ask for our own permissions: %w", err)
		}
		for _, path := range chunk {
			ok := false
			if secret != nil {
				has[path], ok = stringsOf(secret.Data[path])
			}
			if !ok {
				return nil, fmt.Errorf("ask for our own permissions: Vault at %s does not answer for %s", c.address, path)
			}
		}
	}
	var missing []Need
	for i, m := range merged {
		whole := Need{Path: m.Path, Why: m.Why}
		var parts []Need
		for _, a := range asks[i] {
			if lacks := lacking(a.Capabilities, has[a.Path]); len(lacks) > 0 {
				parts = append(parts, Need{Path: a.Path, Capabilities: lacks, Why: m.Why})
				whole.Capabilities = append(whole.Capabilities, lacks...)
			}
		}
		if len(parts) == len(asks[i]) {
			whole.Capabilities = inOrder(whole.Capabilities)
			parts = []Need{whole}
		}
		missing = append(missing, parts...)
	}
	return missing, nil
}

// asked is what to ask Vault for a path of the policy: the paths that its needs name, each with what they need there.
func (n Need) asked(needs []Need) (all []Need) {
	at := map[string]int{}
	add := func(path string, capabilities []string) {
		i, ok := at[path]
		if !ok {
			i = len(all)
			at[path] = i
			all = append(all, Need{Path: path})
		}
		all[i].Capabilities = inOrder(append(all[i].Capabilities, capabilities...))
	}
	for _, one := range needs {
		switch {
		case one.Path != n.Path:
		case len(one.Asks) == 0:
			add(n.Path, n.Capabilities)
		default:
			for _, path := range one.Asks {
				add(path, one.Capabilities)
			}
		}
	}
	return all
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
		fmt.Fprintf(&b, "path %s {\n  capabilities = [%s]\n", strconv.Quote(n.Path), strings.Join(quoted, ", "))
		if n.Parameters != nil {
			b.WriteString("  allowed_parameters = {\n")
			for _, name := range slices.Sorted(maps.Keys(n.Parameters)) {
				values := make([]string, len(n.Parameters[name]))
				for j, v := range n.Parameters[name] {
					values[j] = strconv.Quote(v)
				}
				fmt.Fprintf(&b, "    %s = [%s]\n", strconv.Quote(name), strings.Join(values, ", "))
			}
			b.WriteString("  }\n")
		}
		b.WriteString("}\n")
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
		out[i].Parameters = parametersOf(p, needs)
	}
	return out
}

// parametersOf are what all needs of a path that change something may give, together; nil once one may give anything.
func parametersOf(path string, needs []Need) (all map[string][]string) {
	for _, n := range needs {
		changes := slices.ContainsFunc(n.Capabilities, func(c string) bool { return c == "create" || c == "update" || c == "patch" })
		switch {
		case n.Path != path && !covers(n.Path, path) || !changes:
			continue
		case n.Parameters == nil:
			return nil
		case all == nil:
			all = map[string][]string{}
		}
		for name, values := range n.Parameters {
			if before, known := all[name]; known && (len(before) == 0 || len(values) == 0) {
				values = nil
			} else {
				values = slices.Concat(before, values)
				slices.Sort(values)
			}
			all[name] = slices.Compact(values)
		}
	}
	return all
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
