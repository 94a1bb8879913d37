package sds

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-ca/signet/trust"
)

// secretType is the only resource type of this service.
const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// Names with a meaning of their own; the others are SPIFFE IDs and trust domain IDs.
const (
	nameDefault = "default" // the SVID of the caller's first identity
	nameOwnRoot = "ROOTCA"  // the bundle of the caller's trust domain
	// nameAllRoots is the bundles of all trust domains that the caller may see, each apart: never as trusted_ca.
	nameAllRoots = "ALL"
)

// Validator is the form in which roots are given to Envoy.
type Validator string

const (
	// SPIFFE is envoy.tls.cert_validator.spiffe: roots are tied to their trust domain. The default.
	SPIFFE Validator = "spiffe"
	// TrustedCA is Envoy's own validator with plain trusted_ca: the only one that honours CRLs, and with it every root
	// may sign for every trust domain.
	TrustedCA Validator = "trusted_ca"
)

// digest identifies the content of a secret under its name, and never depends on a private key: it goes out as the version.
type digest [sha256.Size]byte

func digestOf(parts ...string) digest {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	return digest(h.Sum(nil))
}

// version is the version_info of the content: the same after a restart, because Envoy compares it with what it has.
func (d digest) version() string { return hex.EncodeToString(d[:16]) }

// content tells secrets apart; it holds nothing secret.
type content struct {
	kind   string
	digest digest
	serial string   // of an SVID, as what follows
	issuer string   // the authority key identifier
	says   []stated // of bundles: what an acknowledgement of them says, in the order of their trust domains
	// notAfter of an SVID.
	notAfter time.Time
}

// secret is a rendered Secret. Immutable, and shared by all streams that it goes to.
type secret struct {
	content *content
	body    *anypb.Any
}

// LogValue implements slog.LogValuer.
func (c *content) LogValue() slog.Value { return slog.StringValue(c.kind + " " + c.version()) }

func (c *content) version() string { return c.digest.version() }

// bundle reports whether it is one; nil, which stands for a withdrawal, is none.
func (c *content) bundle() bool { return c != nil && c.kind == kindBundle }

// target is what a name stands for. Unknown names have neither alias nor ID: nothing is ever sent for them.
type target struct {
	name string
	id   spiffeid.ID // of an SVID, or without a path of a trust domain
}

// known reports whether the name has a meaning here, whoever asks.
func (t target) known() bool {
	return !t.id.IsZero() || t.name == nameDefault || t.name == nameOwnRoot || t.name == nameAllRoots
}

// bundles reports whether the name is of bundles.
func (t target) bundles() bool {
	return t.name == nameOwnRoot || t.name == nameAllRoots || !t.id.IsZero() && t.id.Path() == ""
}

// LogValue implements slog.LogValuer: a name is a peer's text unless it is known.
func (t target) LogValue() slog.Value {
	if t.known() {
		return slog.StringValue(t.name)
	}
	return foreign(t.name).LogValue()
}

func parseTarget(name string) target {
	t := target{name: name}
	if strings.HasPrefix(name, "spiffe://") {
		if id, err := spiffeid.FromString(name); err == nil {
			t.id = id
		}
	}
	return t
}

// renderer turns targets into secrets.
type renderer struct {
	metrics *metrics
	log     *slog.Logger
	now     func() time.Time
	// check is checkSVID; tests put what Envoy must reject past it.
	check func(*SVID, trust.Bundle, time.Time) verdict

	mu sync.Mutex
	// bundles keeps the newest rendering for each name, set of trust domains and form.
	bundles map[bundleKey]*secret
}

type bundleKey struct {
	name      string
	tds       string // separated by spaces
	validator Validator
}

// absence says why there is nothing under a name; label values of signet_sds_unanswered_total.
type absence string

const (
	absentUnknown    absence = "unknown"     // the name means nothing here
	absentFile       absence = "file"        // Istio's name of a file beside the sidecar
	absentNotGranted absence = "not_granted" // it is not, or no longer, the caller's
	absentPending    absence = "pending"     // it is the caller's, and not there yet
	absentWithheld   absence = "withheld"    // it failed the check before sending
	absentPooled     absence = "pooled"      // several trust domains in a form that can't keep them apart
)

var absences = []absence{absentUnknown, absentFile, absentNotGranted, absentPending, absentWithheld, absentPooled}

