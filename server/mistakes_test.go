package server

import (
	"context"
	"crypto/tls"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/test/doors"
)

// The mistakes of others, by their row in docs/mistakes.md.

func TestMistake37TheLogsFilesAreNotForPeers(t *testing.T) {
	var old unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1000, Max: old.Max}))
	defer func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &old)) }()
	for _, d := range []door{agentDoor, enrolDoor, adminDoor} {
		if got := d.places(); got != min(d.connections, 500) {
			t.Errorf("the %s door takes %d connections of 1000 files", d.name, got)
		}
	}
}

func TestMistake37NobodyKeepsTheEnrolDoorByStandingInIt(t *testing.T) {
	old := enrolDoor // all servers of this process have it, so no test runs beside this one
	enrolDoor.age, enrolDoor.perPeer = 100*time.Millisecond, 2
	t.Cleanup(func() { enrolDoor = old }) // when the server has ended
	s := newCluster(t, "east").start(t, nil)
	token := s.token("node-1").Token
	for range 2 {
		c, err := tls.Dial("tcp", s.Doors().Enrol, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		must(t, err)
		defer c.Close()
		// As much of HTTP/2 as makes an idle connection: the preface and empty settings.
		_, err = c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
		must(t, err)
	}
	// gRPC gives a peer that it asks to go five seconds.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		_, err := doors.Enrol(ctx, token)
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("the door is taken by two who do nothing: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
