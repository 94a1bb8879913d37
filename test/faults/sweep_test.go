//go:build real || soak

package faults

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// calls are the system calls by which anything gets onto a disk, or a lock is taken.
var calls = []string{
	"openat", "open", "write", "pwrite64", "fsync", "fdatasync", "renameat", "linkat", "unlinkat", "unlink", "mkdirat",
	"ftruncate", "fchmod", "utimensat", "fcntl", "flock",
}

// failing are the calls that a disk can fail with an error, by its name. A disk without room, and a quota, leave alone what
// is there already, so opening is not one of theirs. Locks are not the disk's.
var failing = map[string][]string{
	"EIO": {
		"openat", "open", "write", "pwrite64", "fsync", "fdatasync", "renameat", "linkat", "unlinkat", "unlink", "mkdirat",
		"ftruncate", "fchmod", "utimensat", "read", "pread64", "getdents64", "newfstatat",
	},
	"EROFS":  {"openat", "open", "write", "pwrite64", "fsync", "renameat", "linkat", "unlinkat", "unlink", "mkdirat", "ftruncate", "fchmod", "utimensat"},
	"EDQUOT": {"write", "pwrite64", "fsync", "fdatasync", "renameat", "linkat", "mkdirat", "ftruncate"},
	"ENOSPC": {"write", "pwrite64", "fsync", "fdatasync", "renameat", "linkat", "mkdirat", "ftruncate"},
}

// anyDescriptor are calls that are made on sockets, and by Go's runtime on descriptors of its own, as well as on files. One
// that fails there may cost a connection, or end the process.
var anyDescriptor = []string{"read", "write"}

// most bounds a sweep of one call, should its calls never end.
const most = 200

// point is the n-th of a call in any thread.
type point struct {
	call string
	n    int
}

func (at point) inject(errno string) string {
	return fmt.Sprintf("%s:error=%s:when=%d", at.call, errno, at.n)
}

// failure is something that a server does while one of its calls fails.
type failure struct {
	name string
	// watch does it under strace without a fault.
	watch func(t *testing.T, s *site, calls string) *tracer
	// try does it with a fault. How many calls were failed, and what the process said if it has ended.
	try func(t *testing.T, s *site, call, inject string) (hit int, said string, over bool)
}

var failures = []failure{
	{
		"start", func(t *testing.T, s *site, calls string) *tracer {
			s.down()
			_, tr := s.startUnder(t, s.program(), calls, "", nil)
			return tr
		},
		func(t *testing.T, s *site, call, inject string) (int, string, bool) {
			s.down()
			log := s.path("east-server.log")
			_ = os.Remove(log)
			how, tr := s.startUnder(t, s.program(), call, inject, func() {
				heard(t, call, inject, s.issue(t.Context(), s.member))
			})
			text, _ := os.ReadFile(log)
			s.serve(t)
			return tr.injected(), said(text), how != ready
		},
	},
	{
		"issuance", func(t *testing.T, s *site, calls string) *tracer {
			return s.during(t, calls, "", func(ctx context.Context) { _ = s.issue(ctx, s.member) })
		},
		func(t *testing.T, s *site, call, inject string) (int, string, bool) {
			return s.failedDuring(t, call, inject, func(ctx context.Context) {
				heard(t, call, inject, s.issue(ctx, s.member))
			})
		},
	},
	{
		"enrolment", func(t *testing.T, s *site, calls string) *tracer {
			s.up(t)
			token := s.token(t, "m2")
			return s.during(t, calls, "", func(ctx context.Context) { _, _ = s.enrol(ctx, token) })
		},
		func(t *testing.T, s *site, call, inject string) (int, string, bool) {
			s.up(t)
			token, admitted := s.token(t, "m2"), 0
			hit, said, over := s.failedDuring(t, call, inject, func(ctx context.Context) {
				_, err := s.enrol(ctx, token)
				if err == nil {
					admitted++
				}
				heard(t, call, inject, err)
			})
			for range 2 {
				if _, err := s.enrol(t.Context(), token); err == nil {
					admitted++
				}
			}
			if admitted > 1 {
				t.Errorf("%s: one token admitted %d", inject, admitted)
			}
			return hit, said, over
		},
	},
}

// heard checks what a client was told. Whose answer was lost with its connection hears nothing.
func heard(t *testing.T, call, inject string, err error) {
	t.Helper()
	lost := status.Code(err) == codes.DeadlineExceeded && slices.Contains(anyDescriptor, call)
	if err != nil && !unavailable(err) && !lost {
		t.Errorf("%s: the client hears: %v", inject, err)
	}
}

