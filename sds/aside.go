package sds

import (
	"fmt"
	"runtime/debug"
)

// aside runs f on a goroutine of its own and waits for it. A stack that f makes grow goes with that goroutine; otherwise it
// would be kept for as long as the stream lives, which is days. A panic in f is one of the caller, with the stack of f.
func aside(f func()) {
	done := make(chan *panicked)
	go func() {
		var p *panicked
		defer func() { done <- p }()
		defer func() {
			if v := recover(); v != nil {
				p = &panicked{v, debug.Stack()}
			}
		}()
		f()
	}()
	if p := <-done; p != nil {
		panic(*p)
	}
}

// panicked is what aside panics with.
type panicked struct {
	value any
	stack []byte
}

// Stack is where it happened, for whoever recovers.
func (p panicked) Stack() []byte { return p.stack }

// String is the value's text.
func (p panicked) String() string { return fmt.Sprint(p.value) }
