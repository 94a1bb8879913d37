//go:build soak

package faults

import "testing"

// calls are the system calls by which anything gets onto a disk, or a lock is taken.
var calls = []string{
	"openat", "open", "write", "pwrite64", "fsync", "fdatasync", "renameat", "linkat", "unlinkat", "unlink", "mkdirat",
	"ftruncate", "fchmod", "utimensat", "fcntl", "flock",
}

// most bounds a sweep of one call, should its calls never end.
const most = 200

func TestNothingIsLostByAKillAtAnyCall(t *testing.T) {
	needsStrace(t)
	for _, p := range phases {
		t.Run(p.name, func(t *testing.T) {
			s := newSite(t)
			total := 0
			for _, call := range calls {
				// Counts are per thread, and threads share the work differently each time: one miss does not mean the end.
				n, missed := 1, 0
				for ; n <= most && missed < 2 && !t.Failed(); n++ {
					if p.try(t, s, call, n) {
						total, missed = total+1, 0
					} else {
						missed++
					}
					s.judge(t)
				}
				t.Logf("%s: killed at calls up to the %dth of a thread", call, n-1-missed)
			}
			if total < 20 {
				t.Errorf("only %d kills", total)
			}
			t.Logf("%d kills", total)
			s.verify(t)
		})
	}
}
