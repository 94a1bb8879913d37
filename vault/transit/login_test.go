package transit

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/vault"
)

func TestALoginThatIsRefusedIsNotBlamedOnThePolicy(t *testing.T) {
	f := newFakeTransit(t)
	refuses := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		_, _ = w.Write([]byte(`{"errors":["permission denied"]}`))
	}))
	t.Cleanup(refuses.Close)
	f.Server = refuses
	s := f.store(t)
	ref := keystore.Ref{Backend: Backend, Name: "intermediate", Version: 1}
	_, opened := s.Open(t.Context(), ref)
	_, made := s.Create(t.Context(), "intermediate", keystore.ECDSAP256, 0)
	_, listed := s.List(t.Context())
	for what, err := range map[string]error{"open": opened, "make": made, "list": listed, "delete": s.Delete(t.Context(), ref)} {
		if !errors.Is(err, vault.ErrLogin) || strings.Contains(err.Error(), "capability") || strings.Contains(err.Error(), "vault-policy") {
			t.Errorf("%s: %v", what, err)
		}
	}
}
