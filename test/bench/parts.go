package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// This program is also the processes that it measures with: it starts itself again with the part in a variable, and speaks
// with them by lines of JSON.
const partVariable = "SIGNET_BENCH_PART"

// partConfig is what a part is told first.
type partConfig struct {
	Crowd *crowd `json:"crowd,omitempty"`
	// Socket and bodies of the servers.
	Socket string         `json:"socket,omitempty"`
	Sizes  map[string]int `json:"sizes,omitempty"`
	Fleet  *fleet         `json:"fleet,omitempty"`
}

type lineReader struct{ *bufio.Reader }

func (r lineReader) line() (string, error) {
	s, err := r.ReadString('\n')
	return strings.TrimSpace(s), err
}

// part is the main of such a process.
func part(name string) error {
	in := lineReader{bufio.NewReaderSize(os.Stdin, 1<<20)}
	first, err := in.line()
	if err != nil {
		return err
	}
	var c partConfig
	if err := json.Unmarshal([]byte(first), &c); err != nil {
		return err
	}
	enc := json.NewEncoder(os.Stdout)
	out := func(v any) error { return enc.Encode(v) }
	switch name {
	case "crowd":
		return play(in, out, *c.Crowd)
	case "bare":
		return serveBare(in, out, c.Socket, c.Sizes)
	case "sds":
		return serveSDS(in, out, c.Socket)
	case "fleet":
		return playFleet(in, out, *c.Fleet)
	}
	return fmt.Errorf("no part %q", name)
}

// child is such a process, seen by its parent.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// start runs it with the garbage collector set as signet agent sets its own; GOGC in the environment wins, as it does there.
func start(name string, c partConfig) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), partVariable+"="+name, "GOGC="+cmp.Or(os.Getenv("GOGC"), "200"))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ch := &child{cmd: cmd, in: in, out: bufio.NewReaderSize(out, 1<<20)}
	raw, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	return ch, ch.say(string(raw))
}

func (c *child) say(line string) error {
	_, err := io.WriteString(c.in, line+"\n")
	return err
}

// hear reads one answer, which must come within the limit.
func (c *child) hear(ctx context.Context, limit time.Duration, into any) error {
	type answer struct {
		line []byte
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		line, err := c.out.ReadBytes('\n')
		got <- answer{line, err}
	}()
	select {
	case a := <-got:
		if a.err != nil {
			return fmt.Errorf("a process of the benchmark has ended: %w", a.err)
		}
		return json.Unmarshal(a.line, into)
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(limit):
		return fmt.Errorf("a process of the benchmark does not answer within %s", limit)
	}
}

func (c *child) tell(ctx context.Context, line string, limit time.Duration, into any) error {
	return errors.Join(c.say(line), c.hear(ctx, limit, into))
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// end closes its input, which ends it.
func (c *child) end() {
	_ = c.in.Close()
	timer := time.AfterFunc(10*time.Second, func() { _ = c.cmd.Process.Kill() })
	defer timer.Stop()
	_ = c.cmd.Wait()
}
