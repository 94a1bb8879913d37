package sds

import (
	"slices"
	"sync"
)

// Bounds of what is remembered of rejections.
const (
	maxRejections  = 64   // of one stream, and of one process
	maxGoneCallers = 1024 // processes without a stream
)

// callers knows the processes behind the streams: how many streams each has, and what it rejected. Envoy acknowledges a
// rejected secret when it sees it again without applying it (it compares with what it was sent last, not with what it
// uses), and a reconnect is when it sees it again; so rejections outlive streams here.
type callers struct {
	limit int

	mu   sync.Mutex
	by   map[callerKey]*caller
	gone []callerKey // with rejections and no stream, oldest first
}

type caller struct {
	streams  int
	rejected []digest
}

// enter counts a stream, or refuses it.
func (c *callers) enter(k callerKey) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.by[k]
	if p == nil {
		if c.by == nil {
			c.by = map[callerKey]*caller{}
		}
		p = &caller{}
		c.by[k] = p
	}
	if p.streams >= c.limit {
		return false
	}
	if p.streams == 0 {
		c.gone = slices.DeleteFunc(c.gone, func(g callerKey) bool { return g == k })
	}
	p.streams++
	return true
}

func (c *callers) leave(k callerKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.by[k]
	if p.streams--; p.streams > 0 {
		return
	}
	if len(p.rejected) == 0 || k.conn != nil { // a connection does not come again
		delete(c.by, k)
		return
	}
	c.gone = append(c.gone, k)
	if len(c.gone) > maxGoneCallers {
		delete(c.by, c.gone[0])
		c.gone = slices.Delete(c.gone, 0, 1)
	}
}

func (c *callers) reject(k callerKey, d digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.by[k]
	p.rejected = remember(p.rejected, d)
}

func (c *callers) hasRejected(k callerKey, d digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Contains(c.by[k].rejected, d)
}

// remember adds d, at the cost of the oldest when there are too many.
func remember(list []digest, d digest) []digest {
	if slices.Contains(list, d) {
		return list
	}
	if len(list) >= maxRejections {
		list = slices.Delete(list, 0, 1)
	}
	return append(list, d)
}
