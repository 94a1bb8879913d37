// Package audit is the log of everything a server issues and decides: append-only, Merkle-hashed, one per server instance.
//
// The promise: when Append returns, the entries are durable and have their final index; a checkpoint signed with a key
// that is not a CA's covers them soon after; and anybody with a copy of the folder and the verifier key can prove what is
// in it with the transparency-dev client libraries alone. Nothing is ever changed or removed.
//
// An entry's meaning is in api/signet/audit/v1; this package stores bytes, finds them again and proves them.
package audit

// Receipt says where an entry stands in the log.
type Receipt struct {
	Index uint64
}
