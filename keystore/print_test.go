package keystore

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/big"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// Neither a key nor a passphrase may come out of anything that prints: not as text, not as bytes in decimal or hex.
func TestSecretsNeverPrintThemselves(t *testing.T) {
	const passphrase = "hunter2-hunter2"
	file := quick(t, t.TempDir(), &counted{reply: func(int32) ([]byte, error) { return []byte(passphrase), nil }})
	memory := NewMemory()
	fileKey, memoryKey := create(t, file, "ca", ECDSAP256), create(t, memory, "ca", Ed25519)

	// What must not be seen, in each form that a printer could choose.
	var forbidden []string
	add := func(b []byte) {
		forbidden = append(forbidden, fmt.Sprintf("%x", b), fmt.Sprintf("%X", b), strings.Trim(fmt.Sprint(b), "[]"),
			strings.ReplaceAll(strings.Trim(fmt.Sprint(b), "[]"), " ", ", "), strings.Trim(fmt.Sprintf("%#v", b), "[]byte{}"))
	}
	add([]byte(passphrase))
	forbidden = append(forbidden, passphrase)
	d, err := fileKey.(*localKey).private().(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	add(d)
	forbidden = append(forbidden, new(big.Int).SetBytes(d).String())
	add(memoryKey.(*localKey).private().(ed25519.PrivateKey).Seed())

	var out bytes.Buffer
	for _, v := range []any{
		fileKey, memoryKey, file, memory, file.passphrase, *file.passphrase, &struct{ k Key }{memoryKey},
		holder{fileKey, file},
		*fileKey.(*localKey),
		struct{ K Key }{fileKey},
		struct{ k Key }{fileKey},
		[]Key{fileKey, memoryKey},
		map[string]Key{"k": memoryKey},
		struct{ S *File }{file},
		struct{ s *File }{file},
		struct{ m *Memory }{memory},
		fmt.Errorf("wrapped %v", fileKey),
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		if b, err := json.Marshal(v); err == nil {
			out.Write(b)
		}
		if b, err := yaml.Marshal(v); err == nil {
			out.Write(b)
		}
		for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
			slog.New(h).Info("x", "v", v, "group", slog.GroupValue(slog.Any("v", v)))
		}
	}
	for _, f := range forbidden {
		if i := strings.Index(out.String(), f); i >= 0 {
			t.Errorf("printed: …%s…", out.String()[max(0, i-80):min(out.Len(), i+80)])
		}
	}
	if !strings.Contains(out.String(), "key file:ca@1") || !strings.Contains(out.String(), "key memory:ca@1") {
		t.Error("a printed key is not named by its reference")
	}
}

type holder struct {
	Key  Key
	File *File
}
