#!/bin/sh
# Start many containers that publish a port, and see whether every one gets it.
set -eu

usage() {
	cat <<'END'
Usage: stress.sh [-n STARTS] [-c AT_ONCE] [-p SPEC] [-i IMAGE] [-k]

Runs "docker run -d -p SPEC IMAGE" STARTS times, AT_ONCE at a time, against the
daemon of DOCKER_HOST, and then asks every published port for its container's id:
what answers may be somebody else. Removes the containers at the end, and when it is
interrupted. Exits 0 only when all were published and answered.

  -n STARTS    how many containers to start (default 80)
  -c AT_ONCE   how many at a time (default 8)
  -p SPEC      the port to publish, as for docker run; TCP only (default 0:80)
  -i IMAGE     an image that answers HTTP with its hostname (default traefik/whoami)
  -k           keep the containers
  -h, --help   this text

Needs a docker CLI, and curl or wget. The last line of the output is for programs:

  stress: starts= published= inuse= other= answered= misdelivered= silent= \
      median_ms= p95_ms= seconds=

inuse counts failures because the port was taken, other all other failures; answered,
misdelivered (something else answered) and silent (nothing did) add up to published.
median_ms and p95_ms are of the starts that were published, seconds is for all starts.
END
}

fail() {
	echo "stress.sh: $*" >&2
	exit 2
}

starts=80 at_once=8 spec=0:80 image=traefik/whoami keep=
[ "${1-}" != --help ] || { usage; exit 0; }
while getopts n:c:p:i:kh opt; do
	case $opt in
	n) starts=$OPTARG ;;
	c) at_once=$OPTARG ;;
	p) spec=$OPTARG ;;
	i) image=$OPTARG ;;
	k) keep=1 ;;
	h) usage; exit 0 ;;
	*) usage >&2; exit 2 ;;
	esac
done
shift $((OPTIND - 1))
[ $# = 0 ] || fail "unexpected argument: $1 (see --help)"
for number in "$starts" "$at_once"; do
	case $number in
	'' | *[!0-9]* | 0*) fail "not a number above 0: $number" ;;
	esac
done
case $spec in
*/udp | */sctp) fail "$spec: only TCP ports can be asked who they are" ;;
esac
command -v docker >/dev/null || fail "no docker CLI in PATH"
# A proxy must not answer for the containers.
if command -v curl >/dev/null; then
	fetch() { curl -s --noproxy '*' --max-time 2 "$1"; }
elif command -v wget >/dev/null; then
	fetch() { (unset http_proxy; wget -q -T 2 -t 1 -O - "$1"); }
else
	fail "neither curl nor wget in PATH"
fi
docker version >/dev/null || fail "no daemon at ${DOCKER_HOST:-the default docker host}"

# Where a port that is published on all addresses is asked: where the daemon is. [::] is asked on loopback only if that is here.
endpoint=${DOCKER_HOST-}
[ -n "$endpoint" ] || endpoint=$(docker context inspect --format '{{.Endpoints.docker.Host}}' 2>/dev/null) || endpoint=
case $endpoint in
tcp://* | ssh://*)
	host=${endpoint#*://} host=${host%%/*} host=${host#*@}
	case $host in *]) ;; *) host=${host%:*} ;; esac # without its port
	host6=$host
	;;
*) host=127.0.0.1 host6='[::1]' ;;
esac

# Milliseconds; without GNU's date, whole seconds of them.
now() {
	t=$(date +%s%N)
	case $t in
	*[!0-9]*) echo "$(date +%s)000" ;;
	*) echo "${t%??????}" ;;
	esac
}

# worker W: starts container W, W+AT_ONCE, W+2*AT_ONCE ... One line a start goes to the
# worker's file: its result, the milliseconds it took, the id.
worker() {
	trap '' INT TERM HUP
	i=$1
	while [ "$i" -lt "$starts" ] && [ ! -e "$tmp/stop" ]; do
		begin=$(now)
		if id=$($detached docker run -d --label "$label" -p "$spec" "$image" 2>"$tmp/error.$1"); then
			result=published
		else
			id=- result=other
			if grep -qi -e 'address already in use' -e 'port is already allocated' "$tmp/error.$1"; then
				result=inuse
			fi
			# Without what differs from start to start.
			sed -E -e "/^Run 'docker run --help'/d" -e '/^$/d' -e 's/^docker: //' -e 's/[0-9a-f]{64}/ID/g' \
				-e 's/endpoint [a-z_0-9]+/endpoint NAME/' -e 's/[0-9]{4,}/N/g' "$tmp/error.$1" >>"$tmp/errors"
		fi
		echo "$result $(($(now) - begin)) $id" >>"$tmp/starts.$1"
		i=$((i + at_once))
	done
}

# check W: asks the ports that worker W published who they are, one line each.
check() {
	[ -e "$tmp/starts.$1" ] || return 0
	while read -r result _ id; do
		if [ "$result" = published ] && [ ! -e "$tmp/stop" ]; then
			answers "$id" >>"$tmp/answers.$1"
		fi
	done <"$tmp/starts.$1"
}

