package main

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
)

// A process that is stopped, or on a machine that swaps, still has its connections taken by the kernel.
func TestAServerThatHangsIsSaidInOneSentence(t *testing.T) {
	h, east := door(t, &doorman{hangs: true})
	silent := h.write("silent.yaml", "trust_domain: example.org\ncluster: east\nadmin_socket: ./silent.sock\n")
	l, err := net.Listen("unix", filepath.Join(h.dir, "silent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for config, socket := range map[string]string{east: "admin.sock", silent: "silent.sock"} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		want := "the server on " + filepath.Join(h.dir, socket) + " took the connection and does not answer: it is stopped or overloaded; if it stays so, end its process and start it with: signet serve --config " + config
		err := (&cli{}).rotation(ctx, config, func(ctx context.Context, r adminv1.RotationClient) error {
			_, err := r.RotationStatus(ctx, &adminv1.RotationStatusRequest{})
			return err
		})
		if err == nil || err.Error() != want || errors.As(err, new(noError)) {
			t.Errorf("%s: %v\nwant %s", socket, err, want)
		}
	}
	// Who is away is said as before.
	err = (&cli{}).rotation(t.Context(), h.write("away.yaml", "trust_domain: example.org\ncluster: east\nadmin_socket: ./away.sock\n"), nil)
	if err == nil || !strings.Contains(err.Error(), "no server answers on") {
		t.Error(err)
	}
}

// A server that is killed just after the connection was tried has not hung: there is none.
func TestAServerThatEndsMeanwhileIsSaidToBeAway(t *testing.T) {
	h, _ := door(t, &doorman{})
	config := h.write("ends.yaml", "trust_domain: example.org\ncluster: east\nadmin_socket: ./ends.sock\n")
	l, err := net.Listen("unix", filepath.Join(h.dir, "ends.sock"))
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as after SIGKILL
	go func() {
		if c, err := l.Accept(); err == nil {
			l.Close()
			c.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	err = (&cli{}).rotation(ctx, config, func(ctx context.Context, r adminv1.RotationClient) error {
		_, err := r.RotationStatus(ctx, &adminv1.RotationStatusRequest{})
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "no server answers on") {
		t.Error(err)
	}
}
