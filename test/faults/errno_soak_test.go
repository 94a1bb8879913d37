//go:build soak

package faults

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// TestNothingIsReleasedThatADiskDidNotTake fails a call each time that it is made.
func TestNothingIsReleasedThatADiskDidNotTake(t *testing.T) {
	needsStrace(t)
	for _, errno := range []string{"EIO", "ENOSPC", "EROFS", "EDQUOT"} {
		t.Run(errno, func(t *testing.T) {
			s := newSite(t)
			for _, call := range failing[errno] {
				// By its name, write is also what sockets and the runtime's own descriptors are served with, and so is read. For files,
				// a disk that is really full, or read only, fails them.
				if !slices.Contains(anyDescriptor, call) {
					s.failed(t, call, errno, "")
				}
			}
			s.verify(t)
		})
	}
}

// sweepShards of each sweep run as tests of their own, as many at once as -parallel says; sweepLimit is what one may take.
const (
	sweepShards = 8
	sweepLimit  = 12 * time.Minute
)

// TestOneFailedCallReleasesNothing fails each call of a start, an issuance and an enrolment, one at a time.
func TestOneFailedCallReleasesNothing(t *testing.T) {
	needsStrace(t)
	for _, errno := range []string{"EIO", "EROFS", "EDQUOT", "ENOSPC"} {
		t.Run(errno, func(t *testing.T) {
			for _, p := range failures {
				t.Run(p.name, func(t *testing.T) {
					for shard := range sweepShards {
						t.Run(fmt.Sprintf("%dof%d", shard+1, sweepShards), func(t *testing.T) {
							t.Parallel()
							s := newSite(t)
							var w sweep
							end := time.Now().Add(sweepLimit)
							for i, at := range s.points(t, p, errno) {
								if i%sweepShards != shard {
									continue
								}
								if time.Now().After(end) {
									w.untried++
									continue
								}
								w.try(t, s, p, errno, at)
								s.judge(t)
							}
							if w.untried > 0 {
								t.Errorf("no time for %d calls", w.untried)
							}
							t.Log(w)
							s.finish(t)
						})
					}
				})
			}
		})
	}
}
