package identity

import (
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestAProcessIsDescribedByItsPIDForDiagnosis(t *testing.T) {
	a, err := NewUnixAttestor(UnixConfig{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := a.DescribePID(t.Context(), os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"unix:uid:" + strconv.Itoa(os.Geteuid()), "unix:gid:" + strconv.Itoa(os.Getegid())} {
		if !slices.Contains(w.Selectors, Selector(want)) {
			t.Errorf("%v lacks %s", w.Selectors, want)
		}
	}
	if w.Alive != nil || w.Close != nil {
		t.Error("it holds the process")
	}
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{-1, 0, gone.Process.Pid, 1 << 30} {
		if _, err := a.DescribePID(t.Context(), pid); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("pid %d: %v", pid, err)
		}
	}
}

func TestStatusOfAProcessIsReadWhole(t *testing.T) {
	uid, gid, groups, err := parseStatus([]byte("Name:\tUid:\t9\t9\t9\t9\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t30 20 20 \n"))
	if err != nil || uid != 2 || gid != 6 || !slices.Equal(groups, []uint32{20, 30}) {
		t.Fatalf("%d %d %v %v", uid, gid, groups, err)
	}
	for _, text := range []string{"", "Uid:\t1\t2\t3\t4\n", "Uid:\tx\ty\tz\tw\nGid:\t1\t1\t1\t1\n", "Uid:\t1\nGid:\t1\n"} {
		if _, _, _, err := parseStatus([]byte(text)); err == nil {
			t.Errorf("%q was read", text)
		}
	}
}

func FuzzParseStatus(f *testing.F) {
	f.Add([]byte("Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t30 20 20 \n"))
	f.Add([]byte("Uid\nGid:"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if _, _, groups, err := parseStatus(text); err == nil && len(groups) > maxGroups {
			t.Fatal("too many groups")
		}
	})
}
