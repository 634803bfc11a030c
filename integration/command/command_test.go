//go:build integration

// Package command runs build/bin/berth as its users do.
package command

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
	"gotest.tools/v3/poll"

	"berth/hack/checkout"
	"berth/hack/stack"
	"berth/integration/harness"
	"berth/integration/stacktest"
)

func TestMain(m *testing.M) { stacktest.Main(m) }

// user is whoever runs berth: root, or an ordinary user with a home of the test's own.
type user struct {
	root string // the checkout
	home string
	env  []string
}

// newUser returns a user who has no stack.
func newUser(t *testing.T) *user {
	t.Helper()
	root, err := checkout.Root()
	assert.NilError(t, err)
	u := &user{root: root, env: append(os.Environ(), "PATH="+checkout.Bin(root)+":"+os.Getenv("PATH"))}
	if os.Getuid() != 0 {
		u.home, err = os.MkdirTemp("", "b") // sockets' paths must be short
		assert.NilError(t, err)
		t.Cleanup(func() { assert.NilError(t, os.Remove(u.home)) }) // not a thing is left in it
		t.Setenv("HOME", u.home)
		u.env = append(u.env, "HOME="+u.home)
	}
	s := at(t, "")
	assert.Assert(t, !s.Exists(), "%s is somebody's stack, and the test needs the place: remove it with `berth down --purge`", s.Dir)
	if u.home == "" {
		u.home = filepath.Dir(s.Dir)
	}
	return u
}

func at(t *testing.T, name string) *stack.Stack {
	t.Helper()
	s, err := stack.At(name)
	assert.NilError(t, err)
	return s
}

// purgeAfter has the stack of that name removed when the test ends, whatever has become of it.
func (u *user) purgeAfter(t *testing.T, name string) {
	s := at(t, name)
	t.Cleanup(func() {
		_, err := s.Purge(context.Background(), stack.Options{Checkout: u.root})
		assert.Check(t, err)
		_, err = os.Lstat(filepath.Join("/var/lib/berth", s.User(), filepath.Base(s.Dir)))
		assert.Check(t, errors.Is(err, os.ErrNotExist), "%v", err)
		log := "stack-" + name + ".log"
		if name == "" {
			log = "stack.log"
		}
		if !t.Failed() {
			assert.Check(t, os.RemoveAll(checkout.Log(u.root, log)))
		}
	})
}

// ran is what came of a command.
type ran struct {
	stdout, stderr string
	status         int
}

// quietLimit is how long a command may say nothing: 2 s, and as much for a busy machine to print it.
const quietLimit = 4 * time.Second

// sh runs a line of the shell, and checks that it is never quiet for too long.
func (u *user) sh(t *testing.T, line string) ran {
	t.Helper()
	cmd := u.start(t, "sh", "-c", line)
	return cmd.wait(t)
}

type running struct {
	*exec.Cmd
	stdout, stderr heard
	clock          clock
	ended          chan error
}

// clock has when a command has printed something last, and the longest that it has not.
type clock struct {
	mu   sync.Mutex
	last time.Time
	most time.Duration
}

func (c *clock) tick() {
	now := time.Now()
	c.most = max(c.most, now.Sub(c.last))
	c.last = now
}

// heard is what a command has printed.
type heard struct {
	*clock
	printed bytes.Buffer
}

func (h *heard) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tick()
	return h.printed.Write(p)
}

func (h *heard) text() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.printed.String()
}

func (u *user) start(t *testing.T, name string, args ...string) *running {
	t.Helper()
	r := &running{Cmd: exec.Command(name, args...), ended: make(chan error, 1)}
	r.clock.last = time.Now()
	r.stdout.clock, r.stderr.clock = &r.clock, &r.clock
	r.Env, r.Dir = u.env, u.root
	r.Stdout, r.Stderr = &r.stdout, &r.stderr
	assert.NilError(t, r.Start())
	go func() { r.ended <- r.Cmd.Wait() }()
	return r
}

func (r *running) wait(t *testing.T) ran {
	t.Helper()
	select {
	case err := <-r.ended:
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) {
			assert.NilError(t, err)
		}
	case <-time.After(5 * time.Minute):
		r.Process.Kill()
		t.Fatalf("%q does not end: %s%s", r.Args, r.stdout.text(), r.stderr.text())
	}
	r.clock.tick() // nobody writes any more
	assert.Check(t, r.clock.most < quietLimit, "%q said nothing for %v: %s", r.Args, r.clock.most, r.stderr.text())
	return ran{r.stdout.text(), r.stderr.text(), r.ProcessState.ExitCode()}
}

