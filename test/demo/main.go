// Command demo shows with real parts what Signet is for: an offline root, two clusters, four stock Envoys under load.
//
// By itself it is the main job from end to end: certificates are renewed, what must be refused is refused, and all that was
// issued is proven. `demo rotation` replaces an intermediate and the root, twice, the second time because a key was stolen,
// without losing a request; `demo roots` replaces the root three times, with every Envoy on delta. `demo vault` has the root and
// the keys of the CAs in HashiCorp Vault, which goes away for a while.
//
// It exits with 1 and a reason as soon as one of these does not hold. Everything lies in .demo/.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

func init() {
	// Children are started with Pdeathsig, which follows the thread that started them: the main thread lives longest.
	runtime.LockOSThread()
}

func main() {
	keep := flag.Bool("keep", false, "leave everything running and print what to try")
	dir := flag.String("dir", ".demo", "folder for everything the demo makes; emptied first")
	signet := flag.String("signet", ".tools/bin/signet", "the signet binary")
	flag.Parse()
	tell := story
	switch flag.Arg(0) {
	case "":
	case "rotation":
		tell = rotationStory
	case "roots":
		tell = rootsStory
	case "vault":
		tell = vaultStory
	default:
		fmt.Fprintf(os.Stderr, "demo: there is no demo %q: give rotation, roots, vault, or nothing\n", flag.Arg(0))
		os.Exit(2)
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, tell, *dir, *signet, *keep); err != nil {
		fmt.Printf("demo: FAIL: %v\n", err)
		os.Exit(1)
	}
	fmt.Println("demo: PASS")
}

// limit bounds a demo's own time; the marks are 60 s and 120 s, and a machine may be slow.
const limit = 8 * time.Minute

// step is one part of a story; it says what was seen.
type step struct {
	title string
	do    func(context.Context) (string, error)
}

// teller sets a story up: its steps in order, and what is printed at the end.
type teller func(*demo) (steps []step, table, tryThis func())

// run tells a story.
func run(ctx context.Context, tell teller, dir, signet string, keep bool) (err error) {
	d, err := newDemo(ctx, dir, signet)
	if err != nil {
		return err
	}
	within, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done after %s", limit))
	defer cancel()
	defer func() {
		d.stop()
		if cause := context.Cause(within); err != nil && cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w (%w)", err, cause)
		}
		if err != nil {
			err = fmt.Errorf("%w; what every part said is in %s", err, filepath.Join(dir, "*.log"))
		}
	}()
	steps, table, tryThis := tell(d)
	for i, s := range steps {
		if err := d.step(within, fmt.Sprintf("%d/%d %s", i+1, len(steps), s.title), s.do); err != nil {
			return err
		}
	}
	table()
	if keep {
		tryThis()
		<-ctx.Done()
	}
	return nil
}

// story is the main job.
func story(d *demo) ([]step, func(), func()) {
	return []step{
		{"an offline root for example.org", d.makeRoot},
		{"cluster east: keys, control CA, ceremony", func(ctx context.Context) (string, error) { return d.join(ctx, d.east) }},
		{"cluster west: keys, control CA, ceremony", func(ctx context.Context) (string, error) { return d.join(ctx, d.west) }},
		{"a server and an agent in each cluster", d.startServersAndAgents},
		{"registrations", d.register},
		{"a frontend and a backend Envoy in each cluster", d.startEnvoys},
		{"load both ways while leaves of 10 s are renewed", d.load},
		{"what must be refused is refused", d.refusals},
		{"every serial seen on the wire is in a log, proven", d.prove},
		{"one changed byte in a copy of a log is found", d.tamper},
	}, d.table, d.tryThis
}