// resolve returns what the target stands for now in this view, or nil and why there is nothing; with retry not zero the
// answer may be another one at that time though nothing changes.
func (r *renderer) resolve(v View, t target, form Validator) (s *secret, why absence, retry time.Time) {
	switch {
	case t.name == nameDefault:
		if ids := v.Identities(); len(ids) > 0 {
			return r.svid(v, t.name, ids[0])
		}
		return nil, absentNotGranted, time.Time{}
	case t.name == nameOwnRoot:
		s, why = r.roots(v, t.name, form, v.TrustDomain())
	case t.name == nameAllRoots && form != SPIFFE:
		why = absentPooled // any root could sign for any trust domain
	case t.name == nameAllRoots:
		s, why = r.roots(v, t.name, form, v.TrustDomain(), v.TrustDomains()...)
	case strings.HasPrefix(t.name, "file-cert:"), strings.HasPrefix(t.name, "file-root:"):
		why = absentFile
	case t.id.IsZero():
		why = absentUnknown
	case t.id.Path() == "":
		if td := t.id.TrustDomain(); td == v.TrustDomain() || slices.Contains(v.TrustDomains(), td) {
			s, why = r.roots(v, t.name, form, td)
		} else {
			why = absentNotGranted
		}
	case slices.Contains(v.Identities(), t.id):
		return r.svid(v, t.name, t.id)
	default:
		why = absentNotGranted
	}
	return s, why, time.Time{}
}

// roots is the secret with the bundle of a trust domain, and with those of others as far as they are there.
func (r *renderer) roots(v View, name string, form Validator, td spiffeid.TrustDomain, others ...spiffeid.TrustDomain) (*secret, absence) {
	tds := append([]spiffeid.TrustDomain{td}, others...)
	slices.SortFunc(tds, spiffeid.TrustDomain.Compare) // SPIFFE validator: unique names, and stable bytes
	tds = slices.Compact(tds)
	var bundles []trust.Bundle
	var says []stated
	parts, names := []string{kindBundle, name, string(form)}, make([]string, 0, len(tds))
	for _, t := range tds {
		b, ok := v.Bundle(t)
		switch {
		case ok && !b.IsZero():
		case t == td:
			return nil, absentPending
		default:
			continue
		}
		sum := b.Digest()
		bundles = append(bundles, b)
		says = append(says, stated{td: t, belief: belief{sequence: b.Sequence(), digest: sum}})
		parts, names = append(parts, t.Name(), string(sum[:])), append(names, t.Name())
	}
	d := digestOf(parts...)
	key := bundleKey{name: name, tds: strings.Join(names, " "), validator: form}
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.bundles[key]; s != nil && s.content.digest == d && slices.Equal(s.content.says, says) {
		return s, ""
	}
	body, err := renderBundles(name, form, bundles)
	if err != nil {
		r.log.Error("bundle can't be encoded for Envoy and is not sent", "trust_domains", key.tds, "err", err)
		return nil, absentWithheld
	}
	s := &secret{body: body, content: &content{kind: kindBundle, digest: d, says: says}}
	if r.bundles == nil {
		r.bundles = map[bundleKey]*secret{}
	}
	r.bundles[key] = s
	return s, ""
}

// renderBundles writes one bundle in either form, and several in the SPIFFE validator's only.
func renderBundles(name string, form Validator, bundles []trust.Bundle) (*anypb.Any, error) {
	if form == TrustedCA {
		if len(bundles) != 1 {
			return nil, fmt.Errorf("%d trust domains in one trusted_ca: each could sign for the others", len(bundles))
		}
		return marshalAny(&tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{
			ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(bundles[0].PEM())},
		}})
	}
	config := &tlsv3.SPIFFECertValidatorConfig{}
	for _, b := range bundles {
		config.TrustDomains = append(config.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
			Name: b.TrustDomain().Name(), TrustBundle: inline(b.PEM()),
		})
	}
	packed, err := marshalAny(config)
	if err != nil {
		return nil, err
	}
	return marshalAny(&tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{
		ValidationContext: &tlsv3.CertificateValidationContext{
			CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: "envoy.tls.cert_validator.spiffe", TypedConfig: packed},
		},
	}})
}

// sharedSVID is what streams share of an SVID beside the SVID itself: one check and one rendering for all of them.
// It lives and dies with the SVID.
type sharedSVID struct {
	mu      sync.Mutex
	verdict verdict
	// secrets by the name asked for: `default` and its SPIFFE ID.
	secrets map[string]*secret
}