// ok checks that the line is done, and says that.
func (u *user) ok(t *testing.T, line, says string) ran {
	t.Helper()
	r := u.sh(t, line)
	assert.Equal(t, r.status, 0, "%s: %s%s", line, r.stdout, r.stderr)
	assert.Assert(t, is.Contains(r.stdout, says), "%s", line)
	return r
}

// fails checks that the line ends with that status, and says why.
func (u *user) fails(t *testing.T, line string, status int, says string) {
	t.Helper()
	r := u.sh(t, line)
	assert.Equal(t, r.status, status, "%s: %s%s", line, r.stdout, r.stderr)
	assert.Assert(t, is.Contains(r.stderr, says), "%s", line)
}

// documented are the command lines of README, of docs/troubleshooting.md and of all --help texts, without comments.
func documented(t *testing.T, u *user) []string {
	t.Helper()
	var readme []byte
	for _, name := range []string{"README.md", "docs/troubleshooting.md"} {
		text, err := os.ReadFile(filepath.Join(u.root, name))
		assert.NilError(t, err)
		readme = append(readme, text...)
	}
	lines := map[string]bool{}
	add := func(line string) {
		line, _, _ = strings.Cut(line, " # ")
		line = strings.TrimSpace(strings.NewReplacer("build/bin/berth", "berth", "./berth", "berth").Replace(line))
		if line != "" {
			lines[line] = true
		}
	}
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllSubmatch(readme, -1) {
		for line := range strings.Lines(string(block[1])) {
			add(line)
		}
	}
	for _, inline := range regexp.MustCompile("`((?:build/bin/|\\./)?(?:berth|make|eval) [^`]+)`").FindAllSubmatch(readme, -1) {
		add(string(inline[1]))
	}
	commands := regexp.MustCompile(`(?m)^  ([a-z]+) `).FindAllStringSubmatch(u.ok(t, "berth help", "Available Commands:").stdout, -1)
	assert.Assert(t, len(commands) > 5)
	for _, c := range commands {
		help := u.ok(t, "berth help "+c[1], "Usage:").stdout
		if _, examples, ok := strings.Cut(help, "Examples:\n"); ok {
			examples, _, _ = strings.Cut(examples, "\n\n")
			for line := range strings.Lines(examples) {
				add(line)
			}
		}
	}
	return slices.Sorted(maps.Keys(lines))
}

// elsewhere are the lines that other tests try, or that this one is made by.
var elsewhere = []string{
	`sudo dpkg -i berth_\*.deb|sudo dpkg -r berth`,       // integration/dist
	`berth (install|uninstall)( --dry-run)?`,             // integration/install
	`systemctl --user .*`,                                // takes a systemd; integration/install has what it reads verified
	`berth build --race`,                                 // minutes; `make race` begins with it
	`PATH=\$PWD/build/bin:\$PATH .* dockerd-rootless.sh`, // every stack is started so
	`berth build --base VERSION`,                         // hack/build, integration/upstream
	`berth rebase --dry-run VERSION`,                     // hack/rebase
	`berth patch|git -C \.\./moby am .*`,                 // hack/patch, integration/upstream
	`make (stress(-full|-docs)?|test|dist|users|clients|fleet|vm|soak|race|build|bench|model|bases|patch|upstream-integration)`, // checked to be targets
	`berth --help`,                          // read above
	`berth doctor.*`,                        // TestDoctor
	`sudo (ss|sysctl|setcap) .*|ip address`, // integration/e2e
}

