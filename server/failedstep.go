package server

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
)

// A step that comes by itself and fails is tried again, at growing intervals: as a rule it fails for a reason that somebody
// has to see to, and who does is told of it by readiness, by signet rotation status, and by the log now and then.

const (
	// stepAgain is the most between two tries of such a step; awayAgain is, where what it needs is away and comes back by itself.
	stepAgain, awayAgain = time.Minute, 10 * time.Second
	// tellAgain spaces what the log is told of a step that fails for the same reason on and on.
	tellAgain = time.Hour
	// waitFailed is the code of a wait in signet rotation status for a step that fails.
	waitFailed = "failed"
)

// errStep is of steps that came by themselves and failed, of which the log has been told.
var errStep = errors.New("could not take a step in the life of a CA")

// stepID is by what a step is known when it comes again.
type stepID struct {
	authority string
	to        ca.State
}

func idOf(s rotation.Step) stepID { return stepID{s.Authority, s.To} }

// failedStep is how it goes with a step that fails.
type failedStep struct {
	trouble
	wait *backoff.ExponentialBackOff
	// next is when to try again.
	next time.Time
	// told is what the log was told last, at toldAt.
	told   string
	toldAt time.Time
}

// failed remembers a step that failed, and tells the log what is new in it.
func (k *keeper) failed(step rotation.Step, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f := k.failing[idOf(step)]
	if f == nil {
		f = &failedStep{wait: &backoff.ExponentialBackOff{InitialInterval: time.Second, RandomizationFactor: 0.5, Multiplier: 2}}
		f.wait.Reset()
		k.failing[idOf(step)] = f
	}
	f.trouble, _ = f.after(err, k.folder.Now())
	f.wait.MaxInterval = stepAgain
	if errors.Is(err, keystore.ErrAway) {
		f.wait.MaxInterval = awayAgain
	}
	now := time.Now()
	f.next = now.Add(f.wait.NextBackOff())
	if text := err.Error(); text != f.told || now.Sub(f.toldAt) >= tellAgain {
		f.told, f.toldAt = text, now
		k.log.Error(errStep.Error()+"; it is tried again", "authority", cmp.Or(step.Authority, "successor"), "to", string(step.To), "err", err)
	}
}

// pausing is why a step failed that is not to be tried again yet.
func (k *keeper) pausing(step rotation.Step) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if f := k.failing[idOf(step)]; f != nil && time.Now().Before(f.next) {
		return f.err
	}
	return nil
}

// forgetFailed forgets the steps that were taken, or wait for something again.
func (k *keeper) forgetFailed(next []rotation.Step) {
	k.mu.Lock()
	defer k.mu.Unlock()
	maps.DeleteFunc(k.failing, func(id stepID, _ *failedStep) bool {
		return !slices.ContainsFunc(next, func(s rotation.Step) bool { return idOf(s) == id && s.Ready(false) })
	})
}

// failedSteps are those that fail, without those that fail for what is told of elsewhere.
func (k *keeper) failedSteps(told func(error) bool) (all []check.Failed) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for id, f := range k.failing {
		if !told(f.err) {
			all = append(all, check.Failed{Authority: id.authority, To: id.to, Trouble: check.Trouble{Since: f.since, Why: f.err.Error()}})
		}
	}
	return all
}
