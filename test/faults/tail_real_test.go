//go:build real

package faults

import (
	"testing"
	"time"
)

// A sample of TestALogCutAtAnyOfItsLastBytesIsNoticed: 64 cuts.
func TestALogCutAtSomeOfItsLastBytesIsNoticed(t *testing.T) {
	t.Parallel()
	cutTails(t, 0, 1, 10*time.Minute, func(_ string, cut, size int64) bool {
		places := int64(8)
		if size > tail {
			places = 40
		}
		step := min(tail, size) / places
		return cut%step == 1%step && cut/step < places
	})
}