// Every line that people are told to type does what is said of it, in an order that a day has.
func TestDocumentedLines(t *testing.T) {
	u := newUser(t)
	for _, name := range []string{"", "second", "third"} {
		u.purgeAfter(t, name)
	}
	lines := documented(t, u)
	tried := map[string]bool{}
	do := func(line, says string) ran {
		t.Helper()
		assert.Assert(t, slices.Contains(lines, line), "nobody is told to type %q", line)
		tried[line] = true
		return u.ok(t, line, says)
	}

	do("berth build", "")
	do("berth build dockerd rootlesskit2", "")
	u.ok(t, "berth --version", "berth ")
	u.ok(t, "berth status", "none: `berth up` starts one")
	u.fails(t, "berth env", 1, "nothing is up: start a stack with `berth up`")
	u.fails(t, "berth restart", 1, "there is no stack to restart")
	u.ok(t, "berth down", "nothing is up")

	u.env = append(u.env, "HTTP_PROXY=http://127.0.0.1:9")
	up := do("berth up", "dockerd is up at unix://"+u.home+"/.berth/run/docker.sock")
	assert.Assert(t, is.Contains(up.stdout, "cgroups: "))
	u.ok(t, "berth up", "the stack is up already")
	u.fails(t, "berth up --stock", 1, "perhaps with other options")
	env := do(`eval "$(berth env)"`, "")
	assert.Equal(t, env.stderr, "")
	docker := func(command string) string {
		t.Helper()
		return strings.TrimSpace(u.ok(t, `eval "$(berth env)"; `+command, "").stdout)
	}
	assert.Assert(t, is.Contains(docker("docker version"), "+berth."))
	assert.Equal(t, docker("docker info -f '{{.HTTPProxy}}'"), "http://127.0.0.1:9")
	docker("docker volume create kept")

	for _, says := range []string{"up", "patched", "unchanged since", "gvisor-tap-vsock, port driver builtin", "yes: it looks", u.root} {
		do("berth status", says)
	}
	var status struct {
		Up, Patched, Differs bool
		Dockerd              struct {
			PID int
		}
	}
	assert.NilError(t, json.Unmarshal([]byte(do("berth status --json", "").stdout), &status))
	assert.Assert(t, status.Up && status.Patched && !status.Differs && status.Dockerd.PID > 0, "%+v", status)
	do("berth logs", "API listen on")
	tried["berth logs -f"] = true
	follow := u.start(t, checkout.Bin(u.root, "berth"), "logs", "-f")
	waitFor(t, "the log", func() bool { return strings.Contains(follow.stdout.text(), "API listen on") })
	assert.NilError(t, follow.Process.Signal(unix.SIGINT))
	assert.Equal(t, follow.wait(t).status, 0)

	do("berth restart", "dockerd is up again")
	assert.Equal(t, docker("docker volume ls -q"), "kept")
	do("berth up --name second --stock", "dockerd is up at unix://"+u.home+"/.berth-second")
	u.ok(t, "berth status --name second", "no: stock does not look")
	do("berth up --name third --net slirp4netns --port-driver slirp4netns", "dockerd is up")
	u.ok(t, "berth status --name third", "slirp4netns, port driver slirp4netns")
	u.ok(t, "berth down --purge --name second", "removed "+u.home+"/.berth-second, with 0 containers")
	u.ok(t, "berth down --purge --name third", "removed ")

	do("berth down", "keeps what it has")
	u.ok(t, "berth down", "keeps what it has")
	u.ok(t, "berth status", "down: `berth up` starts it again")
	do("berth up", "dockerd is up again")
	assert.Equal(t, docker("docker volume ls -q"), "kept")

	another(t, u)

	do("berth down --purge", "removed "+u.home+"/.berth, with 0 containers, 0 images, 1 volume")
	u.ok(t, "berth down --purge", "there is nothing to remove")
	do("berth stress -n 40", "Berth to stock: ")
	do("berth stress --list", "row-100")
	measured(t, u, do)

	targets, err := os.ReadFile(filepath.Join(u.root, "Makefile"))
	assert.NilError(t, err)
	for _, line := range lines {
		if target, ok := strings.CutPrefix(line, "make "); ok {
			assert.Check(t, is.Contains(string(targets), "\n"+target+":"), "there is no such target")
		}
		if tried[line] || slices.ContainsFunc(elsewhere, func(p string) bool {
			return regexp.MustCompile("^(" + p + ")$").MatchString(line)
		}) {
			continue
		}
		t.Errorf("people are told to type %q, and no test does", line)
	}
}

