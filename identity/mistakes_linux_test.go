package identity

import (
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The mistakes of others, by their row in docs/mistakes.md.

func TestMistake04TheFirstCertificateIsTheOneThatIsRead(t *testing.T) {
	w := newVerifyWorld(t)
	now := time.Now()
	mine := w.leaf(t, spiffeid.RequireFromPath(td, "/web"), now.Add(-time.Hour), now.Add(time.Hour))
	if _, err := VerifySVID(mine, w.pool(), now); err != nil {
		t.Fatal(err)
	}
	// A stranger's own leaf in front of a good bag: the bag must not vouch for it. Nor may another order of the bag.
	key := verifyKey(t)
	stranger := *mine[0]
	stranger.PublicKey = key.Public()
	forged := verifySign(t, &stranger, &stranger, &key.PublicKey, key)
	for what, chain := range map[string][]*x509.Certificate{
		"a foreign leaf first": append([]*x509.Certificate{forged}, mine...),
		"a foreign leaf alone": {forged},
		"the CA first":         {mine[1], mine[0]},
		"a foreign leaf last":  append(append([]*x509.Certificate{}, mine...), forged),
	} {
		if id, err := VerifySVID(chain, w.pool(), now); err == nil {
			t.Errorf("%s: taken for %s", what, id)
		}
	}
}

func TestMistake07AKeyDoesNotChooseHowMuchWeWork(t *testing.T) {
	odd := func(bits int) *big.Int {
		n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), uint(bits-1)))
		if err != nil {
			t.Fatal(err)
		}
		return n.SetBit(n, bits-1, 1).SetBit(n, 0, 1)
	}
	e := big.NewInt(65537)
	rsa := rsaKey(t)
	point := spkiOf(t, ecKey(t, elliptic.P256()).Public())
	point[len(point)-1] ^= 1 // off the curve
	asks := map[string][]byte{
		"RSA of 16384 bits":                forge(t, rsaSPKI(odd(16384), e), nil, rsa),
		"RSA of 32768 bits":                forge(t, rsaSPKI(odd(32768), e), nil, rsa),
		"RSA with an exponent of 2^31-1":   forge(t, rsaSPKI(odd(4096), big.NewInt(1<<31-1)), nil, rsa),
		"RSA with an exponent of 2^64+1":   forge(t, rsaSPKI(odd(4096), new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 64), big.NewInt(1))), nil, rsa),
		"RSA with an exponent as the key":  forge(t, rsaSPKI(odd(4096), odd(4095)), nil, rsa),
		"P-224":                            csrOf(t, ecKey(t, elliptic.P224())),
		"P-521":                            csrOf(t, ecKey(t, elliptic.P521())),
		"a point off the curve":            forge(t, point, nil, nil),
		"a request of the greatest size":   append([]byte{0x30, 0x82, 0x1f, 0xfc}, make([]byte, MaxCSR-4)...),
		"a request that nests to the end":  []byte(strings.Repeat("\x30\x80", MaxCSR/2)),
		"a request of a thousand integers": append([]byte{0x30, 0x82, 0x0b, 0xb8}, []byte(strings.Repeat("\x02\x01\x01", 1000))...),
	}
	const rounds, most = 100, time.Millisecond
	for what, der := range asks {
		before := cpu(t)
		for range rounds {
			if _, err := ParseCSR(der); err == nil {
				t.Fatalf("%s: accepted", what)
			}
		}
		if each := (cpu(t) - before) / rounds; each > most {
			t.Errorf("%s: refused after %s of CPU, want at most %s", what, each, most)
		}
	}
}

// cpu is what this process has computed so far.
func cpu(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
