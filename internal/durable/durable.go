// Package durable writes files that are there, whole, after a crash, and reads secrets only where nobody else can.
//
// The order of a write is fixed: a temporary file in the same folder, its bytes, fsync, then one rename or link that
// makes it visible, then fsync of the folder. A crash before the rename leaves the old file (and perhaps a temporary one
// that nobody reads); a crash after it leaves the old or the new one, each whole; after the last step it is the new one.
package durable

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// TempPrefix begins the name of every temporary file. Who lists a folder passes over what begins with it.
const TempPrefix = ".tmp-"

// WriteFile puts data at path with exactly this mode, whatever the umask, replacing what is there.
// When it returns nil the file survives a power cut; when it doesn't, the old file or the new one is there, whole.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	return write(disk{}, path, data, mode, true)
}

// CreateFile is WriteFile that never replaces: errors.Is(err, fs.ErrExist) when path exists.
func CreateFile(path string, data []byte, mode fs.FileMode) error {
	return write(disk{}, path, data, mode, false)
}

// files is what a durable write asks of a file system.
type files interface {
	// create makes a file that was not there, with no more than this mode.
	create(path string, mode fs.FileMode) (file, error)
	rename(from, to string) error
	// link is a rename that fails with fs.ErrExist; from stays.
	link(from, to string) error
	remove(path string) error
	syncDir(path string) error
}

type file interface {
	io.WriteCloser
	Chmod(fs.FileMode) error
	Sync() error
}

func write(sys files, path string, data []byte, mode fs.FileMode, replace bool) (err error) {
	dir := filepath.Dir(path)
	temp := filepath.Join(dir, TempPrefix+rand.Text())
	f, err := sys.create(temp, mode)
	if err != nil {
		return explain("write", path, err)
	}
	open, visible := true, false
	defer func() {
		if open {
			f.Close()
		}
		// Until the rename the temporary file is all there is of this write: take it away again.
		if err != nil && !visible {
			_ = sys.remove(temp)
		}
	}()
	if _, err := f.Write(data); err != nil {
		return explain("write", path, err)
	}
	// The mode given to create is cut by the umask; the one that was asked for is what others rely on.
	if err := f.Chmod(mode); err != nil {
		return explain("set the mode of", path, err)
	}
	// Before the rename: a name must never lead to bytes that are not on the disk.
	if err := f.Sync(); err != nil {
		return explain("write", path, err)
	}
	open = false
	if err := f.Close(); err != nil {
		return explain("write", path, err)
	}
	if replace {
		if err := sys.rename(temp, path); err != nil {
			return explain("write", path, err)
		}
		visible = true
	} else {
		if err := sys.link(temp, path); err != nil {
			if errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("%s already exists and is not overwritten: %w", path, fs.ErrExist)
			}
			return explain("create", path, err)
		}
		visible = true
		// A second name of the same file does no harm if a crash here leaves it, or if it can't be removed.
		_ = sys.remove(temp)
	}
	if err := sys.syncDir(dir); err != nil {
		return explain("make durable", path, err)
	}
	return nil
}

// Remove removes a file, durably.
func Remove(path string) error {
	if err := (disk{}).remove(path); err != nil {
		return explain("remove", path, err)
	}
	if err := (disk{}).syncDir(filepath.Dir(path)); err != nil {
		return explain("remove", path, err)
	}
	return nil
}

// Dir makes the folder with its parents, mode 0700, durably. A folder that is already there must belong to this process's
// user (or root) and be writable to nobody else.
func Dir(path string) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		parent := filepath.Dir(path)
		if parent != path {
			if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
				if err := Dir(parent); err != nil {
					return err
				}
			}
		}
		// Another process may be making the same folder; what counts is what is there afterwards.
		if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return explain("make folder", path, err)
		}
		if err := (disk{}).syncDir(parent); err != nil {
			return explain("make folder", path, err)
		}
		if info, err = os.Stat(path); err != nil {
			return explain("make folder", path, err)
		}
	case err != nil:
		return explain("look at folder", path, err)
	}
	return ours(path, info)
}

// ours refuses a folder that is not this process's own.
func ours(path string, info fs.FileInfo) error {
	if !info.IsDir() {
		return fmt.Errorf("%s is not a folder: move the file away or choose another path", path)
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return fmt.Errorf("folder %s has mode %04o, so others may write to it: run `chmod go-w %s`, or choose a folder inside it", path, mode, path)
	}
	if owner := ownerOf(info); owner != 0 && owner != os.Geteuid() {
		return fmt.Errorf("folder %s belongs to uid %d, but this process runs as uid %d: change its owner or choose another folder", path, owner, os.Geteuid())
	}
	return nil
}

