//go:build real

package hostile

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// records writes TLS 1.3 records by itself, with the keys of a handshake that Go has made: what crypto/tls would never send.
type records struct {
	net.Conn
	secret []byte
	aead   cipher.AEAD
	iv     []byte
	seq    uint64
}

// Contents of records, and handshake messages (RFC 8446 §5.1, §4).
const (
	contentHandshake, contentData = 22, 23
	clientHello, sessionTicket    = 1, 4
	certificateAgain, keyUpdate   = 11, 24
)

var errOtherCipher = errors.New("the handshake chose another cipher than AES-128-GCM")

// records makes the handshake and takes over.
func (d target) records(from string) (*records, error) {
	c, err := d.knock(from)
	if err != nil {
		return nil, err
	}
	var keys bytes.Buffer
	conf := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13, KeyLogWriter: &keys} //nolint:gosec // a bad peer
	if d.known {
		conf.Certificates = []tls.Certificate{{Certificate: site.evil.Chain, PrivateKey: site.evil.Key}}
	}
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	tc := tls.Client(c, conf)
	if err = tc.Handshake(); err == nil && tc.ConnectionState().CipherSuite != tls.TLS_AES_128_GCM_SHA256 {
		err = errOtherCipher
	}
	r := &records{Conn: c}
	if err == nil {
		_, text, _ := strings.Cut(keys.String(), "CLIENT_TRAFFIC_SECRET_0 ")
		line, _, _ := strings.Cut(text, "\n")
		_, secret, _ := strings.Cut(line, " ")
		r.secret, err = hex.DecodeString(secret)
	}
	if err == nil {
		err = r.rekey()
	}
	if err == nil {
		err = r.write(contentData, []byte(http2.ClientPreface+"\x00\x00\x00\x04\x00\x00\x00\x00\x00")) // and empty SETTINGS
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	_ = c.SetDeadline(time.Time{})
	return r, nil
}

func (r *records) expand(label string, n int) []byte {
	label = "tls13 " + label
	info := append(binary.BigEndian.AppendUint16(nil, uint16(n)), byte(len(label))) //nolint:gosec // a few bytes
	info = append(append(info, label...), 0)
	out, err := hkdf.Expand(sha256.New, r.secret, string(info), n)
	if err != nil {
		panic(err)
	}
	return out
}

// rekey takes record keys from the secret (RFC 8446 §7.3).
func (r *records) rekey() error {
	block, err := aes.NewCipher(r.expand("key", 16))
	if err != nil {
		return err
	}
	r.iv, r.seq = r.expand("iv", 12), 0
	r.aead, err = cipher.NewGCM(block)
	return err
}

func (r *records) write(kind byte, content []byte) error {
	nonce := bytes.Clone(r.iv)
	for i := range 8 {
		nonce[4+i] ^= byte(r.seq >> (56 - 8*i))
	}
	r.seq++
	inner := append(bytes.Clone(content), kind)
	head := binary.BigEndian.AppendUint16([]byte{contentData, 3, 3}, uint16(len(inner)+r.aead.Overhead())) //nolint:gosec // at most 2^14
	_ = r.SetWriteDeadline(time.Now().Add(2 * time.Second))
	_, err := r.Write(r.aead.Seal(head, nonce, inner, head))
	return err
}

func handshakeMessage(kind byte, claim int, body ...byte) []byte {
	return append([]byte{kind, byte(claim >> 16), byte(claim >> 8), byte(claim)}, body...)
}

// update sends a KeyUpdate and uses the next keys (RFC 8446 §4.6.3, §7.2); back asks the peer for the same.
func (r *records) update(back byte) error {
	if err := r.write(contentHandshake, handshakeMessage(keyUpdate, 1, back)); err != nil {
		return err
	}
	r.secret = r.expand("traffic upd", 32)
	return r.rekey()
}

// data sends one byte of an HTTP/2 frame that is of no kind, and never ends.
func (r *records) data(sent *int) error {
	head := []byte{0, 0x3f, 0xff, 0xfe, 0, 0, 0, 0, 0}
	b := []byte{0}
	if n := *sent % (len(head) + 0x3fff); n < len(head) {
		b[0] = head[n]
	}
	*sent++
	return r.write(contentData, b)
}

