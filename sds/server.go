package sds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/internal/bell"
)

// Limits bound what one caller may hold. A zero field is its default.
type Limits struct {
	// NamesPerStream, default 64.
	NamesPerStream int
	// NameLength in bytes, default 2048: the longest SPIFFE ID.
	NameLength int
	// StreamsPerCaller of one process over all its connections, default 1024.
	StreamsPerCaller int
}

// Config of a Server.
type Config struct {
	// Workloads tells who is behind a connection; required.
	Workloads Workloads
	// Validator is the form of bundles for streams that don't ask for one in their node's metadata
	// (disable_spiffe_cert_validation: true or false, as with SPIRE); default SPIFFE.
	Validator Validator
	Limits    Limits
	// ShutdownSpread is the time over which Shutdown ends streams, so that sidecars come back one after the other;
	// default 500 ms.
	ShutdownSpread time.Duration
	// ReturnTime is how long a validator may take to be back after its stream has ended; default ReturnTime.
	ReturnTime time.Duration
	Metrics    prometheus.Registerer // nil = none
	Logger     *slog.Logger          // nil = none
	Now        func() time.Time      // nil = time.Now
}

// Server is Envoy's SecretDiscoveryService.
type Server struct {
	workloads Workloads
	validator Validator
	limits    Limits
	spread    time.Duration
	log       *slog.Logger
	now       func() time.Time
	metrics   *metrics
	secrets   *renderer

	beliefs beliefs
	// leaves rings when a stream may use another certificate than before.
	leaves bell.Bell
	// endedLeaves are the issuers of certificates that streams used which have ended.
	endedLeaves ended[string]
	callers     callers
	live        liveStreams
	streams     atomic.Uint64 // number of the last stream

	// refusals bounds what is logged of callers that get no stream, who may come as often as they like; unlogged counts the rest.
	refusals *rate.Limiter
	unlogged atomic.Int64

	shutdown sync.Once
	closing  chan struct{}
}

var _ secretv3.SecretDiscoveryServiceServer = (*Server)(nil)