// MayDir refuses what Dir would refuse, as far as that shows before, and a folder that nothing can be written to. It makes nothing.
func MayDir(path string) error {
	at := path
	info, err := os.Stat(at)
	for errors.Is(err, fs.ErrNotExist) && at != filepath.Dir(at) {
		at = filepath.Dir(at)
		_, err = os.Stat(at)
	}
	if err == nil && at == path {
		if err := ours(path, info); err != nil {
			return err
		}
	}
	if err == nil {
		err = unix.Faccessat(unix.AT_FDCWD, at, unix.W_OK|unix.X_OK, unix.AT_EACCESS)
	}
	if err != nil {
		return explain("write to folder", path, err)
	}
	return nil
}

// ReadSecret reads a file of at most max bytes that nobody but its owner may read. The owner must be this process's user
// or root. Two kinds of mounted secrets are allowed as well: one that a group of this process may read, or root's own
// group (systemd credentials); and a symbolic link that stays inside the file's folder (Kubernetes' ..data).
// errors.Is(err, fs.ErrNotExist) when there is no such file.
func ReadSecret(path string, max int64) ([]byte, error) {
	dir, name := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	// os.Root follows links within the folder only, so that checking and opening can't be led apart.
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, explain("read", path, err)
	}
	defer root.Close()
	// O_NONBLOCK: opening a pipe must not wait for a writer.
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		if info, lerr := root.Lstat(name); lerr == nil && info.Mode()&fs.ModeSymlink != 0 && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("read %s: it is a symbolic link that leads out of its folder, which is refused for secrets: give the path of the file itself", path)
		}
		return nil, explain("read", path, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, explain("read", path, err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("read %s: it is not a regular file", path)
	}
	mode, owner, group := info.Mode().Perm(), ownerOf(info), groupOf(info)
	if owner != 0 && owner != os.Geteuid() {
		return nil, fmt.Errorf("read %s: it belongs to uid %d, but this process runs as uid %d: change its owner", path, owner, os.Geteuid())
	}
	if mode&0o037 != 0 || mode&0o040 != 0 && !ourGroup(group) && !(owner == 0 && group == 0) {
		return nil, fmt.Errorf("read %s: mode %04o lets others at this secret: run `chmod 0600 %s`, and replace the secret if others may have read it", path, mode, path)
	}
	if info.Size() > max {
		return nil, fmt.Errorf("read %s: %d bytes, but at most %d are allowed", path, info.Size(), max)
	}
	data, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, explain("read", path, err)
	}
	if int64(len(data)) > max {
		return nil, fmt.Errorf("read %s: more than the allowed %d bytes", path, max)
	}
	return data, nil
}

func ourGroup(gid int) bool {
	if gid == os.Getegid() {
		return true
	}
	groups, err := os.Getgroups()
	if err != nil {
		return false
	}
	for _, g := range groups {
		if g == gid {
			return true
		}
	}
	return false
}

func ownerOf(info fs.FileInfo) int { return int(info.Sys().(*syscall.Stat_t).Uid) }
func groupOf(info fs.FileInfo) int { return int(info.Sys().(*syscall.Stat_t).Gid) }

// explain makes one sentence of what failed, with the remedy where the error number tells it.
func explain(what, path string, err error) error {
	// The path is said once, by us, and a temporary file's name means nothing to the reader.
	var pe *fs.PathError
	var le *os.LinkError
	cause := err
	switch {
	case errors.As(err, &pe):
		cause = pe.Err
	case errors.As(err, &le):
		cause = le.Err
	}
	remedy := ""
	switch {
	case errors.Is(err, syscall.EROFS):
		remedy = ": its folder is on a read-only file system; choose a folder that can be written to"
	case errors.Is(err, fs.ErrPermission):
		remedy = fmt.Sprintf(": this process runs as uid %d; give that user the right to it", os.Geteuid())
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		remedy = ": free some space and try again"
	}
	return fmt.Errorf("%s %s: %w%s", what, path, cause, remedy)
}

// disk is the real file system.
type disk struct{}

func (disk) create(path string, mode fs.FileMode) (file, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
}
func (disk) rename(from, to string) error { return os.Rename(from, to) }
func (disk) link(from, to string) error   { return os.Link(from, to) }
func (disk) remove(path string) error     { return os.Remove(path) }

func (disk) syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