// up has a server run, down none.
func (s *site) up(t *testing.T) {
	t.Helper()
	if s.server == nil || !alive(s.server) {
		s.serve(t)
	}
}

func (s *site) down() {
	if s.server != nil {
		s.server.Kill()
	}
}

// during does something with a running server under strace.
func (s *site) during(t *testing.T, calls, inject string, do func(context.Context)) *tracer {
	t.Helper()
	s.up(t)
	tr := s.attach(t, calls, inject)
	do(t.Context())
	died(s.server, 100*time.Millisecond) // calls of its own go on for a while
	tr.detach()
	return tr
}

// failedDuring does it with a fault, after which the server issues again by itself, or has ended and is started again.
func (s *site) failedDuring(t *testing.T, call, inject string, do func(context.Context)) (int, string, bool) {
	t.Helper()
	s.up(t)
	log := s.path("east-server.log")
	before, _ := os.ReadFile(log)
	hit := s.during(t, call, inject, do).injected()
	if !died(s.server, 50*time.Millisecond) && !s.ends(t, inject) {
		return hit, "", false
	}
	s.server.Kill()
	text, _ := os.ReadFile(log)
	s.serve(t)
	return hit, said(text[len(before):]), true
}

// remark is a line of Tessera's own.
var remark = regexp.MustCompile(`^\d{4}/\d\d/\d\d `)

// said is what a process wrote besides its log.
func said(text []byte) string {
	var lines []string
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "{") && !strings.HasPrefix(line, "ready: ") && !remark.MatchString(line) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return strings.Join(lines, "\n")
}

// points are all calls of something that an error can fail, as a run without a fault makes them, and some more: threads
// share the work differently each time.
func (s *site) points(t *testing.T, p failure, errno string) []point {
	t.Helper()
	var all []point
	made := p.watch(t, s, strings.Join(failing[errno], ",")).most()
	for _, call := range failing[errno] {
		if made[call] == 0 {
			continue
		}
		for n := 1; n <= min(most, made[call]+2); n++ {
			all = append(all, point{call, n})
		}
	}
	t.Logf("%s: %d calls to fail with %s", p.name, len(all), errno)
	if len(all) < 5 {
		t.Fatalf("%s makes only the calls %v", p.name, made)
	}
	return all
}

// sweep is what came of failing calls.
type sweep struct {
	tried, hit, untried int
	// How servers ended: with a sentence, by Go's runtime, or by Tessera, which does so when it can't open its lock file.
	refused, threw, tessera int
	others                  map[string]int
}

func (w sweep) String() string {
	return fmt.Sprintf("%d calls tried, %d failed, %d left out; ended with a sentence %d times, by Go's runtime %d times, by Tessera %d times, otherwise: %v", w.tried, w.hit, w.untried, w.refused, w.threw, w.tessera, w.others)
}

func (w *sweep) try(t *testing.T, s *site, p failure, errno string, at point) {
	t.Helper()
	hit, said, over := p.try(t, s, at.call, at.inject(errno))
	w.tried++
	if hit > 0 {
		w.hit++
	}
	switch {
	case !over:
	case hit == 0:
		t.Errorf("%s of a %s: nothing was failed, and it ended: %.500s", at.inject(errno), p.name, said)
	case strings.HasPrefix(said, "signet: ") && !strings.Contains(said, "\n"):
		w.refused++
	case slices.Contains(anyDescriptor, at.call) && (strings.HasPrefix(said, "runtime: ") || strings.HasPrefix(said, "fatal error: ")):
		w.threw++
	case at.call == "openat" && strings.Contains(said, "treeState.lock: ") && strings.Contains(said, "tessera/storage/posix"):
		w.tessera++
	case strings.Contains(said, "goroutine ") || strings.Contains(said, "panic"):
		t.Errorf("%s of a %s: it ended by %.1500s", at.inject(errno), p.name, said)
	default:
		if w.others == nil {
			w.others = map[string]int{}
		}
		w.others[at.call+": "+said[:min(200, len(said))]]++
	}
}

// finish verifies all that was given.
func (s *site) finish(t *testing.T) {
	t.Helper()
	s.up(t)
	if err := s.issue(t.Context(), s.member); err != nil {
		t.Error(err)
	}
	s.verify(t)
	t.Logf("issued again after %v at the latest", s.slowest.Round(time.Millisecond))
}
