//go:build integration

package command

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/checkout"
	"berth/hack/stack"
)

// A machine without sub-ids, whose /dev/net/tun is root's, is one in a mount namespace: not a file of the real one is touched. What
// root pastes there is what `berth up` has printed.
const withoutPreconditions = `set -eu
user=$1 home=$2 bin=$3
mount -t tmpfs tmpfs /mnt
mkdir -p /mnt/checkout/build/bin
echo module berth >/mnt/checkout/go.mod
mount --bind "$bin" /mnt/checkout/build/bin
mkdir /mnt/checkout/build/log
chown "$user" /mnt/checkout/build/log
for file in subuid subgid; do
	touch /mnt/$file
	mount --bind /mnt/$file /etc/$file
done
mknod -m 600 /mnt/tun c 10 200
mount --bind /mnt/tun /dev/net/tun
berth() {
	setpriv --reuid "$user" --regid "$user" --init-groups env -i HOME="$home" PATH=/usr/bin:/bin /mnt/checkout/build/bin/berth "$@"
}
"$bin/berth" up --name lacking && exit 10 # root's stacks are that user's
echo ROOTS
berth up --name lacking >/mnt/said 2>&1 && exit 11
cat /mnt/said
sed -n '/^As root:/,/^[^ ]/s/^  //p' /mnt/said >/mnt/block
echo PASTED
sh -eux /mnt/block
berth up --name lacking
berth down --purge --name lacking
`

// `berth up` says what the machine lacks when it fails, and what root is to do. That done, it succeeds.
func TestUpSaysWhatTheMachineLacks(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root mounts")
	}
	root, err := checkout.Root()
	assert.NilError(t, err)
	home := filepath.Dir(at(t, "lacking").Dir)
	out, err := exec.Command("unshare", "-m", "sh", "-c", withoutPreconditions, "sh", stack.DefaultUser, home, checkout.Bin(root)).CombinedOutput()
	said, pasted, _ := strings.Cut(string(out), "PASTED\n")
	assert.NilError(t, err, "%s", out)
	t.Logf("%s", out)
	for said := range strings.SplitSeq(said, "ROOTS\n") {
		lines := strings.Join(strings.Fields(said), " ")
		for _, text := range []string{
			"`berth doctor` says of this machine:",
			"fail subids machine user " + stack.DefaultUser + " has 0 subordinate uids and 0 gids, of 65536",
			"fail tun machine open /dev/net/tun: permission denied",
			"As root: echo " + stack.DefaultUser + ":100000:65536 | tee -a /etc/subuid /etc/subgid chmod 666 /dev/net/tun berth: ",
		} {
			assert.Check(t, is.Contains(lines, text))
		}
	}
	assert.Check(t, is.Contains(pasted, "dockerd is up"))
	assert.Check(t, is.Contains(pasted, "removed "+home+"/.berth-lacking"))
}
