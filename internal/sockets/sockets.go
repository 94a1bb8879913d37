// Package sockets is what all listeners need: a bound on who comes in, and who that is.
package sockets

import (
	"fmt"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// Crowd bounds connections, in all and of each peer, so that none can lock out the rest.
type Crowd[K comparable] struct {
	most, each int

	mu   sync.Mutex
	open int
	by   map[K]int
}

// NewCrowd makes one of at most so many connections in all, and so many of each peer.
func NewCrowd[K comparable](most, each int) *Crowd[K] {
	return &Crowd[K]{most: most, each: each, by: map[K]int{}}
}

// Enter takes a place for a connection, if there is one left. leave gives it back, once.
func (c *Crowd[K]) Enter(who K) (leave func(), ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open >= c.most || c.by[who] >= c.each {
		return nil, false
	}
	c.open++
	c.by[who]++
	return sync.OnceFunc(func() { c.leave(who) }), true
}

func (c *Crowd[K]) leave(who K) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open--
	if c.by[who]--; c.by[who] == 0 {
		delete(c.by, who)
	}
}

// Limit makes a listener keep to so many connections in all, and so many from one address; all of a Unix socket's peers are
// one. What is too many is closed at once, before a byte of it is read.
func Limit(l net.Listener, most, each int) net.Listener {
	return &limited{l, NewCrowd[netip.Addr](most, each)}
}

type limited struct {
	net.Listener
	crowd *Crowd[netip.Addr]
}

// Accept passes over connections that are too many.
func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		var from netip.Addr
		if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
			from = a.AddrPort().Addr().Unmap()
		}
		leave, ok := l.crowd.Enter(from)
		if !ok {
			c.Close()
			continue
		}
		return &conn{Conn: c, leave: leave}, nil
	}
}

type conn struct {
	net.Conn
	leave func()
}

// Close closes the connection and gives its place back.
func (c *conn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

// NetConn returns the connection beneath.
func (c *conn) NetConn() net.Conn { return c.Conn }

// PeerUID is the user at the other end of a Unix socket: the kernel notes it at connect(2) and listen(2) (unix(7),
// SO_PEERCRED).
func PeerUID(c net.Conn) (uint32, error) {
	if w, ok := c.(interface{ NetConn() net.Conn }); ok {
		c = w.NetConn()
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("a %T has no user behind it", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var inner error
	if err := raw.Control(func(fd uintptr) {
		cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if inner != nil {
		return 0, inner
	}
	return cred.Uid, nil
}
