// Package audit is the log of everything a server issues and decides: append-only, Merkle-hashed, one per server instance.
//
// The promise: when Append returns, the entries are durable and have their final index; a checkpoint signed with a key
// that is not a CA's covers them soon after; and anybody with a copy of the folder and the verifier key can prove what is
// in it with the transparency-dev client libraries alone. Nothing is ever changed or removed.
//
// Log writes (one process per folder), Reader reads and proves (any folder, a copy too), Witness is the agent's side.
// The folder is a C2SP tlog-tiles log (https://c2sp.org/tlog-tiles) kept by Tessera; this package adds what a log of
// certificates must not do without: bounds on what is in flight, a re-read of what was written before anything is signed
// over it, and an index that says nothing the Merkle tree does not.
//
// An entry's meaning is in api/signet/audit/v1; this package stores bytes, finds them again and proves them.
package audit

import "errors"

// Receipt says where an entry stands in the log.
type Receipt struct {
	Index uint64
}

// Errors that callers tell apart with errors.Is.
var (
	// ErrOverloaded: too many entries wait for the disk. Nothing was appended; try again later.
	ErrOverloaded = errors.New("the audit log is overloaded")
	// ErrClosed: the log was closed. Nothing was appended.
	ErrClosed = errors.New("the audit log is closed")
	// ErrDamaged: the log contradicts itself or what was signed before.
	ErrDamaged = errors.New("the audit log is damaged")
	// ErrNotInLog: the log, as its checkpoint has it, holds no such entry.
	ErrNotInLog = errors.New("not in the audit log")
	// ErrBadProof: a proof does not prove what is asked.
	ErrBadProof = errors.New("the proof does not hold")
	// ErrRollback: the log is smaller than it was.
	ErrRollback = errors.New("the audit log was rolled back")
	// ErrFork: the log shows two histories.
	ErrFork = errors.New("the audit log has forked")
)

const (
	// maxEntry is the longest entry, in bytes (C2SP tlog-tiles, "Log entries": a uint16 holds its length).
	maxEntry = 1<<16 - 1
	// maxCheckpoint bounds a checkpoint with its signatures, in bytes.
	maxCheckpoint = 64 << 10
)
