#!/bin/sh
# What Berth needs of a system to build, test and run. See --help.
set -eu

usage() {
	cat <<'USAGE'
usage: hack/deps.sh [--help | --remove]

Sets up what Berth needs of a Debian system, or of one with its package names, as Ubuntu:
packages, a /dev/net/tun that everyone may open, and somebody to run a rootless Docker: as
root the users "berth", "berth2" and "berth3", who run it side by side and are made with
subordinate ids if need be. It does only what is missing and can be run again at any time.

Not as root it changes nothing: it says what is missing, and the command with which an
administrator sets it up, and exits 1 if anything is. On other systems it looks for the
commands and headers instead of packages, and names those that are missing.

Go is not installed, only looked for: go.mod says which version.

  --remove  remove the users that it made, with their homes; packages stay
USAGE
}

made=/var/lib/berth/users # the users that this script made

# remove_users needs nobody else to have the record: it is gone when the last user is.
remove_users() {
	if [ ! -e $made ]; then
		echo "deps: no user is left that this script made"
		return
	fi
	[ "$(id -u)" = 0 ] || { echo "deps: only root can remove users: $(xargs <$made)" >&2; exit 1; }
	users=$(sort -u $made)
	for user in $users; do
		if id "$user" >/dev/null 2>&1; then
			echo "deps: + userdel --remove $user"
			# It also complains of the mail that such a user never had.
			userdel --remove "$user" 2>&1 | grep -v 'mail spool' || :
			! id "$user" >/dev/null 2>&1 || { echo "deps: $user is still there: end what that user runs (berth down), and try again" >&2; exit 1; }
		fi
		sed -i "/^$user\$/d" $made
	done
	rm $made
	rmdir "$(dirname $made)" 2>/dev/null || : # something else of Berth may be there
}

case ${1-} in
'') ;;
--remove)
	remove_users
	exit 0
	;;
-h | --help)
	usage
	exit 0
	;;
*)
	usage >&2
	exit 2
	;;
esac

# uidmap, iproute2, iptables: RootlessKit's and dockerd's. procps, util-linux: ps and setpriv, for the stack and its tests.
# gcc, libc6-dev: runc, pasta, pesto and the race detector. libseccomp-dev, pkg-config: runc. debian-archive-keyring, xz-utils: pasta, pesto.
# curl: hack/stress.sh. libcap2-bin: setcap, which docs/troubleshooting.md proposes. slirp4netns: tests of its port driver. bzip2, sudo: upstream's integration tests.
# systemd: its systemd-analyze reads what `berth install` writes. The rest: make and its tests.
packages='bzip2 ca-certificates curl debian-archive-keyring gcc git iproute2 iptables libc6-dev libcap2-bin libseccomp-dev make pkg-config procps shellcheck slirp4netns
sudo systemd uidmap util-linux xz-utils'
# What of them is looked for where there are no such packages. Fetching pasta's and pesto's sources, and Prometheus where it isn't, takes apt: only
# tests need it, and say so.
commands='bzip2 curl gcc git ip iptables make newgidmap newuidmap nsenter pkg-config ps setcap setpriv shellcheck slirp4netns sudo systemd-analyze tar xz'
headers='seccomp.h stdlib.h'
root=$(cd "$(dirname "$0")/.." && pwd)
failed=no # something is missing that this script cannot set up
todo=     # the commands for an administrator

fail() {
	echo "deps: $1" >&2
	failed=yes
}

# need says what is missing ($1) and has it set up ($2): now as root, else by an administrator.
need() {
	echo "deps: $1"
	if [ "$(id -u)" = 0 ]; then
		case $2 in *'apt-get update'*) wait_for_lists ;; esac
		echo "deps: + $2"
		sh -c "$2"
	else
		todo="${todo:+$todo && }$2"
	fi
}

# wait_for_lists: an update fails at once while another is under way, where an installation can be told to wait.
wait_for_lists() {
	lock=/var/lib/apt/lists/lock deadline=$(($(date +%s) + 300)) said=
	while [ -e $lock ] && grep -q ":$(stat -c %i $lock) " /proc/locks && [ "$(date +%s)" -lt "$deadline" ]; do
		[ -n "$said" ] || echo "deps: waiting for another apt to end"
		said=yes
		sleep 1
	done
}

# has_subids FILE USER: the user, by name or number, has a line in the file.
has_subids() {
	[ -r "$1" ] && grep -q -e "^$2:" -e "^$(id -u "$2" 2>/dev/null || echo "$2"):" "$1"
}

# A user's 65536 subordinate ids, after all that are given away already.
free_subids() {
	cat /etc/subuid /etc/subgid 2>/dev/null |
		awk -F: '{ end = $2 + $3; if (end > n) n = end } END { if (n < 100000) n = 100000; print n "-" n + 65535 }'
}

if command -v dpkg-query >/dev/null; then
	missing=
	for p in $packages; do
		[ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing="$missing $p"
	done
	if [ -n "$missing" ]; then
		need "packages missing:$missing" \
			"apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -q --no-install-recommends$missing"
	fi
	# Where the sources come from; an image of a system often has none.
	[ -n "$(apt-get indextargets 'Created-By: Packages')" ] || need "apt has no package lists" "apt-get update -q"
	[ -n "$(apt-get indextargets 'Origin: Debian' 'Created-By: Packages')" ] ||
		echo "deps: apt has no Debian mirror here: \`berth build pasta passt pesto\` says where to put their sources for the tests"
else
	missing=
	for c in $commands; do
		command -v "$c" >/dev/null || missing="$missing $c"
	done
	[ -z "$missing" ] || fail "commands missing:$missing"
	missing=
	for h in $headers; do
		echo "#include <$h>" | ${CC:-gcc} -E - >/dev/null 2>&1 || missing="$missing $h"
	done
	[ -z "$missing" ] || fail "C headers missing:$missing"
fi

if [ ! -c /dev/net/tun ]; then
	need "/dev/net/tun is missing" "mkdir -p /dev/net && mknod -m 666 /dev/net/tun c 10 200"
else
	case $(stat -c %A /dev/net/tun) in
	c??????rw?) ;;
	*) need "/dev/net/tun may not be opened by everyone" "chmod 666 /dev/net/tun" ;;
	esac
fi

# Root cannot run a rootless Docker: it needs somebody who can, and others for what they do to each other, or together.
users=$(id -un)
[ "$users" != root ] || users='berth berth2 berth3'
for user in $users; do
	id "$user" >/dev/null 2>&1 ||
		need "there is no user $user to run a rootless Docker as" "useradd -m -s /bin/sh $user && mkdir -p $(dirname $made) && echo $user >>$made"
	# useradd gives subordinate ids, as a rule.
	range=$(free_subids)
	has_subids /etc/subuid "$user" || need "user $user has no subordinate ids in /etc/subuid" \
		"touch /etc/subuid && usermod --add-subuids $range $user"
	has_subids /etc/subgid "$user" || need "user $user has no subordinate ids in /etc/subgid" \
		"touch /etc/subgid && usermod --add-subgids $range $user"
done

if [ -n "$todo" ]; then
	echo "deps: ask an administrator to run this:"
	echo "  sudo sh -c '$todo'"
	failed=yes
fi

# The command itself knows best whether it is new enough for go.mod, or can fetch the one that is.
want=$(awk '$1 == "go" { print $2 }' "$root/go.mod")
if ! command -v go >/dev/null; then
	fail "go is not on the PATH: install Go $want or newer"
elif ! why=$(cd "$root" && go list -m 2>&1); then
	fail "go cannot build this ($(command -v go)): install Go $want or newer: $why"
fi

[ "$failed" = no ]
