//go:build integration

// Package deps holds hack/deps.sh to what it says of itself.
package deps

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// Where there is no dpkg, what is missing is named by what it is.
func TestOffDebianItNamesWhatIsMissing(t *testing.T) {
	bin := t.TempDir()
	for _, name := range strings.Fields("awk cat curl date dirname gcc git go grep id ip iptables make newgidmap newuidmap nsenter pkg-config ps sed setpriv sh stat systemd-analyze tar") {
		path, err := exec.LookPath(name)
		assert.NilError(t, err)
		assert.NilError(t, os.Symlink(path, filepath.Join(bin, name)))
	}
	// Nothing is to be set up here, whoever runs the tests.
	fake := filepath.Join(bin, "id")
	assert.NilError(t, os.Remove(fake))
	assert.NilError(t, os.WriteFile(fake, []byte("#!/bin/sh\n[ $1 = -u ] && echo 65534 || echo nobody\n"), 0o755))
	cmd := exec.Command("../../hack/deps.sh")
	cmd.Env = append(os.Environ(), "PATH="+bin, "CC=gcc -nostdinc -I/nowhere")
	out, err := cmd.CombinedOutput()
	assert.ErrorContains(t, err, "exit status 1")
	assert.Check(t, is.Contains(string(out), "commands missing: bzip2 setcap shellcheck slirp4netns sudo xz\n"))
	assert.Check(t, is.Contains(string(out), "C headers missing: seccomp.h stdlib.h\n"))
}

// The users come and go in a mount namespace where /etc, /var/lib and /home are copies: not a file of the machine is touched.
const usersComeAndGo = `set -eu
mount -t tmpfs tmpfs /mnt
for dir in etc var/lib; do
	mkdir -p /mnt/$dir.upper /mnt/$dir.work
	mount -t overlay overlay -o "lowerdir=/$dir,upperdir=/mnt/$dir.upper,workdir=/mnt/$dir.work" /$dir
done
mount -t tmpfs tmpfs /home
cd /etc
sed -i '/^berth/d' passwd shadow group gshadow subuid subgid
rm -rf /var/lib/berth
users() { for f in passwd shadow group gshadow subuid subgid; do sort $f; done; ls /home /var/lib | grep -v lost+found; }
useradd -m -s /bin/sh berth2
users >/mnt/before

"$1"
id berth
grep -q ^berth: subuid
[ -d /home/berth ]
users >/mnt/once
"$1"
users | diff /mnt/once -
"$1" --remove
users | diff /mnt/before - # berth2 was there, and stays
"$1" --remove
`

func TestUsersComeAndGo(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root makes users")
	}
	script, err := filepath.Abs("../../hack/deps.sh")
	assert.NilError(t, err)
	// A process namespace, since userdel looks for processes of that user.
	out, err := exec.Command("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", usersComeAndGo, "sh", script).CombinedOutput()
	assert.NilError(t, err, "%s", out)
	assert.Check(t, is.Contains(string(out), "+ userdel --remove berth\n"))
	assert.Check(t, is.Contains(string(out), "no user is left that this script made\n"))
}
