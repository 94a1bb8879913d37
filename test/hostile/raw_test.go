//go:build real

package hostile

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// raw speaks HTTP/2 by its frames.
type raw struct {
	net.Conn
	*http2.Framer
	block bytes.Buffer
	enc   *hpack.Encoder
	next  uint32
}

// raw greets a door; whoever calls may then break any rule.
func (d target) raw(from string, settings ...http2.Setting) (*raw, error) {
	c, err := d.enter(from)
	if err != nil {
		return nil, err
	}
	r := &raw{Conn: c, Framer: http2.NewFramer(c, c), next: 1}
	r.enc = hpack.NewEncoder(&r.block)
	r.AllowIllegalWrites = true
	r.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	// No attack waits for ever for a peer that has stopped to read.
	_ = c.SetWriteDeadline(time.Now().Add(10 * time.Second))
	if _, err = io.WriteString(c, http2.ClientPreface); err == nil {
		err = r.WriteSettings(settings...)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return r, nil
}

// encode makes a header block.
func (r *raw) encode(fields ...[2]string) []byte {
	r.block.Reset()
	for _, f := range fields {
		_ = r.enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
	}
	return bytes.Clone(r.block.Bytes())
}

func call(path string, extra ...[2]string) [][2]string {
	return append([][2]string{
		{":method", "POST"},
		{":scheme", "https"},
		{":path", path},
		{":authority", "signet"},
		{"content-type", "application/grpc"},
		{"te", "trailers"},
	}, extra...)
}

// begin opens a stream.
func (r *raw) begin(fields ...[2]string) (uint32, error) {
	id := r.next
	r.next += 2
	return id, r.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: r.encode(fields...), EndHeaders: true})
}

// message is a gRPC message frame that claims a length.
func message(claim uint32, compressed byte, body []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{compressed}, claim), body...)
}

// answer reads until a stream has ended and tells how: by its grpc-status, an HTTP status, or an error of the protocol.
func (r *raw) answer(id uint32) string {
	_ = r.SetReadDeadline(time.Now().Add(20 * time.Second))
	for {
		f, err := r.ReadFrame()
		if err != nil {
			return "closed: " + err.Error()
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			if f.StreamID != id {
				continue
			}
			for _, h := range f.Fields {
				if h.Name == "grpc-status" {
					return h.Value
				}
			}
			if s := f.PseudoValue("status"); s != "200" {
				return "http " + s
			}
		case *http2.RSTStreamFrame:
			if f.StreamID == id {
				return fmt.Sprintf("reset: %v", f.ErrCode)
			}
		case *http2.GoAwayFrame:
			return fmt.Sprintf("goaway: %v", f.ErrCode)
		}
	}
}
