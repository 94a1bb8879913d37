package identity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// DescribePID says which selectors the process of that PID would show if it connected now as it is now. It is for
// diagnosis and for nothing else: uid, gid and groups come from /proc, where they are those of this moment, and a PID says
// nothing about who connects later. Nothing is granted by it.
func (a *UnixAttestor) DescribePID(ctx context.Context, pid int) (Workload, error) {
	fail := func(err error) (Workload, error) { return Workload{}, fmt.Errorf("look at pid %d: %w", pid, err) }
	if pid <= 0 {
		return fail(errors.New("a PID is greater than zero"))
	}
	p := peer{pidfd: -1, Ucred: unix.Ucred{Pid: int32(pid)}} //nolint:gosec // the kernel's are below 2^22
	var err error
	if a.pidfds {
		if p.pidfd, err = unix.PidfdOpen(pid, 0); errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
			return fail(errors.New("there is no such process"))
		} else if err != nil {
			return fail(err)
		}
	}
	h, err := hold(p)
	if err != nil {
		return fail(err)
	}
	defer h.close()
	status, err := h.read("status")
	if err != nil {
		return fail(err)
	}
	if p.Uid, p.Gid, p.groups, err = parseStatus(status); err != nil {
		return fail(err)
	}
	w, err := a.attest(ctx, p, h)
	if err != nil {
		return fail(err)
	}
	w.Alive, w.Close = nil, nil
	return w, nil
}

// parseStatus reads effective uid and gid, which are what SO_PEERCRED shows, and the groups of /proc/PID/status (proc(5)).
func parseStatus(text []byte) (uid, gid uint32, groups []uint32, err error) {
	var gotUID, gotGID bool
	number := func(b []byte) (uint32, bool) {
		n, err := strconv.ParseUint(string(b), 10, 32)
		return uint32(n), err == nil
	}
	for line := range bytes.Lines(text) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		fields := bytes.Fields(value)
		switch string(name) {
		case "Uid":
			if len(fields) == 4 {
				uid, gotUID = number(fields[1])
			}
		case "Gid":
			if len(fields) == 4 {
				gid, gotGID = number(fields[1])
			}
		case "Groups":
			for _, f := range fields {
				if g, ok := number(f); ok && len(groups) < maxGroups {
					groups = append(groups, g)
				}
			}
		}
	}
	if !gotUID || !gotGID {
		return 0, 0, nil, errors.New("/proc/PID/status names no user and group")
	}
	slices.Sort(groups)
	return uid, gid, slices.Compact(groups), nil
}
