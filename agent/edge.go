package agent

import (
	"context"
	"fmt"
	"runtime/debug"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// edges are where every call of a workload ends: a panic is that call's trouble, not the node's.
func (a *Agent) edges() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (_ any, err error) {
			defer a.edge(&err)
			return h(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
			defer a.edge(&err)
			return h(srv, s)
		}),
	}
}

func (a *Agent) edge(err *error) {
	if p := recover(); p != nil {
		stack := debug.Stack()
		if elsewhere, ok := p.(interface{ Stack() []byte }); ok { // work that the call had done on another goroutine
			stack = elsewhere.Stack()
		}
		a.log.Error("a call panicked", "panic", fmt.Sprintf("%.256v", p), "stack", string(stack))
		*err = status.Error(codes.Internal, "internal error")
	}
}
