package rotation

import (
	"container/heap"
	"context"
	"sync"
	"time"
)

// Defaults of SchedulerConfig.
const (
	DefaultWindow  = 100 * time.Millisecond
	DefaultRecheck = 10 * time.Second
)

// SchedulerConfig describes a Scheduler. The zero value is usable.
type SchedulerConfig struct {
	// Window is how far ahead of its time a key may be handed out, so that many go in one call. 0 = DefaultWindow.
	Window time.Duration
	// Recheck bounds the time between two looks at the clock. Timers stand still while a machine is suspended and know
	// nothing of a clock that was set; times here are wall-clock times. 0 = DefaultRecheck.
	Recheck time.Duration
	// Now is the wall clock; nil = time.Now.
	Now func() time.Time
}

// Scheduler holds at most one time for each key and hands keys out when they are due: a heap with one timer.
// Make one with NewScheduler; all methods may be called at any time from anywhere.
type Scheduler[K comparable] struct {
	window, recheck time.Duration
	now             func() time.Time
	// poke wakes Run when the earliest time has become earlier.
	poke chan struct{}

	mu    sync.Mutex
	queue queue[K]
	items map[K]*item[K]
}

// NewScheduler makes an empty scheduler.
func NewScheduler[K comparable](c SchedulerConfig) *Scheduler[K] {
	s := &Scheduler[K]{
		window: c.Window, recheck: c.Recheck, now: c.Now,
		poke:  make(chan struct{}, 1),
		items: map[K]*item[K]{},
	}
	if s.window <= 0 {
		s.window = DefaultWindow
	}
	if s.recheck <= 0 {
		s.recheck = DefaultRecheck
	}
	if s.now == nil {
		s.now = time.Now
	}
	return s
}

// Set gives the key its time, in place of an earlier one.
func (s *Scheduler[K]) Set(key K, at time.Time) {
	// Round strips the monotonic reading: what counts is the wall clock, over suspension and clock changes.
	at = at.Round(0)
	s.mu.Lock()
	it, ok := s.items[key]
	if ok {
		it.at = at
		heap.Fix(&s.queue, it.index)
	} else {
		it = &item[K]{key: key, at: at}
		s.items[key] = it
		heap.Push(&s.queue, it)
	}
	first := s.queue[0] == it
	s.mu.Unlock()
	if first {
		select {
		case s.poke <- struct{}{}:
		default:
		}
	}
}

// Remove forgets the key. A key that was already handed out is not recalled.
func (s *Scheduler[K]) Remove(key K) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if it, ok := s.items[key]; ok {
		heap.Remove(&s.queue, it.index)
		delete(s.items, key)
	}
}

// Len is how many keys have a time.
func (s *Scheduler[K]) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.queue)
}

// Run calls due with the keys whose time has come, and those whose time comes within the window, in order of their
// times, until ctx ends. The keys are out of the scheduler by then; Set gives them a new time, from within due too.
// due should return soon: nothing else is handed out meanwhile.
func (s *Scheduler[K]) Run(ctx context.Context, due func(keys []K)) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-s.poke:
		}
		keys, next := s.take()
		if len(keys) > 0 {
			due(keys)
			// What due has set may be due already.
			next = 0
		}
		timer.Reset(next)
	}
}

// take removes what is due and says how long to wait before looking again.
func (s *Scheduler[K]) take() (keys []K, next time.Duration) {
	now := s.now().Round(0)
	s.mu.Lock()
	defer s.mu.Unlock()
	// The window widens a batch; it never starts one, or a key would always come early and alone.
	if len(s.queue) > 0 && !s.queue[0].at.After(now) {
		for len(s.queue) > 0 && !s.queue[0].at.After(now.Add(s.window)) {
			it := heap.Pop(&s.queue).(*item[K])
			delete(s.items, it.key)
			keys = append(keys, it.key)
		}
	}
	if len(s.queue) == 0 {
		return keys, s.recheck
	}
	return keys, min(max(s.queue[0].at.Sub(now), 0), s.recheck)
}

type item[K comparable] struct {
	key   K
	at    time.Time
	index int
}

// queue implements heap.Interface.
type queue[K comparable] []*item[K]

func (q queue[K]) Len() int           { return len(q) }
func (q queue[K]) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q queue[K]) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

// Push appends.
func (q *queue[K]) Push(x any) {
	it := x.(*item[K])
	it.index = len(*q)
	*q = append(*q, it)
}

// Pop removes the last.
func (q *queue[K]) Pop() any {
	old := *q
	it := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	return it
}
