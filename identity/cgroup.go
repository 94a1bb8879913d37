package identity

import (
	"cmp"
	"errors"
	"path"
	"strings"
)

// parseCgroup returns the process's cgroup from /proc/PID/cgroup (cgroups(7)): that of the unified hierarchy, "0::/path",
// or systemd's own where version 1 is in use.
func parseCgroup(text []byte) (string, error) {
	var unified, systemd string
	for line := range strings.Lines(string(text)) {
		id, rest, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		controllers, cgroup, ok2 := strings.Cut(rest, ":")
		if !ok || !ok2 {
			return "", errors.New("/proc/PID/cgroup is not of the form ID:CONTROLLERS:PATH")
		}
		switch {
		case id == "0" && controllers == "":
			unified = cgroup
		case controllers == "name=systemd":
			systemd = cgroup
		}
	}
	cgroup := unified
	if unified == "" || unified == "/" {
		cgroup = cmp.Or(systemd, unified)
	}
	switch {
	case cgroup == "" || cgroup == "/":
		return "", errors.New("the process is in no cgroup but the root's")
	case strings.HasSuffix(cgroup, " (deleted)"):
		return "", errors.New("the process's cgroup has been removed")
	case strings.HasPrefix(cgroup, "/.."):
		return "", errors.New("the process's cgroup is outside the agent's cgroup namespace")
	case !path.IsAbs(cgroup) || path.Clean(cgroup) != cgroup:
		return "", errors.New("the process's cgroup has no plain path")
	}
	return cgroup, nil
}

// systemdUnit returns the system unit that a cgroup belongs to, "" if none: as systemd reads it, the first segment after the
// slices. Whatever is below a unit is made by whom it is delegated to, a user's own units below user@UID.service included,
// and may be called anything.
func systemdUnit(cgroup string) string {
	for segment := range strings.SplitSeq(strings.TrimPrefix(cgroup, "/"), "/") {
		if strings.HasSuffix(segment, ".slice") {
			continue
		}
		unit := strings.TrimPrefix(segment, "_") // systemd's escape where a unit is called like a file of the kernel
		if !strings.HasSuffix(unit, ".service") && !strings.HasSuffix(unit, ".scope") {
			return ""
		}
		if len(unit) > 255 || strings.HasPrefix(unit, ".") || strings.Trim(unit, unitCharacters) != "" {
			return ""
		}
		return unit
	}
	return ""
}

// unitCharacters are those of a unit's name (systemd.unit(5)).
const unitCharacters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:-_.\\@"
