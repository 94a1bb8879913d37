package sds

import (
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"
)

type sotwStream = grpc.BidiStreamingServer[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]

// sotw is state of the world: each request has all names, and there is no word for a withdrawal.
type sotw struct{ sotwStream }

// StreamSecrets implements the service, state of the world.
func (s *Server) StreamSecrets(wire sotwStream) error { return converse(s, sotw{wire}) }

func (sotw) label() string { return protocolSotW }

func (sotw) names(r *discoveryv3.DiscoveryRequest) [][]string {
	return [][]string{r.GetResourceNames()}
}

func (sotw) subscribe(s *subscription, r *discoveryv3.DiscoveryRequest, first, answered bool) (dropped []*want) {
	dropped, changed := s.set(r.GetResourceNames())
	if first && r.GetVersionInfo() != "" { // Envoy says what it accepted last on the stream before, whatever the name was
		for _, w := range s.wanted {
			w.came = true
		}
	}
	// Asked again for what is already subscribed, and not as the answer to something: Envoy has a new place for the same
	// secret, or missed it. A NACK is never a reason to send again (xDS, "ACK/NACK").
	if !first && !changed && !answered && r.GetErrorDetail() == nil && !s.current(r.GetVersionInfo()) {
		s.resend()
	}
	return dropped
}

func (w sotw) push(nonce, _ string, sec *secret) error {
	return w.Send(&discoveryv3.DiscoveryResponse{
		VersionInfo: sec.content.version(),
		Resources:   []*anypb.Any{sec.body},
		TypeUrl:     secretType,
		Nonce:       nonce,
	})
}

func (sotw) withdraw(string, string) (bool, error) { return false, nil }
