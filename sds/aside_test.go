package sds

import (
	"bytes"
	"testing"
)

func troublemaker() { panic("trouble") }

func TestAPanicAsideIsTheCallersAndSaysWhere(t *testing.T) {
	done := false
	aside(func() { done = true })
	if !done {
		t.Fatal("it was not waited for")
	}
	defer func() {
		p, ok := recover().(interface{ Stack() []byte })
		if !ok || !bytes.Contains(p.Stack(), []byte("troublemaker")) {
			t.Error("the panic does not say where")
		}
		if s, ok := p.(interface{ String() string }); !ok || s.String() != "trouble" {
			t.Error("the panic does not say what")
		}
	}()
	aside(troublemaker)
	t.Error("the panic was swallowed")
}
