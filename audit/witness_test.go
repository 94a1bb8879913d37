package audit

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// history is a log's checkpoints, and proofs between them.
type history struct {
	*Log
	t     *testing.T
	notes map[uint64]Checkpoint
}

func newHistory(t *testing.T, c Config, sizes ...int) history {
	t.Helper()
	h := history{open(t, c), t, map[uint64]Checkpoint{}}
	h.notes[0] = awaitSize(t, h.Log, 0)
	n := 0
	for _, size := range sizes {
		add(t, h.Log, events(n, size-n)...)
		n = size
		h.notes[uint64(size)] = awaitSize(t, h.Log, uint64(size))
	}
	return h
}

func (h history) advance(w *Witness, from, to uint64) error {
	hashes, err := h.Consistency(h.t.Context(), from, to)
	if err != nil {
		h.t.Fatal(err)
	}
	return w.Advance(h.notes[to].Note, from, hashes)
}

func witness(t *testing.T, path, vkey string) *Witness {
	t.Helper()
	w, err := NewWitness(path, testOrigin, vkey)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestAWitnessFollowsALogThatOnlyGrows(t *testing.T) {
	h := newHistory(t, testConfig(filepath.Join(t.TempDir(), "log"), testKey(t)), 3, 8, 300)
	path := filepath.Join(t.TempDir(), "checkpoint")
	w := witness(t, path, h.VerifierKey())
	if size, root := w.Seen(); size != 0 || root != nil {
		t.Errorf("before the first: %d %x", size, root)
	}
	from := uint64(0)
	for _, to := range []uint64{0, 3, 3, 8, 300} {
		if err := h.advance(w, from, to); err != nil {
			t.Fatalf("%d to %d: %v", from, to, err)
		}
		w = witness(t, path, h.VerifierKey()) // a restart
		if size, root := w.Seen(); size != to || !bytes.Equal(root, h.notes[to].RootHash) {
			t.Fatalf("seen %d %x", size, root)
		}
		from = to
	}
}

func TestAWitnessBeginsAnywhere(t *testing.T) {
	h := newHistory(t, testConfig(filepath.Join(t.TempDir(), "log"), testKey(t)), 3, 8)
	w := witness(t, filepath.Join(t.TempDir(), "checkpoint"), h.VerifierKey())
	if err := w.Advance(h.notes[3].Note, 0, nil); err != nil {
		t.Fatal(err)
	}
	if err := h.advance(w, 3, 8); err != nil {
		t.Error(err)
	}
}

func TestAWitnessSeesARollbackAndAFork(t *testing.T) {
	key := testKey(t)
	h := newHistory(t, testConfig(filepath.Join(t.TempDir(), "log"), key), 5, 9, 20)
	// The same log with another history.
	forged := testConfig(filepath.Join(t.TempDir(), "log"), key)
	f := history{open(t, forged), t, map[uint64]Checkpoint{}}
	add(t, f.Log, events(100, 9)...)
	f.notes[9] = awaitSize(t, f.Log, 9)
	add(t, f.Log, events(109, 11)...)
	f.notes[20] = awaitSize(t, f.Log, 20)
	proofOf := func(h history, from, to uint64) [][]byte {
		hashes, err := h.Consistency(t.Context(), from, to)
		if err != nil {
			t.Fatal(err)
		}
		return hashes
	}

	for name, tc := range map[string]struct {
		note   []byte
		from   uint64
		hashes [][]byte
		kind   error
	}{
		"smaller":                         {h.notes[5].Note, 9, nil, ErrRollback},
		"same size, another root":         {f.notes[9].Note, 9, nil, ErrFork},
		"larger, of another history":      {f.notes[20].Note, 9, proofOf(f, 9, 20), ErrFork},
		"larger, with the wrong proof":    {h.notes[20].Note, 9, proofOf(f, 9, 20), ErrFork},
		"larger, without proof":           {h.notes[20].Note, 9, nil, ErrFork},
		"larger, with a hash of one byte": {h.notes[20].Note, 9, [][]byte{{1}}, ErrFork},
	} {
		path := filepath.Join(t.TempDir(), "checkpoint")
		w := witness(t, path, h.VerifierKey())
		if err := w.Advance(h.notes[9].Note, 0, nil); err != nil {
			t.Fatal(err)
		}
		err := w.Advance(tc.note, tc.from, tc.hashes)
		if !errors.Is(err, tc.kind) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if size, root := w.Seen(); size != 9 || !bytes.Equal(root, h.notes[9].RootHash) {
			t.Errorf("%s: now believes %d %x", name, size, root)
		}
		evidence, rerr := os.ReadFile(path + ".evidence")
		if rerr != nil || !bytes.Contains(evidence, h.notes[9].Note) || !bytes.Contains(evidence, tc.note) {
			t.Errorf("%s: the evidence does not have both checkpoints: %s (%v)", name, evidence, rerr)
		}
		// The first evidence is kept.
		if err := w.Advance(h.notes[5].Note, 9, nil); !errors.Is(err, ErrRollback) {
			t.Errorf("%s: afterwards: %v", name, err)
		}
		if again, _ := os.ReadFile(path + ".evidence"); !bytes.Equal(again, evidence) {
			t.Errorf("%s: the evidence was overwritten", name)
		}
		if err := h.advance(w, 9, 20); err != nil {
			t.Errorf("%s: the true history is not followed any more: %v", name, err)
		}
	}
}

func TestAWitnessTakesNoOthersWord(t *testing.T) {
	h := newHistory(t, testConfig(filepath.Join(t.TempDir(), "log"), testKey(t)), 5, 9)
	otherConfig := testConfig(filepath.Join(t.TempDir(), "log"), testKey(t))
	other := newHistory(t, otherConfig, 20)
	path := filepath.Join(t.TempDir(), "checkpoint")
	w := witness(t, path, h.VerifierKey())
	for name, note := range map[string][]byte{
		"another key's": other.notes[20].Note, "nothing": nil, "garbage": []byte("x"),
		"changed": bytes.Replace(h.notes[5].Note, []byte("\n5\n"), []byte("\n6\n"), 1), "huge": make([]byte, maxCheckpoint+1),
	} {
		if err := w.Advance(note, 0, nil); err == nil || errors.Is(err, ErrFork) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if size, _ := w.Seen(); size != 0 {
		t.Errorf("seen %d", size)
	}
	if err := h.advance(w, 0, 5); err != nil {
		t.Fatal(err)
	}
	// A proof from elsewhere is a misunderstanding, not a fork.
	if err := w.Advance(h.notes[9].Note, 0, nil); err == nil || errors.Is(err, ErrFork) || !strings.Contains(err.Error(), "starts at size 0") {
		t.Errorf("%v", err)
	}
	if err := w.Advance(h.notes[9].Note, 5, make([][]byte, 1000)); err == nil || errors.Is(err, ErrFork) {
		t.Errorf("%v", err)
	}
	if _, err := NewWitness(path, testOrigin, other.VerifierKey()); err == nil {
		t.Error("took a file of another log")
	}
	if _, err := NewWitness(path, "example.org/west/west-1", h.VerifierKey()); err == nil {
		t.Error("took a key of another origin")
	}
	if _, err := NewWitness(path, testOrigin, "key"); err == nil {
		t.Error("took a key that is none")
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewWitness(path, testOrigin, h.VerifierKey()); err == nil {
		t.Error("forgot what it had seen because the file is empty")
	}
}

func TestAWitnessThatCannotWriteDoesNotAdvance(t *testing.T) {
	h := newHistory(t, testConfig(filepath.Join(t.TempDir(), "log"), testKey(t)), 5)
	dir := filepath.Join(t.TempDir(), "agent")
	w := witness(t, filepath.Join(dir, "checkpoint"), h.VerifierKey()) // a folder that is not there
	if err := h.advance(w, 0, 5); err == nil {
		t.Error("kept what it could not keep")
	}
	if size, _ := w.Seen(); size != 0 {
		t.Errorf("seen %d", size)
	}
}
