package lab

import (
	"context"
	"os"
	"sync"
)

// OneVault is the Vault that the tests of a package share. It is started for the first test that asks; TestMain runs the
// tests by During, which ends it. Should the test binary die, Vault dies with it.
type OneVault struct {
	// Plain listens without TLS.
	Plain bool

	once  sync.Once
	vault *Vault
	err   error
	dir   string
}

// Get is the Vault, for any number of goroutines.
func (o *OneVault) Get() (*Vault, error) {
	o.once.Do(func() {
		if o.dir, o.err = os.MkdirTemp("", "signet-vault-"); o.err == nil {
			o.vault, o.err = StartVault(context.Background(), VaultConfig{Dir: o.dir, Plain: o.Plain})
		}
	})
	return o.vault, o.err
}

// Tests is a *testing.M, or what is to be run as one.
type Tests interface{ Run() int }

// During is m with the end of the Vault in it, so that leaks which are looked for afterwards are the tests' own:
//
//	func TestMain(m *testing.M) { goleak.VerifyTestMain(theVault.During(m)) }
func (o *OneVault) During(m Tests) Tests { return during{m, o} }

type during struct {
	tests Tests
	vault *OneVault
}

func (d during) Run() int {
	defer d.vault.end()
	return d.tests.Run()
}

// end gives back what Get has made, if anything. Nobody gets it afterwards.
func (o *OneVault) end() {
	o.once.Do(func() { o.err = os.ErrClosed })
	if o.vault != nil {
		o.vault.Stop()
	}
	if o.dir != "" {
		_ = os.RemoveAll(o.dir)
	}
}