// measured has three cells measured: what became of them is told and kept, also by who is interrupted, and nothing else is left.
func measured(t *testing.T, u *user, do func(line, says string) ran) {
	t.Helper()
	const line = "berth stress --contender berth,berth-no-view,stock --load row-100 --request tcp --starts 10"
	file := checkout.Results(u.root, "stress.json")
	assert.NilError(t, os.RemoveAll(file))
	for _, name := range []string{"berth", "berth-no-view", "stock"} {
		u.purgeAfter(t, "stress-"+name)
	}
	do(line, "kept in "+file)
	cells := func() map[string]*harness.Cell {
		t.Helper()
		r, err := harness.LoadResults(file)
		assert.NilError(t, err)
		found := map[string]*harness.Cell{}
		for _, c := range r.Cells {
			found[c.Contender] = c
		}
		return found
	}
	for name, want := range map[string]int{"berth": 10, "berth-no-view": 10, "stock": 0} {
		c := cells()[name]
		assert.Assert(t, c != nil, name)
		assert.Check(t, is.Equal(c.Summary.Published, want), "%s: %+v", name, c)
		assert.Check(t, is.Equal(len(c.Starts), 10), name)
	}
	again := u.ok(t, line, "row-100")
	assert.Check(t, is.Equal(strings.Count(again.stderr, "measured before"), 3), again.stderr)

	interrupted := u.start(t, "sh", "-c", "exec "+strings.Replace(line, "--starts 10", "--starts 500", 1))
	t.Cleanup(func() { interrupted.Process.Kill() })
	turn := regexp.MustCompile(`berth; [1-9]\d* of 1500 starts`)
	waitFor(t, "the first turn", func() bool { return turn.MatchString(interrupted.stderr.text()) })
	assert.NilError(t, interrupted.Process.Signal(unix.SIGINT))
	r := interrupted.wait(t)
	assert.Equal(t, r.status, 1, "%+v", r)
	c := cells()["berth"]
	assert.Check(t, c.Wanted == 500 && len(c.Starts) > 0 && len(c.Starts) < 500, "%d of %d", len(c.Starts), c.Wanted)
	for name := range cells() {
		assert.Check(t, !at(t, "stress-"+name).Exists(), name)
	}
	assert.NilError(t, os.Remove(file))
}

// Every line about doctor that people are told to type can be typed, and says something. What it should say, hack/doctor's tests
// hold it to.
func TestDoctor(t *testing.T) {
	u := newUser(t)
	dir := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "compose.yaml"), []byte("services: {a: {image: x, ports: [\"8080:80\"]}, b: {image: x, ports: [\"8080:80\"]}}"), 0o600))
	tried := 0
	for _, line := range documented(t, u) {
		if !strings.HasPrefix(line, "berth doctor") {
			continue
		}
		tried++
		r := u.sh(t, "cd '"+dir+"' && "+line)
		assert.Check(t, r.status == 0 || r.status == 1, "%s: %+v", line, r)
		assert.Check(t, r.stdout != "", line)
		switch line {
		case "berth doctor compose.yaml":
			assert.Check(t, is.Contains(r.stdout, "is wanted by service a, too"))
		case "berth doctor 192.0.2.9:8080", "berth doctor 9000/sctp":
			assert.Check(t, is.Equal(r.status, 1), line)
		case "berth doctor --json 80":
			var printed struct{ Version int }
			assert.Check(t, json.Unmarshal([]byte(r.stdout), &printed))
			assert.Check(t, is.Equal(printed.Version, 1))
		}
	}
	assert.Assert(t, tried > 5)
	u.ok(t, "berth doctor --ignore privileged 80", "ok")
	u.ok(t, "berth doctor 0", "can be published at ")
	for line, colour := range map[string]bool{
		"script -qec 'berth doctor 80' /dev/null": true, "NO_COLOR=1 script -qec 'berth doctor 80' /dev/null": false, "berth doctor 80": false,
	} {
		r := u.sh(t, line)
		assert.Check(t, is.Equal(r.status, 1), line)
		assert.Check(t, is.Contains(r.stdout, "fail"), line)
		assert.Check(t, is.Equal(strings.Contains(r.stdout, "\x1b["), colour), "%s: %q", line, r.stdout)
	}
	u.fails(t, "berth doctor nosuch", 2, "want PORT[/PROTO]")
	u.fails(t, "berth doctor --ignore nosuch", 2, `no check "nosuch"`)
}

// Without a stack of `berth up`, the Docker that is looked at is the user's own, in XDG_RUNTIME_DIR.
func TestDoctorOfAUsersOwnDocker(t *testing.T) {
	u := newUser(t)
	u.purgeAfter(t, "own")
	u.ok(t, "berth up --name own", "dockerd is up")
	dir := filepath.Join(at(t, "own").Dir, "run")
	u.ok(t, "XDG_RUNTIME_DIR='"+dir+"' berth doctor --ignore tun", ", patched")
	r := u.sh(t, "XDG_RUNTIME_DIR='"+dir+"' berth doctor 80 9000/sctp")
	assert.Equal(t, r.status, 1)
	assert.Assert(t, is.Contains(r.stdout, "setcap cap_net_bind_service=ep /"), "RootlessKit is seen: %s", r.stdout)
}

