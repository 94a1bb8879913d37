//go:build real

package faults

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// A sample of TestNothingIsReleasedThatADiskDidNotTake.
func TestNothingIsReleasedThatAFailingDiskDidNotTake(t *testing.T) {
	needsStrace(t)
	s := newSite(t)
	for _, f := range [][3]string{
		{"fsync", "EIO", ""}, {"fsync", "ENOSPC", ":when=2"}, {"linkat", "EDQUOT", ""}, {"renameat", "EROFS", ""}, {"pwrite64", "EIO", ""},
	} {
		s.failed(t, f[0], f[1], f[2])
	}
	s.verify(t)
}

// A sample of TestOneFailedCallReleasesNothing, as large as fits in half a minute.
func TestOneFailedCallAtRandomReleasesNothing(t *testing.T) {
	t.Parallel()
	needsStrace(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	chance := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // a test's choices
	s := newSite(t)
	errnos := []string{"EIO", "EROFS", "EDQUOT"}
	points := map[string][]point{}
	for _, p := range failures {
		points[p.name] = s.points(t, p, "EIO")
	}
	var w sweep
	for end := time.Now().Add(30 * time.Second); (time.Now().Before(end) || w.hit == 0 && w.tried < leastTries) && !t.Failed(); {
		p, errno := failures[w.tried%len(failures)], errnos[chance.IntN(len(errnos))]
		at := points[p.name][chance.IntN(len(points[p.name]))]
		if !slices.Contains(failing[errno], at.call) {
			errno = "EIO" // which fails all of them
		}
		w.try(t, s, p, errno, at)
		s.judge(t)
	}
	if w.hit == 0 {
		t.Error("no call was failed")
	}
	t.Log(w)
	s.finish(t)
}
