package check

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/test/bubble"
)

func of(l Level, stops ...string) Findings {
	return Findings{{Code: CodeLog, Level: l, About: "log", Message: "it is " + l.String(), Stops: stops}}
}

func TestOnlyWhatStopsTheProcessMakesItUnready(t *testing.T) {
	for _, try := range []struct {
		found Findings
		ready bool
	}{
		{of(Error, Issuing), false},
		{of(Error, Enrolling, Serving), false},
		{of(Error, Answering), false},
		{of(Error, Enrolling, Changing), true},
		{of(Error), true}, // it will stop
		{of(Warning, Issuing), true},
		{of(Unknown, Issuing), true},
		{of(OK), true},
	} {
		if got := try.found.Ready(); got != try.ready {
			t.Errorf("%+v: ready %v", try.found, got)
		}
	}
}

func TestGoodNewsStandsForAMomentAndBadNewsDoesNot(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		var looks int
		level := OK
		w := NewWatch(Part{Every: time.Second, Stops: []string{Issuing}, Look: func(context.Context) Findings { looks++; return of(level, Issuing) }})
		ask := func(want Level, times int) {
			t.Helper()
			if got := w.Findings(t.Context()).Worst(); got != want || looks != times {
				t.Errorf("%s after %d looks, want %s after %d", got, looks, want, times)
			}
		}
		ask(OK, 1)
		level = Error
		ask(OK, 1)
		time.Sleep(time.Second)
		ask(Error, 2)
		ask(Error, 3)
		level = OK
		ask(OK, 4)
		ask(OK, 4)
	})
}

func TestWhatStopsNothingIsNotLookedAtForEachWhoAsks(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		var looks int
		w := NewWatch(Part{Every: time.Minute, Look: func(context.Context) Findings { looks++; return of(Warning) }})
		for range 60 {
			w.Findings(t.Context())
			time.Sleep(time.Second)
		}
		if looks != 1 {
			t.Errorf("%d looks in a minute", looks)
		}
	})
}

func TestALookIntoMemoryIsMadeEachTime(t *testing.T) {
	level := OK
	w := NewWatch(Part{Look: func(context.Context) Findings { return of(level) }})
	for _, level = range []Level{OK, Error, OK} {
		if got := w.Findings(t.Context()).Worst(); got != level {
			t.Errorf("%s, want %s", got, level)
		}
	}
}

func TestADiskThatHangsIsAnAnswerWithinASecond(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		var looks atomic.Int32
		stuck := func(context.Context) Findings { looks.Add(1); <-hang; return of(OK) }
		w := NewWatch(
			Part{Code: CodeLog, About: "log", Every: time.Second, Stops: []string{Issuing}, Look: stuck},
			Part{Code: CodeDisk, About: "disk", Every: time.Second, Look: stuck},
		)
		for range 3 {
			begun := time.Now()
			found := w.Findings(t.Context())
			if took := time.Since(begun); took > time.Second {
				t.Errorf("the answer took %s", took)
			}
			if len(found) != 2 || !found[0].Blocks() || found[1].Level != Unknown {
				t.Errorf("%+v", found)
			}
		}
		if n := looks.Load(); n != 2 {
			t.Errorf("%d looks pile up", n)
		}
		close(hang)
		synctest.Wait()
		if found := w.Findings(t.Context()); found.Worst() != OK {
			t.Errorf("when the disk is back: %+v", found)
		}
	})
}

func TestALookThatPanicsIsAFinding(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		for _, every := range []time.Duration{0, time.Second} {
			found := NewWatch(Part{Code: CodeLog, About: "log", Every: every, Stops: []string{Issuing}, Look: func(context.Context) Findings { panic("oh") }}).Findings(t.Context())
			if len(found) != 1 || !found[0].Blocks() || found[0].Message != "looking at it panicked: oh" {
				t.Errorf("%+v", found)
			}
		}
	})
}
