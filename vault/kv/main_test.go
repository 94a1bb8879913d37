package kv

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// atEnd gives back what the tests share.
var atEnd []func()

func TestMain(m *testing.M) {
	code := m.Run()
	for _, end := range atEnd {
		end()
	}
	if err := goleak.Find(); err != nil && code == 0 {
		println(err.Error())
		code = 1
	}
	os.Exit(code)
}
