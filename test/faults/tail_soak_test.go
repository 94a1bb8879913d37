//go:build soak

package faults

import (
	"fmt"
	"testing"
)

func TestALogCutAtAnyOfItsLastBytesIsNoticed(t *testing.T) {
	for shard := range sweepShards {
		t.Run(fmt.Sprintf("%dof%d", shard+1, sweepShards), func(t *testing.T) {
			t.Parallel()
			cutTails(t, shard, sweepShards, 2*sweepLimit, func(string, int64, int64) bool { return true })
		})
	}
}
