package agent

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
)

func TestAContradictionShowsUntilItsEvidenceIsMovedAway(t *testing.T) {
	w := newWorld(t)
	signer, err := note.NewSigner(signerKey(w.vkey, w.logKey))
	if err != nil {
		t.Fatal(err)
	}
	checkpoint := func(size uint64, root byte) *signetv1.Checkpoint {
		msg, err := note.Sign(&note.Note{Text: fmt.Sprintf("example.org/east/east-1\n%d\n%s\n", size, base64Of(bytes.Repeat([]byte{root}, 32)))}, signer)
		if err != nil {
			t.Fatal(err)
		}
		return &signetv1.Checkpoint{Note: msg}
	}
	w.open()
	n := w.start(t)
	n.ready(t)
	status := func() *adminv1.AgentWitnessStatus {
		t.Helper()
		r, err := n.admin(t).Status(t.Context(), &adminv1.AgentStatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Witness
	}
	if s := status(); s.Contradicted || s.Evidence != "" || s.EvidenceFile != "" {
		t.Fatalf("before anything: %v", s)
	}
	restart := func() {
		t.Helper()
		c := n.config
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		c.Metrics = nil
		again, err := New(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		n = run(t, again)
	}
	for _, size := range []uint64{7, 6} {
		if err := n.takeCheckpoint(checkpoint(size, 1)); err != nil {
			t.Fatal(err)
		}
	}
	for _, when := range []string{"at once", "after a restart"} {
		s := status()
		if !s.Contradicted || s.EvidenceFile != n.path("checkpoint.evidence") || !strings.Contains(s.Evidence, "east-1\n7\n") || !strings.Contains(s.Evidence, "east-1\n6\n") {
			t.Fatalf("%s: %v", when, s)
		}
		restart()
	}
	// The log is as it was: the evidence alone is moved away, and what was seen is still believed.
	if err := os.Rename(n.path("checkpoint.evidence"), n.path("kept.evidence")); err != nil {
		t.Fatal(err)
	}
	restart()
	if s := status(); s.Contradicted || s.Size != 7 {
		t.Fatalf("cleared: %v", s)
	}
	// The log that is there now is to be believed: so is what was seen.
	if err := n.takeCheckpoint(checkpoint(6, 2)); err != nil {
		t.Fatal(err)
	}
	if !status().Contradicted {
		t.Fatal("a second contradiction does not show")
	}
	for _, name := range []string{"checkpoint", "checkpoint.evidence"} {
		if err := os.Remove(n.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	restart()
	if err := n.takeCheckpoint(checkpoint(6, 2)); err != nil {
		t.Fatal(err)
	}
	if s := status(); s.Contradicted || s.Size != 6 {
		t.Fatalf("accepted: %v", s)
	}
}

func TestTheHTTPDoorKeepsToItsNumberOfConnections(t *testing.T) {
	l, err := listenHTTP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 2*maxHTTPFrom)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	defer func() { l.Close(); <-done }()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	var in []net.Conn
	for range maxHTTPFrom {
		dial()
		in = append(in, <-accepted)
	}
	closed := func(c net.Conn) bool {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, err := c.Read(make([]byte, 1))
		return err != nil && !os.IsTimeout(err)
	}
	if !closed(dial()) {
		t.Error("one too many from one address was let in")
	}
	for _, c := range in {
		c.Close()
		c.Close()
	}
	dial()
	(<-accepted).Close()
}
