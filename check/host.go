package check

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Thresholds. Room is a share of the file system; a log entry is some hundred bytes, so a tenth is a long time.
const (
	roomWarning = 0.10
	roomError   = 0.02
	// A durable write below slowDisk is what SSDs do; above verySlowDisk the log's batches can't keep up.
	slowDisk     = 50 * time.Millisecond
	verySlowDisk = 500 * time.Millisecond
	probes       = 5
	// maxFiles bounds how many files of a folder are looked at.
	maxFiles = 100_000
)

// Private is a folder whose files are for their owner alone, but for what lies below Except.
type Private struct {
	Dir string
	// Except is what is made for others: sockets, or public files.
	Except []string
	// Entered says that others may enter the folder itself, to reach what is made for them. They may not write to it.
	Entered bool
}

// Modes looks at the owners and modes of a folder and of what is in it: folders 0700, files and sockets 0600 or stricter.
func Modes(p Private) (found Findings) {
	looked := 0
	err := filepath.WalkDir(p.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) && path != p.Dir {
				return nil // gone meanwhile
			}
			return err
		}
		if looked++; looked > maxFiles {
			return fmt.Errorf("more than %d files", maxFiles)
		}
		allowed := fs.FileMode(0o700)
		switch {
		case slices.Contains(p.Except, path) && d.IsDir():
			return fs.SkipDir
		case slices.Contains(p.Except, path):
			return nil
		case p.Entered && path == p.Dir:
			allowed = 0o755
		}
		found = append(found, mode(path, allowed)...)
		return nil
	})
	if err != nil {
		found.add(CodeModes, Unknown, p.Dir, fmt.Sprintf("the files of the folder could not be looked at: %v", err), "")
	} else if len(found) == 0 {
		found.add(CodeModes, OK, p.Dir, "the folder and its files are for their owner alone", "")
	}
	return found
}

// mode looks at one file, folder or socket; nothing is found where all is well.
func mode(path string, allowed fs.FileMode) (found Findings) {
	info, err := os.Lstat(path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			found.add(CodeModes, Unknown, path, fmt.Sprintf("it could not be looked at: %v", err), "")
		}
		return found
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err == nil && st.Uid != uint32(os.Geteuid()) && os.Geteuid() != 0 {
		found.add(CodeModes, Error, path, fmt.Sprintf("it belongs to uid %d, and this is uid %d", st.Uid, os.Geteuid()), fmt.Sprintf("chown %d %s", os.Geteuid(), path))
	}
	if mode := info.Mode().Perm(); mode&^allowed != 0 {
		want := fs.FileMode(0o600)
		if info.IsDir() {
			want = allowed
		}
		found.add(CodeModes, Error, path, fmt.Sprintf("it has mode %04o, so others than its owner may use it", mode), fmt.Sprintf("chmod %o %s", want, path))
	}
	return found
}

// Swap looks whether memory may be written to disk, keys with it. swaps is the text of /proc/swaps.
func Swap(swaps string) (found Findings) {
	var devices []string
	lines := bufio.NewScanner(strings.NewReader(swaps))
	for first := true; lines.Scan(); first = false {
		if f := strings.Fields(lines.Text()); !first && len(f) > 0 {
			devices = append(devices, f[0])
		}
	}
	if len(devices) == 0 {
		found.add(CodeSwap, OK, "swap", "memory is not written to disk", "")
		return found
	}
	found.add(CodeSwap, Warning, "swap", fmt.Sprintf("swap is on (%s), so keys in memory may be written to disk", strings.Join(devices, ", ")), "swapoff -a")
	return found
}

// Host is Swap of this machine.
func Host() (found Findings) {
	text, err := os.ReadFile("/proc/swaps")
	if err != nil {
		found.add(CodeSwap, Unknown, "swap", fmt.Sprintf("it could not be told whether swap is on: %v", err), "")
		return found
	}
	return Swap(string(text))
}

// Machine is what a running process looks at about its machine and its folder.
func Machine(p Private) []Part {
	return []Part{
		{Code: CodeSpace, About: p.Dir, Every: 5 * time.Second, Look: func(context.Context) Findings { return Space(p.Dir) }},
		{Code: CodeDisk, About: p.Dir, Every: time.Minute, Look: func(context.Context) Findings { return Disk(p.Dir) }},
		{Code: CodeModes, About: p.Dir, Every: time.Minute, Look: func(context.Context) Findings { return Modes(p) }},
		{Code: CodeSwap, About: "swap", Every: time.Minute, Look: func(context.Context) Findings { return Host() }},
	}
}

// Space looks at the room that is left where a folder lies, in bytes and in files.
func Space(dir string) (found Findings) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		found.add(CodeSpace, Unknown, dir, fmt.Sprintf("the room on its disk could not be told: %v", err), "")
		return found
	}
	return space(dir, st)
}

func space(dir string, st unix.Statfs_t) (found Findings) {
	share := func(free, all uint64) float64 {
		if all == 0 {
			return 1 // the file system does not count them
		}
		return float64(free) / float64(all)
	}
	worst := OK
	for _, k := range []struct {
		what  string
		share float64
		mend  string
	}{
		{"bytes", share(st.Bavail, st.Blocks), "df -h " + dir},
		{"files (inodes)", share(st.Ffree, st.Files), "df -i " + dir},
	} {
		level := OK
		switch {
		case k.share < roomError:
			level = Error
		case k.share < roomWarning:
			level = Warning
		default:
			continue
		}
		worst = max(worst, level)
		found.add(CodeSpace, level, dir, fmt.Sprintf("%.1f %% of the %s of its disk are free: when none is left, issuing stops", k.share*100, k.what), k.mend)
	}
	if worst == OK {
		found.add(CodeSpace, OK, dir, fmt.Sprintf("%.0f %% of its disk are free", share(st.Bavail, st.Blocks)*100), "")
	}
	return found
}

// Disk measures how long the disk takes to make a small write durable: a certificate waits for one.
func Disk(dir string) (found Findings) {
	took, err := probe(dir)
	if err != nil {
		found.add(CodeDisk, Unknown, dir, fmt.Sprintf("how fast its disk is could not be measured: %v", err), "")
		return found
	}
	return disk(dir, took)
}

func disk(dir string, took time.Duration) (found Findings) {
	level, mend := OK, ""
	if took > slowDisk {
		level, mend = Warning, "move state_dir to a faster disk"
	}
	if took > verySlowDisk {
		level = Error
	}
	found.add(CodeDisk, level, dir, fmt.Sprintf("a durable write takes %s (median of %d)", took.Round(10*time.Microsecond), probes), mend)
	return found
}

func probe(dir string) (time.Duration, error) {
	f, err := os.CreateTemp(dir, ".signet-check-")
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	var took []time.Duration
	for range probes {
		begun := time.Now()
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
		took = append(took, time.Since(begun))
	}
	slices.Sort(took)
	return took[probes/2], nil
}