// another checkout of the same user leaves this one's stack alone, and says whose it is.
func another(t *testing.T, u *user) {
	t.Helper()
	dir := t.TempDir()
	bin := checkout.Bin(dir)
	assert.NilError(t, os.MkdirAll(bin, 0o755))
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module berth\n"), 0o644))
	berth := filepath.Join(bin, "berth")
	u.ok(t, fmt.Sprintf("cp '%s' '%s'", checkout.Bin(u.root, "berth"), berth), "")
	for _, args := range []string{"up", "down", "down --purge", "restart"} {
		u.fails(t, berth+" "+args, 1, "is that of another checkout, "+u.root)
	}
	u.ok(t, berth+" status", u.root)
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if ok() {
			return poll.Success()
		}
		return poll.Continue("waiting for %s", what)
	}, poll.WithTimeout(time.Minute), poll.WithDelay(5*time.Millisecond))
}

// Ctrl-C ends a start at whatever stage, with status 1, and leaves nothing.
func TestCtrlC(t *testing.T) {
	u := newUser(t)
	u.purgeAfter(t, "ctrl-c")
	s := at(t, "ctrl-c")
	for _, stage := range []string{"", "home", "run/dockerd-rootless", "run/docker.pid", "run/docker/containerd/containerd.sock"} {
		t.Run(stage, func(t *testing.T) {
			up := u.start(t, checkout.Bin(u.root, "berth"), "up", "--name", "ctrl-c")
			waitFor(t, stage, func() bool {
				_, err := os.Lstat(filepath.Join(s.Dir, stage))
				return err == nil
			})
			assert.NilError(t, up.Process.Signal(unix.SIGINT))
			r := up.wait(t)
			assert.Equal(t, r.status, 1, "%+v", r)
			assert.Assert(t, !s.Exists())
			status, err := s.Status(t.Context())
			assert.NilError(t, err)
			assert.Equal(t, len(status.Processes), 0, "%v", status.Processes)
		})
	}
}

// A daemon that was killed is told, and comes up again.
func TestDeadDaemon(t *testing.T) {
	u := newUser(t)
	u.purgeAfter(t, "dead")
	u.ok(t, "berth up --name dead", "dockerd is up")
	stacktest.Kill(t, at(t, "dead"), "dockerd")
	waitFor(t, "the end of dockerd", func() bool { return !at(t, "dead").Running(t.Context()) })
	u.ok(t, "berth status --name dead", "berth ")
	u.fails(t, "berth env --name dead", 1, "nothing is up: start a stack with `berth up --name dead`")
	u.ok(t, "berth up --name dead", "dockerd is up again")
	u.ok(t, "berth down --purge --name dead", "removed ")
}

// A home that is too small, or gone, is said, and is in nobody's way.
func TestHomes(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting takes root")
	}
	u := newUser(t)
	s := at(t, "")
	// A mount namespace of the test's own has another home.
	inside := func(t *testing.T, mount string, lines ...string) ran {
		t.Helper()
		r := u.start(t, "unshare", "--mount", "sh", "-c", mount+" || exit 99\n"+strings.Join(lines, "\n"))
		return r.wait(t)
	}
	tmpfs := func(size string) string {
		return fmt.Sprintf("mount -t tmpfs -o size=%s,uid=%d,mode=700 small '%s'", size, s.UID(), u.home)
	}
	t.Run("full", func(t *testing.T) {
		r := inside(t, tmpfs("4k"), "berth up --name full; echo status $?; ls -A '"+u.home+"'")
		assert.Assert(t, is.Contains(r.stderr, "no space left on device"))
		assert.Equal(t, r.stdout, "status 1\n")
	})
	t.Run("filled later", func(t *testing.T) {
		r := inside(t, tmpfs("64m"), "set -e; berth up --name full >/dev/null",
			"! cat /dev/zero >'"+u.home+"/filler' 2>/dev/null", "berth down --name full", "berth down --purge --name full", "ls -A '"+u.home+"'")
		assert.Equal(t, r.status, 0, "%+v", r)
		assert.Assert(t, is.Contains(r.stdout, "removed "+u.home+"/.berth-full\nfiller"))
	})
	t.Run("gone", func(t *testing.T) {
		r := inside(t, "mount -t tmpfs none '"+filepath.Dir(u.home)+"'", "berth up")
		assert.Equal(t, r.status, 1)
		assert.Assert(t, is.Contains(r.stderr, fmt.Sprintf("the home of user %s: stat %s: no such file or directory", s.User(), u.home)))
	})
}