// handshakes are what may be sent once a handshake is over, or may not.
var handshakes = map[string]struct {
	// cut: the door must end the connection by itself.
	cut, silent bool
	send        func(r *records, sent *int) error
}{
	"new keys":                        {cut: true, send: func(r *records, _ *int) error { return r.update(0) }},
	"new keys, and yours":             {cut: true, send: func(r *records, _ *int) error { return r.update(1) }},
	"new keys, and yours, for a byte": {send: func(r *records, sent *int) error { return errors.Join(r.update(1), r.data(sent)) }},
	"the same, and nothing is read":   {silent: true, send: func(r *records, sent *int) error { return errors.Join(r.update(1), r.data(sent)) }},
	"many new keys in one record": {cut: true, send: func(r *records, _ *int) error {
		return r.write(contentHandshake, bytes.Repeat(handshakeMessage(keyUpdate, 1, 1), 1000))
	}},
	"a KeyUpdate of another kind": {cut: true, send: func(r *records, _ *int) error { return r.write(contentHandshake, handshakeMessage(keyUpdate, 1, 2)) }},
	"a hello once more": {cut: true, send: func(r *records, _ *int) error {
		return r.write(contentHandshake, handshakeMessage(clientHello, 100, make([]byte, 100)...))
	}},
	"a ticket": {cut: true, send: func(r *records, _ *int) error {
		return r.write(contentHandshake, handshakeMessage(sessionTicket, 100, make([]byte, 100)...))
	}},
	"a certificate once more": {cut: true, send: func(r *records, _ *int) error {
		return r.write(contentHandshake, handshakeMessage(certificateAgain, 100, make([]byte, 100)...))
	}},
	"a message that claims 16 MiB": {cut: true, send: func(r *records, _ *int) error {
		return r.write(contentHandshake, handshakeMessage(certificateAgain, 1<<24-1, make([]byte, 8000)...))
	}},
	"records without content":         {cut: true, send: func(r *records, _ *int) error { return r.write(contentData, nil) }},
	"a message that goes on for ever": {cut: true, send: func(r *records, _ *int) error { return r.write(contentHandshake, []byte{keyUpdate, 0xff}) }},
	"bytes that no key has ever sealed": {cut: true, send: func(r *records, _ *int) error {
		_, err := r.Write(append([]byte{contentData, 3, 3, 0, 100}, make([]byte, 100)...))
		return err
	}},
}

func TestHandshakesWithoutEndDelayNobody(t *testing.T) {
	if r, err := targets[0].records(source(0)); errors.Is(err, errOtherCipher) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	} else {
		r.Close()
	}
	under(t, 160, func(ctx context.Context) {
		n := 0
		var all hold
		for name, h := range handshakes {
			var begun, sent, cut atomic.Int64
			var work sync.WaitGroup
			for _, d := range targets[:2] {
				n++
				from := source(n)
				work.Go(func() {
					ctx, begin, cancel := fromThere(ctx, time.Second)
					defer cancel()
					for ctx.Err() == nil {
						r, err := d.records(from)
						if err != nil {
							time.Sleep(20 * time.Millisecond) // limits are answers too
							continue
						}
						begin()
						begun.Add(1)
						all.keep(r) // until the end of all, unless the door ends it
						if !h.silent {
							go func() { _, _ = io.Copy(io.Discard, r.Conn); cut.Add(1) }()
						}
						stop := context.AfterFunc(ctx, func() {
							if !h.silent && !h.cut {
								r.Close()
							}
						})
						bytes := 0
						for err == nil && (ctx.Err() == nil || h.cut) { // which ends soon, or a write does in the end
							if err = h.send(r, &bytes); err == nil {
								sent.Add(1)
							}
						}
						stop()
					}
				})
			}
			work.Wait()
			if h.cut {
				for end := time.Now().Add(15 * time.Second); cut.Load() < begun.Load() && time.Now().Before(end); {
					time.Sleep(10 * time.Millisecond)
				}
			}
			t.Logf("%s: %d connections, %d messages, %d ended by the door", name, begun.Load(), sent.Load(), cut.Load())
			if begun.Load() < 2 || sent.Load() == 0 {
				t.Errorf("%s: that is no flood", name)
			}
			if h.cut && cut.Load() < begun.Load() {
				t.Errorf("%s: %d of %d connections go on", name, begun.Load()-cut.Load(), begun.Load())
			}
		}
		all.release()
	})
}

// TestKeysMayChange shows that what floods with is right: a peer that changes its keys now and then is served.
func TestKeysMayChange(t *testing.T) {
	r, err := targets[1].records(source(0))
	if errors.Is(err, errOtherCipher) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	read := make(chan error, 1)
	go func() { _, err := io.Copy(io.Discard, r.Conn); read <- fmt.Errorf("ended by the door: %w", err) }()
	sent := 0
	for range 200 {
		if err := errors.Join(r.update(1), r.data(&sent)); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-read:
		t.Error(err)
	case <-time.After(500 * time.Millisecond):
	}
}
