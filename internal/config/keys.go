package config

import (
	"path/filepath"

	"github.com/signet-ca/signet/keystore"
)

// KeysDir is where a server keeps its keys.
func (s *Server) KeysDir() string { return filepath.Join(s.StateDir, keysName) }

// OpenKeys gives a server's keystore. The passphrase is asked with the first key that is made or opened: of the source
// that the file names, else on the terminal, and there twice where the folder holds no key yet.
func (s *Server) OpenKeys() (*keystore.File, error) {
	dir := s.KeysDir()
	var p keystore.Passphrase
	switch {
	case s.Keystore.PassphraseFile != "":
		p = keystore.PassphraseFile(s.Keystore.PassphraseFile)
	case s.Keystore.PassphraseCredential != "":
		p = keystore.PassphraseCredential(s.Keystore.PassphraseCredential)
	default:
		held, err := keystore.Holds(dir)
		if err != nil {
			return nil, err
		}
		prompt := "Passphrase of the keys in " + dir
		if !held {
			prompt = "New passphrase for the keys in " + dir
		}
		p = keystore.PassphraseTerminal(prompt, !held)
	}
	return keystore.NewFile(keystore.FileConfig{Dir: dir, Passphrase: p})
}

// Passphrase is what seals an agent's keys and cache. An agent starts unattended: without a source in the file it is a
// local secret in the state folder, and the second result is true, which means protection by file mode alone.
func (a *Agent) Passphrase() (keystore.Passphrase, bool) {
	switch {
	case a.Seal.PassphraseFile != "":
		return keystore.PassphraseFile(a.Seal.PassphraseFile), false
	case a.Seal.PassphraseCredential != "":
		return keystore.PassphraseCredential(a.Seal.PassphraseCredential), false
	}
	return keystore.PassphraseLocal(a.StateDir), true
}
