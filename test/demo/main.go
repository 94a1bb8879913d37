// Command demo is Signet's main job from end to end with real parts: an offline root, two clusters, four stock Envoys,
// load across clusters while certificates are renewed, what must be refused, and the proof of all that was issued.
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

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *dir, *signet, *keep); err != nil {
		fmt.Printf("demo: FAIL: %v\n", err)
		os.Exit(1)
	}
	fmt.Println("demo: PASS")
}

// limit bounds the demo's own time; the mark is 60 s, and a machine may be slow.
const limit = 3 * time.Minute

// run is the story, in order.
func run(ctx context.Context, dir, signet string, keep bool) (err error) {
	d, err := newDemo(ctx, dir, signet)
	if err != nil {
		return err
	}
	steps, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done after %s", limit))
	defer cancel()
	defer func() {
		d.stop()
		if cause := context.Cause(steps); err != nil && cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w (%w)", err, cause)
		}
		if err != nil {
			err = fmt.Errorf("%w; what every part said is in %s", err, filepath.Join(dir, "*.log"))
		}
	}()

	for _, step := range []struct {
		title string
		do    func(context.Context) (string, error)
	}{
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
	} {
		if err := d.step(steps, step.title, step.do); err != nil {
			return err
		}
	}
	d.table()
	if keep {
		d.tryThis()
		<-ctx.Done()
	}
	return nil
}