// New makes a server. It is to be registered with a gRPC server that has ServerOptions and ConnCredentials.
func New(c Config) (*Server, error) {
	switch {
	case c.Workloads == nil:
		return nil, errors.New("SDS server without Workloads: nobody could be told from anybody")
	case c.Validator == "":
		c.Validator = SPIFFE
	case c.Validator != SPIFFE && c.Validator != TrustedCA:
		return nil, fmt.Errorf("SDS validator %q: use %q or %q", c.Validator, SPIFFE, TrustedCA)
	}
	if c.Limits.NamesPerStream < 0 || c.Limits.NameLength < 0 || c.Limits.StreamsPerCaller < 0 || c.ShutdownSpread < 0 || c.ReturnTime < 0 {
		return nil, errors.New("SDS server: a limit below zero would refuse everybody; leave it out for the default")
	}
	orDefault := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	orDefault(&c.Limits.NamesPerStream, 64)
	orDefault(&c.Limits.NameLength, 2048)
	orDefault(&c.Limits.StreamsPerCaller, 1024)
	if c.ShutdownSpread == 0 {
		c.ShutdownSpread = 500 * time.Millisecond
	}
	if c.ReturnTime == 0 {
		c.ReturnTime = ReturnTime
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	m, err := newMetrics(c.Metrics)
	if err != nil {
		return nil, err
	}
	s := &Server{
		workloads: c.Workloads,
		validator: c.Validator,
		limits:    c.Limits,
		spread:    c.ShutdownSpread,
		log:       c.Logger,
		now:       c.Now,
		metrics:   m,
		secrets:   &renderer{metrics: m, log: c.Logger, now: c.Now, check: checkSVID},
		closing:   make(chan struct{}),
		refusals:  rate.NewLimiter(10, 50),
	}
	s.callers.limit = c.Limits.StreamsPerCaller
	s.beliefs.ended = ended[stated]{after: c.ReturnTime, ring: s.beliefs.changed.Ring}
	s.endedLeaves = ended[string]{after: c.ReturnTime, ring: s.leaves.Ring}
	return s, nil
}

// Shutdown ends all streams with Unavailable, each after a random part of ShutdownSpread, and refuses new ones. It
// returns at once. Call it before grpc.Server.GracefulStop, which waits for the streams and doesn't end them by itself;
// give that a deadline and Stop after it, because a stream to a peer that reads nothing can't be ended in order.
func (s *Server) Shutdown() { s.shutdown.Do(func() { close(s.closing) }) }

var errClosing = status.Error(codes.Unavailable, "the agent is stopping; connect again")

func (s *Server) checkType(t string) error {
	if t != "" && t != secretType { // may be left out where the service has one type only
		return status.Errorf(codes.InvalidArgument, "type_url %q: this service has %s only", clip(t, 128), secretType)
	}
	return nil
}

// checkNames bounds a list of names.
func (s *Server) checkNames(names []string) error {
	if err := s.checkCount(len(names)); err != nil {
		return err
	}
	for _, n := range names {
		if len(n) > s.limits.NameLength {
			return status.Errorf(codes.InvalidArgument, "a resource name of %d bytes: at most %d are allowed", len(n), s.limits.NameLength)
		}
	}
	return nil
}

func (s *Server) checkCount(names int) error {
	if names > s.limits.NamesPerStream {
		return status.Errorf(codes.InvalidArgument, "%d resource names: at most %d are allowed", names, s.limits.NamesPerStream)
	}
	return nil
}

// open attests a caller and takes its place among the streams; leave gives it back.
func (s *Server) open(ctx context.Context) (v View, info *connInfo, leave func(), err error) {
	select {
	case <-s.closing:
		return nil, nil, nil, errClosing
	default:
	}
	info, ok := infoFromContext(ctx)
	if !ok {
		s.log.Error("SDS is served by a gRPC server without ConnCredentials: callers can't be told apart")
		return nil, nil, nil, status.Error(codes.Internal, "the agent cannot tell who is calling")
	}
	if !s.callers.enter(info.caller) {
		s.logRefusal(slog.LevelWarn, "SDS stream refused: too many of one process", "peer", info.caller.String(), "limit", s.limits.StreamsPerCaller)
		return nil, nil, nil, status.Errorf(codes.ResourceExhausted, "more than %d SDS streams of one process", s.limits.StreamsPerCaller)
	}
	aside(func() { v, err = s.workloads.Attest(ctx, info.conn) })
	if err != nil {
		s.callers.leave(info.caller)
		return nil, nil, nil, s.refused(info, err)
	}
	return v, info, func() { v.Close(); s.callers.leave(info.caller) }, nil
}

// refused is how an error of Workloads leaves. One with a status was worded by whoever knows the caller, and has logged it.
func (s *Server) refused(info *connInfo, err error) error {
	if worded(err) {
		return err
	}
	return s.ending("SDS caller is not attested", info, err)
}

// ending is how an error of a View leaves: with its own status, which was worded for the caller, or with an opaque one.
func (s *Server) ending(what string, info *connInfo, err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.Error(codes.Unavailable, "the call ended before the caller was known; try again")
	}
	s.logRefusal(slog.LevelInfo, what, "peer", info.caller.String(), "code", status.Code(err).String(), "err", err)
	if !worded(err) {
		return status.Error(codes.Unavailable, "the agent cannot tell who is calling; its log says why")
	}
	return err
}

// worded reports whether an error has a status for the caller. Never Canceled: SPIFFE clients take it as their own wish and
// stop watching for ever.
func worded(err error) bool {
	switch status.Code(err) {
	case codes.OK, codes.Canceled, codes.Unknown:
		return false
	}
	return true
}

func (s *Server) logRefusal(level slog.Level, msg string, args ...any) {
	if !s.refusals.Allow() {
		s.unlogged.Add(1)
		return
	}
	if n := s.unlogged.Swap(0); n > 0 {
		args = append(args, "not_logged_before", n)
	}
	s.log.Log(context.Background(), level, msg, args...)
}

// jitter is a random part of the spread.
func (s *Server) jitter() time.Duration { return rand.N(s.spread) }

// clip bounds text before it goes into a log or an error.
func clip(s string, n int) string {
	if len(s) > n {
		return strings.ToValidUTF8(s[:n], "") + "…"
	}
	return s
}

// foreign is text of a peer. In our log it is short, and without anything that could be key material sent back to us.
type foreign string

var encoded = regexp.MustCompile(`[A-Za-z0-9+/=_-]{32,}`)

func (f foreign) clean() string { return encoded.ReplaceAllString(clip(string(f), 512), "…") }

// LogValue implements slog.LogValuer.
func (f foreign) LogValue() slog.Value { return slog.StringValue(f.clean()) }
