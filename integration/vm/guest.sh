#!/bin/bash
# What vm_test.go has a machine of its own do, as root, once it has booted: each check says "ok" or "not ok", and what it saw.

as() { # USER COMMANDS
	runuser -u "$1" -- env HOME="/home/$1" XDG_RUNTIME_DIR="/run/user/$(id -u "$1")" PATH="/opt/berth/build/bin:$PATH" NO_COLOR=1 \
		DBUS_SESSION_BUS_ADDRESS="unix:path=/run/user/$(id -u "$1")/bus" bash -euo pipefail -c "cd; $2"
}

check() { # NAME USER COMMANDS
	local out result=ok
	out=$(as "$2" "set -x; $3" 2>&1) || result="not ok"
	printf '%s\n%s %s\n' "$out" "$result" "$1"
}

wait_for_bus() { # UID
	for _ in $(seq 60); do
		[ ! -S "/run/user/$1/bus" ] || return 0
		sleep 1
	done
}

image='tar -C /opt -c hostname | docker import -c "ENTRYPOINT [\"/hostname\"]" - who'
stack="export DOCKER_HOST=unix://\$HOME/.berth/run/docker.sock"
own="export DOCKER_HOST=unix://\$XDG_RUNTIME_DIR/docker.sock"
restart='systemctl --user daemon-reload; systemctl --user restart docker'
# All of the user's settings and programs but Docker's data.
files="{ find ~/.config ~/.local -path '*/share/docker' -prune -o -print0 | sort -z | xargs -0 ls -ld --time-style=+; find ~/.config ~/.local -path '*/share/docker' -prune -o -type f -print0 | sort -z | xargs -0 sha256sum; }"

before_the_cut() {
	check "without a systemd of the user, limits are said to do nothing" alice \
		'berth up; berth status | grep "^cgroups .*none: no systemd runs for user alice .*--memory and --cpus do nothing"; berth down'

	# A user's systemd that is not given all.
	sed 's/^Delegate=.*/Delegate=pids/' /lib/systemd/system/user@.service >/etc/systemd/system/user@1001.service
	systemctl daemon-reload
	loginctl enable-linger bob
	wait_for_bus 1001
	rm -r /opt/berth/build/log # The checkout is the other user's now.
	check "where cpu is not delegated, its limits are said to do nothing" bob \
		'cat /sys/fs/cgroup/user.slice/user-1001.slice/user@1001.service/cgroup.controllers; berth up; berth status | grep "^cgroups .*; without cpu, so that docker run.s limits that need it do nothing"; berth down --purge'
	loginctl disable-linger bob
	rm -rf /opt/berth/build/log

	loginctl enable-linger alice
	wait_for_bus 1000
	check "with delegation, --memory holds" alice "berth up; $stack; $image; [ \$(docker info --format '{{.CgroupDriver}}') = systemd ]
		id=\$(docker run -d --memory 64m who); [ \$(cat /sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/user.slice/docker-\$id.scope/memory.max) = 67108864 ]
		docker rm -f \$id; berth down"

	# What dockerd-rootless-setuptool.sh writes, as far as it matters here.
	install -d -o alice -g alice /home/alice/.config /home/alice/.config/systemd /home/alice/.config/systemd/user
	printf '%s\n' '[Service]' ExecStart=/usr/bin/dockerd-rootless.sh Type=notify NotifyAccess=all Delegate=yes KillMode=mixed TimeoutSec=0 \
		>/home/alice/.config/systemd/user/docker.service
	check "the user's own Docker fails where others hold ports" alice "$restart; $own; $image; $files >/tmp/before
		docker version --format '{{.Server.Version}}' | tee /tmp/version; ! docker run -d -p 0:80 who"
	check "installed, it does not" alice "/opt/dist/berth install; /opt/dist/berth install; $restart; $own
		docker version --format '{{.Server.Version}}' | grep berth; id=\$(docker run -d -p 0:80 who); docker port \$id; /opt/dist/berth status
		exec 3<>/dev/tcp/127.0.0.1/\$(docker port \$id 80/tcp | sed -n 's/0.0.0.0://p'); printf 'GET / HTTP/1.0\r\n\r\n' >&3; grep \${id:0:12} <&3; docker rm -f \$(docker ps -aq)"
	check "uninstalled, all is as it was" alice "/opt/dist/berth uninstall; $restart; $own; docker version --format '{{.Server.Version}}' | cmp - /tmp/version
		$files | cmp - /tmp/before; /opt/dist/berth uninstall | grep 'nothing is installed'"
	check "its user stops it" alice "systemctl --user stop docker"

	check "a stack runs, and the power goes" alice "berth up; $stack; $image; docker run -d --restart always --name always -p 0:80 who
		docker run -d --name never who; docker volume create keep; sync"
	touch /root/cut
	sync
	echo "cut the power"
	sleep infinity
}

after_the_cut() {
	wait_for_bus 1000
	check "what the power cut left is told" alice "berth status | grep '^stack .*down: .berth up. starts it again'"
	check "it comes up with its images, volumes and containers" alice "berth up; $stack; docker images -q who | grep .; docker volume ls -q | grep keep
		[ \"\$(docker ps --format '{{.Names}}')\" = always ]; docker ps -a | grep never"
	for program in dockerd containerd docker-rootlesskit; do
		check "it comes up again after $program was killed" alice "kill -9 \$(pgrep -u alice -f '(^|/)$program( |\$)' | head -1); sleep 1
			berth up; $stack; for _ in \$(seq 60); do docker images -q who | grep . && break; sleep 1; done
			docker images -q who | grep .; [ \"\$(docker ps --format '{{.Names}}')\" = always ]"
	done
	check "nothing is left of it" alice "berth down --purge; [ ! -e ~/.berth ]; [ -z \"\$(pgrep -u alice -f '[/]dockerd|[/]containerd|[r]ootlesskit')\" ]"
	echo "done"
}

ip link set lo up
if [ -e /root/cut ]; then
	after_the_cut
else
	# The first dynamic ports are others'.
	perl -MSocket -e 'for (32768..32867) { socket(my $s, PF_INET, SOCK_STREAM, 0); bind($s, sockaddr_in($_, INADDR_ANY)) or die; listen($s, 1); push @s, $s } sleep' &
	before_the_cut
fi
