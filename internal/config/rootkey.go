package config

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/internal/strictyaml"
)

// RootKey says where the key of a root is: without an address in the root's folder, else in Vault's Transit or PKI engine,
// whichever has a mount.
type RootKey struct {
	Vault   Vault   `yaml:"vault"`
	Transit Transit `yaml:"transit"`
	PKI     RootPKI `yaml:"pki"`
}

// RootPKI is an issuer in a mount of Vault's PKI engine, which makes key and certificate.
type RootPKI struct {
	Mount string `yaml:"mount"`
	// Issuer is its name.
	Issuer string `yaml:"issuer"`
}

// Complete fills in the defaults, which tell the roots of several trust domains apart, and finds contradictions. The keys
// stand at the top of the file.
func (k *RootKey) Complete(td spiffeid.TrustDomain, f *strictyaml.File) {
	o := origin{f}
	transit, pki := o.Given("transit"), o.Given("pki")
	switch {
	case *k == (RootKey{}) && !transit && !pki:
		return
	case k.Vault.Address == "":
		o.Find("vault.address", noRootVault)
		return
	case transit == pki:
		o.Find(o.one("pki", "vault"), "give either transit, where Vault keeps the root's key, or pki, where Vault makes the certificates as well")
		return
	}
	k.Vault.complete()
	k.Vault.check(o)
	if transit {
		orElse(&k.Transit.Mount, DefaultTransitMount)
		if !td.IsZero() {
			orElse(&k.Transit.Prefix, rootPrefix(td))
		}
		o.checkPath("transit.mount", k.Transit.Mount)
		if o.Given("transit.prefix") || !td.IsZero() { // which has a finding of its own
			o.checkName("transit.prefix", k.Transit.Prefix)
		}
		return
	}
	orElse(&k.PKI.Mount, DefaultPKIMount)
	orElse(&k.PKI.Issuer, "signet-"+td.Name()+"-root")
	o.checkPath("pki.mount", k.PKI.Mount)
	o.checkName("pki.issuer", k.PKI.Issuer)
	if k.PKI.Issuer == DefaultIssuer {
		o.Find("pki.issuer", "pki.issuer: default is Vault's word for whichever issuer a mount signs with: give the root's a name")
	}
}

// rootPrefix is with what the name of a root's key in Transit begins by default. No cluster's default begins so: that has a '-'
// after signet, or a policy for its keys might be one for the root's.
func rootPrefix(td spiffeid.TrustDomain) string { return "signet_" + td.Name() + "_" }

const noRootVault = "vault.address is missing: say where the Vault is that holds the root's key, for example https://vault.example.org:8200"

// DefaultPKIMount is where a PKI engine is mounted by default.
const DefaultPKIMount = "pki"

// LoadRootKey reads a file that says where the key of a root is. The error is strictyaml.Findings if the file could be read
// but can't be used.
func LoadRootKey(path string, td spiffeid.TrustDomain) (*RootKey, error) {
	text, err := durable.ReadFile(path, "file about the root's key", maxRootKey)
	if err != nil {
		return nil, err
	}
	var k RootKey
	_, err = strictyaml.Decode(path, text, &k, strictyaml.Options{What: "file about the root's key", Check: func(f *strictyaml.File) {
		if k.Complete(td, f); k.Vault.Address == "" {
			f.Find("vault.address", noRootVault)
		}
	}})
	if err != nil {
		return nil, err
	}
	return &k, nil
}

// maxRootKey bounds that file, in bytes.
const maxRootKey = 64 << 10

// Text is what LoadRootKey reads, with all that is set and nothing else.
func (k *RootKey) Text() ([]byte, error) {
	if *k == (RootKey{}) {
		return nil, errors.New("the root's key is nowhere else")
	}
	tree := map[string]any{}
	for key, value := range strictyaml.Values(k) {
		if reflect.ValueOf(value).IsZero() {
			continue
		}
		if d, ok := value.(time.Duration); ok {
			value = short(d)
		}
		at := tree
		path := strings.Split(key, ".")
		for _, section := range path[:len(path)-1] {
			inner, ok := at[section].(map[string]any)
			if !ok {
				inner = map[string]any{}
				at[section] = inner
			}
			at = inner
		}
		at[path[len(path)-1]] = value
	}
	var b bytes.Buffer
	b.WriteString("# Where the key of this root is. How Vault is reached may be changed here, mount, prefix and issuer may not.\n")
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(tree); err != nil {
		return nil, fmt.Errorf("write where the root's key is: %w", err)
	}
	return b.Bytes(), nil
}