# answers ID: answered, misdelivered or silent; answered only when all its addresses did.
answers() {
	short=$(printf %.12s "$1")
	ports=$(docker port "$1" | sed 's/^.* -> //' | sort -u)
	verdict=silent url='' lines=$(printf '\n%s\n.' "$ports")
	for port in $ports; do
		case $port in
		0.0.0.0:*) url=http://$host:${port##*:}/ ;;
		'[::]:'*)
			# The same port as 0.0.0.0's, where there is one.
			case $lines in *"
0.0.0.0:${port##*:}
"*) continue ;; esac
			url=http://$host6:${port##*:}/
			;;
		*) url=http://$port/ ;;
		esac
		# The program in the container may need a moment until it listens.
		verdict=silent deadline=$(($(date +%s) + 10))
		while [ "$(date +%s)" -lt "$deadline" ] && [ ! -e "$tmp/stop" ]; do
			answer=$(fetch "$url") || answer=
			case $answer in
			*"$short"*) verdict=answered; break ;;
			?*) verdict=misdelivered; break ;;
			esac
			sleep 1
		done
		[ $verdict = answered ] || break
	done
	[ $verdict = answered ] || echo "$short: $verdict at ${url:-no port}" >>"$tmp/errors"
	echo $verdict
}

# remove W: removes every AT_ONCE-th of the containers.
remove() {
	trap '' INT TERM HUP
	awk -v n="$at_once" -v w="$1" 'NR % n == w' "$tmp/remove" | while read -r id; do
		$detached docker rm -f "$id" >/dev/null || :
	done
}

# parallel FUNCTION: runs it AT_ONCE times, with 0, 1, 2 ... Interrupted, it still waits.
parallel() {
	w=0 pids=
	while [ "$w" -lt "$at_once" ]; do
		"$1" "$w" </dev/null &
		pids="$pids $!"
		w=$((w + 1))
	done
	# A signal ends a wait, but only the first one is heard.
	for pid in $pids; do
		wait "$pid" || wait "$pid" || :
	done
}

# interrupted STATUS: has the workers end what they have begun, so that no container comes
# after the clean-up.
interrupted() {
	trap '' INT TERM HUP
	stopped=$1
	: >"$tmp/stop"
}

clean_up() {
	trap '' INT TERM HUP
	if [ -z "$keep" ]; then
		if docker ps -aq --filter "label=$label" >"$tmp/remove"; then
			parallel remove
		else
			echo "stress.sh: no answer from the daemon: what it has of the label $label stays" >&2
		fi
	fi
	rm -rf "$tmp"
}

# Ctrl-C is for this script, not for the docker commands that it runs at the moment.
detached=$(command -v setsid) || detached=
tmp=$(mktemp -d)
label=stress=$$-$(date +%s)
stopped=
trap clean_up EXIT
trap 'interrupted 130' INT
trap 'interrupted 143' TERM HUP
trap 'exit 141' PIPE # without it, the shell ends at once when nobody reads what it says

begin=$(now)
parallel worker
took=$(($(now) - begin))
[ -n "$stopped" ] || parallel check
if [ -n "$stopped" ]; then
	echo "stress.sh: interrupted" >&2
	exit "$stopped"
fi

cat "$tmp"/starts.* >"$tmp/all"
cat "$tmp"/answers.* >"$tmp/answered" 2>/dev/null || :
count() { grep -c "^$1" "$2" || :; }
# percentile P: nearest rank, of the published starts.
percentile() {
	grep ^published "$tmp/all" | cut -d ' ' -f 2 | sort -n |
		awk -v p="$1" '{ t[NR] = $1 } END { i = int((NR * p + 99) / 100); print NR ? t[i] : "-" }'
}
published=$(count published "$tmp/all")
inuse=$(count inuse "$tmp/all")
other=$(count other "$tmp/all")
answered=$(count answered "$tmp/answered")
misdelivered=$(count misdelivered "$tmp/answered")
silent=$(count silent "$tmp/answered")
median=$(percentile 50)
p95=$(percentile 95)
seconds=$(awk -v ms="$took" 'BEGIN { printf "%.2f", ms / 1000 }')

if [ -e "$tmp/errors" ]; then
	echo "What failed, and how often:"
	sort "$tmp/errors" | uniq -c | sort -rn | head -n 20
fi
cat <<END
$starts starts of $image with -p $spec, $at_once at a time, in $seconds s
  published: $published (a start took $median ms, 95% at most $p95 ms)
  failed:    $inuse because the port was in use, $other for other reasons
  answered:  $answered with their own id, $misdelivered went elsewhere, $silent not at all
stress: starts=$starts published=$published inuse=$inuse other=$other answered=$answered misdelivered=$misdelivered silent=$silent median_ms=$median p95_ms=$p95 seconds=$seconds
END
[ "$answered" = "$starts" ]
