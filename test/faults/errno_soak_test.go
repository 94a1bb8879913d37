//go:build soak

package faults

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// makesRoom are the calls that a full disk can fail. (Opening a file that is there is not one of them.)
var makesRoom = strings.Fields("pwrite64 fsync fdatasync renameat linkat mkdirat ftruncate")

func TestNothingIsReleasedThatADiskDidNotTake(t *testing.T) {
	needsStrace(t)
	for _, errno := range []string{"EIO", "ENOSPC", "EROFS"} {
		t.Run(errno, func(t *testing.T) {
			s := newSite(t)
			for _, call := range calls {
				// By its name, write is also what sockets and the runtime's own descriptors are served with. For files, a disk that
				// is really full fails it: TestAFullDiskStopsIssuingAndNothingElse.
				if call == "write" || errno == "ENOSPC" && !slices.Contains(makesRoom, call) {
					continue
				}
				s.failed(t, call, errno, "")
				for n := 1; n <= 4; n++ {
					s.failed(t, call, errno, fmt.Sprintf(":when=%d", n))
				}
			}
			s.verify(t)
		})
	}
}
