//go:build soak

package faults

import (
	"fmt"
	"testing"
	"time"
)

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

func TestAnAgentKilledAtAnyCallOfItsEnrolmentComesBack(t *testing.T) {
	needsStrace(t)
	for shard := range sweepShards {
		t.Run(fmt.Sprintf("%dof%d", shard+1, sweepShards), func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			s.serve(t)
			kills, tried, untried := 0, 0, 0
			end := time.Now().Add(sweepLimit)
			for i, at := range s.enrolmentCalls(t) {
				switch {
				case i%sweepShards != shard:
					continue
				case time.Now().After(end):
					untried++
					continue
				}
				tried++
				if s.killedEnrolment(t, at) {
					kills++
				}
			}
			if untried > 0 || kills < 10 {
				t.Errorf("%d kills, no time for %d calls", kills, untried)
			}
			t.Logf("%d calls tried, %d kills", tried, kills)
		})
	}
}
