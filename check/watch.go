package check

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// patience is how long whoever asks a Watch is kept waiting: a probe wants its answer within a second.
const patience = 800 * time.Millisecond

// Part is one thing that a running process looks at about itself.
type Part struct {
	// Code and About are of the finding that is made where there is no answer in time.
	Code, About string
	// Every is how long good news stands; 0 = not at all, for what costs a look into memory.
	Every time.Duration
	// Stops is what stands still when it fails. Bad news of such a part is looked at again each time, so that it heals at
	// once; of any other part it stands as long as good news does.
	Stops []string
	Look  func(context.Context) Findings
}

// Watch is what a running process knows of its own health.
type Watch struct{ parts []*watched }

// watched is a part with its newest findings.
type watched struct {
	Part
	mu sync.Mutex
	at time.Time
	// running is closed when the look under way has ended; nil = none is.
	running chan struct{}
	found   Findings
}

// NewWatch begins with nothing looked at.
func NewWatch(parts ...Part) *Watch {
	w := &Watch{}
	for _, p := range parts {
		w.parts = append(w.parts, &watched{Part: p})
	}
	return w
}

// Findings returns those of all parts, in their order, each as old as its part allows. A part is looked at once at a time
// however many ask, and one that does not answer (a disk that hangs) is a finding.
func (w *Watch) Findings(ctx context.Context) (all Findings) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	ends := make([]chan struct{}, len(w.parts))
	for i, p := range w.parts {
		ends[i] = p.begin(ctx)
	}
	for i, p := range w.parts {
		all = append(all, p.end(ctx, ends[i])...)
	}
	return all
}

// begin starts a look where one is due; nil when there is nothing to wait for.
func (p *watched) begin(ctx context.Context) chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running != nil {
		return p.running
	}
	fresh := !p.at.IsZero() && time.Since(p.at) < p.Every
	if fresh && (len(p.Stops) == 0 || p.found.Worst() == OK) {
		return nil
	}
	if p.Every == 0 {
		p.found = p.look(ctx)
		return nil
	}
	p.running = make(chan struct{})
	go func() {
		found := p.look(context.WithoutCancel(ctx))
		p.mu.Lock()
		defer p.mu.Unlock()
		close(p.running)
		p.found, p.at, p.running = found, time.Now(), nil
	}()
	return p.running
}

func (p *watched) end(ctx context.Context, ended chan struct{}) Findings {
	late := false
	if ended != nil {
		select {
		case <-ended:
		case <-ctx.Done():
			late = true
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if late && (len(p.Stops) > 0 || p.at.IsZero()) {
		level := Unknown
		if len(p.Stops) > 0 {
			level = Error
		}
		return Findings{{Code: p.Code, Level: level, About: p.About, Message: fmt.Sprintf("no answer within %s: the disk hangs, or is very busy", patience), Stops: p.Stops}}
	}
	return p.found
}

// look makes a panic a finding: the answer to a probe must not end the process.
func (p *watched) look(ctx context.Context) (found Findings) {
	defer func() {
		if r := recover(); r != nil {
			found = Findings{{Code: p.Code, Level: Error, About: p.About, Message: fmt.Sprintf("looking at it panicked: %.256v", r), Stops: p.Stops}}
		}
	}()
	return p.Look(ctx)
}

// State is a finding about one part of a process: all is well when err is nil, and otherwise what it says stops.
func State(code, about, well string, err error, mend string, stops ...string) Findings {
	if err != nil {
		return Findings{{Code: code, Level: Error, About: about, Message: err.Error(), Mend: mend, Stops: stops}}
	}
	return Findings{{Code: code, Level: OK, About: about, Message: well}}
}
