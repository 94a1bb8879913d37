package ceremony

import (
	"bytes"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/internal/strictyaml"
	"github.com/signet-ca/signet/keystore"
)

// maxFile bounds a ceremony file, in bytes.
const maxFile = 64 << 10

// SignFile is the reviewed file of `root sign -f`.
type SignFile struct {
	// SignConfig without the request itself, which stands alone in RequestFile.
	SignConfig
	RequestFile string
	// Dir is the root's folder, Out the file for the chain.
	Dir, Out string
}

// ReadSignFile reads the reviewed file of `root sign -f`, strictly: an error is strictyaml.Findings if the file could be
// read. Relative paths are relative to the file:
//
//	dir: ./root
//	trust_domain: example.org
//	cluster: east
//	csr: ./east.csr.pem
//	key_fingerprint: SHA256:ab12:…
//	out: ./east.chain.pem
//	algorithm: ecdsa-p256   # default: any that is allowed
//	life: 90d               # default
//	path_length: 0          # default, and the only one
func ReadSignFile(path string) (SignFile, error) {
	var f struct {
		Dir            string               `yaml:"dir" kind:"path" required:"true"`
		TrustDomain    spiffeid.TrustDomain `yaml:"trust_domain" required:"true"`
		Cluster        string               `yaml:"cluster" required:"true"`
		CSR            string               `yaml:"csr" kind:"path" required:"true"`
		KeyFingerprint string               `yaml:"key_fingerprint" required:"true"`
		Out            string               `yaml:"out" kind:"path" required:"true"`
		Algorithm      keystore.Algorithm   `yaml:"algorithm"`
		Life           time.Duration        `yaml:"life"`
		PathLen        int                  `yaml:"path_length"`
	}
	text, err := durable.ReadFile(path, "ceremony file", maxFile)
	if err != nil {
		return SignFile{}, err
	}
	_, err = strictyaml.Decode(path, text, &f, strictyaml.Options{
		What: "ceremony file", Parsers: []strictyaml.Parser{strictyaml.Parse(identity.ParseTrustDomain), strictyaml.Parse(ParseLife)},
		Check: func(at *strictyaml.File) { at.FindError("cluster", identity.ParseName("cluster", f.Cluster)) },
	})
	if err != nil {
		return SignFile{}, err
	}
	return SignFile{
		SignConfig: SignConfig{
			TrustDomain: f.TrustDomain, Cluster: f.Cluster, Algorithm: f.Algorithm, KeyFingerprint: f.KeyFingerprint,
			Life: f.Life, PathLen: f.PathLen,
		},
		RequestFile: f.CSR, Dir: f.Dir, Out: f.Out,
	}, nil
}

// ReadRequestFile reads certificate requests, at most MaxRequests, each of at most MaxRequest bytes, in PEM one after
// another.
func ReadRequestFile(path string) ([][]byte, error) {
	text, err := durable.ReadFile(path, "certificate request", MaxRequests*MaxRequest)
	if err != nil {
		return nil, err
	}
	const end = "-----END " + requestType + "-----"
	var requests [][]byte
	for rest := bytes.TrimSpace(text); len(rest) > 0 || requests == nil; {
		one := rest
		if i := bytes.Index(rest, []byte(end)); i >= 0 {
			one = rest[:i+len(end)]
		}
		rest = bytes.TrimSpace(rest[len(one):])
		if len(requests) > 0 && !bytes.HasSuffix(one, []byte(end)) {
			return nil, fmt.Errorf("%s: something that is no certificate request follows request %d; give requests only", path, len(requests))
		}
		if requests = append(requests, one); len(requests) > MaxRequests {
			return nil, fmt.Errorf("%s holds more than %d certificate requests: sign them in several ceremonies", path, MaxRequests)
		}
	}
	return requests, nil
}

// ParseLife reads how long a CA lives: whole years of 365 days (10y), whole days (90d), or a Go duration (36h).
func ParseLife(s string) (time.Duration, error) {
	const day = 24 * time.Hour
	var d time.Duration
	var err error
	if number, ok := strings.CutSuffix(s, "y"); ok {
		d, err = times(number, 365*day)
	} else if number, ok := strings.CutSuffix(s, "d"); ok {
		d, err = times(number, day)
	} else {
		d, err = time.ParseDuration(s)
	}
	if err != nil || d < time.Second || d%time.Second != 0 {
		return 0, fmt.Errorf("life %.32q: want years, days or whole seconds, for example 10y, 90d or 36h", s)
	}
	return d, nil
}

func times(number string, unit time.Duration) (time.Duration, error) {
	n, err := strconv.ParseUint(number, 10, 32)
	if err == nil && n > uint64(math.MaxInt64/unit) {
		err = strconv.ErrRange
	}
	return time.Duration(n) * unit, err
}