func (r *renderer) svid(v View, name string, id spiffeid.ID) (*secret, absence, time.Time) {
	svid := v.SVID(id)
	if svid == nil {
		return nil, absentPending, time.Time{}
	}
	b, ok := v.Bundle(id.TrustDomain())
	if !ok || b.IsZero() {
		return nil, absentPending, time.Time{} // nothing to check it against; the bundle's arrival rings
	}
	now := r.now()
	svid.shared.mu.Lock()
	defer svid.shared.mu.Unlock()
	if !svid.shared.verdict.holds(b, now) {
		was := svid.shared.verdict
		aside(func() { svid.shared.verdict = r.check(svid, b, now) })
		if err := svid.shared.verdict.err; err != nil && svid.shared.verdict.reason != was.reason {
			r.metrics.withheld.WithLabelValues(svid.shared.verdict.reason).Inc()
			r.log.Warn("certificate is not sent because it failed the check before sending; the workload keeps what it has until the next one",
				"spiffe_id", id.String(), "serial", clip(svid.Serial, 64), "reason", svid.shared.verdict.reason, "err", err)
		}
	}
	if svid.shared.verdict.err != nil {
		return nil, absentWithheld, svid.shared.verdict.retry
	}
	if s := svid.shared.secrets[name]; s != nil {
		return s, "", time.Time{}
	}
	// Certificate and key in one Secret: a rotation can't be seen half done.
	body, err := marshalAny(&tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(svid.CertificateChain),
		PrivateKey:       inline(svid.PrivateKey),
	}}})
	if err != nil {
		r.log.Error("certificate can't be encoded for Envoy and is not sent", "spiffe_id", id.String())
		return nil, absentWithheld, time.Time{}
	}
	s := &secret{body: body, content: &content{kind: kindSVID, digest: digestOf(kindSVID, name, string(svid.Digest[:])), serial: clip(svid.Serial, 64), issuer: svid.Issuer, notAfter: svid.NotAfter}}
	if svid.shared.secrets == nil {
		svid.shared.secrets = map[string]*secret{}
	}
	svid.shared.secrets[name] = s
	return s, "", time.Time{}
}

// Why an SVID is withheld; label values of signet_sds_withheld_total.
const (
	withheldKey      = "key"      // chain and key are not a pair
	withheldIdentity = "identity" // the leaf is for somebody else
	withheldValidity = "validity" // something in the chain is expired or not yet valid
	withheldChain    = "chain"    // it does not lead to the bundle that validators are given
)

// verdict is the outcome of the check of an SVID against a bundle.
type verdict struct {
	checked bool
	bundle  trust.Digest
	reason  string
	err     error
	// from and until are the ends of a good verdict; retry is when a bad one may become good by time alone, or zero.
	from, until, retry time.Time
}

// holds reports whether the verdict answers for this bundle at this time.
func (v verdict) holds(b trust.Bundle, now time.Time) bool {
	switch {
	case !v.checked || v.bundle != b.Digest():
		return false
	case v.err == nil:
		return !now.Before(v.from) && !now.After(v.until) // a clock may be set back too
	default:
		return v.retry.IsZero() || now.Before(v.retry)
	}
}

// checkSVID is the last look at a set before it leaves: Envoy would reject a wrong key, but serve an expired or
// unverifiable certificate without a word.
func checkSVID(s *SVID, b trust.Bundle, now time.Time) verdict {
	v := verdict{checked: true, bundle: b.Digest()}
	bad := func(reason string, err error) verdict { v.reason, v.err = reason, err; return v }
	pair, err := tls.X509KeyPair(s.CertificateChain, s.PrivateKey)
	if err != nil {
		return bad(withheldKey, fmt.Errorf("certificate and private key are not a pair: %w", err))
	}
	chain := make([]*x509.Certificate, 0, len(pair.Certificate))
	inter := x509.NewCertPool()
	var notBefore, notAfter time.Time
	for i, der := range pair.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return bad(withheldKey, fmt.Errorf("certificate %d of the chain: %w", i, err))
		}
		chain = append(chain, c)
		if i > 0 {
			inter.AddCert(c)
		}
		if c.NotBefore.After(notBefore) {
			notBefore = c.NotBefore
		}
		if i == 0 || c.NotAfter.Before(notAfter) {
			notAfter = c.NotAfter
		}
	}
	leaf := chain[0]
	switch {
	case s.Digest == [sha256.Size]byte{}:
		return bad(withheldIdentity, errors.New("certificate set has no digest to tell it from others"))
	case len(leaf.URIs) != 1 || leaf.URIs[0].String() != s.ID.String(): // X509-SVID §2: exactly one URI SAN
		return bad(withheldIdentity, fmt.Errorf("certificate does not name %s and nothing else", s.ID))
	case now.Before(notBefore):
		v.retry = notBefore
		return bad(withheldValidity, fmt.Errorf("certificate chain is not valid before %s: check this machine's clock", notBefore.UTC().Format(time.RFC3339)))
	case now.After(notAfter):
		return bad(withheldValidity, fmt.Errorf("certificate chain expired at %s", notAfter.UTC().Format(time.RFC3339)))
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: b.Pool(), Intermediates: inter, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return bad(withheldChain, fmt.Errorf("certificate does not lead to the trust bundle of %s that is served now (digest %s): %w", b.TrustDomain(), b.Digest(), err))
	}
	v.from = notBefore
	for _, path := range chains {
		end := notAfter
		for _, c := range path {
			if c.NotAfter.Before(end) {
				end = c.NotAfter
			}
		}
		if end.After(v.until) {
			v.until = end
		}
	}
	return v
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

// marshalAny is deterministic: equal content is equal bytes, and Envoy's own comparison finds nothing to do.
func marshalAny(m proto.Message) (*anypb.Any, error) {
	a := new(anypb.Any)
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, err
	}
	return a, nil
}
