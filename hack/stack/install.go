package stack

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
)

// DefaultUser is whose stacks root runs. hack/deps.sh makes it.
const DefaultUser = "berth"

// account is the user that a stack runs as.
type account struct {
	name     string
	home     string
	uid, gid int
}

// stackAccount returns our own account or, when we are root, the one of that name.
func stackAccount(name string) (account, error) {
	if uid := os.Getuid(); uid != 0 {
		home, err := os.UserHomeDir()
		if err != nil {
			return account{}, err
		}
		name := strconv.Itoa(uid)
		if u, err := user.Current(); err == nil {
			name = u.Username
		}
		return account{name: name, home: home, uid: uid, gid: os.Getgid()}, nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return account{}, fmt.Errorf("root's stacks run as the user %s: %w: make it with hack/deps.sh", name, err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return account{}, err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return account{}, err
	}
	return account{name: u.Username, home: u.HomeDir, uid: uid, gid: gid}, nil
}

// install makes the stack's folders, and puts into its own bin folder what it runs. That
// folder is how its processes are known later, and it can be read by the stack's user.
func (s *Stack) install(o Options) error {
	// A umask must not keep the stack's user out, when that is another than ours.
	if err := os.Chmod(s.Dir, 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(s.binDir(), 0o755); err != nil {
		return err
	}
	if err := os.Chmod(s.binDir(), 0o755); err != nil {
		return err
	}
	for _, d := range []string{s.homeDir(), s.tmpDir(), s.runtimeDir()} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
		if err := os.Lchown(d, s.account.uid, s.account.gid); err != nil {
			return err
		}
	}
	put := func(name, from string) error {
		err := place(from, filepath.Join(s.binDir(), name))
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
	if o.Net == "pasta" {
		names = append(names, "pasta")
	}
	for _, name := range names {
		if err := put(name, filepath.Join(o.Bin, name)); err != nil {
			return err
		}
	}
	return nil
}

// place makes the program from appear at to, readable for everyone: as a link where that
// does, since a stack's programs are 250 MB, otherwise as a copy.
func place(from, to string) error {
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return fmt.Errorf("%s is not a program", from)
	}
	// Not a link to a file that only its owner can run; nor across file systems, nor (as
	// fs.protected_hardlinks wants it) to someone else's file: then Link fails.
	if info.Mode().Perm()&0o005 == 0o005 && os.Link(from, to) == nil {
		return nil
	}
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	if err := dst.Chmod(0o755); err != nil {
		return err
	}
	if closeErr := dst.Close(); err == nil {
		err = closeErr
	}
	return err
}
