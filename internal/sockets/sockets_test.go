package sockets

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestOnePeerCannotTakeAllPlaces(t *testing.T) {
	c := NewCrowd[string](8, 6)
	var places []func()
	enter := func(who string) bool {
		leave, ok := c.Enter(who)
		if ok {
			places = append(places, leave)
		}
		return ok
	}
	for range 6 {
		if !enter("a") {
			t.Fatal("refused within its share")
		}
	}
	if enter("a") {
		t.Fatal("one peer took more than its share")
	}
	for range 2 {
		if !enter("b") {
			t.Fatal("the rest is not for the others")
		}
	}
	if enter("c") {
		t.Fatal("all together are not bounded")
	}
	places[0]()
	places[0]() // counted once
	if !enter("c") {
		t.Fatal("a place that was given back is not given out")
	}
	if enter("c") {
		t.Fatal("a place that was given back twice was given out twice")
	}
	for _, leave := range places {
		leave()
	}
	if c.open != 0 || len(c.by) != 0 {
		t.Errorf("%d connections counted after all have left: %v", c.open, c.by)
	}
}

func TestWhatIsTooManyIsClosedAtOnce(t *testing.T) {
	for name, most := range map[string][2]int{"in all": {2, 8}, "of one address": {8, 2}} {
		t.Run(name, func(t *testing.T) {
			tcp, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			unix, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
			if err != nil {
				t.Fatal(err)
			}
			for _, inner := range []net.Listener{tcp, unix} {
				l := Limit(inner, most[0], most[1])
				accepted := make(chan net.Conn)
				go func() {
					defer close(accepted)
					for {
						c, err := l.Accept()
						if err != nil {
							return
						}
						accepted <- c
					}
				}()
				dial := func() net.Conn {
					c, err := net.Dial(inner.Addr().Network(), inner.Addr().String())
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { c.Close() })
					return c
				}
				dial()
				first := <-accepted
				dial()
				second := <-accepted
				if _, err := dial().Read(make([]byte, 1)); err == nil {
					t.Error("the third connection was not closed")
				}
				first.Close()
				first.Close() // counted once
				dial()
				third := <-accepted
				if _, err := dial().Read(make([]byte, 1)); err == nil {
					t.Error("one that was closed twice made two places")
				}
				second.Close()
				third.Close()
				l.Close()
				<-accepted
				if crowd := l.(*limited).crowd; crowd.open != 0 || len(crowd.by) != 0 {
					t.Errorf("%d connections counted after all are closed: %v", crowd.open, crowd.by)
				}
			}
		})
	}
}

func TestTheUserAtTheOtherEnd(t *testing.T) {
	inner, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	l := Limit(inner, 1, 1)
	defer l.Close()
	here, err := net.Dial("unix", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	there, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	for end, c := range map[string]net.Conn{"who listens": here, "who connected, behind a limit": there} {
		if uid, err := PeerUID(c); err != nil || uid != uint32(os.Geteuid()) { //nolint:gosec // never negative here
			t.Errorf("%s: uid %d, %v", end, uid, err)
		}
	}
	there.Close()
	if _, err := PeerUID(there); err == nil {
		t.Error("a connection that is closed has a user")
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	c, err := net.Dial("tcp", tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if uid, err := PeerUID(c); err == nil {
		t.Errorf("uid %d is said to be behind a TCP connection", uid)
	}
}
