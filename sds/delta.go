package sds

import (
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
)

type deltaStream = grpc.BidiStreamingServer[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]

// delta is the incremental form: requests say what is added and what is dropped, and each resource has its version.
type delta struct{ deltaStream }

// DeltaSecrets implements the service, incremental.
//
// removed_resources is sent for a name that this stream holds and that the caller is no longer granted, and for nothing
// else. Never for what is merely not there yet: Envoy takes it as the answer it starts on, and resets every handshake.
// Envoy keeps using a removed secret where it is already in use; it is those that fetch certificates during the handshake
// that stop. What ends an identity for certain is the end of its certificate's life.
func (s *Server) DeltaSecrets(wire deltaStream) error { return converse(s, delta{wire}) }

func (delta) label() string { return protocolDelta }

func (delta) names(r *discoveryv3.DeltaDiscoveryRequest) [][]string {
	return [][]string{r.GetResourceNamesSubscribe(), r.GetResourceNamesUnsubscribe()}
}

// subscribe drops before it adds: a name in both lists is asked for anew. Whether the nonce is stale doesn't matter.
func (delta) subscribe(s *subscription, r *discoveryv3.DeltaDiscoveryRequest, first, _ bool) (dropped []*want) {
	dropped = s.remove(r.GetResourceNamesUnsubscribe())
	for _, n := range r.GetResourceNamesSubscribe() {
		claimed := ""
		if first { // of a stream, where Envoy says what it has from the one before
			claimed = r.GetInitialResourceVersions()[n]
		}
		s.add(n, claimed)
	}
	return dropped
}

func (w delta) push(nonce, name string, sec *secret) error {
	return w.Send(&discoveryv3.DeltaDiscoveryResponse{
		Resources: []*discoveryv3.Resource{{Name: name, Version: sec.content.version(), Resource: sec.body}},
		TypeUrl:   secretType,
		Nonce:     nonce,
	})
}

func (w delta) withdraw(nonce, name string) (bool, error) {
	return true, w.Send(&discoveryv3.DeltaDiscoveryResponse{RemovedResources: []string{name}, TypeUrl: secretType, Nonce: nonce})
}
