package pki

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/signet-ca/signet/test/lab"
)

// theVault is the real one of all tests here that need it. Each mounts an engine of its own.
var theVault = lab.OneVault{Plain: true}

func TestMain(m *testing.M) { goleak.VerifyTestMain(theVault.During(m)) }
