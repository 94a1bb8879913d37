package server

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

func TestRefusalsAreLoggedByTheirReason(t *testing.T) {
	t.Parallel()
	began := time.Unix(1_800_000_000, 0)
	away := refuse(codes.Unavailable, "sign_failed", "", nil)
	banned := refuse(codes.PermissionDenied, "banned_agent", "", nil)
	var rs refusals
	lines, rests, unlogged := map[string]int{}, map[string]int{}, map[string]int64{}
	rest := func(now time.Time) {
		rs.rest(now, func(_, reason string, f refusedFor) {
			if f.first.Before(began) || f.last.Before(f.first) || now.Before(f.last) {
				t.Errorf("%s between %s and %s, said at %s", reason, f.first, f.last, now)
			}
			rests[reason]++
			unlogged[reason] += f.unlogged
		})
	}
	// Ten minutes of an outage, with ten requests a second.
	now := began
	for ; now.Sub(began) < 10*time.Minute; now = now.Add(100 * time.Millisecond) {
		if n, ok := rs.allow(agentDoor, away, now); ok {
			lines["sign_failed"]++
			unlogged["sign_failed"] += n
		}
		rest(now)
	}
	// It hides nobody who is refused for another reason: of a few each is said, of many some.
	for range saidAtOnce {
		if n, ok := rs.allow(agentDoor, banned, now); !ok || n != 0 {
			t.Errorf("a banned agent: %v, %d before", ok, n)
		}
	}
	for range 100 {
		if _, ok := rs.allow(agentDoor, banned, now); ok {
			t.Error("a flood is logged")
		}
	}
	if n, ok := rs.allow(agentDoor, banned, now.Add(sayRefused)); !ok || n != 100 {
		t.Errorf("after a flood of 100: %v, %d before", ok, n)
	}
	if n, ok := rs.allow(enrolDoor, banned, now); !ok || n != 0 {
		t.Errorf("at another door: %v, %d before", ok, n)
	}
	for range 12 { // a minute more, as upkeep does
		now = now.Add(5 * time.Second)
		rest(now)
	}
	rest(now.Add(time.Hour))
	if all := int64(lines["sign_failed"]) + unlogged["sign_failed"]; all != 6000 || lines["sign_failed"] != 10 || rests["sign_failed"] != 1 {
		t.Errorf("of 6000 refusals in ten minutes %d are told of, in %d lines and %d afterwards", all, lines["sign_failed"], rests["sign_failed"])
	}
	if rests["banned_agent"] != 0 {
		t.Error("what was said is said again")
	}
}
