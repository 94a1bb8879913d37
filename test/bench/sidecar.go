package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// sidecar is a client of SDS as Envoy is one: a connection with one stream for each secret, each answer acknowledged. It
// speaks HTTP/2 frames by hand, so that thousands of them leave the machine to the server that is measured.
type sidecar struct {
	conn   net.Conn
	framer *http2.Framer
	names  []string
	// deaf: after the first secrets it neither reads nor acknowledges.
	deaf bool
}

// dial waits while the listener's queue is full.
func dial(socket string) (net.Conn, error) {
	for wait := time.Millisecond; ; {
		c, err := net.Dial("unix", socket)
		if !errors.Is(err, syscall.EAGAIN) {
			return c, err
		}
		time.Sleep(wait)
		wait = min(2*wait, 50*time.Millisecond)
	}
}

// open asks for the secrets.
func openSidecar(socket string, names []string, deaf bool) (*sidecar, error) {
	c, err := dial(socket)
	if err != nil {
		return nil, err
	}
	s := &sidecar{conn: c, names: names, deaf: deaf}
	var out bytes.Buffer
	out.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&out, nil)
	if err := f.WriteSettings(); err != nil {
		return nil, err
	}
	var head bytes.Buffer
	enc := hpack.NewEncoder(&head)
	for i, name := range names {
		head.Reset()
		for _, h := range [][2]string{
			{":method", "POST"},
			{":scheme", "http"},
			{":path", "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"},
			{":authority", "signet_agent"},
			{"content-type", "application/grpc"},
			{"te", "trailers"},
		} {
			if err := enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}); err != nil {
				return nil, err
			}
		}
		id := uint32(2*i + 1)
		if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: head.Bytes(), EndHeaders: true}); err != nil {
			return nil, err
		}
		if err := ask(f, id, &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{name}}); err != nil {
			return nil, err
		}
	}
	if _, err := c.Write(out.Bytes()); err != nil {
		return nil, err
	}
	s.framer = http2.NewFramer(c, c)
	s.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	return s, nil
}

func ask(f *http2.Framer, stream uint32, r *discoveryv3.DiscoveryRequest) error {
	m, err := proto.Marshal(r)
	if err != nil {
		return err
	}
	return f.WriteData(stream, false, append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(m))), m...))
}

// run reads and acknowledges until the connection ends. first is called once, when each stream has its first secret; took
// is told the size of each.
func (s *sidecar) run(first func(), took func(name string, size int)) error {
	body := make([][]byte, len(s.names))
	served := make([]bool, len(s.names))
	missing := len(s.names)
	for {
		frame, err := s.framer.ReadFrame()
		if err != nil {
			return err
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				if err := s.framer.WriteSettingsAck(); err != nil {
					return err
				}
			}
		case *http2.PingFrame:
			if !frame.IsAck() {
				if err := s.framer.WritePing(true, frame.Data); err != nil {
					return err
				}
			}
		case *http2.GoAwayFrame:
			return fmt.Errorf("the server goes away: %s", frame.DebugData())
		case *http2.RSTStreamFrame:
			return fmt.Errorf("the server resets stream %d: %s", frame.StreamID, frame.ErrCode)
		case *http2.MetaHeadersFrame:
			if frame.StreamEnded() {
				var why []string
				for _, h := range frame.RegularFields() {
					if h.Name == "grpc-status" || h.Name == "grpc-message" {
						why = append(why, h.Value)
					}
				}
				return fmt.Errorf("the server ends a stream: %s", strings.Join(why, " "))
			}
		case *http2.DataFrame:
			i := int(frame.StreamID / 2)
			n := len(frame.Data())
			body[i] = append(body[i], frame.Data()...)
			if n > 0 {
				if err := errors.Join(s.framer.WriteWindowUpdate(0, uint32(n)), s.framer.WriteWindowUpdate(frame.StreamID, uint32(n))); err != nil {
					return err
				}
			}
			if len(body[i]) < 5 || len(body[i]) < 5+int(binary.BigEndian.Uint32(body[i][1:5])) {
				continue
			}
			resp := new(discoveryv3.DiscoveryResponse)
			if err := proto.Unmarshal(body[i][5:], resp); err != nil {
				return err
			}
			took(s.names[i], len(body[i])-5)
			body[i] = nil
			if err := ask(s.framer, frame.StreamID, &discoveryv3.DiscoveryRequest{
				TypeUrl: secretType, ResourceNames: []string{s.names[i]}, VersionInfo: resp.VersionInfo, ResponseNonce: resp.Nonce,
			}); err != nil {
				return err
			}
			if !served[i] {
				served[i] = true
				if missing--; missing == 0 {
					first()
					if s.deaf {
						return nil
					}
				}
			}
		}
	}
}

// crowd is the work of a client process: so many sidecars, opened at once.
type crowd struct {
	Sockets  []string `json:"sockets"` // used in turn
	Sidecars int      `json:"sidecars"`
	Names    []string `json:"names"`
	Deaf     int      `json:"deaf"` // so many of them stop reading after their first secrets
	// Within so many seconds all must be served.
	Within int `json:"within"`
}

// arrival is what a client process reports when all are served, or time is up.
type arrival struct {
	Served int            `json:"served"`
	Millis []float64      `json:"millis"` // from the start to all first secrets, of each that was served
	Sizes  map[string]int `json:"sizes"`  // of the responses, by name
	Errors []string       `json:"errors"`
}

// play is a client process: it waits for a line, opens all, reports, and keeps them until its input ends.
func play(in lineReader, out func(any) error, c crowd) error {
	if _, err := in.line(); err != nil {
		return err
	}
	var mu sync.Mutex
	a := arrival{Sizes: map[string]int{}}
	conns := make([]net.Conn, 0, c.Sidecars)
	start := time.Now()
	all := make(chan struct{})
	var left atomic.Int64
	left.Store(int64(c.Sidecars))
	done := func() {
		if left.Add(-1) == 0 {
			close(all)
		}
	}
	for i := range c.Sidecars {
		go func() {
			fail := func(err error) {
				mu.Lock()
				defer mu.Unlock()
				if len(a.Errors) < 5 {
					a.Errors = append(a.Errors, err.Error())
				}
			}
			s, err := openSidecar(c.Sockets[i%len(c.Sockets)], c.Names, i < c.Deaf)
			if err != nil {
				fail(err)
				done()
				return
			}
			mu.Lock()
			conns = append(conns, s.conn)
			mu.Unlock()
			served := false
			err = s.run(func() {
				mu.Lock()
				a.Served++
				a.Millis = append(a.Millis, float64(time.Since(start).Microseconds())/1e3)
				mu.Unlock()
				served = true
				done()
			}, func(name string, size int) {
				mu.Lock()
				a.Sizes[name] = size
				mu.Unlock()
			})
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				fail(err)
			}
			if !served {
				done()
			}
		}()
	}
	select {
	case <-all:
	case <-time.After(time.Duration(c.Within) * time.Second):
	}
	mu.Lock()
	err := out(a)
	mu.Unlock()
	if err != nil {
		return err
	}
	_, err = in.line() // until the parent closes it
	if errors.Is(err, io.EOF) {
		os.Exit(0) // the connections go with the process
	}
	return err
}
