package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"berth/hack/progress"
)

const systemPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// install puts what the stack runs into its own bin folder, where its user can read it, wherever it came from. A program that
// runs keeps its old file.
func (s *Stack) install(ctx context.Context, o Options) error {
	done := progress.Start(o.Progress, "copying the stack's programs to "+s.bin)
	defer done()
	if err := os.MkdirAll(s.bin, 0o755); err != nil {
		return err
	}
	put := func(name, from string) error {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		err := place(from, filepath.Join(s.bin, name))
		if errors.Is(err, fs.ErrNotExist) && filepath.Dir(from) == filepath.Clean(o.Bin) {
			err = fmt.Errorf("%w: `berth build` makes what a stack runs, `berth build %s` this alone", err, filepath.Base(from))
		}
		return err
	}
	if err := put("dockerd", o.Dockerd); err != nil {
		return err
	}
	// dockerd-rootless.sh prefers a docker-rootlesskit, which the machine may have of its own.
	if err := put("docker-rootlesskit", o.RootlessKit); err != nil {
		return err
	}
	names := []string{"dockerd-rootless.sh", "docker-proxy", "containerd", "containerd-shim-runc-v2", "runc"}
	switch {
	case o.PortDriver == "pesto":
		// It asks a pasta of its own version, which is passt by another name.
		if err := put("pasta", filepath.Join(o.Bin, "passt")); err != nil {
			return err
		}
		names = append(names, "pesto")
	case o.Net == "pasta":
		names = append(names, "pasta")
	}
	for _, name := range names {
		if err := put(name, filepath.Join(o.Bin, name)); err != nil {
			return err
		}
	}
	return nil
}

// place makes the program from appear at to, readable for everyone, in one step: as a link where that does, since a stack's
// programs are 250 MB, otherwise as a copy.
func place(from, to string) error {
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	info, err := src.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return fmt.Errorf("%s is not a program", from)
	}
	if have, err := os.Stat(to); err == nil && os.SameFile(have, info) {
		return nil
	}
	tmp := to + ".tmp"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Not a link to a file that only its owner can run, or that others can write; nor across file systems: then Link fails.
	ours := info.Sys().(*syscall.Stat_t).Uid == uint32(os.Geteuid())
	if ours && info.Mode().Perm()&0o027 == 0o005 && os.Link(from, tmp) == nil {
		return os.Rename(tmp, to)
	}
	dst, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	err = errors.Join(err, dst.Chmod(0o755), dst.Close()) // whatever the umask
	if err == nil {
		err = os.Rename(tmp, to)
	}
	if err != nil {
		os.Remove(tmp)
	}
	return err
}

// lockForRoot keeps other processes of root from the stack's programs, which are not in its directory.
func (s *Stack) lockForRoot() (unlock func(), _ error) {
	if os.Getuid() != 0 {
		return func() {}, nil
	}
	if err := os.MkdirAll(filepath.Dir(s.bin), 0o755); err != nil {
		return nil, err
	}
	release, err := lock(s.bin)
	if err != nil {
		return nil, err
	}
	return func() {
		// If nothing is in them.
		for _, dir := range []string{s.bin, filepath.Dir(s.bin), forRoot} {
			if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				break
			}
		}
		release()
	}, nil
}

// lock makes the directory if need be, and keeps others from it. The lock is on the directory itself, so that it goes with it.
func lock(dir string) (unlock func(), _ error) {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	d, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		// The one who had it may have removed the directory.
		var held, now os.FileInfo
		if held, err = d.Stat(); err == nil {
			if now, err = os.Lstat(dir); err == nil && os.SameFile(held, now) {
				return func() { d.Close() }, nil
			}
		}
		if err == nil || errors.Is(err, os.ErrNotExist) {
			err = unix.EWOULDBLOCK
		}
	}
	d.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("the stack at %s is being started or stopped: wait for that and try again", dir)
	}
	return nil, fmt.Errorf("lock %s: %w", dir, err)
}
