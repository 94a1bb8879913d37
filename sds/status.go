package sds

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
)

// StreamStatus is what is known of one open stream. What a peer said in it is clipped and printable.
type StreamStatus struct {
	// Number of the stream since the start, as in the log.
	Number uint64
	// Peer is who opened it, by the kernel's word.
	Peer string
	// Protocol is "sotw" or "delta".
	Protocol string
	// Node is the node.id of the first request, quoted: a claim of the peer. Empty before the first request.
	Node  string
	Since time.Time
	// Names in the order subscribed.
	Names []NameStatus
}

// NameStatus is what a stream has of one name. Versions are those on the wire; empty = none.
type NameStatus struct {
	// Name asked for; quoted unless it is one this service knows.
	Name string
	// Kind is "svid" or "bundle", and empty while nothing was sent.
	Kind string
	// Sent last; Acked last by the peer; Rejected last, until it acknowledges other content.
	Sent, Acked, Rejected string
	// Reason of the rejection in the peer's words.
	Reason string
	// Serial of the SVID sent last, hexadecimal.
	Serial string
}

// Streams returns the open streams, oldest first. Nothing in it is secret.
func (s *Server) Streams() []StreamStatus {
	s.live.mu.Lock()
	streams := make([]*stream, 0, len(s.live.streams))
	for st := range s.live.streams {
		streams = append(streams, st)
	}
	s.live.mu.Unlock()
	all := make([]StreamStatus, 0, len(streams))
	for _, st := range streams {
		all = append(all, st.status())
	}
	slices.SortFunc(all, func(a, b StreamStatus) int { return cmp.Compare(a.Number, b.Number) })
	return all
}

func (st *stream) status() StreamStatus {
	st.mu.Lock()
	defer st.mu.Unlock()
	out := StreamStatus{
		Number: st.number, Peer: st.info.caller.String(), Protocol: st.protocol, Node: st.node, Since: st.started,
		Names: make([]NameStatus, 0, len(st.sub.wanted)),
	}
	for _, w := range st.sub.wanted {
		n := NameStatus{
			Name: w.target.shown(), Sent: w.sent.shown(), Acked: w.acked.shown(), Rejected: w.refused.shown(), Reason: w.reason,
		}
		if w.sent != nil {
			n.Kind, n.Serial = w.sent.kind, w.sent.serial
		}
		out.Names = append(out.Names, n)
	}
	return out
}

// liveStreams is the set of open streams.
type liveStreams struct {
	mu      sync.Mutex
	streams map[*stream]struct{}
}

func (l *liveStreams) add(st *stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.streams == nil {
		l.streams = map[*stream]struct{}{}
	}
	l.streams[st] = struct{}{}
}

func (l *liveStreams) remove(st *stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.streams, st)
}

// shown is the version of a content, or empty of none.
func (c *content) shown() string {
	if c == nil {
		return ""
	}
	return c.version()
}

// shown is the name for people.
func (t target) shown() string {
	if t.known() {
		return t.name
	}
	return strconv.Quote(foreign(t.name).clean())
}

// printable is a peer's text for people: clean, and on one line.
func (f foreign) printable() string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, f.clean())
}
