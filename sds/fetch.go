package sds

import (
	"context"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// fetchWait is how long FetchSecrets waits for a first issuance.
const fetchWait = 10 * time.Second

// FetchSecrets implements the service: the secrets of all names at once, for those who don't stay for renewals. It waits
// a little for what is granted and not there yet, then it is Unavailable. A name that is unknown or not granted is
// NotFound at once, and which of the two is not said; where the view has a reason for this caller, that is the answer. A
// stream has no word for any of it.
func (s *Server) FetchSecrets(ctx context.Context, r *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	if err := s.checkType(r.GetTypeUrl()); err != nil {
		return nil, err
	}
	if err := s.checkNames(r.GetResourceNames()); err != nil {
		return nil, err
	}
	if len(r.GetResourceNames()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "no resource_names: name what you want, such as default or ROOTCA")
	}
	view, info, leave, err := s.open(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	form := validatorFor(r.GetNode(), s.validator)
	var sub subscription // takes each name once
	sub.set(r.GetResourceNames())
	timer := time.NewTimer(fetchWait)
	defer timer.Stop()
	for {
		changed := view.Changed()
		if err := view.Err(); err != nil {
			return nil, s.ending("SDS fetch ends: the caller has no identity", info, err)
		}
		resp, missing, err := s.collect(view, &sub, form)
		if resp != nil || err != nil {
			return resp, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		case <-s.closing:
			return nil, errClosing
		case <-timer.C:
			return nil, status.Errorf(codes.Unavailable, "there is nothing under %s yet, though it is granted: the agent's log says what it waits for; try again", missing)
		}
	}
}

// collect answers for all names, or says which one is missing.
func (s *Server) collect(view View, sub *subscription, form Validator) (resp *discoveryv3.DiscoveryResponse, missing string, err error) {
	resp = &discoveryv3.DiscoveryResponse{TypeUrl: secretType}
	var sent []*content
	for _, w := range sub.wanted {
		sec, why, _ := s.secrets.resolve(view, w.target, form)
		switch {
		case sec != nil:
			resp.Resources, sent = append(resp.Resources, sec.body), append(sent, sec.content)
		case why == absentPending || why == absentWithheld:
			missing = w.shown()
		default:
			s.metrics.unanswered.WithLabelValues(string(why)).Inc()
			if err := view.Refusal(w.id); err != nil {
				return nil, "", err
			}
			return nil, "", status.Errorf(codes.NotFound, "%s is unknown here or not granted to this caller", w.shown())
		}
	}
	if missing != "" {
		return nil, missing, nil
	}
	versions := make([]string, 0, len(sent))
	for _, c := range sent {
		versions = append(versions, c.version())
		s.metrics.pushes.WithLabelValues(c.kind).Inc()
	}
	resp.VersionInfo = versions[0]
	if len(versions) > 1 {
		resp.VersionInfo = digestOf(versions...).version()
	}
	return resp, "", nil
}
