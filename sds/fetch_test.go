package sds

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func (r *rig) fetch(names ...string) (*discoveryv3.DiscoveryResponse, error) {
	r.t.Helper()
	return secretv3.NewSecretDiscoveryServiceClient(r.connect()).FetchSecrets(r.t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: names})
}

func TestFetchGivesAllNamesAtOnceInTheirOrder(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, _ *root) {
		resp := must(r.fetch("ROOTCA", "default", "ROOTCA"))
		if got := names([]*discoveryv3.DiscoveryResponse{resp}); !slices.Equal(got, []string{"ROOTCA", "default"}) {
			t.Errorf("got %v", got)
		}
		one := must(r.fetch("default"))
		if s := serialOf(t, one); s != w.svids[web].Serial || one.TypeUrl != secretType || one.VersionInfo == "" || one.VersionInfo == resp.VersionInfo {
			t.Errorf("serial %s, type %q, version %q", s, one.TypeUrl, one.VersionInfo)
		}
		c := r.open()
		c.subscribe("default")
		if streamed := c.one(); streamed.VersionInfo != one.VersionInfo {
			t.Error("a stream has another version of the same content")
		}
		c.cancel()
		synctest.Wait()
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.open != 0 || len(r.sds.callers.by) != 0 {
			t.Errorf("%d views and %d callers are still there", w.open, len(r.sds.callers.by))
		}
	})
}

func TestFetchWaitsForAFirstIssuanceWithinBounds(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		w.change(func(w *world) { w.svids[web] = nil })
		started := time.Now()
		_, err := r.fetch("ROOTCA", "default")
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "default") || time.Since(started) != fetchWait {
			t.Errorf("after %s: %v", time.Since(started), err)
		}
		issued := ca.issue(t, leaf{id: web})
		time.AfterFunc(time.Second, func() { w.setSVID(issued) })
		if s := serialOf(t, must(r.fetch("default"))); s != issued.Serial {
			t.Errorf("serial %s", s)
		}
		w.change(func(w *world) { w.svids[web] = nil })
		time.AfterFunc(time.Second, r.sds.Shutdown)
		started = time.Now()
		if _, err := r.fetch("default"); status.Code(err) != codes.Unavailable || time.Since(started) != time.Second {
			t.Errorf("at shutdown, after %s: %v", time.Since(started), err)
		}
	})
}

func TestFetchGivesNothingOfOthersAndDoesNotSayWhatExists(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, r *rig, w *world, ca *root) {
		w.svids[api] = ca.issue(t, leaf{id: api})
		var told []string
		for _, name := range []string{api.String(), "spiffe://example.org/no/such", "spiffe://other.test", "unknown", "file-cert:/x", "*", ""} {
			_, err := r.fetch("default", name)
			if status.Code(err) != codes.NotFound {
				t.Errorf("%q: %v", name, err)
			}
			told = append(told, strings.NewReplacer(name, "NAME", `"`, "").Replace(status.Convert(err).Message()))
		}
		if told[0] != told[1] {
			t.Errorf("what exists is told from what doesn't: %q", told[:2])
		}
		w.change(func(w *world) {
			w.refused = map[spiffeid.ID]error{api: status.Error(codes.PermissionDenied, "it is banned")}
		})
		if _, err := r.fetch("default", api.String()); status.Code(err) != codes.PermissionDenied || status.Convert(err).Message() != "it is banned" {
			t.Errorf("where there is a reason for this caller: %v", err)
		}
		if w.asked[api] != 0 {
			t.Error("somebody else's certificate was asked for")
		}
		if _, err := r.fetch(slices.Repeat([]string{"default"}, 65)...); status.Code(err) != codes.InvalidArgument {
			t.Errorf("too many names: %v", err)
		}
		if _, err := r.fetch(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("no names: %v", err)
		}
		w.change(func(w *world) { w.refuse = errNoIdentity })
		if _, err := r.fetch("default"); status.Code(err) != codes.PermissionDenied {
			t.Errorf("no identity: %v", err)
		}
	})
}
