//go:build real

package faults

import "testing"

// A sample of TestNothingIsReleasedThatADiskDidNotTake.
func TestNothingIsReleasedThatAFailingDiskDidNotTake(t *testing.T) {
	needsStrace(t)
	s := newSite(t)
	for _, f := range [][3]string{
		{"fsync", "EIO", ""}, {"fsync", "ENOSPC", ":when=2"}, {"linkat", "ENOSPC", ""}, {"renameat", "EROFS", ""}, {"pwrite64", "EIO", ""},
	} {
		s.failed(t, f[0], f[1], f[2])
	}
	s.verify(t)
}
